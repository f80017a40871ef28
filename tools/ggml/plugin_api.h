/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The interface between ggml and its backends, as far as it is used here, in our own
 * words: ggml's headers are not needed, and a program that was built against other ones
 * is told by GGML_PLUGIN_API and by what load_ggml() looks at.
 *
 * GGML_PLUGIN_API is ggml's GGML_BACKEND_API_VERSION: 2 and 3 are known, and differ in
 * the table of a buffer type and in what a device says of itself. ggml loads nothing of
 * another version.
 */
#ifndef KVSCRATCH_GGML_PLUGIN_API_H
#define KVSCRATCH_GGML_PLUGIN_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if GGML_PLUGIN_API != 2 && GGML_PLUGIN_API != 3
#error "expected -DGGML_PLUGIN_API=2 or 3"
#endif

/* Types of elements; their numbers are in files and stay. */
enum {
	GGML_F32 = 0,
	GGML_F16 = 1,
	GGML_I32 = 26,
	GGML_I64 = 27,
	GGML_BF16 = 30,
};

#define GGML_FLAG_COMPUTE 16

struct ggml_buffer;
struct ggml_graph;

/* What a node computes, @op, has another number in each version: see ops in ggml.h here. */
struct ggml_tensor {
	int type;
	struct ggml_buffer *buffer;
	int64_t ne[4];		/* elements, the innermost first */
	size_t nb[4];		/* bytes from one to the next */
	int op;
	int32_t op_params[16];
	int32_t flags;
	struct ggml_tensor *src[10];
	struct ggml_tensor *view_src;
	size_t view_offs;
	void *data;
	char name[64];
	void *extra;
	char padding[8];
};

enum ggml_status {
	GGML_STATUS_FAILED = -1,
	GGML_STATUS_SUCCESS = 0,
};

/* Functions that nothing here offers have no type. */
typedef void ggml_none(void);

struct ggml_buffer_type;

struct ggml_buffer_type_interface {
	const char *(*get_name)(struct ggml_buffer_type *type);
	struct ggml_buffer *(*alloc_buffer)(struct ggml_buffer_type *type, size_t bytes);
#if GGML_PLUGIN_API >= 3
	ggml_none *alloc_buffer_n;
#endif
	size_t (*get_alignment)(struct ggml_buffer_type *type);
	size_t (*get_max_size)(struct ggml_buffer_type *type);
	size_t (*get_alloc_size)(struct ggml_buffer_type *type, const struct ggml_tensor *tensor);
#if GGML_PLUGIN_API >= 3
	ggml_none *get_alloc_size_n;
#endif
	bool (*is_host)(struct ggml_buffer_type *type);
};

struct ggml_device;

struct ggml_buffer_type {
	struct ggml_buffer_type_interface iface;
	struct ggml_device *device;
	void *context;
};

struct ggml_buffer_interface {
	void (*free_buffer)(struct ggml_buffer *buffer);
	void *(*get_base)(struct ggml_buffer *buffer);
	int (*init_tensor)(struct ggml_buffer *buffer, struct ggml_tensor *tensor);
	void (*memset_tensor)(struct ggml_buffer *buffer, struct ggml_tensor *tensor, uint8_t value,
			      size_t offset, size_t bytes);
	void (*set_tensor)(struct ggml_buffer *buffer, struct ggml_tensor *tensor, const void *data,
			   size_t offset, size_t bytes);
	void (*get_tensor)(struct ggml_buffer *buffer, const struct ggml_tensor *tensor, void *data,
			   size_t offset, size_t bytes);
	ggml_none *set_tensor_2d, *get_tensor_2d;
	bool (*cpy_tensor)(struct ggml_buffer *buffer, const struct ggml_tensor *src,
			   struct ggml_tensor *dst);
	void (*clear)(struct ggml_buffer *buffer, uint8_t value);
	ggml_none *reset;
};

struct ggml_buffer {
	struct ggml_buffer_interface iface;
	struct ggml_buffer_type *type;
	void *context;
	size_t bytes;
	int usage;
};

struct ggml_backend;

struct ggml_backend_interface {
	const char *(*get_name)(struct ggml_backend *backend);
	void (*free)(struct ggml_backend *backend);
	ggml_none *set_tensor_async, *get_tensor_async, *set_tensor_2d_async, *get_tensor_2d_async;
	ggml_none *cpy_tensor_async;
	ggml_none *synchronize;
	ggml_none *graph_plan_create, *graph_plan_free, *graph_plan_update, *graph_plan_compute;
	int (*graph_compute)(struct ggml_backend *backend, struct ggml_graph *graph);
	ggml_none *event_record, *event_wait;
	ggml_none *graph_optimize;
};

struct ggml_backend {
	const uint8_t *guid;
	struct ggml_backend_interface iface;
	struct ggml_device *device;
	void *context;
};

enum ggml_device_type { GGML_DEVICE_GPU = 1 };

struct ggml_device_props {
	const char *name;
	const char *description;
	size_t memory_free;
	size_t memory_total;
	int type;
	const char *device_id;
	struct {
		bool async;
		bool host_buffer;
		bool buffer_from_host_ptr;
		bool events;
#if GGML_PLUGIN_API >= 3
		bool mmap_support;
#endif
	} caps;
};

struct ggml_device_interface {
	const char *(*get_name)(struct ggml_device *device);
	const char *(*get_description)(struct ggml_device *device);
	void (*get_memory)(struct ggml_device *device, size_t *free, size_t *total);
	int (*get_type)(struct ggml_device *device);
	void (*get_props)(struct ggml_device *device, struct ggml_device_props *props);
	struct ggml_backend *(*init_backend)(struct ggml_device *device, const char *params);
	struct ggml_buffer_type *(*get_buffer_type)(struct ggml_device *device);
	ggml_none *get_host_buffer_type;
	ggml_none *buffer_from_host_ptr;
	bool (*supports_op)(struct ggml_device *device, const struct ggml_tensor *op);
	bool (*supports_buft)(struct ggml_device *device, struct ggml_buffer_type *type);
	ggml_none *offload_op;
	ggml_none *event_new, *event_free, *event_synchronize;
};

struct ggml_registry;

struct ggml_device {
	struct ggml_device_interface iface;
	struct ggml_registry *registry;
	void *context;
};

struct ggml_registry_interface {
	const char *(*get_name)(struct ggml_registry *registry);
	size_t (*get_device_count)(struct ggml_registry *registry);
	struct ggml_device *(*get_device)(struct ggml_registry *registry, size_t index);
	void *(*get_proc_address)(struct ggml_registry *registry, const char *name);
};

struct ggml_registry {
	int api_version;
	struct ggml_registry_interface iface;
	void *context;
};

#endif
