// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the conversion to scaled integers costs, per element: the arithmetic alone
 * and an append that does it. Run in virtual time (tests/qemu/run --virtual-time),
 * where a nanosecond is an instruction.
 */
#include "../../kvscratch_scale.h"
#include "../../tools/lib/device.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DIM 1024
#define ROWS 64
#define ELEMENTS (DIM * ROWS)

static uint64_t input[ELEMENTS];
static uint64_t output[ELEMENTS];
static uint8_t scales[ELEMENTS / KVSCRATCH_MX_BLOCK];

/* Both signs, random fractions, exponents over twelve octaves */
static void fill_input(uint32_t dtype)
{
	static const unsigned int mant_bits[] = { 0, 52, 23, 10, 7 };
	static const unsigned int exp_bits[] = { 0, 11, 8, 5, 8 };
	unsigned int mant = mant_bits[dtype], exp = exp_bits[dtype];
	uint64_t state = 88172645463325252ull;

	for (size_t i = 0; i < ELEMENTS; i++) {
		uint64_t bits;

		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		bits = (state >> 63) << (mant + exp) |
		       ((1ull << (exp - 1)) - 1 - (state >> 55 & 0xff) % 12) << mant |
		       (state & ((1ull << mant) - 1));
		memcpy((char *)input + i * kvscratch_dtype_size(dtype), &bits,
		       kvscratch_dtype_size(dtype));
	}
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what, int err)
{
	fprintf(stderr, "scale_bench: %s: %s\n", what, kvscratch_strerror(err));
	exit(1);
}

static uint64_t time_arithmetic(uint32_t dtype, uint32_t stored)
{
	uint64_t start = now();
	long saturated;

	if (stored == KVSCRATCH_DTYPE_MXINT8)
		saturated = kvs_scale_mxint8(dtype, input, ELEMENTS / KVSCRATCH_MX_BLOCK,
					     (int8_t *)output, scales);
	else
		saturated = kvs_scale_fixed(dtype, input, ELEMENTS, 4,
					    kvscratch_dtype_size(stored), output);
	if (saturated < 0)
		die("convert", -EDOM);
	return now() - start;
}

static uint64_t time_append(uint32_t dtype, uint32_t stored)
{
	int fd = device_create_scaled(ROWS, DIM, stored, dtype, 0);
	uint64_t start;
	int err;

	if (fd < 0)
		die("create", fd);
	start = now();
	err = device_append(fd, input, (size_t)ELEMENTS * kvscratch_dtype_size(dtype));
	start = now() - start;
	if (err)
		die("append", err);
	close(fd);
	return start;
}

/* Hundredths, without floating point */
static void print_per_element(uint64_t ns)
{
	uint64_t hundredths = ns * 100 / ELEMENTS;

	printf(" %8" PRIu64 ".%02" PRIu64, hundredths / 100, hundredths % 100);
}

int main(void)
{
	static const uint32_t stored[] = {
		KVSCRATCH_DTYPE_MXINT8, KVSCRATCH_DTYPE_I8, KVSCRATCH_DTYPE_I16,
		KVSCRATCH_DTYPE_I32, KVSCRATCH_DTYPE_I64,
	};

	printf("from   to      arithmetic      append   append as stored\n");
	for (uint32_t dtype = KVSCRATCH_DTYPE_F64; dtype <= KVSCRATCH_DTYPE_BF16; dtype++) {
		fill_input(dtype);
		for (size_t i = 0; i < sizeof(stored) / sizeof(stored[0]); i++) {
			printf("%-6s %-7s", kvscratch_dtype_name(dtype),
			       kvscratch_dtype_name(stored[i]));
			print_per_element(time_arithmetic(dtype, stored[i]));
			print_per_element(time_append(dtype, stored[i]));
			print_per_element(time_append(dtype, dtype));
			putchar('\n');
		}
	}
	return 0;
}
