#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""What the tools do without the device: run natively, built with sanitizers.

usage: native_test.py BUILD-DIRECTORY [MODEL-DIRECTORY]; prints TAP.
"""

import contextlib
import math
import os
import pathlib
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile

from tap import expect, run_tests, test

BUILD = pathlib.Path(sys.argv[1])
MODEL = sys.argv[2] if len(sys.argv) > 2 else None


def run(program, *arguments):
    """Returns (exit status, stdout, stderr); a sanitizer's report is a failure."""
    done = subprocess.run([BUILD / f"{program}-sanitized", *map(str, arguments)],
                          stdin=subprocess.DEVNULL, capture_output=True, check=False)
    expect(b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr,
           done.stderr.decode(errors="replace"))
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def expect_error(status, words, program, *arguments):
    got, out, err = run(program, *arguments)
    what = f"{program} {' '.join(map(str, arguments))}: exit {got}, {out[:80]!r}, {err!r}"
    expect(got == status and words in err and err.count("\n") == 1, what)


def expect_quiet(*arguments):
    status, _, err = run("kvscratchctl", *arguments)
    expect(status == 0 and not err, f"{arguments}: exit {status}: {err!r}")


def text_of(*arguments):
    status, out, err = run("kvdecode", "--cache", "heap", *arguments)
    expect(status == 0 and not err, f"exit {status}: {err}")
    return out


