// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pad objects: what is the same on every backend.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "backend.h"
#include "output.h"
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Errors */

static __thread char error_text[256] = "no error";

int set_error(int err, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(error_text, sizeof(error_text), format, arguments);
	va_end(arguments);
	return err;
}

int cannot(const char *what, int err)
{
	return set_error(err, "cannot %s: %s", what, kvscratch_strerror(err));
}

int fail_room(uint64_t len, uint64_t rows, uint64_t max_seq_len)
{
	if (len == max_seq_len && rows == 1)
		return set_error(-ENOSPC, "Scratchpad full: %" PRIu64 " / %" PRIu64 " tokens", len,
				 max_seq_len);
	return set_error(-ENOSPC, "Scratchpad overflow: %" PRIu64 " + %" PRIu64 " > %" PRIu64
			 " max", len, rows, max_seq_len);
}

int out_of_memory(void)
{
	return set_error(-ENOMEM, "out of memory");
}

int fail_truncate(uint64_t len, uint64_t wanted)
{
	return set_error(-EINVAL, "expected at most %" PRIu64 ", the committed rows, got %" PRIu64,
			 len, wanted);
}

/* "plane 3 (k1)" */
static const char *name_plane(char *text, size_t size, uint32_t index,
			      const struct kvscratch_plane *plane)
{
	char label[PRINTABLE_NAME_BYTES];

	snprintf(text, size, *plane->label ? "plane %" PRIu32 " (%s)" : "plane %" PRIu32, index,
		 printable_name(label, plane->label));
	return text;
}

int fail_stage(const struct kvscratch_stage *stage, const struct kvscratch_plane *plane,
	       uint64_t len)
{
	const uint64_t row = stage->row, rows = stage->rows;
	char name[48];

	name_plane(name, sizeof(name), stage->plane, plane);
	if (stage->flags & KVSCRATCH_STAGE_KEEP)
		return set_error(-EINVAL, "%s: expected rows that the writer stored as a whole, from "
				 "%" PRIu64 " to what is staged on, got %" PRIu64 " from %" PRIu64
				 " on", name, len, rows, row);
	return set_error(-EINVAL, "%s: expected a row from %" PRIu64 ", the committed ones, to what "
			 "is staged, got %" PRIu64, name, len, row);
}

int fail_commit(uint64_t len, uint64_t wanted)
{
	return set_error(-EINVAL, "expected a len from %" PRIu64 ", the committed rows, to what "
			 "every plane has staged, got %" PRIu64, len, wanted);
}

int fail_expectation(const struct kvscratch_truncate *truncate, uint64_t generation, uint64_t len)
{
	return set_error(-ECANCELED, "expected generation %" PRIu64 " and %" PRIu64 " rows, found %"
			 PRIu64 " and %" PRIu64, (uint64_t)truncate->expected_generation,
			 (uint64_t)truncate->expected_len, generation, len);
}

int fail_fork(void)
{
	return set_error(-ECANCELED, "the pad was truncated while it was forked: look at it again");
}

int fail_create(const struct new_pad *made, int err, const char *why)
{
	const struct kvscratch_plane *plane = made->planes;

	if (made->nr_planes > 1)
		return set_error(err, "cannot create a pad of %" PRIu64 " rows over %" PRIu32
				 " planes: %s", made->max_seq_len, made->nr_planes, why);
	return set_error(err, "cannot create a pad of [%" PRIu64 ", %" PRIu32 "] %s: %s",
			 made->max_seq_len, (uint32_t)plane->dim,
			 kvscratch_dtype_name(plane->dtype), why);
}

const char *kvscratch_error(void)
{
	return error_text;
}

const char *kvscratch_version(void)
{
	return KVSCRATCH_VERSION;
}

/* Backends */

static const struct backend *const backends[] = { &kernel_backend, &memfd_backend };

const char *kvscratch_backend_name(enum kvscratch_backend backend)
{
	return backend == KVSCRATCH_BACKEND_MEMFD ? "memfd" : "kernel";
}

