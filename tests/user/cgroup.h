/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Memory cgroups, in the cgroup2 tree that the guest has.
 */
#ifndef TESTS_USER_CGROUP_H
#define TESTS_USER_CGROUP_H

#include "common.h"

#include <sys/stat.h>

#define CGROUPS "/sys/fs/cgroup"

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

/* Charges are given back in batches: look again, so often and no more. */
static inline bool charge_falls_below(const char *cgroup, long long bytes)
{
	for (int i = 0; i < 200000; i++) {
		if (cgroup_number(cgroup, "memory.current", NULL) < bytes)
			return true;
		sched_yield();
	}
	return false;
}

#endif
