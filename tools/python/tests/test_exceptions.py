# SPDX-License-Identifier: GPL-2.0-only
"""Which exception a wrong argument is: those that the package's documentation has."""

import errno
import socket

import numpy as np
import pytest

import kvscratch
from kvscratch import Scratchpad

ROW = np.zeros(3, np.float32)
HUGE = 2 ** 70


@pytest.mark.parametrize("call", [
    lambda pad: Scratchpad(HUGE, 3),
    lambda pad: Scratchpad(4, -HUGE),
    lambda pad: Scratchpad(4, 3, "i8", frac_bits=HUGE),
    lambda pad: Scratchpad(4, 3, "f\0"),
    lambda pad: Scratchpad.from_fd(HUGE),
    lambda pad: Scratchpad.from_fd(2 ** 31),
    lambda pad: Scratchpad.from_fd(-1),
    lambda pad: Scratchpad.attach(HUGE),
    lambda pad: Scratchpad.attach(2 ** 31),
    lambda pad: Scratchpad.attach(-1),
    lambda pad: Scratchpad.attach("story\0/k0"),
    lambda pad: Scratchpad.attach("\ud800"),
    lambda pad: Scratchpad.attach(pad, "x"),
    lambda pad: Scratchpad.load("a.npy", max_seq_len=HUGE),
    lambda pad: Scratchpad.load("a\0.npy"),
    lambda pad: pad.truncate(HUGE),
    lambda pad: pad.truncate(-1),
    lambda pad: pad.truncate(1),
    lambda pad: pad.save("a\0.npy"),
    lambda pad: kvscratch.save("a.txt", {"a": pad}),
    lambda pad: kvscratch.holder_put("story", {"k0": HUGE}),
    lambda pad: kvscratch.holder_put("story", {}),
    lambda pad: kvscratch.holder_get("story", "x"),
    lambda pad: kvscratch.holder_drop("a\0"),
    lambda pad: kvscratch.send_handles(HUGE, {"k0": pad}),
    lambda pad: kvscratch.promises("disk"),
])
def test_wrong_values(pad, call):
    with pytest.raises(ValueError):
        call(pad)


@pytest.mark.parametrize("call", [
    lambda pad: Scratchpad("4", 3),
    lambda pad: Scratchpad(4, 3.0),
    lambda pad: Scratchpad(4, 3, 5),
    lambda pad: Scratchpad(4, 3, frac_bits=None),
    lambda pad: Scratchpad.from_fd("3"),
    lambda pad: Scratchpad.from_fd(pad),
    lambda pad: Scratchpad.attach(None),
    lambda pad: Scratchpad.attach(b"story"),
    lambda pad: Scratchpad.attach(pad, 0),
    lambda pad: Scratchpad.load(None),
    lambda pad: Scratchpad.load("a.npy", 1),
    lambda pad: Scratchpad.load("a.npy", max_seq_len="1"),
    lambda pad: kvscratch.load(3.0),
    lambda pad: pad.append(None),
    lambda pad: pad.append(1),
    lambda pad: pad.append([1.0, 2.0, 3.0]),
    lambda pad: pad.append(ROW.astype("f8")),
    lambda pad: pad.truncate("1"),
    lambda pad: pad.truncate(1.0),
    lambda pad: pad.get_token(0.0),
    lambda pad: pad.get_token("0"),
    lambda pad: pad.save(None),
    lambda pad: kvscratch.save("a.npy", [pad]),
    lambda pad: kvscratch.save("a.npy", pad),
    lambda pad: kvscratch.save("a.npy", {1: pad}),
    lambda pad: kvscratch.save("a.npy", {"a": 1}),
    lambda pad: kvscratch.holder_put("story", [pad]),
    lambda pad: kvscratch.holder_put("story", {"k0": "k0"}),
    lambda pad: kvscratch.holder_put("story", {"k0": 3.0}),
    lambda pad: kvscratch.holder_put("story", {3: pad}),
    lambda pad: kvscratch.holder_get(3),
    lambda pad: kvscratch.holder_drop(None),
    lambda pad: kvscratch.send_handles("socket", {"k0": pad}),
    lambda pad: kvscratch.send_handles(1, pad),
    lambda pad: kvscratch.receive_handles("socket"),
])
def test_wrong_types(pad, call):
    with pytest.raises(TypeError):
        call(pad)


def test_rows_that_are_not_there(pad):
    pad.append(ROW)
    for i in (1, -2, HUGE, -HUGE, np.uint8(1)):
        with pytest.raises(IndexError):
            pad.get_token(i)
    with Scratchpad(300, 1, "u8") as long:
        long.append(np.arange(300, dtype=np.uint8)[:, None].copy())
        # 300 is no uint8, nor -300 an int8
        for i in (np.uint8(3), np.int8(3), np.int64(3)):
            assert long.get_token(i)[0] == 3
        assert long.get_token(np.int8(-1))[0] == 299 - 256


def test_files_that_are_not_there(pad, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for call in (lambda: Scratchpad.load(tmp_path / "a.npy"),
                 lambda: kvscratch.load(tmp_path / "a.npy"),
                 lambda: pad.save(tmp_path / "no" / "a.npy"),
                 lambda: Scratchpad.attach("story"),
                 lambda: kvscratch.holder_get("story"),
                 lambda: kvscratch.holder_put("story", {"k0": pad}),
                 lambda: kvscratch.holder_drop("story")):
        with pytest.raises(FileNotFoundError):
            call()


def test_what_is_no_socket(pad, tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        for call in (lambda: kvscratch.send_handles(file, {"k0": pad}),
                     lambda: kvscratch.receive_handles(file)):
            with pytest.raises(OSError) as caught:
                call()
            assert type(caught.value) is OSError and caught.value.errno == errno.ENOTSOCK
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(ConnectionResetError):
        kvscratch.receive_handles(theirs)


def test_full_is_of_a_pad():
    with Scratchpad(1, 1) as pad:
        pad.append(ROW[:1])
        with pytest.raises(kvscratch.Full) as caught:
            pad.append(ROW[:1])
        assert caught.value.errno == errno.ENOSPC
