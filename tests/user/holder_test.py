#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Pads outlive their holder in the file-descriptor store of a service manager.

The manager is a small one of this test: it keeps what the holder sends to
NOTIFY_SOCKET, kills the holder and starts it again, as systemd does.

usage: holder_test.py KVSCRATCHCTL; prints TAP.
"""

import array
import errno
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

from tap import expect, run_tests, test

PROGRAM = os.path.abspath(sys.argv[1])
RUNTIME = tempfile.TemporaryDirectory(prefix="holder-test-")
os.environ["XDG_RUNTIME_DIR"] = RUNTIME.name
os.environ["KVSCRATCH_BACKEND"] = "memfd"

# struct holder_request and struct holder_reply of tools/lib/holder.h
REQUEST = struct.Struct("=IIIII64s")
REPLY = struct.Struct("=IIiI160s")
MAGIC, VERSION = 0x4844564B, 1
GET_ALL, PUT, REPLACE = 2, 3, 5


def ctl(*arguments, status=0, data=None):
    done = subprocess.run([PROGRAM, *arguments], input=data, capture_output=True, check=False)
    expect(done.returncode == status,
           f"{arguments}: exit {done.returncode}: {done.stderr.decode()}")
    return done.stdout.decode()


def ask(holder, verb, names=(), fds=()):
    """One request; returns (error, words, fds)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(f"{RUNTIME.name}/kvscratch/{holder}")
        text = "".join(name + "\n" for name in names).encode()
        sock.sendall(REQUEST.pack(MAGIC, VERSION, verb, os.O_RDWR, 4 + len(text), b""))
        if verb in (PUT, REPLACE):
            socket.send_fds(sock, [struct.pack("<I", len(text)) + text], fds)
        _, _, error, count, words = REPLY.unpack(sock.recv(REPLY.size, socket.MSG_WAITALL))
        got = socket.recv_fds(sock, 8192, 253)[1] if count else []
        expect(len(got) == count, f"{holder}: {count} handles announced, {len(got)} came")
        return error, words.rstrip(b"\0").decode(), got


def make_pads(count):
    """Handles on new pads, of holders that are gone again."""
    fds = []
    for _ in range(count):
        ctl("hold", "maker", "--write", "--max-seq-len", "4", "--dim", "1", "--dtype", "u8")
        fds += ask("maker", GET_ALL)[2]
        ctl("drop", "maker")
    return fds


def put(holder, *names, verb=PUT):
    fds = make_pads(len(names))
    error, words, _ = ask(holder, verb, names, fds)
    for fd in fds:
        os.close(fd)
    expect(not error, words)


def held(holder):
    """The pads of a holder, by name, in its order: the inode number of each"""
    names = [line.split(":")[0].partition("/")[2] for line in ctl("ls").splitlines()]
    fds = ask(holder, GET_ALL)[2]
    pads = {}
    for name, fd in zip(filter(None, names), fds, strict=True):
        pads[name] = os.fstat(fd).st_ino
        os.close(fd)
    return pads


