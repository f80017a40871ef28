// SPDX-License-Identifier: GPL-2.0-only
/*
 * The planes of a pad: what a new one is to have, from the command line or a file, and those
 * that a verb works on.
 */
#define _GNU_SOURCE
#include "ctl.h"
#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/**
 * struct new_planes - what a new pad is to have
 * @source: where it was said: an option or a file
 * @list: as many as there may be
 * @count: how many
 */
struct new_planes {
	const char *source;
	struct kvscratch_plane list[KVSCRATCH_MAX_PLANES];
	uint32_t count;
};

static int set_label(const struct new_planes *planes, struct kvscratch_plane *plane,
		     const char *label, size_t length)
{
	if (length >= sizeof(plane->label))
		return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": expected a label of at most %zu "
			    "bytes, got %zu", planes->source, planes->count,
			    sizeof(plane->label) - 1, length);
	memcpy(plane->label, label, length);
	return 0;
}

static int set_number(const struct new_planes *planes, uint32_t *number, const char *what,
		      uint64_t min, uint64_t max, uint64_t got)
{
	if (got < min || got > max)
		return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": %s: expected %" PRIu64 " to %" PRIu64
			    ", got %" PRIu64, planes->source, planes->count, what, min, max, got);
	*number = got;
	return 0;
}

static int set_dim(const struct new_planes *planes, struct kvscratch_plane *plane, uint64_t dim)
{
	return set_number(planes, &plane->dim, "dim", 1, KVSCRATCH_MAX_ROW_BYTES, dim);
}

static int set_frac_bits(const struct new_planes *planes, struct kvscratch_plane *plane,
			 uint64_t bits)
{
	return set_number(planes, &plane->frac_bits, "fraction bits", 0, KVSCRATCH_MAX_FRAC_BITS,
			  bits);
}

static int set_dtype(const struct new_planes *planes, uint32_t *dtype, const char *name)
{
	*dtype = kvscratch_dtype_by_name(name);
	if (*dtype)
		return 0;
	return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": expected a dtype of f64 f32 f16 bf16 i64 "
		    "i32 i16 i8 u8 or mxint8, got \"%s\"", planes->source, planes->count, name);
}

/* The next one, or NULL when there are as many as there may be */
static struct kvscratch_plane *next_plane(const struct new_planes *planes,
					  struct kvscratch_plane *list)
{
	if (planes->count < KVSCRATCH_MAX_PLANES) {
		list[planes->count] = (struct kvscratch_plane){ .dtype = KVSCRATCH_DTYPE_F32 };
		return &list[planes->count];
	}
	fail(EXIT_INPUT, "%s: expected at most %u planes, got more", planes->source,
	     KVSCRATCH_MAX_PLANES);
	return NULL;
}

/* --planes */

static int parse_count(const struct new_planes *planes, const char *what, const char *text,
		       uint64_t *number)
{
	char *end;

	errno = 0;
	*number = strtoull(text, &end, 10);
	if (*text >= '0' && *text <= '9' && !*end && !errno)
		return 0;
	return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": %s: expected a whole number, got \"%s\"",
		    planes->source, planes->count, what, text);
}

/* LABEL:DIM[:DTYPE[:INPUT[:FRAC_BITS]]], where what is empty is as if it were not there */
static int parse_plane(const struct new_planes *planes, struct kvscratch_plane *plane, char *text)
{
	const char *fields[5] = { 0 };
	uint64_t number;
	unsigned int count = 0;
	char *rest = text;
	int err;

	while (rest && count < ARRAY_SIZE(fields))
		fields[count++] = strsep(&rest, ":");
	if (count < 2 || rest)
		return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": expected "
			    "LABEL:DIM[:DTYPE[:INPUT[:FRAC-BITS]]], got %s", planes->source,
			    planes->count, rest ? "more" : "no DIM");
	err = set_label(planes, plane, fields[0], strlen(fields[0]));
	if (!err)
		err = parse_count(planes, "dim", fields[1], &number);
	if (!err)
		err = set_dim(planes, plane, number);
	if (!err && fields[2] && *fields[2])
		err = set_dtype(planes, &plane->dtype, fields[2]);
	if (!err && fields[3] && *fields[3])
		err = set_dtype(planes, &plane->input_dtype, fields[3]);
	if (!err && fields[4] && *fields[4]) {
		err = parse_count(planes, "fraction bits", fields[4], &number);
		if (!err)
			err = set_frac_bits(planes, plane, number);
	}
	return err;
}

static int parse_planes(struct new_planes *planes, const char *text)
{
	char *copy = strdup(text);
	char *rest = copy;
	int err = copy ? 0 : fail(EXIT_SYSTEM, "out of memory");

	while (!err && rest) {
		struct kvscratch_plane *plane = next_plane(planes, planes->list);

		err = plane ? parse_plane(planes, plane, strsep(&rest, ",")) : EXIT_INPUT;
		if (!err)
			planes->count++;
	}
	free(copy);
	return err;
}

/* --planes-file */

