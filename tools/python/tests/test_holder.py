# SPDX-License-Identifier: GPL-2.0-only
"""Pads that a holder keeps."""

import errno
import subprocess

import numpy as np
import pytest

import kvscratch
from conftest import python
from kvscratch import Scratchpad

ROW = np.arange(3, dtype=np.float32)


@pytest.fixture
def hold(monkeypatch, tmp_path):
    """Start a holder with options of kvscratchctl; all of them end with the test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    names = []

    def start(name, *options):
        subprocess.run(["kvscratchctl", "hold", name, *options], check=True,
                       stdin=subprocess.DEVNULL)
        names.append(name)

    yield start
    for name in names:
        kvscratch.holder_drop(name)


def error_of(exception, function, *arguments, **keywords):
    with pytest.raises(exception) as caught:
        function(*arguments, **keywords)
    return caught.value.errno


def test_put_and_get(hold, pad):
    hold("story", "--write")
    pad.append(ROW)
    with Scratchpad(2, 1, "i32") as tokens:
        kvscratch.holder_put("story", {"k0": pad, "tokens": tokens.open_reader()})
    pad.close()
    pads = kvscratch.holder_get("story")
    assert list(pads) == ["k0", "tokens"]
    assert [held.mode for held in pads.values()] == ["r", "r"]
    assert pads["k0"].as_tensor().tolist() == [[0, 1, 2]]
    with Scratchpad.attach("story/k0", "rw") as writer:
        writer.append(ROW + 1)
    assert len(pads["k0"]) == 2
    # no more than what was put
    assert error_of(PermissionError, Scratchpad.attach, "story/tokens", "rw") == errno.EACCES
    kvscratch.holder_drop("story/tokens")
    again = kvscratch.holder_get("story", "rw")
    assert list(again) == ["k0"] and again["k0"].mode == "rw"
    assert error_of(FileExistsError, kvscratch.holder_put, "story", {"k0": again["k0"]}) == (
        errno.EEXIST)
    for held in (*pads.values(), *again.values()):
        held.close()


def test_replace(hold, pad):
    hold("story", "--write")
    with Scratchpad(2, 1, "i32") as tokens:
        kvscratch.holder_put("story", {"k0": pad, "tokens": tokens})
    old = Scratchpad.attach("story/k0", "rw")
    with Scratchpad(4, 3) as new:
        new.append(ROW)
        assert error_of(FileExistsError, kvscratch.holder_put, "story", {"k0": new}) == (
            errno.EEXIST)
        kvscratch.holder_put("story", {"k0": new, "v0": new}, replace=True)
    pads = kvscratch.holder_get("story")
    assert [(name, len(held)) for name, held in pads.items()] == [
        ("tokens", 0), ("k0", 1), ("v0", 1)]
    old.append(ROW)
    old.append(ROW)
    assert (len(old), len(pads["k0"]), len(pad)) == (2, 1, 2)
    with pytest.raises(TypeError):
        kvscratch.holder_put("story", {"k0": pad}, True)
    for held in (old, *pads.values()):
        held.close()


def test_another_process(hold):
    hold("story", "--write", "--max-seq-len", "4", "--dim", "3")
    assert python("""
import array, kvscratch
with kvscratch.Scratchpad.attach("story", mode="rw") as pad:
    pad.append(array.array("f", [1, 2, 3]))
""") == ""
    with Scratchpad.attach("story") as reader:
        assert reader.as_tensor().tolist() == [[1, 2, 3]]


def test_read_only_holder(hold, pad):
    hold("story", "--max-seq-len", "4", "--dim", "3")
    assert error_of(PermissionError, Scratchpad.attach, "story", "rw") == errno.EACCES
    assert error_of(PermissionError, kvscratch.holder_put, "story", {"k0": pad}) == errno.EACCES
    for missing in (Scratchpad.attach, kvscratch.holder_drop):
        with pytest.raises(KeyError) as caught:
            missing("story/k9")
        assert caught.value.args == ('story: there is no pad "k9"',)


def test_no_holder(hold):
    assert error_of(FileNotFoundError, Scratchpad.attach, "story/k0") == errno.ENOENT
    assert error_of(FileNotFoundError, kvscratch.holder_get, "story") == errno.ENOENT
    for name in ("../story", ".story", "", "a/b/c"):
        with pytest.raises(ValueError):
            Scratchpad.attach(name)
