// SPDX-License-Identifier: GPL-2.0-only
/*
 * The only writer of a pad: what it stages and commits, how its role begins, ends and is
 * taken over, and what a stalled or dying writer can do to others.
 */
#include "ring.h"

#include <linux/landlock.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/stat.h>

#define ROWS 64
#define DIM 64
#define ROW_BYTES (DIM * sizeof(float))

enum { K, V, WIDE, MX, TOKENS, PLANES };

/* One of each kind: small, large, with scales, converted */
static const struct kvscratch_plane shape[PLANES] = {
	[K] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "k0" },
	[V] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32, .label = "v0" },
	[WIDE] = { .dim = 40000, .dtype = KVSCRATCH_DTYPE_U8, .label = "wide" },
	[MX] = { .dim = DIM, .dtype = KVSCRATCH_DTYPE_MXINT8, .input_dtype = KVSCRATCH_DTYPE_F32,
		 .label = "mx" },
	[TOKENS] = { .dim = 1, .dtype = KVSCRATCH_DTYPE_I32, .label = "tokens" },
};

FIXTURE(writer) {
	int fd;
	int writer;
	struct kvscratch_pad_info info;
	struct kvscratch_plane planes[PLANES];
	const uint8_t *map;
	/* a row of any plane, and more */
	uint8_t *source;
};

FIXTURE_SETUP(writer) {
	self->fd = device_create_planes(ROWS, shape, PLANES);
	ASSERT_LE(0, self->fd);
	ASSERT_EQ(0, device_pad_info(self->fd, &self->info));
	ASSERT_EQ(PLANES, device_planes(self->fd, 0, self->planes, PLANES));
	self->map = mmap(NULL, self->info.mapping_bytes, PROT_READ, MAP_SHARED, self->fd, 0);
	ASSERT_NE(MAP_FAILED, (void *)self->map);
	self->source = calloc(ROWS, self->info.input_row_bytes);
	ASSERT_NE(NULL, self->source);
	self->writer = device_open_writer(self->fd, 0);
	ASSERT_LE(0, self->writer);
}

FIXTURE_TEARDOWN(writer) {
	munmap((void *)self->map, self->info.mapping_bytes);
	free(self->source);
	close(self->writer);
	close(self->fd);
}

/* Where a row of elements lies */
static const uint8_t *plane_row(const FIXTURE_DATA(writer) *self, int plane, uint32_t row)
{
	return self->map + self->planes[plane].offset +
	       (size_t)row * self->planes[plane].row_bytes;
}

/* Rows of small integers, which every dtype has: their value tells plane and seed. */
static uint8_t value_of(int plane, uint32_t seed)
{
	return 1 + (seed * 7 + plane * 13) % 60;
}

static void fill_plane_rows(void *to, int plane, uint32_t seed, uint32_t rows)
{
	for (uint32_t row = 0; row < rows; row++) {
		uint8_t value = value_of(plane, seed + row);

		for (uint32_t i = 0; i < shape[plane].dim; i++) {
			size_t at = (size_t)row * shape[plane].dim + i;

			if (plane == WIDE)
				((uint8_t *)to)[at] = value;
			else if (plane == TOKENS)
				((int32_t *)to)[at] = value;
			else
				((float *)to)[at] = value;
		}
	}
}

/* MXINT8 of one value all over: value = element / 64 * 2^(scale - 127) */
static bool mx_row_is(const FIXTURE_DATA(writer) *self, uint32_t row, uint8_t value)
{
	const int8_t *elements = (const int8_t *)plane_row(self, MX, row);
	const uint8_t *scales = self->map + self->planes[MX].scales_offset +
				row * self->planes[MX].scales_row_bytes;

	for (uint32_t i = 0; i < DIM; i++) {
		int scale = scales[i / KVSCRATCH_MX_BLOCK];

		if (scale < 127 || elements[i] << (scale - 127) != value * 64)
			return false;
	}
	return true;
}

static bool plane_row_is(const FIXTURE_DATA(writer) *self, int plane, uint32_t row, uint32_t seed)
{
	uint8_t value = value_of(plane, seed);
	const uint8_t *at = plane_row(self, plane, row);

	if (plane == MX)
		return mx_row_is(self, row, value);
	for (uint32_t i = 0; i < shape[plane].dim; i++)
		if (plane == WIDE ? at[i] != value :
		    plane == TOKENS ? ((const int32_t *)at)[i] != value :
				      ((const float *)at)[i] != value)
			return false;
	return true;
}

static bool token_is(const FIXTURE_DATA(writer) *self, uint32_t row, uint32_t seed)
{
	for (int plane = 0; plane < PLANES; plane++)
		if (!plane_row_is(self, plane, row, seed))
			return false;
	return true;
}

static int stage(FIXTURE_DATA(writer) *self, int fd, int plane, uint32_t row, uint32_t rows,
		 uint32_t seed)
{
	fill_plane_rows(self->source, plane, seed, rows);
	return device_stage(fd, plane, row, self->source, rows);
}

static int stage_all(FIXTURE_DATA(writer) *self, int fd, uint32_t row, uint32_t rows, uint32_t seed)
{
	int err = 0;

	for (int plane = 0; plane < PLANES && !err; plane++)
		err = stage(self, fd, plane, row, rows, seed);
	return err;
}

/* A token as write() takes it */
static int append_token(FIXTURE_DATA(writer) *self, int fd, uint32_t seed)
{
	uint8_t *to = self->source;

	for (int plane = 0; plane < PLANES; plane++) {
		fill_plane_rows(to, plane, seed, 1);
		to += self->planes[plane].input_row_bytes;
	}
	return device_append(fd, self->source, self->info.input_row_bytes);
}

static uint64_t state_of(const FIXTURE_DATA(writer) *self)
{
	const struct kvscratch_status *status = (const void *)(self->map + self->info.status_offset);

	return kvscratch_word_load(&status->state);
}

static uint64_t role_of(const FIXTURE_DATA(writer) *self)
{
	const struct kvscratch_status *status = (const void *)(self->map + self->info.status_offset);

	return kvscratch_word_load(&status->writer);
}

static int events_of(int fd)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN | POLLPRI | POLLOUT | POLLRDHUP };

	return poll(&polled, 1, 0) < 0 ? -errno : polled.revents;
}

