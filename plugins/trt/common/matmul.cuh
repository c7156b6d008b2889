// y = scale s (w . q) over int8 tensor cores, for weights that become int8 fragments in registers: packed bits or int8.
//
// Both kernels take the weights as the A operand of mma 16x8x32: lane 4 g + t holds 16 bytes of the rows g
// and g + 8 as they lie in memory, a unit, and makes the fragments of the unit's steps of 64 columns from
// them. Nothing else of the weights exists anywhere. Eight tokens are the B operand (quantize.cuh). A
// `Weights` type says how:
//   Order       of the activations' columns
//   kSteps      steps a unit
//   Grain       rows are a multiple of this many bytes
//   fragment<kSets>(unit, step, pair, half)   four columns of a row as bytes, for the pair-th mma of the step
//   value(sum, sum_q)                         w . q from the sum of fragments times q
#pragma once

#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"
#include "common/quantize.cuh"

namespace dfssm::trt {

struct Product {
  const uint8_t* weights;  // [planes, M, row_bytes]
  const float* scale;      // [planes, M]
  const int8_t* up;        // [M, R]
  const float* up_scale;   // [M]
  Quantized x;
  void* y;  // [n, M]
  int32_t n, M, R, planes, row_bytes;
  Float y_type;
};

__device__ __forceinline__ float load_float(Float type, const void* from, size_t at) {
  if (type == Float::f32) return static_cast<const float*>(from)[at];
  return __half2float(static_cast<const __half*>(from)[at]);
}
__device__ __forceinline__ void store_float(Float type, void* to, size_t at, float value) {
  if (type == Float::f32) {
    static_cast<float*>(to)[at] = value;
  } else {
    static_cast<__half*>(to)[at] = __float2half_rn(value);
  }
}

// The tokens of a sequence, or of all where no output looks at another, in tiles: `own` a tile, after `before` that the
// tile before has too. Before the first of a sequence stand its last.
struct Tokens {
  int32_t sequence, own, before;
};
struct TokenTile {
  Tokens of;
  int first, start;  // token 0 of the sequence; its number in slot 0

  __device__ __forceinline__ explicit TokenTile(const Tokens& tokens)
      : of(tokens),
        first(tokens.before ? blockIdx.z * tokens.sequence : 0),
        start(blockIdx.x * tokens.own - tokens.before) {}
  __device__ __forceinline__ int token(int slot) const {
    const int at = start + slot;
    return first + min(of.before && at < 0 ? at + of.sequence : at, of.sequence - 1);
  }
  __device__ __forceinline__ bool has(int slot) const {
    return slot >= of.before && slot < of.before + of.own && start + slot < of.sequence;
  }
};

// What becomes of an output, an Epilogue: the one thread that has it calls finish, which returns what is to
// be stored, and then store. expect asks for what finish will read, long before. This one: it is stored.
//
// kTiled: a block's outputs are put into shared memory, and then all its threads call finish_tile instead.
struct Store {
  static constexpr bool kTiled = false;
  static constexpr int kAtOnce = 16;  // of many tokens, what registers allow: outputs finished, then stored
  Tokens tokens(int32_t n, int32_t tile) const { return {n, tile, 0}; }
  __device__ __forceinline__ void expect(const Product&, int /*token*/, int /*row*/) const {}
  __device__ __forceinline__ float finish(const Product&, int, int, float y) const { return y; }
  __device__ __forceinline__ void store(const Product& p, int token, int row, float y) const {
    store_float(p.y_type, p.y, static_cast<size_t>(token) * p.M + row, y);
  }
};

// Few tokens use weights once: they pass by L1, which keeps the activations that every block reads.
__device__ __forceinline__ uint4 load_once(const uint8_t* from) {
#ifdef DFSSM_EMULATION
  return *reinterpret_cast<const uint4*>(from);
#else
  uint4 out;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
      : "l"(from));
  return out;
#endif
}

