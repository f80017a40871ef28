#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# The examples as a newcomer runs them, one step at a time: each waits for what the one
# before has printed. Prints TAP. What is called producer, reader, decoder and so on is in PATH.
cd "$(mktemp -d)" || exit 1
count=0

# result STATUS NAME OUTPUT
result() {
	count=$((count + 1))
	if [ "$1" = 0 ]; then
		echo "ok $count - $2"
	else
		echo "# $3" | sed '2,$s/^/# /'
		echo "not ok $count - $2"
	fi
}

# expect NAME LINE: the next line from descriptor 4
expect() {
	got=''
	read -r got <&4
	[ "$got" = "$2" ]
	result $? "$1" "expected $2, got $got"
}

# expect_failure WORDS COMMAND...
expect_failure() {
	words=$1
	shift
	output=$("$@" 2>&1)
	[ $? = 1 ] && [ "$output" = "$words" ]
	result $? "$1 says what is wrong" "$output"
}

echo TAP version 13

mkfifo numbers notes rows
# a hang ends, and then lines are missing
timeout 900 producer pad.sock <numbers 2>notes &
producer=$!
exec 3>numbers 4<notes
expect "the producer listens" "listening at pad.sock"
exec 5<&4
timeout 900 reader pad.sock >rows &
reader=$!
exec 4<rows

echo 1 2 >&3
expect "a row" "row 0: 10"
expect "another row" "row 1: 20"
echo -1 >&3
expect "a row is taken back" "back to row 1"
echo 5 6 7 8 9 10 11 >&3
for row in 1:50 2:60 3:70 4:80 5:90 6:100 7:110; do
	expect "row ${row%:*}, after the truncate" "row ${row%:*}: ${row#*:}"
done
wait $reader
result $? "the reader ends when the pad is full" "exit status $?"
[ ! -e pad.sock ]
result $? "the producer removes its socket" "$(ls -l)"
echo 12 >&3
wait $producer
[ $? = 1 ]
result $? "the producer ends when the pad is full" "exit status $?"
exec 4<&5
expect "... and says so" "producer: Scratchpad full: 8 / 8 tokens"

# A reader waits for its producer, but not for one that is gone: that read all of its input, or
# was killed. The end of input is that of all who have the pipe to write to.
exec 3>&-
for end in input signal; do
	producer early.sock <numbers 2>notes &
	producer=$!
	exec 3>numbers 4<notes
	expect "the producer listens" "listening at early.sock"
	timeout 900 reader early.sock >rows 2>errors 3>&- &
	reader=$!
	exec 4<rows
	echo 1 >&3
	expect "a row before that" "row 0: 10"
	[ $end = input ] || kill -KILL $producer
	exec 3>&-
	wait $producer
	wait $reader
	[ $? = 1 ] && [ "$(cat errors)" = "reader: expected 8 rows, got 1 when the producer ended" ]
	result $? "a reader ends when its producer does, by $end" "$(cat errors)"
done

# one that is killed leaves its socket, and the next one begins all the same
for _ in 1 2; do
	producer left.sock <numbers 2>notes &
	producer=$!
	exec 3>numbers 4<notes
	expect "a producer listens, whoever was there before" "listening at left.sock"
	kill -KILL $producer
	wait $producer
done
expect_failure "reader: left.sock: cannot connect: Connection refused" reader left.sock

output=$(timeout 900 scratchpad 2>&1) && [ "$output" = "the last row begins with 1000" ]
result $? "a pad as a C++ object" "$output"

output=$(timeout 900 decoder 2>&1) && [ "$output" = "5 tokens, v1 adds up to 126" ]
result $? "a cache in one pad, and drafts" "$output"

output=$(timeout 900 cache 2>&1) && [ "$output" = "expected a len from 1, the committed rows, to what every plane has staged, got 2
1 token, v1 ends with 8" ]
result $? "a cache as a C++ object, and half a token" "$output"

expect_failure "reader: nowhere.sock: cannot connect: No such file or directory" reader nowhere.sock
expect_failure "producer: no/such.sock: cannot listen: No such file or directory" producer no/such.sock

echo "1..$count"
