// SPDX-License-Identifier: GPL-2.0-only
#define _FILE_OFFSET_BITS 64
#include "llama2.h"

#include "cli.h"

#include <linux/kvscratch.h>

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* What MXINT8 scales and elements count in; see <linux/kvscratch.h> */
#define MX_BIAS		127
#define MX_FRAC_BITS	6
#define MX_NAN_SCALE	255

static int no_memory(void)
{
	return fail(EXIT_SYSTEM, "out of memory");
}

/* Files */

static int map_descriptor(struct llama2_blob *blob, int fd, const char *path)
{
	struct stat status;
	void *data;

	if (fstat(fd, &status))
		return fail(EXIT_INPUT, "%s: %s", path, strerror(errno));
	if (!S_ISREG(status.st_mode))
		return fail(EXIT_INPUT, "%s: expected a regular file, got something else", path);
	*blob = (struct llama2_blob){ .size = status.st_size, .mapped = true };
	if (blob->size != (uint64_t)status.st_size)
		return fail(EXIT_INPUT,
			    "%s: expected a file that fits the address space, got %llu bytes",
			    path, (unsigned long long)status.st_size);
	if (!blob->size)
		return 0;
	data = mmap(NULL, blob->size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (data == MAP_FAILED)
		return fail(EXIT_INPUT, "%s: cannot map: %s", path, strerror(errno));
	blob->data = data;
	return 0;
}

static int blob_map(struct llama2_blob *blob, const char *path)
{
	/* a FIFO would wait for its writer */
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	int err;

	if (fd < 0)
		return fail(EXIT_INPUT, "%s: %s", path, strerror(errno));
	err = map_descriptor(blob, fd, path);
	close(fd);
	return err;
}

static int blob_alloc(struct llama2_blob *blob, size_t size)
{
	*blob = (struct llama2_blob){ .data = calloc(1, size), .size = size };
	return blob->data ? 0 : no_memory();
}

static void blob_free(struct llama2_blob *blob)
{
	if (!blob->mapped)
		free(blob->data);
	else if (blob->data)
		munmap(blob->data, blob->size);
	*blob = (struct llama2_blob){ 0 };
}

static int32_t read_i32(const char *bytes)
{
	uint32_t word;

	memcpy(&word, bytes, sizeof(word));
	return (int32_t)le32toh(word);
}

static float read_f32(const char *bytes)
{
	int32_t word = read_i32(bytes);
	float value;

	memcpy(&value, &word, sizeof(value));
	return value;
}

static void write_i32(char *bytes, int32_t value)
{
	uint32_t word = htole32((uint32_t)value);

	memcpy(bytes, &word, sizeof(word));
}

static void write_f32(char *bytes, float value)
{
	int32_t word;

	memcpy(&word, &value, sizeof(word));
	write_i32(bytes, word);
}

/* Checkpoint */

/*
 * Upper bounds far above any real model, and low enough that no product of a
 * tensor's dimensions, nor the sum of all tensors, comes near 2^63.
 */
static const struct {
	const char *name;
	int64_t min;
	int64_t max;
} header_fields[] = {
	{ "dim", 2, 1 << 16 },
	{ "hidden_dim", 1, 1 << 20 },
	{ "n_layers", 1, 1 << 10 },
	{ "n_heads", 1, 1 << 15 },
	{ "n_kv_heads", 1, 1 << 15 },
	{ "vocab_size", LLAMA2_FIRST_PIECE, 1 << 20 },
	{ "seq_len", 1, 1 << 20 },
};

#define HEADER_BYTES (sizeof(int32_t) * ARRAY_SIZE(header_fields))
#define HEADER_VOCAB_SIZE 5

/* Other formats, by how they begin: what people take for ours */

#define CHECKPOINT_FORMAT	"a checkpoint as llama2.c's legacy export (version 0) writes it"
#define TOKENIZER_FORMAT	"a tokenizer as llama2.c's tokenizer.py writes it"

static const struct {
	const char *bytes;
	size_t count;
	const char *name;
} magics[] = {
	{ "GGUF", 4, "a GGUF file" },
	{ "FUGG", 4, "a big-endian GGUF file" },
	{ "lmgg", 4, "a GGML file" },
	{ "fmgg", 4, "a GGML file" },
	{ "tjgg", 4, "a GGML file" },
	{ "PK\3\4", 4, "a ZIP archive, as PyTorch writes" },
	{ "\x93NUMPY", 6, "a .npy file" },
	{ "\x89HDF\r\n", 6, "an HDF5 file" },
	{ "\x1f\x8b\x08", 3, "a file compressed by gzip" },
	{ "\x28\xb5\x2f\xfd", 4, "a file compressed by zstd" },
	{ "\xfd" "7zXZ", 5, "a file compressed by xz" },
	{ "BZh", 3, "a file compressed by bzip2" },
	{ "\x7f" "ELF", 4, "a program" },
	{ "version https://git-lfs.github.com/", 35,
	  "a Git LFS pointer, for which git lfs pull brings the file" },
	{ "/annex/objects/", 15, "a git-annex pointer, for which git annex get brings the file" },
};

static uint32_t read_u32(const char *bytes, bool big_endian)
{
	uint32_t word = (uint32_t)read_i32(bytes);

	return big_endian ? __builtin_bswap32(word) : word;
}

static bool begins_with(const struct llama2_blob *blob, size_t offset, const char *bytes)
{
	size_t count = strlen(bytes);

	return blob->size >= offset + count &&
	       !strncasecmp((const char *)blob->data + offset, bytes, count);
}

static bool is_text(const struct llama2_blob *blob)
{
	const unsigned char *bytes = blob->data;

	for (size_t i = 0; i < blob->size && i < 64; i++)
		if (bytes[i] < ' ' && !strchr("\t\r\n\f", bytes[i]))
			return false;
	return true;
}

static const char *name_of_text(const struct llama2_blob *blob)
{
	const char *text = blob->data;
	size_t at = begins_with(blob, 0, "\xef\xbb\xbf") ? 3 : 0;

	while (at < blob->size && strchr(" \t\r\n", text[at]))
		at++;
	if (begins_with(blob, at, "<!doctype html") || begins_with(blob, at, "<html"))
		return "an HTML page";
	if (begins_with(blob, at, "{") || begins_with(blob, at, "["))
		return "a JSON file";
	return "a text file";
}

static bool is_safetensors(const struct llama2_blob *blob)
{
	const char *bytes = blob->data;

	return blob->size > 8 && bytes[8] == '{' && !read_u32(bytes + 4, false) &&
	       read_u32(bytes, false) <= blob->size - 8;
}

/* Opcodes begin behind the version; with zeros there it is a number. */
static bool is_pickle(const struct llama2_blob *blob)
{
	const unsigned char *bytes = blob->data;

	return blob->size > 3 && bytes[0] == 0x80 && bytes[1] >= 2 && bytes[1] <= 5 && bytes[2];
}

static bool is_sentencepiece(const struct llama2_blob *blob)
{
	return begins_with(blob, 0, "\n") && begins_with(blob, 2, "\n\x05<unk>");
}

static bool is_checkpoint(const struct llama2_blob *blob, bool big_endian)
{
	if (blob->size < HEADER_BYTES)
		return false;
	for (size_t i = 0; i < ARRAY_SIZE(header_fields); i++) {
		int64_t value = (int32_t)read_u32((const char *)blob->data + i * sizeof(int32_t),
						  big_endian);

		if (i == HEADER_VOCAB_SIZE && value < 0)
			value = -value;
		if (value < header_fields[i].min || value > header_fields[i].max)
			return false;
	}
	return true;
}

/* Whether the first of the single bytes is where it has to be */
static bool is_tokenizer(const struct llama2_blob *blob, bool big_endian)
{
	uint64_t offset = sizeof(int32_t);

	for (int id = 0; id < LLAMA2_FIRST_BYTE && offset + 8 <= blob->size; id++)
		offset += 8 + read_u32((const char *)blob->data + offset + 4, big_endian);
	return offset < blob->size && begins_with(blob, offset + 8, "<0x00>");
}

/* What @blob is, if it is something else than @is_expected says; or NULL */
static const char *other_format(const struct llama2_blob *blob,
				bool (*is_expected)(const struct llama2_blob *blob, bool big_endian))
{
	if (!blob->size)
		return "an empty file";
	if (is_expected(blob, false))
		return NULL;
	for (size_t i = 0; i < ARRAY_SIZE(magics); i++)
		if (blob->size >= magics[i].count &&
		    !memcmp(blob->data, magics[i].bytes, magics[i].count))
			return magics[i].name;
	if (begins_with(blob, 0, "24ka") || begins_with(blob, 0, "ak42"))
		return "a checkpoint of a later version of llama2.c's export";
	if (is_expected(blob, true))
		return "one of a big-endian machine";
	if (is_checkpoint(blob, false))
		return "a checkpoint";
	if (is_tokenizer(blob, false))
		return "a tokenizer";
	if (is_safetensors(blob))
		return "a safetensors file";
	if (is_pickle(blob))
		return "a Python pickle, as PyTorch writes";
	if (is_sentencepiece(blob))
		return "a SentencePiece model";
	return blob->size > 3 && is_text(blob) ? name_of_text(blob) : NULL;
}

static int check_header(const char *header, uint32_t *values, bool *shared, const char *path)
{
	for (size_t i = 0; i < ARRAY_SIZE(header_fields); i++) {
		int64_t value = read_i32(header + i * sizeof(int32_t));
		bool negative = i == HEADER_VOCAB_SIZE && value < 0;

		if (i == HEADER_VOCAB_SIZE)
			*shared = !negative;
		if (negative)
			value = -value;
		if (value < header_fields[i].min || value > header_fields[i].max)
			return fail(EXIT_INPUT, "%s: expected %s from %lld to %lld, got %lld", path,
				    header_fields[i].name, (long long)header_fields[i].min,
				    (long long)header_fields[i].max, (long long)value);
		values[i] = value;
	}
	return 0;
}

static int derive_shape(struct llama2_shape *shape, const char *path)
{
	if (shape->dim % shape->n_heads)
		return fail(EXIT_INPUT, "%s: expected n_heads that divides dim %u, got %u", path,
			    shape->dim, shape->n_heads);
	if (shape->n_heads % shape->n_kv_heads)
		return fail(EXIT_INPUT, "%s: expected n_kv_heads that divides n_heads %u, got %u",
			    path, shape->n_heads, shape->n_kv_heads);
	shape->head_size = shape->dim / shape->n_heads;
	if (shape->head_size % 2)
		return fail(EXIT_INPUT, "%s: expected an even head size, got %u", path,
			    shape->head_size);
	shape->kv_dim = shape->head_size * shape->n_kv_heads;
	return 0;
}

static int read_shape(struct llama2_shape *shape, const struct llama2_blob *blob, const char *path)
{
	uint32_t values[ARRAY_SIZE(header_fields)];
	bool shared = true;
	int err;

	if (blob->size < HEADER_BYTES)
		return fail(EXIT_INPUT,
			    "%s: expected a header of %zu bytes, got a file of %zu bytes", path,
			    HEADER_BYTES, blob->size);
	err = check_header(blob->data, values, &shared, path);
	if (err)
		return err;
	*shape = (struct llama2_shape){
		.dim = values[0],
		.hidden_dim = values[1],
		.n_layers = values[2],
		.n_heads = values[3],
		.n_kv_heads = values[4],
		.vocab_size = values[HEADER_VOCAB_SIZE],
		.seq_len = values[6],
		.shared_classifier = shared,
	};
	return derive_shape(shape, path);
}

/* Fill in the number of elements of each tensor and return their sum. */
static uint64_t tensor_counts(const struct llama2_shape *shape, uint64_t *counts)
{
	uint64_t dim = shape->dim;
	uint64_t square = shape->n_layers * dim * dim;
	uint64_t narrow = shape->n_layers * dim * shape->kv_dim;
	uint64_t wide = shape->n_layers * dim * shape->hidden_dim;
	uint64_t angles = (uint64_t)shape->seq_len * (shape->head_size / 2);
	uint64_t total = 0;

	counts[LLAMA2_EMBEDDING] = shape->vocab_size * dim;
	counts[LLAMA2_RMS_ATT] = shape->n_layers * dim;
	counts[LLAMA2_WQ] = square;
	counts[LLAMA2_WK] = narrow;
	counts[LLAMA2_WV] = narrow;
	counts[LLAMA2_WO] = square;
	counts[LLAMA2_RMS_FFN] = shape->n_layers * dim;
	counts[LLAMA2_W1] = wide;
	counts[LLAMA2_W2] = wide;
	counts[LLAMA2_W3] = wide;
	counts[LLAMA2_RMS_FINAL] = dim;
	counts[LLAMA2_FREQ_REAL] = angles;
	counts[LLAMA2_FREQ_IMAG] = angles;
	counts[LLAMA2_CLASSIFIER] = shape->shared_classifier ? 0 : shape->vocab_size * dim;
	for (int t = 0; t < LLAMA2_NR_TENSORS; t++)
		total += counts[t];
	return total;
}

static uint64_t checkpoint_bytes(const struct llama2_shape *shape)
{
	uint64_t counts[LLAMA2_NR_TENSORS];

	return HEADER_BYTES + sizeof(float) * tensor_counts(shape, counts);
}

static void locate_tensors(struct llama2_model *model)
{
	const float *next = (const float *)model->blob.data + HEADER_BYTES / sizeof(float);
	uint64_t counts[LLAMA2_NR_TENSORS];

	tensor_counts(&model->shape, counts);
	for (int t = 0; t < LLAMA2_NR_TENSORS; t++) {
		model->tensor[t] = next;
		next += counts[t];
	}
	if (model->shape.shared_classifier)
		model->tensor[LLAMA2_CLASSIFIER] = model->tensor[LLAMA2_EMBEDDING];
}

static int alloc_activations(struct llama2_model *model)
{
	const struct llama2_shape *shape = &model->shape;
	const size_t batch = model->batch;
	const struct {
		float **where;
		size_t count;
	} parts[] = {
		{ &model->x, batch * shape->dim },
		{ &model->normed, batch * shape->dim },
		{ &model->q, batch * shape->dim },
		{ &model->k, batch * shape->kv_dim },
		{ &model->v, batch * shape->kv_dim },
		{ &model->attended, batch * shape->dim },
		{ &model->gate, batch * shape->hidden_dim },
		{ &model->up, batch * shape->hidden_dim },
		{ &model->scores, shape->seq_len },
		{ &model->head_row, shape->head_size },
		{ &model->cosines, batch * (shape->head_size / 2) },
		{ &model->sines, batch * (shape->head_size / 2) },
		{ &model->logits, batch * shape->vocab_size },
	};
	size_t total = 0;
	float *next;

	for (size_t i = 0; i < ARRAY_SIZE(parts); i++)
		total += parts[i].count;
	model->scratch = calloc(total, sizeof(float));
	if (!model->scratch)
		return no_memory();
	next = model->scratch;
	for (size_t i = 0; i < ARRAY_SIZE(parts); i++) {
		*parts[i].where = next;
		next += parts[i].count;
	}
	return 0;
}

static int load_checkpoint(struct llama2_model *model, const char *path)
{
	uint64_t expected;
	const char *other = other_format(&model->blob, is_checkpoint);
	int err;

	if (other)
		return fail(EXIT_INPUT, "%s: expected " CHECKPOINT_FORMAT ", got %s", path, other);
	err = read_shape(&model->shape, &model->blob, path);
	if (err)
		return err;
	expected = checkpoint_bytes(&model->shape);
	if (model->blob.size != expected)
		return fail(EXIT_INPUT, "%s: expected %llu bytes by its header, got %zu", path,
			    (unsigned long long)expected, model->blob.size);
	/* the weights are used where they lie in the file */
	if (le32toh(1) != 1)
		return fail(EXIT_INPUT, "%s: expected a little-endian machine", path);
	locate_tensors(model);
	return alloc_activations(model);
}

int llama2_open(struct llama2_model *model, const char *path, uint32_t batch)
{
	int err;

	*model = (struct llama2_model){ .batch = batch };
	err = blob_map(&model->blob, path);
	if (!err)
		err = load_checkpoint(model, path);
	if (err)
		llama2_close(model);
	return err;
}

void llama2_close(struct llama2_model *model)
{
	free(model->scratch);
	model->scratch = NULL;
	blob_free(&model->blob);
}

uint64_t llama2_fingerprint(const struct llama2_model *model)
{
	const unsigned char *bytes = model->blob.data;
	uint64_t hash = 0xcbf29ce484222325u;

	for (size_t i = 0; i < model->blob.size; i++)
		hash = (hash ^ bytes[i]) * 0x100000001b3u;
	return hash;
}

/* Made-up model */

static uint64_t splitmix64(uint64_t state)
{
	state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
	state = (state ^ state >> 27) * 0x94d049bb133111ebu;
	return state ^ state >> 31;
}

/* Number @index of stream @stream, as 24 bits, which a float holds exactly. */
static uint32_t hash24(uint64_t stream, uint64_t index)
{
	uint64_t start = splitmix64(stream * 0x9e3779b97f4a7c15u);

	return splitmix64(start + (index + 1) * 0x9e3779b97f4a7c15u) >> 40;
}

/*
 * The syllables, with and without a space before them, end the vocabulary: the
 * only tokens that the made-up model says. All others are there to encode
 * prompts.
 */
static const char *const onsets[] = {
	"b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p",
	"r", "s", "t", "v", "w", "y", "z", "ch", "sh", "th",
};

static const char vowels[] = { 'a', 'e', 'i', 'o', 'u' };
static const char characters[] = " abcdefghijklmnopqrstuvwxyz.,!?'-";

#define NR_CHARACTERS	(sizeof(characters) - 1)
#define FIRST_SYLLABLE	(LLAMA2_FIRST_PIECE + NR_CHARACTERS)
#define NR_SYLLABLES	(2 * ARRAY_SIZE(onsets) * ARRAY_SIZE(vowels))

static const struct llama2_shape made_up_shape = {
	.dim = 64,
	.hidden_dim = 172,
	.n_layers = 4,
	.n_heads = 8,
	.n_kv_heads = 4,
	.vocab_size = FIRST_SYLLABLE + NR_SYLLABLES,
	.seq_len = 256,
	.shared_classifier = false,
	.head_size = 8,
	.kv_dim = 32,
};

/*
 * Sharp attention (large WQ and WK) and a strong residual update keep the next
 * token dependent on all of the history; with smaller ones the text soon
 * repeats itself.
 */
static const float made_up_scale[LLAMA2_NR_TENSORS] = {
	[LLAMA2_EMBEDDING] = 1.0f,
	[LLAMA2_WQ] = 0.5f,
	[LLAMA2_WK] = 0.5f,
	[LLAMA2_WV] = 0.25f,
	[LLAMA2_WO] = 0.5f,
	[LLAMA2_W1] = 0.25f,
	[LLAMA2_W2] = 0.25f,
	[LLAMA2_W3] = 0.25f,
	[LLAMA2_CLASSIFIER] = 0.5f,
};

static void fill_tensor(float *weights, uint64_t count, enum llama2_tensor tensor)
{
	float scale = made_up_scale[tensor];

	for (uint64_t i = 0; i < count; i++) {
		int32_t number = (int32_t)hash24(tensor, i) - (1 << 23);

		weights[i] = scale * ((float)number / (1 << 23));
	}
}

static void fill_ones(float *weights, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		weights[i] = 1.0f;
}

/*
 * There is no bias in such a model. So element 0 of the residual stream is made
 * a constant that no layer changes, and the classifier uses it to keep silent
 * what is not a syllable.
 */
static void mute_non_syllables(struct llama2_model *model, float *const *weights)
{
	const struct llama2_shape *shape = &model->shape;
	size_t dim = shape->dim;

	for (size_t id = 0; id < shape->vocab_size; id++) {
		weights[LLAMA2_EMBEDDING][id * dim] = 1.0f;
		weights[LLAMA2_CLASSIFIER][id * dim] = id < FIRST_SYLLABLE ? -1000.0f : 0.0f;
	}
	for (size_t layer = 0; layer < shape->n_layers; layer++) {
		memset(weights[LLAMA2_WO] + layer * dim * dim, 0, dim * sizeof(float));
		memset(weights[LLAMA2_W2] + layer * dim * shape->hidden_dim, 0,
		       shape->hidden_dim * sizeof(float));
	}
}

static void make_up_weights(struct llama2_model *model)
{
	float *base = (float *)model->blob.data + HEADER_BYTES / sizeof(float);
	float *weights[LLAMA2_NR_TENSORS];
	uint64_t counts[LLAMA2_NR_TENSORS];

	tensor_counts(&model->shape, counts);
	for (int t = 0; t < LLAMA2_NR_TENSORS; t++) {
		weights[t] = base + (model->tensor[t] - base);
		fill_tensor(weights[t], counts[t], t);
	}
	fill_ones(weights[LLAMA2_RMS_ATT], counts[LLAMA2_RMS_ATT]);
	fill_ones(weights[LLAMA2_RMS_FFN], counts[LLAMA2_RMS_FFN]);
	fill_ones(weights[LLAMA2_RMS_FINAL], counts[LLAMA2_RMS_FINAL]);
	mute_non_syllables(model, weights);
}

int llama2_make_up(struct llama2_model *model, uint32_t batch)
{
	int err;

	*model = (struct llama2_model){ .shape = made_up_shape, .batch = batch };
	err = blob_alloc(&model->blob, checkpoint_bytes(&model->shape));
	if (err)
		return err;
	locate_tensors(model);
	make_up_weights(model);
	err = alloc_activations(model);
	if (err)
		llama2_close(model);
	return err;
}

/* Forward pass */

static float dot(const float *a, const float *b, size_t n)
{
	float sum = 0.0f;

	for (size_t i = 0; i < n; i++)
		sum += a[i] * b[i];
	return sum;
}

/* out[count, rows] = in[count, columns] x weights[rows, columns], whose rows are read once */
static void multiply(float *out, const float *weights, const float *in, size_t rows, size_t columns,
		     size_t count)
{
	for (size_t row = 0; row < rows; row++)
		for (size_t i = 0; i < count; i++)
			out[i * rows + row] = dot(weights + row * columns, in + i * columns,
						  columns);
}

static void add(float *x, const float *more, size_t n)
{
	for (size_t i = 0; i < n; i++)
		x[i] += more[i];
}

static void rms_norm_row(float *out, const float *x, const float *weights, size_t n)
{
	float scale = 1.0f / sqrtf(dot(x, x, n) / (float)n + 1e-5f);

	for (size_t i = 0; i < n; i++)
		out[i] = weights[i] * (scale * x[i]);
}

static void rms_norm(float *out, const float *x, const float *weights, size_t n, size_t count)
{
	for (size_t i = 0; i < count; i++)
		rms_norm_row(out + i * n, x + i * n, weights, n);
}

static float largest(const float *x, size_t n)
{
	float max = -INFINITY;

	for (size_t i = 0; i < n; i++)
		if (x[i] > max)
			max = x[i];
	return max;
}

static void softmax(float *x, size_t n)
{
	float max = largest(x, n);
	float sum = 0.0f;

	for (size_t i = 0; i < n; i++) {
		x[i] = expf(x[i] - max);
		sum += x[i];
	}
	for (size_t i = 0; i < n; i++)
		x[i] /= sum;
}

static void set_angles(struct llama2_model *model, uint32_t pos, size_t count)
{
	uint32_t head_size = model->shape.head_size;
	size_t pairs = head_size / 2;

	for (size_t pair = 0; pair < pairs; pair++) {
		float exponent = (float)(2 * pair) / (float)head_size;
		float frequency = 1.0f / powf(10000.0f, exponent);

		for (size_t i = 0; i < count; i++) {
			float angle = (float)(pos + i) * frequency;

			model->cosines[i * pairs + pair] = cosf(angle);
			model->sines[i * pairs + pair] = sinf(angle);
		}
	}
}

/* RoPE on rows of @n elements: neighbours are the two coordinates that are rotated. */
static void rotate(const struct llama2_model *model, float *x, size_t n, size_t count)
{
	size_t pairs = model->shape.head_size / 2;

	for (size_t i = 0; i < count * (n / 2); i++) {
		size_t angle = i / (n / 2) * pairs + i % (n / 2) % pairs;
		float c = model->cosines[angle];
		float s = model->sines[angle];
		float a = x[2 * i];
		float b = x[2 * i + 1];

		x[2 * i] = a * c - b * s;
		x[2 * i + 1] = a * s + b * c;
	}
}

static float step_of_scale(uint8_t scale)
{
	return scale == MX_NAN_SCALE ? NAN : ldexpf(1.0f, scale - MX_BIAS - MX_FRAC_BITS);
}

/*
 * Elements @at and up of row @row, one head's worth, as floats: where they lie, or
 * scaled back into model->head_row. Every product is exact.
 */
static const float *head_of_row(struct llama2_model *model, const struct llama2_rows *rows,
				size_t row, size_t at)
{
	size_t first = row * model->shape.kv_dim + at;
	const int8_t *elements = rows->data;
	float step = 0.0f;

	if (!rows->scales)
		return (const float *)rows->data + first;
	for (size_t i = 0; i < model->shape.head_size; i++) {
		size_t element = first + i;

		if (!i || !(element % KVSCRATCH_MX_BLOCK))
			step = step_of_scale(rows->scales[element / KVSCRATCH_MX_BLOCK]);
		model->head_row[i] = (float)elements[element] * step;
	}
	return model->head_row;
}

/* Of token @i, the last of @len positions that it attends to */
static void attend_head(struct llama2_model *model, const struct llama2_rows *keys,
			const struct llama2_rows *values, uint32_t head, size_t i, uint32_t len)
{
	const struct llama2_shape *shape = &model->shape;
	size_t head_size = shape->head_size;
	size_t shared = head / (shape->n_heads / shape->n_kv_heads) * head_size;
	const float *q = model->q + i * shape->dim + head * head_size;
	float *out = model->attended + i * shape->dim + head * head_size;
	float scale = sqrtf((float)head_size);

	for (size_t row = 0; row < len; row++)
		model->scores[row] = dot(q, head_of_row(model, keys, row, shared), head_size) /
				     scale;
	softmax(model->scores, len);
	memset(out, 0, head_size * sizeof(float));
	for (size_t row = 0; row < len; row++) {
		const float *v = head_of_row(model, values, row, shared);

		for (size_t at = 0; at < head_size; at++)
			out[at] += model->scores[row] * v[at];
	}
}

static int attention(struct llama2_model *model, struct llama2_rows *const *cache, size_t layer,
		     uint32_t pos, uint32_t count)
{
	const struct llama2_shape *shape = &model->shape;
	struct llama2_rows *keys = cache[2 * layer];
	struct llama2_rows *values = cache[2 * layer + 1];
	size_t dim = shape->dim;
	size_t kv_dim = shape->kv_dim;
	float *normed = model->normed;
	int err;

	rms_norm(normed, model->x, model->tensor[LLAMA2_RMS_ATT] + layer * dim, dim, count);
	multiply(model->q, model->tensor[LLAMA2_WQ] + layer * dim * dim, normed, dim, dim, count);
	multiply(model->k, model->tensor[LLAMA2_WK] + layer * dim * kv_dim, normed, kv_dim, dim,
		 count);
	multiply(model->v, model->tensor[LLAMA2_WV] + layer * dim * kv_dim, normed, kv_dim, dim,
		 count);
	rotate(model, model->q, dim, count);
	rotate(model, model->k, kv_dim, count);
	err = keys->put(keys, pos, model->k, count);
	if (!err)
		err = values->put(values, pos, model->v, count);
	if (!err && model->queries)
		err = model->queries[layer]->put(model->queries[layer], pos, model->q, count);
	if (err)
		return err;
	for (uint32_t i = 0; i < count; i++)
		for (uint32_t head = 0; head < shape->n_heads; head++)
			attend_head(model, keys, values, head, i, pos + i + 1);
	multiply(normed, model->tensor[LLAMA2_WO] + layer * dim * dim, model->attended, dim, dim,
		 count);
	add(model->x, normed, count * dim);
	return 0;
}

/* SwiGLU */
static void feed_forward(struct llama2_model *model, size_t layer, uint32_t count)
{
	size_t dim = model->shape.dim;
	size_t hidden = model->shape.hidden_dim;
	size_t weights = layer * dim * hidden;

	rms_norm(model->normed, model->x, model->tensor[LLAMA2_RMS_FFN] + layer * dim, dim, count);
	multiply(model->gate, model->tensor[LLAMA2_W1] + weights, model->normed, hidden, dim,
		 count);
	multiply(model->up, model->tensor[LLAMA2_W3] + weights, model->normed, hidden, dim, count);
	for (size_t i = 0; i < count * hidden; i++)
		model->gate[i] *= model->up[i] / (1.0f + expf(-model->gate[i]));
	multiply(model->normed, model->tensor[LLAMA2_W2] + weights, model->gate, dim, hidden,
		 count);
	add(model->x, model->normed, count * dim);
}

int llama2_forward(struct llama2_model *model, struct llama2_rows *const *cache,
		   const int32_t *tokens, uint32_t pos, uint32_t count)
{
	const struct llama2_shape *shape = &model->shape;
	size_t dim = shape->dim;

	for (size_t i = 0; i < count; i++)
		memcpy(model->x + i * dim, model->tensor[LLAMA2_EMBEDDING] + tokens[i] * dim,
		       dim * sizeof(float));
	set_angles(model, pos, count);
	for (size_t layer = 0; layer < shape->n_layers; layer++) {
		int err = attention(model, cache, layer, pos, count);

		if (err)
			return err;
		feed_forward(model, layer, count);
	}
	rms_norm(model->x, model->x, model->tensor[LLAMA2_RMS_FINAL], dim, count);
	multiply(model->logits, model->tensor[LLAMA2_CLASSIFIER], model->x, shape->vocab_size, dim,
		 count);
	return 0;
}

/* Tokenizer */

static int compare_bytes(const struct llama2_piece *a, const struct llama2_piece *b)
{
	uint32_t shorter = a->length < b->length ? a->length : b->length;
	int order = memcmp(a->bytes, b->bytes, shorter);

	if (order)
		return order;
	return (a->length > b->length) - (a->length < b->length);
}

static int compare_pieces(const void *a, const void *b)
{
	const struct llama2_piece *left = a;
	const struct llama2_piece *right = b;
	int order = compare_bytes(left, right);

	return order ? order : (left->id > right->id) - (left->id < right->id);
}

static int read_piece(const struct llama2_tokenizer *tok, struct llama2_piece *piece,
		      size_t *offset, const char *path)
{
	const char *bytes = tok->blob.data;
	size_t left = tok->blob.size - *offset;
	int32_t length;

	if (left < 8)
		return fail(EXIT_INPUT, "%s: expected %u tokens, got %d and %zu bytes", path,
			    tok->vocab_size, piece->id, left);
	piece->score = read_f32(bytes + *offset);
	if (!isfinite(piece->score))
		return fail(EXIT_INPUT, "%s: expected a finite score of token %d, got %f", path,
			    piece->id, (double)piece->score);
	length = read_i32(bytes + *offset + 4);
	if (length < 0 || (uint32_t)length > tok->max_length || (size_t)length > left - 8)
		return fail(EXIT_INPUT,
			    "%s: expected token %d of 0 to %u bytes in %zu bytes of file, got %d",
			    path, piece->id, tok->max_length, left - 8, length);
	piece->bytes = bytes + *offset + 8;
	piece->length = length;
	*offset += 8 + (size_t)length;
	return 0;
}

static int check_byte_piece(const struct llama2_piece *piece, const char *path)
{
	char expected[8];
	char got[17] = "";

	snprintf(expected, sizeof(expected), "<0x%02X>",
		 (unsigned int)(piece->id - LLAMA2_FIRST_BYTE) & 0xff);
	if (piece->length == strlen(expected) && !memcmp(piece->bytes, expected, piece->length))
		return 0;
	/* whatever the file holds, the message is one line */
	for (uint32_t i = 0; i < piece->length && i < sizeof(got) - 1; i++)
		got[i] = piece->bytes[i] >= ' ' && piece->bytes[i] <= '~' ? piece->bytes[i] : '?';
	return fail(EXIT_INPUT, "%s: expected token %d to be %s, got \"%s\"", path, piece->id,
		    expected, got);
}

static int read_pieces(struct llama2_tokenizer *tok, const char *path)
{
	size_t offset = sizeof(int32_t);
	uint32_t longest = 0;

	for (uint32_t id = 0; id < tok->vocab_size; id++) {
		struct llama2_piece *piece = &tok->pieces[id];
		int err;

		piece->id = id;
		err = read_piece(tok, piece, &offset, path);
		if (!err && id >= LLAMA2_FIRST_BYTE && id < LLAMA2_FIRST_PIECE)
			err = check_byte_piece(piece, path);
		if (err)
			return err;
		if (piece->length > longest)
			longest = piece->length;
	}
	/* what the file promises may be anything; merging wants a bound that holds */
	tok->max_length = longest;
	if (offset != tok->blob.size)
		return fail(EXIT_INPUT, "%s: expected %u tokens in %zu bytes, got %zu bytes", path,
			    tok->vocab_size, offset, tok->blob.size);
	return 0;
}

static int parse_tokenizer(struct llama2_tokenizer *tok, const char *path)
{
	uint32_t sorted = tok->vocab_size - LLAMA2_FIRST_PIECE;
	const char *other = other_format(&tok->blob, is_tokenizer);
	int32_t max_length;
	int err;

	if (other)
		return fail(EXIT_INPUT, "%s: expected " TOKENIZER_FORMAT ", got %s", path, other);
	if (tok->blob.size < sizeof(int32_t))
		return fail(EXIT_INPUT, "%s: expected at least 4 bytes, got %zu", path,
			    tok->blob.size);
	max_length = read_i32(tok->blob.data);
	if (max_length < 1)
		return fail(EXIT_INPUT, "%s: expected a maximum token length of at least 1, got %d",
			    path, max_length);
	tok->max_length = max_length;
	tok->pieces = calloc(tok->vocab_size, sizeof(*tok->pieces));
	tok->sorted = calloc(sorted + 1, sizeof(*tok->sorted));
	if (!tok->pieces || !tok->sorted)
		return no_memory();
	err = read_pieces(tok, path);
	if (err)
		return err;
	memcpy(tok->sorted, tok->pieces + LLAMA2_FIRST_PIECE, sorted * sizeof(*tok->sorted));
	qsort(tok->sorted, sorted, sizeof(*tok->sorted), compare_pieces);
	return 0;
}

int llama2_tokenizer_open(struct llama2_tokenizer *tok, const char *path, uint32_t vocab_size)
{
	int err;

	*tok = (struct llama2_tokenizer){ .vocab_size = vocab_size };
	err = blob_map(&tok->blob, path);
	if (!err)
		err = parse_tokenizer(tok, path);
	if (err)
		llama2_tokenizer_close(tok);
	return err;
}

void llama2_tokenizer_close(struct llama2_tokenizer *tok)
{
	free(tok->pieces);
	free(tok->sorted);
	tok->pieces = NULL;
	tok->sorted = NULL;
	blob_free(&tok->blob);
}

#define MADE_UP_MAX_LENGTH 6

static size_t put_piece(char *bytes, size_t offset, float score, const char *piece)
{
	size_t length = strlen(piece);

	write_f32(bytes + offset, score);
	write_i32(bytes + offset + 4, (int32_t)length);
	memcpy(bytes + offset + 8, piece, length);
	return offset + 8 + length;
}

static size_t put_syllables(char *bytes, size_t offset, const char *prefix, float score)
{
	char piece[MADE_UP_MAX_LENGTH + 1];

	for (size_t onset = 0; onset < ARRAY_SIZE(onsets); onset++) {
		for (size_t vowel = 0; vowel < ARRAY_SIZE(vowels); vowel++) {
			snprintf(piece, sizeof(piece), "%s%s%c", prefix, onsets[onset],
				 vowels[vowel]);
			offset = put_piece(bytes, offset, score, piece);
		}
	}
	return offset;
}

/* Write a tokenizer file to @bytes, which has room for it, and return its size. */
static size_t write_tokenizer(char *bytes)
{
	static const char *const specials[] = { "<unk>", "<s>", "</s>" };
	size_t offset = sizeof(int32_t);
	char piece[MADE_UP_MAX_LENGTH + 1];

	write_i32(bytes, MADE_UP_MAX_LENGTH);
	for (size_t i = 0; i < ARRAY_SIZE(specials); i++)
		offset = put_piece(bytes, offset, 0.0f, specials[i]);
	for (unsigned int byte = 0; byte < 256; byte++) {
		snprintf(piece, sizeof(piece), "<0x%02X>", byte & 0xff);
		offset = put_piece(bytes, offset, 0.0f, piece);
	}
	for (size_t i = 0; i < NR_CHARACTERS; i++) {
		snprintf(piece, sizeof(piece), "%c", characters[i]);
		offset = put_piece(bytes, offset, -3.0f, piece);
	}
	offset = put_syllables(bytes, offset, " ", -1.0f);
	return put_syllables(bytes, offset, "", -2.0f);
}

int llama2_tokenizer_make_up(struct llama2_tokenizer *tok)
{
	int err;

	*tok = (struct llama2_tokenizer){ .vocab_size = made_up_shape.vocab_size };
	err = blob_alloc(&tok->blob, 4 + tok->vocab_size * (8 + MADE_UP_MAX_LENGTH));
	if (err)
		return err;
	tok->blob.size = write_tokenizer(tok->blob.data);
	err = parse_tokenizer(tok, "made-up vocabulary");
	if (err)
		llama2_tokenizer_close(tok);
	return err;
}

/* The first of the equal pieces, so that a vocabulary with doubles is no riddle; -1 if none. */
static int32_t look_up(const struct llama2_tokenizer *tok, const char *bytes, size_t length)
{
	struct llama2_piece key = { .bytes = bytes, .length = length };
	uint32_t low = 0;
	uint32_t count = tok->vocab_size - LLAMA2_FIRST_PIECE;
	uint32_t high = count;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;

		if (compare_bytes(&tok->sorted[middle], &key) < 0)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == count || compare_bytes(&tok->sorted[low], &key))
		return -1;
	return tok->sorted[low].id;
}

