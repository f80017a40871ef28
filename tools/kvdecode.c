// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvdecode: text from a Llama-2 style model whose KV cache lives in pads.
 *
 * K and V of every layer have a pad each, and so have, where they are wanted,
 * the queries; one more pad has the token of each position. It is the last one
 * written in a step, so a token exists when that pad has it; whoever takes over
 * truncates all other pads to its length.
 * Nothing else has to survive the decoder: the random number of a position is a
 * function of the seed and the position, and the logits come back by running
 * the last token once more.
 */
#define _GNU_SOURCE
#include "../kvscratch_scale.h"
#include "cli.h"
#include "interrupt.h"
#include "libkvscratch.h"
#include "llama2.h"
#include "output.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_TEMPERATURE	1000.0f
#define FIRST_FREE_FD	3

struct options {
	const char *model;
	const char *checkpoint;
	const char *tokenizer;
	const char *prompt;
	const char *socket;
	const char *logits;
	uint32_t kv_dtype;	/* F32 or MXINT8 */
	uint64_t seed;
	uint32_t steps;		/* 0: as many as the model has positions */
	int first_handle;	/* 0: none */
	const char *hold;
	bool queries;
	float temperature;
	float top_p;
	bool heap;
	bool wait_reader;
	bool stats;
	bool help;
};

/**
 * struct store - one matrix of the cache: a pad, or an array on the heap
 * @rows: what the model sees of it
 * @name: "k0" and the like
 * @dim: elements per row
 * @dtype: their type, as stored
 * @input_dtype: their type, as appended
 * @row_bytes: bytes per row, as stored, scales included
 * @pad: the pad, or NULL
 * @handle: the descriptor that we got for it, which becomes that of the pad, or -1
 * @view: the mapped pad
 * @generation: that of the rows; what another one has came from somebody else
 * @kept: rows that a pad had that was taken over
 * @heap: the array, with the scales behind it
 */
struct store {
	struct llama2_rows rows;
	char name[16];
	uint32_t dim;
	uint32_t dtype;
	uint32_t input_dtype;
	size_t row_bytes;
	struct kvscratch *pad;
	int handle;
	const struct kvscratch_view *view;
	uint32_t generation;
	uint32_t kept;
	char *heap;
};

/**
 * struct cache - K and V of every layer, perhaps its queries, and the tokens
 * @stores: k0 v0 k1 v1 ... q0 q1 ... tokens; a step writes the tokens last
 * @count: how many
 * @seq_len: rows that each has room for
 * @kv_dtype: how K and V are stored
 * @rows: the rows of @stores as the model takes them
 */
struct cache {
	struct store *stores;
	unsigned int count;
	uint32_t seq_len;
	uint32_t kv_dtype;
	struct llama2_rows **rows;
};

/* Entries of struct server's array that are no clients. */
enum { POLLED_LISTENER, POLLED_SIGNALS, POLLED_CLIENTS };

/**
 * struct server - who gets handles
 * @path: the socket, or NULL if nobody is served
 * @polled: the listener, pending signals, and the connected clients
 * @count: entries in use
 * @room: entries allocated
 * @served: clients that got their handles so far
 * @old_mask: signals blocked before
 */
struct server {
	const char *path;
	struct pollfd *polled;
	size_t count;
	size_t room;
	uint64_t served;
	sigset_t old_mask;
};

struct decoder {
	struct options options;
	struct llama2_model model;
	struct llama2_tokenizer tok;
	struct llama2_sampler sampler;
	struct cache cache;
	struct server server;
	FILE *logits;
	struct output output;	/* the file that @logits becomes */
	int32_t *prompt;
	uint32_t prompt_len;
	int32_t *tokens;	/* of each position, as in the last pad */
	uint32_t steps;
	uint32_t forwards;
	double seconds;
};

/* Options */

static const char help_text[] =
"Usage: kvdecode [OPTION]...\n"
"Generate text with a Llama-2 style model. K and V of every layer are kept in\n"
"kvscratch pads, and attention reads them through read-only mappings.\n"
"\n"
"Model (without one: made-up weights that speak gibberish):\n"
"  --model DIR          the one tok*.bin and the one other *.bin of DIR\n"
"  --checkpoint FILE    weights in llama2.c's legacy format\n"
"  --tokenizer FILE     its vocabulary in llama2.c's format\n"
"\n"
"Text:\n"
"  --prompt TEXT        begin with TEXT\n"
"  --steps N            end after N positions, BOS included (all of the model's)\n"
"  --temperature T      0 always takes the most likely token (0)\n"
"  --top-p P            choose among the likeliest tokens of sum P (0.9)\n"
"  --seed S             the same seed gives the same text (1)\n"
"\n"
"Cache:\n"
"  --cache pads|heap    where K and V are kept (pads)\n"
"  --kv f32|mxint8      how: as they are, or in a byte per element and a scale\n"
"                       per 32, to which the kernel converts them (f32)\n"
"  --hold NAME          keep the pads with kvscratchctl hold NAME --write, and go\n"
"                       on where they end when it has some\n"
"  --handles FIRST      the same with the inherited descriptors FIRST.., pads in\n"
"                       the order k0 v0 k1 v1 ... tokens, made by somebody else\n"
"  --queries            keep the queries as well, in pads q0 q1 ... before tokens,\n"
"                       for readers that look at the attention\n"
"  --serve SOCKET       pass read-only handles to whoever connects to SOCKET\n"
"  --wait-reader        with --serve: begin when the first one was served\n"
"\n"
"  --logits FILE        write the logits of each position: vocab_size floats\n"
"  --stats              at the end: tokens, tokens/s, bytes in the cache\n"
"  --help               show this and exit\n"
"\n"
"A connection to SOCKET that hangs up says that decoding is over.\n"
"\n"
"Exit status: 0 ok; 1 wrong options or files; 2 the pads cannot be used: no\n"
"device, no memory, or handles that do not fit the model, the prompt or one\n"
"another; 3 anything else: memory, output, socket.\n";

