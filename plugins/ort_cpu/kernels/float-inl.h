// The float kernels of every vector instruction set. Included once by each float__<isa>.cpp, after that set's
// simd header and with DFSSM_ISA_NAMESPACE naming its namespace: one text, compiled once a set. No
// standard-library function here may be one the linker merges (std::max, ...): a copy compiled for a wide set
// must not end up in code for a narrow one.
#include <cmath>
#include <cstring>

#include "prefetch.h"
#include "tables.h"

namespace dfssm::DFSSM_ISA_NAMESPACE {
namespace {

// body(i, Full{}) for whole vectors of [0, n), then body(i, mask) for what is left.
template <class Body>
inline void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, first_lanes(n - i));
}

// ---- exp, silu ----

// exp(x) for x <= 0. Relative error < 2 ulp for x >= -87, where it is 1.6e-38; 0 below. NaN stays NaN.
// x = k ln2 + r, |r| <= ln2/2; exp(r) = 1 + r + r^2 q(r), q fitted for the least relative error (4e-9).
inline F32 exp_nonpositive(F32 given) {
  const F32 least = broadcast(-87.0f), x = max(least, given);
  const F32 k = round_even(x * broadcast(0x1.715476p+0f));
  F32 r = fma(k, broadcast(-0x1.62e4p-1f), x);  // 15 bits of ln2: k times it is exact
  r = fma(k, broadcast(-0x1.7f7d1cp-20f), r);
  F32 q = broadcast(0x1.6a2434p-10f);
  q = fma(q, r, broadcast(0x1.1239e2p-7f));
  q = fma(q, r, broadcast(0x1.5558f2p-5f));
  q = fma(q, r, broadcast(0x1.555492p-3f));
  q = fma(q, r, broadcast(0x1.fffffcp-2f));
  return where_below(given, least, zero(), scale_by_power(fma(q, r * r, r + broadcast(1.0f)), k));
}

inline F32 silu(F32 x) {
  const F32 e = exp_nonpositive(negate_abs(x));
  return x * where_negative(x, e, broadcast(1.0f)) / (broadcast(1.0f) + e);
}

// ---- quantisation ----

constexpr int32_t kInfinityBits = 0x7f800000;

// The largest magnitudes of a row [count], lane by lane, as the bits of non-negative floats: integers order
// those as floats do, with infinity and NaN on top, so that a NaN cannot get lost as it does in MAXPS.
inline I32 largest_magnitudes(const float* x, int64_t count) {
  const auto magnitude = [x](int64_t i, auto lanes) { return bits_of(abs(load(x + i, lanes))); };
  I32 m = zero_int();
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    const I32 ab = max(magnitude(i, Full{}), magnitude(i + kLanes, Full{}));
    const I32 cd = max(magnitude(i + 2 * kLanes, Full{}), magnitude(i + 3 * kLanes, Full{}));
    m = max(m, max(ab, cd));
  }
  for_vectors(count - i, [&](int64_t j, auto lanes) { m = max(m, magnitude(i + j, lanes)); });
  return m;
}

// Rounds `count` floats times inv to int8; returns their sums by lane.
inline I32 quantize(const float* x, int64_t count, F32 inv, int8_t* q) {
  I32 total = zero_int();
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    I32 rounded[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      rounded[v] = round_to_int(load(x + i + v * kLanes, Full{}) * inv);
      total = add(total, rounded[v]);
    }
    store_4(q + i, rounded);
  }
  for_vectors(count - i, [&](int64_t j, auto lanes) {
    const I32 rounded = round_to_int(load(x + i + j, lanes) * inv);
    total = add(total, rounded);
    store(q + i + j, rounded, lanes);
  });
  return total;
}

// One row to int8 as documented at quantize_activations. Returns s, and in `total` the sum of q.
inline float quantize_row(const float* x, int64_t count, int8_t* q, int32_t& total) {
  const int32_t bits = largest(largest_magnitudes(x, count));
  total = 0;
  if (bits >= kInfinityBits) {
    std::memset(q, 0, count);
    return __builtin_nanf("");
  }
  float m;
  std::memcpy(&m, &bits, sizeof m);
  const bool zero_row = m < kTiny;
  total = sum(quantize(x, count, broadcast(zero_row ? 0.0f : 127.0f / m), q));
  return zero_row ? 0.0f : m / 127.0f;
}

