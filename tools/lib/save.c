// SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
/*
 * Pads into .npy and safetensors files.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include "files.h"
#include "npy.h"
#include "output.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* How often pads may be truncated while they are saved */
#define MAX_ATTEMPTS 8

/* Of a pad: max_seq_len, its tag and the list of its planes. Of a plane: four entries. */
#define ENTRIES_PER_PAD 3
#define ENTRIES_PER_PLANE 4
/* The key of each entry and its value, and of a plane the names of its tensors */
#define STRINGS_PER_PAD (2 * ENTRIES_PER_PAD)
#define STRINGS_PER_PLANE (2 * ENTRIES_PER_PLANE + 2)

/**
 * struct moment - the rows of a pad that are saved
 * @view: where they are
 * @state: of the pad when they were all there are
 * @len: how many
 * @tag: of the pad
 * @tensors: the names that its planes have in the file
 */
struct moment {
	const struct kvscratch_view *view;
	uint64_t state;
	uint64_t len;
	uint8_t tag[KVSCRATCH_TAG_BYTES];
	const char **tensors;
};

/**
 * struct saving - pads on their way into a file
 * @pads: the pads
 * @count: how many
 * @moments: of each pad
 * @names: where the names of tensors are
 * @contents: what the header of a safetensors file says
 * @data: where the bytes of each of its tensors are
 * @strings: for @contents
 * @header: what the file begins with
 * @header_bytes: how long that is
 */
struct saving {
	const struct kvscratch_named_pad *pads;
	unsigned int count;
	struct moment *moments;
	const char **names;
	struct safetensors contents;
	const void **data;
	struct strings strings;
	char *header;
	size_t header_bytes;
};

static int begin_saving(struct saving *saving, const struct kvscratch_named_pad *pads,
			unsigned int count)
{
	size_t planes = 0;

	for (unsigned int i = 0; i < count; i++)
		planes += pads[i].pad->nr_planes;
	*saving = (struct saving){ .pads = pads, .count = count };
	saving->moments = calloc(count, sizeof(*saving->moments));
	saving->names = calloc(planes, sizeof(*saving->names));
	saving->contents.tensors = calloc(planes, 2 * sizeof(*saving->contents.tensors));
	saving->data = calloc(planes, 2 * sizeof(*saving->data));
	saving->contents.metadata = calloc(1 + count * ENTRIES_PER_PAD + planes * ENTRIES_PER_PLANE,
					   sizeof(*saving->contents.metadata));
	saving->strings.strings = calloc(count * STRINGS_PER_PAD + planes * STRINGS_PER_PLANE,
					 sizeof(char *));
	if (!saving->moments || !saving->names || !saving->contents.tensors || !saving->data ||
	    !saving->contents.metadata || !saving->strings.strings)
		return out_of_memory();
	return 0;
}

static void end_saving(struct saving *saving)
{
	free(saving->header);
	free_strings(&saving->strings);
	free(saving->data);
	safetensors_free(&saving->contents);
	free(saving->names);
	free(saving->moments);
}

/* The rows that are there now, of all planes at once */
static int take_moment(struct kvscratch *pad, struct moment *moment)
{
	struct kvscratch_pad_info info;
	int64_t len;
	int err = kvscratch_pad_info(pad, &info);

	if (err)
		return err;
	moment->view = kvscratch_view(pad);
	if (!moment->view)
		return -errno;
	moment->state = kvscratch_view_state(moment->view);
	len = check_len(pad, kvscratch_state_len(moment->state));
	if (len < 0)
		return (int)len;
	moment->len = len;
	memcpy(moment->tag, info.tag, sizeof(moment->tag));
	return 0;
}

static int take_moments(struct saving *saving)
{
	const char **names = saving->names;

	for (unsigned int i = 0; i < saving->count; i++) {
		int err = take_moment(saving->pads[i].pad, &saving->moments[i]);

		if (err)
			return err;
		saving->moments[i].tensors = names;
		names += saving->pads[i].pad->nr_planes;
	}
	return 0;
}

/* Whether all rows that were saved stayed what they were until now */
static bool moments_hold(const struct saving *saving)
{
	for (unsigned int i = 0; i < saving->count; i++) {
		const struct moment *moment = &saving->moments[i];

		if (kvscratch_view_valid_rows(moment->view, moment->state) < moment->len)
			return false;
	}
	return true;
}

/* What the tensors are called */

static bool is_number(const char *text)
{
	return !text[strspn(text, "0123456789")];
}

