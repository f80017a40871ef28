/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kvscratch: private structures, the pad core that KUnit drives, and the only
 * place that depends on the kernel version.
 */
#ifndef _KVSCRATCH_H
#define _KVSCRATCH_H

#include <linux/export.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/types.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include "uapi/linux/kvscratch.h"
#include "kvscratch_layout.h"

struct seq_file;

#define KVS_CHUNK_PAGES	(KVSCRATCH_CHUNK_BYTES >> PAGE_SHIFT)

/**
 * struct kvs_chunk - the memory of KVSCRATCH_CHUNK_BYTES of an array, or of its end
 * @refs: one per array it is in, and per table that has pages of its @huge
 * @huge: address of the one compound page that is all of it, or NULL
 * @base: the huge chunk that the first @nr_base of @pages are of, or NULL
 * @nr_base: how many; at most @nr_pages
 * @nr_pages: entries of @pages, where there is no @huge
 * @forked: single pages of it may be in other tables as well; set once
 * @pages: addresses of pages of @base, and then of single pages, each of which counts the
 *	tables that it is in
 *
 * Constant but for @refs and @forked. Addresses, for what a page is found by may be in its
 * flags, which fault handling changes.
 */
struct kvs_chunk {
	refcount_t refs;
	u32 nr_base;
	u32 nr_pages;
	bool forked;
	void *huge;
	struct kvs_chunk *base;
	void *pages[];
};

/**
 * struct kvs_array - the elements or the scales of a plane
 * @offset: where it begins in the mapping
 * @bytes: capacity
 * @nr_chunks: entries of @chunks
 * @chunks: its memory, in order; constant while the pad lives
 * @row_bytes: bytes per row; 0 where there are no scales
 */
struct kvs_array {
	u64 offset;
	u64 bytes;
	u64 nr_chunks;
	struct kvs_chunk **chunks;
	u32 row_bytes;
};

/**
 * struct kvs_plane - one plane of a pad
 * @data: elements
 * @scales: scales of MXINT8
 * @record_offset: where a row of it begins in a stored token
 * @staged: protected by the pad's lock: end of the rows that COMMIT may publish
 * @whole: protected by the pad's lock: end of the rows that were last stored
 *	completely in this epoch, for KEEP
 * @touched: protected by the pad's lock: end of the rows that were touched since they
 *	were last known to be zero; what appends touched is in the pad's until a scrub
 * @geometry: as user space made it
 */
struct kvs_plane {
	struct kvs_array data;
	struct kvs_array scales;
	u32 record_offset;
	u32 staged;
	u32 whole;
	u32 touched;
	struct kvscratch_plane geometry;
};

/**
 * struct kvs_trunc - a generation and the rows that its truncate kept
 * @generation: in full
 * @len: rows
 */
struct kvs_trunc {
	u64 generation;
	u32 len;
};

/* Truncates that may come in while 4 KiB are read, and the rows still be told to be good */
#define KVS_TRUNCS	64

/**
 * struct kvs_moment - the state of a pad at one moment
 * @generation: in full
 * @len: committed rows
 * @trunc_len: rows that the latest truncate kept
 */
struct kvs_moment {
	u64 generation;
	u32 len;
	u32 trunc_len;
};

/**
 * struct kvs_pollers - who polls handles of a pad, and what wakes them
 * @queue: where they are registered, any number by any reader
 * @wake: walks the queue, outside of the pad's lock and of the task that has something to tell
 */
struct kvs_pollers {
	wait_queue_head_t queue;
	struct work_struct wake;
};

struct kvs_op;

/**
 * struct kvs_handle - what one open file of a pad owns
 * @pad: a reference
 * @writer: made by OPEN with WRITER; constant once user space has the file
 * @seen: the state that SEEN acknowledged last
 */
struct kvs_handle {
	struct kvs_pad *pad;
	bool writer;
	u64 seen;
};

