/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How far a long transfer is, on stderr where that is a terminal.
 */
#ifndef PROGRESS_H
#define PROGRESS_H

#include "ctl.h"

/**
 * struct progress - a bar
 * @what: what is going on
 * @shown: the percentage that the terminal has, or -1; -2 when nothing is to be shown
 */
struct progress {
	const char *what;
	int shown;
};

struct progress progress_start(const struct arguments *args, const char *what);

/* Bytes of so many; returns what interrupted() does. This is a kvscratch_progress, too. */
int progress_at(void *progress, uint64_t done, uint64_t total);

/* Clear the line. */
void progress_end(const struct progress *progress);

#endif
