/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What the library and its backends share: the pad object, the calls that differ
 * between a pad of the module and one in a memfd, and how errors get their words.
 */
#ifndef BACKEND_H
#define BACKEND_H

#include "../../kvscratch_layout.h"
#include "libkvscratch.h"

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

struct memfd_plane;
struct memfd_page;

/**
 * struct memfd_parts - what lies behind the planes of a memfd
 * @status: the status page, where the mapping of them begins
 * @planes: its planes, of which nobody relies on the geometry once the pad was adopted
 * @page: the last page
 * @bytes: length of the mapping
 */
struct memfd_parts {
	struct kvscratch_status *status;
	struct memfd_plane *planes;
	struct memfd_page *page;
	size_t bytes;
};

/**
 * struct memfd_role - the role of the writer of a memfd
 * @fd: an open file of its own, which has the lock and is not mapped: a view would keep it
 * @epoch: that of the role
 */
struct memfd_role {
	int fd;
	uint32_t epoch;
};

/**
 * struct kvscratch - a handle on a pad
 * @backend: what its calls do
 * @fd: the descriptor, owned
 * @access: its access mode
 * @planes: all of it, in memory of its own
 * @nr_planes: how many
 * @info: the pad as it was when the handle was made; only what never changes counts
 * @view: mapped by the first who wants it, or NULL; stored with release, once
 * @memfd: of a memfd: mapped for the life of the object
 * @is_writer: it was made by kvscratch_writer() or kvscratch_takeover()
 * @role: of a memfd's writer
 */
struct kvscratch {
	const struct backend *backend;
	int fd;
	int access;
	struct kvscratch_plane *planes;
	uint32_t nr_planes;
	struct kvscratch_info info;
	const struct kvscratch_view *view;
	struct memfd_parts memfd;
	bool is_writer;
	struct memfd_role role;
};

/**
 * struct new_pad - a pad that is to be made
 * @max_seq_len: rows that fit
 * @planes: all of it, laid out
 * @nr_planes: how many
 * @layout: what follows from that
 * @rows: of a fork, those that it begins with
 * @parent_id: of a fork, the pad it is of
 * @tag: the caller's
 */
struct new_pad {
	uint64_t max_seq_len;
	struct kvscratch_plane *planes;
	uint32_t nr_planes;
	struct kvs_layout layout;
	uint64_t rows;
	uint64_t parent_id;
	uint8_t tag[KVSCRATCH_TAG_BYTES];
};

/**
 * struct backend - where pads live
 * @create: make a pad; returns a handle that may do everything
 * @fork: the same with the first rows of @source, if its generation is that one
 * @reopen: open another handle on the pad of @fd; @access is one that @fd has
 * @adopt: look at pad->fd, which somebody opened with pad->access: whether it
 *	is one of ours (ENOTTY), and its planes and pad->info
 * @release: undo @adopt, but for the planes, and end the role of a writer
 * @info: the pad as it is now
 * @append: append whole tokens as the pad takes them, all or none
 * @truncate: keep the first rows
 * @wait: sleep until the state is another one
 * @open_writer: open the handle of the pad's writer; @flags is 0 or
 *	KVSCRATCH_OPEN_TAKEOVER, *@role receives what a memfd has besides
 * @stage: put rows in place, or keep them
 * @commit: commit staged rows
 * @seal: make len final
 * @seen: tell poll() about a state
 *
 * All return 0, or a negative errno that fail() gave words to.
 */
struct backend {
	enum kvscratch_backend id;
	int (*create)(int *fd, struct new_pad *made);
	int (*fork)(int *fd, struct kvscratch *source, struct new_pad *made, uint64_t generation);
	int (*reopen)(int *fd, int src_fd, int access);
	int (*adopt)(struct kvscratch *pad);
	void (*release)(struct kvscratch *pad);
	int (*info)(struct kvscratch *pad, struct kvscratch_pad_info *info);
	int (*append)(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens);
	int (*truncate)(struct kvscratch *pad, const struct kvscratch_truncate *truncate);
	int (*wait)(struct kvscratch *pad, uint64_t state, int timeout_ms);
	int (*open_writer)(const struct kvscratch *pad, uint32_t flags, int *fd,
			   struct memfd_role *role);
	int (*stage)(struct kvscratch *pad, const struct kvscratch_stage *stage);
	int (*commit)(struct kvscratch *pad, uint64_t len);
	int (*seal)(struct kvscratch *pad);
	int (*seen)(struct kvscratch *pad, uint64_t state);
};

