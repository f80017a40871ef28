/* SPDX-License-Identifier: ((GPL-2.0-only WITH Linux-syscall-note) OR MIT) */
/*
 * kvscratch: KV-cache scratchpads for transformer inference
 *
 * The binary interface of /dev/kvscratch. It is the same for 32 and 64 bit
 * callers and compiles as C90 and as C++.
 */
#ifndef _UAPI_LINUX_KVSCRATCH_H
#define _UAPI_LINUX_KVSCRATCH_H

#include <linux/ioctl.h>
#include <linux/types.h>

/**
 * DOC: Pads, planes, rows, handles and views
 *
 * A *pad* is a growing table of at most max_seq_len rows over one or more
 * planes. A *plane* is a dense, row-major [max_seq_len, dim] array of one
 * element type: K of layer 3, say. A *row* is one token: a row of each plane.
 * The len of a pad is the number of its committed rows, one for all planes.
 *
 * A *node handle* is an open file of /dev/kvscratch and makes pads. A *handle*
 * is an open file of a pad, as KVSCRATCH_IOC_CREATE, KVSCRATCH_IOC_FORK and
 * KVSCRATCH_IOC_OPEN return it. A *view* is a mapping of a handle. The pad is
 * freed when its last handle and its last view are gone.
 *
 * write(), writev() and io_uring writes append whole tokens, all of them or
 * none, wherever the file position is. A token is appended as a row of each
 * plane in turn, as the plane takes it. read() and pread() see the committed
 * tokens as one byte stream, a stored row of each plane in turn.
 *
 * mmap() shows a pad read-only and shared: each plane at its offset and one
 * page of &struct kvscratch_status at the status_offset of KVSCRATCH_IOC_INFO. A
 * plane of more than KVSCRATCH_CHUNK_BYTES / 2 begins on a multiple of
 * KVSCRATCH_CHUNK_BYTES, and so does what follows it. Rows from len on are
 * mapped, and unspecified. Behind the capacity of a plane, up to where the
 * next begins, there are zeros or nothing: a touch may be SIGBUS. A view that
 * was populated plane by plane (MADV_POPULATE_READ) takes no page fault, also
 * in rows that are appended later; populating across a hole fails.
 */

/**
 * DOC: Writers
 *
 * Anybody with a handle that is open for write may append and truncate, in
 * turn. A handle that KVSCRATCH_IOC_OPEN made with KVSCRATCH_OPEN_WRITER is
 * the pad's only writer while it is open: calls through other handles that
 * would change the pad are EBUSY. KVSCRATCH_OPEN_TAKEOVER takes the role from a
 * writer that hangs or was forgotten, at once, whatever that writer waits for;
 * no byte of an operation of the old writer lands after the call returned, and
 * all its later ones are ESTALE. Each role has an epoch of its own.
 *
 * The writer can also put rows of single planes in their place with
 * KVSCRATCH_IOC_STAGE and commit them together with KVSCRATCH_IOC_COMMIT.
 * *Staged* rows are visible in every view, and not committed.
 */

/**
 * DOC: Forks
 *
 * KVSCRATCH_IOC_FORK makes a pad that begins with the first rows of another one.
 * Both have them in the same memory, which lives as long as either does, and
 * go on by themselves: what one appends the other never sees. While another
 * pad shares memory with rows that a truncate would drop it is ETXTBSY; make a
 * fork of the rows to keep instead.
 */

