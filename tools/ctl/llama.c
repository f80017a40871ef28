// SPDX-License-Identifier: GPL-2.0-only
/*
 * llama: what kvscratch-ggml(7) puts into a holder, its tokens as they come, and the way back
 * into llama.cpp: a saved sequence, as llama_state_seq_save_file() writes one, with a ticket in
 * the place of the rows.
 */
#define _GNU_SOURCE
#include "../ggml/ticket.h"
#include "../interrupt.h"
#include "http.h"
#include "json.h"
#include "output.h"
#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
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

/* Types and text are what somebody wrote there. */
static void print_sequence(const char *name, const struct kvscratch_pad_info *info,
			   const struct tag *tag)
{
	printf("%s: %" PRIu64 " tokens, %" PRIu64 " bytes own, %" PRIu64 " shared, k ", name,
	       (uint64_t)info->len, (uint64_t)info->allocated_bytes, (uint64_t)info->shared_bytes);
	print_escaped(tag->types[0], strlen(tag->types[0]));
	fputs(", v ", stdout);
	print_escaped(tag->types[1], strlen(tag->types[1]));
	printf(", model %016" PRIx64 "%s", tag->fingerprint, *tag->text ? " " : "");
	print_escaped(tag->text, strlen(tag->text));
	putchar('\n');
}

static void print_json_sequence(const char *name, const struct kvscratch_pad_info *info,
				const struct tag *tag)
{
	printf("{\"name\": \"%s\", \"tokens\": %" PRIu64 ", \"own_bytes\": %" PRIu64
	       ", \"shared_bytes\": %" PRIu64 ", \"k\": ", name, (uint64_t)info->len,
	       (uint64_t)info->allocated_bytes, (uint64_t)info->shared_bytes);
	print_json_bytes(tag->types[0], strlen(tag->types[0]));
	fputs(", \"v\": ", stdout);
	print_json_bytes(tag->types[1], strlen(tag->types[1]));
	printf(", \"model\": \"%016" PRIx64 "\", \"text\": ", tag->fingerprint);
	print_json_bytes(tag->text, strlen(tag->text));
	putchar('}');
}

static int list(const struct arguments *args)
{
	static struct handles handles;
	const bool json = given(args, OPT_JSON);
	const char *name = handles.names;
	bool first = true;
	int count, err = 0;

	count = kvscratch_holder_get(args->second, O_RDONLY, handles.names, sizeof(handles.names),
				     handles.fds, ARRAY_SIZE(handles.fds));
	if (count < 0)
		return fail(count == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	if (json)
		putchar('[');
	for (int i = 0; i < count; i++, name += strlen(name) + 1) {
		struct kvscratch_pad_info info;
		struct kvscratch *pad;
		struct tag tag;

		if (kvscratch_from_fd(&pad, handles.fds[i])) {
			close(handles.fds[i]);
			err = fail(EXIT_SYSTEM, "%s/%s: %s", args->second, name, kvscratch_error());
			continue;
		}
		if (kvscratch_pad_info(pad, &info)) {
			err = fail(EXIT_SYSTEM, "%s/%s: %s", args->second, name, kvscratch_error());
		} else if (parse_tag(&tag, &info) && has_cells(pad)) {
			if (json && !first)
				puts(",");
			(json ? print_json_sequence : print_sequence)(name, &info, &tag);
			first = false;
		}
		kvscratch_close(pad);
	}
	if (json)
		puts("]");
	return err ? err : finish_output();
}

/* The pad of @name, which is to be one of the plug-in's; 0, or an exit code after fail() */
static int open_sequence(struct kvscratch **pad, const char *name, struct kvscratch_pad_info *info,
			 struct tag *tag)
{
	int err = kvscratch_attach_name(pad, name, O_RDONLY);

	if (err)
		return fail(err == -EINVAL ? EXIT_INPUT : EXIT_SYSTEM, "%s", kvscratch_error());
	if (kvscratch_pad_info(*pad, info))
		err = fail(EXIT_SYSTEM, "%s: %s", name, kvscratch_error());
	else if (!parse_tag(tag, info) || !has_cells(*pad))
		err = fail(EXIT_INPUT, "%s: expected a pad of kvscratch-ggml, got another", name);
	if (err)
		kvscratch_close(*pad);
	return err;
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
	if (!strcmp(tag->types[1], "-"))
		return fail(EXIT_INPUT, "%s: the values are not in the pad: flash attention is off",
			    sequence->name);
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
	int err;

	sequence->cells = calloc(nr, sizeof(*sequence->cells));
	if (!sequence->cells)
		return fail(EXIT_SYSTEM, "out of memory");
	/* as they are at one moment */
	err = kvscratch_copy_plane_rows(pad, kvscratch_nr_planes(pad) - 1, 0, nr, sequence->cells);
	if (err == -EINVAL)
		return fail(EXIT_SYSTEM, "%s: expected %" PRIu64 " rows, some were dropped "
			    "meanwhile", sequence->name, nr);
	if (err)
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
			     const struct kvscratch_pad_info *info, const struct tag *tag,
			     const struct arguments *args, uint32_t version)
{
	int err;

	sequence->nr_rows = given(args, OPT_LEN) ? args->len : info->len;
	if (!sequence->nr_rows || sequence->nr_rows > info->len)
		return fail(EXIT_INPUT, "%s: expected 1 to %" PRIu64 " rows, got %" PRIu64,
			    sequence->name, (uint64_t)info->len, sequence->nr_rows);
	err = check_planes(sequence, pad, tag, version);
	return err ? err : read_cells(sequence, pad);
}

/* As the file @path, which is replaced in one step */
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

/* The same where no such file is, for one who reads it at once: it may never be on disk. */
static int save_passing_sequence(const struct sequence *sequence, const char *path,
				 uint32_t version)
{
	struct output output = { .fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600) };
	int err;

	if (output.fd < 0)
		return fail(EXIT_SYSTEM, "%s: cannot make: %s", path, strerror(errno));
	err = write_sequence(&output, sequence, version);
	close(output.fd);
	if (!err)
		return 0;
	unlink(path);
	return fail(EXIT_SYSTEM, "%s: %s", path, output.words);
}

