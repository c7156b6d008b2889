#!/bin/sh
# Builds the wheel dfssm-trt for Jetson on x86-64: Orin (SM 87) and Thor (SM 110), for JetPack 7 and its CUDA 13.
#
#   scripts/build_jetson.sh OUT [PYTHON]      -> OUT/dfssm_trt-*_aarch64.whl
#
# Needs nvcc 13.0, aarch64-linux-gnu-g++ (apt-get install g++-aarch64-linux-gnu), and a PYTHON as of build_wheels.sh. The
# CUDA runtime for Arm comes from NVIDIA's wheel on the package index. Nothing of it can be run here: docs/jetson.md.
set -eu

out=${1:?name the folder for the wheel}
python=${2:-python3}
cd "$(dirname "$0")/.."
work=$PWD/build/jetson
runtime="nvidia-cuda-runtime==13.0.96 --hash=sha256:ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55"

. scripts/aarch64.sh
command -v nvcc >/dev/null || die "no nvcc on PATH: install the CUDA toolkit"
nvcc --version | grep -q "release 13.0" || die "nvcc is not of CUDA 13.0, as the runtime library for Arm is"
take_turns

# The toolkit as NVIDIA's packages for cross compilation lay it out: the programs of this one, beside them what Arm links.
cuda=$work/cuda
target=$cuda/targets/aarch64-linux
echo 'int main() {}' >"$work/empty.cu"
here=$(nvcc --dryrun "$work/empty.cu" 2>&1 | sed -n 's/^#\$ TOP=//p')
rm -rf "$cuda"
mkdir -p "$cuda/bin" "$target/lib"
ln -s "$here"/bin/* "$cuda/bin/"
ln -s "$here/nvvm" "$cuda/nvvm"
ln -s "$here/include" "$target/include"
echo "$runtime" >"$work/runtime.txt"
"$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
  --platform manylinux2014_aarch64 -d "$work" -r "$work/runtime.txt"
"$python" -m zipfile -e "$work"/nvidia_cuda_runtime-*_aarch64.whl "$work/runtime"
ln -s "$work"/runtime/nvidia/cu13/lib/* "$target/lib/"
ln -s libcudart.so.13 "$target/lib/libcudart.so" # by which CMake knows a toolkit

export DFSSM_CROSS_CUDA="$cuda" DFSSM_CUDA_ARCHS="87;110"
cross_wheel plugins/trt plugins/trt/libdfssm_trt.so linux-aarch64
echo "$(ls "$out"/dfssm_trt-*_aarch64.whl): SM 87 and 110, PTX for newer ones, needs $newest"