/**
 * DOC: General ioctl format
 *
 * Every argument struct begins with its size as the caller knows it. A struct
 * may be shorter or longer than the kernel's: missing fields read as zero, and
 * a longer tail has to be zero. Flags that are not defined and reserved fields
 * that are not zero are refused. In KVSCRATCH_IOC_INFO and KVSCRATCH_IOC_PLANES
 * what stands in output fields does not matter; a tail that the kernel does
 * not know is cleared. Arrays come with a count and the size of one element as
 * the caller knows it, a multiple of 8, which is treated like the size of a
 * struct.
 *
 * Each errno has one meaning for every call:
 *
 * - EBADF: the handle is not open for read or for write as read(), write() or
 *   mmap() need; what FORK is to be of is no handle
 * - EBUSY: another handle is the pad's writer
 * - ESTALE: the handle was the pad's writer, and was taken over
 * - ENOLCK: STAGE or COMMIT on a handle that is not the pad's writer
 * - EROFS: the pad is sealed
 * - ETXTBSY: another pad shares memory with rows that would be dropped
 * - EAGAIN: O_NONBLOCK, RWF_NOWAIT or io_uring, and another operation is at
 *   work; polling for EPOLLOUT sleeps until it is not
 * - ECANCELED: generation or len is not the expected one; nothing was done
 * - EINVAL: a wrong value: size below the first version of the struct, an
 *   unknown flag or dtype, a reserved field that is not zero, dim, max_seq_len
 *   or the number of planes zero or above the format's bounds, dtype,
 *   input_dtype and frac_bits that do not go together, a dim that is no
 *   multiple of the block of MXINT8, a label without its NUL, a write that is
 *   not a whole number of tokens or so long that the kernel may have cut it
 *   (see KVSCRATCH_MAX_WRITE), a truncate to more rows than there are, a plane
 *   that there is not, a fork of more rows than there are or than it has room
 *   for, a row to stage that is committed already or leaves a gap, rows to
 *   keep that are not whole, a commit of rows that are not staged, a position
 *   outside the pad, an operation that pads do not have (splice, sendfile,
 *   SEEK_DATA)
 * - E2BIG: size is above a page, or a field that this kernel is too old to know is
 *   not zero
 * - EDQUOT: the pad is larger than the module's limits allow
 * - ENOMEM: no memory, less left than the module keeps free, or the memory
 *   cgroup is full: open, CREATE, FORK, OPEN, page tables of a view, and what Linux
 *   itself allocates before a call reaches the pad: its copy of more than 8
 *   segments of a writev() or readv(), the bookkeeping of io_uring
 * - EMFILE, ENFILE: CREATE, FORK and OPEN, no descriptor or open file is left
 * - ENOSPC: the rows do not fit; nothing was committed
 * - EFAULT: bad user memory; nothing was committed
 * - EDOM: a NaN or an infinity that would have to become an integer; nothing
 *   was committed
 * - EACCES: CREATE, FORK, TRUNCATE or SEAL on a handle that is not open for
 *   write, FORK of a pad through a handle that is not open for read, or
 *   neither for write nor of a sealed pad, OPEN with more rights than the
 *   handle has, mmap of a handle that is not open for read
 * - EPERM: the mapping would be writable, executable or private
 * - ENXIO: the mapping reaches outside the pad; opening a handle through
 *   /proc/PID/fd
 * - ESPIPE: a positional write
 * - EINTR: a signal while waiting for another operation (restarted where the
 *   call allows it), a fatal one during a copy, an allocation or a scrub
 * - ENOTTY: an ioctl that this kind of handle does not have
 *
 * When several apply, the order is: kind of handle, struct, rights, values by
 * themselves, seal, role, turn (EAGAIN), expectation, values against the pad,
 * shared memory (ETXTBSY), room, source (EFAULT, EDOM), limits, memory.
 */

#define KVSCRATCH_IOC_MAGIC	0xD5

/* Bounds of the format; the module's limits are usually lower. */
#define KVSCRATCH_MAX_ROW_BYTES	0x1000000U
#define KVSCRATCH_MAX_SEQ_LEN	0xffffffffU
#define KVSCRATCH_MAX_PLANES	4096U

/* What large planes begin on, and are made of where memory allows */
#define KVSCRATCH_CHUNK_BYTES	0x200000U

#define KVSCRATCH_LABEL_BYTES	16
#define KVSCRATCH_TAG_BYTES	64

/*
 * The longest single append, in bytes, on every page size up to 64 KiB. Linux
 * cuts each transfer to INT_MAX rounded down to a page, which would commit half
 * a batch; a count that reaches that bound is refused.
 */
#define KVSCRATCH_MAX_WRITE	0x7ffeffffU

