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
set -x
exec 3<>/dev/kvscratch
kvscratchctl --fd 3 create --max-seq-len 10 --dim 4 --dtype f32
printf 'three rows of four floats, 16 bytes each rows!!!' | kvscratchctl --fd 3 append
kvscratchctl --fd 3 info
