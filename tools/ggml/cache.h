/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The KV cache of an engine in pads: one buffer, in which the engine places a tensor for
 * the keys and one for the values of each layer, of [elements, rows, streams].
 *
 * A stream, which is one sequence or several that share its rows, is a pad whose planes
 * are mapped, read-only, where the engine's tensors are. Its rows are staged plane by
 * plane and committed when all have them. A plane of the tokens and positions, cells, is
 * beside them.
 *
 * Whatever goes wrong the engine goes on: in private memory, which has what the pads had,
 * or, where that is not to be had, by a failure of what it computes until it begins the
 * stream anew.
 *
 * Nothing here locks: the caller does.
 */
#ifndef KVSCRATCH_GGML_CACHE_H
#define KVSCRATCH_GGML_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct cache;

/**
 * struct cache_plane - a tensor of the cache
 * @label: k0, v0, k1, ...
 * @type: ggml's number of the type of the elements
 * @elements: of a row
 * @row_bytes: of a row
 * @offset: of the first row in the buffer
 */
struct cache_plane {
	char label[16];
	int type;
	int64_t elements;
	size_t row_bytes;
	size_t offset;
};

/* What is known of a row: { token, position }, -1 each where it is not */
struct cache_cell {
	int32_t token;
	int32_t position;
};

/* A buffer of zeros; NULL: there is no memory. */
struct cache *cache_new(size_t bytes);
void cache_free(struct cache *cache);
void *cache_base(const struct cache *cache);

/* Add a tensor; one that does not fit in with the others makes the cache private. */
void cache_add_plane(struct cache *cache, const struct cache_plane *plane, uint64_t rows,
		     uint64_t streams);

/* Whose tensor an address is in, and which plane it is; NULL if nobody's */
struct cache *cache_of(const void *address, unsigned int *plane);
const struct cache_plane *cache_plane(const struct cache *cache, unsigned int plane);

/* From now on the cache is private memory: @why is printed, once. */
void cache_make_private(struct cache *cache, const char *why, ...)
	__attribute__((format(printf, 2, 3)));
bool cache_is_private(const struct cache *cache);

/* What the model looks like: it is in the tag of the pads that are made after it. */
bool cache_has_fingerprint(const struct cache *cache);
void cache_set_fingerprint(struct cache *cache, uint64_t fingerprint);

/* Zeros, in new pads */
void cache_clear(struct cache *cache);

/**
 * cache_store() - store rows of one plane
 * @rows: for each row where it goes: stream x rows of a stream + row
 * @data: the rows, one behind the other
 * @cells: what is known of each, or NULL; of the first plane's rows only
 * @nr_rows: how many
 *
 * When each plane got them they are committed. Returns false if they cannot be stored.
 */
bool cache_store(struct cache *cache, unsigned int plane, const int64_t *rows, const void *data,
		 const struct cache_cell *cells, uint64_t nr_rows);

/* Whether rows of @plane are the first ones of what is committed next */
bool cache_begins_pass(const struct cache *cache, unsigned int plane);

/*
 * Any bytes that the engine puts into a plane: rows, a whole stream of the same buffer,
 * which becomes a fork of it, or a ticket, which becomes a fork of what it names.
 */
void cache_write(struct cache *cache, unsigned int plane, void *address, const void *data,
		 size_t bytes);

/* Counters of all caches, to stderr */
void cache_print_stats(void);

#endif
