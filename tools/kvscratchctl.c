// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvscratchctl: drive pads from the shell.
 *
 * A verb works on the pad of a descriptor that it inherits, or on one that a holder
 * keeps under a name. The verbs themselves are in ctl/.
 */
#define _GNU_SOURCE
#include "ctl/ctl.h"

#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <string.h>

/* Options: one set for all verbs, each verb takes some of them */

static int parse_dtype(const char *name, const char *text, uint32_t *dtype)
{
	*dtype = kvscratch_dtype_by_name(text);
	if (*dtype)
		return 0;
	return fail(EXIT_INPUT,
		    "--%s: expected f64 f32 f16 bf16 i64 i32 i16 i8 u8 or mxint8, got \"%s\"",
		    name, text);
}

static int parse_format(const char *text, enum format *format)
{
	static const char *const names[] = {
		[FORMAT_TEXT] = "text",
		[FORMAT_RAW] = "raw",
		[FORMAT_NPY] = "npy",
	};

	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		if (names[i] && !strcmp(text, names[i])) {
			*format = i;
			return 0;
		}
	}
	return fail(EXIT_INPUT, "--format: expected text, raw or npy, got \"%s\"", text);
}

static int parse_option(struct arguments *args, int option, const char *text)
{
	uint64_t value;
	int err;

	/* of all values only the name of a pad in a file can be empty */
	if (text && !*text && option != OPT_PAD)
		return fail(EXIT_INPUT, "expected a value for each option, got an empty one");
	switch (option) {
	case OPT_FD:
		err = parse_integer(EXIT_INPUT, "fd", text, 0, INT_MAX, &value);
		args->fd = value;
		return err;
	case OPT_NAME:
		args->name = text;
		return 0;
	case OPT_MAX_SEQ_LEN:
		return parse_integer(EXIT_INPUT, "max-seq-len", text, 1, KVSCRATCH_MAX_SEQ_LEN,
				     &args->max_seq_len);
	case OPT_DIM:
		return parse_integer(EXIT_INPUT, "dim", text, 1, KVSCRATCH_MAX_ROW_BYTES,
				     &args->dim);
	case OPT_DTYPE:
		return parse_dtype("dtype", text, &args->dtype);
	case OPT_INPUT:
		return parse_dtype("input", text, &args->input_dtype);
	case OPT_FRAC_BITS:
		return parse_integer(EXIT_INPUT, "frac-bits", text, 0, KVSCRATCH_MAX_FRAC_BITS,
				     &args->frac_bits);
	case OPT_LEN:
		return parse_integer(EXIT_INPUT, "len", text, 0, KVSCRATCH_MAX_SEQ_LEN, &args->len);
	case OPT_FORMAT:
		return parse_format(text, &args->format);
	case OPT_JSON:
		args->format = FORMAT_JSON;
		return 0;
	case OPT_OUTPUT:
		args->output = text;
		return 0;
	case OPT_SOCKET:
		args->socket = text;
		return 0;
	case OPT_PAD:
		args->pad = text;
		return 0;
	case OPT_UNTIL:
		return parse_integer(EXIT_INPUT, "until", text, 0, KVSCRATCH_MAX_SEQ_LEN,
				     &args->until);
	case OPT_PLANES:
		args->planes = text;
		return 0;
	case OPT_PLANES_FILE:
		args->planes_file = text;
		return 0;
	case OPT_TAG:
		args->tag = text;
		return 0;
	case OPT_PLANE:
		if (args->nr_plane_values == ARRAY_SIZE(args->plane_values))
			return fail(EXIT_INPUT, "--plane: expected at most %zu of them, got more",
				    ARRAY_SIZE(args->plane_values));
		args->plane_values[args->nr_plane_values++] = text;
		return 0;
	case OPT_STATE_VERSION:
		return parse_integer(EXIT_INPUT, "state-version", text, 1, INT_MAX,
				     &args->state_version);
	case OPT_SLOT:
		return parse_integer(EXIT_INPUT, "slot", text, 0, INT_MAX, &args->slot);
	case OPT_SLOT_DIR:
		args->slot_dir = text;
		return 0;
	case OPT_TIMEOUT:
		return parse_integer(EXIT_INPUT, "timeout", text, 0, INT_MAX / 1000, &args->timeout);
	default:
		return 0;
	}
}

/* Verbs */

