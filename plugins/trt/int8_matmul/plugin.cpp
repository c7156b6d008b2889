// Int8MatMul. Its output, the logits, is float32 whatever the activations are.
//
// A head that is the embedding, too, comes as int32 words [M, K/4], the same bytes: TensorRT gathers no int8
// constant, and must hold the table once. Such a node says so itself: attribute w_words = 1, this plugin's
// own.
#include "common/plugin.h"

namespace dfssm::trt {
namespace {

struct Int8MatMul : PluginOf<Int8MatMul, opset::Int8MatMul> {
  void visit_own(FieldVisitor& visit) { visit("w_words", w_words); }
  void check_own() const { check_flag("w_words", w_words); }

  Type input_type(size_t input) const override {
    return w_words && input == Schema::k_w ? Type::i32 : Plugin::input_type(input);
  }
  Type output_type(size_t) const override { return Type::f32; }

  Int8Args args(const Inputs& in, const Schema::Sizes& s) const {
    Int8Args args{};
    args.x = in[Schema::k_x].data;
    args.w = in[Schema::k_w].as<int8_t>();
    args.w_scale = in[Schema::k_w_scale].as<float>();
    args.n = size(times(s.B, s.T)), args.K = size(s.K), args.M = size(s.M);
    args.type = in.float_type(Schema::k_x), args.y_type = Float::f32;
    return args;
  }

  size_t workspace_of(const Int8Args& args) const { return int8_workspace(args.n, args.K); }

  cudaError_t run(Int8Args args, const Launch& launch) const {
    args.y = launch.output(0);
    return int8_matmul(args, launch.workspace, launch.stream);
  }

  int64_t w_words = 0;
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::Int8MatMul>() {
  return creator_of<Int8MatMul>();
}

}  // namespace dfssm::trt
