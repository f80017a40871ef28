// SPDX-License-Identifier: GPL-2.0-only
/*
 * read(), lseek() and poll(): the committed rows as a byte stream, and every
 * way to learn that something changed.
 */
#include "common.h"

#include <sched.h>
#include <sys/epoll.h>

#define ROW_BYTES 48u
#define ROWS 100u

FIXTURE(reader)
{
	int pad;
	int reader;
};

FIXTURE_SETUP(reader)
{
	self->pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	self->reader = device_open_reader(self->pad);
	ASSERT_LE(0, self->reader);
}

FIXTURE_TEARDOWN(reader)
{
	close(self->reader);
	close(self->pad);
}

TEST_F(reader, a_byte_stream_of_committed_rows)
{
	uint8_t rows[ROWS * ROW_BYTES], back[sizeof(rows)];
	struct iovec iov[2] = { { back, 1 }, { back + 1, ROW_BYTES } };

	for (uint32_t i = 0; i < ROWS; i++)
		fill_row(rows + i * ROW_BYTES, ROW_BYTES, i);
	EXPECT_EQ(0, read(self->reader, back, sizeof(back)));
	ASSERT_EQ(0, device_append(self->pad, rows, 5 * ROW_BYTES));
	EXPECT_EQ(7, read(self->reader, back, 7));
	EXPECT_EQ(5 * ROW_BYTES - 7, read(self->reader, back + 7, sizeof(back) - 7));
	EXPECT_EQ(0, memcmp(back, rows, 5 * ROW_BYTES));
	EXPECT_EQ(0, read(self->reader, back, 1));
	/* the end is not an end for ever */
	ASSERT_EQ(0, device_append(self->pad, rows + 5 * ROW_BYTES, ROW_BYTES));
	EXPECT_EQ(ROW_BYTES, read(self->reader, back, sizeof(back)));
	EXPECT_TRUE(row_is(back, ROW_BYTES, 5));

	EXPECT_EQ(0, pread(self->reader, back, 0, 0));
	EXPECT_EQ(ROW_BYTES, pread(self->reader, back, ROW_BYTES, 2 * ROW_BYTES));
	EXPECT_TRUE(row_is(back, ROW_BYTES, 2));
	EXPECT_EQ(1, pread(self->reader, back, 5, 6 * ROW_BYTES - 1));
	EXPECT_EQ(rows[6 * ROW_BYTES - 1], back[0]);
	EXPECT_EQ(0, pread(self->reader, back, 5, 6 * ROW_BYTES));
	EXPECT_EQ(0, pread(self->reader, back, 5, (off_t)0x7ffffffe));
	EXPECT_ERRNO(EINVAL, pread(self->reader, back, 5, -1));
	EXPECT_EQ(1 + ROW_BYTES, preadv(self->reader, iov, 2, 3 * ROW_BYTES));
	EXPECT_EQ(0, memcmp(back, rows + 3 * ROW_BYTES, 1 + ROW_BYTES));
	/* pread left the position alone */
	EXPECT_EQ(6 * ROW_BYTES, lseek(self->reader, 0, SEEK_CUR));
}

TEST_F(reader, a_read_into_a_hole_is_short)
{
	uint8_t *to = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ssize_t got;

	ASSERT_NE(MAP_FAILED, to);
	ASSERT_EQ(0, mprotect(to + 4096, 4096, PROT_NONE));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 10));
	got = read(self->reader, to + 4096 - 20, 100);
	/* arm64 copies 16 bytes or none of them */
	EXPECT_LE(16, got);
	EXPECT_GE(20, got);
	EXPECT_EQ(got, lseek(self->reader, 0, SEEK_CUR));
	EXPECT_ERRNO(EFAULT, read(self->reader, to + 4096, 100));
	EXPECT_EQ(got, lseek(self->reader, 0, SEEK_CUR));
	munmap(to, 8192);
}

TEST_F(reader, lseek)
{
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 4));
	EXPECT_EQ(4 * ROW_BYTES, lseek(self->reader, 0, SEEK_END));
	EXPECT_EQ(3 * ROW_BYTES, lseek(self->reader, -(off_t)ROW_BYTES, SEEK_END));
	EXPECT_EQ(ROW_BYTES, lseek(self->reader, -2 * (off_t)ROW_BYTES, SEEK_CUR));
	EXPECT_EQ(ROWS * ROW_BYTES, lseek(self->reader, ROWS * ROW_BYTES, SEEK_SET));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, ROWS * ROW_BYTES + 1, SEEK_SET));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, -1, SEEK_SET));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, 0, SEEK_DATA));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, 0, SEEK_HOLE));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, 0, 99));
	EXPECT_EQ(ROWS * ROW_BYTES, lseek(self->reader, 0, SEEK_CUR));
}