// 16 bytes of a row that may end before them, and be aligned to a Grain only; what does not exist is zero.
template <class Grain>
__device__ __forceinline__ uint4 load_grains(const uint8_t* row, int offset, int row_bytes) {
  constexpr int kPerWord = 4 / sizeof(Grain);
  uint32_t out[4] = {};
#pragma unroll
  for (int i = 0; i < 4 * kPerWord; ++i) {
    const int at = offset + i * static_cast<int>(sizeof(Grain));
    if (at >= row_bytes) continue;
    const uint32_t grain = *reinterpret_cast<const Grain*>(row + at);
    out[i / kPerWord] |= grain << (i % kPerWord * 8 * sizeof(Grain));
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// What does not exist at the edges of the matrices costs nothing: the last row, token or 16 bytes stand in.
// Such rows and tokens give outputs that nobody stores; such columns meet activations that are padded with zeros.

// From the first of a block's rows to the row row0 + 8 i + g of a lane, in bytes.
template <int kRows>
__device__ __forceinline__ void row_offsets(const Product& p, int row0, int lane, int (&out)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) out[i] = (min(row0 + i * 8 + lane / 4, p.M - 1) - row0) * p.row_bytes;
}

// Where a lane's part of the steps of its token, that of slot `first` + g, begins.
__device__ __forceinline__ uint32_t token_offset(const Product& p, const TokenTile& tile, int first,
                                                 int lane) {
  const int token = tile.token(first + lane / 4);
  return token / kGroup * p.x.steps * kStepPieces + token % kGroup * 4 + lane % 4;
}

// A lane's 16 bytes of unit `unit` of its rows.
template <class Load, int kRows>
__device__ __forceinline__ void load_unit(const uint8_t* rows, const int (&offsets)[kRows], int unit,
                                          int lane, Load&& load, uint32_t (&out)[kRows][4]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const uint4 v = load(rows + offsets[i], unit * 64 + lane % 4 * 16);
    out[i][0] = v.x, out[i][1] = v.y, out[i][2] = v.z, out[i][3] = v.w;
  }
}

// sum_r up[row, r] h[token, r]
__device__ __forceinline__ float low_rank(const Product& p, int token, int row) {
  const int8_t* up = p.up + static_cast<size_t>(row) * p.R;
  const float* h = p.x.h + static_cast<size_t>(token) * p.R;
  float sum = 0;
  if (p.R % 4 == 0) {  // then both rows are aligned
#pragma unroll 4
    for (int r = 0; r < p.R; r += 4) {
      const char4 u = __ldg(reinterpret_cast<const char4*>(up + r));
      const float4 v = *reinterpret_cast<const float4*>(h + r);
      sum = fmaf(u.x, v.x, fmaf(u.y, v.y, fmaf(u.z, v.z, fmaf(u.w, v.w, sum))));
    }
  } else {
    for (int r = 0; r < p.R; ++r) sum = fmaf(up[r], h[r], sum);
  }
  return sum;
}

// One plane's part of y, rounded as opset/reference.py rounds it.
template <class Weights>
__device__ __forceinline__ float dequantize(const Product& p, int plane, int token, int row, int sum) {
  const float scale = __fmul_rn(p.scale[static_cast<size_t>(plane) * p.M + row], p.x.s[token]);
  return __fmul_rn(scale, static_cast<float>(Weights::value(sum, p.x.sum[token])));
}

// y with the low rank, `low` = sum_r up[row, r] h[token, r].
__device__ __forceinline__ float correct(const Product& p, int row, float y, float low) {
  return p.R > 0 ? __fadd_rn(y, __fmul_rn(p.up_scale[row], low)) : y;
}

// The pair-th half of a step: 16 rows by kGroups groups of tokens.
template <class Weights, int kSets, int kGroups>
__device__ __forceinline__ void multiply(const uint32_t (&low)[4], const uint32_t (&high)[4], int step,
                                         int pair, const uint4 (&q)[kGroups], int (&sums)[kGroups][4]) {
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = Weights::template fragment<kSets>(i % 2 ? high : low, step, pair, i / 2);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t b[2] = {pair ? q[g].z : q[g].x, pair ? q[g].w : q[g].y};
    mma_s8_16x8x32(sums[g], a, b);
  }
}

// Of a token's outputs in shared memory: lanes of a fragment hit 32 banks.
__host__ __device__ constexpr int tile_stride(int rows) { return rows + 4; }

// ---- few tokens: the time is the weights' way from memory ----

