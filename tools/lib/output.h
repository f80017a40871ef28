/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * Files that are written: what is too large is an error and no signal, and a new file
 * takes the place of an old one as a whole or not at all. For the library and, as it does
 * not export this, for the tools.
 */
#ifndef OUTPUT_H
#define OUTPUT_H

#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/**
 * struct size_signal - SIGXFSZ, held back in this thread
 * @mask: the signals that were blocked before
 * @pending: whether it was pending before
 */
struct size_signal {
	sigset_t mask;
	bool pending;
};

/*
 * Between these two a write beyond RLIMIT_FSIZE is EFBIG only, whatever the program does
 * about the signal; @err is what came of the writes, 0 or a negative errno.
 */
void hold_size_signal(struct size_signal *held);
void drop_size_signal(const struct size_signal *held, int err);

/**
 * struct output - a file that is about to be replaced, or to be made
 * @fd: the new file
 * @is_new: there is no old one
 * @words: what went wrong
 * @path: what the path led to, in memory of its own
 * @name: the last component, in @path
 * @directory: where it is
 * @nameless: the new file has no name yet, so that nothing is left of it if we are killed
 * @temporary: its name in @directory until it takes @name; "" where it has none
 */
struct output {
	int fd;
	bool is_new;
	char words[160];
	char *path;
	const char *name;
	int directory;
	bool nameless;
	char temporary[24];
};

/*
 * All return 0 or a negative errno, with @words. output_close() ends what output_open()
 * began, also when that failed; unless output_replace() came before, the old file stays.
 */

/*
 * Whether a tool writes to what is there, as a shell does, instead: to devices and FIFOs, and
 * to what a descriptor is open on that @path stands for.
 */
bool output_in_place(const char *path);

/* What a symbolic link leads to is replaced, not the link; its owner and mode are kept. */
int output_open(struct output *output, const char *path);

int output_write(struct output *output, const void *bytes, uint64_t count, uint64_t offset);

/* Let the new file, all of which is written, take its place. */
int output_replace(struct output *output);

void output_close(struct output *output);

/* "a regular file" and the like, for messages */
const char *file_kind(mode_t mode);

#endif
