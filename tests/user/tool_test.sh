#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# kvscratchctl on both backends: what it prints, what it refuses, its exit status.
# $KVSCRATCHCTL is the program, otherwise it is found in PATH. Prints TAP.
#
# A pad cannot be opened by a name, so a shell has one that it was started with: each part
# below is a function that with_pad runs in a shell of its own.
output=''
status=0

# Run a command; $output has what it printed, $status its exit status.
run() {
	output=$("$@" 2>&1)
	status=$?
}

result() {
	count=$(($(cat count) + 1))
	echo $count >count
	if [ "$1" = 0 ]; then
		echo "ok $count - $2"
	else
		echo "# status $status, output:"
		echo "$output" | sed 's/^/# /'
		echo "not ok $count - $2"
	fi
}

# skip NAME REASON
skip() {
	count=$(($(cat count) + 1))
	echo $count >count
	echo "ok $count - $1 # SKIP $2"
}

# expect NAME STATUS OUTPUT: of the latest run
expect() {
	[ "$status" = "$2" ] && [ "$output" = "$3" ]
	result $? "$1"
}

# The first lines of info; the backend and its promises have a test of their own.
# shellcheck disable=SC2120 # run passes arguments
display() {
	kvscratchctl "$@" info 2>&1 | sed '/^[a-z]* keeps:/,$d'
}

# with_pad PART OPTION...: run a part with a new pad as descriptor 3
with_pad() {
	part=$1
	shift
	kvscratchctl create "$@" -- sh "$script" "$part"
	result $? "a pad for $part"
}

# npy TYPE ORDER SHAPE: a header as numpy.save() writes it
npy() {
	printf "\223NUMPY\001\000v\000%-117s\n" \
		"{'descr': '$1', 'fortran_order': $2, 'shape': ($3), }"
}

# Help and wrong usage need no device.
usage()
{
	for verb in create attach info append dump save load truncate clear seal takeover watch hold put fork drop ls metrics; do
		run kvscratchctl $verb --help
		case $output in "Usage: kvscratchctl "*"$verb"*) ;; *) status=1 ;; esac
		result $status "$verb has help"
	done
	run kvscratchctl --help
	case $output in *create*attach*info*append*dump*save*load*truncate*clear*seal*takeover*watch*hold*put*fork*drop*ls*metrics*"Exit status"*) ;; *) status=1 ;; esac
	result $status "help lists every verb"
	run kvscratchctl
	expect "a verb is needed" 1 "kvscratchctl: expected a verb, see kvscratchctl --help"
	run kvscratchctl frobnicate
	expect "an unknown verb" 1 "kvscratchctl: expected a verb, got \"frobnicate\", see kvscratchctl --help"
	run kvscratchctl info extra
	expect "an argument too many" 1 "kvscratchctl info: unexpected argument \"extra\""
	run kvscratchctl create --max-seq-len 5 -- true
	expect "an option too few" 1 "kvscratchctl create: expected --max-seq-len, and --dim or --planes"
	run kvscratchctl create --max-seq-len -5 --dim 1
	expect "a negative number" 1 "kvscratchctl create: --max-seq-len: expected an integer from 1 to 4294967295, got \"-5\""
	run kvscratchctl create --max-seq-len 1 --dim 1 --dtype f33
	expect "an unknown dtype" 1 "kvscratchctl create: --dtype: expected f64 f32 f16 bf16 i64 i32 i16 i8 u8 or mxint8, got \"f33\""
	run kvscratchctl create --max-seq-len 1 --dim 4194305 -- true
	expect "a row too long" 1 "kvscratchctl create: dim: expected rows of at most 16777216 bytes, got 4194305 elements of 4"
	run kvscratchctl dump --format png
	expect "an unknown format" 1 "kvscratchctl dump: --format: expected text, raw or npy, got \"png\""
	run kvscratchctl info --frobnicate
	expect "an unknown option" 1 "kvscratchctl info: unknown option \"--frobnicate\", see --help"
	run kvscratchctl truncate --len
	expect "a value is missing" 1 "kvscratchctl truncate: --len: expected a value, see --help"
	run kvscratchctl watch --timeout 3
	expect "an option without its other" 1 "kvscratchctl watch: --timeout: expected --socket with it"
	run kvscratchctl watch --rows --json
	expect "options that exclude each other" 1 "kvscratchctl watch: expected either --rows or --json, got both"
	for option in --name --socket; do
		run kvscratchctl watch $option ''
		expect "$option of nothing" 1 "kvscratchctl watch: expected a value for each option, got an empty one"
	done
	for verb in append save load put drop hold; do
		run kvscratchctl $verb ''
		expect "$verb of nothing" 1 "kvscratchctl $verb: expected an argument that is not empty, see --help"
	done
	run kvscratchctl metrics -o ''
	expect "an output of no name" 1 "kvscratchctl metrics: expected a value for each option, got an empty one"
}

no_pads()
{
	run kvscratchctl --fd 7 info
	expect "a closed descriptor" 2 "kvscratchctl info: descriptor 7: expected a handle, got none"
	exec 7</dev/null
	run kvscratchctl --fd 7 info
	expect "a descriptor of something else" 2 "kvscratchctl info: descriptor 7: expected a handle of a pad, got a character device"
	exec 7<&-

	if [ -e /dev/kvscratch ]; then
		exec 7<>/dev/kvscratch
		run kvscratchctl --fd 7 info
		expect "a descriptor of the device, which is no pad" 2 "kvscratchctl info: descriptor 7: expected a handle of a pad, got a character device"
		exec 7<&-
	fi
}

life()
{
	run display
	expect "an empty pad" 0 "Scratchpad(len=0, capacity=10, dim=4)"
	run kvscratchctl append rows
	expect "append a file" 0 ""
	run display
	expect "the Display line" 0 "Scratchpad(len=3, capacity=10, dim=4)"
	run sh -c 'kvscratchctl info --json | sed "s/, .backend.*//; s/\"id\": [1-9][0-9]*, \"allocated_bytes\": [1-9][0-9]*/\"id\": .../"'
	expect "info as JSON" 0 '{"len": 3, "max_seq_len": 10, "dim": 4, "dtype": "f32", "input_dtype": "f32", "frac_bits": 0, "row_bytes": 16, "input_row_bytes": 16, "generation": 0, "trunc_len": 0, "data_bytes": 160, "status_offset": 4096, "saturated": 0, "tag": "", "epoch": 0, "writer": false, "sealed": false, "id": ..., "parent_id": 0, "parent_rows": 0, "shared_bytes": 0, "planes": [{"label": "", "dim": 4, "dtype": "f32", "input_dtype": "f32", "frac_bits": 0, "offset": 0, "row_bytes": 16, "scales_offset": 0, "scales_row_bytes": 0, "input_row_bytes": 16}]'
	run sh -c 'kvscratchctl info --json | grep -o "\"backend\": \"[a-z]*\", \"promises\": {\"whole-appends\": true,"'
	expect "the backend in JSON" 0 "\"backend\": \"$backend\", \"promises\": {\"whole-appends\": true,"
	run sh -c 'kvscratchctl info --json | grep -o ": true" | wc -l; kvscratchctl info | sed -n "s/^$1 keeps: //p" | wc -w; kvscratchctl info | grep -c "^$1 does not keep [a-z-]*: "' sh "$backend"
	[ "$kept" != 13 ] || status=0
	expect "the promises of the backend" 0 "$kept
$kept
$((13 - kept))"
	run kvscratchctl dump
	expect "dump as text" 0 "1 2 3 4
-0.5 0.100000001 inf nan
0 1.40129846e-45 3.40282347e+38 -2"
	kvscratchctl dump --format raw >dumped
	run cmp rows dumped
	expect "dump as it was appended" 0 ""
	kvscratchctl dump --format npy -o rows.npy
	run cmp rows.npy numpy
	expect "dump as .npy" 0 ""
	run kvscratchctl append rows.npy
	expect "append a .npy" 0 ""
	run sh -c 'kvscratchctl append - <row0'
	expect "append from stdin" 0 ""
	run kvscratchctl dump
	expect "everything in order" 0 "1 2 3 4
-0.5 0.100000001 inf nan
0 1.40129846e-45 3.40282347e+38 -2
1 2 3 4
-0.5 0.100000001 inf nan
0 1.40129846e-45 3.40282347e+38 -2
1 2 3 4"
	run kvscratchctl append /dev/null
	expect "append nothing" 0 ""

	# What does not fit changes nothing.
	cat rows row0 >rows4
	run kvscratchctl append rows4
	expect "a batch too long" 1 "kvscratchctl append: Scratchpad overflow: 7 + 4 > 10 max"
	run kvscratchctl append /proc/self/pagemap-is-no-file
	expect "no such file" 1 "kvscratchctl append: /proc/self/pagemap-is-no-file: cannot open: No such file or directory"
	head -c 12 row0 >short
	run kvscratchctl append short
	expect "elements too few" 1 "kvscratchctl append: short: shape mismatch: expected 4 elements, got 3"
	head -c 23 rows >short
	run kvscratchctl append short
	expect "bytes too few" 1 "kvscratchctl append: short: expected rows of 16 bytes, got 1 rows and 7 bytes"
	run sh -c 'kvscratchctl append </dev/zero'
	expect "input without end" 1 "kvscratchctl append: stdin: expected less than 1048624 bytes for what is left of the pad, got more"
	head -c 170 rows.npy >cut.npy
	run kvscratchctl append cut.npy
	expect "a cut .npy" 1 "kvscratchctl append: cut.npy: expected 3 rows of 16 bytes behind the header, got 42 bytes"
	head -c 100 rows.npy >cut.npy
	run kvscratchctl append cut.npy
	expect "a cut .npy header" 1 "kvscratchctl append: cut.npy: the .npy header is cut off"
	run sh -c 'kvscratchctl append --format raw rows.npy; kvscratchctl append --format npy rows'
	expect "the format that was asked for" 1 "kvscratchctl append: Scratchpad overflow: 7 + 11 > 10 max
kvscratchctl append: rows: expected a .npy header"
	run kvscratchctl create --max-seq-len 5 --dim 3 -- kvscratchctl append rows.npy
	expect "a .npy of another shape" 1 "kvscratchctl append: rows.npy: shape mismatch: expected 3 elements, got 4"
	run kvscratchctl create --max-seq-len 5 --dim 4 --dtype f64 -- kvscratchctl append rows.npy
	expect "a .npy of another dtype" 1 "kvscratchctl append: rows.npy: dtype mismatch: expected f64, got \"<f4\" = f32"
	{ npy '<f4' True '2, 4'; cat row0 row1; } >fortran.npy
	run kvscratchctl append fortran.npy
	expect "columns first" 1 "kvscratchctl append: fortran.npy: expected rows in C order, got Fortran order"
	{ npy '<f4' False '1, 2, 4'; cat row0 row1; } >cube.npy
	run kvscratchctl append cube.npy
	expect "three dimensions" 1 "kvscratchctl append: cube.npy: expected an array of [rows, 4], got 3 dimensions"
	{ npy '<f4' False ''; cat row0; } >scalar.npy
	run kvscratchctl append scalar.npy
	expect "no dimension" 1 "kvscratchctl append: scalar.npy: expected an array of [rows, 4], got 0 dimensions"
	run kvscratchctl --fd 0 append
	expect "a pad appended to itself" 1 "kvscratchctl append: --fd: expected another descriptor than that of the input"
	run display
	expect "refused input changes nothing" 0 "Scratchpad(len=7, capacity=10, dim=4)"
	{ npy '<f4' False '4,'; cat row0; } >row.npy
	run kvscratchctl create --max-seq-len 5 --dim 4 -- sh -c 'kvscratchctl append row.npy && kvscratchctl info | head -n 1'
	expect "one dimension is one row" 0 "Scratchpad(len=1, capacity=5, dim=4)"
	run kvscratchctl append rows
	expect "to the brim" 0 ""
	run kvscratchctl append row0
	expect "full" 1 "kvscratchctl append: Scratchpad full: 10 / 10 tokens"

	# Truncate, clear
	run kvscratchctl truncate --len 11
	expect "truncate beyond the end" 1 "kvscratchctl truncate: --len: expected at most 10, the committed rows, got 11"
	run kvscratchctl truncate
	expect "truncate to what" 1 "kvscratchctl truncate: expected --len"
	run kvscratchctl truncate --len 1 --zero
	expect "truncate" 0 ""
	run kvscratchctl dump
	expect "one row is left" 0 "1 2 3 4"
	run sh -c 'kvscratchctl info --json | grep -o "\"generation\".*\"trunc_len\": 1"'
	expect "a new generation" 0 '"generation": 1, "trunc_len": 1'
	run kvscratchctl clear
	expect "clear" 0 ""
	run display
	expect "empty again" 0 "Scratchpad(len=0, capacity=10, dim=4)"

	# dump keeps the old file until it has what to write.
	echo precious >file
	run kvscratchctl --fd 9 dump -o file
	output="$status $(cat file)"
	status=0
	expect "a failed dump leaves the file" 0 "2 precious"
	kvscratchctl append row0
	run sh -c 'kvscratchctl dump >/dev/full'
	expect "a full disk" 2 "kvscratchctl dump: cannot write the output: No space left on device"
}

