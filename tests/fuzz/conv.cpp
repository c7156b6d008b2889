// CausalConv1dStep, in ranges of channels, in place or not, on every table, against the scalar one.
#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t B = in.size(1, 3), T = in.small(1, 6), C = in.small(1, 70), W = in.size(2, 4);
  const int64_t stride = C + in.size(0, 5), cut = in.size(0, C);
  const bool silu = in.flag(), in_place = in.flag();
  // The last token ends where its channels do.
  const Array<float> x = in.floats((B * T - 1) * stride + C), state = in.floats(B * C * (W - 1));
  const Array<float> weight = in.floats(C * W), bias = in.floats(C);
  const double bound = 4 * weight.largest() * std::fmax(x.largest(), state.largest()) + bias.largest();

  Array<float> y_ref(B * T * C, 0), state_ref(state.size, 0);
  for (const KernelTable* table : tables()) {
    Array<float> y(y_ref.size, 1), before = state.copy(), after(in_place ? 0 : state.size, 1);
    Array<float>& result = in_place ? before : after;
    const ConvArgs args = {.x = x,
                           .state = before,
                           .weight = weight,
                           .bias = bias,
                           .y = y,
                           .new_state = result,
                           .x_stride = stride,
                           .B = B,
                           .T = T,
                           .C = C,
                           .W = W,
                           .silu = silu};
    table->causal_conv1d(args, 0, cut);
    table->causal_conv1d(args, cut, C);
    if (is_reference(table)) {
      y_ref.fill(y);
      state_ref.fill(result);
    }
    require_close(in, table->name, "y", y, y_ref, y.size, 1e-6 * bound);
    require_close(in, table->name, "new_state", result, state_ref, result.size, 0);
  }
  return 0;
}