enum {
	OPT_MODEL = 1,
	OPT_CHECKPOINT,
	OPT_TOKENIZER,
	OPT_PROMPT,
	OPT_STEPS,
	OPT_TEMPERATURE,
	OPT_TOP_P,
	OPT_SEED,
	OPT_CACHE,
	OPT_KV,
	OPT_LOGITS,
	OPT_HOLD,
	OPT_HANDLES,
	OPT_QUERIES,
	OPT_SERVE,
	OPT_WAIT_READER,
	OPT_STATS,
	OPT_HELP,
};

static const struct option long_options[] = {
	{ "model", required_argument, NULL, OPT_MODEL },
	{ "checkpoint", required_argument, NULL, OPT_CHECKPOINT },
	{ "tokenizer", required_argument, NULL, OPT_TOKENIZER },
	{ "prompt", required_argument, NULL, OPT_PROMPT },
	{ "steps", required_argument, NULL, OPT_STEPS },
	{ "temperature", required_argument, NULL, OPT_TEMPERATURE },
	{ "top-p", required_argument, NULL, OPT_TOP_P },
	{ "seed", required_argument, NULL, OPT_SEED },
	{ "cache", required_argument, NULL, OPT_CACHE },
	{ "kv", required_argument, NULL, OPT_KV },
	{ "logits", required_argument, NULL, OPT_LOGITS },
	{ "hold", required_argument, NULL, OPT_HOLD },
	{ "handles", required_argument, NULL, OPT_HANDLES },
	{ "queries", no_argument, NULL, OPT_QUERIES },
	{ "serve", required_argument, NULL, OPT_SERVE },
	{ "wait-reader", no_argument, NULL, OPT_WAIT_READER },
	{ "stats", no_argument, NULL, OPT_STATS },
	{ "help", no_argument, NULL, OPT_HELP },
	{ 0 },
};

static int parse_float(const char *name, const char *text, float min, float max, float *value)
{
	char *end;

	*value = strtof(text, &end);
	if (!*text || text[strspn(text, "0123456789.e-")] || *end ||
	    !(*value >= min && *value <= max))
		return fail(EXIT_INPUT, "--%s: expected a number from %g to %g, got \"%s\"", name,
			    (double)min, (double)max, text);
	return 0;
}

static int parse_cache(const char *text, bool *heap)
{
	*heap = !strcmp(text, "heap");
	if (!*heap && strcmp(text, "pads"))
		return fail(EXIT_INPUT, "--cache: expected pads or heap, got \"%s\"", text);
	return 0;
}

static int parse_kv(const char *text, uint32_t *dtype)
{
	*dtype = kvscratch_dtype_by_name(text);
	if (*dtype != KVSCRATCH_DTYPE_F32 && *dtype != KVSCRATCH_DTYPE_MXINT8)
		return fail(EXIT_INPUT, "--kv: expected f32 or mxint8, got \"%s\"", text);
	return 0;
}

static int parse_number(struct options *options, int option, const char *text)
{
	uint64_t value = 0;
	int err = 0;

	switch (option) {
	case OPT_STEPS:
		err = parse_integer(EXIT_INPUT, "steps", text, 1, UINT32_MAX, &value);
		options->steps = value;
		break;
	case OPT_TEMPERATURE:
		err = parse_float("temperature", text, 0.0f, MAX_TEMPERATURE,
				  &options->temperature);
		break;
	case OPT_TOP_P:
		err = parse_float("top-p", text, 0.0f, 1.0f, &options->top_p);
		break;
	case OPT_SEED:
		err = parse_integer(EXIT_INPUT, "seed", text, 0, UINT64_MAX, &options->seed);
		break;
	case OPT_HANDLES:
		err = parse_integer(EXIT_INPUT, "handles", text, FIRST_FREE_FD, INT_MAX / 2,
				    &value);
		options->first_handle = value;
		break;
	}
	return err;
}

static int parse_option(struct options *options, int option, const char *text)
{
	if (text && !*text && option != OPT_PROMPT)
		return fail(EXIT_INPUT, "expected a value for each option, got an empty one");
	switch (option) {
	case OPT_MODEL:
		options->model = text;
		return 0;
	case OPT_CHECKPOINT:
		options->checkpoint = text;
		return 0;
	case OPT_TOKENIZER:
		options->tokenizer = text;
		return 0;
	case OPT_PROMPT:
		options->prompt = text;
		return 0;
	case OPT_CACHE:
		return parse_cache(text, &options->heap);
	case OPT_KV:
		return parse_kv(text, &options->kv_dtype);
	case OPT_LOGITS:
		options->logits = text;
		return 0;
	case OPT_HOLD:
		options->hold = text;
		return 0;
	case OPT_QUERIES:
		options->queries = true;
		return 0;
	case OPT_SERVE:
		options->socket = text;
		return 0;
	case OPT_WAIT_READER:
		options->wait_reader = true;
		return 0;
	case OPT_STATS:
		options->stats = true;
		return 0;
	case OPT_HELP:
		options->help = true;
		return 0;
	default:
		return parse_number(options, option, text);
	}
}

static int check_options(const struct options *options)
{
	if (!options->checkpoint != !options->tokenizer)
		return fail(EXIT_INPUT,
			    "expected both --checkpoint and --tokenizer, got one of them");
	if (options->model && options->checkpoint)
		return fail(EXIT_INPUT, "expected either --model or --checkpoint, got both");
	if (options->heap && (options->socket || options->first_handle || options->hold))
		return fail(EXIT_INPUT, "--serve, --handles and --hold: expected --cache pads, "
			    "got --cache heap");
	if (options->first_handle && options->hold)
		return fail(EXIT_INPUT, "expected either --handles or --hold, got both");
	if (options->wait_reader && !options->socket)
		return fail(EXIT_INPUT, "--wait-reader: expected --serve with it");
	return 0;
}

