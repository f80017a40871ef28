/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * libkvscratch: KV-cache scratchpads for transformer inference, for programs in
 * C and C++.
 *
 * A pad is a growing table of at most max_seq_len rows over one or more planes; a row
 * holds one token, and a plane is a dense, row-major [max_seq_len, dim] array of one element
 * type: K of one layer, say. Rows are appended whole, each batch all or nothing; committed
 * rows do not change until a truncate; who holds a handle sees them as plain, growing
 * arrays, read-only and without a copy. <linux/kvscratch.h> has the terms, the data types
 * and the formats of scaled integers.
 *
 * Pads live in /dev/kvscratch or, where that does not exist, in a memfd of the
 * same layout, which keeps fewer of the promises: see kvscratch_promises(). The
 * environment variable KVSCRATCH_BACKEND=kernel|memfd decides for new pads; for
 * others the handle does.
 *
 * Unless it says otherwise a function returns 0 or a count, and a negative errno
 * on failure; kvscratch_error() then has a sentence about it. Output arguments are
 * written on success only. Element counts, rows and lengths are in elements and
 * rows, never bytes, unless the name says bytes. What a handle is not open for is
 * EBADF everywhere but in kvscratch_attach() and kvscratch_open(). What would change a pad is
 * EBUSY while another handle is its writer and EROFS once it is sealed, in every function
 * alike. A signal makes calls that wait fail with
 * EINTR, unless its handler restarts calls (kvscratch_wait() is never restarted), and
 * nothing has been done then. To write to a memfd takes /proc and permission to open it.
 *
 * Threads: one pad object may be used by any number of threads at once, but for
 * kvscratch_close(), which must come last. Appends by many threads, objects and
 * processes are ordered one after the other, each whole. Nothing here is
 * async-signal-safe but the inline loads of views. After fork() the child has the objects
 * as well, and closes its copies. Strings that are returned are constants, but for
 * kvscratch_error().
 *
 * Functions that count in elements, and kvscratch_info(), are for pads of one plane; with
 * another one they fail with EOPNOTSUPP. All others take any pad.
 *
 * Binary interface: programs go on with every later library of this soname. Three structs grow,
 * at their ends, and come with the size that the caller knows: struct kvscratch_info, struct
 * kvscratch_pad_info and struct kvscratch_plane. Struct kvscratch_view, which only the library
 * makes, may grow, too. All others stay as they are.
 *
 * The len of a memfd is what its writers say. Functions refuse one that cannot be
 * (EPROTO); who loads the state itself and does not trust the producer compares it
 * with max_seq_len first.
 */
#ifndef LIBKVSCRATCH_H
#define LIBKVSCRATCH_H

#include <linux/kvscratch.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
/* functions beside structs of the same name, as in C */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"
#endif
/* what a library that hides the rest of its names exports */
#pragma GCC visibility push(default)

#define KVSCRATCH_DEVICE "/dev/kvscratch"

/* A handle on a pad: made by one of the next functions, ended by kvscratch_close() */
struct kvscratch;

/**
 * struct kvscratch_geometry - what a pad is made of
 * @max_seq_len: rows that fit, 1 to KVSCRATCH_MAX_SEQ_LEN
 * @dim: elements per row
 * @dtype: one of enum kvscratch_dtype: what is stored
 * @input_dtype: what is appended; 0 is @dtype
 * @frac_bits: fraction bits of an integer, else 0
 *
 * See struct kvscratch_plane in <linux/kvscratch.h> for what goes together.
 */
struct kvscratch_geometry {
	uint64_t max_seq_len;
	uint32_t dim;
	uint32_t dtype;
	uint32_t input_dtype;
	uint32_t frac_bits;
};

/* Where a pad lives */
enum kvscratch_backend {
	KVSCRATCH_BACKEND_KERNEL = 1,
	KVSCRATCH_BACKEND_MEMFD = 2
};

/*
 * Making and ending handles. @access is O_RDONLY, O_WRONLY or O_RDWR of <fcntl.h>, else it
 * is EINVAL; a memfd has no handles for writing only (EOPNOTSUPP).
 */

/*
 * Make a zero-filled pad of [max_seq_len, dim] elements of @dtype: all its memory is
 * taken here. Errors: EINVAL (a value that the format does not allow), EDQUOT (above
 * the limits: of the module, or half of RAM for a memfd), EFBIG (a memfd is beyond
 * RLIMIT_FSIZE), ENOMEM, EINTR; ENOENT and EACCES of the device, ENODEV when something else
 * lies in its place.
 */
int kvscratch_new(struct kvscratch **pad, uint64_t max_seq_len, uint32_t dim, uint32_t dtype);

/* The same for any geometry. */
int kvscratch_new_geometry(struct kvscratch **pad, const struct kvscratch_geometry *geometry);

/**
 * kvscratch_new_planes_sized() - make a zero-filled pad of planes
 * @pad: receives a handle that may read and write
 * @max_seq_len: rows that fit, 1 to KVSCRATCH_MAX_SEQ_LEN
 * @planes: dim, dtype, input_dtype, frac_bits and label of each; what is output in
 *	struct kvscratch_plane does not matter, so those of another pad will do
 * @nr_planes: 1 to KVSCRATCH_MAX_PLANES
 * @plane_bytes: sizeof(struct kvscratch_plane)
 * @tag: what the caller wants to know the pad by, a model's fingerprint say; may be NULL
 * @tag_bytes: of @tag, at most KVSCRATCH_TAG_BYTES; zeros follow
 *
 * Errors: as of kvscratch_new(); EINVAL also for a label without its NUL and for tokens of
 * more than KVSCRATCH_MAX_ROW_BYTES over all planes.
 */
