// SPDX-License-Identifier: GPL-2.0-only
/*
 * llama: what kvscratch-ggml(7) left in a holder, and the way back into llama.cpp: a saved
 * sequence, as llama_state_seq_save_file() writes one, with a ticket in the place of the rows.
 */
#include "../ggml/ticket.h"
#include "ctl.h"
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* As the plug-in writes them, one for each row, in the last plane */
struct cell {
	int32_t token;
	int32_t position;
};

#define CELLS "cells"

/**
 * struct tag - what the plug-in says of a pad
 * @types: of keys and of values, as ggml calls them
 * @fingerprint: of the model
 * @text: the user's
 */
struct tag {
	char types[2][16];
	uint64_t fingerprint;
	char text[KVSCRATCH_TAG_BYTES + 1];
};

/* false: another program's */
static bool parse_tag(struct tag *tag, const struct kvscratch_pad_info *info)
{
	char text[KVSCRATCH_TAG_BYTES + 1] = "";
	int end = 0;

	memcpy(text, info->tag, KVSCRATCH_TAG_BYTES);
	*tag = (struct tag){ 0 };
	if (sscanf(text, "ggml k=%15s v=%15s %16" SCNx64 "%n", tag->types[0], tag->types[1],
		   &tag->fingerprint, &end) != 3)
		return false;
	if (text[end] == ' ')
		strcpy(tag->text, text + end + 1);
	return true;
}

static bool has_cells(const struct kvscratch *pad)
{
	const struct kvscratch_plane *last = kvscratch_plane(pad, kvscratch_nr_planes(pad) - 1);

	return !strncmp(last->label, CELLS, sizeof(last->label)) &&
	       last->dtype == KVSCRATCH_DTYPE_I32 && last->dim == 2;
}

/* ls */

static void print_json_text(const char *text)
{
	putchar('"');
	for (; *text; text++) {
		if (*text == '"' || *text == '\\' || (unsigned char)*text < ' ')
			printf("\\u%04x", (unsigned char)*text);
		else
			putchar(*text);
	}
	putchar('"');
}

static void print_sequence(const char *name, const struct kvscratch_pad_info *info,
			   const struct tag *tag, bool json, bool first)
{
	const uint64_t own = info->allocated_bytes;

	if (!json) {
		printf("%s: %" PRIu64 " tokens, %" PRIu64 " bytes own, %" PRIu64 " shared, k %s, "
		       "v %s, model %016" PRIx64 "%s%s\n", name, (uint64_t)info->len, own,
		       (uint64_t)info->shared_bytes, tag->types[0], tag->types[1],
		       tag->fingerprint, *tag->text ? " " : "", tag->text);
		return;
	}
	printf("%s{\"name\": \"%s\", \"tokens\": %" PRIu64 ", \"own_bytes\": %" PRIu64
	       ", \"shared_bytes\": %" PRIu64 ", \"k\": \"%s\", \"v\": \"%s\", \"model\": \"%016"
	       PRIx64 "\", \"text\": ", first ? "" : ",\n", name, (uint64_t)info->len, own,
	       (uint64_t)info->shared_bytes, tag->types[0], tag->types[1], tag->fingerprint);
	print_json_text(tag->text);
	putchar('}');
}

