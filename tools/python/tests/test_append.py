# SPDX-License-Identifier: GPL-2.0-only
"""What append() takes and refuses."""

import array
import errno
import threading

import numpy as np
import pytest

import kvscratch
from kvscratch import Scratchpad

NUMPY_DTYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "i64": np.int64,
                "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8}


def refused(pad, what, exception, message):
    before = pad.as_tensor().copy()
    with pytest.raises(exception) as caught:
        pad.append(what)
    text = caught.value.strerror if isinstance(caught.value, OSError) else str(caught.value)
    assert text == message
    assert type(caught.value) is exception
    assert np.array_equal(pad.as_tensor(), before)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_rows_and_batches(dtype):
    rows = np.arange(12).reshape(4, 3).astype(NUMPY_DTYPES[dtype])
    with Scratchpad(5, 3, dtype) as pad:
        pad.append(rows[0])
        pad.append(rows[1:])
        tensor = pad.as_tensor()
        assert tensor.dtype == NUMPY_DTYPES[dtype]
        assert tensor.shape == (4, 3)
        assert np.array_equal(tensor, rows)
        assert (pad.dtype, pad.input_dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_elements_of_another_type(dtype):
    with Scratchpad(5, 3, dtype) as pad:
        for name, other in NUMPY_DTYPES.items():
            if name != dtype:
                refused(pad, np.zeros(3, other), TypeError,
                        f"dtype mismatch: expected {dtype}, got {name}")


def test_other_formats(pad):
    refused(pad, np.zeros(3, ">f4"), TypeError,
            "dtype mismatch: expected f32, got elements of format >f")
    refused(pad, np.zeros(3, bool), TypeError,
            "dtype mismatch: expected f32, got elements of format ?")
    refused(pad, np.zeros(3, np.complex64), TypeError,
            "dtype mismatch: expected f32, got elements of format Zf")
    refused(pad, bytes(12), TypeError, "dtype mismatch: expected f32, got u8")
    refused(pad, np.zeros(3, np.uint32), TypeError, "dtype mismatch: expected f32, got u32")
    refused(pad, [1.0, 2.0, 3.0], TypeError,
            "expected an array or another buffer, got <class 'list'>")


def test_other_buffers(pad):
    pad.append(array.array("f", [1, 2, 3]))
    pad.append(memoryview(array.array("f", [4, 5, 6, 7, 8, 9])).cast("B").cast("f", (2, 3)))
    pad.append(np.arange(3, dtype="<f4" if np.little_endian else ">f4"))
    assert pad.as_tensor().tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2]]


def test_shapes(pad):
    refused(pad, np.zeros(2, np.float32), ValueError,
            "shape mismatch: expected 3 elements, got 2")
    refused(pad, np.zeros(0, np.float32), ValueError,
            "shape mismatch: expected 3 elements, got 0")
    refused(pad, np.zeros((2, 4), np.float32), ValueError,
            "shape mismatch: expected 3 elements, got 4")
    refused(pad, np.zeros((0, 2 ** 33 + 3), np.float32), ValueError,
            "shape mismatch: expected 3 elements, got 8589934595")
    for shape in ((), (1, 1, 3)):
        refused(pad, np.zeros(shape, np.float32), ValueError,
                f"shape mismatch: expected [3] or [n, 3], got {len(shape)} dimensions")
    pad.append(np.zeros((0, 3), np.float32))
    assert len(pad) == 0


def test_gaps_and_order(pad):
    message = "expected a C-contiguous array, got one with gaps or in another order"
    refused(pad, np.zeros((2, 6), np.float32)[:, ::2], ValueError, message)
    refused(pad, np.zeros((2, 3), np.float32, order="F"), ValueError, message)
    refused(pad, np.zeros(3, np.float32)[::-1], ValueError, message)
    pad.append(np.ascontiguousarray(np.arange(6, dtype=np.float32)[::2]))
    assert pad.as_tensor().tolist() == [[0, 2, 4]]


def test_full():
    with Scratchpad(2, 3) as pad:
        pad.append(np.ones(3, np.float32))
        refused(pad, np.ones((3, 3), np.float32), kvscratch.Full,
                "Scratchpad overflow: 1 + 3 > 2 max")
        pad.append(np.ones(3, np.float32))
        refused(pad, np.ones(3, np.float32), kvscratch.Full, "Scratchpad full: 2 / 2 tokens")
        with pytest.raises(OSError) as caught:
            pad.append(np.ones(3, np.float32))
        assert caught.value.errno == errno.ENOSPC


def test_a_row_of_the_pad_itself(pad):
    pad.append(np.arange(3, dtype=np.float32))
    pad.append(pad.as_tensor()[0])
    pad.append(pad.view())
    assert pad.as_tensor().tolist() == [[0, 1, 2]] * 4


def test_bf16():
    # 1, -2 and 0.5
    bits = np.array([0x3f80, 0xc000, 0x3f00], np.uint16)
    with Scratchpad(8, 3, "bf16") as pad:
        for row in (bits, bits.view(np.int16), bits.tobytes(), bits.view(np.uint8)):
            pad.append(row)
        pad.append(np.tile(bits.view(np.uint8), (2, 1)))
        assert pad.as_tensor().dtype == np.uint16
        assert np.array_equal(pad.as_tensor(), np.tile(bits, (6, 1)))
        floats = (pad.as_tensor().astype(np.uint32) << 16).view(np.float32)
        assert floats[0].tolist() == [1, -2, 0.5]
        refused(pad, bytes(5), ValueError, "shape mismatch: expected 6 bytes, got 5")
        refused(pad, bits[:2], ValueError, "shape mismatch: expected 3 elements, got 2")
        refused(pad, np.zeros(3, np.float16), TypeError,
                "dtype mismatch: expected bf16 as 2-byte integers or bytes, got f16")


