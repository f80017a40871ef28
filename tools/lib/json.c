// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#include "json.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* UTF-8 */

size_t utf8_bytes(const char *at, const char *end)
{
	/* the least that may follow a first byte, so that nothing is longer than it has to be */
	static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
	unsigned char first = *at;
	size_t bytes = first < 0x80 ? 1 : first >> 5 == 6 ? 2 : first >> 4 == 14 ? 3 :
		       first >> 3 == 30 ? 4 : 0;
	uint32_t code;

	if (bytes < 2 || (size_t)(end - at) < bytes)
		return bytes == 1;
	code = first & (0x7f >> bytes);
	for (size_t i = 1; i < bytes; i++) {
		if ((at[i] & 0xc0) != 0x80)
			return 0;
		code = code << 6 | (at[i] & 0x3f);
	}
	/* no halves of UTF-16 pairs, and nothing beyond the last character */
	if (code < least[bytes] || code >> 11 == 0x1b || code > 0x10ffff)
		return 0;
	return bytes;
}

static char *put_character(char *to, uint32_t code)
{
	if (code < 0x80) {
		*to++ = code;
		return to;
	}
	if (code < 0x800) {
		*to++ = 0xc0 | code >> 6;
	} else {
		if (code < 0x10000) {
			*to++ = 0xe0 | code >> 12;
		} else {
			*to++ = 0xf0 | code >> 18;
			*to++ = 0x80 | (code >> 12 & 0x3f);
		}
		*to++ = 0x80 | (code >> 6 & 0x3f);
	}
	*to++ = 0x80 | (code & 0x3f);
	return to;
}

/* JSON */

