// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads from .npy and safetensors files.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "convert.h"
#include "files.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/*
 * A file may say that its pads have room for more rows than it has: as long as they take so
 * many bytes, or so many times what it has itself.
 */
#define MAX_CLAIM (256ull << 20)
#define MAX_CLAIM_RATIO 64

/* Of the pads of @file, as many as go into the sentence of an error */
static const char *saved_names(const struct kvscratch_file *file, char *list, size_t size)
{
	char printable[PRINTABLE_NAME_BYTES];
	size_t length = 0;

	snprintf(list, size, "none");
	for (unsigned int i = 0; i < file->count; i++) {
		const char *name = printable_name(printable, file->pads[i].name);

		/* that of .npy */
		if (!*name)
			name = "one without a name";
		if (length + strlen(name) + sizeof("  ...") > size) {
			snprintf(list + length, size - length, " ...");
			break;
		}
		length += snprintf(list + length, size - length, "%s%s", i ? " " : "", name);
	}
	return list;
}

static int find_saved(const struct kvscratch_file *file, const char *name,
		      const struct kvscratch_saved_pad **saved)
{
	char printable[PRINTABLE_NAME_BYTES], list[96];

	*saved = file->pads;
	if (!name && file->count == 1)
		return 0;
	if (!name)
		return set_error(-EINVAL, "expected the name of a pad: the file has %u of them, %s",
				 file->count, saved_names(file, list, sizeof(list)));
	for (unsigned int i = 0; i < file->count; i++, (*saved)++)
		if (!strcmp((*saved)->name, name))
			return 0;
	return set_error(-ENOKEY, "expected the name of a pad in the file, which has %s, got \"%s\"",
			 saved_names(file, list, sizeof(list)), printable_name(printable, name));
}

/* Rows */

/**
 * struct batch - rows of a plane on their way from a file into a pad
 * @plane: the plane of the pad
 * @most: how many there may be
 * @elements: as they are stored
 * @scales: theirs, of MXINT8
 * @input: the rows as they are staged
 */
struct batch {
	const struct kvscratch_plane *plane;
	uint64_t most;
	char *elements;
	uint8_t *scales;
	char *input;
};

static void free_batch(struct batch *batch)
{
	free(batch->elements);
	free(batch->scales);
	free(batch->input);
}

static int make_batch(struct batch *batch, const struct kvscratch_plane *plane, uint64_t len)
{
	const uint32_t stored = plane->row_bytes + plane->scales_row_bytes;
	const uint32_t larger = stored > plane->input_row_bytes ? stored : plane->input_row_bytes;
	const uint64_t most = larger < PIECE_BYTES ? PIECE_BYTES / larger : 1;

	*batch = (struct batch){ .plane = plane, .most = most < len ? most : len };
	batch->elements = malloc(batch->most * plane->row_bytes);
	/* some malloc() returns NULL for nothing */
	batch->scales = malloc(batch->most * plane->scales_row_bytes + 1);
	batch->input = malloc(batch->most * plane->input_row_bytes);
	return batch->elements && batch->scales && batch->input ? 0 : out_of_memory();
}

static int read_batch(const struct batch *batch, const struct kvscratch_file *file,
		      const struct place *place, uint64_t first, uint64_t count)
{
	const uint64_t row_bytes = batch->plane->row_bytes;
	const uint64_t scales_bytes = batch->plane->scales_row_bytes;
	int err = read_file_at(file, batch->elements, count * row_bytes,
			       place->elements + first * row_bytes);

	if (err || !scales_bytes)
		return err;
	return read_file_at(file, batch->scales, count * scales_bytes,
			    place->scales + first * scales_bytes);
}

/* Scales are behind the elements of their row. */
static void join_scales(const struct batch *batch, uint64_t count)
{
	const size_t row_bytes = batch->plane->row_bytes;
	const size_t scales_bytes = batch->plane->scales_row_bytes;
	char *to = batch->input;

	for (uint64_t row = 0; row < count; row++) {
		to = mempcpy(to, batch->elements + row * row_bytes, row_bytes);
		to = mempcpy(to, batch->scales + row * scales_bytes, scales_bytes);
	}
}

/*
 * What is to be staged, or NULL: a plane that converts takes no stored rows, but what they
 * came of, or may have.
 */