int kvscratch_default_backend(void)
{
	const char *name = secure_getenv("KVSCRATCH_BACKEND");

	if (!name || !*name)
		return access(KVSCRATCH_DEVICE, F_OK) ? KVSCRATCH_BACKEND_MEMFD :
							KVSCRATCH_BACKEND_KERNEL;
	if (!strcmp(name, "kernel"))
		return KVSCRATCH_BACKEND_KERNEL;
	if (!strcmp(name, "memfd"))
		return KVSCRATCH_BACKEND_MEMFD;
	return set_error(-EINVAL, "KVSCRATCH_BACKEND: expected kernel or memfd, got \"%s\"", name);
}

enum kvscratch_backend kvscratch_backend(const struct kvscratch *pad)
{
	return pad->backend->id;
}

/* Handles */

/* Make an object of @fd, which it takes over if that succeeds. */
static int adopt(struct kvscratch **out, const struct backend *backend, int fd, int access)
{
	struct kvscratch *pad = calloc(1, sizeof(*pad));
	int err;

	if (!pad)
		return out_of_memory();
	pad->backend = backend;
	pad->fd = fd;
	pad->access = access;
	err = backend->adopt(pad);
	if (err) {
		free(pad->planes);
		free(pad);
	} else {
		*out = pad;
	}
	return err;
}

int adopt_or_close(struct kvscratch **pad, const struct backend *backend, int fd, int access)
{
	int err = adopt(pad, backend, fd, access);

	if (err)
		close(fd);
	return err;
}

static int create(struct kvscratch **pad, struct new_pad *made)
{
	const struct backend *backend;
	int id, fd;
	int err = lay_out_planes(&made->layout, made->planes, made->nr_planes, made->max_seq_len);

	if (err)
		return err;
	id = kvscratch_default_backend();
	if (id < 0)
		return id;
	backend = id == KVSCRATCH_BACKEND_MEMFD ? &memfd_backend : &kernel_backend;
	err = backend->create(&fd, made);
	return err ? err : adopt_or_close(pad, backend, fd, O_RDWR);
}

int kvscratch_new(struct kvscratch **pad, uint64_t max_seq_len, uint32_t dim, uint32_t dtype)
{
	const struct kvscratch_geometry geometry = {
		.max_seq_len = max_seq_len,
		.dim = dim,
		.dtype = dtype,
	};

	return kvscratch_new_geometry(pad, &geometry);
}

int kvscratch_new_geometry(struct kvscratch **pad, const struct kvscratch_geometry *geometry)
{
	struct kvscratch_plane plane = {
		.dim = geometry->dim,
		.dtype = geometry->dtype,
		.input_dtype = geometry->input_dtype,
		.frac_bits = geometry->frac_bits,
	};
	struct new_pad made = {
		.max_seq_len = geometry->max_seq_len,
		.planes = &plane,
		.nr_planes = 1,
	};

	return create(pad, &made);
}

/*
 * Elements may be longer than ours: what is only output does not matter, and there is no other
 * input yet.
 */
struct kvscratch_plane *copy_planes(const struct kvscratch_plane *planes, uint32_t count,
				    size_t plane_bytes)
{
	struct kvscratch_plane *copies = calloc(count, sizeof(*copies));

	for (uint32_t i = 0; copies && i < count; i++)
		copy_inputs(&copies[i], (const void *)((const char *)planes + i * plane_bytes));
	return copies;
}

/* Whether elements of @plane_bytes are ours with zeros behind them */
static int check_plane_bytes(const struct kvscratch_plane *planes, uint32_t count,
			     size_t plane_bytes)
{
	if (plane_bytes < sizeof(*planes) || plane_bytes % _Alignof(struct kvscratch_plane))
		return set_error(-EINVAL, "planes: expected elements of %zu bytes or more, a multiple "
				 "of %zu, got %zu", sizeof(*planes),
				 _Alignof(struct kvscratch_plane), plane_bytes);
	for (uint32_t i = 0; i < count; i++)
		for (size_t at = sizeof(*planes); at < plane_bytes; at++)
			if (((const char *)planes)[i * plane_bytes + at])
				return set_error(-E2BIG, "planes: plane %" PRIu32 " has what this "
						 "library is too old to know", i);
	return 0;
}

