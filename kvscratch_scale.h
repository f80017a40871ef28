/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * kvscratch: floating-point rows to scaled integers, without floating point
 *
 * Pure functions over arrays, compiled alike into the module and into user
 * programs: no kernel header, no state, no FPU. IEEE 754 elements are taken
 * apart with integer arithmetic, and every result is the exact value rounded
 * once, half to even.
 *
 * MXINT8 is the format of that name in the OCP Microscaling Formats (MX)
 * Specification 1.0: blocks of 32 elements of INT8 share a scale, an E8M0
 * byte with bias 127. For a block whose largest magnitude is a > 0
 *
 *   e       = floor(log2(a)), clamped to -127 .. 127
 *   scale   = e + 127
 *   element = round(x * 2^(6 - e)), clamped to -127 .. 127
 *   value   = element * 2^-6 * 2^e
 *
 * and a block of zeros has a scale byte of 0 and elements of 0.
 *
 * FIXED elements have f fraction bits: element = round(x * 2^f), clamped to the
 * range of their type; value = element * 2^-f.
 *
 * At the edges:
 *
 * - a magnitude that rounds to 128 of the block's steps becomes 127, and so
 *   does what is 2^128 or more in f64; each counts as saturated
 * - below 2^-127 the scale stays at 2^-127 and elements lose bits: subnormal f32
 *   and bf16 still give up to 64 steps, f64 below 2^-134 gives 0
 * - f16 never leaves the range; its subnormals have scales down to 2^-24
 * - negative zero gives 0
 * - the most negative integer of a FIXED type is not saturated if the value
 *   is exactly or by rounding that
 * - infinities and NaN are refused
 */
#ifndef _KVSCRATCH_SCALE_H
#define _KVSCRATCH_SCALE_H

#include <linux/types.h>
#ifndef __KERNEL__
#include <sys/cdefs.h>	/* __always_inline */
#endif

#include "uapi/linux/kvscratch.h"

#define KVS_MX_BLOCK		KVSCRATCH_MX_BLOCK
#define KVS_MX_MAX_EXPONENT	127
#define KVS_MX_BIAS		127
#define KVS_MX_FRAC_BITS	6
#define KVS_MX_MAX_ELEMENT	127

/* A NaN or an infinity is among the input. */
#define KVS_SCALE_NOT_FINITE	(-1)

/* Callers hand over float[], double[], int64_t[]: their memory, by another name */
typedef __u16 __attribute__((__may_alias__)) kvs_u16;
typedef __u32 __attribute__((__may_alias__)) kvs_u32;
typedef __u64 __attribute__((__may_alias__)) kvs_u64;

/**
 * struct kvs_float - layout of an IEEE 754 format
 * @mant_bits: bits of the fraction
 * @exp_bits: bits of the exponent
 */
struct kvs_float {
	unsigned int mant_bits;
	unsigned int exp_bits;
};

#define KVS_F64		((struct kvs_float) { 52, 11 })
#define KVS_F32		((struct kvs_float) { 23, 8 })
#define KVS_F16		((struct kvs_float) { 10, 5 })
#define KVS_BF16	((struct kvs_float) { 7, 8 })

static __always_inline int kvs_float_bias(struct kvs_float format)
{
	return (1 << (format.exp_bits - 1)) - 1;
}

static __always_inline unsigned int kvs_float_bits(struct kvs_float format)
{
	return 1 + format.exp_bits + format.mant_bits;
}

/* Without the sign */
static __always_inline __u64 kvs_float_abs(struct kvs_float format, __u64 bits)
{
	return bits & ((1ULL << (kvs_float_bits(format) - 1)) - 1);
}

static __always_inline __u64 kvs_float_infinity(struct kvs_float format)
{
	return ((1ULL << format.exp_bits) - 1) << format.mant_bits;
}

/**
 * struct kvs_parts - a finite magnitude: mant * 2^exp
 * @mant: the fraction with its implicit bit
 * @exp: the exponent of the fraction's last bit
 */
struct kvs_parts {
	__u64 mant;
	int exp;
};

static __always_inline struct kvs_parts kvs_float_parts(struct kvs_float format, __u64 abs)
{
	int exp = abs >> format.mant_bits;
	int normal = exp != 0;

	return (struct kvs_parts) {
		.mant = (abs & ((1ULL << format.mant_bits) - 1)) |
			(__u64)normal << format.mant_bits,
		.exp = exp - normal + 1 - kvs_float_bias(format) - (int)format.mant_bits,
	};
}