#define OPTION(name, argument, id) { name, argument, NULL, id }
#define HELP OPTION("help", no_argument, OPT_HELP)
#define END { 0 }
#define MAX_OPTIONS 16

enum {
	TAKES_FD = 1,
	TAKES_NAME = 2,
	TAKES_PAD = TAKES_FD | TAKES_NAME,
	TAKES_ARGUMENT = 4,
	TAKES_COMMAND = 8,
	TAKES_TWO_ARGUMENTS = 32 | TAKES_ARGUMENT,
	TAKES_THREE_ARGUMENTS = 64 | TAKES_TWO_ARGUMENTS,
	/* --fd says where the command finds the handle, --name which pad it is of */
	TAKES_BOTH = 16 | TAKES_PAD | TAKES_COMMAND,
};

/**
 * struct verb - what the tool can do
 * @name: how it is called
 * @summary: one line for the list
 * @help: the rest of its help
 * @run: does it, returns an exit code
 * @takes: what it may have besides its options
 * @options: those that it takes
 */
struct verb {
	const char *name;
	const char *summary;
	const char *help;
	int (*run)(const struct arguments *args);
	unsigned int takes;
	struct option options[MAX_OPTIONS];
};

#define GEOMETRY_HELP \
"  --max-seq-len N  rows (tokens) that fit\n" \
"  --dim N          elements per row; a multiple of 32 for mxint8\n" \
"  --dtype TYPE     f64 f32 f16 bf16 i64 i32 i16 i8 u8 mxint8 (f32)\n" \
"  --input TYPE     f64 f32 f16 or bf16: what append takes, to be converted to\n" \
"                   mxint8, i64, i32, i16 or i8 (as stored)\n" \
"  --frac-bits N    fraction bits of an integer: i stands for i * 2^-N (0)\n" \
"  --planes LIST    instead, a pad of several planes: LABEL:DIM[:TYPE[:INPUT[:BITS]]]\n" \
"                   for each, as --dim to --frac-bits, with a comma between them\n" \
"  --planes-file FILE\n" \
"                   the same from JSON: a list of objects, or one as info --json\n" \
"                   prints it, with that list as \"planes\"\n" \
"  --tag TEXT       what the pad is to be known by: up to 64 bytes\n"

#define GEOMETRY_OPTIONS \
	OPTION("max-seq-len", required_argument, OPT_MAX_SEQ_LEN), \
	OPTION("dim", required_argument, OPT_DIM), \
	OPTION("dtype", required_argument, OPT_DTYPE), \
	OPTION("input", required_argument, OPT_INPUT), \
	OPTION("frac-bits", required_argument, OPT_FRAC_BITS), \
	OPTION("planes", required_argument, OPT_PLANES), \
	OPTION("planes-file", required_argument, OPT_PLANES_FILE), \
	OPTION("tag", required_argument, OPT_TAG)

#define NO_PROGRESS_HELP \
"  --no-progress      no bar, even if stderr is a terminal\n"

#define NO_PROGRESS_OPTION OPTION("no-progress", no_argument, OPT_NO_PROGRESS)

static const struct verb verbs[] = {
	{
		.name = "create",
		.summary = "make a pad",
		.help =
"Usage: kvscratchctl [--fd N] create --max-seq-len N --dim N [OPTION]... -- COMMAND\n"
"       kvscratchctl [--fd N] create --max-seq-len N --planes LIST [OPTION]... -- COMMAND\n"
"Make a new, zero-filled pad and run COMMAND with a handle on it as descriptor N\n"
"(3), for reading and writing. All memory of the pad is taken here. It lives as long\n"
"as somebody has a handle or a view.\n"
"\n"
GEOMETRY_HELP,
		.run = run_create,
		.takes = TAKES_FD | TAKES_COMMAND,
		.options = { GEOMETRY_OPTIONS, HELP, END },
	}, {
		.name = "attach",
		.summary = "give a command a handle",
		.help =
"Usage: kvscratchctl [--fd N] [-n NAME] attach [--write] -- COMMAND [ARGUMENT]...\n"
"Run COMMAND with a handle of its own on the pad of descriptor N (3), or on the one\n"
"that is held as NAME, as descriptor N, for reading only.\n"
"\n"
"  --write  for reading and writing\n",
		.run = run_attach,
		.takes = TAKES_BOTH,
		.options = { OPTION("write", no_argument, OPT_WRITE), HELP, END },
	}, {
		.name = "info",
		.summary = "describe the pad",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] info [--json]\n"
"Print one line: Scratchpad(len=3, capacity=10, dim=4)\n"
"for scaled integers another: mxint8, from f32, 0 saturated\n"
"for several planes one each: plane k0: 64 f32\n"
"the tag, the epoch of the writers and whether there is one, whether the pad is sealed,\n"
"and of which pad it is a fork, each unless there is nothing to tell; then the backend\n"
"and which promises it keeps, and a line for each that it does not keep.\n"
"\n"
"  --json  more of it, as one JSON object\n",
		.run = run_info,
		.takes = TAKES_PAD,
		.options = { OPTION("json", no_argument, OPT_JSON), HELP, END },
	}, {
		.name = "append",
		.summary = "append rows from files or stdin",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] append [OPTION]... [FILE]\n"
