// SPDX-License-Identifier: GPL-2.0-only
/*
 * What hostile readers, writers and containers can attempt, and the classes of
 * bugs that drivers of this kind have had. tests/SECURITY.md is the list; many of
 * its tests are elsewhere.
 */
#include "cgroup.h"
#include "common.h"
#include "ring.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/sendfile.h>
#include <sys/sysmacros.h>

#define DATA_PAGES 4
#define ROWS 8
#define ROW_BYTES 2048
#define COMMITTED 5
#define NOBODY 65534

/* 32-bit callers of a kernel without 32-bit time have only this one */
#ifdef SYS_futex_time64
#define FUTEX SYS_futex_time64
#else
#define FUTEX SYS_futex
#endif

FIXTURE(security) {
	size_t page;
	uint64_t saved_per_pad;
	uint64_t saved_total;
	struct stat node;
	/* whom a cgroup holds in bounds */
	char cgroup[64];
	/* four pages of rows, of which five are committed */
	int pad;
	int reader;
	struct kvscratch_view view;
};

FIXTURE_SETUP(security) {
	self->page = page_bytes();
	self->saved_per_pad = number_in_file(MAX_PER_PAD, NULL);
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	make_cgroup(self->cgroup, sizeof(self->cgroup), "hostile");
	ASSERT_EQ(0, stat(KVSCRATCH_DEVICE, &self->node));
	ASSERT_EQ(DATA_PAGES * self->page, ROWS * ROW_BYTES);
	self->pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_LE(0, self->pad);
	ASSERT_EQ(0, append_rows(self->pad, ROW_BYTES, 0, COMMITTED));
	self->reader = device_open_reader(self->pad);
	ASSERT_LE(0, self->reader);
	ASSERT_EQ(0, device_map(self->pad, &self->view));
}

static const uint8_t *view_row(const struct kvscratch_view *view, uint32_t row)
{
	return (const uint8_t *)view->data + (size_t)row * kvscratch_view_plane(view, 0)->row_bytes;
}

static bool is_as_it_was(FIXTURE_DATA(security) *self)
{
	for (uint32_t row = 0; row < COMMITTED; row++)
		if (!row_is(view_row(&self->view, row), ROW_BYTES, row))
			return false;
	return self->view.status->magic == KVSCRATCH_STATUS_MAGIC &&
	       kvscratch_view_state(&self->view) == COMMITTED;
}

/* Whatever was attempted: nothing of it is left. */
FIXTURE_TEARDOWN(security) {
	EXPECT_EQ(0, chmod(KVSCRATCH_DEVICE, self->node.st_mode & 07777));
	device_unmap(&self->view);
	close(self->reader);
	close(self->pad);
	EXPECT_EQ(0, nothing_accounted());
	write_number(MAX_PER_PAD, self->saved_per_pad);
	write_number(MAX_TOTAL, self->saved_total);
	EXPECT_EQ(0, rmdir(self->cgroup));
}

static void become_nobody(void)
{
	CHILD_CHECK(!setresgid(NOBODY, NOBODY, NOBODY) && !setresuid(NOBODY, NOBODY, NOBODY));
	/* /proc/self stays its own */
	CHILD_CHECK(!prctl(PR_SET_DUMPABLE, 1));
}

/* Leave memory behind that the next pads get. */
static bool dirty_memory(void)
{
	const size_t bytes = 16 * MIB;
	uint8_t *dirt = malloc(MIB);
	int pad = new_pad(bytes / 4096, 4096);
	bool done = dirt && pad >= 0;

	memset(dirt, 0xa5, MIB);
	for (size_t i = 0; done && i < bytes; i += MIB)
		done = !device_append(pad, dirt, MIB);
	free(dirt);
	close(pad);
	return done;
}

/* The bounds of a mapping */

TEST_F_TIMEOUT(security, offset_plus_size_overflow, TEST_SECONDS)
{
	const unsigned long pages = DATA_PAGES + 1;
	const unsigned long offsets[] = {
		0, 1, 2, 3, 4, 5, 6, 7, 0x7fffffff / self->page, 0xffffffff / self->page,
		ULONG_MAX / 2 / self->page, ULONG_MAX / 2 / self->page + 1,
		ULONG_MAX / self->page - 4, ULONG_MAX / self->page - 1, ULONG_MAX / self->page,
	};

	for (size_t i = 0; i < ARRAY_SIZE(offsets); i++) {
		for (unsigned long count = 1; count <= pages + 2; count++) {
			bool inside = offsets[i] < pages && count <= pages - offsets[i];
			void *at;

			errno = 0;
			at = map_page_offset(count * self->page, self->pad, offsets[i]);
			EXPECT_EQ(inside, at != MAP_FAILED)
				TH_LOG("%lu pages at page %#lx", count, offsets[i]);
			if (at != MAP_FAILED)
				munmap(at, count * self->page);
			else {
				EXPECT_TRUE(errno == ENXIO || errno == EOVERFLOW || errno == EINVAL)
					TH_LOG("errno %d", errno);
			}
		}
	}
}

/* What reads @at by every way that there is: each has to give @expected, or an error */
static void read_by_all_ways(struct __test_metadata *_metadata, const uint8_t *at, int expected)
{
	struct iovec from = { .iov_base = (void *)at, .iov_len = 1 };
	int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	uint8_t byte;
	struct iovec to = { .iov_base = &byte, .iov_len = 1 };
	int pipes[2];

	ASSERT_LE(0, mem);
	ASSERT_EQ(0, pipe(pipes));
	if (expected < 0) {
		EXPECT_ERRNO(EFAULT, write(pipes[1], at, 1));
		EXPECT_ERRNO(EFAULT, process_vm_readv(getpid(), &to, 1, &from, 1, 0));
		EXPECT_ERRNO(EIO, pread64(mem, &byte, 1, (uintptr_t)at));
	} else {
		EXPECT_EQ(1, write(pipes[1], at, 1));
		EXPECT_EQ(1, process_vm_readv(getpid(), &to, 1, &from, 1, 0));
		EXPECT_EQ(expected, byte);
		EXPECT_EQ(1, pread64(mem, &byte, 1, (uintptr_t)at));
		EXPECT_EQ(expected, byte);
	}
	close(pipes[0]);
	close(pipes[1]);
	close(mem);
}