TEST_F(reader, the_position_belongs_to_the_open_file)
{
	int twin = dup(self->reader);
	int other = device_open_reader(self->pad);
	uint8_t row[ROW_BYTES];

	ASSERT_LE(0, twin);
	ASSERT_LE(0, other);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	EXPECT_EQ(ROW_BYTES, read(self->reader, row, ROW_BYTES));
	EXPECT_EQ(ROW_BYTES, read(twin, row, ROW_BYTES));
	EXPECT_TRUE(row_is(row, ROW_BYTES, 1));
	EXPECT_EQ(ROW_BYTES, read(other, row, ROW_BYTES));
	EXPECT_TRUE(row_is(row, ROW_BYTES, 0));
	close(twin);
	close(other);
}

/*
 * A pread beside truncates and appends: all rows of one read belong to one
 * generation. Each generation is one append of all rows, all alike.
 */
#define TORN_ROWS 64u
#define TORN_ROW_BYTES 4096u
#define TORN_BYTES (TORN_ROWS * TORN_ROW_BYTES)
#define TORN_READS 200

static void rewrite_for_ever(int pad)
{
	uint8_t *rows = malloc(TORN_BYTES);

	if (!rows)
		_exit(1);
	for (uint8_t round = 1;; round++) {
		memset(rows, round, TORN_BYTES);
		if (device_truncate(pad, 0, round % 4 ? 0 : KVSCRATCH_TRUNCATE_ZERO) ||
		    device_append(pad, rows, TORN_BYTES))
			_exit(1);
	}
}

TEST_F_TIMEOUT(reader, pread_never_mixes_generations, TEST_SECONDS)
{
	int pad = new_pad(TORN_ROWS, TORN_ROW_BYTES);
	uint8_t *rows = malloc(TORN_BYTES);
	unsigned int full = 0;
	uint64_t generation;
	pid_t writer;

	ASSERT_LE(0, pad);
	ASSERT_NE(NULL, rows);
	writer = fork_child();
	ASSERT_LE(0, writer);
	if (!writer)
		rewrite_for_ever(pad);
	while (full < TORN_READS) {
		ssize_t got = pread(pad, rows, TORN_BYTES, 0);

		/* between a truncate and its append there are no rows */
		if (got == 0)
			continue;
		ASSERT_EQ(TORN_BYTES, got);
		ASSERT_EQ(0, memcmp(rows, rows + 1, TORN_BYTES - 1));
		full++;
	}
	generation = generation_of(pad);
	kill(writer, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, wait_for(writer));
	/* reads that met no truncate would prove nothing */
	EXPECT_LT(10, generation);
	free(rows);
	close(pad);
}

/*
 * A read that a truncate comes into, deterministically: the reader is stopped
 * where the second part of its buffer begins. What it has by then is good.
 */
#define PIECE_BYTES (2u << 20)

