/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the verbs of kvscratchctl share: their arguments, the pad they work on, and how
 * it is printed.
 */
#ifndef CTL_H
#define CTL_H

#include "../cli.h"
#include "libkvscratch.h"

#include <stdio.h>

enum exit_code {
	EXIT_DONE = 0,
	EXIT_INPUT = 1,
	EXIT_SYSTEM = 2,
};

#define DEFAULT_FD 3

/* A held pad that nobody named */
#define ONLY_PAD "pad"

enum option_id {
	OPT_HELP = 1,
	OPT_FD,
	OPT_NAME,
	OPT_MAX_SEQ_LEN,
	OPT_DIM,
	OPT_DTYPE,
	OPT_INPUT,
	OPT_FRAC_BITS,
	OPT_LEN,
	OPT_ZERO,
	OPT_JSON,
	OPT_FORMAT,
	OPT_OUTPUT,
	OPT_SOCKET,
	OPT_PAD,
	OPT_ROWS,
	OPT_UNTIL,
	OPT_TIMEOUT,
	OPT_WRITE,
	OPT_FOREGROUND,
	OPT_NO_PROGRESS,
	OPT_PLANES,
	OPT_PLANES_FILE,
	OPT_TAG,
	OPT_PLANE,
	OPT_REPLACE,
	OPT_TREE,
	OPT_STATE_VERSION,
	OPT_SLOT,
	OPT_SLOT_DIR,
};

enum format { FORMAT_AUTO, FORMAT_TEXT, FORMAT_RAW, FORMAT_NPY, FORMAT_JSON };

/**
 * struct arguments - what the command line says
 * @given: a bit per option
 * @argument: the first one that is no option, or NULL
 * @second: the next one, of a verb that takes two, or NULL
 * @third: of one that takes three, or NULL
 * @command: behind --, ended by NULL; or NULL
 * @plane_values: of --plane, in their order
 * @nr_plane_values: how many
 * others: the values of options
 */
struct arguments {
	uint32_t given;
	int fd;
	const char *name;
	uint64_t max_seq_len;
	uint64_t dim;
	uint32_t dtype;
	uint32_t input_dtype;
	uint64_t frac_bits;
	const char *planes;
	const char *planes_file;
	const char *tag;
	uint64_t len;
	enum format format;
	const char *output;
	const char *socket;
	const char *pad;
	uint64_t until;
	uint64_t timeout;
	const char *argument;
	const char *second;
	const char *third;
	uint64_t state_version;
	uint64_t slot;
	const char *slot_dir;
	char **command;
	const char *plane_values[KVSCRATCH_MAX_PLANES];
	unsigned int nr_plane_values;
};

static inline bool given(const struct arguments *args, enum option_id id)
{
	return args->given >> id & 1;
}

/* Verbs; each returns an exit code. */
int run_create(const struct arguments *args);
int run_info(const struct arguments *args);
int run_append(const struct arguments *args);
int run_dump(const struct arguments *args);
int run_truncate(const struct arguments *args);
int run_clear(const struct arguments *args);
int run_watch(const struct arguments *args);
int run_hold(const struct arguments *args);
int run_put(const struct arguments *args);
int run_fork(const struct arguments *args);
int run_drop(const struct arguments *args);
int run_ls(const struct arguments *args);
int run_save(const struct arguments *args);
int run_load(const struct arguments *args);
int run_metrics(const struct arguments *args);
int run_seal(const struct arguments *args);
int run_attach(const struct arguments *args);
int run_takeover(const struct arguments *args);
int run_llama(const struct arguments *args);

/*
 * The pad of --name, or else of the descriptor, if it is open for @access, O_RDONLY or
 * O_WRONLY; returns 0, or an exit code after fail().
 */
int open_pad(const struct arguments *args, int access, struct kvscratch **pad);

/* The pad of --name; @access may be O_RDWR as well. */
int open_held(const struct arguments *args, int access, struct kvscratch **pad);

/* A handle of its own on the pad of --name, or else of the descriptor; as open_held(). */
int open_own(const struct arguments *args, int access, struct kvscratch **pad);

/* Of "story/k0" the latter, and what a pad is called that nobody named */
const char *name_in_holder(const char *as);

