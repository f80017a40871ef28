// SPDX-License-Identifier: GPL-2.0-only
/*
 * append: rows from a file or a pipe.
 */
#define _FILE_OFFSET_BITS 64
#include "container.h"
#include "ctl.h"
#include "npy.h"
#include "progress.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/**
 * struct input - what is to be appended, all of it in memory
 * @name: where it came from
 * @bytes: all of it, header included
 * @size: how much that is
 * @offset: where the rows begin
 */
struct input {
	const char *name;
	char *bytes;
	size_t size;
	size_t offset;
};

/* A .npy header is at most 64 KiB long in version 1 and hardly ever longer. */
#define HEADER_ROOM (1 << 20)

/* More room, up to @limit bytes */
static int grow_input(struct input *input, size_t *room, uint64_t limit)
{
	uint64_t more = *room ? 2 * (uint64_t)*room : 65536;
	char *bytes;

	if (more > limit)
		more = limit;
	bytes = more > SIZE_MAX ? NULL : realloc(input->bytes, more);
	if (!bytes)
		return fail(EXIT_SYSTEM, "%s: out of memory for %" PRIu64 " bytes", input->name,
			    more);
	input->bytes = bytes;
	*room = more;
	return 0;
}

/* Of a pipe nobody knows; then it is 0. */
static uint64_t expected_size(int fd)
{
	struct stat status;

	return !fstat(fd, &status) && S_ISREG(status.st_mode) ? status.st_size : 0;
}

/* Read to the end, but not more than @limit bytes: an input may have no end. */
static int read_input(struct input *input, int fd, uint64_t limit, struct progress *progress)
{
	const uint64_t expected = expected_size(fd);
	size_t room = 0;

	for (;;) {
		ssize_t got;

		if (input->size == limit)
			return 0;
		if (input->size == room && grow_input(input, &room, limit))
			return EXIT_SYSTEM;
		got = read(fd, input->bytes + input->size, room - input->size);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return fail(EXIT_INPUT, "%s: cannot read: %s", input->name,
				    strerror(errno));
		if (!got)
			return 0;
		input->size += got;
		if (input->size <= expected)
			progress_at(progress, input->size, expected);
	}
}

