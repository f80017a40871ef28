// SPDX-License-Identifier: GPL-2.0-only
/*
 * libkvscratch: the same tests over every backend; KVSCRATCH_BACKEND says which.
 * What differs between them is kept(): nothing here asks for a backend by name.
 */
#include "common.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

#define F32 KVSCRATCH_DTYPE_F32
#define U8 KVSCRATCH_DTYPE_U8

/* Bytes in the rows of what is appended by several, or again and again */
#define ROW_DIM 640

/* Whether pads that are made now keep the promise @name */
static bool kept(const char *name)
{
	const struct kvscratch_promise *promises = kvscratch_promises(kvscratch_default_backend());

	for (int i = 0; promises[i].name; i++)
		if (!strcmp(promises[i].name, name))
			return promises[i].holds;
	fprintf(stderr, "no promise is called %s\n", name);
	abort();
}

/* What a pad is too large for: without the module there are no limits that could be raised */
static const char *limit_of_bytes(void)
{
	return kvscratch_default_backend() == KVSCRATCH_BACKEND_MEMFD ?
	       "more than half of the machine's memory" : "larger than the module's limits allow";
}

#define EXPECT_ERROR(error, words, call) do { \
	EXPECT_EQ(-(error), (long)(call)); \
	EXPECT_STREQ(words, kvscratch_error()); \
} while (0)

FIXTURE(pad) {
	struct kvscratch *pad;
};

FIXTURE_SETUP(pad)
{
	ASSERT_EQ(0, kvscratch_new(&self->pad, 10, 4, F32)) TH_LOG("%s", kvscratch_error());
}

FIXTURE_TEARDOWN(pad)
{
	kvscratch_close(self->pad);
}

static const float three_rows[3][4] = { { 1, 2, 3, 4 }, { 5, 6, 7, 8 }, { 9, 10, 11, 12 } };

TEST_F(pad, is_empty_when_it_is_new)
{
	EXPECT_EQ(0, kvscratch_len(self->pad));
	EXPECT_EQ(1, kvscratch_is_empty(self->pad));
	EXPECT_EQ(10, kvscratch_capacity(self->pad));
	EXPECT_EQ(4, kvscratch_dim(self->pad));
	EXPECT_EQ(kvscratch_default_backend(), (int)kvscratch_backend(self->pad));
	EXPECT_EQ(O_RDWR, kvscratch_access(self->pad));
}

TEST_F(pad, appends_rows_and_batches)
{
	struct kvscratch_tensor tensor;

	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows[0], 4));
	EXPECT_EQ(0, kvscratch_append_rows(self->pad, three_rows[1], 2, 4));
	EXPECT_EQ(0, kvscratch_append_rows(self->pad, NULL, 0, 4));
	EXPECT_EQ(3, kvscratch_len(self->pad));
	EXPECT_EQ(0, kvscratch_is_empty(self->pad));
	ASSERT_EQ(0, kvscratch_as_tensor(self->pad, &tensor));
	EXPECT_EQ(3, tensor.len);
	EXPECT_EQ(4, tensor.dim);
	EXPECT_EQ(F32, tensor.dtype);
	EXPECT_EQ(NULL, tensor.scales);
	EXPECT_EQ(0, memcmp(tensor.data, three_rows, sizeof(three_rows)));
}

TEST_F(pad, errors_are_in_the_words_of_the_model)
{
	float rows[11][4] = { 0 };

	EXPECT_ERROR(EINVAL, "shape mismatch: expected 4 elements, got 3",
		     kvscratch_append(self->pad, rows, 3));
	EXPECT_ERROR(EINVAL, "shape mismatch: expected 4 elements, got 5",
		     kvscratch_append_rows(self->pad, rows, 2, 5));
	EXPECT_EQ(0, kvscratch_append(self->pad, rows, 4));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 1 + 10 > 10 max",
		     kvscratch_append_rows(self->pad, rows, 10, 4));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 1 + 18446744073709551615 > 10 max",
		     kvscratch_append_rows(self->pad, rows, UINT64_MAX, 4));
	EXPECT_EQ(0, kvscratch_append_rows(self->pad, rows, 9, 4));
	EXPECT_ERROR(ENOSPC, "Scratchpad full: 10 / 10 tokens",
		     kvscratch_append(self->pad, rows, 4));
	EXPECT_EQ(10, kvscratch_len(self->pad));
}

TEST(geometry_that_is_refused)
{
	static const struct {
		struct kvscratch_geometry geometry;
		const char *words;
	} cases[] = {
		{ { 0, 4, F32, 0, 0 }, "max_seq_len: expected 1 to 4294967295 rows, got 0" },
		{ { 1ull << 32, 4, F32, 0, 0 },
		  "max_seq_len: expected 1 to 4294967295 rows, got 4294967296" },
		{ { 1, 0, F32, 0, 0 }, "dim: expected at least 1, got 0" },
		{ { 1, 1 << 23, F32, 0, 0 },
		  "dim: expected rows of at most 16777216 bytes, got 8388608 elements of 4" },
		{ { 1, 4, 99, 0, 0 }, "dtype: expected one of f64 f32 f16 bf16 i64 i32 i16 i8 u8 "
		  "and mxint8, got number 99" },
		{ { 1, 4, F32, KVSCRATCH_DTYPE_F16, 0 },
		  "input dtype: expected f32 for a dtype of f32, got f16" },
		{ { 1, 4, KVSCRATCH_DTYPE_I8, U8, 0 },
		  "input dtype: expected i8 f64 f32 f16 or bf16 for a dtype of i8, got u8" },
		{ { 1, 4, F32, 0, 1 }, "fraction bits: expected at most 0 for f32, got 1" },
		{ { 1, 4, KVSCRATCH_DTYPE_I8, F32, 63 },
		  "fraction bits: expected at most 62 for i8, got 63" },
		{ { 1, 33, KVSCRATCH_DTYPE_MXINT8, F32, 0 },
		  "dim: expected a multiple of 32 for mxint8, got 33" },
	};
	struct kvscratch *pad;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		EXPECT_ERROR(EINVAL, cases[i].words,
			     kvscratch_new_geometry(&pad, &cases[i].geometry));
}

/* Committed rows stay where they are, and the view grows without a call. */
TEST_F(pad, a_view_is_live)
{
	const struct kvscratch_view *view = kvscratch_view(self->pad);
	struct kvscratch_tensor tensor;

	ASSERT_NE(NULL, view);
	EXPECT_EQ(0, kvscratch_view_state(view));
	EXPECT_EQ(0, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	EXPECT_EQ(3, kvscratch_state_len(kvscratch_view_state(view)));
	EXPECT_EQ(0, memcmp(view->data, three_rows, sizeof(three_rows)));
	ASSERT_EQ(0, kvscratch_as_tensor(self->pad, &tensor));
	EXPECT_EQ(view->data, tensor.data);
	EXPECT_EQ(view, kvscratch_view(self->pad));
}

TEST_F(pad, every_byte_of_a_view_can_be_touched)
{
	const struct kvscratch_view *view = kvscratch_view(self->pad);
	const volatile uint8_t *bytes = view->data;
	unsigned int sum = 0;

	for (size_t i = 0; i < view->mapped_bytes - page_bytes(); i++)
		sum += bytes[i];
	EXPECT_EQ(0, sum);
	EXPECT_EQ(KVSCRATCH_STATUS_MAGIC, view->status->magic);
}

TEST_F(pad, readers_learn_which_rows_a_truncate_kept)
{
	const struct kvscratch_view *view = kvscratch_view(self->pad);
	struct kvscratch_info info;
	uint64_t before;

	EXPECT_EQ(0, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	before = kvscratch_view_state(view);
	EXPECT_EQ(3, kvscratch_view_valid_rows(view, before));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 2, 0));
	EXPECT_EQ(2, kvscratch_view_valid_rows(view, before));
	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows[0], 4));
	EXPECT_EQ(2, kvscratch_view_valid_rows(view, before));
	EXPECT_EQ(3, kvscratch_view_valid_rows(view, kvscratch_view_state(view)));
	ASSERT_EQ(0, kvscratch_info(self->pad, &info));
	EXPECT_EQ(3, info.len);
	EXPECT_EQ(1, info.generation);
	EXPECT_EQ(2, info.trunc_len);
	EXPECT_EQ(0, kvscratch_clear(self->pad, 0));
	EXPECT_EQ(0, kvscratch_view_valid_rows(view, before));
	EXPECT_ERROR(EINVAL, "expected at most 0, the committed rows, got 1",
		     kvscratch_truncate(self->pad, 1, 0));
}

/* Also what a failed append left beyond the rows */
TEST_F(pad, zeroing_scrubs_all_that_was_written)
{
	const struct kvscratch_view *view = kvscratch_view(self->pad);
	static const uint8_t zeros[10 * 16];

	EXPECT_EQ(0, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 1, 0));
	EXPECT_NE(0, memcmp((const char *)view->data + 16, zeros, 32));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(0, memcmp(view->data, three_rows, 16));
	EXPECT_EQ(0, memcmp((const char *)view->data + 16, zeros, sizeof(zeros) - 16));
}

/* @pages of memory behind which there is nothing */
static char *memory_with_an_end(size_t pages)
{
	size_t bytes = pages * page_bytes();
	char *memory = mmap(NULL, bytes + page_bytes(), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED || mprotect(memory + bytes, page_bytes(), PROT_NONE) ? NULL :
		memory;
}

TEST(a_bad_source_commits_nothing)
{
	uint32_t dim = page_bytes();
	char *rows = memory_with_an_end(2);
	struct kvscratch *pad;

	ASSERT_NE(NULL, rows);
	memset(rows, 7, 2 * page_bytes());
	ASSERT_EQ(0, kvscratch_new(&pad, 10, dim, U8));
	EXPECT_EQ(0, kvscratch_append(pad, rows, dim));
	EXPECT_EQ(-EFAULT, kvscratch_append_rows(pad, rows, 3, dim));
	EXPECT_EQ(1, kvscratch_len(pad));
	EXPECT_EQ(0, kvscratch_append_rows(pad, rows, 2, dim));
	EXPECT_EQ(3, kvscratch_len(pad));
	kvscratch_close(pad);
}

TEST_F(pad, a_second_handle_sees_and_appends_to_the_same_rows)
{
	struct kvscratch *other;

	ASSERT_EQ(0, kvscratch_attach(&other, kvscratch_fd(self->pad), O_RDWR));
	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows[0], 4));
	EXPECT_EQ(1, kvscratch_len(other));
	EXPECT_EQ(0, kvscratch_append(other, three_rows[1], 4));
	EXPECT_EQ(2, kvscratch_len(self->pad));
	EXPECT_EQ(10, kvscratch_capacity(other));
	kvscratch_close(other);
	EXPECT_EQ(2, kvscratch_len(self->pad));
}

TEST_F(pad, lives_as_long_as_somebody_holds_it)
{
	struct kvscratch_tensor tensor;
	struct kvscratch *other;

	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows[0], 4));
	ASSERT_EQ(0, kvscratch_attach(&other, kvscratch_fd(self->pad), O_RDONLY));
	kvscratch_close(self->pad);
	self->pad = NULL;
	ASSERT_EQ(0, kvscratch_as_tensor(other, &tensor));
	EXPECT_EQ(0, memcmp(tensor.data, three_rows, 16));
	kvscratch_close(other);
}

TEST_F(pad, a_handle_for_reading_only_reads)
{
	struct kvscratch *reader, *writer;
	int fd = kvscratch_open_reader(self->pad);

	ASSERT_LE(0, fd);
	EXPECT_EQ(O_RDONLY, fcntl(fd, F_GETFL) & O_ACCMODE);
	ASSERT_EQ(0, fcntl(fd, F_SETFD, 0));
	ASSERT_EQ(0, kvscratch_from_fd(&reader, fd));
	EXPECT_EQ(fd, kvscratch_fd(reader));
	EXPECT_EQ(FD_CLOEXEC, fcntl(fd, F_GETFD));
	EXPECT_ERROR(EBADF, "expected a handle open for write, got one for read only",
		     kvscratch_append(reader, three_rows, 4));
	EXPECT_EQ(-EBADF, kvscratch_truncate(reader, 0, 0));
	EXPECT_EQ(-EBADF, kvscratch_clear(reader, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(-EACCES, kvscratch_attach(&writer, fd, O_RDWR));
	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows, 4));
	EXPECT_EQ(1, kvscratch_len(reader));
	EXPECT_NE(NULL, kvscratch_view(reader));
	EXPECT_EQ(-1, mprotect((void *)kvscratch_view(reader)->data, page_bytes(),
			       PROT_READ | PROT_WRITE));
	kvscratch_close(reader);
}

/* What kept("read-only-handles") is about */
TEST_F(pad, a_reader_opens_its_handle_again)
{
	int fd = kvscratch_open_reader(self->pad);
	struct kvscratch *again;
	char path[32];
	int other;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	other = open(path, O_RDWR);
	if (kept("read-only-handles")) {
		EXPECT_EQ(-1, other);
		EXPECT_EQ(ENXIO, errno);
	} else {
		ASSERT_EQ(0, kvscratch_from_fd(&again, other));
		kvscratch_close(again);
	}
}

TEST_F(pad, what_is_no_handle)
{
	int files[] = { open("/dev/null", O_RDWR), open("/proc/self/stat", O_RDONLY),
			memfd_create("other", MFD_ALLOW_SEALING),
			socket(AF_UNIX, SOCK_STREAM, 0), open("/", O_RDONLY) };
	static const char *const kinds[] = { "a character device", "a regular file",
					     "a regular file", "a socket", "a directory" };
	struct kvscratch *pad;
	char words[128];

	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
		ASSERT_LE(0, files[i]);
		snprintf(words, sizeof(words),
			 "descriptor %d: expected a handle of a pad, got %s", files[i], kinds[i]);
		EXPECT_ERROR(ENOTTY, words, kvscratch_from_fd(&pad, files[i]));
		EXPECT_ERROR(ENOTTY, words, kvscratch_attach(&pad, files[i], O_RDONLY));
		/* still ours */
		EXPECT_EQ(0, close(files[i]));
	}
	EXPECT_ERROR(EBADF, "descriptor -1: expected a handle, got none",
		     kvscratch_from_fd(&pad, -1));
	EXPECT_EQ(-EBADF, kvscratch_attach(&pad, 1000, O_RDONLY));
}

/* Where the table of planes of a memfd has it, and its last page */
#define MEMFD_DIM 0
#define MEMFD_VERSION 196

/* A memfd of four pages that looks like a pad, but whose page @nr says @value at @at */
static int forged_memfd(uint32_t nr, uint32_t at, uint32_t value)
{
	const size_t bytes = 4 * page_bytes();
	char *pages = malloc(bytes);
	struct kvscratch *pad;
	int fd = memfd_create("forged", MFD_ALLOW_SEALING);

	setenv("KVSCRATCH_BACKEND", "memfd", 1);
	if (!pages || kvscratch_new(&pad, 1, 1, U8) ||
	    pread(kvscratch_fd(pad), pages, bytes + 1, 0) != (ssize_t)bytes)
		return -1;
	kvscratch_close(pad);
	memcpy(pages + nr * page_bytes() + at, &value, sizeof(value));
	if (fallocate(fd, 0, 0, bytes) || write(fd, pages, bytes) != (ssize_t)bytes ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return -1;
	free(pages);
	return fd;
}

TEST(a_forged_memfd_is_checked_against_its_size)
{
	struct kvscratch *pad;
	int good = forged_memfd(2, MEMFD_DIM, page_bytes());
	int large = forged_memfd(2, MEMFD_DIM, page_bytes() + 1);
	int none = forged_memfd(2, MEMFD_DIM, 0);
	int many = forged_memfd(3, 80, 200);
	int too_many = forged_memfd(3, 80, KVSCRATCH_MAX_PLANES + 1);
	char words[120];

	ASSERT_LE(0, good);
	EXPECT_EQ(0, kvscratch_from_fd(&pad, good));
	kvscratch_close(pad);
	snprintf(words, sizeof(words), "descriptor %d: expected a memfd of %zu bytes, got %zu",
		 large, 5 * page_bytes(), 4 * page_bytes());
	EXPECT_ERROR(EPROTO, words, kvscratch_from_fd(&pad, large));
	EXPECT_ERROR(EPROTO, "dim: expected at least 1, got 0", kvscratch_from_fd(&pad, none));
	snprintf(words, sizeof(words), "descriptor %d: expected a memfd with room for 200 planes, got "
		 "one of %zu bytes", many, 4 * page_bytes());
	if (page_bytes() == 4096)
		EXPECT_ERROR(EPROTO, words, kvscratch_from_fd(&pad, many));
	snprintf(words, sizeof(words), "descriptor %d: expected 1 to 4096 planes, got 4097", too_many);
	EXPECT_ERROR(EPROTO, words, kvscratch_from_fd(&pad, too_many));
}

/* Those of the first edition say 2 at the same place, and had no table. */
TEST(a_memfd_of_another_version)
{
	struct kvscratch *pad;
	int old = forged_memfd(3, MEMFD_VERSION, 2);
	char words[80];

	ASSERT_LE(0, old);
	snprintf(words, sizeof(words),
		 "descriptor %d: expected a memfd pad of version 3, got 2", old);
	EXPECT_ERROR(EPROTO, words, kvscratch_from_fd(&pad, old));
}

/* Who maps a hole would have to pay for it. */
TEST(a_memfd_with_holes)
{
	struct kvscratch *pad;
	int fd = forged_memfd(2, MEMFD_DIM, page_bytes());

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, page_bytes()));
	EXPECT_EQ(-EPROTO, kvscratch_from_fd(&pad, fd));
}

