# SPDX-License-Identifier: GPL-2.0-only
"""Pads of several planes: what they are made of, whole tokens, arrays by label."""

import array
import collections
import errno
import types

import numpy as np
import pytest

import kvscratch
from conftest import python
from kvscratch import Plane, Scratchpad

PLANES = (Plane("k0", 3, "f32"), Plane("q", 32, "mxint8", "f32"), Plane("ids", 1, "i32"))


@pytest.fixture
def cache():
    """Four tokens of PLANES, empty"""
    with Scratchpad(4, planes=PLANES, tag=b"model 7") as made:
        yield made


def tokens(first, count):
    """Of each plane rows that tell which they are"""
    numbers = np.arange(first, first + count)
    return {"k0": numbers[:, None].repeat(3, axis=1).astype(np.float32),
            "q": numbers[:, None].repeat(32, axis=1).astype(np.float32),
            "ids": numbers[:, None].astype(np.int32)}


def check_tokens(pad, count):
    assert len(pad) == count
    for label in ("k0", "ids"):
        assert pad[label][:, 0].tolist() == list(range(count))
    values = kvscratch.dequantize(pad["q"], pad.scales("q"))
    assert values[:, 31].tolist() == list(range(count))


def test_what_it_is_made_of(cache):
    assert cache.planes == PLANES
    assert (cache.capacity, len(cache), cache.generation) == (4, 0, 0)
    assert cache.tag == b"model 7" + bytes(57)
    assert str(cache) == "Scratchpad(len=0, capacity=4, planes=3)"
    assert repr(cache) == (f"<kvscratch.Scratchpad len=0 capacity=4 planes=3 "
                           f"backend={cache.backend}>")
    with Scratchpad(2, planes=cache.planes, tag=cache.tag) as other:
        assert (other.planes, other.tag) == (cache.planes, cache.tag)


def test_tuples_are_planes():
    for planes in ([("k0", 3), ("v0", 4, "f16"), ("q", 5, "i8", "f32", 6), ("s", 1, "u8", None)],
                   (Plane(label, 3) for label in ("k0", "v0"))):
        planes = list(planes)
        with Scratchpad(4, planes=iter(planes)) as pad:
            assert pad.planes == tuple(Plane(*plane) for plane in planes)
    # an input dtype that is the dtype converts nothing
    with Scratchpad(4, planes=[("k0", 3, "f32", "f32")]) as pad:
        assert pad.planes == (Plane("k0", 3),)


def test_one_plane():
    with Scratchpad(4, 3, "i8", input_dtype="f32", frac_bits=2, tag=bytearray(b"x")) as pad:
        assert pad.planes == (Plane("", 3, "i8", "f32", 2),)
        assert pad.tag == b"x" + bytes(63)
        pad.append({"": np.zeros(3, np.float32)})
        assert pad[""].shape == (1, 3)
    with Scratchpad(4, planes=[Plane("k0", 3)]) as pad:
        row = np.arange(3, dtype=np.float32)
        for what in (row, [row], (row,), {"k0": row}):
            pad.append(what)
        assert (pad.dim, pad.dtype, len(pad)) == (3, "f32", 4)
        assert pad["k0"].tolist() == pad.as_tensor().tolist() == [[0, 1, 2]] * 4
        assert pad.get_token(3).tolist() == pad.get_token(3, "k0").tolist() == [0, 1, 2]


def test_whole_tokens(cache):
    one = tokens(0, 1)
    cache.append({label: rows[0] for label, rows in one.items()})
    cache.append(tokens(1, 2))
    # a sequence in the order of the planes
    cache.append([rows[0] for rows in tokens(3, 1).values()])
    check_tokens(cache, 4)
    assert cache.get_token(2, "k0").tolist() == cache.get_token(-2, 0).tolist() == [2, 2, 2]
    assert cache.get_token(1, "ids").dtype == np.int32
    assert np.array_equal(cache.get_token(2, "q"), cache["q"][2])
    cache.truncate(1)
    cache.append(tuple(tokens(1, 3).values()))
    check_tokens(cache, 4)


