# SPDX-License-Identifier: GPL-2.0-only
"""The package around the pads."""

import subprocess
import sys

import pytest

import kvscratch
from conftest import HELD, PROMISES, python


def test_promises(pad, backend):
    for name, held in HELD.items():
        found = {promise.name: promise for promise in kvscratch.promises(name)}
        assert set(found) == PROMISES
        assert {promise for promise in found if found[promise].holds} == held
        # what does not hold says what may happen instead
        assert all((promise.reason is None) == promise.holds for promise in found.values())
        assert all(promise.text for promise in found.values())
    assert pad.backend == backend == kvscratch.default_backend()
    assert pad.promises == kvscratch.promises(backend)
    with pytest.raises(ValueError) as caught:
        kvscratch.promises("disk")
    assert str(caught.value) == "backend: expected kernel or memfd, got 'disk'"


CHOOSE = "import kvscratch; print(kvscratch.default_backend(), kvscratch.Scratchpad(1, 1).backend)"


def test_choice_of_the_backend(backend):
    assert python(CHOOSE, env={"KVSCRATCH_BACKEND": "memfd"}) == "memfd memfd\n"
    # the device where there is one
    assert python(CHOOSE, env={"KVSCRATCH_BACKEND": ""}) == f"{backend} {backend}\n"
    assert python("""
import kvscratch
for call in kvscratch.default_backend, lambda: kvscratch.Scratchpad(1, 1):
    try:
        call()
    except ValueError as error:
        print(error)
""", env={"KVSCRATCH_BACKEND": "disk"}) == (
        'KVSCRATCH_BACKEND: expected kernel or memfd, got "disk"\n' * 2)


def test_numpy_is_imported_when_it_is_needed():
    assert python("""
import sys, kvscratch
pad = kvscratch.Scratchpad(2, 3)
view = pad.view()
print("numpy" in sys.modules)
pad.as_tensor()
print("numpy" in sys.modules)
""") == "False\nTrue\n"


def test_without_numpy():
    assert python("""
import sys
sys.modules["numpy"] = None
import array, kvscratch
pad = kvscratch.Scratchpad(2, 3)
pad.append(array.array("f", [1, 2, 3]))
print(type(pad.as_tensor()).__name__, pad.as_tensor().tolist())
print(pad.get_token(0).tolist(), [row.tolist() for row in pad])
pad = kvscratch.Scratchpad(2, 32, "mxint8", input_dtype="f32")
pad.append(array.array("f", [1] * 32))
print(pad.scales().tolist(), pad.get_token(0).tolist() == [64] * 32)
""") == """memoryview [[1.0, 2.0, 3.0]]
[1.0, 2.0, 3.0] [[1.0, 2.0, 3.0]]
[[127]] True
"""


def test_everything_public_is_documented():
    for name in kvscratch.__all__:
        public = getattr(kvscratch, name)
        assert public.__doc__, name
        for member in vars(public) if isinstance(public, type) else ():
            if not member.startswith("_"):
                assert getattr(public, member).__doc__, f"{name}.{member}"


def test_help_shows_signatures():
    for call in (kvscratch.Scratchpad.append, kvscratch.Scratchpad.truncate,
                 kvscratch.Scratchpad.view, kvscratch.View.valid_rows, kvscratch.default_backend):
        assert call.__text_signature__, call


def test_objects_cannot_be_made_by_hand():
    with pytest.raises(TypeError):
        kvscratch.View()


def test_exit_with_pads_alive():
    """What the interpreter tears down in an order of its own"""
    done = subprocess.run([sys.executable, "-c", """
import threading, kvscratch, numpy
pad = kvscratch.Scratchpad(2, 3)
array = pad.as_tensor()
threading.Thread(target=lambda: pad.wait(rows=1), daemon=True).start()
"""], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
