#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Call everything that the module has once; what tests/detectors breaks is on this way.
set -eu
if [ $# -eq 0 ]; then
	exec kvscratchctl create --max-seq-len 3 --dim 4096 --dtype u8 -- sh "$0" with-a-pad
fi
head -c 8192 /dev/zero | kvscratchctl --fd 3 append
kvscratchctl --fd 3 info
# opens a handle of its own
kvscratchctl --fd 3 watch --until 2
head -c 4096 <&3 >/dev/null
cat /proc/self/fdinfo/3
kvscratchctl --fd 3 truncate --len 1
kvscratchctl --fd 3 clear --zero
kvscratchctl --fd 3 truncate --len 1 2>/dev/null && exit 1
exec 3>&-
echo 'all of it was called'
