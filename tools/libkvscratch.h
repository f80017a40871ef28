/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * libkvscratch: the one place in user space that knows the kernel interface.
 *
 * Functions return 0 or a count, and a negative errno on failure; the errnos
 * are those of <linux/kvscratch.h>. Nothing here allocates or prints.
 */
#ifndef LIBKVSCRATCH_H
#define LIBKVSCRATCH_H

#include <linux/kvscratch.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define KVSCRATCH_DEVICE "/dev/kvscratch"

/**
 * kvscratch_open() - open a handle that is not bound to a pad yet
 * @access: O_RDWR, O_RDONLY or O_WRONLY
 *
 * Returns the descriptor (close-on-exec) or a negative errno: ENOENT when the
 * module is not loaded, EACCES without permission on the device node.
 */
int kvscratch_open(int access);

/* Bind @fd to a new pad of [max_seq_len, dim] elements of @dtype. */
int kvscratch_create(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype);

/*
 * The same for a pad of integers that are made of the rows that an append takes:
 * see struct kvscratch_create in <linux/kvscratch.h>. @input_dtype 0 is @dtype.
 */
int kvscratch_create_scaled(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype,
			    uint32_t input_dtype, uint32_t frac_bits);

/* Bind @fd to the pad of @src_fd. */
int kvscratch_attach(int fd, int src_fd);

/* Open a read-only handle of its own on the pad of @src_fd. */
int kvscratch_open_reader(int src_fd);

/* Describe the pad of @fd. */
int kvscratch_info(int fd, struct kvscratch_info *info);

/* Keep the first @len rows; @flags is 0 or KVSCRATCH_TRUNCATE_ZERO. */
int kvscratch_truncate(int fd, uint64_t len, uint32_t flags);

/*
 * Append @bytes bytes, a whole number of rows: all of them or none. EINTR, after
 * a signal whose handler does not restart calls, is none.
 */
int kvscratch_append(int fd, const void *rows, size_t bytes);

/**
 * struct kvscratch_view - a mapped pad
 * @data: the [max_seq_len, dim] array; rows below the len of a loaded state
 *	are committed
 * @status: the status page
 * @info: the pad as it was when it was mapped
 * @mapped_bytes: length of the mapping that begins at @data
 */
struct kvscratch_view {
	const void *data;
	const struct kvscratch_status *status;
	struct kvscratch_info info;
	size_t mapped_bytes;
};

/* The [max_seq_len, dim / 32] array of scale bytes of an MXINT8 pad, otherwise NULL */
static inline const uint8_t *kvscratch_view_scales(const struct kvscratch_view *view)
{
	if (view->info.nr_planes < 2)
		return NULL;
	return (const uint8_t *)view->data + view->info.planes[1].offset;
}

/* Map data and status page of @fd read-only. The view outlives @fd. */
int kvscratch_map(int fd, struct kvscratch_view *view);
void kvscratch_unmap(struct kvscratch_view *view);

/*
 * Load generation and len in one consistent word; rows below the len are
 * committed. Pairs with the kernel's release store of the state.
 */
static inline uint64_t kvscratch_word_load(const union kvscratch_word *word)
{
#if UINTPTR_MAX > 0xffffffffu
	return __atomic_load_n(&word->word, __ATOMIC_ACQUIRE);
#else
	const __u32 *generation = &word->half[KVSCRATCH_WORD_GENERATION];
	const __u32 *rows = &word->half[KVSCRATCH_WORD_LEN];
	uint32_t before, len, after;

	do {
		before = __atomic_load_n(generation, __ATOMIC_ACQUIRE);
		len = __atomic_load_n(rows, __ATOMIC_ACQUIRE);
		after = __atomic_load_n(generation, __ATOMIC_ACQUIRE);
	} while (before != after);
	return (uint64_t)after << 32 | len;
#endif
}

static inline uint64_t kvscratch_view_state(const struct kvscratch_view *view)
{
	return kvscratch_word_load(&view->status->state);
}

static inline uint32_t kvscratch_state_len(uint64_t state)
{
	return (uint32_t)state;
}

static inline uint32_t kvscratch_state_generation(uint64_t state)
{
	return state >> 32;
}

/**
 * kvscratch_view_valid_rows() - which of the rows read since @state are good
 * @view: the view they were read from
 * @state: what kvscratch_view_state() returned before the reading began
 *
 * Returns n: rows below n, as they were read, are what was committed. It is
 * the len of @state unless a truncate came in between.
 */
static inline uint32_t kvscratch_view_valid_rows(const struct kvscratch_view *view, uint64_t state)
{
	uint32_t generation = kvscratch_state_generation(state);
	uint32_t len = kvscratch_state_len(state);
	uint32_t now, kept;
	uint64_t trunc;

	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	now = kvscratch_state_generation(kvscratch_view_state(view));
	if (now == generation)
		return len;
	trunc = kvscratch_word_load(&view->status->trunc);
	if (now != (uint32_t)(generation + 1) || kvscratch_state_generation(trunc) != now)
		return 0;
	kept = kvscratch_state_len(trunc);
	return kept < len ? kept : len;
}

/* "f32" and the like; NULL and 0 for what is no dtype. */
const char *kvscratch_dtype_name(uint32_t dtype);
uint32_t kvscratch_dtype_by_name(const char *name);
/* Bytes per element; 0 for what is no dtype. */
uint32_t kvscratch_dtype_size(uint32_t dtype);

/* What a negative errno of any function here means, without a full stop */
const char *kvscratch_strerror(int err);

/* The most handles that fit one message (the kernel's SCM_MAX_FD). */
#define KVSCRATCH_MAX_PASSED 253

/**
 * kvscratch_send_handles() - pass handles over a connected Unix stream socket
 * @sock: the socket
 * @names: one NUL-terminated name per handle, without white space
 * @fds: the handles
 * @count: 1 to KVSCRATCH_MAX_PASSED
 *
 * The message is a little-endian u32 with the length of the text that follows,
 * and the text: each name and a newline, in the order of the descriptors,
 * which ride on the first byte.
 */
int kvscratch_send_handles(int sock, const char *const *names, const int *fds, unsigned int count);

/**
 * kvscratch_receive_handles() - take what kvscratch_send_handles() passed
 * @sock: the socket
 * @text: receives the names, each ended by NUL instead of the newline
 * @text_size: bytes at @text
 * @fds: receives the handles, close-on-exec; the caller closes them
 * @max_fds: entries at @fds
 *
 * Returns how many handles came. EPROTO when the message is malformed, carries
 * more than fits, or names and descriptors do not agree; EMFILE when this process
 * may not have that many descriptors; ECONNRESET when the peer hung up; nothing
 * is left open then.
 */
int kvscratch_receive_handles(int sock, char *text, size_t text_size, int *fds,
			      unsigned int max_fds);

/* Listen on, or connect to, the Unix stream socket at @path. */
int kvscratch_listen(const char *path);
int kvscratch_connect(const char *path);

#endif
