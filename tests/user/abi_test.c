// SPDX-License-Identifier: GPL-2.0-only
/*
 * The binary interface: layouts, growing structs, and every errno of the table
 * in <linux/kvscratch.h> with everything else valid.
 */
#include "common.h"

#include <stddef.h>

/* The same numbers on 32 and 64 bit: both builds compile these. */
#define OFFSET(type, field, at) \
	_Static_assert(offsetof(struct type, field) == (at), #type "." #field)

_Static_assert(sizeof(struct kvscratch_create) == 32, "kvscratch_create");
OFFSET(kvscratch_create, flags, 4);
OFFSET(kvscratch_create, max_seq_len, 8);
OFFSET(kvscratch_create, dim, 16);
OFFSET(kvscratch_create, dtype, 20);
OFFSET(kvscratch_create, input_dtype, 24);
OFFSET(kvscratch_create, frac_bits, 28);
_Static_assert(sizeof(struct kvscratch_plane) == 16, "kvscratch_plane");
OFFSET(kvscratch_plane, row_bytes, 8);
_Static_assert(sizeof(struct kvscratch_info) == 128, "kvscratch_info");
OFFSET(kvscratch_info, max_seq_len, 8);
OFFSET(kvscratch_info, len, 16);
OFFSET(kvscratch_info, dim, 24);
OFFSET(kvscratch_info, dtype, 28);
OFFSET(kvscratch_info, row_bytes, 32);
OFFSET(kvscratch_info, input_row_bytes, 36);
OFFSET(kvscratch_info, generation, 40);
OFFSET(kvscratch_info, trunc_len, 48);
OFFSET(kvscratch_info, data_bytes, 56);
OFFSET(kvscratch_info, status_offset, 64);
OFFSET(kvscratch_info, nr_planes, 72);
OFFSET(kvscratch_info, planes, 80);
OFFSET(kvscratch_info, input_dtype, 112);
OFFSET(kvscratch_info, frac_bits, 116);
OFFSET(kvscratch_info, saturated, 120);
_Static_assert(sizeof(struct kvscratch_truncate) == 16, "kvscratch_truncate");
OFFSET(kvscratch_truncate, len, 8);
_Static_assert(sizeof(struct kvscratch_attach) == 16, "kvscratch_attach");
OFFSET(kvscratch_attach, src_fd, 8);
_Static_assert(sizeof(struct kvscratch_status) == 80, "kvscratch_status");
OFFSET(kvscratch_status, max_seq_len, 8);
OFFSET(kvscratch_status, dim, 16);
OFFSET(kvscratch_status, dtype, 20);
OFFSET(kvscratch_status, row_bytes, 24);
OFFSET(kvscratch_status, state, 64);
OFFSET(kvscratch_status, trunc, 72);

#define ROWS 10
#define DIM 4
#define ROW_BYTES 16

/* Handles in every condition; @bad is an address without memory behind it. */
FIXTURE(abi)
{
	int unbound;
	int unbound_reader;
	int pad;
	int reader;
	int writer;
	void *bad;
};

FIXTURE_SETUP(abi)
{
	self->unbound = device_open(O_RDWR);
	ASSERT_LE(0, self->unbound);
	self->unbound_reader = device_open(O_RDONLY);
	ASSERT_LE(0, self->unbound_reader);
	self->pad = device_open(O_RDWR);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, device_create(self->pad, ROWS, DIM, KVSCRATCH_DTYPE_F32));
	self->reader = device_open_reader(self->pad);
	ASSERT_LE(0, self->reader);
	self->writer = device_open(O_WRONLY);
	ASSERT_LE(0, self->writer);
	ASSERT_EQ(0, device_attach(self->writer, self->pad));
	self->bad = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->bad);
}

FIXTURE_TEARDOWN(abi)
{
	close(self->unbound);
	close(self->unbound_reader);
	close(self->pad);
	close(self->reader);
	close(self->writer);
	munmap(self->bad, 4096);
}

