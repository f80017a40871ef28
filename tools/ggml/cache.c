// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#include "cache.h"
#include "ggml.h"
#include "ticket.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libkvscratch.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_BYTES ((size_t)2 << 20)

enum where {
	NOWHERE,	/* zeros, in private memory, until somebody stores a row */
	IN_PAD,
	IN_MEMORY,	/* private */
	LOST,		/* in memory, and not what the engine believes it is */
};

/**
 * struct stream - the rows of one sequence, or of several that share them
 * @where: they are
 * @pad: of IN_PAD, open for reading and writing
 * @writer: its writer's handle
 * @generation: of the pad when its rows were last known to be ours
 * @len: committed rows
 * @whole: rows of all planes that were stored since the pad was made; those behind @len,
 *	which a truncate left, are still where they were
 * @staged: per plane, the end of what is staged
 * @position: of the last row that was committed, or -1
 * @fork_of: the stream of the same cache that it is a fork of, and nothing was stored in
 *	either since; or -1
 * @ticket: that it was restored from, and nothing was stored since; or all 0
 * @number: in the names of what is held
 * @is_held: the pad of that name is ours
 * @commits: of the pad, until it is held
 */
struct stream {
	enum where where;
	struct kvscratch *pad, *writer;
	uint64_t generation;
	uint64_t len, whole;
	uint64_t *staged;
	int32_t position;
	int fork_of;
	struct ticket ticket;
	unsigned int number;
	bool is_held;
	unsigned int commits;
};

/*
 * An engine tries itself out by a token or two before it has work: what it left when it
 * ended the last time is not to be replaced by that.
 */
#define HELD_AT_COMMIT 2

/**
 * struct cache - a buffer
 * @base: its memory; planes begin at pages
 * @planes: in the order in which the engine made them; all have @rows rows in each of
 *	@nr_streams streams
 * @streams: an array, made with the first plane
 * @is_private: it is, for ever
 * @has_plane: per plane, whether it has the rows of the pass; a pass is what is committed
 *	at once
 * @nr_missing: how many have not
 * @pass_rows: where its rows go
 * @pass_cells: what is known of them
 * @nr_pass_rows: how many
 */
struct cache {
	struct cache *next;
	char *base;
	size_t bytes;
	uint64_t fingerprint;
	struct cache_plane *planes;
	unsigned int nr_planes;
	uint64_t rows;
	struct stream *streams;
	unsigned int nr_streams;
	bool is_private;
	bool *has_plane;
	unsigned int nr_missing;
	int64_t *pass_rows;
	struct cache_cell *pass_cells;
	uint64_t nr_pass_rows, pass_size;
};

static struct cache *caches;
static unsigned int nr_numbers;

static struct {
	uint64_t commits, rows, stages, bytes, keeps, truncates, forks, moves;
} stats;

static void warn(const char *text, ...) __attribute__((format(printf, 1, 2)));
static void warn(const char *text, ...)
{
	char line[512];
	va_list args;

	va_start(args, text);
	vsnprintf(line, sizeof(line), text, args);
	va_end(args);
	/* one write: the engine's other threads print as well */
	fprintf(stderr, "kvscratch-ggml: %s\n", line);
}

static size_t page_bytes(void)
{
	return sysconf(_SC_PAGESIZE);
}

