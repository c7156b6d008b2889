// NormScaffoldConv: the beginning of a layer. The norm happens where the activations are quantised, and the convolution
// where the product is: an output looks at the W-1 tokens before its own, which its block has too. Where a sequence is
// longer than a block's tokens, blocks make the W-1 before theirs once more, 5 % of their work: a launch for the
// convolution and the way of its channels to memory and back take longer (docs/gpu.md).
#include "binary_scaffold_matmul/scaffold.cuh"
#include "causal_conv1d_step/token.cuh"
#include "common/kernels.h"
#include "common/norm.cuh"
#include "common/one_token.cuh"

namespace dfssm::trt {
namespace of_norm_scaffold_conv {

// The columns [start, start + C) of the product are channels. All that reads and writes the state of a sequence's channel
// is one block, which reads first: both may be the same memory. So the block of a sequence's first tokens has its last,
// too.
struct Convolve : Store {
  static constexpr bool kTiled = true;
  static constexpr int kAtOnce = 8, kMost = 3;
  ConvArgs conv;
  int32_t start;

  Convolve(const ConvArgs& args, int32_t first) : conv(args), start(first) {}
  Tokens tokens(int32_t n, int32_t tile) const {
    const int32_t before = conv.W - 1;
    return conv.T <= tile ? Tokens{n, tile / conv.T * conv.T, 0} : Tokens{conv.T, tile - before, before};
  }
  __device__ __forceinline__ bool has(int row) const { return row >= start && row < start + conv.C; }
  __device__ __forceinline__ size_t state_of(int sequence, int row) const {
    return (static_cast<size_t>(sequence) * conv.C + (row - start)) * (conv.W - 1);
  }
  __device__ __forceinline__ void expect(const Product&, int token, int row) const {
    if (!has(row)) return;
    if (conv.T == 1) prefetch(conv.state + state_of(token, row));
    prefetch(conv.weight + static_cast<size_t>(row - start) * conv.W);
    prefetch(conv.bias + (row - start));
  }

  // The inputs before token `position` of a sequence: `state` is its channel's, `y` its channel at that token.
  template <int kStride>
  __device__ __forceinline__ void recall(const float* state, const float* y, int position,
                                         float (&past)[kMost]) const {
    const int before = conv.W - 1;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i < before) past[i] = position + i < before ? state[position + i] : y[(i - before) * kStride];
    }
  }

  // A thread has some tokens of one row; the threads of a block are a multiple of its rows.
  template <int kTokens, int kRows>
  __device__ __forceinline__ void finish_tile(const Product& p, const TokenTile& tile, int row0,
                                              const float* y) const {
    constexpr int kStride = tile_stride(kRows), kLoads = kTokens < 4 ? kTokens : 4;
    const int row = row0 + threadIdx.x % kRows, first = threadIdx.x / kRows, each = blockDim.x / kRows;
    const bool live = row < p.M, channel = live && has(row);
    const int before = conv.W - 1;
    const bool part = tile.of.before;  // of one sequence; else whole ones
    const int sequence0 = (part ? tile.first : tile.start) / conv.T;
    y += threadIdx.x % kRows;
    float weight[kMost] = {}, now_weight = 0, bias = 0;
    if (channel) {
      const float* const weights = conv.weight + static_cast<size_t>(row - start) * conv.W;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < before) weight[i] = __ldg(weights + i);
      }
      now_weight = __ldg(weights + before), bias = __ldg(conv.bias + (row - start));
    }
    for (int slot0 = first; live && slot0 < kTokens; slot0 += kLoads * each) {
      float past[kLoads][kMost];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {  // loads before a store, which might change what they load
        const int slot = slot0 + k * each, sequence = part ? 0 : slot / conv.T;
        if (!channel || !tile.has(slot)) continue;
        recall<kStride>(conv.state + state_of(sequence0 + sequence, row), y + slot * kStride,
                        part ? tile.start + slot : slot - sequence * conv.T, past[k]);
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int slot = slot0 + k * each;
        if (!tile.has(slot)) continue;
        float value = y[slot * kStride];
        if (channel)
          value = convolve_token<kMost>(past[k], weight, before, value, now_weight, bias, conv.silu);
        store(p, tile.token(slot), row, value);
      }
    }
    __syncthreads();  // the state is read

    const int ends = part ? tile.start < 0 : min(tile.of.own, tile.of.sequence - tile.start) / conv.T;
    for (int sequence = first; channel && sequence < ends; sequence += each) {
      const size_t state = state_of(sequence0 + sequence, row);
      float past[kMost];
      recall<kStride>(conv.state + state, y + (part ? before : (sequence + 1) * conv.T) * kStride, conv.T,
                      past);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i < before) conv.new_state[state + i] = past[i];
      }
    }
  }
};

}  // namespace of_norm_scaffold_conv
using namespace of_norm_scaffold_conv;

cudaError_t norm_scaffold_conv(const NormArgs& norm, const ScaffoldArgs& args, const ConvArgs& conv,
                               int32_t x_start, void* workspace, cudaStream_t stream) {
  if (conv.W < 2 || conv.W > 4) return cudaErrorInvalidValue;
  const Product product = scaffold_product(args, workspace);
  const Convolve convolve(conv, x_start);
  if (takes_one_token<4>(product)) {
    return with_norm_row(norm, nullptr, [&](const auto& x) {
      return one_token<Bits, 4>(product, convolve, x, args.K, args.down, args.down_scale, stream);
    });
  }
  const cudaError_t error =
      with_norm_row(norm, nullptr, [&](const auto& x) { return quantize_for(product, args, x, stream); });
  return error == cudaSuccess ? matmul<Bits>(product, convolve, stream) : error;
}

}  // namespace dfssm::trt
