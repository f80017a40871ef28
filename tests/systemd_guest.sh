#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The part of tests/systemd that runs in the guest, as a service. Prints TAP from test 5
# on, and then the plan and "end".
# shellcheck disable=SC2317 # tests are called by their names
set -euo pipefail
export LC_ALL=C
cd /srv/tree
# shellcheck source=/dev/null
. tests/tap.sh
unit=kvscratch-hold@story.service
uid=$(id -u member)
files=$(mktemp -d)
chown member "$files"

# With the groups that the user would have in a new session
as() {
	local user=$1
	shift
	setpriv --reuid "$user" --regid "$user" --init-groups \
		env "XDG_RUNTIME_DIR=/run/user/$(id -u "$user")" KVSCRATCH_BACKEND=kernel "$@"
}
ctl() { as member kvscratchctl "$@"; }
manager() { as member systemctl --user "$@"; }

# Something that happens soon; the test's own time limit ends it otherwise.
await() {
	until "$@"; do
		sleep 0.1
	done
}

bytes_total() { cat /sys/module/kvscratch/parameters/bytes_total; }
no_bytes() { [ "$(bytes_total)" = 0 ]; }

main_pid() { manager show --property MainPID --value $unit; }

# Another process than that, and one that answers
began_again() {
	[ "$(manager is-active $unit)" = active ] && [ "$(main_pid)" != "$1" ]
}

the_rows_are_there() {
	local pad
	for pad in k0 v0; do
		ctl -n story/$pad dump --format raw | cmp - "$files/$pad"
	done
}

hold_two_pads() {
	manager start $unit
	ctl -n story/k0 load "$files/k0.safetensors"
	ctl -n story/v0 load "$files/v0.safetensors"
	the_rows_are_there
}

kill_the_holder() {
	local before
	before=$(main_pid)
	manager kill --signal KILL $unit
	await began_again "$before"
}

modules_load_loads_the_module() {
	systemctl is-active systemd-modules-load.service
	same 0 "$(bytes_total)"
}

udev_gives_the_device_its_mode_and_group() {
	same "660 root kvscratch" "$(stat --format '%a %U %G' /dev/kvscratch)"
}

who_is_not_in_the_group_is_refused() {
	local user status
	for user in member other; do
		status=0
		as $user bash -c 'exec 3<>/dev/kvscratch' 2>"$files/said" || status=$?
		same 1 $status
		grep '/dev/kvscratch: Permission denied' "$files/said"
		as $user kvscratchctl create --max-seq-len 2 --dim 3 -- true 2>"$files/said" || status=$?
		same 2 $status
		grep 'cannot open /dev/kvscratch: expected permission' "$files/said"
	done
}

a_member_is_not() {
	local pad
	usermod --append --groups kvscratch member
	head -c 64 /dev/urandom >"$files/row"
	for pad in k0 v0; do
		head -c 4096 /dev/urandom >"$files/$pad"
		ctl create --max-seq-len 100 --dim 64 --dtype u8 -- sh -euc "
			kvscratchctl append --format raw $files/$pad
			kvscratchctl save $files/$pad.safetensors"
	done
}

the_holder_has_pads_with_rows() {
	loginctl enable-linger member
	await systemctl is-active --quiet "user@$uid.service"
	hold_two_pads
	[ "$(bytes_total)" -ge $((2 * 100 * 64)) ]
}

they_survive_a_restart() {
	local before
	before=$(main_pid)
	manager restart $unit
	began_again "$before"
	the_rows_are_there
}

and_sigkill_of_the_holder() {
	kill_the_holder
	the_rows_are_there
	# more often than a unit may begin again by default
	for _ in 1 2 3 4 5 6; do
		kill_the_holder
	done
	the_rows_are_there
}

and_both_managers_when_they_execute_themselves_again() {
	local before
	before=$(main_pid)
	systemctl daemon-reexec
	manager daemon-reexec
	same "$before" "$(main_pid)"
	the_rows_are_there
	kill_the_holder
	the_rows_are_there
}

rows_go_on_after_that() {
	ctl -n story/k0 append --format raw "$files/row"
	ctl -n story/k0 dump --format raw | cmp - <(cat "$files/k0" "$files/row")
	ctl -n story/k0 truncate --len 64
	the_rows_are_there
}

drop_frees() {
	ctl drop story
	await no_bytes
	same inactive "$(manager is-active $unit || true)"
}

and_so_does_stop() {
	hold_two_pads
	[ "$(bytes_total)" -gt 0 ]
	manager stop $unit
	await no_bytes
}

nothing_failed() {
	same "" "$(systemctl --failed --plain --no-legend; manager --failed --plain --no-legend)"
}

# A warning of the kernel's own panics. It also says something of clocks when the machine
# that runs the guest is busy, which is not ours, and nor is what came before our first line.
the_kernel_warns_of_nothing() {
	local first='kvscratch: loading out-of-tree module taints kernel.'
	modprobe -r kvscratch
	dmesg --level emerg,alert,crit,err,warn >"$files/warnings"
	cat "$files/warnings"
	grep "$first" "$files/warnings"
	same "" "$(sed "1,/$first/d" "$files/warnings" | grep -E 'kvscratch|BUG|WARNING|INFO:' || true)"
}

tests=(
	modules_load_loads_the_module
	udev_gives_the_device_its_mode_and_group
	who_is_not_in_the_group_is_refused
	a_member_is_not
	the_holder_has_pads_with_rows
	they_survive_a_restart
	and_sigkill_of_the_holder
	and_both_managers_when_they_execute_themselves_again
	rows_go_on_after_that
	drop_frees
	and_so_does_stop
	nothing_failed
	the_kernel_warns_of_nothing
)
trap 'echo "1..$((4 + ${#tests[@]}))"; echo end' EXIT
run_tests 5 "${tests[@]}"
