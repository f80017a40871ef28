// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads without the module: a memfd of the same layout, whose last page is the
 * status page and what writers have to remember besides.
 *
 * Readers cannot tell it from a pad of the module. Writers put rows in place with
 * pwrite(), so that a source which cannot be read is an error and not a signal
 * (but for what has to be converted), and publish them with a release store to the status page. A lock on an open file
 * orders writers; each call opens its own through /proc, so that threads and children
 * do not share it, and it goes when its owner dies, in whatever state: rows that were
 * not published yet do not exist. What this cannot do, and why, is in promises.c.
 *
 * The size is sealed, so that no view can be cut short.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "backend.h"
#include "convert.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

/* 32-bit programs have one more, since Linux 5.1, with times of 64 bits */
#ifdef SYS_futex_time64
#define FUTEX_TIME64 SYS_futex_time64
#else
#define FUTEX_TIME64 SYS_futex
#endif

#define MEMFD_MAGIC	0x4d56564bU	/* "KVVM" */
#define MEMFD_VERSION	2
#define MEMFD_SEALS	(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/**
 * struct memfd_page - the last page of the memfd
 * @status: what readers know; here @status.state is the truth as well
 * @magic: MEMFD_MAGIC
 * @version: MEMFD_VERSION
 * @dim: as in struct kvscratch_info
 * @dtype: likewise
 * @input_dtype: likewise
 * @frac_bits: likewise
 * @generation_high: upper half of the full generation, whose lower half is in
 *	@status.state
 * @saturated: as in struct kvscratch_info
 * @dirty_rows: end of the rows ever touched since they were zero
 * @changes: grows with each change of the state: what waiters sleep on
 */
struct memfd_page {
	struct kvscratch_status status;
	__u32 reserved[12];
	__u32 magic;
	__u32 version;
	__u32 dim;
	__u32 dtype;
	__u32 input_dtype;
	__u32 frac_bits;
	__aligned_u64 saturated;
	__aligned_u64 dirty_rows;
	__u32 generation_high;
	__u32 changes;
};

_Static_assert(offsetof(struct memfd_page, magic) == 192, "one layout for 32 and 64 bit");
_Static_assert(offsetof(struct memfd_page, changes) == 236, "one layout for 32 and 64 bit");

static size_t page_size(void)
{
	return sysconf(_SC_PAGESIZE);
}

/* Making one */

static int new_memfd(void)
{
	const unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
	int fd = memfd_create("kvscratch", flags | MFD_NOEXEC_SEAL);

	/* before Linux 6.3 */
	if (fd < 0 && errno == EINVAL)
		fd = memfd_create("kvscratch", flags);
	return fd < 0 ? -errno : fd;
}

/* The module's limit, as it comes; nothing else keeps a memfd from taking all there is. */
static uint64_t max_bytes_per_pad(void)
{
	return (uint64_t)sysconf(_SC_PHYS_PAGES) * page_size() / 2;
}

#define ALLOCATION_PIECE	(2ull << 20)

static int allocate_pages(int fd, uint64_t bytes)
{
	if (bytes > max_bytes_per_pad())
		return -EDQUOT;
	if (ftruncate(fd, bytes) || fchmod(fd, 0600))
		return -errno;
	/* in pieces: up to Linux 6.1 a signal has a piece begun anew, again and again */
	for (uint64_t at = 0; at < bytes; at += ALLOCATION_PIECE)
		while (fallocate(fd, 0, at, bytes - at < ALLOCATION_PIECE ? bytes - at :
									   ALLOCATION_PIECE))
			if (errno != EINTR)
				return errno == ENOSPC ? -ENOMEM : -errno;
	return fcntl(fd, F_ADD_SEALS, MEMFD_SEALS) ? -errno : 0;
}

static int write_page(int fd, const struct kvscratch_info *info)
{
	const struct memfd_page page = {
		.status = {
			.magic = KVSCRATCH_STATUS_MAGIC,
			.version = KVSCRATCH_STATUS_VERSION,
			.max_seq_len = info->max_seq_len,
			.nr_planes = 1,
			.row_bytes = info->row_bytes,
		},
		.magic = MEMFD_MAGIC,
		.version = MEMFD_VERSION,
		.dim = info->dim,
		.dtype = info->dtype,
		.input_dtype = info->input_dtype,
		.frac_bits = info->frac_bits,
	};
	ssize_t written = pwrite(fd, &page, sizeof(page), info->status_offset);

	if (written < 0)
		return -errno;
	return written == sizeof(page) ? 0 : -EIO;
}

