// SelectiveScanStep.
#include <atomic>

#include "op.h"

namespace dfssm::ort {
namespace {

StateType state_of(opset::DType type) {
  return type == opset::kFloat32 ? StateType::f32 : type == opset::kFloat16 ? StateType::f16 : StateType::i8;
}

struct SelectiveScanStep : KernelOf<opset::SelectiveScanStep> {
  explicit SelectiveScanStep(const OrtKernelInfo* info)
      : KernelOf(info), state_type(state_of(input_type(Schema::k_state))) {
    const bool quantized = state_type == StateType::i8;
    check_scale(Schema::kOp, Schema::k_state_scale, has_input(Schema::k_state_scale), quantized);
    if (quantized && !has_output(2)) fail("output 'new_state_scale' is missing");
  }

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, H = s.H, N = s.N, P = s.P;
    const Columns x = call.columns(Schema::k_x, attributes.x_start);
    const Columns dt = call.columns(Schema::k_dt, attributes.dt_start);
    const Columns Bm = call.columns(Schema::k_B, attributes.B_start);
    const Columns Cm = call.columns(Schema::k_C, attributes.C_start);
    ScanArgs args{};
    args.x = x.data, args.x_stride = x.stride;
    args.dt = dt.data, args.dt_stride = dt.stride;
    args.Bm = Bm.data, args.B_stride = Bm.stride;
    args.Cm = Cm.data, args.C_stride = Cm.stride;
    args.A_log = call[Schema::k_A_log].as<float>();
    args.D = call[Schema::k_D].as<float>();
    args.dt_bias = call[Schema::k_dt_bias].as<float>();
    args.state = call[Schema::k_state].data;
    args.y = call.output<float>(0, {B, T, H * P});
    args.new_state = call.output<void>(1, {B, H, N, P});
    double state_bytes = state_type == StateType::f32 ? 4 : 2;
    if (state_type == StateType::i8) {
      args.state_scale = call[Schema::k_state_scale].as<float>();
      args.new_state_scale = call.output<float>(2, {B, H, N});
      state_bytes = 1;
    }
    args.B = B, args.T = T, args.H = H, args.P = P, args.N = N, args.G = attributes.ngroups;
    args.dt_min = attributes.dt_min, args.dt_max = attributes.dt_max;
    args.state_type = state_type;

    const KernelTable& kernel = kernels();
    const size_t scratch_bytes = kernel.selective_scan_bytes(args);
    const double head_ns = static_cast<double>(N * P) * (state_bytes / 25 + 0.065 * static_cast<double>(T));
    std::atomic<bool> out_of_memory = false;
    call.parallel(B * H, head_ns, [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(scratch_bytes);
      if (scratch || scratch_bytes == 0) {
        kernel.selective_scan(args, begin, end, scratch);
      } else {
        out_of_memory = true;
      }
    });
    if (out_of_memory) throw std::bad_alloc();
  }

  StateType state_type;
};

}  // namespace

template <>
const OrtCustomOp* op<opset::SelectiveScanStep>() {
  return custom_op<SelectiveScanStep>();
}

}  // namespace dfssm::ort
