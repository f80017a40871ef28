// SPDX-License-Identifier: GPL-2.0-only
/*
 * write(), writev() and io_uring: whole rows, all or nothing, whatever the
 * source does and whoever is killed; who waits for whom, and who does not.
 */
#include "common.h"
#include "ring.h"
#include "stall.h"

#include <sys/inotify.h>

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

/* A batch that is copied in many pieces of 128 KiB, into several chunks */
TEST_F_TIMEOUT(append, a_hole_in_a_large_batch_commits_nothing, TEST_SECONDS)
{
	const size_t row_bytes = 1 << 20, bytes = 5 * row_bytes;
	const size_t holes[] = {
		0, (128 << 10) - 4096, 128 << 10, 1 << 20, (2 << 20) - 4096, 2 << 20, bytes - 4096,
	};
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

/* What a failed append and dropped rows leave behind is gone after ZERO. */
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

/* Tokens: a row of each plane in turn */

static const struct kvscratch_plane token_planes[] = {
	{ .dim = 1000, .dtype = KVSCRATCH_DTYPE_F32 },
	{ .dim = 4096, .dtype = KVSCRATCH_DTYPE_I8, .input_dtype = KVSCRATCH_DTYPE_F32 },
	{ .dim = 3, .dtype = KVSCRATCH_DTYPE_U8 },
	{ .dim = 2048, .dtype = KVSCRATCH_DTYPE_MXINT8, .input_dtype = KVSCRATCH_DTYPE_F16 },
	{ .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8 },
};

#define TOKEN_BYTES (4000u + 4 * 4096 + 3 + 2 * 2048 + 64 + 2)
#define TOKENS 20u

/*
 * What is appended as token @n: small whole numbers where a plane converts, of which fixed
 * point without fraction bits keeps each; else bytes.
 */
static void fill_token(uint8_t *token, uint32_t n)
{
	/* 1.0: an element of 64 and a scale of 127 */
	const uint16_t one = 0x3c00;

	fill_row(token, TOKEN_BYTES, n);
	for (uint32_t i = 0; i < 4096; i++) {
		float value = (int)((n * 7 + i) % 255) - 127;

		memcpy(token + 4000 + 4 * i, &value, 4);
	}
	for (uint32_t i = 0; i < 2048; i++)
		memcpy(token + 4000 + 4 * 4096 + 3 + 2 * i, &one, 2);
}

static bool token_is(const uint8_t *map, const struct kvscratch_plane *planes, uint32_t n)
{
	uint8_t *token = malloc(TOKEN_BYTES);
	const uint8_t *data[ARRAY_SIZE(token_planes)], *scales[ARRAY_SIZE(token_planes)];
	const uint8_t *last = token + TOKEN_BYTES - 66;
	bool good = true;

	if (!token)
		abort();
	fill_token(token, n);
	for (uint32_t i = 0; i < ARRAY_SIZE(token_planes); i++) {
		data[i] = map + planes[i].offset + (size_t)n * planes[i].row_bytes;
		scales[i] = map + planes[i].scales_offset + (size_t)n * planes[i].scales_row_bytes;
	}
	good &= !memcmp(data[0], token, 4000);
	for (uint32_t i = 0; i < 4096; i++)
		good &= (int8_t)data[1][i] == (int)((n * 7 + i) % 255) - 127;
	good &= !memcmp(data[2], token + 4000 + 4 * 4096, 3);
	for (uint32_t i = 0; i < 2048; i++)
		good &= data[3][i] == 64 && scales[3][i / 32] == 127;
	good &= !memcmp(data[4], last, 64) && !memcmp(scales[4], last + 64, 2);
	free(token);
	return good;
}

TEST_F_TIMEOUT(append, tokens_of_several_planes, TEST_SECONDS)
{
	struct kvscratch_plane planes[ARRAY_SIZE(token_planes)];
	struct kvscratch_pad_info info;
	uint8_t *tokens = mmap(NULL, TOKENS * TOKEN_BYTES, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint8_t *map;
	int pad = device_create_planes(TOKENS, token_planes, ARRAY_SIZE(token_planes));

	ASSERT_NE(MAP_FAILED, (void *)tokens);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_pad_info(pad, &info));
	ASSERT_EQ(ARRAY_SIZE(planes), device_planes(pad, 0, planes, ARRAY_SIZE(planes)));
	ASSERT_EQ(TOKEN_BYTES, info.input_row_bytes);
	map = mmap(NULL, info.mapping_bytes, PROT_READ, MAP_SHARED, pad, 0);
	ASSERT_NE(MAP_FAILED, (void *)map);
	for (uint32_t n = 0; n < TOKENS; n++)
		fill_token(tokens + n * TOKEN_BYTES, n);

	EXPECT_ERRNO(EINVAL, write(pad, tokens, TOKEN_BYTES - 1));
	EXPECT_ERRNO(EINVAL, write(pad, tokens, TOKEN_BYTES + 4000));
	EXPECT_EQ(TOKEN_BYTES, write(pad, tokens, TOKEN_BYTES));
	/* a hole in each page of the rest: in every plane of some token */
	for (size_t hole = 4096; hole < TOKENS * TOKEN_BYTES; hole += 4096) {
		size_t bytes = (TOKENS - 1) * TOKEN_BYTES;

		ASSERT_EQ(0, mprotect(tokens + hole, 4096, PROT_NONE));
		EXPECT_ERRNO(EFAULT, write(pad, tokens, bytes));
		EXPECT_EQ(1, len_of(pad));
		ASSERT_EQ(0, mprotect(tokens + hole, 4096, PROT_READ));
		/* the last of them may lie behind what was to be read */
		if (hole + 8192 > bytes)
			break;
	}
	EXPECT_TRUE(token_is(map, planes, 0));
	EXPECT_ERRNO(ENOSPC, write(pad, tokens, TOKENS * TOKEN_BYTES));
	EXPECT_EQ((ssize_t)((TOKENS - 1) * TOKEN_BYTES),
		  write(pad, tokens + TOKEN_BYTES, (TOKENS - 1) * TOKEN_BYTES));
	EXPECT_EQ(TOKENS, len_of(pad));
	for (uint32_t n = 0; n < TOKENS; n++)
		EXPECT_TRUE(token_is(map, planes, n));

	/* and ZERO scrubs elements and scales of all of them */
	ASSERT_EQ(0, device_truncate(pad, 2, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(token_is(map, planes, 1));
	for (uint32_t i = 0; i < ARRAY_SIZE(planes); i++) {
		EXPECT_TRUE(all_zero(map + planes[i].offset + 2 * planes[i].row_bytes,
				     (TOKENS - 2) * planes[i].row_bytes));
		if (planes[i].scales_row_bytes)
			EXPECT_TRUE(all_zero(map + planes[i].scales_offset +
					     2 * planes[i].scales_row_bytes,
					     (TOKENS - 2) * planes[i].scales_row_bytes));
	}
	munmap((void *)map, info.mapping_bytes);
	munmap(tokens, TOKENS * TOKEN_BYTES);
	close(pad);
}

/* One value of one plane that cannot be converted is none of all planes. */
TEST_F(append, a_nan_in_a_token_commits_nothing)
{
	uint8_t *tokens = malloc(3 * TOKEN_BYTES);
	int pad = device_create_planes(TOKENS, token_planes, ARRAY_SIZE(token_planes));
	const uint16_t nan = 0x7e00, one = 0x3c00;
	uint8_t *last = tokens + 2 * TOKEN_BYTES + 4000 + 4 * 4096 + 3 + 2 * 2047;

	ASSERT_NE(NULL, tokens);
	ASSERT_LE(0, pad);
	for (uint32_t n = 0; n < 3; n++)
		fill_token(tokens + n * TOKEN_BYTES, n);
	memcpy(last, &nan, 2);
	EXPECT_ERRNO(EDOM, write(pad, tokens, 3 * TOKEN_BYTES));
	EXPECT_EQ(0, len_of(pad));
	memcpy(last, &one, 2);
	EXPECT_EQ((ssize_t)(3 * TOKEN_BYTES), write(pad, tokens, 3 * TOKEN_BYTES));
	EXPECT_EQ(3, len_of(pad));
	free(tokens);
	close(pad);
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
	ring_close(&ring);
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
	ring_close(&ring);
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
	ring_close(&ring);
}

/* One row of room, and two who want it: each of them gets its answer, every time. */
#define FEW_LAST_ROWS 2000

static void write_when_told(int pad, uint32_t rounds, const uint32_t *round, uint32_t *done,
			    int *result)
{
	uint8_t row[ROW_BYTES] = { 0 };

	for (uint32_t next = 1; next <= rounds; next++) {
		while (__atomic_load_n(round, __ATOMIC_ACQUIRE) != next)
			sched_yield();
		*result = device_append(pad, row, ROW_BYTES);
		__atomic_store_n(done, next, __ATOMIC_RELEASE);
	}
	_exit(0);
}

TEST_F_TIMEOUT(append, io_uring_gets_its_enospc, MANY_ROUNDS_SECONDS)
{
	const uint32_t rounds = rounds_or(FEW_LAST_ROWS);
	struct {
		uint32_t round;
		uint32_t done;
		int result;
	} *shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint8_t *rows = source_rows();
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = self->pad,
		.addr = (uintptr_t)rows,
		.len = ROW_BYTES,
	};
	struct child writer;
	struct ring ring;

	ASSERT_NE(MAP_FAILED, (void *)shared);
	ASSERT_EQ(0, ring_open(&ring));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, ROWS));
	if (start_child(&writer))
		write_when_told(self->pad, rounds, &shared->round, &shared->done, &shared->result);
	for (uint32_t round = 1; round <= rounds; round++) {
		int result;

		ASSERT_EQ(0, device_truncate(self->pad, ROWS - 1, 0));
		__atomic_store_n(&shared->round, round, __ATOMIC_RELEASE);
		result = ring_do(&ring, &sqe);
		while (__atomic_load_n(&shared->done, __ATOMIC_ACQUIRE) != round)
			sched_yield();
		ASSERT_EQ(ROWS, len_of(self->pad));
		ASSERT_EQ(shared->result ? (int)ROW_BYTES : -ENOSPC, result);
		ASSERT_EQ(result == -ENOSPC ? 0 : -ENOSPC, shared->result);
	}
	EXPECT_EQ(0, end_child(&writer));
	munmap(shared, sizeof(*shared));
	ring_close(&ring);
}

