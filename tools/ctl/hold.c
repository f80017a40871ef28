// SPDX-License-Identifier: GPL-2.0-only
/*
 * hold: keep pads, and hand out handles on them to processes of the same user.
 *
 * One thread serves all clients and waits for none of them: a request is looked at
 * once all of it has arrived, which edge-triggered epoll tells; a client that takes too
 * long, or the oldest one when there are too many, is dropped.
 *
 * A manager like systemd keeps a copy of each handle in its file-descriptor store, named
 * NUMBER.PAD in the order in which they came, and gives them back after a crash. We may be
 * killed between any two messages to it, which it takes one after the other. So what came
 * together is there before what it replaces goes, and while only a part may be there, so is
 * a descriptor named FIRST+COUNT: then so many of them do not count.
 */
#define _GNU_SOURCE
#include "../interrupt.h"
#include "ctl.h"
#include "holder.h"
#include "systemd.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* A client sends its request at once: more than this many at a time only wait. */
#define MAX_CLIENTS 64

/**
 * struct held - a pad that is kept
 * @name: its name
 * @number: grows with each pad that comes
 * @pad: a handle of our own
 */
struct held {
	char name[KVSCRATCH_MAX_NAME + 1];
	uint64_t number;
	struct kvscratch *pad;
};

/**
 * struct batch - pads that came together
 * @first: number of the first one
 * @count: how many
 * @marker: what the manager keeps while it may not have all of them, or -1
 */
struct batch {
	uint64_t first;
	uint64_t count;
	int marker;
};

struct client {
	int sock;
	int64_t deadline;
};

/**
 * struct holder - the process
 * @args: what was asked for
 * @path: the socket
 * @pads: what is kept, in the order in which it came: at most KVSCRATCH_MAX_PASSED, but for
 *	what a manager has that was to be replaced
 * @count: how many
 * @next_number: of the next pad that comes
 * @undone: what the manager may have a part of; its marker does not matter
 * @clients: whose requests have not arrived yet, the oldest first
 * @nr_clients: how many
 * @epoll: watches all of these:
 * @listener: the socket, or -1 after the end of it
 * @signals: those that end us
 */
struct holder {
	const struct arguments *args;
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	struct held pads[2 * KVSCRATCH_MAX_PASSED];
	unsigned int count;
	uint64_t next_number;
	struct batch undone;
	struct client clients[MAX_CLIENTS];
	unsigned int nr_clients;
	int epoll;
	int listener;
	int signals;
};

static int64_t milliseconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Pads */

/* The last one that came */
static struct held *find_held(struct holder *holder, const char *name)
{
	for (unsigned int i = holder->count; i--;)
		if (!strcmp(holder->pads[i].name, name))
			return &holder->pads[i];
	return NULL;
}

/* The name of a descriptor in the manager's store */
struct stored_name {
	char text[KVSCRATCH_MAX_NAME + 48];
};

static struct stored_name name_of_handle(const struct held *held)
{
	struct stored_name name;

	snprintf(name.text, sizeof(name.text), "%" PRIu64 ".%s", held->number, held->name);
	return name;
}

static struct stored_name name_of_marker(const struct batch *batch)
{
	struct stored_name name;

	snprintf(name.text, sizeof(name.text), "%" PRIu64 "+%" PRIu64, batch->first, batch->count);
	return name;
}

/* Without systemd these do nothing, and what goes wrong there costs no pad. */
static void store(const struct holder *holder, struct stored_name name, int fd)
{
	char state[sizeof(name) + 32];
	int err;

	if (!given(holder->args, OPT_FOREGROUND))
		return;
	snprintf(state, sizeof(state), "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", name.text);
	err = notify_manager(state, fd);
	if (err)
		fail(EXIT_SYSTEM, "%s: cannot pass the handle to the service manager: %s",
		     name.text, strerror(-err));
}