static int list(const struct arguments *args)
{
	static char names[KVSCRATCH_MAX_NAMES_BYTES];
	static int fds[KVSCRATCH_MAX_PASSED];
	const bool json = given(args, OPT_JSON);
	const char *name = names;
	bool first = true;
	int count, err = 0;

	if (!args->second || args->third)
		return fail(EXIT_INPUT, "expected one HOLDER, see --help");
	count = kvscratch_holder_get(args->second, O_RDONLY, names, sizeof(names), fds,
				     ARRAY_SIZE(fds));
	if (count < 0)
		return fail(count == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	if (json)
		putchar('[');
	for (int i = 0; i < count; i++, name += strlen(name) + 1) {
		struct kvscratch_pad_info info;
		struct kvscratch *pad;
		struct tag tag;

		if (kvscratch_from_fd(&pad, fds[i])) {
			close(fds[i]);
			err = fail(EXIT_SYSTEM, "%s/%s: %s", args->second, name, kvscratch_error());
			continue;
		}
		if (kvscratch_pad_info(pad, &info)) {
			err = fail(EXIT_SYSTEM, "%s/%s: %s", args->second, name, kvscratch_error());
		} else if (parse_tag(&tag, &info) && has_cells(pad)) {
			print_sequence(name, &info, &tag, json, first);
			first = false;
		}
		kvscratch_close(pad);
	}
	if (json)
		puts("]");
	return err ? err : finish_output();
}

/* ticket */

/* What a file of a sequence begins with, "qsgg", and the versions that are known */
#define SEQUENCE_MAGIC 0x67677371
#define OLDEST_VERSION 3
#define NEWEST_VERSION 4

static const struct {
	const char *name;
	int32_t number;
} types[] = {
	{ "f32", 0 }, { "f16", 1 }, { "q4_0", 2 }, { "q4_1", 3 }, { "q5_0", 6 }, { "q5_1", 7 },
	{ "q8_0", 8 }, { "iq4_nl", 20 }, { "bf16", 30 },
};

static int type_number(const char *name)
{
	for (size_t i = 0; i < ARRAY_SIZE(types); i++)
		if (!strcmp(types[i].name, name))
			return types[i].number;
	return -1;
}

/**
 * struct sequence - what a file is made of
 * @name: of the pad
 * @planes: keys and values in turn
 * @nr_layers: of each
 * @types: of keys and of values
 * @cells: what was computed
 * @nr_rows: how many
 * @ticket: in the place of the rows of each plane
 */
struct sequence {
	const char *name;
	const struct kvscratch_plane *planes;
	uint32_t nr_layers;
	int32_t types[2];
	struct cell *cells;
	uint64_t nr_rows;
	struct ticket ticket;
};

/* Bytes that are written one behind the other; holes are not */
struct writing {
	struct output *output;
	uint64_t offset;
	int err;
};

static void put(struct writing *to, const void *bytes, uint64_t count)
{
	if (!to->err)
		to->err = output_write(to->output, bytes, count, to->offset);
	to->offset += count;
}

static void put_u32(struct writing *to, uint32_t value)
{
	put(to, &value, sizeof(value));
}

static void put_u64(struct writing *to, uint64_t value)
{
	put(to, &value, sizeof(value));
}

static void put_tokens(struct writing *to, const struct sequence *sequence)
{
	put_u32(to, sequence->nr_rows);
	for (uint64_t row = 0; row < sequence->nr_rows; row++)
		put_u32(to, sequence->cells[row].token);
}

/* One stream, whose cells are each of one sequence, the first */
static void put_cells(struct writing *to, const struct sequence *sequence)
{
	put_u32(to, 1);
	put_u32(to, sequence->nr_rows);
	for (uint64_t row = 0; row < sequence->nr_rows; row++) {
		put_u32(to, sequence->cells[row].position);
		put_u32(to, 1);
		put_u32(to, 0);
	}
}

/* All keys, then all values */
static void put_rows(struct writing *to, const struct sequence *sequence)
{
	for (unsigned int kind = 0; kind < 2; kind++) {
		for (uint32_t layer = 0; layer < sequence->nr_layers; layer++) {
			const uint32_t row_bytes = sequence->planes[2 * layer + kind].row_bytes;
			uint64_t rows;

			put_u32(to, sequence->types[kind]);
			put_u64(to, row_bytes);
			rows = to->offset;
			put(to, &sequence->ticket, sizeof(sequence->ticket));
			to->offset = rows + sequence->nr_rows * row_bytes;
		}
	}
}

static int write_sequence(struct output *output, const struct sequence *sequence, uint32_t version)
{
	struct writing to = { .output = output };

	put_u32(&to, SEQUENCE_MAGIC);
	put_u32(&to, version);
	put_tokens(&to, sequence);
	put_cells(&to, sequence);
	/* values are not transposed */
	put_u32(&to, 0);
	put_u32(&to, sequence->nr_layers);
	/* neither keys nor values are rotated */
	if (version >= 4)
		put_u64(&to, 0);
	put_rows(&to, sequence);
	if (!to.err && ftruncate(output->fd, to.offset)) {
		to.err = -errno;
		snprintf(output->words, sizeof(output->words), "cannot extend: %s",
			 strerror(errno));
	}
	return to.err;
}

/* Keys and values of each layer, and what they are made of; an exit code after fail() */
static int check_planes(struct sequence *sequence, const struct kvscratch *pad,
			const struct tag *tag, uint32_t version)
{
	const uint32_t nr = kvscratch_nr_planes(pad) - 1;

	sequence->planes = kvscratch_plane(pad, 0);
	sequence->nr_layers = nr / 2;
	for (unsigned int i = 0; i < 2; i++) {
		sequence->types[i] = type_number(tag->types[i]);
		if (sequence->types[i] < 0)
			return fail(EXIT_INPUT, "%s: expected a cache of f32, f16, bf16 or a "
				    "quantized type that is known, got %s", sequence->name,
				    tag->types[i]);
		if (version >= 4 && tag->types[i][0] != 'f' && tag->types[i][0] != 'b')
			return fail(EXIT_INPUT, "%s: expected f32, f16 or bf16 for version %u, "
				    "which rotates quantized rows, got %s", sequence->name, version,
				    tag->types[i]);
	}
	for (uint32_t i = 0; i < nr; i++)
		if (nr % 2 || sequence->planes[i].label[0] != "kv"[i % 2])
			return fail(EXIT_INPUT, "%s: expected keys and values of each layer, got "
				    "plane %u, \"%.16s\"", sequence->name, i,
				    sequence->planes[i].label);
	for (uint32_t i = 0; i < nr; i++)
		if (sequence->nr_rows * sequence->planes[i].row_bytes < sizeof(struct ticket))
			return fail(EXIT_INPUT, "%s: expected rows of %zu bytes at the least, "
				    "got %" PRIu64 " of %u", sequence->name, sizeof(struct ticket),
				    sequence->nr_rows, sequence->planes[i].row_bytes);
	return 0;
}

static int read_cells(struct sequence *sequence, struct kvscratch *pad)
{
	const uint64_t nr = sequence->nr_rows;

	sequence->cells = calloc(nr, sizeof(*sequence->cells));
	if (!sequence->cells)
		return fail(EXIT_SYSTEM, "out of memory");
	if (kvscratch_copy_plane_rows(pad, kvscratch_nr_planes(pad) - 1, 0, nr, sequence->cells))
		return fail(EXIT_SYSTEM, "%s: %s", sequence->name, kvscratch_error());
	for (uint64_t row = 0; row < nr; row++)
		if (sequence->cells[row].token < 0 || sequence->cells[row].position < 0)
			return fail(EXIT_INPUT, "%s: expected the token and the position of each "
				    "row, row %" PRIu64 " has %d and %d", sequence->name, row,
				    sequence->cells[row].token, sequence->cells[row].position);
	sequence->ticket.cells_hash = ticket_hash(sequence->cells, nr * sizeof(struct cell));
	return 0;
}

static int describe_sequence(struct sequence *sequence, struct kvscratch *pad,
			     const struct arguments *args, uint32_t version)
{
	struct kvscratch_pad_info info;
	struct tag tag;
	int err;

	if (kvscratch_pad_info(pad, &info))
		return fail(EXIT_SYSTEM, "%s: %s", sequence->name, kvscratch_error());
	if (!parse_tag(&tag, &info) || !has_cells(pad))
		return fail(EXIT_INPUT, "%s: expected a pad of kvscratch-ggml, got another",
			    sequence->name);
	sequence->nr_rows = given(args, OPT_LEN) ? args->len : info.len;
	if (!sequence->nr_rows || sequence->nr_rows > info.len)
		return fail(EXIT_INPUT, "%s: expected 1 to %" PRIu64 " rows, got %" PRIu64,
			    sequence->name, (uint64_t)info.len, sequence->nr_rows);
	err = check_planes(sequence, pad, &tag, version);
	return err ? err : read_cells(sequence, pad);
}

static int save_sequence(const struct sequence *sequence, const char *path, uint32_t version)
{
	struct output output;
	int err = output_open(&output, path);

	if (!err)
		err = write_sequence(&output, sequence, version);
	if (!err)
		err = output_replace(&output);
	if (err)
		fail(EXIT_SYSTEM, "%s: %s", path, output.words);
	output_close(&output);
	return err ? EXIT_SYSTEM : 0;
}

static int write_ticket(const struct arguments *args)
{
	const uint32_t version = given(args, OPT_STATE_VERSION) ? args->state_version :
								  NEWEST_VERSION;
	struct sequence sequence = { .name = args->second };
	struct kvscratch *pad;
	int err;

	if (!args->second || !args->third)
		return fail(EXIT_INPUT, "expected HOLDER/PAD and FILE, see --help");
	if (version < OLDEST_VERSION || version > NEWEST_VERSION)
		return fail(EXIT_INPUT, "--state-version: expected %u or %u, got %u",
			    OLDEST_VERSION, NEWEST_VERSION, version);
	if (strlen(args->second) > TICKET_NAME_BYTES)
		return fail(EXIT_INPUT, "expected a name of at most %u bytes, got \"%s\"",
			    TICKET_NAME_BYTES, args->second);
	memcpy(sequence.ticket.magic, TICKET_MAGIC, sizeof(sequence.ticket.magic));
	memcpy(sequence.ticket.pad, args->second, strlen(args->second));
	err = kvscratch_attach_name(&pad, args->second, O_RDONLY);
	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	err = describe_sequence(&sequence, pad, args, version);
	if (!err)
		err = save_sequence(&sequence, args->third, version);
	free(sequence.cells);
	kvscratch_close(pad);
	return err;
}

int run_llama(const struct arguments *args)
{
	if (args->argument && !strcmp(args->argument, "ls"))
		return list(args);
	if (args->argument && !strcmp(args->argument, "ticket"))
		return write_ticket(args);
	return fail(EXIT_INPUT, "expected ls or ticket, got \"%s\"",
		    args->argument ? args->argument : "");
}
