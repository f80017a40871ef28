/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * As much of HTTP as it takes to ask something of a server on this machine.
 */
#ifndef HTTP_H
#define HTTP_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

union http_address {
	struct sockaddr any;
	struct sockaddr_in four;
	struct sockaddr_in6 six;
};

/**
 * struct http_server - where it listens
 * @text: as it was given
 * @authority: host and port in it
 * @prefix: what its paths begin with, without a slash at the end
 * @addresses: to be tried in turn
 * @nr_addresses: 1, or 2 of localhost
 */
struct http_server {
	const char *text;
	char authority[64];
	char prefix[256];
	union http_address addresses[2];
	unsigned int nr_addresses;
};

#define HTTP_MAX_ANSWER 65536

/**
 * struct http_answer - what came of it
 * @status: 200, or what else
 * @text: all of it, ended by NUL
 * @body: the end of @text
 * @bytes: of the body
 */
struct http_answer {
	unsigned int status;
	char text[HTTP_MAX_ANSWER + 1];
	char *body;
	size_t bytes;
};

/* Both return 0, or an exit code after fail(). */

/*
 * "127.0.0.1:8080", "[::1]:8080" or "localhost:8080", with http:// before it, a path behind it, or
 * neither. No other name is looked up: the server is on this machine.
 */
int http_parse_server(struct http_server *server, const char *text);

/*
 * Ask for @path of it, with a body of JSON. All of it takes @timeout_s at most, and ends early
 * once interrupted().
 */
int http_post(const struct http_server *server, const char *path, const char *json,
	      uint64_t timeout_s, struct http_answer *answer);

#endif