// A block makes kTiles * 16 rows of kGroups * 8 tokens; its warps share the columns, so that a matrix of 2048
// rows still gives 128 blocks of eight warps, and add up in shared memory. Every warp asks for its bytes
// before it does anything else. The activations come straight from L1 and L2: a block reads each of their
// bytes once, so a stage in shared memory would only add a barrier to wait at.
template <class Weights, class Epilogue, int kTiles, int kGroups, int kBatch>
__global__ void __launch_bounds__(256, kTiles* kGroups <= 2 ? 2 : 1)
    few_tokens_kernel(Product p, Epilogue epilogue, Tokens tokens) {
  constexpr int kRows = kTiles * 16, kTokens = kGroups * kGroup;
  constexpr int kStride = tile_stride(kRows);
  constexpr int kOutputs = kTokens * kStride;
  // Bits can stay where they are in their bytes, one AND each, if 1, 2, 4 and 8 times the sum are kept apart.
  // That takes four times the accumulators, so only the narrow tiles do.
  constexpr int kSets = kTiles * kGroups == 1 ? Weights::kSets : 1;
  DFSSM_DYNAMIC_SHARED(int32_t, shared);  // [warps, kOutputs], then [kOutputs] floats of planes or a tile
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int row0 = blockIdx.y * kRows;
  const TokenTile in_tile(Epilogue::kTiled ? tokens : Tokens{p.n, kTokens, 0});
  const int units = p.x.steps / Weights::kSteps;
  const bool whole = p.row_bytes % 16 == 0;  // then 16 bytes of a row are aligned, and all there or none
  float* totals = reinterpret_cast<float*>(shared + warps * kOutputs);

  if (lane < kRows) {  // what is wanted after the sums is not in any cache yet
    const int row = min(row0 + lane, p.M - 1);
    if (warp == 0) {
      prefetch(p.scale + row);
      if (p.R > 0) prefetch(p.up_scale + row), prefetch(p.up + static_cast<size_t>(row) * p.R);
    }
    for (int slot = warp; slot < kTokens; slot += warps) {
      if (in_tile.has(slot)) epilogue.expect(p, in_tile.token(slot), row);
    }
  }
  wait_for_launch_before();
  const auto load_whole = [&](auto* row, int at) { return load_once(row + min(at, p.row_bytes - 16)); };
  const auto load_part = [&](auto* row, int at) {
    return load_grains<typename Weights::Grain>(row, at, p.row_bytes);
  };
  int offsets[kTiles * 2];
  row_offsets(p, row0, lane, offsets);
  uint32_t pieces[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) pieces[g] = token_offset(p, in_tile, g * kGroup, lane);

  for (int plane = 0; plane < p.planes; ++plane) {
    const uint8_t* rows = p.weights + (static_cast<size_t>(plane) * p.M + row0) * p.row_bytes;
    int sums[kSets][kTiles][kGroups][4] = {};
    for (int unit = warp * kBatch; unit < units; unit += warps * kBatch) {
      uint32_t weights[kBatch][kTiles * 2][4];
      if (whole) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) load_unit(rows, offsets, unit + u, lane, load_whole, weights[u]);
      } else {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) load_unit(rows, offsets, unit + u, lane, load_part, weights[u]);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (unit + u >= units) break;
        const uint4* from = p.x.q + (unit + u) * Weights::kSteps * kStepPieces;
#pragma unroll
        for (int step = 0; step < Weights::kSteps; ++step) {
          uint4 q[kGroups];
#pragma unroll
          for (int g = 0; g < kGroups; ++g) q[g] = __ldg(from + pieces[g] + step * kStepPieces);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              multiply<Weights, kSets>(weights[u][2 * tile], weights[u][2 * tile + 1], step, pair, q,
                                       sums[(2 * step + pair) % kSets][tile]);
            }
          }
        }
      }
    }

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int sum = 0;
#pragma unroll
          for (int set = 0; set < kSets; ++set) sum += sums[set][tile][g][i] >> set;
          const int token = g * kGroup + lane % 4 * 2 + i % 2, row = tile * 16 + i / 2 * 8 + lane / 4;
          shared[warp * kOutputs + token * kStride + row] = sum;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * kRows; i += blockDim.x) {
      const int token = in_tile.token(i / kRows), row = row0 + i % kRows;
      if (row >= p.M || (!Epilogue::kTiled && !in_tile.has(i / kRows))) continue;
      const int at = i / kRows * kStride + i % kRows;
      int sum = 0;
      for (int w = 0; w < warps; ++w) sum += shared[w * kOutputs + at];
      float y = dequantize<Weights>(p, plane, token, row, sum);
      if (plane > 0) y = __fadd_rn(totals[at], y);
      if (plane + 1 == p.planes) y = correct(p, row, y, low_rank(p, token, row));
      if (Epilogue::kTiled || plane + 1 < p.planes) {
        totals[at] = y;
      } else {
        epilogue.store(p, token, row, epilogue.finish(p, token, row, y));
      }
    }
    if (Epilogue::kTiled || plane + 1 < p.planes) __syncthreads();
  }
  if constexpr (Epilogue::kTiled) epilogue.template finish_tile<kTokens, kRows>(p, in_tile, row0, totals);
}