# refused NAME WHAT-IT-IS [WHAT-TO-DO]
refused() {
	run kvscratchctl append "$1"
	expect "append of $2" 1 "kvscratchctl append: $1: expected .npy or raw rows, got $2: ${3:-convert it to .npy}, and --format raw takes it as rows"
}

# Other containers are not taken for rows.
containers()
{
	kvscratchctl append rows
	kvscratchctl save whole.safetensors
	refused whole.safetensors safetensors "kvscratchctl load reads that"
	run sh -c 'head -c 60 whole.safetensors | kvscratchctl append'
	expect "append of the begin of safetensors" 1 "kvscratchctl append: stdin: expected .npy or raw rows, got safetensors: kvscratchctl load reads that, and --format raw takes it as rows"
	{ printf 'PK\003\004'; head -c 28 /dev/zero; } >rows.npz
	refused rows.npz "zip (.npz, .pt)"
	{ printf '\037\213\010\010'; head -c 28 /dev/zero; } >rows.npy.gz
	refused rows.npy.gz gzip
	{ printf '\050\265\057\375'; head -c 12 /dev/zero; } >rows.npy.zst
	refused rows.npy.zst zstd
	{ printf '\3757zXZ\000'; head -c 10 /dev/zero; } >rows.npy.xz
	refused rows.npy.xz xz
	printf 'BZh91AY&SY123456' >rows.npy.bz2
	refused rows.npy.bz2 bzip2
	{ printf 'GGUF\003'; head -c 27 /dev/zero; } >model.gguf
	refused model.gguf GGUF
	{ printf '\211HDF\r\n\032\n'; head -c 8 /dev/zero; } >rows.h5
	refused rows.h5 HDF5
	{ printf 'PAR1'; head -c 12 /dev/zero; } >rows.parquet
	refused rows.parquet Parquet
	{ printf 'ARROW1\000\000'; head -c 8 /dev/zero; } >rows.feather
	refused rows.feather "Arrow (Feather)"
	{ printf '\200\004\225'; head -c 12 /dev/zero; printf .; } >rows.pkl
	refused rows.pkl "a pickle of Python"
	printf '1.25,2.5,3,4\n10,' >rows.csv
	refused rows.csv text
	{ printf 'PK\003\004'; head -c 2000000 /dev/zero; } >large.npz
	refused large.npz "zip (.npz, .pt)"
	run sh -c 'kvscratchctl info | head -n 1; kvscratchctl append --format raw rows.csv; kvscratchctl info | head -n 1'
	expect "append of text that was asked for" 0 "Scratchpad(len=3, capacity=100, dim=4)
Scratchpad(len=4, capacity=100, dim=4)"
}

text_of_bytes()
{
	run sh -c 'printf "1,2\n" | kvscratchctl append; printf "1,2\n" >bytes.csv; kvscratchctl append bytes.csv; kvscratchctl info | head -n 1'
	expect "bytes may be text, but for their name" 0 "kvscratchctl append: bytes.csv: expected .npy or raw rows, got text: convert it to .npy, and --format raw takes it as rows
Scratchpad(len=4, capacity=100, dim=1)"
}

# Where output goes: a file is replaced as a whole, all else is written to.
outputs()
{
	kvscratchctl append row0
	ln -s file link
	kvscratchctl dump -o link
	run sh -c 'cat link; test -L link'
	expect "dump through a link" 0 "1 2 3 4"
	chmod 604 file
	kvscratchctl dump -o file
	run stat -c %a file
	expect "dump keeps the mode" 0 604
	ln -s nothing dangling
	run kvscratchctl dump -o dangling
	expect "dump to a link to nothing" 2 "kvscratchctl dump: dangling: expected a regular file or none, got a link to nothing"
	run kvscratchctl dump -o .
	expect "dump to a directory" 2 "kvscratchctl dump: .: cannot open: Is a directory"
	mkfifo pipe
	cat pipe >piped &
	kvscratchctl dump -o pipe
	wait $!
	run cat piped
	expect "dump to a FIFO" 0 "1 2 3 4"
	# as /dev/stdout is, here: what is wrong must not replace that of the machine
	ln -s /proc/self/fd/1 stdout
	run kvscratchctl dump -o stdout
	expect "dump to what stdout is" 0 "1 2 3 4"
	run sh -c 'test -L stdout; kvscratchctl dump -o /proc/self/fd/5 5>fifth; cat fifth; exec 6<>fifth; kvscratchctl dump -o /proc/self/fd/6; cat <&6'
	expect "dump to a descriptor" 0 "1 2 3 4
1 2 3 4"
	# as /dev/null is, where one may be made and opened
	if mknod node c 1 3 2>/dev/null && : 2>/dev/null >node; then
		run sh -c 'kvscratchctl dump -o node && test -c node'
		expect "dump to a device" 0 ""
	else
		rm -f node
		skip "dump to a device" "no device can be made here"
	fi
	# a process's limit of the size of files, in kilobytes or half ones
	run sh -c 'ulimit -f 1; kvscratchctl dump --format raw -o file </dev/null; cat file' # 16 bytes fit
	[ "$status" = 0 ]
	result $? "what is within the limit"
	head -c 4000 /dev/zero >long
	# shellcheck disable=SC2016 # for another shell
	kvscratchctl create --max-seq-len 1 --dim 4000 --dtype u8 -- sh -c '
	kvscratchctl append long
	echo precious >file
	ulimit -f 1
	kvscratchctl dump --format text -o file
	echo "$? $(cat file)"
	kvscratchctl save file.npy
	echo "$? $(ls .kvscratch-* file.npy 2>/dev/null)"
	kvscratchctl create --max-seq-len 1 --dim 4000 -- true
	echo $?' >limited 2>&1
	run cat limited
	case $output in
	"kvscratchctl dump: cannot write the output: File too large
2 precious
kvscratchctl save: file.npy: cannot write the file: File too large
2 
"*) ;;
	*) status=9 ;;
	esac
	[ "$backend" = kernel ] || case $output in
	*"
kvscratchctl create: cannot create a pad of [1, 4000] f32: File too large: pads without the module are files, see ulimit -f
2") ;;
	*) status=9 ;;
	esac
	[ "$status" = 0 ]
	result $? "a limit of the size of files"
}

# Every dtype as text, and what cannot be made
dtypes()
{
	for case in 'f64 \000\000\000\000\000\000\370\077 1.5' 'f16 \000\074 1' 'f16 \001\200 -5.9605e-08' \
		'f16 \000\174 inf' 'bf16 \300\077 1.5' 'i64 \376\377\377\377\377\377\377\377 -2' \
		'i32 \000\000\000\200 -2147483648' 'i16 \377\377 -1' 'i8 \200 -128' 'u8 \377 255'; do
		# shellcheck disable=SC2086
		set -- $case
		# shellcheck disable=SC2016
		run kvscratchctl create --max-seq-len 1 --dim 1 --dtype "$1" -- \
			sh -c 'printf "$1" | kvscratchctl append && kvscratchctl dump' sh "$2"
		expect "$1 as text" 0 "$3"
	done
	run kvscratchctl create --max-seq-len 1 --dim 1 --dtype bf16 -- kvscratchctl dump --format npy
	expect "no .npy of bf16" 1 "kvscratchctl dump: --format: .npy has no type for bf16; expected text, raw or json"
	run kvscratchctl create --max-seq-len 1 --dim 33 --dtype mxint8 -- true
	expect "half a block" 1 "kvscratchctl create: dim: expected a multiple of 32 for mxint8, got 33"
	run kvscratchctl create --max-seq-len 1 --dim 32 --dtype u8 --input f32 -- true
	expect "no conversion to u8" 1 "kvscratchctl create: input dtype: expected u8 for a dtype of u8, got f32"
	run kvscratchctl create --max-seq-len 1 --dim 32 --dtype i8 --input i16 -- true
	expect "no conversion from i16" 1 "kvscratchctl create: input dtype: expected i8 f64 f32 f16 or bf16 for a dtype of i8, got i16"
	run kvscratchctl create --max-seq-len 1 --dim 32 --frac-bits 3 -- true
	expect "no fraction bits of f32" 1 "kvscratchctl create: fraction bits: expected at most 0 for f32, got 3"
}

mxint8()
{
	# 1.0, -1.984375 = -127 / 64 and zeros; then 32 times 2^-60
	{
		printf '\000\000\200\077\000\000\376\277'
		head -c 120 /dev/zero
		for _ in 1 2 3 4 5 6 7 8; do
			printf '\000\000\200\041\000\000\200\041\000\000\200\041\000\000\200\041'
		done
	} >floats
	run kvscratchctl append floats
	expect "append of floats" 0 ""
	run display
	expect "info names the format" 0 "Scratchpad(len=2, capacity=4, dim=32)
mxint8, from f32, 0 saturated"
	zeros=$(printf '%30s' '' | sed 's/ / 0/g')
	tiny=$(printf '%31s' '' | sed 's/ / 8.6736173798840355e-19/g')
	run kvscratchctl dump
	expect "values scaled back" 0 "1 -1.984375$zeros
8.6736173798840355e-19$tiny"
	kvscratchctl dump --format raw >records
	{
		printf '\100\201'
		head -c 30 /dev/zero
		printf '\177@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@C'
	} >expected
	run cmp records expected
	expect "records are elements and scales" 0 ""
	kvscratchctl dump --format npy >back.npy
	{
		npy '<f4' False '2, 32'
		cat floats
	} >expected
	run cmp back.npy expected
	expect "as .npy it is f32 again" 0 ""
	run sh -c "printf '\\000\\000\\300\\177%124s' '' | kvscratchctl append"
	expect "a NaN" 2 "kvscratchctl append: descriptor 3: cannot append: a NaN or an infinity has no integer"
}

