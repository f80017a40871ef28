// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pads in .npy and safetensors files, over every backend: KVSCRATCH_BACKEND says
 * which. Needs no device over a memfd, where it runs with sanitizers.
 */
#include "common.h"

#include "../../tools/lib/convert.h"

#include <dirent.h>
#include <endian.h>
#include <ftw.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define F32 KVSCRATCH_DTYPE_F32
#define F64 KVSCRATCH_DTYPE_F64
#define I8 KVSCRATCH_DTYPE_I8
#define U8 KVSCRATCH_DTYPE_U8
#define MXINT8 KVSCRATCH_DTYPE_MXINT8

/* What the library moves between two calls of a progress function */
#define PIECE_BYTES (4u << 20)

#define EXPECT_ERROR(error, words, call) do { \
	EXPECT_EQ(-(error), (long)(call)); \
	EXPECT_STREQ(words, kvscratch_error()); \
} while (0)

#define ASSERT_DONE(call) ASSERT_EQ(0, call) TH_LOG("%s", kvscratch_error())

/* From what is stored back to what it came of, or may have */

/* Bits that any magnitude is as likely as any other with, and none is no number */
static void fill_floats(uint32_t dtype, void *floats, uint32_t count)
{
	static uint64_t state = 88172645463325252;
	const uint32_t bytes = kvscratch_dtype_size(dtype);

	for (uint32_t i = 0; i < count; i++) {
		uint64_t exponent, bits;

		do {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			bits = state >> (64 - 8 * bytes);
			exponent = dtype == F64 ? bits >> 52 & 0x7ff : bits >> (8 * bytes - 9) & 0xff;
			if (dtype == KVSCRATCH_DTYPE_F16)
				exponent = (bits >> 10 & 0x1f) == 0x1f ? 0xff : 0;
		} while (exponent == (dtype == F64 ? 0x7ff : 0xff));
		memcpy((char *)floats + i * bytes, &bits, bytes);
	}
}

/* Whether all that a conversion gives can be had again */
static bool goes_back(const struct kvscratch_plane *plane)
{
	static uint64_t in[CONVERT_MOST], stored[CONVERT_MOST], again[CONVERT_MOST];
	uint8_t scales[CONVERT_MOST / KVSCRATCH_MX_BLOCK];

	for (int round = 0; round < 4; round++) {
		fill_floats(plane->input_dtype, in, CONVERT_MOST);
		if (convert_elements(plane, in, CONVERT_MOST, stored, scales) < 0)
			abort();
		if (!restore_input(plane, stored, plane->dtype == MXINT8 ? scales : NULL,
				   CONVERT_MOST, again))
			return false;
	}
	return true;
}

TEST(what_was_converted_goes_back)
{
	static const uint32_t stored[] = {
		I8, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_I32, KVSCRATCH_DTYPE_I64, MXINT8,
	};

	for (size_t i = 0; i < ARRAY_SIZE(stored); i++)
		for (uint32_t input = F64; input <= KVSCRATCH_DTYPE_BF16; input++)
			for (uint32_t frac_bits = 0; frac_bits <= KVSCRATCH_MAX_FRAC_BITS; frac_bits++) {
				const struct kvscratch_plane plane = {
					.dtype = stored[i],
					.input_dtype = input,
					.frac_bits = frac_bits,
				};

				EXPECT_TRUE(goes_back(&plane))
					TH_LOG("%u from %u, %u bits", stored[i], input, frac_bits);
				if (stored[i] == MXINT8)
					break;
			}
}

static bool block_goes_back(uint32_t input_dtype, uint8_t scale, const int8_t *block)
{
	const struct kvscratch_plane plane = { .dtype = MXINT8, .input_dtype = input_dtype };
	uint64_t in[KVSCRATCH_MX_BLOCK];

	return restore_input(&plane, block, &scale, KVSCRATCH_MX_BLOCK, in);
}

/*
 * Every scale with every largest element and every other: what a conversion gives has an
 * element of 64 or more, but for the smallest scale, and none of -128.
 */
TEST(every_scale_and_element_goes_back)
{
	for (int scale = 0; scale <= 254; scale++)
		for (int largest = scale ? 64 : 0; largest <= 127; largest++)
			for (int first = -largest; first <= largest; first += KVSCRATCH_MX_BLOCK - 1) {
				int8_t block[KVSCRATCH_MX_BLOCK] = { largest };

				for (int i = 1; i < KVSCRATCH_MX_BLOCK; i++)
					block[i] = first + i - 1 <= largest ? first + i - 1 : -largest;
				EXPECT_TRUE(block_goes_back(F32, scale, block))
					TH_LOG("scale %d, %d, %d", scale, largest, first);
				EXPECT_TRUE(block_goes_back(F64, scale, block));
				EXPECT_TRUE(block_goes_back(KVSCRATCH_DTYPE_BF16, scale, block));
			}
}

TEST(what_no_conversion_gives_does_not_go_back)
{
	int8_t block[KVSCRATCH_MX_BLOCK] = { 0 };

	for (int scale = 0; scale <= 255; scale++) {
		block[0] = -128;
		EXPECT_FALSE(block_goes_back(F32, scale, block)) TH_LOG("scale %d", scale);
		if (!scale)
			continue;
		for (block[0] = 0; block[0] < 64; block[0]++) {
			EXPECT_FALSE(block_goes_back(F32, scale, block)) TH_LOG("scale %d", scale);
		}
	}
	block[0] = 127;
	EXPECT_FALSE(block_goes_back(F32, 255, block));
	EXPECT_FALSE(block_goes_back(KVSCRATCH_DTYPE_F16, 254, block));
}

/* Files: each test has a directory */

static char directory[64];

/* The path of @name in the directory of the test; of the latest two calls */
static const char *at(const char *name)
{
	static char paths[2][128];
	static int turn;

	turn = !turn;
	snprintf(paths[turn], sizeof(paths[turn]), "%s/%s", directory, name);
	return paths[turn];
}

static int remove_entry(const char *path, const struct stat *stat, int type, struct FTW *ftw)
{
	(void)stat, (void)type, (void)ftw;
	return remove(path);
}

/* How many files there are beside "." and ".." */
static int nr_entries(void)
{
	DIR *entries = opendir(directory);
	int count = -2;

	while (entries && readdir(entries))
		count++;
	closedir(entries);
	return count;
}

static void write_bytes(const char *path, const void *bytes, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, bytes, size) != (ssize_t)size)
		abort();
	close(fd);
}

static bool file_is(const char *path, const void *bytes, size_t size)
{
	char *found = malloc(size + 1);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool same = fd >= 0 && read(fd, found, size + 1) == (ssize_t)size &&
		    !memcmp(found, bytes, size);

	close(fd);
	free(found);
	return same;
}

FIXTURE(files) {
	struct kvscratch *pad;
};

static const float two_rows[2][3] = { { 1, 2, 3 }, { 4, 5, 6 } };

FIXTURE_SETUP(files)
{
	strcpy(directory, "/tmp/kvscratch-files-XXXXXX");
	ASSERT_NE(NULL, mkdtemp(directory));
	ASSERT_DONE(kvscratch_new(&self->pad, 8, 3, F32));
	ASSERT_DONE(kvscratch_append_rows(self->pad, two_rows, 2, 3));
}

FIXTURE_TEARDOWN(files)
{
	kvscratch_close(self->pad);
	EXPECT_EQ(0, nftw(directory, remove_entry, 8, FTW_DEPTH | FTW_PHYS));
}

static int save_one(struct kvscratch *pad, const char *name, const char *path)
{
	const struct kvscratch_named_pad named = { name, pad };

	return kvscratch_save(path, &named, 1, NULL, NULL);
}

/* Load a pad of the file at @path; 0 or what the library returned. */
static int load_from(struct kvscratch **pad, const char *path, const char *name,
		     uint64_t max_seq_len)
{
	struct kvscratch_file *file;
	int err = kvscratch_open_file(&file, path);

	if (err)
		return err;
	err = kvscratch_load(pad, file, name, max_seq_len, NULL, NULL);
	kvscratch_close_file(file);
	return err;
}

static int load_into(struct kvscratch *pad, const char *path, const char *name)
{
	struct kvscratch_file *file;
	int err = kvscratch_open_file(&file, path);

	if (err)
		return err;
	err = kvscratch_load_into(pad, file, name, NULL, NULL);
	kvscratch_close_file(file);
	return err;
}

static int open_and_close(const char *path)
{
	struct kvscratch_file *file;
	int err = kvscratch_open_file(&file, path);

	if (!err)
		kvscratch_close_file(file);
	return err;
}

static bool same_rows(struct kvscratch *a, struct kvscratch *b)
{
	struct kvscratch_tensor left, right;
	uint64_t elements;

	if (kvscratch_as_tensor(a, &left) || kvscratch_as_tensor(b, &right) ||
	    left.len != right.len || left.dim != right.dim || left.dtype != right.dtype)
		return false;
	elements = left.len * left.dim;
	return !memcmp(left.data, right.data, elements * kvscratch_dtype_size(left.dtype)) &&
	       (!left.scales || !memcmp(left.scales, right.scales, elements / KVSCRATCH_MX_BLOCK));
}

static uint64_t generation(struct kvscratch *pad)
{
	struct kvscratch_info info;

	return kvscratch_info(pad, &info) ? UINT64_MAX : info.generation;
}

/* Recognisable, and made fast where a row has megabytes: most of it is what begins it */
static void fill_long_row(uint8_t *row, size_t row_bytes, uint32_t seed)
{
	const size_t beginning = 4099;
	size_t filled = row_bytes < beginning ? row_bytes : beginning;

	fill_row(row, filled, seed);
	for (; filled < row_bytes; filled += beginning)
		memcpy(row + filled, row,
		       row_bytes - filled < beginning ? row_bytes - filled : beginning);
}

/* A pad that takes rows as they are stored, with @len recognisable ones */
static struct kvscratch *filled_pad(uint64_t max_seq_len, uint32_t dim, uint32_t dtype,
				    uint32_t len)
{
	struct kvscratch_info info;
	struct kvscratch *pad;
	uint8_t *row;

	if (kvscratch_new(&pad, max_seq_len, dim, dtype) || kvscratch_info(pad, &info))
		abort();
	row = malloc(info.row_bytes);
	for (uint32_t i = 0; i < len; i++) {
		fill_long_row(row, info.row_bytes, i);
		if (kvscratch_append(pad, row, dim))
			abort();
	}
	free(row);
	return pad;
}

/* What comes back */

TEST_F(files, every_dtype_comes_back_from_safetensors)
{
	for (uint32_t dtype = F64; dtype <= MXINT8; dtype++) {
		struct kvscratch *pad = filled_pad(7, 64, dtype, 5), *back;
		const struct kvscratch_saved_pad *saved;
		struct kvscratch_file *file;
		struct kvscratch_info info;
		unsigned int count;

		ASSERT_DONE(save_one(pad, "layer 0", at("pad.safetensors")));
		ASSERT_DONE(kvscratch_open_file(&file, at("pad.safetensors")));
		saved = kvscratch_file_pads(file, &count);
		ASSERT_EQ(1, count);
		EXPECT_STREQ("layer 0", saved->name);
		EXPECT_EQ(5, saved->len);
		EXPECT_EQ(7, saved->max_seq_len);
		EXPECT_EQ(1, saved->nr_planes);
		EXPECT_EQ(64, kvscratch_saved_plane(saved, 0)->dim);
		EXPECT_EQ(dtype, kvscratch_saved_plane(saved, 0)->dtype);
		EXPECT_EQ(dtype, kvscratch_saved_plane(saved, 0)->input_dtype);
		EXPECT_EQ(0, kvscratch_saved_plane(saved, 0)->frac_bits);
		EXPECT_STREQ("", kvscratch_saved_plane(saved, 0)->label);
		EXPECT_TRUE(saved->has_geometry);
		ASSERT_DONE(kvscratch_load(&back, file, NULL, 0, NULL, NULL));
		EXPECT_TRUE(same_rows(pad, back));
		ASSERT_DONE(kvscratch_info(back, &info));
		EXPECT_EQ(7, info.max_seq_len);
		EXPECT_EQ(dtype, info.input_dtype);
		EXPECT_EQ(0, info.generation);
		EXPECT_EQ(kvscratch_default_backend(), (int)kvscratch_backend(back));
		EXPECT_EQ(O_RDWR, kvscratch_access(back));
		kvscratch_close(back);
		kvscratch_close_file(file);
		kvscratch_close(pad);
	}
	EXPECT_EQ(1, nr_entries());
}

TEST_F(files, every_dtype_of_numpy_comes_back_from_npy)
{
	for (uint32_t dtype = F64; dtype <= U8; dtype++) {
		struct kvscratch *pad, *back;

		if (dtype == KVSCRATCH_DTYPE_BF16)
			continue;
		pad = filled_pad(7, 5, dtype, 6);
		ASSERT_DONE(save_one(pad, NULL, at("pad.npy")));
		ASSERT_DONE(load_from(&back, at("pad.npy"), NULL, 0));
		EXPECT_TRUE(same_rows(pad, back));
		EXPECT_EQ(6, kvscratch_capacity(back));
		kvscratch_close(back);
		ASSERT_DONE(load_from(&back, at("pad.npy"), "", 9));
		EXPECT_TRUE(same_rows(pad, back));
		EXPECT_EQ(9, kvscratch_capacity(back));
		kvscratch_close(back);
		kvscratch_close(pad);
	}
	EXPECT_EQ(1, nr_entries());
}

