// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory: who pays for a pad, what the limits refuse, that failures and races
 * leave nothing behind, and that appends allocate nothing.
 */
#include "meters.h"

#include <sys/epoll.h>
#include <sys/inotify.h>

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

static void set_limits(uint64_t per_pad, uint64_t total)
{
	write_number(MAX_PER_PAD, per_pad);
	write_number(MAX_TOTAL, total);
}

/* 0 when a new pad of one page is all that is accounted; leaves other limits */
static int nothing_accounted(void)
{
	int fd;

	set_limits(charged_bytes(1, 1), charged_bytes(1, 1));
	fd = new_pad(1, 1);
	if (fd < 0)
		return fd;
	close(fd);
	return 0;
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

/* Charges are given back in batches: look again, so often and no more. */
static bool charge_falls_below(const char *cgroup, long long bytes)
{
	for (int i = 0; i < 200000; i++) {
		if (cgroup_number(cgroup, "memory.current", NULL) < bytes)
			return true;
		sched_yield();
	}
	return false;
}

/* Who pays */

TEST_F_TIMEOUT(memory, is_charged_to_the_creator, TEST_SECONDS)
{
	const long long bytes = 16 * MIB;
	struct child child;
	long long before, during;

	set_limits(64 * MIB, 64 * MIB);
	if (start_child(&child)) {
		int fd = kvscratch_open(O_RDWR);

		join_cgroup(self->creator);
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		CHILD_CHECK(!kvscratch_create(fd, bytes / 4096, 4096, KVSCRATCH_DTYPE_U8));
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
		int fd = kvscratch_open(O_RDWR);

		join_cgroup(self->creator);
		CHILD_CHECK(kvscratch_create(fd, 64 * MIB / 4096, 4096, KVSCRATCH_DTYPE_U8) ==
			    -ENOMEM);
		/* the handle is still good for what fits */
		CHILD_CHECK(!kvscratch_create(fd, 4 * MIB / 4096, 4096, KVSCRATCH_DTYPE_U8));
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

/*
 * Kill a child inside a CREATE of @rows pages. True when the signal came in the
 * middle and ended the allocation there: the group never had all the bytes.
 */
static bool kill_inside_create(struct __test_metadata *_metadata, uint64_t rows, int attempt)
{
	const long long bytes = rows * page_bytes();
	struct child child;
	char cgroup[64], name[16];
	long long peak;
	char byte;
	bool finished;

	snprintf(name, sizeof(name), "killed%d", attempt);
	make_cgroup(cgroup, sizeof(cgroup), name);
	if (start_child(&child)) {
		join_cgroup(cgroup);
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(new_pad(rows, page_bytes()) >= 0);
		say(child.line);
		hear(child.line);
		_exit(1);
	}
	EXPECT_TRUE(hear(child.line));
	do
		finished = recv(child.line, &byte, 1, MSG_DONTWAIT) >= 0;
	while (!finished &&
	       cgroup_number(cgroup, "memory.current", NULL) < 8 * (long long)MIB);
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, wait_for(child.pid));
	finished = finished || recv(child.line, &byte, 1, MSG_DONTWAIT) > 0;
	close(child.line);
	peak = cgroup_number(cgroup, "memory.peak", NULL);
	EXPECT_LT(0, peak);
	EXPECT_TRUE(charge_falls_below(cgroup, 8 * MIB));
	EXPECT_EQ(0, rmdir(cgroup));
	return !finished && peak < bytes;
}

TEST_F_TIMEOUT(memory, fatal_signal_ends_create, TEST_SECONDS)
{
	const long long available = number_in_file("/proc/meminfo", "MemAvailable");
	const uint64_t rows = available * 1024 / 10 * 6 / page_bytes();
	const uint64_t bytes = charged_bytes(rows, page_bytes());
	int attempts = 0;
	bool hit;

	ASSERT_LT(0, available);
	set_limits(bytes, bytes);
	do
		hit = kill_inside_create(_metadata, rows, attempts);
	while (!hit && ++attempts < 20);
	EXPECT_TRUE(hit);
	/* as large a pad, while the limits have room for one and RAM as well */
	EXPECT_EQ(0, try_pad(rows, page_bytes()));
	EXPECT_EQ(0, nothing_accounted());
}

/* Races for one handle, which parent and child share as it is one open file */

/* CREATE of @rows, or ATTACH to @source when that is 0 */
static int bind_handle(int fd, uint64_t rows, int source)
{
	return rows ? kvscratch_create(fd, rows, 4096, KVSCRATCH_DTYPE_U8) :
		      kvscratch_attach(fd, source);
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
		int fd = kvscratch_open(O_RDWR);
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
		ASSERT_EQ(0, kvscratch_info(fd, &info));
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
		int fd = kvscratch_open(O_RDWR);
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
		EXPECT_EQ(0, kvscratch_info(fd, &info));
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

/* Fault injection, where the kernel has it */

#define FAILSLAB "/sys/kernel/debug/failslab/"
#define FAIL_PAGE_ALLOC "/sys/kernel/debug/fail_page_alloc/"

/* By default the kernel spares what may sleep, high memory and single pages. */
static const struct {
	const char *path;
	const char *value;
} fault_settings[] = {
	{ FAILSLAB "ignore-gfp-wait", "N" },
	{ FAILSLAB "cache-filter", "N" },
	{ FAILSLAB "verbose", "0" },
	{ FAILSLAB "task-filter", "Y" },
	{ FAILSLAB "probability", "100" },
	{ FAILSLAB "interval", "1" },
	{ FAILSLAB "space", "0" },
	{ FAILSLAB "times", "-1" },
	{ FAIL_PAGE_ALLOC "ignore-gfp-wait", "N" },
	{ FAIL_PAGE_ALLOC "ignore-gfp-highmem", "N" },
	{ FAIL_PAGE_ALLOC "min-order", "0" },
	{ FAIL_PAGE_ALLOC "verbose", "0" },
	{ FAIL_PAGE_ALLOC "task-filter", "Y" },
	{ FAIL_PAGE_ALLOC "probability", "100" },
	{ FAIL_PAGE_ALLOC "interval", "1" },
	{ FAIL_PAGE_ALLOC "space", "0" },
	{ FAIL_PAGE_ALLOC "times", "-1" },
};

#define FAULT_ROWS 2048
#define FAULT_ROW_BYTES 4096
/* the calls of the sweep use small pads, but a view wants page tables */
#define SWEEP_ROWS 16

FIXTURE(faults) {
	bool available;
	char saved[ARRAY_SIZE(fault_settings)][24];
	uint64_t saved_per_pad;
	uint64_t saved_total;
	int fail_nth;
	int make_it_fail;
	/* a pad with room, and what the sweep works on */
	int pad;
	int handle;
	struct kvscratch_view view;
};

static void read_setting(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, text, bytes - 1);

	if (got < 0) {
		perror(path);
		abort();
	}
	text[got] = '\0';
	close(fd);
}

FIXTURE_SETUP(faults) {
	self->fail_nth = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
	self->available = self->fail_nth >= 0;
	if (!self->available)
		return;
	self->make_it_fail = open("/proc/thread-self/make-it-fail", O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, self->make_it_fail);
	for (size_t i = 0; i < ARRAY_SIZE(fault_settings); i++) {
		read_setting(fault_settings[i].path, self->saved[i], sizeof(self->saved[i]));
		write_file(fault_settings[i].path, fault_settings[i].value);
	}
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	/* room for the pad and one of the sweep's */
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) +
			    charged_bytes(SWEEP_ROWS, FAULT_ROW_BYTES));
	self->pad = new_pad(FAULT_ROWS, FAULT_ROW_BYTES);
	ASSERT_LE(0, self->pad);
	/* a first touch of code, stack or data would be an allocation too */
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
}

