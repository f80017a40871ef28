/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Inputs of kvscratch_scale.h and what becomes of them. Written by
 * tests/user/scale_reference.py --golden with exact fractions: do not edit.
 */
#ifndef TESTS_SCALE_GOLDEN_H
#define TESTS_SCALE_GOLDEN_H

#include <linux/types.h>

#include "../uapi/linux/kvscratch.h"

#define SCALE_GOLDEN_PATTERN 4

/**
 * struct scale_golden_block - a block of 32 elements
 * @dtype: of the input
 * @saturated: elements of the block that are clamped; -1 if it is refused
 * @scale: the scale byte, unless it is refused
 * @elements: eight times these, unless it is refused
 * @in: eight times these bits
 */
struct scale_golden_block {
	__u32 dtype;
	int saturated;
	__u8 scale;
	__s8 elements[SCALE_GOLDEN_PATTERN];
	__u64 in[SCALE_GOLDEN_PATTERN];
};

/**
 * struct scale_golden_fixed - an element
 * @dtype: of the input
 * @frac_bits: fraction bits of the integer
 * @bytes: size of the integer
 * @saturated: 1 if it is clamped; -1 if it is refused
 * @in: the input's bits
 * @element: the integer, unless it is refused
 */
struct scale_golden_fixed {
	__u32 dtype;
	unsigned int frac_bits;
	unsigned int bytes;
	int saturated;
	__u64 in;
	__s64 element;
};