/* A piece of the text, and the piece that it becomes together with the next one, or -1. */
struct symbol {
	int32_t id;
	int32_t merged;
};

static int32_t look_up_pair(const struct llama2_tokenizer *tok, char *buffer, int32_t a, int32_t b)
{
	const struct llama2_piece *left = &tok->pieces[a];
	const struct llama2_piece *right = &tok->pieces[b];
	size_t length = (size_t)left->length + right->length;

	/* single bytes stand for what no piece spells */
	if (a < LLAMA2_FIRST_PIECE || b < LLAMA2_FIRST_PIECE || length > tok->max_length)
		return -1;
	memcpy(buffer, left->bytes, left->length);
	memcpy(buffer + left->length, right->bytes, right->length);
	return look_up(tok, buffer, length);
}

static void pair_up(const struct llama2_tokenizer *tok, char *buffer, struct symbol *symbols,
		    size_t count, size_t i)
{
	symbols[i].merged = -1;
	if (i + 1 < count)
		symbols[i].merged = look_up_pair(tok, buffer, symbols[i].id, symbols[i + 1].id);
}

static size_t best_merge(const struct llama2_tokenizer *tok, const struct symbol *symbols,
			 size_t count)
{
	size_t best = count;

	for (size_t i = 0; i < count; i++) {
		if (symbols[i].merged < 0)
			continue;
		if (best == count || tok->pieces[symbols[i].merged].score >
				     tok->pieces[symbols[best].merged].score)
			best = i;
	}
	return best;
}

