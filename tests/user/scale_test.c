// SPDX-License-Identifier: GPL-2.0-only
/*
 * Rows of floating point to scaled integers: kvscratch_scale.h against long
 * double, whose 64 bits of fraction and 15 of exponent hold every value here
 * exactly. Needs no device: it runs natively, with sanitizers.
 */
#include "common.h"

#include <float.h>
#include <math.h>

#include "../../kvscratch_scale.h"
#include "../scale_golden.h"

_Static_assert(LDBL_MANT_DIG >= 64 && LDBL_MAX_EXP >= 16384, "the oracle needs a wider type");

#define BLOCK 32
#define MAX_BLOCKS 64
#define MAX_COUNT (MAX_BLOCKS * BLOCK)

/*
 * Sanitizers and the x87's subnormals are slow: they see only every so many
 * fractions of f32, though never fewer than 10^9 elements without sanitizers.
 */
#if defined(__SANITIZE_ADDRESS__)
#define F32_STRIDE 61
#elif !defined(__LP64__)
#define F32_STRIDE 5
#else
#define F32_STRIDE 1
#endif

/*
 * @least: exponent of the least subnormal, @most: that of the largest value.
 * The bias is @most.
 */
struct format {
	const char *name;
	uint32_t dtype;
	unsigned int fraction;
	unsigned int width;
	int least;
	int most;
};

static const struct format formats[] = {
	{ "f64", KVSCRATCH_DTYPE_F64, 52, 64, -1074, 1023 },
	{ "f32", KVSCRATCH_DTYPE_F32, 23, 32, -149, 127 },
	{ "f16", KVSCRATCH_DTYPE_F16, 10, 16, -24, 15 },
	{ "bf16", KVSCRATCH_DTYPE_BF16, 7, 16, -133, 127 },
};

#define F32 (&formats[1])
#define F16 (&formats[2])
#define BF16 (&formats[3])

static uint64_t sign_of(const struct format *format)
{
	return 1ULL << (format->width - 1);
}

/* Exponent fields from 0 to this one are finite. */
static unsigned int last_field(const struct format *format)
{
	return 2 * format->most;
}

static uint64_t infinity_of(const struct format *format)
{
	return (uint64_t)(last_field(format) + 1) << format->fraction;
}

static bool finite_bits(const struct format *format, uint64_t bits)
{
	return (bits & (sign_of(format) - 1)) < infinity_of(format);
}

/* The value of some bits, by the hardware where it knows the format */
static long double value_of(const struct format *format, uint64_t bits)
{
	uint32_t narrow;
	double f64;
	float f32;

	switch (format->dtype) {
	case KVSCRATCH_DTYPE_F64:
		memcpy(&f64, &bits, sizeof(f64));
		return f64;
	case KVSCRATCH_DTYPE_F16: {
		int field = bits >> 10 & 31;
		long double value = field ? ldexpl(1 + (bits & 1023) / 1024.0L, field - 15) :
					    ldexpl(bits & 1023, -24);

		if (field == 31)
			value = bits & 1023 ? NAN : INFINITY;
		return bits >> 15 ? -value : value;
	}
	default:
		narrow = format->dtype == KVSCRATCH_DTYPE_BF16 ? (uint32_t)bits << 16 : bits;
		memcpy(&f32, &narrow, sizeof(f32));
		return f32;
	}
}

/* The bits of a value; false if the format has none */
static bool bits_of(const struct format *format, long double value, uint64_t *bits)
{
	long double magnitude = fabsl(value);
	int exponent = format->least;
	uint64_t whole;

	if (!magnitude) {
		*bits = signbit(value) ? sign_of(format) : 0;
		return true;
	}
	if (ilogbl(magnitude) > format->most)
		return false;
	if (ilogbl(magnitude) - (int)format->fraction > exponent)
		exponent = ilogbl(magnitude) - (int)format->fraction;
	magnitude = ldexpl(magnitude, -exponent);
	whole = magnitude;
	if (whole != magnitude)
		return false;
	*bits = whole + ((uint64_t)(exponent - format->least) << format->fraction);
	if (signbit(value))
		*bits |= sign_of(format);
	if (value_of(format, *bits) != value)
		abort();
	return true;
}

/* Half to even, which is seen to be that */
static long double rounded(long double value)
{
	long double whole = rintl(value);
	long double distance = fabsl(value - whole);

	if (distance > 0.5L || (distance == 0.5L && fmodl(whole, 2) != 0))
		abort();
	return whole;
}

