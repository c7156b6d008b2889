// Integer matmuls for AVX-VNNI, the dot product of AVX-512 VNNI in 256 bits: VPDPBUSD multiplies four unsigned by four
// signed bytes a lane and adds them to an int32 lane without saturating. The scaffold is AVX2's: look-ups do 23 weights an
// instruction, products of layout 1 would do 16.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matmul-inl.h"

namespace dfssm::avxvnni {
namespace {

#ifdef __AVXVNNI__
// Inline assembly because gcc 12 copies the accumulator of the intrinsic through spare registers and spills.
inline void dot(__m256i& acc, __m256i u8, __m256i s8) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u8), "x"(s8));
}
#else  // over a simulation of the intrinsics (tests/tools/simulated_avx512)
inline void dot(__m256i& acc, __m256i u8, __m256i s8) { acc = _mm256_dpbusd_epi32(acc, u8, s8); }
#endif

inline __m256i load_columns(const int8_t* p, int64_t count) {
  if (count >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  int8_t buffer[32] = {};
  std::memcpy(buffer, p, count);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer));
}

// The sums of four vectors, side by side.
inline __m128i sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

// Up to NR rows from m on by tokens [t, t + NT). VPDPBUSD wants one unsigned side: w ^ 0x80 is w + 128, and 128 * sum(q)
// is taken off at the end. Rows that are not there repeat the last one, and are not stored.
template <int NR, int NT, class Prefetch>
void int8_tile(const Int8Args& a, int64_t m, int64_t rows, int64_t t, Prefetch ahead) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  const int8_t* w[NR];
  for (int r = 0; r < NR; ++r) w[r] = a.w + (m + min(r, rows - 1)) * a.K;
  const int8_t* q = a.q + t * a.K;
  __m256i acc[NR][NT];
#pragma GCC unroll 8
  for (int i = 0; i < NR * NT; ++i) acc[i / NT][i % NT] = _mm256_setzero_si256();
  const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    __m256i x[NT];
#pragma GCC unroll 2
    for (int i = 0; i < NT; ++i) x[i] = load_columns(q + i * a.K + k, count);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      if (r % 2 == 0) ahead.next();  // two rows of 32 bytes are one line
      const __m256i u8 = _mm256_xor_si256(load_columns(w[r] + k, count), flip);
#pragma GCC unroll 2
      for (int i = 0; i < NT; ++i) dot(acc[r][i], u8, x[i]);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= a.K; k += 32) step(k, 32);
  if (k < a.K) step(k, a.K - k);
#pragma GCC unroll 2
  for (int i = 0; i < NT; ++i) {
    const __m128i shifted = _mm_set1_epi32(128 * a.sum[t + i]);
    int32_t dots[NR];
#pragma GCC unroll 2
    for (int r = 0; r < NR; r += 4) {
      const __m128i four = sums(acc[r][i], acc[r + 1][i], acc[r + 2][i], acc[r + 3][i]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dots + r), _mm_sub_epi32(four, shifted));
    }
    float* y = a.y + (t + i) * a.ldy + m;
    for (int r = 0; r < rows; ++r) y[r] = (a.w_scale[m + r] * a.s[t + i]) * static_cast<float>(dots[r]);
  }
}

}  // namespace

size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  return avx2::scaffold_pack_bytes(layout, n, K);
}

void scaffold_pack(int layout, const int8_t* q, int64_t n, int64_t K, void* packed) {
  avx2::scaffold_pack(layout, q, n, K, packed);
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) { avx2::scaffold_matmul(a, m0, m1); }

// One token takes eight rows at a time, to follow as many streams.
void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  const int64_t rows = a.n == 1 ? 8 : 4;
  for (int64_t m = m0; m < m1; m += rows) {
    const int64_t count = min(rows, m1 - m);
    with_prefetch(a.w + m * a.K, [&](auto ahead) {
      if (a.n == 1) return int8_tile<8, 1>(a, m, count, 0, ahead);
      int64_t t = 0;
      for (; t + 2 <= a.n; t += 2) int8_tile<4, 2>(a, m, count, t, ahead);
      if (t < a.n) int8_tile<4, 1>(a, m, count, t, ahead);
    });
  }
}

}  // namespace dfssm::avxvnni
