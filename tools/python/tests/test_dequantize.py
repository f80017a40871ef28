# SPDX-License-Identifier: GPL-2.0-only
"""Scaled integers as floats: exact, whatever NumPy would have calculated in."""

import fractions

import numpy as np
import pytest

from kvscratch import Scratchpad, dequantize

INTEGERS = ("i1", "i2", "i4", "i8")
# what the frac_bits of a pad may come as
NUMBERS = (int, np.int8, np.uint8, np.int64, np.uint64)


def nearest(number, frac_bits):
    """number / 2^frac_bits as float32, rounded once"""
    exact = fractions.Fraction(int(number), 1 << frac_bits)
    rounded = np.float32(float(number)) * np.float32(2.0 ** -frac_bits)
    # a double may be halfway between two floats where the integer was not
    return min((rounded, np.nextafter(rounded, np.float32(np.inf)),
                np.nextafter(rounded, np.float32(-np.inf))),
               key=lambda near: (abs(fractions.Fraction(float(near)) - exact),
                                 near.view(np.uint32) & 1))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_all_fraction_bits(dtype):
    limits = np.iinfo(dtype)
    numbers = [0, 1, -1, 3, 100, -127, limits.max, limits.min, limits.max // 3]
    if dtype == "i8":
        # between two floats, by little more than a half
        numbers += [2 ** 62 + 2 ** 38 + 1, -(2 ** 54 + 2 ** 30 + 1)]
    elements = np.array([numbers], dtype)
    for frac_bits in range(63):
        values = dequantize(elements, frac_bits=frac_bits)
        assert values.dtype == np.float32 and values.shape == elements.shape
        assert values[0].tolist() == [float(nearest(number, frac_bits)) for number in numbers]


def test_small_integers_come_back():
    values = dequantize(np.array([[1, 3, 100, -127]], "i1"), frac_bits=30)
    assert (values * np.float32(2 ** 30)).tolist() == [[1, 3, 100, -127]]


@pytest.mark.parametrize("number", NUMBERS)
def test_fraction_bits_of_any_type(number):
    elements = np.array([[64, -3]], "i1")
    assert dequantize(elements, frac_bits=number(3)).tolist() == [[8, -0.375]]


def test_fraction_bits_out_of_range():
    elements = np.array([[1]], "i1")
    for frac_bits in (-1, 63, 2 ** 70):
        with pytest.raises(ValueError) as caught:
            dequantize(elements, frac_bits=frac_bits)
        assert str(caught.value) == f"frac_bits: expected 0 to 62, got {frac_bits}"
    for frac_bits in (1.5, "1", None):
        with pytest.raises(TypeError):
            dequantize(elements, frac_bits=frac_bits)


def test_every_scale():
    elements = np.tile(np.array([1, -1, 127, -127, 64, 0, 3, -128], "i1"), (255, 4))
    scales = np.arange(255, dtype=np.uint8).reshape(255, 1)
    values = dequantize(elements, scales)
    assert values.dtype == np.float32
    # doubles have room for all of it, floats for all but -128 * 2^121
    exact = elements * 2.0 ** (scales.astype(int) - 127 - 6)
    with np.errstate(over="ignore"):
        assert np.array_equal(values, exact.astype(np.float32))
    assert np.isnan(dequantize(elements[:1], np.array([[255]], np.uint8))).all()


def test_arrays_of_any_layout():
    elements = np.arange(-128, 128, dtype="i1").reshape(2, 2, 64)
    scales = np.arange(100, 108, dtype=np.uint8).reshape(2, 2, 2)
    values = dequantize(elements, scales)
    assert values.shape == (2, 2, 64)
    assert np.array_equal(dequantize(elements.copy("F"), scales.copy("F")), values)
    assert np.array_equal(dequantize(elements[:, ::-1], scales[:, ::-1]), values[:, ::-1])
    assert np.array_equal(dequantize(elements[0, 0], scales[0, 0]), values[0, 0])
    assert np.array_equal(dequantize(elements.tolist()[0][0], frac_bits=1), elements[0, 0] / 2)
    assert np.array_equal(dequantize(elements.astype(">i2"), frac_bits=1), elements / 2)
    for empty in (np.empty((0, 64), "i1"), np.empty((3, 0), "i1")):
        assert dequantize(empty, frac_bits=3).shape == empty.shape
        scales = np.empty((len(empty), empty.shape[1] // 32), np.uint8)
        assert dequantize(empty, scales).shape == empty.shape


def test_views_of_pads():
    with (Scratchpad(2, 32, "mxint8") as mx, Scratchpad(2, 3, "i8", frac_bits=30) as fixed):
        mx.append(bytes([64] * 32 + [127]))
        fixed.append(np.array([1, 2, -3], "i1"))
        view = mx.view()
        assert dequantize(view, view.scales()).tolist() == [[1] * 32]
        values = dequantize(fixed.view(), frac_bits=fixed.frac_bits)
        assert (values * 2.0 ** 30).tolist() == [[1, 2, -3]]


def test_what_has_no_values():
    elements, scales = np.zeros((2, 64), "i1"), np.zeros((2, 2), np.uint8)
    # uint16 would be bf16
    for dtype in ("f4", "f8", "u2", "u4", "?", "c8", "O", "S1", "M8[s]"):
        with pytest.raises(TypeError):
            dequantize(np.zeros((2, 64), dtype))
    for elements_dtype, scales_dtype in (("i2", "u1"), ("f4", "u1"), ("u1", "u1"), ("i1", "i1"),
                                         ("i1", "i4")):
        with pytest.raises(TypeError):
            dequantize(elements.astype(elements_dtype), scales.astype(scales_dtype))
    for shape in ((2, 1), (1, 2), (2, 64), (2,), (), (2, 2, 1)):
        with pytest.raises(ValueError) as caught:
            dequantize(elements, np.zeros(shape, np.uint8))
        assert str(caught.value) == f"scales: expected a shape of (2, 2), got {shape}"
    for odd in (np.zeros((2, 33), "i1"), np.zeros((), "i1")):
        with pytest.raises(ValueError):
            dequantize(odd, np.zeros(odd.shape[:-1] + (1,), np.uint8))
    with pytest.raises(ValueError):
        dequantize(elements, scales, 3)
