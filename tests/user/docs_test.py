#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Whether the manual and the README say what is there, and nothing else.

usage: docs_test.py BUILD-DIRECTORY; prints TAP.

The pages are mdoc(7) and are read by their macros: .Nm, .Ft, .Fo, .Fa, .Fn, .Er, .Dv, .Ev, .Fl,
.Xr mean what they mean to a reader.
"""

import errno
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile

from tap import expect, run_tests, test

BUILD = pathlib.Path(sys.argv[1])
ROOT = pathlib.Path(__file__).resolve().parents[2]
MAN = ROOT / "tools/man"
README = ROOT / "README.md"
MARKDOWN = [README, *sorted((ROOT / "tests").glob("*.md"))]
LIBRARY = ROOT / "tools/lib/libkvscratch.h"
UAPI = ROOT / "uapi/linux/kvscratch.h"

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted(MAN.glob("*.[1347]"))}
ALIASES = {name: text for name, text in SOURCES.items() if text.startswith(".so ")}
PAGES = {name: text for name, text in SOURCES.items() if name not in ALIASES}
TOOLS = {"kvscratchctl": PAGES["kvscratchctl.1"], "kvdecode": PAGES["kvdecode.1"]}


def same(expected, got, what):
    """Both directions: nothing is missing and nothing is made up."""
    missing, invented = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    expect(not missing and not invented, f"{what}: missing {missing}, does not exist: {invented}")
    expect(len(expected) > 0, f"{what}: nothing to compare")


def section(text, title):
    """What is below .Sh TITLE"""
    match = re.search(rf"^\.Sh {title}\n(.*?)(?=^\.Sh |\Z)", text, re.M | re.S)
    return match.group(1) if match else ""


def macro(text, name):
    """The arguments of each line that calls a macro"""
    return [shlex.split(line) for line in re.findall(rf"^\.{name} (.*)$", text, re.M)]


def without_comments(text):
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.S)


def normal(code):
    """C without white space, but for what separates words"""
    return re.sub(r"\s*(\W)\s*", r"\1", " ".join(code.split()))


def declared_functions():
    """name -> prototype, of the library's header"""
    functions = {}
    for words, name, parameters in re.findall(
            r"^((?:\w+[ *]+)+)(kvscratch_\w+)\(([^)]*)\)\s*[;{]",
            without_comments(LIBRARY.read_text(encoding="utf-8")), re.M):
        words = words.replace("static inline ", "")
        functions[name] = normal(f"{words}{name}({parameters})")
    return functions


def documented_functions(text):
    """name -> prototype, of a SYNOPSIS"""
    functions = {}
    result, name, parameters = "", None, []
    for line in section(text, "SYNOPSIS").splitlines():
        called, _, rest = line.partition(" ")
        words = shlex.split(rest)
        if called == ".Ft":
            result = rest
        elif called == ".Fn":
            functions[words[0]] = normal(f"{result} {words[0]}({', '.join(words[1:])})")
        elif called == ".Fo":
            name, parameters = words[0], []
        elif called == ".Fa":
            parameters += words
        elif called == ".Fc":
            functions[name] = normal(f"{result} {name}({', '.join(parameters)})")
    return functions


def names(text):
    """The names in NAME"""
    return [words[0] for words in macro(section(text, "NAME"), "Nm")]


def library_pages():
    return {name: text for name, text in PAGES.items()
            if name.endswith(".3") and name != "libkvscratch.3"}


@test
def pages_are_clean():
    # what an alias leads to is looked for where pages are installed
    for name in PAGES:
        for command in (["mandoc", "-T", "lint", "-W", "warning"],
                        ["man", "--warnings", "-Tutf8", "-l"]):
            done = subprocess.run([*command, MAN / name], capture_output=True, check=False,
                                  env=os.environ | {"LC_ALL": "C.UTF-8"})
            complaints = done.stderr + (done.stdout if command[0] == "mandoc" else b"")
            expect(done.returncode == 0 and not complaints, complaints.decode())


@test
def every_function_has_a_page_and_its_prototype():
    documented = {}
    for name, text in library_pages().items():
        functions = documented_functions(text)
        same(names(text), functions, f"{name}: NAME and SYNOPSIS")
        documented |= functions
    declared = declared_functions()
    same(declared, documented, "functions")
    for name, prototype in declared.items():
        expect(documented[name] == prototype,
               f"expected {prototype}, got {documented[name]}")


@test
def every_name_of_a_page_leads_to_it():
    expected = {}
    for page, text in PAGES.items():
        section_number = page[-1]
        expect(f"{names(text)[0]}.{section_number}" == page, f"{page} is about {names(text)[0]}")
        expected |= {f"{name}.{section_number}": f".so man{section_number}/{page}\n"
                     for name in names(text)[1:]}
    same(expected, ALIASES, "aliases")
    for name, text in expected.items():
        expect(ALIASES[name] == text, f"{name}: expected {text!r}, got {ALIASES[name]!r}")


