// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvscratch: KV-cache scratchpads for transformer inference
 *
 * /dev/kvscratch holds pads: [max_seq_len, dim] matrices that are allocated
 * once, grow by whole rows through write(), and are mapped read-only and live
 * by every process that holds a handle. uapi/linux/kvscratch.h is the contract
 * with user space.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kcsan-checks.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/poll.h>
#include <linux/preempt.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "kvscratch.h"
#include "kvscratch_scale.h"

/**
 * DOC: Lifetime
 *
 * A handle (struct file) owns a struct kvs_handle, and from CREATE or ATTACH
 * on one reference to its pad, both until release. A view pins the file by its
 * VMA, the file pins the module. Nothing of a pad is replaced while it lives,
 * so whoever has a bound handle uses the pad without a further reference.
 *
 * A view has no vm_ops: all its pages are inserted at mmap time and carry a
 * reference each, so there is no fault handler and no mapping counter.
 */

/**
 * DOC: Locks
 *
 * pad->lock orders appends and truncates. It is held while user memory is
 * read, so a writer whose source page does not arrive (userfaultfd, FUSE) stalls
 * the other writers of its pad until it is killed; all waits for it are
 * interruptible. Order: pad->lock, then mmap_lock. ->mmap runs under mmap_lock
 * and therefore never takes pad->lock.
 *
 * pad->trunc_lock nests inside pad->lock and guards a few stores only. INFO,
 * fdinfo and lseek take it; read, poll and mmap take neither: no reader ever
 * waits for a writer. The wait queue's lock nests inside pad->lock.
 */

/**
 * DOC: Memory ordering
 *
 * ======================================  =======================================
 * writer, under pad->lock                 reader: kvs_pad_read(), views
 * ======================================  =======================================
 * append:                                 (A) load-acquire state
 *   copy rows                                 read rows below its len
 *   (B) store-release state               (C) smp_rmb(), or an acquire fence
 * truncate:                                   load state again, compare the
 *   store trunc                               generation; if it moved, what
 *   (B) store-release state                   the trunc of the new generation
 *   (D) smp_mb()                              does not cover is discarded
 *   scrub; later appends overwrite rows
 * ======================================  =======================================
 *
 * A pairs with B: a reader that sees a len sees the rows below it. C pairs with
 * D: a reader that saw a byte written after a truncate sees the generation of
 * that truncate. D is a full barrier because the append that overwrites a row
 * may run on another CPU: the order must hold through the mutex for a third CPU
 * that only reads.
 */

/* Copies and scrubs yield the CPU after each piece. */
#define KVS_PIECE_BYTES		SZ_2M

/* Input that is converted passes through a buffer of this size. */
#define KVS_STAGING_BYTES	SZ_16K

/* One PMD of page-table entries per batch: vm_insert_pages() walks once. */
#define KVS_MAP_BATCH_PAGES	PTRS_PER_PTE

/* Pads are large; fail rather than call the OOM killer on somebody else. */
#define KVS_GFP		(GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

static unsigned long long max_bytes_per_pad;
module_param(max_bytes_per_pad, ullong, 0644);
MODULE_PARM_DESC(max_bytes_per_pad, "Largest pad in bytes, status page, page array and staging buffer included (default: half of RAM)");

static unsigned long long max_bytes_total;
module_param(max_bytes_total, ullong, 0644);
MODULE_PARM_DESC(max_bytes_total, "Largest sum of all pads in bytes (default: half of RAM)");

static atomic64_t kvs_reserved_bytes;

/**
 * struct kvs_handle - what one open file owns
 * @pad: NULL until CREATE or ATTACH binds it, constant from then on
 * @seen_generation: the generation that lseek(SEEK_SET) last took note of
 * @refused: appends that got EAGAIN and may come again, see kvs_poll()
 */
struct kvs_handle {
	struct kvs_pad *pad;
	u32 seen_generation;
	atomic_t refused;
};

enum kvs_kind {
	KVS_FLOAT = 1,
	KVS_INTEGER,	/* may have fraction bits */
	KVS_OPAQUE,
	KVS_MX,
};

static const struct kvs_dtype {
	const char *name;
	u32 size;
	enum kvs_kind kind;
} kvs_dtypes[] = {
	[KVSCRATCH_DTYPE_F64] = { "f64", 8, KVS_FLOAT },
	[KVSCRATCH_DTYPE_F32] = { "f32", 4, KVS_FLOAT },
	[KVSCRATCH_DTYPE_F16] = { "f16", 2, KVS_FLOAT },
	[KVSCRATCH_DTYPE_BF16] = { "bf16", 2, KVS_FLOAT },
	[KVSCRATCH_DTYPE_I64] = { "i64", 8, KVS_INTEGER },
	[KVSCRATCH_DTYPE_I32] = { "i32", 4, KVS_INTEGER },
	[KVSCRATCH_DTYPE_I16] = { "i16", 2, KVS_INTEGER },
	[KVSCRATCH_DTYPE_I8] = { "i8", 1, KVS_INTEGER },
	[KVSCRATCH_DTYPE_U8] = { "u8", 1, KVS_OPAQUE },
	[KVSCRATCH_DTYPE_MXINT8] = { "mxint8", 1, KVS_MX },
};

/* NULL for what is no dtype */
static const struct kvs_dtype *kvs_dtype(u32 dtype)
{
	if (!dtype || dtype >= ARRAY_SIZE(kvs_dtypes))
		return NULL;
	return &kvs_dtypes[array_index_nospec(dtype, ARRAY_SIZE(kvs_dtypes))];
}

/*
 * Limits
 */

/**
 * kvs_reserve() - take bytes from the module's limits
 * @bytes: how many
 * @max_per_pad: the most one pad may take
 * @max_total: the most all pads may take
 *
 * Return: 0, or -EDQUOT and nothing is taken.
 */
