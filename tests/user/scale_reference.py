#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""kvscratch_scale.h against NumPy, which somebody else wrote.

usage: scale_reference.py            compares; prints TAP
       scale_reference.py --golden   prints tests/scale_golden.h

Needs Debian's python3-numpy, so it names Debian's interpreter; and a compiler,
$CC or gcc.

The golden table comes from a third arithmetic, Python's exact fractions, and
NumPy has to agree with that too.
"""

import ctypes
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from fractions import Fraction

import numpy as np

from tap import expect, run_tests, test

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests/scale_golden.h"
BLOCK = 32
NOT_FINITE = -1
WIDTHS = (1, 2, 4, 8)

WRAPPER = r"""
#include "kvscratch_scale.h"

long mxint8(__u32 dtype, const void *in, unsigned long blocks, __s8 *elements, __u8 *scales)
{
	return kvs_scale_mxint8(dtype, in, blocks, elements, scales);
}

long fixed(__u32 dtype, const void *in, unsigned long count, unsigned int frac_bits,
	   unsigned int bytes, void *out)
{
	return kvs_scale_fixed(dtype, in, count, frac_bits, bytes, out);
}
"""


class Format:
    """An IEEE 754 format: its layout, and its values as exact fractions."""

    def __init__(self, name, dtype, exponent, fraction):
        self.name, self.dtype = name, dtype
        self.exponent, self.fraction = exponent, fraction
        self.width = 1 + exponent + fraction
        self.bias = 2 ** (exponent - 1) - 1
        self.least = 1 - self.bias - fraction
        self.infinity = (2 ** exponent - 1) << fraction
        self.quiet_nan = self.infinity | 1 << (fraction - 1)
        self.sign = 1 << (self.width - 1)
        self.word = np.dtype(f"u{self.width // 8}")

    def value(self, bits):
        """None stands for what is not finite."""
        field = bits >> self.fraction & (2 ** self.exponent - 1)
        fraction = bits & (2 ** self.fraction - 1)
        if field == 2 ** self.exponent - 1:
            return None
        if field:
            fraction += 2 ** self.fraction
        value = Fraction(fraction) * Fraction(2) ** (max(field, 1) - 1 + self.least)
        return -value if bits & self.sign else value

    def bits(self, value):
        """The bits of a value that the format has."""
        value = Fraction(value)
        magnitude = abs(value)
        exponent = self.least
        while magnitude >= Fraction(2) ** (exponent + self.fraction + 1):
            exponent += 1
        steps = magnitude / Fraction(2) ** exponent
        bits = (exponent - self.least << self.fraction) + int(steps)
        bits |= self.sign if value < 0 else 0
        assert steps.denominator == 1 and self.value(bits) == value, (self.name, value)
        return bits

    def floats(self, words):
        """The same values as f64, by NumPy's conversions."""
        if self.name == "BF16":
            return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return words.view(f"f{self.width // 8}").astype(np.float64)


F64 = Format("F64", 1, 11, 52)
F32 = Format("F32", 2, 8, 23)
F16 = Format("F16", 3, 5, 10)
BF16 = Format("BF16", 4, 8, 7)
FORMATS = (F64, F32, F16, BF16)


def power(exponent):
    return Fraction(2) ** exponent


# exact fractions


def exact_mxint8(form, block):
    """Returns (scale, elements, clamped)."""
    values = [form.value(bits) for bits in block]
    if None in values:
        return 0, [0] * len(block), NOT_FINITE
    largest = max(map(abs, values))
    if not largest:
        return 0, [0] * len(block), 0
    exponent = -127
    while exponent < 127 and power(exponent + 1) <= largest:
        exponent += 1
    # round() of a fraction is half to even
    rounded = [round(value * power(6 - exponent)) for value in values]
    return (exponent + 127, [max(-127, min(127, steps)) for steps in rounded],
            sum(abs(steps) > 127 for steps in rounded))


def exact_fixed(form, bits, frac_bits, width):
    """Returns (element, clamped)."""
    value = form.value(bits)
    if value is None:
        return 0, NOT_FINITE
    rounded = round(value * power(frac_bits))
    edge = 1 << (8 * width - 1)
    element = max(-edge, min(edge - 1, rounded))
    return element, int(element != rounded)


