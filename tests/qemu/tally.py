#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Count the tests of one program's TAP or KTAP; see suite --help.

The parsing is done by kunit_parser of the Linux source.
"""

import argparse
import io
import re
import sys

DOCUMENT = re.compile(r"K?TAP version \d+$")
SKIP = re.compile(r" *ok \d+ (?:- )?(.*) # SKIP *(.*)")
SKIP_WITHOUT_NAME = re.compile(r"ok (\d+) # SKIP")
HARNESS_RUN = re.compile(r"#  RUN +(\S+) \.\.\.$")
PLAN = re.compile(r"1\.\.(\d+)")


def documents(text):
    """Split at headers that are not indented: each starts a document."""
    found = [[]]
    running = ""
    for line in text.splitlines():
        if DOCUMENT.match(line):
            found.append([])
        # kselftest_harness.h leaves out the name of a test that is skipped
        match = HARNESS_RUN.match(line)
        if match:
            running = match.group(1)
        line = SKIP_WITHOUT_NAME.sub(rf"ok \1 {running or 'unnamed'} # SKIP", line)
        found[-1].append(line)
    return found


class Tally:
    def __init__(self, parser):
        self.parser = parser
        self.passed = 0
        self.failures = []    # (what, lines that explain it)
        self.skips = []       # (what, reason)
        self.missing = 0      # planned tests without a result
        self.reasons = {}     # name of a test: why it was skipped

    def failed(self):
        return len(self.failures) + self.missing

    def fail(self, what, log=()):
        self.failures.append((what, log))

    def add_document(self, lines):
        """Count one document; its first line is the header."""
        parser = self.parser
        parser.stdout = parser.Printer(io.StringIO())
        stream = parser.extract_tap_lines(lines)
        top = parser.parse_test(stream, 0, [], False)
        rest = []
        while stream:
            rest.append(stream.pop())
        failed_before = self.failed()
        self.reasons = dict(m.groups() for m in map(SKIP.match, lines) if m)
        for test in top.subtests:
            self.add_test(test, [])

        # what the parser itself found wrong, in its words
        complaints = re.findall(r"\[ERROR\] Test: (.*)", parser.stdout._output.getvalue())
        if not top.subtests:
            pass        # a document without tests counts through the total
        elif top.expected_count is None:
            # TAP allows the plan at the end, the parser does not look there
            plans = [int(m.group(1)) for m in map(PLAN.match, lines) if m]
            if not plans:
                complaints.append("it printed no plan")
            elif plans[-1] != len(top.subtests):
                complaints.append(f"planned {plans[-1]} tests, ran {len(top.subtests)}")
        elif any(parser.TEST_RESULT.match(line) and not line[0].isspace() for line in rest):
            complaints.append(f"it ran more than the {top.expected_count} tests it planned")
        if complaints and self.failed() == failed_before:
            self.fail("the output is not as it should be", list(dict.fromkeys(complaints)))

    def add_test(self, test, path):
        status = self.parser.TestStatus
        path = path + [test.name]
        name = ": ".join(path)
        failed_before = self.failed()
        for subtest in test.subtests:
            self.add_test(subtest, path)
        if test.subtests:
            # its setup can fail while all its cases pass
            if test.status == status.FAILURE and self.failed() == failed_before:
                self.fail(name, test.log)
        elif test.status == status.SUCCESS:
            self.passed += 1
        elif test.status == status.SKIPPED:
            self.skips.append((name, self.reasons.get(test.name, "")))
        elif test.status == status.FAILURE:
            self.fail(name, test.log)
        elif not test.name:
            self.missing += 1
        else:
            self.fail(f"{name}: no result", test.log)


def tally(args):
    sys.path.insert(0, args.parser)
    import kunit_parser
    import kunit_printer
    kunit_parser.Printer = kunit_printer.Printer

    with open(args.tap, encoding="utf-8", errors="replace") as file:
        before, *found = documents(file.read())
    count = Tally(kunit_parser)
    for lines in found:
        count.add_document(lines)
    if args.status == 125:
        count.fail("the guest hung, died or its kernel complained, see above")
    elif args.status and not count.failed():
        count.fail(f"the program exits with status {args.status}", before[-20:])
    elif not count.passed and not count.skips and not count.failed():
        count.fail("it ran no test", before[-20:])

    for what, log in count.failures:
        print(f"FAILED {what}")
        for line in log:
            print(f"    {line.strip()}")
    if count.missing:
        print(f"FAILED {count.missing} planned tests have no result")
    for name, reason in count.skips:
        print(f"skipped {name}: {reason}")
    numbers = count.passed, count.failed(), len(count.skips)
    print("{}: {} passed, {} failed, {} skipped, {} s".format(args.suite, *numbers, args.seconds),
          flush=True)
    with open(args.results, "a", encoding="utf-8") as file:
        print(*numbers, args.suite, file=file)
    return 1 if count.failed() else 0


def total(path):
    passed = failed = skipped = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            numbers = [int(word) for word in line.split()[:3]]
            passed, failed, skipped = map(sum, zip((passed, failed, skipped), numbers))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--total", metavar="RESULTS")
    parser.add_argument("--parser", help="directory of kunit_parser.py")
    parser.add_argument("--status", type=int, default=0, help="exit status of the program")
    parser.add_argument("--seconds", type=int, default=0, help="how long the program ran")
    parser.add_argument("--results", default="/dev/null")
    parser.add_argument("suite", nargs="?")
    parser.add_argument("tap", nargs="?")
    args = parser.parse_args()
    return total(args.total) if args.total else tally(args)


if __name__ == "__main__":
    sys.exit(main())
