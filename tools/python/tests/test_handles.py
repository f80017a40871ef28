# SPDX-License-Identifier: GPL-2.0-only
"""Handles: who may do what, between threads and between processes."""

import errno
import fractions
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import kvscratch
from conftest import HELD, WRITE_ONLY, python
from kvscratch import Scratchpad

ROW = np.arange(3, dtype=np.float32)


def error_of(exception, function, *arguments, **keywords):
    with pytest.raises(exception) as caught:
        function(*arguments, **keywords)
    if isinstance(caught.value, OSError):
        return caught.value.errno
    return str(caught.value)


def test_display(pad, backend):
    pad.append(ROW)
    assert str(pad) == "Scratchpad(len=1, capacity=4, dim=3)"
    assert repr(pad) == (f"<kvscratch.Scratchpad len=1 capacity=4 dim=3 dtype=f32 "
                         f"backend={backend}>")


def test_attach(pad):
    pad.append(ROW)
    for source in (pad, pad.fileno()):
        with Scratchpad.attach(source) as reader:
            assert reader.mode == "r" and len(reader) == 1
            assert error_of(OSError, reader.append, ROW) == errno.EBADF
            assert error_of(OSError, reader.truncate, 0) == errno.EBADF
            assert error_of(OSError, reader.clear) == errno.EBADF
            # what was handed out for reading does not become more
            assert error_of(PermissionError, Scratchpad.attach, reader, "rw") == errno.EACCES
    with Scratchpad.attach(pad, mode="rw") as writer:
        writer.append(ROW)
        assert writer.mode == "rw" and len(pad) == 2
    assert error_of(ValueError, Scratchpad.attach, pad, "x") == (
        "mode: expected r, w or rw, got x")
    assert error_of(OSError, Scratchpad.attach, 9999) == errno.EBADF
    error_of(TypeError, Scratchpad.attach, 1.5)


def test_write_only(pad, backend):
    if not WRITE_ONLY[backend]:
        assert error_of(OSError, Scratchpad.attach, pad, "w") == errno.EOPNOTSUPP
        return
    with Scratchpad.attach(pad, "w") as writer:
        writer.append(ROW)
        assert (writer.mode, len(writer), len(pad)) == ("w", 1, 1)
        assert repr(writer) == repr(pad)
        for use in (writer.view, writer.open_reader, lambda: writer.state,
                    lambda: writer.wait(rows=1), lambda: writer.get_token(0)):
            assert error_of(OSError, use) == errno.EBADF


def test_open_reader(pad):
    pad.append(ROW)
    reader = pad.open_reader()
    assert isinstance(reader, Scratchpad) and reader.mode == "r"
    assert reader.fileno() != pad.fileno()
    assert not os.get_inheritable(reader.fileno())
    assert np.array_equal(reader.as_tensor(), pad.as_tensor())
    # a pad is there as long as somebody holds it
    pad.close()
    assert reader.as_tensor().tolist() == [[0, 1, 2]]
    reader.close()


def test_from_fd(pad):
    with Scratchpad.from_fd(os.dup(pad.fileno())) as same:
        same.append(ROW)
        assert len(pad) == 1
    read, write = os.pipe()
    assert error_of(OSError, Scratchpad.from_fd, read) == errno.ENOTTY
    # still the caller's
    os.close(read)
    os.close(write)
    assert error_of(ValueError, Scratchpad.from_fd, -1) == "fd: expected 0 to 2147483647, got -1"
    error_of(TypeError, Scratchpad.from_fd, "0")


def test_subclass():
    class Cache(Scratchpad):
        pass

    with Cache(4, 3) as pad, Cache.attach(pad) as reader, pad.open_reader() as other:
        assert {type(made) for made in (pad, reader, other)} == {Cache}
        assert repr(pad).startswith("<test_handles.test_subclass.<locals>.Cache len=0 ")


def test_closed(pad):
    pad.close()
    for use in (pad.view, pad.as_tensor, pad.fileno, pad.open_reader, pad.clear,
                lambda: len(pad), lambda: str(pad), lambda: pad.capacity, lambda: pad.state,
                lambda: pad.append(ROW), lambda: pad.truncate(0), lambda: pad.wait(0),
                lambda: pad.get_token(0), lambda: list(pad), lambda: pad.promises,
                lambda: Scratchpad.attach(pad)):
        assert error_of(ValueError, use) == "the scratchpad is closed"
    assert repr(pad) == "<kvscratch.Scratchpad closed>"