int kvscratch_new_planes_sized(struct kvscratch **pad, uint64_t max_seq_len,
			       const struct kvscratch_plane *planes, uint32_t nr_planes,
			       size_t plane_bytes, const void *tag, size_t tag_bytes)
{
	struct new_pad made = { .max_seq_len = max_seq_len, .nr_planes = nr_planes };
	int err;

	if (tag_bytes > sizeof(made.tag))
		return set_error(-EINVAL, "tag: expected at most %zu bytes, got %zu",
				 sizeof(made.tag), tag_bytes);
	if (!nr_planes || nr_planes > KVSCRATCH_MAX_PLANES)
		return set_error(-EINVAL, "planes: expected 1 to %u, got %" PRIu32,
				 KVSCRATCH_MAX_PLANES, nr_planes);
	err = check_plane_bytes(planes, nr_planes, plane_bytes);
	if (err)
		return err;
	if (tag)
		memcpy(made.tag, tag, tag_bytes);
	made.planes = copy_planes(planes, nr_planes, plane_bytes);
	if (!made.planes)
		return out_of_memory();
	err = create(pad, &made);
	free(made.planes);
	return err;
}

/* The access mode of @fd, or a negative errno */
static int access_of(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || flags & O_PATH)
		return set_error(-EBADF, "descriptor %d: expected a handle, got %s", fd,
				 flags < 0 ? "none" : "a path");
	return flags & O_ACCMODE;
}

static int find_backend(struct kvscratch **pad, int fd, int access)
{
	struct stat status;

	for (size_t i = 0; i < ARRAY_SIZE(backends); i++) {
		int err = adopt(pad, backends[i], fd, access);

		if (err != -ENOTTY)
			return err;
	}
	return set_error(-ENOTTY, "descriptor %d: expected a handle of a pad, got %s", fd,
			 fstat(fd, &status) ? "something else" : file_kind(status.st_mode));
}

int kvscratch_from_fd(struct kvscratch **pad, int fd)
{
	int access = access_of(fd);

	int err = access < 0 ? access : find_backend(pad, fd, access);

	/* it may have been inherited: our children are not to hold the pad */
	if (!err)
		fcntl(fd, F_SETFD, FD_CLOEXEC);
	return err;
}

/* Whether who has a handle open for @has may have one open for @access */
static int check_rights(int fd, int has, int access)
{
	if (has == O_RDWR || has == access)
		return 0;
	return set_error(-EACCES, "descriptor %d: expected it open for no less than is asked for, "
			 "got %s only", fd, has == O_RDONLY ? "read" : "write");
}

int check_mode(int access)
{
	if (access == O_RDONLY || access == O_WRONLY || access == O_RDWR)
		return 0;
	return set_error(-EINVAL, "access: expected O_RDONLY, O_WRONLY or O_RDWR, got %#x",
			 (unsigned int)access);
}

int kvscratch_open(struct kvscratch **pad, const struct kvscratch *from, int access)
{
	int err = check_mode(access);
	int fd;

	if (!err)
		err = check_rights(from->fd, from->access, access);
	if (!err)
		err = from->backend->reopen(&fd, from->fd, access);
	return err ? err : adopt_or_close(pad, from->backend, fd, access);
}

int kvscratch_attach(struct kvscratch **pad, int fd, int access)
{
	struct kvscratch *source;
	int err = check_mode(access);
	int has;

	if (err)
		return err;
	has = access_of(fd);
	err = has < 0 ? has : check_rights(fd, has, access);
	if (err)
		return err;
	err = find_backend(&source, fd, has);
	if (err)
		return err;
	err = kvscratch_open(pad, source, access);
	/* but for the descriptor, which is the caller's */
	source->fd = -1;
	kvscratch_close(source);
	return err;
}