static void remove_stored(const struct holder *holder, struct stored_name name)
{
	char state[sizeof(name) + 32];

	if (!given(holder->args, OPT_FOREGROUND))
		return;
	snprintf(state, sizeof(state), "FDSTOREREMOVE=1\nFDNAME=%s", name.text);
	notify_manager(state, -1);
}

/* There has to be room. */
static void keep(struct holder *holder, const struct held *held)
{
	holder->pads[holder->count++] = *held;
	if (holder->next_number <= held->number)
		holder->next_number = held->number + 1;
}

static struct held new_held(const char *name, uint64_t number, struct kvscratch *pad)
{
	struct held held = { .number = number, .pad = pad };

	strcpy(held.name, name);
	return held;
}

/* Keep a pad under a number of its own and, where there is one, in the manager's store. */
static void keep_new(struct holder *holder, const char *name, struct kvscratch *pad)
{
	struct held held = new_held(name, holder->next_number, pad);

	store(holder, name_of_handle(&held), kvscratch_fd(pad));
	keep(holder, &held);
}

static void forget(struct holder *holder, struct held *held)
{
	size_t behind = &holder->pads[holder->count] - (held + 1);

	remove_stored(holder, name_of_handle(held));
	kvscratch_close(held->pad);
	memmove(held, held + 1, behind * sizeof(*held));
	holder->count--;
}

/* Requests */

