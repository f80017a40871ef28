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
	struct kvscratch_info unused;
	int fd = check_node();

	if (fd)
		return fd;
	fd = device_open(access);
	if (fd == -EACCES)
		return set_error(fd, "cannot open " KVSCRATCH_DEVICE ": expected permission, as the "
				 "group of the device has; KVSCRATCH_BACKEND=memfd works without");
	if (fd < 0)
		return cannot("open " KVSCRATCH_DEVICE, fd);
	/* what a new handle of ours says, and no other device */
	if (device_info(fd, &unused) == -EBADFD)
		return fd;
	close(fd);
	return set_error(-ENODEV, NODE_IS_TAKEN, "another device");
}

static int bind_new(int fd, const struct kvscratch_geometry *geometry)
{
	int err = device_create_scaled(fd, geometry->max_seq_len, geometry->dim, geometry->dtype,
				       geometry->input_dtype, geometry->frac_bits);

	return err ? set_error(err, "cannot create a pad of [%" PRIu64 ", %" PRIu32 "] %s: %s",
			       geometry->max_seq_len, geometry->dim,
			       kvscratch_dtype_name(geometry->dtype), kvscratch_strerror(err)) : 0;
}

static int kernel_create(int *fd, const struct kvscratch_geometry *geometry)
{
	int err;

	*fd = open_device(O_RDWR);
	if (*fd < 0)
		return *fd;
	err = bind_new(*fd, geometry);
	if (err)
		close(*fd);
	return err;
}

static int kernel_reopen(int *fd, int src_fd, int access)
{
	int err;

	*fd = open_device(access);
	if (*fd < 0)
		return *fd;
	err = device_attach(*fd, src_fd);
	if (!err)
		return 0;
	close(*fd);
	return cannot("attach to the pad", err);
}

static int kernel_adopt(struct kvscratch *pad)
{
	int err = device_info(pad->fd, &pad->info);

	/* other files know no such ioctl; some call the wrong one ENOTTY, some EINVAL */
	if (err == -ENOTTY || err == -EINVAL || err == -EOPNOTSUPP)
		return -ENOTTY;
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

/*
 * @fd has a position that nobody else moves: neither another waiter nor a write(), which puts
 * it back when it returns.
 */
static int wait_on(const struct kvscratch *pad, int fd, uint64_t state, int timeout_ms)
{
	struct pollfd polled = { .fd = fd, .events = POLLIN | POLLPRI };
	const int64_t end = now_ms() + timeout_ms;

	for (;;) {
		int64_t left = timeout_ms < 0 ? -1 : end - now_ms();
		off_t seen = (off_t)kvscratch_state_len(state) * pad->info.row_bytes;
		int ready;

		/* acknowledge, then look, then sleep: see struct kvscratch_status */
		lseek(fd, seen, SEEK_SET);
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

static int kernel_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	int own, err;

	if (kvscratch_view_state(pad->view) != state)
		return 0;
	/* where the device cannot be opened, the handle itself has to do */
	if (kernel_reopen(&own, pad->fd, O_RDONLY))
		own = -1;
	err = wait_on(pad, own < 0 ? pad->fd : own, state, timeout_ms);
	if (own >= 0)
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

/* An errno of a call that ENOTTY tells is none of the device's */
static int check_handle(int fd, int err)
{
	struct stat status;

	if (err != -ENOTTY || fstat(fd, &status))
		return err;
	return set_error(err, "expected a handle of " KVSCRATCH_DEVICE ", got %s; is the module "
			 "loaded?", file_kind(status.st_mode));
}

int kvscratch_new_on(struct kvscratch **pad, int fd, const struct kvscratch_geometry *geometry)
{
	struct kvscratch_info unused;
	int err = lay_out(&unused, geometry);

	if (!err)
		err = check_handle(fd, bind_new(fd, geometry));
	return err ? err : kvscratch_from_fd(pad, fd);
}

int kvscratch_attach_on(struct kvscratch **pad, int fd, int src_fd)
{
	int err = device_attach(fd, src_fd);

	if (err)
		cannot("attach to the pad", err);
	err = check_handle(fd, err);
	return err ? err : kvscratch_from_fd(pad, fd);
}
