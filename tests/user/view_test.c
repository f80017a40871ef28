// SPDX-License-Identifier: GPL-2.0-only
/*
 * Views and handles that travel: what may be mapped, what a mapping shows, how
 * long it lives, and what a process can do with a handle it was given.
 */
#include "meters.h"
#include "module.h"

#include <dirent.h>
#include <limits.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define ROW_BYTES 512
#define DATA_PAGES 4

/* The same for a call that must fail with exactly this errno */
#define CHILD_CHECK_ERRNO(error, call) do { \
	errno = 0; \
	CHILD_CHECK((long)(call) == -1 && errno == (error)); \
} while (0)

static unsigned int open_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	unsigned int count = 0;

	if (!dir)
		abort();
	while (readdir(dir))
		count++;
	closedir(dir);
	return count;
}

/* Mapping rules: a handle of every kind, and a half-filled pad of a few pages */

FIXTURE(view) {
	int fd;
	size_t page;
	uint32_t rows;
	uint32_t len;
	struct kvscratch_view view;
};

FIXTURE_SETUP(view) {
	self->page = page_bytes();
	self->rows = DATA_PAGES * self->page / ROW_BYTES;
	self->len = self->rows / 2;
	self->fd = new_pad(self->rows, ROW_BYTES);
	ASSERT_LE(0, self->fd);
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, self->len));
	ASSERT_EQ(0, device_map(self->fd, &self->view));
}

FIXTURE_TEARDOWN(view) {
	device_unmap(&self->view);
	close(self->fd);
}

static const uint8_t *view_row(const struct kvscratch_view *view, uint32_t row)
{
	return (const uint8_t *)view->data + (size_t)row * kvscratch_view_plane(view, 0)->row_bytes;
}

static bool view_rows_are(const struct kvscratch_view *view, uint32_t first, uint32_t end)
{
	for (uint32_t row = first; row < end; row++)
		if (!row_is(view_row(view, row), kvscratch_view_plane(view, 0)->row_bytes, row))
			return false;
	return true;
}

#define EXPECT_MAP_ERRNO(error, prot, flags, fd) \
	EXPECT_ERRNO(error, mmap(NULL, page_bytes(), prot, flags, fd, 0))

TEST_F_TIMEOUT(view, is_never_writable_executable_or_private, TEST_SECONDS)
{
	int reader = device_open_reader(self->fd);

	ASSERT_LE(0, reader);
	EXPECT_MAP_ERRNO(EPERM, PROT_WRITE, MAP_SHARED, self->fd);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
	EXPECT_MAP_ERRNO(EPERM, PROT_EXEC, MAP_SHARED, self->fd);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_EXEC, MAP_SHARED, self->fd);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ, MAP_PRIVATE, self->fd);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_WRITE, MAP_PRIVATE, self->fd);

	EXPECT_MAP_ERRNO(EACCES, PROT_READ | PROT_WRITE, MAP_SHARED, reader);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_EXEC, MAP_SHARED, reader);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ, MAP_PRIVATE, reader);
	EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_WRITE, MAP_PRIVATE, reader);
	close(reader);
}

TEST_F_TIMEOUT(view, needs_a_handle_open_for_read, TEST_SECONDS)
{
	int writer = device_reopen(self->fd, O_WRONLY);
	int node = device_open(O_RDWR);

	ASSERT_LE(0, writer);
	ASSERT_LE(0, node);
	EXPECT_MAP_ERRNO(EACCES, PROT_READ, MAP_SHARED, writer);
	EXPECT_MAP_ERRNO(EACCES, PROT_NONE, MAP_SHARED, writer);
	EXPECT_MAP_ERRNO(ENODEV, PROT_READ, MAP_SHARED, node);
	close(node);
	close(writer);
}

TEST_F_TIMEOUT(view, cannot_be_upgraded, TEST_SECONDS)
{
	void *at = (void *)self->view.data;

	/* the handle is O_RDWR: nothing but the module refuses */
	EXPECT_ERRNO(EACCES, mprotect(at, self->page, PROT_WRITE));
	EXPECT_ERRNO(EACCES, mprotect(at, self->page, PROT_READ | PROT_WRITE));
	EXPECT_ERRNO(EACCES, mprotect(at, self->page, PROT_EXEC));
	EXPECT_ERRNO(EACCES, mprotect(at, self->page, PROT_READ | PROT_EXEC));
	EXPECT_EQ(0, mprotect(at, self->view.mapped_bytes, PROT_NONE));
	EXPECT_ERRNO(EACCES, mprotect(at, self->view.mapped_bytes, PROT_READ | PROT_WRITE));
	EXPECT_EQ(0, mprotect(at, self->view.mapped_bytes, PROT_READ));
	EXPECT_TRUE(view_rows_are(&self->view, 0, self->len));
}

TEST_F_TIMEOUT(view, moves_and_shrinks_but_never_grows, TEST_SECONDS)
{
	const size_t bytes = (DATA_PAGES + 1) * self->page;
	struct kvscratch_view moved = self->view;
	uint8_t *at = mmap(NULL, bytes, PROT_READ, MAP_SHARED, self->fd, 0);
	uint8_t *target = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, (void *)at);
	ASSERT_NE(MAP_FAILED, (void *)target);
	EXPECT_ERRNO(EFAULT, mremap(at, bytes, bytes + self->page, 0));
	EXPECT_ERRNO(EFAULT, mremap(at, bytes, bytes + self->page, MREMAP_MAYMOVE));
	/* an old size of zero asks for a second mapping of shared memory */
	EXPECT_ERRNO(EFAULT, mremap(at, 0, bytes + self->page, MREMAP_MAYMOVE));

	moved.data = mremap(at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	ASSERT_EQ(target, moved.data);
	EXPECT_TRUE(view_rows_are(&moved, 0, self->len));

	ASSERT_EQ(target, mremap(target, bytes, self->page, 0));
	EXPECT_ERRNO(EFAULT, mremap(target, self->page, bytes, MREMAP_MAYMOVE));
	EXPECT_TRUE(view_rows_are(&moved, 0, self->page / ROW_BYTES));
	munmap(target, self->page);
}

TEST_F_TIMEOUT(view, may_be_any_part, TEST_SECONDS)
{
	const size_t all = DATA_PAGES + 1;

	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, self->len, self->rows - self->len));
	for (size_t first = 0; first < all; first++) {
		for (size_t count = 1; count <= all - first; count++) {
			uint8_t *at = mmap(NULL, count * self->page, PROT_READ, MAP_SHARED,
					   self->fd, first * self->page);

			ASSERT_NE(MAP_FAILED, (void *)at)
				TH_LOG("%zu pages at page %zu", count, first);
			EXPECT_EQ(0, memcmp(at, (uint8_t *)self->view.data + first * self->page,
					    count * self->page));
			munmap(at, count * self->page);
		}
	}
	/* that the view they were compared with is right */
	EXPECT_TRUE(view_rows_are(&self->view, 0, self->rows));
	EXPECT_EQ(DATA_PAGES * self->page, view_data_bytes(&self->view));
	EXPECT_EQ(KVSCRATCH_STATUS_MAGIC, self->view.status->magic);
}

TEST_F_TIMEOUT(view, ends_where_the_pad_ends, TEST_SECONDS)
{
	const unsigned long pages = DATA_PAGES + 1;
	/* the last page offsets that the VFS lets through, and 2^32 bytes */
	const unsigned long far[] = {
		ULONG_MAX / 2 / self->page,
		ULONG_MAX / 2 / self->page + 1,
		ULONG_MAX / self->page - 1,
		0x100000000ull / self->page,
#ifdef SYS_mmap2
		ULONG_MAX / 2,
		ULONG_MAX / 2 + 1,
		ULONG_MAX - 1,
#endif
	};

	EXPECT_ERRNO(ENXIO, map_page_offset((pages + 1) * self->page, self->fd, 0));
	EXPECT_ERRNO(ENXIO, map_page_offset(pages * self->page, self->fd, 1));
	EXPECT_ERRNO(ENXIO, map_page_offset(2 * self->page, self->fd, pages - 1));
	EXPECT_ERRNO(ENXIO, map_page_offset(self->page, self->fd, pages));
	EXPECT_ERRNO(ENXIO, map_page_offset(self->page, self->fd, pages + 1));
	EXPECT_ERRNO(ENXIO, map_page_offset(1 << 30, self->fd, 0));
	for (size_t i = 0; i < ARRAY_SIZE(far); i++) {
		EXPECT_EQ(MAP_FAILED, map_page_offset(self->page, self->fd, far[i]));
		EXPECT_EQ(ENXIO, errno)
			TH_LOG("page offset %#lx", far[i]);
	}
}

TEST_F_TIMEOUT(view, refuses_every_write, TEST_SECONDS)
{
	uint8_t *at = (uint8_t *)self->view.data;
	uint64_t state = kvscratch_view_state(&self->view);
	struct iovec from = { .iov_base = &state, .iov_len = sizeof(state) };
	struct iovec to = { .iov_base = at, .iov_len = sizeof(state) };
	struct child child;
	int mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	int zero = open("/dev/zero", O_RDONLY | O_CLOEXEC);

	ASSERT_LE(0, mem);
	ASSERT_LE(0, zero);
	EXPECT_ERRNO(EIO, pwrite64(mem, "x", 1, (uintptr_t)at));
	EXPECT_ERRNO(EIO, pwrite64(mem, "x", 1, (uintptr_t)self->view.status));
	EXPECT_ERRNO(EFAULT, process_vm_writev(getpid(), &from, 1, &to, 1, 0));
	/* the kernel writing for us */
	EXPECT_ERRNO(EFAULT, read(zero, at, 1));
	close(zero);
	close(mem);

	if (start_child(&child)) {
		*(volatile uint8_t *)at = 0;
		_exit(0);
	}
	EXPECT_EQ(128 + SIGSEGV, end_child(&child));
	if (start_child(&child)) {
		*(volatile uint32_t *)&self->view.status->magic = 0;
		_exit(0);
	}
	EXPECT_EQ(128 + SIGSEGV, end_child(&child));

	EXPECT_TRUE(view_rows_are(&self->view, 0, self->len));
	EXPECT_EQ(KVSCRATCH_STATUS_MAGIC, self->view.status->magic);
	EXPECT_EQ(state, kvscratch_view_state(&self->view));
}

