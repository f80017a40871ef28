# SPDX-License-Identifier: GPL-2.0-only
"""The only writer of a pad: staging, keeping, committing, taking over, and the end of a pad."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import kvscratch
from kvscratch import Plane, Scratchpad

PLANES = (Plane("k0", 3, "f32"), Plane("v0", 2, "i8", "f32", 1))


@pytest.fixture
def cache():
    """Eight tokens of PLANES, empty"""
    with Scratchpad(8, planes=PLANES) as made:
        yield made


def k(*numbers):
    return np.array(numbers, np.float32)[:, None].repeat(3, axis=1)


def v(*numbers):
    return np.array(numbers, np.float32)[:, None].repeat(2, axis=1)


def first_of(pad, label):
    return pad[label][:, 0].tolist()


def fails(call, exception, message):
    with pytest.raises(exception) as caught:
        call()
    error = caught.value
    assert type(error) is exception
    assert (error.strerror if isinstance(error, OSError) else str(error)) == message
    return error


def fails_with(err, call):
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == err


def test_staging(cache):
    cache.append({"k0": k(1), "v0": v(1)})
    with cache.writer() as writer:
        assert isinstance(writer, kvscratch.Writer)
        assert (len(writer), writer.capacity, writer.mode) == (1, 8, "w")
        writer.stage("k0", k(2)[0])
        assert len(cache) == 1
        writer.stage("v0", v(2))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2] and first_of(cache, "v0") == [2, 4]
        # in batches of different sizes, by index
        writer.stage(0, k(3))
        writer.stage(1, v(3, 4))
        writer.stage(0, k(4))
        assert len(writer) == 2
        writer.commit()
        assert len(writer) == len(cache) == 4
        assert first_of(cache, "k0") == [1, 2, 3, 4] and first_of(cache, "v0") == [2, 4, 6, 8]
    assert writer.closed and cache.generation == 0


def test_staged_rows_are_seen_at_once(cache):
    cache.append({"k0": np.zeros((8, 3), np.float32), "v0": np.zeros((8, 2), np.float32)})
    memory = cache["k0"]
    cache.clear()
    with cache.writer() as writer:
        writer.stage("k0", k(5))
        assert memory[0].tolist() == [5, 5, 5] and len(cache) == 0


def test_drafts(cache):
    """Of five drafts two are accepted; the next ones take the place of the others."""
    with cache.writer() as writer:
        for label, rows in (("k0", k(1, 2, 3, 4, 5)), ("v0", v(1, 2, 3, 4, 5))):
            writer.stage(label, rows)
        writer.commit(len(writer) + 2)
        assert len(cache) == 2
        writer.stage("k0", k(7))
        writer.stage("v0", v(7))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2, 7]
        # rows that are staged again, from an earlier one on
        writer.stage("k0", k(8, 9, 10))
        writer.stage("k0", k(11), row=4)
        writer.stage("v0", v(8, 11, 10), row=3)
        writer.commit()
        assert first_of(cache, "k0") == [1, 2, 7, 8, 11, 10]
        assert first_of(cache, "v0") == [2, 4, 14, 16, 22, 20]
    assert cache.generation == 0


def test_a_plane_that_was_forgotten(cache):
    with cache.writer() as writer:
        writer.stage("k0", k(1, 2))
        message = ("expected a len from 0, the committed rows, to what every plane has staged, "
                   "got 2")
        fails(writer.commit, ValueError, message)
        # nothing was lost
        writer.stage("v0", v(1))
        fails(writer.commit, ValueError, message)
        writer.stage("v0", v(2))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2]
        # nothing new: nothing happens
        writer.commit()
        assert len(cache) == 2


def test_a_commit_of_the_present_len_drops(cache):
    with cache.writer() as writer:
        writer.stage("k0", k(1))
        writer.commit(len(writer))
        writer.commit()
        assert len(cache) == 0
        writer.stage("k0", k(2))
        writer.stage("v0", v(2))
        writer.commit()
        assert first_of(cache, "k0") == [2]


def test_keep(cache):
    with cache.writer() as writer:
        writer.stage("k0", k(1, 2, 3))
        writer.stage("v0", v(1, 2, 3))
        writer.commit(0)
        # dropped, and there still
        writer.keep("k0", 2)
        writer.keep(1, n=1, row=0)
        writer.keep("v0", 1)
        writer.commit()
        assert first_of(cache, "k0") == [1, 2] and first_of(cache, "v0") == [2, 4]
        fails(lambda: writer.keep("k0", 2), ValueError,
              "plane 0 (k0): expected rows that the writer stored as a whole, from 2 to what is "
              "staged on, got 2 from 2 on")
        writer.keep("k0", 1)
        fails(lambda: writer.keep("k0", -1), ValueError, "n: expected 0 to 4294967295, got -1")


def test_what_is_refused(cache):
    cache.append({"k0": k(1), "v0": v(1)})
    with cache.writer() as writer:
        writer.stage("k0", k(2))
        fails(lambda: writer.stage("k0", np.zeros(2, np.float32)), ValueError,
              "plane 0 (k0): shape mismatch: expected 3 elements, got 2")
        fails(lambda: writer.stage("k0", np.zeros(3)), TypeError,
              "plane 0 (k0): dtype mismatch: expected f32, got f64")
        fails(lambda: writer.stage("k0", [1.0]), TypeError,
              "plane 0 (k0): expected an array or another buffer, got <class 'list'>")
        for row in (0, 3):
            fails(lambda: writer.stage("k0", k(3), row=row), ValueError,
                  "plane 0 (k0): expected a row from 1, the committed ones, to what is staged, "
                  f"got {row}")
        fails(lambda: writer.stage("k0", k(3), row=-1), ValueError,
              "row: expected 0 to 4294967295, got -1")
        with pytest.raises(KeyError):
            writer.stage("q", k(3))
        with pytest.raises(IndexError):
            writer.stage(2, k(3))
        for call in (lambda: writer.stage("k0"), lambda: writer.stage("k0", k(3), row="1"),
                     lambda: writer.stage(plane="k0", rows=k(3)), lambda: writer.keep("k0", "1"),
                     lambda: writer.stage(None, k(3)), lambda: writer.commit("1"),
                     lambda: writer.commit(1.0)):
            with pytest.raises(TypeError):
                call()
        for length in (0, 3, 9):
            fails(lambda: writer.commit(length), ValueError, "expected a len from 1, the committed "
                  f"rows, to what every plane has staged, got {length}")
        # nothing of this dropped what was staged
        with pytest.raises(kvscratch.Full):
            writer.stage("k0", np.zeros((7, 3), np.float32))
        writer.stage("v0", v(2))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2]


def test_rows_that_fail(cache):
    """What fails while it is stored leaves staged what came before it."""
    with cache.writer() as writer:
        writer.stage("k0", k(1, 2))
        writer.stage("v0", v(1, 2))
        fails(lambda: writer.stage("v0", v(np.nan), row=1), ValueError,
              "cannot stage rows: a NaN or an infinity has no integer")
        fails(writer.commit, ValueError, "expected a len from 0, the committed rows, to what every "
                                         "plane has staged, got 2")
        # so the next one takes its place
        writer.stage("v0", v(3))
        writer.commit()
        assert first_of(cache, "v0") == [2, 6]


def test_a_writer_appends_and_truncates(cache):
    with cache.writer() as writer:
        writer.append({"k0": k(1, 2), "v0": v(1, 2)})
        writer.stage("k0", k(7))
        with pytest.raises(TypeError):
            writer.append(k(1))
        # what was refused left it staged
        writer.stage("v0", v(7))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2, 7]
        writer.stage("k0", k(8))
        writer.truncate(2)
        writer.stage("k0", k(9))
        writer.stage("v0", v(9))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2, 9] and cache.generation == 1
        writer.stage("k0", k(8, 8))
        writer.append([k(3), v(3)])
        writer.stage("k0", k(4))
        writer.stage("v0", v(4))
        writer.commit()
        assert first_of(cache, "k0") == [1, 2, 9, 3, 4]
        writer.clear(zero=True)
        assert len(cache) == len(writer) == 0 and writer.generation == 2


def test_others_wait_for_their_turn(cache):
    token = {"k0": k(1), "v0": v(1)}
    with cache.writer() as writer:
        for call in (lambda: cache.append(token), lambda: cache.truncate(0), cache.clear,
                     cache.seal, cache.writer):
            fails_with(errno.EBUSY, call)
        writer.append(token)
    # the role ended with the block
    cache.append(token)
    assert first_of(cache, "k0") == [1, 1]
    for call in (lambda: writer.append(token), writer.commit, lambda: writer.stage("k0", k(1)),
                 lambda: writer.keep("k0", 1), writer.seal, lambda: len(writer), writer.fileno):
        fails(call, ValueError, "the writer is closed")


def test_leaving_drops_what_is_staged(cache):
    with pytest.raises(ZeroDivisionError), cache.writer() as writer:
        writer.stage("k0", k(1))
        writer.stage("v0", v(1))
        raise ZeroDivisionError
    assert writer.closed and len(cache) == 0
    with cache.writer() as writer:
        writer.commit()
    assert len(cache) == 0


def test_a_reader_cannot_write(cache):
    with cache.open("r") as reader:
        for call in (reader.writer, reader.takeover, reader.seal):
            fails_with(errno.EBADF, call)


def test_takeover(cache):
    hung = cache.writer()
    hung.stage("k0", k(1, 2))
    with cache.takeover() as writer:
        for call in (lambda: hung.stage("k0", k(3)), lambda: hung.keep("k0", 1), hung.commit,
                     lambda: hung.append([k(1), v(1)]), lambda: hung.truncate(0), hung.seal):
            fails_with(errno.ESTALE, call)
        # its rows are nobody's
        writer.commit()
        assert len(cache) == 0
        writer.stage("k0", k(5))
        writer.stage("v0", v(5))
        writer.commit()
        hung.close()
        writer.append([k(6), v(6)])
    assert first_of(cache, "k0") == [5, 6]


WRITER = """
import sys, numpy, kvscratch
with kvscratch.Scratchpad.attach(int(sys.argv[1]), "rw") as pad:
    writer = pad.writer()
