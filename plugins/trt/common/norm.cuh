// Rows that are normed, for a norm of its own and for a product whose input is normed.
//
// Both add the squares of a group in one order, so that fusing a norm changes no bit: kNormThreads a block,
// or fewer where the others would have nothing to add.
#pragma once

#include "common/device.h"
#include "common/kernels.h"

namespace dfssm::trt {

// A token of 4096 fp32 channels is four loads a thread: enough under way at once.
constexpr int kNormThreads = 256;

// The sum over the block, in every thread. A barrier must lie between two calls: they use the same array.
__device__ inline float block_sum(float value) {
  DFSSM_SHARED(float, parts, kNormThreads / kWarpSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return warp_sum(lane * kWarpSize < static_cast<int>(blockDim.x) ? parts[lane] : 0.0f);
}

// The tokens of a norm's input, a block a token. kWide values a load: 16 bytes where the columns of a group
// start on multiples of that, else one, still coalesced. What is normed is read once and kept in shared
// memory as fp32; each thread reads back only what it wrote.
template <class T, int kWide>
struct NormRow {
  static constexpr int kFloats = kWide < 4 ? kWide : 4;  // of shared memory and weights at a time

  const T *y, *z;  // z: nullptr without a gate
  const float* weight;
  int32_t C, size;  // size: the columns of a group
  int64_t z_stride;
  float eps;

  explicit NormRow(const NormArgs& args)
      : y(static_cast<const T*>(args.y)),
        z(static_cast<const T*>(args.z)),
        weight(args.weight),
        C(args.C),
        size(args.C / args.groups),
        z_stride(args.z_stride),
        eps(args.eps) {}

  // Puts value times weight of the group that begins at column `first` into kept[0, size) and returns what is
  // still to be multiplied with, 1 / rms; NaN where the squares overflow.
  __device__ __forceinline__ float weigh(int64_t token, int first, float* kept) const {
    const T *const from = y + token * C + first, *const gates = z + token * z_stride + first;
    float squares = 0.0f;
    for (int c = threadIdx.x * kWide; c < size; c += blockDim.x * kWide) {
      const auto in = load_vector<kWide>(from + c);
      Vector<T, kWide> gate;
      if (z) gate = load_vector<kWide>(gates + c);
#pragma unroll
      for (int i = 0; i < kWide; i += kFloats) {
        const auto scales = load_vector<kFloats>(weight + first + c + i);
        Vector<float, kFloats> values;
#pragma unroll
        for (int k = 0; k < kFloats; ++k) {
          float value = to_float(in.at[i + k]);
          if (z) value *= silu(to_float(gate.at[i + k]));
          squares = fmaf(value, value, squares);
          values.at[k] = value * scales.at[k];
        }
        store_vector(kept + c + i, values);
      }
    }
    const float mean = block_sum(squares) / static_cast<float>(size);
    return magnitude(mean) < kInfinityBits ? 1.0f / sqrtf(mean + eps) : __uint_as_float(kNaNBits);
  }

  // As the input of a product (common/quantize.cuh): all groups, kept as they are normed.
  static constexpr bool kKept = true;
  __device__ __forceinline__ uint32_t prepare(int token) const {
    DFSSM_DYNAMIC_SHARED(float, kept);
    uint32_t top = 0;
    for (int first = 0; first < C; first += size) {
      if (first) __syncthreads();
      float* const group = kept + first;
      const float norm = weigh(token, first, group);
      for (int c = threadIdx.x * kWide; c < size; c += blockDim.x * kWide) {
#pragma unroll
        for (int i = 0; i < kWide; i += kFloats) {
          auto values = load_vector<kFloats>(group + c + i);
#pragma unroll
          for (int k = 0; k < kFloats; ++k) {
            values.at[k] *= norm;
            top = max(top, magnitude(values.at[k]));
          }
          store_vector(group + c + i, values);
        }
      }
    }
    return top;
  }
  __device__ __forceinline__ float operator[](int column) const {
    DFSSM_DYNAMIC_SHARED(float, kept);
    return kept[column];
  }
};

// f(a NormRow of these tokens): the widest loads that they allow. `out`: what the caller writes with the same
// accesses, or nullptr.
template <class F>
cudaError_t with_norm_row(const NormArgs& args, const void* out, F&& f) {
  if (args.groups < 1 || args.C % args.groups) return cudaErrorInvalidValue;
  return dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = args.C / args.groups % kWide == 0 && (!args.z || args.z_stride % kWide == 0) &&
                      is_aligned(args.y, 16) && is_aligned(args.z, 16) && is_aligned(out, 16);
    return wide ? f(NormRow<T, kWide>(args)) : f(NormRow<T, 1>(args));
  });
}

}  // namespace dfssm::trt
