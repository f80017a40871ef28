#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Print as one KTAP document what the KUnit suites of the loaded modules logged.
#
# The kernel log has it all; debugfs keeps 512 bytes of each case's output.
# Suites that a module brings have no header of their own there.
set -- /sys/kernel/debug/kunit/*
echo 'KTAP version 1'
echo "1..$#"
dmesg | sed 's/^\[ *[0-9.]*\] //' | sed -n '/^  *KTAP version/,$p'
