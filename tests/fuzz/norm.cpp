// GatedRMSNorm and RMSNorm, in ranges of tokens, in place or not, on every table, against the scalar one.
#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t n = in.small(1, 6), groups = in.size(1, 4), C = groups * in.small(1, 70);
  const int64_t stride = C + in.size(0, 5), cut = in.size(0, n);
  const bool gated = in.flag(), in_place = in.flag();
  const Array<float> source = in.floats(n * C), z = in.floats(gated ? (n - 1) * stride + C : 0);
  const Array<float> weight = in.floats(C);

  Array<float> expected(n * C, 0);
  for (const KernelTable* table : tables()) {
    Array<float> y = source.copy(), other(in_place ? 0 : n * C, 1);
    Array<float>& out = in_place ? y : other;
    const NormArgs args = {.y = y,
                           .z = gated ? static_cast<const float*>(z) : nullptr,
                           .weight = weight,
                           .out = out,
                           .z_stride = stride,
                           .n = n,
                           .C = C,
                           .groups = groups,
                           .eps = 1e-5f};
    table->rms_norm(args, 0, cut);
    table->rms_norm(args, cut, n);
    if (is_reference(table)) expected.fill(out);
    require_close(in, table->name, gated ? "gated" : "plain", out, expected, out.size,
                  1e-5 * expected.largest());
  }
  return 0;
}