TEST(the_environment_chooses_the_backend)
{
	struct kvscratch *pad;

	ASSERT_EQ(0, setenv("KVSCRATCH_BACKEND", "memfd", 1));
	EXPECT_EQ(KVSCRATCH_BACKEND_MEMFD, kvscratch_default_backend());
	ASSERT_EQ(0, kvscratch_new(&pad, 1, 1, U8));
	EXPECT_STREQ("memfd", kvscratch_backend_name(kvscratch_backend(pad)));
	kvscratch_close(pad);
	ASSERT_EQ(0, setenv("KVSCRATCH_BACKEND", "kernel", 1));
	EXPECT_EQ(KVSCRATCH_BACKEND_KERNEL, kvscratch_default_backend());
	if (access(KVSCRATCH_DEVICE, F_OK))
		EXPECT_ERROR(ENOENT, "cannot open /dev/kvscratch: no such device: is the module "
			     "loaded?", kvscratch_new(&pad, 1, 1, U8));
	ASSERT_EQ(0, setenv("KVSCRATCH_BACKEND", "disk", 1));
	EXPECT_ERROR(EINVAL, "KVSCRATCH_BACKEND: expected kernel or memfd, got \"disk\"",
		     kvscratch_new(&pad, 1, 1, U8));
	ASSERT_EQ(0, unsetenv("KVSCRATCH_BACKEND"));
	EXPECT_EQ(access(KVSCRATCH_DEVICE, F_OK) ? KVSCRATCH_BACKEND_MEMFD :
						   KVSCRATCH_BACKEND_KERNEL,
		  kvscratch_default_backend());
}

/* A plane of bytes without scales, whose table says where they are */
TEST(a_forged_memfd_says_nothing_of_its_layout)
{
	struct kvscratch *pad;
	int fd = forged_memfd(2, offsetof(struct kvscratch_plane, scales_offset), 4096);
	const uint32_t reserved = 7;

	ASSERT_LE(0, fd);
	ASSERT_EQ(4, pwrite(fd, &reserved, 4, 2 * page_bytes() +
			    offsetof(struct kvscratch_plane, reserved)));
	ASSERT_EQ(0, kvscratch_from_fd(&pad, fd)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(0, kvscratch_plane(pad, 0)->scales_offset);
	EXPECT_EQ(0, kvscratch_plane(pad, 0)->reserved);
	kvscratch_close(pad);
}

TEST(both_backends_have_the_same_promises)
{
	const struct kvscratch_promise *kernel = kvscratch_promises(KVSCRATCH_BACKEND_KERNEL);
	const struct kvscratch_promise *memfd = kvscratch_promises(KVSCRATCH_BACKEND_MEMFD);

	for (int i = 0; kernel[i].name || memfd[i].name; i++) {
		EXPECT_STREQ(kernel[i].name, memfd[i].name);
		EXPECT_STREQ(kernel[i].text, memfd[i].text);
		EXPECT_TRUE(kernel[i].holds);
		EXPECT_EQ(NULL, kernel[i].reason);
		EXPECT_EQ(memfd[i].holds, !memfd[i].reason);
	}
}

/* 1.5 and -1000.0 with eight fraction bits: the second one does not fit. */
TEST(rows_are_converted_to_fixed_point)
{
	const struct kvscratch_geometry geometry = {
		.max_seq_len = 4, .dim = 2, .dtype = KVSCRATCH_DTYPE_I16,
		.input_dtype = KVSCRATCH_DTYPE_F64, .frac_bits = 8,
	};
	static const double row[] = { 1.5, -1000.0 };
	static const double bad[] = { 1.5, __builtin_nan("") };
	static const int16_t stored[] = { 384, -32768 };
	struct kvscratch_info info;
	struct kvscratch *pad;
	int16_t got[2];

	ASSERT_EQ(0, kvscratch_new_geometry(&pad, &geometry));
	EXPECT_EQ(0, kvscratch_append(pad, row, 2));
	EXPECT_ERROR(EDOM, "cannot append: a NaN or an infinity has no integer",
		     kvscratch_append(pad, bad, 2));
	ASSERT_EQ(0, kvscratch_info(pad, &info));
	EXPECT_EQ(1, info.len);
	EXPECT_EQ(1, info.saturated);
	EXPECT_EQ(16, info.input_row_bytes);
	EXPECT_EQ(4, info.row_bytes);
	ASSERT_EQ(0, kvscratch_copy_rows(pad, 0, 1, got));
	EXPECT_EQ(0, memcmp(got, stored, sizeof(got)));
	kvscratch_close(pad);
}

#define MX_ROWS 150
#define MX_DIM 96

/* What one pad made of floats, appended to another as it is, gives the same planes. */
TEST(rows_of_mxint8_converted_and_as_stored)
{
	const struct kvscratch_geometry converted = {
		.max_seq_len = MX_ROWS, .dim = MX_DIM, .dtype = KVSCRATCH_DTYPE_MXINT8,
		.input_dtype = F32,
	};
	static float rows[MX_ROWS][MX_DIM];
	static uint8_t records[MX_ROWS][MX_DIM + MX_DIM / 32];
	struct kvscratch_tensor first, second;
	struct kvscratch *from, *to;

	for (int i = 0; i < MX_ROWS * MX_DIM; i++)
		rows[i / MX_DIM][i % MX_DIM] = (float)(i % 977 - 488) *
						__builtin_powif(2, i / 32 % 40 - 20);
	ASSERT_EQ(0, kvscratch_new_geometry(&from, &converted));
	ASSERT_EQ(0, kvscratch_new(&to, MX_ROWS, MX_DIM, KVSCRATCH_DTYPE_MXINT8));
	ASSERT_EQ(0, kvscratch_append_rows(from, rows, MX_ROWS, MX_DIM));
	ASSERT_EQ(0, kvscratch_as_tensor(from, &first));
	ASSERT_NE(NULL, first.scales);
	for (int i = 0; i < MX_ROWS; i++) {
		memcpy(records[i], (const char *)first.data + i * MX_DIM, MX_DIM);
		memcpy(records[i] + MX_DIM, first.scales + i * MX_DIM / 32, MX_DIM / 32);
	}
	ASSERT_EQ(0, kvscratch_append_rows(to, records, MX_ROWS, MX_DIM));
	ASSERT_EQ(0, kvscratch_as_tensor(to, &second));
	EXPECT_EQ(0, memcmp(first.data, second.data, MX_ROWS * MX_DIM));
	EXPECT_EQ(0, memcmp(first.scales, second.scales, MX_ROWS * MX_DIM / 32));
	/* 1.0 is 64 / 64 by 2^0 */
	rows[0][0] = 1.0f;
	for (int i = 1; i < 32; i++)
		rows[0][i] = 0.0f;
	ASSERT_EQ(0, kvscratch_clear(from, 0));
	ASSERT_EQ(0, kvscratch_append(from, rows, MX_DIM));
	EXPECT_EQ(64, *(const int8_t *)first.data);
	EXPECT_EQ(127, first.scales[0]);
	kvscratch_close(from);
	kvscratch_close(to);
}

TEST_F(pad, rows_are_copied_as_of_one_moment)
{
	float rows[2][4];

	EXPECT_EQ(0, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	ASSERT_EQ(0, kvscratch_copy_rows(self->pad, 1, 2, rows));
	EXPECT_EQ(0, memcmp(rows, three_rows[1], sizeof(rows)));
	EXPECT_EQ(0, kvscratch_copy_rows(self->pad, 3, 0, rows));
	EXPECT_ERROR(EINVAL, "expected rows below 3, got 2 from 2 on",
		     kvscratch_copy_rows(self->pad, 2, 2, rows));
	EXPECT_EQ(-EINVAL, kvscratch_copy_rows(self->pad, 4, 0, rows));
	EXPECT_EQ(-EINVAL, kvscratch_copy_rows(self->pad, 1, UINT64_MAX, rows));
}

TEST_F(pad, tells_what_it_is)
{
	struct kvscratch_geometry geometry;
	/* as a program that knows less, or more, of the struct */
	struct { struct kvscratch_info info; uint64_t later; } longer;
	struct kvscratch_info info = { .max_seq_len = 77 };
	char line[64], part[10];

	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows, 4));
	EXPECT_EQ(37, kvscratch_display(self->pad, line, sizeof(line)));
	EXPECT_STREQ("Scratchpad(len=1, capacity=10, dim=4)", line);
	EXPECT_EQ(37, kvscratch_display(self->pad, part, sizeof(part)));
	EXPECT_STREQ("Scratchpa", part);
	kvscratch_geometry(self->pad, &geometry);
	EXPECT_EQ(10, geometry.max_seq_len);
	EXPECT_EQ(4, geometry.dim);
	EXPECT_EQ(F32, geometry.dtype);
	EXPECT_EQ(F32, geometry.input_dtype);
	EXPECT_EQ(0, kvscratch_info_sized(self->pad, &info, 8));
	EXPECT_EQ(8, info.size);
	EXPECT_EQ(77, info.max_seq_len);
	EXPECT_EQ(0, kvscratch_info_sized(self->pad, &longer.info, sizeof(longer)));
	EXPECT_EQ(0, longer.later);
	EXPECT_EQ(sizeof(info), longer.info.size);
	EXPECT_EQ(1, longer.info.len);
}

/* A writer may put any len into the page of a memfd; nobody reads beyond the pad for it. */
TEST_F(pad, a_len_that_cannot_be)
{
	struct kvscratch_tensor tensor;
	struct kvscratch_info info;
	uint32_t len = 11;
	off_t at = page_bytes() + offsetof(struct kvscratch_status, state) + KVSCRATCH_WORD_LEN * 4;
	bool overwritten = pwrite(kvscratch_fd(self->pad), &len, sizeof(len), at) == sizeof(len);
	char row[16];

	EXPECT_EQ(kept("immutable-rows"), !overwritten);
	if (!overwritten)
		return;
	EXPECT_ERROR(EPROTO, "expected at most 10 rows, got a status page that says 11",
		     kvscratch_len(self->pad));
	EXPECT_EQ(-EPROTO, kvscratch_as_tensor(self->pad, &tensor));
	EXPECT_EQ(-EPROTO, kvscratch_copy_rows(self->pad, 10, 1, row));
	EXPECT_EQ(-EPROTO, kvscratch_append(self->pad, three_rows, 4));
	EXPECT_EQ(-EPROTO, kvscratch_truncate(self->pad, 1, 0));
	EXPECT_EQ(-EPROTO, kvscratch_info(self->pad, &info));
}

/* In memory that children share */
static int *new_counter(int count)
{
	int *counter = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	*counter = count;
	return counter;
}

#define COPIED_ROWS 3000
#define COPIES 50

/* Whenever there is another copy, which is when the next one begins */
static void replace_rows(struct kvscratch *pad, const int *copies)
{
	static uint8_t rows[COPIED_ROWS][ROW_DIM];

	for (int round = 0;; round++) {
		int seen;

		memset(rows, round, sizeof(rows));
		if (kvscratch_clear(pad, 0) || kvscratch_append_rows(pad, rows, COPIED_ROWS, ROW_DIM))
			_exit(1);
		seen = __atomic_load_n(copies, __ATOMIC_ACQUIRE);
		while (__atomic_load_n(copies, __ATOMIC_ACQUIRE) == seen)
			sched_yield();
	}
}

/* All rows of a copy are of one moment, whatever truncates there are beside it. */
TEST(rows_are_copied_beside_who_replaces_them)
{
	static uint8_t copy[COPIED_ROWS][ROW_DIM];
	int *copies = new_counter(0);
	struct kvscratch *pad;
	pid_t writer;

	ASSERT_EQ(0, kvscratch_new(&pad, COPIED_ROWS, ROW_DIM, U8));
	writer = fork();
	ASSERT_LE(0, writer);
	if (!writer)
		replace_rows(pad, copies);
	while (*copies < COPIES) {
		int err = kvscratch_copy_rows(pad, 0, COPIED_ROWS, copy);

		/* between the two calls of the writer there are none */
		ASSERT_TRUE(!err || err == -EINVAL);
		if (err)
			continue;
		ASSERT_EQ(0, memcmp(copy[0], &copy[0][1], sizeof(copy) - 1));
		__atomic_fetch_add(copies, 1, __ATOMIC_RELEASE);
	}
	kill(writer, SIGKILL);
	waitpid(writer, NULL, 0);
	kvscratch_close(pad);
}

/* Handles that are passed */

TEST_F(pad, handles_are_passed_over_a_socket)
{
	const char *names[] = { "k0", "v0" };
	const char *bad_names[] = { "k0", "v 0" };
	char text[KVSCRATCH_MAX_NAMES_BYTES];
	struct kvscratch *reader;
	int socks[2], fds[2], got[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, socks));
	for (int i = 0; i < 2; i++)
		ASSERT_LE(0, fds[i] = kvscratch_open_reader(self->pad));
	EXPECT_ERROR(EINVAL, "expected names without white space, got \"v 0\"",
		     kvscratch_send_handles(socks[0], bad_names, fds, 2));
	EXPECT_ERROR(EINVAL, "expected 1 to 253 handles, got 0",
		     kvscratch_send_handles(socks[0], names, fds, 0));
	ASSERT_EQ(0, kvscratch_send_handles(socks[0], names, fds, 2));
	ASSERT_EQ(2, kvscratch_receive_handles(socks[1], text, sizeof(text), got, 2));
	EXPECT_STREQ("k0", text);
	EXPECT_STREQ("v0", text + 3);
	ASSERT_EQ(0, kvscratch_from_fd(&reader, got[1]));
	EXPECT_EQ(0, kvscratch_append(self->pad, three_rows, 4));
	EXPECT_EQ(1, kvscratch_len(reader));
	kvscratch_close(reader);
	close(socks[0]);
	EXPECT_ERROR(ECONNRESET, "cannot receive handles: Connection reset by peer",
		     kvscratch_receive_handles(socks[1], text, sizeof(text), got, 2));
	EXPECT_ERROR(ENOENT, "/nowhere/sock: cannot connect: No such file or directory",
		     kvscratch_connect("/nowhere/sock"));
}

/* A pair of sockets of @type, or one socket and -1 */
static void make_pair(int type, int *socks)
{
	if (socketpair(AF_UNIX, type, 0, socks))
		abort();
}

