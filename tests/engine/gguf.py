#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Make a GGUF file, which llama.cpp reads, of a checkpoint of llama2.c or of random weights.

A checkpoint is of the first, "legacy" format, which llama2.c's export.py writes as version
0 and its run.c maps: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, seq_len; vocab_size is negative if there is a classifier of its own), then
float32: the tensors in the order of OF_THE_CHECKPOINT below. Its tokenizer, by
tokenizer.py: the length of the longest piece, then for each token a float32, its score, an
int32, its length, and its bytes.

GGUF is described in docs/gguf.md of https://github.com/ggml-org/ggml; which keys and
tensors the architecture "llama" has, in gguf-py/gguf/constants.py of llama.cpp. Both
formats rotate neighbours, so that weights go over as they are. All is little-endian.

A tensor is written a piece at a time: memory does not grow with the model.
"""

import argparse
import math
import os
import pathlib
import struct
import sys
from typing import NamedTuple

import numpy as np

# GGUF's numbers of types: of a value of the metadata, of a tensor, of a token
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
TENSOR_F32, TENSOR_F16 = 0, 1
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
ALIGNMENT = 32
UNK, BOS, EOS, FIRST_BYTE, FIRST_PIECE = 0, 1, 2, 3, 259
# elements that are in memory at once
PIECE = 1 << 20


class Wrong(Exception):
    """What was given is not what it should be."""


class Shape(NamedTuple):
    """The header of a checkpoint, but vocab is positive"""
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq: int

    @property
    def head(self):
        return self.dim // self.heads

    @property
    def kv_dim(self):
        return self.head * self.kv_heads

    def check(self, what):
        if min(self) < 1 or max(self) > 1 << 24:
            raise Wrong(f"{what}: expected seven numbers from 1 to 2^24, got {tuple(self)}")
        if self.dim % (2 * self.heads) or self.heads % self.kv_heads:
            raise Wrong(f"{what}: expected heads of an even dim, and a whole number of them for "
                        f"each of the kv_heads, got dim {self.dim}, heads {self.heads}, "
                        f"kv_heads {self.kv_heads}")


def of_the_model(shape):
    """What a model has once: name in GGUF, rows, columns; no rows: a vector."""
    return (("token_embd", shape.vocab, shape.dim), ("output_norm", 0, shape.dim),
            ("output", shape.vocab, shape.dim))


def of_a_layer(shape):
    """What each layer has"""
    dim, kv_dim, hidden = shape.dim, shape.kv_dim, shape.hidden
    return (("attn_norm", 0, dim), ("attn_q", dim, dim), ("attn_k", kv_dim, dim),
            ("attn_v", kv_dim, dim), ("attn_output", dim, dim), ("ffn_norm", 0, dim),
            ("ffn_gate", hidden, dim), ("ffn_down", dim, hidden), ("ffn_up", hidden, dim))


# each with all layers at once; then the tables of the rotation, which nobody needs, and
# the classifier, if it is not the embedding
OF_THE_CHECKPOINT = ("token_embd", "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
                     "ffn_norm", "ffn_gate", "ffn_down", "ffn_up", "output_norm")


def tensors(shape):
    """All tensors of a GGUF file, in their order"""
    yield from of_the_model(shape)
    for layer in range(shape.layers):
        for name, rows, columns in of_a_layer(shape):
            yield f"blk.{layer}.{name}", rows, columns


class Checkpoint:
    """Weights of a file"""

    def __init__(self, path):
        header = struct.Struct("<7i")
        with open(path, "rb") as file:
            first = file.read(header.size)
        if len(first) < header.size:
            raise Wrong(f"{path}: expected a header of {header.size} bytes, got {len(first)}")
        numbers = header.unpack(first)
        self.shape = Shape(*numbers)._replace(vocab=abs(numbers[5]))
        self.shape.check(path)
        self.at = {}
        shape, end = self.shape, 0
        in_layer = {name: max(rows, 1) * columns for name, rows, columns in of_a_layer(shape)}
        outside = {name: max(rows, 1) * columns for name, rows, columns in of_the_model(shape)}
        for name in OF_THE_CHECKPOINT:
            if name in outside:
                self.at[name] = end
                end += outside[name]
                continue
            for layer in range(shape.layers):
                self.at[f"blk.{layer}.{name}"] = end
                end += in_layer[name]
        end += shape.seq * shape.head
        if numbers[5] > 0:
            self.at["output"] = self.at["token_embd"]
        else:
            self.at["output"] = end
            end += shape.vocab * shape.dim
        expected, got = header.size + 4 * end, os.path.getsize(path)
        if got != expected:
            raise Wrong(f"{path}: expected {expected} bytes of {tuple(numbers)}, got {got}")
        self.weights = np.memmap(path, "<f4", "r", offset=header.size)

    def pieces(self, name, rows, columns):
        begin = self.at[name]
        end = begin + max(rows, 1) * columns
        for at in range(begin, end, PIECE):
            yield self.weights[at:min(at + PIECE, end)]


class Random:
    """Weights that are made up: each token depends on all that came before, and what is
    made of it has no end."""

    def __init__(self, shape, seed):
        self.shape = shape
        self.shape.check("--random")
        self.seed = seed

    def pieces(self, name, rows, columns):
        if not rows:
            yield np.ones(columns, np.float32)
            return
        generator = np.random.default_rng([self.seed, *name.encode()])
        # what goes through keeps its size, and one logit stands out
        scale = {"token_embd": math.sqrt(columns), "output": 3}.get(name, 1) / math.sqrt(columns)
        step = max(PIECE // columns, 1)
        for row in range(0, rows, step):
            piece = generator.standard_normal((min(step, rows - row), columns), np.float32)
            piece *= scale
            if name == "output" and row == 0:
                # control tokens are never the likeliest: the best of many logits is positive
                piece[:FIRST_BYTE] = 0
            yield piece


def read_tokenizer(path, vocab):
    """Bytes and scores of the pieces, as SentencePiece writes them"""
    data = pathlib.Path(path).read_bytes()
    pieces, scores, at = [], [], 4
    for token in range(vocab):
        if at + 8 > len(data):
            raise Wrong(f"{path}: expected {vocab} pieces, got {token}")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise Wrong(f"{path}: piece {token}: expected a length up to {len(data) - at}, "
                        f"got {length}")
        # llama2.c has blanks and "\n<s>\n"
        pieces.append(data[at:at + length].replace(b" ", "\u2581".encode()))
        scores.append(score)
        at += length
    if at != len(data):
        raise Wrong(f"{path}: expected {at} bytes with {vocab} pieces, got {len(data)}")
    return pieces, scores


def made_up_tokenizer(vocab):
    """Bytes, a blank, letters, then pairs of letters"""
    if vocab < FIRST_PIECE:
        raise Wrong(f"--random: expected vocab to be at least {FIRST_PIECE}, got {vocab}")
    letters = "etaoinshrdlucmwfgypbvkjxqzETAOINSHRDLUCMWFGYPBVKJXQZ"
    wanted = vocab - FIRST_PIECE
    pieces = ["\u2581", *letters]
    for before in pieces[:]:
        pieces += [before + after for after in letters]
    # what is left are names of nothing, which no text has
    pieces += [f"\u2581[{number}]" for number in range(wanted - len(pieces))]
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)),
              *(piece.encode() for piece in pieces[:wanted])]
    return pieces, [0.0] * FIRST_PIECE + [-float(rank) for rank in range(wanted)]


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, what):
    return {UINT32: lambda: struct.pack("<I", what), INT32: lambda: struct.pack("<i", what),
            FLOAT32: lambda: struct.pack("<f", what), BOOL: lambda: struct.pack("<?", what),
            STRING: lambda: string(what)}[kind]()


def pair(key, kind, what):
    if isinstance(what, list):
        return string(key) + struct.pack("<IIQ", ARRAY, kind, len(what)) + b"".join(
            value(kind, element) for element in what)
    return string(key) + struct.pack("<I", kind) + value(kind, what)


def metadata(shape, name, pieces, scores):
    """The pairs, each as it is in the file"""
    pieces = [b"<unk>", b"<s>", b"</s>", *pieces[FIRST_BYTE:]]
    types = [UNKNOWN, CONTROL, CONTROL, *(
        BYTE if len(piece) == 6 and piece.startswith(b"<0x") else NORMAL
        for piece in pieces[FIRST_BYTE:])]
    return [
        pair("general.architecture", STRING, "llama"),
        pair("general.name", STRING, name),
        pair("llama.vocab_size", UINT32, shape.vocab),
        pair("llama.context_length", UINT32, shape.seq),
        pair("llama.embedding_length", UINT32, shape.dim),
        pair("llama.feed_forward_length", UINT32, shape.hidden),
        pair("llama.block_count", UINT32, shape.layers),
        pair("llama.attention.head_count", UINT32, shape.heads),
        pair("llama.attention.head_count_kv", UINT32, shape.kv_heads),
        pair("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        pair("llama.rope.dimension_count", UINT32, shape.head),
        pair("llama.rope.freq_base", FLOAT32, 10000.0),
        pair("tokenizer.ggml.model", STRING, "llama"),
        pair("tokenizer.ggml.tokens", STRING, pieces),
        pair("tokenizer.ggml.scores", FLOAT32, scores),
        pair("tokenizer.ggml.token_type", INT32, types),
        pair("tokenizer.ggml.unknown_token_id", UINT32, UNK),
        pair("tokenizer.ggml.bos_token_id", UINT32, BOS),
        pair("tokenizer.ggml.eos_token_id", UINT32, EOS),
        pair("tokenizer.ggml.add_bos_token", BOOL, True),
        pair("tokenizer.ggml.add_eos_token", BOOL, False)]


def write(path, weights, pieces, scores, half):
    """half: matrices are f16; vectors never are."""
    shape = weights.shape
    pairs = metadata(shape, pathlib.Path(path).stem, pieces, scores)
    infos, end = b"", 0
    for name, rows, columns in tensors(shape):
        sizes = [columns, rows] if rows else [columns]
        infos += string(f"{name}.weight") + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        infos += struct.pack("<IQ", TENSOR_F16 if rows and half else TENSOR_F32, end)
        end += max(rows, 1) * columns * (2 if rows and half else 4)
        end += -end % ALIGNMENT
    with open(path, "wb") as file:
        count = sum(1 for _ in tensors(shape))
        file.write(b"GGUF" + struct.pack("<IQQ", 3, count, len(pairs)) + b"".join(pairs) + infos)
        for name, rows, columns in tensors(shape):
            file.write(bytes(-file.tell() % ALIGNMENT))
            for piece in weights.pieces(name, rows, columns):
                file.write(piece.astype("<f2" if rows and half else "<f4").tobytes())
        file.write(bytes(-file.tell() % ALIGNMENT))
        return file.tell()


def shape_of(text):
    """What --random was given"""
    try:
        numbers = [int(word) for word in text.split(",")]
        if len(numbers) == 6:
            numbers.insert(5, 512)
        return Shape(*numbers)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"expected DIM,HIDDEN,LAYERS,HEADS,KV_HEADS,[VOCAB,]SEQ, got {text!r}") from error


def main():
    parser = argparse.ArgumentParser(
        description="Make a GGUF file of a checkpoint of llama2.c or of random weights.")
    parser.add_argument("out", metavar="OUT.gguf")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--checkpoint", metavar="FILE", help="of llama2.c, with its --tokenizer")
    kind.add_argument("--random", metavar="SHAPE", type=shape_of,
                      help="DIM,HIDDEN,LAYERS,HEADS,KV_HEADS,[VOCAB,]SEQ; 512 tokens if no VOCAB")
    parser.add_argument("--tokenizer", metavar="FILE", help="of llama2.c; else one is made up")
    parser.add_argument("--type", choices=("f16", "f32"),
                        help="of the matrices; f32 is the default of a checkpoint, f16 of --random")
    parser.add_argument("--seed", type=int, default=1, help="of --random; default 1")
    options = parser.parse_args()
    if options.checkpoint and not options.tokenizer:
        parser.error("--checkpoint: expected --tokenizer with it")
    try:
        weights = (Checkpoint(options.checkpoint) if options.checkpoint else
                   Random(options.random, options.seed))
        pieces, scores = (read_tokenizer(options.tokenizer, weights.shape.vocab)
                          if options.tokenizer else made_up_tokenizer(weights.shape.vocab))
        half = (options.type or ("f16" if options.random else "f32")) == "f16"
        size = write(options.out, weights, pieces, scores, half)
    except OSError as error:
        sys.exit(f"gguf.py: {error.filename}: {error.strerror}")
    except Wrong as error:
        sys.exit(f"gguf.py: {error}")
    shape = weights.shape
    print(f"{options.out}: {size} bytes; a token has {2 * shape.layers * shape.kv_dim} elements "
          f"of keys and values")


if __name__ == "__main__":
    main()
