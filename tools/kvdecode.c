// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvdecode: text from a Llama-2 style model whose KV cache lives in a pad.
 *
 * K and V of every layer are a plane each, and so are, where they are wanted, the
 * queries; one more plane has the token of each position. We are the pad's writer: rows
 * are staged as they are computed, and attended to where they lie, and one commit makes a
 * token of them. So whoever takes over finds whole tokens and nothing else.
 * Drafts are staged behind the next token and run through the model together with it;
 * those that turn out to be the text are committed with it, the others never were.
 * Nothing else has to survive the decoder: the random number of a position is a
 * function of the seed and the position, and the logits come back by running
 * the last token once more.
 */
#define _GNU_SOURCE
#include "../kvscratch_scale.h"
#include "branch.h"
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
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_TEMPERATURE	1000.0f
#define FIRST_FREE_FD	3
#define MAX_DRAFT	64
#define MAX_BRANCHES	64

/* What it is called where pads have names: by readers, and in a holder */
#define CACHE_NAME	"cache"

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
	bool prefill;
	int handle;		/* 0: none */
	const char *hold;
	const char *fork;
	uint32_t branches;	/* processes; 0: ourselves */
	bool takeover;
	uint32_t draft;		/* tokens at once; 0: none */
	const char *draft_model;
	bool queries;
	float temperature;
	float top_p;
	bool heap;
	bool wait_reader;
	bool stats;
	bool help;
};

struct cache;

/**
 * struct store - one matrix of the cache: a plane of its pad, or an array on the heap
 * @rows: what the model sees of it
 * @cache: the cache
 * @index: of the plane
 * @plane: what it is made of
 * @row_bytes: bytes per row, as stored, scales included
 * @heap: the array, with the scales behind it
 */
struct store {
	struct llama2_rows rows;
	struct cache *cache;
	unsigned int index;
	struct kvscratch_plane plane;
	size_t row_bytes;
	char *heap;
};

/**
 * struct cache - K and V of every layer, perhaps its queries, and the tokens
 * @stores: k0 v0 k1 v1 ... q0 q1 ... tokens
 * @count: how many
 * @seq_len: rows that each has room for
 * @len: tokens that are there
 * @kv_dtype: how K and V are stored
 * @rows: the rows of @stores as the model takes them
 * @pad: the pad, or NULL
 * @writer: ourselves
 */
struct cache {
	struct store *stores;
	unsigned int count;
	uint32_t seq_len;
	uint32_t len;
	uint32_t kv_dtype;
	struct llama2_rows **rows;
	struct kvscratch *pad;
	struct kvscratch *writer;
};

/**
 * struct drafter - what says how the text may go on
 * @model: another model, if there is one
 * @cache: its own, on the heap; it may have drafts that were not accepted
 * @guessed: drafts so far, without those that the prompt told
 * @accepted: those that were the text
 */
struct drafter {
	struct llama2_model model;
	struct cache cache;
	uint32_t guessed;
	uint32_t accepted;
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
	struct drafter drafter;
	struct server server;
	FILE *logits;
	struct output output;	/* the file that @logits becomes */
	int32_t *prompt;
	uint32_t prompt_len;
	int32_t *tokens;	/* of each position, and drafts behind them */
	const float *latest;	/* logits of the last position */
	uint32_t steps;
	bool silent;		/* others print the text */
	uint32_t forwards;
	double seconds;
};

/* Options */

static const char help_text[] =
"Usage: kvdecode [OPTION]...\n"
"Generate text with a Llama-2 style model. K and V of every layer are kept in\n"
"a kvscratch pad, and attention reads them through a read-only mapping.\n"
"\n"
"Model (without one: made-up weights that speak gibberish):\n"
"  --model DIR          the one tok*.bin and the one other *.bin of DIR\n"
"  --checkpoint FILE    weights in llama2.c's legacy format\n"
"  --tokenizer FILE     its vocabulary in llama2.c's format\n"
"\n"
"Text:\n"
"  --prompt TEXT        begin with TEXT\n"
"  --steps N            end after N positions, BOS included (all of the model's)\n"
"  --prefill            end where the prompt ends\n"
"  --temperature T      0 always takes the most likely token (0)\n"
"  --top-p P            choose among the likeliest tokens of sum P (0.9)\n"
"  --seed S             the same seed gives the same text (1)\n"
"\n"
"Cache:\n"
"  --cache pads|heap    where K and V are kept (pads)\n"
"  --kv f32|mxint8      how: as they are, or in a byte per element and a scale\n"
"                       per 32, to which the kernel converts them (f32)\n"
"  --hold NAME          keep the pad with kvscratchctl hold NAME --write, and go on\n"
"                       where it ends when there is one\n"
"  --handle N           the same with the inherited descriptor N, of a pad that\n"
"                       somebody else made\n"
"  --fork NAME[@N]      go on from the first N tokens, or all, of the pad that a\n"
"                       holder keeps as NAME, in a pad of our own; with --hold only\n"
"                       where that has none yet\n"
"  --branches N         compute the prompt once and go on with it N times, in N\n"
"                       processes that each fork the pad: the texts of the seeds\n"
"                       S, S + 1 ...\n"
"  --takeover           with --hold or --handle: also where another process\n"
"                       writes to the pad, which cannot any more\n"
"  --queries            keep the queries as well, in planes q0 q1 ... before tokens,\n"
"                       for readers that look at the attention\n"
"  --serve SOCKET       pass a read-only handle to whoever connects to SOCKET\n"
"  --wait-reader        with --serve: begin when the first one was served\n"
"\n"
"Speculative decoding, which does not change the text:\n"
"  --draft N            have up to N tokens drafted and run with the next one,\n"
"                       drafts being what followed the last tokens before\n"
"  --draft-model FILE   or what these weights say, of the same vocabulary\n"
"\n"
"  --logits FILE        write the logits of each position: vocab_size floats\n"
"  --stats              at the end: tokens, tokens/s, bytes in the cache\n"
"  --help               show this and exit\n"
"\n"
"A connection to SOCKET that hangs up says that decoding is over.\n"
"\n"
"Exit status: 0 ok; 1 wrong options or files; 2 the pad cannot be used: no\n"
"device, no memory, one of another model or another prompt, or another process\n"
"writes to it; 3 anything else: memory, output, socket.\n";

