// CausalConv1dStep.
#include "common/plugin.h"

#include "causal_conv1d_step/part.h"

namespace dfssm::trt {
namespace {

struct CausalConv1dStep : PluginOf<CausalConv1dStep, opset::CausalConv1dStep> {
  ConvArgs args(const Inputs& in, const Schema::Sizes& s) const {
    ConvArgs args = conv_args<Schema>(in, Schema::k_weight, Schema::k_bias, s, a);
    const Inputs::Columns x = in.columns(Schema::k_x, a.x_start);
    args.x = x.data;
    args.x_stride = x.stride;
    args.y_stride = args.C;
    args.type = in.float_type(Schema::k_x);
    return args;
  }

  size_t workspace_of(const ConvArgs&) const { return 0; }

  cudaError_t run(ConvArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    args.new_state = launch.output<float>(1);
    return causal_conv1d_step(args, launch.stream);
  }
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::CausalConv1dStep>() {
  return creator_of<CausalConv1dStep>();
}

}  // namespace dfssm::trt
