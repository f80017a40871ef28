# SPDX-License-Identifier: GPL-2.0-only
"""Pads that begin with the rows of another one."""

import copy
import errno
import threading

import numpy as np
import pytest

from conftest import SHARES
from kvscratch import Plane, Scratchpad

# 4 KiB each
DIM = 1024


def rows(*numbers):
    return np.array(numbers, np.float32)[:, None].repeat(DIM, axis=1)


def first_of(pad, plane=None):
    return pad.as_tensor(plane)[:, 0].tolist()


@pytest.fixture
def source():
    """Three rows of four"""
    with Scratchpad(4, DIM, tag=b"model") as made:
        made.append(rows(1, 2, 3))
        yield made


def test_fork(source, backend):
    with source.fork(2) as branch:
        assert type(branch) is Scratchpad
        assert (branch.capacity, branch.mode, branch.generation) == (4, "rw", 0)
        assert (branch.planes, branch.tag, branch.backend) == (source.planes, source.tag, backend)
        assert branch.parent_id == source.id != branch.id and branch.parent_rows == 2
        assert branch.shared_bytes == (2 * 4 * DIM if SHARES[backend] else 0)
        before = branch.as_tensor()
        branch.append(rows(7))
        source.append(rows(8))
        assert first_of(branch) == [1, 2, 7] and first_of(source) == [1, 2, 3, 8]
        # either may go first
        source.close()
        assert first_of(branch) == [1, 2, 7] and before[:, 0].tolist() == [1, 2]


def test_a_pad_that_is_no_fork(source):
    assert source.id > 0
    assert (source.parent_id, source.parent_rows, source.shared_bytes) == (0, 0, 0)


def test_capacity_of_a_fork(source):
    with source.fork(max_seq_len=9) as branch, source.fork(rows=0, max_seq_len=1) as none:
        assert (branch.capacity, first_of(branch)) == (9, [1, 2, 3])
        branch.append(rows(4, 5, 6, 7, 8, 9))
        assert len(branch) == 9 and (none.capacity, len(none)) == (1, 0)


def test_forks_of_forks(source):
    with source.fork(2) as branch, branch.fork(1) as twig:
        assert twig.parent_id == branch.id
        twig.append(rows(9))
        branch.close()
        assert first_of(twig) == [1, 9] and first_of(source) == [1, 2, 3]


def test_forks_of_planes():
    planes = (Plane("k0", 5, "f32"), Plane("v0", 32, "mxint8", "f32"))
    with Scratchpad(4, planes=planes) as source:
        source.append({"k0": np.ones((3, 5), np.float32), "v0": np.ones((3, 32), np.float32)})
        with source.writer() as writer:
            writer.stage("k0", np.ones(5, np.float32))
            with source.fork() as branch:
                # what is staged is not forked, and the writer is the source's
                assert len(branch) == 3
                with branch.writer() as other:
                    other.stage("k0", np.full(5, 2, np.float32))
                    other.stage("v0", np.full(32, 2, np.float32))
                    other.commit()
                assert first_of(branch, "k0") == [1, 1, 1, 2]
                assert branch.scales("v0").tolist() == [[127], [127], [127], [128]]


def test_copy(source):
    with source.fork(max_seq_len=9) as wide, copy.copy(wide) as copied:
        assert type(copied) is Scratchpad
        assert (copied.capacity, copied.parent_id, first_of(copied)) == (9, wide.id, [1, 2, 3])
        copied.append(rows(4))
        assert len(wide) == 3


def test_subclass():
    class Cache(Scratchpad):
        pass

    with Cache(1, 1) as source, source.fork() as branch, copy.copy(source) as copied:
        assert type(branch) is type(copied) is Cache


def test_snapshot(source, backend):
    with source.snapshot() as snapshot, source.open_reader() as reader:
        assert snapshot.sealed and snapshot.capacity == len(snapshot) == 3
        assert snapshot.parent_id == source.id
        # one that may not write can fork what is sealed
        with snapshot.open_reader() as other, other.fork(max_seq_len=4) as branch:
            branch.append(rows(5))
            assert first_of(branch) == [1, 2, 3, 5]
        with pytest.raises(OSError) as caught:
            reader.fork()
        assert caught.value.errno == errno.EBADF
        assert caught.value.strerror == ("expected a handle open for write, or a sealed pad, got "
                                         "a handle for read only")
        with pytest.raises(OSError) as caught:
            reader.snapshot()
        assert caught.value.errno == errno.EBADF
        changed = source.rewind(1)
        changed.append(rows(9))
        assert first_of(snapshot) == [1, 2, 3] and first_of(changed) == [1, 9]
        assert (changed is source) == (not SHARES[backend])
        changed.close()


def test_snapshot_of_no_rows(pad):
    with pad.snapshot() as snapshot:
        assert snapshot.sealed and len(snapshot) == 0


def test_rewind(source, backend):
    assert source.rewind(2) is source
    assert first_of(source) == [1, 2] and source.generation == 1
    with source.fork() as branch:
        again = branch.rewind(1)
        if SHARES[backend]:
            # what others share stays, and so does what could not drop it
            with pytest.raises(OSError) as caught:
                branch.truncate(1)
            assert caught.value.errno == errno.ETXTBSY
            assert again is not branch and first_of(branch) == [1, 2]
        else:
            assert again is branch
        again.append(rows(6))
        assert (again.capacity, first_of(again), first_of(source)) == (4, [1, 6], [1, 2])
        again.close()
    # nobody shares them any more
    assert source.rewind(0) is source and len(source) == 0


def test_rewind_of_what_there_is_not(source):
    with pytest.raises(ValueError):
        source.rewind(4)
    with source.snapshot() as snapshot, pytest.raises(OSError) as caught:
        snapshot.rewind(1)
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("arguments, exception, message", [
    ((4,), ValueError, "expected at most 3, the committed rows, got 4"),
    ((-1,), ValueError, "rows: expected 0 to 4294967295, got -1"),
    ((2, 1), ValueError, "max_seq_len: expected at least 2, the rows of the fork, got 1"),
    ((None, 2), ValueError, "max_seq_len: expected at least 3, the rows of the fork, got 2"),
    ((1, -1), ValueError, "max_seq_len: expected 0 to 4294967295, got -1"),
    ((1 << 64,), ValueError, f"expected an integer of 64 bits, got {1 << 64}"),
    ((1.5,), TypeError, "'float' object cannot be interpreted as an integer"),
])
def test_what_cannot_be_forked(source, arguments, exception, message):
    with pytest.raises(exception) as caught:
        source.fork(*arguments)
    assert str(caught.value) == message


def test_forks_of_a_closed_pad(source):
    source.close()
    for call in (source.fork, source.snapshot, lambda: copy.copy(source), lambda: source.rewind(0)):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == "the scratchpad is closed"


def test_forks_beside_truncates():
    """Each has the rows of one moment: those of a row are its number."""
    with Scratchpad(8, DIM) as source, source.open("rw") as own:
        stop = threading.Event()

        def write():
            while not stop.is_set():
                if len(own) < 8:
                    own.append(rows(len(own)))
                    continue
                try:
                    own.clear()
                except OSError as error:
                    # as long as one of them is there
                    assert error.errno == errno.ETXTBSY

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(200):
                with copy.copy(source) as branch, source.snapshot() as snapshot:
                    assert first_of(branch) == list(range(len(branch)))
                    assert first_of(snapshot) == list(range(len(snapshot)))
        finally:
            stop.set()
            writer.join()
