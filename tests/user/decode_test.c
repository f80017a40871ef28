// SPDX-License-Identifier: GPL-2.0-only
/*
 * The main job: a transformer decodes with its cache in pads, others read along,
 * and whoever finds the pads of a dead decoder goes on.
 *
 * Runs the program kvdecode in /bin, and kvscratchctl beside it. A checkpoint
 * and a tokenizer in / are the real model.
 */
#include "common.h"

#include <glob.h>

/* Where the pads of a decoder that takes over lie; more than any model here has */
#define FIRST_HANDLE 100
#define NR_HANDLES 64

#define SOCKET_PATH "/tmp/decode_test.sock"

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

static void start(struct program *program, const char *const *argv)
{
	int pipes[2];

	if (pipe2(pipes, O_CLOEXEC))
		abort();
	*program = (struct program){ .out = pipes[0] };
	program->pid = fork_child();
	if (program->pid < 0)
		abort();
	if (!program->pid) {
		dup2(pipes[1], STDOUT_FILENO);
		execv(argv[0], (char *const *)argv);
		_exit(127);
	}
	close(pipes[1]);
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

FIXTURE(decode) { };

FIXTURE_SETUP(decode) { }

/* A decoder that was killed leaves its socket. */
FIXTURE_TEARDOWN(decode) {
	unlink(SOCKET_PATH);
}

#define KVDECODE(...) ((const char *const[MAX_ARGUMENTS]){ "/bin/kvdecode", __VA_ARGS__ })
#define KVSCRATCHCTL(...) ((const char *const[MAX_ARGUMENTS]){ "/bin/kvscratchctl", __VA_ARGS__ })

/* kvdecode with @options and more: with the cache in pads, and on the heap */
static void expect_same_text(struct __test_metadata *_metadata, const char *const *options)
{
	const char *heap[MAX_ARGUMENTS + 2] = { "/bin/kvdecode", "--cache", "heap" };
	static struct program pads_run, heap_run;

	for (size_t i = 1; i < MAX_ARGUMENTS && options[i]; i++)
		heap[i + 2] = options[i];
	start(&pads_run, options);
	EXPECT_EQ(0, finish(&pads_run));
	start(&heap_run, heap);
	EXPECT_EQ(0, finish(&heap_run));
	EXPECT_LT(20, heap_run.bytes);
	EXPECT_STREQ(heap_run.text, pads_run.text);
}

TEST_F_TIMEOUT(decode, pads_and_heap_give_the_same_text, TEST_SECONDS)
{
	expect_same_text(_metadata, KVDECODE("--steps", "200"));
	expect_same_text(_metadata, KVDECODE("--prompt", "Hello", "--steps", "100"));
	expect_same_text(_metadata, KVDECODE("--temperature", "1", "--seed", "1"));
	expect_same_text(_metadata, KVDECODE("--temperature", "0.8", "--top-p", "0.5", "--seed",
					     "2", "--steps", "150"));
}

/* The kernel converts K and V as the same code does on the heap. */
TEST_F_TIMEOUT(decode, mxint8_pads_and_heap_give_the_same_text, TEST_SECONDS)
{
	static struct program plain, scaled;

	expect_same_text(_metadata, KVDECODE("--kv", "mxint8", "--steps", "150"));
	expect_same_text(_metadata, KVDECODE("--kv", "mxint8", "--temperature", "1", "--seed", "4",
					     "--steps", "100"));

	/* and to the last bit of every logit */
	start(&plain, KVDECODE("--kv", "mxint8", "--steps", "20", "--logits", "/tmp/pads.logits"));
	EXPECT_EQ(0, finish(&plain));
	start(&scaled, KVDECODE("--kv", "mxint8", "--steps", "20", "--cache", "heap", "--logits",
				"/tmp/heap.logits"));
	EXPECT_EQ(0, finish(&scaled));
	EXPECT_EQ(0, system("cmp /tmp/pads.logits /tmp/heap.logits"));
	start(&plain, KVDECODE("--steps", "20", "--logits", "/tmp/heap.logits"));
	EXPECT_EQ(0, finish(&plain));
	EXPECT_NE(0, system("cmp -s /tmp/pads.logits /tmp/heap.logits"));
}

static bool have_model(void)
{
	glob_t found;
	bool have = !glob("/tok*.bin", 0, NULL, &found);

	if (have)
		globfree(&found);
	return have;
}

TEST_F_TIMEOUT(decode, story_is_the_same_on_pads_and_heap, TEST_SECONDS)
{
	if (!have_model())
		SKIP(return, "no MODEL= given");
	expect_same_text(_metadata, KVDECODE("--model", "/", "--prompt", STORY, "--steps", "150"));
	expect_same_text(_metadata, KVDECODE("--model", "/", "--prompt", STORY, "--temperature",
					     "0.9", "--seed", "11", "--steps", "100"));
	expect_same_text(_metadata, KVDECODE("--model", "/", "--prompt", STORY, "--kv", "mxint8",
					     "--steps", "100"));
}

/* Handles for a decoder to work on, which outlive it */

static int connect_when_it_listens(void)
{
	int sock;

	do
		sock = kvscratch_connect(SOCKET_PATH);
	while ((sock == -ENOENT || sock == -ECONNREFUSED) && !sched_yield());
	return sock;
}

static int nr_pads;

/* Empty pads as a decoder with @kv makes them: one is asked for its own. */
static void open_handles(const char *kv)
{
	static struct program model;
	static char names[KVSCRATCH_MAX_PASSED * 16];
	int fds[NR_HANDLES], sock;

	start(&model, KVDECODE("--kv", kv, "--steps", "1", "--serve", SOCKET_PATH,
			       "--wait-reader"));
	sock = connect_when_it_listens();
	nr_pads = kvscratch_receive_handles(sock, names, sizeof(names), fds, NR_HANDLES);
	for (int i = 0; i < nr_pads; i++) {
		struct kvscratch_info info;
		int err = device_info(fds[i], &info);
		int fd = err ? err : device_create_scaled(info.max_seq_len, info.dim, info.dtype,
							  info.input_dtype, info.frac_bits);

		/* dup2() leaves them open across exec */
		if (fd < 0 || dup2(fd, FIRST_HANDLE + i) < 0)
			abort();
		close(fd);
		close(fds[i]);
	}
	close(sock);
	if (nr_pads < 3 || finish(&model))
		abort();
}

static void close_handles(void)
{
	for (int i = 0; i < nr_pads; i++)
		close(FIRST_HANDLE + i);
}

/* The last of the pads, with one id per position */
static int tokens_handle(void)
{
	return FIRST_HANDLE + nr_pads - 1;
}

static void await_tokens(uint64_t len)
{
	while (len_of(tokens_handle()) < len)
		sched_yield();
}

/* Run with @options in several lives; the last one ends by itself. */
static void die_and_go_on(struct __test_metadata *_metadata, const char *kv,
			  const char *const *options)
{
	static const uint64_t deaths[] = { 1, 7, 30, 31, 90 };
	const char *heap[MAX_ARGUMENTS + 4] = { "/bin/kvdecode", "--cache", "heap", "--kv", kv };
	const char *pads[MAX_ARGUMENTS + 4] = { "/bin/kvdecode", "--handles", "100", "--kv", kv };
	static struct program whole, life;
	int status;

	for (size_t i = 1; i < MAX_ARGUMENTS && options[i]; i++)
		heap[i + 4] = pads[i + 4] = options[i];
	start(&whole, heap);
	ASSERT_EQ(0, finish(&whole));
	open_handles(kv);
	for (size_t i = 0; i < ARRAY_SIZE(deaths); i++) {
		start(&life, pads);
		await_tokens(deaths[i]);
		kill(life.pid, SIGKILL);
		status = finish(&life);
		/* it may have come to its end before the signal came */
		EXPECT_TRUE(status == 128 + SIGKILL || status == 0);
		/* what it printed is the beginning of the whole */
		EXPECT_EQ(0, strncmp(whole.text, life.text, life.bytes));
	}
	start(&life, pads);
	EXPECT_EQ(0, finish(&life));
	EXPECT_STREQ(whole.text, life.text);
	close_handles();
}

TEST_F_TIMEOUT(decode, next_decoder_goes_on_where_a_killed_one_ended, TEST_SECONDS)
{
	die_and_go_on(_metadata, "f32", KVDECODE("--steps", "150"));
	/* chance, too, is a matter of the position */
	die_and_go_on(_metadata, "f32", KVDECODE("--steps", "150", "--temperature", "1", "--seed",
						 "3"));
	die_and_go_on(_metadata, "mxint8", KVDECODE("--steps", "100"));
}

/* Without luck: pads as a death in the middle of a step leaves them */
TEST_F_TIMEOUT(decode, half_a_step_is_cut_back, TEST_SECONDS)
{
	static struct program whole, life;
	uint8_t row[4096] = { 0xff };
	struct kvscratch_info info;

	start(&whole, KVDECODE("--cache", "heap", "--steps", "60"));
	ASSERT_EQ(0, finish(&whole));
	open_handles("f32");
	/* of the first step, too */
	ASSERT_EQ(0, device_info(FIRST_HANDLE, &info));
	ASSERT_EQ(0, device_append(FIRST_HANDLE, row, info.row_bytes));
	start(&life, KVDECODE("--handles", "100", "--steps", "40"));
	ASSERT_EQ(0, finish(&life));
	ASSERT_EQ(40, len_of(tokens_handle()));
	/* k0, v0 and k1 have the next position, and no other pad has */
	for (int fd = FIRST_HANDLE; fd < FIRST_HANDLE + 3; fd++) {
		ASSERT_EQ(0, device_info(fd, &info));
		ASSERT_GE(sizeof(row), info.row_bytes);
		ASSERT_EQ(0, device_append(fd, row, info.row_bytes));
	}
	start(&life, KVDECODE("--handles", "100", "--steps", "60"));
	EXPECT_EQ(0, finish(&life));
	EXPECT_STREQ(whole.text, life.text);
	for (int fd = FIRST_HANDLE; fd <= tokens_handle(); fd++)
		EXPECT_EQ(60, len_of(fd));
	close_handles();
}

TEST_F_TIMEOUT(decode, pads_of_another_model_are_refused, TEST_SECONDS)
{
	static struct program life;

	int other = device_create(7, 3, KVSCRATCH_DTYPE_F32);

	ASSERT_LE(0, other);
	open_handles("f32");
	ASSERT_EQ(FIRST_HANDLE, dup2(other, FIRST_HANDLE));
	ASSERT_EQ(0, append_rows(FIRST_HANDLE, 12, 0, 2));
	start(&life, KVDECODE("--handles", "100"));
	EXPECT_EQ(2, finish(&life));
	EXPECT_EQ(0, life.bytes);
	/* and left as they were */
	EXPECT_EQ(2, len_of(FIRST_HANDLE));
	EXPECT_EQ(0, generation_of(FIRST_HANDLE));
	close(other);
	close_handles();
}

/* Sets of pads that no decoder leaves behind: refused, and left as they are */
TEST_F_TIMEOUT(decode, odd_pads_are_refused, TEST_SECONDS)
{
	static struct program life;
	static uint8_t row[4096];
	struct kvscratch_info info;
	int32_t id = 1 << 30;
	int k0 = FIRST_HANDLE, tokens, other;

	/* rows, and no tokens pad in its place */
	open_handles("f32");
	start(&life, KVDECODE("--handles", "100", "--steps", "1"));
	ASSERT_EQ(0, finish(&life));
	ASSERT_EQ(0, device_info(k0, &info));
	tokens = tokens_handle();
	ASSERT_LT(k0, tokens);
	other = device_open(O_RDWR);
	ASSERT_LE(0, other);
	ASSERT_EQ(tokens, dup2(other, tokens));
	start(&life, KVDECODE("--handles", "100", "--steps", "3"));
	EXPECT_EQ(2, finish(&life));
	EXPECT_EQ(1, len_of(k0));
	EXPECT_EQ(0, generation_of(k0));

	/* fewer rows than tokens */
	close(other);
	other = device_create(info.max_seq_len, 1, KVSCRATCH_DTYPE_I32);
	ASSERT_LE(0, other);
	ASSERT_EQ(tokens, dup2(other, tokens));
	id = 1;
	ASSERT_EQ(0, device_append(tokens, &id, sizeof(id)));
	ASSERT_EQ(0, device_append(tokens, &id, sizeof(id)));
	start(&life, KVDECODE("--handles", "100", "--steps", "3"));
	EXPECT_EQ(2, finish(&life));
	EXPECT_EQ(2, len_of(tokens));

	/* an id that is none, and a prompt that is another */
	for (int fd = k0; fd < tokens; fd++)
		ASSERT_EQ(0, device_append(fd, row, info.row_bytes));
	ASSERT_EQ(0, device_truncate(tokens, 1, 0));
	id = 1 << 30;
	ASSERT_EQ(0, device_append(tokens, &id, sizeof(id)));
	start(&life, KVDECODE("--handles", "100", "--steps", "3"));
	EXPECT_EQ(2, finish(&life));
	ASSERT_EQ(0, device_truncate(tokens, 1, 0));
	id = 300;
	ASSERT_EQ(0, device_append(tokens, &id, sizeof(id)));
	start(&life, KVDECODE("--handles", "100", "--steps", "9", "--prompt", "xyz"));
	EXPECT_EQ(2, finish(&life));
	EXPECT_EQ(2, len_of(k0));
	EXPECT_EQ(0, generation_of(k0));

	/* a handle that cannot append */
	close(other);
	other = device_open_reader(k0);
	ASSERT_LE(0, other);
	ASSERT_EQ(k0, dup2(other, k0));
	start(&life, KVDECODE("--handles", "100", "--steps", "3"));
	EXPECT_EQ(2, finish(&life));
	close(other);
	close_handles();
}

/* Who writes to the same pads is noticed. */
TEST_F_TIMEOUT(decode, another_writer_ends_it, TEST_SECONDS)
{
	static struct program decoder;
	static uint8_t row[4096];
	struct kvscratch_info info;

	open_handles("f32");
	start(&decoder, KVDECODE("--handles", "100"));
	await_tokens(2);
	ASSERT_EQ(0, device_info(FIRST_HANDLE, &info));
	ASSERT_EQ(0, device_append(FIRST_HANDLE, row, info.row_bytes));
	EXPECT_EQ(2, finish(&decoder));
	close_handles();
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
		execv(argv[0], (char *const *)argv);
		_exit(127);
	}
	/* there is nowhere to write to */
	EXPECT_EQ(3, wait_for(pid));
}

