// SPDX-License-Identifier: GPL-2.0-only
/*
 * The parser of .npy headers. Needs no device: it runs natively, with
 * sanitizers.
 */
#include "common.h"

#include "../../tools/lib/npy.h"

/* A header with everything behind the version given as text */
static size_t make_header(unsigned char *file, int version, const char *literal)
{
	size_t length = strlen(literal);
	size_t prefix = NPY_MAGIC_BYTES + 2 + (version == 1 ? 2 : 4);

	memcpy(file, NPY_MAGIC, NPY_MAGIC_BYTES);
	file[6] = version;
	file[7] = 0;
	for (size_t i = 8; i < prefix; i++)
		file[i] = length >> 8 * (i - 8) & 0xff;
	memcpy(file + prefix, literal, length);
	return prefix + length;
}

/* Exactly as large as the file, so that a read beyond it is caught */
static const char *parse(const unsigned char *file, size_t size, struct npy_array *array)
{
	unsigned char *copy = malloc(size ? size : 1);
	const char *error;

	memcpy(copy, file, size);
	error = npy_parse_header(copy, size, array);
	free(copy);
	return error;
}

TEST(headers_that_numpy_writes)
{
	static const struct {
		int version;
		const char *literal;
		uint32_t dtype;
		bool fortran_order;
		unsigned int ndim;
		uint64_t shape[2];
	} cases[] = {
		{ 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }     \n",
		  KVSCRATCH_DTYPE_F32, false, 2, { 3, 4 } },
		{ 1, "{'descr': '|u1', 'fortran_order': False, 'shape': (7,), }\n",
		  KVSCRATCH_DTYPE_U8, false, 1, { 7 } },
		{ 1, "{'descr': '<f2', 'fortran_order': True, 'shape': (), }\n",
		  KVSCRATCH_DTYPE_F16, true, 0, { 0 } },
		{ 2, "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 18446744073709551615), }",
		  KVSCRATCH_DTYPE_I64, false, 2, { 0, UINT64_MAX } },
		{ 1, "{'descr': '<u1', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_U8, false, 2, { 1, 2 } },
		{ 1, "{'descr': '>i1', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_I8, false, 2, { 1, 2 } },
		/* other programs, and Python 2; numpy.load() reads all of them */
		{ 1, "{'descr': '|f4', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_F32, false, 2, { 1, 2 } },
		{ 1, "{'descr': '=f8', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_F64, false, 2, { 1, 2 } },
		{ 1, "{'descr': 'i2', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_I16, false, 2, { 1, 2 } },
		{ 1, "{'descr': 'uint8', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_U8, false, 2, { 1, 2 } },
		{ 1, "{'descr': 'float16', 'fortran_order': False, 'shape': (1, 2)}",
		  KVSCRATCH_DTYPE_F16, false, 2, { 1, 2 } },
		{ 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 4L), }",
		  KVSCRATCH_DTYPE_F32, false, 2, { 3, 4 } },
		{ 1, "{u'descr': u'<f4',\t'fortran_order': False,\r\n'shape': (7L,), }\r\n",
		  KVSCRATCH_DTYPE_F32, false, 1, { 7 } },
		{ 1, "{'descr': '>float32', 'fortran_order': False, 'shape': (1, 2)}",
		  0, false, 2, { 1, 2 } },
		{ 1, "{'descr': 'uint4', 'fortran_order': False, 'shape': (1, 2)}",
		  0, false, 2, { 1, 2 } },
		{ 3, "{'shape': (1, 2), 'descr': '>f4', 'fortran_order': False}",
		  0, false, 2, { 1, 2 } },
		{ 1, "  {\"descr\":\"<f8\",\"fortran_order\":False,\"shape\":(1,2)}  ",
		  KVSCRATCH_DTYPE_F64, false, 2, { 1, 2 } },
	};

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		unsigned char file[256];
		struct npy_array array;
		size_t size = make_header(file, cases[i].version, cases[i].literal);
		const char *error = parse(file, size, &array);

		ASSERT_EQ(NULL, error)
			TH_LOG("%s: %s", cases[i].literal, error);
		EXPECT_EQ(cases[i].dtype, array.dtype);
		EXPECT_EQ(cases[i].fortran_order, array.fortran_order);
		ASSERT_EQ(cases[i].ndim, array.ndim);
		for (unsigned int j = 0; j < array.ndim; j++)
			EXPECT_EQ(cases[i].shape[j], array.shape[j]);
		EXPECT_EQ(size, array.data_offset);
	}
}

TEST(headers_that_are_refused)
{
	static const char *const literals[] = {
		"",
		"{}",
		"{'descr': '<f4', 'fortran_order': False}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)} x",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), 'shape': (1, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), 'more': 1}",
		"{'descr': '<f4' 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<f4', 'fortran_order': Maybe, 'shape': (1, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1LL, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (L, 2)}",
		"{'descr': uu'<f4', 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616, 2)}",
		"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<f4\", 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': 'sixteen characters', 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<\nf4', 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<\\f4', 'fortran_order': False, 'shape': (1, 2)}",
		"{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,"
			"1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1)}",
	};

	for (size_t i = 0; i < ARRAY_SIZE(literals); i++) {
		unsigned char file[256];
		struct npy_array array;
		size_t size = make_header(file, 1, literals[i]);

		EXPECT_NE(NULL, parse(file, size, &array))
			TH_LOG("accepted: %s", literals[i]);
	}
}

