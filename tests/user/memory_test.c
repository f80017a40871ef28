// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory: who pays for a pad, what the limits refuse, that failures and kills leave
 * nothing behind, and that nobody else is killed for it.
 */
#include "cgroup.h"
#include "module.h"

#define MIN_AVAILABLE "/sys/module/kvscratch/parameters/min_available_bytes"

/* The module's limits, restored after each test */

FIXTURE(memory) {
	uint64_t saved_per_pad;
	uint64_t saved_total;
	uint64_t saved_available;
	/* cgroups, empty and without limits */
	char creator[64];
	char other[64];
};

FIXTURE_SETUP(memory) {
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	self->saved_available = number_in_file(MIN_AVAILABLE, NULL);
	make_cgroup(self->creator, sizeof(self->creator), "creator");
	make_cgroup(self->other, sizeof(self->other), "other");
}

FIXTURE_TEARDOWN(memory) {
	write_number(MAX_PER_PAD, self->saved_per_pad);
	write_number(MAX_TOTAL, self->saved_total);
	write_number(MIN_AVAILABLE, self->saved_available);
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

/* The same of @nr planes of [max_seq_len, dim] bytes each */
static int try_planes(uint32_t nr, uint64_t max_seq_len, uint32_t dim)
{
	static struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
	int fd;

	for (uint32_t i = 0; i < nr; i++)
		planes[i] = (struct kvscratch_plane) { .dim = dim, .dtype = KVSCRATCH_DTYPE_U8 };
	fd = device_create_planes(max_seq_len, planes, nr);
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
		int fd;

		join_cgroup(self->creator);
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		fd = new_pad(bytes / 4096, 4096);
		CHILD_CHECK(fd >= 0);
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
		join_cgroup(self->creator);
		/* of huge chunks, and of pages */
		CHILD_CHECK(try_pad(64 * MIB / 4096, 4096) == -ENOMEM);
		CHILD_CHECK(try_planes(64, MIB / 4096, 4096) == -ENOMEM);
		/* what fits still does */
		CHILD_CHECK(!try_pad(4 * MIB / 4096, 4096));
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
		/* often enough that lost chunks would show */
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
	const uint64_t page = page_bytes(), chunk = KVSCRATCH_CHUNK_BYTES / page;
	/* a table, a huge chunk, one of each, two of them; around where they begin */
	const uint64_t data_pages[] = {
		1, 6, chunk / 2, chunk / 2 + 1, chunk, chunk + 1, chunk + chunk / 2,
		chunk + chunk / 2 + 1, 2 * chunk,
	};

	for (size_t i = 0; i < ARRAY_SIZE(data_pages); i++) {
		uint64_t rows = data_pages[i] * page;
		uint64_t limit = charged_bytes(rows, 1);

		set_limits(limit, 1 << 30);
		EXPECT_EQ(0, try_pad(rows, 1))
			TH_LOG("%llu rows", (unsigned long long)rows);
		/* a huge chunk has room for another page */
		if (charged_bytes(rows + 1, 1) > limit) {
			EXPECT_EQ(-EDQUOT, try_pad(rows + 1, 1))
				TH_LOG("%llu rows", (unsigned long long)rows);
		}
		set_limits(limit - 1, 1 << 30);
		EXPECT_EQ(-EDQUOT, try_pad(rows, 1))
			TH_LOG("%llu rows", (unsigned long long)rows);
	}
	EXPECT_EQ(0, nothing_accounted());
}

/* What INFO says is what the limits count, also of many planes, scales and conversions. */
TEST_F_TIMEOUT(memory, limits_count_what_info_tells, TEST_SECONDS)
{
	const struct kvscratch_plane planes[] = {
		{ .dim = 64, .dtype = KVSCRATCH_DTYPE_F32 },
		{ .dim = 4096, .dtype = KVSCRATCH_DTYPE_I8, .input_dtype = KVSCRATCH_DTYPE_F16 },
		{ .dim = 2048, .dtype = KVSCRATCH_DTYPE_MXINT8 },
		{ .dim = 1, .dtype = KVSCRATCH_DTYPE_I32 },
		{ .dim = 3000, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	struct kvscratch_pad_info info;
	int fd = device_create_planes(700, planes, ARRAY_SIZE(planes));

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_pad_info(fd, &info));
	EXPECT_EQ(info.allocated_bytes, number_in_file(BYTES_TOTAL, NULL));
	/* no less than its rows, no more than a chunk for each array, and a little, beyond */
	EXPECT_LT(700ull * info.row_bytes, info.allocated_bytes);
	EXPECT_GT(700ull * info.row_bytes + 7 * KVSCRATCH_CHUNK_BYTES, info.allocated_bytes);
	close(fd);
	EXPECT_EQ(0, number_in_file(BYTES_TOTAL, NULL));

	set_limits(info.allocated_bytes, info.allocated_bytes);
	fd = device_create_planes(700, planes, ARRAY_SIZE(planes));
	EXPECT_LE(0, fd);
	close(fd);
	set_limits(info.allocated_bytes - 1, 1 << 30);
	EXPECT_EQ(-EDQUOT, device_create_planes(700, planes, ARRAY_SIZE(planes)));
	set_limits(1 << 30, info.allocated_bytes - 1);
	EXPECT_EQ(-EDQUOT, device_create_planes(700, planes, ARRAY_SIZE(planes)));
	EXPECT_EQ(0, nothing_accounted());
	EXPECT_EQ(0, number_in_file(BYTES_TOTAL, NULL));
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

/* Where a parameter is set when the module is loaded; what is told is not set. */
TEST_F_TIMEOUT(memory, parameters_at_load, TEST_SECONDS)
{
	const uint64_t one = charged_bytes(8, 4096);
	char text[80];

	EXPECT_ERRNO(EACCES, open(BYTES_TOTAL, O_WRONLY));
	ASSERT_EQ(0, remove_module());
	EXPECT_EQ(-EPERM, load_module("bytes_total=1"));
	EXPECT_EQ(-EPERM, load_module("max_bytes_total=1 bytes_total=0"));
	EXPECT_EQ(-EINVAL, load_module("max_bytes_total=many"));
	snprintf(text, sizeof(text), "max_bytes_per_pad=%llu max_bytes_total=%llu",
		 (unsigned long long)one, (unsigned long long)one);
	ASSERT_EQ(0, load_module(text));
	EXPECT_EQ(0, number_in_file(BYTES_TOTAL, NULL));
	EXPECT_EQ(0, try_pad(8, 4096));
	EXPECT_EQ(-EDQUOT, try_pad(9, 4096));
	ASSERT_EQ(0, remove_module());
	ASSERT_EQ(0, load_module("min_available_bytes=0x7fffffffffffffff"));
	EXPECT_EQ(-ENOMEM, try_pad(8, 4096));
	ASSERT_EQ(0, remove_module());
	ASSERT_EQ(0, load_module(""));
	EXPECT_EQ(self->saved_total, (uint64_t)number_in_file(MAX_TOTAL, NULL));
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
			  number_in_file(path, "kvscratch-bytes"));
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

/* Who else needs memory */

static uint64_t available_bytes(void)
{
	return number_in_file("/proc/meminfo", "MemAvailable") << 10;
}

static long long oom_kills(void)
{
	return number_in_file("/proc/vmstat", "oom_kill ");
}

TEST_F_TIMEOUT(memory, create_leaves_the_reserve, TEST_SECONDS)
{
	set_limits(INT64_MAX, INT64_MAX);
	write_number(MIN_AVAILABLE, available_bytes() - 48 * MIB);
	EXPECT_EQ(-ENOMEM, try_pad(64 * MIB / 4096, 4096));
	EXPECT_EQ(-ENOMEM, try_planes(64, MIB / 4096, 4096));
	EXPECT_EQ(0, try_pad(16 * MIB / 4096, 4096));
	write_number(MIN_AVAILABLE, INT64_MAX);
	EXPECT_EQ(-ENOMEM, try_pad(1, 1));
	write_number(MIN_AVAILABLE, 0);
	EXPECT_EQ(0, try_pad(64 * MIB / 4096, 4096));
	EXPECT_EQ(0, nothing_accounted());
}

#define BYSTANDER_BYTES (8 * MIB)

/* Somebody who has memory of his own, is asked for more, and is still there */
static void stand_by(int line)
{
	for (int i = 0; i < 2; i++) {
		uint8_t *at = mmap(NULL, BYSTANDER_BYTES, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHILD_CHECK(at != MAP_FAILED);
		memset(at, 1, BYSTANDER_BYTES);
		CHILD_CHECK(say(line));
		CHILD_CHECK(hear(line));
	}
	_exit(0);
}

/* Whatever pads are made of, memory ends with ENOMEM for who makes them, and for nobody else. */
TEST_F_TIMEOUT(memory, flood_ends_at_the_reserve_and_kills_nobody, TEST_SECONDS)
{
	const struct {
		uint32_t planes;
		uint64_t rows;
		uint32_t row_bytes;
	} shapes[] = {
		/* huge chunks, tables, and little but tables of tables */
		{ 1, 48 * MIB / 4096, 4096 },
		{ 1, MIB / 4096, 4096 },
		{ 4096, 1, 1 },
		{ 1, 1, 1 },
	};
	long long kills = oom_kills();

	ASSERT_LE(0, kills);
	for (size_t i = 0; i < ARRAY_SIZE(shapes); i++) {
		static struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
		struct child bystander, flood;

		for (uint32_t j = 0; j < shapes[i].planes; j++)
			planes[j] = (struct kvscratch_plane) {
				.dim = shapes[i].row_bytes, .dtype = KVSCRATCH_DTYPE_U8,
			};
		set_limits(INT64_MAX, INT64_MAX);
		if (start_child(&bystander))
			stand_by(bystander.line);
		ASSERT_TRUE(hear(bystander.line));
		if (start_child(&flood)) {
			int fd, node = device_open(O_WRONLY);

			CHILD_CHECK(node >= 0);
			do
				fd = device_create_on(node, shapes[i].rows, planes,
						      shapes[i].planes);
			while (fd >= 0);
			/* descriptors end first where pads are small */
			CHILD_CHECK(fd == -ENOMEM || fd == -EMFILE);
			CHILD_CHECK(shapes[i].planes * shapes[i].rows == 1 || fd == -ENOMEM);
			CHILD_CHECK(say(flood.line));
			hear(flood.line);
			_exit(0);
		}
		ASSERT_TRUE(hear(flood.line))
			TH_LOG("shape %zu", i);
		/* the bystander wants more while all of that is there */
		EXPECT_TRUE(say(bystander.line));
		EXPECT_TRUE(hear(bystander.line));
		EXPECT_TRUE(say(bystander.line));
		EXPECT_EQ(0, end_child(&bystander))
			TH_LOG("shape %zu", i);
		EXPECT_EQ(0, end_child(&flood));
		EXPECT_EQ(kills, oom_kills());
		EXPECT_EQ(0, nothing_accounted());
	}
}

/* Kills */

#define KILL_ROUNDS 24

/* A CREATE that is killed in its middle leaves nothing, whatever it has by then. */
TEST_F_TIMEOUT(memory, killed_creates_leave_nothing, TEST_SECONDS)
{
	const uint64_t available = available_bytes();
	uint32_t random = 1;
	int unfinished = 0;

	set_limits(INT64_MAX, INT64_MAX);
	for (int round = 0; round < KILL_ROUNDS; round++) {
		struct child child;

		if (start_child(&child)) {
			static struct kvscratch_plane planes[256];
			const bool huge = round % 2;

			for (int i = 0; i < 256; i++)
				planes[i] = (struct kvscratch_plane) {
					.dim = 4096, .dtype = KVSCRATCH_DTYPE_U8,
				};
			/* 192 MiB of huge chunks or of pages */
			if (device_create_planes(huge ? 3 * 512 : 256, planes,
						 huge ? 32 : 192) < 0)
				_exit(1);
			say(child.line);
			hear(child.line);
			_exit(2);
		}
		while (!number_in_file(BYTES_TOTAL, NULL))
			sched_yield();
		random = random * 1103515245 + 12345;
		for (volatile uint32_t spin = random >> 12 & 0xfffff; spin; spin--)
			;
		ASSERT_EQ(0, kill(child.pid, SIGKILL));
		/* an answer that is there already, or the end */
		unfinished += !hear(child.line);
		ASSERT_EQ(128 + SIGKILL, end_child(&child));
		ASSERT_EQ(0, number_in_file(BYTES_TOTAL, NULL));
	}
	/* kills that come too late prove nothing */
	EXPECT_LT(0, unfinished);
	EXPECT_LT(available - 32 * MIB, available_bytes());
	EXPECT_EQ(0, nothing_accounted());
}

TEST_HARNESS_MAIN
