// SPDX-License-Identifier: GPL-2.0-only
/*
 * The binary interface: layouts, growing structs and arrays, and every errno of the
 * table in <linux/kvscratch.h> with everything else valid, and in its order.
 */
#include "stall.h"

#include <stddef.h>
#include <sys/resource.h>

/* The same numbers on 32 and 64 bit: both builds compile these. */
#define SIZE(type, bytes) \
	_Static_assert(sizeof(struct type) == (bytes), #type)
#define OFFSET(type, field, at) \
	_Static_assert(offsetof(struct type, field) == (at), #type "." #field)

SIZE(kvscratch_plane, 64);
OFFSET(kvscratch_plane, dim, 0);
OFFSET(kvscratch_plane, dtype, 4);
OFFSET(kvscratch_plane, input_dtype, 8);
OFFSET(kvscratch_plane, frac_bits, 12);
OFFSET(kvscratch_plane, label, 16);
OFFSET(kvscratch_plane, offset, 32);
OFFSET(kvscratch_plane, scales_offset, 40);
OFFSET(kvscratch_plane, row_bytes, 48);
OFFSET(kvscratch_plane, scales_row_bytes, 52);
OFFSET(kvscratch_plane, input_row_bytes, 56);
OFFSET(kvscratch_plane, reserved, 60);
SIZE(kvscratch_create, 96);
OFFSET(kvscratch_create, size, 0);
OFFSET(kvscratch_create, flags, 4);
OFFSET(kvscratch_create, max_seq_len, 8);
OFFSET(kvscratch_create, planes, 16);
OFFSET(kvscratch_create, nr_planes, 24);
OFFSET(kvscratch_create, plane_bytes, 28);
OFFSET(kvscratch_create, tag, 32);
SIZE(kvscratch_fork, 40);
OFFSET(kvscratch_fork, size, 0);
OFFSET(kvscratch_fork, flags, 4);
OFFSET(kvscratch_fork, source_fd, 8);
OFFSET(kvscratch_fork, reserved, 12);
OFFSET(kvscratch_fork, rows, 16);
OFFSET(kvscratch_fork, generation, 24);
OFFSET(kvscratch_fork, max_seq_len, 32);
SIZE(kvscratch_open, 16);
OFFSET(kvscratch_open, size, 0);
OFFSET(kvscratch_open, flags, 4);
OFFSET(kvscratch_open, access, 8);
OFFSET(kvscratch_open, reserved, 12);
SIZE(kvscratch_stage, 40);
OFFSET(kvscratch_stage, size, 0);
OFFSET(kvscratch_stage, flags, 4);
OFFSET(kvscratch_stage, plane, 8);
OFFSET(kvscratch_stage, reserved, 12);
OFFSET(kvscratch_stage, row, 16);
OFFSET(kvscratch_stage, rows, 24);
OFFSET(kvscratch_stage, addr, 32);
SIZE(kvscratch_commit, 16);
OFFSET(kvscratch_commit, size, 0);
OFFSET(kvscratch_commit, flags, 4);
OFFSET(kvscratch_commit, len, 8);
SIZE(kvscratch_truncate, 32);
OFFSET(kvscratch_truncate, size, 0);
OFFSET(kvscratch_truncate, flags, 4);
OFFSET(kvscratch_truncate, len, 8);
OFFSET(kvscratch_truncate, expected_generation, 16);
OFFSET(kvscratch_truncate, expected_len, 24);
SIZE(kvscratch_seal, 8);
OFFSET(kvscratch_seal, size, 0);
OFFSET(kvscratch_seal, flags, 4);
SIZE(kvscratch_seen, 24);
OFFSET(kvscratch_seen, size, 0);
OFFSET(kvscratch_seen, flags, 4);
OFFSET(kvscratch_seen, generation, 8);
OFFSET(kvscratch_seen, len, 16);
SIZE(kvscratch_pad_info, 184);
OFFSET(kvscratch_pad_info, size, 0);
OFFSET(kvscratch_pad_info, flags, 4);
OFFSET(kvscratch_pad_info, id, 8);
OFFSET(kvscratch_pad_info, max_seq_len, 16);
OFFSET(kvscratch_pad_info, len, 24);
OFFSET(kvscratch_pad_info, generation, 32);
OFFSET(kvscratch_pad_info, trunc_len, 40);
OFFSET(kvscratch_pad_info, mapping_bytes, 48);
OFFSET(kvscratch_pad_info, status_offset, 56);
OFFSET(kvscratch_pad_info, allocated_bytes, 64);
OFFSET(kvscratch_pad_info, shared_bytes, 72);
OFFSET(kvscratch_pad_info, parent_id, 80);
OFFSET(kvscratch_pad_info, parent_rows, 88);
OFFSET(kvscratch_pad_info, saturated, 96);
OFFSET(kvscratch_pad_info, epoch, 104);
OFFSET(kvscratch_pad_info, nr_planes, 108);
OFFSET(kvscratch_pad_info, row_bytes, 112);
OFFSET(kvscratch_pad_info, input_row_bytes, 116);
OFFSET(kvscratch_pad_info, tag, 120);
SIZE(kvscratch_planes, 24);
OFFSET(kvscratch_planes, size, 0);
OFFSET(kvscratch_planes, first, 4);
OFFSET(kvscratch_planes, count, 8);
OFFSET(kvscratch_planes, plane_bytes, 12);
OFFSET(kvscratch_planes, planes, 16);
SIZE(kvscratch_status, 144);
OFFSET(kvscratch_status, magic, 0);
OFFSET(kvscratch_status, version, 4);
OFFSET(kvscratch_status, max_seq_len, 8);
OFFSET(kvscratch_status, nr_planes, 16);
OFFSET(kvscratch_status, row_bytes, 20);
OFFSET(kvscratch_status, reserved, 24);
OFFSET(kvscratch_status, state, 64);
OFFSET(kvscratch_status, trunc, 72);
OFFSET(kvscratch_status, reserved_state, 80);
OFFSET(kvscratch_status, writer, 128);
OFFSET(kvscratch_status, generation, 136);

_Static_assert(KVSCRATCH_IOC_CREATE == 0xd500, "CREATE");
_Static_assert(KVSCRATCH_IOC_FORK == 0xd501, "FORK");
_Static_assert(KVSCRATCH_IOC_OPEN == 0xd502, "OPEN");
_Static_assert(KVSCRATCH_IOC_STAGE == 0xd503, "STAGE");
_Static_assert(KVSCRATCH_IOC_COMMIT == 0xd504, "COMMIT");
_Static_assert(KVSCRATCH_IOC_TRUNCATE == 0xd505, "TRUNCATE");
_Static_assert(KVSCRATCH_IOC_SEAL == 0xd506, "SEAL");
_Static_assert(KVSCRATCH_IOC_SEEN == 0xd507, "SEEN");
_Static_assert(KVSCRATCH_IOC_INFO == 0xd508, "INFO");
_Static_assert(KVSCRATCH_IOC_PLANES == 0xd509, "PLANES");

#define ROWS 10
#define DIM 4
#define ROW_BYTES 16

/*
 * Arguments
 */

union arg {
	char bytes[4104];
	uint32_t words[26];
	uint32_t size;
	struct kvscratch_create create;
	struct kvscratch_fork fork;
	struct kvscratch_open open;
	struct kvscratch_stage stage;
	struct kvscratch_commit commit;
	struct kvscratch_truncate truncate;
	struct kvscratch_seal seal;
	struct kvscratch_seen seen;
	struct kvscratch_pad_info info;
	struct kvscratch_planes planes;
};

static struct kvscratch_plane valid_plane(void)
{
	return (struct kvscratch_plane) { .dim = DIM, .dtype = KVSCRATCH_DTYPE_F32 };
}

static struct kvscratch_create valid_create(const struct kvscratch_plane *planes)
{
	return (struct kvscratch_create) {
		.size = sizeof(struct kvscratch_create),
		.max_seq_len = ROWS,
		.planes = (uintptr_t)planes,
		.nr_planes = 1,
		.plane_bytes = sizeof(*planes),
	};
}

static char row[ROW_BYTES];

/* What a valid FORK is of: the pad of the fixture, in its first generation */
static int forked_pad;

/* An argument with which each call does something, and what comes of it does no harm */
static union arg valid_arg(unsigned int cmd)
{
	static struct kvscratch_plane plane;
	union arg arg;

	memset(&arg, 0, sizeof(arg));
	switch (cmd) {
	case KVSCRATCH_IOC_CREATE:
		plane = valid_plane();
		arg.create = valid_create(&plane);
		break;
	case KVSCRATCH_IOC_FORK:
		arg.fork = (struct kvscratch_fork) {
			.size = sizeof(arg.fork),
			.source_fd = forked_pad,
			.max_seq_len = ROWS,
		};
		break;
	case KVSCRATCH_IOC_OPEN:
		arg.open = (struct kvscratch_open) {
			.size = sizeof(arg.open),
			.access = KVSCRATCH_ACCESS_WRITE,
		};
		break;
	case KVSCRATCH_IOC_STAGE:
		arg.stage = (struct kvscratch_stage) {
			.size = sizeof(arg.stage),
			.rows = 1,
			.addr = (uintptr_t)row,
		};
		break;
	case KVSCRATCH_IOC_COMMIT:
		arg.size = sizeof(arg.commit);
		break;
	case KVSCRATCH_IOC_TRUNCATE:
		arg.size = sizeof(arg.truncate);
		break;
	case KVSCRATCH_IOC_SEAL:
		arg.size = sizeof(arg.seal);
		break;
	case KVSCRATCH_IOC_SEEN:
		arg.size = sizeof(arg.seen);
		break;
	case KVSCRATCH_IOC_INFO:
		arg.size = sizeof(arg.info);
		break;
	case KVSCRATCH_IOC_PLANES:
		arg.planes = (struct kvscratch_planes) {
			.size = sizeof(arg.planes),
			.plane_bytes = sizeof(struct kvscratch_plane),
		};
		break;
	}
	return arg;
}

static const unsigned int pad_calls[] = {
	KVSCRATCH_IOC_OPEN, KVSCRATCH_IOC_STAGE, KVSCRATCH_IOC_COMMIT, KVSCRATCH_IOC_TRUNCATE,
	KVSCRATCH_IOC_SEAL, KVSCRATCH_IOC_SEEN, KVSCRATCH_IOC_INFO, KVSCRATCH_IOC_PLANES,
};

/* The call with a valid argument; a descriptor that comes of it is closed. 0 or -errno */
static int valid_call(int fd, unsigned int cmd)
{
	union arg arg = valid_arg(cmd);
	int ret = ioctl(fd, cmd, &arg);

	if (ret < 0)
		return -errno;
	if (cmd == KVSCRATCH_IOC_CREATE || cmd == KVSCRATCH_IOC_FORK || cmd == KVSCRATCH_IOC_OPEN)
		close(ret);
	else if (ret)
		return -EPROTO;
	return 0;
}

/* 0 or -errno of a CREATE whose pad is gone at once */
static int try_create(int node, const struct kvscratch_create *create)
{
	int fd = ioctl(node, KVSCRATCH_IOC_CREATE, create);

	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

/* Handles of every kind; @bad is an address without memory behind it. */
FIXTURE(abi)
{
	int node;
	int read_node;
	int pad;
	int reader;
	int appender;
	void *bad;
};

FIXTURE_SETUP(abi)
{
	self->node = device_open(O_RDWR);
	ASSERT_LE(0, self->node);
	self->read_node = device_open(O_RDONLY);
	ASSERT_LE(0, self->read_node);
	self->pad = device_create(ROWS, DIM, KVSCRATCH_DTYPE_F32);
	ASSERT_LE(0, self->pad);
	forked_pad = self->pad;
	self->reader = device_open_reader(self->pad);
	ASSERT_LE(0, self->reader);
	self->appender = device_reopen(self->pad, O_WRONLY);
	ASSERT_LE(0, self->appender);
	self->bad = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->bad);
}

FIXTURE_TEARDOWN(abi)
{
	close(self->node);
	close(self->read_node);
	close(self->pad);
	close(self->reader);
	close(self->appender);
	munmap(self->bad, 4096);
}

/*
 * What the calls take
 */

TEST_F(abi, valid_arguments_are_valid)
{
	int writer = device_open_writer(self->pad, 0);

	ASSERT_LE(0, writer);
	EXPECT_EQ(0, valid_call(self->node, KVSCRATCH_IOC_CREATE));
	EXPECT_EQ(0, valid_call(self->node, KVSCRATCH_IOC_FORK));
	for (size_t i = 0; i < ARRAY_SIZE(pad_calls); i++) {
		EXPECT_EQ(0, valid_call(writer, pad_calls[i]))
			TH_LOG("call %u", _IOC_NR(pad_calls[i]));
	}
	close(writer);
}

TEST_F(abi, create_takes_every_dtype)
{
	static const uint32_t sizes[] = { 8, 4, 2, 2, 8, 4, 2, 1, 1 };

	for (uint32_t dtype = KVSCRATCH_DTYPE_F64; dtype <= KVSCRATCH_DTYPE_U8; dtype++) {
		struct kvscratch_info info;
		int fd = device_create(3, 5, dtype);

		ASSERT_LE(0, fd);
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
	struct kvscratch_plane plane;

#define REFUSE(field, value) do { \
	plane = valid_plane(); \
	create = valid_create(&plane); \
	field = (value); \
	EXPECT_EQ(-EINVAL, try_create(self->node, &create)); \
} while (0)

	REFUSE(create.size, 0);
	REFUSE(create.size, 4);
	REFUSE(create.size, sizeof(create) - 1);
	REFUSE(create.flags, 1);
	REFUSE(create.flags, 1u << 31);
	REFUSE(create.max_seq_len, 0);
	REFUSE(create.max_seq_len, 1ull << 32);
	REFUSE(create.max_seq_len, 1ull << 60);
	REFUSE(create.max_seq_len, UINT64_MAX);
	REFUSE(create.nr_planes, 0);
	REFUSE(create.nr_planes, KVSCRATCH_MAX_PLANES + 1);
	REFUSE(create.nr_planes, UINT32_MAX);
	REFUSE(create.plane_bytes, 0);
	REFUSE(create.plane_bytes, 56);
	REFUSE(create.plane_bytes, 63);
	REFUSE(create.plane_bytes, 65);
	REFUSE(create.plane_bytes, 68);
	REFUSE(plane.dim, 0);
	REFUSE(plane.dim, KVSCRATCH_MAX_ROW_BYTES / 4 + 1);
	REFUSE(plane.dim, 1u << 30);
	REFUSE(plane.dim, UINT32_MAX);
	REFUSE(plane.dtype, 0);
	/* a row is no whole block */
	REFUSE(plane.dtype, KVSCRATCH_DTYPE_MXINT8);
	REFUSE(plane.dtype, KVSCRATCH_DTYPE_MXINT8 + 1);
	REFUSE(plane.dtype, UINT32_MAX);
	REFUSE(plane.input_dtype, KVSCRATCH_DTYPE_I32);
	REFUSE(plane.input_dtype, UINT32_MAX);
	REFUSE(plane.frac_bits, 1);
	REFUSE(plane.offset, 1);
	REFUSE(plane.offset, 1ull << 63);
	REFUSE(plane.scales_offset, 1);
	REFUSE(plane.row_bytes, ROW_BYTES);
	REFUSE(plane.scales_row_bytes, 1);
	REFUSE(plane.input_row_bytes, ROW_BYTES);
	REFUSE(plane.reserved, 1);
#undef REFUSE

	/* a label needs its NUL, and room for that is all it needs */
	plane = valid_plane();
	create = valid_create(&plane);
	memset(plane.label, 'x', sizeof(plane.label));
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
	plane.label[sizeof(plane.label) - 1] = '\0';
	EXPECT_EQ(0, try_create(self->node, &create));
}

TEST_F(abi, planes_are_looked_at_to_the_last)
{
	static struct kvscratch_plane planes[KVSCRATCH_MAX_PLANES];
	struct kvscratch_create create = valid_create(planes);
	struct kvscratch_pad_info info;
	int fd;

	for (size_t i = 0; i < ARRAY_SIZE(planes); i++)
		planes[i] = valid_plane();
	create.nr_planes = KVSCRATCH_MAX_PLANES;
	fd = ioctl(self->node, KVSCRATCH_IOC_CREATE, &create);
	ASSERT_LE(0, fd);
	EXPECT_EQ(0, device_pad_info(fd, &info));
	EXPECT_EQ(KVSCRATCH_MAX_PLANES, info.nr_planes);
	EXPECT_EQ(KVSCRATCH_MAX_PLANES * ROW_BYTES, info.row_bytes);
	close(fd);
	planes[KVSCRATCH_MAX_PLANES - 1].reserved = 1;
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
	planes[KVSCRATCH_MAX_PLANES - 1] = valid_plane();
	planes[KVSCRATCH_MAX_PLANES - 1].dim = 0;
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
}

/* The bound of a row is one of tokens, stored or appended. */
TEST_F(abi, tokens_have_a_bound)
{
	const uint32_t half = KVSCRATCH_MAX_ROW_BYTES / 2;
	struct kvscratch_plane planes[2] = {
		{ .dim = half, .dtype = KVSCRATCH_DTYPE_U8 },
		{ .dim = half, .dtype = KVSCRATCH_DTYPE_U8 },
	};
	struct kvscratch_create create = valid_create(planes);

	create.max_seq_len = 1;
	create.nr_planes = 2;
	EXPECT_EQ(0, try_create(self->node, &create));
	planes[1].dim++;
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
	/* four bytes of input for one that is stored */
	planes[0] = planes[1] = (struct kvscratch_plane) {
		.dim = half / 4,
		.dtype = KVSCRATCH_DTYPE_I8,
		.input_dtype = KVSCRATCH_DTYPE_F32,
	};
	EXPECT_EQ(0, try_create(self->node, &create));
	planes[0].dim++;
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
}

TEST_F(abi, open_einval)
{
	static const struct kvscratch_open cases[] = {
		{ .size = 0, .access = KVSCRATCH_ACCESS_READ },
		{ .size = 15, .access = KVSCRATCH_ACCESS_READ },
		{ .size = 16 },
		{ .size = 16, .access = 4 },
		{ .size = 16, .access = KVSCRATCH_ACCESS_READ | 4 },
		{ .size = 16, .access = 1u << 31 },
		{ .size = 16, .access = KVSCRATCH_ACCESS_READ, .reserved = 1 },
		{ .size = 16, .access = KVSCRATCH_ACCESS_WRITE, .flags = 4 },
		{ .size = 16, .access = KVSCRATCH_ACCESS_WRITE, .flags = 1u << 31 },
		{ .size = 16, .access = KVSCRATCH_ACCESS_WRITE, .flags = KVSCRATCH_OPEN_TAKEOVER },
		{ .size = 16, .access = KVSCRATCH_ACCESS_READ, .flags = KVSCRATCH_OPEN_WRITER },
		{ .size = 16, .access = KVSCRATCH_ACCESS_READ | KVSCRATCH_ACCESS_WRITE,
		  .flags = KVSCRATCH_OPEN_WRITER },
		{ .size = 16, .access = KVSCRATCH_ACCESS_READ | KVSCRATCH_ACCESS_WRITE,
		  .flags = KVSCRATCH_OPEN_WRITER | KVSCRATCH_OPEN_TAKEOVER },
	};
	struct kvscratch_pad_info info;

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvscratch_open open = cases[i];

		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_OPEN, &open));
	}
	ASSERT_EQ(0, device_pad_info(self->pad, &info));
	EXPECT_EQ(0, info.epoch);
	EXPECT_EQ(0, info.flags);
}

