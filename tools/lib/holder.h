/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What a client and a holder of pads say to each other, over a Unix stream socket:
 * one request and one reply per connection, which the holder then closes. Numbers
 * are in the machine's byte order.
 *
 *   client: struct holder_request, and with HOLDER_PUT and HOLDER_REPLACE what
 *           kvscratch_send_handles() sends
 *   holder: struct holder_reply, and with HOLDER_GET and HOLDER_GET_ALL, unless count
 *           is 0, what kvscratch_send_handles() sends
 *
 * What is longer than it may be, or does not come in time, ends the connection
 * without a reply.
 *
 * In every version both begin with the magic and the version, and whoever hears another
 * version than its own looks at nothing else: a holder replies in its own, which a client
 * understands as little.
 */
#ifndef HOLDER_H
#define HOLDER_H

#include "libkvscratch.h"

#define HOLDER_MAGIC	0x4844564bU	/* "KVDH" */
#define HOLDER_VERSION	1

/* How long either side waits for the other: a request is sent at once */
#define HOLDER_TIMEOUT_SECONDS 10

enum holder_verb {
	HOLDER_GET = 1,		/* the pad of that name, or with "" the only one */
	HOLDER_GET_ALL,
	HOLDER_PUT,
	HOLDER_DROP,		/* the pad of that name, or with "" all and the holder */
	HOLDER_REPLACE,		/* as HOLDER_PUT, in the place of pads of the same names */
};

/**
 * struct holder_request - what a client asks for
 * @magic: HOLDER_MAGIC
 * @version: HOLDER_VERSION
 * @verb: one of enum holder_verb
 * @access: of the handles that are asked for: O_RDONLY, O_WRONLY or O_RDWR
 * @handles_bytes: with HOLDER_PUT and HOLDER_REPLACE: how long the message with the handles
 *	is, else 0
 * @pad: a name or "", ended by NUL
 */
struct holder_request {
	uint32_t magic;
	uint32_t version;
	uint32_t verb;
	uint32_t access;
	uint32_t handles_bytes;
	char pad[KVSCRATCH_MAX_NAME + 1];
};

/**
 * struct holder_reply - what came of it
 * @magic: HOLDER_MAGIC
 * @version: HOLDER_VERSION
 * @err: 0 or a negative errno
 * @count: how many handles follow
 * @words: what there is to say about @err, ended by NUL
 */
struct holder_reply {
	uint32_t magic;
	uint32_t version;
	int32_t err;
	uint32_t count;
	char words[160];
};

/* What is the same in every version */
#define HOLDER_HEAD_BYTES offsetof(struct holder_request, verb)
_Static_assert(offsetof(struct holder_reply, err) == HOLDER_HEAD_BYTES, "one head for both sides");

static inline bool holder_name_is_valid(const char *name)
{
	size_t length = 0;

	for (const char *at = name; *at; at++, length++) {
		bool letter = (*at >= 'A' && *at <= 'Z') || (*at >= 'a' && *at <= 'z');
		bool digit = *at >= '0' && *at <= '9';

		if (!letter && !digit && *at != '_' && *at != '-' && (*at != '.' || at == name))
			return false;
	}
	return length && length <= KVSCRATCH_MAX_NAME;
}

#endif
