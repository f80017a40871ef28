// SPDX-License-Identifier: GPL-2.0-only
/*
 * --output: where stdout goes.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "ctl.h"
#include "interrupt.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* /dev/stdout and the like: the file is wanted that the descriptor has, not its name. */
static bool is_descriptor(const char *path)
{
	struct open_how how = {
		.flags = O_PATH | O_CLOEXEC,
		.resolve = RESOLVE_NO_MAGICLINKS,
	};
	int fd = syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how));

	if (fd < 0)
		return errno == ELOOP;
	close(fd);
	return false;
}

/* Devices and FIFOs are written to, and so is what a descriptor is open on. */
static bool is_written_in_place(const char *path)
{
	struct stat status;

	return !stat(path, &status) && (!S_ISREG(status.st_mode) || is_descriptor(path));
}

int begin_output(const char *path, struct output *output)
{
	int err;

	*output = (struct output){ .fd = -1, .directory = -1 };
	if (is_dash(path))
		return 0;
	if (is_written_in_place(path))
		return freopen(path, "w", stdout) ? 0 :
		       fail(EXIT_SYSTEM, "%s: cannot open: %s", path, strerror(errno));
	catch_interrupts();
	err = output_open(output, path);
	if (!err && dup2(output->fd, STDOUT_FILENO) >= 0)
		return 0;
	if (err)
		fail(EXIT_SYSTEM, "%s: %s", path, output->words);
	else
		fail(EXIT_SYSTEM, "%s: cannot write there: %s", path, strerror(errno));
	output_close(output);
	return EXIT_SYSTEM;
}

int end_output(const char *path, struct output *output, int err)
{
	if (!err)
		err = finish_output();
	if (!err && output->fd >= 0 && !interrupted() && output_replace(output))
		err = fail(EXIT_SYSTEM, "%s: %s", path, output->words);
	output_close(output);
	return interrupted() ? end_by(interrupted()) : err;
}