static size_t merge_symbols(const struct llama2_tokenizer *tok, char *buffer,
			    struct symbol *symbols, size_t count)
{
	for (size_t i = 0; i < count; i++)
		pair_up(tok, buffer, symbols, count, i);
	for (;;) {
		size_t best = best_merge(tok, symbols, count);

		if (best == count)
			return count;
		symbols[best].id = symbols[best].merged;
		count--;
		memmove(symbols + best + 1, symbols + best + 2,
			(count - best - 1) * sizeof(*symbols));
		pair_up(tok, buffer, symbols, count, best);
		if (best)
			pair_up(tok, buffer, symbols, count, best - 1);
	}
}

/* Bytes of the UTF-8 sequence at @text; a stray byte is one of its own. */
static size_t sequence_length(const char *text)
{
	size_t length = 1;

	if (((unsigned char)text[0] & 0xc0) != 0xc0)
		return 1;
	while (length < 4 && ((unsigned char)text[length] & 0xc0) == 0x80)
		length++;
	return length;
}

static size_t split_text(const struct llama2_tokenizer *tok, const char *text,
			 struct symbol *symbols)
{
	size_t count = 0;

	while (*text) {
		size_t length = sequence_length(text);
		int32_t id = look_up(tok, text, length);

		if (id >= 0)
			symbols[count++].id = id;
		for (size_t i = 0; id < 0 && i < length; i++)
			symbols[count++].id = LLAMA2_FIRST_BYTE + (unsigned char)text[i];
		text += length;
	}
	return count;
}

