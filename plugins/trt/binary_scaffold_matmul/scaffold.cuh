// The product with a scaffold, for activations from anywhere and outputs to anywhere: bits become bytes of 0
// and 1 in registers, an AND and at most a shift for four weights, and go into the int8 tensor cores
// (common/matmul.cuh); y = 2 (sum of q where the bit is set) - (sum of q).
//
// Instructions, counted in SASS (sm_80): for 256 weights and up to eight tokens a lane takes 64 LOP3, 8 SHF,
// 16 IMMA and 10 loads, 106 with the loop: 0.41 a weight; for 16 tokens 184: 0.72. LOP3 at 16 lanes a clock
// is the limit: an SM expands 32 bytes of bits a clock, 4.9 TB/s on an A100. What was weighed against it:
// - __dp4a of the same bytes: AND and IDP for four weights, 0.5 a weight for one token, 0.25 for each more;
// - b1 mma of bit planes of q, which needs no expansion: 1/128 a weight and token on sm_80 to sm_90, but
//   Blackwell has no such instruction (ptxas calls a routine of eight IMMA), and memory is the limit anyway.
#pragma once

#include "common/device.h"
#include "common/kernels.h"
#include "common/matmul.cuh"
#include "common/quantize.cuh"

namespace dfssm::trt {

struct Bits {
  using Order = BitOrder;
  using Grain = uint32_t;
  static constexpr int kSteps = BitOrder::kUnit / kStep;
  static constexpr int kSets = 4;
  static constexpr int kBatch = 1;

  // Columns j, j + 8, j + 16, j + 24 of word step / 2 with j = 2 (step % 2) + pair, + 4 in the second half of
  // an mma. kSets = 4: times 2^j.
  template <int kSets>
  static __device__ __forceinline__ uint32_t fragment(const uint32_t (&unit)[4], int step, int pair,
                                                      int half) {
    const uint32_t word = unit[step / 2];
    const int j = step % 2 * 2 + pair;
    return kSets == 4 ? (word >> 4 * half) & (0x01010101u << j) : (word >> (4 * half + j)) & 0x01010101u;
  }
  static __device__ __forceinline__ int value(int positive, int sum_q) { return 2 * positive - sum_q; }
};

// The second launch, of activations that the first one quantises into the workspace.
inline Product scaffold_product(const ScaffoldArgs& args, void* workspace) {
  return {reinterpret_cast<const uint8_t*>(args.bits),
          args.scale,
          args.up,
          args.up_scale,
          quantized_at<BitOrder>(workspace, args.n, args.K, args.R),
          args.y,
          args.n,
          args.M,
          args.R,
          args.planes,
          args.K / 8,
          args.type};
}

template <class Row>
cudaError_t quantize_for(const Product& p, const ScaffoldArgs& args, const Row& x, cudaStream_t stream) {
  const size_t ahead = p.n <= kFewTokens ? static_cast<size_t>(p.planes) * p.M * p.row_bytes : 0;
  return quantize<BitOrder>(x, p.n, args.K, args.down, args.down_scale, p.R, args.bits, ahead, p.x, stream);
}

}  // namespace dfssm::trt