/* A ticket for the pad args->second as the file @path; *@nr_rows says of how many rows */
static int save_ticket(const struct arguments *args, const char *path, bool passes,
		       uint64_t *nr_rows)
{
	const uint32_t version = given(args, OPT_STATE_VERSION) ? args->state_version :
								  NEWEST_VERSION;
	struct sequence sequence = { .name = args->second };
	struct kvscratch_pad_info info;
	struct kvscratch *pad;
	struct tag tag;
	int err;

	if (version < OLDEST_VERSION || version > NEWEST_VERSION)
		return fail(EXIT_INPUT, "--state-version: expected %u or %u, got %u",
			    OLDEST_VERSION, NEWEST_VERSION, version);
	if (strlen(args->second) > TICKET_NAME_BYTES)
		return fail(EXIT_INPUT, "expected a name of at most %u bytes, got \"%s\"",
			    TICKET_NAME_BYTES, args->second);
	memcpy(sequence.ticket.magic, TICKET_MAGIC, sizeof(sequence.ticket.magic));
	memcpy(sequence.ticket.pad, args->second, strlen(args->second));
	err = open_sequence(&pad, args->second, &info, &tag);
	if (err)
		return err;
	err = describe_sequence(&sequence, pad, &info, &tag, args, version);
	if (!err)
		err = passes ? save_passing_sequence(&sequence, path, version) :
			       save_sequence(&sequence, path, version);
	*nr_rows = sequence.nr_rows;
	free(sequence.cells);
	kvscratch_close(pad);
	return err;
}

static int write_ticket(const struct arguments *args)
{
	uint64_t nr_rows;

	return save_ticket(args, args->third, false, &nr_rows);
}

/* restore */

/* Go to the value of @key in the object that comes. */
static bool go_to(struct json *json, const char *key)
{
	const char *name;

	if (json_begin(json, '{', "an object"))
		return false;
	for (size_t taken = 0; json_goes_on(json, taken, '}') > 0; taken++) {
		if (json_string(json, &name, "a key") || json_begin(json, ':', "':'"))
			return false;
		if (!strcmp(name, key))
			return true;
		if (json_skip_value(json, 0))
			return false;
	}
	return false;
}

/* {"error": {"message": "..."}}, of which a terminal shows one line */
static const char *message_of(struct json *json)
{
	const char *text;

	if (!go_to(json, "error") || !go_to(json, "message") ||
	    json_string(json, &text, "a message"))
		return "no message";
	for (char *at = (char *)text; *at; at++)
		if ((unsigned char)*at < ' ' || *at == 0x7f)
			*at = ' ';
	return text;
}

/* What the server made of the ticket: {"n_restored": 7} */
static int check_answer(const struct http_server *server, struct http_answer *answer,
			uint64_t nr_rows)
{
	struct json json = {
		.start = answer->body,
		.at = answer->body,
		.end = answer->body + answer->bytes,
	};
	uint64_t restored;

	if (answer->status != 200)
		return fail(EXIT_SYSTEM, "%s: expected status 200, got %u: %s", server->text,
			    answer->status, message_of(&json));
	if (!go_to(&json, "n_restored") || json_number(&json, &restored))
		return fail(EXIT_SYSTEM, "%s: expected an answer of llama-server, got another",
			    server->text);
	if (restored != nr_rows)
		return fail(EXIT_SYSTEM, "%s: expected %" PRIu64 " tokens to be restored, got %"
			    PRIu64, server->text, nr_rows, restored);
	return 0;
}

