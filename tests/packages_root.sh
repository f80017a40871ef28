#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-only
# The part of tests/packages that runs in the clean Debian, with the tree below
# /srv/tree and the packages in /srv/deb. Prints TAP without a plan, from test 2 on, and
# leaves the modules below /srv.
# usage: packages_root.sh SERIES     of the stock kernel: 6.1
# shellcheck disable=SC2317 # tests are called by their names
set -euo pipefail
cd /srv/tree
# shellcheck source=/dev/null
. tests/tap.sh
series=$1
# without an initial RAM disk for the new kernel
export INITRD=No
apt=(apt-get -qq -y --no-install-recommends)

# The kernels that there are headers for
kernels() { ls -v /lib/modules; }

dkms_built_for() {
	local expected='' kernel file
	for kernel; do
		expected+="kvscratch/$version, $kernel, x86_64: installed"$'\n'
		# what a kernel looks at before it loads a module
		same "$kernel" "$(modinfo -k "$kernel" -F vermagic kvscratch | cut -d ' ' -f 1)"
		# what Secure Boot wants
		same "DKMS module signing key" "$(modinfo -k "$kernel" -F signer kvscratch)"
		file=$(modinfo -k "$kernel" -F filename kvscratch)
		[[ $file == /lib/modules/$kernel/updates/dkms/* ]]
		install -D "$file" "/srv/$kernel/${file##*/}"
	done
	same "$expected" "$(dkms status kvscratch | sort -V)"$'\n'
}

the_packages_install() {
	"${apt[@]}" update
	"${apt[@]}" install /srv/deb/*.deb
	same "" "$(dpkg --audit)"
}

dkms_has_the_sources_of_this_tree() {
	local file
	cd "/usr/src/kvscratch-$version"
	find . -type f ! -name dkms.conf | while read -r file; do
		cmp "$file" "/srv/tree/$file"
	done
}

dkms_builds_for_the_kernel_that_is_there() {
	local kernel
	kernel=$(kernels)
	[[ $kernel == "$series".* ]]
	dkms_built_for "$kernel"
}

and_for_a_newer_one_when_it_comes() {
	local older newer
	older=$(kernels)
	newer=$(apt-cache pkgnames linux-headers- | grep -E '^linux-headers-[0-9].*-cloud-amd64$' | grep -vxF "linux-headers-$older")
	"${apt[@]}" install "$newer" | tee /tmp/log
	# as DKMS says it when a step of it failed, but for what it can do without
	same 0 "$(grep -c 'bad exit status' /tmp/log)"
	newer=${newer#linux-headers-}
	[[ $newer != "$series".* ]]
	same "$newer" "$(kernels | tail -n 1)"
	# which the kernel's own package does, and DKMS only after it
	depmod "$newer"
	dkms_built_for "$older" "$newer"
}

dkms_leaves_other_kernels_alone() {
	local status=0
	dkms build "kvscratch/$version" -k 5.10.0-1-amd64 --kernelsourcedir "/usr/src/linux-headers-$(kernels | head -n 1)" ||
		status=$?
	same 77 $status
}

the_group_gets_the_device() {
	local group output
	group=$(getent group kvscratch | cut -d : -f 3)
	# all that udev wants to know of a device
	mkdir -p /sys/devices/virtual/misc/kvscratch /sys/class/misc
	ln -s /sys/class/misc /sys/devices/virtual/misc/kvscratch/subsystem
	printf '%s\n' MAJOR=10 MINOR=99 DEVNAME=kvscratch >/sys/devices/virtual/misc/kvscratch/uevent
	output=$(SYSTEMD_DEVICE_VERIFY_SYSFS=0 udevadm test --action=add /sys/devices/virtual/misc/kvscratch 2>&1)
	echo "$output"
	grep "60-kvscratch.rules:.* GROUP $group\$" <<<"$output"
	grep '60-kvscratch.rules:.* MODE 0660$' <<<"$output"
}

what_was_installed_works() {
	debian/tests/smoke
}

remove_takes_the_module_away() {
	"${apt[@]}" remove kvscratch-dkms
	same "" "$(dkms status kvscratch; find /lib/modules /var/lib/dkms -name '*kvscratch*')"
}

purge_leaves_nothing() {
	"${apt[@]}" purge '*kvscratch*'
	same "" "$(dpkg-query -W '*kvscratch*' 2>/dev/null
		find / -xdev -name '*kvscratch*' ! -path '/srv/*' ! -path '/sys/*' ! -path '/var/lib/apt/*')"
}

version=$(dpkg-deb --field /srv/deb/kvscratch-dkms_*.deb Version)
tests=(
	the_packages_install
	dkms_has_the_sources_of_this_tree
	dkms_builds_for_the_kernel_that_is_there
	and_for_a_newer_one_when_it_comes
	dkms_leaves_other_kernels_alone
	the_group_gets_the_device
	what_was_installed_works
	remove_takes_the_module_away
	purge_leaves_nothing
)
run_tests 2 "${tests[@]}"
