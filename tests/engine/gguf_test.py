#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Whether a checkpoint says in llama.cpp what it says in kvdecode, and what gguf.py refuses.

usage: gguf_test.py ENGINE-DIRECTORY KVDECODE [MODEL-DIRECTORY]; prints TAP.
"""

import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "user"))

from tap import expect, run_tests, test  # noqa: E402 pylint: disable=wrong-import-position

ENGINE, KVDECODE = map(os.path.abspath, sys.argv[1:3])
MODEL = sys.argv[3] if len(sys.argv) > 3 else None
DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, SEQ = 32, 48, 3, 4, 2, 290, 256
KV_DIM = DIM // HEADS * KV_HEADS


def convert(*arguments):
    """Exit status and stderr"""
    done = subprocess.run([HERE / "gguf.py", *map(str, arguments)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def expect_converted(*arguments):
    status, err = convert(*arguments)
    expect(status == 0 and not err, f"{arguments}: exit {status}: {err}")


def expect_refused(words, *arguments):
    status, err = convert(*arguments)
    expect(status != 0 and words in err and "Traceback" not in err,
           f"{arguments}: expected {words!r}, got exit {status}: {err}")


def made_up(directory, shared):
    """A checkpoint of random weights and its tokenizer, in llama2.c's formats"""
    random = np.random.default_rng(shared)
    sizes = [(VOCAB, DIM), (LAYERS, DIM), (LAYERS, DIM, DIM), (LAYERS, KV_DIM, DIM),
             (LAYERS, KV_DIM, DIM), (LAYERS, DIM, DIM), (LAYERS, DIM), (LAYERS, HIDDEN, DIM),
             (LAYERS, DIM, HIDDEN), (LAYERS, HIDDEN, DIM), (DIM,), (SEQ * DIM // HEADS,)]
    if not shared:
        sizes.append((VOCAB, DIM))
    checkpoint, tokenizer = f"{directory}/model.bin", f"{directory}/tok.bin"
    with open(checkpoint, "wb") as file:
        file.write(struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS,
                               VOCAB if shared else -VOCAB, SEQ))
        for size in sizes:
            # vectors, those of all layers too, are what norms are multiplied by
            weights = random.standard_normal(size) / (1 if len(size) < 3 else size[-1] ** 0.5 / 2)
            if size == (VOCAB, DIM):
                # control tokens, of which some would be the end, are never the likeliest
                weights[:3] /= 100
            file.write(weights.astype("<f4").tobytes())
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256)),
              b" ", *(b"%c" % letter for letter in b"abcdefghijklmnopqrstuvwxyz"), b"ba", b"ab",
              b"bab", b" a"]
    with open(tokenizer, "wb") as file:
        file.write(struct.pack("<i", 6))
        for rank, piece in enumerate(pieces):
            file.write(struct.pack("<fi", -rank, len(piece)) + piece)
    return checkpoint, tokenizer


