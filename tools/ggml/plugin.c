// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * A backend of ggml that computes nothing but the stores into a KV cache, whose memory is
 * views of pads. An engine that was not written for it loads it by GGML_BACKEND_PATH.
 *
 * Its device calls itself a GPU, so that llama.cpp takes the memory for the cache of each
 * layer from it. Weights and all that is computed stay on the CPU, which reads the cache
 * where it lies: of all nodes of a graph the device claims two. SET_ROWS into a plane of
 * the cache, whose rows it converts and stages; and GET_ROWS of the token embeddings, since
 * only there the tokens can be seen.
 *
 * An engine tells a buffer nothing of sequences, drops or ends of a token: a row below the
 * last one is a rollback, and a token is whole when each plane has it.
 */
#include "cache.h"
#include "ggml.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* Holds for all that is in cache.c, and for embeddings. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Those of the model whose graph was looked at last */
static struct ggml_tensor embeddings;

static struct ggml_device device;

/*
 * Buffers
 */

/* "cache_k_l12" is k12; false: no plane of a cache */
static bool label_of(const struct ggml_tensor *tensor, char label[16])
{
	char kind, rest;
	unsigned int layer;

	if (tensor->view_src || sscanf(tensor->name, "cache_%c_l%u%c", &kind, &layer, &rest) != 2 ||
	    (kind != 'k' && kind != 'v') || tensor->ne[3] != 1)
		return false;
	return snprintf(label, 16, "%c%u", kind, layer) < 16;
}

static void free_buffer(struct ggml_buffer *buffer)
{
	pthread_mutex_lock(&lock);
	cache_free(buffer->context);
	pthread_mutex_unlock(&lock);
}

static void *get_base(struct ggml_buffer *buffer)
{
	return cache_base(buffer->context);
}

static int init_tensor(struct ggml_buffer *buffer, struct ggml_tensor *tensor)
{
	struct cache_plane plane = {
		.type = tensor->type,
		.elements = tensor->ne[0],
		.row_bytes = tensor->nb[1],
		.offset = (char *)tensor->data - (char *)cache_base(buffer->context),
	};

	if (!label_of(tensor, plane.label))
		return GGML_STATUS_SUCCESS;
	pthread_mutex_lock(&lock);
	cache_add_plane(buffer->context, &plane, tensor->ne[1], tensor->ne[2]);
	pthread_mutex_unlock(&lock);
	return GGML_STATUS_SUCCESS;
}

static void memset_tensor(struct ggml_buffer *buffer, struct ggml_tensor *tensor, uint8_t value,
			  size_t offset, size_t bytes)
{
	unsigned int plane;
	struct cache *cache;

	(void)buffer;
	pthread_mutex_lock(&lock);
	cache = cache_of(tensor->data, &plane);
	if (cache)
		cache_make_private(cache, "a part of %s is set to %u",
				   cache_plane(cache, plane)->label, value);
	memset((char *)tensor->data + offset, value, bytes);
	pthread_mutex_unlock(&lock);
}

static void set_tensor(struct ggml_buffer *buffer, struct ggml_tensor *tensor, const void *data,
		       size_t offset, size_t bytes)
{
	char *address = (char *)tensor->data + offset;
	unsigned int plane;
	struct cache *cache;

	(void)buffer;
	pthread_mutex_lock(&lock);
	cache = cache_of(address, &plane);
	if (cache)
		cache_write(cache, plane, address, data, bytes);
	else
		memcpy(address, data, bytes);
	pthread_mutex_unlock(&lock);
}

static void get_tensor(struct ggml_buffer *buffer, const struct ggml_tensor *tensor, void *data,
		       size_t offset, size_t bytes)
{
	(void)buffer;
	memcpy(data, (const char *)tensor->data + offset, bytes);
}

static bool cpy_tensor(struct ggml_buffer *buffer, const struct ggml_tensor *src,
		       struct ggml_tensor *dst)
{
	if (!is_host(src->buffer->type))
		return false;
	set_tensor(buffer, dst, src->data, 0, dst->nb[3] * dst->ne[3]);
	return true;
}

static void clear(struct ggml_buffer *buffer, uint8_t value)
{
	pthread_mutex_lock(&lock);
	if (value)
		cache_make_private(buffer->context, "it is set to %u", value);
	cache_clear(buffer->context);
	if (value)
		memset(cache_base(buffer->context), value, buffer->bytes);
	pthread_mutex_unlock(&lock);
}

