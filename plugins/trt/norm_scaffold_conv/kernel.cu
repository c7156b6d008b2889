// NormScaffoldConv: the beginning of a layer. The norm happens where the activations are quantised. One token
// of a sequence is convolved where the product is stored: each channel of each sequence belongs to one
// thread, which alone reads its state and then writes it, so both may be the same memory. Of several tokens
// no thread has the W-1 before its own: the product puts those columns aside, and the convolution is a launch more.
#include <algorithm>

#include "binary_scaffold_matmul/scaffold.cuh"
#include "causal_conv1d_step/token.cuh"
#include "common/kernels.h"
#include "common/norm.cuh"
#include "common/one_token.cuh"

namespace dfssm::trt {
namespace of_norm_scaffold_conv {

// The columns [start, start + C) of the product are channels.
struct Convolve : Store {
  ConvArgs conv;
  int32_t start;

  Convolve(const ConvArgs& args, int32_t first) : conv(args), start(first) {}
  __device__ __forceinline__ bool has(int row) const { return row >= start && row < start + conv.C; }
  __device__ __forceinline__ size_t state_of(int sequence, int row) const {
    return (static_cast<size_t>(sequence) * conv.C + (row - start)) * (conv.W - 1);
  }
  __device__ __forceinline__ void expect(const Product&, int sequence, int row) const {
    if (!has(row)) return;
    prefetch(conv.state + state_of(sequence, row));
    prefetch(conv.weight + static_cast<size_t>(row - start) * conv.W);
    prefetch(conv.bias + (row - start));
  }
  __device__ __forceinline__ float finish(const Product&, int sequence, int row, float y) const {
    constexpr int kMost = 3;
    if (!has(row)) return y;
    const int before = conv.W - 1;
    const float* const weights = conv.weight + static_cast<size_t>(row - start) * conv.W;
    const size_t state = state_of(sequence, row);
    float past[kMost], weight[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {  // all loads before the first store
      if (i < before) past[i] = conv.state[state + i], weight[i] = __ldg(weights + i);
    }
    const float result = convolve_token<kMost>(past, weight, before, y, __ldg(weights + before),
                                               __ldg(conv.bias + (row - start)), conv.silu);
#pragma unroll
    for (int i = 1; i < kMost; ++i) {
      if (i < before) conv.new_state[state + i - 1] = past[i];
    }
    conv.new_state[state + before - 1] = y;
    return result;
  }
};

// The channels go to memory of their own, [n, C].
struct Aside : Store {
  void* channels;
  int32_t start, C;

  Aside(void* to, const ConvArgs& conv, int32_t first) : channels(to), start(first), C(conv.C) {}
  __device__ __forceinline__ void store(const Product& p, int token, int row, float y) const {
    if (row >= start && row < start + C) {
      store_float(p.y_type, channels, static_cast<size_t>(token) * C + (row - start), y);
    } else {
      Store::store(p, token, row, y);
    }
  }
};

size_t element_size(Float type) { return type == Float::f32 ? 4 : 2; }

// Where the channels lie in the workspace, behind the quantised activations.
size_t aside_at(const ScaffoldArgs& args) {
  return (scaffold_workspace(args.n, args.K, args.M, args.R) + 15) / 16 * 16;
}

}  // namespace of_norm_scaffold_conv
using namespace of_norm_scaffold_conv;

size_t norm_scaffold_conv_workspace(const ScaffoldArgs& args, int32_t channels) {
  return aside_at(args) + static_cast<size_t>(args.n) * channels * element_size(args.type);
}

cudaError_t norm_scaffold_conv(const NormArgs& norm, const ScaffoldArgs& args, ConvArgs conv, int32_t x_start,
                               void* workspace, cudaStream_t stream) {
  if (conv.W < 2 || conv.W > 4) return cudaErrorInvalidValue;
  const Product product = scaffold_product(args, workspace);
  if (takes_one_token<4>(product)) {
    return with_norm_row(norm, nullptr, [&](const auto& x) {
      return one_token<Bits, 4>(product, Convolve(conv, x_start), x, args.K, args.down, args.down_scale,
                                stream);
    });
  }
  cudaError_t error =
      with_norm_row(norm, nullptr, [&](const auto& x) { return quantize_for(product, args, x, stream); });
  if (error != cudaSuccess) return error;
  if (conv.T == 1 && has_few_tokens(product)) {
    return matmul_few<Bits>(product, Convolve(conv, x_start), stream);
  }
  void* const aside = static_cast<char*>(workspace) + aside_at(args);
  error = matmul<Bits>(product, Aside(aside, conv, x_start), stream);
  if (error != cudaSuccess) return error;
  conv.x = aside, conv.x_stride = conv.C;
  conv.y = static_cast<char*>(args.y) + x_start * element_size(args.type), conv.y_stride = args.M;
  conv.type = args.type;
  return causal_conv1d_step(conv, stream);
}

}  // namespace dfssm::trt
