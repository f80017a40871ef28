/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The header of safetensors files: a little-endian u64 with its length, a JSON object,
 * and the data. The object has an entry for each tensor,
 *
 *   "NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
 *
 * with offsets into the data, and may have one named __metadata__, of strings or null. Tensors
 * lie one behind the other, without overlap and gap, and fill the data; they are in C
 * order and little-endian. Blanks behind the object align the data.
 *
 * The parser takes that and nothing else: no other type, no number but a whole one, no
 * string with a NUL, no name twice. What else an entry of a tensor says has to be JSON, up to
 * a depth, and is passed over, as the format's own library does.
 */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

/* Bytes of the length word */
#define SAFETENSORS_PREFIX 8
/* Longest object; the format allows 100 MB, which is millions of tensors. */
#define SAFETENSORS_MAX_HEADER (16u << 20)
#define SAFETENSORS_MAX_DIMS 8

/**
 * struct safetensors_tensor - what a header says about one tensor
 * @name: UTF-8
 * @dtype: one of enum kvscratch_dtype, but for KVSCRATCH_DTYPE_MXINT8
 * @ndim: entries of @shape in use
 * @shape: elements along each axis
 * @begin: where it begins in the data, in bytes
 * @end: where it ends
 */
struct safetensors_tensor {
	const char *name;
	uint32_t dtype;
	unsigned int ndim;
	uint64_t shape[SAFETENSORS_MAX_DIMS];
	uint64_t begin;
	uint64_t end;
};

/* An entry of __metadata__ */
struct safetensors_entry {
	const char *key;
	const char *value;
};

/**
 * struct safetensors - what a header says
 * @tensors: the tensors, in the order of the header
 * @nr_tensors: how many
 * @by_name: the same in the order of their names; of a parsed header only
 * @metadata: the entries of __metadata__, after parsing in the order of their keys
 * @nr_metadata: how many
 */
struct safetensors {
	struct safetensors_tensor *tensors;
	size_t nr_tensors;
	const struct safetensors_tensor **by_name;
	struct safetensors_entry *metadata;
	size_t nr_metadata;
};

/**
 * safetensors_parse() - read a header
 * @file: receives what it says; safetensors_free() ends it
 * @header: the object and the blanks behind it; the parser decodes strings in place
 *	and @file points into it
 * @length: how long that is
 * @data_bytes: how much data follows
 *
 * Returns 0, -EBADMSG or -ENOMEM, with words for kvscratch_error().
 */
int safetensors_parse(struct safetensors *file, char *header, size_t length, uint64_t data_bytes);

/* Leaves @file empty, as it is after an error, so that it can come twice. */
void safetensors_free(struct safetensors *file);

/* The tensor of this name, or NULL; @file was parsed. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *file,
						  const char *name);

/* The value of this key in __metadata__, or NULL; @file was parsed. */
const char *safetensors_metadata(const struct safetensors *file, const char *key);

/* -EINVAL, with words, for a name that no tensor can have */
int safetensors_check_name(const char *name);

/**
 * safetensors_write_header() - make a header
 * @file: what it shall say
 * @header: receives the length word, the object and blanks up to a multiple of 64 bytes;
 *	the caller frees it
 * @size: receives how long all that is
 *
 * Returns 0, -EINVAL for a name that no header can have, -E2BIG or -ENOMEM, with words for
 * kvscratch_error(). Offsets are written as they are given.
 */
int safetensors_write_header(const struct safetensors *file, char **header, size_t *size);

/* Room for what printable_name() makes */
#define PRINTABLE_NAME_BYTES 64

/* A name as a message can show it: on one line, and not too long */
const char *printable_name(char text[static PRINTABLE_NAME_BYTES], const char *name);

#endif
