// The kernels of a deferred state: the part of float-inl.h that has them, in its namespace.

// ---- causal convolution ----

template <int W>
void deferred_conv_width(const DeferredConvArgs& a, int64_t c0, int64_t c1) {
  constexpr int kHistory = W - 1;
  for (int64_t c = c0; c < c1; c += kPanel) {
    const int64_t size = c1 - c < kPanel ? c1 - c : kPanel;
    float weight[W][kPanel];
    load_panel<W>(a.weight + c * W, size, weight);
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t count = a.pending_count[b], held = kHistory + count, kept = kept_tokens(count, a.T);
      float* window = a.window + b * (kHistory + kSlots) * a.C + c;
      const float* x = a.x + b * a.T * a.x_stride + c;
      const auto row = [&](int64_t i) { return i < held ? window + i * a.C : x + (i - held) * a.x_stride; };
      for (int64_t t = 0; t < a.T; ++t) {
        const float* rows[W];
        for (int w = 0; w < W; ++w) rows[w] = row(count + t + w);
        conv_token<W>(rows, weight, a.bias + c, a.silu, a.y + (b * a.T + t) * a.C + c, size);
      }
      for (int64_t i = kept > 0 ? kept : held; i < held + a.T; ++i) {
        std::memcpy(window + (i - kept) * a.C, row(i), size * sizeof(float));
      }
    }
  }
}

void deferred_conv1d(const DeferredConvArgs& a, int64_t c0, int64_t c1) {
  switch (a.W) {
    case 2:
      return deferred_conv_width<2>(a, c0, c1);
    case 3:
      return deferred_conv_width<3>(a, c0, c1);
    default:
      return deferred_conv_width<4>(a, c0, c1);
  }
}

// ---- selective scan ----

// A block of tokens to be folded into a state.
struct Fold {
  const float* x;      // [kBlock, P], d * x times the decays behind the token
  const float* B;      // [N, kBlock]
  float total;         // all decays
  const float* scale;  // [N]; int8 states only
  int64_t N, P;
};

// Columns [p, p + NV vectors) of every row: h = total * h + sum over the block of B (x) x, from `in` to `out`.
template <int NV, bool kMagnitudes, class In, class Out, class Lanes, class Prefetch>
inline void fold_chunk(const Fold& fold, const In* in, Out* out, int64_t p, Lanes last,
                       RowMagnitudes* magnitudes, Prefetch& ahead) {
  const Fold f = fold;
  Prefetch lines = ahead;
  in += p;
  out += p;
  I32 largest_of_all = zero_int();
  for (int64_t n = 0; n < f.N; ++n, in += f.P, out += f.P) {
#pragma GCC unroll 16
    for (size_t byte = 0; byte < NV * kLanes * sizeof(In); byte += 64) lines.next();
    F32 h[NV];
    load_chunk(in, last, h);
    const F32 factor = broadcast(sizeof(In) == 1 ? f.scale[n] * f.total : f.total);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) h[i] = h[i] * factor;
#pragma GCC unroll 16
    for (int j = 0; j < kBlock; ++j) {
      const F32 B = broadcast(f.B[n * kBlock + j]);
      F32 x[NV];
      load_chunk(f.x + j * f.P + p, last, x);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) h[i] = fma(B, x[i], h[i]);
    }
    store_chunk(out, last, h);
    if constexpr (kMagnitudes) {
      I32 m = bits_of(abs(h[0]));
#pragma GCC unroll 16
      for (int i = 1; i < NV; ++i) m = max(m, bits_of(abs(h[i])));
      float* row = magnitudes->lanes + n * kLanes;
      if (p > 0) m = max(m, bits_of(load(row, Full{})));
      store(row, float_of(m), Full{});
      largest_of_all = max(largest_of_all, m);
    }
  }
  if (kMagnitudes && largest(largest_of_all) >= kInfinityBits) magnitudes->finite = false;
  ahead = lines;
}