static const char *buffer_type_name(struct ggml_buffer_type *type)
{
	(void)type;
	return "KVSCRATCH";
}

static struct ggml_buffer *alloc_buffer(struct ggml_buffer_type *type, size_t bytes)
{
	static const struct ggml_buffer_interface interface = {
		.free_buffer = free_buffer,
		.get_base = get_base,
		.init_tensor = init_tensor,
		.memset_tensor = memset_tensor,
		.set_tensor = set_tensor,
		.get_tensor = get_tensor,
		.cpy_tensor = cpy_tensor,
		.clear = clear,
	};
	struct cache *cache;

	pthread_mutex_lock(&lock);
	cache = cache_new(bytes);
	pthread_mutex_unlock(&lock);
	return cache ? new_buffer(type, interface, cache, bytes) : NULL;
}

static size_t get_alignment(struct ggml_buffer_type *type)
{
	(void)type;
	return sysconf(_SC_PAGESIZE);
}

/* A buffer begins at a huge page; so do planes that are large, if all are. */
static size_t get_alloc_size(struct ggml_buffer_type *type, const struct ggml_tensor *tensor)
{
	const size_t bytes = tensor->nb[3] * tensor->ne[3], huge = (size_t)2 << 20;

	(void)type;
	return bytes < huge ? bytes : (bytes + huge - 1) / huge * huge;
}

static bool buffer_type_is_host(struct ggml_buffer_type *type)
{
	(void)type;
	return true;
}

static struct ggml_buffer_type buffer_type = {
	.iface = {
		.get_name = buffer_type_name,
		.alloc_buffer = alloc_buffer,
		.get_alignment = get_alignment,
		.get_alloc_size = get_alloc_size,
		.is_host = buffer_type_is_host,
	},
	.device = &device,
};

/*
 * What is computed
 */

/* What a backend, one of each context, saw of the tokens of a graph */
struct seen {
	int32_t *tokens;
	struct cache_cell *cells;
	int64_t *rows;
	char *converted;
	int64_t nr_tokens;
	size_t cells_bytes, rows_bytes, converted_bytes;
};

static bool is_embedding(const struct ggml_tensor *op)
{
	return op_of(op) == OP_GET_ROWS && op->type == GGML_F32 && op->src[1]->type == GGML_I32 &&
	       op->src[1]->nb[0] == sizeof(int32_t) && op->nb[1] == op->ne[0] * sizeof(float) &&
	       op->ne[2] == 1 && op->ne[3] == 1 && !strcmp(op->src[0]->name, "token_embd.weight") &&
	       op->src[0]->buffer && is_host(op->src[0]->buffer->type) &&
	       can_convert(op->src[0]->type);
}

/* Where the row of a plane is set, all of it; else the plane is not one of rows. */
static bool is_store(const struct ggml_tensor *op, const struct cache_plane *plane)
{
	const struct ggml_tensor *rows = op->src[0], *where = op->src[1];

	return op_of(op) == OP_SET_ROWS && op->ne[0] == plane->elements &&
	       op->nb[1] == plane->row_bytes && rows->type == GGML_F32 &&
	       rows->nb[0] == sizeof(float) && rows->ne[2] == 1 && rows->ne[3] == 1 &&
	       (where->type == GGML_I64 || where->type == GGML_I32) && can_convert(plane->type);
}

static bool reserve(void **memory, size_t *have, size_t want)
{
	void *larger;

	if (want <= *have)
		return true;
	larger = realloc(*memory, want);
	if (!larger)
		return false;
	*memory = larger;
	*have = want;
	return true;
}

static bool get_rows(struct seen *seen, const struct ggml_tensor *op)
{
	const struct ggml_tensor *weights = op->src[0];
	const int32_t *tokens = op->src[1]->data;
	int32_t *copy = realloc(seen->tokens, op->ne[1] * sizeof(*copy));

	if (!copy && op->ne[1])
		return false;
	seen->tokens = copy;
	seen->nr_tokens = op->ne[1];
	for (int64_t i = 0; i < op->ne[1]; i++) {
		if (tokens[i] < 0 || tokens[i] >= weights->ne[1])
			return false;
		copy[i] = tokens[i];
		row_to_floats(weights->type,
			      (const char *)weights->data + tokens[i] * weights->nb[1],
			      (void *)((char *)op->data + i * op->nb[1]), op->ne[0]);
	}
	return true;
}

