// CausalConv1dStep.
#include <algorithm>

#include "op.h"

namespace dfssm::ort {
namespace {

struct CausalConv1dStep : KernelOf<opset::CausalConv1dStep> {
  using KernelOf::KernelOf;

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, C = s.C, W = s.W;
    const Columns x = call.columns(Schema::k_x, attributes.x_start);
    ConvArgs args{};
    args.x = x.data, args.x_stride = x.stride;
    args.state = call[Schema::k_state].as<float>();
    args.weight = call[Schema::k_weight].as<float>();
    args.bias = call[Schema::k_bias].as<float>();
    args.y = call.output<float>(0, {B, T, C});
    args.new_state = call.output<float>(1, {B, C, W - 1});
    args.B = B, args.T = T, args.C = C, args.W = W;
    args.silu = attributes.activation == "silu";
    constexpr int64_t kChannels = 16;
    // Weights and state come from memory, 800 bytes a unit; then 15 ns a token.
    const double unit_ns = static_cast<double>(B) * (60 + 15 * static_cast<double>(T));
    call.parallel((C + kChannels - 1) / kChannels, unit_ns, [&](int64_t begin, int64_t end) {
      kernels().causal_conv1d(args, begin * kChannels, std::min(end * kChannels, C));
    });
  }
};

}  // namespace

template <>
const OrtCustomOp* op<opset::CausalConv1dStep>() {
  return custom_op<CausalConv1dStep>();
}

}  // namespace dfssm::ort
