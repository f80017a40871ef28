/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the command-line tools share: errors, numbers, standard descriptors.
 */
#ifndef CLI_H
#define CLI_H

#include <stdint.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* What every error begins with: the name of the program, and of its verb */
extern const char *cli_name;

/* Print one line about an error and return @code, to be passed up to main(). */
int fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Parse the value of --@name; returns 0, or @code after fail(). */
int parse_integer(int code, const char *name, const char *text, uint64_t min, uint64_t max,
		  uint64_t *value);

/**
 * fail_option() - say what getopt_long() did not like
 * @code: to be returned
 * @option: what it returned: '?' or, as the short options begin with a colon, ':'
 * @argv: what it works on
 */
int fail_option(int code, int option, char *const *argv);

/*
 * Give closed standard descriptors to something that refuses, so that no pad
 * becomes one and takes text for rows. Returns 0 or a negative errno.
 */
int open_standard_descriptors(void);

/* A write beyond RLIMIT_FSIZE is an error and does not kill us. */
void survive_size_limits(void);

#endif
