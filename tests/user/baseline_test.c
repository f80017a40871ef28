// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the stock kernel gives without the module: the same scenarios run over
 * the best memfd recipe and over kvscratch, and each must end exactly as we say.
 *
 * A scenario returns in words what it saw. The words are the table of kvscratch(7),
 * which tests/comparison makes of the lines that begin with "# comparison".
 */
#include "cgroup.h"
#include "meters.h"
#include "module.h"

#include <grp.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <sys/epoll.h>
#include <sys/inotify.h>

/*
 * A row is three pages, and a batch longer than any piece in which a kernel
 * copies to a file: where a piece ends, no row ends.
 */
#define ROW_BYTES 12288u
#define ROWS 512u
#define STORE_BYTES (ROWS * ROW_BYTES)
#define BATCH_ROWS 400u
#define BATCH_BYTES (BATCH_ROWS * ROW_BYTES)

/* Inside a batch and inside a row, the page that does not arrive */
#define GAP_ROW 300u
#define GAP_BYTES (GAP_ROW * ROW_BYTES + 4096)

#define NOBODY 65534

/*
 * Stores: what a producer appends to and readers map
 */

struct store {
	const struct kind *kind;
	int creator;
	int producer;
	int reader;
	/* of the reader's; there is a status page only for kvscratch */
	struct kvscratch_view view;
};

/* Scenarios are the same for every kind of store; what differs is here. */
struct kind {
	const char *name;
	/* Make a store that has its memory and enforces its rules, with all handles */
	int (*create)(struct store *store);
	/* One whose creator may map it writable, if there is such a thing */
	int (*create_writable)(void);
	/* Another handle of the store that @fd is a handle of */
	int (*reopen)(int fd, int access);
	int (*map)(struct store *store);
	/* How much a reader takes for committed */
	uint64_t (*bytes)(const struct store *store);
	int (*truncate)(int fd, uint64_t rows);
};

static void close_store(struct store *store)
{
	if (store->view.data)
		device_unmap(&store->view);
	close(store->creator);
	close(store->producer);
	close(store->reader);
}

/* memfd: preallocated, append-only, and nobody holds the descriptor it was made by */

#define MEMFD_NAME "rows [512, 12288] u8"

static int memfd_reopen(int fd, int access)
{
	char path[40];
	int other;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	other = open(path, access | (access == O_WRONLY ? O_APPEND : 0) | O_CLOEXEC);
	return other < 0 ? -errno : other;
}

/* tmpfs gives up for any signal, and does not start again by itself. */
static int memfd_allocate(int fd, int mode)
{
	while (fallocate(fd, mode, 0, STORE_BYTES))
		if (errno != EINTR)
			return -1;
	return 0;
}

static int memfd_forbid_all_but_appends(int fd)
{
	int flags;

	/* no further writers, but for those that need no permission */
	if (fchmod(fd, 0444) || ioctl(fd, FS_IOC_GETFLAGS, &flags))
		return -errno;
	flags |= FS_APPEND_FL;
	return ioctl(fd, FS_IOC_SETFLAGS, &flags) ? -errno : 0;
}

static int memfd_create_store(struct store *store)
{
	int fd = memfd_create(MEMFD_NAME, MFD_CLOEXEC);

	if (fd < 0 || memfd_allocate(fd, FALLOC_FL_KEEP_SIZE))
		return -errno;
	store->creator = fd;
	store->producer = memfd_reopen(fd, O_WRONLY);
	store->reader = memfd_reopen(fd, O_RDONLY);
	if (store->producer < 0 || store->reader < 0)
		return -EBADF;
	return memfd_forbid_all_but_appends(fd);
}

static int memfd_create_writable(void)
{
	int fd = memfd_create(MEMFD_NAME, MFD_CLOEXEC);

	if (fd < 0 || memfd_allocate(fd, 0))
		return -errno;
	return fd;
}

static int memfd_map(struct store *store)
{
	void *data = mmap(NULL, STORE_BYTES, PROT_READ, MAP_SHARED, store->reader, 0);

	if (data == MAP_FAILED)
		return -errno;
	store->view.data = data;
	store->view.mapped_bytes = STORE_BYTES;
	return 0;
}

static uint64_t memfd_bytes(const struct store *store)
{
	struct stat st;

	return fstat(store->reader, &st) ? UINT64_MAX : (uint64_t)st.st_size;
}

static int memfd_truncate(int fd, uint64_t rows)
{
	return ftruncate(fd, rows * ROW_BYTES) ? -errno : 0;
}

