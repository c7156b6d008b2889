// RMSNorm and GatedRMSNorm.
#include "common/plugin.h"

#include "common/creators.h"
#include "norm/part.h"

namespace dfssm::trt {
namespace {

// What both have: Part is that of the norm, input 0 what is normed.
template <class Op, class Part>
struct Norm : PluginOf<Op> {
  static constexpr Type kOutputTypes[] = {Type::activation};
  static constexpr int32_t kAliases[] = {kNoAlias};

  void attributes(FieldVisitor& visit) override { part.attributes(visit); }
  void check_attributes() const override { part.check_attributes(); }

  size_t workspace_of(const NormArgs&) const { return 0; }

  cudaError_t run(NormArgs args, const Launch& launch) const {
    args.out = launch.output(0);
    return rms_norm(args, launch.stream);
  }

  void infer(Inference& inference) const override { inference.like(0, 0); }

  Part part;
};

struct RMSNorm : Norm<RMSNorm, NormPart> {
  using Schema = opset::RMSNorm;
  static constexpr Type kInputTypes[] = {Type::activation, Type::f32};

  NormArgs args(const Inputs& in) const { return part.args(in, Schema::k_x, Schema::k_weight); }
};

struct GatedRMSNorm : Norm<GatedRMSNorm, GatedNormPart> {
  using Schema = opset::GatedRMSNorm;
  static constexpr Type kInputTypes[] = {Type::activation, Type::activation, Type::f32};

  NormArgs args(const Inputs& in) const { return part.args(in, Schema::k_y, Schema::k_z, Schema::k_weight); }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* rms_norm_creator() {
  static Creator<RMSNorm> creator;
  return &creator;
}

nvinfer1::IPluginCreatorInterface* gated_rms_norm_creator() {
  static Creator<GatedRMSNorm> creator;
  return &creator;
}

}  // namespace dfssm::trt