/* Pages that are there come by fault, for everybody, and nothing else does. */
TEST_F_TIMEOUT(security, fault_handler_bounds, TEST_SECONDS)
{
	/* a chunk, and two pages of the next: behind them there is nothing up to its end */
	const size_t end = KVSCRATCH_CHUNK_BYTES + 2 * self->page;
	const size_t hole = 2 * KVSCRATCH_CHUNK_BYTES - end;
	uint8_t row[ROW_BYTES];
	int pad = new_pad(end / ROW_BYTES, ROW_BYTES);
	struct kvscratch_info info;
	uint8_t *at;

	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_info(pad, &info));
	ASSERT_EQ(2 * KVSCRATCH_CHUNK_BYTES, info.status_offset);
	memset(row, 7, sizeof(row));
	ASSERT_EQ(0, device_append(pad, row, sizeof(row)));
	/* by chunks and, one page off, by pages */
	for (int off = 0; off < 2; off++) {
		at = mmap(NULL, info.status_offset, PROT_READ, MAP_SHARED, pad, 0);
		ASSERT_NE(MAP_FAILED, (void *)at);
		if (off) {
			/* somewhere that is no multiple of a chunk */
			munmap(at, info.status_offset);
			at = (uint8_t *)((uintptr_t)at / KVSCRATCH_CHUNK_BYTES *
					 KVSCRATCH_CHUNK_BYTES) + self->page;
			ASSERT_EQ(at, mmap(at, info.status_offset, PROT_READ,
					   MAP_SHARED | MAP_FIXED_NOREPLACE, pad, 0));
		}
		for (int again = 0; again < 2; again++) {
			read_by_all_ways(_metadata, at, 7);
			read_by_all_ways(_metadata, at + end - 1, 0);
			read_by_all_ways(_metadata, at + end, -1);
			read_by_all_ways(_metadata, at + info.status_offset - 1, -1);
			/* MADV_POPULATE_READ and _WRITE */
			EXPECT_EQ(0, madvise(at, end, 22));
			EXPECT_ERRNO(EFAULT, madvise(at + end, hole, 22));
			EXPECT_ERRNO(EFAULT, madvise(at, info.status_offset, 22));
			EXPECT_EQ(-1, madvise(at, self->page, 23));
			/* what was dropped comes again */
			ASSERT_EQ(0, madvise(at, info.status_offset, MADV_DONTNEED));
		}
		munmap(at, info.status_offset);
	}
	close(pad);
	EXPECT_TRUE(is_as_it_was(self));
}

/* A moved view is still one view; a second one cannot be made of it. */
TEST_F_TIMEOUT(security, mremap_shares_private_data, TEST_SECONDS)
{
	const size_t bytes = self->view.mapped_bytes;
	long long refs = number_in_file(REFCNT, NULL);
	struct kvscratch_view moved = self->view;
	/* room to move it to */
	void *target = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct child child;

	ASSERT_NE(MAP_FAILED, target);
	ASSERT_EQ(0, device_map(self->pad, &moved));
	EXPECT_EQ(MAP_FAILED, mremap((void *)moved.data, 0, bytes, MREMAP_MAYMOVE));
	/* MREMAP_DONTUNMAP */
	EXPECT_EQ(MAP_FAILED, mremap((void *)moved.data, bytes, bytes, MREMAP_MAYMOVE | 4));
	if (start_child(&child)) {
		moved.data = mremap((void *)moved.data, bytes, bytes,
				    MREMAP_MAYMOVE | MREMAP_FIXED, target);
		CHILD_CHECK(moved.data == target);
		CHILD_CHECK(row_is(moved.data, ROW_BYTES, 0));
		CHILD_CHECK(!munmap((void *)moved.data, self->page));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(row_is(moved.data, ROW_BYTES, 0));
	device_unmap(&moved);
	munmap(target, bytes);
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
	EXPECT_TRUE(is_as_it_was(self));
}

/* fork() of a child that shares the table of descriptors, as a thread does */
static pid_t fork_sharing_descriptors(void)
{
	pid_t pid = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL);

	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static void map_until_closed(int fd, unsigned int *maps)
{
	const size_t page = page_bytes();
	struct kvscratch_status *status;
	uint8_t *at;

	while ((at = mmap(NULL, 2 * page, PROT_READ, MAP_SHARED, fd, 0)) != MAP_FAILED) {
		status = (struct kvscratch_status *)(at + page);
		CHILD_CHECK(status->magic == KVSCRATCH_STATUS_MAGIC);
		munmap(at, 2 * page);
		__atomic_add_fetch(maps, 1, __ATOMIC_RELEASE);
	}
	_exit(errno);
}

TEST_F_TIMEOUT(security, mmap_races_with_close, TEST_SECONDS)
{
	unsigned int *maps = mmap(NULL, self->page, PROT_READ | PROT_WRITE,
				  MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, (void *)maps);
	for (unsigned int round = 0; round < 100; round++) {
		int fd = new_pad(1, 1);
		pid_t pid;

		ASSERT_LE(0, fd);
		*maps = 0;
		pid = fork_sharing_descriptors();
		ASSERT_LE(0, pid);
		if (!pid)
			map_until_closed(fd, maps);
		while (__atomic_load_n(maps, __ATOMIC_ACQUIRE) < round % 7)
			sched_yield();
		close(fd);
		EXPECT_EQ(EBADF, wait_for(pid));
	}
	munmap(maps, self->page);
}

/* Sizes */

TEST_F_TIMEOUT(security, size_overflow_at_create, TEST_SECONDS)
{
	const struct {
		uint64_t rows;
		uint32_t dim;
		uint32_t dtype;
		uint32_t input_dtype;
		int err;
	} shapes[] = {
		/* a row that is small in 32 bits */
		{ 1, 0x20000001, KVSCRATCH_DTYPE_F64, 0, -EINVAL },
		{ 1, 0x40000001, KVSCRATCH_DTYPE_F32, 0, -EINVAL },
		{ 1, 0x80000001, KVSCRATCH_DTYPE_F16, 0, -EINVAL },
		{ 1, 0xffffffff, KVSCRATCH_DTYPE_U8, 0, -EINVAL },
		{ 1, 0xffffffe0, KVSCRATCH_DTYPE_MXINT8, 0, -EINVAL },
		{ 1, 0x40000020, KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_F32, -EINVAL },
		{ 1, 0x20000001, KVSCRATCH_DTYPE_I8, KVSCRATCH_DTYPE_F64, -EINVAL },
		/* few rows in 32 bits */
		{ 1ull << 32, 1, KVSCRATCH_DTYPE_U8, 0, -EINVAL },
		{ (1ull << 32) + 1, 1, KVSCRATCH_DTYPE_U8, 0, -EINVAL },
		{ 1ull << 63 | 1, 1, KVSCRATCH_DTYPE_U8, 0, -EINVAL },
		/* a pad that is small in 32 bits */
		{ 0x10001, 0x10000, KVSCRATCH_DTYPE_U8, 0, -EDQUOT },
		{ 0x1000001, 0x100, KVSCRATCH_DTYPE_U8, 0, -EDQUOT },
		{ 0x80000001, 1, KVSCRATCH_DTYPE_F16, 0, -EDQUOT },
		{ 0xffffffff, 1, KVSCRATCH_DTYPE_U8, 0, -EDQUOT },
		{ 0x8000001, 32, KVSCRATCH_DTYPE_MXINT8, 0, -EDQUOT },
	};

	set_limits(64 * MIB, 64 * MIB);
	for (size_t i = 0; i < ARRAY_SIZE(shapes); i++) {
		EXPECT_EQ(shapes[i].err,
			  device_create_scaled(shapes[i].rows, shapes[i].dim, shapes[i].dtype,
					       shapes[i].input_dtype, 0))
			TH_LOG("shape %zu", i);
	}
}

TEST_F_TIMEOUT(security, module_parameter_overflow, TEST_SECONDS)
{
	const uint64_t limits[] = {
		1ull << 32, (1ull << 32) + 1, 1ull << 52, INT64_MAX, 1ull << 63, UINT64_MAX,
	};

	for (size_t i = 0; i < ARRAY_SIZE(limits); i++) {
		int small;

		set_limits(limits[i], limits[i]);
		small = new_pad(1, 1);
		EXPECT_LE(0, small)
			TH_LOG("limit %#llx", (unsigned long long)limits[i]);
		/* 2^56 bytes */
		EXPECT_EQ(limits[i] < 1ull << 56 ? -EDQUOT : -ENOMEM,
			  device_create(KVSCRATCH_MAX_SEQ_LEN, KVSCRATCH_MAX_ROW_BYTES,
					KVSCRATCH_DTYPE_U8))
			TH_LOG("limit %#llx", (unsigned long long)limits[i]);
		close(small);
	}
}

/* Sums over planes: each is small enough, and all together are not. */
TEST_F_TIMEOUT(security, planes_overflow_at_create, TEST_SECONDS)
{
	struct kvscratch_plane *planes = calloc(KVSCRATCH_MAX_PLANES, sizeof(*planes));

	ASSERT_NE(NULL, planes);
	set_limits(64 * MIB, 64 * MIB);
	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++) {
		planes[i].dim = KVSCRATCH_MAX_ROW_BYTES / KVSCRATCH_MAX_PLANES;
		planes[i].dtype = KVSCRATCH_DTYPE_U8;
	}
	/* 2^56 bytes, in whatever order they are summed up */
	EXPECT_EQ(-EDQUOT, device_create_planes(KVSCRATCH_MAX_SEQ_LEN, planes,
						KVSCRATCH_MAX_PLANES));
	planes[KVSCRATCH_MAX_PLANES / 2].dim++;
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, KVSCRATCH_MAX_PLANES));
	planes[KVSCRATCH_MAX_PLANES / 2].dim--;
	/* a token that is small as it is stored, and not as it is appended */
	planes[0].dtype = KVSCRATCH_DTYPE_I8;
	planes[0].input_dtype = KVSCRATCH_DTYPE_F16;
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, KVSCRATCH_MAX_PLANES));
	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++)
		planes[i] = (struct kvscratch_plane) {
			.dim = KVSCRATCH_MAX_ROW_BYTES, .dtype = KVSCRATCH_DTYPE_F64,
		};
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, KVSCRATCH_MAX_PLANES));
	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++)
		planes[i] = (struct kvscratch_plane) {
			.dim = KVSCRATCH_MAX_ROW_BYTES, .dtype = KVSCRATCH_DTYPE_U8,
		};
	/* 2^36 bytes: 2^32 would fit into the sum of a u32 as 0 */
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, KVSCRATCH_MAX_PLANES));
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, 256));
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, 0));
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, KVSCRATCH_MAX_PLANES + 1));
	EXPECT_EQ(-EINVAL, device_create_planes(1, planes, UINT32_MAX));
	free(planes);
}

