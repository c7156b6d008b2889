// BinaryScaffoldMatMul.
#include "binary_scaffold_matmul/scaffold.cuh"
#include "common/kernels.h"

namespace dfssm::trt {

size_t scaffold_workspace(int32_t n, int32_t K, int32_t, int32_t R) {
  size_t bytes;
  quantized_at<BitOrder>(nullptr, n, K, R, &bytes);
  return bytes;
}

cudaError_t binary_scaffold_matmul(const ScaffoldArgs& args, void* workspace, cudaStream_t stream) {
  const Product product = scaffold_product(args, workspace);
  const cudaError_t error = with_plain_row(
      args.x, args.type, args.K, [&](const auto& x) { return quantize_for(product, args, x, stream); });
  return error == cudaSuccess ? matmul<Bits>(product, Store{}, stream) : error;
}

}  // namespace dfssm::trt