/* Encode without BOS; returns the number of symbols. */
static size_t encode_text(const struct llama2_tokenizer *tok, const char *text, char *buffer,
			  struct symbol *symbols)
{
	size_t count;

	/* a text begins like a word within one */
	if (!*text)
		return 0;
	count = split_text(tok, " ", symbols);
	count += split_text(tok, text, symbols + count);
	return merge_symbols(tok, buffer, symbols, count);
}

int llama2_encode(const struct llama2_tokenizer *tok, const char *text, int32_t **ids,
		  uint32_t *count)
{
	size_t room = strlen(text) + 2;
	struct symbol *symbols = calloc(room, sizeof(*symbols));
	char *buffer = malloc(tok->max_length + 1);
	int err = 0;

	*ids = calloc(room, sizeof(**ids));
	if (!symbols || !buffer || !*ids) {
		free(*ids);
		*ids = NULL;
		err = no_memory();
		goto out;
	}
	*count = 1 + encode_text(tok, text, buffer, symbols);
	(*ids)[0] = LLAMA2_BOS;
	for (uint32_t i = 1; i < *count; i++)
		(*ids)[i] = symbols[i - 1].id;
out:
	free(buffer);
	free(symbols);
	return err;
}

size_t llama2_decode(const struct llama2_tokenizer *tok, int32_t previous, int32_t id, char *byte,
		     const char **bytes)
{
	const struct llama2_piece *piece = &tok->pieces[id];
	bool strip;

	if (id >= LLAMA2_FIRST_BYTE && id < LLAMA2_FIRST_PIECE) {
		*byte = (char)(id - LLAMA2_FIRST_BYTE);
		*bytes = byte;
		return 1;
	}
	strip = previous == LLAMA2_BOS && piece->length && piece->bytes[0] == ' ';
	*bytes = piece->bytes + strip;
	return piece->length - strip;
}