"       kvscratchctl [--fd N | -n NAME] append [OPTION]... --plane PLANE=FILE...\n"
"Append whole rows from FILE or, without one or with -, from stdin. All of the\n"
"input is read into memory and checked before the first row is appended; up to\n"
"2 GiB go in as one batch that other processes see at once. Rows of several planes\n"
"are a row of each in turn; or each plane has a file of its own, and all are\n"
"committed at once, by the pad's writer, which append becomes for as long.\n"
"\n"
"  --plane PLANE=FILE\n"
"                     the rows of one plane, by its label or its index\n"
"  --format FORMAT    raw (elements in this machine's byte order) or npy;\n"
"                     otherwise npy if the input begins as such a file does, and\n"
"                     raw unless it looks like something else\n"
NO_PROGRESS_HELP,
		.run = run_append,
		.takes = TAKES_PAD | TAKES_ARGUMENT,
		.options = {
			OPTION("plane", required_argument, OPT_PLANE),
			OPTION("format", required_argument, OPT_FORMAT),
			NO_PROGRESS_OPTION, HELP, END
		},
	}, {
		.name = "dump",
		.summary = "write the rows to a file or stdout",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] dump [OPTION]...\n"
"Write all committed rows, as they are at one moment; they are copied first.\n"
"Scaled integers are scaled back in text and JSON, and in npy as f32 (mxint8) or\n"
"f64 (of long i64 the last bits are lost). What is to be appended to such a pad\n"
"again is raw. Of several planes there is a line for each, k0: 1 2, in JSON a list of\n"
"their rows, and no npy.\n"
"\n"
"  --plane PLANE      only this one, by its label or its index\n"
"  --format FORMAT    text (a row per line), raw or npy (text)\n"
"  --json             an array of rows: NaN is null, infinity is 1e999\n"
"  -o, --output FILE  replace FILE in one step, instead of stdout; a device or a\n"
"                     FIFO is written to\n"
NO_PROGRESS_HELP,
		.run = run_dump,
		.takes = TAKES_PAD,
		.options = {
			OPTION("plane", required_argument, OPT_PLANE),
			OPTION("format", required_argument, OPT_FORMAT),
			OPTION("json", no_argument, OPT_JSON),
			OPTION("output", required_argument, OPT_OUTPUT),
			NO_PROGRESS_OPTION, HELP, END
		},
	}, {
		.name = "save",
		.summary = "keep the rows in a file",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] save [OPTION]... FILE\n"
"Save all committed rows as FILE, which is replaced in one step. By the end of its\n"
"name it is .npy, with the rows of one plane, or .safetensors, with any number of\n"
"pads and all that they are made of. -n HOLDER saves all that are held there, as\n"
"they are at one moment.\n"
"\n"
"  --plane PLANE      only this one, by its label or its index, as .npy\n"
NO_PROGRESS_HELP,
		.run = run_save,
		.takes = TAKES_PAD | TAKES_ARGUMENT,
		.options = {
			OPTION("plane", required_argument, OPT_PLANE),
			NO_PROGRESS_OPTION, HELP, END
		},
	}, {
		.name = "load",
		.summary = "make pads of what was saved",
		.help =
"Usage: kvscratchctl [--fd N] load [OPTION]... FILE\n"
"       kvscratchctl [--fd N] load [OPTION]... FILE -- COMMAND [ARGUMENT]...\n"
"       kvscratchctl -n NAME load [OPTION]... FILE\n"
"Append the rows of FILE, .npy or .safetensors, to the pad of descriptor N (3); or\n"
"make a pad of them and run COMMAND with a handle on it as that descriptor; or put\n"
"new pads into a holder that was started with --write: as HOLDER all that are in\n"
"FILE, as HOLDER/PAD the one of that name or the only one.\n"
"\n"
"  --pad NAME         which one of FILE, if it has several\n"
"  --max-seq-len N    rows that fit the new pad (as FILE says)\n"
NO_PROGRESS_HELP,
		.run = run_load,
		.takes = TAKES_PAD | TAKES_ARGUMENT | TAKES_COMMAND,
		.options = {
			OPTION("pad", required_argument, OPT_PAD),
			OPTION("max-seq-len", required_argument, OPT_MAX_SEQ_LEN),
			NO_PROGRESS_OPTION, HELP, END
		},
	}, {
		.name = "truncate",
		.summary = "drop the last rows",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] truncate --len N [--zero]\n"