class Model:
    """A small random model, its two files, and its forward pass written a second time.

    The formats are those of llama2.c: seven int32, then float32 tensors; and for
    the tokenizer the length of the longest piece, then score, length and bytes
    of each.
    """

    dim, heads, kv_heads = 8, 4, 2

    def __init__(self, directory, shared):
        self.hidden, self.layers = 12, 2
        self.vocab, self.seq_len, self.shared = 262, 12, shared
        self.head = self.dim // self.heads
        self.kv_dim = self.head * self.kv_heads
        self.random = random.Random(5 + shared)
        d, h, n = self.dim, self.hidden, self.layers
        sizes = [("embedding", self.vocab * d), ("rms_att", n * d), ("wq", n * d * d),
                 ("wk", n * d * self.kv_dim), ("wv", n * d * self.kv_dim), ("wo", n * d * d),
                 ("rms_ffn", n * d), ("w1", n * d * h), ("w2", n * d * h), ("w3", n * d * h),
                 ("rms_final", d), ("freq_real", self.seq_len * self.head // 2),
                 ("freq_imag", self.seq_len * self.head // 2)]
        if not shared:
            sizes.append(("classifier", self.vocab * d))
        self.tensor = {}
        weights = b""
        for name, size in sizes:
            values = struct.pack(f"<{size}f", *(self.random.uniform(-2, 2) for _ in range(size)))
            self.tensor[name] = struct.unpack(f"<{size}f", values)
            weights += values
        if shared:
            self.tensor["classifier"] = self.tensor["embedding"]
        vocab = self.vocab if shared else -self.vocab
        self.checkpoint_bytes = struct.pack("<7i", d, h, n, self.heads, self.kv_heads, vocab,
                                            self.seq_len) + weights
        self.pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
        self.pieces += [b"<0x%02X>" % byte for byte in range(256)] + [b"a", b"b", b"ab"]
        self.tokenizer_bytes = struct.pack("<i", max(map(len, self.pieces)))
        for piece in self.pieces:
            self.tokenizer_bytes += struct.pack("<fi", 0.0, len(piece)) + piece
        self.checkpoint = pathlib.Path(directory) / "model.bin"
        self.tokenizer = pathlib.Path(directory) / "tok.bin"
        self.checkpoint.write_bytes(self.checkpoint_bytes)
        self.tokenizer.write_bytes(self.tokenizer_bytes)

    def rows(self, name, layer, out, columns):
        start = layer * out * columns
        return [self.tensor[name][start + i * columns:start + (i + 1) * columns]
                for i in range(out)]

    @staticmethod
    def multiply(matrix, vector):
        return [sum(w * x for w, x in zip(row, vector)) for row in matrix]

    @staticmethod
    def norm(x, weights):
        scale = 1 / math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)
        return [w * v * scale for w, v in zip(weights, x)]

    def rotate(self, vector, pos):
        out = list(vector)
        for i in range(0, len(vector), 2):
            angle = pos / 10000 ** ((i % self.head) / self.head)
            a, b = vector[i], vector[i + 1]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def attend(self, q, keys, values):
        out = []
        for head in range(self.heads):
            at = head // (self.heads // self.kv_heads) * self.head
            mine = q[head * self.head:(head + 1) * self.head]
            scores = [sum(a * b for a, b in zip(mine, key[at:at + self.head])) /
                      math.sqrt(self.head) for key in keys]
            exps = [math.exp(score - max(scores)) for score in scores]
            for i in range(at, at + self.head):
                out.append(sum(e * v[i] for e, v in zip(exps, values)) / sum(exps))
        return out

    def forward(self, token, pos, cache):
        d, h = self.dim, self.hidden
        x = list(self.tensor["embedding"][token * d:(token + 1) * d])
        for layer in range(self.layers):
            keys, values = cache[layer]
            normed = self.norm(x, self.tensor["rms_att"][layer * d:(layer + 1) * d])
            q = self.rotate(self.multiply(self.rows("wq", layer, d, d), normed), pos)
            keys.append(self.rotate(self.multiply(self.rows("wk", layer, self.kv_dim, d),
                                                  normed), pos))
            values.append(self.multiply(self.rows("wv", layer, self.kv_dim, d), normed))
            attended = self.attend(q, keys, values)
            x = [a + b for a, b in zip(x, self.multiply(self.rows("wo", layer, d, d), attended))]
            normed = self.norm(x, self.tensor["rms_ffn"][layer * d:(layer + 1) * d])
            gate = self.multiply(self.rows("w1", layer, h, d), normed)
            up = self.multiply(self.rows("w3", layer, h, d), normed)
            hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
            x = [a + b for a, b in zip(x, self.multiply(self.rows("w2", layer, d, h), hidden))]
        return self.multiply(self.rows("classifier", 0, self.vocab, d),
                             self.norm(x, self.tensor["rms_final"]))

    def greedy_text(self):
        cache = [([], []) for _ in range(self.layers)]
        token, text = 1, b""
        for pos in range(self.seq_len - 1):
            logits = self.forward(token, pos, cache)
            token = logits.index(max(logits))
            if token in (1, 2):
                break
            text += bytes([token - 3]) if 3 <= token < 259 else self.pieces[token]
        return text + b"\n"

    def arguments(self):
        return "--checkpoint", self.checkpoint, "--tokenizer", self.tokenizer


@test
def help_needs_nothing():
    for program in ("kvdecode", "kvscratchctl"):
        status, out, err = run(program, "--help")
        expect(status == 0 and out.startswith(b"Usage: ") and b"Exit status" in out and not err,
               program)


def on_a_terminal(*arguments):
    """What the tool writes to stderr where that is a terminal"""
    ours, theirs = os.openpty()
    with subprocess.Popen([BUILD / "kvscratchctl-sanitized", *map(str, arguments)],
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=theirs) as tool:
        os.close(theirs)
        written = b""
        # EIO when nobody has the other end any more
        with contextlib.suppress(OSError):
            while got := os.read(ours, 4096):
                written += got
    os.close(ours)
    expect(tool.returncode == 0, f"{arguments}: exit {tool.returncode}: {written!r}")
    return written.decode()


@test
def long_transfers_show_how_far_they_are():
    tool = BUILD / "kvscratchctl-sanitized"
    with tempfile.TemporaryDirectory() as directory:
        rows, saved = f"{directory}/rows", f"{directory}/rows.npy"
        pathlib.Path(rows).write_bytes(bytes(range(256)) * (16 << 12))
        # a pad for a script that appends, dumps, saves and loads
        for word, script in (("reading", f'"$0" append "$@" {rows}'),
                             ("writing", f'"$0" append --no-progress {rows} && '
                                         '"$0" dump "$@" --format raw'),
                             ("saving", f'"$0" append --no-progress {rows} && '
                                        f'"$0" save "$@" {saved}'),
                             ("loading", f'"$0" load "$@" {saved}')):
            command = ("create", "--max-seq-len", 1 << 14, "--dim", 1024, "--dtype", "u8", "--",
                       "sh", "-c", script, tool)
            shown = on_a_terminal(*command)
            last = shown.split("\r")[-2:][0]
            expect(f"\r{word} [" in shown and shown.endswith("\r\033[K") and
                   last.endswith(("100% of 16 MiB", " 99% of 16 MiB")) and "\n" not in shown,
                   f"{word}: {shown!r}")
            expect(not on_a_terminal(*command, "--no-progress"), f"{word}: --no-progress")
            expect_quiet(*command)


@test
def wrong_options():
    for arguments, words in (
            (["--steps", "0"], "--steps: expected an integer from 1 to 4294967295, got \"0\""),
            (["--steps", "many"], "got \"many\""),
            (["--temperature", "-1"], "--temperature: expected a number from 0 to 1000"),
            (["--temperature", "nan"], "got \"nan\""),
            (["--top-p", "1.5"], "--top-p: expected a number from 0 to 1, got \"1.5\""),
            (["--cache", "disk"], "--cache: expected pads or heap, got \"disk\""),
            (["--kv", "f16"], "--kv: expected f32 or mxint8, got \"f16\""),
            (["--handle", "2"], "--handle: expected an integer from 3"),
            (["--takeover"], "--takeover: expected --hold or --handle with it"),
            (["--draft", "0"], "--draft: expected an integer from 1 to 64, got \"0\""),
            (["--draft-model", "x"], "--draft-model: expected --draft with it"),
            (["--draft", "3", "--draft-model", "/nowhere"],
             "/nowhere: No such file or directory"),
            (["--wait-reader"], "--wait-reader: expected --serve with it"),
            (["--cache", "heap", "--serve", "x"], "expected --cache pads, got --cache heap"),
            (["--cache", "heap", "--fork", "x"], "expected --cache pads, got --cache heap"),
            (["--fork", "x", "--handle", "9"], "expected either --handle or --fork, got both"),
            (["--checkpoint", "x"], "expected both --checkpoint and --tokenizer"),
            (["--model", "/nowhere"], "/nowhere: No such file or directory"),
            (["story"], "expected options only, got \"story\""),
            (["--bogus"], "unknown option \"--bogus\", see --help"),
            (["--steps"], "--steps: expected a value, see --help"),
            (["--cache", "heap", "--steps", "999999"], "the positions of the model, got 999999")):
        expect_error(1, words, "kvdecode", *arguments)


@test
def made_up_weights():
    text = text_of()
    expect(len(text) > 100 and text == text_of(), f"{text!r}")
    expect(text.startswith(text_of("--steps", 20).rstrip(b"\n")), "fewer steps are a prefix")
    seeded = text_of("--temperature", 1, "--seed", 7)
    expect(seeded == text_of("--temperature", 1, "--seed", 7), "the same seed")
    expect(seeded != text_of("--temperature", 1, "--seed", 8), "another seed")
    expect(seeded != text, "a temperature")
    expect(text == text_of("--temperature", 1, "--top-p", 0), "the smallest nucleus is greedy")


@test
def agrees_with_a_second_implementation():
    for shared in (True, False):
        with tempfile.TemporaryDirectory() as directory:
            model = Model(directory, shared)
            expected, got = model.greedy_text(), text_of(*model.arguments())
            expect(got == expected, f"expected {expected!r}, got {got!r}")
            expect(len(expected) > 4, f"too short to tell: {expected!r}")
            expect(got == text_of("--model", directory), "the directory holds the same files")


@test
def prompts_become_tokens_and_text_again():
    with tempfile.TemporaryDirectory() as directory:
        model = Model(directory, True)
        for prompt in ("abab", "xyz", "Ä\U0001f600", "aab"):
            text = text_of(*model.arguments(), "--prompt", prompt)
            expect(text.lstrip(b" ").startswith(prompt.encode()), f"{prompt}: {text!r}")
        # BOS, the blank in front, and as few pieces as the merges make
        for prompt, count in (("ab", 3), ("abab", 4), ("aab", 4), ("xyz", 5)):
            expect_error(1, f"tokens, BOS included, got {count}", "kvdecode", "--cache", "heap",
                         *model.arguments(), "--steps", count - 1, "--prompt", prompt)
        expect_error(1, "--prompt: expected at most 12", "kvdecode", "--cache", "heap",
                     *model.arguments(), "--prompt", "ababababababababababababab")
        expect_error(1, "bytes for 12 positions, got", "kvdecode", "--cache", "heap",
                     *model.arguments(), "--prompt", "ab" * 500)


@test
def scaled_cache():
    plain, scaled = text_of("--steps", 60), text_of("--steps", 60, "--kv", "mxint8")
    expect(len(scaled) > 30 and scaled[:8] == plain[:8], f"{plain!r}, {scaled!r}")
    with tempfile.TemporaryDirectory() as directory:
        # rows of 4 elements are no whole block
        model = Model(directory, True)
        expect_error(1, "--kv mxint8: expected rows of a multiple of 32 elements, got 4",
                     "kvdecode", "--cache", "heap", "--kv", "mxint8", *model.arguments())
        for kv in ("f32", "mxint8"):
            run("kvdecode", "--cache", "heap", "--kv", kv, "--steps", 9, "--logits",
                pathlib.Path(directory) / kv)
        logits = [(pathlib.Path(directory) / kv).read_bytes() for kv in ("f32", "mxint8")]
        expect(len(logits[0]) == len(logits[1]) == 9 * 512 * 4, f"{len(logits[0])} bytes")
        first = [struct.unpack("<512f", text[:2048]) for text in logits]
        differences = [abs(a - b) for a, b in zip(*first)]
        # a byte per element is good for two digits or so
        expect(0 < max(differences) < 0.05 * max(map(abs, first[0])), f"{max(differences)}")
        expect_error(3, "cannot open", "kvdecode", "--cache", "heap", "--logits",
                     pathlib.Path(directory) / "no" / "such")


@test
def chance_follows_the_weights():
    draws = {text_of("--temperature", 1, "--seed", seed, "--steps", 3) for seed in range(12)}
    expect(len(draws) > 3, f"seeds make a difference: {draws}")
    cold = {text_of("--temperature", "0.0001", "--seed", seed, "--steps", 30) for seed in range(4)}
    expect(cold == {text_of("--steps", 30)}, "next to no temperature is greedy")
    narrow = {text_of("--temperature", 1, "--top-p", 0.01, "--seed", seed, "--steps", 30)
              for seed in range(4)}
    expect(narrow == {text_of("--steps", 30)}, "a narrow nucleus is greedy")
    # the number of a position, not one for all
    text = text_of("--temperature", 1000, "--top-p", 1, "--seed", 5).split()
    expect(len(set(text)) > 10, f"{text}")


@test
def model_directories():
    with tempfile.TemporaryDirectory() as directory:
        def refused(words):
            expect_error(1, words, "kvdecode", "--cache", "heap", "--model", directory)

        refused("expected one tok*.bin, got none")
        model = Model(directory, True)
        (pathlib.Path(directory) / "other.bin").write_bytes(model.checkpoint_bytes)
        refused("expected one *.bin beside tok*.bin, got more")
        model.checkpoint.unlink()
        (pathlib.Path(directory) / "tok2.bin").write_bytes(model.tokenizer_bytes)
        refused("expected one tok*.bin, got more")
        model.tokenizer.unlink()
        (pathlib.Path(directory) / "other.bin").unlink()
        os.mkfifo(pathlib.Path(directory) / "fifo.bin")
        refused("expected a regular file")


@test
def stats_go_to_stderr():
    status, out, err = run("kvdecode", "--cache", "heap", "--stats", "--steps", 9)
    expect(status == 0 and out == text_of("--steps", 9), "the text is the same")
    expect(err.startswith("9 tokens, 9 computed, ") and err.count("\n") == 1, err)


@test
def drafts():
    """Whatever is drafted, the text is the same, and so is each logit."""
    with tempfile.TemporaryDirectory() as directory:
        model = Model(directory, True)
        other = pathlib.Path(directory) / "other.bin"
        other.write_bytes(bytearray(model.checkpoint_bytes[:28]) +
                          model.checkpoint_bytes[:27:-1])
        for number, options in enumerate((("--steps", 9), ("--temperature", 1))):
            logits = pathlib.Path(directory) / f"logits{number}"
            options = *options, *model.arguments(), "--logits", logits
            text = text_of(*options)
            values = logits.read_bytes()
            for more in ("--draft", 1), ("--draft", 64), \
                    ("--draft", 3, "--draft-model", model.checkpoint), \
                    ("--draft", 3, "--draft-model", other):
                expect(text_of(*options, *more) == text, f"{options} {more}: another text")
                expect(logits.read_bytes() == values, f"{options} {more}: other logits")
        # all of them are right
        _, _, err = run("kvdecode", "--cache", "heap", "--stats", *model.arguments(), "--draft", 2,
                        "--draft-model", model.checkpoint, "--steps", 9)
        expect(err.startswith("9 tokens, 9 computed, ") and
               err.endswith(", 6 of 6 drafts accepted\n"), err)
        expect_error(1, "model.bin: expected a vocabulary of 512 tokens, as the model has, got 262",
                     "kvdecode", "--draft", 3, "--draft-model", model.checkpoint)


@test
def broken_checkpoints():
    with tempfile.TemporaryDirectory() as directory:
        model = Model(directory, True)
        good = model.checkpoint_bytes

        def refused(data):
            model.checkpoint.write_bytes(data)
            expect_error(1, "model.bin: ", "kvdecode", "--cache", "heap", *model.arguments())

        for cut in (0, 1, 27, 28, 29, len(good) // 2, len(good) - 1):
            refused(good[:cut])
        refused(good + b"x")
        for field in range(7):
            for value in (0, -1, 1 << 30, -(1 << 31), 0x7fffffff, 7):
                # the sign of the vocabulary is a flag
                if struct.unpack_from("<i", good, field * 4)[0] != value:
                    refused(good[:field * 4] + struct.pack("<i", value) + good[field * 4 + 4:])


@test
def broken_tokenizers():
    with tempfile.TemporaryDirectory() as directory:
        model = Model(directory, True)
        good = model.tokenizer_bytes

        def refused(data):
            model.tokenizer.write_bytes(data)
            expect_error(1, "tok.bin: ", "kvdecode", "--cache", "heap", *model.arguments())

        for cut in (0, 3, 4, 11, 12, len(good) // 2, len(good) - 1):
            refused(good[:cut])
        refused(good + b"x")
        refused(struct.pack("<i", 0) + good[4:])
        refused(struct.pack("<i", -5) + good[4:])
        refused(good.replace(b"<0x41>", b"<0x4G>"))
        refused(good.replace(b"<0x41>", b"<0x42>"))
        for length in (-1, 1 << 30, 0x7fffffff):
            refused(good[:8] + struct.pack("<i", length) + good[12:])
        refused(good[:4] + struct.pack("<f", math.nan) + good[8:])


def other_formats(model):
    """What lies under names like ours, and what it is said to be"""
    version = struct.pack("<Ii7iB", 0x616b3432, 1, model.dim, model.hidden, model.layers,
                          model.heads, model.kv_heads, model.vocab, model.seq_len, 1)
    header = b'{"__metadata__":{"format":"pt"}}'
    for exported in (version, version[:4] + b"\2" + version[5:]):
        yield exported + bytes(256 - len(exported)), "a later version of llama2.c's export"
    yield struct.pack(">Ii", 0x616b3432, 1) + bytes(248), "a later version of llama2.c's export"
    yield b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"
    yield b"lmgg" + bytes(99), "a GGML file"
    yield b"<!DOCTYPE html>\n<html><title>Not found</title></html>\n", "an HTML page"
    yield b"\xef\xbb\xbf \n<html lang='en'>", "an HTML page"
    yield (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 +
           b"\nsize 1056540\n"), "a Git LFS pointer"
    yield b"/annex/objects/SHA256E-s1056540--00.bin\n", "a git-annex pointer"
    yield struct.pack("<Q", len(header)) + header, "a safetensors file"
    yield b"PK\3\4" + bytes(4) + b"archive/data.pkl" + bytes(99), "a ZIP archive"
    yield b"\x80\2\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(99), "a Python pickle"
    yield b"\x80\4\x95" + bytes(99), "a Python pickle"
    yield b"\n\x0e\n\5<unk>\x15" + bytes(99), "a SentencePiece model"
    yield b"\x93NUMPY\1\0v\0{", "a .npy file"
    yield b"\x1f\x8b\x08" + bytes(99), "compressed by gzip"
    yield b'{"version": "1.0", "model": {"type": "BPE"}}', "a JSON file"
    yield b"Entry not found", "a text file"
    yield b"", "an empty file"


def big_endian(model):
    """Both files, as a machine of the other byte order writes them"""
    words = len(model.checkpoint_bytes) // 4
    checkpoint = struct.pack(f">{words}I", *struct.unpack(f"<{words}I", model.checkpoint_bytes))
    tokenizer = struct.pack(">i", max(map(len, model.pieces)))
    for piece in model.pieces:
        tokenizer += struct.pack(">fi", 0.0, len(piece)) + piece
    return checkpoint, tokenizer


@test
def files_of_other_formats():
    with tempfile.TemporaryDirectory() as directory:
        model = Model(directory, True)
        swapped = big_endian(model)
        for path, good, other, expected in (
                (model.checkpoint, model.checkpoint_bytes, model.tokenizer_bytes,
                 "expected a checkpoint as llama2.c's legacy export (version 0) writes it, got "),
                (model.tokenizer, model.tokenizer_bytes, model.checkpoint_bytes,
                 "expected a tokenizer as llama2.c's tokenizer.py writes it, got ")):
            what = "a tokenizer" if path == model.checkpoint else "a checkpoint"
            for data, got in (*other_formats(model), (other, what),
                              (swapped[path == model.tokenizer], "one of a big-endian machine")):
                path.write_bytes(data)
                expect_error(1, f"{path.name}: {expected}", "kvdecode", "--cache", "heap",
                             *model.arguments())
                expect_error(1, got, "kvdecode", "--cache", "heap", *model.arguments())
            path.write_bytes(good)


@test
def an_output_that_is_full():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([BUILD / "kvdecode-sanitized", "--cache", "heap"], stdout=full,
                              stderr=subprocess.PIPE, check=False)
    expect(done.returncode == 3 and b"No space left on device" in done.stderr,
           f"exit {done.returncode}: {done.stderr!r}")


def without_device(**environment):
    """An environment in which pads live in memfds."""
    return {**os.environ, "KVSCRATCH_BACKEND": "memfd", **environment}


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


@test
def logits_replace_a_file_as_a_whole():
    with tempfile.TemporaryDirectory() as directory:
        old, link = pathlib.Path(directory) / "old", pathlib.Path(directory) / "link"
        old.write_text("old")
        old.chmod(0o604)
        link.symlink_to(old)
        arguments = ("--cache", "heap", "--steps", "9", "--logits", link)
        done = subprocess.run([BUILD / "kvdecode-sanitized", *arguments], check=False,
                              capture_output=True, stdin=subprocess.DEVNULL,
                              preexec_fn=small_files)  # pylint: disable=subprocess-popen-preexec-fn
        expect(done.returncode == 3 and done.stderr.decode() ==
               f"kvdecode: {link}: cannot write: File too large\n", f"{done.stderr!r}")
        expect(old.read_bytes() == b"old" and len(os.listdir(directory)) == 2,
               f"{os.listdir(directory)}")
        status, _, err = run("kvdecode", *arguments)
        expect(status == 0 and not err, err)
        expect(old.stat().st_size == 9 * 512 * 4 and old.stat().st_mode & 0o777 == 0o604 and
               link.is_symlink() and len(os.listdir(directory)) == 2, f"{os.listdir(directory)}")
        old.unlink()
        expect_error(3, "link: expected a regular file or none, got a link to nothing",
                     "kvdecode", *arguments)
        expect_error(3, "cannot open: Is a directory", "kvdecode", *arguments[:-1], directory)
        # what a descriptor is open on is written to
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" 5>{directory}/fifth', "sh", BUILD / "kvdecode-sanitized",
             *arguments[:-1], "/proc/self/fd/5"], check=False, capture_output=True)
        expect(not done.stderr and os.stat(f"{directory}/fifth").st_size == 9 * 512 * 4,
               f"{done.stderr!r}")


@test
def logits_of_a_decoder_that_is_stopped():
    """The old file stays, and nothing beside it."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as reader:
        files, path = pathlib.Path(directory) / "files", f"{directory}/sock"
        files.mkdir()
        (files / "old").write_text("old")
        # into a full pipe it cannot print its first word
        text, full = os.pipe()
        os.set_blocking(full, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full, bytes(4096))
        os.set_blocking(full, True)
        with subprocess.Popen([BUILD / "kvdecode-sanitized", "--logits", files / "old", "--serve",
                               path, "--wait-reader"], stdin=subprocess.DEVNULL, stdout=full,
                              env=without_device()) as decoder:
            os.close(full)
            while reader.connect_ex(path):
                expect(decoder.poll() is None, f"exit {decoder.returncode}")
            # whoever has handles is served by one that has all files open
            reader.recv(1)
            decoder.terminate()
            while os.read(text, 65536):
                pass
        os.close(text)
        expect(decoder.returncode == -signal.SIGTERM, f"exit {decoder.returncode}")
        expect((files / "old").read_bytes() == b"old" and os.listdir(files) == ["old"],
               f"{os.listdir(files)}")


@test
def pads_without_the_module():
    for options in ((), ("--kv", "mxint8"), ("--queries",)):
        heap = text_of(*(option for option in options if option != "--queries"))
        done = subprocess.run([BUILD / "kvdecode-sanitized", *options], capture_output=True,
                              check=False, stdin=subprocess.DEVNULL, env=without_device())
        expect(done.returncode == 0 and not done.stderr, f"{options}: {done.stderr!r}")
        expect(done.stdout == heap, f"{options}: {done.stdout!r} instead of {heap!r}")


@test
def no_device():
    if os.path.exists("/dev/kvscratch"):
        return "there is a device"
    done = subprocess.run([BUILD / "kvdecode-sanitized"], capture_output=True, check=False,
                          stdin=subprocess.DEVNULL,
                          env={**os.environ, "KVSCRATCH_BACKEND": "kernel"})
    expect(done.returncode == 2 and b"is the module loaded?; --cache heap works" in done.stderr,
           f"exit {done.returncode}: {done.stderr!r}")
    return None


class Gated:
    """A kvdecode with pads of its own that listens, and waits before its first step."""

    def __init__(self, directory, *prefix):
        self.path, self.gate = f"{directory}/sock", f"{directory}/gate"
        os.mkfifo(self.gate)
        # the leak detector wants /proc, at the end
        options = os.environ.get("ASAN_OPTIONS", "") + ":detect_leaks=0"
        # pylint: disable=consider-using-with
        self.process = subprocess.Popen(
            [*prefix, BUILD / "kvdecode-sanitized", "--steps", "3", "--serve", self.path,
             "--logits", self.gate], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=without_device(ASAN_OPTIONS=options))

    def listens(self):
        """Whether it does now; an error ends it before."""
        while not os.path.exists(self.path):
            if self.process.poll() is not None:
                return False
        return True

    def finish(self):
        """Let it go on; returns its exit status and its stderr."""
        with open(self.gate, "rb") as logits:
            logits.read()
        return self.process.wait(), self.process.communicate()[1].decode()


@test
def a_reader_that_is_gone_before_it_is_served():
    with tempfile.TemporaryDirectory() as directory:
        decoder = Gated(directory)
        expect(decoder.listens(), "no decoder")
        with socket.socket(socket.AF_UNIX) as reader:
            while reader.connect_ex(decoder.path):
                os.sched_yield()
        status, words = decoder.finish()
        expect(status == 0 and words == "kvdecode: a reader: cannot pass handles: Broken pipe\n",
               f"exit {status}: {words!r}")


# In a namespace where /proc goes away when the decoder listens; the reader is the shell's.
WITHOUT_PROC = """
"$@" &
while [ ! -S "$sock" ]; do kill -0 $! || exit; done
mount -t tmpfs none /proc
touch "$hidden"
wait $!
"""


@test
def pads_in_memfds_without_proc():
    """What the library says of it: a handle of one's own is opened there."""
    with tempfile.TemporaryDirectory() as directory:
        hidden = f"{directory}/hidden"
        namespace = ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*namespace, "mount", "-t", "tmpfs", "none", "/proc"], check=False,
                          capture_output=True).returncode:
            return "no namespace for mounts"
        decoder = Gated(directory, *namespace, "env", f"sock={directory}/sock", f"hidden={hidden}",
                        "sh", "-c", WITHOUT_PROC, "sh")
        while not os.path.exists(hidden):
            expect(decoder.process.poll() is None, "no decoder")
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(decoder.path)
            status, words = decoder.finish()
        why = re.escape(" for a handle of its own: No such file or directory\n")
        expect(status == 2 and re.fullmatch(
            rf"kvdecode: cache: cannot open /proc/thread-self/fd/\d+{why}"
            rf"kvdecode: k0: cannot open /proc/thread-self/fd/\d+{why}", words),
               f"exit {status}: {words!r}")
    return None


