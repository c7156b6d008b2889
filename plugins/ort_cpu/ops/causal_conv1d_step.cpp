// CausalConv1dStep.
#include <algorithm>

#include "call.h"

namespace dfssm {

template <>
void run<opset::CausalConv1dStep>(Call& call, const opset::CausalConv1dStep::Attributes& a,
                                  const opset::CausalConv1dStep::Sizes& s) {
  using S = opset::CausalConv1dStep;
  const Columns x = call.columns(S::k_x, a.x_start);
  ConvArgs args{};
  args.x = x.data, args.x_stride = x.stride;
  args.state = call[S::k_state].as<float>();
  args.weight = call[S::k_weight].as<float>();
  args.bias = call[S::k_bias].as<float>();
  args.y = call.output<float>(0, {s.B, s.T, s.C});
  args.new_state = call.output<float>(1, {s.B, s.C, s.W - 1});
  args.B = s.B, args.T = s.T, args.C = s.C, args.W = s.W;
  args.silu = a.activation == "silu";
  constexpr int64_t kChannels = 16;
  // Weights and state come from memory, 800 bytes a unit; then 15 ns a token.
  const double unit_ns = static_cast<double>(s.B) * (60 + 15 * static_cast<double>(s.T));
  call.parallel((s.C + kChannels - 1) / kChannels, unit_ns, [&](int64_t begin, int64_t end) {
    call.kernels.causal_conv1d(args, begin * kChannels, std::min(end * kChannels, s.C));
  });
}

}  // namespace dfssm
