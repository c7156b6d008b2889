// The scan of many tokens on the tensor cores: the state-space dual of the recurrence (Mamba-2), 32 tokens a
// chunk. With d the time steps, a the decays, L_ij = a_(j+1) .. a_i for j <= i, else 0:
//
//   y_i = sum_j (C_i . B_j) L_ij d_j x_j  +  L_i h C_i  +  D x_i        L_i = a_0 .. a_i
//   h'  = L_31 h + sum_j B_j (x) L_31,j d_j x_j
//
// A block has a slice of kColumns columns of one head and goes through the chunks one after another, its
// state in fp32 registers from the first to the last: one launch, nothing shared between blocks.
//
// Decays are products in the order of the tokens, as the recurrence makes them. Differences of cumulative
// sums of their logarithms would need an exponential an element, and lose, after a step of size s, all that
// is smaller than s 2^-24.
//
// Every operand is the sum of two fp16, its first 22 bits, after an exact scaling that brings the largest of
// its chunk to 2^14; products are hi hi + hi lo + lo hi with fp32 sums. Narrow activations are one fp16, so
// B and C have no lower halves then. opset/tolerances.py has the bound (fp16_pairs). Against three TF32
// products: the same bits, half the instructions and half the shared memory. Against bfloat16 pairs: 2^6
// times as exact.
//
// A chunk with a number past 2^32, infinite or NaN, or of which all are below 2^-32, goes token by token:
// in a matrix product it would harm tokens before its own (0 times infinity), or be lost.
#pragma once

#include <cstdint>

#include "selective_scan_step/state.cuh"
#include "selective_scan_step/tokens.cuh"

namespace dfssm::trt::selective_scan {

constexpr int kChunkTokens = 32, kMostRows = 128;
constexpr int kPadding = 8;  // halves after a row: eight rows of 16 bytes lie in all banks

// A matrix in shared memory, kHalves fp16 an element.
template <int kRows, int kWidth, int kHalves>
struct alignas(16) Matrix {
  static constexpr int kParts = kHalves;
  __half at[kHalves][kRows][kWidth + kPadding];

  // Two neighbours of a row; `column` is even.
  __device__ __forceinline__ void put(int row, int column, float first, float second) {
    const __half2 high = __floats2half2_rn(first, second);
    *reinterpret_cast<__half2*>(&at[0][row][column]) = high;
    if constexpr (kHalves == 2) {
      *reinterpret_cast<__half2*>(&at[1][row][column]) =
          __floats2half2_rn(first - __half2float(__low2half(high)), second - __half2float(__high2half(high)));
    }
  }
};

// Fragments of 16 x 16 of the left and 16 x 8 of the right factor, k the inner dimension; kAlong: whether
// neighbours of a row of `from` differ in k.
template <bool kAlong, class From>
__device__ __forceinline__ void load_left(const From& from, int m, int k, uint32_t (&a)[From::kParts][4]) {
  const int lane = threadIdx.x % kWarpSize;
  const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  const int row = kAlong ? m + low + second : k + low + third;
  const int column = kAlong ? k + third : m + second;
#pragma unroll
  for (int part = 0; part < From::kParts; ++part)
    load_matrices<!kAlong>(a[part], &from.at[part][row][column]);
}
template <bool kAlong, class From>
__device__ __forceinline__ void load_right(const From& from, int n, int k, uint32_t (&b)[2][2]) {
  const int lane = threadIdx.x % kWarpSize;
  const int low = lane % 8, second = lane / 8 % 2 * 8, part = From::kParts == 2 ? lane / 16 : 0;
  const int row = kAlong ? n + low : k + low + second;
  const int column = kAlong ? k + second : n;
  uint32_t four[4];
  load_matrices<!kAlong>(four, &from.at[part][row][column]);
  b[0][0] = four[0], b[0][1] = four[1], b[1][0] = four[2], b[1][1] = four[3];
}

// A tile of 16 x 8 sums. The three products that add up to one have accumulators of their own, so that no
// mma waits for the one before, unless kChains is 1: where a warp has several tiles.
template <int kLeft, int kRight, int kChains = 3>
struct Sums {
  float at[kChains][4] = {};

