// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvscratch: KV-cache scratchpads for transformer inference
 *
 * /dev/kvscratch makes pads: tables of one or more [max_seq_len, dim] planes
 * that are allocated once, grow by whole tokens, and are mapped read-only and
 * live by every process that holds a handle. uapi/linux/kvscratch.h is the
 * contract with user space.
 */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kcsan-checks.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/nospec.h>
#include <linux/pagemap.h>
#include <linux/poll.h>
#include <linux/pseudo_fs.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "kvscratch.h"
#include "kvscratch_scale.h"

/**
 * DOC: Lifetime
 *
 * A handle (struct file) owns a struct kvs_handle, and by it a reference to its
 * pad, from the constructor to release. A view pins the file by its VMA, the file
 * pins the module and the pseudo file system that its inode is of. Nothing of
 * a pad is replaced while it lives, so whoever has a handle uses the pad, its
 * chunks included, without a further reference and without a lock.
 *
 * What a fork shares lives as long as one pad uses it: chunks count the arrays and
 * tables that they are in, single pages the tables. Whoever shares something holds a
 * count of its own, so a count of 1 is that of who looks, and stays 1.
 *
 * The pages of a view carry ordinary references, which fault handling takes: a
 * page that somebody pinned outlives the pad.
 */

/**
 * DOC: Locks and turns
 *
 * pad->lock is held over no user page fault and no allocation, so everybody takes
 * it with mutex_lock(), also who must not wait. Copies under it have page faults
 * disabled and end after KVS_HOLD_BYTES.
 *
 * An operation that has to drop the lock before it is done, to have a page
 * faulted in or because it held the lock long enough, first sets pad->turn to
 * itself and clears it at its end. Whoever would change the pad and finds a turn
 * gets -EAGAIN or sleeps, interruptibly, on pad->turn_wait, and starts over. A
 * takeover takes the lock only: it clears the turn, and the operation finds that
 * when it has the lock again, and touches nothing more.
 *
 * A fork holds the lock of its source while it takes a reference on each chunk that
 * holds shared rows, and its own, which nobody else has, never. A truncate refuses to
 * drop rows of chunks that have other users; the boundary is therefore copied, and
 * its pages counted, without the lock.
 *
 * read, poll, INFO, mmap, page faults and fdinfo take no lock: no reader ever
 * waits for a writer. pad->lock nests in nothing and nothing but the locks of
 * wait queues and work items, which are taken outside of it, follows it;
 * mmap_lock is never taken under it.
 *
 * Pollers are woken by work items, after the unlock: any reader can register any
 * number of them, and a writer does not walk them. Who waits to write has a queue that
 * readers do not join, and the handle of the only writer joins no other: even when
 * it polls it waits for no walk of the readers.
 */

/**
 * DOC: Memory ordering
 *
 * ======================================  =======================================
 * writer, under pad->lock                 reader: kvs_pad_read(), views
 * ======================================  =======================================
 * append, commit:                         (A) load-acquire state
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
 * that only reads; smp_wmb() is not enough.
 *
 * There is one published word, the state on the status page. Who holds the lock
 * uses pad->len and pad->generation; who does not loads the page. The two are
 * never compared, so there is no order between them to keep.
 */

/**
 * DOC: Memory
 *
 * A plane is an array of chunks of 2 MiB, each a compound page or a table of
 * single pages, reached through the direct map. There is no vmap() of a pad: its
 * page tables would be allocated uncharged, outside of the limits and with the
 * OOM killer at hand, and addresses that hardened usercopy looks up under a lock
 * of the whole machine could not be mapped by huge entries either.
 *
 * memory_failure() cannot handle these pages, and they cannot be moved, so that
 * their memory cannot be offlined; hibernation saves them; kexec does not wipe
 * them.
 */

/* The longest copy under pad->lock: a source in device memory is slow. */
#define KVS_HOLD_BYTES		SZ_128K

/* What a copy counts for besides its bytes, so that many small ones end as well */
#define KVS_COPY_COST		64

/* A source that is faulted in so often and still cannot be copied from is bad. */
#define KVS_MAX_ROUNDS		16

/* The longest piece of a read that is looked at as one */
#define KVS_READ_BYTES		SZ_4K

/* Input that is converted passes through a buffer of this size. */
#define KVS_STAGING_BYTES	SZ_16K

/* After so many a pad is made of single pages: memory is fragmented. */
#define KVS_MAX_REFUSALS	4

/*
 * Pads are large; fail rather than call the OOM killer on somebody else. GFP_USER,
 * not GFP_KERNEL, keeps to the cpuset of the creator.
 */
#define KVS_GFP		(GFP_USER | __GFP_ACCOUNT | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)
#define KVS_GFP_HUGE	(GFP_USER | __GFP_ACCOUNT | __GFP_NORETRY | __GFP_NOWARN | __GFP_COMP)

/* Parameters that were not set */
#define KVS_DEFAULT	U64_MAX

static unsigned long long max_bytes_per_pad = KVS_DEFAULT;
module_param(max_bytes_per_pad, ullong, 0644);
MODULE_PARM_DESC(max_bytes_per_pad, "Largest pad in bytes, with all that is allocated for it (default: half of RAM)");

static unsigned long long max_bytes_total = KVS_DEFAULT;
module_param(max_bytes_total, ullong, 0644);
MODULE_PARM_DESC(max_bytes_total, "Largest sum of all pads in bytes (default: half of RAM)");

/*
 * Pads cannot be reclaimed: what others need at once, page cache of what they run
 * and page tables, has to come from what is left.
 */
static unsigned long long min_available_bytes = KVS_DEFAULT;
module_param(min_available_bytes, ullong, 0644);
MODULE_PARM_DESC(min_available_bytes, "Bytes of available memory that making a pad leaves (default: 1/32 of RAM, 32 MiB to 1 GiB)");

static atomic64_t kvs_reserved_bytes;

static int kvs_get_reserved(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%llu\n", kvs_reserved());
}

/* At load nobody looks at the mode. */
static int kvs_refuse_set(const char *value, const struct kernel_param *param)
{
	return -EPERM;
}

static const struct kernel_param_ops kvs_reserved_ops = {
	.get = kvs_get_reserved,
	.set = kvs_refuse_set,
};
module_param_cb(bytes_total, &kvs_reserved_ops, NULL, 0444);
MODULE_PARM_DESC(bytes_total, "Bytes of all pads, read-only");

static struct workqueue_struct *kvs_wakers;
static atomic64_t kvs_last_id;

static const char *const kvs_dtype_names[] = {
	[KVSCRATCH_DTYPE_F64] = "f64",
	[KVSCRATCH_DTYPE_F32] = "f32",
	[KVSCRATCH_DTYPE_F16] = "f16",
	[KVSCRATCH_DTYPE_BF16] = "bf16",
	[KVSCRATCH_DTYPE_I64] = "i64",
	[KVSCRATCH_DTYPE_I32] = "i32",
	[KVSCRATCH_DTYPE_I16] = "i16",
	[KVSCRATCH_DTYPE_I8] = "i8",
	[KVSCRATCH_DTYPE_U8] = "u8",
	[KVSCRATCH_DTYPE_MXINT8] = "mxint8",
};

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

/* Whether so much more can be taken from the machine; what others take meanwhile is not seen */
static bool kvs_leaves_enough(u64 bytes)
{
	u64 available = (u64)max(si_mem_available(), 0L) << PAGE_SHIFT;

	return available >= bytes && available - bytes >= READ_ONCE(min_available_bytes);
}

/*
 * Chunks
 */

/*
 * Zeroed memory for arrays of any length. kvmalloc() would compact the machine for a long
 * one, since KVS_GFP does not give up easily; free it with kvfree().
 */
static void *kvs_zalloc(size_t bytes)
{
	void *memory;

	if (bytes <= PAGE_SIZE)
		return kzalloc(bytes, KVS_GFP);
	memory = kzalloc(bytes, (KVS_GFP & ~__GFP_RETRY_MAYFAIL) | __GFP_NORETRY);
	return memory ? memory : __vmalloc(bytes, KVS_GFP | __GFP_ZERO);
}

static u32 kvs_pages(u64 bytes)
{
	return DIV_ROUND_UP_ULL(bytes, PAGE_SIZE);
}

/* What a chunk takes from the limits: its table, and the pages that are freed with it */
static u64 kvs_chunk_charge(u64 nr_entries, u64 nr_pages)
{
	return sizeof(struct kvs_chunk) + nr_entries * sizeof(void *) +
	       nr_pages * PAGE_SIZE;
}

/* Whether a chunk of so many bytes is to be one page that a view maps by one entry */
static bool kvs_chunk_is_huge(u64 bytes)
{
	return PMD_SIZE == KVSCRATCH_CHUNK_BYTES && KVS_TABLES_STAY && kvs_layout_is_large(bytes);
}

/* What a chunk of @bytes of capacity takes if memory is as it should be */
static u64 kvs_chunk_estimate(u64 bytes)
{
	return kvs_chunk_is_huge(bytes) ? kvs_chunk_charge(0, KVS_CHUNK_PAGES) :
					  kvs_chunk_charge(kvs_pages(bytes), kvs_pages(bytes));
}

/* How many tables a single page is in. Nobody else uses the word: it has no PG_private. */
static atomic_long_t *kvs_page_users(const void *address)
{
	struct page *page = virt_to_page(address);

	BUILD_BUG_ON(sizeof(page->private) != sizeof(atomic_long_t));
	return (atomic_long_t *)&page->private;
}

static struct kvs_chunk *kvs_chunk_huge(void)
{
	struct kvs_chunk *chunk = kzalloc(sizeof(*chunk), KVS_GFP);
	struct page *page;

	if (!chunk)
		return NULL;
	page = alloc_pages(KVS_GFP_HUGE | __GFP_ZERO, get_order(KVSCRATCH_CHUNK_BYTES));
	if (!page) {
		kfree(chunk);
		return NULL;
	}
	/* stale; fault handling asks it whether the file ends within the page */
	page_folio(page)->index = 0;
	refcount_set(&chunk->refs, 1);
	chunk->huge = page_address(page);
	return chunk;
}

/*
 * The last user of what is in it gives back its memory and charge. The decrements release:
 * pairs with the acquire in kvs_chunk_is_shared(), for what was counted before, and that in
 * kvs_rows_are_shared(), for whoever finds itself alone may overwrite what others have read.
 * litmus: fork-count, fork-put
 */
static void kvs_chunk_put(struct kvs_chunk *chunk)
{
	u32 freed = 0, i;

	if (!refcount_dec_and_test(&chunk->refs))
		return;
	if (chunk->huge) {
		put_page(virt_to_page(chunk->huge));
		freed = KVS_CHUNK_PAGES;
	}
	for (i = chunk->nr_base; i < chunk->nr_pages; i++) {
		if (!atomic_long_dec_and_test(kvs_page_users(chunk->pages[i])))
			continue;
		free_page((unsigned long)chunk->pages[i]);
		freed++;
	}
	/* which is huge, and has none itself */
	if (chunk->base)
		kvs_chunk_put(chunk->base);
	kvs_unreserve(kvs_chunk_charge(chunk->nr_pages, freed));
	kvfree(chunk);
}

/* A table without entries, with room for @nr_pages */
static struct kvs_chunk *kvs_chunk_table(u32 nr_pages)
{
	struct kvs_chunk *chunk = kvs_zalloc(struct_size(chunk, pages, nr_pages));

	if (chunk)
		refcount_set(&chunk->refs, 1);
	return chunk;
}

static void *kvs_chunk_page(const struct kvs_chunk *chunk, u32 i)
{
	return chunk->huge ? chunk->huge + i * PAGE_SIZE : chunk->pages[i];
}

/* The first @nr_pages of @from, on which the caller has a reference, for an empty table */
static void kvs_chunk_share(struct kvs_chunk *chunk, struct kvs_chunk *from, u32 nr_pages)
{
	u32 i;

	chunk->base = from->huge ? from : from->base;
	chunk->nr_base = from->huge ? nr_pages : min(nr_pages, from->nr_base);
	if (chunk->nr_base)
		refcount_inc(&chunk->base->refs);
	else
		chunk->base = NULL;
	for (i = 0; i < nr_pages; i++) {
		chunk->pages[i] = kvs_chunk_page(from, i);
		if (i >= chunk->nr_base)
			atomic_long_inc(kvs_page_users(chunk->pages[i]));
	}
	chunk->nr_pages = nr_pages;
	chunk->forked = true;
	WRITE_ONCE(from->forked, true);
}

