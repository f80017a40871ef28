/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel itself counts, its allocations above all, on every kernel.
 */
#ifndef TESTS_USER_EVENTS_H
#define TESTS_USER_EVENTS_H

#include "common.h"

#include <linux/perf_event.h>

/*
 * Count a tracepoint for task @pid, 0 for the caller; with @period each so many are
 * an overflow. Returns a descriptor, or -1 when the kernel has no such tracepoint.
 */
static inline int open_tracepoint(const char *system, const char *name, pid_t pid, uint64_t period)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_TRACEPOINT,
		.size = sizeof(attr),
		.sample_period = period,
	};
	char path[80];
	long long id;

	snprintf(path, sizeof(path), "/sys/kernel/tracing/events/%s/%s/id", system, name);
	id = number_in_file(path, NULL);
	if (id < 0)
		return -1;
	attr.config = id;
	return syscall(SYS_perf_event_open, &attr, pid, -1, -1, PERF_FLAG_FD_CLOEXEC);
}

/* One of kmem */
static inline int open_event(const char *name, pid_t pid, uint64_t period)
{
	return open_tracepoint("kmem", name, pid, period);
}

static inline uint64_t count_event(int fd)
{
	uint64_t count = 0;

	if (fd >= 0 && read(fd, &count, sizeof(count)) != sizeof(count))
		abort();
	return count;
}

#endif
