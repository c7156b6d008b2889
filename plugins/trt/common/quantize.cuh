// Activations to int8, one scale a token (docs/ops.md), in the order in which the tensor cores want them,
// with the inner half of the low rank, h = (down_scale s)(down . q).
//
// The order: tokens go in groups of eight, columns in steps of 64, and q is [groups, steps, 32 lanes, 16
// bytes]. The 16 bytes of lane 4 g + t are those of token g that two mma of 16x8x32 want from this lane as
// b0, b1, b0, b1: a warp reads a step of a group as 512 consecutive bytes, from global or from shared memory,
// without bank conflicts. Which columns of the step they are is free, as long as the weights' fragments agree
// (`Order`): int8 rows are taken as they lie, packed bits as they are cheapest to expand.
#pragma once

#include <algorithm>

#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"
#include "common/norm.cuh"

namespace dfssm::trt {

constexpr int kGroup = 8;        // tokens
constexpr int kStep = 64;        // columns
constexpr int kStepPieces = 32;  // 16-byte pieces of a step of a group, one a lane
constexpr int kFewTokens = 16;   // up to here the time is that of reading the weights

// Columns as they lie: lane t has the columns 16 t .. 16 t + 15 of the step.
struct NaturalOrder {
  static constexpr int kUnit =
      128;  // columns are padded with zeros to a multiple of this: whole pairs of steps

  // Piece `half` of the 32 columns that are number `word` of a row: from their bytes to the lane's, and where they go.
  static __device__ __forceinline__ uint4 piece(const uint32_t (&in)[8], int half) {
    return make_uint4(in[4 * half], in[4 * half + 1], in[4 * half + 2], in[4 * half + 3]);
  }
  static __device__ __forceinline__ int step(int word, int) { return word / 2; }
  static __device__ __forceinline__ int quad(int word, int half) { return word % 2 * 2 + half; }
};

// Columns as packed bits expand: a lane reads 16 bytes of a row, four words of 32 columns, so a unit is 512
// columns and lane t has its words 4 t .. 4 t + 3. Word c feeds the steps 2 c and 2 c + 1; (word >> j) &
// 0x01010101 are its columns j, j + 8, j + 16, j + 24 as bytes, so one mma takes j = 0..3 as its first and j
// + 4 as its second half.
struct BitOrder {
  static constexpr int kUnit = 512;

  static __device__ __forceinline__ uint32_t column(const uint32_t (&in)[8], int j) {
    const int high = j / 4, byte = j % 4;  // columns 8 b + j are byte j % 4 of in[2 b + j / 4]
    const uint32_t select = byte + 16 * (byte + 4);
    return __byte_perm(__byte_perm(in[high], in[2 + high], select),
                       __byte_perm(in[4 + high], in[6 + high], select), 0x5410);
  }
  static __device__ __forceinline__ uint4 piece(const uint32_t (&in)[8], int half) {
    const int j = 2 * half;
    return make_uint4(column(in, j), column(in, j + 4), column(in, j + 1), column(in, j + 5));
  }
  static __device__ __forceinline__ int step(int word, int half) {
    return word / 16 * 8 + word % 4 * 2 + half;
  }
  static __device__ __forceinline__ int quad(int word, int) { return word % 16 / 4; }
};

__device__ __forceinline__ void prefetch([[maybe_unused]] const void* from) {
#ifndef DFSSM_EMULATION
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}
constexpr int kLine = 128;  // bytes that a prefetch brings

// The quantised activations, in a workspace.
struct Quantized {
  uint4* q;  // [groups, steps, 32]
  float* s;
  int32_t* sum;  // of q
  float* h;      // [n, R]
  int32_t steps;
};

template <class Order>
Quantized quantized_at(void* workspace, int32_t n, int32_t K, int32_t R, size_t* bytes = nullptr) {
  Quantized out;
  out.steps = (K + Order::kUnit - 1) / Order::kUnit * (Order::kUnit / kStep);
  const size_t pieces = static_cast<size_t>((n + kGroup - 1) / kGroup) * out.steps * kStepPieces;
  const size_t tokens = (static_cast<size_t>(n) + 3) / 4 * 4;  // every part starts at a multiple of 16 bytes
  out.q = static_cast<uint4*>(workspace);
  out.h = reinterpret_cast<float*>(out.q + pieces);
  out.s = out.h + tokens * R;
  out.sum = reinterpret_cast<int32_t*>(out.s + tokens);
  if (bytes) *bytes = pieces * sizeof(uint4) + tokens * (R + 2) * sizeof(float);
  return out;
}

constexpr int kQuantizeThreads = kNormThreads;
constexpr int kQuantizeWarps = kQuantizeThreads / 32;

// Where the activations of a token come from, a Row: prepare(token) returns the largest magnitude among some
// columns, all of them over the block's threads; after the next barrier row[k] is column k. This one: memory.
// NormRow norms them first.
template <class T>
struct PlainRow {
  const T* __restrict__ x;
  int32_t K;

