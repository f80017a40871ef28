# SPDX-License-Identifier: GPL-2.0-only
"""Arrays and views in the memory of a pad: without a copy, read-only, alive."""

import ctypes
import gc
import hashlib
import os
import sys

import numpy as np
import pytest

from conftest import mappings
from kvscratch import Scratchpad, View

ROW = np.arange(3, dtype=np.float32)


def address(array):
    return array.__array_interface__["data"][0]


def test_no_copy(pad):
    pad.append(ROW)
    first = pad.as_tensor()
    pad.append(ROW + 10)
    second = pad.as_tensor()
    assert address(first) == address(second) == address(np.asarray(pad.view()))
    assert first.tolist() == [[0, 1, 2]]
    assert second.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert not second.flags.owndata and second.flags.c_contiguous


def test_live(pad):
    pad.append(ROW)
    array = pad.as_tensor()
    # the memory is the pad's: what takes the place of a dropped row shows
    pad.clear()
    pad.append(ROW + 5)
    assert array.tolist() == [[5, 6, 7]]


def test_read_only(pad):
    pad.append(ROW)
    array = pad.as_tensor()
    assert not array.flags.writeable
    with pytest.raises(ValueError):
        array[0, 0] = 1
    with pytest.raises(ValueError):
        array.flags.writeable = True
    with pytest.raises(TypeError):
        memoryview(pad.view())[0, 0] = 1.0
    with pytest.raises((BufferError, TypeError)):
        (ctypes.c_char * 4).from_buffer(pad.view())
    copy = array.copy()
    copy[0, 0] = 7
    assert array[0, 0] == 0


def test_empty(pad):
    assert pad.as_tensor().shape == (0, 3)
    assert len(pad.view()) == 0 and pad.view().valid_rows() == 0
    assert bytes(pad.view()) == b""


def test_buffer(pad):
    pad.append(np.arange(6, dtype=np.float32).reshape(2, 3))
    view = pad.view()
    buffer = memoryview(view)
    assert (buffer.shape, buffer.strides, buffer.ndim) == ((2, 3), (12, 4), 2)
    assert (buffer.format, buffer.itemsize, buffer.nbytes) == ("f", 4, 24)
    assert buffer.readonly and buffer.c_contiguous and buffer.obj is view
    assert buffer.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (view.shape, len(view)) == ((2, 3), 2)
    # consumers that want plain bytes
    rows = np.arange(6, dtype=np.float32).tobytes()
    assert bytes(view) == rows
    assert hashlib.sha256(view).digest() == hashlib.sha256(rows).digest()


class Buffer(ctypes.Structure):
    """Py_buffer"""

    _fields_ = [("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t),
                ("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int),
                ("format", ctypes.c_char_p), ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
                ("strides", ctypes.POINTER(ctypes.c_ssize_t)), ("suboffsets", ctypes.c_void_p),
                ("internal", ctypes.c_void_p)]


SIMPLE, WRITABLE, FORMAT, ND, STRIDES = 0, 1, 4, 8, 0x18
C_CONTIGUOUS, F_CONTIGUOUS = 0x38, 0x58


def test_what_a_consumer_asks_for(pad):
    pad.append(np.zeros((2, 3), np.float32))
    view = pad.view()

    def request(flags):
        buffer = Buffer()
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), flags)
        found = (buffer.len, buffer.itemsize, buffer.readonly, buffer.ndim, buffer.format,
                 buffer.shape[:2] if buffer.shape else None,
                 buffer.strides[:2] if buffer.strides else None)
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
        return found

    assert request(SIMPLE) == (24, 4, 1, 1, None, None, None)
    assert request(FORMAT) == (24, 4, 1, 1, b"f", None, None)
    assert request(ND) == (24, 4, 1, 2, None, [2, 3], None)
    assert request(C_CONTIGUOUS | FORMAT) == (24, 4, 1, 2, b"f", [2, 3], [12, 4])
    for flags in (WRITABLE, STRIDES | WRITABLE, F_CONTIGUOUS):
        with pytest.raises(BufferError):
            request(flags)


def test_valid_rows(pad):
    pad.append(np.zeros((3, 3), np.float32))
    view = pad.view()
    assert (len(view), view.generation, view.valid_rows()) == (3, 0, 3)
    pad.append(ROW)
    assert view.valid_rows() == 3
    pad.truncate(2)
    assert view.valid_rows() == 2
    pad.append(ROW)
    assert view.valid_rows() == 2
    later = pad.view()
    assert (len(later), later.generation, later.valid_rows()) == (3, 1, 3)
    # two truncates later nothing is known any more
    pad.truncate(3)
    assert (view.valid_rows(), later.valid_rows()) == (0, 3)
    pad.clear()
    assert (view.valid_rows(), later.valid_rows()) == (0, 0)
    assert pad.generation == 3


def test_state(pad):
    pad.append(ROW)
    pad.clear()
    pad.append(ROW)
    pad.append(ROW)
    assert pad.state == pad.view().state == 1 << 32 | 2


