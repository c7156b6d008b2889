#!/bin/sh
# The plugin library on a GPU without TensorRT: every op, the demo model and the speed of the 1.3B, in under 8 minutes.
#
#   scripts/gpu_check.sh                 packs, and runs where there is a GPU; else prints what to do
#   scripts/gpu_check.sh pack [FOLDER]   needs nvcc and the environment of `make build`; $DFSSM_CUDA_ARCHS, else 90
#   scripts/gpu_check.sh run [FOLDER]    needs a GPU and a python with torch for it ($PYTHON, else python3 or .venv's),
#                                        for the baseline triton; arguments after FOLDER go to the harness
#
# FOLDER (build/gpu_check) holds all that a run needs and may be copied to another machine; report.json and report.txt
# are written there.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
what=${1:-all}
folder=${2:-$root/build/gpu_check}
limit=54 # MB; with a checkout beside it under 64

die() {
  echo "gpu_check: $*" >&2
  exit 1
}

pack() {
  python=$root/.venv/bin/python
  [ -x "$python" ] || die "no environment in $root/.venv: make build"
  command -v nvcc >/dev/null || die "no nvcc on PATH: install the CUDA toolkit"
  PATH=$root/.venv/bin:$PATH
  native=$root/build/gpu_check_native
  DFSSM_CUDA_ARCHS=${DFSSM_CUDA_ARCHS:-90} cmake -S "$root" -B "$native" -DDFSSM_TRT=ON -DPython_EXECUTABLE="$python" >&2
  cmake --build "$native" --target dfssm_trt -j "$(nproc)" >&2
  PYTHONPATH=$root/tests "$python" -m gpu_harness.pack "$folder" --library "$native/plugins/trt/libdfssm_trt.so"
  size=$(du -sm "$folder" | cut -f1)
  [ "$size" -lt $limit ] || die "$folder has $size MB, more than $limit"
  echo "gpu_check: $folder, $size MB"
}

# A python whose torch has a GPU.
find_python() {
  for python in ${PYTHON:-python3 "$root/.venv/bin/python"}; do
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
      return 0
    fi
  done
  return 1
}

run() {
  cd "$folder"
  exec "$python" -m gpu_harness . "$@"
}

case $what in
  all)
    if command -v nvcc >/dev/null; then
      pack
    elif [ ! -d "$folder/gpu_harness" ]; then
      echo "gpu_check: not run: no nvcc on PATH to build the plugins with"
      exit 0
    fi
    find_python && run
    echo "gpu_check: not run: no python here has a torch that sees a GPU. On a machine with one, in a copy of $folder:"
    echo "  python3 -m gpu_harness"
    ;;
  pack) pack ;;
  run)
    [ -d "$folder/gpu_harness" ] || die "$folder is not packed: scripts/gpu_check.sh pack where nvcc is"
    find_python || die "no python here has a torch that sees a GPU; name one with PYTHON=/path/to/python3"
    [ $# -lt 2 ] || shift 2
    run "$@"
    ;;
  *) die "usage: $0 [pack|run [FOLDER]]" ;;
esac
