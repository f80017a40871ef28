// SPDX-License-Identifier: GPL-2.0-only
/*
 * ls, put, drop and metrics: what is held by all holders of this user.
 */
#define _GNU_SOURCE
#include "ctl.h"
#include "holder.h"
#include "output.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/**
 * struct entry - a held pad, or a holder without one
 * @holder: its name
 * @pad: the name of the pad, or "" if the holder has none
 * @pad_is: what that is, otherwise
 * @printed: in the tree
 */
struct entry {
	char holder[KVSCRATCH_MAX_NAME + 1];
	char pad[KVSCRATCH_MAX_NAME + 1];
	struct description pad_is;
	bool printed;
};

struct entries {
	struct entry *list;
	size_t count;
	size_t room;
};

static struct entry *add_entry(struct entries *entries, const char *holder)
{
	struct entry *entry;

	if (entries->count == entries->room) {
		size_t room = entries->room ? 2 * entries->room : 64;
		struct entry *list = reallocarray(entries->list, room, sizeof(*list));

		if (!list) {
			fail(EXIT_SYSTEM, "out of memory");
			return NULL;
		}
		entries->list = list;
		entries->room = room;
	}
	entry = &entries->list[entries->count++];
	*entry = (struct entry){ 0 };
	strcpy(entry->holder, holder);
	return entry;
}

/* Takes over @fd. */
static int add_pad(struct entries *entries, const char *holder, const char *name, int fd)
{
	struct entry *entry = add_entry(entries, holder);
	struct kvscratch *pad;
	int err;

	if (!entry) {
		close(fd);
		return EXIT_SYSTEM;
	}
	strcpy(entry->pad, name);
	if (kvscratch_from_fd(&pad, fd)) {
		close(fd);
		entries->count--;
		return fail(EXIT_SYSTEM, "%s/%s: %s", holder, name, kvscratch_error());
	}
	err = describe_pad(pad, &entry->pad_is);
	kvscratch_close(pad);
	if (!err)
		return 0;
	entries->count--;
	return fail(EXIT_SYSTEM, "%s/%s: %s", holder, name, kvscratch_error());
}

static void free_entries(const struct entries *entries)
{
	for (size_t i = 0; i < entries->count; i++)
		free(entries->list[i].pad_is.planes);
	free(entries->list);
}

static int add_holder(struct entries *entries, const char *name)
{
	static struct handles handles;
	const char *pad = handles.names;
	int err = 0;
	int count = kvscratch_holder_get(name, O_RDONLY, handles.names, sizeof(handles.names),
					 handles.fds, ARRAY_SIZE(handles.fds));

	/* it was killed, or ended right now, or never was one */
	if (count == -ENOENT || count == -ENOTSOCK)
		return 0;
	if (count < 0)
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	for (int i = 0; i < count; i++, pad += strlen(pad) + 1)
		err |= add_pad(entries, name, pad, handles.fds[i]);
	return count || add_entry(entries, name) ? err : EXIT_SYSTEM;
}

static int is_holder(const struct dirent *entry)
{
	return holder_name_is_valid(entry->d_name);
}

/* Everything that can be seen; an exit code tells that something cannot. */
static int collect(struct entries *entries)
{
	struct dirent **names;
	char path[4096];
	int err = 0;
	int count;

	*entries = (struct entries){ 0 };
	if (kvscratch_holder_path(NULL, path, sizeof(path)))
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	count = scandir(path, &names, is_holder, alphasort);
	if (count < 0)
		return errno == ENOENT ? 0 :
		       fail(EXIT_SYSTEM, "%s: cannot list: %s", path, strerror(errno));
	for (int i = 0; i < count; i++) {
		err |= add_holder(entries, names[i]->d_name);
		free(names[i]);
	}
	free(names);
	return err;
}

/* ls */