static int parse_options(struct options *options, int argc, char **argv)
{
	int option;

	*options = (struct options){
		.prompt = "",
		.kv_dtype = KVSCRATCH_DTYPE_F32,
		.seed = 1,
		.top_p = 0.9f,
	};
	while ((option = getopt_long(argc, argv, ":", long_options, NULL)) != -1) {
		int err;

		if (option == '?' || option == ':')
			return fail_option(EXIT_INPUT, option, argv);
		err = parse_option(options, option, optarg);
		if (err)
			return err;
	}
	if (optind < argc)
		return fail(EXIT_INPUT, "expected options only, got \"%s\"", argv[optind]);
	return check_options(options);
}

/* Cache */

/* What the library says of the call that failed just now */
static int fail_pad(const struct store *store)
{
	return fail(EXIT_PADS, "%s: %s", store->name, kvscratch_error());
}

static struct store *store_of(struct llama2_rows *rows)
{
	return (struct store *)((char *)rows - offsetof(struct store, rows));
}

static uint8_t *heap_scales(const struct cache *cache, const struct store *store)
{
	return (uint8_t *)store->heap + (size_t)cache->seq_len * store->dim;
}

static int append_heap(struct llama2_rows *rows, const void *row)
{
	struct store *store = store_of(rows);

	memcpy(store->heap + rows->len * store->row_bytes, row, store->row_bytes);
	rows->len++;
	return 0;
}

/* With the very code that the kernel runs */
static int append_heap_mxint8(struct llama2_rows *rows, const void *row)
{
	struct store *store = store_of(rows);
	size_t first = (size_t)rows->len * store->dim;

	if (kvs_scale_mxint8(KVSCRATCH_DTYPE_F32, row, store->dim / KVSCRATCH_MX_BLOCK,
			     (int8_t *)store->heap + first,
			     (uint8_t *)rows->scales + first / KVSCRATCH_MX_BLOCK) < 0)
		return fail(EXIT_PADS, "%s: %s", store->name, kvscratch_strerror(-EDOM));
	rows->len++;
	return 0;
}

static int append_pad(struct llama2_rows *rows, const void *row)
{
	struct store *store = store_of(rows);
	uint64_t state;

	if (kvscratch_append(store->pad, row, store->dim))
		return fail_pad(store);
	state = kvscratch_view_state(store->view);
	/* two names of one pad, or a predecessor that still writes */
	if (kvscratch_state_len(state) != rows->len + 1 ||
	    kvscratch_state_generation(state) != store->generation)
		return fail(EXIT_PADS, "%s: expected %" PRIu32 " rows of generation %" PRIu32
			    " after an append, got %" PRIu32 " of %" PRIu32
			    ": somebody else writes to this pad", store->name, rows->len + 1,
			    store->generation, kvscratch_state_len(state),
			    kvscratch_state_generation(state));
	rows->len++;
	return 0;
}

static unsigned int nr_stores(const struct llama2_shape *shape, bool queries)
{
	return (queries ? 3 : 2) * shape->n_layers + 1;
}

static void name_store(struct store *store, unsigned int i, const struct cache *cache,
		       const struct llama2_shape *shape)
{
	bool tokens = i == cache->count - 1;
	bool query = !tokens && i >= 2 * shape->n_layers;

	store->dtype = query ? KVSCRATCH_DTYPE_F32 : cache->kv_dtype;
	store->input_dtype = KVSCRATCH_DTYPE_F32;
	if (tokens) {
		strcpy(store->name, "tokens");
		store->dim = 1;
		store->dtype = KVSCRATCH_DTYPE_I32;
		store->input_dtype = KVSCRATCH_DTYPE_I32;
	} else if (query) {
		snprintf(store->name, sizeof(store->name), "q%u", i - 2 * shape->n_layers);
		store->dim = shape->dim;
	} else {
		snprintf(store->name, sizeof(store->name), "%c%u", i % 2 ? 'v' : 'k', i / 2);
		store->dim = shape->kv_dim;
	}
	store->row_bytes = (size_t)store->dim * kvscratch_dtype_size(store->dtype);
	if (store->dtype == KVSCRATCH_DTYPE_MXINT8)
		store->row_bytes += store->dim / KVSCRATCH_MX_BLOCK;
	store->handle = -1;
}

static int init_cache(struct cache *cache, const struct llama2_shape *shape, uint32_t kv_dtype,
		      bool queries)
{
	if (kv_dtype == KVSCRATCH_DTYPE_MXINT8 && shape->kv_dim % KVSCRATCH_MX_BLOCK)
		return fail(EXIT_INPUT, "--kv mxint8: expected rows of a multiple of %d elements, "
			    "got %" PRIu32, KVSCRATCH_MX_BLOCK, shape->kv_dim);
	cache->kv_dtype = kv_dtype;
	cache->count = nr_stores(shape, queries);
	cache->seq_len = shape->seq_len;
	cache->stores = calloc(cache->count, sizeof(*cache->stores));
	cache->rows = calloc(cache->count, sizeof(*cache->rows));
	if (!cache->stores || !cache->rows)
		return fail(EXIT_SYSTEM, "out of memory");
	for (unsigned int i = 0; i < cache->count; i++) {
		name_store(&cache->stores[i], i, cache, shape);
		cache->rows[i] = &cache->stores[i].rows;
	}
	return 0;
}

static void close_cache(struct cache *cache)
{
	for (unsigned int i = 0; cache->stores && i < cache->count; i++) {
		struct store *store = &cache->stores[i];

		kvscratch_close(store->pad);
		if (!store->pad && store->handle >= 0)
			close(store->handle);
		free(store->heap);
	}
	free(cache->stores);
	free(cache->rows);
}

static struct store *token_store(const struct cache *cache)
{
	return &cache->stores[cache->count - 1];
}

