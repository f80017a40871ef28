# SPDX-License-Identifier: GPL-2.0-only
"""Copies of the module that are broken on purpose, built and run in a guest."""

import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
GUEST_DIED = 125


class Outdated(Exception):
    """What is to be broken is not in kvscratch.c, or not just once."""


def edited(text, edits):
    """The text with each old text of edits, which has to be there once, made the new one"""
    for old, new in edits:
        if text.count(old) != 1:
            raise Outdated(f"this occurs {text.count(old)} times in kvscratch.c, update it: {old!r}")
        text = text.replace(old, new)
    return text


def make_tree(tree, edits):
    """Copy what a guest needs below tree; each old text of edits becomes the new one."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for part in ("Kbuild", "kvscratch.c", "kvscratch.h", "kvscratch_layout.h", "kvscratch_scale.h", "uapi",
                 "tests"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tree / part)
    source = tree / "kvscratch.c"
    source.write_text(edited(source.read_text(), edits))


def run(tree, command, env=None):
    """Run a command of that tree; its output is kept there."""
    result = subprocess.run(command, cwd=tree, env=env, stdin=subprocess.DEVNULL, text=True,
                            errors="replace", capture_output=True)
    (tree / "output").write_text(result.stdout + result.stderr)
    return result


def run_guest(tree, kernel, *arguments, timeout=240):
    """What tests/qemu/run of that tree makes of the arguments"""
    return run(tree, ["tests/qemu/run", "--kernel", kernel, "--timeout", str(timeout), *arguments])


def build_programs(*targets):
    subprocess.run(["make", "--no-print-directory", "-C", ROOT, *targets], check=True,
                   stdout=subprocess.DEVNULL)
