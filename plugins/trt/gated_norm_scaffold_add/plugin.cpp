// GatedNormScaffoldAdd: GatedRMSNorm, BinaryScaffoldMatMul, and the sum with a residual.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"
#include "common/creators.h"
#include "norm/part.h"

namespace dfssm::trt {
namespace {

// Not an op of the opset: the lowering makes it (targets/trt_lowering/fuse.py).
struct Fused {
  static constexpr char kName[] = "GatedNormScaffoldAdd";
  enum Input : size_t {
    k_y,
    k_z,
    k_norm_weight,
    k_bits,
    k_scale,
    k_down,
    k_down_scale,
    k_up,
    k_up_scale,
    k_residual,
    kInputs
  };
  static constexpr size_t kRequiredInputs = kInputs, kOutputs = 1, kRequiredOutputs = 1;
  static constexpr const char* kInputNames[] = {"y",    "z",          "norm_weight", "bits",     "scale",
                                                "down", "down_scale", "up",          "up_scale", "residual"};
  static constexpr const char* kInputShapes[] = {"[B, T, K]",   "[B, T, K]", "[K]", "[planes, M, K / 32]",
                                                 "[planes, M]", "[R, K]",    "[R]", "[M, R]",
                                                 "[M]",         "[B, T, M]"};
  static constexpr const char* kInputStarts[kInputs] = {nullptr, "z_start"};
  static constexpr const char* kOutputNames[] = {"out"};
};

struct GatedNormScaffoldAdd : PluginOf<GatedNormScaffoldAdd> {
  using Schema = Fused;
  static constexpr Type kInputTypes[] = {Type::activation, Type::activation, Type::f32, Type::i32,
                                         Type::f32,        Type::i8,         Type::f32, Type::i8,
                                         Type::f32,        Type::activation};
  static constexpr Type kOutputTypes[] = {Type::activation};
  static constexpr int32_t kAliases[] = {kNoAlias};

  struct Args {
    NormArgs norm;
    ScaffoldArgs scaffold;
    const void* residual;
  };

  void attributes(FieldVisitor& visit) override {
    norm.attributes(visit);
    scaffold.attributes(visit);
  }

  void check_attributes() const override {
    norm.check_attributes();
    scaffold.check_attributes();
  }

  Args args(const Inputs& in) const {
    const Tensor& y = in.ranked(Schema::k_y, 3);
    Args args = {norm.args(in, Schema::k_y, Schema::k_z, Schema::k_norm_weight),
                 scaffold.args(in, Schema::k_y, Schema::k_bits), nullptr};
    args.residual = in.expect(Schema::k_residual, {y[0], y[1], args.scaffold.M}).data;
    return args;
  }

  size_t workspace_of(const Args& args) const {
    return scaffold_workspace(args.scaffold.n, args.scaffold.K, args.scaffold.M, args.scaffold.R);
  }

  cudaError_t run(Args args, const Launch& launch) const {
    args.scaffold.y = launch.output(0);
    return gated_norm_scaffold_add(args.norm, args.scaffold, args.residual, launch.workspace, launch.stream);
  }

  void infer(Inference& inference) const override {
    inference.set(
        0, {inference.dim(Schema::k_y, 0), inference.dim(Schema::k_y, 1), inference.last(Schema::k_scale)});
  }

  GatedNormPart norm;
  ScaffoldPart scaffold;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* gated_norm_scaffold_add_creator() {
  static Creator<GatedNormScaffoldAdd> creator;
  return &creator;
}

}  // namespace dfssm::trt
