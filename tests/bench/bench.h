/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of the benchmark share: the clock, the samples of one figure,
 * and the records that come out.
 *
 * Every figure is taken in the same way: the clock is read before and after one
 * run of what is measured, that is done again and again after a warm-up, and the
 * median counts. What an empty run takes is subtracted.
 */
#ifndef TESTS_BENCH_H
#define TESTS_BENCH_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../../tools/lib/device.h"

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define KIB ((size_t)1024)
#define MIB ((size_t)1024 * 1024)
#define PAGE_BYTES ((size_t)4096)

/* Every pad, file and buffer that rows are appended to has room for so many. */
#define CAPACITY_ROWS 256

/* In time that a clock on the wall shows, or in instructions */
extern bool wall_time;

void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...);

/* End the benchmark when a call that has to work did not. */
#define CHECK(condition) do { \
	if (!(condition)) \
		die("%s:%d: %s is false: %s", __FILE__, __LINE__, #condition, strerror(errno)); \
} while (0)

static inline uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/*
 * One pass over the bytes, the same for all who copy in user space: eight bytes
 * per instruction that is counted, as in the kernel's own copy.
 */
static inline void copy_bytes(void *to, const void *from, size_t bytes)
{
#ifdef __x86_64__
	size_t words = bytes / 8;

	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
	bytes %= 8;
	if (!bytes)
		return;
#endif
	memcpy(to, from, bytes);
	__asm__ volatile("" : : "r"(to) : "memory");
}

/* Pages that are there and belong to nobody else */
static inline void *new_memory(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

#define NO_LIMIT SIZE_MAX

/**
 * struct figure - one line of the table
 * @op: what is done: "append", "map", ...
 * @implementation: who does it
 * @row_bytes: bytes of a row, or 0
 * @batch: rows at once, or 0
 * @limit_bytes: the limit that it is compared with copies so many, or NO_LIMIT
 */
struct figure {
	const char *op;
	const char *implementation;
	size_t row_bytes;
	unsigned int batch;
	size_t limit_bytes;
};

/* Samples of what is measured next, in nanoseconds */
void sample(double ns);
/* Turn the samples since the last record into one. */
void record(const struct figure *figure);
/* The same, with a count of something beside it */
void record_counted(const struct figure *figure, const char *what, double count);
/* A count alone */
void record_count(const struct figure *figure, const char *what, double count);
/* A figure that this machine does not give, and why */
void record_absent(const struct figure *figure, const char *reason);

/* What an empty run of the loop takes: two readings of the clock and a call */
extern double overhead;

/* Runs before the first sample, and samples of something that touches @bytes */
unsigned int warm_up_runs(size_t bytes);
unsigned int sample_runs(size_t bytes);

/* Whether /dev/kvscratch is there */
bool module_loaded(void);
/* An open handle with a pad of rows of opaque bytes, or a negative errno */
int new_pad(uint64_t max_seq_len, uint32_t row_bytes);

/**
 * struct batch - what is appended at once
 * @rows: how many
 * @row_bytes: bytes of each
 * @bytes: of all together
 * @source: where they are, page-aligned and present
 */
struct batch {
	unsigned int rows;
	size_t row_bytes;
	size_t bytes;
	const char *source;
};

/**
 * struct peer - one way to append
 * @name: of the implementation
 * @is_queue: holds one batch, which has to be taken out before the next one
 * @copies_all: touches all CAPACITY_ROWS rows for each batch
 * @needs_module: is kvscratch
 * @setup: make room for CAPACITY_ROWS; returns 0 or a reason why that cannot be
 * @append: append one batch; this is what is measured
 * @reset: make it empty
 * @teardown: undo @setup
 *
 * One peer is set up at a time and keeps its state to itself.
 */
struct peer {
	const char *name;
	bool is_queue;
	bool copies_all;
	bool needs_module;
	const char *(*setup)(const struct batch *batch);
	void (*append)(const struct batch *batch);
	void (*reset)(void);
	void (*teardown)(void);
};

extern const struct peer limit_call, limit_copy;
extern const struct peer append_peers[];
extern const unsigned int nr_append_peers;
extern const struct peer path_peers[];
extern const unsigned int nr_path_peers;

void measure_tokens(void);
void measure_forks(void);
void measure_views(void);
void measure_decode(void);
void measure_lookups(void);

#endif
