// AVX-512 vectors for float-inl.h: 16 lanes, tails by mask registers (masked lanes touch no memory and load zero).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace dfssm::avx512vnni {

constexpr int kLanes = 16;
using F32 = __m512;
using I32 = __m512i;
using Mask = __mmask16;
struct Full {};  // all lanes

constexpr int kTokens = 4;  // of a scan, at once: what the 32 registers hold

inline Mask first_lanes(int64_t n) { return static_cast<Mask>((1u << n) - 1); }

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 broadcast(float v) { return _mm512_set1_ps(v); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// Of a NaN and another value both give b.
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
// max(|a|, |b|); of a NaN and a number, either
inline F32 larger_magnitude(F32 a, F32 b) { return _mm512_range_ps(a, b, 0b1011); }
inline F32 negate_abs(F32 a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
inline F32 round_even(F32 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 scale_by_power(F32 a, F32 exponent) { return _mm512_scalef_ps(a, exponent); }
inline F32 where_negative(F32 test, F32 yes, F32 no) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test)), no, yes);
}
inline F32 where_below(F32 a, F32 b, F32 yes, F32 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline float sum(F32 a) { return _mm512_reduce_add_ps(a); }

inline I32 zero_int() { return _mm512_setzero_si512(); }
inline I32 bits_of(F32 a) { return _mm512_castps_si512(a); }
inline F32 float_of(I32 bits) { return _mm512_castsi512_ps(bits); }
inline I32 max(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 round_to_int(F32 a) { return _mm512_cvtps_epi32(a); }
inline int32_t largest(I32 a) { return _mm512_reduce_max_epi32(a); }
inline int32_t sum(I32 a) { return _mm512_reduce_add_epi32(a); }

inline F32 load(const float* p, Full) { return _mm512_loadu_ps(p); }
inline F32 load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline void store(float* p, F32 v, Full) { _mm512_storeu_ps(p, v); }
inline void store(float* p, F32 v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }

// binary16, as bits, saturating
inline __m256i halves(F32 v) {
  v = min(broadcast(kHalfMax), max(broadcast(-kHalfMax), v));
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}
inline F32 load(const uint16_t* p, Full) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load(const uint16_t* p, Mask m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
inline void store(uint16_t* p, F32 v, Full) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves(v)); }
inline void store(uint16_t* p, F32 v, Mask m) { _mm256_mask_storeu_epi16(p, m, halves(v)); }

inline F32 load(const int8_t* p, Full) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32 load(const int8_t* p, Mask m) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(m, p)));
}
inline void store(int8_t* p, I32 v, Full) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
inline void store(int8_t* p, I32 v, Mask m) { _mm_mask_storeu_epi8(p, m, _mm512_cvtepi32_epi8(v)); }

// Four vectors in a row.
inline void store_4(int8_t* p, const I32 (&v)[4]) {
  const I32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const I32 bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));  // the packs work within 128-bit lanes
}

// Lane i is the largest lane of rows[i]: a transposition that takes the maximum on the way.
inline I32 largest_of_each(const I32 (&rows)[kLanes]) {
  I32 half[8], quarter[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    half[i] = max(_mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]),
                  _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    quarter[i] = max(_mm512_unpacklo_epi64(half[2 * i], half[2 * i + 1]),
                     _mm512_unpackhi_epi64(half[2 * i], half[2 * i + 1]));
  }
  const auto across = [](I32 a, I32 b) {
    return max(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return across(across(quarter[0], quarter[1]), across(quarter[2], quarter[3]));
}

// Lane and vector of every element of a [16, S] array seen as S vectors, from either side of the transposition.
template <int S>
struct Transposition {
  int32_t load_lane[S][kLanes], store_lane[S][kLanes];
  Mask load_from[S][S], store_from[S][S];

  constexpr Transposition() : load_lane{}, store_lane{}, load_from{}, store_from{} {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < S; ++j) {
        const int flat = i * S + j, vector = flat / kLanes, lane = flat % kLanes;
        load_lane[j][i] = lane;
        load_from[j][vector] |= static_cast<Mask>(1u << i);
        store_lane[vector][lane] = i;
        store_from[vector][j] |= static_cast<Mask>(1u << lane);
      }
    }
  }
};

// columns[j][i] = p[i * S + j]: the S columns of a [16, S] array.
template <int S>
inline void load_columns(const float* p, F32 (&columns)[S]) {
  static constexpr Transposition<S> kTo;
#pragma GCC unroll 4
  for (int j = 0; j < S; ++j) {
    const I32 lane = _mm512_loadu_si512(kTo.load_lane[j]);
    columns[j] = zero();
#pragma GCC unroll 4
    for (int v = 0; v < S; ++v) {
      columns[j] =
          _mm512_mask_permutexvar_ps(columns[j], kTo.load_from[j][v], lane, _mm512_loadu_ps(p + v * kLanes));
    }
  }
}

template <int S>
inline void store_columns(float* p, const F32 (&columns)[S]) {
  static constexpr Transposition<S> kTo;
#pragma GCC unroll 4
  for (int v = 0; v < S; ++v) {
    const I32 lane = _mm512_loadu_si512(kTo.store_lane[v]);
    F32 out = zero();
#pragma GCC unroll 4
    for (int j = 0; j < S; ++j) out = _mm512_mask_permutexvar_ps(out, kTo.store_from[v][j], lane, columns[j]);
    _mm512_storeu_ps(p + v * kLanes, out);
  }
}

}  // namespace dfssm::avx512vnni