int kvscratch_new_planes_sized(struct kvscratch **pad, uint64_t max_seq_len,
			       const struct kvscratch_plane *planes, uint32_t nr_planes,
			       size_t plane_bytes, const void *tag, size_t tag_bytes);

/* The same, as this program knows the struct */
static inline int kvscratch_new_planes(struct kvscratch **pad, uint64_t max_seq_len,
				       const struct kvscratch_plane *planes, uint32_t nr_planes,
				       const void *tag, size_t tag_bytes)
{
	return kvscratch_new_planes_sized(pad, max_seq_len, planes, nr_planes, sizeof(*planes),
					  tag, tag_bytes);
}

/*
 * Make a handle of its own on the pad of @fd, whose rights have to include @access
 * (EACCES). @fd stays the caller's. For a memfd it takes /proc. The Rust model's clone(),
 * but for copy-on-write: both share the pad.
 */
int kvscratch_attach(struct kvscratch **pad, int fd, int access);

/*
 * The same for the pad of another object: open a handle of its own on it, with no more
 * rights than @from has (EACCES).
 */
int kvscratch_open(struct kvscratch **pad, const struct kvscratch *from, int access);

/*
 * Use @fd, a handle that was inherited or received, as it is: with its rights, and
 * with a file position that all share who have this open file. The pad object takes
 * over @fd. Fails with ENOTTY when it is no handle, with EPROTO when it is a memfd that
 * somebody made up; @fd is then still the caller's.
 */
int kvscratch_from_fd(struct kvscratch **pad, int fd);

/* End a handle, its views and what kvscratch_as_tensor() gave. NULL does nothing. */
void kvscratch_close(struct kvscratch *pad);

/*
 * The descriptor of a handle, close-on-exec, to be passed on or, of the kernel's, to be
 * polled (see struct kvscratch_status). It stays the pad object's: neither close nor lock it.
 * A copy of the descriptor of a writer is the writer, too, on the module; what
 * kvscratch_from_fd() makes of one on a memfd is an ordinary handle.
 */
int kvscratch_fd(const struct kvscratch *pad);

/* The access mode of a handle: O_RDONLY, O_WRONLY or O_RDWR. */
int kvscratch_access(const struct kvscratch *pad);

/*
 * Open a read-only handle of its own on the pad, to be passed to a reader; returns the
 * descriptor. Each reader gets one: who shares it shares the file position.
 */
int kvscratch_open_reader(const struct kvscratch *pad);

/* Planes: these never fail, but for what there is not */

/* How many */
uint32_t kvscratch_nr_planes(const struct kvscratch *pad);

/* Bytes of a stored token and of one to append, over all planes */
uint32_t kvscratch_row_bytes(const struct kvscratch *pad);
uint32_t kvscratch_input_row_bytes(const struct kvscratch *pad);

/*
 * A plane, all of it filled in, valid as long as @pad. NULL with errno EINVAL when there are
 * not that many.
 */
const struct kvscratch_plane *kvscratch_plane(const struct kvscratch *pad, uint32_t index);

/* The index of the plane @label: ENOENT when none is called so, ENOTUNIQ when several are. */
int kvscratch_find_plane(const struct kvscratch *pad, const char *label);

/* Writing */

/**
 * kvscratch_append() - append one row
 * @pad: a handle that may write
 * @row: its elements, of the pad's input dtype
 * @elements: how many; they have to be dim. Where MXINT8 is appended as it is
 *	stored, the dim / 32 scales follow them, uncounted.
 *
 * Errors: EINVAL (shape mismatch), ENOSPC (full), EDOM (a NaN or an infinity that
 * would become an integer), EFAULT (@row cannot be read; where a memfd has rows
 * converted that is a SIGSEGV), EBADF, EBUSY, EROFS, EINTR. Nothing is committed then.
 * EOPNOTSUPP for a pad of several planes.
 */
int kvscratch_append(struct kvscratch *pad, const void *row, uint32_t elements);

/**
 * kvscratch_append_rows() - append rows, all of them or none
 * @pad: a handle that may write
 * @rows: [nr_rows, elements], row-major
 * @nr_rows: how many rows; 0 does nothing
 * @elements: elements per row; they have to be dim
 *
 * Errors: as of kvscratch_append(), and E2BIG when the batch has more than
 * KVSCRATCH_MAX_WRITE bytes. Readers see the batch at once.
 */
int kvscratch_append_rows(struct kvscratch *pad, const void *rows, uint64_t nr_rows,
			  uint32_t elements);

/**
 * kvscratch_append_tokens() - append whole tokens, all of them or none
 * @pad: a handle that may write, on a pad of any planes
 * @tokens: one after the other: a row of each plane in turn, as the plane takes it
 * @nr_tokens: how many; 0 does nothing
 * @token_bytes: bytes of one; they have to be kvscratch_input_row_bytes()
 *
 * Errors: as of kvscratch_append_rows(), but for EOPNOTSUPP.
 */
int kvscratch_append_tokens(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens,
			    uint32_t token_bytes);