/**
 * struct kvs_pad - one pad, shared by all its handles
 * @id: no other pad has it
 * @max_seq_len: capacity in rows
 * @layout: fixed when the pad is created
 * @nr_planes: entries of @planes
 * @planes: in the order of a token
 * @nr_arrays: entries of @arrays
 * @arrays: elements and scales of all planes, in mapping order
 * @status: the status page, written only, but for its words
 * @allocated_bytes: what the pad took from the module's limits when it was made
 * @shared_bytes: what it took over from the pad that it was forked from
 * @parent_id: that pad, or 0
 * @parent_rows: rows that it was forked with
 * @tag: user space's
 * @inode: of all its handles; its mapping is what views are of
 * @refs: one per handle
 * @to_read: who waits for a change, all handles but the writer's
 * @to_write: who waits until it may write; readers are not among them, and so hold up no writer
 * @turn_wait: who waits for the end of a turn; no poller joins
 * @lock: see "Locks" in kvscratch.c
 * @turn: protected by @lock: the operation that dropped @lock before its end, or NULL
 * @writer: protected by @lock: the handle that is the only writer, or NULL
 * @epoch: protected by @lock: how often a handle became the writer
 * @sealed: protected by @lock: nothing changes any more
 * @scrub_owed: protected by @lock: a TRUNCATE with ZERO has not finished its scrub
 * @len: protected by @lock: committed rows
 * @touched: protected by @lock: end of the rows of all planes that appends touched since
 *	the latest scrub began
 * @floor: protected by @lock: no other pad shares rows from here on; at most @len
 * @generation: protected by @lock: truncates so far
 * @truncs: those of the latest generations, by generation % KVS_TRUNCS; read without
 *	@lock, see kvs_moment() and kvs_trunc_len()
 * @staging: belongs to the holder of @lock, and across a drop of it to @turn: a
 *	piece of input on its way to be converted; NULL where no plane converts
 * @saturated: elements clamped so far; written under @lock
 */
struct kvs_pad {
	u64 id;
	u64 max_seq_len;
	struct kvs_layout layout;
	u32 nr_planes;
	u32 nr_arrays;
	struct kvs_plane *planes;
	struct kvs_array **arrays;
	struct kvscratch_status *status;
	u64 allocated_bytes;
	u64 shared_bytes;
	u64 parent_id;
	u32 parent_rows;
	u8 tag[KVSCRATCH_TAG_BYTES];
	struct inode *inode;
	refcount_t refs;
	struct kvs_pollers to_read;
	struct kvs_pollers to_write;
	wait_queue_head_t turn_wait;

	struct mutex lock;	/* everything from here on, and the cursors of planes */
	struct kvs_op *turn;
	struct kvs_handle *writer;
	u32 epoch;
	bool sealed;
	bool scrub_owed;
	u32 len;
	u32 touched;
	u32 floor;
	u64 generation;
	struct kvs_trunc truncs[KVS_TRUNCS];
	void *staging;
	u64 saturated;
};

#define kvs_for_each_plane(plane, pad) \
	for (const struct kvs_plane *kvs_end_ = ((plane) = (pad)->planes) + (pad)->nr_planes; \
	     (plane) < kvs_end_; (plane)++)

static inline u32 kvs_state_len(u64 state)
{
	return lower_32_bits(state);
}

static inline u32 kvs_state_generation(u64 state)
{
	return upper_32_bits(state);
}

static inline u64 kvs_state(u64 generation, u32 len)
{
	return generation << 32 | len;
}

int kvs_reserve(u64 bytes, u64 max_per_pad, u64 max_total);
void kvs_unreserve(u64 bytes);
u64 kvs_reserved(void);

struct page *kvs_array_page(const struct kvs_array *array, u64 index);
struct page *kvs_pad_page(const struct kvs_pad *pad, u64 index, bool *is_piece);
vm_fault_t kvs_fault(struct vm_fault *vmf);

struct kvs_pad *kvs_pad_create(const struct kvscratch_create *create,
			       struct kvscratch_plane *planes);
struct kvs_pad *kvs_pad_fork(struct kvs_pad *source, const struct kvscratch_fork *fork);
struct kvs_pad *kvs_pad_get(struct kvs_pad *pad);
void kvs_pad_put(struct kvs_pad *pad);
ssize_t kvs_pad_append(struct kvs_handle *handle, struct iov_iter *from, bool nowait);
ssize_t kvs_pad_read(struct kvs_pad *pad, u64 pos, struct iov_iter *to);
int kvs_pad_stage(struct kvs_handle *handle, const struct kvscratch_stage *stage,
		  struct iov_iter *from, bool nowait);
int kvs_pad_commit(struct kvs_handle *handle, u64 len, bool nowait);
int kvs_pad_truncate(struct kvs_handle *handle, const struct kvscratch_truncate *truncate,
		     bool nowait);
