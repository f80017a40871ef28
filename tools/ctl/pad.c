// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pad that a verb works on, and the verbs that make, describe and cut one.
 */
#define _GNU_SOURCE
#include "ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
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

/* create */

int parse_geometry(const struct arguments *args, struct kvscratch_geometry *geometry)
{
	if (!given(args, OPT_MAX_SEQ_LEN) || !given(args, OPT_DIM))
		return fail(EXIT_INPUT, "expected --max-seq-len and --dim");
	*geometry = (struct kvscratch_geometry){
		.max_seq_len = args->max_seq_len,
		.dim = args->dim,
		.dtype = args->dtype,
		.input_dtype = args->input_dtype,
		.frac_bits = args->frac_bits,
	};
	return 0;
}

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
	struct kvscratch_geometry geometry;
	struct kvscratch *pad;
	int err = parse_geometry(args, &geometry);

	if (err)
		return err;
	if (!args->command)
		return fail(EXIT_INPUT, "expected -- COMMAND: the pad lives as long as somebody "
			    "has a handle; kvscratchctl hold keeps one");
	err = kvscratch_new_geometry(&pad, &geometry);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	err = run_command(args, pad);
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

/* info */

void print_display_line(uint64_t len, const struct kvscratch_info *info)
{
	printf("Scratchpad(len=%" PRIu64 ", capacity=%" PRIu64 ", dim=%" PRIu32 ")\n", len,
	       (uint64_t)info->max_seq_len, (uint32_t)info->dim);
}

void print_json_members(const struct kvscratch_info *info, enum kvscratch_backend backend)
{
	printf("\"len\": %" PRIu64 ", \"max_seq_len\": %" PRIu64 ", \"dim\": %" PRIu32
	       ", \"dtype\": \"%s\", \"row_bytes\": %" PRIu32 ", \"generation\": %" PRIu64
	       ", \"trunc_len\": %" PRIu64 ", \"data_bytes\": %" PRIu64
	       ", \"status_offset\": %" PRIu64 ", \"input_dtype\": \"%s\""
	       ", \"input_row_bytes\": %" PRIu32 ", \"frac_bits\": %" PRIu32
	       ", \"saturated\": %" PRIu64 ", \"backend\": \"%s\"",
	       (uint64_t)info->len, (uint64_t)info->max_seq_len, (uint32_t)info->dim,
	       kvscratch_dtype_name(info->dtype), (uint32_t)info->row_bytes,
	       (uint64_t)info->generation, (uint64_t)info->trunc_len, (uint64_t)info->data_bytes,
	       (uint64_t)info->status_offset, kvscratch_dtype_name(info->input_dtype),
	       (uint32_t)info->input_row_bytes, (uint32_t)info->frac_bits,
	       (uint64_t)info->saturated, kvscratch_backend_name(backend));
}

static void print_json(const struct kvscratch_info *info, enum kvscratch_backend backend)
{
	const struct kvscratch_promise *promises = kvscratch_promises(backend);

	putchar('{');
	print_json_members(info, backend);
	fputs(", \"promises\": {", stdout);
	for (int i = 0; promises[i].name; i++)
		printf("%s\"%s\": %s", i ? ", " : "", promises[i].name,
		       promises[i].holds ? "true" : "false");
	puts("}}");
}

/* What makes a pad of scaled integers one */
static void print_format(const struct kvscratch_info *info)
{
	if (info->dtype != KVSCRATCH_DTYPE_MXINT8 && info->dtype == info->input_dtype &&
	    !info->frac_bits)
		return;
	printf("%s", kvscratch_dtype_name(info->dtype));
	if (info->dtype != KVSCRATCH_DTYPE_MXINT8)
		printf(" with %" PRIu32 " fraction bits", (uint32_t)info->frac_bits);
	if (info->dtype != info->input_dtype)
		printf(", from %s, %" PRIu64 " saturated", kvscratch_dtype_name(info->input_dtype),
		       (uint64_t)info->saturated);
	putchar('\n');
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
	struct kvscratch_info info;
	struct kvscratch *pad;
	int err;

	if (args->name)
		err = open_held(args, O_RDONLY, &pad);
	else	/* which needs no rights */
		err = kvscratch_from_fd(&pad, args->fd) ?
		      fail(EXIT_SYSTEM, "%s", kvscratch_error()) : 0;
	if (err)
		return err;
	if (kvscratch_info(pad, &info)) {
		err = fail_pad(args, -EIO);
	} else if (given(args, OPT_JSON)) {
		print_json(&info, kvscratch_backend(pad));
	} else {
		print_display_line(info.len, &info);
		print_format(&info);
		print_promises(kvscratch_backend(pad));
	}
	kvscratch_close(pad);
	return err ? err : finish_output();
}
