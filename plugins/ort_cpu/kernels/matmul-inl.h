// What the integer matmuls of the vector sets share; compiled into each of them, as float-inl.h.
#pragma once

#include "prefetch.h"
#include "tables.h"

namespace dfssm {
namespace {

using Dword = int32_t __attribute__((may_alias, aligned(1)));  // four neighbouring int8 activations

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Of the rows from `row` on, the first of a block.
inline const uint8_t* tiles_of(const ScaffoldArgs& a, int64_t plane, int64_t row) {
  return a.bits + (plane * padded_rows(a.M, a.layout) + row) * (a.K / 8);
}

// Layout 0, for graphs nobody lowered: one row and token at a time. positive(bits, q) is the sum of the q [K] whose
// bits of a row are set.
template <class Positive>
void canonical(const ScaffoldArgs& a, int64_t m0, int64_t m1, Positive positive) {
  for (int64_t m = m0; m < m1; ++m) {
    for (int64_t t = 0; t < a.n; ++t) {
      float y = 0.0f;
      for (int64_t plane = 0; plane < a.planes; ++plane) {
        const int32_t sum = positive(a.bits + (plane * a.M + m) * (a.K / 8), a.q + t * a.K);
        y += (a.scale[plane * a.M + m] * a.s[t]) * static_cast<float>(2 * sum - a.sum[t]);
      }
      if (a.R > 0) {
        float correction = 0.0f;
        for (int64_t r = 0; r < a.R; ++r)
          correction += static_cast<float>(a.up[m * a.R + r]) * a.h[t * a.R + r];
        y += a.up_scale[m] * correction;
      }
      a.y[t * a.ldy + m] = y;
    }
  }
}

}  // namespace
}  // namespace dfssm