TEST_F(files, npy_has_no_type_for_bf16_and_mxint8)
{
	static const struct {
		uint32_t dtype;
		const char *words;
	} cases[] = {
		{ KVSCRATCH_DTYPE_BF16,
		  ".npy has no type for bf16: expected a name that ends in .safetensors" },
		{ MXINT8,
		  ".npy has no type for mxint8: expected a name that ends in .safetensors" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvscratch *pad = filled_pad(2, 32, cases[i].dtype, 1);

		EXPECT_ERROR(EOPNOTSUPP, cases[i].words, save_one(pad, "k0", at("pad.npy")));
		kvscratch_close(pad);
	}
	EXPECT_EQ(0, nr_entries());
}

TEST_F(files, the_bytes_of_npy)
{
	char expected[128 + sizeof(two_rows)];

	memset(expected, ' ', 128);
	memcpy(expected, "\x93NUMPY\1\0\x76\0", 10);
	memcpy(expected + 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 59);
	expected[127] = '\n';
	memcpy(expected + 128, two_rows, sizeof(two_rows));
	ASSERT_DONE(save_one(self->pad, NULL, at("pad.npy")));
	EXPECT_TRUE(file_is(at("pad.npy"), expected, sizeof(expected)));
}

TEST_F(files, the_bytes_of_safetensors)
{
	static const char header[] =
		"{\"__metadata__\":{\"kvscratch\":\"1\",\"k\\\"0.max_seq_len\":\"8\","
		"\"k\\\"0.dtype\":\"f32\",\"k\\\"0.input_dtype\":\"f32\","
		"\"k\\\"0.frac_bits\":\"0\"},"
		"\"k\\\"0\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}";
	char expected[192 + sizeof(two_rows)];
	uint64_t length = htole64(192 - 8);

	memset(expected, ' ', 192);
	memcpy(expected, &length, 8);
	memcpy(expected + 8, header, strlen(header));
	memcpy(expected + 192, two_rows, sizeof(two_rows));
	ASSERT_DONE(save_one(self->pad, "k\"0", at("pad.safetensors")));
	EXPECT_TRUE(file_is(at("pad.safetensors"), expected, sizeof(expected)));
}

TEST_F(files, pads_without_rows)
{
	struct kvscratch *pad = filled_pad(4, 32, MXINT8, 0), *back;
	const struct kvscratch_named_pad named[] = { { "a", pad }, { "b", pad } };

	ASSERT_DONE(kvscratch_save(at("none.safetensors"), named, 2, NULL, NULL));
	ASSERT_DONE(load_from(&back, at("none.safetensors"), "b", 0));
	EXPECT_EQ(0, kvscratch_len(back));
	EXPECT_EQ(4, kvscratch_capacity(back));
	EXPECT_EQ(32, kvscratch_dim(back));
	kvscratch_close(back);
	kvscratch_close(pad);

	ASSERT_DONE(kvscratch_clear(self->pad, false));
	ASSERT_DONE(save_one(self->pad, NULL, at("none.npy")));
	EXPECT_ERROR(EINVAL,
		     "expected a max_seq_len: the file has no rows and does not say it",
		     load_from(&back, at("none.npy"), NULL, 0));
	ASSERT_DONE(load_from(&back, at("none.npy"), NULL, 3));
	EXPECT_EQ(0, kvscratch_len(back));
	kvscratch_close(back);
	EXPECT_EQ(0, load_into(self->pad, at("none.npy"), NULL));
	EXPECT_EQ(0, kvscratch_len(self->pad));
}

/* The wide ones come first in the data, the pads in that order in the list. */
TEST_F(files, many_pads_in_one_file)
{
	static const uint32_t dtypes[] = { U8, F32, MXINT8, F64, KVSCRATCH_DTYPE_BF16, F32 };
	struct kvscratch_named_pad named[ARRAY_SIZE(dtypes)];
	const struct kvscratch_saved_pad *saved;
	static const char *const order[] = { "pad 3", "pad 1", "pad 5", "pad 4", "pad 0", "pad 2" };
	struct kvscratch_file *file;
	char names[ARRAY_SIZE(dtypes)][8];
	unsigned int count;

	for (size_t i = 0; i < ARRAY_SIZE(dtypes); i++) {
		snprintf(names[i], sizeof(names[i]), "pad %zu", i);
		named[i].name = names[i];
		named[i].pad = filled_pad(10, 32, dtypes[i], i + 1);
	}
	ASSERT_DONE(kvscratch_save(at("many.safetensors"), named, ARRAY_SIZE(named), NULL, NULL));
	ASSERT_DONE(kvscratch_open_file(&file, at("many.safetensors")));
	saved = kvscratch_file_pads(file, &count);
	ASSERT_EQ(ARRAY_SIZE(dtypes), count);
	for (size_t i = 0; i < count; i++)
		EXPECT_STREQ(order[i], saved[i].name);
	for (size_t i = 0; i < count; i++) {
		struct kvscratch *back;

		ASSERT_DONE(kvscratch_load(&back, file, names[i], 0, NULL, NULL));
		EXPECT_TRUE(same_rows(named[i].pad, back));
		kvscratch_close(back);
	}
	kvscratch_close_file(file);
	for (size_t i = 0; i < ARRAY_SIZE(dtypes); i++)
		kvscratch_close(named[i].pad);
}

/* A pad of @geometry with rows that were converted: of all magnitudes, and clamped ones */
static struct kvscratch *converted_pad(const struct kvscratch_geometry *geometry, uint32_t rows)
{
	struct kvscratch *pad;
	uint16_t half[64];
	double wide[64];
	float narrow[64];

	if (kvscratch_new_geometry(&pad, geometry))
		abort();
	for (uint32_t row = 0; row < rows; row++) {
		const void *input = narrow;

		for (uint32_t i = 0; i < geometry->dim; i++) {
			wide[i] = ((int)(i * 7919 + row * 104729) % 2001 - 1000) *
				  __builtin_ldexp(1, (int)(row * 5 % 37) - 24);
			narrow[i] = (float)wide[i];
			/* any bits but those of infinities and NaNs */
			half[i] = (i * 40503 + row * 30011) & 0xbbff;
		}
		if (geometry->input_dtype == F64)
			input = wide;
		else if (geometry->input_dtype != F32)
			input = half;
		if (kvscratch_append(pad, input, geometry->dim))
			abort();
	}
	return pad;
}

/* They convert again when they are loaded, and what they have is what they had. */
TEST_F(files, pads_that_convert)
{
	static const struct kvscratch_geometry geometries[] = {
		{ 40, 64, MXINT8, F32, 0 },
		{ 40, 64, MXINT8, F64, 0 },
		{ 40, 64, MXINT8, KVSCRATCH_DTYPE_F16, 0 },
		{ 40, 64, MXINT8, KVSCRATCH_DTYPE_BF16, 0 },
		{ 40, 33, I8, F32, 4 },
		{ 40, 33, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_F16, 0 },
		{ 40, 33, KVSCRATCH_DTYPE_I16, KVSCRATCH_DTYPE_BF16, 12 },
		{ 40, 33, KVSCRATCH_DTYPE_I32, F32, 30 },
		{ 40, 33, KVSCRATCH_DTYPE_I32, KVSCRATCH_DTYPE_BF16, 30 },
		{ 40, 33, KVSCRATCH_DTYPE_I64, F64, 62 },
		{ 40, 33, KVSCRATCH_DTYPE_I64, F32, 40 },
	};

	for (size_t i = 0; i < ARRAY_SIZE(geometries); i++) {
		struct kvscratch *pad = converted_pad(&geometries[i], 37), *back;
		const struct kvscratch_saved_pad *saved;
		struct kvscratch_file *file;
		struct kvscratch_info info;
		unsigned int count;

		ASSERT_DONE(save_one(pad, "k0", at("pad.safetensors")));
		ASSERT_DONE(kvscratch_open_file(&file, at("pad.safetensors")));
		saved = kvscratch_file_pads(file, &count);
		EXPECT_EQ(geometries[i].frac_bits, kvscratch_saved_plane(saved, 0)->frac_bits);
		EXPECT_EQ(geometries[i].input_dtype, kvscratch_saved_plane(saved, 0)->input_dtype);
		ASSERT_DONE(kvscratch_load(&back, file, NULL, 0, NULL, NULL));
		EXPECT_TRUE(same_rows(pad, back)) TH_LOG("geometry %zu", i);
		ASSERT_DONE(kvscratch_info(back, &info));
		EXPECT_EQ(geometries[i].input_dtype, info.input_dtype);
		EXPECT_EQ(geometries[i].frac_bits, info.frac_bits);
		kvscratch_close(back);
		/* behind rows that are there, and into one that takes rows as they are stored */
		ASSERT_DONE(kvscratch_truncate(pad, 3, false));
		EXPECT_EQ(0, kvscratch_load_into(pad, file, NULL, NULL, NULL));
		EXPECT_EQ(40, kvscratch_len(pad));
		back = NULL;
		ASSERT_DONE(kvscratch_new_geometry(&back, &(struct kvscratch_geometry){
			40, geometries[i].dim, geometries[i].dtype, 0, geometries[i].frac_bits }));
		EXPECT_EQ(0, kvscratch_load_into(back, file, NULL, NULL, NULL));
		EXPECT_EQ(37, kvscratch_len(back));
		kvscratch_close(back);
		kvscratch_close_file(file);
		kvscratch_close(pad);
	}
}

/* What no conversion gives, a pad that converts cannot have. */
TEST_F(files, rows_that_were_not_converted)
{
	static const struct kvscratch_geometry converting = { 4, 32, MXINT8, F32, 0 };
	struct kvscratch *plain, *pad;
	int8_t record[33] = { 1 };

	ASSERT_DONE(kvscratch_new(&plain, 4, 32, MXINT8));
	ASSERT_DONE(kvscratch_new_geometry(&pad, &converting));
	ASSERT_DONE(kvscratch_append(plain, record, 32));
	ASSERT_DONE(save_one(plain, "k0", at("pad.safetensors")));
	EXPECT_EQ(0, load_into(pad, at("pad.safetensors"), NULL));
	record[32] = 100;
	ASSERT_DONE(kvscratch_append(plain, record, 32));
	ASSERT_DONE(save_one(plain, "k0", at("pad.safetensors")));
	EXPECT_ERROR(EBADMSG, "tensor \"k0\": expected rows of mxint8 that were made of f32, got "
		     "others", load_into(pad, at("pad.safetensors"), NULL));
	EXPECT_EQ(1, kvscratch_len(pad));
	/* a scale that is no number */
	record[32] = -1;
	ASSERT_DONE(kvscratch_truncate(plain, 1, false));
	ASSERT_DONE(kvscratch_append(plain, record, 32));
	ASSERT_DONE(save_one(plain, "k0", at("pad.safetensors")));
	EXPECT_EQ(-EBADMSG, load_into(pad, at("pad.safetensors"), NULL));
	EXPECT_EQ(1, kvscratch_len(pad));
	kvscratch_close(pad);
	kvscratch_close(plain);
}

/* Several batches, whose rows do not fill them; MXINT8 has its planes apart in the file. */
TEST_F_TIMEOUT(files, rows_of_many_batches, TEST_SECONDS)
{
	static const struct {
		uint32_t dim;
		uint32_t dtype;
	} cases[] = { { 1000003, U8 }, { 1 << 19, MXINT8 }, { 5 << 20, U8 } };

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvscratch *pad = filled_pad(17, cases[i].dim, cases[i].dtype,
						   cases[i].dim > PIECE_BYTES ? 2 : 17);
		struct kvscratch *back;

		ASSERT_DONE(save_one(pad, "k0", at("pad.safetensors")));
		ASSERT_DONE(load_from(&back, at("pad.safetensors"), "k0", 0));
		EXPECT_TRUE(same_rows(pad, back));
		kvscratch_close(back);
		kvscratch_close(pad);
	}
}

TEST_F(files, rows_behind_others)
{
	struct kvscratch_tensor tensor;

	ASSERT_DONE(save_one(self->pad, NULL, at("pad.npy")));
	ASSERT_DONE(load_into(self->pad, at("pad.npy"), NULL));
	ASSERT_DONE(kvscratch_as_tensor(self->pad, &tensor));
	EXPECT_EQ(4, tensor.len);
	EXPECT_EQ(0, memcmp(tensor.data, two_rows, sizeof(two_rows)));
	EXPECT_EQ(0, memcmp((const char *)tensor.data + sizeof(two_rows), two_rows,
			    sizeof(two_rows)));
	EXPECT_EQ(0, generation(self->pad));
}

/* A file that does not say how many fraction bits there are goes with any. */
TEST_F(files, integers_of_others_into_fractions)
{
	const struct kvscratch_geometry geometry = { 4, 3, KVSCRATCH_DTYPE_I32, 0, 8 };
	struct kvscratch *plain = filled_pad(4, 3, KVSCRATCH_DTYPE_I32, 2), *fractions;

	ASSERT_DONE(kvscratch_new_geometry(&fractions, &geometry));
	ASSERT_DONE(save_one(plain, NULL, at("i32.npy")));
	ASSERT_DONE(save_one(plain, "k0", at("i32.safetensors")));
	EXPECT_EQ(0, load_into(fractions, at("i32.npy"), NULL));
	EXPECT_ERROR(EINVAL, "fraction bits: expected 8, got 0",
		     load_into(fractions, at("i32.safetensors"), NULL));
	EXPECT_EQ(2, kvscratch_len(fractions));
	kvscratch_close(fractions);
	kvscratch_close(plain);
}

/* The library's calls of openat() end here: file systems without files that have no name */
static bool without_nameless;

int openat64(int from, const char *path, int flags, ...)
{
	va_list arguments;
	mode_t mode;

	va_start(arguments, flags);
	mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
	va_end(arguments);
	if (without_nameless && (flags & O_TMPFILE) == O_TMPFILE) {
		errno = EOPNOTSUPP;
		return -1;
	}
	return syscall(SYS_openat, from, path, flags, mode);
}

/* What is refused: saving */

TEST_F(files, names_and_pads_that_cannot_be_saved)
{
	static const struct {
		const char *path;
		const char *names[2];
		unsigned int count;
		const char *words;
	} cases[] = {
		{ "pad", { "a" }, 1,
		  "expected the name of a file that ends in .npy or .safetensors" },
		{ "npy", { "a" }, 1,
		  "expected the name of a file that ends in .npy or .safetensors" },
		{ "a.npy", { "a", "b" }, 2, ".npy has room for one pad: expected 1, got 2" },
		{ "a.npy", { "a" }, 0, ".npy has room for one pad: expected 1, got 0" },
		{ "a.safetensors", { "a" }, 0, "expected at least one pad, got none" },
		{ "a.safetensors", { "a", NULL }, 2, "expected a name for each pad, got none" },
		{ "a.safetensors", { "a", "a" }, 2,
		  "expected each pad once, got two named \"a\"" },
		{ "a.safetensors", { "", "b" }, 2, "expected a name in UTF-8, neither empty nor "
		  "__metadata__, got \"\"" },
		{ "a.safetensors", { "__metadata__", "b" }, 2, "expected a name in UTF-8, neither "
		  "empty nor __metadata__, got \"__metadata__\"" },
		{ "a.safetensors", { "a\xff\x1b[m", "b" }, 2, "expected a name in UTF-8, neither "
		  "empty nor __metadata__, got \"a??[m\"" },
		{ "a.safetensors", { "\xed\xa0\x80", "b" }, 2, "expected a name in UTF-8, neither "
		  "empty nor __metadata__, got \"???\"" },
		{ "a.safetensors", { "\xc0\xaf", "b" }, 2, "expected a name in UTF-8, neither "
		  "empty nor __metadata__, got \"??\"" },
		{ "a.safetensors", { "\xf4\x90\x80\x80", "b" }, 2, "expected a name in UTF-8, "
		  "neither empty nor __metadata__, got \"????\"" },
		{ "a.safetensors", { "\xe2\x82", "b" }, 2, "expected a name in UTF-8, neither "
		  "empty nor __metadata__, got \"??\"" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		const struct kvscratch_named_pad named[] = {
			{ cases[i].names[0], self->pad },
			{ cases[i].names[1], self->pad },
		};

		EXPECT_ERROR(EINVAL, cases[i].words,
			     kvscratch_save(at(cases[i].path), named, cases[i].count, NULL, NULL));
	}
	EXPECT_EQ(0, nr_entries());
}

TEST_F(files, scales_are_a_tensor_too)
{
	struct kvscratch *scaled = filled_pad(2, 32, MXINT8, 1);
	const struct kvscratch_named_pad named[] = { { "k", scaled }, { "k.scales", self->pad } };

	EXPECT_ERROR(EINVAL, "expected each tensor once, got two named \"k.scales\"",
		     kvscratch_save(at("a.safetensors"), named, 2, NULL, NULL));
	kvscratch_close(scaled);
	EXPECT_EQ(0, nr_entries());
}

TEST_F(files, names_of_any_utf8)
{
	static const char *const names[] = {
		"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", "\n\t\x01\x7f\"\\/", "a.scales",
		"kvscratch",
		"a name of more than sixty-four bytes, for which no message has room, but a file",
	};
	struct kvscratch_named_pad named[ARRAY_SIZE(names)];

	for (size_t i = 0; i < ARRAY_SIZE(names); i++)
		named[i] = (struct kvscratch_named_pad){ names[i], self->pad };
	ASSERT_DONE(kvscratch_save(at("a.safetensors"), named, ARRAY_SIZE(names), NULL, NULL));
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		struct kvscratch *back;

		ASSERT_DONE(load_from(&back, at("a.safetensors"), names[i], 0));
		EXPECT_TRUE(same_rows(self->pad, back));
		kvscratch_close(back);
	}
}

