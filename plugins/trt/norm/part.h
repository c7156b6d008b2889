// The norms as parts of a plugin: of their own, and of those that they are fused into.
#pragma once

#include "common/plugin.h"

namespace dfssm::trt {

// Of what is normed, [B, T, C], and its weights [C].
inline NormArgs norm_args(const Inputs& in, size_t activations, size_t weight, float eps) {
  const Tensor& y = in[activations];
  NormArgs args{};
  args.y = y.data;
  args.weight = in[weight].as<float>();
  args.n = size(times(y[0], y[1])), args.C = size(y[2]);
  args.groups = 1;
  args.eps = eps;
  args.type = in.float_type(activations);
  return args;
}

// The same with the gate: of an op `S` with the inputs y and z and the attributes of GatedRMSNorm.
template <class S>
NormArgs gated_norm_args(const Inputs& in, size_t weight, const typename S::Attributes& a) {
  NormArgs args = norm_args(in, S::k_y, weight, a.eps);
  const Inputs::Columns z = in.columns(S::k_z, a.z_start);
  args.z = z.data;
  args.z_stride = z.stride;
  args.groups = size(a.groups);
  return args;
}

}  // namespace dfssm::trt
