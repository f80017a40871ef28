// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * What a pad is made of: whether the format allows it, in words, and what follows from it.
 */
#include "backend.h"
#include "safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int check_dtypes(const struct kvscratch_plane *plane)
{
	const uint32_t input_dtype = plane->input_dtype ? plane->input_dtype : plane->dtype;
	const char *stored = kvscratch_dtype_name(plane->dtype);
	const char *input = kvscratch_dtype_name(input_dtype);
	bool mx = plane->dtype == KVSCRATCH_DTYPE_MXINT8;
	bool integer = kvs_dtype_is_integer(plane->dtype);

	if (!stored || !input)
		return set_error(-EINVAL, "dtype: expected one of f64 f32 f16 bf16 i64 i32 i16 i8 "
				 "u8 and mxint8, got number %" PRIu32,
				 stored ? input_dtype : (uint32_t)plane->dtype);
	if (!kvs_dtype_takes(plane->dtype, input_dtype))
		return set_error(-EINVAL, "input dtype: expected %s%s for a dtype of %s, got %s",
				 stored, mx || integer ? " f64 f32 f16 or bf16" : "", stored,
				 input);
	if (plane->frac_bits > (integer ? KVSCRATCH_MAX_FRAC_BITS : 0))
		return set_error(-EINVAL, "fraction bits: expected at most %d for %s, got %" PRIu32,
				 integer ? KVSCRATCH_MAX_FRAC_BITS : 0, stored,
				 (uint32_t)plane->frac_bits);
	return 0;
}

static int check_max_seq_len(uint64_t max_seq_len)
{
	if (max_seq_len && max_seq_len <= KVSCRATCH_MAX_SEQ_LEN)
		return 0;
	return set_error(-EINVAL, "max_seq_len: expected 1 to %" PRIu32 " rows, got %" PRIu64,
			 KVSCRATCH_MAX_SEQ_LEN, max_seq_len);
}

static int check_dim(const struct kvscratch_plane *plane)
{
	const uint32_t dim = plane->dim;

	if (!dim)
		return set_error(-EINVAL, "dim: expected at least 1, got 0");
	if (plane->dtype == KVSCRATCH_DTYPE_MXINT8 && dim % KVSCRATCH_MX_BLOCK)
		return set_error(-EINVAL, "dim: expected a multiple of %d for mxint8, got %" PRIu32,
				 KVSCRATCH_MX_BLOCK, dim);
	return 0;
}

static int check_label(const struct kvscratch_plane *plane)
{
	char label[KVSCRATCH_LABEL_BYTES + 1] = { 0 }, printable[PRINTABLE_NAME_BYTES];

	if (memchr(plane->label, '\0', sizeof(plane->label)))
		return 0;
	memcpy(label, plane->label, sizeof(plane->label));
	return set_error(-EINVAL, "label: expected at most %d bytes, got \"%s\" without its end",
			 KVSCRATCH_LABEL_BYTES - 1, printable_name(printable, label));
}

static uint32_t larger_element(const struct kvscratch_plane *plane)
{
	uint32_t stored = kvs_dtype_bytes(plane->dtype);
	uint32_t input = kvs_dtype_bytes(plane->input_dtype);

	return stored > input ? stored : input;
}

static int check_new_plane(struct kvscratch_plane *plane)
{
	int err = check_label(plane);

	if (!err)
		err = check_dtypes(plane);
	if (!err)
		err = check_dim(plane);
	if (!err && !kvs_layout_rows(plane))
		err = set_error(-EINVAL, "dim: expected rows of at most %u bytes, got %" PRIu32
				" elements of %" PRIu32, KVSCRATCH_MAX_ROW_BYTES,
				(uint32_t)plane->dim, larger_element(plane));
	return err;
}

int of_plane(int err, uint32_t index)
{
	char words[200];

	snprintf(words, sizeof(words), "%s", kvscratch_error());
	return set_error(err, "plane %" PRIu32 ": %s", index, words);
}

void copy_inputs(struct kvscratch_plane *to, const struct kvscratch_plane *from)
{
	*to = (struct kvscratch_plane){ 0 };
	memcpy(to, from, offsetof(struct kvscratch_plane, offset));
}

int lay_out_planes(struct kvs_layout *layout, struct kvscratch_plane *planes, uint32_t nr_planes,
		   uint64_t max_seq_len)
{
	int err = check_max_seq_len(max_seq_len);

	for (uint32_t i = 0; !err && i < nr_planes; i++) {
		err = check_new_plane(&planes[i]);
		if (err && nr_planes > 1)
			err = of_plane(err, i);
	}
	if (err)
		return err;
	if (!kvs_layout_init(layout, planes, nr_planes, max_seq_len, sysconf(_SC_PAGESIZE)))
		return set_error(-EINVAL, "planes: expected tokens of at most %u bytes over all of "
				 "them, as stored and as appended, got more",
				 KVSCRATCH_MAX_ROW_BYTES);
	return 0;
}

int lay_out(struct kvscratch_info *info, const struct kvscratch_geometry *geometry)
{
	struct kvscratch_plane plane = {
		.dim = geometry->dim,
		.dtype = geometry->dtype,
		.input_dtype = geometry->input_dtype,
		.frac_bits = geometry->frac_bits,
	};
	struct kvs_layout layout;
	struct kvscratch_pad_info pad = { .max_seq_len = geometry->max_seq_len, .nr_planes = 1 };
	int err = lay_out_planes(&layout, &plane, 1, geometry->max_seq_len);

	if (err)
		return err;
	pad.status_offset = layout.status_offset;
	pad.row_bytes = layout.row_bytes;
	pad.input_row_bytes = layout.input_row_bytes;
	describe(info, &pad, &plane);
	return 0;
}

static void describe_plane(struct kvscratch_info *info, const struct kvscratch_plane *plane)
{
	info->dim = plane->dim;
	info->dtype = plane->dtype;
	info->input_dtype = plane->input_dtype;
	info->frac_bits = plane->frac_bits;
	info->nr_arrays = plane->scales_row_bytes ? 2 : 1;
	info->arrays[0].offset = plane->offset;
	info->arrays[0].row_bytes = plane->row_bytes;
	info->arrays[1].offset = plane->scales_offset;
	info->arrays[1].row_bytes = plane->scales_row_bytes;
}

void describe(struct kvscratch_info *info, const struct kvscratch_pad_info *pad,
	      const struct kvscratch_plane *planes)
{
	*info = (struct kvscratch_info){
		.size = sizeof(*info),
		.max_seq_len = pad->max_seq_len,
		.len = pad->len,
		.row_bytes = pad->row_bytes,
		.input_row_bytes = pad->input_row_bytes,
		.generation = pad->generation,
		.trunc_len = pad->trunc_len,
		.data_bytes = pad->max_seq_len * pad->row_bytes,
		.status_offset = pad->status_offset,
		.saturated = pad->saturated,
	};
	if (pad->nr_planes == 1)
		describe_plane(info, planes);
}
