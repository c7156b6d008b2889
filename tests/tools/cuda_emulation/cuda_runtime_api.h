// The part of the CUDA runtime that the host side of kernels and plugins uses, on host memory: streams are
// synchronous, so a copy or a launch is done when it returns.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

// The vector types, aligned as CUDA's are: a kernel that reads an int4 from an address that is no multiple of
// 16 is reported.
#define DFSSM_VECTOR_TYPES(scalar, name)                                            \
  struct name##1 { scalar x; };                                                     \
  struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                      \
  struct name##3 { scalar x, y, z; };                                               \
  struct alignas(4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };                \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }              \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
DFSSM_VECTOR_TYPES(signed char, char)
DFSSM_VECTOR_TYPES(unsigned char, uchar)
DFSSM_VECTOR_TYPES(short, short)
DFSSM_VECTOR_TYPES(unsigned short, ushort)
DFSSM_VECTOR_TYPES(int, int)
DFSSM_VECTOR_TYPES(unsigned int, uint)
DFSSM_VECTOR_TYPES(float, float)
#undef DFSSM_VECTOR_TYPES

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

const char* cudaGetErrorName(cudaError_t error);
// Of a failed launch: the report of what the kernel did wrong.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
