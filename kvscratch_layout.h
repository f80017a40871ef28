/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * kvscratch: what the planes of a pad take and where they lie in its mapping
 *
 * Pure functions, compiled alike into the module and into user programs: no
 * kernel header, no state. All sums are of at most KVSCRATCH_MAX_PLANES planes
 * whose rows have KVSCRATCH_MAX_ROW_BYTES bytes together, times less than 2^32
 * rows: none overflows 64 bits.
 */
#ifndef _KVSCRATCH_LAYOUT_H
#define _KVSCRATCH_LAYOUT_H

#include <linux/types.h>
#ifndef __KERNEL__
#include <stdbool.h>
#endif

#include "uapi/linux/kvscratch.h"

/**
 * struct kvs_layout - what follows from all planes together
 * @row_bytes: bytes per stored token
 * @input_row_bytes: bytes per appended token
 * @status_offset: where the status page lies, behind all planes
 */
struct kvs_layout {
	__u32 row_bytes;
	__u32 input_row_bytes;
	__u64 status_offset;
};

/* Bytes per element, 0 for what is no dtype */
static inline __u32 kvs_dtype_bytes(__u32 dtype)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
	case KVSCRATCH_DTYPE_I64:
		return 8;
	case KVSCRATCH_DTYPE_F32:
	case KVSCRATCH_DTYPE_I32:
		return 4;
	case KVSCRATCH_DTYPE_F16:
	case KVSCRATCH_DTYPE_BF16:
	case KVSCRATCH_DTYPE_I16:
		return 2;
	case KVSCRATCH_DTYPE_I8:
	case KVSCRATCH_DTYPE_U8:
	case KVSCRATCH_DTYPE_MXINT8:
		return 1;
	default:
		return 0;
	}
}

static inline bool kvs_dtype_is_float(__u32 dtype)
{
	return dtype == KVSCRATCH_DTYPE_F64 || dtype == KVSCRATCH_DTYPE_F32 ||
	       dtype == KVSCRATCH_DTYPE_F16 || dtype == KVSCRATCH_DTYPE_BF16;
}

/* Those that may have fraction bits */
static inline bool kvs_dtype_is_integer(__u32 dtype)
{
	return dtype == KVSCRATCH_DTYPE_I64 || dtype == KVSCRATCH_DTYPE_I32 ||
	       dtype == KVSCRATCH_DTYPE_I16 || dtype == KVSCRATCH_DTYPE_I8;
}

/* Whether rows of @input can be stored as @stored */
static inline bool kvs_dtype_takes(__u32 stored, __u32 input)
{
	return input == stored ||
	       (kvs_dtype_is_float(input) &&
		(kvs_dtype_is_integer(stored) || stored == KVSCRATCH_DTYPE_MXINT8));
}

static inline bool kvs_plane_converts(const struct kvscratch_plane *plane)
{
	return plane->input_dtype != plane->dtype;
}

/**
 * kvs_layout_rows() - check a plane and tell what its rows take
 * @plane: dim, dtype, input_dtype and frac_bits count; receives input_dtype and the
 *	bytes of its rows
 *
 * Return: whether the format allows it.
 */
static inline bool kvs_layout_rows(struct kvscratch_plane *plane)
{
	bool mx = plane->dtype == KVSCRATCH_DTYPE_MXINT8;
	__u64 data, scales, input;

	if (!plane->input_dtype)
		plane->input_dtype = plane->dtype;
	if (!kvs_dtype_bytes(plane->dtype) || !kvs_dtype_takes(plane->dtype, plane->input_dtype))
		return false;
	if (plane->frac_bits >
	    (kvs_dtype_is_integer(plane->dtype) ? KVSCRATCH_MAX_FRAC_BITS : 0))
		return false;
	if (!plane->dim || (mx && plane->dim % KVSCRATCH_MX_BLOCK))
		return false;
	data = (__u64)plane->dim * kvs_dtype_bytes(plane->dtype);
	scales = mx ? plane->dim / KVSCRATCH_MX_BLOCK : 0;
	input = kvs_plane_converts(plane) ?
		(__u64)plane->dim * kvs_dtype_bytes(plane->input_dtype) : data + scales;
	if (data + scales > KVSCRATCH_MAX_ROW_BYTES || input > KVSCRATCH_MAX_ROW_BYTES)
		return false;
	plane->row_bytes = data;
	plane->scales_row_bytes = scales;
	plane->input_row_bytes = input;
	return true;
}

/* Whether an array of so many bytes begins on a chunk and owns the mapping up to one */
static inline bool kvs_layout_is_large(__u64 bytes)
{
	return bytes > KVSCRATCH_CHUNK_BYTES / 2;
}

static inline __u64 kvs_layout_round(__u64 bytes, __u64 unit)
{
	return (bytes + unit - 1) / unit * unit;
}

/* Give an array its place if it is of the kind that has its turn. */
static inline void kvs_layout_place(__u64 *offset, __u64 bytes, bool large, __u64 page_bytes,
				    __u64 *end)
{
	if (!bytes || kvs_layout_is_large(bytes) != large)
		return;
	*offset = *end;
	*end += kvs_layout_round(bytes, large ? KVSCRATCH_CHUNK_BYTES : page_bytes);
}

/**
 * kvs_layout_init() - check planes and lay out their mapping
 * @layout: receives what follows from all of them
 * @planes: as for kvs_layout_rows(); receive the rest
 * @nr_planes: how many, 1 to KVSCRATCH_MAX_PLANES
 * @max_seq_len: capacity in rows, 1 to KVSCRATCH_MAX_SEQ_LEN
 * @page_bytes: page size
 *
 * Large arrays come first, for only what begins on a chunk can be mapped by one
 * entry per chunk; the others are packed by pages. Capacity alone decides, not
 * what memory there is.
 *
 * Return: whether the format allows it.
 */
static inline bool kvs_layout_init(struct kvs_layout *layout, struct kvscratch_plane *planes,
				   __u32 nr_planes, __u64 max_seq_len, __u64 page_bytes)
{
	__u64 row_bytes = 0, input_row_bytes = 0, end = 0;
	__u32 i;
	int large;

	for (i = 0; i < nr_planes; i++) {
		if (!kvs_layout_rows(&planes[i]))
			return false;
		row_bytes += planes[i].row_bytes + planes[i].scales_row_bytes;
		input_row_bytes += planes[i].input_row_bytes;
	}
	if (row_bytes > KVSCRATCH_MAX_ROW_BYTES || input_row_bytes > KVSCRATCH_MAX_ROW_BYTES)
		return false;
	for (large = 1; large >= 0; large--) {
		for (i = 0; i < nr_planes; i++) {
			struct kvscratch_plane *plane = &planes[i];

			kvs_layout_place(&plane->offset, max_seq_len * plane->row_bytes, large,
					 page_bytes, &end);
			kvs_layout_place(&plane->scales_offset,
					 max_seq_len * plane->scales_row_bytes, large, page_bytes,
					 &end);
		}
	}
	layout->row_bytes = row_bytes;
	layout->input_row_bytes = input_row_bytes;
	layout->status_offset = end;
	return true;
}

#endif /* _KVSCRATCH_LAYOUT_H */