/* Who must not wait does not fail for a co-writer that only has the lock for a moment. */
#define NOWAIT_ROUNDS 5000

static void append_for_ever(int pad)
{
	uint8_t row[ROW_BYTES];

	memset(row, 1, sizeof(row));
	for (;;) {
		int err = device_append(pad, row, sizeof(row));

		if (err == -ENOSPC)
			err = device_truncate(pad, 0, 0);
		CHILD_CHECK(!err);
	}
}

TEST_F_TIMEOUT(append, nowait_is_no_eagain_beside_short_appends, TEST_SECONDS)
{
	uint8_t *rows = source_rows();
	struct iovec iov = { rows, ROW_BYTES };
	uint64_t generation;
	struct child writer;

	if (start_child(&writer))
		append_for_ever(self->pad);
	for (int i = 0; i < NOWAIT_ROUNDS; i++) {
		if (pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT) == ROW_BYTES)
			continue;
		ASSERT_EQ(ENOSPC, errno);
		ASSERT_EQ(0, device_truncate(self->pad, 0, 0));
	}
	/* without the other at work this would show nothing */
	generation = generation_of(self->pad);
	while (generation_of(self->pad) == generation)
		sched_yield();
	kill(writer.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&writer));
}

/* An event for a watcher would be an allocation in each append. */
TEST_F(append, inotify_sees_nothing)
{
	int watch = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	char events[4096];
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", self->pad);
	ASSERT_LE(0, watch);
	ASSERT_LE(0, inotify_add_watch(watch, path, IN_ALL_EVENTS));
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
 * A writer whose source page does not arrive
 */

FIXTURE(stuck)
{
	int pad;
	/* another open file of it */
	int other;
	struct stall writer;
	struct kvscratch_view view;
};

#define STUCK_ROWS 4

FIXTURE_SETUP(stuck)
{
	self->pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	self->other = device_reopen(self->pad, O_RDWR);
	ASSERT_LE(0, self->other);
	ASSERT_EQ(0, device_map(self->pad, &self->view));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 2));
	start_stall(&self->writer, self->pad, STUCK_ROWS * ROW_BYTES, stalled_append);
}