static int set_nonblock(int fd)
{
	return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* Staging and committing */

TEST_F_TIMEOUT(writer, staged_rows_are_visible_and_not_committed, TEST_SECONDS)
{
	for (int plane = 0; plane < PLANES; plane++) {
		ASSERT_EQ(0, stage(self, self->writer, plane, 0, 3, 1));
		EXPECT_TRUE(plane_row_is(self, plane, 2, 3));
		EXPECT_EQ(0, state_of(self));
		/* not before the last plane has them */
		EXPECT_EQ(plane < PLANES - 1 ? -EINVAL : 0, device_commit(self->writer, 2));
	}
	EXPECT_EQ(2, state_of(self));
	EXPECT_TRUE(token_is(self, 0, 1));
	EXPECT_TRUE(token_is(self, 1, 2));
	/* the third was dropped */
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 3));
	EXPECT_EQ(2, state_of(self));
}

TEST_F_TIMEOUT(writer, drafts_move_no_generation, TEST_SECONDS)
{
	uint32_t len = 0;

	while (len + 5 <= ROWS) {
		uint32_t accepted = len % 5;

		ASSERT_EQ(0, stage_all(self, self->writer, len, 5, len));
		ASSERT_EQ(0, device_commit(self->writer, len + accepted));
		len += accepted;
		if (!accepted) {
			ASSERT_EQ(0, append_token(self, self->writer, len));
			len++;
		}
		ASSERT_EQ(len, state_of(self));
	}
	for (uint32_t row = 0; row < len; row++) {
		ASSERT_TRUE(token_is(self, row, row))
			TH_LOG("row %u", row);
	}
}

TEST_F_TIMEOUT(writer, stage_stays_within_bounds, TEST_SECONDS)
{
	ASSERT_EQ(0, stage_all(self, self->writer, 0, 4, 0));
	ASSERT_EQ(0, device_commit(self->writer, 4));
	EXPECT_EQ(-EINVAL, stage(self, self->writer, K, 3, 1, 9));
	EXPECT_EQ(-EINVAL, stage(self, self->writer, K, 5, 1, 9));
	EXPECT_EQ(-EINVAL, device_stage(self->writer, K, 1ull << 32 | 4, self->source, 1));
	EXPECT_EQ(-EINVAL, device_stage(self->writer, PLANES, 4, self->source, 1));
	EXPECT_EQ(-ENOSPC, device_stage(self->writer, K, 4, self->source, ROWS - 3));
	EXPECT_EQ(-ENOSPC, device_stage(self->writer, K, 4, self->source, UINT64_MAX));
	EXPECT_EQ(-ENOSPC, device_stage(self->writer, K, 4, self->source, UINT64_MAX - 3));
	EXPECT_EQ(0, device_stage(self->writer, K, 4, NULL, 0));
	EXPECT_EQ(-EFAULT, device_stage(self->writer, K, 4, NULL, 1));
	EXPECT_EQ(0, stage(self, self->writer, K, 4, ROWS - 4, 4));
	EXPECT_EQ(-ENOSPC, device_stage(self->writer, K, ROWS, self->source, 1));
	EXPECT_EQ(4, state_of(self));
	for (uint32_t row = 0; row < 4; row++) {
		EXPECT_TRUE(token_is(self, row, row));
	}
}

/* The source of a STAGE that ends in the middle */
static uint8_t *half_a_source(size_t good_bytes)
{
	const size_t page = page_bytes();
	size_t bytes = (good_bytes + page - 1) / page * page;
	uint8_t *at = mmap(NULL, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);

	if (at == MAP_FAILED || mprotect(at + bytes, page, PROT_NONE))
		abort();
	return at + bytes - good_bytes;
}

TEST_F_TIMEOUT(writer, a_failed_stage_leaves_what_was_before_its_row, TEST_SECONDS)
{
	uint8_t *half = half_a_source(2 * ROW_BYTES);

	ASSERT_EQ(0, stage_all(self, self->writer, 0, 6, 0));
	EXPECT_EQ(-EFAULT, device_stage(self->writer, K, 3, half, 3));
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 4));
	/* parts of rows are no rows to keep */
	EXPECT_EQ(-EINVAL, device_keep(self->writer, K, 3, 1));
	EXPECT_EQ(0, device_commit(self->writer, 3));
	for (uint32_t row = 0; row < 3; row++) {
		EXPECT_TRUE(token_is(self, row, row));
	}
}

/* The writer's own write() drops what was staged, also when it fails */
TEST_F_TIMEOUT(writer, a_failed_write_of_the_writer_leaves_nothing, TEST_SECONDS)
{
	struct kvscratch_pad_info info;
	uint8_t *half;

	ASSERT_EQ(0, device_pad_info(self->fd, &info));
	half = half_a_source(2 * info.input_row_bytes);
	ASSERT_EQ(0, stage_all(self, self->writer, 0, 8, 0));
	EXPECT_EQ(-1, write(self->writer, half, 3 * info.input_row_bytes));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 1));
	for (int plane = 0; plane < PLANES; plane++) {
		EXPECT_EQ(-EINVAL, device_keep(self->writer, plane, 0, 1));
	}
	EXPECT_EQ(0, state_of(self));
}

/* Of the queue that readers join it is no part, so no reader holds it up there. */
TEST_F_TIMEOUT(writer, own_commits_do_not_wake_the_writer, TEST_SECONDS)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	int reader = device_open_reader(self->fd);
	int of_reader = epoll_create1(EPOLL_CLOEXEC), of_writer = epoll_create1(EPOLL_CLOEXEC);

	ASSERT_LE(0, reader);
	ASSERT_EQ(0, epoll_ctl(of_writer, EPOLL_CTL_ADD, self->writer, &event));
	ASSERT_EQ(0, epoll_ctl(of_reader, EPOLL_CTL_ADD, reader, &event));
	ASSERT_EQ(0, stage_all(self, self->writer, 0, 1, 0));
	ASSERT_EQ(0, device_commit(self->writer, 1));
	EXPECT_EQ(1, epoll_wait(of_reader, &event, 1, -1));
	EXPECT_EQ(0, epoll_wait(of_writer, &event, 1, 0));
	close(of_reader);
	close(of_writer);
	close(reader);
}

