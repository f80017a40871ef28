// SPDX-License-Identifier: GPL-2.0-only
/*
 * The main job: a transformer decodes with its cache in a pad, others read along,
 * and whoever finds the pad of a dead decoder, or takes it from one that hangs, goes on.
 *
 * Over either backend. Runs the programs kvdecode and kvscratchctl in /bin, or those of the
 * environment variables KVDECODE and KVSCRATCHCTL. A checkpoint and a tokenizer in /, or in
 * MODEL, are the real model.
 */
#include "common.h"
#include "../checkpoint.h"

#include <glob.h>
#include <limits.h>

/* Where the pad of a decoder that takes over lies */
#define HANDLE 100
#define HANDLE_TEXT "100"

#define SOCKET_PATH "decode.sock"

#define STORY "Once upon a time"

/**
 * struct program - a program that runs, and what it printed
 * @pid: it
 * @out: its stdout
 * @text: what came, NUL-terminated
 * @bytes: how much
 */
struct program {
	pid_t pid;
	int out;
	char text[65536];
	size_t bytes;
};

#define MAX_ARGUMENTS 24

static const char *program_path(const char *name)
{
	static char paths[2][PATH_MAX];
	const bool decoder = !strcmp(name, "kvdecode");
	const char *path = getenv(decoder ? "KVDECODE" : "KVSCRATCHCTL");

	snprintf(paths[decoder], PATH_MAX, "%s%s", path ? "" : "/bin/", path ? path : name);
	return paths[decoder];
}

static void start_into(struct program *program, const char *const *argv, const int *pipes)
{
	*program = (struct program){ .out = pipes[0] };
	program->pid = fork_child();
	if (program->pid < 0)
		abort();
	if (!program->pid) {
		dup2(pipes[1], STDOUT_FILENO);
		execv(program_path(argv[0]), (char *const *)argv);
		_exit(127);
	}
	close(pipes[1]);
}

static void start(struct program *program, const char *const *argv)
{
	int pipes[2];

	if (pipe2(pipes, O_CLOEXEC))
		abort();
	start_into(program, argv, pipes);
}

/* Take what it still prints; returns its exit status */
static int finish(struct program *program)
{
	for (;;) {
		ssize_t got = read(program->out, program->text + program->bytes,
				   sizeof(program->text) - 1 - program->bytes);

		if (got <= 0)
			break;
		program->bytes += got;
	}
	program->text[program->bytes] = '\0';
	close(program->out);
	return wait_for(program->pid);
}

/* It stops for ever, or until finish(), once it printed some bytes: they fill its stdout. */
static void start_hanging(struct program *program, const char *const *argv)
{
	static const char filling[65536];
	int pipes[2];
	int room;

	if (pipe2(pipes, O_CLOEXEC))
		abort();
	room = fcntl(pipes[1], F_SETPIPE_SZ, page_bytes());
	if (room < 0 || room > (int)sizeof(filling) ||
	    write(pipes[1], filling, room - 32) != room - 32)
		abort();
	start_into(program, argv, pipes);
}

FIXTURE(decode) {
	char directory[32];
};

FIXTURE_SETUP(decode)
{
	strcpy(self->directory, "/tmp/decode-XXXXXX");
	ASSERT_NE(NULL, mkdtemp(self->directory));
	ASSERT_EQ(0, chdir(self->directory));
	ASSERT_EQ(0, setenv("XDG_RUNTIME_DIR", self->directory, 1));
}

FIXTURE_TEARDOWN(decode)
{
	char command[64];

	snprintf(command, sizeof(command), "rm -rf %s", self->directory);
	EXPECT_EQ(0, system(command));
}

#define KVDECODE(...) ((const char *const[MAX_ARGUMENTS]){ "kvdecode", __VA_ARGS__ })
#define KVSCRATCHCTL(...) ((const char *const[MAX_ARGUMENTS]){ "kvscratchctl", __VA_ARGS__ })

/* kvdecode with @first, and with @options of another command line behind them */
static void start_with(struct program *program, const char *const *first,
		       const char *const *options)
{
	const char *argv[2 * MAX_ARGUMENTS] = { 0 };
	size_t count = 0;

	for (size_t i = 0; i < MAX_ARGUMENTS && first[i]; i++)
		argv[count++] = first[i];
	for (size_t i = 1; i < MAX_ARGUMENTS && options[i]; i++)
		argv[count++] = options[i];
	start(program, argv);
}

/* kvdecode with @options: with the cache in a pad, and on the heap */
static void expect_same_text(struct __test_metadata *_metadata, const char *const *options)
{
	static struct program pad_run, heap_run;

	start(&pad_run, options);
	EXPECT_EQ(0, finish(&pad_run));
	start_with(&heap_run, KVDECODE("--cache", "heap"), options);
	EXPECT_EQ(0, finish(&heap_run));
	EXPECT_LT(20, heap_run.bytes);
	EXPECT_STREQ(heap_run.text, pad_run.text);
}

TEST_F_TIMEOUT(decode, pad_and_heap_give_the_same_text, TEST_SECONDS)
{
	expect_same_text(_metadata, KVDECODE("--steps", "200"));
	expect_same_text(_metadata, KVDECODE("--prompt", "Hello", "--steps", "100"));
	expect_same_text(_metadata, KVDECODE("--temperature", "1", "--seed", "1"));
	expect_same_text(_metadata, KVDECODE("--temperature", "0.8", "--top-p", "0.5", "--seed",
					     "2", "--steps", "150"));
}