/* Numbers of ioctls: all of the magic, and ours of all others */

static bool is_ours(unsigned int cmd)
{
	return cmd >= KVSCRATCH_IOC_CREATE && cmd <= KVSCRATCH_IOC_PLANES;
}

TEST_F_TIMEOUT(security, ioctl_number_speculation, TEST_SECONDS)
{
	const unsigned int sizes[] = {
		0, 4, sizeof(struct kvscratch_create), sizeof(struct kvscratch_pad_info), 0x3fff,
	};
	int node = device_open(O_RDWR);

	ASSERT_LE(0, node);
	for (unsigned int dir = 0; dir < 4; dir++) {
		for (unsigned int nr = 0; nr < 256; nr++) {
			for (size_t i = 0; i < ARRAY_SIZE(sizes); i++) {
				unsigned int cmd = _IOC(dir, KVSCRATCH_IOC_MAGIC, nr, sizes[i]);
				struct kvscratch_pad_info info = { .size = sizeof(info) };

				if (is_ours(cmd))
					continue;
				EXPECT_ERRNO(ENOTTY, ioctl(self->pad, cmd, &info));
				EXPECT_ERRNO(ENOTTY, ioctl(node, cmd, &info));
			}
		}
	}
	/* but for 0, which the VFS has uses for */
	for (unsigned int magic = 1; magic < 256; magic++) {
		for (unsigned int nr = 0; nr < 10; nr++) {
			struct kvscratch_pad_info info = { .size = sizeof(info) };

			if (magic != KVSCRATCH_IOC_MAGIC) {
				EXPECT_ERRNO(ENOTTY, ioctl(self->pad, _IO(magic, nr), &info));
			}
		}
	}
	close(node);
	EXPECT_TRUE(is_as_it_was(self));
}

/*
 * Arguments that change while the kernel reads them: the first page is shared with
 * the test, at the second the caller is stopped until the test lets it go on.
 */

struct straddle {
	uint8_t *shared;
	uint8_t *stopping;
	struct child child;
	int faults;
};

/* Call @act(@at) in a child until it stops; false without userfaultfd. */
static bool stop_in_call(FIXTURE_DATA(security) *self, struct straddle *straddle,
			 int (*act)(int fd, void *at), int fd, size_t before)
{
	const char *name = "faults";
	char text[16];

	if (start_child(&straddle->child)) {
		int faults = stop_at(straddle->stopping, self->page);

		/* a copy begins with what is there; it is shared, so a fork has none of it */
		(void)*(volatile uint8_t *)straddle->shared;
		CHILD_CHECK(!kvscratch_send_handles(straddle->child.line, &name, &faults, 1));
		_exit(-act(fd, straddle->stopping - before));
	}
	return kvscratch_receive_handles(straddle->child.line, text, sizeof(text),
					 &straddle->faults, 1) == 1 &&
	       await_stop(straddle->faults);
}