enum {
	OPT_MODEL = 1,
	OPT_CHECKPOINT,
	OPT_TOKENIZER,
	OPT_PROMPT,
	OPT_STEPS,
	OPT_PREFILL,
	OPT_TEMPERATURE,
	OPT_TOP_P,
	OPT_SEED,
	OPT_CACHE,
	OPT_KV,
	OPT_LOGITS,
	OPT_HOLD,
	OPT_HANDLE,
	OPT_FORK,
	OPT_BRANCHES,
	OPT_TAKEOVER,
	OPT_QUERIES,
	OPT_DRAFT,
	OPT_DRAFT_MODEL,
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
	{ "prefill", no_argument, NULL, OPT_PREFILL },
	{ "temperature", required_argument, NULL, OPT_TEMPERATURE },
	{ "top-p", required_argument, NULL, OPT_TOP_P },
	{ "seed", required_argument, NULL, OPT_SEED },
	{ "cache", required_argument, NULL, OPT_CACHE },
	{ "kv", required_argument, NULL, OPT_KV },
	{ "logits", required_argument, NULL, OPT_LOGITS },
	{ "hold", required_argument, NULL, OPT_HOLD },
	{ "handle", required_argument, NULL, OPT_HANDLE },
	{ "fork", required_argument, NULL, OPT_FORK },
	{ "branches", required_argument, NULL, OPT_BRANCHES },
	{ "takeover", no_argument, NULL, OPT_TAKEOVER },
	{ "queries", no_argument, NULL, OPT_QUERIES },
	{ "draft", required_argument, NULL, OPT_DRAFT },
	{ "draft-model", required_argument, NULL, OPT_DRAFT_MODEL },
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
	case OPT_HANDLE:
		err = parse_integer(EXIT_INPUT, "handle", text, FIRST_FREE_FD, INT_MAX, &value);
		options->handle = value;
		break;
	case OPT_DRAFT:
		err = parse_integer(EXIT_INPUT, "draft", text, 1, MAX_DRAFT, &value);
		options->draft = value;
		break;
	case OPT_BRANCHES:
		err = parse_integer(EXIT_INPUT, "branches", text, 1, MAX_BRANCHES, &value);
		options->branches = value;
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
	case OPT_PREFILL:
		options->prefill = true;
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
	case OPT_FORK:
		options->fork = text;
		return 0;
	case OPT_TAKEOVER:
		options->takeover = true;
		return 0;
	case OPT_DRAFT_MODEL:
		options->draft_model = text;
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
	if (options->heap && (options->socket || options->handle || options->hold ||
			      options->fork || options->branches))
		return fail(EXIT_INPUT, "--serve, --handle, --hold, --fork and --branches: expected "
			    "--cache pads, got --cache heap");
	if (options->prefill && (options->steps || options->branches))
		return fail(EXIT_INPUT, "--prefill: expected neither --steps nor --branches with it");
	if (options->branches && (options->socket || options->logits))
		return fail(EXIT_INPUT, "--branches: expected neither --serve nor --logits with it");
	if (options->branches && options->temperature <= 0.0f)
		return fail(EXIT_INPUT, "--branches: expected a --temperature above 0, got %g: all "
			    "texts would be one", (double)options->temperature);
	if (options->handle && options->fork)
		return fail(EXIT_INPUT, "expected either --handle or --fork, got both");
	if (options->handle && options->hold)
		return fail(EXIT_INPUT, "expected either --handle or --hold, got both");
	if (options->takeover && !options->handle && !options->hold)
		return fail(EXIT_INPUT, "--takeover: expected --hold or --handle with it");
	if (options->draft_model && !options->draft)
		return fail(EXIT_INPUT, "--draft-model: expected --draft with it");
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
static int fail_cache(void)
{
	return fail(EXIT_PADS, CACHE_NAME ": %s", kvscratch_error());
}

static int fail_store(const struct store *store)
{
	return fail(EXIT_PADS, "%s: %s", store->plane.label, kvscratch_error());
}

static struct store *store_of(struct llama2_rows *rows)
{
	return (struct store *)((char *)rows - offsetof(struct store, rows));
}

static int put_heap(struct llama2_rows *rows, uint32_t first, const void *more, uint32_t count)
{
	struct store *store = store_of(rows);

	memcpy(store->heap + first * store->row_bytes, more, count * store->row_bytes);
	return 0;
}

/* With the very code that the kernel runs */
static int put_heap_mxint8(struct llama2_rows *rows, uint32_t first, const void *more,
			   uint32_t count)
{
	struct store *store = store_of(rows);
	size_t at = (size_t)first * store->plane.dim;
	size_t elements = (size_t)count * store->plane.dim;

	if (kvs_scale_mxint8(KVSCRATCH_DTYPE_F32, more, elements / KVSCRATCH_MX_BLOCK,
			     (int8_t *)store->heap + at,
			     (uint8_t *)rows->scales + at / KVSCRATCH_MX_BLOCK) < 0)
		return fail(EXIT_PADS, "%s: %s", store->plane.label, kvscratch_strerror(-EDOM));
	return 0;
}

static int put_staged(struct llama2_rows *rows, uint32_t first, const void *more, uint32_t count)
{
	struct store *store = store_of(rows);

	if (kvscratch_stage(store->cache->writer, store->index, first, more, count))
		return fail_store(store);
	return 0;
}

/* For a token that is there already */
static int put_nothing(struct llama2_rows *rows, uint32_t first, const void *more, uint32_t count)
{
	(void)rows;
	(void)first;
	(void)more;
	(void)count;
	return 0;
}

static void set_put(struct cache *cache, int (*put)(struct llama2_rows *, uint32_t, const void *,
						    uint32_t))
{
	for (unsigned int i = 0; i < cache->count; i++)
		cache->stores[i].rows.put = put;
}

/* From now on the first @len tokens are there; others that were put are not. */
static int commit(struct cache *cache, uint32_t len)
{
	if (cache->writer && kvscratch_commit(cache->writer, len))
		return fail_cache();
	cache->len = len;
	return 0;
}

static void describe_store(struct store *store, unsigned int i, const struct llama2_shape *shape)
{
	struct kvscratch_plane *plane = &store->plane;
	const struct cache *cache = store->cache;
	bool tokens = i == cache->count - 1;
	bool query = !tokens && i >= 2 * shape->n_layers;

	store->index = i;
	plane->dtype = query ? KVSCRATCH_DTYPE_F32 : cache->kv_dtype;
	plane->input_dtype = KVSCRATCH_DTYPE_F32;
	if (tokens) {
		strcpy(plane->label, "tokens");
		plane->dim = 1;
		plane->dtype = KVSCRATCH_DTYPE_I32;
		plane->input_dtype = KVSCRATCH_DTYPE_I32;
	} else if (query) {
		snprintf(plane->label, sizeof(plane->label), "q%u", i - 2 * shape->n_layers);
		plane->dim = shape->dim;
	} else {
		snprintf(plane->label, sizeof(plane->label), "%c%u", i % 2 ? 'v' : 'k', i / 2);
		plane->dim = shape->kv_dim;
	}
	store->row_bytes = (size_t)plane->dim * kvscratch_dtype_size(plane->dtype);
	if (plane->dtype == KVSCRATCH_DTYPE_MXINT8)
		store->row_bytes += plane->dim / KVSCRATCH_MX_BLOCK;
}

static int init_cache(struct cache *cache, const struct llama2_shape *shape, uint32_t kv_dtype,
		      bool queries)
{
	if (kv_dtype == KVSCRATCH_DTYPE_MXINT8 && shape->kv_dim % KVSCRATCH_MX_BLOCK)
		return fail(EXIT_INPUT, "--kv mxint8: expected rows of a multiple of %d elements, "
			    "got %" PRIu32, KVSCRATCH_MX_BLOCK, shape->kv_dim);
	cache->kv_dtype = kv_dtype;
	cache->count = (queries ? 3 : 2) * shape->n_layers + 1;
	cache->seq_len = shape->seq_len;
	cache->stores = calloc(cache->count, sizeof(*cache->stores));
	cache->rows = calloc(cache->count, sizeof(*cache->rows));
	if (!cache->stores || !cache->rows)
		return fail(EXIT_SYSTEM, "out of memory");
	for (unsigned int i = 0; i < cache->count; i++) {
		cache->stores[i].cache = cache;
		describe_store(&cache->stores[i], i, shape);
		cache->rows[i] = &cache->stores[i].rows;
	}
	return 0;
}

static void close_cache(struct cache *cache)
{
	for (unsigned int i = 0; cache->stores && i < cache->count; i++)
		free(cache->stores[i].heap);
	kvscratch_close(cache->writer);
	kvscratch_close(cache->pad);
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
		store->rows.put = put_heap;
		if (store->plane.dtype == KVSCRATCH_DTYPE_MXINT8) {
			store->rows.scales = (uint8_t *)store->heap +
					     (size_t)cache->seq_len * store->plane.dim;
			store->rows.put = put_heap_mxint8;
		}
	}
	return 0;
}