TEST_F(files, handles_that_may_not_read)
{
	struct kvscratch *writer;
	int err = kvscratch_attach(&writer, kvscratch_fd(self->pad), O_WRONLY);

	/* not every backend has them */
	if (err == -EOPNOTSUPP)
		return;
	ASSERT_DONE(err);
	EXPECT_ERROR(EBADF, "expected a handle open for read, got one for write only",
		     save_one(writer, NULL, at("a.npy")));
	EXPECT_EQ(0, nr_entries());
	/* loading needs only that */
	ASSERT_DONE(save_one(self->pad, NULL, at("a.npy")));
	EXPECT_EQ(0, load_into(writer, at("a.npy"), NULL));
	EXPECT_EQ(4, kvscratch_len(self->pad));
	kvscratch_close(writer);
}

/* What is refused: places */

TEST_F(files, places_that_have_no_file)
{
	char deep[128];

	ASSERT_EQ(0, mkdir(at("d.npy"), 0755));
	EXPECT_ERROR(EINVAL, "expected a regular file or none, got a directory",
		     save_one(self->pad, NULL, at("d.npy")));
	EXPECT_ERROR(EBADMSG, "expected a regular file, got a directory",
		     open_and_close(at("d.npy")));
	ASSERT_EQ(0, mkfifo(at("f.npy"), 0644));
	EXPECT_ERROR(EINVAL, "expected a regular file or none, got a FIFO",
		     save_one(self->pad, NULL, at("f.npy")));
	EXPECT_ERROR(EBADMSG, "expected a regular file, got a FIFO",
		     open_and_close(at("f.npy")));
	/* a device in the directory itself, where one may be made */
	if (!mknod(at("n.npy"), S_IFCHR | 0600, makedev(1, 3))) {
		EXPECT_ERROR(EINVAL, "expected a regular file or none, got a character device",
			     save_one(self->pad, NULL, at("n.npy")));
		ASSERT_EQ(0, unlink(at("n.npy")));
	}
	ASSERT_EQ(0, symlink("f.npy", at("l.npy")));
	EXPECT_ERROR(EINVAL, "expected a regular file or none, got a FIFO",
		     save_one(self->pad, NULL, at("l.npy")));
	ASSERT_EQ(0, unlink(at("l.npy")));
	ASSERT_EQ(0, symlink("nothing.npy", at("l.npy")));
	EXPECT_ERROR(EINVAL, "expected a regular file or none, got a link to nothing",
		     save_one(self->pad, NULL, at("l.npy")));
	ASSERT_EQ(0, unlink(at("l.npy")));
	EXPECT_ERROR(ENOENT, "cannot open the file: No such file or directory", open_and_close(""));
	snprintf(deep, sizeof(deep), "%s/none/a.npy", directory);
	EXPECT_ERROR(ENOENT, "cannot open the directory of the file: No such file or directory",
		     save_one(self->pad, NULL, deep));
	EXPECT_ERROR(ENOENT, "cannot open the file: No such file or directory",
		     open_and_close(at("none.npy")));
	snprintf(deep, sizeof(deep), "%s/f.npy/a.npy", directory);
	EXPECT_ERROR(ENOTDIR, "cannot look at the file: Not a directory",
		     save_one(self->pad, NULL, deep));
	EXPECT_EQ(2, nr_entries());
}

/* Without the privileges of root, which no mode keeps out */
static void drop_privileges(void)
{
	if (!geteuid())
		CHILD_CHECK(!setgid(65534) && !setuid(65534));
}

TEST_F(files, directories_that_may_not_be_written)
{
	pid_t child;

	ASSERT_DONE(save_one(self->pad, NULL, at("a.npy")));
	ASSERT_EQ(0, chmod(at("a.npy"), 0));
	ASSERT_EQ(0, chmod(directory, 0555));
	child = fork_child();
	if (!child) {
		drop_privileges();
		CHILD_CHECK(save_one(self->pad, NULL, at("a.npy")) == -EACCES);
		CHILD_CHECK(!strcmp(kvscratch_error(),
				    "cannot make a file in the directory: Permission denied"));
		CHILD_CHECK(open_and_close(at("a.npy")) == -EACCES);
		CHILD_CHECK(!strcmp(kvscratch_error(), "cannot open the file: Permission denied"));
		_exit(0);
	}
	EXPECT_EQ(0, wait_for(child));
	ASSERT_EQ(0, chmod(directory, 0755));
	EXPECT_EQ(1, nr_entries());
}

/* What is refused: files */

static void write_safetensors(const char *path, const char *header, size_t length,
			      size_t data_bytes)
{
	size_t size = 8 + length + data_bytes;
	uint64_t word = htole64(length);
	char *bytes = calloc(1, size);

	memcpy(bytes, &word, 8);
	memcpy(bytes + 8, header, length);
	write_bytes(path, bytes, size);
	free(bytes);
}

#define TENSOR(name, dtype, shape, offsets) "\"" name "\":{\"dtype\":\"" dtype "\"," \
	"\"shape\":[" shape "],\"data_offsets\":[" offsets "]}"

TEST_F(files, safetensors_headers_that_are_refused)
{
	static const struct {
		const char *header;
		size_t data_bytes;
		const char *words;
	} cases[] = {
		/* JSON */
		{ "", 0, "safetensors header: expected '{' at byte 0, got its end" },
		{ " {}", 0, "safetensors header: expected '{' at byte 0, got byte 0x20" },
		{ "[]", 0, "safetensors header: expected '{' at byte 0, got '['" },
		{ "{", 0,
		  "safetensors header: expected the name of a tensor at byte 1, got its end" },
		{ "{} x", 0, "safetensors header: expected nothing behind the object at byte 3, "
		  "got 'x'" },
		{ "{}{}", 0, "safetensors header: expected nothing behind the object at byte 2, "
		  "got '{'" },
		{ "{,}", 0,
		  "safetensors header: expected the name of a tensor at byte 1, got ','" },
		{ "{\"a\"}", 0, "safetensors header: expected ':' at byte 4, got '}'" },
		{ "{\"a\":{\"dtype\":\"U8\",}}", 0,
		  "safetensors header: expected a key of a tensor at byte 19, got '}'" },
		{ "{\"a\":{\"dtype\":\"U8\" \"shape\":[1]}}", 0,
		  "safetensors header: expected ',' or '}' at byte 19, got '\"'" },
		{ "{" TENSOR("a", "U8", "1 1", "0,1") "}", 1,
		  "safetensors header: expected ',' or ']' at byte 30, got '1'" },
		{ "{" TENSOR("a", "U8", "1,", "0,1") "}", 1,
		  "safetensors header: expected a whole number at byte 30, got ']'" },
		{ "{" TENSOR("a", "U8", "-1", "0,1") "}", 1,
		  "safetensors header: expected a whole number at byte 28, got '-'" },
		{ "{" TENSOR("a", "U8", "1.0", "0,1") "}", 1,
		  "safetensors header: expected ',' or ']' at byte 29, got '.'" },
		{ "{" TENSOR("a", "U8", "1e0", "0,1") "}", 1,
		  "safetensors header: expected ',' or ']' at byte 29, got 'e'" },
		{ "{" TENSOR("a", "U8", "01", "0,1") "}", 1,
		  "safetensors header: expected no digit behind a leading 0 at byte 29, got '1'" },
		{ "{" TENSOR("a", "U8", "true", "0,1") "}", 1,
		  "safetensors header: expected a whole number at byte 28, got 't'" },
		{ "{" TENSOR("a", "U8", "18446744073709551616", "0,1") "}", 1,
		  "safetensors header: expected a number below 2^64 at byte 47, got '6'" },
		{ "{" TENSOR("a", "U8", "[1]", "0,1") "}", 1,
		  "safetensors header: expected a whole number at byte 28, got '['" },
		{ "{\"a\":[[[[[[[[[[[[[[[[", 0,
		  "safetensors header: expected an object as what a tensor is at byte 5, got '['" },
		{ "{\"a\":{\"dtype\":{\"dtype\":{", 0,
		  "safetensors header: expected a string as dtype at byte 14, got '{'" },
		{ "{\"__metadata__\":{\"a\":{\"a\":{", 0,
		  "safetensors header: expected a string in __metadata__ at byte 21, got '{'" },
		/* strings */
		{ "{\"a", 0, "safetensors header: expected a character of UTF-8 or the end of a "
		  "string at byte 3, got its end" },
		{ "{\"a\n\":0}", 0, "safetensors header: expected a character of UTF-8 or the end "
		  "of a string at byte 3, got byte 0x0a" },
		{ "{\"a\xff\":0}", 0, "safetensors header: expected a character of UTF-8 or the "
		  "end of a string at byte 3, got byte 0xff" },
		{ "{\"\xc0\x80\":0}", 0, "safetensors header: expected a character of UTF-8 or the "
		  "end of a string at byte 2, got byte 0xc0" },
		{ "{\"\xe2\x82", 0, "safetensors header: expected a character of UTF-8 or the "
		  "end of a string at byte 2, got byte 0xe2" },
		{ "{\"\\x\":0}", 0, "safetensors header: expected an escape of JSON at byte 3, "
		  "got 'x'" },
		{ "{\"\\", 0,
		  "safetensors header: expected an escape of JSON at byte 3, got its end" },
		{ "{\"\\u12g4\":0}", 0, "safetensors header: expected a hexadecimal digit at byte "
		  "6, got 'g'" },
		{ "{\"\\u12", 0, "safetensors header: expected a hexadecimal digit at byte 6, "
		  "got its end" },
		{ "{\"a\\u0000b\":0}", 0, "safetensors header: expected no \\u0000 in a string, "
		  "got one before byte 9" },
		{ "{\"\\ud83d\":0}", 0, "safetensors header: expected both halves of a UTF-16 "
		  "pair, got one of them before byte 8" },
		{ "{\"\\ude00\":0}", 0, "safetensors header: expected both halves of a UTF-16 "
		  "pair, got one of them before byte 8" },
		{ "{\"\\ud83d\\u0041\":0}", 0, "safetensors header: expected both halves of a "
		  "UTF-16 pair, got one of them before byte 14" },
		/* tensors */
		{ "{\"a\":{}}", 0,
		  "tensor \"a\": expected dtype, shape and data_offsets, got no dtype" },
		{ "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}", 0,
		  "tensor \"a\": expected dtype, shape and data_offsets, got no shape" },
		{ "{\"a\":{\"dtype\":\"U8\",\"shape\":[0]}}", 0,
		  "tensor \"a\": expected dtype, shape and data_offsets, got no data_offsets" },
		{ "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", 0,
		  "tensor \"a\": expected dtype, shape and data_offsets, got a second \"dtype\"" },
		{ "{\"a\\u001b\":{\"strides\":[1]}}", 0,
		  "tensor \"a?\": expected dtype, shape and data_offsets, got no dtype" },
		/* what is passed over is JSON as well */
		{ "{\"a\":{\"x\":[1,]}}", 0,
		  "safetensors header: expected a value of JSON at byte 13, got ']'" },
		{ "{\"a\":{\"x\":01}}", 0,
		  "safetensors header: expected ',' or '}' at byte 11, got '1'" },
		{ "{\"a\":{\"x\":-}}", 0,
		  "safetensors header: expected a value of JSON at byte 11, got '}'" },
		{ "{\"a\":{\"x\":1.}}", 0,
		  "safetensors header: expected a value of JSON at byte 12, got '}'" },
		{ "{\"a\":{\"x\":1e+}}", 0,
		  "safetensors header: expected a value of JSON at byte 13, got '}'" },
		{ "{\"a\":{\"x\":nul}}", 0,
		  "safetensors header: expected a value of JSON at byte 10, got 'n'" },
		{ "{\"a\":{\"x\":{1:2}}}", 0,
		  "safetensors header: expected a key at byte 11, got '1'" },
		{ "{\"a\":{\"x\":{\"y\"}}}", 0,
		  "safetensors header: expected ':' at byte 14, got '}'" },
		{ "{\"a\":{\"x\":", 0,
		  "safetensors header: expected a value of JSON at byte 10, got its end" },
		{ "{\"a\":{\"x\":[[[[[[[[[[", 0,
		  "safetensors header: expected a value of JSON at byte 20, got its end" },
		{ "{\"__metadata__\":nul}", 0, "safetensors header: expected an object as "
		  "__metadata__ at byte 16, got 'n'" },
		{ "{\"__metadata__\":null,\"__metadata__\":null}", 0,
		  "expected one __metadata__, got two" },
		{ "{" TENSOR("a", "F8_E4M3", "1,1", "0,1") "}", 1, "tensor \"a\": expected a dtype "
		  "of F64 F32 F16 BF16 I64 I32 I16 I8 or U8, got \"F8_E4M3\"" },
		{ "{" TENSOR("a", "u8", "1,1", "0,1") "}", 1, "tensor \"a\": expected a dtype of "
		  "F64 F32 F16 BF16 I64 I32 I16 I8 or U8, got \"u8\"" },
		{ "{" TENSOR("a", "U8", "1,1,1,1,1,1,1,1,1", "0,1") "}", 1, "safetensors header: "
		  "expected a list of at most 8 numbers as shape at byte 44, got '1'" },
		{ "{" TENSOR("a", "U8", "1,1", "0") "}", 1, "safetensors header: expected a list "
		  "of two numbers as data_offsets at byte 51, got '}'" },
		{ "{" TENSOR("a", "U8", "1,1", "0,1,2") "}", 1, "safetensors header: expected a "
		  "list of two numbers as data_offsets at byte 53, got '2'" },
		/* what has to hold across them */
		{ "{" TENSOR("a", "U8", "1,1", "0,1") ","
		  TENSOR("\\u0061", "U8", "1,1", "1,2") "}", 2,
		  "expected each tensor once, got two named \"a\"" },
		{ "{\"__metadata__\":{},\"__metadata__\":{}}", 0,
		  "expected one __metadata__, got two" },
		{ "{\"__metadata__\":{\"x\":\"1\",\"y\":\"1\",\"x\":\"1\"}}", 0,
		  "__metadata__: expected each key once, got two named \"x\"" },
		{ "{" TENSOR("a", "F32", "2,3", "0,23") "}", 23,
		  "tensor \"a\": expected 24 bytes by its shape, got data_offsets [0, 23]" },
		{ "{" TENSOR("a", "U8", "1,1", "1,0") "}", 1,
		  "tensor \"a\": expected 1 bytes by its shape, got data_offsets [1, 0]" },
		{ "{" TENSOR("a", "F64", "2305843009213693952,1", "0,0") "}", 0,
		  "tensor \"a\": expected less than 2^64 bytes by its shape, got more" },
		{ "{" TENSOR("a", "U8", "4294967296,4294967296,0", "0,0") "}", 0,
		  "tensor \"a\": expected less than 2^64 bytes by its shape, got more" },
		{ "{" TENSOR("a", "U8", "1,2", "0,2") "," TENSOR("b", "U8", "1,2", "1,3") "}", 3,
		  "tensor \"b\": expected it to begin at 2, where the one before ends, got an "
		  "overlap back to 1" },
		{ "{" TENSOR("b", "U8", "1,2", "3,5") "," TENSOR("a", "U8", "1,2", "0,2") "}", 5,
		  "tensor \"b\": expected it to begin at 2, where the one before ends, got a gap "
		  "up to 3" },
		{ "{" TENSOR("a", "U8", "1,1", "1,2") "}", 2,
		  "tensor \"a\": expected it to begin at 0, where the one before ends, got a gap "
		  "up to 1" },
		{ "{" TENSOR("a", "U8", "1,2", "18446744073709551615,1") "}", 2, "tensor \"a\": "
		  "expected 2 bytes by its shape, got data_offsets [18446744073709551615, 1]" },
		{ "{" TENSOR("a", "U8", "1,2", "0,2") "}", 3,
		  "expected 2 bytes behind the header, got 3" },
		{ "{" TENSOR("a", "U8", "1,2", "0,2") "}", 1,
		  "expected 2 bytes behind the header, got 1" },
		{ "{}", 1, "expected 0 bytes behind the header, got 1" },
		/* pads */
		{ "{" TENSOR("a", "U8", "2", "0,2") "}", 2,
		  "tensor \"a\": expected a shape of [rows, dim], got 1 dimensions" },
		{ "{" TENSOR("a", "U8", "1,2,1", "0,2") "}", 2,
		  "tensor \"a\": expected a shape of [rows, dim], got 3 dimensions" },
		{ "{" TENSOR("a", "U8", "2,0", "0,0") "}", 0,
		  "tensor \"a\": dim: expected at least 1, got 0" },
		{ "{" TENSOR("a", "U8", "0,16777217", "0,0") "}", 0,
		  "tensor \"a\": expected rows of at most 16777216 elements, got 16777217" },
		{ "{" TENSOR("a", "F64", "0,16777216", "0,0") "}", 0, "tensor \"a\": dim: expected "
		  "rows of at most 16777216 bytes, got 16777216 elements of 8" },
		{ "{" TENSOR("a", "U8", "4294967296,0", "0,0") "}", 0,
		  "tensor \"a\": expected at most 4294967295 rows, got 4294967296" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		write_safetensors(at("a.safetensors"), cases[i].header, strlen(cases[i].header),
				  cases[i].data_bytes);
		EXPECT_ERROR(EBADMSG, cases[i].words, open_and_close(at("a.safetensors")));
	}
	/* a NUL ends strings of C only */
	write_safetensors(at("a.safetensors"), "{}\0", 3, 0);
	EXPECT_ERROR(EBADMSG, "safetensors header: expected nothing behind the object at byte 2, "
		     "got byte 0x00", open_and_close(at("a.safetensors")));
	write_safetensors(at("a.safetensors"), "{\"\0\":0}", 7, 0);
	EXPECT_ERROR(EBADMSG, "safetensors header: expected a character of UTF-8 or the end of a "
		     "string at byte 2, got byte 0x00", open_and_close(at("a.safetensors")));
}

#define MAX_SEQ_LEN "to 4294967295 as max_seq_len in __metadata__, got "
#define SCALES "expected its scales as a tensor of U8 [rows, dim / 32] named NAME.scales"

TEST_F(files, metadata_that_is_refused)
{
	static const char tensor[] = TENSOR("a", "U8", "2,32", "0,64");
	static const char scaled[] = TENSOR("a", "I8", "2,32", "0,64");
	static const struct {
		const char *max_seq_len, *dtype, *input_dtype, *frac_bits;
		const char *tensors;
		size_t data_bytes;
		const char *words;
	} cases[] = {
		{ "", "u8", "u8", "0", tensor, 64, "expected 2 " MAX_SEQ_LEN "\"\"" },
		{ "1", "u8", "u8", "0", tensor, 64, "expected 2 " MAX_SEQ_LEN "\"1\"" },
		{ "0", "u8", "u8", "0", TENSOR("a", "U8", "0,32", "0,0"), 0,
		  "expected 1 " MAX_SEQ_LEN "\"0\"" },
		{ "4294967296", "u8", "u8", "0", tensor, 64,
		  "expected 2 " MAX_SEQ_LEN "\"4294967296\"" },
		{ "99999999999999999999", "u8", "u8", "0", tensor, 64,
		  "expected 2 " MAX_SEQ_LEN "\"99999999999999999999\"" },
		{ " 9", "u8", "u8", "0", tensor, 64, "expected 2 " MAX_SEQ_LEN "\" 9\"" },
		{ "9", "u9", "u8", "0", tensor, 64,
		  "expected a dtype as dtype in __metadata__, got \"u9\"" },
		{ "9", "i8", "i8", "0", tensor, 64,
		  "expected that of the tensor as dtype in __metadata__, got \"i8\"" },
		{ "9", "u8", "", "0", tensor, 64,
		  "expected a dtype as input_dtype in __metadata__, got \"\"" },
		{ "9", "u8", "f32", "0", tensor, 64,
		  "input dtype: expected u8 for a dtype of u8, got f32" },
		{ "9", "i8", "i8", "63", scaled, 64,
		  "expected 0 to 62 as frac_bits in __metadata__, got \"63\"" },
		{ "9", "i8", "i8", "", scaled, 64,
		  "expected 0 to 62 as frac_bits in __metadata__, got \"\"" },
		{ "9", "u8", "u8", "1", tensor, 64,
		  "fraction bits: expected at most 0 for u8, got 1" },
		{ "9", "mxint8", "mxint8", "0", scaled, 64, SCALES },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "I8", "2,32", "0,64") ","
		  TENSOR("a.scales", "U8", "1,1", "64,65"), 65, SCALES },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "I8", "2,32", "0,64") ","
		  TENSOR("a.scales", "U8", "2,2", "64,68"), 68, SCALES },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "I8", "2,32", "0,64") ","
		  TENSOR("a.scales", "U8", "2,1,1", "64,66"), 66, SCALES },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "I8", "2,32", "0,64") ","
		  TENSOR("a.scales", "I8", "2,1", "64,66"), 66, SCALES },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "I8", "1,63", "0,63") ","
		  TENSOR("a.scales", "U8", "1,1", "63,64"), 64,
		  "dim: expected a multiple of 32 for mxint8, got 63" },
		{ "9", "mxint8", "mxint8", "0", TENSOR("a", "U8", "2,32", "0,64") ","
		  TENSOR("a.scales", "U8", "2,1", "64,66"), 66,
		  "expected that of the tensor as dtype in __metadata__, got \"mxint8\"" },
	};
	char header[1024], words[256];

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		snprintf(header, sizeof(header), "{\"__metadata__\":{\"kvscratch\":\"1\","
			 "\"a.max_seq_len\":\"%s\",\"a.dtype\":\"%s\",\"a.input_dtype\":\"%s\","
			 "\"a.frac_bits\":\"%s\"},%s}", cases[i].max_seq_len, cases[i].dtype,
			 cases[i].input_dtype, cases[i].frac_bits, cases[i].tensors);
		snprintf(words, sizeof(words), "%s \"a\": %s",
			 strstr(cases[i].words, "max_seq_len") ? "pad" : "tensor", cases[i].words);
		write_safetensors(at("a.safetensors"), header, strlen(header), cases[i].data_bytes);
		EXPECT_ERROR(EBADMSG, words, open_and_close(at("a.safetensors")));
	}
}

