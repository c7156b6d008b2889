// SelectiveScanStep with every type of state, in ranges of heads, in place or not, on every table, against the scalar one.
#include <limits>

#include "half.h"
#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

namespace {

constexpr StateType kTypes[] = {StateType::f32, StateType::f16, StateType::i8};

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

  void* data() {
    if (type == StateType::f32) return static_cast<float*>(f32);
    if (type == StateType::f16) return static_cast<uint16_t*>(f16);
    return static_cast<int8_t*>(i8);
  }

  void copy_from(State& other) {
    std::copy(other.f32.begin(), other.f32.end(), f32.begin());
    std::copy(other.f16.begin(), other.f16.end(), f16.begin());
    std::copy(other.i8.begin(), other.i8.end(), i8.begin());
    std::copy(other.scale.begin(), other.scale.end(), scale.begin());
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
};

// What storing costs, as a share of the largest value: one step of fp16, and of int8 (a tie may round either way).
double step(StateType type) {
  return type == StateType::f32 ? 0 : type == StateType::f16 ? 1.0 / 1024 : 1.01 / 127;
}

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t B = in.size(1, 2), T = in.size(1, 4), G = in.size(1, 2), H = G * in.size(1, 3);
  const int64_t P = in.size(1, 36), N = in.size(1, 20), pairs = B * H, cut = in.size(0, pairs);
  const StateType type = kTypes[in.size(0, 2)];
  const bool in_place = in.flag(), limited = in.flag();
  const int64_t x_stride = H * P + in.size(0, 5), dt_stride = H + in.size(0, 5);
  const int64_t B_stride = G * N + in.size(0, 5), C_stride = G * N + in.size(0, 5), last = B * T - 1;
  const Array<float> x = in.floats(last * x_stride + H * P), dt = in.floats(last * dt_stride + H);
  const Array<float> Bm = in.floats(last * B_stride + G * N), Cm = in.floats(last * C_stride + G * N);
  const Array<float> A_log = in.floats(H), D = in.floats(H), dt_bias = in.floats(H);
  State source(type, pairs * N, P);
  if (type == StateType::f32) {
    const Array<float> drawn = in.floats(source.f32.size);
    std::copy(static_cast<const float*>(drawn), drawn + drawn.size, source.f32.begin());
  }
  for (uint16_t& value : source.f16) {
    value = in.half_bits();
    in.wild = in.wild || std::isinf(scalar::half_to_float(value));
  }
  const Array<int8_t> drawn = in.bytes<int8_t>(source.i8.size);
  std::copy(static_cast<const int8_t*>(drawn), drawn + drawn.size, source.i8.begin());
  const Array<float> scales = in.floats(source.scale.size);
  std::copy(static_cast<const float*>(scales), scales + scales.size, source.scale.begin());

  const int64_t count = pairs * N * P;
  const double d = std::fmin(dt.largest() + dt_bias.largest() + 1, limited ? 0.5 : 1e9);
  const double state_bound = source.values(count, P).largest() + T * d * Bm.largest() * x.largest();
  const double y_bound = N * Cm.largest() * state_bound + D.largest() * x.largest();
  // Rounding of the decay, a power of e, is one part in 1e6 of its exponent, which exp(A_log) d bounds.
  const double precision = 1e-6 * (1 + std::exp(std::fmin(A_log.largest(), 5)) * d);
  in.wild = in.wild || state_bound > 6e4;  // fp16 holds no more

  Array<float> y_ref(B * T * H * P, 0), state_ref(count, 0);
  bool first = true;
  for (const KernelTable* table : usable_kernels()) {  // scalar first
    State before(type, pairs * N, P), after(type, in_place ? 0 : pairs * N, P);
    before.copy_from(source);
    State& result = in_place ? before : after;
    Array<float> y(y_ref.size, 1);
    const ScanArgs args = {.x = x,
                           .dt = dt,
                           .Bm = Bm,
                           .Cm = Cm,
                           .A_log = A_log,
                           .D = D,
                           .dt_bias = dt_bias,
                           .state = before.data(),
                           .state_scale = before.scale,
                           .y = y,
                           .new_state = result.data(),
                           .new_state_scale = result.scale,
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
    Array<uint8_t> scratch(static_cast<int64_t>(table->selective_scan_bytes(args)), 0);
    table->selective_scan(args, 0, cut, scratch);
    table->selective_scan(args, cut, pairs, scratch);
    const Array<float> values = result.values(count, P);
    if (first) {
      std::copy(y.begin(), y.end(), y_ref.begin());
      std::copy(static_cast<const float*>(values), values + count, state_ref.begin());
    }
    first = false;
    require_close(in, table->name, "y", y, y_ref, y.size, precision * y_bound);
    require_close(in, table->name, "new_state", values, state_ref, count,
                  (precision + step(type)) * state_bound);
  }
  return 0;
}
