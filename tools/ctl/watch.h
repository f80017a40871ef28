/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Following a pad: what happens to its rows, told as it happens.
 */
#ifndef WATCH_H
#define WATCH_H

#include "ctl.h"

struct watch;

/**
 * struct teller - what is printed
 * @row: watch->row is row number watch->seen; or NULL
 * @dropped: rows from watch->seen on were
 * @len: there are watch->seen rows; or NULL
 */
struct teller {
	void (*row)(const struct watch *watch);
	void (*dropped)(const struct watch *watch);
	void (*len)(const struct watch *watch);
};

/**
 * struct watch - a view that is followed
 * @args: what was asked for: --until
 * @sock: whose end ends the watch, or -1
 * @by_writer: the end of the pad's writer does
 * @idle_ms: and as long a time without a change, unless it is negative
 * @pad: a handle of our own
 * @selection: the planes whose rows are told
 * @tell: prints
 *
 * The rest is the watch's own:
 * @view: of the pad
 * @row: room for one row of the planes
 * @generation: of the last look
 * @seen: rows told
 * @reached: whether as many rows were seen as --until asks for
 * @had_writer: the pad had one
 */
struct watch {
	const struct arguments *args;
	int sock;
	bool by_writer;
	int64_t idle_ms;
	struct kvscratch *pad;
	struct selection selection;
	struct teller tell;
	const struct kvscratch_view *view;
	char *row;
	uint32_t generation;
	uint32_t seen;
	bool reached;
	bool had_writer;
};

/* Until it ends; returns an exit code. */
int watch_pad(struct watch *watch);

int64_t milliseconds_now(void);

#endif
