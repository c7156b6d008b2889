// GatedNormScaffoldAdd: GatedRMSNorm, BinaryScaffoldMatMul, and the sum with a residual.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"
#include "norm/part.h"

namespace dfssm::trt {
namespace {

struct GatedNormScaffoldAdd : PluginOf<GatedNormScaffoldAdd, opset::GatedNormScaffoldAdd> {
  struct Args {
    NormArgs norm;
    ScaffoldArgs scaffold;
    const void* residual;
  };

  void check_own() const { check_canonical(a.layout); }

  Args args(const Inputs& in, const Schema::Sizes& s) const {
    return {gated_norm_args<Schema>(in, Schema::k_norm_weight, a),
            scaffold_args<Schema>(in, Schema::k_y, s, a), in[Schema::k_residual].data};
  }

  size_t workspace_of(const Args& args) const {
    return scaffold_workspace(args.scaffold.n, args.scaffold.K, args.scaffold.M, args.scaffold.R);
  }

  cudaError_t run(Args args, const Launch& launch) const {
    args.scaffold.y = launch.output(0);
    return gated_norm_scaffold_add(args.norm, args.scaffold, args.residual, launch.workspace, launch.stream);
  }
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::GatedNormScaffoldAdd>() {
  return creator_of<GatedNormScaffoldAdd>();
}

}  // namespace dfssm::trt