/* Whether pages from @first up to @end of a chunk have other users */
static bool kvs_chunk_is_shared(const struct kvs_chunk *chunk, u32 first, u32 end)
{
	u32 i;

	if (refcount_read(&chunk->refs) > 1)
		return true;
	/*
	 * Who counted its pages for a table let go of it only then: pairs with the release of
	 * kvs_chunk_put(). litmus: fork-count
	 */
	smp_acquire__after_ctrl_dep();
	if (first < chunk->nr_base && refcount_read(&chunk->base->refs) > 1)
		return true;
	if (!READ_ONCE(chunk->forked))
		return false;
	for (i = max(first, chunk->nr_base); i < min(end, chunk->nr_pages); i++)
		if (atomic_long_read(kvs_page_users(chunk->pages[i])) > 1)
			return true;
	return false;
}

/**
 * struct kvs_supply - what a pad that is made has got so far
 * @refusals: how often order 9 refused
 * @bytes: what its chunks have taken from the limits
 */
struct kvs_supply {
	unsigned int refusals;
	u64 bytes;
};

/* New pages behind those of a table, up to @nr_pages, or NULL, and the table is gone. */
static struct kvs_chunk *kvs_chunk_fill(struct kvs_chunk *chunk, u32 nr_pages,
					struct kvs_supply *supply)
{
	u32 nr_shared = chunk->nr_pages;

	while (chunk->nr_pages < nr_pages) {
		void *page = fatal_signal_pending(current) ? NULL :
			     (void *)__get_free_page(KVS_GFP | __GFP_ZERO);

		if (!page)
			break;
		virt_to_folio(page)->index = 0;
		atomic_long_set(kvs_page_users(page), 1);
		chunk->pages[chunk->nr_pages++] = page;
	}
	supply->bytes += kvs_chunk_charge(chunk->nr_pages, chunk->nr_pages - nr_shared);
	if (chunk->nr_pages == nr_pages)
		return chunk;
	kvs_chunk_put(chunk);
	return NULL;
}

/* One for @bytes of capacity */
static struct kvs_chunk *kvs_chunk_alloc(u64 bytes, struct kvs_supply *supply)
{
	struct kvs_chunk *chunk;

	if (!kvs_leaves_enough(bytes))
		return NULL;
	if (kvs_chunk_is_huge(bytes) && supply->refusals < KVS_MAX_REFUSALS) {
		chunk = kvs_chunk_huge();
		if (chunk) {
			supply->bytes += kvs_chunk_charge(0, KVS_CHUNK_PAGES);
			return chunk;
		}
		supply->refusals++;
	}
	chunk = kvs_chunk_table(kvs_pages(bytes));
	return chunk ? kvs_chunk_fill(chunk, kvs_pages(bytes), supply) : NULL;
}

/*
 * One for @bytes of capacity, of which the first @shared are those of @from: all whole pages
 * of them are @from's, and what is left is copied.
 */
static struct kvs_chunk *kvs_chunk_fork(struct kvs_chunk *from, u32 shared, u64 bytes,
					struct kvs_supply *supply)
{
	struct kvs_chunk *chunk = NULL;
	u32 whole = shared / PAGE_SIZE;

	if (kvs_leaves_enough(bytes - shared))
		chunk = kvs_chunk_table(kvs_pages(bytes));
	if (!chunk)
		return NULL;
	kvs_chunk_share(chunk, from, whole);
	chunk = kvs_chunk_fill(chunk, kvs_pages(bytes), supply);
	if (chunk && offset_in_page(shared))
		memcpy(chunk->pages[whole], kvs_chunk_page(from, whole), offset_in_page(shared));
	return chunk;
}

/*
 * Arrays
 */

/* Capacity of a chunk */
static u64 kvs_array_chunk_bytes(const struct kvs_array *array, u64 i)
{
	return min_t(u64, array->bytes - i * KVSCRATCH_CHUNK_BYTES, KVSCRATCH_CHUNK_BYTES);
}

static void kvs_array_init(struct kvs_array *array, u64 offset, u64 max_seq_len, u32 row_bytes)
{
	array->offset = offset;
	array->row_bytes = row_bytes;
	array->bytes = max_seq_len * row_bytes;
	array->nr_chunks = DIV_ROUND_UP_ULL(array->bytes, KVSCRATCH_CHUNK_BYTES);
}

/* What its chunks take if memory is as it should be, and @shared bytes are there already */
static u64 kvs_array_estimate(const struct kvs_array *array, u64 shared)
{
	u64 first_own = DIV_ROUND_UP_ULL(shared, KVSCRATCH_CHUNK_BYTES);
	u64 bytes = 0;

	if (shared % KVSCRATCH_CHUNK_BYTES) {
		u32 nr_pages = kvs_pages(kvs_array_chunk_bytes(array, first_own - 1));

		bytes += kvs_chunk_charge(nr_pages, nr_pages -
					  shared % KVSCRATCH_CHUNK_BYTES / PAGE_SIZE);
	}
	if (first_own < array->nr_chunks)
		bytes += (array->nr_chunks - first_own - 1) *
			 kvs_chunk_estimate(KVSCRATCH_CHUNK_BYTES) +
			 kvs_chunk_estimate(kvs_array_chunk_bytes(array, array->nr_chunks - 1));
	return bytes;
}

static void kvs_array_free(struct kvs_array *array)
{
	u64 i;

	for (i = 0; array->chunks && i < array->nr_chunks && array->chunks[i]; i++) {
		kvs_chunk_put(array->chunks[i]);
		cond_resched();
	}
	kvfree(array->chunks);
}

/* Under the lock of @from's pad: all chunks with any of the first @shared bytes */
static void kvs_array_share(struct kvs_array *array, const struct kvs_array *from, u64 shared)
{
	u64 nr_chunks = DIV_ROUND_UP_ULL(shared, KVSCRATCH_CHUNK_BYTES);
	u64 i;

	for (i = 0; i < nr_chunks; i++) {
		struct kvs_chunk *chunk = from->chunks[i];

		refcount_inc(&chunk->refs);
		array->chunks[i] = chunk;
	}
}

/* In the place of a chunk that is shared to its @shared byte only one that goes on by itself */
static int kvs_array_split(struct kvs_array *array, u64 shared, struct kvs_supply *supply)
{
	u64 i = shared / KVSCRATCH_CHUNK_BYTES;
	struct kvs_chunk *chunk;

	if (!(shared % KVSCRATCH_CHUNK_BYTES))
		return 0;
	chunk = kvs_chunk_fork(array->chunks[i], shared % KVSCRATCH_CHUNK_BYTES,
			       kvs_array_chunk_bytes(array, i), supply);
	if (!chunk)
		return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
	kvs_chunk_put(array->chunks[i]);
	array->chunks[i] = chunk;
	return 0;
}

/* New chunks behind the first @shared bytes */
static int kvs_array_fill(struct kvs_array *array, u64 shared, struct kvs_supply *supply)
{
	u64 i;

	for (i = DIV_ROUND_UP_ULL(shared, KVSCRATCH_CHUNK_BYTES); i < array->nr_chunks; i++) {
		if (fatal_signal_pending(current))
			return -EINTR;
		array->chunks[i] = kvs_chunk_alloc(kvs_array_chunk_bytes(array, i), supply);
		if (!array->chunks[i])
			return fatal_signal_pending(current) ? -EINTR : -ENOMEM;
		cond_resched();
	}
	return 0;
}

/* Whether bytes from @at to @end lie in memory that has other users */
static bool kvs_array_is_shared(const struct kvs_array *array, u64 at, u64 end)
{
	while (at < end) {
		u64 begin = round_down(at, KVSCRATCH_CHUNK_BYTES);
		u64 next = min(end, begin + KVSCRATCH_CHUNK_BYTES);

		if (kvs_chunk_is_shared(array->chunks[begin / KVSCRATCH_CHUNK_BYTES],
					(at - begin) / PAGE_SIZE, kvs_pages(next - begin)))
			return true;
		at = next;
	}
	return false;
}

/**
 * kvs_array_page() - a page of an array
 * @array: the array
 * @index: which, counted from its beginning
 *
 * Return: the page, or NULL where there is none.
 */
struct page *kvs_array_page(const struct kvs_array *array, u64 index)
{
	const struct kvs_chunk *chunk;
	u32 i = index % KVS_CHUNK_PAGES;

	if (index / KVS_CHUNK_PAGES >= array->nr_chunks)
		return NULL;
	chunk = array->chunks[array_index_nospec(index / KVS_CHUNK_PAGES, array->nr_chunks)];
	if (!chunk->huge) {
		if (i >= chunk->nr_pages)
			return NULL;
		i = array_index_nospec(i, chunk->nr_pages);
	}
	return virt_to_page(kvs_chunk_page(chunk, i));
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_array_page);

/*
 * Where byte @at of an array lies, and in *@bytes how many of those that were asked for
 * follow it in one piece. These are the bounds of every copy: they are checked here, so
 * that copies go without hardened usercopy's own look at each address, as those of the
 * pmem driver do. NULL is a bug of ours.
 */
static __always_inline void *kvs_locate(const struct kvs_array *array, u64 at, size_t *bytes)
{
	u64 index = at / KVSCRATCH_CHUNK_BYTES;
	u32 offset = at % KVSCRATCH_CHUNK_BYTES;
	const struct kvs_chunk *chunk;

	if (WARN_ON_ONCE(index >= array->nr_chunks))
		return NULL;
	chunk = array->chunks[index];
	if (likely(chunk->huge)) {
		*bytes = min_t(size_t, *bytes, KVSCRATCH_CHUNK_BYTES - offset);
		return chunk->huge + offset;
	}
	if (WARN_ON_ONCE(offset >> PAGE_SHIFT >= chunk->nr_pages))
		return NULL;
	*bytes = min_t(size_t, *bytes, PAGE_SIZE - offset_in_page(offset));
	return chunk->pages[offset >> PAGE_SHIFT] + offset_in_page(offset);
}

/*
 * Pads
 */

static bool kvs_is_record(const struct kvs_plane *plane)
{
	return plane->scales.row_bytes;
}

static int kvs_compare_arrays(const void *a, const void *b)
{
	const struct kvs_array *const *left = a, *const *right = b;

	return (*left)->offset < (*right)->offset ? -1 : 1;
}

static void kvs_planes_init(struct kvs_pad *pad, const struct kvscratch_plane *planes)
{
	u32 record_offset = 0;
	u32 i;

	for (i = 0; i < pad->nr_planes; i++) {
		struct kvs_plane *plane = &pad->planes[i];

		plane->geometry = planes[i];
		plane->record_offset = record_offset;
		record_offset += planes[i].row_bytes + planes[i].scales_row_bytes;
		kvs_array_init(&plane->data, planes[i].offset, pad->max_seq_len,
			       planes[i].row_bytes);
		pad->arrays[pad->nr_arrays++] = &plane->data;
		if (!planes[i].scales_row_bytes)
			continue;
		kvs_array_init(&plane->scales, planes[i].scales_offset, pad->max_seq_len,
			       planes[i].scales_row_bytes);
		pad->arrays[pad->nr_arrays++] = &plane->scales;
	}
	sort(pad->arrays, pad->nr_arrays, sizeof(*pad->arrays), kvs_compare_arrays, NULL);
}

static bool kvs_pad_converts(const struct kvs_pad *pad)
{
	const struct kvs_plane *plane;

	kvs_for_each_plane(plane, pad)
		if (kvs_plane_converts(&plane->geometry))
			return true;
	return false;
}

/*
 * What is a pad's alone: the status page, the planes, the pointers to chunks, and a buffer
 * where a plane converts
 */
static u64 kvs_pad_fixed_charge(const struct kvs_pad *pad)
{
	u64 bytes = PAGE_SIZE + PAGE_ALIGN(pad->nr_planes * sizeof(*pad->planes)) +
		    (kvs_pad_converts(pad) ? KVS_STAGING_BYTES : 0);
	u32 i;

	for (i = 0; i < pad->nr_arrays; i++)
		bytes += pad->arrays[i]->nr_chunks * sizeof(struct kvs_chunk *);
	return bytes;
}

/* Bytes of an array that its pad was forked with */
static u64 kvs_shared_bytes(const struct kvs_pad *pad, const struct kvs_array *array)
{
	return (u64)pad->parent_rows * array->row_bytes;
}

static u64 kvs_pad_estimate(const struct kvs_pad *pad)
{
	u64 bytes = kvs_pad_fixed_charge(pad);
	u32 i;

	for (i = 0; i < pad->nr_arrays; i++)
		bytes += kvs_array_estimate(pad->arrays[i],
					    kvs_shared_bytes(pad, pad->arrays[i]));
	return bytes;
}