TEST_F(abi, stage_and_commit_einval)
{
	int writer = device_open_writer(self->pad, 0);
	struct kvscratch_stage stage;
	struct kvscratch_commit commit = { .size = sizeof(commit) };

#define REFUSE(field, value) do { \
	stage = valid_arg(KVSCRATCH_IOC_STAGE).stage; \
	stage.row = 2; \
	stage.field = (value); \
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_STAGE, &stage)); \
} while (0)

	ASSERT_LE(0, writer);
	ASSERT_EQ(0, append_rows(writer, ROW_BYTES, 0, 2));
	REFUSE(size, 39);
	REFUSE(flags, 2);
	REFUSE(flags, 1u << 31);
	/* KEEP has no source */
	REFUSE(flags, KVSCRATCH_STAGE_KEEP);
	REFUSE(plane, 1);
	REFUSE(plane, UINT32_MAX);
	REFUSE(reserved, 1);
	/* committed, and with a gap */
	REFUSE(row, 1);
	REFUSE(row, 3);
	REFUSE(row, UINT64_MAX);
#undef REFUSE

	commit.len = 1;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_COMMIT, &commit));
	commit.len = 3;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_COMMIT, &commit));
	commit.len = UINT64_MAX;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_COMMIT, &commit));
	commit.len = 2;
	commit.flags = 1;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_COMMIT, &commit));
	commit.flags = 0;
	commit.size = 15;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_COMMIT, &commit));
	EXPECT_EQ(2, len_of(self->pad));
	close(writer);
}