records()
{
	run kvscratchctl append records
	expect "append of records" 0 ""
	run sh -c 'kvscratchctl dump --format npy | cmp - back.npy'
	expect "records are the same pad again" 0 ""
	# the scale that stands for NaN, and the element that the conversion never gives
	printf '%32s\377' '' | tr ' ' '\200' | kvscratchctl append
	printf '%32s\177' '' | tr ' ' '\200' | kvscratchctl append
	run sh -c 'kvscratchctl dump | tail -n 2 | cut -d " " -f 1,32'
	expect "a block that is NaN" 0 "nan nan
-2 -2"
}

fixed_point()
{
	# 1.5, -1000.0
	printf '\000\000\000\000\000\000\370\077\000\000\000\000\000\100\217\300' | kvscratchctl append
	run kvscratchctl dump
	expect "fixed point" 0 "1.5 -128"
	run display
	expect "clamped elements are counted" 0 "Scratchpad(len=1, capacity=4, dim=2)
i16 with 8 fraction bits, from f64, 1 saturated"
}

# Each step waits until the watcher has told of the one before.
watch()
{
	mkfifo told
	kvscratchctl watch --rows --until 4 >told &
	exec 6<told
	read -r line <&6
	seen="$line"
	printf '\001\002' | kvscratchctl append
	for _ in 1 2 3; do
		read -r line <&6
		seen="$seen,$line"
	done
	kvscratchctl truncate --len 1
	for _ in 1 2; do
		read -r line <&6
		seen="$seen,$line"
	done
	printf '\007\010\011' | kvscratchctl append
	for _ in 1 2 3 4; do
		read -r line <&6
		seen="$seen,$line"
	done
	wait $!
	status=$?
	output=$seen
	expect "watch follows rows and truncates" 0 "Scratchpad(len=0, capacity=10, dim=1),0: 1,1: 2,Scratchpad(len=2, capacity=10, dim=1),truncated, generation 1, rows below 1 kept,Scratchpad(len=1, capacity=10, dim=1),1: 7,2: 8,3: 9,Scratchpad(len=4, capacity=10, dim=1)"
	run kvscratchctl watch --until 11
	expect "watch for more than fits" 1 "kvscratchctl watch: --until: expected at most 10, the rows that fit, got 11"
	kvscratchctl watch >told &
	exec 6<told
	read -r line <&6
	kill $!
	wait $!
	status=$?
	output=$line
	expect "a watch ends when it is interrupted" 143 "Scratchpad(len=4, capacity=10, dim=1)"
	run kvscratchctl watch --json --until 4
	expect "watch as JSON" 0 '{"len": 4, "generation": 1}'
	run kvscratchctl watch --socket nobody --timeout 0
	expect "a socket that nobody serves" 2 "kvscratchctl watch: nobody: cannot connect: No such file or directory"
}

json()
{
	run kvscratchctl dump --json
	expect "no rows as JSON" 0 "[]"
	printf '\000\000\200\077\000\000\300\177\000\000\200\177\000\000\200\377' | kvscratchctl append
	run kvscratchctl dump --json
	expect "rows as JSON" 0 "[[1, null],
 [1e999, -1e999]]"
	run kvscratchctl dump --json --format text
	expect "two formats" 1 "kvscratchctl dump: expected either --format or --json, got both"
}

# A command gets the handle.
commands()
{
	run kvscratchctl create --max-seq-len 4 --dim 2 --dtype u8 -- sh -c 'printf abcd | kvscratchctl append && kvscratchctl dump'
	expect "create for a command" 0 "97 98
99 100"
	run kvscratchctl --fd 8 create --max-seq-len 4 --dim 2 -- sh -c 'kvscratchctl --fd 8 info | head -n 1; exit 9'
	expect "its descriptor and its exit status" 9 "Scratchpad(len=0, capacity=4, dim=2)"
	run kvscratchctl create --max-seq-len 4 --dim 2 -- ./nix
	expect "a command that does not exist" 127 "kvscratchctl create: ./nix: No such file or directory"
	run kvscratchctl create --max-seq-len 4 --dim 2 -- /
	expect "a command that cannot be run" 126 "kvscratchctl create: /: Permission denied"
	run kvscratchctl create --max-seq-len 4 --dim 2 --
	expect "no command" 1 "kvscratchctl create: expected COMMAND behind --"
	run kvscratchctl create --max-seq-len 4 --dim 2
	expect "create for nobody" 1 "kvscratchctl create: expected -- COMMAND: the pad lives as long as somebody has a handle; kvscratchctl hold keeps one"
	run kvscratchctl -n story create
	expect "a name of a pad to make" 1 "kvscratchctl create: unexpected --name, see --help"
	run kvscratchctl ls --fd 3
	expect "an option of other verbs" 1 "kvscratchctl ls: unexpected --fd, see --help"
	run kvscratchctl create --max-seq-len 4 --dim 2 --dtype u8 -- sh -c 'printf ab | kvscratchctl append; kvscratchctl --fd 3 attach -- sh -c "printf cd | kvscratchctl append; kvscratchctl dump"'
	expect "attach to a descriptor, for a reader" 0 "kvscratchctl append: descriptor 3: expected it open for write, got read only
97 98"
	run kvscratchctl create --max-seq-len 4 --dim 2 --dtype u8 -- kvscratchctl attach --write -- sh -c 'printf cd | kvscratchctl append; kvscratchctl dump'
	expect "attach to a descriptor, for a writer" 0 "99 100"
	run kvscratchctl attach
	expect "attach for nobody" 1 "kvscratchctl attach: expected -- COMMAND"
	run kvscratchctl --fd 7 attach -- true
	expect "attach to nothing" 2 "kvscratchctl attach: descriptor 7: expected a handle, got none"
	run kvscratchctl --fd 3 -n story info
	expect "two pads" 1 "kvscratchctl info: expected either --fd or --name, got both"
}

