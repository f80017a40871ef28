// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * The planes of a pad: which there are, and one at a time.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "backend.h"
#include "safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

uint32_t kvscratch_nr_planes(const struct kvscratch *pad)
{
	return pad->nr_planes;
}

uint32_t kvscratch_row_bytes(const struct kvscratch *pad)
{
	return pad->info.row_bytes;
}

uint32_t kvscratch_input_row_bytes(const struct kvscratch *pad)
{
	return pad->info.input_row_bytes;
}

int check_plane(const struct kvscratch *pad, uint32_t plane)
{
	if (plane < pad->nr_planes)
		return 0;
	return set_error(-EINVAL, "expected a plane below %" PRIu32 ", got %" PRIu32,
			 pad->nr_planes, plane);
}

const struct kvscratch_plane *kvscratch_plane(const struct kvscratch *pad, uint32_t index)
{
	if (!check_plane(pad, index))
		return &pad->planes[index];
	errno = EINVAL;
	return NULL;
}

int kvscratch_find_plane(const struct kvscratch *pad, const char *label)
{
	char printable[PRINTABLE_NAME_BYTES];
	int found = -1;

	printable_name(printable, label);
	for (uint32_t i = 0; i < pad->nr_planes; i++) {
		if (strcmp(pad->planes[i].label, label))
			continue;
		if (found >= 0)
			return set_error(-ENOTUNIQ, "expected one plane called \"%s\", got planes %d "
					 "and %" PRIu32, printable, found, i);
		found = (int)i;
	}
	return found >= 0 ? found : set_error(-ENOENT, "no plane is called \"%s\"", printable);
}

int kvscratch_plane_tensor(struct kvscratch *pad, uint32_t plane, struct kvscratch_tensor *tensor)
{
	const struct kvscratch_view *view;
	uint64_t state;
	int64_t len;
	int err = check_plane(pad, plane);

	if (err)
		return err;
	view = kvscratch_view(pad);
	if (!view)
		return -errno;
	state = kvscratch_view_state(view);
	len = check_len(pad, kvscratch_state_len(state));
	if (len < 0)
		return (int)len;
	*tensor = (struct kvscratch_tensor){
		.data = kvscratch_view_plane_row(view, plane, 0),
		.scales = kvscratch_view_plane_scales(view, plane),
		.len = len,
		.dim = pad->planes[plane].dim,
		.dtype = pad->planes[plane].dtype,
		.state = state,
	};
	return 0;
}

static int check_address(const void *address)
{
	if (address && !((uintptr_t)address % sysconf(_SC_PAGESIZE)))
		return 0;
	return set_error(-EINVAL, "expected the address of a page, got %p", address);
}

static int check_mappable(const struct kvscratch *pad, uint32_t plane, const void *address)
{
	int err = check_access(pad, O_RDONLY);

	if (!err)
		err = check_plane(pad, plane);
	return err ? err : check_address(address);
}

static int map_array(const struct kvscratch *pad, uint64_t offset, uint32_t row_bytes, void *address)
{
	const uint64_t bytes = pad->info.max_seq_len * row_bytes;
	int err;

	if (bytes > SIZE_MAX / 2)
		return set_error(-EOVERFLOW, "cannot map %" PRIu64 " bytes: this program has 32-bit "
				 "addresses", bytes);
	if (mmap(address, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, pad->fd, offset) == MAP_FAILED)
		err = -errno;
	else
		err = populate(address, bytes);
	return err ? cannot("map the plane and have its pages there", err) : 0;
}

int kvscratch_map_plane(struct kvscratch *pad, uint32_t plane, void *address)
{
	int err = check_mappable(pad, plane, address);

	return err ? err : map_array(pad, pad->planes[plane].offset, pad->planes[plane].row_bytes,
				     address);
}

int kvscratch_map_scales(struct kvscratch *pad, uint32_t plane, void *address)
{
	int err = check_mappable(pad, plane, address);

	if (err)
		return err;
	if (!pad->planes[plane].scales_row_bytes)
		return set_error(-EINVAL, "expected a plane of mxint8, which has scales, got one of %s",
				 kvscratch_dtype_name(pad->planes[plane].dtype));
	return map_array(pad, pad->planes[plane].scales_offset,
			 pad->planes[plane].scales_row_bytes, address);
}
