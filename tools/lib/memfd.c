// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads without the module: a memfd of the same layout. Behind its planes and the status page,
 * which is all that readers look at, it has a table of the planes with what writers have to
 * remember of each, and in its last page what they have to remember of the pad.
 *
 * Readers cannot tell it from a pad of the module. Writers put rows in place and publish them
 * with a release store to the status page. A lock on the first byte of an open file orders
 * writers; each call opens its own file through /proc, so that threads and children do not
 * share it, and it goes when its owner dies, in whatever state: rows that were not published
 * yet do not exist. The writer of epoch e has the lock on the byte ROLE_AT + e for as long as
 * its file is open. What this cannot do, and why, is in promises.c.
 *
 * The size is sealed, so that no view can be cut short.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "memfd.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
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
#define MEMFD_VERSION	3
#define MEMFD_SEALS	(F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

/* What is locked: for the time of a call, and by the writer of an epoch, which is not 0 */
#define CALL_AT		0
#define ROLE_AT		1

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

static int write_at(int fd, const void *bytes, size_t count, uint64_t at)
{
	ssize_t written = pwrite(fd, bytes, count, at);

	if (written < 0)
		return -errno;
	return (size_t)written == count ? 0 : -EIO;
}

static size_t table_bytes(uint32_t nr_planes)
{
	return kvs_layout_round(nr_planes * sizeof(struct memfd_plane), page_size());
}

static int write_table(int fd, const struct new_pad *made, uint64_t at)
{
	for (uint32_t i = 0; i < made->nr_planes; i++) {
		const struct memfd_plane plane = {
			.geometry = made->planes[i],
			.touched = made->rows,
		};
		int err = write_at(fd, &plane, sizeof(plane), at + i * sizeof(plane));

		if (err)
			return err;
	}
	return 0;
}

static int write_pages(int fd, const struct new_pad *made)
{
	const uint64_t table = made->layout.status_offset + page_size();
	const struct kvscratch_status status = {
		.magic = KVSCRATCH_STATUS_MAGIC,
		.version = KVSCRATCH_STATUS_VERSION,
		.max_seq_len = made->max_seq_len,
		.nr_planes = made->nr_planes,
		.row_bytes = made->layout.row_bytes,
		.state = { .word = made->rows },
	};
	struct memfd_page page = {
		.max_seq_len = made->max_seq_len,
		.nr_planes = made->nr_planes,
		.parent_id = made->parent_id,
		.parent_rows = made->rows,
		.magic = MEMFD_MAGIC,
		.version = MEMFD_VERSION,
	};
	int err = write_at(fd, &status, sizeof(status), made->layout.status_offset);

	memcpy(page.tag, made->tag, sizeof(page.tag));
	if (!err)
		err = write_table(fd, made, table);
	if (!err)
		err = write_at(fd, &page, sizeof(page), table + table_bytes(made->nr_planes));
	return err;
}

static int fill_memfd(int fd, const struct new_pad *made)
{
	struct size_signal held;
	int err;

	hold_size_signal(&held);
	err = allocate_pages(fd, made->layout.status_offset + page_size() +
			     table_bytes(made->nr_planes) + page_size());
	if (!err)
		err = write_pages(fd, made);
	drop_size_signal(&held, err);
	return err;
}

static int memfd_create_pad(int *fd, struct new_pad *made)
{
	int err;

	*fd = new_memfd();
	if (*fd < 0)
		return cannot("make a memfd", *fd);
	err = fill_memfd(*fd, made);
	if (!err)
		return 0;
	close(*fd);
	return fail_create(made, err, err == -EDQUOT ? "more than half of the machine's memory" :
						       kvscratch_strerror(err));
}

/* Forks, which are copies */

static int copy_array(int fd, const char *from, uint64_t bytes, uint64_t to)
{
	int err = 0;

	for (uint64_t at = 0; !err && at < bytes; at += ALLOCATION_PIECE)
		err = write_at(fd, from + at, bytes - at < ALLOCATION_PIECE ? bytes - at :
									      ALLOCATION_PIECE,
			       to + at);
	return err;
}