/* K and V are converted as the same code does on the heap. */
TEST_F_TIMEOUT(decode, mxint8_pad_and_heap_give_the_same_text, TEST_SECONDS)
{
	static struct program plain, scaled;

	expect_same_text(_metadata, KVDECODE("--kv", "mxint8", "--steps", "150"));
	expect_same_text(_metadata, KVDECODE("--kv", "mxint8", "--temperature", "1", "--seed", "4",
					     "--steps", "100"));

	/* and to the last bit of every logit */
	start(&plain, KVDECODE("--kv", "mxint8", "--steps", "20", "--logits", "pad.logits"));
	EXPECT_EQ(0, finish(&plain));
	start(&scaled, KVDECODE("--kv", "mxint8", "--steps", "20", "--cache", "heap", "--logits",
				"heap.logits"));
	EXPECT_EQ(0, finish(&scaled));
	EXPECT_EQ(0, system("cmp pad.logits heap.logits"));
	start(&plain, KVDECODE("--steps", "20", "--logits", "heap.logits"));
	EXPECT_EQ(0, finish(&plain));
	EXPECT_NE(0, system("cmp -s pad.logits heap.logits"));
}

static const char *model_directory(void)
{
	const char *directory = getenv("MODEL");

	return directory ? directory : "/";
}

static bool have_model(void)
{
	char pattern[PATH_MAX];
	glob_t found;
	bool have;

	snprintf(pattern, sizeof(pattern), "%s/tok*.bin", model_directory());
	have = !glob(pattern, 0, NULL, &found);
	if (have)
		globfree(&found);
	return have;
}

TEST_F_TIMEOUT(decode, story_is_the_same_on_pad_and_heap, TEST_SECONDS)
{
	const char *model = model_directory();

	if (!have_model())
		SKIP(return, "no MODEL= given");
	expect_same_text(_metadata, KVDECODE("--model", model, "--prompt", STORY, "--steps",
					     "150"));
	expect_same_text(_metadata, KVDECODE("--model", model, "--prompt", STORY, "--temperature",
					     "0.9", "--seed", "11", "--steps", "100"));
	expect_same_text(_metadata, KVDECODE("--model", model, "--prompt", STORY, "--kv", "mxint8",
					     "--steps", "100"));
}

/* A pad for a decoder to work on, which outlives it */

static int connect_when_it_listens(void)
{
	int sock;

	do
		sock = kvscratch_connect(SOCKET_PATH);
	while ((sock == -ENOENT || sock == -ECONNREFUSED) && !sched_yield());
	return sock;
}

/* What a decoder with @options hands to its readers; and it, which waits for that */
static struct kvscratch *served_pad(const char *const *options, struct program *decoder, int *sock)
{
	char name[KVSCRATCH_MAX_NAMES_BYTES];
	struct kvscratch *pad;
	int fd;

	start_with(decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader"), options);
	*sock = connect_when_it_listens();
	if (kvscratch_receive_handles(*sock, name, sizeof(name), &fd, 1) != 1 ||
	    strcmp(name, "cache") || kvscratch_from_fd(&pad, fd))
		abort();
	return pad;
}

static struct kvscratch *pad_of_handle;

/* Make the pad at HANDLE: an empty one. */
static void set_handle(const struct kvscratch_plane *planes, uint32_t count, uint64_t rows,
		       const void *tag)
{
	kvscratch_close(pad_of_handle);
	if (kvscratch_new_planes(&pad_of_handle, rows, planes, count, tag, KVSCRATCH_TAG_BYTES) ||
	    /* which leaves it open across exec */
	    dup2(kvscratch_fd(pad_of_handle), HANDLE) < 0)
		abort();
}

/* One such as a decoder with @options makes: it is asked for its own. */
static void open_handle(const char *const *options)
{
	static struct program decoder;
	struct kvscratch_pad_info info;
	struct kvscratch *made;
	int sock;

	made = served_pad(options, &decoder, &sock);
	if (kvscratch_pad_info(made, &info))
		abort();
	set_handle(kvscratch_plane(made, 0), kvscratch_nr_planes(made), info.max_seq_len, info.tag);
	kvscratch_close(made);
	close(sock);
	kill(decoder.pid, SIGKILL);
	finish(&decoder);
	unlink(SOCKET_PATH);
}

static void close_handle(void)
{
	kvscratch_close(pad_of_handle);
	pad_of_handle = NULL;
	close(HANDLE);
}

static void await_tokens(uint64_t len)
{
	while ((uint64_t)kvscratch_len(pad_of_handle) < len)
		sched_yield();
}

static uint64_t generation_of_pad(struct kvscratch *pad)
{
	struct kvscratch_pad_info info;

	return kvscratch_pad_info(pad, &info) ? UINT64_MAX : info.generation;
}

/* One token, of zeros but for its id */
static int append_token(int32_t id)
{
	const uint32_t bytes = kvscratch_input_row_bytes(pad_of_handle);
	char *token = calloc(1, bytes);
	int err;

	if (!token)
		abort();
	/* the tokens are the last plane */
	memcpy(token + bytes - sizeof(id), &id, sizeof(id));
	err = kvscratch_append_tokens(pad_of_handle, token, 1, bytes);
	free(token);
	return err;
}

/* Drafts */

/* Text and logits are those without drafts, and nothing was ever dropped from the pad. */
static void expect_drafts_change_nothing(struct __test_metadata *_metadata,
					 const char *const *options, const char *const *drafts)
{
	static struct program plain, drafted;

	start_with(&plain, KVDECODE("--cache", "heap", "--logits", "plain.logits"), options);
	EXPECT_EQ(0, finish(&plain));
	EXPECT_LT(20, plain.bytes);
	open_handle(options);
	start_with(&drafted, drafts, options);
	EXPECT_EQ(0, finish(&drafted));
	EXPECT_STREQ(plain.text, drafted.text);
	EXPECT_EQ(0, system("cmp plain.logits drafted.logits"));
	EXPECT_LT(20, kvscratch_len(pad_of_handle));
	EXPECT_EQ(0, generation_of_pad(pad_of_handle));
	close_handle();
}

#define DRAFTS(...) \
	KVDECODE("--handle", HANDLE_TEXT, "--logits", "drafted.logits", "--draft", __VA_ARGS__)

TEST_F_TIMEOUT(decode, drafts_change_nothing, TEST_SECONDS)
{
	const char *const *options[] = {
		KVDECODE("--steps", "120"),
		KVDECODE("--steps", "100", "--prompt", "to be or not to be, to be or not to be"),
		KVDECODE("--steps", "100", "--temperature", "1", "--seed", "3"),
		KVDECODE("--steps", "60", "--kv", "mxint8"),
		KVDECODE("--steps", "60", "--queries"),
	};

	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++) {
		expect_drafts_change_nothing(_metadata, options[i], DRAFTS("1"));
		expect_drafts_change_nothing(_metadata, options[i], DRAFTS("7"));
	}
	expect_drafts_change_nothing(_metadata, options[0], DRAFTS("64"));
}

