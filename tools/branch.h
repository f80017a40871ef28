/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Forks of held pads, for the command-line tools.
 */
#ifndef BRANCH_H
#define BRANCH_H

#include "libkvscratch.h"

/**
 * fork_held() - fork a pad that a holder keeps
 * @child: out: the fork
 * @source: "story/k0@5", its first 5 rows, or "story/k0", all that are committed
 * @max_seq_len: rows that fit the fork, 0 for as many as fit the source
 * @input: the exit code for a source that cannot be meant
 * @refused: the exit code for anything else
 *
 * Returns 0, or an exit code after fail().
 */
int fork_held(struct kvscratch **child, const char *source, uint64_t max_seq_len, int input,
	      int refused);

#endif
