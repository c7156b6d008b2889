// What the ops of a selective scan have in common.
#pragma once

#include "call.h"

namespace dfssm {

// The inputs of op `S`, its first output and its sizes in `args`.
template <class S>
void fill_scan(Call& call, const typename S::Attributes& a, const typename S::Sizes& s, ScanArgs& args) {
  const Columns x = call.columns(S::k_x, a.x_start), dt = call.columns(S::k_dt, a.dt_start);
  const Columns Bm = call.columns(S::k_B, a.B_start), Cm = call.columns(S::k_C, a.C_start);
  args.x = x.data, args.x_stride = x.stride;
  args.dt = dt.data, args.dt_stride = dt.stride;
  args.Bm = Bm.data, args.B_stride = Bm.stride;
  args.Cm = Cm.data, args.C_stride = Cm.stride;
  args.A_log = call[S::k_A_log].template as<float>();
  args.D = call[S::k_D].template as<float>();
  args.dt_bias = call[S::k_dt_bias].template as<float>();
  args.state = call[S::k_state].data;
  args.y = call.output<float>(0, {s.B, s.T, s.H * s.P});
  args.B = s.B, args.T = s.T, args.H = s.H, args.P = s.P, args.N = s.N, args.G = a.ngroups;
  args.dt_min = a.dt_min, args.dt_max = a.dt_max;
  const opset::DType stored = call.type(S::k_state);
  args.state_type = stored == opset::kFloat32   ? StateType::f32
                    : stored == opset::kFloat16 ? StateType::f16
                                                : StateType::i8;
  if (stored == opset::kInt8) args.state_scale = call[S::k_state_scale].template as<float>();
}

// Bytes of a number of the state.
inline double state_bytes(const ScanArgs& args) {
  return args.state_type == StateType::f32 ? 4 : args.state_type == StateType::f16 ? 2 : 1;
}

}  // namespace dfssm
