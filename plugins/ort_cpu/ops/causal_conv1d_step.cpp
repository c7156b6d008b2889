// CausalConv1dStep.
#include "conv.h"

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
  // Weights and state come from memory, 50 bytes a channel; then 1 ns a token.
  share_channels(
      call, args, 4 + static_cast<double>(s.T),
      [&](const ConvArgs& of_row, int64_t c0, int64_t c1) { call.kernels.causal_conv1d(of_row, c0, c1); });
}

}  // namespace dfssm
