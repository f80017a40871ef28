// SPDX-License-Identifier: GPL-2.0-only
/*
 * Appends allocate nothing, and every allocation of the other calls may fail.
 *
 * Two witnesses: fault injection, where the kernel has it, and the kernel's own
 * count of allocations everywhere.
 */
#include "common.h"
#include "meters.h"
#include "ring.h"

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
	/* what makes pads, a pad with room, and what the sweep makes */
	int node;
	int pad;
	int handle;
	uint32_t rows;
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
	self->node = device_open(O_RDWR);
	ASSERT_LE(0, self->node);
	self->pad = new_pad(FAULT_ROWS, FAULT_ROW_BYTES);
	ASSERT_LE(0, self->pad);
	self->rows = SWEEP_ROWS;
	/* a first touch of code, stack or data would be an allocation too */
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
}

FIXTURE_TEARDOWN(faults) {
	if (!self->available)
		return;
	if (pwrite(self->fail_nth, "0", 1, 0) != 1 || pwrite(self->make_it_fail, "0", 1, 0) != 1)
		abort();
	close(self->pad);
	close(self->node);
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

/* Memory for objects is there after a few calls that found none. */
#define SWEEP_TRIES 4

/**
 * sweep() - make each allocation of a call fail in turn
 * @call: returns 0 or -errno
 * @after: takes what @call returned, checks and undoes it, prepares the next
 *
 * An allocation may be one of pages for objects, which has something to fall back to and
 * is not there every time: its failure makes nothing fail, and hides one that would.
 * So it is tried again.
 *
 * Returns how many allocations made the call fail.
 */
static unsigned int sweep(struct __test_metadata *_metadata, FIXTURE_DATA(faults) *self,
			  int (*call)(FIXTURE_DATA(faults) *self),
			  int (*after)(FIXTURE_DATA(faults) *self, int err))
{
	long long refs = number_in_file(REFCNT, NULL);
	unsigned int failures = 0, tries = 0, n = 1;

	while (n < 10000) {
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
		if (!err && ++tries < SWEEP_TRIES)
			continue;
		if (err) {
			failures++;
			EXPECT_EQ(-ENOMEM, err)
				TH_LOG("failure %u", n);
		}
		tries = 0;
		n++;
	}
	EXPECT_GT(10000, n);
	TH_LOG("%u fail-nth points, %u made the call fail", n - 1, failures);
	return failures;
}

static int sweep_open(FIXTURE_DATA(faults) *self)
{
	self->handle = device_open(O_RDWR);
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
	/* today none of them is the module's; the kernel has its own */
	EXPECT_LE(1, sweep(_metadata, self, sweep_open, after_open));
}

static int keep_handle(FIXTURE_DATA(faults) *self, int handle)
{
	self->handle = handle;
	return handle < 0 ? handle : 0;
}

static int sweep_create(FIXTURE_DATA(faults) *self)
{
	const struct kvscratch_plane plane = {
		.dim = FAULT_ROW_BYTES, .dtype = KVSCRATCH_DTYPE_U8,
	};

	return keep_handle(self, device_create_on(self->node, self->rows, &plane, 1));
}

/* After a CREATE that failed the node and the limits are as good as new. */
static int after_create(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_create(self) : 0;
	if (err)
		return err;
	if (len_of(self->handle))
		err = -EIO;
	close(self->handle);
	return err;
}

TEST_F_TIMEOUT(faults, in_create, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* a page each, the pad, its tables, inode and handle, the kernel's bookkeeping */
	EXPECT_LE(SWEEP_ROWS + 6, sweep(_metadata, self, sweep_create, after_create));
}

/* The first pad that there is brings the file system of the handles along. */
TEST_F_TIMEOUT(faults, in_create_of_the_first_pad, TEST_SECONDS)
{
	unsigned int others;

	NEED_FAULT_INJECTION();
	others = sweep(_metadata, self, sweep_create, after_create);
	close(self->pad);
	EXPECT_LT(others, sweep(_metadata, self, sweep_create, after_create));
	self->pad = new_pad(1, 1);
}

/* The table of the pages is larger than a page, and has a second way to be had. */
TEST_F_TIMEOUT(faults, in_create_of_many_pages, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* a chunk by one page or, where that fails, by many, and a tail */
	self->rows = 600;
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) +
			    charged_bytes(self->rows, FAULT_ROW_BYTES) + 2 * page_bytes());
	EXPECT_LE(600 - KVSCRATCH_CHUNK_BYTES / FAULT_ROW_BYTES + 6,
		  sweep(_metadata, self, sweep_create, after_create));
}

