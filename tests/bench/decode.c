// SPDX-License-Identifier: GPL-2.0-only
/*
 * The whole: what kvdecode takes per token with its cache in pads and on the
 * heap, and how much of that its appends are. The model has the shape of
 * stories260K and pseudo-random weights.
 */
#include "bench.h"

#include <endian.h>
#include <limits.h>
#include <sys/wait.h>

#define DIM 64
#define HIDDEN_DIM 172
#define LAYERS 5
#define HEADS 8
#define KV_HEADS 4
#define VOCAB_SIZE 512
#define SEQ_LEN 512
#define HEAD_SIZE (DIM / HEADS)
#define KV_DIM (HEAD_SIZE * KV_HEADS)
#define BYTE_TOKENS 256
#define FIRST_BYTE 3

/* Compared with each other, not with a limit */
#define FIGURE(_implementation) { \
	.op = "decode", \
	.implementation = _implementation, \
	.limit_bytes = NO_LIMIT, \
}

/* K and V of every layer, and the tokens */
#define PADS (2 * LAYERS + 1)

static FILE *create_file(const char *path)
{
	FILE *to = fopen(path, "w");

	CHECK(to);
	return to;
}

static void put_i32(FILE *to, int32_t value)
{
	uint32_t word = htole32(value);

	CHECK(fwrite(&word, sizeof(word), 1, to) == 1);
}

static void put_f32(FILE *to, float value)
{
	int32_t word;

	memcpy(&word, &value, sizeof(word));
	put_i32(to, word);
}

/* From -0.125 to 0.125 */
static void put_weights(FILE *to, size_t count)
{
	static uint32_t state = 1;

	while (count--) {
		state = state * 1664525 + 1013904223;
		put_f32(to, ((int32_t)(state >> 8) - (1 << 23)) * 0x1p-26f);
	}
}

static void put_constants(FILE *to, size_t count, float value)
{
	while (count--)
		put_f32(to, value);
}

/* llama2.c's legacy format, tensors in their order, the classifier is the embedding */
static void write_checkpoint(const char *path)
{
	static const int32_t header[] = {
		DIM, HIDDEN_DIM, LAYERS, HEADS, KV_HEADS, VOCAB_SIZE, SEQ_LEN,
	};
	FILE *to = create_file(path);

	for (size_t i = 0; i < ARRAY_SIZE(header); i++)
		put_i32(to, header[i]);
	/* the tokens that would end the text are never the most likely ones */
	put_constants(to, FIRST_BYTE * DIM, 0);
	put_weights(to, (VOCAB_SIZE - FIRST_BYTE) * DIM);
	put_constants(to, LAYERS * DIM, 1);
	/* wq, wk, wv, wo */
	put_weights(to, LAYERS * DIM * (DIM + KV_DIM + KV_DIM + DIM));
	put_constants(to, LAYERS * DIM, 1);
	put_weights(to, 3 * LAYERS * DIM * HIDDEN_DIM);
	put_constants(to, DIM, 1);
	/* frequencies, which nobody reads */
	put_constants(to, SEQ_LEN * HEAD_SIZE, 0);
	CHECK(!fclose(to));
}

static void write_tokenizer(const char *path)
{
	FILE *to = create_file(path);

	put_i32(to, 8);
	for (int id = 0; id < VOCAB_SIZE; id++) {
		char piece[16];

		if (id >= FIRST_BYTE && id < FIRST_BYTE + BYTE_TOKENS)
			snprintf(piece, sizeof(piece), "<0x%02X>", id - FIRST_BYTE);
		else
			snprintf(piece, sizeof(piece), " t%d", id);
		put_f32(to, 0);
		put_i32(to, strlen(piece));
		CHECK(fputs(piece, to) >= 0);
	}
	CHECK(!fclose(to));
}

static char checkpoint[64], tokenizer[64];

/* It lies beside this program. */
static void exec_kvdecode(const char *cache)
{
	char path[PATH_MAX + 16] = "";

	if (readlink("/proc/self/exe", path, PATH_MAX) < 0)
		return;
	strcpy(strrchr(path, '/'), "/kvdecode");
	execl(path, path, "--cache", cache, "--checkpoint", checkpoint, "--tokenizer", tokenizer,
	      "--stats", NULL);
	perror(path);
}

/* What --stats says: it measures from the first token to the last. */
static double decode_ns_per_token(const char *cache)
{
	double tokens_per_second;
	char line[256] = "";
	int ends[2], status;
	unsigned int forwards;
	pid_t pid;
	FILE *from;

	CHECK(!pipe(ends));
	pid = fork();
	CHECK(pid >= 0);
	if (!pid) {
		int null = open("/dev/null", O_RDWR);

		dup2(null, STDIN_FILENO);
		dup2(null, STDOUT_FILENO);
		dup2(ends[1], STDERR_FILENO);
		close(ends[0]);
		exec_kvdecode(cache);
		_exit(127);
	}
	close(ends[1]);
	from = fdopen(ends[0], "r");
	CHECK(from);
	if (!fgets(line, sizeof(line), from) ||
	    sscanf(line, "%*u tokens, %u computed, %lf tokens/s", &forwards,
		   &tokens_per_second) != 2)
		die("kvdecode --cache %s said: %s", cache, line);
	fclose(from);
	CHECK(waitpid(pid, &status, 0) == pid);
	if (status || forwards != SEQ_LEN)
		die("kvdecode --cache %s: status %d after %u tokens", cache, status, forwards);
	return 1e9 / tokens_per_second;
}

static void measure_kvdecode(const char *cache)
{
	struct figure figure = FIGURE(cache);

	for (unsigned int i = 0; i < (wall_time ? 9 : 1); i++)
		sample(decode_ns_per_token(cache));
	record(&figure);
}

/* The appends of one token: a row of K and V of every layer, and the token */
static void measure_appends_of_token(void)
{
	static const struct figure figure = FIGURE("pads, appends");
	static const float row[KV_DIM];
	int fds[PADS];

	for (int i = 0; i < PADS; i++) {
		fds[i] = new_pad(SEQ_LEN, i + 1 < PADS ? sizeof(row) : sizeof(int32_t));
		CHECK(fds[i] >= 0);
	}
	for (int pos = 0; pos < SEQ_LEN; pos++) {
		uint64_t start = now();

		for (int i = 0; i + 1 < PADS; i++)
			device_append(fds[i], row, sizeof(row));
		device_append(fds[PADS - 1], row, sizeof(int32_t));
		sample((double)(now() - start) - overhead);
	}
	for (int i = 0; i < PADS; i++)
		close(fds[i]);
	record(&figure);
}

void measure_decode(void)
{
	static const struct figure pads = FIGURE("pads");

	snprintf(checkpoint, sizeof(checkpoint), "/tmp/kvscratch-bench-%d.bin", getpid());
	snprintf(tokenizer, sizeof(tokenizer), "/tmp/kvscratch-bench-tok-%d.bin", getpid());
	write_checkpoint(checkpoint);
	write_tokenizer(tokenizer);
	measure_kvdecode("heap");
	if (module_loaded()) {
		measure_kvdecode("pads");
		measure_appends_of_token();
	} else {
		record_absent(&pads, "the module is not loaded");
	}
	unlink(checkpoint);
	unlink(tokenizer);
}