TEST_F(files, scales_without_elements)
{
	static const char header[] = "{\"__metadata__\":{\"kvscratch\":\"1\","
				     "\"a.dtype\":\"mxint8\"},"
				     TENSOR("a.scales", "U8", "2,1", "0,2") "}";

	write_safetensors(at("a.safetensors"), header, strlen(header), 2);
	EXPECT_ERROR(EBADMSG, "pad \"a.scales\": expected 2 " MAX_SEQ_LEN "\"\"",
		     open_and_close(at("a.safetensors")));
}

TEST_F(files, versions_of_metadata)
{
	static const char later[] = "{\"__metadata__\":{\"kvscratch\":\"3\"}}";
	static const char bare[] = "{\"__metadata__\":{\"kvscratch\":\"1\"},"
				   TENSOR("a", "U8", "1,2", "0,2") "}";

	write_safetensors(at("a.safetensors"), later, strlen(later), 0);
	EXPECT_ERROR(EBADMSG, "expected version 1 or 2 as kvscratch in __metadata__, got \"3\"",
		     open_and_close(at("a.safetensors")));
	write_safetensors(at("a.safetensors"), bare, strlen(bare), 2);
	EXPECT_ERROR(EBADMSG, "pad \"a\": expected 1 " MAX_SEQ_LEN "\"\"",
		     open_and_close(at("a.safetensors")));
}

/* Nobody's metadata but ours, and none at all */
TEST_F(files, safetensors_of_others)
{
	static const char header[] = "{\"__metadata__\" : {\"format\":\"pt\"}, "
		TENSOR("model.k", "F16", "2,3", "0,12") ",\n"
		TENSOR("a.scales", "U8", "0,7", "12,12") "}   ";
	const struct kvscratch_saved_pad *saved;
	struct kvscratch_file *file;
	struct kvscratch *back;
	unsigned int count;

	write_safetensors(at("a.safetensors"), header, strlen(header), 12);
	ASSERT_DONE(kvscratch_open_file(&file, at("a.safetensors")));
	saved = kvscratch_file_pads(file, &count);
	ASSERT_EQ(2, count);
	EXPECT_STREQ("model.k", saved[0].name);
	EXPECT_EQ(2, saved[0].len);
	EXPECT_EQ(2, saved[0].max_seq_len);
	EXPECT_EQ(1, saved[0].nr_planes);
	EXPECT_EQ(KVSCRATCH_DTYPE_F16, kvscratch_saved_plane(&saved[0], 0)->dtype);
	EXPECT_EQ(KVSCRATCH_DTYPE_F16, kvscratch_saved_plane(&saved[0], 0)->input_dtype);
	EXPECT_FALSE(saved[0].has_geometry);
	EXPECT_STREQ("a.scales", saved[1].name);
	EXPECT_EQ(0, saved[1].len);
	ASSERT_DONE(kvscratch_load(&back, file, "model.k", 5, NULL, NULL));
	EXPECT_EQ(5, kvscratch_capacity(back));
	EXPECT_EQ(2, kvscratch_len(back));
	kvscratch_close(back);
	kvscratch_close_file(file);

	write_safetensors(at("a.safetensors"), "{}", 2, 0);
	ASSERT_DONE(kvscratch_open_file(&file, at("a.safetensors")));
	kvscratch_file_pads(file, &count);
	EXPECT_EQ(0, count);
	EXPECT_ERROR(EINVAL, "expected the name of a pad: the file has 0 of them, none",
		     kvscratch_load(&back, file, NULL, 0, NULL, NULL));
	kvscratch_close_file(file);
	kvscratch_close_file(NULL);
}

/* The format's own library reads these, too. */
TEST_F(files, safetensors_with_more_than_we_know)
{
	static const char header[] = "{\"__metadata__\":null,\"a\":{\"quantization\": {\"group\" : "
		"[1, -2.5e+3, {}, [], \"\\u00e9\"] ,\"none\":null }, \"dtype\":\"U8\",\"x\":true,"
		"\"shape\":[1,2],\"x\":false,\"data_offsets\":[0,2]}}";
	char nested[512] = "{\"a\":{\"x\":";
	struct kvscratch *back;

	write_safetensors(at("a.safetensors"), header, strlen(header), 2);
	ASSERT_DONE(load_from(&back, at("a.safetensors"), "a", 0));
	EXPECT_EQ(1, kvscratch_len(back));
	kvscratch_close(back);

	/* as deep as may be, and one deeper */
	memset(nested + strlen(nested), '[', 101);
	write_safetensors(at("a.safetensors"), nested, strlen(nested), 0);
	EXPECT_ERROR(EBADMSG, "safetensors header: expected at most 100 values in one another, got "
		     "more at byte 111", open_and_close(at("a.safetensors")));
	memset(nested + 10, ' ', 1);
	memset(nested + 111, ']', 100);
	strcpy(nested + 211, "," "\"dtype\":\"U8\",\"shape\":[1,2],\"data_offsets\":[0,2]}}");
	write_safetensors(at("a.safetensors"), nested, strlen(nested), 2);
	EXPECT_EQ(0, open_and_close(at("a.safetensors"))) TH_LOG("%s", kvscratch_error());
}

/* A file may be small and say that its pads are large. */
TEST_F(files, claims_beyond_the_rows)
{
	static const char form[] = "{\"__metadata__\":{\"kvscratch\":\"1\",\"a.max_seq_len\":\"%s\","
		"\"a.dtype\":\"u8\",\"a.input_dtype\":\"u8\",\"a.frac_bits\":\"0\"},"
		TENSOR("a", "U8", "1,4", "0,4") "}";
	char header[256];
	struct kvscratch *back;

	snprintf(header, sizeof(header), form, "400000000");
	write_safetensors(at("a.safetensors"), header, strlen(header), 4);
	EXPECT_ERROR(EINVAL, "expected a max_seq_len: with what the file says its pads would take "
		     "1600000000 bytes, and it has 182", load_from(&back, at("a.safetensors"), NULL, 0));
	ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 2));
	EXPECT_EQ(2, kvscratch_capacity(back));
	kvscratch_close(back);
	/* what every machine has is not asked for */
	snprintf(header, sizeof(header), form, "1000000");
	write_safetensors(at("a.safetensors"), header, strlen(header), 4);
	ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 0));
	EXPECT_EQ(1000000, kvscratch_capacity(back));
	kvscratch_close(back);
}

static void write_beginning(const char *path, const char *bytes, size_t size)
{
	char file[300] = { 0 };

	memcpy(file, bytes, size);
	write_bytes(path, file, sizeof(file));
}

