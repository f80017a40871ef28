// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads of the module: every call is one of the device's.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "backend.h"
#include "device.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NODE_IS_TAKEN KVSCRATCH_DEVICE ": expected the device of the module, got %s: remove it " \
	"and load the module; KVSCRATCH_BACKEND=memfd works without"

/* Root makes files of a name that is not there. One is not opened: a FIFO would wait. */
static int check_node(void)
{
	struct stat status;

	/* open() says what else is wrong */
	if (stat(KVSCRATCH_DEVICE, &status) || S_ISCHR(status.st_mode))
		return 0;
	return set_error(-ENODEV, NODE_IS_TAKEN, file_kind(status.st_mode));
}

static int open_device(int access)
{
	int fd = check_node();

	if (fd)
		return fd;
	fd = device_open(access);
	if (fd == -EACCES)
		return set_error(fd, "cannot open " KVSCRATCH_DEVICE ": expected permission, as the "
				 "group of the device has; KVSCRATCH_BACKEND=memfd works without");
	return fd < 0 ? cannot("open " KVSCRATCH_DEVICE, fd) : fd;
}

/* What the layout said is the kernel's to say. */
static void clear_outputs(struct new_pad *made)
{
	const size_t outputs = offsetof(struct kvscratch_plane, offset);

	for (uint32_t i = 0; i < made->nr_planes; i++)
		memset((char *)&made->planes[i] + outputs, 0, sizeof(made->planes[i]) - outputs);
}

static int kernel_create(int *fd, struct new_pad *made)
{
	int node = open_device(O_WRONLY);

	if (node < 0)
		return node;
	clear_outputs(made);
	*fd = device_create_tagged(node, made->max_seq_len, made->planes, made->nr_planes,
				   made->tag);
	close(node);
	if (*fd >= 0)
		return 0;
	/* what no node of ours says */
	if (*fd == -ENOTTY)
		return set_error(-ENODEV, NODE_IS_TAKEN, "another device");
	return fail_create(made, *fd, kvscratch_strerror(*fd));
}

static int kernel_fork(int *fd, struct kvscratch *source, struct new_pad *made,
		       uint64_t generation)
{
	int node = open_device(O_WRONLY);

	if (node < 0)
		return node;
	*fd = device_fork_on(node, source->fd, made->rows, generation, made->max_seq_len);
	close(node);
	if (*fd == -ECANCELED)
		return fail_fork();
	return *fd < 0 ? fail_create(made, *fd, kvscratch_strerror(*fd)) : 0;
}

static int kernel_reopen(int *fd, int src_fd, int access)
{
	*fd = device_reopen(src_fd, access);
	return *fd < 0 ? cannot("open another handle on the pad", *fd) : 0;
}

/* All planes at once: a pad never gets others. */
static int read_planes(struct kvscratch *pad, uint32_t nr_planes)
{
	int count;

	pad->planes = calloc(nr_planes, sizeof(*pad->planes));
	if (!pad->planes)
		return out_of_memory();
	count = device_planes(pad->fd, 0, pad->planes, nr_planes);
	if (count < 0)
		return cannot("describe the planes of the pad", count);
	pad->nr_planes = count;
	return 0;
}

static int kernel_adopt(struct kvscratch *pad)
{
	struct kvscratch_pad_info info;
	int err = device_pad_info(pad->fd, &info);

	/* other files know no such ioctl; some call the wrong one ENOTTY, some EINVAL */
	if (err == -ENOTTY || err == -EINVAL)
		return -ENOTTY;
	if (err)
		return set_error(err, "descriptor %d: %s", pad->fd, kvscratch_strerror(err));
	err = read_planes(pad, info.nr_planes);
	if (!err)
		describe(&pad->info, &info, pad->planes);
	return err;
}

static void kernel_release(struct kvscratch *pad)
{
	(void)pad;
}

static int kernel_info(struct kvscratch *pad, struct kvscratch_pad_info *info)
{
	int err = device_pad_info(pad->fd, info);

	return err ? cannot("describe the pad", err) : 0;
}

/*
 * What a batch of more rows than fit ends with, which may be too long to be written: a truncate
 * that is impossible, too, says whether the handle could have changed the pad.
 */
static int fail_oversized(const struct kvscratch *pad)
{
	int err = device_truncate(pad->fd, UINT64_MAX, 0);

	return err == -EINVAL ? -ENOSPC : err;
}

