// From the integer sums of a scaffold's rows to y, 16 rows a vector; compiled into each of the sets with AVX-512, as
// matmul-inl.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "matmul-inl.h"

namespace dfssm {
namespace {

// Lanes of the 16-row block `block` that exist.
inline __mmask16 rows_of(const ScaffoldArgs& a, int64_t block) {
  const int64_t rows = min(a.M - block * kTileRows, kTileRows);
  return static_cast<__mmask16>((1u << rows) - 1);
}

// (scale * s) * (2 * positive - sum) of one plane and block, and NT tokens from t on; the first plane brings the correction,
// up_scale * (up . h), and the others add to it. Tokens share each row of `up` once it is a vector of floats.
template <int NT>
inline void finish(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t, const __m512i* positive) {
  const __mmask16 rows = rows_of(a, block);
  const bool corrected = plane == 0 && a.R > 0;
  __m512 correction[NT];
#pragma GCC unroll 4
  for (int i = 0; i < NT; ++i) correction[i] = _mm512_setzero_ps();
  if (corrected) {
    const int8_t* up = a.up + block * a.R * kTileRows;
    const float* h = a.h + t * a.R;
    for (int64_t r = 0; r < a.R; ++r, up += kTileRows) {
      const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(up)));
      const __m512 row = _mm512_cvtepi32_ps(codes);
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) {
        correction[i] = _mm512_fmadd_ps(row, _mm512_set1_ps(h[i * a.R + r]), correction[i]);
      }
    }
  }
  const __m512 scale = _mm512_maskz_loadu_ps(rows, a.scale + plane * a.M + block * kTileRows);
#pragma GCC unroll 4
  for (int i = 0; i < NT; ++i) {
    const __m512i signed_sum =
        _mm512_sub_epi32(_mm512_add_epi32(positive[i], positive[i]), _mm512_set1_epi32(a.sum[t + i]));
    __m512 y =
        _mm512_mul_ps(_mm512_mul_ps(scale, _mm512_set1_ps(a.s[t + i])), _mm512_cvtepi32_ps(signed_sum));
    float* out = a.y + (t + i) * a.ldy + block * kTileRows;
    if (plane > 0) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(rows, out));
    if (corrected) {
      const __m512 up_scale = _mm512_maskz_loadu_ps(rows, a.up_scale + block * kTileRows);
      y = _mm512_add_ps(y, _mm512_mul_ps(up_scale, correction[i]));
    }
    _mm512_mask_storeu_ps(out, rows, y);
  }
}

}  // namespace
}  // namespace dfssm
