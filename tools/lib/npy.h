/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The header of .npy files, versions 1.0 to 3.0 as numpy.lib.format describes
 * them: a magic string, two version bytes, the length of the header, a Python
 * dict literal with the keys descr, fortran_order and shape, and the data. Of the literals
 * and the types that numpy.load() takes these are those that are in use, of Python 2 too.
 */
#ifndef NPY_H
#define NPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NPY_MAGIC "\x93NUMPY"
#define NPY_MAGIC_BYTES 6
/* What tells how long the header is: magic string, version and length */
#define NPY_PREFIX_BYTES 12
#define NPY_MAX_DIMS 32
/* Longest header that npy_write_header() makes */
#define NPY_HEADER_BYTES 128

/**
 * struct npy_array - what a header says
 * @descr: element type as NumPy writes it, "<f4"
 * @dtype: the same as one of enum kvscratch_dtype, 0 if it is none of them or
 *	not in this machine's byte order
 * @fortran_order: the first index varies fastest
 * @ndim: entries of @shape in use
 * @shape: elements along each axis
 * @data_offset: where the data begins in the file
 */
struct npy_array {
	char descr[16];
	uint32_t dtype;
	bool fortran_order;
	unsigned int ndim;
	uint64_t shape[NPY_MAX_DIMS];
	size_t data_offset;
};

/**
 * npy_header_size() - how long the header of a .npy file is
 * @bytes: the file, or NPY_PREFIX_BYTES of it
 * @size: how much that is
 * @header: receives the length, @bytes included
 *
 * Returns NULL, or what is wrong: a constant string.
 */
const char *npy_header_size(const void *bytes, size_t size, uint64_t *header);

/**
 * npy_parse_header() - read the header of a .npy file
 * @bytes: the file, or as much of it as holds the header
 * @size: how much that is
 * @array: receives what it says
 *
 * Returns NULL, or what is wrong: a constant string.
 */
const char *npy_parse_header(const void *bytes, size_t size, struct npy_array *array);

/**
 * npy_write_header() - make the header of a [rows, dim] array in C order
 * @header: receives it
 * @rows: length of the first axis
 * @dim: length of the second
 * @dtype: one of enum kvscratch_dtype
 *
 * Returns its length, a multiple of 64 as NumPy wants it, or 0 if NumPy has no
 * such type (bf16).
 */
size_t npy_write_header(char header[static NPY_HEADER_BYTES], uint64_t rows, uint32_t dim,
			uint32_t dtype);

#endif
