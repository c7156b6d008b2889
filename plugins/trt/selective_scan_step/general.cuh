// The scan for any sizes, one element an access: headdims that are no multiple of 4, states too large for the
// registers of a block. One block a head; the state is carried in memory as fp32 [B, H, N, P], in new_state
// itself where that is fp32. Every thread meets the same elements at every token.
#pragma once

#include <cstdint>

#include "selective_scan_step/state.cuh"
#include "selective_scan_step/tokens.cuh"

namespace dfssm::trt::selective_scan {

constexpr int kGeneralWarps = 8, kGeneralThreads = kWarpSize * kGeneralWarps;

template <class State, class T>
__global__ void __launch_bounds__(kGeneralThreads, 4)
    general_scan(const ScanArgs a, int group_heads, float* carried) {
  DFSSM_SHARED(float, partial, kGeneralThreads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const Head head = head_of(a);
  const int64_t state_at = head.first_row * a.P;
  const int group = head.head / group_heads;
  const State* from = static_cast<const State*>(a.state) + state_at;
  State* to = static_cast<State*>(a.new_state) + state_at;
  float* tile = carried + state_at;

  wait_for_launch_before();
  for (int t = 0; t < a.T; ++t) {
    const int64_t token = head.first_token + t;
    const float2 step = time_step(a, head, read<T>(a.dt, token * a.dt_stride + head.head));
    for (int p0 = 0; p0 < a.P; p0 += kWarpSize) {
      const int p = p0 + lane;
      const float x = p < a.P ? read<T>(a.x, token * a.x_stride + head.head * a.P + p) : 0.0f;
      float y = warp == 0 ? head.D * x : 0.0f;
      for (int n = warp; p < a.P && n < a.N; n += kGeneralWarps) {
        const float B = read<T>(a.Bm, token * a.B_stride + group * a.N + n);
        const float C = read<T>(a.Cm, token * a.C_stride + group * a.N + n);
        const int64_t at = static_cast<int64_t>(n) * a.P + p;
        float h;
        if (t > 0) {
          h = tile[at];
        } else {
          h = to_float(from[at]);
          if constexpr (sizeof(State) == 1) h *= a.state_scale[head.first_row + n];
        }
        h = fmaf(step.y, h, B * (step.x * x));
        tile[at] = h;
        y = fmaf(C, h, y);
      }
      partial[warp * kWarpSize + lane] = y;
      __syncthreads();
      if (warp == 0 && p < a.P) {
        for (int w = 1; w < kGeneralWarps; ++w) y += partial[w * kWarpSize + lane];
        write<T>(a.y, (token * a.H + head.head) * a.P + p, y);
      }
      __syncthreads();
    }
  }

  if constexpr (sizeof(State) < sizeof(float)) {
    for (int n = warp; n < a.N; n += kGeneralWarps) {
      float* row = tile + static_cast<int64_t>(n) * a.P;
      RowScale scale;
      if constexpr (sizeof(State) == 1) {
        uint32_t m = 0;
        for (int p = lane; p < a.P; p += kWarpSize) m = larger_magnitude(m, row[p]);
        for (int mask = kWarpSize / 2; mask > 0; mask /= 2) m = max(m, __shfl_xor_sync(kAllLanes, m, mask));
        scale = row_scale(m);
        if (lane == 0) a.new_state_scale[head.first_row + n] = scale.scale;
      }
      for (int p = lane; p < a.P; p += kWarpSize) {
        State& out = to[static_cast<int64_t>(n) * a.P + p];
        if constexpr (sizeof(State) == 1) {
          out = static_cast<int8_t>(quantize(row[p], scale.inverse) & scale.keep);
        } else {
          out = __float2half_rn(saturate(row[p]));
        }
      }
    }
  }
}

}  // namespace dfssm::trt::selective_scan
