// SPDX-License-Identifier: GPL-2.0-only
/*
 * What pads and views cost others, and who pays: page tables, resident sets, the
 * mapper's cgroup, the OOM killers, pinned pages, and kill -9 in the middle.
 *
 * Comment lines tell what was measured.
 */
#include "cgroup.h"
#include "common.h"
#include "events.h"

#include <sys/epoll.h>
#include <sys/resource.h>

#define ROW_BYTES 4096

/* A page table maps 512 pages of 4 KiB. */
#define PAGES_PER_TABLE 512

/* Counters of the kernel that are kept per processor and summed up in batches */
#define COUNTER_SLACK ((long long)MIB)

FIXTURE(cost) {
	uint64_t saved_per_pad;
	uint64_t saved_total;
	/* cgroups of the one who creates and of the one who maps */
	char creator[64];
	char mapper[64];
	uint64_t bytes;
	int pad;
};

FIXTURE_SETUP(cost) {
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	make_cgroup(self->creator, sizeof(self->creator), "creator");
	make_cgroup(self->mapper, sizeof(self->mapper), "mapper");
	set_limits(1 << 30, 1 << 30);
	self->bytes = 64 * MIB;
	self->pad = -1;
}

FIXTURE_TEARDOWN(cost) {
	write_number(MAX_PER_PAD, self->saved_per_pad);
	write_number(MAX_TOTAL, self->saved_total);
	EXPECT_EQ(0, rmdir(self->creator));
	EXPECT_EQ(0, rmdir(self->mapper));
}

/* Have a child in the creator's cgroup make a pad, whose handle is ours then. */
static int pad_of_another(const char *cgroup, uint64_t bytes)
{
	const char *name = "pad";
	struct child child;
	char text[16];
	int pad = -1;

	if (start_child(&child)) {
		join_cgroup(cgroup);
		pad = new_pad(bytes / ROW_BYTES, ROW_BYTES);
		CHILD_CHECK(pad >= 0);
		CHILD_CHECK(!append_rows(pad, ROW_BYTES, 0, 1));
		CHILD_CHECK(!kvscratch_send_handles(child.line, &name, &pad, 1));
		_exit(0);
	}
	if (kvscratch_receive_handles(child.line, text, sizeof(text), &pad, 1) != 1 ||
	    end_child(&child))
		return -1;
	return pad;
}

/* Bytes that /proc/PID/status tells in kB */
static long long status_bytes(pid_t pid, const char *key)
{
	char path[40];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	return number_in_file(path, key) * 1024;
}

static long long oom_score(pid_t pid)
{
	char path[40];

	snprintf(path, sizeof(path), "/proc/%d/oom_score", pid);
	return number_in_file(path, NULL);
}

/*
 * Linux 6.1 adds what a task mapped to its RssFile when the task has taken some
 * faults, and a reader of views takes none.
 */
static void take_faults(void)
{
	const size_t bytes = 256 * page_bytes();
	uint8_t *fresh = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			      -1, 0);

	CHILD_CHECK(fresh != MAP_FAILED);
	for (size_t i = 0; i < bytes; i += page_bytes())
		fresh[i] = 1;
	munmap(fresh, bytes);
}

/* Map a pad so many times, and stay */
static void map_and_stay(struct child *child, const char *cgroup, int pad, int count)
{
	struct kvscratch_view view;

	join_cgroup(cgroup);
	CHILD_CHECK(say(child->line));
	CHILD_CHECK(hear(child->line));
	for (int i = 0; i < count; i++)
		CHILD_CHECK(!device_map(pad, &view));
	take_faults();
	CHILD_CHECK(say(child->line));
	while (hear(child->line)) {
		CHILD_CHECK(row_is(view.data, ROW_BYTES, 0));
		CHILD_CHECK(say(child->line));
	}
	_exit(0);
}

static bool still_reads(struct child *child)
{
	return say(child->line) && hear(child->line);
}

/* Whether one entry maps a chunk: 32-bit callers get no addresses that are aligned for it. */
static bool has_huge_entries(void)
{
	return sizeof(long) == 8 && one_entry_maps_a_chunk();
}