static void *zeros(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

/* Where large views have to begin: at the same place of a huge page as their planes */
static void *aligned_zeros(size_t bytes)
{
	char *memory = zeros(bytes + HUGE_BYTES), *base;

	if (!memory)
		return NULL;
	base = (char *)(((uintptr_t)memory + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1));
	if (base > memory)
		munmap(memory, base - memory);
	munmap(base + bytes, memory + HUGE_BYTES - base);
	return base;
}

struct cache *cache_new(size_t bytes)
{
	struct cache *cache = calloc(1, sizeof(*cache));

	if (!cache)
		return NULL;
	cache->bytes = (bytes ? bytes + page_bytes() - 1 : 1) / page_bytes() * page_bytes();
	if (!bytes)
		cache->bytes = page_bytes();
	cache->base = aligned_zeros(cache->bytes);
	if (!cache->base) {
		free(cache);
		return NULL;
	}
	cache->next = caches;
	caches = cache;
	return cache;
}

void *cache_base(const struct cache *cache)
{
	return cache->base;
}

const struct cache_plane *cache_plane(const struct cache *cache, unsigned int plane)
{
	return &cache->planes[plane];
}

bool cache_is_private(const struct cache *cache)
{
	return cache->is_private;
}

bool cache_has_fingerprint(const struct cache *cache)
{
	return cache->fingerprint;
}

void cache_set_fingerprint(struct cache *cache, uint64_t fingerprint)
{
	cache->fingerprint = fingerprint;
}

static size_t stream_bytes(const struct cache *cache, const struct cache_plane *plane)
{
	return cache->rows * plane->row_bytes;
}

static char *row_address(const struct cache *cache, unsigned int plane, unsigned int stream,
			 uint64_t row)
{
	const struct cache_plane *its = &cache->planes[plane];

	return cache->base + its->offset + stream * stream_bytes(cache, its) + row * its->row_bytes;
}

struct cache *cache_of(const void *address, unsigned int *plane)
{
	struct cache *cache;
	unsigned int i;

	for (cache = caches; cache; cache = cache->next) {
		const size_t at = (const char *)address - cache->base;

		if ((const char *)address < cache->base || at >= cache->bytes)
			continue;
		for (i = 0; i < cache->nr_planes; i++) {
			const struct cache_plane *its = &cache->planes[i];

			if (at >= its->offset &&
			    at - its->offset < cache->nr_streams * stream_bytes(cache, its)) {
				*plane = i;
				return cache;
			}
		}
	}
	return NULL;
}

static void close_pad(struct stream *stream)
{
	kvscratch_close(stream->writer);
	kvscratch_close(stream->pad);
	stream->writer = NULL;
	stream->pad = NULL;
	stream->fork_of = -1;
	memset(&stream->ticket, 0, sizeof(stream->ticket));
}

/* Put a private copy of what lies there in its place. */
static bool copy_to_memory(char *address, size_t bytes)
{
	const size_t length = (bytes + page_bytes() - 1) / page_bytes() * page_bytes();
	char *copy = zeros(length);

	if (!copy)
		return false;
	memcpy(copy, address, bytes);
	if (mremap(copy, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, address) != MAP_FAILED)
		return true;
	munmap(copy, length);
	return false;
}

static bool copy_stream_to_memory(struct cache *cache, unsigned int index)
{
	bool copied = true;

	for (unsigned int plane = 0; plane < cache->nr_planes; plane++)
		copied &= copy_to_memory(row_address(cache, plane, index, 0),
					 stream_bytes(cache, &cache->planes[plane]));
	return copied;
}

/* From now on the rows are in private memory. */
static void move_to_memory(struct cache *cache, unsigned int index)
{
	struct stream *stream = &cache->streams[index];
	bool copied = true;

	if (stream->where == IN_PAD) {
		copied = copy_stream_to_memory(cache, index);
		stats.moves++;
		/* a view that stays needs no handle, and nobody may write to it */
		close_pad(stream);
	}
	stream->where = copied ? IN_MEMORY : LOST;
}

void cache_make_private(struct cache *cache, const char *why, ...)
{
	char text[256];
	va_list args;

	if (cache->is_private)
		return;
	va_start(args, why);
	vsnprintf(text, sizeof(text), why, args);
	va_end(args);
	warn("the cache is in private memory from now on: %s", text);
	cache->is_private = true;
	for (unsigned int i = 0; i < cache->nr_streams; i++)
		if (cache->streams[i].where != LOST)
			move_to_memory(cache, i);
}

void cache_add_plane(struct cache *cache, const struct cache_plane *plane, uint64_t rows,
		     uint64_t streams)
{
	const unsigned int nr = cache->nr_planes;
	struct cache_plane *planes = realloc(cache->planes, (nr + 1) * sizeof(*planes));
	bool *has_plane = realloc(cache->has_plane, nr + 1);

	cache->planes = planes ? planes : cache->planes;
	cache->has_plane = has_plane ? has_plane : cache->has_plane;
	if (!cache->streams) {
		cache->streams = calloc(streams, sizeof(*cache->streams));
		cache->rows = rows;
		cache->nr_streams = cache->streams ? streams : 0;
		for (unsigned int i = 0; i < cache->nr_streams; i++) {
			cache->streams[i].number = nr_numbers++;
			cache->streams[i].fork_of = -1;
		}
	}
	if (!planes || !has_plane || !cache->streams) {
		cache_make_private(cache, "out of memory");
		return;
	}
	planes[nr] = *plane;
	has_plane[nr] = false;
	cache->nr_planes = nr + 1;
	cache->nr_missing = nr + 1;
	if (rows != cache->rows || streams != cache->nr_streams)
		cache_make_private(cache, "expected planes of one size, got %s with %" PRIu64
				   " rows in %" PRIu64 " streams beside %" PRIu64 " in %u",
				   plane->label, rows, streams, cache->rows, cache->nr_streams);
	else if (streams > 1 && stream_bytes(cache, plane) % page_bytes())
		cache_make_private(cache, "%s: expected streams that begin at a page, got %" PRIu64
				   " rows of %zu bytes", plane->label, rows, plane->row_bytes);
	else if (nr + 1 == KVSCRATCH_MAX_PLANES)
		cache_make_private(cache, "expected at most %u planes", KVSCRATCH_MAX_PLANES - 1);
}

void cache_clear(struct cache *cache)
{
	for (unsigned int i = 0; i < cache->nr_streams; i++) {
		close_pad(&cache->streams[i]);
		cache->streams[i].where = cache->is_private ? IN_MEMORY : NOWHERE;
	}
	/* what was mapped there goes; without memory for a mapping it is zeroed by hand */
	if (mmap(cache->base, cache->bytes, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED)
		return;
	cache_make_private(cache, "cannot map %zu bytes: %s", cache->bytes, strerror(errno));
	for (unsigned int i = 0; i < cache->nr_streams; i++)
		cache->streams[i].where = LOST;
}

void cache_free(struct cache *cache)
{
	struct cache **link;

	for (link = &caches; *link != cache; link = &(*link)->next)
		;
	*link = cache->next;
	for (unsigned int i = 0; i < cache->nr_streams; i++) {
		close_pad(&cache->streams[i]);
		free(cache->streams[i].staged);
	}
	munmap(cache->base, cache->bytes);
	free(cache->streams);
	free(cache->planes);
	free(cache->has_plane);
	free(cache->pass_rows);
	free(cache->pass_cells);
	free(cache);
}

/*
 * Pads of streams
 */

static uint32_t dtype_of(int type)
{
	switch (type) {
	case GGML_F32:
		return KVSCRATCH_DTYPE_F32;
	case GGML_F16:
		return KVSCRATCH_DTYPE_F16;
	case GGML_BF16:
		return KVSCRATCH_DTYPE_BF16;
	default:
		return KVSCRATCH_DTYPE_U8;
	}
}

/* The planes of a pad: those of the cache, and the cells; to be freed */
static struct kvscratch_plane *pad_planes(const struct cache *cache)
{
	struct kvscratch_plane *planes = calloc(cache->nr_planes + 1, sizeof(*planes));

	for (unsigned int i = 0; planes && i < cache->nr_planes; i++) {
		const struct cache_plane *its = &cache->planes[i];

		planes[i].dtype = dtype_of(its->type);
		planes[i].dim = its->elements;
		if (planes[i].dtype == KVSCRATCH_DTYPE_U8)
			planes[i].dim = its->row_bytes;
		strncpy(planes[i].label, its->label, sizeof(planes[i].label));
	}
	if (planes) {
		planes[cache->nr_planes].dtype = KVSCRATCH_DTYPE_I32;
		planes[cache->nr_planes].dim = 2;
		strcpy(planes[cache->nr_planes].label, "cells");
	}
	return planes;
}

static const char *type_of(const struct cache *cache, char kind)
{
	for (unsigned int i = 0; i < cache->nr_planes; i++)
		if (cache->planes[i].label[0] == kind)
			return type_name(cache->planes[i].type);
	return "-";
}

static void make_tag(const struct cache *cache, char tag[KVSCRATCH_TAG_BYTES])
{
	const char *user = getenv("KVSCRATCH_GGML_TAG");
	char text[KVSCRATCH_TAG_BYTES + 1];

	snprintf(text, sizeof(text), "ggml k=%s v=%s %016" PRIx64 "%s%s", type_of(cache, 'k'),
		 type_of(cache, 'v'), cache->fingerprint, user && *user ? " " : "",
		 user ? user : "");
	memset(tag, 0, KVSCRATCH_TAG_BYTES);
	memcpy(tag, text, strlen(text));
}

static int new_pad(struct kvscratch **pad, const struct cache *cache)
{
	struct kvscratch_plane *planes = pad_planes(cache);
	char tag[KVSCRATCH_TAG_BYTES];
	int err;

	if (!planes)
		return -ENOMEM;
	make_tag(cache, tag);
	err = kvscratch_new_planes(pad, cache->rows, planes, cache->nr_planes + 1, tag,
				   sizeof(tag));
	free(planes);
	return err;
}

/* The end of the name of what another process left */
#define OLD ".old"

/* What another process left under our name is kept beside it: it may want to be restored. */
static int replace_held(struct stream *stream, const char *holder, const char *name)
{
	char path[KVSCRATCH_MAX_NAME * 2 + 2], old_name[32];
	const char *names[2] = { name, old_name };
	int fds[2] = { kvscratch_fd(stream->pad), -1 };
	struct kvscratch *old = NULL;
	int err;

	snprintf(path, sizeof(path), "%s/%s", holder, name);
	snprintf(old_name, sizeof(old_name), "seq%u" OLD, stream->number);
	if (!stream->is_held && !kvscratch_attach_name(&old, path, O_RDWR))
		fds[1] = kvscratch_fd(old);
	err = kvscratch_holder_replace(holder, names, fds, fds[1] < 0 ? 1 : 2);
	kvscratch_close(old);
	return err;
}

static void hold_pad(struct stream *stream)
{
	const char *holder = getenv("KVSCRATCH_GGML_HOLDER");
	char name[16];

	if (!holder || !*holder)
		return;
	snprintf(name, sizeof(name), "seq%u", stream->number);
	if (replace_held(stream, holder, name)) {
		warn("%s/%s is not held: %s", holder, name, kvscratch_error());
		return;
	}
	stream->is_held = true;
}

/*
 * The rows of a stream are those of @pad from now on, of which @len are committed; takes
 * @pad over. On failure they are in private memory, as they are in @pad.
 */
static bool adopt_pad(struct cache *cache, unsigned int index, struct kvscratch *pad, uint64_t len)
{
	struct stream *stream = &cache->streams[index];
	struct kvscratch *writer = NULL;
	struct kvscratch_pad_info info;
	int err = kvscratch_pad_info(pad, &info);

	if (!err)
		err = kvscratch_writer(&writer, pad);
	if (!stream->staged)
		stream->staged = calloc(cache->nr_planes + 1, sizeof(*stream->staged));
	if (!stream->staged)
		err = -ENOMEM;
	for (unsigned int plane = 0; !err && plane < cache->nr_planes; plane++)
		err = kvscratch_map_plane(pad, plane, row_address(cache, plane, index, 0));
	close_pad(stream);
	stream->pad = pad;
	stream->writer = writer;
	stream->where = IN_PAD;
	stream->generation = info.generation;
	stream->len = len;
	stream->whole = len;
	stream->position = -1;
	if (!err) {
		for (unsigned int plane = 0; plane <= cache->nr_planes; plane++)
			stream->staged[plane] = len;
		/* of a fork somebody wants the rows, or had them before */
		stream->commits = len || stream->is_held ? HELD_AT_COMMIT : 0;
		if (stream->commits)
			hold_pad(stream);
		return true;
	}
	warn("stream %u is in private memory: %s", stream->number, kvscratch_error());
	move_to_memory(cache, index);
	return false;
}

/* A pad for a stream that has no rows yet */
static void begin_pad(struct cache *cache, unsigned int index)
{
	struct kvscratch *pad;

	if (new_pad(&pad, cache))
		cache_make_private(cache, "%s", kvscratch_error());
	else
		adopt_pad(cache, index, pad, 0);
}

/* After an error: the pad is for others. The rows that were ours go on in memory. */
static void leave_pad(struct cache *cache, unsigned int index, const char *what)
{
	struct stream *stream = &cache->streams[index];
	const uint64_t generation = stream->generation;
	struct kvscratch_pad_info info;
	struct kvscratch *pad = stream->pad;
	char why[256];

	snprintf(why, sizeof(why), "%s", kvscratch_error());
	/* closed after a look at what was copied */
	stream->pad = NULL;
	move_to_memory(cache, index);
	if (kvscratch_pad_info(pad, &info) || info.generation != generation)
		stream->where = LOST;
	kvscratch_close(pad);
	warn("%s: %s: stream %u %s", what, why, stream->number,
	     stream->where == LOST ? "has to begin anew" : "goes on in private memory");
}

/* A call that a signal may interrupt */
#define RETRY(call) ({ int err_; do { err_ = (call); } while (err_ == -EINTR); err_; })

/* Stage rows as they lie there, or copy them from there: those that a fork has are not its own. */
static int stage_present(struct cache *cache, unsigned int index, unsigned int plane, uint64_t end)
{
	struct stream *stream = &cache->streams[index];
	const uint64_t row = stream->staged[plane], nr = end - row;
	struct cache_cell *cells;
	int err = RETRY(kvscratch_keep(stream->writer, plane, row, nr));

	stats.keeps++;
	if (err == -EINVAL && plane < cache->nr_planes) {
		err = RETRY(kvscratch_stage(stream->writer, plane, row,
					    row_address(cache, plane, index, row), nr));
	} else if (err == -EINVAL) {
		cells = malloc(nr * sizeof(*cells));
		if (!cells)
			return -ENOMEM;
		memset(cells, 0xff, nr * sizeof(*cells));
		err = RETRY(kvscratch_stage(stream->writer, plane, row, cells, nr));
		free(cells);
	}
	if (!err)
		stream->staged[plane] = end;
	return err;
}

/* Rows of one plane, or of the cells, in one stream */
static int stage_rows(struct cache *cache, unsigned int index, unsigned int plane, uint64_t row,
		      const void *data, uint64_t nr)
{
	struct stream *stream = &cache->streams[index];
	int err = 0;

	if (row > stream->staged[plane])
		err = stage_present(cache, index, plane, row);
	if (!err)
		err = RETRY(kvscratch_stage(stream->writer, plane, row, data, nr));
	if (err)
		return err;
	if (stream->staged[plane] < row + nr)
		stream->staged[plane] = row + nr;
	stats.stages++;
	stats.bytes += nr * (plane < cache->nr_planes ? cache->planes[plane].row_bytes :
							sizeof(struct cache_cell));
	return 0;
}

static int rebase(struct cache *cache, unsigned int index, uint64_t len);

/* Drop committed rows; those behind stay where they are, which an engine may count on. */
static int drop_rows(struct cache *cache, unsigned int index, uint64_t len)
{
	struct stream *stream = &cache->streams[index];
	struct kvscratch_pad_info info;
	int err = RETRY(kvscratch_truncate(stream->writer, len, 0));

	stats.truncates++;
	if (err == -ETXTBSY)
		return rebase(cache, index, len);
	if (!err)
		err = kvscratch_pad_info(stream->pad, &info);
	if (err)
		return err;
	stream->generation = info.generation;
	stream->len = len;
	return 0;
}

/* Rows that others share with us are not to be dropped: go on in a fork of those that stay. */
static int rebase(struct cache *cache, unsigned int index, uint64_t len)
{
	struct stream *stream = &cache->streams[index];
	const uint64_t whole = stream->whole;
	struct kvscratch *child, *writer;
	int err = kvscratch_fork(&child, stream->pad, len, cache->rows);

	if (err)
		return err;
	stats.forks++;
	err = kvscratch_writer(&writer, child);
	for (unsigned int plane = 0; !err && plane < cache->nr_planes && whole > len; plane++)
		err = RETRY(kvscratch_stage(writer, plane, len,
					    row_address(cache, plane, index, len), whole - len));
	if (!err) {
		err = kvscratch_commit(writer, len);
		kvscratch_close(writer);
	}
	if (err) {
		kvscratch_close(child);
		return err;
	}
	if (!adopt_pad(cache, index, child, len))
		return -EIO;
	/* a new role keeps nothing: rows behind are stored again when they are asked for */
	stream->whole = whole;
	return 0;
}

/* The engine stores rows from @row on, at @position; false: it must not. */
static bool begin_stream(struct cache *cache, unsigned int index, uint64_t row, int32_t position)
{
	struct stream *stream = &cache->streams[index];

	if (stream->where == LOST) {
		/* there may have been no memory for it, so that a view is still in its place */
		if (row || !copy_stream_to_memory(cache, index))
			return false;
		stream->where = IN_MEMORY;
	}
	if (stream->where == NOWHERE)
		begin_pad(cache, index);
	if (stream->where == IN_PAD && row < stream->len && stream->position >= 0 &&
	    position > stream->position)
		cache_make_private(cache, "rows are a ring, of which the oldest are overwritten");
	stream->fork_of = -1;
	for (unsigned int i = 0; i < cache->nr_streams; i++)
		if (cache->streams[i].fork_of == (int)index)
			cache->streams[i].fork_of = -1;
	memset(&stream->ticket, 0, sizeof(stream->ticket));
	if (stream->where == IN_PAD && row < stream->len && drop_rows(cache, index, row)) {
		if (stream->where == IN_PAD)
			leave_pad(cache, index, "cannot drop rows");
		return stream->where != LOST;
	}
	for (unsigned int plane = 0; stream->where == IN_PAD && plane <= cache->nr_planes; plane++)
		stream->staged[plane] = stream->len;
	return true;
}

/* A run of rows of a pass: those from @first on that lie one behind the other in one stream */
static uint64_t run_of(const struct cache *cache, const int64_t *rows, uint64_t nr, uint64_t first,
		       unsigned int *index, uint64_t *row)
{
	uint64_t end = first + 1;

	*index = rows[first] / cache->rows;
	*row = rows[first] % cache->rows;
	while (end < nr && rows[end] == rows[end - 1] + 1 && rows[end] % (int64_t)cache->rows)
		end++;
	return end - first;
}

static bool reserve_pass(struct cache *cache, uint64_t nr)
{
	struct cache_cell *cells;
	int64_t *rows;

	if (nr <= cache->pass_size)
		return true;
	rows = realloc(cache->pass_rows, nr * sizeof(*rows));
	if (!rows)
		return false;
	cache->pass_rows = rows;
	cells = realloc(cache->pass_cells, nr * sizeof(*cells));
	if (!cells)
		return false;
	cache->pass_cells = cells;
	cache->pass_size = nr;
	return true;
}

static bool set_pass(struct cache *cache, const int64_t *rows, const struct cache_cell *cells,
		     uint64_t nr)
{
	if (!reserve_pass(cache, nr))
		return false;
	memcpy(cache->pass_rows, rows, nr * sizeof(*rows));
	if (cells)
		memcpy(cache->pass_cells, cells, nr * sizeof(*cells));
	else
		memset(cache->pass_cells, 0xff, nr * sizeof(*cells));
	cache->nr_pass_rows = nr;
	return true;
}

/* The first plane of a pass: its rows, from the lowest of each stream on, are stored anew. */
static bool begin_pass(struct cache *cache, const int64_t *rows, const struct cache_cell *cells,
		       uint64_t nr)
{
	memset(cache->has_plane, 0, cache->nr_planes);
	cache->nr_missing = cache->nr_planes;
	if (!set_pass(cache, rows, cells, nr))
		return false;
	for (unsigned int index = 0; index < cache->nr_streams; index++) {
		uint64_t lowest = UINT64_MAX, at = 0;

		for (uint64_t i = 0; i < nr; i++) {
			if (rows[i] / cache->rows == index && rows[i] % cache->rows < lowest) {
				lowest = rows[i] % cache->rows;
				at = i;
			}
		}
		if (lowest != UINT64_MAX &&
		    !begin_stream(cache, index, lowest, cache->pass_cells[at].position))
			return false;
	}
	return true;
}

/* All planes have the rows: so have the cells, and they are committed. */
static bool end_pass(struct cache *cache)
{
	const unsigned int plane = cache->nr_planes;
	uint64_t nr;

	for (uint64_t i = 0; i < cache->nr_pass_rows; i += nr) {
		unsigned int index;
		struct stream *stream;
		uint64_t row;

		nr = run_of(cache, cache->pass_rows, cache->nr_pass_rows, i, &index, &row);
		stream = &cache->streams[index];
		if (stream->where == IN_PAD &&
		    stage_rows(cache, index, plane, row, &cache->pass_cells[i], nr)) {
			leave_pad(cache, index, "cannot store a token");
			return false;
		}
		stream->position = cache->pass_cells[i + nr - 1].position;
	}
	for (unsigned int index = 0; index < cache->nr_streams; index++) {
		struct stream *stream = &cache->streams[index];

		if (stream->where != IN_PAD || stream->staged[plane] == stream->len)
			continue;
		if (RETRY(kvscratch_commit(stream->writer, stream->staged[plane]))) {
			leave_pad(cache, index, "cannot commit");
			return false;
		}
		stats.commits++;
		stats.rows += stream->staged[plane] - stream->len;
		stream->len = stream->staged[plane];
		if (stream->whole < stream->len)
			stream->whole = stream->len;
		if (stream->commits < HELD_AT_COMMIT && ++stream->commits == HELD_AT_COMMIT)
			hold_pad(stream);
	}
	return true;
}

/* Also with one that has them: the engine began anew, and what it left is dropped. */
bool cache_begins_pass(const struct cache *cache, unsigned int plane)
{
	return cache->nr_missing == cache->nr_planes || cache->has_plane[plane];
}

bool cache_store(struct cache *cache, unsigned int plane, const int64_t *rows, const void *data,
		 const struct cache_cell *cells, uint64_t nr_rows)
{
	const size_t bytes = cache->planes[plane].row_bytes;
	uint64_t nr;

	for (uint64_t i = 0; i < nr_rows; i++)
		if (rows[i] < 0 || (uint64_t)rows[i] >= cache->rows * cache->nr_streams)
			return false;
	if (cache_begins_pass(cache, plane) && !begin_pass(cache, rows, cells, nr_rows))
		return false;
	for (uint64_t i = 0; i < nr_rows; i += nr) {
		const char *from = (const char *)data + i * bytes;
		unsigned int index;
		uint64_t row;

		nr = run_of(cache, rows, nr_rows, i, &index, &row);
		if (cache->streams[index].where != IN_PAD) {
			memcpy(row_address(cache, plane, index, row), from, nr * bytes);
		} else if (stage_rows(cache, index, plane, row, from, nr)) {
			/* rows of other planes were staged, and are not in memory for sure */
			leave_pad(cache, index, "cannot store rows");
			return false;
		}
	}
	cache->has_plane[plane] = true;
	if (--cache->nr_missing)
		return true;
	cache->nr_missing = cache->nr_planes;
	return end_pass(cache);
}

/*
 * What the engine copies
 */

static void lose_stream(struct cache *cache, unsigned int index, const char *why)
{
	warn("stream %u has to begin anew: %s", cache->streams[index].number, why);
	move_to_memory(cache, index);
	cache->streams[index].where = LOST;
}

/* Begin a stream with the first rows of another pad. */
static bool fork_into(struct cache *cache, unsigned int index, struct kvscratch *from,
		      uint64_t rows)
{
	struct kvscratch *child;
	int err = RETRY(kvscratch_fork(&child, from, rows, cache->rows));

	if (err) {
		lose_stream(cache, index, kvscratch_error());
		return false;
	}
	stats.forks++;
	if (adopt_pad(cache, index, child, rows))
		return true;
	/* planes that could not be mapped have other rows */
	cache->streams[index].where = LOST;
	return false;
}

/* A stream of this cache is copied whole, plane by plane: the first one is the fork. */
static void copy_stream(struct cache *cache, unsigned int plane, unsigned int to, unsigned int from)
{
	struct stream *source = &cache->streams[from], *stream = &cache->streams[to];

	if (stream->where == IN_PAD && stream->fork_of == (int)from)
		return;
	if (source->where == IN_PAD && fork_into(cache, to, source->pad, source->len)) {
		stream->fork_of = from;
		stream->position = source->position;
		return;
	}
	if (source->where != IN_PAD && stream->where != IN_MEMORY)
		move_to_memory(cache, to);
	if (source->where == LOST)
		stream->where = LOST;
	if (source->where != IN_PAD)
		memcpy(row_address(cache, plane, to, 0), row_address(cache, plane, from, 0),
		       stream_bytes(cache, &cache->planes[plane]));
}

/* A sentence with two tags and a name */
#define WHY_BYTES 320

/* Whether a pad has the planes and the tag of this cache, and the tokens of a ticket */
static bool is_of_ticket(const struct cache *cache, struct kvscratch *pad, const char *name,
			 const struct ticket *ticket, uint64_t rows, char why[WHY_BYTES])
{
	struct kvscratch_plane *planes = pad_planes(cache);
	struct kvscratch_pad_info info;
	struct kvscratch_tensor cells;
	char tag[KVSCRATCH_TAG_BYTES];
	bool fits = planes && kvscratch_nr_planes(pad) == cache->nr_planes + 1;

	for (unsigned int i = 0; fits && i <= cache->nr_planes; i++) {
		const struct kvscratch_plane *its = kvscratch_plane(pad, i);

		fits = its->dtype == planes[i].dtype && its->dim == planes[i].dim &&
		       !strncmp(its->label, planes[i].label, sizeof(its->label));
	}
	free(planes);
	make_tag(cache, tag);
	if (kvscratch_pad_info(pad, &info)) {
		snprintf(why, WHY_BYTES, "%s: %s", name, kvscratch_error());
		return false;
	}
	if (!fits || memcmp(info.tag, tag, KVSCRATCH_TAG_BYTES)) {
		snprintf(why, WHY_BYTES, "%s: expected a pad of \"%.64s\", got one of \"%.64s\"%s", name,
			 tag, (const char *)info.tag, fits ? "" : ", with other planes");
		return false;
	}
	if (kvscratch_plane_tensor(pad, cache->nr_planes, &cells)) {
		snprintf(why, WHY_BYTES, "%s: %s", name, kvscratch_error());
		return false;
	}
	if (cells.len < rows ||
	    ticket_hash(cells.data, rows * sizeof(struct cache_cell)) != ticket->cells_hash) {
		snprintf(why, WHY_BYTES, "%s: expected the %" PRIu64 " tokens of the ticket, got others",
			 name, rows);
		return false;
	}
	return true;
}

/* Open what a ticket names, or what was called so before; NULL: why is in @why. */
static struct kvscratch *open_ticket(const struct cache *cache, const struct ticket *ticket,
				     uint64_t rows, char why[WHY_BYTES])
{
	char names[2][TICKET_NAME_BYTES + sizeof(OLD)], other[WHY_BYTES] = "";
	struct kvscratch *pad;

	snprintf(names[0], sizeof(names[0]), "%.*s", TICKET_NAME_BYTES, ticket->pad);
	snprintf(names[1], sizeof(names[1]), "%.*s" OLD, TICKET_NAME_BYTES, ticket->pad);
	for (unsigned int i = 0; i < 2; i++) {
		if (kvscratch_attach_name(&pad, names[i], O_RDWR)) {
			snprintf(i ? other : why, WHY_BYTES, "%s: %s", names[i], kvscratch_error());
			continue;
		}
		if (is_of_ticket(cache, pad, names[i], ticket, rows, i ? other : why))
			return pad;
		kvscratch_close(pad);
	}
	return NULL;
}

static void store_run(struct cache *cache, unsigned int plane, int64_t first, const void *data,
		      const struct cache_cell *cells, uint64_t nr)
{
	int64_t *rows = malloc(nr * sizeof(*rows));

	for (uint64_t i = 0; rows && i < nr; i++)
		rows[i] = first + i;
	if (!rows || !cache_store(cache, plane, rows, data, cells, nr))
		lose_stream(cache, first / cache->rows, "rows could not be restored");
	free(rows);
}

/* The rows of a ticket, plane by plane: the first one is the fork. */
static void restore_rows(struct cache *cache, unsigned int plane, int64_t first,
			 const struct ticket *ticket, uint64_t nr)
{
	const unsigned int index = first / cache->rows;
	struct stream *stream = &cache->streams[index];
	const bool is_begin = first % cache->rows == 0;
	struct kvscratch *pad;
	char why[WHY_BYTES];

	if (is_begin && stream->len == nr && stream->where == IN_PAD &&
	    !memcmp(&stream->ticket, ticket, sizeof(*ticket)))
		return;
	/* one plane was refused, and the others are no better */
	if (is_begin && stream->where == LOST)
		return;
	pad = open_ticket(cache, ticket, nr, why);
	if (!pad) {
		lose_stream(cache, index, why);
		return;
	}
	if (is_begin && !cache->is_private) {
		if (fork_into(cache, index, pad, nr)) {
			stream->ticket = *ticket;
			stream->position = ((const struct cache_cell *)kvscratch_view_plane_row(
				kvscratch_view(pad), cache->nr_planes, nr - 1))->position;
		}
	} else {
		const struct kvscratch_view *view = kvscratch_view(pad);

		store_run(cache, plane, first, kvscratch_view_plane_row(view, plane, 0),
			  kvscratch_view_plane_row(view, cache->nr_planes, 0), nr);
	}
	kvscratch_close(pad);
}

void cache_write(struct cache *cache, unsigned int plane, void *address, const void *data,
		 size_t bytes)
{
	const struct cache_plane *its = &cache->planes[plane];
	const size_t at = (char *)address - cache->base - its->offset;
	const size_t whole = stream_bytes(cache, its);
	unsigned int from_plane;

	if (!cache->is_private && !(at % whole) && bytes == whole &&
	    cache_of(data, &from_plane) == cache && from_plane == plane) {
		copy_stream(cache, plane, at / whole,
			    ((const char *)data - cache->base - its->offset) / whole);
		return;
	}
	if (at % its->row_bytes || bytes % its->row_bytes) {
		cache_make_private(cache, "%s: expected whole rows of %zu bytes, got %zu at %zu",
				   its->label, its->row_bytes, bytes, at);
		memcpy(address, data, bytes);
		return;
	}
	if (bytes >= sizeof(struct ticket) &&
	    !memcmp(data, TICKET_MAGIC, sizeof(((struct ticket *)0)->magic)))
		restore_rows(cache, plane, at / its->row_bytes, data, bytes / its->row_bytes);
	else
		store_run(cache, plane, at / its->row_bytes, data, NULL, bytes / its->row_bytes);
}

void cache_print_stats(void)
{
	fprintf(stderr, "kvscratch-ggml: commits %" PRIu64 " rows %" PRIu64 " stages %" PRIu64
		" bytes %" PRIu64 " keeps %" PRIu64 " truncates %" PRIu64 " forks %" PRIu64
		" moves %" PRIu64 "\n", stats.commits, stats.rows, stats.stages, stats.bytes,
		stats.keeps, stats.truncates, stats.forks, stats.moves);
}