def test_mappings_and_buffers(cache):
    for kind in (types.MappingProxyType, collections.UserDict, collections.OrderedDict):
        cache.append(kind(tokens(len(cache), 1)))
    cache.append(collections.UserList([array.array("f", [3] * 3), array.array("f", [3] * 32),
                                       array.array("i", [3])]))
    check_tokens(cache, 4)
    cache.clear()
    cache.append(tokens(0, 0))
    assert len(cache) == 0


def test_no_copy_and_live(cache):
    cache.append(tokens(0, 2))
    first, ids = cache["k0"], cache["ids"]
    cache.append(tokens(2, 2))
    second = cache["k0"]
    assert first.shape == (2, 3) and second.shape == (4, 3)
    assert first.__array_interface__["data"] == second.__array_interface__["data"]
    assert not first.flags.writeable and not first.flags.owndata and first.flags.c_contiguous
    with pytest.raises(ValueError):
        first[0, 0] = 1
    view = cache.view("ids")
    assert (view.shape, view.valid_rows(), view.state) == ((4, 1), 4, 4)
    cache.truncate(1)
    assert view.valid_rows() == 1
    cache.append({"k0": np.full(3, 7, np.float32), "q": np.zeros(32, np.float32),
                  "ids": np.array([7], np.int32)})
    assert first[1].tolist() == [7, 7, 7] and ids[1] == 7
    # arrays outlive the pad
    cache.close()
    assert first[0].tolist() == [0, 0, 0]


def test_planes_by_name(cache):
    cache.append(tokens(0, 1))
    assert cache.view(0).shape == cache.view(np.int64(0)).shape == cache.view("k0").shape
    for name in ("v0", "", "a label of more than sixteen bytes"):
        for call in (lambda: cache[name], lambda: cache.view(name), lambda: cache.scales(name),
                     lambda: cache.get_token(0, name)):
            with pytest.raises(KeyError) as caught:
                call()
            if len(name) < 16:
                assert caught.value.args == (f'no plane is called "{name}"',)
    for index in (3, -1, 2 ** 40):
        with pytest.raises(IndexError) as caught:
            cache.view(index)
        assert str(caught.value) == f"expected a plane below 3, got {index}"
    with pytest.raises(TypeError) as caught:
        cache[0]
    assert str(caught.value) == ("expected the label of a plane, got int: rows are in as_tensor() "
                                 "and get_token()")
    with pytest.raises(TypeError):
        cache.view(0.0)
    with pytest.raises(TypeError) as caught:
        cache.scales("k0")
    assert str(caught.value) == "expected the view of an mxint8 pad, got f32"


def test_labels_of_any_kind():
    labels = ["ключ", "a b", "\udcff", "fifteen letters", "same", "same"]
    with Scratchpad(2, planes=[(label, 1, "u8") for label in labels]) as pad:
        assert [plane.label for plane in pad.planes] == labels
        pad.append([bytes([i]) for i in range(6)])
        for i, label in enumerate(labels[:4]):
            assert pad[label].tolist() == [[i]]
        with pytest.raises(ValueError) as caught:
            pad["same"]
        assert str(caught.value) == 'expected one plane called "same", got planes 4 and 5'
        assert [pad.as_tensor(i)[0, 0] for i in range(6)] == list(range(6))
        # of two that are called the same a dict has but one
        with pytest.raises(ValueError) as caught:
            pad.append({label: b"x" for label in labels})
        assert str(caught.value) == "expected an array for each of 6 planes, got 5"


def refused(pad, rows, exception, message):
    before = len(pad), pad.generation
    with pytest.raises(exception) as caught:
        pad.append(rows)
    assert type(caught.value) is exception
    error = caught.value
    assert (error.strerror if isinstance(error, OSError) else error.args[0]) == message
    assert (len(pad), pad.generation) == before