/**
 * enum kvscratch_dtype - element type of a plane
 * @KVSCRATCH_DTYPE_F64: IEEE 754 binary64, 8 bytes
 * @KVSCRATCH_DTYPE_F32: IEEE 754 binary32, 4 bytes
 * @KVSCRATCH_DTYPE_F16: IEEE 754 binary16, 2 bytes
 * @KVSCRATCH_DTYPE_BF16: bfloat16, the upper half of a binary32, 2 bytes
 * @KVSCRATCH_DTYPE_I64: two's complement, 8 bytes
 * @KVSCRATCH_DTYPE_I32: two's complement, 4 bytes
 * @KVSCRATCH_DTYPE_I16: two's complement, 2 bytes
 * @KVSCRATCH_DTYPE_I8: two's complement, 1 byte
 * @KVSCRATCH_DTYPE_U8: opaque bytes; with dim = bytes per row it carries any
 *	format that is not listed
 * @KVSCRATCH_DTYPE_MXINT8: signed bytes, each block of KVSCRATCH_MX_BLOCK of
 *	which shares a scale byte, in an array of its own; see
 *	&struct kvscratch_plane
 *
 * Elements are in the byte order of the machine.
 */
enum kvscratch_dtype {
	KVSCRATCH_DTYPE_F64 = 1,
	KVSCRATCH_DTYPE_F32 = 2,
	KVSCRATCH_DTYPE_F16 = 3,
	KVSCRATCH_DTYPE_BF16 = 4,
	KVSCRATCH_DTYPE_I64 = 5,
	KVSCRATCH_DTYPE_I32 = 6,
	KVSCRATCH_DTYPE_I16 = 7,
	KVSCRATCH_DTYPE_I8 = 8,
	KVSCRATCH_DTYPE_U8 = 9,
	KVSCRATCH_DTYPE_MXINT8 = 10
};

/* Elements of MXINT8 that share a scale */
#define KVSCRATCH_MX_BLOCK	32

/* The most fraction bits that integers may have */
#define KVSCRATCH_MAX_FRAC_BITS	62

/**
 * struct kvscratch_plane - one dense array of a pad
 * @dim: elements per row, at least 1
 * @dtype: one of &enum kvscratch_dtype: what is stored
 * @input_dtype: what is appended: 0 or @dtype for rows as they are stored; F64,
 *	F32, F16 or BF16 to have them converted to MXINT8, I8, I16, I32 or I64.
 *	KVSCRATCH_IOC_PLANES returns @dtype for 0
 * @frac_bits: for I8, I16, I32 and I64: fraction bits of an element, 0 to
 *	KVSCRATCH_MAX_FRAC_BITS; otherwise 0
 * @label: the caller's name for it, NUL-terminated and not interpreted
 * @offset: out: where the elements begin in the mapping; row n begins at
 *	@offset + n * @row_bytes
 * @scales_offset: out: where the scales of MXINT8 begin, else 0
 * @row_bytes: out: bytes per row of elements
 * @scales_row_bytes: out: bytes per row of scales, else 0
 * @input_row_bytes: out: bytes per row of an append
 * @reserved: 0
 *
 * The fields from @offset on have to be 0 in KVSCRATCH_IOC_CREATE.
 *
 * An integer i with f fraction bits has the value i * 2^-f; x is stored as
 * x * 2^f, rounded half to even and clamped to the range of the type.
 *
 * MXINT8 is that of the OCP Microscaling Formats (MX) Specification 1.0: dim is
 * a multiple of 32, and each 32 elements of a row share a scale byte s. An
 * element i has the value i * 2^-6 * 2^(s - 127). With a the largest magnitude
 * of the 32 and e = floor(log2(a)), clamped to -127 .. 127, s is e + 127 and x is
 * stored as x * 2^(6 - e), rounded half to even and clamped to -127 .. 127; of
 * zeros s is 0. A scale of 255 makes its block NaN; the conversion gives neither
 * that nor an element of -128, but rows that are appended as they are stored are
 * not looked into. A stored row, as read() gives it and an append without
 * conversion takes it, is the elements of a row and then its scales.
 *
 * NaN and infinities are EDOM. Negative zero is stored as 0.
 */
struct kvscratch_plane {
	__u32 dim;
	__u32 dtype;
	__u32 input_dtype;
	__u32 frac_bits;
	char label[KVSCRATCH_LABEL_BYTES];
	__aligned_u64 offset;
	__aligned_u64 scales_offset;
	__u32 row_bytes;
	__u32 scales_row_bytes;
	__u32 input_row_bytes;
	__u32 reserved;
};

