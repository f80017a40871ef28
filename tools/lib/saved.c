// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * What is in .npy and safetensors files: pads, of which only the rows are left to be read.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "container.h"
#include "files.h"
#include "npy.h"
#include "output.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* More than any header of .npy version 1 has: NumPy itself reads no longer ones */
#define MAX_NPY_HEADER (128u << 10)

int read_file_at(const struct kvscratch_file *file, void *bytes, size_t count, uint64_t offset)
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
	return file->header ? read_file_at(file, file->header, bytes, offset) : out_of_memory();
}

static int make_room_for_planes(struct kvscratch_file *file, size_t count)
{
	/* calloc() of nothing may be NULL */
	file->pads = calloc(count + 1, sizeof(*file->pads));
	file->planes = calloc(count + 1, sizeof(*file->planes));
	file->places = calloc(count + 1, sizeof(*file->places));
	file->is_plane = calloc(count + 1, sizeof(*file->is_plane));
	file->names.strings = calloc(file->contents.nr_metadata + 1, sizeof(char *));
	if (!file->pads || !file->planes || !file->places || !file->is_plane ||
	    !file->names.strings)
		return out_of_memory();
	return 0;
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
	return fail_about("tensor", name, words);
}

/* Metadata */

/**
 * struct subject - what entries of __metadata__ are about
 * @file: where they are
 * @kind: "pad" or "tensor"
 * @name: its name
 */
struct subject {
	const struct kvscratch_file *file;
	const char *kind;
	const char *name;
};

/* The value of @key; "" if there is none */
static int find_entry(const struct subject *subject, const char *key, const char **value)
{
	char *full;

	if (asprintf(&full, "%s.%s", subject->name, key) < 0)
		return out_of_memory();
	*value = safetensors_metadata(&subject->file->contents, full);
	if (!*value)
		*value = "";
	free(full);
	return 0;
}

static int bad_entry(const struct subject *subject, const char *key, const char *expected,
		     const char *got)
{
	char printable[PRINTABLE_NAME_BYTES], words[192];

	snprintf(words, sizeof(words), "expected %s as %s in __metadata__, got \"%s\"", expected,
		 key, printable_name(printable, got));
	return fail_about(subject->kind, subject->name, words);
}

static int parse_number(const struct subject *subject, const char *key, uint64_t least,
			uint64_t most, uint64_t *number)
{
	char expected[64];
	const char *text = NULL;
	int err = find_entry(subject, key, &text);

	if (err)
		return err;
	errno = 0;
	*number = strtoull(text, NULL, 10);
	if (*text && !text[strspn(text, "0123456789")] && !errno && *number >= least &&
	    *number <= most)
		return 0;
	snprintf(expected, sizeof(expected), "%" PRIu64 " to %" PRIu64, least, most);
	return bad_entry(subject, key, expected, text);
}

static int parse_dtype(const struct subject *subject, const char *key, uint32_t *dtype)
{
	const char *text = NULL;
	int err = find_entry(subject, key, &text);

	if (err)
		return err;
	*dtype = kvscratch_dtype_by_name(text);
	return *dtype ? 0 : bad_entry(subject, key, "a dtype", text);
}

/* Bytes that were escaped, none if there is no such entry; behind them @bytes stays as it is */
static int parse_bytes(const struct subject *subject, const char *key, void *bytes, size_t most,
		       bool may_have_nul)
{
	const char *text = NULL;
	char expected[64];
	int count, err = find_entry(subject, key, &text);

	if (err)
		return err;
	count = unescape_bytes(bytes, most, text);
	if (count >= 0 && (may_have_nul || !memchr(bytes, '\0', count)))
		return 0;
	snprintf(expected, sizeof(expected),
		 "at most %zu bytes%s, those beyond A-Za-z0-9._- as %%xx,", most,
		 may_have_nul ? "" : " and no NUL");
	return bad_entry(subject, key, expected, text);
}

/* Pads */