static const struct kind memfd = {
	.name = "memfd",
	.create = memfd_create_store,
	.create_writable = memfd_create_writable,
	.reopen = memfd_reopen,
	.map = memfd_map,
	.bytes = memfd_bytes,
	.truncate = memfd_truncate,
};

static int pad_create_store(struct store *store)
{
	int fd = new_pad(ROWS, ROW_BYTES);

	if (fd < 0)
		return fd;
	store->creator = fd;
	store->producer = device_reopen(fd, O_WRONLY);
	store->reader = device_reopen(fd, O_RDONLY);
	return store->producer < 0 || store->reader < 0 ? -EBADF : 0;
}

static int pad_create_writable(void)
{
	return new_pad(ROWS, ROW_BYTES);
}

static int pad_map(struct store *store)
{
	return device_map(store->reader, &store->view);
}

static uint64_t pad_bytes(const struct store *store)
{
	return (uint64_t)kvscratch_state_len(kvscratch_view_state(&store->view)) * ROW_BYTES;
}

static int pad_truncate(int fd, uint64_t rows)
{
	return device_truncate(fd, rows, 0);
}

static const struct kind kvscratch = {
	.name = "kvscratch",
	.create = pad_create_store,
	.create_writable = pad_create_writable,
	.reopen = device_reopen,
	.map = pad_map,
	.bytes = pad_bytes,
	.truncate = pad_truncate,
};

/* As the recipe has it: from here on there are a producer's handle and a reader's. */
static int open_store(struct store *store, const struct kind *kind)
{
	int err;

	*store = (struct store) { .kind = kind, .creator = -1, .producer = -1, .reader = -1 };
	err = kind->create(store);
	if (err)
		return err;
	close(store->creator);
	store->creator = -1;
	return kind->map(store);
}

static int append(const struct store *store, uint32_t first, uint32_t count)
{
	return append_rows(store->producer, ROW_BYTES, first, count);
}

static const uint8_t *row_at(const struct store *store, uint32_t row)
{
	return (const uint8_t *)store->view.data + (size_t)row * ROW_BYTES;
}

static bool rows_are_whole(const struct store *store, uint32_t first, uint32_t end)
{
	for (uint32_t row = first; row < end; row++)
		if (!row_is(row_at(store, row), ROW_BYTES, row))
			return false;
	return true;
}

