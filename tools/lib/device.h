/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The kernel interface, call by call: the one place in user space with ioctls. For
 * the library, which hides it, and for tests of the module, which want bare handles.
 *
 * Functions return 0 or a count, and a negative errno on failure; the errnos
 * are those of <linux/kvscratch.h>. Nothing here allocates or prints.
 */
#ifndef DEVICE_H
#define DEVICE_H

#include "libkvscratch.h"

#include <sys/types.h>

/**
 * device_open() - open a handle that is not bound to a pad yet
 * @access: O_RDWR, O_RDONLY or O_WRONLY
 *
 * Returns the descriptor (close-on-exec) or a negative errno: ENOENT when the
 * module is not loaded, EACCES without permission on the device node.
 */
int device_open(int access);

/* Bind @fd to a new pad of [max_seq_len, dim] elements of @dtype. */
int device_create(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype);

/*
 * The same for a pad of integers that are made of the rows that an append takes:
 * see struct kvscratch_create in <linux/kvscratch.h>. @input_dtype 0 is @dtype.
 */
int device_create_scaled(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype,
			 uint32_t input_dtype, uint32_t frac_bits);

/* Bind @fd to the pad of @src_fd. */
int device_attach(int fd, int src_fd);

/* Open a read-only handle of its own on the pad of @src_fd. */
int device_open_reader(int src_fd);

/* Describe the pad of @fd. */
int device_info(int fd, struct kvscratch_info *info);

/* Keep the first @len rows; @flags is 0 or KVSCRATCH_TRUNCATE_ZERO. */
int device_truncate(int fd, uint64_t len, uint32_t flags);

/*
 * Append @bytes bytes, a whole number of rows: all of them or none. EINTR, after
 * a signal whose handler does not restart calls, is none.
 */
int device_append(int fd, const void *rows, size_t bytes);

/* Map data and status page of @fd read-only. The view outlives @fd. */
int device_map(int fd, struct kvscratch_view *view);
void device_unmap(struct kvscratch_view *view);

#endif