/* What a block becomes; returns how many were clamped, or KVS_SCALE_NOT_FINITE */
static long oracle_block(const struct format *format, const uint64_t bits[static BLOCK],
			 int8_t elements[static BLOCK], uint8_t *scale)
{
	long double values[BLOCK];
	long double largest = 0;
	long clamped = 0;
	int exponent;

	for (int i = 0; i < BLOCK; i++) {
		values[i] = value_of(format, bits[i]);
		if (!isfinite(values[i]))
			return KVS_SCALE_NOT_FINITE;
		largest = fmaxl(largest, fabsl(values[i]));
	}
	memset(elements, 0, BLOCK);
	*scale = 0;
	if (!largest)
		return 0;
	exponent = ilogbl(largest);
	if (largest < ldexpl(1, exponent) || largest >= ldexpl(1, exponent + 1))
		abort();
	exponent = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
	*scale = exponent + 127;
	for (int i = 0; i < BLOCK; i++) {
		long double steps = rounded(ldexpl(values[i], 6 - exponent));

		if (fabsl(steps) > 127) {
			steps = copysignl(127, steps);
			clamped++;
		}
		elements[i] = steps;
	}
	return clamped;
}

static long oracle_fixed(const struct format *format, uint64_t bits, unsigned int frac_bits,
			 unsigned int bytes, int64_t *element)
{
	long double least = -ldexpl(1, 8 * bytes - 1);
	long double value = value_of(format, bits);
	long double steps;

	if (!isfinite(value))
		return KVS_SCALE_NOT_FINITE;
	steps = rounded(ldexpl(value, frac_bits));
	*element = steps < least ? least : steps > -least - 1 ? -least - 1 : steps;
	return steps < least || steps > -least - 1;
}

/* Storage of any format */
union words {
	uint64_t f64[MAX_COUNT];
	uint32_t f32[MAX_COUNT];
	uint16_t f16[MAX_COUNT];
};

static void store(const struct format *format, void *words, size_t i, uint64_t bits)
{
	switch (format->width) {
	case 64:
		((uint64_t *)words)[i] = bits;
		break;
	case 32:
		((uint32_t *)words)[i] = bits;
		break;
	default:
		((uint16_t *)words)[i] = bits;
	}
}

static int64_t integer_at(const void *integers, size_t i, unsigned int bytes)
{
	switch (bytes) {
	case 1:
		return ((const int8_t *)integers)[i];
	case 2:
		return ((const int16_t *)integers)[i];
	case 4:
		return ((const int32_t *)integers)[i];
	default:
		return ((const int64_t *)integers)[i];
	}
}

/* One copy of what is tested, however often it is called */
static __attribute__((__noinline__)) long to_mxint8(uint32_t dtype, const void *in, size_t blocks,
						    int8_t *elements, uint8_t *scales)
{
	return kvs_scale_mxint8(dtype, in, blocks, elements, scales);
}

static __attribute__((__noinline__)) long to_fixed(uint32_t dtype, const void *in, size_t count,
						   unsigned int frac_bits, unsigned int bytes,
						   void *out)
{
	return kvs_scale_fixed(dtype, in, count, frac_bits, bytes, out);
}

static bool block_is_right(const struct format *format, const uint64_t bits[static BLOCK])
{
	int8_t elements[BLOCK], want[BLOCK];
	uint8_t scale = 0xaa, want_scale;
	long clamped, want_clamped;
	union words in;

	for (int i = 0; i < BLOCK; i++)
		store(format, &in, i, bits[i]);
	memset(elements, 0x55, sizeof(elements));
	clamped = to_mxint8(format->dtype, &in, 1, elements, &scale);
	want_clamped = oracle_block(format, bits, want, &want_scale);
	if (clamped != want_clamped || scale != want_scale) {
		printf("# %s block: %ld clamped, scale %d; expected %ld, %d\n", format->name,
		       clamped, scale, want_clamped, want_scale);
	} else if (!memcmp(elements, want, BLOCK)) {
		return true;
	}
	for (int i = 0; i < BLOCK; i++)
		printf("# %#llx: %d, expected %d\n", (unsigned long long)bits[i], elements[i],
		       want[i]);
	return false;
}

static bool fixed_are_right(const struct format *format, const uint64_t *bits, size_t count,
			    unsigned int frac_bits, unsigned int bytes)
{
	int64_t all[MAX_COUNT], one, want;
	long clamped, sum = 0, want_clamped;
	static union words in;

	for (size_t i = 0; i < count; i++)
		store(format, &in, i, bits[i]);
	clamped = to_fixed(format->dtype, &in, count, frac_bits, bytes, all);
	for (size_t i = 0; i < count; i++) {
		const char *at = (const char *)&in + i * format->width / 8;
		long got = to_fixed(format->dtype, at, 1, frac_bits, bytes, &one);

		want_clamped = oracle_fixed(format, bits[i], frac_bits, bytes, &want);
		sum += want_clamped;
		if (got == want_clamped && integer_at(&one, 0, bytes) == want &&
		    integer_at(all, i, bytes) == want)
			continue;
		printf("# %s %#llx, %u fraction bits, %u bytes: %lld, %ld clamped, in a row %lld; "
		       "expected %lld, %ld\n", format->name, (unsigned long long)bits[i],
		       frac_bits, bytes, (long long)integer_at(&one, 0, bytes), got,
		       (long long)integer_at(all, i, bytes), (long long)want, want_clamped);
		return false;
	}
	if (clamped == sum)
		return true;
	printf("# %s, %u fraction bits, %u bytes: %ld of %zu clamped, expected %ld\n",
	       format->name, frac_bits, bytes, clamped, count, sum);
	return false;
}