/* A batch that can be read up to the gap only; the pages from there on are untouched. */
static uint8_t *batch_with_a_gap(void)
{
	uint8_t *rows = mmap(NULL, BATCH_BYTES, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (rows == MAP_FAILED)
		abort();
	for (uint32_t row = 0; row < GAP_ROW; row++)
		fill_row(rows + (size_t)row * ROW_BYTES, ROW_BYTES, row);
	fill_row(rows + GAP_BYTES - 4096, 4096, GAP_ROW);
	return rows;
}

/* A writer that sleeps in the middle of appending a batch */
struct stopped {
	struct child writer;
	int faults;
};

static void stop_a_writer(struct __test_metadata *_metadata, const struct store *store,
			  struct stopped *stopped)
{
	const char *name = "faults";
	char text[16];

	if (start_child(&stopped->writer)) {
		uint8_t *rows = batch_with_a_gap();
		int faults = stop_at(rows + GAP_BYTES, BATCH_BYTES - GAP_BYTES);

		CHILD_CHECK(!kvscratch_send_handles(stopped->writer.line, &name, &faults, 1));
		device_append(store->producer, rows, BATCH_BYTES);
		_exit(1);
	}
	ASSERT_EQ(1, kvscratch_receive_handles(stopped->writer.line, text, sizeof(text),
					       &stopped->faults, 1));
	ASSERT_TRUE(await_stop(stopped->faults));
}

static void kill_the_writer(struct __test_metadata *_metadata, struct stopped *stopped)
{
	ASSERT_EQ(0, kill(stopped->writer.pid, SIGKILL));
	ASSERT_EQ(128 + SIGKILL, end_child(&stopped->writer));
	close(stopped->faults);
}

/* What @call returns, 0 or -errno, to a user who has no capability at all */
static int as_nobody(int (*call)(struct store *store), struct store *store)
{
	pid_t pid = fork_child();

	if (!pid) {
		CHILD_CHECK(!setgroups(0, NULL));
		CHILD_CHECK(!setresgid(NOBODY, NOBODY, NOBODY));
		CHILD_CHECK(!setresuid(NOBODY, NOBODY, NOBODY));
		_exit(-call(store));
	}
	return -wait_for(pid);
}

/* What an administrator can do for users: a udev rule for the node, nothing for memfd */
static void admit_everybody(struct __test_metadata *_metadata, bool everybody)
{
	ASSERT_EQ(0, chmod(KVSCRATCH_DEVICE, everybody ? 0666 : 0600));
}

/* Scenarios */

FIXTURE(store) {
	struct store store;
};

FIXTURE_VARIANT(store) {
	const struct kind *kind;
};

FIXTURE_VARIANT_ADD(store, memfd) { .kind = &memfd };
FIXTURE_VARIANT_ADD(store, kvscratch) { .kind = &kvscratch };

FIXTURE_SETUP(store) {
	ASSERT_EQ(0, open_store(&self->store, variant->kind));
}

FIXTURE_TEARDOWN(store) {
	close_store(&self->store);
}

/*
 * A question, what we say of memfd and of kvscratch, and a body that looks with a
 * new store and answers in the same words
 */
#define SCENARIO(scenario, question, of_memfd, of_kvscratch) \
	static const char *scenario(struct __test_metadata *_metadata, struct store *store); \
	TEST_F_TIMEOUT(store, scenario, TEST_SECONDS) \
	{ \
		const char *seen = scenario(_metadata, &self->store); \
		\
		if (!seen) \
			return; \
		fprintf(TH_LOG_STREAM, "# comparison | %s | %s | %s\n", \
			variant->kind->name, question, seen); \
		EXPECT_STREQ(variant->kind == &memfd ? of_memfd : of_kvscratch, seen); \
	} \
	static const char *scenario(struct __test_metadata __attribute__((unused)) *_metadata, \
				    struct store *store)

/* Rows */

SCENARIO(bad_source_page, "an append is all or nothing when a source page is bad",
	 "no: part of a row stays for ever and displaces all later rows", "yes")
{
	uint8_t *rows = batch_with_a_gap();
	uint64_t end;

	ASSERT_EQ(0, append(store, 0, 1));
	ASSERT_EQ(0, mprotect(rows + GAP_BYTES, 4096, PROT_NONE));
	ASSERT_NE(0, device_append(store->producer, rows, BATCH_BYTES));
	munmap(rows, BATCH_BYTES);

	end = store->kind->bytes(store);
	if (end == ROW_BYTES) {
		ASSERT_EQ(0, append(store, 1, 1));
		EXPECT_TRUE(rows_are_whole(store, 0, 2));
		return "yes";
	}
	if (end % ROW_BYTES == 0)
		return "no: part of the batch stays";
	if (!store->kind->truncate(store->producer, 1))
		return "no: part of a row stays until somebody truncates";
	ASSERT_EQ(0, append(store, 1, 1));
	if (!row_is((const uint8_t *)store->view.data + end, ROW_BYTES, 1))
		return "no: part of a row stays for ever";
	return "no: part of a row stays for ever and displaces all later rows";
}

SCENARIO(killed_writer, "... when the writer is killed in the middle of it",
	 "no: the rows end inside a row", "yes")
{
	struct stopped stopped;
	uint64_t end;

	stop_a_writer(_metadata, store, &stopped);
	kill_the_writer(_metadata, &stopped);
	end = store->kind->bytes(store);
	if (end % ROW_BYTES)
		return "no: the rows end inside a row";
	if (end)
		return "no: part of the batch stays";
	ASSERT_EQ(0, append(store, 0, 1));
	EXPECT_TRUE(rows_are_whole(store, 0, 1));
	return "yes";
}

SCENARIO(part_of_a_row, "a write of less than a row is refused", "no: it stays for ever", "yes")
{
	uint8_t row[ROW_BYTES];

	fill_row(row, sizeof(row), 0);
	if (write(store->producer, row, sizeof(row) / 2) < 0)
		return store->kind->bytes(store) ? "no" : "yes";
	return store->kind->truncate(store->producer, 0) ? "no: it stays for ever" : "no";
}

SCENARIO(one_row_more, "a full store refuses a row",
	 "no: it grows, and allocates", "yes (ENOSPC)")
{
	int err;

	for (uint32_t row = 0; row < ROWS; row++)
		ASSERT_EQ(0, append(store, row, 1));
	err = append(store, ROWS, 1);
	if (!err)
		return "no: it grows, and allocates";
	EXPECT_TRUE(rows_are_whole(store, 0, ROWS));
	EXPECT_EQ(STORE_BYTES, store->kind->bytes(store));
	return err == -ENOSPC ? "yes (ENOSPC)" : "yes";
}

SCENARIO(rollback, "rollback of rejected speculative tokens", "no (EPERM)",
	 "yes, and readers are told which rows went")
{
	uint64_t seen = 0;
	int err;

	ASSERT_EQ(0, append(store, 0, 4));
	if (store->view.status)
		seen = kvscratch_view_state(&store->view);
	err = store->kind->truncate(store->producer, 2);
	if (err)
		return err == -EPERM ? "no (EPERM)" : "no";
	ASSERT_EQ(0, append(store, 2, 1));
	EXPECT_EQ(3 * ROW_BYTES, store->kind->bytes(store));
	EXPECT_TRUE(rows_are_whole(store, 0, 3));
	if (!store->view.status || kvscratch_view_valid_rows(&store->view, seen) != 2)
		return "yes, but readers are not told";
	return "yes, and readers are told which rows went";
}

SCENARIO(retraction, "a producer cannot take rows back",
	 "yes", "no: who may append may truncate")
{
	ASSERT_EQ(0, append(store, 0, 2));
	if (!store->kind->truncate(store->producer, 0))
		return "no: who may append may truncate";
	EXPECT_TRUE(rows_are_whole(store, 0, 2));
	return "yes";
}

/* Every way to change the first row by @fd; what they return is of no interest. */
static void overwrite_by(int fd)
{
	static const uint8_t zeros[ROW_BYTES];
	void *at = mmap(NULL, ROW_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	pwrite(fd, zeros, sizeof(zeros), 0);
	fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, ROW_BYTES);
	if (at != MAP_FAILED)
		memset(at, 0, ROW_BYTES);
}

SCENARIO(producer_rewrites, "... nor overwrite them", "yes", "yes")
{
	ASSERT_EQ(0, append(store, 0, 1));
	overwrite_by(store->producer);
	/* without O_APPEND, if it goes */
	fcntl(store->producer, F_SETFL, 0);
	overwrite_by(store->producer);
	overwrite_by(store->kind->reopen(store->producer, O_RDWR));
	return rows_are_whole(store, 0, 1) ? "yes" : "no";
}

SCENARIO(creator_rewrites, "... nor can the process that made it",
	 "not once the descriptor it was made by is closed", "yes")
{
	struct store made = { .kind = store->kind };
	bool whole;

	ASSERT_EQ(0, store->kind->create(&made));
	ASSERT_EQ(0, store->kind->map(&made));
	ASSERT_EQ(0, append(&made, 0, 1));
	overwrite_by(made.creator);
	whole = rows_are_whole(&made, 0, 1);
	close_store(&made);
	return whole ? "yes" : "not once the descriptor it was made by is closed";
}

/* Readers */

SCENARIO(live_views, "zero-copy views of every reader, live", "yes", "yes")
{
	struct store second = { .kind = store->kind, .creator = -1, .producer = -1 };

	second.reader = store->kind->reopen(store->reader, O_RDONLY);
	ASSERT_LE(0, second.reader);
	ASSERT_EQ(0, store->kind->map(&second));
	ASSERT_EQ(0, append(store, 0, 3));
	EXPECT_EQ(3 * ROW_BYTES, store->kind->bytes(store));
	EXPECT_EQ(3 * ROW_BYTES, store->kind->bytes(&second));
	EXPECT_TRUE(rows_are_whole(store, 0, 3));
	EXPECT_TRUE(rows_are_whole(&second, 0, 3));
	close_store(&second);
	return "yes";
}

SCENARIO(torn_rows, "a reader never sees part of a row", "if it rounds `st_size` down", "yes")
{
	struct stopped stopped;
	uint64_t end;

	stop_a_writer(_metadata, store, &stopped);
	end = store->kind->bytes(store);
	EXPECT_TRUE(rows_are_whole(store, 0, end / ROW_BYTES));
	kill_the_writer(_metadata, &stopped);
	return end % ROW_BYTES ? "if it rounds `st_size` down" : "yes";
}

SCENARIO(torn_batches, "... nor part of a batch", "no: a batch appears in pieces", "yes")
{
	struct stopped stopped;
	uint64_t end;

	stop_a_writer(_metadata, store, &stopped);
	end = store->kind->bytes(store);
	kill_the_writer(_metadata, &stopped);
	return end ? "no: a batch appears in pieces" : "yes";
}

SCENARIO(reader_writes, "a reader cannot write to its view or handle", "yes", "yes")
{
	ASSERT_EQ(0, append(store, 0, 1));
	overwrite_by(store->reader);
	if (!mprotect((void *)store->view.data, ROW_BYTES, PROT_READ | PROT_WRITE))
		return "no";
	return rows_are_whole(store, 0, 1) ? "yes" : "no";
}

static int become_writer(struct store *store)
{
	int fd = store->kind->reopen(store->reader, O_WRONLY);

	return fd < 0 ? fd : append_rows(fd, ROW_BYTES, 0, 1);
}

SCENARIO(reader_becomes_writer, "... nor open it again to write", "unless it is root", "yes")
{
	int nobody, root;

	admit_everybody(_metadata, true);
	nobody = as_nobody(become_writer, store);
	root = become_writer(store);
	admit_everybody(_metadata, false);
	EXPECT_EQ(root ? 0 : ROW_BYTES, store->kind->bytes(store));
	if (!nobody)
		return "no";
	EXPECT_EQ(-EACCES, nobody);
	return root ? "yes" : "unless it is root";
}

static uint32_t sum_rows(const uint8_t *at, uint32_t rows)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < (size_t)rows * ROW_BYTES; i += 64)
		sum += ((const volatile uint8_t *)at)[i];
	return sum;
}

