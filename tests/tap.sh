#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Tests that are functions, for bash scripts that source this

same() { diff -u --label expected --label got <(printf '%s\n' "$1") <(printf '%s\n' "$2"); }

# Run functions and print their results as TAP without a plan. Returns 1 if any failed.
# Not to be called in a condition.
# usage: run_tests NUMBER FUNCTION...     the number of the first
run_tests() {
	local number=$1 name status failed=0 output
	shift
	output=$(mktemp)
	for name; do
		# not in a condition, where bash forgets -e
		set +e
		(set -e; "$name") >"$output" 2>&1
		status=$?
		set -e
		if [ $status -eq 0 ]; then
			echo "ok $number - ${name//_/ }"
		else
			sed 's/^/# /' "$output"
			echo "not ok $number - ${name//_/ }"
			failed=1
		fi
		number=$((number + 1))
	done
	rm "$output"
	return $failed
}