static void print_entry(const struct entry *entry)
{
	const struct kvscratch_pad_info *info = &entry->pad_is.info;

	if (!*entry->pad) {
		printf("%s: no pads\n", entry->holder);
		return;
	}
	printf("%s/%s: ", entry->holder, entry->pad);
	print_display_line(info->len, info->max_seq_len, entry->pad_is.planes, info->nr_planes);
}

/* Names have no characters that JSON would want quoted. */
static void print_json_entry(const struct entry *entry)
{
	printf("{\"holder\": \"%s\", ", entry->holder);
	if (*entry->pad) {
		printf("\"pad\": \"%s\", ", entry->pad);
		print_json_members(&entry->pad_is);
		putchar('}');
	} else {
		printf("\"pad\": null}");
	}
}

/* The first one that is the pad of this id, or NULL */
static const struct entry *find_pad(const struct entries *entries, enum kvscratch_backend backend,
				    uint64_t id)
{
	for (size_t i = 0; i < entries->count; i++) {
		const struct entry *entry = &entries->list[i];

		if (*entry->pad && entry->pad_is.backend == backend && entry->pad_is.info.id == id)
			return entry;
	}
	return NULL;
}

static void print_tree_line(const struct entries *entries, const struct entry *entry, int depth)
{
	const struct kvscratch_pad_info *info = &entry->pad_is.info;
	const struct entry *first = find_pad(entries, entry->pad_is.backend, info->id);

	printf("%*s%s/%s: ", 2 * depth, "", entry->holder, entry->pad);
	if (first != entry) {
		printf("the same as %s/%s\n", first->holder, first->pad);
		return;
	}
	print_display(info->len, info->max_seq_len, entry->pad_is.planes, info->nr_planes);
	if (info->parent_id)
		printf(", forked at %" PRIu64, (uint64_t)info->parent_rows);
	printf(", %" PRIu64 " bytes own, %" PRIu64 " shared\n", (uint64_t)info->allocated_bytes,
	       (uint64_t)info->shared_bytes);
}

static void print_forks(struct entries *entries, enum kvscratch_backend backend, uint64_t id,
			int depth);

static void print_branch(struct entries *entries, struct entry *entry, int depth)
{
	if (entry->printed)
		return;
	/* before its forks: a memfd can say of itself whatever it wants to */
	entry->printed = true;
	print_tree_line(entries, entry, depth);
	print_forks(entries, entry->pad_is.backend, entry->pad_is.info.id, depth + 1);
}

static void print_forks(struct entries *entries, enum kvscratch_backend backend, uint64_t id,
			int depth)
{
	for (size_t i = 0; i < entries->count; i++) {
		struct entry *entry = &entries->list[i];

		if (*entry->pad && entry->pad_is.backend == backend &&
		    entry->pad_is.info.parent_id == id)
			print_branch(entries, entry, depth);
	}
}

/* A pad with all of its forks, or a pad that is not held but in what its forks share with it */
static void print_root(struct entries *entries, struct entry *entry)
{
	const enum kvscratch_backend backend = entry->pad_is.backend;
	const uint64_t parent = entry->pad_is.info.parent_id;

	if (!*entry->pad) {
		print_entry(entry);
	} else if (!parent) {
		print_branch(entries, entry, 0);
	} else if (!entry->printed && !find_pad(entries, backend, parent)) {
		printf("pad %" PRIu64 ": not held\n", parent);
		print_forks(entries, backend, parent, 1);
	}
}

static void print_tree(struct entries *entries)
{
	for (size_t i = 0; i < entries->count; i++)
		print_root(entries, &entries->list[i]);
	/* what memfds say that are forks of each other */
	for (size_t i = 0; i < entries->count; i++)
		if (*entries->list[i].pad)
			print_branch(entries, &entries->list[i], 0);
}

static void print_list(const struct entries *entries, bool json)
{
	for (size_t i = 0; i < entries->count; i++) {
		if (!json) {
			print_entry(&entries->list[i]);
			continue;
		}
		fputs(i ? ",\n " : "[", stdout);
		print_json_entry(&entries->list[i]);
	}
	if (json)
		puts(entries->count ? "]" : "[]");
}

