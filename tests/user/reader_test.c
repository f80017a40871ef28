// SPDX-License-Identifier: GPL-2.0-only
/*
 * read(), lseek() and poll(): the committed rows as a byte stream, and every
 * way to learn that something changed.
 */
#include "ring.h"
#include "stall.h"

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

/* A stored token is a row of each plane in turn, the scales of MXINT8 behind its elements. */
TEST_F(reader, a_byte_stream_of_tokens)
{
	const struct kvscratch_plane planes[] = {
		{ .dim = 3, .dtype = KVSCRATCH_DTYPE_F32 },
		{ .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8 },
		{ .dim = 4093, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = 1, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	const size_t token = 12 + 66 + 4093 + 1, bytes = 5 * token;
	/* around the edges of planes, elements and scales */
	const size_t places[] = {
		0, 1, 11, 12, 13, 75, 76, 77, 78, 79, 4095, 4096, 4170, 4171, 4172, 4173, 4184,
		3 * token, bytes - 1,
	};
	uint8_t *tokens = malloc(bytes), *back = malloc(2 * bytes);
	struct kvscratch_pad_info info;
	int pad = device_create_planes(7, planes, ARRAY_SIZE(planes));

	ASSERT_NE(NULL, tokens);
	ASSERT_NE(NULL, back);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_pad_info(pad, &info));
	ASSERT_EQ(token, info.row_bytes);
	fill_row(tokens, bytes, 1);
	ASSERT_EQ(0, device_append(pad, tokens, bytes));
	for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
		for (size_t j = i; j < ARRAY_SIZE(places); j++) {
			size_t want = places[j] - places[i] + 1;

			memset(back, 0, bytes);
			ASSERT_EQ((ssize_t)want, pread(pad, back, want, places[i]));
			ASSERT_EQ(0, memcmp(back, tokens + places[i], want))
				TH_LOG("%zu bytes at %zu", want, places[i]);
		}
		ASSERT_EQ((ssize_t)(bytes - places[i]), pread(pad, back, 2 * bytes, places[i]));
	}
	EXPECT_EQ((off_t)bytes, lseek(pad, 0, SEEK_END));
	free(back);
	free(tokens);
	close(pad);
}

/*
 * A pread beside truncates and appends: all rows of one read belong to one
 * generation. Each generation is one append of all rows, all alike. A read that
 * finds its rows gone ends behind those that it has.
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
		ASSERT_LE(0, got);
		ASSERT_EQ(0, got % TORN_ROW_BYTES);
		if (!got)
			continue;
		ASSERT_EQ(0, memcmp(rows, rows + 1, got - 1));
		if (got == TORN_BYTES)
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
#define PIECE_ROWS (PIECE_BYTES / TORN_ROW_BYTES)

/* How many pieces it gives, each of rows with their own number as seed */
static int stalled_read(int fd, const void *to, size_t bytes)
{
	ssize_t got = pread(fd, (void *)to, bytes, 0);

	CHILD_CHECK(got >= 0 && got % TORN_ROW_BYTES == 0);
	for (uint32_t row = 0; row < got / TORN_ROW_BYTES; row++)
		CHILD_CHECK(row_is((const uint8_t *)to + row * TORN_ROW_BYTES, TORN_ROW_BYTES,
				   row));
	return -(got / PIECE_BYTES);
}

/* What a read of two pieces gives when there are truncates to each of @lens in its middle */
static int pieces_beside_truncates(int pad, const uint32_t *lens, unsigned int count)
{
	struct uffdio_zeropage zeros = { .range.len = PIECE_BYTES };
	struct stall reader;

	start_stall(&reader, pad, 2 * PIECE_BYTES, stalled_read);
	zeros.range.start = (uintptr_t)reader.source;
	if (ioctl(reader.faults, UFFDIO_ZEROPAGE, &zeros) || !await_stop(reader.faults))
		abort();
	while (count--)
		if (device_truncate(pad, *lens++, 0))
			abort();
	/* what is there then are not the rows that it began with */
	if (append_rows(pad, TORN_ROW_BYTES, 1000000, 2 * PIECE_ROWS - len_of(pad)))
		abort();
	zeros.range.start += PIECE_BYTES;
	if (ioctl(reader.faults, UFFDIO_ZEROPAGE, &zeros))
		abort();
	return end_stall(&reader);
}