/* A reader with nothing but what came over the socket, while the decoder works */
TEST_F_TIMEOUT(decode, readers_see_the_cache_grow, TEST_SECONDS)
{
	static char names[KVSCRATCH_MAX_PASSED * 16];
	static struct program decoder;
	int fds[NR_HANDLES], count, sock;
	struct kvscratch_view k0, owned;
	struct kvscratch_view tokens;
	uint8_t row[16];
	uint32_t looks = 0, len = 0;

	open_handles("f32");
	start(&decoder, KVDECODE("--handles", "100", "--serve", SOCKET_PATH, "--wait-reader",
				 "--steps", "150"));
	sock = connect_when_it_listens();
	ASSERT_LE(0, sock);
	count = kvscratch_receive_handles(sock, names, sizeof(names), fds, NR_HANDLES);
	ASSERT_LT(2, count);
	EXPECT_STREQ("k0", names);
	ASSERT_EQ(0, device_map(fds[0], &k0));
	ASSERT_EQ(0, device_map(fds[count - 1], &tokens));
	EXPECT_EQ(KVSCRATCH_DTYPE_I32, tokens.info.dtype);

	/* each token that exists has its row in every other pad */
	while (len < 150) {
		uint32_t now = kvscratch_state_len(kvscratch_view_state(&tokens));

		ASSERT_LE(len, now);
		if (now == len)
			continue;
		len = now;
		looks++;
		ASSERT_LE(len, kvscratch_state_len(kvscratch_view_state(&k0)));
		for (int i = 0; i < count; i++) {
			ASSERT_LE(len, len_of(fds[i]));
		}
	}
	EXPECT_LT(1, looks);
	/* the end of the stream is the end of the text */
	EXPECT_EQ(0, read(sock, row, 1));
	EXPECT_EQ(0, finish(&decoder));

	/* the same memory as that of the handles that we kept, and read-only */
	ASSERT_EQ(0, device_map(FIRST_HANDLE, &owned));
	EXPECT_EQ(0, memcmp(owned.data, k0.data, k0.info.data_bytes));
	EXPECT_FALSE(all_zero(k0.data, 150 * (size_t)k0.info.row_bytes));
	for (int i = 0; i < count; i++) {
		EXPECT_ERRNO(EBADF, write(fds[i], row, sizeof(row)));
		EXPECT_EQ(-EACCES, device_truncate(fds[i], 0, 0));
		close(fds[i]);
	}
	device_unmap(&owned);
	device_unmap(&tokens);
	device_unmap(&k0);
	close(sock);
	close_handles();
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

	start(&rows, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--pad", "tokens", "--rows"));
	start(&decoder, KVDECODE("--serve", SOCKET_PATH, "--wait-reader", "--steps", "20"));
	EXPECT_EQ(0, finish(&decoder));
	EXPECT_EQ(0, finish(&rows));
	/* BOS and the last one */
	EXPECT_NE(NULL, strstr(rows.text, "0: 1\n"));
	EXPECT_NE(NULL, strstr(rows.text, "\n19: "));
	EXPECT_EQ(NULL, strstr(rows.text, "\n20: "));

	start(&rows, KVSCRATCHCTL("watch", "--socket", SOCKET_PATH, "--pad", "k99"));
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

	start(&first, KVDECODE("--serve", SOCKET_PATH, "--wait-reader"));
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
	start(&first, KVDECODE("--serve", SOCKET_PATH, "--wait-reader"));
	sock = connect_when_it_listens();
	ASSERT_LE(0, sock);
	kill(first.pid, SIGTERM);
	EXPECT_EQ(128 + SIGTERM, finish(&first));
	EXPECT_ERRNO(ENOENT, access(SOCKET_PATH, F_OK));
	close(sock);
	close(open("/tmp/precious", O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	start(&intruder, KVDECODE("--serve", "/tmp/precious"));
	EXPECT_EQ(3, finish(&intruder));
	EXPECT_EQ(0, access("/tmp/precious", F_OK));
}

TEST_HARNESS_MAIN