def of_kvdecode(checkpoint, tokenizer, prompt, steps):
    """The likeliest token at each position, and the text"""
    with tempfile.NamedTemporaryFile() as logits:
        done = subprocess.run([KVDECODE, "--cache", "heap", "--checkpoint", checkpoint,
                               "--tokenizer", tokenizer, "--prompt", prompt, "--steps",
                               str(steps), "--logits", logits.name], check=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        vocab = abs(struct.unpack_from("<7i", pathlib.Path(checkpoint).read_bytes())[5])
        return (np.fromfile(logits.name, "<f4").reshape(-1, vocab).argmax(1).tolist(),
                done.stdout.decode(errors="replace"))


def of_llama(model, prompt, tokens):
    """How many tokens the prompt is, and what comes of it, as tokens and as text; in f32 all
    through, which flash attention is not
    """
    options = {"model": model, "prompt": prompt, "tokens": tokens, "type": "F32",
               "flashAttention": False}
    done = subprocess.run([f"{ENGINE}/bin/node", HERE / "generate.mjs", ENGINE,
                           json.dumps(options)], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=False)
    expect(done.returncode == 0, f"exit {done.returncode}: {done.stderr}")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[0]["rows"], [line["token"] for line in lines[:-1]], lines[-1]["text"][0]


def expect_same_tokens(checkpoint, tokenizer, prompt, tokens):
    with tempfile.NamedTemporaryFile(suffix=".gguf") as model:
        expect_converted("--checkpoint", checkpoint, "--tokenizer", tokenizer, model.name)
        begin, got, got_text = of_llama(model.name, prompt, tokens)
    wanted, text = of_kvdecode(checkpoint, tokenizer, prompt, begin + tokens)
    wanted = wanted[begin - 1:][:tokens]
    expect(len(set(wanted)) > 20, f"expected tokens that differ, got {wanted}")
    expect(got == wanted, f"{begin} tokens of prompt: expected {wanted}, got {got}")
    expect(text.strip() == prompt + got_text.rstrip(), f"expected {text!r}, got {got_text!r}")


@test
def made_up_checkpoints_say_what_they_say_in_kvdecode():
    for shared in True, False:
        with tempfile.TemporaryDirectory() as directory:
            expect_same_tokens(*made_up(directory, shared), "cabab cab, Ä", 100)


@test
def a_real_model_says_what_it_says_in_kvdecode():
    if not MODEL:
        return "no MODEL= given"
    directory = pathlib.Path(MODEL)
    tokenizer, = directory.glob("tok*.bin")
    checkpoint, = set(directory.glob("*.bin")) - {tokenizer}
    expect_same_tokens(checkpoint, tokenizer, "Once upon a time", 200)
    return None


@test
def random_weights_are_those_of_their_seed():
    with tempfile.TemporaryDirectory() as directory:
        files = []
        # the name is in the file
        for number, arguments in enumerate(((), ("--seed", 1), ("--seed", 2), ("--type", "f32"))):
            os.mkdir(f"{directory}/{number}")
            files.append(pathlib.Path(directory) / str(number) / "model.gguf")
            expect_converted("--random", "32,48,2,2,1,300,64", *arguments, files[-1])
        same, seed_1, seed_2, wide = (file.read_bytes() for file in files)
        expect(same == seed_1 and len(seed_1) == len(seed_2) and seed_1 != seed_2, "seeds")
        expect(len(wide) > len(seed_1) * 3 // 2, "f32 is twice as long as f16")


@test
def what_is_no_model_is_refused():
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, tokenizer = made_up(directory, True)
        out = f"{directory}/out.gguf"
        whole = pathlib.Path(checkpoint).read_bytes()
        for words, data in (
                ("expected a header of 28 bytes, got 5", whole[:5]),
                (f"expected {len(whole)} bytes of", whole[:-4]),
                (f"got {len(whole) + 1}", whole + b"!"),
                ("expected seven numbers from 1 to 2^24", bytes(28) + whole[28:]),
                ("expected heads of an even dim", struct.pack("<i", 33) + whole[4:])):
            pathlib.Path(checkpoint).write_bytes(data)
            expect_refused(words, "--checkpoint", checkpoint, "--tokenizer", tokenizer, out)
        pathlib.Path(checkpoint).write_bytes(whole)
        pieces = pathlib.Path(tokenizer).read_bytes()
        for words, data in (
                (f"expected {VOCAB} pieces, got {VOCAB - 1}", pieces[:-10]),
                (f"piece {VOCAB - 1}: expected a length up to 1, got 2", pieces[:-1]),
                (f"expected {len(pieces)} bytes with {VOCAB} pieces", pieces + b"!")):
            pathlib.Path(tokenizer).write_bytes(data)
            expect_refused(words, "--checkpoint", checkpoint, "--tokenizer", tokenizer, out)
        expect(not os.path.exists(out), "a file of what was refused")
        for words, arguments in (
                ("expected --tokenizer with it", ("--checkpoint", checkpoint)),
                ("/nowhere: No such file", ("--checkpoint", "/nowhere", "--tokenizer", tokenizer)),
                ("expected DIM,HIDDEN,LAYERS,HEADS,KV_HEADS,[VOCAB,]SEQ, got '1,2,3'",
                 ("--random", "1,2,3")),
                ("expected vocab to be at least 259, got 258", ("--random", "8,8,1,1,1,258,8"))):
            expect_refused(words, *arguments, out)


run_tests()
