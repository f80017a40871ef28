// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "http.h"
#include "../interrupt.h"
#include "watch.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long a signal may have to wait, which comes before poll() */
#define LOOK_MS 100

/* @length characters of @from, if they are a text and fit */
static bool copy(char *to, size_t size, const char *from, size_t length)
{
	if (!length || length >= size)
		return false;
	memcpy(to, from, length);
	to[length] = '\0';
	return true;
}

/* Returns whether it is one; @host is in numbers. */
static bool add_address(struct http_server *server, const char *host, uint16_t port)
{
	union http_address *address = &server->addresses[server->nr_addresses++];

	address->four = (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port) };
	if (inet_pton(AF_INET, host, &address->four.sin_addr) == 1)
		return true;
	address->six = (struct sockaddr_in6){ .sin6_family = AF_INET6, .sin6_port = htons(port) };
	return inet_pton(AF_INET6, host, &address->six.sin6_addr) == 1;
}

static bool parse_authority(struct http_server *server)
{
	char host[sizeof(server->authority)];
	const char *colon = strrchr(server->authority, ':');
	const char *first = server->authority;
	unsigned long port;
	size_t length;
	char *end;

	if (!colon)
		return false;
	length = colon - first;
	if (*first == '[' && length && first[length - 1] == ']') {
		first++;
		length -= 2;
	}
	port = isdigit((unsigned char)colon[1]) ? strtoul(colon + 1, &end, 10) : 0;
	if (!port || port > UINT16_MAX || *end || !copy(host, sizeof(host), first, length))
		return false;
	if (strcmp(host, "localhost"))
		return add_address(server, host, port);
	return add_address(server, "127.0.0.1", port) && add_address(server, "::1", port);
}

int http_parse_server(struct http_server *server, const char *text)
{
	static const char scheme[] = "http://";
	const char *at = strncmp(text, scheme, strlen(scheme)) ? text : text + strlen(scheme);
	const size_t length = strcspn(at, "/");
	const char *prefix = at + length;
	size_t prefix_length = strlen(prefix);
	bool fits;

	*server = (struct http_server){ .text = text };
	while (prefix_length && prefix[prefix_length - 1] == '/')
		prefix_length--;
	fits = copy(server->authority, sizeof(server->authority), at, length) &&
	       parse_authority(server);
	if (prefix_length)
		fits &= copy(server->prefix, sizeof(server->prefix), prefix, prefix_length);
	for (const char *c = server->prefix; *c; c++)
		fits &= isgraph((unsigned char)*c) && !strchr("?#", *c);
	return fits ? 0 : fail(EXIT_INPUT, "expected ADDRESS:PORT or http://ADDRESS:PORT, got "
			       "\"%s\"", text);
}

/**
 * struct exchange - a question and its answer
 * @server: who is asked
 * @end: when it is too late
 * @sock: connected, or about to be
 */
struct exchange {
	const struct http_server *server;
	int64_t end;
	int sock;
};

static int fail_exchange(const struct exchange *exchange, const char *what, int err)
{
	if (interrupted())
		return EXIT_SYSTEM;
	return fail(EXIT_SYSTEM, "%s: %s: %s", exchange->server->text, what, strerror(-err));
}

/* Until the socket is ready for @events; returns 0 or a negative errno. */
static int await(const struct exchange *exchange, short events)
{
	struct pollfd polled = { .fd = exchange->sock, .events = events };

	for (;;) {
		const int64_t left = exchange->end - milliseconds_now();
		int ready;

		if (interrupted())
			return -EINTR;
		ready = poll(&polled, 1, left < 0 ? 0 : left < LOOK_MS ? left : LOOK_MS);
		if (ready > 0)
			return 0;
		if (ready < 0 && errno != EINTR)
			return -errno;
		if (!ready && left <= 0)
			return -ETIMEDOUT;
	}
}