TEST_F_TIMEOUT(reader, a_truncate_ends_a_read_of_what_it_took, TEST_SECONDS)
{
	const struct {
		uint32_t lens[2];
		unsigned int count;
		int pieces;
	} cases[] = {
		/* nothing, or not even one that drops a row */
		{ { 0 }, 0, 2 },
		{ { 2 * PIECE_ROWS }, 1, 2 },
		/* what was to come, and what it has already */
		{ { PIECE_ROWS }, 1, 1 },
		{ { 1 }, 1, 1 },
		/* several of them, of which all count */
		{ { 2 * PIECE_ROWS, 2 * PIECE_ROWS }, 2, 2 },
		{ { 2 * PIECE_ROWS, 1 }, 2, 1 },
		{ { 0, 0 }, 2, 1 },
	};
	uint32_t many[64];
	int pad;

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		pad = new_pad(2 * PIECE_ROWS, TORN_ROW_BYTES);
		ASSERT_LE(0, pad);
		ASSERT_EQ(0, append_rows(pad, TORN_ROW_BYTES, 0, 2 * PIECE_ROWS));
		EXPECT_EQ(cases[i].pieces,
			  pieces_beside_truncates(pad, cases[i].lens, cases[i].count))
			TH_LOG("case %zu", i);
		close(pad);
	}
	/* so many that the module has forgotten the first */
	for (size_t i = 0; i < ARRAY_SIZE(many); i++)
		many[i] = 2 * PIECE_ROWS;
	pad = new_pad(2 * PIECE_ROWS, TORN_ROW_BYTES);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, append_rows(pad, TORN_ROW_BYTES, 0, 2 * PIECE_ROWS));
	EXPECT_EQ(1, pieces_beside_truncates(pad, many, ARRAY_SIZE(many)));
	close(pad);
}

/* Truncates that drop nothing, as fast as they come: reads end, and get rows. */
#define STORM_BYTES (2u << 20)
#define STORM_READS 40

static void truncate_for_ever(int pad, uint64_t len)
{
	for (;;)
		CHILD_CHECK(!device_truncate(pad, len, 0));
}

TEST_F_TIMEOUT(reader, reads_end_beside_truncates, TEST_SECONDS)
{
	int pad = new_pad(STORM_BYTES / TORN_ROW_BYTES, TORN_ROW_BYTES);
	uint8_t *rows = malloc(STORM_BYTES);
	struct iovec iov = { rows, STORM_BYTES };
	uint64_t generation;
	struct child writer;

	ASSERT_LE(0, pad);
	ASSERT_NE(NULL, rows);
	ASSERT_EQ(0, append_rows(pad, TORN_ROW_BYTES, 0, STORM_BYTES / TORN_ROW_BYTES));
	if (start_child(&writer))
		truncate_for_ever(pad, STORM_BYTES / TORN_ROW_BYTES);
	while (generation_of(pad) < 10)
		sched_yield();
	generation = generation_of(pad);
	for (int i = 0; i < STORM_READS; i++) {
		/* who must not wait has not to */
		ssize_t got = preadv2(pad, &iov, 1, 0, i % 2 ? RWF_NOWAIT : 0);

		ASSERT_LE(TORN_ROW_BYTES, got);
		ASSERT_EQ(0, got % TORN_ROW_BYTES);
		for (uint32_t row = 0; row < got / TORN_ROW_BYTES; row++)
			ASSERT_TRUE(row_is(rows + row * TORN_ROW_BYTES, TORN_ROW_BYTES, row));
	}
	EXPECT_LT(generation, generation_of(pad));
	kill(writer.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&writer));
	free(rows);
	close(pad);
}

