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
 * DOC: Pads, rows, handles and views
 *
 * A *pad* is a dense, row-major [max_seq_len, dim] matrix of one element type.
 * A *row* holds one token. A *handle* is one open file of /dev/kvscratch; it
 * is bound to at most one pad, once. A *view* is a mapping of a handle.
 *
 * write(), writev() and io_uring writes append a whole number of rows, all of
 * them or none, wherever the file position is. read() and pread() see the
 * committed rows as one byte stream. mmap() shows the pad read-only and
 * shared: the data from offset 0, behind it the scales of an MXINT8 pad, and one
 * page of &struct kvscratch_status at the offset that KVSCRATCH_IOC_INFO
 * reports. Every byte of data and scales stays mapped; those of row len and above
 * are unspecified. The pad is freed when the last handle and the last view of it
 * are gone.
 *
 * The file position belongs to the open file, which threads, dup(), fork() and
 * SCM_RIGHTS share. An append does not use it, but a write() that returns puts
 * it back to where it was when the call began. A reader that uses read(),
 * lseek() or poll() therefore wants a handle of its own: open the device
 * O_RDONLY and KVSCRATCH_IOC_ATTACH.
 */

/**
 * DOC: General ioctl format
 *
 * Every argument struct begins with its size as the caller knows it. A struct
 * may be shorter or longer than the kernel's: missing fields read as zero, and
 * a longer tail has to be zero. Flags that are not defined and output fields
 * that are not zero on input are refused. Where there are outputs, size returns
 * the number of bytes that this kernel filled.
 *
 * Each errno has one meaning for every call on a handle:
 *
 * - EBADFD: the handle, or the source of ATTACH, is not bound to a pad yet
 * - EBADF: the handle is not open for read or for write as the call needs;
 *   src_fd is not an open file, or was opened with O_PATH
 * - EBUSY: the handle is bound already
 * - EINVAL: a wrong value: size below the first version of the struct, an
 *   unknown flag or dtype, an output field that is not zero, dim or
 *   max_seq_len zero or above the format's bounds, dtype, input_dtype and
 *   frac_bits that do not go together, a dim that is no multiple of the block
 *   of MXINT8, a write that is not a whole
 *   number of rows or so long that the kernel may have cut it (see
 *   KVSCRATCH_MAX_WRITE), a truncate to more rows than there are, a position
 *   outside the pad, a src_fd that is not a kvscratch handle, an operation that
 *   pads do not have (splice, sendfile, SEEK_DATA)
 * - E2BIG: size is above a page, or a field that this kernel is too old to know is
 *   not zero
 * - EDQUOT: the pad is larger than the module's limits allow
 * - ENOMEM: no memory, or the memory cgroup is full: open, CREATE, page tables
 *   of mmap, and what Linux itself allocates before a call reaches the pad: its
 *   copy of more than 8 segments of a writev() or readv(), the bookkeeping of
 *   io_uring
 * - ENOSPC: the rows do not fit; nothing was committed
 * - EFAULT: bad user memory; nothing was committed
 * - EDOM: a NaN or an infinity that would have to become an integer; nothing
 *   was committed
 * - EACCES: CREATE or TRUNCATE on a handle that is not open for write, ATTACH
 *   with more rights than its source, mmap of a handle that is not open for
 *   read
 * - EPERM: the mapping would be writable, executable (as any is of a process
 *   with READ_IMPLIES_EXEC) or private
 * - ENXIO: the mapping reaches outside the pad's regions
 * - ESPIPE: a positional write
 * - EAGAIN: the call must not wait and the pad is busy
 * - EINTR: a signal while waiting for the pad (restarted where the call allows
 *   it), a fatal one during a copy, an allocation or a mapping
 * - ENOTTY: unknown ioctl
 *
 * When several apply, the order is: binding, struct, rights, values, limits,
 * memory. ATTACH looks at its own fields before it looks at src_fd.
 */

#define KVSCRATCH_IOC_MAGIC	0xD5

/* Bounds of the format; the module's limits are usually lower. */
#define KVSCRATCH_MAX_ROW_BYTES	0x1000000U
#define KVSCRATCH_MAX_SEQ_LEN	0xffffffffU