FIXTURE_TEARDOWN(stuck)
{
	/* a test that ended it has taken it away */
	if (self->writer.child.pid)
		kill_stall(&self->writer);
	device_unmap(&self->view);
	close(self->other);
	close(self->pad);
}

static int kill_writer(FIXTURE_DATA(stuck) *self)
{
	int status = kill_stall(&self->writer);

	self->writer.child.pid = 0;
	return status;
}

static short polled(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLPRI | POLLRDHUP };

	return poll(&p, 1, 0) < 0 ? -1 : p.revents;
}

TEST_F_TIMEOUT(stuck, readers_do_not_wait, TEST_SECONDS)
{
	uint8_t row[ROW_BYTES];
	struct kvscratch_plane plane;
	struct kvscratch_view view;
	char path[64];
	int reader, fd;

	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(2, kvscratch_view_state(&self->view));
	EXPECT_EQ(ROW_BYTES, pread(self->pad, row, ROW_BYTES, ROW_BYTES));
	EXPECT_TRUE(row_is(row, ROW_BYTES, 1));
	EXPECT_EQ(POLLIN, polled(self->pad));
	EXPECT_EQ(0, device_seen(self->pad, 2));
	EXPECT_EQ(0, polled(self->pad));
	EXPECT_EQ(ROW_BYTES, lseek(self->pad, ROW_BYTES, SEEK_SET));
	EXPECT_EQ(1, device_planes(self->pad, 0, &plane, 1));
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
	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	/* its pad is free again and nothing of its rows was committed */
	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(ROW_BYTES, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_TRUE(row_is(view_row(&self->view, 2), ROW_BYTES, 0));
}

/*
 * What io_uring relies on: it meets EAGAIN by polling for EPOLLOUT, and has to come
 * again also when the append in its way took the last row.
 */
TEST_F_TIMEOUT(stuck, epollout_after_eagain, TEST_SECONDS)
{
	uint8_t *rows = source_rows();
	struct iovec iov = { rows, ROW_BYTES };
	struct pollfd writable = { .fd = self->other, .events = POLLOUT };

	for (int i = 0; i < 2; i++)
		EXPECT_ERRNO(EAGAIN, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	/* who polls then sleeps, on this open file or on another */
	EXPECT_EQ(POLLIN, polled(self->pad));
	EXPECT_EQ(POLLIN, polled(self->other));
	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	EXPECT_EQ(1, poll(&writable, 1, -1));
	EXPECT_EQ(POLLOUT, writable.revents);
	ASSERT_EQ(0, append_rows(self->other, ROW_BYTES, 0, ROWS - 2));

	/* each of the two gets its answer, and a full pad stays writable */
	for (int i = 0; i < 2; i++) {
		EXPECT_EQ(POLLIN | POLLOUT, polled(self->pad));
		EXPECT_ERRNO(ENOSPC, pwritev2(self->pad, &iov, 1, -1, RWF_NOWAIT));
	}
	EXPECT_EQ(POLLIN | POLLOUT, polled(self->pad));
}

/* A sleeper in poll() for EPOLLOUT is woken by the end of the turn, whatever the end is. */
TEST_F_TIMEOUT(stuck, the_end_of_a_turn_wakes_pollers, TEST_SECONDS)
{
	for (int round = 0; round < 2; round++) {
		pid_t poller = fork_child();
		struct pollfd p = { .fd = self->other, .events = POLLOUT };

		ASSERT_LE(0, poller);
		if (!poller)
			_exit(poll(&p, 1, -1) == 1 && p.revents == POLLOUT ? 0 : 1);
		EXPECT_EQ('S', await_sleep(poller));
		if (round) {
			EXPECT_EQ(128 + SIGKILL, kill_writer(self));
		} else {
			ASSERT_TRUE(serve_stall(&self->writer, source_rows()));
			EXPECT_EQ(0, end_stall(&self->writer));
			EXPECT_EQ(2 + STUCK_ROWS, len_of(self->pad));
		}
		EXPECT_EQ(0, wait_for(poller));
		if (!round)
			start_stall(&self->writer, self->pad, STUCK_ROWS * ROW_BYTES,
				    stalled_append);
	}
}

/* O_NONBLOCK is of the open file, and every call that would wait looks at it. */
TEST_F_TIMEOUT(stuck, nonblock_is_eagain, TEST_SECONDS)
{
	uint8_t row[ROW_BYTES] = { 0 };

	ASSERT_EQ(0, fcntl(self->other, F_SETFL, O_NONBLOCK));
	for (int i = 0; i < 2; i++) {
		EXPECT_ERRNO(EAGAIN, write(self->other, row, ROW_BYTES));
		EXPECT_EQ(-EAGAIN, device_truncate(self->other, 0, 0));
		EXPECT_EQ(-EAGAIN, device_truncate(self->other, 0, KVSCRATCH_TRUNCATE_ZERO));
		EXPECT_EQ(-EAGAIN, device_seal(self->other));
		EXPECT_EQ(-EAGAIN, device_open_writer(self->other, 0));
	}
	EXPECT_EQ(2, kvscratch_view_state(&self->view));
	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	EXPECT_EQ(0, device_truncate(self->other, 1, 0));
	EXPECT_EQ(ROW_BYTES, write(self->other, row, ROW_BYTES));
	EXPECT_EQ(0, device_seal(self->other));
}

/* Beside a stalled append a request sleeps in poll: it keeps no worker, and nothing spins. */
TEST_F_TIMEOUT(stuck, io_uring_waits_its_turn_without_a_worker, TEST_SECONDS)
{
	uint8_t *rows = source_rows();
	struct io_uring_sqe sqe = {
		.opcode = IORING_OP_WRITE,
		.fd = self->other,
		.addr = (uintptr_t)rows,
		.len = ROW_BYTES,
	};
	struct ring ring;

	ASSERT_EQ(0, ring_open(&ring));
	/* with a truncate that nobody has acknowledged */
	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	ASSERT_EQ(0, device_truncate(self->pad, 1, 0));
	start_stall(&self->writer, self->pad, STUCK_ROWS * ROW_BYTES, stalled_append);
	ASSERT_EQ(0, ring_submit(&ring, &sqe));
	EXPECT_FALSE(ring_is_done(&ring));
	EXPECT_EQ(1, nr_tasks());
	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	EXPECT_EQ(ROW_BYTES, ring_wait(&ring));
	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_TRUE(row_is(view_row(&self->view, 1), ROW_BYTES, 0));

	/* the append in its way takes the last rows */
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, ROWS - 2 - STUCK_ROWS));
	start_stall(&self->writer, self->pad, STUCK_ROWS * ROW_BYTES, stalled_append);
	ASSERT_EQ(0, ring_submit(&ring, &sqe));
	EXPECT_FALSE(ring_is_done(&ring));
	ASSERT_TRUE(serve_stall(&self->writer, rows));
	EXPECT_EQ(0, end_stall(&self->writer));
	self->writer.child.pid = 0;
	EXPECT_EQ(-ENOSPC, ring_wait(&ring));
	EXPECT_EQ(ROWS, len_of(self->pad));
	ring_close(&ring);
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
	pid_t second = fork_appender(self->pad, 0);

	ASSERT_LE(0, second);
	await_sleep(second);
	EXPECT_EQ(2, len_of(self->pad));
	ASSERT_TRUE(serve_stall(&self->writer, source_rows()));
	EXPECT_EQ(0, end_stall(&self->writer));
	self->writer.child.pid = 0;
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

	EXPECT_EQ(128 + SIGKILL, kill_writer(self));
	EXPECT_EQ(0, wait_for(restarted));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_TRUE(row_is(view_row(&self->view, 2), ROW_BYTES, 9));
}

TEST_HARNESS_MAIN