"Keep the first N rows. Readers learn of it through a new generation.\n"
"\n"
"  --len N  rows to keep\n"
"  --zero   overwrite with zeros all that was ever written beyond\n",
		.run = run_truncate,
		.takes = TAKES_PAD,
		.options = {
			OPTION("len", required_argument, OPT_LEN),
			OPTION("zero", no_argument, OPT_ZERO),
			HELP, END
		},
	}, {
		.name = "clear",
		.summary = "drop all rows",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] clear [--zero]\n"
"The same as truncate --len 0.\n"
"\n"
"  --zero  overwrite with zeros all that was ever written\n",
		.run = run_clear,
		.takes = TAKES_PAD,
		.options = { OPTION("zero", no_argument, OPT_ZERO), HELP, END },
	}, {
		.name = "seal",
		.summary = "make the length final",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] seal\n"
"From now on nothing changes the pad any more. There is no way back.\n",
		.run = run_seal,
		.takes = TAKES_PAD,
		.options = { HELP, END },
	}, {
		.name = "takeover",
		.summary = "become the writer of the pad",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] takeover\n"
"       kvscratchctl [--fd N] [-n NAME] takeover -- COMMAND [ARGUMENT]...\n"
"Take the role of the pad's writer from whoever has it, one that hangs say, who can\n"
"change the pad no more; the rows that it has not committed are dropped. Then give\n"
"the role up again, or run COMMAND with the writer's handle, which does not read, as\n"
"descriptor N (3): until it has ended, nobody else writes. In a memfd only the\n"
"former works.\n",
		.run = run_takeover,
		.takes = TAKES_BOTH,
		.options = { HELP, END },
	}, {
		.name = "watch",
		.summary = "follow the length of the pad",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] watch [OPTION]...\n"