static int allocate_arrays(struct cache *cache)
{
	for (unsigned int i = 0; i < cache->count; i++) {
		struct store *store = &cache->stores[i];

		store->heap = calloc(cache->seq_len, store->row_bytes);
		if (!store->heap)
			return fail(EXIT_SYSTEM, "out of memory");
		store->rows.data = store->heap;
		store->rows.append = append_heap;
		if (store->dtype == KVSCRATCH_DTYPE_MXINT8) {
			store->rows.scales = heap_scales(cache, store);
			store->rows.append = append_heap_mxint8;
		}
	}
	return 0;
}

static int map_pad(struct store *store)
{
	struct kvscratch_tensor tensor;

	if (kvscratch_as_tensor(store->pad, &tensor))
		return fail_pad(store);
	store->view = kvscratch_view(store->pad);
	store->generation = kvscratch_state_generation(tensor.state);
	store->rows.data = tensor.data;
	store->rows.scales = tensor.scales;
	store->rows.len = tensor.len;
	store->rows.append = append_pad;
	return 0;
}

static int create_pad(struct cache *cache, struct store *store)
{
	const struct kvscratch_geometry geometry = {
		.max_seq_len = cache->seq_len,
		.dim = store->dim,
		.dtype = store->dtype,
		.input_dtype = store->input_dtype,
	};

	if (kvscratch_new_geometry(&store->pad, &geometry))
		return fail(EXIT_PADS, "%s: %s; --cache heap works without pads", store->name,
			    kvscratch_error());
	return map_pad(store);
}

static int create_pads(struct cache *cache)
{
	int err = 0;

	for (unsigned int i = 0; !err && i < cache->count; i++)
		err = create_pad(cache, &cache->stores[i]);
	return err;
}

static int truncate_pad(struct store *store, uint32_t len)
{
	if (kvscratch_truncate(store->pad, len, 0))
		return fail_pad(store);
	store->rows.len = len;
	store->generation++;
	return 0;
}

/*
 * The tokens go first: should this be the last thing that we do, the next one
 * to take over finds no pad that is shorter.
 */
static int truncate_pads(struct cache *cache, uint32_t len)
{
	int err = 0;

	for (unsigned int i = cache->count; !err && i--;)
		if (cache->stores[i].rows.len != len)
			err = truncate_pad(&cache->stores[i], len);
	return err;
}

/* Take-over */

static const char *dtype_name(uint32_t dtype)
{
	const char *name = kvscratch_dtype_name(dtype);

	return name ? name : "unknown";
}

static int check_geometry(const struct cache *cache, const struct store *store)
{
	struct kvscratch_geometry got;

	kvscratch_geometry(store->pad, &got);
	if (got.max_seq_len == cache->seq_len && got.dim == store->dim &&
	    got.dtype == store->dtype && got.input_dtype == store->input_dtype)
		return 0;
	return fail(EXIT_PADS, "handle %d (%s): expected a pad of [%" PRIu32 ", %" PRIu32
		    "] %s from %s, got [%" PRIu64 ", %" PRIu32 "] %s from %s", store->handle,
		    store->name, cache->seq_len, store->dim, dtype_name(store->dtype),
		    dtype_name(store->input_dtype), got.max_seq_len, got.dim,
		    dtype_name(got.dtype), dtype_name(got.input_dtype));
}

static int check_access(const struct store *store)
{
	int access = kvscratch_access(store->pad);

	if (access == O_RDWR)
		return 0;
	return fail(EXIT_PADS, "handle %d (%s): expected it open for read and write, got %s only",
		    store->handle, store->name, access == O_RDONLY ? "read" : "write");
}

static int inherit_handle(const struct cache *cache, struct store *store)
{
	int err;

	if (kvscratch_from_fd(&store->pad, store->handle))
		return fail_pad(store);
	err = check_access(store);
	if (!err)
		err = check_geometry(cache, store);
	return err ? err : map_pad(store);
}

/* A step writes the tokens last. */
static int check_lengths(const struct cache *cache)
{
	uint32_t len = token_store(cache)->rows.len;

	for (unsigned int i = 0; i < cache->count; i++) {
		const struct store *store = &cache->stores[i];

		if (store->rows.len < len)
			return fail(EXIT_PADS, "handle %d (%s): expected at least %" PRIu32
				    " rows, as tokens has, got %" PRIu32, store->handle,
				    store->name,
				    len, store->rows.len);
	}
	return 0;
}

/* From here on the ids of our own copy count: they index the weights. */
static int check_tokens(struct decoder *decoder)
{
	const struct store *store = token_store(&decoder->cache);
	int32_t *tokens = decoder->tokens;

	memcpy(tokens, store->rows.data, store->rows.len * sizeof(*tokens));
	for (uint32_t i = 0; i < store->rows.len; i++) {
		if (tokens[i] < 0 || (uint32_t)tokens[i] >= decoder->tok.vocab_size)
			return fail(EXIT_PADS, "handle %d (tokens): expected ids from 0 to %" PRIu32
				    ", got %" PRId32 " at position %" PRIu32, store->handle,
				    decoder->tok.vocab_size - 1, tokens[i], i);
		if (i < decoder->prompt_len && tokens[i] != decoder->prompt[i])
			return fail(EXIT_PADS, "handle %d (tokens): expected token %" PRId32
				    " of the prompt at position %" PRIu32 ", got %" PRId32,
				    store->handle, decoder->prompt[i], i, tokens[i]);
	}
	return 0;
}

static bool is_stored_row(const struct store *store, const float *row)
{
	size_t first = (size_t)store->rows.len * store->dim;
	uint32_t blocks = store->dim / KVSCRATCH_MX_BLOCK;
	int8_t elements[store->dim];
	uint8_t scales[blocks + 1];

	if (store->dtype != KVSCRATCH_DTYPE_MXINT8)
		return !memcmp((const float *)store->rows.data + first, row, store->row_bytes);
	return kvs_scale_mxint8(KVSCRATCH_DTYPE_F32, row, blocks, elements, scales) >= 0 &&
	       !memcmp((const int8_t *)store->rows.data + first, elements, store->dim) &&
	       !memcmp(store->rows.scales + first / KVSCRATCH_MX_BLOCK, scales, blocks);
}