/* io_uring takes EAGAIN for a wait in poll: rows that are there must never get it. */
#define URING_READS 3000

TEST_F_TIMEOUT(reader, io_uring_reads_beside_truncates, TEST_SECONDS)
{
	uint8_t row[ROW_BYTES];
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_READ,
		.fd = self->reader,
		.addr = (uintptr_t)row,
		.len = ROW_BYTES,
	};
	uint64_t generation;
	struct child writer;
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	if (start_child(&writer))
		truncate_for_ever(self->pad, 3);
	while (generation_of(self->pad) < 10)
		sched_yield();
	generation = generation_of(self->pad);
	for (int i = 0; i < URING_READS; i++) {
		/* what was seen of it and where its position is play no part */
		ASSERT_EQ(i % 4 * ROW_BYTES, lseek(self->reader, i % 4 * ROW_BYTES, SEEK_SET));
		ASSERT_EQ(0, device_seen(self->reader, generation_of(self->reader) << 32 | 3));
		sqe.off = i % 3 * ROW_BYTES;
		ASSERT_EQ(ROW_BYTES, ring_do(&ring, &sqe));
		ASSERT_TRUE(row_is(row, ROW_BYTES, i % 3));
	}
	EXPECT_LT(generation, generation_of(self->pad));
	/* and what is not there is the end, at once */
	sqe.off = 3 * ROW_BYTES;
	EXPECT_EQ(0, ring_do(&ring, &sqe));
	kill(writer.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&writer));
	ring_close(&ring);
}

/* What nobody asks for, POLLERR and POLLHUP, would show as well. */
static short polled(int fd)
{
	struct pollfd p = {
		.fd = fd,
		.events = POLLIN | POLLOUT | POLLPRI | POLLRDNORM | POLLWRNORM | POLLRDHUP,
	};

	return poll(&p, 1, 0) < 0 ? -1 : p.revents;
}

#define READABLE (POLLIN | POLLRDNORM)
#define WRITABLE (POLLOUT | POLLWRNORM)

#define STATE(generation, len) ((uint64_t)(generation) << 32 | (len))

TEST_F(reader, poll_compares_with_what_was_seen)
{
	uint8_t rows[2 * ROW_BYTES];

	EXPECT_EQ(0, polled(self->reader));
	EXPECT_EQ(WRITABLE, polled(self->pad));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	EXPECT_EQ(READABLE, polled(self->reader));
	EXPECT_EQ(READABLE | WRITABLE, polled(self->pad));
	/* one of them, both, and what never was */
	EXPECT_EQ(0, device_seen(self->reader, STATE(0, 1)));
	EXPECT_EQ(READABLE, polled(self->reader));
	EXPECT_EQ(0, device_seen(self->reader, STATE(0, 2)));
	EXPECT_EQ(0, polled(self->reader));
	EXPECT_EQ(0, device_seen(self->reader, STATE(7, ROWS)));
	EXPECT_EQ(READABLE, polled(self->reader));
	EXPECT_EQ(0, device_seen(self->reader, STATE(0, 2)));
	EXPECT_EQ(0, polled(self->reader));
	/* each open file has seen what it has seen */
	EXPECT_EQ(READABLE | WRITABLE, polled(self->pad));

	/* the position has nothing to do with it */
	EXPECT_EQ(2 * ROW_BYTES, read(self->pad, rows, sizeof(rows)));
	EXPECT_EQ(2 * ROW_BYTES, lseek(self->pad, 2 * ROW_BYTES, SEEK_SET));
	EXPECT_EQ(READABLE | WRITABLE, polled(self->pad));
	EXPECT_EQ(0, lseek(self->reader, 0, SEEK_SET));
	EXPECT_EQ(0, polled(self->reader));

	/* a full pad answers a write at once */
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 2, ROWS - 2));
	EXPECT_EQ(READABLE | WRITABLE, polled(self->pad));
	EXPECT_EQ(0, device_seen(self->pad, STATE(0, ROWS)));
	EXPECT_EQ(WRITABLE, polled(self->pad));
}