static size_t good_header(char header[static NPY_HEADER_BYTES])
{
	return npy_write_header(header, 3, 4, KVSCRATCH_DTYPE_F32);
}

TEST(what_is_written_can_be_read)
{
	for (uint32_t dtype = 0; dtype < 12; dtype++) {
		bool possible = dtype >= KVSCRATCH_DTYPE_F64 && dtype <= KVSCRATCH_DTYPE_U8 &&
				dtype != KVSCRATCH_DTYPE_BF16;
		char header[NPY_HEADER_BYTES];
		struct npy_array array;
		size_t size = npy_write_header(header, UINT64_MAX, UINT32_MAX, dtype);

		EXPECT_EQ(possible, size > 0);
		if (!size)
			continue;
		EXPECT_EQ(0, size % 64);
		EXPECT_EQ('\n', header[size - 1]);
		ASSERT_EQ(NULL, parse((unsigned char *)header, size, &array));
		EXPECT_EQ(dtype, array.dtype);
		EXPECT_EQ(size, array.data_offset);
		EXPECT_FALSE(array.fortran_order);
		ASSERT_EQ(2, array.ndim);
		EXPECT_EQ(UINT64_MAX, array.shape[0]);
		EXPECT_EQ(UINT32_MAX, array.shape[1]);
	}
}

TEST(every_cut_is_refused)
{
	char header[NPY_HEADER_BYTES];
	struct npy_array array;
	size_t size = good_header(header);

	for (size_t cut = 0; cut < size; cut++)
		EXPECT_NE(NULL, parse((unsigned char *)header, cut, &array));
}

/* The sanitizers watch; what is accepted must make sense. */
TEST(every_wrong_byte_is_harmless)
{
	char header[NPY_HEADER_BYTES];
	unsigned int accepted = 0;
	struct npy_array array;
	size_t size = good_header(header);

	for (size_t i = 0; i < size; i++) {
		char saved = header[i];

		for (int byte = 0; byte < 256; byte++) {
			header[i] = byte;
			if (parse((unsigned char *)header, size, &array))
				continue;
			accepted++;
			EXPECT_LE(array.data_offset, size);
			EXPECT_LE(array.ndim, NPY_MAX_DIMS);
		}
		header[i] = saved;
	}
	EXPECT_LT(size, accepted);
}

TEST_HARNESS_MAIN