static const char *make_input(const struct batch *batch, uint64_t count)
{
	const struct kvscratch_plane *plane = batch->plane;

	if (kvs_plane_converts(plane))
		return restore_input(plane, batch->elements,
				     plane->scales_row_bytes ? batch->scales : NULL,
				     count * plane->dim, batch->input) ? batch->input : NULL;
	if (!plane->scales_row_bytes)
		return batch->elements;
	join_scales(batch, count);
	return batch->input;
}

static int fail_input(const struct batch *batch, const char *name)
{
	char words[96];

	snprintf(words, sizeof(words), "expected rows of %s that were made of %s, got others",
		 kvscratch_dtype_name(batch->plane->dtype),
		 kvscratch_dtype_name(batch->plane->input_dtype));
	return fail_about("tensor", name, words);
}

/* A signal ends nothing: who wants that has the progress function. */
#define RESTARTED(call) ({ \
	int _err; \
	do \
		_err = (call); \
	while (_err == -EINTR); \
	_err; \
})

/**
 * struct load - a saved pad on its way into another
 * @file: where it is
 * @saved: what is there
 * @writer: of the pad
 * @len: rows that the pad had before
 * @transfer: who hears of it
 */
struct load {
	const struct kvscratch_file *file;
	const struct kvscratch_saved_pad *saved;
	struct kvscratch *writer;
	uint64_t len;
	struct transfer transfer;
};

static int stage_batch(struct load *load, const struct batch *batch, uint32_t plane,
		       uint64_t first, uint64_t count)
{
	const size_t index = kvscratch_saved_plane(load->saved, plane) - load->file->planes;
	const struct place *place = &load->file->places[index];
	const char *input;
	int err = read_batch(batch, load->file, place, first, count);

	if (err)
		return err;
	input = make_input(batch, count);
	if (!input)
		return fail_input(batch, place->name);
	err = RESTARTED(kvscratch_stage(load->writer, plane, load->len + first, input, count));
	if (err)
		return err;
	return advance_transfer(&load->transfer, count * (batch->plane->row_bytes +
							  batch->plane->scales_row_bytes));
}

static int stage_plane(struct load *load, uint32_t plane)
{
	const uint64_t len = load->saved->len;
	struct batch batch;
	int err = make_batch(&batch, &load->writer->planes[plane], len);

	for (uint64_t first = 0, count; !err && first < len; first += count) {
		count = len - first < batch.most ? len - first : batch.most;
		err = stage_batch(load, &batch, plane, first, count);
	}
	free_batch(&batch);
	return err;
}

/* Nothing is committed before all of it is there. */
static int stage_and_commit(struct load *load)
{
	const uint64_t rows = load->saved->len, most = kvscratch_capacity(load->writer);
	const int64_t len = kvscratch_len(load->writer);
	int err;

	if (len < 0)
		return (int)len;
	if (rows > most - len)
		return fail_room(len, rows, most);
	load->len = len;
	err = begin_transfer(&load->transfer, rows * kvscratch_row_bytes(load->writer));
	for (uint32_t plane = 0; !err && rows && plane < load->saved->nr_planes; plane++)
		err = stage_plane(load, plane);
	if (!err)
		err = RESTARTED(kvscratch_commit(load->writer, len + rows));
	/* it may go on to be the writer of somebody, who is to find nothing staged */
	if (err)
		kvscratch_commit(load->writer, len);
	return err;
}

static int append_saved(struct kvscratch *pad, const struct kvscratch_file *file,
			const struct kvscratch_saved_pad *saved, kvscratch_progress *progress,
			void *context)
{
	struct load load = {
		.file = file,
		.saved = saved,
		.writer = pad,
		.transfer = { .progress = progress, .context = context },
	};
	int err = 0;

	if (!pad->is_writer)
		err = RESTARTED(kvscratch_writer(&load.writer, pad));
	if (err)
		return err;
	err = stage_and_commit(&load);
	if (!pad->is_writer)
		kvscratch_close(load.writer);
	return err;
}

/* What a file says is believed as far as its size goes, or what every machine has. */
static int check_claim(const struct kvscratch_file *file)
{
	if (file->claimed <= MAX_CLAIM || file->claimed / MAX_CLAIM_RATIO <= file->size)
		return 0;
	return set_error(-EINVAL, "expected a max_seq_len: with what the file says its pads would "
			 "take %" PRIu64 " bytes, and it has %" PRIu64, file->claimed, file->size);
}

