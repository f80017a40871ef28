// SPDX-License-Identifier: GPL-2.0-only
#include "progress.h"

#include "../interrupt.h"

#include <inttypes.h>
#include <unistd.h>

/* What is shorter than this is over before anybody looks. */
#define SHORTEST_BYTES (8u << 20)

#define BAR_CELLS 40

#define NEVER_SHOWN -1
#define NOT_TO_BE_SHOWN -2

struct progress progress_start(const struct arguments *args, const char *what)
{
	bool wanted = !given(args, OPT_NO_PROGRESS) && isatty(STDERR_FILENO);

	return (struct progress){ .what = what, .shown = wanted ? NEVER_SHOWN : NOT_TO_BE_SHOWN };
}

int progress_at(void *context, uint64_t done, uint64_t total)
{
	struct progress *progress = context;
	int percent = total ? (double)done / (double)total * 100 : 100;
	int cells = percent * BAR_CELLS / 100;

	if (progress->shown == NOT_TO_BE_SHOWN || progress->shown == percent ||
	    total < SHORTEST_BYTES)
		return interrupted();
	progress->shown = percent;
	fprintf(stderr, "\r%s [%.*s%*s] %3d%% of %" PRIu64 " MiB", progress->what, cells,
		"########################################", BAR_CELLS - cells, "", percent,
		total >> 20);
	fflush(stderr);
	return interrupted();
}

void progress_end(const struct progress *progress)
{
	if (progress->shown >= 0)
		/* to the begin of the line, and erase it */
		fputs("\r\033[K", stderr);
}
