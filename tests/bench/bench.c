// SPDX-License-Identifier: GPL-2.0-only
/*
 * What kvscratch costs, and what its peers cost in the same loops.
 *
 * Meant for virtual time (tests/qemu/run --virtual-time), where a nanosecond is
 * an instruction and everything comes out the same each time; with --wall for a
 * real machine, whose caches and TLB instructions do not show.
 */
#include "bench.h"

#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <sys/utsname.h>

#define MAX_SAMPLES 10000
#define MAX_RECORDS 1024
#define MAX_LIMITS 64

bool wall_time;
double overhead;

static double samples[MAX_SAMPLES];
static unsigned int nr_samples;

/**
 * struct result - a figure that was taken
 * @figure: which
 * @ns: the median; NAN if nothing was timed
 * @min: the least
 * @p90: what nine of ten are not above
 * @p99: what 99 of 100 are not above
 * @counted: what was counted beside it, or NULL
 * @count: how many
 * @absent: why there is no such figure, or NULL
 */
struct result {
	struct figure figure;
	double ns, min, p90, p99;
	const char *counted;
	double count;
	const char *absent;
};

static struct result results[MAX_RECORDS];
static unsigned int nr_results;

/* What one pass over so many bytes takes */
static struct {
	size_t bytes;
	double ns;
} copies[MAX_LIMITS];

static unsigned int nr_copies;
static double call_ns;

void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("bench: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	exit(1);
}

bool module_loaded(void)
{
	return !access(KVSCRATCH_DEVICE, F_OK);
}

int new_pad(uint64_t max_seq_len, uint32_t row_bytes)
{
	return device_create(max_seq_len, row_bytes, KVSCRATCH_DTYPE_U8);
}

/* Samples and records */

void sample(double ns)
{
	CHECK(nr_samples < MAX_SAMPLES);
	samples[nr_samples++] = ns;
}

static int compare_samples(const void *a, const void *b)
{
	const double *left = a, *right = b;

	return (*left > *right) - (*left < *right);
}

static struct result *new_result(const struct figure *figure)
{
	CHECK(nr_results < MAX_RECORDS);
	results[nr_results].figure = *figure;
	return &results[nr_results++];
}

static double percentile(unsigned int percent)
{
	return samples[(nr_samples - 1) * percent / 100];
}

void record_counted(const struct figure *figure, const char *what, double count)
{
	struct result *result = new_result(figure);

	CHECK(nr_samples);
	qsort(samples, nr_samples, sizeof(samples[0]), compare_samples);
	result->ns = percentile(50);
	result->min = samples[0];
	result->p90 = percentile(90);
	result->p99 = percentile(99);
	result->counted = what;
	result->count = count;
	nr_samples = 0;
}

void record(const struct figure *figure)
{
	record_counted(figure, NULL, 0);
}

void record_count(const struct figure *figure, const char *what, double count)
{
	struct result *result = new_result(figure);

	result->ns = NAN;
	result->counted = what;
	result->count = count;
}

void record_absent(const struct figure *figure, const char *reason)
{
	struct result *result = new_result(figure);

	result->ns = NAN;
	result->absent = reason;
	nr_samples = 0;
}

unsigned int warm_up_runs(size_t bytes)
{
	return bytes > MIB ? 1 : 16;
}

unsigned int sample_runs(size_t bytes)
{
	size_t budget = wall_time ? 256 * MIB : 8 * MIB;
	size_t least = wall_time ? 25 : 3;
	size_t most = wall_time ? MAX_SAMPLES : 101;
	size_t runs = budget / (bytes + 1);

	return runs < least ? least : runs > most ? most : runs;
}

/* Appends */

static void run_peer(const struct peer *peer, const struct batch *batch)
{
	size_t touched = peer->copies_all ? CAPACITY_ROWS * batch->row_bytes : batch->bytes;
	unsigned int warm_up = warm_up_runs(touched);
	unsigned int runs = warm_up + sample_runs(touched);
	unsigned int room = peer->is_queue ? 1 : CAPACITY_ROWS / batch->rows;

	for (unsigned int i = 0, used = 0; i < runs; i++, used++) {
		uint64_t start, end;

		if (used == room) {
			if (peer->reset)
				peer->reset();
			used = 0;
		}
		start = now();
		peer->append(batch);
		end = now();
		if (i >= warm_up)
			sample((double)(end - start) - overhead);
	}
}

static bool measure_peer(const char *op, const struct peer *peer, const struct batch *batch)
{
	struct figure figure = {
		.op = op,
		.implementation = peer->name,
		.row_bytes = batch->row_bytes,
		.batch = batch->rows,
		.limit_bytes = batch->bytes,
	};
	const char *reason = NULL;

	if (peer->needs_module && !module_loaded())
		reason = "the module is not loaded";
	if (!reason && peer->setup)
		reason = peer->setup(batch);
	if (reason) {
		record_absent(&figure, reason);
		return false;
	}
	run_peer(peer, batch);
	if (peer->teardown)
		peer->teardown();
	record(&figure);
	return true;
}

static struct batch batch_of(const char *source, size_t row_bytes, unsigned int rows)
{
	return (struct batch){
		.rows = rows,
		.row_bytes = row_bytes,
		.bytes = rows * row_bytes,
		.source = source,
	};
}

