// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a token over many planes costs, by one write() and by STAGE and COMMIT, and what
 * a writer pays for readers that have registered for wake-ups.
 */
#include "bench.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#define PLANES 64
#define PLANE_BYTES (2 * KIB)
#define TOKEN_BYTES (PLANES * PLANE_BYTES)
#define TOKENS 256

#define REGISTRATIONS 50000

static int new_planes_pad(void)
{
	struct kvscratch_plane planes[PLANES];

	for (int i = 0; i < PLANES; i++)
		planes[i] = (struct kvscratch_plane){
			.dim = PLANE_BYTES, .dtype = KVSCRATCH_DTYPE_U8,
		};
	return device_create_planes(TOKENS, planes, PLANES);
}

static void stage_and_commit(int writer, uint64_t len, const char *token)
{
	for (uint32_t plane = 0; plane < PLANES; plane++)
		CHECK(!device_stage(writer, plane, len, token + plane * PLANE_BYTES, 1));
	CHECK(!device_commit(writer, len + 1));
}

static void write_to_memfds(const int *fds, uint64_t len, const char *token)
{
	for (int i = 0; i < PLANES; i++)
		CHECK(pwrite(fds[i], token + i * PLANE_BYTES, PLANE_BYTES, len * PLANE_BYTES) ==
		      (ssize_t)PLANE_BYTES);
}

enum way { BY_WRITE, BY_STAGE, BY_COMMIT, BY_MEMFDS };

/* The first tokens warm up. */
static void measure_way(enum way way, const struct figure *figure, int fd, const int *fds,
			const char *token)
{
	unsigned int runs = sample_runs(TOKEN_BYTES);

	for (uint64_t len = 0; len < 4 + runs && len < TOKENS; len++) {
		uint64_t start;

		if (way == BY_COMMIT)
			for (uint32_t plane = 0; plane < PLANES; plane++)
				CHECK(!device_stage(fd, plane, len, token, 1));
		start = now();
		switch (way) {
		case BY_WRITE:
			CHECK(!device_append(fd, token, TOKEN_BYTES));
			break;
		case BY_STAGE:
			stage_and_commit(fd, len, token);
			break;
		case BY_COMMIT:
			CHECK(!device_commit(fd, len + 1));
			break;
		case BY_MEMFDS:
			write_to_memfds(fds, len, token);
			break;
		}
		if (len >= 4)
			sample((double)(now() - start) - overhead);
	}
	record(figure);
}

static void measure_memfds(const char *token)
{
	static const struct figure figure = {
		.op = "token", .implementation = "64 memfd pwrites", .limit_bytes = NO_LIMIT,
	};
	int fds[PLANES];

	for (int i = 0; i < PLANES; i++) {
		fds[i] = memfd_create("plane", MFD_CLOEXEC);
		CHECK(fds[i] >= 0 && !fallocate(fds[i], 0, 0, TOKENS * PLANE_BYTES));
	}
	measure_way(BY_MEMFDS, &figure, -1, fds, token);
	for (int i = 0; i < PLANES; i++)
		close(fds[i]);
}

static void measure_pads(const char *token)
{
	static const struct figure figures[] = {
		[BY_WRITE] = { .op = "token", .implementation = "kvscratch write",
			       .limit_bytes = NO_LIMIT },
		[BY_STAGE] = { .op = "token", .implementation = "kvscratch STAGE, COMMIT",
			       .limit_bytes = NO_LIMIT },
		[BY_COMMIT] = { .op = "commit", .implementation = "kvscratch",
				.limit_bytes = NO_LIMIT },
	};

	for (enum way way = BY_WRITE; way <= BY_COMMIT; way++) {
		int pad, fd;

		if (!module_loaded()) {
			record_absent(&figures[way], "the module is not loaded");
			continue;
		}
		pad = new_planes_pad();
		CHECK(pad >= 0);
		fd = device_open_writer(pad, 0);
		CHECK(fd >= 0);
		measure_way(way, &figures[way], fd, NULL, token);
		close(fd);
		close(pad);
	}
}

/* The registration outlives the copy, whose number is not used again. */
static void register_often(int epoll, int reader)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	const struct rlimit limit = { REGISTRATIONS + 1024, REGISTRATIONS + 1024 };

	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
	for (int i = 0; i < REGISTRATIONS; i++) {
		int copy = fcntl(reader, F_DUPFD, 1024 + i);

		CHECK(copy >= 0 && !epoll_ctl(epoll, EPOLL_CTL_ADD, copy, &event));
		close(copy);
	}
}

/* Nobody preempts the writer, and who wakes the readers has the CPU between two appends. */
static void measure_beside_readers(const char *row, int registrations)
{
	const struct figure figure = {
		.op = "append beside readers", .implementation = registrations ? "50000" : "none",
		.limit_bytes = NO_LIMIT,
	};
	const struct sched_param first = { .sched_priority = 1 }, normal = { 0 };
	const struct timespec pause = { .tv_nsec = 200000000 };
	int pad, reader, epoll = epoll_create1(EPOLL_CLOEXEC);

	if (!module_loaded()) {
		record_absent(&figure, "the module is not loaded");
		return;
	}
	pad = new_pad(TOKENS, KIB);
	reader = device_open_reader(pad);
	CHECK(reader >= 0);
	if (registrations)
		register_often(epoll, reader);
	CHECK(!sched_setscheduler(0, SCHED_FIFO, &first));
	for (int i = 0; i < 12; i++) {
		uint64_t start = now();

		CHECK(!device_append(pad, row, KIB));
		if (i >= 4)
			sample((double)(now() - start) - overhead);
		nanosleep(&pause, NULL);
	}
	CHECK(!sched_setscheduler(0, SCHED_OTHER, &normal));
	record(&figure);
	close(epoll);
	close(reader);
	close(pad);
}

void measure_tokens(void)
{
	char *token = new_memory(TOKEN_BYTES);

	memset(token, 1, TOKEN_BYTES);
	measure_pads(token);
	measure_memfds(token);
	measure_beside_readers(token, 0);
	measure_beside_readers(token, REGISTRATIONS);
	munmap(token, TOKEN_BYTES);
}
