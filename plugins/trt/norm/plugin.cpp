// RMSNorm and GatedRMSNorm.
#include "common/plugin.h"

#include <cmath>

#include "common/creators.h"

namespace dfssm::trt {
namespace {

void check_eps(float eps) {
  if (!(eps >= 0) || std::isinf(eps)) fail("attribute 'eps' is %g, expected a number >= 0", eps);
}

struct RMSNorm : PluginOf<RMSNorm> {
  using Schema = opset::RMSNorm;
  static constexpr Type kInputTypes[] = {Type::activation, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation};
  static constexpr int32_t kAliases[] = {kNoAlias};

  void attributes(FieldVisitor& visit) override { visit("eps", eps); }
  void check_attributes() const override { check_eps(eps); }

  NormArgs args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    NormArgs args{};
    args.y = x.data;
    args.weight = in.expect(Schema::k_weight, {x[2]}).as<float>();
    args.n = size(times(x[0], x[1])), args.C = size(x[2]);
    args.groups = 1;
    args.eps = eps;
    args.type = float_type(x.type);
    return args;
  }

  size_t workspace_of(const NormArgs&) const { return 0; }

  cudaError_t run(NormArgs args, const Launch& launch) const {
    args.out = launch.output(0);
    return rms_norm(args, launch.stream);
  }

  void infer(Inference& inference) const override { inference.like(0, Schema::k_x); }

  float eps = Schema::kDefault_eps;
};

struct GatedRMSNorm : PluginOf<GatedRMSNorm> {
  using Schema = opset::GatedRMSNorm;
  static constexpr Type kInputTypes[] = {Type::activation, Type::activation, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation};
  static constexpr int32_t kAliases[] = {kNoAlias};

  void attributes(FieldVisitor& visit) override {
    visit("eps", eps);
    visit("groups", groups);
  }

  void check_attributes() const override {
    check_eps(eps);
    check_positive("groups", groups);
  }

  NormArgs args(const Inputs& in) const {
    const Tensor& y = in.ranked(Schema::k_y, 3);
    const int64_t B = y[0], T = y[1], C = y[2];
    if (C != kOpen && C % groups) {
      fail("input 'y' has C=%lld channels, expected a multiple of groups=%d", static_cast<long long>(C),
           groups);
    }
    const Inputs::Columns z = in.columns(Schema::k_z, B, T, C);
    NormArgs args{};
    args.y = y.data;
    args.z = z.data;
    args.z_stride = z.stride;
    args.weight = in.expect(Schema::k_weight, {C}).as<float>();
    args.n = size(times(B, T)), args.C = size(C);
    args.groups = groups;
    args.eps = eps;
    args.type = float_type(y.type);
    return args;
  }

  size_t workspace_of(const NormArgs&) const { return 0; }

  cudaError_t run(NormArgs args, const Launch& launch) const {
    args.out = launch.output(0);
    return rms_norm(args, launch.stream);
  }

  void infer(Inference& inference) const override { inference.like(0, Schema::k_y); }

  float eps = Schema::kDefault_eps;
  int32_t groups = Schema::kDefault_groups;
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