/* Inputs come one by one and are converted by the row, to every width. */
struct row {
	const struct format *format;
	unsigned int frac_bits;
	bool right;
	size_t count;
	uint64_t bits[MAX_COUNT];
};

static void start(struct row *row, const struct format *format, unsigned int frac_bits)
{
	row->format = format;
	row->frac_bits = frac_bits;
	row->right = true;
	row->count = 0;
}

static void flush(struct row *row)
{
	for (unsigned int bytes = 1; bytes <= 8 && row->right; bytes *= 2)
		row->right = fixed_are_right(row->format, row->bits, row->count, row->frac_bits,
					     bytes);
	row->count = 0;
}

/* @bits with either sign */
static void feed(struct row *row, uint64_t bits)
{
	bits &= sign_of(row->format) - 1;
	if (!finite_bits(row->format, bits))
		return;
	row->bits[row->count++] = bits;
	row->bits[row->count++] = bits | sign_of(row->format);
	if (row->count == MAX_COUNT)
		flush(row);
}

/* A value, if the format has it, and what is next to it */
static void feed_around(struct row *row, long double value)
{
	uint64_t bits;

	if (!bits_of(row->format, value, &bits))
		return;
	feed(row, bits);
	feed(row, bits + 1);
	if (bits)
		feed(row, bits - 1);
}

/* splitmix64: the same at every run */
static uint64_t random_state;

static uint64_t random_bits(void)
{
	uint64_t z = random_state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

/* Fractions of the block's largest one: from which on it rounds to 128, and others */
static uint64_t largest_fraction(const struct format *format, unsigned int which)
{
	uint64_t all = (1ULL << format->fraction) - 1;
	uint64_t full = 255ULL << format->fraction >> 7 & all;

	switch (which) {
	case 0:
		return 0;
	case 1:
		return full;
	case 2:
		return full - 1;
	case 3:
		return all;
	default:
		return random_bits() & all;
	}
}

#define LARGEST_FRACTIONS 5

/* A fixture only because without one a test has no more than 30 s. */
FIXTURE(scale) {
	int unused;
};

FIXTURE_SETUP(scale)
{
	self->unused = 0;
}

FIXTURE_TEARDOWN(scale)
{
}

TEST(golden_blocks)
{
	for (size_t i = 0; i < ARRAY_SIZE(scale_golden_blocks); i++) {
		const struct scale_golden_block *golden = &scale_golden_blocks[i];
		const struct format *format = &formats[golden->dtype - KVSCRATCH_DTYPE_F64];
		int8_t elements[BLOCK], oracle[BLOCK];
		uint8_t scale, oracle_scale;
		uint64_t bits[BLOCK];
		union words in;

		ASSERT_EQ(golden->dtype, format->dtype);
		for (int j = 0; j < BLOCK; j++) {
			bits[j] = golden->in[j % SCALE_GOLDEN_PATTERN];
			store(format, &in, j, bits[j]);
		}
		EXPECT_EQ(golden->saturated, to_mxint8(golden->dtype, &in, 1, elements, &scale))
			TH_LOG("block %zu, %s", i, format->name);
		EXPECT_EQ(golden->saturated, oracle_block(format, bits, oracle, &oracle_scale));
		if (golden->saturated < 0)
			continue;
		EXPECT_EQ(golden->scale, scale)
			TH_LOG("block %zu, %s", i, format->name);
		EXPECT_EQ(golden->scale, oracle_scale);
		for (int j = 0; j < BLOCK; j++) {
			EXPECT_EQ(golden->elements[j % SCALE_GOLDEN_PATTERN], elements[j])
				TH_LOG("block %zu, %s, %#llx", i, format->name,
				       (unsigned long long)bits[j]);
			EXPECT_EQ(golden->elements[j % SCALE_GOLDEN_PATTERN], oracle[j]);
		}
	}
}

TEST(golden_fixed)
{
	for (size_t i = 0; i < ARRAY_SIZE(scale_golden_fixed); i++) {
		const struct scale_golden_fixed *golden = &scale_golden_fixed[i];
		const struct format *format = &formats[golden->dtype - KVSCRATCH_DTYPE_F64];
		int64_t element, oracle;
		union words in;

		ASSERT_EQ(golden->dtype, format->dtype);
		store(format, &in, 0, golden->in);
		EXPECT_EQ(golden->saturated, to_fixed(golden->dtype, &in, 1, golden->frac_bits,
						      golden->bytes, &element))
			TH_LOG("case %zu, %s", i, format->name);
		EXPECT_EQ(golden->saturated, oracle_fixed(format, golden->in, golden->frac_bits,
							  golden->bytes, &oracle));
		if (golden->saturated < 0)
			continue;
		EXPECT_EQ(golden->element, integer_at(&element, 0, golden->bytes))
			TH_LOG("case %zu, %s", i, format->name);
		EXPECT_EQ(golden->element, oracle);
	}
}

TEST(zeros_give_zeros)
{
	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];

		for (int signs = 0; signs < 4; signs++) {
			int8_t elements[BLOCK];
			int64_t integers[BLOCK];
			uint8_t scale = 0xaa;
			union words in;

			for (int i = 0; i < BLOCK; i++)
				store(format, &in, i, signs >> i % 2 & 1 ? sign_of(format) : 0);
			memset(elements, 0x55, sizeof(elements));
			EXPECT_EQ(0, to_mxint8(format->dtype, &in, 1, elements, &scale));
			EXPECT_EQ(0, scale);
			EXPECT_TRUE(all_zero(elements, sizeof(elements)));
			for (unsigned int bytes = 1; bytes <= 8; bytes *= 2) {
				memset(integers, 0x55, sizeof(integers));
				EXPECT_EQ(0, to_fixed(format->dtype, &in, BLOCK, 62, bytes,
						      integers));
				EXPECT_TRUE(all_zero(integers, (size_t)BLOCK * bytes));
			}
		}
	}
}