TEST_F(files, what_other_containers_are_called)
{
	static const struct {
		const char *bytes;
		size_t size;
		const char *name;
	} cases[] = {
		{ "PK\3\4\x14", 5, "zip (.npz, .pt)" },
		{ "\x1f\x8b\x08\x08", 4, "gzip" },
		{ "\x28\xb5\x2f\xfd", 4, "zstd" },
		{ "\xfd" "7zXZ", 6, "xz" },
		{ "BZh91AY&SY", 10, "bzip2" },
		{ "GGUF\3", 5, "GGUF" },
		{ "\x89HDF\r\n\x1a\n", 8, "HDF5" },
		{ "ARROW1\0", 8, "Arrow (Feather)" },
		{ "PAR1", 4, "Parquet" },
		{ "\x80\4\x95", 3, "a pickle of Python" },
		{ "\x80\2\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 14,
		  "PyTorch before 1.6" },
	};
	char words[96];

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		write_beginning(at("a"), cases[i].bytes, cases[i].size);
		snprintf(words, sizeof(words), "expected a .npy or a safetensors file, got %s",
			 cases[i].name);
		EXPECT_ERROR(EBADMSG, words, open_and_close(at("a")));
	}
	write_bytes(at("a"), "1.5,2\n3,4\n", 10);
	EXPECT_ERROR(EBADMSG, "expected a .npy or a safetensors file, got text",
		     open_and_close(at("a")));
}

TEST_F(files, what_is_neither_format)
{
	static const uint64_t too_long[2] = { 16777217 }, cut[2] = { 9 };
	char words[128];

	write_bytes(at("a"), "{}", 2);
	EXPECT_ERROR(EBADMSG, "expected a .npy or a safetensors file, got 2 bytes",
		     open_and_close(at("a")));
	write_bytes(at("a"), "", 0);
	EXPECT_ERROR(EBADMSG, "expected a .npy or a safetensors file, got 0 bytes",
		     open_and_close(at("a")));
	write_bytes(at("a"), "Hello, world", 12);
	snprintf(words, sizeof(words), "expected a .npy or a safetensors file, whose header has at "
		 "most 16777216 bytes, got %llu", 0x77202c6f6c6c6548ull);
	EXPECT_ERROR(EBADMSG, words, open_and_close(at("a")));
	write_bytes(at("a"), too_long, 16);
	EXPECT_ERROR(EBADMSG, "expected a .npy or a safetensors file, whose header has at most "
		     "16777216 bytes, got 16777217", open_and_close(at("a")));
	write_bytes(at("a"), cut, 16);
	EXPECT_ERROR(EBADMSG, "expected a header of 9 bytes, got a file that ends after 8",
		     open_and_close(at("a")));
}

static void write_npy(const char *path, const char *literal, size_t data_bytes)
{
	size_t length = strlen(literal);
	char *bytes = calloc(1, 10 + length + data_bytes);

	memcpy(bytes, "\x93NUMPY\1", 8);
	bytes[8] = length & 0xff;
	bytes[9] = length >> 8;
	memcpy(bytes + 10, literal, length);
	write_bytes(path, bytes, 10 + length + data_bytes);
	free(bytes);
}

#define NPY(descr, order, shape) \
	"{'descr': '" descr "', 'fortran_order': " order ", 'shape': " shape "}\n"

TEST_F(files, npy_files_that_are_refused)
{
	static const struct {
		const char *literal;
		size_t data_bytes;
		const char *words;
	} cases[] = {
		{ NPY("<f4", "False", "(2, 3)"), 23,
		  "expected 24 bytes behind the header, got 23" },
		{ NPY("<f4", "False", "(2, 3)"), 25,
		  "expected 24 bytes behind the header, got 25" },
		{ NPY(">f4", "False", "(2, 3)"), 24, "expected elements of f8 f4 f2 i8 i4 i2 i1 or "
		  "u1 in the byte order of this machine, got '>f4'" },
		{ NPY("<U3", "False", "(2, 3)"), 72, "expected elements of f8 f4 f2 i8 i4 i2 i1 or "
		  "u1 in the byte order of this machine, got '<U3'" },
		{ NPY("<f4", "True", "(2, 3)"), 24, "expected rows in C order, got Fortran order" },
		{ NPY("<f4", "False", "(6,)"), 24,
		  "expected a shape of [rows, dim], got 1 dimensions" },
		{ NPY("<f4", "False", "(2, 3, 1)"), 24,
		  "expected a shape of [rows, dim], got 3 dimensions" },
		{ NPY("<f4", "False", "(2, 0)"), 0, "dim: expected at least 1, got 0" },
		{ NPY("|u1", "False", "(4294967296, 1)"), 0,
		  "expected at most 4294967295 rows, got 4294967296" },
		{ NPY("|u1", "False", "(0, 16777217)"), 0,
		  "expected rows of at most 16777216 elements, got 16777217" },
		{ NPY("|u1", "False", "(4294967295, 16777216)"), 0,
		  "expected 72057594021150720 bytes behind the header, got 0" },
		{ "{'descr': '<f4'}", 0,
		  "expected the keys descr, fortran_order and shape in the .npy header" },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		write_npy(at("a.npy"), cases[i].literal, cases[i].data_bytes);
		EXPECT_ERROR(EBADMSG, cases[i].words, open_and_close(at("a.npy")));
	}
	write_npy(at("a.npy"), NPY("<f4", "True", "(1, 3)"), 12);
	EXPECT_EQ(0, open_and_close(at("a.npy")));
	write_bytes(at("a.npy"), "\x93NUMPY\1\0\0\1{}", 12);
	EXPECT_ERROR(EBADMSG, "the .npy header is cut off", open_and_close(at("a.npy")));
	write_bytes(at("a.npy"), "\x93NUMPY\1\0\0", 9);
	EXPECT_ERROR(EBADMSG, "the .npy header is cut off", open_and_close(at("a.npy")));
}

/* It is all there, and NumPy would read no such one, either. */
TEST_F(files, a_long_npy_header)
{
	static char file[200000] = "\x93NUMPY\2\0\x00\x00\x02\x00";

	write_bytes(at("a.npy"), file, sizeof(file));
	EXPECT_ERROR(EBADMSG, "expected a .npy header of at most 131072 bytes, got 131084",
		     open_and_close(at("a.npy")));
}

TEST_F(files, npy_of_python_2)
{
	struct kvscratch *back;

	write_npy(at("a.npy"), NPY("<f4", "False", "(2L, 3L)"), 24);
	ASSERT_DONE(load_from(&back, at("a.npy"), NULL, 0));
	EXPECT_EQ(2, kvscratch_len(back));
	kvscratch_close(back);
}

/* What is refused: loading */

TEST_F(files, loads_that_are_refused)
{
	const struct kvscratch_named_pad two[] = { { "a", self->pad }, { "b", self->pad } };
	struct kvscratch *back = NULL;

	ASSERT_DONE(kvscratch_save(at("two.safetensors"), two, 2, NULL, NULL));
	EXPECT_ERROR(EINVAL, "expected the name of a pad: the file has 2 of them, a b",
		     load_from(&back, at("two.safetensors"), NULL, 0));
	EXPECT_ERROR(ENOKEY, "expected the name of a pad in the file, which has a b, got \"c\"",
		     load_from(&back, at("two.safetensors"), "c", 0));
	EXPECT_ERROR(EINVAL, "max_seq_len: expected at least 2, the rows in the file, got 1",
		     load_from(&back, at("two.safetensors"), "a", 1));
	EXPECT_ERROR(EINVAL, "max_seq_len: expected 1 to 4294967295 rows, got 4294967296",
		     load_from(&back, at("two.safetensors"), "a", 1ull << 32));
	EXPECT_EQ(NULL, back);
	ASSERT_DONE(save_one(self->pad, NULL, at("one.npy")));
	EXPECT_ERROR(ENOKEY, "expected the name of a pad in the file, which has one without a name, got \"a\"",
		     load_from(&back, at("one.npy"), "a", 0));
}

TEST_F(files, pads_that_rows_do_not_fit)
{
	static const struct {
		struct kvscratch_geometry geometry;
		int error;
		const char *words;
	} cases[] = {
		{ { 8, 4, F32, 0, 0 }, EINVAL, "shape mismatch: expected 4 elements, got 3" },
		{ { 8, 3, KVSCRATCH_DTYPE_I32, 0, 0 }, EINVAL, "dtype: expected i32, got f32" },
		{ { 1, 3, F32, 0, 0 }, ENOSPC, "Scratchpad overflow: 0 + 2 > 1 max" },
	};
	struct kvscratch *pad;

	ASSERT_DONE(save_one(self->pad, "k", at("f32.safetensors")));
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		ASSERT_DONE(kvscratch_new_geometry(&pad, &cases[i].geometry));
		EXPECT_ERROR(cases[i].error, cases[i].words,
			     load_into(pad, at("f32.safetensors"), NULL));
		EXPECT_EQ(0, kvscratch_len(pad));
		EXPECT_EQ(0, generation(pad));
		kvscratch_close(pad);
	}
	ASSERT_DONE(kvscratch_attach(&pad, kvscratch_fd(self->pad), O_RDONLY));
	EXPECT_ERROR(EBADF, "expected a handle open for write, got one for read only",
		     load_into(pad, at("f32.safetensors"), NULL));
	kvscratch_close(pad);
	EXPECT_EQ(2, kvscratch_len(self->pad));
}

/* That there is no room is known before the first of several batches. */
TEST_F(files, pads_that_some_batches_would_fit)
{
	struct kvscratch *three = filled_pad(3, 3 << 20, U8, 3);
	struct kvscratch *two = filled_pad(2, 3 << 20, U8, 0);

	ASSERT_DONE(save_one(three, NULL, at("three.npy")));
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 0 + 3 > 2 max",
		     load_into(two, at("three.npy"), NULL));
	EXPECT_EQ(0, generation(two));
	kvscratch_close(two);
	kvscratch_close(three);
}

/* Progress, and what happens meanwhile */

/**
 * struct script - what a progress function does
 * @calls: how often it was called
 * @act_at: the call at which it does the rest, from 1 on; 0 is every one
 * @pad: to be truncated to @len and to get a row, if any
 * @path: to be cut to @size bytes, if any
 * @temporaries: to be removed from the directory
 * @kill: end this process
 * @cancel: returned
 * @done: of the latest call
 * @total: of the latest call
 * @backwards: @done once became smaller
 */
struct script {
	int calls;
	int act_at;
	struct kvscratch *pad;
	uint64_t len;
	const char *path;
	off_t size;
	bool temporaries;
	bool kill;
	int cancel;
	uint64_t done;
	uint64_t total;
	bool backwards;
};

static void remove_temporaries(void)
{
	DIR *entries = opendir(directory);
	struct dirent *entry;

	while ((entry = readdir(entries)))
		if (!strncmp(entry->d_name, ".kvscratch-", 11))
			unlinkat(dirfd(entries), entry->d_name, 0);
	closedir(entries);
}

static int follow(void *context, uint64_t done, uint64_t total)
{
	struct script *script = context;
	uint8_t row[64];

	script->backwards |= done < script->done;
	script->done = done;
	script->total = total;
	if (++script->calls != script->act_at && script->act_at)
		return 0;
	if (script->kill)
		raise(SIGKILL);
	fill_row(row, sizeof(row), 100 + script->calls);
	if (script->pad && (kvscratch_truncate(script->pad, script->len, false) ||
			    kvscratch_append(script->pad, row, kvscratch_dim(script->pad))))
		abort();
	if (script->path && truncate(script->path, script->size))
		abort();
	if (script->temporaries)
		remove_temporaries();
	return script->cancel;
}

TEST_F(files, progress_is_told)
{
	struct kvscratch *pad = filled_pad(3, 3 << 20, U8, 3), *back;
	const struct kvscratch_named_pad named = { "k", pad };
	struct script saving = { .act_at = -1 }, loading = { .act_at = -1 };
	struct kvscratch_file *file;

	ASSERT_DONE(kvscratch_save(at("a.safetensors"), &named, 1, follow, &saving));
	/* 0, 4, 8 and 9 MiB */
	EXPECT_EQ(4, saving.calls);
	EXPECT_EQ(9 << 20, saving.total);
	EXPECT_EQ(9 << 20, saving.done);
	EXPECT_FALSE(saving.backwards);
	ASSERT_DONE(kvscratch_open_file(&file, at("a.safetensors")));
	ASSERT_DONE(kvscratch_load(&back, file, NULL, 0, follow, &loading));
	/* a row at a time, for two are too many */
	EXPECT_EQ(4, loading.calls);
	EXPECT_EQ(9 << 20, loading.total);
	EXPECT_EQ(9 << 20, loading.done);
	EXPECT_FALSE(loading.backwards);
	kvscratch_close_file(file);
	kvscratch_close(back);
	kvscratch_close(pad);
}

TEST_F(files, a_save_that_is_canceled)
{
	struct kvscratch *pad = filled_pad(3, 3 << 20, U8, 3);
	const struct kvscratch_named_pad named = { "k", pad };

	write_bytes(at("a.npy"), "old", 3);
	for (int call = 1; call <= 4; call++) {
		struct script script = { .act_at = call, .cancel = 1 };

		EXPECT_EQ(-ECANCELED, kvscratch_save(at("a.npy"), &named, 1, follow, &script));
		EXPECT_EQ(call, script.calls);
		EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
		EXPECT_EQ(1, nr_entries());
	}
	EXPECT_STREQ("canceled after 9437184 of 9437184 bytes", kvscratch_error());
	kvscratch_close(pad);
}

/* Where files have no names to begin with, and where they do */
TEST_F(files, a_save_that_leaves_nothing)
{
	const struct kvscratch_named_pad named = { NULL, self->pad };

	for (int i = 0; i < 2; i++) {
		struct script script = { .act_at = 2, .cancel = 1 };

		without_nameless = i;
		EXPECT_EQ(-ECANCELED, kvscratch_save(at("a.npy"), &named, 1, follow, &script));
		EXPECT_EQ(0, nr_entries());
		ASSERT_DONE(save_one(self->pad, NULL, at("a.npy")));
		EXPECT_EQ(0, open_and_close(at("a.npy")));
		EXPECT_EQ(1, nr_entries());
		ASSERT_EQ(0, unlink(at("a.npy")));
	}
}

TEST_F(files, a_load_that_is_canceled)
{
	struct kvscratch *pad = filled_pad(9, 3 << 20, U8, 3), *none = NULL;
	struct kvscratch_file *file;

	ASSERT_DONE(save_one(pad, NULL, at("a.npy")));
	ASSERT_DONE(kvscratch_open_file(&file, at("a.npy")));
	for (int call = 1; call <= 4; call++) {
		struct script script = { .act_at = call, .cancel = 1 };

		EXPECT_EQ(-ECANCELED, kvscratch_load(&none, file, NULL, 0, follow, &script));
		EXPECT_EQ(NULL, none);
		script.calls = 0;
		EXPECT_EQ(-ECANCELED, kvscratch_load_into(pad, file, NULL, follow, &script));
		EXPECT_EQ(3, kvscratch_len(pad));
		/* nobody saw any of them */
		EXPECT_EQ(0, generation(pad));
	}
	kvscratch_close_file(file);
	kvscratch_close(pad);
}

