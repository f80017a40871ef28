// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#include "backend.h"
#include "output.h"

#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

union handle_control {
	struct cmsghdr align;
	char bytes[CMSG_SPACE(sizeof(int) * KVSCRATCH_MAX_PASSED)];
};

static int send_all(int sock, const char *bytes, size_t count)
{
	while (count) {
		ssize_t sent = send(sock, bytes, count, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return -errno;
		bytes += sent;
		count -= sent;
	}
	return 0;
}

static int socket_option(int sock, int option)
{
	int value;
	socklen_t size = sizeof(value);

	return getsockopt(sock, SOL_SOCKET, option, &value, &size) ? -errno : value;
}

/* Before anything is sent: where messages are cut into packets the rest of one is lost. */
static int check_socket(int sock)
{
	static const char expected[] = "expected a connected Unix stream socket";
	struct sockaddr_un peer;
	socklen_t size = sizeof(peer);
	int domain = socket_option(sock, SO_DOMAIN);

	if (domain < 0)
		return set_error(domain, "descriptor %d: %s, got %s", sock, expected,
				 domain == -EBADF ? "none" : "something else");
	if (domain != AF_UNIX || socket_option(sock, SO_TYPE) != SOCK_STREAM)
		return set_error(-EPROTOTYPE, "descriptor %d: %s, got one of another kind", sock,
				 expected);
	if (getpeername(sock, (struct sockaddr *)&peer, &size))
		return set_error(-errno, "descriptor %d: %s, got one that is not connected", sock,
				 expected);
	return 0;
}

static int check_name(const char *name)
{
	if (*name && !name[strcspn(name, " \f\n\r\t\v")])
		return 0;
	return set_error(-EINVAL, "expected names without white space, got \"%s\"", name);
}

int kvscratch_send_handles(int sock, const char *const *names, const int *fds, unsigned int count)
{
	char text[sizeof(uint32_t) + KVSCRATCH_MAX_NAMES_BYTES];
	union handle_control control = { 0 };
	struct iovec iov = { .iov_base = text };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = CMSG_SPACE(sizeof(int) * count),
	};
	struct cmsghdr *cmsg;
	size_t end = sizeof(uint32_t);
	uint32_t length;
	ssize_t sent;
	int err = check_socket(sock);

	if (err)
		return err;
	if (!count || count > KVSCRATCH_MAX_PASSED)
		return set_error(-EINVAL, "expected 1 to %d handles, got %u", KVSCRATCH_MAX_PASSED,
				 count);
	for (unsigned int i = 0; i < count; i++) {
		size_t name_length = strlen(names[i]);

		err = check_name(names[i]);
		if (err)
			return err;
		if (name_length + 1 > sizeof(text) - end)
			return set_error(-EMSGSIZE, "expected names of at most %d bytes, got more",
					 KVSCRATCH_MAX_NAMES_BYTES);
		memcpy(text + end, names[i], name_length);
		text[end + name_length] = '\n';
		end += name_length + 1;
	}
	length = htole32(end - sizeof(length));
	memcpy(text, &length, sizeof(length));

	cmsg = CMSG_FIRSTHDR(&msg);
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int) * count);
	memcpy(CMSG_DATA(cmsg), fds, sizeof(int) * count);
	iov.iov_len = end;
	do
		sent = sendmsg(sock, &msg, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	err = sent < 0 ? -errno : send_all(sock, text + sent, end - sent);
	return err ? set_error(err, "cannot pass handles: %s", strerror(-err)) : 0;
}

/* The begin of every sentence about a message that was not taken */
#define CANNOT_RECEIVE "cannot receive handles: "

static int fail_receive(int err)
{
	return set_error(err, CANNOT_RECEIVE "%s", strerror(-err));
}

