// RMSNorm and GatedRMSNorm: one block a token and group. What is normed is read once, kept in shared memory
// as fp32 between the two passes (each thread reads back only what it wrote), and written once, also over its
// own input.
//
// 16 bytes a load where the columns of a group start on multiples of that; else one value a load, still
// coalesced.
#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"

namespace dfssm::trt {
namespace {

// A token of 4096 fp32 channels is two loads a thread: enough under way at once, and half a multiprocessor is
// left.
constexpr int kMaxThreads = 512;

// The sum over the block, in every thread. Once a kernel: nothing keeps a second call off the array of the
// first.
__device__ float block_sum(float value) {
  DFSSM_SHARED(float, parts, kMaxThreads / kWarpSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return warp_sum(lane * kWarpSize < static_cast<int>(blockDim.x) ? parts[lane] : 0.0f);
}

template <class T, int kWide>
__global__ void __launch_bounds__(kMaxThreads)
    norm(const T* y, const T* z, const float* weight, T* out, int C, int size, int64_t z_stride, float eps) {
  constexpr int kFloats = kWide < 4 ? kWide : 4;  // of shared memory and weights at a time
  DFSSM_DYNAMIC_SHARED(float, kept);
  const int64_t row = blockIdx.x;
  const int first = blockIdx.y * size;
  y += row * C + first;
  out += row * C + first;
  weight += first;
  if (z) z += row * z_stride + first;

  float squares = 0.0f;
  for (int c = threadIdx.x * kWide; c < size; c += blockDim.x * kWide) {
    const auto in = load_vector<kWide>(y + c);
    Vector<T, kWide> gate;
    if (z) gate = load_vector<kWide>(z + c);
#pragma unroll
    for (int i = 0; i < kWide; i += kFloats) {
      const auto scales = load_vector<kFloats>(weight + c + i);
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
  const float norm = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(size) + eps);
  for (int c = threadIdx.x * kWide; c < size; c += blockDim.x * kWide) {
    Vector<T, kWide> result;
#pragma unroll
    for (int i = 0; i < kWide; i += kFloats) {
      const auto values = load_vector<kFloats>(kept + c + i);
#pragma unroll
      for (int k = 0; k < kFloats; ++k) result.at[i + k] = from_float<T>(values.at[k] * norm);
    }
    store_vector(out + c, result);
  }
}

template <class T, int kWide>
cudaError_t run(const NormArgs& args, int size, cudaStream_t stream) {
  const int loads = (size + kWide - 1) / kWide;
  const int threads = min(kMaxThreads, (loads + kWarpSize - 1) / kWarpSize * kWarpSize);
  return launch(norm<T, kWide>, dim3(args.n, args.groups), threads, size * sizeof(float), stream,
                static_cast<const T*>(args.y), static_cast<const T*>(args.z), args.weight,
                static_cast<T*>(args.out), args.C, size, args.z_stride, args.eps);
}

}  // namespace

cudaError_t rms_norm(const NormArgs& args, cudaStream_t stream) {
  if (args.groups < 1 || args.C % args.groups) return cudaErrorInvalidValue;
  if (!args.n || !args.C) return cudaSuccess;
  const int size = args.C / args.groups;
  return dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = size % kWide == 0 && (!args.z || args.z_stride % kWide == 0) &&
                      is_aligned(args.y, 16) && is_aligned(args.z, 16) && is_aligned(args.out, 16);
    return wide ? run<T, kWide>(args, size, stream) : run<T, 1>(args, size, stream);
  });
}

}  // namespace dfssm::trt
