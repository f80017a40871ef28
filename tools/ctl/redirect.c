// SPDX-License-Identifier: GPL-2.0-only
/*
 * --output: where stdout goes.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "../interrupt.h"
#include "ctl.h"
#include "output.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

int begin_output(const char *path, struct output *output)
{
	int err;

	*output = (struct output){ .fd = -1, .directory = -1 };
	if (is_dash(path))
		return 0;
	if (output_in_place(path))
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
