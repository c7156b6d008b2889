// What the entries of both scans draw alike: the op's inputs, and a stored state of any type.
#pragma once

#include <limits>

#include "half.h"
#include "input.h"

namespace dfssm::fuzz {

// A stored state as bytes of its type, and what it stands for.
struct State {
  Array<float> f32;
  Array<uint16_t> f16;
  Array<int8_t> i8;
  Array<float> scale;
  StateType type;

  State(StateType of, int64_t rows, int64_t P)
      : f32(of == StateType::f32 ? rows * P : 0, 1),
        f16(of == StateType::f16 ? rows * P : 0, 1),
        i8(of == StateType::i8 ? rows * P : 0, 1),
        scale(of == StateType::i8 ? rows : 0, 1),
        type(of) {}

  // Any bits.
  static State drawn(Input& in, StateType type, int64_t rows, int64_t P) {
    State state(type, rows, P);
    state.f32.fill(in.floats(state.f32.size));
    for (uint16_t& value : state.f16) {
      value = in.half_bits();
      in.wild = in.wild || std::isinf(scalar::half_to_float(value));
    }
    state.i8.fill(in.bytes<int8_t>(state.i8.size));
    state.scale.fill(in.floats(state.scale.size));
    return state;
  }

  void* data() {
    if (type == StateType::f32) return static_cast<float*>(f32);
    if (type == StateType::f16) return static_cast<uint16_t*>(f16);
    return static_cast<int8_t*>(i8);
  }

  void fill(const State& other) {
    f32.fill(other.f32);
    f16.fill(other.f16);
    i8.fill(other.i8);
    scale.fill(other.scale);
  }

  Array<float> values(int64_t count, int64_t P) const {
    Array<float> values(count, 0);
    for (int64_t i = 0; i < count; ++i) {
      if (type == StateType::f32) values[i] = f32[i];
      if (type == StateType::f16) values[i] = scalar::half_to_float(f16[i]);
      if (type == StateType::i8) values[i] = static_cast<float>(i8[i]) * scale[i / P];
    }
    return values;
  }

  // What storing costs, as a share of the largest value: one step of fp16, and of int8 (a tie may round either way).
  double step() const {
    return type == StateType::f32 ? 0 : type == StateType::f16 ? 1.0 / 1024 : 1.01 / 127;
  }
};

constexpr StateType kTypes[] = {StateType::f32, StateType::f16, StateType::i8};

struct Scan {
  const int64_t B, T, G, H, P, N, pairs, cut;
  const StateType type;
  const bool in_place, limited;
  const int64_t x_stride, dt_stride, B_stride, C_stride, last;
  const Array<float> x, dt, Bm, Cm, A_log, D, dt_bias;
  const State source;
  const int64_t count;  // of numbers in the state
  const double delta;   // above every step size

  Scan(Input& in, int64_t most_tokens)
      : B(in.size(1, 2)),
        T(in.small(1, most_tokens)),
        G(in.size(1, 2)),
        H(G * in.small(1, 3)),
        P(in.small(1, 36)),
        N(in.small(1, 20)),
        pairs(B * H),
        cut(in.size(0, pairs)),
        type(kTypes[in.size(0, 2)]),
        in_place(in.flag()),
        limited(in.flag()),
        x_stride(H * P + in.size(0, 5)),
        dt_stride(H + in.size(0, 5)),
        B_stride(G * N + in.size(0, 5)),
        C_stride(G * N + in.size(0, 5)),
        last(B * T - 1),
        x(in.floats(last * x_stride + H * P)),
        dt(in.floats(last * dt_stride + H)),
        Bm(in.floats(last * B_stride + G * N)),
        Cm(in.floats(last * C_stride + G * N)),
        A_log(in.floats(H)),
        D(in.floats(H)),
        dt_bias(in.floats(H)),
        source(State::drawn(in, type, pairs * N, P)),
        count(pairs * N * P),
        delta(std::fmin(dt.largest() + dt_bias.largest() + 1, limited ? 0.5 : 1e9)) {}

  // Rounding of a token's decay, a power of e, is one part in 1e6 of its exponent, which exp(A_log) delta bounds.
  double precision() const { return 1e-6 * (1 + std::exp(std::fmin(A_log.largest(), 5)) * delta); }

  // With `before` and `after` as the state, which may be one.
  ScanArgs args(State& before, State& after, float* y) const {
    return {.x = x,
            .dt = dt,
            .Bm = Bm,
            .Cm = Cm,
            .A_log = A_log,
            .D = D,
            .dt_bias = dt_bias,
            .state = before.data(),
            .state_scale = before.scale,
            .y = y,
            .new_state = after.data(),
            .new_state_scale = after.scale,
            .x_stride = x_stride,
            .dt_stride = dt_stride,
            .B_stride = B_stride,
            .C_stride = C_stride,
            .B = B,
            .T = T,
            .H = H,
            .P = P,
            .N = N,
            .G = G,
            .dt_min = limited ? 0.01f : 0.0f,
            .dt_max = limited ? 0.5f : std::numeric_limits<float>::infinity(),
            .state_type = type};
  }
};

}  // namespace dfssm::fuzz