/*
 * Keep the first @len rows; EINVAL when there are fewer. @flags is 0 or
 * KVSCRATCH_TRUNCATE_ZERO, which overwrites with zeros all that was ever written beyond.
 */
int kvscratch_truncate(struct kvscratch *pad, uint64_t len, uint32_t flags);

/*
 * The same, but only if the pad has these rows and this generation, in full as
 * kvscratch_pad_info() tells it; ECANCELED when it has others.
 */
int kvscratch_truncate_if(struct kvscratch *pad, uint64_t len, uint32_t flags,
			  uint64_t expected_generation, uint64_t expected_len);

/* Drop all rows. */
int kvscratch_clear(struct kvscratch *pad, uint32_t flags);

/*
 * Make the present len final: what would change the pad is EROFS from now on. Sealing again
 * does nothing.
 */
int kvscratch_seal(struct kvscratch *pad);

/*
 * Make @child a pad of its own, with the planes and the tag of @pad, room for @max_seq_len rows, and
 * the first @rows committed rows of @pad, which has to be open for read and write, or for read if
 * it is sealed (EBADF). What either appends or drops later the other does not see. The module shares the
 * memory of those rows, whoever goes first; while it does, a truncate that would drop some of
 * them is ETXTBSY. A memfd is copied. ECANCELED when @pad was truncated meanwhile.
 */
int kvscratch_fork(struct kvscratch **child, struct kvscratch *pad, uint64_t rows,
		   uint64_t max_seq_len);

/* A fork of all rows that are committed now, of the same capacity */
int kvscratch_clone(struct kvscratch **child, struct kvscratch *pad);

/* A sealed fork of all rows that are committed now, without room for others */
int kvscratch_snapshot(struct kvscratch **snapshot, struct kvscratch *pad);

/*
 * Go on behind the first @len rows: truncate *@pad or, where another pad shares what that would
 * drop, close it, with its view, and make *@pad a fork of them, of the same capacity and open
 * for read and write, as *@pad has to be. Returns 0, or 1 when it is another pad now, of which
 * those who have the old one do not learn.
 */
int kvscratch_rewind(struct kvscratch **pad, uint64_t len);

/*
 * The writer
 *
 * A pad may have one handle that is its only writer. It is an object of its own, which writes
 * and does not read, and which is the writer for as long as it is open: kvscratch_close()
 * ends the role, and so does the death of its process, but for children that have the
 * descriptor as well. It takes rows of single planes and commits those of all at once.
 */

/*
 * Make @writer the writer of the pad of @pad, a handle that may write: EBUSY when there is
 * one. The second one takes the role from whoever has it, whose calls are ESTALE from then
 * on: for a writer that hangs. Of the module it waits for nobody; of a memfd it waits for a
 * call that the other is in, and when that was killed in it, for a child that another of its
 * threads forked meanwhile, until the child ends or calls execve().
 *
 * Who wants the role once it is free polls a handle open for writing for POLLOUT, on the module;
 * for that of a memfd there is no way but to ask again. The role of a memfd goes along to children
 * and not with a descriptor that is passed on, see kvscratch_fd().
 */
int kvscratch_writer(struct kvscratch **writer, const struct kvscratch *pad);
int kvscratch_takeover(struct kvscratch **writer, const struct kvscratch *pad);

/**
 * kvscratch_stage() - put rows of one plane in their place
 * @writer: of the pad
 * @plane: index of the plane
 * @row: the first one: from the committed rows to what is staged of the plane
 * @rows: as the plane takes them, input_row_bytes each
 * @nr_rows: how many
 *
 * Staged rows are in every view at once, and not committed. When it succeeds, rows up to the
 * larger of what was staged and @row + @nr_rows are; when the copy fails,
 * with EFAULT, EDOM, EINTR or ESTALE, those up to @row. Other errors change nothing.
 *
 * Errors: EINVAL (no such plane; a row that is committed or leaves a gap), ENOSPC, EDOM,
 * EFAULT, ENOLCK (@writer is an ordinary handle), ESTALE (it was taken over), EROFS, EBADF,
 * EINTR; EMFILE of a memfd, each call on which takes a free descriptor.
 */
int kvscratch_stage(struct kvscratch *writer, uint32_t plane, uint64_t row, const void *rows,
		    uint64_t nr_rows);

/*
 * Stage rows as they lie there, without a copy: those that were stored as a whole since
 * @writer is the writer, and neither overwritten nor zeroed since (else EINVAL).
 */
int kvscratch_keep(struct kvscratch *writer, uint32_t plane, uint64_t row, uint64_t nr_rows);

/*
 * Commit rows below @len, which every plane has to have staged (else EINVAL), of all planes at
 * once. What is staged beyond is dropped; a commit of the present len drops all of it. It, too,
 * takes a free descriptor on a memfd (EMFILE).
 */
int kvscratch_commit(struct kvscratch *writer, uint64_t len);

/* Reading */

/* Rows committed now */
int64_t kvscratch_len(struct kvscratch *pad);

/* 1, 0 or a negative errno */
int kvscratch_is_empty(struct kvscratch *pad);

/*
 * max_seq_len, dim, and all that the pad is made of, input_dtype filled in: these never fail. Of
 * a pad of several planes all but max_seq_len is 0.
 */
