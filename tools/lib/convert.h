/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * Elements of pads that convert what they are given, by the code that the kernel runs; and
 * the way back, for rows that were saved as they are stored.
 */
#ifndef CONVERT_H
#define CONVERT_H

#include "libkvscratch.h"

/* As many at a time as fit the stack: a multiple of KVSCRATCH_MX_BLOCK */
#define CONVERT_MOST 2048

/**
 * convert_elements() - make what is stored of what is appended
 * @plane: what it is stored in
 * @in: elements of plane->input_dtype, aligned to it
 * @count: how many, at most CONVERT_MOST; whole blocks for MXINT8
 * @out: receives elements of plane->dtype, aligned to it
 * @scales: receives a byte for each block, for MXINT8
 *
 * Returns how many were clamped, or -EDOM.
 */
long convert_elements(const struct kvscratch_plane *plane, const void *in, uint32_t count,
		      void *out, uint8_t *scales);

/**
 * restore_input() - make what can be appended of what is stored
 * @plane: what they are stored in
 * @stored: elements of plane->dtype
 * @scales: their scales, for MXINT8
 * @count: how many; whole blocks for MXINT8
 * @in: receives elements of plane->input_dtype, aligned to it
 *
 * Returns whether an append of @in stores just this, as it does for all that came of a
 * conversion from that type.
 */
bool restore_input(const struct kvscratch_plane *plane, const void *stored, const uint8_t *scales,
		   uint64_t count, void *in);

#endif
