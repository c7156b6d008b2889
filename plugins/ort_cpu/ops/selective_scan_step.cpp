// SelectiveScanStep.
#include <atomic>
#include <new>

#include "call.h"

namespace dfssm {

template <>
void run<opset::SelectiveScanStep>(Call& call, const opset::SelectiveScanStep::Attributes& a,
                                   const opset::SelectiveScanStep::Sizes& s) {
  using S = opset::SelectiveScanStep;
  const opset::DType stored = call.type(S::k_state);
  const Columns x = call.columns(S::k_x, a.x_start), dt = call.columns(S::k_dt, a.dt_start);
  const Columns Bm = call.columns(S::k_B, a.B_start), Cm = call.columns(S::k_C, a.C_start);
  ScanArgs args{};
  args.x = x.data, args.x_stride = x.stride;
  args.dt = dt.data, args.dt_stride = dt.stride;
  args.Bm = Bm.data, args.B_stride = Bm.stride;
  args.Cm = Cm.data, args.C_stride = Cm.stride;
  args.A_log = call[S::k_A_log].as<float>();
  args.D = call[S::k_D].as<float>();
  args.dt_bias = call[S::k_dt_bias].as<float>();
  args.state = call[S::k_state].data;
  args.y = call.output<float>(0, {s.B, s.T, s.H * s.P});
  args.new_state = call.output<void>(1, {s.B, s.H, s.N, s.P});
  args.state_type = stored == opset::kFloat32 ? StateType::f32 : StateType::f16;
  double state_bytes = stored == opset::kFloat32 ? 4 : 2;
  if (stored == opset::kInt8) {
    args.state_scale = call[S::k_state_scale].as<float>();
    args.new_state_scale = call.output<float>(2, {s.B, s.H, s.N});
    args.state_type = StateType::i8;
    state_bytes = 1;
  }
  args.B = s.B, args.T = s.T, args.H = s.H, args.P = s.P, args.N = s.N, args.G = a.ngroups;
  args.dt_min = a.dt_min, args.dt_max = a.dt_max;

  const size_t scratch_bytes = call.kernels.selective_scan_bytes(args);
  const double head_ns =
      static_cast<double>(s.N * s.P) * (state_bytes / 25 + 0.065 * static_cast<double>(s.T));
  std::atomic<bool> out_of_memory = false;
  call.parallel(s.B * s.H, head_ns, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    if (scratch || scratch_bytes == 0) {
      call.kernels.selective_scan(args, begin, end, scratch);
    } else {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace dfssm