static void measure_copy(const struct batch *batch)
{
	for (unsigned int i = 0; i < nr_copies; i++)
		if (copies[i].bytes == batch->bytes)
			return;
	CHECK(nr_copies < MAX_LIMITS);
	measure_peer("limit", &limit_copy, batch);
	copies[nr_copies].bytes = batch->bytes;
	copies[nr_copies++].ns = results[nr_results - 1].ns;
}

static double limit_of(size_t bytes)
{
	if (!bytes)
		return call_ns;
	for (unsigned int i = 0; i < nr_copies; i++)
		if (copies[i].bytes == bytes)
			return call_ns + copies[i].ns;
	return NAN;
}

static void nothing(const struct batch *batch)
{
	(void)batch;
}

static void measure_limits(const struct batch *batch)
{
	static const struct peer empty = { .name = "empty loop", .append = nothing };

	measure_peer("overhead", &empty, batch);
	overhead = results[nr_results - 1].ns;
	measure_peer("limit", &limit_call, batch);
	call_ns = results[nr_results - 1].ns;
}

static void measure_appends(void)
{
	static const size_t rows[] = {
		64, 128, 512, KIB, 1152, 2 * KIB, 4 * KIB, 8 * KIB, 56 * KIB, 128 * KIB,
	};
	static const unsigned int batches[] = { 1, 16, 256 };
	size_t most = rows[ARRAY_SIZE(rows) - 1] * CAPACITY_ROWS;
	char *source = new_memory(most);
	struct batch batch = batch_of(source, 1, 1);

	for (size_t i = 0; i < most; i++)
		source[i] = i * 7 + (i >> 8);
	measure_limits(&batch);
	for (unsigned int i = 0; i < nr_path_peers; i++) {
		/* the last one appends a page */
		batch = batch_of(source, i + 1 == nr_path_peers ? PAGE_BYTES : 1, 1);
		measure_copy(&batch);
		measure_peer("path", &path_peers[i], &batch);
	}
	for (size_t b = 0; b < ARRAY_SIZE(batches); b++) {
		for (size_t r = 0; r < ARRAY_SIZE(rows); r++) {
			batch = batch_of(source, rows[r], batches[b]);
			measure_copy(&batch);
			for (unsigned int i = 0; i < nr_append_peers; i++)
				measure_peer("append", &append_peers[i], &batch);
		}
	}
	batch = batch_of(source, MIB, 1);
	measure_copy(&batch);
	munmap(source, most);
}

/* Output */

/* A number, or null for what is none */
static void print_number(FILE *to, const char *name, double value)
{
	if (isfinite(value))
		fprintf(to, ", \"%s\": %.3f", name, value);
	else
		fprintf(to, ", \"%s\": null", name);
}

static void print_result(FILE *to, const struct result *result)
{
	const struct figure *figure = &result->figure;

	fprintf(to, "{\"op\": \"%s\", \"implementation\": \"%s\"", figure->op,
		figure->implementation);
	fprintf(to, ", \"row_bytes\": %zu, \"batch\": %u", figure->row_bytes, figure->batch);
	print_number(to, "ns", result->ns);
	print_number(to, "ratio", result->ns / limit_of(figure->limit_bytes));
	if (wall_time && isfinite(result->ns)) {
		print_number(to, "min", result->min);
		print_number(to, "p90", result->p90);
		print_number(to, "p99", result->p99);
	}
	if (result->counted)
		print_number(to, result->counted, result->count);
	if (result->absent)
		fprintf(to, ", \"absent\": \"%s\"", result->absent);
	fputc('}', to);
}

static void print_results(FILE *to)
{
	struct utsname system;

	uname(&system);
	fprintf(to, "{\n\"clock\": \"%s\",\n\"kernel\": \"%s\",\n\"records\": [\n",
		wall_time ? "wall" : "virtual", system.release);
	for (unsigned int i = 0; i < nr_results; i++) {
		print_result(to, &results[i]);
		fputs(i + 1 < nr_results ? ",\n" : "\n", to);
	}
	fputs("]\n}\n", to);
}

static void write_results(const char *path)
{
	FILE *to = path ? fopen(path, "w") : stdout;

	if (!to)
		die("%s: %s", path, strerror(errno));
	print_results(to);
	if (fclose(to))
		die("cannot write the results: %s", strerror(errno));
}

static const char help_text[] =
"Usage: bench [--wall] [--json FILE]\n"
"Measure what appends, views and a decoder cost with kvscratch and with its\n"
"peers; without the module the peers alone. tests/bench/report makes tables of it.\n"
"\n"
"  --wall       more runs, larger views and percentiles: for a real machine\n"
"  --json FILE  write the records there instead of to stdout\n";

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "wall", no_argument, NULL, 'w' },
		{ "json", required_argument, NULL, 'j' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	const char *json = NULL;
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 'w':
			wall_time = true;
			break;
		case 'j':
			json = optarg;
			break;
		case 'h':
			fputs(help_text, stdout);
			return 0;
		default:
			return 2;
		}
	}
	measure_appends();
	measure_tokens();
	measure_forks();
	measure_views();
	measure_decode();
	measure_lookups();
	write_results(json);
	return 0;
}