TEST_F_TIMEOUT(decode, drafts_of_a_story_change_nothing, TEST_SECONDS)
{
	const char *const *options = KVDECODE("--model", model_directory(), "--prompt", STORY);

	if (!have_model())
		SKIP(return, "no MODEL= given");
	expect_drafts_change_nothing(_metadata, options, DRAFTS("4"));
}

/* Made for the tests: two that say different things, and their vocabulary */
#define WEIGHTS(_seed) \
	"--checkpoint", "weights-" _seed, "--tokenizer", "tok"

static void make_checkpoints(void)
{
	write_checkpoint("weights-1", 1);
	write_checkpoint("weights-2", 2);
	write_tokenizer("tok");
}

/* Right ones save work, wrong ones cost it. */
TEST_F_TIMEOUT(decode, drafts_of_another_model_change_nothing, TEST_SECONDS)
{
	const char *const *chance = KVDECODE(WEIGHTS("1"), "--steps", "60", "--temperature", "1");
	const char *const *made_up = KVDECODE("--steps", "60");
	const char *const *monotone = KVDECODE(WEIGHTS("1"), "--steps", "60");

	make_checkpoints();
	expect_drafts_change_nothing(_metadata, chance, DRAFTS("5", "--draft-model", "weights-1"));
	expect_drafts_change_nothing(_metadata, chance, DRAFTS("5", "--draft-model", "weights-2"));
	/* which says something else, and has as large a vocabulary */
	expect_drafts_change_nothing(_metadata, made_up, DRAFTS("3", "--draft-model", "weights-1"));
	/* it says one word again and again */
	expect_drafts_change_nothing(_metadata, monotone, DRAFTS("3"));
}

/* Three drafts, all of them right: tokens come by four, and none of them before all were run. */
TEST_F_TIMEOUT(decode, accepted_drafts_are_committed_together, TEST_SECONDS)
{
	static struct program decoder;
	const struct kvscratch_view *view;
	struct kvscratch *pad;
	uint32_t len = 0;
	int sock;

	make_checkpoints();
	pad = served_pad(KVDECODE(WEIGHTS("1"), "--steps", "60", "--draft", "3", "--draft-model",
				  "weights-1"), &decoder, &sock);
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	while (len < 60) {
		uint64_t state = kvscratch_view_state(view);

		len = kvscratch_state_len(state);
		ASSERT_EQ(0, len % 4);
		ASSERT_EQ(0, kvscratch_state_generation(state));
	}
	EXPECT_EQ(0, finish(&decoder));
	EXPECT_EQ(60, kvscratch_len(pad));
	kvscratch_close(pad);
	close(sock);
}

TEST_F_TIMEOUT(decode, draft_models_that_do_not_fit_are_refused, TEST_SECONDS)
{
	static struct program decoder;

	make_checkpoints();
	start(&decoder, KVDECODE("--draft", "3", "--draft-model", "tok"));
	EXPECT_EQ(1, finish(&decoder));
	start(&decoder, KVDECODE("--draft-model", "weights-1"));
	EXPECT_EQ(1, finish(&decoder));
	start(&decoder, KVDECODE("--draft", "65"));
	EXPECT_EQ(1, finish(&decoder));
	EXPECT_EQ(0, decoder.bytes);
}

/* Several lives */

