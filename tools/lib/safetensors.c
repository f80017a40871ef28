// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#include "safetensors.h"

#include "backend.h"

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

/* Bytes of the character at @at, before @end; 0 if there is no valid one. */
static size_t character_bytes(const char *at, const char *end)
{
	/* the least that may follow a first byte, so that nothing is longer than it has to be */
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	unsigned char first = *at;
	size_t bytes = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 :
		       first >> 3 == 30 ? 4 : 0;
	uint32_t code;

	if (bytes < 2 || (size_t)(end - at) < bytes)
		return bytes == 1;
	code = first & (0x7f >> bytes);
	for (size_t i = 1; i < bytes; i++) {
		if ((at[i] & 0xc0) != 0x80)
			return 0;
		code = code << 6 | (at[i] & 0x3f);
	}
	/* no halves of UTF-16 pairs, and nothing beyond the last character */
	if (code < least[bytes] || code >> 11 == 0x1b || code > 0x10ffff)
		return 0;
	return bytes;
}

static bool is_utf8(const char *text)
{
	const char *end = text + strlen(text);

	while (text < end) {
		size_t bytes = character_bytes(text, end);

		if (!bytes)
			return false;
		text += bytes;
	}
	return true;
}

static char *put_character(char *to, uint32_t code)
{
	if (code < 0x80) {
		*to++ = code;
		return to;
	}
	if (code < 0x800) {
		*to++ = 0xc0 | code >> 6;
	} else {
		if (code < 0x10000) {
			*to++ = 0xe0 | code >> 12;
		} else {
			*to++ = 0xf0 | code >> 18;
			*to++ = 0x80 | (code >> 12 & 0x3f);
		}
		*to++ = 0x80 | (code >> 6 & 0x3f);
	}
	*to++ = 0x80 | (code & 0x3f);
	return to;
}

