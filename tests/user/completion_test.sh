#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# What the bash completions offer, against what the tools take. Prints TAP.
# usage: completion_test.sh BUILD-DIRECTORY
set -euo pipefail
export LC_ALL=C
root=$(realpath "$(dirname "$0")/../..")
build=$(realpath "$1")
PATH=$build:$PATH
# sources of others, not made for the options above
set +eu
# shellcheck source=/dev/null
. /usr/share/bash-completion/bash_completion
# shellcheck source=/dev/null
. "$root/tools/completion/kvscratchctl"
# shellcheck source=/dev/null
. "$root/tools/completion/kvdecode"
cd "$(mktemp -d)" || exit 1
mkdir model
touch model/tok512.bin model/stories260K.bin rows.npy notes
XDG_RUNTIME_DIR=$(mktemp -d)
export XDG_RUNTIME_DIR
count=0

# result STATUS NAME OUTPUT
result() {
	count=$((count + 1))
	if [ "$1" = 0 ]; then
		echo "ok $count - $2"
	else
		printf '# %s\n' "$3"
		echo "not ok $count - $2"
	fi
}

# What is offered for a line whose last word is not finished, one a line
offered() {
	COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9 COMP_KEY=9
	read -ra COMP_WORDS <<<"$1"
	[[ $1 != *' ' ]] || COMP_WORDS+=('')
	COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
	COMPREPLY=()
	local command=${COMP_WORDS[0]}
	"_$command" "$command" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}" 2>/dev/null
	printf '%s\n' "${COMPREPLY[@]}" | sort
}

# offers LINE WORD...: just these
offers() {
	local line=$1 expected got
	shift
	expected=$(printf '%s\n' "$@" | sort)
	got=$(offered "$line")
	[ "$expected" = "$got" ]
	result $? "$line" "expected $(xargs <<<"$expected"); got $(xargs <<<"$got")"
}

# The words of the error for a value that is none, between "expected" and ", got"
values_of() {
	"$@" nonsense 2>&1 </dev/null | sed -nE 's/.*: expected (.*), got "nonsense".*/\1/p' |
		sed 's/,\| or\b\| and\b//g'
}

# The formats that append does not refuse; it looks at them first
formats_of_append() {
	local format
	for format in $(values_of kvscratchctl dump --format); do
		[[ $(kvscratchctl append --format "$format" 2>&1) == *--format* ]] || echo "$format"
	done
}

options_of() { "$@" --help | grep -oE '^  +(-., )?--[a-z-]+' | grep -oE -- '--[a-z-]+'; }

mapfile -t verbs < <(kvscratchctl --help | sed -nE 's/^  ([a-z]+)  +.*/\1/p')

echo TAP version 13
offers 'kvscratchctl ' "${verbs[@]}"
offers 'kvscratchctl tr' truncate
offers 'kvscratchctl --fd 5 tr' truncate
offers 'kvscratchctl --name story tr' truncate
offers 'kvscratchctl --' --fd --help --name
for verb in "${verbs[@]}"; do
	mapfile -t options < <(options_of kvscratchctl "$verb"; echo --help)
	usage=$(kvscratchctl "$verb" --help | grep -E '^(Usage: |   )')
	[[ $usage != *'--fd N'* ]] || options+=(--fd)
	[[ $usage != *'-n NAME'* ]] || options+=(--name)
	offers "kvscratchctl $verb --" "${options[@]}"
done
offers 'kvscratchctl -n story dump --fo' --format
# shellcheck disable=SC2046 # words
{
	offers 'kvscratchctl create --dtype ' $(values_of kvscratchctl create --dtype)
	offers 'kvscratchctl create --dim 5 --dtype mx' mxint8
	offers 'kvscratchctl hold story --input ' f64 f32 f16 bf16
	offers 'kvscratchctl dump --format ' $(values_of kvscratchctl dump --format)
	offers 'kvscratchctl append --format ' $(formats_of_append)
	offers 'kvdecode --cache ' $(values_of kvdecode --cache)
	offers 'kvdecode --kv ' $(values_of kvdecode --kv)
}
offers 'kvscratchctl append ro' rows.npy
offers 'kvscratchctl append ' model notes rows.npy
offers 'kvscratchctl dump -o no' notes
offers 'kvscratchctl dump --output no' notes
offers 'kvscratchctl watch --socket no' notes
offers 'kvscratchctl truncate --len ' ''
offers 'kvscratchctl create --max-seq-len 5 --planes ' ''
offers 'kvscratchctl create --max-seq-len 5 --planes-file no' notes
offers 'kvscratchctl create --tag ' ''
offers 'kvscratchctl create --max-seq-len 5 --dim 4 -- kvdecode --wa' --wait-reader

# held pads
export KVSCRATCH_BACKEND=memfd
kvscratchctl hold story --max-seq-len 4 --dim 2 && kvscratchctl hold empty --write
result $? "hold two" ''
offers 'kvscratchctl drop ' empty story story/pad
offers 'kvscratchctl drop st' story story/pad
offers 'kvscratchctl put --replace st' story story/pad
offers 'kvscratchctl fork --max-seq-len 9 st' story story/pad
offers 'kvscratchctl fork story e' empty
offers 'kvscratchctl llama ' empty ls restore story story/pad tail ticket
offers 'kvscratchctl llama ticket --len ' ''
offers 'kvscratchctl llama restore --slot ' ''
offers 'kvscratchctl llama restore --slot-dir ' model
offers 'kvscratchctl -n st' story story/pad
offers 'kvscratchctl info --name e' empty
offers 'kvdecode --hold ' empty story
offers 'kvdecode --fork s' story story/pad
kvscratchctl hold cache --max-seq-len 4 --planes k0:2,v0:2,k1:2
offers 'kvscratchctl -n cache dump --plane ' k0 k1 v0
offers 'kvscratchctl -n cache save --plane ' k0 k1 v0
offers 'kvscratchctl watch --name cache --rows --plane k' k0 k1
offers 'kvscratchctl -n story dump --plane ' ''
kvscratchctl drop cache
kvscratchctl drop story && kvscratchctl drop empty
result $? "drop both" ''
offers 'kvscratchctl drop ' ''

mapfile -t options < <(options_of kvdecode)
offers 'kvdecode --' "${options[@]}"
offers 'kvdecode --cache heap --wa' --wait-reader
offers 'kvdecode --model ' model
offers 'kvdecode --tokenizer model/t' model/tok512.bin
offers 'kvdecode --draft-model model/s' model/stories260K.bin
offers 'kvdecode --draft ' ''
offers 'kvdecode --logits no' notes
offers 'kvdecode --prompt ' ''
echo "1..$count"
