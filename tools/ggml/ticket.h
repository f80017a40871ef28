/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * A ticket: what a saved sequence has in the place of the rows of each plane. The plug-in
 * for ggml takes it for the rows themselves, which it finds in a pad that is held.
 */
#ifndef KVSCRATCH_GGML_TICKET_H
#define KVSCRATCH_GGML_TICKET_H

#include <stdint.h>

#define TICKET_MAGIC "KVSCRATCH-TICKET"
#define TICKET_NAME_BYTES 40

/**
 * struct ticket - the first bytes of the rows of a plane
 * @magic: TICKET_MAGIC, without its NUL
 * @pad: holder/pad, padded by NUL
 * @cells_hash: ticket_hash() of the cells of the rows: the pad may have been rewritten
 *
 * Numbers are little-endian, as all in such files.
 */
struct ticket {
	char magic[16];
	char pad[TICKET_NAME_BYTES];
	uint64_t cells_hash;
};

/* FNV-1a of 64 bits, http://www.isthe.com/chongo/tech/comp/fnv/ */
static inline uint64_t ticket_hash(const void *data, uint64_t bytes)
{
	uint64_t hash = 0xcbf29ce484222325;

	for (uint64_t i = 0; i < bytes; i++)
		hash = (hash ^ ((const uint8_t *)data)[i]) * 0x100000001b3;
	return hash;
}

#endif