TEST_F_TIMEOUT(writer, keeps_what_is_whole_and_nothing_else, TEST_SECONDS)
{
	int successor;

	ASSERT_EQ(0, stage_all(self, self->writer, 0, 8, 0));
	ASSERT_EQ(0, device_commit(self->writer, 2));
	/* dropped by the commit, and as they were */
	for (int plane = 0; plane < PLANES; plane++) {
		EXPECT_EQ(-EINVAL, device_keep(self->writer, plane, 3, 1));
		EXPECT_EQ(-EINVAL, device_keep(self->writer, plane, 2, 7));
		EXPECT_EQ(0, device_keep(self->writer, plane, 2, 2));
		EXPECT_EQ(0, device_keep(self->writer, plane, 4, 4));
	}
	ASSERT_EQ(0, device_commit(self->writer, 7));
	for (uint32_t row = 0; row < 7; row++) {
		EXPECT_TRUE(token_is(self, row, row));
	}

	/* a truncate of rows leaves them there, ZERO does not */
	ASSERT_EQ(0, device_truncate(self->writer, 5, 0));
	EXPECT_EQ(0, device_keep(self->writer, K, 5, 2));
	ASSERT_EQ(0, device_truncate(self->writer, 4, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(-EINVAL, device_keep(self->writer, K, 4, 1));

	/* nor does a new epoch */
	ASSERT_EQ(0, stage_all(self, self->writer, 4, 2, 4));
	successor = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, successor);
	EXPECT_EQ(-EINVAL, device_commit(successor, 5));
	EXPECT_EQ(-EINVAL, device_keep(successor, K, 4, 1));
	close(successor);
}

TEST_F_TIMEOUT(writer, own_calls_drop_what_is_staged, TEST_SECONDS)
{
	ASSERT_EQ(0, stage_all(self, self->writer, 0, 3, 50));
	ASSERT_EQ(0, append_token(self, self->writer, 0));
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 2));
	ASSERT_EQ(0, stage_all(self, self->writer, 1, 3, 50));
	ASSERT_EQ(0, device_truncate(self->writer, 1, 0));
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 2));
	ASSERT_EQ(0, stage_all(self, self->writer, 1, 3, 50));
	/* the abort */
	ASSERT_EQ(0, device_commit(self->writer, 1));
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 2));
	EXPECT_EQ(1ull << 32 | 1, state_of(self));
	EXPECT_TRUE(token_is(self, 0, 0));
}

/*
 * Random calls against a model of staged, whole and len. What a failed copy does is above;
 * here rows beyond len hold the seeds that the model says.
 */
TEST_F_TIMEOUT(writer, random_calls_do_what_the_model_does, TEST_SECONDS)
{
	uint32_t staged[PLANES] = { 0 }, whole[PLANES] = { 0 }, seeds[PLANES][ROWS] = { 0 };
	uint32_t len = 0, next_seed = 1;
	unsigned int random = 1;

	for (int step = 0; step < 3000; step++) {
		int plane = rand_r(&random) % PLANES;
		uint32_t row = len + rand_r(&random) % 5, rows = rand_r(&random) % 4;
		int expected = 0;

		if (len > ROWS - 12) {
			len = rand_r(&random) % 4;
			ASSERT_EQ(0, device_truncate(self->writer, len, 0));
			for (int p = 0; p < PLANES; p++)
				staged[p] = len;
			continue;
		}
		switch (rand_r(&random) % 8) {
		case 0: case 1: case 2: case 3:
			expected = row > staged[plane] ? -EINVAL : 0;
			ASSERT_EQ(expected, stage(self, self->writer, plane, row, rows, next_seed));
			for (uint32_t i = 0; !expected && i < rows; i++)
				seeds[plane][row + i] = next_seed + i;
			next_seed += rows;
			if (!expected && staged[plane] < row + rows)
				staged[plane] = row + rows;
			if (!expected && whole[plane] < row + rows)
				whole[plane] = row + rows;
			break;
		case 4:
			expected = row > staged[plane] || row + rows > whole[plane] ? -EINVAL : 0;
			ASSERT_EQ(expected, device_keep(self->writer, plane, row, rows));
			if (!expected && staged[plane] < row + rows)
				staged[plane] = row + rows;
			break;
		case 5: case 6:
			for (int p = 0; p < PLANES; p++)
				if (row > staged[p])
					expected = -EINVAL;
			ASSERT_EQ(expected, device_commit(self->writer, row));
			if (!expected)
				len = row;
			for (int p = 0; !expected && p < PLANES; p++)
				staged[p] = len;
			break;
		default:
			ASSERT_EQ(0, append_token(self, self->writer, next_seed));
			for (int p = 0; p < PLANES; p++) {
				seeds[p][len] = next_seed;
				staged[p] = len + 1;
				whole[p] = len + 1;
			}
			next_seed++;
			len++;
		}
		ASSERT_EQ(len, kvscratch_state_len(state_of(self)))
			TH_LOG("step %d", step);
	}
	for (int p = 0; p < PLANES; p++) {
		for (uint32_t row = 0; row < len; row++) {
			ASSERT_TRUE(plane_row_is(self, p, row, seeds[p][row]))
				TH_LOG("plane %d, row %u", p, row);
		}
	}
}

struct committer {
	FIXTURE_DATA(writer) *self;
	int err;
};

static void *commit_tokens(void *arg)
{
	struct committer *committer = arg;
	FIXTURE_DATA(writer) *self = committer->self;

	for (uint32_t round = 0; round < 40 && !committer->err; round++) {
		for (uint32_t row = 0; row < ROWS && !committer->err; row += 4) {
			committer->err = stage_all(self, self->writer, row, 4, row + round);
			if (!committer->err)
				committer->err = device_commit(self->writer, row + 4);
		}
		if (!committer->err)
			committer->err = device_truncate(self->writer, 0, 0);
	}
	return NULL;
}

/* A reader that looks all the time finds a len only where every plane has the row. */
TEST_F_TIMEOUT(writer, readers_never_see_part_of_a_token, TEST_SECONDS)
{
	struct committer committer = { .self = self };
	unsigned int seen = 0;
	pthread_t thread;

	ASSERT_EQ(0, pthread_create(&thread, NULL, commit_tokens, &committer));
	while (kvscratch_state_generation(state_of(self)) < 40 && !committer.err) {
		uint64_t state = state_of(self);
		uint32_t len = kvscratch_state_len(state);
		uint32_t seed = len - 1 + kvscratch_state_generation(state);
		bool whole;

		if (!len)
			continue;
		whole = token_is(self, len - 1, seed);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		if (kvscratch_state_generation(state_of(self)) !=
		    kvscratch_state_generation(state))
			continue;
		ASSERT_TRUE(whole)
			TH_LOG("row %u of generation %u", len - 1,
			       kvscratch_state_generation(state));
		seen++;
	}
	pthread_join(thread, NULL);
	EXPECT_EQ(0, committer.err);
	EXPECT_LT(0, seen);
}

/* The role */