/* The lines of /proc/self/smaps that describe the mapping that begins at @at */
static bool find_in_smaps(const void *at, char *line, char *flags, size_t bytes)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char start[20];
	char text[256];
	bool found = false;

	if (!smaps)
		return false;
	snprintf(start, sizeof(start), "%0*lx-", 8, (unsigned long)at);
	while (fgets(text, sizeof(text), smaps)) {
		if (!strncmp(text, start, strlen(start))) {
			snprintf(line, bytes, "%s", text);
			found = true;
		}
		if (found && !strncmp(text, "VmFlags:", 8)) {
			snprintf(flags, bytes, "%s", text + 8);
			break;
		}
	}
	fclose(smaps);
	return found;
}

TEST_F_TIMEOUT(view, says_what_it_is_in_smaps, TEST_SECONDS)
{
	int reader = device_open_reader(self->fd);
	struct kvscratch_pad_info info;
	char line[256], flags[256] = "", name[64];
	const char *const always[] = { " rd ", " mr ", " ms ", " dd ", " de " };
	const char *const never[] = { " wr ", " ex ", " mw ", " me " };

	ASSERT_LE(0, reader);
	ASSERT_EQ(0, device_pad_info(reader, &info));
	for (int i = 0; i < 2; i++) {
		void *at = mmap(NULL, self->page, PROT_READ, MAP_SHARED,
				i ? reader : self->fd, self->page);

		ASSERT_NE(MAP_FAILED, at);
		ASSERT_TRUE(find_in_smaps(at, line, flags, sizeof(line)));
		EXPECT_NE(NULL, strstr(line, " r--s "))
			TH_LOG("%s", line);
		snprintf(name, sizeof(name), " /kvscratch:%llu (deleted)\n",
			 (unsigned long long)info.id);
		EXPECT_NE(NULL, strstr(line, name))
			TH_LOG("%s", line);
		for (size_t j = 0; j < ARRAY_SIZE(always); j++) {
			EXPECT_NE(NULL, strstr(flags, always[j]))
				TH_LOG("no%sin%s", always[j], flags);
		}
		for (size_t j = 0; j < ARRAY_SIZE(never); j++) {
			EXPECT_EQ(NULL, strstr(flags, never[j]))
				TH_LOG("%sin%s", never[j], flags);
		}
		munmap(at, self->page);
	}
	close(reader);
}

/* Programs that call mlockall() or MAP_POPULATE everything get no surprise. */
TEST_F_TIMEOUT(view, may_be_locked_and_populated, TEST_SECONDS)
{
	uint8_t *at = mmap(NULL, self->page, PROT_READ, MAP_SHARED | MAP_POPULATE | MAP_LOCKED,
			   self->fd, 0);

	ASSERT_NE(MAP_FAILED, (void *)at);
	EXPECT_TRUE(row_is(at, ROW_BYTES, 0));
	EXPECT_EQ(0, mlock(self->view.data, self->view.mapped_bytes));
	EXPECT_TRUE(view_rows_are(&self->view, 0, self->len));
	EXPECT_EQ(0, munlock(self->view.data, self->view.mapped_bytes));
	munmap(at, self->page);
}

/* Contents */

TEST_F_TIMEOUT(view, of_a_new_pad_is_zero, TEST_SECONDS)
{
	const size_t bytes = 256 * self->page;
	struct kvscratch_view view;
	uint8_t *dirt = malloc(bytes);
	int fd = new_pad(256, self->page);

	/* The next pad probably gets these pages again. */
	ASSERT_LE(0, fd);
	ASSERT_NE(NULL, dirt);
	memset(dirt, 0xa5, bytes);
	ASSERT_EQ(0, device_append(fd, dirt, bytes));
	close(fd);
	free(dirt);

	/* one byte less than a page a row: the last page has a tail */
	fd = new_pad(256, self->page - 1);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_map(fd, &view));
	EXPECT_TRUE(all_zero(view.data, view_data_bytes(&view)));
	EXPECT_TRUE(all_zero(view.status->reserved, sizeof(view.status->reserved)));
	EXPECT_TRUE(all_zero(view.status->reserved_state, sizeof(view.status->reserved_state)));
	EXPECT_TRUE(all_zero(view.status + 1, self->page - sizeof(*view.status)));
	EXPECT_EQ(0, kvscratch_view_state(&view));
	EXPECT_EQ(0, kvscratch_word_load(&view.status->trunc));
	EXPECT_EQ(0, kvscratch_word_load(&view.status->writer));
	EXPECT_EQ(0, view.status->generation);
	device_unmap(&view);
	close(fd);
}

TEST_F_TIMEOUT(view, status_agrees_with_info, TEST_SECONDS)
{
	struct kvscratch_info info;
	struct kvscratch_view view;
	int fd = device_create(1000, 3, KVSCRATCH_DTYPE_F32);
	uint8_t rows[5][12] = { 0 };
	int writer;

	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_map(fd, &view));
	ASSERT_EQ(0, device_append(fd, rows, sizeof(rows)));
	ASSERT_EQ(0, device_truncate(fd, 2, 0));
	ASSERT_EQ(0, device_append(fd, rows, 2 * sizeof(rows[0])));
	ASSERT_EQ(0, device_info(fd, &info));

	EXPECT_EQ(KVSCRATCH_STATUS_MAGIC, view.status->magic);
	EXPECT_EQ(KVSCRATCH_STATUS_VERSION, view.status->version);
	EXPECT_EQ(info.max_seq_len, view.status->max_seq_len);
	EXPECT_EQ(1000, view.status->max_seq_len);
	EXPECT_EQ(1, view.status->nr_planes);
	EXPECT_EQ(info.row_bytes, view.status->row_bytes);
	EXPECT_EQ(12, view.status->row_bytes);
	EXPECT_EQ(info.generation << 32 | info.len, kvscratch_view_state(&view));
	EXPECT_EQ(1ull << 32 | 4, kvscratch_view_state(&view));
	EXPECT_EQ(info.generation << 32 | info.trunc_len,
		  kvscratch_word_load(&view.status->trunc));
	EXPECT_EQ(1ull << 32 | 2, kvscratch_word_load(&view.status->trunc));
	EXPECT_EQ(1, view.status->generation);
	EXPECT_EQ(0, kvscratch_word_load(&view.status->writer));
	writer = device_open_writer(fd, 0);
	ASSERT_LE(0, writer);
	EXPECT_EQ(1ull << 32 | KVSCRATCH_PAD_WRITER, kvscratch_word_load(&view.status->writer));
	ASSERT_EQ(0, device_seal(writer));
	EXPECT_EQ(1ull << 32 | KVSCRATCH_PAD_WRITER | KVSCRATCH_PAD_SEALED,
		  kvscratch_word_load(&view.status->writer));
	close(writer);
	EXPECT_EQ(1ull << 32 | KVSCRATCH_PAD_SEALED, kvscratch_word_load(&view.status->writer));
	device_unmap(&view);
	close(fd);
}

TEST_F_TIMEOUT(view, is_live, TEST_SECONDS)
{
	int writer = device_reopen(self->fd, O_WRONLY);

	ASSERT_LE(0, writer);
	EXPECT_EQ(self->len, kvscratch_view_state(&self->view));
	EXPECT_TRUE(all_zero(view_row(&self->view, self->len),
			     (self->rows - self->len) * ROW_BYTES));
	for (uint32_t row = self->len; row < self->rows; row++) {
		ASSERT_EQ(0, append_rows(row % 2 ? writer : self->fd, ROW_BYTES, row, 1));
		EXPECT_EQ(row + 1, kvscratch_view_state(&self->view));
		EXPECT_TRUE(view_rows_are(&self->view, 0, row + 1));
	}
	ASSERT_EQ(0, device_truncate(writer, 1, KVSCRATCH_TRUNCATE_ZERO));
	EXPECT_EQ(1ull << 32 | 1, kvscratch_view_state(&self->view));
	EXPECT_TRUE(view_rows_are(&self->view, 0, 1));
	EXPECT_TRUE(all_zero(view_row(&self->view, 1), (self->rows - 1) * ROW_BYTES));
	close(writer);
}

/* Each of the three answers of kvscratch_view_valid_rows() */
TEST_F_TIMEOUT(view, tells_which_rows_survived, TEST_SECONDS)
{
	uint64_t state = kvscratch_view_state(&self->view);

	EXPECT_EQ(self->len, kvscratch_view_valid_rows(&self->view, state));
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, self->len, 2));
	EXPECT_EQ(self->len, kvscratch_view_valid_rows(&self->view, state));
	/* a truncate above what the reader looked at takes nothing from it */
	ASSERT_EQ(0, device_truncate(self->fd, self->len + 1, 0));
	EXPECT_EQ(self->len, kvscratch_view_valid_rows(&self->view, state));

	state = kvscratch_view_state(&self->view);
	ASSERT_EQ(0, device_truncate(self->fd, 3, 0));
	EXPECT_EQ(3, kvscratch_view_valid_rows(&self->view, state));
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 100, 4));
	EXPECT_EQ(3, kvscratch_view_valid_rows(&self->view, state));
	/* two generations later nobody knows */
	ASSERT_EQ(0, device_truncate(self->fd, 7, 0));
	EXPECT_EQ(0, kvscratch_view_valid_rows(&self->view, state));
}

static uint32_t sum_bytes(const volatile uint8_t *at, size_t bytes)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < bytes; i++)
		sum += at[i];
	return sum;
}