void quantize_activations(const float* x, int64_t n, int64_t K, int8_t* q, float* s, int32_t* sums) {
  for (int64_t t = 0; t < n; ++t) s[t] = quantize_row(x + t * K, K, q + t * K, sums[t]);
}

// Rows on their way to int8, so many at a time that the latencies of their scales overlap.
constexpr int64_t kRowBlock = 4 * kLanes;

// What is known of a block of rows when they have been computed.
struct RowMagnitudes {
  float lanes[kRowBlock * kLanes];  // [rows, kLanes], the largest magnitude of each lane; no NaN if `finite`
  bool finite;                      // false if any element may be infinite or NaN
};

// The scales of kLanes finite rows side by side: one transposed maximum and two divisions for all of them.
inline void row_scales(const float* magnitudes, float* inv, float* s) {
  I32 rows[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) rows[r] = bits_of(load(magnitudes + r * kLanes, Full{}));
  const F32 m = float_of(largest_of_each(rows)), tiny = broadcast(kTiny), limit = broadcast(127.0f);
  store(s, where_below(m, tiny, zero(), m / limit), Full{});
  store(inv, where_below(m, tiny, zero(), limit / m), Full{});
}

// `rows` <= kRowBlock rows [rows, count] to int8, each with a scale of its own.
inline void quantize_rows(const float* x, const RowMagnitudes& magnitudes, int64_t rows, int64_t count,
                          int8_t* q, float* s) {
  float inv[kRowBlock];
  const int64_t scaled = magnitudes.finite ? rows / kLanes * kLanes : 0;
  for (int64_t r = 0; r < scaled; r += kLanes) row_scales(magnitudes.lanes + r * kLanes, inv + r, s + r);
  constexpr int64_t kUnrolled = 4 * kLanes;  // headdim 64 with AVX-512: a row without a loop, 5 % of the scan
  if (count == kUnrolled) {
    for (int64_t r = 0; r < scaled; ++r) {
      quantize(x + r * kUnrolled, kUnrolled, broadcast(inv[r]), q + r * kUnrolled);
    }
  } else {
    for (int64_t r = 0; r < scaled; ++r) quantize(x + r * count, count, broadcast(inv[r]), q + r * count);
  }
  int32_t unused;
  for (int64_t r = scaled; r < rows; ++r) s[r] = quantize_row(x + r * count, count, q + r * count, unused);
}

// ---- causal convolution ----

// The S columns of the first `count` <= kLanes rows of an array [count, S]; missing rows are zero.
template <int S>
inline void load_some_columns(const float* p, int64_t count, F32 (&columns)[S]) {
  if (count >= kLanes) return load_columns<S>(p, columns);
  float padded[kLanes * S] = {};
  std::memcpy(padded, p, count * S * sizeof(float));
  load_columns<S>(padded, columns);
}

template <int S>
inline void store_some_columns(float* p, int64_t count, const F32 (&columns)[S]) {
  if (count >= kLanes) return store_columns<S>(p, columns);
  float padded[kLanes * S];
  store_columns<S>(padded, columns);
  std::memcpy(p, padded, count * S * sizeof(float));
}

// Channels are taken in panels: their weights and state are transposed once into this stack space, so that
// tokens go by in rows of 16 vectors, a stretch of memory that the prefetchers can follow.
constexpr int kPanel = 16 * kLanes;

// The W weights of `count` channels as rows.
template <int W>
inline void load_panel(const float* weight, int64_t count, float (&rows)[W][kPanel]) {
  for (int64_t i = 0; i < count; i += kLanes) {
    F32 weights[W];
    load_some_columns<W>(weight + i * W, count - i, weights);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(rows[w] + i, weights[w], Full{});
  }
}