/* More than 4096 planes can fill */
#define MAX_FILE_BYTES (4 << 20)

static int fail_json(const struct new_planes *planes, const struct json *json)
{
	return fail(EXIT_INPUT, "%s: %s", planes->source, json->words);
}

static int parse_member(const struct new_planes *planes, struct kvscratch_plane *plane,
			struct json *json, const char *key)
{
	bool dim = !strcmp(key, "dim"), bits = !strcmp(key, "frac_bits");
	const char *text = NULL;
	uint64_t number;

	if (dim || bits) {
		if (json_number(json, &number))
			return fail_json(planes, json);
		return dim ? set_dim(planes, plane, number) : set_frac_bits(planes, plane, number);
	}
	if (strcmp(key, "label") && strcmp(key, "dtype") && strcmp(key, "input_dtype"))
		return json_skip_value(json, 0) ? fail_json(planes, json) : 0;
	if (json_string(json, &text, "a string"))
		return fail_json(planes, json);
	if (!strcmp(key, "label"))
		return set_label(planes, plane, text, strlen(text));
	return set_dtype(planes, !strcmp(key, "dtype") ? &plane->dtype : &plane->input_dtype, text);
}

static int parse_object(const struct new_planes *planes, struct kvscratch_plane *plane,
			struct json *json)
{
	size_t taken = 0;
	const char *key;
	int more;

	if (json_begin(json, '{', "an object as a plane"))
		return fail_json(planes, json);
	while ((more = json_goes_on(json, taken++, '}')) > 0) {
		int err;

		if (json_string(json, &key, "a key of a plane") || json_begin(json, ':', "':'"))
			return fail_json(planes, json);
		err = parse_member(planes, plane, json, key);
		if (err)
			return err;
	}
	if (more < 0)
		return fail_json(planes, json);
	if (!plane->dim)
		return fail(EXIT_INPUT, "%s: plane %" PRIu32 ": expected a dim, got none",
			    planes->source, planes->count);
	return 0;
}

static int parse_list(struct new_planes *planes, struct json *json)
{
	int more;

	if (json_begin(json, '[', "a list of planes"))
		return fail_json(planes, json);
	while ((more = json_goes_on(json, planes->count, ']')) > 0) {
		struct kvscratch_plane *plane = next_plane(planes, planes->list);
		int err = plane ? parse_object(planes, plane, json) : EXIT_INPUT;

		if (err)
			return err;
		planes->count++;
	}
	return more < 0 ? fail_json(planes, json) : 0;
}

/* The member "planes" of an object, as info --json prints it; what else there is does not count */
static int parse_description(struct new_planes *planes, struct json *json)
{
	bool found = false;
	size_t taken = 0;
	const char *key;
	int more, err;

	while ((more = json_goes_on(json, taken++, '}')) > 0) {
		if (json_string(json, &key, "a key") || json_begin(json, ':', "':'"))
			return fail_json(planes, json);
		if (strcmp(key, "planes")) {
			err = json_skip_value(json, 0) ? fail_json(planes, json) : 0;
		} else {
			err = found ? fail(EXIT_INPUT, "%s: expected one list \"planes\", got two",
					   planes->source) : parse_list(planes, json);
			found = true;
		}
		if (err)
			return err;
	}
	if (more < 0)
		return fail_json(planes, json);
	return found ? 0 : fail(EXIT_INPUT, "%s: expected an object with \"planes\", got none",
				planes->source);
}

static int parse_file(struct new_planes *planes, char *text, size_t bytes)
{
	struct json json = { .start = text, .at = text, .end = text + bytes };
	int err;

	json_skip_blanks(&json);
	err = json_take(&json, '{') ? parse_description(planes, &json) : parse_list(planes, &json);
	json_skip_blanks(&json);
	if (!err && json.at != json.end) {
		json_unexpected(&json, "its end");
		err = fail_json(planes, &json);
	}
	return err;
}

static int read_planes(struct new_planes *planes, const char *path)
{
	char *text = malloc(MAX_FILE_BYTES);
	size_t bytes = 0;
	FILE *file;
	int err = 0;

	if (!text)
		return fail(EXIT_SYSTEM, "out of memory");
	file = strcmp(path, "-") ? fopen(path, "re") : stdin;
	if (!file) {
		err = fail(EXIT_INPUT, "%s: cannot open: %s", path, strerror(errno));
	} else {
		errno = 0;
		bytes = fread(text, 1, MAX_FILE_BYTES, file);
		if (ferror(file))
			err = fail(EXIT_INPUT, "%s: cannot read: %s", path, strerror(errno));
		else if (bytes == MAX_FILE_BYTES)
			err = fail(EXIT_INPUT, "%s: expected less than %d bytes, got more", path,
				   MAX_FILE_BYTES);
	}
	if (!err)
		err = parse_file(planes, text, bytes);
	if (file && file != stdin)
		fclose(file);
	free(text);
	return err;
}

/* New pads */

