// SPDX-License-Identifier: GPL-2.0-only
/*
 * watch: a line whenever the length of a pad changes.
 */
#define _GNU_SOURCE
#include "watch.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* How often a socket that is not there yet is tried, and who may end looked at */
#define RETRY_MS 20
#define HANG_UP_MS 100

int64_t milliseconds_now(void)
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
	return err ? err : select_planes(args, watch->pad, &watch->selection);
}

/* What watch prints */

static void tell_row(const struct watch *watch)
{
	char number[16];

	snprintf(number, sizeof(number), "%" PRIu32, watch->seen);
	print_selected_row(&watch->selection, watch->row, number);
}

static void tell_dropped(const struct watch *watch)
{
	if (!given(watch->args, OPT_JSON))
		printf("truncated, generation %" PRIu32 ", rows below %" PRIu32 " kept\n",
		       watch->generation, watch->seen);
}

static void tell_len(const struct watch *watch)
{
	if (given(watch->args, OPT_JSON))
		printf("{\"len\": %" PRIu32 ", \"generation\": %" PRIu32 "}\n", watch->seen,
		       watch->generation);
	else
		print_display_line(watch->seen, watch->view->max_seq_len,
				   kvscratch_view_plane(watch->view, 0), watch->view->nr_planes);
}

/* Following */

/* Returns true when all rows of @state were still there when they were copied. */
static bool look_at_rows(struct watch *watch, uint64_t state)
{
	while (watch->seen < kvscratch_state_len(state)) {
		/* fails where a truncate took the row away */
		if (copy_selected(watch->pad, &watch->selection, watch->seen, 1, watch->row) ||
		    kvscratch_view_valid_rows(watch->view, state) <= watch->seen)
			return false;
		watch->tell.row(watch);
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
	watch->tell.dropped(watch);
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
		if (watch->tell.row && !look_at_rows(watch, state))
			continue;
		watch->seen = kvscratch_state_len(state);
		if (watch->tell.len)
			watch->tell.len(watch);
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

/* Who waits for rows waits for a writer, too, unless there was one. */
static bool has_no_writer(struct watch *watch)
{
	struct kvscratch_pad_info info;

	if (!watch->by_writer || kvscratch_pad_info(watch->pad, &info))
		return false;
	if (info.flags & KVSCRATCH_PAD_WRITER) {
		watch->had_writer = true;
		return false;
	}
	return watch->had_writer || !given(watch->args, OPT_UNTIL);
}

/* Nothing comes any more: "sealed" or "ended", if that is to be told, and @when */
static int end_watch(const struct watch *watch, const char *why, const char *when)
{
	int err;

	if (why)
		printf(given(watch->args, OPT_JSON) ? "{\"%s\": true}\n" : "%s\n", why);
	err = finish_output();
	if (!err && given(watch->args, OPT_UNTIL))
		return fail(EXIT_SYSTEM, "--until: expected %" PRIu64 " rows, got %" PRIu32
			    " when %s", watch->args->until, watch->seen, when);
	return err;
}

/* How long to sleep at most, in milliseconds, if nothing has changed since @changed */
static int64_t sleep_of(const struct watch *watch, int64_t changed)
{
	int64_t left = changed + watch->idle_ms - milliseconds_now();

	if (watch->idle_ms >= 0 && left < HANG_UP_MS)
		return left < 0 ? 0 : left;
	return watch->sock >= 0 || watch->by_writer || watch->idle_ms >= 0 ? HANG_UP_MS : -1;
}

static int follow(struct watch *watch)
{
	int64_t changed = milliseconds_now();
	uint64_t state = 0, before = 0;

	for (bool first = true;; first = false) {
		/* in this order: what came before the other side ended is seen */
		const bool hung_up = has_hung_up(watch);
		const bool no_writer = has_no_writer(watch);
		int err = look(watch, first, &state);

		if (!err)
			err = finish_output();
		if (err)
			return err;
		if (watch->reached)
			return 0;
		if (hung_up)
			return end_watch(watch, NULL, "the server ended");
		if (state != before)
			changed = milliseconds_now();
		before = state;
		err = kvscratch_wait(watch->pad, state, no_writer ? 0 : sleep_of(watch, changed));
		if (err == -EROFS)
			return end_watch(watch, "sealed", "the pad was sealed");
		if (no_writer && err == -ETIMEDOUT)
			return end_watch(watch, "ended", "its writer was gone");
		if (err == -ETIMEDOUT && watch->idle_ms >= 0 &&
		    milliseconds_now() - changed >= watch->idle_ms)
			return end_watch(watch, NULL, "the time was up");
		if (err && err != -ETIMEDOUT && err != -EINTR)
			return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	}
}

int watch_pad(struct watch *watch)
{
	const struct arguments *args = watch->args;
	int err;

	watch->view = kvscratch_view(watch->pad);
	if (!watch->view)
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	if (given(args, OPT_UNTIL) && args->until > watch->view->max_seq_len)
		return fail(EXIT_INPUT, "--until: expected at most %" PRIu64
			    ", the rows that fit, got %" PRIu64,
			    watch->view->max_seq_len, args->until);
	watch->row = malloc(watch->selection.row_bytes);
	if (!watch->row)
		return fail(EXIT_SYSTEM, "out of memory");
	err = follow(watch);
	free(watch->row);
	return err;
}

int run_watch(const struct arguments *args)
{
	struct watch watch = {
		.args = args,
		.sock = -1,
		.idle_ms = -1,
		.tell = { given(args, OPT_ROWS) ? tell_row : NULL, tell_dropped, tell_len },
	};
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
		err = watch_pad(&watch);
	kvscratch_close(watch.pad);
	if (watch.sock >= 0)
		close(watch.sock);
	return err;
}
