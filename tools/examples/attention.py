#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
"""Plot how much kvdecode's last token attends to each token before it.

Connects to a decoder that serves its cache, and computes
softmax(q . k / sqrt(head size)) of every layer and head over the live views, without a
copy of the cache:

  kvdecode --queries --serve decode.sock --wait-reader &
  attention.py decode.sock attention.svg --heads 8 --kv-heads 4 --wait
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import secrets
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

import kvscratch

if TYPE_CHECKING:
    from numpy.typing import NDArray


SUFFIXES = (".svg", ".png", ".pdf")

# How often a decoder that appends nothing is looked at
LOOK_SECONDS = 0.1


def values(view: kvscratch.View, plane: kvscratch.Plane) -> NDArray[Any]:
    """The rows of a view as floats; only those of mxint8 are a copy."""
    rows: NDArray[Any] = np.asarray(view)
    if plane.dtype != "mxint8":
        return rows
    return kvscratch.dequantize(rows, np.asarray(view.scales()))


def planes_of(pad: kvscratch.Scratchpad) -> dict[str, kvscratch.Plane]:
    return {plane.label: plane for plane in pad.planes}


def attention_of_head_groups(query: NDArray[Any], keys: NDArray[Any]) -> NDArray[Any]:
    """query [kv_heads, heads that share one, head size], keys [rows, kv_heads, head size]"""
    scores = np.einsum("hgd,thd->hgt", query, keys) / np.sqrt(query.shape[-1])
    weights: NDArray[Any] = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def last_attention(pad: kvscratch.Scratchpad, heads: int, kv_heads: int) -> NDArray[Any] | None:
    """[layers, heads, rows]; None when a truncate came in between, or there is no token."""
    planes = planes_of(pad)
    tokens = pad.view("tokens")
    rows = len(tokens)
    if not rows:
        return None
    views = [tokens]
    layers: list[NDArray[Any]] = []
    while f"q{len(layers)}" in planes:
        q, k = (f"{name}{len(layers)}" for name in "qk")
        q_view, k_view = pad.view(q), pad.view(k)
        # rows that a truncate took before the view was made
        if min(len(q_view), len(k_view)) < rows:
            return None
        query = values(q_view, planes[q])[rows - 1].reshape(kv_heads, heads // kv_heads, -1)
        keys = values(k_view, planes[k])[:rows].reshape(rows, kv_heads, -1)
        layers.append(attention_of_head_groups(query, keys).reshape(heads, rows))
        views += [q_view, k_view]
    # until here it was arithmetic, which no bytes can harm
    if min(view.valid_rows() for view in views) < rows:
        return None
    return np.array(layers)


def check(pad: kvscratch.Scratchpad, heads: int, kv_heads: int) -> None:
    planes = planes_of(pad)
    for name in ("tokens", "q0", "k0"):
        if name not in planes:
            sys.exit(f"attention: expected a plane {name}, got {' '.join(planes)}: "
                     "is it kvdecode --queries?")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        sys.exit(f"attention: expected heads that are a multiple of kv-heads, got {heads} and "
                 f"{kv_heads}")
    if planes["q0"].dim % heads or planes["k0"].dim * heads != planes["q0"].dim * kv_heads:
        sys.exit(f"attention: expected heads that fit rows of {planes['q0'].dim} and "
                 f"{planes['k0'].dim} elements, got {heads} and {kv_heads}")


def has_hung_up(decoder: socket.socket) -> bool:
    return bool(select.select([decoder], [], [], 0)[0])


def wait_for_attention(decoder: socket.socket, pad: kvscratch.Scratchpad,
                       heads: int, kv_heads: int) -> NDArray[Any]:
    """last_attention() as soon as there is any, if it can still come"""
    while True:
        # in this order: what came before the decoder hung up is seen
        ended = has_hung_up(decoder)
        state = pad.state
        attention = last_attention(pad, heads, kv_heads)
        if attention is not None:
            return attention
        if ended:
            sys.exit(f"attention: expected a token, got {len(pad)} when the decoder ended")
        pad.wait(state, timeout=LOOK_SECONDS)


def check_output(path: str) -> str:
    """The format that the name asks for; what is no regular file is not touched."""
    suffix = pathlib.PurePath(path).suffix
    if suffix not in SUFFIXES:
        sys.exit(f"attention: {path}: expected a name that ends in {', '.join(SUFFIXES[:-1])} or "
                 f"{SUFFIXES[-1]}")
    if os.path.lexists(path) and not os.path.isfile(path):
        sys.exit(f"attention: {path}: expected a regular file or none, got something else")
    return suffix[1:]


def replace(path: str, content: bytes) -> None:
    """A new file takes the place of the old one as a whole, with its mode, or not at all."""
    target = os.path.realpath(path)
    new = os.path.join(os.path.dirname(target), f".attention-{secrets.token_hex(8)}")
    try:
        with open(new, "xb") as file:
            if os.path.exists(target):
                os.fchmod(file.fileno(), os.stat(target).st_mode & 0o777)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        raise


def plot(attention: NDArray[Any], kind: str) -> bytes:
    import matplotlib  # type: ignore[import]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers, heads, rows = attention.shape
    figure, axes = pyplot.subplots(layers, squeeze=False, sharex=True, layout="constrained",
                                   figsize=(4 + rows / 16, 1 + layers * (0.6 + heads / 8)))
    for layer, axis in enumerate(axes[:, 0]):
        image = axis.imshow(attention[layer], aspect="auto", vmin=0, vmax=1, cmap="magma_r",
                            interpolation="nearest")
        axis.set_ylabel(f"layer {layer}\nhead")
    axes[-1, 0].set_xlabel("position")
    figure.suptitle(f"attention of the token at position {rows - 1}")
    figure.colorbar(image, ax=axes)
    content = io.BytesIO()
    figure.savefig(content, format=kind)
    return content.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("socket", help="what kvdecode --queries --serve listens on")
    parser.add_argument("output", help="an .svg, .png or .pdf file")
    parser.add_argument("--heads", type=int, required=True, help="query heads of the model")
    parser.add_argument("--kv-heads", type=int, help="its key and value heads (--heads)")
    parser.add_argument("--wait", action="store_true", help="wait until decoding is over")
    arguments = parser.parse_args()
    kv_heads = arguments.heads if arguments.kv_heads is None else arguments.kv_heads

    kind = check_output(arguments.output)
    # so that what is half written is removed
    for number in signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))

    with socket.socket(socket.AF_UNIX) as decoder:
        try:
            decoder.connect(arguments.socket)
            pads = kvscratch.receive_handles(decoder)
        except OSError as error:
            sys.exit(f"attention: {arguments.socket}: {error.strerror or error}")
        if len(pads) != 1:
            sys.exit(f"attention: {arguments.socket}: expected one pad, got {len(pads)}")
        pad, = pads.values()
        check(pad, arguments.heads, kv_heads)
        # the decoder hangs up when it is done; its pad lives on with our handle
        while arguments.wait and decoder.recv(1):
            pass
        attention = wait_for_attention(decoder, pad, arguments.heads, kv_heads)
    try:
        replace(arguments.output, plot(attention, kind))
    except OSError as error:
        sys.exit(f"attention: {arguments.output}: {error.strerror or error}")
    print(f"{arguments.output}: position {attention.shape[2] - 1}, {len(attention)} layers, "
          f"{arguments.heads} heads")


if __name__ == "__main__":
    main()