TEST_F_TIMEOUT(view, takes_no_faults, TEST_SECONDS)
{
	const size_t bytes = 8 << 20;
	uint8_t *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	uint8_t *fresh = mmap(NULL, 64 * self->page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvscratch_view view;
	uint32_t expected, sum;
	long before, after;
	int fd = new_pad(bytes / 4096, 4096);

	ASSERT_LE(0, fd);
	ASSERT_NE(MAP_FAILED, (void *)buffer);
	ASSERT_NE(MAP_FAILED, (void *)fresh);
	for (size_t i = 0; i < bytes; i += 64)
		buffer[i] = row_byte(i / 64, i);
	ASSERT_EQ(0, device_append(fd, buffer, bytes));

	/* a dry run brings in code and stack */
	before = page_faults();
	expected = sum_bytes(buffer, bytes);
	after = page_faults();

	ASSERT_EQ(0, device_map(fd, &view));
	before = page_faults();
	sum = sum_bytes(view.data, view_data_bytes(&view));
	sum += kvscratch_view_state(&view) >> 32;
	after = page_faults();
	EXPECT_EQ(0, after - before);
	EXPECT_EQ(expected, sum);

	/* the meter works */
	before = page_faults();
	sum_bytes(fresh, 64 * self->page);
	EXPECT_LT(0, page_faults() - before);
	device_unmap(&view);
	munmap(buffer, bytes);
	munmap(fresh, 64 * self->page);
	close(fd);
}

TEST_F_TIMEOUT(view, can_be_read_through_the_kernel, TEST_SECONDS)
{
	const size_t bytes = 2 * self->page;
	struct iovec from = { .iov_base = (void *)self->view.data, .iov_len = bytes };
	uint8_t *got = malloc(bytes);
	struct iovec to = { .iov_base = got, .iov_len = bytes };
	struct child child;
	int pipes[2];

	ASSERT_NE(NULL, got);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	/* copied */
	ASSERT_EQ(bytes, write(pipes[1], self->view.data, bytes));
	ASSERT_EQ(bytes, read(pipes[0], got, bytes));
	EXPECT_EQ(0, memcmp(got, self->view.data, bytes));

	/* by another process */
	if (start_child(&child)) {
		memset(got, 0, bytes);
		CHILD_CHECK(process_vm_readv(getppid(), &to, 1, &from, 1, 0) == (ssize_t)bytes);
		for (uint32_t row = 0; row < bytes / ROW_BYTES; row++)
			CHILD_CHECK(row_is(got + row * ROW_BYTES, ROW_BYTES, row));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	free(got);
	close(pipes[0]);
	close(pipes[1]);
}

/* Pages that a pipe holds survive handle, view and pad. */
TEST_F_TIMEOUT(view, pages_outlive_the_pad_in_a_pipe, TEST_SECONDS)
{
	const size_t bytes = DATA_PAGES * self->page;
	struct kvscratch_view view;
	struct iovec from;
	uint8_t *got = malloc(bytes);
	int pipes[2];
	int fd = new_pad(self->rows, ROW_BYTES);

	ASSERT_LE(0, fd);
	ASSERT_NE(NULL, got);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	ASSERT_EQ(0, append_rows(fd, ROW_BYTES, 0, self->rows));
	ASSERT_EQ(0, device_map(fd, &view));
	from = (struct iovec){ .iov_base = (void *)view.data, .iov_len = bytes };
	ASSERT_EQ(bytes, vmsplice(pipes[1], &from, 1, 0));
	device_unmap(&view);
	close(fd);

	/* somebody else gets the memory, if it was given away */
	fd = new_pad(64 * self->rows, ROW_BYTES);
	ASSERT_LE(0, fd);
	ASSERT_EQ(bytes, read(pipes[0], got, bytes));
	for (uint32_t row = 0; row < self->rows; row++) {
		ASSERT_TRUE(row_is(got + row * ROW_BYTES, ROW_BYTES, row));
	}
	free(got);
	close(fd);
	close(pipes[0]);
	close(pipes[1]);
}

/* Lifetime: the limits leave room for one pad, so a second one tells of the first */

FIXTURE(lifetime) {
	int fd;
	uint32_t rows;
	uint64_t saved_total;
	struct kvscratch_view view;
};

FIXTURE_SETUP(lifetime) {
	self->rows = DATA_PAGES * page_bytes() / ROW_BYTES;
	self->saved_total = number_in_file(MAX_TOTAL, NULL);
	ASSERT_LT(0, self->saved_total);
	write_number(MAX_TOTAL, charged_bytes(self->rows, ROW_BYTES));
	self->fd = new_pad(self->rows, ROW_BYTES);
	EXPECT_LE(0, self->fd) {
		/* there is no teardown after a failed setup */
		write_number(MAX_TOTAL, self->saved_total);
		return;
	}
	EXPECT_EQ(0, device_map(self->fd, &self->view));
}

FIXTURE_TEARDOWN(lifetime) {
	write_number(MAX_TOTAL, self->saved_total);
}

/* 0 when no pad is accounted, -EDQUOT when one is */
static int room_for_a_pad(uint32_t rows)
{
	int fd = new_pad(rows, ROW_BYTES);

	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

TEST_F_TIMEOUT(lifetime, view_keeps_the_pad, TEST_SECONDS)
{
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, 4));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	close(self->fd);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	EXPECT_TRUE(view_rows_are(&self->view, 0, 4));
	EXPECT_EQ(4, kvscratch_view_state(&self->view));
	device_unmap(&self->view);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, every_descriptor_keeps_the_pad, TEST_SECONDS)
{
	int copy = dup(self->fd);
	int reader = device_open_reader(self->fd);

	ASSERT_LE(0, copy);
	ASSERT_LE(0, reader);
	close(self->fd);
	ASSERT_EQ(0, append_rows(copy, ROW_BYTES, 0, 1));
	EXPECT_TRUE(view_rows_are(&self->view, 0, 1));
	device_unmap(&self->view);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	close(copy);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	EXPECT_EQ(1, len_of(reader));
	close(reader);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, every_part_of_a_view_keeps_the_pad, TEST_SECONDS)
{
	const size_t page = page_bytes();
	uint8_t *at = (uint8_t *)self->view.data;

	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, self->rows));
	close(self->fd);
	/* a hole; two parts remain */
	ASSERT_EQ(0, munmap(at + page, 2 * page));
	EXPECT_TRUE(view_rows_are(&self->view, 0, page / ROW_BYTES));
	EXPECT_TRUE(view_rows_are(&self->view, 3 * page / ROW_BYTES, self->rows));
	EXPECT_EQ(self->rows, kvscratch_view_state(&self->view));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	ASSERT_EQ(0, munmap(at, page));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	ASSERT_EQ(0, munmap(at + 3 * page, page));
	EXPECT_EQ(self->rows, kvscratch_view_state(&self->view));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	ASSERT_EQ(0, munmap(at + 4 * page, page));
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, failed_maps_leave_nothing, TEST_SECONDS)
{
	long long refs = number_in_file(REFCNT, NULL);

	for (int i = 0; i < 10; i++) {
		EXPECT_MAP_ERRNO(EPERM, PROT_READ | PROT_WRITE, MAP_SHARED, self->fd);
		EXPECT_MAP_ERRNO(EPERM, PROT_READ, MAP_PRIVATE, self->fd);
		EXPECT_ERRNO(ENXIO, map_page_offset(page_bytes(), self->fd, DATA_PAGES + 1));
	}
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
	close(self->fd);
	device_unmap(&self->view);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

/* The view of a process whose parent is gone, and every handle with it */
TEST_F_TIMEOUT(lifetime, fork_shares_the_view, TEST_SECONDS)
{
	struct child parent;
	pid_t reader;

	/* the grandchild becomes ours when its parent exits */
	ASSERT_EQ(0, prctl(PR_SET_CHILD_SUBREAPER, 1));
	if (start_child(&parent)) {
		close(self->fd);
		reader = fork();
		CHILD_CHECK(reader >= 0);
		if (reader)
			_exit(0);
		reader = getpid();
		CHILD_CHECK(kvscratch_view_state(&self->view) == 0);
		CHILD_CHECK(send(parent.line, &reader, sizeof(reader), 0) == sizeof(reader));
		CHILD_CHECK(hear(parent.line));
		CHILD_CHECK(kvscratch_view_state(&self->view) == 7);
		CHILD_CHECK(view_rows_are(&self->view, 0, 7));
		CHILD_CHECK(say(parent.line));
		/* until the end of file */
		CHILD_CHECK(!hear(parent.line));
		_exit(0);
	}
	ASSERT_EQ(sizeof(reader), recv(parent.line, &reader, sizeof(reader), MSG_WAITALL));
	ASSERT_EQ(0, wait_for(parent.pid));
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, 7));
	close(self->fd);
	device_unmap(&self->view);
	ASSERT_TRUE(say(parent.line));
	ASSERT_TRUE(hear(parent.line));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	close(parent.line);
	EXPECT_EQ(0, wait_for(reader));
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, killed_writer_hurts_nobody, TEST_SECONDS)
{
	struct child writer;
	uint64_t state;

	if (start_child(&writer)) {
		device_unmap(&self->view);
		CHILD_CHECK(say(writer.line));
		for (;;) {
			for (uint32_t row = 0; row < self->rows; row++)
				CHILD_CHECK(!append_rows(self->fd, ROW_BYTES, row, 1));
			CHILD_CHECK(!device_truncate(self->fd, 0, KVSCRATCH_TRUNCATE_ZERO));
		}
	}
	close(self->fd);
	ASSERT_TRUE(hear(writer.line));
	/* in the middle of its work */
	do
		state = kvscratch_view_state(&self->view);
	while (!kvscratch_state_generation(state) || !kvscratch_state_len(state));
	kill(writer.pid, SIGKILL);
	ASSERT_EQ(128 + SIGKILL, end_child(&writer));

	state = kvscratch_view_state(&self->view);
	ASSERT_GE(self->rows, kvscratch_state_len(state));
	EXPECT_TRUE(view_rows_are(&self->view, 0, kvscratch_state_len(state)));
	EXPECT_EQ(kvscratch_state_len(state), kvscratch_view_valid_rows(&self->view, state));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	device_unmap(&self->view);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, killed_holder_leaks_nothing, TEST_SECONDS)
{
	struct child holder;

	if (start_child(&holder)) {
		CHILD_CHECK(dup(self->fd) >= 0);
		CHILD_CHECK(device_open_reader(self->fd) >= 0);
		CHILD_CHECK(!device_map(self->fd, &self->view));
		CHILD_CHECK(say(holder.line));
		hear(holder.line);
		_exit(1);
	}
	ASSERT_TRUE(hear(holder.line));
	close(self->fd);
	device_unmap(&self->view);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	kill(holder.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&holder));
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, dropped_pages_come_back, TEST_SECONDS)
{
	struct child child;
	void *at = (void *)self->view.data;

	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, madvise(at, page_bytes(), MADV_DONTNEED));
	/* never a page of zeros in place of rows */
	EXPECT_TRUE(view_rows_are(&self->view, 0, 1));
	if (start_child(&child)) {
		CHILD_CHECK(!madvise(at, page_bytes(), MADV_DONTNEED));
		CHILD_CHECK(view_rows_are(&self->view, 0, 1));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	device_unmap(&self->view);
	close(self->fd);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

TEST_F_TIMEOUT(lifetime, dontfork_is_honoured, TEST_SECONDS)
{
	struct child child;

	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, 1));
	ASSERT_EQ(0, madvise((void *)self->view.data, view_data_bytes(&self->view),
			     MADV_DONTFORK));
	if (start_child(&child)) {
		/* the status page was not part of it */
		CHILD_CHECK(kvscratch_view_state(&self->view) == 1);
		fputs(row_is(self->view.data, ROW_BYTES, 0) ? "# row\n" : "# no row\n", stderr);
		_exit(0);
	}
	EXPECT_EQ(128 + SIGSEGV, end_child(&child));
	EXPECT_TRUE(view_rows_are(&self->view, 0, 1));
	device_unmap(&self->view);
	close(self->fd);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

