# SPDX-License-Identifier: GPL-2.0-only
"""Pads in files."""

import errno
import signal

import numpy as np
import pytest

import kvscratch
from conftest import python
from kvscratch import Plane, Scratchpad

ROWS = np.arange(9, dtype=np.float32).reshape(3, 3)


def test_npy(pad, tmp_path):
    pad.append(ROWS)
    path = tmp_path / "rows.npy"
    pad.save(path)
    assert np.array_equal(np.load(path), ROWS)
    np.save(tmp_path / "other.npy", ROWS.astype(np.float16))
    with Scratchpad.load(tmp_path / "other.npy") as back:
        assert (back.dtype, back.capacity) == ("f16", 3)
        assert np.array_equal(back.as_tensor(), ROWS)
    with Scratchpad.load(str(path), max_seq_len=10) as back:
        assert (back.capacity, back.mode) == (10, "rw")
        back.append(ROWS)
        assert np.array_equal(back.as_tensor(), np.vstack([ROWS, ROWS]))
    with pytest.raises(ValueError):
        Scratchpad.load(path, max_seq_len=2)


def test_safetensors(pad, tmp_path):
    pad.append(ROWS)
    path = tmp_path / "cache.safetensors"
    with (Scratchpad(4, 32, "mxint8", input_dtype="f32") as scaled,
          Scratchpad(4, 3, "bf16") as bf16):
        scaled.append(np.linspace(-1, 1, 32, dtype=np.float32))
        bf16.append(np.array([1, 2, 3], np.uint16))
        kvscratch.save(path, {"k0": pad, "scaled": scaled, "bf16": bf16})
        back = kvscratch.load(path)
        assert set(back) == {"k0", "scaled", "bf16"}
        for name, saved in (("k0", pad), ("scaled", scaled), ("bf16", bf16)):
            assert type(back[name]) is Scratchpad
            assert (back[name].dtype, back[name].capacity) == (saved.dtype, 4)
            assert np.array_equal(back[name].as_tensor(), saved.as_tensor())
        assert np.array_equal(back["scaled"].scales(), scaled.scales())
        assert back["scaled"].input_dtype == "f32"
    with Scratchpad.load(path, "bf16") as one:
        assert one.as_tensor().tolist() == [[1, 2, 3]]
    # what was loaded goes with the last reference, which nothing_leaks looks for


def test_planes(pad, tmp_path):
    planes = (Plane("k0", 3), Plane("v 0", 32, "mxint8", "f32"), Plane("", 1, "i32"))
    path = tmp_path / "cache.safetensors"
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    with Scratchpad(5, planes=planes, tag=b"\0model \xff") as cache:
        with cache.writer() as writer:
            writer.stage("k0", ROWS[:2])
            writer.stage("v 0", values)
            writer.stage(2, np.array([[7], [8]], np.int32))
            writer.commit()
        kvscratch.save(path, {"cache": cache, "pad": pad})
        with Scratchpad.load(path, "cache", max_seq_len=9) as back:
            assert (back.planes, back.tag, back.capacity) == (planes, cache.tag, 9)
            for plane in range(3):
                assert np.array_equal(back.as_tensor(plane), cache.as_tensor(plane))
            assert np.array_equal(back.scales("v 0"), cache.scales("v 0"))
            # it takes what the saved one took
            back.append({"k0": ROWS[2:], "v 0": values[1:], "": np.int32([[9]])})
            assert np.array_equal(back["v 0"][2], back["v 0"][1])
        assert set(kvscratch.load(path)) == {"cache", "pad"}
        with pytest.raises(OSError) as caught:
            cache.save(tmp_path / "a.npy")
        assert caught.value.errno == errno.EOPNOTSUPP
        cache.save(tmp_path / "a.npy", plane="k0")
        assert np.array_equal(np.load(tmp_path / "a.npy"), ROWS[:2])
        cache.save(tmp_path / "a.npy", plane=2)
        assert np.load(tmp_path / "a.npy").tolist() == [[7], [8]]
        for plane, error in (("k1", KeyError), (3, IndexError), (1.5, TypeError)):
            with pytest.raises(error):
                cache.save(tmp_path / "b.npy", plane=plane)
        with pytest.raises(ValueError):
            cache.save(path, plane="k0")
    with pytest.raises(ValueError):
        cache.save(tmp_path / "b.npy", plane="k0")
    assert not (tmp_path / "b.npy").exists()