static int copy_planes_of(int fd, const struct kvscratch_view *view, const struct new_pad *made)
{
	int err = 0;

	for (uint32_t i = 0; !err && i < made->nr_planes; i++) {
		const struct kvscratch_plane *to = &made->planes[i];

		err = copy_array(fd, kvscratch_view_plane_row(view, i, 0),
				 made->rows * to->row_bytes, to->offset);
		if (!err && to->scales_row_bytes)
			err = copy_array(fd, (const char *)kvscratch_view_plane_scales(view, i),
					 made->rows * to->scales_row_bytes, to->scales_offset);
	}
	return err ? cannot("copy the rows of the pad", err) : 0;
}

/* Nobody else has the new one yet: what is copied beside a truncate is gone with it. */
static int memfd_fork(int *fd, struct kvscratch *source, struct new_pad *made, uint64_t generation)
{
	const struct kvscratch_view *view = kvscratch_view(source);
	uint64_t state;
	int err;

	if (!view)
		return -errno;
	state = kvscratch_view_state(view);
	if (kvscratch_state_generation(state) != (uint32_t)generation ||
	    kvscratch_state_len(state) < made->rows)
		return fail_fork();
	err = memfd_create_pad(fd, made);
	if (err)
		return err;
	err = copy_planes_of(*fd, view, made);
	if (!err && kvscratch_view_valid_rows(view, state) < made->rows)
		err = fail_fork();
	if (err)
		close(*fd);
	return err;
}

/* Handles */

static int memfd_reopen(int *fd, int src_fd, int access)
{
	char path[40];

	if (access == O_WRONLY)
		return set_error(-EOPNOTSUPP, "a pad in a memfd has no handles for writing only");
	/* of this thread: others may have other descriptors, and the first one may be gone */
	snprintf(path, sizeof(path), "/proc/thread-self/fd/%d", src_fd);
	*fd = open(path, access | O_CLOEXEC);
	return *fd < 0 ? set_error(-errno, "cannot open %s for a handle of its own: %s", path,
				   strerror(errno)) : 0;
}

static int read_at(int fd, void *bytes, size_t count, uint64_t at)
{
	ssize_t got = pread(fd, bytes, count, at);

	if (got < 0)
		return cannot("read what the memfd is", -errno);
	return (size_t)got == count ? 0 : -ENOTTY;
}

/* Whether the last page is one of ours, and of this version */
static int check_page(int fd, const struct memfd_page *page)
{
	if (page->magic != MEMFD_MAGIC)
		return -ENOTTY;
	if (page->version != MEMFD_VERSION)
		return set_error(-EPROTO, "descriptor %d: expected a memfd pad of version %d, got %"
				 PRIu32, fd, MEMFD_VERSION, (uint32_t)page->version);
	if (!page->nr_planes || page->nr_planes > KVSCRATCH_MAX_PLANES)
		return set_error(-EPROTO, "descriptor %d: expected 1 to %u planes, got %" PRIu32, fd,
				 KVSCRATCH_MAX_PLANES, (uint32_t)page->nr_planes);
	return 0;
}

/* A copy, for whoever writes to the memfd may change the table at any time */
static int read_table(struct kvscratch *pad, uint32_t nr_planes, uint64_t at)
{
	const size_t bytes = nr_planes * sizeof(struct memfd_plane);
	struct memfd_plane *table = malloc(bytes);
	int err;

	pad->planes = calloc(nr_planes, sizeof(*pad->planes));
	err = table && pad->planes ? read_at(pad->fd, table, bytes, at) : out_of_memory();
	for (uint32_t i = 0; !err && i < nr_planes; i++)
		copy_inputs(&pad->planes[i], &table[i].geometry);
	pad->nr_planes = nr_planes;
	free(table);
	return err;
}