/* Run with @options in several lives; the last one ends by itself. */
static void die_and_go_on(struct __test_metadata *_metadata, const char *const *options)
{
	static const uint64_t deaths[] = { 1, 7, 30, 31, 90 };
	const char *const *on_pad = KVDECODE("--handle", HANDLE_TEXT);
	static struct program whole, life;
	int status;

	start_with(&whole, KVDECODE("--cache", "heap"), options);
	ASSERT_EQ(0, finish(&whole));
	open_handle(options);
	for (size_t i = 0; i < sizeof(deaths) / sizeof(deaths[0]); i++) {
		start_with(&life, on_pad, options);
		await_tokens(deaths[i]);
		kill(life.pid, SIGKILL);
		status = finish(&life);
		/* it may have come to its end before the signal came */
		EXPECT_TRUE(status == 128 + SIGKILL || status == 0);
		/* what it printed is the beginning of the whole */
		EXPECT_EQ(0, strncmp(whole.text, life.text, life.bytes));
	}
	start_with(&life, on_pad, options);
	EXPECT_EQ(0, finish(&life));
	EXPECT_STREQ(whole.text, life.text);
	EXPECT_EQ(0, generation_of_pad(pad_of_handle));
	close_handle();
}

TEST_F_TIMEOUT(decode, next_decoder_goes_on_where_a_killed_one_ended, TEST_SECONDS)
{
	die_and_go_on(_metadata, KVDECODE("--steps", "150"));
	/* chance, too, is a matter of the position */
	die_and_go_on(_metadata, KVDECODE("--steps", "150", "--temperature", "1", "--seed", "3"));
	die_and_go_on(_metadata, KVDECODE("--steps", "100", "--kv", "mxint8"));
	die_and_go_on(_metadata, KVDECODE("--steps", "150", "--draft", "5"));
}

/* Without luck: a pad as a death in the middle of a step leaves it */
TEST_F_TIMEOUT(decode, half_a_step_is_no_token, TEST_SECONDS)
{
	static struct program whole, life;
	static const uint8_t row[4096] = { 0xff, 0xff, 0xff, 0x3e };
	const char *const *options = KVDECODE("--steps", "60");
	struct kvscratch *writer;

	start_with(&whole, KVDECODE("--cache", "heap"), options);
	ASSERT_EQ(0, finish(&whole));
	open_handle(options);
	/* of the first step, too */
	for (uint32_t len = 0; len <= 40; len += 40) {
		ASSERT_EQ(0, kvscratch_writer(&writer, pad_of_handle));
		for (uint32_t plane = 0; plane < 3; plane++)
			ASSERT_EQ(0, kvscratch_stage(writer, plane, len, row, 1));
		kvscratch_close(writer);
		EXPECT_EQ(len, kvscratch_len(pad_of_handle));
		start(&life, KVDECODE("--handle", HANDLE_TEXT, "--steps", len ? "60" : "40"));
		ASSERT_EQ(0, finish(&life));
	}
	EXPECT_STREQ(whole.text, life.text);
	EXPECT_EQ(60, kvscratch_len(pad_of_handle));
	EXPECT_EQ(0, generation_of_pad(pad_of_handle));
	close_handle();
}

/* One that hangs is no obstacle to who asks for its place, and writes no more. */
TEST_F_TIMEOUT(decode, hanging_decoder_is_taken_over, TEST_SECONDS)
{
	static struct program whole, hanging, next;
	const char *const *options = KVDECODE("--steps", "80");

	start_with(&whole, KVDECODE("--cache", "heap"), options);
	ASSERT_EQ(0, finish(&whole));
	open_handle(options);
	start_hanging(&hanging, KVDECODE("--handle", HANDLE_TEXT, "--steps", "80"));
	await_tokens(2);
	/* nobody else writes meanwhile, whoever they are */
	EXPECT_EQ(-EBUSY, append_token(1));
	EXPECT_EQ(-EBUSY, kvscratch_truncate(pad_of_handle, 1, 0));
	start_with(&next, KVDECODE("--handle", HANDLE_TEXT), options);
	EXPECT_EQ(2, finish(&next));
	EXPECT_EQ(0, next.bytes);

	start_with(&next, KVDECODE("--handle", HANDLE_TEXT, "--takeover"), options);
	EXPECT_EQ(0, finish(&next));
	EXPECT_STREQ(whole.text, next.text);
	EXPECT_EQ(80, kvscratch_len(pad_of_handle));
	EXPECT_EQ(2, finish(&hanging));
	EXPECT_EQ(80, kvscratch_len(pad_of_handle));
	EXPECT_EQ(0, generation_of_pad(pad_of_handle));
	close_handle();
}

/* Branches of a held pad */

static void expect_exit(struct __test_metadata *_metadata, int status, const char *const *argv)
{
	static struct program program;

	start(&program, argv);
	EXPECT_EQ(status, finish(&program)) {
		TH_LOG("%s %s %s", argv[0], argv[1], argv[2]);
	}
}

#define expect_done(metadata, argv) expect_exit(metadata, 0, argv)

/* A run with @options that begins with what @branch says has the text of one that computed all. */
static void expect_branch(struct __test_metadata *_metadata, const char *const *branch,
			  const char *const *options)
{
	static struct program whole, other;

	start_with(&whole, KVDECODE("--cache", "heap"), options);
	EXPECT_EQ(0, finish(&whole));
	EXPECT_LT(20, whole.bytes);
	start_with(&other, branch, options);
	EXPECT_EQ(0, finish(&other));
	EXPECT_STREQ(whole.text, other.text);
}

