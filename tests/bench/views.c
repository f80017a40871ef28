// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a reader pays: for the length, for a view, for the first touch of its
 * pages and for reading all of it. And what a pad costs before the first row.
 * Figures of views are per MiB.
 */
#include "bench.h"

#include <sys/resource.h>
#include <sys/stat.h>

/* A page is a row, and sixteen heads. */
#define ROW_BYTES PAGE_BYTES
#define HEAD_BYTES 256

#define LOADS 1000

static struct figure per_mib(const char *op, const char *implementation)
{
	return (struct figure){ .op = op, .implementation = implementation, .limit_bytes = MIB };
}

static double mib(size_t bytes)
{
	return (double)bytes / MIB;
}

/* Memory that a view can show */
struct source {
	const char *name;
	int flags;
	/* have all of it there, as who maps a pad does */
	bool populate;
	bool needs_module;
	int (*open)(size_t bytes);
};

static int open_pad(size_t bytes)
{
	return new_pad(bytes / ROW_BYTES, ROW_BYTES);
}

static int open_memfd(size_t bytes)
{
	int fd = memfd_create("bench", MFD_CLOEXEC);

	CHECK(fd >= 0);
	CHECK(!fallocate(fd, 0, 0, bytes));
	return fd;
}

static const struct source sources[] = {
	{ .name = "kvscratch", .populate = true, .needs_module = true, .open = open_pad },
	{ .name = "kvscratch, by faults", .needs_module = true, .open = open_pad },
	{ .name = "memfd", .open = open_memfd },
	{ .name = "memfd, MAP_POPULATE", .flags = MAP_POPULATE, .open = open_memfd },
};

/* A descriptor of @bytes, or -1 after a record of why there is none */
static int open_source(const struct source *source, size_t bytes, const struct figure *figure)
{
	int fd;

	if (source->needs_module && !module_loaded()) {
		record_absent(figure, "the module is not loaded");
		return -1;
	}
	fd = source->open(bytes);
	if (fd < 0)
		record_absent(figure, kvscratch_strerror(fd));
	return fd < 0 ? -1 : fd;
}

static const char *map(int fd, size_t bytes, int flags, bool populate)
{
	const char *at = mmap(NULL, bytes, PROT_READ, MAP_SHARED | flags, fd, 0);

	CHECK(at != MAP_FAILED);
	CHECK(!populate || !madvise((void *)at, bytes, MADV_POPULATE_READ));
	return at;
}

/* Length */

/* Many in a loop: one alone is less than the clock can tell. */
static inline __attribute__((always_inline))
double loads_ns(const struct kvscratch_status *status, bool load)
{
	uint64_t start = now();

	for (int i = 0; i < LOADS; i++) {
		if (load) {
			uint64_t state = kvscratch_word_load(&status->state);

			__asm__ volatile("" : : "r"(state));
		} else {
			__asm__ volatile("");
		}
	}
	return (double)(now() - start) - overhead;
}

static void measure_len_of_pad(void)
{
	static const struct figure of_page = { .op = "len", .implementation = "status page" };
	static const struct figure of_info = { .op = "len", .implementation = "INFO" };
	struct kvscratch_info info;
	struct kvscratch_view view;
	int fd = open_source(&sources[0], MIB, &of_page);

	if (fd < 0) {
		record_absent(&of_info, "the module is not loaded");
		return;
	}
	CHECK(!device_map(fd, &view));
	for (unsigned int i = 0; i < sample_runs(0); i++)
		sample((loads_ns(view.status, true) - loads_ns(view.status, false)) / LOADS);
	record(&of_page);
	for (unsigned int i = 0; i < sample_runs(0); i++) {
		uint64_t start = now();

		device_info(fd, &info);
		sample((double)(now() - start) - overhead);
	}
	record(&of_info);
	device_unmap(&view);
	close(fd);
}

