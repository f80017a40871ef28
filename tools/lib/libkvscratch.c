// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pad objects: what is the same on every backend.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "../../kvscratch_layout.h"
#include "backend.h"
#include "output.h"

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

const char *kvscratch_error(void)
{
	return error_text;
}

const char *kvscratch_version(void)
{
	return KVSCRATCH_VERSION;
}

/* Geometry */

static int check_dtypes(const struct kvscratch_geometry *geometry, uint32_t input_dtype)
{
	const char *stored = kvscratch_dtype_name(geometry->dtype);
	const char *input = kvscratch_dtype_name(input_dtype);
	bool mx = geometry->dtype == KVSCRATCH_DTYPE_MXINT8;
	bool integer = kvs_dtype_is_integer(geometry->dtype);

	if (!stored || !input)
		return set_error(-EINVAL, "dtype: expected one of f64 f32 f16 bf16 i64 i32 i16 i8 "
				 "u8 and mxint8, got number %" PRIu32,
				 stored ? input_dtype : geometry->dtype);
	if (!kvs_dtype_takes(geometry->dtype, input_dtype))
		return set_error(-EINVAL, "input dtype: expected %s%s for a dtype of %s, got %s",
				 stored, mx || integer ? " f64 f32 f16 or bf16" : "", stored,
				 input);
	if (geometry->frac_bits > (integer ? KVSCRATCH_MAX_FRAC_BITS : 0))
		return set_error(-EINVAL, "fraction bits: expected at most %d for %s, got %" PRIu32,
				 integer ? KVSCRATCH_MAX_FRAC_BITS : 0, stored,
				 geometry->frac_bits);
	return 0;
}

static int check_geometry(const struct kvscratch_geometry *geometry, uint32_t input_dtype)
{
	int err = check_dtypes(geometry, input_dtype);

	if (err)
		return err;
	if (!geometry->max_seq_len || geometry->max_seq_len > KVSCRATCH_MAX_SEQ_LEN)
		return set_error(-EINVAL, "max_seq_len: expected 1 to %" PRIu32 " rows, got %"
				 PRIu64, KVSCRATCH_MAX_SEQ_LEN, geometry->max_seq_len);
	if (!geometry->dim)
		return set_error(-EINVAL, "dim: expected at least 1, got 0");
	if (geometry->dtype == KVSCRATCH_DTYPE_MXINT8 && geometry->dim % KVSCRATCH_MX_BLOCK)
		return set_error(-EINVAL, "dim: expected a multiple of %d for mxint8, got %" PRIu32,
				 KVSCRATCH_MX_BLOCK, geometry->dim);
	return 0;
}

static uint32_t larger_element(const struct kvscratch_plane *plane)
{
	uint32_t stored = kvs_dtype_bytes(plane->dtype);
	uint32_t input = kvs_dtype_bytes(plane->input_dtype);

	return stored > input ? stored : input;
}

int lay_out(struct kvscratch_info *info, const struct kvscratch_geometry *geometry)
{
	struct kvscratch_plane plane = {
		.dim = geometry->dim,
		.dtype = geometry->dtype,
		.input_dtype = geometry->input_dtype ? geometry->input_dtype : geometry->dtype,
		.frac_bits = geometry->frac_bits,
	};
	struct kvs_layout layout;
	int err = check_geometry(geometry, plane.input_dtype);

	if (err)
		return err;
	if (!kvs_layout_init(&layout, &plane, 1, geometry->max_seq_len, sysconf(_SC_PAGESIZE)))
		return set_error(-EINVAL, "dim: expected rows of at most %u bytes, got %" PRIu32
				 " elements of %" PRIu32, KVSCRATCH_MAX_ROW_BYTES, geometry->dim,
				 larger_element(&plane));
	*info = (struct kvscratch_info){
		.size = sizeof(*info),
		.max_seq_len = geometry->max_seq_len,
		.dim = geometry->dim,
		.dtype = geometry->dtype,
		.row_bytes = layout.row_bytes,
		.input_row_bytes = layout.input_row_bytes,
		.data_bytes = geometry->max_seq_len * layout.row_bytes,
		.status_offset = layout.status_offset,
		.nr_planes = plane.scales_row_bytes ? 2 : 1,
		.planes = {
			{ .offset = plane.offset, .row_bytes = plane.row_bytes },
			{ .offset = plane.scales_offset, .row_bytes = plane.scales_row_bytes },
		},
		.input_dtype = plane.input_dtype,
		.frac_bits = geometry->frac_bits,
	};
	return 0;
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
		return set_error(-ENOMEM, "out of memory");
	pad->backend = backend;
	pad->fd = fd;
	pad->access = access;
	err = backend->adopt(pad);
	if (err)
		free(pad);
	else
		*out = pad;
	return err;
}

