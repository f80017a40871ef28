/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * io_uring, by its system calls: a ring of one.
 */
#ifndef TESTS_USER_RING_H
#define TESTS_USER_RING_H

#include "common.h"

#include <linux/io_uring.h>

struct ring {
	int fd;
	void *sq, *cq;
	size_t sq_bytes, cq_bytes, sqe_bytes;
	unsigned int *sq_tail, *sq_array;
	unsigned int *cq_head, *cq_tail;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqes;
	unsigned int cq_mask;
};

static inline int ring_open(struct ring *ring)
{
	struct io_uring_params params = { 0 };
	char *sq, *cq;

	*ring = (struct ring) { 0 };
	ring->fd = syscall(__NR_io_uring_setup, 1, &params);
	if (ring->fd < 0)
		return -errno;
	ring->sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned int);
	ring->cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	ring->sqe_bytes = params.sq_entries * sizeof(struct io_uring_sqe);
	sq = mmap(NULL, ring->sq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
		  IORING_OFF_SQ_RING);
	cq = mmap(NULL, ring->cq_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
		  IORING_OFF_CQ_RING);
	ring->sqe = mmap(NULL, ring->sqe_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd,
			 IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || ring->sqe == MAP_FAILED)
		return -errno;
	ring->sq = sq;
	ring->cq = cq;
	ring->sq_tail = (void *)(sq + params.sq_off.tail);
	ring->sq_array = (void *)(sq + params.sq_off.array);
	ring->cq_head = (void *)(cq + params.cq_off.head);
	ring->cq_tail = (void *)(cq + params.cq_off.tail);
	ring->cq_mask = params.cq_entries - 1;
	ring->cqes = (void *)(cq + params.cq_off.cqes);
	return 0;
}

static inline void ring_close(struct ring *ring)
{
	munmap(ring->sqe, ring->sqe_bytes);
	munmap(ring->cq, ring->cq_bytes);
	munmap(ring->sq, ring->sq_bytes);
	close(ring->fd);
}

/* Submit one request; 0 or -errno */
static inline int ring_submit(struct ring *ring, const struct io_uring_sqe *sqe)
{
	*ring->sqe = *sqe;
	ring->sq_array[0] = 0;
	__atomic_store_n(ring->sq_tail, *ring->sq_tail + 1, __ATOMIC_RELEASE);
	return syscall(__NR_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0) == 1 ? 0 : -errno;
}

/* Whether a request has its result already */
static inline bool ring_is_done(const struct ring *ring)
{
	return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) != *ring->cq_head;
}

/* Wait for a request and return its result */
static inline int ring_wait(struct ring *ring)
{
	unsigned int head = *ring->cq_head;
	int result;

	while (!ring_is_done(ring))
		if (syscall(__NR_io_uring_enter, ring->fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0))
			return -errno;
	result = ring->cqes[head & ring->cq_mask].res;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return result;
}

/* Submit one request and return its result */
static inline int ring_do(struct ring *ring, const struct io_uring_sqe *sqe)
{
	int err = ring_submit(ring, sqe);

	return err ? err : ring_wait(ring);
}

#endif