/* Sampler */

int llama2_sampler_open(struct llama2_sampler *sampler, uint32_t vocab_size)
{
	sampler->candidates = calloc(vocab_size, sizeof(*sampler->candidates));
	return sampler->candidates ? 0 : no_memory();
}

void llama2_sampler_close(struct llama2_sampler *sampler)
{
	free(sampler->candidates);
	sampler->candidates = NULL;
}

static int32_t most_likely(const float *logits, uint32_t vocab_size)
{
	float max = -INFINITY;
	uint32_t best = 0;

	for (uint32_t id = 0; id < vocab_size; id++) {
		if (logits[id] > max) {
			max = logits[id];
			best = id;
		}
	}
	return best;
}

static int compare_candidates(const void *a, const void *b)
{
	const struct llama2_candidate *left = a;
	const struct llama2_candidate *right = b;

	if (left->probability != right->probability)
		return left->probability < right->probability ? 1 : -1;
	return (left->id > right->id) - (left->id < right->id);
}

/* Not normalized; what is not a number gets 0, so that sorting stays well-defined. */
static float weigh_candidates(const struct llama2_sampler *sampler, const float *logits,
			      uint32_t vocab_size)
{
	float max = largest(logits, vocab_size);
	float sum = 0.0f;

	for (uint32_t id = 0; id < vocab_size; id++) {
		float weight = expf((logits[id] - max) / sampler->temperature);

		if (!(weight > 0.0f))
			weight = 0.0f;
		sampler->candidates[id] = (struct llama2_candidate){ weight, (int32_t)id };
		sum += weight;
	}
	return sum;
}

