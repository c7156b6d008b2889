// The product with a scaffold as a part of a plugin: of its own, and of those that it is fused into.
#pragma once

#include "common/plugin.h"

namespace dfssm::trt {

struct ScaffoldPart {
  int32_t planes = opset::BinaryScaffoldMatMul::kDefault_planes;
  int32_t layout = opset::BinaryScaffoldMatMul::kDefault_layout;

  void attributes(FieldVisitor& visit) {
    visit("planes", planes);
    visit("layout", layout);
  }

  void check_attributes() const {
    check_positive("planes", planes);
    if (layout != 0)
      fail("attribute 'layout' is %d, expected 0: these kernels read the canonical bits", layout);
  }

  // Of the activations, input `x` [B, T, K], and the weights, the inputs from `bits` on.
  ScaffoldArgs args(const Inputs& in, size_t activations, size_t bits) const {
    const size_t scales = bits + 1, down = bits + 2, down_scale = bits + 3, up = bits + 4,
                 up_scale = bits + 5;
    const Tensor& x = in.ranked(activations, 3);
    const int64_t K = x[2];
    if (K != kOpen && K % 32) {
      fail("input '%s' has K=%lld, expected a multiple of 32", in.name(activations),
           static_cast<long long>(K));
    }
    check_columns(K);
    const Tensor& scale = in.ranked(scales, planes > 1 ? 2 : 1);
    const int64_t M = scale[scale.rank - 1], words = K == kOpen ? kOpen : K / 32;
    const int64_t R = in[down].rank == 2 ? in[down][0] : 0;
    if (planes > 1) in.expect(scales, {planes, M});
    ScaffoldArgs args{};
    args.x = x.data;
    args.bits =
        (planes > 1 ? in.expect(bits, {planes, M, words}) : in.expect(bits, {M, words})).as<uint32_t>();
    args.scale = scale.as<float>();
    args.down = in.expect(down, {R, K}).as<int8_t>();
    args.down_scale = in.expect(down_scale, {R}).as<float>();
    args.up = in.expect(up, {M, R}).as<int8_t>();
    args.up_scale = in.expect(up_scale, {M}).as<float>();
    args.n = size(times(x[0], x[1])), args.K = size(K), args.M = size(M), args.R = size(R),
    args.planes = planes;
    args.type = float_type(x.type);
    return args;
  }
};

}  // namespace dfssm::trt
