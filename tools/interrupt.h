/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Signals that end us while there is something to remove first.
 */
#ifndef INTERRUPT_H
#define INTERRUPT_H

/*
 * From now on SIGINT, SIGTERM and SIGHUP are only noted, unless they are ignored: who calls
 * this has nothing to wait for, and looks.
 */
void catch_interrupts(void);

/* The signal that came, or 0 */
int interrupted(void);

/* Die of a signal, as without us. */
int end_by(int signal_number);

#endif