/* Returns 0 or a negative errno. */
static int connect_to(struct exchange *exchange, const union http_address *address)
{
	const bool is_six = address->any.sa_family == AF_INET6;
	int result, err;
	socklen_t size = sizeof(result);

	exchange->sock = socket(address->any.sa_family,
				SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (exchange->sock < 0)
		return -errno;
	if (!connect(exchange->sock, &address->any,
		     is_six ? sizeof(address->six) : sizeof(address->four)))
		return 0;
	err = errno == EINPROGRESS ? await(exchange, POLLOUT) : -errno;
	if (!err)
		err = getsockopt(exchange->sock, SOL_SOCKET, SO_ERROR, &result, &size) ? -errno :
										 -result;
	if (err) {
		close(exchange->sock);
		exchange->sock = -1;
	}
	return err;
}

static int open_exchange(struct exchange *exchange)
{
	const struct http_server *server = exchange->server;
	int err = -ECONNREFUSED;

	for (unsigned int i = 0; i < server->nr_addresses && err == -ECONNREFUSED; i++)
		err = connect_to(exchange, &server->addresses[i]);
	return err ? fail_exchange(exchange, "cannot connect", err) : 0;
}

static int send_all(const struct exchange *exchange, const char *text)
{
	size_t left = strlen(text);

	while (left) {
		ssize_t sent = send(exchange->sock, text, left, MSG_NOSIGNAL);
		int err = sent < 0 ? -errno : 0;

		if (err == -EAGAIN || err == -EINTR)
			err = await(exchange, POLLOUT);
		if (err)
			return fail_exchange(exchange, "cannot send", err);
		if (sent > 0) {
			text += sent;
			left -= sent;
		}
	}
	return 0;
}

/* Whether all is there that the head says will come; else the server's end of it says so. */
static bool is_whole(const char *text, size_t got)
{
	const char *body = strstr(text, "\r\n\r\n");
	const char *length = strcasestr(text, "\r\nContent-Length:");

	if (!body || !length || length > body)
		return false;
	body += 4;
	length += strlen("\r\nContent-Length:");
	return got - (body - text) >= strtoull(length, NULL, 10);
}

static int receive_all(const struct exchange *exchange, struct http_answer *answer)
{
	size_t got = 0;

	while (!is_whole(answer->text, got)) {
		ssize_t more = recv(exchange->sock, answer->text + got, HTTP_MAX_ANSWER - got, 0);
		int err = more < 0 ? -errno : 0;

		if (err == -EAGAIN || err == -EINTR)
			err = await(exchange, POLLIN);
		if (err)
			return fail_exchange(exchange, "no answer", err);
		if (!more)
			break;
		if (more > 0)
			got += more;
		answer->text[got] = '\0';
	}
	answer->body = strstr(answer->text, "\r\n\r\n");
	if (sscanf(answer->text, "HTTP/1.%*1u %3u", &answer->status) != 1 || !answer->body)
		return fail(EXIT_SYSTEM, "%s: expected an answer of HTTP, got another",
			    exchange->server->text);
	answer->body += 4;
	answer->bytes = got - (answer->body - answer->text);
	return 0;
}

int http_post(const struct http_server *server, const char *path, const char *json,
	      uint64_t timeout_s, struct http_answer *answer)
{
	struct exchange exchange = {
		.server = server,
		.end = milliseconds_now() + (int64_t)timeout_s * 1000,
		.sock = -1,
	};
	char *question;
	int err;

	*answer = (struct http_answer){ 0 };
	if (asprintf(&question, "POST %s%s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n"
		     "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
		     server->prefix, path, server->authority, strlen(json), json) < 0)
		return fail(EXIT_SYSTEM, "out of memory");
	err = open_exchange(&exchange);
	if (!err)
		err = send_all(&exchange, question);
	if (!err)
		err = receive_all(&exchange, answer);
	if (exchange.sock >= 0)
		close(exchange.sock);
	free(question);
	return err;
}
