// Launching a kernel the same way under nvcc and on the host emulation.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdlib>
#include <tuple>
#include <utility>
#ifdef DFSSM_EMULATION
#include "emulation.h"
#endif

namespace dfssm::trt {

// Shared memory a block gets without asking for more; of it, what a kernel with dynamic shared memory may
// have in static arrays.
constexpr size_t kDefaultSharedBytes = 48 * 1024, kStaticSharedBytes = 12 * 1024;

// Programmatic dependent launch: a kernel may begin while the one before still runs, and waits for it itself
// (wait_for_launch_before). From sm_90 on, with DFSSM_TRT_OVERLAP=1 in the environment; off until it is measured.
#ifndef DFSSM_EMULATION
inline bool launches_overlap() {
  static const bool wanted = [] {
    const char* const text = std::getenv("DFSSM_TRT_OVERLAP");
    return text && text[0] == '1' && !text[1];
  }();
  int device, major;
  return wanted && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}
#endif

// kernel<<<grid, block, dynamic_shared_bytes, stream>>>(arguments...), and its error. Asks for more than 48
// KB of shared memory where that may be needed.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments),
                "one argument for each parameter of the kernel");
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (dynamic_shared_bytes + kStaticSharedBytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is returned here; the next launch must not find it again
      return error == cudaErrorInvalidValue ? cudaErrorInvalidConfiguration : error;
    }
  }
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
#ifdef DFSSM_EMULATION
  using Call = std::pair<decltype(kernel), decltype(parameters)>;
  Call call(kernel, parameters);
  static_cast<void>(stream);  // one thing after another
  return emulation::run(
      grid, block, dynamic_shared_bytes, function,
      [](void* self) { std::apply(static_cast<Call*>(self)->first, static_cast<Call*>(self)->second); },
      &call, sizeof call);
#else
  return std::apply(
      [&](auto&... each) {
        void* pointers[] = {static_cast<void*>(&each)..., nullptr};
        if (!launches_overlap()) {
          return cudaLaunchKernel(function, grid, block, pointers, dynamic_shared_bytes, stream);
        }
        cudaLaunchAttribute overlap{};
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid, config.blockDim = block;
        config.dynamicSmemBytes = dynamic_shared_bytes, config.stream = stream;
        config.attrs = &overlap, config.numAttrs = 1;
        return cudaLaunchKernelExC(&config, function, pointers);
      },
      parameters);
#endif
}

}  // namespace dfssm::trt