static int open_input(struct input *input, const struct arguments *args, uint64_t limit)
{
	struct progress progress = progress_start(args, "reading");
	const char *file = args->argument;
	int fd = STDIN_FILENO;
	int err;

	*input = (struct input){ .name = "stdin" };
	if (!is_dash(file)) {
		input->name = file;
		fd = open(file, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			return fail(EXIT_INPUT, "%s: cannot open: %s", file, strerror(errno));
	}
	err = read_input(input, fd, limit, &progress);
	progress_end(&progress);
	if (fd != STDIN_FILENO)
		close(fd);
	return err;
}

static bool looks_like_npy(const struct input *input)
{
	return input->size >= NPY_MAGIC_BYTES && !memcmp(input->bytes, NPY_MAGIC, NPY_MAGIC_BYTES);
}

/* By its name, for text that may be rows of single bytes */
static bool is_called_text(const char *name)
{
	static const char *const endings[] = { ".csv", ".tsv", ".txt", ".json", ".html", ".md" };
	const char *dot = strrchr(name, '.');

	for (size_t i = 0; dot && i < ARRAY_SIZE(endings); i++)
		if (!strcasecmp(dot, endings[i]))
			return true;
	return false;
}

/* What nobody asked to have taken for rows is not, if it looks like something else. */
static int check_unknown(const struct input *input, const struct kvscratch_info *info)
{
	const char *found = container_name(input->bytes, input->size);
	bool single_bytes = info->input_row_bytes < 2 * info->dim;

	if (!found && (!single_bytes || is_called_text(input->name)) &&
	    is_text(input->bytes, input->size))
		found = "text";
	if (!found)
		return 0;
	return fail(EXIT_INPUT, "%s: expected .npy or raw rows, got %s: %s, and --format raw takes "
		    "it as rows", input->name, found, found == safetensors_name ?
		    "kvscratchctl load reads that" : "convert it to .npy");
}

static int fail_shape(const struct input *input, uint64_t expected, uint64_t got)
{
	return fail(EXIT_INPUT, "%s: shape mismatch: expected %" PRIu64 " elements, got %" PRIu64,
		    input->name, expected, got);
}

static int check_npy_shape(const struct input *input, const struct kvscratch_info *info,
			   const struct npy_array *array, uint64_t *rows)
{
	uint64_t dim = array->ndim ? array->shape[array->ndim - 1] : 0;

	if (array->ndim != 1 && array->ndim != 2)
		return fail(EXIT_INPUT, "%s: expected an array of [rows, %" PRIu32
			    "], got %u dimensions", input->name, (uint32_t)info->dim, array->ndim);
	if (dim != info->dim)
		return fail_shape(input, info->dim, dim);
	*rows = array->ndim == 2 ? array->shape[0] : 1;
	if (array->fortran_order && *rows > 1 && dim > 1)
		return fail(EXIT_INPUT, "%s: expected rows in C order, got Fortran order",
			    input->name);
	return 0;
}

static int check_npy(struct input *input, const struct kvscratch_info *info)
{
	struct npy_array array;
	const char *error = npy_parse_header(input->bytes, input->size, &array);
	uint64_t rows = 0, bytes;
	int err;

	if (error)
		return fail(EXIT_INPUT, "%s: %s", input->name, error);
	if (array.dtype != info->input_dtype)
		return fail(EXIT_INPUT, "%s: dtype mismatch: expected %s, got \"%s\"%s%s",
			    input->name, kvscratch_dtype_name(info->input_dtype), array.descr,
			    array.dtype ? " = " : "",
			    array.dtype ? kvscratch_dtype_name(array.dtype) : "");
	err = check_npy_shape(input, info, &array, &rows);
	if (err)
		return err;
	input->offset = array.data_offset;
	bytes = input->size - input->offset;
	if (bytes % info->input_row_bytes || bytes / info->input_row_bytes != rows)
		return fail(EXIT_INPUT, "%s: expected %" PRIu64 " rows of %" PRIu32
			    " bytes behind the header, got %" PRIu64 " bytes", input->name, rows,
			    (uint32_t)info->input_row_bytes, bytes);
	return 0;
}

static int check_raw(const struct input *input, const struct kvscratch_info *info)
{
	uint32_t rest = input->size % info->input_row_bytes;
	uint32_t element = info->input_row_bytes / info->dim;

	if (!rest)
		return 0;
	/* stored MXINT8 rows have scales besides elements */
	if (!(rest % element) && info->input_dtype != KVSCRATCH_DTYPE_MXINT8)
		return fail_shape(input, info->dim, rest / element);
	return fail(EXIT_INPUT, "%s: expected rows of %" PRIu32 " bytes, got %zu rows and %" PRIu32
		    " bytes", input->name, (uint32_t)info->input_row_bytes,
		    input->size / info->input_row_bytes, rest);
}

/* All of the input, but for what is as long as @limit and longer */
static int check_input(const struct arguments *args, struct input *input,
		       const struct kvscratch_info *info, uint64_t limit)
{
	bool npy = args->format == FORMAT_NPY ||
		   (args->format == FORMAT_AUTO && looks_like_npy(input));

	if (!npy && args->format == FORMAT_AUTO) {
		int err = check_unknown(input, info);

		if (err)
			return err;
	}
	if (input->size == limit)
		return fail(EXIT_INPUT, "%s: expected less than %" PRIu64
			    " bytes for what is left of the pad, got more", input->name, limit);
	return npy ? check_npy(input, info) : check_raw(input, info);
}

/* One append where the pad takes that many bytes at once; else as few as can be. */
static int append_input(const struct arguments *args, const struct input *input,
			struct kvscratch *pad, const struct kvscratch_info *info)
{
	const uint64_t most = KVSCRATCH_MAX_WRITE / info->input_row_bytes;
	const uint64_t rows = (input->size - input->offset) / info->input_row_bytes;
	const char *at = input->bytes + input->offset;
	uint64_t done = 0;

	/* here and not by the library: an earlier part of them would stay */
	if (rows > most && rows > info->max_seq_len - info->len)
		return fail(EXIT_INPUT, "Scratchpad overflow: %" PRIu64 " + %" PRIu64 " > %" PRIu64
			    " max", (uint64_t)info->len, rows, (uint64_t)info->max_seq_len);
	while (done < rows) {
		uint64_t batch = rows - done < most ? rows - done : most;
		int err = kvscratch_append_rows(pad, at, batch, info->dim);

		if (err && done)
			return fail(EXIT_SYSTEM, "appended %" PRIu64 " of %" PRIu64 " rows, then: %s",
				    done, rows, kvscratch_error());
		if (err)
			return fail_pad(args, err);
		at += batch * info->input_row_bytes;
		done += batch;
	}
	return 0;
}

static int append_to(const struct arguments *args, struct kvscratch *pad)
{
	struct kvscratch_info info;
	struct input input;
	uint64_t limit;
	int err = kvscratch_info(pad, &info);

	if (err)
		return fail_pad(args, err);
	limit = (info.max_seq_len - info.len) * info.input_row_bytes + HEADER_ROOM;
	err = open_input(&input, args, limit);
	if (!err)
		err = check_input(args, &input, &info, limit);
	if (!err)
		err = append_input(args, &input, pad, &info);
	free(input.bytes);
	return err;
}

int run_append(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (args->format == FORMAT_TEXT)
		return fail(EXIT_INPUT, "--format: expected raw or npy, got \"text\"");
	if (!args->name && args->fd == STDIN_FILENO && is_dash(args->argument))
		return fail(EXIT_INPUT, "--fd: expected another descriptor than that of the input");
	err = open_pad(args, O_WRONLY, &pad);
	if (err)
		return err;
	err = append_to(args, pad);
	kvscratch_close(pad);
	return err;
}
