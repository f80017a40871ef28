/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * JSON, piece by piece, for who knows what has to come. The library does not export this.
 *
 * What fails returns -EBADMSG and leaves what was expected and what came in words.
 */
#ifndef JSON_H
#define JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How deep values may be nested that are passed over */
#define JSON_MAX_DEPTH 100

/**
 * struct json - text that is read
 * @start: where it begins
 * @at: what is still to be read
 * @end: where it ends
 * @words: what is wrong with it, if anything
 */
struct json {
	char *start;
	char *at;
	char *end;
	char words[160];
};

/* Fail: @what was expected here. */
int json_unexpected(struct json *json, const char *what);

void json_skip_blanks(struct json *json);

/* Take @token, or @word, if it comes next. */
bool json_take(struct json *json, char token);
bool json_take_word(struct json *json, const char *word);

/* Take what begins something, blanks before it aside; @what is what that would be. */
int json_begin(struct json *json, char token, const char *what);

/* Whether a list or an object goes on, having taken @taken elements: 1, 0, or an error */
int json_goes_on(struct json *json, size_t taken, char close);

/* Decode a string in place; it has no NUL. */
int json_string(struct json *json, const char **text, const char *what);

/* A whole number below 2^64 */
int json_number(struct json *json, uint64_t *number);

/* Pass over a value, @depth below the one that was asked for. */
int json_skip_value(struct json *json, unsigned int depth);

/* Bytes of the character of UTF-8 at @at, before @end; 0 if there is no valid one. */
size_t utf8_bytes(const char *at, const char *end);

#endif