def test_truncate(pad):
    pad.append(np.ones((4, 3), np.float32))
    pad.truncate(n=3)
    assert (len(pad), pad.generation) == (3, 1)
    with pytest.raises(ValueError) as caught:
        pad.truncate(4)
    assert str(caught.value) == "expected at most 3, the committed rows, got 4"
    with pytest.raises(ValueError) as caught:
        pad.truncate(-1)
    assert str(caught.value) == "n: expected 0 to 4294967295, got -1"
    assert (len(pad), pad.generation) == (3, 1)


def memory_of(pad, rows):
    """All memory of a pad, committed or not, through a view of when it was full"""
    pad.append(np.ones((rows, pad.dim), np.float32))
    return pad.as_tensor()


def test_zero(pad):
    memory = memory_of(pad, 4)
    pad.truncate(1)
    assert memory.all()
    pad.truncate(1, zero=True)
    assert memory[0].all() and not memory[1:].any()
    pad.clear(zero=True)
    assert not memory.any()


def test_scales_want_mxint8(pad):
    for call in (pad.scales, pad.view().scales):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == "expected the view of an mxint8 pad, got f32"
    with Scratchpad(4, 32, "mxint8", input_dtype="f32") as scaled:
        with pytest.raises(TypeError) as caught:
            scaled.view().scales().scales()
        assert str(caught.value) == "expected the view of an mxint8 pad, got its scales"


def test_scales_of_the_same_moment():
    with Scratchpad(4, 32, "mxint8", input_dtype="f32") as pad:
        pad.append(np.ones(32, np.float32))
        view = pad.view()
        pad.append(np.ones(32, np.float32))
        scales = view.scales()
        assert scales.shape == (1, 1) and scales.state == view.state
        pad.clear()
        assert scales.valid_rows() == 0


def test_memory_stays_after_close():
    pad = Scratchpad(4, 3)
    pad.append(ROW)
    other = Scratchpad.attach(pad, "rw")
    fd = pad.fileno()
    array, view = pad.as_tensor(), pad.view()
    pad.close()
    assert pad.closed and array.tolist() == [[0, 1, 2]]
    # the view follows the pad still
    other.append(ROW)
    assert view.valid_rows() == 1
    other.clear()
    assert view.valid_rows() == 0
    other.close()
    part = array[0, 1:]
    del array, view, pad
    gc.collect()
    assert part.tolist() == [1, 2]
    os.fstat(fd)
    del part
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert mappings() == 0


def test_memory_stays_without_the_object():
    array = Scratchpad(4, 3).as_tensor()
    pad = Scratchpad(4, 3)
    pad.append(ROW)
    array = pad.as_tensor()
    del pad
    gc.collect()
    assert array.tolist() == [[0, 1, 2]]


def test_close_without_views():
    pad = Scratchpad(4, 3)
    pad.append(ROW)
    pad.as_tensor()
    fd = pad.fileno()
    assert mappings()
    pad.close()
    pad.close()
    with pytest.raises(OSError):
        os.fstat(fd)
    assert mappings() == 0


def test_references(pad):
    """What is made and forgotten many times leaves nothing behind."""
    pad.append(ROW)
    full = np.zeros((9, 3), np.float32)
    wrong = np.zeros(3)
    counted = (pad, ROW, full, wrong, View, type(pad), None)

    def use():
        pad.append(ROW)
        pad.truncate(1)
        pad.as_tensor()
        memoryview(pad.view()).release()
        pad.get_token(0)
        pad.view().valid_rows()
        str(pad)
        repr(pad)
        pad.open_reader().close()
        for what in (full, wrong):
            try:
                pad.append(what)
            except (OSError, TypeError):
                pass

    use()
    before = [sys.getrefcount(counter) for counter in counted]
    for _ in range(100):
        use()
    after = [sys.getrefcount(counter) for counter in counted]
    # None's come and go by a few
    assert all(abs(a - b) < 50 for a, b in zip(after, before)), (before, after)
    assert after[:4] == before[:4]


def test_tokens(pad):
    assert not pad and list(pad) == []
    pad.append(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert pad and len(pad) == 2
    assert pad.get_token(0).tolist() == [0, 1, 2]
    assert pad.get_token(-1).tolist() == [3, 4, 5]
    assert [row.tolist() for row in pad] == [[0, 1, 2], [3, 4, 5]]
    token = pad.get_token(0)
    pad.clear(zero=True)
    # a copy, and the caller's own
    assert token.tolist() == [0, 1, 2]
    token[0] = 9
    for i in (0, -1, 5):
        with pytest.raises(IndexError) as caught:
            pad.get_token(i)
        assert str(caught.value) == f"expected a row of 0, got {i}"


def test_tokens_end_at_a_truncate(pad):
    pad.append(np.zeros((3, 3), np.float32))
    rows = iter(pad)
    next(rows)
    pad.truncate(1)
    assert list(rows) == []


def test_tokens_of_mxint8():
    with Scratchpad(4, 64, "mxint8", input_dtype="f32") as pad:
        pad.append(np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64))
        for i in range(2):
            assert pad.get_token(i).dtype == np.int8
            assert np.array_equal(pad.get_token(i), pad.as_tensor()[i])