/**
 * struct kvscratch_create - ioctl(KVSCRATCH_IOC_CREATE)
 * @size: sizeof(struct kvscratch_create)
 * @flags: must be 0
 * @max_seq_len: capacity in rows, 1 to KVSCRATCH_MAX_SEQ_LEN
 * @planes: address of an array of &struct kvscratch_plane
 * @nr_planes: how many, 1 to KVSCRATCH_MAX_PLANES; a token of all of them has at
 *	most KVSCRATCH_MAX_ROW_BYTES bytes, as stored and as appended
 * @plane_bytes: sizeof(struct kvscratch_plane)
 * @tag: the caller's, not interpreted: a model's fingerprint, say
 *
 * On a node handle that is open for write: make a new, zero-filled pad. All
 * memory of the pad is allocated and charged to the caller's memory cgroup
 * here and nowhere else.
 *
 * Return: a close-on-exec descriptor, open for read and write.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EACCES, EDQUOT, ENOMEM, EMFILE, ENFILE, EINTR.
 */
struct kvscratch_create {
	__u32 size;
	__u32 flags;
	__aligned_u64 max_seq_len;
	__aligned_u64 planes;
	__u32 nr_planes;
	__u32 plane_bytes;
	__u8 tag[KVSCRATCH_TAG_BYTES];
};

#define KVSCRATCH_IOC_CREATE	_IO(KVSCRATCH_IOC_MAGIC, 0)

/**
 * struct kvscratch_fork - ioctl(KVSCRATCH_IOC_FORK)
 * @size: sizeof(struct kvscratch_fork)
 * @flags: must be 0
 * @source_fd: a handle on the pad to fork, open for read, and for write too unless it is
 *	sealed. It counts as a reference to its open file while the call lasts
 * @reserved: must be 0
 * @rows: how many committed rows of it the new pad begins with
 * @generation: that of the pad, in full
 * @max_seq_len: capacity of the new pad in rows, at least @rows and 1
 *
 * On a node handle that is open for write: make a pad with the planes and the tag of
 * another one and the first @rows of its rows, committed, in generation 0. All of
 * their pages are shared but for the last of each array, which is copied if the rows do
 * not end with it; memory for the other rows is allocated and charged as for
 * KVSCRATCH_IOC_CREATE. It waits for no operation on the other pad: rows are
 * taken as they were committed, also beside a writer, and also through a handle that was
 * taken over.
 *
 * Return: a close-on-exec descriptor, open for read and write.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EBADF, EACCES, ECANCELED, EDQUOT, ENOMEM, EMFILE,
 * ENFILE, EINTR.
 */
struct kvscratch_fork {
	__u32 size;
	__u32 flags;
	__s32 source_fd;
	__u32 reserved;
	__aligned_u64 rows;
	__aligned_u64 generation;
	__aligned_u64 max_seq_len;
};

#define KVSCRATCH_IOC_FORK	_IO(KVSCRATCH_IOC_MAGIC, 1)

#define KVSCRATCH_ACCESS_READ	0x1U
#define KVSCRATCH_ACCESS_WRITE	0x2U

/* Be the pad's writer. */
#define KVSCRATCH_OPEN_WRITER	0x1U
/* Even if there is one. */
#define KVSCRATCH_OPEN_TAKEOVER	0x2U

/**
 * struct kvscratch_open - ioctl(KVSCRATCH_IOC_OPEN)
 * @size: sizeof(struct kvscratch_open)
 * @flags: KVSCRATCH_OPEN_WRITER, and with it KVSCRATCH_OPEN_TAKEOVER
 * @access: KVSCRATCH_ACCESS_READ, KVSCRATCH_ACCESS_WRITE or both; with
 *	KVSCRATCH_OPEN_WRITER exactly KVSCRATCH_ACCESS_WRITE
 * @reserved: must be 0
 *
 * Open another handle on the pad of this one, with no more rights than it has. The
 * role of the writer ends with the last reference to the new open file.
 *
 * Return: a close-on-exec descriptor.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EACCES, ENOMEM, EMFILE, ENFILE; with
 * KVSCRATCH_OPEN_WRITER also EROFS, EBUSY, EAGAIN, EINTR.
 */
struct kvscratch_open {
	__u32 size;
	__u32 flags;
	__u32 access;
	__u32 reserved;
};

#define KVSCRATCH_IOC_OPEN	_IO(KVSCRATCH_IOC_MAGIC, 2)