# NumPy


def numpy_mxint8(form, words):
    """Returns (scales, elements, clamped) of the blocks that @words is rows of."""
    values = form.floats(words)
    largest = np.abs(values).max(axis=1)
    exponents = np.clip(np.frexp(largest)[1] - 1, -127, 127)
    # What overflows is clamped; what underflows is far below half a step.
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.rint(np.ldexp(values, 6 - exponents[:, np.newaxis]))
    clamped = np.abs(rounded) > 127
    return (np.where(largest > 0, exponents + 127, 0).astype(np.uint8),
            np.clip(rounded, -127, 127).astype(np.int8), int(clamped.sum()))


def numpy_fixed(form, words, frac_bits, width):
    """Returns (elements, clamped)."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.rint(np.ldexp(form.floats(words), frac_bits))
    # the largest integer itself need not be a float: compare with the next one
    edge = 2.0 ** (8 * width - 1)
    high, low = rounded >= edge, rounded < -edge
    elements = np.where(high | low, 0, rounded).astype(np.int64)
    elements[high] = (1 << (8 * width - 1)) - 1
    elements[low] = -(1 << (8 * width - 1))
    return elements.astype(f"i{width}"), int(high.sum() + low.sum())


# kvscratch_scale.h


@functools.cache
def library():
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory) / "scale.c"
        shared = pathlib.Path(directory) / "scale.so"
        source.write_text(WRAPPER, encoding="ascii")
        subprocess.run([os.environ.get("CC", "gcc"), "-O2", "-Wall", "-Wextra", "-Wshadow",
                        "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'uapi'}", f"-I{ROOT}",
                        "-o", shared, source], check=True)
        loaded = ctypes.CDLL(str(shared))
    loaded.mxint8.restype = loaded.fixed.restype = ctypes.c_long
    return loaded


def pointer(array):
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def tested_mxint8(form, words):
    scales = np.full(len(words), 0xaa, np.uint8)
    elements = np.full(words.shape, -86, np.int8)
    clamped = library().mxint8(ctypes.c_uint32(form.dtype), pointer(words),
                               ctypes.c_ulong(len(words)), pointer(elements), pointer(scales))
    return scales, elements, clamped


def tested_fixed(form, words, frac_bits, width):
    elements = np.full(words.shape, -86, f"i{width}")
    clamped = library().fixed(ctypes.c_uint32(form.dtype), pointer(words),
                              ctypes.c_ulong(words.size), ctypes.c_uint(frac_bits),
                              ctypes.c_uint(width), pointer(elements))
    return elements, clamped


def compare_mxint8(form, words):
    """Returns how many elements were compared."""
    words = np.ascontiguousarray(words.reshape(-1, BLOCK), form.word)
    scales, elements, clamped = tested_mxint8(form, words)
    want_scales, want_elements, want_clamped = numpy_mxint8(form, words)
    wrong = (scales != want_scales) | (elements != want_elements).any(axis=1)
    for at in np.flatnonzero(wrong)[:1]:
        expect(False, f"{form.name}: {wrong.sum()} of {len(words)} blocks differ; block {at} of "
                      f"{[hex(word) for word in words[at]]}: scale {scales[at]}, "
                      f"{elements[at].tolist()}; NumPy: scale {want_scales[at]}, "
                      f"{want_elements[at].tolist()}")
    expect(clamped == want_clamped, f"{form.name}: {clamped} clamped; NumPy: {want_clamped}")
    return words.size


def compare_fixed(form, words, frac_bits, width):
    words = np.ascontiguousarray(words.reshape(-1), form.word)
    elements, clamped = tested_fixed(form, words, frac_bits, width)
    want_elements, want_clamped = numpy_fixed(form, words, frac_bits, width)
    for at in np.flatnonzero(elements != want_elements)[:1]:
        expect(False, f"{form.name}: {words[at]:#x} with {frac_bits} fraction bits in {width} "
                      f"bytes: {elements[at]}; NumPy: {want_elements[at]}")
    expect(clamped == want_clamped, f"{form.name}: {clamped} clamped; NumPy: {want_clamped}")
    return words.size


# input

RANDOM = np.random.default_rng(8)


def finite(form, words):
    """Only the finite ones, a multiple of a block"""
    words = words[(words & (form.sign - 1)) < form.infinity]
    return words[:words.size // BLOCK * BLOCK]


def random_words(form, count):
    """Any bits at all"""
    words = RANDOM.integers(0, 2 ** form.width, count, np.uint64, False)
    return finite(form, words.astype(form.word))


def near_words(form, count):
    """Blocks whose exponents are close together, with zeros, blocks of them, and subnormals"""
    fields = RANDOM.integers(0, 2 ** form.exponent - 1, (count // BLOCK, 1))
    fields = np.clip(fields - RANDOM.integers(0, 12, (count // BLOCK, BLOCK)), 0, None)
    words = fields.astype(np.uint64) << np.uint64(form.fraction)
    words |= RANDOM.integers(0, 2 ** form.fraction, words.shape, np.uint64)
    # zeros in the low bits of fractions make ties
    words &= ~((np.uint64(1) << RANDOM.integers(0, form.fraction, words.shape, np.uint64)) -
               np.uint64(1))
    words[RANDOM.random(words.shape) < 0.05] = 0
    words[RANDOM.random(len(words)) < 0.01] = 0
    words |= RANDOM.integers(0, 2, words.shape, np.uint64) << np.uint64(form.width - 1)
    return words.astype(form.word).reshape(-1)


def edge_words(form):
    """For every exponent the fractions around each tie, both signs, in a random order"""
    fields = np.arange(2 ** form.exponent - 1, dtype=np.uint64) << np.uint64(form.fraction)
    fractions = np.arange(0, 2 ** form.fraction, 2 ** max(form.fraction - 8, 0), dtype=np.uint64)
    fractions = np.unique(np.concatenate([fractions, fractions - np.uint64(1),
                                          fractions + np.uint64(1)])
                          & np.uint64(2 ** form.fraction - 1))
    words = (fields[:, np.newaxis] | fractions).reshape(-1)
    words = np.concatenate([words, words | np.uint64(form.sign)])
    return finite(form, RANDOM.permutation(words).astype(form.word))


def sorted_edge_words(form):
    """The same with neighbours in a block, so that they do not vanish"""
    words = edge_words(form)
    return words[np.argsort(words & np.array(form.sign - 1, form.word), kind="stable")]


def say(what, counts):
    print(f"# {what}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


@test
def mxint8_is_what_numpy_computes():
    counts = {}
    for form in FORMATS:
        counts[form.name] = sum(compare_mxint8(form, words) for words in (
            random_words(form, 1 << 20), near_words(form, 1 << 21), edge_words(form),
            sorted_edge_words(form)))
        expect(counts[form.name] >= 10 ** 6, f"{counts}")
    say("elements", counts)


@test
def fixed_is_what_numpy_computes():
    counts = {}
    for form in FORMATS:
        edges = edge_words(form)
        counts[form.name] = 0
        for frac_bits in range(63):
            words = np.concatenate([random_words(form, 4096), near_words(form, 4096),
                                    RANDOM.choice(edges, 8192)])
            # where rounding and clamping happen: values from 2^-2 to 2^65 steps
            fields = RANDOM.integers(form.bias - frac_bits - 2, form.bias - frac_bits + 66, 16384)
            fields = np.clip(fields, 0, 2 ** form.exponent - 2).astype(np.uint64)
            near = RANDOM.choice(edges, fields.size).astype(np.uint64)
            near &= np.uint64(form.sign | (2 ** form.fraction - 1))
            near |= fields << np.uint64(form.fraction)
            words = np.concatenate([words, near.astype(form.word)])
            for width in WIDTHS:
                counts[form.name] += compare_fixed(form, words, frac_bits, width)
        expect(counts[form.name] >= 10 ** 6, f"{counts}")
    say("elements", counts)


@test
def integers_at_both_ends():
    for form in FORMATS:
        for frac_bits in range(63):
            for width in WIDTHS:
                # 2^(b-1) steps, what the format has next to it, and where it has
                # them, the halves of steps around
                edge = form.bias + 8 * width - 1 - frac_bits << form.fraction
                shift = form.fraction - 8 * width
                words = [edge + ulps for ulps in range(-8, 9)]
                if shift >= 0:
                    words += [edge + (halves << shift) for halves in range(4)]
                    words += [edge - (halves << shift + 1) for halves in range(4)]
                words = [word | sign for word in words if 0 <= word < form.infinity
                         for sign in (0, form.sign)]
                if words:
                    compare_fixed(form, np.array(words, form.word), frac_bits, width)


@test
def what_is_not_finite_is_refused():
    for form in FORMATS:
        for word in (form.infinity, form.infinity + 1, form.quiet_nan, form.sign - 1):
            for at in range(3 * BLOCK):
                for sign in (0, form.sign):
                    words = near_words(form, 3 * BLOCK)
                    words[at] = word | sign
                    expect(tested_mxint8(form, words.reshape(-1, BLOCK))[2] == NOT_FINITE,
                           f"{form.name} {word | sign:#x} at {at} became MXINT8")
                    for width in WIDTHS:
                        expect(tested_fixed(form, words, at % 63, width)[1] == NOT_FINITE,
                               f"{form.name} {word | sign:#x} at {at} became {width} bytes")


# the golden table


def golden_blocks():
    """(what, format, four inputs that repeat)"""
    def case(what, form, *values):
        words = [form.sign if value == "-0" else form.bits(value) for value in values]
        cases.append((what, form, words))

    def ulps(form, value, by):
        """@by units in the last place away from zero"""
        word = form.bits(value)
        return form.value(word + by)

    cases = []
    for form in FORMATS:
        largest = form.value(form.infinity - 1)
        tiny = form.value(1)
        case("zeros, of both signs", form, 0, "-0", 0, "-0")
        case("negative zero beside others", form, 1, "-0", -1, 0)
        case("ties go to even", form, 1, Fraction(1, 128), Fraction(-3, 128), Fraction(5, 128))
        case("next to ties", form, -1, ulps(form, Fraction(1, 128), 1),
             ulps(form, Fraction(3, 128), -1), ulps(form, Fraction(-5, 128), 1))
        if form.fraction > 7:
            case("below 127.5 steps, and half a step lower", form,
                 ulps(form, Fraction(255, 128), -1), ulps(form, Fraction(-255, 128), -1),
                 Fraction(253, 128), Fraction(-253, 128))
        case("127.5 steps round to 128", form, Fraction(255, 128), Fraction(-255, 128), 1,
             Fraction(-127, 64))
        case("the largest finite value", form, largest, -largest, largest / 2, 0)
    for form in (F32, BF16):
        case("2^-127 is where the scale ends", form, power(-127), -power(-133), power(-128), "-0")
        case("largest subnormal", form, form.value(2 ** form.fraction - 1), -power(-127), 0,
             form.value(1))
        case("below 2^-127 the scale stays", form, power(-128), -power(-129), power(-133),
             -3 * power(-132))
        case("least exponent of the common block and below", form, power(11 - form.bias),
             -power(4 - form.bias), 3 * power(3 - form.bias), form.value(2 ** form.fraction - 1))
        case("the exponent below that one", form, power(10 - form.bias), -power(3 - form.bias),
             3 * power(2 - form.bias), form.value(2 ** form.fraction - 1))
    case("half a step of the least scale and next to it", F32, power(-134),
         power(-134) + power(-149), -3 * power(-134), power(-149))
    case("subnormals have their own scales", F16, power(-24), -power(-24), 0, "-0")
    case("subnormal ties", F16, power(-17), power(-24), -3 * power(-24), 5 * power(-24))
    case("largest subnormal", F16, F16.value(1023), -F16.value(1020), F16.value(1), F16.value(4))
    case("a normal with subnormals", F16, power(-14), F16.value(15), -F16.value(24), F16.value(8))
    case("the scale ends at 2^127", F64, power(127), -255 * power(120), power(120), -power(121))
    case("2^128 or more", F64, power(128), -power(127), ulps(F64, power(128), -1), power(121))
    case("far more than 2^128", F64, power(153), -power(157), power(300), -power(127))
    case("more than the elements could be", F64, power(185), -power(1000), power(122), power(120))
    case("2^-127 is where the scale ends", F64, power(-127), ulps(F64, power(-127), -1),
         -power(-134), 3 * power(-134))
    case("half a step of the least scale", F64, power(-134), -power(-134), power(-135), 0)
    case("one unit more", F64, ulps(F64, power(-134), 1), -ulps(F64, power(-134), 1),
         power(-134), ulps(F64, power(-133), -1))
    case("subnormals give zero", F64, F64.value(1), -F64.value(2 ** 52 - 1), power(-1022), "-0")
    for form in FORMATS:
        cases.append(("infinity", form, [form.bits(1), form.bits(-1), 0, form.infinity]))
        cases.append(("NaN", form, [form.infinity + 1 | form.sign, form.bits(1), 0, 0]))
    return cases


def golden_fixed():
    """(what, format, input, fraction bits, bytes)"""
    def case(what, form, value, frac_bits, width):
        word = form.sign if value == "-0" else form.bits(value)
        cases.append((what, form, word, frac_bits, width))

    cases = []
    for form in FORMATS:
        case("negative zero", form, "-0", 62, 8)
        case("the least magnitude", form, -form.value(1), 62, 8)
        case("half goes to 0", form, Fraction(-1, 2), 0, 4)
        case("one and a half goes to 2", form, Fraction(3, 4), 1, 1)
        case("two and a half goes to 2", form, Fraction(-5, 8), 2, 2)
        case("one unit above half", form, form.value(form.bits(Fraction(1, 2)) + 1), 0, 8)
        case("one unit below one and a half", form, form.value(form.bits(Fraction(3, 2)) - 1), 0, 1)
        case("the least integer is no clamp", form, -128, 0, 1)
        case("its magnitude is one on the other side", form, 128, 0, 1)
        case("the largest finite value", form, form.value(form.infinity - 1), 62, 8)
        case("the largest finite value", form, -form.value(form.infinity - 1), 62, 8)
        case("the least integer is no clamp", form, -power(15 - 5), 5, 2)
        case("the least of 64 bits is no clamp", form, -2, 62, 8)
        case("its magnitude is one", form, 2, 62, 8)
        cases.append(("infinity", form, form.infinity, 0, 1))
        cases.append(("NaN", form, form.quiet_nan | form.sign, 62, 8))
    for form in (F64, F32, F16):
        case("127.5 rounds to 128", form, Fraction(255, 2), 0, 1)
        case("-128.5 rounds to -128", form, Fraction(-257, 2), 0, 1)
        case("a unit below 127.5", form, form.value(form.bits(Fraction(255, 2)) - 1), 0, 1)
        case("a unit beyond -128.5", form, form.value(form.bits(Fraction(-257, 2)) + 1), 0, 1)
    for form in (F64, F32):
        case("-32768.5 rounds to -32768", form, Fraction(-65537, 2), 0, 2)
        case("32767.5 rounds to 32768", form, Fraction(65535, 2), 0, 2)
        case("-32769 does not fit", form, Fraction(-32769, 65536), 16, 2)
        case("largest below 2^63", form, form.value(form.bits(power(63)) - 1), 0, 8)
        case("next beyond -2^63", form, form.value(form.bits(-power(63)) + 1), 0, 8)
    case("the largest of 32 bits", F64, power(31) - 1, 0, 4)
    case("half below 2^31", F64, power(31) - Fraction(1, 2), 0, 4)
    case("half beyond -2^31", F64, -power(31) - Fraction(1, 2), 0, 4)
    case("a unit beyond that", F64, F64.value(F64.bits(-power(31) - Fraction(1, 2)) + 1), 0, 4)
    case("all bits of a fraction", F64, F64.value(F64.bits(2) - 1), 52, 8)
    case("a fraction at the top of 64 bits", F64, F64.value(F64.bits(power(-1)) - 1), 62, 8)
    return cases


def golden_text():
    def number(word, form):
        return f"0x{word:0{form.width // 4}x}"

    def dtype(form):
        return f"KVSCRATCH_DTYPE_{form.name}"

    lines = []
    for what, form, words in golden_blocks():
        scale, elements, clamped = exact_mxint8(form, words * (BLOCK // 4))
        steps = ", ".join(map(str, elements[:4]))
        lines += [f"\t/* {what} */",
                  f"\t{{ {dtype(form)}, {clamped}, {scale}, {{ {steps} }},"]
        quads = [", ".join(f"{number(word, form)}ULL" for word in pair)
                 for pair in (words[:2], words[2:])]
        lines += [f"\t  {{ {quads[0]},", f"\t    {quads[1]} }} }},"]
    blocks = "\n".join(lines)
    lines = []
    for what, form, word, frac_bits, width in golden_fixed():
        element, clamped = exact_fixed(form, word, frac_bits, width)
        # the least integer has no literal of its own
        literal = "(-9223372036854775807LL - 1)" if element == -2 ** 63 else f"{element}LL"
        lines += [f"\t/* {what} */",
                  f"\t{{ {dtype(form)}, {frac_bits}, {width}, {clamped}, {number(word, form)}ULL, "
                  f"{literal} }},"]
    fixed = "\n".join(lines)
    return f"""\