/* mant * 2^-shift, rounded half to even; @mant below 2^62, @shift at least 1 */
static __always_inline __u64 kvs_round_shift(__u64 mant, unsigned int shift)
{
	if (shift > 63)
		return 0;
	return (mant + ((1ULL << (shift - 1)) - 1) + (mant >> shift & 1)) >> shift;
}

/* floor(log2()) of a magnitude that is not zero */
static __always_inline int kvs_float_log2(struct kvs_float format, __u64 abs)
{
	struct kvs_parts parts = kvs_float_parts(format, abs);

	return 63 - __builtin_clzll(parts.mant) + parts.exp;
}

/* |x| * 2^(6 - e), rounded; 128 stands for that and all above */
static __always_inline unsigned int kvs_mx_magnitude(struct kvs_float format, __u64 abs, int e)
{
	struct kvs_parts parts = kvs_float_parts(format, abs);
	/* eight more bits, so that it is always a shift to the right */
	int shift = e - KVS_MX_FRAC_BITS - parts.exp + 8;
	__u64 magnitude = KVS_MX_MAX_ELEMENT + 1;

	/* far beyond 2^127, where the scale ends, it is no shift to the right */
	if (shift >= 1)
		magnitude = kvs_round_shift(parts.mant << 8, shift);
	return magnitude > KVS_MX_MAX_ELEMENT ? KVS_MX_MAX_ELEMENT + 1 : magnitude;
}

static __always_inline __u64 kvs_float_load(struct kvs_float format, const void *in,
					    unsigned int i)
{
	switch (kvs_float_bits(format)) {
	case 64:
		return ((const kvs_u64 *)in)[i];
	case 32:
		return ((const kvs_u32 *)in)[i];
	default:
		return ((const kvs_u16 *)in)[i];
	}
}

/*
 * The largest magnitude of a block. Shifting the sign out is cheaper than masking
 * it, and 32-bit registers are where they suffice.
 */
static __always_inline __u64 kvs_mx_max(struct kvs_float format, const void *in)
{
	const unsigned int unused = 32 - kvs_float_bits(format) % 64;
	__u32 narrow = 0;
	__u64 wide = 0;
	int i;

	if (kvs_float_bits(format) == 64) {
#pragma GCC unroll 32
		for (i = 0; i < KVS_MX_BLOCK; i++) {
			__u64 doubled = ((const kvs_u64 *)in)[i] << 1;

			if (doubled > wide)
				wide = doubled;
		}
		return wide >> 1;
	}
#pragma GCC unroll 32
	for (i = 0; i < KVS_MX_BLOCK; i++) {
		__u32 doubled = (__u32)kvs_float_load(format, in, i) << (unused + 1);

		if (doubled > narrow)
			narrow = doubled;
	}
	return narrow >> (unused + 1);
}

/*
 * The common block of 16- or 32-bit elements: what is not negligible is normal,
 * and the scale is not clamped. Each magnitude is laid out as 32 bits of integer
 * and 32 of fraction by one variable shift. @clamp: whether a magnitude can be
 * 128. Returns how many were clamped.
 */
static __always_inline int kvs_mx_block_narrow(struct kvs_float format, const void *in,
					       __s8 *elements, int max_exp, int clamp)
{
	int saturated = 0;
	/* from the exponent of an element to the shift of its fraction */
	const int base = max_exp - (32 - ((int)format.mant_bits - KVS_MX_FRAC_BITS));
	const unsigned int unused = 32 - kvs_float_bits(format);
	int least = 0;
	int i;

	/* in a register, instead of being loaded for each element */
	__asm__("" : "+r" (least));
#pragma GCC unroll 16
	for (i = 0; i < KVS_MX_BLOCK; i++) {
		__u32 bits = (__u32)kvs_float_load(format, in, i) << unused;
		int sign = (__s32)bits >> 31;
		int shift = (int)(bits * 2 >> (32 - format.exp_bits)) - base;
		__u64 fixed = (bits >> unused & ((1U << format.mant_bits) - 1)) |
			      1U << format.mant_bits;
		int magnitude;

		/* far below half a step: any shift will do that keeps it there */
		if (shift < 0)
			shift = least;
		fixed <<= shift;
		fixed += 0x7fffffff + (fixed >> 32 & 1);
		magnitude = fixed >> 32;
		if (clamp) {
			saturated += magnitude >> 7;
			magnitude -= magnitude >> 7;
		}
		elements[i] = (magnitude ^ sign) - sign;
	}
	return saturated;
}

/*
 * The same for f64: 8 bits of integer and 56 of fraction, by a shift to the right.
 * The bits that it loses belong to magnitudes below half a step.
 */