// ---- many tokens: the time is the tensor cores' ----

// Blocks of 256 threads an SM. Two leave 128 registers a thread, a few less than ptxas wants for sm_75, where
// copies pass through registers, for sm_100 and sm_110.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ == 1000 || __CUDA_ARCH__ == 1100)
constexpr int kLargeBlocks = 1;
#else
constexpr int kLargeBlocks = 2;
#endif

// A block makes 32 kWarps rows of 64 tokens, with two warps side by side in the tokens: a warp's 32 x 32
// outputs use 16 bytes of activations from shared memory for four mma, half of what the tensor cores take
// time for, and bits expanded once for four. Two steps of activations are copied, and a unit of weights
// loaded, while those before are used.
template <class Weights, class Epilogue, int kWarps>
__global__ void __launch_bounds__(kWarps * 64, kWarps == 4 ? kLargeBlocks : 3)
    many_tokens_kernel(Product p, Epilogue epilogue, Tokens tokens) {
  constexpr int kTokens = 64, kThreads = kWarps * 64, kRows = kWarps * 32;
  constexpr int kStageSteps = 2, kStage = kTokens / kGroup * kStageSteps * kStepPieces;
  constexpr int kTile = Epilogue::kTiled ? kTokens * tile_stride(kRows) / 4 : 0;
  DFSSM_SHARED(uint4, stages, kTile > 2 * kStage ? kTile : 2 * kStage);  // and then the outputs
  const int tid = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block_row = blockIdx.y * kRows, row0 = block_row + warp / 2 * 32;
  const TokenTile in_tile(Epilogue::kTiled ? tokens : Tokens{p.n, kTokens, 0});
  const int units = p.x.steps / Weights::kSteps;

  constexpr int kCopies = kStage / kThreads;
  uint32_t pieces[kCopies];  // of a stage are a thread's to copy
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    pieces[i] = token_offset(p, in_tile, (warp / 2 + i * kWarps) * kGroup, lane) + warp % 2 * kStepPieces;
  }
  const auto copy = [&](int step0, int to) {
    const uint4* from = p.x.q + step0 * kStepPieces;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async16(&stages[to * kStage + i * kThreads + tid], from + pieces[i]);
    copy_async_commit();
  };

  wait_for_launch_before();
  int sums[2][4][4] = {};  // [16 rows, 8 tokens, fragment]
  uint32_t weights[2][4][4];
  copy(0, 0);
  const uint8_t* rows = p.weights + static_cast<size_t>(row0) * p.row_bytes;
  int offsets[4];
  row_offsets(p, row0, lane, offsets);
  const auto load = [&](auto* row, int at) {
    return __ldg(reinterpret_cast<const uint4*>(row + min(at, p.row_bytes - 16)));
  };
  load_unit(rows, offsets, 0, lane, load, weights[0]);
  int stage = 1;
  for (int unit0 = 0; unit0 < units; unit0 += 2) {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int unit = unit0 + slot;
      if (unit >= units) break;
      load_unit(rows, offsets, unit + 1, lane, load, weights[slot ^ 1]);
#pragma unroll
      for (int s = 0; s < Weights::kSteps; ++s) {
        const int k = (slot * Weights::kSteps + s) % kStageSteps,
                  next = unit * Weights::kSteps + s + kStageSteps;
        if (k == 0) {
          stage ^= 1;
          copy_async_wait<0>();
          __syncthreads();  // this stage is here, and all have done with the other one
          if (next < p.x.steps) copy(next, stage ^ 1);
        }
        uint4 q[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          q[g] = stages[stage * kStage + ((warp % 2 * 4 + g) * kStageSteps + k) * kStepPieces + lane];
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            multiply<Weights, 1>(weights[slot][2 * tile], weights[slot][2 * tile + 1], s, pair, q,
                                 sums[tile]);
          }
        }
      }
    }
  }

  // A lane's 32 outputs are 4 rows by 8 tokens; half of them at a time, which 128 registers hold.
  if constexpr (Epilogue::kTiled) __syncthreads();  // the stages are read
  float* const tile = reinterpret_cast<float*>(stages);
  int row[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) row[i] = row0 + i * 8 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int slot[4];
    float low[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      slot[i] = (warp % 2 * 4 + half * 2 + i / 2) * kGroup + lane % 4 * 2 + i % 2;
    }