/* What comes next in @file->pads, and the first of its planes in @file->planes */
static int begin_pad(const struct kvscratch_file *file, struct kvscratch_saved_pad *saved,
		     const char *name, uint64_t len)
{
	const struct subject subject = { file, "pad", name };
	int err;

	*saved = (struct kvscratch_saved_pad){
		.name = name,
		.len = len,
		.max_seq_len = len,
		.planes = &file->planes[file->nr_planes],
		.plane_bytes = sizeof(*file->planes),
		.has_geometry = safetensors_metadata(&file->contents, KEY_VERSION),
	};
	if (!saved->has_geometry)
		return 0;
	err = parse_number(&subject, KEY_MAX_SEQ_LEN, len ? len : 1, KVSCRATCH_MAX_SEQ_LEN,
			   &saved->max_seq_len);
	return err ? err : parse_bytes(&subject, KEY_TAG, saved->tag, sizeof(saved->tag), true);
}

static void add_plane(struct kvscratch_file *file, struct kvscratch_saved_pad *saved,
		      const struct kvscratch_plane *plane, const struct place *place)
{
	file->planes[file->nr_planes] = *plane;
	file->places[file->nr_planes++] = *place;
	saved->nr_planes++;
}

/* Its planes are all there. */
static int end_pad(struct kvscratch_file *file, const struct kvscratch_saved_pad *saved)
{
	struct kvscratch_plane *planes = &file->planes[file->nr_planes - saved->nr_planes];
	uint64_t max_seq_len = saved->max_seq_len;
	struct kvs_layout layout;

	/* a file without rows need not say how many there may be */
	if (!max_seq_len && !saved->has_geometry)
		max_seq_len = 1;
	if (lay_out_planes(&layout, planes, saved->nr_planes, max_seq_len))
		return fail_about(saved->nr_planes > 1 ? "pad" : "tensor", saved->name,
				  kvscratch_error());
	if (__builtin_add_overflow(file->claimed, max_seq_len * layout.row_bytes, &file->claimed))
		file->claimed = UINT64_MAX;
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
	err = read_file_at(file, prefix, sizeof(prefix), 0);
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
	struct kvscratch_saved_pad saved = { 0 };
	struct npy_array array;
	uint64_t bytes, room;
	int err = read_npy_header(file, &array);

	if (!err)
		err = check_npy(&array);
	if (!err)
		err = make_room_for_planes(file, 1);
	if (!err)
		err = begin_pad(file, &saved, "", array.shape[0]);
	if (err)
		return err;
	add_plane(file, &saved, &(struct kvscratch_plane){
		.dim = array.shape[1],
		.dtype = array.dtype,
	}, &(struct place){ .name = "", .elements = array.data_offset });
	err = end_pad(file, &saved);
	if (err)
		return err;
	bytes = saved.len * kvscratch_saved_plane(&saved, 0)->row_bytes;
	room = file->size - array.data_offset;
	return bytes == room ? 0 : set_error(-EBADMSG, "expected %" PRIu64 " bytes behind the "
					     "header, got %" PRIu64, bytes, room);
}

/* safetensors */

static int parse_plane(const struct subject *subject, struct kvscratch_plane *plane)
{
	uint64_t frac_bits = 0;
	int err = parse_dtype(subject, KEY_DTYPE, &plane->dtype);

	if (!err)
		err = parse_dtype(subject, KEY_INPUT_DTYPE, &plane->input_dtype);
	if (!err)
		err = parse_number(subject, KEY_FRAC_BITS, 0, KVSCRATCH_MAX_FRAC_BITS, &frac_bits);
	if (err)
		return err;
	plane->frac_bits = frac_bits;
	return parse_bytes(subject, KEY_LABEL, plane->label, sizeof(plane->label) - 1, false);
}

/* The second tensor of an MXINT8 plane */
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
		return fail_about("tensor", elements->name, "expected its scales as a tensor of U8 "
				  "[rows, dim / 32] named NAME" SCALES_SUFFIX);
	return 0;
}

/* One that is known to be a matrix, as the next plane of a pad */
static int add_tensor(struct kvscratch_file *file, struct kvscratch_saved_pad *saved,
		      const struct safetensors_tensor *tensor)
{
	const struct subject subject = { file, "tensor", tensor->name };
	struct kvscratch_plane plane = { .dim = tensor->shape[1], .dtype = tensor->dtype };
	struct place place = { tensor->name, file->data_offset + tensor->begin, 0 };
	const struct safetensors_tensor *scales = NULL;
	int err = saved->has_geometry ? parse_plane(&subject, &plane) : 0;

	if (!err && plane.dtype == KVSCRATCH_DTYPE_MXINT8)
		err = find_scales(file, tensor, &scales);
	if (err)
		return err;
	if (tensor->dtype != (scales ? KVSCRATCH_DTYPE_I8 : plane.dtype))
		return bad_entry(&subject, KEY_DTYPE, "that of the tensor",
				 kvscratch_dtype_name(plane.dtype));
	if (scales)
		place.scales = file->data_offset + scales->begin;
	add_plane(file, saved, &plane, &place);
	return 0;
}

