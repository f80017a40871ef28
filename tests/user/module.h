/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The module that the guest was given, taken out and put in again.
 */
#ifndef TESTS_USER_MODULE_H
#define TESTS_USER_MODULE_H

#include "common.h"

/* 0 or -errno; files of processes that have just ended may be closed late, and are waited for */
static inline int remove_module(void)
{
	for (int tries = 0; tries < 200000; tries++) {
		if (!syscall(SYS_delete_module, "kvscratch", O_NONBLOCK))
			return 0;
		if (errno != EWOULDBLOCK)
			break;
		sched_yield();
	}
	return -errno;
}

/* 0 or -errno */
static inline int load_module(const char *parameters)
{
	int fd = open("/kvscratch.ko", O_RDONLY | O_CLOEXEC);
	int err = fd < 0 || syscall(SYS_finit_module, fd, parameters, 0) ? -errno : 0;

	close(fd);
	return err;
}

#endif
