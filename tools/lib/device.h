/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The kernel interface, call by call: the one place in user space with ioctls. For
 * the library, which hides it, and for tests of the module, which want bare handles.
 *
 * Functions return 0, a count or a descriptor (close-on-exec), and a negative errno on
 * failure; the errnos are those of <linux/kvscratch.h>. Nothing here allocates or prints.
 */
#ifndef DEVICE_H
#define DEVICE_H

#include "libkvscratch.h"

#include <sys/types.h>

/*
 * Open the device node: ENOENT when the module is not loaded, EACCES without permission on
 * it. @access is O_RDWR, O_RDONLY or O_WRONLY.
 */
int device_open(int access);

/* Make a pad through @node, an open device node; returns a handle for read and write. */
int device_create_on(int node, uint64_t max_seq_len, const struct kvscratch_plane *planes,
		     uint32_t nr_planes);

/* The same with a tag of KVSCRATCH_TAG_BYTES */
int device_create_tagged(int node, uint64_t max_seq_len, const struct kvscratch_plane *planes,
			 uint32_t nr_planes, const void *tag);

/* The same through a node that is opened for it */
int device_create_planes(uint64_t max_seq_len, const struct kvscratch_plane *planes,
			 uint32_t nr_planes);

/* A pad of one plane of [max_seq_len, dim] elements of @dtype */
int device_create(uint64_t max_seq_len, uint32_t dim, uint32_t dtype);

/*
 * The same for a pad of integers that are made of the rows that an append takes:
 * see struct kvscratch_plane in <linux/kvscratch.h>. @input_dtype 0 is @dtype.
 */
int device_create_scaled(uint64_t max_seq_len, uint32_t dim, uint32_t dtype, uint32_t input_dtype,
			 uint32_t frac_bits);

/*
 * Make a pad of @max_seq_len rows that begins with the first @rows of that of @fd, which has
 * to be in @generation; returns a handle for read and write.
 */
int device_fork_on(int node, int fd, uint64_t rows, uint64_t generation, uint64_t max_seq_len);

/* The same through a node that is opened for it */
int device_fork(int fd, uint64_t rows, uint64_t generation, uint64_t max_seq_len);

/* Open another handle on the pad of @fd, for read, write or both: @access as of open() */
int device_reopen(int fd, int access);

/* Open a read-only handle on the pad of @fd. */
int device_open_reader(int fd);

/* Open a handle that is the pad's writer; @flags is 0 or KVSCRATCH_OPEN_TAKEOVER. */
int device_open_writer(int fd, uint32_t flags);

/* Describe the pad of @fd, one of one plane. */
int device_info(int fd, struct kvscratch_info *info);

/* Describe any pad, and up to @count of its planes from @first on. */
int device_pad_info(int fd, struct kvscratch_pad_info *info);
int device_planes(int fd, uint32_t first, struct kvscratch_plane *planes, uint32_t count);

/* Keep the first @len rows; @flags is 0 or KVSCRATCH_TRUNCATE_ZERO. */
int device_truncate(int fd, uint64_t len, uint32_t flags);

/* The same only if generation and len are the expected ones */
int device_truncate_if(int fd, uint64_t len, uint32_t flags, uint64_t expected_generation,
		       uint64_t expected_len);

/*
 * Append @bytes bytes, a whole number of tokens: all of them or none. EINTR, after
 * a signal whose handler does not restart calls, is none.
 */
int device_append(int fd, const void *rows, size_t bytes);

/* The calls of the writer: put rows of a plane in their place, keep them there, commit. */
int device_stage(int fd, uint32_t plane, uint64_t row, const void *rows, uint64_t nr_rows);
int device_keep(int fd, uint32_t plane, uint64_t row, uint64_t nr_rows);
int device_commit(int fd, uint64_t len);

/* Make len final. */
int device_seal(int fd);

/* Tell poll() that @state was seen. */
int device_seen(int fd, uint64_t state);

/*
 * Map elements, scales and status page of @fd, a pad of one plane, read-only, and have all of it there: no later access
 * takes a page fault. The view outlives @fd.
 */
int device_map(int fd, struct kvscratch_view *view);
void device_unmap(struct kvscratch_view *view);

#endif