static void kvs_status_init(struct kvs_pad *pad)
{
	pad->status->state.word = kvs_state(0, pad->len);
	pad->status->magic = KVSCRATCH_STATUS_MAGIC;
	pad->status->version = KVSCRATCH_STATUS_VERSION;
	pad->status->max_seq_len = pad->max_seq_len;
	pad->status->nr_planes = pad->nr_planes;
	pad->status->row_bytes = pad->layout.row_bytes;
}

static void kvs_wake_pollers(struct work_struct *work)
{
	struct kvs_pollers *pollers = container_of(work, struct kvs_pollers, wake);

	/*
	 * Without a key: io_uring believes what it says, and does not look itself then. All:
	 * each handle has news of its own, and nobody keeps what another is to hear.
	 */
	wake_up_interruptible_all(&pollers->queue);
}

static void kvs_pollers_init(struct kvs_pollers *pollers)
{
	init_waitqueue_head(&pollers->queue);
	INIT_WORK(&pollers->wake, kvs_wake_pollers);
}

/* Frees also what kvs_pad_alloc() made half of. */
static void kvs_pad_free(struct kvs_pad *pad)
{
	u32 i;

	for (i = 0; i < pad->nr_arrays; i++)
		kvs_array_free(pad->arrays[i]);
	free_page((unsigned long)pad->status);
	kvfree(pad->staging);
	/* chunks give back what is theirs */
	if (pad->allocated_bytes)
		kvs_unreserve(kvs_pad_fixed_charge(pad));
	kvfree(pad->arrays);
	kvfree(pad->planes);
	kfree(pad);
}

/* A pad without memory for its rows, which has taken nothing from the limits */
static struct kvs_pad *kvs_pad_alloc(const struct kvscratch_create *create,
				     const struct kvscratch_plane *planes)
{
	struct kvs_pad *pad = kzalloc(sizeof(*pad), KVS_GFP);

	if (!pad)
		return NULL;
	pad->max_seq_len = create->max_seq_len;
	pad->nr_planes = create->nr_planes;
	pad->planes = kvs_zalloc(array_size(pad->nr_planes, sizeof(*pad->planes)));
	pad->arrays = kvs_zalloc(array_size(pad->nr_planes, 2 * sizeof(*pad->arrays)));
	pad->status = (void *)__get_free_page(KVS_GFP | __GFP_ZERO);
	if (!pad->planes || !pad->arrays || !pad->status)
		goto err_free;
	virt_to_folio(pad->status)->index = 0;
	kvs_planes_init(pad, planes);
	if (kvs_pad_converts(pad)) {
		pad->staging = kvs_zalloc(KVS_STAGING_BYTES);
		if (!pad->staging)
			goto err_free;
	}
	memcpy(pad->tag, create->tag, sizeof(pad->tag));
	refcount_set(&pad->refs, 1);
	mutex_init(&pad->lock);
	kvs_pollers_init(&pad->to_read);
	kvs_pollers_init(&pad->to_write);
	init_waitqueue_head(&pad->turn_wait);
	return pad;

err_free:
	kvs_pad_free(pad);
	return NULL;
}

/* Under the lock of the pad that is forked */
static int kvs_check_fork(const struct kvs_pad *source, u64 generation, u32 rows)
{
	if (generation != source->generation)
		return -ECANCELED;
	return rows > source->len ? -EINVAL : 0;
}

/*
 * Take over the first rows of @source. What has a reference when the lock is dropped no
 * truncate touches: the boundary may take its time.
 */
static int kvs_pad_share(struct kvs_pad *pad, struct kvs_pad *source, u64 generation,
			 struct kvs_supply *supply)
{
	u32 rows = pad->parent_rows;
	u32 i;
	int err;

	mutex_lock(&source->lock);
	err = kvs_check_fork(source, generation, rows);
	if (!err)
		source->floor = max(source->floor, rows);
	for (i = 0; !err && i < pad->nr_planes; i++) {
		struct kvs_plane *plane = &pad->planes[i], *from = &source->planes[i];

		kvs_array_share(&plane->data, &from->data, kvs_shared_bytes(pad, &plane->data));
		kvs_array_share(&plane->scales, &from->scales,
				kvs_shared_bytes(pad, &plane->scales));
	}
	mutex_unlock(&source->lock);
	for (i = 0; !err && i < pad->nr_arrays; i++) {
		u64 shared = kvs_shared_bytes(pad, pad->arrays[i]);

		err = kvs_array_split(pad->arrays[i], shared, supply);
		pad->shared_bytes += round_down(shared, PAGE_SIZE);
		cond_resched();
	}
	return err;
}

static int kvs_pad_alloc_chunks(struct kvs_pad *pad)
{
	u32 i;

	for (i = 0; i < pad->nr_arrays; i++) {
		struct kvs_array *array = pad->arrays[i];

		array->chunks = kvs_zalloc(array_size(array->nr_chunks, sizeof(*array->chunks)));
		if (!array->chunks)
			return -ENOMEM;
	}
	return 0;
}

/* Chunks that are shared with @source, if any, and new ones for the rest */
static int kvs_pad_fill(struct kvs_pad *pad, struct kvs_pad *source, u64 generation,
			struct kvs_supply *supply)
{
	int err = kvs_pad_alloc_chunks(pad);
	u32 i;

	if (!err && source)
		err = kvs_pad_share(pad, source, generation, supply);
	for (i = 0; !err && i < pad->nr_arrays; i++)
		err = kvs_array_fill(pad->arrays[i], kvs_shared_bytes(pad, pad->arrays[i]),
				     supply);
	return err;
}

/*
 * Take all memory of the rows. The limits are asked before the first chunk, for what a pad
 * takes when order 9 refuses nothing; the little that tables take more is added at the end.
 */
static int kvs_pad_populate(struct kvs_pad *pad, struct kvs_pad *source, u64 generation)
{
	const u64 max_per_pad = READ_ONCE(max_bytes_per_pad);
	const u64 max_total = READ_ONCE(max_bytes_total);
	const u64 estimate = kvs_pad_estimate(pad);
	struct kvs_supply supply = {};
	int err;

	err = kvs_reserve(estimate, max_per_pad, max_total);
	if (err)
		return err;
	err = kvs_leaves_enough(estimate) ? kvs_pad_fill(pad, source, generation, &supply) :
					    -ENOMEM;
	pad->allocated_bytes = kvs_pad_fixed_charge(pad) + supply.bytes;
	/* also after a failure: what there is gives back what it took */
	atomic64_add(pad->allocated_bytes - estimate, &kvs_reserved_bytes);
	if (!err && pad->allocated_bytes > estimate &&
	    (pad->allocated_bytes > max_per_pad || kvs_reserved() > max_total))
		err = -EDQUOT;
	return err;
}

/* Nobody else sees it yet. */
static void kvs_pad_begin(struct kvs_pad *pad)
{
	struct kvs_plane *plane;

	pad->id = atomic64_inc_return(&kvs_last_id);
	pad->len = pad->parent_rows;
	pad->floor = pad->parent_rows;
	kvs_for_each_plane(plane, pad)
		plane->touched = pad->parent_rows;
	kvs_status_init(pad);
}

/* The only place that allocates for a pad; with @source, one that is forked from it */
static struct kvs_pad *kvs_pad_make(const struct kvscratch_create *create,
				    struct kvscratch_plane *planes, struct kvs_pad *source,
				    const struct kvscratch_fork *fork)
{
	struct kvs_layout layout;
	struct kvs_pad *pad;
	int err;

	if (!create->max_seq_len || create->max_seq_len > KVSCRATCH_MAX_SEQ_LEN)
		return ERR_PTR(-EINVAL);
	if (!kvs_layout_init(&layout, planes, create->nr_planes, create->max_seq_len, PAGE_SIZE))
		return ERR_PTR(-EINVAL);
	pad = kvs_pad_alloc(create, planes);
	if (!pad)
		return ERR_PTR(-ENOMEM);
	pad->layout = layout;
	pad->parent_id = source ? source->id : 0;
	pad->parent_rows = source ? fork->rows : 0;
	err = kvs_pad_populate(pad, source, source ? fork->generation : 0);
	if (err) {
		kvs_pad_free(pad);
		return ERR_PTR(err);
	}
	kvs_pad_begin(pad);
	return pad;
}

/**
 * kvs_pad_create() - make a new, zero-filled pad
 * @create: max_seq_len, nr_planes and tag count
 * @planes: nr_planes of them, by the caller; receive their layout
 *
 * Return: the pad with one reference, or an ERR_PTR: -EINVAL, -EDQUOT, -ENOMEM,
 * -EINTR when a fatal signal ended the allocation.
 */
struct kvs_pad *kvs_pad_create(const struct kvscratch_create *create,
			       struct kvscratch_plane *planes)
{
	return kvs_pad_make(create, planes, NULL, NULL);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_create);

/**
 * kvs_pad_fork() - make a pad that shares the first rows of another one
 * @source: the other one; the caller holds a reference
 * @fork: all but size and source_fd
 *
 * Return: the pad with one reference, or an ERR_PTR: -EINVAL, -ECANCELED when the generation
 * of @source is another one, -EDQUOT, -ENOMEM, -EINTR after a fatal signal.
 */
struct kvs_pad *kvs_pad_fork(struct kvs_pad *source, const struct kvscratch_fork *fork)
{
	struct kvscratch_create create = {
		.max_seq_len = fork->max_seq_len,
		.nr_planes = source->nr_planes,
	};
	struct kvscratch_plane *planes;
	struct kvs_pad *pad;
	u32 i;
	int err;

	if (fork->flags || fork->reserved || !fork->max_seq_len ||
	    fork->max_seq_len > KVSCRATCH_MAX_SEQ_LEN || fork->rows > fork->max_seq_len)
		return ERR_PTR(-EINVAL);
	/* and once more when it counts: what can be told is told before memory is asked for */
	mutex_lock(&source->lock);
	err = kvs_check_fork(source, fork->generation, fork->rows);
	mutex_unlock(&source->lock);
	if (err)
		return ERR_PTR(err);
	planes = kvs_zalloc(array_size(source->nr_planes, sizeof(*planes)));
	if (!planes)
		return ERR_PTR(-ENOMEM);
	for (i = 0; i < source->nr_planes; i++)
		planes[i] = source->planes[i].geometry;
	memcpy(create.tag, source->tag, sizeof(create.tag));
	pad = kvs_pad_make(&create, planes, source, fork);
	kvfree(planes);
	return pad;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_fork);

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
	/* nobody is left to queue them anew */
	cancel_work_sync(&pad->to_read.wake);
	cancel_work_sync(&pad->to_write.wake);
	iput(pad->inode);
	mutex_destroy(&pad->lock);
	kvs_pad_free(pad);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_put);

/* The last array that begins at @offset or before; there is one at 0. */
static const struct kvs_array *kvs_find_array(const struct kvs_pad *pad, u64 offset)
{
	u32 low = 0, high = pad->nr_arrays;

	while (high - low > 1) {
		u32 middle = low + (high - low) / 2;

		if (pad->arrays[middle]->offset <= offset)
			low = middle;
		else
			high = middle;
	}
	return pad->arrays[low];
}

/**
 * kvs_pad_page() - a page of the mapping
 * @pad: the pad
 * @index: which, counted from the beginning of the mapping
 * @is_piece: receives whether it is of a compound page that is not mapped whole there
 *
 * Return: the page, or NULL where there is a hole.
 */
struct page *kvs_pad_page(const struct kvs_pad *pad, u64 index, bool *is_piece)
{
	const struct kvs_array *array;
	struct page *page;

	*is_piece = false;
	if (index == pad->layout.status_offset >> PAGE_SHIFT)
		return virt_to_page(pad->status);
	array = kvs_find_array(pad, index << PAGE_SHIFT);
	index -= array->offset >> PAGE_SHIFT;
	page = kvs_array_page(array, index);
	if (page && PageCompound(page))
		*is_piece = !array->chunks[index / KVS_CHUNK_PAGES]->huge;
	return page;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_page);

/*
 * Changing a pad: the lock, the role of the writer, and turns
 */

/**
 * struct kvs_op - an operation that changes a pad and may have to drop its lock
 * @handle: by which it came
 * @iter: where its rows come from, or NULL
 * @user: else; what write() and STAGE have takes a tenth of a small append less
 * @budget: what it may still copy before it drops the lock
 * @saturated: elements that it clamped
 * @rounds: how often in succession a page was faulted in and nothing could be copied
 */