static void read_until_stopped(int pad, int sock)
{
	const char *const name = "uffd";
	uint8_t *to = mmap(NULL, 2 * PIECE_BYTES, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int uffd;

	CHILD_CHECK(to != MAP_FAILED);
	memset(to, 0, PIECE_BYTES);
	uffd = stop_at(to + PIECE_BYTES, PIECE_BYTES);
	CHILD_CHECK(!kvscratch_send_handles(sock, &name, &uffd, 1));
	CHILD_CHECK(pread(pad, to, 2 * PIECE_BYTES, 0) == PIECE_BYTES);
	for (uint32_t row = 0; row < PIECE_BYTES / TORN_ROW_BYTES; row++)
		CHILD_CHECK(row_is(to + row * TORN_ROW_BYTES, TORN_ROW_BYTES, row));
	_exit(0);
}

TEST_F_TIMEOUT(reader, a_truncate_ends_a_long_read, TEST_SECONDS)
{
	const uint32_t rows = 2 * PIECE_BYTES / TORN_ROW_BYTES;
	int pad = new_pad(rows, TORN_ROW_BYTES);
	struct uffdio_zeropage zeros;
	struct uffd_msg msg;
	struct child child;
	char name[16];
	int uffd;

	ASSERT_LE(0, pad);
	ASSERT_EQ(0, append_rows(pad, TORN_ROW_BYTES, 0, rows));
	if (start_child(&child))
		read_until_stopped(pad, child.line);
	ASSERT_EQ(1, kvscratch_receive_handles(child.line, name, sizeof(name), &uffd, 1));
	ASSERT_EQ(sizeof(msg), read(uffd, &msg, sizeof(msg)));
	/* not even one that drops a row */
	ASSERT_EQ(0, device_truncate(pad, rows, 0));
	zeros = (struct uffdio_zeropage) {
		.range = { .start = msg.arg.pagefault.address & ~4095ull, .len = PIECE_BYTES },
	};
	ASSERT_EQ(0, ioctl(uffd, UFFDIO_ZEROPAGE, &zeros));
	EXPECT_EQ(0, end_child(&child));
	close(uffd);
	close(pad);
}

static short polled(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLPRI | POLLRDNORM | POLLWRNORM };

	return poll(&p, 1, 0) < 0 ? -1 : p.revents;
}

#define READABLE (POLLIN | POLLRDNORM)
#define WRITABLE (POLLOUT | POLLWRNORM)

TEST_F(reader, poll_reports_rows_and_room)
{
	EXPECT_EQ(WRITABLE, polled(self->reader));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	EXPECT_EQ(READABLE | WRITABLE, polled(self->reader));
	/* acknowledged one, and both */
	EXPECT_EQ(ROW_BYTES, lseek(self->reader, ROW_BYTES, SEEK_SET));
	EXPECT_EQ(READABLE | WRITABLE, polled(self->reader));
	EXPECT_EQ(2 * ROW_BYTES, lseek(self->reader, 2 * ROW_BYTES, SEEK_SET));
	EXPECT_EQ(WRITABLE, polled(self->reader));
	/* full */
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 2, ROWS - 2));
	EXPECT_EQ(READABLE, polled(self->reader));
	EXPECT_EQ(ROWS * ROW_BYTES, lseek(self->reader, 0, SEEK_END));
	EXPECT_EQ(0, polled(self->reader));
}

/* As many rows as before, but not the same ones */
TEST_F(reader, poll_sees_a_rollback)
{
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	EXPECT_EQ(3 * ROW_BYTES, lseek(self->reader, 3 * ROW_BYTES, SEEK_SET));
	EXPECT_EQ(WRITABLE, polled(self->reader));
	ASSERT_EQ(0, device_truncate(self->pad, 2, 0));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 7, 1));
	EXPECT_EQ(WRITABLE | POLLPRI, polled(self->reader));
	/* other ways to move the position take no note of it */
	EXPECT_EQ(3 * ROW_BYTES, lseek(self->reader, 0, SEEK_CUR));
	EXPECT_EQ(3 * ROW_BYTES, lseek(self->reader, 0, SEEK_END));
	EXPECT_EQ(WRITABLE | POLLPRI, polled(self->reader));
	EXPECT_ERRNO(EINVAL, lseek(self->reader, ROWS * ROW_BYTES + 1, SEEK_SET));
	EXPECT_EQ(WRITABLE | POLLPRI, polled(self->reader));
	EXPECT_EQ(3 * ROW_BYTES, lseek(self->reader, 3 * ROW_BYTES, SEEK_SET));
	EXPECT_EQ(WRITABLE, polled(self->reader));
	/* each handle has seen what it has seen */
	EXPECT_EQ(READABLE | WRITABLE | POLLPRI, polled(self->pad));
}

/*
 * Acknowledge, look, sleep: beside rollbacks that leave the length as it was. A
 * rollback that goes unseen leaves the watcher asleep and the writer waiting.
 */
#define ROLLBACKS 1000

static void watch_generations(int reader, uint32_t *seen)
{
	struct pollfd p = { .fd = reader, .events = POLLIN | POLLPRI };
	struct kvscratch_view view;

	CHILD_CHECK(!device_map(reader, &view));
	for (;;) {
		uint64_t state;

		CHILD_CHECK(lseek(reader, 2 * ROW_BYTES, SEEK_SET) == 2 * ROW_BYTES);
		state = kvscratch_view_state(&view);
		__atomic_store_n(seen, kvscratch_state_generation(state), __ATOMIC_RELEASE);
		CHILD_CHECK(poll(&p, 1, -1) == 1);
	}
}

