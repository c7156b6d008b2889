// Int8MatMul. Its output, the logits, is float32 whatever the activations are.
//
// A head that is the embedding, too, comes as int32 words [M, K/4], the same bytes: TensorRT gathers no int8
// constant, and must hold the table once. Such a node says so itself: attribute w_words = 1, this plugin's own.
#include "common/plugin.h"

#include "common/creators.h"

namespace dfssm::trt {
namespace {

struct Int8MatMul : PluginOf<Int8MatMul> {
  using Schema = opset::Int8MatMul;
  static constexpr Type kInputTypes[] = {Type::activation, Type::i8, Type::f32};
  static constexpr Type kOutputTypes[] = {Type::f32};
  static constexpr int32_t kAliases[] = {kNoAlias};

  void attributes(FieldVisitor& visit) override { visit("w_words", w_words); }
  void check_attributes() const override {
    if (w_words != 0 && w_words != 1) fail("attribute 'w_words' is %d, expected 0 or 1", w_words);
  }

  Type input_type(size_t input) const override {
    return w_words && input == Schema::k_w ? Type::i32 : kInputTypes[input];
  }

  Int8Args args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    const Tensor& w_scale = in.ranked(Schema::k_w_scale, 1);
    const int64_t K = x[2], M = w_scale[0];
    check_columns(K);
    if (w_words && K != kOpen && K % 4) {
      fail("input 'x' has K=%lld, expected a multiple of 4 where w_words = 1", static_cast<long long>(K));
    }
    const int64_t columns = w_words && K != kOpen ? K / 4 : K;
    Int8Args args{};
    args.x = x.data;
    args.w = in.expect(Schema::k_w, {M, columns}).as<int8_t>();
    args.w_scale = w_scale.as<float>();
    args.n = size(times(x[0], x[1])), args.K = size(K), args.M = size(M);
    args.type = float_type(x.type), args.y_type = Float::f32;
    return args;
  }

  size_t workspace_of(const Int8Args& args) const { return int8_workspace(args.n, args.K); }

  cudaError_t run(Int8Args args, const Launch& launch) const {
    args.y = launch.output(0);
    return int8_matmul(args, launch.workspace, launch.stream);
  }

  void infer(Inference& inference) const override {
    inference.set(0, {inference.dim(Schema::k_x, 0), inference.dim(Schema::k_x, 1),
                      inference.dim(Schema::k_w_scale, 0)});
  }

  int32_t w_words = 0;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* int8_matmul_creator() {
  static Creator<Int8MatMul> creator;
  return &creator;
}

}  // namespace dfssm::trt