static struct kvscratch_create valid_create(void)
{
	return (struct kvscratch_create) {
		.size = sizeof(struct kvscratch_create),
		.max_seq_len = ROWS,
		.dim = DIM,
		.dtype = KVSCRATCH_DTYPE_F32,
	};
}

TEST_F(abi, create_takes_every_dtype)
{
	static const uint32_t sizes[] = { 8, 4, 2, 2, 8, 4, 2, 1, 1 };

	for (uint32_t dtype = KVSCRATCH_DTYPE_F64; dtype <= KVSCRATCH_DTYPE_U8; dtype++) {
		struct kvscratch_info info;
		int fd = device_open(O_RDWR);

		ASSERT_LE(0, fd);
		EXPECT_EQ(0, device_create(fd, 3, 5, dtype));
		EXPECT_EQ(0, device_info(fd, &info));
		EXPECT_EQ(dtype, info.dtype);
		EXPECT_EQ(5 * sizes[dtype - 1], info.row_bytes);
		EXPECT_EQ(sizes[dtype - 1], kvscratch_dtype_size(dtype));
		EXPECT_EQ(dtype, kvscratch_dtype_by_name(kvscratch_dtype_name(dtype)));
		close(fd);
	}
}

TEST_F(abi, create_einval)
{
	struct kvscratch_create create;

#define REFUSE(field, value) do { \
	create = valid_create(); \
	create.field = (value); \
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &create)); \
} while (0)

	REFUSE(flags, 1);
	REFUSE(flags, 1u << 31);
	REFUSE(max_seq_len, 0);
	REFUSE(max_seq_len, 1ull << 32);
	REFUSE(max_seq_len, 1ull << 60);
	REFUSE(max_seq_len, UINT64_MAX);
	REFUSE(dim, 0);
	REFUSE(dim, KVSCRATCH_MAX_ROW_BYTES / 4 + 1);
	REFUSE(dim, 1u << 30);
	REFUSE(dim, UINT32_MAX);
	REFUSE(dtype, 0);
	/* a row is no whole block */
	REFUSE(dtype, KVSCRATCH_DTYPE_MXINT8);
	REFUSE(dtype, KVSCRATCH_DTYPE_MXINT8 + 1);
	REFUSE(dtype, UINT32_MAX);
	REFUSE(size, 0);
	REFUSE(size, 4);
	/* the first version ends with dtype */
	REFUSE(size, offsetof(struct kvscratch_create, input_dtype) - 1);
	REFUSE(input_dtype, KVSCRATCH_DTYPE_I32);
	REFUSE(input_dtype, UINT32_MAX);
	REFUSE(frac_bits, 1);
#undef REFUSE

	/* and the handle is as good as before */
	create = valid_create();
	EXPECT_EQ(0, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &create));
}

TEST_F(abi, truncate_einval)
{
	struct kvscratch_truncate truncate = { .size = sizeof(truncate) };

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	truncate.len = 4;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.len = 1ull << 32;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.len = 2;
	truncate.flags = KVSCRATCH_TRUNCATE_ZERO << 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.flags = 0;
	truncate.size = sizeof(truncate) - 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_EQ(0, generation_of(self->pad));
}

