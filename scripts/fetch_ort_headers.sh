#!/bin/sh
# Fetches the ONNX Runtime C header, which the pip package does not ship, into a folder.
#
#   scripts/fetch_ort_headers.sh DEST        -> DEST/onnxruntime_c_api.h, as cmake/ort-headers.sha256 has it
#
# Nothing to do where it is there already. Else three sources, in this order; the first that works ends the script:
#   1. Debian's libonnxruntime-dev, if this machine's own apt lists offer it (Debian 13 and later);
#   2. the same package from Debian 13 ("trixie"), by the mirror this machine already uses: headers only, nothing
#      is installed, so it does not matter that the machine runs an older Debian;
#   3. the release archive of the onnxruntime project.
#
# apt's own lists and caches are neither read for 2 nor written in any case: everything lies under a private
# folder, so root and an ordinary user behave alike and `apt-get update` of the machine is not disturbed.
set -eu

PACKAGE=libonnxruntime-dev
SUITE=trixie
UPSTREAM_VERSION=1.21.0 # the API level that DFSSM is built and tested against; any later 1.x has it too

what=ort-headers
. "$(dirname "$0")/headers.sh"

# The folder of the header below $1.
install_from() {
  found=$(find "$1" -name onnxruntime_c_api.h -print -quit)
  [ -n "$found" ] && install_headers "$(dirname "$found")"
}

# apt with a private state folder. Sandbox::User: as root apt would download as "_apt", which may not enter a
# private temporary folder.
private_apt() {
  command=$1
  shift
  "$command" -q -o APT::Sandbox::User=root -o Dir::State="$work/state" -o Dir::State::Lists="$work/state/lists" \
    -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$work/cache" -o Dir::Log="$work/log" \
    -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Acquire::Languages=none -o Acquire::Retries=2 "$@"
}

unpack() { # the one .deb under $work -> DEST
  deb=$(find "$work" -maxdepth 1 -name "$1_*.deb" -print -quit)
  [ -n "$deb" ] && dpkg -x "$deb" "$work/$1"
}

from_own_lists() {
  (cd "$work" && apt-get -q -o APT::Sandbox::User=root download "$PACKAGE") && unpack "$PACKAGE" &&
    install_from "$work/$PACKAGE"
}

# Debian archives in this machine's apt sources, one URI a line: one-line format ("deb [options] URI suite ...")
# and deb822 ("URIs: ..."). Security and backports archives hold other packages; file: and mirror lists that are
# local paths are passed over by the pattern.
debian_mirrors() {
  sources=${DFSSM_APT_DIR:-/etc/apt}
  {
    cat "$sources/sources.list" "$sources"/sources.list.d/*.list 2>/dev/null |
      sed -nE 's/^[[:space:]]*deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+).*/\2/p'
    cat "$sources"/sources.list.d/*.sources 2>/dev/null |
      sed -nE 's/^[Uu][Rr][Ii][Ss]:[[:space:]]*(.*)$/\1/p' | tr -s '[:space:]' '\n'
  } | grep -E '^[a-z+]+://.*/debian/?$' | awk '!seen[$0]++'
}

# A keyring that knows the trixie keys. An older Debian's may not: the updated debian-archive-keyring comes from
# the machine's own suite, signed with the keys it already trusts. `[trusted=yes]` would spare this step, and
# would also compile whatever a mirror or a proxy on the way chooses to send: so it is not used.
keyring() {
  name=usr/share/keyrings/debian-archive-trixie-automatic.gpg
  [ -f "/$name" ] && echo "/$name" && return
  (cd "$work" && apt-get -q -o APT::Sandbox::User=root download debian-archive-keyring >&2) &&
    unpack debian-archive-keyring && [ -f "$work/debian-archive-keyring/$name" ] || return 1
  echo "$work/debian-archive-keyring/$name"
}

from_trixie() {
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
  mirrors=$(debian_mirrors)
  [ -n "$mirrors" ] && keys=$(keyring) || return 1
  mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/log"
  for mirror in $mirrors; do
    echo "deb [signed-by=$keys] $mirror $SUITE main" >"$work/sources.list"
    (cd "$work" && private_apt apt-get update && private_apt apt-get download "$PACKAGE") &&
      unpack "$PACKAGE" && install_from "$work/$PACKAGE" && return
  done
  return 1
}

from_upstream() {
  command -v curl >/dev/null || return 1
  case $(uname -m) in x86_64) cpu=x64 ;; aarch64) cpu=aarch64 ;; *) return 1 ;; esac
  name=onnxruntime-linux-$cpu-$UPSTREAM_VERSION
  url=https://github.com/microsoft/onnxruntime/releases/download/v$UPSTREAM_VERSION/$name.tgz
  curl -fsSL --max-time 120 "$url" | tar -xzf - -C "$work" "$name/include" && install_from "$work/$name"
}

for source in from_own_lists from_trixie from_upstream; do
  if "$source" >>"$work/log.txt" 2>&1; then
    echo "fetch_ort_headers: $dest ($source)"
    exit 0
  fi
done
tail -n 15 "$work/log.txt" >&2
die "no source worked; install $PACKAGE, or unpack an onnxruntime release and set DFSSM_ORT_INCLUDE_DIR to its include folder"
