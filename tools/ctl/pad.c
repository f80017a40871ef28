// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pad that a verb works on, and the verbs that make, describe and cut one.
 */
#define _GNU_SOURCE
#include "ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int finish_output(void)
{
	if (fflush(stdout) || ferror(stdout))
		return fail(EXIT_SYSTEM, "cannot write the output: %s", strerror(errno));
	return 0;
}

bool is_dash(const char *file)
{
	return !file || !strcmp(file, "-");
}

int fail_pad(const struct arguments *args, int err)
{
	int code = err == -EINVAL || err == -ENOSPC ? EXIT_INPUT : EXIT_SYSTEM;

	if (code == EXIT_INPUT)
		return fail(code, "%s", kvscratch_error());
	if (args->name)
		return fail(code, "%s: %s", args->name, kvscratch_error());
	return fail(code, "descriptor %d: %s", args->fd, kvscratch_error());
}

static int check_access(int fd, int has, int access)
{
	if (has == O_RDWR || has == access)
		return 0;
	return fail(EXIT_SYSTEM, "descriptor %d: expected it open for %s, got %s only", fd,
		    access == O_RDONLY ? "read" : "write", access == O_RDONLY ? "write" : "read");
}

int open_held(const struct arguments *args, int access, struct kvscratch **pad)
{
	int err = kvscratch_attach_name(pad, args->name, access);

	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}

int open_pad(const struct arguments *args, int access, struct kvscratch **pad)
{
	int err;

	/* what may write has to read as well on a memfd */
	if (args->name)
		return open_held(args, access == O_RDONLY ? O_RDONLY : O_RDWR, pad);
	if (kvscratch_from_fd(pad, args->fd))
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	err = check_access(args->fd, kvscratch_access(*pad), access);
	if (err)
		kvscratch_close(*pad);
	return err;
}

/* The inherited handle shares its position with the shell. */
int open_own(const struct arguments *args, int access, struct kvscratch **pad)
{
	if (args->name)
		return open_held(args, access, pad);
	if (kvscratch_attach(pad, args->fd, access))
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	return 0;
}

/* create, attach, takeover */

/* As env(1) and nohup(1) have it */
#define EXIT_CANNOT_RUN	126
#define EXIT_NOT_FOUND	127

int run_command(const struct arguments *args, const struct kvscratch *pad)
{
	int fd = kvscratch_fd(pad);

	/* dup2() onto itself would leave it close-on-exec */
	if (fd == args->fd ? fcntl(fd, F_SETFD, 0) : dup2(fd, args->fd) < 0)
		return fail(EXIT_SYSTEM, "--fd: cannot make the handle descriptor %d: %s", args->fd,
			    strerror(errno));
	execvp(args->command[0], args->command);
	return fail(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_CANNOT_RUN, "%s: %s",
		    args->command[0], strerror(errno));
}

int run_create(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (!args->command)
		return fail(EXIT_INPUT, "expected -- COMMAND: the pad lives as long as somebody "
			    "has a handle; kvscratchctl hold keeps one");
	err = make_pad(args, &pad);
	if (err)
		return err;
	err = run_command(args, pad);
	kvscratch_close(pad);
	return err;
}

int run_attach(const struct arguments *args)
{
	struct kvscratch *pad;
	int err;

	if (!args->command)
		return fail(EXIT_INPUT, "expected -- COMMAND");
	err = open_own(args, given(args, OPT_WRITE) ? O_RDWR : O_RDONLY, &pad);
	if (err)
		return err;
	err = run_command(args, pad);
	kvscratch_close(pad);
	return err;
}

int run_takeover(const struct arguments *args)
{
	struct kvscratch *pad, *writer;
	int err = open_pad(args, O_WRONLY, &pad);

	if (err)
		return err;
	if (args->command && kvscratch_backend(pad) == KVSCRATCH_BACKEND_MEMFD) {
		err = fail(EXIT_SYSTEM, "expected no COMMAND for a pad in a memfd, whose writer "
			   "cannot be passed on");
	} else if (kvscratch_takeover(&writer, pad)) {
		err = fail_pad(args, -EIO);
	} else {
		if (args->command)
			err = run_command(args, writer);
		kvscratch_close(writer);
	}
	kvscratch_close(pad);
	return err;
}

/* truncate, clear */

static int truncate_to(const struct arguments *args, uint64_t len)
{
	struct kvscratch *pad;
	int err = open_pad(args, O_WRONLY, &pad);

	if (err)
		return err;
	err = kvscratch_truncate(pad, len, given(args, OPT_ZERO) ? KVSCRATCH_TRUNCATE_ZERO : 0);
	if (err == -EINVAL)
		err = fail(EXIT_INPUT, "--len: %s", kvscratch_error());
	else if (err)
		err = fail_pad(args, err);
	kvscratch_close(pad);
	return err;
}