/* Rows as they lie there, without a copy */
#define KVSCRATCH_STAGE_KEEP	0x1U

/**
 * struct kvscratch_stage - ioctl(KVSCRATCH_IOC_STAGE)
 * @size: sizeof(struct kvscratch_stage)
 * @flags: 0 or KVSCRATCH_STAGE_KEEP
 * @plane: index of the plane
 * @reserved: must be 0
 * @row: absolute row to begin with, from len to what is staged of the plane
 * @rows: how many rows
 * @addr: where the rows are, as the plane takes them; 0 with KVSCRATCH_STAGE_KEEP
 *
 * Copy rows of one plane to their final place. When it succeeds, rows up to the
 * larger of what was staged of the plane and @row + @rows are staged; when the copy
 * fails (EFAULT, EDOM, EINTR, ESTALE), rows up to @row are; other errors change nothing.
 * With KVSCRATCH_STAGE_KEEP rows are staged again as they lie there: rows up to the end
 * of those that were last stored completely in this epoch, or committed when it
 * began. A copy that fails, a write() and a scrub move that end down to where they begin.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EROFS, ENOLCK, ESTALE, EAGAIN, ENOSPC, EDOM,
 * EINTR.
 */
struct kvscratch_stage {
	__u32 size;
	__u32 flags;
	__u32 plane;
	__u32 reserved;
	__aligned_u64 row;
	__aligned_u64 rows;
	__aligned_u64 addr;
};

#define KVSCRATCH_IOC_STAGE	_IO(KVSCRATCH_IOC_MAGIC, 3)

/**
 * struct kvscratch_commit - ioctl(KVSCRATCH_IOC_COMMIT)
 * @size: sizeof(struct kvscratch_commit)
 * @flags: must be 0
 * @len: the new len, from the present one to what every plane has staged
 *
 * Commit staged rows of all planes at once. What was staged beyond is dropped; a
 * commit of the present len drops all of it.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EROFS, ENOLCK, ESTALE, EAGAIN, EINTR.
 */
struct kvscratch_commit {
	__u32 size;
	__u32 flags;
	__aligned_u64 len;
};

#define KVSCRATCH_IOC_COMMIT	_IO(KVSCRATCH_IOC_MAGIC, 4)

/* Overwrite all that was ever written beyond the new end with zeros. */
#define KVSCRATCH_TRUNCATE_ZERO		0x1U
/* Only if generation and len are the expected ones */
#define KVSCRATCH_TRUNCATE_EXPECT	0x2U

/**
 * struct kvscratch_truncate - ioctl(KVSCRATCH_IOC_TRUNCATE)
 * @size: sizeof(struct kvscratch_truncate)
 * @flags: KVSCRATCH_TRUNCATE_ZERO, KVSCRATCH_TRUNCATE_EXPECT
 * @len: rows to keep, at most the committed ones
 * @expected_generation: with KVSCRATCH_TRUNCATE_EXPECT, else 0
 * @expected_len: with KVSCRATCH_TRUNCATE_EXPECT, else 0
 *
 * Drop rows @len and up and start a new generation, also when nothing is
 * dropped. With KVSCRATCH_TRUNCATE_ZERO the bytes of all rows from @len on,
 * those of failed appends included, are zero when the call returns; readers
 * learn of the truncate before the first byte changes. When a fatal signal or a
 * takeover ends such a call the rows are dropped, and the next one finishes its
 * scrub.
 *
 * Rows whose memory another pad shares, up to KVSCRATCH_CHUNK_BYTES of a plane, cannot be
 * dropped while it is there (ETXTBSY). Above the highest row that was ever forked and is
 * still there none are.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EACCES, EROFS, EBUSY, ESTALE, EAGAIN,
 * ECANCELED, ETXTBSY, EINTR.
 */
struct kvscratch_truncate {
	__u32 size;
	__u32 flags;
	__aligned_u64 len;
	__aligned_u64 expected_generation;
	__aligned_u64 expected_len;
};

#define KVSCRATCH_IOC_TRUNCATE	_IO(KVSCRATCH_IOC_MAGIC, 5)

