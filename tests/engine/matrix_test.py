#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""All that an engine combines: flash attention, types of the cache, sequences, context shift.

usage: matrix_test.py ENGINE-DIRECTORY BUILD-DIRECTORY; prints TAP. Pads are in memfds.
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "user"))

from tap import expect, run_tests, test  # noqa: E402 pylint: disable=wrong-import-position

ENGINE, BUILD = map(os.path.abspath, sys.argv[1:3])
# Heads of 64 elements: with fewer llama.cpp 0.4.0 dies of a shift of quantized keys, on the heap
SHAPE = "256,256,3,4,2,512,1024"
PROMPT = [300 + i * i % 200 for i in range(400)]
# a run that hangs is a failure
SECONDS = 600
CELLS = [{"flashAttention": attention, "type": kind, "sequences": sequences, "shift": shift,
          "context": 512, "tokens": 250 if shift else 40}
         for attention, kind, sequences, shift in itertools.product(
             (True, "auto", False), ("F16", "Q8_0", "F32"), (1, 2), (False, True))]


def in_one_process(model, pads):
    """The lines of each cell, and what was said to stderr"""
    runs = [{"model": model, "pads": pads, "prompt": PROMPT, **cell}
            for cell in CELLS]
    environment = dict(os.environ, KVSCRATCH_BACKEND="memfd", KVSCRATCH_GGML_STATS="1",
                       LD_LIBRARY_PATH=BUILD)
    if pads:
        environment["GGML_BACKEND_PATH"] = f"{BUILD}/ggml-2/libggml-kvscratch.so"
    done = subprocess.run([f"{ENGINE}/bin/node", HERE / "generate.mjs", ENGINE, json.dumps(runs)],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                          env=environment, timeout=SECONDS)
    cells = []
    for line in done.stdout.splitlines():
        if line.startswith('{"run":'):
            cells.append([])
        else:
            cells[-1].append(line)
    expect(done.returncode == 0 and len(cells) == len(CELLS),
           f"{'pads' if pads else 'heap'}: exit {done.returncode} in {CELLS[len(cells) - 1]}: "
           f"{done.stderr[-2000:]}")
    return cells, done.stderr


def heaps(cell, heap):
    """The lines that are right for a cell. What "auto" is depends on what a device can do
    itself, and the one of the plug-in leaves attention to the processor.
    """
    choices = (True, False) if cell["flashAttention"] == "auto" else (cell["flashAttention"],)
    return [heap[CELLS.index({**cell, "flashAttention": choice})] for choice in choices]


@test
def what_is_generated_is_the_heaps_in_each_cell():
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/model.gguf"
        subprocess.run([HERE / "gguf.py", "--random", SHAPE, model], check=True,
                       stdout=subprocess.DEVNULL)
        heap, _ = in_one_process(model, False)
        pads, errors = in_one_process(model, True)
    private = kept = 0
    for cell, got in zip(CELLS, pads):
        wanted = heaps(cell, heap)
        expect(got in wanted, f"{cell}: expected {wanted[0]}, got {got}")
        if cell["type"] == "Q8_0" and not cell["flashAttention"]:
            expect("refused" in got[-1], f"{cell}: expected no context, got {got[-1]}")
            continue
        tokens = [json.loads(line)["token"] for line in got[:-1]]
        expect(len(tokens) == cell["tokens"] * cell["sequences"] and len(set(tokens)) > 20,
               f"{cell}: expected {cell['tokens']} tokens that differ, got {tokens}")
        if not cell["flashAttention"] or cell["shift"]:
            private += 1
        else:
            kept += cell["tokens"]
    warnings = errors.count("in private memory from now on")
    expect(warnings == private, f"expected {private} warnings, one for each cell whose rows do "
           f"not stay as they are, got {warnings}: {errors}")
    commits = re.search(r"^kvscratch-ggml: commits (\d+) ", errors, re.MULTILINE)
    expect(commits and int(commits[1]) >= kept,
           f"expected {kept} commits or more, got {commits and commits[0]}")


run_tests()
