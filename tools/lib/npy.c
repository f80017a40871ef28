// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "npy.h"

#include <inttypes.h>
#include <linux/kvscratch.h>
#include <stdio.h>
#include <string.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define NATIVE "<"
#else
#define NATIVE ">"
#endif

/* magic, two bytes of version, and the length in two or, from 2.0 on, four bytes */
#define PREFIX_V1 (NPY_MAGIC_BYTES + 2 + 2)
#define PREFIX_V2 NPY_PREFIX_BYTES
/* NumPy pads headers so that the data is aligned to this */
#define ALIGNMENT 64

static const char *const descrs[] = {
	[KVSCRATCH_DTYPE_F64] = NATIVE "f8",
	[KVSCRATCH_DTYPE_F32] = NATIVE "f4",
	[KVSCRATCH_DTYPE_F16] = NATIVE "f2",
	[KVSCRATCH_DTYPE_I64] = NATIVE "i8",
	[KVSCRATCH_DTYPE_I32] = NATIVE "i4",
	[KVSCRATCH_DTYPE_I16] = NATIVE "i2",
	[KVSCRATCH_DTYPE_I8] = "|i1",
	[KVSCRATCH_DTYPE_U8] = "|u1",
};

#define NR_DESCRS (sizeof(descrs) / sizeof(descrs[0]))

/* What NumPy reads as well, and other programs write */
static const char *const names[NR_DESCRS] = {
	[KVSCRATCH_DTYPE_F64] = "float64",
	[KVSCRATCH_DTYPE_F32] = "float32",
	[KVSCRATCH_DTYPE_F16] = "float16",
	[KVSCRATCH_DTYPE_I64] = "int64",
	[KVSCRATCH_DTYPE_I32] = "int32",
	[KVSCRATCH_DTYPE_I16] = "int16",
	[KVSCRATCH_DTYPE_I8] = "int8",
	[KVSCRATCH_DTYPE_U8] = "uint8",
};

static uint32_t dtype_of(const char *descr)
{
	/* no order is this machine's, and single bytes have none, whatever is said about it */
	bool native = *descr && (strchr("=|", *descr) || *descr == *NATIVE);
	const char *type = descr + (*descr && strchr("<>=|", *descr));

	for (uint32_t dtype = 0; dtype < NR_DESCRS; dtype++) {
		if (!descrs[dtype])
			continue;
		if (!strcmp(names[dtype], type) || !strcmp(descrs[dtype] + 1, type))
			return type == descr || native || *descrs[dtype] == '|' ? dtype : 0;
	}
	return 0;
}

/* The part of the literal that is still to be read */
struct cursor {
	const char *at;
	const char *end;
};

static void skip_blanks(struct cursor *cursor)
{
	while (cursor->at < cursor->end && *cursor->at && strchr(" \t\r\n\f", *cursor->at))
		cursor->at++;
}

/* Take @token if it comes next, blanks around it aside. */
static bool take(struct cursor *cursor, const char *token)
{
	size_t length = strlen(token);

	skip_blanks(cursor);
	if ((size_t)(cursor->end - cursor->at) < length || memcmp(cursor->at, token, length))
		return false;
	cursor->at += length;
	skip_blanks(cursor);
	return true;
}

static bool is_plain(const char *text, size_t length)
{
	for (size_t i = 0; i < length; i++)
		if (text[i] < ' ' || text[i] > '~' || text[i] == '\\')
			return false;
	return true;
}

/* A string of printable ASCII without escapes, in quotes of either kind */
static bool take_string(struct cursor *cursor, char *text, size_t size)
{
	const char *start, *close;

	skip_blanks(cursor);
	/* as Python 2 has it for what is not ASCII, too */
	if (cursor->at < cursor->end && (*cursor->at == 'u' || *cursor->at == 'U'))
		cursor->at++;
	if (cursor->at == cursor->end || (*cursor->at != '\'' && *cursor->at != '"'))
		return false;
	start = cursor->at + 1;
	close = memchr(start, *cursor->at, cursor->end - start);
	if (!close || (size_t)(close - start) >= size || !is_plain(start, close - start))
		return false;
	memcpy(text, start, close - start);
	text[close - start] = '\0';
	cursor->at = close + 1;
	return true;
}

static bool take_bool(struct cursor *cursor, bool *value)
{
	*value = take(cursor, "True");
	return *value || take(cursor, "False");
}

static bool take_number(struct cursor *cursor, uint64_t *number)
{
	const char *start = cursor->at;

	*number = 0;
	while (cursor->at < cursor->end && *cursor->at >= '0' && *cursor->at <= '9') {
		unsigned int digit = *cursor->at - '0';

		if (*number > (UINT64_MAX - digit) / 10)
			return false;
		*number = *number * 10 + digit;
		cursor->at++;
	}
	if (cursor->at == start)
		return false;
	/* a long integer of Python 2 */
	take(cursor, "L");
	return true;
}