TEST_F(abi, attach_errors)
{
	struct kvscratch_attach attach = { .size = sizeof(attach), .src_fd = self->pad };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int path = open(KVSCRATCH_DEVICE, O_PATH | O_CLOEXEC);

	ASSERT_LE(0, null);
	ASSERT_LE(0, path);
	attach.flags = 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.flags = 0;
	attach.reserved = 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.reserved = 0;
	attach.size = sizeof(attach) - 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.size = sizeof(attach);

	attach.src_fd = null;
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.src_fd = path;
	EXPECT_ERRNO(EBADF, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.src_fd = -1;
	EXPECT_ERRNO(EBADF, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	close(null);
	attach.src_fd = null;
	EXPECT_ERRNO(EBADF, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	/* itself is a source that is not bound, as is another such handle */
	attach.src_fd = self->unbound;
	EXPECT_ERRNO(EBADFD, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.src_fd = self->unbound_reader;
	EXPECT_ERRNO(EBADFD, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.src_fd = self->reader;
	EXPECT_ERRNO(EACCES, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	attach.src_fd = self->pad;
	EXPECT_EQ(0, ioctl(self->unbound, KVSCRATCH_IOC_ATTACH, &attach));
	close(path);
}

TEST_F(abi, info_einval)
{
	uint32_t words[sizeof(struct kvscratch_info) / 4];

	/* flags, reserved fields and outputs: nothing but size may be set */
	for (size_t i = 1; i < sizeof(words) / 4; i++) {
		memset(words, 0, sizeof(words));
		words[0] = sizeof(words);
		words[i] = 1;
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_INFO, words));
	}
	memset(words, 0, sizeof(words));
	words[0] = offsetof(struct kvscratch_info, input_dtype) - 1;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_INFO, words));
}

TEST_F(abi, ebadfd_everywhere)
{
	struct kvscratch_truncate truncate = { .size = sizeof(truncate) };
	struct kvscratch_info info = { .size = sizeof(info) };
	char row[ROW_BYTES] = "";

	EXPECT_ERRNO(EBADFD, ioctl(self->unbound, KVSCRATCH_IOC_INFO, &info));
	EXPECT_ERRNO(EBADFD, ioctl(self->unbound, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_ERRNO(EBADFD, read(self->unbound, row, sizeof(row)));
	EXPECT_ERRNO(EBADFD, pread(self->unbound, row, sizeof(row), 0));
	EXPECT_ERRNO(EBADFD, write(self->unbound, row, sizeof(row)));
	EXPECT_ERRNO(EBADFD, lseek(self->unbound, 0, SEEK_SET));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_READ, MAP_SHARED, self->unbound, 0));
	EXPECT_EQ(EBADFD, errno);
}

TEST_F(abi, ebusy)
{
	struct kvscratch_attach attach = { .size = sizeof(attach), .src_fd = self->pad };
	struct kvscratch_create create = valid_create();

	EXPECT_ERRNO(EBUSY, ioctl(self->pad, KVSCRATCH_IOC_CREATE, &create));
	EXPECT_ERRNO(EBUSY, ioctl(self->pad, KVSCRATCH_IOC_ATTACH, &attach));
	EXPECT_ERRNO(EBUSY, ioctl(self->reader, KVSCRATCH_IOC_ATTACH, &attach));
}

TEST_F(abi, ebadf_and_eacces_by_access_mode)
{
	struct kvscratch_truncate truncate = { .size = sizeof(truncate) };
	struct kvscratch_create create = valid_create();
	struct kvscratch_info info = { .size = sizeof(info) };
	char row[ROW_BYTES] = "";

	EXPECT_ERRNO(EBADF, write(self->reader, row, sizeof(row)));
	EXPECT_ERRNO(EBADF, read(self->writer, row, sizeof(row)));
	EXPECT_ERRNO(EACCES, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_ERRNO(EACCES, ioctl(self->unbound_reader, KVSCRATCH_IOC_CREATE, &create));
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 4096, PROT_READ, MAP_SHARED, self->writer, 0));
	EXPECT_EQ(EACCES, errno);
	/* INFO needs no rights, TRUNCATE only those to write */
	EXPECT_EQ(0, ioctl(self->writer, KVSCRATCH_IOC_INFO, &info));
	EXPECT_EQ(0, ioctl(self->writer, KVSCRATCH_IOC_TRUNCATE, &truncate));
}

TEST_F(abi, edquot)
{
	struct kvscratch_create create = valid_create();

	create.max_seq_len = KVSCRATCH_MAX_SEQ_LEN;
	create.dim = KVSCRATCH_MAX_ROW_BYTES / 4;
	EXPECT_ERRNO(EDQUOT, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &create));
}