// One token of `count` channels, of which `window` is the rows with the newest last.
template <int W>
inline void conv_token(const float* const (&window)[W], const float (&weight)[W][kPanel], const float* bias,
                       bool activated, float* out, int64_t count) {
  for_vectors(count, [&](int64_t i, auto lanes) {
    F32 y = load(bias + i, lanes);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) y = fma(load(weight[w] + i, lanes), load(window[w] + i, lanes), y);
    store(out + i, activated ? silu(y) : y, lanes);
  });
}

// `count` <= kPanel channels from c on, one batch row, all tokens.
template <int W>
void conv_panel(const ConvArgs& a, int64_t b, int64_t c, int64_t count) {
  constexpr int kHistory = W - 1;
  float weight[W][kPanel], history[kHistory][kPanel];
  const float* state = a.state + (b * a.C + c) * kHistory;
  load_panel<W>(a.weight + c * W, count, weight);
  for (int64_t i = 0; i < count; i += kLanes) {
    F32 states[kHistory];
    load_some_columns<kHistory>(state + i * kHistory, count - i, states);
#pragma GCC unroll 4
    for (int w = 0; w < kHistory; ++w) store(history[w] + i, states[w], Full{});
  }
  const float* window[W];  // rows of channels, the newest last: first of the state, then of x itself
  for (int w = 0; w < kHistory; ++w) window[w] = history[w];
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t token = b * a.T + t;
    window[kHistory] = a.x + token * a.x_stride + c;
    conv_token<W>(window, weight, a.bias + c, a.silu, a.y + token * a.C + c, count);
    for (int w = 0; w < kHistory; ++w) window[w] = window[w + 1];
  }
  float* new_state = a.new_state + (b * a.C + c) * kHistory;
  for_vectors(count, [&](int64_t i, auto lanes) {
    F32 states[kHistory];
#pragma GCC unroll 4
    for (int w = 0; w < kHistory; ++w) states[w] = load(window[w] + i, lanes);
    store_some_columns<kHistory>(new_state + i * kHistory, count - i, states);
  });
}

// One token, which takes its weights and states as they come: through panels they would go twice. They lie in memory, in
// two streams too short for the CPU's own prefetchers.
template <int W>
void conv_step(const ConvArgs& a, int64_t b, int64_t c0, int64_t c1) {
  constexpr int kHistory = W - 1, kAhead = 512;  // floats
  const float* state = a.state + b * a.C * kHistory;
  float* new_state = a.new_state + b * a.C * kHistory;
  const float* x = a.x + b * a.x_stride;
  float* y = a.y + b * a.C;
  for (int64_t c = c0; c < c1; c += kLanes) {
    const int64_t count = c1 - c;
#pragma GCC unroll 4
    for (int i = 0; i < W * kLanes; i += 16) __builtin_prefetch(a.weight + c * W + kAhead + i);
#pragma GCC unroll 4
    for (int i = 0; i < kHistory * kLanes; i += 16) __builtin_prefetch(state + c * kHistory + kAhead + i);
    F32 weights[W], states[kHistory];
    load_some_columns<W>(a.weight + c * W, count, weights);
    load_some_columns<kHistory>(state + c * kHistory, count, states);
    const auto rest = [&](auto lanes) __attribute__((always_inline)) {
      const F32 newest = load(x + c, lanes);
      F32 sum = load(a.bias + c, lanes);
#pragma GCC unroll 4
      for (int w = 0; w < kHistory; ++w) sum = fma(weights[w], states[w], sum);
      sum = fma(weights[kHistory], newest, sum);
      store(y + c, a.silu ? silu(sum) : sum, lanes);
#pragma GCC unroll 4
      for (int w = 0; w + 1 < kHistory; ++w) states[w] = states[w + 1];
      states[kHistory - 1] = newest;
    };
    count < kLanes ? rest(first_lanes(count)) : rest(Full{});
    store_some_columns<kHistory>(new_state + c * kHistory, count, states);
  }
}

template <int W>
void conv_width(const ConvArgs& a, int64_t c0, int64_t c1) {
  for (int64_t b = 0; b < a.B; ++b) {
    if (a.T == 1) {
      conv_step<W>(a, b, c0, c1);
    } else {
      for (int64_t c = c0; c < c1; c += kPanel) conv_panel<W>(a, b, c, c1 - c < kPanel ? c1 - c : kPanel);
    }
  }
}