TEST_F(pad, handles_take_a_stream)
{
	static const int types[] = { SOCK_SEQPACKET, SOCK_DGRAM };
	const char *name = "pad";
	char text[KVSCRATCH_MAX_NAMES_BYTES], words[128];
	int fd = kvscratch_open_reader(self->pad);
	int socks[2], pipes[2], got;

	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
		make_pair(types[i], socks);
		snprintf(words, sizeof(words), "descriptor %d: expected a connected Unix stream "
			 "socket, got one of another kind", socks[0]);
		EXPECT_ERROR(EPROTOTYPE, words, kvscratch_send_handles(socks[0], &name, &fd, 1));
		/* nothing was sent, and nobody waits for the rest */
		EXPECT_EQ(-1, recv(socks[1], text, 1, MSG_DONTWAIT));
		EXPECT_EQ(EAGAIN, errno);
		EXPECT_EQ(-EPROTOTYPE, kvscratch_receive_handles(socks[1], text, sizeof(text), &got, 1));
		close(socks[0]);
		close(socks[1]);
	}
	ASSERT_EQ(0, pipe(pipes));
	snprintf(words, sizeof(words), "descriptor %d: expected a connected Unix stream socket, got "
		 "something else", pipes[1]);
	EXPECT_ERROR(ENOTSOCK, words, kvscratch_send_handles(pipes[1], &name, &fd, 1));
	EXPECT_ERROR(EBADF, "descriptor 999: expected a connected Unix stream socket, got none",
		     kvscratch_receive_handles(999, text, sizeof(text), &got, 1));
	socks[0] = socket(AF_UNIX, SOCK_STREAM, 0);
	snprintf(words, sizeof(words), "descriptor %d: expected a connected Unix stream socket, got "
		 "one that is not connected", socks[0]);
	EXPECT_ERROR(ENOTCONN, words, kvscratch_receive_handles(socks[0], text, sizeof(text), &got, 1));
	EXPECT_EQ(-ENOTCONN, kvscratch_send_handles(socks[0], &name, &fd, 1));
	close(socks[0]);
	/* the test kernels have none of it */
	socks[1] = socket(AF_INET, SOCK_STREAM, 0);
	if (socks[1] >= 0) {
		EXPECT_EQ(-EPROTOTYPE, kvscratch_send_handles(socks[1], &name, &fd, 1));
		close(socks[1]);
	}
	close(fd);
}

/* The message as it is written down, with @count copies of @fd; @length is said of @text */
static void send_message(int sock, uint32_t length, const char *text, int fd, unsigned int count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * 4)];
	} control = { 0 };
	struct iovec iov[] = {
		{ .iov_base = &length, .iov_len = sizeof(length) },
		{ .iov_base = (void *)text, .iov_len = strlen(text) },
	};
	struct msghdr msg = {
		.msg_iov = iov,
		.msg_iovlen = 2,
		.msg_control = count ? &control : NULL,
		.msg_controllen = count ? CMSG_SPACE(sizeof(int) * count) : 0,
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	if (cmsg) {
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int) * count);
		for (unsigned int i = 0; i < count; i++)
			memcpy(CMSG_DATA(cmsg) + i * sizeof(int), &fd, sizeof(int));
	}
	if (sendmsg(sock, &msg, 0) != (ssize_t)(sizeof(length) + strlen(text)))
		abort();
}

/* What is wrong with a message is said, and none of its handles stays open. */
TEST_F(pad, messages_that_are_none)
{
	static const struct {
		uint32_t length;
		const char *text;
		unsigned int count;
		const char *words;
	} messages[] = {
		{ 3, "k0\n", 0, "expected a name for each of 0 handles, got 1 names" },
		{ 3, "k0\n", 2, "expected a name for each of 2 handles, got 1 names" },
		{ 9, "k0\nk1\nk2\n", 3, "expected at most 2 handles, got 3" },
		{ 2, "k0", 1, "expected names with a newline behind each, got something else" },
		{ 0, "", 1, "expected names with a newline behind each, got something else" },
		{ 17, "0123456789abcdef\n", 1, "expected names of at most 16 bytes, got 17" },
		{ 9, "k0\n", 1, "Connection reset by peer" },
	};
	char text[16], words[128];
	int before = dup(kvscratch_fd(self->pad));
	int socks[2], got[2], after;

	close(before);
	for (size_t i = 0; i < ARRAY_SIZE(messages); i++) {
		ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, socks));
		send_message(socks[0], messages[i].length, messages[i].text,
			     kvscratch_fd(self->pad), messages[i].count);
		close(socks[0]);
		snprintf(words, sizeof(words), "cannot receive handles: %s", messages[i].words);
		EXPECT_ERROR(strstr(words, "reset") ? ECONNRESET : EPROTO, words,
			     kvscratch_receive_handles(socks[1], text, sizeof(text), got, 2));
		close(socks[1]);
	}
	after = dup(kvscratch_fd(self->pad));
	EXPECT_EQ(before, after);
	close(after);
}

/* "" would be a name in no directory, which every user may listen at and connect to. */
TEST(paths_that_no_socket_has)
{
	char path[200], words[200];

	EXPECT_ERROR(EINVAL, "expected the path of a socket, got an empty one",
		     kvscratch_listen(""));
	EXPECT_ERROR(EINVAL, "expected the path of a socket, got an empty one",
		     kvscratch_connect(""));
	memset(path, 'a', sizeof(path));
	path[108] = '\0';
	snprintf(words, sizeof(words), "%.80s...: expected a path of at most 107 bytes for a socket, "
		 "got 108", path);
	EXPECT_ERROR(ENAMETOOLONG, words, kvscratch_listen(path));
	EXPECT_ERROR(ENAMETOOLONG, words, kvscratch_connect(path));
}

/* What a socket cannot be made at, or can: a directory that is removed in the end */
TEST(what_lies_where_a_socket_shall_be)
{
	char directory[] = "/tmp/kvscratch-library-XXXXXX";
	struct rlimit few_files;
	char path[64], words[160];
	int listener, file;

	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &few_files));
	ASSERT_NE(NULL, mkdtemp(directory));
	snprintf(path, sizeof(path), "%s/sock", directory);
	file = open(path, O_CREAT | O_WRONLY, 0600);
	ASSERT_LE(0, file);
	snprintf(words, sizeof(words), "%s: cannot listen: expected a socket or nothing there, got a "
		 "regular file", path);
	EXPECT_ERROR(ENOTSOCK, words, kvscratch_listen(path));
	snprintf(words, sizeof(words), "%s: cannot connect: expected a socket, got a regular file",
		 path);
	EXPECT_ERROR(ENOTSOCK, words, kvscratch_connect(path));
	ASSERT_EQ(0, unlink(path));
	ASSERT_EQ(0, symlink("nothing", path));
	snprintf(words, sizeof(words), "%s: cannot listen: expected a socket or nothing there, got a "
		 "symbolic link", path);
	EXPECT_ERROR(ENOTSOCK, words, kvscratch_listen(path));
	ASSERT_EQ(0, unlink(path));
	ASSERT_EQ(0, mkdir(path, 0700));
	EXPECT_EQ(-ENOTSOCK, kvscratch_listen(path));
	ASSERT_EQ(0, rmdir(path));
	/* that of a process that is gone makes room, that of one that listens does not */
	for (int times = 0; times < 2; times++) {
		listener = kvscratch_listen(path);
		ASSERT_LE(0, listener) TH_LOG("%s", kvscratch_error());
		snprintf(words, sizeof(words), "%s: cannot listen: somebody listens there", path);
		EXPECT_ERROR(EADDRINUSE, words, kvscratch_listen(path));
		EXPECT_EQ(0, access(path, F_OK));
		close(listener);
	}
	/* nor may anything be concluded from a connection that we cannot try */
	listener = dup(STDIN_FILENO);
	close(listener);
	few_files.rlim_cur = listener + 1;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &few_files));
	snprintf(words, sizeof(words), "%s: cannot see whether somebody listens there: Too many open "
		 "files", path);
	EXPECT_ERROR(EMFILE, words, kvscratch_listen(path));
	ASSERT_EQ(0, unlink(path));
	ASSERT_EQ(0, rmdir(directory));
}

/* Size limits are for files, of which pads without the module are some. */
TEST_F(pad, a_size_limit)
{
	const struct rlimit limit = { 50, 50 };
	bool is_file = kvscratch_backend(self->pad) == KVSCRATCH_BACKEND_MEMFD;
	int expected = is_file ? -EFBIG : 0;
	struct kvscratch *pad;

	ASSERT_EQ(0, kvscratch_append(self->pad, three_rows, 4));
	ASSERT_EQ(0, setrlimit(RLIMIT_FSIZE, &limit));
	/* none of these ends us, and all leave the pad as it was */
	EXPECT_EQ(expected, kvscratch_new(&pad, 10, 4, F32));
	if (is_file)
		EXPECT_STREQ("cannot create a pad of [10, 4] f32: File too large: pads without the "
			     "module are files, see ulimit -f", kvscratch_error());
	EXPECT_EQ(expected, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	EXPECT_EQ(expected, kvscratch_append_rows(self->pad, three_rows, 3, 4));
	EXPECT_EQ(is_file ? 1 : 7, kvscratch_len(self->pad));
	EXPECT_EQ(expected, kvscratch_truncate(self->pad, 0, KVSCRATCH_TRUNCATE_ZERO));
}

static bool new_device_directory(void)
{
	return !unshare(CLONE_NEWNS) && !mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	       !mount("none", "/dev", "tmpfs", 0, NULL);
}

/* Root makes a file there by exec 3<>/dev/kvscratch. */
TEST(what_lies_where_the_device_shall_be)
{
	static const struct {
		mode_t mode;
		const char *kind;
	} cases[] = {
		{ S_IFREG, "a regular file" },
		{ S_IFIFO, "a FIFO" },
		{ S_IFCHR, "another device" },
	};
	struct kvscratch *pad;
	char words[160];

	ASSERT_EQ(0, unsetenv("KVSCRATCH_BACKEND"));
	if (!new_device_directory())
		SKIP(return, "nothing can be mounted here: %s", strerror(errno));
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		ASSERT_EQ(0, mknod(KVSCRATCH_DEVICE, cases[i].mode | 0666, makedev(1, 3)));
		snprintf(words, sizeof(words), "/dev/kvscratch: expected the device of the module, got "
			 "%s: remove it and load the module; KVSCRATCH_BACKEND=memfd works without",
			 cases[i].kind);
		EXPECT_ERROR(ENODEV, words, kvscratch_new(&pad, 1, 1, U8));
		ASSERT_EQ(0, unlink(KVSCRATCH_DEVICE));
	}
	ASSERT_EQ(0, mkdir(KVSCRATCH_DEVICE, 0700));
	EXPECT_EQ(-ENODEV, kvscratch_new(&pad, 1, 1, U8));
	ASSERT_EQ(0, rmdir(KVSCRATCH_DEVICE));
	/* which is none */
	ASSERT_EQ(0, symlink("nothing", KVSCRATCH_DEVICE));
	EXPECT_EQ(KVSCRATCH_BACKEND_MEMFD, kvscratch_default_backend());
	ASSERT_EQ(0, umount2("/dev", MNT_DETACH));
}

/* Waiting */

static void *append_when_told(void *argument)
{
	struct kvscratch *pad = argument;

	return (void *)(long)kvscratch_append(pad, three_rows, 4);
}

TEST_F(pad, a_reader_sleeps_until_there_is_something)
{
	struct kvscratch *reader;
	pthread_t writer;
	void *err;

	ASSERT_EQ(0, kvscratch_attach(&reader, kvscratch_fd(self->pad), O_RDONLY));
	EXPECT_ERROR(ETIMEDOUT, "nothing was appended or dropped in time",
		     kvscratch_wait(reader, 0, 0));
	EXPECT_EQ(-ETIMEDOUT, kvscratch_wait(reader, 0, 1));
	/* another state is no reason to sleep */
	EXPECT_EQ(0, kvscratch_wait(reader, 7, -1));
	ASSERT_EQ(0, pthread_create(&writer, NULL, append_when_told, self->pad));
	EXPECT_EQ(0, kvscratch_wait(reader, 0, -1));
	EXPECT_EQ(1, kvscratch_len(reader));
	pthread_join(writer, &err);
	EXPECT_EQ(NULL, err);
	/* the same len in another generation */
	EXPECT_EQ(-ETIMEDOUT, kvscratch_wait(reader, 1, 0));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 1, 0));
	EXPECT_EQ(0, kvscratch_wait(reader, 1, -1));
	kvscratch_close(reader);
}

struct waiter {
	struct kvscratch *pad;
	uint64_t state;
	pid_t thread;
};

static void *wait_for_change(void *argument)
{
	struct waiter *waiter = argument;

	__atomic_store_n(&waiter->thread, gettid(), __ATOMIC_RELEASE);
	return (void *)(long)kvscratch_wait(waiter->pad, waiter->state, -1);
}

struct slow_append {
	struct kvscratch *pad;
	const void *row;
};

static void *append_slowly(void *argument)
{
	const struct slow_append *append = argument;

	return (void *)(long)kvscratch_append(append->pad, append->row, 4);
}

/* What the one acknowledges is not what the other moves. */
TEST_F(pad, one_thread_waits_while_another_appends)
{
	float rows[10][4] = { 0 };
	void *page = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct slow_append append = { self->pad, page };
	struct waiter waiter = { .pad = self->pad };
	const struct kvscratch_view *view = kvscratch_view(self->pad);
	pthread_t threads[2];
	void *err[2];
	int faults;

	if (!kept("poll"))
		SKIP(return, "appends are not stopped by userfaultfd there");
	ASSERT_EQ(0, kvscratch_append_rows(self->pad, rows, 10, 4));
	ASSERT_EQ(0, kvscratch_truncate(self->pad, 3, 0));
	waiter.state = kvscratch_view_state(view);
	faults = stop_at(page, page_bytes());
	ASSERT_EQ(0, pthread_create(&threads[0], NULL, append_slowly, &append));
	ASSERT_TRUE(await_stop(faults));
	ASSERT_EQ(0, pthread_create(&threads[1], NULL, wait_for_change, &waiter));
	while (!__atomic_load_n(&waiter.thread, __ATOMIC_ACQUIRE))
		sched_yield();
	EXPECT_EQ('S', await_sleep(waiter.thread));
	/* lets the append go on */
	close(faults);
	for (int i = 0; i < 2; i++) {
		pthread_join(threads[i], &err[i]);
		EXPECT_EQ(NULL, err[i]);
	}
	EXPECT_EQ(4, kvscratch_len(self->pad));
}

/* Writers at once */

#define WRITERS 4
#define ROWS_EACH 8000

/**
 * struct writer - one of several
 * @pad: where it appends
 * @number: what its rows are filled with
 * @missing: in shared memory: how many are not ready yet; NULL when nobody is awaited
 */
struct writer {
	struct kvscratch *pad;
	uint32_t number;
	int *missing;
};

/* Until nobody is missing any more */
static void meet(int *missing)
{
	__atomic_fetch_sub(missing, 1, __ATOMIC_RELEASE);
	while (__atomic_load_n(missing, __ATOMIC_ACQUIRE))
		sched_yield();
}

static void *write_rows(void *argument)
{
	const struct writer *writer = argument;
	uint8_t rows[2][ROW_DIM];

	if (writer->missing)
		meet(writer->missing);
	for (uint32_t i = 0; i < ROWS_EACH / 2; i++) {
		memset(rows, writer->number, sizeof(rows));
		if (kvscratch_append_rows(writer->pad, rows, 2, ROW_DIM))
			return (void *)1;
	}
	return NULL;
}

/* Pairs that belong together lie together, and none is lost. */
static bool pairs_are_whole(struct kvscratch *pad, uint64_t rows)
{
	struct kvscratch_tensor tensor;

	if (kvscratch_as_tensor(pad, &tensor) || tensor.len != rows)
		return false;
	for (uint64_t i = 0; i < rows; i += 2) {
		const uint8_t *pair = (const uint8_t *)tensor.data + i * ROW_DIM;

		for (size_t j = 0; j < 2 * ROW_DIM; j++)
			if (pair[j] != pair[0])
				return false;
	}
	return true;
}

/* How many of them failed */
static int join_all(const pthread_t *threads, int count)
{
	int failed = 0;

	for (int i = 0; i < count; i++) {
		void *err;

		pthread_join(threads[i], &err);
		failed += err != NULL;
	}
	return failed;
}