static int map_pad(struct cache *cache)
{
	const struct kvscratch_view *view = kvscratch_view(cache->pad);

	if (!view)
		return fail_cache();
	for (unsigned int i = 0; i < cache->count; i++) {
		struct llama2_rows *rows = &cache->stores[i].rows;

		rows->data = kvscratch_view_plane_row(view, i, 0);
		rows->scales = kvscratch_view_plane_scales(view, i);
		rows->put = put_staged;
	}
	return 0;
}

static int take_role(struct cache *cache, bool by_force)
{
	int err = by_force ? kvscratch_takeover(&cache->writer, cache->pad) :
			     kvscratch_writer(&cache->writer, cache->pad);

	if (err)
		return fail(EXIT_PADS, CACHE_NAME ": %s%s", kvscratch_error(),
			    err == -EBUSY ? "; --takeover takes it from there" : "");
	return 0;
}

/* Text, so that it says what it is wherever a pad is described */
static void make_tag(char *tag, const struct llama2_model *model)
{
	snprintf(tag, KVSCRATCH_TAG_BYTES, "checkpoint fnv1a64 %016" PRIx64,
		 llama2_fingerprint(model));
}

static int create_pad(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	struct kvscratch_plane *planes = calloc(cache->count, sizeof(*planes));
	char tag[KVSCRATCH_TAG_BYTES] = "";
	int err;

	if (!planes)
		return fail(EXIT_SYSTEM, "out of memory");
	for (unsigned int i = 0; i < cache->count; i++)
		planes[i] = cache->stores[i].plane;
	make_tag(tag, &decoder->model);
	err = kvscratch_new_planes(&cache->pad, cache->seq_len, planes, cache->count, tag,
				   sizeof(tag));
	free(planes);
	if (err)
		return fail(EXIT_PADS, CACHE_NAME ": %s; --cache heap works without pads",
			    kvscratch_error());
	err = map_pad(cache);
	return err ? err : take_role(cache, false);
}