TEST_F_TIMEOUT(decode, branches_go_on_and_leave_their_source, TEST_SECONDS)
{
	expect_done(_metadata, KVSCRATCHCTL("hold", "story", "--write"));
	expect_done(_metadata, KVDECODE("--prompt", STORY, "--steps", "40", "--hold", "story"));
	expect_done(_metadata, KVSCRATCHCTL("-n", "story", "dump", "--format", "raw", "-o", "before"));

	expect_branch(_metadata, KVDECODE("--fork", "story"),
		      KVDECODE("--prompt", STORY, "--steps", "100"));
	expect_branch(_metadata, KVDECODE("--fork", "story/cache@5"),
		      KVDECODE("--prompt", STORY, "--steps", "100", "--temperature", "1", "--seed",
			       "3"));
	expect_branch(_metadata, KVDECODE("--fork", "story@3", "--draft", "4"),
		      KVDECODE("--prompt", "Only once", "--steps", "100"));
	expect_branch(_metadata, KVDECODE("--fork", "story@0"),
		      KVDECODE("--prompt", "Hello", "--steps", "50"));
	/* what was said already is the text, whoever said it */
	expect_branch(_metadata, KVDECODE("--fork", "story", "--prompt", ""),
		      KVDECODE("--prompt", STORY, "--steps", "40"));

	expect_exit(_metadata, 1, KVDECODE("--fork", "story@41"));
	expect_exit(_metadata, 1, KVDECODE("--fork", "story@1x"));
	expect_exit(_metadata, 2, KVDECODE("--fork", "nobody"));
	expect_exit(_metadata, 2, KVDECODE("--fork", "story", "--prompt", "Another text"));
	expect_exit(_metadata, 2, KVDECODE("--fork", "story", "--kv", "mxint8"));
	expect_exit(_metadata, 2, KVDECODE("--fork", "story", "--queries"));
	expect_done(_metadata, KVSCRATCHCTL("-n", "story", "dump", "--format", "raw", "-o", "after"));
	EXPECT_EQ(0, system("cmp before after"));
	expect_done(_metadata, KVSCRATCHCTL("drop", "story"));
}

/* The same command goes on with a branch that is held, whatever became of its source. */
TEST_F_TIMEOUT(decode, held_branch_is_gone_on_with, TEST_SECONDS)
{
	const char *const *branch = KVDECODE("--fork", "story@10", "--hold", "branch");

	expect_done(_metadata, KVSCRATCHCTL("hold", "story", "--write"));
	expect_done(_metadata, KVSCRATCHCTL("hold", "branch", "--write"));
	expect_done(_metadata, KVDECODE("--prompt", STORY, "--kv", "mxint8", "--steps", "40",
					"--hold", "story"));
	expect_branch(_metadata, branch, KVDECODE("--prompt", STORY, "--kv", "mxint8", "--steps",
						  "50"));
	expect_done(_metadata, KVSCRATCHCTL("drop", "story"));
	expect_branch(_metadata, branch, KVDECODE("--prompt", STORY, "--kv", "mxint8", "--steps",
						  "100"));
	expect_done(_metadata, KVSCRATCHCTL("-n", "branch/cache", "watch", "--until", "100"));
	expect_done(_metadata, KVSCRATCHCTL("drop", "branch"));
}

/* A decoder that hangs holds up no branch. */
TEST_F_TIMEOUT(decode, branch_of_what_a_hanging_decoder_computed, TEST_SECONDS)
{
	static struct program hanging;

	expect_done(_metadata, KVSCRATCHCTL("hold", "story", "--write"));
	start_hanging(&hanging, KVDECODE("--hold", "story", "--steps", "80"));
	while (kvscratch_attach_name(&pad_of_handle, "story", O_RDONLY))
		sched_yield();
	await_tokens(2);
	expect_branch(_metadata, KVDECODE("--fork", "story"), KVDECODE("--steps", "80"));
	expect_branch(_metadata, KVDECODE("--fork", "story@1"),
		      KVDECODE("--steps", "80", "--temperature", "1"));
	EXPECT_EQ(0, finish(&hanging));
	EXPECT_EQ(80, kvscratch_len(pad_of_handle));
	EXPECT_EQ(0, generation_of_pad(pad_of_handle));
	close_handle();
	expect_done(_metadata, KVSCRATCHCTL("drop", "story"));
}

/* The texts of @count seeds from @seed on, each computed by a run of its own */
static void expect_branches(struct __test_metadata *_metadata, const char *const *options,
			    uint64_t seed, unsigned int count)
{
	static struct program branches, whole;
	const char *at = branches.text;
	char number[24], heading[64];

	start_with(&branches, KVDECODE("--branches", count == 1 ? "1" : "3"), options);
	EXPECT_EQ(0, finish(&branches));
	for (uint64_t last = seed + count; seed < last; seed++) {
		snprintf(number, sizeof(number), "%llu", (unsigned long long)seed);
		snprintf(heading, sizeof(heading), "==> seed %s <==\n", number);
		start_with(&whole, KVDECODE("--seed", number, "--cache", "heap"), options);
		EXPECT_EQ(0, finish(&whole));
		EXPECT_LT(20, whole.bytes);
		ASSERT_EQ(0, strncmp(at, heading, strlen(heading)));
		at += strlen(heading);
		ASSERT_EQ(0, strncmp(at, whole.text, whole.bytes));
		at += whole.bytes;
	}
	EXPECT_EQ('\0', *at);
}