  static constexpr bool kKept = false;  // whether K floats of shared memory are wanted
  __device__ __forceinline__ uint32_t prepare(int token) {
    x += static_cast<size_t>(token) * K;
    uint32_t top = 0;
#pragma unroll 8
    for (int k = threadIdx.x; k < K; k += kQuantizeThreads) top = max(top, magnitude(to_float(x[k])));
    return top;
  }
  __device__ __forceinline__ float operator[](int k) const { return to_float(x[k]); }
};

// What a token is multiplied with to be quantised, and its scale.
struct QuantizeScale {
  float inverse, s;
};

// From what prepare() gave each thread of a block. A barrier: x[k] may be read after it.
__device__ __forceinline__ QuantizeScale quantize_scale(uint32_t top, uint32_t (&of_warp)[kQuantizeWarps]) {
#pragma unroll
  for (int i = kWarpSize / 2; i; i /= 2) top = max(top, __shfl_xor_sync(kAllLanes, top, i));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuantizeWarps; ++i) top = max(top, of_warp[i]);
  const float m = __uint_as_float(top);
  if (top >= kInfinityBits) return {0.0f, __uint_as_float(kNaNBits)};
  return m >= kTiny ? QuantizeScale{__fdiv_rn(127.0f, m), __fdiv_rn(m, 127.0f)} : QuantizeScale{0.0f, 0.0f};
}

// The columns [base, base + width) to `bytes`, those from K on as zeros; returns a thread's part of their sum.
template <class Row>
__device__ __forceinline__ int quantize_columns(const Row& x, int base, int width, int K, float inverse,
                                                uint4* bytes) {
  int sum = 0;
#pragma unroll 4
  for (int k = threadIdx.x; k < width; k += kQuantizeThreads) {
    int q = 0;
    if (base + k < K && inverse != 0) q = __float2int_rn(__fmul_rn(x[base + k], inverse));
    reinterpret_cast<int8_t*>(bytes)[k] = static_cast<int8_t>(q);
    sum += q;
  }
  return sum;
}

// A piece of the 32 columns that are number `word` of `bytes`.
template <class Order>
__device__ __forceinline__ uint4 quantized_piece(const uint4* bytes, int word, int half) {
  const uint4 low = bytes[2 * word], high = bytes[2 * word + 1];
  const uint32_t in[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  return Order::piece(in, half);
}

// A lane's part of `width` bytes of a row of `down`, whole pieces, times those of a token.
__device__ __forceinline__ int dot_of(const int8_t* down, const uint4* bytes, int width) {
  const uint4* weights = reinterpret_cast<const uint4*>(down);
  int dot = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < width / 16; i += 32) {
    const uint4 w = __ldg(weights + i), q = bytes[i];
    dot = __dp4a(static_cast<int>(w.x), static_cast<int>(q.x), dot);
    dot = __dp4a(static_cast<int>(w.y), static_cast<int>(q.y), dot);
    dot = __dp4a(static_cast<int>(w.z), static_cast<int>(q.z), dot);
    dot = __dp4a(static_cast<int>(w.w), static_cast<int>(q.w), dot);
  }
  return dot;
}

