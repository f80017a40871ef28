// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Held pads, from the side of who wants one.
 */
#define _GNU_SOURCE
#include "backend.h"
#include "holder.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int check_name(const char *what, const char *name)
{
	if (holder_name_is_valid(name))
		return 0;
	return set_error(-EINVAL, "%s: expected 1 to %d of A-Z a-z 0-9 . _ - and no dot first, "
			 "got \"%.80s\"", what, KVSCRATCH_MAX_NAME, name);
}

int kvscratch_holder_path(const char *name, char *path, size_t path_size)
{
	const char *runtime = secure_getenv("XDG_RUNTIME_DIR");
	int err = name ? check_name("the name of a holder", name) : 0;
	size_t length;

	if (err)
		return err;
	if (!runtime || !*runtime)
		return set_error(-ENXIO, "XDG_RUNTIME_DIR is not set: held pads have their sockets "
				 "there");
	/* as the specification has it: a directory there would be another one elsewhere */
	if (*runtime != '/')
		return set_error(-ENXIO, "XDG_RUNTIME_DIR: expected an absolute path, got "
				 "\"%.80s\"", runtime);
	length = snprintf(path, path_size, "%s/kvscratch%s%s", runtime, name ? "/" : "",
			  name ? name : "");
	if (length >= path_size)
		return set_error(-ENAMETOOLONG, "expected a path of less than %zu bytes, got "
				 "%zu in %.80s", path_size, length, runtime);
	return 0;
}

/* Whoever can listen there is not yet somebody to trust. */
static int check_peer(int sock, const char *name)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	if (getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size))
		return cannot("see whose the holder is", -errno);
	if (peer.uid != geteuid())
		return set_error(-EACCES, "%s: expected a holder of user %u, got one of user %u",
				 name, geteuid(), peer.uid);
	return 0;
}

static int set_timeouts(int sock)
{
	const struct timeval timeout = { .tv_sec = HOLDER_TIMEOUT_SECONDS };

	if (setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) ||
	    setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)))
		return cannot("limit the wait for the holder", -errno);
	return 0;
}

/* Returns the socket. */
static int connect_holder(const char *name)
{
	char path[4096];
	int err = kvscratch_holder_path(name, path, sizeof(path));
	int sock;

	if (err)
		return err;
	sock = kvscratch_connect(path);
	if (sock == -ENOENT || sock == -ECONNREFUSED)
		return set_error(-ENOENT, "no pads are held as \"%s\": nobody listens on %s", name,
				 path);
	if (sock < 0)
		return sock;
	err = check_peer(sock, name);
	if (!err)
		err = set_timeouts(sock);
	if (err) {
		close(sock);
		return err;
	}
	return sock;
}

static int fail_connection(const char *name, int err)
{
	if (err == -EAGAIN)
		return set_error(-ETIMEDOUT, "%s: the holder did not answer within %d seconds",
				 name, HOLDER_TIMEOUT_SECONDS);
	if (err == -EPIPE || err == -ECONNRESET)
		return set_error(-EPROTO, "%s: the holder ended the connection", name);
	return set_error(err, "%s: cannot speak with the holder: %s", name, strerror(-err));
}

/* The same of handles: of what is no matter of the connection their sentence stays. */
static int fail_handles(const char *name, int err)
{
	if (err == -EAGAIN || err == -EPIPE || err == -ECONNRESET)
		return fail_connection(name, err);
	return err;
}