static __always_inline int kvs_mx_block_f64(const void *in, __s8 *elements, int max_exp,
					    int clamp)
{
	/* an element with this exponent is shifted out, to the last bit */
	const int base = max_exp - 62;
	int saturated = 0;
	int least = 0;
	int i;

	/* in a register, instead of being loaded for each element */
	__asm__("" : "+r" (least));
#pragma GCC unroll 16
	for (i = 0; i < KVS_MX_BLOCK; i++) {
		__u64 bits = ((const kvs_u64 *)in)[i];
		__u64 fixed = bits << 11 | 1ULL << 63;
		int sign = (__s64)bits >> 63;
		int above = (int)(bits << 1 >> 53) - base;
		int magnitude;

		if (above < 0)
			above = least;
		/* by 63 - above, 1 to 63 */
		fixed >>= ~above & 63;
		fixed += (1ULL << 55) - 1 + (fixed >> 56 & 1);
		magnitude = fixed >> 56;
		if (clamp) {
			saturated += magnitude >> 7;
			magnitude -= magnitude >> 7;
		}
		elements[i] = (magnitude ^ sign) - sign;
	}
	return saturated;
}

/* Any block that is not zero, element by element; returns how many were clamped */
static unsigned int kvs_mx_block_any(struct kvs_float format, const void *in, __s8 *elements, int e)
{
	unsigned int saturated = 0;
	unsigned int i;

	for (i = 0; i < KVS_MX_BLOCK; i++) {
		__u64 bits = kvs_float_load(format, in, i);
		unsigned int magnitude = kvs_mx_magnitude(format, kvs_float_abs(format, bits), e);
		int sign = -(int)(bits >> (kvs_float_bits(format) - 1));

		if (magnitude > KVS_MX_MAX_ELEMENT) {
			magnitude = KVS_MX_MAX_ELEMENT;
			saturated++;
		}
		elements[i] = ((int)magnitude ^ sign) - sign;
	}
	return saturated;
}

static __always_inline int kvs_mx_block(struct kvs_float format, const void *in, __s8 *elements,
					__u8 *scale)
{
	__u64 max = kvs_mx_max(format, in);
	int max_exp = max >> format.mant_bits;
	int bias = kvs_float_bias(format);
	/* the part of the fraction from which the largest one rounds to 128 */
	__u64 full = ((1ULL << 8) - 1) << (format.mant_bits - KVS_MX_FRAC_BITS - 1);
	__u64 mant = (max & ((1ULL << format.mant_bits) - 1)) | 1ULL << format.mant_bits;
	int e;

	if (max >= kvs_float_infinity(format))
		return KVS_SCALE_NOT_FINITE;
	/* a subnormal stays below half a step when the largest one is so far above */
	if (max_exp > 10 && max_exp - bias >= -KVS_MX_BIAS &&
	    max_exp - bias <= KVS_MX_MAX_EXPONENT) {
		*scale = max_exp - bias + KVS_MX_BIAS;
		if (format.mant_bits == 52)
			return mant < full ? kvs_mx_block_f64(in, elements, max_exp, 0) :
					     kvs_mx_block_f64(in, elements, max_exp, 1);
		return mant < full ? kvs_mx_block_narrow(format, in, elements, max_exp, 0) :
				     kvs_mx_block_narrow(format, in, elements, max_exp, 1);
	}
	if (!max) {
		*scale = 0;
		__builtin_memset(elements, 0, KVS_MX_BLOCK);
		return 0;
	}
	e = kvs_float_log2(format, max);
	if (e < -KVS_MX_BIAS)
		e = -KVS_MX_BIAS;
	if (e > KVS_MX_MAX_EXPONENT)
		e = KVS_MX_MAX_EXPONENT;
	*scale = e + KVS_MX_BIAS;
	return kvs_mx_block_any(format, in, elements, e);
}

static __always_inline long kvs_mx_blocks(struct kvs_float format, const void *in,
					  unsigned long blocks, __s8 *elements, __u8 *scales)
{
	const unsigned int block_bytes = KVS_MX_BLOCK * kvs_float_bits(format) / 8;
	long saturated = 0;
	unsigned long i;

	for (i = 0; i < blocks; i++) {
		int clamped = kvs_mx_block(format, (const char *)in + i * block_bytes,
					   elements + i * KVS_MX_BLOCK, &scales[i]);

		if (clamped < 0)
			return KVS_SCALE_NOT_FINITE;
		saturated += clamped;
	}
	return saturated;
}