static int adopt_or_close(struct kvscratch **pad, const struct backend *backend, int fd, int access)
{
	int err = adopt(pad, backend, fd, access);

	if (err)
		close(fd);
	return err;
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
	const struct backend *backend;
	struct kvscratch_info unused;
	int err = lay_out(&unused, geometry);
	int id = kvscratch_default_backend();
	int fd;

	if (err || id < 0)
		return err ? err : id;
	backend = id == KVSCRATCH_BACKEND_MEMFD ? &memfd_backend : &kernel_backend;
	err = backend->create(&fd, geometry);
	return err ? err : adopt_or_close(pad, backend, fd, O_RDWR);
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

int kvscratch_attach(struct kvscratch **pad, int fd, int access)
{
	struct kvscratch *source;
	int has = access_of(fd);
	int err, own;

	if (has < 0)
		return has;
	if (has != O_RDWR && has != access)
		return set_error(-EACCES, "descriptor %d: expected it open for no less than is "
				 "asked for, got %s only", fd, has == O_RDONLY ? "read" : "write");
	err = find_backend(&source, fd, has);
	if (err)
		return err;
	err = source->backend->reopen(&own, source->fd, access);
	if (!err)
		err = adopt_or_close(pad, source->backend, own, access);
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

static int check_access(const struct kvscratch *pad, int access)
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

int kvscratch_append(struct kvscratch *pad, const void *row, uint32_t elements)
{
	return kvscratch_append_rows(pad, row, 1, elements);
}

int kvscratch_append_rows(struct kvscratch *pad, const void *rows, uint64_t nr_rows,
			  uint32_t elements)
{
	const struct kvscratch_info *info = &pad->info;
	const uint64_t most = KVSCRATCH_MAX_WRITE / info->input_row_bytes;
	int err = check_access(pad, O_WRONLY);

	if (err)
		return err;
	if (elements != info->dim)
		return set_error(-EINVAL, "shape mismatch: expected %" PRIu32 " elements, got %"
				 PRIu32, (uint32_t)info->dim, elements);
	if (!nr_rows)
		return 0;
	if (nr_rows > most && nr_rows <= info->max_seq_len)
		return set_error(-E2BIG, "expected at most %" PRIu64 " rows at once, got %" PRIu64,
				 most, nr_rows);
	return pad->backend->append(pad, rows, nr_rows);
}

int kvscratch_truncate(struct kvscratch *pad, uint64_t len, uint32_t flags)
{
	int err = check_access(pad, O_WRONLY);

	if (err)
		return err;
	if (flags & ~KVSCRATCH_TRUNCATE_ZERO)
		return set_error(-EINVAL, "expected 0 or KVSCRATCH_TRUNCATE_ZERO, got flags 0x%"
				 PRIx32, flags);
	return pad->backend->truncate(pad, len, flags);
}

int kvscratch_clear(struct kvscratch *pad, uint32_t flags)
{
	return kvscratch_truncate(pad, 0, flags);
}

/* Reading */

static const struct kvscratch_view *mapped_view(const struct kvscratch *pad)
{
	return __atomic_load_n(&pad->view, __ATOMIC_ACQUIRE);
}

/* A memfd says whatever its writers do. */
static int64_t check_len(const struct kvscratch *pad, uint64_t len)
{
	if (len <= pad->info.max_seq_len)
		return len;
	return set_error(-EPROTO, "expected at most %" PRIu64 " rows, got a status page that says %"
			 PRIu64, (uint64_t)pad->info.max_seq_len, len);
}

int64_t kvscratch_len(struct kvscratch *pad)
{
	const struct kvscratch_view *view = mapped_view(pad);
	struct kvscratch_info info;
	int err;

	if (view)
		return check_len(pad, kvscratch_state_len(kvscratch_view_state(view)));
	err = kvscratch_info(pad, &info);
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

int kvscratch_info_sized(struct kvscratch *pad, struct kvscratch_info *info, size_t size)
{
	struct kvscratch_info whole;
	int err = pad->backend->info(pad, &whole);
	int64_t len;

	if (err)
		return err;
	len = check_len(pad, whole.len);
	if (len < 0)
		return (int)len;
	if (size > sizeof(whole)) {
		memset(info, 0, size);
		size = sizeof(whole);
	}
	if (whole.size > size)
		whole.size = size;
	memcpy(info, &whole, size);
	return 0;
}

int kvscratch_display(struct kvscratch *pad, char *text, size_t size)
{
	int64_t len = kvscratch_len(pad);

	if (len < 0)
		return (int)len;
	return snprintf(text, size, "Scratchpad(len=%" PRId64 ", capacity=%" PRIu64 ", dim=%" PRIu32
			")", len, (uint64_t)pad->info.max_seq_len, (uint32_t)pad->info.dim);
}

static int populate(const struct kvscratch_view *view, uint64_t offset, uint64_t bytes)
{
	return madvise((char *)view->data + offset, bytes, MADV_POPULATE_READ) ? -errno : 0;
}

/* Array by array, for there may be nothing between them */
static int populate_all(const struct kvscratch_view *view)
{
	const struct kvscratch_info *info = &view->info;
	int err = populate(view, info->status_offset, sizeof(struct kvscratch_status));

	for (uint32_t i = 0; !err && i < info->nr_planes; i++)
		err = populate(view, info->planes[i].offset,
			       info->max_seq_len * info->planes[i].row_bytes);
	return err;
}

int map_view(struct kvscratch_view *view, int fd)
{
	void *data;
	int err;

	if (view->info.status_offset > SIZE_MAX / 2)
		return -EOVERFLOW;
	view->mapped_bytes = view->info.status_offset + sysconf(_SC_PAGESIZE);
	data = mmap(NULL, view->mapped_bytes, PROT_READ, MAP_SHARED, fd, 0);
	if (data == MAP_FAILED)
		return -errno;
	view->data = data;
	view->status = (const void *)((const char *)data + view->info.status_offset);
	err = populate_all(view);
	if (err)
		munmap(data, view->mapped_bytes);
	return err;
}

static int map_pad(struct kvscratch *pad, struct kvscratch_view *view)
{
	int err = kvscratch_info(pad, &view->info);

	if (err)
		return err;
	err = map_view(view, pad->fd);
	if (err == -EOVERFLOW)
		return set_error(err, "cannot map %" PRIu64 " bytes: this program has 32-bit "
				 "addresses", (uint64_t)view->info.status_offset);
	return err ? cannot("map the pad", err) : 0;
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
		return set_error(-ENOMEM, "out of memory");
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
	const struct kvscratch_view *view = kvscratch_view(pad);
	uint64_t state;
	int64_t len;

	if (!view)
		return -errno;
	state = kvscratch_view_state(view);
	len = check_len(pad, kvscratch_state_len(state));
	if (len < 0)
		return (int)len;
	*tensor = (struct kvscratch_tensor){
		.data = view->data,
		.scales = kvscratch_view_scales(view),
		.len = len,
		.dim = view->info.dim,
		.dtype = view->info.dtype,
		.state = state,
	};
	return 0;
}

/* Row by row where the parts of one lie in different planes */
static void copy_records(const struct kvscratch_view *view, uint64_t first, uint64_t count,
			 char *to)
{
	const uint64_t at_once = view->info.nr_planes == 1 ? count : 1;

	for (uint64_t row = first; row < first + count; row += at_once) {
		for (uint32_t i = 0; i < view->info.nr_planes; i++) {
			const struct kvscratch_array *plane = &view->info.planes[i];
			size_t bytes = at_once * plane->row_bytes;

			memcpy(to, (const char *)view->data + plane->offset +
			       row * plane->row_bytes, bytes);
			to += bytes;
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
static bool copy_in_pieces(const struct kvscratch_view *view, uint64_t state, uint64_t first,
			   uint64_t end, char *to)
{
	const uint32_t row_bytes = view->info.row_bytes;
	const uint64_t most = row_bytes < PIECE_BYTES ? PIECE_BYTES / row_bytes : 1;

	while (first < end) {
		uint64_t count = end - first < most ? end - first : most;
		uint64_t next;

		copy_records(view, first, count, to);
		first += count;
		to += count * row_bytes;
		next = kvscratch_view_state(view);
		if (kvscratch_view_valid_rows(view, state) < first)
			return false;
		state = next;
	}
	return true;
}

int kvscratch_copy_rows(struct kvscratch *pad, uint64_t first, uint64_t count, void *rows)
{
	const struct kvscratch_view *view = kvscratch_view(pad);
	uint64_t state;

	if (!view)
		return -errno;
	do {
		int64_t len;

		state = kvscratch_view_state(view);
		len = check_len(pad, kvscratch_state_len(state));
		if (len < 0)
			return (int)len;
		if (first > (uint64_t)len || count > (uint64_t)len - first)
			return set_error(-EINVAL, "expected rows below %" PRId64 ", got %" PRIu64
					 " from %" PRIu64 " on", len, count, first);
	} while (!copy_in_pieces(view, state, first, first + count, rows));
	return 0;
}

int kvscratch_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	const struct kvscratch_view *view = kvscratch_view(pad);

	if (!view)
		return -errno;
	return pad->backend->wait(pad, state, timeout_ms);
}