int kvs_reserve(u64 bytes, u64 max_per_pad, u64 max_total)
{
	s64 reserved = atomic64_read(&kvs_reserved_bytes);

	if (bytes > max_per_pad || bytes > max_total)
		return -EDQUOT;
	do {
		if (reserved > max_total - bytes)
			return -EDQUOT;
	} while (!atomic64_try_cmpxchg(&kvs_reserved_bytes, &reserved, reserved + bytes));
	return 0;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_reserve);

/**
 * kvs_unreserve() - give back what kvs_reserve() took
 * @bytes: how many
 */
void kvs_unreserve(u64 bytes)
{
	atomic64_sub(bytes, &kvs_reserved_bytes);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_unreserve);

/**
 * kvs_reserved() - how much is taken
 *
 * Return: bytes of all pads.
 */
u64 kvs_reserved(void)
{
	return atomic64_read(&kvs_reserved_bytes);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_reserved);

/*
 * Memory
 */

/* Whether rows of @input can be stored as @stored */
static bool kvs_convertible(const struct kvs_dtype *stored, const struct kvs_dtype *input)
{
	if (input == stored)
		return true;
	return input->kind == KVS_FLOAT && (stored->kind == KVS_INTEGER || stored->kind == KVS_MX);
}

static u32 kvs_scales_per_row(const struct kvs_layout *layout)
{
	return layout->dtype == KVSCRATCH_DTYPE_MXINT8 ? layout->dim / KVSCRATCH_MX_BLOCK : 0;
}

/**
 * kvs_layout_init() - check a geometry and lay out its mapping
 * @layout: receives the result
 * @create: max_seq_len, dim, dtype, input_dtype and frac_bits count
 *
 * With at most 2^32 - 1 rows of at most 2^24 bytes no sum here overflows.
 *
 * Return: 0, or -EINVAL for what the format does not allow.
 */
int kvs_layout_init(struct kvs_layout *layout, const struct kvscratch_create *create)
{
	u32 input_dtype = create->input_dtype ? create->input_dtype : create->dtype;
	const struct kvs_dtype *stored = kvs_dtype(create->dtype);
	const struct kvs_dtype *input = kvs_dtype(input_dtype);
	u64 data_row_bytes, scales, input_row_bytes;
	u64 end = 0;
	u32 i;

	if (!stored || !input || !kvs_convertible(stored, input))
		return -EINVAL;
	if (create->frac_bits > (stored->kind == KVS_INTEGER ? KVSCRATCH_MAX_FRAC_BITS : 0))
		return -EINVAL;
	if (!create->max_seq_len || create->max_seq_len > KVSCRATCH_MAX_SEQ_LEN || !create->dim)
		return -EINVAL;
	if (stored->kind == KVS_MX && create->dim % KVSCRATCH_MX_BLOCK)
		return -EINVAL;

	*layout = (struct kvs_layout) {
		.max_seq_len = create->max_seq_len,
		.dim = create->dim,
		.dtype = create->dtype,
		.input_dtype = input_dtype,
		.frac_bits = create->frac_bits,
	};
	scales = kvs_scales_per_row(layout);
	data_row_bytes = (u64)create->dim * stored->size;
	input_row_bytes = input == stored ? data_row_bytes + scales :
					    (u64)create->dim * input->size;
	if (data_row_bytes + scales > KVSCRATCH_MAX_ROW_BYTES ||
	    input_row_bytes > KVSCRATCH_MAX_ROW_BYTES)
		return -EINVAL;
	layout->row_bytes = data_row_bytes + scales;
	layout->input_row_bytes = input_row_bytes;
	layout->stored_as_is = input == stored && !scales;
	layout->planes[layout->nr_planes++].row_bytes = data_row_bytes;
	if (scales)
		layout->planes[layout->nr_planes++].row_bytes = scales;

	for (i = 0; i < layout->nr_planes; i++) {
		layout->planes[i].offset = end;
		end = PAGE_ALIGN(end + layout->max_seq_len * layout->planes[i].row_bytes);
	}
	layout->status_offset = end;
	layout->nr_pages = (end >> PAGE_SHIFT) + 1;
	layout->charged_bytes = end + PAGE_SIZE +
				PAGE_ALIGN(layout->nr_pages * sizeof(struct page *));
	if (input != stored)
		layout->charged_bytes += KVS_STAGING_BYTES;
	return 0;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_layout_init);

static bool kvs_converts(const struct kvs_layout *layout)
{
	return layout->input_dtype != layout->dtype;
}

static void *kvs_plane_row(const struct kvs_pad *pad, u32 plane, u64 row)
{
	const struct kvscratch_plane *p = &pad->layout.planes[plane];

	return pad->base + p->offset + row * p->row_bytes;
}

static void kvs_status_init(struct kvs_pad *pad)
{
	pad->status->magic = KVSCRATCH_STATUS_MAGIC;
	pad->status->version = KVSCRATCH_STATUS_VERSION;
	pad->status->max_seq_len = pad->layout.max_seq_len;
	pad->status->dim = pad->layout.dim;
	pad->status->dtype = pad->layout.dtype;
	pad->status->row_bytes = pad->layout.row_bytes;
}

static void kvs_free_pages(struct page **pages, u64 nr_pages)
{
	while (nr_pages--) {
		__free_page(pages[nr_pages]);
		cond_resched();
	}
	kvfree(pages);
}

/*
 * Page by page, not by vmalloc(), which on newer kernels takes blocks in a loop
 * that neither a fatal signal nor the scheduler gets into, and which would keep
 * an array of the pages of its own.
 */