TEST_F(abi, efault)
{
	static const unsigned int bound[] = { KVSCRATCH_IOC_INFO, KVSCRATCH_IOC_TRUNCATE };
	static const unsigned int unbound[] = { KVSCRATCH_IOC_CREATE, KVSCRATCH_IOC_ATTACH };
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint32_t *last_word;

	ASSERT_NE(MAP_FAILED, page);
	ASSERT_EQ(0, mprotect(page + 4096, 4096, PROT_NONE));
	last_word = (uint32_t *)(page + 4092);
	for (int i = 0; i < 2; i++) {
		EXPECT_ERRNO(EFAULT, ioctl(self->pad, bound[i], NULL));
		EXPECT_ERRNO(EFAULT, ioctl(self->pad, bound[i], self->bad));
		EXPECT_ERRNO(EFAULT, ioctl(self->unbound, unbound[i], NULL));
		EXPECT_ERRNO(EFAULT, ioctl(self->unbound, unbound[i], self->bad));
		/* the size can be read, the rest cannot */
		*last_word = sizeof(struct kvscratch_info);
		EXPECT_ERRNO(EFAULT, ioctl(self->pad, bound[i], last_word));
		EXPECT_ERRNO(EFAULT, ioctl(self->unbound, unbound[i], last_word));
	}
	EXPECT_ERRNO(EFAULT, write(self->pad, self->bad, ROW_BYTES));
	EXPECT_EQ(0, len_of(self->pad));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	EXPECT_ERRNO(EFAULT, read(self->pad, self->bad, ROW_BYTES));
	EXPECT_EQ(0, lseek(self->pad, 0, SEEK_CUR));

	/* INFO that cannot be returned */
	*(uint32_t *)page = sizeof(struct kvscratch_info);
	ASSERT_EQ(0, mprotect(page, 4096, PROT_READ));
	EXPECT_ERRNO(EFAULT, ioctl(self->pad, KVSCRATCH_IOC_INFO, page));
	munmap(page, 8192);
}

TEST_F(abi, enotty)
{
	struct kvscratch_info info = { .size = sizeof(info) };
	static const unsigned int unknown[] = {
		_IO(KVSCRATCH_IOC_MAGIC, 4),
		_IO(KVSCRATCH_IOC_MAGIC, 255),
		_IO(KVSCRATCH_IOC_MAGIC + 1, 1),
		_IOR(KVSCRATCH_IOC_MAGIC, 1, uint32_t),
		_IOWR(KVSCRATCH_IOC_MAGIC, 1, struct kvscratch_info),
		0,
		UINT32_MAX,
	};

	for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); i++) {
		EXPECT_ERRNO(ENOTTY, ioctl(self->pad, unknown[i], &info));
		EXPECT_ERRNO(ENOTTY, ioctl(self->unbound, unknown[i], &info));
	}
}

TEST_F(abi, espipe)
{
	char row[ROW_BYTES] = "";
	struct iovec iov = { row, sizeof(row) };

	EXPECT_ERRNO(ESPIPE, pwrite(self->pad, row, sizeof(row), 0));
	EXPECT_ERRNO(ESPIPE, pwritev(self->pad, &iov, 1, 0));
	EXPECT_EQ(0, len_of(self->pad));
}

/* A caller that knows more fields than this kernel, and one that sets them */
TEST_F(abi, structs_may_be_longer)
{
	union {
		char bytes[4097];
		uint32_t size;
		struct kvscratch_create create;
		struct kvscratch_info info;
	} arg;

	memset(&arg, 0, sizeof(arg));
	arg.size = 4097;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	arg.size = UINT32_MAX;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	arg.size = 4096;
	arg.bytes[4095] = 1;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	arg.bytes[4095] = 0;
	arg.bytes[sizeof(struct kvscratch_info)] = 1;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	arg.bytes[sizeof(struct kvscratch_info)] = 0;
	EXPECT_EQ(0, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	EXPECT_EQ(sizeof(struct kvscratch_info), arg.size);
	EXPECT_EQ(ROWS, arg.info.max_seq_len);
	EXPECT_TRUE(all_zero(arg.bytes + sizeof(struct kvscratch_info),
			     4096 - sizeof(struct kvscratch_info)));

	memset(&arg, 0, sizeof(arg));
	arg.create = valid_create();
	arg.size = sizeof(struct kvscratch_create) + 8;
	arg.bytes[sizeof(struct kvscratch_create)] = 1;
	EXPECT_ERRNO(E2BIG, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &arg));
	arg.bytes[sizeof(struct kvscratch_create)] = 0;
	EXPECT_EQ(0, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &arg));
}

