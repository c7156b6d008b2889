// The convolution as a part of a plugin: of its own, and of the one that it is fused into.
#pragma once

#include "common/plugin.h"

namespace dfssm::trt {

// All but x and y, which are [B, T, C]; `weight` and `bias` are inputs of `S`.
template <class S>
ConvArgs conv_args(const Inputs& in, size_t weight, size_t bias, const typename S::Sizes& s,
                   const typename S::Attributes& a) {
  ConvArgs args{};
  args.state = in[S::k_state].template as<float>();
  args.weight = in[weight].as<float>();
  args.bias = in[bias].as<float>();
  args.B = size(s.B), args.T = size(s.T), args.C = size(s.C), args.W = size(s.W);
  args.silu = a.activation == "silu";
  return args;
}

}  // namespace dfssm::trt
