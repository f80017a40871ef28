// SPDX-License-Identifier: GPL-2.0-only
/*
 * Forks of held pads.
 */
#include "branch.h"
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/**
 * struct source - what is forked
 * @name: of the pad
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

static bool is_number(const char *text)
{
	return *text && !text[strspn(text, "0123456789")];
}

/* Of a sealed pad any handle will do, of another one a handle that may write. */
static int open_source(struct kvscratch **pad, const char *name, struct kvscratch_pad_info *info)
{
	int err = kvscratch_attach_name(pad, name, O_RDONLY);

	if (err)
		return err;
	err = kvscratch_pad_info(*pad, info);
	if (!err && info->flags & KVSCRATCH_PAD_SEALED)
		return 0;
	kvscratch_close(*pad);
	if (!err)
		err = kvscratch_attach_name(pad, name, O_RDWR);
	if (err)
		return err;
	err = kvscratch_pad_info(*pad, info);
	if (err)
		kvscratch_close(*pad);
	return err;
}

/* Returns 0 or a negative errno. */
static int fork_source(struct kvscratch **child, const struct source *source, uint64_t max_seq_len)
{
	struct kvscratch_pad_info info;
	struct kvscratch *pad;
	int err = open_source(&pad, source->name, &info);

	if (err)
		return err;
	/* of more rows than there are the library says so */
	err = kvscratch_fork(child, pad, source->rows ? strtoull(source->rows, NULL, 10) : info.len,
			     max_seq_len ? max_seq_len : info.max_seq_len);
	kvscratch_close(pad);
	return err;
}

int fork_held(struct kvscratch **child, const char *text, uint64_t max_seq_len, int input,
	      int refused)
{
	struct source source;
	int err;

	split_source(text, &source);
	if (source.rows && !is_number(source.rows))
		return fail(input, "%s: expected a number of rows behind the @, got \"%s\"",
			    source.name, source.rows);
	err = fork_source(child, &source, max_seq_len);
	return err ? fail(err == -EINVAL ? input : refused, "%s", kvscratch_error()) : 0;
}