/* binding, struct, rights, values, limits */
TEST_F(abi, order_of_errors)
{
	struct kvscratch_truncate truncate = { .size = 0 };
	struct kvscratch_create create = { .size = 0 };

	EXPECT_ERRNO(EBADFD, ioctl(self->unbound, KVSCRATCH_IOC_INFO, NULL));
	EXPECT_ERRNO(EBADFD, ioctl(self->unbound_reader, KVSCRATCH_IOC_TRUNCATE, NULL));
	EXPECT_ERRNO(EBUSY, ioctl(self->reader, KVSCRATCH_IOC_CREATE, NULL));
	EXPECT_ERRNO(EINVAL, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound_reader, KVSCRATCH_IOC_CREATE, &create));
	create.size = 4097;
	EXPECT_ERRNO(E2BIG, ioctl(self->unbound_reader, KVSCRATCH_IOC_CREATE, &create));
	create.size = sizeof(create);
	EXPECT_ERRNO(EACCES, ioctl(self->unbound_reader, KVSCRATCH_IOC_CREATE, &create));
	truncate.size = sizeof(truncate);
	truncate.len = ROWS + 1;
	EXPECT_ERRNO(EACCES, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	create.max_seq_len = KVSCRATCH_MAX_SEQ_LEN;
	create.dim = KVSCRATCH_MAX_ROW_BYTES;
	EXPECT_ERRNO(EINVAL, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &create));
	create.dtype = KVSCRATCH_DTYPE_U8;
	EXPECT_ERRNO(EDQUOT, ioctl(self->unbound, KVSCRATCH_IOC_CREATE, &create));
}

TEST_F(abi, info_describes_the_pad)
{
	struct kvscratch_info info;

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 7));
	ASSERT_EQ(0, device_truncate(self->pad, 5, 0));
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, device_info(self->reader, &info));
	EXPECT_EQ(sizeof(info), info.size);
	EXPECT_EQ(0, info.flags);
	EXPECT_EQ(ROWS, info.max_seq_len);
	EXPECT_EQ(6, info.len);
	EXPECT_EQ(DIM, info.dim);
	EXPECT_EQ(KVSCRATCH_DTYPE_F32, info.dtype);
	EXPECT_EQ(ROW_BYTES, info.row_bytes);
	EXPECT_EQ(ROW_BYTES, info.input_row_bytes);
	EXPECT_EQ(1, info.generation);
	EXPECT_EQ(5, info.trunc_len);
	EXPECT_EQ(ROWS * ROW_BYTES, info.data_bytes);
	EXPECT_EQ(4096, info.status_offset);
	EXPECT_EQ(1, info.nr_planes);
	EXPECT_EQ(0, info.planes[0].offset);
	EXPECT_EQ(ROW_BYTES, info.planes[0].row_bytes);
	EXPECT_TRUE(all_zero(&info.planes[1], sizeof(info.planes[1])));
}

TEST_F(abi, fdinfo)
{
	char path[64], text[1024];
	ssize_t got;
	int fd;

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	ASSERT_EQ(0, device_truncate(self->pad, 3, 0));
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", self->reader);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	got = read(fd, text, sizeof(text) - 1);
	close(fd);
	ASSERT_LT(0, got);
	text[got] = '\0';
	EXPECT_NE(NULL, strstr(text, "\npad:\tScratchpad(len=3, capacity=10, dim=4)\n"));
	EXPECT_NE(NULL, strstr(text, "\ndtype:\tf32\n"));
	EXPECT_NE(NULL, strstr(text, "\nbytes:\t12288\n"));
	EXPECT_NE(NULL, strstr(text, "\ngeneration:\t1\n"));
}

TEST_HARNESS_MAIN