TEST_F_TIMEOUT(writer, keeps_others_out, TEST_SECONDS)
{
	EXPECT_EQ(1ull << 32 | KVSCRATCH_PAD_WRITER, role_of(self));
	EXPECT_EQ(-EBUSY, append_token(self, self->fd, 0));
	EXPECT_EQ(-EBUSY, device_truncate(self->fd, 0, 0));
	EXPECT_EQ(-EBUSY, device_seal(self->fd));
	EXPECT_EQ(-EBUSY, device_open_writer(self->fd, 0));
	EXPECT_EQ(-ENOLCK, stage(self, self->fd, K, 0, 1, 0));
	EXPECT_EQ(-ENOLCK, device_commit(self->fd, 0));
	EXPECT_EQ(0, events_of(self->fd) & POLLOUT);
	EXPECT_EQ(POLLOUT, events_of(self->writer));
	/* writing is all that it may */
	EXPECT_ERRNO(EBADF, read(self->writer, self->source, 1));
	EXPECT_ERRNO(EACCES, mmap(NULL, page_bytes(), PROT_READ, MAP_SHARED, self->writer, 0));
	EXPECT_EQ(-EACCES, device_open_reader(self->writer));
	EXPECT_EQ(0, append_token(self, self->writer, 0));
}

TEST_F_TIMEOUT(writer, role_ends_with_the_last_reference, TEST_SECONDS)
{
	const char *name = "writer";
	int copy = dup(self->writer);
	int sockets[2];
	char text[16];
	int passed;

	ASSERT_LE(0, copy);
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets));
	ASSERT_EQ(0, kvscratch_send_handles(sockets[0], &name, &copy, 1));
	close(self->writer);
	close(copy);
	/* the message holds it */
	EXPECT_EQ(-EBUSY, append_token(self, self->fd, 0));
	ASSERT_EQ(1, kvscratch_receive_handles(sockets[1], text, sizeof(text), &passed, 1));
	EXPECT_EQ(-EBUSY, append_token(self, self->fd, 0));
	EXPECT_EQ(0, append_token(self, passed, 0));
	EXPECT_EQ(0, stage_all(self, passed, 1, 1, 1));
	close(passed);
	EXPECT_EQ(1ull << 32, role_of(self));
	EXPECT_EQ(0, append_token(self, self->fd, 2));
	EXPECT_TRUE(token_is(self, 1, 2));
	self->writer = device_open_writer(self->fd, 0);
	ASSERT_LE(0, self->writer);
	EXPECT_EQ(2ull << 32 | KVSCRATCH_PAD_WRITER, role_of(self));
	/* what the last one had staged is gone */
	EXPECT_EQ(-EINVAL, device_commit(self->writer, 3));
	close(sockets[0]);
	close(sockets[1]);
}

/* A request that is not done holds the open file as well. */
TEST_F_TIMEOUT(writer, role_ends_with_the_last_request, TEST_SECONDS)
{
	const struct io_uring_sqe sqe = {
		.opcode = IORING_OP_POLL_ADD,
		.fd = self->writer,
		.poll32_events = POLLRDHUP,
		.user_data = 1,
	};
	const struct io_uring_sqe cancel = { .opcode = IORING_OP_ASYNC_CANCEL, .fd = -1, .addr = 1 };
	struct pollfd polled = { .fd = self->fd, .events = POLLOUT };
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	ASSERT_EQ(0, ring_submit(&ring, &sqe));
	close(self->writer);
	EXPECT_EQ(-EBUSY, append_token(self, self->fd, 0));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	ASSERT_EQ(0, ring_submit(&ring, &cancel));
	EXPECT_EQ(1, poll(&polled, 1, -1));
	EXPECT_EQ(0, ring_wait(&ring) + ring_wait(&ring) + ECANCELED);
	ring_close(&ring);
	EXPECT_EQ(0, append_token(self, self->fd, 0));
	self->writer = device_open_writer(self->fd, 0);
	EXPECT_LE(0, self->writer);
}

TEST_F_TIMEOUT(writer, standby_is_told_when_the_writer_dies, TEST_SECONDS)
{
	struct pollfd polled = { .fd = self->fd, .events = POLLOUT };
	struct child child;

	if (start_child(&child)) {
		CHILD_CHECK(!stage_all(self, self->writer, 0, 1, 0));
		CHILD_CHECK(say(child.line));
		hear(child.line);
		_exit(0);
	}
	close(self->writer);
	ASSERT_TRUE(hear(child.line));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	kill(child.pid, SIGKILL);
	EXPECT_EQ(1, poll(&polled, 1, -1));
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	self->writer = device_open_writer(self->fd, 0);
	EXPECT_LE(0, self->writer);
	EXPECT_EQ(0, state_of(self));
}

TEST_F_TIMEOUT(writer, who_was_taken_over_is_stale_for_ever, TEST_SECONDS)
{
	int successor;

	ASSERT_EQ(0, stage_all(self, self->writer, 0, 2, 0));
	successor = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, successor);
	EXPECT_EQ(2ull << 32 | KVSCRATCH_PAD_WRITER, role_of(self));
	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(-ESTALE, append_token(self, self->writer, 0));
		EXPECT_EQ(-ESTALE, stage(self, self->writer, K, 0, 1, 0));
		EXPECT_EQ(-ESTALE, device_keep(self->writer, K, 0, 1));
		EXPECT_EQ(-ESTALE, device_commit(self->writer, 0));
		EXPECT_EQ(-ESTALE, device_truncate(self->writer, 0, 0));
		EXPECT_EQ(-ESTALE, device_seal(self->writer));
		/* it need not wait to learn that */
		EXPECT_EQ(POLLOUT, events_of(self->writer));
		if (!i)
			close(successor);
	}
	EXPECT_EQ(0, append_token(self, self->fd, 0));
	EXPECT_TRUE(token_is(self, 0, 0));
}

/* Writers that are stalled in the middle of a call, by a source page that does not come */

struct stalled {
	struct child child;
	int faults;
	void *page;
};

enum stalled_call { STALLED_STAGE, STALLED_WRITE };

