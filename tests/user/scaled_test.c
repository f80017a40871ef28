// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pads of scaled integers: that the kernel stores what the same arithmetic gives
 * here, what CREATE allows, and that two planes behave as one pad.
 */
#include "common.h"

#include "../../kvscratch_scale.h"

#define DIM 96u
#define SCALES (DIM / KVSCRATCH_MX_BLOCK)
#define RECORD_BYTES (DIM + SCALES)
#define ROWS 200u

static int try_scaled(uint64_t rows, uint32_t dim, uint32_t dtype, uint32_t input_dtype,
		      uint32_t frac_bits)
{
	int fd = device_create_scaled(rows, dim, dtype, input_dtype, frac_bits);

	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

/* A generator of our own, so that each run has the same input */
static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static const uint32_t floats[] = {
	KVSCRATCH_DTYPE_F64, KVSCRATCH_DTYPE_F32, KVSCRATCH_DTYPE_F16, KVSCRATCH_DTYPE_BF16,
};

static const uint32_t integers[] = {
	KVSCRATCH_DTYPE_I64, KVSCRATCH_DTYPE_I32, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_I8,
};

/* Bits of a finite number; with @near, exponents close to each other */
static uint64_t finite_bits(uint32_t dtype, uint64_t random, bool near)
{
	static const unsigned int mant_bits[] = { 0, 52, 23, 10, 7 };
	static const unsigned int exp_bits[] = { 0, 11, 8, 5, 8 };
	unsigned int mant = mant_bits[dtype], exp = exp_bits[dtype];
	uint64_t max_exp = (1ull << exp) - 1;
	uint64_t biased = random >> 52 & max_exp;

	if (near)
		biased = max_exp / 2 - biased % 12;
	if (biased == max_exp)
		biased--;
	return (random >> 63) << (mant + exp) | biased << mant | (random & ((1ull << mant) - 1));
}

static void *random_input(uint32_t dtype, size_t count, uint64_t seed, bool near)
{
	uint32_t size = kvscratch_dtype_size(dtype);
	uint8_t *input = malloc(count * size);
	uint64_t state = seed;

	if (!input)
		abort();
	for (size_t i = 0; i < count; i++) {
		uint64_t bits = finite_bits(dtype, next_random(&state), near);

		/* a row or two of zeros */
		if (i / DIM % 50 == 7)
			bits = 0;
		memcpy(input + i * size, &bits, size);
	}
	return input;
}

TEST(what_goes_together)
{
	for (size_t i = 0; i < ARRAY_SIZE(floats); i++) {
		EXPECT_EQ(0, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, floats[i], 0));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, floats[i], 1));
		EXPECT_EQ(-EINVAL, try_scaled(1, 33, KVSCRATCH_DTYPE_MXINT8, floats[i], 0));
		EXPECT_EQ(-EINVAL, try_scaled(1, 16, KVSCRATCH_DTYPE_MXINT8, floats[i], 0));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_U8, floats[i], 0));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, floats[i], KVSCRATCH_DTYPE_I8, 0));
		EXPECT_EQ(0, try_scaled(1, 32, floats[i], floats[i], 0));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, floats[i], 0, 1));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, floats[i], floats[!i], 0));
		for (size_t j = 0; j < ARRAY_SIZE(integers); j++) {
			EXPECT_EQ(0, try_scaled(1, 33, integers[j], floats[i], 0));
			EXPECT_EQ(0, try_scaled(1, 33, integers[j], floats[i], 62));
			EXPECT_EQ(-EINVAL, try_scaled(1, 33, integers[j], floats[i], 63));
		}
	}
	for (size_t j = 0; j < ARRAY_SIZE(integers); j++) {
		EXPECT_EQ(0, try_scaled(1, 33, integers[j], 0, 62));
		EXPECT_EQ(0, try_scaled(1, 33, integers[j], integers[j], 5));
		EXPECT_EQ(-EINVAL, try_scaled(1, 33, integers[j], integers[!j], 5));
		EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, integers[j], 0));
	}
	EXPECT_EQ(0, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, 0, 0));
	EXPECT_EQ(0, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_MXINT8, 0));
	EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, 11, 0));
	EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_MXINT8, UINT32_MAX, 0));
	EXPECT_EQ(-EINVAL, try_scaled(1, 32, KVSCRATCH_DTYPE_U8, 0, 1));
	/* the longest row, as stored and as appended */
	EXPECT_EQ(0, try_scaled(1, 1 << 21, KVSCRATCH_DTYPE_I8, KVSCRATCH_DTYPE_F64, 0));
	EXPECT_EQ(-EINVAL, try_scaled(1, (1 << 21) + 1, KVSCRATCH_DTYPE_I8, KVSCRATCH_DTYPE_F64, 0));
	EXPECT_EQ(-EINVAL, try_scaled(1, 1 << 24, KVSCRATCH_DTYPE_MXINT8, 0, 0));
}