// Block (token, part): every part quantises the token for itself, part 0 writes it, and each warp takes one
// row of `down`, eight a part. At n = 1 and R = 16 that is two blocks that read 8 KB of x (K = 2048, fp32)
// from L2 and 16 KB each of `down`: a block alone would draw the 32 KB through one SM's 64 bytes a clock, and
// a kernel of its own for h costs a launch, which is more than the second quantisation.
//
// Memory would idle meanwhile: blocks past the tokens ask L2 for the weights of the product that follows, one
// line a thread.
template <class Row, class Order>
__global__ void __launch_bounds__(kQuantizeThreads, 2)
    quantize_kernel(Row x, int32_t n, int32_t K, const int8_t* down, const float* down_scale, int32_t R,
                    const uint8_t* ahead, size_t ahead_bytes, Quantized out) {
  constexpr int kChunk = 4096;  // columns in shared memory at once
  DFSSM_SHARED(uint4, chunk, kChunk / 16);
  DFSSM_SHARED(uint32_t, of_warp, kQuantizeWarps);
  const int tid = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.x;
  const int row = blockIdx.y * kQuantizeWarps + warp;
  if (token >= n) {
    const size_t first = static_cast<size_t>(token - n) * kQuantizeThreads + tid;
    if (blockIdx.y == 0 && first * kLine < ahead_bytes) prefetch(ahead + first * kLine);
    return;
  }
  if (row < R) {
    for (int k = lane * kLine; k < K; k += 32 * kLine) prefetch(down + static_cast<size_t>(row) * K + k);
  }

  wait_for_launch_before();
  const QuantizeScale scale = quantize_scale(x.prepare(token), of_warp);
  int sum = 0, dot = 0;
  for (int base = 0; base < out.steps * kStep; base += kChunk) {
    const int width = min(kChunk, out.steps * kStep - base);
    sum += quantize_columns(x, base, width, K, scale.inverse, chunk);
    __syncthreads();
    if (blockIdx.y == 0) {
      uint4* to =
          out.q + (static_cast<size_t>(token / kGroup) * out.steps * kStepPieces + token % kGroup * 4);
      for (int i = tid; i < width / 32; i += kQuantizeThreads) {
        const int word = base / 32 + i;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          to[static_cast<size_t>(Order::step(word, half)) * kStepPieces + Order::quad(word, half)] =
              quantized_piece<Order>(chunk, i, half);
        }
      }
    }
    if (row < R) {  // rows of `down` are whole pieces: K is a multiple of 32
      dot += dot_of(down + static_cast<size_t>(row) * K + base, chunk, min(width, K - base));
    }
    __syncthreads();
  }

  sum = warp_sum(sum);
  dot = warp_sum(dot);
  if (lane == 0) {
    of_warp[warp] = static_cast<uint32_t>(sum);
    if (row < R)
      out.h[static_cast<size_t>(token) * R + row] =
          __fmul_rn(__fmul_rn(down_scale[row], scale.s), static_cast<float>(dot));
  }
  __syncthreads();
  if (blockIdx.y == 0 && tid == 0) {
    int total = 0;
    for (int i = 0; i < kQuantizeWarps; ++i) total += static_cast<int>(of_warp[i]);
    out.s[token] = scale.s;
    out.sum[token] = total;
  }
}

// Of `ahead`, the weights that come next, as much is prefetched as fits beside the rest into an L2 of 4 MB,
// that of T4 and Orin.
constexpr size_t kAheadBytes = 3 << 20;

template <class Order, class Row>
cudaError_t quantize(const Row& x, int32_t n, int32_t K, const int8_t* down, const float* down_scale,
                     int32_t R, const void* ahead, size_t ahead_bytes, const Quantized& out,
                     cudaStream_t stream) {
  ahead_bytes = std::min(ahead_bytes, kAheadBytes);
  const int blocks =
      static_cast<int>((ahead_bytes + kQuantizeThreads * kLine - 1) / (kQuantizeThreads * kLine));
  const dim3 grid(n + blocks, std::max(1, (R + kQuantizeWarps - 1) / kQuantizeWarps));
  return launch(quantize_kernel<Row, Order>, grid, kQuantizeThreads, Row::kKept ? K * sizeof(float) : 0,
                stream, x, n, K, down, down_scale, R, static_cast<const uint8_t*>(ahead), ahead_bytes, out);
}

// f(a PlainRow of x)
template <class F>
cudaError_t with_plain_row(const void* x, Float type, int32_t K, F&& f) {
  return dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    return f(PlainRow<T>{static_cast<const T*>(x), K});
  });
}

}  // namespace dfssm::trt