/* The file is somebody else's: it counts once it agrees with its own size. */
static int check_file(struct kvscratch *pad, const struct stat *status)
{
	const uint64_t bytes = status->st_size, last = bytes - page_size();
	struct kvscratch_pad_info info = { 0 };
	struct kvs_layout layout;
	struct memfd_page page;
	uint64_t expected;
	int err = read_at(pad->fd, &page, sizeof(page), last);

	if (!err)
		err = check_page(pad->fd, &page);
	if (err)
		return err;
	/* who maps a hole pays for it */
	if ((uint64_t)status->st_blocks * 512 < bytes)
		return set_error(-EPROTO, "descriptor %d: expected a memfd without holes", pad->fd);
	pad->memfd.bytes = page_size() + table_bytes(page.nr_planes) + page_size();
	if (pad->memfd.bytes >= bytes)
		return set_error(-EPROTO, "descriptor %d: expected a memfd with room for %" PRIu32
				 " planes, got one of %" PRIu64 " bytes", pad->fd,
				 (uint32_t)page.nr_planes, bytes);
	err = read_table(pad, page.nr_planes, last - table_bytes(page.nr_planes));
	if (!err && lay_out_planes(&layout, pad->planes, pad->nr_planes, page.max_seq_len))
		err = -EPROTO;
	if (err)
		return err;
	expected = layout.status_offset + pad->memfd.bytes;
	if (expected != bytes)
		return set_error(-EPROTO, "descriptor %d: expected a memfd of %" PRIu64
				 " bytes, got %" PRIu64, pad->fd, expected, bytes);
	info.max_seq_len = page.max_seq_len;
	info.status_offset = layout.status_offset;
	info.nr_planes = pad->nr_planes;
	info.row_bytes = layout.row_bytes;
	info.input_row_bytes = layout.input_row_bytes;
	describe(&pad->info, &info, pad->planes);
	return 0;
}

/* The seals first: the size counts from when it can no longer change. */
static bool is_sealed_memfd(int fd, struct stat *status)
{
	int seals = fcntl(fd, F_GET_SEALS);

	return seals >= 0 && (seals & MEMFD_SEALS) == MEMFD_SEALS && !fstat(fd, status) &&
	       S_ISREG(status->st_mode) && status->st_size && !(status->st_size % page_size());
}

static int map_parts(struct kvscratch *pad)
{
	int protection = pad->access == O_RDWR ? PROT_READ | PROT_WRITE : PROT_READ;
	struct memfd_parts *parts = &pad->memfd;
	char *at = mmap(NULL, parts->bytes, protection, MAP_SHARED, pad->fd,
			pad->info.status_offset);

	if (at == MAP_FAILED)
		return cannot("map the status page", -errno);
	parts->status = (void *)at;
	parts->planes = (void *)(at + page_size());
	parts->page = (void *)(at + parts->bytes - page_size());
	return 0;
}

static int memfd_adopt(struct kvscratch *pad)
{
	struct stat status;
	int err;

	if (!is_sealed_memfd(pad->fd, &status))
		return -ENOTTY;
	if (pad->access == O_WRONLY)
		return set_error(-EOPNOTSUPP, "a pad in a memfd has no handles for writing only");
	err = check_file(pad, &status);
	return err ? err : map_parts(pad);
}

/* State */

static uint64_t load_word(const union kvscratch_word *word)
{
	return kvscratch_word_load(word);
}

static uint64_t load_state(const struct kvscratch *pad)
{
	return load_word(&pad->memfd.status->state);
}

static void store_word(union kvscratch_word *word, uint64_t value)
{
	__atomic_store_n(&word->word, value, __ATOMIC_RELEASE);
}

/* Of a writer word: the epoch, KVSCRATCH_PAD_SEALED and KVSCRATCH_PAD_WRITER */
static uint32_t epoch_of(uint64_t writer)
{
	return writer >> 32;
}

static uint64_t full_generation(const struct kvscratch *pad, uint64_t state)
{
	uint64_t high = __atomic_load_n(&pad->memfd.page->generation_high, __ATOMIC_ACQUIRE);

	return high << 32 | kvscratch_state_generation(state);
}