/* Instead of an append: the row is there already, if it came from this model. */
static int compare_row(struct llama2_rows *rows, const void *row)
{
	struct store *store = store_of(rows);

	if (!is_stored_row(store, row))
		return fail(EXIT_PADS, "handle %d (%s): expected at position %" PRIu32 " the row that "
			    "this model computes, got another one: the cache is of another checkpoint",
			    store->handle, store->name, rows->len);
	rows->len++;
	return 0;
}

/* Compute the rows of position @pos once more, and compare. */
static int check_position(struct decoder *decoder, uint32_t pos)
{
	struct cache *cache = &decoder->cache;
	int err;

	for (unsigned int i = 0; i < cache->count; i++) {
		struct store *store = &cache->stores[i];

		store->kept = store->rows.len;
		store->rows.len = pos;
		store->rows.append = compare_row;
	}
	err = llama2_forward(&decoder->model, cache->rows, decoder->tokens[pos], pos);
	for (unsigned int i = 0; i < cache->count; i++) {
		cache->stores[i].rows.len = cache->stores[i].kept;
		cache->stores[i].rows.append = append_pad;
	}
	return err;
}

/*
 * A cache of another checkpoint of the same shape looks the same but for its numbers. The
 * last position attends to all before it; in the first layer each stands for itself.
 */
static int check_model(struct decoder *decoder)
{
	uint32_t len = token_store(&decoder->cache)->rows.len;
	int err = len ? check_position(decoder, 0) : 0;

	return !err && len > 1 ? check_position(decoder, len - 1) : err;
}

/* Nothing is changed until all was checked: the handles may be the wrong ones. */
static int take_over(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	struct store *tokens = token_store(cache);
	int err;

	for (unsigned int i = 0; i < cache->count; i++) {
		err = inherit_handle(cache, &cache->stores[i]);
		if (err)
			return err;
	}
	err = check_lengths(cache);
	if (!err)
		err = check_tokens(decoder);
	if (!err)
		err = check_model(decoder);
	return err ? err : truncate_pads(cache, tokens->rows.len);
}

static int take_over_inherited(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;

	for (unsigned int i = 0; i < cache->count; i++)
		cache->stores[i].handle = decoder->options.first_handle + i;
	return take_over(decoder);
}

/* Held pads: a holder keeps them when we are killed. */

static int fail_holder(int err)
{
	return fail(EXIT_PADS, "%s%s", kvscratch_error(),
		    err == -ENOENT ? "; kvscratchctl hold NAME --write makes one" : "");
}

static int put_pads(const struct cache *cache, const char *holder)
{
	const char *names[KVSCRATCH_MAX_PASSED];
	int fds[KVSCRATCH_MAX_PASSED];
	int err;

	for (unsigned int i = 0; i < cache->count; i++) {
		names[i] = cache->stores[i].name;
		fds[i] = kvscratch_fd(cache->stores[i].pad);
	}
	err = kvscratch_holder_put(holder, names, fds, cache->count);
	return err ? fail_holder(err) : 0;
}

/* Returns the descriptor that came under the name of @store, or -1. */
static int find_handle(const struct store *store, const char *names, int *fds, int count)
{
	for (int i = 0; i < count; i++) {
		if (!strcmp(names, store->name))
			return fds[i];
		names += strlen(names) + 1;
	}
	return -1;
}

/* Sort what came by our names; what has none of them is closed. */
static int sort_handles(struct cache *cache, const char *holder, const char *names, int *fds,
			int count)
{
	const char *missing = NULL;

	for (unsigned int i = 0; i < cache->count; i++) {
		struct store *store = &cache->stores[i];

		store->handle = find_handle(store, names, fds, count);
		if (store->handle < 0)
			missing = store->name;
	}
	if ((unsigned int)count == cache->count && !missing)
		return 0;
	/* those of ours are closed with the cache */
	for (int i = 0; i < count; i++) {
		bool ours = false;

		for (unsigned int j = 0; j < cache->count; j++)
			ours |= cache->stores[j].handle == fds[i];
		if (!ours)
			close(fds[i]);
	}
	return fail(EXIT_PADS, "%s: expected no pads or the %u of this model, got %d%s%s", holder,
		    cache->count, count, missing ? " without " : "", missing ? missing : "");
}

static int take_over_held(struct decoder *decoder)
{
	const char *holder = decoder->options.hold;
	struct cache *cache = &decoder->cache;
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[KVSCRATCH_MAX_PASSED];
	int count, err;

	if (cache->count > KVSCRATCH_MAX_PASSED)
		return fail(EXIT_INPUT, "--hold: expected at most %d pads, got %u",
			    KVSCRATCH_MAX_PASSED, cache->count);
	count = kvscratch_holder_get(holder, O_RDWR, names, sizeof(names), fds, ARRAY_SIZE(fds));
	if (count < 0)
		return fail_holder(count);
	if (!count) {
		err = create_pads(cache);
		return err ? err : put_pads(cache, holder);
	}
	err = sort_handles(cache, holder, names, fds, count);
	return err ? err : take_over(decoder);
}

static int open_cache(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	const struct options *options = &decoder->options;
	int err = init_cache(cache, &decoder->model.shape, options->kv_dtype, options->queries);

	if (err)
		return err;
	if (options->queries)
		decoder->model.queries = cache->rows + 2 * decoder->model.shape.n_layers;
	decoder->tokens = calloc(cache->seq_len, sizeof(*decoder->tokens));
	if (!decoder->tokens)
		return fail(EXIT_SYSTEM, "out of memory");
	if (options->heap)
		return allocate_arrays(cache);
	if (options->first_handle)
		return take_over_inherited(decoder);
	return options->hold ? take_over_held(decoder) : create_pads(cache);
}

