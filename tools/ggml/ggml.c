// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Where ggml's functions are. A program may load its libraries for itself only
 * (RTLD_LOCAL), under any name, and several of them; what the caller depends on is ours.
 */
#define _GNU_SOURCE
#include "ggml.h"

#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>
#include <string.h>

/* As ggml_get_type_traits() returns them */
struct type_traits {
	const char *name;
	int64_t block_elements, block_elements_interleaved;
	size_t block_bytes;
	bool is_quantized;
	void (*to_float)(const void *row, float *floats, int64_t elements);
	void (*from_float_ref)(const float *floats, void *row, int64_t elements);
};

/* The head of what ggml_get_type_traits_cpu() returns */
struct type_traits_cpu {
	void (*from_float)(const float *floats, void *row, int64_t elements);
};

static struct {
	struct ggml_buffer *(*buffer_init)(struct ggml_buffer_type *type,
					   struct ggml_buffer_interface iface, void *context,
					   size_t bytes);
	bool (*buft_is_host)(struct ggml_buffer_type *type);
	int (*graph_n_nodes)(struct ggml_graph *graph);
	struct ggml_tensor *(*graph_node)(struct ggml_graph *graph, int index);
	const char *(*op_name)(int op);
	const char *(*type_name)(int type);
	size_t (*row_size)(int type, int64_t elements);
	size_t (*tensor_overhead)(void);
	const struct type_traits *(*get_type_traits)(int type);
} ggml;

/* of the CPU backend, which may be loaded after us */
static const struct type_traits_cpu *(*_Atomic get_type_traits_cpu)(int type);

/* All of those below come before it, and every version has more. */
#define MAX_OPS 80
static unsigned char ops[MAX_OPS];

/* What ggml keeps before each tensor, in the memory that holds both */
#define OBJECT_BYTES 32

static void learn_ops(void)
{
	static const char *const names[NR_OPS] = {
		[OP_NONE] = "NONE",
		[OP_RESHAPE] = "RESHAPE",
		[OP_VIEW] = "VIEW",
		[OP_PERMUTE] = "PERMUTE",
		[OP_TRANSPOSE] = "TRANSPOSE",
		[OP_GET_ROWS] = "GET_ROWS",
		[OP_SET_ROWS] = "SET_ROWS",
		[OP_ROPE] = "ROPE",
	};
	unsigned int missing = NR_OPS - 1;

	for (int op = 0; op < MAX_OPS && missing; op++) {
		const char *name = ggml.op_name(op);

		for (int known = OP_NONE; name && known < NR_OPS; known++) {
			if (!strcmp(name, names[known])) {
				ops[op] = known;
				missing--;
			}
		}
	}
}

const char *load_ggml(const void *caller)
{
	static const struct {
		const char *name;
		void *function;
	} wanted[] = {
		{ "ggml_backend_buffer_init", &ggml.buffer_init },
		{ "ggml_backend_buft_is_host", &ggml.buft_is_host },
		{ "ggml_graph_n_nodes", &ggml.graph_n_nodes },
		{ "ggml_graph_node", &ggml.graph_node },
		{ "ggml_op_name", &ggml.op_name },
		{ "ggml_type_name", &ggml.type_name },
		{ "ggml_row_size", &ggml.row_size },
		{ "ggml_tensor_overhead", &ggml.tensor_overhead },
		{ "ggml_get_type_traits", &ggml.get_type_traits },
	};
	Dl_info info;
	void *library;

	if (!dladdr(caller, &info))
		return "expected to be loaded by ggml";
	library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
	if (!library)	/* the program itself */
		library = dlopen(NULL, RTLD_NOW);
	for (size_t i = 0; library && i < sizeof(wanted) / sizeof(*wanted); i++) {
		void *function = dlsym(library, wanted[i].name);

		if (!function)
			return "expected ggml to export what its plug-ins call";
		memcpy(wanted[i].function, &function, sizeof(function));
	}
	if (!library)
		return "expected to be loaded by ggml";
	if (ggml.tensor_overhead() != OBJECT_BYTES + sizeof(struct ggml_tensor))
		return "expected tensors as they were when this was written";
	learn_ops();
	return NULL;
}

enum op op_of(const struct ggml_tensor *node)
{
	return node->op >= 0 && node->op < MAX_OPS ? ops[node->op] : OP_OTHER;
}

const char *type_name(int type)
{
	return ggml.type_name(type);
}

size_t row_bytes(int type, int64_t elements)
{
	return ggml.row_size(type, elements);
}

static int find_cpu_backend(struct dl_phdr_info *info, size_t size, void *context)
{
	void *library, *function;

	(void)size;
	(void)context;
	if (!strstr(info->dlpi_name, "ggml-cpu"))
		return 0;
	library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
	function = library ? dlsym(library, "ggml_get_type_traits_cpu") : NULL;
	if (function)
		memcpy(&get_type_traits_cpu, &function, sizeof(function));
	if (library)
		dlclose(library);
	return !!function;
}

/* Rounding is the CPU backend's, which differs from the reference's in the last bit. */
static void (*from_float_of(int type))(const float *, void *, int64_t)
{
	const struct type_traits_cpu *cpu;

	if (!get_type_traits_cpu)
		dl_iterate_phdr(find_cpu_backend, NULL);
	cpu = get_type_traits_cpu ? get_type_traits_cpu(type) : NULL;
	if (cpu && cpu->from_float)
		return cpu->from_float;
	return ggml.get_type_traits(type)->from_float_ref;
}

bool can_convert(int type)
{
	return type == GGML_F32 || ggml.get_type_traits(type)->from_float_ref;
}

void row_from_floats(int type, const float *floats, void *row, int64_t elements)
{
	if (type == GGML_F32)
		memcpy(row, floats, elements * sizeof(*floats));
	else
		from_float_of(type)(floats, row, elements);
}

void row_to_floats(int type, const void *row, float *floats, int64_t elements)
{
	if (type == GGML_F32)
		memcpy(floats, row, elements * sizeof(*floats));
	else
		ggml.get_type_traits(type)->to_float(row, floats, elements);
}

struct ggml_buffer *new_buffer(struct ggml_buffer_type *type,
			       struct ggml_buffer_interface iface, void *context, size_t bytes)
{
	return ggml.buffer_init(type, iface, context, bytes);
}

bool is_host(struct ggml_buffer_type *type)
{
	return ggml.buft_is_host(type);
}

int nr_nodes(struct ggml_graph *graph)
{
	return ggml.graph_n_nodes(graph);
}

struct ggml_tensor *node_of(struct ggml_graph *graph, int index)
{
	return ggml.graph_node(graph, index);
}