static int kernel_append(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens)
{
	struct kvscratch_pad_info info;
	int err;

	if (nr_tokens <= pad->info.max_seq_len)
		err = device_append(pad->fd, tokens, nr_tokens * pad->info.input_row_bytes);
	else
		err = fail_oversized(pad);
	if (err == -ENOSPC && !device_pad_info(pad->fd, &info))
		return fail_room(info.len, nr_tokens, info.max_seq_len);
	return err ? cannot("append", err) : 0;
}

static int kernel_truncate(struct kvscratch *pad, const struct kvscratch_truncate *truncate)
{
	const uint32_t flags = truncate->flags & ~KVSCRATCH_TRUNCATE_EXPECT;
	struct kvscratch_pad_info info;
	int err;

	if (truncate->flags & KVSCRATCH_TRUNCATE_EXPECT)
		err = device_truncate_if(pad->fd, truncate->len, flags,
					 truncate->expected_generation, truncate->expected_len);
	else
		err = device_truncate(pad->fd, truncate->len, flags);
	if (err && !device_pad_info(pad->fd, &info)) {
		if (err == -EINVAL && truncate->len > info.len)
			return fail_truncate(info.len, truncate->len);
		if (err == -ECANCELED)
			return fail_expectation(truncate, info.generation, info.len);
	}
	return err ? cannot("truncate", err) : 0;
}

/* The writer */

static int kernel_open_writer(const struct kvscratch *pad, uint32_t flags, int *fd,
			      struct memfd_role *role)
{
	(void)role;
	*fd = device_open_writer(pad->fd, flags);
	return *fd < 0 ? cannot("become the writer", *fd) : 0;
}

static int kernel_stage(struct kvscratch *pad, const struct kvscratch_stage *stage)
{
	const bool keep = stage->flags & KVSCRATCH_STAGE_KEEP;
	struct kvscratch_pad_info info;
	int err;

	if (keep)
		err = device_keep(pad->fd, stage->plane, stage->row, stage->rows);
	else
		err = device_stage(pad->fd, stage->plane, stage->row,
				   (const void *)(uintptr_t)stage->addr, stage->rows);
	if (err == -ENOSPC)
		return fail_room(stage->row, stage->rows, pad->info.max_seq_len);
	if (err == -EINVAL && !device_pad_info(pad->fd, &info))
		return fail_stage(stage, &pad->planes[stage->plane], info.len);
	return err ? cannot(keep ? "keep rows" : "stage rows", err) : 0;
}

static int kernel_commit(struct kvscratch *pad, uint64_t len)
{
	struct kvscratch_pad_info info;
	int err = device_commit(pad->fd, len);

	if (err == -EINVAL && !device_pad_info(pad->fd, &info))
		return fail_commit(info.len, len);
	return err ? cannot("commit", err) : 0;
}

static int kernel_seal(struct kvscratch *pad)
{
	int err = device_seal(pad->fd);

	return err ? cannot("seal the pad", err) : 0;
}

/* Waiting */

static int kernel_seen(struct kvscratch *pad, uint64_t state)
{
	int err = device_seen(pad->fd, state);

	return err ? cannot("tell poll() what was seen", err) : 0;
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

static int wait_on(const struct kvscratch *pad, int fd, uint64_t state, int timeout_ms)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN | POLLRDHUP };
	const int64_t end = now_ms() + timeout_ms;

	for (;;) {
		int64_t left = timeout_ms < 0 ? -1 : end - now_ms();
		int ready = wait_is_over(pad->view, state);

		if (ready)
			return ready < 0 ? ready : 0;
		if (timeout_ms >= 0 && left < 0)
			left = 0;
		ready = poll(&polled, 1, left);
		if (ready < 0)
			return cannot("wait", -errno);
		if (!ready)
			return set_error(-ETIMEDOUT, "nothing was appended or dropped in time");
	}
}

/* What one open file has seen is one state: who waits has a handle of its own. */
static int kernel_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	int own;
	int err = wait_is_over(pad->view, state);

	if (err)
		return err < 0 ? err : 0;
	own = device_open_reader(pad->fd);
	if (own < 0)
		return cannot("wait", own);
	err = device_seen(own, state);
	err = err ? cannot("wait", err) : wait_on(pad, own, state, timeout_ms);
	close(own);
	return err;
}

const struct backend kernel_backend = {
	.id = KVSCRATCH_BACKEND_KERNEL,
	.create = kernel_create,
	.fork = kernel_fork,
	.reopen = kernel_reopen,
	.adopt = kernel_adopt,
	.release = kernel_release,
	.info = kernel_info,
	.append = kernel_append,
	.truncate = kernel_truncate,
	.wait = kernel_wait,
	.open_writer = kernel_open_writer,
	.stage = kernel_stage,
	.commit = kernel_commit,
	.seal = kernel_seal,
	.seen = kernel_seen,
};