TEST_F(files, a_file_that_becomes_shorter)
{
	struct kvscratch *pad = filled_pad(9, 3 << 20, U8, 3), *none = NULL;
	struct script script = { .act_at = 2, .path = at("a.npy"), .size = 128 + (6 << 20) - 1 };
	const char words[] = "expected a file of 9437312 bytes, got one that became shorter";
	struct kvscratch_file *file;

	ASSERT_DONE(save_one(pad, NULL, at("a.npy")));
	ASSERT_DONE(kvscratch_open_file(&file, at("a.npy")));
	EXPECT_ERROR(EBADMSG, words, kvscratch_load_into(pad, file, NULL, follow, &script));
	EXPECT_EQ(2, script.calls);
	EXPECT_EQ(3, kvscratch_len(pad));
	EXPECT_EQ(0, generation(pad));
	EXPECT_ERROR(EBADMSG, words, kvscratch_load(&none, file, NULL, 0, NULL, NULL));
	EXPECT_EQ(NULL, none);
	kvscratch_close_file(file);
	kvscratch_close(pad);
}

TEST_F(files, rows_that_are_dropped_while_they_are_saved)
{
	const struct kvscratch_named_pad named[] = { { "a", self->pad }, { "b", self->pad } };
	struct script once = { .act_at = 2, .pad = self->pad, .len = 0 };
	struct script always = { .pad = self->pad };
	struct kvscratch *back;

	/* three calls for each attempt: at the second two rows became one */
	ASSERT_DONE(kvscratch_save(at("a.safetensors"), named, 2, follow, &once));
	EXPECT_EQ(6, once.calls);
	EXPECT_TRUE(once.backwards);
	for (int i = 0; i < 2; i++) {
		ASSERT_DONE(load_from(&back, at("a.safetensors"), named[i].name, 0));
		EXPECT_TRUE(same_rows(self->pad, back));
		kvscratch_close(back);
	}
	write_bytes(at("a.safetensors"), "old", 3);
	EXPECT_ERROR(EAGAIN, "expected rows that last while they are saved, got pads that were "
		     "truncated in each of 8 attempts",
		     kvscratch_save(at("a.safetensors"), named, 2, follow, &always));
	EXPECT_EQ(24, always.calls);
	EXPECT_TRUE(file_is(at("a.safetensors"), "old", 3));
	EXPECT_EQ(1, nr_entries());
}

/* Rows that came later are none of what is saved. */
TEST_F(files, other_rows_that_are_dropped_while_some_are_saved)
{
	const struct kvscratch_named_pad named = { "a", self->pad };
	struct script script = { .act_at = 2, .pad = self->pad, .len = 2 };
	struct kvscratch *back;

	ASSERT_DONE(kvscratch_save(at("a.safetensors"), &named, 1, follow, &script));
	EXPECT_EQ(2, script.calls);
	EXPECT_EQ(3, kvscratch_len(self->pad));
	ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 0));
	EXPECT_EQ(2, kvscratch_len(back));
	kvscratch_close(back);
}

/* Pads of several planes */

/* What a name can be made of and what not, all that a plane can be, and labels that come twice */
static const struct kvscratch_plane all_planes[] = {
	{ .label = "k0", .dim = 64, .dtype = MXINT8, .input_dtype = F32 },
	{ .label = "tokens", .dim = 1, .dtype = KVSCRATCH_DTYPE_I32 },
	{ .dim = 3, .dtype = F64 },
	{ .label = "2", .dim = 5, .dtype = U8 },
	{ .label = "a b%\n\xff/\"\\", .dim = 7, .dtype = KVSCRATCH_DTYPE_BF16 },
	{ .label = "twice", .dim = 2, .dtype = I8, .input_dtype = F32, .frac_bits = 5 },
	{ .label = "twice", .dim = 2, .dtype = KVSCRATCH_DTYPE_I64, .frac_bits = 40 },
	{ .label = "k0.scales", .dim = 32, .dtype = MXINT8 },
	{ .label = "fifteen.letters", .dim = 32, .dtype = MXINT8,
	  .input_dtype = KVSCRATCH_DTYPE_F16 },
};

#define ALL_PLANES ARRAY_SIZE(all_planes)

static const uint8_t some_tag[KVSCRATCH_TAG_BYTES] = "of a\0model \xff";

/* Recognisable bytes are numbers as well, but for those that are none: they become smaller. */
static void fill_input(const struct kvscratch_plane *plane, char *row, uint32_t seed)
{
	fill_row((uint8_t *)row, plane->input_row_bytes, seed);
	if (plane->input_dtype == plane->dtype)
		return;
	for (uint32_t i = 0; i < plane->dim; i++) {
		const float value = ((int)(seed * 31 + i * 17) % 1001 - 500) / 7.0f;

		if (plane->input_dtype == F32)
			memcpy(row + i * sizeof(value), &value, sizeof(value));
		else
			row[2 * i + 1] &= ~0x40;
	}
}

/* @len tokens, the first of which is that of @seed */
static void fill_planes(struct kvscratch *pad, uint32_t len, uint32_t seed)
{
	char *token = malloc(kvscratch_input_row_bytes(pad));

	for (uint32_t i = 0; i < len; i++) {
		char *row = token;

		for (uint32_t plane = 0; plane < kvscratch_nr_planes(pad); plane++) {
			fill_input(kvscratch_plane(pad, plane), row, seed + i + plane);
			row += kvscratch_plane(pad, plane)->input_row_bytes;
		}
		if (kvscratch_append_tokens(pad, token, 1, kvscratch_input_row_bytes(pad)))
			abort();
	}
	free(token);
}

static struct kvscratch *new_planes(const struct kvscratch_plane *planes, uint32_t count,
				    const void *tag, uint32_t len)
{
	struct kvscratch *pad;

	if (kvscratch_new_planes(&pad, 12, planes, count, tag, tag ? KVSCRATCH_TAG_BYTES : 0))
		abort();
	fill_planes(pad, len, 1);
	return pad;
}

static bool same_plane(struct kvscratch *a, struct kvscratch *b, uint32_t plane)
{
	const struct kvscratch_plane *left = kvscratch_plane(a, plane);
	const struct kvscratch_plane *right = kvscratch_plane(b, plane);
	uint64_t len = kvscratch_len(a);
	size_t bytes = len * (left->row_bytes + left->scales_row_bytes);
	void *left_rows = malloc(bytes + 1), *right_rows = malloc(bytes + 1);
	bool same = left->dim == right->dim && left->dtype == right->dtype &&
		    left->input_dtype == right->input_dtype &&
		    left->frac_bits == right->frac_bits && !strcmp(left->label, right->label) &&
		    !kvscratch_copy_plane_rows(a, plane, 0, len, left_rows) &&
		    !kvscratch_copy_plane_rows(b, plane, 0, len, right_rows) &&
		    !memcmp(left_rows, right_rows, bytes);

	free(left_rows);
	free(right_rows);
	return same;
}

/* All of it but max_seq_len and the generation */
static bool same_pads(struct kvscratch *a, struct kvscratch *b)
{
	struct kvscratch_pad_info left, right;

	if (kvscratch_pad_info(a, &left) || kvscratch_pad_info(b, &right) ||
	    left.len != right.len || left.nr_planes != right.nr_planes ||
	    memcmp(left.tag, right.tag, sizeof(left.tag)))
		return false;
	for (uint32_t i = 0; i < left.nr_planes; i++)
		if (!same_plane(a, b, i))
			return false;
	return true;
}

TEST_F(files, planes_come_back)
{
	struct kvscratch *pad = new_planes(all_planes, ALL_PLANES, some_tag, 9), *back;
	const struct kvscratch_saved_pad *saved;
	struct kvscratch_file *file;
	unsigned int count;

	ASSERT_DONE(save_one(pad, "cache", at("a.safetensors")));
	ASSERT_DONE(kvscratch_open_file(&file, at("a.safetensors")));
	saved = kvscratch_file_pads(file, &count);
	ASSERT_EQ(1, count);
	EXPECT_STREQ("cache", saved->name);
	EXPECT_EQ(9, saved->len);
	EXPECT_EQ(12, saved->max_seq_len);
	EXPECT_EQ(ALL_PLANES, saved->nr_planes);
	EXPECT_TRUE(saved->has_geometry);
	EXPECT_EQ(0, memcmp(some_tag, saved->tag, sizeof(some_tag)));
	for (size_t i = 0; i < ALL_PLANES; i++)
		EXPECT_STREQ(all_planes[i].label, kvscratch_saved_plane(saved, i)->label);
	ASSERT_DONE(kvscratch_load(&back, file, NULL, 0, NULL, NULL));
	EXPECT_TRUE(same_pads(pad, back));
	EXPECT_EQ(12, kvscratch_capacity(back));
	/* they go on alike, which is to say that planes convert as they did */
	fill_planes(pad, 3, 77);
	fill_planes(back, 3, 77);
	EXPECT_TRUE(same_pads(pad, back));
	kvscratch_close(back);
	ASSERT_DONE(kvscratch_load(&back, file, "cache", 1000, NULL, NULL));
	EXPECT_EQ(1000, kvscratch_capacity(back));
	EXPECT_EQ(9, kvscratch_len(back));
	kvscratch_close(back);
	kvscratch_close_file(file);
	kvscratch_close(pad);
}

TEST_F(files, the_bytes_of_planes)
{
	static const struct kvscratch_plane planes[] = {
		{ .label = "k 0", .dim = 32, .dtype = MXINT8, .input_dtype = F32 },
		{ .dim = 1, .dtype = F32 },
	};
	static const float token[33] = { [0] = 1, [32] = 2 };
	static const char header[] =
		"{\"__metadata__\":{\"kvscratch\":\"2\",\"a.max_seq_len\":\"12\","
		"\"a.tag\":\"of%20a%00model%20%ff\",\"a.planes\":\"k%200 1\","
		"\"a.k%200.dtype\":\"mxint8\",\"a.k%200.input_dtype\":\"f32\","
		"\"a.k%200.frac_bits\":\"0\",\"a.k%200.label\":\"k%200\","
		"\"a.1.dtype\":\"f32\",\"a.1.input_dtype\":\"f32\",\"a.1.frac_bits\":\"0\"},"
		"\"a.1\":{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[0,4]},"
		"\"a.k%200\":{\"dtype\":\"I8\",\"shape\":[1,32],\"data_offsets\":[4,36]},"
		"\"a.k%200.scales\":{\"dtype\":\"U8\",\"shape\":[1,1],\"data_offsets\":[36,37]}}";
	char expected[512 + 37];
	uint64_t length = htole64(512 - 8);
	struct kvscratch *pad = new_planes(planes, 2, some_tag, 0);

	ASSERT_DONE(kvscratch_append_tokens(pad, token, 1, sizeof(token)));
	memset(expected, ' ', 512);
	memcpy(expected, &length, 8);
	memcpy(expected + 8, header, strlen(header));
	memset(expected + 512, 0, 37);
	memcpy(expected + 512, &token[32], 4);
	expected[512 + 4] = 64;
	expected[512 + 36] = 127;
	ASSERT_DONE(save_one(pad, "a", at("a.safetensors")));
	EXPECT_TRUE(file_is(at("a.safetensors"), expected, sizeof(expected)));
	kvscratch_close(pad);
}

static bool is_of_version(const char *path, char version)
{
	static const char begins[] = "{\"__metadata__\":{\"kvscratch\":\"";
	char file[sizeof(begins) + 8] = { 0 };
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	bool is = pread(fd, file, sizeof(file), 8) == sizeof(file) &&
		  !strncmp(file, begins, strlen(begins)) && file[strlen(begins)] == version;

	close(fd);
	return is;
}

/* Its tensor has the name of the pad, labelled or not. */
TEST_F(files, a_plane_that_is_alone)
{
	static const struct kvscratch_plane plane = { .label = "k0", .dim = 3, .dtype = F32 };

	for (int i = 0; i < 2; i++) {
		struct kvscratch *pad = new_planes(&plane, 1, i ? some_tag : NULL, 4), *back;

		ASSERT_DONE(save_one(pad, "pad", at("a.safetensors")));
		EXPECT_TRUE(is_of_version(at("a.safetensors"), '2'));
		ASSERT_DONE(load_from(&back, at("a.safetensors"), "pad", 0));
		EXPECT_TRUE(same_pads(pad, back));
		kvscratch_close(back);
		/* it does not matter where nothing is to be told apart */
		EXPECT_EQ(0, load_into(self->pad, at("a.safetensors"), NULL));
		ASSERT_DONE(kvscratch_truncate(self->pad, 2, 0));
		kvscratch_close(pad);
	}
}

TEST_F(files, pads_of_planes_beside_others)
{
	struct kvscratch *cache = new_planes(all_planes, ALL_PLANES, some_tag, 4);
	struct kvscratch *other = new_planes(all_planes, 2, NULL, 0), *scaled;
	struct kvscratch_named_pad named[] = {
		{ "x", cache }, { "x.other", other }, { "x.y", self->pad }, { "x.s", NULL },
	};

	scaled = filled_pad(3, 32, MXINT8, 2);
	named[3].pad = scaled;
	ASSERT_DONE(kvscratch_save(at("a.safetensors"), named, 4, NULL, NULL));
	for (size_t i = 0; i < ARRAY_SIZE(named); i++) {
		struct kvscratch *back;

		ASSERT_DONE(load_from(&back, at("a.safetensors"), named[i].name, 0));
		EXPECT_TRUE(same_pads(named[i].pad, back));
		kvscratch_close(back);
	}
	kvscratch_close(scaled);
	kvscratch_close(other);
	kvscratch_close(cache);
}

TEST_F(files, as_many_planes_as_there_can_be)
{
	struct kvscratch_plane *planes = calloc(KVSCRATCH_MAX_PLANES, sizeof(*planes));
	struct kvscratch *pad, *back;

	for (uint32_t i = 0; i < KVSCRATCH_MAX_PLANES; i++) {
		planes[i] = (struct kvscratch_plane){ .dim = 1 + i % 3, .dtype = U8 };
		snprintf(planes[i].label, sizeof(planes[i].label), "layer %u", i);
	}
	pad = new_planes(planes, KVSCRATCH_MAX_PLANES, NULL, 2);
	ASSERT_DONE(save_one(pad, "all", at("a.safetensors")));
	ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 0));
	EXPECT_TRUE(same_pads(pad, back));
	kvscratch_close(back);
	kvscratch_close(pad);
	free(planes);
}