TEST_F_TIMEOUT(decode, branches_are_what_each_seed_says, TEST_SECONDS)
{
	expect_branches(_metadata, KVDECODE("--prompt", STORY, "--temperature", "1", "--steps", "80"),
			1, 3);
	expect_branches(_metadata, KVDECODE("--kv", "mxint8", "--temperature", "0.9", "--steps", "60",
					    "--draft", "4"), 1, 3);
	expect_branches(_metadata, KVDECODE("--prompt", STORY, "--temperature", "1", "--steps", "60"),
			1, 1);

	expect_exit(_metadata, 1, KVDECODE("--branches", "2"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "0", "--temperature", "1"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "65", "--temperature", "1"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "2", "--temperature", "1", "--cache", "heap"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "2", "--temperature", "1", "--serve", "s"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "2", "--temperature", "1", "--logits", "l"));
	expect_exit(_metadata, 1, KVDECODE("--branches", "2", "--temperature", "1", "--prefill"));
	expect_exit(_metadata, 1, KVDECODE("--prefill", "--steps", "9"));
}

/* A prompt that is held is computed once; with another seed the branches are others. */
TEST_F_TIMEOUT(decode, branches_of_a_held_prompt, TEST_SECONDS)
{
	static struct program stats, prefilled;

	expect_done(_metadata, KVSCRATCHCTL("hold", "story", "--write"));
	expect_done(_metadata, KVDECODE("--prompt", STORY, "--hold", "story", "--prefill"));
	start(&stats, KVDECODE("--prompt", STORY, "--hold", "story", "--branches", "3",
			       "--temperature", "1", "--steps", "60"));
	EXPECT_EQ(0, finish(&stats));
	/* there is nothing but the prompt */
	expect_exit(_metadata, 1, KVDECODE("--fork", "story@60"));
	start(&prefilled, KVDECODE("--prompt", STORY, "--prefill", "--fork", "story"));
	EXPECT_EQ(0, finish(&prefilled));
	EXPECT_STREQ(STORY "\n", prefilled.text);
	start(&stats, KVDECODE("--prompt", STORY, "--hold", "story", "--branches", "1", "--seed", "3",
			       "--temperature", "1", "--steps", "60"));
	EXPECT_EQ(0, finish(&stats));
	EXPECT_EQ(0, strncmp(stats.text, "==> seed 3 <==\n", 15));
	expect_branch(_metadata, KVDECODE("--fork", "story"),
		      KVDECODE("--prompt", STORY, "--steps", "50"));
	expect_done(_metadata, KVSCRATCHCTL("drop", "story"));
}

/* Its stderr has room for the line about the prompt, and none for those of the branches. */
static void start_hanging_branches(struct program *program, const char *const *argv, int *errors)
{
	static const char filling[65536];
	const int own_errors = dup(STDERR_FILENO);
	int pipes[2];
	int room;

	if (own_errors < 0 || pipe2(pipes, O_CLOEXEC))
		abort();
	room = fcntl(pipes[1], F_SETPIPE_SZ, page_bytes());
	if (room < 0 || room > (int)sizeof(filling) ||
	    write(pipes[1], filling, room - 110) != room - 110)
		abort();
	dup2(pipes[1], STDERR_FILENO);
	start(program, argv);
	dup2(own_errors, STDERR_FILENO);
	close(own_errors);
	close(pipes[1]);
	*errors = pipes[0];
}

/* Waits until there are two. */
static void find_children(struct __test_metadata *_metadata, pid_t parent, pid_t *children)
{
	char path[64], list[64];
	ssize_t got;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", parent, parent);
	do {
		sched_yield();
		fd = open(path, O_RDONLY | O_CLOEXEC);
		ASSERT_LE(0, fd);
		got = read(fd, list, sizeof(list) - 1);
		ASSERT_LE(0, got);
		list[got] = '\0';
		close(fd);
	} while (sscanf(list, "%d %d", &children[0], &children[1]) != 2);
}

TEST_F_TIMEOUT(decode, killed_branch_disturbs_no_other, TEST_SECONDS)
{
	static const char heading[] = "\n==> seed 3 <==\n";
	static struct program branches, whole;
	const char *last;
	char errors[8192];
	pid_t children[2];
	int fd;

	/* as a supervisor may have it, and those that it starts inherit */
	signal(SIGCHLD, SIG_IGN);
	start_hanging_branches(&branches, KVDECODE("--branches", "2", "--prompt", STORY, "--seed",
						   "2", "--temperature", "1", "--steps", "80",
						   "--stats"), &fd);
	signal(SIGCHLD, SIG_DFL);
	find_children(_metadata, branches.pid, children);
	ASSERT_EQ(0, kill(children[0], SIGKILL));
	while (read(fd, errors, sizeof(errors)) > 0)
		;
	EXPECT_EQ(3, finish(&branches));
	EXPECT_EQ(0, strncmp(branches.text, "==> seed 2 <==\n", 15));
	start(&whole, KVDECODE("--cache", "heap", "--prompt", STORY, "--seed", "3", "--temperature",
			       "1", "--steps", "80"));
	EXPECT_EQ(0, finish(&whole));
	ASSERT_LT(whole.bytes + strlen(heading), branches.bytes);
	last = branches.text + branches.bytes - whole.bytes;
	EXPECT_STREQ(whole.text, last);
	EXPECT_EQ(0, strncmp(heading, last - strlen(heading), strlen(heading)));
	close(fd);
}

