// SelectiveScanStep.
//
// TensorRT asks for the number of outputs before it shows the inputs' types, so a node with an int8 state,
// which has the optional scales, says so itself: attribute int8_state = 1, this plugin's own.
#include "common/plugin.h"

namespace dfssm::trt {
namespace {

struct SelectiveScanStep : PluginOf<SelectiveScanStep, opset::SelectiveScanStep> {
  void visit_own(FieldVisitor& visit) { visit("int8_state", int8_state); }
  void check_own() const { check_flag("int8_state", int8_state); }

  size_t input_count() const override { return int8_state ? Schema::kInputs : Schema::kRequiredInputs; }
  size_t output_count() const override { return int8_state ? Schema::kOutputs : Schema::kRequiredOutputs; }
  Type input_type(size_t input) const override {
    return int8_state && input == Schema::k_state ? Type::i8 : Plugin::input_type(input);
  }

  ScanArgs args(const Inputs& in, const Schema::Sizes& s) const {
    const Inputs::Columns x = in.columns(Schema::k_x, a.x_start), dt = in.columns(Schema::k_dt, a.dt_start),
                          Bm = in.columns(Schema::k_B, a.B_start), Cm = in.columns(Schema::k_C, a.C_start);
    ScanArgs args{};
    args.x = x.data, args.x_stride = x.stride;
    args.dt = dt.data, args.dt_stride = dt.stride;
    args.Bm = Bm.data, args.B_stride = Bm.stride;
    args.Cm = Cm.data, args.C_stride = Cm.stride;
    args.A_log = in[Schema::k_A_log].as<float>();
    args.D = in[Schema::k_D].as<float>();
    args.dt_bias = in[Schema::k_dt_bias].as<float>();
    args.state = in[Schema::k_state].data;
    if (int8_state) args.state_scale = in[Schema::k_state_scale].as<float>();
    args.B = size(s.B), args.T = size(s.T), args.H = size(s.H), args.P = size(s.P), args.N = size(s.N);
    args.G = size(a.ngroups);
    args.dt_min = a.dt_min, args.dt_max = a.dt_max;
    args.state_type = int8_state                                              ? State::i8
                      : in.type(Schema::k_state) == nvinfer1::DataType::kHALF ? State::f16
                                                                              : State::f32;
    args.type = in.float_type(Schema::k_x);
    return args;
  }

  size_t workspace_of(const ScanArgs& args) const { return scan_workspace(args); }

  cudaError_t run(ScanArgs args, const Launch& launch) const {
    args.y = launch.output(0);
    args.new_state = launch.output(1);
    if (int8_state) args.new_state_scale = launch.output<float>(2);
    return selective_scan_step(args, launch.workspace, launch.stream);
  }

  int64_t int8_state = 0;
};

}  // namespace

template <>
nvinfer1::IPluginCreatorInterface* creator<opset::SelectiveScanStep>() {
  return creator_of<SelectiveScanStep>();
}

}  // namespace dfssm::trt
