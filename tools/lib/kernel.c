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

static int kernel_create(int *fd, const struct kvscratch_geometry *geometry)
{
	const struct kvscratch_plane plane = {
		.dim = geometry->dim,
		.dtype = geometry->dtype,
		.input_dtype = geometry->input_dtype,
		.frac_bits = geometry->frac_bits,
	};
	int node = open_device(O_WRONLY);

	if (node < 0)
		return node;
	*fd = device_create_on(node, geometry->max_seq_len, &plane, 1);
	close(node);
	if (*fd >= 0)
		return 0;
	/* what no node of ours says */
	if (*fd == -ENOTTY)
		return set_error(-ENODEV, NODE_IS_TAKEN, "another device");
	return set_error(*fd, "cannot create a pad of [%" PRIu64 ", %" PRIu32 "] %s: %s",
			 geometry->max_seq_len, geometry->dim,
			 kvscratch_dtype_name(geometry->dtype), kvscratch_strerror(*fd));
}

static int kernel_reopen(int *fd, int src_fd, int access)
{
	*fd = device_reopen(src_fd, access);
	return *fd < 0 ? cannot("open another handle on the pad", *fd) : 0;
}

static int fail_planes(int fd)
{
	struct kvscratch_pad_info info;
	int err = device_pad_info(fd, &info);

	if (err)
		return cannot("describe the pad", err);
	return set_error(-EOPNOTSUPP, "descriptor %d: expected a pad of one plane, got one of %"
			 PRIu32, fd, info.nr_planes);
}

static int kernel_adopt(struct kvscratch *pad)
{
	int err = device_info(pad->fd, &pad->info);

	/* other files know no such ioctl; some call the wrong one ENOTTY, some EINVAL */
	if (err == -ENOTTY || err == -EINVAL)
		return -ENOTTY;
	if (err == -EOPNOTSUPP)
		return fail_planes(pad->fd);
	return err ? set_error(err, "descriptor %d: %s", pad->fd, kvscratch_strerror(err)) : 0;
}

static void kernel_release(struct kvscratch *pad)
{
	(void)pad;
}

static int kernel_info(struct kvscratch *pad, struct kvscratch_info *info)
{
	int err = device_info(pad->fd, info);

	return err ? cannot("describe the pad", err) : 0;
}

static int kernel_append(struct kvscratch *pad, const void *rows, uint64_t nr_rows)
{
	struct kvscratch_info info;
	int err = -ENOSPC;

	/* a batch of more rows than fit may be too long to be written */
	if (nr_rows <= pad->info.max_seq_len)
		err = device_append(pad->fd, rows, nr_rows * pad->info.input_row_bytes);
	if (err == -ENOSPC && !device_info(pad->fd, &info))
		return fail_room(info.len, nr_rows, info.max_seq_len);
	return err ? cannot("append", err) : 0;
}

static int kernel_truncate(struct kvscratch *pad, uint64_t len, uint32_t flags)
{
	struct kvscratch_info info;
	int err = device_truncate(pad->fd, len, flags);

	if (err == -EINVAL && !device_info(pad->fd, &info) && len > info.len)
		return set_error(err, "expected at most %" PRIu64 ", the committed rows, got %"
				 PRIu64, (uint64_t)info.len, len);
	return err ? cannot("truncate", err) : 0;
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

static int wait_on(const struct kvscratch *pad, int fd, uint64_t state, int timeout_ms)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN };
	const int64_t end = now_ms() + timeout_ms;

	for (;;) {
		int64_t left = timeout_ms < 0 ? -1 : end - now_ms();
		int ready;

		if (kvscratch_view_state(pad->view) != state)
			return 0;
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
	int own, err;

	if (kvscratch_view_state(pad->view) != state)
		return 0;
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
	.reopen = kernel_reopen,
	.adopt = kernel_adopt,
	.release = kernel_release,
	.info = kernel_info,
	.append = kernel_append,
	.truncate = kernel_truncate,
	.wait = kernel_wait,
};