/* The file system of handles goes with the last of them, a moment later. */
static void await_module_unused(void)
{
	while (number_in_file(REFCNT, NULL))
		sched_yield();
}

TEST_F_TIMEOUT(lifetime, module_stays_while_anything_is_left, TEST_SECONDS)
{
	long long refs = number_in_file(REFCNT, NULL);
	int node = device_open(O_RDONLY);

	/* the handle; the view pins its file and no further reference */
	ASSERT_LE(1, refs);
	ASSERT_LE(0, node);
	EXPECT_EQ(refs + 1, number_in_file(REFCNT, NULL));
	close(node);
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
	EXPECT_ERRNO(EWOULDBLOCK, syscall(SYS_delete_module, "kvscratch", O_NONBLOCK));
	close(self->fd);
	EXPECT_EQ(refs, number_in_file(REFCNT, NULL));
	EXPECT_ERRNO(EWOULDBLOCK, syscall(SYS_delete_module, "kvscratch", O_NONBLOCK));
	EXPECT_EQ(0, kvscratch_view_state(&self->view));
	device_unmap(&self->view);
	await_module_unused();
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

/*
 * Closed and unloaded at once, by turns: the last reference is a descriptor's, a
 * view's, a message's that nobody took, a killed process's; or there is still somebody to
 * be woken.
 */
TEST(close_and_unload)
{
	for (int round = 0; round < 40; round++) {
		int fd = new_pad(600, 4096);
		const char *name = "k";
		struct epoll_event event = { .events = EPOLLIN };
		struct kvscratch_view view;
		struct child child;
		int ends[2], epoll;

		ASSERT_LE(0, fd);
		ASSERT_EQ(0, device_map(fd, &view));
		switch (round % 5) {
		case 0:
			device_unmap(&view);
			close(fd);
			break;
		case 1:
			close(fd);
			device_unmap(&view);
			break;
		case 2:
			ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
			ASSERT_EQ(0, kvscratch_send_handles(ends[0], &name, &fd, 1));
			close(fd);
			device_unmap(&view);
			close(ends[0]);
			close(ends[1]);
			break;
		case 3:
			if (start_child(&child)) {
				hear(child.line);
				_exit(1);
			}
			device_unmap(&view);
			close(fd);
			kill(child.pid, SIGKILL);
			EXPECT_EQ(128 + SIGKILL, end_child(&child));
			break;
		case 4:
			epoll = epoll_create1(EPOLL_CLOEXEC);
			ASSERT_EQ(0, epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event));
			ASSERT_EQ(0, append_rows(fd, 4096, 0, 1));
			device_unmap(&view);
			close(fd);
			close(epoll);
		}
		ASSERT_EQ(0, remove_module());
		ASSERT_EQ(0, load_module(""));
	}
}

/*
 * What handles are files of is let go after their release. A descriptor that is O_PATH is no
 * handle, and holds it as well: the module stays until that is closed.
 */
TEST(the_mount_goes_late)
{
	for (int round = 0; round < 20; round++) {
		int fd = new_pad(600, 4096), place;
		struct kvscratch_pad_info info;
		struct child child;
		char path[40];

		ASSERT_LE(0, fd);
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		place = open(path, O_PATH | O_CLOEXEC);
		ASSERT_LE(0, place);
		EXPECT_EQ(-EBADF, device_pad_info(place, &info));
		close(fd);
		EXPECT_EQ(0, number_in_file(BYTES_TOTAL, NULL));
		EXPECT_ERRNO(EWOULDBLOCK, syscall(SYS_delete_module, "kvscratch", O_NONBLOCK));
		/* the last one is another process's, at the same time */
		if (start_child(&child)) {
			CHILD_CHECK(say(child.line));
			close(place);
			_exit(0);
		}
		close(place);
		ASSERT_TRUE(hear(child.line));
		ASSERT_EQ(0, remove_module());
		ASSERT_EQ(0, load_module(""));
		EXPECT_EQ(0, end_child(&child));
	}
}

/* Pads and places of them, as long as there is a module */
static void use_for_ever(void)
{
	for (;;) {
		char path[40];
		int fd = new_pad(1, 1);

		if (fd >= 0) {
			snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
			CHILD_CHECK(!close(open(path, O_PATH | O_CLOEXEC)));
			CHILD_CHECK(!close(fd));
		}
		for (int i = 0; i < 8; i++)
			sched_yield();
	}
}

TEST(unloaded_beside_its_users)
{
	struct child child;

	if (start_child(&child))
		use_for_ever();
	for (int round = 0; round < 100; round++) {
		ASSERT_EQ(0, remove_module());
		ASSERT_EQ(0, load_module(""));
	}
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	EXPECT_EQ(0, remove_module());
	EXPECT_EQ(0, load_module(""));
}

/* Rights, and handles that are passed on */

static bool is_subset(int access, int of)
{
	return of == O_RDWR || access == of;
}

TEST_F_TIMEOUT(view, open_never_widens_rights, TEST_SECONDS)
{
	const int accesses[] = { O_RDONLY, O_WRONLY, O_RDWR };

	for (size_t i = 0; i < ARRAY_SIZE(accesses); i++) {
		int source = device_reopen(self->fd, accesses[i]);

		ASSERT_LE(0, source);
		for (size_t j = 0; j < ARRAY_SIZE(accesses); j++) {
			int fd = device_reopen(source, accesses[j]);

			if (!is_subset(accesses[j], accesses[i])) {
				EXPECT_EQ(-EACCES, fd)
					TH_LOG("access %d from %d", accesses[j], accesses[i]);
				continue;
			}
			ASSERT_LE(0, fd);
			EXPECT_EQ(accesses[j], fcntl(fd, F_GETFL) & O_ACCMODE);
			EXPECT_EQ(self->len, len_of(fd));
			close(fd);
		}
		close(source);
	}
}

/* What a process can do that has nothing but a passed reader handle */
static void child_uses_reader(int line, uint32_t row_bytes)
{
	struct kvscratch_view view;
	struct pollfd poll_in = { .events = POLLIN };
	const int accesses[] = { O_RDWR, O_WRONLY, O_RDONLY };
	uint8_t row[ROW_BYTES];
	char path[32], name[64];
	int fd, other;

	for (int other_fd = 3; other_fd < 1024; other_fd++)
		if (other_fd != line)
			close(other_fd);
	CHILD_CHECK(kvscratch_receive_handles(line, name, sizeof(name), &fd, 1) == 1);
	CHILD_CHECK(!strcmp(name, "layer0.k"));
	CHILD_CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);

	poll_in.fd = fd;
	CHILD_CHECK(poll(&poll_in, 1, -1) == 1 && poll_in.revents & POLLIN);
	CHILD_CHECK(read(fd, row, row_bytes) == (ssize_t)row_bytes && row_is(row, row_bytes, 0));
	CHILD_CHECK(!device_map(fd, &view));
	CHILD_CHECK(view_rows_are(&view, 0, kvscratch_view_state(&view)));
	CHILD_CHECK(kvscratch_view_state(&view) > 1);

	CHILD_CHECK_ERRNO(EBADF, write(fd, row, row_bytes));
	CHILD_CHECK(device_truncate(fd, 0, 0) == -EACCES);
	CHILD_CHECK(device_create_on(fd, 1, &(struct kvscratch_plane) {
			.dim = 1, .dtype = KVSCRATCH_DTYPE_U8 }, 1) == -ENOTTY);
	CHILD_CHECK_ERRNO(EACCES, mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED,
				       fd, 0));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	for (size_t i = 0; i < ARRAY_SIZE(accesses); i++) {
		CHILD_CHECK_ERRNO(ENXIO, open(path, accesses[i]));
		other = device_reopen(fd, accesses[i]);
		CHILD_CHECK(accesses[i] == O_RDONLY ? other >= 0 : other == -EACCES);
		close(other);
	}
	CHILD_CHECK(device_open_writer(fd, KVSCRATCH_OPEN_TAKEOVER) == -EACCES);
	/* names the file and is no handle */
	other = open(path, O_PATH | O_CLOEXEC);
	CHILD_CHECK(other >= 0);
	CHILD_CHECK(device_reopen(other, O_RDONLY) == -EBADF);
	close(other);

	/* the sender drops everything; the pad stays as it was */
	CHILD_CHECK(say(line));
	CHILD_CHECK(hear(line));
	CHILD_CHECK(view_rows_are(&view, 0, kvscratch_view_state(&view)));
	device_unmap(&view);
	CHILD_CHECK(len_of(fd) > 1);
	CHILD_CHECK(pread(fd, row, row_bytes, row_bytes) == (ssize_t)row_bytes);
	CHILD_CHECK(row_is(row, row_bytes, 1));
	CHILD_CHECK(say(line));
	hear(line);
	_exit(0);
}

TEST_F_TIMEOUT(lifetime, passed_reader_reads_and_nothing_else, TEST_SECONDS)
{
	const char *name = "layer0.k";
	struct child child;
	int reader = device_open_reader(self->fd);

	ASSERT_LE(0, reader);
	ASSERT_EQ(0, append_rows(self->fd, ROW_BYTES, 0, 5));
	device_unmap(&self->view);
	if (start_child(&child))
		child_uses_reader(child.line, ROW_BYTES);
	ASSERT_EQ(0, kvscratch_send_handles(child.line, &name, &reader, 1));
	ASSERT_TRUE(hear(child.line));
	EXPECT_EQ(5, len_of(self->fd));
	close(reader);
	close(self->fd);
	ASSERT_TRUE(say(child.line));
	ASSERT_TRUE(hear(child.line));
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	EXPECT_EQ(0, end_child(&child));
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

/* A handle in a message that nobody takes */
TEST_F_TIMEOUT(lifetime, passed_handle_in_flight_keeps_the_pad, TEST_SECONDS)
{
	const char *name = "k";
	int ends[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	ASSERT_EQ(0, kvscratch_send_handles(ends[0], &name, &self->fd, 1));
	close(self->fd);
	device_unmap(&self->view);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	close(ends[0]);
	EXPECT_EQ(-EDQUOT, room_for_a_pad(self->rows));
	close(ends[1]);
	EXPECT_EQ(0, room_for_a_pad(self->rows));
}

FIXTURE(messages) {
	int ends[2];
	int fd;
	unsigned int descriptors;
};

FIXTURE_SETUP(messages) {
	self->fd = new_pad(4, ROW_BYTES);
	ASSERT_LE(0, self->fd);
	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, self->ends));
	self->descriptors = open_descriptors();
}