"Map the pad and print a line whenever rows were appended or dropped. Reads the\n"
"status page and sleeps in between. Ends when interrupted and, after a line that says\n"
"so, when the pad is sealed. Opens a handle of its own.\n"
"\n"
"  --socket PATH  take the handle from a server on this Unix socket, as\n"
"                 kvdecode --serve is one, and end when it hangs up\n"
"  --pad NAME     which of the pads served (the last one)\n"
"  --timeout S    how long to wait for the socket to exist (10)\n"
"  --rows         print each row before the line with the length\n"
"  --plane PLANE  only of this plane, by its label or its index\n"
"  --until LEN    end when there are LEN rows\n"
"  --json         a JSON object per line\n",
		.run = run_watch,
		.takes = TAKES_PAD,
		.options = {
			OPTION("socket", required_argument, OPT_SOCKET),
			OPTION("pad", required_argument, OPT_PAD),
			OPTION("timeout", required_argument, OPT_TIMEOUT),
			OPTION("rows", no_argument, OPT_ROWS),
			OPTION("plane", required_argument, OPT_PLANE),
			OPTION("until", required_argument, OPT_UNTIL),
			OPTION("json", no_argument, OPT_JSON),
			HELP, END
		},
	}, {
		.name = "hold",
		.summary = "keep pads under a name",
		.help =
"Usage: kvscratchctl hold NAME --write\n"
"       kvscratchctl hold NAME --max-seq-len N --dim N [OPTION]...\n"
"       kvscratchctl hold NAME --max-seq-len N --planes LIST [OPTION]...\n"
"       kvscratchctl --fd N hold NAME [OPTION]...\n"
"Keep pads in a process of their own, in the background, and hand out handles on\n"
"them to processes of the same user, root being another one. It begins with a new\n"
"pad, with the one of descriptor N, either named \"pad\", or empty, for others to put\n"
"pads in. It ends when NAME is dropped or on SIGTERM. NAME is of A-Z a-z 0-9 . _ -\n"
"with no dot first; the socket is $XDG_RUNTIME_DIR/kvscratch/NAME\n"
"\n"
"  --write          whoever gets a handle may write, and may put more pads\n"
"  --foreground     stay, as a service: tell systemd when it is ready and keep\n"
"                   the handles in its file-descriptor store, from where they\n"
"                   come back after a crash\n"
GEOMETRY_HELP,
		.run = run_hold,
		.takes = TAKES_FD | TAKES_ARGUMENT,
		.options = {
			OPTION("write", no_argument, OPT_WRITE),
			OPTION("foreground", no_argument, OPT_FOREGROUND),
			GEOMETRY_OPTIONS, HELP, END
		},
	}, {
		.name = "put",
		.summary = "give a pad to a holder",
		.help =
"Usage: kvscratchctl [--fd N | -n NAME] put [--write] [--replace] HOLDER[/PAD]\n"
"Have a holder that was started with --write keep the pad of descriptor N (3), or the\n"
"one that is held as NAME, too, under the name PAD (\"pad\").\n"
"\n"
"  --write    whoever gets a handle there may write\n"
"  --replace  in the place of the pad of that name, if there is one, in one step: who\n"
"             asks for it gets the one or the other, who has it keeps it\n",
		.run = run_put,
		.takes = TAKES_PAD | TAKES_ARGUMENT,
		.options = {
			OPTION("write", no_argument, OPT_WRITE),
			OPTION("replace", no_argument, OPT_REPLACE),
			HELP, END
		},
	}, {
		.name = "fork",
		.summary = "begin a pad with the rows of another",
		.help =
"Usage: kvscratchctl fork [OPTION]... SRC[@ROWS] HOLDER[/PAD]\n"
"Make a pad that begins with the first ROWS rows of the one that is held as SRC, all\n"
"committed ones without ROWS, and have HOLDER keep it under the name PAD (\"pad\"). A\n"
"holder that there is not is started, as with hold --write. The rows are in the same\n"
"memory, in memfds a copy of it; what either pad appends later the other never sees.\n"
"SRC has to be held by one that was started with --write, or be sealed.\n"
"\n"
"  --max-seq-len N  rows that fit the new pad (as many as fit SRC)\n"
"  --replace        in the place of the pad of that name, as with put\n",
		.run = run_fork,
		.takes = TAKES_TWO_ARGUMENTS,
		.options = {
			OPTION("max-seq-len", required_argument, OPT_MAX_SEQ_LEN),
			OPTION("replace", no_argument, OPT_REPLACE),
			HELP, END
		},
	}, {
		.name = "drop",
		.summary = "forget held pads",
		.help =
"Usage: kvscratchctl drop NAME\n"
"Let the holder NAME forget all its pads and end, or of HOLDER/PAD that one. A pad\n"
"lives on as long as somebody else has a handle or a view.\n",
		.run = run_drop,
		.takes = TAKES_ARGUMENT,
		.options = { HELP, END },
	}, {
		.name = "ls",
		.summary = "list held pads",
		.help =
"Usage: kvscratchctl ls [--json | --tree]\n"
"Print a line for each pad that is held for this user:\n"
"story/k0: Scratchpad(len=3, capacity=10, dim=4)\n"
"\n"
"  --json  an array of objects\n"
"  --tree  forks below the pad that they are of, with how many bytes are its own and\n"
"          how many it shares with that pad\n",
		.run = run_ls,
		.options = {
			OPTION("json", no_argument, OPT_JSON),
			OPTION("tree", no_argument, OPT_TREE),
			HELP, END
		},
	}, {
		.name = "metrics",
		.summary = "describe held pads to Prometheus",
		.help =
"Usage: kvscratchctl metrics [--output FILE]\n"
"Print rows, capacity, bytes, truncates and saturated elements of each held pad, and\n"
"what the module tells, in the text format of Prometheus.\n"
"\n"
"  -o, --output FILE  replace FILE in one step, instead of stdout: for the\n"
"                     textfile collector of node_exporter; a device or a FIFO is\n"
"                     written to\n",
		.run = run_metrics,
		.options = { OPTION("output", required_argument, OPT_OUTPUT), HELP, END },
	}, {
		.name = "llama",
		.summary = "list and give back sequences of llama.cpp",
		.help =
"Usage: kvscratchctl llama ls [--json] HOLDER\n"
"       kvscratchctl llama ticket [OPTION]... HOLDER/PAD FILE\n"
"       kvscratchctl llama restore --slot-dir DIR [OPTION]... HOLDER/PAD ADDRESS:PORT\n"
"       kvscratchctl llama tail [OPTION]... HOLDER/PAD\n"
"With ls print a line for each sequence that kvscratch-ggml(7) put into HOLDER. With\n"
"ticket write FILE, which is replaced in one step: a saved sequence, as llama.cpp\n"
"itself writes them, with a ticket in the place of its rows. Whoever restores it and\n"
"has the plug-in goes on from a fork of the pad, without a copy. With restore have a\n"
"llama-server that has the plug-in do so. With tail print each token, and its\n"
"position, as it comes, until the pad is sealed or its writer gone.\n"
"\n"
"  --json             of ls an array of objects, of tail an object per line\n"
"  --len N            only the first N tokens (all)\n"
"  --state-version N  of the file: 3 for llama.cpp 0.4, as in node-llama-cpp 3.21, 4\n"
"                     for 0.7, as in Debian (4)\n"
"  --slot N           of the server (0)\n"
"  --slot-dir DIR     the --slot-save-path of the server\n"
"  --until LEN        end when there are LEN tokens\n"
"  --timeout S        of restore: how long all of it may take (10); of tail: end when\n"
"                     nothing has come for as long\n",
		.run = run_llama,
		.takes = TAKES_THREE_ARGUMENTS,
		.options = {
			OPTION("json", no_argument, OPT_JSON),
			OPTION("len", required_argument, OPT_LEN),
			OPTION("state-version", required_argument, OPT_STATE_VERSION),
			OPTION("slot", required_argument, OPT_SLOT),
			OPTION("slot-dir", required_argument, OPT_SLOT_DIR),
			OPTION("until", required_argument, OPT_UNTIL),
			OPTION("timeout", required_argument, OPT_TIMEOUT),
			HELP, END
		},
	},
};