/*
 * The longest single append, in bytes, on every page size up to 64 KiB. Linux
 * cuts each transfer to INT_MAX rounded down to a page, which would commit half
 * a batch; a count that reaches that bound is refused.
 */
#define KVSCRATCH_MAX_WRITE	0x7ffeffffU

/**
 * enum kvscratch_dtype - element type of a pad
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
 *	which shares a scale byte, in a plane of its own; see
 *	&struct kvscratch_create
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
 * struct kvscratch_create - ioctl(KVSCRATCH_IOC_CREATE)
 * @size: sizeof(struct kvscratch_create)
 * @flags: must be 0
 * @max_seq_len: capacity in rows, 1 to KVSCRATCH_MAX_SEQ_LEN
 * @dim: elements per row, at least 1; a row has at most
 *	KVSCRATCH_MAX_ROW_BYTES bytes, as stored and as appended
 * @dtype: one of &enum kvscratch_dtype: what is stored
 * @input_dtype: what write() takes: 0 or @dtype for rows as they are stored; F64,
 *	F32, F16 or BF16 to have them converted to MXINT8, I8, I16, I32 or I64
 * @frac_bits: for I8, I16, I32 and I64: fraction bits of an element, 0 to
 *	KVSCRATCH_MAX_FRAC_BITS; otherwise 0
 *
 * Bind the handle to a new, zero-filled pad. All memory of the pad is
 * allocated and charged to the caller's memory cgroup here and nowhere else.
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
 * not looked into. The first plane of the mapping is the [max_seq_len, dim] array of
 * elements, the second the [max_seq_len, dim / 32] array of scales. A stored
 * row, as read() gives it and write() takes it without an @input_dtype, is the
 * elements of a row and then its scales.
 *
 * NaN and infinities are EDOM. Negative zero is stored as 0.
 *
 * Errors: EBUSY, EINVAL, E2BIG, EFAULT, EACCES, EDQUOT, ENOMEM, EINTR.
 */
struct kvscratch_create {
	__u32 size;
	__u32 flags;
	__aligned_u64 max_seq_len;
	__u32 dim;
	__u32 dtype;
	__u32 input_dtype;
	__u32 frac_bits;
};

#define KVSCRATCH_IOC_CREATE	_IO(KVSCRATCH_IOC_MAGIC, 0)

/**
 * struct kvscratch_plane - one dense array of a pad's mapping
 * @offset: where it begins in the mapping, a multiple of the page size
 * @row_bytes: bytes per row; row n begins at @offset + n * @row_bytes
 * @reserved: 0
 */
struct kvscratch_plane {
	__aligned_u64 offset;
	__u32 row_bytes;
	__u32 reserved;
};

#define KVSCRATCH_MAX_PLANES	2

/**
 * struct kvscratch_info - ioctl(KVSCRATCH_IOC_INFO)
 * @size: sizeof(struct kvscratch_info)
 * @flags: must be 0
 * @max_seq_len: out: capacity in rows
 * @len: out: committed rows
 * @dim: out: elements per row
 * @dtype: out: one of &enum kvscratch_dtype
 * @row_bytes: out: bytes per stored row, over all planes; what read() counts in
 * @input_row_bytes: out: bytes per row that write() takes
 * @generation: out: truncates so far, in full; the status page has the low half
 * @trunc_len: out: rows that the latest truncate kept, 0 before the first
 * @data_bytes: out: max_seq_len * row_bytes, without what pads planes to pages
 * @status_offset: out: mapping offset of &struct kvscratch_status
 * @nr_planes: out: how many entries of @planes are in use
 * @reserved: 0
 * @planes: out: the layout of the mapping, data first
 * @input_dtype: out: one of &enum kvscratch_dtype: what write() takes
 * @frac_bits: out: fraction bits of an element
 * @saturated: out: elements that were clamped by appends so far, those that a
 *	truncate dropped included
 *
 * Describe the pad. Needs no rights. The fields are one consistent snapshot, but
 * for @saturated, which appends beside the call may have raised already.
 *
 * Errors: EBADFD, EINVAL, E2BIG, EFAULT.
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
	__u32 nr_planes;
	__u32 reserved;
	struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
	__u32 input_dtype;
	__u32 frac_bits;
	__aligned_u64 saturated;
};

#define KVSCRATCH_IOC_INFO	_IO(KVSCRATCH_IOC_MAGIC, 1)

/* Overwrite all that was ever written beyond the new end with zeros. */
#define KVSCRATCH_TRUNCATE_ZERO	0x1U