static const struct scale_golden_block scale_golden_blocks[] = {
	/* zeros, of both signs */
	{ KVSCRATCH_DTYPE_F64, 0, 0, { 0, 0, 0, 0 },
	  { 0x0000000000000000ULL, 0x8000000000000000ULL,
	    0x0000000000000000ULL, 0x8000000000000000ULL } },
	/* negative zero beside others */
	{ KVSCRATCH_DTYPE_F64, 0, 127, { 64, 0, -64, 0 },
	  { 0x3ff0000000000000ULL, 0x8000000000000000ULL,
	    0xbff0000000000000ULL, 0x0000000000000000ULL } },
	/* ties go to even */
	{ KVSCRATCH_DTYPE_F64, 0, 127, { 64, 0, -2, 2 },
	  { 0x3ff0000000000000ULL, 0x3f80000000000000ULL,
	    0xbf98000000000000ULL, 0x3fa4000000000000ULL } },
	/* next to ties */
	{ KVSCRATCH_DTYPE_F64, 0, 127, { -64, 1, 1, -3 },
	  { 0xbff0000000000000ULL, 0x3f80000000000001ULL,
	    0x3f97ffffffffffffULL, 0xbfa4000000000001ULL } },
	/* below 127.5 steps, and half a step lower */
	{ KVSCRATCH_DTYPE_F64, 0, 127, { 127, -127, 126, -126 },
	  { 0x3fffdfffffffffffULL, 0xbfffdfffffffffffULL,
	    0x3fffa00000000000ULL, 0xbfffa00000000000ULL } },
	/* 127.5 steps round to 128 */
	{ KVSCRATCH_DTYPE_F64, 16, 127, { 127, -127, 64, -127 },
	  { 0x3fffe00000000000ULL, 0xbfffe00000000000ULL,
	    0x3ff0000000000000ULL, 0xbfffc00000000000ULL } },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F64, 24, 254, { 127, -127, 127, 0 },
	  { 0x7fefffffffffffffULL, 0xffefffffffffffffULL,
	    0x7fdfffffffffffffULL, 0x0000000000000000ULL } },
	/* zeros, of both signs */
	{ KVSCRATCH_DTYPE_F32, 0, 0, { 0, 0, 0, 0 },
	  { 0x00000000ULL, 0x80000000ULL,
	    0x00000000ULL, 0x80000000ULL } },
	/* negative zero beside others */
	{ KVSCRATCH_DTYPE_F32, 0, 127, { 64, 0, -64, 0 },
	  { 0x3f800000ULL, 0x80000000ULL,
	    0xbf800000ULL, 0x00000000ULL } },
	/* ties go to even */
	{ KVSCRATCH_DTYPE_F32, 0, 127, { 64, 0, -2, 2 },
	  { 0x3f800000ULL, 0x3c000000ULL,
	    0xbcc00000ULL, 0x3d200000ULL } },
	/* next to ties */
	{ KVSCRATCH_DTYPE_F32, 0, 127, { -64, 1, 1, -3 },
	  { 0xbf800000ULL, 0x3c000001ULL,
	    0x3cbfffffULL, 0xbd200001ULL } },
	/* below 127.5 steps, and half a step lower */
	{ KVSCRATCH_DTYPE_F32, 0, 127, { 127, -127, 126, -126 },
	  { 0x3ffeffffULL, 0xbffeffffULL,
	    0x3ffd0000ULL, 0xbffd0000ULL } },
	/* 127.5 steps round to 128 */
	{ KVSCRATCH_DTYPE_F32, 16, 127, { 127, -127, 64, -127 },
	  { 0x3fff0000ULL, 0xbfff0000ULL,
	    0x3f800000ULL, 0xbffe0000ULL } },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F32, 16, 254, { 127, -127, 64, 0 },
	  { 0x7f7fffffULL, 0xff7fffffULL,
	    0x7effffffULL, 0x00000000ULL } },
	/* zeros, of both signs */
	{ KVSCRATCH_DTYPE_F16, 0, 0, { 0, 0, 0, 0 },
	  { 0x0000ULL, 0x8000ULL,
	    0x0000ULL, 0x8000ULL } },
	/* negative zero beside others */
	{ KVSCRATCH_DTYPE_F16, 0, 127, { 64, 0, -64, 0 },
	  { 0x3c00ULL, 0x8000ULL,
	    0xbc00ULL, 0x0000ULL } },
	/* ties go to even */
	{ KVSCRATCH_DTYPE_F16, 0, 127, { 64, 0, -2, 2 },
	  { 0x3c00ULL, 0x2000ULL,
	    0xa600ULL, 0x2900ULL } },
	/* next to ties */
	{ KVSCRATCH_DTYPE_F16, 0, 127, { -64, 1, 1, -3 },
	  { 0xbc00ULL, 0x2001ULL,
	    0x25ffULL, 0xa901ULL } },
	/* below 127.5 steps, and half a step lower */
	{ KVSCRATCH_DTYPE_F16, 0, 127, { 127, -127, 126, -126 },
	  { 0x3ff7ULL, 0xbff7ULL,
	    0x3fe8ULL, 0xbfe8ULL } },
	/* 127.5 steps round to 128 */
	{ KVSCRATCH_DTYPE_F16, 16, 127, { 127, -127, 64, -127 },
	  { 0x3ff8ULL, 0xbff8ULL,
	    0x3c00ULL, 0xbff0ULL } },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F16, 16, 142, { 127, -127, 64, 0 },
	  { 0x7bffULL, 0xfbffULL,
	    0x77ffULL, 0x0000ULL } },
	/* zeros, of both signs */
	{ KVSCRATCH_DTYPE_BF16, 0, 0, { 0, 0, 0, 0 },
	  { 0x0000ULL, 0x8000ULL,
	    0x0000ULL, 0x8000ULL } },
	/* negative zero beside others */
	{ KVSCRATCH_DTYPE_BF16, 0, 127, { 64, 0, -64, 0 },
	  { 0x3f80ULL, 0x8000ULL,
	    0xbf80ULL, 0x0000ULL } },
	/* ties go to even */
	{ KVSCRATCH_DTYPE_BF16, 0, 127, { 64, 0, -2, 2 },
	  { 0x3f80ULL, 0x3c00ULL,
	    0xbcc0ULL, 0x3d20ULL } },
	/* next to ties */
	{ KVSCRATCH_DTYPE_BF16, 0, 127, { -64, 1, 1, -3 },
	  { 0xbf80ULL, 0x3c01ULL,
	    0x3cbfULL, 0xbd21ULL } },
	/* 127.5 steps round to 128 */
	{ KVSCRATCH_DTYPE_BF16, 16, 127, { 127, -127, 64, -127 },
	  { 0x3fffULL, 0xbfffULL,
	    0x3f80ULL, 0xbffeULL } },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_BF16, 16, 254, { 127, -127, 64, 0 },
	  { 0x7f7fULL, 0xff7fULL,
	    0x7effULL, 0x0000ULL } },
	/* 2^-127 is where the scale ends */
	{ KVSCRATCH_DTYPE_F32, 0, 0, { 64, -1, 32, 0 },
	  { 0x00400000ULL, 0x80010000ULL,
	    0x00200000ULL, 0x80000000ULL } },
	/* largest subnormal */
	{ KVSCRATCH_DTYPE_F32, 8, 0, { 127, -64, 0, 0 },
	  { 0x007fffffULL, 0x80400000ULL,
	    0x00000000ULL, 0x00000001ULL } },
	/* below 2^-127 the scale stays */
	{ KVSCRATCH_DTYPE_F32, 0, 0, { 32, -16, 1, -6 },
	  { 0x00200000ULL, 0x80100000ULL,
	    0x00010000ULL, 0x80060000ULL } },
	/* least exponent of the common block and below */
	{ KVSCRATCH_DTYPE_F32, 0, 11, { 64, 0, 1, 0 },
	  { 0x05800000ULL, 0x82000000ULL,
	    0x02400000ULL, 0x007fffffULL } },
	/* the exponent below that one */
	{ KVSCRATCH_DTYPE_F32, 0, 10, { 64, 0, 1, 0 },
	  { 0x05000000ULL, 0x81800000ULL,
	    0x01c00000ULL, 0x007fffffULL } },
	/* 2^-127 is where the scale ends */
	{ KVSCRATCH_DTYPE_BF16, 0, 0, { 64, -1, 32, 0 },
	  { 0x0040ULL, 0x8001ULL,
	    0x0020ULL, 0x8000ULL } },
	/* largest subnormal */
	{ KVSCRATCH_DTYPE_BF16, 0, 0, { 127, -64, 0, 1 },
	  { 0x007fULL, 0x8040ULL,
	    0x0000ULL, 0x0001ULL } },
	/* below 2^-127 the scale stays */
	{ KVSCRATCH_DTYPE_BF16, 0, 0, { 32, -16, 1, -6 },
	  { 0x0020ULL, 0x8010ULL,
	    0x0001ULL, 0x8006ULL } },
	/* least exponent of the common block and below */
	{ KVSCRATCH_DTYPE_BF16, 0, 11, { 64, 0, 1, 0 },
	  { 0x0580ULL, 0x8200ULL,
	    0x0240ULL, 0x007fULL } },
	/* the exponent below that one */
	{ KVSCRATCH_DTYPE_BF16, 0, 10, { 64, 0, 1, 0 },
	  { 0x0500ULL, 0x8180ULL,
	    0x01c0ULL, 0x007fULL } },
	/* half a step of the least scale and next to it */
	{ KVSCRATCH_DTYPE_F32, 0, 0, { 0, 1, -2, 0 },
	  { 0x00008000ULL, 0x00008001ULL,
	    0x80018000ULL, 0x00000001ULL } },
	/* subnormals have their own scales */
	{ KVSCRATCH_DTYPE_F16, 0, 103, { 64, -64, 0, 0 },
	  { 0x0001ULL, 0x8001ULL,
	    0x0000ULL, 0x8000ULL } },
	/* subnormal ties */
	{ KVSCRATCH_DTYPE_F16, 0, 110, { 64, 0, -2, 2 },
	  { 0x0080ULL, 0x0001ULL,
	    0x8003ULL, 0x0005ULL } },
	/* largest subnormal */
	{ KVSCRATCH_DTYPE_F16, 16, 112, { 127, -127, 0, 0 },
	  { 0x03ffULL, 0x83fcULL,
	    0x0001ULL, 0x0004ULL } },
	/* a normal with subnormals */
	{ KVSCRATCH_DTYPE_F16, 0, 113, { 64, 1, -2, 0 },
	  { 0x0400ULL, 0x000fULL,
	    0x8018ULL, 0x0008ULL } },
	/* the scale ends at 2^127 */
	{ KVSCRATCH_DTYPE_F64, 8, 254, { 64, -127, 0, -1 },
	  { 0x47e0000000000000ULL, 0xc7efe00000000000ULL,
	    0x4770000000000000ULL, 0xc780000000000000ULL } },
	/* 2^128 or more */
	{ KVSCRATCH_DTYPE_F64, 16, 254, { 127, -64, 127, 1 },
	  { 0x47f0000000000000ULL, 0xc7e0000000000000ULL,
	    0x47efffffffffffffULL, 0x4780000000000000ULL } },
	/* far more than 2^128 */
	{ KVSCRATCH_DTYPE_F64, 24, 254, { 127, -127, 127, -64 },
	  { 0x4980000000000000ULL, 0xc9c0000000000000ULL,
	    0x52b0000000000000ULL, 0xc7e0000000000000ULL } },
	/* more than the elements could be */
	{ KVSCRATCH_DTYPE_F64, 16, 254, { 127, -127, 2, 0 },
	  { 0x4b80000000000000ULL, 0xfe70000000000000ULL,
	    0x4790000000000000ULL, 0x4770000000000000ULL } },
	/* 2^-127 is where the scale ends */
	{ KVSCRATCH_DTYPE_F64, 0, 0, { 64, 64, 0, 2 },
	  { 0x3800000000000000ULL, 0x37ffffffffffffffULL,
	    0xb790000000000000ULL, 0x37a8000000000000ULL } },
	/* half a step of the least scale */
	{ KVSCRATCH_DTYPE_F64, 0, 0, { 0, 0, 0, 0 },
	  { 0x3790000000000000ULL, 0xb790000000000000ULL,
	    0x3780000000000000ULL, 0x0000000000000000ULL } },
	/* one unit more */
	{ KVSCRATCH_DTYPE_F64, 0, 0, { 1, -1, 0, 1 },
	  { 0x3790000000000001ULL, 0xb790000000000001ULL,
	    0x3790000000000000ULL, 0x379fffffffffffffULL } },
	/* subnormals give zero */
	{ KVSCRATCH_DTYPE_F64, 0, 0, { 0, 0, 0, 0 },
	  { 0x0000000000000001ULL, 0x800fffffffffffffULL,
	    0x0010000000000000ULL, 0x8000000000000000ULL } },
	/* infinity */
	{ KVSCRATCH_DTYPE_F64, -1, 0, { 0, 0, 0, 0 },
	  { 0x3ff0000000000000ULL, 0xbff0000000000000ULL,
	    0x0000000000000000ULL, 0x7ff0000000000000ULL } },
	/* NaN */
	{ KVSCRATCH_DTYPE_F64, -1, 0, { 0, 0, 0, 0 },
	  { 0xfff0000000000001ULL, 0x3ff0000000000000ULL,
	    0x0000000000000000ULL, 0x0000000000000000ULL } },
	/* infinity */
	{ KVSCRATCH_DTYPE_F32, -1, 0, { 0, 0, 0, 0 },
	  { 0x3f800000ULL, 0xbf800000ULL,
	    0x00000000ULL, 0x7f800000ULL } },
	/* NaN */
	{ KVSCRATCH_DTYPE_F32, -1, 0, { 0, 0, 0, 0 },
	  { 0xff800001ULL, 0x3f800000ULL,
	    0x00000000ULL, 0x00000000ULL } },
	/* infinity */
	{ KVSCRATCH_DTYPE_F16, -1, 0, { 0, 0, 0, 0 },
	  { 0x3c00ULL, 0xbc00ULL,
	    0x0000ULL, 0x7c00ULL } },
	/* NaN */
	{ KVSCRATCH_DTYPE_F16, -1, 0, { 0, 0, 0, 0 },
	  { 0xfc01ULL, 0x3c00ULL,
	    0x0000ULL, 0x0000ULL } },
	/* infinity */
	{ KVSCRATCH_DTYPE_BF16, -1, 0, { 0, 0, 0, 0 },
	  { 0x3f80ULL, 0xbf80ULL,
	    0x0000ULL, 0x7f80ULL } },
	/* NaN */
	{ KVSCRATCH_DTYPE_BF16, -1, 0, { 0, 0, 0, 0 },
	  { 0xff81ULL, 0x3f80ULL,
	    0x0000ULL, 0x0000ULL } },
};