TEST(threads_share_a_pad_object)
{
	struct writer writers[WRITERS];
	pthread_t threads[WRITERS];
	int *missing = new_counter(WRITERS);
	struct kvscratch *pad;

	ASSERT_EQ(0, kvscratch_new(&pad, WRITERS * ROWS_EACH, ROW_DIM, U8));
	for (uint32_t i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){ pad, i + 1, missing };
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, write_rows, &writers[i]));
	}
	EXPECT_EQ(0, join_all(threads, WRITERS));
	EXPECT_TRUE(pairs_are_whole(pad, WRITERS * ROWS_EACH));
	kvscratch_close(pad);
}

/* By descriptors that were inherited, which share one open file until they are handles. */
TEST(processes_share_a_pad)
{
	int *missing = new_counter(WRITERS);
	struct kvscratch *pad;

	ASSERT_EQ(0, kvscratch_new(&pad, WRITERS * ROWS_EACH, ROW_DIM, U8));
	for (uint32_t i = 0; i < WRITERS; i++) {
		if (fork())
			continue;
		struct writer writer = { .number = i + 1, .missing = missing };

		if (kvscratch_from_fd(&writer.pad, dup(kvscratch_fd(pad))) || write_rows(&writer))
			_exit(1);
		_exit(0);
	}
	for (int i = 0; i < WRITERS; i++) {
		int status;

		ASSERT_LT(0, wait(&status));
		EXPECT_EQ(0, status);
	}
	EXPECT_TRUE(pairs_are_whole(pad, WRITERS * ROWS_EACH));
	kvscratch_close(pad);
}

/* Killed at any moment, a writer leaves whole batches only, and nobody waits for it. */
TEST(a_writer_that_is_killed_leaves_whole_batches)
{
	struct kvscratch *pad;
	int64_t before = 0;

	ASSERT_EQ(0, kvscratch_new(&pad, 50000, ROW_DIM, U8));
	for (uint32_t round = 0; round < 40; round++) {
		struct writer writer = { .number = round + 1 };
		int64_t now;
		pid_t child = fork();

		if (!child) {
			if (kvscratch_attach(&writer.pad, kvscratch_fd(pad), O_RDWR))
				_exit(1);
			for (;;)
				if (write_rows(&writer))
					_exit(1);
		}
		/* it has begun */
		while (kvscratch_len(pad) < before + 2 + round % 7)
			kvscratch_wait(pad, kvscratch_view_state(kvscratch_view(pad)), -1);
		ASSERT_LT(0, child);
		ASSERT_EQ(0, kill(child, SIGKILL));
		ASSERT_EQ(child, waitpid(child, NULL, 0));
		now = kvscratch_len(pad);
		EXPECT_EQ(0, now % 2);
		EXPECT_TRUE(pairs_are_whole(pad, now));
		ASSERT_EQ(0, kvscratch_truncate(pad, now / 2 & ~1,
						round % 2 ? KVSCRATCH_TRUNCATE_ZERO : 0));
		before = kvscratch_len(pad);
	}
	kvscratch_close(pad);
}

/* A child of the writer has all that the writer had open, and outlives it. */
TEST(a_forked_child_keeps_no_lock)
{
	static const uint8_t rows[2][ROW_DIM];
	struct kvscratch *pad;

	ASSERT_EQ(0, kvscratch_new(&pad, 50000, ROW_DIM, U8));
	for (uint32_t round = 0; round < 30; round++) {
		int64_t before = kvscratch_len(pad);
		int alive[2];
		pid_t writer;

		ASSERT_EQ(0, pipe(alive));
		writer = fork();
		ASSERT_LE(0, writer);
		if (!writer) {
			struct kvscratch *own;

			if (kvscratch_attach(&own, kvscratch_fd(pad), O_RDWR))
				_exit(1);
			if (!fork()) {
				char byte;

				/* until the test is done with this round */
				close(alive[1]);
				_exit(read(alive[0], &byte, 1));
			}
			while (!kvscratch_append_rows(own, rows, 2, ROW_DIM))
				;
			_exit(1);
		}
		while (kvscratch_len(pad) < before + 2)
			kvscratch_wait(pad, kvscratch_view_state(kvscratch_view(pad)), -1);
		ASSERT_EQ(0, kill(writer, SIGKILL));
		ASSERT_EQ(writer, waitpid(writer, NULL, 0));
		ASSERT_EQ(0, kvscratch_append_rows(pad, rows, 2, ROW_DIM));
		ASSERT_EQ(0, kvscratch_truncate(pad, 0, 0));
		close(alive[0]);
		close(alive[1]);
	}
	kvscratch_close(pad);
}

/* A handle of the module that is none of a pad */
TEST(a_node_is_no_handle)
{
	int node = device_open(O_RDWR);
	struct kvscratch *pad;
	char words[80];

	if (node < 0)
		SKIP(return, "there is no device");
	snprintf(words, sizeof(words),
		 "descriptor %d: expected a handle of a pad, got a character device", node);
	EXPECT_ERROR(ENOTTY, words, kvscratch_from_fd(&pad, node));
	/* still ours */
	EXPECT_EQ(0, close(node));
}

/* Planes */

enum { K, V, MX, TOKENS, NR_PLANES };

#define PLANES_ROWS 12

/* Rows as they are, rows that are converted, scales as they come, and something narrow */
static const struct kvscratch_plane four_planes[NR_PLANES] = {
	[K] = { .dim = 6, .dtype = F32, .label = "k0" },
	[V] = { .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8, .input_dtype = F32, .label = "v0" },
	[MX] = { .dim = 32, .dtype = KVSCRATCH_DTYPE_MXINT8, .label = "mx" },
	[TOKENS] = { .dim = 1, .dtype = KVSCRATCH_DTYPE_I32, .label = "tokens" },
};

#define INPUT_BYTES (24 + 256 + 33 + 4)
#define STORED_BYTES (24 + 66 + 33 + 4)

FIXTURE(planes) {
	struct kvscratch *pad;
	struct kvscratch *writer;
	const struct kvscratch_view *view;
};

FIXTURE_SETUP(planes)
{
	ASSERT_EQ(0, kvscratch_new_planes(&self->pad, PLANES_ROWS, four_planes, NR_PLANES, "model",
					  5)) TH_LOG("%s", kvscratch_error());
	self->view = kvscratch_view(self->pad);
	ASSERT_NE(NULL, self->view) TH_LOG("%s", kvscratch_error());
	ASSERT_EQ(0, kvscratch_writer(&self->writer, self->pad)) TH_LOG("%s", kvscratch_error());
}

FIXTURE_TEARDOWN(planes)
{
	kvscratch_close(self->writer);
	kvscratch_close(self->pad);
}

/* Row @row of a plane as it is appended, made of @seed */
static void make_input(uint32_t plane, uint32_t seed, void *row)
{
	float *floats = row;

	if (plane != V) {
		fill_row(row, four_planes[plane].dim * kvscratch_dtype_size(four_planes[plane].dtype) +
			 (plane == MX), seed * NR_PLANES + plane);
		return;
	}
	for (uint32_t i = 0; i < four_planes[V].dim; i++)
		floats[i] = (float)(1 + (seed + i) % 60) / 64.0f;
	/* so that each block has a scale of 1 */
	floats[0] = floats[32] = 1.0f;
}

static void make_token(uint32_t seed, uint8_t *token)
{
	float floats[64];

	make_input(K, seed, token);
	make_input(V, seed, floats);
	memcpy(token + 24, floats, sizeof(floats));
	make_input(MX, seed, token + 280);
	make_input(TOKENS, seed, token + 313);
}

/* What is stored of a token: elements that are 64ths, and scales of 1 */
static void make_stored(uint32_t seed, uint8_t *stored)
{
	float floats[64];

	make_input(K, seed, stored);
	make_input(V, seed, floats);
	for (int i = 0; i < 64; i++)
		stored[24 + i] = (uint8_t)(floats[i] * 64);
	stored[24 + 64] = stored[24 + 65] = 127;
	make_input(MX, seed, stored + 90);
	make_input(TOKENS, seed, stored + 123);
}

/* Whether a row of a view is what came of @seed */
static bool plane_row_is(const struct kvscratch_view *view, uint32_t plane, uint32_t row,
			 uint32_t seed)
{
	static const uint32_t begins[] = { 0, 24, 90, 123 };
	const struct kvscratch_plane *its = kvscratch_view_plane(view, plane);
	const uint8_t *scales = kvscratch_view_plane_scales(view, plane);
	uint8_t stored[STORED_BYTES];

	make_stored(seed, stored);
	if (memcmp(kvscratch_view_plane_row(view, plane, row), stored + begins[plane],
		   its->row_bytes))
		return false;
	return !scales || !memcmp(scales + row * its->scales_row_bytes,
				  stored + begins[plane] + its->row_bytes, its->scales_row_bytes);
}

static int stage_row(struct kvscratch *writer, uint32_t plane, uint64_t row, uint32_t seed)
{
	uint8_t input[256] __attribute__((aligned(8)));

	make_input(plane, seed, input);
	return kvscratch_stage(writer, plane, row, input, 1);
}

static int stage_token(struct kvscratch *writer, uint64_t row, uint32_t seed)
{
	int err = 0;

	for (uint32_t plane = 0; !err && plane < NR_PLANES; plane++)
		err = stage_row(writer, plane, row, seed);
	return err;
}

TEST_F(planes, tell_what_they_are)
{
	struct kvscratch_geometry geometry;
	struct kvscratch_pad_info info;
	uint64_t end = 0;
	char line[64];

	EXPECT_EQ(NR_PLANES, kvscratch_nr_planes(self->pad));
	EXPECT_EQ(STORED_BYTES, kvscratch_row_bytes(self->pad));
	EXPECT_EQ(INPUT_BYTES, kvscratch_input_row_bytes(self->pad));
	EXPECT_EQ(PLANES_ROWS, kvscratch_capacity(self->pad));
	for (uint32_t i = 0; i < NR_PLANES; i++) {
		const struct kvscratch_plane *plane = kvscratch_plane(self->pad, i);

		ASSERT_NE(NULL, plane);
		EXPECT_EQ(four_planes[i].dim, plane->dim);
		EXPECT_EQ(four_planes[i].dtype, plane->dtype);
		EXPECT_STREQ(four_planes[i].label, plane->label);
		EXPECT_EQ(i == V ? F32 : plane->dtype, plane->input_dtype);
		EXPECT_EQ(end, plane->offset);
		end += page_bytes();
		if (plane->scales_row_bytes) {
			EXPECT_EQ(end, plane->scales_offset);
			end += page_bytes();
		}
		EXPECT_EQ(i, kvscratch_find_plane(self->pad, plane->label));
	}
	EXPECT_EQ(NULL, kvscratch_plane(self->pad, NR_PLANES));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_STREQ("expected a plane below 4, got 4", kvscratch_error());
	EXPECT_ERROR(ENOENT, "no plane is called \"k1\"", kvscratch_find_plane(self->pad, "k1"));
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &info));
	EXPECT_EQ(sizeof(info), info.size);
	EXPECT_EQ(KVSCRATCH_PAD_WRITER, info.flags);
	EXPECT_NE(0, info.id);
	EXPECT_EQ(PLANES_ROWS, info.max_seq_len);
	EXPECT_EQ(0, info.len);
	EXPECT_EQ(end, info.status_offset);
	EXPECT_EQ(end + page_bytes(), info.mapping_bytes);
	EXPECT_LE(info.mapping_bytes, info.allocated_bytes);
	EXPECT_EQ(1, info.epoch);
	EXPECT_EQ(NR_PLANES, info.nr_planes);
	EXPECT_EQ(STORED_BYTES, info.row_bytes);
	EXPECT_EQ(INPUT_BYTES, info.input_row_bytes);
	EXPECT_EQ(0, memcmp(info.tag, "model", 6));
	EXPECT_TRUE(all_zero(info.tag + 5, sizeof(info.tag) - 5));
	EXPECT_EQ(40, kvscratch_display(self->pad, line, sizeof(line)));
	EXPECT_STREQ("Scratchpad(len=0, capacity=12, planes=4)", line);
	kvscratch_geometry(self->pad, &geometry);
	EXPECT_EQ(PLANES_ROWS, geometry.max_seq_len);
	EXPECT_EQ(0, geometry.dim);
	EXPECT_EQ(0, kvscratch_dim(self->pad));
}

TEST_F(planes, whole_tokens_are_appended_and_copied)
{
	uint8_t tokens[3 * INPUT_BYTES], stored[3 * STORED_BYTES], got[3 * STORED_BYTES];

	kvscratch_close(self->writer);
	self->writer = NULL;
	for (uint32_t i = 0; i < 3; i++) {
		make_token(i, tokens + i * INPUT_BYTES);
		make_stored(i, stored + i * STORED_BYTES);
	}
	EXPECT_EQ(0, kvscratch_append_tokens(self->pad, tokens, 0, INPUT_BYTES));
	EXPECT_ERROR(EINVAL, "shape mismatch: expected tokens of 317 bytes, got 316",
		     kvscratch_append_tokens(self->pad, tokens, 1, INPUT_BYTES - 1));
	ASSERT_EQ(0, kvscratch_append_tokens(self->pad, tokens, 3, INPUT_BYTES))
		TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(3, kvscratch_len(self->pad));
	for (uint32_t row = 0; row < 3; row++)
		for (uint32_t plane = 0; plane < NR_PLANES; plane++)
			EXPECT_TRUE(plane_row_is(self->view, plane, row, row));
	ASSERT_EQ(0, kvscratch_copy_rows(self->pad, 0, 3, got));
	EXPECT_EQ(0, memcmp(stored, got, sizeof(got)));
	ASSERT_EQ(0, kvscratch_copy_plane_rows(self->pad, V, 1, 2, got));
	EXPECT_EQ(0, memcmp(stored + STORED_BYTES + 24, got, 66));
	EXPECT_EQ(0, memcmp(stored + 2 * STORED_BYTES + 24, got + 66, 66));
	EXPECT_ERROR(EINVAL, "expected rows below 3, got 1 from 3 on",
		     kvscratch_copy_plane_rows(self->pad, V, 3, 1, got));
	EXPECT_ERROR(EINVAL, "expected a plane below 4, got 4",
		     kvscratch_copy_plane_rows(self->pad, NR_PLANES, 0, 1, got));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 3 + 10 > 12 max",
		     kvscratch_append_tokens(self->pad, tokens, 10, INPUT_BYTES));
	/* element 5 of the second plane of the last token */
	memcpy(tokens + 2 * INPUT_BYTES + 24 + 20, &(float){ __builtin_nanf("") }, 4);
	EXPECT_ERROR(EDOM, "cannot append: a NaN or an infinity has no integer",
		     kvscratch_append_tokens(self->pad, tokens, 3, INPUT_BYTES));
	EXPECT_EQ(3, kvscratch_len(self->pad));
}

TEST_F(planes, are_not_for_calls_of_one_plane)
{
	static const char words[] = "expected a pad of one plane, got one of 4";
	const struct kvscratch_named_pad named = { "pad", self->pad };
	struct kvscratch_tensor tensor;
	struct kvscratch_info info;

	EXPECT_ERROR(EOPNOTSUPP, words, kvscratch_append(self->pad, &info, 6));
	EXPECT_ERROR(EOPNOTSUPP, words, kvscratch_append_rows(self->pad, &info, 0, 6));
	EXPECT_ERROR(EOPNOTSUPP, words, kvscratch_as_tensor(self->pad, &tensor));
	EXPECT_ERROR(EOPNOTSUPP, words, kvscratch_info(self->pad, &info));
	EXPECT_ERROR(EOPNOTSUPP, ".npy has room for one plane: expected a name that ends in "
		     ".safetensors, or one of the 4 planes",
		     kvscratch_save("a.npy", &named, 1, NULL, NULL));
}