/* Let it go on with zeros in the second page; what the call returned */
static int go_on(FIXTURE_DATA(security) *self, struct straddle *straddle)
{
	struct uffdio_zeropage zero = {
		.range = { .start = (uintptr_t)straddle->stopping, .len = self->page },
	};
	int err = ioctl(straddle->faults, UFFDIO_ZEROPAGE, &zero) ? -EIO : 0;
	int status = end_child(&straddle->child);

	close(straddle->faults);
	return err ? err : -status;
}

static bool make_straddle(FIXTURE_DATA(security) *self, struct straddle *straddle)
{
	straddle->shared = mmap(NULL, 2 * self->page, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	straddle->stopping = straddle->shared + self->page;
	return straddle->shared != MAP_FAILED &&
	       mmap(straddle->shared, self->page, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == straddle->shared;
}

#define NEED_USERFAULTFD() do { \
	int __probe = syscall(SYS_userfaultfd, O_CLOEXEC); \
	\
	if (__probe < 0 && errno == ENOSYS) \
		SKIP(return, "the kernel has no userfaultfd"); \
	close(__probe); \
} while (0)

static int truncate_as_told(int fd, void *at)
{
	return ioctl(fd, KVSCRATCH_IOC_TRUNCATE, at) ? -errno : 0;
}

TEST_F_TIMEOUT(security, double_fetch_of_a_struct, TEST_SECONDS)
{
	/* as the struct would shrink, grow, and be anything */
	const uint32_t flips[] = { 0, 8, sizeof(struct kvscratch_truncate) + 8, 4096, UINT32_MAX };
	struct straddle straddle;

	NEED_USERFAULTFD();
	for (size_t i = 0; i < ARRAY_SIZE(flips); i++) {
		struct kvscratch_truncate *truncate;

		ASSERT_TRUE(make_straddle(self, &straddle));
		truncate = (struct kvscratch_truncate *)straddle.stopping - 1;
		/* a longer struct, whose tail is looked at first */
		truncate->size = sizeof(*truncate) + 16;
		truncate->len = COMMITTED;
		ASSERT_TRUE(stop_in_call(self, &straddle, truncate_as_told, self->pad,
					 sizeof(*truncate)));
		__atomic_store_n(&truncate->size, flips[i], __ATOMIC_SEQ_CST);
		EXPECT_EQ(0, go_on(self, &straddle))
			TH_LOG("size became %u", flips[i]);
		EXPECT_EQ(COMMITTED, len_of(self->pad));
		EXPECT_EQ(i + 1, generation_of(self->pad));
		munmap(straddle.shared, 2 * self->page);
	}
}

#define SIZE_FLIPS 300000

/*
 * What is written back goes by a size, too, and nothing stops a caller between two looks
 * at it: so often that a second look would see another.
 */
TEST_F_TIMEOUT(security, double_fetch_of_size, TEST_SECONDS)
{
	static const uint32_t sizes[] = { sizeof(struct kvscratch_pad_info), 4096, UINT32_MAX };
	uint8_t *end = mmap(NULL, 2 * self->page, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct kvscratch_pad_info *info;
	unsigned int told = 0, refused = 0;
	struct child child;

	ASSERT_NE(MAP_FAILED, (void *)end);
	end += self->page;
	ASSERT_EQ(0, mprotect(end, self->page, PROT_NONE));
	info = (struct kvscratch_pad_info *)end - 1;
	info->size = sizeof(*info);
	/* one a round: QEMU stops who runs at the beginning of a block of code, always the same */
	if (start_child(&child))
		for (unsigned int i = 0;; i++)
			__atomic_store_n(&info->size, sizes[i % ARRAY_SIZE(sizes)],
					 __ATOMIC_RELAXED);
	/* where both take turns on one core, it can be long until another size is seen */
	for (unsigned int i = 0; i < SIZE_FLIPS || !told || !refused; i++) {
		errno = 0;
		if (ioctl(self->pad, KVSCRATCH_IOC_INFO, info))
			refused++;
		else
			told++;
		/*
		 * A tail that is cleared, of which there is nothing, or far too long; or 0, when the
		 * size came between two bytes of the one that the call wrote back.
		 */
		EXPECT_TRUE(!errno || errno == EFAULT || errno == E2BIG || errno == EINVAL)
			TH_LOG("errno %d", errno);
	}
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	EXPECT_EQ(COMMITTED, info->len);
	munmap(end - self->page, 2 * self->page);
}

static int append_floats(int fd, void *at)
{
	return device_append(fd, at, 64 * sizeof(float));
}

TEST_F_TIMEOUT(security, double_fetch_of_rows, TEST_SECONDS)
{
	const size_t before = 32 * sizeof(float);
	int fd = device_create_scaled(4, 64, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_F32, 0);
	struct straddle straddle;
	int16_t row[64];
	float *floats;

	NEED_USERFAULTFD();
	ASSERT_LE(0, fd);
	ASSERT_TRUE(make_straddle(self, &straddle));
	floats = (float *)(straddle.stopping - before);
	for (int i = 0; i < 32; i++)
		floats[i] = i + 1;
	ASSERT_TRUE(stop_in_call(self, &straddle, append_floats, fd, before));
	/* what was copied counts, not what is there when it is converted */
	for (int i = 0; i < 16; i++)
		floats[i] = __builtin_nanf("");
	EXPECT_EQ(0, go_on(self, &straddle));
	ASSERT_EQ(sizeof(row), pread(fd, row, sizeof(row), 0));
	for (int i = 0; i < 64; i++) {
		EXPECT_EQ(i < 32 ? i + 1 : 0, row[i]);
	}
	munmap(straddle.shared, 2 * self->page);
	close(fd);
}

/* A source that is the destination, through another mapping */
TEST_F_TIMEOUT(security, append_of_the_view_itself, TEST_SECONDS)
{
	ASSERT_EQ(0, device_append(self->pad, view_row(&self->view, 1), 2 * ROW_BYTES));
	EXPECT_TRUE(row_is(view_row(&self->view, COMMITTED), ROW_BYTES, 1));
	EXPECT_TRUE(row_is(view_row(&self->view, COMMITTED + 1), ROW_BYTES, 2));
	ASSERT_EQ(0, device_append(self->pad, view_row(&self->view, COMMITTED + 2), ROW_BYTES));
	EXPECT_TRUE(all_zero(view_row(&self->view, COMMITTED + 2), ROW_BYTES));
	ASSERT_EQ(0, device_truncate(self->pad, COMMITTED, KVSCRATCH_TRUNCATE_ZERO));
	/* from what is scrubbed into itself, and from beyond the rows */
	ASSERT_EQ(0, device_append(self->pad, view_row(&self->view, COMMITTED - 1),
				      3 * ROW_BYTES));
	EXPECT_EQ(ROWS, len_of(self->pad));
	for (uint32_t row = 0; row < COMMITTED; row++) {
		EXPECT_TRUE(row_is(view_row(&self->view, row), ROW_BYTES, row));
	}
}

/* Waiting for what goes away */

/* Until the kernel has looked up the descriptor and sleeps */
static void await_poll(pid_t pid)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d/syscall", pid);
	while (number_in_file(path, NULL) != SYS_ppoll)
		sched_yield();
}

TEST_F_TIMEOUT(security, epoll_outlives_handle, TEST_SECONDS)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLPRI };
	struct io_uring_sqe poll_add = { .opcode = IORING_OP_POLL_ADD, .poll_events = POLLIN };
	struct pollfd poll_fd = { .events = POLLIN };
	struct ring ring;
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	int pad, reader, copy, writer;
	pid_t pid;

	ASSERT_LE(0, epoll);
	/* the last handle of its pad goes */
	pad = new_pad(ROWS, ROW_BYTES);
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, pad, &event));
	close(pad);
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));

	/* one handle of two; a copy of the descriptor keeps the file */
	pad = new_pad(ROWS, ROW_BYTES);
	reader = device_open_reader(pad);
	copy = dup(reader);
	event.events = EPOLLIN | EPOLLPRI;
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, reader, &event));
	close(reader);
	ASSERT_EQ(0, append_rows(pad, ROW_BYTES, 0, 1));
	EXPECT_EQ(1, epoll_wait(epoll, &event, 1, -1));
	close(copy);
	ASSERT_EQ(0, append_rows(pad, ROW_BYTES, 1, 1));
	EXPECT_EQ(0, epoll_wait(epoll, &event, 1, 0));

	/* a handle in two epoll instances, one inside the other, that go first */
	reader = device_open_reader(pad);
	copy = epoll_create1(EPOLL_CLOEXEC);
	event.events = EPOLLIN;
	ASSERT_EQ(0, epoll_ctl(copy, EPOLL_CTL_ADD, reader, &event));
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, reader, &event));
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, copy, &event));
	close(copy);
	close(epoll);
	ASSERT_EQ(0, append_rows(pad, ROW_BYTES, 2, 1));

	/* somebody sleeps in poll() while the descriptor is closed */
	ASSERT_EQ(0, device_truncate(pad, 0, 0));
	ASSERT_EQ(0, device_seen(reader, 1ull << 32));
	poll_fd.fd = reader;
	pid = fork_sharing_descriptors();
	ASSERT_LE(0, pid);
	if (!pid) {
		CHILD_CHECK(syscall(SYS_ppoll, &poll_fd, 1, NULL, NULL, 0) == 1);
		/* it woke up and looked the descriptor up again */
		CHILD_CHECK(poll_fd.revents == POLLNVAL);
		_exit(0);
	}
	await_poll(pid);
	close(reader);
	ASSERT_EQ(0, append_rows(pad, ROW_BYTES, 0, 1));
	EXPECT_EQ(0, wait_for(pid));

	/* and a request of a ring that waits for the pad */
	ASSERT_EQ(0, device_truncate(pad, 0, 0));
	reader = device_open_reader(pad);
	ASSERT_EQ(0, device_seen(reader, 2ull << 32));
	ASSERT_EQ(0, ring_open(&ring));
	poll_add.fd = reader;
	*ring.sqe = poll_add;
	ring.sq_array[0] = 0;
	__atomic_store_n(ring.sq_tail, *ring.sq_tail + 1, __ATOMIC_RELEASE);
	/* first, for of those that wait the last is woken first */
	epoll = epoll_create1(EPOLL_CLOEXEC);
	event.events = EPOLLOUT | EPOLLET;
	ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, pad, &event));
	ASSERT_EQ(1, epoll_wait(epoll, &event, 1, 0));
	ASSERT_EQ(1, syscall(__NR_io_uring_enter, ring.fd, 1, 0, 0, NULL, 0));
	close(reader);
	/* all are woken for news that are none to it */
	writer = device_open_writer(pad, 0);
	ASSERT_LE(0, writer);
	close(writer);
	ASSERT_EQ(1, epoll_wait(epoll, &event, 1, -1));
	EXPECT_EQ(*ring.cq_head, __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE));
	close(epoll);
	ASSERT_EQ(0, append_rows(pad, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, syscall(__NR_io_uring_enter, ring.fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0));
	EXPECT_EQ(POLLIN, ring.cqes[0].res);
	ring_close(&ring);
	close(pad);
}

