// SPDX-License-Identifier: GPL-2.0-only
/*
 * Everything that a pad can do, at once: what the kernel's race detector watches
 * (race-6.1), and on any kernel a check that no reader is handed a torn row.
 */
#include "common.h"

#define ROWS 32u
#define DIM 64u
#define ROUNDS 300u
#define BATCH_ROWS 4u

/*
 * Each row of input is of one value, and so is each stored row. The truncators
 * count, and need the others' rows for it; the others go on until they are done.
 */
static bool *over;	/* shared by all actors */

static bool is_over(void)
{
	return __atomic_load_n(over, __ATOMIC_RELAXED);
}

FIXTURE(race) {
	int pad;
};

FIXTURE_VARIANT(race) {
	uint32_t dtype;
	uint32_t input_dtype;
};

FIXTURE_VARIANT_ADD(race, as_it_comes) {
	.dtype = KVSCRATCH_DTYPE_U8,
};

FIXTURE_VARIANT_ADD(race, fixed) {
	.dtype = KVSCRATCH_DTYPE_I8,
	.input_dtype = KVSCRATCH_DTYPE_F32,
};

FIXTURE_VARIANT_ADD(race, two_planes) {
	.dtype = KVSCRATCH_DTYPE_MXINT8,
	.input_dtype = KVSCRATCH_DTYPE_F32,
};

FIXTURE_SETUP(race)
{
	over = mmap(NULL, sizeof(*over), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, (void *)over);
	self->pad = device_create_scaled(ROWS, DIM, variant->dtype, variant->input_dtype, 0);
	ASSERT_LE(0, self->pad);
}

FIXTURE_TEARDOWN(race)
{
	close(self->pad);
	munmap(over, sizeof(*over));
}

static int describe(int fd, struct kvscratch_info *info)
{
	int err = device_info(fd, info);

	if (!err)
		CHILD_CHECK(info->len <= ROWS && info->trunc_len <= ROWS);
	return err;
}

union batch {
	uint8_t bytes[BATCH_ROWS * DIM];
	float floats[BATCH_ROWS * DIM];
};

static void fill_batch(union batch *batch, uint32_t input_dtype, uint32_t round)
{
	for (uint32_t i = 0; i < BATCH_ROWS * DIM; i++) {
		uint32_t value = (round + i / DIM) % 200 + 1;

		if (input_dtype == KVSCRATCH_DTYPE_F32)
			batch->floats[i] = value;	/* some are too large for an i8 */
		else
			batch->bytes[i] = value;
	}
}

static void keep_appending(int fd)
{
	struct kvscratch_info info;
	union batch batch;

	CHILD_CHECK(!describe(fd, &info));
	for (uint32_t round = 0; !is_over(); round++) {
		int err;

		fill_batch(&batch, info.input_dtype, round);
		err = device_append(fd, &batch, BATCH_ROWS * info.input_row_bytes);
		/* or there is a writer */
		CHILD_CHECK(!err || err == -ENOSPC || err == -EBUSY);
		if (err)
			sched_yield();
	}
}

/* Stage and commit through @fd until it was taken over. */
static void write_as_writer(int fd, uint32_t input_dtype, uint32_t rounds)
{
	union batch batch;
	int err = 0;

	for (uint32_t round = 0; !err && round < rounds; round++) {
		uint64_t len = len_of(fd);

		fill_batch(&batch, input_dtype, round);
		err = device_stage(fd, 0, len, &batch, BATCH_ROWS);
		if (!err && round % 2)
			err = device_keep(fd, 0, len, 1 + round % BATCH_ROWS);
		if (!err)
			err = device_commit(fd, len + round % (BATCH_ROWS + 1));
		/* full, or beyond what is staged since somebody took over and went on */
		if (err == -ENOSPC)
			err = device_truncate(fd, 0, round % 3 ? 0 : KVSCRATCH_TRUNCATE_ZERO);
	}
	CHILD_CHECK(!err || err == -ESTALE || err == -EINVAL);
}

