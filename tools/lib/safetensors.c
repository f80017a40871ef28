// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#include "safetensors.h"

#include "backend.h"
#include "json.h"

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define METADATA "__metadata__"
/* Data that begins at a multiple of this suits the widest vectors. */
#define ALIGNMENT 64

static const char *const dtypes[] = {
	[KVSCRATCH_DTYPE_F64] = "F64",
	[KVSCRATCH_DTYPE_F32] = "F32",
	[KVSCRATCH_DTYPE_F16] = "F16",
	[KVSCRATCH_DTYPE_BF16] = "BF16",
	[KVSCRATCH_DTYPE_I64] = "I64",
	[KVSCRATCH_DTYPE_I32] = "I32",
	[KVSCRATCH_DTYPE_I16] = "I16",
	[KVSCRATCH_DTYPE_I8] = "I8",
	[KVSCRATCH_DTYPE_U8] = "U8",
};

/* UTF-8 */

static bool is_utf8(const char *text)
{
	const char *end = text + strlen(text);

	while (text < end) {
		size_t bytes = utf8_bytes(text, end);

		if (!bytes)
			return false;
		text += bytes;
	}
	return true;
}

const char *printable_name(char text[static PRINTABLE_NAME_BYTES], const char *name)
{
	const char *end = name + strlen(name);
	char *to = text;

	while (name < end) {
		size_t valid = utf8_bytes(name, end);
		size_t bytes = valid ? valid : 1;

		if (to - text + bytes > PRINTABLE_NAME_BYTES - sizeof("...")) {
			to = mempcpy(to, "...", 3);
			break;
		}
		/* control characters of ASCII, and those of Latin-1 as UTF-8 */
		if (!valid || (unsigned char)*name < ' ' || *name == 0x7f ||
		    (*name == '\xc2' && (unsigned char)name[1] < 0xa0))
			*to++ = '?';
		else
			to = mempcpy(to, name, bytes);
		name += bytes;
	}
	*to = '\0';
	return text;
}

/* Up to @max numbers; returns how many. */
static int parse_numbers(struct json *json, uint64_t *numbers, unsigned int max,
			 const char *what)
{
	unsigned int count = 0;
	int more, err = json_begin(json, '[', what);

	if (err)
		return err;
	while ((more = json_goes_on(json, count, ']')) > 0) {
		if (count == max)
			return json_unexpected(json, what);
		err = json_number(json, &numbers[count]);
		if (err)
			return err;
		count++;
	}
	return more < 0 ? more : (int)count;
}

static int parse_dtype(struct json *json, const char *tensor, uint32_t *dtype)
{
	char name[PRINTABLE_NAME_BYTES], got[PRINTABLE_NAME_BYTES];
	const char *text;
	int err = json_string(json, &text, "a string as dtype");

	if (err)
		return err;
	for (*dtype = 0; *dtype < ARRAY_SIZE(dtypes); (*dtype)++)
		if (dtypes[*dtype] && !strcmp(dtypes[*dtype], text))
			return 0;
	return set_error(-EBADMSG, "tensor \"%s\": expected a dtype of F64 F32 F16 BF16 I64 I32 "
			 "I16 I8 or U8, got \"%s\"", printable_name(name, tensor),
			 printable_name(got, text));
}

static int parse_shape(struct json *json, struct safetensors_tensor *tensor)
{
	int ndim = parse_numbers(json, tensor->shape, SAFETENSORS_MAX_DIMS,
				 "a list of at most 8 numbers as shape");

	if (ndim < 0)
		return ndim;
	tensor->ndim = ndim;
	return 0;
}

static int parse_offsets(struct json *json, struct safetensors_tensor *tensor)
{
	static const char what[] = "a list of two numbers as data_offsets";
	uint64_t offsets[2];
	int count = parse_numbers(json, offsets, 2, what);

	if (count < 0)
		return count;
	if (count != 2)
		return json_unexpected(json, what);
	tensor->begin = offsets[0];
	tensor->end = offsets[1];
	return 0;
}

enum key { KEY_DTYPE = 1, KEY_SHAPE = 2, KEY_DATA_OFFSETS = 4, ALL_KEYS = 7 };

static enum key key_by_name(const char *name)
{
	if (!strcmp(name, "dtype"))
		return KEY_DTYPE;
	if (!strcmp(name, "shape"))
		return KEY_SHAPE;
	return strcmp(name, "data_offsets") ? 0 : KEY_DATA_OFFSETS;
}

