// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * The only writer of a pad: an object of its own, since the role is one of an open file and
 * ends with it.
 */
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static int open_writer(struct kvscratch **writer, const struct kvscratch *pad, uint32_t flags)
{
	struct memfd_role role = { .fd = -1 };
	int err = check_access(pad, O_WRONLY);
	int fd;

	if (!err)
		err = pad->backend->open_writer(pad, flags, &fd, &role);
	if (!err)
		err = adopt_or_close(writer, pad->backend, fd,
				     pad->backend->id == KVSCRATCH_BACKEND_MEMFD ? O_RDWR : O_WRONLY);
	if (err) {
		if (role.fd >= 0)
			close(role.fd);
		return err;
	}
	/* also where its descriptor could do more */
	(*writer)->access = O_WRONLY;
	(*writer)->is_writer = true;
	(*writer)->role = role;
	return 0;
}

int kvscratch_writer(struct kvscratch **writer, const struct kvscratch *pad)
{
	return open_writer(writer, pad, 0);
}

int kvscratch_takeover(struct kvscratch **writer, const struct kvscratch *pad)
{
	return open_writer(writer, pad, KVSCRATCH_OPEN_TAKEOVER);
}

static int stage(struct kvscratch *writer, const struct kvscratch_stage *what)
{
	int err = check_access(writer, O_WRONLY);

	if (!err)
		err = check_plane(writer, what->plane);
	return err ? err : writer->backend->stage(writer, what);
}

int kvscratch_stage(struct kvscratch *writer, uint32_t plane, uint64_t row, const void *rows,
		    uint64_t nr_rows)
{
	const struct kvscratch_stage copied = {
		.plane = plane,
		.row = row,
		.rows = nr_rows,
		.addr = (uintptr_t)rows,
	};

	return stage(writer, &copied);
}

int kvscratch_keep(struct kvscratch *writer, uint32_t plane, uint64_t row, uint64_t nr_rows)
{
	const struct kvscratch_stage kept = {
		.flags = KVSCRATCH_STAGE_KEEP,
		.plane = plane,
		.row = row,
		.rows = nr_rows,
	};

	return stage(writer, &kept);
}

int kvscratch_commit(struct kvscratch *writer, uint64_t len)
{
	int err = check_access(writer, O_WRONLY);

	return err ? err : writer->backend->commit(writer, len);
}

int kvscratch_seal(struct kvscratch *pad)
{
	int err = check_access(pad, O_WRONLY);

	return err ? err : pad->backend->seal(pad);
}