  __device__ __forceinline__ void add(const uint32_t (&a)[kLeft][4], const uint32_t (&b)[2][2]) {
    if constexpr (kRight == 2) mma_f16_16x8x16(at[1 % kChains], a[0], b[1]);
    if constexpr (kLeft == 2) mma_f16_16x8x16(at[2 % kChains], a[1], b[0]);
    mma_f16_16x8x16(at[0], a[0], b[0]);
  }
  __device__ __forceinline__ float operator[](int i) const {
    float sum = at[0][i];
#pragma unroll
    for (int chain = 1; chain < kChains; ++chain) sum += at[chain][i];
    return sum;
  }
};

// A tile of 16 x 8 of a product, rows m and columns n of it, over the first `depth` of the inner dimension.
template <bool kAlong, class Left, class Right>
__device__ __forceinline__ Sums<Left::kParts, Right::kParts> multiply(const Left& left, const Right& right,
                                                                      int m, int n, int depth) {
  Sums<Left::kParts, Right::kParts> sums;
#pragma unroll 2
  for (int k = 0; k < depth; k += 16) {
    uint32_t a[Left::kParts][4], b[2][2];
    load_left<true>(left, m, k, a);
    load_right<kAlong>(right, n, k, b);
    sums.add(a, b);
  }
  return sums;
}

// The powers of two that bring a largest magnitude to 2^14 and back.
struct Scale {
  float to, back;
};
__device__ __forceinline__ Scale scale_of(uint32_t largest) {
  if (largest == 0) return {1.0f, 1.0f};
  const uint32_t exponent = largest >> 23;
  return {__uint_as_float((2 * 127 + 14 - exponent) << 23), __uint_as_float((exponent - 14) << 23)};
}
__device__ __forceinline__ bool is_regular(uint32_t largest) {
  return largest == 0 || (largest >= (127u - 32) << 23 && largest < (127u + 32) << 23);
}

template <class StateType, int columns>
struct Slice {
  using State = StateType;
  static constexpr int kColumns = columns;
};
constexpr int kChunkedWarps = kMostRows / 16, kChunkedThreads = kWarpSize * kChunkedWarps;

struct Largest {
  uint32_t B, C, h;
};

struct Step {
  float d, decay, since, left;  // since: L_i. left: d_i times what is left of it after the chunk
};

template <class Slice, int kHalves>
struct Shared {
  Matrix<kChunkTokens, kMostRows, kHalves> B, C;
  Matrix<kChunkTokens, Slice::kColumns, 2> fed, left;  // d x, and what is left of it after the chunk
  Matrix<kChunkTokens, kChunkTokens, 2> CB;            // L C . B
  Matrix<kMostRows, Slice::kColumns, 2> h;
  float decay[kChunkTokens][kChunkTokens + kPadding];  // L
  Step step[kChunkTokens];
  Largest largest[kChunkedWarps];
  uint32_t largest_x[kChunkTokens];
  bool usable;  // all of `step`
};

// Over that many lanes of a warp side by side.
template <int kLanes = kWarpSize>
__device__ __forceinline__ uint32_t warp_largest(uint32_t m) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes; lanes /= 2) m = max(m, __shfl_xor_sync(kAllLanes, m, lanes));
  return m;
}