struct kvs_op {
	struct kvs_handle *handle;
	struct iov_iter *iter;
	const void __user *user;
	long budget;
	u64 saturated;
	unsigned int rounds;
};

static struct kvs_op kvs_op_of(struct kvs_handle *handle)
{
	return (struct kvs_op) { .handle = handle, .budget = KVS_HOLD_BYTES };
}

static __always_inline void kvs_wake(struct kvs_pollers *pollers)
{
	/* the barrier in wq_has_sleeper() pairs with smp_mb() in kvs_poll(); litmus: poll-wake */
	if (wq_has_sleeper(&pollers->queue))
		queue_work(kvs_wakers, &pollers->wake);
}

/* What forbids @handle to change the pad, apart from turns */
static int kvs_check_role(const struct kvs_pad *pad, const struct kvs_handle *handle,
			  bool only_writer)
{
	if (pad->sealed)
		return -EROFS;
	if (handle->writer)
		return pad->writer == handle ? 0 : -ESTALE;
	if (only_writer)
		return -ENOLCK;
	return pad->writer ? -EBUSY : 0;
}

/* Drop the lock until nobody has a turn, and take it again; on failure it is not taken. */
static noinline int kvs_await_turn(struct kvs_pad *pad, bool nowait)
{
	u32 epoch = pad->epoch;

	mutex_unlock(&pad->lock);
	if (nowait)
		return -EAGAIN;
	/* who lost the role meanwhile does not wait for the turn of another */
	if (wait_event_interruptible(pad->turn_wait, !READ_ONCE(pad->turn) ||
				     READ_ONCE(pad->epoch) != epoch))
		return -ERESTARTSYS;
	mutex_lock(&pad->lock);
	return 0;
}

/*
 * Take the lock to change the pad, when nobody has a turn. On failure it is not taken: an
 * errno of kvs_check_role(), -EAGAIN with @nowait, -ERESTARTSYS.
 */
static int kvs_begin(struct kvs_handle *handle, bool only_writer, bool nowait)
{
	struct kvs_pad *pad = handle->pad;
	int err;

	mutex_lock(&pad->lock);
	for (;;) {
		err = kvs_check_role(pad, handle, only_writer);
		if (unlikely(err)) {
			mutex_unlock(&pad->lock);
			return err;
		}
		if (likely(!pad->turn))
			return 0;
		err = kvs_await_turn(pad, nowait);
		if (err)
			return err;
	}
}

/*
 * Drop the lock in the middle of an operation and take it again, after @missing bytes of
 * its source were faulted in. On failure the operation is over, and if it lost its turn it
 * touches nothing any more.
 */
static noinline int kvs_pause(struct kvs_pad *pad, struct kvs_op *op, size_t missing)
{
	size_t absent = 0;

	WRITE_ONCE(pad->turn, op);
	mutex_unlock(&pad->lock);
	if (missing)
		absent = op->iter ? fault_in_iov_iter_readable(op->iter, missing) :
				    fault_in_readable(op->user, missing);
	cond_resched();
	mutex_lock(&pad->lock);
	op->budget = KVS_HOLD_BYTES;
	if (pad->turn != op)
		return op->handle->writer ? -ESTALE : -EBUSY;
	if (fatal_signal_pending(current))
		return -EINTR;
	return missing && (absent == missing || ++op->rounds >= KVS_MAX_ROUNDS) ? -EFAULT : 0;
}

/* For everybody who was held up by a turn */
static noinline void kvs_turn_ended(struct kvs_pad *pad)
{
	wake_up_interruptible(&pad->turn_wait);
	kvs_wake(&pad->to_write);
}

/* Drop the lock for good; @changed: who polls to read has something to see */
static __always_inline void kvs_end(struct kvs_pad *pad, const struct kvs_op *op, bool changed)
{
	bool had_turn = pad->turn == op;

	if (unlikely(had_turn))
		WRITE_ONCE(pad->turn, NULL);
	mutex_unlock(&pad->lock);
	if (changed)
		kvs_wake(&pad->to_read);
	if (unlikely(had_turn))
		kvs_turn_ended(pad);
}

/* The one place that changes what readers see. */
static __always_inline void kvs_publish(struct kvs_pad *pad, u64 generation, u32 len)
{
	lockdep_assert_held(&pad->lock);

	pad->generation = generation;
	pad->len = len;
	/* (B) in "Memory ordering", pairs with (A); litmus: AB-append, AB-commit */
	smp_store_release(&pad->status->state.word, kvs_state(generation, len));
}

/* After the final state: who sees the pad sealed sees that. */
static void kvs_publish_role(struct kvs_pad *pad)
{
	u32 flags = (pad->sealed ? KVSCRATCH_PAD_SEALED : 0) |
		    (pad->writer ? KVSCRATCH_PAD_WRITER : 0);

	lockdep_assert_held(&pad->lock);

	/* pairs with the acquire of who reads it, kvs_pad_info() among them; litmus: role-seal */
	smp_store_release(&pad->status->writer.word, (u64)pad->epoch << 32 | flags);
}

static void kvs_drop_staged(struct kvs_pad *pad)
{
	struct kvs_plane *plane;
	u32 len = pad->len;

	kvs_for_each_plane(plane, pad)
		plane->staged = len;
}

/*
 * Storing rows, under the lock
 */

/*
 * Copy up to @bytes, all of them unless the lock was dropped in between. Returns how many,
 * or what kvs_pause() says.
 */
static __always_inline ssize_t kvs_copy_in(struct kvs_pad *pad, struct kvs_op *op, void *to,
					   size_t bytes)
{
	size_t piece = likely((long)bytes <= op->budget) ? bytes : max(op->budget, 0L);
	size_t copied;
	int err;

	pagefault_disable();
	if (op->iter) {
		copied = _copy_from_iter(to, piece, op->iter);
	} else {
		copied = piece - kvs_copy_from_user(to, op->user, piece);
		op->user += copied;
	}
	pagefault_enable();
	op->budget -= copied + KVS_COPY_COST;
	if (copied)
		op->rounds = 0;
	if (likely(copied == bytes))
		return copied;
	err = kvs_pause(pad, op, piece - copied);
	return err ? err : copied;
}

static __always_inline int kvs_store_bytes(struct kvs_pad *pad, struct kvs_op *op,
					   const struct kvs_array *array, u64 at, size_t bytes)
{
	while (bytes) {
		size_t piece = bytes;
		void *to = kvs_locate(array, at, &piece);
		ssize_t copied;

		if (!to)
			return -EFAULT;
		copied = kvs_copy_in(pad, op, to, piece);
		if (copied < 0)
			return copied;
		at += copied;
		bytes -= copied;
	}
	return 0;
}

/*
 * Convert @count elements of the staging buffer to what begins with element
 * @first of the plane. Returns how many were clamped, or -EDOM.
 *
 * Pages and chunks end with a whole element and a whole block.
 */
static long kvs_convert(struct kvs_pad *pad, const struct kvs_plane *plane, u64 first,
			size_t count)
{
	const struct kvscratch_plane *geometry = &plane->geometry;
	u32 input_size = kvs_dtype_bytes(geometry->input_dtype);
	u32 size = kvs_dtype_bytes(geometry->dtype);
	const void *from = pad->staging;
	long saturated = 0;

	while (count) {
		size_t bytes = count * size, blocks = 0, piece;
		void *to = kvs_locate(&plane->data, first * size, &bytes);
		void *scales = NULL;
		long clamped;

		piece = bytes / size;
		if (plane->scales.row_bytes) {
			blocks = piece / KVSCRATCH_MX_BLOCK;
			scales = kvs_locate(&plane->scales, first / KVSCRATCH_MX_BLOCK, &blocks);
			piece = blocks * KVSCRATCH_MX_BLOCK;
		}
		if (!to || (blocks && !scales))
			return -EFAULT;
		if (scales)
			clamped = kvs_scale_mxint8(geometry->input_dtype, from, blocks, to,
						   scales);
		else
			clamped = kvs_scale_fixed(geometry->input_dtype, from, piece,
						  geometry->frac_bits, size, to);
		if (clamped == KVS_SCALE_NOT_FINITE)
			return -EDOM;
		saturated += clamped;
		from += piece * input_size;
		first += piece;
		count -= piece;
	}
	return saturated;
}

/*
 * Rows that are converted. Rows follow each other without a gap, and so do the blocks of
 * MXINT8: pieces need not end with a row.
 */
static noinline int kvs_store_converted(struct kvs_pad *pad, struct kvs_op *op,
					const struct kvs_plane *plane, u64 row, u64 rows)
{
	u32 size = kvs_dtype_bytes(plane->geometry.input_dtype);
	u64 at = row * plane->geometry.dim;
	u64 end = at + rows * plane->geometry.dim;

	while (at < end) {
		size_t count = min_t(u64, end - at, KVS_STAGING_BYTES / size);
		size_t filled = 0;
		long clamped;

		while (filled < count * size) {
			ssize_t copied = kvs_copy_in(pad, op, pad->staging + filled,
						     count * size - filled);

			if (copied < 0)
				return copied;
			filled += copied;
		}
		clamped = kvs_convert(pad, plane, at, count);
		if (clamped < 0)
			return clamped;
		op->saturated += clamped;
		at += count;
	}
	return 0;
}

/* Rows with scales that are stored as they come: the elements of a row, its scales */
static noinline int kvs_store_records(struct kvs_pad *pad, struct kvs_op *op,
				      const struct kvs_plane *plane, u64 row, u64 rows)
{
	u64 end = row + rows;

	for (; row < end; row++) {
		int err = kvs_store_bytes(pad, op, &plane->data, row * plane->data.row_bytes,
					  plane->data.row_bytes);

		if (!err)
			err = kvs_store_bytes(pad, op, &plane->scales,
					      row * plane->scales.row_bytes,
					      plane->scales.row_bytes);
		if (err)
			return err;
	}
	return 0;
}

static __always_inline int kvs_store_rows(struct kvs_pad *pad, struct kvs_op *op,
					  const struct kvs_plane *plane, u64 row, u64 rows)
{
	if (kvs_plane_converts(&plane->geometry))
		return kvs_store_converted(pad, op, plane, row, rows);
	if (kvs_is_record(plane))
		return kvs_store_records(pad, op, plane, row, rows);
	return kvs_store_bytes(pad, op, &plane->data, row * plane->data.row_bytes,
			       rows * plane->data.row_bytes);
}

/* A row of each plane in turn */
static noinline int kvs_store_tokens(struct kvs_pad *pad, struct kvs_op *op, u64 row, u64 rows)
{
	u64 end = row + rows;

	for (; row < end; row++) {
		struct kvs_plane *plane;

		kvs_for_each_plane(plane, pad) {
			int err = kvs_store_rows(pad, op, plane, row, 1);

			if (err)
				return err;
		}
	}
	return 0;
}

/*
 * Appending
 */

/*
 * Whatever becomes of the copy: rows from len to @end are touched, and neither staged nor
 * whole now. Nobody asks for the latter without a writer, see kvs_start_epoch().
 */
static void kvs_begin_rows(struct kvs_pad *pad, u32 end)
{
	struct kvs_plane *plane;
	u32 len = pad->len;

	pad->touched = max(pad->touched, end);
	if (likely(!pad->writer))
		return;
	kvs_for_each_plane(plane, pad) {
		plane->staged = len;
		plane->whole = min(plane->whole, len);
	}
}

static void kvs_count_saturated(struct kvs_pad *pad, const struct kvs_op *op)
{
	if (unlikely(op->saturated))
		WRITE_ONCE(pad->saturated, pad->saturated + op->saturated);
}

/* Rows up to @end are whole, and those that are not committed are staged. */
static void kvs_end_rows(struct kvs_pad *pad, u32 end)
{
	struct kvs_plane *plane;

	kvs_for_each_plane(plane, pad) {
		plane->staged = end;
		plane->whole = end;
	}
}

static __always_inline int kvs_append_locked(struct kvs_pad *pad, struct kvs_op *op, u32 rows)
{
	u32 len = pad->len;
	int err;

	lockdep_assert_held(&pad->lock);

	if (rows > pad->max_seq_len - len)
		return -ENOSPC;
	kvs_begin_rows(pad, len + rows);
	if (likely(pad->nr_planes == 1))
		err = kvs_store_rows(pad, op, &pad->planes[0], len, rows);
	else
		err = kvs_store_tokens(pad, op, len, rows);
	if (unlikely(err))
		return err;
	if (unlikely(pad->writer))
		kvs_end_rows(pad, len + rows);
	kvs_count_saturated(pad, op);
	kvs_publish(pad, pad->generation, len + rows);
	return 0;
}