/* What memory shows */

TEST_F_TIMEOUT(security, status_page_carries_nothing_else, TEST_SECONDS)
{
	union {
		struct kvscratch_status status;
		uint8_t bytes[4096];
	} expected;

	ASSERT_EQ(sizeof(expected), self->page);
	for (uint32_t i = 1; i <= 64; i++) {
		struct kvscratch_view view;
		uint8_t rows[3 * 64] = { 0 };
		int pad;

		ASSERT_TRUE(i % 16 != 1 || dirty_memory());
		pad = new_pad(i + 3, 64);
		ASSERT_LE(0, pad);
		ASSERT_EQ(0, device_map(pad, &view));
		memset(&expected, 0, sizeof(expected));
		expected.status.magic = KVSCRATCH_STATUS_MAGIC;
		expected.status.version = KVSCRATCH_STATUS_VERSION;
		expected.status.max_seq_len = i + 3;
		expected.status.nr_planes = 1;
		expected.status.row_bytes = 64;
		EXPECT_EQ(0, memcmp(view.status, &expected, sizeof(expected)));
		ASSERT_EQ(0, device_append(pad, rows, sizeof(rows)));
		ASSERT_EQ(0, device_truncate(pad, 2, 0));
		ASSERT_EQ(0, device_append(pad, rows, 64));
		expected.status.state.word = 1ull << 32 | 3;
		expected.status.trunc.word = 1ull << 32 | 2;
		expected.status.generation = 1;
		EXPECT_EQ(0, memcmp(view.status, &expected, sizeof(expected)));
		/* a writer of the second epoch, and what is sealed by it */
		for (int epoch = 1; epoch <= 2; epoch++) {
			int writer = device_open_writer(pad, 0);

			ASSERT_LE(0, writer);
			expected.status.writer.word = (uint64_t)epoch << 32 | KVSCRATCH_PAD_WRITER;
			EXPECT_EQ(0, memcmp(view.status, &expected, sizeof(expected)));
			if (epoch == 2) {
				ASSERT_EQ(0, device_seal(writer));
				expected.status.writer.word |= KVSCRATCH_PAD_SEALED;
				EXPECT_EQ(0, memcmp(view.status, &expected, sizeof(expected)));
			}
			close(writer);
			expected.status.writer.word &= ~(uint64_t)KVSCRATCH_PAD_WRITER;
			EXPECT_EQ(0, memcmp(view.status, &expected, sizeof(expected)));
		}
		device_unmap(&view);
		close(pad);
	}
}

