/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What a file is, by how it begins: for messages about one that is not what was expected,
 * and so that the header of another format is never taken for rows. The library does not
 * export this.
 */
#ifndef CONTAINER_H
#define CONTAINER_H

#include <stdbool.h>
#include <stddef.h>

/**
 * container_name() - which format a file has
 * @bytes: the file, or as much of it as there is
 * @size: how much that is
 *
 * Returns its name, "zip (.npz, .pt)" for example, or NULL for what is none of those that
 * it knows. Of them .npy is none, and neither is text.
 */
const char *container_name(const void *bytes, size_t size);

/* What container_name() calls the format that kvscratch_open_file() reads */
extern const char safetensors_name[];

/* Lines of printable characters, in ASCII or UTF-8 */
bool is_text(const void *bytes, size_t size);

#endif