/* Be the writer, now and then, by force if need be. */
static void keep_taking_over(int fd)
{
	struct kvscratch_info info;

	CHILD_CHECK(!describe(fd, &info));
	for (uint32_t round = 0; !is_over(); round++) {
		int writer = device_open_writer(fd, round % 2 ? KVSCRATCH_OPEN_TAKEOVER : 0);

		CHILD_CHECK(writer >= 0 || writer == -EBUSY);
		if (writer >= 0) {
			write_as_writer(writer, info.input_dtype, round % 8);
			close(writer);
		}
		/* others want their turn as well */
		for (int i = 0; i < 4; i++)
			sched_yield();
	}
}

static void truncate_rounds(int fd)
{
	for (uint32_t round = 0; round < ROUNDS;) {
		uint64_t len = len_of(fd);
		int err = device_truncate(fd, len / 2,
					     round % 4 ? 0 : KVSCRATCH_TRUNCATE_ZERO);

		/* the other truncator may have dropped more, or there is a writer */
		CHILD_CHECK(!err || err == -EINVAL || err == -EBUSY);
		if (len && err != -EBUSY)
			round++;
		else
			sched_yield();
	}
}

static void check_rows(const uint8_t *rows, uint32_t row_bytes, uint32_t count)
{
	for (uint32_t row = 0; row < count; row++, rows += row_bytes)
		CHILD_CHECK(!memcmp(rows, rows + 1, DIM - 1));
}

static void keep_reading(int fd)
{
	struct kvscratch_info info;
	uint8_t rows[ROWS * 2 * DIM];

	CHILD_CHECK(!describe(fd, &info));
	while (!is_over()) {
		ssize_t got = pread(fd, rows, ROWS * info.row_bytes, 0);

		CHILD_CHECK(got >= 0);
		check_rows(rows, info.row_bytes, got / info.row_bytes);
	}
}

/* They share a handle, and so its position and what it has acknowledged. */
static void keep_following(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT | POLLPRI };
	struct kvscratch_info info;
	uint8_t row[2 * DIM];

	for (uint32_t round = 0; !is_over(); round++) {
		CHILD_CHECK(poll(&p, 1, 0) >= 0 && !(p.revents & (POLLERR | POLLHUP | POLLPRI)));
		CHILD_CHECK(read(fd, row, sizeof(row)) >= 0);
		CHILD_CHECK(!describe(fd, &info));
		CHILD_CHECK(!device_seen(fd, info.generation << 32 | info.len));
		CHILD_CHECK(lseek(fd, 0, round % 2 ? SEEK_SET : SEEK_END) >= 0);
	}
}

static void keep_looking(int fd)
{
	uint64_t generation = 0;
	char path[32], text[512];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	while (!is_over()) {
		int fdinfo = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t got = read(fdinfo, text, sizeof(text) - 1);
		struct kvscratch_info info;

		CHILD_CHECK(got > 0);
		text[got] = '\0';
		CHILD_CHECK(strstr(text, "kvscratch-len:\t"));
		close(fdinfo);
		CHILD_CHECK(!describe(fd, &info) && info.generation >= generation);
		generation = info.generation;
	}
}

static void keep_viewing(int fd)
{
	while (!is_over()) {
		struct kvscratch_view view;
		uint8_t rows[ROWS * DIM];
		int reader = device_open_reader(fd);
		uint64_t state;

		CHILD_CHECK(reader >= 0 && !device_map(reader, &view));
		close(reader);
		state = kvscratch_view_state(&view);
		memcpy(rows, view.data, sizeof(rows));
		check_rows(rows, DIM, kvscratch_view_valid_rows(&view, state));
		device_unmap(&view);
	}
}

/* Each actor has a handle of its own, but for the two that share one. */
static void (*const actors[])(int fd) = {
	truncate_rounds, truncate_rounds, keep_appending, keep_appending, keep_taking_over,
	keep_taking_over, keep_reading, keep_looking, keep_viewing, keep_following, keep_following,
};

#define NR_TRUNCATORS 2

#define NR_ACTORS (sizeof(actors) / sizeof(actors[0]))