static int parse_value(struct json *json, enum key key, struct safetensors_tensor *tensor)
{
	switch (key) {
	case KEY_DTYPE:
		return parse_dtype(json, tensor->name, &tensor->dtype);
	case KEY_SHAPE:
		return parse_shape(json, tensor);
	case KEY_DATA_OFFSETS:
		return parse_offsets(json, tensor);
	default:
		return json_skip_value(json, 0);
	}
}

/* The value of a tensor's entry */
static int parse_tensor(struct json *json, struct safetensors_tensor *tensor)
{
	char name[PRINTABLE_NAME_BYTES], got[PRINTABLE_NAME_BYTES];
	const char *text;
	size_t count = 0;
	int keys = 0;
	int more, err = json_begin(json, '{', "an object as what a tensor is");

	if (err)
		return err;
	while ((more = json_goes_on(json, count++, '}')) > 0) {
		enum key key;

		err = json_string(json, &text, "a key of a tensor");
		if (err)
			return err;
		key = key_by_name(text);
		if (keys & key)
			return set_error(-EBADMSG, "tensor \"%s\": expected dtype, shape and "
					 "data_offsets, got a second \"%s\"",
					 printable_name(name, tensor->name),
					 printable_name(got, text));
		err = json_begin(json, ':', "':'");
		if (!err)
			err = parse_value(json, key, tensor);
		if (err)
			return err;
		keys |= key;
	}
	if (more < 0)
		return more;
	if (keys != ALL_KEYS)
		return set_error(-EBADMSG, "tensor \"%s\": expected dtype, shape and data_offsets, "
				 "got no %s", printable_name(name, tensor->name),
				 !(keys & KEY_DTYPE) ? "dtype" :
				 !(keys & KEY_SHAPE) ? "shape" : "data_offsets");
	return 0;
}

static int out_of_header_memory(void)
{
	return set_error(-ENOMEM, "out of memory for a safetensors header");
}

/* @array with room for one element behind its @count; NULL when there is none */
static void *make_room(void *array, size_t count, size_t element_bytes)
{
	/* it doubles, so it is full at powers of two only */
	if (count & (count - 1))
		return array;
	return reallocarray(array, count ? 2 * count : 1, element_bytes);
}

static int add_entry(struct safetensors *file, const struct safetensors_entry *entry)
{
	struct safetensors_entry *metadata;

	metadata = make_room(file->metadata, file->nr_metadata, sizeof(*entry));
	if (!metadata)
		return out_of_header_memory();
	file->metadata = metadata;
	metadata[file->nr_metadata++] = *entry;
	return 0;
}

static int add_tensor(struct safetensors *file, const struct safetensors_tensor *tensor)
{
	struct safetensors_tensor *tensors;

	tensors = make_room(file->tensors, file->nr_tensors, sizeof(*tensor));
	if (!tensors)
		return out_of_header_memory();
	file->tensors = tensors;
	tensors[file->nr_tensors++] = *tensor;
	return 0;
}

static int parse_metadata(struct json *json, struct safetensors *file)
{
	int more, err;

	json_skip_blanks(json);
	if (json_take_word(json, "null"))
		return 0;
	err = json_begin(json, '{', "an object as " METADATA);
	if (err)
		return err;
	while ((more = json_goes_on(json, file->nr_metadata, '}')) > 0) {
		struct safetensors_entry entry;

		err = json_string(json, &entry.key, "a key of " METADATA);
		if (!err)
			err = json_begin(json, ':', "':'");
		if (!err)
			err = json_string(json, &entry.value, "a string in " METADATA);
		if (!err)
			err = add_entry(file, &entry);
		if (err)
			return err;
	}
	return more;
}

static int parse_object(struct json *json, struct safetensors *file)
{
	bool has_metadata = false;
	int more, err;

	/* no blanks before it: so the format is told from others */
	if (!json_take(json, '{'))
		return json_unexpected(json, "'{'");
	while ((more = json_goes_on(json, file->nr_tensors + has_metadata, '}')) > 0) {
		struct safetensors_tensor tensor = { 0 };

		err = json_string(json, &tensor.name, "the name of a tensor");
		if (!err)
			err = json_begin(json, ':', "':'");
		if (err)
			return err;
		if (!strcmp(tensor.name, METADATA)) {
			if (has_metadata)
				return set_error(-EBADMSG, "expected one " METADATA ", got two");
			has_metadata = true;
			err = parse_metadata(json, file);
		} else {
			err = parse_tensor(json, &tensor);
			if (!err)
				err = add_tensor(file, &tensor);
		}
		if (err)
			return err;
	}
	if (more < 0)
		return more;
	json_skip_blanks(json);
	return json->at == json->end ? 0 : json_unexpected(json, "nothing behind the object");
}

/* What has to hold across entries */