uint64_t kvscratch_capacity(const struct kvscratch *pad);
uint32_t kvscratch_dim(const struct kvscratch *pad);
void kvscratch_geometry(const struct kvscratch *pad, struct kvscratch_geometry *geometry);

/**
 * struct kvscratch_array - one dense array of a pad's mapping
 * @offset: where it begins in the mapping; row n begins at @offset + n * @row_bytes
 * @row_bytes: bytes per row
 * @reserved: 0
 */
struct kvscratch_array {
	__aligned_u64 offset;
	__u32 row_bytes;
	__u32 reserved;
};

/**
 * struct kvscratch_info - a pad of one plane
 * @size: sizeof(struct kvscratch_info)
 * @flags: 0
 * @max_seq_len: capacity in rows
 * @len: committed rows
 * @dim: elements per row
 * @dtype: one of enum kvscratch_dtype
 * @row_bytes: bytes per stored row, scales included
 * @input_row_bytes: bytes per row of an append
 * @generation: truncates so far, in full; the status page has the low half
 * @trunc_len: rows that the latest truncate kept, 0 before the first
 * @data_bytes: max_seq_len * row_bytes
 * @status_offset: mapping offset of struct kvscratch_status
 * @nr_arrays: how many entries of @arrays are in use
 * @reserved: 0
 * @arrays: elements, and the scales of MXINT8
 * @input_dtype: what is appended
 * @frac_bits: fraction bits of an element
 * @saturated: elements that were clamped by appends so far, those that a
 *	truncate dropped included
 *
 * len, generation and trunc_len are of one moment.
 */
struct kvscratch_info {
	__u32 size;
	__u32 flags;
	__aligned_u64 max_seq_len;
	__aligned_u64 len;
	__u32 dim;
	__u32 dtype;
	__u32 row_bytes;
	__u32 input_row_bytes;
	__aligned_u64 generation;
	__aligned_u64 trunc_len;
	__aligned_u64 data_bytes;
	__aligned_u64 status_offset;
	__u32 nr_arrays;
	__u32 reserved;
	struct kvscratch_array arrays[2];
	__u32 input_dtype;
	__u32 frac_bits;
	__aligned_u64 saturated;
};

/*
 * Everything there is to know of a pad of one plane: the first @size bytes of a struct
 * kvscratch_info, whose size becomes that of what was filled. EOPNOTSUPP for several planes.
 */
int kvscratch_info_sized(struct kvscratch *pad, struct kvscratch_info *info, size_t size);

/* The same, as this program knows the struct */
static inline int kvscratch_info(struct kvscratch *pad, struct kvscratch_info *info)
{
	return kvscratch_info_sized(pad, info, sizeof(*info));
}

/*
 * Of any pad, as <linux/kvscratch.h> describes it. Of a memfd id is its inode number,
 * allocated_bytes its size.
 */
int kvscratch_pad_info_sized(struct kvscratch *pad, struct kvscratch_pad_info *info, size_t size);

static inline int kvscratch_pad_info(struct kvscratch *pad, struct kvscratch_pad_info *info)
{
	return kvscratch_pad_info_sized(pad, info, sizeof(*info));
}

/*
 * The model's Display line, "Scratchpad(len=3, capacity=10, dim=4)", at most @size bytes of it
 * with the NUL; 64 are enough. Returns its whole length, as snprintf() does. A pad of several
 * planes has "planes=3" instead of its dim.
 */
int kvscratch_display(struct kvscratch *pad, char *text, size_t size);

/**
 * struct kvscratch_view - a mapped pad
 * @data: where the mapping begins, of a pad of one plane the [max_seq_len, dim] array; rows
 *	below the len of a loaded state are committed
 * @status: the status page
 * @mapped_bytes: length of the mapping that begins at @data
 * @max_seq_len: rows that fit
 * @planes: those of the pad, for kvscratch_view_plane()
 * @nr_planes: how many
 * @plane_bytes: of one, as the library knows the struct
 */
struct kvscratch_view {
	const void *data;
	const struct kvscratch_status *status;
	size_t mapped_bytes;
	uint64_t max_seq_len;
	const void *planes;
	uint32_t nr_planes;
	uint32_t plane_bytes;
};

/*
 * The view of a handle that may read, mapped by the first call, which has all of its pages
 * there: on the module no later access takes a page fault. It stays valid and where it is until
 * kvscratch_close(). NULL on failure, with errno and kvscratch_error(): EBADF, ENOMEM, EOVERFLOW
 * (a pad beyond the addresses of a 32-bit program), and what MADV_POPULATE_READ says.
 */
const struct kvscratch_view *kvscratch_view(struct kvscratch *pad);

/**
 * kvscratch_map_plane() - map the elements of one plane where the caller wants them
 * @pad: a handle that may read
 * @plane: index of the plane
 * @address: on a page; the caller has max_seq_len * row_bytes there, rounded up to pages, and
 *	what lies there is replaced
 *
 * Read-only and with all of its pages there, as kvscratch_view(). It is the caller's: it
 * outlives @pad, and munmap() ends it. Huge entries take a multiple of KVSCRATCH_CHUNK_BYTES.
 *
 * Errors: EINVAL (no such plane, an address that is none), EBADF, ENOMEM, EOVERFLOW, and what
 * MADV_POPULATE_READ says; what lay there may be gone then.
 */
int kvscratch_map_plane(struct kvscratch *pad, uint32_t plane, void *address);

