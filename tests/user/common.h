/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the user tests share: pads with recognisable rows, and children.
 *
 * The tests are written for kselftest_harness.h of the Linux source that the
 * test kernel is built from. They run as root inside a guest.
 */
#ifndef TESTS_USER_COMMON_H
#define TESTS_USER_COMMON_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <kselftest_harness.h>

#include "../../tools/lib/device.h"

/* The module seen from sysfs */
#define MAX_PER_PAD "/sys/module/kvscratch/parameters/max_bytes_per_pad"
#define MAX_TOTAL "/sys/module/kvscratch/parameters/max_bytes_total"
#define BYTES_TOTAL "/sys/module/kvscratch/parameters/bytes_total"
#define REFCNT "/sys/module/kvscratch/refcnt"

#define MIB (1ull << 20)

/* Emulated guests with every detector on are slow, a busy machine more so; a hang still ends. */
#ifndef TEST_SECONDS
#define TEST_SECONDS 900
#endif
/* What has no limit of its own gets the same one, not the 30 seconds of the harness. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT TEST_SECONDS

/* How often a race is run: @few, or what KVSCRATCH_ROUNDS says. Many need as many seconds. */
#define MANY_ROUNDS_SECONDS (8 * TEST_SECONDS)

static inline uint32_t rounds_or(uint32_t few)
{
	const char *rounds = getenv("KVSCRATCH_ROUNDS");

	return rounds ? strtoul(rounds, NULL, 10) : few;
}

/* Programs run the tests that their arguments name, or without one all. */
static inline bool is_selected(const char *test, char **names)
{
	if (!*names)
		return true;
	while (*names)
		if (!strcmp(*names++, test))
			return true;
	return false;
}

static inline void select_tests(char **names)
{
	struct __fixture_metadata *fixture;
	struct __test_metadata **at;

	for (fixture = __fixture_list; fixture; fixture = fixture->next)
		for (at = &fixture->tests; *at; )
			if (is_selected((*at)->name, names))
				at = &(*at)->next;
			else
				*at = (*at)->next;
}

#undef TEST_HARNESS_MAIN
#define TEST_HARNESS_MAIN \
	int main(int argc, char **argv) { \
		select_tests(argv + 1); \
		return test_harness_run(argc, argv); \
	}

/* A call that must fail with exactly this errno. */
#define EXPECT_ERRNO(error, call) do { \
	errno = 0; \
	EXPECT_EQ(-1, (long)(call)); \
	EXPECT_EQ(error, errno); \
} while (0)

static inline size_t page_bytes(void)
{
	return sysconf(_SC_PAGESIZE);
}

/* Whether order 9 is refused: no chunk is huge, see fragmented.c */
static inline bool is_fragmented(void)
{
	return getenv("KVSCRATCH_FRAGMENTED");
}

/* Whether a page table entry can map a chunk: not of larger pages, nor without THP (PREEMPT_RT) */
static inline bool one_entry_maps_a_chunk(void)
{
	return page_bytes() == 4096 && !access("/sys/kernel/mm/transparent_hugepage", F_OK);
}

/*
 * What a pad of one plane takes from the module's limits where memory is not fragmented: data,
 * a pointer and a struct of four words for each chunk, a pointer for each single page, a page
 * for the planes and the status page. The kernel's pointers have 8 bytes.
 */
static inline uint64_t charged_bytes(uint64_t max_seq_len, uint32_t row_bytes)
{
	const uint64_t page = page_bytes();
	uint64_t bytes = max_seq_len * row_bytes;
	uint64_t charged = 2 * page;

	while (bytes) {
		uint64_t chunk = bytes < KVSCRATCH_CHUNK_BYTES ? bytes : KVSCRATCH_CHUNK_BYTES;
		uint64_t pages = (chunk + page - 1) / page;

		/* a huge page is there as a whole; where page tables map more, there is none */
		charged += 8 + 32;
		charged += page == 4096 && chunk > KVSCRATCH_CHUNK_BYTES / 2 ?
			   KVSCRATCH_CHUNK_BYTES : pages * (page + 8);
		bytes -= chunk;
	}
	return charged;
}

/* Of a mapping, up to the status page */
static inline size_t view_data_bytes(const struct kvscratch_view *view)
{
	return (const char *)view->status - (const char *)view->data;
}

/* A handle on a new pad of rows of @row_bytes opaque bytes, or -errno */
static inline int new_pad(uint64_t max_seq_len, uint32_t row_bytes)
{
	return device_create(max_seq_len, row_bytes, KVSCRATCH_DTYPE_U8);
}

static inline uint64_t len_of(int fd)
{
	struct kvscratch_pad_info info;

	return device_pad_info(fd, &info) ? UINT64_MAX : info.len;
}

static inline uint64_t generation_of(int fd)
{
	struct kvscratch_pad_info info;

	return device_pad_info(fd, &info) ? UINT64_MAX : info.generation;
}

/* Each byte of a row depends on @seed and its place: a torn row shows. */
static inline uint8_t row_byte(uint32_t seed, size_t i)
{
	return (uint8_t)(seed * 37 + i * 11 + (i >> 8) + 1);
}

static inline void fill_row(void *row, size_t row_bytes, uint32_t seed)
{
	uint8_t *bytes = row;

	for (size_t i = 0; i < row_bytes; i++)
		bytes[i] = row_byte(seed, i);
}

