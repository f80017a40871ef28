/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel counts: the charge of a cgroup, page faults, allocations.
 */
#ifndef TESTS_USER_METERS_H
#define TESTS_USER_METERS_H

#include "common.h"

#include <linux/perf_event.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define CGROUPS "/sys/fs/cgroup"

#define MIB (1ull << 20)

static inline void make_cgroup(char *path, size_t bytes, const char *name)
{
	snprintf(path, bytes, CGROUPS "/kvscratch-%s-%d", name, getpid());
	if (mkdir(path, 0755)) {
		perror(path);
		abort();
	}
}

static inline void join_cgroup(const char *path)
{
	char procs[96];

	snprintf(procs, sizeof(procs), "%s/cgroup.procs", path);
	write_file(procs, "0");
}

static inline long long cgroup_number(const char *cgroup, const char *file, const char *key)
{
	char path[96];

	snprintf(path, sizeof(path), "%s/%s", cgroup, file);
	return number_in_file(path, key);
}

/* The memory of the group may have so many bytes at most. */
static inline void limit_cgroup(const char *cgroup, uint64_t bytes)
{
	char path[96];

	snprintf(path, sizeof(path), "%s/memory.max", cgroup);
	write_number(path, bytes);
}

/* Of this process */
static inline long page_faults(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage))
		abort();
	return usage.ru_minflt + usage.ru_majflt;
}

static const char *const allocation_events[] = {
	"kmalloc", "kmem_cache_alloc", "mm_page_alloc",
	/* gone in newer kernels */
	"kmalloc_node", "kmem_cache_alloc_node",
};

#define REQUIRED_EVENTS 3

/**
 * struct allocation_meter - counts what this thread allocates in the kernel
 * @fds: one for each of the events, -1 for those that this kernel has not
 *
 * An interrupt that allocates counts as well: measure more than once.
 */
struct allocation_meter {
	int fds[ARRAY_SIZE(allocation_events)];
};

static inline void open_allocation_meter(struct __test_metadata *_metadata,
					 struct allocation_meter *meter)
{
	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++) {
		struct perf_event_attr attr = {
			.type = PERF_TYPE_TRACEPOINT,
			.size = sizeof(attr),
		};
		char path[80];
		long long id;

		snprintf(path, sizeof(path), "/sys/kernel/tracing/events/kmem/%s/id",
			 allocation_events[i]);
		id = number_in_file(path, NULL);
		meter->fds[i] = -1;
		if (id < 0 && i >= REQUIRED_EVENTS)
			continue;
		ASSERT_LE(0, id)
			TH_LOG("%s", path);
		attr.config = id;
		meter->fds[i] = syscall(SYS_perf_event_open, &attr, 0, -1, -1,
					PERF_FLAG_FD_CLOEXEC);
		ASSERT_LE(0, meter->fds[i]);
	}
}

static inline void close_allocation_meter(struct allocation_meter *meter)
{
	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		if (meter->fds[i] >= 0)
			close(meter->fds[i]);
}

static inline uint64_t count_event(int fd)
{
	uint64_t count = 0;

	if (fd >= 0 && read(fd, &count, sizeof(count)) != sizeof(count))
		abort();
	return count;
}

static inline uint64_t count_allocations(const struct allocation_meter *meter)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		sum += count_event(meter->fds[i]);
	return sum;
}

#endif