/* The rotation by the positions, not far behind what is stored of a key */
static const struct ggml_tensor *find_rope(const struct ggml_tensor *tensor)
{
	for (int depth = 0; tensor && depth < 8; depth++) {
		if (op_of(tensor) == OP_ROPE)
			return tensor;
		tensor = tensor->src[0] ? tensor->src[0] : tensor->view_src;
	}
	return NULL;
}

/*
 * The tokens and positions of what is stored. Positions are an input, whose memory is used
 * again after the last layer: they are looked at with the first plane of a token only.
 */
static void fill_cells(struct seen *seen, const struct ggml_tensor *op, int64_t nr)
{
	const struct ggml_tensor *rope = find_rope(op->src[0]);
	const struct ggml_tensor *positions = rope ? rope->src[1] : NULL;

	if (positions && (positions->type != GGML_I32 || positions->ne[0] < nr))
		positions = NULL;
	for (int64_t i = 0; i < nr; i++) {
		seen->cells[i].token = seen->nr_tokens == nr ? seen->tokens[i] : -1;
		seen->cells[i].position = positions ? ((const int32_t *)positions->data)[i] : -1;
	}
	/* what is computed next may not be of tokens */
	seen->nr_tokens = 0;
}

static bool set_rows(struct seen *seen, const struct ggml_tensor *op)
{
	const struct ggml_tensor *from = op->src[0], *where = op->src[1];
	const int64_t nr = from->ne[1];
	const struct cache_plane *its;
	struct cache *cache;
	unsigned int plane;

	cache = cache_of(root_of(op)->data, &plane);
	if (!cache)
		return false;
	its = cache_plane(cache, plane);
	if (!reserve((void **)&seen->rows, &seen->rows_bytes, nr * sizeof(*seen->rows)) ||
	    !reserve((void **)&seen->cells, &seen->cells_bytes, nr * sizeof(*seen->cells)) ||
	    !reserve((void **)&seen->converted, &seen->converted_bytes, nr * its->row_bytes))
		return false;
	for (int64_t i = 0; i < nr; i++) {
		row_from_floats(its->type,
				(const void *)((const char *)from->data + i * from->nb[1]),
				seen->converted + i * its->row_bytes, its->elements);
		seen->rows[i] = where->type == GGML_I64 ? ((const int64_t *)where->data)[i] :
							  ((const int32_t *)where->data)[i];
	}
	if (cache_begins_pass(cache, plane))
		fill_cells(seen, op, nr);
	return cache_store(cache, plane, seen->rows, seen->converted, seen->cells, nr);
}

