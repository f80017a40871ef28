// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Make a pad, pass it to a reader, and append a row for each number of the input; -N
 * keeps the first N rows.
 *
 *   cc -o producer producer.c $(pkg-config --cflags --libs libkvscratch)
 *   echo 1 2 3 4 -2 5 6 7 8 9 10 | ./producer &
 *   ./reader
 */
#include <err.h>
#include <libkvscratch.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_SEQ_LEN 8
#define DIM 4

/*
 * Give the first process that connects a read-only handle of its own. Returns the connection:
 * when it ends, so have we.
 */
static int serve_reader(const struct kvscratch *pad, const char *path)
{
	const char *const names[] = { "pad" };
	int listener = kvscratch_listen(path);
	int sock, fd;

	if (listener < 0)
		errx(1, "%s", kvscratch_error());
	fprintf(stderr, "listening at %s\n", path);
	sock = accept(listener, NULL, NULL);
	if (sock < 0)
		err(1, "%s: cannot accept", path);
	unlink(path);
	fd = kvscratch_open_reader(pad);
	if (fd < 0 || kvscratch_send_handles(sock, names, &fd, 1))
		errx(1, "%s", kvscratch_error());
	close(fd);
	close(listener);
	return sock;
}

int main(int argc, char **argv)
{
	struct kvscratch *pad;
	int sock, failed, number;

	if (kvscratch_new(&pad, MAX_SEQ_LEN, DIM, KVSCRATCH_DTYPE_F32))
		errx(1, "%s", kvscratch_error());
	sock = serve_reader(pad, argc > 1 ? argv[1] : "pad.sock");
	while (scanf("%d", &number) == 1) {
		const float row[DIM] = { number, 2 * number, 3 * number, 4 * number };

		failed = number < 0 ? kvscratch_truncate(pad, -number, 0) :
				      kvscratch_append(pad, row, DIM);
		if (failed)
			errx(1, "%s", kvscratch_error());
	}
	kvscratch_close(pad);
	close(sock);
	return 0;
}
