/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Rows that tell who wrote them, and whether they are whole.
 *
 * A row is an array of words of 52 bits, which I64 keeps of F64 exactly and which
 * MXINT8 keeps of F32 as 8 elements: so one form serves every kind of pad.
 */
#ifndef TESTS_TORTURE_ROWS_H
#define TESTS_TORTURE_ROWS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "../../tools/lib/device.h"

#define WORD_BITS 52
#define WORD_MASK ((1ull << WORD_BITS) - 1)

/* What the words of a row are; payload up to its end follows. */
enum {
	ROW_CHECK,
	ROW_WRITER,
	ROW_BATCH,
	ROW_PLACE,
	ROW_GENERATION,
	ROW_HEAD_WORDS
};

/**
 * struct row_id - which row it is
 * @writer: number of the process that appended it
 * @batch: counts the appends of that process, from 1
 * @index: of the row in its batch
 * @count: rows of the batch
 * @generation: of the pad, as the writer knew it before the append
 */
struct row_id {
	uint32_t writer;
	uint32_t batch;
	uint32_t index;
	uint32_t count;
	uint32_t generation;
};

/**
 * struct shape - a kind of pad
 * @dtype: what is stored
 * @input_dtype: what is appended, or 0
 * @dim: elements per row
 * @words: words per row
 * @rows: capacity
 * @max_batch: rows of the largest append
 * @planes: over how many planes the words of a row are spread evenly; more than one
 *	only where rows are stored as they come
 */
struct shape {
	uint32_t dtype;
	uint32_t input_dtype;
	uint32_t dim;
	uint32_t words;
	uint32_t rows;
	uint32_t max_batch;
	uint32_t planes;
};

#define MAX_PLANES 8

#define MX_WORD_ELEMENTS 8
#define MX_ELEMENT_BITS 7
/* The last element of a word has 3 bits of it, and a bit that settles the scale. */
#define MX_LAST_BITS (WORD_BITS - (MX_WORD_ELEMENTS - 1) * MX_ELEMENT_BITS)
#define MX_LAST_MARK 64
/* of a block whose largest magnitude is 64 to 127: elements are what they were */
#define MX_SCALE (127 + 6)

static inline uint64_t row_checksum(const uint64_t *words, uint32_t count)
{
	/* not zero: a row of zeros is not whole */
	uint64_t sum = 0x6a09e667f3bcc908;

	for (uint32_t i = ROW_CHECK + 1; i < count; i++)
		sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15;
	return sum >> (64 - WORD_BITS);
}

static inline void make_row(uint64_t *words, uint32_t count, const struct row_id *id)
{
	uint64_t payload = ((uint64_t)id->writer << 32 | id->batch) * 0xd1342543de82ef95 + id->index;

	words[ROW_WRITER] = id->writer;
	words[ROW_BATCH] = id->batch;
	words[ROW_PLACE] = (uint64_t)id->count << 16 | id->index;
	words[ROW_GENERATION] = id->generation;
	for (uint32_t i = ROW_HEAD_WORDS; i < count; i++) {
		payload = payload * 6364136223846793005 + 1442695040888963407;
		words[i] = payload >> (64 - WORD_BITS);
	}
	words[ROW_CHECK] = row_checksum(words, count);
}

static inline struct row_id row_id(const uint64_t *words)
{
	return (struct row_id) {
		.writer = words[ROW_WRITER],
		.batch = words[ROW_BATCH],
		.index = words[ROW_PLACE] & 0xffff,
		.count = words[ROW_PLACE] >> 16,
		.generation = words[ROW_GENERATION],
	};
}

static inline bool row_is_whole(const uint64_t *words, uint32_t count)
{
	return words[ROW_CHECK] == row_checksum(words, count);
}

/* Bytes of a row as write() takes it, and as read() gives it */
static inline size_t input_row_bytes(const struct shape *shape)
{
	return (size_t)shape->dim *
		kvscratch_dtype_size(shape->input_dtype ? shape->input_dtype : shape->dtype);
}

static inline size_t mx_scale_bytes(const struct shape *shape)
{
	return shape->dtype == KVSCRATCH_DTYPE_MXINT8 ? shape->dim / KVSCRATCH_MX_BLOCK : 0;
}

static inline size_t stored_row_bytes(const struct shape *shape)
{
	return (size_t)shape->dim * kvscratch_dtype_size(shape->dtype) + mx_scale_bytes(shape);
}

static inline void encode_mx(const struct shape *shape, const uint64_t *words, float *elements)
{
	for (uint32_t i = 0; i < shape->words; i++) {
		uint64_t word = words[i];

		for (uint32_t j = 0; j < MX_WORD_ELEMENTS; j++) {
			uint32_t bits = word & ((1u << MX_ELEMENT_BITS) - 1);

			*elements++ = j < MX_WORD_ELEMENTS - 1 ? bits : MX_LAST_MARK | bits;
			word >>= MX_ELEMENT_BITS;
		}
	}
}

/* Words to what write() takes */
static inline void encode_row(const struct shape *shape, const uint64_t *words, void *row)
{
	double *numbers = row;

	if (shape->dtype == KVSCRATCH_DTYPE_MXINT8) {
		encode_mx(shape, words, row);
	} else if (shape->input_dtype) {
		for (uint32_t i = 0; i < shape->words; i++)
			numbers[i] = words[i];
	} else {
		memcpy(row, words, shape->words * sizeof(*words));
	}
}

/* What is not an encoding becomes a word that has more bits than there are. */
static inline void decode_mx(const struct shape *shape, const uint8_t *elements,
			     const uint8_t *scales, uint64_t *words)
{
	for (uint32_t i = 0; i < shape->words; i++) {
		const uint8_t *element = elements + i * MX_WORD_ELEMENTS;
		uint8_t last = element[MX_WORD_ELEMENTS - 1] ^ MX_LAST_MARK;
		uint8_t scale = scales[i * MX_WORD_ELEMENTS / KVSCRATCH_MX_BLOCK];

		words[i] = last;
		for (int j = MX_WORD_ELEMENTS - 2; j >= 0; j--)
			words[i] = words[i] << MX_ELEMENT_BITS ^ element[j];
		if (last >> MX_LAST_BITS || scale != MX_SCALE)
			words[i] |= ~WORD_MASK;
	}
}

/* Stored rows to words: those that lie there, or @buffer filled with them */
static inline const uint64_t *decode_row(const struct shape *shape, const void *elements,
					 const void *scales, uint64_t *buffer)
{
	if (shape->dtype != KVSCRATCH_DTYPE_MXINT8)
		return elements;
	decode_mx(shape, elements, scales, buffer);
	return buffer;
}

#endif