static int compare_entries(const void *left, const void *right)
{
	const struct safetensors_entry *a = left, *b = right;

	return strcmp(a->key, b->key);
}

static int compare_names(const void *left, const void *right)
{
	const struct safetensors_tensor *const *a = left, *const *b = right;

	return strcmp((*a)->name, (*b)->name);
}

static int compare_places(const void *left, const void *right)
{
	const struct safetensors_tensor *const *a = left, *const *b = right;

	if ((*a)->begin != (*b)->begin)
		return (*a)->begin < (*b)->begin ? -1 : 1;
	return (*a)->end < (*b)->end ? -1 : (*a)->end > (*b)->end;
}

/* False if it has 2^64 bytes or more */
static bool tensor_bytes(const struct safetensors_tensor *tensor, uint64_t *bytes)
{
	*bytes = kvscratch_dtype_size(tensor->dtype);
	for (unsigned int i = 0; i < tensor->ndim; i++)
		if (__builtin_mul_overflow(*bytes, tensor->shape[i], bytes))
			return false;
	return true;
}

static int check_size(const struct safetensors_tensor *tensor)
{
	char name[PRINTABLE_NAME_BYTES];
	uint64_t bytes;

	printable_name(name, tensor->name);
	if (!tensor_bytes(tensor, &bytes))
		return set_error(-EBADMSG, "tensor \"%s\": expected less than 2^64 bytes by its "
				 "shape, got more", name);
	if (tensor->begin > tensor->end || tensor->end - tensor->begin != bytes)
		return set_error(-EBADMSG, "tensor \"%s\": expected %" PRIu64 " bytes by its "
				 "shape, got data_offsets [%" PRIu64 ", %" PRIu64 "]", name, bytes,
				 tensor->begin, tensor->end);
	return 0;
}

/* Each byte of the data belongs to one tensor: sorts @tensors by their place. */
static int check_places(const struct safetensors_tensor **tensors, size_t count,
			uint64_t data_bytes)
{
	char name[PRINTABLE_NAME_BYTES];
	uint64_t end = 0;

	qsort(tensors, count, sizeof(*tensors), compare_places);
	for (size_t i = 0; i < count; i++) {
		int err = check_size(tensors[i]);

		if (err)
			return err;
		if (tensors[i]->begin != end)
			return set_error(-EBADMSG, "tensor \"%s\": expected it to begin at %" PRIu64
					 ", where the one before ends, got %s to %" PRIu64,
					 printable_name(name, tensors[i]->name), end,
					 tensors[i]->begin < end ? "an overlap back" : "a gap up",
					 tensors[i]->begin);
		end = tensors[i]->end;
	}
	if (end != data_bytes)
		return set_error(-EBADMSG, "expected %" PRIu64 " bytes behind the header, got %"
				 PRIu64, end, data_bytes);
	return 0;
}

/* Sorts @tensors by name. */
static int check_names(const struct safetensors_tensor **tensors, size_t count, int err)
{
	char name[PRINTABLE_NAME_BYTES];

	qsort(tensors, count, sizeof(*tensors), compare_names);
	for (size_t i = 1; i < count; i++)
		if (!compare_names(&tensors[i - 1], &tensors[i]))
			return set_error(err, "expected each tensor once, got two named \"%s\"",
					 printable_name(name, tensors[i]->name));
	return 0;
}

static int check_metadata(struct safetensors *file)
{
	char name[PRINTABLE_NAME_BYTES];

	if (file->nr_metadata)
		qsort(file->metadata, file->nr_metadata, sizeof(*file->metadata), compare_entries);
	for (size_t i = 1; i < file->nr_metadata; i++)
		if (!compare_entries(&file->metadata[i - 1], &file->metadata[i]))
			return set_error(-EBADMSG, METADATA ": expected each key once, got two "
					 "named \"%s\"",
					 printable_name(name, file->metadata[i].key));
	return 0;
}

/* Pointers to all tensors, to be sorted */
static const struct safetensors_tensor **list_tensors(const struct safetensors *file)
{
	const struct safetensors_tensor **list;

	list = reallocarray(NULL, file->nr_tensors + 1, sizeof(*list));
	if (!list)
		return NULL;
	for (size_t i = 0; i < file->nr_tensors; i++)
		list[i] = &file->tensors[i];
	return list;
}

static int check_header(struct safetensors *file, uint64_t data_bytes)
{
	const struct safetensors_tensor **by_place = list_tensors(file);
	int err;

	file->by_name = list_tensors(file);
	if (by_place && file->by_name)
		err = check_names(file->by_name, file->nr_tensors, -EBADMSG);
	else
		err = out_of_header_memory();
	if (!err)
		err = check_places(by_place, file->nr_tensors, data_bytes);
	free(by_place);
	return err ? err : check_metadata(file);
}

