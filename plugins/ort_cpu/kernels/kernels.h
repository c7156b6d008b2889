// CPU kernels of the ai.dfssm operators: raw pointers, one dispatch table per instruction set.
//
// Contract of every kernel
//   * Arrays are dense and row-major in the given order, unless a leading dimension (`ld*`, in elements) is given.
//   * Inputs with a stride (`*_stride`, elements from one token to the next) are ranges of columns of wider
//     arrays; the stride is at least the width.
//   * No alignment is needed (64 bytes is fastest). Nothing outside an array is read or written, not even a vector
//     tail; software prefetches may name addresses past the end.
//   * Inputs and outputs do not overlap, except where "in place" is said.
//   * Nothing is allocated, nothing is thrown, no global state is touched: calls over disjoint ranges may run on
//     different threads. Scratch comes from the caller, in the number of bytes that `*_bytes` returns.
//   * Sizes are the caller's duty: a kernel checks none.
//   * Integer sums are exact and equal on every instruction set; `q` of quantize_activations is bit-equal too. Float
//     parts differ by rounding and by order of summation only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dfssm {

// Rows (of activations, of an int8 state) whose largest magnitude is below this count as zero; opset's TINY.
inline constexpr float kTiny = 1e-30f;

// The largest binary16, where states of that type saturate; opset's HALF_MAX. NaN stays NaN.
inline constexpr float kHalfMax = 65504.0f;

// Tokens by which a deferred state is updated, opset's BLOCK, and the pending tokens that it has room for.
inline constexpr int64_t kBlock = 8, kSlots = 2 * kBlock;
// How many tokens from the stored state on a call moves it over, where `count` were pending; opset's pending.kept.
inline int64_t kept_tokens(int64_t count, int64_t tokens) {
  const int64_t accepted = count + tokens - kBlock;
  return (accepted > count ? accepted : count) / kBlock * kBlock;
}

// The scaffold's layouts with tiles, whose rows are padded to whole ones: 1 has tiles of so many rows and columns, 2 has
// blocks of so many rows.
inline constexpr int64_t kTileRows = 16, kTileColumns = 32, kBlockRows = 64;
inline int64_t block_rows(int layout) { return layout == 1 ? kTileRows : kBlockRows; }
inline int64_t padded_rows(int64_t rows, int layout) {
  return (rows + block_rows(layout) - 1) / block_rows(layout) * block_rows(layout);
}

// BinaryScaffoldMatMul for tokens that quantize_activations has quantised:
//   y[t,m] = sum_p (scale[p,m] * s[t]) * (2 * sum_{bit=1} q[t] - sum[t])  +  up_scale[m] * sum_r up[m,r] * h[t,r]
// with h from int8_matmul(w = down, w_scale = down_scale). K % 32 == 0.
struct ScaffoldArgs {
  const int8_t* q;  // [n, K]
  // scaffold_pack(layout, q), or nullptr where scaffold_pack_bytes(layout, n, K) is 0
  const void* packed;
  const float* s;      // [n]
  const int32_t* sum;  // [n]
  // layout 0: [planes, M, K/8]; 1: [planes, Mp/16, K/32, 16, 4], Mp = 16*ceil(M/16); 2: [planes, Mp/64, K/8, 64],
  // Mp = 64*ceil(M/64)
  const uint8_t* bits;
  const float* scale;     // [planes, M]
  const int8_t* up;       // layout 0: [M, R]; 1: [Mp/16, R, 16]; 2: [Mp/64, R, 64]; unread if R == 0
  const float* up_scale;  // [M]; unread if R == 0
  const float* h;         // [n, R]; unread if R == 0
  float* y;               // [n, M] with leading dimension ldy
  int64_t ldy;
  int64_t n, K, M, R;
  int planes;
  int layout;  // 0, 1 or 2
};

