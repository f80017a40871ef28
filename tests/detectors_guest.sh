#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Call everything that the module has once; what tests/detectors breaks is on this way.
set -eu
exec 3<>/dev/kvscratch 4<>/dev/kvscratch
kvscratchctl --fd 3 create --max-seq-len 3 --dim 4096 --dtype u8
kvscratchctl --fd 4 attach --src-fd 3
head -c 8192 /dev/zero | kvscratchctl --fd 3 append
kvscratchctl --fd 3 info
kvscratchctl --fd 3 watch --until 2
head -c 4096 <&4 >/dev/null
cat /proc/self/fdinfo/3
kvscratchctl --fd 3 truncate --len 1
kvscratchctl --fd 3 clear --zero
kvscratchctl --fd 3 truncate --len 1 2>/dev/null && exit 1
exec 3>&- 4>&-
echo 'all of it was called'