/* Both planes and what follows them up to a page, before and after */
TEST_F_TIMEOUT(security, planes_show_nothing_else, TEST_SECONDS)
{
	const uint32_t rows = 77, dim = 96, record = dim + dim / KVSCRATCH_MX_BLOCK;
	uint8_t *ones = malloc(rows * record);
	struct kvscratch_view view;
	const uint8_t *data, *scales;
	int pad;

	ASSERT_NE(NULL, ones);
	memset(ones, 0xff, rows * record);
	ASSERT_TRUE(dirty_memory());
	pad = device_create(rows, dim, KVSCRATCH_DTYPE_MXINT8);
	ASSERT_LE(0, pad);
	ASSERT_EQ(0, device_map(pad, &view));
	data = view.data;
	scales = kvscratch_view_scales(&view);
	EXPECT_TRUE(all_zero(data, view_data_bytes(&view)));

	ASSERT_EQ(0, device_append(pad, ones, rows * record));
	EXPECT_EQ(0, memcmp(data, ones, rows * dim));
	EXPECT_TRUE(all_zero(data + rows * dim, kvscratch_view_plane(&view, 0)->scales_offset - rows * dim));
	EXPECT_EQ(0, memcmp(scales, ones, rows * dim / KVSCRATCH_MX_BLOCK));
	EXPECT_TRUE(all_zero(scales + rows * dim / KVSCRATCH_MX_BLOCK, view_data_bytes(&view) -
			     kvscratch_view_plane(&view, 0)->scales_offset - rows * dim / KVSCRATCH_MX_BLOCK));

	ASSERT_EQ(0, device_truncate(pad, 0, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_TRUE(all_zero(data, view_data_bytes(&view)));
	device_unmap(&view);
	close(pad);
	free(ones);
}

/* The kernel, asked to write where the caller cannot */
TEST_F_TIMEOUT(security, kernel_writes_into_a_view, TEST_SECONDS)
{
	uint8_t *at = (uint8_t *)self->view.data;
	uint8_t row[ROW_BYTES] = { 0 };
	struct iovec target = { .iov_base = at, .iov_len = 16 };
	struct io_uring_sqe read_in = {
		.opcode = IORING_OP_READ, .addr = (uintptr_t)at, .len = 16, .off = 0,
	};
	struct kvscratch_pad_info *request = (struct kvscratch_pad_info *)row;
	struct ring ring;
	uint32_t word = 0;
	int socks[2], pipes[2];
	int file = syscall(SYS_memfd_create, "bytes", 1);

	ASSERT_LE(0, file);
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, socks));
	ASSERT_EQ(0, pipe(pipes));
	ASSERT_EQ(ROW_BYTES, write(file, row, ROW_BYTES));
	ASSERT_EQ(16, write(socks[0], row, 16));
	ASSERT_EQ(16, write(pipes[1], row, 16));
	EXPECT_ERRNO(EFAULT, pread(file, at, 16, 0));
	EXPECT_ERRNO(EFAULT, preadv(file, &target, 1, 0));
	EXPECT_ERRNO(EFAULT, recv(socks[1], at, 16, 0));
	EXPECT_ERRNO(EFAULT, read(pipes[0], at, 16));
	EXPECT_ERRNO(EFAULT, syscall(SYS_getrandom, at, 16, 0));
	EXPECT_ERRNO(EFAULT, pread(self->pad, at, 16, ROW_BYTES));
	EXPECT_ERRNO(EFAULT, syscall(FUTEX, &word, FUTEX_WAKE_OP, 1, 1, at,
				     FUTEX_OP(FUTEX_OP_SET, 1, FUTEX_OP_CMP_EQ, 0)));
	EXPECT_ERRNO(EFAULT, syscall(FUTEX, &word, FUTEX_WAKE_OP_PRIVATE, 1, 1, at,
				     FUTEX_OP(FUTEX_OP_SET, 1, FUTEX_OP_CMP_EQ, 0)));
	/* our own output */
	request->size = sizeof(*request);
	ASSERT_EQ(0, device_append(self->pad, row, ROW_BYTES));
	EXPECT_ERRNO(EFAULT, ioctl(self->pad, KVSCRATCH_IOC_INFO, at + COMMITTED * ROW_BYTES));
	EXPECT_EQ(0, memcmp(at + COMMITTED * ROW_BYTES, row, ROW_BYTES));
	ASSERT_EQ(COMMITTED + 1, len_of(self->pad));

	ASSERT_EQ(0, ring_open(&ring));
	read_in.fd = file;
	EXPECT_EQ(-EFAULT, ring_do(&ring, &read_in));
	/* pinned for writing, which a registered buffer always is */
	EXPECT_EQ(-1, syscall(__NR_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &target, 1));
	ring_close(&ring);
	for (uint32_t i = 0; i < COMMITTED; i++) {
		EXPECT_TRUE(row_is(view_row(&self->view, i), ROW_BYTES, i));
	}
	EXPECT_EQ(COMMITTED + 1, kvscratch_view_state(&self->view));
	for (int i = 0; i < 2; i++) {
		close(socks[i]);
		close(pipes[i]);
	}
	close(file);
}