FIXTURE_TEARDOWN(messages) {
	close(self->ends[0]);
	close(self->ends[1]);
	close(self->fd);
}

TEST_F_TIMEOUT(messages, as_many_handles_as_fit, TEST_SECONDS)
{
	static int sent[KVSCRATCH_MAX_PASSED + 1], got[KVSCRATCH_MAX_PASSED + 1];
	static char names[KVSCRATCH_MAX_PASSED + 1][16];
	static const char *name[KVSCRATCH_MAX_PASSED + 1];
	static char text[KVSCRATCH_MAX_PASSED * 16];
	const char *at = text;

	for (int i = 0; i <= KVSCRATCH_MAX_PASSED; i++) {
		/* as long as names may be that all of them fit */
		snprintf(names[i], sizeof(names[i]), "layer%010d", i);
		name[i] = names[i];
		sent[i] = new_pad(i + 1, 8);
		ASSERT_LE(0, sent[i]);
	}
	EXPECT_EQ(-EINVAL, kvscratch_send_handles(self->ends[0], name, sent,
						  KVSCRATCH_MAX_PASSED + 1));
	EXPECT_EQ(-EINVAL, kvscratch_send_handles(self->ends[0], name, sent, 0));
	ASSERT_EQ(0, kvscratch_send_handles(self->ends[0], name, sent, KVSCRATCH_MAX_PASSED));
	for (int i = 0; i <= KVSCRATCH_MAX_PASSED; i++)
		close(sent[i]);
	EXPECT_EQ(self->descriptors, open_descriptors());

	ASSERT_EQ(KVSCRATCH_MAX_PASSED,
		  kvscratch_receive_handles(self->ends[1], text, sizeof(text), got,
					    KVSCRATCH_MAX_PASSED));
	for (int i = 0; i < KVSCRATCH_MAX_PASSED; i++) {
		struct kvscratch_info info;

		EXPECT_STREQ(names[i], at);
		at += strlen(at) + 1;
		ASSERT_EQ(0, device_info(got[i], &info));
		EXPECT_EQ(i + 1, info.max_seq_len);
		EXPECT_EQ(FD_CLOEXEC, fcntl(got[i], F_GETFD));
		close(got[i]);
	}
	EXPECT_EQ(self->descriptors, open_descriptors());
}

TEST_F_TIMEOUT(messages, one_after_the_other, TEST_SECONDS)
{
	const char *const names[] = { "a", "bb", "ccc" };
	int fds[] = { self->fd, self->ends[0], self->ends[1] };
	char text[16];
	int got[3];

	for (unsigned int count = 1; count <= 3; count++) {
		ASSERT_EQ(0, kvscratch_send_handles(self->ends[0], names, fds, count));
	}
	for (int count = 1; count <= 3; count++) {
		ASSERT_EQ(count, kvscratch_receive_handles(self->ends[1], text, sizeof(text),
							   got, 3));
		EXPECT_STREQ("a", text);
		for (int i = 0; i < count; i++)
			close(got[i]);
	}
	EXPECT_EQ(self->descriptors, open_descriptors());
}

/* Send what kvscratch_send_handles() never would: @count times @fd on @bytes. */
static bool send_raw(int sock, const void *bytes, size_t size, int fd, unsigned int count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * KVSCRATCH_MAX_PASSED)];
	} control = { 0 };
	struct iovec iov = { .iov_base = (void *)bytes, .iov_len = size };
	struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (count) {
		struct cmsghdr *cmsg;

		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int) * count);
		for (unsigned int i = 0; i < count; i++)
			memcpy(CMSG_DATA(cmsg) + i * sizeof(int), &fd, sizeof(int));
	}
	return sendmsg(sock, &msg, MSG_NOSIGNAL) == (ssize_t)size;
}

TEST_F_TIMEOUT(messages, hostile_ones_leave_nothing_open, TEST_SECONDS)
{
	/* each with the peer hanging up behind it */
	const struct {
		const char *what;
		const char *bytes;
		size_t size;
		unsigned int fds;
		int result;
	} cases[] = {
		{ "well-formed", "\2\0\0\0a\n", 6, 1, 1 },
		{ "half a length", "\2\0", 2, 1, -ECONNRESET },
		{ "no text", "\2\0\0\0", 4, 2, -ECONNRESET },
		{ "truncated text", "\4\0\0\0a\nb", 7, 2, -ECONNRESET },
		{ "more names than handles", "\4\0\0\0a\nb\n", 8, 1, -EPROTO },
		{ "fewer names than handles", "\4\0\0\0a\nb\n", 8, 3, -EPROTO },
		{ "names without handles", "\2\0\0\0a\n", 6, 0, -EPROTO },
		{ "no newline at the end", "\3\0\0\0a\nb", 7, 1, -EPROTO },
		{ "empty text", "\0\0\0\0", 4, 1, -EPROTO },
		{ "empty text, no handles", "\0\0\0\0", 4, 0, -EPROTO },
		{ "NUL in a name", "\5\0\0\0a\0b\nc\n", 9, 1, -EPROTO },
		{ "text longer than the buffer", "\21\0\0\0aaaaaaaaaaaaaaaa\n", 21, 1, -EPROTO },
		{ "enormous text", "\377\377\377\377a\n", 6, 1, -EPROTO },
		{ "too many handles", "\12\0\0\0a\na\na\na\na\n", 14, 5, -EPROTO },
		{ "far too many handles", "\2\0\0\0a\n", 6, KVSCRATCH_MAX_PASSED, -EPROTO },
		{ "nothing at all", "", 0, 0, -ECONNRESET },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		char text[16];
		int fds[4], ends[2];
		int got;

		ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
		if (cases[i].size) {
			ASSERT_TRUE(send_raw(ends[0], cases[i].bytes, cases[i].size, self->fd,
					     cases[i].fds));
		}
		close(ends[0]);
		got = kvscratch_receive_handles(ends[1], text, sizeof(text), fds, ARRAY_SIZE(fds));
		EXPECT_EQ(cases[i].result, got)
			TH_LOG("%s", cases[i].what);
		while (got-- > 0)
			close(fds[got]);
		close(ends[1]);
		EXPECT_EQ(self->descriptors, open_descriptors())
			TH_LOG("%s", cases[i].what);
	}
}

/* A stream has no message boundaries, and handles may ride on any byte of it. */
TEST_F_TIMEOUT(messages, in_pieces, TEST_SECONDS)
{
	char text[16];
	int fds[4];

	/* honest, byte by byte */
	for (int i = 0; i < 6; i++) {
		ASSERT_TRUE(send_raw(self->ends[0], &"\2\0\0\0a\n"[i], 1, self->fd, !i));
	}
	ASSERT_EQ(1, kvscratch_receive_handles(self->ends[1], text, sizeof(text), fds, 4));
	EXPECT_STREQ("a", text);
	close(fds[0]);

	/* handles where none belong are not taken */
	ASSERT_TRUE(send_raw(self->ends[0], "\4\0", 2, self->fd, 1));
	ASSERT_TRUE(send_raw(self->ends[0], "\0\0", 2, self->fd, 1));
	ASSERT_TRUE(send_raw(self->ends[0], "a\nb\n", 4, self->fd, 1));
	EXPECT_EQ(-EPROTO, kvscratch_receive_handles(self->ends[1], text, sizeof(text), fds, 4));
	EXPECT_EQ(self->descriptors, open_descriptors());
}

/* The kernel hands over what there is room for; half a message is refused. */
TEST_F_TIMEOUT(messages, descriptor_table_full, TEST_SECONDS)
{
	struct rlimit saved, limit;
	char text[16];
	int fds[4];

	ASSERT_TRUE(send_raw(self->ends[0], "\6\0\0\0a\nb\nc\n", 10, self->fd, 3));
	ASSERT_EQ(0, getrlimit(RLIMIT_NOFILE, &saved));
	limit = saved;
	/* descriptors are given out from the lowest: room for two of three */
	fds[0] = dup(self->fd);
	ASSERT_LE(0, fds[0]);
	close(fds[0]);
	limit.rlim_cur = fds[0] + 2;
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &limit));
	EXPECT_EQ(-EMFILE, kvscratch_receive_handles(self->ends[1], text, sizeof(text), fds, 4));
	ASSERT_EQ(0, setrlimit(RLIMIT_NOFILE, &saved));
	EXPECT_EQ(self->descriptors, open_descriptors());
}

/*
 * Planes and chunks: which page is which, in views of every kind
 */

#define CHUNK_PAGES (KVSCRATCH_CHUNK_BYTES / 4096)
#define SHAPES 5u
#define SHAPE_ROWS 512u

/* Bytes of a row that make a plane of 0.4, 0.6, 1.0, 1.6 and 1.3 chunks */
static const uint32_t shape_row_bytes[SHAPES] = { 1640, 2460, 4096, 6556, 5324 };

FIXTURE(planes) {
	int fd;
	struct kvscratch_pad_info info;
	struct kvscratch_plane planes[SHAPES];
};

static uint64_t plane_bytes(const struct kvscratch_plane *plane)
{
	return (uint64_t)SHAPE_ROWS * plane->row_bytes;
}

/* What each page of a plane begins with; @dim tells which it is, wherever it lies */
static uint64_t page_word(uint32_t dim, uint64_t page)
{
	return (uint64_t)dim << 32 | (page + 1);
}

