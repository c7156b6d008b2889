// The CUDA runtime of cuda_runtime_api.h.
#include <cstring>
#include <utility>

#include "machine.h"

namespace emulation = dfssm::trt::emulation;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unrecognised error";
}

const char* cudaGetErrorString(cudaError_t error) {
  const std::string& text = emulation::machine().error;
  const bool launch = error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration;
  return launch && !text.empty() ? text.c_str() : cudaGetErrorName(error);
}

cudaError_t cudaPeekAtLastError() { return emulation::machine().last; }
cudaError_t cudaGetLastError() { return std::exchange(emulation::machine().last, cudaSuccess); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  emulation::host_writes(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  emulation::host_writes(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// A device with few multiprocessors: splits that a kernel chooses by their number happen at small sizes too.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 6;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::kMaxSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > emulation::kMaxSharedBytes) {
    return emulation::machine().last = cudaErrorInvalidValue;
  }
  emulation::machine().opted_in[kernel] = value;
  return cudaSuccess;
}

// Buffers and reports, for ctypes.
extern "C" {
void dfssm_trt_add_buffer(const char* name, const void* data, size_t bytes, int contents) {
  emulation::add_buffer(name, data, bytes, static_cast<emulation::Contents>(contents));
}
void dfssm_trt_clear_buffers() { emulation::clear_buffers(); }
void dfssm_trt_dependent_launches(int yes) { emulation::dependent_launches(yes); }
int dfssm_trt_launches() { return std::exchange(emulation::machine().launches, 0); }
const char* dfssm_trt_last_error() { return emulation::last_error(); }
}
