// SPDX-License-Identifier: GPL-2.0-only
/*
 * write(), writev() and io_uring: whole rows, all or nothing, whatever the
 * source does and whoever is killed.
 */
#include "common.h"
#include "ring.h"

#include <sched.h>
#include <sys/inotify.h>
#include <time.h>

#define ROW_BYTES 4096u
#define ROWS 64u

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

FIXTURE(append)
{
	int pad;
	struct kvscratch_view view;
};

FIXTURE_SETUP(append)
{
	self->pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_map(self->pad, &self->view));
}

FIXTURE_TEARDOWN(append)
{
	device_unmap(&self->view);
	close(self->pad);
}

static const uint8_t *view_row(const struct kvscratch_view *view, uint32_t row)
{
	return (const uint8_t *)view->data + (size_t)row * ROW_BYTES;
}

/* Rows with seeds 0 .. ROWS - 1 in fresh memory */
static uint8_t *source_rows(void)
{
	uint8_t *rows = mmap(NULL, ROWS * ROW_BYTES, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (rows == MAP_FAILED)
		abort();
	for (uint32_t i = 0; i < ROWS; i++)
		fill_row(rows + i * ROW_BYTES, ROW_BYTES, i);
	return rows;
}

TEST_F(append, whole_rows_only)
{
	uint8_t *rows = source_rows();

	EXPECT_EQ(0, write(self->pad, rows, 0));
	EXPECT_ERRNO(EINVAL, write(self->pad, rows, 1));
	EXPECT_ERRNO(EINVAL, write(self->pad, rows, ROW_BYTES - 1));
	EXPECT_ERRNO(EINVAL, write(self->pad, rows, 2 * ROW_BYTES + 1));
	EXPECT_EQ(0, len_of(self->pad));
	EXPECT_EQ(ROW_BYTES, write(self->pad, rows, ROW_BYTES));
	EXPECT_EQ(2 * ROW_BYTES, write(self->pad, rows + ROW_BYTES, 2 * ROW_BYTES));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_EQ(0, memcmp(self->view.data, rows, 3 * ROW_BYTES));
}

TEST_F(append, full_and_overflow)
{
	uint8_t *rows = source_rows();

	ASSERT_EQ(0, device_append(self->pad, rows, (ROWS - 1) * ROW_BYTES));
	EXPECT_ERRNO(ENOSPC, write(self->pad, rows, 2 * ROW_BYTES));
	EXPECT_EQ(ROWS - 1, len_of(self->pad));
	EXPECT_EQ(ROW_BYTES, write(self->pad, rows, ROW_BYTES));
	EXPECT_ERRNO(ENOSPC, write(self->pad, rows, ROW_BYTES));
	EXPECT_EQ(ROWS, len_of(self->pad));
}

TEST_F(append, writev_is_one_append)
{
	uint8_t *rows = source_rows();
	struct iovec iov[] = {
		{ rows, 1 },
		{ rows + 1, 0 },
		{ rows + 1, ROW_BYTES - 2 },
		{ rows + ROW_BYTES - 1, 2 * ROW_BYTES + 1 },
	};

	EXPECT_ERRNO(EINVAL, writev(self->pad, iov, 3));
	EXPECT_EQ(3 * ROW_BYTES, writev(self->pad, iov, 4));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_EQ(0, memcmp(self->view.data, rows, 3 * ROW_BYTES));
	/* the last segment is bad: nothing of the others is kept */
	iov[3].iov_base = NULL;
	EXPECT_ERRNO(EFAULT, writev(self->pad, iov, 4));
	EXPECT_EQ(3, len_of(self->pad));
}

TEST_F(append, the_position_stays)
{
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 4));
	EXPECT_EQ(0, lseek(self->pad, 0, SEEK_CUR));
	EXPECT_EQ(2 * ROW_BYTES, lseek(self->pad, 2 * ROW_BYTES, SEEK_SET));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 4, 1));
	EXPECT_EQ(2 * ROW_BYTES, lseek(self->pad, 0, SEEK_CUR));
	EXPECT_EQ(0, fcntl(self->pad, F_SETFL, O_APPEND));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 5, 1));
	EXPECT_EQ(2 * ROW_BYTES, lseek(self->pad, 0, SEEK_CUR));
	EXPECT_EQ(6, len_of(self->pad));
	for (uint32_t i = 0; i < 6; i++)
		EXPECT_TRUE(row_is(view_row(&self->view, i), ROW_BYTES, i));
}