def test_tokens_that_are_refused(cache):
    good = tokens(0, 2)
    missing = {label: good[label] for label in ("k0", "q")}
    refused(cache, missing, ValueError, "expected an array for each of 3 planes, got 2")
    refused(cache, {**missing, "v": good["ids"]}, KeyError, "ids")
    refused(cache, {**good, "v": good["ids"]}, ValueError,
            "expected an array for each of 3 planes, got 4")
    refused(cache, [], ValueError, "expected an array for each of 3 planes, got 0")
    refused(cache, {**good, "ids": good["ids"][:1]}, ValueError,
            "plane 2 (ids): expected rows of as many tokens as plane 0 has, 2, got 1")
    refused(cache, {**good, "q": good["q"].astype(np.float64)}, TypeError,
            "plane 1 (q): dtype mismatch: expected f32, got f64")
    refused(cache, {**good, "k0": np.zeros((2, 4), np.float32)}, ValueError,
            "plane 0 (k0): shape mismatch: expected 3 elements, got 4")
    refused(cache, {**good, "k0": [1.0]}, TypeError,
            "plane 0 (k0): expected an array or another buffer, got <class 'list'>")
    for what in (good["k0"], b"abc", "k0", None, 3, iter([])):
        refused(cache, what, TypeError, "expected a dict or a sequence with an array for each "
                                        f"plane, got {type(what)!r}")
    refused(cache, tokens(0, 5), kvscratch.Full, "Scratchpad overflow: 0 + 5 > 4 max")
    good["q"][1, 1] = np.inf
    refused(cache, good, ValueError, "cannot append: a NaN or an infinity has no integer")
    # nothing of all this is in the way
    cache.append(tokens(0, 4))
    check_tokens(cache, 4)
    refused(cache, tokens(4, 1), kvscratch.Full, "Scratchpad full: 4 / 4 tokens")


class Liar(collections.UserList):
    def __len__(self):
        return 3


def test_a_sequence_that_lies(cache):
    refused(cache, Liar([b"a"]), ValueError, "the size of the sequence changed")


def test_what_only_one_plane_has(cache):
    cache.append(tokens(0, 1))
    for call in (lambda: cache.dim, lambda: cache.dtype, lambda: cache.input_dtype,
                 lambda: cache.frac_bits, lambda: cache.format, cache.view, cache.as_tensor,
                 cache.scales, lambda: cache.get_token(0), lambda: next(iter(cache))):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EOPNOTSUPP
        assert caught.value.strerror == "expected a pad of one plane, got one of 3"


@pytest.mark.parametrize("planes, exception, message", [
    ([], ValueError, "planes: expected 1 to 4096, got 0"),
    ([("a", 1)] * 4097, ValueError, "planes: expected 1 to 4096, got 4097"),
    ([("a", 1), ("b", 0)], ValueError, "plane 1: dim: expected at least 1, got 0"),
    ([("a", 1), ("b", -1)], ValueError, "plane 1: dim: expected 0 to 16777216, got -1"),
    ([("a", 1), ("b", 2 ** 70)], ValueError,
     f"plane 1: expected an integer of 64 bits, got {2 ** 70}"),
    ([("a", 1), ("b", 1, "i8", None, 63)], ValueError,
     "plane 1: frac_bits: expected 0 to 62, got 63"),
    ([("a", 1, "f8")], ValueError, "plane 0: dtype: expected f64, f32, f16, bf16, i64, i32, i16, "
                                   "i8, u8 or mxint8, got f8"),
    ([("a", 1), ("b", 33, "mxint8")], ValueError,
     "plane 1: dim: expected a multiple of 32 for mxint8, got 33"),
    ([("a", 1), ("b", 1, "f32", "f64")], ValueError,
     "plane 1: input dtype: expected f32 for a dtype of f32, got f64"),
    ([("a", 1), ("sixteen letters!", 1)], ValueError,
     'plane 1: label: expected at most 15 bytes, got "sixteen letters!" without its end'),
    ([("a\0", 1)], ValueError, "plane 0: label: expected no NUL in it, got 'a\\x00'"),
    ([(b"a", 1)], TypeError, "plane 0: label: expected a str, got <class 'bytes'>"),
    ([("a", 1), "ab"], TypeError,
     "plane 1: expected (label, dim, dtype, input_dtype, frac_bits), got 'ab'"),
    ([("a", 2 ** 22)] * 4, ValueError, None),
    ([("a",)], TypeError, None),
    ([("a", 1, "f32", None, 0, 0)], TypeError, None),
    ([("a", 1.0)], TypeError, None),
    ([("\ud800", 1)], ValueError, None),
    (3, TypeError, None),
])
def test_wrong_planes(planes, exception, message):
    with pytest.raises(exception) as caught:
        Scratchpad(4, planes=planes)
    assert message is None or str(caught.value) == message