@test
def handles_that_are_none():
    for fds, words in ((4, "cache: descriptor 4: expected a handle, got none"),
                       (3, "cache: descriptor 3: expected a handle of a pad, got a "
                        "character device")):
        # one that /dev/null has, and one that nobody has
        done = subprocess.run(
            ["sh", "-c", '"$0" --handle "$1" 3</dev/null 4<&-', BUILD / "kvdecode-sanitized",
             str(fds)], check=False, capture_output=True, stdin=subprocess.DEVNULL,
            env=without_device())
        expect(done.returncode == 2 and done.stderr.decode() == f"kvdecode: {words}\n",
               f"exit {done.returncode}: {done.stderr!r}")


def killed_decoder(environment):
    """A kvdecode that was killed when some of its text had come."""
    with subprocess.Popen([BUILD / "kvdecode-sanitized", "--hold", "story"], env=environment,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as decoder:
        text = decoder.stdout.read(60)
        decoder.kill()
    expect(decoder.returncode == -9, f"kvdecode ended with {decoder.returncode} after {text!r}")


@test
def a_killed_decoder_goes_on_from_held_pads():
    with tempfile.TemporaryDirectory() as directory:
        environment = without_device(XDG_RUNTIME_DIR=directory)

        def tool(*arguments):
            return subprocess.run([BUILD / arguments[0], *arguments[1:]], capture_output=True,
                                  check=False, stdin=subprocess.DEVNULL, env=environment)

        none = tool("kvdecode-sanitized", "--hold", "story")
        expect(none.returncode == 2 and b"no pads are held as" in none.stderr, f"{none.stderr!r}")
        held = tool("kvscratchctl-sanitized", "hold", "story", "--write")
        expect(held.returncode == 0, f"{held.stderr!r}")
        try:
            killed_decoder(environment)
            resumed = tool("kvdecode-sanitized", "--hold", "story", "--stats")
            tokens, computed = (int(word) for word in resumed.stderr.split()[:3:2])
            expect(resumed.stdout == text_of(), f"{resumed.stdout!r}, {resumed.stderr!r}")
            expect(computed < tokens, f"{resumed.stderr!r}")
            other = tool("kvdecode-sanitized", "--hold", "story", "--queries")
            expect(other.returncode == 2 and b"expected 13 planes of 256 rows, got 9 of 256" in other.stderr,
                   f"{other.stderr!r}")
        finally:
            tool("kvscratchctl-sanitized", "drop", "story")


@contextlib.contextmanager
def holder(name):
    """A function that runs a tool beside a holder, which ends with the context."""
    with tempfile.TemporaryDirectory() as directory:
        environment = without_device(XDG_RUNTIME_DIR=directory)

        def tool(program, *arguments):
            return subprocess.run([BUILD / f"{program}-sanitized", *map(str, arguments)],
                                  capture_output=True, check=False, stdin=subprocess.DEVNULL,
                                  env=environment)

        held = tool("kvscratchctl", "hold", name, "--write")
        expect(held.returncode == 0, f"{held.stderr!r}")
        try:
            yield tool
        finally:
            tool("kvscratchctl", "drop", name)


class Wide(Model):
    """Rows that mxint8 has blocks for"""

    dim, heads, kv_heads = 128, 4, 2


@test
def a_cache_of_another_checkpoint():
    with tempfile.TemporaryDirectory() as directory:
        for model_type, options in ((Model, ()), (Model, ("--queries",)),
                                    (Wide, ("--kv", "mxint8"))):
            model = model_type(directory, True)
            # one number, the last one that counts
            other = bytearray(model.checkpoint_bytes)
            other[-8 * len(model.tensor["freq_real"]) - 1] ^= 0x80
            arguments = ("--hold", "m", *options, *model.arguments())
            with holder("m") as tool:
                first = tool("kvdecode", "--steps", 8, *arguments)
                expect(first.returncode == 0, f"{first.stderr!r}")
                model.checkpoint.write_bytes(other)
                refused = tool("kvdecode", "--steps", 9, *arguments)
                expect(refused.returncode == 2 and not refused.stdout and
                       b"it is of another checkpoint" in refused.stderr,
                       f"{options}: {refused.returncode} {refused.stderr!r}")
                model.checkpoint.write_bytes(model.checkpoint_bytes)
                again = tool("kvdecode", "--steps", 8, *arguments)
                expect(again.stdout == first.stdout and not again.stderr, f"{again.stderr!r}")


@test
def a_pad_that_is_no_cache():
    status, out, err = run("kvscratchctl", "create", "--max-seq-len", 8, "--dim", 4, "--",
                           BUILD.resolve() / "kvdecode-sanitized", "--handle", 3)
    expect(status == 2 and not out and 'got "": it is of another checkpoint' in err,
           f"exit {status}: {err!r}")


@test
def saved_pads_go_on_in_another_holder():
    """Also those that convert: the text is that of one decoder that was left alone."""
    with tempfile.TemporaryDirectory() as directory:
        environment = without_device(XDG_RUNTIME_DIR=directory)

        def tool(program, *arguments):
            done = subprocess.run([BUILD / f"{program}-sanitized", *arguments], check=False,
                                  capture_output=True, stdin=subprocess.DEVNULL, env=environment)
            expect(done.returncode == 0, f"{program} {arguments}: {done.stderr!r}")
            return done.stdout

        for kv in "f32", "mxint8":
            file = f"{directory}/{kv}.safetensors"
            try:
                for holder in "first", "second":
                    tool("kvscratchctl", "hold", holder, "--write")
                tool("kvdecode", "--kv", kv, "--hold", "first", "--steps", "20")
                tool("kvscratchctl", "-n", "first", "save", file)
                tool("kvscratchctl", "-n", "second", "load", file)
                text = tool("kvdecode", "--kv", kv, "--hold", "second")
                expect(text == text_of("--kv", kv), f"{kv}: {text!r}")
            finally:
                for holder in "first", "second":
                    tool("kvscratchctl", "drop", holder)


@test
def a_holder_that_is_there_and_out_of_reach():
    """What makes one is said where there is none, and nowhere else."""
    def few_files():
        # the socket, and not the handle that comes over it
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))

    with tempfile.TemporaryDirectory() as directory:
        environment = without_device(XDG_RUNTIME_DIR=directory)
        kvdecode = [BUILD / "kvdecode-sanitized", "--hold", "story", "--steps", "2"]
        subprocess.run([BUILD / "kvscratchctl-sanitized", "hold", "story", "--write"], check=True,
                       env=environment)
        try:
            subprocess.run(kvdecode, check=True, stdout=subprocess.DEVNULL, env=environment)
            done = subprocess.run(kvdecode, check=False, capture_output=True,
                                  preexec_fn=few_files,  # pylint: disable=subprocess-popen-preexec-fn
                                  stdin=subprocess.DEVNULL, env=environment)
        finally:
            subprocess.run([BUILD / "kvscratchctl-sanitized", "drop", "story"], check=True,
                           env=environment)
        expect(done.returncode == 2 and b"Too many open files" in done.stderr and
               b"makes one" not in done.stderr, f"exit {done.returncode}: {done.stderr!r}")


@test
def values_that_are_empty():
    for option in ("--model", "--checkpoint", "--tokenizer", "--serve", "--logits", "--hold"):
        expect_error(1, "expected a value for each option, got an empty one", "kvdecode", option,
                     "")


@test
def a_real_model_tells_a_story():
    if not MODEL:
        return "no MODEL= given"
    text = text_of("--model", MODEL, "--prompt", "Once upon a time", "--steps", 200)
    words = text.decode().split()
    common = sum(word.strip(".,\"!").lower() in
                 {"the", "a", "and", "was", "to", "she", "he", "her", "it", "in", "of", "they"}
                 for word in words)
    # as in any English tale; tokens at random would hardly hit them
    expect(text.startswith(b"Once upon a time") and len(words) > 60 and common > len(words) / 6,
           text.decode())
    return None


run_tests()