/* Map a pad at an address that chunks are not aligned for, so that each page has its entry. */
static const uint8_t *map_by_pages(int pad, uint64_t bytes)
{
	uint8_t *room = mmap(NULL, bytes + KVSCRATCH_CHUNK_BYTES, PROT_NONE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uintptr_t at = (uintptr_t)room / KVSCRATCH_CHUNK_BYTES * KVSCRATCH_CHUNK_BYTES + page_bytes();

	CHILD_CHECK(room != MAP_FAILED);
	if (at < (uintptr_t)room)
		at += KVSCRATCH_CHUNK_BYTES;
	CHILD_CHECK(mmap((void *)at, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, pad, 0) !=
		    MAP_FAILED);
	return (const uint8_t *)at;
}

/* A table for each chunk, or, where one entry maps it, one for the status page */
TEST_F_TIMEOUT(cost, views_cost_page_tables, TEST_SECONDS)
{
	const int count = 8;
	const long long viewed = count * (self->bytes + page_bytes());
	const long long tables = has_huge_entries() ? 0 : count * self->bytes / PAGES_PER_TABLE;
	long long before[3], grown[3], creator;
	struct child child;

	self->pad = pad_of_another(self->creator, self->bytes);
	ASSERT_LE(0, self->pad);
	if (start_child(&child))
		map_and_stay(&child, self->mapper, self->pad, count);
	ASSERT_TRUE(hear(child.line));
	creator = cgroup_number(self->creator, "memory.current", NULL);
	before[0] = status_bytes(child.pid, "VmPTE");
	before[1] = status_bytes(child.pid, "RssFile");
	before[2] = cgroup_number(self->mapper, "memory.current", NULL);
	ASSERT_TRUE(still_reads(&child));
	grown[0] = status_bytes(child.pid, "VmPTE") - before[0];
	grown[1] = status_bytes(child.pid, "RssFile") - before[1];
	grown[2] = cgroup_number(self->mapper, "memory.current", NULL) - before[2];
	TH_LOG("%lld KiB of views: %lld KiB of page tables, RssFile + %lld KiB, cgroup of the mapper + %lld KiB",
	       viewed / 1024, grown[0] / 1024, grown[1] / 1024, grown[2] / 1024);

	/* a view begins and ends anywhere in a page table, and there are tables above */
	EXPECT_LE(tables, grown[0]);
	EXPECT_GE(tables + (2 * count + 4) * (long long)page_bytes(), grown[0]);
	EXPECT_LE(viewed - COUNTER_SLACK, grown[1]);
	EXPECT_GE(viewed + COUNTER_SLACK, grown[1]);
	EXPECT_LE(tables - COUNTER_SLACK / 2, grown[2]);
	EXPECT_GE(tables + COUNTER_SLACK, grown[2]);
	/* of that the creator pays nothing */
	EXPECT_GE(creator + COUNTER_SLACK / 2,
		  cgroup_number(self->creator, "memory.current", NULL));
	EXPECT_EQ(0, end_child(&child));
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* A view by pages costs its tables; a fork copies none of them, its child takes faults. */
TEST_F_TIMEOUT(cost, fork_copies_no_page_tables, TEST_SECONDS)
{
	const long long tables = self->bytes / PAGES_PER_TABLE;
	const uint8_t *view = NULL;
	long long own, copied[2];
	struct child child;

	self->pad = new_pad(self->bytes / ROW_BYTES, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	own = status_bytes(getpid(), "VmPTE");
	/* twice: the first fork tells what is not the view's */
	for (int mapped = 0; mapped < 2; mapped++) {
		if (mapped) {
			view = map_by_pages(self->pad, self->bytes);
			ASSERT_EQ(0, madvise((void *)view, self->bytes, MADV_POPULATE_READ));
		}
		if (start_child(&child)) {
			CHILD_CHECK(say(child.line));
			hear(child.line);
			CHILD_CHECK(!mapped || row_is(view, ROW_BYTES, 0));
			_exit(0);
		}
		ASSERT_TRUE(hear(child.line));
		copied[mapped] = status_bytes(child.pid, "VmPTE");
		EXPECT_EQ(0, end_child(&child));
	}
	own = status_bytes(getpid(), "VmPTE") - own;
	TH_LOG("a view of %lld KiB by pages: %lld KiB of page tables, of which fork copies %lld",
	       (long long)self->bytes / 1024, own / 1024, (copied[1] - copied[0]) / 1024);
	EXPECT_LE(tables, own);
	EXPECT_GE(tables / 4, copied[1] - copied[0]);
	munmap((void *)view, self->bytes);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* A mapper that maps until its own cgroup has no room for page tables */
TEST_F_TIMEOUT(cost, cgroup_of_the_mapper_stops_the_mapper_alone, TEST_SECONDS)
{
	struct child reader, mapper;
	unsigned int *views = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status;

	ASSERT_NE(MAP_FAILED, (void *)views);
	self->pad = pad_of_another(self->creator, self->bytes);
	ASSERT_LE(0, self->pad);
	if (start_child(&reader))
		map_and_stay(&reader, CGROUPS, self->pad, 1);
	ASSERT_TRUE(hear(reader.line));
	ASSERT_TRUE(still_reads(&reader));

	limit_cgroup(self->mapper, 2 * MIB);
	if (start_child(&mapper)) {
		join_cgroup(self->mapper);
		/* 32 bits of address space hold 24 */
		while (*views < 24) {
			const uint8_t *at = map_by_pages(self->pad, self->bytes);

			if (madvise((void *)at, self->bytes, MADV_POPULATE_READ))
				break;
			++*views;
		}
		_exit(*views < 24 ? ENOMEM : 0);
	}
	status = end_child(&mapper);
	TH_LOG("a cgroup of 2048 KiB: after %u views of %lld KiB the mapper %s", *views,
	       (long long)self->bytes / 1024, status == 128 + SIGKILL ? "was killed" :
	       status == ENOMEM ? "got ENOMEM" : "went on");
	EXPECT_TRUE(status == 128 + SIGKILL || status == ENOMEM);
	EXPECT_GE(16, *views);
	EXPECT_LT(0, cgroup_number(self->mapper, "memory.events", "max"));

	/* nobody else noticed */
	EXPECT_EQ(0, cgroup_number(self->creator, "memory.events", "oom_kill"));
	EXPECT_TRUE(still_reads(&reader));
	EXPECT_EQ(0, append_rows(self->pad, ROW_BYTES, 1, 1));
	EXPECT_EQ(0, end_child(&reader));
	EXPECT_TRUE(charge_falls_below(self->mapper, MIB));
	munmap(views, page_bytes());
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* Whom the global OOM killer ranks first: the one that maps, not the one that created */
TEST_F_TIMEOUT(cost, global_oom_killer_ranks_by_views, TEST_SECONDS)
{
	const long long total = number_in_file("/proc/meminfo", "MemTotal") * 1024;
	/* a thousandth of RAM is a point, scaled by 2/3 */
	const long long points = (long long)self->bytes * 1000 / total * 2 / 3;
	long long idle, holder, mapper;
	struct child child;

	idle = oom_score(getpid());
	self->pad = new_pad(self->bytes / ROW_BYTES, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	holder = oom_score(getpid());
	if (start_child(&child))
		map_and_stay(&child, self->mapper, self->pad, 1);
	ASSERT_TRUE(hear(child.line));
	ASSERT_TRUE(still_reads(&child));
	mapper = oom_score(child.pid);
	TH_LOG("oom_score %lld; %lld after CREATE of %lld %% of RAM; of a mapper %lld", idle, holder,
	       (long long)self->bytes * 100 / total, mapper);
	EXPECT_GE(idle + 2, holder);
	EXPECT_LE(idle + points - 2, mapper);
	EXPECT_EQ(0, end_child(&child));
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* The first process that the kernel's log says was killed since @log was opened */
static int first_oom_victim(int log)
{
	char record[8192];
	ssize_t bytes;

	while ((bytes = read(log, record, sizeof(record) - 1)) > 0) {
		const char *at;

		record[bytes] = '\0';
		at = strstr(record, "Killed process ");
		if (at)
			return atoi(at + strlen("Killed process "));
	}
	return 0;
}

/*
 * A cgroup that is full of what @hog takes, with a reader in it that maps much
 * and has little: true when the reader is the first to be killed.
 */
static bool reader_is_killed_first(struct __test_metadata *_metadata, FIXTURE_DATA(cost) *self,
				   const char *oom_score_adj)
{
	int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	struct child reader, hog;
	int victim;

	EXPECT_LE(0, log);
	lseek(log, 0, SEEK_END);
	if (start_child(&reader)) {
		write_file("/proc/self/oom_score_adj", oom_score_adj);
		map_and_stay(&reader, self->mapper, self->pad, 2);
	}
	EXPECT_TRUE(hear(reader.line));
	EXPECT_TRUE(still_reads(&reader));
	limit_cgroup(self->mapper, 16 * MIB);
	if (start_child(&hog)) {
		uint8_t *all = mmap(NULL, self->bytes / 2, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		CHILD_CHECK(all != MAP_FAILED);
		join_cgroup(self->mapper);
		for (size_t i = 0; i < self->bytes / 2; i += page_bytes())
			all[i] = 1;
		_exit(0);
	}
	/* its own cgroup cannot give it that much, whoever else dies */
	EXPECT_EQ(128 + SIGKILL, wait_for(hog.pid));
	close(hog.line);
	victim = first_oom_victim(log);
	EXPECT_TRUE(victim == reader.pid || victim == hog.pid)
		TH_LOG("killed: %d", victim);
	if (victim == hog.pid) {
		EXPECT_TRUE(still_reads(&reader));
	}
	EXPECT_EQ(victim == hog.pid ? 0 : 128 + SIGKILL, end_child(&reader));
	close(log);
	return victim == reader.pid;
}

TEST_F_TIMEOUT(cost, oom_killer_of_a_cgroup_picks_a_reader, TEST_SECONDS)
{
	struct child outside;

	self->pad = pad_of_another(self->creator, self->bytes);
	ASSERT_LE(0, self->pad);
	if (start_child(&outside))
		map_and_stay(&outside, CGROUPS, self->pad, 1);
	ASSERT_TRUE(hear(outside.line));
	ASSERT_TRUE(still_reads(&outside));

	EXPECT_TRUE(reader_is_killed_first(_metadata, self, "0"));
	/* what helps */
	EXPECT_FALSE(reader_is_killed_first(_metadata, self, "-1000"));

	/* in no case did the pad or a reader elsewhere take harm */
	EXPECT_TRUE(still_reads(&outside));
	EXPECT_EQ(0, end_child(&outside));
	EXPECT_EQ(0, append_rows(self->pad, ROW_BYTES, 1, 1));
	EXPECT_EQ(0, cgroup_number(self->creator, "memory.events", "oom_kill"));
	TH_LOG("a reader with two views of %lld KiB died before a process with 16384 KiB of its own; not with oom_score_adj -1000",
	       (long long)self->bytes / 1024);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* A pipe holds pages of a view after view, handle and pad are gone. */
TEST_F_TIMEOUT(cost, pinned_pages_leave_the_totals, TEST_SECONDS)
{
	const size_t pinned = 8 * MIB;
	struct kvscratch_view view;
	struct iovec from;
	long long during;
	int pipes[2];

	self->pad = pad_of_another(self->creator, self->bytes);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	ASSERT_LE((int)pinned, fcntl(pipes[1], F_SETPIPE_SZ, pinned));
	ASSERT_EQ(0, device_map(self->pad, &view));
	from = (struct iovec) { .iov_base = (void *)view.data, .iov_len = pinned };
	ASSERT_EQ(pinned, vmsplice(pipes[1], &from, 1, 0));
	device_unmap(&view);
	close(self->pad);

	/* the module knows nothing of them; the creator's cgroup still pays */
	EXPECT_EQ(0, nothing_accounted());
	EXPECT_TRUE(charge_falls_below(self->creator, self->bytes / 2));
	during = cgroup_number(self->creator, "memory.current", NULL);
	EXPECT_LE((long long)pinned, during);
	close(pipes[0]);
	close(pipes[1]);
	EXPECT_TRUE(charge_falls_below(self->creator, MIB));
	TH_LOG("%zu KiB pinned: module 0 KiB, cgroup of the creator %lld KiB; %lld KiB without the pipe",
	       pinned / 1024, during / 1024,
	       cgroup_number(self->creator, "memory.current", NULL) / 1024);
}

/*
 * kill -9 in the middle. The kernel itself sends the signal when the task has
 * allocated so many pages, so there is no race with what is to be interrupted.
 */

/* What a task still allocates to end */
#define AFTER_THE_KILL 16

struct killed {
	/* pages allocated when the signal was sent, and until the end */
	uint64_t at;
	uint64_t in_all;
};

/* What the victim does; returns when it was not interrupted */
typedef void (*victim_fn)(FIXTURE_DATA(cost) *self);

static struct killed kill_in_the_middle(struct __test_metadata *_metadata, FIXTURE_DATA(cost) *self,
					victim_fn act, uint64_t at)
{
	struct killed killed = { .at = at };
	struct child child;
	int event;

	if (start_child(&child)) {
		join_cgroup(self->mapper);
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		act(self);
		_exit(0);
	}
	EXPECT_TRUE(hear(child.line));
	event = open_event("mm_page_alloc", child.pid, at);
	EXPECT_LE(0, event);
	EXPECT_EQ(0, fcntl(event, F_SETOWN, child.pid));
	EXPECT_EQ(0, fcntl(event, F_SETSIG, SIGKILL));
	EXPECT_EQ(0, fcntl(event, F_SETFL, O_ASYNC));
	EXPECT_TRUE(say(child.line));
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	killed.in_all = count_event(event);
	close(event);
	return killed;
}

static void create_most_of_ram(FIXTURE_DATA(cost) *self)
{
	CHILD_CHECK(new_pad(self->bytes / ROW_BYTES, ROW_BYTES) >= 0);
}

static void populate_most_of_ram(FIXTURE_DATA(cost) *self)
{
	const uint8_t *view = map_by_pages(self->pad, self->bytes);

	CHILD_CHECK(!madvise((void *)view, self->bytes, MADV_POPULATE_READ));
}

/* Most of what there is, with the limits to match */
static uint64_t most_of_ram(void)
{
	uint64_t available = number_in_file("/proc/meminfo", "MemAvailable") * 1024;
	uint64_t bytes = available / 10 * 7 / ROW_BYTES * ROW_BYTES;
	uint64_t charged = charged_bytes(bytes / ROW_BYTES, ROW_BYTES);

	/* tables instead of huge pages take a little more */
	charged += charged / 100;
	set_limits(charged, charged);
	return bytes;
}

TEST_F_TIMEOUT(cost, fatal_signal_ends_create, TEST_SECONDS)
{
	uint64_t chunks;

	self->bytes = most_of_ram();
	chunks = self->bytes / KVSCRATCH_CHUNK_BYTES;
	/* otherwise one that went on to the end would not show */
	ASSERT_LT(3 * chunks / 4 + AFTER_THE_KILL, chunks);
	for (int quarter = 1; quarter < 4; quarter++) {
		struct killed killed = kill_in_the_middle(_metadata, self, create_most_of_ram,
							  chunks * quarter / 4);

		TH_LOG("CREATE of %llu chunks: killed at %llu allocations, ended after %llu",
		       (unsigned long long)chunks, (unsigned long long)killed.at,
		       (unsigned long long)killed.in_all);
		EXPECT_LE(killed.at, killed.in_all);
		EXPECT_GE(killed.at + AFTER_THE_KILL, killed.in_all);
		EXPECT_TRUE(charge_falls_below(self->mapper, 8 * MIB));
	}
	/* as large a pad, while the limits have room for one and RAM as well */
	self->pad = new_pad(self->bytes / ROW_BYTES, ROW_BYTES);
	EXPECT_LE(0, self->pad);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* The same where order 9 has failed: a plane of a row is a table, and a single page */
#define SMALL_PLANES 4096

static void create_small_planes(FIXTURE_DATA(cost) *self)
{
	static struct kvscratch_plane planes[SMALL_PLANES];

	(void)self;
	for (int i = 0; i < SMALL_PLANES; i++)
		planes[i] = (struct kvscratch_plane) { .dim = 4096, .dtype = KVSCRATCH_DTYPE_U8 };
	CHILD_CHECK(device_create_planes(8, planes, SMALL_PLANES) >= 0);
}

TEST_F_TIMEOUT(cost, fatal_signal_ends_create_of_single_pages, TEST_SECONDS)
{
	for (int quarter = 1; quarter < 4; quarter++) {
		struct killed killed = kill_in_the_middle(_metadata, self, create_small_planes,
							  8 * SMALL_PLANES * quarter / 4);

		TH_LOG("CREATE of %u pages: killed at %llu allocations, ended after %llu",
		       8 * SMALL_PLANES, (unsigned long long)killed.at,
		       (unsigned long long)killed.in_all);
		EXPECT_LE(killed.at, killed.in_all);
		/* the arrays of the planes, and what the slab takes to have them */
		EXPECT_GE(killed.at + 2 * AFTER_THE_KILL, killed.in_all);
		EXPECT_TRUE(charge_falls_below(self->mapper, 8 * MIB));
	}
	EXPECT_EQ(0, nothing_accounted());
}

TEST_F_TIMEOUT(cost, fatal_signal_ends_populate, TEST_SECONDS)
{
	struct kvscratch_view view;
	uint64_t tables;

	self->bytes = most_of_ram();
	tables = self->bytes / page_bytes() / PAGES_PER_TABLE;
	self->pad = new_pad(self->bytes / ROW_BYTES, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	/* otherwise one that went on to the end would not show */
	ASSERT_LT(tables / 4 + AFTER_THE_KILL, tables);
	for (uint64_t at = tables / 8; at <= tables / 4; at += tables / 8) {
		struct killed killed = kill_in_the_middle(_metadata, self,
							  populate_most_of_ram, at);

		TH_LOG("a view of %llu page tables: killed at %llu pages, ended after %llu",
		       (unsigned long long)tables, (unsigned long long)killed.at,
		       (unsigned long long)killed.in_all);
		EXPECT_LE(killed.at, killed.in_all);
		EXPECT_GE(killed.at + AFTER_THE_KILL, killed.in_all);
		EXPECT_TRUE(charge_falls_below(self->mapper, 8 * MIB));
	}
	/* the pad is as it was */
	ASSERT_EQ(0, device_map(self->pad, &view));
	EXPECT_TRUE(row_is(view.data, ROW_BYTES, 0));
	EXPECT_EQ(1, kvscratch_view_state(&view));
	device_unmap(&view);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/*
 * kill -9 in a scrub: nothing is allocated there that could send the signal. Its progress
 * shows in a view; where the scrub was faster than the killer, once more.
 */
#define SCRUB_BYTES (128 * MIB)
#define SCRUB_TRIES 20

static const uint8_t *last_row(const struct kvscratch_view *view)
{
	return (const uint8_t *)view->data + SCRUB_BYTES - ROW_BYTES;
}

/* Fill a pad of SCRUB_BYTES, and have a child empty it with ZERO; @first is its first byte. */
static void start_scrub(struct __test_metadata *_metadata, struct child *child, int fd,
			const volatile uint8_t *first)
{
	uint8_t *rows = malloc(SCRUB_BYTES / 64);

	ASSERT_NE(NULL, rows);
	memset(rows, 1, SCRUB_BYTES / 64);
	for (int i = 0; i < 64; i++)
		ASSERT_EQ(0, device_append(fd, rows, SCRUB_BYTES / 64));
	free(rows);
	if (start_child(child))
		_exit(-device_truncate(fd, 0, KVSCRATCH_TRUNCATE_ZERO));
	while (*first)
		;
}

/* Kill who does it when the first row is zero. */
static void kill_in_scrub(struct __test_metadata *_metadata, int fd, const void *first)
{
	struct child child;

	start_scrub(_metadata, &child, fd, first);
	kill(child.pid, SIGKILL);
	end_child(&child);
	ASSERT_EQ(0, len_of(fd));
}

TEST_F_TIMEOUT(cost, fatal_signal_ends_a_scrub, TEST_SECONDS)
{
	struct kvscratch_view view;

	self->pad = new_pad(SCRUB_BYTES / ROW_BYTES, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_map(self->pad, &view));
	/* what finishes it: the next ZERO, or a SEAL */
	for (int seal = 0; seal < 2; seal++) {
		int tries = 0;

		do
			kill_in_scrub(_metadata, self->pad, view.data);
		while (all_zero(last_row(&view), ROW_BYTES) && ++tries < SCRUB_TRIES);
		EXPECT_GT(SCRUB_TRIES, tries);
		if (seal) {
			EXPECT_EQ(0, device_seal(self->pad));
		} else {
			/* one without ZERO owes it still */
			EXPECT_EQ(0, device_truncate(self->pad, 0, 0));
			EXPECT_FALSE(all_zero(last_row(&view), ROW_BYTES));
			EXPECT_EQ(0, device_truncate(self->pad, 0, KVSCRATCH_TRUNCATE_ZERO));
		}
		EXPECT_TRUE(all_zero(view.data, SCRUB_BYTES));
	}
	device_unmap(&view);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/*
 * A takeover while there is a scrub: it does not wait for it, and what is left is owed.
 * Through the writer's handle, and through one without a role
 */
TEST_F_TIMEOUT(cost, takeover_ends_a_scrub, TEST_SECONDS)
{
	struct kvscratch_view view;

	self->pad = new_pad(SCRUB_BYTES / ROW_BYTES, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_map(self->pad, &view));
	for (int role = 0; role < 2; role++) {
		int tries = 0, successor = -1, status;
		uint64_t generation;

		do {
			int fd = self->pad;
			struct child child;

			close(successor);
			if (role)
				fd = device_open_writer(self->pad, 0);
			generation = generation_of(self->pad);
			start_scrub(_metadata, &child, fd, view.data);
			successor = device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER);
			ASSERT_LE(0, successor);
			status = end_child(&child);
			if (role)
				close(fd);
		} while (!status && ++tries < SCRUB_TRIES);
		EXPECT_EQ(role ? ESTALE : EBUSY, status);
		/* its rows are dropped, and their bytes are not all gone */
		EXPECT_EQ(0, len_of(self->pad));
		EXPECT_EQ(generation + 1, generation_of(self->pad));
		EXPECT_FALSE(all_zero(last_row(&view), ROW_BYTES));
		/* of which there is nothing to keep */
		EXPECT_EQ(-EINVAL, device_keep(successor, 0, 0, 1));
		EXPECT_EQ(0, append_rows(successor, ROW_BYTES, 7, 2));
		EXPECT_TRUE(row_is(view.data, ROW_BYTES, 7));
		EXPECT_EQ(0, device_truncate(successor, 1, KVSCRATCH_TRUNCATE_ZERO));
		EXPECT_TRUE(row_is(view.data, ROW_BYTES, 7));
		EXPECT_TRUE(all_zero((uint8_t *)view.data + ROW_BYTES, SCRUB_BYTES - ROW_BYTES));
		EXPECT_EQ(0, device_truncate(successor, 0, 0));
		close(successor);
	}
	device_unmap(&view);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/* A SEAL that has a scrub to finish is killed as well: the pad is not sealed then. */
TEST_F_TIMEOUT(cost, fatal_signal_ends_a_seal, TEST_SECONDS)
{
	struct kvscratch_view view;
	struct child child;
	int tries = 0, killed;

	/* who was faster than the signal has sealed it: once more, with another pad */
	do {
		const volatile uint8_t *first;

		self->pad = new_pad(SCRUB_BYTES / ROW_BYTES, ROW_BYTES);
		ASSERT_LE(0, self->pad);
		ASSERT_EQ(0, device_map(self->pad, &view));
		first = view.data;
		kill_in_scrub(_metadata, self->pad, view.data);
		/* it is owed all of it, and begins anew */
		ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 1, 1));
		ASSERT_EQ(0, device_truncate(self->pad, 0, 0));
		ASSERT_NE(0, *first);
		if (start_child(&child))
			_exit(-device_seal(self->pad));
		while (*first)
			;
		kill(child.pid, SIGKILL);
		end_child(&child);
		/* of a sealed pad all is zero */
		killed = !all_zero(last_row(&view), ROW_BYTES);
		EXPECT_EQ(killed ? 0 : -EROFS, device_truncate(self->pad, 0, 0));
		EXPECT_EQ(0, device_seal(self->pad));
		EXPECT_TRUE(all_zero(view.data, SCRUB_BYTES));
		EXPECT_EQ(-EROFS, device_truncate(self->pad, 0, 0));
		device_unmap(&view);
		close(self->pad);
	} while (!killed && ++tries < SCRUB_TRIES);
	EXPECT_GT(SCRUB_TRIES, tries);
	EXPECT_EQ(0, nothing_accounted());
}

/* A scrub of several planes that did not come to the last of them leaves nothing to keep. */
TEST_F_TIMEOUT(cost, a_scrub_cut_short_leaves_nothing_to_keep, TEST_SECONDS)
{
	const struct kvscratch_plane half = { .dim = ROW_BYTES / 2, .dtype = KVSCRATCH_DTYPE_U8 };
	struct kvscratch_plane planes[2] = { half, half };
	struct kvscratch_pad_info info;
	const uint8_t *map, *last;
	int writer, tries = 0;

	self->pad = device_create_planes(SCRUB_BYTES / ROW_BYTES, planes, 2);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_pad_info(self->pad, &info));
	ASSERT_EQ(2, device_planes(self->pad, 0, planes, 2));
	map = mmap(NULL, info.mapping_bytes, PROT_READ, MAP_SHARED, self->pad, 0);
	ASSERT_NE(MAP_FAILED, (void *)map);
	last = map + planes[1].offset + (info.max_seq_len - 1) * planes[1].row_bytes;
	writer = device_open_writer(self->pad, 0);
	ASSERT_LE(0, writer);
	do
		kill_in_scrub(_metadata, writer, map + planes[0].offset);
	while (all_zero(last, ROW_BYTES / 2) && ++tries < SCRUB_TRIES);
	EXPECT_GT(SCRUB_TRIES, tries);
	for (uint32_t plane = 0; plane < 2; plane++) {
		EXPECT_EQ(-EINVAL, device_keep(writer, plane, 0, 1));
		EXPECT_EQ(-EINVAL, device_keep(writer, plane, 0, info.max_seq_len));
	}
	EXPECT_EQ(0, device_truncate(writer, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(all_zero(last, ROW_BYTES / 2));
	munmap((void *)map, info.mapping_bytes);
	close(writer);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
}

/*
 * A reader that registers and maps what it can. Who wakes it all is counted: each task
 * that is woken in the writer's own calls is one that the writer went through.
 */
#define SLEEPERS 20
#define REGISTRATIONS 50000
#define VIEWS 65000

static void sleep_in_epoll(int line, int reader, uint32_t flags)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET | flags };
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	CHILD_CHECK(!epoll_ctl(epoll, EPOLL_CTL_ADD, reader, &event));
	CHILD_CHECK(say(line));
	while (epoll_wait(epoll, &event, 1, -1) == 1)
		CHILD_CHECK(say(line));
	_exit(1);
}

/* The registration outlives the copy, whose number is not used again. */
static bool register_often(int epoll, int reader)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	const struct rlimit limit = { REGISTRATIONS + 1024, REGISTRATIONS + 1024 };

	if (setrlimit(RLIMIT_NOFILE, &limit))
		return false;
	for (int i = 0; i < REGISTRATIONS; i++) {
		int copy = fcntl(reader, F_DUPFD, 1024 + i);

		if (copy != 1024 + i || epoll_ctl(epoll, EPOLL_CTL_ADD, copy, &event) ||
		    close(copy))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(cost, readers_delay_no_writer, TEST_SECONDS)
{
	struct child sleepers[SLEEPERS];
	int reader, epoll = epoll_create1(EPOLL_CLOEXEC), wakeups;
	struct epoll_event event;
	uint64_t before, most = 0;

	self->pad = new_pad(64, ROW_BYTES);
	reader = device_open_reader(self->pad);
	ASSERT_LE(0, reader);
	for (int i = 0; i < SLEEPERS; i++)
		if (start_child(&sleepers[i]))
			sleep_in_epoll(sleepers[i].line, reader, 0);
	for (int i = 0; i < SLEEPERS; i++)
		ASSERT_TRUE(hear(sleepers[i].line));
	ASSERT_TRUE(register_often(epoll, reader));
	for (int i = 0; i < VIEWS; i++)
		ASSERT_NE(MAP_FAILED, mmap(NULL, page_bytes(), PROT_READ, MAP_SHARED, reader, 0));

	wakeups = open_tracepoint("sched", "sched_waking", 0, 0);
	ASSERT_LE(0, wakeups);
	for (uint32_t round = 0; round < 6; round++) {
		for (int i = 0; i < SLEEPERS; i++)
			await_sleep(sleepers[i].pid);
		before = count_event(wakeups);
		if (round % 3 < 2) {
			EXPECT_EQ(0, append_rows(self->pad, ROW_BYTES, round, 1));
		} else {
			EXPECT_EQ(0, device_truncate(self->pad, 0, KVSCRATCH_TRUNCATE_ZERO));
		}
		before = count_event(wakeups) - before;
		if (before > most)
			most = before;
		/* and nobody is forgotten */
		for (int i = 0; i < SLEEPERS; i++)
			ASSERT_TRUE(hear(sleepers[i].line));
	}
	TH_LOG("%u registrations, %u sleepers, %u views: a writer wakes %llu at most", REGISTRATIONS,
	       SLEEPERS, VIEWS, (unsigned long long)most);
	/* the one who wakes them, and what an interrupt wakes meanwhile */
	EXPECT_LE(1, most);
	EXPECT_GT(SLEEPERS / 2, most);
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, -1));
	for (int i = 0; i < SLEEPERS; i++) {
		kill(sleepers[i].pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&sleepers[i]));
	}
	close(wakeups);
	close(epoll);
	close(reader);
	close(self->pad);
}

/* Exclusive waiters of one handle are no pool with those of another. */
TEST_F_TIMEOUT(cost, nobody_keeps_a_wake_up, TEST_SECONDS)
{
	struct child sleepers[2];
	int readers[2];

	self->pad = new_pad(4, ROW_BYTES);
	for (int i = 0; i < 2; i++) {
		readers[i] = device_open_reader(self->pad);
		ASSERT_LE(0, readers[i]);
		if (start_child(&sleepers[i]))
			sleep_in_epoll(sleepers[i].line, readers[i], EPOLLEXCLUSIVE);
		ASSERT_TRUE(hear(sleepers[i].line));
		await_sleep(sleepers[i].pid);
	}
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	for (int i = 0; i < 2; i++) {
		EXPECT_TRUE(hear(sleepers[i].line));
	}
	for (int i = 0; i < 2; i++) {
		kill(sleepers[i].pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&sleepers[i]));
		close(readers[i]);
	}
	close(self->pad);
}

TEST_HARNESS_MAIN