/* Page faults that a scan of rows takes */
static long scan(const struct store *store, uint32_t first, uint32_t rows)
{
	static uint8_t row[ROW_BYTES];
	long before;

	/* a dry run brings in code and stack */
	before = page_faults();
	sum_rows(row, 1);
	before = page_faults();
	sum_rows(row_at(store, first), rows);
	return page_faults() - before;
}

SCENARIO(faults_of_a_scan, "no page faults in rows appended after `mmap`",
	 "after `MADV_POPULATE_READ`, again for each append", "yes")
{
	const uint32_t half = ROWS / 2;

	ASSERT_EQ(0, append(store, 0, half));
	if (!scan(store, 0, half))
		return "yes";
	ASSERT_EQ(0, append(store, half, half));
	ASSERT_EQ(0, madvise((void *)row_at(store, half), half * ROW_BYTES, MADV_POPULATE_READ));
	if (scan(store, half, half))
		return "no";
	return "after `MADV_POPULATE_READ`, again for each append";
}

SCENARIO(beyond_the_rows, "every byte of a view can be touched",
	 "no: SIGBUS in pages beyond the last row", "yes")
{
	pid_t pid;
	int status;

	ASSERT_EQ(0, append(store, 0, 1));
	pid = fork_child();
	if (!pid)
		_exit(*(const volatile uint8_t *)row_at(store, ROWS - 1));
	status = wait_for(pid);
	if (status == 128 + SIGBUS)
		return "no: SIGBUS in pages beyond the last row";
	EXPECT_EQ(0, status);
	return "yes";
}

