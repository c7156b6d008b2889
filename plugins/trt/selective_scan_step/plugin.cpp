// SelectiveScanStep.
//
// TensorRT asks for the number of outputs before it shows the inputs' types, so a node with an int8 state,
// which has the optional scales, says so itself: attribute int8_state = 1, this plugin's own.
#include "common/plugin.h"

#include "common/creators.h"

namespace dfssm::trt {
namespace {

struct SelectiveScanStep : PluginOf<SelectiveScanStep> {
  using Schema = opset::SelectiveScanStep;
  static constexpr Type kInputTypes[] = {Type::activation, Type::activation, Type::activation,
                                         Type::activation, Type::f32,        Type::f32,
                                         Type::f32,        Type::state,      Type::f32};
  static constexpr Type kOutputTypes[] = {Type::activation, Type::state, Type::f32};
  static constexpr int32_t kAliases[] = {kNoAlias, Schema::k_state, Schema::k_state_scale};

  void attributes(FieldVisitor& visit) override {
    visit("ngroups", ngroups);
    visit("dt_min", dt_min);
    visit("dt_max", dt_max);
    visit("int8_state", int8_state);
  }

  void check_attributes() const override {
    check_positive("ngroups", ngroups);
    if (!(dt_min <= dt_max)) {
      fail("attribute 'dt_min' is %g, expected at most 'dt_max' = %g", dt_min, dt_max);
    }
    if (int8_state != 0 && int8_state != 1) fail("attribute 'int8_state' is %d, expected 0 or 1", int8_state);
  }

  size_t input_count() const override { return int8_state ? Schema::kInputs : Schema::kRequiredInputs; }
  size_t output_count() const override { return int8_state ? Schema::kOutputs : Schema::kRequiredOutputs; }
  Type input_type(size_t input) const override {
    return int8_state && input == Schema::k_state ? Type::i8 : kInputTypes[input];
  }

  ScanArgs args(const Inputs& in) const {
    const Tensor& x = in.ranked(Schema::k_x, 3);
    const Tensor& state = in.ranked(Schema::k_state, 4);
    const int64_t B = x[0], T = x[1], H = state[1], N = state[2], P = state[3];
    if (H != kOpen && H % ngroups) {
      fail("input 'state' has H=%lld heads, expected a multiple of ngroups=%d", static_cast<long long>(H),
           ngroups);
    }
    in.expect(Schema::k_state, {B, H, N, P});
    const Inputs::Columns x_part = in.columns(Schema::k_x, B, T, times(H, P)),
                          dt_part = in.columns(Schema::k_dt, B, T, H),
                          B_part = in.columns(Schema::k_B, B, T, times(ngroups, N)),
                          C_part = in.columns(Schema::k_C, B, T, times(ngroups, N));
    ScanArgs args{};
    args.x = x_part.data, args.x_stride = x_part.stride;
    args.dt = dt_part.data, args.dt_stride = dt_part.stride;
    args.Bm = B_part.data, args.B_stride = B_part.stride;
    args.Cm = C_part.data, args.C_stride = C_part.stride;
    args.A_log = in.expect(Schema::k_A_log, {H}).as<float>();
    args.D = in.expect(Schema::k_D, {H}).as<float>();
    args.dt_bias = in.expect(Schema::k_dt_bias, {H}).as<float>();
    args.state = state.data;
    if (int8_state) args.state_scale = in.expect(Schema::k_state_scale, {B, H, N}).as<float>();
    args.B = size(B), args.T = size(T), args.H = size(H), args.P = size(P), args.N = size(N),
    args.G = ngroups;
    args.dt_min = dt_min, args.dt_max = dt_max;
    args.state_type = int8_state                                ? State::i8
                      : state.type == nvinfer1::DataType::kHALF ? State::f16
                                                                : State::f32;
    args.type = float_type(x.type);
    return args;
  }

  size_t workspace_of(const ScanArgs& args) const { return scan_workspace(args); }

  cudaError_t run(ScanArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    args.new_state = launch.output(1);
    if (int8_state) args.new_state_scale = launch.output<float>(2);
    return selective_scan_step(args, launch.workspace, launch.stream);
  }

  void infer(Inference& inference) const override {
    const auto width =
        inference.product(inference.dim(Schema::k_state, 1), inference.dim(Schema::k_state, 3));
    inference.set(0, {inference.dim(Schema::k_x, 0), inference.dim(Schema::k_x, 1), width});
    inference.like(1, Schema::k_state);
    if (int8_state) inference.like(2, Schema::k_state_scale);
  }

  int32_t ngroups = Schema::kDefault_ngroups;
  float dt_min = Schema::kDefault_dt_min, dt_max = Schema::kDefault_dt_max;
  int32_t int8_state = 0;
};

}  // namespace

nvinfer1::IPluginCreatorInterface* selective_scan_step_creator() {
  static Creator<SelectiveScanStep> creator;
  return &creator;
}

}  // namespace dfssm::trt