TEST(info_tells_the_format)
{
	const size_t page = page_bytes();
	struct kvscratch_info info;
	int fd = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F16, 0);

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(KVSCRATCH_DTYPE_MXINT8, info.dtype);
	EXPECT_EQ(KVSCRATCH_DTYPE_F16, info.input_dtype);
	EXPECT_EQ(0, info.frac_bits);
	EXPECT_EQ(0, info.saturated);
	EXPECT_EQ(RECORD_BYTES, info.row_bytes);
	EXPECT_EQ(DIM * 2, info.input_row_bytes);
	EXPECT_EQ(2, info.nr_arrays);
	EXPECT_EQ(0, info.arrays[0].offset);
	EXPECT_EQ(DIM, info.arrays[0].row_bytes);
	EXPECT_EQ((ROWS * DIM + page - 1) / page * page, info.arrays[1].offset);
	EXPECT_EQ(SCALES, info.arrays[1].row_bytes);
	EXPECT_EQ(info.arrays[1].offset + (ROWS * SCALES + page - 1) / page * page,
		  info.status_offset);
	EXPECT_EQ(ROWS * RECORD_BYTES, info.data_bytes);
	close(fd);

	fd = device_create_scaled(3, 5, KVSCRATCH_DTYPE_I32, KVSCRATCH_DTYPE_F64, 17);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(KVSCRATCH_DTYPE_I32, info.dtype);
	EXPECT_EQ(KVSCRATCH_DTYPE_F64, info.input_dtype);
	EXPECT_EQ(17, info.frac_bits);
	EXPECT_EQ(20, info.row_bytes);
	EXPECT_EQ(40, info.input_row_bytes);
	EXPECT_EQ(1, info.nr_arrays);
	close(fd);

	/* as stored: the input type is the stored one */
	fd = device_create_scaled(3, 5, KVSCRATCH_DTYPE_I8, 0, 7);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(KVSCRATCH_DTYPE_I8, info.input_dtype);
	EXPECT_EQ(7, info.frac_bits);
	EXPECT_EQ(5, info.input_row_bytes);
	close(fd);
}

/* Append in batches of every kind; returns 0 or -errno */
static int append_in_batches(int fd, const uint8_t *input, size_t row_bytes)
{
	uint32_t row = 0, batch = 1;

	while (row < ROWS) {
		uint32_t count = batch < ROWS - row ? batch : ROWS - row;
		int err = device_append(fd, input + row * row_bytes, count * row_bytes);

		if (err)
			return err;
		row += count;
		batch = batch * 3 % 64 + 1;
	}
	return 0;
}