int run_truncate(const struct arguments *args)
{
	if (!given(args, OPT_LEN))
		return fail(EXIT_INPUT, "expected --len");
	return truncate_to(args, args->len);
}

int run_clear(const struct arguments *args)
{
	return truncate_to(args, 0);
}

/* seal */

int run_seal(const struct arguments *args)
{
	struct kvscratch *pad;
	int err = open_pad(args, O_WRONLY, &pad);

	if (err)
		return err;
	err = kvscratch_seal(pad);
	if (err)
		err = fail_pad(args, err);
	kvscratch_close(pad);
	return err;
}

/* info */

int describe_pad(struct kvscratch *pad, struct description *description)
{
	const uint32_t nr_planes = kvscratch_nr_planes(pad);
	int err;

	*description = (struct description){ .backend = kvscratch_backend(pad) };
	err = kvscratch_pad_info(pad, &description->info);
	if (err)
		return err;
	description->planes = reallocarray(NULL, nr_planes, sizeof(*description->planes));
	if (!description->planes)
		return -ENOMEM;
	memcpy(description->planes, kvscratch_plane(pad, 0),
	       nr_planes * sizeof(*description->planes));
	return 0;
}

void print_display(uint64_t len, uint64_t capacity, const struct kvscratch_plane *planes,
		   uint32_t nr_planes)
{
	printf("Scratchpad(len=%" PRIu64 ", capacity=%" PRIu64 ", %s=%" PRIu32 ")", len,
	       capacity, nr_planes > 1 ? "planes" : "dim", nr_planes > 1 ? nr_planes : planes->dim);
}

void print_display_line(uint64_t len, uint64_t capacity, const struct kvscratch_plane *planes,
			uint32_t nr_planes)
{
	print_display(len, capacity, planes, nr_planes);
	putchar('\n');
}

static size_t tag_bytes(const struct kvscratch_pad_info *info)
{
	size_t bytes = sizeof(info->tag);

	while (bytes && !info->tag[bytes - 1])
		bytes--;
	return bytes;
}

static bool is_sealed(const struct kvscratch_pad_info *info)
{
	return info->flags & KVSCRATCH_PAD_SEALED;
}

static bool has_writer(const struct kvscratch_pad_info *info)
{
	return info->flags & KVSCRATCH_PAD_WRITER;
}

static const char *json_bool(bool value)
{
	return value ? "true" : "false";
}

/* What one plane and the pad of one plane have */
static void print_json_format(const struct kvscratch_plane *plane)
{
	printf("\"dim\": %" PRIu32 ", \"dtype\": \"%s\", \"input_dtype\": \"%s\", \"frac_bits\": %"
	       PRIu32, (uint32_t)plane->dim, kvscratch_dtype_name(plane->dtype),
	       kvscratch_dtype_name(plane->input_dtype), (uint32_t)plane->frac_bits);
}

static void print_json_plane(const struct kvscratch_plane *plane)
{
	fputs("{\"label\": ", stdout);
	print_json_bytes(plane->label, strlen(plane->label));
	fputs(", ", stdout);
	print_json_format(plane);
	printf(", \"offset\": %" PRIu64 ", \"row_bytes\": %" PRIu32 ", \"scales_offset\": %" PRIu64
	       ", \"scales_row_bytes\": %" PRIu32 ", \"input_row_bytes\": %" PRIu32 "}",
	       (uint64_t)plane->offset, (uint32_t)plane->row_bytes, (uint64_t)plane->scales_offset,
	       (uint32_t)plane->scales_row_bytes, (uint32_t)plane->input_row_bytes);
}

void print_json_members(const struct description *description)
{
	const struct kvscratch_pad_info *info = &description->info;

	printf("\"len\": %" PRIu64 ", \"max_seq_len\": %" PRIu64 ", ", (uint64_t)info->len,
	       (uint64_t)info->max_seq_len);
	if (info->nr_planes == 1) {
		print_json_format(description->planes);
		fputs(", ", stdout);
	}
	printf("\"row_bytes\": %" PRIu32 ", \"input_row_bytes\": %" PRIu32 ", \"generation\": %"
	       PRIu64 ", \"trunc_len\": %" PRIu64 ", \"data_bytes\": %" PRIu64
	       ", \"status_offset\": %" PRIu64 ", \"saturated\": %" PRIu64 ", \"tag\": ",
	       (uint32_t)info->row_bytes, (uint32_t)info->input_row_bytes,
	       (uint64_t)info->generation, (uint64_t)info->trunc_len,
	       (uint64_t)(info->max_seq_len * info->row_bytes), (uint64_t)info->status_offset,
	       (uint64_t)info->saturated);
	print_json_bytes(info->tag, tag_bytes(info));
	printf(", \"epoch\": %" PRIu32 ", \"writer\": %s, \"sealed\": %s, \"id\": %" PRIu64
	       ", \"allocated_bytes\": %" PRIu64 ", \"parent_id\": %" PRIu64 ", \"parent_rows\": %"
	       PRIu64 ", \"shared_bytes\": %" PRIu64 ", \"planes\": [", (uint32_t)info->epoch,
	       json_bool(has_writer(info)), json_bool(is_sealed(info)), (uint64_t)info->id,
	       (uint64_t)info->allocated_bytes, (uint64_t)info->parent_id,
	       (uint64_t)info->parent_rows, (uint64_t)info->shared_bytes);
	for (uint32_t i = 0; i < info->nr_planes; i++) {
		if (i)
			fputs(", ", stdout);
		print_json_plane(&description->planes[i]);
	}
	printf("], \"backend\": \"%s\"", kvscratch_backend_name(description->backend));
}