/* Whether an open file other than @fd has the lock of the writer of an epoch */
static bool role_is_held(int fd, uint32_t epoch)
{
	struct flock lock = {
		.l_type = F_WRLCK,
		.l_whence = SEEK_SET,
		.l_start = ROLE_AT + (off_t)epoch,
		.l_len = 1,
	};

	return !fcntl(fd, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK;
}

/* A writer that was killed has left its flag. */
static uint32_t role_flags(const struct kvscratch *pad)
{
	const uint64_t writer = load_word(&pad->memfd.status->writer);
	bool own = pad->is_writer && epoch_of(writer) == pad->role.epoch;
	uint32_t flags = (uint32_t)writer;

	if (flags & KVSCRATCH_PAD_WRITER && !own && !role_is_held(pad->fd, epoch_of(writer)))
		flags &= ~KVSCRATCH_PAD_WRITER;
	return flags & (KVSCRATCH_PAD_WRITER | KVSCRATCH_PAD_SEALED);
}

static void load_moment(const struct kvscratch *pad, struct kvscratch_pad_info *info)
{
	uint64_t state, trunc;

	do {
		state = load_state(pad);
		trunc = load_word(&pad->memfd.status->trunc);
		info->generation = full_generation(pad, state);
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
	} while (load_state(pad) != state);
	info->len = kvscratch_state_len(state);
	/* otherwise it belongs to a truncate that never was */
	info->trunc_len = kvscratch_state_generation(trunc) == kvscratch_state_generation(state) ?
			  kvscratch_state_len(trunc) : 0;
}

static int memfd_info(struct kvscratch *pad, struct kvscratch_pad_info *info)
{
	struct stat status;

	if (fstat(pad->fd, &status))
		return cannot("describe the pad", -errno);
	*info = (struct kvscratch_pad_info){
		.size = sizeof(*info),
		.flags = role_flags(pad),
		.id = status.st_ino,
		.max_seq_len = pad->info.max_seq_len,
		.mapping_bytes = pad->info.status_offset + page_size(),
		.status_offset = pad->info.status_offset,
		.allocated_bytes = status.st_size,
		.saturated = __atomic_load_n(&pad->memfd.page->saturated, __ATOMIC_RELAXED),
		.epoch = epoch_of(load_word(&pad->memfd.status->writer)),
		.nr_planes = pad->nr_planes,
		.row_bytes = pad->info.row_bytes,
		.input_row_bytes = pad->info.input_row_bytes,
		.parent_id = pad->memfd.page->parent_id,
		.parent_rows = pad->memfd.page->parent_rows,
	};
	memcpy(info->tag, pad->memfd.page->tag, sizeof(info->tag));
	load_moment(pad, info);
	return 0;
}

static void wake_waiters(const struct kvscratch *pad)
{
	__u32 *changes = &pad->memfd.page->changes;

	__atomic_fetch_add(changes, 1, __ATOMIC_RELEASE);
	syscall(FUTEX_TIME64, changes, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/*
 * Release: whoever loads this state sees the rows. The full fence is for what the
 * writer does next to dropped rows: none of it may be seen before the state.
 */
static void publish(const struct kvscratch *pad, uint64_t state)
{
	store_word(&pad->memfd.status->state, state);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	wake_waiters(pad);
}

/* Changing a pad */

static int file_lock(int fd, int command, int type, off_t at)
{
	struct flock lock = { .l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1 };

	return fcntl(fd, command, &lock) ? -errno : 0;
}

/**
 * struct change - a call that changes a pad
 * @lock: the open file that has the lock
 * @state: what the pad is in now
 * @len: rows that are committed now
 * @held: a size limit is an error and no signal meanwhile
 */
struct change {
	int lock;
	uint64_t state;
	uint32_t len;
	struct size_signal held;
};

/* Some other writer's doing: nothing but the size of the file can be relied on. */
static int fail_overwritten(void)
{
	return set_error(-EPROTO, "the status page has been overwritten");
}

/* What forbids this handle to change the pad */
static int check_role(const struct kvscratch *pad, int lock, bool only_writer)
{
	union kvscratch_word *word = &pad->memfd.status->writer;
	uint64_t writer = load_word(word);

	if (writer & KVSCRATCH_PAD_SEALED)
		return -EROFS;
	if (pad->is_writer)
		return epoch_of(writer) == pad->role.epoch ? 0 : -ESTALE;
	if (only_writer)
		return -ENOLCK;
	if (!(writer & KVSCRATCH_PAD_WRITER))
		return 0;
	if (role_is_held(lock, epoch_of(writer)))
		return -EBUSY;
	/* it is dead */
	store_word(word, writer & ~(uint64_t)KVSCRATCH_PAD_WRITER);
	return 0;
}

static int check_cursors(const struct kvscratch *pad)
{
	const uint64_t most = pad->info.max_seq_len;

	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		const struct memfd_plane *plane = &pad->memfd.planes[i];

		if (plane->staged > most || plane->whole > most || plane->touched > most)
			return fail_overwritten();
	}
	return 0;
}

/* The lock alone; @what is for the words */
static int lock_pad(const struct kvscratch *pad, struct change *change)
{
	int err = memfd_reopen(&change->lock, pad->fd, O_RDWR);

	if (err)
		return err;
	err = file_lock(change->lock, F_OFD_SETLKW, F_WRLCK, CALL_AT);
	if (err) {
		close(change->lock);
		/* not of the device, for which the same errno may stand for something else */
		return set_error(err, "cannot lock the pad: %s", strerror(-err));
	}
	change->state = load_state(pad);
	change->len = kvscratch_state_len(change->state);
	return 0;
}

static void unlock_pad(struct change *change)
{
	/* said, for a child that was forked meanwhile has the file as well */
	file_lock(change->lock, F_OFD_SETLK, F_UNLCK, CALL_AT);
	close(change->lock);
}

/* Begin to do @what; end_change() ends what this began. */
static int begin_change(const struct kvscratch *pad, struct change *change, const char *what,
			bool only_writer)
{
	int err = lock_pad(pad, change);

	if (err)
		return err;
	err = check_role(pad, change->lock, only_writer);
	if (err)
		err = cannot(what, err);
	else if (change->len > pad->info.max_seq_len)
		err = fail_overwritten();
	else
		err = check_cursors(pad);
	if (err) {
		unlock_pad(change);
		return err;
	}
	hold_size_signal(&change->held);
	return 0;
}

static void end_change(struct change *change, int err)
{
	drop_size_signal(&change->held, err);
	unlock_pad(change);
}

/* Cursors are never below len: whoever commits need not touch them. */
static uint32_t at_least(uint32_t cursor, uint32_t len)
{
	return cursor > len ? cursor : len;
}

/* Stored before what they tell of is done, for somebody else goes on if it dies then */
static void set_cursor(__u32 *cursor, uint32_t value)
{
	__atomic_store_n(cursor, value, __ATOMIC_RELEASE);
}

static void drop_staged(const struct kvscratch *pad, uint32_t len)
{
	for (uint32_t i = 0; i < pad->nr_planes; i++)
		set_cursor(&pad->memfd.planes[i].staged, len);
}

static void touch(struct memfd_plane *plane, uint32_t end)
{
	if (plane->touched < end)
		set_cursor(&plane->touched, end);
}

static void count_saturated(const struct kvscratch *pad, uint64_t saturated)
{
	struct memfd_page *page = pad->memfd.page;

	if (saturated)
		__atomic_store_n(&page->saturated, page->saturated + saturated, __ATOMIC_RELAXED);
}

/* Appending */

/* Whatever becomes of it: rows from len on are neither staged nor whole now. */
static void begin_rows(const struct kvscratch *pad, uint32_t len, uint32_t end)
{
	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		struct memfd_plane *plane = &pad->memfd.planes[i];

		set_cursor(&plane->staged, len);
		if (plane->whole > len)
			set_cursor(&plane->whole, len);
		touch(plane, end);
	}
}

static int store_tokens(const struct kvscratch *pad, const char *tokens, uint32_t len,
			uint64_t count, uint64_t *saturated)
{
	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		const struct kvscratch_plane *plane = &pad->planes[i];
		int err = store_rows(pad->fd, plane, len, tokens, pad->info.input_row_bytes, count,
				     saturated);

		if (err)
			return err;
		tokens += plane->input_row_bytes;
	}
	return 0;
}