#pragma unroll 1
    for (int r = 0; r < p.R; ++r) {
      float up[4], h[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        up[i] = __ldg(p.up + static_cast<size_t>(min(row[i], p.M - 1)) * p.R + r);
        h[i] = __ldg(p.x.h + static_cast<size_t>(in_tile.token(slot[i])) * p.R + r);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) low[i / 4][i % 4] = fmaf(up[i / 4], h[i % 4], low[i / 4][i % 4]);
    }
#pragma unroll
    for (int first = 0; first < 16; first += Epilogue::kAtOnce) {
#pragma unroll  // loads before a store, which might change what they load
      for (int i = first; i < first + Epilogue::kAtOnce; ++i) {
        const int m = i / 4, t = i % 4, sum = sums[m / 2][half * 2 + t / 2][m % 2 * 2 + t % 2];
        const int at = min(row[m], p.M - 1), token = in_tile.token(slot[t]);
        const float y = correct(p, at, dequantize<Weights>(p, 0, token, at, sum), low[m][t]);
        low[m][t] = epilogue.finish(p, token, at, y);
      }
#pragma unroll
      for (int i = first; i < first + Epilogue::kAtOnce; ++i) {
        const int m = i / 4, t = i % 4;
        if constexpr (Epilogue::kTiled) {
          tile[slot[t] * tile_stride(kRows) + row[m] - block_row] = low[m][t];
        } else if (row[m] < p.M && in_tile.has(slot[t])) {
          epilogue.store(p, in_tile.token(slot[t]), row[m], low[m][t]);
        }
      }
    }
  }
  if constexpr (Epilogue::kTiled) {
    __syncthreads();
    epilogue.template finish_tile<kTokens, kRows>(p, in_tile, block_row, tile);
  }
}

// Grids are [tokens, rows, sequences]: blocks that share weights run at the same time, and all but the first find them
// in L2.
inline int32_t tiles(int32_t size, int32_t tile) { return (size + tile - 1) / tile; }
inline dim3 grid_of(const Tokens& tokens, int32_t n, int32_t rows) {
  return dim3(tiles(tokens.sequence, tokens.own), rows, n / tokens.sequence);
}

template <class Weights, int kTiles, int kGroups, int kBatch, class Epilogue>
cudaError_t few_tokens(const Product& p, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int kOutputs = kGroups * kGroup * (kTiles * 16 + 4);
  const int warps = min(8, tiles(p.x.steps / Weights::kSteps, kBatch));
  const size_t shared = (warps + (Epilogue::kTiled || p.planes > 1)) * kOutputs * sizeof(int32_t);
  const Tokens tokens = epilogue.tokens(p.n, kGroups * kGroup);
  return launch(few_tokens_kernel<Weights, Epilogue, kTiles, kGroups, kBatch>,
                grid_of(tokens, p.n, tiles(p.M, kTiles * 16)), 32 * warps, shared, stream, p, epilogue,
                tokens);
}

template <class Weights, int kWarps, class Epilogue>
cudaError_t many_tokens(const Product& p, const Epilogue& epilogue, cudaStream_t stream) {
  const Tokens tokens = epilogue.tokens(p.n, 64);
  return launch(many_tokens_kernel<Weights, Epilogue, kWarps>, grid_of(tokens, p.n, tiles(p.M, 32 * kWarps)),
                64 * kWarps, 0, stream, p, epilogue, tokens);
}

// From 17 to 64 tokens a small matrix has too few tiles of 64 tokens for a GPU, and its columns are shared
// out instead; a large one would pass through L2 once for every 32 tokens. 200: two blocks on each of 100
// SMs. Several planes and rows that are no multiple of 16 bytes do without the fast kernel: they are rare,
// and would cost it registers.
inline bool is_large(const Product& p) { return tiles(p.M, 128) * tiles(p.n, 64) >= 200; }
inline bool has_few_tokens(const Product& p) {
  return p.n <= kFewTokens || p.planes > 1 || p.row_bytes % 16 != 0 || (p.n <= 64 && !is_large(p));
}

template <class Weights, class Epilogue>
cudaError_t matmul(const Product& p, const Epilogue& epilogue, cudaStream_t stream) {
  if (p.n <= kGroup) return few_tokens<Weights, 1, 1, Weights::kBatch>(p, epilogue, stream);
  if (p.n <= kFewTokens) return few_tokens<Weights, 1, 2, Weights::kBatch>(p, epilogue, stream);
  if (has_few_tokens(p)) return few_tokens<Weights, 2, 4, 1>(p, epilogue, stream);
  return is_large(p) ? many_tokens<Weights, 4>(p, epilogue, stream)
                     : many_tokens<Weights, 2>(p, epilogue, stream);
}

}  // namespace dfssm::trt
