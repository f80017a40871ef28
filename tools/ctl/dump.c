// SPDX-License-Identifier: GPL-2.0-only
/*
 * dump: the rows of a pad, to a file or stdout.
 */
#define _FILE_OFFSET_BITS 64
#include "../interrupt.h"
#include "ctl.h"
#include "npy.h"
#include "output.h"
#include "progress.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/* .npy has no scales: MXINT8 becomes f32, which holds what was converted, fractions f64. */
static uint32_t npy_dtype(const struct kvscratch_plane *plane)
{
	if (plane->dtype == KVSCRATCH_DTYPE_MXINT8)
		return KVSCRATCH_DTYPE_F32;
	return plane->frac_bits ? KVSCRATCH_DTYPE_F64 : plane->dtype;
}

static void write_npy_row(const struct kvscratch_plane *plane, const char *row)
{
	if (npy_dtype(plane) == plane->dtype) {
		fwrite(row, plane->row_bytes, 1, stdout);
		return;
	}
	for (uint32_t i = 0; i < plane->dim; i++) {
		double wide = scaled_value(plane, row, i);
		float narrow = (float)wide;

		if (npy_dtype(plane) == KVSCRATCH_DTYPE_F64)
			fwrite(&wide, sizeof(wide), 1, stdout);
		else
			fwrite(&narrow, sizeof(narrow), 1, stdout);
	}
}

static void write_head(enum format format, const struct selection *selection, uint64_t len)
{
	const struct kvscratch_plane *plane = selection->planes;
	char header[NPY_HEADER_BYTES];

	if (format == FORMAT_NPY) {
		size_t bytes = npy_write_header(header, len, plane->dim, npy_dtype(plane));

		fwrite(header, 1, bytes, stdout);
	}
	if (format == FORMAT_JSON)
		putchar('[');
}

/* Of several planes a list of the rows of each */
static void write_json_row(const struct selection *selection, const char *row)
{
	if (selection->count > 1)
		putchar('[');
	for (uint32_t i = 0; i < selection->count; i++) {
		if (i)
			fputs(", ", stdout);
		print_json_row(&selection->planes[i], row);
		row += stored_row_bytes(&selection->planes[i]);
	}
	if (selection->count > 1)
		putchar(']');
}

static void write_row(enum format format, const struct selection *selection, const char *row,
		      bool first)
{
	switch (format) {
	case FORMAT_NPY:
		write_npy_row(selection->planes, row);
		break;
	case FORMAT_RAW:
		fwrite(row, selection->row_bytes, 1, stdout);
		break;
	case FORMAT_JSON:
		if (!first)
			fputs(",\n ", stdout);
		write_json_row(selection, row);
		break;
	default:
		print_selected_row(selection, row, "");
	}
}

static int write_dump(const struct arguments *args, const struct selection *selection,
		      const char *rows, uint64_t len)
{
	struct progress progress = progress_start(args, "writing");
	const uint64_t row_bytes = selection->row_bytes;

	write_head(args->format, selection, len);
	for (uint64_t row = 0; row < len && !ferror(stdout) && !interrupted(); row++) {
		write_row(args->format, selection, rows + row * row_bytes, !row);
		progress_at(&progress, row * row_bytes, len * row_bytes);
	}
	if (args->format == FORMAT_JSON)
		puts("]");
	progress_end(&progress);
	return finish_output();
}

/* All committed rows of one moment; *@len says how many. */
static int copy_rows(const struct arguments *args, struct kvscratch *pad,
		     const struct selection *selection, char **copy, uint64_t *len)
{
	int err;

	*copy = NULL;
	do {
		int64_t got = kvscratch_len(pad);

		err = got < 0 ? (int)got : 0;
		if (!err) {
			uint64_t bytes = got * (uint64_t)selection->row_bytes;
			/* 0 bytes make a pointer, too */
			char *more = bytes < SIZE_MAX ? realloc(*copy, bytes + 1) : NULL;

			if (!more) {
				free(*copy);
				return fail(EXIT_SYSTEM, "out of memory for %llu bytes",
					    (unsigned long long)bytes);
			}
			*copy = more;
			*len = got;
			err = copy_selected(pad, selection, 0, got, *copy);
		}
		/* a truncate came in between: there are not that many any more */
	} while (err == -EINVAL);
	if (!err)
		return 0;
	free(*copy);
	return fail_pad(args, err);
}

static int check_dump(const struct arguments *args, const struct selection *selection)
{
	const struct kvscratch_plane *plane = selection->planes;
	char header[NPY_HEADER_BYTES];

	if (args->format != FORMAT_NPY)
		return 0;
	if (selection->count > 1)
		return fail(EXIT_INPUT, "--format: .npy has one array: expected --plane with it");
	if (!npy_write_header(header, 0, plane->dim, npy_dtype(plane)))
		return fail(EXIT_INPUT, "--format: .npy has no type for %s; expected text, raw or "
			    "json", kvscratch_dtype_name(plane->dtype));
	return 0;
}

static int dump(const struct arguments *args, struct kvscratch *pad)
{
	struct selection selection;
	struct output output;
	uint64_t len = 0;
	char *rows;
	int err = select_planes(args, pad, &selection);

	if (!err)
		err = check_dump(args, &selection);
	if (!err)
		err = copy_rows(args, pad, &selection, &rows, &len);
	if (err)
		return err;
	/* only now: an error before this leaves also what is no file as it was */
	err = begin_output(args->output, &output);
	if (!err)
		err = end_output(args->output, &output, write_dump(args, &selection, rows, len));
	free(rows);
	return err;
}

int run_dump(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (given(args, OPT_FORMAT) && given(args, OPT_JSON))
		return fail(EXIT_INPUT, "expected either --format or --json, got both");
	err = open_pad(args, O_RDONLY, &pad);
	if (err)
		return err;
	err = dump(args, pad);
	kvscratch_close(pad);
	return err;
}