/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Inputs of kvscratch_scale.h and what becomes of them. Written by
 * tests/user/scale_reference.py --golden with exact fractions: do not edit.
 */
#ifndef TESTS_SCALE_GOLDEN_H
#define TESTS_SCALE_GOLDEN_H

#include <linux/types.h>

#include "../uapi/linux/kvscratch.h"

#define SCALE_GOLDEN_PATTERN 4

/**
 * struct scale_golden_block - a block of 32 elements
 * @dtype: of the input
 * @saturated: elements of the block that are clamped; -1 if it is refused
 * @scale: the scale byte, unless it is refused
 * @elements: eight times these, unless it is refused
 * @in: eight times these bits
 */
struct scale_golden_block {{
	__u32 dtype;
	int saturated;
	__u8 scale;
	__s8 elements[SCALE_GOLDEN_PATTERN];
	__u64 in[SCALE_GOLDEN_PATTERN];
}};

/**
 * struct scale_golden_fixed - an element
 * @dtype: of the input
 * @frac_bits: fraction bits of the integer
 * @bytes: size of the integer
 * @saturated: 1 if it is clamped; -1 if it is refused
 * @in: the input's bits
 * @element: the integer, unless it is refused
 */
struct scale_golden_fixed {{
	__u32 dtype;
	unsigned int frac_bits;
	unsigned int bytes;
	int saturated;
	__u64 in;
	__s64 element;
}};