/* Whether a tensor can be told from others by the label of its plane */
static bool tells_apart(const struct kvscratch *pad, const char *label)
{
	unsigned int count = 0;

	if (!*label || is_number(label) || ends_in(label, SCALES_SUFFIX))
		return false;
	for (uint32_t i = 0; i < pad->nr_planes; i++)
		count += !strcmp(pad->planes[i].label, label);
	return count == 1;
}

static void name_tensors(struct saving *saving, unsigned int i)
{
	const struct kvscratch_named_pad *named = &saving->pads[i];
	const struct kvscratch *pad = named->pad;
	const char **tensors = saving->moments[i].tensors;

	if (pad->nr_planes == 1) {
		tensors[0] = named->name;
		return;
	}
	for (uint32_t plane = 0; plane < pad->nr_planes; plane++) {
		const char *label = pad->planes[plane].label;
		char suffix[ESCAPED_BYTES(KVSCRATCH_LABEL_BYTES)];

		if (tells_apart(pad, label))
			escape_bytes(suffix, label, strlen(label));
		else
			snprintf(suffix, sizeof(suffix), "%" PRIu32, plane);
		tensors[plane] = keep_string(&saving->strings, "%s.%s", named->name, suffix);
	}
}

/* The tensors */

/* A [rows, row_bytes / element size] tensor behind those that are there already */
static void add_tensor(struct saving *saving, const char *name, uint32_t dtype, uint64_t rows,
		       uint32_t row_bytes, const void *data)
{
	struct safetensors *contents = &saving->contents;
	uint64_t begin = 0;

	if (contents->nr_tensors)
		begin = contents->tensors[contents->nr_tensors - 1].end;
	saving->data[contents->nr_tensors] = data;
	contents->tensors[contents->nr_tensors++] = (struct safetensors_tensor){
		.name = name,
		.dtype = dtype,
		.ndim = 2,
		.shape = { rows, row_bytes / kvscratch_dtype_size(dtype) },
		.begin = begin,
		.end = begin + rows * row_bytes,
	};
}

static void add_plane(struct saving *saving, unsigned int i, uint32_t index)
{
	const struct moment *moment = &saving->moments[i];
	const struct kvscratch_plane *plane = &saving->pads[i].pad->planes[index];
	const bool scaled = plane->dtype == KVSCRATCH_DTYPE_MXINT8;
	const char *name = moment->tensors[index];

	add_tensor(saving, name, scaled ? KVSCRATCH_DTYPE_I8 : plane->dtype, moment->len,
		   plane->row_bytes, kvscratch_view_plane_row(moment->view, index, 0));
	if (scaled)
		add_tensor(saving, keep_string(&saving->strings, "%s" SCALES_SUFFIX, name),
			   KVSCRATCH_DTYPE_U8, moment->len, plane->scales_row_bytes,
			   kvscratch_view_plane_scales(moment->view, index));
}

/* Wide elements come first, so that each tensor is aligned to its own. */
static void add_planes(struct saving *saving)
{
	for (uint32_t size = 8; size; size /= 2)
		for (unsigned int i = 0; i < saving->count; i++) {
			const struct kvscratch *pad = saving->pads[i].pad;

			for (uint32_t j = 0; j < pad->nr_planes; j++)
				if (kvscratch_dtype_size(pad->planes[j].dtype) == size)
					add_plane(saving, i, j);
		}
}

/* The metadata */

static void add_entry(struct saving *saving, const char *of, const char *key, const char *value)
{
	struct safetensors *contents = &saving->contents;

	contents->metadata[contents->nr_metadata++] = (struct safetensors_entry){
		keep_string(&saving->strings, "%s.%s", of, key), value
	};
}

static void add_number(struct saving *saving, const char *of, const char *key, uint64_t number)
{
	add_entry(saving, of, key, keep_string(&saving->strings, "%" PRIu64, number));
}

/* Names of tensors without that of the pad before them, in the order of the planes */
static void add_list(struct saving *saving, unsigned int i)
{
	const char *name = saving->pads[i].name, *const *tensors = saving->moments[i].tensors;
	const uint32_t count = saving->pads[i].pad->nr_planes;
	const size_t most = ESCAPED_BYTES(KVSCRATCH_LABEL_BYTES) + 1;
	char *list = malloc(count * most), *end = list;

	for (uint32_t plane = 0; list && plane < count && tensors[plane]; plane++)
		end += sprintf(end, "%s%s", plane ? " " : "", tensors[plane] + strlen(name) + 1);
	if (list)
		add_entry(saving, name, KEY_PLANES, keep_string(&saving->strings, "%s", list));
	else
		saving->strings.failed = true;
	free(list);
}