/* Order 9 is what fails, each time: all that it was to be is single pages. */
TEST_F_TIMEOUT(faults, in_create_without_huge_pages, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	self->rows = 3 * KVSCRATCH_CHUNK_BYTES / FAULT_ROW_BYTES;
	/* a table has a pointer for each page */
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) +
			    charged_bytes(self->rows, FAULT_ROW_BYTES) + 8 * self->rows);
	write_file(FAIL_PAGE_ALLOC "min-order", "9");
	write_file(FAILSLAB "probability", "0");
	ASSERT_EQ(1, pwrite(self->make_it_fail, "1", 1, 0));
	EXPECT_EQ(0, sweep_create(self));
	ASSERT_EQ(1, pwrite(self->make_it_fail, "0", 1, 0));
	write_file(FAILSLAB "probability", "100");
	write_file(FAIL_PAGE_ALLOC "min-order", "0");
	if (self->handle >= 0) {
		struct kvscratch_pad_info info;

		ASSERT_EQ(0, device_pad_info(self->handle, &info));
		EXPECT_EQ(charged_bytes(self->rows, FAULT_ROW_BYTES) +
			  (page_bytes() == 4096 ? 8 * self->rows : 0), info.allocated_bytes);
		close(self->handle);
	}
}

/* How many chunks of a new pad are no huge page when order 9 fails @failures times */
static unsigned int tables_after(struct __test_metadata *_metadata, FIXTURE_DATA(faults) *self,
				 unsigned int failures)
{
	struct kvscratch_pad_info info = { 0 };

	write_number(FAIL_PAGE_ALLOC "times", failures);
	ASSERT_EQ(1, pwrite(self->make_it_fail, "1", 1, 0));
	EXPECT_EQ(0, sweep_create(self));
	ASSERT_EQ(1, pwrite(self->make_it_fail, "0", 1, 0));
	write_file(FAIL_PAGE_ALLOC "times", "-1");
	ASSERT_EQ(0, device_pad_info(self->handle, &info));
	close(self->handle);
	return (info.allocated_bytes - charged_bytes(self->rows, FAULT_ROW_BYTES)) /
	       (KVSCRATCH_CHUNK_BYTES / page_bytes() * 8);
}

/* It is asked for again after a refusal, and no more after four. */
TEST_F_TIMEOUT(faults, in_create_where_memory_is_fragmented, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	self->rows = 6 * KVSCRATCH_CHUNK_BYTES / FAULT_ROW_BYTES;
	set_limits(1 << 30, 1 << 30);
	write_file(FAIL_PAGE_ALLOC "min-order", "9");
	write_file(FAILSLAB "probability", "0");
	EXPECT_EQ(1, tables_after(_metadata, self, 1));
	EXPECT_EQ(3, tables_after(_metadata, self, 3));
	EXPECT_EQ(6, tables_after(_metadata, self, 4));
	write_file(FAILSLAB "probability", "100");
	write_file(FAIL_PAGE_ALLOC "min-order", "0");
}

/* A pad of planes of 64 elements, of which the first converts: it has a buffer */
#define SWEEP_PLANES 16
#define SWEEP_TOKEN_BYTES ((64 + 66) * SWEEP_PLANES / 2)
#define SWEEP_INPUT_BYTES (SWEEP_TOKEN_BYTES - 66 + 64 * sizeof(float))

static int sweep_create_planes(FIXTURE_DATA(faults) *self)
{
	struct kvscratch_plane planes[SWEEP_PLANES];

	for (int i = 0; i < SWEEP_PLANES; i++)
		planes[i] = (struct kvscratch_plane) {
			.dim = 64,
			.dtype = i % 2 ? KVSCRATCH_DTYPE_U8 : KVSCRATCH_DTYPE_MXINT8,
			.input_dtype = i ? 0 : KVSCRATCH_DTYPE_F32,
		};
	return keep_handle(self, device_create_on(self->node, SWEEP_ROWS, planes, SWEEP_PLANES));
}

static int after_create_planes(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_create_planes(self) : 0;
	if (!err)
		close(self->handle);
	return err;
}

TEST_F_TIMEOUT(faults, in_create_of_planes, TEST_SECONDS)
{
	struct kvscratch_pad_info info;

	NEED_FAULT_INJECTION();
	set_limits(1 << 30, 1 << 30);
	ASSERT_EQ(0, sweep_create_planes(self));
	ASSERT_EQ(0, device_pad_info(self->handle, &info));
	close(self->handle);
	/* room for one, as in the other sweeps */
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) + info.allocated_bytes);
	/* of each plane the pointers, the table and the page, half of them twice */
	EXPECT_LE(3 * SWEEP_PLANES * 3 / 2,
		  sweep(_metadata, self, sweep_create_planes, after_create_planes));
}