/*
 * The same of the scales of an MXINT8 plane, which take max_seq_len * scales_row_bytes; EINVAL
 * where a plane has none.
 */
int kvscratch_map_scales(struct kvscratch *pad, uint32_t plane, void *address);

/**
 * struct kvscratch_tensor - the committed rows of one moment
 * @data: [len, dim] elements, row-major and dense
 * @scales: [len, dim / 32] scale bytes of MXINT8, else NULL
 * @len: rows
 * @dim: elements per row
 * @dtype: one of enum kvscratch_dtype
 * @state: for kvscratch_view_valid_rows()
 */
struct kvscratch_tensor {
	const void *data;
	const uint8_t *scales;
	uint64_t len;
	uint32_t dim;
	uint32_t dtype;
	uint64_t state;
};

/*
 * The committed rows, without a copy: memory of kvscratch_view(). Rows that come later are
 * in the tensor of the next call, at the same address.
 */
int kvscratch_as_tensor(struct kvscratch *pad, struct kvscratch_tensor *tensor);

/*
 * The same of one plane of any pad; EINVAL when there is none such. Who asks for several takes
 * the len of the first for all: what comes later is no shorter, unless rows were dropped,
 * which kvscratch_view_valid_rows() tells.
 */
int kvscratch_plane_tensor(struct kvscratch *pad, uint32_t plane, struct kvscratch_tensor *tensor);

/*
 * Copy rows [first, first + count) as they were at one moment, row_bytes each: of each plane
 * in turn the elements of a row and behind them its scales, which is what a pad without
 * conversion appends. EINVAL when there are not that many; with a count of 1 it is the
 * model's get_token().
 */
int kvscratch_copy_rows(struct kvscratch *pad, uint64_t first, uint64_t count, void *rows);

/* The same of one plane: its row_bytes and scales_row_bytes for each row */
int kvscratch_copy_plane_rows(struct kvscratch *pad, uint32_t plane, uint64_t first,
			      uint64_t count, void *rows);

/*
 * Sleep until the state (see kvscratch_view_state()) is another than @state; no sleep when
 * it is already. A negative @timeout_ms waits without end, 0 only looks. Errors: ETIMEDOUT,
 * EINTR; EROFS when the pad is sealed, and @state is its last; EBADF of a pad's writer, who
 * waits on the handle that it came from.
 */
int kvscratch_wait(struct kvscratch *pad, uint64_t state, int timeout_ms);

/*
 * Tell poll() on kvscratch_fd() that @state was seen: it reports POLLIN while the pad has
 * another one. EOPNOTSUPP for a memfd, which is always ready; EBADF of a pad's writer.
 */
int kvscratch_seen(struct kvscratch *pad, uint64_t state);

/* The hot calls: a load or two, no system call */

/*
 * Load generation and len in one consistent word; rows below the len are
 * committed. Pairs with the release store of the state by who writes.
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

/* State: generation << 32 | len */
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
	return (uint32_t)(state >> 32);
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

/* A plane, all of it filled in; it has to be below nr_planes */
static inline const struct kvscratch_plane *kvscratch_view_plane(const struct kvscratch_view *view,
								 uint32_t plane)
{
	return (const struct kvscratch_plane *)((const char *)view->planes +
						(size_t)plane * view->plane_bytes);
}

/* The elements of row @row of one plane; it has to be below max_seq_len */
static inline const void *kvscratch_view_plane_row(const struct kvscratch_view *view,
						   uint32_t plane, uint64_t row)
{
	const struct kvscratch_plane *its = kvscratch_view_plane(view, plane);

	return (const char *)view->data + (size_t)its->offset + (size_t)row * its->row_bytes;
}

/* The [max_seq_len, dim / 32] array of scale bytes of an MXINT8 plane, otherwise NULL */
static inline const uint8_t *kvscratch_view_plane_scales(const struct kvscratch_view *view,
							 uint32_t plane)
{
	const struct kvscratch_plane *its = kvscratch_view_plane(view, plane);

	if (!its->scales_row_bytes)
		return NULL;
	return (const uint8_t *)view->data + (size_t)its->scales_offset;
}

/* The same of a pad of one plane */
static inline const void *kvscratch_view_row(const struct kvscratch_view *view, uint64_t row)
{
	return kvscratch_view_plane_row(view, 0, row);
}

static inline const uint8_t *kvscratch_view_scales(const struct kvscratch_view *view)
{
	return kvscratch_view_plane_scales(view, 0);
}

/* How often a handle became the pad's writer: another number is another writer. */
static inline uint32_t kvscratch_view_epoch(const struct kvscratch_view *view)
{
	return (uint32_t)(kvscratch_word_load(&view->status->writer) >> 32);
}

/* A state that is loaded after this was true is the last one. */
static inline bool kvscratch_view_is_sealed(const struct kvscratch_view *view)
{
	return kvscratch_word_load(&view->status->writer) & KVSCRATCH_PAD_SEALED;
}

/*
 * Whether the pad has a writer. Of a memfd one that was killed counts until somebody else
 * writes; kvscratch_pad_info() knows better.
 */
static inline bool kvscratch_view_has_writer(const struct kvscratch_view *view)
{
	return kvscratch_word_load(&view->status->writer) & KVSCRATCH_PAD_WRITER;
}

/* Words */

