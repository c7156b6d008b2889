// The norms as parts of a plugin: of their own, and of those that they are fused into.
#pragma once

#include <cmath>

#include "common/plugin.h"

namespace dfssm::trt {

struct NormPart {
  float eps = opset::RMSNorm::kDefault_eps;

  void attributes(FieldVisitor& visit) { visit("eps", eps); }

  void check_attributes() const {
    if (!(eps >= 0) || std::isinf(eps)) fail("attribute 'eps' is %g, expected a number >= 0", eps);
  }

  // Of what is normed, [B, T, C], and its weights [C].
  NormArgs args(const Inputs& in, size_t activations, size_t weight) const {
    const Tensor& y = in.ranked(activations, 3);
    NormArgs args{};
    args.y = y.data;
    args.weight = in.expect(weight, {y[2]}).as<float>();
    args.n = size(times(y[0], y[1])), args.C = size(y[2]);
    args.groups = 1;
    args.eps = eps;
    args.type = float_type(y.type);
    return args;
  }
};

struct GatedNormPart : NormPart {
  int32_t groups = opset::GatedRMSNorm::kDefault_groups;

  void attributes(FieldVisitor& visit) {
    NormPart::attributes(visit);
    visit("groups", groups);
  }

  void check_attributes() const {
    NormPart::check_attributes();
    check_positive("groups", groups);
  }

  NormArgs args(const Inputs& in, size_t activations, size_t gate, size_t weight) const {
    const Tensor& y = in.ranked(activations, 3);
    if (y[2] != kOpen && y[2] % groups) {
      fail("input '%s' has C=%lld channels, expected a multiple of groups=%d", in.name(activations),
           static_cast<long long>(y[2]), groups);
    }
    const Inputs::Columns z = in.columns(gate, y[0], y[1], y[2]);
    NormArgs args = NormPart::args(in, activations, weight);
    args.z = z.data;
    args.z_stride = z.stride;
    args.groups = groups;
    return args;
  }
};

}  // namespace dfssm::trt