/* A chunk that is shared, the table of one that is shared in part, and a page of its own */
#define FORK_ROWS (KVSCRATCH_CHUNK_BYTES / FAULT_ROW_BYTES + 40)

static int sweep_fork(FIXTURE_DATA(faults) *self)
{
	return keep_handle(self, device_fork_on(self->node, self->pad, FORK_ROWS, 0,
						FORK_ROWS + 4));
}

/* Room for another one would be missing if one left anything behind. */
static int after_fork(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_fork(self) : 0;
	if (err)
		return err;
	if (len_of(self->handle) != FORK_ROWS)
		err = -EIO;
	close(self->handle);
	return err;
}

TEST_F_TIMEOUT(faults, in_fork, TEST_SECONDS)
{
	struct kvscratch_pad_info info;

	NEED_FAULT_INJECTION();
	for (uint32_t row = 0; row < FORK_ROWS; row += 69)
		ASSERT_EQ(0, append_rows(self->pad, FAULT_ROW_BYTES, row, 69));
	set_limits(1 << 30, 1 << 30);
	ASSERT_EQ(0, sweep_fork(self));
	ASSERT_EQ(0, device_pad_info(self->handle, &info));
	close(self->handle);
	set_limits(1 << 30, charged_bytes(FAULT_ROWS, FAULT_ROW_BYTES) + info.allocated_bytes);
	/* the pad, its planes and arrays, pointers, a table, pages, inode, handle, file */
	EXPECT_LE(14, sweep(_metadata, self, sweep_fork, after_fork));
	/* nobody shares a row of it now */
	EXPECT_EQ(0, device_truncate(self->pad, 0, 0));
}

static int sweep_map(FIXTURE_DATA(faults) *self)
{
	return device_map(self->pad, &self->view);
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
	device_unmap(view);
	return err;
}

TEST_F_TIMEOUT(faults, in_mmap, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	for (uint32_t row = 0; row < FAULT_ROWS; row += 64) {
		ASSERT_EQ(0, append_rows(self->pad, FAULT_ROW_BYTES, row, 64));
	}
	/* the mapping and a page table every 2 MiB, but for those at its ends, which may be there */
	EXPECT_LE(4, sweep(_metadata, self, sweep_map, after_map));
}

/* Far from everything else: the upper page tables are missing, too. */
#define FAR_ADDRESS ((void *)(sizeof(long) == 8 ? 1ul << 45 : 3ul << 29))

static int sweep_map_far(FIXTURE_DATA(faults) *self)
{
	void *at = mmap(FAR_ADDRESS, FAULT_ROW_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE,
			self->pad, 0);
	int err;

	if (at == MAP_FAILED)
		return -errno;
	err = madvise(at, FAULT_ROW_BYTES, MADV_POPULATE_READ) ? -errno : 0;
	if (err)
		munmap(at, FAULT_ROW_BYTES);
	return err;
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

static int sweep_reopen(FIXTURE_DATA(faults) *self)
{
	return keep_handle(self, device_open_reader(self->pad));
}

static int after_reopen(FIXTURE_DATA(faults) *self, int err)
{
	err = err ? sweep_reopen(self) : 0;
	if (err)
		return err;
	if (len_of(self->handle) != len_of(self->pad))
		err = -EIO;
	close(self->handle);
	return err;
}

TEST_F_TIMEOUT(faults, in_open_of_a_handle, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	/* the handle and a file, at the least */
	EXPECT_LE(2, sweep(_metadata, self, sweep_reopen, after_reopen));
}

static int sweep_take_over(FIXTURE_DATA(faults) *self)
{
	return keep_handle(self, device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER));
}

/* Who could not be the writer has taken nothing from the one that is. */
static int after_take_over(FIXTURE_DATA(faults) *self, int err)
{
	struct kvscratch_pad_info info;
	int writer = err ? device_open_writer(self->pad, 0) : self->handle;

	if (writer < 0)
		return writer;
	if (device_pad_info(writer, &info) || !(info.flags & KVSCRATCH_PAD_WRITER) ||
	    device_commit(writer, info.len))
		err = -EIO;
	else
		err = 0;
	close(writer);
	return err;
}

