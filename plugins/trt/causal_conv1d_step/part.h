// The convolution as a part of a plugin: of its own, and of the one that it is fused into.
#pragma once

#include <string>

#include "common/plugin.h"

namespace dfssm::trt {

struct ConvPart {
  std::string activation = opset::CausalConv1dStep::kDefault_activation;

  void attributes(FieldVisitor& visit) { visit("activation", activation); }

  void check_attributes() const {
    if (activation != "silu" && activation != "none") {
      fail("attribute 'activation' is '%s', expected 'silu' or 'none'", activation.c_str());
    }
  }

  // All but x and y, which are [B, T, C].
  ConvArgs args(const Inputs& in, size_t state, size_t weights, size_t bias, int64_t B, int64_t T) const {
    const Tensor& weight = in.ranked(weights, 2);
    const int64_t C = weight[0], W = weight[1];
    if (W != kOpen && (W < 2 || W > 4)) {
      fail("input '%s' has width W=%lld, expected 2, 3 or 4", in.name(weights), static_cast<long long>(W));
    }
    ConvArgs args{};
    args.state = in.expect(state, {B, C, plus(W, -1)}).as<float>();
    args.weight = weight.as<float>();
    args.bias = in.expect(bias, {C}).as<float>();
    args.B = size(B), args.T = size(T), args.C = size(C), args.W = size(W);
    args.silu = activation == "silu";
    return args;
  }
};

}  // namespace dfssm::trt