FIXTURE_TEARDOWN(faults) {
	if (!self->available)
		return;
	if (pwrite(self->fail_nth, "0", 1, 0) != 1 || pwrite(self->make_it_fail, "0", 1, 0) != 1)
		abort();
	close(self->pad);
	/* probability off before the filter, in reverse */
	for (size_t i = ARRAY_SIZE(fault_settings); i--;)
		write_file(fault_settings[i].path, self->saved[i]);
	EXPECT_EQ(0, nothing_accounted());
	set_limits(self->saved_per_pad, self->saved_total);
	close(self->make_it_fail);
	close(self->fail_nth);
}

#define NEED_FAULT_INJECTION() do { \
	if (!self->available) \
		SKIP(return, "the kernel has no fail-nth"); \
} while (0)

static void arm(FIXTURE_DATA(faults) *self, unsigned int n)
{
	char text[12];
	int length = snprintf(text, sizeof(text), "%u", n);

	if (pwrite(self->fail_nth, text, length, 0) != length)
		abort();
}

/* How many allocations were still to come before the one to fail */
static int disarm(FIXTURE_DATA(faults) *self)
{
	char text[12] = "";

	if (pread(self->fail_nth, text, sizeof(text) - 1, 0) <= 0)
		abort();
	arm(self, 0);
	return atoi(text);
}

