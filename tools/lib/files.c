// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads in .npy and safetensors files.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "backend.h"
#include "container.h"
#include "convert.h"
#include "npy.h"
#include "output.h"
#include "safetensors.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* How much is moved between two calls of a progress function, and a buffer of it */
#define PIECE_BYTES (4u << 20)
/* More than any header of .npy version 1 has: NumPy itself reads no longer ones */
#define MAX_NPY_HEADER (128u << 10)
/*
 * A file may say that its pads have room for more rows than it has: as long as they take so
 * many bytes, or so many times what it has itself.
 */
#define MAX_CLAIM (256ull << 20)
#define MAX_CLAIM_RATIO 64
/* How often pads may be truncated while they are saved */
#define MAX_ATTEMPTS 8

/* Keys of __metadata__; all but the first follow the name of a pad and a dot. */
#define KEY_VERSION "kvscratch"
#define KEY_MAX_SEQ_LEN "max_seq_len"
#define KEY_DTYPE "dtype"
#define KEY_INPUT_DTYPE "input_dtype"
#define KEY_FRAC_BITS "frac_bits"
#define FORMAT_VERSION "1"

/* Names the second tensor of an MXINT8 pad */
#define SCALES_SUFFIX ".scales"

static int check_byte_order(void)
{
	if (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
		return 0;
	return set_error(-EOPNOTSUPP, "safetensors files are little-endian, this machine is not");
}

/* Progress */

struct transfer {
	kvscratch_progress *progress;
	void *context;
	uint64_t done;
	uint64_t total;
};

static int advance(struct transfer *transfer, uint64_t bytes)
{
	transfer->done += bytes;
	if (!transfer->progress ||
	    !transfer->progress(transfer->context, transfer->done, transfer->total))
		return 0;
	return set_error(-ECANCELED, "canceled after %" PRIu64 " of %" PRIu64 " bytes",
			 transfer->done, transfer->total);
}

static int begin_transfer(struct transfer *transfer, uint64_t total)
{
	transfer->done = 0;
	transfer->total = total;
	return advance(transfer, 0);
}

/* Saving */

/* Strings that live as long as what is made of them */
struct strings {
	char **strings;
	size_t count;
	bool failed;
};

static const char *keep(struct strings *strings, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static const char *keep(struct strings *strings, const char *format, ...)
{
	va_list arguments;
	char *string;

	va_start(arguments, format);
	if (vasprintf(&string, format, arguments) < 0)
		string = NULL;
	va_end(arguments);
	if (string)
		strings->strings[strings->count++] = string;
	else
		strings->failed = true;
	return string;
}

static void free_strings(struct strings *strings)
{
	while (strings->count)
		free(strings->strings[--strings->count]);
	free(strings->strings);
}

/* Of one pad: for the keys of its metadata, two of the values, and a second tensor */
#define STRINGS_PER_PAD 7
#define ENTRIES_PER_PAD 4

/**
 * struct saving - pads on their way into a file
 * @pads: the pads
 * @count: how many
 * @moments: the rows of each at its moment
 * @contents: what the header of a safetensors file says
 * @data: where the bytes of each of its tensors are
 * @strings: for @contents
 * @header: what the file begins with
 * @header_bytes: how long that is
 */
struct saving {
	const struct kvscratch_named_pad *pads;
	unsigned int count;
	struct kvscratch_tensor *moments;
	struct safetensors contents;
	const void **data;
	struct strings strings;
	char *header;
	size_t header_bytes;
};

static int begin_saving(struct saving *saving, const struct kvscratch_named_pad *pads,
			unsigned int count)
{
	*saving = (struct saving){ .pads = pads, .count = count };
	saving->moments = calloc(count, sizeof(*saving->moments));
	saving->contents.tensors = calloc(count, 2 * sizeof(*saving->contents.tensors));
	saving->data = calloc(count, 2 * sizeof(*saving->data));
	saving->contents.metadata = calloc(count + 1ul, ENTRIES_PER_PAD *
					   sizeof(*saving->contents.metadata));
	saving->strings.strings = calloc(count, STRINGS_PER_PAD * sizeof(char *));
	if (!saving->moments || !saving->contents.tensors || !saving->data ||
	    !saving->contents.metadata || !saving->strings.strings)
		return out_of_memory();
	return 0;
}

static void end_saving(struct saving *saving)
{
	free(saving->header);
	free_strings(&saving->strings);
	free(saving->data);
	safetensors_free(&saving->contents);
	free(saving->moments);
}

/* The rows that are there now */
static int take_moments(struct saving *saving)
{
	for (unsigned int i = 0; i < saving->count; i++) {
		int err = kvscratch_as_tensor(saving->pads[i].pad, &saving->moments[i]);

		if (err)
			return err;
	}
	return 0;
}

/* Whether all rows that were saved stayed what they were until now */
static bool moments_hold(const struct saving *saving)
{
	for (unsigned int i = 0; i < saving->count; i++) {
		const struct kvscratch_tensor *moment = &saving->moments[i];
		const struct kvscratch_view *view = kvscratch_view(saving->pads[i].pad);

		if (kvscratch_view_valid_rows(view, moment->state) < moment->len)
			return false;
	}
	return true;
}

/* A [rows, row_bytes / element size] tensor behind those that are there already */
static void add_tensor(struct saving *saving, const char *name, uint32_t dtype, uint64_t rows,
		       uint32_t row_bytes, const void *data)
{
	struct safetensors *contents = &saving->contents;
	uint64_t begin = 0;

	if (contents->nr_tensors)
		begin = contents->tensors[contents->nr_tensors - 1].end;
	saving->data[contents->nr_tensors] = data;
	contents->tensors[contents->nr_tensors++] = (struct safetensors_tensor){
		.name = name,
		.dtype = dtype,
		.ndim = 2,
		.shape = { rows, row_bytes / kvscratch_dtype_size(dtype) },
		.begin = begin,
		.end = begin + rows * row_bytes,
	};
}

static void add_pad(struct saving *saving, unsigned int i)
{
	const struct kvscratch_named_pad *pad = &saving->pads[i];
	const struct kvscratch_tensor *moment = &saving->moments[i];
	const struct kvscratch_array *planes = pad->pad->info.arrays;

	if (moment->dtype != KVSCRATCH_DTYPE_MXINT8) {
		add_tensor(saving, pad->name, moment->dtype, moment->len, planes[0].row_bytes,
			   moment->data);
		return;
	}
	add_tensor(saving, pad->name, KVSCRATCH_DTYPE_I8, moment->len, planes[0].row_bytes,
		   moment->data);
	add_tensor(saving, keep(&saving->strings, "%s" SCALES_SUFFIX, pad->name),
		   KVSCRATCH_DTYPE_U8, moment->len, planes[1].row_bytes, moment->scales);
}

static void add_entry(struct saving *saving, const char *key, const char *value)
{
	struct safetensors *contents = &saving->contents;

	contents->metadata[contents->nr_metadata++] = (struct safetensors_entry){ key, value };
}

static void add_geometry(struct saving *saving, const struct kvscratch_named_pad *pad)
{
	const struct kvscratch_info *info = &pad->pad->info;
	struct strings *strings = &saving->strings;

	add_entry(saving, keep(strings, "%s." KEY_MAX_SEQ_LEN, pad->name),
		  keep(strings, "%" PRIu64, (uint64_t)info->max_seq_len));
	add_entry(saving, keep(strings, "%s." KEY_DTYPE, pad->name),
		  kvscratch_dtype_name(info->dtype));
	add_entry(saving, keep(strings, "%s." KEY_INPUT_DTYPE, pad->name),
		  kvscratch_dtype_name(info->input_dtype));
	add_entry(saving, keep(strings, "%s." KEY_FRAC_BITS, pad->name),
		  keep(strings, "%" PRIu32, (uint32_t)info->frac_bits));
}

/* Wide elements come first, so that each tensor is aligned to its own. */
static int make_safetensors(struct saving *saving)
{
	add_entry(saving, KEY_VERSION, FORMAT_VERSION);
	for (uint32_t size = 8; size; size /= 2)
		for (unsigned int i = 0; i < saving->count; i++)
			if (kvscratch_dtype_size(saving->moments[i].dtype) == size)
				add_pad(saving, i);
	for (unsigned int i = 0; i < saving->count; i++)
		add_geometry(saving, &saving->pads[i]);
	if (saving->strings.failed)
		return out_of_memory();
	return safetensors_write_header(&saving->contents, &saving->header,
					&saving->header_bytes);
}

static int make_npy(struct saving *saving)
{
	const struct kvscratch_tensor *moment = saving->moments;

	saving->header = malloc(NPY_HEADER_BYTES);
	if (!saving->header)
		return out_of_memory();
	saving->header_bytes = npy_write_header(saving->header, moment->len, moment->dim,
						moment->dtype);
	if (!saving->header_bytes)
		return set_error(-EOPNOTSUPP, ".npy has no type for %s: expected a name that ends "
				 "in .safetensors", kvscratch_dtype_name(moment->dtype));
	add_pad(saving, 0);
	return 0;
}

static int write_at(struct output *output, const void *bytes, uint64_t count, uint64_t offset)
{
	int err = output_write(output, bytes, count, offset);

	return err ? set_error(err, "%s", output->words) : 0;
}

static int write_tensor(struct output *output, const char *data,
			const struct safetensors_tensor *tensor, uint64_t offset,
			struct transfer *transfer)
{
	uint64_t bytes = tensor->end - tensor->begin;
	int err = 0;

	for (uint64_t done = 0, piece; !err && done < bytes; done += piece) {
		piece = bytes - done < PIECE_BYTES ? bytes - done : PIECE_BYTES;
		err = write_at(output, data + done, piece, offset + tensor->begin + done);
		if (!err)
			err = advance(transfer, piece);
	}
	return err;
}

static int write_contents(const struct saving *saving, struct output *output,
			  struct transfer *transfer)
{
	const struct safetensors *contents = &saving->contents;
	int err = begin_transfer(transfer, contents->tensors[contents->nr_tensors - 1].end);

	if (!err)
		err = write_at(output, saving->header, saving->header_bytes, 0);
	for (size_t i = 0; !err && i < contents->nr_tensors; i++)
		err = write_tensor(output, saving->data[i], &contents->tensors[i],
				   saving->header_bytes, transfer);
	return err;
}

/* EAGAIN without words if the rows did not last */
static int try_to_save(const struct kvscratch_named_pad *pads, unsigned int count, bool npy,
		       struct output *output, struct transfer *transfer)
{
	struct saving saving;
	int err = begin_saving(&saving, pads, count);

	if (!err)
		err = take_moments(&saving);
	if (!err)
		err = npy ? make_npy(&saving) : make_safetensors(&saving);
	if (!err && ftruncate(output->fd, 0))
		err = set_error(-errno, "cannot empty the file: %m");
	if (!err)
		err = write_contents(&saving, output, transfer);
	if (!err && !moments_hold(&saving))
		err = -EAGAIN;
	end_saving(&saving);
	return err;
}

static int save_into(struct output *output, const struct kvscratch_named_pad *pads,
		     unsigned int count, bool npy, struct transfer *transfer)
{
	int err = -EAGAIN;

	for (int attempt = 0; err == -EAGAIN && attempt < MAX_ATTEMPTS; attempt++)
		err = try_to_save(pads, count, npy, output, transfer);
	if (err == -EAGAIN)
		return set_error(err, "expected rows that last while they are saved, got pads that "
				 "were truncated in each of %d attempts", MAX_ATTEMPTS);
	if (err)
		return err;
	err = output_replace(output);
	return err ? set_error(err, "%s", output->words) : 0;
}

static bool ends_in(const char *text, const char *end)
{
	size_t length = strlen(text), end_length = strlen(end);

	return length >= end_length && !strcmp(text + length - end_length, end);
}

static int check_pads(const struct kvscratch_named_pad *pads, unsigned int count, bool npy)
{
	if (npy && count != 1)
		return set_error(-EINVAL, ".npy has room for one pad: expected 1, got %u", count);
	if (!count)
		return set_error(-EINVAL, "expected at least one pad, got none");
	for (unsigned int i = 0; i < count; i++) {
		int err = check_one_plane(pads[i].pad);

		if (err)
			return err;
		if (!npy && !pads[i].name)
			return set_error(-EINVAL, "expected a name for each pad, got none");
	}
	return npy ? 0 : check_byte_order();
}

int kvscratch_save(const char *path, const struct kvscratch_named_pad *pads, unsigned int count,
		   kvscratch_progress *progress, void *context)
{
	struct transfer transfer = { .progress = progress, .context = context };
	bool npy = ends_in(path, ".npy");
	struct output output;
	int err;

	if (!npy && !ends_in(path, ".safetensors"))
		return set_error(-EINVAL, "expected the name of a file that ends in .npy or "
				 ".safetensors");
	err = check_pads(pads, count, npy);
	if (err)
		return err;
	err = output_open(&output, path);
	if (err)
		set_error(err, "%s", output.words);
	else
		err = save_into(&output, pads, count, npy, &transfer);
	output_close(&output);
	return err;
}

/* What is in a file */

/* Where the rows of a pad are in a file, plane by plane */
struct place {
	uint64_t planes[2];
};

/**
 * struct kvscratch_file - a file of pads
 * @fd: the file
 * @size: its bytes
 * @header: what its header was decoded in
 * @contents: what that says, if it is a safetensors file
 * @pads: the pads in it
 * @places: where their rows are
 * @count: how many
 * @claimed: how many bytes the pads take if they are made as the file says
 */
struct kvscratch_file {
	int fd;
	uint64_t size;
	char *header;
	struct safetensors contents;
	struct kvscratch_saved_pad *pads;
	struct place *places;
	unsigned int count;
	uint64_t claimed;
};

static int read_at(const struct kvscratch_file *file, void *bytes, size_t count, uint64_t offset)
{
	size_t done = 0;

	while (done < count) {
		ssize_t got = pread(file->fd, (char *)bytes + done, count - done, offset + done);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return set_error(-errno, "cannot read the file: %m");
		if (!got)
			return set_error(-EBADMSG, "expected a file of %" PRIu64 " bytes, got one "
					 "that became shorter", file->size);
		done += got;
	}
	return 0;
}

static int read_header(struct kvscratch_file *file, size_t bytes, uint64_t offset)
{
	file->header = malloc(bytes ? bytes : 1);
	return file->header ? read_at(file, file->header, bytes, offset) : out_of_memory();
}

static int make_room_for_pads(struct kvscratch_file *file, size_t count)
{
	/* calloc() of nothing may be NULL */
	file->pads = calloc(count + 1, sizeof(*file->pads));
	file->places = calloc(count + 1, sizeof(*file->places));
	return file->pads && file->places ? 0 : out_of_memory();
}

/* Put in front of an error what it is about. */
static int about(const char *name, const char *what)
{
	char words[256], printable[PRINTABLE_NAME_BYTES];

	/* it may be the text of the last error */
	snprintf(words, sizeof(words), "%s", what);
	if (!*name)
		return set_error(-EBADMSG, "%s", words);
	return set_error(-EBADMSG, "tensor \"%s\": %s", printable_name(printable, name), words);
}

static int check_shape(unsigned int ndim, const uint64_t *shape, const char *name)
{
	char words[128];

	if (ndim != 2)
		snprintf(words, sizeof(words), "expected a shape of [rows, dim], got %u dimensions",
			 ndim);
	else if (shape[1] > KVSCRATCH_MAX_ROW_BYTES)
		snprintf(words, sizeof(words), "expected rows of at most %u elements, got %" PRIu64,
			 KVSCRATCH_MAX_ROW_BYTES, shape[1]);
	else if (shape[0] > KVSCRATCH_MAX_SEQ_LEN)
		snprintf(words, sizeof(words), "expected at most %u rows, got %" PRIu64,
			 KVSCRATCH_MAX_SEQ_LEN, shape[0]);
	else
		return 0;
	return about(name, words);
}

/* The next entry of @file->pads; @info receives what a pad of it is like. */
static int add_saved_pad(struct kvscratch_file *file, const struct kvscratch_saved_pad *saved,
			 const struct place *place, struct kvscratch_info *info)
{
	struct kvscratch_geometry geometry = saved->geometry;

	/* a file without rows need not say how many there may be */
	if (!geometry.max_seq_len && !saved->has_geometry)
		geometry.max_seq_len = 1;
	if (lay_out(info, &geometry))
		return about(saved->name, kvscratch_error());
	if (__builtin_add_overflow(file->claimed, info->data_bytes, &file->claimed))
		file->claimed = UINT64_MAX;
	file->places[file->count] = *place;
	file->pads[file->count++] = *saved;
	return 0;
}

/* .npy */

static int check_npy(const struct npy_array *array)
{
	if (!array->dtype)
		return set_error(-EBADMSG, "expected elements of f8 f4 f2 i8 i4 i2 i1 or u1 in the "
				 "byte order of this machine, got '%s'", array->descr);
	/* of a single row or column both orders are one */
	if (array->fortran_order && array->ndim == 2 && array->shape[0] > 1 && array->shape[1] > 1)
		return set_error(-EBADMSG, "expected rows in C order, got Fortran order");
	return check_shape(array->ndim, array->shape, "");
}

static int read_npy_header(struct kvscratch_file *file, struct npy_array *array)
{
	char prefix[NPY_PREFIX_BYTES];
	const char *error;
	uint64_t size;
	int err;

	if (file->size < sizeof(prefix))
		return set_error(-EBADMSG, "the .npy header is cut off");
	err = read_at(file, prefix, sizeof(prefix), 0);
	if (err)
		return err;
	error = npy_header_size(prefix, sizeof(prefix), &size);
	if (!error && size > file->size)
		error = "the .npy header is cut off";
	if (error)
		return set_error(-EBADMSG, "%s", error);
	if (size > MAX_NPY_HEADER)
		return set_error(-EBADMSG, "expected a .npy header of at most %u bytes, got %" PRIu64,
				 MAX_NPY_HEADER, size);
	err = read_header(file, size, 0);
	if (err)
		return err;
	error = npy_parse_header(file->header, size, array);
	return error ? set_error(-EBADMSG, "%s", error) : 0;
}

static int open_npy(struct kvscratch_file *file)
{
	struct kvscratch_saved_pad saved = { .name = "" };
	struct kvscratch_info info;
	struct npy_array array;
	int err = read_npy_header(file, &array);

	if (!err)
		err = check_npy(&array);
	if (!err)
		err = make_room_for_pads(file, 1);
	if (err)
		return err;
	saved.len = array.shape[0];
	saved.geometry = (struct kvscratch_geometry){
		.max_seq_len = saved.len,
		.dim = array.shape[1],
		.dtype = array.dtype,
		.input_dtype = array.dtype,
	};
	err = add_saved_pad(file, &saved, &(struct place){ { array.data_offset } }, &info);
	if (!err && file->size - array.data_offset != saved.len * info.row_bytes)
		return set_error(-EBADMSG, "expected %" PRIu64 " bytes behind the header, got %"
				 PRIu64, saved.len * info.row_bytes,
				 file->size - array.data_offset);
	return err;
}

/* safetensors */

/* The value that __metadata__ has for @key of the pad @name; "" if there is none */
static int find_entry(const struct kvscratch_file *file, const char *name, const char *key,
		      const char **value)
{
	char *full;

	if (asprintf(&full, "%s.%s", name, key) < 0)
		return out_of_memory();
	*value = safetensors_metadata(&file->contents, full);
	if (!*value)
		*value = "";
	free(full);
	return 0;
}

static int bad_entry(const char *name, const char *key, const char *expected, const char *got)
{
	char printable[PRINTABLE_NAME_BYTES], words[192];

	snprintf(words, sizeof(words), "expected %s as %s in __metadata__, got \"%s\"", expected,
		 key, printable_name(printable, got));
	return about(name, words);
}

static int parse_entry(const struct kvscratch_file *file, const char *name, const char *key,
		       uint64_t least, uint64_t most, uint64_t *number)
{
	char expected[64];
	const char *text = NULL;
	int err = find_entry(file, name, key, &text);

	if (err)
		return err;
	errno = 0;
	*number = strtoull(text, NULL, 10);
	if (*text && !text[strspn(text, "0123456789")] && !errno && *number >= least &&
	    *number <= most)
		return 0;
	snprintf(expected, sizeof(expected), "%" PRIu64 " to %" PRIu64, least, most);
	return bad_entry(name, key, expected, text);
}

static int parse_dtype_entry(const struct kvscratch_file *file, const char *name, const char *key,
			     uint32_t *dtype)
{
	const char *text = NULL;
	int err = find_entry(file, name, key, &text);

	if (err)
		return err;
	*dtype = kvscratch_dtype_by_name(text);
	return *dtype ? 0 : bad_entry(name, key, "a dtype", text);
}

static int parse_geometry(const struct kvscratch_file *file, struct kvscratch_saved_pad *saved)
{
	struct kvscratch_geometry *geometry = &saved->geometry;
	uint64_t frac_bits;
	int err = parse_entry(file, saved->name, KEY_MAX_SEQ_LEN, saved->len ? saved->len : 1,
			      KVSCRATCH_MAX_SEQ_LEN, &geometry->max_seq_len);

	if (!err)
		err = parse_dtype_entry(file, saved->name, KEY_DTYPE, &geometry->dtype);
	if (!err)
		err = parse_dtype_entry(file, saved->name, KEY_INPUT_DTYPE, &geometry->input_dtype);
	if (!err)
		err = parse_entry(file, saved->name, KEY_FRAC_BITS, 0, KVSCRATCH_MAX_FRAC_BITS,
				  &frac_bits);
	if (!err)
		geometry->frac_bits = frac_bits;
	return err;
}

/* The second tensor of an MXINT8 pad */
static int find_scales(const struct kvscratch_file *file, const struct safetensors_tensor *elements,
		       const struct safetensors_tensor **scales)
{
	char *name;

	if (asprintf(&name, "%s" SCALES_SUFFIX, elements->name) < 0)
		return out_of_memory();
	*scales = safetensors_find(&file->contents, name);
	free(name);
	if (!*scales || (*scales)->dtype != KVSCRATCH_DTYPE_U8 || (*scales)->ndim != 2 ||
	    (*scales)->shape[0] != elements->shape[0] ||
	    (*scales)->shape[1] != elements->shape[1] / KVSCRATCH_MX_BLOCK)
		return about(elements->name, "expected its scales as a tensor of U8 [rows, dim / "
			     "32] named NAME" SCALES_SUFFIX);
	return 0;
}

static int open_tensor(struct kvscratch_file *file, const struct safetensors_tensor *tensor,
		       uint64_t data_offset)
{
	const struct safetensors_tensor *scales = NULL;
	struct place place = { { data_offset + tensor->begin } };
	struct kvscratch_saved_pad saved = {
		.name = tensor->name,
		.len = tensor->shape[0],
		.geometry = {
			.max_seq_len = tensor->shape[0],
			.dim = tensor->shape[1],
			.dtype = tensor->dtype,
			.input_dtype = tensor->dtype,
		},
		.has_geometry = safetensors_metadata(&file->contents, KEY_VERSION),
	};
	struct kvscratch_info unused;
	int err = check_shape(tensor->ndim, tensor->shape, tensor->name);

	if (!err && saved.has_geometry)
		err = parse_geometry(file, &saved);
	if (err)
		return err;
	if (saved.geometry.dtype == KVSCRATCH_DTYPE_MXINT8) {
		err = find_scales(file, tensor, &scales);
		if (err)
			return err;
		place.planes[1] = data_offset + scales->begin;
	}
	if (tensor->dtype != (saved.geometry.dtype == KVSCRATCH_DTYPE_MXINT8 ?
			      KVSCRATCH_DTYPE_I8 : saved.geometry.dtype))
		return bad_entry(tensor->name, KEY_DTYPE, "that of the tensor",
				 kvscratch_dtype_name(saved.geometry.dtype));
	return add_saved_pad(file, &saved, &place, &unused);
}

/* Whether a tensor belongs to another, which is an MXINT8 pad: 1, 0, or an error */
static int is_scales(const struct kvscratch_file *file, const struct safetensors_tensor *tensor)
{
	const char *dtype = "";
	char *name;
	int err = 0;

	if (!ends_in(tensor->name, SCALES_SUFFIX))
		return 0;
	name = strndup(tensor->name, strlen(tensor->name) - strlen(SCALES_SUFFIX));
	if (!name)
		return out_of_memory();
	if (safetensors_find(&file->contents, name) &&
	    safetensors_metadata(&file->contents, KEY_VERSION))
		err = find_entry(file, name, KEY_DTYPE, &dtype);
	free(name);
	return err ? err : kvscratch_dtype_by_name(dtype) == KVSCRATCH_DTYPE_MXINT8;
}

static int check_version(const struct kvscratch_file *file)
{
	const char *version = safetensors_metadata(&file->contents, KEY_VERSION);
	char printable[PRINTABLE_NAME_BYTES];

	if (!version || !strcmp(version, FORMAT_VERSION))
		return 0;
	return set_error(-EBADMSG, "expected version " FORMAT_VERSION " as " KEY_VERSION
			 " in __metadata__, got \"%s\"", printable_name(printable, version));
}

static int open_safetensors(struct kvscratch_file *file, uint64_t length)
{
	const struct safetensors *contents = &file->contents;
	uint64_t room = file->size - SAFETENSORS_PREFIX;
	int err = check_byte_order();

	if (err)
		return err;
	if (length > SAFETENSORS_MAX_HEADER)
		return set_error(-EBADMSG, "expected a .npy or a safetensors file, whose header "
				 "has at most %u bytes, got %" PRIu64, SAFETENSORS_MAX_HEADER,
				 length);
	if (length > room)
		return set_error(-EBADMSG, "expected a header of %" PRIu64 " bytes, got a file "
				 "that ends after %" PRIu64, length, room);
	err = read_header(file, length, SAFETENSORS_PREFIX);
	if (!err)
		err = safetensors_parse(&file->contents, file->header, length, room - length);
	if (!err)
		err = check_version(file);
	if (!err)
		err = make_room_for_pads(file, contents->nr_tensors);
	for (size_t i = 0; !err && i < contents->nr_tensors; i++) {
		err = is_scales(file, &contents->tensors[i]);
		if (!err)
			err = open_tensor(file, &contents->tensors[i], SAFETENSORS_PREFIX + length);
		else if (err > 0)
			err = 0;
	}
	return err;
}

/* Say what it is that is neither .npy nor safetensors. */
static int check_container(const struct kvscratch_file *file)
{
	char beginning[4096];
	size_t size = file->size < sizeof(beginning) ? file->size : sizeof(beginning);
	const char *found;
	int err = read_at(file, beginning, size, 0);

	if (err)
		return err;
	found = container_name(beginning, size);
	if (!found && is_text(beginning, size))
		found = "text";
	if (!found || found == safetensors_name)
		return 0;
	return set_error(-EBADMSG, "expected a .npy or a safetensors file, got %s", found);
}

static int open_contents(struct kvscratch_file *file)
{
	union {
		char magic[NPY_MAGIC_BYTES];
		uint64_t length;
	} first;
	struct stat stat;
	int err;

	if (fstat(file->fd, &stat))
		return set_error(-errno, "cannot look at the file: %m");
	if (!S_ISREG(stat.st_mode))
		return set_error(-EBADMSG, "expected a regular file, got %s",
				 file_kind(stat.st_mode));
	file->size = stat.st_size;
	if (file->size < sizeof(first))
		return set_error(-EBADMSG, "expected a .npy or a safetensors file, got %" PRIu64
				 " bytes", file->size);
	err = read_at(file, &first, sizeof(first), 0);
	if (err)
		return err;
	if (!memcmp(first.magic, NPY_MAGIC, NPY_MAGIC_BYTES))
		return open_npy(file);
	err = check_container(file);
	return err ? err : open_safetensors(file, le64toh(first.length));
}

int kvscratch_open_file(struct kvscratch_file **out, const char *path)
{
	struct kvscratch_file *file = calloc(1, sizeof(*file));
	int err;

	if (!file)
		return out_of_memory();
	/* a FIFO would wait for a writer */
	file->fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (file->fd < 0)
		err = set_error(-errno, "cannot open the file: %m");
	else
		err = open_contents(file);
	if (err)
		kvscratch_close_file(file);
	else
		*out = file;
	return err;
}

void kvscratch_close_file(struct kvscratch_file *file)
{
	if (!file)
		return;
	if (file->fd >= 0)
		close(file->fd);
	safetensors_free(&file->contents);
	free(file->header);
	free(file->pads);
	free(file->places);
	free(file);
}

const struct kvscratch_saved_pad *kvscratch_file_pads(const struct kvscratch_file *file,
						      unsigned int *count)
{
	*count = file->count;
	return file->pads;
}

/* Loading */

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

static int find_saved(const struct kvscratch_file *file, const char *name, unsigned int *index)
{
	char printable[PRINTABLE_NAME_BYTES], list[96];

	*index = 0;
	if (!name && file->count == 1)
		return 0;
	if (!name)
		return set_error(-EINVAL, "expected the name of a pad: the file has %u of them, %s",
				 file->count, saved_names(file, list, sizeof(list)));
	for (; *index < file->count; (*index)++)
		if (!strcmp(file->pads[*index].name, name))
			return 0;
	return set_error(-ENOKEY, "expected the name of a pad in the file, which has %s, got \"%s\"",
			 saved_names(file, list, sizeof(list)), printable_name(printable, name));
}

/**
 * struct batch - rows on their way from a file into a pad
 * @info: the pad
 * @plane: its only plane
 * @most: how many there may be
 * @planes: their parts, which are apart in a file
 * @input: the rows as an append takes them
 */
struct batch {
	const struct kvscratch_info *info;
	const struct kvscratch_plane *plane;
	uint64_t most;
	char *planes[2];
	char *input;
};

static void free_batch(struct batch *batch)
{
	for (uint32_t i = 0; i < batch->info->nr_arrays; i++)
		free(batch->planes[i]);
	free(batch->input);
}

static int make_batch(struct batch *batch, const struct kvscratch *pad, uint64_t len)
{
	const struct kvscratch_info *info = &pad->info;
	uint64_t row_bytes = info->row_bytes > info->input_row_bytes ? info->row_bytes :
								       info->input_row_bytes;
	uint64_t most = PIECE_BYTES / row_bytes;

	if (most > len)
		most = len;
	*batch = (struct batch){ .info = info, .plane = pad->planes, .most = most ? most : 1 };
	batch->input = malloc(batch->most * info->input_row_bytes);
	if (!batch->input)
		return out_of_memory();
	for (uint32_t i = 0; i < info->nr_arrays; i++) {
		batch->planes[i] = malloc(batch->most * info->arrays[i].row_bytes);
		if (!batch->planes[i])
			return out_of_memory();
	}
	return 0;
}

static int read_planes(const struct batch *batch, const struct kvscratch_file *file,
		       const struct place *place, uint64_t first, uint64_t count)
{
	int err = 0;

	for (uint32_t i = 0; !err && i < batch->info->nr_arrays; i++) {
		size_t bytes = batch->info->arrays[i].row_bytes;

		err = read_at(file, batch->planes[i], count * bytes,
			      place->planes[i] + first * bytes);
	}
	return err;
}

static void join_planes(const struct batch *batch, uint64_t count)
{
	size_t before = 0;

	for (uint32_t i = 0; i < batch->info->nr_arrays; i++) {
		size_t bytes = batch->info->arrays[i].row_bytes;

		for (uint64_t row = 0; row < count; row++)
			memcpy(batch->input + row * batch->info->row_bytes + before,
			       batch->planes[i] + row * bytes, bytes);
		before += bytes;
	}
}

/* A pad that converts takes no stored rows: it is given what they came of, or may have. */
static int make_input(const struct batch *batch, const char *name, uint64_t count)
{
	const struct kvscratch_info *info = batch->info;
	char words[96];

	if (info->input_dtype == info->dtype) {
		join_planes(batch, count);
		return 0;
	}
	if (restore_input(batch->plane, batch->planes[0], (const uint8_t *)batch->planes[1],
			  count * info->dim, batch->input))
		return 0;
	snprintf(words, sizeof(words), "expected rows of %s that were made of %s, got others",
		 kvscratch_dtype_name(info->dtype), kvscratch_dtype_name(info->input_dtype));
	return about(name, words);
}

static int append_batch(struct kvscratch *pad, const char *rows, uint64_t count)
{
	int err;

	/* nothing is committed then; who wants to end it has the progress function */
	do
		err = kvscratch_append_rows(pad, rows, count, pad->info.dim);
	while (err == -EINTR);
	return err;
}

static int append_saved(struct kvscratch *pad, const struct kvscratch_file *file,
			unsigned int index, struct transfer *transfer)
{
	const struct kvscratch_info *info = &pad->info;
	const struct kvscratch_saved_pad *saved = &file->pads[index];
	struct batch batch;
	int err = make_batch(&batch, pad, saved->len);

	if (!err)
		err = begin_transfer(transfer, saved->len * info->row_bytes);
	for (uint64_t first = 0, count; !err && first < saved->len; first += count) {
		count = saved->len - first < batch.most ? saved->len - first : batch.most;
		err = read_planes(&batch, file, &file->places[index], first, count);
		if (!err)
			err = make_input(&batch, saved->name, count);
		if (!err)
			err = append_batch(pad, batch.input, count);
		if (!err)
			err = advance(transfer, count * info->row_bytes);
	}
	free_batch(&batch);
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

int kvscratch_load(struct kvscratch **pad, const struct kvscratch_file *file, const char *name,
		   uint64_t max_seq_len, kvscratch_progress *progress, void *context)
{
	struct transfer transfer = { .progress = progress, .context = context };
	struct kvscratch_geometry geometry;
	struct kvscratch *made;
	unsigned int index;
	int err = find_saved(file, name, &index);

	if (err)
		return err;
	geometry = file->pads[index].geometry;
	if (max_seq_len)
		geometry.max_seq_len = max_seq_len;
	else
		err = check_claim(file);
	if (err)
		return err;
	if (!geometry.max_seq_len)
		return set_error(-EINVAL, "expected a max_seq_len: the file has no rows and does "
				 "not say it");
	if (geometry.max_seq_len < file->pads[index].len)
		return set_error(-EINVAL, "max_seq_len: expected at least %" PRIu64 ", the rows in "
				 "the file, got %" PRIu64, file->pads[index].len, max_seq_len);
	err = kvscratch_new_geometry(&made, &geometry);
	if (err)
		return err;
	err = append_saved(made, file, index, &transfer);
	if (err)
		kvscratch_close(made);
	else
		*pad = made;
	return err;
}

static int check_fit(const struct kvscratch *pad, const struct kvscratch_saved_pad *saved)
{
	const struct kvscratch_info *info = &pad->info;
	const struct kvscratch_geometry *geometry = &saved->geometry;
	int err = check_one_plane(pad);

	if (err)
		return err;
	if (geometry->dim != info->dim)
		return set_error(-EINVAL, "shape mismatch: expected %" PRIu32 " elements, got %"
				 PRIu32, (uint32_t)info->dim, geometry->dim);
	if (geometry->dtype != info->dtype)
		return set_error(-EINVAL, "dtype: expected %s, got %s",
				 kvscratch_dtype_name(info->dtype),
				 kvscratch_dtype_name(geometry->dtype));
	if (saved->has_geometry && geometry->frac_bits != info->frac_bits)
		return set_error(-EINVAL, "fraction bits: expected %" PRIu32 ", got %" PRIu32,
				 (uint32_t)info->frac_bits, geometry->frac_bits);
	return 0;
}

/* Drop what was appended before @err, which is then returned. */
static int take_back(struct kvscratch *pad, uint64_t len, int err)
{
	int truncated;

	do
		truncated = kvscratch_truncate(pad, len, false);
	while (truncated == -EINTR);
	return truncated ? truncated : err;
}

int kvscratch_load_into(struct kvscratch *pad, const struct kvscratch_file *file, const char *name,
			kvscratch_progress *progress, void *context)
{
	struct transfer transfer = { .progress = progress, .context = context };
	unsigned int index;
	int64_t len;
	int err = find_saved(file, name, &index);

	if (!err)
		err = check_fit(pad, &file->pads[index]);
	if (err)
		return err;
	len = kvscratch_len(pad);
	if (len < 0)
		return len;
	if (file->pads[index].len > kvscratch_capacity(pad) - len)
		return fail_room(len, file->pads[index].len, kvscratch_capacity(pad));
	err = append_saved(pad, file, index, &transfer);
	return err && transfer.done ? take_back(pad, len, err) : err;
}
