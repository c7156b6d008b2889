// NormScaffoldConv: RMSNorm, BinaryScaffoldMatMul, and CausalConv1dStep over the columns of the product from
// x_start on, in their place.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"
#include "causal_conv1d_step/part.h"
#include "norm/part.h"

namespace dfssm::trt {
namespace {

struct NormScaffoldConv : PluginOf<NormScaffoldConv, opset::NormScaffoldConv> {
  struct Args {
    NormArgs norm;
    ScaffoldArgs scaffold;
    ConvArgs conv;
  };

  void check_own() const { check_canonical(a.layout); }

  Args args(const Inputs& in, const Schema::Sizes& s) const {
    return {norm_args(in, Schema::k_x, Schema::k_norm_weight, a.eps),
            scaffold_args<Schema>(in, Schema::k_x, s, a),
            conv_args<Schema>(in, Schema::k_conv_weight, Schema::k_conv_bias, s, a)};
  }

  size_t workspace_of(const Args& args) const {
    return scaffold_workspace(args.scaffold.n, args.scaffold.K, args.scaffold.M, args.scaffold.R);
  }

  cudaError_t run(Args args, const Launch& launch) const {
    args.scaffold.y = launch.output(0);
    args.conv.new_state = launch.output<float>(1);
    return norm_scaffold_conv(args.norm, args.scaffold, args.conv, size(a.x_start), launch.workspace,
                              launch.stream);
  }
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::NormScaffoldConv>() {
  return creator_of<NormScaffoldConv>();
}

}  // namespace dfssm::trt
