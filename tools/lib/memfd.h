/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What lies behind the planes of a pad in a memfd, and how rows get into them.
 */
#ifndef MEMFD_H
#define MEMFD_H

#include "backend.h"

/**
 * struct memfd_plane - a plane and its cursors
 * @geometry: all of it
 * @staged: end of what the writer staged; below len it is len
 * @whole: end of the rows that were last stored completely in this epoch; likewise
 * @touched: end of the rows that were ever touched since they were zero
 * @reserved: 0
 */
struct memfd_plane {
	struct kvscratch_plane geometry;
	__u32 staged;
	__u32 whole;
	__u32 touched;
	__u32 reserved;
};

/**
 * struct memfd_page - the last page of the memfd
 * @tag: of the pad
 * @max_seq_len: capacity in rows
 * @saturated: as in struct kvscratch_pad_info
 * @nr_planes: how many
 * @generation_high: upper half of the full generation, whose lower half is in the state
 * @changes: grows with each change of state or seal: what waiters sleep on
 * @scrub_owed: whoever zeroed rows died at it
 * @parent_id: of a fork, as in struct kvscratch_pad_info
 * @parent_rows: likewise
 * @reserved: 0
 * @magic: MEMFD_MAGIC, where it was in every version
 * @version: MEMFD_VERSION, likewise
 */
struct memfd_page {
	__u8 tag[KVSCRATCH_TAG_BYTES];
	__aligned_u64 max_seq_len;
	__aligned_u64 saturated;
	__u32 nr_planes;
	__u32 generation_high;
	__u32 changes;
	__u32 scrub_owed;
	__aligned_u64 parent_id;
	__aligned_u64 parent_rows;
	__u32 reserved[20];
	__u32 magic;
	__u32 version;
};

_Static_assert(sizeof(struct memfd_plane) == 80, "one layout for 32 and 64 bit");
_Static_assert(offsetof(struct memfd_page, magic) == 192, "one layout for every version");

/*
 * Store @count rows of a plane as it takes them, @stride bytes apart at @rows, from row @first
 * on. *@saturated grows by the elements that were clamped. Returns 0 or a negative errno,
 * without words.
 */
int store_rows(int fd, const struct kvscratch_plane *plane, uint64_t first, const char *rows,
	       size_t stride, uint64_t count, uint64_t *saturated);

/* Overwrite rows of a plane with zeros. */
int zero_rows(int fd, const struct kvscratch_plane *plane, uint64_t first, uint64_t end);

#endif