/* Fill rows [0, @rows) of every plane. */
static void stamp_planes(struct __test_metadata *_metadata, FIXTURE_DATA(planes) *self,
			 uint32_t rows)
{
	int writer = device_open_writer(self->fd, 0);

	ASSERT_LE(0, writer);
	for (uint32_t i = 0; i < SHAPES; i++) {
		uint64_t bytes = plane_bytes(&self->planes[i]);
		uint8_t *data = calloc(1, bytes + 8);

		ASSERT_NE(NULL, data);
		for (uint64_t at = 0; at < bytes; at += 4096) {
			uint64_t word = page_word(self->planes[i].dim, at / 4096);

			memcpy(data + at, &word, 8);
		}
		ASSERT_EQ(0, device_stage(writer, i, len_of(writer),
					  data + len_of(writer) * self->planes[i].row_bytes,
					  rows - len_of(writer)));
		free(data);
	}
	ASSERT_EQ(0, device_commit(writer, rows));
	close(writer);
}

/* A pad of the shapes in this order, all rows there */
static void make_shapes(struct __test_metadata *_metadata, FIXTURE_DATA(planes) *self,
			const uint32_t *order)
{
	struct kvscratch_plane planes[SHAPES] = { 0 };

	for (uint32_t i = 0; i < SHAPES; i++) {
		planes[i].dim = shape_row_bytes[order[i]];
		planes[i].dtype = KVSCRATCH_DTYPE_U8;
	}
	self->fd = device_create_planes(SHAPE_ROWS, planes, SHAPES);
	ASSERT_LE(0, self->fd);
	ASSERT_EQ(0, device_pad_info(self->fd, &self->info));
	ASSERT_EQ(SHAPES, device_planes(self->fd, 0, self->planes, SHAPES));
}

FIXTURE_SETUP(planes) {
	const uint32_t order[SHAPES] = { 0, 1, 2, 3, 4 };

	make_shapes(_metadata, self, order);
}

FIXTURE_TEARDOWN(planes) {
	close(self->fd);
}

/* Where what belongs to a plane ends in the mapping, if @hole that is followed by a hole */
static uint64_t plane_end(const struct kvscratch_plane *plane, bool *hole)
{
	const uint64_t chunk = KVSCRATCH_CHUNK_BYTES;
	uint64_t end = (plane_bytes(plane) + 4095) / 4096 * 4096;
	uint64_t tail = plane_bytes(plane) % chunk;

	*hole = plane_bytes(plane) > chunk / 2 && tail && tail <= chunk / 2;
	/* a table ends with it, where order 9 was refused */
	if (tail > chunk / 2 && !is_fragmented())
		end = (end + chunk - 1) / chunk * chunk;
	return plane->offset + end;
}

/* Whether the page at @at can be read, without a signal if not */
static bool is_there(const uint8_t *at)
{
	uint8_t byte;
	struct iovec to = { &byte, 1 }, from = { (void *)at, 1 };

	return process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 1;
}

/* The view of everything at @map shows each page where it belongs. */
static bool all_in_place(const FIXTURE_DATA(planes) *self, const uint8_t *map)
{
	const struct kvscratch_status *status = (const void *)(map + self->info.status_offset);
	bool hole, good = true;

	for (uint32_t i = 0; i < SHAPES; i++) {
		const struct kvscratch_plane *plane = &self->planes[i];
		uint64_t end = plane_end(plane, &hole), at;

		for (at = 0; plane->offset + at < end; at += 4096) {
			uint64_t expected = at < plane_bytes(plane) ?
					    page_word(plane->dim, at / 4096) : 0;
			uint64_t word;

			memcpy(&word, map + plane->offset + at, 8);
			if (word == expected)
				continue;
			fprintf(stderr, "# plane %u of %u bytes, page %llu: %llx, not %llx\n", i,
				plane->dim, (unsigned long long)at / 4096,
				(unsigned long long)word, (unsigned long long)expected);
			good = false;
			break;
		}
		if (hole && is_there(map + end)) {
			fprintf(stderr, "# plane %u is followed by something\n", i);
			good = false;
		}
	}
	return good && status->magic == KVSCRATCH_STATUS_MAGIC;
}

/* MADV_POPULATE_READ: not in every libc */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

static int populate(const FIXTURE_DATA(planes) *self, uint8_t *map)
{
	bool hole;

	for (uint32_t i = 0; i < SHAPES; i++) {
		const struct kvscratch_plane *plane = &self->planes[i];

		if (madvise(map + plane->offset, plane_end(plane, &hole) - plane->offset,
			    MADV_POPULATE_READ))
			return -errno;
	}
	return madvise(map + self->info.status_offset, 4096, MADV_POPULATE_READ) ? -errno : 0;
}

/* Room to map everything @apart bytes behind a multiple of a chunk */
static uint8_t *reserve(const FIXTURE_DATA(planes) *self, size_t apart)
{
	size_t bytes = self->info.mapping_bytes + 2 * KVSCRATCH_CHUNK_BYTES;
	uint8_t *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		abort();
	return at - (uintptr_t)at % KVSCRATCH_CHUNK_BYTES + KVSCRATCH_CHUNK_BYTES + apart;
}

enum where { ANYWHERE, CONGRUENT, UNALIGNED };

static uint8_t *map_everything(const FIXTURE_DATA(planes) *self, enum where where)
{
	void *at = where == ANYWHERE ? NULL : reserve(self, where == UNALIGNED ? 4096 * 3 : 0);
	uint8_t *map = mmap(at, self->info.mapping_bytes, PROT_READ,
			    MAP_SHARED | (at ? MAP_FIXED : 0), self->fd, 0);

	if (map == MAP_FAILED)
		abort();
	return map;
}

static bool child_sees_all(const FIXTURE_DATA(planes) *self, const uint8_t *map)
{
	struct child child;

	if (start_child(&child))
		_exit(all_in_place(self, map) ? 0 : 1);
	return !end_child(&child);
}

static void check_views(struct __test_metadata *_metadata, FIXTURE_DATA(planes) *self)
{
	for (enum where where = ANYWHERE; where <= UNALIGNED; where++) {
		uint8_t *map = map_everything(self, where);

		/* touched, dropped and touched again */
		EXPECT_TRUE(all_in_place(self, map))
			TH_LOG("place %d, touched", where);
		EXPECT_EQ(0, madvise(map, self->info.mapping_bytes, MADV_DONTNEED));
		EXPECT_TRUE(all_in_place(self, map))
			TH_LOG("place %d, dropped", where);
		/* a page alone first: the others must not come with it from elsewhere */
		EXPECT_EQ(0, madvise(map, self->info.mapping_bytes, MADV_DONTNEED));
		for (uint32_t i = 0; i < SHAPES; i++)
			*(volatile uint8_t *)(map + self->planes[i].offset + 4096 * 100);
		EXPECT_TRUE(all_in_place(self, map))
			TH_LOG("place %d, a page of each first", where);
		EXPECT_EQ(0, madvise(map, self->info.mapping_bytes, MADV_DONTNEED));
		EXPECT_EQ(0, populate(self, map));
		EXPECT_TRUE(all_in_place(self, map))
			TH_LOG("place %d, populated", where);
		EXPECT_TRUE(child_sees_all(self, map))
			TH_LOG("place %d, in a child", where);
		/* a hole in the middle of a huge entry splits it */
		EXPECT_EQ(0, madvise(map + 4096 * 7, 4096 * 3, MADV_DONTNEED));
		EXPECT_TRUE(all_in_place(self, map))
			TH_LOG("place %d, in parts", where);
		munmap(map, self->info.mapping_bytes);
	}
}

/* The order of the first four is @nr; the fifth has each place in turn. */
static void nth_order(uint32_t nr, uint32_t *order)
{
	uint32_t left[4] = { 0, 1, 2, 3 };
	uint32_t place = nr % SHAPES, count = 4;

	for (uint32_t i = 0; i < SHAPES; i++) {
		uint32_t which = nr % count;

		if (i == place) {
			order[i] = 4;
			continue;
		}
		order[i] = left[which];
		left[which] = left[--count];
		nr /= count + 1;
		if (!count)
			count = 1;
	}
}

TEST_F_TIMEOUT(planes, every_page_is_in_its_place, TEST_SECONDS)
{
	for (uint32_t nr = 0; nr < 24; nr++) {
		uint32_t order[SHAPES];

		close(self->fd);
		nth_order(nr, order);
		make_shapes(_metadata, self, order);
		stamp_planes(_metadata, self, SHAPE_ROWS);
		check_views(_metadata, self);
	}
}

/* Large planes begin on a chunk and come first, the others follow by pages. */
TEST_F(planes, layout)
{
	const uint64_t chunk = KVSCRATCH_CHUNK_BYTES;

	EXPECT_EQ(0, self->planes[1].offset);
	EXPECT_EQ(chunk, self->planes[2].offset);
	EXPECT_EQ(2 * chunk, self->planes[3].offset);
	EXPECT_EQ(4 * chunk, self->planes[4].offset);
	EXPECT_EQ(6 * chunk, self->planes[0].offset);
	EXPECT_EQ(6 * chunk + 205 * 4096, self->info.status_offset);
	EXPECT_EQ(6 * chunk + 206 * 4096, self->info.mapping_bytes);
}

/* Part of the pad, from any page on */
TEST_F_TIMEOUT(planes, views_of_parts, TEST_SECONDS)
{
	const uint64_t first[] = { 0, 1, 511, 512, 700, 1024 + 3, 2048 + 512 + 3 };
	const size_t pages[] = { 1, 2, 150 };

	stamp_planes(_metadata, self, SHAPE_ROWS);
	for (size_t i = 0; i < ARRAY_SIZE(first); i++) {
		for (size_t j = 0; j < ARRAY_SIZE(pages); j++) {
			uint8_t *whole = map_everything(self, ANYWHERE);
			uint8_t *map = mmap(NULL, pages[j] * 4096, PROT_READ, MAP_SHARED, self->fd,
					    first[i] * 4096);

			ASSERT_NE(MAP_FAILED, (void *)map);
			for (size_t page = 0; page < pages[j]; page++) {
				const uint8_t *there = whole + (first[i] + page) * 4096;

				/* behind tables there are holes, in both of them */
				ASSERT_EQ(is_there(there), is_there(map + page * 4096));
				ASSERT_TRUE(is_there(there) || is_fragmented());
				ASSERT_EQ(0, is_there(there) && memcmp(map + page * 4096, there, 4096));
			}
			munmap(map, pages[j] * 4096);
			munmap(whole, self->info.mapping_bytes);
		}
	}
}

