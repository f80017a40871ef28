// SPDX-License-Identifier: GPL-2.0-only
#define _FILE_OFFSET_BITS 64
#include "cli.h"
#include "libkvscratch.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
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

void remove_dead_socket(const char *path)
{
	struct stat status;
	int sock;

	if (lstat(path, &status) || !S_ISSOCK(status.st_mode))
		return;
	sock = kvscratch_connect(path);
	if (sock >= 0)
		close(sock);
	else if (sock == -ECONNREFUSED)
		unlink(path);
}