const char *printable_name(char text[static PRINTABLE_NAME_BYTES], const char *name)
{
	const char *end = name + strlen(name);
	char *to = text;

	while (name < end) {
		size_t valid = character_bytes(name, end);
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

/* JSON */

/* The part of the header that is still to be read */
struct parser {
	char *start;
	char *at;
	char *end;
};

static int unexpected(const struct parser *parser, const char *what)
{
	size_t place = parser->at - parser->start;

	if (parser->at == parser->end)
		return set_error(-EBADMSG, "safetensors header: expected %s at byte %zu, got its "
				 "end", what, place);
	if (*parser->at > ' ' && *parser->at <= '~')
		return set_error(-EBADMSG, "safetensors header: expected %s at byte %zu, got '%c'",
				 what, place, *parser->at);
	return set_error(-EBADMSG, "safetensors header: expected %s at byte %zu, got byte 0x%02x",
			 what, place, (unsigned char)*parser->at);
}

static void skip_blanks(struct parser *parser)
{
	while (parser->at < parser->end && *parser->at && strchr(" \t\r\n", *parser->at))
		parser->at++;
}

/* Take @token if it comes next. */
static bool take(struct parser *parser, char token)
{
	if (parser->at == parser->end || *parser->at != token)
		return false;
	parser->at++;
	return true;
}

/* Take what begins something, blanks before it aside. */
static int begin(struct parser *parser, char token, const char *what)
{
	skip_blanks(parser);
	return take(parser, token) ? 0 : unexpected(parser, what);
}

/* Whether a list or an object goes on, having taken @taken elements: 1, 0, or an error */
static int goes_on(struct parser *parser, size_t taken, char close)
{
	skip_blanks(parser);
	if (take(parser, close))
		return 0;
	if (taken && !take(parser, ','))
		return unexpected(parser, close == '}' ? "',' or '}'" : "',' or ']'");
	return 1;
}

/* Four digits */
static int parse_unit(struct parser *parser, uint32_t *unit)
{
	*unit = 0;
	for (int i = 0; i < 4; i++, parser->at++) {
		static const char digits[] = "0123456789abcdef0123456789ABCDEF";
		const char *digit = parser->at < parser->end && *parser->at ?
				    strchr(digits, *parser->at) : NULL;

		if (!digit)
			return unexpected(parser, "a hexadecimal digit");
		*unit = *unit << 4 | (uint32_t)((digit - digits) & 15);
	}
	return 0;
}

/* What follows \u: a character, or half of one and then the other half */
static int parse_code(struct parser *parser, uint32_t *code)
{
	uint32_t low;
	int err = parse_unit(parser, code);

	if (err)
		return err;
	if (!*code)
		return set_error(-EBADMSG, "safetensors header: expected no \\u0000 in a string, "
				 "got one before byte %td", parser->at - parser->start);
	if (*code >> 11 != 0x1b)
		return 0;
	if (*code >> 10 == 0x36 && take(parser, '\\') && take(parser, 'u')) {
		err = parse_unit(parser, &low);
		if (err)
			return err;
		if (low >> 10 == 0x37) {
			*code = 0x10000 + ((*code & 0x3ff) << 10 | (low & 0x3ff));
			return 0;
		}
	}
	return set_error(-EBADMSG, "safetensors header: expected both halves of a UTF-16 pair, "
			 "got one of them before byte %td", parser->at - parser->start);
}

/* What follows a backslash */
static int parse_escape(struct parser *parser, char **to)
{
	static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
	const char *escape;
	uint32_t code;
	int err;

	if (take(parser, 'u')) {
		err = parse_code(parser, &code);
		if (!err)
			*to = put_character(*to, code);
		return err;
	}
	escape = parser->at < parser->end && *parser->at ? strchr(escapes, *parser->at) : NULL;
	if (!escape)
		return unexpected(parser, "an escape of JSON");
	*(*to)++ = meanings[escape - escapes];
	parser->at++;
	return 0;
}

/* Decode a string in place: it never becomes longer, and its NUL takes that of the quote. */
static int parse_string(struct parser *parser, const char **text, const char *what)
{
	char *to;
	int err = begin(parser, '"', what);

	if (err)
		return err;
	to = parser->at;
	*text = to;
	while (!take(parser, '"')) {
		size_t bytes = 0;

		if (take(parser, '\\')) {
			err = parse_escape(parser, &to);
			if (err)
				return err;
			continue;
		}
		if (parser->at < parser->end && (unsigned char)*parser->at >= ' ')
			bytes = character_bytes(parser->at, parser->end);
		if (!bytes)
			return unexpected(parser, "a character of UTF-8 or the end of a string");
		memmove(to, parser->at, bytes);
		to += bytes;
		parser->at += bytes;
	}
	*to = '\0';
	return 0;
}

static int parse_number(struct parser *parser, uint64_t *number)
{
	const char *start;

	skip_blanks(parser);
	start = parser->at;
	*number = 0;
	while (parser->at < parser->end && *parser->at >= '0' && *parser->at <= '9') {
		unsigned int digit = *parser->at - '0';

		if (parser->at > start && *start == '0')
			return unexpected(parser, "no digit behind a leading 0");
		if (*number > (UINT64_MAX - digit) / 10)
			return unexpected(parser, "a number below 2^64");
		*number = *number * 10 + digit;
		parser->at++;
	}
	return parser->at > start ? 0 : unexpected(parser, "a whole number");
}

/* Up to @max numbers; returns how many. */
static int parse_numbers(struct parser *parser, uint64_t *numbers, unsigned int max,
			 const char *what)
{
	unsigned int count = 0;
	int more, err = begin(parser, '[', what);

	if (err)
		return err;
	while ((more = goes_on(parser, count, ']')) > 0) {
		if (count == max)
			return unexpected(parser, what);
		err = parse_number(parser, &numbers[count]);
		if (err)
			return err;
		count++;
	}
	return more < 0 ? more : (int)count;
}

static int parse_dtype(struct parser *parser, const char *tensor, uint32_t *dtype)
{
	char name[PRINTABLE_NAME_BYTES], got[PRINTABLE_NAME_BYTES];
	const char *text;
	int err = parse_string(parser, &text, "a string as dtype");

	if (err)
		return err;
	for (*dtype = 0; *dtype < ARRAY_SIZE(dtypes); (*dtype)++)
		if (dtypes[*dtype] && !strcmp(dtypes[*dtype], text))
			return 0;
	return set_error(-EBADMSG, "tensor \"%s\": expected a dtype of F64 F32 F16 BF16 I64 I32 "
			 "I16 I8 or U8, got \"%s\"", printable_name(name, tensor),
			 printable_name(got, text));
}

static int parse_shape(struct parser *parser, struct safetensors_tensor *tensor)
{
	int ndim = parse_numbers(parser, tensor->shape, SAFETENSORS_MAX_DIMS,
				 "a list of at most 8 numbers as shape");

	if (ndim < 0)
		return ndim;
	tensor->ndim = ndim;
	return 0;
}

static int parse_offsets(struct parser *parser, struct safetensors_tensor *tensor)
{
	static const char what[] = "a list of two numbers as data_offsets";
	uint64_t offsets[2];
	int count = parse_numbers(parser, offsets, 2, what);

	if (count < 0)
		return count;
	if (count != 2)
		return unexpected(parser, what);
	tensor->begin = offsets[0];
	tensor->end = offsets[1];
	return 0;
}

/* What others may put beside what we know, and how deep they may nest it */
#define MAX_DEPTH 100

static bool take_word(struct parser *parser, const char *word)
{
	size_t length = strlen(word);

	if ((size_t)(parser->end - parser->at) < length || memcmp(parser->at, word, length))
		return false;
	parser->at += length;
	return true;
}

static bool take_digits(struct parser *parser)
{
	const char *start = parser->at;

	while (parser->at < parser->end && *parser->at >= '0' && *parser->at <= '9')
		parser->at++;
	return parser->at > start;
}

/* Any number of JSON */
static bool take_any_number(struct parser *parser)
{
	take(parser, '-');
	if (!take(parser, '0') && !take_digits(parser))
		return false;
	if (take(parser, '.') && !take_digits(parser))
		return false;
	if (!take(parser, 'e') && !take(parser, 'E'))
		return true;
	if (!take(parser, '+'))
		take(parser, '-');
	return take_digits(parser);
}

/* Any value that is not made of others */
static int skip_scalar(struct parser *parser)
{
	static const char what[] = "a value of JSON";
	const char *unused;

	if (parser->at < parser->end && *parser->at == '"')
		return parse_string(parser, &unused, what);
	if (take_word(parser, "true") || take_word(parser, "false") || take_word(parser, "null") ||
	    take_any_number(parser))
		return 0;
	return unexpected(parser, what);
}

static int skip_value(struct parser *parser, unsigned int depth)
{
	const char *unused;
	size_t count = 0;
	char close;
	int more, err;

	skip_blanks(parser);
	if (take(parser, '['))
		close = ']';
	else if (take(parser, '{'))
		close = '}';
	else
		return skip_scalar(parser);
	if (depth == MAX_DEPTH)
		return set_error(-EBADMSG, "safetensors header: expected at most %d values in one "
				 "another, got more at byte %td", MAX_DEPTH,
				 parser->at - parser->start);
	while ((more = goes_on(parser, count++, close)) > 0) {
		err = close == '}' ? parse_string(parser, &unused, "a key") : 0;
		if (!err && close == '}')
			err = begin(parser, ':', "':'");
		if (!err)
			err = skip_value(parser, depth + 1);
		if (err)
			return err;
	}
	return more;
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

static int parse_value(struct parser *parser, enum key key, struct safetensors_tensor *tensor)
{
	switch (key) {
	case KEY_DTYPE:
		return parse_dtype(parser, tensor->name, &tensor->dtype);
	case KEY_SHAPE:
		return parse_shape(parser, tensor);
	case KEY_DATA_OFFSETS:
		return parse_offsets(parser, tensor);
	default:
		return skip_value(parser, 0);
	}
}

/* The value of a tensor's entry */
static int parse_tensor(struct parser *parser, struct safetensors_tensor *tensor)
{
	char name[PRINTABLE_NAME_BYTES], got[PRINTABLE_NAME_BYTES];
	const char *text;
	size_t count = 0;
	int keys = 0;
	int more, err = begin(parser, '{', "an object as what a tensor is");

	if (err)
		return err;
	while ((more = goes_on(parser, count++, '}')) > 0) {
		enum key key;

		err = parse_string(parser, &text, "a key of a tensor");
		if (err)
			return err;
		key = key_by_name(text);
		if (keys & key)
			return set_error(-EBADMSG, "tensor \"%s\": expected dtype, shape and "
					 "data_offsets, got a second \"%s\"",
					 printable_name(name, tensor->name),
					 printable_name(got, text));
		err = begin(parser, ':', "':'");
		if (!err)
			err = parse_value(parser, key, tensor);
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

static int parse_metadata(struct parser *parser, struct safetensors *file)
{
	int more, err;

	skip_blanks(parser);
	if (take_word(parser, "null"))
		return 0;
	err = begin(parser, '{', "an object as " METADATA);
	if (err)
		return err;
	while ((more = goes_on(parser, file->nr_metadata, '}')) > 0) {
		struct safetensors_entry entry;

		err = parse_string(parser, &entry.key, "a key of " METADATA);
		if (!err)
			err = begin(parser, ':', "':'");
		if (!err)
			err = parse_string(parser, &entry.value, "a string in " METADATA);
		if (!err)
			err = add_entry(file, &entry);
		if (err)
			return err;
	}
	return more;
}

static int parse_object(struct parser *parser, struct safetensors *file)
{
	bool has_metadata = false;
	int more, err;

	/* no blanks before it: so the format is told from others */
	if (!take(parser, '{'))
		return unexpected(parser, "'{'");
	while ((more = goes_on(parser, file->nr_tensors + has_metadata, '}')) > 0) {
		struct safetensors_tensor tensor = { 0 };

		err = parse_string(parser, &tensor.name, "the name of a tensor");
		if (!err)
			err = begin(parser, ':', "':'");
		if (err)
			return err;
		if (!strcmp(tensor.name, METADATA)) {
			if (has_metadata)
				return set_error(-EBADMSG, "expected one " METADATA ", got two");
			has_metadata = true;
			err = parse_metadata(parser, file);
		} else {
			err = parse_tensor(parser, &tensor);
			if (!err)
				err = add_tensor(file, &tensor);
		}
		if (err)
			return err;
	}
	if (more < 0)
		return more;
	skip_blanks(parser);
	return parser->at == parser->end ? 0 : unexpected(parser, "nothing behind the object");
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
	struct parser parser = { .start = header, .at = header, .end = header + length };
	int err;

	*file = (struct safetensors){ 0 };
	err = parse_object(&parser, file);
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

static int check_new_names(const struct safetensors *file)
{
	const struct safetensors_tensor **list;
	char name[PRINTABLE_NAME_BYTES];
	int err;

	for (size_t i = 0; i < file->nr_tensors; i++) {
		const char *text = file->tensors[i].name;

		if (!*text || !strcmp(text, METADATA) || !is_utf8(text))
			return set_error(-EINVAL, "expected a name in UTF-8, neither empty nor "
					 METADATA ", got \"%s\"", printable_name(name, text));
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
