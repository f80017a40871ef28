// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
#define _GNU_SOURCE
#include "container.h"

#include <endian.h>
#include <stdint.h>
#include <string.h>

const char safetensors_name[] = "safetensors";

#define MAGIC(name, magic) { name, magic, sizeof(magic) - 1 }

static const struct {
	const char *name;
	const char *magic;
	size_t length;
} formats[] = {
	MAGIC("zip (.npz, .pt)", "PK\3\4"),
	MAGIC("zip (.npz, .pt)", "PK\5\6"),
	MAGIC("gzip", "\x1f\x8b\x08"),
	MAGIC("zstd", "\x28\xb5\x2f\xfd"),
	MAGIC("xz", "\xfd" "7zXZ\0"),
	MAGIC("lz4", "\x04\x22\x4d\x18"),
	MAGIC("7-Zip", "7z\xbc\xaf\x27\x1c"),
	MAGIC("GGUF", "GGUF"),
	MAGIC("HDF5", "\x89HDF\r\n\x1a\n"),
	MAGIC("Arrow (Feather)", "ARROW1\0\0"),
	MAGIC("Feather 1", "FEA1"),
	MAGIC("Parquet", "PAR1"),
	MAGIC("Avro", "Obj\1"),
	MAGIC("MATLAB", "MATLAB 5.0 MAT-file"),
	MAGIC("PyTorch before 1.6", "\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"),
	MAGIC("PNG", "\x89PNG\r\n\x1a\n"),
	MAGIC("PDF", "%PDF-"),
	MAGIC("SQLite", "SQLite format 3\0"),
	MAGIC("ELF", "\x7f" "ELF"),
};

static bool begins_with(const char *bytes, size_t size, const char *with, size_t length)
{
	return size >= length && !memcmp(bytes, with, length);
}

static bool is_bzip2(const char *bytes, size_t size)
{
	/* a digit, and the first block, or the end of none */
	return size >= 10 && !memcmp(bytes, "BZh", 3) && bytes[3] >= '1' && bytes[3] <= '9' &&
	       (!memcmp(bytes + 4, "1AY&SY", 6) || !memcmp(bytes + 4, "\x17rE8P\x90", 6));
}

/* From protocol 2 on they begin with its number, from 4 on with a frame; all end with a stop. */
static bool is_pickle(const char *bytes, size_t size)
{
	static const char opcodes[] = "])}(cXUKMJGNq\x8a\x8c";

	return size >= 4 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5 &&
	       (bytes[2] == '\x95' || (memchr(opcodes, bytes[2], sizeof(opcodes) - 1) &&
				       bytes[size - 1] == '.'));
}

static bool is_tar(const char *bytes, size_t size)
{
	return size >= 262 && !memcmp(bytes + 257, "ustar", 5);
}

/* A length that no row begins with, and an object whose first key is text */
static bool is_safetensors(const char *bytes, size_t size)
{
	const size_t prefix = sizeof(uint64_t), most = prefix + 16;
	uint64_t length;

	if (size < prefix + 2)
		return false;
	memcpy(&length, bytes, prefix);
	length = le64toh(length);
	if (length < 2 || length > 100000000 || bytes[prefix] != '{')
		return false;
	if (size > prefix + length)
		size = prefix + length;
	for (size_t i = prefix + 1; i < size && i < most; i++)
		if ((unsigned char)bytes[i] < ' ' && !strchr("\t\r\n", bytes[i]))
			return false;
	return strchr("\"} \t\r\n", bytes[prefix + 1]);
}

const char *container_name(const void *bytes, size_t size)
{
	for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++)
		if (begins_with(bytes, size, formats[i].magic, formats[i].length))
			return formats[i].name;
	if (is_bzip2(bytes, size))
		return "bzip2";
	if (is_pickle(bytes, size))
		return "a pickle of Python";
	if (is_tar(bytes, size))
		return "tar";
	return is_safetensors(bytes, size) ? safetensors_name : NULL;
}

/* Bytes of a character of UTF-8 that begins at @at; 0 where there is none that can be printed */
static size_t printable_bytes(const unsigned char *at, size_t left)
{
	size_t bytes = *at < 0x80 ? 1 : *at >> 5 == 6 ? 2 : *at >> 4 == 14 ? 3 :
		       *at >> 3 == 30 ? 4 : 0;

	if (bytes == 1 && (*at < ' ' || *at == 0x7f) && !(*at >= '\t' && *at <= '\r'))
		return 0;
	if (bytes > left)
		return 0;
	for (size_t i = 1; i < bytes; i++)
		if (at[i] >> 6 != 2)
			return 0;
	return bytes;
}

bool is_text(const void *bytes, size_t size)
{
	const unsigned char *at = bytes;
	const unsigned char *end = at + size;

	if (!memchr(bytes, '\n', size) && !memchr(bytes, '\r', size))
		return false;
	while (at < end) {
		size_t character = printable_bytes(at, end - at);

		if (!character)
			return false;
		at += character;
	}
	return true;
}