static int receive_all(int sock, char *bytes, size_t count)
{
	while (count) {
		ssize_t got = recv(sock, bytes, count, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return fail_receive(got ? -errno : -ECONNRESET);
		bytes += got;
		count -= got;
	}
	return 0;
}

/* A peer may have sent anything: a socket could wait in close() for its own. */
static void close_all(const int *fds, unsigned int count)
{
	const struct linger none = { 0 };

	while (count--) {
		setsockopt(fds[count], SOL_SOCKET, SO_LINGER, &none, sizeof(none));
		close(fds[count]);
	}
}

/* Take the first bytes of the length word, and the descriptors that ride on them. */
static int receive_fds(int sock, char *length, ssize_t *got, int *fds, unsigned int max_fds)
{
	union handle_control control = { 0 };
	struct iovec iov = { .iov_base = length, .iov_len = sizeof(uint32_t) };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	unsigned int count = 0;
	unsigned int too_many = 0;

	do
		*got = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	while (*got < 0 && errno == EINTR);
	if (*got <= 0)
		return fail_receive(*got ? -errno : -ECONNRESET);

	for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg); cmsg; cmsg = CMSG_NXTHDR(&msg, cmsg)) {
		size_t passed = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < passed; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(cmsg) + i * sizeof(int), sizeof(int));
			if (count < max_fds) {
				fds[count++] = fd;
			} else {
				too_many++;
				close(fd);
			}
		}
	}
	/* there is room for any number in control: our own limit cut it */
	if (!too_many && !(msg.msg_flags & MSG_CTRUNC))
		return count;
	close_all(fds, count);
	if (!too_many)
		return fail_receive(-EMFILE);
	return set_error(-EPROTO, CANNOT_RECEIVE "expected at most %u handles, got %u", max_fds,
			 max_fds + too_many);
}

/* Newlines become NULs; @length bytes of @text have to hold @count lines. */
static int split_names(char *text, uint32_t length, int count)
{
	int lines = 0;

	if (!length || text[length - 1] != '\n' || memchr(text, '\0', length))
		return set_error(-EPROTO, CANNOT_RECEIVE "expected names with a newline behind "
				 "each, got something else");
	for (uint32_t i = 0; i < length; i++) {
		if (text[i] != '\n')
			continue;
		text[i] = '\0';
		lines++;
	}
	if (lines == count)
		return 0;
	return set_error(-EPROTO, CANNOT_RECEIVE "expected a name for each of %d handles, got %d "
			 "names", count, lines);
}

/* The text behind the length word, the first @got bytes of which are there */
static int receive_names(int sock, char *word, ssize_t got, char *text, size_t text_size, int count)
{
	uint32_t length;
	int err = receive_all(sock, word + got, sizeof(length) - got);

	if (err)
		return err;
	memcpy(&length, word, sizeof(length));
	length = le32toh(length);
	if (length > text_size)
		return set_error(-EPROTO, CANNOT_RECEIVE "expected names of at most %zu bytes, got %"
				 PRIu32, text_size, length);
	err = receive_all(sock, text, length);
	return err ? err : split_names(text, length, count);
}

int kvscratch_receive_handles(int sock, char *text, size_t text_size, int *fds,
			      unsigned int max_fds)
{
	char word[sizeof(uint32_t)];
	ssize_t got;
	int count;
	int err = check_socket(sock);

	if (err)
		return err;
	count = receive_fds(sock, word, &got, fds, max_fds);
	if (count < 0)
		return count;
	err = receive_names(sock, word, got, text, text_size, count);
	if (!err)
		return count;
	close_all(fds, count);
	return err;
}

/* "" is an address, too: one that every user may listen at and connect to. */
static int unix_address(const char *path, struct sockaddr_un *address)
{
	const size_t most = sizeof(address->sun_path) - 1;
	const size_t length = strlen(path);

	if (!length)
		return set_error(-EINVAL, "expected the path of a socket, got an empty one");
	if (length > most)
		return set_error(-ENAMETOOLONG, "%.80s...: expected a path of at most %zu bytes for "
				 "a socket, got %zu", path, most, length);
	*address = (struct sockaddr_un){ .sun_family = AF_UNIX };
	memcpy(address->sun_path, path, length);
	return 0;
}