/**
 * sweep() - make each allocation of a call fail in turn
 * @call: returns 0 or -errno
 * @after: takes what @call returned, checks and undoes it, prepares the next
 *
 * Returns how many allocations made the call fail.
 */
static unsigned int sweep(struct __test_metadata *_metadata, FIXTURE_DATA(faults) *self,
			  int (*call)(FIXTURE_DATA(faults) *self),
			  int (*after)(FIXTURE_DATA(faults) *self, int err))
{
	long long refs = number_in_file(REFCNT, NULL);
	unsigned int failures = 0;
	unsigned int n;

	for (n = 1; n < 10000; n++) {
		int err, left;

		arm(self, n);
		err = call(self);
		left = disarm(self);
		EXPECT_EQ(0, after(self, err))
			TH_LOG("after failure %u", n);
		EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
		if (left) {
			/* no allocation is left to fail */
			EXPECT_EQ(0, err);
			break;
		}
		if (err) {
			failures++;
			EXPECT_EQ(-ENOMEM, err)
				TH_LOG("failure %u", n);
		}
	}
	EXPECT_GT(10000, n);
	TH_LOG("%u allocations, %u made the call fail", n - 1, failures);
	return failures;
}

static int sweep_open(FIXTURE_DATA(faults) *self)
{
	self->handle = kvscratch_open(O_RDWR);
	return self->handle < 0 ? self->handle : 0;
}

static int after_open(FIXTURE_DATA(faults) *self, int err)
{
	if (!err)
		close(self->handle);
	return 0;
}

TEST_F_TIMEOUT(faults, in_open, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* one of them is the module's */
	EXPECT_LE(2, sweep(_metadata, self, sweep_open, after_open));
}

static int sweep_create(FIXTURE_DATA(faults) *self)
{
	return kvscratch_create(self->handle, SWEEP_ROWS, FAULT_ROW_BYTES, KVSCRATCH_DTYPE_U8);
}

/* A handle whose CREATE failed is as good as new, and so are the limits. */
static int after_create(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_create(self) : 0;
	if (!err && len_of(self->handle))
		err = -EIO;
	close(self->handle);
	self->handle = kvscratch_open(O_RDWR);
	return err;
}

TEST_F_TIMEOUT(faults, in_create, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	self->handle = kvscratch_open(O_RDWR);
	ASSERT_LE(0, self->handle);
	/* a page each, the pad, its array, the kernel's bookkeeping */
	EXPECT_LE(SWEEP_ROWS + 1, sweep(_metadata, self, sweep_create, after_create));
	close(self->handle);
}

/* A pad that converts has a buffer, and one more plane. */
static int sweep_create_scaled(FIXTURE_DATA(faults) *self)
{
	return kvscratch_create_scaled(self->handle, SWEEP_ROWS, FAULT_ROW_BYTES,
				       KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
}

static int after_create_scaled(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_create_scaled(self) : 0;
	close(self->handle);
	self->handle = kvscratch_open(O_RDWR);
	return err;
}

TEST_F_TIMEOUT(faults, in_create_scaled, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* room for one, as in the other sweeps */
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) +
			    charged_bytes(SWEEP_ROWS + 1, FAULT_ROW_BYTES) + (16 << 10));
	self->handle = kvscratch_open(O_RDWR);
	ASSERT_LE(0, self->handle);
	EXPECT_LE(SWEEP_ROWS + 3, sweep(_metadata, self, sweep_create_scaled, after_create_scaled));
	close(self->handle);
}

static int sweep_map(FIXTURE_DATA(faults) *self)
{
	return kvscratch_map(self->pad, &self->view);
}