template <class Slice, class T>
__global__ void __launch_bounds__(kChunkedThreads, 1) chunked_scan(const ScanArgs a, int group_heads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // before, no block may have that much shared memory
  using State = typename Slice::State;
  constexpr int kColumns = Slice::kColumns, kTiles = kColumns / 8;
  constexpr int kHalves = sizeof(T) == 2 ? 1 : 2;
  constexpr float kInner = 1.0f / (1 << 22);  // a sum of 128 products below 2^30 to less than 2^15
  using Memory = Shared<Slice, kHalves>;
  DFSSM_DYNAMIC_SHARED(Memory, shared);
  Memory& s = *shared;

  const int tid = threadIdx.x, lane = tid % kWarpSize, warp = tid / kWarpSize;
  const int g = lane / 4, t = lane % 4 * 2;  // of a tile of sums: rows g and g + 8, columns t and t + 1
  const int slice = blockIdx.x * kColumns;
  const int rows = (a.N + 15) / 16 * 16;
  const int head = blockIdx.y, group = head / group_heads * a.N;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * a.T;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.z) * a.H + head) * a.N;

  wait_for_launch_before();

  // The state: a warp has 16 rows.
  const int row0 = warp * 16;
  const auto row_of = [&](int i) { return row0 + g + i / 2 * 8; };
  const auto column_of = [&](int tile, int i) { return tile * 8 + t + i % 2; };
  const auto inside = [&](int tile, int i) { return row_of(i) < a.N && slice + column_of(tile, i) < a.P; };
  const auto at = [&](int tile, int i) { return (first_row + row_of(i)) * a.P + slice + column_of(tile, i); };
  float h[kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      h[tile][i] = inside(tile, i) ? to_float(static_cast<const State*>(a.state)[at(tile, i)]) : 0.0f;
      if constexpr (sizeof(State) == 1) {
        if (row_of(i) < a.N) h[tile][i] *= a.state_scale[first_row + row_of(i)];
      }
    }
  }

  // Of a chunk a thread fetches two neighbours of B and C of some tokens, two of x, and one thread a token its dt.
  constexpr int kPairs = kMostRows / 2, kTokens = kChunkTokens * kPairs / kChunkedThreads;
  constexpr int kPairsOfX = kColumns / 2, kTokensOfX = kChunkTokens * kPairsOfX / kChunkedThreads;
  const int pair = tid % kPairs * 2, token0 = tid / kPairs * kTokens;
  const int pair_of_x = tid % kPairsOfX * 2, token0_of_x = tid / kPairsOfX * kTokensOfX;
  float B[kTokens][2], C[kTokens][2], x[kTokensOfX][2], dt;
  const auto fetch = [&](int first) {
    const int count = min(kChunkTokens, a.T - first);
    const auto pairs = [&](const void* p, int64_t stride, int token, int offset, int column, int width,
                           auto& to) {
      const T* from = static_cast<const T*>(p) + (first_token + first + token) * stride + offset + column;
#pragma unroll
      for (auto& two : to) {
        const bool live = token++ < count;
        two[0] = live && column < width ? to_float(from[0]) : 0.0f;
        two[1] = live && column + 1 < width ? to_float(from[1]) : 0.0f;
        from += stride;
      }
    };
    pairs(a.Bm, a.B_stride, token0, group, pair, a.N, B);
    pairs(a.Cm, a.C_stride, token0, group, pair, a.N, C);
    pairs(a.x, a.x_stride, token0_of_x, head * a.P, slice + pair_of_x, a.P, x);
    if (tid < count) dt = read<T>(a.dt, (first_token + first + tid) * a.dt_stride + head);
  };

  // By the first warp, a lane a token. Past the prompt nothing is fed and nothing decays.
  const auto time_steps = [&](int count) {
    const float2 own = lane < count ? time_step(a, head_of(a), dt) : make_float2(0.0f, 1.0f);
    Step step{own.x, own.y, own.y, 0.0f};
    for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
      const float before = __shfl_up_sync(kAllLanes, step.since, lanes);
      if (lane >= lanes) step.since *= before;
    }
    float decay = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kChunkTokens; ++i) {
      const float next = __shfl_sync(kAllLanes, own.y, i);
      decay = i == lane ? 1.0f : decay * (i > lane ? next : 0.0f);
      s.decay[i][lane] = decay;
    }
    step.left = step.d * decay;
    s.step[lane] = step;
    const bool usable = step.d >= 0.0f && step.decay >= 0.0f && step.decay <= 1.0f;
    const bool all = __all_sync(kAllLanes, usable);
    if (lane == 0) s.usable = all;
  };

  // For what no matrix product may touch: the state in shared memory, a thread has some rows of a column.
  const auto token_by_token = [&](int first, int count) {
    constexpr int kParts = kChunkedThreads / kColumns;
    float (&state)[kMostRows][kColumns] = reinterpret_cast<float (&)[kMostRows][kColumns]>(s.h);
    float (&partial)[kParts][kColumns] = reinterpret_cast<float (&)[kParts][kColumns]>(s.CB);
    // Neighbours as float2: CUDA 13's compiler joins single ones in some builds and not in others.
    const auto two_of = [&](int i) -> float2& {
      return *reinterpret_cast<float2*>(&state[row_of(i % 2 * 2)][column_of(i / 2, 0)]);
    };
    const int part = tid / kColumns, column = tid % kColumns;
    const bool live = slice + column < a.P;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      two_of(i) = make_float2(h[i / 2][i % 2 * 2], h[i / 2][i % 2 * 2 + 1]);
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const int64_t token = first_token + first + j;
      const float x = live ? read<T>(a.x, token * a.x_stride + head * a.P + slice + column) : 0.0f;
      const float decay = s.step[j].decay, dx = s.step[j].d * x;
      float y = part == 0 ? a.D[head] * x : 0.0f;
#pragma unroll 1
      for (int n = part; n < a.N; n += kParts) {
        const float B = read<T>(a.Bm, token * a.B_stride + group + n);
        const float C = read<T>(a.Cm, token * a.C_stride + group + n);
        const float next = fmaf(decay, state[n][column], B * dx);
        state[n][column] = next;
        y = fmaf(C, next, y);
      }
      partial[part][column] = y;
      __syncthreads();
      if (part == 0 && live) {
        for (int i = 1; i < kParts; ++i) y += partial[i][column];
        write<T>(a.y, (token * a.H + head) * a.P + slice + column, y);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const float2 two = two_of(i);
      h[i / 2][i % 2 * 2] = two.x, h[i / 2][i % 2 * 2 + 1] = two.y;
    }
  };

  fetch(0);
  for (int first = 0; first < a.T; first += kChunkTokens) {
    const int count = min(kChunkTokens, a.T - first);
    Largest largest{};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        largest.B = max(largest.B, magnitude(B[k][i]));
        largest.C = max(largest.C, magnitude(C[k][i]));
      }
    }