static int refuse(struct holder_reply *reply, int err, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static int refuse(struct holder_reply *reply, int err, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(reply->words, sizeof(reply->words), format, arguments);
	va_end(arguments);
	reply->err = err;
	return err;
}

static void send_reply(int sock, const struct holder_reply *reply)
{
	/* a client that does not take it is gone */
	send(sock, reply, sizeof(*reply), MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* What a client sent may be anything: a socket would wait in close() for its peer. */
static void close_fds(const int *fds, unsigned int count)
{
	const struct linger none = { 0 };

	while (count--) {
		setsockopt(fds[count], SOL_SOCKET, SO_LINGER, &none, sizeof(none));
		close(fds[count]);
	}
}

/* A handle of its own, for the file position comes with the open file */
static int open_handle(const struct held *held, int access, struct holder_reply *reply)
{
	struct kvscratch *pad;
	int fd, err;

	if (access != O_RDONLY && kvscratch_access(held->pad) != O_RDWR)
		return refuse(reply, -EACCES, "%s: the handle that is held is for reading only",
			      held->name);
	err = kvscratch_attach(&pad, kvscratch_fd(held->pad), access);
	if (err)
		return refuse(reply, err, "%s: %s", held->name, kvscratch_error());
	fd = fcntl(kvscratch_fd(pad), F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		fd = refuse(reply, -errno, "%s: %s", held->name, strerror(errno));
	kvscratch_close(pad);
	return fd;
}

static int check_get(const struct holder *holder, const struct holder_request *request,
		     struct holder_reply *reply)
{
	if (request->access != O_RDONLY && request->access != O_WRONLY && request->access != O_RDWR)
		return refuse(reply, -EINVAL, "expected an access mode, got number %" PRIu32,
			      request->access);
	if (request->access != O_RDONLY && !given(holder->args, OPT_WRITE))
		return refuse(reply, -EACCES, "handles are for reading only: the holder was "
			      "started without --write");
	return 0;
}

static struct held *find_requested(struct holder *holder, const char *name,
				   struct holder_reply *reply)
{
	struct held *held = *name ? find_held(holder, name) : holder->pads;

	if (!*name && holder->count != 1) {
		refuse(reply, -EINVAL, "expected a holder of one pad, or NAME/PAD, got one of %u pads",
		       holder->count);
		return NULL;
	}
	if (!held)
		refuse(reply, -ENOKEY, "there is no pad \"%s\"", name);
	return held;
}

static void send_handles(int sock, const struct held *pads, unsigned int count, int access,
			 struct holder_reply *reply)
{
	const char *names[KVSCRATCH_MAX_PASSED];
	int fds[KVSCRATCH_MAX_PASSED];

	for (unsigned int i = 0; i < count; i++) {
		names[i] = pads[i].name;
		fds[i] = open_handle(&pads[i], access, reply);
		if (fds[i] < 0) {
			close_fds(fds, i);
			send_reply(sock, reply);
			return;
		}
	}
	reply->count = count;
	send_reply(sock, reply);
	if (count)
		kvscratch_send_handles(sock, names, fds, count);
	close_fds(fds, count);
}

static void serve_get(struct holder *holder, int sock, const struct holder_request *request,
		      struct holder_reply *reply)
{
	const struct held *pads = holder->pads;
	unsigned int count = holder->count;
	int err = check_get(holder, request, reply);

	if (!err && request->verb == HOLDER_GET) {
		count = 1;
		pads = find_requested(holder, request->pad, reply);
		err = reply->err;
	}
	if (err)
		send_reply(sock, reply);
	else
		send_handles(sock, pads, count, request->access, reply);
}

static size_t bytes_of_names(const struct holder *holder)
{
	size_t bytes = 0;

	for (unsigned int i = 0; i < holder->count; i++)
		bytes += strlen(holder->pads[i].name) + 1;
	return bytes;
}

/* The names of @count new pads, one behind the other, each ended by NUL */
static int check_names(struct holder *holder, const char *names, unsigned int count,
		       bool replaces, struct holder_reply *reply)
{
	size_t bytes = bytes_of_names(holder);
	unsigned int pads = holder->count;
	const char *name = names;

	for (unsigned int i = 0; i < count; i++, name += strlen(name) + 1) {
		const char *other = names;
		bool is_new;

		if (!holder_name_is_valid(name))
			return refuse(reply, -EINVAL, "expected a name of A-Z a-z 0-9 . _ -, got "
				      "\"%.70s\"", name);
		is_new = !find_held(holder, name);
		if (!is_new && !replaces)
			return refuse(reply, -EEXIST, "a pad \"%s\" is held already", name);
		for (; other < name; other += strlen(other) + 1)
			if (!strcmp(other, name))
				return refuse(reply, -EEXIST, "\"%s\" was given twice", name);
		pads += is_new;
		bytes += is_new ? strlen(name) + 1 : 0;
	}
	if (pads > KVSCRATCH_MAX_PASSED || bytes > KVSCRATCH_MAX_NAMES_BYTES)
		return refuse(reply, -EMSGSIZE, "expected at most %d pads with %d bytes of names, "
			      "got %u with %zu", KVSCRATCH_MAX_PASSED, KVSCRATCH_MAX_NAMES_BYTES,
			      pads, bytes);
	return 0;
}

static void close_pads(struct kvscratch **pads, unsigned int count)
{
	while (count--)
		kvscratch_close(pads[count]);
}

/* Handles of our own on the pads of @fds, which may be anything; all of them or none */
static int attach_all(struct kvscratch **pads, const int *fds, unsigned int count,
		      struct holder_reply *reply)
{
	for (unsigned int i = 0; i < count; i++) {
		int access = fcntl(fds[i], F_GETFL) & O_ACCMODE;
		int err = kvscratch_attach(&pads[i], fds[i],
					   access == O_WRONLY ? O_RDONLY : access);

		if (!err)
			continue;
		close_pads(pads, i);
		return refuse(reply, err, "%s", kvscratch_error());
	}
	return 0;
}

/* One pad alone is in the manager's store or not. */
static int open_batch(const struct holder *holder, struct batch *batch, unsigned int count,
		      struct holder_reply *reply)
{
	*batch = (struct batch){
		.first = holder->next_number,
		.count = count,
		.marker = -1,
	};
	if (count == 1)
		return 0;
	batch->marker = eventfd(0, EFD_CLOEXEC);
	if (batch->marker < 0)
		return refuse(reply, -errno, "cannot mark the pads: %s", strerror(errno));
	return 0;
}

/* From here on nothing fails that would cost a pad. */
static void store_batch(const struct holder *holder, const struct batch *batch,
			const struct held *pads)
{
	if (batch->marker >= 0)
		store(holder, name_of_marker(batch), batch->marker);
	for (unsigned int i = 0; i < batch->count; i++)
		store(holder, name_of_handle(&pads[i]), kvscratch_fd(pads[i].pad));
	if (batch->marker < 0)
		return;
	/* now they all count, at once */
	remove_stored(holder, name_of_marker(batch));
	close(batch->marker);
}

/* Keep pads in the place of those that have their names. */
static void keep_batch(struct holder *holder, const struct held *pads, unsigned int count)
{
	for (unsigned int i = 0; i < count; i++) {
		struct held *old = find_held(holder, pads[i].name);

		if (old)
			forget(holder, old);
		keep(holder, &pads[i]);
	}
}

static void put(struct holder *holder, const char *names, const int *fds, unsigned int count,
		bool replaces, struct holder_reply *reply)
{
	struct kvscratch *pads[KVSCRATCH_MAX_PASSED];
	struct held batch_pads[KVSCRATCH_MAX_PASSED];
	struct batch batch;

	if (!given(holder->args, OPT_WRITE)) {
		refuse(reply, -EACCES, "the holder was started without --write");
		return;
	}
	if (check_names(holder, names, count, replaces, reply) ||
	    attach_all(pads, fds, count, reply))
		return;
	if (open_batch(holder, &batch, count, reply)) {
		close_pads(pads, count);
		return;
	}
	for (unsigned int i = 0; i < count; i++, names += strlen(names) + 1)
		batch_pads[i] = new_held(names, batch.first + i, pads[i]);
	store_batch(holder, &batch, batch_pads);
	keep_batch(holder, batch_pads, count);
}

/* All of it has arrived: nothing here waits. */
static void serve_put(struct holder *holder, int sock, bool replaces, struct holder_reply *reply)
{
	char names[KVSCRATCH_MAX_NAMES_BYTES];
	int fds[KVSCRATCH_MAX_PASSED];
	int count = kvscratch_receive_handles(sock, names, sizeof(names), fds,
					      KVSCRATCH_MAX_PASSED);

	if (count < 0) {
		refuse(reply, count == -EMFILE ? count : -EPROTO, "%s", kvscratch_error());
	} else {
		put(holder, names, fds, count, replaces, reply);
		close_fds(fds, count);
	}
	send_reply(sock, reply);
}

static void end_listening(struct holder *holder)
{
	unlink(holder->path);
	close(holder->listener);
	holder->listener = -1;
}

/* The name is free before the client hears of it. */
static void serve_drop(struct holder *holder, int sock, const char *name,
		       struct holder_reply *reply)
{
	struct held *held = *name ? find_requested(holder, name, reply) : NULL;

	if (held)
		forget(holder, held);
	if (!*name) {
		while (holder->count)
			forget(holder, holder->pads);
		end_listening(holder);
	}
	send_reply(sock, reply);
}

static bool is_same_user(int sock)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	return !getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &peer, &size) && peer.uid == geteuid();
}

static void serve(struct holder *holder, int sock, struct holder_request *request)
{
	struct holder_reply reply = { .magic = HOLDER_MAGIC, .version = HOLDER_VERSION };

	request->pad[sizeof(request->pad) - 1] = '\0';
	if (!is_same_user(sock))
		refuse(&reply, -EACCES, "expected a client of user %u", geteuid());
	else if (request->version != HOLDER_VERSION)
		refuse(&reply, -EPROTO, "expected a client of version %d, got one of %" PRIu32,
		       HOLDER_VERSION, request->version);
	if (reply.err) {
		send_reply(sock, &reply);
		return;
	}
	switch (request->verb) {
	case HOLDER_GET:
	case HOLDER_GET_ALL:
		serve_get(holder, sock, request, &reply);
		return;
	case HOLDER_PUT:
	case HOLDER_REPLACE:
		serve_put(holder, sock, request->verb == HOLDER_REPLACE, &reply);
		return;
	case HOLDER_DROP:
		serve_drop(holder, sock, request->pad, &reply);
		return;
	default:
		refuse(&reply, -EPROTO, "expected a known request, got number %" PRIu32,
		       request->verb);
		send_reply(sock, &reply);
	}
}

/* Clients */

enum arrival { WAIT_FOR_MORE, COMPLETE, GARBAGE };

/* Take the request off the socket once all that belongs to it is there. */
static enum arrival take_request(int sock, struct holder_request *request)
{
	size_t expected = sizeof(*request);
	int there;

	if (ioctl(sock, FIONREAD, &there))
		return GARBAGE;
	if ((size_t)there < HOLDER_HEAD_BYTES)
		return WAIT_FOR_MORE;
	if (recv(sock, request, sizeof(*request), MSG_PEEK) < (ssize_t)HOLDER_HEAD_BYTES ||
	    request->magic != HOLDER_MAGIC)
		return GARBAGE;
	/* how much is to come is for who understands it */
	if (request->version != HOLDER_VERSION)
		return COMPLETE;
	if ((size_t)there < expected)
		return WAIT_FOR_MORE;
	if (request->verb == HOLDER_PUT || request->verb == HOLDER_REPLACE) {
		if (request->handles_bytes > sizeof(uint32_t) + KVSCRATCH_MAX_NAMES_BYTES)
			return GARBAGE;
		expected += request->handles_bytes;
	}
	if ((size_t)there < expected)
		return WAIT_FOR_MORE;
	return recv(sock, request, sizeof(*request), 0) == sizeof(*request) ? COMPLETE : GARBAGE;
}

static void drop_client(struct holder *holder, unsigned int i)
{
	close(holder->clients[i].sock);
	holder->nr_clients--;
	memmove(&holder->clients[i], &holder->clients[i + 1],
		(holder->nr_clients - i) * sizeof(holder->clients[0]));
}

static void drop_late_clients(struct holder *holder)
{
	int64_t now = milliseconds_now();

	while (holder->nr_clients && holder->clients[0].deadline <= now)
		drop_client(holder, 0);
}

/* How long to sleep at most */
static int sleep_ms(const struct holder *holder)
{
	int64_t left;

	if (!holder->nr_clients)
		return -1;
	left = holder->clients[0].deadline - milliseconds_now();
	return left > 0 ? (int)left : 0;
}

static void add_client(struct holder *holder, int sock)
{
	struct epoll_event event = {
		.events = EPOLLIN | EPOLLRDHUP | EPOLLET,
		.data.fd = sock,
	};

	if (holder->nr_clients == MAX_CLIENTS)
		drop_client(holder, 0);
	if (epoll_ctl(holder->epoll, EPOLL_CTL_ADD, sock, &event)) {
		close(sock);
		return;
	}
	holder->clients[holder->nr_clients++] = (struct client){
		.sock = sock,
		.deadline = milliseconds_now() + HOLDER_TIMEOUT_SECONDS * 1000,
	};
}

/* How long to wait when there is nothing that could be given up for a new client */
#define OUT_OF_FILES_MS 100

static void accept_client(struct holder *holder)
{
	int sock = accept4(holder->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (sock >= 0)
		add_client(holder, sock);
	else if (errno != EMFILE && errno != ENFILE && errno != ENOMEM)
		return;
	else if (holder->nr_clients)
		drop_client(holder, 0);
	else
		poll(NULL, 0, OUT_OF_FILES_MS);
}

/* Which may be gone already, dropped for the sake of another. */
static void hear_client(struct holder *holder, int sock, uint32_t events)
{
	struct holder_request request;
	enum arrival arrival;
	unsigned int i = 0;

	while (i < holder->nr_clients && holder->clients[i].sock != sock)
		i++;
	if (i == holder->nr_clients)
		return;
	arrival = take_request(sock, &request);
	if (arrival == COMPLETE)
		serve(holder, sock, &request);
	if (arrival != WAIT_FOR_MORE || events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		drop_client(holder, i);
}

/* Returns the signal that ends us, or 0 after a drop. */
static int serve_clients(struct holder *holder)
{
	struct epoll_event events[16];
	struct signalfd_siginfo caught;

	while (holder->listener >= 0) {
		int count = epoll_wait(holder->epoll, events, ARRAY_SIZE(events), sleep_ms(holder));

		for (int i = 0; i < count && holder->listener >= 0; i++) {
			int fd = events[i].data.fd;

			if (fd == holder->listener)
				accept_client(holder);
			else if (fd != holder->signals)
				hear_client(holder, fd, events[i].events);
			else if (read(fd, &caught, sizeof(caught)) == sizeof(caught))
				return caught.ssi_signo;
		}
		drop_late_clients(holder);
	}
	return 0;
}

/* The socket */

/* Open the directory of all sockets, made if need be; it has to be ours alone. */
static int open_directory(void)
{
	char path[4096];
	struct stat status;
	int fd;

	if (kvscratch_holder_path(NULL, path, sizeof(path))) {
		fail(EXIT_SYSTEM, "%s", kvscratch_error());
		return -1;
	}
	if (mkdir(path, 0700) && errno != EEXIST) {
		fail(EXIT_SYSTEM, "%s: cannot make it: %s", path, strerror(errno));
		return -1;
	}
	fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &status)) {
		fail(EXIT_SYSTEM, "%s: cannot open: %s", path, strerror(errno));
	} else if (status.st_uid != geteuid() || status.st_mode & 077) {
		fail(EXIT_SYSTEM, "%s: expected a directory of user %u with mode 700, got one of "
		     "user %u with mode %03o", path, geteuid(), status.st_uid,
		     status.st_mode & 0777);
		close(fd);
		fd = -1;
	}
	return fd;
}

/*
 * Under a lock: between our look at a dead socket and its removal nobody may put a living
 * one in its place, nor see ours before it listens.
 */
static int listen_alone(struct holder *holder)
{
	int directory = open_directory();

	if (directory < 0)
		return EXIT_SYSTEM;
	if (flock(directory, LOCK_EX)) {
		fail(EXIT_SYSTEM, "%s: cannot lock its directory: %s", holder->path,
		     strerror(errno));
		close(directory);
		return EXIT_SYSTEM;
	}
	holder->listener = kvscratch_listen(holder->path);
	close(directory);
	if (holder->listener >= 0)
		return 0;
	if (holder->listener == -EADDRINUSE)
		return fail(EXIT_SYSTEM, "\"%s\" is held already: somebody listens on %s",
			    holder->args->argument, holder->path);
	return fail(EXIT_SYSTEM, "%s", kvscratch_error());
}

static int open_signals(void)
{
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGTERM);
	sigaddset(&mask, SIGINT);
	sigaddset(&mask, SIGHUP);
	sigprocmask(SIG_BLOCK, &mask, NULL);
	return signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
}

static int watch(struct holder *holder, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	return epoll_ctl(holder->epoll, EPOLL_CTL_ADD, fd, &event);
}

static int open_holder(struct holder *holder)
{
	int err;

	/* signals end us as long as we may wait for the directory */
	err = listen_alone(holder);
	if (err)
		return err;
	holder->epoll = epoll_create1(EPOLL_CLOEXEC);
	holder->signals = open_signals();
	fcntl(holder->listener, F_SETFL, O_NONBLOCK);
	if (holder->epoll >= 0 && holder->signals >= 0 && !watch(holder, holder->signals) &&
	    !watch(holder, holder->listener))
		return 0;
	err = fail(EXIT_SYSTEM, "cannot watch clients and signals: %s", strerror(errno));
	end_listening(holder);
	return err;
}

/* What is held from the beginning */

static bool take_number(const char **text, uint64_t *number)
{
	char *end;

	/* strtoull() takes more than digits */
	if (**text < '0' || **text > '9')
		return false;
	*number = strtoull(*text, &end, 10);
	*text = end;
	return *number < UINT64_MAX;
}

/* "3+2": the pads of these numbers count only if the manager does not have this. */
static bool is_marker(const char *text, struct batch *batch)
{
	return take_number(&text, &batch->first) && *text++ == '+' &&
	       take_number(&text, &batch->count) && !*text;
}

/* "0.k0" was the first pad. */
static bool is_handle(const struct holder *holder, const char *text, struct held *held)
{
	if (!take_number(&text, &held->number) || *text++ != '.' || !holder_name_is_valid(text))
		return false;
	for (unsigned int i = 0; i < holder->count; i++)
		if (holder->pads[i].number == held->number)
			return false;
	strcpy(held->name, text);
	return holder->count < ARRAY_SIZE(holder->pads);
}

static void insert_by_number(struct holder *holder, const struct held *held)
{
	unsigned int at;

	keep(holder, held);
	for (at = holder->count - 1; at && holder->pads[at - 1].number > held->number; at--)
		holder->pads[at] = holder->pads[at - 1];
	holder->pads[at] = *held;
}

/* What the service manager kept, in any order */
static void take_back(void *context, int fd, const char *stored_name)
{
	struct holder *holder = context;
	struct held held = { 0 };
	struct batch undone;

	if (is_handle(holder, stored_name, &held)) {
		if (!kvscratch_from_fd(&held.pad, fd)) {
			insert_by_number(holder, &held);
			return;
		}
		fail(EXIT_SYSTEM, "%s: %s", stored_name, kvscratch_error());
	} else if (is_marker(stored_name, &undone)) {
		holder->undone = undone;
	} else {
		fail(EXIT_SYSTEM, "expected NUMBER.PAD from the service manager, and each number "
		     "once, got \"%s\"", stored_name);
	}
	close(fd);
}

/* What a kill in the midst of a put has left: all of its pads go, or all that it replaced. */
static void settle(struct holder *holder)
{
	const struct batch *undone = &holder->undone;

	for (unsigned int i = holder->count; i--;)
		if (holder->pads[i].number - undone->first < undone->count)
			forget(holder, &holder->pads[i]);
	for (unsigned int i = 0; i < holder->count;)
		if (find_held(holder, holder->pads[i].name) != &holder->pads[i])
			forget(holder, &holder->pads[i]);
		else
			i++;
	while (holder->count > KVSCRATCH_MAX_PASSED)
		forget(holder, &holder->pads[holder->count - 1]);
	if (undone->count)
		remove_stored(holder, name_of_marker(undone));
}

static int keep_new_pad(struct holder *holder)
{
	struct kvscratch *pad;
	int err = make_pad(holder->args, &pad);

	if (!err)
		keep_new(holder, ONLY_PAD, pad);
	return err;
}

static int keep_descriptor(struct holder *holder)
{
	int flags = fcntl(holder->args->fd, F_GETFL);
	int access = flags >= 0 && (flags & O_ACCMODE) == O_RDWR ? O_RDWR : O_RDONLY;
	struct kvscratch *pad;

	if (kvscratch_attach(&pad, holder->args->fd, access))
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	close(holder->args->fd);
	keep_new(holder, holder->args->pad ? holder->args->pad : ONLY_PAD, pad);
	return 0;
}

/* Any part of what a new pad is made of */
static bool makes_pad(const struct arguments *args)
{
	static const enum option_id parts[] = {
		OPT_MAX_SEQ_LEN, OPT_DIM, OPT_DTYPE, OPT_INPUT, OPT_FRAC_BITS, OPT_PLANES,
		OPT_PLANES_FILE, OPT_TAG,
	};

	for (size_t i = 0; i < ARRAY_SIZE(parts); i++)
		if (given(args, parts[i]))
			return true;
	return false;
}

static int take_pads(struct holder *holder)
{
	if (given(holder->args, OPT_FOREGROUND))
		take_listen_fds(take_back, holder);
	settle(holder);
	/* what came back is what had been made */
	if (holder->count)
		return 0;
	if (given(holder->args, OPT_FD))
		return keep_descriptor(holder);
	if (makes_pad(holder->args))
		return keep_new_pad(holder);
	return 0;
}

static int check_hold(const struct arguments *args, char *path, size_t path_size)
{
	bool makes = makes_pad(args);

	if (!args->argument)
		return fail(EXIT_INPUT, "expected NAME");
	if (makes && given(args, OPT_FD))
		return fail(EXIT_INPUT, "expected either --fd or what a new pad is made of, got both");
	if (!makes && !given(args, OPT_FD) && !given(args, OPT_WRITE))
		return fail(EXIT_INPUT, "expected --write, for pads to be put, or --max-seq-len "
			    "and --dim or --fd");
	switch (kvscratch_holder_path(args->argument, path, path_size)) {
	case 0:
		return 0;
	case -EINVAL:
		return fail(EXIT_INPUT, "%s", kvscratch_error());
	default:
		return fail(EXIT_SYSTEM, "%s", kvscratch_error());
	}
}

/* Each pad is a descriptor, and while a client is served all of them are two, or three. */
static void raise_file_limit(void)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
}

