/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What the library and its backends share: the pad object, the calls that differ
 * between a pad of the module and one in a memfd, and how errors get their words.
 */
#ifndef BACKEND_H
#define BACKEND_H

#include "libkvscratch.h"

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

struct memfd_page;

/**
 * struct kvscratch - a handle on a pad
 * @backend: what its calls do
 * @fd: the descriptor, owned
 * @access: its access mode
 * @info: the pad as it was when the handle was made; only what never changes counts
 * @view: mapped by the first who wants it, or NULL; stored with release, once
 * @page: of a memfd: the status page, mapped for the life of the object
 */
struct kvscratch {
	const struct backend *backend;
	int fd;
	int access;
	struct kvscratch_info info;
	const struct kvscratch_view *view;
	struct memfd_page *page;
};

/**
 * struct backend - where pads live
 * @create: make a pad; returns a handle that may do everything
 * @reopen: open another handle on the pad of @fd; @access is one that @fd has
 * @adopt: look at pad->fd, which somebody opened with pad->access: whether it
 *	is one of ours (ENOTTY), and its pad->info
 * @release: undo @adopt
 * @info: the pad as it is now
 * @append: append whole rows of what the pad takes, all or none
 * @truncate: keep the first rows
 * @wait: sleep until the state is another one
 *
 * All return 0, or a negative errno that fail() gave words to.
 */
struct backend {
	enum kvscratch_backend id;
	int (*create)(int *fd, const struct kvscratch_geometry *geometry);
	int (*reopen)(int *fd, int src_fd, int access);
	int (*adopt)(struct kvscratch *pad);
	void (*release)(struct kvscratch *pad);
	int (*info)(struct kvscratch *pad, struct kvscratch_info *info);
	int (*append)(struct kvscratch *pad, const void *rows, uint64_t nr_rows);
	int (*truncate)(struct kvscratch *pad, uint64_t len, uint32_t flags);
	int (*wait)(struct kvscratch *pad, uint64_t state, int timeout_ms);
};

extern const struct backend kernel_backend;
extern const struct backend memfd_backend;

/* Keep a sentence for kvscratch_error() and return @err. */
int set_error(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same with what kvscratch_strerror() says behind "cannot @what: " */
int cannot(const char *what, int err);

/* In the words of the model; both return -ENOSPC. */
int fail_room(uint64_t len, uint64_t rows, uint64_t max_seq_len);

/**
 * lay_out() - check a geometry and lay out its mapping, as the kernel does
 * @info: receives all that follows from it
 * @geometry: what the pad is to be made of
 *
 * Returns -EINVAL, with words, for what the format does not allow.
 */
int lay_out(struct kvscratch_info *info, const struct kvscratch_geometry *geometry);

/**
 * map_view() - map a pad and have its pages there
 * @view: info counts; receives the rest
 * @fd: a handle of either backend, open for read
 *
 * Returns a negative errno: EOVERFLOW beyond the addresses of a 32-bit program, and those of
 * mmap() and madvise().
 */
int map_view(struct kvscratch_view *view, int fd);

#endif
