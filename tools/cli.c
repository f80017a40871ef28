// SPDX-License-Identifier: GPL-2.0-only
#define _FILE_OFFSET_BITS 64
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

const char *cli_name;

int fail(int code, const char *format, ...)
{
	va_list args;

	fflush(stdout);
	fprintf(stderr, "%s: ", cli_name);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	return code;
}

int parse_integer(int code, const char *name, const char *text, uint64_t min, uint64_t max,
		  uint64_t *value)
{
	char *end;

	errno = 0;
	*value = strtoull(text, &end, 10);
	/* strtoull() takes blanks and signs, too */
	if (*text < '0' || *text > '9' || *end || errno || *value < min || *value > max)
		return fail(code,
			    "--%s: expected an integer from %" PRIu64 " to %" PRIu64 ", got \"%s\"",
			    name, min, max, text);
	return 0;
}

int fail_option(int code, int option, char *const *argv)
{
	if (option == ':')
		return fail(code, "%s: expected a value, see --help", argv[optind - 1]);
	return fail(code, "unknown option \"%s\", see --help", argv[optind - 1]);
}

int open_standard_descriptors(void)
{
	int fd;

	do {
		/* the wrong way round: closed ones stay unusable */
		fd = open("/dev/null", O_WRONLY);
		if (fd > STDIN_FILENO && fd <= STDERR_FILENO) {
			close(fd);
			fd = open("/dev/null", O_RDONLY);
		}
		if (fd < 0)
			return -errno;
	} while (fd <= STDERR_FILENO);
	close(fd);
	return 0;
}

static void ignore_signal(int signal_number)
{
	(void)signal_number;
}

void survive_size_limits(void)
{
	/* a handler, for what is ignored would be so in commands that we run, too */
	struct sigaction action = { .sa_handler = ignore_signal, .sa_flags = SA_RESTART };
	struct sigaction old;

	if (!sigaction(SIGXFSZ, NULL, &old) && old.sa_handler == SIG_DFL)
		sigaction(SIGXFSZ, &action, NULL);
}