static bool each_as_the_largest(const struct format *format)
{
	for (uint32_t v = 0; v < 1 << 16; v++) {
		uint64_t magnitude = v & 0x7fff;
		uint64_t bits[BLOCK] = {};

		if (!finite_bits(format, v))
			continue;
		bits[v % BLOCK] = v;
		if (!block_is_right(format, bits))
			return false;
		/* anything below, and what is close below */
		for (int i = 0; i < BLOCK; i++) {
			uint64_t less = i & 1 ? random_bits() % (magnitude + 1) :
						magnitude - random_bits() % (magnitude / 8 + 1);

			bits[i] = less | (random_bits() & 0x8000);
		}
		bits[v % BLOCK] = v;
		if (!block_is_right(format, bits))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(scale, every_16_bit_value_as_the_largest, TEST_SECONDS)
{
	EXPECT_TRUE(each_as_the_largest(F16));
	EXPECT_TRUE(each_as_the_largest(BF16));
}

/* Beside a largest one of every exponent, with every value that is no larger */
static bool each_beside_a_larger_one(const struct format *format)
{
	for (unsigned int field = 0; field <= last_field(format); field++) {
		for (unsigned int which = 0; which < LARGEST_FRACTIONS; which++) {
			uint64_t largest = (uint64_t)field << format->fraction |
					   largest_fraction(format, which);
			uint64_t v = 0;

			for (unsigned int n = 0;; n++) {
				uint64_t bits[BLOCK];

				/* sixteen magnitudes; the last one's other sign is in the next */
				for (int i = 0; i < BLOCK; i++) {
					bits[i] = v | (i & 1 ? 0x8000 : 0);
					v += (i & 1) && i != BLOCK - 1 && v < largest;
				}
				bits[BLOCK - 1] = largest | (n & 1 ? 0x8000 : 0);
				/* every position has its turn */
				if (n % BLOCK != BLOCK - 1) {
					uint64_t moved = bits[n % BLOCK];

					bits[n % BLOCK] = bits[BLOCK - 1];
					bits[BLOCK - 1] = moved;
				}
				if (!block_is_right(format, bits))
					return false;
				if (v == largest)
					break;
			}
		}
	}
	return true;
}

TEST_F_TIMEOUT(scale, every_16_bit_value_beside_a_larger_one, TEST_SECONDS)
{
	EXPECT_TRUE(each_beside_a_larger_one(F16));
	EXPECT_TRUE(each_beside_a_larger_one(BF16));
}

static bool each_as_fixed(const struct format *format)
{
	static struct row row;

	for (unsigned int frac_bits = 0; frac_bits <= 62; frac_bits++) {
		start(&row, format, frac_bits);
		for (uint32_t v = 0; v < 1 << 15; v++)
			feed(&row, v);
		flush(&row);
		if (!row.right)
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(scale, every_16_bit_value_as_fixed, TEST_SECONDS)
{
	EXPECT_TRUE(each_as_fixed(F16));
	EXPECT_TRUE(each_as_fixed(BF16));
}

/* Blocks of candidates that share a largest one */
static bool beside(const struct format *format, const uint64_t *candidates, size_t count,
		   uint64_t largest)
{
	for (size_t at = 0; at < count; at += BLOCK - 1) {
		size_t place = at / (BLOCK - 1) % BLOCK;
		uint64_t bits[BLOCK];

		for (size_t i = 0; i < BLOCK - 1; i++)
			bits[i] = candidates[(at + i) % count];
		bits[BLOCK - 1] = bits[place];
		bits[place] = largest;
		if (!block_is_right(format, bits))
			return false;
	}
	return true;
}

/*
 * The magnitudes k + 0.5 of a block whose largest one has @exponent, the values
 * next to them, and both signs of each
 */
static bool ties_of_blocks(const struct format *format, int exponent)
{
	/* where the scale ends */
	int of_scale = exponent < -127 ? -127 : exponent > 127 ? 127 : exponent;
	uint64_t candidates[128 * 6];
	uint64_t least, largest;
	size_t count = 0;

	for (int k = 0; k < 128; k++) {
		long double tie = ldexpl(k + 0.5L, of_scale - 6);
		uint64_t bits;

		if (tie >= ldexpl(1, exponent + 1) || !bits_of(format, tie, &bits))
			continue;
		for (int ulps = -1; ulps <= 1; ulps++) {
			if ((!bits && ulps < 0) || !finite_bits(format, bits + ulps))
				continue;
			candidates[count++] = bits + ulps;
			candidates[count++] = (bits + ulps) | sign_of(format);
		}
	}
	/* each as the largest, alone */
	for (size_t i = 0; i < count; i++) {
		uint64_t bits[BLOCK] = {};

		bits[i % BLOCK] = candidates[i];
		if (!block_is_right(format, bits))
			return false;
	}
	if (!bits_of(format, ldexpl(1, exponent), &least))
		abort();
	/* there are no ties where the steps are finer than the format */
	if (!count)
		candidates[count++] = least;
	for (unsigned int which = 0; which < LARGEST_FRACTIONS; which++) {
		largest = least | largest_fraction(format, which);
		/* a subnormal's fraction must not reach above its first bit */
		if (least < 1ULL << format->fraction)
			largest = least | (largest & (least - 1));
		if (!beside(format, candidates, count, largest) ||
		    !beside(format, candidates, count, largest | sign_of(format)))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(scale, ties_at_every_exponent_of_blocks, TEST_SECONDS)
{
	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		for (int exponent = formats[t].least; exponent <= formats[t].most; exponent++) {
			ASSERT_TRUE(ties_of_blocks(&formats[t], exponent))
				TH_LOG("exponent %d", exponent);
		}
	}
}

/* The integers to which a tie may belong: the lowest, anywhere, and the highest of 2^bits */
static uint64_t some_integer(unsigned int i, unsigned int bits)
{
	uint64_t first = 1ULL << bits;

	if (i < 128)
		return i & (first - 1);
	if (i < 192)
		return random_bits() & (first - 1);
	return first - 1 - ((i - 192) & (first - 1));
}

TEST_F_TIMEOUT(scale, ties_at_every_exponent_of_fixed, TEST_SECONDS)
{
	static struct row row;

	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];

		for (unsigned int frac_bits = 0; frac_bits <= 62; frac_bits++) {
			start(&row, format, frac_bits);
			for (int k = 0; k < 128; k++)
				feed_around(&row, ldexpl(k + 0.5L, -(int)frac_bits));
			for (int e = format->least; e <= format->most; e++) {
				int above = e + (int)frac_bits;

				/* the edges of every exponent, and something inside */
				feed_around(&row, ldexpl(1, e));
				feed_around(&row, ldexpl(1.5L, e));
				feed(&row, random_bits());
				/* below are no halves of steps, above nothing but whole ones */
				for (unsigned int i = 0;
				     above >= 0 && above < (int)format->fraction && i < 256; i++) {
					long double tie = ldexpl(1, above) + 0.5L;

					tie += some_integer(i, above);
					feed_around(&row, ldexpl(tie, -(int)frac_bits));
				}
			}
			flush(&row);
			ASSERT_TRUE(row.right);
		}
	}
}

TEST(integers_saturate_at_both_ends)
{
	static struct row row;

	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		for (unsigned int frac_bits = 0; frac_bits <= 62; frac_bits++) {
			start(&row, &formats[t], frac_bits);
			for (unsigned int bytes = 1; bytes <= 8; bytes *= 2) {
				long double end = ldexpl(1, 8 * bytes - 1);

				for (int halves = -6; halves <= 6; halves++)
					feed_around(&row, ldexpl(end + halves * 0.5L,
								 -(int)frac_bits));
			}
			flush(&row);
			EXPECT_TRUE(row.right);
		}
	}
}

/* The same said in so many words, without an oracle */
TEST(only_the_least_integer_is_one_further)
{
	static const unsigned int frac_bits[] = { 0, 1, 31, 62 };

	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		for (size_t f = 0; f < ARRAY_SIZE(frac_bits); f++) {
			for (unsigned int bytes = 1; bytes <= 8; bytes *= 2) {
				const struct format *format = &formats[t];
				int64_t least = INT64_MIN >> (64 - 8 * bytes);
				uint64_t end;
				int64_t got;
				union words in;

				if (!bits_of(format, ldexpl(1, 8 * bytes - 1 - (int)frac_bits[f]),
					     &end))
					continue;
				store(format, &in, 0, end | sign_of(format));
				EXPECT_EQ(0, to_fixed(format->dtype, &in, 1, frac_bits[f], bytes,
						      &got));
				EXPECT_EQ(least, integer_at(&got, 0, bytes));
				store(format, &in, 0, end);
				EXPECT_EQ(1, to_fixed(format->dtype, &in, 1, frac_bits[f], bytes,
						      &got));
				EXPECT_EQ(-(least + 1), integer_at(&got, 0, bytes));
				/* twice as much is too much for either */
				if (end + (1ULL << format->fraction) >= infinity_of(format))
					continue;
				end += 1ULL << format->fraction;
				store(format, &in, 0, end | sign_of(format));
				EXPECT_EQ(1, to_fixed(format->dtype, &in, 1, frac_bits[f], bytes,
						      &got));
				EXPECT_EQ(least, integer_at(&got, 0, bytes));
			}
		}
	}
}

/* A block of f32 by double, where x * 2^k and rint() are exact; returns how many were clamped */
static long fast_f32_block(const uint32_t in[static BLOCK], int8_t elements[static BLOCK],
			   uint8_t *scale)
{
	float values[BLOCK], largest = 0;
	long clamped = 0;
	double power;
	int exponent;

	memcpy(values, in, sizeof(values));
	for (int i = 0; i < BLOCK; i++)
		if (fabsf(values[i]) > largest)
			largest = fabsf(values[i]);
	if (!largest) {
		memset(elements, 0, BLOCK);
		*scale = 0;
		return 0;
	}
	frexp(largest, &exponent);
	exponent--;
	if (exponent < -127)
		exponent = -127;
	*scale = exponent + 127;
	power = ldexp(1, 6 - exponent);
	for (int i = 0; i < BLOCK; i++) {
		int steps = rint(values[i] * power);

		if (steps > 127 || steps < -127) {
			steps = steps > 0 ? 127 : -127;
			clamped++;
		}
		elements[i] = steps;
	}
	return clamped;
}

static bool f32_blocks_are_right(const uint32_t *in, size_t blocks)
{
	int8_t elements[MAX_COUNT], want[BLOCK];
	uint8_t scales[MAX_BLOCKS], want_scale;
	long clamped = to_mxint8(KVSCRATCH_DTYPE_F32, in, blocks, elements, scales);

	for (size_t i = 0; i < blocks; i++) {
		clamped -= fast_f32_block(in + i * BLOCK, want, &want_scale);
		if (scales[i] != want_scale || memcmp(elements + i * BLOCK, want, BLOCK)) {
			for (int j = 0; j < BLOCK; j++)
				printf("# %#x: %d, expected %d\n", in[i * BLOCK + j],
				       elements[i * BLOCK + j], want[j]);
			printf("# scale %d, expected %d\n", scales[i], want_scale);
			return false;
		}
	}
	if (!clamped)
		return true;
	printf("# %zu f32 blocks from %#x: %ld more clamped than expected\n", blocks, in[0],
	       clamped);
	return false;
}

/* Is the fast oracle right where the exact one can tell? */
static bool fast_oracle_is_exact(const uint32_t in[static BLOCK])
{
	int8_t elements[BLOCK], want[BLOCK];
	uint8_t scale, want_scale;
	uint64_t bits[BLOCK];

	for (int i = 0; i < BLOCK; i++)
		bits[i] = in[i];
	return fast_f32_block(in, elements, &scale) ==
		       oracle_block(F32, bits, want, &want_scale) &&
	       scale == want_scale && !memcmp(elements, want, BLOCK);
}

/*
 * A block around a largest one with @field: @fraction at every distance up to 14
 * with both signs, and as a subnormal. What lies below the format is subnormal.
 */
static void near_the_largest(uint32_t block[static BLOCK], unsigned int field, uint32_t fraction)
{
	unsigned int place = fraction % BLOCK;

	for (unsigned int i = 1; i < BLOCK - 1; i++) {
		unsigned int distance = (i - 1) / 2;

		block[i] = (field > distance ? field - distance : 0) << 23 | fraction |
			   (i & 1) << 31;
	}
	block[BLOCK - 1] = fraction | (fraction & 1) << 31;
	block[0] = block[place];
	/* by turns it is one of the row, or just rounds to 128, or just does not */
	if (fraction / BLOCK % 4 != 3)
		block[place] = field << 23 | largest_fraction(F32, fraction / BLOCK % 4) |
			       (fraction >> 1 & 1) << 31;
}

/* around where the common block begins, and below which it could not */
static const unsigned int f32_fields[] = { 254, 127, 11, 10, 8, 7, 1, 0 };

TEST_F_TIMEOUT(scale, every_f32_fraction_near_the_largest, TEST_SECONDS)
{
	uint32_t block[BLOCK];

	for (size_t f = 0; f < ARRAY_SIZE(f32_fields); f++) {
		for (uint32_t fraction = 0; fraction < 1 << 23; fraction += F32_STRIDE) {
			near_the_largest(block, f32_fields[f], fraction);
			ASSERT_TRUE(f32_blocks_are_right(block, 1));
			if (fraction % 61 == 0) {
				ASSERT_TRUE(fast_oracle_is_exact(block));
			}
		}
	}
}

/*
 * For one fraction every exponent, 32 neighbours to a block, from which the
 * last is missing; the sign alternates
 */
static void every_exponent(uint32_t block[static 256], uint32_t fraction, unsigned int first_sign)
{
	for (unsigned int i = 0; i < 256; i++) {
		unsigned int field = (i + fraction) % 256;

		block[i] = field == 255 ? 0 : field << 23 | fraction | ((i + first_sign) & 1) << 31;
	}
}

TEST_F_TIMEOUT(scale, every_f32_value_once, TEST_SECONDS)
{
	uint32_t blocks[256];

	for (unsigned int sign = 0; sign < 2; sign++) {
		for (uint32_t fraction = 0; fraction < 1 << 23; fraction += F32_STRIDE) {
			every_exponent(blocks, fraction, sign);
			ASSERT_TRUE(f32_blocks_are_right(blocks, 8));
			for (unsigned int i = 0; i < 256 && fraction % 1021 == 0; i += BLOCK) {
				ASSERT_TRUE(fast_oracle_is_exact(blocks + i));
			}
		}
	}
}

/* An element of a block whose largest ones have @field: of any kind */
static uint64_t any_bits(const struct format *format, unsigned int field)
{
	uint64_t bits = random_bits();
	uint64_t all = (1ULL << format->fraction) - 1;
	uint64_t fraction = bits & all;
	unsigned int distance = bits >> 53 & 15;

	/* zeros behind make ties */
	if (bits >> 57 & 1)
		fraction &= ~(all >> (bits >> 48 & 7));
	switch (bits >> 58 & 7) {
	case 0:
		field = random_bits() % (field + 1);
		break;
	case 1:
		field = 0;
		break;
	default:
		field = field > distance ? field - distance : 0;
	}
	if (bits >> 61 == 7)
		return bits & sign_of(format);
	if (bits >> 47 & 1)
		fraction |= sign_of(format);
	return (uint64_t)field << format->fraction | fraction;
}

TEST_F_TIMEOUT(scale, random_blocks, TEST_SECONDS)
{
	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];

		for (int n = 0; n < 100000; n++) {
			unsigned int field = random_bits() % (last_field(format) + 1);
			uint64_t bits[BLOCK];

			for (int i = 0; i < BLOCK; i++)
				bits[i] = any_bits(format, field);
			ASSERT_TRUE(block_is_right(format, bits));
			ASSERT_TRUE(fixed_are_right(format, bits, BLOCK, n % 63, 1 << n % 4));
		}
	}
}

