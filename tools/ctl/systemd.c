// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "systemd.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FIRST_LISTEN_FD 3

static int send_state(int sock, const struct sockaddr_un *address, socklen_t address_bytes,
		      const char *state, int fd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(fd))];
	} control = { 0 };
	struct iovec iov = { .iov_base = (char *)state, .iov_len = strlen(state) };
	struct msghdr msg = {
		.msg_name = (void *)address,
		.msg_namelen = address_bytes,
		.msg_iov = &iov,
		.msg_iovlen = 1,
	};
	ssize_t sent;

	if (fd >= 0) {
		msg.msg_control = &control;
		msg.msg_controllen = sizeof(control);
		*CMSG_FIRSTHDR(&msg) = (struct cmsghdr){
			.cmsg_level = SOL_SOCKET,
			.cmsg_type = SCM_RIGHTS,
			.cmsg_len = CMSG_LEN(sizeof(fd)),
		};
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), &fd, sizeof(fd));
	}
	do
		sent = sendmsg(sock, &msg, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : 0;
}

int notify_manager(const char *state, int fd)
{
	const char *path = getenv("NOTIFY_SOCKET");
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const struct timeval timeout = { .tv_sec = 5 };
	size_t length;
	int sock, err;

	if (!path || !*path)
		return 0;
	length = strlen(path);
	if (length > sizeof(address.sun_path))
		return -ENAMETOOLONG;
	memcpy(address.sun_path, path, length);
	/* an abstract one */
	if (*path == '@')
		address.sun_path[0] = '\0';
	sock = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return -errno;
	/* should the manager hang, we do not for long */
	setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	err = send_state(sock, &address, offsetof(struct sockaddr_un, sun_path) + length, state,
			 fd);
	close(sock);
	return err;
}

static long listen_number(const char *variable)
{
	const char *text = getenv(variable);

	return text ? strtol(text, NULL, 10) : 0;
}

void take_listen_fds(void (*take)(void *context, int fd, const char *name), void *context)
{
	long count = listen_number("LISTEN_PID") == getpid() ? listen_number("LISTEN_FDS") : 0;
	const char *given = getenv("LISTEN_FDNAMES");
	char *names = strdup(given ? given : "");
	char *rest = names;

	if (count > INT_MAX - FIRST_LISTEN_FD)
		count = 0;
	for (int fd = FIRST_LISTEN_FD; fd < FIRST_LISTEN_FD + count; fd++) {
		const char *name = rest ? strsep(&rest, ":") : NULL;

		fcntl(fd, F_SETFD, FD_CLOEXEC);
		take(context, fd, name ? name : "");
	}
	free(names);
	unsetenv("LISTEN_PID");
	unsetenv("LISTEN_FDS");
	unsetenv("LISTEN_FDNAMES");
}
