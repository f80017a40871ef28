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
static uint32_t npy_dtype(const struct kvscratch_info *info)
{
	if (info->dtype == KVSCRATCH_DTYPE_MXINT8)
		return KVSCRATCH_DTYPE_F32;
	return info->frac_bits ? KVSCRATCH_DTYPE_F64 : info->dtype;
}

static void write_npy_row(const struct kvscratch_info *info, const char *row)
{
	if (npy_dtype(info) == info->dtype) {
		fwrite(row, info->row_bytes, 1, stdout);
		return;
	}
	for (uint32_t i = 0; i < info->dim; i++) {
		double wide = scaled_value(info, row, i);
		float narrow = (float)wide;

		if (npy_dtype(info) == KVSCRATCH_DTYPE_F64)
			fwrite(&wide, sizeof(wide), 1, stdout);
		else
			fwrite(&narrow, sizeof(narrow), 1, stdout);
	}
}

static void write_head(enum format format, const struct kvscratch_info *info)
{
	char header[NPY_HEADER_BYTES];

	if (format == FORMAT_NPY) {
		size_t bytes = npy_write_header(header, info->len, info->dim, npy_dtype(info));

		fwrite(header, 1, bytes, stdout);
	}
	if (format == FORMAT_JSON)
		putchar('[');
}

static void write_row(enum format format, const struct kvscratch_info *info, const char *row,
		      bool first)
{
	switch (format) {
	case FORMAT_NPY:
		write_npy_row(info, row);
		break;
	case FORMAT_RAW:
		fwrite(row, info->row_bytes, 1, stdout);
		break;
	case FORMAT_JSON:
		if (!first)
			fputs(",\n ", stdout);
		print_json_row(info, row);
		break;
	default:
		print_row(info, row);
	}
}

static int write_dump(const struct arguments *args, const struct kvscratch_info *info,
		      const char *rows)
{
	struct progress progress = progress_start(args, "writing");

	write_head(args->format, info);
	for (uint64_t row = 0; row < info->len && !ferror(stdout) && !interrupted(); row++) {
		write_row(args->format, info, rows + row * info->row_bytes, !row);
		progress_at(&progress, row * info->row_bytes, info->len * info->row_bytes);
	}
	if (args->format == FORMAT_JSON)
		puts("]");
	progress_end(&progress);
	return finish_output();
}

/* All committed rows of one moment; info->len says how many. */
static int copy_rows(const struct arguments *args, struct kvscratch *pad,
		     struct kvscratch_info *info, char **copy)
{
	int err;

	*copy = NULL;
	do {
		err = kvscratch_info(pad, info);
		if (!err) {
			uint64_t bytes = info->len * info->row_bytes;
			/* 0 bytes make a pointer, too */
			char *more = bytes < SIZE_MAX ? realloc(*copy, bytes + 1) : NULL;

			if (!more) {
				free(*copy);
				return fail(EXIT_SYSTEM, "out of memory for %llu bytes",
					    (unsigned long long)bytes);
			}
			*copy = more;
			err = kvscratch_copy_rows(pad, 0, info->len, *copy);
		}
		/* a truncate came in between: there are not that many any more */
	} while (err == -EINVAL);
	if (!err)
		return 0;
	free(*copy);
	return fail_pad(args, err);
}

static int check_dump(const struct arguments *args, struct kvscratch *pad)
{
	char header[NPY_HEADER_BYTES];
	struct kvscratch_info info;
	int err = kvscratch_info(pad, &info);

	if (err)
		return fail_pad(args, err);
	if (args->format == FORMAT_NPY && !npy_write_header(header, 0, info.dim, npy_dtype(&info)))
		return fail(EXIT_INPUT, "--format: .npy has no type for %s; expected text, raw or "
			    "json", kvscratch_dtype_name(info.dtype));
	return 0;
}

static int dump(const struct arguments *args, struct kvscratch *pad)
{
	struct kvscratch_info info;
	struct output output;
	char *rows;
	int err = check_dump(args, pad);

	if (!err)
		err = copy_rows(args, pad, &info, &rows);
	if (err)
		return err;
	/* only now: an error before this leaves also what is no file as it was */
	err = begin_output(args->output, &output);
	if (!err)
		err = end_output(args->output, &output, write_dump(args, &info, rows));
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