/* Readers */

/* One token's worth of newcomers, so that a crowd of them cannot stop the text. */
#define MAX_ACCEPTED 64

/* Catch what would end us without a chance to remove the socket. */
static int catch_signals(struct server *server)
{
	static const int signals[] = { SIGHUP, SIGINT, SIGTERM, SIGPIPE };
	struct sigaction action;
	sigset_t mask;

	sigemptyset(&mask);
	for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
		if (!sigaction(signals[i], NULL, &action) && action.sa_handler == SIG_DFL)
			sigaddset(&mask, signals[i]);
	sigprocmask(SIG_BLOCK, &mask, &server->old_mask);
	return signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int add_polled(struct server *server, int fd, short events)
{
	if (server->count == server->room) {
		size_t room = server->room ? 2 * server->room : 8;
		struct pollfd *polled = reallocarray(server->polled, room, sizeof(*polled));

		if (!polled)
			return -ENOMEM;
		server->polled = polled;
		server->room = room;
	}
	server->polled[server->count++] = (struct pollfd){ .fd = fd, .events = events };
	return 0;
}

static int listen_unblocked(const char *path)
{
	int listener = kvscratch_listen(path);

	if (listener >= 0)
		fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK);
	return listener;
}

static int open_server(struct decoder *decoder)
{
	struct server *server = &decoder->server;
	const char *path = decoder->options.socket;
	int listener;
	int signals;

	if (nr_stores(&decoder->model.shape, decoder->options.queries) > KVSCRATCH_MAX_PASSED)
		return fail(EXIT_INPUT, "--serve: expected at most %d pads, got %u",
			    KVSCRATCH_MAX_PASSED, nr_stores(&decoder->model.shape, decoder->options.queries));
	if (add_polled(server, -1, POLLIN) || add_polled(server, -1, POLLIN))
		return fail(EXIT_SYSTEM, "out of memory");
	signals = catch_signals(server);
	if (signals < 0)
		return fail(EXIT_SYSTEM, "cannot watch signals: %s", strerror(errno));
	server->polled[POLLED_SIGNALS].fd = signals;
	listener = listen_unblocked(path);
	if (listener < 0)
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	server->polled[POLLED_LISTENER].fd = listener;
	server->path = path;
	return 0;
}

static void close_server(struct server *server)
{
	bool caught = server->count && server->polled[POLLED_SIGNALS].fd >= 0;

	if (server->path)
		unlink(server->path);
	for (size_t i = 0; i < server->count; i++)
		if (server->polled[i].fd >= 0)
			close(server->polled[i].fd);
	free(server->polled);
	/* what was caught ends us now */
	if (caught)
		sigprocmask(SIG_SETMASK, &server->old_mask, NULL);
}

/* Returns how many were opened: all of them, or what there is to close. */
static unsigned int open_readers(const struct cache *cache, int *fds)
{
	for (unsigned int i = 0; i < cache->count; i++) {
		fds[i] = kvscratch_open_reader(cache->stores[i].pad);
		if (fds[i] < 0) {
			fail_pad(&cache->stores[i]);
			return i;
		}
	}
	return cache->count;
}

/* A file position is shared by all who hold an open file: each client gets files of its own. */
static bool pass_handles(const struct cache *cache, int sock)
{
	const char *names[KVSCRATCH_MAX_PASSED] = { 0 };
	int fds[KVSCRATCH_MAX_PASSED] = { 0 };
	unsigned int opened = open_readers(cache, fds);
	int err = -EIO;

	for (unsigned int i = 0; i < cache->count; i++)
		names[i] = cache->stores[i].name;
	if (opened == cache->count) {
		err = kvscratch_send_handles(sock, names, fds, cache->count);
		if (err)
			fail(EXIT_SYSTEM, "a reader: %s", kvscratch_error());
	}
	while (opened--)
		close(fds[opened]);
	return !err;
}

static void serve_client(struct server *server, const struct cache *cache, int sock)
{
	if (!pass_handles(cache, sock) || add_polled(server, sock, 0)) {
		close(sock);
		return;
	}
	server->served++;
}