# Between processes

READ = """
import sys, kvscratch
with kvscratch.Scratchpad.from_fd(int(sys.argv[1])) as pad:
    print(pad, pad.mode, pad.as_tensor().tolist())
"""


def test_inherited(pad):
    pad.append(ROW)
    with pad.open_reader() as reader:
        fd = reader.fileno()
        assert python(READ, fd, pass_fds=[fd]) == (
            "Scratchpad(len=1, capacity=4, dim=3) r [[0.0, 1.0, 2.0]]\n")


RECEIVE = """
import socket, sys, kvscratch
with socket.socket(fileno=int(sys.argv[1])) as sock:
    pads = kvscratch.receive_handles(sock)
    print(list(pads), [pad.mode for pad in pads.values()])
    sock.sendall(b"!")
    pads["k0"].wait(rows=2)
    print(pads["k0"].as_tensor().tolist())
    sock.sendall(pads["k0"].view())
"""


def test_passed_handles(pad):
    pad.append(ROW)
    ours, theirs = socket.socketpair()
    with ours, theirs, pad.open_reader() as reader, Scratchpad(1, 1) as tokens:
        kvscratch.send_handles(ours, {"k0": reader, "tokens": tokens.fileno()})

        def append_later():
            assert ours.recv(1) == b"!"
            pad.append(ROW + 1)

        thread = threading.Thread(target=append_later)
        thread.start()
        printed = python(RECEIVE, theirs.fileno(), pass_fds=[theirs.fileno()])
        thread.join()
        assert printed == "['k0', 'tokens'] ['r', 'rw']\n[[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]\n"
        assert ours.recv(64) == np.array([ROW, ROW + 1]).tobytes()


def test_handles_that_do_not_arrive(pad):
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with ours, theirs:
        kvscratch.send_handles(ours, {"k0": pad, "pipe": read, "k1": pad})
        assert error_of(OSError, kvscratch.receive_handles, theirs) == errno.ENOTTY
        kvscratch._kvscratch.send_handles(ours.fileno(), [("a", pad.fileno())] * 2)
        assert error_of(ValueError, kvscratch.receive_handles, theirs) == (
            "expected each name once, got a again")
        ours.sendall(struct.pack("<I", 3) + b"k0\n")
        assert error_of(OSError, kvscratch.receive_handles, theirs) == errno.EPROTO
        assert error_of(ValueError, kvscratch.send_handles, ours, {}) == (
            "expected 1 to 253 handles, got 0")
        many = {str(i): pad for i in range(254)}
        assert error_of(ValueError, kvscratch.send_handles, ours, many) == (
            "expected 1 to 253 handles, got 254")
        ours.close()
        assert error_of(ConnectionResetError, kvscratch.receive_handles, theirs) == (
            errno.ECONNRESET)
    os.close(read)
    os.close(write)


WRONG_SOCKETS = """
import socket
import kvscratch
for kind in socket.SOCK_SEQPACKET, socket.SOCK_DGRAM:
    for sock in socket.socketpair(socket.AF_UNIX, kind):
        try:
            kvscratch.receive_handles(sock)
        except OSError as error:
            print(error.errno)
"""


def test_handles_take_a_stream():
    done = subprocess.run([sys.executable, "-c", WRONG_SOCKETS], capture_output=True, text=True,
                          check=False)
    assert (done.stdout, done.stderr) == (4 * f"{errno.EPROTOTYPE}\n", "")


def in_child(function):
    """Whether @function returned true in a forked child"""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_fork(pad):
    pad.append(ROW)
    array = pad.as_tensor()

    def reads():
        return array.tolist() == pad.as_tensor().tolist() == [[0, 1, 2]]

    def may_not_write():
        message = "expected a handle of this process, got one from before a fork: attach one"
        return all(error_of(RuntimeError, use) == message for use in (
            lambda: pad.append(ROW), pad.clear, lambda: pad.truncate(0)))

    def attaches():
        with Scratchpad.attach(pad, "rw") as own:
            own.append(ROW + 1)
        return len(pad) == 2

    assert in_child(reads)
    assert in_child(may_not_write)
    assert in_child(attaches)
    assert pad.as_tensor().tolist() == [[0, 1, 2], [1, 2, 3]]
    pad.append(ROW)