static int append_locked(const struct kvscratch *pad, const struct change *change,
			 const void *tokens, uint64_t count)
{
	const uint64_t most = pad->info.max_seq_len;
	uint64_t saturated = 0;
	int err;

	if (count > most - change->len)
		return fail_room(change->len, count, most);
	begin_rows(pad, change->len, change->len + count);
	err = store_tokens(pad, tokens, change->len, count, &saturated);
	if (err)
		return cannot("append", err);
	count_saturated(pad, saturated);
	publish(pad, change->state + count);
	return 0;
}

static int memfd_append(struct kvscratch *pad, const void *tokens, uint64_t nr_tokens)
{
	struct change change;
	int err = begin_change(pad, &change, "append", false);

	if (err)
		return err;
	err = append_locked(pad, &change, tokens, nr_tokens);
	end_change(&change, err);
	return err;
}

/* Truncating and sealing */

/* What is left of it when this dies stays recorded: the next one finishes it. */
static int scrub(const struct kvscratch *pad, uint32_t len)
{
	__u32 *owed = &pad->memfd.page->scrub_owed;

	set_cursor(owed, 1);
	for (uint32_t i = 0; i < pad->nr_planes; i++)
		if (pad->memfd.planes[i].whole > len)
			set_cursor(&pad->memfd.planes[i].whole, len);
	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		struct memfd_plane *plane = &pad->memfd.planes[i];
		int err;

		if (plane->touched <= len)
			continue;
		err = zero_rows(pad->fd, &pad->planes[i], len, plane->touched);
		if (err)
			return cannot("overwrite with zeros", err);
		set_cursor(&plane->touched, len);
	}
	set_cursor(owed, 0);
	return 0;
}