/* A child whose call on @fd, inherited, does not get its second half */
static void stall(struct __test_metadata *_metadata, FIXTURE_DATA(writer) *self,
		  struct stalled *stalled, int fd, enum stalled_call call)
{
	const size_t page = page_bytes();
	uint8_t *source = mmap(NULL, 64 * page, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const char *name = "faults";
	char text[16];

	ASSERT_NE(MAP_FAILED, (void *)source);
	stalled->page = source + page;
	memset(source, 0xee, page);
	if (start_child(&stalled->child)) {
		int faults, err;

		munmap(stalled->page, 63 * page);
		CHILD_CHECK(mmap(stalled->page, 63 * page, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == stalled->page);
		faults = stop_at(stalled->page, 63 * page);
		CHILD_CHECK(!kvscratch_send_handles(stalled->child.line, &name, &faults, 1));
		err = call == STALLED_STAGE ? device_stage(fd, WIDE, 0, source, 1) :
					      device_append(fd, source, self->info.input_row_bytes);
		_exit(-err);
	}
	ASSERT_EQ(1, kvscratch_receive_handles(stalled->child.line, text, sizeof(text),
					       &stalled->faults, 1));
	munmap(source, 64 * page);
	ASSERT_TRUE(await_stop(stalled->faults));
}

/* All pages come, and the call ends with this errno */
static int let_go(struct stalled *stalled)
{
	const size_t bytes = 63 * page_bytes();
	void *filler = malloc(bytes);
	struct uffdio_copy copy = {
		.dst = (uintptr_t)stalled->page,
		.src = (uintptr_t)filler,
		.len = bytes,
	};
	int status;

	memset(filler, 0xee, bytes);
	ioctl(stalled->faults, UFFDIO_COPY, &copy);
	status = end_child(&stalled->child);
	close(stalled->faults);
	free(filler);
	return status;
}

static bool has_userfaultfd(void)
{
	int probe = syscall(SYS_userfaultfd, O_CLOEXEC);

	close(probe);
	return probe >= 0;
}

#define NEEDS_USERFAULTFD() do { \
	if (!has_userfaultfd()) \
		SKIP(return, "the kernel has no userfaultfd"); \
} while (0)

/* No byte of a fenced operation lands after the takeover returned. */
TEST_F_TIMEOUT(writer, takeover_fences_a_stalled_call, TEST_SECONDS)
{
	NEEDS_USERFAULTFD();
	for (enum stalled_call call = STALLED_STAGE; call <= STALLED_WRITE; call++) {
		struct stalled stalled;
		int successor;

		stall(_metadata, self, &stalled, self->writer, call);
		EXPECT_EQ(0, events_of(self->writer) & POLLOUT);
		/* at once, whatever the call waits for */
		successor = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
		ASSERT_LE(0, successor);
		ASSERT_EQ(0, stage_all(self, successor, call, 1, 3));
		ASSERT_EQ(0, device_commit(successor, call + 1));
		EXPECT_EQ(ESTALE, let_go(&stalled));
		EXPECT_TRUE(token_is(self, call, 3));
		EXPECT_EQ(call + 1, state_of(self));
		close(self->writer);
		self->writer = successor;
	}
	for (uint32_t row = 2; row < ROWS; row++) {
		ASSERT_TRUE(all_zero(plane_row(self, WIDE, row), self->planes[WIDE].row_bytes));
	}
}

/* Without a role there is a turn as well. */
TEST_F_TIMEOUT(writer, takeover_fences_co_writers, TEST_SECONDS)
{
	struct stalled stalled;

	NEEDS_USERFAULTFD();
	close(self->writer);
	stall(_metadata, self, &stalled, self->fd, STALLED_WRITE);
	self->writer = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, self->writer);
	ASSERT_EQ(0, append_token(self, self->writer, 5));
	EXPECT_EQ(EBUSY, let_go(&stalled));
	EXPECT_EQ(1, state_of(self));
	EXPECT_TRUE(token_is(self, 0, 5));
}

TEST_F_TIMEOUT(writer, a_stalled_call_holds_up_no_reader, TEST_SECONDS)
{
	struct kvscratch_pad_info info;
	struct stalled stalled;
	uint8_t byte;
	int reader;

	NEEDS_USERFAULTFD();
	ASSERT_EQ(0, append_token(self, self->writer, 1));
	stall(_metadata, self, &stalled, self->writer, STALLED_WRITE);
	reader = device_open_reader(self->fd);
	ASSERT_LE(0, reader);
	EXPECT_EQ(0, device_pad_info(reader, &info));
	EXPECT_EQ(1, info.len);
	EXPECT_EQ(POLLIN, events_of(reader));
	EXPECT_EQ(1, pread(reader, &byte, 1, 0));
	EXPECT_TRUE(token_is(self, 0, 1));
	EXPECT_EQ(0, device_seen(reader, 1));
	EXPECT_EQ(0, events_of(reader));
	close(reader);
	EXPECT_EQ(0, let_go(&stalled));
	EXPECT_EQ(2, state_of(self));
}

static void *map_and_exit(void *arg)
{
	void *map = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)arg;
	CHILD_CHECK(map != MAP_FAILED);
	memset(map, 1, 1 << 20);
	CHILD_CHECK(!munmap(map, 1 << 20));
	return NULL;
}

struct stalled_thread {
	int fd;
	const void *source;
};

static void *stage_and_stall(void *arg)
{
	const struct stalled_thread *stalled = arg;

	device_stage(stalled->fd, WIDE, 0, stalled->source, 1);
	return NULL;
}

/* Nor any thread of its own process: they map, fault and end as if nothing were. */
TEST_F_TIMEOUT(writer, a_stalled_call_holds_up_no_thread, TEST_SECONDS)
{
	struct child child;

	NEEDS_USERFAULTFD();
	if (start_child(&child)) {
		const size_t bytes = 64 * page_bytes();
		struct stalled_thread stalled = {
			.fd = self->writer,
			.source = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
		};
		int faults = stop_at((void *)stalled.source, bytes);
		pthread_t staging, other;

		CHILD_CHECK(!pthread_create(&staging, NULL, stage_and_stall, &stalled));
		CHILD_CHECK(await_stop(faults));
		for (int i = 0; i < 10; i++) {
			CHILD_CHECK(!pthread_create(&other, NULL, map_and_exit, NULL));
			CHILD_CHECK(!pthread_join(other, NULL));
		}
		CHILD_CHECK(say(child.line));
		hear(child.line);
		_exit(1);
	}
	EXPECT_TRUE(hear(child.line));
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
}

TEST_F_TIMEOUT(writer, who_must_not_wait_does_not, TEST_SECONDS)
{
	struct pollfd polled = { .fd = self->writer, .events = POLLOUT };
	struct stalled stalled;
	struct iovec row;

	NEEDS_USERFAULTFD();
	stall(_metadata, self, &stalled, self->writer, STALLED_WRITE);
	row = (struct iovec){ self->source, self->info.input_row_bytes };
	EXPECT_ERRNO(EAGAIN, pwritev2(self->writer, &row, 1, -1, RWF_NOWAIT));
	ASSERT_EQ(0, set_nonblock(self->writer));
	EXPECT_EQ(-EAGAIN, append_token(self, self->writer, 0));
	EXPECT_EQ(-EAGAIN, stage(self, self->writer, K, 0, 1, 0));
	EXPECT_EQ(-EAGAIN, device_commit(self->writer, 0));
	EXPECT_EQ(-EAGAIN, device_truncate(self->writer, 0, 0));
	EXPECT_EQ(-EAGAIN, device_seal(self->writer));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	EXPECT_EQ(0, let_go(&stalled));
	EXPECT_EQ(1, poll(&polled, 1, -1));
	EXPECT_EQ(0, append_token(self, self->writer, 1));
	EXPECT_EQ(2, state_of(self));
}

