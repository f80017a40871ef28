#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Files against NumPy, and against a safetensors reader and writer of a few lines.

Prints TAP. Needs Debian's python3-numpy, so it names Debian's interpreter; and a
compiler, $CC or gcc. The pads are in memfds.
"""

import atexit
import ctypes
import errno
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests/user"))
from tap import expect, run_tests, test  # noqa: E402 # pylint: disable=wrong-import-position

os.environ["KVSCRATCH_BACKEND"] = "memfd"
DIRECTORY = pathlib.Path(tempfile.mkdtemp(prefix="kvscratch-interoperability-"))
atexit.register(shutil.rmtree, DIRECTORY)

# name in the library: number, name in safetensors, type of NumPy
DTYPES = {
    "f64": (1, "F64", "<f8"), "f32": (2, "F32", "<f4"), "f16": (3, "F16", "<f2"),
    "bf16": (4, "BF16", "<u2"), "i64": (5, "I64", "<i8"), "i32": (6, "I32", "<i4"),
    "i16": (7, "I16", "<i2"), "i8": (8, "I8", "i1"), "u8": (9, "U8", "u1"),
}
F32, MXINT8 = 2, 10
BLOCK = 32


class Geometry(ctypes.Structure):
    """struct kvscratch_geometry"""
    _fields_ = [("max_seq_len", ctypes.c_uint64), ("dim", ctypes.c_uint32),
                ("dtype", ctypes.c_uint32), ("input_dtype", ctypes.c_uint32),
                ("frac_bits", ctypes.c_uint32)]


class Plane(ctypes.Structure):
    """struct kvscratch_plane"""
    _fields_ = [("dim", ctypes.c_uint32), ("dtype", ctypes.c_uint32),
                ("input_dtype", ctypes.c_uint32), ("frac_bits", ctypes.c_uint32),
                ("label", ctypes.c_char * 16), ("rest", ctypes.c_uint64 * 4)]


class NamedPad(ctypes.Structure):
    """struct kvscratch_named_pad"""
    _fields_ = [("name", ctypes.c_char_p), ("pad", ctypes.c_void_p)]


def build_library():
    library = DIRECTORY / "libkvscratch.so"
    subprocess.run([os.environ.get("CC", "gcc"), "-std=gnu11", "-O1", "-shared", "-fPIC",
                    '-DKVSCRATCH_VERSION="test"', f"-I{ROOT}/uapi", f"-I{ROOT}/tools/lib",
                    "-o", library, *(ROOT / "tools/lib").glob("*.c")], check=True)
    library = ctypes.CDLL(str(library))
    library.kvscratch_error.restype = ctypes.c_char_p
    library.kvscratch_len.restype = ctypes.c_int64
    return library


LIBRARY = build_library()


def done(result):
    expect(result == 0, f"{result}: {LIBRARY.kvscratch_error().decode()}")


class Pad:
    """A pad of this array, as it is stored, or of what is at @handle."""

    def __init__(self, rows=None, dtype=None, input_dtype=0, handle=None):
        self.handle = handle or ctypes.c_void_p()
        if rows is not None:
            geometry = Geometry(len(rows) + 2, rows.shape[1], dtype, input_dtype, 0)
            done(LIBRARY.kvscratch_new_geometry(ctypes.byref(self.handle),
                                                ctypes.byref(geometry)))
            done(LIBRARY.kvscratch_append_rows(self.handle, rows.ctypes.data_as(ctypes.c_void_p),
                                               ctypes.c_uint64(len(rows)), rows.shape[1]))

    @classmethod
    def of_planes(cls, planes, tokens, tag=b""):
        """@planes: (label, dim, dtype, input_dtype)"""
        handle = ctypes.c_void_p()
        array = (Plane * len(planes))(*(Plane(dim, dtype, input_dtype, 0, label)
                                        for label, dim, dtype, input_dtype in planes))
        done(LIBRARY.kvscratch_new_planes_sized(
            ctypes.byref(handle), ctypes.c_uint64(len(tokens) + 2), array, len(planes),
            ctypes.c_size_t(ctypes.sizeof(Plane)), tag, ctypes.c_size_t(len(tag))))
        done(LIBRARY.kvscratch_append_tokens(handle, b"".join(tokens),
                                             ctypes.c_uint64(len(tokens)), len(tokens[0])))
        return cls(handle=handle)

    def bytes(self, row_bytes):
        """The committed rows, as kvscratch_copy_rows() gives them."""
        rows = LIBRARY.kvscratch_len(self.handle)
        copy = ctypes.create_string_buffer(rows * row_bytes + 1)
        done(LIBRARY.kvscratch_copy_rows(self.handle, ctypes.c_uint64(0), ctypes.c_uint64(rows),
                                         copy))
        return copy.raw[:-1]

    def __del__(self):
        LIBRARY.kvscratch_close(self.handle)


def save(path, **pads):
    named = (NamedPad * len(pads))(*(NamedPad(name.encode(), pad.handle)
                                     for name, pad in pads.items()))
    done(LIBRARY.kvscratch_save(str(path).encode(), named, len(pads), None, None))


def load(path, name=None):
    """Returns a pad, or the errno and the words."""
    file, pad = ctypes.c_void_p(), ctypes.c_void_p()
    result = LIBRARY.kvscratch_open_file(ctypes.byref(file), str(path).encode())
    if result:
        return -result, LIBRARY.kvscratch_error().decode()
    done(LIBRARY.kvscratch_load(ctypes.byref(pad), file, name and name.encode(),
                                ctypes.c_uint64(0), None, None))
    LIBRARY.kvscratch_close_file(file)
    return Pad(handle=pad)


def loaded_bytes(path, row_bytes, name=None):
    pad = load(path, name)
    expect(isinstance(pad, Pad), f"{path.name}: {pad}")
    return pad.bytes(row_bytes)


def read_safetensors(path):
    """Returns (metadata, {name: array}); what the format asks for has to hold."""
    file = path.read_bytes()
    length = struct.unpack("<Q", file[:8])[0]
    header, data = json.loads(file[8:8 + length]), file[8 + length:]
    expect((8 + length) % 64 == 0, f"data at {8 + length}")
    metadata = header.pop("__metadata__", {})
    numpy_types = {name: numpy for _, name, numpy in DTYPES.values()}
    tensors, end = {}, 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = tensor["data_offsets"]
        array = np.frombuffer(data[first:last], numpy_types[tensor["dtype"]])
        expect(first == end and first % array.itemsize == 0, f"{name}: {first} behind {end}")
        tensors[name] = array.reshape(tensor["shape"])
        end = last
    expect(end == len(data), f"{len(data)} bytes of data, {end} in tensors")
    return metadata, tensors


def write_safetensors(path, metadata, tensors, **style):
    """@tensors: {name: (dtype, array)}"""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, (dtype, array) in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header, **style).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def some_rows(numpy_type, rows=5, dim=7):
    """Every bit pattern is as good as another; NaNs would not compare, so none of them."""
    return (np.random.default_rng(5).integers(0, 120, (rows, dim))).astype(numpy_type)


@test
def npy_that_numpy_wrote():
    for _, _, numpy_type in DTYPES.values():
        if numpy_type == "<u2":
            continue
        for version in (1, 0), (2, 0), (3, 0):
            for shape in (5, 7), (1, 1), (3, 1):
                rows = some_rows(numpy_type, *shape)
                with open(DIRECTORY / "numpy.npy", "wb") as file:
                    np.lib.format.write_array(file, rows, version=version)
                expect(loaded_bytes(DIRECTORY / "numpy.npy", rows.itemsize * shape[1]) ==
                       rows.tobytes(), f"{numpy_type} {shape} in version {version}")


@test
def npy_that_numpy_reads():
    for number, _, numpy_type in DTYPES.values():
        if numpy_type == "<u2":
            continue
        rows = some_rows(numpy_type)
        save(DIRECTORY / "ours.npy", k=Pad(rows, number))
        for mmap_mode in None, "r":
            array = np.load(DIRECTORY / "ours.npy", mmap_mode=mmap_mode)
            expect(array.dtype == rows.dtype and array.flags.c_contiguous and
                   np.array_equal(array, rows), f"{numpy_type}: {array}")


@test
def npy_of_numpy_that_no_pad_holds():
    square = np.arange(4.0).reshape(2, 2)
    for array, words in (
            (np.asfortranarray(square), "C order"), (square.astype(">f8"), "got '>f8'"),
            (square.astype(complex), "got '<c16'"), (square.astype(bool), "got '|b1'"),
            (square.astype("<u4"), "got '<u4'"), (square.astype("U3"), "got '<U3'"),
            (square[0], "got 1 dimensions"), (square[None], "got 3 dimensions"),
            (np.array(1.0), "got 0 dimensions"), (np.zeros((2, 0)), "got 0"),
            (np.zeros((2, 2), [("a", "<f4"), ("b", "<i4")]), "simple element type")):
        np.save(DIRECTORY / "refused.npy", array)
        got = load(DIRECTORY / "refused.npy")
        expect(isinstance(got, tuple) and got[0] == errno.EBADMSG and words in got[1],
               f"{words}: {got}")


@test
def safetensors_that_we_wrote():
    rows = {name: some_rows(numpy_type, 3, 5) for name, (_, _, numpy_type) in DTYPES.items()}
    pads = {name: Pad(rows[name], DTYPES[name][0]) for name in rows}
    save(DIRECTORY / "ours.safetensors", **pads)
    metadata, tensors = read_safetensors(DIRECTORY / "ours.safetensors")
    expect(set(tensors) == set(rows), f"{set(tensors)}")
    expect(metadata.pop("kvscratch") == "1", f"{metadata}")
    for name, array in rows.items():
        expect(np.array_equal(tensors[name], array), f"{name}: {tensors[name]}")
        for key, value in (("max_seq_len", "5"), ("dtype", name), ("input_dtype", name),
                           ("frac_bits", "0")):
            expect(metadata.pop(f"{name}.{key}") == value, f"{name}.{key}")
    expect(not metadata, f"{metadata}")


@test
def safetensors_that_others_wrote():
    arrays = {f"é {name} \N{GRINNING FACE}": (safetensors, some_rows(numpy_type, 4, 3))
              for name, (_, safetensors, numpy_type) in DTYPES.items()}
    for style in {}, {"indent": 2}, {"ensure_ascii": False, "sort_keys": True}:
        write_safetensors(DIRECTORY / "theirs.safetensors", {"format": "np"}, arrays, **style)
        for name, (_, array) in arrays.items():
            expect(loaded_bytes(DIRECTORY / "theirs.safetensors", array.itemsize * 3, name) ==
                   array.tobytes(), f"{name} written with {style}")


@test
def safetensors_that_go_round():
    """Ours, read and written again by another program, is still ours."""
    rows = some_rows("i1", 3, 2 * BLOCK + 2)
    pad = Pad(rows[:, :2 * BLOCK].astype("<f4"), MXINT8, F32)
    save(DIRECTORY / "ours.safetensors", k=pad)
    metadata, tensors = read_safetensors(DIRECTORY / "ours.safetensors")
    names = {np.dtype(numpy): name for _, name, numpy in DTYPES.values()}
    write_safetensors(DIRECTORY / "theirs.safetensors", metadata,
                      {name: (names[tensors[name].dtype], tensors[name])
                       for name in ("k.scales", "k")})
    row_bytes = 2 * BLOCK + 2
    again = load(DIRECTORY / "theirs.safetensors")
    expect(isinstance(again, Pad), f"{again}")
    expect(again.bytes(row_bytes) == pad.bytes(row_bytes), "other rows")


@test
def planes_that_go_round():
    """A tensor for each plane, by its label; in another order they make the same pad."""
    keys, values = some_rows("<f4", 3, 2 * BLOCK), some_rows("<f2", 3, 5)
    ids = some_rows("<i4", 3, 1)
    pad = Pad.of_planes([(b"k 0", 2 * BLOCK, MXINT8, F32), (b"v0", 5, DTYPES["f16"][0], 0),
                         (b"", 1, DTYPES["i32"][0], 0)],
                        [b"".join(plane[row].tobytes() for plane in (keys, values, ids))
                         for row in range(3)], b"model \xff")
    save(DIRECTORY / "ours.safetensors", cache=pad)
    metadata, tensors = read_safetensors(DIRECTORY / "ours.safetensors")
    expect(set(tensors) == {"cache.k%200", "cache.k%200.scales", "cache.v0", "cache.2"},
           f"{set(tensors)}")
    expect(np.array_equal(tensors["cache.v0"], values) and np.array_equal(tensors["cache.2"], ids),
           "other rows")
    expect(metadata["cache.planes"] == "k%200 v0 2" and metadata["cache.k%200.label"] == "k%200" and
           metadata["cache.tag"] == "model%20%ff", f"{metadata}")
    names = {np.dtype(numpy): name for _, name, numpy in DTYPES.values()}
    write_safetensors(DIRECTORY / "theirs.safetensors", metadata,
                      {name: (names[tensors[name].dtype], tensors[name])
                       for name in sorted(tensors, reverse=True)})
    again = load(DIRECTORY / "theirs.safetensors", "cache")
    expect(isinstance(again, Pad), f"{again}")
    row_bytes = 2 * BLOCK + 2 + 2 * 5 + 4
    expect(again.bytes(row_bytes) == pad.bytes(row_bytes), "other rows")
    expect(LIBRARY.kvscratch_find_plane(again.handle, b"k 0") == 0 and
           LIBRARY.kvscratch_find_plane(again.handle, b"") == 2, "other labels")


@test
def mxint8_that_others_scale_back():
    """By the two tensors alone, as the OCP specification defines the values"""
    rows = (np.random.default_rng(6).normal(size=(4, 3 * BLOCK)) * 100).astype("<f4")
    save(DIRECTORY / "mx.safetensors", k=Pad(rows, MXINT8, F32))
    _, tensors = read_safetensors(DIRECTORY / "mx.safetensors")
    expect(tensors["k"].dtype == "i1" and tensors["k"].shape == (4, 3 * BLOCK) and
           tensors["k.scales"].dtype == "u1" and tensors["k.scales"].shape == (4, 3),
           f"{tensors}")
    steps = np.repeat(2.0 ** (tensors["k.scales"].astype(int) - 127 - 6), BLOCK, axis=1)
    # a magnitude of 127.5 steps and more becomes 127 of them
    limit = np.where(abs(tensors["k"].astype(int)) == 127, steps, steps / 2)
    expect((abs(tensors["k"] * steps - rows) <= limit).all(), "values are off by half a step")


if __name__ == "__main__":
    run_tests()