TEST_F(abi, truncate_einval)
{
	static const struct kvscratch_truncate cases[] = {
		{ .size = 31 },
		{ .size = 32, .len = 4 },
		{ .size = 32, .len = 1ull << 32 },
		{ .size = 32, .len = 2, .flags = 4 },
		{ .size = 32, .len = 2, .flags = 1u << 31 },
		{ .size = 32, .len = 2, .expected_generation = 1 },
		{ .size = 32, .len = 2, .expected_len = 3 },
		{ .size = 32, .len = 2, .expected_len = 1ull << 32 },
		/* as expected, and still too many rows */
		{ .size = 32, .len = 4, .flags = KVSCRATCH_TRUNCATE_EXPECT, .expected_len = 3 },
	};

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvscratch_truncate truncate = cases[i];

		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	}
	EXPECT_EQ(3, len_of(self->pad));
	EXPECT_EQ(0, generation_of(self->pad));
}

TEST_F(abi, seal_seen_and_planes_einval)
{
	struct kvscratch_seal seal = { .size = sizeof(seal), .flags = 1 };
	struct kvscratch_seen seen = { .size = sizeof(seen), .flags = 1 };
	struct kvscratch_planes planes = valid_arg(KVSCRATCH_IOC_PLANES).planes;
	struct kvscratch_pad_info info = { .size = sizeof(info) - 1 };

	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEAL, &seal));
	seal = (struct kvscratch_seal) { .size = 7 };
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEAL, &seal));
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEEN, &seen));
	seen = (struct kvscratch_seen) { .size = sizeof(seen), .len = ROWS + 1 };
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEEN, &seen));
	seen.len = 1ull << 32;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEEN, &seen));
	seen = (struct kvscratch_seen) { .size = 23 };
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_SEEN, &seen));
	planes.first = 2;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	planes.first = 0;
	planes.size = 23;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	planes.size = 24;
	planes.plane_bytes = 63;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	planes.plane_bytes = 68;
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_INFO, &info));
	EXPECT_EQ(0, len_of(self->pad));
	ASSERT_EQ(0, device_pad_info(self->pad, &info));
	EXPECT_EQ(0, info.flags);
}

/*
 * Structs and arrays that are longer
 */

/* A caller that knows more fields than this kernel, and one that sets them */
TEST_F(abi, inputs_may_be_longer)
{
	static const unsigned int calls[] = {
		KVSCRATCH_IOC_OPEN, KVSCRATCH_IOC_STAGE, KVSCRATCH_IOC_COMMIT,
		KVSCRATCH_IOC_TRUNCATE, KVSCRATCH_IOC_SEEN, KVSCRATCH_IOC_CREATE, KVSCRATCH_IOC_FORK,
		/* last, for what it does lasts */
		KVSCRATCH_IOC_SEAL,
	};
	int writer = device_open_writer(self->pad, 0);

	ASSERT_LE(0, writer);
	for (size_t i = 0; i < ARRAY_SIZE(calls); i++) {
		union arg arg = valid_arg(calls[i]);
		const uint32_t known = arg.size;
		bool makes_a_pad = calls[i] == KVSCRATCH_IOC_CREATE ||
				   calls[i] == KVSCRATCH_IOC_FORK;
		int fd = makes_a_pad ? self->node : writer;
		int ret;

		arg.size = known + 8;
		arg.bytes[known] = 1;
		EXPECT_ERRNO(E2BIG, ioctl(fd, calls[i], &arg));
		arg.bytes[known] = 0;
		arg.size = 4096;
		arg.bytes[4095] = 1;
		EXPECT_ERRNO(E2BIG, ioctl(fd, calls[i], &arg));
		arg.bytes[4095] = 0;
		arg.size = 4097;
		EXPECT_ERRNO(E2BIG, ioctl(fd, calls[i], &arg));
		arg.size = UINT32_MAX;
		EXPECT_ERRNO(E2BIG, ioctl(fd, calls[i], &arg));
		/* nothing of which can have had an effect */
		EXPECT_EQ(0, len_of(self->pad) + generation_of(self->pad));
		arg.size = 4096;
		ret = ioctl(fd, calls[i], &arg);
		EXPECT_LE(0, ret)
			TH_LOG("call %u", _IOC_NR(calls[i]));
		if (calls[i] == KVSCRATCH_IOC_OPEN || makes_a_pad)
			close(ret);
		if (calls[i] == KVSCRATCH_IOC_TRUNCATE) {
			close(writer);
			close(self->pad);
			self->pad = device_create(ROWS, DIM, KVSCRATCH_DTYPE_F32);
			ASSERT_LE(0, self->pad);
			forked_pad = self->pad;
			writer = device_open_writer(self->pad, 0);
			ASSERT_LE(0, writer);
		}
	}
	close(writer);
}

TEST_F(abi, arrays_of_create_may_be_longer)
{
	struct {
		struct kvscratch_plane plane;
		char tail[4096];
	} *planes = calloc(3, sizeof(*planes));
	uint32_t sizes[] = { 64, 72, 128, 4088, 4096 };

	ASSERT_NE(NULL, planes);
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		struct kvscratch_create create = valid_create(&planes->plane);
		char *last = (char *)planes + 2 * sizes[i];

		memset(planes, 0, 3 * sizeof(*planes));
		create.nr_planes = 3;
		create.plane_bytes = sizes[i];
		for (size_t j = 0; j < 3; j++)
			memcpy((char *)planes + j * sizes[i], &(struct kvscratch_plane) {
				.dim = j + 1, .dtype = KVSCRATCH_DTYPE_U8,
			}, sizeof(planes->plane));
		EXPECT_EQ(0, try_create(self->node, &create));
		if (sizes[i] == sizeof(struct kvscratch_plane))
			continue;
		/* each byte of what is behind the last one of them */
		last[sizeof(struct kvscratch_plane)] = 1;
		EXPECT_EQ(-E2BIG, try_create(self->node, &create));
		last[sizeof(struct kvscratch_plane)] = 0;
		last[sizes[i] - 1] = 1;
		EXPECT_EQ(-E2BIG, try_create(self->node, &create));
		/* and not a byte more */
		last[sizes[i] - 1] = 0;
		last[sizes[i]] = 1;
		EXPECT_EQ(0, try_create(self->node, &create));
		create.plane_bytes = 4104;
		EXPECT_EQ(-E2BIG, try_create(self->node, &create));
		create.plane_bytes = UINT32_MAX - 7;
		EXPECT_EQ(-E2BIG, try_create(self->node, &create));
	}
	free(planes);
}

/* What stands in an output does not matter, and nothing of it stays. */
TEST_F(abi, info_is_output_only)
{
	static const uint32_t sizes[] = { 184, 185, 192, 4095, 4096 };
	struct kvscratch_pad_info expected;

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 7));
	ASSERT_EQ(0, device_truncate(self->pad, 5, 0));
	memset(&expected, 0, sizeof(expected));
	ASSERT_EQ(0, device_pad_info(self->pad, &expected));
	EXPECT_EQ(5, expected.len);
	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		union arg arg;

		memset(&arg, 0xa5, sizeof(arg));
		arg.size = sizes[i];
		EXPECT_EQ(0, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
		EXPECT_EQ(0, memcmp(&expected, &arg, sizeof(expected)));
		EXPECT_EQ(sizeof(expected), arg.size);
		EXPECT_TRUE(all_zero(arg.bytes + sizeof(expected), sizes[i] - sizeof(expected)));
		EXPECT_EQ((char)0xa5, arg.bytes[sizes[i]]);
		/* its own answer is as good a question */
		EXPECT_EQ(0, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
		EXPECT_EQ(0, memcmp(&expected, &arg, sizeof(expected)));
	}
}

TEST_F(abi, info_size_has_bounds)
{
	union arg arg;

	memset(&arg, 0, sizeof(arg));
	for (uint32_t size = 0; size < sizeof(arg.info); size++) {
		arg.size = size;
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	}
	arg.size = 4097;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	arg.size = UINT32_MAX;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_INFO, &arg));
	EXPECT_TRUE(all_zero(arg.bytes + 4, sizeof(arg) - 4));
}