TEST_F(planes, staged_rows_are_there_and_not_committed)
{
	struct kvscratch_tensor tensor;

	for (uint32_t plane = 0; plane < NR_PLANES; plane++) {
		ASSERT_EQ(0, stage_row(self->writer, plane, 0, 5)) TH_LOG("%s", kvscratch_error());
		EXPECT_TRUE(plane_row_is(self->view, plane, 0, 5));
		EXPECT_EQ(0, kvscratch_len(self->pad));
	}
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(1, kvscratch_len(self->pad));
	ASSERT_EQ(0, kvscratch_plane_tensor(self->pad, V, &tensor));
	EXPECT_EQ(1, tensor.len);
	EXPECT_EQ(64, tensor.dim);
	EXPECT_EQ(KVSCRATCH_DTYPE_MXINT8, tensor.dtype);
	EXPECT_EQ(kvscratch_view_plane_row(self->view, V, 0), tensor.data);
	EXPECT_EQ(kvscratch_view_plane_scales(self->view, V), tensor.scales);
	EXPECT_EQ(1, kvscratch_view_valid_rows(self->view, tensor.state));
	ASSERT_EQ(0, kvscratch_plane_tensor(self->pad, K, &tensor));
	EXPECT_EQ(NULL, tensor.scales);
	EXPECT_ERROR(EINVAL, "expected a plane below 4, got 4",
		     kvscratch_plane_tensor(self->pad, NR_PLANES, &tensor));
}

/* Drafts are staged, the accepted ones committed, and no generation moves. */
TEST_F(planes, what_is_staged_beyond_is_dropped)
{
	for (uint32_t row = 0; row < 4; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 2));
	EXPECT_EQ(2, kvscratch_view_state(self->view));
	EXPECT_ERROR(EINVAL, "expected a len from 2, the committed rows, to what every plane has "
		     "staged, got 3", kvscratch_commit(self->writer, 3));
	/* they lie there */
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		ASSERT_EQ(0, kvscratch_keep(self->writer, plane, 2, 1)) TH_LOG("%s", kvscratch_error());
	EXPECT_ERROR(EINVAL, "plane 0 (k0): expected rows that the writer stored as a whole, from 2 "
		     "to what is staged on, got 3 from 2 on", kvscratch_keep(self->writer, K, 2, 3));
	ASSERT_EQ(0, stage_token(self->writer, 3, 9));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 4));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		for (uint32_t row = 0; row < 4; row++)
			EXPECT_TRUE(plane_row_is(self->view, plane, row, row == 3 ? 9 : row));
	EXPECT_EQ(4, kvscratch_view_state(self->view));
}

TEST_F(planes, values_that_do_not_fit)
{
	uint8_t input[256] __attribute__((aligned(8)));
	float nan[64] = { 1, __builtin_nanf("") };

	ASSERT_EQ(0, stage_token(self->writer, 0, 0));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	EXPECT_ERROR(EINVAL, "expected a plane below 4, got 4",
		     kvscratch_stage(self->writer, NR_PLANES, 1, input, 1));
	EXPECT_ERROR(EINVAL, "expected a plane below 4, got 4",
		     kvscratch_keep(self->writer, NR_PLANES, 1, 1));
	EXPECT_ERROR(EINVAL, "plane 0 (k0): expected a row from 1, the committed ones, to what is "
		     "staged, got 0", kvscratch_stage(self->writer, K, 0, input, 1));
	EXPECT_ERROR(EINVAL, "plane 0 (k0): expected a row from 1, the committed ones, to what is "
		     "staged, got 2", kvscratch_stage(self->writer, K, 2, input, 1));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 1 + 12 > 12 max",
		     kvscratch_stage(self->writer, K, 1, input, 12));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 1 + 18446744073709551615 > 12 max",
		     kvscratch_stage(self->writer, K, 1, input, UINT64_MAX));
	EXPECT_ERROR(EINVAL, "expected a len from 1, the committed rows, to what every plane has "
		     "staged, got 0", kvscratch_commit(self->writer, 0));
	ASSERT_EQ(0, stage_row(self->writer, V, 1, 3));
	EXPECT_ERROR(EDOM, "cannot stage rows: a NaN or an infinity has no integer",
		     kvscratch_stage(self->writer, V, 1, nan, 1));
	/* up to where it began */
	EXPECT_EQ(-EINVAL, kvscratch_keep(self->writer, V, 1, 1));
	EXPECT_EQ(0, kvscratch_keep(self->writer, V, 1, 0));
	EXPECT_EQ(0, kvscratch_stage(self->writer, K, 1, input, 0));
	EXPECT_ERROR(EFAULT, "cannot stage rows: Bad address",
		     kvscratch_stage(self->writer, K, 1, (void *)8, 1));
}

TEST_F(planes, a_writer_is_the_only_one)
{
	uint8_t token[INPUT_BYTES];
	struct kvscratch *second, *reader;

	make_token(1, token);
	EXPECT_EQ(O_WRONLY, kvscratch_access(self->writer));
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_copy_rows(self->writer, 0, 0, token));
	EXPECT_ERROR(EBUSY, "cannot append: another handle is the pad's writer",
		     kvscratch_append_tokens(self->pad, token, 1, INPUT_BYTES));
	EXPECT_ERROR(EBUSY, "cannot truncate: another handle is the pad's writer",
		     kvscratch_truncate(self->pad, 0, 0));
	EXPECT_ERROR(EBUSY, "cannot seal the pad: another handle is the pad's writer",
		     kvscratch_seal(self->pad));
	EXPECT_ERROR(EBUSY, "cannot become the writer: another handle is the pad's writer",
		     kvscratch_writer(&second, self->pad));
	EXPECT_ERROR(EBUSY, "cannot become the writer: another handle is the pad's writer",
		     kvscratch_writer(&second, self->writer));
	EXPECT_ERROR(ENOLCK, "cannot stage rows: the handle is not the pad's writer",
		     stage_row(self->pad, K, 0, 1));
	EXPECT_ERROR(ENOLCK, "cannot keep rows: the handle is not the pad's writer",
		     kvscratch_keep(self->pad, K, 0, 0));
	EXPECT_ERROR(ENOLCK, "cannot commit: the handle is not the pad's writer",
		     kvscratch_commit(self->pad, 0));
	/* its own appends and truncates drop what is staged */
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	ASSERT_EQ(0, kvscratch_append_tokens(self->writer, token, 1, INPUT_BYTES));
	EXPECT_EQ(-EINVAL, kvscratch_commit(self->writer, 2));
	EXPECT_EQ(1, kvscratch_len(self->writer));
	ASSERT_EQ(0, stage_token(self->writer, 1, 1));
	ASSERT_EQ(0, kvscratch_truncate(self->writer, 0, 0));
	EXPECT_EQ(-EINVAL, kvscratch_commit(self->writer, 1));
	ASSERT_EQ(0, kvscratch_open(&reader, self->pad, O_RDONLY));
	EXPECT_ERROR(EBADF, "expected a handle open for write, got one for read only",
		     kvscratch_takeover(&second, reader));
	EXPECT_EQ(-EBADF, kvscratch_stage(reader, K, 0, token, 1));
	EXPECT_EQ(-EBADF, kvscratch_commit(reader, 0));
	EXPECT_EQ(-EBADF, kvscratch_seal(reader));
	kvscratch_close(reader);
}

TEST_F(planes, the_role_ends_with_the_object)
{
	struct kvscratch_pad_info info;
	uint8_t token[INPUT_BYTES];

	make_token(1, token);
	EXPECT_EQ(1, kvscratch_view_epoch(self->view));
	EXPECT_TRUE(kvscratch_view_has_writer(self->view));
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	kvscratch_close(self->writer);
	self->writer = NULL;
	EXPECT_FALSE(kvscratch_view_has_writer(self->view));
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &info));
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(1, info.epoch);
	ASSERT_EQ(0, kvscratch_append_tokens(self->pad, token, 1, INPUT_BYTES));
	ASSERT_EQ(0, kvscratch_writer(&self->writer, self->pad));
	EXPECT_EQ(2, kvscratch_view_epoch(self->view));
	/* what was staged is not, and what was appended is whole for no other writer */
	EXPECT_EQ(-EINVAL, kvscratch_commit(self->writer, 2));
	EXPECT_EQ(-EINVAL, kvscratch_keep(self->writer, K, 1, 1));
}

TEST_F(planes, who_was_taken_over_is_stale)
{
	uint8_t token[INPUT_BYTES];
	struct kvscratch *second;

	make_token(1, token);
	ASSERT_EQ(0, stage_token(self->writer, 0, 7));
	ASSERT_EQ(0, kvscratch_takeover(&second, self->pad)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(2, kvscratch_view_epoch(self->view));
	EXPECT_ERROR(ESTALE, "cannot commit: another handle took over as the pad's writer",
		     kvscratch_commit(self->writer, 1));
	EXPECT_EQ(-ESTALE, stage_row(self->writer, K, 0, 1));
	EXPECT_EQ(-ESTALE, kvscratch_keep(self->writer, K, 0, 0));
	EXPECT_EQ(-ESTALE, kvscratch_truncate(self->writer, 0, 0));
	EXPECT_EQ(-ESTALE, kvscratch_append_tokens(self->writer, token, 1, INPUT_BYTES));
	EXPECT_EQ(-ESTALE, kvscratch_seal(self->writer));
	EXPECT_EQ(-EINVAL, kvscratch_commit(second, 1));
	ASSERT_EQ(0, stage_token(second, 0, 8));
	/* which is not the end of the other's role */
	kvscratch_close(self->writer);
	self->writer = NULL;
	EXPECT_TRUE(kvscratch_view_has_writer(self->view));
	EXPECT_EQ(-EBUSY, kvscratch_truncate(self->pad, 0, 0));
	ASSERT_EQ(0, kvscratch_commit(second, 1));
	EXPECT_TRUE(plane_row_is(self->view, V, 0, 8));
	kvscratch_close(second);
}

/* By the death of its process, in the middle of a token */
TEST_F(planes, a_writer_that_is_killed)
{
	struct kvscratch_pad_info info;
	struct child child;

	kvscratch_close(self->writer);
	self->writer = NULL;
	if (start_child(&child)) {
		struct kvscratch *writer;

		CHILD_CHECK(!kvscratch_writer(&writer, self->pad));
		CHILD_CHECK(!stage_token(writer, 0, 1) && !kvscratch_commit(writer, 1));
		CHILD_CHECK(!stage_row(writer, K, 1, 2));
		say(child.line);
		hear(child.line);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	EXPECT_EQ(-EBUSY, kvscratch_truncate(self->pad, 0, 0));
	ASSERT_EQ(0, kill(child.pid, SIGKILL));
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &info));
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(1, info.len);
	/* where nobody is told of its death the page says so until somebody writes */
	EXPECT_EQ(!kept("fenced-takeover"), kvscratch_view_has_writer(self->view));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 1, 0));
	EXPECT_FALSE(kvscratch_view_has_writer(self->view));
	ASSERT_EQ(0, kvscratch_writer(&self->writer, self->pad)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(3, kvscratch_view_epoch(self->view));
	EXPECT_EQ(-EINVAL, kvscratch_commit(self->writer, 2));
	EXPECT_EQ(-EINVAL, kvscratch_keep(self->writer, K, 1, 1));
	ASSERT_EQ(0, stage_token(self->writer, 1, 3));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 2));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++) {
		EXPECT_TRUE(plane_row_is(self->view, plane, 0, 1));
		EXPECT_TRUE(plane_row_is(self->view, plane, 1, 3));
	}
}

/* One that is stopped between two layers wakes up too late. */
TEST_F(planes, a_writer_that_hangs_is_taken_over)
{
	struct child child;

	kvscratch_close(self->writer);
	self->writer = NULL;
	if (start_child(&child)) {
		struct kvscratch *writer;

		CHILD_CHECK(!kvscratch_writer(&writer, self->pad));
		CHILD_CHECK(!stage_row(writer, K, 0, 2));
		say(child.line);
		CHILD_CHECK(hear(child.line));
		CHILD_CHECK(stage_row(writer, V, 0, 2) == -ESTALE);
		CHILD_CHECK(kvscratch_commit(writer, 1) == -ESTALE);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	ASSERT_EQ(0, kvscratch_takeover(&self->writer, self->pad));
	ASSERT_EQ(0, stage_token(self->writer, 0, 4));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	ASSERT_TRUE(say(child.line));
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(1, kvscratch_len(self->pad));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		EXPECT_TRUE(plane_row_is(self->view, plane, 0, 4));
}

/* The open file is the writer, and a child has it as well. */
TEST_F(planes, a_forked_child_keeps_the_role)
{
	struct child child;

	if (start_child(&child)) {
		CHILD_CHECK(!stage_token(self->writer, 0, 1));
		say(child.line);
		CHILD_CHECK(hear(child.line));
		CHILD_CHECK(!kvscratch_commit(self->writer, 2));
		kvscratch_close(self->writer);
		say(child.line);
		hear(child.line);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	ASSERT_EQ(0, stage_token(self->writer, 1, 2));
	kvscratch_close(self->writer);
	self->writer = NULL;
	EXPECT_EQ(-EBUSY, kvscratch_truncate(self->pad, 0, 0));
	EXPECT_TRUE(kvscratch_view_has_writer(self->view));
	ASSERT_TRUE(say(child.line));
	ASSERT_TRUE(hear(child.line));
	EXPECT_EQ(2, kvscratch_len(self->pad));
	EXPECT_EQ(0, kvscratch_truncate(self->pad, 0, 0));
	EXPECT_EQ(0, end_child(&child));
}

TEST_F(planes, a_sealed_pad_is_final)
{
	uint8_t token[INPUT_BYTES];
	struct kvscratch_pad_info info;
	struct kvscratch *second;

	make_token(1, token);
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	ASSERT_EQ(0, stage_token(self->writer, 1, 1));
	EXPECT_FALSE(kvscratch_view_is_sealed(self->view));
	ASSERT_EQ(0, kvscratch_seal(self->writer));
	EXPECT_TRUE(kvscratch_view_is_sealed(self->view));
	EXPECT_EQ(0, kvscratch_seal(self->writer));
	EXPECT_EQ(0, kvscratch_seal(self->pad));
	EXPECT_ERROR(EROFS, "cannot commit: the pad is sealed", kvscratch_commit(self->writer, 2));
	EXPECT_EQ(-EROFS, stage_row(self->writer, K, 1, 1));
	EXPECT_EQ(-EROFS, kvscratch_append_tokens(self->pad, token, 1, INPUT_BYTES));
	EXPECT_EQ(-EROFS, kvscratch_truncate(self->writer, 0, 0));
	EXPECT_EQ(-EROFS, kvscratch_takeover(&second, self->pad));
	EXPECT_EQ(-EROFS, kvscratch_writer(&second, self->pad));
	EXPECT_ERROR(EROFS, "the pad is sealed: there is nothing to wait for",
		     kvscratch_wait(self->pad, 1, -1));
	EXPECT_EQ(0, kvscratch_wait(self->pad, 0, -1));
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &info));
	EXPECT_EQ(1, info.len);
	EXPECT_EQ(KVSCRATCH_PAD_SEALED, info.flags & KVSCRATCH_PAD_SEALED);
	/* which ends the role and not the seal */
	kvscratch_close(self->writer);
	self->writer = NULL;
	EXPECT_TRUE(kvscratch_view_is_sealed(self->view));
	EXPECT_FALSE(kvscratch_view_has_writer(self->view));
}

/* Rows of the pads below are made of their number, and of @branch from @own on. */
static bool rows_of_branch(struct kvscratch *pad, uint32_t own, uint32_t branch)
{
	const struct kvscratch_view *view = kvscratch_view(pad);
	const int64_t len = kvscratch_len(pad);
	bool right = view && len >= 0;

	for (uint32_t row = 0; right && row < len; row++)
		for (uint32_t plane = 0; right && plane < NR_PLANES; plane++)
			right = plane_row_is(view, plane, row, row < own ? row : row + branch);
	return right;
}

static int append_to_branch(struct kvscratch *pad, uint32_t branch)
{
	uint8_t token[INPUT_BYTES];

	make_token(kvscratch_len(pad) + branch, token);
	return kvscratch_append_tokens(pad, token, 1, INPUT_BYTES);
}

