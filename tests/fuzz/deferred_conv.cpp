// DeferredConv1dStep, in ranges of channels, on every table, against the scalar one.
#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t B = in.size(1, 3), T = in.small(1, 20), C = in.small(1, 70), W = in.size(2, 4);
  const int64_t stride = C + in.size(0, 5), cut = in.size(0, C);
  const bool silu = in.flag();
  const Array<uint8_t> count = in.counts(B);
  // The last token ends where its channels do.
  const Array<float> x = in.floats((B * T - 1) * stride + C), before = in.floats(B * (W - 1 + kSlots) * C);
  const Array<float> weight = in.floats(C * W), bias = in.floats(C);
  const double bound = 4 * weight.largest() * std::fmax(x.largest(), before.largest()) + bias.largest();

  Array<float> y_ref(B * T * C, 0), window_ref(before.size, 0);
  for (const KernelTable* table : tables()) {
    Array<float> y(y_ref.size, 1), window = before.copy();
    const DeferredConvArgs args = {.x = x,
                                   .window = window,
                                   .weight = weight,
                                   .bias = bias,
                                   .pending_count = count,
                                   .y = y,
                                   .x_stride = stride,
                                   .B = B,
                                   .T = T,
                                   .C = C,
                                   .W = W,
                                   .silu = silu};
    table->deferred_conv1d(args, 0, cut);
    table->deferred_conv1d(args, cut, C);
    if (is_reference(table)) {
      y_ref.fill(y);
      window_ref.fill(window);
    }
    require_close(in, table->name, "y", y, y_ref, y.size, 1e-6 * bound);
    require_close(in, table->name, "window", window, window_ref, window.size, 0);
  }
  return 0;
}