TEST_F_TIMEOUT(faults, in_open_of_a_writer, TEST_SECONDS)
{
	NEED_FAULT_INJECTION();
	EXPECT_LE(2, sweep(_metadata, self, sweep_take_over, after_take_over));
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

	watchers->reader = device_open_reader(pad);
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

/* Every way to append that Linux itself allocates nothing for */
enum way {
	BY_WRITE,
	BY_WRITEV,
	BY_NOWAIT,
	BY_RING,
	BY_RING_VECTOR,
	BY_RING_FIXED,
	NR_WAYS
};

#define MOST_PARTS 8

/* Source rows that never fault, and a ring that knows them and is warm */
struct source {
	uint8_t *rows;
	size_t bytes;
	struct ring ring;
};

/* Parts of any length, that of nothing included */
static void split(struct iovec *parts, uint8_t *rows, size_t bytes)
{
	uint64_t at = 0;

	for (uint64_t i = 0; i < MOST_PARTS; i++) {
		uint64_t end = bytes * (i + 1) * (i + 1) / (MOST_PARTS * MOST_PARTS);

		parts[i] = (struct iovec) { .iov_base = rows + at, .iov_len = end - at };
		at = end;
	}
}

static int done_by_ring(struct ring *ring, const struct io_uring_sqe *sqe, size_t bytes)
{
	int done = ring_do(ring, sqe);

	if (done < 0)
		return done;
	return (size_t)done == bytes ? 0 : -EIO;
}

/* 0 or -errno, as device_append() */
static int append_by(enum way way, struct source *source, int pad, size_t bytes)
{
	struct iovec parts[MOST_PARTS];
	struct iovec whole = { .iov_base = source->rows, .iov_len = bytes };
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = pad,
		.addr = (uintptr_t)source->rows,
		.len = bytes,
	};
	ssize_t done;

	switch (way) {
	case BY_WRITEV:
		split(parts, source->rows, bytes);
		done = writev(pad, parts, MOST_PARTS);
		break;
	case BY_NOWAIT:
		done = pwritev2(pad, &whole, 1, -1, RWF_NOWAIT);
		break;
	case BY_RING_VECTOR:
		split(parts, source->rows, bytes);
		sqe.opcode = IORING_OP_WRITEV;
		sqe.addr = (uintptr_t)parts;
		sqe.len = MOST_PARTS;
		return done_by_ring(&source->ring, &sqe, bytes);
	case BY_RING_FIXED:
		sqe.opcode = IORING_OP_WRITE_FIXED;
		return done_by_ring(&source->ring, &sqe, bytes);
	case BY_RING:
		return done_by_ring(&source->ring, &sqe, bytes);
	default:
		done = write(pad, source->rows, bytes);
	}
	if (done < 0)
		return -errno;
	return done == (ssize_t)bytes ? 0 : -EIO;
}

static bool make_source(struct source *source, size_t bytes)
{
	struct iovec buffer;
	int pad = new_pad(1, 1);

	source->bytes = bytes;
	source->rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	buffer = (struct iovec) { .iov_base = source->rows, .iov_len = bytes };
	if (pad < 0 || source->rows == MAP_FAILED || mlock(source->rows, bytes) ||
	    ring_open(&source->ring) ||
	    syscall(__NR_io_uring_register, source->ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1))
		return false;
	/* the ring keeps the requests that it has allocated */
	for (int i = 0; i < 64 * NR_WAYS; i++)
		if (append_by(i % NR_WAYS, source, pad, 1) || device_truncate(pad, 0, 0))
			return false;
	close(pad);
	return true;
}

static void drop_source(struct source *source)
{
	ring_close(&source->ring);
	munmap(source->rows, source->bytes);
}

/* Whether row @row of @rows begins at the edge of a page or of the pad, or beside it */
static bool is_at_an_edge(uint64_t row, uint64_t rows, uint32_t row_bytes)
{
	uint64_t beside = (row * row_bytes + 1) % page_bytes();

	return row <= 1 || row + 1 >= rows || beside <= 2;
}

/*
 * From each edge to each edge, up to one row too many, which is refused. A large
 * pad takes turns with the ways.
 */
static void append_between_edges(struct __test_metadata *_metadata, FIXTURE_DATA(faults) *self,
				 struct source *source, int pad, uint64_t rows, uint32_t row_bytes)
{
	unsigned int nr_ways = rows * row_bytes > MIB ? 1 : NR_WAYS;
	unsigned int turn = 0;

	for (uint64_t start = rows; start--;) {
		if (!is_at_an_edge(start, rows, row_bytes))
			continue;
		EXPECT_NO_ALLOCATION(0, device_truncate(pad, start, 0));
		for (uint64_t end = start + 1; end <= rows + 1; end++) {
			if (!is_at_an_edge(end, rows, row_bytes))
				continue;
			for (unsigned int i = 0; i < nr_ways; i++, turn++) {
				int expected = end > rows ? -ENOSPC : 0;
				size_t bytes = (end - start) * row_bytes;
				int err;

				arm(self, 1);
				err = append_by(turn % NR_WAYS, source, pad, bytes);
				EXPECT_TRUE(disarm(self) == 1 && err == expected)
					TH_LOG("rows %llu to %llu of %llu, %u bytes each, way %u: %d",
					       (unsigned long long)start, (unsigned long long)end,
					       (unsigned long long)rows, row_bytes,
					       turn % NR_WAYS, err);
				EXPECT_EQ(expected ? start : end, len_of(pad));
				EXPECT_NO_ALLOCATION(0, device_truncate(pad, start,
						     turn % 2 ? KVSCRATCH_TRUNCATE_ZERO : 0));
			}
		}
	}
	TH_LOG("%u appends to %llu rows of %u bytes", turn, (unsigned long long)rows, row_bytes);
}

