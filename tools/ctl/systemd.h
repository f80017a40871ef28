/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a service tells its manager, over the socket in NOTIFY_SOCKET, and what it
 * gets back from it: see sd_notify(3) and sd_listen_fds(3).
 */
#ifndef SYSTEMD_H
#define SYSTEMD_H

/*
 * Send @state, lines of NAME=VALUE, and with it @fd unless that is negative. Returns 0, also
 * when there is no manager, or a negative errno.
 */
int notify_manager(const char *state, int fd);

/**
 * take_listen_fds() - take the descriptors that the manager kept
 * @take: gets each of them, close-on-exec, and its name; owns the descriptor from then on
 * @context: for @take
 *
 * Later calls, and children, find none.
 */
void take_listen_fds(void (*take)(void *context, int fd, const char *name), void *context);

#endif