template <bool kMagnitudes = false, class In, class Out, class Prefetch>
void fold_rows(const Fold& f, const In* in, Out* out, RowMagnitudes* magnitudes, Prefetch& ahead) {
  constexpr int NV = kChunk;
  int64_t p = 0;
  for (; p + NV * kLanes <= f.P; p += NV * kLanes)
    fold_chunk<NV, kMagnitudes>(f, in, out, p, Full{}, magnitudes, ahead);
  for (; p + kLanes <= f.P; p += kLanes) fold_chunk<1, kMagnitudes>(f, in, out, p, Full{}, magnitudes, ahead);
  if (p < f.P) fold_chunk<1, kMagnitudes>(f, in, out, p, first_lanes(f.P - p), magnitudes, ahead);
}

// From `in` to `out`, which may be the same, rounded. `tile` [kRowBlock, P] and the scales: int8 states only.
template <class State, class Prefetch>
[[gnu::noinline]] void fold_state(const Fold& all, const State* in, State* out, float* out_scale, float* tile,
                                  Prefetch& ahead) {
  if constexpr (sizeof(State) > 1) {
    fold_rows(all, in, out, nullptr, ahead);
  } else {
    RowMagnitudes magnitudes;
    for (int64_t n = 0; n < all.N; n += kRowBlock) {
      Fold f = all;
      f.B += n * kBlock;
      f.scale += n;
      f.N = all.N - n < kRowBlock ? all.N - n : kRowBlock;
      magnitudes.finite = true;
      fold_rows<true>(f, in + n * f.P, tile, &magnitudes, ahead);
      quantize_rows(tile, magnitudes, f.N, f.P, out + n * f.P, out_scale + n);
    }
  }
}

// A few tokens of one head that are computed from the same state and the tokens of one block; y is added to.
template <class Row>
struct Read {
  const float* C;  // [tokens, N] with C_stride, times the rows' scales where the state is int8
  int64_t C_stride;
  float* y;  // [tokens, P] with y_stride
  int64_t y_stride;
  const float* total;            // [tokens]: all decays
  const float (*share)[kBlock];  // [tokens]: of each token of the block up to that one
  int64_t behind;                // that token of the first
  Row x;                         // x(j) [P]: d * x of token j of the block
  int64_t N, P;
};

// Columns [p, p + NV vectors), NT tokens: y += total * (C . h) + sum of share * x.
template <int NT, int NV, class State, class Row, class Lanes, class Prefetch>
inline void read_chunk(const Read<Row>& read, const State* h, int64_t p, Lanes last, Prefetch& ahead) {
  const Read<Row> r = read;
  Prefetch lines = ahead;
  h += p;
  F32 sums[NT][NV];
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) sums[t][i] = zero();
  }
  for (int64_t n = 0; n < r.N; ++n, h += r.P) {
#pragma GCC unroll 16
    for (size_t byte = 0; byte < NV * kLanes * sizeof(State); byte += 64) lines.next();
    F32 row[NV];
    load_chunk(h, last, row);
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
      const F32 C = broadcast(r.C[t * r.C_stride + n]);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) sums[t][i] = fma(C, row[i], sums[t][i]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < NT; ++t) {
    F32 y[NV];
    load_chunk(r.y + t * r.y_stride + p, last, y);
#pragma GCC unroll 16
    for (int i = 0; i < NV; ++i) y[i] = fma(broadcast(r.total[t]), sums[t][i], y[i]);
    for (int64_t j = 0; j <= r.behind + t; ++j) {
      F32 x[NV];
      load_chunk(r.x(j) + p, last, x);
#pragma GCC unroll 16
      for (int i = 0; i < NV; ++i) y[i] = fma(broadcast(r.share[t][j]), x[i], y[i]);
    }
    store_chunk(r.y + t * r.y_stride + p, last, y);
  }
  ahead = lines;
}

template <int NT, class State, class Row, class Prefetch>
[[gnu::noinline]] void read_tokens(const Read<Row>& r, const State* h, Prefetch& ahead) {
  constexpr int NV = NT == 1 ? 64 / kLanes : kChunk;
  int64_t p = 0;
  for (; p + NV * kLanes <= r.P; p += NV * kLanes) read_chunk<NT, NV>(r, h, p, Full{}, ahead);
  for (; p + kLanes <= r.P; p += kLanes) read_chunk<NT, 1>(r, h, p, Full{}, ahead);
  if (p < r.P) read_chunk<NT, 1>(r, h, p, first_lanes(r.P - p), ahead);
}