static int send_request(int sock, const char *name, const struct holder_request *request)
{
	ssize_t sent;

	do
		sent = send(sock, request, sizeof(*request), MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	/* it is shorter than any socket's buffer */
	return sent == sizeof(*request) ? 0 : fail_connection(name, sent < 0 ? -errno : -EAGAIN);
}

static int receive_bytes(int sock, const char *name, void *to, size_t bytes)
{
	size_t done = 0;

	while (done < bytes) {
		ssize_t got = recv(sock, (char *)to + done, bytes - done, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return fail_connection(name, got ? -errno : -ECONNRESET);
		done += got;
	}
	return 0;
}

static int receive_reply(int sock, const char *name, struct holder_reply *reply)
{
	int err = receive_bytes(sock, name, reply, HOLDER_HEAD_BYTES);

	if (err)
		return err;
	if (reply->magic != HOLDER_MAGIC)
		return set_error(-EPROTO, "%s: what listens there is no holder of pads", name);
	if (reply->version != HOLDER_VERSION)
		return set_error(-EPROTO, "%s: expected a holder of version %d, got one of %u",
				 name, HOLDER_VERSION, reply->version);
	err = receive_bytes(sock, name, &reply->err, sizeof(*reply) - HOLDER_HEAD_BYTES);
	if (err)
		return err;
	reply->words[sizeof(reply->words) - 1] = '\0';
	if (reply->err)
		return set_error(reply->err < 0 ? reply->err : -EPROTO, "%s: %s", name,
				 reply->words);
	return 0;
}

/* Send a request that is filled in but for what is the same in all. */
static int ask(int sock, const char *name, struct holder_request *request, const char *pad)
{
	request->magic = HOLDER_MAGIC;
	request->version = HOLDER_VERSION;
	/* a valid name, or none */
	strcpy(request->pad, pad);
	return send_request(sock, name, request);
}

/* Callers make paths and lines of text of them. */
static int check_names(const char *holder, const char *names, int *fds, int count)
{
	for (int i = 0; i < count; i++, names += strlen(names) + 1) {
		if (holder_name_is_valid(names))
			continue;
		while (count)
			close(fds[--count]);
		return set_error(-EPROTO, "%s: the holder sent what is no name of a pad", holder);
	}
	return count;
}

/* Returns @count, or what is wrong, and then the handles are closed. */
static int copy_names(const char *holder, char *names, size_t names_size, const char *from, int *fds,
		      int count)
{
	size_t bytes = 0;

	for (int i = 0; i < count; i++)
		bytes += strlen(from + bytes) + 1;
	if (bytes <= names_size) {
		memcpy(names, from, bytes);
		return count;
	}
	for (int i = 0; i < count; i++)
		close(fds[i]);
	return set_error(-EMSGSIZE, "%s: expected names of at most %zu bytes, got %zu", holder,
			 names_size, bytes);
}

static int get(const char *name, struct holder_request *request, const char *pad, char *names,
	       size_t names_size, int *fds, unsigned int max_fds)
{
	char all[KVSCRATCH_MAX_NAMES_BYTES];
	struct holder_reply reply;
	int sock = connect_holder(name);
	int err, count = 0;

	if (sock < 0)
		return sock;
	err = ask(sock, name, request, pad);
	if (!err)
		err = receive_reply(sock, name, &reply);
	if (!err && reply.count > max_fds)
		err = set_error(-EMSGSIZE, "%s: expected at most %u pads, got %u", name, max_fds,
				reply.count);
	if (!err && reply.count)
		count = kvscratch_receive_handles(sock, all, sizeof(all), fds, max_fds);
	close(sock);
	if (!err && count < 0)
		err = fail_handles(name, count);
	if (err)
		return err;
	count = check_names(name, all, fds, count);
	return count < 0 ? count : copy_names(name, names, names_size, all, fds, count);
}

/* Split "story/k0"; @pad becomes "" where no pad is named. */
static int split_name(const char *name, char *holder, const char **pad)
{
	size_t length = strcspn(name, "/");
	int err;

	*pad = name[length] ? name + length + 1 : "";
	err = name[length] ? check_name("the name of a pad", *pad) : 0;
	if (err)
		return err;
	/* too long is too long */
	if (length > KVSCRATCH_MAX_NAME)
		return check_name("the name of a holder", name);
	memcpy(holder, name, length);
	holder[length] = '\0';
	return check_name("the name of a holder", holder);
}

int kvscratch_attach_name(struct kvscratch **pad, const char *name, int access)
{
	struct holder_request request = { .verb = HOLDER_GET, .access = access };
	char holder[KVSCRATCH_MAX_NAME + 1];
	char names[KVSCRATCH_MAX_NAME + 1];
	const char *pad_name;
	int fd;
	int err = check_mode(access);

	if (!err)
		err = split_name(name, holder, &pad_name);
	if (err)
		return err;
	err = get(holder, &request, pad_name, names, sizeof(names), &fd, 1);
	if (err < 0)
		return err;
	if (!err)
		return set_error(-EPROTO, "%s: expected a handle from the holder, got none", name);
	err = kvscratch_from_fd(pad, fd);
	if (err)
		close(fd);
	return err;
}

int kvscratch_holder_get(const char *name, int access, char *names, size_t names_size, int *fds,
			 unsigned int max_fds)
{
	struct holder_request request = { .verb = HOLDER_GET_ALL, .access = access };
	int err = check_mode(access);

	return err ? err : get(name, &request, "", names, names_size, fds, max_fds);
}

static int check_put(const char *const *names, unsigned int count, uint32_t *handles_bytes)
{
	size_t bytes = 0;

	if (!count || count > KVSCRATCH_MAX_PASSED)
		return set_error(-EINVAL, "expected 1 to %d pads, got %u", KVSCRATCH_MAX_PASSED,
				 count);
	for (unsigned int i = 0; i < count; i++) {
		int err = check_name("the name of a pad", names[i]);

		if (err)
			return err;
		bytes += strlen(names[i]) + 1;
	}
	if (bytes > KVSCRATCH_MAX_NAMES_BYTES)
		return set_error(-EMSGSIZE, "expected names of at most %d bytes, got %zu",
				 KVSCRATCH_MAX_NAMES_BYTES, bytes);
	*handles_bytes = sizeof(uint32_t) + bytes;
	return 0;
}

static int put(const char *name, enum holder_verb verb, const char *const *names, const int *fds,
	       unsigned int count)
{
	struct holder_request request = { .verb = verb };
	struct holder_reply reply;
	int err = check_put(names, count, &request.handles_bytes);
	int sock;

	if (err)
		return err;
	sock = connect_holder(name);
	if (sock < 0)
		return sock;
	err = ask(sock, name, &request, "");
	if (!err) {
		err = kvscratch_send_handles(sock, names, fds, count);
		/* who refuses the request need not wait for the handles, and has said why */
		if (err == -EPIPE || err == -ECONNRESET)
			err = 0;
		if (err)
			err = fail_handles(name, err);
	}
	if (!err)
		err = receive_reply(sock, name, &reply);
	close(sock);
	return err;
}

int kvscratch_holder_put(const char *name, const char *const *names, const int *fds,
			 unsigned int count)
{
	return put(name, HOLDER_PUT, names, fds, count);
}

int kvscratch_holder_replace(const char *name, const char *const *names, const int *fds,
			     unsigned int count)
{
	return put(name, HOLDER_REPLACE, names, fds, count);
}

int kvscratch_holder_drop(const char *name)
{
	struct holder_request request = { .verb = HOLDER_DROP };
	char holder[KVSCRATCH_MAX_NAME + 1];
	struct holder_reply reply;
	const char *pad;
	int sock;
	int err = split_name(name, holder, &pad);

	if (err)
		return err;
	sock = connect_holder(holder);
	if (sock < 0)
		return sock;
	err = ask(sock, holder, &request, pad);
	if (!err)
		err = receive_reply(sock, holder, &reply);
	close(sock);
	return err;
}
