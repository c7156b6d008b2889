// RMSNorm and GatedRMSNorm.
#include "op.h"

namespace dfssm::ort {
namespace {

// One norm a token.
void norm(Call& call, NormArgs args) {
  const double token_ns = static_cast<double>(args.C) * (args.z ? 0.8 : 0.3);
  call.parallel(args.n, token_ns, [&](int64_t begin, int64_t end) { kernels().rms_norm(args, begin, end); });
}

struct RMSNorm : KernelOf<opset::RMSNorm> {
  using KernelOf::KernelOf;

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, C = s.C;
    float* out = call.output<float>(0, {B, T, C});
    norm(call, {call[Schema::k_x].as<float>(), nullptr, call[Schema::k_weight].as<float>(), out, 0, B * T, C,
                1, attributes.eps});
  }
};

struct GatedRMSNorm : KernelOf<opset::GatedRMSNorm> {
  using KernelOf::KernelOf;

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, C = s.C;
    const Columns z = call.columns(Schema::k_z, attributes.z_start);
    float* out = call.output<float>(0, {B, T, C});
    norm(call, {call[Schema::k_y].as<float>(), z.data, call[Schema::k_weight].as<float>(), out, z.stride,
                B * T, C, attributes.groups, attributes.eps});
  }
};

}  // namespace

template <>
const OrtCustomOp* op<opset::RMSNorm>() {
  return custom_op<RMSNorm>();
}
template <>
const OrtCustomOp* op<opset::GatedRMSNorm>() {
  return custom_op<GatedRMSNorm>();
}

}  // namespace dfssm::ort