inline float dot(const float* a, const float* b, int64_t count) {
  F32 sums = zero();
  for_vectors(count,
              [&](int64_t i, auto lanes) { sums = fma(load(a + i, lanes), load(b + i, lanes), sums); });
  return sum(sums);
}

// The scratch of deferred_scan, in floats.
struct DeferredScratch {
  explicit DeferredScratch(const DeferredScanArgs& a, float* at = nullptr) : end(at) {
    const bool int8 = a.state_type == StateType::i8;
    x = take(a.T * a.P);
    decays = take(kSlots + a.T);
    dots = take(a.T * kBlock);
    B = take((kSlots + a.T) * a.N);
    weighted = take(kBlock * a.P);
    C = take(int8 ? kTokens * a.N : 0);
    tile = take(int8 ? kRowBlock * a.P : 0);
    scale = take(int8 ? a.N : 0);
    state = take(a.N * a.P);
  }

  float* x;         // [T, P], d * x of the call's tokens
  float* decays;    // [length]
  float* dots;      // [T, kBlock], C of a token . B of those of its block
  float* B;         // [blocks, N, kBlock], of the blocks that are folded
  float* weighted;  // [kBlock, P], see Fold
  float* C;         // [kTokens, N]; these: int8 states only
  float* tile;      // [kRowBlock, P]
  float* scale;     // [N], of
  float* state;     // [N, P], a state that is not to be stored
  float* end;

 private:
  float* take(int64_t count) {
    float* const at = end;
    end = reinterpret_cast<float*>(reinterpret_cast<uintptr_t>(at) + count * sizeof(float));
    return at;
  }
};

size_t deferred_scan_bytes(const DeferredScanArgs& a) {
  return reinterpret_cast<uintptr_t>(DeferredScratch(a).end);
}

// What all heads of a group share: dots and, of whole blocks that are folded, B transposed.
void prepare_group(const DeferredScanArgs& a, int64_t b, int64_t group, const DeferredScratch& s) {
  const int64_t count = a.pending_count[b], length = count + a.T;
  const auto B_at = [&](int64_t j) {
    return j < count ? a.pending_B + ((b * kSlots + j) * a.G + group) * a.N
                     : a.Bm + (b * a.T + j - count) * a.B_stride + group * a.N;
  };
  for (int64_t t = count; t < length; ++t) {
    const float* C = a.Cm + (b * a.T + t - count) * a.C_stride + group * a.N;
    for (int64_t j = t / kBlock * kBlock; j <= t; ++j) {
      s.dots[(t - count) * kBlock + j % kBlock] = dot(C, B_at(j), a.N);
    }
  }
  for (int64_t first = 0; first + kBlock < length; first += kBlock) {
    float* B = s.B + first * a.N;
    for (int64_t j = 0; j < kBlock; ++j) {
      const float* from = B_at(first + j);
      for (int64_t n = 0; n < a.N; ++n) B[n * kBlock + j] = from[n];
    }
  }
}

