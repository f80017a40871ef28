#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# The part of the demo that runs in the guest; arguments go to kvdecode.
set -eu
say() { printf '\n== %s\n' "$*"; }

say "Linux $(uname -r), module loaded: $(ls -l /dev/kvscratch)"

say "a transformer decodes, K and V of every layer in a pad; another process watches"
kvscratchctl watch --socket /tmp/decode.sock --rows --plane k0 >/tmp/watched &
watcher=$!
kvdecode "$@" --serve /tmp/decode.sock --wait-reader --stats | tee /tmp/pad
wait $watcher
say "what the watcher saw in its own mapping of plane k0, first and last"
head -n 3 /tmp/watched | cut -c 1-76
echo ...
tail -n 3 /tmp/watched | cut -c 1-76

say "the same with the cache on the heap"
kvdecode "$@" --cache heap >/tmp/heap
if cmp /tmp/pad /tmp/heap; then
	echo "identical, $(wc -c </tmp/heap) bytes"
else
	echo "DIFFERENT"
	exit 1
fi

say "a pad from the shell"
kvscratchctl create --max-seq-len 10 --dim 4 --dtype f32 -- sh -exc "
	printf 'three rows of four floats, 16 bytes each rows!!!' | kvscratchctl append
	kvscratchctl info"

say "with drafts of the next tokens, staged behind the last one: those that are the text are committed"
kvdecode "$@" --draft 4 --stats >/tmp/drafted
if cmp /tmp/pad /tmp/drafted; then
	echo "identical"
else
	echo "DIFFERENT"
	exit 1
fi

say "a decoder whose pad is held elsewhere, killed in the middle of a sentence"
export XDG_RUNTIME_DIR=/tmp
kvscratchctl hold story --write

# a decoder that writes its text where somebody takes only the first of it
decode_some() {
	rm -f /tmp/text
	mkfifo /tmp/text
	kvdecode "$@" --hold story >/tmp/text &
	decoder=$!
	# some of the text has come: there is more to come
	exec 4</tmp/text
	dd bs=1 count=100 <&4 2>/dev/null
	printf '...\n'
}

# await_end STATUS: of that decoder
await_end() {
	status=0
	wait $decoder || status=$?
	exec 4<&-
	if [ $status -ne "$1" ]; then
		echo "kvdecode ended with $status instead of $1"
		exit 1
	fi
}

decode_some "$@"
kill -KILL $decoder
await_end 137
kvscratchctl ls | tail -n 3

say "the next one goes on where the last whole token is, and hangs"
decode_some "$@"
kill -STOP $decoder

say "a third one takes its place and finishes the text; the one that hung is refused when it goes on"
kvdecode "$@" --hold story --takeover --stats >/tmp/resumed
if cmp /tmp/pad /tmp/resumed; then
	echo "the text is that of the uninterrupted run: $(wc -c </tmp/resumed) bytes"
else
	echo "DIFFERENT"
	exit 1
fi
kill -CONT $decoder
cat <&4 >/dev/null
await_end 2
kvscratchctl drop story

say "a prompt that is computed once; three processes go on with it, each in a fork of its pad, one is killed"
prompt="Once upon a time there was a little girl who had a dog. One day the dog found a big red ball in the park. \
The girl wanted to play with it, but the dog ran away with the ball. Then"
kvscratchctl hold prompt --write
kvdecode "$@" --prompt "$prompt" --prefill --hold prompt --stats

# branch SEED: the options of a decoder that goes on in a fork
branch() {
	echo "--fork prompt --temperature 1 --seed $1"
}

branches=''
for seed in 1 3; do
	kvscratchctl hold branch$seed --write
	# shellcheck disable=SC2046 # options
	kvdecode "$@" --prompt "$prompt" $(branch $seed) --hold branch$seed --stats >/tmp/branch$seed &
	branches="$branches $!"
done
rm /tmp/text
mkfifo /tmp/text
kvscratchctl hold branch2 --write
# shellcheck disable=SC2046
kvdecode "$@" --prompt "$prompt" $(branch 2) --hold branch2 >/tmp/text &
decoder=$!
exec 4</tmp/text
dd bs=1 count=$((${#prompt} + 40)) <&4 2>/dev/null
printf '...\n'
kill -KILL $decoder
await_end 137
for pid in $branches; do
	wait "$pid"
done
kvscratchctl ls --tree

say "the prompt is forked once more; each text is that of a decoder that computed all of it"
kvscratchctl drop branch2
# shellcheck disable=SC2046
kvdecode "$@" --prompt "$prompt" $(branch 2) --stats >/tmp/branch2
for seed in 1 2 3; do
	kvdecode "$@" --prompt "$prompt" --cache heap --temperature 1 --seed $seed >/tmp/whole
	if ! cmp /tmp/whole /tmp/branch$seed; then
		echo "DIFFERENT"
		exit 1
	fi
	printf 'seed %s: ...' $seed
	tail -c +$((${#prompt} + 1)) /tmp/branch$seed | head -n 1 | cut -c 1-100
done
kvscratchctl drop branch1
kvscratchctl drop branch3
kvscratchctl drop prompt
