/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * The functions of ggml that the plug-in calls. They are those of the program that loads
 * it, which may have brought its libraries in where no linker finds them.
 */
#ifndef KVSCRATCH_GGML_GGML_H
#define KVSCRATCH_GGML_GGML_H

#include "plugin_api.h"

/* What a node computes, as far as it matters here */
enum op {
	OP_OTHER,
	OP_NONE,
	OP_RESHAPE,
	OP_VIEW,
	OP_PERMUTE,
	OP_TRANSPOSE,
	OP_GET_ROWS,
	OP_SET_ROWS,
	OP_ROPE,
	NR_OPS,
};

/**
 * load_ggml() - find ggml's functions
 * @caller: an address in the code that loads the plug-in
 *
 * Returns NULL, or what is in the way.
 */
const char *load_ggml(const void *caller);

enum op op_of(const struct ggml_tensor *node);

/* Whether a node only says where the data of another one are */
static inline bool is_view_op(enum op op)
{
	return op == OP_NONE || op == OP_RESHAPE || op == OP_VIEW || op == OP_PERMUTE ||
	       op == OP_TRANSPOSE;
}

/* Whose data they are */
static inline const struct ggml_tensor *root_of(const struct ggml_tensor *tensor)
{
	while (tensor->view_src)
		tensor = tensor->view_src;
	return tensor;
}

const char *type_name(int type);
size_t row_bytes(int type, int64_t elements);

/*
 * Convert a row from or to floats, bit for bit as the CPU backend does; false: it knows
 * no way.
 */
bool can_convert(int type);
void row_from_floats(int type, const float *floats, void *row, int64_t elements);
void row_to_floats(int type, const void *row, float *floats, int64_t elements);

struct ggml_buffer *new_buffer(struct ggml_buffer_type *type,
			       struct ggml_buffer_interface iface, void *context, size_t bytes);
bool is_host(struct ggml_buffer_type *type);
int nr_nodes(struct ggml_graph *graph);
struct ggml_tensor *node_of(struct ggml_graph *graph, int index);

#endif