/* Append @bytes of the source of @op. */
static __always_inline ssize_t kvs_append(struct kvs_op *op, size_t bytes, bool nowait)
{
	struct kvs_pad *pad = op->handle->pad;
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
	err = kvs_begin(op->handle, false, nowait);
	if (err)
		return err;
	err = kvs_append_locked(pad, op, rows);
	kvs_end(pad, op, !err);
	return err ? err : bytes;
}

/**
 * kvs_pad_append() - append whole tokens, all or none
 * @handle: on the pad
 * @from: the tokens; consumed on success, untouched on failure
 * @nowait: do not wait for other operations
 *
 * Return: bytes appended, or -EINVAL when @from is not a whole number of tokens or
 * may have been cut by the VFS, an errno of kvs_begin(), -ENOSPC, -EFAULT, -EDOM for
 * what cannot be converted, -EINTR after a fatal signal, -ESTALE and -EBUSY after a
 * takeover.
 */
ssize_t kvs_pad_append(struct kvs_handle *handle, struct iov_iter *from, bool nowait)
{
	struct kvs_op op = kvs_op_of(handle);
	size_t bytes = iov_iter_count(from);
	ssize_t appended;

	op.iter = from;
	appended = kvs_append(&op, bytes, nowait);
	if (appended < 0)
		iov_iter_revert(from, bytes - iov_iter_count(from));
	return appended;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_append);

/*
 * Staging and committing
 */

/* A failure leaves the plane staged, and known to be whole, up to where it began. */
static int kvs_stage_copy(struct kvs_pad *pad, struct kvs_op *op, struct kvs_plane *plane,
			  u32 row, u32 end)
{
	u32 staged = max(plane->staged, end);
	u32 whole = max(plane->whole, end);
	int err;

	plane->staged = row;
	plane->whole = row;
	plane->touched = max(plane->touched, end);
	err = kvs_store_rows(pad, op, plane, row, end - row);
	if (err)
		return err;
	plane->staged = staged;
	plane->whole = whole;
	kvs_count_saturated(pad, op);
	return 0;
}

static int kvs_stage_locked(struct kvs_pad *pad, struct kvs_op *op,
			    const struct kvscratch_stage *stage)
{
	struct kvs_plane *plane = &pad->planes[array_index_nospec(stage->plane, pad->nr_planes)];
	u64 row = stage->row, rows = stage->rows;

	if (row < pad->len || row > plane->staged)
		return -EINVAL;
	row = array_index_nospec(row, pad->max_seq_len + 1);
	if (stage->flags & KVSCRATCH_STAGE_KEEP) {
		/* what is staged is whole */
		if (rows > plane->whole - row)
			return -EINVAL;
		plane->staged = max_t(u32, plane->staged, row + rows);
		return 0;
	}
	if (rows > pad->max_seq_len - row)
		return -ENOSPC;
	return kvs_stage_copy(pad, op, plane, row, row + rows);
}

/**
 * kvs_pad_stage() - put rows of one plane in their place
 * @handle: the writer
 * @stage: all but size
 * @from: the rows, or NULL for those at the address that @stage says
 * @nowait: do not wait for other operations
 *
 * Return: 0, -EINVAL, an errno of kvs_begin(), -ENOSPC, -EFAULT, -EDOM, -EINTR, -ESTALE.
 */
int kvs_pad_stage(struct kvs_handle *handle, const struct kvscratch_stage *stage,
		  struct iov_iter *from, bool nowait)
{
	struct kvs_op op = kvs_op_of(handle);
	struct kvs_pad *pad = handle->pad;
	int err;

	if (stage->flags & ~KVSCRATCH_STAGE_KEEP || stage->reserved ||
	    stage->plane >= pad->nr_planes ||
	    (stage->flags & KVSCRATCH_STAGE_KEEP && stage->addr))
		return -EINVAL;
	op.iter = from;
	op.user = u64_to_user_ptr(stage->addr);
	err = kvs_begin(handle, true, nowait);
	if (err)
		return err;
	err = kvs_stage_locked(pad, &op, stage);
	kvs_end(pad, &op, false);
	return err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_stage);

/* Commit @len rows and drop what was staged beyond. */
static int kvs_commit_locked(struct kvs_pad *pad, u64 len)
{
	const struct kvs_plane *plane;
	u64 least = U32_MAX, most = 0;

	kvs_for_each_plane(plane, pad) {
		least = min_t(u64, least, plane->staged);
		most = max_t(u64, most, plane->staged);
	}
	if (len < pad->len || len > least)
		return -EINVAL;
	if (len != pad->len)
		kvs_publish(pad, pad->generation, len);
	if (most > len)
		kvs_drop_staged(pad);
	return 0;
}

/**
 * kvs_pad_commit() - commit staged rows of all planes
 * @handle: the writer
 * @len: the new len
 * @nowait: do not wait for other operations
 *
 * Return: 0, -EINVAL when @len is below the present one or not staged, an errno of
 * kvs_begin().
 */
int kvs_pad_commit(struct kvs_handle *handle, u64 len, bool nowait)
{
	struct kvs_op op = kvs_op_of(handle);
	struct kvs_pad *pad = handle->pad;
	u32 before;
	int err;

	err = kvs_begin(handle, true, nowait);
	if (err)
		return err;
	before = pad->len;
	err = kvs_commit_locked(pad, len);
	kvs_end(pad, &op, pad->len != before);
	return err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_commit);

/*
 * Truncating and sealing
 */

static void kvs_publish_truncate(struct kvs_pad *pad, u32 len)
{
	u64 generation = pad->generation + 1;
	struct kvs_trunc *trunc = &pad->truncs[generation % KVS_TRUNCS];

	/* all of it before the state of the same generation, which releases it; litmus: AB-trunc */
	WRITE_ONCE(trunc->generation, generation);
	/*
	 * pairs with smp_rmb() in kvs_trunc_len(): a len is never taken for an older one
	 * litmus: slot-reuse
	 */
	smp_wmb();
	WRITE_ONCE(trunc->len, len);
	WRITE_ONCE(pad->status->generation, generation);
	WRITE_ONCE(pad->status->trunc.word, kvs_state(generation, len));
	kvs_publish(pad, generation, len);
	/*
	 * (D) in "Memory ordering", pairs with (C)
	 * litmus: CD-scrub, CD-overwrite, CD-two-truncates, moment-slots
	 */
	smp_mb();
}

static int kvs_scrub_array(struct kvs_pad *pad, struct kvs_op *op, const struct kvs_array *array,
			   u32 row, u32 end_row)
{
	u64 at = (u64)row * array->row_bytes;
	u64 end = (u64)end_row * array->row_bytes;

	while (at < end) {
		size_t piece = min_t(u64, end - at, KVS_HOLD_BYTES);
		void *to = kvs_locate(array, at, &piece);
		int err;

		if (!to)
			return -EFAULT;
		memset(to, 0, piece);
		at += piece;
		op->budget -= piece;
		err = op->budget > 0 ? 0 : kvs_pause(pad, op, 0);
		if (err)
			return err;
	}
	return 0;
}

/*
 * Zero what was ever touched beyond len. Until that is done it is owed: what is left stays
 * recorded in the planes.
 */
static int kvs_scrub(struct kvs_pad *pad, struct kvs_op *op)
{
	struct kvs_plane *plane;
	u32 len = pad->len;

	pad->scrub_owed = true;
	/* of all planes before the first changes: a scrub may end in the middle */
	kvs_for_each_plane(plane, pad) {
		plane->whole = min(plane->whole, len);
		plane->touched = max(plane->touched, pad->touched);
	}
	pad->touched = 0;
	kvs_for_each_plane(plane, pad) {
		int err;

		err = kvs_scrub_array(pad, op, &plane->data, len, plane->touched);
		if (!err)
			err = kvs_scrub_array(pad, op, &plane->scales, len, plane->touched);
		if (err)
			return err;
		plane->touched = min(plane->touched, len);
	}
	/* what is to be forgotten passed through here */
	if (pad->staging)
		memset(pad->staging, 0, KVS_STAGING_BYTES);
	pad->scrub_owed = false;
	return 0;
}

/* Whether other pads use memory of rows from @row to @end */
static bool kvs_rows_are_shared(const struct kvs_pad *pad, u64 row, u64 end)
{
	u32 i;

	row = array_index_nospec(row, pad->max_seq_len);
	for (i = 0; i < pad->nr_arrays; i++) {
		const struct kvs_array *array = pad->arrays[i];

		if (kvs_array_is_shared(array, row * array->row_bytes, end * array->row_bytes))
			return true;
	}
	/*
	 * What former users read of it they read before it is overwritten: pairs with the last
	 * release of kvs_chunk_put(). litmus: fork-put
	 */
	smp_acquire__after_ctrl_dep();
	return false;
}

static int kvs_check_truncate(const struct kvs_pad *pad,
			      const struct kvscratch_truncate *truncate)
{
	if (truncate->flags & KVSCRATCH_TRUNCATE_EXPECT &&
	    (truncate->expected_generation != pad->generation ||
	     truncate->expected_len != pad->len))
		return -ECANCELED;
	if (truncate->len > pad->len)
		return -EINVAL;
	return truncate->len < pad->floor &&
	       kvs_rows_are_shared(pad, truncate->len, pad->floor) ? -ETXTBSY : 0;
}

/**
 * kvs_pad_truncate() - drop rows and start a new generation
 * @handle: on the pad
 * @truncate: flags and what belongs to them, and len
 * @nowait: do not wait for other operations
 *
 * Return: 0, an errno of kvs_begin(), -ECANCELED, -EINVAL when there are fewer rows,
 * -ETXTBSY when a fork shares some of them; the rows are dropped, and the scrub is owed,
 * when it is -EINTR, -ESTALE or -EBUSY of kvs_pause().
 */
int kvs_pad_truncate(struct kvs_handle *handle, const struct kvscratch_truncate *truncate,
		     bool nowait)
{
	struct kvs_op op = kvs_op_of(handle);
	struct kvs_pad *pad = handle->pad;
	bool changed;
	int err;

	err = kvs_begin(handle, false, nowait);
	if (err)
		return err;
	err = kvs_check_truncate(pad, truncate);
	changed = !err;
	if (changed) {
		pad->floor = min_t(u32, pad->floor, truncate->len);
		kvs_publish_truncate(pad, truncate->len);
		kvs_drop_staged(pad);
		if (truncate->flags & KVSCRATCH_TRUNCATE_ZERO)
			err = kvs_scrub(pad, &op);
	}
	kvs_end(pad, &op, changed);
	return err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_truncate);

/**
 * kvs_pad_seal() - make len final
 * @handle: on the pad
 * @nowait: do not wait for other operations
 *
 * Return: 0, also when it was sealed, -ESTALE, -EBUSY, -EAGAIN, -ERESTARTSYS, -EINTR when
 * a scrub that was owed is still not done.
 */
int kvs_pad_seal(struct kvs_handle *handle, bool nowait)
{
	struct kvs_op op = kvs_op_of(handle);
	struct kvs_pad *pad = handle->pad;
	int err;

	err = kvs_begin(handle, false, nowait);
	if (err)
		return err == -EROFS ? 0 : err;
	kvs_drop_staged(pad);
	if (pad->scrub_owed)
		err = kvs_scrub(pad, &op);
	if (!err) {
		WRITE_ONCE(pad->sealed, true);
		kvs_publish_role(pad);
	}
	kvs_end(pad, &op, !err);
	if (!err)
		kvs_wake(&pad->to_write);
	return err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_seal);

/*
 * The role of the writer
 */

static void kvs_start_epoch(struct kvs_pad *pad, struct kvs_handle *handle)
{
	kvs_end_rows(pad, pad->len);
	handle->writer = true;
	WRITE_ONCE(pad->epoch, pad->epoch + 1);
	WRITE_ONCE(pad->writer, handle);
	kvs_publish_role(pad);
}

/**
 * kvs_pad_take_role() - make a handle the pad's only writer
 * @handle: one that user space does not have yet
 * @takeover: also when there is a writer, and without waiting for any operation
 * @nowait: do not wait for other operations
 *
 * Return: 0, -EROFS, and without @takeover -EBUSY, -EAGAIN, -ERESTARTSYS.
 */
