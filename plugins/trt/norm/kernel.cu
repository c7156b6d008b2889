// RMSNorm and GatedRMSNorm: one block a token and group. What is normed is read once and written once, also
// over its own input.
#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"
#include "common/norm.cuh"

namespace dfssm::trt {
namespace of_norm {

template <class T, int kWide>
__global__ void __launch_bounds__(kNormThreads) norm(NormRow<T, kWide> row, T* out) {
  constexpr int kFloats = NormRow<T, kWide>::kFloats;
  DFSSM_DYNAMIC_SHARED(float, kept);
  const int64_t token = blockIdx.x;
  const int first = blockIdx.y * row.size;
  out += token * row.C + first;
  wait_for_launch_before();
  const float norm = row.weigh(token, first, kept);
  for (int c = threadIdx.x * kWide; c < row.size; c += blockDim.x * kWide) {
    Vector<T, kWide> result;
#pragma unroll
    for (int i = 0; i < kWide; i += kFloats) {
      const auto values = load_vector<kFloats>(kept + c + i);
#pragma unroll
      for (int k = 0; k < kFloats; ++k) result.at[i + k] = from_float<T>(values.at[k] * norm);
    }
    store_vector(out + c, result);
  }
}

template <class T, int kWide>
cudaError_t run(const NormRow<T, kWide>& row, const NormArgs& args, cudaStream_t stream) {
  const int loads = (row.size + kWide - 1) / kWide;
  const int threads = min(kNormThreads, (loads + kWarpSize - 1) / kWarpSize * kWarpSize);
  return launch(norm<T, kWide>, dim3(args.n, args.groups), threads, row.size * sizeof(float), stream, row,
                static_cast<T*>(args.out));
}

}  // namespace of_norm
using namespace of_norm;

cudaError_t rms_norm(const NormArgs& args, cudaStream_t stream) {
  if (!args.n || !args.C) return cudaSuccess;
  return with_norm_row(args, args.out, [&](const auto& row) { return run(row, args, stream); });
}

}  // namespace dfssm::trt
