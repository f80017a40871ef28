// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

int device_open(int access)
{
	int fd = open(KVSCRATCH_DEVICE, access | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

static int device_ioctl(int fd, unsigned int cmd, void *arg)
{
	return ioctl(fd, cmd, arg) < 0 ? -errno : 0;
}

int device_create(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype)
{
	return device_create_scaled(fd, max_seq_len, dim, dtype, 0, 0);
}

int device_create_scaled(int fd, uint64_t max_seq_len, uint32_t dim, uint32_t dtype,
			    uint32_t input_dtype, uint32_t frac_bits)
{
	struct kvscratch_create create = {
		.size = sizeof(create),
		.max_seq_len = max_seq_len,
		.dim = dim,
		.dtype = dtype,
		.input_dtype = input_dtype,
		.frac_bits = frac_bits,
	};

	return device_ioctl(fd, KVSCRATCH_IOC_CREATE, &create);
}

int device_attach(int fd, int src_fd)
{
	struct kvscratch_attach attach = { .size = sizeof(attach), .src_fd = src_fd };

	return device_ioctl(fd, KVSCRATCH_IOC_ATTACH, &attach);
}

int device_open_reader(int src_fd)
{
	int fd = device_open(O_RDONLY);
	int err;

	if (fd < 0)
		return fd;
	err = device_attach(fd, src_fd);
	if (err) {
		close(fd);
		return err;
	}
	return fd;
}

int device_info(int fd, struct kvscratch_info *info)
{
	int err;

	memset(info, 0, sizeof(*info));
	info->size = sizeof(*info);
	err = device_ioctl(fd, KVSCRATCH_IOC_INFO, info);
	/* a module that knows no conversion */
	if (!err && info->size < offsetof(struct kvscratch_info, frac_bits))
		info->input_dtype = info->dtype;
	return err;
}

int device_truncate(int fd, uint64_t len, uint32_t flags)
{
	struct kvscratch_truncate truncate = {
		.size = sizeof(truncate),
		.flags = flags,
		.len = len,
	};

	return device_ioctl(fd, KVSCRATCH_IOC_TRUNCATE, &truncate);
}

int device_append(int fd, const void *rows, size_t bytes)
{
	ssize_t written = write(fd, rows, bytes);

	if (written < 0)
		return -errno;
	/* a pad takes all or nothing */
	return (size_t)written == bytes ? 0 : -EIO;
}

int device_map(int fd, struct kvscratch_view *view)
{
	void *data;
	int err = device_info(fd, &view->info);

	if (err)
		return err;
	if (view->info.status_offset > SIZE_MAX / 2)
		return -EOVERFLOW;
	view->mapped_bytes = view->info.status_offset + sizeof(struct kvscratch_status);
	data = mmap(NULL, view->mapped_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (data == MAP_FAILED)
		return -errno;
	view->data = data;
	view->status = (const void *)((const char *)data + view->info.status_offset);
	return 0;
}

void device_unmap(struct kvscratch_view *view)
{
	munmap((void *)view->data, view->mapped_bytes);
}