static void on_signal(int number)
{
	(void)number;
}

/* Calls that wait for the turn of another; the last two are the writer's. */
enum waiting { WAITING_WRITE, WAITING_TRUNCATE, WAITING_SEAL, WAITING_OPEN, WAITING_STAGE,
	       WAITING_COMMIT, WAITING_CALLS };

static int call_that_waits(FIXTURE_DATA(writer) *self, int fd, enum waiting call)
{
	switch (call) {
	case WAITING_WRITE:
		return append_token(self, fd, 1);
	case WAITING_TRUNCATE:
		return device_truncate(fd, 0, 0);
	case WAITING_SEAL:
		return device_seal(fd);
	case WAITING_OPEN:
		return device_open_writer(fd, 0);
	case WAITING_STAGE:
		return stage(self, fd, K, len_of(fd), 1, 1);
	default:
		return device_commit(fd, len_of(fd));
	}
}

/* A child that sleeps in such a call, and exits with its errno */
static void start_sleeper(struct __test_metadata *_metadata, FIXTURE_DATA(writer) *self,
			  struct child *child, int fd, enum waiting call)
{
	if (start_child(child)) {
		const struct sigaction action = { .sa_handler = on_signal };
		int err;

		sigaction(SIGUSR1, &action, NULL);
		CHILD_CHECK(say(child->line));
		err = call_that_waits(self, fd, call);
		_exit(err < 0 ? -err : 0);
	}
	ASSERT_TRUE(hear(child->line));
	ASSERT_EQ('S', await_sleep(child->pid));
}

/* Others wait for a turn, and a signal ends that. */
TEST_F_TIMEOUT(writer, waiting_is_interruptible, TEST_SECONDS)
{
	struct stalled stalled;

	NEEDS_USERFAULTFD();
	close(self->writer);
	stall(_metadata, self, &stalled, self->fd, STALLED_WRITE);
	for (enum waiting call = WAITING_WRITE; call <= WAITING_OPEN; call++) {
		struct child child;

		start_sleeper(_metadata, self, &child, self->fd, call);
		kill(child.pid, SIGUSR1);
		EXPECT_EQ(EINTR, end_child(&child))
			TH_LOG("call %d", call);
	}
	EXPECT_EQ(0, let_go(&stalled));
	EXPECT_EQ(1, state_of(self));
	self->writer = device_open_writer(self->fd, 0);
}

/* Who sleeps while the role changes hands learns of it, and does nothing. */
TEST_F_TIMEOUT(writer, a_takeover_tells_who_waits, TEST_SECONDS)
{
	struct child sleepers[WAITING_CALLS];
	struct stalled stalled;

	NEEDS_USERFAULTFD();
	/* through the writer's handle, then through one without a role */
	for (int role = 1; role >= 0; role--) {
		const int last = role ? WAITING_COMMIT : WAITING_OPEN;
		int fd = role ? self->writer : self->fd;
		int successor;

		if (!role)
			close(self->writer);
		stall(_metadata, self, &stalled, fd, STALLED_WRITE);
		for (int call = 0; call <= last; call++)
			/* which the writer cannot */
			if (!role || call != WAITING_OPEN)
				start_sleeper(_metadata, self, &sleepers[call], fd, call);
		successor = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
		ASSERT_LE(0, successor);
		for (int call = 0; call <= last; call++) {
			if (role && call == WAITING_OPEN)
				continue;
			EXPECT_EQ(role ? ESTALE : EBUSY, end_child(&sleepers[call]))
				TH_LOG("call %d", call);
		}
		EXPECT_EQ(role ? ESTALE : EBUSY, let_go(&stalled));
		EXPECT_EQ(0, state_of(self));
		if (role)
			close(self->writer);
		self->writer = successor;
	}
}

/* So does who sleeps in poll() until the turn of its own handle ends: it is ESTALE then. */
TEST_F_TIMEOUT(writer, a_takeover_wakes_pollers, TEST_SECONDS)
{
	struct pollfd polled = { .fd = self->writer, .events = POLLOUT };
	struct child poller;
	struct stalled stalled;
	int successor;

	NEEDS_USERFAULTFD();
	stall(_metadata, self, &stalled, self->writer, STALLED_STAGE);
	if (start_child(&poller))
		_exit(poll(&polled, 1, -1) == 1 && polled.revents == POLLOUT ? 0 : 1);
	ASSERT_EQ('S', await_sleep(poller.pid));
	successor = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, successor);
	EXPECT_EQ(0, end_child(&poller));
	EXPECT_EQ(ESTALE, let_go(&stalled));
	close(successor);
}

/* They start over from the seal: it comes before the role, and SEAL again is 0. */
TEST_F_TIMEOUT(writer, a_seal_tells_who_waits, TEST_SECONDS)
{
	const struct sched_param first = { .sched_priority = 1 }, other = { 0 };
	struct child sleepers[WAITING_OPEN + 1];
	struct stalled stalled;

	NEEDS_USERFAULTFD();
	close(self->writer);
	keep_to_cpu(0);
	stall(_metadata, self, &stalled, self->fd, STALLED_WRITE);
	for (enum waiting call = WAITING_WRITE; call <= WAITING_OPEN; call++)
		start_sleeper(_metadata, self, &sleepers[call], self->fd, call);
	/* they do not run between the takeover and the seal */
	ASSERT_EQ(0, sched_setscheduler(0, SCHED_FIFO, &first));
	self->writer = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	EXPECT_EQ(0, device_seal(self->writer));
	ASSERT_EQ(0, sched_setscheduler(0, SCHED_OTHER, &other));
	ASSERT_LE(0, self->writer);
	for (enum waiting call = WAITING_WRITE; call <= WAITING_OPEN; call++) {
		EXPECT_EQ(call == WAITING_SEAL ? 0 : EROFS, end_child(&sleepers[call]))
			TH_LOG("call %d", call);
	}
	/* it did not run either, and was only revoked */
	EXPECT_EQ(EBUSY, let_go(&stalled));
	EXPECT_EQ(0, state_of(self));
}

/* A takeover, and a call that stalls at once: in the successor's process */
static void stall_as_successor(FIXTURE_DATA(writer) *self, int line, const bool *go)
{
	const size_t bytes = 64 * page_bytes();
	void *source = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			    -1, 0);
	int fd;

	keep_to_cpu(1);
	CHILD_CHECK(source != MAP_FAILED);
	stop_at(source, bytes);
	CHILD_CHECK(say(line));
	while (!__atomic_load_n(go, __ATOMIC_ACQUIRE))
		;
	fd = device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER);
	CHILD_CHECK(fd >= 0);
	device_stage(fd, WIDE, 0, source, 1);
	_exit(1);
}

