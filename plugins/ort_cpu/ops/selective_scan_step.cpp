// SelectiveScanStep.
#include <atomic>

#include "op.h"
#include "ops.h"

namespace dfssm::ort {
namespace {

struct SelectiveScanStep : Kernel {
  using Schema = opset::SelectiveScanStep;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kF32, kF32,     kF32, kF32,
                                                              kF32, kF32, kDynamic, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32, kDynamic, kF32};
  static constexpr std::pair<size_t, size_t> kInplace[] = {{Schema::k_state, 1}, {Schema::k_state_scale, 2}};

  explicit SelectiveScanStep(const OrtKernelInfo* info)
      : Kernel(kSignature<Schema>, info),
        groups(positive("ngroups", Schema::kDefault_ngroups)),
        dt_min(attribute("dt_min", Schema::kDefault_dt_min)),
        dt_max(attribute("dt_max", Schema::kDefault_dt_max)) {
    if (!(dt_min <= dt_max)) {
      fail("%s: attribute 'dt_min' is %g, expected at most 'dt_max' = %g", Schema::kName, dt_min, dt_max);
    }
    switch (const ONNXTensorElementDataType type = input_type(Schema::k_state)) {
      case kF32:
        state_type = StateType::f32;
        break;
      case kF16:
        state_type = StateType::f16;
        break;
      case kI8:
        state_type = StateType::i8;
        break;
      default:
        fail("%s: input 'state' has dtype %s, expected float32, float16 or int8", Schema::kName,
             type_name(type));
    }
    // The scale belongs to int8 and to nothing else.
    const bool quantized = state_type == StateType::i8;
    if (has_input(Schema::k_state_scale) != quantized) {
      fail("%s: input 'state_scale' is %s, expected %s", Schema::kName, quantized ? "missing" : "present",
           quantized ? "[B, H, N] for a state of int8" : "none: only a state of int8 has one");
    }
    if (quantized && !has_output(2)) fail("%s: output 'new_state_scale' is missing", Schema::kName);
  }

  void compute(Call& call) const {
    const Tensor& tokens = call.ranked(Schema::k_x, 3);
    const Tensor& state = call.ranked(Schema::k_state, 4);
    const int64_t B = tokens[0], T = tokens[1], H = state[1], N = state[2], P = state[3];
    if (H % groups) {
      fail("%s: input 'state' has H=%lld heads, expected a multiple of ngroups=%lld", Schema::kName,
           static_cast<long long>(H), static_cast<long long>(groups));
    }
    call.expect(Schema::k_state, {B, H, N, P});
    const Columns x = call.columns(Schema::k_x, B, T, H * P);
    const Columns dt = call.columns(Schema::k_dt, B, T, H);
    const Columns Bm = call.columns(Schema::k_B, B, T, groups * N);
    const Columns Cm = call.columns(Schema::k_C, B, T, groups * N);
    ScanArgs args{};
    args.x = x.data, args.x_stride = x.stride;
    args.dt = dt.data, args.dt_stride = dt.stride;
    args.Bm = Bm.data, args.B_stride = Bm.stride;
    args.Cm = Cm.data, args.C_stride = Cm.stride;
    args.A_log = call.expect(Schema::k_A_log, {H}).as<float>();
    args.D = call.expect(Schema::k_D, {H}).as<float>();
    args.dt_bias = call.expect(Schema::k_dt_bias, {H}).as<float>();
    args.state = state.data;
    args.y = call.output<float>(0, {B, T, H * P});
    args.new_state = call.output<void>(1, {B, H, N, P});
    double state_bytes = state_type == StateType::f32 ? 4 : 2;
    if (state_type == StateType::i8) {
      args.state_scale = call.expect(Schema::k_state_scale, {B, H, N}).as<float>();
      args.new_state_scale = call.output<float>(2, {B, H, N});
      state_bytes = 1;
    }
    args.B = B, args.T = T, args.H = H, args.P = P, args.N = N, args.G = groups;
    args.dt_min = dt_min, args.dt_max = dt_max;
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

  static void infer(Inference& inference) {
    if (inference.attribute("x_start", Schema::kDefault_x_start) < 0) {
      inference.like(0, Schema::k_x, 3);
    } else {
      const Inference::Shape x = inference.shape(Schema::k_x, 3);
      const Inference::Shape state = inference.shape(Schema::k_state, 4);
      const bool known = !x.empty() && !state.empty() && state[1].value > 0 && state[3].value > 0;
      if (known) inference.set(0, {x[0], x[1], {state[1].value * state[3].value, ""}});
    }
    inference.like(1, Schema::k_state, 4);
    // Not the optional output: the API does not tell whether the node has it.
  }

  int64_t groups;
  float dt_min, dt_max;
  StateType state_type;
};

}  // namespace

const OrtCustomOp* selective_scan_step() { return custom_op<SelectiveScanStep>(); }

}  // namespace dfssm::ort