/* The fewest of the sorted candidates that reach @goal; their sum is left in @sum. */
static uint32_t nucleus(const struct llama2_candidate *candidates, uint32_t count, float goal,
			float *sum)
{
	uint32_t used = 0;

	*sum = 0.0f;
	while (used < count && candidates[used].probability > 0.0f && (!used || *sum < goal))
		*sum += candidates[used++].probability;
	return used;
}

int32_t llama2_sample(const struct llama2_sampler *sampler, const float *logits,
		      uint32_t vocab_size, uint32_t pos)
{
	const struct llama2_candidate *candidates = sampler->candidates;
	float sum;
	float point;
	uint32_t used;

	if (sampler->temperature <= 0.0f)
		return most_likely(logits, vocab_size);
	sum = weigh_candidates(sampler, logits, vocab_size);
	if (!(sum > 0.0f))
		return most_likely(logits, vocab_size);
	qsort(sampler->candidates, vocab_size, sizeof(*candidates), compare_candidates);
	used = nucleus(candidates, vocab_size, sampler->top_p * sum, &sum);
	point = (float)hash24(sampler->seed, pos) / (1 << 24) * sum;
	for (uint32_t i = 0; i < used; i++) {
		point -= candidates[i].probability;
		if (point < 0.0f)
			return candidates[i].id;
	}
	/* rounding, or the most likely one if nothing has a weight */
	return candidates[used ? used - 1 : 0].id;
}
