// SPDX-License-Identifier: GPL-2.0-only
/*
 * Rows as text.
 */
#include "ctl.h"

#include <inttypes.h>
#include <string.h>

/* A value's text: sign, 17 digits, point and exponent, or 20 digits of an integer */
#define TEXT_BYTES 32

static double half_value(uint16_t bits)
{
	int exponent = bits >> 10 & 0x1f;
	double fraction = bits & 0x3ff;
	double value;

	if (exponent == 0x1f)
		value = fraction ? __builtin_nan("") : __builtin_inf();
	else if (exponent)
		value = __builtin_ldexp(fraction + 1024, exponent - 25);
	else
		value = __builtin_ldexp(fraction, -24);
	return bits & 0x8000 ? -value : value;
}

static double bfloat_value(uint16_t bits)
{
	uint32_t wide = (uint32_t)bits << 16;
	float value;

	memcpy(&value, &wide, sizeof(value));
	return (double)value;
}

#define LOAD(type, at) ({ type _value; memcpy(&_value, at, sizeof(_value)); _value; })

static int64_t integer_at(uint32_t dtype, const char *at)
{
	switch (dtype) {
	case KVSCRATCH_DTYPE_I64:
		return LOAD(int64_t, at);
	case KVSCRATCH_DTYPE_I32:
		return LOAD(int32_t, at);
	case KVSCRATCH_DTYPE_I16:
		return LOAD(int16_t, at);
	case KVSCRATCH_DTYPE_U8:
		return LOAD(uint8_t, at);
	default:
		return LOAD(int8_t, at);
	}
}

/* The scale byte of E8M0 that makes its block NaN */
#define MX_NAN_SCALE 255

double scaled_value(const struct kvscratch_plane *plane, const char *row, uint32_t i)
{
	const char *at = row + (size_t)i * kvscratch_dtype_size(plane->dtype);
	uint8_t scale;

	if (plane->dtype != KVSCRATCH_DTYPE_MXINT8)
		return __builtin_ldexp((double)integer_at(plane->dtype, at), -(int)plane->frac_bits);
	scale = LOAD(uint8_t, row + plane->row_bytes + i / KVSCRATCH_MX_BLOCK);
	if (scale == MX_NAN_SCALE)
		return __builtin_nan("");
	return __builtin_ldexp((double)integer_at(plane->dtype, at), scale - 127 - 6);
}

/* With as many digits as tell two values apart */
static void format_element(char *text, const struct kvscratch_plane *plane, const char *row,
			   uint32_t i)
{
	const char *at = row + (size_t)i * kvscratch_dtype_size(plane->dtype);
	bool scaled = plane->dtype == KVSCRATCH_DTYPE_MXINT8 || plane->frac_bits;
	double value;
	int digits;

	switch (scaled ? 0 : plane->dtype) {
	case 0:
		value = scaled_value(plane, row, i);
		digits = 17;
		break;
	case KVSCRATCH_DTYPE_F64:
		value = LOAD(double, at);
		digits = 17;
		break;
	case KVSCRATCH_DTYPE_F32:
		value = (double)LOAD(float, at);
		digits = 9;
		break;
	case KVSCRATCH_DTYPE_F16:
		value = half_value(LOAD(uint16_t, at));
		digits = 5;
		break;
	case KVSCRATCH_DTYPE_BF16:
		value = bfloat_value(LOAD(uint16_t, at));
		digits = 4;
		break;
	default:
		snprintf(text, TEXT_BYTES, "%" PRId64, integer_at(plane->dtype, at));
		return;
	}
	snprintf(text, TEXT_BYTES, "%.*g", digits, value);
}

void print_row(const struct kvscratch_plane *plane, const char *row)
{
	char text[TEXT_BYTES];

	for (uint32_t i = 0; i < plane->dim; i++) {
		format_element(text, plane, row, i);
		if (i)
			putchar(' ');
		fputs(text, stdout);
	}
	putchar('\n');
}

/* JSON has neither NaN nor infinity: null, and a number that is too large for a double */
static const char *json_text(const char *text)
{
	if (strstr(text, "nan"))
		return "null";
	if (strstr(text, "inf"))
		return *text == '-' ? "-1e999" : "1e999";
	return text;
}

void print_json_row(const struct kvscratch_plane *plane, const char *row)
{
	char text[TEXT_BYTES];

	putchar('[');
	for (uint32_t i = 0; i < plane->dim; i++) {
		format_element(text, plane, row, i);
		if (i)
			fputs(", ", stdout);
		fputs(json_text(text), stdout);
	}
	putchar(']');
}