static inline bool row_is(const void *row, size_t row_bytes, uint32_t seed)
{
	const uint8_t *bytes = row;

	for (size_t i = 0; i < row_bytes; i++)
		if (bytes[i] != row_byte(seed, i))
			return false;
	return true;
}

static inline bool all_zero(const void *at, size_t bytes)
{
	const uint8_t *byte = at;

	/* each byte is the one before it */
	return !bytes || (!byte[0] && !memcmp(byte, byte + 1, bytes - 1));
}

/* Append rows with seeds first .. first + count - 1; 0 or -errno */
static inline int append_rows(int fd, size_t row_bytes, uint32_t first, uint32_t count)
{
	uint8_t *rows = malloc(row_bytes * count);
	int err;

	if (!rows)
		return -ENOMEM;
	for (uint32_t i = 0; i < count; i++)
		fill_row(rows + i * row_bytes, row_bytes, first + i);
	err = device_append(fd, rows, row_bytes * count);
	free(rows);
	return err;
}

/* fork() whose child does not outlive a test that fails */
static inline pid_t fork_child(void)
{
	pid_t parent = getpid();
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
	}
	return pid;
}

/* Exit status of a child; 128 + n when signal n ended it */
static inline int wait_for(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* In a child there is no test to fail: it says what broke and exits with 1. */
#define CHILD_CHECK(condition) do { \
	if (!(condition)) { \
		fprintf(stderr, "# child, line %d: %s is false, errno %d\n", \
			__LINE__, #condition, errno); \
		_exit(1); \
	} \
} while (0)

/* A child and a line to it. A wait on the line ends when the peer is gone. */
struct child {
	pid_t pid;
	int line;
};

/* True in the child, which never outlives the test. */
static inline bool start_child(struct child *child)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends)) {
		perror("a line to a child");
		abort();
	}
	child->pid = fork_child();
	if (child->pid < 0) {
		perror("a child");
		abort();
	}
	child->line = ends[!child->pid];
	close(ends[!!child->pid]);
	return !child->pid;
}

static inline bool say(int line)
{
	return send(line, "", 1, MSG_NOSIGNAL) == 1;
}

static inline bool hear(int line)
{
	char byte;

	return read(line, &byte, 1) == 1;
}

static inline int end_child(struct child *child)
{
	close(child->line);
	return wait_for(child->pid);
}

/*
 * Stop whoever of this process touches a page of the range, which must not have
 * any yet. The descriptor tells of it and lets go on; children have no part in
 * it, so a child calls this and passes the descriptor on.
 */
static inline int stop_at(void *at, size_t bytes)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)at, .len = bytes },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);

	CHILD_CHECK(fd >= 0);
	CHILD_CHECK(!ioctl(fd, UFFDIO_API, &api));
	CHILD_CHECK(!ioctl(fd, UFFDIO_REGISTER, &range));
	return fd;
}

/* Wait until somebody was stopped. */
static inline bool await_stop(int faults)
{
	struct uffd_msg msg;

	return read(faults, &msg, sizeof(msg)) == sizeof(msg) && msg.event == UFFD_EVENT_PAGEFAULT;
}

/* Until @pid sleeps in a system call: 'S', or 'D' where signals do not end it; 0 when it is gone */
static inline char await_sleep(pid_t pid)
{
	char path[64], text[512];

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	for (;;) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t got = read(fd, text, sizeof(text) - 1);
		char state;

		close(fd);
		if (got <= 0)
			return 0;
		text[got] = '\0';
		state = strrchr(text, ')')[2];
		if (state == 'S' || state == 'D')
			return state;
		if (state == 'Z')
			return 0;
		sched_yield();
	}
}

/* The caller, and those that it makes from now on, run there and nowhere else. */
static inline void keep_to_cpu(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		abort();
}

static inline void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	size_t bytes = strlen(text);

	if (fd < 0 || write(fd, text, bytes) != (ssize_t)bytes) {
		fprintf(stderr, "cannot write %s to %s: %s\n", text, path, strerror(errno));
		abort();
	}
	close(fd);
}

static inline void write_number(const char *path, uint64_t number)
{
	char text[24];

	snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
	write_file(path, text);
}

/* The number after @key in a file of "key number" or "key: number" lines, or in @path itself */
static inline long long number_in_file(const char *path, const char *key)
{
	char text[16384];
	const char *at = text;
	ssize_t got;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	got = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (got < 0)
		return -1;
	text[got] = '\0';
	if (key) {
		at = strstr(text, key);
		if (!at)
			return -1;
		at += strlen(key);
		at += strspn(at, ": \t");
	}
	return strtoll(at, NULL, 10);
}

static inline void set_limits(uint64_t per_pad, uint64_t total)
{
	write_number(MAX_PER_PAD, per_pad);
	write_number(MAX_TOTAL, total);
}

/* 0 when a new pad of one page is all that is accounted; leaves other limits */
static inline int nothing_accounted(void)
{
	int fd;

	set_limits(charged_bytes(1, 1), charged_bytes(1, 1));
	fd = new_pad(1, 1);
	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}

/* mmap() with any page offset, also where off_t is too small for it */
static inline void *map_page_offset(size_t bytes, int fd, unsigned long page_offset)
{
#ifdef SYS_mmap2
	/* counts in 4096 bytes whatever the page size */
	return (void *)syscall(SYS_mmap2, NULL, bytes, PROT_READ, MAP_SHARED, fd, page_offset);
#else
	return (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ, MAP_SHARED, fd,
			       page_offset * page_bytes());
#endif
}

#endif