static int check_rows(const struct kvscratch_saved_pad *saved, uint64_t max_seq_len)
{
	if (!max_seq_len)
		return set_error(-EINVAL, "expected a max_seq_len: the file has no rows and does "
				 "not say it");
	if (max_seq_len < saved->len)
		return set_error(-EINVAL, "max_seq_len: expected at least %" PRIu64 ", the rows in "
				 "the file, got %" PRIu64, saved->len, max_seq_len);
	return 0;
}

int kvscratch_load(struct kvscratch **pad, const struct kvscratch_file *file, const char *name,
		   uint64_t max_seq_len, kvscratch_progress *progress, void *context)
{
	const struct kvscratch_saved_pad *saved;
	struct kvscratch *made;
	int err = find_saved(file, name, &saved);

	if (!err && !max_seq_len) {
		max_seq_len = saved->max_seq_len;
		err = check_claim(file);
	}
	if (!err)
		err = check_rows(saved, max_seq_len);
	if (!err)
		err = kvscratch_new_planes(&made, max_seq_len, saved->planes, saved->nr_planes,
					   saved->tag, sizeof(saved->tag));
	if (err)
		return err;
	err = append_saved(made, file, saved, progress, context);
	if (err)
		kvscratch_close(made);
	else
		*pad = made;
	return err;
}

/* Into a pad that is there */

static int check_plane_fit(const struct kvscratch_plane *plane,
			   const struct kvscratch_plane *saved, bool has_frac_bits)
{
	if (saved->dim != plane->dim)
		return set_error(-EINVAL, "shape mismatch: expected %" PRIu32 " elements, got %"
				 PRIu32, (uint32_t)plane->dim, (uint32_t)saved->dim);
	if (saved->dtype != plane->dtype)
		return set_error(-EINVAL, "dtype: expected %s, got %s",
				 kvscratch_dtype_name(plane->dtype),
				 kvscratch_dtype_name(saved->dtype));
	if (has_frac_bits && saved->frac_bits != plane->frac_bits)
		return set_error(-EINVAL, "fraction bits: expected %" PRIu32 ", got %" PRIu32,
				 (uint32_t)plane->frac_bits, (uint32_t)saved->frac_bits);
	return 0;
}

static int check_label(const char *label, const char *saved)
{
	char expected[PRINTABLE_NAME_BYTES], got[PRINTABLE_NAME_BYTES];

	if (!strcmp(label, saved))
		return 0;
	return set_error(-EINVAL, "label: expected \"%s\", got \"%s\"",
			 printable_name(expected, label), printable_name(got, saved));
}

static int check_fit(const struct kvscratch *pad, const struct kvscratch_saved_pad *saved)
{
	int err = 0;

	if (saved->nr_planes != pad->nr_planes)
		return set_error(-EINVAL, "expected the rows of %" PRIu32 " planes, got those of %"
				 PRIu32, pad->nr_planes, saved->nr_planes);
	for (uint32_t i = 0; !err && i < pad->nr_planes; i++) {
		err = check_plane_fit(&pad->planes[i], kvscratch_saved_plane(saved, i),
				      saved->has_geometry);
		/* a plane that is alone may have got its name later */
		if (!err && pad->nr_planes > 1)
			err = check_label(pad->planes[i].label,
					  kvscratch_saved_plane(saved, i)->label);
		if (err && pad->nr_planes > 1)
			err = of_plane(err, i);
	}
	return err;
}

/* Rows of another model are worth nothing beside those of this one. */
static int check_tag(struct kvscratch *pad, const struct kvscratch_saved_pad *saved)
{
	static const uint8_t none[KVSCRATCH_TAG_BYTES];
	struct kvscratch_pad_info info;
	int err = kvscratch_pad_info(pad, &info);

	if (err || !memcmp(saved->tag, none, sizeof(none)) ||
	    !memcmp(info.tag, none, sizeof(none)) ||
	    !memcmp(info.tag, saved->tag, sizeof(info.tag)))
		return err;
	return set_error(-EINVAL, "tag: expected the one of the pad, got another");
}

int kvscratch_load_into(struct kvscratch *pad, const struct kvscratch_file *file, const char *name,
			kvscratch_progress *progress, void *context)
{
	const struct kvscratch_saved_pad *saved;
	int err = find_saved(file, name, &saved);

	if (!err)
		err = check_fit(pad, saved);
	if (!err)
		err = check_tag(pad, saved);
	return err ? err : append_saved(pad, file, saved, progress, context);
}