/*
 * What the latest function that failed in this thread has to say, without a full stop; "no
 * error" before. Good until the next one fails.
 */
const char *kvscratch_error(void);

/* What an errno of any function here means, with either sign, without a full stop */
const char *kvscratch_strerror(int err);

/* "f32" and the like; NULL and 0 for what is no dtype. */
const char *kvscratch_dtype_name(uint32_t dtype);
uint32_t kvscratch_dtype_by_name(const char *name);
/* Bytes per element; 0 for what is no dtype. */
uint32_t kvscratch_dtype_size(uint32_t dtype);

/* "0.1.0" */
const char *kvscratch_version(void);

/* Promises */

enum kvscratch_backend kvscratch_backend(const struct kvscratch *pad);

/* "kernel" or "memfd" */
const char *kvscratch_backend_name(enum kvscratch_backend backend);

/*
 * The backend of pads that are made from now on, by KVSCRATCH_BACKEND and whether the
 * device exists; EINVAL when the variable has another value.
 */
int kvscratch_default_backend(void);

/**
 * struct kvscratch_promise - one promise and how far a backend keeps it
 * @name: one word for machines, "whole-appends"
 * @text: the promise as a sentence
 * @reason: what may happen instead where it is not kept; else NULL
 * @holds: whether the backend keeps it
 */
struct kvscratch_promise {
	const char *name;
	const char *text;
	const char *reason;
	bool holds;
};

/* A constant array, ended by a name of NULL: the same promises for each backend */
const struct kvscratch_promise *kvscratch_promises(enum kvscratch_backend backend);

/* Passing handles between processes */

/* The most handles that fit one message (the kernel's SCM_MAX_FD), and bytes of their names */
#define KVSCRATCH_MAX_PASSED 253
#define KVSCRATCH_MAX_NAMES_BYTES 4096

/**
 * kvscratch_send_handles() - pass handles over a connected Unix stream socket
 * @sock: the socket
 * @names: one NUL-terminated name per handle, not empty and without white space
 * @fds: the handles
 * @count: 1 to KVSCRATCH_MAX_PASSED
 *
 * The message is a little-endian u32 with the length of the text that follows,
 * and the text: each name and a newline, in the order of the descriptors,
 * which ride on the first byte. EINVAL for a count or a name that cannot be, EMSGSIZE
 * when the names take more than KVSCRATCH_MAX_NAMES_BYTES, EPROTOTYPE for another kind of
 * socket, over which nothing is sent.
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

/*
 * Listen on, or connect to, the Unix stream socket at @path; returns the socket,
 * close-on-exec. Who listens removes it in the end; one that was left by a process that is
 * gone makes room, that of another one is EADDRINUSE, and what is no socket ENOTSOCK. An empty
 * @path is EINVAL: it would be an address that every user can listen at. Who does not accept
 * within 5 seconds because too many others wait for it is ETIMEDOUT.
 */
int kvscratch_listen(const char *path);
int kvscratch_connect(const char *path);

/*
 * Holder
 *
 * A holder is a process, kvscratchctl hold NAME, that keeps pads so that they
 * outlive who made them. It has a Unix socket, $XDG_RUNTIME_DIR/kvscratch/NAME, and
 * gives handles to processes of its own user only: both sides look at the user
 * of the other, and root is another user like any. Whoever gets a handle gets a file
 * position of its own with it. Handles are for reading unless the holder was
 * started with --write.
 *
 * Names, of holders and of the pads in one, are 1 to KVSCRATCH_MAX_NAME of the
 * characters A-Z a-z 0-9 . _ - and do not begin with a dot.
 *
 * Errors of all of these: EINVAL (no such name is possible), ENXIO (XDG_RUNTIME_DIR
 * is not set), ENOENT (no such holder, or no such pad in it), EACCES (the holder is
 * another user's, or was not started with --write), EPROTO (what listens is no
 * holder), ETIMEDOUT (it did not answer within seconds).
 */

#define KVSCRATCH_MAX_NAME 63

/**
 * kvscratch_attach_name() - open a handle on a held pad
 * @pad: receives it
 * @name: "story/k0", or "story" for the only pad of a holder that has one
 * @access: O_RDONLY, O_WRONLY or O_RDWR
 */
int kvscratch_attach_name(struct kvscratch **pad, const char *name, int access);

/**
 * kvscratch_holder_get() - open a handle on each pad of a holder
 * @name: of the holder
 * @access: O_RDONLY, O_WRONLY or O_RDWR
 * @names: receives the names of the pads, each ended by NUL
 * @names_size: bytes at @names
 * @fds: receives the handles, close-on-exec, in the order in which the pads came
 *	into the holder; the caller closes them or gives them to kvscratch_from_fd()
 * @max_fds: entries at @fds
 *
 * Returns how many there are, 0 for an empty holder. EMSGSIZE when they do not fit.
 * KVSCRATCH_MAX_PASSED handles and KVSCRATCH_MAX_NAMES_BYTES always suffice.
 */
int kvscratch_holder_get(const char *name, int access, char *names, size_t names_size, int *fds,
			 unsigned int max_fds);

