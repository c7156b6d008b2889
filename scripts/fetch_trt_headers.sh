#!/bin/sh
# Fetches the TensorRT C++ headers into a folder, for machines without the TensorRT SDK.
#
#   scripts/fetch_trt_headers.sh DEST [PYTHON]        -> DEST/NvInferRuntime.h and its neighbours, as cmake/trt-headers.sha256
#                                                        has them
#
# NVIDIA's own wheels ship none. The package kernel-lens carries them (Apache-2.0, as the headers are); it is downloaded,
# not installed: with its dependencies it takes 1 GB.
set -eu

PACKAGE=kernel-lens==2.0.1 # has the headers of TensorRT 10.14

what=trt-headers
. "$(dirname "$0")/headers.sh"
python=${2:-python3}

"$python" -m pip download -q --no-deps --only-binary :all: -d "$work" "$PACKAGE" >&2 ||
  die "could not download $PACKAGE; install the TensorRT SDK, or name its headers with -DDFSSM_TRT_INCLUDE_DIR=FOLDER"
"$python" -m zipfile -e "$work"/*.whl "$work/wheel"
from=$work/wheel/kernel_lens/include/tensorrt
[ -f "$from/NvInferRuntime.h" ] || die "$PACKAGE has no TensorRT headers in it"
install_headers "$from" 2>/dev/null || die "the TensorRT headers in $PACKAGE are not those of cmake/$what.sha256"