static void check_mxint8(struct __test_metadata *_metadata, uint32_t dtype, bool near)
{
	size_t row_bytes = DIM * kvscratch_dtype_size(dtype);
	uint8_t *input = random_input(dtype, ROWS * DIM, dtype + 1, near);
	int8_t *elements = malloc(ROWS * DIM);
	uint8_t *scales = malloc(ROWS * SCALES);
	uint8_t *records = malloc(ROWS * RECORD_BYTES);
	long saturated = kvs_scale_mxint8(dtype, input, ROWS * SCALES, elements, scales);
	struct kvscratch_view view;
	struct kvscratch_info info;
	int fd = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, dtype, 0);
	int copy = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, 0, 0);

	ASSERT_LE(0, saturated);
	ASSERT_LE(0, fd);
	ASSERT_LE(0, copy);
	ASSERT_EQ(0, device_map(fd, &view));
	ASSERT_EQ(0, append_in_batches(fd, input, row_bytes));
	EXPECT_EQ(0, memcmp(view.data, elements, ROWS * DIM));
	EXPECT_EQ(0, memcmp(kvscratch_view_scales(&view), scales, ROWS * SCALES));
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(saturated, info.saturated);

	/* the stream of records, and back */
	ASSERT_EQ(ROWS * RECORD_BYTES, pread(fd, records, ROWS * RECORD_BYTES, 0));
	for (uint32_t row = 0; row < ROWS; row++) {
		const uint8_t *record = records + row * RECORD_BYTES;

		ASSERT_EQ(0, memcmp(record, elements + row * DIM, DIM));
		ASSERT_EQ(0, memcmp(record + DIM, scales + row * SCALES, SCALES));
	}
	device_unmap(&view);
	ASSERT_EQ(0, append_in_batches(copy, records, RECORD_BYTES));
	ASSERT_EQ(0, device_map(copy, &view));
	EXPECT_EQ(0, memcmp(view.data, elements, ROWS * DIM));
	EXPECT_EQ(0, memcmp(kvscratch_view_scales(&view), scales, ROWS * SCALES));
	device_unmap(&view);
	close(copy);
	close(fd);
	free(records);
	free(scales);
	free(elements);
	free(input);
}

TEST(mxint8_is_what_the_arithmetic_gives)
{
	for (size_t i = 0; i < ARRAY_SIZE(floats); i++) {
		check_mxint8(_metadata, floats[i], true);
		check_mxint8(_metadata, floats[i], false);
	}
}

TEST(fixed_is_what_the_arithmetic_gives)
{
	static const uint32_t frac_bits[] = { 0, 5, 13, 62 };
	/* no multiple of a block */
	const uint32_t dim = 91;

	for (size_t i = 0; i < ARRAY_SIZE(floats) * ARRAY_SIZE(integers) * 4; i++) {
		uint32_t dtype = floats[i % 4], stored = integers[i / 4 % 4];
		uint32_t f = frac_bits[i / 16], size = kvscratch_dtype_size(stored);
		uint8_t *input = random_input(dtype, ROWS * dim, i + 1, true);
		uint8_t *expected = malloc(ROWS * dim * size);
		long saturated = kvs_scale_fixed(dtype, input, ROWS * dim, f, size, expected);
		struct kvscratch_view view;
		struct kvscratch_info info;
		int fd = device_create_scaled(ROWS, dim, stored, dtype, f);

		ASSERT_LE(0, saturated);
		ASSERT_LE(0, fd);
		ASSERT_EQ(0, append_in_batches(fd, input, dim * kvscratch_dtype_size(dtype)));
		ASSERT_EQ(0, device_map(fd, &view));
		EXPECT_EQ(0, memcmp(view.data, expected, ROWS * dim * size))
			TH_LOG("from %u to %u with %u", dtype, stored, f);
		ASSERT_EQ(0, device_info(fd, &info));
		EXPECT_EQ(saturated, info.saturated);
		device_unmap(&view);
		close(fd);
		free(expected);
		free(input);
	}
}