static void add_geometry(struct saving *saving, const char *tensor,
			 const struct kvscratch_plane *plane)
{
	char label[ESCAPED_BYTES(KVSCRATCH_LABEL_BYTES)];

	add_entry(saving, tensor, KEY_DTYPE, kvscratch_dtype_name(plane->dtype));
	add_entry(saving, tensor, KEY_INPUT_DTYPE, kvscratch_dtype_name(plane->input_dtype));
	add_number(saving, tensor, KEY_FRAC_BITS, plane->frac_bits);
	if (!*plane->label)
		return;
	escape_bytes(label, plane->label, strlen(plane->label));
	add_entry(saving, tensor, KEY_LABEL, keep_string(&saving->strings, "%s", label));
}

static size_t tag_bytes(const uint8_t *tag)
{
	size_t bytes = KVSCRATCH_TAG_BYTES;

	while (bytes && !tag[bytes - 1])
		bytes--;
	return bytes;
}

static void add_pad(struct saving *saving, unsigned int i)
{
	const struct moment *moment = &saving->moments[i];
	const struct kvscratch *pad = saving->pads[i].pad;
	const char *name = saving->pads[i].name;
	char tag[ESCAPED_BYTES(KVSCRATCH_TAG_BYTES)];

	add_number(saving, name, KEY_MAX_SEQ_LEN, pad->info.max_seq_len);
	escape_bytes(tag, moment->tag, tag_bytes(moment->tag));
	if (*tag)
		add_entry(saving, name, KEY_TAG, keep_string(&saving->strings, "%s", tag));
	if (pad->nr_planes > 1)
		add_list(saving, i);
	for (uint32_t plane = 0; plane < pad->nr_planes; plane++)
		add_geometry(saving, moment->tensors[plane], &pad->planes[plane]);
}

static bool first_version_will_do(const struct saving *saving)
{
	for (unsigned int i = 0; i < saving->count; i++) {
		const struct kvscratch *pad = saving->pads[i].pad;

		if (pad->nr_planes > 1 || *pad->planes->label || tag_bytes(saving->moments[i].tag))
			return false;
	}
	return true;
}

static int make_safetensors(struct saving *saving)
{
	struct safetensors *contents = &saving->contents;

	for (unsigned int i = 0; i < saving->count; i++)
		name_tensors(saving, i);
	add_planes(saving);
	contents->metadata[contents->nr_metadata++] = (struct safetensors_entry){
		KEY_VERSION, first_version_will_do(saving) ? FIRST_VERSION : PLANES_VERSION
	};
	for (unsigned int i = 0; i < saving->count; i++)
		add_pad(saving, i);
	if (saving->strings.failed)
		return out_of_memory();
	return safetensors_write_header(contents, &saving->header, &saving->header_bytes);
}

static int make_npy(struct saving *saving, uint32_t index)
{
	const struct kvscratch_plane *plane = &saving->pads->pad->planes[index];

	saving->header = malloc(NPY_HEADER_BYTES);
	if (!saving->header)
		return out_of_memory();
	saving->header_bytes = npy_write_header(saving->header, saving->moments->len, plane->dim,
						plane->dtype);
	if (!saving->header_bytes)
		return set_error(-EOPNOTSUPP, ".npy has no type for %s: expected a name that ends "
				 "in .safetensors", kvscratch_dtype_name(plane->dtype));
	add_plane(saving, 0, index);
	return 0;
}

/* Writing */

static int write_at(struct output *output, const void *bytes, uint64_t count, uint64_t offset)
{
	int err = output_write(output, bytes, count, offset);

	return err ? set_error(err, "%s", output->words) : 0;
}

static int write_tensor(struct output *output, const char *data,
			const struct safetensors_tensor *tensor, uint64_t offset,
			struct transfer *transfer)
{
	uint64_t bytes = tensor->end - tensor->begin;
	int err = 0;

	for (uint64_t done = 0, piece; !err && done < bytes; done += piece) {
		piece = bytes - done < PIECE_BYTES ? bytes - done : PIECE_BYTES;
		err = write_at(output, data + done, piece, offset + tensor->begin + done);
		if (!err)
			err = advance_transfer(transfer, piece);
	}
	return err;
}

static int write_contents(const struct saving *saving, struct output *output,
			  struct transfer *transfer)
{
	const struct safetensors *contents = &saving->contents;
	int err = begin_transfer(transfer, contents->tensors[contents->nr_tensors - 1].end);

