// GatedNormScaffoldAdd: the end of a layer. The norm happens where the activations are quantised, the
// residual is added where the product is stored.
#include "binary_scaffold_matmul/scaffold.cuh"
#include "common/kernels.h"
#include "common/norm.cuh"
#include "common/one_token.cuh"

namespace dfssm::trt {
namespace of_gated_norm_scaffold_add {

struct Add : Store {
  static constexpr int kAtOnce = 4;
  const void* residual;  // [n, M], of the type of y

  explicit Add(const void* from) : residual(from) {}
  __device__ __forceinline__ void expect(const Product& p, int token, int row) const {
    const size_t at = static_cast<size_t>(token) * p.M + row;
    prefetch(static_cast<const char*>(residual) + at * (p.y_type == Float::f32 ? 4 : 2));
  }
  __device__ __forceinline__ float finish(const Product& p, int token, int row, float y) const {
    return __fadd_rn(load_float(p.y_type, residual, static_cast<size_t>(token) * p.M + row), y);
  }
};

}  // namespace of_gated_norm_scaffold_add
using namespace of_gated_norm_scaffold_add;

cudaError_t gated_norm_scaffold_add(const NormArgs& norm, const ScaffoldArgs& args, const void* residual,
                                    void* workspace, cudaStream_t stream) {
  const Product product = scaffold_product(args, workspace);
  if (takes_one_token<1>(product)) {
    return with_norm_row(norm, nullptr, [&](const auto& x) {
      return one_token<Bits, 1>(product, Add(residual), x, args.K, args.down, args.down_scale, stream);
    });
  }
  const cudaError_t error =
      with_norm_row(norm, nullptr, [&](const auto& x) { return quantize_for(product, args, x, stream); });
  return error == cudaSuccess ? matmul<Bits>(product, Add(residual), stream) : error;
}

}  // namespace dfssm::trt