/* Blocks have nothing to do with each other; what is clamped adds up. */
TEST(blocks_are_independent)
{
	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];

		for (size_t blocks = 0; blocks <= MAX_BLOCKS; blocks++) {
			int8_t elements[MAX_COUNT + BLOCK], want[BLOCK];
			uint8_t scales[MAX_BLOCKS + 1], scale;
			static uint64_t bits[MAX_COUNT];
			static union words in;
			long clamped = 0;

			for (size_t i = 0; i < blocks * BLOCK; i++) {
				unsigned int field = i / BLOCK * last_field(format) / MAX_BLOCKS;

				/* with blocks of zeros among them */
				bits[i] = i / BLOCK % 5 == 4 ? 0 : any_bits(format, field);
				/* and some that round to 128 */
				if (i % 7 == 0 && bits[i])
					bits[i] |= (1ULL << format->fraction) - 1;
				store(format, &in, i, bits[i]);
			}
			memset(elements, 0x55, sizeof(elements));
			memset(scales, 0xaa, sizeof(scales));
			clamped = to_mxint8(format->dtype, &in, blocks, elements, scales);
			for (size_t i = 0; i < blocks; i++) {
				clamped -= oracle_block(format, bits + i * BLOCK, want, &scale);
				EXPECT_EQ(scale, scales[i]);
				EXPECT_EQ(0, memcmp(want, elements + i * BLOCK, BLOCK));
			}
			EXPECT_EQ(0, clamped);
			/* nothing behind the last one */
			EXPECT_EQ(0xaa, scales[blocks]);
			EXPECT_EQ(0x55, elements[blocks * BLOCK]);
		}
	}
}