TEST_F(planes, a_fork_goes_on_by_itself)
{
	struct kvscratch_pad_info info, of_source;
	struct kvscratch *child, *grandchild;

	for (uint32_t row = 0; row < 8; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 6));
	/* what is staged is not forked; while a writer is at work it is */
	ASSERT_EQ(0, kvscratch_fork(&child, self->pad, 5, 20)) TH_LOG("%s", kvscratch_error());
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &of_source));
	ASSERT_EQ(0, kvscratch_pad_info(child, &info));
	EXPECT_EQ(5, info.len);
	EXPECT_EQ(0, info.generation);
	EXPECT_EQ(20, info.max_seq_len);
	EXPECT_EQ(5, info.parent_rows);
	EXPECT_EQ(of_source.id, info.parent_id);
	EXPECT_EQ(0, of_source.parent_id);
	EXPECT_EQ(0, memcmp(info.tag, of_source.tag, sizeof(info.tag)));
	EXPECT_EQ(O_RDWR, kvscratch_access(child));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		EXPECT_STREQ(four_planes[plane].label, kvscratch_plane(child, plane)->label);
	ASSERT_EQ(0, append_to_branch(child, 100));
	ASSERT_EQ(0, append_to_branch(child, 100));
	ASSERT_EQ(0, kvscratch_fork(&grandchild, child, 6, 6));
	EXPECT_EQ(-ENOSPC, append_to_branch(grandchild, 100));
	EXPECT_TRUE(rows_of_branch(self->pad, 12, 0));
	EXPECT_TRUE(rows_of_branch(child, 5, 100));
	kvscratch_close(child);
	EXPECT_TRUE(rows_of_branch(grandchild, 5, 100));
	kvscratch_close(grandchild);
}

TEST_F(planes, a_fork_that_cannot_be)
{
	struct kvscratch *child, *reader;

	ASSERT_EQ(0, stage_token(self->writer, 0, 0));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	EXPECT_ERROR(EINVAL, "expected at most 1, the committed rows, got 2",
		     kvscratch_fork(&child, self->pad, 2, 12));
	EXPECT_ERROR(EINVAL, "max_seq_len: expected at least 1, the rows of the fork, got 0",
		     kvscratch_fork(&child, self->pad, 1, 0));
	EXPECT_EQ(-EINVAL, kvscratch_fork(&child, self->pad, 0, 0));
	ASSERT_EQ(0, kvscratch_open(&reader, self->pad, O_RDONLY));
	EXPECT_ERROR(EBADF, "expected a handle open for write, or a sealed pad, got a handle for "
		     "read only", kvscratch_fork(&child, reader, 1, 12));
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_fork(&child, self->writer, 1, 12));
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_rewind(&self->writer, 0));
	ASSERT_EQ(0, kvscratch_seal(self->writer));
	ASSERT_EQ(0, kvscratch_fork(&child, reader, 1, 12)) TH_LOG("%s", kvscratch_error());
	EXPECT_TRUE(rows_of_branch(child, 1, 0));
	kvscratch_close(child);
	kvscratch_close(reader);
}

/* As large as its source, and each goes on alone */
TEST_F(planes, a_clone_goes_on_by_itself)
{
	struct kvscratch *clone, *reader;

	for (uint32_t row = 0; row < 3; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 3));
	ASSERT_EQ(0, kvscratch_clone(&clone, self->pad)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(3, kvscratch_len(clone));
	EXPECT_EQ(kvscratch_capacity(self->pad), kvscratch_capacity(clone));
	EXPECT_EQ(0, append_to_branch(clone, 0));
	EXPECT_EQ(3, kvscratch_len(self->pad));
	EXPECT_EQ(4, kvscratch_len(clone));
	EXPECT_TRUE(rows_of_branch(clone, 3, 0));
	kvscratch_close(clone);

	ASSERT_EQ(0, kvscratch_open(&reader, self->pad, O_RDONLY));
	EXPECT_ERROR(EBADF, "expected a handle open for write, or a sealed pad, got a handle for "
		     "read only", kvscratch_clone(&clone, reader));
	kvscratch_close(reader);
}

/* What is shown of it stays, whatever becomes of the pad. */
TEST_F(planes, a_snapshot_stays)
{
	struct kvscratch *snapshot, *empty;

	ASSERT_EQ(0, kvscratch_snapshot(&empty, self->pad));
	EXPECT_EQ(0, kvscratch_len(empty));
	kvscratch_close(empty);
	for (uint32_t row = 0; row < 3; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 3));
	ASSERT_EQ(0, kvscratch_snapshot(&snapshot, self->pad)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(-EROFS, append_to_branch(snapshot, 0));
	EXPECT_TRUE(kvscratch_view_is_sealed(kvscratch_view(snapshot)));
	kvscratch_close(self->writer);
	self->writer = NULL;
	kvscratch_close(self->pad);
	self->pad = NULL;
	EXPECT_EQ(3, kvscratch_len(snapshot));
	EXPECT_TRUE(rows_of_branch(snapshot, 3, 0));
	kvscratch_close(snapshot);
}

TEST_F(planes, a_rewind_replaces_what_others_share)
{
	struct kvscratch *child, *pad;
	int replaced;

	kvscratch_close(self->writer);
	self->writer = NULL;
	ASSERT_EQ(0, kvscratch_open(&pad, self->pad, O_RDWR));
	for (uint32_t row = 0; row < 8; row++)
		ASSERT_EQ(0, append_to_branch(pad, 0));
	/* nobody shares anything */
	EXPECT_EQ(0, kvscratch_rewind(&pad, 7));
	EXPECT_EQ(1, kvscratch_view(pad)->status->generation);
	EXPECT_ERROR(EINVAL, "expected at most 7, the committed rows, got 8",
		     kvscratch_rewind(&pad, 8));
	ASSERT_EQ(0, kvscratch_snapshot(&child, pad));
	/* rows as small as these are copied, unless there is more than a page of them */
	replaced = kvscratch_rewind(&pad, 4);
	ASSERT_LE(0, replaced) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(4, kvscratch_len(pad));
	ASSERT_EQ(0, append_to_branch(pad, 50));
	EXPECT_TRUE(rows_of_branch(pad, 4, 50));
	EXPECT_EQ(7, kvscratch_len(child));
	EXPECT_TRUE(rows_of_branch(child, 7, 0));
	kvscratch_close(child);
	kvscratch_close(pad);
}

/* The module shares pages, and says so where they cannot be dropped; a memfd copies them. */
TEST(a_rewind_of_shared_pages)
{
	uint8_t rows[3][4096];
	struct kvscratch *pad, *old, *child;

	memset(rows, 1, sizeof(rows));
	ASSERT_EQ(0, kvscratch_new(&pad, 16, 4096, KVSCRATCH_DTYPE_U8));
	ASSERT_EQ(0, kvscratch_append_rows(pad, rows, 3, 4096));
	ASSERT_EQ(0, kvscratch_fork(&child, pad, 3, 16));
	ASSERT_EQ(0, kvscratch_open(&old, pad, O_RDWR));
	if (kvscratch_backend(pad) == KVSCRATCH_BACKEND_KERNEL) {
		EXPECT_ERROR(ETXTBSY, "cannot truncate: another pad shares rows that would be "
			     "dropped; fork those that are to stay", kvscratch_truncate(pad, 1, 0));
		EXPECT_EQ(1, kvscratch_rewind(&pad, 1)) TH_LOG("%s", kvscratch_error());
		EXPECT_EQ(3, kvscratch_len(old));
	} else {
		EXPECT_EQ(0, kvscratch_rewind(&pad, 1)) TH_LOG("%s", kvscratch_error());
		EXPECT_EQ(1, kvscratch_len(old));
	}
	EXPECT_EQ(1, kvscratch_len(pad));
	EXPECT_EQ(16, kvscratch_capacity(pad));
	ASSERT_EQ(0, kvscratch_append_rows(pad, rows, 2, 4096));
	EXPECT_EQ(3, kvscratch_len(child));
	kvscratch_close(child);
	kvscratch_close(old);
	kvscratch_close(pad);
}

TEST_F(planes, a_truncate_with_an_expectation)
{
	struct kvscratch_pad_info info;

	for (uint32_t row = 0; row < 3; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 3));
	EXPECT_ERROR(ECANCELED, "expected generation 1 and 3 rows, found 0 and 3",
		     kvscratch_truncate_if(self->writer, 2, 0, 1, 3));
	EXPECT_ERROR(ECANCELED, "expected generation 0 and 2 rows, found 0 and 3",
		     kvscratch_truncate_if(self->writer, 2, 0, 0, 2));
	EXPECT_ERROR(EINVAL, "expected at most 3, the committed rows, got 4",
		     kvscratch_truncate_if(self->writer, 4, 0, 0, 3));
	EXPECT_ERROR(EINVAL, "expected 0 or KVSCRATCH_TRUNCATE_ZERO, got flags 0x4",
		     kvscratch_truncate(self->writer, 2, 4));
	/* which says nothing without what is expected */
	EXPECT_ERROR(EINVAL, "expected 0 or KVSCRATCH_TRUNCATE_ZERO, got flags 0x2",
		     kvscratch_truncate(self->writer, 2, KVSCRATCH_TRUNCATE_EXPECT));
	EXPECT_EQ(3, kvscratch_view_state(self->view));
	ASSERT_EQ(0, kvscratch_truncate_if(self->writer, 2, KVSCRATCH_TRUNCATE_ZERO, 0, 3));
	ASSERT_EQ(0, kvscratch_pad_info(self->pad, &info));
	EXPECT_EQ(2, info.len);
	EXPECT_EQ(1, info.generation);
	EXPECT_EQ(2, info.trunc_len);
	EXPECT_EQ(1, self->view->status->generation);
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		EXPECT_TRUE(all_zero(kvscratch_view_plane_row(self->view, plane, 2),
				     kvscratch_view_plane(self->view, plane)->row_bytes));
	/* no more is whole */
	EXPECT_EQ(-EINVAL, kvscratch_keep(self->writer, K, 2, 1));
}

/* It would not hear of what others do once it is taken over. */
TEST_F(planes, a_writer_does_not_wait)
{
	struct kvscratch *second;

	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_wait(self->writer, 0, -1));
	ASSERT_EQ(0, kvscratch_takeover(&second, self->pad));
	EXPECT_EQ(-EBADF, kvscratch_wait(self->writer, 0, -1));
	EXPECT_EQ(-EBADF, kvscratch_wait(second, 0, -1));
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_seen(second, 0));
	ASSERT_EQ(0, stage_token(second, 0, 1));
	ASSERT_EQ(0, kvscratch_commit(second, 1));
	/* on the handle that it was opened from it works */
	EXPECT_EQ(0, kvscratch_wait(self->pad, 0, -1));
	kvscratch_close(second);
}

/* Whether this process has a page in its page tables */
static bool is_mapped(int pagemap, const void *at)
{
	uint64_t entry = 0;

	return pread(pagemap, &entry, sizeof(entry),
		     (uintptr_t)at / page_bytes() * sizeof(entry)) == sizeof(entry) && entry >> 63;
}

/* An engine brings the address. */
TEST_F(planes, one_is_mapped_where_the_caller_wants_it)
{
	const size_t bytes = 3 * page_bytes();
	char *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *middle = room + page_bytes();
	char words[64];
	int pagemap = open("/proc/self/pagemap", O_RDONLY);

	ASSERT_NE(MAP_FAILED, room);
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	ASSERT_EQ(0, kvscratch_map_plane(self->pad, K, middle)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(pagemap >= 0, is_mapped(pagemap, middle));
	close(pagemap);
	EXPECT_EQ(0, memcmp(middle, kvscratch_view_plane_row(self->view, K, 0), 24));
	ASSERT_EQ(0, stage_token(self->writer, 0, 2));
	EXPECT_EQ(0, memcmp(middle, kvscratch_view_plane_row(self->view, K, 0), 24));
	if (kept("immutable-rows"))
		EXPECT_NE(0, mprotect(middle, page_bytes(), PROT_READ | PROT_WRITE));
	snprintf(words, sizeof(words), "expected the address of a page, got %p", middle + 8);
	EXPECT_ERROR(EINVAL, words, kvscratch_map_plane(self->pad, K, middle + 8));
	EXPECT_EQ(-EINVAL, kvscratch_map_plane(self->pad, K, NULL));
	EXPECT_ERROR(EINVAL, "expected a plane below 4, got 9",
		     kvscratch_map_plane(self->pad, 9, middle));
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     kvscratch_map_plane(self->writer, K, middle));
	EXPECT_ERROR(EINVAL, "expected a plane of mxint8, which has scales, got one of f32",
		     kvscratch_map_scales(self->pad, K, room));
	/* elements and scales of one plane, of rows that come later, too */
	ASSERT_EQ(0, kvscratch_map_plane(self->pad, V, room));
	ASSERT_EQ(0, kvscratch_map_scales(self->pad, V, room + 2 * page_bytes()))
		TH_LOG("%s", kvscratch_error());
	for (uint64_t len = 1; len < 4; len++) {
		size_t bytes_of_scales = len * 64 / KVSCRATCH_MX_BLOCK;

		ASSERT_EQ(0, stage_token(self->writer, len - 1, 7 + len));
		ASSERT_EQ(0, kvscratch_commit(self->writer, len));
		EXPECT_FALSE(all_zero(room + 2 * page_bytes(), bytes_of_scales));
		EXPECT_EQ(0, memcmp(room, kvscratch_view_plane_row(self->view, V, 0), len * 64));
		EXPECT_EQ(0, memcmp(room + 2 * page_bytes(),
				    kvscratch_view_plane_scales(self->view, V), bytes_of_scales));
	}
	EXPECT_EQ(-EINVAL, kvscratch_map_scales(self->pad, V, room + 8));
	EXPECT_EQ(-EINVAL, kvscratch_map_scales(self->pad, NR_PLANES, room));
	EXPECT_EQ(-EBADF, kvscratch_map_scales(self->writer, V, room));
	/* it outlives the object */
	kvscratch_close(self->writer);
	kvscratch_close(self->pad);
	self->writer = self->pad = NULL;
	EXPECT_FALSE(all_zero(middle, 24));
	EXPECT_EQ(0, munmap(room, bytes));
}

static void *use_descriptors_of_its_own(void *argument)
{
	static const float row[4] = { 1, 2, 3, 4 };
	struct kvscratch *pad;
	int err;

	(void)argument;
	if (unshare(CLONE_FILES))
		return (void *)1;
	err = kvscratch_new(&pad, 2, 4, F32);
	if (err)
		return (void *)2;
	err = kvscratch_append(pad, row, 4);
	kvscratch_close(pad);
	return (void *)(long)err;
}

/* What the first thread has at the same number, if anything, does not matter. */
TEST(a_thread_with_descriptors_of_its_own)
{
	pthread_t thread;
	void *err;

	ASSERT_EQ(0, pthread_create(&thread, NULL, use_descriptors_of_its_own, NULL));
	pthread_join(thread, &err);
	EXPECT_EQ(NULL, err);
}

TEST_F(planes, access_that_is_none)
{
	static const char words[] = "access: expected O_RDONLY, O_WRONLY or O_RDWR, got 0x3";
	struct kvscratch *other;

	EXPECT_ERROR(EINVAL, words, kvscratch_open(&other, self->pad, 3));
	EXPECT_ERROR(EINVAL, words, kvscratch_attach(&other, kvscratch_fd(self->pad), 3));
	EXPECT_ERROR(EINVAL, words, kvscratch_attach_name(&other, "nobody", 3));
	EXPECT_EQ(-EINVAL, kvscratch_open(&other, self->pad, O_RDWR | O_CLOEXEC));
}

