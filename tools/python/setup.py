# SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
"""Builds the extension; what does not need to be computed is in pyproject.toml.

With KVSCRATCH_SHARED=1 in the environment the extension links the installed libkvscratch,
otherwise it contains the library of this source tree.
"""

import os
import re
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).resolve().parent
MAKEFILE = (HERE / "../../Makefile").read_text(encoding="ascii")
VERSION = re.findall("^VERSION := (.+)$", MAKEFILE, re.MULTILINE)[0]

os.chdir(HERE)
# the stable ABI: one build serves Python 3.11 and every later one
extension = Extension("kvscratch._kvscratch", ["_kvscratch.c"], py_limited_api=True,
                      extra_compile_args=["-std=gnu11", "-Wextra", "-Wshadow",
                                          "-fvisibility=hidden"])
if os.environ.get("KVSCRATCH_SHARED") == "1":
    extension.libraries = ["kvscratch"]
else:
    extension.sources += sorted(glob("../lib/*.c"))
    extension.depends = [*glob("../lib/*.h"), *glob("../../uapi/linux/*.h"), *glob("../../*.h")]
    extension.include_dirs = ["../../uapi", "../lib"]
    extension.define_macros = [("KVSCRATCH_VERSION", f'"{VERSION}"')]

setup(version=VERSION, packages=["kvscratch"], package_data={"kvscratch": ["py.typed", "*.pyi"]},
      include_package_data=False, ext_modules=[extension],
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
