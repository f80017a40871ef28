// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * A cache as a C++ object: the writer lives as long as the object that has the role, and what
 * it has staged when an exception ends it is never committed.
 *
 *   c++ -o cache cache.cc $(pkg-config --cflags --libs libkvscratch)
 */
#include <iostream>
#include <libkvscratch.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct Close {
	void operator()(kvscratch *pad) const { kvscratch_close(pad); }
};
using Handle = std::unique_ptr<kvscratch, Close>;

static void check(int err)
{
	if (err)
		throw std::runtime_error(kvscratch_error());
}

/* K and V of each layer */
static Handle make_cache(uint64_t max_seq_len, uint32_t layers, uint32_t dim)
{
	std::vector<struct kvscratch_plane> planes(2 * layers);
	kvscratch *pad;

	for (uint32_t i = 0; i < planes.size(); i++) {
		std::string label = (i % 2 ? "v" : "k") + std::to_string(i / 2);

		planes[i].dim = dim;
		planes[i].dtype = KVSCRATCH_DTYPE_F32;
		label.copy(planes[i].label, sizeof(planes[i].label) - 1);
	}
	check(kvscratch_new_planes(&pad, max_seq_len, planes.data(), planes.size(), nullptr, 0));
	return Handle(pad);
}

class Writer {
public:
	explicit Writer(const Handle &pad)
	{
		kvscratch *raw;

		check(kvscratch_writer(&raw, pad.get()));
		handle.reset(raw);
		len = kvscratch_len(raw);
	}

	/* A row for each plane, all of them or none */
	void append(const std::vector<std::vector<float>> &rows)
	{
		for (uint32_t plane = 0; plane < rows.size(); plane++)
			check(kvscratch_stage(handle.get(), plane, len, rows[plane].data(), 1));
		check(kvscratch_commit(handle.get(), len + 1));
		len++;
	}

private:
	Handle handle;
	int64_t len;
};

int main()
{
	Handle pad = make_cache(8, 2, 2);
	kvscratch_tensor v1;

	try {
		Writer writer(pad);

		writer.append({ { 1, 2 }, { 3, 4 }, { 5, 6 }, { 7, 8 } });
		/* of a layer that does not come */
		writer.append({ { 9, 9 }, { 9, 9 }, { 9, 9 } });
	} catch (const std::runtime_error &error) {
		std::cout << error.what() << "\n";
	}
	check(kvscratch_plane_tensor(pad.get(), kvscratch_find_plane(pad.get(), "v1"), &v1));
	std::cout << v1.len << " token, v1 ends with "
		  << static_cast<const float *>(v1.data)[v1.len * v1.dim - 1] << "\n";
}