TEST_F_TIMEOUT(faults, appends_of_every_size, TEST_SECONDS)
{
	const uint32_t page = page_bytes();
	const struct {
		uint32_t rows;
		uint32_t row_bytes;
	} shapes[] = {
		{ 2 * page - 1, 1 }, { 2 * page, 1 }, { 2 * page + 1, 1 },
		{ 1, 1 }, { 3, 3 }, { 24, 512 }, { 3, page - 1 }, { 3, page }, { 3, page + 1 },
		{ 3, 5 * page }, { 3, 65536 }, { 3, MIB - 1 },
		/* a piece of a copy, and a byte more */
		{ 3, 2 * MIB }, { 3, 2 * MIB + 1 },
		{ 2, KVSCRATCH_MAX_ROW_BYTES },
	};
	struct kvscratch_view view;
	struct source source;

	NEED_FAULT_INJECTION();
	set_limits(1 << 30, 1 << 30);
	ASSERT_TRUE(make_source(&source, 3 * KVSCRATCH_MAX_ROW_BYTES));
	for (size_t i = 0; i < ARRAY_SIZE(shapes); i++) {
		uint32_t rows = shapes[i].rows, row_bytes = shapes[i].row_bytes;
		int pad = new_pad(rows, row_bytes);

		ASSERT_LE(0, pad);
		ASSERT_EQ(0, device_map(pad, &view));
		/* so that a truncate can go to any row */
		EXPECT_NO_ALLOCATION(0, append_by(BY_WRITE, &source, pad,
						  (size_t)rows * row_bytes));
		append_between_edges(_metadata, self, &source, pad, rows, row_bytes);
		device_unmap(&view);
		close(pad);
	}
	drop_source(&source);
}

/* Other processes that map the pad and sleep until something happens to it */

#define NR_SLEEPERS 3

static void sleep_for_rows(int line, int pad, int how)
{
	int reader = device_open_reader(pad);
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event event = { .events = EPOLLIN | EPOLLPRI };
	struct pollfd poll_fd = { .fd = reader, .events = POLLIN | POLLPRI };
	struct kvscratch_view view;
	uint64_t state = 0;

	if (how == 1)
		event.events |= EPOLLET;
	CHILD_CHECK(reader >= 0 && epoll >= 0);
	CHILD_CHECK(!device_map(reader, &view));
	CHILD_CHECK(!epoll_ctl(epoll, EPOLL_CTL_ADD, reader, &event));
	do {
		CHILD_CHECK(!device_seen(reader, state));
		if (how == 0)
			CHILD_CHECK(poll(&poll_fd, 1, -1) == 1);
		else
			CHILD_CHECK(epoll_wait(epoll, &event, 1, -1) == 1);
		state = kvscratch_view_state(&view);
		CHILD_CHECK(!kvscratch_state_len(state) ||
			    row_is(view.data, FAULT_ROW_BYTES, 1));
	} while (say(line));
	_exit(0);
}

