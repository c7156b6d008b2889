// AVX2 vectors for float-inl.h: 8 lanes; float tails by masked moves, narrower tails through a small buffer.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dfssm::avx2 {

constexpr int kLanes = 8;
using F32 = __m256;
using I32 = __m256i;
struct Mask {
  __m256i lanes;
  int64_t count;
};
struct Full {};  // all lanes

constexpr int kTokens = 2;  // of a scan, at once: what the 16 registers hold

inline Mask first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane), n};
}

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 broadcast(float v) { return _mm256_set1_ps(v); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
// Of a NaN and another value both give b.
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
// max(|a|, |b|); of a NaN and a number, either
inline F32 larger_magnitude(F32 a, F32 b) { return max(abs(a), abs(b)); }
inline F32 negate_abs(F32 a) { return _mm256_or_ps(a, _mm256_set1_ps(-0.0f)); }
inline F32 round_even(F32 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^exponent for whole exponents in [-126, 127]
inline F32 scale_by_power(F32 a, F32 exponent) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
inline F32 where_negative(F32 test, F32 yes, F32 no) { return _mm256_blendv_ps(no, yes, test); }
inline F32 where_below(F32 a, F32 b, F32 yes, F32 no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline float sum(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline I32 zero_int() { return _mm256_setzero_si256(); }
inline I32 bits_of(F32 a) { return _mm256_castps_si256(a); }
inline F32 float_of(I32 bits) { return _mm256_castsi256_ps(bits); }
inline I32 max(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
inline I32 add(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
inline I32 round_to_int(F32 a) { return _mm256_cvtps_epi32(a); }
inline int32_t largest(I32 a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1)));
}
inline int32_t sum(I32 a) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline F32 load(const float* p, Full) { return _mm256_loadu_ps(p); }
inline F32 load(const float* p, Mask m) { return _mm256_maskload_ps(p, m.lanes); }
inline void store(float* p, F32 v, Full) { _mm256_storeu_ps(p, v); }
inline void store(float* p, F32 v, Mask m) { _mm256_maskstore_ps(p, m.lanes, v); }

// binary16, as bits, saturating
inline F32 load(const uint16_t* p, Full) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(uint16_t* p, F32 v, Full) {
  v = min(broadcast(kHalfMax), max(broadcast(-kHalfMax), v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline F32 load(const int8_t* p, Full) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// Every lane of v fits int8.
inline void store(int8_t* p, I32 v, Full) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

template <class Narrow>
inline F32 load(const Narrow* p, Mask m) {
  Narrow buffer[kLanes] = {};
  std::memcpy(buffer, p, m.count * sizeof *p);
  return load(buffer, Full{});
}
template <class Narrow, class Vector>
inline void store(Narrow* p, Vector v, Mask m) {
  Narrow buffer[kLanes];
  store(buffer, v, Full{});
  std::memcpy(p, buffer, m.count * sizeof *p);
}

// Four vectors in a row.
inline void store_4(int8_t* p, const I32 (&v)[4]) {
  const I32 bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const I32 order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // the packs work within 128-bit lanes
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}

// Lane i is the largest lane of rows[i]: a transposition that takes the maximum on the way.
inline I32 largest_of_each(const I32 (&rows)[kLanes]) {
  I32 half[4], quarter[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    half[i] = max(_mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]),
                  _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    quarter[i] = max(_mm256_unpacklo_epi64(half[2 * i], half[2 * i + 1]),
                     _mm256_unpackhi_epi64(half[2 * i], half[2 * i + 1]));
  }
  return max(_mm256_permute2x128_si256(quarter[0], quarter[1], 0x20),
             _mm256_permute2x128_si256(quarter[0], quarter[1], 0x31));
}

// Four floats from p on, and four from `distance` further on as the upper half.
inline F32 load_halves(const float* p, int distance) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + distance), 1);
}
inline void store_halves(float* p, int distance, F32 v) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(v));
  _mm_storeu_ps(p + distance, _mm256_extractf128_ps(v, 1));
}

// columns[j][i] = p[i * S + j]: the S columns of an [8, S] array, 1 <= S <= 4. Each half of a vector has four rows.
template <int S>
inline void load_columns(const float* p, F32 (&columns)[S]) {
  if constexpr (S == 1) {
    columns[0] = _mm256_loadu_ps(p);
  } else if constexpr (S == 2) {
    const F32 a = load_halves(p, 8), b = load_halves(p + 4, 8);
    columns[0] = _mm256_shuffle_ps(a, b, 0x88);
    columns[1] = _mm256_shuffle_ps(a, b, 0xdd);
  } else if constexpr (S == 3) {
    const F32 a = load_halves(p, 12), b = load_halves(p + 4, 12), c = load_halves(p + 8, 12);
    const F32 ab = _mm256_shuffle_ps(a, b, 0x49);  // columns 1 and 2 of the first two rows
    const F32 bc = _mm256_shuffle_ps(b, c, 0x9e);  // 0 and 1 of the others
    columns[0] = _mm256_shuffle_ps(a, bc, 0x8c);
    columns[1] = _mm256_shuffle_ps(ab, bc, 0xd8);
    columns[2] = _mm256_shuffle_ps(ab, c, 0xcd);
  } else {
    const F32 a = load_halves(p, 16), b = load_halves(p + 4, 16), c = load_halves(p + 8, 16),
              d = load_halves(p + 12, 16);
    const F32 ab[2] = {_mm256_unpacklo_ps(a, b),
                       _mm256_unpackhi_ps(a, b)};  // columns 0, 1 and 2, 3 of two rows
    const F32 cd[2] = {_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)};  // and of the others
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      columns[2 * j] = _mm256_shuffle_ps(ab[j], cd[j], 0x44);
      columns[2 * j + 1] = _mm256_shuffle_ps(ab[j], cd[j], 0xee);
    }
  }
}

// The same back, 1 <= S <= 3.
template <int S>
inline void store_columns(float* p, const F32 (&columns)[S]) {
  static_assert(S <= 3);
  if constexpr (S == 1) {
    _mm256_storeu_ps(p, columns[0]);
  } else if constexpr (S == 2) {
    store_halves(p, 8, _mm256_unpacklo_ps(columns[0], columns[1]));
    store_halves(p + 4, 8, _mm256_unpackhi_ps(columns[0], columns[1]));
  } else {
    const F32 xy = _mm256_shuffle_ps(columns[0], columns[1], 0x88);  // even rows of columns 0 and 1
    const F32 yz = _mm256_shuffle_ps(columns[1], columns[2], 0xdd);  // odd rows of columns 1 and 2
    const F32 zx = _mm256_shuffle_ps(columns[2], columns[0], 0xd8);  // even rows of column 2, odd ones of 0
    store_halves(p, 12, _mm256_shuffle_ps(xy, zx, 0x88));
    store_halves(p + 4, 12, _mm256_shuffle_ps(yz, xy, 0xd8));
    store_halves(p + 8, 12, _mm256_shuffle_ps(zx, yz, 0xdd));
  }
}

}  // namespace dfssm::avx2