static int kvs_pad_alloc_memory(struct kvs_pad *pad)
{
	u64 nr_pages = pad->layout.nr_pages;
	struct page **pages;
	u64 i;

	if (nr_pages > totalram_pages())
		return -ENOMEM;
	pages = kvmalloc_array(nr_pages, sizeof(*pages), KVS_GFP);
	if (!pages)
		return -ENOMEM;
	for (i = 0; i < nr_pages; i++) {
		if (fatal_signal_pending(current))
			goto err_free;
		pages[i] = alloc_page(KVS_GFP | __GFP_ZERO);
		if (!pages[i])
			goto err_free;
		cond_resched();
	}
	pad->base = vmap(pages, nr_pages, VM_MAP, PAGE_KERNEL);
	if (!pad->base)
		goto err_free;
	pad->pages = pages;
	pad->status = pad->base + pad->layout.status_offset;
	return 0;

err_free:
	kvs_free_pages(pages, i);
	return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
}

/**
 * kvs_pad_create() - make a new, zero-filled pad
 * @create: max_seq_len, dim, dtype, input_dtype and frac_bits count
 *
 * The only place that allocates for a pad.
 *
 * Return: the pad with one reference, or an ERR_PTR: -EINVAL, -EDQUOT, -ENOMEM,
 * -EINTR when a fatal signal ended the allocation.
 */
struct kvs_pad *kvs_pad_create(const struct kvscratch_create *create)
{
	struct kvs_layout layout;
	struct kvs_pad *pad;
	int err;

	err = kvs_layout_init(&layout, create);
	if (err)
		return ERR_PTR(err);
	err = kvs_reserve(layout.charged_bytes, READ_ONCE(max_bytes_per_pad),
			  READ_ONCE(max_bytes_total));
	if (err)
		return ERR_PTR(err);
	pad = kzalloc(sizeof(*pad), KVS_GFP);
	if (!pad) {
		err = -ENOMEM;
		goto err_unreserve;
	}
	pad->layout = layout;
	if (kvs_converts(&layout)) {
		err = -ENOMEM;
		pad->staging = kvmalloc(KVS_STAGING_BYTES, KVS_GFP);
		if (!pad->staging)
			goto err_free;
	}
	err = kvs_pad_alloc_memory(pad);
	if (err)
		goto err_free;
	kvs_status_init(pad);
	refcount_set(&pad->refs, 1);
	init_waitqueue_head(&pad->wait);
	mutex_init(&pad->lock);
	spin_lock_init(&pad->trunc_lock);
	return pad;

err_free:
	kvfree(pad->staging);
	kfree(pad);
err_unreserve:
	kvs_unreserve(layout.charged_bytes);
	return ERR_PTR(err);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_create);

/**
 * kvs_pad_get() - take another reference
 * @pad: a pad that the caller holds a reference to
 *
 * Return: @pad.
 */
struct kvs_pad *kvs_pad_get(struct kvs_pad *pad)
{
	refcount_inc(&pad->refs);
	return pad;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_get);

/**
 * kvs_pad_put() - drop a reference; the last one frees the pad
 * @pad: the pad
 */
void kvs_pad_put(struct kvs_pad *pad)
{
	if (!refcount_dec_and_test(&pad->refs))
		return;
	vunmap(pad->base);
	kvs_free_pages(pad->pages, pad->layout.nr_pages);
	kvs_unreserve(pad->layout.charged_bytes);
	mutex_destroy(&pad->lock);
	kvfree(pad->staging);
	kfree(pad);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_put);

/*
 * Pad core
 */

/*
 * The one place that changes what readers see. The private state comes first:
 * whoever is told by the status page finds read() and INFO at least as far.
 * Between the two stores poll() reports what a view does not show yet, and a
 * reader looks again and again; so nobody may be scheduled in between.
 */
static void kvs_publish(struct kvs_pad *pad, u64 state)
{
	lockdep_assert_held(&pad->lock);
	ASSERT_EXCLUSIVE_WRITER(pad->state);

	preempt_disable();
	/* (B) in "Memory ordering", pairs with (A) */
	smp_store_release(&pad->state, state);
	/* the same for views */
	smp_store_release(&pad->status->state.word, state);
	preempt_enable();
}

static void kvs_wake(struct kvs_pad *pad, __poll_t events)
{
	/* the barrier in wq_has_sleeper() pairs with smp_mb() in kvs_poll() */
	if (wq_has_sleeper(&pad->wait))
		wake_up_interruptible_poll(&pad->wait, events);
}

/*
 * The bounds of a copy, checked here because copy_from_iter() and copy_to_iter()
 * would look for them among the vmalloc areas of the whole system, under a lock
 * that all CPUs share: the copies below are the underscored ones, which do not.
 */
static bool kvs_within_planes(const struct kvs_pad *pad, const void *at, size_t bytes)
{
	u64 end = pad->layout.status_offset;

	return !WARN_ON_ONCE(bytes > end || at - pad->base > end - bytes);
}

/*
 * Where an append takes its rows from: @iter, or without one @user, which is all
 * that write() has. Its way is shorter by a twentieth of a small append.
 */
struct kvs_source {
	struct iov_iter *iter;
	const void __user *user;
};

static __always_inline bool kvs_copy_piece(void *to, size_t bytes, struct kvs_source *from)
{
	if (from->iter)
		return _copy_from_iter(to, bytes, from->iter) == bytes;
	if (kvs_copy_from_user(to, from->user, bytes))
		return false;
	from->user += bytes;
	return true;
}