/*
 * Have a holder keep @pad as @as, "story/k0" or "story"; @replaces the one that it has.
 * Returns 0 or a negative errno, -ENOENT if nobody holds under that name.
 */
int put_as(const char *as, bool replaces, const struct kvscratch *pad);

/* Say what the library had to say about @err, and of which pad; returns an exit code. */
int fail_pad(const struct arguments *args, int err);

/* Make what create and hold were asked for; returns 0, or an exit code after fail(). */
int make_pad(const struct arguments *args, struct kvscratch **pad);

/* Run args->command with @pad as descriptor args->fd; returns only on failure. */
int run_command(const struct arguments *args, const struct kvscratch *pad);

/* Nothing that was printed counts until it is out. */
int finish_output(void);

/* "-", or none at all */
bool is_dash(const char *file);

struct output;

/*
 * Let stdout be the file at @path, unless that is_dash(). A regular file is replaced once
 * all is written, in end_output(), which comes with the exit code so far, and not if that
 * is no success; anything else is written as it is. Both return an exit code.
 */
int begin_output(const char *path, struct output *output);
int end_output(const char *path, struct output *output, int err);

/**
 * struct selection - planes that a verb works on, all of them or one
 * @planes: the first of them
 * @first: its index
 * @count: how many
 * @row_bytes: of a row of each, scales included
 */
struct selection {
	const struct kvscratch_plane *planes;
	uint32_t first;
	uint32_t count;
	uint32_t row_bytes;
};

/* The one of --plane, or all; returns 0, or an exit code after fail(). */
int select_planes(const struct arguments *args, const struct kvscratch *pad,
		  struct selection *selection);

/* By its label or its index; returns 0, or an exit code after fail(). */
int find_plane(const struct kvscratch *pad, const char *name, uint32_t *index);

/* As kvscratch_copy_rows() does; returns 0 or a negative errno. */
int copy_selected(struct kvscratch *pad, const struct selection *selection, uint64_t first,
		  uint64_t count, void *rows);

static inline uint32_t stored_row_bytes(const struct kvscratch_plane *plane)
{
	return plane->row_bytes + plane->scales_row_bytes;
}

/**
 * struct description - a pad as it was at one moment, without a handle on it
 * @info: all that is not of a plane
 * @planes: its planes; free() them
 * @backend: where it lives
 */
struct description {
	struct kvscratch_pad_info info;
	struct kvscratch_plane *planes;
	enum kvscratch_backend backend;
};

/* Returns 0 or a negative errno. */
int describe_pad(struct kvscratch *pad, struct description *description);

/* Scratchpad(len=3, capacity=10, dim=4), or with planes=2 at its end */
void print_display(uint64_t len, uint64_t capacity, const struct kvscratch_plane *planes,
		   uint32_t nr_planes);
void print_display_line(uint64_t len, uint64_t capacity, const struct kvscratch_plane *planes,
			uint32_t nr_planes);

/* What is in an object of JSON about a pad, without the braces */
void print_json_members(const struct description *description);

/* Bytes that somebody else chose, on one line, or as a string of JSON */
void print_escaped(const void *text, size_t bytes);
void print_json_bytes(const void *text, size_t bytes);

/* The label of a plane, or its index when it has none */
void print_plane_name(const struct kvscratch_plane *plane, uint32_t index);

/*
 * What a scaled integer of @row stands for; a double holds all of it but the end of a long
 * i64. A row is its elements and behind them its scales, as kvscratch_copy_rows() gives it.
 */
double scaled_value(const struct kvscratch_plane *plane, const char *row, uint32_t i);

/* The elements of a row, with as many digits as tell two values apart */
void print_row(const struct kvscratch_plane *plane, const char *row);
void print_json_row(const struct kvscratch_plane *plane, const char *row);

/* A line for each plane, which begins with @before and, of several, its name */
void print_selected_row(const struct selection *selection, const char *row, const char *before);

/*
 * The handles of a holder. Their names, all ended by NUL, follow one another.
 * kvscratch_holder_get() fills it.
 */
struct handles {
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[KVSCRATCH_MAX_PASSED];
};

#endif
