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
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/wait.h>

#include "uapi/linux/kvscratch.h"

struct seq_file;

/**
 * struct kvs_layout - shape of a pad and of its mapping
 * @max_seq_len: capacity in rows
 * @dim: elements per row
 * @dtype: one of &enum kvscratch_dtype
 * @input_dtype: what an append takes; @dtype where it is stored as it comes
 * @frac_bits: fraction bits of an integer element
 * @row_bytes: bytes per stored row, over all planes
 * @input_row_bytes: bytes per row of an append
 * @stored_as_is: what an append takes is what lies in the one plane
 * @nr_planes: entries of @planes in use
 * @planes: the dense arrays, in mapping order
 * @status_offset: mapping offset of the status page, which ends the mapping
 * @nr_pages: pages of the whole mapping
 * @charged_bytes: what the pad takes from the module's limits: the mapping, the
 *	array of its pages, and the staging buffer
 */
struct kvs_layout {
	u64 max_seq_len;
	u32 dim;
	u32 dtype;
	u32 input_dtype;
	u32 frac_bits;
	u32 row_bytes;
	u32 input_row_bytes;
	bool stored_as_is;
	u32 nr_planes;
	struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
	u64 status_offset;
	u64 nr_pages;
	u64 charged_bytes;
};

/**
 * struct kvs_pad - one pad, shared by all handles bound to it
 * @layout: fixed when the pad is created
 * @base: kernel address of the whole mapping
 * @pages: the pages behind @base
 * @status: the status page, written only
 * @refs: one reference per bound handle
 * @wait: pollers; lives as long as the handles that poll
 * @lock: orders appends and truncates, see "Locks" in kvscratch.c
 * @state: generation << 32 | len, the truth of both; written under @lock,
 *	loaded with acquire by everyone else
 * @staging: protected by @lock: a piece of input on its way to be converted, or
 *	NULL where rows are stored as they come
 * @saturated: elements clamped so far; written under @lock
 * @dirty_rows: protected by @lock: end of the rows ever touched since they
 *	were last known to be zero
 * @trunc_lock: makes a truncate's changes to @state, @generation_high, @trunc_len
 *	and the status page one change for kvs_pad_info() and lseek()
 * @generation_high: protected by @trunc_lock: upper half of the generation
 * @trunc_len: protected by @trunc_lock: rows that the latest truncate kept
 */
struct kvs_pad {
	struct kvs_layout layout;
	void *base;
	struct page **pages;
	struct kvscratch_status *status;
	refcount_t refs;
	wait_queue_head_t wait;

	struct mutex lock;	/* state, dirty_rows, staging, saturated */
	u64 state;
	u32 dirty_rows;
	void *staging;
	u64 saturated;

	spinlock_t trunc_lock;	/* generation_high, trunc_len */
	u32 generation_high;
	u32 trunc_len;
};

static inline u32 kvs_state_len(u64 state)
{
	return lower_32_bits(state);
}

static inline u32 kvs_state_generation(u64 state)
{
	return upper_32_bits(state);
}

static inline u64 kvs_state(u32 generation, u32 len)
{
	return (u64)generation << 32 | len;
}

int kvs_layout_init(struct kvs_layout *layout, const struct kvscratch_create *create);
int kvs_reserve(u64 bytes, u64 max_per_pad, u64 max_total);
void kvs_unreserve(u64 bytes);
u64 kvs_reserved(void);

struct kvs_pad *kvs_pad_create(const struct kvscratch_create *create);
struct kvs_pad *kvs_pad_get(struct kvs_pad *pad);
void kvs_pad_put(struct kvs_pad *pad);
ssize_t kvs_pad_append(struct kvs_pad *pad, struct iov_iter *from, bool nowait);
ssize_t kvs_pad_read(struct kvs_pad *pad, u64 pos, struct iov_iter *to, bool nowait);
int kvs_pad_truncate(struct kvs_pad *pad, u64 len, bool zero);
void kvs_pad_info(struct kvs_pad *pad, struct kvscratch_info *info);
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

/* No fsnotify events for this file: each would be an allocation per append. */
static inline void kvs_file_set_nonotify(struct file *file)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 14, 0)
	file_set_fsnotify_mode(file, FMODE_NONOTIFY);
#else
	file->f_mode |= FMODE_NONOTIFY;
#endif
}

/* As copy_from_user(), without its look at the kernel address */
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

/* The pad core is for the KUnit suite only, where there is one. */
#if IS_ENABLED(CONFIG_KUNIT)
#define EXPORT_SYMBOL_FOR_KUNIT(symbol) EXPORT_SYMBOL_NS_GPL(symbol, KVS_KUNIT_NAMESPACE)
#else
#define EXPORT_SYMBOL_FOR_KUNIT(symbol)
#endif

#endif /* _KVSCRATCH_H */
