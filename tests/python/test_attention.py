# SPDX-License-Identifier: GPL-2.0-only
"""tools/examples/attention.py: on pads of ours, and beside kvdecode."""

import errno
import importlib.util
import math
import os
import pathlib
import resource
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree

import numpy as np
import pytest

import kvscratch
from kvscratch import Plane, Scratchpad

PROGRAM = pathlib.Path(__file__).resolve().parents[2] / "tools/examples/attention.py"
SPEC = importlib.util.spec_from_file_location("attention", PROGRAM)
attention = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(attention)

LAYERS, HEADS, KV_HEADS, HEAD, ROWS = 2, 4, 2, 16, 5


def rows_for(pad, count):
    random = np.random.default_rng(7)
    return {plane.label: random.normal(size=(count, plane.dim)).astype(
        np.int32 if plane.label == "tokens" else np.float32) for plane in pad.planes}


@pytest.fixture(params=["f32", "mxint8"])
def pad(request):
    """The pad of a decoder that has come to ROWS tokens"""
    planes = []
    for layer in range(LAYERS):
        planes.append(Plane(f"k{layer}", KV_HEADS * HEAD, request.param, "f32"))
        planes.append(Plane(f"q{layer}", HEADS * HEAD))
    planes.append(Plane("tokens", 1, "i32"))
    with Scratchpad(8, planes=planes) as made:
        made.append(rows_for(made, ROWS))
        yield made


def written_out(pad, layer, head, heads, kv_heads):
    """The weights of one head, number by number"""
    query, keys = pad[f"q{layer}"], pad[f"k{layer}"]
    if keys.dtype == np.int8:
        keys = kvscratch.dequantize(keys, pad.scales(f"k{layer}"))
    rows, size = len(keys), query.shape[1] // heads
    at = head * kv_heads // heads * size
    scores = [sum(float(query[rows - 1, head * size + i]) * float(keys[row, at + i])
                  for i in range(size)) / math.sqrt(size) for row in range(rows)]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def assert_is_attention(found, pad, heads, kv_heads):
    layers, found_heads, rows = found.shape
    assert found_heads == heads and rows == len(pad)
    for layer in range(layers):
        for head in range(heads):
            assert np.allclose(found[layer, head],
                               written_out(pad, layer, head, heads, kv_heads), atol=1e-5)


def test_weights(pad):
    found = attention.last_attention(pad, HEADS, KV_HEADS)
    assert found.shape == (LAYERS, HEADS, ROWS)
    assert_is_attention(found, pad, HEADS, KV_HEADS)


def test_a_step_that_is_not_over(pad):
    before = attention.last_attention(pad, HEADS, KV_HEADS)
    with pad.writer() as writer:
        for label, rows in rows_for(pad, 1).items():
            writer.stage(label, rows)
        assert np.array_equal(attention.last_attention(pad, HEADS, KV_HEADS), before)
        writer.commit()
    assert attention.last_attention(pad, HEADS, KV_HEADS).shape[2] == ROWS + 1


def test_nothing_yet(pad):
    pad.clear()
    assert attention.last_attention(pad, HEADS, KV_HEADS) is None


# rows that a later layer finds dropped, or nobody until the end
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_truncated_while_it_computed(pad, layer, monkeypatch):
    groups, calls = attention.attention_of_head_groups, []

    def truncate_and_compute(query, keys):
        if len(calls) == layer:
            pad.truncate(ROWS - 1)
        calls.append(None)
        return groups(query, keys)

    monkeypatch.setattr(attention, "attention_of_head_groups", truncate_and_compute)
    assert attention.last_attention(pad, HEADS, KV_HEADS) is None


@pytest.mark.parametrize("heads, kv_heads, message", [
    (4, 3, "a multiple of kv-heads, got 4 and 3"),
    (0, 2, "a multiple of kv-heads, got 0 and 2"),
    (3, 3, "fit rows of 64 and 32 elements, got 3 and 3"),
    (4, 4, "fit rows of 64 and 32 elements, got 4 and 4"),
])
def test_wrong_heads(pad, heads, kv_heads, message):
    with pytest.raises(SystemExit) as caught:
        attention.check(pad, heads, kv_heads)
    assert message in caught.value.code


def program(*arguments):
    # it ends in any case; what waits for ever is told from the rest
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], text=True, check=False,
                          stdin=subprocess.DEVNULL, capture_output=True)


def test_no_decoder(tmp_path):
    done = program(tmp_path / "nobody", tmp_path / "a.svg", "--heads", 4)
    assert done.returncode == 1
    assert done.stderr == f"attention: {tmp_path}/nobody: No such file or directory\n"


def test_a_path_that_no_socket_has(tmp_path):
    done = program("/" + 200 * "a", tmp_path / "a.svg", "--heads", 4)
    assert done.returncode == 1
    assert done.stderr == f"attention: /{200 * 'a'}: AF_UNIX path too long\n"