static int fill_memfd(int fd, const struct kvscratch_info *info)
{
	struct size_signal held;
	int err;

	hold_size_signal(&held);
	err = allocate_pages(fd, info->status_offset + page_size());
	if (!err)
		err = write_page(fd, info);
	drop_size_signal(&held, err);
	return err;
}

static int memfd_create_pad(int *fd, const struct kvscratch_geometry *geometry)
{
	struct kvscratch_info info;
	int err = lay_out(&info, geometry);

	if (err)
		return err;
	*fd = new_memfd();
	if (*fd < 0)
		return cannot("make a memfd", *fd);
	err = fill_memfd(*fd, &info);
	if (!err)
		return 0;
	close(*fd);
	return set_error(err, "cannot create a pad of [%" PRIu64 ", %" PRIu32 "] %s: %s",
			 geometry->max_seq_len, geometry->dim,
			 kvscratch_dtype_name(geometry->dtype), kvscratch_strerror(err));
}

/* Handles */

static int memfd_reopen(int *fd, int src_fd, int access)
{
	char path[32];

	if (access == O_WRONLY)
		return set_error(-EOPNOTSUPP, "a pad in a memfd has no handles for writing only");
	snprintf(path, sizeof(path), "/proc/self/fd/%d", src_fd);
	*fd = open(path, access | O_CLOEXEC);
	return *fd < 0 ? set_error(-errno, "cannot open %s for a handle of its own: %s", path,
				   strerror(errno)) : 0;
}

/* The page is somebody else's: it counts once it agrees with the size of the file. */
static int check_page(struct kvscratch *pad, const struct memfd_page *page,
		      const struct stat *status)
{
	const uint64_t bytes = status->st_size;
	const struct kvscratch_geometry geometry = {
		.max_seq_len = page->status.max_seq_len,
		.dim = page->dim,
		.dtype = page->dtype,
		.input_dtype = page->input_dtype,
		.frac_bits = page->frac_bits,
	};

	if (page->magic != MEMFD_MAGIC || page->status.magic != KVSCRATCH_STATUS_MAGIC)
		return -ENOTTY;
	if (page->version != MEMFD_VERSION)
		return set_error(-EPROTO, "descriptor %d: expected a memfd pad of version %d, got %"
				 PRIu32, pad->fd, MEMFD_VERSION, (uint32_t)page->version);
	/* who maps a hole pays for it */
	if ((uint64_t)status->st_blocks * 512 < bytes)
		return set_error(-EPROTO, "descriptor %d: expected a memfd without holes", pad->fd);
	if (lay_out(&pad->info, &geometry))
		return -EPROTO;
	if (pad->info.status_offset + page_size() != bytes)
		return set_error(-EPROTO, "descriptor %d: expected a memfd of %" PRIu64
				 " bytes, got %" PRIu64, pad->fd,
				 (uint64_t)pad->info.status_offset + page_size(), bytes);
	return 0;
}

/* The seals first: the size counts from when it can no longer change. */
static bool is_sealed_memfd(int fd, struct stat *status)
{
	int seals = fcntl(fd, F_GET_SEALS);

	return seals >= 0 && (seals & MEMFD_SEALS) == MEMFD_SEALS && !fstat(fd, status) &&
	       S_ISREG(status->st_mode) && status->st_size && !(status->st_size % page_size());
}

static int map_page(struct kvscratch *pad, const struct stat *status)
{
	int protection = pad->access == O_RDWR ? PROT_READ | PROT_WRITE : PROT_READ;
	void *page = mmap(NULL, page_size(), protection, MAP_SHARED, pad->fd,
			  status->st_size - page_size());
	int err;

	if (page == MAP_FAILED)
		return cannot("map the status page", -errno);
	err = check_page(pad, page, status);
	if (err)
		munmap(page, page_size());
	else
		pad->page = page;
	return err;
}