/* A tuple of numbers; that of one ends with a comma */
static bool take_shape(struct cursor *cursor, struct npy_array *array)
{
	bool comma = true;

	array->ndim = 0;
	if (!take(cursor, "("))
		return false;
	while (!take(cursor, ")")) {
		if (!comma || array->ndim == NPY_MAX_DIMS ||
		    !take_number(cursor, &array->shape[array->ndim]))
			return false;
		array->ndim++;
		comma = take(cursor, ",");
	}
	return array->ndim != 1 || comma;
}

enum key { KEY_DESCR = 1, KEY_FORTRAN_ORDER = 2, KEY_SHAPE = 4, ALL_KEYS = 7 };

/* Returns what is wrong, or NULL and adds the key to @keys. */
static const char *parse_entry(struct cursor *cursor, struct npy_array *array, int *keys)
{
	char name[16];
	enum key key;
	bool good;

	if (!take_string(cursor, name, sizeof(name)) || !take(cursor, ":"))
		return "expected a key of the .npy header";
	if (!strcmp(name, "descr")) {
		key = KEY_DESCR;
		good = take_string(cursor, array->descr, sizeof(array->descr));
	} else if (!strcmp(name, "fortran_order")) {
		key = KEY_FORTRAN_ORDER;
		good = take_bool(cursor, &array->fortran_order);
	} else if (!strcmp(name, "shape")) {
		key = KEY_SHAPE;
		good = take_shape(cursor, array);
	} else {
		return "expected no more keys in the .npy header";
	}
	if (*keys & key)
		return "expected each key of the .npy header once";
	*keys |= key;
	if (good)
		return NULL;
	switch (key) {
	case KEY_DESCR:
		return "expected a simple element type as descr in the .npy header";
	case KEY_SHAPE:
		return "expected a tuple of numbers as shape in the .npy header";
	default:
		return "expected True or False as fortran_order in the .npy header";
	}
}

static const char *parse_literal(struct cursor *cursor, struct npy_array *array)
{
	int keys = 0;

	if (!take(cursor, "{"))
		return "expected a dict in the .npy header";
	while (!take(cursor, "}")) {
		const char *error = parse_entry(cursor, array, &keys);

		if (error)
			return error;
		if (!take(cursor, ",") && (cursor->at == cursor->end || *cursor->at != '}'))
			return "expected a comma or the end of the dict in the .npy header";
	}
	if (cursor->at != cursor->end)
		return "expected nothing behind the dict in the .npy header";
	if (keys != ALL_KEYS)
		return "expected the keys descr, fortran_order and shape in the .npy header";
	return NULL;
}

static bool has_long_length(const unsigned char *file)
{
	return file[6] == 2 || file[6] == 3;
}

const char *npy_header_size(const void *bytes, size_t size, uint64_t *header)
{
	const unsigned char *file = bytes;

	if (size < NPY_PREFIX_BYTES || memcmp(file, NPY_MAGIC, NPY_MAGIC_BYTES))
		return "expected a .npy header";
	*header = PREFIX_V1 + (file[8] | file[9] << 8);
	if (has_long_length(file))
		*header += PREFIX_V2 - PREFIX_V1 + ((uint64_t)file[10] << 16) +
			   ((uint64_t)file[11] << 24);
	else if (file[6] != 1)
		return "expected .npy version 1, 2 or 3";
	return NULL;
}

const char *npy_parse_header(const void *bytes, size_t size, struct npy_array *array)
{
	const unsigned char *file = bytes;
	struct cursor cursor;
	const char *error;
	uint64_t header;

	*array = (struct npy_array){ 0 };
	error = npy_header_size(bytes, size, &header);
	if (error)
		return error;
	if (header > size)
		return "the .npy header is cut off";
	cursor.at = (const char *)file + (has_long_length(file) ? PREFIX_V2 : PREFIX_V1);
	cursor.end = (const char *)file + header;
	error = parse_literal(&cursor, array);
	array->dtype = dtype_of(array->descr);
	array->data_offset = header;
	return error;
}

size_t npy_write_header(char header[static NPY_HEADER_BYTES], uint64_t rows, uint32_t dim,
			uint32_t dtype)
{
	char literal[NPY_HEADER_BYTES];
	size_t length, total;

	if (dtype >= NR_DESCRS || !descrs[dtype])
		return 0;
	length = snprintf(literal, sizeof(literal),
			  "{'descr': '%s', 'fortran_order': False, 'shape': (%" PRIu64 ", %" PRIu32
			  "), }", descrs[dtype], rows, dim);
	/* a newline ends it, blanks fill it */
	total = (PREFIX_V1 + length + 1 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	memset(header, ' ', total);
	memcpy(header, NPY_MAGIC "\1\0", NPY_MAGIC_BYTES + 2);
	header[8] = (total - PREFIX_V1) & 0xff;
	header[9] = (total - PREFIX_V1) >> 8;
	memcpy(header + PREFIX_V1, literal, length);
	header[total - 1] = '\n';
	return total;
}
