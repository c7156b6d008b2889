#!/bin/sh
# Every file event of every command, on the disk, in memory and on an overlay mount; see driver.py.
#
#   tests/tools/file_events/run.sh PYTHON BUILD_FOLDER [OPTION OF driver.py...]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1
build=$2
shift 2
mkdir -p "$build/disk" "$build/lower"
${CC:-cc} -O1 -Wall -shared -fPIC -o "$build/shim.so" "$here/shim.c" -ldl
memory=$(mktemp -d -p /dev/shm 2>/dev/null) || memory=
trap 'rm -rf "$build/disk" "$build/lower" $memory' EXIT

status=0
# try NAME FOLDER [OPTION...]
try() {
  echo "== $1"
  shift
  LD_PRELOAD="$build/shim.so" OMP_NUM_THREADS=1 "$python" "$here/driver.py" "$@" || status=1
}

try "disk: $(stat -f -c %T "$build")" "$build/disk" "$@"
if [ -n "$memory" ]; then try "tmpfs" "$memory" "$@"; else echo "no tmpfs: /dev/shm cannot be written"; fi
if [ "$(id -u)" -eq 0 ] && unshare --mount true 2>/dev/null; then
  try "overlay" "$build/disk" --lower "$build/lower" "$@"
else
  echo "no overlay mount: it takes root"
fi
exit $status