TEST_F(files, names_that_planes_would_share)
{
	static const struct kvscratch_plane planes[] = {
		{ .label = "k0", .dim = 3, .dtype = F32 },
		{ .label = "k1.scales", .dim = 3, .dtype = F32 },
	};
	struct kvscratch *pad = new_planes(planes, 2, NULL, 1);
	const struct kvscratch_named_pad same[] = { { "a", pad }, { "a.k0", self->pad } };
	const struct kvscratch_named_pad twice[] = { { "a", pad }, { "a", self->pad } };

	EXPECT_ERROR(EINVAL, "expected each tensor once, got two named \"a.k0\"",
		     kvscratch_save(at("a.safetensors"), same, 2, NULL, NULL));
	EXPECT_ERROR(EINVAL, "expected each pad once, got two named \"a\"",
		     kvscratch_save(at("a.safetensors"), twice, 2, NULL, NULL));
	EXPECT_ERROR(EINVAL, "expected a name in UTF-8, neither empty nor __metadata__, got \"\"",
		     save_one(pad, "", at("a.safetensors")));
	EXPECT_EQ(0, nr_entries());
	kvscratch_close(pad);
}

TEST_F(files, npy_has_room_for_one_plane)
{
	struct kvscratch *pad = new_planes(all_planes, ALL_PLANES, some_tag, 5), *back;
	struct kvscratch_tensor left, right;

	EXPECT_ERROR(EOPNOTSUPP, ".npy has room for one plane: expected a name that ends in "
		     ".safetensors, or one of the 9 planes", save_one(pad, NULL, at("a.npy")));
	EXPECT_ERROR(EINVAL, "expected a plane below 9, got 9",
		     kvscratch_save_plane(at("a.npy"), pad, 9, NULL, NULL));
	EXPECT_ERROR(EINVAL, "expected the name of a file that ends in .npy for a single plane",
		     kvscratch_save_plane(at("a.safetensors"), pad, 1, NULL, NULL));
	EXPECT_ERROR(EOPNOTSUPP, ".npy has no type for mxint8: expected a name that ends in "
		     ".safetensors", kvscratch_save_plane(at("a.npy"), pad, 0, NULL, NULL));
	EXPECT_EQ(0, nr_entries());
	ASSERT_DONE(kvscratch_save_plane(at("a.npy"), pad, 2, NULL, NULL));
	ASSERT_DONE(load_from(&back, at("a.npy"), NULL, 0));
	ASSERT_DONE(kvscratch_plane_tensor(pad, 2, &left));
	ASSERT_DONE(kvscratch_as_tensor(back, &right));
	EXPECT_EQ(left.len, right.len);
	EXPECT_EQ(left.dim, right.dim);
	EXPECT_EQ(0, memcmp(left.data, right.data, left.len * left.dim * sizeof(double)));
	EXPECT_ERROR(EINVAL, "expected the rows of 9 planes, got those of 1",
		     load_into(pad, at("a.npy"), NULL));
	kvscratch_close(back);
	kvscratch_close(pad);
}

/* A kvscratch_progress that looks whether a reader sees any of it, and cancels at the last call */
static int look(void *context, uint64_t done, uint64_t total)
{
	struct script *script = context;

	if (kvscratch_len(script->pad) != (int64_t)script->len)
		abort();
	script->calls++;
	return script->cancel && done == total;
}

TEST_F(files, planes_behind_others)
{
	struct kvscratch *pad = new_planes(all_planes, ALL_PLANES, some_tag, 5);
	struct kvscratch *into = new_planes(all_planes, ALL_PLANES, NULL, 3), *writer;
	struct script script = { .pad = into, .len = 3, .cancel = 1 };
	struct kvscratch_file *file;

	ASSERT_DONE(save_one(pad, "cache", at("a.safetensors")));
	ASSERT_DONE(kvscratch_open_file(&file, at("a.safetensors")));
	EXPECT_EQ(-ECANCELED, kvscratch_load_into(into, file, NULL, look, &script));
	EXPECT_EQ(1 + ALL_PLANES, script.calls);
	EXPECT_EQ(3, kvscratch_len(into));
	script.cancel = 0;
	EXPECT_EQ(0, kvscratch_load_into(into, file, NULL, look, &script));
	EXPECT_EQ(8, kvscratch_len(into));
	ASSERT_DONE(kvscratch_truncate(into, 3, 0));

	/* who is the writer may, and nobody else then */
	ASSERT_DONE(kvscratch_writer(&writer, into));
	EXPECT_EQ(-EBUSY, kvscratch_load_into(into, file, NULL, NULL, NULL));
	script = (struct script){ .pad = into, .len = 3, .cancel = 1 };
	EXPECT_EQ(-ECANCELED, kvscratch_load_into(writer, file, NULL, look, &script));
	/* and finds nothing staged */
	EXPECT_EQ(-EINVAL, kvscratch_commit(writer, 4));
	EXPECT_EQ(0, kvscratch_load_into(writer, file, NULL, NULL, NULL));
	EXPECT_EQ(8, kvscratch_len(into));
	kvscratch_close(writer);
	EXPECT_ERROR(ENOSPC, "Scratchpad overflow: 8 + 5 > 12 max",
		     kvscratch_load_into(into, file, NULL, NULL, NULL));
	ASSERT_DONE(kvscratch_truncate(into, 0, 0));
	EXPECT_EQ(0, kvscratch_load_into(into, file, NULL, NULL, NULL));
	for (uint32_t i = 0; i < ALL_PLANES; i++) {
		EXPECT_TRUE(same_plane(pad, into, i)) TH_LOG("plane %u", i);
	}
	ASSERT_DONE(kvscratch_truncate(into, 0, 0));
	ASSERT_DONE(kvscratch_seal(into));
	EXPECT_EQ(-EROFS, kvscratch_load_into(into, file, NULL, NULL, NULL));
	kvscratch_close_file(file);
	kvscratch_close(into);
	kvscratch_close(pad);
}

TEST_F(files, planes_that_rows_do_not_fit)
{
	static const struct kvscratch_plane saved[] = {
		{ .label = "k", .dim = 3, .dtype = KVSCRATCH_DTYPE_I32, .frac_bits = 2 },
		{ .label = "v", .dim = 3, .dtype = KVSCRATCH_DTYPE_I32, .frac_bits = 2 },
	};
	static const struct {
		struct kvscratch_plane second;
		const char *words;
	} cases[] = {
		{ { .label = "k", .dim = 3, .dtype = KVSCRATCH_DTYPE_I32, .frac_bits = 2 },
		  "plane 1: label: expected \"k\", got \"v\"" },
		{ { .label = "v", .dim = 4, .dtype = KVSCRATCH_DTYPE_I32, .frac_bits = 2 },
		  "plane 1: shape mismatch: expected 4 elements, got 3" },
		{ { .label = "v", .dim = 3, .dtype = F32 },
		  "plane 1: dtype: expected f32, got i32" },
		{ { .label = "v", .dim = 3, .dtype = KVSCRATCH_DTYPE_I32 },
		  "plane 1: fraction bits: expected 0, got 2" },
	};
	static const uint8_t another_tag[KVSCRATCH_TAG_BYTES] = "of another";
	struct kvscratch *pad = new_planes(saved, 2, some_tag, 2), *into;

	ASSERT_DONE(save_one(pad, "cache", at("a.safetensors")));
	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		struct kvscratch_plane planes[2] = { saved[0], cases[i].second };

		into = new_planes(planes, 2, NULL, 1);
		EXPECT_ERROR(EINVAL, cases[i].words, load_into(into, at("a.safetensors"), NULL));
		EXPECT_EQ(1, kvscratch_len(into));
		kvscratch_close(into);
	}
	EXPECT_ERROR(EINVAL, "expected the rows of 1 planes, got those of 2",
		     load_into(self->pad, at("a.safetensors"), NULL));
	into = new_planes(saved, 2, another_tag, 1);
	EXPECT_ERROR(EINVAL, "tag: expected the one of the pad, got another",
		     load_into(into, at("a.safetensors"), NULL));
	EXPECT_EQ(1, kvscratch_len(into));
	kvscratch_close(into);
	kvscratch_close(pad);
}

/* Rows of the last plane are none that were converted: those before it are gone as well. */
TEST_F(files, planes_of_which_one_was_not_converted)
{
	static const struct kvscratch_plane plain[] = {
		{ .label = "k", .dim = 3, .dtype = F32 },
		{ .label = "v", .dim = 32, .dtype = MXINT8 },
	};
	static const struct kvscratch_plane converting[] = {
		{ .label = "k", .dim = 3, .dtype = F32 },
		{ .label = "v", .dim = 32, .dtype = MXINT8, .input_dtype = F32 },
	};
	struct kvscratch *pad = new_planes(plain, 2, NULL, 0);
	struct kvscratch *into = new_planes(converting, 2, NULL, 2);
	int8_t token[12 + 33] = { [12] = -128 };

	ASSERT_DONE(kvscratch_append_tokens(pad, token, 1, sizeof(token)));
	ASSERT_DONE(save_one(pad, "a", at("a.safetensors")));
	EXPECT_ERROR(EBADMSG, "tensor \"a.v\": expected rows of mxint8 that were made of f32, got "
		     "others", load_into(into, at("a.safetensors"), NULL));
	EXPECT_EQ(2, kvscratch_len(into));
	fill_planes(into, 1, 5);
	EXPECT_EQ(3, kvscratch_len(into));
	kvscratch_close(into);
	kvscratch_close(pad);
}

#define PLANE(name) "\"a." name ".dtype\":\"u8\",\"a." name ".input_dtype\":\"u8\"," \
	"\"a." name ".frac_bits\":\"0\""
#define SCALED(name) "\"a." name ".dtype\":\"mxint8\",\"a." name ".input_dtype\":\"f32\"," \
	"\"a." name ".frac_bits\":\"0\""
#define U8_TENSOR(name, offsets) TENSOR(name, "U8", "2,1", offsets)

TEST_F(files, planes_that_are_refused)
{
	static const struct {
		const char *metadata;
		const char *tensors;
		size_t data_bytes;
		const char *words;
	} cases[] = {
		{ "\"a.planes\":\"k v\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected a tensor for each plane, got no \"a.v\"" },
		{ "\"a.planes\":\"\"", U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected a tensor for each plane, got no \"a.\"" },
		{ "\"a.planes\":\"k  k\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected a tensor for each plane, got no \"a.\"" },
		{ "\"a.planes\":\"k \"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected a tensor for each plane, got no \"a.\"" },
		{ "\"a.planes\":\"k k\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "tensor \"a.k\": expected it to be one plane of one pad, got it for another as "
		  "well" },
		{ "\"a.planes\":\"b.k\",\"a.b.planes\":\"k\",\"a.b.max_seq_len\":\"9\"," PLANE("b.k"),
		  U8_TENSOR("a.b.k", "0,2"), 2,
		  "tensor \"a.b.k\": expected it to be one plane of one pad, got it for another as "
		  "well" },
		{ "\"a.planes\":\"k k.scales\"," SCALED("k") "," PLANE("k.scales"),
		  TENSOR("a.k", "I8", "2,32", "0,64") "," U8_TENSOR("a.k.scales", "64,66"), 66,
		  "tensor \"a.k.scales\": expected it to be one plane of one pad, got it for "
		  "another as well" },
		{ "\"a.planes\":\"k\"," SCALED("k"), TENSOR("a.k", "I8", "2,32", "0,64"), 64,
		  "tensor \"a.k\": " SCALES },
		{ "\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v"),
		  U8_TENSOR("a.k", "0,2") "," TENSOR("a.v", "U8", "3,1", "2,5"), 5,
		  "tensor \"a.v\": expected 2 rows, as the first plane has, got 3" },
		{ "\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v"),
		  U8_TENSOR("a.k", "0,2") "," TENSOR("a.v", "U8", "2", "2,4"), 4,
		  "tensor \"a.v\": expected a shape of [rows, dim], got 1 dimensions" },
		{ "\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v"),
		  U8_TENSOR("a.k", "0,2") "," TENSOR("a.v", "U8", "2,0", "2,2"), 2,
		  "pad \"a\": plane 1: dim: expected at least 1, got 0" },
		{ "\"a.planes\":\"k v\"," PLANE("k"),
		  U8_TENSOR("a.k", "0,2") "," U8_TENSOR("a.v", "2,4"), 4,
		  "tensor \"a.v\": expected a dtype as dtype in __metadata__, got \"\"" },
		{ "\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v"),
		  U8_TENSOR("a.k", "0,2") "," TENSOR("a.v", "I8", "2,1", "2,4"), 4,
		  "tensor \"a.v\": expected that of the tensor as dtype in __metadata__, got \"u8\"" },
		{ "\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v"),
		  TENSOR("a.k", "U8", "0,16777216", "0,0") "," TENSOR("a.v", "U8", "0,1", "0,0"), 0,
		  "pad \"a\": planes: expected tokens of at most 16777216 bytes over all of them, as "
		  "stored and as appended, got more" },
		{ "\"a.planes\":\"k\"," PLANE("k"),
		  U8_TENSOR("a.k", "0,2") "," U8_TENSOR("a", "2,4"), 4,
		  "pad \"a\": expected nothing beside the tensor of this name as planes in "
		  "__metadata__, got \"k\"" },
		/* more than a label or a tag has, and what is none */
		{ "\"a.planes\":\"k\",\"a.k.label\":\"sixteen.letters_\"," PLANE("k"),
		  U8_TENSOR("a.k", "0,2"), 2, "tensor \"a.k\": expected at most 15 bytes and no NUL, "
		  "those beyond A-Za-z0-9._- as %xx, as label in __metadata__, got "
		  "\"sixteen.letters_\"" },
		{ "\"a.planes\":\"k\",\"a.k.label\":\"%00\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "tensor \"a.k\": expected at most 15 bytes and no NUL, those beyond A-Za-z0-9._- "
		  "as %xx, as label in __metadata__, got \"%00\"" },
		{ "\"a.planes\":\"k\",\"a.k.label\":\"%f\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "tensor \"a.k\": expected at most 15 bytes and no NUL, those beyond A-Za-z0-9._- "
		  "as %xx, as label in __metadata__, got \"%f\"" },
		{ "\"a.planes\":\"k\",\"a.tag\":\"a b\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected at most 64 bytes, those beyond A-Za-z0-9._- as %xx, as tag in "
		  "__metadata__, got \"a b\"" },
		{ "\"a.planes\":\"k\",\"a.tag\":\"0123456789012345678901234567890123456789012345678901"
		  "2345678901234\"," PLANE("k"), U8_TENSOR("a.k", "0,2"), 2,
		  "pad \"a\": expected at most 64 bytes, those beyond A-Za-z0-9._- as %xx, as tag in "
		  "__metadata__, got \"012345678901234567890123456789012345678901234567890123456789...\"" },
	};
	char header[1024];

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		snprintf(header, sizeof(header), "{\"__metadata__\":{\"kvscratch\":\"2\","
			 "\"a.max_seq_len\":\"9\",%s},%s}", cases[i].metadata, cases[i].tensors);
		write_safetensors(at("a.safetensors"), header, strlen(header), cases[i].data_bytes);
		EXPECT_ERROR(EBADMSG, cases[i].words, open_and_close(at("a.safetensors")));
	}
}

