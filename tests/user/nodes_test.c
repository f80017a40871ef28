// SPDX-License-Identifier: GPL-2.0-only
/*
 * A machine with two memory nodes: a pad keeps to those that its creator may have.
 */
#include "cgroup.h"
#include "common.h"

#define NODE "/sys/devices/system/node"

/* More than what comes and goes while the test runs */
#define SPILL_BYTES (24 * MIB)

static uint64_t node_free_bytes(int node)
{
	char path[64], key[32];

	snprintf(path, sizeof(path), NODE "/node%d/meminfo", node);
	snprintf(key, sizeof(key), "Node %d MemFree", node);
	return number_in_file(path, key) << 10;
}

/* 0 or -errno of a pad of @nr planes of @bytes, made of huge chunks or of single pages */
static int try_planes(uint32_t nr, uint64_t bytes)
{
	static struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
	int fd;

	for (uint32_t i = 0; i < nr; i++)
		planes[i] = (struct kvscratch_plane) { .dim = 4096, .dtype = KVSCRATCH_DTYPE_U8 };
	fd = device_create_planes(bytes / 4096, planes, nr);
	if (fd >= 0)
		close(fd);
	return fd < 0 ? fd : 0;
}

FIXTURE(nodes) {
	uint64_t saved_per_pad;
	uint64_t saved_total;
	char cgroup[64];
};

FIXTURE_SETUP(nodes) {
	char path[96];

	ASSERT_EQ(0, access(NODE "/node1", F_OK))
		TH_LOG("this needs two memory nodes");
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	set_limits(INT64_MAX, INT64_MAX);
	write_file(CGROUPS "/cgroup.subtree_control", "+cpuset");
	make_cgroup(self->cgroup, sizeof(self->cgroup), "node0");
	snprintf(path, sizeof(path), "%s/cpuset.mems", self->cgroup);
	write_file(path, "0");
}

FIXTURE_TEARDOWN(nodes) {
	EXPECT_EQ(0, rmdir(self->cgroup));
	write_file(CGROUPS "/cgroup.subtree_control", "-cpuset");
	set_limits(self->saved_per_pad, self->saved_total);
}

TEST_F_TIMEOUT(nodes, pads_keep_to_the_cpuset, TEST_SECONDS)
{
	/* more than there is in node 0, and the other one could give it */
	const uint64_t bytes = node_free_bytes(0) + SPILL_BYTES;
	struct child child;

	ASSERT_LT(2 * SPILL_BYTES, node_free_bytes(1));
	if (start_child(&child)) {
		join_cgroup(self->cgroup);
		CHILD_CHECK(try_planes(1, bytes) == -ENOMEM);
		CHILD_CHECK(try_planes(bytes / MIB, MIB) == -ENOMEM);
		/* and there is room for what fits */
		CHILD_CHECK(!try_planes(1, 16 * MIB));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	/* who may have both gets it */
	EXPECT_EQ(0, try_planes(1, bytes));
	EXPECT_EQ(0, try_planes(bytes / MIB, MIB));
}

TEST_HARNESS_MAIN