/* Take-over */

/* The text of a tag of anybody's */
static void print_tag(char *text, const __u8 *tag)
{
	size_t length = strnlen((const char *)tag, KVSCRATCH_TAG_BYTES);

	for (size_t i = 0; i < length; i++)
		text[i] = tag[i] >= ' ' && tag[i] <= '~' ? tag[i] : '?';
	text[length] = '\0';
}

static int check_tag(const struct decoder *decoder)
{
	char expected[KVSCRATCH_TAG_BYTES] = "", got[KVSCRATCH_TAG_BYTES + 1];
	struct kvscratch_pad_info info;

	if (kvscratch_pad_info(decoder->cache.pad, &info))
		return fail_cache();
	make_tag(expected, &decoder->model);
	if (!memcmp(expected, info.tag, sizeof(expected)))
		return 0;
	print_tag(got, info.tag);
	return fail(EXIT_PADS, CACHE_NAME ": expected the tag \"%s\", got \"%s\": it is of another "
		    "checkpoint", expected, got);
}

static const char *dtype_name(uint32_t dtype)
{
	const char *name = kvscratch_dtype_name(dtype);

	return name ? name : "unknown";
}

static int check_plane(const struct cache *cache, const struct store *store)
{
	const struct kvscratch_plane *got = kvscratch_plane(cache->pad, store->index);
	const struct kvscratch_plane *expected = &store->plane;

	if (!strcmp(got->label, expected->label) && got->dim == expected->dim &&
	    got->dtype == expected->dtype && got->input_dtype == expected->input_dtype)
		return 0;
	return fail(EXIT_PADS, CACHE_NAME ": expected as plane %u %s, %" PRIu32 " x %s from %s, got "
		    "%" PRIu32 " x %s from %s", store->index, expected->label, expected->dim,
		    dtype_name(expected->dtype), dtype_name(expected->input_dtype), got->dim,
		    dtype_name(got->dtype), dtype_name(got->input_dtype));
}

static int check_shape(const struct cache *cache)
{
	int err = 0;

	if (kvscratch_nr_planes(cache->pad) != cache->count ||
	    kvscratch_capacity(cache->pad) != cache->seq_len)
		return fail(EXIT_PADS, CACHE_NAME ": expected %u planes of %" PRIu32 " rows, got %"
			    PRIu32 " of %" PRIu64, cache->count, cache->seq_len,
			    kvscratch_nr_planes(cache->pad), kvscratch_capacity(cache->pad));
	for (unsigned int i = 0; !err && i < cache->count; i++)
		err = check_plane(cache, &cache->stores[i]);
	return err;
}

