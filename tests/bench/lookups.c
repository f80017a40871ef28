// SPDX-License-Identifier: GPL-2.0-only
/*
 * How often an append looks a vmalloc area up, which takes a lock that the whole
 * kernel shares: find_vmap_area() is counted with a kprobe.
 */
#include "bench.h"

#ifdef __x86_64__
#include <asm/ldt.h>
#endif

#define TRACING "/sys/kernel/tracing/"
#define EVENT "kvscratch_bench/lookup"
#define APPENDS 1000
#define OP "find_vmap_area() calls"

static bool write_text(const char *path, int flags, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC | flags);
	bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

	if (fd >= 0)
		close(fd);
	return written;
}

static bool start_counting(void)
{
	return write_text(TRACING "kprobe_events", O_APPEND, "p:" EVENT " find_vmap_area") &&
	       write_text(TRACING "events/" EVENT "/enable", 0, "1");
}

static void stop_counting(void)
{
	write_text(TRACING "events/" EVENT "/enable", 0, "0");
	write_text(TRACING "kprobe_events", O_APPEND, "-:" EVENT);
}

static unsigned long calls_so_far(void)
{
	FILE *profile = fopen(TRACING "kprobe_profile", "r");
	unsigned long calls = 0;
	char line[256];

	CHECK(profile);
	while (fgets(line, sizeof(line), profile))
		if (sscanf(line, " lookup %lu", &calls) == 1)
			break;
	fclose(profile);
	return calls;
}

static void record_calls(const char *implementation, double calls, unsigned int runs)
{
	struct figure figure = {
		.op = OP,
		.implementation = implementation,
		.limit_bytes = NO_LIMIT,
	};

	record_count(&figure, "calls", calls / runs);
}

static void count_for_appends(const char *implementation, size_t row_bytes)
{
	char *row = new_memory(row_bytes);
	int fd = new_pad(APPENDS, row_bytes);
	unsigned long calls;

	CHECK(fd >= 0);
	calls = calls_so_far();
	for (int i = 0; i < APPENDS; i++)
		CHECK(!device_append(fd, row, row_bytes));
	record_calls(implementation, calls_so_far() - calls, APPENDS);
	close(fd);
	munmap(row, row_bytes);
}

#ifdef __x86_64__
/*
 * A copy that looks the area up, so that a count of zero means something: an LDT
 * of more than a page lies in vmalloc memory, and reading it is one copy of it.
 */
static void count_for_ldt(void)
{
	struct figure figure = { .op = OP, .implementation = "read of a large LDT" };
	struct user_desc entry = { .entry_number = 1000, .limit = 1, .seg_32bit = 1 };
	static char ldt[LDT_ENTRIES * LDT_ENTRY_SIZE];
	unsigned long calls;

	if (syscall(SYS_modify_ldt, 1, &entry, sizeof(entry))) {
		record_absent(&figure, strerror(errno));
		return;
	}
	calls = calls_so_far();
	for (int i = 0; i < APPENDS; i++)
		CHECK(syscall(SYS_modify_ldt, 0, ldt, sizeof(ldt)) > 0);
	record_calls(figure.implementation, calls_so_far() - calls, APPENDS);
}
#else
static void count_for_ldt(void)
{
}
#endif

void measure_lookups(void)
{
	static const struct figure figure = { .op = OP, .implementation = "append of 128 B" };

	if (!module_loaded()) {
		record_absent(&figure, "the module is not loaded");
		return;
	}
	if (!start_counting()) {
		record_absent(&figure, "this kernel or user has no kprobe events");
		return;
	}
	count_for_appends("append of 128 B", 128);
	count_for_appends("append of 8 KiB", 8 * KIB);
	count_for_ldt();
	stop_counting();
}