// Int8MatMul for quantised tokens: y[t,m] = (w_scale[m] * s[t]) * sum_k w[m,k] * q[t,k]. Any K; w in [-128, 127].
struct Int8Args {
  const int8_t* q;       // [n, K]
  const float* s;        // [n]
  const int32_t* sum;    // [n], sums of q
  const int8_t* w;       // [M, K]
  const float* w_scale;  // [M]
  float* y;              // [n, M] with leading dimension ldy
  int64_t ldy;
  int64_t n, K, M;
};

// CausalConv1dStep: y[b,t,c] = act(bias[c] + sum_w weight[c,w] * window[w]), the window ending at token t.
// In place: new_state == state. 2 <= W <= 4.
struct ConvArgs {
  const float* x;       // [B, T, C] with x_stride
  const float* state;   // [B, C, W-1], the newest token last
  const float* weight;  // [C, W]
  const float* bias;    // [C]
  float* y;             // [B, T, C]
  float* new_state;     // [B, C, W-1]
  int64_t x_stride;
  int64_t B, T, C, W;
  bool silu;

  // Those of batch row b alone.
  ConvArgs row(int64_t b) const {
    ConvArgs of = *this;
    of.x += b * T * x_stride;
    of.state += b * C * (W - 1);
    of.y += b * T * C;
    of.new_state += b * C * (W - 1);
    of.B = 1;
    return of;
  }
};

enum class StateType { f32, f16, i8 };

// SelectiveScanStep. In place: new_state == state and new_state_scale == state_scale.
struct ScanArgs {
  const float* x;            // [B, T, H*P] with x_stride
  const float* dt;           // [B, T, H] with dt_stride
  const float* Bm;           // [B, T, G*N] with B_stride
  const float* Cm;           // [B, T, G*N] with C_stride
  const float* A_log;        // [H]
  const float* D;            // [H]
  const float* dt_bias;      // [H]
  const void* state;         // [B, H, N, P] of state_type (f16: IEEE binary16 bits)
  const float* state_scale;  // [B, H, N], i8 only
  float* y;                  // [B, T, H*P]
  void* new_state;
  float* new_state_scale;
  int64_t x_stride, dt_stride, B_stride, C_stride;
  int64_t B, T, H, P, N, G;
  float dt_min, dt_max;
  StateType state_type;
};

// DeferredConv1dStep, always in place. 2 <= W <= 4.
struct DeferredConvArgs {
  const float* x;                // [B, T, C] with x_stride
  float* window;                 // [B, W-1+kSlots, C]
  const float* weight;           // [C, W]
  const float* bias;             // [C]
  const uint8_t* pending_count;  // [B], each below kSlots
  float* y;                      // [B, T, C]
  int64_t x_stride;
  int64_t B, T, C, W;
  bool silu;

  // Those of batch row b alone.
  DeferredConvArgs row(int64_t b) const {
    DeferredConvArgs of = *this;
    of.x += b * T * x_stride;
    of.window += b * (W - 1 + kSlots) * C;
    of.pending_count += b;
    of.y += b * T * C;
    of.B = 1;
    return of;
  }
};

// DeferredScanStep, always in place, so `state` is `new_state` and `state_scale` is `new_state_scale`. pending_B and
// pending_count, which all heads read, are left as they were: the caller brings them up to date.
struct DeferredScanArgs : ScanArgs {
  float* pending_x;        // [B, kSlots, H*P]
  float* pending_B;        // [B, kSlots, G*N]
  float* pending_decay;    // [B, kSlots, H]
  uint8_t* pending_count;  // [B], each below kSlots
};

// GatedRMSNorm: v = y * silu(z); out = v * rsqrt(mean over each of `groups` equal parts of v^2 + eps) *
// weight; NaN where a part's squares overflow. RMSNorm: z == nullptr, v = y. In place: out == y.
struct NormArgs {
  const float* y;       // [n, C]
  const float* z;       // [n, C] with z_stride, or nullptr
  const float* weight;  // [C]
  float* out;           // [n, C]
  int64_t z_stride;
  int64_t n, C, groups;  // C % groups == 0
  float eps;
};