static int check_access(const struct cache *cache)
{
	int access = kvscratch_access(cache->pad);

	if (access == O_RDWR)
		return 0;
	return fail(EXIT_PADS, CACHE_NAME ": expected it open for read and write, got %s only",
		    access == O_RDONLY ? "read" : "write");
}

/* From here on the ids of our own copy count: they index the weights. */
static int check_tokens(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	int64_t len = kvscratch_len(cache->pad);
	int32_t *tokens = decoder->tokens;

	if (len < 0)
		return fail_cache();
	cache->len = len;
	memcpy(tokens, token_store(cache)->rows.data, cache->len * sizeof(*tokens));
	for (uint32_t i = 0; i < cache->len; i++) {
		if (tokens[i] < 0 || (uint32_t)tokens[i] >= decoder->tok.vocab_size)
			return fail(EXIT_PADS, CACHE_NAME ": expected tokens from 0 to %" PRIu32
				    ", got %" PRId32 " at position %" PRIu32,
				    decoder->tok.vocab_size - 1, tokens[i], i);
		if (i < decoder->prompt_len && tokens[i] != decoder->prompt[i])
			return fail(EXIT_PADS, CACHE_NAME ": expected token %" PRId32
				    " of the prompt at position %" PRIu32 ", got %" PRId32,
				    decoder->prompt[i], i, tokens[i]);
	}
	return 0;
}

/* Nobody is disturbed until all was checked: it may be the wrong pad. */
static int go_on(struct decoder *decoder, bool by_force)
{
	struct cache *cache = &decoder->cache;
	int err = check_access(cache);

	if (!err)
		err = check_tag(decoder);
	if (!err)
		err = check_shape(cache);
	if (!err)
		err = map_pad(cache);
	if (!err)
		err = check_tokens(decoder);
	if (!err)
		err = take_role(cache, by_force);
	/* more may have come until we were the writer */
	return err ? err : check_tokens(decoder);
}

static int take_over(struct decoder *decoder, int fd)
{
	if (kvscratch_from_fd(&decoder->cache.pad, fd)) {
		close(fd);
		return fail_cache();
	}
	return go_on(decoder, decoder->options.takeover);
}

/* A pad of our own: empty, or one that begins with what another decoder computed */
static int begin_pad(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	int err;

	if (!decoder->options.fork)
		return create_pad(decoder);
	err = fork_held(&cache->pad, decoder->options.fork, cache->seq_len, EXIT_INPUT, EXIT_PADS);
	return err ? err : go_on(decoder, false);
}

/* A held pad: a holder keeps it when we are killed. */

static int fail_holder(int err)
{
	return fail(EXIT_PADS, "%s%s", kvscratch_error(),
		    err == -ENOENT ? "; kvscratchctl hold NAME --write makes one" : "");
}

static int put_pad(const struct cache *cache, const char *holder)
{
	const char *name = CACHE_NAME;
	int fd = kvscratch_fd(cache->pad);
	int err = kvscratch_holder_put(holder, &name, &fd, 1);

	return err ? fail_holder(err) : 0;
}