static int truncate_locked(const struct kvscratch *pad, const struct change *change,
			   const struct kvscratch_truncate *truncate)
{
	const uint64_t before = full_generation(pad, change->state), generation = before + 1;
	const uint64_t now = generation << 32 | truncate->len;
	struct kvscratch_status *status = pad->memfd.status;

	if (truncate->flags & KVSCRATCH_TRUNCATE_EXPECT &&
	    (truncate->expected_generation != before || truncate->expected_len != change->len))
		return fail_expectation(truncate, before, change->len);
	if (truncate->len > change->len)
		return fail_truncate(change->len, truncate->len);
	/* whoever dies behind publish() has dropped rows that are still to be overwritten */
	if (truncate->flags & KVSCRATCH_TRUNCATE_ZERO)
		set_cursor(&pad->memfd.page->scrub_owed, 1);
	__atomic_store_n(&pad->memfd.page->generation_high, generation >> 32, __ATOMIC_RELEASE);
	__atomic_store_n(&status->generation, generation, __ATOMIC_RELAXED);
	store_word(&status->trunc, now);
	drop_staged(pad, truncate->len);
	/* which their len told so far */
	for (uint32_t i = 0; i < pad->nr_planes; i++)
		set_cursor(&pad->memfd.planes[i].whole,
			   at_least(pad->memfd.planes[i].whole, change->len));
	publish(pad, now);
	return truncate->flags & KVSCRATCH_TRUNCATE_ZERO ? scrub(pad, truncate->len) : 0;
}

static int memfd_truncate(struct kvscratch *pad, const struct kvscratch_truncate *truncate)
{
	struct change change;
	int err = begin_change(pad, &change, "truncate", false);

	if (err)
		return err;
	err = truncate_locked(pad, &change, truncate);
	end_change(&change, err);
	return err;
}

static int seal_locked(const struct kvscratch *pad, uint32_t len)
{
	union kvscratch_word *word = &pad->memfd.status->writer;
	int err;

	drop_staged(pad, len);
	err = pad->memfd.page->scrub_owed ? scrub(pad, len) : 0;
	if (err)
		return err;
	/* release: who sees it sees the last state */
	store_word(word, load_word(word) | KVSCRATCH_PAD_SEALED);
	wake_waiters(pad);
	return 0;
}

static int memfd_seal(struct kvscratch *pad)
{
	struct change change;
	int err = begin_change(pad, &change, "seal the pad", false);

	if (err)
		return err == -EROFS ? 0 : err;
	err = seal_locked(pad, change.len);
	end_change(&change, err);
	return err;
}