def test_mxint8_is_converted():
    rows = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    rows[3] = 0
    with Scratchpad(8, 64, "mxint8", input_dtype="f32") as pad:
        pad.append(rows)
        view = pad.view()
        elements, scales = np.asarray(view), np.asarray(view.scales())
        assert (elements.dtype, elements.shape) == (np.int8, (5, 64))
        assert (scales.dtype, scales.shape) == (np.uint8, (5, 2))
        assert np.array_equal(pad.as_tensor(), elements)
        assert np.array_equal(pad.scales(), scales)
        assert not scales[3].any() and scales[0].all()
        # half a step is 2^-7 of the power of two that the block's largest element is in
        largest = np.abs(rows).reshape(5, 2, 32).max(axis=2).repeat(32, axis=1)
        error = np.abs(kvscratch.dequantize(elements, scales) - rows)
        assert (error <= largest / 128).all() and error.max() > 0
        assert (pad.dtype, pad.input_dtype, pad.saturated) == ("mxint8", "f32", 0)
        rows[2, 7] = np.nan
        refused(pad, rows[2], ValueError, "cannot append: a NaN or an infinity has no integer")


def test_mxint8_rows_as_they_are_stored():
    with (Scratchpad(4, 64, "mxint8", input_dtype="f16") as source,
          Scratchpad(4, 64, "mxint8") as copy):
        source.append(np.linspace(-3, 3, 128, dtype=np.float16).reshape(2, 64))
        for elements, scales in zip(source.as_tensor(), source.scales()):
            copy.append(elements.tobytes() + scales.tobytes())
        assert np.array_equal(copy.as_tensor(), source.as_tensor())
        assert np.array_equal(copy.scales(), source.scales())
        refused(copy, bytes(64), ValueError, "shape mismatch: expected 66 bytes, got 64")
        refused(copy, np.zeros(64, np.float32), TypeError,
                "dtype mismatch: expected mxint8 as bytes, elements and then scales, got f32")
        scale_of_nan = bytes(64) + bytes([127, 255])
        copy.append(scale_of_nan)
        values = kvscratch.dequantize(copy.as_tensor(), copy.scales())[2]
        assert not values[:32].any() and np.isnan(values[32:]).all()


def test_fraction_bits():
    with Scratchpad(4, 3, "i16", input_dtype="f64", frac_bits=8) as pad:
        pad.append(np.array([1.5, -0.25, 1000.0]))
        assert pad.as_tensor().tolist() == [[384, -64, 32767]]
        assert (pad.frac_bits, pad.saturated) == (8, 1)
        values = kvscratch.dequantize(pad.as_tensor(), frac_bits=pad.frac_bits)
        assert values.dtype == np.float32
        assert values.tolist() == [[1.5, -0.25, 32767 / 256]]
        refused(pad, np.array([0, np.inf, 0]), ValueError,
                "cannot append: a NaN or an infinity has no integer")


def test_geometry():
    for arguments, exception, message in (
            ((0, 3), ValueError, "max_seq_len: expected 1 to 4294967295 rows, got 0"),
            ((-1, 3), ValueError, "max_seq_len: expected 0 to 4294967295, got -1"),
            ((2 ** 32, 3), ValueError, "max_seq_len: expected 0 to 4294967295, got 4294967296"),
            ((4, 0), ValueError, "dim: expected at least 1, got 0"),
            ((4, 2 ** 32 + 1), ValueError, "dim: expected 0 to 16777216, got 4294967297"),
            ((4, 3, "f8"), ValueError, "dtype: expected f64, f32, f16, bf16, i64, i32, i16, i8, "
                                       "u8 or mxint8, got f8"),
            ((4, 33, "mxint8"), ValueError, "dim: expected a multiple of 32 for mxint8, got 33"),
            ((4.0, 3), TypeError, "'float' object cannot be interpreted as an integer")):
        with pytest.raises(exception) as caught:
            Scratchpad(*arguments)
        assert str(caught.value) == message


def test_geometry_by_keyword():
    with pytest.raises(ValueError) as caught:
        Scratchpad(4, 3, "f32", input_dtype="f64")
    assert str(caught.value) == "input dtype: expected f32 for a dtype of f32, got f64"
    with pytest.raises(ValueError) as caught:
        Scratchpad(4, 3, "i8", frac_bits=63)
    assert str(caught.value) == "frac_bits: expected 0 to 62, got 63"
    with pytest.raises(TypeError):
        Scratchpad(4, 3, "i8", "f32")
    with Scratchpad(max_seq_len=4, dim=3, dtype="u8") as pad:
        assert (pad.capacity, pad.dim, pad.dtype, pad.format) == (4, 3, "u8", "B")


def test_threads_append_whole_batches():
    with Scratchpad(4000, 8, "i32") as pad:
        def produce(number):
            for start in range(0, 1000, 10):
                first = number * 1000 + start
                pad.append(np.arange(first, first + 10, dtype=np.int32)[:, None].repeat(8, axis=1))

        threads = [threading.Thread(target=produce, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows = pad.as_tensor()
        assert (rows == rows[:, :1]).all()
        batches = rows[:, 0].reshape(-1, 10)
        assert (np.diff(batches, axis=1) == 1).all()
        # each thread's in its order, and all of them there
        for number in range(4):
            mine = batches[batches[:, 0] // 1000 == number, 0]
            assert mine.tolist() == list(range(number * 1000, number * 1000 + 1000, 10))