/* Any part of them, into elements of any size */
TEST_F(abi, planes_are_output_only)
{
	static const uint32_t sizes[] = { 64, 72, 256, 4096 };
	struct kvscratch_plane created[5] = {
		{ .dim = 2, .dtype = KVSCRATCH_DTYPE_F32, .label = "k0" },
		{ .dim = 64, .dtype = KVSCRATCH_DTYPE_MXINT8, .label = "abcdefghijklmno" },
		{ .dim = 8, .dtype = KVSCRATCH_DTYPE_I16, .input_dtype = KVSCRATCH_DTYPE_F64,
		  .frac_bits = 3 },
		{ .dim = 1, .dtype = KVSCRATCH_DTYPE_I32, .label = "tokens" },
		{ .dim = 7, .dtype = KVSCRATCH_DTYPE_BF16 },
	};
	int pad = device_create_planes(100, created, 5);
	struct kvscratch_plane all[5];
	char *room = malloc(8 * 4096);

	ASSERT_LE(0, pad);
	ASSERT_NE(NULL, room);
	ASSERT_EQ(5, device_planes(pad, 0, all, 5));
	for (uint32_t i = 0; i < 5; i++) {
		EXPECT_EQ(created[i].dim, all[i].dim);
		EXPECT_EQ(created[i].dtype, all[i].dtype);
		EXPECT_EQ(i == 2 ? KVSCRATCH_DTYPE_F64 : created[i].dtype, all[i].input_dtype);
		EXPECT_EQ(created[i].frac_bits, all[i].frac_bits);
		EXPECT_EQ(0, memcmp(created[i].label, all[i].label, sizeof(all[i].label)));
		EXPECT_EQ(0, all[i].offset % page_bytes());
		EXPECT_EQ(0, all[i].reserved);
		EXPECT_EQ(i == 1 ? 2 : 0, all[i].scales_row_bytes);
	}
	EXPECT_EQ(8, all[0].row_bytes);
	EXPECT_EQ(64, all[1].row_bytes);
	EXPECT_EQ(66, all[1].input_row_bytes);
	EXPECT_EQ(16, all[2].row_bytes);
	EXPECT_EQ(64, all[2].input_row_bytes);

	for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
		for (uint32_t first = 0; first <= 5; first++) {
			for (uint32_t count = 0; count <= 7; count++) {
				uint32_t there = count < 5 - first ? count : 5 - first;
				union arg arg;

				memset(&arg, 0xa5, sizeof(arg));
				memset(room, 0xa5, 8 * 4096);
				arg.planes = (struct kvscratch_planes) {
					.size = sizeof(arg.planes) + first,
					.first = first,
					.count = count,
					.plane_bytes = sizes[i],
					.planes = (uintptr_t)room,
				};
				EXPECT_EQ(0, ioctl(pad, KVSCRATCH_IOC_PLANES, &arg));
				EXPECT_EQ(sizeof(arg.planes), arg.size);
				EXPECT_EQ(there, arg.planes.count);
				EXPECT_EQ(first, arg.planes.first);
				EXPECT_EQ((uintptr_t)room, arg.planes.planes);
				EXPECT_TRUE(all_zero(arg.bytes + sizeof(arg.planes), first));
				EXPECT_EQ((char)0xa5, arg.bytes[sizeof(arg.planes) + first]);
				for (uint32_t j = 0; j < there; j++) {
					EXPECT_EQ(0, memcmp(room + j * sizes[i], &all[first + j],
							    sizeof(all[0])));
					EXPECT_TRUE(all_zero(room + j * sizes[i] + sizeof(all[0]),
							     sizes[i] - sizeof(all[0])));
				}
				EXPECT_EQ((char)0xa5, room[there * sizes[i]]);
			}
		}
	}
	free(room);
	close(pad);
}

TEST_F(abi, planes_e2big)
{
	struct kvscratch_planes planes = valid_arg(KVSCRATCH_IOC_PLANES).planes;

	planes.plane_bytes = 4104;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	planes.plane_bytes = UINT32_MAX - 7;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
	planes.plane_bytes = 64;
	planes.size = 4097;
	EXPECT_ERRNO(E2BIG, ioctl(self->pad, KVSCRATCH_IOC_PLANES, &planes));
}

/*
 * Each errno with all else valid
 */

TEST_F(abi, enotty)
{
	static const unsigned int unknown[] = {
		_IO(KVSCRATCH_IOC_MAGIC, 10),
		_IO(KVSCRATCH_IOC_MAGIC, 255),
		_IO(KVSCRATCH_IOC_MAGIC + 1, 8),
		_IOR(KVSCRATCH_IOC_MAGIC, 8, uint32_t),
		_IOWR(KVSCRATCH_IOC_MAGIC, 8, struct kvscratch_pad_info),
		KVSCRATCH_IOC_INFO | 1u << 31,
		0,
		UINT32_MAX,
	};
	union arg arg = valid_arg(KVSCRATCH_IOC_INFO);

	for (size_t i = 0; i < ARRAY_SIZE(unknown); i++) {
		EXPECT_ERRNO(ENOTTY, ioctl(self->pad, unknown[i], &arg));
		EXPECT_ERRNO(ENOTTY, ioctl(self->node, unknown[i], &arg));
	}
	/* the wrong kind of handle, whatever the argument */
	for (size_t i = 0; i < ARRAY_SIZE(pad_calls); i++) {
		EXPECT_EQ(-ENOTTY, valid_call(self->node, pad_calls[i]))
			TH_LOG("call %u", _IOC_NR(pad_calls[i]));
		EXPECT_ERRNO(ENOTTY, ioctl(self->read_node, pad_calls[i], NULL));
	}
	EXPECT_EQ(-ENOTTY, valid_call(self->pad, KVSCRATCH_IOC_CREATE));
	EXPECT_ERRNO(ENOTTY, ioctl(self->reader, KVSCRATCH_IOC_CREATE, NULL));
	EXPECT_EQ(-ENOTTY, valid_call(self->pad, KVSCRATCH_IOC_FORK));
	EXPECT_ERRNO(ENOTTY, ioctl(self->reader, KVSCRATCH_IOC_FORK, NULL));
}

TEST_F(abi, a_node_handle_is_no_pad)
{
	char bytes[ROW_BYTES];

	EXPECT_ERRNO(EINVAL, read(self->node, bytes, sizeof(bytes)));
	EXPECT_ERRNO(EINVAL, write(self->node, bytes, sizeof(bytes)));
	EXPECT_ERRNO(ENODEV, mmap(NULL, 4096, PROT_READ, MAP_SHARED, self->node, 0));
}