static void print_json(const struct description *description)
{
	const struct kvscratch_promise *promises = kvscratch_promises(description->backend);

	putchar('{');
	print_json_members(description);
	fputs(", \"promises\": {", stdout);
	for (int i = 0; promises[i].name; i++)
		printf("%s\"%s\": %s", i ? ", " : "", promises[i].name,
		       json_bool(promises[i].holds));
	puts("}}");
}

static bool converts(const struct kvscratch_plane *plane)
{
	return plane->dtype != plane->input_dtype;
}

static void print_format(const struct kvscratch_plane *plane)
{
	printf("%s", kvscratch_dtype_name(plane->dtype));
	if (plane->frac_bits || (converts(plane) && plane->dtype != KVSCRATCH_DTYPE_MXINT8))
		printf(" with %" PRIu32 " fraction bits", (uint32_t)plane->frac_bits);
	if (converts(plane))
		printf(", from %s", kvscratch_dtype_name(plane->input_dtype));
}

/* A line for each of several planes; of the only one what makes it one of scaled integers */
static void print_planes(const struct description *description)
{
	const struct kvscratch_plane *planes = description->planes;
	const struct kvscratch_pad_info *info = &description->info;
	bool any_converts = false;

	for (uint32_t i = 0; i < info->nr_planes; i++) {
		any_converts |= converts(&planes[i]);
		if (info->nr_planes > 1) {
			fputs("plane ", stdout);
			print_plane_name(&planes[i], i);
			printf(": %" PRIu32 " ", (uint32_t)planes[i].dim);
			print_format(&planes[i]);
			putchar('\n');
		}
	}
	if (info->nr_planes == 1 && (any_converts || planes->frac_bits ||
				     planes->dtype == KVSCRATCH_DTYPE_MXINT8)) {
		print_format(planes);
		fputs(any_converts ? ", " : "\n", stdout);
	}
	if (any_converts)
		printf("%" PRIu64 " saturated\n", (uint64_t)info->saturated);
}

static void print_state(const struct kvscratch_pad_info *info)
{
	if (tag_bytes(info)) {
		fputs("tag: ", stdout);
		print_escaped(info->tag, tag_bytes(info));
		putchar('\n');
	}
	if (info->epoch)
		printf("epoch %" PRIu32 ", %s\n", (uint32_t)info->epoch,
		       has_writer(info) ? "with a writer" : "without a writer");
	if (is_sealed(info))
		puts("sealed");
	if (info->parent_id)
		printf("fork of %" PRIu64 " rows of pad %" PRIu64 ", %" PRIu64 " bytes shared, %"
		       PRIu64 " bytes of its own\n", (uint64_t)info->parent_rows,
		       (uint64_t)info->parent_id, (uint64_t)info->shared_bytes,
		       (uint64_t)info->allocated_bytes);
}

static void print_promises(enum kvscratch_backend backend)
{
	const struct kvscratch_promise *promises = kvscratch_promises(backend);
	const char *name = kvscratch_backend_name(backend);

	printf("%s keeps:", name);
	for (int i = 0; promises[i].name; i++)
		if (promises[i].holds)
			printf(" %s", promises[i].name);
	putchar('\n');
	for (int i = 0; promises[i].name; i++)
		if (!promises[i].holds)
			printf("%s does not keep %s: %s\n", name, promises[i].name,
			       promises[i].reason);
}

int run_info(const struct arguments *args)
{
	struct description description;
	struct kvscratch *pad;
	int err;

	if (args->name)
		err = open_held(args, O_RDONLY, &pad);
	else	/* which needs no rights */
		err = kvscratch_from_fd(&pad, args->fd) ?
		      fail(EXIT_SYSTEM, "%s", kvscratch_error()) : 0;
	if (err)
		return err;
	if (describe_pad(pad, &description)) {
		err = fail_pad(args, -EIO);
	} else if (given(args, OPT_JSON)) {
		print_json(&description);
	} else {
		print_display_line(description.info.len, description.info.max_seq_len,
				   description.planes, description.info.nr_planes);
		print_planes(&description);
		print_state(&description.info);
		print_promises(description.backend);
	}
	free(description.planes);
	kvscratch_close(pad);
	return err ? err : finish_output();
}