static int after_map(FIXTURE_DATA(faults) *self, int err)
{
	struct kvscratch_view *view = &self->view;
	const uint8_t *last = (const uint8_t *)view->data + (FAULT_ROWS - 1) * FAULT_ROW_BYTES;

	if (err)
		return 0;
	if (kvscratch_view_state(view) != FAULT_ROWS || !row_is(view->data, FAULT_ROW_BYTES, 0) ||
	    !row_is(last, FAULT_ROW_BYTES, FAULT_ROWS - 1))
		err = -EIO;
	kvscratch_unmap(view);
	return err;
}

TEST_F_TIMEOUT(faults, in_mmap, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	for (uint32_t row = 0; row < FAULT_ROWS; row += 64) {
		ASSERT_EQ(0, append_rows(self->pad, FAULT_ROW_BYTES, row, 64));
	}
	/* the mapping and a page table every 2 MiB */
	EXPECT_LE(5, sweep(_metadata, self, sweep_map, after_map));
}

static int sweep_attach(FIXTURE_DATA(faults) *self)
{
	return kvscratch_attach(self->handle, self->pad);
}

/* Far from everything else: the upper page tables are missing, too. */
#define FAR_ADDRESS ((void *)(sizeof(long) == 8 ? 1ul << 45 : 3ul << 29))

static int sweep_map_far(FIXTURE_DATA(faults) *self)
{
	void *at = mmap(FAR_ADDRESS, FAULT_ROW_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE,
			self->pad, 0);

	return at == MAP_FAILED ? -errno : 0;
}

static int after_map_far(FIXTURE_DATA(faults) *self, int err)
{
	(void)self;
	return err ? 0 : munmap(FAR_ADDRESS, FAULT_ROW_BYTES);
}

TEST_F_TIMEOUT(faults, in_mmap_far_away, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* the mapping, one page table, and on 64 bit two levels above it */
	EXPECT_LE(sizeof(long) == 8 ? 4 : 2, sweep(_metadata, self, sweep_map_far, after_map_far));
}

static int after_attach(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_attach(self) : 0;
	if (!err && len_of(self->handle) != len_of(self->pad))
		err = -EIO;
	close(self->handle);
	self->handle = kvscratch_open(O_RDONLY);
	return err;
}

TEST_F_TIMEOUT(faults, in_attach, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	self->handle = kvscratch_open(O_RDONLY);
	ASSERT_LE(0, self->handle);
	/* today it allocates nothing; what it may do is ENOMEM */
	sweep(_metadata, self, sweep_attach, after_attach);
	close(self->handle);
}

/*
 * Let an epoll instance wait for rows and inotify watch the device: neither may
 * make an append allocate.
 */
struct watchers {
	int epoll;
	int inotify;
	int reader;
};

static bool watch(struct watchers *watchers, int pad)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLPRI };

	watchers->reader = kvscratch_open_reader(pad);
	watchers->epoll = epoll_create1(EPOLL_CLOEXEC);
	watchers->inotify = inotify_init1(IN_CLOEXEC);
	return !epoll_ctl(watchers->epoll, EPOLL_CTL_ADD, watchers->reader, &event) &&
	       inotify_add_watch(watchers->inotify, KVSCRATCH_DEVICE, IN_ALL_EVENTS) >= 0;
}

static void unwatch(struct watchers *watchers)
{
	close(watchers->inotify);
	close(watchers->epoll);
	close(watchers->reader);
}

/* No allocation between call and return, and the call did what it should */
#define EXPECT_NO_ALLOCATION(expected, call) do { \
	long __result; \
	\
	arm(self, 1); \
	__result = (long)(call); \
	EXPECT_EQ(1, disarm(self)); \
	EXPECT_EQ((long)(expected), __result); \
} while (0)