static int only_plane(const struct arguments *args, struct new_planes *planes)
{
	planes->list[0] = (struct kvscratch_plane){
		.dim = args->dim,
		.dtype = args->dtype,
		.input_dtype = args->input_dtype,
		.frac_bits = args->frac_bits,
	};
	planes->count = 1;
	return 0;
}

static int collect_planes(const struct arguments *args, struct new_planes *planes)
{
	static const enum option_id of_one[] = { OPT_DIM, OPT_DTYPE, OPT_INPUT, OPT_FRAC_BITS };
	bool list = given(args, OPT_PLANES), file = given(args, OPT_PLANES_FILE);

	if (!given(args, OPT_MAX_SEQ_LEN) || (!given(args, OPT_DIM) && !list && !file))
		return fail(EXIT_INPUT, "expected --max-seq-len, and --dim or --planes");
	if (list && file)
		return fail(EXIT_INPUT, "expected either --planes or --planes-file, got both");
	for (size_t i = 0; (list || file) && i < ARRAY_SIZE(of_one); i++)
		if (given(args, of_one[i]))
			return fail(EXIT_INPUT, "expected planes or --dim, --dtype, --input and "
				    "--frac-bits of the only one, got both");
	planes->source = list ? "--planes" : args->planes_file;
	return list ? parse_planes(planes, args->planes) :
	       file ? read_planes(planes, args->planes_file) : only_plane(args, planes);
}

int make_pad(const struct arguments *args, struct kvscratch **pad)
{
	struct new_planes *planes = calloc(1, sizeof(*planes));
	size_t tag_bytes = args->tag ? strlen(args->tag) : 0;
	int err;

	if (!planes)
		return fail(EXIT_SYSTEM, "out of memory");
	err = collect_planes(args, planes);
	if (!err && tag_bytes > KVSCRATCH_TAG_BYTES)
		err = fail(EXIT_INPUT, "--tag: expected at most %d bytes, got %zu",
			   KVSCRATCH_TAG_BYTES, tag_bytes);
	if (!err) {
		err = kvscratch_new_planes(pad, args->max_seq_len, planes->list, planes->count,
					   args->tag, tag_bytes);
		if (err)
			err = fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s",
				   kvscratch_error());
	}
	free(planes);
	return err;
}

/* Planes that are there */

/* By its label, or else by its index */
int find_plane(const struct kvscratch *pad, const char *name, uint32_t *index)
{
	int found = kvscratch_find_plane(pad, name);
	char *end;
	unsigned long number;

	if (found == -ENOENT && *name >= '0' && *name <= '9') {
		errno = 0;
		number = strtoul(name, &end, 10);
		if (!*end && !errno && number < kvscratch_nr_planes(pad))
			found = (int)number;
	}
	if (found < 0)
		return fail(EXIT_INPUT, "--plane: %s", kvscratch_error());
	*index = found;
	return 0;
}

int select_planes(const struct arguments *args, const struct kvscratch *pad,
		  struct selection *selection)
{
	int err;

	*selection = (struct selection){ .count = kvscratch_nr_planes(pad) };
	if (args->nr_plane_values) {
		err = find_plane(pad, args->plane_values[args->nr_plane_values - 1],
				 &selection->first);
		if (err)
			return err;
		selection->count = 1;
	}
	selection->planes = kvscratch_plane(pad, selection->first);
	for (uint32_t i = 0; i < selection->count; i++)
		selection->row_bytes += stored_row_bytes(&selection->planes[i]);
	return 0;
}

int copy_selected(struct kvscratch *pad, const struct selection *selection, uint64_t first,
		  uint64_t count, void *rows)
{
	if (selection->count == 1)
		return kvscratch_copy_plane_rows(pad, selection->first, first, count, rows);
	return kvscratch_copy_rows(pad, first, count, rows);
}

void print_escaped(const void *text, size_t bytes)
{
	for (const unsigned char *at = text; bytes--; at++) {
		if (*at >= ' ' && *at <= '~' && *at != '\\')
			putchar(*at);
		else
			printf("\\x%02x", *at);
	}
}

void print_json_bytes(const void *text, size_t bytes)
{
	putchar('"');
	for (const unsigned char *at = text; bytes--; at++) {
		if (*at >= ' ' && *at <= '~' && *at != '\\' && *at != '"')
			putchar(*at);
		else
			printf("\\u%04x", *at);
	}
	putchar('"');
}

void print_plane_name(const struct kvscratch_plane *plane, uint32_t index)
{
	if (*plane->label)
		print_escaped(plane->label, strlen(plane->label));
	else
		printf("%" PRIu32, index);
}

void print_selected_row(const struct selection *selection, const char *row, const char *before)
{
	for (uint32_t i = 0; i < selection->count; i++) {
		const struct kvscratch_plane *plane = &selection->planes[i];

		fputs(before, stdout);
		if (selection->count > 1) {
			if (*before)
				putchar(' ');
			print_plane_name(plane, i);
		}
		if (*before || selection->count > 1)
			fputs(": ", stdout);
		print_row(plane, row);
		row += stored_row_bytes(plane);
	}
}
