/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is fuzzed of reading files. Each target takes any bytes and returns whether they
 * were accepted; what does not hold ends the process.
 */
#ifndef TESTS_FILES_TARGETS_H
#define TESTS_FILES_TARGETS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The bytes are a .npy file: its header. */
bool fuzz_npy(const uint8_t *bytes, size_t size);

/* The bytes are a u64, how much data there is, and a safetensors header without its length. */
bool fuzz_safetensors(const uint8_t *bytes, size_t size);

/* The bytes are a file of either kind: it is opened, loaded, saved and opened again. */
bool fuzz_files(const uint8_t *bytes, size_t size);

#endif