/* The turn of a successor is none of theirs to wait for. */
TEST_F_TIMEOUT(writer, who_lost_the_role_waits_for_no_successor, TEST_SECONDS)
{
	const struct sched_param first = { .sched_priority = 1 }, other = { 0 };
	bool *go = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			-1, 0);
	struct child sleeper, successor;
	struct stalled stalled;

	NEEDS_USERFAULTFD();
	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "a machine with one processor");
	ASSERT_NE(MAP_FAILED, (void *)go);
	stall(_metadata, self, &stalled, self->writer, STALLED_STAGE);
	if (start_child(&successor))
		stall_as_successor(self, successor.line, go);
	ASSERT_TRUE(hear(successor.line));
	keep_to_cpu(0);
	start_sleeper(_metadata, self, &sleeper, self->writer, WAITING_WRITE);
	/* it does not run before the successor has its turn */
	ASSERT_EQ(0, sched_setscheduler(0, SCHED_FIFO, &first));
	__atomic_store_n(go, true, __ATOMIC_RELEASE);
	await_sleep(successor.pid);
	ASSERT_EQ(0, sched_setscheduler(0, SCHED_OTHER, &other));
	EXPECT_EQ(0, await_sleep(sleeper.pid));
	kill(successor.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&successor));
	EXPECT_EQ(ESTALE, end_child(&sleeper));
	EXPECT_EQ(ESTALE, let_go(&stalled));
	EXPECT_EQ(0, state_of(self));
	munmap(go, page_bytes());
}

TEST_F_TIMEOUT(writer, a_writer_killed_in_the_middle_leaves_nothing, TEST_SECONDS)
{
	NEEDS_USERFAULTFD();
	for (enum stalled_call call = STALLED_STAGE; call <= STALLED_WRITE; call++) {
		struct pollfd polled = { .fd = self->fd, .events = POLLOUT };
		struct stalled stalled;

		stall(_metadata, self, &stalled, self->writer, call);
		close(self->writer);
		kill(stalled.child.pid, SIGKILL);
		EXPECT_EQ(128 + SIGKILL, end_child(&stalled.child));
		close(stalled.faults);
		EXPECT_EQ(1, poll(&polled, 1, -1));
		EXPECT_EQ(call, state_of(self));
		EXPECT_EQ(0, append_token(self, self->fd, call));
		self->writer = device_open_writer(self->fd, 0);
		ASSERT_LE(0, self->writer);
	}
	EXPECT_TRUE(token_is(self, 0, 0));
	EXPECT_TRUE(token_is(self, 1, 1));
}

/* Sources that are not there yet, and destinations beside truncates */

/* Pages that nobody has touched */
static uint8_t *untouched(size_t bytes)
{
	uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	/* which is EINVAL where there are none */
	if (at == MAP_FAILED || (madvise(at, bytes, MADV_NOHUGEPAGE) && errno != EINVAL))
		abort();
	return at;
}

#define MANY 64

/* Each piece of the copy begins on a page that has to come first: no reason for EFAULT */
TEST(an_untouched_source_is_no_bad_one)
{
	const size_t page = page_bytes();
	const size_t bytes = MANY * page;
	struct kvscratch_plane planes[MANY];
	int small = new_pad(3 * MANY, page);
	struct iovec iov = { .iov_len = bytes };
	int many, writer;

	for (int i = 0; i < MANY; i++)
		planes[i] = (struct kvscratch_plane){ .dim = page, .dtype = KVSCRATCH_DTYPE_U8 };
	many = device_create_planes(3 * MANY, planes, MANY);
	ASSERT_LE(0, small);
	ASSERT_LE(0, many);
	EXPECT_EQ(0, device_append(small, untouched(bytes), bytes));
	EXPECT_EQ(0, device_append(many, untouched(bytes), bytes));
	iov.iov_base = untouched(bytes);
	EXPECT_EQ((ssize_t)bytes, writev(small, &iov, 1));
	iov.iov_base = untouched(bytes);
	EXPECT_EQ((ssize_t)bytes, writev(many, &iov, 1));
	writer = device_open_writer(small, 0);
	ASSERT_LE(0, writer);
	EXPECT_EQ(0, device_stage(writer, 0, 2 * MANY, untouched(bytes), MANY));
	EXPECT_EQ(0, device_commit(writer, 3 * MANY));
	close(writer);
	close(small);
	close(many);
}

struct truncater {
	int fd;
	uint64_t len;
	bool stop;
	int err;
};

static void *truncate_all_the_time(void *arg)
{
	struct truncater *truncater = arg;

	while (!__atomic_load_n(&truncater->stop, __ATOMIC_RELAXED) && !truncater->err)
		truncater->err = device_truncate(truncater->fd, truncater->len, 0);
	return NULL;
}

/* A token of many pieces, which all survive: reads of it end */
TEST(reads_of_many_planes_end_beside_truncates)
{
	struct kvscratch_plane planes[4 * MANY];
	const size_t bytes = 4 * MANY * 100;
	uint8_t *token = malloc(bytes), *got = malloc(bytes);
	struct truncater truncater = { .len = 1 };
	pthread_t thread;

	for (int i = 0; i < 4 * MANY; i++)
		planes[i] = (struct kvscratch_plane){ .dim = 100, .dtype = KVSCRATCH_DTYPE_U8 };
	truncater.fd = device_create_planes(4, planes, 4 * MANY);
	ASSERT_LE(0, truncater.fd);
	fill_row(token, bytes, 1);
	ASSERT_EQ(0, device_append(truncater.fd, token, bytes));
	ASSERT_EQ(0, pthread_create(&thread, NULL, truncate_all_the_time, &truncater));
	for (int i = 0; i < 200; i++) {
		ASSERT_EQ((ssize_t)bytes, pread(truncater.fd, got, bytes, 0));
		ASSERT_EQ(0, memcmp(token, got, bytes));
	}
	__atomic_store_n(&truncater.stop, true, __ATOMIC_RELAXED);
	pthread_join(thread, NULL);
	EXPECT_EQ(0, truncater.err);
	close(truncater.fd);
	free(token);
	free(got);
}