/* One more than there can be, each with a tensor of its own */
TEST_F(files, more_planes_than_there_can_be)
{
	char *header;
	size_t size;
	FILE *out = open_memstream(&header, &size);

	fprintf(out, "{\"__metadata__\":{\"kvscratch\":\"2\",\"a.max_seq_len\":\"9\"");
	for (uint32_t i = 0; i <= KVSCRATCH_MAX_PLANES; i++)
		fprintf(out, ",\"a.%u.dtype\":\"u8\",\"a.%u.input_dtype\":\"u8\","
			"\"a.%u.frac_bits\":\"0\"", i, i, i);
	fprintf(out, ",\"a.planes\":\"0");
	for (uint32_t i = 1; i <= KVSCRATCH_MAX_PLANES; i++)
		fprintf(out, " %u", i);
	fprintf(out, "\"}");
	for (uint32_t i = 0; i <= KVSCRATCH_MAX_PLANES; i++)
		fprintf(out, "," TENSOR("a.%u", "U8", "1,1", "%u,%u"), i, i, i + 1);
	fprintf(out, "}");
	fclose(out);
	write_safetensors(at("a.safetensors"), header, size, KVSCRATCH_MAX_PLANES + 1);
	EXPECT_ERROR(EBADMSG, "pad \"a\": expected at most 4096 planes, got more",
		     open_and_close(at("a.safetensors")));
	free(header);
}

/* Of all planes together */
TEST_F(files, claims_of_planes)
{
	static const char header[] = "{\"__metadata__\":{\"kvscratch\":\"2\",\"a.max_seq_len\":"
		"\"400000000\",\"a.planes\":\"k v\"," PLANE("k") "," PLANE("v") "},"
		U8_TENSOR("a.k", "0,2") "," U8_TENSOR("a.v", "2,4") "}";
	char words[128];
	struct kvscratch *back;

	write_safetensors(at("a.safetensors"), header, strlen(header), 4);
	snprintf(words, sizeof(words), "expected a max_seq_len: with what the file says its pads "
		 "would take 800000000 bytes, and it has %zu", strlen(header) + 12);
	EXPECT_ERROR(EINVAL, words, load_from(&back, at("a.safetensors"), NULL, 0));
	ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 2));
	EXPECT_EQ(2, kvscratch_capacity(back));
	kvscratch_close(back);
}

/* Nobody else's tensors are planes, whatever their metadata is like. */
TEST_F(files, planes_of_others)
{
	static const char header[] = "{\"__metadata__\":{\"a.planes\":\"k\"},"
		U8_TENSOR("a.k", "0,2") "," U8_TENSOR("a", "2,4") "}";
	struct kvscratch *back;

	write_safetensors(at("a.safetensors"), header, strlen(header), 4);
	ASSERT_DONE(load_from(&back, at("a.safetensors"), "a.k", 0));
	EXPECT_EQ(1, kvscratch_nr_planes(back));
	kvscratch_close(back);
}

/*
 * A row is one number over and over, in both planes: its place, and how often the writer began
 * anew.
 */
#define STRESS_DIM 1024
#define STRESS_PLANES 2
#define STRESS_ROWS 64
#define STRESS_SAVES 50

static void append_and_truncate(struct kvscratch *inherited)
{
	static uint32_t token[STRESS_PLANES * STRESS_DIM];
	struct kvscratch *pad;

	CHILD_CHECK(!kvscratch_attach(&pad, kvscratch_fd(inherited), O_RDWR));
	for (uint32_t epoch = 0;; epoch++) {
		uint64_t keep = epoch * 7 % STRESS_ROWS;

		for (uint32_t i = kvscratch_len(pad); i < STRESS_ROWS; i++) {
			for (size_t j = 0; j < ARRAY_SIZE(token); j++)
				token[j] = epoch << 8 | i;
			CHILD_CHECK(!kvscratch_append_tokens(pad, token, 1, sizeof(token)));
		}
		CHILD_CHECK(!kvscratch_truncate(pad, keep, false));
	}
}

/* Whole rows in their places, none older than one before it */
static bool rows_are_of_one_moment(const struct kvscratch_tensor *tensor)
{
	const uint32_t *row = tensor->data;
	uint32_t epoch = 0;

	for (uint64_t i = 0; i < tensor->len; i++, row += STRESS_DIM) {
		for (size_t j = 1; j < STRESS_DIM; j++)
			if (row[j] != row[0])
				return false;
		if ((row[0] & 0xff) != i || row[0] >> 8 < epoch)
			return false;
		epoch = row[0] >> 8;
	}
	return true;
}

/* The writer goes on between the moment of the rows and their copy, on one processor too. */
static int let_others_run(void *context, uint64_t done, uint64_t total)
{
	(void)context, (void)done, (void)total;
	sched_yield();
	return 0;
}

TEST_F_TIMEOUT(files, saves_beside_a_writer, TEST_SECONDS)
{
	static const struct kvscratch_plane planes[STRESS_PLANES] = {
		{ .dim = STRESS_DIM, .dtype = KVSCRATCH_DTYPE_I32, .label = "k" },
		{ .dim = STRESS_DIM, .dtype = KVSCRATCH_DTYPE_I32, .label = "v" },
	};
	struct kvscratch_named_pad named = { .name = "cache" };
	struct kvscratch *pad, *back;
	int verified = 0;
	pid_t writer;

	ASSERT_DONE(kvscratch_new_planes(&pad, STRESS_ROWS, planes, STRESS_PLANES, NULL, 0));
	named.pad = pad;
	writer = fork_child();
	if (!writer)
		append_and_truncate(pad);
	for (int i = 0; i < STRESS_SAVES; i++) {
		struct kvscratch_tensor tensor, other;
		int err = kvscratch_save(at("a.safetensors"), &named, 1, let_others_run, NULL);

		/* only the writer's pace decides about that */
		if (err == -EAGAIN)
			continue;
		ASSERT_DONE(err);
		ASSERT_DONE(load_from(&back, at("a.safetensors"), NULL, 0));
		ASSERT_DONE(kvscratch_plane_tensor(back, 0, &tensor));
		ASSERT_DONE(kvscratch_plane_tensor(back, 1, &other));
		EXPECT_TRUE(rows_are_of_one_moment(&tensor));
		EXPECT_EQ(0, memcmp(tensor.data, other.data, tensor.len * sizeof(uint32_t[STRESS_DIM])));
		kvscratch_close(back);
		verified++;
	}
	EXPECT_LT(0, verified);
	kill(writer, SIGKILL);
	EXPECT_EQ(128 + SIGKILL, wait_for(writer));
	kvscratch_close(pad);
}

/* Replacing */

TEST_F(files, a_file_that_is_replaced)
{
	char byte;
	struct stat stat_before, stat_after;
	int old;

	umask(027);
	ASSERT_DONE(save_one(self->pad, NULL, at("a.npy")));
	ASSERT_EQ(0, stat(at("a.npy"), &stat_before));
	EXPECT_EQ(0640, stat_before.st_mode & 07777);
	write_bytes(at("a.npy"), "old", 3);
	ASSERT_EQ(0, chmod(at("a.npy"), 0606));
	old = open(at("a.npy"), O_RDONLY | O_CLOEXEC);
	ASSERT_EQ(0, symlink("a.npy", at("link.npy")));
	ASSERT_DONE(save_one(self->pad, NULL, at("link.npy")));
	ASSERT_EQ(0, lstat(at("link.npy"), &stat_after));
	EXPECT_TRUE(S_ISLNK(stat_after.st_mode));
	ASSERT_EQ(0, lstat(at("a.npy"), &stat_after));
	EXPECT_TRUE(S_ISREG(stat_after.st_mode));
	EXPECT_EQ(0606, stat_after.st_mode & 07777);
	EXPECT_EQ(128 + sizeof(two_rows), stat_after.st_size);
	EXPECT_NE(stat_before.st_ino, stat_after.st_ino);
	/* and its owner, where that may be */
	if (!geteuid()) {
		ASSERT_EQ(0, chown(at("a.npy"), 12345, 12346));
		ASSERT_DONE(save_one(self->pad, NULL, at("a.npy")));
		ASSERT_EQ(0, lstat(at("a.npy"), &stat_after));
		EXPECT_EQ(12345, stat_after.st_uid);
		EXPECT_EQ(12346, stat_after.st_gid);
		EXPECT_EQ(0606, stat_after.st_mode & 07777);
	}
	/* who has it open reads on in the old one */
	EXPECT_EQ(1, read(old, &byte, 1));
	EXPECT_EQ('o', byte);
	EXPECT_EQ(2, nr_entries());
	close(old);
}

TEST_F(files, a_path_without_a_directory)
{
	struct kvscratch *back;

	ASSERT_EQ(0, chdir(directory));
	ASSERT_DONE(save_one(self->pad, NULL, "a.npy"));
	ASSERT_DONE(load_from(&back, "a.npy", NULL, 0));
	EXPECT_TRUE(same_rows(self->pad, back));
	kvscratch_close(back);
	/* an old file is looked for at its real path */
	ASSERT_DONE(save_one(self->pad, NULL, "a.npy"));
	EXPECT_EQ(1, nr_entries());
}

TEST_F(files, a_size_limit)
{
	struct kvscratch *pad = filled_pad(3, 3 << 20, U8, 3);
	const struct rlimit limit = { 5 << 20, 5 << 20 };
	sigset_t set, pending;

	write_bytes(at("a.npy"), "old", 3);
	/* what the program does about its signal is left as it is, and so is one that waits */
	sigemptyset(&set);
	sigaddset(&set, SIGXFSZ);
	ASSERT_EQ(0, setrlimit(RLIMIT_FSIZE, &limit));
	EXPECT_ERROR(EFBIG, "cannot write the file: File too large",
		     save_one(pad, NULL, at("a.npy")));
	sigprocmask(SIG_BLOCK, &set, NULL);
	EXPECT_EQ(-EFBIG, save_one(pad, NULL, at("a.npy")));
	sigpending(&pending);
	EXPECT_EQ(0, sigismember(&pending, SIGXFSZ));
	raise(SIGXFSZ);
	EXPECT_EQ(-EFBIG, save_one(pad, NULL, at("a.npy")));
	sigpending(&pending);
	EXPECT_EQ(1, sigismember(&pending, SIGXFSZ));
	signal(SIGXFSZ, SIG_IGN);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	EXPECT_EQ(-EFBIG, save_one(pad, NULL, at("a.npy")));
	EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
	EXPECT_EQ(1, nr_entries());
	kvscratch_close(pad);
}

/* A file system of 1 MiB on the directory of the test, which only this process sees */
static bool mount_small(void)
{
	int flags = geteuid() ? CLONE_NEWUSER | CLONE_NEWNS : CLONE_NEWNS;
	char map[32];

	snprintf(map, sizeof(map), "0 %u 1", geteuid());
	if (unshare(flags))
		return false;
	if (flags & CLONE_NEWUSER)
		write_file("/proc/self/uid_map", map);
	return !mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	       !mount("small", directory, "tmpfs", 0, "size=1m");
}

TEST_F(files, a_full_disk)
{
	struct kvscratch *pad;
	bool mounted;

	/* before there is anything of which a new user would not be the owner */
	mounted = mount_small();
	if (!mounted)
		SKIP(return, "no file system can be mounted here: %s", strerror(errno));
	pad = filled_pad(3, 1 << 20, U8, 3);
	write_bytes(at("a.npy"), "old", 3);
	EXPECT_ERROR(ENOSPC, "cannot write the file: No space left on device",
		     save_one(pad, NULL, at("a.npy")));
	EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
	EXPECT_EQ(1, nr_entries());
	/* what was taken is free again */
	EXPECT_EQ(0, save_one(self->pad, NULL, at("a.npy")));
	kvscratch_close(pad);
	EXPECT_EQ(0, umount2(directory, MNT_DETACH));
}

TEST_F(files, a_file_that_cannot_take_its_place)
{
	const struct kvscratch_named_pad named = { NULL, self->pad };
	struct script script = { .act_at = 2, .temporaries = true };

	without_nameless = true;
	write_bytes(at("a.npy"), "old", 3);
	EXPECT_ERROR(ENOENT, "cannot put the file in its place: No such file or directory",
		     kvscratch_save(at("a.npy"), &named, 1, follow, &script));
	EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
	EXPECT_EQ(1, nr_entries());
}

/* The library's calls of fsync() end here: what they were for, and which one shall fail */
static struct {
	int calls;
	int fail_at;
	bool of_directory[4];
	bool old_was_there[4];
} syncs;

int fsync(int fd)
{
	struct stat stat;
	int call = syncs.calls++ % 4;

	if (fstat(fd, &stat))
		abort();
	syncs.of_directory[call] = S_ISDIR(stat.st_mode);
	syncs.old_was_there[call] = file_is(at("a.npy"), "old", 3);
	if (syncs.calls == syncs.fail_at) {
		errno = EIO;
		return -1;
	}
	return syscall(SYS_fsync, fd);
}

TEST_F(files, what_is_on_disk_when)
{
	write_bytes(at("a.npy"), "old", 3);
	syncs.fail_at = 1;
	EXPECT_ERROR(EIO, "cannot bring the file to disk: Input/output error",
		     save_one(self->pad, NULL, at("a.npy")));
	EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
	EXPECT_EQ(1, nr_entries());

	/* the new file before it takes its place, the directory afterwards */
	syncs.calls = 0;
	syncs.fail_at = 2;
	EXPECT_ERROR(EIO, "cannot bring the directory of the file to disk: Input/output error",
		     save_one(self->pad, NULL, at("a.npy")));
	EXPECT_EQ(2, syncs.calls);
	EXPECT_FALSE(syncs.of_directory[0]);
	EXPECT_TRUE(syncs.old_was_there[0]);
	EXPECT_TRUE(syncs.of_directory[1]);
	EXPECT_FALSE(syncs.old_was_there[1]);
	EXPECT_EQ(0, open_and_close(at("a.npy")));
	EXPECT_EQ(1, nr_entries());
}

TEST_F(files, a_save_that_is_killed)
{
	struct kvscratch *pad = filled_pad(3, 3 << 20, U8, 3);
	const struct kvscratch_named_pad named = { NULL, pad };

	write_bytes(at("a.npy"), "old", 3);
	for (int i = 0; i < 8; i++) {
		struct script script = { .act_at = i / 2 + 1, .kill = true };
		pid_t child;

		without_nameless = i % 2;
		child = fork_child();

		if (!child) {
			kvscratch_save(at("a.npy"), &named, 1, follow, &script);
			_exit(1);
		}
		EXPECT_EQ(128 + SIGKILL, wait_for(child));
		EXPECT_TRUE(file_is(at("a.npy"), "old", 3));
		/* nothing is left, or one thing under its own name */
		EXPECT_EQ(1 + without_nameless, nr_entries());
		remove_temporaries();
		EXPECT_EQ(1, nr_entries());
	}
	ASSERT_DONE(save_one(pad, NULL, at("a.npy")));
	EXPECT_EQ(1, nr_entries());
	kvscratch_close(pad);
}

TEST_HARNESS_MAIN