static int malformed(struct json *json, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static int malformed(struct json *json, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(json->words, sizeof(json->words), format, arguments);
	va_end(arguments);
	return -EBADMSG;
}

int json_unexpected(struct json *json, const char *what)
{
	size_t place = json->at - json->start;

	if (json->at == json->end)
		return malformed(json, "expected %s at byte %zu, got its end", what, place);
	if (*json->at > ' ' && *json->at <= '~')
		return malformed(json, "expected %s at byte %zu, got '%c'",
				 what, place, *json->at);
	return malformed(json, "expected %s at byte %zu, got byte 0x%02x",
			 what, place, (unsigned char)*json->at);
}

void json_skip_blanks(struct json *json)
{
	while (json->at < json->end && *json->at && strchr(" \t\r\n", *json->at))
		json->at++;
}

bool json_take(struct json *json, char token)
{
	if (json->at == json->end || *json->at != token)
		return false;
	json->at++;
	return true;
}

int json_begin(struct json *json, char token, const char *what)
{
	json_skip_blanks(json);
	return json_take(json, token) ? 0 : json_unexpected(json, what);
}

int json_goes_on(struct json *json, size_t taken, char close)
{
	json_skip_blanks(json);
	if (json_take(json, close))
		return 0;
	if (taken && !json_take(json, ','))
		return json_unexpected(json, close == '}' ? "',' or '}'" : "',' or ']'");
	return 1;
}

/* Four digits */
static int parse_unit(struct json *json, uint32_t *unit)
{
	*unit = 0;
	for (int i = 0; i < 4; i++, json->at++) {
		static const char digits[] = "0123456789abcdef0123456789ABCDEF";
		const char *digit = json->at < json->end && *json->at ?
				    strchr(digits, *json->at) : NULL;

		if (!digit)
			return json_unexpected(json, "a hexadecimal digit");
		*unit = *unit << 4 | (uint32_t)((digit - digits) & 15);
	}
	return 0;
}

/* What follows \u: a character, or half of one and then the other half */
static int parse_code(struct json *json, uint32_t *code)
{
	uint32_t low;
	int err = parse_unit(json, code);

	if (err)
		return err;
	if (!*code)
		return malformed(json, "expected no \\u0000 in a string, "
				 "got one before byte %td", json->at - json->start);
	if (*code >> 11 != 0x1b)
		return 0;
	if (*code >> 10 == 0x36 && json_take(json, '\\') && json_take(json, 'u')) {
		err = parse_unit(json, &low);
		if (err)
			return err;
		if (low >> 10 == 0x37) {
			*code = 0x10000 + ((*code & 0x3ff) << 10 | (low & 0x3ff));
			return 0;
		}
	}
	return malformed(json, "expected both halves of a UTF-16 pair, "
			 "got one of them before byte %td", json->at - json->start);
}

/* What follows a backslash */
static int parse_escape(struct json *json, char **to)
{
	static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
	const char *escape;
	uint32_t code;
	int err;

	if (json_take(json, 'u')) {
		err = parse_code(json, &code);
		if (!err)
			*to = put_character(*to, code);
		return err;
	}
	escape = json->at < json->end && *json->at ? strchr(escapes, *json->at) : NULL;
	if (!escape)
		return json_unexpected(json, "an escape of JSON");
	*(*to)++ = meanings[escape - escapes];
	json->at++;
	return 0;
}

/* It never becomes longer, and its NUL takes the place of the quote. */
int json_string(struct json *json, const char **text, const char *what)
{
	char *to;
	int err = json_begin(json, '"', what);

	if (err)
		return err;
	to = json->at;
	*text = to;
	while (!json_take(json, '"')) {
		size_t bytes = 0;

		if (json_take(json, '\\')) {
			err = parse_escape(json, &to);
			if (err)
				return err;
			continue;
		}
		if (json->at < json->end && (unsigned char)*json->at >= ' ')
			bytes = utf8_bytes(json->at, json->end);
		if (!bytes)
			return json_unexpected(json, "a character of UTF-8 or the end of a string");
		memmove(to, json->at, bytes);
		to += bytes;
		json->at += bytes;
	}
	*to = '\0';
	return 0;
}

int json_number(struct json *json, uint64_t *number)
{
	const char *start;

	json_skip_blanks(json);
	start = json->at;
	*number = 0;
	while (json->at < json->end && *json->at >= '0' && *json->at <= '9') {
		unsigned int digit = *json->at - '0';

		if (json->at > start && *start == '0')
			return json_unexpected(json, "no digit behind a leading 0");
		if (*number > (UINT64_MAX - digit) / 10)
			return json_unexpected(json, "a number below 2^64");
		*number = *number * 10 + digit;
		json->at++;
	}
	return json->at > start ? 0 : json_unexpected(json, "a whole number");
}

bool json_take_word(struct json *json, const char *word)
{
	size_t length = strlen(word);

	if ((size_t)(json->end - json->at) < length || memcmp(json->at, word, length))
		return false;
	json->at += length;
	return true;
}

static bool take_digits(struct json *json)
{
	const char *start = json->at;

	while (json->at < json->end && *json->at >= '0' && *json->at <= '9')
		json->at++;
	return json->at > start;
}

/* Any number of JSON */
static bool take_any_number(struct json *json)
{
	json_take(json, '-');
	if (!json_take(json, '0') && !take_digits(json))
		return false;
	if (json_take(json, '.') && !take_digits(json))
		return false;
	if (!json_take(json, 'e') && !json_take(json, 'E'))
		return true;
	if (!json_take(json, '+'))
		json_take(json, '-');
	return take_digits(json);
}

/* Any value that is not made of others */
static int skip_scalar(struct json *json)
{
	static const char what[] = "a value of JSON";
	const char *unused;

	if (json->at < json->end && *json->at == '"')
		return json_string(json, &unused, what);
	if (json_take_word(json, "true") || json_take_word(json, "false") || json_take_word(json, "null") ||
	    take_any_number(json))
		return 0;
	return json_unexpected(json, what);
}

int json_skip_value(struct json *json, unsigned int depth)
{
	const char *unused;
	size_t count = 0;
	char close;
	int more, err;

	json_skip_blanks(json);
	if (json_take(json, '['))
		close = ']';
	else if (json_take(json, '{'))
		close = '}';
	else
		return skip_scalar(json);
	if (depth == JSON_MAX_DEPTH)
		return malformed(json, "expected at most %d values in one "
				 "another, got more at byte %td", JSON_MAX_DEPTH,
				 json->at - json->start);
	while ((more = json_goes_on(json, count++, close)) > 0) {
		err = close == '}' ? json_string(json, &unused, "a key") : 0;
		if (!err && close == '}')
			err = json_begin(json, ':', "':'");
		if (!err)
			err = json_skip_value(json, depth + 1);
		if (err)
			return err;
	}
	return more;
}