int kvs_pad_take_role(struct kvs_handle *handle, bool takeover, bool nowait)
{
	struct kvs_pad *pad = handle->pad;
	bool revoked;

	if (takeover) {
		mutex_lock(&pad->lock);
		if (pad->sealed) {
			mutex_unlock(&pad->lock);
			return -EROFS;
		}
	} else {
		int err = kvs_begin(handle, false, nowait);

		if (err)
			return err;
	}
	revoked = pad->turn;
	WRITE_ONCE(pad->turn, NULL);
	kvs_start_epoch(pad, handle);
	mutex_unlock(&pad->lock);
	if (revoked)
		wake_up_interruptible(&pad->turn_wait);
	kvs_wake(&pad->to_write);
	return 0;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_take_role);

/**
 * kvs_pad_end_role() - a handle that goes is the writer no more
 * @handle: any
 */
void kvs_pad_end_role(struct kvs_handle *handle)
{
	struct kvs_pad *pad = handle->pad;
	bool ended;

	if (!handle->writer)
		return;
	mutex_lock(&pad->lock);
	ended = pad->writer == handle;
	if (ended) {
		WRITE_ONCE(pad->writer, NULL);
		kvs_drop_staged(pad);
		kvs_publish_role(pad);
	}
	mutex_unlock(&pad->lock);
	if (ended)
		kvs_wake(&pad->to_write);
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_end_role);

/*
 * Reading, without a lock
 */

/* The page is memory that others see: its len counts clamped. */
static u64 kvs_load_state(const struct kvs_pad *pad)
{
	/* (A) in "Memory ordering", pairs with (B); litmus: AB-append, AB-commit, AB-trunc */
	u64 state = smp_load_acquire(&pad->status->state.word);

	if (unlikely(kvs_state_len(state) > pad->max_seq_len))
		state = kvs_state(kvs_state_generation(state), pad->max_seq_len);
	return state;
}

/* The rows that the truncate to a generation kept, or 0 where it is no longer known */
static u32 kvs_trunc_len(const struct kvs_pad *pad, u64 generation)
{
	const struct kvs_trunc *trunc = &pad->truncs[generation % KVS_TRUNCS];
	u32 len = READ_ONCE(trunc->len);

	/* pairs with smp_wmb() in kvs_publish_truncate(); litmus: slot-reuse */
	smp_rmb();
	return READ_ONCE(trunc->generation) == generation ? len : 0;
}

/* Generation, in full, len and what the truncate kept, of one moment */
static struct kvs_moment kvs_moment(const struct kvs_pad *pad)
{
	const struct kvs_trunc *trunc;
	struct kvs_moment moment;
	u32 generation;
	u64 state;

	do {
		state = kvs_load_state(pad);
		generation = kvs_state_generation(state);
		trunc = &pad->truncs[generation % KVS_TRUNCS];
		moment.len = kvs_state_len(state);
		moment.generation = READ_ONCE(trunc->generation);
		moment.trunc_len = READ_ONCE(trunc->len);
		/*
		 * Pairs with (D): who sees the slot overwritten, by a generation that comes
		 * KVS_TRUNCS later, sees the state of the one before that.
		 * litmus: moment-slots
		 */
		smp_rmb();
	} while (kvs_state_generation(kvs_load_state(pad)) != generation);
	return moment;
}

/*
 * Whether rows below @end, as they were read since *@moment, are what was committed; *@moment
 * becomes the present one then.
 */
static bool kvs_rows_survived(const struct kvs_pad *pad, struct kvs_moment *moment, u64 end)
{
	struct kvs_moment now;
	u64 generation;

	/* (C) in "Memory ordering", pairs with (D); litmus: CD-overwrite, CD-two-truncates */
	smp_rmb();
	now = kvs_moment(pad);
	if (unlikely(now.generation - moment->generation >= KVS_TRUNCS))
		return false;
	for (generation = moment->generation + 1; generation <= now.generation; generation++)
		if (kvs_trunc_len(pad, generation) < end)
			return false;
	*moment = now;
	return true;
}

/* The plane of which byte @at of a token is */
static const struct kvs_plane *kvs_find_plane(const struct kvs_pad *pad, u32 at)
{
	u32 low = 0, high = pad->nr_planes;

	while (high - low > 1) {
		u32 middle = low + (high - low) / 2;

		if (pad->planes[middle].record_offset <= at)
			low = middle;
		else
			high = middle;
	}
	return &pad->planes[low];
}

/* Where byte @pos of the stream of tokens lies; *@bytes as for kvs_locate() */
static const void *kvs_locate_stream(const struct kvs_pad *pad, u64 pos, size_t *bytes)
{
	u64 row = array_index_nospec(pos / pad->layout.row_bytes, pad->max_seq_len);
	u32 at = pos % pad->layout.row_bytes;
	const struct kvs_plane *plane = kvs_find_plane(pad, at);
	const struct kvs_array *array = &plane->data;

	at -= plane->record_offset;
	if (at >= array->row_bytes) {
		at -= array->row_bytes;
		array = &plane->scales;
	}
	/* one array is the stream itself */
	if (pad->nr_arrays > 1)
		*bytes = min_t(size_t, *bytes, array->row_bytes - at);
	return kvs_locate(array, row * array->row_bytes + at, bytes);
}

static size_t kvs_copy_out(const void *from, size_t bytes, struct iov_iter *to)
{
	size_t copied;

	if (!from)
		return 0;
	pagefault_disable();
	/* a truncate and an append may overwrite it meanwhile */
	copied = data_race(_copy_to_iter(from, bytes, to));
	pagefault_enable();
	return copied;
}

/**
 * kvs_pad_read() - read committed tokens as a byte stream
 * @pad: the pad
 * @pos: where to begin, in bytes
 * @to: receives the bytes
 *
 * Takes no lock. A page at a time is copied out of reach of page faults, and counts if its
 * rows are still the committed ones then. With a row that is not, the read ends; where it is
 * the first one, it is read again from where this call began: no row is handed out torn, and
 * none beside rows that it did not follow.
 *
 * Return: bytes read, 0 at or beyond the last row, -EFAULT, or, when nothing was read,
 * -ERESTARTSYS.
 */
ssize_t kvs_pad_read(struct kvs_pad *pad, u64 pos, struct iov_iter *to)
{
	const u64 row_bytes = pad->layout.row_bytes, begin = pos;
	struct kvs_moment moment = kvs_moment(pad);
	unsigned int rounds = 0;
	u64 row_begin = pos;
	int err = 0;

	while (!err && iov_iter_count(to) && pos < moment.len * row_bytes) {
		size_t bytes = min3(moment.len * row_bytes - pos, (u64)iov_iter_count(to),
				    (u64)KVS_READ_BYTES);
		const void *from = kvs_locate_stream(pad, pos, &bytes);
		size_t copied = kvs_copy_out(from, bytes, to);

		pos += copied;
		if (likely(kvs_rows_survived(pad, &moment, DIV_ROUND_UP_ULL(pos, row_bytes)))) {
			row_begin = max(row_begin, pos / row_bytes * row_bytes);
			err = fatal_signal_pending(current) ? -ERESTARTSYS : 0;
		} else {
			iov_iter_revert(to, pos - row_begin);
			pos = row_begin;
			/* what is there now need not follow what was read */
			if (pos > begin)
				break;
			moment = kvs_moment(pad);
			err = signal_pending(current) ? -ERESTARTSYS : 0;
		}
		rounds = copied ? 0 : rounds + 1;
		if (copied < bytes &&
		    (fault_in_iov_iter_writeable(to, bytes - copied) == bytes - copied ||
		     rounds > KVS_MAX_ROUNDS))
			err = -EFAULT;
		cond_resched();
	}
	return pos > begin ? pos - begin : err;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_read);

/*
 * Describing
 */

/**
 * kvs_pad_info() - describe a pad
 * @pad: the pad
 * @info: receives it; @info->size is left to the caller
 */
void kvs_pad_info(struct kvs_pad *pad, struct kvscratch_pad_info *info)
{
	/* pairs with kvs_publish_role(): sealed, it has its final state below; litmus: role-seal */
	u64 role = smp_load_acquire(&pad->status->writer.word);
	struct kvs_moment moment = kvs_moment(pad);

	info->flags = lower_32_bits(role);
	info->epoch = upper_32_bits(role);
	info->id = pad->id;
	info->max_seq_len = pad->max_seq_len;
	info->len = moment.len;
	info->generation = moment.generation;
	info->trunc_len = moment.trunc_len;
	info->mapping_bytes = pad->layout.status_offset + PAGE_SIZE;
	info->status_offset = pad->layout.status_offset;
	info->allocated_bytes = pad->allocated_bytes;
	info->shared_bytes = pad->shared_bytes;
	info->parent_id = pad->parent_id;
	info->parent_rows = pad->parent_rows;
	info->saturated = READ_ONCE(pad->saturated);
	info->nr_planes = pad->nr_planes;
	info->row_bytes = pad->layout.row_bytes;
	info->input_row_bytes = pad->layout.input_row_bytes;
	memcpy(info->tag, pad->tag, sizeof(info->tag));
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_info);

/**
 * kvs_pad_show() - describe a pad in fdinfo
 * @pad: the pad
 * @m: where to
 */
void kvs_pad_show(struct kvs_pad *pad, struct seq_file *m)
{
	const struct kvscratch_plane *first = &pad->planes[0].geometry;
	struct kvscratch_pad_info info = {};

	kvs_pad_info(pad, &info);
	seq_printf(m, "kvscratch-id:\t%llu\n", info.id);
	seq_printf(m, "kvscratch-len:\t%llu\n", info.len);
	seq_printf(m, "kvscratch-max-seq-len:\t%llu\n", info.max_seq_len);
	seq_printf(m, "kvscratch-generation:\t%llu\n", info.generation);
	seq_printf(m, "kvscratch-planes:\t%u\n", info.nr_planes);
	seq_printf(m, "kvscratch-dim:\t%u\n", first->dim);
	seq_printf(m, "kvscratch-dtype:\t%s\n", kvs_dtype_names[first->dtype]);
	seq_printf(m, "kvscratch-bytes:\t%llu\n", info.allocated_bytes);
	seq_printf(m, "kvscratch-shared-bytes:\t%llu\n", info.shared_bytes);
	seq_printf(m, "kvscratch-parent:\t%llu\n", info.parent_id);
	seq_printf(m, "kvscratch-parent-rows:\t%llu\n", info.parent_rows);
	seq_printf(m, "kvscratch-saturated:\t%llu\n", info.saturated);
	seq_printf(m, "kvscratch-epoch:\t%u\n", info.epoch);
	seq_printf(m, "kvscratch-writer:\t%u\n", !!(info.flags & KVSCRATCH_PAD_WRITER));
	seq_printf(m, "kvscratch-sealed:\t%u\n", !!(info.flags & KVSCRATCH_PAD_SEALED));
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_pad_show);

/*
 * Views
 */

/* Pins and unaligned views take a reference each: leave room for those fault handling adds. */
static bool kvs_page_has_room(struct page *page)
{
	return page_ref_count(compound_head(page)) <= INT_MAX / 2;
}

/*
 * The pages beside that of the fault, which is a piece of a huge chunk of another pad: who
 * goes on from the rows of that one reads them all, and a fault takes what ten entries take.
 * Where an entry cannot be made, its own fault says why.
 */
static void kvs_map_table(const struct vm_fault *vmf, const struct kvs_pad *pad)
{
	struct vm_area_struct *vma = vmf->vma;
	pgoff_t first = round_down(vmf->pgoff, KVS_CHUNK_PAGES);
	pgoff_t end = min(first + KVS_CHUNK_PAGES, vma->vm_pgoff + vma_pages(vma));
	pgoff_t index;

	for (index = max(first, vma->vm_pgoff); index < end; index++) {
		bool is_piece;
		struct page *page = kvs_pad_page(pad, index, &is_piece);

		if (page && kvs_page_has_room(page))
			kvs_map_ahead(vma, vma->vm_start + ((index - vma->vm_pgoff) << PAGE_SHIFT),
				      page);
	}
}

/**
 * kvs_fault() - give fault handling a page of a view
 * @vmf: of a VMA whose private data is the pad
 *
 * Where a view is aligned as the chunk is, the core maps all of a huge chunk by one entry:
 * it lies at a multiple of its size in the mapping. Of a table some pages may be those of a
 * huge chunk of another pad, which goes on with what is not for this one.
 *
 * Return: 0, VM_FAULT_SIGBUS where there is no page, or too many references to it, or what
 * kvs_fault_piece() says.
 */
