// SPDX-License-Identifier: GPL-2.0-only
/*
 * save and load: pads as .npy and .safetensors.
 */
#include "../interrupt.h"
#include "ctl.h"
#include "progress.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* What the only pad of a file or a holder is called when nothing says so */
#define ONLY_PAD "pad"

/**
 * struct set - pads and their names
 * @pads: each with its name; here they are closed
 * @names: where the names are that came from a holder
 * @count: how many
 */
struct set {
	struct kvscratch_named_pad pads[KVSCRATCH_MAX_PASSED];
	struct handles handles;
	unsigned int count;
};

static void close_set(struct set *set)
{
	while (set->count)
		kvscratch_close(set->pads[--set->count].pad);
}

/* Of "story/k0" the latter, or NULL */
static const char *pad_of(const char *name)
{
	const char *slash = name ? strchr(name, '/') : NULL;

	return slash ? slash + 1 : NULL;
}

/* save */

static int open_all(const struct arguments *args, struct set *set)
{
	struct handles *handles = &set->handles;
	int got = kvscratch_holder_get(args->name, O_RDONLY, handles->names,
				       sizeof(handles->names), handles->fds,
				       ARRAY_SIZE(handles->fds));
	const char *name = handles->names;
	int err = 0;

	if (got < 0)
		return fail(got == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	for (int i = 0; i < got; i++, name += strlen(name) + 1) {
		struct kvscratch_named_pad *named = &set->pads[set->count];

		named->name = name;
		if (!err && kvscratch_from_fd(&named->pad, handles->fds[i]))
			err = fail(EXIT_SYSTEM, "%s/%s: %s", args->name, name, kvscratch_error());
		if (err)
			close(handles->fds[i]);
		else
			set->count++;
	}
	if (!err && !got)
		err = fail(EXIT_INPUT, "%s: expected pads to save, got none", args->name);
	return err;
}

static int open_one(const struct arguments *args, struct set *set)
{
	int err = open_pad(args, O_RDONLY, &set->pads[0].pad);

	if (err)
		return err;
	set->pads[0].name = args->name ? pad_of(args->name) : ONLY_PAD;
	set->count = 1;
	return 0;
}

/* All of @set, or of its only pad what --plane says; returns 0 or a negative errno. */
static int save(const struct arguments *args, const struct set *set, uint32_t plane)
{
	struct progress progress = progress_start(args, "saving");
	int err;

	if (given(args, OPT_PLANE))
		err = kvscratch_save_plane(args->argument, set->pads->pad, plane, progress_at,
					   &progress);
	else
		err = kvscratch_save(args->argument, set->pads, set->count, progress_at, &progress);
	progress_end(&progress);
	return err;
}

static int save_set(const struct arguments *args, const struct set *set)
{
	struct selection selection = { 0 };
	int err = 0;

	if (given(args, OPT_PLANE))
		err = select_planes(args, set->pads->pad, &selection);
	if (err)
		return err;
	catch_interrupts();
	err = save(args, set, selection.first);
	/* a signal that comes later leaves what is saved */
	if (!err || interrupted())
		return err;
	return fail(err == -EINVAL || err == -EOPNOTSUPP ? EXIT_INPUT : EXIT_SYSTEM, "%s: %s",
		    args->argument, kvscratch_error());
}

int run_save(const struct arguments *args)
{
	const bool all = args->name && !pad_of(args->name) && !given(args, OPT_PLANE);
	static struct set set;
	int err;

	if (!args->argument)
		return fail(EXIT_INPUT, "expected FILE.npy or FILE.safetensors");
	err = all ? open_all(args, &set) : open_one(args, &set);
	if (!err)
		err = save_set(args, &set);
	close_set(&set);
	return err && interrupted() ? end_by(interrupted()) : err;
}

/* load */

static int fail_load(const struct arguments *args, int err)
{
	bool input = err == -EBADMSG || err == -EINVAL || err == -ENOENT || err == -ENOKEY ||
		     err == -ENOSPC;

	return fail(input ? EXIT_INPUT : EXIT_SYSTEM, "%s: %s", args->argument, kvscratch_error());
}

/* Make a pad of @name in the file, NULL for the only one, to be called @as. */
static int load_pad(const struct arguments *args, const struct kvscratch_file *file,
		    const char *name, const char *as, struct set *set)
{
	struct progress progress = progress_start(args, "loading");
	struct kvscratch_named_pad *loaded = &set->pads[set->count];
	int err = kvscratch_load(&loaded->pad, file, name, args->max_seq_len, progress_at,
				 &progress);

	progress_end(&progress);
	if (err)
		return fail_load(args, err);
	loaded->name = as;
	set->count++;
	return 0;
}

static int load_all(const struct arguments *args, const struct kvscratch_file *file,
		    struct set *set)
{
	unsigned int count;
	const struct kvscratch_saved_pad *saved = kvscratch_file_pads(file, &count);
	int err = 0;

	if (count > KVSCRATCH_MAX_PASSED)
		return fail(EXIT_INPUT, "%s: expected at most %d pads, got %u", args->argument,
			    KVSCRATCH_MAX_PASSED, count);
	for (unsigned int i = 0; !err && i < count; i++) {
		const char *name = *saved[i].name ? saved[i].name : NULL;

		err = load_pad(args, file, name, name ? name : ONLY_PAD, set);
	}
	return err;
}

static int put_set(const struct arguments *args, const struct set *set)
{
	const char *names[KVSCRATCH_MAX_PASSED];
	int fds[KVSCRATCH_MAX_PASSED];
	char holder[KVSCRATCH_MAX_NAME + 2];
	int err;

	/* what was cut is still too long for a name */
	snprintf(holder, sizeof(holder), "%.*s", (int)strcspn(args->name, "/"), args->name);
	for (unsigned int i = 0; i < set->count; i++) {
		names[i] = set->pads[i].name;
		fds[i] = kvscratch_fd(set->pads[i].pad);
	}
	err = kvscratch_holder_put(holder, names, fds, set->count);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}

/* "story" takes all pads of the file, "story/k0" the one of that name or the only one. */
static int load_into_holder(const struct arguments *args, const struct kvscratch_file *file,
			    struct set *set)
{
	const char *as = pad_of(args->name);
	const char *name = args->pad;
	unsigned int count;
	int err;

	kvscratch_file_pads(file, &count);
	if (!name && as && count > 1)
		name = as;
	if (name || as)
		err = load_pad(args, file, name, as ? as : name, set);
	else
		err = load_all(args, file, set);
	return err ? err : put_set(args, set);
}

static int load_for_command(const struct arguments *args, const struct kvscratch_file *file,
			    struct set *set)
{
	int err = load_pad(args, file, args->pad, ONLY_PAD, set);

	return err ? err : run_command(args, set->pads[0].pad);
}

/* Behind the rows that it has */
static int load_into_descriptor(const struct arguments *args, const struct kvscratch_file *file)
{
	struct progress progress = progress_start(args, "loading");
	struct kvscratch *pad;
	int err = open_pad(args, O_WRONLY, &pad);

	if (err)
		return err;
	err = kvscratch_load_into(pad, file, args->pad, progress_at, &progress);
	progress_end(&progress);
	if (err)
		err = fail_load(args, err);
	kvscratch_close(pad);
	return err;
}

int run_load(const struct arguments *args)
{
	struct kvscratch_file *file;
	static struct set set;
	int err;

	if (!args->argument)
		return fail(EXIT_INPUT, "expected FILE.npy or FILE.safetensors");
	if (args->name && args->command)
		return fail(EXIT_INPUT, "expected either --name or -- COMMAND, got both");
	if (given(args, OPT_MAX_SEQ_LEN) && !args->name && !args->command)
		return fail(EXIT_INPUT, "--max-seq-len: expected --name or -- COMMAND with it");
	err = kvscratch_open_file(&file, args->argument);
	if (err)
		return fail_load(args, err);
	if (args->name)
		err = load_into_holder(args, file, &set);
	else if (args->command)
		err = load_for_command(args, file, &set);
	else
		err = load_into_descriptor(args, file);
	close_set(&set);
	kvscratch_close_file(file);
	return err;
}