static int graph_compute(struct ggml_backend *backend, struct ggml_graph *graph)
{
	bool done = true;

	pthread_mutex_lock(&lock);
	for (int i = 0; done && i < nr_nodes(graph); i++) {
		const struct ggml_tensor *node = node_of(graph, i);

		if (!(node->flags & GGML_FLAG_COMPUTE) || is_view_op(op_of(node)))
			continue;
		if (op_of(node) == OP_GET_ROWS)
			done = get_rows(backend->context, node);
		else
			done = op_of(node) == OP_SET_ROWS && set_rows(backend->context, node);
	}
	pthread_mutex_unlock(&lock);
	return done ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

static const char *backend_name(struct ggml_backend *backend)
{
	(void)backend;
	return "KVSCRATCH";
}

static void free_backend(struct ggml_backend *backend)
{
	struct seen *seen = backend->context;

	free(seen->tokens);
	free(seen->cells);
	free(seen->rows);
	free(seen->converted);
	free(seen);
	free(backend);
}

/*
 * The device
 */

static const char *device_name(struct ggml_device *its)
{
	(void)its;
	return "KVSCRATCH0";
}

static const char *device_description(struct ggml_device *its)
{
	(void)its;
	return "KV cache in pads";
}

static void get_memory(struct ggml_device *its, size_t *free_bytes, size_t *total)
{
	(void)its;
	*free_bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * sysconf(_SC_PAGESIZE);
	*total = (size_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
}

static int device_type(struct ggml_device *its)
{
	(void)its;
	return GGML_DEVICE_GPU;
}

static void get_props(struct ggml_device *its, struct ggml_device_props *props)
{
	memset(props, 0, sizeof(*props));
	props->name = device_name(its);
	props->description = device_description(its);
	props->type = device_type(its);
	get_memory(its, &props->memory_free, &props->memory_total);
#if GGML_PLUGIN_API >= 3
	props->caps.mmap_support = true;
#endif
}

static struct ggml_backend *init_backend(struct ggml_device *its, const char *params)
{
	static const uint8_t guid[16] = "kvscratch-pads-1";
	struct ggml_backend *backend = calloc(1, sizeof(*backend));

	(void)params;
	if (!backend)
		return NULL;
	*backend = (struct ggml_backend) {
		.guid = guid,
		.iface.get_name = backend_name,
		.iface.free = free_backend,
		.iface.graph_compute = graph_compute,
		.device = its,
		.context = calloc(1, sizeof(struct seen)),
	};
	if (backend->context)
		return backend;
	free(backend);
	return NULL;
}

static struct ggml_buffer_type *get_buffer_type(struct ggml_device *its)
{
	(void)its;
	return &buffer_type;
}

/* What tells one model from another: a look at some of its token embeddings */
static uint64_t fingerprint_of(const struct ggml_tensor *weights)
{
	uint64_t hash = 0xcbf29ce484222325;
	const int64_t shape[3] = { weights->type, weights->ne[0], weights->ne[1] };

	for (size_t i = 0; i < sizeof(shape); i++)
		hash = (hash ^ ((const uint8_t *)shape)[i]) * 0x100000001b3;
	for (int64_t i = 0; i < 64; i++) {
		const uint8_t *row = (const uint8_t *)weights->data +
				     i * weights->ne[1] / 64 * weights->nb[1];

		for (size_t at = 0; at < weights->nb[1] && at < 256; at++)
			hash = (hash ^ row[at]) * 0x100000001b3;
	}
	return hash;
}

static bool supports_store(const struct ggml_tensor *op)
{
	unsigned int plane;
	struct cache *cache = cache_of(root_of(op)->data, &plane);

	if (!cache || cache_is_private(cache))
		return false;
	if (is_store(op, cache_plane(cache, plane))) {
		if (!cache_has_fingerprint(cache) && embeddings.data)
			cache_set_fingerprint(cache, fingerprint_of(&embeddings));
		return true;
	}
	/* the CPU is about to write into it, which a view does not let it */
	if (op_of(op) == OP_SET_ROWS)
		cache_make_private(cache, "%s is not stored row by row, as with flash attention (-fa on)",
				   cache_plane(cache, plane)->label);
	else
		cache_make_private(cache, "%s is changed in place, as by a context shift",
				   cache_plane(cache, plane)->label);
	return false;
}

static bool supports_op(struct ggml_device *its, const struct ggml_tensor *op)
{
	bool supported;

	(void)its;
	if (is_view_op(op_of(op)))
		return true;
	pthread_mutex_lock(&lock);
	supported = is_embedding(op);
	if (supported)
		embeddings = *op->src[0];
	else if (!supported && op->view_src)
		supported = supports_store(op);
	pthread_mutex_unlock(&lock);
	return supported;
}

static bool supports_buffer_type(struct ggml_device *its, struct ggml_buffer_type *type)
{
	(void)its;
	return type == &buffer_type || is_host(type);
}

static struct ggml_registry registry;

static struct ggml_device device = {
	.iface = {
		.get_name = device_name,
		.get_description = device_description,
		.get_memory = get_memory,
		.get_type = device_type,
		.get_props = get_props,
		.init_backend = init_backend,
		.get_buffer_type = get_buffer_type,
		.supports_op = supports_op,
		.supports_buft = supports_buffer_type,
	},
	.registry = &registry,
};

static const char *registry_name(struct ggml_registry *its)
{
	(void)its;
	return "KVSCRATCH";
}

static size_t get_device_count(struct ggml_registry *its)
{
	(void)its;
	return 1;
}

static struct ggml_device *get_device(struct ggml_registry *its, size_t index)
{
	(void)its;
	return index ? NULL : &device;
}

static void *get_proc_address(struct ggml_registry *its, const char *name)
{
	(void)its;
	(void)name;
	return NULL;
}

static struct ggml_registry registry = {
	.api_version = GGML_PLUGIN_API,
	.iface = {
		.get_name = registry_name,
		.get_device_count = get_device_count,
		.get_device = get_device,
		.get_proc_address = get_proc_address,
	},
};

/* What ggml calls when it loads a plug-in; NULL: it goes on without. */
EXPORT struct ggml_registry *ggml_backend_init(void);
EXPORT struct ggml_registry *ggml_backend_init(void)
{
	const char *why = load_ggml(__builtin_return_address(0));

	if (why) {
		fprintf(stderr, "kvscratch-ggml: not used: %s\n", why);
		return NULL;
	}
	if (getenv("KVSCRATCH_GGML_STATS"))
		atexit(cache_print_stats);
	return &registry;
}
