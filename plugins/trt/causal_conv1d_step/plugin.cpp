// CausalConv1dStep.
#include "common/plugin.h"

#include "common/creators.h"

namespace dfssm::trt {
namespace {

struct CausalConv1dStep : PluginOf<CausalConv1dStep> {
  using Schema = opset::CausalConv1dStep;
  static constexpr Type kInputTypes[] = {Type::activation, Type::f32, Type::f32, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation, Type::f32};
  static constexpr int32_t kAliases[] = {kNoAlias, Schema::k_state};

  void attributes(FieldVisitor& visit) override { visit("activation", activation); }

  void check_attributes() const override {
    if (activation != "silu" && activation != "none") {
      fail("attribute 'activation' is '%s', expected 'silu' or 'none'", activation.c_str());
    }
  }

  ConvArgs args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    const Tensor& weight = in.ranked(Schema::k_weight, 2);
    const int64_t B = x[0], T = x[1], C = weight[0], W = weight[1];
    if (W != kOpen && (W < 2 || W > 4)) {
      fail("input 'weight' has width W=%lld, expected 2, 3 or 4", static_cast<long long>(W));
    }
    const Inputs::Columns columns = in.columns(Schema::k_x, B, T, C);
    ConvArgs args{};
    args.x = columns.data;
    args.x_stride = columns.stride;
    args.state = in.expect(Schema::k_state, {B, C, plus(W, -1)}).as<float>();
    args.weight = weight.as<float>();
    args.bias = in.expect(Schema::k_bias, {C}).as<float>();
    args.B = size(B), args.T = size(T), args.C = size(C), args.W = size(W);
    args.silu = activation == "silu";
    args.type = float_type(x.type);
    return args;
  }

  size_t workspace_of(const ConvArgs&) const { return 0; }

  cudaError_t run(ConvArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    args.new_state = launch.output<float>(1);
    return causal_conv1d_step(args, launch.stream);
  }

  void infer(Inference& inference) const override {
    inference.set(0, {inference.dim(Schema::k_x, 0), inference.dim(Schema::k_x, 1),
                      inference.dim(Schema::k_weight, 0)});
    inference.like(1, Schema::k_state);
  }

  std::string activation = Schema::kDefault_activation;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* causal_conv1d_step_creator() {
  static Creator<CausalConv1dStep> creator;
  return &creator;
}

}  // namespace dfssm::trt
