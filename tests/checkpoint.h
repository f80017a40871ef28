/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A checkpoint and a tokenizer in llama2.c's formats: the shape of stories260K, and
 * pseudo-random weights.
 */
#ifndef TESTS_CHECKPOINT_H
#define TESTS_CHECKPOINT_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECKPOINT_DIM 64
#define CHECKPOINT_HIDDEN_DIM 172
#define CHECKPOINT_LAYERS 5
#define CHECKPOINT_HEADS 8
#define CHECKPOINT_KV_HEADS 4
#define CHECKPOINT_VOCAB_SIZE 512
#define CHECKPOINT_SEQ_LEN 512
#define CHECKPOINT_HEAD_SIZE (CHECKPOINT_DIM / CHECKPOINT_HEADS)
#define CHECKPOINT_KV_DIM (CHECKPOINT_HEAD_SIZE * CHECKPOINT_KV_HEADS)
#define CHECKPOINT_BYTE_TOKENS 256
#define CHECKPOINT_FIRST_BYTE 3

static inline FILE *checkpoint_create(const char *path)
{
	FILE *to = fopen(path, "w");

	if (!to) {
		perror(path);
		abort();
	}
	return to;
}

static inline void checkpoint_close(FILE *to)
{
	if (ferror(to) || fclose(to)) {
		perror("a checkpoint");
		abort();
	}
}

static inline void put_i32(FILE *to, int32_t value)
{
	uint32_t word = htole32(value);

	fwrite(&word, sizeof(word), 1, to);
}

static inline void put_f32(FILE *to, float value)
{
	int32_t word;

	memcpy(&word, &value, sizeof(word));
	put_i32(to, word);
}

/* From -0.125 to 0.125 */
static inline void put_weights(FILE *to, uint32_t *state, size_t count)
{
	while (count--) {
		*state = *state * 1664525 + 1013904223;
		put_f32(to, ((int32_t)(*state >> 8) - (1 << 23)) * 0x1p-26f);
	}
}

static inline void put_constants(FILE *to, size_t count, float value)
{
	while (count--)
		put_f32(to, value);
}

/* llama2.c's legacy format, tensors in their order, the classifier is the embedding */
static inline void write_checkpoint(const char *path, uint32_t seed)
{
	static const int32_t header[] = {
		CHECKPOINT_DIM, CHECKPOINT_HIDDEN_DIM, CHECKPOINT_LAYERS, CHECKPOINT_HEADS,
		CHECKPOINT_KV_HEADS, CHECKPOINT_VOCAB_SIZE, CHECKPOINT_SEQ_LEN,
	};
	const size_t dim = CHECKPOINT_DIM, layers = CHECKPOINT_LAYERS;
	FILE *to = checkpoint_create(path);

	for (size_t i = 0; i < sizeof(header) / sizeof(header[0]); i++)
		put_i32(to, header[i]);
	/* the tokens that would end the text are never the most likely ones */
	put_constants(to, CHECKPOINT_FIRST_BYTE * dim, 0);
	put_weights(to, &seed, (CHECKPOINT_VOCAB_SIZE - CHECKPOINT_FIRST_BYTE) * dim);
	put_constants(to, layers * dim, 1);
	/* wq, wk, wv, wo */
	put_weights(to, &seed, layers * dim * 2 * (dim + CHECKPOINT_KV_DIM));
	put_constants(to, layers * dim, 1);
	put_weights(to, &seed, 3 * layers * dim * CHECKPOINT_HIDDEN_DIM);
	put_constants(to, dim, 1);
	/* frequencies, which nobody reads */
	put_constants(to, CHECKPOINT_SEQ_LEN * CHECKPOINT_HEAD_SIZE, 0);
	checkpoint_close(to);
}

static inline void write_tokenizer(const char *path)
{
	FILE *to = checkpoint_create(path);

	put_i32(to, 8);
	for (int id = 0; id < CHECKPOINT_VOCAB_SIZE; id++) {
		char piece[16];

		if (id >= CHECKPOINT_FIRST_BYTE &&
		    id < CHECKPOINT_FIRST_BYTE + CHECKPOINT_BYTE_TOKENS)
			snprintf(piece, sizeof(piece), "<0x%02X>", id - CHECKPOINT_FIRST_BYTE);
		else
			snprintf(piece, sizeof(piece), " t%d", id);
		put_f32(to, 0);
		put_i32(to, strlen(piece));
		fputs(piece, to);
	}
	checkpoint_close(to);
}

#endif