template <class State>
void deferred_head(const DeferredScanArgs& a, int64_t i, const DeferredScratch& s) {
  constexpr bool kScaled = sizeof(State) == 1;
  const int64_t b = i / a.H, head = i % a.H, group = head / (a.H / a.G);
  const int64_t count = a.pending_count[b], length = count + a.T, kept = kept_tokens(count, a.T);
  const int64_t width = a.H * a.P, size = a.N * a.P;
  State* const stored = static_cast<State*>(a.new_state) + i * size;
  float* const stored_scale = kScaled ? a.new_state_scale + i * a.N : nullptr;
  float* const pending_x = a.pending_x + b * kSlots * width + head * a.P;
  float* const pending_decay = a.pending_decay + b * kSlots * a.H + head;
  const auto x_at = [=](int64_t j) { return j < count ? pending_x + j * width : s.x + (j - count) * a.P; };
  const float rate = -expf(a.A_log[head]);
  for (int64_t j = 0; j < count; ++j) s.decays[j] = pending_decay[j * a.H];
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t token = b * a.T + t;
    const float d = discretize(a, token, head);
    s.decays[count + t] = expf(rate * d);
    const float* x = a.x + token * a.x_stride + head * a.P;
    float* y = a.y + token * width + head * a.P;
    for_vectors(a.P, [&](int64_t p, auto lanes) {
      const F32 v = load(x + p, lanes);
      store(s.x + t * a.P + p, v * broadcast(d), lanes);
      store(y + p, v * broadcast(a.D[head]), lanes);
    });
  }

  const State* h = stored;
  const float* scale = stored_scale;
  Ahead ahead(h);
  bool streamed = false;
  for (int64_t first = 0; first < length; first += kBlock) {
    if (first > 0) {
      float total = 1.0f;
      for (int64_t j = kBlock - 1; j >= 0; --j) {
        const float* x = x_at(first - kBlock + j);
        for_vectors(a.P, [&](int64_t p, auto lanes) {
          store(s.weighted + j * a.P + p, load(x + p, lanes) * broadcast(total), lanes);
        });
        total *= s.decays[first - kBlock + j];
      }
      const Fold fold = {s.weighted, s.B + (first - kBlock) * a.N, total, scale, a.N, a.P};
      const bool store_it = first <= kept;
      State* const out = store_it ? stored : reinterpret_cast<State*>(s.state);
      float* const out_scale = store_it ? stored_scale : s.scale;
      if (streamed) {
        NoAhead none;
        fold_state(fold, h, out, out_scale, s.tile, none);
      } else {
        fold_state(fold, h, out, out_scale, s.tile, ahead);
      }
      streamed = true;
      h = out;
      scale = out_scale;
    }
    const int64_t end = first + kBlock < length ? first + kBlock : length;
    for (int64_t t = first < count ? count : first, tokens; t < end; t += tokens) {
      tokens = end - t < kTokens ? 1 : kTokens;
      float total[kTokens], share[kTokens][kBlock];
      for (int64_t k = 0; k < tokens; ++k) {
        total[k] = 1.0f;
        for (int64_t j = t + k; j >= first; --j) {
          share[k][j - first] = total[k] * s.dots[(t + k - count) * kBlock + j - first];
          total[k] *= s.decays[j];
        }
      }
      const int64_t token = b * a.T + t - count;
      const float* C = a.Cm + token * a.C_stride + group * a.N;
      int64_t C_stride = a.C_stride;
      if constexpr (kScaled) {
        for (int64_t k = 0; k < tokens; ++k) {
          for_vectors(a.N, [&](int64_t n, auto lanes) {
            store(s.C + k * a.N + n, load(C + k * C_stride + n, lanes) * load(scale + n, lanes), lanes);
          });
        }
        C = s.C;
        C_stride = a.N;
      }
      const auto x = [=](int64_t j) { return x_at(first + j); };
      const Read<decltype(x)> read = {
          C, C_stride, a.y + token * width + head * a.P, width, total, share, t - first, x, a.N, a.P};
      if (streamed) {
        NoAhead none;
        tokens == 1 ? read_tokens<1>(read, h, none) : read_tokens<kTokens>(read, h, none);
      } else {
        tokens == 1 ? read_tokens<1>(read, h, ahead) : read_tokens<kTokens>(read, h, ahead);
      }
      streamed = true;
    }
  }

  for (int64_t j = kept > 0 ? kept : count; j < length; ++j) {
    std::memcpy(pending_x + (j - kept) * width, x_at(j), a.P * sizeof(float));
    pending_decay[(j - kept) * a.H] = s.decays[j];
  }
}

void deferred_scan(const DeferredScanArgs& a, int64_t i0, int64_t i1, void* scratch) {
  const DeferredScratch s(a, static_cast<float*>(scratch));
  const int64_t heads = a.H / a.G;
  for (int64_t i = i0; i < i1; ++i) {
    if (i == i0 || i % heads == 0) prepare_group(a, i / a.H, i % a.H / heads, s);
    switch (a.state_type) {
      case StateType::f32:
        deferred_head<float>(a, i, s);
        break;
      case StateType::f16:
        deferred_head<uint16_t>(a, i, s);
        break;
      case StateType::i8:
        deferred_head<int8_t>(a, i, s);
    }
  }
}
