// BinaryScaffoldMatMul. The bits are int32 words here: TensorRT's parser would widen each byte of a uint8
// tensor to four.
#include "common/plugin.h"

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

  void attributes(FieldVisitor& visit) override {
    visit("planes", planes);
    visit("layout", layout);
  }

  void check_attributes() const override {
    check_positive("planes", planes);
    if (layout != 0)
      fail("attribute 'layout' is %d, expected 0: these kernels read the canonical bits", layout);
  }

  ScaffoldArgs args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    const int64_t K = x[2];
    if (K != kOpen && K % 32) {
      fail("input 'x' has K=%lld, expected a multiple of 32", static_cast<long long>(K));
    }
    check_columns(K);
    const Tensor& scale = in.ranked(Schema::k_scale, planes > 1 ? 2 : 1);
    const int64_t M = scale[scale.rank - 1], words = K == kOpen ? kOpen : K / 32;
    const int64_t R = in[Schema::k_down].rank == 2 ? in[Schema::k_down][0] : 0;
    if (planes > 1) in.expect(Schema::k_scale, {planes, M});
    ScaffoldArgs args{};
    args.x = x.data;
    args.bits =
        (planes > 1 ? in.expect(Schema::k_bits, {planes, M, words}) : in.expect(Schema::k_bits, {M, words}))
            .as<uint32_t>();
    args.scale = scale.as<float>();
    args.down = in.expect(Schema::k_down, {R, K}).as<int8_t>();
    args.down_scale = in.expect(Schema::k_down_scale, {R}).as<float>();
    args.up = in.expect(Schema::k_up, {M, R}).as<int8_t>();
    args.up_scale = in.expect(Schema::k_up_scale, {M}).as<float>();
    args.n = size(times(x[0], x[1])), args.K = size(K), args.M = size(M), args.R = size(R),
    args.planes = planes;
    args.type = float_type(x.type);
    return args;
  }

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

  int32_t planes = Schema::kDefault_planes, layout = Schema::kDefault_layout;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* binary_scaffold_matmul_creator() {
  static Creator<BinaryScaffoldMatMul> creator;
  return &creator;
}

}  // namespace dfssm::trt