@test
def structs_are_those_of_the_header():
    header = normal(without_comments(LIBRARY.read_text(encoding="utf-8")))
    shown = set()
    for page, text in library_pages().items():
        for name, code in re.findall(r"^(struct \w+) (\{\n.*?^\};)$", text, re.M | re.S):
            expect(normal(f"{name} {code}") in header, f"{page}: {name} is another one")
            shown.add(name)
    same(re.findall(r"^(struct \w+) \{", LIBRARY.read_text(encoding="utf-8"), re.M), shown,
         "structs")


@test
def errnos_of_the_device():
    listed = [name for names_ in re.findall(r"^ \* - ((?!EPOLL)E[A-Z0-9, ]+):",
                                            UAPI.read_text(encoding="utf-8"), re.M)
              for name in names_.split(", ")]
    page = PAGES["kvscratch.4"]
    same(listed, re.findall(r"^\.It Bq Er (E\w+)$", section(page, "ERRORS"), re.M), "errnos")


@test
def errnos_of_the_library():
    """What the header says of a function its page says, and every errno exists."""
    pages = {name: text for text in library_pages().values() for name in names(text)}
    found = 0
    comments = re.findall(r"/\*(?:(?!\*/).)*\*/\n(?:\w[^;{]*[;{]\n)+",
                          LIBRARY.read_text(encoding="utf-8"), re.S)
    for comment in comments:
        text, _, code = comment.partition("*/")
        for function in re.findall(r"(kvscratch_\w+)\(", code):
            for name in re.findall(r"\bE[A-Z0-9]{3,}\b", text):
                found += 1
                expect(re.search(rf"^\.(It Bq )?Er {name}\b", pages[function], re.M),
                       f"the page of {function} lacks {name}")
    expect(found > 10, f"{found} errnos in the header")
    for page, text in PAGES.items():
        for words in macro(text, "Er") + macro(text, "It Bq Er"):
            name = words[0].lstrip("\\-")
            expect(hasattr(errno, name), f"{page}: no such errno: {name}")


def constants(path):
    text = without_comments(path.read_text(encoding="utf-8"))
    return set(re.findall(r"\bKVSCRATCH_[A-Z0-9_]+\b", text))


@test
def constants_are_documented():
    # numbers of the encoding, and what only inline functions use
    internal = {"KVSCRATCH_IOC_MAGIC", "KVSCRATCH_WORD_LEN", "KVSCRATCH_WORD_GENERATION"}
    # the ones whose names follow from the others
    implied = {name for name in constants(UAPI) if name.startswith("KVSCRATCH_DTYPE_")}
    every = constants(UAPI) | constants(LIBRARY)

    def used(text):
        titles = re.compile(r"^\.Dt .*", re.M)
        return set(re.findall(r"\bKVSCRATCH_[A-Z0-9_]+\b", titles.sub("", text)))

    device = used(PAGES["kvscratch.4"])
    same(constants(UAPI) - internal - implied, device - implied, "kvscratch(4)")
    library = set().union(*map(used, library_pages().values())) - {"KVSCRATCH_BACKEND"}
    lacking = constants(LIBRARY) - constants(UAPI) - internal - library
    expect(not lacking, f"section 3 lacks {sorted(lacking)}")
    expect(library <= every, f"section 3 invents {sorted(library - every)}")
    told = used(PAGES["kvscratch.7"])
    expect(told <= every, f"kvscratch(7) invents {sorted(told - every)}")
    mxint8 = {name for name in implied if "DTYPE" in name}
    same(mxint8, used(PAGES["kvscratch_new.3"]) & mxint8, "dtypes in kvscratch_new(3)")


@test
def fields_of_the_device_are_documented():
    page = PAGES["kvscratch.4"] + PAGES["kvscratch_info.3"]
    structs = re.findall(r"^struct (kvscratch_\w+) \{\n(.*?)^\};",
                         without_comments(UAPI.read_text(encoding="utf-8")), re.M | re.S)
    expect(len(structs) == 12, f"{len(structs)} structs")
    for name, body in structs:
        for field in re.findall(r"(\w+)(?:\[\w+\])?;", body):
            expect(field.startswith("reserved") or re.search(rf"\bV?a? ?{field}\b", page),
                   f"no page tells about {name}.{field}")