class Manager:
    """A service manager with one service, the holder NAME, and its store."""

    def __init__(self, name, *arguments, abstract=False):
        self.name = name
        self.command = [PROGRAM, "hold", name, "--foreground", *arguments]
        self.store = []
        self.snapshots = None
        self.pid = 0
        path = f"{RUNTIME.name}/notify-{name}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        pathlib.Path(path).unlink(missing_ok=True)
        self.address = "\0" + path if abstract else path
        self.socket.bind(self.address)
        self.path = "@" + path if abstract else path
        self.said = {word: threading.Event() for word in ("READY=1", "MARK=1", "END=1")}
        self.listener = threading.Thread(target=self.listen)
        self.listener.start()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        if self.pid:
            self.kill(signal.SIGKILL)
        self.say("END=1")
        self.listener.join()
        for _, fd in self.store:
            os.close(fd)
        self.socket.close()

    def start(self, listen_pid=None):
        """Start the holder, give it what the store has, and wait until it is ready."""
        self.said["READY=1"].clear()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.execute(listen_pid)
            finally:
                os._exit(99)
        expect(self.said["READY=1"].wait(60), f"not ready: {self.errors()}")

    def execute(self, listen_pid):
        environment = dict(os.environ, NOTIFY_SOCKET=self.path)
        if self.store:
            environment["LISTEN_PID"] = str(listen_pid or os.getpid())
            environment["LISTEN_FDS"] = str(len(self.store))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in self.store)
        errors = os.open(f"{RUNTIME.name}/errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        # first out of the way of one another
        high = [os.dup(fd) for _, fd in self.store]
        high = [fd if fd >= 100 else os.dup2(fd, 100 + i) for i, fd in enumerate(high)]
        for i, fd in enumerate(high):
            os.dup2(fd, 3 + i, inheritable=True)
        os.closerange(3 + len(high), 4096)
        os.execve(PROGRAM, self.command, environment)

    def say(self, word):
        """To ourselves; returns when it was heard, and so all that was sent before."""
        self.said[word].clear()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(word.encode(), self.address)
        expect(self.said[word].wait(60), f"{word} was not heard")

    def listen(self):
        while "END=1" not in self.hear():
            pass

    def hear(self):
        """One message; returns its lines after doing what they ask for."""
        message, control, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(4))
        lines = message.decode().split("\n")
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), None)
        fds = array.array("i")
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
        if "FDSTORE=1" in lines:
            # a wrong one shows in the store
            right = len(fds) == 1 and "FDPOLL=0" in lines
            self.store.append((name if right else f"{lines} {len(fds)}", fds[0]))
        if "FDSTOREREMOVE=1" in lines:
            for gone in [entry for entry in self.store if entry[0] == name]:
                os.close(gone[1])
                self.store.remove(gone)
        if "FDSTORE=1" in lines or "FDSTOREREMOVE=1" in lines:
            self.take_snapshot()
        for line in lines:
            if line in self.said:
                self.said[line].set()
        return lines

    def take_snapshot(self):
        """What a holder would be given that was killed before its next message"""
        if self.snapshots is not None:
            self.snapshots.append([(name, os.dup(fd)) for name, fd in self.store])

    def kill(self, number):
        os.kill(self.pid, number)
        return self.wait()

    def wait(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        self.say("MARK=1")
        return status

    def names(self):
        return [name for name, _ in self.store]

    def errors(self):
        return pathlib.Path(f"{RUNTIME.name}/errors").read_text()


ONE = ("--write", "--max-seq-len", "4", "--dim", "1", "--dtype", "u8")


@test
def a_pad_outlives_its_holder():
    with Manager("story", *ONE) as manager:
        expect(manager.names() == ["0.pad"], manager.names())
        ctl("-n", "story", "append", data=b"ab")
        for _ in range(3):
            status = manager.kill(signal.SIGKILL)
            expect(status == -signal.SIGKILL, status)
            ctl("-n", "story", "info", status=2)
            manager.start()
            expect(not manager.errors(), manager.errors())
            expect(manager.names() == ["0.pad"], manager.names())
        ctl("-n", "story", "append", data=b"c")
        expect(ctl("-n", "story", "dump") == "97\n98\n99\n", "rows are not what they were")


@test
def the_manager_may_have_an_abstract_socket():
    with Manager("story", *ONE, abstract=True) as manager:
        expect(manager.names() == ["0.pad"], manager.names())


@test
def pads_come_back_in_the_order_in_which_they_came():
    names = [f"k{i}" for i in range(12)]
    with Manager("story", "--write") as manager:
        put("story", *names[:5])
        put("story", *names[5:])
        manager.say("MARK=1")
        expect(manager.names() == [f"{i}.k{i}" for i in range(12)], manager.names())
        manager.kill(signal.SIGKILL)
        # systemd 252 gives them back the other way round
        manager.store.reverse()
        manager.start()
        listed = [line.split(":")[0] for line in ctl("ls").splitlines()]
        expect(listed == [f"story/{name}" for name in names], listed)
        put("story", "more")
        manager.say("MARK=1")
        expect(manager.names()[-1] == "12.more", manager.names())


@test
def a_pad_that_was_dropped_stays_away():
    with Manager("story", "--write") as manager:
        put("story", "k0", "v0", "tokens")
        ctl("drop", "story/v0")
        manager.say("MARK=1")
        expect(manager.names() == ["0.k0", "2.tokens"], manager.names())
        manager.kill(signal.SIGKILL)
        manager.start()
        expect(ctl("ls").split()[::4] == ["story/k0:", "story/tokens:"], ctl("ls"))
        ctl("drop", "story")
        status = manager.wait()
        expect(status == 0 and not manager.store, f"exit {status}, left {manager.names()}")


@test
def a_service_that_is_stopped_leaves_the_store_to_the_manager():
    with Manager("story", *ONE) as manager:
        status = manager.kill(signal.SIGTERM)
        expect(status == -signal.SIGTERM and manager.names() == ["0.pad"],
               f"exit {status}, {manager.names()}")


@test
def what_the_manager_made_up_costs_no_pad():
    with Manager("story", *ONE) as manager:
        manager.kill(signal.SIGKILL)
        (_, pad), = manager.store
        null = os.open("/dev/null", os.O_RDWR)
        manager.store = [("1.null", null), ("nonsense", os.dup(pad)), ("", os.dup(pad)),
                         ("7.../x", os.dup(pad)), ("0.pad", pad), ("0.pad", os.dup(pad)),
                         ("0.k0", os.dup(pad)), ("-1.k0", os.dup(pad)), ("3+", os.dup(pad)),
                         ("3+x", os.dup(pad)), ("+3", os.dup(pad)), ("0+-1", os.dup(pad)),
                         ("99999999999999999999.k1", os.dup(pad))]
        manager.start()
        listed = ctl("ls")
        expect([line.split(":")[0] for line in listed.splitlines()] == ["story/pad"], listed)
        expect(manager.errors().count("\n") == 12, manager.errors())


def after_each_message(old, new, verb):
    """Replace or add pads, and kill the holder between any two messages to its manager."""
    with Manager("story", "--write") as manager:
        if old:
            put("story", *old)
        before = held("story")
        manager.say("MARK=1")
        manager.snapshots = []
        manager.take_snapshot()
        put("story", *new, verb=verb)
        manager.say("MARK=1")
        snapshots, manager.snapshots = manager.snapshots, None
        after = held("story")
        expect(list(after) == [name for name in old if name not in new] + list(new), after)
        expect(all(after[name] != before.get(name) for name in new), (before, after))
        seen = []
        for number, store in enumerate(snapshots):
            manager.kill(signal.SIGKILL)
            for _, fd in manager.store:
                os.close(fd)
            manager.store = store
            # in whatever order
            if number % 2:
                manager.store.reverse()
            manager.start()
            manager.say("MARK=1")
            pads = held("story")
            expect(pads in (before, after), f"after {number} messages: {pads}")
            expect(list(pads) in (list(before), list(after)), pads)
            seen.append(pads == after)
            # nothing is left in the store but what is held, and the next put is a whole one
            names = [name.split(".")[1] for name in manager.names()]
            expect(sorted(names) == sorted(pads), manager.names())
            expect(not manager.errors(), manager.errors())
            put("story", *new, "more", verb=REPLACE)
            manager.say("MARK=1")
            names = [name.split(".")[1] for name in manager.names()]
            expect(sorted(names) == sorted({*pads, *new, "more"}), manager.names())
        expect(seen == sorted(seen) and not seen[0] and seen[-1], seen)
        return len(seen)


@test
def a_kill_within_a_replacement_leaves_the_old_pads_or_the_new_ones():
    # a mark, three handles, no mark, two that go
    expect(after_each_message(["k0", "tokens", "v0"], ["v0", "v1", "k0"], REPLACE) == 8,
           "expected 7 messages")


@test
def a_kill_within_the_replacement_of_one_pad():
    expect(after_each_message(["k0", "v0"], ["k0"], REPLACE) == 3, "expected 2 messages")


@test
def a_kill_within_a_put_leaves_all_of_it_or_nothing():
    expect(after_each_message(["tokens"], ["k0", "v0"], PUT) == 5, "expected 4 messages")


@test
def pads_that_were_replaced_stay_away():
    with Manager("story", "--write") as manager:
        put("story", "k0", "v0")
        for _ in range(3):
            put("story", "v0", "k0", verb=REPLACE)
        manager.say("MARK=1")
        expect(manager.names() == ["6.v0", "7.k0"], manager.names())
        pads = held("story")
        manager.kill(signal.SIGKILL)
        manager.start()
        expect(held("story") == pads, (pads, held("story")))
        # what is refused tells the manager nothing
        error, words, _ = ask("story", REPLACE, ["k0", "k0"], [manager.store[0][1]] * 2)
        expect(error == -errno.EEXIST and words == '"k0" was given twice', (error, words))
        manager.say("MARK=1")
        expect(manager.names() == ["6.v0", "7.k0"], manager.names())
        ctl("-n", "story/v0", "put", "--replace", "story/k0")
        manager.say("MARK=1")
        expect(manager.names() == ["6.v0", "8.k0"], manager.names())


@test
def descriptors_for_another_process_are_left_alone():
    with Manager("story", *ONE) as manager:
        ctl("-n", "story", "append", data=b"ab")
        manager.kill(signal.SIGKILL)
        manager.start(listen_pid=1)
        expect("len=0" in ctl("ls"), ctl("ls"))


@test
def a_store_that_cannot_be_reached_costs_no_pad():
    command = [PROGRAM, "hold", "story", "--foreground", *ONE]
    with subprocess.Popen(command, env=dict(os.environ, NOTIFY_SOCKET="/nowhere"),
                          stderr=subprocess.PIPE) as holder:
        # its second complaint is about being ready
        lines = [holder.stderr.readline().decode() for _ in range(2)]
        expect("cannot pass the handle to the service manager" in lines[0] and
               "cannot tell the service manager" in lines[1], lines)
        expect("story/pad: " in ctl("ls"), ctl("ls"))
        ctl("drop", "story")
        expect(holder.wait() == 0, holder.returncode)


@test
def what_is_wrong_with_handles_that_are_put_is_said():
    with Manager("story", "--write"):
        fds = make_pads(2)
        error, words, _ = ask("story", PUT, ["k0"], fds)
        for fd in fds:
            os.close(fd)
        expect((error, words) == (-errno.EPROTO, "cannot receive handles: expected a name for "
                                  "each of 2 handles, got 1 names"), f"{error}: {words!r}")


@test
def what_is_wrong_with_handles_of_a_holder_is_said():
    os.makedirs(f"{RUNTIME.name}/kvscratch", 0o700, exist_ok=True)
    path = f"{RUNTIME.name}/kvscratch/odd"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen([PROGRAM, "-n", "odd", "info"], stderr=subprocess.PIPE) as reader:
            client = listener.accept()[0]
            with client:
                client.recv(REQUEST.size, socket.MSG_WAITALL)
                client.sendall(REPLY.pack(MAGIC, VERSION, 0, 1, b"") + struct.pack("<I", 3) +
                               b"k0\n")
                words = reader.stderr.read().decode()
    os.unlink(path)
    expect(reader.returncode == 2 and words == "kvscratchctl info: cannot receive handles: "
           "expected a name for each of 0 handles, got 1 names\n",
           f"exit {reader.returncode}: {words!r}")


run_tests()