int safetensors_parse(struct safetensors *file, char *header, size_t length, uint64_t data_bytes)
{
	struct json json = { .start = header, .at = header, .end = header + length };
	int err;

	*file = (struct safetensors){ 0 };
	err = parse_object(&json, file);
	if (*json.words)
		set_error(err, "safetensors header: %s", json.words);
	if (!err)
		err = check_header(file, data_bytes);
	if (err)
		safetensors_free(file);
	return err;
}

void safetensors_free(struct safetensors *file)
{
	free(file->tensors);
	free(file->by_name);
	free(file->metadata);
	*file = (struct safetensors){ 0 };
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file, const char *name)
{
	const struct safetensors_tensor sought = { .name = name }, *key = &sought;
	const struct safetensors_tensor **found;

	found = bsearch(&key, file->by_name, file->nr_tensors, sizeof(key), compare_names);
	return found ? *found : NULL;
}

const char *safetensors_metadata(const struct safetensors *file, const char *key)
{
	const struct safetensors_entry sought = { .key = key };
	const struct safetensors_entry *found = NULL;

	if (file->nr_metadata)
		found = bsearch(&sought, file->metadata, file->nr_metadata, sizeof(sought),
				compare_entries);
	return found ? found->value : NULL;
}

/* Writing */

static void print_string(FILE *out, const char *text)
{
	putc('"', out);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fprintf(out, "\\%c", *text);
		else if ((unsigned char)*text < ' ')
			fprintf(out, "\\u%04x", *text);
		else
			putc(*text, out);
	}
	putc('"', out);
}

static void print_metadata(FILE *out, const struct safetensors *file)
{
	fputs("\"" METADATA "\":{", out);
	for (size_t i = 0; i < file->nr_metadata; i++) {
		if (i)
			putc(',', out);
		print_string(out, file->metadata[i].key);
		putc(':', out);
		print_string(out, file->metadata[i].value);
	}
	putc('}', out);
}

static void print_tensor(FILE *out, const struct safetensors_tensor *tensor)
{
	print_string(out, tensor->name);
	fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", dtypes[tensor->dtype]);
	for (unsigned int i = 0; i < tensor->ndim; i++)
		fprintf(out, "%s%" PRIu64, i ? "," : "", tensor->shape[i]);
	fprintf(out, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", tensor->begin, tensor->end);
}

static void print_header(FILE *out, const struct safetensors *file)
{
	long length;

	fprintf(out, "%*s{", SAFETENSORS_PREFIX, "");
	if (file->nr_metadata)
		print_metadata(out, file);
	for (size_t i = 0; i < file->nr_tensors; i++) {
		if (i || file->nr_metadata)
			putc(',', out);
		print_tensor(out, &file->tensors[i]);
	}
	putc('}', out);
	length = ftell(out);
	fprintf(out, "%*s", (int)(-length & (ALIGNMENT - 1)), "");
}

int safetensors_check_name(const char *name)
{
	char printable[PRINTABLE_NAME_BYTES];

	if (*name && strcmp(name, METADATA) && is_utf8(name))
		return 0;
	return set_error(-EINVAL, "expected a name in UTF-8, neither empty nor " METADATA
			 ", got \"%s\"", printable_name(printable, name));
}

static int check_new_names(const struct safetensors *file)
{
	const struct safetensors_tensor **list;
	int err;

	for (size_t i = 0; i < file->nr_tensors; i++) {
		err = safetensors_check_name(file->tensors[i].name);
		if (err)
			return err;
	}
	list = list_tensors(file);
	if (!list)
		return out_of_header_memory();
	err = check_names(list, file->nr_tensors, -EINVAL);
	free(list);
	return err;
}

int safetensors_write_header(const struct safetensors *file, char **header, size_t *size)
{
	int err = check_new_names(file);
	uint64_t length;
	FILE *out;

	if (err)
		return err;
	*header = NULL;
	out = open_memstream(header, size);
	if (!out)
		return out_of_header_memory();
	print_header(out, file);
	err = ferror(out);
	if (fclose(out) || err) {
		free(*header);
		return out_of_header_memory();
	}
	length = *size - SAFETENSORS_PREFIX;
	if (length > SAFETENSORS_MAX_HEADER) {
		free(*header);
		return set_error(-E2BIG, "expected names for a header of at most %u bytes, got %"
				 PRIu64, SAFETENSORS_MAX_HEADER, length);
	}
	length = htole64(length);
	memcpy(*header, &length, sizeof(length));
	return 0;
}