def test_reader_cannot_write(pad, backend):
    """Not even outside of the package, where the backend promises that"""
    with pad.open_reader() as reader:
        path = f"/proc/self/fd/{reader.fileno()}"
        if "read-only-handles" in HELD[backend]:
            assert error_of(OSError, os.open, path, os.O_RDWR) == errno.ENXIO
        else:
            with Scratchpad.from_fd(os.open(path, os.O_RDWR)) as writer:
                writer.append(ROW)
            assert len(pad) == 1


# Waiting

def in_thread(function):
    """Start @function; returns what joins it and gives its result."""
    results = []

    def run():
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join()
        return results[0]

    return result


def test_wait_for_rows(pad):
    assert pad.wait(rows=0)
    with pad.open_reader() as reader:
        # who waits lets other threads run
        woken = in_thread(lambda: reader.wait(rows=3))
        for _ in range(3):
            pad.append(ROW)
        assert woken() is True


def test_wait_for_a_state(pad):
    pad.append(ROW)
    view = pad.view()
    with pad.open_reader() as reader:
        woken = in_thread(lambda: reader.wait(view.state))
        pad.truncate(1)
        assert woken() is True
    assert pad.wait(view.state)


def test_wait_in_vain(pad):
    assert pad.wait(rows=1, timeout=0) is False
    assert pad.wait(rows=1, timeout=0.01) is False
    assert pad.wait(pad.state, timeout=0.01) is False
    assert pad.wait(pad.state, timeout=-1) is False
    message = "wait: expected either state or rows"
    assert error_of(TypeError, pad.wait) == message
    assert error_of(TypeError, pad.wait, 0, rows=1) == message


def test_wait_for_what_cannot_come(pad):
    pad.append(ROW)
    for rows in (5, -1, 2 ** 70):
        for waiting in (pad, pad.open_reader()):
            with pytest.raises(ValueError) as caught:
                waiting.wait(rows=rows)
            assert str(caught.value) == f"rows: expected 0 to 4, the rows that fit, got {rows}"
    assert pad.wait(rows=0) and pad.wait(rows=True)
    for wrong in ({"rows": 1.0}, {"rows": "1"}, {"state": "1"}, {"state": None}, {},
                  {"rows": 2, "timeout": "1"}, {"rows": 1, "state": 0}):
        with pytest.raises(TypeError):
            pad.wait(**wrong)
    with pytest.raises(ValueError):
        pad.wait(rows=2, timeout=float("nan"))


def test_timeouts_of_any_type(pad):
    for kind in (int, float, np.float16, np.float32, np.uint8, fractions.Fraction):
        assert not pad.wait(rows=1, timeout=kind(0))
    # in float32 the clock of a machine that is up for long has no seconds
    calls = []
    pad_of_calls = type("Calls", (Scratchpad,), {
        "_wait": lambda self, state, timeout_ms: calls.append(timeout_ms) or not self.append(ROW)})
    for timeout in (np.float16(3), np.float32(3), np.uint8(3), 3, float("inf"), 1e300):
        with pad_of_calls(1, 3) as long:
            assert long.wait(rows=1, timeout=timeout)
    assert all(2900 <= call <= 3000 for call in calls[:4]), calls
    assert calls[4:] == [0x7fffffff] * 2


def test_wait_hears_signals(pad):
    class Stop(Exception):
        pass

    def append(*_):
        pad.append(ROW)

    def stop(*_):
        raise Stop

    old = signal.signal(signal.SIGALRM, append)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        assert pad.wait(rows=1)
        signal.signal(signal.SIGALRM, stop)
        with pytest.raises(Stop):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            pad.wait(rows=2)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            with pytest.raises(Stop):
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                kvscratch.receive_handles(theirs)
    finally:
        signal.signal(signal.SIGALRM, old)


def test_one_waits_at_a_time(pad):
    def patient():
        while True:
            try:
                return pad.wait(rows=1)
            except RuntimeError:
                pass

    woken = in_thread(patient)
    while True:
        try:
            pad.wait(rows=1, timeout=0.001)
        except RuntimeError as error:
            assert "open_reader() makes one for each" in str(error)
            break
        # lets go of the GIL
        time.sleep(0)
    pad.append(ROW)
    assert woken() is True


def test_close_beside_a_thread_that_waits(pad):
    with Scratchpad.attach(pad, "rw") as other:
        started = threading.Event()

        def wait():
            started.set()
            return pad.wait(rows=1)

        woken = in_thread(wait)
        started.wait()
        pad.close()
        other.append(ROW)
        result = woken()
    # the handle lived until the call was over; which of the two depends on how far it was
    assert result is True or str(result) == "the scratchpad is closed"