#pragma unroll
    for (int k = 0; k < kTokensOfX; ++k) {
      const uint32_t m = warp_largest<kPairsOfX>(max(magnitude(x[k][0]), magnitude(x[k][1])));
      if (pair_of_x == 0) s.largest_x[token0_of_x + k] = m;
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) largest.h = max(largest.h, magnitude(h[i / 4][i % 4]));
    largest = {warp_largest(largest.B), warp_largest(largest.C), warp_largest(largest.h)};
    if (lane == 0) s.largest[warp] = largest;
    if (warp == 0) time_steps(count);
    __syncthreads();  // and all have done with the chunk before
    for (int w = 0; w < kChunkedWarps; ++w) {
      const Largest other = s.largest[w];
      largest = {max(largest.B, other.B), max(largest.C, other.C), max(largest.h, other.h)};
    }
    const uint32_t largest_fed = warp_largest(magnitude(__uint_as_float(s.largest_x[lane]) * s.step[lane].d));

    if (!s.usable || !is_regular(largest.B) || !is_regular(largest.C) || !is_regular(largest.h) ||
        !is_regular(largest_fed)) {
      token_by_token(first, count);
      if (first + count < a.T) fetch(first + count);
      continue;
    }

    const Scale of_B = scale_of(largest.B), of_C = scale_of(largest.C), of_x = scale_of(largest_fed),
                of_h = scale_of(largest.h);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      if (pair >= rows) continue;
      s.B.put(token0 + k, pair, B[k][0] * of_B.to, B[k][1] * of_B.to);
      s.C.put(token0 + k, pair, C[k][0] * of_C.to, C[k][1] * of_C.to);
    }