TEST_F_TIMEOUT(security, another_process_writes_into_a_view, TEST_SECONDS)
{
	uint8_t *at = (uint8_t *)self->view.data;
	uint64_t word = 0;
	struct iovec from = { .iov_base = &word, .iov_len = sizeof(word) };
	struct iovec to = { .iov_base = at, .iov_len = sizeof(word) };
	struct child child;
	char path[32];
	int mem;

	if (start_child(&child)) {
		CHILD_CHECK(say(child.line));
		hear(child.line);
		_exit(0);
	}
	ASSERT_TRUE(hear(child.line));
	snprintf(path, sizeof(path), "/proc/%d/mem", child.pid);
	mem = open(path, O_RDWR | O_CLOEXEC);
	ASSERT_LE(0, mem);
	/* control: its stack may be written */
	EXPECT_EQ(sizeof(word), pwrite64(mem, &word, sizeof(word), (uintptr_t)&word));
	EXPECT_ERRNO(EIO, pwrite64(mem, &word, sizeof(word), (uintptr_t)at));
	EXPECT_ERRNO(EFAULT, process_vm_writev(child.pid, &from, 1, &to, 1, 0));
	ASSERT_EQ(0, ptrace(PTRACE_ATTACH, child.pid, NULL, NULL));
	ASSERT_EQ(child.pid, waitpid(child.pid, NULL, 0));
	EXPECT_ERRNO(EIO, ptrace(PTRACE_POKEDATA, child.pid, at, NULL));
	EXPECT_ERRNO(EIO, ptrace(PTRACE_POKEDATA, child.pid, self->view.status, NULL));
	EXPECT_EQ(0, ptrace(PTRACE_DETACH, child.pid, NULL, NULL));
	close(mem);
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(is_as_it_was(self));
}

/* Advice that would free, fill, dump, share or write pages of the pad */
TEST_F_TIMEOUT(security, advice_on_a_view, TEST_SECONDS)
{
	/* refused: FREE, REMOVE, DODUMP, WIPEONFORK, POPULATE_WRITE */
	const int refused[] = { 8, 9, 17, 18, 23 };
	/* no matter: WILLNEED, MERGEABLE, HUGEPAGE, COLD, PAGEOUT, COLLAPSE */
	const int harmless[] = { 3, 12, 14, 20, 21, 25 };
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct kvscratch_view view;
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC);

	ASSERT_EQ(0, device_map(self->reader, &view));
	for (size_t i = 0; i < ARRAY_SIZE(refused); i++) {
		EXPECT_EQ(-1, madvise((void *)view.data, self->page, refused[i]))
			TH_LOG("advice %d", refused[i]);
	}
	for (size_t i = 0; i < ARRAY_SIZE(harmless); i++) {
		madvise((void *)view.data, self->page, harmless[i]);
		EXPECT_TRUE(is_as_it_was(self));
		EXPECT_TRUE(row_is(view.data, ROW_BYTES, 0))
			TH_LOG("advice %d", harmless[i]);
	}
	if (uffd >= 0) {
		ASSERT_EQ(0, ioctl(uffd, UFFDIO_API, &api));
		range.range.start = (uintptr_t)view.data;
		range.range.len = self->page;
		EXPECT_ERRNO(EINVAL, ioctl(uffd, UFFDIO_REGISTER, &range));
		close(uffd);
	}
	device_unmap(&view);
}

TEST_F_TIMEOUT(security, read_implies_exec, TEST_SECONDS)
{
	struct child child;

	if (start_child(&child)) {
		const uint8_t *view;

		CHILD_CHECK(personality(READ_IMPLIES_EXEC) >= 0);
		view = mmap(NULL, self->page, PROT_READ, MAP_SHARED, self->reader, 0);
		CHILD_CHECK(view != MAP_FAILED && row_is(view, ROW_BYTES, 0));
		CHILD_CHECK(mprotect((void *)view, self->page, PROT_READ | PROT_EXEC) &&
			    errno == EACCES);
		CHILD_CHECK(mmap(NULL, self->page, PROT_READ | PROT_EXEC, MAP_SHARED,
				 self->reader, 0) == MAP_FAILED && errno == EPERM);
		/* runs what it jumps to, where that may be run */
		((void (*)(void))view)();
	}
	EXPECT_EQ(128 + SIGSEGV, end_child(&child));
}

/* What was handed out for reading stays so, and no call for files changes a pad. */
TEST_F_TIMEOUT(security, access_mode_is_fixed, TEST_SECONDS)
{
	uint8_t row[ROW_BYTES] = { 0 };
	int pipes[2], null = open("/dev/null", O_RDWR | O_CLOEXEC);

	ASSERT_LE(0, null);
	ASSERT_EQ(0, pipe(pipes));
	EXPECT_EQ(0, fcntl(self->reader, F_SETFL, O_RDWR | O_APPEND | O_NONBLOCK));
	EXPECT_EQ(O_RDONLY, fcntl(self->reader, F_GETFL) & O_ACCMODE);
	EXPECT_ERRNO(EBADF, write(self->reader, row, ROW_BYTES));
	EXPECT_EQ(-EACCES, device_truncate(self->reader, 0, 0));
	EXPECT_ERRNO(EINVAL, fcntl(self->pad, F_SETFL, O_DIRECT));
	EXPECT_ERRNO(EINVAL, ftruncate(self->pad, 0));
	EXPECT_ERRNO(EINVAL, ftruncate(self->reader, 0));
	EXPECT_EQ(-1, fallocate(self->pad, 0, 0, ROW_BYTES));
	EXPECT_EQ(-1, fallocate(self->pad, 3, 0, ROW_BYTES));
	ASSERT_EQ(ROW_BYTES, write(pipes[1], row, ROW_BYTES));
	EXPECT_ERRNO(EINVAL, splice(pipes[0], NULL, self->pad, NULL, ROW_BYTES, 0));
	EXPECT_ERRNO(EINVAL, splice(self->pad, NULL, pipes[1], NULL, ROW_BYTES, 0));
	EXPECT_ERRNO(EINVAL, sendfile(null, self->pad, NULL, ROW_BYTES));
	EXPECT_TRUE(is_as_it_was(self));
	close(pipes[0]);
	close(pipes[1]);
	close(null);
}

/* Containers: no node, no rights, many processes */

static void use_passed_handle(FIXTURE_DATA(security) *self)
{
	struct kvscratch_view view;
	uint8_t row[ROW_BYTES];

	CHILD_CHECK(!device_map(self->reader, &view));
	CHILD_CHECK(row_is(view_row(&view, 4), ROW_BYTES, 4));
	CHILD_CHECK(pread(self->reader, row, ROW_BYTES, ROW_BYTES) == ROW_BYTES);
	CHILD_CHECK(row_is(row, ROW_BYTES, 1));
	CHILD_CHECK(len_of(self->reader) == COMMITTED);
	device_unmap(&view);
}