static int ask_for_restore(const struct arguments *args, const struct http_server *server,
			   const char *file, uint64_t nr_rows)
{
	static struct http_answer answer;
	char path[64], json[64];
	int err;

	snprintf(path, sizeof(path), "/slots/%" PRIu64 "?action=restore", args->slot);
	snprintf(json, sizeof(json), "{\"filename\": \"%s\"}", file);
	err = http_post(server, path, json, args->timeout, &answer);
	return err ? err : check_answer(server, &answer, nr_rows);
}

/* The server reads the ticket while it is asked, and nobody later. */
static int restore(const struct arguments *args)
{
	struct http_server server;
	uint64_t number, nr_rows;
	char file[40], *path;
	int err;

	if (!args->slot_dir)
		return fail(EXIT_INPUT, "expected --slot-dir, the --slot-save-path of the server");
	err = http_parse_server(&server, args->third);
	if (err)
		return err;
	if (getrandom(&number, sizeof(number), 0) < 0)
		return fail(EXIT_SYSTEM, "cannot name a ticket: %s", strerror(errno));
	snprintf(file, sizeof(file), "kvscratch-%016" PRIx64, number);
	if (asprintf(&path, "%s/%s", args->slot_dir, file) < 0)
		return fail(EXIT_SYSTEM, "out of memory");
	catch_interrupts();
	err = save_ticket(args, path, true, &nr_rows);
	if (!err) {
		err = ask_for_restore(args, &server, file, nr_rows);
		if (unlink(path) && !err)
			err = fail(EXIT_SYSTEM, "%s: cannot remove: %s", path, strerror(errno));
	}
	free(path);
	return err && interrupted() ? end_by(interrupted()) : err;
}

/* tail */

static void tell_token(const struct watch *watch)
{
	struct cell cell;

	memcpy(&cell, watch->row, sizeof(cell));
	printf(given(watch->args, OPT_JSON) ? "{\"token\": %d, \"position\": %d}\n" : "%d %d\n",
	       cell.token, cell.position);
}

static void tell_rollback(const struct watch *watch)
{
	printf(given(watch->args, OPT_JSON) ? "{\"rollback\": %" PRIu32 "}\n" :
	       "rollback to %" PRIu32 "\n", watch->seen);
}

static int tail(const struct arguments *args)
{
	struct watch watch = {
		.args = args,
		.sock = -1,
		.by_writer = true,
		.idle_ms = given(args, OPT_TIMEOUT) ? (int64_t)args->timeout * 1000 : -1,
		.tell = { tell_token, tell_rollback, NULL },
	};
	struct kvscratch_pad_info info;
	struct tag tag;
	int err = open_sequence(&watch.pad, args->second, &info, &tag);

	if (err)
		return err;
	watch.selection.first = info.nr_planes - 1;
	watch.selection.planes = kvscratch_plane(watch.pad, watch.selection.first);
	watch.selection.count = 1;
	watch.selection.row_bytes = sizeof(struct cell);
	err = watch_pad(&watch);
	kvscratch_close(watch.pad);
	return err;
}

#define BIT(option) (1u << (option))

/**
 * struct subverb - what llama can do
 * @name: the first argument
 * @run: does it
 * @takes: the other arguments, and how many they are
 * @options: those that it takes, a bit per option
 */
static const struct subverb {
	const char *name;
	int (*run)(const struct arguments *args);
	const char *takes;
	unsigned int nr_arguments;
	uint32_t options;
} subverbs[] = {
	{ "ls", list, "HOLDER", 1, BIT(OPT_JSON) },
	{ "ticket", write_ticket, "HOLDER/PAD and FILE", 2,
	  BIT(OPT_LEN) | BIT(OPT_STATE_VERSION) },
	{ "restore", restore, "HOLDER/PAD and ADDRESS:PORT", 2,
	  BIT(OPT_LEN) | BIT(OPT_STATE_VERSION) | BIT(OPT_SLOT) | BIT(OPT_SLOT_DIR) |
	  BIT(OPT_TIMEOUT) },
	{ "tail", tail, "HOLDER/PAD", 1, BIT(OPT_JSON) | BIT(OPT_UNTIL) | BIT(OPT_TIMEOUT) },
};

int run_llama(const struct arguments *args)
{
	const unsigned int nr_arguments = !!args->second + !!args->third;

	for (size_t i = 0; i < ARRAY_SIZE(subverbs) && args->argument; i++) {
		const struct subverb *subverb = &subverbs[i];

		if (strcmp(args->argument, subverb->name))
			continue;
		if (nr_arguments != subverb->nr_arguments)
			return fail(EXIT_INPUT, "%s: expected %s", subverb->name, subverb->takes);
		if (args->given & ~subverb->options)
			return fail(EXIT_INPUT, "%s: unexpected option, see --help", subverb->name);
		return subverb->run(args);
	}
	return fail(EXIT_INPUT, "expected ls, ticket, restore or tail, got \"%s\"",
		    args->argument ? args->argument : "");
}