/**
 * kvs_scale_mxint8() - convert blocks of 32 elements to MXINT8
 * @dtype: F64, F32, F16 or BF16 of &enum kvscratch_dtype: what is converted
 * @in: the input, aligned to its elements
 * @blocks: how many
 * @elements: receives 32 elements per block
 * @scales: receives a byte per block
 *
 * Return: how many elements were clamped, or KVS_SCALE_NOT_FINITE, and then
 * what was written is unspecified.
 */
static inline long kvs_scale_mxint8(__u32 dtype, const void *in, unsigned long blocks,
				    __s8 *elements, __u8 *scales)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
		return kvs_mx_blocks(KVS_F64, in, blocks, elements, scales);
	case KVSCRATCH_DTYPE_F32:
		return kvs_mx_blocks(KVS_F32, in, blocks, elements, scales);
	case KVSCRATCH_DTYPE_F16:
		return kvs_mx_blocks(KVS_F16, in, blocks, elements, scales);
	default:
		return kvs_mx_blocks(KVS_BF16, in, blocks, elements, scales);
	}
}

/* |x| * 2^frac_bits, rounded; 2^64 - 1 stands for that and all above */
static __always_inline __u64 kvs_fixed_magnitude(struct kvs_float format, __u64 abs,
						 unsigned int frac_bits)
{
	struct kvs_parts parts = kvs_float_parts(format, abs);
	int left = parts.exp + (int)frac_bits;

	if (left < 0)
		return kvs_round_shift(parts.mant, -left);
	if (left <= 63 - (int)format.mant_bits)
		return parts.mant << left;
	/* only a normal one has such an exponent */
	return parts.mant ? ~0ULL : 0;
}

static __always_inline long kvs_fixed(struct kvs_float format, const void *in, unsigned long count,
				      unsigned int frac_bits, unsigned int bytes, void *out)
{
	const __u64 max = (1ULL << (8 * bytes - 1)) - 1;
	long saturated = 0;
	unsigned long i;

	for (i = 0; i < count; i++) {
		__u64 bits = kvs_float_load(format, in, i);
		__u64 abs = kvs_float_abs(format, bits);
		__u64 negative = bits >> (kvs_float_bits(format) - 1);
		__u64 magnitude, element;

		if (abs >= kvs_float_infinity(format))
			return KVS_SCALE_NOT_FINITE;
		magnitude = kvs_fixed_magnitude(format, abs, frac_bits);
		/* the negative side has one more */
		if (magnitude > max + negative) {
			magnitude = max + negative;
			saturated++;
		}
		element = (magnitude ^ -negative) + negative;
		switch (bytes) {
		case 1:
			((__u8 *)out)[i] = element;
			break;
		case 2:
			((kvs_u16 *)out)[i] = element;
			break;
		case 4:
			((kvs_u32 *)out)[i] = element;
			break;
		default:
			((kvs_u64 *)out)[i] = element;
		}
	}
	return saturated;
}

static __always_inline long kvs_fixed_from(struct kvs_float format, const void *in,
					   unsigned long count, unsigned int frac_bits,
					   unsigned int bytes, void *out)
{
	switch (bytes) {
	case 1:
		return kvs_fixed(format, in, count, frac_bits, 1, out);
	case 2:
		return kvs_fixed(format, in, count, frac_bits, 2, out);
	case 4:
		return kvs_fixed(format, in, count, frac_bits, 4, out);
	default:
		return kvs_fixed(format, in, count, frac_bits, 8, out);
	}
}

/**
 * kvs_scale_fixed() - convert elements to integers with fraction bits
 * @dtype: F64, F32, F16 or BF16 of &enum kvscratch_dtype: what is converted
 * @in: the input, aligned to its elements
 * @count: how many elements
 * @frac_bits: 0 to 62
 * @bytes: 1, 2, 4 or 8: how large the integers are
 * @out: receives them, aligned to them
 *
 * Return: how many elements were clamped, or KVS_SCALE_NOT_FINITE, and then
 * what was written is unspecified.
 */
static inline long kvs_scale_fixed(__u32 dtype, const void *in, unsigned long count,
				   unsigned int frac_bits, unsigned int bytes, void *out)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
		return kvs_fixed_from(KVS_F64, in, count, frac_bits, bytes, out);
	case KVSCRATCH_DTYPE_F32:
		return kvs_fixed_from(KVS_F32, in, count, frac_bits, bytes, out);
	case KVSCRATCH_DTYPE_F16:
		return kvs_fixed_from(KVS_F16, in, count, frac_bits, bytes, out);
	default:
		return kvs_fixed_from(KVS_BF16, in, count, frac_bits, bytes, out);
	}
}

#endif