SCENARIO(notification, "a reader can sleep until there are rows",
	 "with inotify on `/proc/self/fd/N`; poll and epoll are of no use", "with poll and epoll")
{
	struct epoll_event event = { .events = EPOLLIN };
	struct pollfd p = { .fd = store->reader, .events = POLLIN };
	struct inotify_event told[8];
	char path[40];
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	int inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	int none, one;

	ASSERT_LE(0, epoll);
	ASSERT_LE(0, inotify);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", store->reader);
	ASSERT_LE(0, inotify_add_watch(inotify, path, IN_MODIFY));
	none = poll(&p, 1, 0);
	if (!epoll_ctl(epoll, EPOLL_CTL_ADD, store->reader, &event)) {
		none += epoll_wait(epoll, &event, 1, 0);
		ASSERT_EQ(0, append(store, 0, 1));
		/* epoll is told by a work item */
		one = poll(&p, 1, 0) + epoll_wait(epoll, &event, 1, -1);
		return none == 0 && one == 2 ? "with poll and epoll" : "no";
	}
	/* it is always ready for poll */
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(1, none);
	EXPECT_EQ(-1, read(inotify, told, sizeof(told)));
	ASSERT_EQ(0, append(store, 0, 1));
	if (read(inotify, told, sizeof(told)) < (ssize_t)sizeof(told[0]))
		return "no";
	EXPECT_EQ(IN_MODIFY, told[0].mask);
	return "with inotify on `/proc/self/fd/N`; poll and epoll are of no use";
}