/* Rows that an append stored, and one that failed did not */
TEST_F(planes, appended_rows_are_kept)
{
	uint8_t tokens[10 * INPUT_BYTES];

	for (uint32_t i = 0; i < 10; i++)
		make_token(i, tokens + i * INPUT_BYTES);
	ASSERT_EQ(0, kvscratch_append_tokens(self->writer, tokens, 10, INPUT_BYTES));
	ASSERT_EQ(0, kvscratch_truncate(self->writer, 5, 0));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		ASSERT_EQ(0, kvscratch_keep(self->writer, plane, 5, 5))
			TH_LOG("%s", kvscratch_error());
	ASSERT_EQ(0, kvscratch_commit(self->writer, 10));
	ASSERT_EQ(0, kvscratch_truncate(self->writer, 5, 0));
	memcpy(tokens + 24, &(float){ __builtin_nanf("") }, 4);
	EXPECT_EQ(-EDOM, kvscratch_append_tokens(self->writer, tokens, 1, INPUT_BYTES));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		EXPECT_EQ(-EINVAL, kvscratch_keep(self->writer, plane, 5, 1));
}

/* Who may not change a pad hears so, however much would have been appended. */
TEST_F(planes, more_tokens_than_fit_without_the_right)
{
	uint8_t token[INPUT_BYTES] = { 0 };
	struct kvscratch *second;

	EXPECT_ERROR(EBUSY, "cannot append: another handle is the pad's writer",
		     kvscratch_append_tokens(self->pad, token, PLANES_ROWS + 1, INPUT_BYTES));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 0 + 18446744073709551615 > 12 max",
		     kvscratch_append_tokens(self->writer, token, UINT64_MAX, INPUT_BYTES));
	ASSERT_EQ(0, kvscratch_takeover(&second, self->pad));
	EXPECT_EQ(-ESTALE, kvscratch_append_tokens(self->writer, token, UINT64_MAX, INPUT_BYTES));
	ASSERT_EQ(0, kvscratch_seal(second));
	EXPECT_EQ(-EROFS, kvscratch_append_tokens(second, token, PLANES_ROWS + 1, INPUT_BYTES));
	kvscratch_close(second);
}

/* What a copy of the writer's descriptor is */
TEST_F(planes, the_descriptor_of_a_writer_is_passed_on)
{
	struct kvscratch *copy;
	int fd = dup(kvscratch_fd(self->writer));

	ASSERT_EQ(0, kvscratch_from_fd(&copy, fd));
	EXPECT_EQ(kept("fenced-takeover") ? 0 : -ENOLCK, kvscratch_commit(copy, 0));
	kvscratch_close(copy);
}

/* Where they exist, what is refused is that there is none at this address. */
static bool has_seccomp_filters(void)
{
	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, NULL) && errno == EFAULT;
}

/* From now on whoever wakes waiters is killed. */
static bool die_at_wake_ups(void)
{
#ifdef SYS_futex_time64
	const uint32_t futex_time64 = SYS_futex_time64;
#else
	const uint32_t futex_time64 = SYS_futex;
#endif
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_futex, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, futex_time64, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(filter) / sizeof(filter[0]), .filter = filter };

	return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
	       !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/* Between the truncate and the zeros */
TEST_F(planes, a_seal_zeroes_what_a_killed_truncate_dropped)
{
	struct child child;

	if (!has_seccomp_filters())
		SKIP(return, "the kernel has no seccomp filters");
	for (uint32_t row = 0; row < 2; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 2));
	if (start_child(&child)) {
		CHILD_CHECK(die_at_wake_ups());
		_exit(!!kvscratch_truncate(self->writer, 1, KVSCRATCH_TRUNCATE_ZERO));
	}
	EXPECT_EQ(kept("poll") ? 0 : 128 + SIGSYS, end_child(&child));
	EXPECT_EQ(1, kvscratch_len(self->pad));
	ASSERT_EQ(0, kvscratch_seal(self->writer));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++) {
		EXPECT_TRUE(plane_row_is(self->view, plane, 0, 0));
		EXPECT_TRUE(all_zero(kvscratch_view_plane_row(self->view, plane, 1),
				     kvscratch_view_plane(self->view, plane)->row_bytes));
	}
}

TEST_F(planes, another_handle_has_no_more_rights)
{
	struct kvscratch *reader, *other;
	char words[100];

	ASSERT_EQ(0, kvscratch_open(&reader, self->pad, O_RDONLY));
	EXPECT_EQ(O_RDONLY, kvscratch_access(reader));
	EXPECT_EQ(NR_PLANES, kvscratch_nr_planes(reader));
	EXPECT_EQ(V, kvscratch_find_plane(reader, "v0"));
	snprintf(words, sizeof(words), "descriptor %d: expected it open for no less than is asked "
		 "for, got read only", kvscratch_fd(reader));
	EXPECT_ERROR(EACCES, words, kvscratch_open(&other, reader, O_RDWR));
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	EXPECT_EQ(1, kvscratch_len(reader));
	EXPECT_EQ(-EACCES, kvscratch_open(&other, self->writer, O_RDONLY));
	ASSERT_EQ(0, kvscratch_open(&other, self->pad, O_RDWR));
	EXPECT_EQ(-EBUSY, kvscratch_truncate(other, 0, 0));
	kvscratch_close(other);
	kvscratch_close(reader);
}

/* What kept("poll") is about */
TEST_F(planes, what_poll_is_told)
{
	struct pollfd polled = { .fd = kvscratch_fd(self->pad), .events = POLLIN };

	if (!kept("poll")) {
		EXPECT_ERROR(EOPNOTSUPP, "a memfd is always ready for poll(): kvscratch_wait() waits",
			     kvscratch_seen(self->pad, 0));
		return;
	}
	ASSERT_EQ(0, stage_token(self->writer, 0, 1));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 1));
	EXPECT_EQ(1, poll(&polled, 1, 0));
	ASSERT_EQ(0, kvscratch_seen(self->pad, kvscratch_view_state(self->view)));
	EXPECT_EQ(0, poll(&polled, 1, 0));
	EXPECT_ERROR(EINVAL, "cannot tell poll() what was seen: a value that the pad or the format "
		     "does not allow", kvscratch_seen(self->pad, PLANES_ROWS + 1));
}

TEST(planes_that_are_refused)
{
	static const struct kvscratch_plane good = { .dim = 4, .dtype = F32, .label = "k" };
	struct kvscratch_plane planes[3] = { good, good, good };
	uint8_t tag[KVSCRATCH_TAG_BYTES + 1] = { 0 };
	struct kvscratch *pad;
	char words[160];

	EXPECT_ERROR(EINVAL, "planes: expected 1 to 4096, got 0",
		     kvscratch_new_planes(&pad, 8, planes, 0, NULL, 0));
	EXPECT_ERROR(EINVAL, "planes: expected 1 to 4096, got 4097",
		     kvscratch_new_planes(&pad, 8, planes, 4097, NULL, 0));
	EXPECT_ERROR(EINVAL, "tag: expected at most 64 bytes, got 65",
		     kvscratch_new_planes(&pad, 8, planes, 3, tag, sizeof(tag)));
	EXPECT_ERROR(EINVAL, "max_seq_len: expected 1 to 4294967295 rows, got 0",
		     kvscratch_new_planes(&pad, 0, planes, 3, NULL, 0));
	planes[2].dtype = 99;
	EXPECT_ERROR(EINVAL, "plane 2: dtype: expected one of f64 f32 f16 bf16 i64 i32 i16 i8 u8 and "
		     "mxint8, got number 99", kvscratch_new_planes(&pad, 8, planes, 3, NULL, 0));
	planes[2] = good;
	memset(planes[1].label, 'v', KVSCRATCH_LABEL_BYTES);
	EXPECT_ERROR(EINVAL, "plane 1: label: expected at most 15 bytes, got \"vvvvvvvvvvvvvvvv\" "
		     "without its end", kvscratch_new_planes(&pad, 8, planes, 3, NULL, 0));
	planes[1].label[0] = '\n';
	EXPECT_ERROR(EINVAL, "plane 1: label: expected at most 15 bytes, got \"?vvvvvvvvvvvvvvv\" "
		     "without its end", kvscratch_new_planes(&pad, 8, planes, 3, NULL, 0));
	planes[1] = good;
	for (int i = 0; i < 3; i++)
		planes[i].dim = KVSCRATCH_MAX_ROW_BYTES / 4 / 2;
	EXPECT_ERROR(EINVAL, "planes: expected tokens of at most 16777216 bytes over all of them, as "
		     "stored and as appended, got more",
		     kvscratch_new_planes(&pad, 1, planes, 3, NULL, 0));
	for (int i = 0; i < 3; i++)
		planes[i].dim = 4;
	/* those of another pad, output and all, with labels that are not unique */
	ASSERT_EQ(0, kvscratch_new_planes(&pad, 8, planes, 3, NULL, 0));
	EXPECT_ERROR(ENOTUNIQ, "expected one plane called \"k\", got planes 0 and 1",
		     kvscratch_find_plane(pad, "k"));
	EXPECT_ERROR(ENOENT, "no plane is called \"?[2J\"", kvscratch_find_plane(pad, "\33[2J"));
	memcpy(planes, kvscratch_plane(pad, 0), sizeof(planes));
	planes[1].scales_offset = planes[1].scales_row_bytes = planes[1].reserved = 12345;
	kvscratch_close(pad);
	ASSERT_EQ(0, kvscratch_new_planes(&pad, 8, planes, 3, NULL, 0));
	planes[1].scales_offset = planes[1].scales_row_bytes = planes[1].reserved = 0;
	EXPECT_EQ(0, memcmp(planes, kvscratch_plane(pad, 0), sizeof(planes)));
	kvscratch_close(pad);
	snprintf(words, sizeof(words), "cannot create a pad of 4294967295 rows over 3 planes: %s",
		 limit_of_bytes());
	EXPECT_ERROR(EDQUOT, words, kvscratch_new_planes(&pad, UINT32_MAX, planes, 3, NULL, 0));
}

/* As a program would give them that knows more of a plane */
TEST(planes_of_another_size)
{
	struct {
		struct kvscratch_plane plane;
		uint64_t more;
	} longer[3] = { 0 };
	const size_t size = sizeof(longer[0]);
	const struct kvscratch_view *view;
	struct kvscratch *pad;

	for (uint32_t i = 0; i < 3; i++)
		longer[i].plane = (struct kvscratch_plane){ .dim = 4 + i, .dtype = U8 };
	ASSERT_EQ(0, kvscratch_new_planes_sized(&pad, 8, &longer[0].plane, 3, size, NULL, 0))
		TH_LOG("%s", kvscratch_error());
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	EXPECT_EQ(8, view->max_seq_len);
	EXPECT_EQ(3, view->nr_planes);
	EXPECT_EQ(sizeof(struct kvscratch_plane), view->plane_bytes);
	for (uint32_t i = 0; i < 3; i++) {
		EXPECT_EQ(4 + i, kvscratch_view_plane(view, i)->dim);
		EXPECT_EQ(kvscratch_plane(pad, i), kvscratch_view_plane(view, i));
	}
	kvscratch_close(pad);
	longer[2].more = 1ull << 63;
	EXPECT_ERROR(E2BIG, "planes: plane 2 has what this library is too old to know",
		     kvscratch_new_planes_sized(&pad, 8, &longer[0].plane, 3, size, NULL, 0));
	EXPECT_ERROR(EINVAL, "planes: expected elements of 64 bytes or more, a multiple of 8, got 56",
		     kvscratch_new_planes_sized(&pad, 8, &longer[0].plane, 3, 56, NULL, 0));
	EXPECT_ERROR(EINVAL, "planes: expected elements of 64 bytes or more, a multiple of 8, got 65",
		     kvscratch_new_planes_sized(&pad, 8, &longer[0].plane, 3, 65, NULL, 0));
}

/* As many as there can be */
TEST(four_thousand_planes)
{
	struct kvscratch_plane *planes = calloc(KVSCRATCH_MAX_PLANES, sizeof(*planes));
	uint16_t *token = calloc(KVSCRATCH_MAX_PLANES, sizeof(*token));
	struct kvscratch_tensor tensor;
	struct kvscratch *pad, *other, *writer;

	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++) {
		planes[i].dim = 1;
		planes[i].dtype = KVSCRATCH_DTYPE_I16;
		snprintf(planes[i].label, sizeof(planes[i].label), "p%u", i);
		token[i] = i;
	}
	ASSERT_EQ(0, kvscratch_new_planes(&pad, 2, planes, KVSCRATCH_MAX_PLANES, NULL, 0))
		TH_LOG("%s", kvscratch_error());
	ASSERT_EQ(0, kvscratch_append_tokens(pad, token, 1, KVSCRATCH_MAX_PLANES * 2));
	ASSERT_EQ(0, kvscratch_open(&other, pad, O_RDWR)) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(4095, kvscratch_find_plane(other, "p4095"));
	ASSERT_EQ(0, kvscratch_plane_tensor(other, 4095, &tensor));
	EXPECT_EQ(4095, *(const uint16_t *)tensor.data);
	ASSERT_EQ(0, kvscratch_writer(&writer, other));
	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++)
		ASSERT_EQ(0, kvscratch_stage(writer, i, 1, &token[4095 - i], 1));
	ASSERT_EQ(0, kvscratch_commit(writer, 2));
	ASSERT_EQ(0, kvscratch_plane_tensor(pad, 1, &tensor));
	EXPECT_EQ(2, tensor.len);
	EXPECT_EQ(4094, ((const uint16_t *)tensor.data)[1]);
	kvscratch_close(writer);
	kvscratch_close(other);
	kvscratch_close(pad);
	free(planes);
	free(token);
}

/* As a program that knows less, or more, of the struct */
TEST_F(planes, tell_so_much_as_the_program_knows)
{
	struct { struct kvscratch_pad_info info; uint64_t later; } longer;
	struct kvscratch_pad_info info = { .max_seq_len = 77 };

	EXPECT_EQ(0, kvscratch_pad_info_sized(self->pad, &info, 16));
	EXPECT_EQ(16, info.size);
	EXPECT_NE(0, info.id);
	EXPECT_EQ(77, info.max_seq_len);
	EXPECT_EQ(0, kvscratch_pad_info_sized(self->pad, &longer.info, sizeof(longer)));
	EXPECT_EQ(0, longer.later);
	EXPECT_EQ(sizeof(info), longer.info.size);
}

/* Threads */

struct stager {
	struct kvscratch *writer;
	uint32_t plane;
	int *missing;
};

static void *stage_rows(void *argument)
{
	const struct stager *stager = argument;

	meet(stager->missing);
	for (uint32_t round = 0; round < 200; round++)
		for (uint32_t row = 0; row < PLANES_ROWS; row++)
			if (stage_row(stager->writer, stager->plane, row, row + round))
				return (void *)1;
	return NULL;
}

/* A thread for each plane, and one object */
TEST_F(planes, threads_share_a_writer)
{
	struct stager stagers[NR_PLANES];
	pthread_t threads[NR_PLANES];
	int *missing = new_counter(NR_PLANES);

	for (uint32_t i = 0; i < NR_PLANES; i++) {
		stagers[i] = (struct stager){ self->writer, i, missing };
		ASSERT_EQ(0, pthread_create(&threads[i], NULL, stage_rows, &stagers[i]));
	}
	EXPECT_EQ(0, join_all(threads, NR_PLANES));
	ASSERT_EQ(0, kvscratch_commit(self->writer, PLANES_ROWS));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++)
		for (uint32_t row = 0; row < PLANES_ROWS; row++)
			EXPECT_TRUE(plane_row_is(self->view, plane, row, row + 199));
}

/* Who waits for a row learns that none will come. */
TEST_F(planes, a_seal_wakes_who_waits)
{
	struct waiter waiter = { .pad = self->pad };
	pthread_t thread;
	void *err;

	ASSERT_EQ(0, pthread_create(&thread, NULL, wait_for_change, &waiter));
	while (!__atomic_load_n(&waiter.thread, __ATOMIC_ACQUIRE))
		sched_yield();
	EXPECT_EQ('S', await_sleep(waiter.thread));
	ASSERT_EQ(0, kvscratch_seal(self->writer));
	pthread_join(thread, &err);
	EXPECT_EQ(-EROFS, (long)err);
}

#define RIVALS 3
#define CONTESTED_ROWS 2000

static const struct kvscratch_plane three_planes[] = {
	{ .dim = 1, .dtype = KVSCRATCH_DTYPE_I64 },
	{ .dim = 3, .dtype = KVSCRATCH_DTYPE_I64 },
	{ .dim = 1, .dtype = KVSCRATCH_DTYPE_I64 },
};

