// One token of one channel of a causal convolution, for the kernel of the op and for the product that it is fused into.
#pragma once

#include "common/device.h"

namespace dfssm::trt {

// `past`: the `count` inputs before this one, oldest first, and `weight` theirs; both have room for kMost.
template <int kMost>
__device__ __forceinline__ float convolve_token(const float* past, const float* weight, int count, float now,
                                                float now_weight, float bias, bool with_silu) {
  float sum = bias;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < count) sum = fmaf(past[i], weight[i], sum);
  }
  sum = fmaf(now, now_weight, sum);
  return with_silu ? silu(sum) : sum;
}

}  // namespace dfssm::trt