@test
def environment():
    read = set()
    for path in (ROOT / "tools").rglob("*.c"):
        # what is unset was looked at
        read |= set(re.findall(r'(?:get|unset)env\("(\w+)"\)', path.read_text(encoding="utf-8")))
    told = set()
    for text in PAGES.values():
        told |= {words[1] for words in macro(section(text, "ENVIRONMENT"), "It")}
    same(read, told, "environment variables")


@test
def promises_are_told_word_by_word():
    code = (ROOT / "tools/lib/promises.c").read_text(encoding="utf-8")
    page = " ".join(section(PAGES["kvscratch_promises.3"], "DESCRIPTION").split())
    promises = re.findall(r'^#define (\w+)\s+"([\w-]+)", "([^"]+)"$', code, re.M)
    same([name for _, name, _ in promises], re.findall(r"\.It Li ([\w-]+) ", page), "promises")
    for symbol, name, text in promises:
        reason = re.search(rf'NOT_KEPT\({symbol}, "([^"]+)"\)', code)
        said = f".It Li {name} {text}"
        said += f". Not with a memfd: {reason.group(1)}." if reason else " "
        expect(said in page, f"expected: {said}")
        expect(re.search(rf"\bKEPT\({symbol}\)", code), f"{symbol} is not one of the module's")


@test
def references_lead_somewhere():
    pages = {(name[:-2], name[-1]) for name in SOURCES}
    for name, text in PAGES.items():
        references = [re.sub(r"^.*?\bXr ", "", line).split()[:2] for line in
                      re.findall(r"^\..*\bXr .*$", text, re.M)]
        for title, number in references:
            expect("kvscratch" not in title and title != "kvdecode" or (title, number) in pages,
                   f"{name} refers to {title}({number})")
    for name in PAGES:
        title, _, number = name.rpartition(".")
        expect(any(f"Xr {title} {number}" in other for other in PAGES.values()),
               f"a page to which none refers: {name}")


def compile_and_run(code):
    """What became of a program; None of one that has to have the device"""
    with tempfile.TemporaryDirectory() as directory:
        source = pathlib.Path(directory) / "example.c"
        source.write_text(code, encoding="utf-8")
        program = source.with_suffix("")
        subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/uapi",
                        f"-I{ROOT}/tools/lib", '-DKVSCRATCH_VERSION="0"', "-o", program,
                        source, *sorted((ROOT / "tools/lib").glob("*.c")), "-lm"], check=True)
        if "libkvscratch.h" not in code:
            return None
        return subprocess.run([program], capture_output=True, check=False, text=True,
                              env=os.environ | {"KVSCRATCH_BACKEND": "memfd"})


@test
def examples_in_the_pages_compile_and_run():
    found = 0
    for name, text in PAGES.items():
        for code in re.findall(r"^\.Bd -literal\n(#include.*?)^\.Ed$", text, re.M | re.S):
            done = compile_and_run(code.replace("\\e", "\\").replace("\\-", "-"))
            if done:
                expect(done.returncode == 0 and done.stdout, f"{name}: {done}")
            found += 1
    expect(found >= 2, f"{found} programs")


# The README

def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"),
                      re.M | re.S)


@test
def the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    expect(len(lines) <= 250, f"{len(lines)} lines")
    for number, line in enumerate(lines, 1):
        expect(len(line) <= 120, f"line {number} has {len(line)} columns")


@test
def links_lead_somewhere():
    def anchors(path):
        titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    found = 0
    for path in MARKDOWN:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if ":" in link:
                continue
            found += 1
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            expect(target.is_file(), f"{path.name} leads to {link}")
            expect(not anchor or anchor in anchors(target), f"{path.name} leads to {link}")
    expect(found > 0, "no links")


@test
def pages_that_the_readme_names_are_there():
    for path in MARKDOWN:
        for title, number in re.findall(r"\b(\w*kv\w+)\((\d)\)", path.read_text(encoding="utf-8")):
            expect(f"{title}.{number}" in SOURCES, f"{path.name} names {title}({number})")


@test
def mutants_are_counted():
    done = subprocess.run([ROOT / "tests/mutants", "--count"], capture_output=True, check=True,
                          text=True)
    told = re.findall(r"\| (\d+) ways;", (ROOT / "tests/TESTING.md").read_text(encoding="utf-8"))
    expect(told == done.stdout.split(), f"expected {done.stdout.strip()}, TESTING.md has {told}")


@test
def programs_in_c_in_the_readme():
    programs = code_blocks("c")
    expect(len(programs) == 1, f"{len(programs)} programs")
    for code in programs:
        done = compile_and_run(code)
        expect(done.returncode == 0 and not done.stderr, f"{done}")


