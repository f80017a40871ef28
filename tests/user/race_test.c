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
	self->pad = device_open(O_RDWR);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_create_scaled(self->pad, ROWS, DIM, variant->dtype,
					     variant->input_dtype, 0));
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

static void keep_appending(int fd)
{
	union {
		uint8_t bytes[BATCH_ROWS * DIM];
		float floats[BATCH_ROWS * DIM];
	} rows;
	struct kvscratch_info info;

	CHILD_CHECK(!describe(fd, &info));
	for (uint32_t round = 0; !is_over(); round++) {
		int err;

		for (uint32_t i = 0; i < BATCH_ROWS * DIM; i++) {
			uint32_t value = (round + i / DIM) % 200 + 1;

			if (info.input_dtype == KVSCRATCH_DTYPE_F32)
				rows.floats[i] = value;	/* some are too large for an i8 */
			else
				rows.bytes[i] = value;
		}
		err = device_append(fd, &rows, BATCH_ROWS * info.input_row_bytes);
		CHILD_CHECK(!err || err == -ENOSPC);
		if (err)
			sched_yield();
	}
}

static void truncate_rounds(int fd)
{
	for (uint32_t round = 0; round < ROUNDS;) {
		uint64_t len = len_of(fd);
		int err = device_truncate(fd, len / 2,
					     round % 4 ? 0 : KVSCRATCH_TRUNCATE_ZERO);

		/* the other truncator may have dropped more */
		CHILD_CHECK(!err || err == -EINVAL);
		if (len)
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
	uint8_t row[2 * DIM];

	for (uint32_t round = 0; !is_over(); round++) {
		CHILD_CHECK(poll(&p, 1, 0) >= 0 && !(p.revents & (POLLERR | POLLHUP)));
		CHILD_CHECK(read(fd, row, sizeof(row)) >= 0);
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
		CHILD_CHECK(strstr(text, "Scratchpad(len="));
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
	truncate_rounds, truncate_rounds, keep_appending, keep_appending, keep_reading,
	keep_looking, keep_viewing, keep_following, keep_following,
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
			fd = device_open(O_RDWR);
			ASSERT_LE(0, fd);
			ASSERT_EQ(0, device_attach(fd, self->pad));
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

/* The handle comes to its pad while others use it. */
#define BINDINGS 40

static void bind_and_use(int fd)
{
	struct kvscratch_info info;
	uint8_t row[DIM] = { 0 };
	int err = device_create(fd, ROWS, DIM, KVSCRATCH_DTYPE_U8);

	CHILD_CHECK(!err || err == -EBUSY);
	CHILD_CHECK(!device_append(fd, row, sizeof(row)));
	CHILD_CHECK(!describe(fd, &info) && info.len);
	_exit(0);
}

static void use_what_may_be_there(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN | POLLOUT };
	struct kvscratch_info info;
	int err;

	do {
		err = describe(fd, &info);
		CHILD_CHECK(!err || err == -EBADFD);
		CHILD_CHECK(poll(&p, 1, 0) == 1);
	} while (err || !info.len);
	_exit(0);
}

FIXTURE(handle) { };

FIXTURE_SETUP(handle) { }

FIXTURE_TEARDOWN(handle) { }

TEST_F_TIMEOUT(handle, is_bound_while_in_use, TEST_SECONDS)
{
	for (int binding = 0; binding < BINDINGS; binding++) {
		int fd = device_open(O_RDWR);
		pid_t pids[3];

		ASSERT_LE(0, fd);
		for (int i = 0; i < 3; i++) {
			pids[i] = fork_child();
			ASSERT_LE(0, pids[i]);
			if (!pids[i] && i)
				bind_and_use(fd);
			else if (!pids[i])
				use_what_may_be_there(fd);
		}
		for (int i = 0; i < 3; i++)
			EXPECT_EQ(0, wait_for(pids[i]));
		EXPECT_EQ(2, len_of(fd));
		close(fd);
	}
}

TEST_HARNESS_MAIN