static int memfd_adopt(struct kvscratch *pad)
{
	struct stat status;

	if (!is_sealed_memfd(pad->fd, &status))
		return -ENOTTY;
	if (pad->access == O_WRONLY)
		return set_error(-EOPNOTSUPP, "a pad in a memfd has no handles for writing only");
	return map_page(pad, &status);
}

static void memfd_release(struct kvscratch *pad)
{
	munmap(pad->page, page_size());
}

/* State */

static uint64_t load_state(const struct kvscratch *pad)
{
	return kvscratch_word_load(&pad->page->status.state);
}

static void store_word(union kvscratch_word *word, uint64_t value)
{
	__atomic_store_n(&word->word, value, __ATOMIC_RELEASE);
}

static uint64_t full_generation(const struct kvscratch *pad, uint64_t state)
{
	uint64_t high = __atomic_load_n(&pad->page->generation_high, __ATOMIC_ACQUIRE);

	return high << 32 | kvscratch_state_generation(state);
}

static int memfd_info(struct kvscratch *pad, struct kvscratch_info *info)
{
	uint64_t state, trunc;

	*info = pad->info;
	do {
		state = load_state(pad);
		trunc = kvscratch_word_load(&pad->page->status.trunc);
		info->generation = full_generation(pad, state);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
	} while (load_state(pad) != state);
	info->len = kvscratch_state_len(state);
	/* otherwise it belongs to a truncate that never was */
	if (kvscratch_state_generation(trunc) == kvscratch_state_generation(state))
		info->trunc_len = kvscratch_state_len(trunc);
	info->saturated = __atomic_load_n(&pad->page->saturated, __ATOMIC_RELAXED);
	return 0;
}