/* As many rows as before, but not the same ones */
TEST_F(reader, poll_sees_a_rollback)
{
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	EXPECT_EQ(0, device_seen(self->reader, STATE(0, 3)));
	EXPECT_EQ(0, polled(self->reader));
	ASSERT_EQ(0, device_truncate(self->pad, 2, 0));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 7, 1));
	EXPECT_EQ(READABLE, polled(self->reader));
	EXPECT_EQ(0, device_seen(self->reader, STATE(1, 3)));
	EXPECT_EQ(0, polled(self->reader));
	/* also one that drops nothing */
	ASSERT_EQ(0, device_truncate(self->pad, 3, 0));
	EXPECT_EQ(READABLE, polled(self->reader));
}

TEST_F(reader, what_was_seen_belongs_to_the_open_file)
{
	int twin = dup(self->reader);
	int other = device_open_reader(self->reader);
	struct child child;

	ASSERT_LE(0, twin);
	ASSERT_LE(0, other);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	if (start_child(&child)) {
		CHILD_CHECK(!device_seen(twin, STATE(0, 1)));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(0, polled(self->reader));
	EXPECT_EQ(0, polled(twin));
	EXPECT_EQ(READABLE, polled(other));
	close(twin);
	close(other);
}

TEST_F(reader, poll_reports_the_seal)
{
	int writer = device_reopen(self->pad, O_WRONLY);

	ASSERT_LE(0, writer);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, device_seal(self->pad));
	EXPECT_EQ(READABLE | POLLRDHUP, polled(self->reader));
	EXPECT_EQ(0, device_seen(self->reader, STATE(0, 1)));
	EXPECT_EQ(POLLRDHUP, polled(self->reader));
	/* EROFS does not wait */
	EXPECT_EQ(READABLE | WRITABLE | POLLRDHUP, polled(self->pad));
	EXPECT_EQ(READABLE | WRITABLE | POLLRDHUP, polled(writer));
	close(writer);
	/* nor is the end of the others a hang-up */
	close(self->pad);
	EXPECT_EQ(POLLRDHUP, polled(self->reader));
	self->pad = -1;
}

TEST_F(reader, the_end_of_the_others_is_nothing)
{
	int reader = device_open_reader(self->pad);

	ASSERT_LE(0, reader);
	close(self->reader);
	close(self->pad);
	EXPECT_EQ(0, polled(reader));
	self->reader = reader;
	self->pad = -1;
}

/* Who would be EBUSY is not writable; who would be ESTALE, or write, is. */
TEST_F(reader, poll_reports_the_role)
{
	int writer = device_open_writer(self->pad, 0);
	int heir;

	ASSERT_LE(0, writer);
	EXPECT_EQ(0, polled(self->pad));
	EXPECT_EQ(WRITABLE, polled(writer));
	heir = device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, heir);
	EXPECT_EQ(0, polled(self->pad));
	EXPECT_EQ(WRITABLE, polled(writer));
	EXPECT_EQ(WRITABLE, polled(heir));
	close(writer);
	EXPECT_EQ(0, polled(self->pad));
	close(heir);
	EXPECT_EQ(WRITABLE, polled(self->pad));
}

/*
 * Acknowledge, look, sleep: beside rollbacks that leave the length as it was. A
 * rollback that goes unseen leaves the watcher asleep and the writer waiting.
 */
#define FEW_ROLLBACKS 1000

