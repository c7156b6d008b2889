#!/bin/sh
# Makes the virtual environment that `make` works in, with what is locked in requirements/ and dfssm itself, editable.
#
#   scripts/bootstrap.sh VENV demo     what it takes to compile and run a model
#   scripts/bootstrap.sh VENV dev      that, what training, evaluation, tests and lint take, and the CUDA plugins where nvcc is
#
# Needed of the system: python3 >= 3.11, a C++ compiler; for dev Python's C headers too. As root on Debian or Ubuntu what
# is missing is installed; otherwise one line says what to install. All else comes from the package index, into VENV.
set -eu

venv=$1
set=$2
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

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

# step TEXT: what goes on now, and since when.
start=$(date +%s)
step() { echo "bootstrap: $(($(date +%s) - start)) s: $*"; }

case $set in
  demo) requirements=compile native="DFSSM_PYTHON=OFF DFSSM_TRT=OFF" ;;
  dev) requirements=dev native="DFSSM_PYTHON=ON DFSSM_TRT=AUTO" ;;
  *) die "usage: $0 VENV demo|dev" ;;
esac

command -v "$python" >/dev/null || install python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$python is $("$python" -V 2>&1), 3.11 or newer is needed; name another with PYTHON=/path/to/python3"

missing=
command -v "${CXX:-g++}" >/dev/null || missing=g++
if [ "$set" = dev ]; then
  "$python" -c 'import os, sys, sysconfig as s
sys.exit(not os.path.exists(os.path.join(s.get_paths()["include"], "Python.h")))' || missing="$missing python3-dev"
fi
# Debian splits the standard library: venv cannot put pip into an environment without this.
"$python" -c 'import ensurepip' 2>/dev/null || "$python" -c 'import virtualenv' 2>/dev/null ||
  missing="$missing python3-venv"
# shellcheck disable=SC2086 # a list of words
[ -z "$missing" ] || install $missing

if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  step "environment $venv, $("$python" -V)"
  rm -rf "$venv"
  "$python" -m venv "$venv" 2>/dev/null || "$python" -m virtualenv "$venv" ||
    die "could not make $venv with venv or virtualenv"
fi
python=$venv/bin/python

# On a terminal pip shows its own progress. PIP_USE_PEP517: what comes as source is built in isolation, which the pip of
# Debian 12 does not do by itself.
pip() { PIP_USE_PEP517=1 "$python" -m pip install $quiet --disable-pip-version-check "$@"; }
if [ -t 1 ]; then quiet=; else quiet=-q; fi

step "torch $(sed -n 's/^torch==//p' "$root/requirements/torch.txt") (the CPU build is about 200 MB)"
"$root/scripts/install_torch.sh" "$python"
count=$(grep -c '^[a-z]' "$root/requirements/$requirements.txt")
step "$count packages of requirements/$requirements.txt"
# --no-deps: the lock is complete, and pip would take an extra that a package asks of another for one more requirement,
# without a hash.
pip --no-deps --require-hashes -r "$root/requirements/$requirements.txt"
[ "$set" = dev ] || pip --no-deps --require-hashes -r "$root/requirements/build.txt"

# The one build without isolation: its tools are those of the lock, and cmake keeps its objects in build/.
step "the native part"
options=
for define in $native; do options="$options --config-settings=cmake.define.$define"; done
# shellcheck disable=SC2086 # a list of words
pip --no-build-isolation --no-deps $options -e "$root"
"$python" -m pip check >&2 || die "the packages in $venv do not fit together: rm -rf $venv, then again"
step "done: $(du -sm "$venv" | cut -f1) MB in $venv"
