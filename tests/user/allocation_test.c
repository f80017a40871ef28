// SPDX-License-Identifier: GPL-2.0-only
/*
 * Appends allocate nothing, and every allocation of the other calls may fail.
 *
 * Two witnesses: fault injection, where the kernel has it, and the kernel's own
 * count of allocations everywhere.
 */
#include "common.h"
#include "ring.h"

#include <linux/perf_event.h>
#include <sys/epoll.h>
#include <sys/inotify.h>

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

static const char *const allocation_events[] = {
	"kmalloc", "kmem_cache_alloc", "mm_page_alloc",
	/* gone in newer kernels */
	"kmalloc_node", "kmem_cache_alloc_node",
};

#define REQUIRED_EVENTS 3

FIXTURE(events) {
	int fds[ARRAY_SIZE(allocation_events)];
};

FIXTURE_SETUP(events) {
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
		self->fds[i] = -1;
		if (id < 0 && i >= REQUIRED_EVENTS)
			continue;
		ASSERT_LE(0, id)
			TH_LOG("%s", path);
		attr.config = id;
		self->fds[i] = syscall(SYS_perf_event_open, &attr, 0, -1, -1,
				       PERF_FLAG_FD_CLOEXEC);
		ASSERT_LE(0, self->fds[i]);
	}
}

FIXTURE_TEARDOWN(events) {
	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		if (self->fds[i] >= 0)
			close(self->fds[i]);
}

static uint64_t count_event(int fd)
{
	uint64_t count = 0;

	if (fd >= 0 && read(fd, &count, sizeof(count)) != sizeof(count))
		abort();
	return count;
}

static uint64_t count_events(FIXTURE_DATA(events) *self)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < ARRAY_SIZE(allocation_events); i++)
		sum += count_event(self->fds[i]);
	return sum;
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
		before[i] = count_event(self->fds[i]);
	ASSERT_EQ(0, kvscratch_create(handle, 64, 4096, KVSCRATCH_DTYPE_U8));
	for (size_t i = 0; i < REQUIRED_EVENTS; i++) {
		EXPECT_LT(before[i], count_event(self->fds[i]))
			TH_LOG("%s", allocation_events[i]);
	}
	close(handle);
	ASSERT_TRUE(watch(&watchers, pad));

	/* An interrupt that allocates counts as ours: not in every batch. */
	for (int batch = 0; batch < 5 && fewest; batch++) {
		uint64_t first = count_events(self), events;
		int failed = 0;

		for (int i = 0; i < 1000; i++)
			failed |= kvscratch_append(pad, row, sizeof(row));
		failed |= kvscratch_truncate(pad, 0, KVSCRATCH_TRUNCATE_ZERO);
		events = count_events(self) - first;
		ASSERT_EQ(0, failed);
		if (events < fewest)
			fewest = events;
	}
	EXPECT_EQ(0, fewest);
	unwatch(&watchers);
	close(pad);
}

TEST_HARNESS_MAIN
