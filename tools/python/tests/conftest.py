# SPDX-License-Identifier: GPL-2.0-only
"""What the tests share, and in which way the backends differ."""

import gc
import os
import subprocess
import sys

import pytest

import kvscratch

PROMISES = {"whole-appends", "no-torn-rows", "zero-copy-views", "lifetime", "accounted",
            "one-writer", "fenced-takeover", "immutable-rows", "read-only-handles",
            "no-allocation", "faultless-views", "bounded", "poll"}

# The one place where a test looks up what to expect of a backend, with the next
HELD = {
    "kernel": PROMISES,
    "memfd": PROMISES - {"fenced-takeover", "immutable-rows", "read-only-handles", "no-allocation",
                         "faultless-views", "bounded", "poll"},
}

# Where attach() gives handles that may write and not read
WRITE_ONLY = {"kernel": True, "memfd": False}

# Where forks have the rows of their source in the same memory
SHARES = {"kernel": True, "memfd": False}


@pytest.fixture
def backend():
    """The one that run.py was asked for"""
    return os.environ["KVSCRATCH_BACKEND"]


@pytest.fixture
def pad():
    """[4, 3] f32, empty"""
    with kvscratch.Scratchpad(4, 3) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_leaks():
    """No test leaves descriptors or mappings of pads behind."""
    before = open_pads()
    yield
    gc.collect()
    assert open_pads() == before


def mappings():
    """How many mappings of pads this process has"""
    with open("/proc/self/maps", encoding="ascii") as maps:
        return sum("/kvscratch:" in line or "memfd:kvscratch" in line for line in maps)


def open_pads():
    """Descriptors of this process, and mappings of pads"""
    return sorted(os.listdir("/proc/self/fd")), mappings()


def python(code, *arguments, env=None, **keywords):
    """What another interpreter prints"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False,
                          capture_output=True, text=True, env={**os.environ, **(env or {})},
                          stdin=subprocess.DEVNULL, **keywords)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout
