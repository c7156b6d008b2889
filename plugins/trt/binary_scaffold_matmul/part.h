// The product with a scaffold as a part of a plugin: of its own, and of those that it is fused into.
#pragma once

#include "common/plugin.h"

namespace dfssm::trt {

inline void check_canonical(int64_t layout) {
  if (layout != opset::kCanonical) {
    fail("attribute 'layout' is " + opset::shown(layout) +
         ", expected 0: these kernels read the canonical bits");
  }
}

// Of an op `S` that has the inputs and attributes of BinaryScaffoldMatMul by their names, and `activations`
// for x.
template <class S>
ScaffoldArgs scaffold_args(const Inputs& in, size_t activations, const typename S::Sizes& s,
                           const typename S::Attributes& a) {
  ScaffoldArgs args{};
  args.x = in[activations].data;
  args.bits = in[S::k_bits].template as<uint32_t>();
  args.scale = in[S::k_scale].template as<float>();
  args.down = in[S::k_down].template as<int8_t>();
  args.down_scale = in[S::k_down_scale].template as<float>();
  args.up = in[S::k_up].template as<int8_t>();
  args.up_scale = in[S::k_up_scale].template as<float>();
  args.n = size(times(s.B, s.T)), args.K = size(s.K), args.M = size(s.M), args.R = size(s.R);
  args.planes = size(a.planes);
  args.type = in.float_type(activations);
  return args;
}

}  // namespace dfssm::trt
