// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include "targets.h"

#include "../../tools/lib/libkvscratch.h"
#include "../../tools/lib/npy.h"
#include "../../tools/lib/safetensors.h"

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition) do { \
	if (!(condition)) { \
		fprintf(stderr, "%s, line %d: %s is false: %s\n", __FILE__, __LINE__, #condition, \
			kvscratch_error()); \
		abort(); \
	} \
} while (0)

/* A copy that is exactly as large, so that a read beyond it is caught */
static char *copy_of(const void *bytes, size_t size)
{
	char *copy = malloc(size ? size : 1);

	CHECK(copy);
	return size ? memcpy(copy, bytes, size) : copy;
}

/* .npy */

bool fuzz_npy(const uint8_t *bytes, size_t size)
{
	char header[NPY_HEADER_BYTES];
	struct npy_array array, again;
	char *file = copy_of(bytes, size);
	const char *error = npy_parse_header(file, size, &array);
	size_t length;

	free(file);
	if (error)
		return false;
	CHECK(array.data_offset <= size);
	if (!array.dtype || array.ndim != 2 || array.fortran_order || array.shape[1] > UINT32_MAX)
		return true;
	length = npy_write_header(header, array.shape[0], array.shape[1], array.dtype);
	CHECK(length && length % 64 == 0);
	CHECK(!npy_parse_header(header, length, &again));
	CHECK(again.data_offset == length && again.dtype == array.dtype && again.ndim == 2 &&
	      !again.fortran_order);
	CHECK(again.shape[0] == array.shape[0] && again.shape[1] == array.shape[1]);
	return true;
}

/* safetensors */

static bool same_tensor(const struct safetensors_tensor *a, const struct safetensors_tensor *b)
{
	return !strcmp(a->name, b->name) && a->dtype == b->dtype && a->ndim == b->ndim &&
	       !memcmp(a->shape, b->shape, a->ndim * sizeof(*a->shape)) && a->begin == b->begin &&
	       a->end == b->end;
}

static void check_same(const struct safetensors *a, const struct safetensors *b)
{
	CHECK(a->nr_tensors == b->nr_tensors && a->nr_metadata == b->nr_metadata);
	for (size_t i = 0; i < a->nr_tensors; i++) {
		CHECK(same_tensor(&a->tensors[i], &b->tensors[i]));
		CHECK(safetensors_find(b, a->tensors[i].name) == &b->tensors[i]);
	}
	for (size_t i = 0; i < a->nr_metadata; i++) {
		const char *value = safetensors_metadata(b, a->metadata[i].key);

		CHECK(value && !strcmp(value, a->metadata[i].value));
	}
}

bool fuzz_safetensors(const uint8_t *bytes, size_t size)
{
	struct safetensors first, second;
	uint64_t data_bytes;
	char *parsed, *written;
	size_t length;
	int err;

	if (size < sizeof(data_bytes))
		return false;
	memcpy(&data_bytes, bytes, sizeof(data_bytes));
	data_bytes = le64toh(data_bytes);
	size -= sizeof(data_bytes);
	parsed = copy_of(bytes + sizeof(data_bytes), size);
	if (safetensors_parse(&first, parsed, size, data_bytes)) {
		free(parsed);
		return false;
	}
	err = safetensors_write_header(&first, &written, &length);
	if (err) {
		/* the only names that can be read and not be written */
		CHECK(err == -EINVAL && safetensors_find(&first, ""));
	} else {
		CHECK(length % 64 == 0);
		CHECK(!safetensors_parse(&second, written + SAFETENSORS_PREFIX,
					 length - SAFETENSORS_PREFIX, data_bytes));
		check_same(&first, &second);
		safetensors_free(&second);
		free(written);
	}
	safetensors_free(&first);
	free(parsed);
	return true;
}

/* Files */