/* Nobody waits for branches whose decoder is gone. */
TEST_F_TIMEOUT(decode, branches_end_with_their_decoder, TEST_SECONDS)
{
	static struct program branches;
	struct pollfd hung_up = { .events = 0 };
	pid_t children[2];

	start_hanging_branches(&branches, KVDECODE("--branches", "2", "--temperature", "1", "--steps",
						   "80", "--stats"), &hung_up.fd);
	find_children(_metadata, branches.pid, children);
	ASSERT_EQ(0, kill(branches.pid, SIGKILL));
	EXPECT_EQ(128 + SIGKILL, finish(&branches));
	/* nobody has the other end, and nothing was read that would have let them go on */
	EXPECT_EQ(1, poll(&hung_up, 1, -1));
	EXPECT_EQ(POLLHUP, hung_up.revents);
	close(hung_up.fd);
}

/* Pads that are not ours: refused, and left as they are */

static void expect_refused(struct __test_metadata *_metadata, const char *const *options)
{
	struct kvscratch_pad_info before, after;
	static struct program decoder;

	ASSERT_EQ(0, kvscratch_pad_info(pad_of_handle, &before));
	start_with(&decoder, KVDECODE("--handle", HANDLE_TEXT, "--steps", "9"), options);
	EXPECT_EQ(2, finish(&decoder));
	EXPECT_EQ(0, decoder.bytes);
	ASSERT_EQ(0, kvscratch_pad_info(pad_of_handle, &after));
	EXPECT_EQ(before.len, after.len);
	EXPECT_EQ(before.generation, after.generation);
	EXPECT_EQ(before.epoch, after.epoch);
}

TEST_F_TIMEOUT(decode, pads_of_another_model_are_refused, TEST_SECONDS)
{
	const char *const *none = KVDECODE(NULL);
	struct kvscratch_plane planes[64];
	struct kvscratch_pad_info info;
	uint32_t count;

	make_checkpoints();
	/* same shape, other numbers */
	open_handle(KVDECODE(WEIGHTS("1")));
	ASSERT_EQ(0, append_token(1));
	expect_refused(_metadata, KVDECODE(WEIGHTS("2")));

	/* another shape, and no tag at all */
	open_handle(none);
	expect_refused(_metadata, KVDECODE(WEIGHTS("1")));
	expect_refused(_metadata, KVDECODE("--kv", "mxint8"));
	expect_refused(_metadata, KVDECODE("--queries"));
	ASSERT_EQ(0, kvscratch_pad_info(pad_of_handle, &info));
	count = kvscratch_nr_planes(pad_of_handle);
	ASSERT_GE(64, count);
	for (uint32_t i = 0; i < count; i++)
		planes[i] = *kvscratch_plane(pad_of_handle, i);
	set_handle(planes, count, info.max_seq_len, (const char[KVSCRATCH_TAG_BYTES]){ 0 });
	expect_refused(_metadata, none);
	/* with the tag of ours */
	set_handle(planes, count, info.max_seq_len - 1, info.tag);
	expect_refused(_metadata, none);
	set_handle(planes, count - 1, info.max_seq_len, info.tag);
	expect_refused(_metadata, none);
	planes[1].dim++;
	set_handle(planes, count, info.max_seq_len, info.tag);
	expect_refused(_metadata, none);
	close_handle();
}

TEST_F_TIMEOUT(decode, odd_pads_are_refused, TEST_SECONDS)
{
	const char *const *none = KVDECODE(NULL);
	int reader;

	/* an id that is none, and a prompt that is another */
	open_handle(none);
	ASSERT_EQ(0, append_token(1));
	ASSERT_EQ(0, append_token(1 << 30));
	expect_refused(_metadata, none);
	ASSERT_EQ(0, kvscratch_truncate(pad_of_handle, 1, 0));
	ASSERT_EQ(0, append_token(-1));
	expect_refused(_metadata, none);
	ASSERT_EQ(0, kvscratch_truncate(pad_of_handle, 1, 0));
	ASSERT_EQ(0, append_token(300));
	expect_refused(_metadata, KVDECODE("--prompt", "xyz"));

	/* a handle that cannot write, and a pad that nobody can write to */
	reader = kvscratch_open_reader(pad_of_handle);
	ASSERT_LE(0, reader);
	ASSERT_EQ(HANDLE, dup2(reader, HANDLE));
	close(reader);
	expect_refused(_metadata, none);
	ASSERT_EQ(HANDLE, dup2(kvscratch_fd(pad_of_handle), HANDLE));
	ASSERT_EQ(0, kvscratch_seal(pad_of_handle));
	expect_refused(_metadata, none);
	close_handle();
}

/* Closed standard descriptors do not become pads that the text goes into. */
TEST_F_TIMEOUT(decode, needs_no_standard_descriptors, TEST_SECONDS)
{
	const char *const *argv = KVDECODE("--steps", "30");
	pid_t pid = fork_child();

	ASSERT_LE(0, pid);
	if (!pid) {
		close(STDIN_FILENO);
		close(STDOUT_FILENO);
		close(STDERR_FILENO);
		execv(program_path(argv[0]), (char *const *)argv);
		_exit(127);
	}
	/* there is nowhere to write to */
	EXPECT_EQ(3, wait_for(pid));
}

