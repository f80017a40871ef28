// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Take the pad of producer.c and print the sum of each row, until the pad is full. A
 * producer that ends before that hangs up, however it ends.
 *
 *   cc -o reader reader.c $(pkg-config --cflags --libs libkvscratch)
 */
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <libkvscratch.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

/* How often a producer that appends nothing is looked at */
#define LOOK_MS 100

static struct kvscratch *receive_pad(const char *path, int *sock)
{
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	struct kvscratch *pad;
	int fd;

	*sock = kvscratch_connect(path);
	if (*sock < 0 || kvscratch_receive_handles(*sock, names, sizeof(names), &fd, 1) < 0 ||
	    kvscratch_from_fd(&pad, fd))
		errx(1, "%s", kvscratch_error());
	return pad;
}

static bool has_hung_up(int sock)
{
	struct pollfd polled = { .fd = sock, .events = POLLIN };

	return poll(&polled, 1, 0) > 0;
}

int main(int argc, char **argv)
{
	int sock;
	struct kvscratch *pad = receive_pad(argc > 1 ? argv[1] : "pad.sock", &sock);
	const struct kvscratch_view *view = kvscratch_view(pad);
	struct kvscratch_tensor tensor = { 0 };
	uint64_t row = 0;

	while (row < kvscratch_capacity(pad)) {
		uint64_t earlier = tensor.state, kept;
		/* in this order: what came before it hung up is seen */
		bool ended = has_hung_up(sock);
		int waited = view ? kvscratch_wait(pad, earlier, ended ? 0 : LOOK_MS) : 0;

		if (waited == -ETIMEDOUT && ended)
			errx(1, "expected %" PRIu64 " rows, got %" PRIu64 " when the producer ended",
			     kvscratch_capacity(pad), row);
		if (waited == -ETIMEDOUT)
			continue;
		if (!view || waited || kvscratch_as_tensor(pad, &tensor))
			errx(1, "%s", kvscratch_error());
		kept = kvscratch_view_valid_rows(view, earlier);
		if (kept < row) {
			row = kept;
			printf("back to row %" PRIu64 "\n", row);
		}
		for (; row < tensor.len; row++) {
			const float *elements = (const float *)tensor.data + row * tensor.dim;
			float sum = 0;

			for (uint32_t i = 0; i < tensor.dim; i++)
				sum += elements[i];
			/* it counts unless the row was dropped, and overwritten, meanwhile */
			if (kvscratch_view_valid_rows(view, tensor.state) <= row)
				break;
			printf("row %" PRIu64 ": %g\n", row, sum);
		}
		fflush(stdout);
	}
	kvscratch_close(pad);
	close(sock);
	return 0;
}