static const struct scale_golden_block scale_golden_blocks[] = {{
{blocks}
}};

static const struct scale_golden_fixed scale_golden_fixed[] = {{
{fixed}
}};

#endif
"""


@test
def golden_table_is_as_generated():
    expect(GOLDEN.read_text(encoding="ascii") == golden_text(),
           "tests/scale_golden.h is not what scale_reference.py --golden prints")


@test
def numpy_computes_the_golden_table():
    for what, form, words in golden_blocks():
        want = exact_mxint8(form, words * (BLOCK // 4))
        if want[2] == NOT_FINITE:
            continue
        scales, elements, clamped = numpy_mxint8(
            form, np.array(words * (BLOCK // 4), form.word).reshape(1, BLOCK))
        expect((scales[0], elements[0].tolist(), clamped) == want, f"{form.name}: {what}")
    for what, form, word, frac_bits, width in golden_fixed():
        want = exact_fixed(form, word, frac_bits, width)
        if want[1] == NOT_FINITE:
            continue
        elements, clamped = numpy_fixed(form, np.array([word], form.word), frac_bits, width)
        expect((elements[0], clamped) == want, f"{form.name}: {what}")


def main():
    if sys.argv[1:] == ["--golden"]:
        print(golden_text(), end="")
    elif len(sys.argv) > 1:
        sys.exit(__doc__)
    else:
        run_tests()


main()
