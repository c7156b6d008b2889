// BinaryScaffoldMatMul. The bits are int32 words here: TensorRT's parser would widen each byte of a uint8
// tensor to four.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"

namespace dfssm::trt {
namespace {

struct BinaryScaffoldMatMul : PluginOf<BinaryScaffoldMatMul, opset::BinaryScaffoldMatMul> {
  void check_own() const { check_canonical(a.layout); }

  ScaffoldArgs args(const Inputs& in, const Schema::Sizes& s) const {
    return scaffold_args<Schema>(in, Schema::k_x, s, a);
  }

  size_t workspace_of(const ScaffoldArgs& args) const {
    return scaffold_workspace(args.n, args.K, args.M, args.R);
  }

  cudaError_t run(ScaffoldArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    return binary_scaffold_matmul(args, launch.workspace, launch.stream);
  }
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::BinaryScaffoldMatMul>() {
  return creator_of<BinaryScaffoldMatMul>();
}

}  // namespace dfssm::trt
