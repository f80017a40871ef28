// SPDX-License-Identifier: GPL-2.0-only
/*
 * The whole: what kvdecode takes per token with its cache in pads and on the
 * heap, and how much of that its staging and committing are. The model has the shape of
 * stories260K and pseudo-random weights.
 */
#include "bench.h"
#include "../checkpoint.h"

#include <limits.h>
#include <sys/wait.h>

/* Compared with each other, not with a limit */
#define FIGURE(_implementation) { \
	.op = "decode", \
	.implementation = _implementation, \
	.limit_bytes = NO_LIMIT, \
}

/* K and V of every layer, and the tokens */
#define PLANES (2 * CHECKPOINT_LAYERS + 1)

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
	if (status || forwards != CHECKPOINT_SEQ_LEN)
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

/* A token: rows of K and V of every layer staged, then the token, and all of it committed */
static void measure_commit_of_token(void)
{
	static const struct figure figure = FIGURE("pads, staging and commit");
	static const float row[CHECKPOINT_KV_DIM];
	struct kvscratch_plane planes[PLANES] = { 0 };
	int fd, writer;

	for (int i = 0; i < PLANES; i++) {
		bool tokens = i + 1 == PLANES;

		planes[i].dim = tokens ? 1 : CHECKPOINT_KV_DIM;
		planes[i].dtype = tokens ? KVSCRATCH_DTYPE_I32 : KVSCRATCH_DTYPE_F32;
	}
	fd = device_create_planes(CHECKPOINT_SEQ_LEN, planes, PLANES);
	CHECK(fd >= 0);
	writer = device_open_writer(fd, 0);
	CHECK(writer >= 0);
	for (int pos = 0; pos < CHECKPOINT_SEQ_LEN; pos++) {
		uint64_t start = now();

		for (int i = 0; i < PLANES; i++)
			device_stage(writer, i, pos, row, 1);
		device_commit(writer, pos + 1);
		sample((double)(now() - start) - overhead);
	}
	CHECK(device_commit(writer, CHECKPOINT_SEQ_LEN) == 0);
	close(writer);
	close(fd);
	record(&figure);
}

void measure_decode(void)
{
	static const struct figure pads = FIGURE("pads");

	snprintf(checkpoint, sizeof(checkpoint), "/tmp/kvscratch-bench-%d.bin", getpid());
	snprintf(tokenizer, sizeof(tokenizer), "/tmp/kvscratch-bench-tok-%d.bin", getpid());
	write_checkpoint(checkpoint, 1);
	write_tokenizer(tokenizer);
	measure_kvdecode("heap");
	if (module_loaded()) {
		measure_kvdecode("pads");
		measure_commit_of_token();
	} else {
		record_absent(&pads, "the module is not loaded");
	}
	unlink(checkpoint);
	unlink(tokenizer);
}