static const struct scale_golden_fixed scale_golden_fixed[] = {
	/* negative zero */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 0, 0x8000000000000000ULL, 0LL },
	/* the least magnitude */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 0, 0x8000000000000001ULL, 0LL },
	/* half goes to 0 */
	{ KVSCRATCH_DTYPE_F64, 0, 4, 0, 0xbfe0000000000000ULL, 0LL },
	/* one and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F64, 1, 1, 0, 0x3fe8000000000000ULL, 2LL },
	/* two and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F64, 2, 2, 0, 0xbfe4000000000000ULL, -2LL },
	/* one unit above half */
	{ KVSCRATCH_DTYPE_F64, 0, 8, 0, 0x3fe0000000000001ULL, 1LL },
	/* one unit below one and a half */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 0, 0x3ff7ffffffffffffULL, 1LL },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 0, 0xc060000000000000ULL, -128LL },
	/* its magnitude is one on the other side */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 1, 0x4060000000000000ULL, 127LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 1, 0x7fefffffffffffffULL, 9223372036854775807LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 1, 0xffefffffffffffffULL, (-9223372036854775807LL - 1) },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F64, 5, 2, 0, 0xc090000000000000ULL, -32768LL },
	/* the least of 64 bits is no clamp */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 0, 0xc000000000000000ULL, (-9223372036854775807LL - 1) },
	/* its magnitude is one */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 1, 0x4000000000000000ULL, 9223372036854775807LL },
	/* infinity */
	{ KVSCRATCH_DTYPE_F64, 0, 1, -1, 0x7ff0000000000000ULL, 0LL },
	/* NaN */
	{ KVSCRATCH_DTYPE_F64, 62, 8, -1, 0xfff8000000000000ULL, 0LL },
	/* negative zero */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 0, 0x80000000ULL, 0LL },
	/* the least magnitude */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 0, 0x80000001ULL, 0LL },
	/* half goes to 0 */
	{ KVSCRATCH_DTYPE_F32, 0, 4, 0, 0xbf000000ULL, 0LL },
	/* one and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F32, 1, 1, 0, 0x3f400000ULL, 2LL },
	/* two and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F32, 2, 2, 0, 0xbf200000ULL, -2LL },
	/* one unit above half */
	{ KVSCRATCH_DTYPE_F32, 0, 8, 0, 0x3f000001ULL, 1LL },
	/* one unit below one and a half */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 0, 0x3fbfffffULL, 1LL },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 0, 0xc3000000ULL, -128LL },
	/* its magnitude is one on the other side */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 1, 0x43000000ULL, 127LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 1, 0x7f7fffffULL, 9223372036854775807LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 1, 0xff7fffffULL, (-9223372036854775807LL - 1) },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F32, 5, 2, 0, 0xc4800000ULL, -32768LL },
	/* the least of 64 bits is no clamp */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 0, 0xc0000000ULL, (-9223372036854775807LL - 1) },
	/* its magnitude is one */
	{ KVSCRATCH_DTYPE_F32, 62, 8, 1, 0x40000000ULL, 9223372036854775807LL },
	/* infinity */
	{ KVSCRATCH_DTYPE_F32, 0, 1, -1, 0x7f800000ULL, 0LL },
	/* NaN */
	{ KVSCRATCH_DTYPE_F32, 62, 8, -1, 0xffc00000ULL, 0LL },
	/* negative zero */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 0, 0x8000ULL, 0LL },
	/* the least magnitude */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 0, 0x8001ULL, -274877906944LL },
	/* half goes to 0 */
	{ KVSCRATCH_DTYPE_F16, 0, 4, 0, 0xb800ULL, 0LL },
	/* one and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F16, 1, 1, 0, 0x3a00ULL, 2LL },
	/* two and a half goes to 2 */
	{ KVSCRATCH_DTYPE_F16, 2, 2, 0, 0xb900ULL, -2LL },
	/* one unit above half */
	{ KVSCRATCH_DTYPE_F16, 0, 8, 0, 0x3801ULL, 1LL },
	/* one unit below one and a half */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 0, 0x3dffULL, 1LL },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 0, 0xd800ULL, -128LL },
	/* its magnitude is one on the other side */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 1, 0x5800ULL, 127LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 1, 0x7bffULL, 9223372036854775807LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 1, 0xfbffULL, (-9223372036854775807LL - 1) },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_F16, 5, 2, 0, 0xe400ULL, -32768LL },
	/* the least of 64 bits is no clamp */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 0, 0xc000ULL, (-9223372036854775807LL - 1) },
	/* its magnitude is one */
	{ KVSCRATCH_DTYPE_F16, 62, 8, 1, 0x4000ULL, 9223372036854775807LL },
	/* infinity */
	{ KVSCRATCH_DTYPE_F16, 0, 1, -1, 0x7c00ULL, 0LL },
	/* NaN */
	{ KVSCRATCH_DTYPE_F16, 62, 8, -1, 0xfe00ULL, 0LL },
	/* negative zero */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 0, 0x8000ULL, 0LL },
	/* the least magnitude */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 0, 0x8001ULL, 0LL },
	/* half goes to 0 */
	{ KVSCRATCH_DTYPE_BF16, 0, 4, 0, 0xbf00ULL, 0LL },
	/* one and a half goes to 2 */
	{ KVSCRATCH_DTYPE_BF16, 1, 1, 0, 0x3f40ULL, 2LL },
	/* two and a half goes to 2 */
	{ KVSCRATCH_DTYPE_BF16, 2, 2, 0, 0xbf20ULL, -2LL },
	/* one unit above half */
	{ KVSCRATCH_DTYPE_BF16, 0, 8, 0, 0x3f01ULL, 1LL },
	/* one unit below one and a half */
	{ KVSCRATCH_DTYPE_BF16, 0, 1, 0, 0x3fbfULL, 1LL },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_BF16, 0, 1, 0, 0xc300ULL, -128LL },
	/* its magnitude is one on the other side */
	{ KVSCRATCH_DTYPE_BF16, 0, 1, 1, 0x4300ULL, 127LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 1, 0x7f7fULL, 9223372036854775807LL },
	/* the largest finite value */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 1, 0xff7fULL, (-9223372036854775807LL - 1) },
	/* the least integer is no clamp */
	{ KVSCRATCH_DTYPE_BF16, 5, 2, 0, 0xc480ULL, -32768LL },
	/* the least of 64 bits is no clamp */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 0, 0xc000ULL, (-9223372036854775807LL - 1) },
	/* its magnitude is one */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, 1, 0x4000ULL, 9223372036854775807LL },
	/* infinity */
	{ KVSCRATCH_DTYPE_BF16, 0, 1, -1, 0x7f80ULL, 0LL },
	/* NaN */
	{ KVSCRATCH_DTYPE_BF16, 62, 8, -1, 0xffc0ULL, 0LL },
	/* 127.5 rounds to 128 */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 1, 0x405fe00000000000ULL, 127LL },
	/* -128.5 rounds to -128 */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 0, 0xc060100000000000ULL, -128LL },
	/* a unit below 127.5 */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 0, 0x405fdfffffffffffULL, 127LL },
	/* a unit beyond -128.5 */
	{ KVSCRATCH_DTYPE_F64, 0, 1, 1, 0xc060100000000001ULL, -128LL },
	/* 127.5 rounds to 128 */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 1, 0x42ff0000ULL, 127LL },
	/* -128.5 rounds to -128 */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 0, 0xc3008000ULL, -128LL },
	/* a unit below 127.5 */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 0, 0x42feffffULL, 127LL },
	/* a unit beyond -128.5 */
	{ KVSCRATCH_DTYPE_F32, 0, 1, 1, 0xc3008001ULL, -128LL },
	/* 127.5 rounds to 128 */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 1, 0x57f8ULL, 127LL },
	/* -128.5 rounds to -128 */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 0, 0xd804ULL, -128LL },
	/* a unit below 127.5 */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 0, 0x57f7ULL, 127LL },
	/* a unit beyond -128.5 */
	{ KVSCRATCH_DTYPE_F16, 0, 1, 1, 0xd805ULL, -128LL },
	/* -32768.5 rounds to -32768 */
	{ KVSCRATCH_DTYPE_F64, 0, 2, 0, 0xc0e0001000000000ULL, -32768LL },
	/* 32767.5 rounds to 32768 */
	{ KVSCRATCH_DTYPE_F64, 0, 2, 1, 0x40dfffe000000000ULL, 32767LL },
	/* -32769 does not fit */
	{ KVSCRATCH_DTYPE_F64, 16, 2, 1, 0xbfe0002000000000ULL, -32768LL },
	/* largest below 2^63 */
	{ KVSCRATCH_DTYPE_F64, 0, 8, 0, 0x43dfffffffffffffULL, 9223372036854774784LL },
	/* next beyond -2^63 */
	{ KVSCRATCH_DTYPE_F64, 0, 8, 1, 0xc3e0000000000001ULL, (-9223372036854775807LL - 1) },
	/* -32768.5 rounds to -32768 */
	{ KVSCRATCH_DTYPE_F32, 0, 2, 0, 0xc7000080ULL, -32768LL },
	/* 32767.5 rounds to 32768 */
	{ KVSCRATCH_DTYPE_F32, 0, 2, 1, 0x46ffff00ULL, 32767LL },
	/* -32769 does not fit */
	{ KVSCRATCH_DTYPE_F32, 16, 2, 1, 0xbf000100ULL, -32768LL },
	/* largest below 2^63 */
	{ KVSCRATCH_DTYPE_F32, 0, 8, 0, 0x5effffffULL, 9223371487098961920LL },
	/* next beyond -2^63 */
	{ KVSCRATCH_DTYPE_F32, 0, 8, 1, 0xdf000001ULL, (-9223372036854775807LL - 1) },
	/* the largest of 32 bits */
	{ KVSCRATCH_DTYPE_F64, 0, 4, 0, 0x41dfffffffc00000ULL, 2147483647LL },
	/* half below 2^31 */
	{ KVSCRATCH_DTYPE_F64, 0, 4, 1, 0x41dfffffffe00000ULL, 2147483647LL },
	/* half beyond -2^31 */
	{ KVSCRATCH_DTYPE_F64, 0, 4, 0, 0xc1e0000000100000ULL, -2147483648LL },
	/* a unit beyond that */
	{ KVSCRATCH_DTYPE_F64, 0, 4, 1, 0xc1e0000000100001ULL, -2147483648LL },
	/* all bits of a fraction */
	{ KVSCRATCH_DTYPE_F64, 52, 8, 0, 0x3fffffffffffffffULL, 9007199254740991LL },
	/* a fraction at the top of 64 bits */
	{ KVSCRATCH_DTYPE_F64, 62, 8, 0, 0x3fdfffffffffffffULL, 2305843009213693696LL },
};

#endif
