// BinaryScaffoldMatMul. The bits are int32 words here: TensorRT's parser would widen each byte of a uint8
// tensor to four.
#include "common/plugin.h"

#include "binary_scaffold_matmul/part.h"
#include "common/creators.h"

namespace dfssm::trt {
namespace {

// The shapes that these plugins take, for messages.
struct Words : opset::BinaryScaffoldMatMul {
  static constexpr const char* kInputShapes[] = {
      "[B, T, K]", "[planes, M, K / 32]", "[planes, M]", "[R, K]", "[R]", "[M, R]", "[M]"};
};

struct BinaryScaffoldMatMul : PluginOf<BinaryScaffoldMatMul> {
  using Schema = Words;
  static constexpr Type kInputTypes[] = {Type::activation, Type::i32, Type::f32, Type::i8,
                                         Type::f32,        Type::i8,  Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation};
  static constexpr int32_t kAliases[] = {kNoAlias};

  void attributes(FieldVisitor& visit) override { scaffold.attributes(visit); }
  void check_attributes() const override { scaffold.check_attributes(); }

  ScaffoldArgs args(const Inputs& in) const { return scaffold.args(in, Schema::k_x, Schema::k_bits); }

  size_t workspace_of(const ScaffoldArgs& args) const {
    return scaffold_workspace(args.n, args.K, args.M, args.R);
  }

  cudaError_t run(ScaffoldArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    return binary_scaffold_matmul(args, launch.workspace, launch.stream);
  }

  void infer(Inference& inference) const override {
    inference.set(
        0, {inference.dim(Schema::k_x, 0), inference.dim(Schema::k_x, 1), inference.last(Schema::k_scale)});
  }

  ScaffoldPart scaffold;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* binary_scaffold_matmul_creator() {
  static Creator<BinaryScaffoldMatMul> creator;
  return &creator;
}

}  // namespace dfssm::trt
