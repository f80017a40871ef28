#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0-only
# Clean Debian systems, kept as archives in ${XDG_CACHE_HOME:-~/.cache}/kvscratch. For
# bash scripts, which source this in the top directory of the tree.

# The release of this machine
# shellcheck source=/dev/null
own_release() { (. /etc/os-release && echo "${VERSION_CODENAME:-}"); }

# The one whose stock kernel it uses
stock_release() { if [ "$(own_release)" = bookworm ]; then echo bookworm; else echo trixie; fi; }

# Run as root, or as root of a user namespace.
as_root() {
	local user=()
	[ "$(id -u)" -eq 0 ] || user=(--user --map-auto --map-root-user)
	unshare --mount --pid --fork --kill-child ${user[@]+"${user[@]}"} "$@"
}

# The mirror that the system uses for what has that label, or else the second one
mirror() {
	local found
	# shellcheck disable=SC2016
	found=$(LC_ALL=C apt-get indextargets --format '$(REPO_URI)' "Label: $1" | sort -u | sed -n 1p)
	echo "${found:-$2}"
}

# A suite with its security updates, as apt's list of sources
sources() {
	local suite=$1 line='deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
	echo "$line $(mirror Debian http://deb.debian.org/debian) $suite main"
	case $suite in
	sid | *-backports | *-updates) ;;
	*) echo "$line $(mirror Debian-Security http://security.debian.org/debian-security) $suite-security main" ;;
	esac
}

# Set $archive to a system of a release with some packages and their dependencies, as a
# tar file, which is made if it is not there or was made of something else. The hook is a
# script for sh; its argument is the directory of the new system, which has package lists.
# usage: find_clean_root NAME RELEASE VARIANT PACKAGES,... HOOK [OTHER SUITE]...
find_clean_root() {
	local name=$1 release=$2 variant=$3 packages=$4 hook=$5 suite lock log
	local cache=${XDG_CACHE_HOME:-${HOME:?set HOME or XDG_CACHE_HOME}/.cache}/kvscratch
	shift 5
	archive=$(realpath -m "$cache")/$name-$(printf '%s\n' "$release" "$variant" "$packages" "$hook" "$@" |
		sha256sum | cut -c 1-12).tar
	mkdir -p "$cache"
	exec {lock}>"$cache/$name.lock"
	flock "$lock"
	if [ ! -e "$archive" ]; then
		echo "making a clean Debian $release for $name (once, some minutes)" >&2
		rm -f "$cache/$name"-????????????.tar
		log=$(mktemp)
		for suite in "$release" "$@"; do
			sources "$suite"
		done | mmdebstrap --quiet --variant="$variant" --dpkgopt=force-unsafe-io --include="$packages" \
			--customize-hook="$hook" "$release" "$archive.tmp.tar" - >"$log" 2>&1 ||
			{ cat "$log" >&2; return 1; }
		rm "$log"
		mv "$archive.tmp.tar" "$archive"
	fi
	exec {lock}>&-
}

# Unpack $archive into a new directory, with a copy of this tree in /srv/tree
unpack_clean_root() {
	mkdir -m 755 "$1"
	as_root tar -C "$1" --exclude='./dev/*' -xf "$archive"
	as_root mkdir "$1/srv/tree"
	tar --exclude=./build --exclude=./.git -cf - . | as_root tar -C "$1/srv/tree" --no-same-owner -xf -
}

# Run a program in it, with nothing of this machine in its environment
# usage: in_clean_root DIRECTORY [VARIABLE=VALUE]... PROGRAM [ARGUMENT]...
in_clean_root() {
	# shellcheck disable=SC2016 # for another shell
	as_root sh -euc '
		root=$1
		shift
		mount -t proc proc "$root/proc"
		mount --rbind /dev "$root/dev"
		exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"' sh "$@"
}

# What other users own there is theirs in the namespace only.
remove_clean_root() {
	as_root rm -rf --one-file-system "$1"
}