/* One bad page, at every place of a batch */
TEST_F(append, a_hole_in_the_source_commits_nothing)
{
	uint8_t *rows = source_rows();

	ASSERT_EQ(0, device_append(self->pad, rows, ROW_BYTES));
	for (uint32_t hole = 0; hole < ROWS - 1; hole++) {
		ASSERT_EQ(0, mprotect(rows + hole * ROW_BYTES, 4096, PROT_NONE));
		EXPECT_ERRNO(EFAULT, write(self->pad, rows, (ROWS - 1) * ROW_BYTES));
		EXPECT_EQ(1, kvscratch_view_state(&self->view));
		ASSERT_EQ(0, mprotect(rows + hole * ROW_BYTES, 4096, PROT_READ));
	}
	EXPECT_TRUE(row_is(self->view.data, ROW_BYTES, 0));
	/* only the last byte is out of reach */
	ASSERT_EQ(0, mprotect(rows + 2 * ROW_BYTES, 4096, PROT_NONE));
	EXPECT_ERRNO(EFAULT, write(self->pad, rows + 1, 2 * ROW_BYTES));
	EXPECT_EQ(1, len_of(self->pad));
	ASSERT_EQ(0, mprotect(rows + 2 * ROW_BYTES, 4096, PROT_READ));
	EXPECT_EQ((ROWS - 1) * ROW_BYTES, write(self->pad, rows, (ROWS - 1) * ROW_BYTES));
	EXPECT_EQ(0, memcmp(view_row(&self->view, 1), rows, (ROWS - 1) * ROW_BYTES));
}

/* What a failed append and dropped rows leave behind is gone after ZERO. */
/* A batch that is copied in several pieces of 2 MiB */
TEST_F_TIMEOUT(append, a_hole_in_a_large_batch_commits_nothing, TEST_SECONDS)
{
	const size_t row_bytes = 1 << 20, bytes = 5 * row_bytes;
	const size_t holes[] = { 1 << 20, (2 << 20) - 4096, 3 << 20, bytes - 4096 };
	uint8_t *rows = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			     -1, 0);
	struct iovec whole = { .iov_base = rows, .iov_len = bytes };
	struct kvscratch_view view;
	int pad = new_pad(5, row_bytes);

	ASSERT_NE(MAP_FAILED, (void *)rows);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_map(pad, &view));
	for (uint32_t row = 0; row < 5; row++)
		fill_row(rows + row * row_bytes, row_bytes, row);
	for (size_t i = 0; i < ARRAY_SIZE(holes); i++) {
		ASSERT_EQ(0, mprotect(rows + holes[i], 4096, PROT_NONE));
		EXPECT_ERRNO(EFAULT, write(pad, rows, bytes));
		EXPECT_ERRNO(EFAULT, writev(pad, &whole, 1));
		EXPECT_EQ(0, kvscratch_view_state(&view));
		ASSERT_EQ(0, mprotect(rows + holes[i], 4096, PROT_READ));
	}
	EXPECT_EQ((ssize_t)bytes, write(pad, rows, bytes));
	EXPECT_EQ(0, memcmp(view.data, rows, bytes));
	device_unmap(&view);
	close(pad);
	munmap(rows, bytes);
}

