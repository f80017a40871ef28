// SPDX-License-Identifier: GPL-2.0-only
/*
 * fork: a held pad that begins with the rows of another one.
 */
#include "../branch.h"
#include "ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* As hold does, which closes all other descriptors: nothing else may keep the pad or its source. */
static int hold_fork(const char *as, struct kvscratch *child)
{
	char holder[KVSCRATCH_MAX_NAME + 2];
	struct arguments held = {
		.given = 1u << OPT_FD | 1u << OPT_WRITE,
		.fd = fcntl(kvscratch_fd(child), F_DUPFD_CLOEXEC, 0),
		.argument = holder,
		.pad = name_in_holder(as),
	};

	kvscratch_close(child);
	if (held.fd < 0)
		return fail(EXIT_SYSTEM, "%s", strerror(errno));
	snprintf(holder, sizeof(holder), "%.*s", (int)strcspn(as, "/"), as);
	return run_hold(&held);
}

int run_fork(const struct arguments *args)
{
	struct kvscratch *child;
	int err;

	if (!args->argument || !args->second)
		return fail(EXIT_INPUT, "expected SRC or SRC@ROWS, and HOLDER or HOLDER/PAD");
	err = fork_held(&child, args->argument, args->max_seq_len, EXIT_INPUT, EXIT_SYSTEM);
	if (err)
		return err;
	err = put_as(args->second, given(args, OPT_REPLACE), child);
	/* nobody holds under that name */
	if (err == -ENOENT)
		return hold_fork(args->second, child);
	kvscratch_close(child);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}