TEST_F_TIMEOUT(race, everything_at_once, TEST_SECONDS)
{
	int shared = device_open_reader(self->pad);
	struct kvscratch_info info;
	pid_t pids[NR_ACTORS];

	ASSERT_LE(0, shared);
	for (size_t i = 0; i < NR_ACTORS; i++) {
		int fd = shared;

		if (actors[i] != keep_following) {
			fd = device_reopen(self->pad, O_RDWR);
			ASSERT_LE(0, fd);
		}
		pids[i] = fork_child();
		ASSERT_LE(0, pids[i]);
		if (!pids[i]) {
			actors[i](fd);
			_exit(0);
		}
		if (fd != shared)
			close(fd);
	}
	for (size_t i = 0; i < NR_ACTORS; i++) {
		if (i == NR_TRUNCATORS)
			__atomic_store_n(over, true, __ATOMIC_RELAXED);
		EXPECT_EQ(0, wait_for(pids[i]));
	}
	close(shared);
	/* where one truncator finds too few rows, the other has dropped them */
	ASSERT_EQ(0, device_info(self->pad, &info));
	EXPECT_LE(ROUNDS, info.generation);
	if (variant->dtype == KVSCRATCH_DTYPE_I8)
		EXPECT_LT(0, info.saturated);
}

/* Handles that come and go, of many pads and of one */
#define OPENINGS 200

static void open_and_close(int fd, int round)
{
	int other = round % 3 ? device_open_reader(fd) :
		    device_open_writer(fd, KVSCRATCH_OPEN_TAKEOVER);

	CHILD_CHECK(other >= 0);
	CHILD_CHECK(len_of(other) == 1);
	close(other);
}

static void create_and_close(int fd, int round)
{
	int other = new_pad(1 + round % 3, DIM);

	(void)fd;
	CHILD_CHECK(other >= 0);
	CHILD_CHECK(!append_rows(other, DIM, 0, 1));
	close(other);
}

static void map_and_unmap(int fd, int round)
{
	struct kvscratch_view view;

	(void)round;
	CHILD_CHECK(!device_map(fd, &view));
	CHILD_CHECK(row_is(view.data, DIM, 0));
	device_unmap(&view);
}

TEST(handles_come_and_go)
{
	static void (*const rounds[])(int fd, int round) = {
		open_and_close, create_and_close, map_and_unmap, open_and_close,
	};
	long long refs = number_in_file(REFCNT, NULL);
	struct kvscratch_view view;
	int fd = new_pad(ROWS, DIM);
	pid_t pids[4];

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, append_rows(fd, DIM, 0, 1));
	for (int i = 0; i < 4; i++) {
		pids[i] = fork_child();
		ASSERT_LE(0, pids[i]);
		if (!pids[i]) {
			for (int round = 0; round < OPENINGS; round++)
				rounds[i](fd, round);
			_exit(0);
		}
	}
	for (int i = 0; i < 4; i++)
		EXPECT_EQ(0, wait_for(pids[i]));
	/* what counts mappings of the pad was never off */
	ASSERT_EQ(0, device_map(fd, &view));
	EXPECT_TRUE(row_is(view.data, DIM, 0));
	device_unmap(&view);
	close(fd);
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
}

/* Each truncate keeps what its generation says: INFO is of one moment. */
#define MOMENTS 3000
#define MOMENT_ROWS 8

static void truncate_by_generation(int fd)
{
	uint8_t row[MOMENT_ROWS] = { 0 };

	for (uint64_t generation = 1;; generation++) {
		CHILD_CHECK(!device_append(fd, row, MOMENT_ROWS - len_of(fd)));
		CHILD_CHECK(!device_truncate(fd, generation % 7, 0));
	}
}

TEST(info_is_of_one_moment)
{
	struct kvscratch_pad_info info = { 0 };
	int fd = new_pad(MOMENT_ROWS, 1);
	struct child child;

	ASSERT_LE(0, fd);
	if (start_child(&child))
		truncate_by_generation(fd);
	for (int i = 0; i < MOMENTS || info.generation < MOMENTS; i++) {
		ASSERT_EQ(0, device_pad_info(fd, &info));
		ASSERT_EQ(info.generation % 7, info.trunc_len);
		ASSERT_TRUE(info.len == MOMENT_ROWS || info.len == info.trunc_len);
	}
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	close(fd);
}

TEST_HARNESS_MAIN