static const struct option pad_options[] = {
	OPTION("fd", required_argument, OPT_FD),
	OPTION("name", required_argument, OPT_NAME),
	HELP, END
};

static const char help_head[] =
"Usage: kvscratchctl [--fd N | -n NAME] VERB [OPTION]...\n"
"Work on a kvscratch pad, of a handle or held under a name:\n"
"\n"
"  --fd N           the handle is the inherited descriptor N (3)\n"
"  -n, --name NAME  the pad is HOLDER/PAD, or HOLDER if that has but one\n"
"\n"
"  kvscratchctl create --max-seq-len 512 --dim 64 --dtype f32 -- sh\n"
"  kvscratchctl append rows.npy\n"
"\n"
"  kvscratchctl hold story --write --max-seq-len 512 --dim 64\n"
"  kvscratchctl -n story append rows.npy\n"
"\n";

static const char help_tail[] =
"\n"
"Each verb has --help. Where there is no " KVSCRATCH_DEVICE " pads live in memfds;\n"
"KVSCRATCH_BACKEND=kernel or memfd decides otherwise, see info.\n"
"\n"
"Exit status: 0 done; 1 wrong options or input, the pad is as it was; 2 refused\n"
"by the system: no device, no pad, no holder, no permission, no memory, no output.\n"
"A COMMAND has its own; 126 and 127 when it cannot be run.\n";

static int print_help(void)
{
	fputs(help_head, stdout);
	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++)
		printf("  %-9s %s\n", verbs[i].name, verbs[i].summary);
	fputs(help_tail, stdout);
	return finish_output();
}

/* Those that have one letter */
static int long_option(int option)
{
	return option == 'n' ? OPT_NAME : option == 'o' ? OPT_OUTPUT : option;
}

static bool is_among(int option, const struct option *options)
{
	for (; options->name; options++)
		if (options->val == option)
			return true;
	return false;
}

/* Returns 0, an exit code, or -1 when only help was asked for. */
static int parse_options(struct arguments *args, int argc, char **argv, const char *short_options,
			 const struct option *options)
{
	int option;

	while ((option = getopt_long(argc, argv, short_options, options, NULL)) != -1) {
		int err;

		option = long_option(option);
		if (option == '?' || option == ':')
			return fail_option(EXIT_INPUT, option, argv);
		if (option == OPT_HELP)
			return -1;
		err = parse_option(args, option, optarg);
		if (err)
			return err;
		args->given |= 1u << option;
	}
	return 0;
}