writer.append([numpy.ones((2, 3), "f4"), numpy.ones((2, 2), "f4")])
writer.stage("k0", numpy.full(3, 9, "f4"))
print("staged", flush=True)
sys.stdin.read()
"""


def test_a_writer_that_is_killed(cache):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(cache.fileno())],
                          pass_fds=[cache.fileno()], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"staged\n"
        fails_with(errno.EBUSY, cache.writer)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # no whole token is lost, no half one shows
    with cache.writer() as writer:
        assert len(writer) == 2
        writer.stage("k0", k(2))
        writer.stage("v0", v(2))
        writer.commit()
    assert first_of(cache, "k0") == [1, 1, 2]


def test_seal(cache):
    cache.append([k(1, 2), v(1, 2)])
    state = cache.state
    assert not cache.sealed
    with cache.writer() as writer:
        writer.stage("k0", k(3))
        writer.seal()
        assert writer.sealed
    cache.seal()
    assert cache.sealed and len(cache) == 2 and cache.state == state
    for call in (lambda: cache.append([k(1), v(1)]), cache.clear, cache.writer, cache.takeover):
        fails_with(errno.EROFS, call)
    with cache.open() as reader:
        assert reader.sealed and first_of(reader, "k0") == [1, 2]


def test_waiting_ends_at_the_seal(cache):
    cache.append([k(1), v(1)])
    state = cache.state
    found = []

    def consume():
        with cache.open() as reader:
            seen = 0
            while reader.wait(seen):
                view = reader.view("k0")
                seen = view.state
                found.append(len(view))
            found.append(reader.wait(rows=8))

    consumer = threading.Thread(target=consume)
    consumer.start()
    cache.append([k(2), v(2)])
    cache.seal()
    consumer.join()
    assert found[-2:] == [2, False]
    # what is there already is not waited for
    assert cache.wait(rows=2) and cache.wait(state) and not cache.wait(cache.state)


def test_takeover_wakes_nobody_for_nothing(cache):
    with cache.writer() as writer:
        writer.stage("k0", k(1))
        assert not cache.wait(rows=1, timeout=0)
        writer.stage("v0", v(1))
        writer.commit()
        assert cache.wait(rows=1, timeout=0)


def test_forked(cache):
    """A child has the descriptor of the writer, and is none."""
    with cache.writer() as writer:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                writer.stage("k0", k(1))
            except RuntimeError as error:
                status = 0 if "before a fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextlib.contextmanager
def aborted_by_errors(barrier):
    """Nobody waits for a thread that failed."""
    try:
        yield
    except BaseException:
        barrier.abort()
        raise


def test_threads_stage_planes():
    planes = [Plane(f"k{i}", 16, "i32") for i in range(4)]
    with Scratchpad(400, planes=planes) as pad, pad.writer() as writer:
        barrier = threading.Barrier(5)

        def layer(index):
            with aborted_by_errors(barrier):
                for start in range(0, 400, 10):
                    rows = np.arange(start, start + 10, dtype=np.int32)[:, None].repeat(16, axis=1)
                    writer.stage(index, rows + 1000 * index)
                    barrier.wait()
                    barrier.wait()

        threads = [threading.Thread(target=layer, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        with aborted_by_errors(barrier):
            for start in range(0, 400, 10):
                barrier.wait()
                writer.commit()
                assert len(pad) == start + 10
                barrier.wait()
        for thread in threads:
            thread.join()
        for i in range(4):
            assert pad[f"k{i}"][:, 15].tolist() == list(range(1000 * i, 1000 * i + 400))


def test_references(cache):
    """What is made and forgotten many times leaves nothing behind."""
    token = {"k0": k(1), "v0": v(1)}
    counted = (cache, token, token["k0"], token["v0"], kvscratch.Writer, Plane, type(cache))

    def use():
        with cache.writer() as writer:
            writer.stage("k0", token["k0"])
            writer.keep("k0", 1, row=0)
            writer.append(token)
            writer.append(tuple(token.values()))
            for what in (token["k0"], [], {"k0": token["k0"], "v": token["v0"]},
                         [token["v0"], token["k0"]], [token["k0"], token["v0"][:0]]):
                with pytest.raises((TypeError, ValueError, KeyError)):
                    writer.append(what)
            for call in (lambda: writer.stage("k0", token["v0"]), lambda: writer.commit(7),
                         lambda: writer.stage("q", token["v0"])):
                with pytest.raises((ValueError, KeyError)):
                    call()
            writer.clear()
        cache.takeover().close()
        cache.planes, cache.tag, cache["k0"], cache.open().close()
        with pytest.raises(ValueError):
            Scratchpad(2, planes=[*cache.planes, ("a" * 20, 1)])

    use()
    before = [sys.getrefcount(counter) for counter in counted]
    for _ in range(50):
        use()
    after = [sys.getrefcount(counter) for counter in counted]
    assert all(abs(a - b) < 5 for a, b in zip(after, before)), (before, after)


def test_writers_are_not_made_by_hand():
    with pytest.raises(TypeError):
        kvscratch.Writer()
    for call in (kvscratch.Writer.stage, kvscratch.Writer.keep, kvscratch.Writer.commit,
                 kvscratch.Writer.append, Scratchpad.writer, Scratchpad.seal):
        assert call.__doc__ and call.__text_signature__