/* Nothing of a batch with a NaN is committed, wherever it is; and nothing stays of it. */
TEST(edom_commits_nothing)
{
	const size_t count = ROWS * DIM, bytes = count * sizeof(float);
	static const size_t places[] = { 0, 31, 32, 4095, 4096, 19199 };
	static const uint32_t bad[] = { 0x7f800000, 0xff800000, 0x7fc00000, 0xff800001 };
	uint32_t *input = random_input(KVSCRATCH_DTYPE_F32, count, 3, true);
	struct kvscratch_view view;
	struct kvscratch_info info;
	int fd = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	int fixed = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_F32, 4);

	ASSERT_LE(0, fd);
	ASSERT_LE(0, fixed);
	ASSERT_EQ(0, device_map(fd, &view));
	for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
		uint32_t saved = input[places[i]];

		input[places[i]] = bad[i % ARRAY_SIZE(bad)];
		EXPECT_EQ(-EDOM, device_append(fd, input, bytes));
		EXPECT_EQ(-EDOM, device_append(fixed, input, bytes));
		input[places[i]] = saved;
		EXPECT_EQ(0, len_of(fd));
		EXPECT_EQ(0, len_of(fixed));
	}
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(0, info.saturated);
	/* what the failed ones left, in both planes */
	EXPECT_FALSE(all_zero(view.data, count));
	EXPECT_FALSE(all_zero(kvscratch_view_scales(&view), ROWS * SCALES));
	ASSERT_EQ(0, device_truncate(fd, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(all_zero(view.data, view_data_bytes(&view)));
	EXPECT_EQ(0, device_append(fd, input, bytes));
	EXPECT_EQ(ROWS, len_of(fd));
	/* and from a row on */
	ASSERT_EQ(0, device_truncate(fd, 3, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(all_zero((const uint8_t *)view.data + 3 * DIM, (ROWS - 3) * DIM));
	EXPECT_FALSE(all_zero((const uint8_t *)view.data + 2 * DIM, DIM));
	EXPECT_TRUE(all_zero(kvscratch_view_scales(&view) + 3 * SCALES, (ROWS - 3) * SCALES));
	EXPECT_FALSE(all_zero(kvscratch_view_scales(&view) + 2 * SCALES, SCALES));
	device_unmap(&view);
	close(fixed);
	close(fd);
	free(input);
}

/* A hole in the source, in front of every kind of piece */
TEST(efault_commits_nothing)
{
	const size_t page = page_bytes();
	uint8_t *input = mmap(NULL, 16 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			      -1, 0);
	int fd = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	int records = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, 0, 0);

	ASSERT_NE(MAP_FAILED, (void *)input);
	ASSERT_LE(0, fd);
	ASSERT_LE(0, records);
	for (size_t hole = 0; hole < 12; hole++) {
		ASSERT_EQ(0, mprotect(input + hole * page, page, PROT_NONE));
		EXPECT_EQ(-EFAULT, device_append(fd, input, 128 * DIM * sizeof(float)));
		if (hole < 4)
			EXPECT_EQ(-EFAULT, device_append(records, input, ROWS * RECORD_BYTES));
		EXPECT_EQ(0, len_of(fd));
		EXPECT_EQ(0, len_of(records));
		ASSERT_EQ(0, mprotect(input + hole * page, page, PROT_READ | PROT_WRITE));
	}
	EXPECT_EQ(0, device_append(fd, input, 128 * DIM * sizeof(float)));
	EXPECT_EQ(-EINVAL, device_append(fd, input, DIM));
	EXPECT_EQ(-EINVAL, device_append(records, input, DIM));
	close(records);
	close(fd);
	munmap(input, 16 * page);
}

/* The records as a byte stream: every beginning, every length */
TEST(any_part_can_be_read)
{
	const uint32_t rows = 3;
	uint8_t all[3 * RECORD_BYTES], part[3 * RECORD_BYTES + 1];
	uint8_t *input = random_input(KVSCRATCH_DTYPE_F32, rows * DIM, 5, true);
	int fd = device_create_scaled(rows, DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	struct kvscratch_view view;

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_append(fd, input, rows * DIM * sizeof(float)));
	ASSERT_EQ(0, device_map(fd, &view));
	for (uint32_t row = 0; row < rows; row++) {
		memcpy(all + row * RECORD_BYTES, (const uint8_t *)view.data + row * DIM, DIM);
		memcpy(all + row * RECORD_BYTES + DIM, kvscratch_view_scales(&view) + row * SCALES,
		       SCALES);
	}
	device_unmap(&view);
	for (size_t at = 0; at <= sizeof(all); at++) {
		for (size_t bytes = 1; bytes <= sizeof(part); bytes += 17) {
			size_t left = sizeof(all) - at;
			ssize_t expected = bytes < left ? bytes : left;

			ASSERT_EQ(expected, pread(fd, part, bytes, at));
			ASSERT_EQ(0, memcmp(part, all + at, expected));
		}
	}
	EXPECT_EQ(sizeof(all), lseek(fd, 0, SEEK_END));
	close(fd);
	free(input);
}

/* Segments that split an element, a block and a record, at odd addresses */
TEST(writev_is_one_append)
{
	const size_t bytes = 2 * DIM * sizeof(float);
	uint8_t *input = random_input(KVSCRATCH_DTYPE_F32, 2 * DIM, 9, true);
	uint8_t whole[2 * RECORD_BYTES], parts[2 * RECORD_BYTES], *odd = malloc(bytes + 1);
	int fd = device_create_scaled(4, DIM, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, 0);
	int records = device_create_scaled(4, DIM, KVSCRATCH_DTYPE_MXINT8, 0, 0);
	struct iovec iov[3];

	ASSERT_LE(0, fd);
	ASSERT_LE(0, records);
	ASSERT_NE(NULL, odd);
	memcpy(odd + 1, input, bytes);
	ASSERT_EQ(0, device_append(fd, input, bytes));
	iov[0] = (struct iovec) { odd + 1, 6 };
	iov[1] = (struct iovec) { odd + 7, 131 };
	iov[2] = (struct iovec) { odd + 138, bytes - 137 };
	ASSERT_EQ(bytes, writev(fd, iov, 3));
	ASSERT_EQ(sizeof(whole), pread(fd, whole, sizeof(whole), 0));
	ASSERT_EQ(sizeof(parts), pread(fd, parts, sizeof(parts), sizeof(whole)));
	EXPECT_EQ(0, memcmp(whole, parts, sizeof(whole)));

	iov[0] = (struct iovec) { whole, DIM - 1 };
	iov[1] = (struct iovec) { whole + DIM - 1, 2 };
	iov[2] = (struct iovec) { whole + DIM + 1, sizeof(whole) - DIM - 1 };
	ASSERT_EQ(sizeof(whole), writev(records, iov, 3));
	ASSERT_EQ(sizeof(parts), pread(records, parts, sizeof(parts), 0));
	EXPECT_EQ(0, memcmp(whole, parts, sizeof(whole)));
	close(records);
	close(fd);
	free(odd);
	free(input);
}

/* A read beside truncates and appends gives the records of one generation. */
static void rewrite_records(int fd)
{
	static uint8_t records[ROWS * RECORD_BYTES];

	for (uint8_t round = 1;; round++) {
		memset(records, round, sizeof(records));
		CHILD_CHECK(!device_truncate(fd, 0, 0));
		CHILD_CHECK(!device_append(fd, records, sizeof(records)));
	}
}

FIXTURE(slow) { };

FIXTURE_SETUP(slow) { }

FIXTURE_TEARDOWN(slow) { }

TEST_F_TIMEOUT(slow, reads_never_mix_generations, TEST_SECONDS)
{
	static uint8_t records[ROWS * RECORD_BYTES];
	unsigned int reads = 0;
	struct child writer;
	int fd = device_create_scaled(ROWS, DIM, KVSCRATCH_DTYPE_MXINT8, 0, 0);

	ASSERT_LE(0, fd);
	if (start_child(&writer))
		rewrite_records(fd);
	while (reads < 50 || generation_of(fd) < 20) {
		ssize_t got = pread(fd, records, sizeof(records), 0);

		ASSERT_LE(0, got);
		if (got < 2)
			continue;
		ASSERT_EQ(0, memcmp(records, records + 1, got - 1));
		reads++;
	}
	kill(writer.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&writer));
	close(fd);
}

/* What counts is committed: a batch that fails later does not count. */
TEST(saturation_counts_what_was_committed)
{
	const uint64_t huge = 0x7fe0000000000000ull, nan = 0x7ff8000000000000ull;
	uint64_t row[32] = { 0 };
	struct kvscratch_info info;
	int fd = device_create_scaled(8, 32, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F64, 0);

	ASSERT_LE(0, fd);
	row[0] = row[31] = huge;
	ASSERT_EQ(0, device_append(fd, row, sizeof(row)));
	row[5] = nan;
	EXPECT_EQ(-EDOM, device_append(fd, row, sizeof(row)));
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(2, info.saturated);
	row[5] = huge;
	ASSERT_EQ(0, device_append(fd, row, sizeof(row)));
	/* since the pad was made: a truncate takes nothing away */
	ASSERT_EQ(0, device_truncate(fd, 0, 0));
	ASSERT_EQ(0, device_info(fd, &info));
	EXPECT_EQ(5, info.saturated);
	close(fd);
}

TEST_HARNESS_MAIN
