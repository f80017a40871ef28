// SPDX-License-Identifier: GPL-2.0-only
/*
 * append: rows from files or a pipe.
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
 * struct target - where rows go: a plane, or all of them as one
 * @dim: elements per row, over all planes
 * @dtype: what is appended; 0 where planes take several
 * @row_bytes: bytes per row, likewise
 * @rows: that fit behind those that are there
 */
struct target {
	uint32_t dim;
	uint32_t dtype;
	uint32_t row_bytes;
	uint64_t rows;
};

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

static int open_input(struct input *input, const struct arguments *args, const char *file,
		      uint64_t limit)
{
	struct progress progress = progress_start(args, "reading");
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
static int check_unknown(const struct input *input, const struct target *target)
{
	const char *found = container_name(input->bytes, input->size);
	bool single_bytes = target->row_bytes < 2 * target->dim;

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

static int check_npy_shape(const struct input *input, const struct target *target,
			   const struct npy_array *array, uint64_t *rows)
{
	uint64_t dim = array->ndim ? array->shape[array->ndim - 1] : 0;

	if (array->ndim != 1 && array->ndim != 2)
		return fail(EXIT_INPUT, "%s: expected an array of [rows, %" PRIu32
			    "], got %u dimensions", input->name, (uint32_t)target->dim, array->ndim);
	if (dim != target->dim)
		return fail_shape(input, target->dim, dim);
	*rows = array->ndim == 2 ? array->shape[0] : 1;
	if (array->fortran_order && *rows > 1 && dim > 1)
		return fail(EXIT_INPUT, "%s: expected rows in C order, got Fortran order",
			    input->name);
	return 0;
}

static int check_npy(struct input *input, const struct target *target)
{
	struct npy_array array;
	const char *error = npy_parse_header(input->bytes, input->size, &array);
	uint64_t rows = 0, bytes;
	int err;

	if (error)
		return fail(EXIT_INPUT, "%s: %s", input->name, error);
	if (!target->dtype)
		return fail(EXIT_INPUT, "%s: expected raw tokens, for the planes take several dtypes, "
			    "got .npy: --plane takes one for each", input->name);
	if (array.dtype != target->dtype)
		return fail(EXIT_INPUT, "%s: dtype mismatch: expected %s, got \"%s\"%s%s",
			    input->name, kvscratch_dtype_name(target->dtype), array.descr,
			    array.dtype ? " = " : "",
			    array.dtype ? kvscratch_dtype_name(array.dtype) : "");
	err = check_npy_shape(input, target, &array, &rows);
	if (err)
		return err;
	input->offset = array.data_offset;
	bytes = input->size - input->offset;
	if (bytes % target->row_bytes || bytes / target->row_bytes != rows)
		return fail(EXIT_INPUT, "%s: expected %" PRIu64 " rows of %" PRIu32
			    " bytes behind the header, got %" PRIu64 " bytes", input->name, rows,
			    (uint32_t)target->row_bytes, bytes);
	return 0;
}

static int check_raw(const struct input *input, const struct target *target)
{
	uint32_t rest = input->size % target->row_bytes;
	uint32_t element = target->row_bytes / target->dim;

	if (!rest)
		return 0;
	/* stored MXINT8 rows have scales besides elements, and planes elements of several sizes */
	if (target->dtype && target->dtype != KVSCRATCH_DTYPE_MXINT8 && !(rest % element))
		return fail_shape(input, target->dim, rest / element);
	return fail(EXIT_INPUT, "%s: expected rows of %" PRIu32 " bytes, got %zu rows and %" PRIu32
		    " bytes", input->name, (uint32_t)target->row_bytes,
		    input->size / target->row_bytes, rest);
}

/* All of the input, but for what is as long as @limit and longer */
static int check_input(const struct arguments *args, struct input *input,
		       const struct target *target, uint64_t limit)
{
	bool npy = args->format == FORMAT_NPY ||
		   (args->format == FORMAT_AUTO && looks_like_npy(input));

	if (!npy && args->format == FORMAT_AUTO) {
		int err = check_unknown(input, target);

		if (err)
			return err;
	}
	if (input->size == limit)
		return fail(EXIT_INPUT, "%s: expected less than %" PRIu64
			    " bytes for what is left of the pad, got more", input->name, limit);
	return npy ? check_npy(input, target) : check_raw(input, target);
}

static struct target target_of_plane(const struct kvscratch_plane *plane, uint64_t rows)
{
	return (struct target){
		.dim = plane->dim,
		.dtype = plane->input_dtype,
		.row_bytes = plane->input_row_bytes,
		.rows = rows,
	};
}

/* A row of each plane in turn is like one of a plane that has all of them. */
static struct target target_of_all(const struct kvscratch *pad, uint64_t rows)
{
	struct target all = target_of_plane(kvscratch_plane(pad, 0), rows);

	for (uint32_t i = 1; i < kvscratch_nr_planes(pad); i++) {
		const struct kvscratch_plane *plane = kvscratch_plane(pad, i);

		all.dim += plane->dim;
		all.row_bytes += plane->input_row_bytes;
		if (plane->input_dtype != all.dtype)
			all.dtype = 0;
	}
	return all;
}

/* Read rows for @target and check them. */
static int take_input(struct input *input, const struct arguments *args, const char *file,
		      const struct target *target)
{
	const uint64_t limit = target->rows * target->row_bytes + HEADER_ROOM;
	int err = open_input(input, args, file, limit);

	return err ? err : check_input(args, input, target, limit);
}

static uint64_t rows_of(const struct input *input, const struct target *target)
{
	return (input->size - input->offset) / target->row_bytes;
}

/* One append where the pad takes that many bytes at once; else as few as can be. */
static int append_input(const struct arguments *args, const struct input *input,
			struct kvscratch *pad, const struct target *target)
{
	const uint64_t most = KVSCRATCH_MAX_WRITE / target->row_bytes;
	const uint64_t rows = rows_of(input, target), max = kvscratch_capacity(pad);
	const char *at = input->bytes + input->offset;
	uint64_t done = 0;

	/* here and not by the library: an earlier part of them would stay */
	if (rows > most && rows > target->rows)
		return fail(EXIT_INPUT, "Scratchpad overflow: %" PRIu64 " + %" PRIu64 " > %" PRIu64
			    " max", max - target->rows, rows, max);
	while (done < rows) {
		uint64_t batch = rows - done < most ? rows - done : most;
		int err = kvscratch_append_tokens(pad, at, batch, target->row_bytes);

		if (err && done)
			return fail(EXIT_SYSTEM, "appended %" PRIu64 " of %" PRIu64 " rows, then: %s",
				    done, rows, kvscratch_error());
		if (err)
			return fail_pad(args, err);
		at += batch * target->row_bytes;
		done += batch;
	}
	return 0;
}

static int append_tokens(const struct arguments *args, struct kvscratch *pad, uint64_t room)
{
	const struct target target = target_of_all(pad, room);
	struct input input = { 0 };
	int err = take_input(&input, args, args->argument, &target);

	if (!err)
		err = append_input(args, &input, pad, &target);
	free(input.bytes);
	return err;
}

/* Planes one by one */

/* "k0=rows.npy" */
static int split_value(const struct kvscratch *pad, const char *value, uint32_t *plane,
		       const char **file)
{
	const char *equals = strchr(value, '=');
	char name[64];

	if (!equals || !equals[1])
		return fail(EXIT_INPUT, "--plane: expected PLANE=FILE, got \"%s\"", value);
	/* what was cut is still too long for a label */
	snprintf(name, sizeof(name), "%.*s", (int)(equals - value), value);
	*file = equals + 1;
	return find_plane(pad, name, plane);
}

/* @files has the file of each plane. */
static int sort_values(const struct arguments *args, const struct kvscratch *pad,
		       const char **files)
{
	for (unsigned int i = 0; i < args->nr_plane_values; i++) {
		const char *file = NULL;
		uint32_t plane = 0;
		int err = split_value(pad, args->plane_values[i], &plane, &file);

		if (err)
			return err;
		if (files[plane])
			return fail(EXIT_INPUT, "--plane: expected one file for each, got \"%s\" and "
				    "\"%s\"", files[plane], file);
		files[plane] = file;
	}
	for (uint32_t i = 0; i < kvscratch_nr_planes(pad); i++)
		if (!files[i])
			return fail(EXIT_INPUT, "--plane: expected a file for each of %" PRIu32
				    " planes, got none for plane %" PRIu32 "%s%.*s%s",
				    kvscratch_nr_planes(pad), i,
				    *kvscratch_plane(pad, i)->label ? ", \"" : "",
				    KVSCRATCH_LABEL_BYTES, kvscratch_plane(pad, i)->label,
				    *kvscratch_plane(pad, i)->label ? "\"" : "");
	return 0;
}

/* Stage the rows of a plane; *@rows, 0 before the first, is how many each one has. */
static int stage_plane(const struct arguments *args, struct kvscratch *writer, uint32_t index,
		       const char *file, uint64_t len, uint64_t *rows)
{
	const struct target target = target_of_plane(kvscratch_plane(writer, index),
						     kvscratch_capacity(writer) - len);
	struct input input = { 0 };
	int err = take_input(&input, args, file, &target);
	uint64_t count = err ? 0 : rows_of(&input, &target);

	if (!err && index && count != *rows)
		err = fail(EXIT_INPUT, "%s: expected %" PRIu64 " rows, as of plane 0, got %" PRIu64,
			   input.name, *rows, count);
	*rows = count;
	if (!err && count) {
		err = kvscratch_stage(writer, index, len, input.bytes + input.offset, count);
		if (err)
			err = fail_pad(args, err);
	}
	free(input.bytes);
	return err;
}

static int stage_all(const struct arguments *args, struct kvscratch *writer, const char **files)
{
	struct kvscratch_pad_info info;
	uint64_t rows = 0;
	int err = kvscratch_pad_info(writer, &info);

	if (err)
		return fail_pad(args, err);
	for (uint32_t i = 0; !err && i < info.nr_planes; i++)
		err = stage_plane(args, writer, i, files[i], info.len, &rows);
	if (!err) {
		err = kvscratch_commit(writer, info.len + rows);
		return err ? fail_pad(args, err) : 0;
	}
	/* drop what is staged, for the writer may live on */
	kvscratch_commit(writer, info.len);
	return err;
}

/* A descriptor may be the writer already: then it can commit, the present len to begin with. */
static bool is_writer(struct kvscratch *pad)
{
	int64_t len = kvscratch_len(pad);

	return len >= 0 && !kvscratch_commit(pad, len);
}

static int append_planes(const struct arguments *args, struct kvscratch *pad)
{
	const char **files = calloc(kvscratch_nr_planes(pad), sizeof(*files));
	struct kvscratch *writer = NULL;
	int err;

	if (!files)
		return fail(EXIT_SYSTEM, "out of memory");
	err = sort_values(args, pad, files);
	if (!err && is_writer(pad)) {
		err = stage_all(args, pad, files);
	} else if (!err) {
		err = kvscratch_writer(&writer, pad);
		err = err ? fail_pad(args, err) : stage_all(args, writer, files);
		kvscratch_close(writer);
	}
	free(files);
	return err;
}

static int append_to(const struct arguments *args, struct kvscratch *pad)
{
	struct kvscratch_pad_info info;
	int err;

	if (args->nr_plane_values)
		return append_planes(args, pad);
	err = kvscratch_pad_info(pad, &info);
	return err ? fail_pad(args, err) : append_tokens(args, pad, info.max_seq_len - info.len);
}

int run_append(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (args->format == FORMAT_TEXT)
		return fail(EXIT_INPUT, "--format: expected raw or npy, got \"text\"");
	if (args->argument && args->nr_plane_values)
		return fail(EXIT_INPUT, "expected either --plane or FILE, got both");
	if (!args->name && args->fd == STDIN_FILENO && is_dash(args->argument))
		return fail(EXIT_INPUT, "--fd: expected another descriptor than that of the input");
	err = open_pad(args, O_WRONLY, &pad);
	if (err)
		return err;
	err = append_to(args, pad);
	kvscratch_close(pad);
	return err;
}