def serve(path, pads):
    """Pass @pads to whoever connects to @path first."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer():
        with listener, listener.accept()[0] as client:
            kvscratch.send_handles(client, pads)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def attend(pads, tmp_path, *options):
    """The program beside a decoder that passes pads and ends"""
    thread = serve(tmp_path / "socket", pads)
    done = program(tmp_path / "socket", tmp_path / "a.svg", "--heads", HEADS, "--kv-heads",
                   KV_HEADS, *options)
    thread.join()
    (tmp_path / "socket").unlink()
    return done


def test_without_queries(tmp_path):
    with Scratchpad(8, planes=[("k0", 4), ("tokens", 1, "i32")]) as without:
        done = attend({"cache": without}, tmp_path)
        assert done.stderr == ("attention: expected a plane q0, got k0 tokens: "
                               "is it kvdecode --queries?\n")
        done = attend({"k0": without, "v0": without}, tmp_path)
        assert done.stderr == f"attention: {tmp_path}/socket: expected one pad, got 2\n"


@pytest.mark.parametrize("options", [(), ("--wait",)])
def test_a_decoder_that_ends_without_a_token(pad, options, tmp_path):
    pad.clear()
    done = attend({"cache": pad}, tmp_path, *options)
    assert done.returncode == 1
    assert done.stderr == "attention: expected a token, got 0 when the decoder ended\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture(name="small_files")
def limit_of_files():
    """A limit of the size of files, which for the interpreter is an error"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stopped", [None, "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(stopped, small_files, tmp_path, monkeypatch):
    output = tmp_path / "a.svg"
    output.write_text("old")
    if stopped:
        monkeypatch.setattr(os, stopped, interrupt)
    with pytest.raises(KeyboardInterrupt if stopped else OSError) as caught:
        attention.replace(str(output), bytes(10 if stopped else 5000))
    assert stopped or caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == "old"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    plots, link = tmp_path / "plots", tmp_path / "link.svg"
    plots.mkdir()
    old = plots / "old.svg"
    old.write_text("old")
    old.chmod(0o640)
    link.symlink_to(old)
    with open(old, encoding="ascii") as reader:
        attention.replace(str(link), b"new")
        assert reader.read() == "old"
    assert old.read_text() == "new" and old.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink() and list(plots.iterdir()) == [old]
    # a new one is what the umask makes of it
    (plots / "made").touch()
    attention.replace(str(plots / "new.svg"), b"new")
    assert (plots / "new.svg").stat().st_mode == (plots / "made").stat().st_mode


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nothing", path)])
def test_what_is_no_regular_file_stays(make, tmp_path):
    output = tmp_path / "a.svg"
    make(output)
    before = output.lstat().st_ino
    done = program(tmp_path / "nobody", output, "--heads", HEADS)
    assert (done.returncode, done.stderr) == (
        1, f"attention: {output}: expected a regular file or none, got something else\n")
    assert output.lstat().st_ino == before


@pytest.mark.parametrize("name", ["a", "a.", "a.txt"])
def test_a_name_of_no_plot(name, tmp_path):
    done = program(tmp_path / "nobody", tmp_path / name, "--heads", HEADS)
    assert (done.returncode, done.stderr) == (
        1, f"attention: {tmp_path}/{name}: expected a name that ends in .svg, .png or .pdf\n")


@pytest.mark.parametrize("kv", ["f32", "mxint8"])
def test_beside_kvdecode(kv, tmp_path):
    path = tmp_path / "decode.sock"
    with subprocess.Popen(["kvdecode", "--queries", "--kv", kv, "--steps", "24", "--serve", path,
                           "--wait-reader"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as decoder:
        while not path.exists():
            assert decoder.poll() is None, decoder.stdout.read()
        # it begins when somebody has the handles; we are the first
        with socket.socket(socket.AF_UNIX) as sock:
            while sock.connect_ex(str(path)):
                os.sched_yield()
            pad = kvscratch.receive_handles(sock)["cache"]
            done = program(path, tmp_path / "live.png", "--heads", 8, "--kv-heads", 4)
            # either it looked while the decoder was at work, or came when it was gone
            if done.returncode:
                assert done.stderr.startswith(f"attention: {path}: ")
            else:
                assert (tmp_path / "live.png").read_bytes().startswith(b"\x89PNG\r\n")
            while sock.recv(1):
                pass
    assert decoder.returncode == 0
    assert len(pad) == 24
    found = attention.last_attention(pad, 8, 4)
    assert_is_attention(found, pad, 8, 4)
    pad.close()


def test_waits_for_the_end(tmp_path):
    path, output = tmp_path / "decode.sock", tmp_path / "attention.svg"
    with subprocess.Popen(["kvdecode", "--queries", "--steps", "24", "--serve", path,
                           "--wait-reader"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as decoder:
        while not path.exists():
            assert decoder.poll() is None, decoder.stdout.read()
        done = program(path, output, "--heads", 8, "--kv-heads", 4, "--wait")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{output}: position 23, 4 layers, 8 heads\n"
    root = xml.etree.ElementTree.parse(output).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    # a heat map for each layer, and the bar
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == 5
