# SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
"""Builds the extension; what does not need to be computed is in pyproject.toml.

With KVSCRATCH_SHARED=1 in the environment the extension links the installed libkvscratch,
otherwise it contains the library of this source tree. A source package has the files of it
in library/, as they lie in the tree.
"""

import os
import re
import shutil
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

os.chdir(Path(__file__).resolve().parent)
PACKED = Path("library").is_dir()
TREE = Path("library" if PACKED else "../..")
LIBRARY_FILES = ("tools/lib/*.[ch]", "uapi/linux/*.h", "kvscratch_*.h", "LICENSES/*")


def version():
    file, line = (("PKG-INFO", "^Version: (.+)$") if PACKED else
                  ("../../Makefile", "^VERSION := (.+)$"))
    return re.findall(line, Path(file).read_text(encoding="utf-8"), re.MULTILINE)[0]


class OurBuild(build_ext):
    def get_source_files(self):
        # what lies outside goes into a source package by pack_library()
        return [file for file in super().get_source_files() if not file.startswith("..")]


class OurPackage(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        pack_library(Path(base_dir) / "library")


def pack_library(target):
    for pattern in LIBRARY_FILES:
        for file in TREE.glob(pattern):
            packed = target / file.relative_to(TREE)
            packed.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, packed)


# the stable ABI: one build serves Python 3.11 and every later one
extension = Extension("kvscratch._kvscratch", ["_kvscratch.c"], py_limited_api=True,
                      extra_compile_args=["-std=gnu11", "-Wextra", "-Wshadow",
                                          "-fvisibility=hidden"])
if os.environ.get("KVSCRATCH_SHARED") == "1":
    extension.libraries = ["kvscratch"]
else:
    extension.sources += sorted(glob(f"{TREE}/tools/lib/*.c"))
    extension.depends = [file for pattern in LIBRARY_FILES[:3] for file in glob(f"{TREE}/{pattern}")
                         if file.endswith(".h")]
    extension.include_dirs = [f"{TREE}/uapi", f"{TREE}/tools/lib"]
    extension.define_macros = [("KVSCRATCH_VERSION", f'"{version()}"')]

setup(version=version(), packages=["kvscratch"],
      package_data={"kvscratch": ["py.typed", "*.pyi"]}, include_package_data=False,
      ext_modules=[extension], cmdclass={"build_ext": OurBuild, "sdist": OurPackage},
      options={"bdist_wheel": {"py_limited_api": "cp311"}})
