/* SPDX-License-Identifier: LGPL-2.1-or-later OR MIT */
/*
 * What saving and loading share: files of pads, as libkvscratch.h describes them.
 */
#ifndef FILES_H
#define FILES_H

#include "backend.h"
#include "safetensors.h"

/* How much is moved between two calls of a progress function, and a buffer of it */
#define PIECE_BYTES (4u << 20)

/*
 * Keys of __metadata__: the first stands alone, the next ones follow the name of a pad and a
 * dot, and the others the name of the tensor of a plane and a dot.
 */
#define KEY_VERSION "kvscratch"
#define KEY_MAX_SEQ_LEN "max_seq_len"
#define KEY_TAG "tag"
#define KEY_PLANES "planes"
#define KEY_DTYPE "dtype"
#define KEY_INPUT_DTYPE "input_dtype"
#define KEY_FRAC_BITS "frac_bits"
#define KEY_LABEL "label"

/* Pads of one plane without a label and a tag need no more than the first version. */
#define FIRST_VERSION "1"
#define PLANES_VERSION "2"

/* Names the second tensor of an MXINT8 plane */
#define SCALES_SUFFIX ".scales"

bool ends_in(const char *text, const char *end);

/* safetensors files are little-endian: -EOPNOTSUPP, with words, where this machine is not. */
int check_byte_order(void);

/* Put in front of an error what it is about, a tensor or a pad; returns -EBADMSG. */
int fail_about(const char *kind, const char *name, const char *what);

/**
 * struct transfer - how far a save or a load is
 * @progress: hears of it, or NULL
 * @context: for @progress
 * @done: bytes that were moved
 * @total: bytes in all
 */
struct transfer {
	kvscratch_progress *progress;
	void *context;
	uint64_t done;
	uint64_t total;
};

/* Both return 0, or -ECANCELED, with words. */
int begin_transfer(struct transfer *transfer, uint64_t total);
int advance_transfer(struct transfer *transfer, uint64_t bytes);

/**
 * struct strings - strings that live as long as what is made of them
 * @strings: the strings
 * @count: how many
 * @failed: there was no memory for one
 */
struct strings {
	char **strings;
	size_t count;
	bool failed;
};

/* Returns NULL and remembers it when there is no memory. */
const char *keep_string(struct strings *strings, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
void free_strings(struct strings *strings);

/*
 * Labels and tags in metadata and names: of any bytes, those that are none of A-Z a-z 0-9 . _ -
 * are a percent sign and two hexadecimal digits.
 */
#define ESCAPED_BYTES(bytes) (3 * (bytes) + 1)
void escape_bytes(char *text, const void *bytes, size_t count);

/* How many bytes @text stands for, or -1 if it is none or they are more than @most */
int unescape_bytes(void *bytes, size_t most, const char *text);

/**
 * struct place - where the rows of a plane are in a file
 * @name: of its tensor
 * @elements: offset of its elements
 * @scales: offset of its scales, of MXINT8
 */
struct place {
	const char *name;
	uint64_t elements;
	uint64_t scales;
};

/**
 * struct kvscratch_file - a file of pads
 * @fd: the file
 * @size: its bytes
 * @header: what its header was decoded in
 * @data_offset: of a safetensors file, where its data begins
 * @contents: what that says, if it is a safetensors file
 * @names: of pads of several planes, which no tensor has
 * @is_plane: of each tensor in @contents, whether it is one of several planes
 * @pads: the pads in it
 * @count: how many
 * @planes: of all pads, those of each behind those of the one before
 * @places: where their rows are
 * @nr_planes: how many of both
 * @claimed: how many bytes the pads take if they are made as the file says
 */
struct kvscratch_file {
	int fd;
	uint64_t size;
	char *header;
	uint64_t data_offset;
	struct safetensors contents;
	struct strings names;
	bool *is_plane;
	struct kvscratch_saved_pad *pads;
	unsigned int count;
	struct kvscratch_plane *planes;
	struct place *places;
	size_t nr_planes;
	uint64_t claimed;
};

/* All of it, or a negative errno, with words */
int read_file_at(const struct kvscratch_file *file, void *bytes, size_t count, uint64_t offset);

#endif
