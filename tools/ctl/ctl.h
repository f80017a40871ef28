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
};

enum format { FORMAT_AUTO, FORMAT_TEXT, FORMAT_RAW, FORMAT_NPY, FORMAT_JSON };

/**
 * struct arguments - what the command line says
 * @given: a bit per option
 * @argument: the one that is no option, or NULL
 * @command: behind --, ended by NULL; or NULL
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
	uint64_t len;
	enum format format;
	const char *output;
	const char *socket;
	const char *pad;
	uint64_t until;
	uint64_t timeout;
	const char *argument;
	char **command;
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
int run_drop(const struct arguments *args);
int run_ls(const struct arguments *args);
int run_save(const struct arguments *args);
int run_load(const struct arguments *args);
int run_metrics(const struct arguments *args);

/*
 * The pad of --name, or else of the descriptor, if it is open for @access, O_RDONLY or
 * O_WRONLY; returns 0, or an exit code after fail().
 */
int open_pad(const struct arguments *args, int access, struct kvscratch **pad);

/* The pad of --name; @access may be O_RDWR as well. */
int open_held(const struct arguments *args, int access, struct kvscratch **pad);

/* Say what the library had to say about @err, and of which pad; returns an exit code. */
int fail_pad(const struct arguments *args, int err);

/* What create and hold are to make; returns 0, or an exit code after fail(). */
int parse_geometry(const struct arguments *args, struct kvscratch_geometry *geometry);

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

/* Scratchpad(len=3, capacity=10, dim=4) */
void print_display_line(uint64_t len, const struct kvscratch_info *info);

/* What is in an object of JSON about a pad, without the braces */
void print_json_members(const struct kvscratch_info *info, enum kvscratch_backend backend);

/*
 * What a scaled integer of @row stands for; a double holds all of it but the end of a long
 * i64. A row is its elements and behind them its scales, as kvscratch_copy_rows() gives it.
 */
double scaled_value(const struct kvscratch_info *info, const char *row, uint32_t i);

/* The elements of a row, with as many digits as tell two values apart */
void print_row(const struct kvscratch_info *info, const char *row);
void print_json_row(const struct kvscratch_info *info, const char *row);

/*
 * The handles of a holder. Their names, all ended by NUL, follow one another.
 * kvscratch_holder_get() fills it.
 */
struct handles {
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[KVSCRATCH_MAX_PASSED];
};

#endif
