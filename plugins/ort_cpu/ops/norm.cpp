// RMSNorm and GatedRMSNorm.
#include <cmath>

#include "op.h"
#include "ops.h"

namespace dfssm::ort {
namespace {

float checked_eps(const char* op, float eps) {
  if (!(eps >= 0) || std::isinf(eps)) fail("%s: attribute 'eps' is %g, expected a number >= 0", op, eps);
  return eps;
}

// One norm a token.
void norm(Call& call, NormArgs args) {
  const double token_ns = static_cast<double>(args.C) * (args.z ? 0.8 : 0.3);
  call.parallel(args.n, token_ns, [&](int64_t begin, int64_t end) { kernels().rms_norm(args, begin, end); });
}

struct RMSNorm : Kernel {
  using Schema = opset::RMSNorm;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32};
  static constexpr std::pair<size_t, size_t> kInplace[] = {{Schema::k_x, 0}};

  explicit RMSNorm(const OrtKernelInfo* info)
      : Kernel(kSignature<Schema>, info),
        eps(checked_eps(Schema::kName, attribute("eps", Schema::kDefault_eps))) {}

  void compute(Call& call) const {
    const Tensor& x = call.ranked(Schema::k_x, 3);
    const Tensor& weight = call.expect(Schema::k_weight, {x[2]});
    float* out = call.output<float>(0, {x[0], x[1], x[2]});
    norm(call, {x.as<float>(), nullptr, weight.as<float>(), out, 0, x[0] * x[1], x[2], 1, eps});
  }

  static void infer(Inference& inference) { inference.like(0, Schema::k_x, 3); }

  float eps;
};

struct GatedRMSNorm : Kernel {
  using Schema = opset::GatedRMSNorm;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kF32, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32};
  static constexpr std::pair<size_t, size_t> kInplace[] = {{Schema::k_y, 0}};

  explicit GatedRMSNorm(const OrtKernelInfo* info)
      : Kernel(kSignature<Schema>, info),
        eps(checked_eps(Schema::kName, attribute("eps", Schema::kDefault_eps))),
        groups(positive("groups", Schema::kDefault_groups)) {}

  void compute(Call& call) const {
    const Tensor& y = call.ranked(Schema::k_y, 3);
    const int64_t B = y[0], T = y[1], C = y[2];
    if (C % groups) {
      fail("%s: input 'y' has C=%lld channels, expected a multiple of groups=%lld", Schema::kName,
           static_cast<long long>(C), static_cast<long long>(groups));
    }
    const Columns z = call.columns(Schema::k_z, B, T, C);
    const Tensor& weight = call.expect(Schema::k_weight, {C});
    float* out = call.output<float>(0, {B, T, C});
    norm(call, {y.as<float>(), z.data, weight.as<float>(), out, z.stride, B * T, C, groups, eps});
  }

  static void infer(Inference& inference) { inference.like(0, Schema::k_y, 3); }

  float eps;
  int64_t groups;
};

}  // namespace

const OrtCustomOp* rms_norm() { return custom_op<RMSNorm>(); }
const OrtCustomOp* gated_rms_norm() { return custom_op<GatedRMSNorm>(); }

}  // namespace dfssm::ort