static void measure_len_of_memfd(void)
{
	static const struct figure of_fstat = { .op = "len", .implementation = "fstat of a memfd" };
	static const struct figure of_lseek = { .op = "len", .implementation = "lseek in a memfd" };
	int fd = open_memfd(MIB);
	struct stat status;

	for (unsigned int i = 0; i < sample_runs(0); i++) {
		uint64_t start = now();

		fstat(fd, &status);
		sample((double)(now() - start) - overhead);
	}
	record(&of_fstat);
	for (unsigned int i = 0; i < sample_runs(0); i++) {
		uint64_t start = now();

		lseek(fd, 0, SEEK_END);
		sample((double)(now() - start) - overhead);
	}
	record(&of_lseek);
	close(fd);
}

/* Views */

static long minor_faults(void)
{
	struct rusage usage;

	CHECK(!getrusage(RUSAGE_SELF, &usage));
	return usage.ru_minflt;
}

static void touch(const char *at, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += PAGE_BYTES)
		(void)*(volatile const char *)(at + i);
}

/* One sample of each step: map, touch every page, unmap */
enum { STEP_MAP, STEP_TOUCH, STEP_BOTH, STEP_UNMAP, NR_STEPS };

static long time_view(int fd, size_t bytes, const struct source *source, double *ns)
{
	uint64_t begin, mapped, untouched, touched, end;
	const char *view;
	long faults;

	begin = now();
	view = map(fd, bytes, source->flags, source->populate);
	mapped = now();
	faults = minor_faults();
	untouched = now();
	touch(view, bytes);
	touched = now();
	faults = minor_faults() - faults;
	ns[STEP_TOUCH] = (double)(touched - untouched) - overhead;
	ns[STEP_MAP] = (double)(mapped - begin) - overhead;
	ns[STEP_BOTH] = ns[STEP_MAP] + ns[STEP_TOUCH];
	begin = now();
	munmap((void *)view, bytes);
	end = now();
	ns[STEP_UNMAP] = (double)(end - begin) - overhead;
	return faults;
}

#define MAX_VIEW_RUNS 32

static void measure_view(const struct source *source, size_t bytes)
{
	static const char *const steps[] = { "map", "first touch", "map and touch", "unmap" };
	static double ns[MAX_VIEW_RUNS][NR_STEPS];
	struct figure figure = per_mib(steps[0], source->name);
	unsigned int runs = sample_runs(bytes);
	int fd = open_source(source, bytes, &figure);
	long faults = 0;

	if (fd < 0)
		return;
	CHECK(runs < MAX_VIEW_RUNS);
	for (unsigned int i = 0; i <= runs; i++)
		faults = time_view(fd, bytes, source, ns[i]);
	close(fd);
	for (int step = 0; step < NR_STEPS; step++) {
		/* the first run warms up */
		for (unsigned int i = 1; i <= runs; i++)
			sample(ns[i][step] / mib(bytes));
		figure.op = steps[step];
		if (step == STEP_TOUCH)
			record_counted(&figure, "faults_per_mib", faults / mib(bytes));
		else
			record(&figure);
	}
}

/* Before the first row */

static void measure_create(const struct source *source, size_t bytes)
{
	struct figure create = per_mib("create", source->name);
	struct figure free = per_mib("free", source->name);
	double freed[MAX_VIEW_RUNS];
	unsigned int runs = sample_runs(bytes);

	CHECK(runs < MAX_VIEW_RUNS);
	for (unsigned int i = 0; i <= runs; i++) {
		uint64_t start = now(), created;
		int fd = open_source(source, bytes, &create);

		if (fd < 0)
			return;
		created = now();
		close(fd);
		freed[i] = (double)(now() - created) - overhead;
		if (i)
			sample(((double)(created - start) - overhead) / mib(bytes));
	}
	record(&create);
	for (unsigned int i = 1; i <= runs; i++)
		sample(freed[i] / mib(bytes));
	record(&free);
}

static void measure_create_private(size_t bytes)
{
	struct figure figure = per_mib("create", "private memory, MAP_POPULATE");

	for (unsigned int i = 0; i <= sample_runs(bytes); i++) {
		uint64_t start = now();
		void *at = new_memory(bytes);
		double ns = (double)(now() - start) - overhead;

		munmap(at, bytes);
		if (i)
			sample(ns / mib(bytes));
	}
	record(&figure);
}