/* An array of @bytes that ends where nothing may be touched */
static void *at_a_wall(size_t bytes)
{
	size_t page = page_bytes();
	size_t whole = (bytes + page - 1) / page * page;
	char *at = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			-1, 0);

	if (at == MAP_FAILED || mprotect(at + whole, page, PROT_NONE))
		abort();
	return at + whole - bytes;
}

TEST(arrays_end_where_they_end)
{
	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];

		for (size_t blocks = 0; blocks <= 3; blocks++) {
			void *in = at_a_wall(blocks * BLOCK * format->width / 8);

			for (size_t i = 0; i < blocks * BLOCK; i++)
				store(format, in, i, any_bits(format, i % last_field(format)));
			EXPECT_LE(0, to_mxint8(format->dtype, in, blocks, at_a_wall(blocks * BLOCK),
					       at_a_wall(blocks)));
		}
		for (size_t count = 0; count <= 65; count++) {
			void *in = at_a_wall(count * format->width / 8);

			for (size_t i = 0; i < count; i++)
				store(format, in, i, any_bits(format, i % last_field(format)));
			for (unsigned int bytes = 1; bytes <= 8; bytes *= 2) {
				char *out = at_a_wall((count + 1) * bytes);

				/* the last one stays as it was */
				memset(out + count * bytes, 0x55, bytes);
				EXPECT_LE(0, to_fixed(format->dtype, in, count, 9, bytes, out));
				for (unsigned int i = 0; i < bytes; i++) {
					EXPECT_EQ(0x55, out[count * bytes + i]);
				}
				EXPECT_LE(0, to_fixed(format->dtype, in, count, 9, bytes,
						      at_a_wall(count * bytes)));
			}
		}
	}
}

