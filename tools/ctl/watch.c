// SPDX-License-Identifier: GPL-2.0-only
/*
 * watch: a line whenever the length of a pad changes.
 */
#define _GNU_SOURCE
#include "ctl.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/**
 * struct watch - a view that is followed
 * @args: what was asked for
 * @sock: whose end ends the watch, or -1
 * @pad: a handle of our own
 * @view: its view
 * @selection: the planes whose rows are printed
 * @row: room for one row of them
 * @generation: of the last look
 * @seen: rows printed
 * @reached: whether as many rows were seen as --until asks for
 */
struct watch {
	const struct arguments *args;
	int sock;
	struct kvscratch *pad;
	const struct kvscratch_view *view;
	struct selection selection;
	char *row;
	uint32_t generation;
	uint32_t seen;
	bool reached;
};

/* How often a socket that is not there yet is tried, and one that may hang up looked at */
#define RETRY_MS 20
#define HANG_UP_MS 100

static int64_t milliseconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The other side may just be starting. */
static int connect_in_time(const struct arguments *args)
{
	int64_t end = milliseconds_now() + (int64_t)args->timeout * 1000;
	int sock;

	for (;;) {
		sock = kvscratch_connect(args->socket);
		if (sock != -ENOENT && sock != -ECONNREFUSED)
			return sock;
		if (milliseconds_now() >= end)
			return sock;
		poll(NULL, 0, RETRY_MS);
	}
}

/* Keep the handle of the name that was asked for, by default the last one. */
static int choose_handle(const struct arguments *args, const char *names, const int *fds, int count)
{
	const char *name = names;
	int chosen = -1;

	for (int i = 0; i < count; i++) {
		if (args->pad ? !strcmp(args->pad, name) : i == count - 1)
			chosen = i;
		name += strlen(name) + 1;
	}
	for (int i = 0; i < count; i++)
		if (i != chosen)
			close(fds[i]);
	return chosen < 0 ? -1 : fds[chosen];
}

static int receive_handle(struct watch *watch)
{
	static struct handles handles;
	int count, fd;

	watch->sock = connect_in_time(watch->args);
	if (watch->sock < 0)
		return fail(watch->sock == -ENAMETOOLONG ? EXIT_INPUT : EXIT_SYSTEM, "%s",
			    kvscratch_error());
	count = kvscratch_receive_handles(watch->sock, handles.names, sizeof(handles.names),
					  handles.fds, ARRAY_SIZE(handles.fds));
	if (count < 0)
		return fail(EXIT_SYSTEM, "%s: %s", watch->args->socket, kvscratch_error());
	fd = choose_handle(watch->args, handles.names, handles.fds, count);
	if (fd < 0)
		return fail(EXIT_INPUT, "--pad: expected one of the %d pads served, got \"%s\"",
			    count, watch->args->pad);
	if (!kvscratch_from_fd(&watch->pad, fd))
		return 0;
	close(fd);
	return fail(EXIT_SYSTEM, "%s: %s", watch->args->socket, kvscratch_error());
}

static int open_watch(struct watch *watch)
{
	const struct arguments *args = watch->args;
	int err;

	if (args->socket)
		err = receive_handle(watch);
	else
		err = open_own(args, O_RDONLY, &watch->pad);
	if (!err)
		err = select_planes(args, watch->pad, &watch->selection);
	if (err)
		return err;
	watch->view = kvscratch_view(watch->pad);
	if (!watch->view)
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	if (given(args, OPT_UNTIL) && args->until > watch->view->max_seq_len)
		return fail(EXIT_INPUT, "--until: expected at most %" PRIu64
			    ", the rows that fit, got %" PRIu64,
			    watch->view->max_seq_len, args->until);
	watch->row = malloc(watch->selection.row_bytes);
	return watch->row ? 0 : fail(EXIT_SYSTEM, "out of memory");
}

static void close_watch(struct watch *watch)
{
	free(watch->row);
	kvscratch_close(watch->pad);
	if (watch->sock >= 0)
		close(watch->sock);
}

static void report_len(const struct watch *watch, uint32_t len)
{
	if (given(watch->args, OPT_JSON))
		printf("{\"len\": %" PRIu32 ", \"generation\": %" PRIu32 "}\n", len,
		       watch->generation);
	else
		print_display_line(len, watch->view->max_seq_len,
				   kvscratch_view_plane(watch->view, 0), watch->view->nr_planes);
}

/* Returns true when all rows of @state were still there when they were copied. */
static bool report_rows(struct watch *watch, uint64_t state)
{
	char number[16];

	while (watch->seen < kvscratch_state_len(state)) {
		/* fails where a truncate took the row away */
		if (copy_selected(watch->pad, &watch->selection, watch->seen, 1, watch->row) ||
		    kvscratch_view_valid_rows(watch->view, state) <= watch->seen)
			return false;
		snprintf(number, sizeof(number), "%" PRIu32, watch->seen);
		print_selected_row(&watch->selection, watch->row, number);
		watch->seen++;
	}
	return true;
}