static void unmap_view(const struct kvscratch_view *view)
{
	munmap((void *)view->data, view->mapped_bytes);
	free((void *)view);
}

void kvscratch_close(struct kvscratch *pad)
{
	if (!pad)
		return;
	if (pad->view)
		unmap_view(pad->view);
	pad->backend->release(pad);
	if (pad->fd >= 0)
		close(pad->fd);
	free(pad->planes);
	free(pad);
}

int kvscratch_fd(const struct kvscratch *pad)
{
	return pad->fd;
}

int kvscratch_access(const struct kvscratch *pad)
{
	return pad->access;
}

int check_access(const struct kvscratch *pad, int access)
{
	if (pad->access == O_RDWR || pad->access == access)
		return 0;
	return set_error(-EBADF, "expected a handle open for %s, got one for %s only",
			 access == O_RDONLY ? "read" : "write",
			 access == O_RDONLY ? "write" : "read");
}

int kvscratch_open_reader(const struct kvscratch *pad)
{
	int err = check_access(pad, O_RDONLY);
	int fd;

	if (!err)
		err = pad->backend->reopen(&fd, pad->fd, O_RDONLY);
	return err ? err : fd;
}

/* Writing */

int check_one_plane(const struct kvscratch *pad)
{
	if (pad->nr_planes == 1)
		return 0;
	return set_error(-EOPNOTSUPP, "expected a pad of one plane, got one of %" PRIu32,
			 pad->nr_planes);
}

static int append(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens)
{
	const struct kvscratch_info *info = &pad->info;
	const uint64_t most = KVSCRATCH_MAX_WRITE / info->input_row_bytes;

	if (!nr_tokens)
		return 0;
	if (nr_tokens > most && nr_tokens <= info->max_seq_len)
		return set_error(-E2BIG, "expected at most %" PRIu64 " rows at once, got %" PRIu64,
				 most, nr_tokens);
	return pad->backend->append(pad, tokens, nr_tokens);
}

int kvscratch_append(struct kvscratch *pad, const void *row, uint32_t elements)
{
	return kvscratch_append_rows(pad, row, 1, elements);
}

int kvscratch_append_rows(struct kvscratch *pad, const void *rows, uint64_t nr_rows,
			  uint32_t elements)
{
	int err = check_access(pad, O_WRONLY);

	if (!err)
		err = check_one_plane(pad);
	if (err)
		return err;
	if (elements != pad->info.dim)
		return set_error(-EINVAL, "shape mismatch: expected %" PRIu32 " elements, got %"
				 PRIu32, (uint32_t)pad->info.dim, elements);
	return append(pad, rows, nr_rows);
}

int kvscratch_append_tokens(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens,
			    uint32_t token_bytes)
{
	int err = check_access(pad, O_WRONLY);

	if (err)
		return err;
	if (token_bytes != pad->info.input_row_bytes)
		return set_error(-EINVAL, "shape mismatch: expected tokens of %" PRIu32 " bytes, got %"
				 PRIu32, (uint32_t)pad->info.input_row_bytes, token_bytes);
	return append(pad, tokens, nr_tokens);
}

/* @flags are the caller's. */
static int truncate_as(struct kvscratch *pad, uint32_t flags,
		       const struct kvscratch_truncate *truncate)
{
	int err = check_access(pad, O_WRONLY);

	if (err)
		return err;
	if (flags & ~KVSCRATCH_TRUNCATE_ZERO)
		return set_error(-EINVAL, "expected 0 or KVSCRATCH_TRUNCATE_ZERO, got flags 0x%"
				 PRIx32, flags);
	return pad->backend->truncate(pad, truncate);
}

int kvscratch_truncate(struct kvscratch *pad, uint64_t len, uint32_t flags)
{
	const struct kvscratch_truncate truncate = { .flags = flags, .len = len };

	return truncate_as(pad, flags, &truncate);
}