/* -EFAULT, or what ended the task's copy */
static __always_inline int kvs_copy_in(struct kvs_pad *pad, void *to, size_t bytes,
				       struct kvs_source from)
{
	if (!kvs_within_planes(pad, to, bytes))
		return -EFAULT;
	while (unlikely(bytes > KVS_PIECE_BYTES)) {
		if (!kvs_copy_piece(to, KVS_PIECE_BYTES, &from))
			goto err_fault;
		to += KVS_PIECE_BYTES;
		bytes -= KVS_PIECE_BYTES;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	if (likely(kvs_copy_piece(to, bytes, &from)))
		return 0;
err_fault:
	return fatal_signal_pending(current) ? -EINTR : -EFAULT;
}

/* Rows of several planes that are stored as they come: a row of each in turn */
static noinline int kvs_store_records(struct kvs_pad *pad, struct iov_iter *from, u32 len,
				      u32 rows)
{
	const struct kvs_layout *layout = &pad->layout;
	u64 row;
	u32 plane;
	int err;

	for (row = len; row < (u64)len + rows; row++) {
		for (plane = 0; plane < layout->nr_planes; plane++) {
			err = kvs_copy_in(pad, kvs_plane_row(pad, plane, row),
					  layout->planes[plane].row_bytes,
					  (struct kvs_source) { .iter = from });
			if (err)
				return err;
		}
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/*
 * Convert @count elements of the staging buffer to what begins with element
 * @first of the pad. Returns how many were clamped, or -EDOM.
 */
static long kvs_convert(struct kvs_pad *pad, u64 first, size_t count)
{
	const struct kvs_layout *layout = &pad->layout;
	u32 size = kvs_dtypes[layout->dtype].size;
	void *to = kvs_plane_row(pad, 0, 0) + first * size;
	long saturated;

	if (layout->dtype == KVSCRATCH_DTYPE_MXINT8)
		saturated = kvs_scale_mxint8(layout->input_dtype, pad->staging,
					     count / KVSCRATCH_MX_BLOCK, to,
					     kvs_plane_row(pad, 1, 0) + first / KVSCRATCH_MX_BLOCK);
	else
		saturated = kvs_scale_fixed(layout->input_dtype, pad->staging, count,
					    layout->frac_bits, size, to);
	return saturated == KVS_SCALE_NOT_FINITE ? -EDOM : saturated;
}

/*
 * Rows that are converted. Rows follow each other without a gap in every plane,
 * and so do the blocks of MXINT8: pieces need not end with a row.
 */
static noinline int kvs_store_converted(struct kvs_pad *pad, struct iov_iter *from, u32 len,
					u32 rows)
{
	const struct kvs_layout *layout = &pad->layout;
	u32 size = kvs_dtypes[layout->input_dtype].size;
	u64 end = ((u64)len + rows) * layout->dim;
	u64 at = (u64)len * layout->dim;
	u64 saturated = 0;

	while (at < end) {
		size_t count = min_t(u64, end - at, KVS_STAGING_BYTES / size);
		long clamped;

		if (!copy_from_iter_full(pad->staging, count * size, from))
			return fatal_signal_pending(current) ? -EINTR : -EFAULT;
		clamped = kvs_convert(pad, at, count);
		if (clamped < 0)
			return clamped;
		saturated += clamped;
		at += count;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	if (saturated)
		WRITE_ONCE(pad->saturated, pad->saturated + saturated);
	return 0;
}

static __always_inline int kvs_append_locked(struct kvs_pad *pad, struct kvs_source from,
					     size_t bytes, u32 rows)
{
	u64 state = pad->state;
	u32 len = kvs_state_len(state);
	int err;

	lockdep_assert_held(&pad->lock);

	if (rows > pad->layout.max_seq_len - len)
		return -ENOSPC;
	/* before the copy: a failed one leaves parts of rows behind */
	pad->dirty_rows = max_t(u32, pad->dirty_rows, len + rows);
	if (!from.iter || pad->layout.stored_as_is)
		err = kvs_copy_in(pad, kvs_plane_row(pad, 0, len), bytes, from);
	else if (kvs_converts(&pad->layout))
		err = kvs_store_converted(pad, from.iter, len, rows);
	else
		err = kvs_store_records(pad, from.iter, len, rows);
	if (unlikely(err)) {
		/* as if it had never been touched */
		if (from.iter)
			iov_iter_revert(from.iter, bytes - iov_iter_count(from.iter));
		return err;
	}
	kvs_publish(pad, state + rows);
	kvs_wake(pad, EPOLLIN | EPOLLRDNORM);
	return 0;
}

static __always_inline ssize_t kvs_append(struct kvs_pad *pad, struct kvs_source from,
					  size_t bytes, bool nowait)
{
	u32 rows;
	int err;

	if (!bytes)
		return 0;
	/* The VFS cuts longer counts to MAX_RW_COUNT without a word. */
	if (bytes >= MAX_RW_COUNT)
		return -EINVAL;
	rows = (u32)bytes / pad->layout.input_row_bytes;
	if (rows * pad->layout.input_row_bytes != bytes)
		return -EINVAL;
	if (nowait) {
		if (!mutex_trylock(&pad->lock))
			return -EAGAIN;
	} else if (mutex_lock_interruptible(&pad->lock)) {
		return -ERESTARTSYS;
	}
	err = kvs_append_locked(pad, from, bytes, rows);
	mutex_unlock(&pad->lock);
	return err ? err : bytes;
}

/**
 * kvs_pad_append() - append whole rows, all or none
 * @pad: the pad
 * @from: the rows; consumed on success, untouched on failure
 * @nowait: do not wait for other writers
 *
 * Return: bytes appended, or -EINVAL when @from is not a whole number of rows or
 * may have been cut by the VFS, -ENOSPC, -EFAULT, -EDOM for what cannot be
 * converted, -EAGAIN with @nowait, -ERESTARTSYS, -EINTR after a fatal signal.
 */
ssize_t kvs_pad_append(struct kvs_pad *pad, struct iov_iter *from, bool nowait)
{
	return kvs_append(pad, (struct kvs_source) { .iter = from }, iov_iter_count(from), nowait);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_append);

/*
 * Where byte @pos of the stream of rows lies, and how many bytes follow it there:
 * to the end of all rows in a pad of one plane, else to the end of a row's part.
 */
static const void *kvs_locate(const struct kvs_pad *pad, u64 pos, u64 *contiguous)
{
	const struct kvs_layout *layout = &pad->layout;
	u64 row, offset;
	u32 plane = 0;

	if (layout->nr_planes == 1) {
		*contiguous = layout->max_seq_len * layout->row_bytes - pos;
		return kvs_plane_row(pad, 0, 0) + pos;
	}
	row = pos / layout->row_bytes;
	offset = pos % layout->row_bytes;
	while (offset >= layout->planes[plane].row_bytes)
		offset -= layout->planes[plane++].row_bytes;
	*contiguous = layout->planes[plane].row_bytes - offset;
	return kvs_plane_row(pad, plane, row) + offset;
}

/*
 * Copy out what may change underneath, until a truncate comes in. Returns the
 * bytes that are of @generation, or -EAGAIN, or -EFAULT, when there are none.
 */
static ssize_t kvs_copy_out(struct kvs_pad *pad, u64 pos, size_t total, struct iov_iter *to,
			    u32 generation)
{
	size_t done = 0;

	while (done < total) {
		u64 contiguous;
		const void *from = kvs_locate(pad, pos + done, &contiguous);
		size_t piece = min3((u64)(total - done), contiguous, (u64)KVS_PIECE_BYTES);
		size_t copied;

		if (!kvs_within_planes(pad, from, piece))
			return -EFAULT;
		/* a truncate and an append may overwrite it meanwhile */
		copied = data_race(_copy_to_iter(from, piece, to));
		/* (C) in "Memory ordering", pairs with (D) */
		smp_rmb();
		if (kvs_state_generation(READ_ONCE(pad->state)) != generation) {
			iov_iter_revert(to, copied);
			return done ? done : -EAGAIN;
		}
		done += copied;
		if (copied < piece)
			return done ? done : -EFAULT;
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

/**
 * kvs_pad_read() - read committed rows as a byte stream
 * @pad: the pad
 * @pos: where to begin, in bytes
 * @to: receives the bytes
 * @nowait: do not start over when a truncate comes in between
 *
 * Takes no lock. What it returns is what was committed in one generation; a
 * truncate may make it shorter than what there was.
 *
 * Return: bytes read, 0 at or beyond the last row, or -EFAULT, -EAGAIN with
 * @nowait, -ERESTARTSYS when truncates and a signal come in between.
 */
ssize_t kvs_pad_read(struct kvs_pad *pad, u64 pos, struct iov_iter *to, bool nowait)
{
	for (;;) {
		/* (A) in "Memory ordering" */
		u64 state = smp_load_acquire(&pad->state);
		u64 end = (u64)kvs_state_len(state) * pad->layout.row_bytes;
		ssize_t copied;

		if (pos >= end || !iov_iter_count(to))
			return 0;
		copied = kvs_copy_out(pad, pos, min_t(u64, end - pos, iov_iter_count(to)), to,
				      kvs_state_generation(state));
		if (copied != -EAGAIN || nowait)
			return copied;
		if (signal_pending(current))
			return -ERESTARTSYS;
		cond_resched();
	}
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_read);

/* Zero the rows from @row to the end of what was ever touched. */
static void kvs_scrub(struct kvs_pad *pad, u32 row)
{
	u32 plane;

	lockdep_assert_held(&pad->lock);

	if (row >= pad->dirty_rows)
		return;
	for (plane = 0; plane < pad->layout.nr_planes; plane++) {
		void *at = kvs_plane_row(pad, plane, row);
		void *end = kvs_plane_row(pad, plane, pad->dirty_rows);

		while (at < end) {
			size_t piece = min_t(size_t, end - at, KVS_PIECE_BYTES);

			memset(at, 0, piece);
			at += piece;
			cond_resched();
		}
	}
	pad->dirty_rows = row;
}

static void kvs_publish_truncate(struct kvs_pad *pad, u32 len)
{
	u32 generation = kvs_state_generation(pad->state) + 1;
	u64 state = kvs_state(generation, len);

	spin_lock(&pad->trunc_lock);
	if (!generation)
		pad->generation_high++;
	pad->trunc_len = len;
	/* before the state of the same generation, which releases it */
	WRITE_ONCE(pad->status->trunc.word, state);
	kvs_publish(pad, state);
	spin_unlock(&pad->trunc_lock);
	/* (D) in "Memory ordering", pairs with (C) */
	smp_mb();
	kvs_wake(pad, EPOLLPRI | EPOLLOUT | EPOLLWRNORM);
}

/**
 * kvs_pad_truncate() - drop rows and start a new generation
 * @pad: the pad
 * @len: rows to keep
 * @zero: overwrite all that was ever written beyond them
 *
 * Return: 0, -EINVAL when there are fewer than @len rows, -ERESTARTSYS.
 */
int kvs_pad_truncate(struct kvs_pad *pad, u64 len, bool zero)
{
	int err = 0;

	if (mutex_lock_interruptible(&pad->lock))
		return -ERESTARTSYS;
	if (len > kvs_state_len(pad->state)) {
		err = -EINVAL;
	} else {
		kvs_publish_truncate(pad, len);
		if (zero)
			kvs_scrub(pad, len);
		/* what is to be forgotten passed through here */
		if (zero && pad->staging)
			memset(pad->staging, 0, KVS_STAGING_BYTES);
	}
	mutex_unlock(&pad->lock);
	return err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_truncate);

/**
 * kvs_pad_info() - one consistent snapshot
 * @pad: the pad
 * @info: receives it; @info->size is left to the caller. Only saturated may be ahead
 *	of the rest.
 */
void kvs_pad_info(struct kvs_pad *pad, struct kvscratch_info *info)
{
	const struct kvs_layout *layout = &pad->layout;
	u64 state;

	spin_lock(&pad->trunc_lock);
	/* appends go on under us; the generation does not */
	state = smp_load_acquire(&pad->state);
	info->generation = (u64)pad->generation_high << 32 | kvs_state_generation(state);
	info->trunc_len = pad->trunc_len;
	spin_unlock(&pad->trunc_lock);

	info->max_seq_len = layout->max_seq_len;
	info->len = kvs_state_len(state);
	info->dim = layout->dim;
	info->dtype = layout->dtype;
	info->input_dtype = layout->input_dtype;
	info->frac_bits = layout->frac_bits;
	info->saturated = READ_ONCE(pad->saturated);
	info->row_bytes = layout->row_bytes;
	info->input_row_bytes = layout->input_row_bytes;
	info->data_bytes = layout->max_seq_len * layout->row_bytes;
	info->status_offset = layout->status_offset;
	info->nr_planes = layout->nr_planes;
	memcpy(info->planes, layout->planes, sizeof(info->planes));
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_info);

/**
 * kvs_pad_show() - describe a pad in fdinfo
 * @pad: the pad
 * @m: where to
 */
void kvs_pad_show(struct kvs_pad *pad, struct seq_file *m)
{
	struct kvscratch_info info = {};

	kvs_pad_info(pad, &info);
	seq_printf(m, "pad:\tScratchpad(len=%llu, capacity=%llu, dim=%u)\n",
		   info.len, info.max_seq_len, info.dim);
	seq_printf(m, "dtype:\t%s\n", kvs_dtypes[info.dtype].name);
	seq_printf(m, "input_dtype:\t%s\n", kvs_dtypes[info.input_dtype].name);
	seq_printf(m, "frac_bits:\t%u\n", info.frac_bits);
	seq_printf(m, "saturated:\t%llu\n", info.saturated);
	seq_printf(m, "bytes:\t%llu\n", pad->layout.charged_bytes);
	seq_printf(m, "generation:\t%llu\n", info.generation);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_show);

/*
 * Handles
 */

static struct kvs_pad *kvs_file_pad(struct file *file)
{
	struct kvs_handle *handle = file->private_data;

	/* pairs with cmpxchg_release() in kvs_bind() */
	return smp_load_acquire(&handle->pad);
}

/* Takes over the caller's reference when it succeeds. */
static int kvs_bind(struct file *file, struct kvs_pad *pad)
{
	struct kvs_handle *handle = file->private_data;

	/* pairs with smp_load_acquire() in kvs_file_pad() */
	return cmpxchg_release(&handle->pad, NULL, pad) ? -EBUSY : 0;
}

/*
 * ioctls: the dispatcher has checked binding, struct and rights
 */

static int kvs_ioctl_create(struct file *file, void *arg)
{
	struct kvscratch_create *create = arg;
	struct kvs_pad *pad;
	int err;

	if (create->flags)
		return -EINVAL;
	pad = kvs_pad_create(create);
	if (IS_ERR(pad))
		return PTR_ERR(pad);
	err = kvs_bind(file, pad);
	if (err)
		kvs_pad_put(pad);
	return err;
}

static int kvs_ioctl_info(struct file *file, void *arg)
{
	struct kvscratch_info *info = arg;

	/* everything behind size is an output or must be zero */
	if (memchr_inv(&info->flags, 0, sizeof(*info) - offsetof(typeof(*info), flags)))
		return -EINVAL;
	kvs_pad_info(kvs_file_pad(file), info);
	return 0;
}

static int kvs_ioctl_truncate(struct file *file, void *arg)
{
	struct kvscratch_truncate *truncate = arg;

	if (truncate->flags & ~KVSCRATCH_TRUNCATE_ZERO)
		return -EINVAL;
	return kvs_pad_truncate(kvs_file_pad(file), truncate->len,
				truncate->flags & KVSCRATCH_TRUNCATE_ZERO);
}

static const struct file_operations kvs_fops;

/* The caller holds @src, and so the pad that is returned without a reference. */
static struct kvs_pad *kvs_attach_source(struct file *file, struct file *src)
{
	const fmode_t rights = FMODE_READ | FMODE_WRITE;
	struct kvs_pad *pad;

	if (src->f_op != &kvs_fops)
		return ERR_PTR(-EINVAL);
	pad = kvs_file_pad(src);
	if (!pad)
		return ERR_PTR(-EBADFD);
	if (file->f_mode & rights & ~src->f_mode)
		return ERR_PTR(-EACCES);
	return pad;
}

static int kvs_ioctl_attach(struct file *file, void *arg)
{
	struct kvscratch_attach *attach = arg;
	struct kvs_pad *pad;
	struct file *src;
	int err;

	if (attach->flags || attach->reserved)
		return -EINVAL;
	src = fget(attach->src_fd);
	if (!src)
		return -EBADF;
	pad = kvs_attach_source(file, src);
	if (IS_ERR(pad)) {
		err = PTR_ERR(pad);
		goto out_put_file;
	}
	err = kvs_bind(file, kvs_pad_get(pad));
	if (err)
		kvs_pad_put(pad);
out_put_file:
	fput(src);
	return err;
}

/**
 * struct kvs_ioctl - one entry of the dispatch table
 * @cmd: the whole number
 * @size: what this kernel knows of the argument
 * @min_size: the first version of the argument
 * @bound: whether the handle has to be bound, or has to be unbound
 * @output: whether the argument is copied back
 * @rights: access mode that the handle must have
 * @handler: acts on the checked copy of the argument
 */
struct kvs_ioctl {
	unsigned int cmd;
	u32 size;
	u32 min_size;
	bool bound;
	bool output;
	fmode_t rights;
	int (*handler)(struct file *file, void *arg);
};

union kvs_ioctl_arg {
	u32 size;
	struct kvscratch_create create;
	struct kvscratch_info info;
	struct kvscratch_truncate truncate;
	struct kvscratch_attach attach;
};

#define KVS_IOCTL(_cmd, _name, _last) \
	.cmd = _cmd, \
	.size = sizeof(struct kvscratch_##_name), \
	.min_size = offsetofend(struct kvscratch_##_name, _last), \
	.handler = kvs_ioctl_##_name

static const struct kvs_ioctl kvs_ioctls[] = {
	[_IOC_NR(KVSCRATCH_IOC_CREATE)] = {
		KVS_IOCTL(KVSCRATCH_IOC_CREATE, create, dtype),
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_INFO)] = {
		KVS_IOCTL(KVSCRATCH_IOC_INFO, info, planes),
		.bound = true,
		.output = true,
	},
	[_IOC_NR(KVSCRATCH_IOC_TRUNCATE)] = {
		KVS_IOCTL(KVSCRATCH_IOC_TRUNCATE, truncate, len),
		.bound = true,
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_ATTACH)] = {
		KVS_IOCTL(KVSCRATCH_IOC_ATTACH, attach, reserved),
	},
};

static int kvs_ioctl_copy_in(const struct kvs_ioctl *op, union kvs_ioctl_arg *arg,
			     void __user *argp)
{
	u32 size;
	int err;

	if (get_user(size, (u32 __user *)argp))
		return -EFAULT;
	if (size < op->min_size)
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	err = copy_struct_from_user(arg, op->size, argp, size);
	if (err)
		return err;
	/* the caller's memory may have changed since size was checked */
	arg->size = size;
	return 0;
}

static int kvs_ioctl_copy_out(const struct kvs_ioctl *op, union kvs_ioctl_arg *arg,
			      void __user *argp)
{
	arg->size = min(arg->size, op->size);
	return copy_to_user(argp, arg, arg->size) ? -EFAULT : 0;
}

static long kvs_unlocked_ioctl(struct file *file, unsigned int cmd, unsigned long user_arg)
{
	void __user *argp = (void __user *)user_arg;
	unsigned int nr = _IOC_NR(cmd);
	union kvs_ioctl_arg arg = {};
	const struct kvs_ioctl *op;
	int err;

	if (nr >= ARRAY_SIZE(kvs_ioctls))
		return -ENOIOCTLCMD;
	op = &kvs_ioctls[array_index_nospec(nr, ARRAY_SIZE(kvs_ioctls))];
	if (op->cmd != cmd)
		return -ENOIOCTLCMD;
	if (op->bound != !!kvs_file_pad(file))
		return op->bound ? -EBADFD : -EBUSY;
	err = kvs_ioctl_copy_in(op, &arg, argp);
	if (err)
		return err;
	if (op->rights & ~file->f_mode)
		return -EACCES;
	err = op->handler(file, &arg);
	if (err || !op->output)
		return err;
	return kvs_ioctl_copy_out(op, &arg, argp);
}

/*
 * File operations
 */

static int kvs_open(struct inode *inode, struct file *file)
{
	struct kvs_handle *handle = kzalloc(sizeof(*handle), GFP_KERNEL_ACCOUNT);

	if (!handle)
		return -ENOMEM;
	file->private_data = handle;
	/* io_uring appends inline instead of in a worker */
	file->f_mode |= FMODE_NOWAIT;
	/* pwrite() is ESPIPE: rows have no other place than the end */
	file->f_mode &= ~FMODE_PWRITE;
	kvs_file_set_nonotify(file);
	return 0;
}

static int kvs_release(struct inode *inode, struct file *file)
{
	struct kvs_handle *handle = file->private_data;

	if (handle->pad)
		kvs_pad_put(handle->pad);
	kfree(handle);
	return 0;
}

/* How many appends got EAGAIN and may come again, see kvs_poll() */
static noinline void kvs_count_refusal(struct kvs_handle *handle, ssize_t appended)
{
	if (appended == -EAGAIN)
		atomic_inc(&handle->refused);
	else if (appended > 0 || appended == -ENOSPC || appended == -EFAULT || appended == -EDOM)
		atomic_dec_if_positive(&handle->refused);
}

/* An append has one place: the position is neither looked at nor moved. */
static ssize_t kvs_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct kvs_handle *handle = iocb->ki_filp->private_data;
	struct kvs_pad *pad = kvs_file_pad(iocb->ki_filp);
	ssize_t appended;

	if (!pad)
		return -EBADFD;
	appended = kvs_pad_append(pad, from, iocb->ki_flags & IOCB_NOWAIT);
	if (unlikely(appended == -EAGAIN || atomic_read(&handle->refused)))
		kvs_count_refusal(handle, appended);
	return appended;
}

static noinline ssize_t kvs_write_planes(struct kvs_pad *pad, const char __user *rows,
					 size_t bytes)
{
	struct iov_iter from;

	iov_iter_ubuf(&from, ITER_SOURCE, (void __user *)rows, bytes);
	return kvs_pad_append(pad, &from, false);
}

/* Beside write_iter: what write() does most often needs neither kiocb nor iov_iter. */
static ssize_t kvs_write(struct file *file, const char __user *rows, size_t bytes, loff_t *pos)
{
	struct kvs_handle *handle = file->private_data;
	struct kvs_pad *pad = kvs_file_pad(file);
	ssize_t appended;

	if (!pad)
		return -EBADFD;
	if (likely(pad->layout.stored_as_is))
		appended = kvs_append(pad, (struct kvs_source) { .user = rows }, bytes, false);
	else
		appended = kvs_write_planes(pad, rows, bytes);
	if (unlikely(atomic_read(&handle->refused)))
		kvs_count_refusal(handle, appended);
	return appended;
}

static ssize_t kvs_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct kvs_pad *pad = kvs_file_pad(iocb->ki_filp);
	ssize_t copied;

	if (!pad)
		return -EBADFD;
	copied = kvs_pad_read(pad, iocb->ki_pos, to, iocb->ki_flags & IOCB_NOWAIT);
	if (copied > 0)
		iocb->ki_pos += copied;
	return copied;
}

static loff_t kvs_llseek(struct file *file, loff_t offset, int whence)
{
	struct kvs_handle *handle = file->private_data;
	struct kvs_pad *pad = kvs_file_pad(file);
	u64 state, end;
	loff_t pos;

	if (!pad)
		return -EBADFD;
	if (whence != SEEK_SET && whence != SEEK_CUR && whence != SEEK_END)
		return -EINVAL;
	/* What is acknowledged here the status page shows already. */
	spin_lock(&pad->trunc_lock);
	state = READ_ONCE(pad->state);
	spin_unlock(&pad->trunc_lock);
	end = (u64)kvs_state_len(state) * pad->layout.row_bytes;
	/* f_pos is not locked for devices; of two lseeks at once either stays */
	pos = data_race(generic_file_llseek_size(file, offset, whence,
						 pad->layout.max_seq_len * pad->layout.row_bytes,
						 end));
	if (whence == SEEK_SET && pos >= 0)
		WRITE_ONCE(handle->seen_generation, kvs_state_generation(state));
	return pos;
}

static __poll_t kvs_poll(struct file *file, struct poll_table_struct *table)
{
	struct kvs_handle *handle = file->private_data;
	struct kvs_pad *pad = kvs_file_pad(file);
	__poll_t events = 0;
	u64 state, pos;

	/* There is no wait queue yet; to say nothing would be to sleep for ever. */
	if (!pad)
		return EPOLLERR;
	poll_wait(file, &pad->wait, table);
	/* queue, then look; pairs with wq_has_sleeper() in kvs_publish() */
	smp_mb();
	/* (A) in "Memory ordering" */
	state = smp_load_acquire(&pad->state);
	/* f_pos is not locked for devices; a poll beside an lseek sees either */
	pos = data_race(READ_ONCE(file->f_pos));

	if (pos < (u64)kvs_state_len(state) * pad->layout.row_bytes)
		events |= EPOLLIN | EPOLLRDNORM;
	/*
	 * io_uring meets EAGAIN by polling for room. If the append that was in
	 * its way took the last row, it has to come again to find ENOSPC.
	 */
	if (kvs_state_len(state) < pad->layout.max_seq_len || atomic_read(&handle->refused))
		events |= EPOLLOUT | EPOLLWRNORM;
	if (kvs_state_generation(state) != READ_ONCE(handle->seen_generation))
		events |= EPOLLPRI;
	return events;
}

static int kvs_map_pages(struct vm_area_struct *vma, struct page **pages)
{
	unsigned long addr = vma->vm_start;
	unsigned long left = vma_pages(vma);

	while (left) {
		unsigned long batch = min_t(unsigned long, left, KVS_MAP_BATCH_PAGES);
		unsigned long remaining = batch;
		int err = vm_insert_pages(vma, addr, pages, &remaining);

		/* -EFAULT: there was no memory for the upper page tables */
		if (err)
			return err == -EFAULT ? -ENOMEM : err;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
		pages += batch;
		addr += batch << PAGE_SHIFT;
		left -= batch;
	}
	return 0;
}

/* Runs under mmap_lock: takes no lock, see "Locks". On error the core unmaps. */
static int kvs_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kvs_pad *pad = kvs_file_pad(file);
	u64 nr_pages;

	if (!pad)
		return -EBADFD;
	/* do_mmap() drops VM_SHARED for O_RDONLY files; VM_MAYSHARE tells */
	if (vma->vm_flags & (VM_WRITE | VM_EXEC) || !(vma->vm_flags & VM_MAYSHARE))
		return -EPERM;
	nr_pages = pad->layout.nr_pages;
	if (vma->vm_pgoff >= nr_pages || vma_pages(vma) > nr_pages - vma->vm_pgoff)
		return -ENXIO;
	kvs_vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP, VM_MAYWRITE | VM_MAYEXEC);
	return kvs_map_pages(vma, pad->pages + array_index_nospec(vma->vm_pgoff, nr_pages));
}

static void kvs_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct kvs_pad *pad = kvs_file_pad(file);

	if (pad)
		kvs_pad_show(pad, m);
}

static const struct file_operations kvs_fops = {
	.owner = THIS_MODULE,
	.open = kvs_open,
	.release = kvs_release,
	.llseek = kvs_llseek,
	.read_iter = kvs_read_iter,
	.write = kvs_write,
	.write_iter = kvs_write_iter,
	.poll = kvs_poll,
	.mmap = kvs_mmap,
	.unlocked_ioctl = kvs_unlocked_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.show_fdinfo = kvs_show_fdinfo,
};

static struct miscdevice kvs_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kvscratch",
	.fops = &kvs_fops,
	.mode = 0600,
};

static int __init kvs_init(void)
{
	u64 half_of_ram = ((u64)totalram_pages() << PAGE_SHIFT) / 2;

	if (!max_bytes_per_pad)
		max_bytes_per_pad = half_of_ram;
	if (!max_bytes_total)
		max_bytes_total = half_of_ram;
	return misc_register(&kvs_misc);
}
module_init(kvs_init);

static void __exit kvs_exit(void)
{
	misc_deregister(&kvs_misc);
}
module_exit(kvs_exit);

MODULE_AUTHOR("The kvscratch authors");
MODULE_DESCRIPTION("KV-cache scratchpads for transformer inference");
MODULE_LICENSE("GPL");