struct KernelTable {
  const char* name;  // "scalar", or as sources.cmake lists them

  // Per token: m = max|x|, inv = 127/m, s = m/127, q = rint(x*inv) half to even; sum = sum q.
  // A row with m < kTiny is a zero row: q = 0, s = 0 (127/m would overflow near the denormals).
  // A row with a NaN or an infinity: q = 0, s = NaN, so that every output of that token is NaN.
  // x [n, K], q [n, K], s [n], sum [n]. Threads: split over tokens.
  void (*quantize_activations)(const float* x, int64_t n, int64_t K, int8_t* q, float* s, int32_t* sum);

  // What scaffold_matmul of a layout needs of the n tokens beside q; 0 bytes: nothing. Once a matmul, not per range.
  size_t (*scaffold_pack_bytes)(int layout, int64_t n, int64_t K);
  void (*scaffold_pack)(int layout, const int8_t* q, int64_t n, int64_t K, void* packed);

  // Rows [m0, m1) of y for all n tokens. m0 is a multiple of a block of the layout, of 16 in layout 0; m1 is one, too, or
  // M (in layout 1 multiples of 32 are fastest).
  void (*scaffold_matmul)(const ScaffoldArgs& args, int64_t m0, int64_t m1);

  // Rows [m0, m1) of y for all n tokens, any m0 <= m1 (multiples of 4 are fastest).
  void (*int8_matmul)(const Int8Args& args, int64_t m0, int64_t m1);

  // Channels [c0, c1) of every batch row and token (multiples of 16 are fastest).
  void (*causal_conv1d)(const ConvArgs& args, int64_t c0, int64_t c1);

  // Pairs [i0, i1) of i = b*H + h, all tokens. scratch: selective_scan_bytes per concurrent call.
  size_t (*selective_scan_bytes)(const ScanArgs& args);
  void (*selective_scan)(const ScanArgs& args, int64_t i0, int64_t i1, void* scratch);

  // Channels and pairs of the deferred forms, likewise.
  void (*deferred_conv1d)(const DeferredConvArgs& args, int64_t c0, int64_t c1);
  size_t (*deferred_scan_bytes)(const DeferredScanArgs& args);
  void (*deferred_scan)(const DeferredScanArgs& args, int64_t i0, int64_t i1, void* scratch);

  // Tokens [t0, t1).
  void (*rms_norm)(const NormArgs& args, int64_t t0, int64_t t1);
};

// The table of a namespace that has the kernels by the names of their entries.
#define DFSSM_KERNELS(name) \
  {name,                    \
   quantize_activations,    \
   scaffold_pack_bytes,     \
   scaffold_pack,           \
   scaffold_matmul,         \
   int8_matmul,             \
   causal_conv1d,           \
   selective_scan_bytes,    \
   selective_scan,          \
   deferred_conv1d,         \
   deferred_scan_bytes,     \
   deferred_scan,           \
   rms_norm}

// The table chosen at the first call: DFSSM_ISA if it is set, otherwise the best this CPU can run.
// kernels_error() is nullptr, or one line saying that DFSSM_ISA names no usable table and which names are
// usable; kernels() is then the default table. Callers report the error; the library never exits.
const KernelTable& kernels();
const char* kernels_error();

// The tables this CPU can run, the plainest first, the default last; at least one.
struct KernelTables {
  const KernelTable* const* tables;
  size_t count;

  const KernelTable* const* begin() const { return tables; }
  const KernelTable* const* end() const { return tables + count; }
};
KernelTables usable_kernels();

// Their names, separated by spaces.
const char* usable_names();

// The table of that name if this build has it and this CPU can run it, otherwise nullptr.
inline const KernelTable* kernels_for(const char* name) {
  for (const KernelTable* table : usable_kernels()) {
    if (std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

}  // namespace dfssm