/* No way to a handle that is not handed over */
static void find_no_other_handle(FIXTURE_DATA(security) *self)
{
	const int accesses[] = { O_RDONLY, O_WRONLY, O_RDWR };
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", self->reader);
	for (size_t i = 0; i < ARRAY_SIZE(accesses); i++) {
		CHILD_CHECK(device_open(accesses[i]) == -EACCES);
		CHILD_CHECK(open(path, accesses[i]) == -1 && errno == EACCES);
		/* a handle gives no more than it has */
		CHILD_CHECK(accesses[i] == O_RDONLY ||
			    device_reopen(self->reader, accesses[i]) == -EACCES);
	}
	CHILD_CHECK(device_open_writer(self->reader, 0) == -EACCES);
	CHILD_CHECK(device_open_writer(self->reader, KVSCRATCH_OPEN_TAKEOVER) == -EACCES);
	CHILD_CHECK(mknod("/tmp/kvscratch", S_IFCHR | 0666, self->node.st_rdev) == -1 &&
		    errno == EPERM);
	CHILD_CHECK(open(MAX_TOTAL, O_WRONLY) == -1 && errno == EACCES);
}

TEST_F_TIMEOUT(security, no_node_no_pads, TEST_SECONDS)
{
	struct child child;

	EXPECT_EQ(0600, self->node.st_mode & 07777);
	if (start_child(&child)) {
		int parent;

		close(self->pad);
		become_nobody();
		find_no_other_handle(self);
		/* pidfd_open() and pidfd_getfd(): it takes the right to trace */
		parent = syscall(434, getppid(), 0);
		CHILD_CHECK(parent >= 0);
		CHILD_CHECK(syscall(438, parent, self->pad, 0) == -1 && errno == EPERM);
		use_passed_handle(self);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(is_as_it_was(self));
}

TEST_F_TIMEOUT(security, root_of_a_user_namespace_is_nobody, TEST_SECONDS)
{
	struct child child;

	if (access("/proc/self/ns/user", F_OK))
		SKIP(return, "the kernel has no user namespaces");
	if (start_child(&child)) {
		close(self->pad);
		become_nobody();
		CHILD_CHECK(!unshare(CLONE_NEWUSER));
		write_file("/proc/self/uid_map", "0 65534 1");
		write_file("/proc/self/setgroups", "deny");
		write_file("/proc/self/gid_map", "0 65534 1");
		CHILD_CHECK(getuid() == 0);
		find_no_other_handle(self);
		use_passed_handle(self);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_TRUE(is_as_it_was(self));
}

#define FLOODERS 4
#define FLOOD_BYTES (256 * 1024)

/* Pads that each got, and what ended it; shared with the flooders */
struct flood {
	unsigned int pads[FLOODERS];
	int err[FLOODERS];
};

static void create_until_refused(struct child *child, const char *cgroup, struct flood *shared,
				 int me)
{
	join_cgroup(cgroup);
	become_nobody();
	for (;;) {
		int fd = new_pad(FLOOD_BYTES / 4096, 4096);

		if (fd < 0) {
			shared->err[me] = fd;
			break;
		}
		shared->pads[me]++;
	}
	CHILD_CHECK(say(child->line));
	hear(child->line);
	_exit(0);
}

/*
 * Pads that a flood of four unprivileged processes gets, of which each is refused
 * with @err. In a full cgroup one may also be killed: what Linux itself takes for
 * an open file or a message is no pad, and calls the cgroup's OOM killer.
 */
static unsigned int flood_with_pads(struct __test_metadata *_metadata,
				    FIXTURE_DATA(security) *self, int err)
{
	struct flood *flood = mmap(NULL, sizeof(*flood), PROT_READ | PROT_WRITE,
				   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct child flooders[FLOODERS];
	unsigned int pads = 0, killed = 0;

	for (int i = 0; i < FLOODERS; i++)
		if (start_child(&flooders[i]))
			create_until_refused(&flooders[i], self->cgroup, flood, i);
	for (int i = 0; i < FLOODERS; i++) {
		if (hear(flooders[i].line)) {
			EXPECT_EQ(err, flood->err[i]);
		}
	}
	/* what exists goes on */
	EXPECT_TRUE(is_as_it_was(self));
	EXPECT_EQ(0, device_truncate(self->pad, COMMITTED - 1, 0));
	EXPECT_EQ(0, append_rows(self->pad, ROW_BYTES, COMMITTED - 1, 1));
	for (int i = 0; i < FLOODERS; i++) {
		int status;

		/* the others hold copies of its line */
		say(flooders[i].line);
		status = end_child(&flooders[i]);
		if (status == 128 + SIGKILL) {
			killed++;
			continue;
		}
		EXPECT_EQ(0, status);
		pads += flood->pads[i];
	}
	munmap(flood, sizeof(*flood));
	EXPECT_EQ(killed, cgroup_number(self->cgroup, "memory.events", "oom_kill"));
	EXPECT_TRUE(charge_falls_below(self->cgroup, 4 * MIB));
	return pads;
}

TEST_F_TIMEOUT(security, unprivileged_flood_meets_the_caps, TEST_SECONDS)
{
	const uint64_t one = charged_bytes(FLOOD_BYTES / 4096, 4096);

	ASSERT_EQ(0, chmod(KVSCRATCH_DEVICE, 0666));
	set_limits(one, 50 * one + charged_bytes(ROWS, ROW_BYTES));
	EXPECT_EQ(50, flood_with_pads(_metadata, self, -EDQUOT));
	EXPECT_EQ(0, cgroup_number(self->cgroup, "memory.events", "oom_kill"));
}

TEST_F_TIMEOUT(security, unprivileged_flood_meets_the_cgroup, TEST_SECONDS)
{
	unsigned int pads;

	ASSERT_EQ(0, chmod(KVSCRATCH_DEVICE, 0666));
	limit_cgroup(self->cgroup, 32 * MIB);
	set_limits(1 << 30, 1 << 30);
	pads = flood_with_pads(_metadata, self, -ENOMEM);
	TH_LOG("a cgroup of 32768 KiB holds %u pads of %u KiB", pads, FLOOD_BYTES / 1024);
	EXPECT_LT(0, pads);
	EXPECT_GE(32 * MIB / FLOOD_BYTES, pads);
	EXPECT_LT(0, cgroup_number(self->cgroup, "memory.events", "max"));
}

/* Handles of either kind are charged, too, and end with the descriptor table. */
TEST_F_TIMEOUT(security, unprivileged_flood_of_handles, TEST_SECONDS)
{
	long long refs = number_in_file(REFCNT, NULL);
	struct child child;

	ASSERT_EQ(0, chmod(KVSCRATCH_DEVICE, 0666));
	if (start_child(&child)) {
		int fd;

		become_nobody();
		for (int i = 0; i < 100; i++)
			CHILD_CHECK(device_open(O_RDWR) >= 0);
		do
			fd = device_open_reader(self->reader);
		while (fd >= 0);
		CHILD_CHECK(fd == -EMFILE);
		CHILD_CHECK(device_open(O_RDWR) == -EMFILE);
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
}

TEST_HARNESS_MAIN