int kvscratch_truncate_if(struct kvscratch *pad, uint64_t len, uint32_t flags,
			  uint64_t expected_generation, uint64_t expected_len)
{
	const struct kvscratch_truncate truncate = {
		.flags = flags | KVSCRATCH_TRUNCATE_EXPECT,
		.len = len,
		.expected_generation = expected_generation,
		.expected_len = expected_len,
	};

	return truncate_as(pad, flags, &truncate);
}

int kvscratch_clear(struct kvscratch *pad, uint32_t flags)
{
	return kvscratch_truncate(pad, 0, flags);
}

/* Reading */

const struct kvscratch_view *mapped_view(const struct kvscratch *pad)
{
	return __atomic_load_n(&pad->view, __ATOMIC_ACQUIRE);
}

int64_t check_len(const struct kvscratch *pad, uint64_t len)
{
	if (len <= pad->info.max_seq_len)
		return len;
	return set_error(-EPROTO, "expected at most %" PRIu64 " rows, got a status page that says %"
			 PRIu64, (uint64_t)pad->info.max_seq_len, len);
}

int64_t kvscratch_len(struct kvscratch *pad)
{
	const struct kvscratch_view *view = mapped_view(pad);
	struct kvscratch_pad_info info;
	int err;

	if (view)
		return check_len(pad, kvscratch_state_len(kvscratch_view_state(view)));
	err = kvscratch_pad_info(pad, &info);
	return err ? err : (int64_t)info.len;
}

int kvscratch_is_empty(struct kvscratch *pad)
{
	int64_t len = kvscratch_len(pad);

	return len < 0 ? (int)len : !len;
}

uint64_t kvscratch_capacity(const struct kvscratch *pad)
{
	return pad->info.max_seq_len;
}

uint32_t kvscratch_dim(const struct kvscratch *pad)
{
	return pad->info.dim;
}

void kvscratch_geometry(const struct kvscratch *pad, struct kvscratch_geometry *geometry)
{
	*geometry = (struct kvscratch_geometry){
		.max_seq_len = pad->info.max_seq_len,
		.dim = pad->info.dim,
		.dtype = pad->info.dtype,
		.input_dtype = pad->info.input_dtype,
		.frac_bits = pad->info.frac_bits,
	};
}

static int now(struct kvscratch *pad, struct kvscratch_pad_info *info)
{
	int err = pad->backend->info(pad, info);
	int64_t len = err ? err : check_len(pad, info->len);

	return len < 0 ? (int)len : 0;
}

/* The first @size bytes of the @known ones at @whole, which begin with their size */
static void copy_sized(void *to, size_t size, void *whole, size_t known)
{
	__u32 filled = size < known ? size : known;

	if (size > known)
		memset(to, 0, size);
	memcpy(whole, &filled, sizeof(filled));
	memcpy(to, whole, filled);
}

int kvscratch_pad_info_sized(struct kvscratch *pad, struct kvscratch_pad_info *info, size_t size)
{
	struct kvscratch_pad_info whole;
	int err = now(pad, &whole);

	if (!err)
		copy_sized(info, size, &whole, sizeof(whole));
	return err;
}

int kvscratch_info_sized(struct kvscratch *pad, struct kvscratch_info *info, size_t size)
{
	struct kvscratch_pad_info as_it_is;
	struct kvscratch_info whole;
	int err = check_one_plane(pad);

	if (!err)
		err = now(pad, &as_it_is);
	if (err)
		return err;
	describe(&whole, &as_it_is, pad->planes);
	copy_sized(info, size, &whole, sizeof(whole));
	return 0;
}

int kvscratch_display(struct kvscratch *pad, char *text, size_t size)
{
	const bool several = pad->nr_planes > 1;
	int64_t len = kvscratch_len(pad);

	if (len < 0)
		return (int)len;
	return snprintf(text, size, "Scratchpad(len=%" PRId64 ", capacity=%" PRIu64 ", %s=%" PRIu32
			")", len, (uint64_t)pad->info.max_seq_len, several ? "planes" : "dim",
			several ? pad->nr_planes : (uint32_t)pad->info.dim);
}