vm_fault_t kvs_fault(struct vm_fault *vmf)
{
	const struct kvs_pad *pad = vmf->vma->vm_private_data;
	bool is_piece;
	struct page *page = kvs_pad_page(pad, vmf->pgoff, &is_piece);
	vm_fault_t result;

	if (!page || !kvs_page_has_room(page))
		return VM_FAULT_SIGBUS;
	if (is_piece) {
		result = kvs_fault_piece(vmf, page);
		if (KVS_MAPS_AHEAD && result == VM_FAULT_NOPAGE)
			kvs_map_table(vmf, pad);
		return result;
	}
	get_page(page);
	vmf->page = page;
	return 0;
}
EXPORT_SYMBOL_FOR_KUNIT(kvs_fault);

static const struct vm_operations_struct kvs_vm_ops = { .fault = kvs_fault };

static int kvs_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kvs_handle *handle = file->private_data;
	u64 nr_pages = (handle->pad->layout.status_offset >> PAGE_SHIFT) + 1;

	/* do_mmap() drops VM_SHARED for files that are open for read only; VM_MAYSHARE tells */
	if (vma->vm_flags & (VM_WRITE | VM_EXEC) || !(vma->vm_flags & VM_MAYSHARE))
		return -EPERM;
	if (vma->vm_pgoff >= nr_pages || vma_pages(vma) > nr_pages - vma->vm_pgoff)
		return -ENXIO;
	kvs_vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP, VM_MAYWRITE | VM_MAYEXEC);
	/* the file of the VMA holds the pad */
	vma->vm_private_data = handle->pad;
	vma->vm_ops = &kvs_vm_ops;
	return 0;
}

/*
 * Handles and their constructor
 */

static int kvs_init_fs_context(struct fs_context *context)
{
	/* no program lies here: a process with READ_IMPLIES_EXEC can map for reading */
	context->s_iflags |= SB_I_NOEXEC;
	return init_pseudo(context, KVSCRATCH_STATUS_MAGIC) ? 0 : -ENOMEM;
}

/* A superblock holds its owner until it is gone, also when the last mntput() comes late. */
static struct file_system_type kvs_fs_type = {
	.name = "kvscratch",
	.owner = THIS_MODULE,
	.init_fs_context = kvs_init_fs_context,
	.kill_sb = kill_anon_super,
};

/* Pinned once for each handle */
static struct vfsmount *kvs_mount;
static int kvs_mount_pins;

/*
 * The inode has no file type: a regular file could be truncated under its views. It does
 * not end, for fault handling maps no huge entry across the end of a file.
 *
 * As alloc_anon_inode() makes it, but on the list of the superblock: a watch (inotify) keeps an
 * inode longer than its files, and is found there when the last handle of all unmounts; who
 * closes that one would wait for the end of the watch otherwise.
 */
static int kvs_pad_make_inode(struct kvs_pad *pad)
{
	struct inode *inode = new_inode(kvs_mount->mnt_sb);

	if (!inode)
		return -ENOMEM;
	inode->i_ino = get_next_ino();
	inode->i_mode = 0600;
	inode->i_uid = current_fsuid();
	inode->i_gid = current_fsgid();
	inode->i_flags |= S_PRIVATE;
	kvs_inode_set_anonymous(inode);
	kvs_inode_init_times(inode);
	/* which is what fstat() says */
	i_size_write(inode, MAX_LFS_FILESIZE);
	pad->inode = inode;
	return 0;
}

static const struct file_operations kvs_pad_fops;

/* The file system is pinned. The first handle of a pad makes its inode. */
static struct file *kvs_handle_file(struct kvs_pad *pad, int flags)
{
	bool first = !pad->inode;
	struct file *file;
	char name[32];
	int err;

	err = first ? kvs_pad_make_inode(pad) : 0;
	if (err)
		return ERR_PTR(err);
	snprintf(name, sizeof(name), "kvscratch:%llu", pad->id);
	ihold(pad->inode);
	file = alloc_file_pseudo(pad->inode, kvs_mount, name, flags, &kvs_pad_fops);
	if (!IS_ERR(file))
		return file;
	iput(pad->inode);
	if (first) {
		/* not later: the file system may be gone then */
		iput(pad->inode);
		pad->inode = NULL;
	}
	return file;
}

/**
 * kvs_handle_new() - the one constructor of handles
 * @pad: the pad, which gets another reference
 * @flags: O_RDONLY, O_WRONLY or O_RDWR
 *
 * Called through an open file of the module.
 *
 * Return: the open file, which kvs_release() ends, or an ERR_PTR.
 */
static struct file *kvs_handle_new(struct kvs_pad *pad, int flags)
{
	struct kvs_handle *handle = kzalloc(sizeof(*handle), KVS_GFP);
	struct file *file;
	int err;

	if (!handle)
		return ERR_PTR(-ENOMEM);
	/* for the file: __fput() lets it go */
	__module_get(THIS_MODULE);
	err = simple_pin_fs(&kvs_fs_type, &kvs_mount, &kvs_mount_pins);
	if (err)
		goto err_put_module;
	file = kvs_handle_file(pad, flags);
	if (IS_ERR(file)) {
		err = PTR_ERR(file);
		goto err_release_fs;
	}
	handle->pad = kvs_pad_get(pad);
	file->private_data = handle;
	/*
	 * io_uring appends inline instead of in a worker. pwrite() is ESPIPE: rows have no
	 * other place than the end.
	 */
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_NOWAIT;
	kvs_file_set_nonotify(file);
	return file;

err_release_fs:
	simple_release_fs(&kvs_mount, &kvs_mount_pins);
err_put_module:
	module_put(THIS_MODULE);
	kfree(handle);
	return ERR_PTR(err);
}

static int kvs_release(struct inode *inode, struct file *file)
{
	struct kvs_handle *handle = file->private_data;

	kvs_pad_end_role(handle);
	kvs_pad_put(handle->pad);
	kfree(handle);
	/* the file has a reference of its own until its dentry is gone */
	simple_release_fs(&kvs_mount, &kvs_mount_pins);
	return 0;
}

/*
 * ioctls: the dispatcher has checked the kind of handle, the struct and rights
 */

static bool kvs_must_not_wait(const struct file *file)
{
	return file->f_flags & O_NONBLOCK;
}

/* What user space says of a plane, without what the kernel will say */
static int kvs_check_plane(const struct kvscratch_plane *plane)
{
	const size_t outputs = offsetof(struct kvscratch_plane, offset);

	if (!memchr(plane->label, 0, sizeof(plane->label)) ||
	    memchr_inv(&plane->offset, 0, sizeof(*plane) - outputs))
		return -EINVAL;
	return 0;
}

static int kvs_check_plane_bytes(u32 plane_bytes)
{
	if (plane_bytes < offsetofend(struct kvscratch_plane, reserved) || plane_bytes % 8)
		return -EINVAL;
	return plane_bytes > PAGE_SIZE ? -E2BIG : 0;
}

static int kvs_copy_planes(struct kvscratch_plane *planes, const struct kvscratch_create *create)
{
	void __user *from = u64_to_user_ptr(create->planes);
	u32 i;

	for (i = 0; i < create->nr_planes; i++) {
		int err = copy_struct_from_user(&planes[i], sizeof(planes[i]), from,
						create->plane_bytes);

		if (!err)
			err = kvs_check_plane(&planes[i]);
		if (err)
			return err;
		from += create->plane_bytes;
	}
	return 0;
}

/* An ERR_PTR, or a pad with one reference */
static struct kvs_pad *kvs_create_from_user(const struct kvscratch_create *create)
{
	struct kvscratch_plane *planes;
	struct kvs_pad *pad;
	int err;

	planes = kvs_zalloc(array_size(create->nr_planes, sizeof(*planes)));
	if (!planes)
		return ERR_PTR(-ENOMEM);
	err = kvs_copy_planes(planes, create);
	pad = err ? ERR_PTR(err) : kvs_pad_create(create, planes);
	kvfree(planes);
	return pad;
}

/* The descriptor of the first handle on a new pad, or what @pad says as an ERR_PTR */
static long kvs_install_pad(struct kvs_pad *pad)
{
	struct file *file;
	int fd;

	if (IS_ERR(pad))
		return PTR_ERR(pad);
	fd = get_unused_fd_flags(O_CLOEXEC);
	file = fd < 0 ? ERR_PTR(fd) : kvs_handle_new(pad, O_RDWR);
	/* the handle's alone from now on, or gone */
	kvs_pad_put(pad);
	if (!IS_ERR(file)) {
		fd_install(fd, file);
		return fd;
	}
	if (fd >= 0)
		put_unused_fd(fd);
	return PTR_ERR(file);
}

static long kvs_ioctl_create(struct file *node, void *arg)
{
	struct kvscratch_create *create = arg;
	int err;

	if (create->flags || !create->nr_planes || create->nr_planes > KVSCRATCH_MAX_PLANES)
		return -EINVAL;
	err = kvs_check_plane_bytes(create->plane_bytes);
	if (err)
		return err;
	return kvs_install_pad(kvs_create_from_user(create));
}

/*
 * A fork shows all rows, and keeps them from being dropped: it takes the rights to read and to
 * change the pad, but for one that cannot change any more.
 */
static bool kvs_may_fork(const struct file *file, const struct kvs_pad *pad)
{
	return file->f_mode & FMODE_READ &&
	       (file->f_mode & FMODE_WRITE || READ_ONCE(pad->sealed));
}

static long kvs_ioctl_fork(struct file *node, void *arg)
{
	const struct kvscratch_fork *fork = arg;
	struct file *file = fget(fork->source_fd);
	struct kvs_handle *handle;
	long ret = -EBADF;

	if (!file)
		return ret;
	if (file->f_op == &kvs_pad_fops) {
		handle = file->private_data;
		ret = kvs_may_fork(file, handle->pad) ?
		      kvs_install_pad(kvs_pad_fork(handle->pad, fork)) : -EACCES;
	}
	fput(file);
	return ret;
}

static int kvs_check_open(const struct kvscratch_open *open)
{
	const u32 both = KVSCRATCH_ACCESS_READ | KVSCRATCH_ACCESS_WRITE;

	if (open->flags & ~(KVSCRATCH_OPEN_WRITER | KVSCRATCH_OPEN_TAKEOVER) || open->reserved ||
	    !open->access || open->access & ~both)
		return -EINVAL;
	if (open->flags && (!(open->flags & KVSCRATCH_OPEN_WRITER) ||
			    open->access != KVSCRATCH_ACCESS_WRITE))
		return -EINVAL;
	return 0;
}

static int kvs_open_flags(u32 access)
{
	if (access == KVSCRATCH_ACCESS_READ)
		return O_RDONLY;
	return access == KVSCRATCH_ACCESS_WRITE ? O_WRONLY : O_RDWR;
}

/* The rights first, then the values, as of every call */
static long kvs_ioctl_open(struct file *from, void *arg)
{
	struct kvs_handle *handle = from->private_data;
	struct kvscratch_open *open = arg;
	struct file *file;
	int fd, err;

	if ((open->access & KVSCRATCH_ACCESS_READ && !(from->f_mode & FMODE_READ)) ||
	    (open->access & KVSCRATCH_ACCESS_WRITE && !(from->f_mode & FMODE_WRITE)))
		return -EACCES;
	err = kvs_check_open(open);
	if (err)
		return err;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	file = kvs_handle_new(handle->pad, kvs_open_flags(open->access));
	if (IS_ERR(file)) {
		err = PTR_ERR(file);
		goto err_put_fd;
	}
	/* last: nothing can fail any more */
	if (open->flags & KVSCRATCH_OPEN_WRITER)
		err = kvs_pad_take_role(file->private_data, open->flags & KVSCRATCH_OPEN_TAKEOVER,
					kvs_must_not_wait(from));
	if (err)
		goto err_put_file;
	fd_install(fd, file);
	return fd;

err_put_file:
	fput(file);
err_put_fd:
	put_unused_fd(fd);
	return err;
}

static long kvs_ioctl_stage(struct file *file, void *arg)
{
	return kvs_pad_stage(file->private_data, arg, NULL, kvs_must_not_wait(file));
}

static long kvs_ioctl_commit(struct file *file, void *arg)
{
	struct kvscratch_commit *commit = arg;

	if (commit->flags)
		return -EINVAL;
	return kvs_pad_commit(file->private_data, commit->len, kvs_must_not_wait(file));
}

