// The kernels under plain C names, for ctypes (tests/plugins_trt/emulated.py): arguments as in
// common/kernels.h, in its order, floats by the values of its enums. Each returns a cudaError_t;
// dfssm_trt_last_error says what went wrong.
#include "common/kernels.h"

namespace trt = dfssm::trt;

extern "C" {

size_t dfssm_trt_scaffold_workspace(int32_t n, int32_t K, int32_t M, int32_t R) {
  return trt::scaffold_workspace(n, K, M, R);
}
int dfssm_trt_binary_scaffold_matmul(const void* x, const uint32_t* bits, const float* scale,
                                     const int8_t* down, const float* down_scale, const int8_t* up,
                                     const float* up_scale, void* y, int32_t n, int32_t K, int32_t M,
                                     int32_t R, int32_t planes, int32_t type, void* workspace) {
  return trt::binary_scaffold_matmul(
      {x, bits, scale, down, down_scale, up, up_scale, y, n, K, M, R, planes, static_cast<trt::Float>(type)},
      workspace, nullptr);
}

int dfssm_trt_largest(const float* logits, int64_t* tokens, float* values, int32_t rows, int32_t vocab,
                      int32_t count) {
  return trt::largest({logits, tokens, values, rows, vocab, count}, nullptr);
}

int dfssm_trt_total_weight(const float* logits, const float* divisors, int64_t* totals, int32_t rows,
                           int32_t vocab) {
  return trt::total_weight({logits, divisors, totals, rows, vocab}, nullptr);
}

size_t dfssm_trt_int8_workspace(int32_t n, int32_t K) { return trt::int8_workspace(n, K); }
int dfssm_trt_int8_matmul(const void* x, const int8_t* w, const float* w_scale, void* y, int32_t n, int32_t K,
                          int32_t M, int32_t type, int32_t y_type, void* workspace) {
  return trt::int8_matmul(
      {x, w, w_scale, y, n, K, M, static_cast<trt::Float>(type), static_cast<trt::Float>(y_type)}, workspace,
      nullptr);
}

int dfssm_trt_causal_conv1d_step(const void* x, const float* state, const float* weight, const float* bias,
                                 void* y, float* new_state, int32_t B, int32_t T, int32_t C, int32_t W,
                                 int64_t x_stride, int32_t silu, int32_t type) {
  return trt::causal_conv1d_step({x, state, weight, bias, y, new_state, B, T, C, W, x_stride, C, silu != 0,
                                  static_cast<trt::Float>(type)},
                                 nullptr);
}

// `workspace` null: nothing runs, `workspace_bytes` is set.
int dfssm_trt_selective_scan_step(const void* x, const void* dt, const void* Bm, const void* Cm,
                                  const float* A_log, const float* D, const float* dt_bias, const void* state,
                                  const float* state_scale, void* y, void* new_state, float* new_state_scale,
                                  int32_t B, int32_t T, int32_t H, int32_t P, int32_t N, int32_t G,
                                  int64_t x_stride, int64_t dt_stride, int64_t B_stride, int64_t C_stride,
                                  float dt_min, float dt_max, int32_t state_type, int32_t type,
                                  void* workspace, size_t* workspace_bytes) {
  trt::ScanArgs args{};
  args.x = x, args.dt = dt, args.Bm = Bm, args.Cm = Cm;
  args.A_log = A_log, args.D = D, args.dt_bias = dt_bias;
  args.state = state, args.state_scale = state_scale;
  args.y = y, args.new_state = new_state, args.new_state_scale = new_state_scale;
  args.B = B, args.T = T, args.H = H, args.P = P, args.N = N, args.G = G;
  args.x_stride = x_stride, args.dt_stride = dt_stride, args.B_stride = B_stride, args.C_stride = C_stride;
  args.dt_min = dt_min, args.dt_max = dt_max;
  args.state_type = static_cast<trt::State>(state_type), args.type = static_cast<trt::Float>(type);
  if (workspace) return trt::selective_scan_step(args, workspace, nullptr);
  *workspace_bytes = trt::scan_workspace(args);
  return cudaSuccess;
}

int dfssm_trt_rms_norm(const void* y, const void* z, const float* weight, void* out, int32_t n, int32_t C,
                       int32_t groups, int64_t z_stride, float eps, int32_t type) {
  return trt::rms_norm({y, z, weight, out, n, C, groups, z_stride, eps, static_cast<trt::Float>(type)},
                       nullptr);
}

// The fused ops. `z` null: no gate.
int dfssm_trt_norm_scaffold_conv(const void* x, const float* norm_weight, const uint32_t* bits,
                                 const float* scale, const int8_t* down, const float* down_scale,
                                 const int8_t* up, const float* up_scale, const float* state,
                                 const float* conv_weight, const float* conv_bias, void* y, float* new_state,
                                 int32_t B, int32_t T, int32_t K, int32_t M, int32_t R, int32_t planes,
                                 int32_t C, int32_t W, float eps, int32_t silu, int32_t x_start, int32_t type,
                                 void* workspace) {
  const auto kind = static_cast<trt::Float>(type);
  trt::ConvArgs conv{};
  conv.state = state, conv.weight = conv_weight, conv.bias = conv_bias, conv.new_state = new_state;
  conv.B = B, conv.T = T, conv.C = C, conv.W = W, conv.silu = silu != 0;
  return trt::norm_scaffold_conv(
      {x, nullptr, norm_weight, nullptr, B * T, K, 1, 0, eps, kind},
      {nullptr, bits, scale, down, down_scale, up, up_scale, y, B * T, K, M, R, planes, kind}, conv, x_start,
      workspace, nullptr);
}

int dfssm_trt_gated_norm_scaffold_add(const void* y, const void* z, const float* norm_weight,
                                      const uint32_t* bits, const float* scale, const int8_t* down,
                                      const float* down_scale, const int8_t* up, const float* up_scale,
                                      const void* residual, void* out, int32_t n, int32_t K, int32_t M,
                                      int32_t R, int32_t planes, int32_t groups, int64_t z_stride, float eps,
                                      int32_t type, void* workspace) {
  const auto kind = static_cast<trt::Float>(type);
  return trt::gated_norm_scaffold_add(
      {y, z, norm_weight, nullptr, n, K, groups, z_stride, eps, kind},
      {nullptr, bits, scale, down, down_scale, up, up_scale, out, n, K, M, R, planes, kind}, residual,
      workspace, nullptr);
}

}  // extern "C"
