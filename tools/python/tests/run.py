#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Run the tests beside this file and print TAP.

usage: run.py kernel|memfd DIRECTORY [PYTEST-ARGUMENT]...

The package is in DIRECTORY, the programs beside it or in the search path.
"""

import faulthandler
import os
import pathlib
import sys

import pytest

# for each test: emulated guests with every detector on are slow, a busy machine more so
TEST_SECONDS = 900


class Tap:
    """A plugin of pytest: its results, one line for each test"""

    def __init__(self):
        self.number = 0
        self.reports = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        # the plugin itself has to be there: others read its options
        config.pluginmanager.unregister(name="terminalreporter")

    def pytest_collectreport(self, report):
        # what cannot even be imported; the exit status tells as well
        if report.failed:
            self.comment(report.longreprtext)

    def pytest_collection_finish(self, session):
        print("TAP version 13")
        print(f"1..{len(session.items)}", flush=True)

    @staticmethod
    def pytest_runtest_logstart():
        # what waits for ever fails, and says where
        faulthandler.dump_traceback_later(TEST_SECONDS, exit=True)

    def pytest_runtest_logreport(self, report):
        self.reports.append(report)
        if report.when != "teardown":
            return
        self.number += 1
        name = report.nodeid.rpartition("/")[2].replace("::", ": ").replace("#", "")
        failed = [part for part in self.reports if part.failed]
        skipped = [part for part in self.reports if part.skipped]
        for part in failed:
            self.comment(part.longreprtext)
        if failed:
            print(f"not ok {self.number} - {name}", flush=True)
        elif skipped:
            reason = skipped[0].longrepr[2].removeprefix("Skipped: ")
            print(f"ok {self.number} - {name} # SKIP {reason}", flush=True)
        else:
            print(f"ok {self.number} - {name}", flush=True)
        self.reports = []

    @staticmethod
    def comment(text):
        for line in text.splitlines():
            print(f"# {line}")


def main():
    if len(sys.argv) < 3 or sys.argv[1] not in ("kernel", "memfd"):
        sys.exit(__doc__)
    here = pathlib.Path(__file__).resolve().parent
    package = pathlib.Path(sys.argv[2]).resolve()
    # also for the processes that tests start
    os.environ["KVSCRATCH_BACKEND"] = sys.argv[1]
    os.environ["PYTHONPATH"] = str(package)
    os.environ["PATH"] = f"{package.parent}:{os.environ['PATH']}"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(package))
    # what C code says when it ends the process is not captured
    options = ["--capture=sys", "-p", "no:cacheprovider", "-c", os.devnull,
               "--rootdir", str(here)]
    sys.exit(pytest.main([*options, *(sys.argv[3:] or [str(here)])], plugins=[Tap()]))


main()