	if (!err)
		err = write_at(output, saving->header, saving->header_bytes, 0);
	for (size_t i = 0; !err && i < contents->nr_tensors; i++)
		err = write_tensor(output, saving->data[i], &contents->tensors[i],
				   saving->header_bytes, transfer);
	return err;
}

/**
 * struct choice - what is to be saved
 * @pads: pads
 * @count: how many
 * @npy: as .npy, of the only one of them @plane
 * @plane: its index
 */
struct choice {
	const struct kvscratch_named_pad *pads;
	unsigned int count;
	bool npy;
	uint32_t plane;
};

/* EAGAIN without words if the rows did not last */
static int try_to_save(const struct choice *choice, struct output *output,
		       struct transfer *transfer)
{
	struct saving saving;
	int err = begin_saving(&saving, choice->pads, choice->count);

	if (!err)
		err = take_moments(&saving);
	if (!err)
		err = choice->npy ? make_npy(&saving, choice->plane) : make_safetensors(&saving);
	if (!err && ftruncate(output->fd, 0))
		err = set_error(-errno, "cannot empty the file: %m");
	if (!err)
		err = write_contents(&saving, output, transfer);
	if (!err && !moments_hold(&saving))
		err = -EAGAIN;
	end_saving(&saving);
	return err;
}

static int save_into(struct output *output, const struct choice *choice, struct transfer *transfer)
{
	int err = -EAGAIN;

	for (int attempt = 0; err == -EAGAIN && attempt < MAX_ATTEMPTS; attempt++)
		err = try_to_save(choice, output, transfer);
	if (err == -EAGAIN)
		return set_error(err, "expected rows that last while they are saved, got pads that "
				 "were truncated in each of %d attempts", MAX_ATTEMPTS);
	if (err)
		return err;
	err = output_replace(output);
	return err ? set_error(err, "%s", output->words) : 0;
}

static int save(const char *path, const struct choice *choice, kvscratch_progress *progress,
		void *context)
{
	struct transfer transfer = { .progress = progress, .context = context };
	struct output output;
	int err = output_open(&output, path);

	if (err)
		set_error(err, "%s", output.words);
	else
		err = save_into(&output, choice, &transfer);
	output_close(&output);
	return err;
}

static int check_names(const struct kvscratch_named_pad *pads, unsigned int count)
{
	char printable[PRINTABLE_NAME_BYTES];

	for (unsigned int i = 0; i < count; i++) {
		int err;

		if (!pads[i].name)
			return set_error(-EINVAL, "expected a name for each pad, got none");
		err = safetensors_check_name(pads[i].name);
		if (err)
			return err;
		for (unsigned int j = 0; j < i; j++)
			if (!strcmp(pads[i].name, pads[j].name))
				return set_error(-EINVAL, "expected each pad once, got two named "
						 "\"%s\"", printable_name(printable, pads[i].name));
	}
	return 0;
}

static int check_pads(const struct choice *choice)
{
	const unsigned int count = choice->count;
	int err;

	if (choice->npy && count != 1)
		return set_error(-EINVAL, ".npy has room for one pad: expected 1, got %u", count);
	if (choice->npy && choice->pads->pad->nr_planes != 1)
		return set_error(-EOPNOTSUPP, ".npy has room for one plane: expected a name that "
				 "ends in .safetensors, or one of the %" PRIu32 " planes",
				 choice->pads->pad->nr_planes);
	if (!count)
		return set_error(-EINVAL, "expected at least one pad, got none");
	if (choice->npy)
		return 0;
	err = check_byte_order();
	return err ? err : check_names(choice->pads, count);
}

int kvscratch_save(const char *path, const struct kvscratch_named_pad *pads, unsigned int count,
		   kvscratch_progress *progress, void *context)
{
	const struct choice choice = { .pads = pads, .count = count, .npy = ends_in(path, ".npy") };
	int err;

	if (!choice.npy && !ends_in(path, ".safetensors"))
		return set_error(-EINVAL, "expected the name of a file that ends in .npy or "
				 ".safetensors");
	err = check_pads(&choice);
	return err ? err : save(path, &choice, progress, context);
}

int kvscratch_save_plane(const char *path, struct kvscratch *pad, uint32_t plane,
			 kvscratch_progress *progress, void *context)
{
	const struct kvscratch_named_pad named = { .pad = pad };
	const struct choice choice = { .pads = &named, .count = 1, .npy = true, .plane = plane };
	int err = check_plane(pad, plane);

	if (!err && !ends_in(path, ".npy"))
		err = set_error(-EINVAL, "expected the name of a file that ends in .npy for a "
				"single plane");
	return err ? err : save(path, &choice, progress, context);
}