/* The last handle of all unmounts what it is of, and a watch on its inode is still there. */
TEST(a_watch_holds_up_no_close)
{
	int watch = inotify_init1(IN_CLOEXEC);
	int fd = new_pad(1, 1);
	char path[40];

	ASSERT_LE(0, watch);
	ASSERT_LE(0, fd);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	ASSERT_LE(0, inotify_add_watch(watch, path, IN_ALL_EVENTS));
	EXPECT_EQ(0, close(fd));
	close(watch);
	fd = new_pad(1, 1);
	EXPECT_LE(0, fd);
	close(fd);
}

/* Truncating with an expectation, sealing */

static int truncate_if(int fd, uint64_t len, uint64_t generation, uint64_t expected_len)
{
	struct kvscratch_truncate truncate = {
		.size = sizeof(truncate),
		.flags = KVSCRATCH_TRUNCATE_EXPECT,
		.len = len,
		.expected_generation = generation,
		.expected_len = expected_len,
	};

	return ioctl(fd, KVSCRATCH_IOC_TRUNCATE, &truncate) ? -errno : 0;
}

TEST_F_TIMEOUT(writer, truncates_what_it_expects, TEST_SECONDS)
{
	for (uint32_t i = 0; i < 3; i++) {
		ASSERT_EQ(0, append_token(self, self->writer, i));
	}
	EXPECT_EQ(-ECANCELED, truncate_if(self->writer, 0, 1, 3));
	EXPECT_EQ(-ECANCELED, truncate_if(self->writer, 0, 1ull << 32, 3));
	EXPECT_EQ(-ECANCELED, truncate_if(self->writer, 0, 0, 2));
	/* what is expected comes before what is asked for */
	EXPECT_EQ(-ECANCELED, truncate_if(self->writer, 9, 0, 2));
	EXPECT_EQ(-EINVAL, truncate_if(self->writer, 4, 0, 3));
	EXPECT_EQ(3, state_of(self));
	EXPECT_EQ(0, truncate_if(self->writer, 2, 0, 3));
	EXPECT_EQ(0, truncate_if(self->writer, 1, 1, 2));
	EXPECT_EQ(2ull << 32 | 1, state_of(self));
}

TEST_F_TIMEOUT(writer, a_sealed_pad_does_not_change, TEST_SECONDS)
{
	struct pollfd polled = { .fd = self->fd, .events = POLLRDHUP };

	ASSERT_EQ(0, append_token(self, self->writer, 0));
	ASSERT_EQ(0, stage_all(self, self->writer, 1, 1, 1));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	ASSERT_EQ(0, device_seal(self->writer));
	EXPECT_EQ(0, device_seal(self->writer));
	EXPECT_EQ(1, poll(&polled, 1, 0));
	EXPECT_EQ(POLLRDHUP, polled.revents);
	EXPECT_EQ(1ull << 32 | KVSCRATCH_PAD_WRITER | KVSCRATCH_PAD_SEALED, role_of(self));
	for (int i = 0; i < 2; i++) {
		int fd = i ? self->fd : self->writer;

		EXPECT_EQ(-EROFS, append_token(self, fd, 1));
		EXPECT_EQ(-EROFS, stage(self, fd, K, 1, 1, 1));
		EXPECT_EQ(-EROFS, device_commit(fd, 1));
		EXPECT_EQ(-EROFS, device_truncate(fd, 0, KVSCRATCH_TRUNCATE_ZERO));
		EXPECT_EQ(-EROFS, truncate_if(fd, 0, 5, 5));
		EXPECT_EQ(0, device_seal(fd));
		/* who writes need not wait to learn it */
		EXPECT_EQ(POLLOUT, events_of(fd) & POLLOUT);
	}
	EXPECT_EQ(-EROFS, device_open_writer(self->fd, KVSCRATCH_OPEN_TAKEOVER));
	EXPECT_EQ(1, state_of(self));
	EXPECT_TRUE(token_is(self, 0, 0));
}

static void *seal_when_told(void *arg)
{
	FIXTURE_DATA(writer) *self = arg;

	return (void *)(long)device_seal(self->writer);
}

TEST_F_TIMEOUT(writer, seal_wakes_who_waits, TEST_SECONDS)
{
	struct pollfd polled = { .fd = self->fd, .events = POLLRDHUP };
	pthread_t thread;
	void *err;

	ASSERT_EQ(0, pthread_create(&thread, NULL, seal_when_told, self));
	EXPECT_EQ(1, poll(&polled, 1, -1));
	EXPECT_EQ(KVSCRATCH_PAD_SEALED, role_of(self) & KVSCRATCH_PAD_SEALED);
	pthread_join(thread, &err);
	EXPECT_EQ(NULL, err);
}

/* Handles of one's own, where there is no path to any */

static int landlock_all(void)
{
	struct landlock_ruleset_attr attr = {
		.handled_access_fs = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE |
				     LANDLOCK_ACCESS_FS_READ_DIR,
	};
	int rules = syscall(SYS_landlock_create_ruleset, &attr, sizeof(attr), 0);

	if (rules < 0)
		return -errno;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return syscall(SYS_landlock_restrict_self, rules, 0) ? -errno : 0;
}

TEST_F_TIMEOUT(writer, a_handle_is_enough_to_open_another, TEST_SECONDS)
{
	int node = device_open(O_RDONLY);

	ASSERT_LE(0, node);
	close(node);
	for (int cage = 0; cage < 3; cage++) {
		struct child child;

		if (start_child(&child)) {
			int fd, err = 0;

			if (cage == 0)
				CHILD_CHECK(!mkdir("/tmp/empty", 0700) && !chroot("/tmp/empty"));
			else if (cage == 1)
				err = landlock_all();
			else
				err = unshare(CLONE_NEWUSER) ? -errno : 0;
			if (err == -ENOSYS || err == -EOPNOTSUPP || err == -EINVAL)
				_exit(77);
			CHILD_CHECK(!err);
			CHILD_CHECK(cage == 2 || device_open(O_RDONLY) < 0);
			fd = device_open_reader(self->fd);
			CHILD_CHECK(fd >= 0);
			/* no way back to what it did not give */
			CHILD_CHECK(device_reopen(fd, O_RDWR) == -EACCES);
			CHILD_CHECK(device_reopen(fd, O_WRONLY) == -EACCES);
			CHILD_CHECK(device_open_writer(fd, KVSCRATCH_OPEN_TAKEOVER) == -EACCES);
			CHILD_CHECK(device_reopen(fd, O_RDONLY) >= 0);
			_exit(0);
		}
		int status = end_child(&child);

		EXPECT_TRUE(status == 0 || (cage && status == 77))
			TH_LOG("cage %d: %d", cage, status);
		if (status == 77)
			TH_LOG("cage %d is not in this kernel", cage);
	}
	rmdir("/tmp/empty");
}

TEST_HARNESS_MAIN