void causal_conv1d(const ConvArgs& a, int64_t c0, int64_t c1) {
  switch (a.W) {
    case 2:
      return conv_width<2>(a, c0, c1);
    case 3:
      return conv_width<3>(a, c0, c1);
    default:
      return conv_width<4>(a, c0, c1);
  }
}

// ---- RMS norms ----

void rms_norm(const NormArgs& a, int64_t t0, int64_t t1) {
  const int64_t size = a.C / a.groups;
  for (int64_t i = t0 * a.groups; i < t1 * a.groups; ++i) {
    const int64_t group = i % a.groups;
    const float* y = a.y + i * size;
    const float* z = a.z == nullptr ? nullptr : a.z + i / a.groups * a.z_stride + group * size;
    const float* weight = a.weight + group * size;
    float* out = a.out + i * size;
    F32 squares = zero();
    for_vectors(size, [&](int64_t c, auto lanes) {
      __builtin_prefetch(weight + c);  // from memory, for the second pass
      F32 v = load(y + c, lanes);
      if (z != nullptr) {
        v = v * silu(load(z + c, lanes));
        store(out + c, v, lanes);
      }
      squares = fma(v, v, squares);
    });
    const float mean = sum(squares) / static_cast<float>(size);
    const F32 factor = broadcast(mean < HUGE_VALF ? 1.0f / sqrtf(mean + a.eps) : __builtin_nanf(""));
    const float* v = z == nullptr ? y : out;
    for_vectors(size, [&](int64_t c, auto lanes) {
      store(out + c, load(v + c, lanes) * factor * load(weight + c, lanes), lanes);
    });
  }
}

// ---- selective scan ----

// One pass over the state takes one token, or kTokens tokens at once: then each element is loaded and stored
// once for all of them and stays in a register in between. So many vectors of headdim does a pass hold, with
// a sum for each token:
constexpr int kChunk = 4, kChunkOfTokens = 2;

// NV vectors of a row, the last one perhaps partial.
template <int NV, class T, class Lanes>
inline void load_chunk(const T* p, Lanes last, F32 (&v)[NV]) {
#pragma GCC unroll 16
  for (int i = 0; i + 1 < NV; ++i) v[i] = load(p + i * kLanes, Full{});
  v[NV - 1] = load(p + (NV - 1) * kLanes, last);
}

template <int NV, class T, class Lanes>
inline void store_chunk(T* p, Lanes last, const F32 (&v)[NV]) {
#pragma GCC unroll 16
  for (int i = 0; i + 1 < NV; ++i) store(p + i * kLanes, v[i], Full{});
  store(p + (NV - 1) * kLanes, v[NV - 1], last);
}

// A few tokens of one head, over the N state rows from some row on; y is added to. `stride` is from token to token.
struct Step {
  const float* x;  // [tokens, P]
  int64_t x_stride;
  float* y;  // [tokens, P]
  int64_t y_stride;
  const float* C;  // [tokens, N]
  int64_t C_stride;
  const float* dB;  // [tokens, N], d * B
  int64_t dB_stride;
  float decay[kTokens];
  const float* row_factor;    // [N], the first token's decay times the row's scale; int8 states only
  RowMagnitudes* magnitudes;  // of the N rows, written on demand
  int64_t N, P;
};

// In place of Ahead where the state is in cache.
struct NoAhead {
  void next() {}
};

