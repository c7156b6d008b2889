// NormScaffoldConv: RMSNorm, BinaryScaffoldMatMul, and CausalConv1dStep over the columns of the product from
// x_start on, in their place.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"
#include "causal_conv1d_step/part.h"
#include "common/creators.h"
#include "norm/part.h"

namespace dfssm::trt {
namespace {

// Not an op of the opset: the lowering makes it (targets/trt_lowering/fuse.py).
struct Fused {
  static constexpr char kName[] = "NormScaffoldConv";
  enum Input : size_t {
    k_x,
    k_norm_weight,
    k_bits,
    k_scale,
    k_down,
    k_down_scale,
    k_up,
    k_up_scale,
    k_state,
    k_conv_weight,
    k_conv_bias,
    kInputs
  };
  static constexpr size_t kRequiredInputs = kInputs, kOutputs = 2, kRequiredOutputs = 2;
  static constexpr const char* kInputNames[] = {"x",     "norm_weight", "bits",     "scale",
                                                "down",  "down_scale",  "up",       "up_scale",
                                                "state", "conv_weight", "conv_bias"};
  static constexpr const char* kInputShapes[] = {
      "[B, T, K]", "[K]", "[planes, M, K / 32]", "[planes, M]", "[R, K]", "[R]",
      "[M, R]",    "[M]", "[B, C, W - 1]",       "[C, W]",      "[C]"};
  static constexpr const char* kInputStarts[kInputs] = {};
  static constexpr const char* kOutputNames[] = {"y", "new_state"};
};

struct NormScaffoldConv : PluginOf<NormScaffoldConv> {
  using Schema = Fused;
  static constexpr Type kInputTypes[] = {Type::activation, Type::f32, Type::i32, Type::f32,
                                         Type::i8,         Type::f32, Type::i8,  Type::f32,
                                         Type::f32,        Type::f32, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation, Type::f32};
  static constexpr int32_t kAliases[] = {kNoAlias, Schema::k_state};

  struct Args {
    NormArgs norm;
    ScaffoldArgs scaffold;
    ConvArgs conv;
  };

  void attributes(FieldVisitor& visit) override {
    norm.attributes(visit);
    scaffold.attributes(visit);
    conv.attributes(visit);
    visit("x_start", x_start);
  }

  void check_attributes() const override {
    norm.check_attributes();
    scaffold.check_attributes();
    conv.check_attributes();
    if (x_start < 0) fail("attribute 'x_start' is %d, expected at least 0", x_start);
  }

  Args args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    const Args args = {
        norm.args(in, Schema::k_x, Schema::k_norm_weight), scaffold.args(in, Schema::k_x, Schema::k_bits),
        conv.args(in, Schema::k_state, Schema::k_conv_weight, Schema::k_conv_bias, x[0], x[1])};
    const int64_t M = args.scaffold.M, C = args.conv.C;
    if (M != kOpen && C != kOpen && x_start + C > M) {
      fail("attribute 'x_start' is %d, and C=%lld channels from there on are not within M=%lld columns",
           x_start, static_cast<long long>(C), static_cast<long long>(M));
    }
    return args;
  }

  size_t workspace_of(const Args& args) const {
    return norm_scaffold_conv_workspace(args.scaffold, args.conv.C);
  }

  cudaError_t run(Args args, const Launch& launch) const {
    args.scaffold.y = launch.output(0);
    args.conv.new_state = launch.output<float>(1);
    return norm_scaffold_conv(args.norm, args.scaffold, args.conv, x_start, launch.workspace, launch.stream);
  }

  void infer(Inference& inference) const override {
    inference.set(
        0, {inference.dim(Schema::k_x, 0), inference.dim(Schema::k_x, 1), inference.last(Schema::k_scale)});
    inference.like(1, Schema::k_state);
  }

  NormPart norm;
  ScaffoldPart scaffold;
  ConvPart conv;
  int32_t x_start = 0;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* norm_scaffold_conv_creator() {
  static Creator<NormScaffoldConv> creator;
  return &creator;
}

}  // namespace dfssm::trt
