// The scan with the state in registers: read once, carried over all tokens of the call, written once, in
// place if the two are one buffer. A block has a slice of kColumns columns of all N rows of one head; nothing
// is shared between blocks.
//
//   thread     kVector neighbouring columns (one access) of kRows rows; kLanes threads side by side in a row
//   row        tid / kLanes * kRows + r, r < kRows; rows past N and columns past P count nowhere
//   y          each thread over its rows, then over the lanes of a warp, then over the warps: no atomics, and
//              with an fp32 state one order for every T and batch size
//
// fp32 and fp16 slices are 32 columns: 128 or 64 bytes of a row, and twice as many blocks as heads at headdim
// 64, so that one batch row of a 64-head layer fills a GPU. Splitting N as well would need a second pass over
// y. An int8 row has one scale, so its block has whole rows: 64 blocks there, with all their bytes in flight at once.
//
// Tokens come in chunks: B, C, x and the time steps of one chunk are in shared memory while those of the next
// are on their way to registers. Two barriers a chunk; partial y of all its tokens wait for the second one.
#pragma once

#include <cstdint>

#include "selective_scan_step/state.cuh"
#include "selective_scan_step/tokens.cuh"

namespace dfssm::trt::selective_scan {

// `threads` is the most a block may have, `blocks` how many of those an SM shall hold: that bounds the registers.
template <class StateType, int vector, int lanes, int rows, int tokens, int threads, int blocks>
struct Tile {
  using State = StateType;
  static constexpr int kVector = vector, kLanes = lanes, kRows = rows, kTokens = tokens;
  static constexpr int kThreads = threads, kBlocks = blocks;
  static constexpr int kColumns = kLanes * kVector;
  static constexpr int kWarpRows = kWarpSize / kLanes * kRows;
  static_assert(kLanes >= kRows, "a thread stages one row of B and C");
  static_assert(kRows % 2 == 0, "B and C are read two rows at a time");
  static_assert(kColumns >= kWarpSize, "the lanes of a warp share its sums of y out");
};

// Shared memory of a chunk of tokens.
struct Chunk {
  float2* BC;      // [tokens, rows]
  float2* step;    // [tokens]: d and decay; even, so that x is 16-byte aligned
  float* x;        // [tokens, columns]
  float* partial;  // [tokens, warps, columns]