TEST_F(append, zero_scrubs_failed_and_dropped_rows)
{
	uint8_t *rows = source_rows();

	ASSERT_EQ(0, device_append(self->pad, rows, 2 * ROW_BYTES));
	ASSERT_EQ(0, mprotect(rows + 20 * ROW_BYTES, 4096, PROT_NONE));
	EXPECT_ERRNO(EFAULT, write(self->pad, rows, 40 * ROW_BYTES));
	/* without this the test would show nothing */
	EXPECT_FALSE(all_zero(view_row(&self->view, 2), ROW_BYTES));
	ASSERT_EQ(0, device_truncate(self->pad, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(row_is(self->view.data, ROW_BYTES, 0));
	EXPECT_TRUE(all_zero(view_row(&self->view, 1), (ROWS - 1) * ROW_BYTES));

	/* dropped by a truncate without ZERO, scrubbed by a later one with it */
	ASSERT_EQ(0, device_append(self->pad, rows, 10 * ROW_BYTES));
	ASSERT_EQ(0, device_truncate(self->pad, 1, 0));
	ASSERT_EQ(0, device_append(self->pad, rows, 2 * ROW_BYTES));
	ASSERT_EQ(0, device_truncate(self->pad, 3, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(0, memcmp(view_row(&self->view, 1), rows, 2 * ROW_BYTES));
	EXPECT_TRUE(all_zero(view_row(&self->view, 3), (ROWS - 3) * ROW_BYTES));
	ASSERT_EQ(0, device_truncate(self->pad, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(all_zero(self->view.data, ROWS * ROW_BYTES));
}

/*
 * The VFS silently cuts a count to INT_MAX rounded down to a page; what arrives
 * then is a whole number of rows and would be half a batch.
 */
TEST(a_write_that_the_vfs_cuts_is_refused)
{
	/* volatile: the compiler knows that such a count makes no sense */
	volatile size_t cut = 0x7ffff000, three_gib = 3u << 30;
	int pad = new_pad(16, 4096);
	struct iovec iov[2];
	char *source;

	ASSERT_LE(0, pad);
	source = mmap(NULL, 1u << 30, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		      -1, 0);
	ASSERT_NE(MAP_FAILED, source);
	iov[0] = (struct iovec) { source, 1u << 30 };
	iov[1] = (struct iovec) { source, 1u << 30 };
	/* the length is refused before a byte is read, so the end need not exist */
	EXPECT_ERRNO(EINVAL, write(pad, (void *)4096, three_gib));
	EXPECT_ERRNO(EINVAL, write(pad, source, cut));
	EXPECT_ERRNO(EINVAL, write(pad, source, cut + 4096));
	EXPECT_ERRNO(EINVAL, writev(pad, iov, 2));
	EXPECT_ERRNO(ENOSPC, write(pad, source, cut - 4096));
	EXPECT_EQ(0, len_of(pad));
	munmap(source, 1u << 30);
	close(pad);
}

/* io_uring */

TEST_F(append, io_uring_appends_whatever_the_offset)
{
	static const uint64_t offsets[] = { 0, UINT64_MAX, 5 * ROW_BYTES, 1, 1ull << 40 };
	uint8_t *rows = source_rows();
	struct iovec iov[] = { { rows, 100 }, { rows + 100, 2 * ROW_BYTES - 100 } };
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = self->pad,
		.addr = (uintptr_t)rows,
		.len = ROW_BYTES,
	};
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	for (uint32_t i = 0; i < 5; i++) {
		sqe.off = offsets[i];
		sqe.addr = (uintptr_t)rows + i * ROW_BYTES;
		EXPECT_EQ(ROW_BYTES, ring_do(&ring, &sqe));
		EXPECT_EQ(i + 1, len_of(self->pad));
	}
	EXPECT_EQ(0, memcmp(self->view.data, rows, 5 * ROW_BYTES));
	EXPECT_EQ(0, lseek(self->pad, 0, SEEK_CUR));

	sqe.opcode = IORING_OP_WRITEV;
	sqe.addr = (uintptr_t)iov;
	sqe.len = 2;
	EXPECT_EQ(2 * ROW_BYTES, ring_do(&ring, &sqe));
	EXPECT_EQ(7, len_of(self->pad));
	EXPECT_EQ(0, memcmp(view_row(&self->view, 5), rows, 2 * ROW_BYTES));

	/* and it fails as write() does */
	sqe.opcode = IORING_OP_WRITE;
	sqe.addr = (uintptr_t)rows;
	sqe.len = ROW_BYTES + 1;
	EXPECT_EQ(-EINVAL, ring_do(&ring, &sqe));
	sqe.len = ROWS * ROW_BYTES;
	EXPECT_EQ(-ENOSPC, ring_do(&ring, &sqe));
	/* from where so much does not go beyond what a process can have */
	sqe.addr = 4096;
	sqe.len = 3u << 30;
	EXPECT_EQ(-EINVAL, ring_do(&ring, &sqe));
	EXPECT_EQ(7, len_of(self->pad));

	sqe = (struct io_uring_sqe) {
		.opcode = IORING_OP_READ,
		.fd = self->pad,
		.addr = (uintptr_t)rows + 10 * ROW_BYTES,
		.len = 2 * ROW_BYTES,
		.off = 5 * ROW_BYTES,
	};
	EXPECT_EQ(2 * ROW_BYTES, ring_do(&ring, &sqe));
	EXPECT_EQ(0, memcmp(rows + 10 * ROW_BYTES, rows, 2 * ROW_BYTES));
	close(ring.fd);
}

TEST_F(append, io_uring_fixed_buffers)
{
	uint8_t *rows = source_rows();
	struct iovec buffer = { rows, ROWS * ROW_BYTES };
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE_FIXED,
		.fd = self->pad,
		.addr = (uintptr_t)rows + ROW_BYTES,
		.len = 3 * ROW_BYTES,
	};
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	ASSERT_EQ(0, syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &buffer, 1));
	EXPECT_EQ(3 * ROW_BYTES, ring_do(&ring, &sqe));
	EXPECT_EQ(0, memcmp(self->view.data, rows + ROW_BYTES, 3 * ROW_BYTES));
	close(ring.fd);
}

/* Threads of this process, io_uring's workers included */
static int nr_tasks(void)
{
	return number_in_file("/proc/self/status", "\nThreads");
}

/* FMODE_NOWAIT: what can be done at once is done by the submitter. */
TEST_F(append, io_uring_needs_no_worker)
{
	uint8_t *rows = source_rows();
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = self->pad,
		.addr = (uintptr_t)rows,
		.len = ROW_BYTES,
	};
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	for (uint32_t i = 0; i < ROWS; i++)
		ASSERT_EQ(ROW_BYTES, ring_do(&ring, &sqe));
	EXPECT_EQ(1, nr_tasks());
	/* control: a request that has to go to a worker makes one */
	sqe.flags = IOSQE_ASYNC;
	EXPECT_EQ(-ENOSPC, ring_do(&ring, &sqe));
	EXPECT_LT(1, nr_tasks());
	close(ring.fd);
}

/* An event for a watcher would be an allocation in each append. */
TEST_F(append, inotify_sees_nothing)
{
	int watch = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	char events[4096];

	ASSERT_LE(0, watch);
	ASSERT_LE(0, inotify_add_watch(watch, KVSCRATCH_DEVICE, IN_ALL_EVENTS));
	ASSERT_LE(0, inotify_add_watch(watch, "/dev", IN_ALL_EVENTS));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	EXPECT_EQ(ROW_BYTES, pread(self->pad, events, ROW_BYTES, 0));
	EXPECT_ERRNO(EAGAIN, read(watch, events, sizeof(events)));
	/* control: another device beside it is seen */
	ASSERT_LE(0, inotify_add_watch(watch, "/dev/null", IN_ALL_EVENTS));
	ASSERT_EQ(1, write(null, "x", 1));
	EXPECT_LT(0, read(watch, events, sizeof(events)));
	close(null);
	close(watch);
}

/* Batches of two writers, each row tagged with its writer, batch and place */

#define WRITER_BATCH 8u
#define WRITER_ROUNDS 48u
#define WRITER_ROW 64u

static void write_batches(int pad, uint32_t writer)
{
	uint32_t batch[WRITER_BATCH][WRITER_ROW / 4];

	for (uint32_t round = 0; round < WRITER_ROUNDS; round++) {
		for (uint32_t i = 0; i < WRITER_BATCH; i++)
			for (uint32_t j = 0; j < WRITER_ROW / 4; j++)
				batch[i][j] = writer << 24 | round << 8 | i;
		if (device_append(pad, batch, sizeof(batch)))
			_exit(1);
	}
	_exit(0);
}

TEST(writers_never_interleave_in_one_write)
{
	const uint32_t batches = 2 * WRITER_ROUNDS;
	int pad = new_pad(batches * WRITER_BATCH, WRITER_ROW);
	uint32_t next_round[2] = { 0, 0 };
	struct kvscratch_view view;
	const uint32_t *words;
	pid_t writers[2];

	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_map(pad, &view));
	for (uint32_t i = 0; i < 2; i++) {
		writers[i] = fork_child();
		ASSERT_LE(0, writers[i]);
		if (!writers[i])
			write_batches(pad, i);
	}
	EXPECT_EQ(0, wait_for(writers[0]));
	EXPECT_EQ(0, wait_for(writers[1]));
	ASSERT_EQ(batches * WRITER_BATCH, len_of(pad));
	words = view.data;
	for (uint32_t batch = 0; batch < batches; batch++) {
		uint32_t writer = words[0] >> 24;

		ASSERT_GT(2, writer);
		for (uint32_t i = 0; i < WRITER_BATCH; i++)
			for (uint32_t j = 0; j < WRITER_ROW / 4; j++)
				ASSERT_EQ(writer << 24 | next_round[writer] << 8 | i, *words++);
		next_round[writer]++;
	}
	device_unmap(&view);
	close(pad);
}

/*
 * SIGKILL at random moments of large writes: what is committed is whole
 * batches. A batch is longer than the pieces after which a copy looks for
 * signals.
 */
#define KILL_ROUNDS 60
#define KILL_BATCH_ROWS 2048u
#define KILL_BATCHES 3u

static void append_until_killed(int pad)
{
	uint8_t *rows = malloc((size_t)KILL_BATCH_ROWS * ROW_BYTES);

	for (uint32_t i = 0; rows && i < KILL_BATCH_ROWS; i++)
		fill_row(rows + (size_t)i * ROW_BYTES, ROW_BYTES, i);
	for (;;) {
		int err = device_append(pad, rows, (size_t)KILL_BATCH_ROWS * ROW_BYTES);

		if (err == -ENOSPC)
			err = device_truncate(pad, 0, 0);
		if (err)
			_exit(1);
	}
}

TEST_F_TIMEOUT(append, sigkill_commits_whole_batches, TEST_SECONDS)
{
	const uint32_t rows = KILL_BATCHES * KILL_BATCH_ROWS;
	struct kvscratch_view view;
	uint32_t random = 1;
	int partial = 0;
	int pad = new_pad(rows, ROW_BYTES);

	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_map(pad, &view));
	for (int round = 0; round < KILL_ROUNDS; round++) {
		uint64_t seen = kvscratch_view_state(&view);
		uint32_t len;
		pid_t writer;

		writer = fork_child();
		ASSERT_LE(0, writer);
		if (!writer)
			append_until_killed(pad);
		/* it is at work once the state has moved; then any moment will do */
		while (kvscratch_view_state(&view) == seen)
			sched_yield();
		random = random * 1103515245 + 12345;
		for (volatile uint32_t spin = random >> 12 & 0x7ffff; spin; spin--)
			;
		ASSERT_EQ(0, kill(writer, SIGKILL));
		ASSERT_EQ(128 + SIGKILL, wait_for(writer));

		len = kvscratch_state_len(kvscratch_view_state(&view));
		ASSERT_EQ(0, len % KILL_BATCH_ROWS);
		for (uint32_t i = 0; i < len; i += 97)
			ASSERT_TRUE(row_is(view_row(&view, i), ROW_BYTES, i % KILL_BATCH_ROWS));
		/* was a batch under way? then its first rows lie beyond len */
		if (len < rows && !all_zero(view_row(&view, len), ROW_BYTES))
			partial++;
		ASSERT_EQ(0, device_truncate(pad, 0, KVSCRATCH_TRUNCATE_ZERO));
	}
	/* kills that never hit the middle of a write would prove nothing */
	EXPECT_LT(0, partial);
	device_unmap(&view);
	close(pad);
}

