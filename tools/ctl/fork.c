// SPDX-License-Identifier: GPL-2.0-only
/*
 * fork: a held pad that begins with the rows of another one.
 */
#include "ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/**
 * struct source - what SRC[@ROWS] says
 * @name: SRC
 * @rows: behind the @, as text, or NULL for all
 */
struct source {
	char name[2 * (KVSCRATCH_MAX_NAME + 1) + 1];
	const char *rows;
};

static void split_source(const char *text, struct source *source)
{
	const size_t length = strcspn(text, "@");

	source->rows = text[length] ? text + length + 1 : NULL;
	/* what was cut is still too long for a name */
	snprintf(source->name, sizeof(source->name), "%.*s", (int)length, text);
}

/* How many there are the library knows. */
static int parse_rows(const struct source *source, uint64_t *rows)
{
	const char *text = source->rows;

	if (!*text || text[strspn(text, "0123456789")])
		return fail(EXIT_INPUT, "%s: expected a number of rows behind the @, got \"%s\"",
			    source->name, text);
	*rows = strtoull(text, NULL, 10);
	return 0;
}

/* Of a sealed pad any handle will do, of another one a handle that may write. */
static int open_source(const struct arguments *named, struct kvscratch **pad,
		       struct kvscratch_pad_info *info)
{
	int err = open_held(named, O_RDONLY, pad);

	if (err)
		return err;
	err = kvscratch_pad_info(*pad, info);
	if (!err && info->flags & KVSCRATCH_PAD_SEALED)
		return 0;
	if (err)
		err = fail_pad(named, err);
	kvscratch_close(*pad);
	if (!err)
		err = open_held(named, O_RDWR, pad);
	if (err)
		return err;
	err = kvscratch_pad_info(*pad, info);
	if (!err)
		return 0;
	err = fail_pad(named, err);
	kvscratch_close(*pad);
	return err;
}

static int make_fork(const struct arguments *args, struct kvscratch **child)
{
	struct arguments named = *args;
	struct kvscratch_pad_info info;
	struct kvscratch *pad;
	struct source source;
	uint64_t rows = 0;
	int err = 0;

	split_source(args->argument, &source);
	if (source.rows)
		err = parse_rows(&source, &rows);
	if (err)
		return err;
	named.name = source.name;
	err = open_source(&named, &pad, &info);
	if (err)
		return err;
	err = kvscratch_fork(child, pad, source.rows ? rows : info.len,
			     given(args, OPT_MAX_SEQ_LEN) ? args->max_seq_len : info.max_seq_len);
	if (err)
		err = fail_pad(&named, err);
	kvscratch_close(pad);
	return err;
}

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
	err = make_fork(args, &child);
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