/**
 * kvscratch_holder_put() - give pads to a holder, all of them or none
 * @name: of a holder that was started with --write
 * @names: the names that the pads get there
 * @fds: handles on them, which stay the caller's; what they are open for is
 *	what the holder can hand out
 * @count: 1 to KVSCRATCH_MAX_PASSED
 *
 * Errors: EEXIST when the holder has a pad of one of the names or one comes twice, EMSGSIZE
 * when it would have more than KVSCRATCH_MAX_PASSED pads or KVSCRATCH_MAX_NAMES_BYTES of names,
 * EMFILE when it may not have that many descriptors.
 */
int kvscratch_holder_put(const char *name, const char *const *names, const int *fds,
			 unsigned int count);

/*
 * The same, in the place of what the holder has under these names, if anything: whoever asks it
 * gets all of the old pads or all of the new ones, and after a failure the old ones. Those live
 * on where somebody has a handle or a view. EPROTO, when the holder dies meanwhile, may be either:
 * where a service manager starts it again it has all of the old ones or all of the new ones.
 */
int kvscratch_holder_replace(const char *name, const char *const *names, const int *fds,
			     unsigned int count);

/*
 * Let a holder forget the pad "story/k0", or with "story" forget all and end. The
 * pads live on where somebody else has a handle or a view.
 */
int kvscratch_holder_drop(const char *name);

/* The path of a holder's socket, or with NULL of the directory of all of them; makes nothing. */
int kvscratch_holder_path(const char *name, char *path, size_t path_size);

/*
 * Files
 *
 * The committed rows of a pad are saved as an array of [len, dim] for each of its planes, in
 * one of two formats, which the end of the file's name chooses:
 *
 * .npy: the rows of one plane and nothing else. NumPy has no type for bf16 and mxint8, and
 * max_seq_len, input_dtype, frac_bits, label and tag are not kept: integers are saved as
 * integers.
 *
 * .safetensors: any number of pads. The plane of a pad that has but one is a tensor under the
 * name of the pad. Of several planes each is one under NAME.PLANE, where PLANE is its label or,
 * where that is empty, a number, or not the only one, or ends in .scales, its index. An MXINT8
 * plane is two, TENSOR (I8, [len, dim]) and TENSOR.scales (U8, [len, dim / 32]).
 * __metadata__ says what they are made of: "kvscratch", the version of this; for each pad
 * NAME.max_seq_len, NAME.tag unless that is zeros, and of several planes NAME.planes, each PLANE
 * in turn with a blank between two; and for each plane TENSOR.dtype, TENSOR.input_dtype,
 * TENSOR.frac_bits and, unless it is empty, TENSOR.label. In labels, PLANE and tags, whose last
 * zeros are left out, bytes that are none of A-Z a-z 0-9 . _ - are written as %xx.
 * The version is "1" when no pad has several planes, a label or a tag, as files were before
 * there were any, else "2".
 *
 * Loading goes by what is in the file. All of it but the rows themselves is checked
 * before anything is made of it; what is malformed or no pad is EBADMSG, with what was
 * expected and what came. Headers have at most 16 MiB, in .npy 128 KiB; the rows go
 * through a buffer of a few MiB. A safetensors file without the above may come from anybody:
 * each tensor of it has to be a [rows, dim] matrix, and what else its header says of a
 * tensor is passed over.
 */

/**
 * kvscratch_progress - hears how far a transfer is
 * @context: what was given along with the function
 * @done: bytes that were transferred
 * @total: bytes in all
 *
 * Called at the begin, the end and every few MiB between, by the calling thread. When rows
 * have to be saved again, because somebody truncated a pad, @done begins anew and @total
 * may change. Returns 0, or anything else to have the transfer undone, which then fails
 * with ECANCELED.
 */
typedef int kvscratch_progress(void *context, uint64_t done, uint64_t total);

/**
 * struct kvscratch_named_pad - a pad to be saved
 * @name: what it is called in the file: valid UTF-8, neither empty nor "__metadata__";
 *	.npy has no names, there it may be NULL
 * @pad: a handle that may read
 */
struct kvscratch_named_pad {
	const char *name;
	struct kvscratch *pad;
};

/**
 * kvscratch_save() - save the committed rows of pads
 * @path: the file, by the end of its name .npy or .safetensors
 * @pads: the pads; exactly one for .npy
 * @count: how many
 * @progress: hears of it, or NULL
 * @context: for @progress
 *
 * There is a moment at which every pad begins with the rows that are saved of it, in all of its
 * planes: if a truncate drops some of them meanwhile, all pads are saved anew. A writer that puts
 * a token into one pad after the other may be between two of them at that moment, but not between
 * planes of one pad. Who loads pads that belong together truncates all to the rows of the
 * shortest. That a pad is sealed is not kept.
 *
 * Atomic: a new file is written that has no name yet, brought to disk and put in the place
 * of @path. Until then, and on every failure, @path is what it was, and nothing is left
 * beside it, also when this process is killed. Where the file system has no files without a
 * name, or there is no /proc, the new one is named .kvscratch-XXXXXXXX and left by a process
 * that is killed; who catches the signal has @progress return something else than 0. A file
 * that is replaced passes on its permission bits and, where this process may give files away,
 * its owner; a symbolic link stays and the file behind it is replaced. A file beyond
 * RLIMIT_FSIZE is EFBIG and no SIGXFSZ, whatever the program does about that.
 *
 * Errors: EINVAL (another end of the name, a name that is no UTF-8 or comes twice, of a pad or
 * of a tensor, no pad or several for .npy, @path is no regular file), EOPNOTSUPP (bf16, mxint8 or
 * several planes in .npy),
 * EBADF (a pad that may not be read), EAGAIN (pads were truncated again and again),
 * ECANCELED, and what writing files gives: EACCES, ENOSPC, EDQUOT, EFBIG, EIO, EROFS and
 * so on. EIO of the directory, after the replacement, leaves the new file.
 */
