// What the kernels of the scan read and compute alike: activations of any type and the time step.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/kernels.h"

namespace dfssm::trt::selective_scan {

// Element i of an activation of type T.
template <class T>
__device__ __forceinline__ float read(const void* p, int64_t i) {
  return to_float(static_cast<const T*>(p)[i]);
}

template <class T>
__device__ __forceinline__ void write(void* p, int64_t i, float value) {
  static_cast<T*>(p)[i] = from_float<T>(value);
}

// One head of one batch row, block (., head, batch row): where its tokens and its state are, and its constants.
struct Head {
  int64_t first_token, first_row;  // token 0 of the batch row; row 0 of the state among all rows
  int head;
  float log_rate, D, dt_bias;
};

__device__ __forceinline__ Head head_of(const ScanArgs& a) {
  const int head = blockIdx.y, b = blockIdx.z;
  const int64_t first_row = (static_cast<int64_t>(b) * a.H + head) * a.N;
  return {static_cast<int64_t>(b) * a.T, first_row, head, a.A_log[head], a.D[head], a.dt_bias[head]};
}

// d and the decay exp(-exp(A_log) d) of a token with this dt. The clamp lets NaN through, as the reference does.
__device__ __forceinline__ float2 time_step(const ScanArgs& a, const Head& head, float dt) {
  const float v = dt + head.dt_bias;
  float d = fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
  d = d < a.dt_min ? a.dt_min : d;
  d = d > a.dt_max ? a.dt_max : d;
  return make_float2(d, expf(-expf(head.log_rate) * d));
}

}  // namespace dfssm::trt::selective_scan