/*
 * A writer whose source page does not arrive: its memory is registered with
 * userfaultfd, and nobody serves the fault.
 */

FIXTURE(stuck)
{
	int pad;
	int uffd;
	uint8_t *source;
	pid_t writer;
	struct kvscratch_view view;
};

#define STUCK_ROWS 4

static void write_from_a_page_that_never_comes(int pad, void *source, int sock)
{
	const char *const name = "uffd";
	int uffd = stop_at(source, STUCK_ROWS * ROW_BYTES);

	CHILD_CHECK(!kvscratch_send_handles(sock, &name, &uffd, 1));
	_exit(device_append(pad, source, STUCK_ROWS * ROW_BYTES) ? 2 : 0);
}

FIXTURE_SETUP(stuck)
{
	int socks[2];
	char name[16];

	self->pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_map(self->pad, &self->view));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, socks));
	/* untouched, so that each process has its own, at the same address */
	self->source = mmap(NULL, STUCK_ROWS * ROW_BYTES, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->source);
	self->writer = fork_child();
	ASSERT_LE(0, self->writer);
	if (!self->writer)
		write_from_a_page_that_never_comes(self->pad, self->source, socks[1]);
	ASSERT_EQ(1, kvscratch_receive_handles(socks[0], name, sizeof(name), &self->uffd, 1));
	/* the event says that the writer now waits inside its copy */
	ASSERT_TRUE(await_stop(self->uffd));
	close(socks[0]);
	close(socks[1]);
}

