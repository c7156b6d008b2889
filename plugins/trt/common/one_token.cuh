// The product of one token in one launch: every block norms and quantises the token for itself, and makes the
// inner half of the low rank, instead of waiting for a launch that does it once.
//
// A launch that depends on another costs some 3 us. What every block repeats costs less, for one token: from
// L2 its activations and `down`, 48 KB (K = 2048) to 112 KB (K = 4096 with a gate), at 64 bytes a clock and SM
// under a microsecond. With more tokens it would cost more than the launch. Results are those of the two
// launches, bit for bit: the norm adds in the same order, and the rest is whole numbers and the same fp32
// operations on them.
#pragma once

#include "common/device.h"
#include "common/launch.h"
#include "common/matmul.cuh"
#include "common/quantize.cuh"

namespace dfssm::trt {

constexpr int kOneTokenColumns = 4096, kOneTokenRank = 64;  // as many as there is shared memory for

// A block makes kTiles * 16 rows. Each warp multiplies one unit of columns of 16 rows at a time; the units of
// a row add up in shared memory.
template <class Weights, int kTiles, class Epilogue, class Row>
__global__ void __launch_bounds__(kQuantizeThreads)
    one_token_kernel(Product p, Epilogue epilogue, Row x, int32_t K, const int8_t* down,
                     const float* down_scale) {
  constexpr int kRows = kTiles * 16, kSets = Weights::kSets;
  constexpr int kUnits = kOneTokenColumns / (Weights::kSteps * kStep);
  DFSSM_SHARED(uint4, bytes, kOneTokenColumns / 16);   // q, in the order of the columns
  DFSSM_SHARED(uint4, pieces, kOneTokenColumns / 16);  // q, [steps, 4], as the tensor cores want it
  DFSSM_SHARED(int32_t, partial, kUnits* kRows);
  DFSSM_SHARED(float, h, kOneTokenRank);
  DFSSM_SHARED(float, outputs, Epilogue::kTiled ? kRows : 1);
  DFSSM_SHARED(uint32_t, of_warp, kQuantizeWarps);
  DFSSM_SHARED(float, s, 1);
  DFSSM_SHARED(int32_t, sum, 1);
  const int tid = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.y * kRows, units = p.x.steps / Weights::kSteps;

  // On their way from memory while the token is quantised.
  for (int i = tid; i < kRows * ((p.row_bytes + kLine - 1) / kLine); i += kQuantizeThreads) {
    const int row = min(row0 + i % kRows, p.M - 1);
    prefetch(p.weights + static_cast<size_t>(row) * p.row_bytes + i / kRows * kLine);
  }
  if (tid < kRows) {
    const int row = min(row0 + tid, p.M - 1);
    prefetch(p.scale + row);
    if (p.R > 0) prefetch(p.up_scale + row), prefetch(p.up + static_cast<size_t>(row) * p.R);
    epilogue.expect(p, 0, row);
  }
  wait_for_launch_before();

  const QuantizeScale scale = quantize_scale(x.prepare(0), of_warp);
  const int total = quantize_columns(x, 0, p.x.steps * kStep, K, scale.inverse, bytes);
  __syncthreads();
  for (int i = tid; i < p.x.steps * kStep / 32; i += kQuantizeThreads) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      pieces[Weights::Order::step(i, half) * 4 + Weights::Order::quad(i, half)] =
          quantized_piece<typename Weights::Order>(bytes, i, half);
    }
  }
  for (int row = warp; row < p.R; row += kQuantizeWarps) {
    const int dot = warp_sum(dot_of(down + static_cast<size_t>(row) * K, bytes, K));
    if (lane == 0) h[row] = __fmul_rn(__fmul_rn(down_scale[row], scale.s), static_cast<float>(dot));
  }
  const int of_lanes = warp_sum(total);
  if (lane == 0) of_warp[warp] = static_cast<uint32_t>(of_lanes);
  __syncthreads();
  if (tid == 0) {
    int all = 0;
    for (int i = 0; i < kQuantizeWarps; ++i) all += static_cast<int>(of_warp[i]);
    s[0] = scale.s, sum[0] = all;
  }

  const auto load = [&](auto* row, int at) { return load_once(row + min(at, p.row_bytes - 16)); };
  for (int slot = warp; slot < kTiles * units; slot += kQuantizeWarps) {
    const int tile = slot % kTiles, unit = slot / kTiles, first = min(row0 + tile * 16, p.M - 1);
    int offsets[2];
    row_offsets(p, first, lane, offsets);
    uint32_t weights[2][4];
    load_unit(p.weights + static_cast<size_t>(first) * p.row_bytes, offsets, unit, lane, load, weights);
    int sums[kSets][1][4] = {};
#pragma unroll
    for (int step = 0; step < Weights::kSteps; ++step) {
      const uint4 q[1] = {pieces[(unit * Weights::kSteps + step) * 4 + lane % 4]};  // for all eight tokens
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        multiply<Weights, kSets>(weights[0], weights[1], step, pair, q, sums[(2 * step + pair) % kSets]);
      }
    }
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      int all = 0;
#pragma unroll
      for (int set = 0; set < kSets; ++set) all += sums[set][0][upper * 2] >> set;
      if (lane % 4 == 0) partial[unit * kRows + tile * 16 + upper * 8 + lane / 4] = all;
    }
  }
  __syncthreads();
  const int row = row0 + tid;
  if (tid < kRows && row < p.M) {
    int all = 0;
    for (int unit = 0; unit < units; ++unit) all += partial[unit * kRows + tid];
    p.x.h = h, p.x.s = s, p.x.sum = sum;
    const float y = correct(p, row, dequantize<Weights>(p, 0, 0, row, all), low_rank(p, 0, row));
    if constexpr (Epilogue::kTiled) {
      outputs[tid] = y;
    } else {
      epilogue.store(p, 0, row, epilogue.finish(p, 0, row, y));
    }
  }
  if constexpr (Epilogue::kTiled) {
    __syncthreads();
    epilogue.template finish_tile<1, kRows>(p, TokenTile({1, 1, 0}), row0, outputs);
  }
}

// Blocks that share an SM repeat the reads after each other: on a small GPU two launches are faster.
constexpr int kOneTokenWaves = 3;
inline bool has_few_blocks(int blocks) {
  int device, sms;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
         blocks <= kOneTokenWaves * sms;
}

template <int kTiles>
bool takes_one_token(const Product& p) {
  return p.n == 1 && has_few_blocks(tiles(p.M, kTiles * 16)) && p.planes == 1 && p.row_bytes % 16 == 0 &&
         p.R <= kOneTokenRank && p.x.steps * kStep <= kOneTokenColumns;
}

template <class Weights, int kTiles, class Epilogue, class Row>
cudaError_t one_token(const Product& p, const Epilogue& epilogue, const Row& x, int32_t K, const int8_t* down,
                      const float* down_scale, cudaStream_t stream) {
  return launch(one_token_kernel<Weights, kTiles, Epilogue, Row>, dim3(1, tiles(p.M, kTiles * 16)),
                kQuantizeThreads, Row::kKept ? K * sizeof(float) : 0, stream, p, epilogue, x, K, down,
                down_scale);
}

}  // namespace dfssm::trt