static long kvs_ioctl_truncate(struct file *file, void *arg)
{
	struct kvscratch_truncate *truncate = arg;

	if (truncate->flags & ~(KVSCRATCH_TRUNCATE_ZERO | KVSCRATCH_TRUNCATE_EXPECT))
		return -EINVAL;
	if (!(truncate->flags & KVSCRATCH_TRUNCATE_EXPECT) &&
	    (truncate->expected_generation || truncate->expected_len))
		return -EINVAL;
	return kvs_pad_truncate(file->private_data, truncate, kvs_must_not_wait(file));
}

static long kvs_ioctl_seal(struct file *file, void *arg)
{
	struct kvscratch_seal *seal = arg;

	return seal->flags ? -EINVAL : kvs_pad_seal(file->private_data, kvs_must_not_wait(file));
}

static long kvs_ioctl_seen(struct file *file, void *arg)
{
	struct kvs_handle *handle = file->private_data;
	struct kvscratch_seen *seen = arg;

	if (seen->flags || seen->len > handle->pad->max_seq_len)
		return -EINVAL;
	WRITE_ONCE(handle->seen, kvs_state(seen->generation, seen->len));
	return 0;
}

static long kvs_ioctl_info(struct file *file, void *arg)
{
	struct kvs_handle *handle = file->private_data;

	kvs_pad_info(handle->pad, arg);
	return 0;
}

static int kvs_copy_plane_out(void __user *to, const struct kvscratch_plane *plane, u32 bytes)
{
	u32 known = min_t(u32, bytes, sizeof(*plane));

	if (copy_to_user(to, plane, known) || clear_user(to + known, bytes - known))
		return -EFAULT;
	return 0;
}

static long kvs_ioctl_planes(struct file *file, void *arg)
{
	struct kvs_handle *handle = file->private_data;
	struct kvscratch_planes *planes = arg;
	struct kvs_pad *pad = handle->pad;
	void __user *to = u64_to_user_ptr(planes->planes);
	u32 i;
	int err;

	if (planes->first > pad->nr_planes)
		return -EINVAL;
	err = kvs_check_plane_bytes(planes->plane_bytes);
	if (err)
		return err;
	planes->count = min(planes->count, pad->nr_planes - planes->first);
	for (i = 0; i < planes->count; i++) {
		u32 nr = array_index_nospec(planes->first + i, pad->nr_planes);

		err = kvs_copy_plane_out(to, &pad->planes[nr].geometry, planes->plane_bytes);
		if (err)
			return err;
		to += planes->plane_bytes;
	}
	return 0;
}

/**
 * struct kvs_ioctl - one entry of the dispatch table
 * @cmd: the whole number
 * @size: what this kernel knows of the argument
 * @min_size: the first version of the argument
 * @node: whether it is of node handles or of pads
 * @output: whether the argument is copied back, and what stands behind it does not matter
 * @rights: access mode that the handle must have
 * @handler: acts on the checked copy of the argument
 */
struct kvs_ioctl {
	unsigned int cmd;
	u32 size;
	u32 min_size;
	bool node;
	bool output;
	fmode_t rights;
	long (*handler)(struct file *file, void *arg);
};

union kvs_ioctl_arg {
	u32 size;
	struct kvscratch_create create;
	struct kvscratch_fork fork;
	struct kvscratch_open open;
	struct kvscratch_stage stage;
	struct kvscratch_commit commit;
	struct kvscratch_truncate truncate;
	struct kvscratch_seal seal;
	struct kvscratch_seen seen;
	struct kvscratch_pad_info info;
	struct kvscratch_planes planes;
};

#define KVS_IOCTL(_cmd, _name, _last) \
	.cmd = _cmd, \
	.size = sizeof_field(union kvs_ioctl_arg, _name), \
	.min_size = offsetofend(union kvs_ioctl_arg, _name._last), \
	.handler = kvs_ioctl_##_name

static const struct kvs_ioctl kvs_ioctls[] = {
	[_IOC_NR(KVSCRATCH_IOC_CREATE)] = {
		KVS_IOCTL(KVSCRATCH_IOC_CREATE, create, tag),
		.node = true,
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_FORK)] = {
		KVS_IOCTL(KVSCRATCH_IOC_FORK, fork, max_seq_len),
		.node = true,
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_OPEN)] = {
		KVS_IOCTL(KVSCRATCH_IOC_OPEN, open, reserved),
	},
	[_IOC_NR(KVSCRATCH_IOC_STAGE)] = {
		KVS_IOCTL(KVSCRATCH_IOC_STAGE, stage, addr),
	},
	[_IOC_NR(KVSCRATCH_IOC_COMMIT)] = {
		KVS_IOCTL(KVSCRATCH_IOC_COMMIT, commit, len),
	},
	[_IOC_NR(KVSCRATCH_IOC_TRUNCATE)] = {
		KVS_IOCTL(KVSCRATCH_IOC_TRUNCATE, truncate, expected_len),
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_SEAL)] = {
		KVS_IOCTL(KVSCRATCH_IOC_SEAL, seal, flags),
		.rights = FMODE_WRITE,
	},
	[_IOC_NR(KVSCRATCH_IOC_SEEN)] = {
		KVS_IOCTL(KVSCRATCH_IOC_SEEN, seen, len),
	},
	[_IOC_NR(KVSCRATCH_IOC_INFO)] = {
		KVS_IOCTL(KVSCRATCH_IOC_INFO, info, tag),
		.output = true,
	},
	[_IOC_NR(KVSCRATCH_IOC_PLANES)] = {
		KVS_IOCTL(KVSCRATCH_IOC_PLANES, planes, planes),
		.output = true,
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
	if (op->output) {
		memset(arg, 0, op->size);
		err = copy_from_user(arg, argp, min(size, op->size)) ? -EFAULT : 0;
	} else {
		err = copy_struct_from_user(arg, op->size, argp, size);
	}
	if (err)
		return err;
	/* the caller's memory may have changed since size was checked */
	arg->size = size;
	return 0;
}

static int kvs_ioctl_copy_out(const struct kvs_ioctl *op, union kvs_ioctl_arg *arg,
			      void __user *argp)
{
	u32 size = arg->size;
	u32 filled = min(size, op->size);

	arg->size = filled;
	if (copy_to_user(argp, arg, filled) || clear_user(argp + filled, size - filled))
		return -EFAULT;
	return 0;
}

static long kvs_dispatch(struct file *file, unsigned int cmd, unsigned long user_arg, bool node)
{
	void __user *argp = (void __user *)user_arg;
	unsigned int nr = _IOC_NR(cmd);
	union kvs_ioctl_arg arg;
	const struct kvs_ioctl *op;
	long ret;

	if (nr >= ARRAY_SIZE(kvs_ioctls))
		return -ENOIOCTLCMD;
	op = &kvs_ioctls[array_index_nospec(nr, ARRAY_SIZE(kvs_ioctls))];
	if (!op->handler || op->cmd != cmd || op->node != node)
		return -ENOIOCTLCMD;
	ret = kvs_ioctl_copy_in(op, &arg, argp);
	if (ret)
		return ret;
	if (op->rights & ~file->f_mode)
		return -EACCES;
	ret = op->handler(file, &arg);
	if (ret || !op->output)
		return ret;
	return kvs_ioctl_copy_out(op, &arg, argp);
}

static long kvs_node_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return kvs_dispatch(file, cmd, arg, true);
}

static long kvs_pad_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	return kvs_dispatch(file, cmd, arg, false);
}

/*
 * File operations
 */

/* An append has one place: the position is neither looked at nor moved. */
static ssize_t kvs_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct file *file = iocb->ki_filp;

	return kvs_pad_append(file->private_data, from,
			      iocb->ki_flags & IOCB_NOWAIT || kvs_must_not_wait(file));
}

/*
 * Beside write_iter: what write() does most often needs neither kiocb nor iov_iter, which
 * would make a small append a fifth longer. kernel_write() is -EINVAL for it; nothing in the
 * kernel writes to pads.
 */
static ssize_t kvs_write(struct file *file, const char __user *rows, size_t bytes, loff_t *pos)
{
	struct kvs_op op = kvs_op_of(file->private_data);

	op.user = rows;
	return kvs_append(&op, bytes, kvs_must_not_wait(file));
}

static ssize_t kvs_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct kvs_handle *handle = iocb->ki_filp->private_data;
	ssize_t copied = kvs_pad_read(handle->pad, iocb->ki_pos, to);

	if (copied > 0)
		iocb->ki_pos += copied;
	return copied;
}

static loff_t kvs_llseek(struct file *file, loff_t offset, int whence)
{
	struct kvs_handle *handle = file->private_data;
	struct kvs_pad *pad = handle->pad;
	u64 row_bytes = pad->layout.row_bytes;

	if (whence != SEEK_SET && whence != SEEK_CUR && whence != SEEK_END)
		return -EINVAL;
	/* f_pos is not locked for such files; of two lseeks at once either stays */
	return data_race(generic_file_llseek_size(file, offset, whence,
						  pad->max_seq_len * row_bytes,
						  kvs_state_len(kvs_load_state(pad)) * row_bytes));
}

/* Whether a write through @handle would neither wait nor be -EBUSY */
static bool kvs_is_writable(const struct kvs_handle *handle)
{
	const struct kvs_pad *pad = handle->pad;
	const struct kvs_handle *writer = READ_ONCE(pad->writer);

	if (READ_ONCE(pad->sealed) || (handle->writer && writer != handle))
		return true;
	return (!writer || writer == handle) && !READ_ONCE(pad->turn);
}

static __poll_t kvs_poll(struct file *file, struct poll_table_struct *table)
{
	struct kvs_handle *handle = file->private_data;
	struct kvs_pad *pad = handle->pad;
	__poll_t events = 0;

	/* whatever is asked for: epoll does not come again when that changes */
	if (!handle->writer)
		poll_wait(file, &pad->to_read.queue, table);
	if (file->f_mode & FMODE_WRITE)
		poll_wait(file, &pad->to_write.queue, table);
	/* queue, then look; pairs with wq_has_sleeper() in kvs_wake(); litmus: poll-wake */
	smp_mb();
	/*
	 * Before the state: with the seal of a pad come its last rows. Pairs with
	 * kvs_publish_role(); litmus: role-seal
	 */
	if (smp_load_acquire(&pad->status->writer.word) & KVSCRATCH_PAD_SEALED)
		events |= EPOLLRDHUP;
	if (kvs_load_state(pad) != READ_ONCE(handle->seen))
		events |= EPOLLIN | EPOLLRDNORM;
	if (file->f_mode & FMODE_WRITE && kvs_is_writable(handle))
		events |= EPOLLOUT | EPOLLWRNORM;
	return events;
}

static void kvs_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct kvs_handle *handle = file->private_data;

	kvs_pad_show(handle->pad, m);
}

static const struct file_operations kvs_pad_fops = {
	.owner = THIS_MODULE,
	.release = kvs_release,
	.llseek = kvs_llseek,
	.read_iter = kvs_read_iter,
	.write = kvs_write,
	.write_iter = kvs_write_iter,
	.poll = kvs_poll,
	.mmap = kvs_mmap,
	.get_unmapped_area = thp_get_unmapped_area,
	.unlocked_ioctl = kvs_pad_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.show_fdinfo = kvs_show_fdinfo,
};

static const struct file_operations kvs_node_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = kvs_node_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice kvs_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "kvscratch",
	.fops = &kvs_node_fops,
	.mode = 0600,
};

/*
 * Module
 */

static void __init kvs_set_defaults(void)
{
	u64 ram = (u64)totalram_pages() << PAGE_SHIFT;

	if (max_bytes_per_pad == KVS_DEFAULT)
		max_bytes_per_pad = ram / 2;
	if (max_bytes_total == KVS_DEFAULT)
		max_bytes_total = ram / 2;
	if (min_available_bytes == KVS_DEFAULT)
		min_available_bytes = clamp_t(u64, ram / 32, SZ_32M, SZ_1G);
}

static int __init kvs_init(void)
{
	int err;

	kvs_set_defaults();
	/* unbound: a waker that walks many pollers stays off the CPU of a writer */
	kvs_wakers = alloc_workqueue("kvscratch", WQ_UNBOUND, 0);
	if (!kvs_wakers)
		return -ENOMEM;
	err = misc_register(&kvs_misc);
	if (err)
		destroy_workqueue(kvs_wakers);
	return err;
}
module_init(kvs_init);

static void __exit kvs_exit(void)
{
	misc_deregister(&kvs_misc);
	destroy_workqueue(kvs_wakers);
}
module_exit(kvs_exit);

MODULE_AUTHOR("The kvscratch authors");
MODULE_DESCRIPTION("KV-cache scratchpads for transformer inference");
MODULE_LICENSE("GPL");