/* Reading all of it */

static uint64_t sum(const char *at, size_t bytes)
{
	const uint64_t *words = (const uint64_t *)at;
	uint64_t total = 0;

	for (size_t i = 0; i < bytes / sizeof(*words); i++)
		total += words[i];
	return total;
}

/* Row after row, or one head of every row, then the next head, as attention reads */
static uint64_t scan(const char *at, size_t bytes, size_t piece)
{
	uint64_t total = 0;

	for (size_t head = 0; head < ROW_BYTES; head += piece)
		for (size_t row = 0; row < bytes; row += ROW_BYTES)
			total += sum(at + row + head, piece);
	return total;
}

static void measure_scan(const char *name, const char *at, size_t bytes)
{
	static const struct {
		const char *op;
		size_t piece;
	} ways[] = { { "scan by rows", ROW_BYTES }, { "scan by heads", HEAD_BYTES } };

	for (size_t way = 0; way < ARRAY_SIZE(ways); way++) {
		struct figure figure = per_mib(ways[way].op, name);

		/* the first run warms up */
		for (unsigned int i = 0; i <= (wall_time ? 11 : 3); i++) {
			uint64_t start = now();
			uint64_t total = scan(at, bytes, ways[way].piece);
			double ns = (double)(now() - start) - overhead;

			__asm__ volatile("" : : "r"(total));
			if (i)
				sample(ns / mib(bytes));
		}
		record(&figure);
	}
}

static void fill(char *at, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += sizeof(uint64_t))
		*(uint64_t *)(at + i) = i;
}

/* What does not fit would be swapped, or somebody be killed for it. */
static bool memory_fits(const struct figure *figure, size_t bytes)
{
	bool fits = bytes / PAGE_BYTES < (size_t)sysconf(_SC_AVPHYS_PAGES) / 2;

	if (!fits)
		record_absent(figure, "less than twice as much memory is free");
	return fits;
}

static void measure_scan_of_pad(size_t bytes)
{
	struct figure figure = per_mib("scan by rows", "kvscratch view");
	char *rows;
	int fd;

	if (!memory_fits(&figure, bytes))
		return;
	fd = open_source(&sources[0], bytes, &figure);
	if (fd < 0)
		return;
	rows = new_memory(MIB);
	fill(rows, MIB);
	for (size_t done = 0; done < bytes; done += MIB)
		CHECK(!device_append(fd, rows, MIB));
	munmap(rows, MIB);
	rows = (char *)map(fd, bytes, 0, true);
	measure_scan("kvscratch view", rows, bytes);
	munmap(rows, bytes);
	close(fd);
}

static void measure_scan_of_memory(const char *name, size_t bytes, int advice)
{
	struct figure figure = per_mib("scan by rows", name);
	char *at;

	if (!memory_fits(&figure, bytes))
		return;
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED);
	/* a kernel without huge pages does not know the advice, and has none */
	madvise(at, bytes, advice);
	fill(at, bytes);
	measure_scan(name, at, bytes);
	munmap(at, bytes);
}

void measure_views(void)
{
	size_t view_bytes = wall_time ? 64 * MIB : 16 * MIB;
	size_t scan_bytes = wall_time ? 1024 * MIB : 16 * MIB;

	measure_len_of_pad();
	measure_len_of_memfd();
	for (size_t i = 0; i < ARRAY_SIZE(sources); i++)
		measure_view(&sources[i], view_bytes);
	/* how a memfd is mapped makes no difference to how it is made */
	measure_create(&sources[0], view_bytes);
	measure_create(&sources[2], view_bytes);
	measure_create_private(view_bytes);
	measure_scan_of_pad(scan_bytes);
	measure_scan_of_memory("private memory", scan_bytes, MADV_NOHUGEPAGE);
	if (wall_time)
		measure_scan_of_memory("private memory, huge pages", scan_bytes, MADV_HUGEPAGE);
}