int kvs_pad_seal(struct kvs_handle *handle, bool nowait);
int kvs_pad_take_role(struct kvs_handle *handle, bool takeover, bool nowait);
void kvs_pad_end_role(struct kvs_handle *handle);
void kvs_pad_info(struct kvs_pad *pad, struct kvscratch_pad_info *info);
void kvs_pad_show(struct kvs_pad *pad, struct seq_file *m);

/* What differs between the supported kernels, 6.1 to 7.3 */

static inline void kvs_vm_flags_mod(struct vm_area_struct *vma, unsigned long set,
				    unsigned long clear)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_mod(vma, set, clear);
#else
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
#endif
}

static inline void kvs_inode_init_times(struct inode *inode)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
	simple_inode_init_ts(inode);
#elif LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	inode->i_atime = inode_set_ctime_current(inode);
	inode->i_mtime = inode->i_atime;
#else
	inode->i_atime = current_time(inode);
	inode->i_mtime = inode->i_atime;
	inode->i_ctime = inode->i_atime;
#endif
}

/* Of no type: what opens it by its link in /proc is refused, and does not take that for a bug. */
static inline void kvs_inode_set_anonymous(struct inode *inode)
{
#ifdef S_ANON_INODE
	inode->i_flags |= S_ANON_INODE;
#endif
}

/* No fsnotify events for this file: each would be an allocation per append. */
static inline void kvs_file_set_nonotify(struct file *file)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 14, 0)
	file_set_fsnotify_mode(file, FMODE_NONOTIFY);
#else
	file->f_mode |= FMODE_NONOTIFY;
#endif
}

/*
 * Where MADV_DONTNEED frees page tables that are empty, one that kvs_fault_piece() made may be
 * gone before it is used. 6.14 only: later there is another way, before there was no such thing.
 */
#if defined(CONFIG_PT_RECLAIM) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
#define KVS_TABLES_STAY false
#else
#define KVS_TABLES_STAY true
#endif

/*
 * Give fault handling @page, the only one of its compound page that is to be mapped there:
 * it would take all of them where no page table stands, and from 6.16 on also where one does.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 15, 0)
#define KVS_MAPS_AHEAD true

static inline vm_fault_t kvs_fault_piece(struct vm_fault *vmf, struct page *page)
{
	return vmf_insert_page_mkwrite(vmf, page, false);
}

/* Another entry of a VMA that has a fault, if there is none yet */
static inline void kvs_map_ahead(struct vm_area_struct *vma, unsigned long address,
				 struct page *page)
{
	struct vm_fault ahead = { .vma = vma, .address = address };

	vmf_insert_page_mkwrite(&ahead, page, false);
}
#else
#define KVS_MAPS_AHEAD false

static inline int kvs_leave_entry(pte_t *pte, unsigned long address, void *data)
{
	return 0;
}

static inline vm_fault_t kvs_fault_piece(struct vm_fault *vmf, struct page *page)
{
	if (pmd_none(READ_ONCE(*vmf->pmd)) &&
	    apply_to_page_range(vmf->vma->vm_mm, vmf->address, PAGE_SIZE, kvs_leave_entry, NULL))
		return VM_FAULT_OOM;
	get_page(page);
	vmf->page = page;
	return 0;
}

static inline void kvs_map_ahead(struct vm_area_struct *vma, unsigned long address,
				 struct page *page)
{
}
#endif

/* As copy_from_user(), without its look at the kernel address: see kvs_locate() */
static inline unsigned long kvs_copy_from_user(void *to, const void __user *from, size_t bytes)
{
	/* in between, the function is there only where it is not inline */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0) && defined(INLINE_COPY_FROM_USER)
	return _inline_copy_from_user(to, from, bytes);
#else
	return _copy_from_user(to, from, bytes);
#endif
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
#define KVS_KUNIT_NAMESPACE "KVSCRATCH_KUNIT"
#else
#define KVS_KUNIT_NAMESPACE KVSCRATCH_KUNIT
#endif

/* The pad core is for the KUnit suite only: builds for it say so, see Kbuild. */
#ifdef KVSCRATCH_KUNIT_EXPORTS
#define EXPORT_SYMBOL_FOR_KUNIT(symbol) EXPORT_SYMBOL_NS_GPL(symbol, KVS_KUNIT_NAMESPACE)
#else
#define EXPORT_SYMBOL_FOR_KUNIT(symbol)
#endif

#endif /* _KVSCRATCH_H */