/* A pad of several planes has no tensor of its own name. */
static int check_no_planes(const struct kvscratch_file *file, const char *name)
{
	const struct subject subject = { file, "pad", name };
	const char *planes = "";
	int err = find_entry(&subject, KEY_PLANES, &planes);

	if (err || !*planes || !safetensors_metadata(&file->contents, KEY_VERSION))
		return err;
	return bad_entry(&subject, KEY_PLANES, "nothing beside the tensor of this name", planes);
}

static int open_tensor(struct kvscratch_file *file, const struct safetensors_tensor *tensor)
{
	struct kvscratch_saved_pad saved = { 0 };
	int err = check_no_planes(file, tensor->name);

	if (!err)
		err = check_shape(tensor->ndim, tensor->shape, tensor->name);
	if (!err)
		err = begin_pad(file, &saved, tensor->name, tensor->shape[0]);
	if (!err)
		err = add_tensor(file, &saved, tensor);
	return err ? err : end_pad(file, &saved);
}

/* Whether a tensor belongs to another, which is an MXINT8 plane: 1, 0, or an error */
static int is_scales(const struct kvscratch_file *file, const struct safetensors_tensor *tensor)
{
	struct subject elements = { file, "tensor", NULL };
	const char *dtype = "";
	char *name;
	int err = 0;

	if (!ends_in(tensor->name, SCALES_SUFFIX))
		return 0;
	name = strndup(tensor->name, strlen(tensor->name) - strlen(SCALES_SUFFIX));
	if (!name)
		return out_of_memory();
	elements.name = name;
	if (safetensors_find(&file->contents, name) &&
	    safetensors_metadata(&file->contents, KEY_VERSION))
		err = find_entry(&elements, KEY_DTYPE, &dtype);
	free(name);
	return err ? err : kvscratch_dtype_by_name(dtype) == KVSCRATCH_DTYPE_MXINT8;
}

/* Pads of several planes */

/* One that is not yet a plane, and becomes one now */
static int take_tensor(struct kvscratch_file *file, const struct safetensors_tensor *tensor)
{
	bool *is_plane = &file->is_plane[tensor - file->contents.tensors];
	int err = is_scales(file, tensor);

	if (err < 0)
		return err;
	if (err || *is_plane)
		return fail_about("tensor", tensor->name, "expected it to be one plane of one pad, "
				  "got it for another as well");
	*is_plane = true;
	return check_shape(tensor->ndim, tensor->shape, tensor->name);
}

/* The tensor of a plane, by what the list of them says; that may go on behind its @length */
static int find_tensor(struct kvscratch_file *file, const char *pad, const char *suffix,
		       size_t length, const struct safetensors_tensor **tensor)
{
	char *name, words[PRINTABLE_NAME_BYTES + 64], printable[PRINTABLE_NAME_BYTES];

	if (asprintf(&name, "%s.%.*s", pad, (int)length, suffix) < 0)
		return out_of_memory();
	*tensor = safetensors_find(&file->contents, name);
	printable_name(printable, name);
	free(name);
	if (*tensor)
		return take_tensor(file, *tensor);
	snprintf(words, sizeof(words), "expected a tensor for each plane, got no \"%s\"",
		 printable);
	return fail_about("pad", pad, words);
}

static int add_to_pad(struct kvscratch_file *file, struct kvscratch_saved_pad *saved,
		      const struct safetensors_tensor *tensor)
{
	char words[128];

	if (saved->nr_planes == KVSCRATCH_MAX_PLANES) {
		snprintf(words, sizeof(words), "expected at most %u planes, got more",
			 KVSCRATCH_MAX_PLANES);
		return fail_about("pad", saved->name, words);
	}
	if (tensor->shape[0] == saved->len)
		return add_tensor(file, saved, tensor);
	snprintf(words, sizeof(words), "expected %" PRIu64 " rows, as the first plane has, got %"
		 PRIu64, saved->len, tensor->shape[0]);
	return fail_about("tensor", tensor->name, words);
}

