// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * A pad as a C++ object: one thread appends, another follows without a copy.
 *
 *   c++ -o scratchpad scratchpad.cc -pthread $(pkg-config --cflags --libs libkvscratch)
 */
#include <iostream>
#include <libkvscratch.h>
#include <stdexcept>
#include <thread>
#include <vector>

class Scratchpad {
public:
	Scratchpad(uint64_t max_seq_len, uint32_t dim)
	{
		check(kvscratch_new(&pad, max_seq_len, dim, KVSCRATCH_DTYPE_F32));
	}
	~Scratchpad() { kvscratch_close(pad); }
	Scratchpad(const Scratchpad &) = delete;
	Scratchpad &operator=(const Scratchpad &) = delete;

	void append(const std::vector<float> &row)
	{
		check(kvscratch_append(pad, row.data(), row.size()));
	}

	/* Make @rows the committed ones, as soon as these are others. */
	void follow(kvscratch_tensor &rows)
	{
		check(kvscratch_wait(pad, rows.state, -1));
		check(kvscratch_as_tensor(pad, &rows));
	}

private:
	static void check(int err)
	{
		if (err)
			throw std::runtime_error(kvscratch_error());
	}

	struct kvscratch *pad;
};

int main()
{
	Scratchpad pad(1000, 64);
	std::thread producer([&pad] {
		for (int token = 1; token <= 1000; token++)
			pad.append(std::vector<float>(64, token));
	});
	kvscratch_tensor rows = {};

	while (rows.len < 1000)
		pad.follow(rows);
	producer.join();
	std::cout << "the last row begins with "
		  << static_cast<const float *>(rows.data)[999 * 64] << "\n";
}