// Columns [p, p + NV vectors) of every row, NT tokens: h = decay * h + dB (x) x, y += C . h, from `in` to `out`.
template <int NT, int NV, bool kMagnitudes, class In, class Out, class Lanes, class Prefetch>
inline void step_chunk(const Step& step, const In* in, Out* out, int64_t p, Lanes last, Prefetch& ahead) {
  const Step s = step;  // copies that no store below can alias: their members stay in registers
  Prefetch lines = ahead;
  in += p;
  out += p;
  F32 x[NT][NV], y[NT][NV];
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) {
    load_chunk(s.x + t * s.x_stride + p, last, x[t]);
    load_chunk(s.y + t * s.y_stride + p, last, y[t]);
  }
  for (int64_t n = 0; n < s.N; ++n, in += s.P, out += s.P) {
#pragma GCC unroll 4
    for (size_t byte = 0; byte < NV * kLanes * sizeof(In); byte += 64) lines.next();
    F32 h[NV];
    load_chunk(in, last, h);
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t) {
      const F32 factor = broadcast(sizeof(In) == 1 && t == 0 ? s.row_factor[n] : s.decay[t]);
      const F32 dB = broadcast(s.dB[t * s.dB_stride + n]), C = broadcast(s.C[t * s.C_stride + n]);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        h[i] = fma(h[i], factor, x[t][i] * dB);
        y[t][i] = fma(C, h[i], y[t][i]);
      }
    }
    store_chunk(out, last, h);
    if constexpr (kMagnitudes) {
      F32 m = abs(h[0]);
#pragma GCC unroll 4
      for (int i = 1; i < NV; ++i) m = larger_magnitude(m, h[i]);
      float* row = s.magnitudes->lanes + n * kLanes;
      store(row, p > 0 ? larger_magnitude(m, load(row, Full{})) : m, Full{});
    }
  }
  if constexpr (kMagnitudes) {
    // C * h was added to y for every element h of a row, so y is not finite where some h was not.
    I32 m = zero_int();
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) m = max(m, bits_of(abs(y[NT - 1][i])));
    if (largest(m) >= kInfinityBits) s.magnitudes->finite = false;
  }
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) store_chunk(s.y + t * s.y_stride + p, last, y[t]);
  ahead = lines;
}

template <int NT, bool kMagnitudes, class In, class Out, class Prefetch>
void step_tokens(const Step& s, const In* in, Out* out, Prefetch& ahead) {
  constexpr int NV = NT == 1 ? kChunk : kChunkOfTokens;
  int64_t p = 0;
  for (; p + NV * kLanes <= s.P; p += NV * kLanes)
    step_chunk<NT, NV, kMagnitudes>(s, in, out, p, Full{}, ahead);
  for (; p + kLanes <= s.P; p += kLanes) step_chunk<NT, 1, kMagnitudes>(s, in, out, p, Full{}, ahead);
  if (p < s.P) step_chunk<NT, 1, kMagnitudes>(s, in, out, p, first_lanes(s.P - p), ahead);
}

// `tokens` is 1 or kTokens.
template <bool kMagnitudes = false, class In, class Out, class Prefetch>
void step(const Step& s, int64_t tokens, const In* in, Out* out, Prefetch&& ahead) {
  return tokens == 1 ? step_tokens<1, kMagnitudes>(s, in, out, ahead)
                     : step_tokens<kTokens, kMagnitudes>(s, in, out, ahead);
}

// The last tokens of an int8 state: blocks of rows pass through `tile` to int8. In is int8_t or, with `in`
// the tile itself, float.
template <class In, class Prefetch>
void step_and_quantize(const Step& all, int64_t tokens, const In* in, float* tile, int8_t* out, float* scale,
                       Prefetch&& ahead) {
  RowMagnitudes magnitudes;
  for (int64_t n = 0; n < all.N; n += kRowBlock) {
    Step s = all;
    s.C += n;
    s.dB += n;
    s.row_factor += n;
    s.N = all.N - n < kRowBlock ? all.N - n : kRowBlock;
    float* rows = tile;
    if constexpr (sizeof(In) == sizeof(float)) rows += n * s.P;
    magnitudes.finite = true;
    s.magnitudes = &magnitudes;
    step<true>(s, tokens, in + n * s.P, rows, ahead);
    quantize_rows(rows, magnitudes, s.N, s.P, out + n * s.P, scale + n);
  }
}

float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

float discretize(const ScanArgs& a, int64_t token, int64_t head) {
  const float delta = softplus(a.dt[token * a.dt_stride + head] + a.dt_bias[head]);
  return delta < a.dt_min ? a.dt_min : delta > a.dt_max ? a.dt_max : delta;  // NaN stays NaN
}

