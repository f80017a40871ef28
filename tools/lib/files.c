// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * .npy and safetensors files of pads: what saving and loading share.
 */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool ends_in(const char *text, const char *end)
{
	size_t length = strlen(text), end_length = strlen(end);

	return length >= end_length && !strcmp(text + length - end_length, end);
}

int check_byte_order(void)
{
	if (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
		return 0;
	return set_error(-EOPNOTSUPP, "safetensors files are little-endian, this machine is not");
}

int fail_about(const char *kind, const char *name, const char *what)
{
	char words[256], printable[PRINTABLE_NAME_BYTES];

	/* it may be the text of the last error */
	snprintf(words, sizeof(words), "%s", what);
	/* as in .npy */
	if (!*name)
		return set_error(-EBADMSG, "%s", words);
	return set_error(-EBADMSG, "%s \"%s\": %s", kind, printable_name(printable, name), words);
}

/* Progress */

int advance_transfer(struct transfer *transfer, uint64_t bytes)
{
	transfer->done += bytes;
	if (!transfer->progress ||
	    !transfer->progress(transfer->context, transfer->done, transfer->total))
		return 0;
	return set_error(-ECANCELED, "canceled after %" PRIu64 " of %" PRIu64 " bytes",
			 transfer->done, transfer->total);
}

int begin_transfer(struct transfer *transfer, uint64_t total)
{
	transfer->done = 0;
	transfer->total = total;
	return advance_transfer(transfer, 0);
}

/* Strings */

const char *keep_string(struct strings *strings, const char *format, ...)
{
	va_list arguments;
	char *string;

	va_start(arguments, format);
	if (vasprintf(&string, format, arguments) < 0)
		string = NULL;
	va_end(arguments);
	if (string)
		strings->strings[strings->count++] = string;
	else
		strings->failed = true;
	return string;
}

void free_strings(struct strings *strings)
{
	while (strings->count)
		free(strings->strings[--strings->count]);
	free(strings->strings);
}

static bool is_plain(unsigned char byte)
{
	return (byte >= 'a' && byte <= 'z') || (byte >= 'A' && byte <= 'Z') ||
	       (byte >= '0' && byte <= '9') || (byte && strchr("._-", byte));
}

void escape_bytes(char *text, const void *bytes, size_t count)
{
	const unsigned char *byte = bytes;

	for (; count--; byte++) {
		if (is_plain(*byte))
			*text++ = *byte;
		else
			text += sprintf(text, "%%%02x", *byte);
	}
	*text = '\0';
}

static int hex_digit(char digit)
{
	static const char digits[] = "0123456789abcdef";
	const char *found = digit ? strchr(digits, digit) : NULL;

	return found ? (int)(found - digits) : -1;
}

/* The byte that @text begins with, and how many characters that takes; 0 if it is none */
static size_t unescape_byte(unsigned char *byte, const char *text)
{
	int high, low;

	*byte = *text;
	if (is_plain(*text))
		return 1;
	if (*text != '%')
		return 0;
	high = hex_digit(text[1]);
	low = high < 0 ? -1 : hex_digit(text[2]);
	if (low < 0)
		return 0;
	*byte = high << 4 | low;
	return 3;
}

int unescape_bytes(void *bytes, size_t most, const char *text)
{
	unsigned char *to = bytes, byte;
	size_t count = 0;

	while (*text) {
		size_t length = unescape_byte(&byte, text);

		if (!length || count == most)
			return -1;
		to[count++] = byte;
		text += length;
	}
	return (int)count;
}