/* The writer */

/* The lock tells of the role for as long as anybody has the open file. */
static int take_role(const struct kvscratch *pad, uint32_t len, struct memfd_role *role)
{
	const uint32_t epoch = epoch_of(load_word(&pad->memfd.status->writer)) + 1;
	int err = file_lock(role->fd, F_OFD_SETLK, F_WRLCK, ROLE_AT + (off_t)epoch);

	/* some reader has, for no good reason */
	if (err)
		return cannot("become the writer", err == -EACCES || err == -EAGAIN ? -EBUSY : err);
	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		set_cursor(&pad->memfd.planes[i].staged, len);
		set_cursor(&pad->memfd.planes[i].whole, len);
	}
	store_word(&pad->memfd.status->writer, (uint64_t)epoch << 32 | KVSCRATCH_PAD_WRITER);
	role->epoch = epoch;
	return 0;
}

static int check_new_role(const struct kvscratch *pad, const struct change *change, uint32_t flags)
{
	const uint64_t writer = load_word(&pad->memfd.status->writer);

	if (writer & KVSCRATCH_PAD_SEALED)
		return cannot("become the writer", -EROFS);
	if (!(flags & KVSCRATCH_OPEN_TAKEOVER) && writer & KVSCRATCH_PAD_WRITER &&
	    role_is_held(change->lock, epoch_of(writer)))
		return cannot("become the writer", -EBUSY);
	return change->len > pad->info.max_seq_len ? fail_overwritten() : 0;
}

static int open_role(const struct kvscratch *pad, const struct change *change, uint32_t flags,
		     struct memfd_role *role)
{
	int err = check_new_role(pad, change, flags);

	if (!err)
		err = memfd_reopen(&role->fd, pad->fd, O_RDWR);
	if (err)
		return err;
	err = take_role(pad, change->len, role);
	if (err) {
		close(role->fd);
		role->fd = -1;
	}
	return err;
}

static int memfd_open_writer(const struct kvscratch *pad, uint32_t flags, int *fd,
			     struct memfd_role *role)
{
	struct change change;
	int err = memfd_reopen(fd, pad->fd, O_RDWR);

	if (err)
		return err;
	err = lock_pad(pad, &change);
	if (!err) {
		err = open_role(pad, &change, flags, role);
		unlock_pad(&change);
	}
	if (err)
		close(*fd);
	return err;
}

/* Without the lock, which somebody may have for long: the flag of no other epoch is touched. */
static void end_role(const struct kvscratch *pad)
{
	__u64 *word = &pad->memfd.status->writer.word;
	__u64 writer = load_word(&pad->memfd.status->writer);

	close(pad->role.fd);
	/* a child may have the open file as well */
	if (role_is_held(pad->fd, pad->role.epoch))
		return;
	while (epoch_of(writer) == pad->role.epoch &&
	       !__atomic_compare_exchange_n(word, &writer, writer & ~(__u64)KVSCRATCH_PAD_WRITER,
					    false, __ATOMIC_RELEASE, __ATOMIC_RELAXED))
		;
}

static void memfd_release(struct kvscratch *pad)
{
	if (pad->is_writer)
		end_role(pad);
	munmap(pad->memfd.status, pad->memfd.bytes);
}

/* A failure leaves the plane staged, and known to be whole, up to where it began. */
static int stage_copy(const struct kvscratch *pad, const struct kvscratch_stage *stage,
		      uint32_t row, uint32_t end)
{
	const struct kvscratch_plane *geometry = &pad->planes[stage->plane];
	struct memfd_plane *plane = &pad->memfd.planes[stage->plane];
	const uint32_t staged = at_least(plane->staged, end), whole = at_least(plane->whole, end);
	uint64_t saturated = 0;
	int err;

	set_cursor(&plane->staged, row);
	set_cursor(&plane->whole, row);
	touch(plane, end);
	err = store_rows(pad->fd, geometry, row, (const char *)(uintptr_t)stage->addr,
			 geometry->input_row_bytes, end - row, &saturated);
	if (err)
		return cannot("stage rows", err);
	set_cursor(&plane->staged, staged);
	set_cursor(&plane->whole, whole);
	count_saturated(pad, saturated);
	return 0;
}