int kvscratch_save(const char *path, const struct kvscratch_named_pad *pads, unsigned int count,
		   kvscratch_progress *progress, void *context);

/*
 * Save one plane of a pad, which may have more, as .npy. Errors: as of kvscratch_save(), and
 * EINVAL when there is no such plane.
 */
int kvscratch_save_plane(const char *path, struct kvscratch *pad, uint32_t plane,
			 kvscratch_progress *progress, void *context);

/* A file that was opened and checked; any number of threads may load from it at once. */
struct kvscratch_file;

/**
 * struct kvscratch_saved_pad - what a file has to make a pad of
 * @name: its name; empty in .npy
 * @len: rows
 * @max_seq_len: rows that fit; @len where the file does not say it
 * @planes: dim, dtype, input_dtype, frac_bits and label of each, for kvscratch_saved_plane().
 *	What the file does not say is 0 in frac_bits, dtype in input_dtype and empty in label
 * @nr_planes: how many
 * @plane_bytes: of one, as the library knows the struct
 * @has_geometry: the file says all of it: kvscratch_save() wrote it as .safetensors
 * @tag: of the pad; zeros where it had none
 */
struct kvscratch_saved_pad {
	const char *name;
	uint64_t len;
	uint64_t max_seq_len;
	const void *planes;
	uint32_t nr_planes;
	uint32_t plane_bytes;
	bool has_geometry;
	uint8_t tag[KVSCRATCH_TAG_BYTES];
};

/* What a plane is made of; it has to be below nr_planes. Where it lies is not said. */
static inline const struct kvscratch_plane *kvscratch_saved_plane(
	const struct kvscratch_saved_pad *saved, uint32_t plane)
{
	return (const struct kvscratch_plane *)((const char *)saved->planes +
						(size_t)plane * saved->plane_bytes);
}

/*
 * Open @path, a .npy or .safetensors file, and check its header and its size. Errors:
 * EBADMSG, ENOMEM, and those of open() and read(). kvscratch_close_file() ends it; NULL does
 * nothing there.
 */
int kvscratch_open_file(struct kvscratch_file **file, const char *path);
void kvscratch_close_file(struct kvscratch_file *file);

/*
 * What is in it, valid as long as @file: *@count of them, pads of several planes by their names
 * and behind them those of one in the order of the header
 */
const struct kvscratch_saved_pad *kvscratch_file_pads(const struct kvscratch_file *file,
						      unsigned int *count);

/**
 * kvscratch_load() - make a pad of saved rows
 * @pad: receives a handle that may do everything, as of kvscratch_new_planes()
 * @file: the file
 * @name: which of its pads; NULL if there is but one
 * @max_seq_len: capacity, at least the saved rows; 0 for that of the file
 * @progress: hears of it, or NULL
 * @context: for @progress
 *
 * The rows are those that were saved, bit by bit, and the new pad has the planes and the tag of
 * the saved one: a plane that converted what was appended to it does so again, and saturated
 * counts what was clamped among the rows of the file. On failure there is no pad.
 *
 * A small file may say that its pads are large: where they would take more than 256 MiB and
 * more than 64 times its size, it has to be asked for by @max_seq_len.
 *
 * Errors: EINVAL (@max_seq_len below the rows; 0 and the file has neither rows nor a
 * max_seq_len, or one that is far beyond its size; several pads and @name is NULL), ENOKEY (no
 * pad of this name), EBADMSG (the file became shorter, or says of rows that they were
 * converted that no conversion gives), EIO, ECANCELED, and those of kvscratch_new_planes() and
 * kvscratch_stage().
 */
int kvscratch_load(struct kvscratch **pad, const struct kvscratch_file *file, const char *name,
		   uint64_t max_seq_len, kvscratch_progress *progress, void *context);

/**
 * kvscratch_load_into() - append saved rows to a pad
 * @pad: a handle that may write, the writer itself if there is one, on a pad of as many planes of
 *	the same dim, dtype and frac_bits, and of several of the same labels; any frac_bits will
 *	do where the file does not say them
 * @file: the file
 * @name: which of its pads; NULL if there is but one
 * @progress: hears of it, or NULL
 * @context: for @progress
 *
 * All rows or none, which readers see at once: they are staged and committed, for which this
 * becomes the pad's writer meanwhile unless @pad is. What @pad had staged is dropped. A plane
 * that converts is given what the rows were made of, or may have been.
 *
 * Errors: EINVAL (the pad is made of something else, or both it and the saved one have a tag and
 * not the same), ENOSPC (rows do not fit), ENOKEY, EBUSY (another is the writer),
 * EBADMSG (the file became shorter, or its rows are none that the conversion of the pad
 * gives), EIO, ECANCELED, and those of kvscratch_writer() and kvscratch_stage().
 */
int kvscratch_load_into(struct kvscratch *pad, const struct kvscratch_file *file, const char *name,
			kvscratch_progress *progress, void *context);

#pragma GCC visibility pop
#ifdef __cplusplus
#pragma GCC diagnostic pop
}
#endif

#endif
