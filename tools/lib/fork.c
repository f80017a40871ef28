// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads that begin with the rows of another one.
 */
#include "backend.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A fork keeps its source from dropping rows: that takes the right to, unless it cannot any more. */
static int check_fork(const struct kvscratch *pad, const struct kvscratch_pad_info *info,
		      uint64_t rows, uint64_t max_seq_len)
{
	int err = check_access(pad, O_RDONLY);

	if (err)
		return err;
	if (pad->access == O_RDONLY && !(info->flags & KVSCRATCH_PAD_SEALED))
		return set_error(-EBADF, "expected a handle open for write, or a sealed pad, got a "
				 "handle for read only");
	if (rows > info->len)
		return set_error(-EINVAL, "expected at most %" PRIu64 ", the committed rows, got %"
				 PRIu64, (uint64_t)info->len, rows);
	if (rows > max_seq_len)
		return set_error(-EINVAL, "max_seq_len: expected at least %" PRIu64 ", the rows of "
				 "the fork, got %" PRIu64, rows, max_seq_len);
	return 0;
}

/* What is to be made; its planes are to be freed. */
static int plan_fork(struct new_pad *made, const struct kvscratch *pad,
		     const struct kvscratch_pad_info *info, uint64_t rows, uint64_t max_seq_len)
{
	*made = (struct new_pad){
		.max_seq_len = max_seq_len,
		.nr_planes = pad->nr_planes,
		.rows = rows,
		.parent_id = info->id,
	};
	memcpy(made->tag, info->tag, sizeof(made->tag));
	made->planes = copy_planes(pad->planes, pad->nr_planes, sizeof(*pad->planes));
	if (!made->planes)
		return out_of_memory();
	return lay_out_planes(&made->layout, made->planes, made->nr_planes, max_seq_len);
}

static int fork_at(struct kvscratch **child, struct kvscratch *pad,
		   const struct kvscratch_pad_info *info, uint64_t rows, uint64_t max_seq_len)
{
	struct new_pad made = { 0 };
	int fd;
	int err = check_fork(pad, info, rows, max_seq_len);

	if (!err)
		err = plan_fork(&made, pad, info, rows, max_seq_len);
	if (!err)
		err = pad->backend->fork(&fd, pad, &made, info->generation);
	free(made.planes);
	return err ? err : adopt_or_close(child, pad->backend, fd, O_RDWR);
}

int kvscratch_fork(struct kvscratch **child, struct kvscratch *pad, uint64_t rows,
		   uint64_t max_seq_len)
{
	struct kvscratch_pad_info info;
	int err = kvscratch_pad_info(pad, &info);

	return err ? err : fork_at(child, pad, &info, rows, max_seq_len);
}

/* All rows that are there, also if a truncate makes them fewer meanwhile; @capacity 0: no room for more */
static int fork_all(struct kvscratch **child, struct kvscratch *pad, uint64_t capacity)
{
	struct kvscratch_pad_info info;
	int err;

	do {
		err = kvscratch_pad_info(pad, &info);
		if (!err)
			err = fork_at(child, pad, &info, info.len,
				      capacity ? capacity : info.len ? info.len : 1);
	} while (err == -ECANCELED);
	return err;
}

int kvscratch_clone(struct kvscratch **child, struct kvscratch *pad)
{
	return fork_all(child, pad, pad->info.max_seq_len);
}

int kvscratch_snapshot(struct kvscratch **snapshot, struct kvscratch *pad)
{
	struct kvscratch *made;
	int err = fork_all(&made, pad, 0);

	if (err)
		return err;
	err = kvscratch_seal(made);
	if (err)
		kvscratch_close(made);
	else
		*snapshot = made;
	return err;
}

int kvscratch_rewind(struct kvscratch **pad, uint64_t len)
{
	struct kvscratch *made;
	/* a writer would not be one any more */
	int err = check_access(*pad, O_RDONLY);

	if (!err)
		err = kvscratch_truncate(*pad, len, 0);
	if (err != -ETXTBSY)
		return err;
	err = kvscratch_fork(&made, *pad, len, (*pad)->info.max_seq_len);
	if (err)
		return err;
	kvscratch_close(*pad);
	*pad = made;
	return 1;
}
