// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Rows of pads in memfds. They are put in place with pwrite(), so that a source which cannot
 * be read is an error and not a signal; but for what has to be converted.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "convert.h"
#include "memfd.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>

static int write_all(int fd, struct iovec *iov, int count, uint64_t at)
{
	while (count) {
		ssize_t written = pwritev(fd, iov, count, at);

		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return written ? -errno : -EIO;
		at += written;
		while (count && (size_t)written >= iov->iov_len) {
			written -= iov->iov_len;
			iov++;
			count--;
		}
		if (count) {
			iov->iov_base = (char *)iov->iov_base + written;
			iov->iov_len -= written;
		}
	}
	return 0;
}

static int write_piece(int fd, uint64_t at, const void *bytes, size_t count)
{
	struct iovec iov = { .iov_base = (void *)bytes, .iov_len = count };

	return count ? write_all(fd, &iov, 1, at) : 0;
}

#define PIECE_ROWS	128

/* Parts of rows, @stride apart, to where they follow each other */
static int write_parts(int fd, uint64_t at, uint32_t part_bytes, const char *rows, size_t stride,
		       uint64_t count)
{
	struct iovec iov[PIECE_ROWS];

	if (stride == part_bytes)
		return write_piece(fd, at, rows, count * part_bytes);
	while (count) {
		uint64_t piece = count < PIECE_ROWS ? count : PIECE_ROWS;
		int err;

		for (uint64_t i = 0; i < piece; i++)
			iov[i] = (struct iovec){
				.iov_base = (char *)rows + i * stride,
				.iov_len = part_bytes,
			};
		err = write_all(fd, iov, piece, at);
		if (err)
			return err;
		rows += piece * stride;
		at += piece * part_bytes;
		count -= piece;
	}
	return 0;
}

/* Rows as they are stored: the elements of each, its scales */
static int write_stored(int fd, const struct kvscratch_plane *plane, uint64_t first,
			const char *rows, size_t stride, uint64_t count)
{
	int err = write_parts(fd, plane->offset + first * plane->row_bytes, plane->row_bytes, rows,
			      stride, count);

	if (err || !plane->scales_row_bytes)
		return err;
	return write_parts(fd, plane->scales_offset + first * plane->scales_row_bytes,
			   plane->scales_row_bytes, rows + plane->row_bytes, stride, count);
}

/* Elements from index @at of the plane on */
static int convert_piece(int fd, const struct kvscratch_plane *plane, const void *in, uint64_t at,
			 uint32_t count, uint64_t *saturated)
{
	const uint32_t size = kvscratch_dtype_size(plane->dtype);
	__u64 out[CONVERT_MOST];
	__u8 scales[CONVERT_MOST / KVSCRATCH_MX_BLOCK];
	long clamped = convert_elements(plane, in, count, out, scales);
	int err;

	if (clamped < 0)
		return clamped;
	*saturated += clamped;
	err = write_piece(fd, plane->offset + at * size, out, (size_t)count * size);
	if (!err && plane->scales_row_bytes)
		err = write_piece(fd, plane->scales_offset + at / KVSCRATCH_MX_BLOCK, scales,
				  count / KVSCRATCH_MX_BLOCK);
	return err;
}

/* @left elements that follow each other */
static int write_converted(int fd, const struct kvscratch_plane *plane, uint64_t at,
			   const char *elements, uint64_t left, uint64_t *saturated)
{
	const uint32_t size = kvscratch_dtype_size(plane->input_dtype);
	/* aligned to its elements, which @elements need not be */
	__u64 in[CONVERT_MOST];

	while (left) {
		uint32_t count = left < CONVERT_MOST ? left : CONVERT_MOST;
		int err;

		memcpy(in, elements, (size_t)count * size);
		err = convert_piece(fd, plane, in, at, count, saturated);
		if (err)
			return err;
		elements += (size_t)count * size;
		at += count;
		left -= count;
	}
	return 0;
}

int store_rows(int fd, const struct kvscratch_plane *plane, uint64_t first, const char *rows,
	       size_t stride, uint64_t count, uint64_t *saturated)
{
	const uint64_t at_once = stride == plane->input_row_bytes ? count : 1;

	if (!kvs_plane_converts(plane))
		return write_stored(fd, plane, first, rows, stride, count);
	for (uint64_t i = 0; i < count; i += at_once) {
		int err = write_converted(fd, plane, (first + i) * plane->dim, rows + i * stride,
					  at_once * plane->dim, saturated);

		if (err)
			return err;
	}
	return 0;
}

static int zero_bytes(int fd, uint64_t at, uint64_t left)
{
	static const char zeros[65536];

	while (left) {
		size_t count = left < sizeof(zeros) ? left : sizeof(zeros);
		int err = write_piece(fd, at, zeros, count);

		if (err)
			return err;
		at += count;
		left -= count;
	}
	return 0;
}

int zero_rows(int fd, const struct kvscratch_plane *plane, uint64_t first, uint64_t end)
{
	int err = zero_bytes(fd, plane->offset + first * plane->row_bytes,
			     (end - first) * plane->row_bytes);

	if (err || !plane->scales_row_bytes)
		return err;
	return zero_bytes(fd, plane->scales_offset + first * plane->scales_row_bytes,
			  (end - first) * plane->scales_row_bytes);
}