/* Where to save: in memory, if there is such a place, and beside others that do this */
static const char *saved_path(const char *extension)
{
	static char path[64];

	snprintf(path, sizeof(path), "%s/kvscratch-fuzz-%d%s",
		 access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm", getpid(), extension);
	return path;
}

/* A file of these bytes, by its path */
static const char *input_file(const uint8_t *bytes, size_t size)
{
	static char path[32];
	static int fd = -1;

	if (fd < 0) {
		fd = memfd_create("input", MFD_CLOEXEC);
		CHECK(fd >= 0);
		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		setenv("KVSCRATCH_BACKEND", "memfd", 1);
	}
	CHECK(!ftruncate(fd, 0) && pwrite(fd, bytes, size, 0) == (ssize_t)size);
	return path;
}

/* Whether some of the planes convert what they take */
static bool converts(const struct kvscratch_saved_pad *saved)
{
	for (uint32_t i = 0; i < saved->nr_planes; i++)
		if (kvscratch_saved_plane(saved, i)->input_dtype !=
		    kvscratch_saved_plane(saved, i)->dtype)
			return true;
	return false;
}

/*
 * A pad with just enough room: what a file says may be more than there is. NULL if it says of
 * rows that they were converted, and they were not.
 */
static struct kvscratch *load(const struct kvscratch_file *file,
			      const struct kvscratch_saved_pad *saved)
{
	struct kvscratch *pad;
	int err = kvscratch_load(&pad, file, saved->name, saved->len ? saved->len : 1, NULL, NULL);

	if (err == -EBADMSG && converts(saved))
		return NULL;
	CHECK(!err);
	CHECK(kvscratch_len(pad) == (int64_t)saved->len);
	return pad;
}

static void check_same_tensor(const struct kvscratch_tensor *left,
			      const struct kvscratch_tensor *right)
{
	const uint64_t elements = left->len * left->dim;

	CHECK(left->len == right->len && left->dim == right->dim && left->dtype == right->dtype);
	CHECK(!memcmp(left->data, right->data, elements * kvscratch_dtype_size(left->dtype)));
	if (left->scales)
		CHECK(!memcmp(left->scales, right->scales, elements / KVSCRATCH_MX_BLOCK));
}

static void check_same_pad(struct kvscratch *a, struct kvscratch *b)
{
	struct kvscratch_pad_info left_info, right_info;

	CHECK(!kvscratch_pad_info(a, &left_info) && !kvscratch_pad_info(b, &right_info));
	CHECK(!memcmp(left_info.tag, right_info.tag, sizeof(left_info.tag)));
	CHECK(kvscratch_nr_planes(a) == kvscratch_nr_planes(b));
	for (uint32_t i = 0; i < kvscratch_nr_planes(a); i++) {
		const struct kvscratch_plane *plane = kvscratch_plane(a, i);
		const struct kvscratch_plane *other = kvscratch_plane(b, i);
		struct kvscratch_tensor left, right;

		CHECK(!strcmp(plane->label, other->label));
		CHECK(plane->input_dtype == other->input_dtype);
		CHECK(plane->frac_bits == other->frac_bits);
		CHECK(!kvscratch_plane_tensor(a, i, &left));
		CHECK(!kvscratch_plane_tensor(b, i, &right));
		check_same_tensor(&left, &right);
	}
}

/* @path has the same pads, in some order, and with their rows. */
static void check_saved(const char *path, struct kvscratch *const *pads,
			const struct kvscratch_saved_pad *saved, unsigned int count)
{
	struct kvscratch_file *file;
	unsigned int found;

	CHECK(!kvscratch_open_file(&file, path));
	kvscratch_file_pads(file, &found);
	CHECK(found == count);
	for (unsigned int i = 0; i < count; i++) {
		struct kvscratch *pad = load(file, &saved[i]);

		CHECK(pad);
		check_same_pad(pads[i], pad);
		kvscratch_close(pad);
	}
	kvscratch_close_file(file);
}

/*
 * Save them, or find that they cannot be together in one file: who names tensors otherwise than
 * we do has planes and pads of which we would give two the same name.
 */
static bool save(const char *path, const struct kvscratch_named_pad *named, unsigned int count)
{
	bool planes = false;
	int err = kvscratch_save(path, named, count, NULL, NULL);

	for (unsigned int i = 0; i < count; i++)
		planes = planes || kvscratch_nr_planes(named[i].pad) > 1;
	CHECK(!err || (err == -EINVAL && count > 1 && planes));
	return !err;
}

static void save_and_compare(const struct kvscratch_file *file, const char *path)
{
	unsigned int count;
	const struct kvscratch_saved_pad *saved = kvscratch_file_pads(file, &count);
	struct kvscratch_named_pad *named = calloc(count, sizeof(*named));
	struct kvscratch **pads = calloc(count, sizeof(*pads));
	bool loaded = true;

	CHECK(named && pads);
	for (unsigned int i = 0; i < count; i++) {
		pads[i] = load(file, &saved[i]);
		named[i] = (struct kvscratch_named_pad){ saved[i].name, pads[i] };
		loaded = loaded && pads[i];
	}
	if (loaded && save(path, named, count)) {
		check_saved(path, pads, saved, count);
		CHECK(!unlink(path));
	}
	for (unsigned int i = 0; i < count; i++)
		kvscratch_close(pads[i]);
	free(pads);
	free(named);
}

static bool has_nameless(const struct kvscratch_file *file)
{
	unsigned int count;
	const struct kvscratch_saved_pad *saved = kvscratch_file_pads(file, &count);

	for (unsigned int i = 0; i < count; i++)
		if (!*saved[i].name)
			return true;
	return false;
}

bool fuzz_files(const uint8_t *bytes, size_t size)
{
	struct kvscratch_file *file;
	unsigned int count;

	if (kvscratch_open_file(&file, input_file(bytes, size)))
		return false;
	kvscratch_file_pads(file, &count);
	if (bytes[0] == 0x93)
		save_and_compare(file, saved_path(".npy"));
	else if (count && !has_nameless(file))
		save_and_compare(file, saved_path(".safetensors"));
	kvscratch_close_file(file);
	return true;
}

#ifdef FUZZ_TARGET
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
	FUZZ_TARGET(bytes, size);
	return 0;
}
#endif