static int take_over_held(struct decoder *decoder)
{
	const char *holder = decoder->options.hold;
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[KVSCRATCH_MAX_PASSED];
	int count = kvscratch_holder_get(holder, O_RDWR, names, sizeof(names), fds,
					 ARRAY_SIZE(fds));
	int err;

	if (count < 0)
		return fail_holder(count);
	if (!count) {
		err = begin_pad(decoder);
		return err ? err : put_pad(&decoder->cache, holder);
	}
	if (count == 1)
		return take_over(decoder, fds[0]);
	for (int i = 0; i < count; i++)
		close(fds[i]);
	return fail(EXIT_PADS, "%s: expected no pad or that of a cache, got %d pads", holder, count);
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
	if (options->handle)
		return take_over(decoder, options->handle);
	return options->hold ? take_over_held(decoder) : begin_pad(decoder);
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

/* A file position is shared by all who hold an open file: each client gets a file of its own. */
static bool pass_handle(const struct cache *cache, int sock)
{
	const char *name = CACHE_NAME;
	int fd = kvscratch_open_reader(cache->pad);
	int err;

	if (fd < 0) {
		fail_cache();
		return false;
	}
	err = kvscratch_send_handles(sock, &name, &fd, 1);
	if (err)
		fail(EXIT_SYSTEM, "a reader: %s", kvscratch_error());
	close(fd);
	return !err;
}

static void serve_client(struct server *server, const struct cache *cache, int sock)
{
	if (!pass_handle(cache, sock) || add_polled(server, sock, 0)) {
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

/* Drafts */

/* Runs of tokens whose latest occurrence is looked up; a single one says too little. */
#define LONGEST_RUN	3
#define SHORTEST_RUN	2

/*
 * What followed the last tokens when they came before, as often as it fits: a text that
 * repeats itself may go on with what is being drafted.
 */
static uint32_t look_up_draft(int32_t *tokens, uint32_t first, uint32_t most)
{
	for (uint32_t run = LONGEST_RUN; run >= SHORTEST_RUN; run--) {
		for (uint32_t end = first; end-- > run;) {
			if (memcmp(tokens + end - run, tokens + first - run,
				   run * sizeof(*tokens)))
				continue;
			for (uint32_t i = 0; i < most; i++)
				tokens[first + i] = tokens[end + i];
			return most;
		}
	}
	return 0;
}

/* Returns the token of position @pos that @logits give, or -1 at the end of the text. */
static int32_t choose_token(const struct decoder *decoder, const float *logits, uint32_t pos)
{
	int32_t token;

	if (pos < decoder->prompt_len)
		return decoder->prompt[pos];
	token = llama2_sample(&decoder->sampler, logits, decoder->tok.vocab_size, pos);
	return token == LLAMA2_BOS || token == LLAMA2_EOS ? -1 : token;
}

/* Has the draft model say it; it may have to hear first what came without it. */
static uint32_t model_draft(struct decoder *decoder, uint32_t first, uint32_t most)
{
	struct drafter *drafter = &decoder->drafter;
	int32_t *tokens = decoder->tokens;
	uint32_t count;

	for (count = 0; count < most && first + count <= drafter->cache.seq_len; count++) {
		uint32_t pos = first + count;

		for (; drafter->cache.len < pos; drafter->cache.len++)
			llama2_forward(&drafter->model, drafter->cache.rows,
				       tokens + drafter->cache.len, drafter->cache.len, 1);
		tokens[pos] = choose_token(decoder, drafter->model.logits, pos);
		if (tokens[pos] < 0)
			break;
	}
	return count;
}

/* What may come from position @first on; the prompt is known. Returns how many tokens. */
static uint32_t draft(struct decoder *decoder, uint32_t first)
{
	struct drafter *drafter = &decoder->drafter;
	uint32_t most = decoder->options.draft;
	uint32_t known = 0;
	uint32_t guessed;

	if (most > decoder->steps - first)
		most = decoder->steps - first;
	for (; known < most && first + known < decoder->prompt_len; known++)
		decoder->tokens[first + known] = decoder->prompt[first + known];
	if (known == most)
		return known;
	if (decoder->options.draft_model)
		guessed = model_draft(decoder, first + known, most - known);
	else
		guessed = look_up_draft(decoder->tokens, first + known, most - known);
	drafter->guessed += guessed;
	return known + guessed;
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

	if (!pos || decoder->silent)
		return 0;
	count = llama2_decode(&decoder->tok, tokens[pos - 1], tokens[pos], &byte, &bytes);
	return print_bytes(bytes, count);
}

static int write_logits(const struct decoder *decoder, size_t positions)
{
	size_t count = positions * decoder->model.shape.vocab_size;

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

/* Print what there is and, unless it is all that was asked for, bring the logits back. */
static int resume(struct decoder *decoder)
{
	struct cache *cache = &decoder->cache;
	uint32_t len = cache->len;
	int err = 0;

	for (uint32_t pos = 0; !err && pos < len && pos < decoder->steps; pos++)
		err = print_token(decoder, pos);
	if (err || !len || len >= decoder->steps)
		return err;
	set_put(cache, put_nothing);
	err = llama2_forward(&decoder->model, cache->rows, decoder->tokens + len - 1, len - 1, 1);
	set_put(cache, put_staged);
	decoder->forwards++;
	decoder->latest = decoder->model.logits;
	return err ? err : write_logits(decoder, 1);
}

static const float *logits_of(const struct decoder *decoder, uint32_t i)
{
	return decoder->model.logits + (size_t)i * decoder->model.shape.vocab_size;
}

/* How many of @count tokens from @pos on, the first one in any case, are those of the text */
static uint32_t accept_drafts(struct decoder *decoder, uint32_t pos, uint32_t count)
{
	uint32_t accepted = 1;

	for (; accepted < count; accepted++) {
		if (choose_token(decoder, logits_of(decoder, accepted - 1), pos + accepted) !=
		    decoder->tokens[pos + accepted])
			break;
		decoder->drafter.accepted += pos + accepted >= decoder->prompt_len;
	}
	return accepted;
}

/*
 * Run @token and what may follow it through the model, all staged, and commit what the text
 * goes on with.
 */
static int step(struct decoder *decoder, int32_t token)
{
	struct cache *cache = &decoder->cache;
	struct llama2_rows *rows = &token_store(cache)->rows;
	uint32_t pos = cache->len;
	int32_t *tokens = decoder->tokens + pos;
	uint32_t count, accepted;
	int err;

	*tokens = token;
	count = 1 + draft(decoder, pos + 1);
	err = llama2_forward(&decoder->model, cache->rows, tokens, pos, count);
	decoder->forwards += count;
	if (!err)
		err = rows->put(rows, pos, tokens, count);
	if (err)
		return err;
	accepted = accept_drafts(decoder, pos, count);
	decoder->latest = logits_of(decoder, accepted - 1);
	err = write_logits(decoder, accepted);
	if (!err)
		err = commit(cache, pos + accepted);
	/* what the draft model heard of the others does not count */
	if (decoder->drafter.cache.len > cache->len)
		decoder->drafter.cache.len = cache->len;
	for (uint32_t i = 0; !err && i < accepted; i++)
		err = print_token(decoder, pos + i);
	return err;
}

static int extend(struct decoder *decoder)
{
	int err = 0;

	while (!err && decoder->cache.len < decoder->steps) {
		int32_t token;

		if (decoder->server.path)
			err = serve_readers(&decoder->server, &decoder->cache, false);
		if (interrupted())
			err = EXIT_SYSTEM;
		if (err)
			break;
		token = choose_token(decoder, decoder->latest, decoder->cache.len);
		if (token < 0)
			break;
		err = step(decoder, token);
	}
	return err;
}

static int generate(struct decoder *decoder)
{
	int err = resume(decoder);

	if (!err)
		err = extend(decoder);
	return err ? err : print_bytes("\n", 1);
}

static double seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void print_stats(const struct decoder *decoder, uint32_t more)
{
	const struct cache *cache = &decoder->cache;
	struct kvscratch_pad_info info;
	uint64_t used = 0;
	uint64_t room = 0;

	for (unsigned int i = 0; i < cache->count; i++) {
		used += (uint64_t)cache->len * cache->stores[i].row_bytes;
		room += (uint64_t)cache->seq_len * cache->stores[i].row_bytes;
	}
	fprintf(stderr, "%" PRIu32 " tokens, %" PRIu32 " computed, %.1f tokens/s, %" PRIu64 " of %"
		PRIu64 " bytes in %u %s", cache->len, decoder->forwards,
		decoder->seconds > 0.0 ? more / decoder->seconds : 0.0, used, room,
		cache->count, decoder->options.heap ? "arrays" : "planes");
	if (cache->pad && !kvscratch_pad_info(cache->pad, &info) && info.shared_bytes)
		fprintf(stderr, ", %" PRIu64 " of them shared", (uint64_t)info.shared_bytes);
	if (decoder->options.draft)
		fprintf(stderr, ", %" PRIu32 " of %" PRIu32 " drafts accepted",
			decoder->drafter.accepted, decoder->drafter.guessed);
	fputc('\n', stderr);
}

/* Do the work, and say what it took. */
static int measure(struct decoder *decoder, int (*work)(struct decoder *))
{
	uint32_t len = decoder->cache.len;
	double start = seconds_now();
	int err = work(decoder);

	decoder->seconds = seconds_now() - start;
	if (!err && decoder->options.stats)
		print_stats(decoder, decoder->cache.len - len);
	return err;
}

static int decode(struct decoder *decoder)
{
	int err = 0;

	if (decoder->options.wait_reader)
		err = wait_for_reader(&decoder->server, &decoder->cache);
	return err ? err : measure(decoder, generate);
}

/* Branches: processes that go on with one prefix, each in a fork of the pad */

/**
 * struct branch - one of them
 * @pid: the process
 * @seed: what it chooses its tokens by
 * @text: a memfd: what it has to say comes when those before it are done
 */
struct branch {
	pid_t pid;
	uint64_t seed;
	int text;
};

/* The prompt, or what of it is not there yet */
static int compute_prefix(struct decoder *decoder)
{
	const uint32_t steps = decoder->steps;
	int err;

	decoder->steps = decoder->prompt_len;
	decoder->silent = true;
	err = extend(decoder);
	decoder->silent = false;
	decoder->steps = steps;
	return err;
}

static int continue_in_fork(struct decoder *decoder, uint64_t seed)
{
	struct cache *cache = &decoder->cache;
	struct kvscratch *prefix = cache->pad;
	int err;

	kvscratch_close(cache->writer);
	cache->writer = NULL;
	cache->pad = NULL;
	err = kvscratch_fork(&cache->pad, prefix, cache->len, cache->seq_len);
	if (err)
		return fail_cache();
	kvscratch_close(prefix);
	decoder->sampler.seed = seed;
	decoder->forwards = 0;
	err = go_on(decoder, false);
	return err ? err : decode(decoder);
}

/* A branch is of no use to anybody when we are gone. */
static int run_branch(struct decoder *decoder, const struct branch *branch, pid_t parent)
{
	static char line[BUFSIZ];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		return EXIT_SYSTEM;
	/* what several say at once stays in lines */
	setvbuf(stderr, line, _IOLBF, sizeof(line));
	if (dup2(branch->text, STDOUT_FILENO) < 0)
		return fail(EXIT_SYSTEM, "cannot keep the text: %s", strerror(errno));
	return continue_in_fork(decoder, branch->seed);
}

static int start_branch(struct decoder *decoder, struct branch *branch)
{
	const pid_t parent = getpid();

	branch->text = memfd_create("text", MFD_CLOEXEC);
	if (branch->text < 0)
		return fail(EXIT_SYSTEM, "cannot keep the text: %s", strerror(errno));
	branch->pid = fork();
	if (branch->pid < 0) {
		close(branch->text);
		return fail(EXIT_SYSTEM, "cannot start a process: %s", strerror(errno));
	}
	if (!branch->pid)
		_exit(run_branch(decoder, branch, parent));
	return 0;
}

/* All lines of it end, so that what follows is one of its own. */
static int print_text(int text)
{
	char bytes[BUFSIZ], last = '\n';
	ssize_t count;
	off_t at = 0;
	int err = 0;

	while (!err && (count = pread(text, bytes, sizeof(bytes), at)) > 0) {
		err = print_bytes(bytes, count);
		last = bytes[count - 1];
		at += count;
	}
	if (!err && count < 0)
		err = fail(EXIT_SYSTEM, "cannot read the text: %s", strerror(errno));
	return err || last == '\n' ? err : print_bytes("\n", 1);
}

/* Its text, whole or what there is of it */
static int finish_branch(const struct branch *branch)
{
	char heading[64];
	int status;
	int err;

	while (waitpid(branch->pid, &status, 0) < 0)
		if (errno != EINTR)
			return fail(EXIT_SYSTEM, "the branch of seed %" PRIu64 ": %s", branch->seed,
				    strerror(errno));
	snprintf(heading, sizeof(heading), "==> seed %" PRIu64 " <==\n", branch->seed);
	err = print_bytes(heading, strlen(heading));
	if (!err)
		err = print_text(branch->text);
	close(branch->text);
	if (!err && WIFSIGNALED(status))
		err = fail(EXIT_SYSTEM, "the branch of seed %" PRIu64 ": ended by signal %d",
			   branch->seed, WTERMSIG(status));
	return err ? err : WEXITSTATUS(status);
}

/* Returns what became of the first one that did not end well. */
static int decode_branches(struct decoder *decoder)
{
	struct branch branches[MAX_BRANCHES];
	uint32_t started = 0;
	int err = measure(decoder, compute_prefix);

	/* who ignores it, as we may have been started, is not told how they end */
	signal(SIGCHLD, SIG_DFL);
	while (!err && started < decoder->options.branches) {
		branches[started].seed = decoder->options.seed + started;
		err = start_branch(decoder, &branches[started]);
		started += !err;
	}
	for (uint32_t i = 0; i < started; i++) {
		int ended = finish_branch(&branches[i]);

		err = err ? err : ended;
	}
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
	int err = llama2_open(&decoder->model, checkpoint, 1 + decoder->options.draft);

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
	err = llama2_make_up(&decoder->model, 1 + options->draft);
	return err ? err : llama2_tokenizer_make_up(&decoder->tok);
}

static int open_draft_model(struct decoder *decoder)
{
	struct drafter *drafter = &decoder->drafter;
	const struct llama2_shape *shape = &drafter->model.shape;
	const char *path = decoder->options.draft_model;
	int err = llama2_open(&drafter->model, path, 1);

	if (err)
		return err;
	if (shape->vocab_size != decoder->model.shape.vocab_size)
		return fail(EXIT_INPUT, "%s: expected a vocabulary of %" PRIu32
			    " tokens, as the model has, got %" PRIu32, path,
			    decoder->model.shape.vocab_size, shape->vocab_size);
	err = init_cache(&drafter->cache, shape, KVSCRATCH_DTYPE_F32, false);
	return err ? err : allocate_arrays(&drafter->cache);
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
	if (decoder->options.prefill)
		decoder->steps = decoder->prompt_len;
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

	if (!err && decoder->options.draft_model)
		err = open_draft_model(decoder);
	if (!err)
		err = set_steps(decoder);
	if (!err)
		err = encode_prompt(decoder);
	if (!err)
		err = open_sampler(decoder);
	if (!err)
		err = open_cache(decoder);
	/* whoever finds the socket finds a cache */
	if (!err && decoder->options.socket)
		err = open_server(decoder);
	if (!err)
		err = open_logits(decoder);
	if (!err)
		err = decoder->options.branches ? decode_branches(decoder) : decode(decoder);
	return err ? err : close_logits(decoder);
}

static void clean_up(struct decoder *decoder)
{
	close_cache(&decoder->cache);
	close_cache(&decoder->drafter.cache);
	if (decoder->logits)
		fclose(decoder->logits);
	output_close(&decoder->output);
	free(decoder->prompt);
	free(decoder->tokens);
	llama2_sampler_close(&decoder->sampler);
	llama2_tokenizer_close(&decoder->tok);
	llama2_close(&decoder->model);
	llama2_close(&decoder->drafter.model);
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
