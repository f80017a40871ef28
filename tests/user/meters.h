/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Page faults and allocations of the caller, as the kernel counts them.
 */
#ifndef TESTS_USER_METERS_H
#define TESTS_USER_METERS_H

#include "events.h"

#include <sys/resource.h>

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
		meter->fds[i] = open_event(allocation_events[i], 0, 0);
		ASSERT_TRUE(meter->fds[i] >= 0 || i >= REQUIRED_EVENTS)
			TH_LOG("no event kmem:%s", allocation_events[i]);
	}
}

static inline void close_allocation_meter(struct allocation_meter *meter)
{
	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		if (meter->fds[i] >= 0)
			close(meter->fds[i]);
}

static inline uint64_t count_allocations(const struct allocation_meter *meter)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		sum += count_event(meter->fds[i]);
	return sum;
}

#endif