/* KiB after @key in what smaps says of the mapping that begins at @at, -1 if it does not */
static long smaps_kib(const void *at, const char *key)
{
	FILE *smaps = fopen("/proc/self/smaps", "r");
	char start[20], text[256];
	bool found = false;
	long kib = -1;

	if (!smaps)
		return -1;
	snprintf(start, sizeof(start), "%0*lx-", 8, (unsigned long)at);
	while (kib < 0 && fgets(text, sizeof(text), smaps)) {
		if (!strncmp(text, start, strlen(start)))
			found = true;
		if (found && !strncmp(text, key, strlen(key)))
			kib = strtol(text + strlen(key), NULL, 10);
	}
	fclose(smaps);
	return kib;
}

#define HUGE_CHUNKS 5
#define CHUNK_KIB 2048

/* 0.6, 1.0, 1.6 and the first of 1.3; nothing is fragmented here */
TEST_F_TIMEOUT(planes, are_mapped_by_huge_entries, TEST_SECONDS)
{
	uint8_t *map;

	if (!one_entry_maps_a_chunk() || is_fragmented())
		SKIP(return, "no page table entry maps a chunk");
	stamp_planes(_metadata, self, SHAPE_ROWS);
	map = map_everything(self, CONGRUENT);
	ASSERT_EQ(0, smaps_kib(map, "FilePmdMapped:"));
	/* one touch each, in the middle */
	for (uint32_t i = 1; i < SHAPES; i++)
		*(volatile uint8_t *)(map + self->planes[i].offset + KVSCRATCH_CHUNK_BYTES / 2);
	EXPECT_EQ((HUGE_CHUNKS - 1) * CHUNK_KIB, smaps_kib(map, "FilePmdMapped:"));
	ASSERT_EQ(0, populate(self, map));
	EXPECT_EQ(HUGE_CHUNKS * CHUNK_KIB, smaps_kib(map, "FilePmdMapped:"));
	/* split by a hole, and the rest stays */
	ASSERT_EQ(0, madvise(map + 4096, 4096, MADV_DONTNEED));
	EXPECT_EQ((HUGE_CHUNKS - 1) * CHUNK_KIB, smaps_kib(map, "FilePmdMapped:"));
	EXPECT_TRUE(all_in_place(self, map));
	munmap(map, self->info.mapping_bytes);

	/* where it cannot be, it is not */
	map = map_everything(self, UNALIGNED);
	ASSERT_EQ(0, populate(self, map));
	EXPECT_EQ(0, smaps_kib(map, "FilePmdMapped:"));
	munmap(map, self->info.mapping_bytes);

	/* of itself, where addresses are plenty */
	if (sizeof(void *) == 4)
		return;
	map = map_everything(self, ANYWHERE);
	ASSERT_EQ(0, populate(self, map));
	EXPECT_EQ(HUGE_CHUNKS * CHUNK_KIB, smaps_kib(map, "FilePmdMapped:"));
	munmap(map, self->info.mapping_bytes);
}

TEST_F_TIMEOUT(planes, populated_by_plane_take_no_faults, TEST_SECONDS)
{
	long before;
	uint8_t *map;

	/* also rows that come later */
	stamp_planes(_metadata, self, 3);
	for (enum where where = ANYWHERE; where <= UNALIGNED; where++) {
		map = map_everything(self, where);
		ASSERT_EQ(0, populate(self, map));
		if (where == ANYWHERE)
			stamp_planes(_metadata, self, SHAPE_ROWS);
		/* a dry run brings in code and stack */
		all_in_place(self, map);
		munmap(map, self->info.mapping_bytes);
		map = map_everything(self, where);
		ASSERT_EQ(0, populate(self, map));
		before = page_faults();
		for (uint32_t i = 0; i < SHAPES; i++)
			sum_bytes(map + self->planes[i].offset, plane_bytes(&self->planes[i]));
		sum_bytes(map + self->info.status_offset, 4096);
		EXPECT_EQ(0, page_faults() - before)
			TH_LOG("place %d", where);
		munmap(map, self->info.mapping_bytes);
	}
	/* not populated: one for each chunk that is huge */
	if (!one_entry_maps_a_chunk() || is_fragmented())
		return;
	map = map_everything(self, CONGRUENT);
	before = page_faults();
	sum_bytes(map + self->planes[3].offset, plane_bytes(&self->planes[3]));
	EXPECT_EQ(2, page_faults() - before);
	munmap(map, self->info.mapping_bytes);
}

/* Of a process that locks all that it maps: populated to the first hole, and not locked. */
TEST_F_TIMEOUT(planes, of_who_locks_all_memory, TEST_SECONDS)
{
	uint8_t *map;
	long before;

	stamp_planes(_metadata, self, SHAPE_ROWS);
	ASSERT_EQ(0, mlockall(MCL_FUTURE));
	map = map_everything(self, ANYWHERE);
	EXPECT_EQ(0, smaps_kib(map, "Locked:"));
	/* large planes come first, and the last of them has the first hole, or each has one */
	before = page_faults();
	for (uint32_t i = 1; i < (is_fragmented() ? 2 : SHAPES); i++)
		sum_bytes(map + self->planes[i].offset, plane_bytes(&self->planes[i]));
	EXPECT_EQ(0, page_faults() - before);
	EXPECT_TRUE(all_in_place(self, map));
	ASSERT_EQ(0, munlockall());
	EXPECT_TRUE(all_in_place(self, map));
	munmap(map, self->info.mapping_bytes);
}

/* Of a process that wants no huge pages; kernels before 6.7 do not ask it here. */
TEST_F_TIMEOUT(planes, of_who_wants_no_huge_pages, TEST_SECONDS)
{
	const long pages = (plane_bytes(&self->planes[3]) + 4095) / 4096;
	uint8_t *map;
	long before;

	if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))
		SKIP(return, "the kernel has no huge pages");
	stamp_planes(_metadata, self, SHAPE_ROWS);
	check_views(_metadata, self);
	map = map_everything(self, CONGRUENT);
	/* the code that it takes is there afterwards */
	page_faults();
	sum_bytes((const uint8_t *)&pages, sizeof(pages));
	before = page_faults();
	sum_bytes(map + self->planes[3].offset, plane_bytes(&self->planes[3]));
	before = page_faults() - before;
	EXPECT_TRUE(before == pages || before == 2)
		TH_LOG("%ld faults in %ld pages", before, pages);
	ASSERT_EQ(0, populate(self, map));
	/* the first time brings in the code that it takes */
	for (int run = 0; run < 2; run++) {
		before = page_faults();
		for (uint32_t i = 0; i < SHAPES; i++)
			sum_bytes(map + self->planes[i].offset, plane_bytes(&self->planes[i]));
		before = page_faults() - before;
	}
	EXPECT_EQ(0, before);
	munmap(map, self->info.mapping_bytes);
}

/* Populating goes to the first hole, and says so where it can. */
TEST_F_TIMEOUT(planes, populating_across_a_hole_fails, TEST_SECONDS)
{
	uint8_t *map = map_everything(self, ANYWHERE);
	const struct kvscratch_plane *last;
	bool hole;
	long before;

	EXPECT_ERRNO(EFAULT, madvise(map, self->info.mapping_bytes, MADV_POPULATE_READ));
	plane_end(&self->planes[4], &hole);
	EXPECT_TRUE(hole);
	munmap(map, self->info.mapping_bytes);

	map = mmap(NULL, self->info.mapping_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE,
		   self->fd, 0);
	ASSERT_NE(MAP_FAILED, (void *)map);
	/* large planes come first: there up to the hole, not there behind it */
	last = &self->planes[is_fragmented() ? 1 : 4];
	before = page_faults();
	sum_bytes(map + last->offset, plane_bytes(last));
	EXPECT_EQ(0, page_faults() - before);
	sum_bytes(map + self->planes[0].offset, plane_bytes(&self->planes[0]));
	EXPECT_LT(0, page_faults() - before);
	munmap(map, self->info.mapping_bytes);
}

/* A touch of a hole is SIGBUS, and of nobody else. */
TEST_F_TIMEOUT(planes, a_hole_is_sigbus, TEST_SECONDS)
{
	uint8_t *map = map_everything(self, ANYWHERE);
	struct child child;
	bool hole;

	if (start_child(&child)) {
		*(volatile uint8_t *)(map + plane_end(&self->planes[4], &hole));
		_exit(0);
	}
	EXPECT_EQ(128 + SIGBUS, end_child(&child));
	munmap(map, self->info.mapping_bytes);
}

/* What others may do to regular files */
TEST_F_TIMEOUT(planes, cannot_be_truncated_under_a_view, TEST_SECONDS)
{
	uint8_t *map = map_everything(self, ANYWHERE);
	/* its size is beyond what 32 bits can tell */
	struct stat64 st;
	uint8_t byte;

	stamp_planes(_metadata, self, SHAPE_ROWS);
	ASSERT_TRUE(all_in_place(self, map));
	ASSERT_EQ(0, fstat64(self->fd, &st));
	EXPECT_EQ(0, st.st_mode & S_IFMT);
	EXPECT_ERRNO(EINVAL, ftruncate(self->fd, 0));
	EXPECT_ERRNO(EINVAL, ftruncate(self->fd, self->info.mapping_bytes));
	EXPECT_ERRNO(ENODEV, fallocate(self->fd, 0, 0, 4096));
	EXPECT_ERRNO(ENODEV, fallocate(self->fd, 3, 0, 4096));
	EXPECT_EQ(1, pread(self->fd, &byte, 1, 0));
	EXPECT_TRUE(all_in_place(self, map));
	EXPECT_EQ(SHAPE_ROWS, len_of(self->fd));
	munmap(map, self->info.mapping_bytes);
}