holders()
{
	for name in story notes; do
		run kvscratchctl hold $name --write --max-seq-len 5 --dim 4
		expect "hold $name" 0 ""
	done
	run kvscratchctl hold story --write
	expect "a name that is held" 2 "kvscratchctl hold: \"story\" is held already: somebody listens on $directory/kvscratch/story"
	run kvscratchctl -n story append rows
	expect "append by name" 0 ""
	run kvscratchctl append --name story/pad row0
	expect "append by name and pad" 0 ""
	run display -n story
	expect "info by name" 0 "Scratchpad(len=4, capacity=5, dim=4)"
	run kvscratchctl truncate -n story --len 1
	expect "truncate by name" 0 ""
	run kvscratchctl dump -n story
	expect "dump by name" 0 "1 2 3 4"
	run kvscratchctl watch -n story --until 1 --rows
	expect "watch by name" 0 "0: 1 2 3 4
Scratchpad(len=1, capacity=5, dim=4)"
	run kvscratchctl -n story --fd 8 attach -- sh -c 'kvscratchctl --fd 8 dump; kvscratchctl --fd 8 clear'
	expect "attach by name, for a reader" 2 "1 2 3 4
kvscratchctl clear: descriptor 8: expected it open for write, got read only"
	run kvscratchctl attach --write -n story -- kvscratchctl truncate --len 1
	expect "attach by name, for a writer" 0 ""
	kvscratchctl hold cache --max-seq-len 5 --planes k0:2,v0:2 --tag model
	run sh -c 'kvscratchctl ls; kvscratchctl -n cache info | sed "/keeps:/,\$d"; kvscratchctl metrics | grep "info{"; kvscratchctl ls --json | grep -o "\"tag\": \"model\""; kvscratchctl drop cache'
	expect "hold planes" 0 "cache/pad: Scratchpad(len=0, capacity=5, planes=2)
notes/pad: Scratchpad(len=0, capacity=5, dim=4)
story/pad: Scratchpad(len=1, capacity=5, dim=4)
Scratchpad(len=0, capacity=5, planes=2)
plane k0: 2 f32
plane v0: 2 f32
tag: model
kvscratch_pad_info{holder=\"cache\",pad=\"pad\",backend=\"$backend\",planes=\"2\"} 1
kvscratch_pad_info{holder=\"notes\",pad=\"pad\",backend=\"$backend\",dtype=\"f32\",dim=\"4\"} 1
kvscratch_pad_info{holder=\"story\",pad=\"pad\",backend=\"$backend\",dtype=\"f32\",dim=\"4\"} 1
\"tag\": \"model\""
	run kvscratchctl --fd 3 hold inherited
	expect "hold a descriptor" 0 ""
	run sh -c 'kvscratchctl hold quiet --write 6>&1 >/dev/null 2>&1 | timeout 900 cat && kvscratchctl drop quiet'
	expect "a holder keeps no other descriptor" 0 ""
	run kvscratchctl -n inherited append row0
	expect "hold for readers" 2 "kvscratchctl append: inherited: handles are for reading only: the holder was started without --write"
	run kvscratchctl hold empty --write
	expect "hold nothing yet" 0 ""
	run sh -c 'kvscratchctl ls | sed "s/inherited.*/inherited/"'
	expect "ls" 0 "empty: no pads
inherited
notes/pad: Scratchpad(len=0, capacity=5, dim=4)
story/pad: Scratchpad(len=1, capacity=5, dim=4)"
	run sh -c 'kvscratchctl ls --json | sed "s/\"max_seq_len.*\"backend\"/.../"'
	expect "ls as JSON" 0 "[{\"holder\": \"empty\", \"pad\": null},
 {\"holder\": \"inherited\", \"pad\": \"pad\", \"len\": $(kvscratchctl info --json | sed 's/{"len": \([0-9]*\).*/\1/'), ...: \"$backend\"},
 {\"holder\": \"notes\", \"pad\": \"pad\", \"len\": 0, ...: \"$backend\"},
 {\"holder\": \"story\", \"pad\": \"pad\", \"len\": 1, ...: \"$backend\"}]"
	kvscratchctl drop inherited
	kvscratchctl drop empty
	run kvscratchctl metrics
	# how much that is, is up to the backend
	output=$(printf '%s\n' "$output" | sed '/^# HELP kvscratch_module/,$d; /own_bytes{/s/ [1-9][0-9]*$/ SOME/')
	expect "metrics" 0 "# HELP kvscratch_pad_info What a held pad is made of.
# TYPE kvscratch_pad_info gauge
kvscratch_pad_info{holder=\"notes\",pad=\"pad\",backend=\"$backend\",dtype=\"f32\",dim=\"4\"} 1
kvscratch_pad_info{holder=\"story\",pad=\"pad\",backend=\"$backend\",dtype=\"f32\",dim=\"4\"} 1
# HELP kvscratch_pad_rows Committed rows.
# TYPE kvscratch_pad_rows gauge
kvscratch_pad_rows{holder=\"notes\",pad=\"pad\"} 0
kvscratch_pad_rows{holder=\"story\",pad=\"pad\"} 1
# HELP kvscratch_pad_capacity_rows Rows that fit.
# TYPE kvscratch_pad_capacity_rows gauge
kvscratch_pad_capacity_rows{holder=\"notes\",pad=\"pad\"} 5
kvscratch_pad_capacity_rows{holder=\"story\",pad=\"pad\"} 5
# HELP kvscratch_pad_bytes Bytes of all rows that fit.
# TYPE kvscratch_pad_bytes gauge
kvscratch_pad_bytes{holder=\"notes\",pad=\"pad\"} 80
kvscratch_pad_bytes{holder=\"story\",pad=\"pad\"} 80
# HELP kvscratch_pad_own_bytes Memory that the pad took for itself.
# TYPE kvscratch_pad_own_bytes gauge
kvscratch_pad_own_bytes{holder=\"notes\",pad=\"pad\"} SOME
kvscratch_pad_own_bytes{holder=\"story\",pad=\"pad\"} SOME
# HELP kvscratch_pad_shared_bytes Memory that it has of the pad it was forked from.
# TYPE kvscratch_pad_shared_bytes gauge
kvscratch_pad_shared_bytes{holder=\"notes\",pad=\"pad\"} 0
kvscratch_pad_shared_bytes{holder=\"story\",pad=\"pad\"} 0
# HELP kvscratch_pad_truncates_total Truncates: the generation.
# TYPE kvscratch_pad_truncates_total counter
kvscratch_pad_truncates_total{holder=\"notes\",pad=\"pad\"} 0
kvscratch_pad_truncates_total{holder=\"story\",pad=\"pad\"} 2
# HELP kvscratch_pad_saturated_elements_total Elements that were clamped by a conversion.
# TYPE kvscratch_pad_saturated_elements_total counter
kvscratch_pad_saturated_elements_total{holder=\"notes\",pad=\"pad\"} 0
kvscratch_pad_saturated_elements_total{holder=\"story\",pad=\"pad\"} 0"
	[ -e /sys/module/kvscratch ] && modules=1 || modules=0
	run sh -c 'kvscratchctl metrics | grep -cE "^kvscratch_module_(open_handles|bytes|max_bytes_per_pad|max_bytes_total|min_available_bytes) [0-9]+$"'
	[ "$modules" = 1 ] || status=0
	expect "metrics of the module" 0 "$((5 * modules))"
	mkdir collected
	echo old >collected/kvscratch.prom
	run kvscratchctl metrics -o collected/kvscratch.prom
	expect "metrics to a file" 0 ""
	kvscratchctl metrics >printed
	# the holder may still have had a handle for the one before
	run sh -c 'sed "s/^\(kvscratch_module_open_handles\) .*/\1/" printed >expected &&
	sed "s/^\(kvscratch_module_open_handles\) .*/\1/" collected/kvscratch.prom | cmp - expected &&
	stat -c "%a %n" collected/*'
	expect "metrics replace a file" 0 "644 collected/kvscratch.prom"
	run sh -c 'kvscratchctl metrics >/dev/full'
	expect "metrics to a full disk" 2 "kvscratchctl metrics: cannot write the output: No space left on device"
	ln -s ../printed collected/link.prom
	run sh -c 'kvscratchctl metrics -o collected/link.prom && test -L collected/link.prom && grep -c kvscratch_pad_info{ printed'
	expect "metrics through a link" 0 2
	run sh -c 'kvscratchctl metrics -o stdout | grep -c kvscratch_pad_info{ && test -L stdout'
	expect "metrics to what stdout is" 0 2
	if [ -c node ]; then
		run sh -c 'kvscratchctl metrics -o node && test -c node'
		expect "metrics to a device" 0 ""
	else
		skip "metrics to a device" "no device can be made here"
	fi
	run kvscratchctl metrics -o nowhere/kvscratch.prom
	expect "metrics to nowhere" 2 "kvscratchctl metrics: nowhere/kvscratch.prom: cannot open the directory of the file: No such file or directory"
	run kvscratchctl drop story/nix
	expect "drop what is not there" 2 "kvscratchctl drop: story: there is no pad \"nix\""
	run kvscratchctl drop story/pad
	expect "drop a pad" 0 ""
	run kvscratchctl ls
	expect "what is left" 0 "notes/pad: Scratchpad(len=0, capacity=5, dim=4)
story: no pads"
	run kvscratchctl -n notes put story/k0
	expect "put a pad" 0 ""
	run kvscratchctl put story
	expect "put a descriptor" 0 ""
	run kvscratchctl -n notes put story
	expect "put what is held already" 2 "kvscratchctl put: story: a pad \"pad\" is held already"
	kvscratchctl -n notes append row0
	run sh -c 'kvscratchctl -n notes put --replace story && kvscratchctl ls | grep "^story"'
	expect "put one in the place of another" 0 "story/k0: Scratchpad(len=1, capacity=5, dim=4)
story/pad: Scratchpad(len=1, capacity=5, dim=4)"
	run kvscratchctl -n story/pad append row0
	expect "put for reading" 2 "kvscratchctl append: story: pad: the handle that is held is for reading only"
	run sh -c 'kvscratchctl -n notes put --write --replace story && kvscratchctl -n story/pad append row0 && kvscratchctl -n notes info | head -n 1'
	expect "put for writing" 0 "Scratchpad(len=2, capacity=5, dim=4)"
	run kvscratchctl -n notes put nobody/k0
	expect "put where nobody holds" 2 "kvscratchctl put: no pads are held as \"nobody\": nobody listens on $directory/kvscratch/nobody"
	run kvscratchctl -n notes put story/.k0
	expect "put under no name" 1 "kvscratchctl put: the name of a pad: expected 1 to 63 of A-Z a-z 0-9 . _ - and no dot first, got \".k0\""
	run kvscratchctl -n notes put
	expect "put where" 1 "kvscratchctl put: expected HOLDER or HOLDER/PAD"
	kvscratchctl drop story
	run kvscratchctl drop notes
	expect "drop a holder" 0 ""
	run kvscratchctl ls
	expect "nothing is left" 0 ""
	run kvscratchctl ls --json
	expect "nothing is left, as JSON" 0 "[]"
	run kvscratchctl -n story info
	expect "a name that nobody holds" 2 "kvscratchctl info: no pads are held as \"story\": nobody listens on $directory/kvscratch/story"
	run kvscratchctl hold ../story --write
	expect "a name that leads elsewhere" 1 "kvscratchctl hold: the name of a holder: expected 1 to 63 of A-Z a-z 0-9 . _ - and no dot first, got \"../story\""
	run kvscratchctl hold story
	expect "hold what" 1 "kvscratchctl hold: expected --write, for pads to be put, or --max-seq-len and --dim or --fd"
	run kvscratchctl hold
	expect "hold under what name" 1 "kvscratchctl hold: expected NAME"
	run kvscratchctl hold story --max-seq-len 5
	expect "hold half a shape" 1 "kvscratchctl hold: expected --max-seq-len, and --dim or --planes"
	for part in '--planes k0:4' '--tag model' '--dtype f16'; do
		# shellcheck disable=SC2086 # words
		run kvscratchctl hold story --write $part
		expect "hold no more than $part" 1 "kvscratchctl hold: expected --max-seq-len, and --dim or --planes"
	done
	run kvscratchctl hold story --max-seq-len 5 --dim 33 --dtype mxint8
	expect "hold no shape that there is" 1 "kvscratchctl hold: dim: expected a multiple of 32 for mxint8, got 33"
	touch kvscratch/file
	run kvscratchctl hold file --write
	expect "hold where a file lies" 2 "kvscratchctl hold: $directory/kvscratch/file: cannot listen: expected a socket or nothing there, got a regular file"
	run kvscratchctl -n file info
	expect "a holder that is a file" 2 "kvscratchctl info: $directory/kvscratch/file: cannot connect: expected a socket, got a regular file"
	run kvscratchctl ls
	expect "a file is no holder" 0 ""
	rm kvscratch/file
	run env XDG_RUNTIME_DIR=run kvscratchctl ls
	expect "a directory for holders that is relative" 2 "kvscratchctl ls: XDG_RUNTIME_DIR: expected an absolute path, got \"run\""
	run env -u XDG_RUNTIME_DIR kvscratchctl ls
	expect "no directory for holders" 2 "kvscratchctl ls: XDG_RUNTIME_DIR is not set: held pads have their sockets there"
}

# Of what only the module shares
own() { sed 's/[1-9][0-9]* bytes own/... bytes own/'; }

# Planes of rows of 4 KiB: a fork of two rows has no page that it copies.
forks()
{
	[ "$backend" = kernel ] && shared=16384 || shared=0
	kvscratchctl hold story --write --max-seq-len 5 --planes k0:1024,v0:1024 --tag model
	head -c 24576 /dev/zero | tr '\000' A >three
	head -c 8192 /dev/zero | tr '\000' B >other
	kvscratchctl -n story append three
	run kvscratchctl fork story@2 story/branch --max-seq-len 9
	expect "fork into a holder" 0 ""
	kvscratchctl -n story/pad append other
	run kvscratchctl -n story/branch append other
	expect "a fork can be appended to" 0 ""
	run sh -c 'for pad in pad branch; do kvscratchctl -n story/$pad dump --format raw | fold -b -w 8192 | tr -s AB; echo; done'
	expect "a fork has the rows of its source, and then its own" 0 "A
A
A
B
A
A
B"
	run sh -c 'kvscratchctl -n story/branch info | sed -n "/^tag/p; s/^\(fork of 2 rows of pad \)[1-9][0-9]*\(, .*, \)[1-9][0-9]*\( bytes of its own\)/\1...\2...\3/p"'
	expect "info of a fork" 0 "tag: model
fork of 2 rows of pad ..., $shared bytes shared, ... bytes of its own"
	run sh -c 'kvscratchctl -n story/branch info --json | grep -oE "\"parent_(rows|id)\": [0-9]+|\"shared_bytes\": [0-9]+" | sed "s/$(kvscratchctl -n story/pad info --json | sed "s/.*\"id\": \([0-9]*\).*/\1/")$/that of the source/"'
	expect "info of a fork as JSON" 0 "\"parent_id\": that of the source
\"parent_rows\": 2
\"shared_bytes\": $shared"
	run kvscratchctl fork story/branch@1 twig
	expect "fork into a new holder" 0 ""
	run sh -c 'kvscratchctl -n twig append other && kvscratchctl -n twig/pad info | head -n 1'
	expect "the new holder is for writing, and for as many rows" 0 "Scratchpad(len=2, capacity=9, planes=2)"
	run kvscratchctl fork story/pad leaves/k0
	expect "fork all rows into a new holder, under a name" 0 ""
	kvscratchctl hold empty --write
	kvscratchctl -n twig put leaves/again
	tree=$(kvscratchctl ls --tree | own)
	run printf '%s\n' "$tree"
	expect "ls --tree" 0 "empty: no pads
story/pad: Scratchpad(len=4, capacity=5, planes=2), ... bytes own, 0 shared
  leaves/k0: Scratchpad(len=4, capacity=5, planes=2), forked at 4, ... bytes own, $((2 * shared)) shared
  story/branch: Scratchpad(len=3, capacity=9, planes=2), forked at 2, ... bytes own, $shared shared
    leaves/again: Scratchpad(len=2, capacity=9, planes=2), forked at 1, ... bytes own, $((shared / 2)) shared
    twig/pad: the same as leaves/again"
	run kvscratchctl ls
	expect "ls of forks" 0 "empty: no pads
leaves/k0: Scratchpad(len=4, capacity=5, planes=2)
leaves/again: Scratchpad(len=2, capacity=9, planes=2)
story/pad: Scratchpad(len=4, capacity=5, planes=2)
story/branch: Scratchpad(len=3, capacity=9, planes=2)
twig/pad: Scratchpad(len=2, capacity=9, planes=2)"
	kvscratchctl drop empty
	kvscratchctl drop twig
	kvscratchctl drop leaves/again
	run kvscratchctl fork story/pad@1 story/branch
	expect "fork to a name that is held" 2 "kvscratchctl fork: story: a pad \"branch\" is held already"
	run sh -c 'kvscratchctl fork story/pad@1 --replace story/pad && kvscratchctl -n story/pad info | head -n 1'
	expect "fork in the place of its source" 0 "Scratchpad(len=1, capacity=5, planes=2)"
	tree=$(kvscratchctl ls --tree | own | sed 's/^pad [1-9][0-9]*:/pad ...:/')
	run printf '%s\n' "$tree"
	expect "ls --tree of forks of one that is not held" 0 "pad ...: not held
  leaves/k0: Scratchpad(len=4, capacity=5, planes=2), forked at 4, ... bytes own, $((2 * shared)) shared
  story/branch: Scratchpad(len=3, capacity=9, planes=2), forked at 2, ... bytes own, $shared shared
  story/pad: Scratchpad(len=1, capacity=5, planes=2), forked at 1, ... bytes own, $((shared / 2)) shared"
	kvscratchctl drop leaves
	kvscratchctl drop story
	run kvscratchctl ls --tree
	expect "no tree" 0 ""

	kvscratchctl create --max-seq-len 2 --dim 2 -- sh -c 'printf 12345678 | kvscratchctl append --format raw && kvscratchctl --fd 3 hold final && kvscratchctl --fd 3 hold open'
	run kvscratchctl fork open branch
	expect "fork what may not be written" 2 "kvscratchctl fork: open: handles are for reading only: the holder was started without --write"
	kvscratchctl drop open
	kvscratchctl hold story --write
	kvscratchctl -n final put story/read-only
	run kvscratchctl fork story/read-only branch
	expect "fork what is held for reading" 2 "kvscratchctl fork: story: read-only: the handle that is held is for reading only"
	kvscratchctl drop story
	kvscratchctl drop final
	kvscratchctl create --max-seq-len 2 --dim 2 -- sh -c 'printf 12345678 | kvscratchctl append --format raw && kvscratchctl seal && kvscratchctl --fd 3 hold final'
	run kvscratchctl fork final branch
	expect "fork what is sealed" 0 ""
	run sh -c 'printf abcdefgh | kvscratchctl -n branch append --format raw && kvscratchctl -n branch dump --format raw'
	expect "append to a fork of what is sealed" 0 "12345678abcdefgh"
	run kvscratchctl fork final@2 twig
	expect "fork more rows than there are" 1 "kvscratchctl fork: expected at most 1, the committed rows, got 2"
	run kvscratchctl fork branch twig --max-seq-len 1
	expect "fork more rows than fit" 1 "kvscratchctl fork: max_seq_len: expected at least 2, the rows of the fork, got 1"
	run kvscratchctl fork branch@0 branch/none
	expect "fork no rows" 0 ""
	for rows in '' -1 1x; do
		run kvscratchctl fork "branch@$rows" twig
		expect "fork rows of no number \"$rows\"" 1 "kvscratchctl fork: branch: expected a number of rows behind the @, got \"$rows\""
	done
	run kvscratchctl fork nobody twig
	expect "fork what nobody holds" 2 "kvscratchctl fork: no pads are held as \"nobody\": nobody listens on $directory/kvscratch/nobody"
	run kvscratchctl fork branch/pad ../twig
	expect "fork to a name that leads elsewhere" 1 "kvscratchctl fork: the name of a holder: expected 1 to 63 of A-Z a-z 0-9 . _ - and no dot first, got \"..\""
	run kvscratchctl fork branch
	expect "fork to what" 1 "kvscratchctl fork: expected SRC or SRC@ROWS, and HOLDER or HOLDER/PAD"
	run kvscratchctl fork branch twig leaf
	expect "an argument too many of two" 1 "kvscratchctl fork: unexpected argument \"leaf\""
	run kvscratchctl fork branch ''
	expect "fork to nothing" 1 "kvscratchctl fork: expected an argument that is not empty, see --help"
	run kvscratchctl ls --json --tree
	expect "ls of two kinds" 1 "kvscratchctl ls: expected either --json or --tree, got both"
	kvscratchctl drop final
	run kvscratchctl drop branch
	expect "nothing was started that did not succeed" 0 "$(kvscratchctl ls)"
}

# refused_planes NAME LIST MESSAGE
refused_planes() {
	run kvscratchctl create --max-seq-len 4 --planes "$2" -- true
	expect "planes: $1" 1 "kvscratchctl create: $3"
}

# refused_file NAME JSON MESSAGE
refused_file() {
	printf '%s' "$2" >bad.json
	run kvscratchctl create --max-seq-len 4 --planes-file bad.json -- true
	expect "a file of planes: $1" 1 "kvscratchctl create: $3"
}

new_planes()
{
	dtypes='expected a dtype of f64 f32 f16 bf16 i64 i32 i16 i8 u8 or mxint8'
	run kvscratchctl create --max-seq-len 4 --planes 'k0:64,k1:64:mxint8:f32,:3:i16:f64:8,x:1:i64::40' -- sh -c 'kvscratchctl info >described; kvscratchctl info --json >planes.json; head -n 6 described'
	expect "planes of every kind" 0 "Scratchpad(len=0, capacity=4, planes=4)
plane k0: 64 f32
plane k1: 64 mxint8, from f32
plane 2: 3 i16 with 8 fraction bits, from f64
plane x: 1 i64 with 40 fraction bits
0 saturated"
	run kvscratchctl create --max-seq-len 4 --planes-file planes.json -- sh -c 'kvscratchctl info | cmp - described'
	expect "planes as info --json tells them" 0 ""
	echo ' [ {"label": "k\u0030", "dim": 2, "note": [1, {}]} ] ' >planes.json
	# shellcheck disable=SC1003 # a backslash
	run kvscratchctl create --max-seq-len 4 --planes-file planes.json --tag 'a "b" \' -- sh -c 'kvscratchctl info | head -n 2; kvscratchctl info --json | grep -oE "\"(tag|label)\": \"[^\"]*\""'
	expect "a list of planes, and a tag" 0 'Scratchpad(len=0, capacity=4, dim=2)
tag: a "b" \x5c
"tag": "a \u0022b\u0022 \u005c"
"label": "k0"'
	run sh -c 'kvscratchctl create --max-seq-len 4 --planes-file - -- kvscratchctl info <planes.json | head -n 1'
	expect "planes from stdin" 0 "Scratchpad(len=0, capacity=4, dim=2)"
	refused_planes "no dim" k0 "--planes: plane 0: expected LABEL:DIM[:DTYPE[:INPUT[:FRAC-BITS]]], got no DIM"
	refused_planes "one too few" k0:1, "--planes: plane 1: expected LABEL:DIM[:DTYPE[:INPUT[:FRAC-BITS]]], got no DIM"
	refused_planes "a field too many" k0:1:f32:f32:0:0 "--planes: plane 0: expected LABEL:DIM[:DTYPE[:INPUT[:FRAC-BITS]]], got more"
	refused_planes "an unknown dtype" k0:1,v0:1:f33 "--planes: plane 1: $dtypes, got \"f33\""
	refused_planes "a dim that is none" k0:x "--planes: plane 0: dim: expected a whole number, got \"x\""
	refused_planes "a dim of 0" k0:0 "--planes: plane 0: dim: expected 1 to 16777216, got 0"
	refused_planes "a label too long" k234567890123456:1 "--planes: plane 0: expected a label of at most 15 bytes, got 16"
	refused_planes "half a block" k0:1,v0:33:mxint8 "plane 1: dim: expected a multiple of 32 for mxint8, got 33"
	refused_planes "too many" "$(seq -s , 4097 | sed 's/[0-9]*/k:1/g')" "--planes: expected at most 4096 planes, got more"
	refused_file "no JSON" "[{]" "bad.json: expected a key of a plane at byte 2, got ']'"
	refused_file "no list" '{"len": 3}' 'bad.json: expected an object with "planes", got none'
	refused_file "two lists" '{"planes": [], "planes": []}' 'bad.json: expected one list "planes", got two'
	refused_file "no dim" '[{"label": "k0"}]' "bad.json: plane 0: expected a dim, got none"
	refused_file "no planes" '[]' "planes: expected 1 to 4096, got 0"
	refused_file "fraction bits" '[{"dim": 1, "dtype": "i8", "frac_bits": 63}]' "bad.json: plane 0: fraction bits: expected 0 to 62, got 63"
	refused_file "something behind it" '[{"dim": 1}] x' "bad.json: expected its end at byte 13, got 'x'"
	refused_file "nothing" '' "bad.json: expected a list of planes at byte 0, got its end"
	run kvscratchctl create --max-seq-len 4 --planes-file nix.json -- true
	expect "no file of planes" 1 "kvscratchctl create: nix.json: cannot open: No such file or directory"
	run kvscratchctl create --max-seq-len 4 --planes-file bad.json --planes k0:1 -- true
	expect "planes twice" 1 "kvscratchctl create: expected either --planes or --planes-file, got both"
	run kvscratchctl create --max-seq-len 4 --planes k0:1 --dtype f16 -- true
	expect "planes and a dtype" 1 "kvscratchctl create: expected planes or --dim, --dtype, --input and --frac-bits of the only one, got both"
	run kvscratchctl create --max-seq-len 4 --dim 1 --tag "$(printf '%65s' '')" -- true
	expect "a tag too long" 1 "kvscratchctl create: --tag: expected at most 64 bytes, got 65"
}

# k0 is [10, 4] u8, v0 [10, 1] i16 with 3 fraction bits
planes()
{
	printf 'abcd\001\000' >token
	printf 'abcdefgh' >k
	printf '\001\000\002\000' >v
	run kvscratchctl append token
	expect "append a token" 0 ""
	run kvscratchctl append --plane k0=k --plane 1=v
	expect "append by plane" 0 ""
	run kvscratchctl dump
	expect "dump planes" 0 "k0: 97 98 99 100
v0: 0.125
k0: 97 98 99 100
v0: 0.125
k0: 101 102 103 104
v0: 0.25"
	run kvscratchctl dump --plane v0
	expect "dump a plane by its label" 0 "0.125
0.125
0.25"
	run sh -c 'kvscratchctl dump --plane 0 --format raw; kvscratchctl dump --format raw | head -c 6 | cmp - token'
	expect "dump a plane by its index, and tokens" 0 "abcdabcdefgh"
	run kvscratchctl dump --json
	expect "planes as JSON" 0 "[[[97, 98, 99, 100], [0.125]],
 [[97, 98, 99, 100], [0.125]],
 [[101, 102, 103, 104], [0.25]]]"
	run kvscratchctl dump --format npy
	expect "planes as .npy" 1 "kvscratchctl dump: --format: .npy has one array: expected --plane with it"
	kvscratchctl dump --format npy --plane k0 -o k.npy
	run kvscratchctl append --plane v0=v --plane k0=k.npy
	expect "planes of different lengths" 1 "kvscratchctl append: v: expected 3 rows, as of plane 0, got 2"
	run kvscratchctl append k.npy
	expect "tokens of several dtypes as .npy" 1 "kvscratchctl append: k.npy: expected raw tokens, for the planes take several dtypes, got .npy: --plane takes one for each"
	run kvscratchctl append k
	expect "bytes too many for a token" 1 "kvscratchctl append: k: expected rows of 6 bytes, got 1 rows and 2 bytes"
	run kvscratchctl append --plane k0=k
	expect "a plane too few" 1 "kvscratchctl append: --plane: expected a file for each of 2 planes, got none for plane 1, \"v0\""
	run kvscratchctl append --plane k0=k --plane 0=v
	expect "a plane twice" 1 "kvscratchctl append: --plane: expected one file for each, got \"k\" and \"v\""
	run kvscratchctl append --plane k1=k
	expect "a plane that is not there" 1 "kvscratchctl append: --plane: no plane is called \"k1\""
	run kvscratchctl append --plane 2=k
	expect "a plane that is not there, by its index" 1 "kvscratchctl append: --plane: no plane is called \"2\""
	run kvscratchctl append --plane k0
	expect "a plane without a file" 1 "kvscratchctl append: --plane: expected PLANE=FILE, got \"k0\""
	run kvscratchctl append --plane k0=k k
	expect "a plane and all of them" 1 "kvscratchctl append: expected either --plane or FILE, got both"
	run kvscratchctl watch --plane k0
	expect "watch a plane without its rows" 1 "kvscratchctl watch: --plane: expected --rows with it"
	run kvscratchctl watch --rows --until 3
	expect "watch planes" 0 "0 k0: 97 98 99 100
0 v0: 0.125
1 k0: 97 98 99 100
1 v0: 0.125
2 k0: 101 102 103 104
2 v0: 0.25
Scratchpad(len=3, capacity=10, planes=2)"
	run kvscratchctl watch --rows --plane v0 --until 3
	expect "watch a plane" 0 "0: 0.125
1: 0.125
2: 0.25
Scratchpad(len=3, capacity=10, planes=2)"
	run kvscratchctl create --max-seq-len 4 --planes k0:3,v0:1 -- sh -c 'kvscratchctl append numpy && kvscratchctl dump'
	expect "tokens of one dtype as .npy" 0 "k0: 1 2 3
v0: 4
k0: -0.5 0.100000001 inf
v0: nan
k0: 0 1.40129846e-45 3.40282347e+38
v0: -2"
}

# The writer, and the end of it
writers()
{
	run display
	expect "a pad without a writer" 0 "Scratchpad(len=0, capacity=10, planes=2)
plane k0: 4 u8
plane v0: 1 i16 with 3 fraction bits
tag: toy"
	run kvscratchctl takeover
	expect "take over" 0 ""
	run sh -c 'kvscratchctl info --json | grep -oE "\"epoch.*\"sealed\": [a-z]*"'
	expect "an epoch later" 0 '"epoch": 1, "writer": false, "sealed": false'
	if [ "$backend" = kernel ]; then
		run kvscratchctl takeover -- sh -c '
		kvscratchctl --fd 4 append token
		kvscratchctl --fd 4 append --plane k0=k --plane v0=v
		kvscratchctl append --plane k0=k --plane v0=v && kvscratchctl append token
		kvscratchctl info | grep epoch
		kvscratchctl dump
		kvscratchctl --fd 4 takeover
		kvscratchctl append token' 4>&3
		expect "a command as the writer" 2 "kvscratchctl append: descriptor 4: cannot append: another handle is the pad's writer
kvscratchctl append: descriptor 4: cannot become the writer: another handle is the pad's writer
epoch 2, with a writer
kvscratchctl dump: descriptor 3: expected it open for read, got write only
kvscratchctl append: descriptor 3: cannot append: another handle took over as the pad's writer"
	else
		kvscratchctl append --plane k0=k --plane v0=v
		kvscratchctl append token
		run kvscratchctl takeover -- true
		expect "a command as the writer" 2 "kvscratchctl takeover: expected no COMMAND for a pad in a memfd, whose writer cannot be passed on"
	fi
	run kvscratchctl info
	case $output in *"(len=3, "*", without a writer"*) ;; *) status=9 ;; esac
	result "$status" "the role is free again"
	run kvscratchctl watch --until 3
	expect "watch before the seal" 0 "Scratchpad(len=3, capacity=10, planes=2)"
	run kvscratchctl seal
	expect "seal" 0 ""
	run kvscratchctl seal
	expect "seal again" 0 ""
	run kvscratchctl append token
	expect "append to what is sealed" 2 "kvscratchctl append: descriptor 3: cannot append: the pad is sealed"
	run kvscratchctl takeover
	expect "take over what is sealed" 2 "kvscratchctl takeover: descriptor 3: cannot become the writer: the pad is sealed"
	run sh -c 'kvscratchctl info | grep sealed; kvscratchctl info --json | grep -o "\"sealed\": true"'
	expect "info of what is sealed" 0 'sealed
"sealed": true'
	run kvscratchctl watch
	expect "watch ends with the seal" 0 "Scratchpad(len=3, capacity=10, planes=2)
sealed"
	run kvscratchctl watch --json
	expect "watch ends with the seal, as JSON" 0 '{"len": 3, "generation": 0}
{"sealed": true}'
	run kvscratchctl watch --until 4
	expect "rows that never come" 2 "Scratchpad(len=3, capacity=10, planes=2)
sealed
kvscratchctl watch: --until: expected 4 rows, got 3 when the pad was sealed"
}

files()
{
	kvscratchctl append rows
	run kvscratchctl save saved.npy
	expect "save as .npy" 0 ""
	run cmp saved.npy numpy
	expect "as NumPy does" 0 ""
	run kvscratchctl save saved.safetensors
	expect "save as .safetensors" 0 ""
	run kvscratchctl load saved.safetensors
	expect "load behind the rows that are there" 0 ""
	run display
	expect "what was loaded" 0 "Scratchpad(len=6, capacity=10, dim=4)
epoch 1, without a writer"
	run kvscratchctl load saved.safetensors -- sh -c 'kvscratchctl info | head -n 1; kvscratchctl dump'
	expect "load for a command" 0 "Scratchpad(len=3, capacity=10, dim=4)
1 2 3 4
-0.5 0.100000001 inf nan
0 1.40129846e-45 3.40282347e+38 -2"
	run kvscratchctl --fd 8 load --max-seq-len 4 saved.npy -- sh -c 'kvscratchctl --fd 8 info | head -n 1; exit 5'
	expect "its descriptor, its capacity and its exit status" 5 "Scratchpad(len=3, capacity=4, dim=4)"
	run kvscratchctl load --max-seq-len 2 saved.npy -- true
	expect "load into too little" 1 "kvscratchctl load: saved.npy: max_seq_len: expected at least 3, the rows in the file, got 2"
	run kvscratchctl load --max-seq-len 5 saved.npy
	expect "a capacity for nobody" 1 "kvscratchctl load: --max-seq-len: expected --name or -- COMMAND with it"
	run kvscratchctl save rows.txt
	expect "save as something else" 1 "kvscratchctl save: rows.txt: expected the name of a file that ends in .npy or .safetensors"
	head -c 100 saved.safetensors >cut.safetensors
	run kvscratchctl load cut.safetensors
	case $output in *"got a file that ends after "*) ;; *) status=9 ;; esac
	[ "$status" = 1 ]
	result $? "load what was cut"
	run kvscratchctl load nix.npy
	expect "load nothing" 1 "kvscratchctl load: nix.npy: cannot open the file: No such file or directory"
	# A signal once the new file is there: the old one stays, and nothing beside it. Where the
	# signal comes late the new one takes its place.
	mkdir saves
	# shellcheck disable=SC2016 # for another shell
	kvscratchctl create --max-seq-len 16 --dim 4194304 --dtype u8 -- sh -c '
	head -c 67108864 /dev/zero | kvscratchctl append --no-progress
	for signal in TERM HUP; do
		kvscratchctl save saves/a.npy &
		while kill -0 $! && ! ls -l /proc/$!/fd | grep -q saves/; do :; done
		kill -$signal $!
		wait $!
		echo "$? $(ls -A saves)"
		echo old >saves/a.npy
	done' 2>/dev/null >interrupted
	run cat interrupted
	case $output in
	"143 
129 a.npy" | "0 a.npy
129 a.npy" | "143 
0 a.npy" | "0 a.npy
0 a.npy") ;;
	*) status=9 ;;
	esac
	result "$status" "saves that are interrupted"
	kvscratchctl hold story --write
	run kvscratchctl -n story load saved.npy
	expect "load into a holder" 0 ""
	run kvscratchctl -n story/k0 load saved.safetensors
	expect "load by name" 0 ""
	kvscratchctl -n story/k0 truncate --len 2
	run kvscratchctl -n story save all.safetensors
	expect "save all pads of a holder" 0 ""
	run kvscratchctl -n story load all.safetensors
	expect "load what is there" 2 "kvscratchctl load: story: a pad \"pad\" is held already"
	run kvscratchctl -n story save all.npy
	expect "save all pads as .npy" 1 "kvscratchctl save: all.npy: .npy has room for one pad: expected 1, got 2"
	kvscratchctl hold again --write
	run kvscratchctl -n again load all.safetensors
	expect "load all pads of a file" 0 ""
	run kvscratchctl -n again/other load --pad k0 all.safetensors
	expect "load one of them as another" 0 ""
	run kvscratchctl -n again/nix load all.safetensors
	expect "load one that is not there" 1 "kvscratchctl load: all.safetensors: expected the name of a pad in the file, which has pad k0, got \"nix\""
	run kvscratchctl ls
	expect "what the holders have" 0 "again/pad: Scratchpad(len=3, capacity=3, dim=4)
again/k0: Scratchpad(len=2, capacity=10, dim=4)
again/other: Scratchpad(len=2, capacity=10, dim=4)
story/pad: Scratchpad(len=3, capacity=3, dim=4)
story/k0: Scratchpad(len=2, capacity=10, dim=4)"
	kvscratchctl drop again
	kvscratchctl drop story
}

# A cache of "k 0", [8, 4] u8, v, [8, 32] mxint8 of f32, and one without a label, [8, 1] i16
files_of_planes()
{
	{ printf abcd; head -c 128 /dev/zero; printf '\005\000'; } >token
	cat token token | kvscratchctl append
	run kvscratchctl save cache.npy
	expect "planes as a file of .npy" 1 "kvscratchctl save: cache.npy: .npy has room for one plane: expected a name that ends in .safetensors, or one of the 3 planes"
	run kvscratchctl save --plane "k 0" plane.npy
	expect "save a plane by its label" 0 ""
	run sh -c 'kvscratchctl dump --plane "k 0" --format npy | cmp - plane.npy'
	expect "it is what dump writes" 0 ""
	run kvscratchctl save --plane 2 plane.npy
	expect "save a plane by its index" 0 ""
	run sh -c 'kvscratchctl dump --plane 2 --format npy | cmp - plane.npy'
	expect "it is what dump writes of it" 0 ""
	run kvscratchctl save --plane k plane.npy
	expect "save a plane that is not there" 1 "kvscratchctl save: --plane: no plane is called \"k\""
	run kvscratchctl save --plane v plane.npy
	expect "save a plane of mxint8 as .npy" 1 "kvscratchctl save: plane.npy: .npy has no type for mxint8: expected a name that ends in .safetensors"
	run kvscratchctl save --plane v plane.safetensors
	expect "save a plane as .safetensors" 1 "kvscratchctl save: plane.safetensors: expected the name of a file that ends in .npy for a single plane"
	run kvscratchctl save cache.safetensors
	expect "save planes" 0 ""
	display >saved
	kvscratchctl append token
	kvscratchctl load cache.safetensors -- sh -c 'kvscratchctl append token && kvscratchctl dump --format raw' >got
	run sh -c 'kvscratchctl dump --format raw | cmp - got'
	expect "load planes, which convert as they did" 0 ""
	kvscratchctl hold cache --write
	kvscratchctl -n cache load cache.safetensors
	run display -n cache/pad
	[ "$status" = 0 ] && [ "$output" = "$(cat saved)
epoch 1, without a writer" ]
	result $? "labels and the tag are those of the pad that was saved"
	run kvscratchctl -n cache save --plane "k 0" again.npy
	expect "save a plane of a holder's only pad" 0 ""
	kvscratchctl load cache.safetensors
	run kvscratchctl info
	case $output in "Scratchpad(len=5, "*) ;; *) status=9 ;; esac
	[ "$status" = 0 ]
	result $? "load planes behind others"
	run kvscratchctl load plane.npy
	expect "load one plane into several" 1 "kvscratchctl load: plane.npy: expected the rows of 3 planes, got those of 1"
	run kvscratchctl create --max-seq-len 8 --planes "k 0:4:u8,v:32:mxint8:f32,:1:i16" --tag another -- kvscratchctl load cache.safetensors
	expect "load what is of another tag" 1 "kvscratchctl load: cache.safetensors: tag: expected the one of the pad, got another"
	kvscratchctl drop cache
}

# cells ROWS: a token of zeros, token 7 and its position, for each row
cells()
{
	for position in $1; do
		head -c 128 /dev/zero
		printf %b "\\007\\000\\000\\000\\00$position\\000\\000\\000"
	done
}

# What the plug-in for ggml leaves, and what its engine is given back
llamas()
{
	kvscratchctl hold llama --write --max-seq-len 8 --planes k0:32:f16,v0:32:f16,cells:2:i32 \
		--tag "ggml k=f16 v=q8_0 0123456789abcdef my \"own\""
	kvscratchctl create --max-seq-len 8 --planes k0:32:f16,v0:32:f16,cells:2:i32 --tag "ggml k=f16 v=f16 fedcba9876543210" -- \
		kvscratchctl put --write llama/seq0
	kvscratchctl create --max-seq-len 8 --dim 2 -- kvscratchctl put --write llama/other
	cells "0 1 2" | kvscratchctl -n llama/seq0 append
	run sh -c 'kvscratchctl llama ls llama | sed "s/[1-9][0-9]* bytes/... bytes/"'
	expect "llama ls, of what is a cache" 0 "pad: 0 tokens, ... bytes own, 0 shared, k f16, v q8_0, model 0123456789abcdef my \"own\"
seq0: 3 tokens, ... bytes own, 0 shared, k f16, v f16, model fedcba9876543210"
	run sh -c 'kvscratchctl llama ls --json llama | grep -o "\"tokens\": [0-9]*\|\"text\".*}"'
	expect "llama ls --json" 0 '"tokens": 0
"text": "my \u0022own\u0022"}
"tokens": 3
"text": ""}'
	run kvscratchctl llama ticket llama/seq0 ticket
	expect "llama ticket" 0 ""
	run sh -c 'od -An -v -tx4 -w4 ticket | head -n 24 | tr -d "\n"'
	# magic, version, tokens, streams, cells, no transposition, a layer, no rotation, f16, row, rows
	expect "a sequence, as llama.cpp has it" 0 " 67677371 00000004 00000003 00000007 00000007 00000007 00000001\
 00000003 00000000 00000001 00000000 00000001 00000001 00000000 00000002 00000001 00000000\
 00000000 00000001 00000000 00000000 00000001 00000040 00000000"
	run sh -c 'tail -c +97 ticket | head -c 26; wc -c <ticket'
	expect "the ticket in the place of the rows" 0 "KVSCRATCH-TICKETllama/seq0$((96 + 2 * 192 + 12))"
	run sh -c 'kvscratchctl llama ticket --state-version 3 --len 2 llama/seq0 ticket && od -An -tu4 -j4 -N8 ticket'
	expect "of another version, and less of it" 0 "          3          2"
	for rows in 0 4; do
		run kvscratchctl llama ticket --len $rows llama/seq0 ticket
		expect "a ticket of $rows rows" 1 "kvscratchctl llama: llama/seq0: expected 1 to 3 rows, got $rows"
	done
	run kvscratchctl llama ticket llama/other ticket
	expect "a ticket of another pad" 1 "kvscratchctl llama: llama/other: expected a pad of kvscratch-ggml, got another"
	run kvscratchctl llama ticket --state-version 5 llama/seq0 ticket
	expect "a ticket of a version that nobody knows" 1 "kvscratchctl llama: --state-version: expected 3 or 4, got 5"
	run kvscratchctl llama ticket llama/none ticket
	expect "a ticket of nothing" 2 "kvscratchctl llama: llama: there is no pad \"none\""
	run kvscratchctl llama ticket llama/a-name-of-forty-bytes-and-one-more-x ticket
	expect "a ticket of a long name" 1 "kvscratchctl llama: expected a name of at most 40 bytes, got \"llama/a-name-of-forty-bytes-and-one-more-x\""
	cells 0 | kvscratchctl -n llama/pad append
	run kvscratchctl llama ticket llama/pad ticket
	expect "a ticket of rows that are rotated" 1 "kvscratchctl llama: llama/pad: expected f32, f16 or bf16 for version 4, which rotates quantized rows, got q8_0"
	{ head -c 128 /dev/zero; head -c 8 /dev/zero | tr '\000' '\377'; } | kvscratchctl -n llama/seq0 append
	run kvscratchctl llama ticket llama/seq0 ticket
	expect "a ticket of a token that is not known" 1 "kvscratchctl llama: llama/seq0: expected the token and the position of each row, row 3 has -1 and -1"
	run sh -c 'od -An -tu4 -j4 -N8 ticket'
	expect "what was refused left the file alone" 0 "          3          2"
	run kvscratchctl llama give
	expect "llama with another word" 1 'kvscratchctl llama: expected ls, ticket, restore or tail, got "give"'
	run kvscratchctl llama ticket llama/seq0 a b
	expect "llama with more" 1 'kvscratchctl llama: unexpected argument "b"'
	run kvscratchctl llama ls nobody
	expect "llama ls of nobody" 2 "kvscratchctl llama: no pads are held as \"nobody\": nobody listens on $XDG_RUNTIME_DIR/kvscratch/nobody"
	kvscratchctl drop llama
}

# A pad of one layer, whose rows are small, as llama/seq0; and three tokens
hold_llama()
{
	kvscratchctl hold llama --write
	kvscratchctl create --max-seq-len 8 --planes k0:32:f16,v0:32:f16,cells:2:i32 --tag "ggml k=f16 v=f16 0123456789abcdef" -- \
		kvscratchctl put --write llama/seq0
	cells "0 1 2" | kvscratchctl -n llama/seq0 append
}

llama_refusals()
{
	hold_llama
	kvscratchctl create --max-seq-len 8 --planes k0:32:f16,cells:2:i32 --tag "ggml k=f16 v=- 0" -- kvscratchctl put --write llama/keys
	kvscratchctl create --max-seq-len 8 --planes k0:2:f16,v0:2:f16,cells:2:i32 --tag "$(printf 'ggml k=f16 v=f16 0 \033[2J')" -- kvscratchctl put --write llama/small
	head -c 72 /dev/zero | kvscratchctl -n llama/keys append
	head -c 32 /dev/zero | kvscratchctl -n llama/small append
	run kvscratchctl llama ticket llama/keys ticket
	expect "a ticket without values" 1 "kvscratchctl llama: llama/keys: the values are not in the pad: flash attention is off"
	run kvscratchctl llama ticket llama/small ticket
	expect "a ticket that does not fit" 1 "kvscratchctl llama: llama/small: expected rows of 64 bytes at the least, got 2 of 4"
	run sh -c 'kvscratchctl llama ls llama | sed -n "s/^small: .*, model/model/p"'
	expect "llama ls of a text for terminals" 0 'model 0000000000000000 \x1b[2J'
	run kvscratchctl llama ls --len 2 llama
	expect "llama ls with an option of another" 1 "kvscratchctl llama: ls: unexpected option, see --help"
	run kvscratchctl llama ls
	expect "llama ls of what" 1 "kvscratchctl llama: ls: expected HOLDER"
	run kvscratchctl llama tail llama/seq0 more
	expect "llama tail of more" 1 "kvscratchctl llama: tail: expected HOLDER/PAD"
	kvscratchctl drop llama
}

# tail_rollback OPTION...: each step waits until the tail has told of the one before
tail_rollback()
{
	kvscratchctl llama tail "$@" --until 5 llama/seq0 >tokens &
	exec 6<tokens
	head -n 3 <&6
	kvscratchctl -n llama/seq0 truncate --len 1
	head -n 1 <&6
	cells "1 2" | kvscratchctl -n llama/seq0 append
	head -n 2 <&6
	cells "3 4" | kvscratchctl -n llama/seq0 append
	head -n 2 <&6
	wait $!
}

llama_tails()
{
	hold_llama
	mkfifo tokens
	run kvscratchctl llama tail llama/seq0
	expect "llama tail, of what nobody writes" 0 "7 0
7 1
7 2
ended"
	run tail_rollback
	expect "llama tail of a rollback" 0 "7 0
7 1
7 2
rollback to 1
7 1
7 2
7 3
7 4"
	kvscratchctl -n llama/seq0 truncate --len 3
	run tail_rollback --json
	expect "llama tail --json" 0 '{"token": 7, "position": 0}
{"token": 7, "position": 1}
{"token": 7, "position": 2}
{"rollback": 1}
{"token": 7, "position": 1}
{"token": 7, "position": 2}
{"token": 7, "position": 3}
{"token": 7, "position": 4}'
	kvscratchctl -n llama/seq0 truncate --len 2
	run kvscratchctl llama tail --until 3 --timeout 0 llama/seq0
	expect "llama tail of what does not come in time" 2 "7 0
7 1
kvscratchctl llama: --until: expected 3 rows, got 2 when the time was up"
	run kvscratchctl llama tail --until 9 llama/seq0
	expect "llama tail of more than fits" 1 "kvscratchctl llama: --until: expected at most 8, the rows that fit, got 9"
	if [ "$backend" = kernel ]; then
		# shellcheck disable=SC2016 # for another shell
		run kvscratchctl -n llama/seq0 takeover -- sh -c '
		kvscratchctl llama tail llama/seq0 >tokens 3<&- &
		exec 6<tokens
		head -n 2 <&6
		head -c 136 /dev/zero | kvscratchctl append
		head -n 1 <&6
		exec 3<&-
		head -n 1 <&6
		wait $!'
		expect "llama tail ends with the writer" 0 "7 0
7 1
0 0
ended"
	else
		skip "llama tail ends with the writer" "a memfd's writer cannot be passed on"
	fi
	kvscratchctl -n llama/seq0 truncate --len 1
	kvscratchctl -n llama/seq0 seal
	run kvscratchctl llama tail --until 2 llama/seq0
	expect "llama tail of what is sealed" 2 "7 0
sealed
kvscratchctl llama: --until: expected 2 rows, got 1 when the pad was sealed"
	run kvscratchctl llama tail --json llama/seq0
	expect "llama tail --json of what is sealed" 0 '{"token": 7, "position": 0}
{"sealed": true}'
	kvscratchctl drop llama
}

# served ADDRESS ANSWER COMMAND...: run it with $port, where one who listens keeps the request, and
# the file that it names, and gives the answer, or none if it is empty
served()
{
	address=$1 answer=$2
	shift 2
	python3 - "$address" "$answer" >asked <<-'EOF' &
	import re, shutil, socket, sys
	address, answer = sys.argv[1:]
	family = socket.AF_INET6 if ":" in address else socket.AF_INET
	with socket.create_server((address, 0), family=family) as server:
	    print(server.getsockname()[1], flush=True)
	    client, _ = server.accept()
	    request = b""
	    while not request.endswith(b"}"):
	        request += client.recv(65536) or b"}"
	    with open("request", "wb") as file:
	        file.write(request)
	    named = re.search(rb'{"filename": "([\w-]+)"}$', request)
	    if answer:
	        shutil.copy(b"slots/" + named[1], "given")
	    print("asked", flush=True)
	    client.sendall(answer.encode().decode("unicode_escape").encode())
	    if "Content-Length" in answer or not answer:
	        client.recv(1)
	EOF
	exec 6<asked
	read -r port <&6
	export port
	run sh -c "$*"
	exec 6<&-
	# one who was not asked waits
	kill $! 2>/dev/null
	wait $! 2>/dev/null
}

# refused_restore ANSWER MESSAGE, which begins with expected
# shellcheck disable=SC2016 # for another shell
refused_restore()
{
	served 127.0.0.1 "$1" 'kvscratchctl llama restore --slot-dir slots llama/seq0 127.0.0.1:$port; status=$?; ls slots; exit $status'
	expect "llama restore, expected $2" 2 "kvscratchctl llama: 127.0.0.1:$port: expected $2"
}

# shellcheck disable=SC2016 # for other shells
llama_restores()
{
	hold_llama
	mkfifo asked
	mkdir slots
	restored='HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"n_restored": 3}\n'
	served 127.0.0.1 "$restored" 'kvscratchctl llama restore --slot 2 --slot-dir slots llama/seq0 127.0.0.1:$port'
	expect "llama restore" 0 ""
	kvscratchctl llama ticket llama/seq0 ticket
	run sh -c 'cmp ticket given; ls slots; tr -d "\r" <request | sed "s/kvscratch-[0-9a-f]\{16\}/.../; s/:[0-9]*$/:.../"'
	expect "what the server was asked for, and given" 0 'POST /slots/2?action=restore HTTP/1.1
Host: 127.0.0.1:...
Connection: close
Content-Type: application/json
Content-Length: 42

{"filename": "..."}'
	served 127.0.0.1 'HTTP/1.1 200 OK\r\n\r\n{"id_slot": 0, "more": [{}], "n_restored": 2}' 'kvscratchctl llama restore --len 2 --state-version 3 --slot-dir slots llama/seq0 http://localhost:$port/v/'
	expect "llama restore of less, below a prefix" 0 ""
	kvscratchctl llama ticket --len 2 --state-version 3 llama/seq0 ticket
	run sh -c 'cmp ticket given; ls slots; head -n 1 request | tr -d "\r"'
	expect "what it was asked for, and given" 0 "POST /v/slots/0?action=restore HTTP/1.1"
	if [ -e /proc/net/if_inet6 ] && grep -q ' lo$' /proc/net/if_inet6; then
		served ::1 "$restored" 'kvscratchctl llama restore --slot-dir slots llama/seq0 http://[::1]:$port'
		expect "llama restore by IPv6" 0 ""
	else
		skip "llama restore by IPv6" "there is none here"
	fi
	refused_restore 'HTTP/1.1 400 Bad Request\r\n\r\n{"error": {"code": 400, "message": "Unable \\u001b[2Jto\\nrestore"}}' "status 200, got 400: Unable  [2Jto restore"
	refused_restore 'HTTP/1.1 501 No\r\n\r\n<html>' "status 200, got 501: no message"
	refused_restore 'HTTP/1.1 200 OK\r\n\r\n{"n_restored": 1}' "3 tokens to be restored, got 1"
	refused_restore 'HTTP/1.1 200 OK\r\n\r\n{"status": "ok"}' "an answer of llama-server, got another"
	refused_restore 'SSH-2.0-OpenSSH\r\n\r\n' "an answer of HTTP, got another"
	# the port of the server that is gone
	run sh -c 'kvscratchctl llama restore --slot-dir slots llama/seq0 127.0.0.1:$port; status=$?; ls slots; exit $status'
	expect "llama restore by nobody" 2 "kvscratchctl llama: 127.0.0.1:$port: cannot connect: Connection refused"
	served 127.0.0.1 '' 'kvscratchctl llama restore --timeout 0 --slot-dir slots llama/seq0 127.0.0.1:$port; status=$?; ls slots; exit $status'
	output=$(echo "$output" | sed 's/cannot connect:/no answer:/')
	expect "llama restore by one who does not answer in time" 2 "kvscratchctl llama: 127.0.0.1:$port: no answer: Connection timed out"
	served 127.0.0.1 '' '
	exec 2>/dev/null
	kvscratchctl llama restore --timeout 900 --slot-dir slots llama/seq0 127.0.0.1:$port &
	read -r line <&6
	kill $!
	wait $!
	echo $? $line; ls slots'
	expect "llama restore that is interrupted" 0 "143 asked"
	kvscratchctl drop llama
}

llama_servers()
{
	hold_llama
	for server in 127.0.0.1 :80 127.0.0.1: 127.0.0.1:0 127.0.0.1:65536 127.0.0.1:8x llama.example:80 '[::1:80' https://127.0.0.1:80 \
		127.0.0.1:80/?x '127.0.0.1:80/a b'; do
		run kvscratchctl llama restore --slot-dir . llama/seq0 "$server"
		expect "a server $server" 1 "kvscratchctl llama: expected ADDRESS:PORT or http://ADDRESS:PORT, got \"$server\""
	done
	run kvscratchctl llama restore llama/seq0 127.0.0.1:80
	expect "llama restore from nowhere" 1 "kvscratchctl llama: expected --slot-dir, the --slot-save-path of the server"
	run kvscratchctl llama restore --slot-dir nowhere llama/seq0 127.0.0.1:80
	case $output in *"kvscratchctl llama: nowhere/kvscratch-"*": cannot make: No such file or directory") ;; *) status=9 ;; esac
	[ "$status" = 2 ]
	result $? "llama restore from a directory that is not there"
	kvscratchctl drop llama
}

if [ $# -gt 0 ]; then
	"$1"
	exit 0
fi

script=$(realpath "$0")
directory=$(mktemp -d) && cd "$directory" || exit 1
trap 'rm -rf "$directory"' EXIT
if [ -n "${KVSCRATCHCTL:-}" ]; then
	mkdir bin && ln -s "$KVSCRATCHCTL" bin/kvscratchctl
	PATH=$directory/bin:$PATH
fi
echo 0 >count

# How many promises each backend keeps
backend=$(kvscratchctl create --max-seq-len 1 --dim 1 -- kvscratchctl info --json |
	sed 's/.*"backend": "\([a-z]*\)".*/\1/')
case $backend in
kernel) kept=13 ;;
memfd) kept=6 ;;
*)
	echo "Bail out! expected kvscratchctl info to name a backend, got \"$backend\""
	exit 1
	;;
esac
export backend directory kept script XDG_RUNTIME_DIR="$directory"

# 1 2 3 4, -0.5 0.1 inf nan, 0 1e-45 3.4028234664e38 -2
printf '\000\000\200\077\000\000\000\100\000\000\100\100\000\000\200\100' >row0
printf '\000\000\000\277\315\314\314\075\000\000\200\177\000\000\300\177' >row1
printf '\000\000\000\000\001\000\000\000\377\377\177\177\000\000\000\300' >row2
cat row0 row1 row2 >rows
# as numpy.save() writes it
printf "\223NUMPY\001\000v\000%-117s\n" "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }" >numpy
cat rows >>numpy

echo TAP version 13
usage
no_pads
with_pad life --max-seq-len 10 --dim 4 --dtype f32
with_pad containers --max-seq-len 100 --dim 4 --dtype f32
with_pad text_of_bytes --max-seq-len 100 --dim 1 --dtype u8
with_pad outputs --max-seq-len 10 --dim 4 --dtype f32
dtypes
with_pad mxint8 --max-seq-len 4 --dim 32 --dtype mxint8 --input f32
with_pad records --max-seq-len 4 --dim 32 --dtype mxint8
with_pad fixed_point --max-seq-len 4 --dim 2 --dtype i16 --input f64 --frac-bits 8
with_pad watch --max-seq-len 10 --dim 1 --dtype i8
with_pad json --max-seq-len 4 --dim 2 --dtype f32
commands
new_planes
with_pad planes --max-seq-len 10 --planes k0:4:u8,v0:1:i16::3
with_pad writers --max-seq-len 10 --planes k0:4:u8,v0:1:i16::3 --tag toy
with_pad holders --max-seq-len 4 --dim 2
forks
with_pad files --max-seq-len 10 --dim 4
with_pad files_of_planes --max-seq-len 8 --planes "k 0:4:u8,v:32:mxint8:f32,:1:i16" --tag "of a model"
llamas
llama_refusals
llama_tails
llama_servers
if command -v python3 >/dev/null; then
	llama_restores
else
	skip "llama restore" "there is no Python to serve"
fi
echo "1..$(cat count)"
