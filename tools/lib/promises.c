// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * What each backend keeps of what a pad promises. kvscratch_promises(3) says
 * the same; the tests of the library try each that a program can.
 */
#include "backend.h"

#define KEPT(...) { __VA_ARGS__, NULL, true }
#define NOT_KEPT(...) { __VA_ARGS__, false }

#define WHOLE_APPENDS	"whole-appends", "an append is committed as a whole or not at all"
#define NO_TORN_ROWS	"no-torn-rows", "no reader is handed part of a row or of a batch"
#define ZERO_COPY	"zero-copy-views", "views are contiguous, live and without a copy"
#define LIFETIME	"lifetime", "a pad lives exactly as long as somebody holds it"
#define ACCOUNTED	"accounted", "memory is charged to the cgroup of the creator"
#define ONE_WRITER	"one-writer", "while a pad has a writer nobody else changes it"
#define FENCED		"fenced-takeover", "a takeover waits for nobody, and nothing of the old writer lands after it"
#define IMMUTABLE	"immutable-rows", "committed rows do not change until a truncate, those of a sealed pad never"
#define READ_ONLY	"read-only-handles", "who was given a handle for reading cannot write"
#define NO_ALLOCATION	"no-allocation", "an append allocates no memory"
#define FAULTLESS	"faultless-views", "reading a mapped view takes no page fault"
#define BOUNDED		"bounded", "limits refuse a new pad and kill nobody"
#define POLL		"poll", "poll() and epoll report appends and truncates"

static const struct kvscratch_promise kernel_promises[] = {
	KEPT(WHOLE_APPENDS),
	KEPT(NO_TORN_ROWS),
	KEPT(ZERO_COPY),
	KEPT(LIFETIME),
	KEPT(ACCOUNTED),
	KEPT(ONE_WRITER),
	KEPT(FENCED),
	KEPT(IMMUTABLE),
	KEPT(READ_ONLY),
	KEPT(NO_ALLOCATION),
	KEPT(FAULTLESS),
	KEPT(BOUNDED),
	KEPT(POLL),
	{ NULL, NULL, NULL, false },
};

/* The first ones as long as all who write do it through this library */
static const struct kvscratch_promise memfd_promises[] = {
	KEPT(WHOLE_APPENDS),
	KEPT(NO_TORN_ROWS),
	KEPT(ZERO_COPY),
	KEPT(LIFETIME),
	KEPT(ACCOUNTED),
	KEPT(ONE_WRITER),
	NOT_KEPT(FENCED, "a takeover waits for the end of the call that the old writer is in"),
	NOT_KEPT(IMMUTABLE, "whoever can write can overwrite any row, outside the library"),
	NOT_KEPT(READ_ONLY, "the same user can open the memfd again for writing through /proc; any reader can lock it"),
	NOT_KEPT(NO_ALLOCATION, "a page that was swapped out has to be read back"),
	NOT_KEPT(FAULTLESS, "pages can be swapped out and migrated"),
	NOT_KEPT(BOUNDED, "half of RAM per pad is the only limit; a full cgroup's OOM killer ends the creator"),
	NOT_KEPT(POLL, "a memfd is always ready; kvscratch_wait() works"),
	{ NULL, NULL, NULL, false },
};

const struct kvscratch_promise *kvscratch_promises(enum kvscratch_backend backend)
{
	return backend == KVSCRATCH_BACKEND_MEMFD ? memfd_promises : kernel_promises;
}
