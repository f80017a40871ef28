// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "convert.h"

#include "../../kvscratch_scale.h"

#include <errno.h>
#include <math.h>
#include <string.h>

long convert_elements(const struct kvscratch_plane *plane, const void *in, uint32_t count,
		      void *out, uint8_t *scales)
{
	long clamped;

	if (plane->dtype == KVSCRATCH_DTYPE_MXINT8)
		clamped = kvs_scale_mxint8(plane->input_dtype, in, count / KVSCRATCH_MX_BLOCK, out,
					   scales);
	else
		clamped = kvs_scale_fixed(plane->input_dtype, in, count, plane->frac_bits,
					  kvscratch_dtype_size(plane->dtype), out);
	return clamped == KVS_SCALE_NOT_FINITE ? -EDOM : clamped;
}

#define LOAD(type, at) ({ type _value; memcpy(&_value, at, sizeof(_value)); _value; })

static int64_t integer_at(const char *at, uint32_t size)
{
	switch (size) {
	case 8:
		return LOAD(int64_t, at);
	case 4:
		return LOAD(int32_t, at);
	case 2:
		return LOAD(int16_t, at);
	default:
		return LOAD(int8_t, at);
	}
}

/*
 * The nearest one, but for zero: an element of other than zero that small came of a larger one,
 * which was clamped. What is too large is an infinity.
 */
static uint16_t half_of(double value)
{
	uint16_t sign = signbit(value) ? 0x8000 : 0;
	int exponent;
	double fraction = frexp(fabs(value), &exponent);

	if (fraction == 0.0)
		return sign;
	if (exponent > 16)
		return sign | 0x7c00;
	/* a fraction that is rounded up to the next power of two carries into the exponent */
	if (exponent < -13) {
		uint16_t small = ldexp(fraction, exponent + 24) + 0.5;

		return sign + (small ? small : 1);
	}
	return sign + ((exponent + 13) << 10) + (uint16_t)(ldexp(fraction, 11) + 0.5);
}

static uint16_t bfloat_of(double value)
{
	float narrow = (float)value;

	return (LOAD(uint32_t, &narrow) + 0x8000) >> 16;
}

static void store_input(void *in, uint64_t i, uint32_t dtype, double value)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_F64:
		((double *)in)[i] = value;
		break;
	case KVSCRATCH_DTYPE_F32:
		((float *)in)[i] = (float)value;
		break;
	case KVSCRATCH_DTYPE_F16:
		((uint16_t *)in)[i] = half_of(value);
		break;
	default:
		((uint16_t *)in)[i] = bfloat_of(value);
	}
}

static void scale_back(const struct kvscratch_plane *plane, const char *stored,
		       const uint8_t *scales, uint64_t count, void *in)
{
	const uint32_t size = kvscratch_dtype_size(plane->dtype);

	for (uint64_t i = 0; i < count; i++) {
		int exponent = scales ? scales[i / KVSCRATCH_MX_BLOCK] - KVS_MX_BIAS -
					KVS_MX_FRAC_BITS : -(int)plane->frac_bits;

		store_input(in, i, plane->input_dtype,
			    ldexp((double)integer_at(stored + i * size, size), exponent));
	}
}

static bool converts_to(const struct kvscratch_plane *plane, const void *in, uint32_t count,
			const void *stored, const uint8_t *scales)
{
	uint64_t out[CONVERT_MOST];
	uint8_t out_scales[CONVERT_MOST / KVSCRATCH_MX_BLOCK];

	return convert_elements(plane, in, count, out, out_scales) >= 0 &&
	       !memcmp(out, stored, (size_t)count * kvscratch_dtype_size(plane->dtype)) &&
	       (!scales || !memcmp(out_scales, scales, count / KVSCRATCH_MX_BLOCK));
}

bool restore_input(const struct kvscratch_plane *plane, const void *stored, const uint8_t *scales,
		   uint64_t count, void *in)
{
	const uint32_t stored_size = kvscratch_dtype_size(plane->dtype);
	const uint32_t input_size = kvscratch_dtype_size(plane->input_dtype);

	for (uint64_t at = 0; at < count; at += CONVERT_MOST) {
		uint32_t piece = count - at < CONVERT_MOST ? count - at : CONVERT_MOST;
		const char *from = (const char *)stored + at * stored_size;
		const uint8_t *its_scales = scales ? scales + at / KVSCRATCH_MX_BLOCK : NULL;
		char *to = (char *)in + at * input_size;

		scale_back(plane, from, its_scales, piece, to);
		if (!converts_to(plane, to, piece, from, its_scales))
			return false;
	}
	return true;
}