static int fail_socket(const char *path, const char *what, int err)
{
	return set_error(err, "%s: cannot %s: %s", path, what, strerror(-err));
}

/*
 * Remove the socket of a process that is gone: it refuses connections, which those of
 * living ones do not. Nothing keeps two from finding the same one at one moment, and then
 * the socket of the first is lost; who cannot have that takes a lock, as holders do.
 */
static int remove_dead_socket(const char *path)
{
	struct stat status;
	int sock;

	if (lstat(path, &status))
		return errno == ENOENT ? 0 : fail_socket(path, "listen", -errno);
	if (!S_ISSOCK(status.st_mode))
		return set_error(-ENOTSOCK, "%s: cannot listen: expected a socket or nothing there, "
				 "got %s", path, file_kind(status.st_mode));
	sock = kvscratch_connect(path);
	if (sock >= 0)
		close(sock);
	if (sock >= 0 || sock == -ETIMEDOUT || sock == -EPROTOTYPE)
		return set_error(-EADDRINUSE, "%s: cannot listen: somebody listens there", path);
	if (sock != -ECONNREFUSED && sock != -ENOENT)
		return fail_socket(path, "see whether somebody listens there", sock);
	if (unlink(path) && errno != ENOENT)
		return fail_socket(path, "remove the socket of a process that is gone", -errno);
	return 0;
}

static int bind_socket(int sock, const char *path, const struct sockaddr_un *address)
{
	int err;

	if (!bind(sock, (const struct sockaddr *)address, sizeof(*address)))
		return 0;
	if (errno != EADDRINUSE)
		return fail_socket(path, "listen", -errno);
	err = remove_dead_socket(path);
	if (!err && bind(sock, (const struct sockaddr *)address, sizeof(*address)))
		err = fail_socket(path, "listen", -errno);
	return err;
}

int kvscratch_listen(const char *path)
{
	struct sockaddr_un address;
	int err = unix_address(path, &address);
	int sock;

	if (err)
		return err;
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return fail_socket(path, "listen", -errno);
	err = bind_socket(sock, path, &address);
	if (!err && listen(sock, SOMAXCONN))
		err = fail_socket(path, "listen", -errno);
	if (!err)
		return sock;
	close(sock);
	return err;
}

/* connect() waits as long as sending may, while the other side has enough who wait */
static int limit_sending(int sock, int seconds)
{
	const struct timeval limit = { .tv_sec = seconds };

	return setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) ? -errno : 0;
}

#define CONNECT_SECONDS 5

static int connect_socket(int sock, const struct sockaddr_un *address)
{
	int err = limit_sending(sock, CONNECT_SECONDS);

	while (!err && connect(sock, (const struct sockaddr *)address, sizeof(*address)))
		if (errno != EINTR)
			err = errno == EAGAIN ? -ETIMEDOUT : -errno;
	return err ? err : limit_sending(sock, 0);
}

/* What is no socket refuses connections, as one that nobody listens on does. */
static int fail_connect(const char *path, int err)
{
	struct stat status;

	if (err == -ECONNREFUSED && !stat(path, &status) && !S_ISSOCK(status.st_mode))
		return set_error(-ENOTSOCK, "%s: cannot connect: expected a socket, got %s", path,
				 file_kind(status.st_mode));
	return fail_socket(path, "connect", err);
}

int kvscratch_connect(const char *path)
{
	struct sockaddr_un address;
	int err = unix_address(path, &address);
	int sock;

	if (err)
		return err;
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return fail_socket(path, "connect", -errno);
	err = connect_socket(sock, &address);
	if (!err)
		return sock;
	close(sock);
	return fail_connect(path, err);
}