FIXTURE_TEARDOWN(stuck)
{
	kill(self->writer, SIGKILL);
	wait_for(self->writer);
	munmap(self->source, STUCK_ROWS * ROW_BYTES);
	device_unmap(&self->view);
	close(self->uffd);
	close(self->pad);
}

TEST_F_TIMEOUT(stuck, readers_do_not_wait, TEST_SECONDS)
{
	uint8_t row[ROW_BYTES];
	struct pollfd poll_in = { .fd = self->pad, .events = POLLIN | POLLOUT | POLLPRI };
	struct kvscratch_view view;
	char path[64];
	int reader, fd;

	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(2, kvscratch_view_state(&self->view));
	EXPECT_EQ(ROW_BYTES, pread(self->pad, row, ROW_BYTES, ROW_BYTES));
	EXPECT_TRUE(row_is(row, ROW_BYTES, 1));
	EXPECT_EQ(1, poll(&poll_in, 1, -1));
	EXPECT_EQ(POLLIN | POLLOUT, poll_in.revents);
	EXPECT_EQ(ROW_BYTES, lseek(self->pad, ROW_BYTES, SEEK_SET));
	reader = device_open_reader(self->pad);
	ASSERT_LE(0, reader);
	EXPECT_EQ(0, device_map(reader, &view));
	EXPECT_TRUE(row_is(view.data, ROW_BYTES, 0));
	device_unmap(&view);
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", reader);
	fd = open(path, O_RDONLY);
	ASSERT_LE(0, fd);
	EXPECT_LT(0, read(fd, row, sizeof(row)));
	close(fd);
	close(reader);
}

