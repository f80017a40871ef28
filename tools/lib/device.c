// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "backend.h"
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
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
	int ret = ioctl(fd, cmd, arg);

	return ret < 0 ? -errno : ret;
}

int device_create_tagged(int node, uint64_t max_seq_len, const struct kvscratch_plane *planes,
			 uint32_t nr_planes, const void *tag)
{
	struct kvscratch_create create = {
		.size = sizeof(create),
		.max_seq_len = max_seq_len,
		.planes = (uintptr_t)planes,
		.nr_planes = nr_planes,
		.plane_bytes = sizeof(*planes),
	};

	memcpy(create.tag, tag, sizeof(create.tag));
	return device_ioctl(node, KVSCRATCH_IOC_CREATE, &create);
}

int device_create_on(int node, uint64_t max_seq_len, const struct kvscratch_plane *planes,
		     uint32_t nr_planes)
{
	static const uint8_t none[KVSCRATCH_TAG_BYTES];

	return device_create_tagged(node, max_seq_len, planes, nr_planes, none);
}

int device_create_planes(uint64_t max_seq_len, const struct kvscratch_plane *planes,
			 uint32_t nr_planes)
{
	int node = device_open(O_WRONLY);
	int fd;

	if (node < 0)
		return node;
	fd = device_create_on(node, max_seq_len, planes, nr_planes);
	close(node);
	return fd;
}

int device_fork_on(int node, int fd, uint64_t rows, uint64_t generation, uint64_t max_seq_len)
{
	struct kvscratch_fork fork = {
		.size = sizeof(fork),
		.source_fd = fd,
		.rows = rows,
		.generation = generation,
		.max_seq_len = max_seq_len,
	};

	return device_ioctl(node, KVSCRATCH_IOC_FORK, &fork);
}

int device_fork(int fd, uint64_t rows, uint64_t generation, uint64_t max_seq_len)
{
	int node = device_open(O_WRONLY);
	int forked;

	if (node < 0)
		return node;
	forked = device_fork_on(node, fd, rows, generation, max_seq_len);
	close(node);
	return forked;
}

int device_create(uint64_t max_seq_len, uint32_t dim, uint32_t dtype)
{
	return device_create_scaled(max_seq_len, dim, dtype, 0, 0);
}

int device_create_scaled(uint64_t max_seq_len, uint32_t dim, uint32_t dtype, uint32_t input_dtype,
			 uint32_t frac_bits)
{
	const struct kvscratch_plane plane = {
		.dim = dim,
		.dtype = dtype,
		.input_dtype = input_dtype,
		.frac_bits = frac_bits,
	};

	return device_create_planes(max_seq_len, &plane, 1);
}

static int open_handle(int fd, uint32_t access, uint32_t flags)
{
	struct kvscratch_open open = { .size = sizeof(open), .flags = flags, .access = access };

	return device_ioctl(fd, KVSCRATCH_IOC_OPEN, &open);
}

int device_reopen(int fd, int access)
{
	return open_handle(fd, (access == O_WRONLY ? 0 : KVSCRATCH_ACCESS_READ) |
			       (access == O_RDONLY ? 0 : KVSCRATCH_ACCESS_WRITE), 0);
}

int device_open_reader(int fd)
{
	return device_reopen(fd, O_RDONLY);
}

int device_open_writer(int fd, uint32_t flags)
{
	return open_handle(fd, KVSCRATCH_ACCESS_WRITE, KVSCRATCH_OPEN_WRITER | flags);
}

int device_pad_info(int fd, struct kvscratch_pad_info *info)
{
	info->size = sizeof(*info);
	return device_ioctl(fd, KVSCRATCH_IOC_INFO, info);
}

int device_planes(int fd, uint32_t first, struct kvscratch_plane *planes, uint32_t count)
{
	struct kvscratch_planes request = {
		.size = sizeof(request),
		.first = first,
		.count = count,
		.plane_bytes = sizeof(*planes),
		.planes = (uintptr_t)planes,
	};
	int err = device_ioctl(fd, KVSCRATCH_IOC_PLANES, &request);

	return err ? err : (int)request.count;
}

int device_info(int fd, struct kvscratch_info *info)
{
	struct kvscratch_pad_info pad;
	struct kvscratch_plane plane;
	int err = device_pad_info(fd, &pad);
	int nr_planes = err ? err : device_planes(fd, 0, &plane, 1);

	if (nr_planes < 0)
		return nr_planes;
	if (pad.nr_planes != 1)
		return -EOPNOTSUPP;
	describe(info, &pad, &plane);
	return 0;
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

int device_truncate_if(int fd, uint64_t len, uint32_t flags, uint64_t expected_generation,
		       uint64_t expected_len)
{
	struct kvscratch_truncate truncate = {
		.size = sizeof(truncate),
		.flags = flags | KVSCRATCH_TRUNCATE_EXPECT,
		.len = len,
		.expected_generation = expected_generation,
		.expected_len = expected_len,
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

static int stage(int fd, uint32_t plane, uint64_t row, const void *rows, uint64_t nr_rows,
		 uint32_t flags)
{
	struct kvscratch_stage stage = {
		.size = sizeof(stage),
		.flags = flags,
		.plane = plane,
		.row = row,
		.rows = nr_rows,
		.addr = (uintptr_t)rows,
	};

	return device_ioctl(fd, KVSCRATCH_IOC_STAGE, &stage);
}

int device_stage(int fd, uint32_t plane, uint64_t row, const void *rows, uint64_t nr_rows)
{
	return stage(fd, plane, row, rows, nr_rows, 0);
}

int device_keep(int fd, uint32_t plane, uint64_t row, uint64_t nr_rows)
{
	return stage(fd, plane, row, NULL, nr_rows, KVSCRATCH_STAGE_KEEP);
}

int device_commit(int fd, uint64_t len)
{
	struct kvscratch_commit commit = { .size = sizeof(commit), .len = len };

	return device_ioctl(fd, KVSCRATCH_IOC_COMMIT, &commit);
}

int device_seal(int fd)
{
	struct kvscratch_seal seal = { .size = sizeof(seal) };

	return device_ioctl(fd, KVSCRATCH_IOC_SEAL, &seal);
}

int device_seen(int fd, uint64_t state)
{
	struct kvscratch_seen seen = {
		.size = sizeof(seen),
		.generation = kvscratch_state_generation(state),
		.len = kvscratch_state_len(state),
	};

	return device_ioctl(fd, KVSCRATCH_IOC_SEEN, &seen);
}

int device_map(int fd, struct kvscratch_view *view)
{
	struct kvscratch_plane *plane = malloc(sizeof(*plane));
	struct kvscratch_pad_info info;
	int err = plane ? device_pad_info(fd, &info) : -ENOMEM;
	int count = err ? err : device_planes(fd, 0, plane, 1);

	if (count < 0) {
		free(plane);
		return count;
	}
	view->max_seq_len = info.max_seq_len;
	view->planes = plane;
	view->nr_planes = 1;
	err = map_view(view, fd, info.status_offset);
	if (err)
		free(plane);
	return err;
}

void device_unmap(struct kvscratch_view *view)
{
	free((void *)view->planes);
	munmap((void *)view->data, view->mapped_bytes);
}