/* After a truncate: the rows that are the same as when they were seen */
static void forget_dropped_rows(struct watch *watch, uint64_t state)
{
	uint64_t before = (uint64_t)watch->generation << 32 | watch->seen;

	watch->seen = kvscratch_view_valid_rows(watch->view, before);
	if (watch->seen > kvscratch_state_len(state))
		watch->seen = kvscratch_state_len(state);
	watch->generation = kvscratch_state_generation(state);
	if (!given(watch->args, OPT_JSON))
		printf("truncated, generation %" PRIu32 ", rows below %" PRIu32 " kept\n",
		       watch->generation, watch->seen);
}

/*
 * Print what changed since the last look, the first time in any case; *seen becomes the state
 * of which all was printed. Returns an exit code.
 */
static int look(struct watch *watch, bool first, uint64_t *seen)
{
	uint64_t state;
	bool changed;

	for (;;) {
		state = kvscratch_view_state(watch->view);
		/* on a memfd it is what some process wrote there */
		if (kvscratch_state_len(state) > watch->view->max_seq_len)
			return fail(EXIT_SYSTEM, "expected at most %" PRIu64 " rows, got %" PRIu32,
				    watch->view->max_seq_len,
				    kvscratch_state_len(state));
		*seen = state;
		changed = first || kvscratch_state_len(state) > watch->seen;
		if (first)
			watch->generation = kvscratch_state_generation(state);
		first = false;
		if (kvscratch_state_generation(state) != watch->generation) {
			forget_dropped_rows(watch, state);
			changed = true;
		}
		if (!changed)
			return 0;
		if (given(watch->args, OPT_ROWS) && !report_rows(watch, state))
			continue;
		watch->seen = kvscratch_state_len(state);
		report_len(watch, watch->seen);
		/* it was printed: whatever comes next, that was it */
		watch->reached = given(watch->args, OPT_UNTIL) && watch->seen >= watch->args->until;
		if (watch->reached)
			return 0;
	}
}

static bool has_hung_up(const struct watch *watch)
{
	struct pollfd polled = { .fd = watch->sock, .events = POLLIN };

	return watch->sock >= 0 && poll(&polled, 1, 0) > 0;
}

/* There will be no other state. */
static int report_seal(const struct watch *watch)
{
	int err;

	if (given(watch->args, OPT_JSON))
		puts("{\"sealed\": true}");
	else
		puts("sealed");
	err = finish_output();
	if (!err && given(watch->args, OPT_UNTIL))
		return fail(EXIT_SYSTEM, "--until: expected %" PRIu64 " rows, got %" PRIu32
			    " when the pad was sealed", watch->args->until, watch->seen);
	return err;
}

static int follow(struct watch *watch)
{
	bool first = true;

	for (;;) {
		/* in this order: what came before the other side hung up is seen */
		bool ended = has_hung_up(watch);
		uint64_t state = 0;
		int err = look(watch, first, &state);

		first = false;
		if (!err)
			err = finish_output();
		if (err)
			return err;
		if (watch->reached)
			return 0;
		if (ended && given(watch->args, OPT_UNTIL))
			return fail(EXIT_SYSTEM, "--until: expected %" PRIu64
				    " rows, got %" PRIu32 " when the server ended",
				    watch->args->until, watch->seen);
		if (ended)
			return 0;
		err = kvscratch_wait(watch->pad, state, watch->sock < 0 ? -1 : HANG_UP_MS);
		if (err == -EROFS)
			return report_seal(watch);
		if (err && err != -ETIMEDOUT && err != -EINTR)
			return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	}
}

int run_watch(const struct arguments *args)
{
	struct watch watch = { .args = args, .sock = -1 };
	int err;

	if ((given(args, OPT_PAD) || given(args, OPT_TIMEOUT)) && !given(args, OPT_SOCKET))
		return fail(EXIT_INPUT, "--%s: expected --socket with it",
			    given(args, OPT_PAD) ? "pad" : "timeout");
	if (given(args, OPT_ROWS) && given(args, OPT_JSON))
		return fail(EXIT_INPUT, "expected either --rows or --json, got both");
	if (given(args, OPT_PLANE) && !given(args, OPT_ROWS))
		return fail(EXIT_INPUT, "--plane: expected --rows with it");
	if (args->socket && args->name)
		return fail(EXIT_INPUT, "expected either --socket or --name, got both");
	err = open_watch(&watch);
	if (!err)
		err = follow(&watch);
	close_watch(&watch);
	return err;
}
