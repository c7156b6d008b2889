# Sourced by build_arm.sh and build_jetson.sh, which set `out`, `python` and `work`: wheels for Linux on Arm, built on x86-64.

die() {
  name=${0##*/}
  echo "${name%.sh}: $*" >&2
  exit 1
}

command -v aarch64-linux-gnu-g++ >/dev/null || die "no aarch64-linux-gnu-g++: apt-get install g++-aarch64-linux-gnu"

# One at a time in the build folder.
take_turns() {
  mkdir -p "$work" "$out"
  exec 9>"$work/lock"
  flock 9
}

# cross_wheel PROJECT LIBRARY PLATFORM: the wheel of the project, for PLATFORM as Python names it, and in $newest the glibc
# that its library needs. auditwheel reads no wheel of another machine.
cross_wheel() {
  CMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64.cmake _PYTHON_HOST_PLATFORM=$3 PATH=$(cd "$(dirname "$python")" && pwd):$PATH \
    "$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$out" \
    --config-settings=build-dir="$work/native" "$1"
  library=$work/native/$2
  readelf -h "$library" | grep -q "Machine: *AArch64" || die "$library is not for Arm"
  newest=$(readelf -V "$library" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
}