TEST_F_TIMEOUT(stuck, nowait_is_eagain, TEST_SECONDS)
{
	uint8_t *rows = source_rows();
	struct iovec iov = { rows, ROW_BYTES };

	EXPECT_ERRNO(EAGAIN, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	kill(self->writer, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, wait_for(self->writer));
	/* its pad is free again and nothing of its rows was committed */
	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(ROW_BYTES, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_TRUE(row_is(view_row(&self->view, 2), ROW_BYTES, 0));
}

/*
 * What io_uring relies on: it meets EAGAIN by polling for room, and has to come
 * again also when the append in its way took the last row.
 */
TEST_F_TIMEOUT(stuck, epollout_after_eagain, TEST_SECONDS)
{
	uint8_t *rows = source_rows();
	struct iovec iov = { rows, ROW_BYTES };
	struct pollfd room = { .fd = self->pad, .events = POLLOUT };
	int other = device_open(O_RDWR);

	ASSERT_LE(0, other);
	ASSERT_EQ(0, device_attach(other, self->pad));
	for (int i = 0; i < 2; i++)
		EXPECT_ERRNO(EAGAIN, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	kill(self->writer, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, wait_for(self->writer));
	ASSERT_EQ(0, append_rows(other, ROW_BYTES, 0, ROWS - 2));

	/* each of the two gets its answer */
	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(1, poll(&room, 1, 0));
		EXPECT_ERRNO(ENOSPC, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	}
	EXPECT_EQ(0, poll(&room, 1, 0));
	close(other);
}

static void ignore_signal(int signal)
{
	(void)signal;
}

/* Append one row and exit with 0, or with the errno */
static pid_t fork_appender(int pad, int restart)
{
	struct sigaction action = { .sa_handler = ignore_signal, .sa_flags = restart };
	uint8_t row[ROW_BYTES];
	pid_t pid;

	fill_row(row, ROW_BYTES, 9);
	sigaction(SIGUSR1, &action, NULL);
	pid = fork_child();
	if (pid)
		return pid;
	_exit(write(pad, row, ROW_BYTES) == ROW_BYTES ? 0 : errno);
}

TEST_F_TIMEOUT(stuck, a_second_writer_waits_its_turn, TEST_SECONDS)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)self->source,
		.src = (uintptr_t)source_rows(),
		.len = STUCK_ROWS * ROW_BYTES,
	};
	pid_t second = fork_appender(self->pad, 0);

	ASSERT_LE(0, second);
	await_sleep(second);
	EXPECT_EQ(2, len_of(self->pad));
	ASSERT_EQ(0, ioctl(self->uffd, UFFDIO_COPY, &copy));
	EXPECT_EQ(0, wait_for(self->writer));
	EXPECT_EQ(0, wait_for(second));
	/* the whole batch of the first, then the row of the second */
	ASSERT_EQ(2 + STUCK_ROWS + 1, len_of(self->pad));
	for (uint32_t row = 0; row < STUCK_ROWS; row++)
		EXPECT_TRUE(row_is(view_row(&self->view, 2 + row), ROW_BYTES, row));
	EXPECT_TRUE(row_is(view_row(&self->view, 2 + STUCK_ROWS), ROW_BYTES, 9));
}