/* Tokens of @number, until the role is lost or the pad full */
static int write_contested(struct kvscratch *writer, int64_t number)
{
	const int64_t rows[] = { number, number, number };
	int64_t len = kvscratch_len(writer);
	int err = 0;

	while (!err) {
		for (uint32_t plane = 0; !err && plane < 3; plane++)
			err = kvscratch_stage(writer, plane, len, rows, 1);
		if (!err)
			err = kvscratch_commit(writer, ++len);
	}
	return err;
}

/* Who lost the role takes it back as soon as there is another row. */
static int be_a_rival(struct kvscratch *pad, int64_t number, int *missing)
{
	const struct kvscratch_view *view = kvscratch_view(pad);
	int err;

	meet(missing);
	do {
		struct kvscratch *writer;
		uint64_t lost;

		if (kvscratch_takeover(&writer, pad))
			return 1;
		err = write_contested(writer, number);
		lost = kvscratch_view_state(view);
		kvscratch_close(writer);
		while (err == -ESTALE && kvscratch_view_state(view) == lost &&
		       kvscratch_state_len(lost) < CONTESTED_ROWS)
			sched_yield();
	} while (err == -ESTALE);
	return err != -ENOSPC;
}

/* No token has rows of two writers, and none is lost. */
TEST(takeovers_leave_whole_tokens)
{
	int *missing = new_counter(RIVALS);
	const struct kvscratch_view *view;
	struct kvscratch *pad;
	pid_t rivals[RIVALS];

	ASSERT_EQ(0, kvscratch_new_planes(&pad, CONTESTED_ROWS, three_planes, 3, NULL, 0));
	for (int i = 0; i < RIVALS; i++) {
		rivals[i] = fork_child();
		ASSERT_LE(0, rivals[i]);
		if (!rivals[i])
			_exit(be_a_rival(pad, i + 1, missing));
	}
	for (int i = 0; i < RIVALS; i++)
		EXPECT_EQ(0, wait_for(rivals[i]));
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	EXPECT_EQ(CONTESTED_ROWS, kvscratch_view_state(view));
	EXPECT_LE(RIVALS, kvscratch_view_epoch(view));
	for (uint32_t row = 0; row < CONTESTED_ROWS; row++) {
		const int64_t *k = kvscratch_view_plane_row(view, 0, row);
		const int64_t *v = kvscratch_view_plane_row(view, 1, row);
		const int64_t *last = kvscratch_view_plane_row(view, 2, row);

		ASSERT_TRUE(*k && *k == v[0] && *k == v[1] && *k == v[2] && *k == *last)
			TH_LOG("row %u", row);
	}
	kvscratch_close(pad);
}

/* Views that cannot be populated */

/* From now on MADV_POPULATE_READ fails with @error. */
static bool refuse_to_populate(int error)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2]) +
			 4 * (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_POPULATE_READ, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { .len = sizeof(filter) / sizeof(filter[0]), .filter = filter };

	return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
	       !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

TEST_F(planes, a_view_says_why_it_is_not_there)
{
	static const char words[] = "cannot map the pad and have its pages there: out of memory, or "
				    "the memory cgroup is full";
	struct kvscratch_tensor tensor;
	struct kvscratch *other;
	void *room = mmap(NULL, page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_EQ(0, kvscratch_open(&other, self->pad, O_RDONLY));
	if (!refuse_to_populate(ENOMEM))
		SKIP(return, "no system call can be refused: %s", strerror(errno));
	errno = 0;
	EXPECT_EQ(NULL, kvscratch_view(other));
	EXPECT_EQ(ENOMEM, errno);
	EXPECT_STREQ(words, kvscratch_error());
	EXPECT_ERROR(ENOMEM, words, kvscratch_plane_tensor(other, K, &tensor));
	EXPECT_ERROR(ENOMEM, "cannot map the plane and have its pages there: out of memory, or the "
		     "memory cgroup is full", kvscratch_map_plane(other, K, room));
	kvscratch_close(other);
}

/* Before Linux 5.14 pages are touched one by one. */
TEST_F(planes, a_kernel_that_populates_nothing)
{
	const struct kvscratch_view *view;
	struct kvscratch_plane wide = { .dim = 3 * page_bytes(), .dtype = U8 };
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	struct kvscratch *other;

	if (pagemap < 0)
		SKIP(return, "there is no /proc/self/pagemap");
	ASSERT_EQ(0, kvscratch_new_planes(&other, 2, &wide, 1, NULL, 0));
	if (!refuse_to_populate(EINVAL))
		SKIP(return, "no system call can be refused: %s", strerror(errno));
	view = kvscratch_view(other);
	ASSERT_NE(NULL, view) TH_LOG("%s", kvscratch_error());
	EXPECT_EQ(7 * page_bytes(), view->mapped_bytes);
	for (size_t i = 0; i < view->mapped_bytes; i += page_bytes())
		EXPECT_TRUE(is_mapped(pagemap, (const char *)view->data + i));
	kvscratch_close(other);
	close(pagemap);
}

/* What lies behind the planes of a memfd */

/* The table of planes begins a page behind the status page. */
static uint64_t table_of(const struct kvscratch_view *view)
{
	return view_data_bytes(view) + page_bytes();
}

/* Whoever can write may put any cursor there. */
TEST_F(planes, cursors_that_cannot_be)
{
	const uint32_t far = PLANES_ROWS + 1, cursors[] = { 64, 68, 72 };

	for (size_t i = 0; i < sizeof(cursors) / sizeof(cursors[0]); i++) {
		const off_t at = table_of(self->view) + 80 * V + cursors[i];
		uint32_t before = 0;

		if (pread(kvscratch_fd(self->pad), &before, 4, at) != 4 ||
		    pwrite(kvscratch_fd(self->pad), &far, 4, at) != 4) {
			EXPECT_TRUE(kept("immutable-rows"));
			return;
		}
		EXPECT_ERROR(EPROTO, "the status page has been overwritten",
			     stage_row(self->writer, K, 0, 1));
		EXPECT_EQ(-EPROTO, kvscratch_commit(self->writer, 0));
		EXPECT_EQ(-EPROTO, kvscratch_seal(self->writer));
		ASSERT_EQ(4, pwrite(kvscratch_fd(self->pad), &before, 4, at));
	}
	EXPECT_EQ(0, stage_token(self->writer, 0, 1));
	EXPECT_FALSE(kept("immutable-rows"));
}

/* As if whoever zeroed rows had been killed at it */
TEST_F(planes, a_seal_finishes_what_a_truncate_left)
{
	const off_t owed = table_of(self->view) + page_bytes() + 92;
	const uint32_t one = 1;

	for (uint32_t row = 0; row < 2; row++)
		ASSERT_EQ(0, stage_token(self->writer, row, row));
	ASSERT_EQ(0, kvscratch_commit(self->writer, 2));
	ASSERT_EQ(0, kvscratch_truncate(self->writer, 1, 0));
	if (pwrite(kvscratch_fd(self->pad), &one, 4, owed) != 4) {
		EXPECT_TRUE(kept("immutable-rows"));
		return;
	}
	ASSERT_EQ(0, kvscratch_seal(self->writer));
	for (uint32_t plane = 0; plane < NR_PLANES; plane++) {
		EXPECT_TRUE(plane_row_is(self->view, plane, 0, 0));
		EXPECT_TRUE(all_zero(kvscratch_view_plane_row(self->view, plane, 1),
				     kvscratch_view_plane(self->view, plane)->row_bytes));
	}
}

/* Against a model */

/**
 * struct model - what a pad of four_planes should be like
 * @seeds: what is stored in each row of each plane; 0 for zeros, UINT32_MAX for whatever
 * @staged: of each plane
 * @whole: likewise
 * @len: committed rows
 * @generation: truncates
 * @epoch: roles
 */
struct model {
	uint32_t seeds[NR_PLANES][PLANES_ROWS];
	uint32_t staged[NR_PLANES];
	uint32_t whole[NR_PLANES];
	uint32_t len;
	uint32_t generation;
	uint32_t epoch;
};

#define ANYTHING UINT32_MAX

static uint32_t roll(uint32_t *state, uint32_t sides)
{
	*state = *state * 1664525 + 1013904223;
	return (*state >> 8) % sides;
}

static void model_role(struct model *model)
{
	for (int plane = 0; plane < NR_PLANES; plane++)
		model->staged[plane] = model->whole[plane] = model->len;
	model->epoch++;
}

static int model_stage(struct model *model, uint32_t plane, uint32_t row, uint32_t rows,
		       uint32_t seed, bool keep, bool bad)
{
	if (row < model->len || row > model->staged[plane])
		return -EINVAL;
	if (keep && rows > model->whole[plane] - row)
		return -EINVAL;
	if (rows > PLANES_ROWS - row)
		return -ENOSPC;
	if (keep) {
		if (model->staged[plane] < row + rows)
			model->staged[plane] = row + rows;
		return 0;
	}
	if (bad) {
		for (uint32_t i = 0; i < rows; i++)
			model->seeds[plane][row + i] = ANYTHING;
		model->staged[plane] = model->whole[plane] = row;
		return -EDOM;
	}
	for (uint32_t i = 0; i < rows; i++)
		model->seeds[plane][row + i] = seed + i;
	if (model->staged[plane] < row + rows)
		model->staged[plane] = row + rows;
	if (model->whole[plane] < row + rows)
		model->whole[plane] = row + rows;
	return 0;
}

static int model_commit(struct model *model, uint32_t len)
{
	for (int plane = 0; plane < NR_PLANES; plane++)
		if (len < model->len || len > model->staged[plane])
			return -EINVAL;
	model->len = len;
	for (int plane = 0; plane < NR_PLANES; plane++)
		model->staged[plane] = len;
	return 0;
}

static int model_append(struct model *model, uint32_t rows, uint32_t seed)
{
	if (rows > PLANES_ROWS - model->len)
		return -ENOSPC;
	for (int plane = 0; plane < NR_PLANES; plane++) {
		for (uint32_t i = 0; i < rows; i++)
			model->seeds[plane][model->len + i] = seed + i;
		model->staged[plane] = model->whole[plane] = model->len + rows;
	}
	model->len += rows;
	return 0;
}

static int model_truncate(struct model *model, uint32_t len, bool zero)
{
	if (len > model->len)
		return -EINVAL;
	model->len = len;
	model->generation++;
	for (int plane = 0; plane < NR_PLANES; plane++) {
		model->staged[plane] = len;
		if (!zero)
			continue;
		if (model->whole[plane] > len)
			model->whole[plane] = len;
		for (uint32_t row = len; row < PLANES_ROWS; row++)
			model->seeds[plane][row] = 0;
	}
	return 0;
}

static int stage_some(struct kvscratch *writer, uint32_t plane, uint32_t row, uint32_t rows,
		      uint32_t seed, bool bad)
{
	static uint8_t input[(PLANES_ROWS + 2) * 256] __attribute__((aligned(8)));
	uint32_t bytes = kvscratch_plane(writer, plane)->input_row_bytes;

	for (uint32_t i = 0; i < rows; i++)
		make_input(plane, seed + i, input + i * bytes);
	if (bad)
		memset(input + (rows - 1) * bytes, 0xff, bytes);
	return kvscratch_stage(writer, plane, row, input, rows);
}

static int append_some(struct kvscratch *writer, uint32_t rows, uint32_t seed)
{
	uint8_t tokens[(PLANES_ROWS + 2) * INPUT_BYTES];

	for (uint32_t i = 0; i < rows; i++)
		make_token(seed + i, tokens + i * INPUT_BYTES);
	return kvscratch_append_tokens(writer, tokens, rows, INPUT_BYTES);
}

static bool is_as_modelled(const struct kvscratch_view *view, const struct model *model)
{
	if (kvscratch_view_state(view) != ((uint64_t)model->generation << 32 | model->len) ||
	    kvscratch_view_epoch(view) != model->epoch)
		return false;
	for (uint32_t plane = 0; plane < NR_PLANES; plane++) {
		for (uint32_t row = 0; row < PLANES_ROWS; row++) {
			const uint32_t seed = model->seeds[plane][row];

			if (seed == ANYTHING)
				continue;
			if (seed ? !plane_row_is(view, plane, row, seed) :
				   !all_zero(kvscratch_view_plane_row(view, plane, row),
					     kvscratch_view_plane(view, plane)->row_bytes))
				return false;
		}
	}
	return true;
}

/* Whatever is done in whatever order comes out as in the model, errors included. */
TEST_F(planes, random_calls_agree_with_a_model)
{
	struct model model = { .epoch = 1 };
	uint32_t random = 20261130, done[6] = { 0 };

	for (uint32_t step = 1; step <= 6000; step++) {
		uint32_t what = roll(&random, 20), plane = roll(&random, NR_PLANES);
		uint32_t row = model.len + roll(&random, 5) - (model.len && !roll(&random, 8));
		uint32_t rows = 1 + roll(&random, 4), seed = step * 8;
		int expected, got;

		if (what < 8) {
			bool bad = plane == V && !roll(&random, 6);

			expected = model_stage(&model, plane, row, rows, seed, false, bad);
			got = stage_some(self->writer, plane, row, rows, seed, bad);
			done[0] += !got;
		} else if (what < 12) {
			expected = model_stage(&model, plane, row, rows, 0, true, false);
			got = kvscratch_keep(self->writer, plane, row, rows);
			done[1] += !got;
		} else if (what < 15) {
			expected = model_commit(&model, row);
			got = kvscratch_commit(self->writer, row);
			done[2] += !got;
		} else if (what < 17) {
			expected = model_append(&model, rows, seed);
			got = append_some(self->writer, rows, seed);
			done[3] += !got;
		} else if (what < 19) {
			bool zero = !roll(&random, 3);
			uint32_t len = roll(&random, PLANES_ROWS + 1);

			expected = model_truncate(&model, len, zero);
			got = kvscratch_truncate(self->writer, len,
						 zero ? KVSCRATCH_TRUNCATE_ZERO : 0);
			done[4] += !got;
		} else {
			struct kvscratch *next;

			model_role(&model);
			expected = 0;
			got = kvscratch_takeover(&next, self->pad);
			ASSERT_EQ(0, got);
			kvscratch_close(self->writer);
			self->writer = next;
			done[5]++;
		}
		ASSERT_EQ(expected, got) TH_LOG("step %u, kind %u: %s", step, what,
						kvscratch_error());
		ASSERT_TRUE(is_as_modelled(self->view, &model)) TH_LOG("step %u, kind %u", step,
								       what);
	}
	/* all of it happened, not only the errors */
	for (size_t i = 0; i < sizeof(done) / sizeof(done[0]); i++)
		EXPECT_LT(30, done[i]);
}

/* The same for programs of both word sizes, and for those that were compiled before */
_Static_assert(sizeof(struct kvscratch_geometry) == 24, "a struct of the library");
_Static_assert(sizeof(struct kvscratch_array) == 16, "a struct of the library");
_Static_assert(sizeof(struct kvscratch_info) == 128, "a struct of the library");
_Static_assert(offsetof(struct kvscratch_info, arrays) == 80, "a struct of the library");
_Static_assert(offsetof(struct kvscratch_info, input_dtype) == 112, "a struct of the library");
_Static_assert(sizeof(struct kvscratch_plane) == 64, "a struct of the library");
_Static_assert(sizeof(struct kvscratch_pad_info) == 184, "a struct of the library");
_Static_assert(sizeof(struct kvscratch_tensor) == 2 * sizeof(void *) + 24 ||
	       sizeof(void *) == 4, "a struct of the library");

TEST(a_pad_larger_than_the_machine)
{
	struct kvscratch *pad;
	int err = kvscratch_new(&pad, UINT32_MAX, KVSCRATCH_MAX_ROW_BYTES, U8);

	EXPECT_EQ(-EDQUOT, err);
	EXPECT_NE(NULL, strstr(kvscratch_error(), limit_of_bytes())) TH_LOG("%s", kvscratch_error());
}

TEST_HARNESS_MAIN