TEST_F_TIMEOUT(reader, no_rollback_goes_unseen, TEST_SECONDS)
{
	uint32_t *seen = mmap(NULL, sizeof(*seen), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct child watcher;

	ASSERT_NE(MAP_FAILED, (void *)seen);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	if (start_child(&watcher))
		watch_generations(self->reader, seen);
	for (uint32_t generation = 1; generation <= ROLLBACKS; generation++) {
		ASSERT_EQ(0, device_truncate(self->pad, 1, 0));
		ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, generation, 1));
		while (__atomic_load_n(seen, __ATOMIC_ACQUIRE) != generation)
			sched_yield();
	}
	kill(watcher.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&watcher));
	munmap(seen, sizeof(*seen));
}

TEST_F(reader, unbound_is_pollerr_and_bound_never)
{
	int fd = device_open(O_RDWR);

	ASSERT_LE(0, fd);
	EXPECT_EQ(POLLERR, polled(fd));
	ASSERT_EQ(0, device_attach(fd, self->pad));
	EXPECT_EQ(WRITABLE, polled(fd));
	/* not at the end of the others either */
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, ROWS));
	close(self->reader);
	close(self->pad);
	EXPECT_EQ(READABLE, polled(fd));
	close(fd);
}

/* Children that sleep in poll() until what they wait for happens */

static pid_t fork_poller(int fd, short events)
{
	pid_t pid = fork_child();
	struct pollfd p = { .fd = fd, .events = events };

	if (pid)
		return pid;
	_exit(poll(&p, 1, -1) == 1 && p.revents == events ? 0 : 1);
}

TEST_F_TIMEOUT(reader, sleepers_are_woken, TEST_SECONDS)
{
	pid_t for_rows, for_room, for_truncate;

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, ROWS - 1));
	EXPECT_EQ((ROWS - 1) * ROW_BYTES, lseek(self->reader, 0, SEEK_END));
	for_rows = fork_poller(self->reader, POLLIN);
	ASSERT_LE(0, for_rows);
	await_sleep(for_rows);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	EXPECT_EQ(0, wait_for(for_rows));

	for_room = fork_poller(self->reader, POLLOUT);
	ASSERT_LE(0, for_room);
	for_truncate = fork_poller(self->reader, POLLPRI);
	ASSERT_LE(0, for_truncate);
	await_sleep(for_room);
	await_sleep(for_truncate);
	ASSERT_EQ(0, device_truncate(self->pad, ROWS - 1, 0));
	EXPECT_EQ(0, wait_for(for_room));
	EXPECT_EQ(0, wait_for(for_truncate));
}

/* There is no wait queue before CREATE; EPOLLERR says so instead of silence. */
TEST_F(reader, epoll_before_create_reports_an_error)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = 7 };
	int fd = device_open(O_RDWR);
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	ASSERT_LE(0, fd);
	ASSERT_LE(0, epoll);
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
	event = (struct epoll_event) { 0 };
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, 0));
	EXPECT_EQ(EPOLLERR, event.events);

	/* bind first, then add: from there on nothing is missed */
	ASSERT_EQ(0, device_create(fd, ROWS, ROW_BYTES, KVSCRATCH_DTYPE_U8));
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL));
	event.events = EPOLLIN;
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));
	ASSERT_EQ(0, append_rows(fd, ROW_BYTES, 0, 1));
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, 0));
	EXPECT_EQ(EPOLLIN, event.events);
	close(fd);
	close(epoll);
}

TEST_F(reader, edge_triggered_epoll_reports_each_append)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLPRI | EPOLLET };
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	ASSERT_LE(0, epoll);
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, self->reader, &event));
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));
	for (uint32_t i = 0; i < 3; i++) {
		ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, i, 1));
		EXPECT_EQ(1, epoll_wait(epoll, &event, 1, 0));
		EXPECT_EQ(EPOLLIN, event.events);
		EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));
	}
	ASSERT_EQ(0, device_truncate(self->pad, 3, 0));
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, 0));
	EXPECT_EQ(EPOLLIN | EPOLLPRI, event.events);
	close(epoll);
}

TEST_HARNESS_MAIN
