// RMSNorm and GatedRMSNorm.
#include "common/plugin.h"

#include "norm/part.h"

namespace dfssm::trt {
namespace {

template <class Op, class S>
struct Norm : PluginOf<Op, S> {
  size_t workspace_of(const NormArgs&) const { return 0; }

  cudaError_t run(NormArgs args, const Launch& launch) const {
    args.out = launch.output(0);
    return rms_norm(args, launch.stream);
  }
};

struct RMSNorm : Norm<RMSNorm, opset::RMSNorm> {
  NormArgs args(const Inputs& in, const Schema::Sizes&) const {
    return norm_args(in, Schema::k_x, Schema::k_weight, a.eps);
  }
};

struct GatedRMSNorm : Norm<GatedRMSNorm, opset::GatedRMSNorm> {
  NormArgs args(const Inputs& in, const Schema::Sizes&) const {
    return gated_norm_args<Schema>(in, Schema::k_weight, a);
  }
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::RMSNorm>() {
  return creator_of<RMSNorm>();
}
template <>
nvinfer1::IPluginCreatorInterface* creator<opset::GatedRMSNorm>() {
  return creator_of<GatedRMSNorm>();
}

}  // namespace dfssm::trt