static int stage_locked(const struct kvscratch *pad, const struct kvscratch_stage *stage,
			uint32_t len)
{
	struct memfd_plane *plane = &pad->memfd.planes[stage->plane];
	const uint32_t staged = at_least(plane->staged, len);
	const uint64_t row = stage->row, rows = stage->rows;

	if (row < len || row > staged)
		return fail_stage(stage, &pad->planes[stage->plane], len);
	if (stage->flags & KVSCRATCH_STAGE_KEEP) {
		/* what is staged is whole */
		if (rows > at_least(plane->whole, staged) - row)
			return fail_stage(stage, &pad->planes[stage->plane], len);
		set_cursor(&plane->staged, at_least(staged, row + rows));
		return 0;
	}
	if (rows > pad->info.max_seq_len - row)
		return fail_room(row, rows, pad->info.max_seq_len);
	return stage_copy(pad, stage, row, row + rows);
}

static int memfd_stage(struct kvscratch *pad, const struct kvscratch_stage *stage)
{
	const bool keep = stage->flags & KVSCRATCH_STAGE_KEEP;
	struct change change;
	int err = begin_change(pad, &change, keep ? "keep rows" : "stage rows", true);

	if (err)
		return err;
	err = stage_locked(pad, stage, change.len);
	end_change(&change, err);
	return err;
}

static bool all_staged(const struct kvscratch *pad, uint64_t wanted, uint32_t len)
{
	for (uint32_t i = 0; i < pad->nr_planes; i++)
		if (wanted > at_least(pad->memfd.planes[i].staged, len))
			return false;
	return true;
}

static int memfd_commit(struct kvscratch *pad, uint64_t len)
{
	struct change change;
	int err = begin_change(pad, &change, "commit", true);

	if (err)
		return err;
	if (len < change.len || !all_staged(pad, len, change.len)) {
		err = fail_commit(change.len, len);
	} else {
		drop_staged(pad, len);
		if (len != change.len)
			publish(pad, change.state - change.len + len);
	}
	end_change(&change, err);
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

	return syscall(FUTEX_TIME64, &pad->memfd.page->changes, FUTEX_WAIT_BITSET, changes, end, NULL,
		       FUTEX_BITSET_MATCH_ANY) ? -errno : 0;
}

static int memfd_wait(struct kvscratch *pad, uint64_t state, int timeout_ms)
{
	const int64_t end = now_ns() + timeout_ms * INT64_C(1000000);

	for (;;) {
		__u32 changes = __atomic_load_n(&pad->memfd.page->changes, __ATOMIC_ACQUIRE);
		int64_t next = now_ns() + LOOK_EVERY_MS * INT64_C(1000000);
		bool last = timeout_ms >= 0 && end <= next;
		int err = wait_is_over(pad->view, state);

		if (err)
			return err < 0 ? err : 0;
		err = sleep_until(pad, changes, last ? end : next);
		if (err == -ETIMEDOUT && last)
			return set_error(err, "nothing was appended or dropped in time");
		if (err && err != -EAGAIN && err != -ETIMEDOUT)
			return cannot("wait", err);
	}
}

static int memfd_seen(struct kvscratch *pad, uint64_t state)
{
	(void)pad;
	(void)state;
	return set_error(-EOPNOTSUPP, "a memfd is always ready for poll(): kvscratch_wait() waits");
}

const struct backend memfd_backend = {
	.id = KVSCRATCH_BACKEND_MEMFD,
	.create = memfd_create_pad,
	.fork = memfd_fork,
	.reopen = memfd_reopen,
	.adopt = memfd_adopt,
	.release = memfd_release,
	.info = memfd_info,
	.append = memfd_append,
	.truncate = memfd_truncate,
	.wait = memfd_wait,
	.open_writer = memfd_open_writer,
	.stage = memfd_stage,
	.commit = memfd_commit,
	.seal = memfd_seal,
	.seen = memfd_seen,
};