TEST_F_TIMEOUT(stuck, writers_wait_interruptibly, TEST_SECONDS)
{
	pid_t interrupted = fork_appender(self->pad, 0);
	pid_t restarted = fork_appender(self->pad, SA_RESTART);
	pid_t killed = fork_child();
	int status = 0;

	ASSERT_LE(0, killed);
	if (!killed)
		_exit(device_truncate(self->pad, 0, 0) ? 1 : 0);
	await_sleep(interrupted);
	await_sleep(restarted);
	await_sleep(killed);
	EXPECT_EQ(0, kill(restarted, SIGUSR1));
	/* it may not have been in the call yet: a signal that comes early is lost */
	while (!waitpid(interrupted, &status, WNOHANG)) {
		kill(interrupted, SIGUSR1);
		sched_yield();
	}
	EXPECT_TRUE(WIFEXITED(status));
	EXPECT_EQ(EINTR, WEXITSTATUS(status));
	EXPECT_EQ(0, kill(killed, SIGKILL));
	EXPECT_EQ(128 + SIGKILL, wait_for(killed));
	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(0, generation_of(self->pad));

	EXPECT_EQ(0, kill(self->writer, SIGKILL));
	EXPECT_EQ(0, wait_for(restarted));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_TRUE(row_is(view_row(&self->view, 2), ROW_BYTES, 9));
}

TEST_HARNESS_MAIN
