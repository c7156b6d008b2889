#!/bin/sh
# Fetches the headers of SIMDe, Debian's package libsimde-dev, into a folder. Nothing is installed: root and an
# ordinary user may do it alike. apt checks the signatures, with the keys that this machine trusts.
#
#   fetch_simde.sh DEST        -> DEST/usr/include/simde
set -eu

mkdir -p "$1"
dest=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

apt() { apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=1 -o Acquire::http::Timeout=20 "$@"; }

# A machine may have no package lists, and an ordinary user may not write them.
with_private_lists() {
  mkdir -p state/lists/partial cache/archives/partial log
  set -- -o Dir::State="$work/state" -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache="$work/cache" \
    -o Dir::Log="$work/log" -o Acquire::Languages=none
  apt "$@" update && apt "$@" download libsimde-dev
}

apt download libsimde-dev || with_private_lists
dpkg -x libsimde-dev_*.deb unpacked
rm -rf "$dest/usr"
mv unpacked/usr "$dest/usr"
