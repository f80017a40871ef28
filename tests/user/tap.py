# SPDX-License-Identifier: GPL-2.0-only
"""Tests as functions, their results as TAP."""

TESTS = []


class Failed(Exception):
    pass


def test(function):
    """A decorator. The function raises Failed, or returns why it did not run, or None."""
    TESTS.append(function)
    return function


def expect(condition, what):
    if not condition:
        raise Failed(what)


def run_tests():
    print("TAP version 13")
    print(f"1..{len(TESTS)}")
    for number, function in enumerate(TESTS, 1):
        try:
            skip = function()
            print(f"ok {number} - {function.__name__}" + (f" # SKIP {skip}" if skip else ""),
                  flush=True)
        except Failed as failure:
            for line in str(failure).splitlines():
                print(f"# {line}")
            print(f"not ok {number} - {function.__name__}", flush=True)