def test_either_planes_or_one():
    for arguments in ({}, {"dim": 3, "planes": PLANES}, {"planes": PLANES, "dtype": "f32"},
                      {"planes": PLANES, "frac_bits": 3}, {"dtype": "f32"},
                      {"planes": PLANES, "input_dtype": "f32"}):
        with pytest.raises(TypeError) as caught:
            Scratchpad(4, **arguments)
        assert str(caught.value) == ("expected either planes or the dim, dtype, input_dtype and "
                                     "frac_bits of one")
    with pytest.raises(ValueError) as caught:
        Scratchpad(4, planes=PLANES, tag=bytes(65))
    assert str(caught.value) == "tag: expected at most 64 bytes, got 65"
    with pytest.raises(TypeError):
        Scratchpad(4, planes=PLANES, tag="model")
    with pytest.raises(ValueError) as caught:
        Scratchpad(-1, planes=PLANES)
    assert str(caught.value) == "max_seq_len: expected 0 to 4294967295, got -1"


def test_handles_of_their_own(cache):
    cache.append(tokens(0, 2))
    with cache.open() as reader, cache.open(mode="rw") as other, cache.open_reader() as third:
        assert (reader.mode, other.mode, third.mode) == ("r", "rw", "r")
        assert reader.planes == PLANES and reader.tag == cache.tag
        other.append(tokens(2, 1))
        check_tokens(reader, 3)
        check_tokens(third, 3)
        with pytest.raises(PermissionError):
            reader.open("rw")
        with pytest.raises(OSError) as caught:
            reader.append(tokens(3, 1))
        assert caught.value.errno == errno.EBADF
    with pytest.raises(ValueError) as caught:
        cache.open("x")
    assert str(caught.value) == "mode: expected r, w or rw, got x"


def test_another_process(cache):
    cache.append(tokens(0, 3))
    assert python("""
import sys, kvscratch
pad = kvscratch.Scratchpad.from_fd(int(sys.argv[1]))
print(pad["k0"][2].tolist(), pad["ids"][:, 0].tolist(), pad.tag[:7].decode())
""", cache.fileno(), pass_fds=[cache.fileno()]) == "[2.0, 2.0, 2.0] [0, 1, 2] model 7\n"


def test_without_numpy():
    assert python("""
import sys
sys.modules["numpy"] = None
import array, kvscratch
pad = kvscratch.Scratchpad(2, planes=[("k0", 2), ("ids", 1, "i32")])
pad.append({"k0": array.array("f", [1, 2]),
            "ids": array.array("i", [7])})
print(pad["k0"].tolist(), pad["ids"].tolist(), pad.get_token(0, "k0").tolist())
""") == "[[1.0, 2.0]] [[7]] [1.0, 2.0]\n"


def test_many_planes():
    planes = [Plane(f"{i:x}", 1 + i % 3, "u8") for i in range(4096)]
    with Scratchpad(3, planes=planes) as pad:
        assert pad.planes == tuple(planes)
        pad.append([np.full((2, plane.dim), i % 256, np.uint8) for i, plane in enumerate(planes)])
        for i in (0, 1, 2047, 4095):
            assert pad[f"{i:x}"].tolist() == [[i % 256] * (1 + i % 3)] * 2
