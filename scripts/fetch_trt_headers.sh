#!/bin/sh
# Fetches the TensorRT C++ headers into a folder, for machines without the TensorRT SDK.
#
#   scripts/fetch_trt_headers.sh DEST [PYTHON]        -> DEST/NvInferRuntime.h and its neighbours
#
# NVIDIA's own wheels ship none. The package kernel-lens carries them (Apache-2.0, as the headers are); it is downloaded,
# not installed.
set -eu

PACKAGE=kernel-lens==2.0.1 # has the headers of TensorRT 10.14

die() {
  echo "fetch_trt_headers: $*" >&2
  exit 1
}

[ $# -ge 1 ] || die "usage: $0 DEST [PYTHON]"
mkdir -p "$1"
dest=$(cd "$1" && pwd)
python=${2:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip download -q --no-deps --only-binary :all: -d "$work" "$PACKAGE" >&2 ||
  die "could not download $PACKAGE; install the TensorRT SDK, or name its headers with -DDFSSM_TRT_INCLUDE_DIR=FOLDER"
"$python" -m zipfile -e "$work"/*.whl "$work/wheel"
from=$work/wheel/kernel_lens/include/tensorrt
[ -f "$from/NvInferRuntime.h" ] || die "$PACKAGE has no TensorRT headers in it"
# The last file is renamed into place, so that a DEST which has NvInferRuntime.h is complete.
for header in "$from"/*.h; do
  case $header in */NvInferRuntime.h) ;; *) cp "$header" "$dest/" ;; esac
done
cp "$from/NvInferRuntime.h" "$dest/.NvInferRuntime.h" && mv "$dest/.NvInferRuntime.h" "$dest/NvInferRuntime.h"