static void wake_waiters(struct kvscratch *pad)
{
	__atomic_fetch_add(&pad->page->changes, 1, __ATOMIC_RELEASE);
	syscall(FUTEX_TIME64, &pad->page->changes, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/*
 * Release: whoever loads this state sees the rows. The full fence is for what the
 * writer does next to dropped rows: none of it may be seen before the state.
 */
static void publish(struct kvscratch *pad, uint64_t state)
{
	store_word(&pad->page->status.state, state);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	wake_waiters(pad);
}

static int file_lock(int fd, int type)
{
	struct flock lock = { .l_type = type, .l_whence = SEEK_SET };

	return fcntl(fd, F_OFD_SETLKW, &lock) ? -errno : 0;
}

/* Returns the open file that has the lock. */
static int lock_writers(const struct kvscratch *pad)
{
	int fd;
	int err = memfd_reopen(&fd, pad->fd, O_RDWR);

	if (err)
		return err;
	err = file_lock(fd, F_WRLCK);
	if (!err)
		return fd;
	close(fd);
	return cannot("lock the pad", err);
}

static void unlock_writers(int fd)
{
	/* said, for a child that was forked meanwhile has the file as well */
	file_lock(fd, F_UNLCK);
	close(fd);
}

/* Appending */

#define PIECE_ROWS	128

static int write_all(int fd, struct iovec *iov, int count, uint64_t at)
{
	while (count) {
		ssize_t written = pwritev(fd, iov, count, at);

		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return written ? -errno : -EIO;
		at += written;
		while (count && (size_t)written >= iov->iov_len) {
			written -= iov->iov_len;
			iov++;
			count--;
		}
		if (count) {
			iov->iov_base = (char *)iov->iov_base + written;
			iov->iov_len -= written;
		}
	}
	return 0;
}

static int write_piece(const struct kvscratch *pad, uint32_t plane, uint64_t offset,
		       const void *bytes, size_t count)
{
	struct iovec iov = { .iov_base = (void *)bytes, .iov_len = count };

	return write_all(pad->fd, &iov, 1, pad->info.planes[plane].offset + offset);
}

/* Rows as they are stored: the parts of each go to the plane they belong to. */
static int write_stored(const struct kvscratch *pad, const char *rows, uint64_t first,
			uint64_t nr_rows)
{
	const struct kvscratch_info *info = &pad->info;
	struct iovec iov[PIECE_ROWS];

	if (info->nr_planes == 1)
		return write_piece(pad, 0, first * info->row_bytes, rows,
				   nr_rows * info->row_bytes);
	while (nr_rows) {
		uint64_t count = nr_rows < PIECE_ROWS ? nr_rows : PIECE_ROWS;
		uint32_t skip = 0;

		for (uint32_t p = 0; p < info->nr_planes; p++) {
			const struct kvscratch_array *plane = &info->planes[p];
			int err;

			for (uint64_t i = 0; i < count; i++)
				iov[i] = (struct iovec){
					.iov_base = (char *)rows + i * info->row_bytes + skip,
					.iov_len = plane->row_bytes,
				};
			err = write_all(pad->fd, iov, count,
					plane->offset + first * plane->row_bytes);
			if (err)
				return err;
			skip += plane->row_bytes;
		}
		rows += count * info->row_bytes;
		first += count;
		nr_rows -= count;
	}
	return 0;
}

/* Elements from index @at of the pad on */
static int convert_piece(const struct kvscratch *pad, const void *in, uint64_t at,
			 uint32_t count, uint64_t *saturated)
{
	const struct kvscratch_info *info = &pad->info;
	const uint32_t size = kvscratch_dtype_size(info->dtype);
	__u64 out[CONVERT_MOST];
	__u8 scales[CONVERT_MOST / KVSCRATCH_MX_BLOCK];
	long clamped = convert_elements(info, in, count, out, scales);
	int err;

	if (clamped < 0)
		return clamped;
	*saturated += clamped;
	err = write_piece(pad, 0, at * size, out, (size_t)count * size);
	if (!err && info->nr_planes > 1)
		err = write_piece(pad, 1, at / KVSCRATCH_MX_BLOCK, scales,
				  count / KVSCRATCH_MX_BLOCK);
	return err;
}

static int write_converted(const struct kvscratch *pad, const char *rows, uint64_t first,
			   uint64_t nr_rows, uint64_t *saturated)
{
	const uint32_t size = kvscratch_dtype_size(pad->info.input_dtype);
	uint64_t at = first * pad->info.dim;
	uint64_t left = nr_rows * pad->info.dim;
	/* aligned to its elements, which @rows need not be */
	__u64 in[CONVERT_MOST];

	while (left) {
		uint32_t count = left < CONVERT_MOST ? left : CONVERT_MOST;
		int err;

		memcpy(in, rows, (size_t)count * size);
		err = convert_piece(pad, in, at, count, saturated);
		if (err)
			return err;
		rows += (size_t)count * size;
		at += count;
		left -= count;
	}
	return 0;
}

/* Some other writer's doing: nothing but the size of the file can be relied on. */
static int fail_overwritten(void)
{
	return set_error(-EPROTO, "the status page has been overwritten");
}

static int append_locked(struct kvscratch *pad, const void *rows, uint64_t nr_rows)
{
	struct memfd_page *page = pad->page;
	const uint64_t state = load_state(pad);
	const uint32_t len = kvscratch_state_len(state);
	uint64_t saturated = 0;
	int err;

	if (len > pad->info.max_seq_len)
		return fail_overwritten();
	if (nr_rows > pad->info.max_seq_len - len)
		return fail_room(len, nr_rows, pad->info.max_seq_len);
	/* before the first byte, for a truncate that zeroes after this call died */
	if (page->dirty_rows < len + nr_rows)
		__atomic_store_n(&page->dirty_rows, len + nr_rows, __ATOMIC_RELEASE);
	if (pad->info.input_dtype == pad->info.dtype)
		err = write_stored(pad, rows, len, nr_rows);
	else
		err = write_converted(pad, rows, len, nr_rows, &saturated);
	if (err)
		return cannot("append", err);
	if (saturated)
		__atomic_store_n(&page->saturated, page->saturated + saturated, __ATOMIC_RELAXED);
	publish(pad, state + nr_rows);
	return 0;
}

static int memfd_append(struct kvscratch *pad, const void *rows, uint64_t nr_rows)
{
	int lock = lock_writers(pad);
	struct size_signal held;
	int err;

	if (lock < 0)
		return lock;
	hold_size_signal(&held);
	err = append_locked(pad, rows, nr_rows);
	drop_size_signal(&held, err);
	unlock_writers(lock);
	return err;
}

/* Truncating */

static int zero_rows(const struct kvscratch *pad, uint64_t first, uint64_t end)
{
	static const char zeros[65536];

	for (uint32_t p = 0; p < pad->info.nr_planes; p++) {
		uint64_t at = first * pad->info.planes[p].row_bytes;
		uint64_t left = (end - first) * pad->info.planes[p].row_bytes;

		while (left) {
			size_t count = left < sizeof(zeros) ? left : sizeof(zeros);
			int err = write_piece(pad, p, at, zeros, count);

			if (err)
				return err;
			at += count;
			left -= count;
		}
	}
	return 0;
}

static int truncate_locked(struct kvscratch *pad, uint64_t len, uint32_t flags)
{
	struct memfd_page *page = pad->page;
	const uint64_t state = load_state(pad);
	const uint64_t generation = full_generation(pad, state) + 1;
	const uint64_t now = generation << 32 | len;
	int err;

	if (kvscratch_state_len(state) > pad->info.max_seq_len)
		return fail_overwritten();
	if (len > kvscratch_state_len(state))
		return set_error(-EINVAL, "expected at most %" PRIu32
				 ", the committed rows, got %" PRIu64, kvscratch_state_len(state),
				 len);
	__atomic_store_n(&page->generation_high, generation >> 32, __ATOMIC_RELEASE);
	store_word(&page->status.trunc, now);
	publish(pad, now);
	if (!(flags & KVSCRATCH_TRUNCATE_ZERO) || page->dirty_rows <= len)
		return 0;
	if (page->dirty_rows > pad->info.max_seq_len)
		return fail_overwritten();
	err = zero_rows(pad, len, page->dirty_rows);
	if (err)
		return cannot("overwrite with zeros", err);
	__atomic_store_n(&page->dirty_rows, len, __ATOMIC_RELEASE);
	return 0;
}

static int memfd_truncate(struct kvscratch *pad, uint64_t len, uint32_t flags)
{
	int lock = lock_writers(pad);
	struct size_signal held;
	int err;

	if (lock < 0)
		return lock;
	hold_size_signal(&held);
	err = truncate_locked(pad, len, flags);
	drop_size_signal(&held, err);
	unlock_writers(lock);
	return err;
}

/* Waiting */

/*
 * The longest sleep: a writer that dies between its change and the wake-up tells nobody,
 * so that who sleeps looks now and then.
 */
#define LOOK_EVERY_MS 1000

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Until a point in time, which FUTEX_WAIT knows not; 0 or a negative errno */
static int sleep_until(struct kvscratch *pad, __u32 changes, int64_t end_ns)
{
	/* what these numbers take, whatever size time_t has here */
	const int64_t end[2] = { end_ns / 1000000000, end_ns % 1000000000 };

	return syscall(FUTEX_TIME64, &pad->page->changes, FUTEX_WAIT_BITSET, changes, end, NULL,
		       FUTEX_BITSET_MATCH_ANY) ? -errno : 0;
}

static int memfd_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	const int64_t end = now_ns() + timeout_ms * INT64_C(1000000);

	for (;;) {
		__u32 changes = __atomic_load_n(&pad->page->changes, __ATOMIC_ACQUIRE);
		int64_t next = now_ns() + LOOK_EVERY_MS * INT64_C(1000000);
		bool last = timeout_ms >= 0 && end <= next;
		int err;

		if (load_state(pad) != state)
			return 0;
		err = sleep_until(pad, changes, last ? end : next);
		if (err == -ETIMEDOUT && last)
			return set_error(err, "nothing was appended or dropped in time");
		if (err && err != -EAGAIN && err != -ETIMEDOUT)
			return cannot("wait", err);
	}
}

const struct backend memfd_backend = {
	.id = KVSCRATCH_BACKEND_MEMFD,
	.create = memfd_create_pad,
	.reopen = memfd_reopen,
	.adopt = memfd_adopt,
	.release = memfd_release,
	.info = memfd_info,
	.append = memfd_append,
	.truncate = memfd_truncate,
	.wait = memfd_wait,
};