TEST_F(abi, ebadf_and_eacces_by_access_mode)
{
	EXPECT_ERRNO(EBADF, write(self->reader, row, sizeof(row)));
	EXPECT_ERRNO(EBADF, read(self->appender, row, sizeof(row)));
	EXPECT_ERRNO(EBADF, pread(self->appender, row, sizeof(row), 0));
	EXPECT_ERRNO(EACCES, mmap(NULL, 4096, PROT_READ, MAP_SHARED, self->appender, 0));
	EXPECT_EQ(-EACCES, valid_call(self->read_node, KVSCRATCH_IOC_CREATE));
	EXPECT_EQ(-EACCES, valid_call(self->read_node, KVSCRATCH_IOC_FORK));
	EXPECT_EQ(-EACCES, device_fork_on(self->node, self->reader, 0, 0, ROWS));
	EXPECT_EQ(-EBADF, device_fork_on(self->node, self->node, 0, 0, ROWS));
	EXPECT_EQ(-EBADF, device_fork_on(self->node, -1, 0, 0, ROWS));
	EXPECT_EQ(-EACCES, valid_call(self->reader, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(-EACCES, valid_call(self->reader, KVSCRATCH_IOC_SEAL));
	EXPECT_EQ(-EACCES, valid_call(self->reader, KVSCRATCH_IOC_OPEN));
	EXPECT_EQ(-EACCES, device_reopen(self->reader, O_RDWR));
	EXPECT_EQ(-EACCES, device_open_writer(self->reader, 0));
	EXPECT_EQ(-EACCES, device_open_writer(self->reader, KVSCRATCH_OPEN_TAKEOVER));
	EXPECT_EQ(-EACCES, device_reopen(self->appender, O_RDONLY));
	/* these need no rights */
	EXPECT_EQ(0, valid_call(self->appender, KVSCRATCH_IOC_INFO));
	EXPECT_EQ(0, valid_call(self->appender, KVSCRATCH_IOC_PLANES));
	EXPECT_EQ(0, valid_call(self->appender, KVSCRATCH_IOC_SEEN));
	EXPECT_EQ(0, valid_call(self->reader, KVSCRATCH_IOC_SEEN));
	/* those of one who writes */
	EXPECT_EQ(0, valid_call(self->appender, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(0, valid_call(self->appender, KVSCRATCH_IOC_SEAL));
}

TEST_F(abi, enolck_ebusy_and_estale)
{
	int writer = device_open_writer(self->pad, 0);
	int heir;

	ASSERT_LE(0, writer);
	EXPECT_EQ(-ENOLCK, valid_call(self->pad, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-ENOLCK, valid_call(self->pad, KVSCRATCH_IOC_COMMIT));
	EXPECT_EQ(-ENOLCK, valid_call(self->reader, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-ENOLCK, valid_call(self->reader, KVSCRATCH_IOC_COMMIT));
	EXPECT_ERRNO(EBUSY, write(self->pad, row, sizeof(row)));
	EXPECT_EQ(-EBUSY, valid_call(self->pad, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(-EBUSY, valid_call(self->pad, KVSCRATCH_IOC_SEAL));
	EXPECT_EQ(-EBUSY, device_open_writer(self->pad, 0));
	/* nor may the writer itself have a second one */
	EXPECT_EQ(-EBUSY, device_open_writer(writer, 0));

	heir = device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER);
	ASSERT_LE(0, heir);
	EXPECT_ERRNO(ESTALE, write(writer, row, sizeof(row)));
	EXPECT_EQ(-ESTALE, valid_call(writer, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-ESTALE, valid_call(writer, KVSCRATCH_IOC_COMMIT));
	EXPECT_EQ(-ESTALE, valid_call(writer, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(-ESTALE, valid_call(writer, KVSCRATCH_IOC_SEAL));
	close(heir);
	/* for ever */
	EXPECT_ERRNO(ESTALE, write(writer, row, sizeof(row)));
	EXPECT_EQ(-ENOLCK, valid_call(self->pad, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(0, len_of(self->pad) + generation_of(self->pad));
	close(writer);
}

TEST_F(abi, erofs)
{
	int writer = device_open_writer(self->pad, 0);

	ASSERT_LE(0, writer);
	ASSERT_EQ(0, append_rows(writer, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, device_seal(writer));
	EXPECT_ERRNO(EROFS, write(writer, row, sizeof(row)));
	EXPECT_EQ(-EROFS, valid_call(writer, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-EROFS, valid_call(writer, KVSCRATCH_IOC_COMMIT));
	EXPECT_EQ(-EROFS, valid_call(writer, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(-EROFS, device_open_writer(self->pad, 0));
	EXPECT_EQ(-EROFS, device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER));
	EXPECT_ERRNO(EROFS, write(self->pad, row, sizeof(row)));
	EXPECT_EQ(-EROFS, valid_call(self->pad, KVSCRATCH_IOC_TRUNCATE));
	/* once more is nothing, whoever it is */
	EXPECT_EQ(0, device_seal(self->pad));
	EXPECT_EQ(0, device_seal(writer));
	EXPECT_EQ(0, valid_call(self->pad, KVSCRATCH_IOC_OPEN));
	EXPECT_EQ(1, len_of(self->pad));
	EXPECT_EQ(0, generation_of(self->pad));
	close(writer);
}

TEST_F(abi, ecanceled)
{
	struct kvscratch_truncate truncate = {
		.size = sizeof(truncate),
		.flags = KVSCRATCH_TRUNCATE_EXPECT | KVSCRATCH_TRUNCATE_ZERO,
		.len = 1,
		.expected_generation = 1,
		.expected_len = 2,
	};
	uint8_t bytes[2 * ROW_BYTES];

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	ASSERT_EQ(0, device_truncate(self->pad, 2, 0));
	truncate.expected_generation = 0;
	EXPECT_ERRNO(ECANCELED, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	/* all 64 bits of both count */
	truncate.expected_generation = 1 | 1ull << 32;
	EXPECT_ERRNO(ECANCELED, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.expected_generation = 1;
	truncate.expected_len = 3;
	EXPECT_ERRNO(ECANCELED, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.expected_len = 2 | 1ull << 32;
	EXPECT_ERRNO(ECANCELED, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_EQ(2, len_of(self->pad));
	EXPECT_EQ(1, generation_of(self->pad));
	EXPECT_EQ(2 * ROW_BYTES, pread(self->pad, bytes, sizeof(bytes), 0));
	EXPECT_TRUE(row_is(bytes + ROW_BYTES, ROW_BYTES, 1));
	truncate.expected_len = 2;
	EXPECT_EQ(0, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_EQ(1, len_of(self->pad));
	EXPECT_EQ(2, generation_of(self->pad));

	EXPECT_EQ(-ECANCELED, device_fork_on(self->node, self->pad, 1, 1, ROWS));
	EXPECT_EQ(-ECANCELED, device_fork_on(self->node, self->pad, 1, 2 | 1ull << 32, ROWS));
}

TEST_F(abi, etxtbsy)
{
	int pad = new_pad(ROWS, 4096), forked;

	ASSERT_LE(0, pad);
	ASSERT_EQ(0, append_rows(pad, 4096, 0, 2));
	forked = device_fork_on(self->node, pad, 2, 0, ROWS);
	ASSERT_LE(0, forked);
	EXPECT_EQ(-ETXTBSY, device_truncate(pad, 1, 0));
	EXPECT_EQ(-ETXTBSY, device_truncate(forked, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(2, len_of(pad));
	EXPECT_EQ(0, generation_of(pad));
	EXPECT_EQ(0, device_truncate(pad, 2, 0));
	close(forked);
	EXPECT_EQ(0, device_truncate(pad, 1, 0));
	close(pad);
}

TEST_F(abi, enospc)
{
	int writer = device_open_writer(self->pad, 0);

	ASSERT_LE(0, writer);
	ASSERT_EQ(0, append_rows(writer, ROW_BYTES, 0, ROWS - 1));
	EXPECT_EQ(-ENOSPC, append_rows(writer, ROW_BYTES, 0, 2));
	EXPECT_EQ(-ENOSPC, device_stage(writer, 0, ROWS - 1, row, 2));
	EXPECT_EQ(-ENOSPC, device_stage(writer, 0, ROWS - 1, row, UINT64_MAX));
	EXPECT_EQ(-ENOSPC, device_stage(writer, 0, ROWS - 1, row, 1ull << 32));
	/* what is not whole comes before what does not fit */
	EXPECT_EQ(-EINVAL, device_keep(writer, 0, ROWS - 1, 2));
	EXPECT_EQ(ROWS - 1, len_of(self->pad));
	EXPECT_EQ(0, append_rows(writer, ROW_BYTES, 0, 1));
	close(writer);
}

TEST_F(abi, edom)
{
	int pad = device_create_scaled(ROWS, 1, KVSCRATCH_DTYPE_I8, KVSCRATCH_DTYPE_F32, 0);
	int writer = pad < 0 ? pad : device_open_writer(pad, 0);
	const float values[] = { 1, __builtin_nanf(""), 1 };

	ASSERT_LE(0, writer);
	EXPECT_ERRNO(EDOM, write(writer, values, sizeof(values)));
	EXPECT_EQ(-EDOM, device_stage(writer, 0, 0, values, 3));
	EXPECT_EQ(0, len_of(pad));
	EXPECT_EQ(0, device_stage(writer, 0, 0, values, 1));
	close(writer);
	close(pad);
}

TEST_F(abi, espipe)
{
	struct iovec iov = { row, sizeof(row) };

	EXPECT_ERRNO(ESPIPE, pwrite(self->pad, row, sizeof(row), 0));
	EXPECT_ERRNO(ESPIPE, pwritev(self->pad, &iov, 1, 0));
	EXPECT_EQ(0, len_of(self->pad));
}

TEST_F(abi, enxio)
{
	char path[32];

	EXPECT_ERRNO(ENXIO, map_page_offset(4096, self->pad, 2));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", self->pad);
	EXPECT_ERRNO(ENXIO, open(path, O_RDONLY));
	EXPECT_ERRNO(ENXIO, open(path, O_RDWR | O_NONBLOCK));
}

TEST_F(abi, edquot)
{
	struct kvscratch_plane plane = valid_plane();
	struct kvscratch_create create = valid_create(&plane);

	create.max_seq_len = KVSCRATCH_MAX_SEQ_LEN;
	plane.dim = KVSCRATCH_MAX_ROW_BYTES / 4;
	EXPECT_EQ(-EDQUOT, try_create(self->node, &create));
	EXPECT_EQ(-EDQUOT, device_fork_on(self->node, self->pad, 0, 0, KVSCRATCH_MAX_SEQ_LEN));
}

#define MIN_AVAILABLE "/sys/module/kvscratch/parameters/min_available_bytes"

TEST_F(abi, enomem)
{
	uint64_t saved = number_in_file(MIN_AVAILABLE, NULL);

	write_number(MIN_AVAILABLE, INT64_MAX);
	EXPECT_EQ(-ENOMEM, valid_call(self->node, KVSCRATCH_IOC_CREATE));
	EXPECT_EQ(-ENOMEM, valid_call(self->node, KVSCRATCH_IOC_FORK));
	write_number(MIN_AVAILABLE, saved);
	EXPECT_EQ(0, valid_call(self->node, KVSCRATCH_IOC_CREATE));
}

TEST_F(abi, emfile)
{
	struct rlimit saved, limit;
	int next = dup(self->pad);

	ASSERT_LE(0, next);
	close(next);
	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &saved));
	limit = saved;
	/* descriptors are given out from the lowest */
	limit.rlim_cur = next;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &limit));
	EXPECT_EQ(-EMFILE, valid_call(self->node, KVSCRATCH_IOC_CREATE));
	EXPECT_EQ(-EMFILE, valid_call(self->node, KVSCRATCH_IOC_FORK));
	EXPECT_EQ(-EMFILE, valid_call(self->pad, KVSCRATCH_IOC_OPEN));
	/* which has not taken the role from anybody */
	EXPECT_EQ(-EMFILE, device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &saved));
	EXPECT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 1));
}

#define FILE_MAX "/proc/sys/fs/file-max"

TEST_F(abi, enfile)
{
	uint64_t saved = number_in_file(FILE_MAX, NULL);
	struct kvscratch_pad_info info;
	struct child child;

	if (start_child(&child)) {
		/* root has as many as it likes */
		CHILD_CHECK(!setgid(65534) && !setuid(65534));
		CHILD_CHECK(say(child.line));
		CHILD_CHECK(hear(child.line));
		CHILD_CHECK(valid_call(self->node, KVSCRATCH_IOC_CREATE) == -ENFILE);
		CHILD_CHECK(valid_call(self->node, KVSCRATCH_IOC_FORK) == -ENFILE);
		CHILD_CHECK(valid_call(self->pad, KVSCRATCH_IOC_OPEN) == -ENFILE);
		CHILD_CHECK(device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER) == -ENFILE);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	/* the kernel counts roughly: any other number may not be reached */
	write_number(FILE_MAX, 0);
	EXPECT_TRUE(say(child.line));
	EXPECT_EQ(0, end_child(&child));
	write_number(FILE_MAX, saved);
	ASSERT_EQ(0, device_pad_info(self->pad, &info));
	EXPECT_EQ(0, info.epoch);
	EXPECT_EQ(0, valid_call(self->pad, KVSCRATCH_IOC_OPEN));
}

TEST_F(abi, efault)
{
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvscratch_create create = valid_create(NULL);
	int writer = device_open_writer(self->pad, 0);
	uint32_t *last_word;

	ASSERT_NE(MAP_FAILED, page);
	ASSERT_EQ(0, mprotect(page + 4096, 4096, PROT_NONE));
	ASSERT_LE(0, writer);
	last_word = (uint32_t *)(page + 4092);
	/* the size can be read, the rest cannot */
	*last_word = sizeof(struct kvscratch_pad_info);
	EXPECT_ERRNO(EFAULT, ioctl(self->node, KVSCRATCH_IOC_CREATE, NULL));
	EXPECT_ERRNO(EFAULT, ioctl(self->node, KVSCRATCH_IOC_CREATE, self->bad));
	EXPECT_ERRNO(EFAULT, ioctl(self->node, KVSCRATCH_IOC_CREATE, last_word));
	EXPECT_ERRNO(EFAULT, ioctl(self->node, KVSCRATCH_IOC_FORK, NULL));
	EXPECT_ERRNO(EFAULT, ioctl(self->node, KVSCRATCH_IOC_FORK, last_word));
	for (size_t i = 0; i < ARRAY_SIZE(pad_calls); i++) {
		EXPECT_ERRNO(EFAULT, ioctl(writer, pad_calls[i], NULL));
		EXPECT_ERRNO(EFAULT, ioctl(writer, pad_calls[i], self->bad));
		EXPECT_ERRNO(EFAULT, ioctl(writer, pad_calls[i], last_word));
	}
	/* planes, the second of which is out of reach */
	create.planes = (uintptr_t)self->bad;
	EXPECT_EQ(-EFAULT, try_create(self->node, &create));
	*(struct kvscratch_plane *)(page + 4032) = valid_plane();
	create.planes = (uintptr_t)page + 4032;
	EXPECT_EQ(0, try_create(self->node, &create));
	create.nr_planes = 2;
	EXPECT_EQ(-EFAULT, try_create(self->node, &create));

	EXPECT_ERRNO(EFAULT, write(writer, self->bad, ROW_BYTES));
	EXPECT_EQ(-EFAULT, device_stage(writer, 0, 0, self->bad, 1));
	EXPECT_EQ(0, len_of(self->pad));
	ASSERT_EQ(0, append_rows(writer, ROW_BYTES, 0, 1));
	EXPECT_ERRNO(EFAULT, read(self->pad, self->bad, ROW_BYTES));
	EXPECT_EQ(0, lseek(self->pad, 0, SEEK_CUR));
	close(writer);
	munmap(page, 8192);
}

/* An answer that cannot be given is EFAULT, and nothing has happened. */
TEST_F(abi, outputs_that_cannot_be_written)
{
	struct kvscratch_plane planes[2] = { valid_plane(), valid_plane() };
	int pad = device_create_planes(ROWS, planes, 2);
	char *pages = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvscratch_pad_info before, after;
	union arg *arg = (union arg *)pages;

	ASSERT_LE(0, pad);
	ASSERT_NE(MAP_FAILED, pages);
	ASSERT_EQ(0, device_pad_info(pad, &before));
	/* read-only */
	arg->size = sizeof(arg->info);
	ASSERT_EQ(0, mprotect(pages, 4096, PROT_READ));
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_INFO, arg));
	EXPECT_TRUE(all_zero(pages + 4, 4092));
	ASSERT_EQ(0, mprotect(pages, 4096, PROT_READ | PROT_WRITE));
	arg->planes = (struct kvscratch_planes) {
		.size = sizeof(arg->planes),
		.count = 2,
		.plane_bytes = 64,
		.planes = (uintptr_t)pages + 4096,
	};
	ASSERT_EQ(0, mprotect(pages, 4096, PROT_READ));
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_PLANES, arg));
	EXPECT_EQ(2, arg->planes.count);
	ASSERT_EQ(0, mprotect(pages, 4096, PROT_READ | PROT_WRITE));
	/* the array read-only, and its second element unmapped */
	ASSERT_EQ(0, mprotect(pages + 4096, 4096, PROT_READ));
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_PLANES, arg));
	ASSERT_EQ(0, mprotect(pages + 4096, 4096, PROT_READ | PROT_WRITE));
	ASSERT_EQ(0, munmap(pages + 8192, 4096));
	arg->planes.planes = (uintptr_t)pages + 8192 - 64;
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_PLANES, arg));
	EXPECT_EQ(2, arg->planes.count);
	/* the tail of an element, and that of a struct */
	arg->planes.planes = (uintptr_t)pages + 8192 - 64;
	arg->planes.plane_bytes = 72;
	arg->planes.count = 1;
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_PLANES, arg));
	arg = (union arg *)(pages + 8192 - sizeof(arg->info));
	arg->size = sizeof(arg->info) + 1;
	EXPECT_ERRNO(EFAULT, ioctl(pad, KVSCRATCH_IOC_INFO, arg));

	ASSERT_EQ(0, device_pad_info(pad, &after));
	EXPECT_EQ(0, memcmp(&before, &after, sizeof(before)));
	munmap(pages, 8192);
	close(pad);
}

/*
 * When several apply
 */

/* EFAULT and sizes, the tail, rights */
TEST_F(abi, struct_before_rights)
{
	struct kvscratch_truncate truncate = { .size = 0 };
	struct kvscratch_create create = valid_create(NULL);
	struct {
		struct kvscratch_open open;
		uint64_t tail;
	} open = { .open = { .size = 24, .access = KVSCRATCH_ACCESS_WRITE }, .tail = 1 };

	EXPECT_ERRNO(EFAULT, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, NULL));
	EXPECT_ERRNO(EFAULT, ioctl(self->read_node, KVSCRATCH_IOC_CREATE, NULL));
	EXPECT_ERRNO(EINVAL, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.size = 4097;
	EXPECT_ERRNO(E2BIG, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_ERRNO(E2BIG, ioctl(self->reader, KVSCRATCH_IOC_OPEN, &open));
	open.tail = 0;
	EXPECT_ERRNO(EACCES, ioctl(self->reader, KVSCRATCH_IOC_OPEN, &open));
	create.size = 4097;
	EXPECT_EQ(-E2BIG, try_create(self->read_node, &create));
	/* rights, and then what the values say; the array is of the values */
	create = valid_create(NULL);
	create.flags = 1;
	EXPECT_EQ(-EACCES, try_create(self->read_node, &create));
	create.flags = 0;
	EXPECT_EQ(-EACCES, try_create(self->read_node, &create));
	truncate = (struct kvscratch_truncate) { .size = sizeof(truncate), .flags = 4 };
	EXPECT_ERRNO(EACCES, ioctl(self->reader, KVSCRATCH_IOC_TRUNCATE, &truncate));
	open.open.flags = 4;
	EXPECT_ERRNO(EACCES, ioctl(self->reader, KVSCRATCH_IOC_OPEN, &open));
}

/* EINVAL of a value by itself before EROFS, and that before ESTALE and EBUSY */
TEST_F(abi, values_before_the_seal_before_the_role)
{
	struct kvscratch_truncate truncate = { .size = sizeof(truncate), .flags = 4 };
	struct kvscratch_stage stage = valid_arg(KVSCRATCH_IOC_STAGE).stage;
	struct kvscratch_commit commit = { .size = sizeof(commit), .flags = 1 };
	struct kvscratch_open open = {
		.size = sizeof(open),
		.flags = KVSCRATCH_OPEN_WRITER | 4,
		.access = KVSCRATCH_ACCESS_WRITE,
	};
	int stale = device_open_writer(self->pad, 0);
	int writer = device_open_writer(self->pad, KVSCRATCH_OPEN_TAKEOVER);

	ASSERT_LE(0, stale);
	ASSERT_LE(0, writer);
	stage.flags = 2;
	/* with a role in the way, then with the seal */
	for (int sealed = 0; sealed < 2; sealed++) {
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_TRUNCATE, &truncate));
		EXPECT_ERRNO(EINVAL, ioctl(stale, KVSCRATCH_IOC_STAGE, &stage));
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_STAGE, &stage));
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_COMMIT, &commit));
		EXPECT_ERRNO(EINVAL, ioctl(self->pad, KVSCRATCH_IOC_OPEN, &open));
		EXPECT_ERRNO(EINVAL, write(self->pad, row, ROW_BYTES - 1));
		ASSERT_EQ(0, device_seal(writer));
	}
	EXPECT_EQ(-EROFS, valid_call(stale, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-EROFS, valid_call(self->pad, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-EROFS, valid_call(self->pad, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_ERRNO(EROFS, write(stale, row, ROW_BYTES));
	EXPECT_ERRNO(EROFS, write(self->pad, row, ROW_BYTES));
	EXPECT_EQ(-EROFS, device_open_writer(self->pad, 0));
	/* SEAL again is 0 before any role */
	EXPECT_EQ(0, device_seal(stale));
	close(writer);
	close(stale);
}

/* ESTALE, EBUSY and ENOLCK before EAGAIN, that before ECANCELED, EINVAL and ENOSPC */
TEST_F(abi, role_before_the_turn_before_the_pad)
{
	struct kvscratch_truncate truncate = {
		.size = sizeof(truncate),
		.flags = KVSCRATCH_TRUNCATE_EXPECT,
		.len = ROWS + 1,
		.expected_len = 1,
	};
	int pad = new_pad(ROWS, 4096);
	int stale = device_open_writer(pad, 0);
	int writer = device_open_writer(pad, KVSCRATCH_OPEN_TAKEOVER);
	struct stall stall;

	ASSERT_LE(0, pad);
	ASSERT_LE(0, stale);
	ASSERT_LE(0, writer);
	start_stall(&stall, writer, 4096, stalled_stage);
	ASSERT_EQ(0, fcntl(pad, F_SETFL, O_NONBLOCK));
	ASSERT_EQ(0, fcntl(stale, F_SETFL, O_NONBLOCK));
	EXPECT_EQ(-ENOLCK, valid_call(pad, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-ENOLCK, valid_call(pad, KVSCRATCH_IOC_COMMIT));
	EXPECT_EQ(-EBUSY, valid_call(pad, KVSCRATCH_IOC_TRUNCATE));
	EXPECT_EQ(-EBUSY, device_append(pad, self->bad, 4096));
	EXPECT_EQ(-EBUSY, device_open_writer(pad, 0));
	EXPECT_EQ(-ESTALE, valid_call(stale, KVSCRATCH_IOC_STAGE));
	EXPECT_EQ(-ESTALE, device_append(stale, self->bad, 4096));

	/* the same open file as the child's, which sleeps already */
	ASSERT_EQ(0, fcntl(writer, F_SETFL, O_NONBLOCK));
	EXPECT_ERRNO(EAGAIN, ioctl(writer, KVSCRATCH_IOC_TRUNCATE, &truncate));
	EXPECT_EQ(-EAGAIN, device_stage(writer, 0, 5, self->bad, 1));
	EXPECT_EQ(-EAGAIN, device_stage(writer, 0, 0, self->bad, ROWS + 1));
	EXPECT_EQ(-EAGAIN, device_commit(writer, 5));
	EXPECT_EQ(-EAGAIN, device_append(writer, self->bad, 4096));
	EXPECT_EQ(-EAGAIN, device_seal(writer));
	EXPECT_EQ(128 + SIGKILL, kill_stall(&stall));

	/* and by itself each of the others, in their order */
	EXPECT_ERRNO(ECANCELED, ioctl(writer, KVSCRATCH_IOC_TRUNCATE, &truncate));
	truncate.expected_len = 0;
	EXPECT_ERRNO(EINVAL, ioctl(writer, KVSCRATCH_IOC_TRUNCATE, &truncate));
	/* values against the pad, room, source */
	EXPECT_EQ(-EINVAL, device_stage(writer, 0, 5, self->bad, ROWS + 1));
	EXPECT_EQ(-ENOSPC, device_stage(writer, 0, 0, self->bad, ROWS + 1));
	EXPECT_EQ(-EFAULT, device_stage(writer, 0, 0, self->bad, 1));
	EXPECT_ERRNO(ENOSPC, write(writer, self->bad, (ROWS + 1) * 4096));
	EXPECT_ERRNO(EFAULT, write(writer, self->bad, ROWS * 4096));
	close(writer);
	close(stale);
	close(pad);
}

/* Values, limits, memory; a limit is asked before a descriptor is looked for. */
TEST_F(abi, values_before_limits_before_memory)
{
	uint64_t available = number_in_file(MIN_AVAILABLE, NULL);
	uint64_t total = number_in_file(MAX_TOTAL, NULL);
	struct kvscratch_plane plane = valid_plane();
	struct kvscratch_create create = valid_create(&plane);

	write_number(MIN_AVAILABLE, INT64_MAX);
	write_number(MAX_TOTAL, 0);
	create.max_seq_len = 0;
	EXPECT_EQ(-EINVAL, try_create(self->node, &create));
	create.max_seq_len = 1;
	create.planes = (uintptr_t)self->bad;
	EXPECT_EQ(-EFAULT, try_create(self->node, &create));
	create.planes = (uintptr_t)&plane;
	EXPECT_EQ(-EDQUOT, try_create(self->node, &create));
	write_number(MAX_TOTAL, total);
	EXPECT_EQ(-ENOMEM, try_create(self->node, &create));
	write_number(MIN_AVAILABLE, available);
	EXPECT_EQ(0, try_create(self->node, &create));
}

/*
 * All that can be in the way of a call, two at a time: the errno is that of the first one
 */

enum obstacle {
	WRONG_KIND, BAD_POINTER, SHORT_STRUCT, UNKNOWN_TAIL, NO_RIGHTS, NO_PAD, NO_RIGHTS_THERE,
	BAD_VALUE, SEALED, STALE, OTHER_WRITER, NO_ROLE, TURN, UNEXPECTED, BEYOND_THE_PAD, SHARED,
	NO_ROOM, BAD_SOURCE, NOT_FINITE, NO_QUOTA, NO_MEMORY, NR_OBSTACLES
};

static const int obstacle_errno[] = {
	ENOTTY, EFAULT, EINVAL, E2BIG, EACCES, EBADF, EACCES, EINVAL, EROFS, ESTALE, EBUSY,
	ENOLCK, EAGAIN, ECANCELED, EINVAL, ETXTBSY, ENOSPC, EFAULT, EDOM, EDQUOT, ENOMEM,
};

#define BIT(obstacle) (1u << (obstacle))
#define ANY_STRUCT (BIT(WRONG_KIND) | BIT(BAD_POINTER) | BIT(SHORT_STRUCT) | BIT(UNKNOWN_TAIL))
#define ANY_ROLE (BIT(STALE) | BIT(OTHER_WRITER) | BIT(NO_ROLE))

/* No ioctl */
#define WRITE 0

static const struct {
	unsigned int cmd;
	uint32_t obstacles;
} calls_and_obstacles[] = {
	{ WRITE, BIT(NO_RIGHTS) | BIT(BAD_VALUE) | BIT(SEALED) | BIT(STALE) | BIT(OTHER_WRITER) |
		 BIT(TURN) | BIT(NO_ROOM) | BIT(BAD_SOURCE) | BIT(NOT_FINITE) },
	{ KVSCRATCH_IOC_CREATE, ANY_STRUCT | BIT(NO_RIGHTS) | BIT(BAD_VALUE) | BIT(BAD_SOURCE) |
				BIT(NO_QUOTA) | BIT(NO_MEMORY) },
	{ KVSCRATCH_IOC_FORK, ANY_STRUCT | BIT(NO_RIGHTS) | BIT(NO_PAD) | BIT(NO_RIGHTS_THERE) |
			      BIT(BAD_VALUE) | BIT(UNEXPECTED) | BIT(BEYOND_THE_PAD) |
			      BIT(NO_QUOTA) | BIT(NO_MEMORY) },
	{ KVSCRATCH_IOC_OPEN, ANY_STRUCT | BIT(NO_RIGHTS) | BIT(BAD_VALUE) | BIT(SEALED) |
			      BIT(OTHER_WRITER) | BIT(TURN) },
	{ KVSCRATCH_IOC_STAGE, ANY_STRUCT | BIT(BAD_VALUE) | BIT(SEALED) | BIT(STALE) |
			       BIT(NO_ROLE) | BIT(TURN) | BIT(BEYOND_THE_PAD) | BIT(NO_ROOM) |
			       BIT(BAD_SOURCE) | BIT(NOT_FINITE) },
	{ KVSCRATCH_IOC_COMMIT, ANY_STRUCT | BIT(BAD_VALUE) | BIT(SEALED) | BIT(STALE) |
				BIT(NO_ROLE) | BIT(TURN) | BIT(BEYOND_THE_PAD) },
	{ KVSCRATCH_IOC_TRUNCATE, ANY_STRUCT | BIT(NO_RIGHTS) | BIT(BAD_VALUE) | BIT(SEALED) |
				  BIT(STALE) | BIT(OTHER_WRITER) | BIT(TURN) | BIT(UNEXPECTED) |
				  BIT(BEYOND_THE_PAD) | BIT(SHARED) },
	{ KVSCRATCH_IOC_SEAL, ANY_STRUCT | BIT(NO_RIGHTS) | BIT(BAD_VALUE) | BIT(STALE) |
			      BIT(OTHER_WRITER) | BIT(TURN) },
	{ KVSCRATCH_IOC_SEEN, ANY_STRUCT | BIT(BAD_VALUE) },
	{ KVSCRATCH_IOC_INFO, ANY_STRUCT & ~BIT(UNKNOWN_TAIL) },
	{ KVSCRATCH_IOC_PLANES, (ANY_STRUCT & ~BIT(UNKNOWN_TAIL)) | BIT(BAD_VALUE) |
				BIT(BAD_SOURCE) },
};

/* What there cannot be besides it: of one handle, one struct, one source */
static uint32_t excluded_by(enum obstacle obstacle)
{
	switch (obstacle) {
	case WRONG_KIND:
		return BIT(SEALED) | ANY_ROLE | BIT(TURN) | BIT(UNEXPECTED) | BIT(BEYOND_THE_PAD) |
		       BIT(SHARED) | BIT(NO_ROOM);
	case BAD_POINTER:
		return BIT(NO_PAD) | BIT(NO_RIGHTS_THERE) | BIT(SHORT_STRUCT) | BIT(UNKNOWN_TAIL) | BIT(BAD_VALUE) | BIT(UNEXPECTED) |
		       BIT(BEYOND_THE_PAD) | BIT(NO_ROOM) | BIT(BAD_SOURCE) | BIT(NOT_FINITE);
	case SHORT_STRUCT:
		return BIT(UNKNOWN_TAIL);
	case NO_RIGHTS:
		return BIT(STALE);
	case SEALED:
		return BIT(TURN);
	case NO_PAD:
		return BIT(NO_RIGHTS_THERE);
	case STALE:
	case OTHER_WRITER:
		return ANY_ROLE;
	case BAD_SOURCE:
		return BIT(NOT_FINITE);
	default:
		return 0;
	}
}

/* Rows of the pad below, of numbers and of none */
#define WIDE_DIM 1024u
#define WIDE_BYTES 4096
static float numbers[(ROWS + 1) * WIDE_DIM];
static float no_numbers[(ROWS + 1) * WIDE_DIM];

/* A pad, and what is open of it, or of a fork of it */
struct scene {
	int pad;
	int forked;
	int writer;
	/* by which the call comes */
	int fd;
	struct stall stall;
};

static int handle_for(const FIXTURE_DATA(abi) *self, const struct scene *scene, unsigned int cmd,
		      uint32_t obstacles)
{
	const int access = obstacles & BIT(NO_RIGHTS) ? O_RDONLY : O_RDWR;
	bool of_nodes = cmd == KVSCRATCH_IOC_CREATE || cmd == KVSCRATCH_IOC_FORK;
	bool node = of_nodes != !!(obstacles & BIT(WRONG_KIND));
	bool of_the_writer = cmd == KVSCRATCH_IOC_STAGE || cmd == KVSCRATCH_IOC_COMMIT;

	if (node)
		return dup(access == O_RDONLY ? self->read_node : self->node);
	if (of_the_writer && !(obstacles & BIT(NO_ROLE)))
		return dup(scene->writer);
	return device_reopen(scene->pad, access);
}

static void set_scene(const FIXTURE_DATA(abi) *self, struct scene *scene, unsigned int cmd,
		      uint32_t obstacles)
{
	static const struct kvscratch_plane plane = {
		.dim = WIDE_DIM,
		.dtype = KVSCRATCH_DTYPE_I32,
		.input_dtype = KVSCRATCH_DTYPE_F32,
	};
	bool of_the_writer = cmd == KVSCRATCH_IOC_STAGE || cmd == KVSCRATCH_IOC_COMMIT;

	*scene = (struct scene) { .writer = -1, .fd = -1, .forked = -1 };
	scene->pad = device_create_planes(ROWS, &plane, 1);
	if (obstacles & BIT(SHARED)) {
		if (device_append(scene->pad, numbers, WIDE_BYTES))
			abort();
		scene->forked = device_fork(scene->pad, 1, 0, ROWS);
	}
	if (obstacles & BIT(STALE))
		scene->fd = device_open_writer(scene->pad, 0);
	if (of_the_writer || obstacles & ANY_ROLE)
		scene->writer = device_open_writer(scene->pad, KVSCRATCH_OPEN_TAKEOVER);
	if (scene->fd < 0)
		scene->fd = handle_for(self, scene, cmd, obstacles);
	if (obstacles & BIT(SEALED) &&
	    device_seal(scene->writer < 0 ? scene->pad : scene->writer))
		abort();
	if (obstacles & BIT(TURN)) {
		start_stall(&scene->stall, scene->writer < 0 ? scene->pad : scene->writer,
			    WIDE_BYTES, stalled_append);
		fcntl(scene->fd, F_SETFL, O_NONBLOCK);
	}
}

static void clear_scene(struct scene *scene)
{
	if (scene->stall.child.pid)
		kill_stall(&scene->stall);
	close(scene->fd);
	close(scene->writer);
	close(scene->forked);
	close(scene->pad);
}

/* The argument of a call that all of them are in the way of, but for the handle's */
static union arg obstructed_arg(const FIXTURE_DATA(abi) *self, unsigned int cmd,
				uint32_t obstacles)
{
	union arg arg = valid_arg(cmd);
	uint32_t known = arg.size;

	/* flags, but for those that have none */
	if (obstacles & BIT(BAD_VALUE)) {
		arg.words[1] = 1u << 31;
		if (cmd == KVSCRATCH_IOC_PLANES)
			arg.planes.first = 2;
	}
	switch (cmd) {
	case KVSCRATCH_IOC_CREATE:
		if (obstacles & BIT(BAD_SOURCE))
			arg.create.planes = (uintptr_t)self->bad;
		break;
	case KVSCRATCH_IOC_FORK:
		arg.fork.rows = obstacles & BIT(BEYOND_THE_PAD) ? 5 : 0;
		arg.fork.generation = obstacles & BIT(UNEXPECTED) ? 1 : 0;
		break;
	case KVSCRATCH_IOC_OPEN:
		arg.open.flags |= KVSCRATCH_OPEN_WRITER;
		break;
	case KVSCRATCH_IOC_STAGE:
		arg.stage.row = obstacles & BIT(BEYOND_THE_PAD) ? 5 : 0;
		arg.stage.rows = obstacles & BIT(NO_ROOM) ? ROWS + 1 : 1;
		arg.stage.addr = obstacles & BIT(BAD_SOURCE) ? (uintptr_t)self->bad :
				 (uintptr_t)(obstacles & BIT(NOT_FINITE) ? no_numbers : numbers);
		break;
	case KVSCRATCH_IOC_COMMIT:
		arg.commit.len = obstacles & BIT(BEYOND_THE_PAD) ? 5 : 0;
		break;
	case KVSCRATCH_IOC_TRUNCATE:
		arg.truncate.len = obstacles & BIT(BEYOND_THE_PAD) ? 5 : 0;
		if (obstacles & BIT(UNEXPECTED)) {
			arg.truncate.flags |= KVSCRATCH_TRUNCATE_EXPECT;
			arg.truncate.expected_len = 5;
		}
		break;
	case KVSCRATCH_IOC_PLANES:
		arg.planes.count = 1;
		arg.planes.planes = (uintptr_t)(obstacles & BIT(BAD_SOURCE) ? self->bad : numbers);
		break;
	}
	if (obstacles & BIT(SHORT_STRUCT))
		arg.size = 4;
	if (obstacles & BIT(UNKNOWN_TAIL)) {
		arg.size = known + 8;
		arg.bytes[known] = 1;
	}
	return arg;
}

/* What a FORK is of */
static int source_for(const FIXTURE_DATA(abi) *self, const struct scene *scene, uint32_t obstacles)
{
	if (obstacles & BIT(NO_PAD))
		return self->node;
	return obstacles & BIT(NO_RIGHTS_THERE) ? self->reader : scene->pad;
}

/* 0 or the errno */
static int obstructed_call(const FIXTURE_DATA(abi) *self, unsigned int cmd, uint32_t obstacles)
{
	union arg arg = obstructed_arg(self, cmd, obstacles);
	struct scene scene;
	int ret, err;

	set_scene(self, &scene, cmd, obstacles);
	if (cmd == KVSCRATCH_IOC_FORK)
		arg.fork.source_fd = source_for(self, &scene, obstacles);
	if (cmd == WRITE) {
		const void *from = obstacles & BIT(BAD_SOURCE) ? self->bad :
				   obstacles & BIT(NOT_FINITE) ? (void *)no_numbers : numbers;
		size_t bytes = (obstacles & BIT(NO_ROOM) ? ROWS + 1 : 1) * WIDE_BYTES;

		ret = write(scene.fd, from, bytes - !!(obstacles & BIT(BAD_VALUE)));
	} else {
		if (obstacles & BIT(NO_QUOTA))
			write_number(MAX_TOTAL, 0);
		if (obstacles & BIT(NO_MEMORY))
			write_number(MIN_AVAILABLE, INT64_MAX);
		ret = ioctl(scene.fd, cmd, obstacles & BIT(BAD_POINTER) ? NULL : &arg);
	}
	err = ret < 0 ? errno : 0;
	if (ret > 0 && cmd != WRITE)
		close(ret);
	clear_scene(&scene);
	return err;
}

TEST_F_TIMEOUT(abi, every_pair_in_its_order, TEST_SECONDS)
{
	uint64_t available = number_in_file(MIN_AVAILABLE, NULL);
	uint64_t total = number_in_file(MAX_TOTAL, NULL);
	unsigned int pairs = 0;

	for (size_t i = 0; i < ARRAY_SIZE(no_numbers); i++)
		no_numbers[i] = __builtin_nanf("");
	for (size_t i = 0; i < ARRAY_SIZE(calls_and_obstacles); i++) {
		const unsigned int cmd = calls_and_obstacles[i].cmd;
		const uint32_t all = calls_and_obstacles[i].obstacles;

		EXPECT_EQ(0, obstructed_call(self, cmd, 0))
			TH_LOG("call %u", _IOC_NR(cmd));
		/* with @a twice: it alone */
		for (int a = 0; a < NR_OBSTACLES; a++) {
			const uint32_t others = all & ~excluded_by(a) & -BIT(a);
			int expected = cmd == WRITE && a == NO_RIGHTS ? EBADF : obstacle_errno[a];

			for (int b = a; all & BIT(a) && b < NR_OBSTACLES; b++) {
				if (b != a && !(others & BIT(b)))
					continue;
				EXPECT_EQ(expected, obstructed_call(self, cmd, BIT(a) | BIT(b)))
					TH_LOG("call %u, obstacles %d and %d", _IOC_NR(cmd), a, b);
				pairs += a != b;
				write_number(MAX_TOTAL, total);
				write_number(MIN_AVAILABLE, available);
			}
		}
	}
	TH_LOG("%u pairs", pairs);
}

/*
 * What is told
 */

TEST_F(abi, create_and_open_are_close_on_exec)
{
	int writer = device_open_writer(self->pad, 0);

	EXPECT_EQ(FD_CLOEXEC, fcntl(self->pad, F_GETFD));
	EXPECT_EQ(FD_CLOEXEC, fcntl(self->reader, F_GETFD));
	EXPECT_EQ(FD_CLOEXEC, fcntl(writer, F_GETFD));
	EXPECT_EQ(O_RDWR, fcntl(self->pad, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(O_RDONLY, fcntl(self->reader, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(O_WRONLY, fcntl(self->appender, F_GETFL) & O_ACCMODE);
	EXPECT_EQ(O_WRONLY, fcntl(writer, F_GETFL) & O_ACCMODE);
	close(writer);
}

TEST_F(abi, info_describes_the_pad)
{
	struct kvscratch_plane plane = valid_plane();
	struct kvscratch_create create = valid_create(&plane);
	struct kvscratch_pad_info info, other;
	int fd, writer;

	for (size_t i = 0; i < sizeof(create.tag); i++)
		create.tag[i] = 255 - i;
	fd = ioctl(self->node, KVSCRATCH_IOC_CREATE, &create);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, append_rows(fd, ROW_BYTES, 0, 7));
	ASSERT_EQ(0, device_truncate(fd, 5, 0));
	ASSERT_EQ(0, append_rows(fd, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, device_pad_info(fd, &info));
	EXPECT_EQ(sizeof(info), info.size);
	EXPECT_EQ(0, info.flags);
	EXPECT_LT(0, info.id);
	EXPECT_EQ(ROWS, info.max_seq_len);
	EXPECT_EQ(6, info.len);
	EXPECT_EQ(1, info.generation);
	EXPECT_EQ(5, info.trunc_len);
	EXPECT_EQ(2 * page_bytes(), info.mapping_bytes);
	EXPECT_EQ(page_bytes(), info.status_offset);
	EXPECT_EQ(charged_bytes(ROWS, ROW_BYTES), info.allocated_bytes);
	EXPECT_EQ(0, info.shared_bytes);
	EXPECT_EQ(0, info.saturated);
	EXPECT_EQ(0, info.epoch);
	EXPECT_EQ(1, info.nr_planes);
	EXPECT_EQ(ROW_BYTES, info.row_bytes);
	EXPECT_EQ(ROW_BYTES, info.input_row_bytes);
	EXPECT_EQ(0, memcmp(create.tag, info.tag, sizeof(info.tag)));

	/* by every handle the same, and another pad is another */
	writer = device_open_writer(fd, 0);
	ASSERT_LE(0, writer);
	ASSERT_EQ(0, device_pad_info(writer, &other));
	EXPECT_EQ(info.id, other.id);
	EXPECT_EQ(1, other.epoch);
	EXPECT_EQ(KVSCRATCH_PAD_WRITER, other.flags);
	ASSERT_EQ(0, device_seal(writer));
	close(writer);
	ASSERT_EQ(0, device_pad_info(fd, &other));
	EXPECT_EQ(KVSCRATCH_PAD_SEALED, other.flags);
	ASSERT_EQ(0, device_pad_info(self->pad, &other));
	EXPECT_NE(info.id, other.id);
	EXPECT_TRUE(all_zero(other.tag, sizeof(other.tag)));
	close(fd);
}

TEST_F(abi, fdinfo)
{
	char path[64], text[1024], expected[64];
	struct kvscratch_pad_info info;
	ssize_t got;
	int fd;

	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, 3));
	ASSERT_EQ(0, device_truncate(self->pad, 3, 0));
	ASSERT_EQ(0, device_pad_info(self->pad, &info));
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", self->reader);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	ASSERT_LE(0, fd);
	got = read(fd, text, sizeof(text) - 1);
	close(fd);
	ASSERT_LT(0, got);
	text[got] = '\0';
	snprintf(expected, sizeof(expected), "\nkvscratch-id:\t%llu\n", (unsigned long long)info.id);
	EXPECT_NE(NULL, strstr(text, expected));
	snprintf(expected, sizeof(expected), "\nkvscratch-bytes:\t%llu\n",
		 (unsigned long long)charged_bytes(ROWS, ROW_BYTES));
	EXPECT_NE(NULL, strstr(text, expected));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-len:\t3\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-max-seq-len:\t10\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-generation:\t1\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-planes:\t1\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-dim:\t4\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-dtype:\tf32\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-saturated:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-epoch:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-writer:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-sealed:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-shared-bytes:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-parent:\t0\n"));
	EXPECT_NE(NULL, strstr(text, "\nkvscratch-parent-rows:\t0\n"));
}

TEST_HARNESS_MAIN