/* @ready tells who waits for it that clients are served. */
static int hold(struct holder *holder, void (*ready)(void *context), void *context)
{
	int signal_number;
	int err;

	umask(077);
	raise_file_limit();
	err = take_pads(holder);
	if (!err)
		err = open_holder(holder);
	if (err)
		return err;
	ready(context);
	signal_number = serve_clients(holder);
	if (!signal_number)
		return 0;
	end_listening(holder);
	return end_by(signal_number);
}

static void tell_manager(void *context)
{
	int err = notify_manager("READY=1", -1);

	(void)context;
	if (err)
		fail(EXIT_SYSTEM, "cannot tell the service manager: %s", strerror(-err));
}

/* The last word to who started us, and nothing of its terminal is kept. */
static void tell_parent(void *context)
{
	const int *pipe_end = context;
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	for (int fd = STDIN_FILENO; null >= 0 && fd <= STDERR_FILENO; fd++)
		dup2(null, fd);
	close(null);
	if (write(*pipe_end, "", 1) != 1)
		/* who waited was killed: there is nobody to tell */
		return;
	close(*pipe_end);
}

static int await_child(pid_t child, int pipe_end)
{
	char byte;
	int status;

	if (read(pipe_end, &byte, 1) == 1)
		return 0;
	if (waitpid(child, &status, 0) == child && WIFEXITED(status))
		return WEXITSTATUS(status);
	return fail(EXIT_SYSTEM, "the holder was killed before it was ready");
}