extern const struct backend kernel_backend;
extern const struct backend memfd_backend;

/* Keep a sentence for kvscratch_error() and return @err. */
int set_error(int err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same with what kvscratch_strerror() says behind "cannot @what: " */
int cannot(const char *what, int err);

/* In the words of the model; both return -ENOSPC. */
int fail_room(uint64_t len, uint64_t rows, uint64_t max_seq_len);

int out_of_memory(void);

/* Of values that do not fit a pad of @len rows; they return -EINVAL, and the last -ECANCELED. */
int fail_truncate(uint64_t len, uint64_t wanted);
int fail_stage(const struct kvscratch_stage *stage, const struct kvscratch_plane *plane,
	       uint64_t len);
int fail_commit(uint64_t len, uint64_t wanted);
int fail_expectation(const struct kvscratch_truncate *truncate, uint64_t generation, uint64_t len);

/* "cannot create a pad of ...: @why" */
int fail_create(const struct new_pad *made, int err, const char *why);

/* -EBADF, with words, when a handle is not open for @access, O_RDONLY or O_WRONLY */
int check_access(const struct kvscratch *pad, int access);

/* -EINVAL, with words, when @access is no mode of a handle */
int check_mode(int access);

/* -EINVAL, with words, when there is no such plane */
int check_plane(const struct kvscratch *pad, uint32_t plane);

/* Say of which of several planes the latest words are; returns @err. */
int of_plane(int err, uint32_t index);

/* -EOPNOTSUPP, with words, for a pad of several planes */
int check_one_plane(const struct kvscratch *pad);

/* @len, or -EPROTO for one that cannot be: a memfd says whatever its writers do. */
int64_t check_len(const struct kvscratch *pad, uint64_t len);

/* Make an object of @fd, which it takes over, or closes when that fails. */
int adopt_or_close(struct kvscratch **pad, const struct backend *backend, int fd, int access);

/*
 * Whether a view has another state than @state: 1, 0, or -EROFS, with words, when it is sealed
 * and will have none.
 */
int wait_is_over(const struct kvscratch_view *view, uint64_t state);

/* As of kvscratch_view(), but NULL where nobody mapped it yet */
const struct kvscratch_view *mapped_view(const struct kvscratch *pad);

/* Copies, to be freed, of what planes are made of, each @plane_bytes behind the one before; or NULL */
struct kvscratch_plane *copy_planes(const struct kvscratch_plane *planes, uint32_t count,
				    size_t plane_bytes);

/* -ECANCELED, with words, of a fork of what was truncated meanwhile */
int fail_fork(void);

/* What a plane is made of, without what somebody else's layout said of it */
void copy_inputs(struct kvscratch_plane *to, const struct kvscratch_plane *from);

/**
 * lay_out_planes() - check planes and lay out their mapping, as the kernel does
 * @layout: receives what follows from all of them
 * @planes: dim, dtype, input_dtype, frac_bits and label count; receive the rest
 * @nr_planes: how many
 * @max_seq_len: capacity in rows
 *
 * Returns -EINVAL, with words, for what the format does not allow.
 */
int lay_out_planes(struct kvs_layout *layout, struct kvscratch_plane *planes, uint32_t nr_planes,
		   uint64_t max_seq_len);

/* The same for a pad of one plane: @info receives all that follows from @geometry. */
int lay_out(struct kvscratch_info *info, const struct kvscratch_geometry *geometry);

/* What kvscratch_info() has of a pad; of several planes only what they have in common */
void describe(struct kvscratch_info *info, const struct kvscratch_pad_info *pad,
	      const struct kvscratch_plane *planes);

/* Have all pages of a mapping there; 0 or a negative errno */
int populate(const void *at, size_t bytes);

/**
 * map_view() - map a pad and have its pages there
 * @view: max_seq_len, planes and nr_planes count; receives the rest
 * @fd: a handle of either backend, open for read
 * @status_offset: where its mapping has the status page
 *
 * Returns a negative errno: EOVERFLOW beyond the addresses of a 32-bit program, and those of
 * mmap() and madvise().
 */
int map_view(struct kvscratch_view *view, int fd, uint64_t status_offset);

#endif