def test_what_cannot_be_saved(pad, tmp_path):
    for path, pads in ((tmp_path / "rows.txt", {"a": pad}), (tmp_path / "a.npy", {}),
                       (tmp_path / "a.npy", {"a": pad, "b": pad})):
        with pytest.raises(ValueError):
            kvscratch.save(path, pads)
    with pytest.raises(TypeError):
        kvscratch.save(tmp_path / "a.npy", {"a": ROWS})
    with pytest.raises(FileNotFoundError):
        pad.save(tmp_path / "no" / "a.npy")
    with Scratchpad(1, 1, "bf16") as bf16, pytest.raises(OSError) as caught:
        bf16.save(tmp_path / "a.npy")
    assert caught.value.errno == errno.EOPNOTSUPP
    pad.close()
    with pytest.raises(ValueError) as caught:
        pad.save(tmp_path / "a.npy")
    assert str(caught.value) == "the scratchpad is closed"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded(pad, tmp_path):
    path = tmp_path / "a.safetensors"
    pad.save(path, name="k0")
    with pytest.raises(KeyError) as caught:
        Scratchpad.load(path, "k1")
    assert caught.value.args == (
        'expected the name of a pad in the file, which has k0, got "k1"',)
    path.write_bytes(path.read_bytes()[:-1] + b"x" * 2)
    for load in (Scratchpad.load, kvscratch.load):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert "expected" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        Scratchpad.load(tmp_path / "nothing.npy")


def test_a_file_of_another_number_of_pads(pad, tmp_path):
    path = tmp_path / "a.safetensors"
    for pads, names in (({"k0": pad, "v0": pad}, "k0 v0"),
                        ({f"layer.{i}": pad for i in range(99)},
                         " ".join(f"layer.{i}" for i in range(11)) + " ...")):
        kvscratch.save(path, pads)
        with pytest.raises(ValueError) as caught:
            Scratchpad.load(path)
        assert str(caught.value) == ("expected the name of a pad: the file has "
                                     f"{len(pads)} of them, {names}")
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError) as caught:
        Scratchpad.load(path)
    assert str(caught.value) == "expected the name of a pad: the file has 0 of them, none"
    with pytest.raises(KeyError):
        Scratchpad.load(path, "k0")


FULL_DISK = """
import ctypes, os, sys, kvscratch
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC = 0x20000, 0x10000000, 1 << 18, 1 << 14
libc = ctypes.CDLL(None)
if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if os.geteuid() else 0)):
    sys.exit("skip")
libc.mount(None, b"/", None, MS_PRIVATE | MS_REC, None)
assert not libc.mount(b"none", os.fsencode(sys.argv[1]), b"tmpfs", 0, b"size=64k")
with kvscratch.Scratchpad(32, 4096, "u8") as pad:
    pad.append(memoryview(bytes(32 * 4096)).cast("B", (32, 4096)))
    try:
        pad.save(sys.argv[1] + "/a.npy")
    except OSError as error:
        print(type(error).__name__, error.errno, os.listdir(sys.argv[1]))
"""


def test_a_full_disk_is_no_full_pad(tmp_path):
    try:
        said = python(FULL_DISK, tmp_path)
    except AssertionError as error:
        if str(error).startswith("skip\n"):
            pytest.skip("neither root nor user namespaces")
        raise
    assert said == f"OSError {errno.ENOSPC} []\n"


def test_save_hears_signals(tmp_path):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    old = signal.signal(signal.SIGALRM, stop)
    try:
        with Scratchpad(32, 1 << 20, "u8") as pad:
            pad.append(np.ones((32, 1 << 20), np.uint8))
            with pytest.raises(Stop):
                # long before so much is on disk
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                pad.save(tmp_path / "a.npy")
    finally:
        signal.signal(signal.SIGALRM, old)
    assert not list(tmp_path.iterdir())
