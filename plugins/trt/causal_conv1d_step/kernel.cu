// CausalConv1dStep: a thread convolves 4 channels (1 where the tensors are not aligned for that) over a run
// of tokens, with the last W-1 inputs in registers. 4 channels are 16 bytes of fp32, whole 16-byte pieces of
// the state and of the weights whatever W is, and 8 bytes of fp16.
//
// More than kRun tokens are split among blocks, each reading again the W-1 tokens before its own. The block
// of the first run alone reads the state and writes the new one, so that both may be the same memory.
#include "causal_conv1d_step/token.cuh"
#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"

namespace dfssm::trt {
namespace of_causal_conv1d_step {

constexpr int kThreads = 128;
constexpr int kRun =
    32;  // the tokens read twice are (W-1)/kRun < 10 % of the input, and of the second-level cache

template <class T, int kWidth, int kWide>
__global__ void __launch_bounds__(kThreads) convolve(ConvArgs args) {
  constexpr int kPast = kWidth - 1;
  const int channel = (blockIdx.x * kThreads + threadIdx.x) * kWide;
  const int begin = blockIdx.y * kRun, end = min(begin + kRun, args.T);
  const int64_t batch = blockIdx.z;
  wait_for_launch_before();
  if (channel >= args.C) return;
  const T* const x = static_cast<const T*>(args.x) + batch * args.T * args.x_stride + channel;
  T* const y = static_cast<T*>(args.y) + batch * args.T * args.y_stride + channel;
  const int64_t state = (batch * args.C + channel) * kPast;

  // [channel][position] as stored, kWide values at a time.
  float weight[kWide * kWidth], past[kWide * kPast];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const auto piece = load_vector<kWide>(args.weight + static_cast<int64_t>(channel) * kWidth + i * kWide);
#pragma unroll
    for (int c = 0; c < kWide; ++c) weight[i * kWide + c] = piece.at[c];
  }
  const auto bias = load_vector<kWide>(args.bias + channel);
  if (begin == 0) {
#pragma unroll
    for (int i = 0; i < kPast; ++i) {
      const auto piece = load_vector<kWide>(args.state + state + i * kWide);
#pragma unroll
      for (int c = 0; c < kWide; ++c) past[i * kWide + c] = piece.at[c];
    }
  }
  const auto recall = [&](int before) {  // the W-1 tokens before this one
#pragma unroll
    for (int i = 0; i < kPast; ++i) {
      const auto token = load_vector<kWide>(x + (before - kPast + i) * args.x_stride);
#pragma unroll
      for (int c = 0; c < kWide; ++c) past[c * kPast + i] = to_float(token.at[c]);
    }
  };
  if (begin > 0) recall(begin);

  const T* next = x + begin * args.x_stride;
  T* out = y + begin * args.y_stride;
#pragma unroll(kWide == 1 ? 2 : 4)  // more would spill a register of the narrow kernels on sm_80 and sm_90
  for (int t = begin; t < end; ++t) {
    const auto token = load_vector<kWide>(next);
    next += args.x_stride;
    Vector<T, kWide> result;
#pragma unroll
    for (int c = 0; c < kWide; ++c) {
      const float now = to_float(token.at[c]);
      const float sum = convolve_token<kPast>(past + c * kPast, weight + c * kWidth, kPast, now,
                                              weight[c * kWidth + kPast], bias.at[c], args.silu);
      result.at[c] = from_float<T>(sum);
#pragma unroll
      for (int i = 0; i + 1 < kPast; ++i) past[c * kPast + i] = past[c * kPast + i + 1];
      past[c * kPast + kPast - 1] = now;
    }
    store_vector(out, result);
    out += args.y_stride;
  }

  if (begin > 0) return;
  if (end < args.T) recall(args.T);
#pragma unroll
  for (int i = 0; i < kPast; ++i) {
    Vector<float, kWide> piece;
#pragma unroll
    for (int c = 0; c < kWide; ++c) piece.at[c] = past[i * kWide + c];
    store_vector(args.new_state + state + i * kWide, piece);
  }
}

template <class T, int kWidth>
cudaError_t run(const ConvArgs& args, cudaStream_t stream) {
  constexpr size_t kBytes = 4 * sizeof(T);
  const bool wide = args.C % 4 == 0 && args.x_stride % 4 == 0 && args.y_stride % 4 == 0 &&
                    is_aligned(args.x, kBytes) && is_aligned(args.y, kBytes);
  const int threads = wide ? args.C / 4 : args.C;
  const dim3 grid((threads + kThreads - 1) / kThreads, (args.T + kRun - 1) / kRun, args.B);
  return launch(wide ? convolve<T, kWidth, 4> : convolve<T, kWidth, 1>, grid, kThreads, 0, stream, args);
}

}  // namespace of_causal_conv1d_step
using namespace of_causal_conv1d_step;

cudaError_t causal_conv1d_step(const ConvArgs& args, cudaStream_t stream) {
  if (!args.B || !args.T || !args.C) return cudaSuccess;
  return dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    switch (args.W) {
      case 2:
        return run<T, 2>(args, stream);
      case 3:
        return run<T, 3>(args, stream);
      case 4:
        return run<T, 4>(args, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace dfssm::trt
