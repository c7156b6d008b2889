#!/bin/sh
# Builds the wheel dfssm for Linux on Arm on x86-64: Jetson, Raspberry Pi, Graviton.
#
#   scripts/build_arm.sh OUT [PYTHON]      -> OUT/dfssm-*_aarch64.whl
#
# Needs aarch64-linux-gnu-g++ (apt-get install g++-aarch64-linux-gnu), and a PYTHON as of build_wheels.sh. docs/arm.md.
set -eu

out=${1:?name the folder for the wheel}
python=${2:-python3}
cd "$(dirname "$0")/.."
work=$PWD/build/wheel_arm
. scripts/aarch64.sh
take_turns
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH

cross_wheel . libdfssm_ort_cpu.so manylinux_2_28-aarch64
case $(printf '%s\n' "$newest" GLIBC_2.28 | sort -V | tail -1) in
  GLIBC_2.28) ;;
  *) die "$library needs $newest, the wheel says manylinux_2_28" ;;
esac
echo "$(ls "$out"/dfssm-*_aarch64.whl): kernels for I8MM, the dot product, and any Arm CPU; needs $newest"
