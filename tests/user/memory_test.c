// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory: who pays for a pad, what the limits refuse, and that failures and
 * races leave nothing behind.
 */
#include "cgroup.h"
#include "common.h"

/* The module's limits, restored after each test */

FIXTURE(memory) {
	uint64_t saved_per_pad;
	uint64_t saved_total;
	/* cgroups, empty and without limits */
	char creator[64];
	char other[64];
};

FIXTURE_SETUP(memory) {
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	make_cgroup(self->creator, sizeof(self->creator), "creator");
	make_cgroup(self->other, sizeof(self->other), "other");
}

FIXTURE_TEARDOWN(memory) {
	write_number(MAX_PER_PAD, self->saved_per_pad);
	write_number(MAX_TOTAL, self->saved_total);
	EXPECT_EQ(0, rmdir(self->creator));
	EXPECT_EQ(0, rmdir(self->other));
}

/* A new pad that is gone at once; 0 or -errno */
static int try_pad(uint64_t max_seq_len, uint32_t row_bytes)
{
	int fd = new_pad(max_seq_len, row_bytes);

	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

/* Who pays */

TEST_F_TIMEOUT(memory, is_charged_to_the_creator, TEST_SECONDS)
{
	const long long bytes = 16 * MIB;
	struct child child;
	long long before, during;

	set_limits(64 * MIB, 64 * MIB);
	if (start_child(&child)) {
		int fd = device_open(O_RDWR);

		join_cgroup(self->creator);
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		CHILD_CHECK(!device_create(fd, bytes / 4096, 4096, KVSCRATCH_DTYPE_U8));
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		close(fd);
		CHILD_CHECK(say(child.line));
		hear(child.line);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	before = cgroup_number(self->creator, "memory.current", NULL);
	ASSERT_LE(0, before);
	ASSERT_TRUE(say(child.line));
	ASSERT_TRUE(hear(child.line));
	during = cgroup_number(self->creator, "memory.current", NULL);
	EXPECT_LE(before + bytes, during);
	EXPECT_GT(before + bytes + 2 * (long long)MIB, during);
	ASSERT_TRUE(say(child.line));
	ASSERT_TRUE(hear(child.line));
	EXPECT_TRUE(charge_falls_below(self->creator, before + 2 * MIB));
	EXPECT_EQ(0, end_child(&child));
}

TEST_F_TIMEOUT(memory, full_cgroup_refuses_and_kills_nobody, TEST_SECONDS)
{
	struct child sibling, child;

	set_limits(128 * MIB, 128 * MIB);
	limit_cgroup(self->creator, 32 * MIB);
	if (start_child(&sibling)) {
		join_cgroup(self->creator);
		CHILD_CHECK(say(sibling.line));
		hear(sibling.line);
		_exit(0);
	}
	ASSERT_TRUE(hear(sibling.line));
	if (start_child(&child)) {
		int fd = device_open(O_RDWR);

		join_cgroup(self->creator);
		CHILD_CHECK(device_create(fd, 64 * MIB / 4096, 4096, KVSCRATCH_DTYPE_U8) ==
			    -ENOMEM);
		/* the handle is still good for what fits */
		CHILD_CHECK(!device_create(fd, 4 * MIB / 4096, 4096, KVSCRATCH_DTYPE_U8));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(0, end_child(&sibling));
	/* the cgroup refused, not the machine */
	EXPECT_LT(0, cgroup_number(self->creator, "memory.events", "max"));
	EXPECT_EQ(0, cgroup_number(self->creator, "memory.events", "oom_kill"));
	EXPECT_TRUE(charge_falls_below(self->creator, 2 * MIB));
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(memory, failed_creates_give_everything_back, TEST_SECONDS)
{
	struct child child;

	set_limits(300 * MIB, 300 * MIB);
	limit_cgroup(self->creator, 6 * MIB);
	if (start_child(&child)) {
		join_cgroup(self->creator);
		/* often enough that lost page arrays (512 KiB each) would show */
		for (int i = 0; i < 8; i++)
			CHILD_CHECK(try_pad(256 * MIB / 4096, 4096) == -ENOMEM);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(charge_falls_below(self->creator, 2 * MIB));
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(memory, charge_stays_with_the_creator, TEST_SECONDS)
{
	const long long bytes = 16 * MIB;
	const char *name = "k";
	struct child creator, holder;
	int fd;

	set_limits(64 * MIB, 64 * MIB);
	if (start_child(&holder)) {
		char text[16];

		join_cgroup(self->other);
		CHILD_CHECK(kvscratch_receive_handles(holder.line, text, sizeof(text), &fd, 1) ==
			    1);
		CHILD_CHECK(say(holder.line));
		CHILD_CHECK(hear(holder.line));
		CHILD_CHECK(!append_rows(fd, 4096, 0, 1));
		_exit(0);
	}
	if (start_child(&creator)) {
		join_cgroup(self->creator);
		fd = new_pad(bytes / 4096, 4096);
		CHILD_CHECK(fd >= 0);
		/* our end of the holder's line was inherited */
		CHILD_CHECK(!kvscratch_send_handles(holder.line, &name, &fd, 1));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&creator));
	ASSERT_TRUE(hear(holder.line));
	EXPECT_LE(bytes, cgroup_number(self->creator, "memory.current", NULL));
	EXPECT_GT(bytes / 2, cgroup_number(self->other, "memory.current", NULL));
	ASSERT_TRUE(say(holder.line));
	EXPECT_EQ(0, end_child(&holder));
	EXPECT_TRUE(charge_falls_below(self->creator, bytes / 2));
	EXPECT_EQ(0, nothing_accounted());
}

/* Limits */

TEST_F_TIMEOUT(memory, limit_of_one_pad_is_exact, TEST_SECONDS)
{
	const uint64_t page = page_bytes();
	/* the page array of the last one is the first to take a second page */
	const uint64_t data_pages[] = { 1, 6, page / 8 - 1, page / 8 };

	for (size_t i = 0; i < ARRAY_SIZE(data_pages); i++) {
		uint64_t rows = data_pages[i] * page;
		uint64_t limit = charged_bytes(rows, 1);

		set_limits(limit, 1 << 30);
		EXPECT_EQ(0, try_pad(rows, 1))
			TH_LOG("%llu rows", (unsigned long long)rows);
		EXPECT_EQ(-EDQUOT, try_pad(rows + 1, 1))
			TH_LOG("%llu rows", (unsigned long long)rows);
		set_limits(limit - 1, 1 << 30);
		EXPECT_EQ(-EDQUOT, try_pad(rows, 1))
			TH_LOG("%llu rows", (unsigned long long)rows);
	}
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(memory, limit_of_all_pads_is_exact, TEST_SECONDS)
{
	const uint64_t one = charged_bytes(3, 5000);
	const uint64_t two = charged_bytes(7, 4096);
	int fds[2];

	set_limits(1 << 30, one + two);
	fds[0] = new_pad(3, 5000);
	ASSERT_LE(0, fds[0]);
	fds[1] = new_pad(7, 4096);
	ASSERT_LE(0, fds[1]);
	EXPECT_EQ(-EDQUOT, try_pad(1, 1));
	close(fds[1]);

	set_limits(1 << 30, one + two - 1);
	EXPECT_EQ(-EDQUOT, try_pad(7, 4096));
	close(fds[0]);
	EXPECT_EQ(0, try_pad(7, 4096));
	EXPECT_EQ(0, nothing_accounted());
}

/* A lower limit takes nothing away; it refuses the next pad. */
TEST_F_TIMEOUT(memory, limits_are_read_at_create, TEST_SECONDS)
{
	const uint64_t one = charged_bytes(8, 4096);
	int fds[3];

	set_limits(one, 3 * one);
	for (int i = 0; i < 3; i++) {
		fds[i] = new_pad(8, 4096);
		ASSERT_LE(0, fds[i]);
	}
	/* less than is taken already, but enough for one alone */
	set_limits(one, one);
	EXPECT_EQ(-EDQUOT, try_pad(8, 4096));
	set_limits(one, 0);
	EXPECT_EQ(-EDQUOT, try_pad(1, 1));
	set_limits(0, 3 * one);
	EXPECT_EQ(-EDQUOT, try_pad(1, 1));
	for (int i = 0; i < 3; i++) {
		EXPECT_EQ(0, append_rows(fds[i], 4096, 0, 8));
		close(fds[i]);
	}
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(memory, impossible_pads_fail_at_once, TEST_SECONDS)
{
	const struct {
		uint64_t rows;
		uint32_t row_bytes;
	} possible_in_the_format[] = {
		{ KVSCRATCH_MAX_SEQ_LEN, KVSCRATCH_MAX_ROW_BYTES },
		{ KVSCRATCH_MAX_SEQ_LEN, 1 << 16 },
		{ KVSCRATCH_MAX_SEQ_LEN, 4096 },
		{ KVSCRATCH_MAX_SEQ_LEN, 256 },
	};

	EXPECT_EQ(-EINVAL, try_pad(1ull << 60, 1));
	EXPECT_EQ(-EINVAL, try_pad(UINT64_MAX, 1));
	EXPECT_EQ(-EINVAL, try_pad(UINT64_MAX, KVSCRATCH_MAX_ROW_BYTES));
	for (size_t i = 0; i < ARRAY_SIZE(possible_in_the_format); i++) {
		uint64_t rows = possible_in_the_format[i].rows;
		uint32_t row_bytes = possible_in_the_format[i].row_bytes;

		set_limits(self->saved_per_pad, self->saved_total);
		EXPECT_EQ(-EDQUOT, try_pad(rows, row_bytes))
			TH_LOG("%u bytes a row", row_bytes);
		/* no limits but those of the machine */
		set_limits(INT64_MAX, INT64_MAX);
		EXPECT_EQ(-ENOMEM, try_pad(rows, row_bytes))
			TH_LOG("%u bytes a row", row_bytes);
		EXPECT_EQ(0, nothing_accounted());
	}
}

TEST_F_TIMEOUT(memory, fdinfo_tells_the_bytes, TEST_SECONDS)
{
	const struct {
		uint64_t rows;
		uint32_t row_bytes;
	} shapes[] = { { 1, 1 }, { 3, 4097 }, { 511, 4096 }, { 512, 4096 } };

	for (size_t i = 0; i < ARRAY_SIZE(shapes); i++) {
		char path[40];
		int fd = new_pad(shapes[i].rows, shapes[i].row_bytes);

		ASSERT_LE(0, fd);
		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
		EXPECT_EQ(charged_bytes(shapes[i].rows, shapes[i].row_bytes),
			  number_in_file(path, "bytes"));
		close(fd);
	}
}

TEST_F_TIMEOUT(memory, flood_ends_at_the_limit, TEST_SECONDS)
{
	const uint64_t one = charged_bytes(MIB / 4096, 4096);
	int fds[33];
	int count = 0;

	set_limits(one, 32 * one + one / 2);
	do
		fds[count] = new_pad(MIB / 4096, 4096);
	while (fds[count] >= 0 && ++count < (int)ARRAY_SIZE(fds));
	EXPECT_EQ(32, count);
	EXPECT_EQ(-EDQUOT, fds[32]);
	while (count--)
		close(fds[count]);
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(memory, flood_ends_at_the_cgroup, TEST_SECONDS)
{
	struct child child;

	set_limits(256 * MIB, 256 * MIB);
	limit_cgroup(self->creator, 32 * MIB);
	if (start_child(&child)) {
		int fd, count = -1;

		join_cgroup(self->creator);
		/* the descriptors go with the process */
		do {
			fd = new_pad(MIB / 4096, 4096);
			count++;
		} while (fd >= 0);
		CHILD_CHECK(fd == -ENOMEM);
		CHILD_CHECK(count >= 16 && count < 32);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(0, cgroup_number(self->creator, "memory.events", "oom_kill"));
	EXPECT_TRUE(charge_falls_below(self->creator, 2 * MIB));
	EXPECT_EQ(0, nothing_accounted());
}

/* Races for one handle, which parent and child share as it is one open file */

/* CREATE of @rows, or ATTACH to @source when that is 0 */
static int bind_handle(int fd, uint64_t rows, int source)
{
	return rows ? device_create(fd, rows, 4096, KVSCRATCH_DTYPE_U8) :
		      device_attach(fd, source);
}

static void meet(unsigned int *arrived)
{
	__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL);
	while (__atomic_load_n(arrived, __ATOMIC_ACQUIRE) < 2)
		sched_yield();
}

TEST_F_TIMEOUT(memory, one_of_two_binds_a_handle, TEST_SECONDS)
{
	unsigned int *arrived = mmap(NULL, sizeof(*arrived), PROT_READ | PROT_WRITE,
				     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int sources[2];

	ASSERT_NE(MAP_FAILED, (void *)arrived);
	set_limits(64 * MIB, 64 * MIB);
	sources[0] = new_pad(1, 4096);
	sources[1] = new_pad(2, 4096);
	ASSERT_LE(0, sources[0]);
	ASSERT_LE(0, sources[1]);
	for (unsigned int round = 0; round < 300; round++) {
		/* two CREATEs, one and one, two ATTACHes */
		const uint64_t rows[2] = { round % 3 < 2 ? 64 : 0, round % 3 < 1 ? 65 : 0 };
		int fd = device_open(O_RDWR);
		struct kvscratch_info info;
		struct child child;
		int results[2];
		int winner;

		ASSERT_LE(0, fd);
		*arrived = 0;
		if (start_child(&child)) {
			meet(arrived);
			_exit(-bind_handle(fd, rows[1], sources[1]));
		}
		meet(arrived);
		results[0] = bind_handle(fd, rows[0], sources[0]);
		results[1] = -end_child(&child);
		winner = results[0] ? 1 : 0;
		ASSERT_EQ(0, results[winner]);
		ASSERT_EQ(-EBUSY, results[!winner]);
		ASSERT_EQ(0, device_info(fd, &info));
		ASSERT_EQ(rows[winner] ? rows[winner] : (uint64_t)winner + 1, info.max_seq_len);
		close(fd);
	}
	close(sources[0]);
	close(sources[1]);
	munmap(arrived, sizeof(*arrived));
	EXPECT_EQ(0, nothing_accounted());
}

/*
 * The same without luck: a child's call is stopped where it reads its argument,
 * after it has seen an unbound handle, until another call is through.
 */

TEST_F_TIMEOUT(memory, loser_of_a_race_leaves_nothing, TEST_SECONDS)
{
	const size_t page = page_bytes();
	const char *name = "stopped";
	uint8_t *filler = calloc(1, page);
	int probe = syscall(SYS_userfaultfd, O_CLOEXEC);

	if (probe < 0 && errno == ENOSYS)
		SKIP(return, "the kernel has no userfaultfd");
	ASSERT_LE(0, probe);
	close(probe);
	ASSERT_NE(NULL, filler);
	set_limits(MIB, MIB);
	/* bit 0: the stopped call is an ATTACH; bit 1: the other one is */
	for (unsigned int kind = 0; kind < 4; kind++) {
		int source = new_pad(1, 4096);
		int fd = device_open(O_RDWR);
		uint8_t *arg = mmap(NULL, page, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		const struct kvscratch_attach attach = {
			.size = sizeof(attach),
			.src_fd = source,
		};
		const struct kvscratch_create create = {
			.size = sizeof(create),
			.max_seq_len = 3,
			.dim = 4096,
			.dtype = KVSCRATCH_DTYPE_U8,
		};
		struct uffdio_copy copy = {
			.dst = (uintptr_t)arg,
			.src = (uintptr_t)filler,
			.len = page,
		};
		struct kvscratch_info info;
		struct child child;
		char text[16];
		int faults;

		ASSERT_LE(0, source);
		ASSERT_LE(0, fd);
		ASSERT_NE(MAP_FAILED, (void *)arg);
		if (kind & 1)
			memcpy(filler, &attach, sizeof(attach));
		else
			memcpy(filler, &create, sizeof(create));
		if (start_child(&child)) {
			unsigned int cmd = kind & 1 ? KVSCRATCH_IOC_ATTACH : KVSCRATCH_IOC_CREATE;

			faults = stop_at(arg, page);
			CHILD_CHECK(!kvscratch_send_handles(child.line, &name, &faults, 1));
			_exit(ioctl(fd, cmd, arg) ? errno : 0);
		}
		ASSERT_EQ(1, kvscratch_receive_handles(child.line, text, sizeof(text), &faults, 1));
		/* blocks until the call has faulted */
		ASSERT_TRUE(await_stop(faults));
		EXPECT_EQ(0, bind_handle(fd, kind & 2 ? 0 : 2, source));
		ASSERT_EQ(0, ioctl(faults, UFFDIO_COPY, &copy));
		EXPECT_EQ(EBUSY, end_child(&child))
			TH_LOG("kind %u", kind);
		EXPECT_EQ(0, device_info(fd, &info));
		EXPECT_EQ(kind & 2 ? 1 : 2, info.max_seq_len);

		close(faults);
		munmap(arg, page);
		close(fd);
		close(source);
		EXPECT_EQ(0, nothing_accounted())
			TH_LOG("kind %u", kind);
		set_limits(MIB, MIB);
	}
	free(filler);
}

TEST_HARNESS_MAIN