// Floats of scratch: dB [kTokens, N], row factors [N], and the tile: [N, P] between tokens, or a block of
// rows on the way to int8.
size_t selective_scan_bytes(const ScanArgs& a) {
  const int64_t tile_rows = a.T > 1 ? a.N : a.state_type == StateType::i8 ? kRowBlock : 0;
  return sizeof(float) * ((kTokens + 1) * a.N + tile_rows * a.P);
}

// State is float, uint16_t (binary16) or int8_t. The first pass reads the stored state, the last one writes
// it, passes between them work in the fp32 tile.
template <class State>
void scan_heads(const ScanArgs& a, int64_t i0, int64_t i1, float* scratch) {
  constexpr bool kScaled = sizeof(State) == 1;
  float* dB = scratch;
  float* row_factor = dB + kTokens * a.N;
  float* tile = row_factor + a.N;
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t b = i / a.H, head = i % a.H, group = head / (a.H / a.G);
    const State* state = static_cast<const State*>(a.state) + i * a.N * a.P;
    Ahead ahead(state);
    State* new_state = static_cast<State*>(a.new_state) + i * a.N * a.P;
    const float rate = -expf(a.A_log[head]);
    for (int64_t t = 0, tokens; t < a.T; t += tokens) {
      tokens = a.T - t < kTokens ? 1 : kTokens;
      const int64_t token = b * a.T + t;
      Step s;
      s.x = a.x + token * a.x_stride + head * a.P;
      s.x_stride = a.x_stride;
      s.y = a.y + (token * a.H + head) * a.P;
      s.y_stride = a.H * a.P;
      s.C = a.Cm + token * a.C_stride + group * a.N;
      s.C_stride = a.C_stride;
      s.dB = dB;
      s.dB_stride = a.N;
      s.row_factor = row_factor;
      s.N = a.N;
      s.P = a.P;
      for (int64_t j = 0; j < tokens; ++j) {
        const float d = discretize(a, token + j, head);
        const float* B = a.Bm + (token + j) * a.B_stride + group * a.N;
        s.decay[j] = expf(rate * d);
        for_vectors(a.N, [&](int64_t n, auto lanes) {
          store(dB + j * a.N + n, load(B + n, lanes) * broadcast(d), lanes);
        });
        for_vectors(a.P, [&](int64_t p, auto lanes) {
          store(s.y + j * s.y_stride + p, load(s.x + j * s.x_stride + p, lanes) * broadcast(a.D[head]),
                lanes);
        });
      }
      const bool first = t == 0, last = t + tokens == a.T;
      if constexpr (kScaled) {
        float* new_scale = a.new_state_scale + i * a.N;
        if (first) {
          for_vectors(a.N, [&](int64_t n, auto lanes) {
            store(row_factor + n, load(a.state_scale + i * a.N + n, lanes) * broadcast(s.decay[0]), lanes);
          });
        }
        if (first && last) step_and_quantize(s, tokens, state, tile, new_state, new_scale, ahead);
        if (!first && last) step_and_quantize(s, tokens, tile, tile, new_state, new_scale, NoAhead{});
      } else {
        if (first && last) step(s, tokens, state, new_state, ahead);
        if (!first && last) step(s, tokens, tile, new_state, NoAhead{});
      }
      if (first && !last) step(s, tokens, state, tile, ahead);
      if (!first && !last) step(s, tokens, tile, tile, NoAhead{});
    }
  }
}

void selective_scan(const ScanArgs& a, int64_t i0, int64_t i1, void* scratch) {
  float* floats = static_cast<float*>(scratch);
  switch (a.state_type) {
    case StateType::f32:
      return scan_heads<float>(a, i0, i1, floats);
    case StateType::f16:
      return scan_heads<uint16_t>(a, i0, i1, floats);
    case StateType::i8:
      return scan_heads<int8_t>(a, i0, i1, floats);
  }
}

#include "deferred-inl.h"

}  // namespace

const KernelTable kTable = DFSSM_KERNELS(DFSSM_ISA_NAME);

}  // namespace dfssm::DFSSM_ISA_NAMESPACE