int run_ls(const struct arguments *args)
{
	struct entries entries;
	int unseen, err;

	if (given(args, OPT_JSON) && given(args, OPT_TREE))
		return fail(EXIT_INPUT, "expected either --json or --tree, got both");
	unseen = collect(&entries);
	if (given(args, OPT_TREE))
		print_tree(&entries);
	else
		print_list(&entries, given(args, OPT_JSON));
	free_entries(&entries);
	err = finish_output();
	return err ? err : unseen;
}

/* put */

const char *name_in_holder(const char *as)
{
	const char *slash = strchr(as, '/');

	return slash ? slash + 1 : ONLY_PAD;
}

int put_as(const char *as, bool replaces, const struct kvscratch *pad)
{
	const char *name = name_in_holder(as);
	int fd = kvscratch_fd(pad);
	char holder[KVSCRATCH_MAX_NAME + 2];

	/* what was cut is still too long for a name */
	snprintf(holder, sizeof(holder), "%.*s", (int)strcspn(as, "/"), as);
	return replaces ? kvscratch_holder_replace(holder, &name, &fd, 1) :
			  kvscratch_holder_put(holder, &name, &fd, 1);
}

int run_put(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (!args->argument)
		return fail(EXIT_INPUT, "expected HOLDER or HOLDER/PAD");
	err = open_own(args, given(args, OPT_WRITE) ? O_RDWR : O_RDONLY, &pad);
	if (err)
		return err;
	err = put_as(args->argument, given(args, OPT_REPLACE), pad);
	kvscratch_close(pad);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}

/* drop */

int run_drop(const struct arguments *args)
{
	int err;

	if (!args->argument)
		return fail(EXIT_INPUT, "expected NAME or NAME/PAD");
	err = kvscratch_holder_drop(args->argument);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}

/* metrics */

static uint64_t rows_of(const struct kvscratch_pad_info *info)
{
	return info->len;
}

static uint64_t capacity_of(const struct kvscratch_pad_info *info)
{
	return info->max_seq_len;
}

static uint64_t bytes_of(const struct kvscratch_pad_info *info)
{
	return info->max_seq_len * info->row_bytes;
}

static uint64_t own_bytes_of(const struct kvscratch_pad_info *info)
{
	return info->allocated_bytes;
}

static uint64_t shared_bytes_of(const struct kvscratch_pad_info *info)
{
	return info->shared_bytes;
}

static uint64_t generation_of(const struct kvscratch_pad_info *info)
{
	return info->generation;
}

static uint64_t saturated_of(const struct kvscratch_pad_info *info)
{
	return info->saturated;
}

static const struct {
	const char *name;
	const char *type;
	const char *help;
	uint64_t (*value)(const struct kvscratch_pad_info *info);
} pad_metrics[] = {
	{ "kvscratch_pad_rows", "gauge", "Committed rows.", rows_of },
	{ "kvscratch_pad_capacity_rows", "gauge", "Rows that fit.", capacity_of },
	{ "kvscratch_pad_bytes", "gauge", "Bytes of all rows that fit.", bytes_of },
	{ "kvscratch_pad_own_bytes", "gauge", "Memory that the pad took for itself.", own_bytes_of },
	{ "kvscratch_pad_shared_bytes", "gauge", "Memory that it has of the pad it was forked from.",
	  shared_bytes_of },
	{ "kvscratch_pad_truncates_total", "counter", "Truncates: the generation.",
	  generation_of },
	{ "kvscratch_pad_saturated_elements_total", "counter",
	  "Elements that were clamped by a conversion.", saturated_of },
};

