// CausalConv1dStep.
#include <algorithm>

#include "op.h"
#include "ops.h"

namespace dfssm::ort {
namespace {

struct CausalConv1dStep : Kernel {
  using Schema = opset::CausalConv1dStep;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kF32, kF32, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32, kF32};
  static constexpr std::pair<size_t, size_t> kInplace[] = {{Schema::k_state, 1}};

  explicit CausalConv1dStep(const OrtKernelInfo* info) : Kernel(kSignature<Schema>, info) {
    const std::string activation = attribute("activation", Schema::kDefault_activation);
    silu = activation == "silu";
    if (!silu && activation != "none") {
      fail("%s: attribute 'activation' is '%s', expected 'silu' or 'none'", Schema::kName,
           activation.c_str());
    }
  }

  void compute(Call& call) const {
    const Tensor& tokens = call.ranked(Schema::k_x, 3);
    const Tensor& weight = call.ranked(Schema::k_weight, 2);
    const int64_t B = tokens[0], T = tokens[1], W = weight[1];
    const int64_t C = start(Schema::k_x) < 0 ? tokens[2] : weight[0];
    if (W < 2 || W > 4) {
      fail("%s: input 'weight' has width W=%lld, expected 2, 3 or 4", Schema::kName,
           static_cast<long long>(W));
    }
    call.expect(Schema::k_weight, {C, W});
    const Tensor& state = call.expect(Schema::k_state, {B, C, W - 1});
    const Tensor& bias = call.expect(Schema::k_bias, {C});
    const Columns x = call.columns(Schema::k_x, B, T, C);

    ConvArgs args{};
    args.x = x.data, args.x_stride = x.stride;
    args.state = state.as<float>();
    args.weight = weight.as<float>();
    args.bias = bias.as<float>();
    args.y = call.output<float>(0, {B, T, C});
    args.new_state = call.output<float>(1, {B, C, W - 1});
    args.B = B, args.T = T, args.C = C, args.W = W;
    args.silu = silu;
    constexpr int64_t kChannels = 16;
    // Weights and state come from memory, 800 bytes a unit; then 15 ns a token.
    const double unit_ns = static_cast<double>(B) * (60 + 15 * static_cast<double>(T));
    call.parallel((C + kChannels - 1) / kChannels, unit_ns, [&](int64_t begin, int64_t end) {
      kernels().causal_conv1d(args, begin * kChannels, std::min(end * kChannels, C));
    });
  }

  static void infer(Inference& inference) {
    if (inference.attribute("x_start", Schema::kDefault_x_start) < 0) {
      inference.like(0, Schema::k_x, 3);
    } else {
      const Inference::Shape x = inference.shape(Schema::k_x, 3);
      const Inference::Shape weight = inference.shape(Schema::k_weight, 2);
      if (!x.empty() && !weight.empty()) inference.set(0, {x[0], x[1], weight[0]});
    }
    inference.like(1, Schema::k_state, 3);
  }

  bool silu;
};

}  // namespace

const OrtCustomOp* causal_conv1d_step() { return custom_op<CausalConv1dStep>(); }

}  // namespace dfssm::ort