/* Returns 0 or the negative errno of an accept that will not work next time either. */
static int accept_clients(struct server *server, const struct cache *cache)
{
	for (int i = 0; i < MAX_ACCEPTED; i++) {
		int sock = accept4(server->polled[POLLED_LISTENER].fd, NULL, NULL,
				   SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (sock >= 0)
			serve_client(server, cache, sock);
		else if (errno == EAGAIN)
			return 0;
		else if (errno != EINTR && errno != ECONNABORTED)
			return -errno;
	}
	return 0;
}

static void drop_gone_clients(struct server *server)
{
	for (size_t i = server->count; i-- > POLLED_CLIENTS;) {
		if (!server->polled[i].revents)
			continue;
		close(server->polled[i].fd);
		server->polled[i] = server->polled[--server->count];
	}
}

/* Serve who waits; returns an exit code when it is time to end. */
static int serve_readers(struct server *server, const struct cache *cache, bool wait)
{
	if (poll(server->polled, server->count, wait ? -1 : 0) <= 0)
		return 0;
	if (server->polled[POLLED_SIGNALS].revents)
		return EXIT_SYSTEM;
	drop_gone_clients(server);
	if (server->polled[POLLED_LISTENER].revents) {
		int err = accept_clients(server, cache);

		if (err && wait)
			return fail(EXIT_SYSTEM, "%s: cannot accept: %s", server->path,
				    strerror(-err));
	}
	return 0;
}

static int wait_for_reader(struct server *server, const struct cache *cache)
{
	int err = 0;

	while (!err && !server->served)
		err = serve_readers(server, cache, true);
	return err;
}

/* Decoding */

static int print_bytes(const char *bytes, size_t count)
{
	if (fwrite(bytes, 1, count, stdout) != count || fflush(stdout))
		return fail(EXIT_SYSTEM, "cannot write the text: %s", strerror(errno));
	return 0;
}

/* BOS itself, at position 0, is no text. */
static int print_token(const struct decoder *decoder, uint32_t pos)
{
	const int32_t *tokens = decoder->tokens;
	const char *bytes;
	size_t count;
	char byte;

	if (!pos)
		return 0;
	count = llama2_decode(&decoder->tok, tokens[pos - 1], tokens[pos], &byte, &bytes);
	return print_bytes(bytes, count);
}

static int write_logits(const struct decoder *decoder)
{
	uint32_t count = decoder->model.shape.vocab_size;

	if (decoder->logits &&
	    fwrite(decoder->model.logits, sizeof(float), count, decoder->logits) != count)
		return fail(EXIT_SYSTEM, "%s: cannot write: %s", decoder->options.logits,
			    strerror(errno));
	return 0;
}

/* A regular file is replaced once all is written, by a file of which nothing is to be left. */
static int open_new_logits(struct decoder *decoder)
{
	int fd;

	catch_interrupts();
	if (output_open(&decoder->output, decoder->options.logits))
		return fail(EXIT_SYSTEM, "%s: %s", decoder->options.logits, decoder->output.words);
	fd = fcntl(decoder->output.fd, F_DUPFD_CLOEXEC, 0);
	decoder->logits = fd < 0 ? NULL : fdopen(fd, "w");
	return 0;
}

static int open_logits(struct decoder *decoder)
{
	const char *path = decoder->options.logits;
	int err = 0;

	if (!path)
		return 0;
	if (output_in_place(path))
		decoder->logits = fopen(path, "we");
	else
		err = open_new_logits(decoder);
	if (err || decoder->logits)
		return err;
	return fail(EXIT_SYSTEM, "%s: cannot open: %s", path, strerror(errno));
}

static int close_logits(struct decoder *decoder)
{
	FILE *logits = decoder->logits;

	decoder->logits = NULL;
	if (logits && fclose(logits))
		return fail(EXIT_SYSTEM, "%s: cannot write: %s", decoder->options.logits,
			    strerror(errno));
	if (decoder->output.fd >= 0 && output_replace(&decoder->output))
		return fail(EXIT_SYSTEM, "%s: %s", decoder->options.logits, decoder->output.words);
	return 0;
}

/* All rows of one position; the token comes last and makes the others count. */
static int step(struct decoder *decoder, int32_t token, uint32_t pos)
{
	struct llama2_rows *tokens = &token_store(&decoder->cache)->rows;
	int err = llama2_forward(&decoder->model, decoder->cache.rows, token, pos);

	decoder->forwards++;
	decoder->tokens[pos] = token;
	if (!err)
		err = write_logits(decoder);
	return err ? err : tokens->append(tokens, &token);
}

/* Print what there is and, unless it is all that was asked for, bring the logits back. */
static int resume(struct decoder *decoder)
{
	uint32_t len = token_store(&decoder->cache)->rows.len;
	int err = 0;

	for (uint32_t pos = 0; !err && pos < len && pos < decoder->steps; pos++)
		err = print_token(decoder, pos);
	if (err || !len || len >= decoder->steps)
		return err;
	err = truncate_pads(&decoder->cache, len - 1);
	return err ? err : step(decoder, decoder->tokens[len - 1], len - 1);
}

/* Returns the token of position @pos, or -1 at the end of the text. */
static int32_t next_token(const struct decoder *decoder, uint32_t pos)
{
	int32_t token;

	if (pos < decoder->prompt_len)
		return decoder->prompt[pos];
	token = llama2_sample(&decoder->sampler, decoder->model.logits, decoder->tok.vocab_size,
			      pos);
	return token == LLAMA2_BOS || token == LLAMA2_EOS ? -1 : token;
}

static int generate(struct decoder *decoder)
{
	int err = resume(decoder);

	for (uint32_t pos = token_store(&decoder->cache)->rows.len; !err && pos < decoder->steps;
	     pos++) {
		int32_t token;

		if (decoder->server.path)
			err = serve_readers(&decoder->server, &decoder->cache, false);
		if (interrupted())
			err = EXIT_SYSTEM;
		if (err)
			break;
		token = next_token(decoder, pos);
		if (token < 0)
			break;
		err = step(decoder, token, pos);
		if (!err)
			err = print_token(decoder, pos);
	}
	return err ? err : print_bytes("\n", 1);
}

static double seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void print_stats(const struct decoder *decoder)
{
	const struct cache *cache = &decoder->cache;
	uint64_t used = 0;
	uint64_t room = 0;

	for (unsigned int i = 0; i < cache->count; i++) {
		used += (uint64_t)cache->stores[i].rows.len * cache->stores[i].row_bytes;
		room += (uint64_t)cache->seq_len * cache->stores[i].row_bytes;
	}
	fprintf(stderr, "%" PRIu32 " tokens, %" PRIu32 " computed, %.1f tokens/s, %" PRIu64 " of %"
		PRIu64 " bytes in %u %s\n", token_store(cache)->rows.len, decoder->forwards,
		decoder->seconds > 0.0 ? decoder->forwards / decoder->seconds : 0.0, used, room,
		cache->count, decoder->options.heap ? "arrays" : "pads");
}

static int decode(struct decoder *decoder)
{
	double start;
	int err = 0;

	if (decoder->options.wait_reader)
		err = wait_for_reader(&decoder->server, &decoder->cache);
	if (err)
		return err;
	start = seconds_now();
	err = generate(decoder);
	decoder->seconds = seconds_now() - start;
	if (!err && decoder->options.stats)
		print_stats(decoder);
	return err;
}

/* Setting up */

#define SAY_WHICH "say which with --checkpoint FILE --tokenizer FILE"

/* Keep the path of @name in @dir; a second one is too many. */
static int keep_path(char **path, const char *dir, const char *name, const char *what)
{
	if (*path)
		return fail(EXIT_INPUT, "%s: expected one %s, got more: " SAY_WHICH, dir, what);
	if (asprintf(path, "%s/%s", dir, name) < 0) {
		*path = NULL;
		return fail(EXIT_SYSTEM, "out of memory");
	}
	return 0;
}

static int scan_directory(DIR *stream, const char *dir, char **checkpoint, char **tokenizer)
{
	const struct dirent *entry;
	int err = 0;

	while (!err && (entry = readdir(stream))) {
		const char *dot = strrchr(entry->d_name, '.');

		if (!dot || dot == entry->d_name || strcmp(dot, ".bin"))
			continue;
		if (!strncmp(entry->d_name, "tok", 3))
			err = keep_path(tokenizer, dir, entry->d_name, "tok*.bin");
		else
			err = keep_path(checkpoint, dir, entry->d_name, "*.bin beside tok*.bin");
	}
	if (!err && (!*tokenizer || !*checkpoint))
		err = fail(EXIT_INPUT, "%s: expected one %s, got none: " SAY_WHICH, dir,
			   *tokenizer ? "*.bin beside tok*.bin" : "tok*.bin");
	return err;
}

static int find_files(const char *dir, char **checkpoint, char **tokenizer)
{
	DIR *stream = opendir(dir);
	int err;

	if (!stream)
		return fail(EXIT_INPUT, "%s: %s", dir, strerror(errno));
	err = scan_directory(stream, dir, checkpoint, tokenizer);
	closedir(stream);
	return err;
}

static int open_files(struct decoder *decoder, const char *checkpoint, const char *tokenizer)
{
	int err = llama2_open(&decoder->model, checkpoint);

	if (err)
		return err;
	return llama2_tokenizer_open(&decoder->tok, tokenizer, decoder->model.shape.vocab_size);
}

static int open_directory(struct decoder *decoder, const char *dir)
{
	char *checkpoint = NULL;
	char *tokenizer = NULL;
	int err = find_files(dir, &checkpoint, &tokenizer);

	if (!err)
		err = open_files(decoder, checkpoint, tokenizer);
	free(checkpoint);
	free(tokenizer);
	return err;
}

static int open_model(struct decoder *decoder)
{
	const struct options *options = &decoder->options;
	int err;

	if (options->model)
		return open_directory(decoder, options->model);
	if (options->checkpoint)
		return open_files(decoder, options->checkpoint, options->tokenizer);
	err = llama2_make_up(&decoder->model);
	return err ? err : llama2_tokenizer_make_up(&decoder->tok);
}

static int set_steps(struct decoder *decoder)
{
	uint32_t seq_len = decoder->model.shape.seq_len;

	decoder->steps = decoder->options.steps ? decoder->options.steps : seq_len;
	if (decoder->steps > seq_len)
		return fail(EXIT_INPUT, "--steps: expected 1 to %" PRIu32
			    ", the positions of the model, got %" PRIu32, seq_len, decoder->steps);
	return 0;
}

static int encode_prompt(struct decoder *decoder)
{
	uint64_t longest = (uint64_t)decoder->steps * decoder->tok.max_length;
	size_t bytes = strlen(decoder->options.prompt);
	int err;

	/* merging takes quadratic time: do not begin what cannot end well */
	if (bytes > longest)
		return fail(EXIT_INPUT, "--prompt: expected at most %" PRIu64 " bytes for %" PRIu32
			    " positions, got %zu", longest, decoder->steps, bytes);
	err = llama2_encode(&decoder->tok, decoder->options.prompt, &decoder->prompt,
			    &decoder->prompt_len);
	if (err)
		return err;
	if (decoder->prompt_len > decoder->steps)
		return fail(EXIT_INPUT, "--prompt: expected at most %" PRIu32
			    " tokens, BOS included, got %" PRIu32, decoder->steps,
			    decoder->prompt_len);
	return 0;
}

static int open_sampler(struct decoder *decoder)
{
	decoder->sampler = (struct llama2_sampler){
		.temperature = decoder->options.temperature,
		.top_p = decoder->options.top_p,
		.seed = decoder->options.seed,
	};
	return llama2_sampler_open(&decoder->sampler, decoder->tok.vocab_size);
}

static int run(struct decoder *decoder)
{
	int err = open_model(decoder);

	if (!err)
		err = set_steps(decoder);
	if (!err)
		err = encode_prompt(decoder);
	if (!err)
		err = open_sampler(decoder);
	if (!err && decoder->options.socket)
		err = open_server(decoder);
	if (!err)
		err = open_cache(decoder);
	if (!err)
		err = open_logits(decoder);
	if (!err)
		err = decode(decoder);
	return err ? err : close_logits(decoder);
}

static void clean_up(struct decoder *decoder)
{
	close_cache(&decoder->cache);
	if (decoder->logits)
		fclose(decoder->logits);
	output_close(&decoder->output);
	free(decoder->prompt);
	free(decoder->tokens);
	llama2_sampler_close(&decoder->sampler);
	llama2_tokenizer_close(&decoder->tok);
	llama2_close(&decoder->model);
	close_server(&decoder->server);
}

int main(int argc, char **argv)
{
	struct decoder decoder = { .output = { .fd = -1, .directory = -1 } };
	int err;

	cli_name = "kvdecode";
	/* we say it ourselves, in one line */
	opterr = 0;
	survive_size_limits();
	err = open_standard_descriptors();
	if (err)
		return fail(EXIT_SYSTEM, "/dev/null: cannot open: %s", strerror(-err));
	err = parse_options(&decoder.options, argc, argv);
	if (err)
		return err;
	if (decoder.options.help) {
		fputs(help_text, stdout);
		return fflush(stdout) ? EXIT_SYSTEM : EXIT_DONE;
	}
	err = run(&decoder);
	clean_up(&decoder);
	return interrupted() ? end_by(interrupted()) : err;
}