#pragma unroll
    for (int k = 0; k < kTokensOfX; ++k) {
      const int token = token0_of_x + k;
      const float d = s.step[token].d * of_x.to, left = s.step[token].left * of_x.to;
      s.fed.put(token, pair_of_x, d * x[k][0], d * x[k][1]);
      s.left.put(token, pair_of_x, left * x[k][0], left * x[k][1]);
    }
    if (row0 < rows) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          s.h.put(row_of(i), column_of(tile, i), h[tile][i] * of_h.to, h[tile][i + 1] * of_h.to);
        }
      }
    }
    __syncthreads();
    if (first + count < a.T) fetch(first + count);

    // L C . B: the six tiles of 16 x 8 that L leaves.
    if (warp < 6) {
      const int m = warp < 2 ? 0 : 16, n = (warp < 2 ? warp : warp - 2) * 8;
      const auto sums = multiply<true>(s.C, s.B, m, n, rows);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = m + g + i / 2 * 8;
        s.CB.put(row, n + t, sums[i] * s.decay[row][n + t] * kInner,
                 sums[i + 1] * s.decay[row][n + t + 1] * kInner);
      }
    }
    // A warp has 16 tokens by 8 columns of y, by twice as many if the slice is 64.
    const int y_row = warp % 2 * 16;
    const float of_before = of_C.back * of_h.back;
    const float since[2] = {s.step[y_row + g].since * of_before, s.step[y_row + g + 8].since * of_before};
    const float passed = s.step[kChunkTokens - 1].since;
    __syncthreads();  // past it the steps and L may be those of the next chunk

#pragma unroll 1
    for (int y_column = warp / 2 * 8; y_column < kColumns; y_column += 32) {
      float y[4];
      const auto before = multiply<false>(s.C, s.h, y_row, y_column, rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = before[i] * since[i / 2];
      const auto within = multiply<false>(s.CB, s.fed, y_row, y_column, y_row + 16);
      const float of_within = of_C.back * of_B.back * (1 / kInner) * of_x.back;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = y_row + g + i / 2 * 8, column = slice + y_column + t + i % 2;
        if (row >= count || column >= a.P) continue;
        const int64_t token = first_token + first + row;
        const float x = read<T>(a.x, token * a.x_stride + head * a.P + column);
        y[i] = fmaf(within[i], of_within, y[i]);
        write<T>(a.y, (token * a.H + head) * a.P + column, fmaf(a.D[head], x, y[i]));
      }
    }

    if (row0 < rows) {
      const float of_left = of_B.back * of_x.back;
      uint32_t left[2][kHalves][4];
      load_left<false>(s.B, row0, 0, left[0]);
      load_left<false>(s.B, row0, 16, left[1]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Sums<kHalves, 2, 1> sums;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t right[2][2];
          load_right<false>(s.left, tile * 8, k * 16, right);
          sums.add(left[k], right);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) h[tile][i] = fmaf(passed, h[tile][i], sums[i] * of_left);
      }
    }
  }

#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    RowScale scale;
    if constexpr (sizeof(State) == 1) {
      uint32_t m = 0;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) m = larger_magnitude(m, h[i / 2][upper * 2 + i % 2]);
      for (int lanes = 1; lanes < 4; lanes *= 2) m = max(m, __shfl_xor_sync(kAllLanes, m, lanes));
      scale = row_scale(m);
      const int row = row_of(upper * 2);
      if (t == 0 && row < a.N) a.new_state_scale[first_row + row] = scale.scale;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = upper * 2; i < upper * 2 + 2; ++i) {
        if (!inside(tile, i)) continue;
        State& to = static_cast<State*>(a.new_state)[at(tile, i)];
        if constexpr (sizeof(State) == 1) {
          to = static_cast<int8_t>(quantize(h[tile][i], scale.inverse) & scale.keep);
        } else if constexpr (sizeof(State) == 2) {
          to = __float2half_rn(saturate(h[tile][i]));
        } else {
          to = h[tile][i];
        }
      }
    }
  }
#endif
}

}  // namespace dfssm::trt::selective_scan