static void watch_generations(int reader, uint32_t *seen)
{
	struct pollfd p = { .fd = reader, .events = POLLIN };
	struct kvscratch_view view;

	CHILD_CHECK(!device_map(reader, &view));
	for (;;) {
		uint64_t state = kvscratch_view_state(&view);

		CHILD_CHECK(!device_seen(reader, state));
		if (kvscratch_state_len(state) == 2)
			__atomic_store_n(seen, kvscratch_state_generation(state),
					 __ATOMIC_RELEASE);
		CHILD_CHECK(poll(&p, 1, -1) == 1);
	}
}

TEST_F_TIMEOUT(reader, no_rollback_goes_unseen, MANY_ROUNDS_SECONDS)
{
	const uint32_t rollbacks = rounds_or(FEW_ROLLBACKS);
	uint32_t *seen = mmap(NULL, sizeof(*seen), PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct child watcher;

	ASSERT_NE(MAP_FAILED, (void *)seen);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	if (start_child(&watcher))
		watch_generations(self->reader, seen);
	for (uint32_t generation = 1; generation <= rollbacks; generation++) {
		ASSERT_EQ(0, device_truncate(self->pad, 1, 0));
		ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, generation, 1));
		while (__atomic_load_n(seen, __ATOMIC_ACQUIRE) != generation)
			sched_yield();
	}
	kill(watcher.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&watcher));
	munmap(seen, sizeof(*seen));
}

/* Children that sleep in poll() until what they wait for happens */

static pid_t fork_poller(int fd, short events, int writer)
{
	pid_t pid = fork_child();
	struct pollfd p = { .fd = fd, .events = events };

	if (pid)
		return pid;
	/* its role would not end with ours */
	if (writer != fd)
		close(writer);
	_exit(poll(&p, 1, -1) == 1 && p.revents == events ? 0 : 1);
}

/* Somebody who sleeps in poll() on @fd until @act is done to @writer */
static void wake_poller(struct __test_metadata *_metadata, int fd, short events, int writer,
			int (*act)(int fd))
{
	pid_t poller = fork_poller(fd, events, writer);

	ASSERT_LE(0, poller);
	EXPECT_EQ('S', await_sleep(poller));
	EXPECT_EQ(0, act(writer));
	EXPECT_EQ(0, wait_for(poller));
}

static int append_one(int fd)
{
	return append_rows(fd, ROW_BYTES, 0, 1);
}

static int truncate_nothing(int fd)
{
	return device_truncate(fd, len_of(fd), 0);
}

TEST_F_TIMEOUT(reader, sleepers_are_woken, TEST_SECONDS)
{
	int writer;

	wake_poller(_metadata, self->reader, POLLIN, self->pad, append_one);
	ASSERT_EQ(0, device_seen(self->reader, STATE(0, 1)));
	wake_poller(_metadata, self->reader, POLLIN, self->pad, truncate_nothing);
	ASSERT_EQ(0, device_seen(self->reader, STATE(1, 1)));
	/* a standby waits for the role */
	writer = device_open_writer(self->pad, 0);
	ASSERT_LE(0, writer);
	wake_poller(_metadata, self->pad, POLLOUT, writer, close);
	wake_poller(_metadata, self->reader, POLLRDHUP, self->pad, device_seal);
}

/* A wake-up comes by a work item: it is waited for, and there is one for each append. */
TEST_F_TIMEOUT(reader, edge_triggered_epoll_reports_each_append, TEST_SECONDS)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	int epoll = epoll_create1(EPOLL_CLOEXEC);

	ASSERT_LE(0, epoll);
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, self->reader, &event));
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));
	for (uint32_t i = 0; i < 3; i++) {
		ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, i, 1));
		EXPECT_EQ(1, epoll_wait(epoll, &event, 1, -1));
		EXPECT_EQ(EPOLLIN, event.events);
		EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));
	}
	ASSERT_EQ(0, device_truncate(self->pad, 3, 0));
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, -1));
	EXPECT_EQ(EPOLLIN, event.events);
	close(epoll);
}

TEST_HARNESS_MAIN
