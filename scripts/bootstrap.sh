#!/bin/sh
# Makes the virtual environment that `make` works in, and sees to what must come from the system.
#
#   scripts/bootstrap.sh VENV
#
# Needed: python3 >= 3.11 with its C headers, a C++ compiler. As root on Debian or Ubuntu what is missing is installed;
# otherwise one line says what to install. cmake, ninja and everything else come from the package index, into VENV.
set -eu

venv=$1
python=${PYTHON:-python3}

die() {
  echo "bootstrap: $*" >&2
  exit 1
}

# install PACKAGE...: with apt as root, or the line to type.
install() {
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    die "missing: $*; install with: sudo apt-get install $*"
  fi
  echo "bootstrap: installing $*"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -q update && apt-get -q install -y --no-install-recommends "$@"; } >&2 || die "apt-get install $* failed"
}

command -v "$python" >/dev/null || install python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$python is $("$python" -V 2>&1), 3.11 or newer is needed; name another with PYTHON=/path/to/python3"

missing=
command -v "${CXX:-g++}" >/dev/null || missing=g++
"$python" -c 'import os, sys, sysconfig as s
sys.exit(not os.path.exists(os.path.join(s.get_paths()["include"], "Python.h")))' || missing="$missing python3-dev"
# Debian splits the standard library: venv cannot put pip into an environment without this.
"$python" -c 'import ensurepip' 2>/dev/null || "$python" -c 'import virtualenv' 2>/dev/null ||
  missing="$missing python3-venv"
# shellcheck disable=SC2086 # a list of words
[ -z "$missing" ] || install $missing

if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  rm -rf "$venv"
  "$python" -m venv "$venv" 2>/dev/null || "$python" -m virtualenv "$venv" ||
    die "could not make $venv with venv or virtualenv"
fi
