// Int8MatMul: the weights are the fragments of the int8 tensor cores as they lie (common/matmul.cuh).
#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"
#include "common/matmul.cuh"

namespace dfssm::trt {
namespace of_int8_matmul {

struct Bytes {
  using Order = NaturalOrder;
  using Grain = uint8_t;
  static constexpr int kSteps = 1;
  static constexpr int kSets = 1;
  static constexpr int kBatch = 4;  // 128 bytes a lane in flight

  template <int kSets>
  static __device__ __forceinline__ uint32_t fragment(const uint32_t (&unit)[4], int, int pair, int half) {
    return unit[2 * pair + half];
  }
  static __device__ __forceinline__ int value(int sum, int) { return sum; }
};

}  // namespace of_int8_matmul
using namespace of_int8_matmul;

size_t int8_workspace(int32_t n, int32_t K) {
  size_t bytes;
  quantized_at<NaturalOrder>(nullptr, n, K, 0, &bytes);
  return bytes;
}

cudaError_t int8_matmul(const Int8Args& args, void* workspace, cudaStream_t stream) {
  const Quantized x = quantized_at<NaturalOrder>(workspace, args.n, args.K, 0);
  const size_t ahead = args.n <= kFewTokens ? static_cast<size_t>(args.M) * args.K : 0;
  const cudaError_t error = with_plain_row(args.x, args.type, args.K, [&](const auto& row) {
    return quantize<NaturalOrder>(row, args.n, args.K, nullptr, nullptr, 0, args.w, ahead, x, stream);
  });
  if (error != cudaSuccess) return error;
  const Product product = {reinterpret_cast<const uint8_t*>(args.w),
                           args.w_scale,
                           nullptr,
                           nullptr,
                           x,
                           args.y,
                           args.n,
                           args.M,
                           0,
                           1,
                           args.K,
                           args.y_type};
  return matmul<Bytes>(product, Store{}, stream);
}

}  // namespace dfssm::trt