TEST_F_TIMEOUT(faults, appends_reach_no_allocation, TEST_SECONDS)
{
	const size_t bytes = 600 * FAULT_ROW_BYTES;
	uint8_t *rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct iovec parts[2] = {
		{ .iov_base = rows, .iov_len = 1000 },
		{ .iov_base = rows + 5000, .iov_len = 2 * FAULT_ROW_BYTES - 1000 },
	};
	struct iovec many[9];
	struct kvscratch_info info;
	struct kvscratch_view view;
	struct watchers watchers;
	struct iovec whole = { .iov_base = rows, .iov_len = FAULT_ROW_BYTES };
	uint64_t len = 0;

	NEED_FAULT_INJECTION();
	ASSERT_NE(MAP_FAILED, (void *)rows);
	ASSERT_EQ(0, mlock(rows, bytes));
	ASSERT_TRUE(watch(&watchers, self->pad));
	ASSERT_EQ(0, kvscratch_map(self->pad, &view));

	/* this is how it looks where there is one */
	arm(self, 1);
	EXPECT_EQ(-ENOMEM, new_pad(1, 1));
	EXPECT_EQ(0, disarm(self));
	self->handle = kvscratch_open(O_RDWR);
	ASSERT_LE(0, self->handle);
	arm(self, 1);
	EXPECT_EQ(-ENOMEM, kvscratch_create(self->handle, 1, 1, KVSCRATCH_DTYPE_U8));
	EXPECT_EQ(0, disarm(self));
	close(self->handle);

	for (int i = 0; i < 10; i++) {
		EXPECT_NO_ALLOCATION(0, kvscratch_append(self->pad, rows, FAULT_ROW_BYTES));
		EXPECT_NO_ALLOCATION(0, kvscratch_append(self->pad, rows, 7 * FAULT_ROW_BYTES));
		EXPECT_NO_ALLOCATION(2 * FAULT_ROW_BYTES, writev(self->pad, parts, 2));
		EXPECT_NO_ALLOCATION(FAULT_ROW_BYTES,
				     pwritev2(self->pad, &whole, 1, -1, RWF_NOWAIT));
		len += 11;
	}
	/* longer than one piece of a copy */
	EXPECT_NO_ALLOCATION(0, kvscratch_append(self->pad, rows, bytes));
	len += 600;
	EXPECT_NO_ALLOCATION(0, kvscratch_info(self->pad, &info));
	EXPECT_EQ(len, info.len);
	EXPECT_EQ(len, kvscratch_view_state(&view));

	/* what is refused */
	EXPECT_NO_ALLOCATION(-EINVAL, kvscratch_append(self->pad, rows, FAULT_ROW_BYTES - 1));
	EXPECT_NO_ALLOCATION(-EFAULT, kvscratch_append(self->pad, NULL, FAULT_ROW_BYTES));

	/* Linux copies a vector of more than 8 segments before we are called. */
	for (int i = 0; i < 9; i++)
		many[i] = (struct iovec) { .iov_base = rows, .iov_len = FAULT_ROW_BYTES };
	EXPECT_NO_ALLOCATION(8 * FAULT_ROW_BYTES, writev(self->pad, many, 8));
	len += 8;
	arm(self, 1);
	EXPECT_EQ(-1, writev(self->pad, many, 9));
	EXPECT_EQ(ENOMEM, errno);
	EXPECT_EQ(0, disarm(self));
	EXPECT_EQ(len, len_of(self->pad));

	EXPECT_NO_ALLOCATION(bytes, pread(self->pad, rows, bytes, FAULT_ROW_BYTES));
	EXPECT_NO_ALLOCATION(FAULT_ROW_BYTES, read(self->pad, rows, FAULT_ROW_BYTES));
	EXPECT_NO_ALLOCATION(0, lseek(self->pad, 0, SEEK_SET));
	EXPECT_NO_ALLOCATION(0, kvscratch_truncate(self->pad, len - 1, 0));
	EXPECT_NO_ALLOCATION(0, kvscratch_truncate(self->pad, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_NO_ALLOCATION(0, kvscratch_truncate(self->pad, 0, 0));

	/* to the brim */
	for (len = 0; len + 600 <= FAULT_ROWS; len += 600)
		EXPECT_NO_ALLOCATION(0, kvscratch_append(self->pad, rows, bytes));
	EXPECT_NO_ALLOCATION(-ENOSPC, kvscratch_append(self->pad, rows, bytes));
	EXPECT_EQ(len, len_of(self->pad));
	unwatch(&watchers);
	kvscratch_unmap(&view);
	munmap(rows, bytes);
}

TEST_F_TIMEOUT(faults, converting_appends_reach_no_allocation, TEST_SECONDS)
{
	const size_t bytes = 8 * FAULT_ROW_BYTES * sizeof(float);
	float *rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	NEED_FAULT_INJECTION();
	ASSERT_NE(MAP_FAILED, (void *)rows);
	ASSERT_EQ(0, mlock(rows, bytes));
	set_limits(1 << 30, 1 << 30);
	self->handle = kvscratch_open(O_RDWR);
	ASSERT_LE(0, self->handle);
	ASSERT_EQ(0, sweep_create_scaled(self));
	EXPECT_NO_ALLOCATION(0, kvscratch_append(self->handle, rows, bytes));
	EXPECT_NO_ALLOCATION(FAULT_ROW_BYTES, read(self->handle, rows, FAULT_ROW_BYTES));
	rows[FAULT_ROW_BYTES - 1] = __builtin_nanf("");
	EXPECT_NO_ALLOCATION(-EDOM, kvscratch_append(self->handle, rows, bytes));
	EXPECT_NO_ALLOCATION(0, kvscratch_truncate(self->handle, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(1, len_of(self->handle));
	close(self->handle);
	munmap(rows, bytes);
}

TEST_F_TIMEOUT(faults, appends_survive_a_machine_without_memory, TEST_SECONDS)
{
	uint8_t *row = mmap(NULL, FAULT_ROW_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int appended = 0, created, opened, truncated;

	NEED_FAULT_INJECTION();
	ASSERT_NE(MAP_FAILED, (void *)row);
	ASSERT_EQ(0, mlock(row, FAULT_ROW_BYTES));
	self->handle = kvscratch_open(O_RDWR);
	ASSERT_LE(0, self->handle);

	ASSERT_EQ(1, pwrite(self->make_it_fail, "1", 1, 0));
	created = sweep_create(self);
	for (int i = 0; i < 500; i++)
		appended += !kvscratch_append(self->pad, row, FAULT_ROW_BYTES);
	truncated = kvscratch_truncate(self->pad, 400, KVSCRATCH_TRUNCATE_ZERO);
	opened = kvscratch_open(O_RDWR);
	ASSERT_EQ(1, pwrite(self->make_it_fail, "0", 1, 0));

	EXPECT_EQ(-ENOMEM, created);
	EXPECT_EQ(-ENOMEM, opened);
	EXPECT_EQ(500, appended);
	EXPECT_EQ(0, truncated);
	EXPECT_EQ(400, len_of(self->pad));
	close(self->handle);
	munmap(row, FAULT_ROW_BYTES);
}

/* What the kernel itself counts, on every kernel */

FIXTURE(events) {
	struct allocation_meter meter;
};

FIXTURE_SETUP(events) {
	open_allocation_meter(_metadata, &self->meter);
}

FIXTURE_TEARDOWN(events) {
	close_allocation_meter(&self->meter);
}

TEST_F_TIMEOUT(events, appends_allocate_nothing, TEST_SECONDS)
{
	uint64_t fewest = UINT64_MAX, before[REQUIRED_EVENTS];
	int handle = kvscratch_open(O_RDWR);
	uint8_t row[512];
	int pad = new_pad(1000, sizeof(row));
	struct watchers watchers;

	ASSERT_LE(0, handle);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
	fill_row(row, sizeof(row), 1);

	/* each meter works: the pad, the kernel's bookkeeping, the pages */
	for (size_t i = 0; i < REQUIRED_EVENTS; i++)
		before[i] = count_event(self->meter.fds[i]);
	ASSERT_EQ(0, kvscratch_create(handle, 64, 4096, KVSCRATCH_DTYPE_U8));
	for (size_t i = 0; i < REQUIRED_EVENTS; i++) {
		EXPECT_LT(before[i], count_event(self->meter.fds[i]))
			TH_LOG("%s", allocation_events[i]);
	}
	close(handle);
	ASSERT_TRUE(watch(&watchers, pad));

	/* An interrupt that allocates counts as ours: not in every batch. */
	for (int batch = 0; batch < 5 && fewest; batch++) {
		uint64_t first = count_allocations(&self->meter), events;
		int failed = 0;

		for (int i = 0; i < 1000; i++)
			failed |= kvscratch_append(pad, row, sizeof(row));
		failed |= kvscratch_truncate(pad, 0, KVSCRATCH_TRUNCATE_ZERO);
		events = count_allocations(&self->meter) - first;
		ASSERT_EQ(0, failed);
		if (events < fewest)
			fewest = events;
	}
	EXPECT_EQ(0, fewest);
	unwatch(&watchers);
	close(pad);
}

TEST_HARNESS_MAIN
