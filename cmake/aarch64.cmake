# Toolchain file: our libraries for Linux on Arm, compiled on x86-64. scripts/build_jetson.sh makes the CUDA toolkit that
# $DFSSM_CROSS_CUDA names; without one no CUDA is compiled.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_COMPILER "$ENV{DFSSM_CROSS_CUDA}/bin/nvcc")
# Libraries of the system are those of Arm; headers and programs may lie anywhere.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
