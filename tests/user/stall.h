/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Operations whose source does not arrive: it is registered with userfaultfd, and
 * nobody serves the fault. They hold the pad's turn until then.
 */
#ifndef TESTS_USER_STALL_H
#define TESTS_USER_STALL_H

#include "common.h"

/**
 * struct stall - a child that is stopped in the middle of an operation
 * @child: exits with the errno of the operation, or 0
 * @faults: tells that it was stopped, and lets it go on
 * @source: where its source is, at the same address in the child
 * @bytes: of the source
 */
struct stall {
	struct child child;
	int faults;
	uint8_t *source;
	size_t bytes;
};

/* The operation of the child; whatever it finds at @source is its input. */
typedef int (*stalled_call)(int fd, const void *source, size_t bytes);

static inline int stalled_append(int fd, const void *source, size_t bytes)
{
	return device_append(fd, source, bytes);
}

/* The next row of plane 0 */
static inline int stalled_stage(int fd, const void *source, size_t bytes)
{
	(void)bytes;
	return device_stage(fd, 0, len_of(fd), source, 1);
}

/* Returns when the child waits inside its copy, for the first page of its source. */
static inline void start_stall(struct stall *stall, int fd, size_t bytes, stalled_call call)
{
	const char *const name = "uffd";
	char text[16];

	stall->bytes = bytes;
	/* untouched, so that each process has its own, at the same address */
	stall->source = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			     -1, 0);
	if (stall->source == MAP_FAILED)
		abort();
	if (start_child(&stall->child)) {
		int faults = stop_at(stall->source, bytes);

		CHILD_CHECK(!kvscratch_send_handles(stall->child.line, &name, &faults, 1));
		close(faults);
		_exit(-call(fd, stall->source, bytes));
	}
	if (kvscratch_receive_handles(stall->child.line, text, sizeof(text), &stall->faults, 1) != 1 ||
	    !await_stop(stall->faults)) {
		fprintf(stderr, "# the operation to be stalled did not begin\n");
		abort();
	}
}

/* Let the source be @rows, to the end of its last page. */
static inline bool serve_stall(struct stall *stall, const void *rows)
{
	struct uffdio_copy copy = {
		.dst = (uintptr_t)stall->source,
		.src = (uintptr_t)rows,
		.len = stall->bytes,
	};

	return !ioctl(stall->faults, UFFDIO_COPY, &copy);
}

/* The errno of the operation, 128 + SIGKILL of one that is killed */
static inline int end_stall(struct stall *stall)
{
	int status = end_child(&stall->child);

	close(stall->faults);
	munmap(stall->source, stall->bytes);
	return status;
}

static inline int kill_stall(struct stall *stall)
{
	kill(stall->child.pid, SIGKILL);
	return end_stall(stall);
}

#endif
