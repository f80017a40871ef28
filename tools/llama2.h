/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A Llama-2 style transformer: checkpoint, tokenizer, forward pass, sampler.
 *
 * It owns the weights and the activations, but not the KV cache: that is
 * handed in as struct llama2_rows, so that the model cannot know what kind of
 * memory it attends to.
 */
#ifndef LLAMA2_H
#define LLAMA2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum exit_code {
	EXIT_DONE = 0,
	EXIT_INPUT = 1,
	EXIT_PADS = 2,
	EXIT_SYSTEM = 3,
};

/* Ids that every vocabulary begins with; 256 single bytes follow. */
#define LLAMA2_BOS		1
#define LLAMA2_EOS		2
#define LLAMA2_FIRST_BYTE	3
#define LLAMA2_FIRST_PIECE	(LLAMA2_FIRST_BYTE + 256)

/* Bytes of a file, or of something made up in its format. */
struct llama2_blob {
	void *data;
	size_t size;
	bool mapped;
};

struct llama2_shape {
	uint32_t dim;
	uint32_t hidden_dim;
	uint32_t n_layers;
	uint32_t n_heads;
	uint32_t n_kv_heads;
	uint32_t vocab_size;
	uint32_t seq_len;
	bool shared_classifier;
	/* derived */
	uint32_t head_size;
	uint32_t kv_dim;
};

/* The tensors in the order of the file. */
enum llama2_tensor {
	LLAMA2_EMBEDDING,
	LLAMA2_RMS_ATT,
	LLAMA2_WQ,
	LLAMA2_WK,
	LLAMA2_WV,
	LLAMA2_WO,
	LLAMA2_RMS_FFN,
	LLAMA2_W1,
	LLAMA2_W2,
	LLAMA2_W3,
	LLAMA2_RMS_FINAL,
	LLAMA2_FREQ_REAL,
	LLAMA2_FREQ_IMAG,
	LLAMA2_CLASSIFIER,
	LLAMA2_NR_TENSORS
};

struct llama2_rows;

/**
 * struct llama2_model - weights and activations
 * @batch: the most tokens that one llama2_forward() takes
 * @logits: what it leaves: for each of its tokens one per token of the vocabulary
 * @queries: of each layer, where the rotated query of each position goes; or NULL
 * @scratch: the one allocation that the activations are cut from, each of @batch rows
 *	but for @scores and @head_row
 */
struct llama2_model {
	struct llama2_shape shape;
	uint32_t batch;
	struct llama2_blob blob;
	const float *tensor[LLAMA2_NR_TENSORS];
	float *scratch;
	float *x;
	float *normed;
	float *q;
	float *k;
	float *v;
	float *attended;
	float *gate;
	float *up;
	float *scores;
	float *head_row;
	float *cosines;
	float *sines;
	float *logits;
	struct llama2_rows *const *queries;
};

/**
 * struct llama2_rows - K or V of one layer, or queries, which are not read again
 * @data: the [positions, kv_dim] array of floats, or of MXINT8 elements
 * @scales: the [positions, kv_dim / 32] array of their scales, NULL with floats
 * @put: store @count rows from position @first on, where @data has them afterwards;
 *	returns 0 or an exit code after fail()
 */
struct llama2_rows {
	const void *data;
	const uint8_t *scales;
	int (*put)(struct llama2_rows *rows, uint32_t first, const void *more, uint32_t count);
};

/* @batch: the most tokens that one llama2_forward() takes */
int llama2_open(struct llama2_model *model, const char *path, uint32_t batch);
int llama2_make_up(struct llama2_model *model, uint32_t batch);
void llama2_close(struct llama2_model *model);

/* FNV-1a, 64 bits, of all bytes of the checkpoint */
uint64_t llama2_fingerprint(const struct llama2_model *model);

/**
 * llama2_forward() - run tokens that follow each other through the model
 * @model: the model
 * @cache: K and V rows in the order k0 v0 k1 v1 ..., which have those of all positions
 *	before @pos and get those of the tokens, each layer at once
 * @tokens: their ids
 * @pos: position of the first
 * @count: how many: 1 to @model->batch; to the last bit each gives what it gives alone
 *
 * Returns 0, or what a put returned.
 */
int llama2_forward(struct llama2_model *model, struct llama2_rows *const *cache,
		   const int32_t *tokens, uint32_t pos, uint32_t count);

struct llama2_piece {
	const char *bytes;
	uint32_t length;
	int32_t id;
	float score;
};

/**
 * struct llama2_tokenizer - a vocabulary
 * @max_length: bytes of the longest piece
 * @pieces: by id
 * @sorted: the pieces that text can become, by bytes and then by id
 */
struct llama2_tokenizer {
	struct llama2_blob blob;
	uint32_t vocab_size;
	uint32_t max_length;
	struct llama2_piece *pieces;
	struct llama2_piece *sorted;
};

int llama2_tokenizer_open(struct llama2_tokenizer *tok, const char *path, uint32_t vocab_size);
int llama2_tokenizer_make_up(struct llama2_tokenizer *tok);
void llama2_tokenizer_close(struct llama2_tokenizer *tok);

/* Encode @text with BOS in front; returns 0 and @ids, which the caller frees, or an exit code. */
int llama2_encode(const struct llama2_tokenizer *tok, const char *text, int32_t **ids,
		  uint32_t *count);

/* The bytes that token @id after @previous stands for; @byte holds them if it is a single byte. */
size_t llama2_decode(const struct llama2_tokenizer *tok, int32_t previous, int32_t id, char *byte,
		     const char **bytes);

struct llama2_candidate {
	float probability;
	int32_t id;
};

struct llama2_sampler {
	float temperature;
	float top_p;
	uint64_t seed;
	struct llama2_candidate *candidates;
};

int llama2_sampler_open(struct llama2_sampler *sampler, uint32_t vocab_size);
void llama2_sampler_close(struct llama2_sampler *sampler);

/* Choose the token of position @pos; the same logits, seed and position give the same token. */
int32_t llama2_sample(const struct llama2_sampler *sampler, const float *logits,
		      uint32_t vocab_size, uint32_t pos);

#endif