/**
 * struct kvscratch_truncate - ioctl(KVSCRATCH_IOC_TRUNCATE)
 * @size: sizeof(struct kvscratch_truncate)
 * @flags: 0 or KVSCRATCH_TRUNCATE_ZERO
 * @len: rows to keep, at most the committed ones
 *
 * Drop rows @len and up and start a new generation, also when nothing is
 * dropped. With KVSCRATCH_TRUNCATE_ZERO the bytes of all rows from @len on,
 * those of failed appends included, are zero when the call returns; readers
 * learn of the truncate before the first byte changes.
 *
 * Errors: EBADFD, EINVAL, E2BIG, EFAULT, EACCES, EINTR.
 */
struct kvscratch_truncate {
	__u32 size;
	__u32 flags;
	__aligned_u64 len;
};

#define KVSCRATCH_IOC_TRUNCATE	_IO(KVSCRATCH_IOC_MAGIC, 2)

/**
 * struct kvscratch_attach - ioctl(KVSCRATCH_IOC_ATTACH)
 * @size: sizeof(struct kvscratch_attach)
 * @flags: must be 0
 * @src_fd: a bound handle
 * @reserved: must be 0
 *
 * Bind this handle to the pad of another. The access mode of this handle must
 * not be wider than that of @src_fd: what is handed out O_RDONLY stays so.
 *
 * Errors: EBUSY, EINVAL, E2BIG, EFAULT, EBADF, EBADFD, EACCES.
 */
struct kvscratch_attach {
	__u32 size;
	__u32 flags;
	__s32 src_fd;
	__u32 reserved;
};

#define KVSCRATCH_IOC_ATTACH	_IO(KVSCRATCH_IOC_MAGIC, 3)

/**
 * union kvscratch_word - a generation and a number of rows in one word
 * @word: generation << 32 | rows; the generation is the low half of the full
 *	one and wraps at 2^32
 * @half: the same as two halves, for readers without 64-bit loads: index them
 *	with KVSCRATCH_WORD_LEN and KVSCRATCH_WORD_GENERATION
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
#define KVSCRATCH_STATUS_VERSION	1

/**
 * struct kvscratch_status - the page mapped at status_offset
 * @magic: KVSCRATCH_STATUS_MAGIC
 * @version: KVSCRATCH_STATUS_VERSION; grows when fields are added
 * @max_seq_len: capacity in rows
 * @dim: elements per row
 * @dtype: one of &enum kvscratch_dtype
 * @row_bytes: bytes per stored row, over all planes; the strides of the mapping
 *	are those of the planes that KVSCRATCH_IOC_INFO lists
 * @reserved: 0
 * @state: generation and committed rows
 * @trunc: generation of the latest truncate and the rows that it kept
 *
 * The kernel writes it and never reads it back. A reader loads
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
 * or loop bound from row data. The writer stores @trunc before the @state of
 * the same generation, and @state before any byte of a dropped row changes.
 *
 * Where there are no 64-bit loads a reader takes the generation half, the len
 * half and the generation half again, each with acquire, until both
 * generations agree.
 * One that may sleep across 2^32 truncates compares the generation of
 * KVSCRATCH_IOC_INFO.
 *
 * To wait, acknowledge first, then look, then sleep: lseek(fd, n * row_bytes,
 * SEEK_SET) tells poll() that n rows and the present generation were seen;
 * load @state after it; poll() then reports EPOLLIN for rows beyond n and
 * EPOLLPRI for a truncate, both also for what happened before the call. A new
 * handle has acknowledged generation 0. EPOLLOUT means room for a row, or that
 * an append which got EAGAIN may come again.
 */
struct kvscratch_status {
	__u32 magic;
	__u32 version;
	__aligned_u64 max_seq_len;
	__u32 dim;
	__u32 dtype;
	__u32 row_bytes;
	__u32 reserved[9];
	/* a cache line of their own from here */
	union kvscratch_word state;
	union kvscratch_word trunc;
};

#endif /* _UAPI_LINUX_KVSCRATCH_H */