/* Somebody may wait for the end of a pipe that we know nothing of. */
static void close_inherited(const struct arguments *args)
{
	unsigned int first = STDERR_FILENO + 1;

	if (given(args, OPT_FD) && args->fd >= (int)first) {
		if (args->fd > (int)first)
			close_range(first, args->fd - 1, 0);
		first = args->fd + 1u;
	}
	close_range(first, ~0u, 0);
}

static int hold_in_background(struct holder *holder)
{
	int ends[2];
	pid_t child;

	close_inherited(holder->args);
	if (pipe2(ends, O_CLOEXEC))
		return fail(EXIT_SYSTEM, "cannot make a pipe: %s", strerror(errno));
	child = fork();
	if (child < 0)
		return fail(EXIT_SYSTEM, "cannot start a process: %s", strerror(errno));
	if (child) {
		close(ends[1]);
		return await_child(child, ends[0]);
	}
	close(ends[0]);
	setsid();
	if (chdir("/"))
		return fail(EXIT_SYSTEM, "/: %s", strerror(errno));
	return hold(holder, tell_parent, &ends[1]);
}

int run_hold(const struct arguments *args)
{
	static struct holder holder;
	int err = check_hold(args, holder.path, sizeof(holder.path));

	if (err)
		return err;
	holder.args = args;
	/* whoever reads what we say may be gone */
	signal(SIGPIPE, SIG_IGN);
	if (given(args, OPT_FOREGROUND))
		return hold(&holder, tell_manager, NULL);
	return hold_in_background(&holder);
}
