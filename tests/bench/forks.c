// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it costs to go on from a prefix that another pad has: a fork of 64 planes, as the keys
 * and values of 32 layers, at a row that ends no page and no chunk.
 */
#include "bench.h"

#include <sys/wait.h>

#define PLANES 64
#define PLANE_BYTES (2 * KIB)
#define TOKEN_BYTES (PLANES * PLANE_BYTES)
#define BOUNDARY 5001
/* Rows that fill chunks: what a fork of them takes more than one of fewer is their number's */
#define CHUNK_ROWS (KVSCRATCH_CHUNK_BYTES / PLANE_BYTES)
#define WHOLE_CHUNKS 4
/* Processes that go on from one prefix, and how far; it ends no page and no chunk */
#define PROCESSES 8
#define SHARED_ROWS (2 * CHUNK_ROWS + 1)
#define TAIL_ROWS 63

static int new_prefix(const char *token)
{
	struct kvscratch_plane planes[PLANES];
	int pad;

	for (int i = 0; i < PLANES; i++)
		planes[i] = (struct kvscratch_plane){
			.dim = PLANE_BYTES, .dtype = KVSCRATCH_DTYPE_U8,
		};
	pad = device_create_planes(5 * CHUNK_ROWS, planes, PLANES);
	CHECK(pad >= 0);
	for (int row = 0; row < BOUNDARY; row++)
		CHECK(!device_append(pad, token, TOKEN_BYTES));
	return pad;
}

/* Forks that have room for the rows they share alone: no memory of a tail */
static void measure_fork(const struct figure *figure, int pad, uint64_t rows)
{
	struct kvscratch_pad_info info;

	for (int i = 0; i < 5; i++) {
		uint64_t start = now();
		int fd = device_fork(pad, rows, 0, rows);
		uint64_t end = now();

		CHECK(fd >= 0);
		if (i)
			sample((double)(end - start) - overhead);
		CHECK(!device_pad_info(fd, &info));
		close(fd);
	}
	record_counted(figure, "own_bytes_per_plane", (double)info.allocated_bytes / PLANES);
}

static void measure_view_of_fork(int pad)
{
	static const struct figure figure = {
		.op = "fork, map, populate", .implementation = "kvscratch", .limit_bytes = NO_LIMIT,
	};

	for (int i = 0; i < 3; i++) {
		struct kvscratch_plane planes[PLANES];
		struct kvscratch_pad_info info;
		uint64_t start = now();
		int fd = device_fork(pad, BOUNDARY, 0, BOUNDARY);
		char *view;

		CHECK(fd >= 0 && !device_pad_info(fd, &info));
		CHECK(device_planes(fd, 0, planes, PLANES) == PLANES);
		view = mmap(NULL, info.mapping_bytes, PROT_READ, MAP_SHARED, fd, 0);
		CHECK(view != MAP_FAILED);
		for (int plane = 0; plane < PLANES; plane++)
			CHECK(!madvise(view + planes[plane].offset, BOUNDARY * PLANE_BYTES,
				       MADV_POPULATE_READ));
		sample((double)(now() - start) - overhead);
		munmap(view, info.mapping_bytes);
		close(fd);
	}
	record(&figure);
}

/* A row, and back to where it was: what one does who forgets a row instead of forking */
static void measure_truncate(int pad, const char *token)
{
	static const struct figure figure = {
		.op = "truncate", .implementation = "kvscratch", .limit_bytes = NO_LIMIT,
	};

	for (int i = 0; i < 5; i++) {
		uint64_t start;

		CHECK(!device_append(pad, token, TOKEN_BYTES));
		start = now();
		CHECK(!device_truncate(pad, BOUNDARY, 0));
		sample((double)(now() - start) - overhead);
	}
	record(&figure);
}

static double bytes_total(void)
{
	FILE *file = fopen("/sys/module/kvscratch/parameters/bytes_total", "re");
	double bytes;

	CHECK(file && fscanf(file, "%lf", &bytes) == 1);
	fclose(file);
	return bytes;
}

