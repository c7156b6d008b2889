// The plain reference: one loop an index, no tricks. The vector kernels are compared with it.
#include <cmath>
#include <cstdint>
#include <limits>

#include "half.h"
#include "tables.h"

namespace dfssm::scalar {
namespace {

// One row x [count] to q as documented at quantize_activations. Returns s: NaN, with q = 0, if any x is not finite.
float quantize_row(const float* x, int64_t count, int8_t* q) {
  float m = 0.0f;
  bool finite = true;
  for (int64_t k = 0; k < count; ++k) {
    m = std::fmax(m, std::fabs(x[k]));
    finite = finite && std::isfinite(x[k]);
  }
  const float inv = m < kTiny ? 0.0f : 127.0f / m;
  for (int64_t k = 0; k < count; ++k) q[k] = finite ? static_cast<int8_t>(std::nearbyint(x[k] * inv)) : 0;
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return m < kTiny ? 0.0f : m / 127.0f;
}

void quantize_activations(const float* x, int64_t n, int64_t K, int8_t* q, float* s, int32_t* sum) {
  for (int64_t t = 0; t < n; ++t) {
    s[t] = quantize_row(x + t * K, K, q + t * K);
    sum[t] = 0;
    for (int64_t k = 0; k < K; ++k) sum[t] += q[t * K + k];
  }
}

size_t scaffold_pack_bytes(int, int64_t, int64_t) { return 0; }

void scaffold_pack(int, const int8_t*, int64_t, int64_t, void*) {}

int bit_at(const ScaffoldArgs& a, int64_t plane, int64_t m, int64_t k) {
  if (a.layout == 0) return a.bits[(plane * a.M + m) * (a.K / 8) + k / 8] >> (k % 8) & 1;
  const uint8_t* bits = a.bits + plane * padded_rows(a.M, a.layout) * (a.K / 8);
  if (a.layout == 2) {
    return bits[(m / kBlockRows * (a.K / 8) + k / 8) * kBlockRows + m % kBlockRows] >> (k % 8) & 1;
  }
  const uint8_t* tile = bits + (m / kTileRows * (a.K / kTileColumns) + k / kTileColumns) * 64;
  return tile[m % kTileRows * 4 + k % 4] >> (k % kTileColumns / 4) & 1;
}

int8_t up_at(const ScaffoldArgs& a, int64_t m, int64_t r) {
  if (a.layout == 0) return a.up[m * a.R + r];
  const int64_t rows = block_rows(a.layout);
  return a.up[(m / rows * a.R + r) * rows + m % rows];
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  for (int64_t t = 0; t < a.n; ++t) {
    for (int64_t m = m0; m < m1; ++m) {
      float y = 0.0f;
      for (int64_t plane = 0; plane < a.planes; ++plane) {
        int32_t positive = 0;
        for (int64_t k = 0; k < a.K; ++k) positive += bit_at(a, plane, m, k) * a.q[t * a.K + k];
        y += (a.scale[plane * a.M + m] * a.s[t]) * static_cast<float>(2 * positive - a.sum[t]);
      }
      if (a.R > 0) {
        float correction = 0.0f;
        for (int64_t r = 0; r < a.R; ++r) correction += static_cast<float>(up_at(a, m, r)) * a.h[t * a.R + r];
        y += a.up_scale[m] * correction;
      }
      a.y[t * a.ldy + m] = y;
    }
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  for (int64_t t = 0; t < a.n; ++t) {
    for (int64_t m = m0; m < m1; ++m) {
      int32_t dot = 0;
      for (int64_t k = 0; k < a.K; ++k) dot += a.w[m * a.K + k] * a.q[t * a.K + k];
      a.y[t * a.ldy + m] = (a.w_scale[m] * a.s[t]) * static_cast<float>(dot);
    }
  }
}

float silu(float x) {
  const float e = std::exp(-std::fabs(x));
  return x * (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

void causal_conv1d(const ConvArgs& a, int64_t c0, int64_t c1) {
  const int64_t history = a.W - 1;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t c = c0; c < c1; ++c) {
      float window[4];
      for (int64_t w = 0; w < history; ++w) window[w] = a.state[(b * a.C + c) * history + w];
      for (int64_t t = 0; t < a.T; ++t) {
        window[history] = a.x[(b * a.T + t) * a.x_stride + c];
        float y = a.bias[c];
        for (int64_t w = 0; w < a.W; ++w) y += a.weight[c * a.W + w] * window[w];
        a.y[(b * a.T + t) * a.C + c] = a.silu ? silu(y) : y;
        for (int64_t w = 0; w < history; ++w) window[w] = window[w + 1];
      }
      for (int64_t w = 0; w < history; ++w) a.new_state[(b * a.C + c) * history + w] = window[w];
    }
  }
}

float softplus(float x) { return std::fmax(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

float discretize(const ScanArgs& a, int64_t token, int64_t head) {
  const float delta = softplus(a.dt[token * a.dt_stride + head] + a.dt_bias[head]);
  return delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;  // NaN stays NaN
}

size_t selective_scan_bytes(const ScanArgs& a) { return a.N * a.P * sizeof(float); }

// The state of pair i, of a.state_type, and its scales to fp32.
void load_state(const ScanArgs& a, const void* state, const float* scale, int64_t i, float* h) {
  const int64_t size = a.N * a.P;
  for (int64_t j = 0; j < size; ++j) {
    switch (a.state_type) {
      case StateType::f32:
        h[j] = static_cast<const float*>(state)[i * size + j];
        break;
      case StateType::f16:
        h[j] = half_to_float(static_cast<const uint16_t*>(state)[i * size + j]);
        break;
      case StateType::i8:
        h[j] = static_cast<float>(static_cast<const int8_t*>(state)[i * size + j]) * scale[i * a.N + j / a.P];
    }
  }
}

void store_state(const ScanArgs& a, void* state, float* scale, int64_t i, const float* h) {
  const int64_t size = a.N * a.P;
  if (a.state_type == StateType::i8) {
    for (int64_t n = 0; n < a.N; ++n) {
      int8_t* row = static_cast<int8_t*>(state) + i * size + n * a.P;
      scale[i * a.N + n] = quantize_row(h + n * a.P, a.P, row);
    }
    return;
  }
  for (int64_t j = 0; j < size; ++j) {
    if (a.state_type == StateType::f32) static_cast<float*>(state)[i * size + j] = h[j];
    if (a.state_type == StateType::f16) static_cast<uint16_t*>(state)[i * size + j] = float_to_half(h[j]);
  }
}

void selective_scan(const ScanArgs& a, int64_t i0, int64_t i1, void* scratch) {
  float* state = static_cast<float*>(scratch);  // [N, P]
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t b = i / a.H, head = i % a.H, group = head / (a.H / a.G);
    load_state(a, a.state, a.state_scale, i, state);
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t token = b * a.T + t;
      const float* x = a.x + token * a.x_stride + head * a.P;
      const float* B = a.Bm + token * a.B_stride + group * a.N;
      const float* C = a.Cm + token * a.C_stride + group * a.N;
      const float d = discretize(a, token, head);
      const float decay = std::exp(-std::exp(a.A_log[head]) * d);
      for (int64_t p = 0; p < a.P; ++p) {
        float y = 0.0f;
        for (int64_t n = 0; n < a.N; ++n) {
          state[n * a.P + p] = decay * state[n * a.P + p] + (d * B[n]) * x[p];
          y += C[n] * state[n * a.P + p];
        }
        a.y[(token * a.H + head) * a.P + p] = y + a.D[head] * x[p];
      }
    }
    store_state(a, a.new_state, a.new_state_scale, i, state);
  }
}

void deferred_conv1d(const DeferredConvArgs& a, int64_t c0, int64_t c1) {
  const int64_t history = a.W - 1;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t count = a.pending_count[b], held = history + count, kept = kept_tokens(count, a.T);
    for (int64_t c = c0; c < c1; ++c) {
      float* window = a.window + b * (history + kSlots) * a.C + c;
      const auto at = [&](int64_t i) {
        return i < held ? window[i * a.C] : a.x[(b * a.T + i - held) * a.x_stride + c];
      };
      for (int64_t t = 0; t < a.T; ++t) {
        float y = a.bias[c];
        for (int64_t w = 0; w < a.W; ++w) y += a.weight[c * a.W + w] * at(count + t + w);
        a.y[(b * a.T + t) * a.C + c] = a.silu ? silu(y) : y;
      }
      for (int64_t i = kept; i < held + a.T; ++i) window[(i - kept) * a.C] = at(i);
    }
  }
}

// Floats: the state [N, P], and of each token of the window d * x [P] and the decay. Behind them the state as stored.
size_t deferred_scan_bytes(const DeferredScanArgs& a) {
  return sizeof(float) * (2 * a.N * a.P + (kSlots + a.T) * (a.P + 1) + a.N);
}

void deferred_scan(const DeferredScanArgs& a, int64_t i0, int64_t i1, void* scratch) {
  float* h = static_cast<float*>(scratch);
  float* xs = h + a.N * a.P;
  float* decays = xs + (kSlots + a.T) * a.P;
  float* scales = decays + kSlots + a.T;
  void* stored = scales + a.N;
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t b = i / a.H, head = i % a.H, group = head / (a.H / a.G);
    const int64_t count = a.pending_count[b], length = count + a.T, kept = kept_tokens(count, a.T);
    const auto slot = [&](int64_t j) { return b * kSlots + j; };
    const auto token = [&](int64_t j) { return b * a.T + j - count; };
    const auto x_at = [&](int64_t j) { return a.x + token(j) * a.x_stride + head * a.P; };
    for (int64_t j = 0; j < length; ++j) {
      const float d = j < count ? 0.0f : discretize(a, token(j), head);
      for (int64_t p = 0; p < a.P; ++p) {
        xs[j * a.P + p] = j < count ? a.pending_x[(slot(j) * a.H + head) * a.P + p] : d * x_at(j)[p];
      }
      decays[j] = j < count ? a.pending_decay[slot(j) * a.H + head] : std::exp(-std::exp(a.A_log[head]) * d);
    }
    const auto B_at = [&](int64_t j) {
      return j < count ? a.pending_B + (slot(j) * a.G + group) * a.N
                       : a.Bm + token(j) * a.B_stride + group * a.N;
    };
    load_state(a, a.state, a.state_scale, i, h);
    for (int64_t t = 0; t < length; ++t) {
      if (t > 0 && t % kBlock == 0) {
        float weight[kBlock], total = 1.0f;
        for (int64_t j = kBlock - 1; j >= 0; --j) {
          weight[j] = total;
          total *= decays[t - kBlock + j];
        }
        for (int64_t n = 0; n < a.N; ++n) {
          for (int64_t p = 0; p < a.P; ++p) {
            float& value = h[n * a.P + p];
            value *= total;
            for (int64_t j = 0; j < kBlock; ++j) {
              value += B_at(t - kBlock + j)[n] * (weight[j] * xs[(t - kBlock + j) * a.P + p]);
            }
          }
        }
        store_state(a, stored, scales, 0, h);
        if (t == kept) store_state(a, a.new_state, a.new_state_scale, i, h);
        load_state(a, stored, scales, 0, h);
      }
      if (t < count) continue;
      const float* C = a.Cm + token(t) * a.C_stride + group * a.N;
      float* out = a.y + (token(t) * a.H + head) * a.P;
      const int64_t first = t / kBlock * kBlock;
      float share[kBlock], total = 1.0f;
      for (int64_t j = t; j >= first; --j) {
        float dot = 0.0f;
        for (int64_t n = 0; n < a.N; ++n) dot += C[n] * B_at(j)[n];
        share[j - first] = total * dot;
        total *= decays[j];
      }
      for (int64_t p = 0; p < a.P; ++p) {
        float y = 0.0f;
        for (int64_t n = 0; n < a.N; ++n) y += C[n] * h[n * a.P + p];
        y *= total;
        for (int64_t j = first; j <= t; ++j) y += share[j - first] * xs[j * a.P + p];
        out[p] = y + a.D[head] * x_at(t)[p];
      }
    }
    for (int64_t j = kept; j < length; ++j) {
      for (int64_t p = 0; p < a.P; ++p) {
        a.pending_x[(slot(j - kept) * a.H + head) * a.P + p] = xs[j * a.P + p];
      }
      a.pending_decay[slot(j - kept) * a.H + head] = decays[j];
    }
  }
}

void rms_norm(const NormArgs& a, int64_t t0, int64_t t1) {
  const int64_t size = a.C / a.groups;
  for (int64_t i = t0 * a.groups; i < t1 * a.groups; ++i) {
    const int64_t first = i * size, group = i % a.groups;
    const float* z = a.z == nullptr ? nullptr : a.z + i / a.groups * a.z_stride + group * size;
    const float* weight = a.weight + group * size;
    double squares = 0.0;
    for (int64_t c = 0; c < size; ++c) {
      const float y = a.y[first + c];
      const float v = z == nullptr ? y : y * silu(z[c]);
      squares += static_cast<double>(v) * v;
      a.out[first + c] = v;
    }
    constexpr float kMost = std::numeric_limits<float>::max(), kNaN = std::numeric_limits<float>::quiet_NaN();
    const float factor =
        squares <= kMost ? static_cast<float>(1.0 / std::sqrt(squares / size + a.eps)) : kNaN;
    for (int64_t c = 0; c < size; ++c) a.out[first + c] = a.out[first + c] * factor * weight[c];
  }
}

}  // namespace

const KernelTable kTable = DFSSM_KERNELS("scalar");

}  // namespace dfssm::scalar