/**
 * struct kvscratch_seal - ioctl(KVSCRATCH_IOC_SEAL)
 * @size: sizeof(struct kvscratch_seal)
 * @flags: must be 0
 *
 * Make the present len final: whatever would change the pad is EROFS from now
 * on. Sealing again does nothing. A KVSCRATCH_TRUNCATE_ZERO that a signal cut short
 * is finished first.
 *
 * Errors: EINVAL, E2BIG, EFAULT, EACCES, EBUSY, ESTALE, EAGAIN, EINTR.
 */
struct kvscratch_seal {
	__u32 size;
	__u32 flags;
};

#define KVSCRATCH_IOC_SEAL	_IO(KVSCRATCH_IOC_MAGIC, 6)

/**
 * struct kvscratch_seen - ioctl(KVSCRATCH_IOC_SEEN)
 * @size: sizeof(struct kvscratch_seen)
 * @flags: must be 0
 * @generation: what was seen, as KVSCRATCH_IOC_INFO or the status page told it
 * @len: likewise, at most max_seq_len
 *
 * Tell poll() what this open file has seen: it reports EPOLLIN while the pad is
 * in another state. dup(), fork() and SCM_RIGHTS share it; a reader that was passed a
 * handle opens one of its own.
 *
 * Errors: EINVAL, E2BIG, EFAULT.
 */
struct kvscratch_seen {
	__u32 size;
	__u32 flags;
	__aligned_u64 generation;
	__aligned_u64 len;
};

#define KVSCRATCH_IOC_SEEN	_IO(KVSCRATCH_IOC_MAGIC, 7)

/* The pad is sealed. */
#define KVSCRATCH_PAD_SEALED	0x1U
/* The pad has a writer. */
#define KVSCRATCH_PAD_WRITER	0x2U

/**
 * struct kvscratch_pad_info - ioctl(KVSCRATCH_IOC_INFO)
 * @size: sizeof(struct kvscratch_pad_info); out: what this kernel filled of it
 * @flags: out: KVSCRATCH_PAD_SEALED, KVSCRATCH_PAD_WRITER
 * @id: out: a number that no other pad has while the module is loaded
 * @max_seq_len: out: capacity in rows
 * @len: out: committed rows
 * @generation: out: truncates so far, in full; the status page has the low half
 * @trunc_len: out: rows that the latest truncate kept, 0 before the first
 * @mapping_bytes: out: length of a mapping of everything
 * @status_offset: out: mapping offset of &struct kvscratch_status
 * @allocated_bytes: out: what CREATE or FORK took from the module's limits
 * @shared_bytes: out: memory that FORK took over from the other pad, else 0; of each array
 *	up to KVSCRATCH_CHUNK_BYTES more stay allocated for it
 * @parent_id: out: @id of the pad that was forked, else 0
 * @parent_rows: out: rows that FORK began with, else 0
 * @saturated: out: elements that were clamped by appends and STAGE so far, those that
 *	were dropped since included
 * @epoch: out: how often a handle became the pad's writer
 * @nr_planes: out: planes, for KVSCRATCH_IOC_PLANES
 * @row_bytes: out: bytes per stored token, over all planes; what read() counts in
 * @input_row_bytes: out: bytes per token that write() takes
 * @tag: out: that of KVSCRATCH_IOC_CREATE
 *
 * Describe the pad. Needs no rights. @len, @generation and @trunc_len are of one
 * moment, @epoch and @flags of one, @saturated of another.
 *
 * Errors: EINVAL, E2BIG, EFAULT.
 */
struct kvscratch_pad_info {
	__u32 size;
	__u32 flags;
	__aligned_u64 id;
	__aligned_u64 max_seq_len;
	__aligned_u64 len;
	__aligned_u64 generation;
	__aligned_u64 trunc_len;
	__aligned_u64 mapping_bytes;
	__aligned_u64 status_offset;
	__aligned_u64 allocated_bytes;
	__aligned_u64 shared_bytes;
	__aligned_u64 parent_id;
	__aligned_u64 parent_rows;
	__aligned_u64 saturated;
	__u32 epoch;
	__u32 nr_planes;
	__u32 row_bytes;
	__u32 input_row_bytes;
	__u8 tag[KVSCRATCH_TAG_BYTES];
};

#define KVSCRATCH_IOC_INFO	_IO(KVSCRATCH_IOC_MAGIC, 8)