/* Until nobody has the other end of @stop */
static _Noreturn void go_on(int pad, const char *token, int ready, int stop)
{
	int fd = device_fork(pad, SHARED_ROWS, 0, SHARED_ROWS + TAIL_ROWS);
	char byte = 0;

	CHECK(fd >= 0);
	for (int i = 0; i < TAIL_ROWS; i++)
		CHECK(!device_append(fd, token, TOKEN_BYTES));
	CHECK(write(ready, &byte, 1) == 1 && !read(stop, &byte, 1));
	_exit(0);
}

/* What the processes take together, of the prefix once and the rows that each has alone */
static void count_memory(int pad, const char *token)
{
	static const struct figure figure = {
		.op = "memory", .implementation = "8 processes", .limit_bytes = NO_LIMIT,
	};
	const double prefix = (double)SHARED_ROWS * TOKEN_BYTES;
	const double tails = (double)PROCESSES * TAIL_ROWS * TOKEN_BYTES;
	const double before = bytes_total();
	int ready[2], stop[2];
	char byte;

	CHECK(!pipe(ready) && !pipe(stop));
	for (int i = 0; i < PROCESSES; i++) {
		pid_t pid = fork();

		CHECK(pid >= 0);
		if (pid)
			continue;
		close(stop[1]);
		go_on(pad, token, ready[1], stop[0]);
	}
	for (int i = 0; i < PROCESSES; i++)
		CHECK(read(ready[0], &byte, 1) == 1);
	record_count(&figure, "of_prefix_and_tails",
		     (prefix + bytes_total() - before) / (prefix + tails));
	close(stop[1]);
	for (int i = 0; i < PROCESSES; i++)
		CHECK(wait(NULL) > 0);
	close(stop[0]);
	close(ready[0]);
	close(ready[1]);
}

static void measure_copy_of_prefix(const char *token)
{
	static const struct figure figure = {
		.op = "fork", .implementation = "copying the prefix", .limit_bytes = NO_LIMIT,
	};
	const size_t bytes = BOUNDARY * PLANE_BYTES;
	char *from = new_memory(bytes), *to = new_memory(bytes);

	memset(from, *token, bytes);
	for (int i = 0; i < 3; i++) {
		uint64_t start = now();

		/* one plane after the other: this one is as good as 64 */
		for (int plane = 0; plane < PLANES; plane++)
			copy_bytes(to, from, bytes);
		sample((double)(now() - start) - overhead);
	}
	record(&figure);
	munmap(from, bytes);
	munmap(to, bytes);
}

void measure_forks(void)
{
	static const struct figure at_boundary = {
		.op = "fork", .implementation = "kvscratch", .limit_bytes = NO_LIMIT,
	};
	static const struct figure of_one_chunk = {
		.op = "fork", .implementation = "of one chunk a plane", .limit_bytes = NO_LIMIT,
	};
	static const struct figure of_chunks = {
		.op = "fork", .implementation = "of four chunks a plane", .limit_bytes = NO_LIMIT,
	};
	char *token = new_memory(TOKEN_BYTES);
	int pad;

	memset(token, 1, TOKEN_BYTES);
	measure_copy_of_prefix(token);
	if (!module_loaded()) {
		record_absent(&at_boundary, "the module is not loaded");
		munmap(token, TOKEN_BYTES);
		return;
	}
	pad = new_prefix(token);
	measure_fork(&at_boundary, pad, BOUNDARY);
	measure_fork(&of_one_chunk, pad, CHUNK_ROWS);
	measure_fork(&of_chunks, pad, WHOLE_CHUNKS * CHUNK_ROWS);
	measure_view_of_fork(pad);
	count_memory(pad, token);
	measure_truncate(pad, token);
	close(pad);
	munmap(token, TOKEN_BYTES);
}