  static constexpr int even(int tokens) { return (tokens + 1) / 2 * 2; }
  static constexpr int bytes(int tokens, int rows, int columns, int warps) {
    return even(tokens) * 8 + tokens * (rows * 8 + columns * 4 + warps * columns * 4);
  }
  __device__ Chunk(void* shared, int tokens, int rows, int columns)
      : BC(static_cast<float2*>(shared)),
        step(BC + tokens * rows),
        x(reinterpret_cast<float*>(step + even(tokens))),
        partial(x + tokens * columns) {}
};

// Adds y over the lanes of a warp that hold the same columns. Each round halves the columns a lane goes on
// with, so it takes kVector - kept exchanges, not kVector a round. Returns the first column of the `kept`
// that a lane ends with.
template <int kLanes, int kCount, int kVector, int kMask = kWarpSize / 2>
__device__ __forceinline__ int fold(float (&y)[kVector], int lane) {
  if constexpr (kMask < kLanes) {
    return 0;
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kMask;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = y[i], high = y[i + kHalf];
      y[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kMask);
    }
    return (upper ? kHalf : 0) + fold<kLanes, kHalf, kVector, kMask / 2>(y, lane);
  }
}

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    resident_scan(const ScanArgs a, int group_heads, int chunk_tokens) {
  using State = typename Tile::State;
  constexpr int kVector = Tile::kVector, kLanes = Tile::kLanes, kRows = Tile::kRows, kTokens = Tile::kTokens;
  constexpr int kColumns = Tile::kColumns, kKept = kVector * kLanes / kWarpSize;
  constexpr bool kScaled = sizeof(State) == 1;
  constexpr bool kMany = kTokens > 1;  // else a row of fp32 is gone before the next is made
  DFSSM_DYNAMIC_SHARED(float4, shared);

  const int tid = threadIdx.x, lane = tid % kWarpSize, warp = tid / kWarpSize, warps = blockDim.x / kWarpSize;
  const int row0 = tid / kLanes * kRows, rows = blockDim.x / kLanes * kRows;
  const int slice = blockIdx.x * kColumns;
  const int column = lane % kLanes * kVector;  // of the slice
  const Head head = head_of(a);
  const Chunk chunk(shared, chunk_tokens, rows, kColumns);

  wait_for_launch_before();

  // The state first: its way from memory is the longest. Rows past N and columns past P are copies of the
  // last ones, with B, C and x zero: without a branch here nothing waits for the data before the barrier of publish().
  const State* state = static_cast<const State*>(a.state) + head.first_row * a.P;
  State* new_state = static_cast<State*>(a.new_state) + head.first_row * a.P;
  const bool in_columns = slice + column < a.P;
  const auto row_of = [&](int r) { return min(row0 + r, a.N - 1); };
  const auto at = [&](int r) { return row_of(r) * a.P + min(slice + column, a.P - kVector); };
  Packed<State, kVector> packed[kRows];
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    packed[r] = *reinterpret_cast<const Packed<State, kVector>*>(state + at(r));
    if constexpr (kScaled) scale[r] = a.state_scale[head.first_row + row_of(r)];
  }

  // Of each token of a chunk a thread fetches one row of B and C and one column of x, the first threads a dt.
  const auto tokens_from = [&](int t0) { return kMany ? min(chunk_tokens, a.T - t0) : 1; };
  const int group_row = head.head / group_heads * a.N + tid, head_column = head.head * a.P + slice + tid;
  float B[kTokens] = {}, C[kTokens] = {}, x[kTokens] = {}, dt = 0.0f;
  const auto fetch = [&](int t0) {
    const int count = tokens_from(t0);
    const int64_t token = head.first_token + t0;
    const auto each_token = [&](const void* p, int64_t stride, int i, float (&to)[kTokens]) {
      const T* from = static_cast<const T*>(p) + token * stride + i;
#pragma unroll
      for (int j = 0; j < kTokens; ++j, from += stride) {
        if (!kMany || j < count) to[j] = to_float(*from);
      }
    };
    if (tid < a.N) {
      each_token(a.Bm, a.B_stride, group_row, B);
      each_token(a.Cm, a.C_stride, group_row, C);
    }
    if (tid < kColumns && slice + tid < a.P) each_token(a.x, a.x_stride, head_column, x);
    if (tid < count) dt = read<T>(a.dt, (token + tid) * a.dt_stride + head.head);
  };
  const auto publish = [&](int count) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (kMany && j >= count) continue;
      if (tid < rows) chunk.BC[j * rows + tid] = make_float2(B[j], C[j]);
      if (tid < kColumns) chunk.x[j * kColumns + tid] = x[j];
    }
    if (tid < count) chunk.step[tid] = time_step(a, head, dt);
    __syncthreads();
  };

  const auto store = [&](int r, const float (&h)[kVector]) {
    const bool in_rows = row0 + r < a.N;
    Packed<State, kVector> out;
    if constexpr (kScaled) {
      uint32_t m = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) m = larger_magnitude(m, h[i]);
      if (!in_columns) m = 0;
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) m = max(m, __shfl_xor_sync(kAllLanes, m, mask));
      const RowScale row = row_scale(m);
      narrow<kVector>(h, row, out);
      if (column == 0 && in_rows) a.new_state_scale[head.first_row + row_of(r)] = row.scale;
    } else {
      narrow<kVector>(h, out);
    }
    if (in_columns && in_rows) *reinterpret_cast<Packed<State, kVector>*>(new_state + at(r)) = out;
  };

  fetch(0);
  publish(tokens_from(0));

  float h[kMany ? kRows : 1][kVector];
  if constexpr (kMany) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      widen<kVector>(packed[r], h[r]);
#pragma unroll
      for (int i = 0; kScaled && i < kVector; ++i) h[r][i] *= scale[r];
    }
  }

  const float D = row0 == 0 ? head.D : 0.0f;  // added once
  for (int t0 = 0;;) {
    const int count = tokens_from(t0), next = t0 + count;
    if (kMany && next < a.T) fetch(next);
    for (int j = 0; j < count; ++j) {
      const float d = chunk.step[j].x, decay = chunk.step[j].y;
      float dx[kVector], y[kVector];
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(chunk.x + j * kColumns + column + i);
        const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          dx[i + k] = d * values[k];
          y[i + k] = D * values[k];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 two = *reinterpret_cast<const float4*>(chunk.BC + j * rows + row0 + r / 2 * 2);
        const float B = r % 2 ? two.z : two.x, C = r % 2 ? two.w : two.y;
        float (&row)[kVector] = h[kMany ? r : 0];
        if constexpr (!kMany) widen<kVector>(packed[r], row);
        const float factor = kScaled && !kMany ? decay * scale[r] : decay;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          row[i] = fmaf(factor, row[i], B * dx[i]);
          if (row0 + r < a.N) y[i] = fmaf(C, row[i], y[i]);  // a copy of a row may be infinite
        }
        if constexpr (!kMany) store(r, row);
      }
      const int first = fold<kLanes, kVector>(y, lane);
#pragma unroll
      for (int i = 0; i < kKept; ++i)
        chunk.partial[(j * warps + warp) * kColumns + column + first + i] = y[i];
    }
    __syncthreads();
    for (int i = tid; i < count * kColumns; i += blockDim.x) {
      const int j = i / kColumns, c = i % kColumns;
      if (slice + c >= a.P) continue;
      float y = 0.0f;
      for (int w = 0; w < warps; ++w) y += chunk.partial[(j * warps + w) * kColumns + c];
      write<T>(a.y, ((head.first_token + t0 + j) * a.H + head.head) * a.P + slice + c, y);
    }
    if (!kMany || next == a.T) break;
    publish(tokens_from(next));
    t0 = next;
  }
  if constexpr (kMany) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) store(r, h[r]);
  }
}

}  // namespace dfssm::trt::selective_scan