/* References by pages of a huge chunk, by the ways that others take them */
TEST_F_TIMEOUT(planes, can_be_read_through_the_kernel, TEST_SECONDS)
{
	uint8_t *map = map_everything(self, CONGRUENT);
	const uint8_t *at = map + self->planes[3].offset + KVSCRATCH_CHUNK_BYTES - 5 * 4096;
	const size_t bytes = 10 * 4096;
	uint8_t *got = malloc(bytes), *copy = malloc(bytes);
	struct iovec from = { (void *)at, bytes }, to = { got, bytes };
	int mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	struct child child;
	int pipes[2];

	ASSERT_NE(NULL, got);
	ASSERT_NE(NULL, copy);
	ASSERT_LE(0, mem);
	ASSERT_EQ(0, pipe2(pipes, O_CLOEXEC));
	stamp_planes(_metadata, self, SHAPE_ROWS);
	memcpy(copy, at, bytes);
	EXPECT_FALSE(all_zero(copy, bytes));
	/* across two chunks; nothing is mapped yet in the child */
	if (start_child(&child)) {
		CHILD_CHECK(process_vm_readv(getppid(), &to, 1, &from, 1, 0) == (ssize_t)bytes);
		CHILD_CHECK(!memcmp(got, copy, bytes));
		_exit(0);
	}
	EXPECT_EQ(0, end_child(&child));
	memset(got, 0, bytes);
	EXPECT_EQ((ssize_t)bytes, pread64(mem, got, bytes, (uintptr_t)at));
	EXPECT_EQ(0, memcmp(got, copy, bytes));
	ASSERT_EQ(0, madvise(map, self->info.mapping_bytes, MADV_DONTNEED));
	ASSERT_EQ((ssize_t)bytes, vmsplice(pipes[1], &from, 1, 0));
	/* and what the pipe has outlives all of the pad */
	munmap(map, self->info.mapping_bytes);
	close(self->fd);
	self->fd = device_create_planes(SHAPE_ROWS, (struct kvscratch_plane[]) {
		{ .dim = 1 << 16, .dtype = KVSCRATCH_DTYPE_U8 } }, 1);
	ASSERT_LE(0, self->fd);
	memset(got, 0, bytes);
	for (size_t done = 0; done < bytes;) {
		ssize_t more = read(pipes[0], got + done, bytes - done);

		ASSERT_LT(0, more);
		done += more;
	}
	EXPECT_EQ(0, memcmp(got, copy, bytes));
	close(pipes[0]);
	close(pipes[1]);
	close(mem);
	free(copy);
	free(got);
}

/*
 * Handles and mappings of one pad that come and go at the same time: what a file
 * is mapped by is there from its birth, and counts stay right.
 */
#define COMINGS 1500

static void map_for_ever(int fd, size_t bytes)
{
	for (;;) {
		void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);

		CHILD_CHECK(map != MAP_FAILED);
		CHILD_CHECK(!munmap(map, bytes));
	}
}

TEST_F_TIMEOUT(planes, mappings_come_and_go_beside_handles, TEST_SECONDS)
{
	struct child child;
	uint8_t *map;

	stamp_planes(_metadata, self, SHAPE_ROWS);
	if (start_child(&child))
		map_for_ever(self->fd, self->info.mapping_bytes);
	for (int i = 0; i < COMINGS; i++) {
		int fd = device_reopen(self->fd, i % 2 ? O_RDWR : O_RDONLY);
		int other = new_pad(3, 512);

		ASSERT_LE(0, fd);
		ASSERT_LE(0, other);
		map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, i % 3 ? fd : other, 0);
		ASSERT_NE(MAP_FAILED, (void *)map);
		ASSERT_EQ(i % 3 ? page_word(self->planes[1].dim, 0) : 0, *(uint64_t *)map);
		close(fd);
		close(other);
		munmap(map, 4096);
	}
	kill(child.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	map = map_everything(self, ANYWHERE);
	EXPECT_TRUE(all_in_place(self, map));
	munmap(map, self->info.mapping_bytes);
}

/*
 * A reader beside a writer. Each word of a row tells the generation in which it
 * was written, its row and its place: a torn, stale or foreign one shows.
 */

#define RACE_ROWS 64
#define RACE_WORDS 64
#define RACE_BATCH 9
/* enough to have met the writer at many different places */
#define RACE_READS 1000
#define RACE_MEETINGS 30

static uint32_t race_word(uint32_t generation, uint32_t row, uint32_t i)
{
	return generation << 12 | row % 64 << 6 | i;
}

static void race_fill(uint32_t rows[][RACE_WORDS], uint32_t generation, uint32_t first,
		      uint32_t count)
{
	for (uint32_t row = 0; row < count; row++)
		for (uint32_t i = 0; i < RACE_WORDS; i++)
			rows[row][i] = race_word(generation, first + row, i);
}

static bool race_row_is(const struct kvscratch_view *view, uint32_t generation, uint32_t row)
{
	const volatile uint32_t *words = (const volatile uint32_t *)view_row(view, row);
	bool good = true;

	for (uint32_t i = 0; i < RACE_WORDS; i++)
		good &= words[i] == race_word(generation, row, i);
	return good;
}

/* What the truncate that began a generation kept */
static uint32_t race_kept(uint32_t generation)
{
	return generation * 7 % (RACE_ROWS / 2);
}

/* The generation that wrote @row as it is in @generation */
static uint32_t race_written_in(uint32_t generation, uint32_t row)
{
	while (generation && race_kept(generation) > row)
		generation--;
	return generation;
}

static uint32_t race_batch(uint32_t row, uint32_t end)
{
	uint32_t count = row % 3 ? 1 : RACE_BATCH;

	return count < end - row ? count : end - row;
}

static void race_append(int fd, uint32_t generation, uint32_t row, uint32_t end)
{
	uint32_t rows[RACE_BATCH][RACE_WORDS];

	while (row < end) {
		uint32_t count = race_batch(row, end);

		race_fill(rows, generation, row, count);
		CHILD_CHECK(!device_append(fd, rows, count * sizeof(rows[0])));
		row += count;
	}
}

TEST_F_TIMEOUT(view, reader_never_sees_half_an_append, TEST_SECONDS)
{
	const uint32_t all = 4096;
	unsigned int meetings = 0;

	while (meetings < RACE_MEETINGS) {
		struct kvscratch_view view;
		struct child writer;
		uint32_t checked = 0;
		int fd = new_pad(all, RACE_WORDS * sizeof(uint32_t));

		ASSERT_LE(0, fd);
		ASSERT_EQ(0, device_map(fd, &view));
		if (start_child(&writer)) {
			CHILD_CHECK(say(writer.line));
			race_append(fd, 0, 0, all);
			_exit(0);
		}
		close(fd);
		ASSERT_TRUE(hear(writer.line));
		while (checked < all) {
			uint64_t state = kvscratch_view_state(&view);
			uint32_t len = kvscratch_state_len(state);

			ASSERT_EQ(0, kvscratch_state_generation(state));
			ASSERT_LE(checked, len);
			ASSERT_GE(all, len);
			if (len == checked)
				continue;
			if (len < all)
				meetings++;
			while (checked < len) {
				ASSERT_TRUE(race_row_is(&view, 0, checked))
					TH_LOG("row %u of %u", checked, len);
				checked++;
			}
		}
		EXPECT_EQ(0, end_child(&writer));
		device_unmap(&view);
	}
}

struct race_counts {
	unsigned int good;
	unsigned int shortened;
	unsigned int discarded;
	unsigned int generations;
	uint32_t last_generation;
};

static bool race_read(const struct kvscratch_view *view, struct race_counts *counts)
{
	uint64_t state = kvscratch_view_state(view);
	uint32_t generation = kvscratch_state_generation(state);
	uint32_t len = kvscratch_state_len(state);
	bool good[RACE_ROWS];
	uint32_t valid;

	if (len > RACE_ROWS)
		return false;
	for (uint32_t row = 0; row < len; row++)
		good[row] = race_row_is(view, race_written_in(generation, row), row);
	valid = kvscratch_view_valid_rows(view, state);
	if (valid > len)
		return false;
	for (uint32_t row = 0; row < valid; row++) {
		if (!good[row]) {
			fprintf(stderr, "# row %u of %u, %u valid, generation %u\n", row, len,
				valid, generation);
			return false;
		}
	}
	if (!len)
		return true;
	counts->good += valid == len;
	counts->shortened += valid && valid < len;
	counts->discarded += !valid;
	counts->generations += valid && generation != counts->last_generation;
	counts->last_generation = generation;
	return true;
}

/* What reader and writer of one race share */
struct race {
	int stop;
	/* one truncate per read: else readers are always many generations late */
	int paced;
	unsigned int reads;
};

static void race_write(int fd, struct race *race)
{
	unsigned int reads = 0;

	/* race_word() has 20 bits for it */
	for (uint32_t generation = 0; generation < 1 << 20; generation++) {
		if (generation)
			CHILD_CHECK(!device_truncate(fd, race_kept(generation), generation % 2 ?
							KVSCRATCH_TRUNCATE_ZERO : 0));
		race_append(fd, generation, race_kept(generation), RACE_ROWS);
		while (__atomic_load_n(&race->paced, __ATOMIC_RELAXED) &&
		       __atomic_load_n(&race->reads, __ATOMIC_RELAXED) == reads &&
		       !__atomic_load_n(&race->stop, __ATOMIC_RELAXED))
			sched_yield();
		reads = __atomic_load_n(&race->reads, __ATOMIC_RELAXED);
		if (__atomic_load_n(&race->stop, __ATOMIC_RELAXED))
			return;
	}
}

TEST_F_TIMEOUT(view, reader_is_told_what_a_truncate_took, TEST_SECONDS)
{
	struct race_counts counts = { 0 };
	struct kvscratch_view view;
	struct child writer;
	struct race *race = mmap(NULL, sizeof(*race), PROT_READ | PROT_WRITE,
				 MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int fd = new_pad(RACE_ROWS, RACE_WORDS * sizeof(uint32_t));

	ASSERT_NE(MAP_FAILED, (void *)race);
	ASSERT_LE(0, fd);
	ASSERT_EQ(0, device_map(fd, &view));
	if (start_child(&writer)) {
		CHILD_CHECK(say(writer.line));
		race_write(fd, race);
		_exit(0);
	}
	close(fd);
	ASSERT_TRUE(hear(writer.line));
	while (counts.good < RACE_READS || counts.generations < RACE_MEETINGS ||
	       counts.discarded < RACE_MEETINGS) {
		ASSERT_TRUE(race_read(&view, &counts));
	}
	__atomic_store_n(&race->paced, 1, __ATOMIC_RELAXED);
	while (counts.shortened < RACE_MEETINGS / 3) {
		ASSERT_TRUE(race_read(&view, &counts));
		__atomic_add_fetch(&race->reads, 1, __ATOMIC_RELAXED);
	}
	__atomic_store_n(&race->stop, 1, __ATOMIC_RELAXED);
	EXPECT_EQ(0, end_child(&writer));

	/* at rest everything is valid again */
	EXPECT_TRUE(race_read(&view, &counts));
	EXPECT_EQ(RACE_ROWS, kvscratch_view_valid_rows(&view, kvscratch_view_state(&view)));
	device_unmap(&view);
	munmap(race, sizeof(*race));
}

TEST_HARNESS_MAIN
