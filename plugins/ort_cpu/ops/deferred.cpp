// The ops of a deferred state: DeferredConv1dStep and DeferredScanStep.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "conv.h"
#include "scan.h"

namespace dfssm {
namespace {

// The pending counts [B] in an input. Throws Error where one is past the slots there are.
void check_counts(const Tensor& counts, int64_t B) {
  const auto* count = counts.as<uint8_t>();
  const int64_t most = *std::max_element(count, count + B);
  if (most >= kSlots) {
    opset::fail("input 'pending_count' has " + std::to_string(most) + ", expected at most " +
                std::to_string(kSlots - 1));
  }
}

// An output that holds what the input `over` does: the same memory, where the caller bound it so, or a copy.
template <class T>
T* updated(Call& call, size_t output, size_t over, std::initializer_list<int64_t> shape) {
  T* const to = call.output<T>(output, shape);
  const void* const from = call[over].data;
  if (to != from) {
    size_t bytes = call.type(over) == opset::kFloat32 ? 4 : call.type(over) == opset::kFloat16 ? 2 : 1;
    for (const int64_t size : shape) bytes *= size;
    std::memcpy(to, from, bytes);
  }
  return to;
}

}  // namespace

template <>
void run<opset::DeferredConv1dStep>(Call& call, const opset::DeferredConv1dStep::Attributes& a,
                                    const opset::DeferredConv1dStep::Sizes& s) {
  using S = opset::DeferredConv1dStep;
  check_counts(call[S::k_pending_count], s.B);
  const Columns x = call.columns(S::k_x, a.x_start);
  DeferredConvArgs args{};
  args.x = x.data, args.x_stride = x.stride;
  args.weight = call[S::k_weight].as<float>();
  args.bias = call[S::k_bias].as<float>();
  args.pending_count = call[S::k_pending_count].as<uint8_t>();
  args.y = call.output<float>(0, {s.B, s.T, s.C});
  args.window = updated<float>(call, 1, S::k_window, {s.B, s.W - 1 + kSlots, s.C});
  args.B = s.B, args.T = s.T, args.C = s.C, args.W = s.W;
  args.silu = a.activation == "silu";
  share_channels(call, args, 3 + static_cast<double>(s.T),
                 [&](const DeferredConvArgs& of_row, int64_t c0, int64_t c1) {
                   call.kernels.deferred_conv1d(of_row, c0, c1);
                 });
}

template <>
void run<opset::DeferredScanStep>(Call& call, const opset::DeferredScanStep::Attributes& a,
                                  const opset::DeferredScanStep::Sizes& s) {
  using S = opset::DeferredScanStep;
  check_counts(call[S::k_pending_count], s.B);
  DeferredScanArgs args{};
  fill_scan<S>(call, a, s, args);
  const bool int8 = args.state_type == StateType::i8;
  args.new_state = updated<void>(call, 1, S::k_state, {s.B, s.H, s.N, s.P});
  args.pending_x = updated<float>(call, 2, S::k_pending_x, {s.B, kSlots, s.H * s.P});
  args.pending_B = updated<float>(call, 3, S::k_pending_B, {s.B, kSlots, a.ngroups * s.N});
  args.pending_decay = updated<float>(call, 4, S::k_pending_decay, {s.B, kSlots, s.H});
  args.pending_count = updated<uint8_t>(call, 5, S::k_pending_count, {s.B});
  if (int8) args.new_state_scale = updated<float>(call, 6, S::k_state_scale, {s.B, s.H, s.N});
  args.state = args.new_state, args.state_scale = args.new_state_scale;

  const size_t scratch_bytes = call.kernels.deferred_scan_bytes(args);
  const double head_ns =
      static_cast<double>(s.N * s.P) * (state_bytes(args) / 30 + 0.04 * static_cast<double>(s.T));
  std::atomic<bool> out_of_memory = false;
  call.parallel(s.B * s.H, head_ns, [&](int64_t begin, int64_t end) {
    if (void* scratch = thread_scratch(scratch_bytes)) {
      call.kernels.deferred_scan(args, begin, end, scratch);
    } else {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();

  // What all heads read.
  const int64_t width = a.ngroups * s.N;
  for (int64_t b = 0; b < s.B; ++b) {
    const int64_t count = args.pending_count[b], kept = kept_tokens(count, s.T);
    float* const slots = args.pending_B + b * kSlots * width;
    for (int64_t j = kept; j < count + s.T; ++j) {
      const float* from = j < count ? slots + j * width : args.Bm + (b * s.T + j - count) * args.B_stride;
      if (from != slots + (j - kept) * width) {
        std::memcpy(slots + (j - kept) * width, from, width * sizeof(float));
      }
    }
    args.pending_count[b] = static_cast<uint8_t>(count + s.T - kept);
  }
}

}  // namespace dfssm
