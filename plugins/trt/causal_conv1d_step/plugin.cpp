// CausalConv1dStep.
#include "common/plugin.h"

#include "causal_conv1d_step/part.h"
#include "common/creators.h"

namespace dfssm::trt {
namespace {

struct CausalConv1dStep : PluginOf<CausalConv1dStep> {
  using Schema = opset::CausalConv1dStep;
  static constexpr Type kInputTypes[] = {Type::activation, Type::f32, Type::f32, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation, Type::f32};
  static constexpr int32_t kAliases[] = {kNoAlias, Schema::k_state};

  void attributes(FieldVisitor& visit) override { conv.attributes(visit); }
  void check_attributes() const override { conv.check_attributes(); }

  ConvArgs args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    ConvArgs args = conv.args(in, Schema::k_state, Schema::k_weight, Schema::k_bias, x[0], x[1]);
    const Inputs::Columns columns = in.columns(Schema::k_x, x[0], x[1], in[Schema::k_weight][0]);
    args.x = columns.data;
    args.x_stride = columns.stride;
    args.y_stride = args.C;
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

  ConvPart conv;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* causal_conv1d_step_creator() {
  static Creator<CausalConv1dStep> creator;
  return &creator;
}

}  // namespace dfssm::trt