/* The value of @planes names their tensors, in their order, by what follows the pad's name. */
static int open_pad(struct kvscratch_file *file, const struct safetensors_entry *planes)
{
	const int length = strlen(planes->key) - strlen("." KEY_PLANES);
	const char *name = keep_string(&file->names, "%.*s", length, planes->key);
	const struct safetensors_tensor *tensor = NULL;
	struct kvscratch_saved_pad saved = { 0 };
	const char *suffix = planes->value;
	int err = name ? 0 : out_of_memory();

	for (bool more = true; !err && more; ) {
		const size_t bytes = strcspn(suffix, " ");

		err = find_tensor(file, name, suffix, bytes, &tensor);
		if (!err && !saved.nr_planes)
			err = begin_pad(file, &saved, name, tensor->shape[0]);
		if (!err)
			err = add_to_pad(file, &saved, tensor);
		more = suffix[bytes];
		suffix += bytes + 1;
	}
	return err ? err : end_pad(file, &saved);
}

static int open_pads(struct kvscratch_file *file)
{
	const struct safetensors *contents = &file->contents;
	int err = 0;

	if (!safetensors_metadata(contents, KEY_VERSION))
		return 0;
	for (size_t i = 0; !err && i < contents->nr_metadata; i++)
		if (ends_in(contents->metadata[i].key, "." KEY_PLANES))
			err = open_pad(file, &contents->metadata[i]);
	return err;
}

/* Those that are no planes of other pads are pads of one. */
static int open_tensors(struct kvscratch_file *file)
{
	const struct safetensors *contents = &file->contents;
	int err = 0;

	for (size_t i = 0; !err && i < contents->nr_tensors; i++) {
		if (file->is_plane[i])
			continue;
		err = is_scales(file, &contents->tensors[i]);
		if (!err)
			err = open_tensor(file, &contents->tensors[i]);
		else if (err > 0)
			err = 0;
	}
	return err;
}

static int check_version(const struct kvscratch_file *file)
{
	const char *version = safetensors_metadata(&file->contents, KEY_VERSION);
	char printable[PRINTABLE_NAME_BYTES];

	if (!version || !strcmp(version, FIRST_VERSION) || !strcmp(version, PLANES_VERSION))
		return 0;
	return set_error(-EBADMSG, "expected version " FIRST_VERSION " or " PLANES_VERSION " as "
			 KEY_VERSION " in __metadata__, got \"%s\"",
			 printable_name(printable, version));
}

static int open_safetensors(struct kvscratch_file *file, uint64_t length)
{
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
	file->data_offset = SAFETENSORS_PREFIX + length;
	err = read_header(file, length, SAFETENSORS_PREFIX);
	if (!err)
		err = safetensors_parse(&file->contents, file->header, length, room - length);
	if (!err)
		err = check_version(file);
	if (!err)
		err = make_room_for_planes(file, file->contents.nr_tensors);
	if (!err)
		err = open_pads(file);
	return err ? err : open_tensors(file);
}

/* Say what it is that is neither .npy nor safetensors. */
static int check_container(const struct kvscratch_file *file)
{
	char beginning[4096];
	size_t size = file->size < sizeof(beginning) ? file->size : sizeof(beginning);
	const char *found;
	int err = read_file_at(file, beginning, size, 0);

	if (err)
		return err;
	found = container_name(beginning, size);
	if (!found && is_text(beginning, size))
		found = "text";
	if (!found || found == safetensors_name)
		return 0;
	return set_error(-EBADMSG, "expected a .npy or a safetensors file, got %s", found);
}

/* Opening */

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
	err = read_file_at(file, &first, sizeof(first), 0);
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
	free_strings(&file->names);
	free(file->is_plane);
	free(file->pads);
	free(file->planes);
	free(file->places);
	free(file);
}

const struct kvscratch_saved_pad *kvscratch_file_pads(const struct kvscratch_file *file,
						      unsigned int *count)
{
	*count = file->count;
	return file->pads;
}