static const struct {
	const char *name;
	const char *help;
	const char *path;
} module_metrics[] = {
	{ "kvscratch_module_open_handles", "Open handles, and what else pins the module.",
	  "/sys/module/kvscratch/refcnt" },
	{ "kvscratch_module_bytes", "Bytes that all pads take.",
	  "/sys/module/kvscratch/parameters/bytes_total" },
	{ "kvscratch_module_max_bytes_per_pad", "Limit of the bytes that one pad takes.",
	  "/sys/module/kvscratch/parameters/max_bytes_per_pad" },
	{ "kvscratch_module_max_bytes_total", "Limit of the bytes that all pads take.",
	  "/sys/module/kvscratch/parameters/max_bytes_total" },
	{ "kvscratch_module_min_available_bytes", "Available memory that making a pad leaves.",
	  "/sys/module/kvscratch/parameters/min_available_bytes" },
};

static void print_head(const char *name, const char *type, const char *help)
{
	printf("# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void print_pad_info(const struct entry *entry)
{
	const struct description *pad = &entry->pad_is;

	printf("kvscratch_pad_info{holder=\"%s\",pad=\"%s\",backend=\"%s\",", entry->holder,
	       entry->pad, kvscratch_backend_name(pad->backend));
	if (pad->info.nr_planes == 1)
		printf("dtype=\"%s\",dim=\"%" PRIu32 "\"} 1\n",
		       kvscratch_dtype_name(pad->planes->dtype), (uint32_t)pad->planes->dim);
	else
		printf("planes=\"%" PRIu32 "\"} 1\n", (uint32_t)pad->info.nr_planes);
}

/* Names have none of the characters that a label's value has to escape. */
static void print_pad_metrics(const struct entries *entries)
{
	print_head("kvscratch_pad_info", "gauge", "What a held pad is made of.");
	for (size_t i = 0; i < entries->count; i++) {
		const struct entry *entry = &entries->list[i];

		if (*entry->pad)
			print_pad_info(entry);
	}
	for (size_t m = 0; m < ARRAY_SIZE(pad_metrics); m++) {
		print_head(pad_metrics[m].name, pad_metrics[m].type, pad_metrics[m].help);
		for (size_t i = 0; i < entries->count; i++) {
			const struct entry *entry = &entries->list[i];

			if (*entry->pad)
				printf("%s{holder=\"%s\",pad=\"%s\"} %" PRIu64 "\n",
				       pad_metrics[m].name, entry->holder, entry->pad,
				       pad_metrics[m].value(&entry->pad_is.info));
		}
	}
}

/* Of a module that is loaded; without it there are none. */
static void print_module_metrics(void)
{
	for (size_t m = 0; m < ARRAY_SIZE(module_metrics); m++) {
		FILE *file = fopen(module_metrics[m].path, "re");
		uint64_t value;

		if (!file)
			continue;
		if (fscanf(file, "%" SCNu64, &value) == 1) {
			print_head(module_metrics[m].name, "gauge", module_metrics[m].help);
			printf("%s %" PRIu64 "\n", module_metrics[m].name, value);
		}
		fclose(file);
	}
}

static int print_metrics(const struct entries *entries)
{
	print_pad_metrics(entries);
	print_module_metrics();
	return finish_output();
}

/*
 * The collector of node_exporter may read at any moment: the file is always a whole one. It
 * is another user, for whom a new one is made readable.
 */
static int write_metrics(const char *path, const struct entries *entries)
{
	struct output output;
	int err = begin_output(path, &output);

	if (err)
		return err;
	if (output.is_new && fchmod(output.fd, 0644))
		err = fail(EXIT_SYSTEM, "%s: cannot set its permissions: %s", path,
			   strerror(errno));
	if (!err)
		err = print_metrics(entries);
	return end_output(path, &output, err);
}

int run_metrics(const struct arguments *args)
{
	struct entries entries;
	int unseen = collect(&entries);
	int err;

	err = write_metrics(args->output, &entries);
	free_entries(&entries);
	return err ? err : unseen;
}
