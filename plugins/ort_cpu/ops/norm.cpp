// RMSNorm and GatedRMSNorm.
#include "call.h"

namespace dfssm {
namespace {

// One norm a token.
void norm(Call& call, const NormArgs& args) {
  const double token_ns = static_cast<double>(args.C) * (args.z ? 0.8 : 0.3);
  call.parallel(args.n, token_ns,
                [&](int64_t begin, int64_t end) { call.kernels.rms_norm(args, begin, end); });
}

}  // namespace

template <>
void run<opset::RMSNorm>(Call& call, const opset::RMSNorm::Attributes& a, const opset::RMSNorm::Sizes& s) {
  using S = opset::RMSNorm;
  float* out = call.output<float>(0, {s.B, s.T, s.C});
  norm(call,
       {call[S::k_x].as<float>(), nullptr, call[S::k_weight].as<float>(), out, 0, s.B * s.T, s.C, 1, a.eps});
}

template <>
void run<opset::GatedRMSNorm>(Call& call, const opset::GatedRMSNorm::Attributes& a,
                              const opset::GatedRMSNorm::Sizes& s) {
  using S = opset::GatedRMSNorm;
  const Columns z = call.columns(S::k_z, a.z_start);
  float* out = call.output<float>(0, {s.B, s.T, s.C});
  norm(call, {call[S::k_y].as<float>(), z.data, call[S::k_weight].as<float>(), out, z.stride, s.B * s.T, s.C,
              a.groups, a.eps});
}

}  // namespace dfssm