/* A reader with nothing but what came over the socket, while the decoder works */
TEST_F_TIMEOUT(decode, readers_see_the_cache_grow, TEST_SECONDS)
{
	const struct kvscratch_view *view, *owned;
	static struct program decoder;
	uint32_t looks = 0, len = 0;
	struct kvscratch *pad;
	int sock, tokens;
	char byte;

	open_handle(KVDECODE("--steps", "150"));
	pad = served_pad(KVDECODE("--handle", HANDLE_TEXT, "--steps", "150"), &decoder, &sock);
	view = kvscratch_view(pad);
	ASSERT_NE(NULL, view);
	tokens = kvscratch_find_plane(pad, "tokens");
	ASSERT_EQ((int)view->nr_planes - 1, tokens);
	EXPECT_EQ(KVSCRATCH_DTYPE_I32, kvscratch_view_plane(view, tokens)->dtype);
	EXPECT_STREQ("k0", kvscratch_view_plane(view, 0)->label);

	/* each token that exists is there in every plane */
	while (len < 150) {
		uint32_t now = kvscratch_state_len(kvscratch_view_state(view));

		ASSERT_LE(len, now);
		if (now == len)
			continue;
		len = now;
		looks++;
		for (uint32_t i = 0; i < view->nr_planes; i++) {
			ASSERT_FALSE(all_zero(kvscratch_view_plane_row(view, i, len - 1),
					      kvscratch_view_plane(view, i)->row_bytes));
		}
	}
	EXPECT_LT(1, looks);
	/* the end of the stream is the end of the text */
	EXPECT_EQ(0, read(sock, &byte, 1));
	EXPECT_EQ(0, finish(&decoder));

	/* the same memory as that of the handle that we kept, and read-only */
	owned = kvscratch_view(pad_of_handle);
	ASSERT_NE(NULL, owned);
	EXPECT_EQ(0, memcmp(kvscratch_view_plane_row(owned, 0, 0),
			    kvscratch_view_plane_row(view, 0, 0),
			    150 * (size_t)kvscratch_view_plane(view, 0)->row_bytes));
	EXPECT_EQ(O_RDONLY, kvscratch_access(pad));
	EXPECT_EQ(-EBADF, kvscratch_truncate(pad, 0, 0));
	EXPECT_ERRNO(EBADF, write(kvscratch_fd(pad), &byte, 1));
	kvscratch_close(pad);
	close(sock);
	close_handle();
}

/* The tool as the reader; it may come before there is a socket. */
TEST_F_TIMEOUT(decode, watch_follows_until_the_decoder_ends, TEST_SECONDS)
{
	static const char last[] = "{\"len\": 120, \"generation\": 0}\n";
	static struct program decoder, watcher, rows;

	start(&watcher, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--json"));
	start(&decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader", "--steps", "120"));
	EXPECT_EQ(0, finish(&decoder));
	EXPECT_EQ(0, finish(&watcher));
	ASSERT_LT(sizeof(last), watcher.bytes);
	EXPECT_STREQ(last, watcher.text + watcher.bytes - strlen(last));

	start(&rows, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--rows", "--plane",
				 "tokens"));
	start(&decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader", "--steps", "20"));
	EXPECT_EQ(0, finish(&decoder));
	EXPECT_EQ(0, finish(&rows));
	/* BOS and the last one */
	EXPECT_NE(NULL, strstr(rows.text, "0: 1\n"));
	EXPECT_NE(NULL, strstr(rows.text, "\n19: "));
	EXPECT_EQ(NULL, strstr(rows.text, "\n20: "));

	start(&rows, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--rows", "--plane",
				 "k99"));
	start(&decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader", "--steps", "20"));
	EXPECT_EQ(1, finish(&rows));
	EXPECT_EQ(0, finish(&decoder));
	/* it is gone with the server */
	EXPECT_ERRNO(ENOENT, access(SOCKET_PATH, F_OK));

	/* fewer rows than were waited for */
	start(&rows, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--until", "25"));
	start(&decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader", "--steps", "20"));
	EXPECT_EQ(2, finish(&rows));
	EXPECT_EQ(0, finish(&decoder));
}

TEST_F_TIMEOUT(decode, socket_of_a_dead_server_is_taken_over, TEST_SECONDS)
{
	static struct program first, second, intruder;
	char byte;
	int sock;

	start_hanging(&first, KVDECODE("--serve", SOCKET_PATH, "--wait-reader"));
	sock = connect_when_it_listens();
	ASSERT_LE(0, sock);
	/* that of a living one is not */
	start(&intruder, KVDECODE("--serve", SOCKET_PATH));
	EXPECT_EQ(3, finish(&intruder));
	kill(first.pid, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, finish(&first));
	while (read(sock, &byte, 1) > 0)
		;
	close(sock);
	ASSERT_EQ(0, access(SOCKET_PATH, F_OK));
	start(&second, KVDECODE("--serve", SOCKET_PATH, "--steps", "5"));
	EXPECT_EQ(0, finish(&second));
	EXPECT_ERRNO(ENOENT, access(SOCKET_PATH, F_OK));

	/* a signal that ends it takes the socket along, and so does no other file */
	start_hanging(&first, KVDECODE("--serve", SOCKET_PATH, "--wait-reader"));
	sock = connect_when_it_listens();
	ASSERT_LE(0, sock);
	kill(first.pid, SIGTERM);
	EXPECT_EQ(128 + SIGTERM, finish(&first));
	EXPECT_ERRNO(ENOENT, access(SOCKET_PATH, F_OK));
	close(sock);
	close(open("precious", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	start(&intruder, KVDECODE("--serve", "precious"));
	EXPECT_EQ(3, finish(&intruder));
	EXPECT_EQ(0, access("precious", F_OK));
}

TEST_HARNESS_MAIN