enum background { ZEROS, SUBNORMALS, MIXED, LARGEST, BACKGROUNDS };

/* What is around a NaN or an infinity; by itself it is accepted */
static uint64_t background_bits(const struct format *format, enum background background)
{
	switch (background) {
	case ZEROS:
		return 0;
	case SUBNORMALS:
		return 1;
	case LARGEST:
		return infinity_of(format) - 1;
	default:
		return any_bits(format, last_field(format));
	}
}

TEST_F_TIMEOUT(scale, what_is_not_finite_is_refused, TEST_SECONDS)
{
	enum { BLOCKS = 4, COUNT = BLOCKS * BLOCK };

	for (size_t t = 0; t < ARRAY_SIZE(formats); t++) {
		const struct format *format = &formats[t];
		const uint64_t words[] = {
			infinity_of(format),
			/* signalling, quiet, and every bit of the fraction */
			infinity_of(format) + 1,
			infinity_of(format) | 1ULL << (format->fraction - 1),
			sign_of(format) - 1,
		};

		for (int background = 0; background < BACKGROUNDS; background++) {
			int8_t elements[COUNT];
			int64_t integers[COUNT];
			uint8_t scales[BLOCKS];
			union words in;

			for (int i = 0; i < COUNT; i++)
				store(format, &in, i, background_bits(format, background));
			EXPECT_LE(0, to_mxint8(format->dtype, &in, BLOCKS, elements, scales));
			EXPECT_LE(0, to_fixed(format->dtype, &in, COUNT, 0, 1, integers));
			for (int n = 0; n < COUNT * 8; n++) {
				uint64_t word = words[n % 4] | (n & 4 ? sign_of(format) : 0);
				int at = n / 8;

				store(format, &in, at, word);
				EXPECT_EQ(KVS_SCALE_NOT_FINITE,
					  to_mxint8(format->dtype, &in, BLOCKS, elements, scales))
					TH_LOG("%s %#llx at %d", format->name,
					       (unsigned long long)word, at);
				for (unsigned int bytes = 1; bytes <= 8; bytes *= 2) {
					EXPECT_EQ(KVS_SCALE_NOT_FINITE,
						  to_fixed(format->dtype, &in, COUNT, n % 63,
							   bytes, integers))
						TH_LOG("%s %#llx at %d", format->name,
						       (unsigned long long)word, at);
				}
				store(format, &in, at, background_bits(format, background));
			}
		}
	}
}