SCENARIO(shape, "a handle tells shape and dtype", "by convention, say in the file's name", "yes")
{
	struct kvscratch_info info;
	char path[40], name[80] = "";

	if (!device_info(store->reader, &info)) {
		EXPECT_EQ(ROWS, info.max_seq_len);
		EXPECT_EQ(ROW_BYTES, info.dim);
		EXPECT_EQ(KVSCRATCH_DTYPE_U8, info.dtype);
		return "yes";
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", store->reader);
	ASSERT_LT(0, readlink(path, name, sizeof(name) - 1));
	return strstr(name, MEMFD_NAME) ? "by convention, say in the file's name" : "no";
}

SCENARIO(dead_producer, "rows stay when the producer dies", "yes", "yes")
{
	const char *sent = "reader";
	struct store left = { .kind = store->kind, .creator = -1, .producer = -1 };
	struct child producer;
	char name[16];

	if (start_child(&producer)) {
		struct store made;

		CHILD_CHECK(!open_store(&made, store->kind));
		CHILD_CHECK(!append(&made, 0, 3));
		CHILD_CHECK(!kvscratch_send_handles(producer.line, &sent, &made.reader, 1));
		raise(SIGKILL);
	}
	ASSERT_EQ(1, kvscratch_receive_handles(producer.line, name, sizeof(name),
					       &left.reader, 1));
	ASSERT_EQ(128 + SIGKILL, end_child(&producer));
	ASSERT_EQ(0, store->kind->map(&left));
	if (store->kind->bytes(&left) != 3 * ROW_BYTES || !rows_are_whole(&left, 0, 3))
		return "no";
	close_store(&left);
	return "yes";
}

/* Writers */

SCENARIO(waiting_writer, "a writer that waits for a stuck one can be killed",
	 "no: it sleeps uninterruptibly", "yes")
{
	struct stopped stopped;
	pid_t second;
	char state;

	stop_a_writer(_metadata, store, &stopped);
	second = fork_child();
	if (!second)
		_exit(append(store, 0, 1) ? 1 : 0);
	state = await_sleep(second);
	ASSERT_NE(0, state);
	ASSERT_EQ(0, kill(second, SIGKILL));
	if (state == 'D') {
		/* still */
		EXPECT_EQ('D', await_sleep(second));
		kill_the_writer(_metadata, &stopped);
		EXPECT_EQ(128 + SIGKILL, wait_for(second));
		return "no: it sleeps uninterruptibly";
	}
	EXPECT_EQ(128 + SIGKILL, wait_for(second));
	kill_the_writer(_metadata, &stopped);
	return "yes";
}

/* Memory */

SCENARIO(charged, "memory is charged to the cgroup of its creator", "yes", "yes")
{
	char group[64];
	pid_t pid;
	int status;

	make_cgroup(group, sizeof(group), "charged");
	pid = fork_child();
	if (!pid) {
		struct store made;
		long long before;

		join_cgroup(group);
		before = cgroup_number(group, "memory.current", NULL);
		CHILD_CHECK(!open_store(&made, store->kind));
		_exit(cgroup_number(group, "memory.current", NULL) >= before + STORE_BYTES);
	}
	status = wait_for(pid);
	EXPECT_EQ(0, rmdir(group));
	return status == 1 ? "yes" : "no";
}

static int create_another(struct store *store)
{
	struct store made;

	return open_store(&made, store->kind);
}

SCENARIO(refused, "a cgroup without room refuses it",
	 "no: the OOM killer ends the creator", "yes (ENOMEM)")
{
	char group[64];
	pid_t pid;
	int status;

	make_cgroup(group, sizeof(group), "refused");
	limit_cgroup(group, STORE_BYTES / 2);
	pid = fork_child();
	if (!pid) {
		join_cgroup(group);
		_exit(-create_another(store));
	}
	status = wait_for(pid);
	EXPECT_EQ(0, rmdir(group));
	if (status == 128 + SIGKILL)
		return "no: the OOM killer ends the creator";
	return status == ENOMEM ? "yes (ENOMEM)" : "no";
}

SCENARIO(full_cgroup, "appends go on when the cgroup is full", "yes", "yes")
{
	struct child child;
	char group[64];
	bool appended;

	make_cgroup(group, sizeof(group), "full");
	if (start_child(&child)) {
		struct store made;
		const size_t bytes = 4 * MIB;
		uint8_t *more = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		join_cgroup(group);
		CHILD_CHECK(more != MAP_FAILED);
		CHILD_CHECK(!open_store(&made, store->kind));
		limit_cgroup(group, cgroup_number(group, "memory.current", NULL) + MIB);
		for (uint32_t row = 0; row < ROWS; row++)
			CHILD_CHECK(!append(&made, row, 1));
		CHILD_CHECK(say(child.line));
		/* the limit is real: it is the end of who needs memory */
		memset(more, 1, bytes);
		_exit(0);
	}
	appended = hear(child.line);
	EXPECT_EQ(128 + SIGKILL, end_child(&child));
	EXPECT_EQ(0, rmdir(group));
	return appended ? "yes" : "no";
}

/* The fewest that any of some rounds of appends made */
static uint64_t allocations_of_appends(struct __test_metadata *_metadata, struct store *store,
				       const struct allocation_meter *meter)
{
	uint64_t fewest = UINT64_MAX;
	uint8_t row[ROW_BYTES];

	fill_row(row, sizeof(row), 0);
	for (int round = 0; round < 5 && fewest; round++) {
		uint64_t first = count_allocations(meter), events;
		int failed = 0;

		for (int i = 0; i < 50; i++)
			failed |= device_append(store->producer, row, sizeof(row));
		events = count_allocations(meter) - first;
		ASSERT_EQ(0, failed);
		if (events < fewest)
			fewest = events;
	}
	return fewest;
}

SCENARIO(allocations, "an append allocates nothing",
	 "yes, until somebody watches the file with inotify", "yes")
{
	struct allocation_meter meter;
	char path[40];
	int inotify = inotify_init1(IN_CLOEXEC);
	uint64_t before;

	ASSERT_LE(0, inotify);
	open_allocation_meter(_metadata, &meter);
	ASSERT_EQ(0, mlockall(MCL_CURRENT));
	before = count_allocations(&meter);
	ASSERT_EQ(0, create_another(store));
	/* the meter works */
	ASSERT_LT(before, count_allocations(&meter));
	if (allocations_of_appends(_metadata, store, &meter))
		return "no";
	snprintf(path, sizeof(path), "/proc/self/fd/%d", store->producer);
	ASSERT_LE(0, inotify_add_watch(inotify, path, IN_ALL_EVENTS));
	if (allocations_of_appends(_metadata, store, &meter))
		return "yes, until somebody watches the file with inotify";
	return "yes";
}

/* Privilege */

SCENARIO(unprivileged_creator, "an unprivileged user can make one",
	 "no: the flag takes CAP_LINUX_IMMUTABLE, for each file",
	 "when the mode of the device node says so")
{
	int closed, open;

	closed = as_nobody(create_another, store);
	admit_everybody(_metadata, true);
	open = as_nobody(create_another, store);
	admit_everybody(_metadata, false);
	if (!closed)
		return "yes";
	if (open == -EPERM)
		return "no: the flag takes CAP_LINUX_IMMUTABLE, for each file";
	EXPECT_EQ(-EACCES, closed);
	return open ? "no" : "when the mode of the device node says so";
}

static int append_and_look(struct store *store)
{
	int err = append(store, 0, 2);

	if (err)
		return err;
	return rows_are_whole(store, 0, 2) ? 0 : -EIO;
}

SCENARIO(unprivileged_holder, "an unprivileged user can append and read by handles it was given",
	 "yes", "yes")
{
	return as_nobody(append_and_look, store) ? "no" : "yes";
}

/* The other side */

SCENARIO(without_a_module, "works on a stock kernel, without a module", "yes", "no")
{
	int err;

	close_store(store);
	ASSERT_EQ(0, remove_module());
	err = open_store(store, store->kind);
	if (!err)
		err = append_and_look(store);
	ASSERT_EQ(0, load_module(""));
	return err ? "no" : "yes";
}

/* MAP_FAILED where there is no such thing */
static void *map_writable(struct __test_metadata *_metadata, const struct kind *kind, int *fd)
{
	*fd = kind->create_writable();
	ASSERT_LE(0, *fd);
	return mmap(NULL, STORE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
}

SCENARIO(mapped_writes, "a producer can store rows without a system call",
	 "without the flag, mapped writable; that gives up the rest", "no")
{
	struct store loose = { .kind = store->kind, .creator = -1, .producer = -1 };
	void *rows = map_writable(_metadata, store->kind, &loose.reader);

	if (rows == MAP_FAILED)
		return "no";
	ASSERT_EQ(0, store->kind->map(&loose));
	fill_row(rows, ROW_BYTES, 0);
	if (!rows_are_whole(&loose, 0, 1))
		return "no";
	/* so can whoever else maps it, and what was written does not stay */
	memset(rows, 0, ROW_BYTES);
	EXPECT_FALSE(rows_are_whole(&loose, 0, 1));
	close_store(&loose);
	return "without the flag, mapped writable; that gives up the rest";
}

SCENARIO(private_view, "a private, copy-on-write view", "yes", "no")
{
	uint8_t *copy;

	ASSERT_EQ(0, append(store, 0, 1));
	copy = mmap(NULL, ROW_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, store->reader, 0);
	if (copy == MAP_FAILED)
		return "no";
	EXPECT_TRUE(row_is(copy, ROW_BYTES, 0));
	memset(copy, 0, ROW_BYTES);
	EXPECT_TRUE(rows_are_whole(store, 0, 1));
	munmap(copy, ROW_BYTES);
	return "yes";
}

/* Pin memory for long and for writing, which is how RDMA takes it, too; 0 or -errno */
static int pin(const void *at, size_t bytes)
{
	struct iovec buffer = { .iov_base = (void *)at, .iov_len = bytes };
	struct io_uring_params params = { 0 };
	int ring = syscall(SYS_io_uring_setup, 1, &params);
	int err = 0;

	if (ring < 0)
		return -errno;
	if (syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1))
		err = -errno;
	close(ring);
	return err;
}

SCENARIO(registered, "can be registered with io_uring as a buffer to write to",
	 "without the flag, mapped writable", "no")
{
	void *rows;
	int fd, err;

	ASSERT_EQ(0, append(store, 0, 1));
	err = pin(store->view.data, ROW_BYTES);
	if (!err)
		return "yes";
	EXPECT_EQ(-EFAULT, err);
	rows = map_writable(_metadata, store->kind, &fd);
	if (rows == MAP_FAILED)
		return "no";
	EXPECT_EQ(0, pin(rows, ROW_BYTES));
	munmap(rows, STORE_BYTES);
	close(fd);
	return "without the flag, mapped writable";
}

/* Why the recipe has no seals: the one that stops mappings and pwrite() stops appends as well. */
TEST(seals_stop_the_producer)
{
	uint8_t row[ROW_BYTES];
	int fd = memfd_create(MEMFD_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	int producer;

	fill_row(row, sizeof(row), 0);
	ASSERT_LE(0, fd);
	producer = memfd_reopen(fd, O_WRONLY);
	ASSERT_EQ(0, device_append(producer, row, sizeof(row)));
	ASSERT_EQ(0, fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
	ASSERT_EQ(0, device_append(producer, row, sizeof(row)));
	ASSERT_EQ(0, fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	EXPECT_EQ(-EPERM, device_append(producer, row, sizeof(row)));
	close(producer);
	close(fd);
}

#define SHMEM_ENABLED "/sys/kernel/mm/transparent_hugepage/shmem_enabled"

static long long huge_kilobytes(void)
{
	return number_in_file("/proc/self/smaps_rollup", "ShmemPmdMapped") +
	       number_in_file("/proc/self/smaps_rollup", "FilePmdMapped");
}

/* Linux aligns no mapping of a 32-bit program to them. */
#define HUGE_VIEWS (sizeof(void *) == 8 ? "where memory allows" : "no")

SCENARIO(huge_pages, "huge pages in views", "where `shmem_enabled` says so", HUGE_VIEWS)
{
	struct store made;
	long long after;

	/* the view that there is */
	if (huge_kilobytes())
		return "where memory allows";
	/* PREEMPT_RT has none */
	if (access(SHMEM_ENABLED, F_OK))
		SKIP(return NULL, "the kernel has no huge pages");
	/* it is "never" by default */
	write_file(SHMEM_ENABLED, "always");
	ASSERT_EQ(0, open_store(&made, store->kind));
	ASSERT_EQ(0, append(&made, 0, ROWS));
	scan(&made, 0, ROWS);
	after = huge_kilobytes();
	write_file(SHMEM_ENABLED, "never");
	close_store(&made);
	return after ? "where `shmem_enabled` says so" : "no";
}

/* The entry of a page in one of those files of /proc that have 8 bytes for each */
static uint64_t entry_of(struct __test_metadata *_metadata, const char *path, uint64_t page)
{
	uint64_t entry;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	ASSERT_LE(0, fd);
	ASSERT_EQ(sizeof(entry), pread(fd, &entry, sizeof(entry), page * sizeof(entry)));
	close(fd);
	return entry;
}

#define PAGEMAP_FRAME ((1ull << 55) - 1)
/* of linux/kernel-page-flags.h: on a list of what can be reclaimed, into swap */
#define RECLAIMED_INTO_SWAP (1ull << 5 | 1ull << 14)

SCENARIO(swap, "can be swapped out", "yes", "no")
{
	uint64_t frame, flags;

	ASSERT_EQ(0, append(store, 0, ROWS));
	scan(store, 0, 1);
	frame = entry_of(_metadata, "/proc/self/pagemap",
			 (uintptr_t)store->view.data / page_bytes()) & PAGEMAP_FRAME;
	ASSERT_NE(0, frame);
	flags = entry_of(_metadata, "/proc/kpageflags", frame);
	return (flags & RECLAIMED_INTO_SWAP) == RECLAIMED_INTO_SWAP ? "yes" : "no";
}

TEST_HARNESS_MAIN
