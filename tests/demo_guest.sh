#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# The part of the demo that runs in the guest; arguments go to kvdecode.
set -eu
say() { printf '\n== %s\n' "$*"; }

say "Linux $(uname -r), module loaded: $(ls -l /dev/kvscratch)"

say "a transformer decodes, K and V of every layer in pads; another process watches"
kvscratchctl watch --socket /tmp/decode.sock --pad k0 --rows >/tmp/watched &
watcher=$!
kvdecode "$@" --serve /tmp/decode.sock --wait-reader --stats | tee /tmp/pads
wait $watcher
say "what the watcher saw in its own mapping of pad k0, first and last"
head -n 3 /tmp/watched | cut -c 1-76
echo ...
tail -n 3 /tmp/watched | cut -c 1-76

say "the same with the cache on the heap"
kvdecode "$@" --cache heap >/tmp/heap
if cmp /tmp/pads /tmp/heap; then
	echo "identical, $(wc -c </tmp/heap) bytes"
else
	echo "DIFFERENT"
	exit 1
fi

say "a pad from the shell"
kvscratchctl create --max-seq-len 10 --dim 4 --dtype f32 -- sh -exc "
	printf 'three rows of four floats, 16 bytes each rows!!!' | kvscratchctl append
	kvscratchctl info"

say "a decoder whose pads are held elsewhere, killed in the middle of a sentence"
export XDG_RUNTIME_DIR=/tmp
mkfifo /tmp/text
kvscratchctl hold story --write
kvdecode "$@" --hold story >/tmp/text &
decoder=$!
# some of the text has come: there is more to come
exec 4</tmp/text
dd bs=1 count=100 <&4 2>/dev/null
kill -KILL $decoder
status=0
wait $decoder || status=$?
exec 4<&-
if [ $status -ne 137 ]; then
	echo "kvdecode ended before it was killed"
	exit 1
fi
printf '...\n'
kvscratchctl ls | tail -n 3

say "a new process goes on from the held pads"
kvdecode "$@" --hold story --stats >/tmp/resumed
if cmp /tmp/pads /tmp/resumed; then
	echo "the text is that of the uninterrupted run: $(wc -c </tmp/resumed) bytes"
else
	echo "DIFFERENT"
	exit 1
fi
kvscratchctl drop story