@test
def programs_in_python_in_the_readme():
    if not (BUILD / "python").is_dir():
        return "without the Python package"
    programs = code_blocks("python")
    expect(len(programs) == 1, f"{len(programs)} programs")
    for code in programs:
        done = subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True, check=False,
                              text=True, env=os.environ | {"KVSCRATCH_BACKEND": "memfd",
                                                           "PYTHONPATH": str(BUILD / "python")})
        expect(done.returncode == 0 and not done.stderr, f"{done}")
        # what it prints stands behind print()
        said = re.findall(r"^ *print\(.*\) +# (.*)$", code, re.M)
        expect(done.stdout.splitlines() == said, f"expected {said}, got {done.stdout}")
    return None


@test
def commands_in_the_readme():
    """Those that say so are run, over memfds, in one shell after the other."""
    scripts = re.findall(r"^<!-- tests/user/docs_test\.py runs this[^\n]*-->\n```sh\n(.*?)^```$",
                         README.read_text(encoding="utf-8"), re.M | re.S)
    expect(len(scripts) == 3, f"{len(scripts)} scripts")
    with tempfile.TemporaryDirectory() as directory:
        for name in "k0", "v0":
            write_npy(pathlib.Path(directory) / f"{name}.npy", 5, 64)
        environment = os.environ | {
            "KVSCRATCH_BACKEND": "memfd", "XDG_RUNTIME_DIR": directory,
            "PATH": f"{BUILD.resolve()}:{os.environ['PATH']}"}
        for script in scripts:
            done = subprocess.run(["sh", "-exc", script], cwd=directory, env=environment,
                                  stdin=subprocess.DEVNULL, capture_output=True, check=False,
                                  text=True, timeout=900)
            for holder in re.findall(r"^kvscratchctl (?:hold|fork \S+) (\w+)", script, re.M):
                subprocess.run([BUILD / "kvscratchctl", "drop", holder], env=environment,
                               capture_output=True, check=False)
            expect(done.returncode == 0, f"{done.stdout}{done.stderr}")
            for said in re.findall(r" # (Scratchpad\([^)]*\))", script):
                expect(said in done.stdout, f"expected {said}, got {done.stdout}")


def write_npy(path, rows, dim):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    header = header.ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode()
                     + bytes(4 * rows * dim))


# The tools

def help_of(tool, *arguments):
    done = subprocess.run([BUILD / tool, *arguments, "--help"], capture_output=True, check=True,
                          text=True)
    return done.stdout


def options_in_help(text):
    """("-o", "--output", "FILE") and the like, of a help text"""
    found = set()
    for short, option, value in re.findall(
            r"^  +(?:(-\w), )?(--[\w-]+)(?: ([A-Z]\S*|[a-z0-9]+(?:\|[a-z0-9]+)+))?(?:  |$)",
            text, re.M):
        found.add((short, option, value))
    return found


def options_in_page(text):
    """The same of a page: .It Fl o , Fl -output Ar FILE"""
    found = set()
    for line in re.findall(r"^\.It (Fl .*)$", text, re.M):
        words = [word for word in line.replace("Cm", "Ar").split() if word not in ("Fl", ",", "Ns")]
        value = ""
        if "Ar" in words:
            value = "".join(words[words.index("Ar") + 1:]).replace("Ar", "")
            words = words[:words.index("Ar")]
        short = "-" + words.pop(0) if len(words[0]) == 1 else ""
        found.add((short, "-" + words[0], value))
    return found


def verbs_in_help():
    return re.findall(r"^  ([a-z]+)  +\w", help_of("kvscratchctl"), re.M)


def verbs_in_page():
    """verb -> what is below .Ss VERB of VERBS"""
    parts = re.split(r"^\.Ss (\w+)\n", section(TOOLS["kvscratchctl"], "VERBS"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


@test
def verbs_of_kvscratchctl():
    same(verbs_in_help(), verbs_in_page(), "verbs")


@test
def options_before_a_verb():
    same(options_in_help(help_of("kvscratchctl")) | {("", "--help", "")},
         options_in_page(section(TOOLS["kvscratchctl"], "DESCRIPTION")), "options before a verb")


@test
def options_of_each_verb():
    for verb, text in verbs_in_page().items():
        told = options_in_page(text)
        help_text = help_of("kvscratchctl", verb)
        there = options_in_help(help_text)
        if there or told:
            same(there, told, verb)
        usage = help_text[:help_text.index("\n", help_text.rindex("kvscratchctl"))]
        for words, macros in (("--fd N", "Fl -fd Ar N"), ("-n NAME", "Fl n Ar NAME")):
            expect((words in usage) == (macros in text), f"{verb}: {words} in one of the two only")


@test
def options_of_kvdecode():
    same(options_in_help(help_of("kvdecode")), options_in_page(section(TOOLS["kvdecode"],
                                                                        "DESCRIPTION")),
         "options")


run_tests()
