// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "interrupt.h"

#include "cli.h"

#include <signal.h>
#include <stddef.h>

static volatile sig_atomic_t noted;

static void note(int signal_number)
{
	noted = signal_number;
}

void catch_interrupts(void)
{
	static const int signals[] = { SIGINT, SIGTERM, SIGHUP };
	const struct sigaction action = { .sa_handler = note, .sa_flags = SA_RESTART };
	struct sigaction old;

	for (size_t i = 0; i < ARRAY_SIZE(signals); i++)
		if (!sigaction(signals[i], NULL, &old) && old.sa_handler == SIG_DFL)
			sigaction(signals[i], &action, NULL);
}

int interrupted(void)
{
	return noted;
}

int end_by(int signal_number)
{
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, signal_number);
	signal(signal_number, SIG_DFL);
	raise(signal_number);
	sigprocmask(SIG_UNBLOCK, &mask, NULL);
	/* as a shell has it */
	return 128 + signal_number;
}
