// The kernels of the TensorRT plugins: raw device pointers in, launches on a stream out. No TensorRT header
// here, and none of these functions allocates, synchronises or keeps anything: everything can be captured
// into a CUDA graph.
//
// Semantics are those of opset/ (docs/ops.md), integer sums exact; the scaffold is in its canonical layout,
// rows of K/32 words of 32 bits, column k at bit k % 32 of word k / 32. Activations are f32 or f16 (`type`),
// all arithmetic on them is fp32. A stride is the distance from one token to the next in elements: an input
// may be a range of columns of a wider tensor. Pointers of weights and states are 16-byte aligned, those of
// activations as their type asks. Each function returns the error of its launches. A workspace for some
// shapes does for smaller ones: plugins ask once, for the largest of a profile.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace dfssm::trt {

// opset's TINY, below which a row counts as zero, and HALF_MAX, where fp16 states saturate.
constexpr float kTiny = 1e-30f, kHalfMax = 65504.0f;

enum class Float : int32_t { f32, f16 };
enum class State : int32_t { f32, f16, i8 };

struct ScaffoldArgs {
  const void* x;            // [n, K], stride K
  const uint32_t* bits;     // [planes, M, K/32]
  const float* scale;       // [planes, M]
  const int8_t* down;       // [R, K]
  const float* down_scale;  // [R]
  const int8_t* up;         // [M, R]
  const float* up_scale;    // [M]
  void* y;                  // [n, M]
  int32_t n, K, M, R, planes;
  Float type;  // of x and y
};
size_t scaffold_workspace(int32_t n, int32_t K, int32_t M, int32_t R);
cudaError_t binary_scaffold_matmul(const ScaffoldArgs& args, void* workspace, cudaStream_t stream);

struct Int8Args {
  const void* x;         // [n, K], stride K
  const int8_t* w;       // [M, K]
  const float* w_scale;  // [M]
  void* y;               // [n, M]
  int32_t n, K, M;
  Float type, y_type;  // of x, of y: logits are f32
};
size_t int8_workspace(int32_t n, int32_t K);
cudaError_t int8_matmul(const Int8Args& args, void* workspace, cudaStream_t stream);

struct ConvArgs {
  const void* x;        // [B, T, C], x_stride from token to token
  const float* state;   // [B, C, W-1], oldest first
  const float* weight;  // [C, W]
  const float* bias;    // [C]
  void* y;              // [B, T, C], y_stride from token to token
  float* new_state;     // [B, C, W-1], may be `state`
  int32_t B, T, C, W;
  int64_t x_stride, y_stride;
  bool silu;
  Float type;
};
cudaError_t causal_conv1d_step(const ConvArgs& args, cudaStream_t stream);

struct ScanArgs {
  const void* x;                     // [B, T, H*P]
  const void* dt;                    // [B, T, H]
  const void *Bm, *Cm;               // [B, T, G*N]
  const float *A_log, *D, *dt_bias;  // [H]
  const void* state;                 // [B, H, N, P]
  const float* state_scale;          // [B, H, N], int8 states only
  void* y;                           // [B, T, H*P]
  void* new_state;                   // may be `state`
  float* new_state_scale;            // may be `state_scale`
  int32_t B, T, H, P, N, G;
  int64_t x_stride, dt_stride, B_stride, C_stride;
  float dt_min, dt_max;
  State state_type;
  Float type;
};
size_t scan_workspace(const ScanArgs& args);
cudaError_t selective_scan_step(const ScanArgs& args, void* workspace, cudaStream_t stream);

struct NormArgs {
  const void* y;        // [n, C]
  const void* z;        // [n, C], z_stride from token to token; nullptr: no gate (RMSNorm)
  const float* weight;  // [C]
  void* out;            // [n, C], may be `y`
  int32_t n, C, groups;
  int64_t z_stride;
  float eps;
  Float type;
};
cudaError_t rms_norm(const NormArgs& args, cudaStream_t stream);

// No op: the `count` largest of each row, in falling order, equal ones by token, NaN before all.
constexpr int32_t kMostLargest = 1024;
struct LargestArgs {
  const float* logits;  // [rows, vocab]
  int64_t* tokens;      // [rows, count]
  float* values;        // [rows, count]
  int32_t rows, vocab, count;
};
cudaError_t largest(const LargestArgs& args, cudaStream_t stream);

// Nor this: the sum of each row's weights by the softmax, 2^30 that of its largest; 0 where one is NaN or inf.
struct TotalWeightArgs {
  const float* logits;    // [rows, vocab]
  const float* divisors;  // [rows], the temperatures
  int64_t* totals;        // [rows]
  int32_t rows, vocab;
};
cudaError_t total_weight(const TotalWeightArgs& args, cudaStream_t stream);

// Ops fused, in the arithmetic of the ops one after another but for what lies between them, which stays fp32
// whatever the activations are: bit for bit the same where these are f32. The workspace is scaffold_workspace.

// The product of normed activations, y, with the columns [x_start, x_start + conv.C) convolved: two launches
// instead of four, and one for one token. Not used: norm.out, scaffold.x; conv's x, y, strides and type.
cudaError_t norm_scaffold_conv(const NormArgs& norm, const ScaffoldArgs& scaffold, const ConvArgs& conv,
                               int32_t x_start, void* workspace, cudaStream_t stream);

// The product of normed activations, added to `residual` [n, M], which is not `scaffold.y`: two launches
// instead of three and the addition, one for one token. norm.out and scaffold.x are not used.
cudaError_t gated_norm_scaffold_add(const NormArgs& norm, const ScaffoldArgs& scaffold, const void* residual,
                                    void* workspace, cudaStream_t stream);

}  // namespace dfssm::trt