/*
 * As an engine would call it: the compiler sees that the memory is of another type,
 * and must not conclude that the functions do not touch it.
 */
TEST(takes_the_types_that_callers_have)
{
	float row[32];
	double wide[2] = { 1.5, 3.0 };
	uint64_t bits[2] = { 0x4008000000000000ull, 0 };
	int64_t fixed[2] = { 7, 7 };
	__s8 elements[32];
	__u8 scale;

	for (int i = 0; i < 32; i++)
		row[i] = 1.5f;
	EXPECT_EQ(0, kvs_scale_mxint8(KVSCRATCH_DTYPE_F32, row, 1, elements, &scale));
	EXPECT_EQ(96, elements[0]);
	EXPECT_EQ(127, scale);
	EXPECT_EQ(0, kvs_scale_fixed(KVSCRATCH_DTYPE_F64, bits, 2, 0, 8, fixed));
	EXPECT_EQ(3, fixed[0]);
	EXPECT_EQ(0, fixed[1]);
	EXPECT_EQ(0, kvs_scale_fixed(KVSCRATCH_DTYPE_F64, wide, 2, 0, 8, fixed));
	EXPECT_EQ(2, fixed[0]);
	EXPECT_EQ(3, fixed[1]);
}

TEST_HARNESS_MAIN