/**
 * struct kvscratch_planes - ioctl(KVSCRATCH_IOC_PLANES)
 * @size: sizeof(struct kvscratch_planes)
 * @first: index of the first plane to describe, at most the number of planes
 * @count: room in the array; out: how many were described
 * @plane_bytes: sizeof(struct kvscratch_plane)
 * @planes: address of an array of &struct kvscratch_plane
 *
 * Describe the planes of the pad. Needs no rights.
 *
 * Errors: EINVAL, E2BIG, EFAULT.
 */
struct kvscratch_planes {
	__u32 size;
	__u32 first;
	__u32 count;
	__u32 plane_bytes;
	__aligned_u64 planes;
};

#define KVSCRATCH_IOC_PLANES	_IO(KVSCRATCH_IOC_MAGIC, 9)

/**
 * union kvscratch_word - two numbers in one word
 * @word: upper << 32 | lower
 * @half: the same as two halves, for readers without 64-bit loads: index them
 *	with KVSCRATCH_WORD_LEN and KVSCRATCH_WORD_GENERATION
 *
 * The upper number is a generation, the low half of the full one that wraps at
 * 2^32, or an epoch; the lower one a number of rows, or flags.
 */
union kvscratch_word {
	__aligned_u64 word;
	__u32 half[2];
};

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define KVSCRATCH_WORD_LEN		0
#define KVSCRATCH_WORD_GENERATION	1
#else
#define KVSCRATCH_WORD_LEN		1
#define KVSCRATCH_WORD_GENERATION	0
#endif

#define KVSCRATCH_STATUS_MAGIC		0x5344564bU	/* "KVDS" */
#define KVSCRATCH_STATUS_VERSION	2

/**
 * struct kvscratch_status - the page mapped at status_offset
 * @magic: KVSCRATCH_STATUS_MAGIC
 * @version: KVSCRATCH_STATUS_VERSION; grows when fields are added
 * @max_seq_len: capacity in rows
 * @nr_planes: planes
 * @row_bytes: bytes per stored token, over all planes; the strides of the mapping
 *	are those that KVSCRATCH_IOC_PLANES tells
 * @reserved: 0
 * @state: generation and committed rows
 * @trunc: generation of the latest truncate and the rows that it kept
 * @reserved_state: 0
 * @writer: epoch and KVSCRATCH_PAD_SEALED, KVSCRATCH_PAD_WRITER; a pad that is
 *	seen sealed here has its final @state
 * @generation: the generation in full; it may be ahead of @state
 *
 * A reader loads
 *
 *   s1 = @state, with acquire: rows below its len are committed and complete
 *   ... use them ...
 *   fence(acquire); s2 = @state, with acquire; t = @trunc
 *
 * and knows by s2 what became of what it read:
 *
 * - same generation as s1: all of it is what was committed
 * - one generation later and t of that same generation: rows below t's are
 * - anything else: discard it
 *
 * Until then it computes only what is harmless on any bytes: no index, pointer
 * or loop bound from row data. The kernel stores @trunc before the @state of
 * the same generation, and @state before any byte of a dropped row changes.
 *
 * Where there are no 64-bit loads a reader takes the generation half, the len
 * half and the generation half again, each with acquire, until both
 * generations agree. One that may sleep across 2^32 truncates compares the
 * generation of KVSCRATCH_IOC_INFO.
 *
 * To wait, acknowledge what was seen (KVSCRATCH_IOC_SEEN), then poll():
 *
 * - EPOLLIN: the state is not the acknowledged one; a new handle has seen
 *   generation 0 and no rows
 * - EPOLLOUT: a write through this handle would neither wait nor be EBUSY. A full
 *   pad is writable and answers ENOSPC
 * - EPOLLRDHUP: the pad is sealed
 *
 * The handle that is the pad's writer sleeps for EPOLLOUT only: what it commits
 * itself does not wake it.
 */
struct kvscratch_status {
	__u32 magic;
	__u32 version;
	__aligned_u64 max_seq_len;
	__u32 nr_planes;
	__u32 row_bytes;
	__u32 reserved[10];
	/* a cache line of their own from here */
	union kvscratch_word state;
	union kvscratch_word trunc;
	__u32 reserved_state[12];
	/* and from here */
	union kvscratch_word writer;
	__aligned_u64 generation;
};

#endif /* _UAPI_LINUX_KVSCRATCH_H */