int populate(const void *at, size_t bytes)
{
	const size_t page = sysconf(_SC_PAGESIZE);

	if (!madvise((void *)at, bytes, MADV_POPULATE_READ))
		return 0;
	if (errno != EINVAL)
		return -errno;
	/* what Linux knows since 5.14 */
	for (size_t i = 0; i < bytes; i += page)
		(void)*((const volatile char *)at + i);
	return 0;
}

/* Array by array, for there may be nothing between them */
static int populate_all(const struct kvscratch_view *view)
{
	const char *data = view->data;
	const uint64_t rows = view->max_seq_len;
	int err = populate(view->status, sizeof(*view->status));

	for (uint32_t i = 0; !err && i < view->nr_planes; i++) {
		const struct kvscratch_plane *plane = kvscratch_view_plane(view, i);

		err = populate(data + plane->offset, rows * plane->row_bytes);
		if (!err && plane->scales_row_bytes)
			err = populate(data + plane->scales_offset, rows * plane->scales_row_bytes);
	}
	return err;
}

int map_view(struct kvscratch_view *view, int fd, uint64_t status_offset)
{
	void *data;
	int err;

	view->plane_bytes = sizeof(struct kvscratch_plane);
	if (status_offset > SIZE_MAX / 2)
		return -EOVERFLOW;
	view->mapped_bytes = status_offset + sysconf(_SC_PAGESIZE);
	data = mmap(NULL, view->mapped_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (data == MAP_FAILED)
		return -errno;
	view->data = data;
	view->status = (const void *)((const char *)data + status_offset);
	err = populate_all(view);
	if (err)
		munmap(data, view->mapped_bytes);
	return err;
}

static int map_pad(struct kvscratch *pad, struct kvscratch_view *view)
{
	const uint64_t status_offset = pad->info.status_offset;
	int err;

	view->max_seq_len = pad->info.max_seq_len;
	view->planes = pad->planes;
	view->nr_planes = pad->nr_planes;
	err = map_view(view, pad->fd, status_offset);
	if (err == -EOVERFLOW)
		return set_error(err, "cannot map %" PRIu64 " bytes: this program has 32-bit "
				 "addresses", status_offset);
	return err ? cannot("map the pad and have its pages there", err) : 0;
}

/* Without a lock, which a fork() in another thread would leave locked in the child */
static int make_view(struct kvscratch *pad)
{
	struct kvscratch_view *view;
	const struct kvscratch_view *none = NULL;
	int err = check_access(pad, O_RDONLY);

	if (err)
		return err;
	view = malloc(sizeof(*view));
	if (!view)
		return out_of_memory();
	err = map_pad(pad, view);
	if (err)
		free(view);
	else if (!__atomic_compare_exchange_n(&pad->view, &none, view, false, __ATOMIC_RELEASE,
					      __ATOMIC_RELAXED))
		unmap_view(view);	/* another thread was faster */
	return err;
}

const struct kvscratch_view *kvscratch_view(struct kvscratch *pad)
{
	int err = mapped_view(pad) ? 0 : make_view(pad);

	if (err)
		errno = -err;
	return mapped_view(pad);
}

int kvscratch_as_tensor(struct kvscratch *pad, struct kvscratch_tensor *tensor)
{
	int err = check_one_plane(pad);

	return err ? err : kvscratch_plane_tensor(pad, 0, tensor);
}

/**
 * struct span - what is copied of each row
 * @view: the pad's
 * @first: the first plane
 * @end: behind the last one
 * @row_bytes: of all of them
 */
struct span {
	const struct kvscratch_view *view;
	uint32_t first;
	uint32_t end;
	uint64_t row_bytes;
};

static char *copy_array(const struct kvscratch_view *view, char *to, uint64_t offset,
			uint32_t row_bytes, uint64_t row, uint64_t rows)
{
	size_t bytes = rows * row_bytes;

	memcpy(to, (const char *)view->data + offset + row * row_bytes, bytes);
	return to + bytes;
}

/* Row by row where the parts of one lie in different arrays */
static void copy_records(const struct span *span, uint64_t first, uint64_t count, char *to)
{
	const struct kvscratch_plane *planes = kvscratch_view_plane(span->view, 0);
	const bool one_array = span->end - span->first == 1 &&
			       !planes[span->first].scales_row_bytes;
	const uint64_t at_once = one_array ? count : 1;

	for (uint64_t row = first; row < first + count; row += at_once) {
		for (uint32_t i = span->first; i < span->end; i++) {
			to = copy_array(span->view, to, planes[i].offset, planes[i].row_bytes, row,
					at_once);
			to = copy_array(span->view, to, planes[i].scales_offset,
					planes[i].scales_row_bytes, row, at_once);
		}
	}
}

/* So few that a writer hardly truncates twice while they are copied, but one at least */
#define PIECE_BYTES 4096u

/*
 * Copy from @state on, piece by piece. Whenever a piece is done all rows up to its end are
 * those of the present moment, whatever was truncated behind them; it goes on from there.
 * False when some were dropped, or too many truncates came in between to tell.
 */
static bool copy_in_pieces(const struct span *span, uint64_t state, uint64_t first,
			   uint64_t end, char *to)
{
	const uint64_t most = span->row_bytes < PIECE_BYTES ? PIECE_BYTES / span->row_bytes : 1;

	while (first < end) {
		uint64_t count = end - first < most ? end - first : most;
		uint64_t next;

		copy_records(span, first, count, to);
		first += count;
		to += count * span->row_bytes;
		next = kvscratch_view_state(span->view);
		if (kvscratch_view_valid_rows(span->view, state) < first)
			return false;
		state = next;
	}
	return true;
}

static int copy_span(const struct kvscratch *pad, const struct span *span, uint64_t first,
		     uint64_t count, void *rows)
{
	uint64_t state;

	do {
		int64_t len;

		state = kvscratch_view_state(span->view);
		len = check_len(pad, kvscratch_state_len(state));
		if (len < 0)
			return (int)len;
		if (first > (uint64_t)len || count > (uint64_t)len - first)
			return set_error(-EINVAL, "expected rows below %" PRId64 ", got %" PRIu64
					 " from %" PRIu64 " on", len, count, first);
	} while (!copy_in_pieces(span, state, first, first + count, rows));
	return 0;
}

int kvscratch_copy_rows(struct kvscratch *pad, uint64_t first, uint64_t count, void *rows)
{
	const struct span span = {
		.view = kvscratch_view(pad),
		.end = pad->nr_planes,
		.row_bytes = pad->info.row_bytes,
	};

	return span.view ? copy_span(pad, &span, first, count, rows) : -errno;
}

int kvscratch_copy_plane_rows(struct kvscratch *pad, uint32_t plane, uint64_t first,
			      uint64_t count, void *rows)
{
	struct span span = { .first = plane, .end = plane + 1 };
	int err = check_plane(pad, plane);

	if (err)
		return err;
	span.view = kvscratch_view(pad);
	span.row_bytes = (uint64_t)pad->planes[plane].row_bytes + pad->planes[plane].scales_row_bytes;
	return span.view ? copy_span(pad, &span, first, count, rows) : -errno;
}

int wait_is_over(const struct kvscratch_view *view, uint64_t state)
{
	/* first, for what is loaded after that is final */
	const bool sealed = kvscratch_view_is_sealed(view);

	if (kvscratch_view_state(view) != state)
		return 1;
	return sealed ? set_error(-EROFS, "the pad is sealed: there is nothing to wait for") : 0;
}

int kvscratch_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	const struct kvscratch_view *view = kvscratch_view(pad);

	if (!view)
		return -errno;
	return pad->backend->wait(pad, state, timeout_ms);
}

int kvscratch_seen(struct kvscratch *pad, uint64_t state)
{
	/* which is woken for writing only */
	int err = pad->is_writer ? check_access(pad, O_RDONLY) : 0;

	return err ? err : pad->backend->seen(pad, state);
}