/* Which may stand before the verb or behind it. */
static int check_pad_options(const struct verb *verb, const struct arguments *args)
{
	if (given(args, OPT_FD) && !(verb->takes & TAKES_FD))
		return fail(EXIT_INPUT, "unexpected --fd, see --help");
	if (given(args, OPT_NAME) && !(verb->takes & TAKES_NAME))
		return fail(EXIT_INPUT, "unexpected --name, see --help");
	if (given(args, OPT_FD) && given(args, OPT_NAME) &&
	    (verb->takes & TAKES_BOTH) != TAKES_BOTH)
		return fail(EXIT_INPUT, "expected either --fd or --name, got both");
	return 0;
}

/* Cut the command off, for getopt() moves what it finds; returns how much is left. */
static int split_command(const struct verb *verb, struct arguments *args, int argc, char **argv)
{
	if (!(verb->takes & TAKES_COMMAND))
		return argc;
	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--"))
			continue;
		args->command = argv + i + 1;
		argv[i] = NULL;
		return i;
	}
	return argc;
}

static int max_arguments(const struct verb *verb)
{
	if ((verb->takes & TAKES_THREE_ARGUMENTS) == TAKES_THREE_ARGUMENTS)
		return 3;
	if ((verb->takes & TAKES_TWO_ARGUMENTS) == TAKES_TWO_ARGUMENTS)
		return 2;
	return !!(verb->takes & TAKES_ARGUMENT);
}

static int run_verb(const struct verb *verb, struct arguments *args, int argc, char **argv)
{
	struct option options[MAX_OPTIONS + ARRAY_SIZE(pad_options)] = { 0 };
	size_t count = 0;
	static char name[32];
	int err;

	snprintf(name, sizeof(name), "kvscratchctl %s", verb->name);
	cli_name = name;
	while (verb->options[count].name) {
		options[count] = verb->options[count];
		count++;
	}
	memcpy(&options[count], pad_options, sizeof(pad_options));
	argc = split_command(verb, args, argc, argv);
	/* 0: getopt() starts over, behind the verb */
	optind = 0;
	err = parse_options(args, argc, argv, is_among(OPT_OUTPUT, options) ? ":n:o:" : ":n:",
			    options);
	if (err < 0) {
		fputs(verb->help, stdout);
		return finish_output();
	}
	if (!err)
		err = check_pad_options(verb, args);
	if (err)
		return err;
	if (argc - optind > max_arguments(verb))
		return fail(EXIT_INPUT, "unexpected argument \"%s\"",
			    argv[optind + max_arguments(verb)]);
	args->argument = argv[optind];
	args->second = args->argument ? argv[optind + 1] : NULL;
	args->third = args->second ? argv[optind + 2] : NULL;
	if ((args->argument && !*args->argument) || (args->second && !*args->second) ||
	    (args->third && !*args->third))
		return fail(EXIT_INPUT, "expected an argument that is not empty, see --help");
	if (args->command && !*args->command)
		return fail(EXIT_INPUT, "expected COMMAND behind --");
	return verb->run(args);
}

int main(int argc, char **argv)
{
	struct arguments args = {
		.fd = DEFAULT_FD,
		.dtype = KVSCRATCH_DTYPE_F32,
		.timeout = 10,
	};
	int err;

	cli_name = "kvscratchctl";
	/* we say it ourselves, in one line */
	opterr = 0;
	survive_size_limits();
	err = open_standard_descriptors();
	if (err)
		return fail(EXIT_SYSTEM, "/dev/null: cannot open: %s", strerror(-err));
	err = parse_options(&args, argc, argv, "+:n:", pad_options);
	if (err)
		return err < 0 ? print_help() : err;
	if (optind == argc)
		return fail(EXIT_INPUT, "expected a verb, see kvscratchctl --help");
	for (size_t i = 0; i < ARRAY_SIZE(verbs); i++)
		if (!strcmp(argv[optind], verbs[i].name))
			return run_verb(&verbs[i], &args, argc - optind, argv + optind);
	return fail(EXIT_INPUT, "expected a verb, got \"%s\", see kvscratchctl --help",
		    argv[optind]);
}