TEST_F_TIMEOUT(faults, appends_wake_sleepers, TEST_SECONDS)
{
	struct child sleepers[NR_SLEEPERS];
	struct source source;

	NEED_FAULT_INJECTION();
	set_limits(1 << 30, 1 << 30);
	ASSERT_TRUE(make_source(&source, FAULT_ROW_BYTES));
	fill_row(source.rows, FAULT_ROW_BYTES, 1);
	for (int i = 0; i < NR_SLEEPERS; i++)
		if (start_child(&sleepers[i]))
			sleep_for_rows(sleepers[i].line, self->pad, i);
	for (unsigned int round = 0; round < 8 * (NR_WAYS + 1); round++) {
		enum way way = round % (NR_WAYS + 1);

		/* they sleep nowhere else */
		for (int i = 0; i < NR_SLEEPERS; i++)
			await_sleep(sleepers[i].pid);
		if (way < NR_WAYS) {
			EXPECT_NO_ALLOCATION(0, append_by(way, &source, self->pad,
							  FAULT_ROW_BYTES));
		} else {
			EXPECT_NO_ALLOCATION(0, device_truncate(self->pad, 0,
								   KVSCRATCH_TRUNCATE_ZERO));
		}
		for (int i = 0; i < NR_SLEEPERS; i++) {
			ASSERT_TRUE(hear(sleepers[i].line))
				TH_LOG("sleeper %d, round %u", i, round);
		}
	}
	for (int i = 0; i < NR_SLEEPERS; i++) {
		kill(sleepers[i].pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&sleepers[i]));
	}
	drop_source(&source);
}

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
	ASSERT_EQ(0, device_map(self->pad, &view));

	/* this is how it looks where there is one */
	arm(self, 1);
	EXPECT_EQ(-ENOMEM, new_pad(1, 1));
	EXPECT_EQ(0, disarm(self));
	arm(self, 1);
	EXPECT_EQ(-ENOMEM, sweep_create(self));
	EXPECT_EQ(0, disarm(self));

	for (int i = 0; i < 10; i++) {
		EXPECT_NO_ALLOCATION(0, device_append(self->pad, rows, FAULT_ROW_BYTES));
		EXPECT_NO_ALLOCATION(0, device_append(self->pad, rows, 7 * FAULT_ROW_BYTES));
		EXPECT_NO_ALLOCATION(2 * FAULT_ROW_BYTES, writev(self->pad, parts, 2));
		EXPECT_NO_ALLOCATION(FAULT_ROW_BYTES,
				     pwritev2(self->pad, &whole, 1, -1, RWF_NOWAIT));
		len += 11;
	}
	/* longer than one piece of a copy */
	EXPECT_NO_ALLOCATION(0, device_append(self->pad, rows, bytes));
	len += 600;
	EXPECT_NO_ALLOCATION(0, device_info(self->pad, &info));
	EXPECT_EQ(len, info.len);
	EXPECT_EQ(len, kvscratch_view_state(&view));

	/* what is refused */
	EXPECT_NO_ALLOCATION(-EINVAL, device_append(self->pad, rows, FAULT_ROW_BYTES - 1));
	EXPECT_NO_ALLOCATION(-EFAULT, device_append(self->pad, NULL, FAULT_ROW_BYTES));

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
	EXPECT_NO_ALLOCATION(0, device_truncate(self->pad, len - 1, 0));
	EXPECT_NO_ALLOCATION(0, device_truncate(self->pad, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_NO_ALLOCATION(0, device_truncate(self->pad, 0, 0));

	/* to the brim */
	for (len = 0; len + 600 <= FAULT_ROWS; len += 600) {
		EXPECT_NO_ALLOCATION(0, device_append(self->pad, rows, bytes));
	}
	EXPECT_NO_ALLOCATION(-ENOSPC, device_append(self->pad, rows, bytes));
	EXPECT_EQ(len, len_of(self->pad));
	unwatch(&watchers);
	device_unmap(&view);
	munmap(rows, bytes);
}

/* What a writer does besides appending, and what ends it */
TEST_F_TIMEOUT(faults, calls_of_a_writer_reach_no_allocation, TEST_SECONDS)
{
	const size_t bytes = 8 * FAULT_ROW_BYTES;
	uint8_t *rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct pollfd poll_fd = { .events = POLLIN | POLLOUT };
	struct kvscratch_plane planes[SWEEP_PLANES];
	struct kvscratch_pad_info info;
	struct watchers watchers;
	int writer, taken_over;

	NEED_FAULT_INJECTION();
	ASSERT_NE(MAP_FAILED, (void *)rows);
	ASSERT_EQ(0, mlock(rows, bytes));
	set_limits(1 << 30, 1 << 30);
	ASSERT_EQ(0, sweep_create_planes(self));
	ASSERT_TRUE(watch(&watchers, self->handle));
	taken_over = device_open_writer(self->handle, 0);
	ASSERT_LE(0, taken_over);
	EXPECT_NO_ALLOCATION(0, device_stage(taken_over, 1, 0, rows, 2));
	writer = device_open_writer(self->handle, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, writer);
	EXPECT_NO_ALLOCATION(-ESTALE, device_stage(taken_over, 1, 0, rows, 2));
	EXPECT_NO_ALLOCATION(-EBUSY, device_append(self->handle, rows, SWEEP_INPUT_BYTES));
	for (uint32_t round = 0; round < 4; round++) {
		for (uint32_t plane = 0; plane < SWEEP_PLANES; plane++) {
			EXPECT_NO_ALLOCATION(0, device_stage(writer, plane, round, rows, 3));
			EXPECT_NO_ALLOCATION(0, device_keep(writer, plane, round + 1, 2));
		}
		EXPECT_NO_ALLOCATION(-EFAULT, device_stage(writer, 1, round + 2, NULL, 1));
		EXPECT_NO_ALLOCATION(-EINVAL, device_commit(writer, round + 3));
		EXPECT_NO_ALLOCATION(0, device_commit(writer, round + 1));
	}
	EXPECT_NO_ALLOCATION(SWEEP_INPUT_BYTES, write(writer, rows, SWEEP_INPUT_BYTES));
	EXPECT_NO_ALLOCATION(0, device_seen(self->handle, 3));
	poll_fd.fd = self->handle;
	EXPECT_NO_ALLOCATION(1, poll(&poll_fd, 1, 0));
	EXPECT_NO_ALLOCATION(0, device_pad_info(self->handle, &info));
	EXPECT_EQ(5, info.len);
	EXPECT_NO_ALLOCATION(SWEEP_PLANES, device_planes(self->handle, 0, planes, SWEEP_PLANES));
	EXPECT_NO_ALLOCATION(5 * SWEEP_TOKEN_BYTES, pread(self->handle, rows, bytes, 0));
	EXPECT_NO_ALLOCATION(0, device_truncate(writer, 4, 0));
	EXPECT_NO_ALLOCATION(0, device_truncate(writer, 2, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_NO_ALLOCATION(0, device_seal(writer));
	EXPECT_NO_ALLOCATION(0, device_seal(writer));
	EXPECT_NO_ALLOCATION(-EROFS, device_commit(writer, 2));
	unwatch(&watchers);
	close(taken_over);
	close(writer);
	close(self->handle);
	munmap(rows, bytes);
}

/* Into the copy of a page, the rest of a table, and the next chunk */
TEST_F_TIMEOUT(faults, appends_to_a_fork_reach_no_allocation, TEST_SECONDS)
{
	const uint32_t row_bytes = 1000, shared = 100, rows = 2 * KVSCRATCH_CHUNK_BYTES / 1000;
	uint8_t *source = mmap(NULL, 4096 * row_bytes, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int pad;

	NEED_FAULT_INJECTION();
	ASSERT_NE(MAP_FAILED, (void *)source);
	ASSERT_EQ(0, mlock(source, 4096 * row_bytes));
	set_limits(1 << 30, 1 << 30);
	pad = new_pad(rows, row_bytes);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, append_rows(pad, row_bytes, 0, shared));
	self->handle = device_fork_on(self->node, pad, shared, 0, rows);
	ASSERT_LE(0, self->handle);
	EXPECT_NO_ALLOCATION(0, device_append(self->handle, source, row_bytes));
	EXPECT_NO_ALLOCATION(0, device_append(pad, source, row_bytes));
	EXPECT_NO_ALLOCATION(0, device_append(self->handle, source,
					      (rows - shared - 1) * row_bytes));
	EXPECT_EQ(rows, len_of(self->handle));
	EXPECT_NO_ALLOCATION(-ETXTBSY, device_truncate(self->handle, 0, 0));
	close(pad);
	EXPECT_NO_ALLOCATION(0, device_truncate(self->handle, 0, KVSCRATCH_TRUNCATE_ZERO));
	close(self->handle);
	munmap(source, 4096 * row_bytes);
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
	self->handle = device_create_scaled(SWEEP_ROWS, FAULT_ROW_BYTES, KVSCRATCH_DTYPE_MXINT8,
					    KVSCRATCH_DTYPE_F32, 0);
	ASSERT_LE(0, self->handle);
	EXPECT_NO_ALLOCATION(0, device_append(self->handle, rows, bytes));
	EXPECT_NO_ALLOCATION(FAULT_ROW_BYTES, read(self->handle, rows, FAULT_ROW_BYTES));
	rows[FAULT_ROW_BYTES - 1] = __builtin_nanf("");
	EXPECT_NO_ALLOCATION(-EDOM, device_append(self->handle, rows, bytes));
	EXPECT_NO_ALLOCATION(0, device_truncate(self->handle, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(1, len_of(self->handle));
	close(self->handle);
	munmap(rows, bytes);
}

#define STORM_APPENDS 100000
#define STORM_ROWS 4096
#define STORM_ROW_BYTES 256

/* Each allocation of this task fails, all the time. */
TEST_F_TIMEOUT(faults, storm_of_appends, TEST_SECONDS)
{
	unsigned int appended = 0, truncated = 0, truncates = 0;
	int created[2], opened[2], reopened[2];
	struct source source;
	uint64_t len = 0;
	int pad;

	NEED_FAULT_INJECTION();
	set_limits(1 << 30, 1 << 30);
	ASSERT_TRUE(make_source(&source, 64 * STORM_ROW_BYTES));
	pad = new_pad(STORM_ROWS, STORM_ROW_BYTES);
	ASSERT_LE(0, pad);

	ASSERT_EQ(1, pwrite(self->make_it_fail, "1", 1, 0));
	created[0] = sweep_create(self);
	opened[0] = device_open(O_RDWR);
	reopened[0] = device_open_reader(pad);
	for (unsigned int i = 0; i < STORM_APPENDS; i++) {
		uint64_t rows = i % 50 ? 1 : 64;

		if (len + rows > STORM_ROWS) {
			/* a clear, and half a pad given back */
			len = truncates % 2 ? STORM_ROWS / 2 : 0;
			truncates++;
			truncated += !device_truncate(pad, len, truncates % 4 ?
							 0 : KVSCRATCH_TRUNCATE_ZERO);
		}
		appended += !append_by(i % NR_WAYS, &source, pad, rows * STORM_ROW_BYTES);
		len += rows;
	}
	created[1] = sweep_create(self);
	opened[1] = device_open(O_RDWR);
	reopened[1] = device_open_reader(pad);
	ASSERT_EQ(1, pwrite(self->make_it_fail, "0", 1, 0));

	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(-ENOMEM, created[i]);
		EXPECT_EQ(-ENOMEM, opened[i]);
		EXPECT_EQ(-ENOMEM, reopened[i]);
	}
	EXPECT_EQ(STORM_APPENDS, appended);
	EXPECT_EQ(truncates, truncated);
	EXPECT_EQ(len, len_of(pad));
	TH_LOG("%u appends and %u truncates while every allocation failed", appended, truncated);
	close(pad);
	drop_source(&source);
}

/* What the kernel itself counts, on every kernel */

#define EVENT_ROW_BYTES 512

FIXTURE(events) {
	struct allocation_meter meter;
};

FIXTURE_SETUP(events) {
	open_allocation_meter(_metadata, &self->meter);
}

FIXTURE_TEARDOWN(events) {
	close_allocation_meter(&self->meter);
}

/* Appends of all ways and several sizes, and truncates; 0 when all did what they should */
static int append_and_truncate(struct source *source, int pad, int converting)
{
	const uint32_t rows[] = { 1, 3, 8, 17, 700 };
	int failed = 0;

	for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
		for (unsigned int n = 0; n < 20 * NR_WAYS; n++) {
			failed |= append_by(n % NR_WAYS, source, pad, rows[i] * EVENT_ROW_BYTES);
			failed |= device_truncate(pad, n % 2, n % 3 ? 0 :
						     KVSCRATCH_TRUNCATE_ZERO);
			failed |= device_truncate(pad, 0, 0);
		}
	}
	for (unsigned int n = 0; n < NR_WAYS; n++) {
		failed |= append_by(n, source, converting, 100 * EVENT_ROW_BYTES);
		failed |= device_truncate(converting, 0, KVSCRATCH_TRUNCATE_ZERO);
	}
	/* what is refused costs nothing either */
	failed |= append_by(BY_WRITE, source, pad, 1001 * EVENT_ROW_BYTES) != -ENOSPC;
	failed |= append_by(BY_WRITE, source, pad, 1) != -EINVAL;
	return failed;
}

TEST_F_TIMEOUT(events, appends_allocate_nothing, TEST_SECONDS)
{
	uint64_t fewest = UINT64_MAX, before[REQUIRED_EVENTS];
	int converting = device_create_scaled(100, EVENT_ROW_BYTES / sizeof(float),
					      KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	int pad = new_pad(1000, EVENT_ROW_BYTES);
	int handle;
	struct watchers watchers;
	struct source source;
	struct kvscratch_view view;

	ASSERT_LE(0, converting);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
	ASSERT_TRUE(make_source(&source, 1001 * EVENT_ROW_BYTES));

	/* each meter works: the pad, the kernel's bookkeeping, the pages */
	for (size_t i = 0; i < REQUIRED_EVENTS; i++)
		before[i] = count_event(self->meter.fds[i]);
	handle = new_pad(64, 4096);
	ASSERT_LE(0, handle);
	for (size_t i = 0; i < REQUIRED_EVENTS; i++) {
		EXPECT_LT(before[i], count_event(self->meter.fds[i]))
			TH_LOG("%s", allocation_events[i]);
	}
	close(handle);
	ASSERT_TRUE(watch(&watchers, pad));
	ASSERT_EQ(0, device_map(pad, &view));

	/* An interrupt that allocates counts as ours: not in every batch. */
	for (int batch = 0; batch < 20 && fewest; batch++) {
		uint64_t first = count_allocations(&self->meter), events;
		int failed = append_and_truncate(&source, pad, converting);

		events = count_allocations(&self->meter) - first;
		ASSERT_EQ(0, failed);
		if (events < fewest)
			fewest = events;
	}
	EXPECT_EQ(0, fewest);
	device_unmap(&view);
	unwatch(&watchers);
	drop_source(&source);
	close(converting);
	close(pad);
}

TEST_HARNESS_MAIN
