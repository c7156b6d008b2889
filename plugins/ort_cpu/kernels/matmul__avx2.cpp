// Integer matmuls for AVX2. Without VNNI the byte product VPMADDUBSW adds two products into an int16 that
// saturates: every use below says why it cannot.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matmul-inl.h"
#include "simd__avx2.h"

namespace dfssm::avx2 {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const int8_t* q) { return _mm256_set1_epi32(*reinterpret_cast<const Dword*>(q)); }

// acc += pairs of u8 * s8, in int16. Inline assembly because gcc 12 gives the sum of the intrinsics a
// register of its own and spills half of the accumulators.
inline void dot_words(__m256i& acc, __m256i u8, __m256i s8) {
  __m256i products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(u8), "x"(s8));
}

// int16 pairs added into int32 lanes
inline __m256i widen(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

// ---- scaffold ----

// Lanes of the eight rows from `row` on that exist, as a mask for masked moves.
inline __m256i rows_of(const ScaffoldArgs& a, int64_t row) {
  return first_lanes(dfssm::min(a.M - row, 8)).lanes;
}

// (scale * s) * (2 * positive - sum) of one plane and token for the eight rows from `row` on; the first plane
// brings the low-rank correction and the others add to it.
inline void finish(const ScaffoldArgs& a, int64_t plane, int64_t row, int64_t t, __m256i positive) {
  const __m256i rows = rows_of(a, row);
  const __m256 scale = _mm256_maskload_ps(a.scale + plane * a.M + row, rows);
  const __m256i signed_sum =
      _mm256_sub_epi32(_mm256_add_epi32(positive, positive), _mm256_set1_epi32(a.sum[t]));
  __m256 y = _mm256_mul_ps(_mm256_mul_ps(scale, _mm256_set1_ps(a.s[t])), _mm256_cvtepi32_ps(signed_sum));
  float* out = a.y + t * a.ldy + row;
  if (plane > 0) {
    y = _mm256_add_ps(y, _mm256_maskload_ps(out, rows));
  } else if (a.R > 0) {
    const int8_t* up = a.up + row / kTileRows * a.R * kTileRows + row % kTileRows;
    const float* h = a.h + t * a.R;
    __m256 correction = _mm256_setzero_ps();
    for (int64_t r = 0; r < a.R; ++r, up += kTileRows) {
      const __m256i lanes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(up)));
      correction = _mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes), _mm256_set1_ps(h[r]), correction);
    }
    y = _mm256_fmadd_ps(_mm256_maskload_ps(a.up_scale + row, rows), correction, y);
  }
  _mm256_maskstore_ps(out, rows, y);
}

// One token. Each half of a tile is split into nibbles; a nibble byte ANDed with 1 << j holds 2^j times its
// bit, and the four powers keep an int16 accumulator each. A tile adds at most 2 nibbles * 2 products * 8 *
// 127 = 4064 to the largest, so eight tiles (32512) fit; exact right shifts then fold the four, every partial
// sum again at most 32512, into int32.
constexpr int kTilesPerFold = 8;

void one_token(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1) {
  const int64_t columns = a.K / kTileColumns;
  const uint8_t* tile = tiles_of(a, plane, block0);
  Ahead ahead(tile);
  for (int64_t block = block0; block < block1; ++block) {
    const int8_t* q = a.q;
    __m256i positive[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t c = 0; c < columns; c += kTilesPerFold) {
      __m256i acc[2][4];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = _mm256_setzero_si256();
      for (int64_t end = dfssm::min(c + kTilesPerFold, columns), i = c; i < end;
           ++i, tile += 64, q += kTileColumns) {
        ahead.next();
#pragma GCC unroll 2
        for (int high = 0; high < 2; ++high) {
          __m256i bits[2];
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            bits[half] = load(tile + 32 * half);
            if (high) bits[half] = _mm256_srli_epi16(bits[half], 4);
          }
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const __m256i mask = _mm256_set1_epi8(static_cast<char>(1 << j));
            const __m256i x = broadcast4(q + 16 * high + 4 * j);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              dot_words(acc[half][j], _mm256_and_si256(bits[half], mask), x);
            }
          }
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i words = acc[half][3];
#pragma GCC unroll 3
        for (int j = 2; j >= 0; --j) words = _mm256_add_epi16(acc[half][j], _mm256_srai_epi16(words, 1));
        positive[half] = _mm256_add_epi32(positive[half], widen(words));
      }
    }
    for (int half = 0; half < 2; ++half) finish(a, plane, block * kTileRows + 8 * half, 0, positive[half]);
  }
}

// NT tokens: bits are expanded to bytes of 0 and 1, once for all tokens. A product adds at most 2 * 127 to an
// int16, so 16 tiles (16 * 8 * 254 = 32512) fit before they are widened.
constexpr int kTokenTile = 4;
constexpr int kTilesPerWiden = 16;

template <int NT>
void token_tile(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0) {
  const __m256i ones = _mm256_set1_epi8(1);
  const int64_t columns = a.K / kTileColumns;
  const uint8_t* tile = tiles_of(a, plane, block);
  const int8_t* q = a.q + t0 * a.K;
  __m256i positive[NT][2];
  for (int i = 0; i < NT * 2; ++i) positive[i / 2][i % 2] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += kTilesPerWiden) {
    __m256i acc[NT][2];
#pragma GCC unroll 8
    for (int i = 0; i < NT * 2; ++i) acc[i / 2][i % 2] = _mm256_setzero_si256();
    for (int64_t end = dfssm::min(c + kTilesPerWiden, columns), i = c; i < end; ++i, tile += 64) {
      __m256i bits[2] = {load(tile), load(tile + 32)};
#pragma GCC unroll 1
      for (int j = 0; j < 8; ++j, q += 4) {
        __m256i u8[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          u8[half] = _mm256_and_si256(bits[half], ones);
          bits[half] = _mm256_srli_epi16(bits[half], 1);
        }
#pragma GCC unroll 4
        for (int t = 0; t < NT; ++t) {
          const __m256i x = broadcast4(q + t * a.K);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) dot_words(acc[t][half], u8[half], x);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < NT * 2; ++i) {
      positive[i / 2][i % 2] = _mm256_add_epi32(positive[i / 2][i % 2], widen(acc[i / 2][i % 2]));
    }
  }
  for (int i = 0; i < NT * 2; ++i) {
    finish(a, plane, block * kTileRows + 8 * (i % 2), t0 + i / 2, positive[i / 2][i % 2]);
  }
}

// Tokens in as few tiles as possible, all nearly equal: of two or more tokens none is left alone.
void many_tokens(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1) {
  const int64_t tiles = (a.n + kTokenTile - 1) / kTokenTile;
  for (int64_t block = block0; block < block1; ++block) {
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t0 = a.n * i / tiles, t1 = a.n * (i + 1) / tiles;
      switch (t1 - t0) {
        case 2:
          token_tile<2>(a, plane, block, t0);
          break;
        case 3:
          token_tile<3>(a, plane, block, t0);
          break;
        default:
          token_tile<4>(a, plane, block, t0);
      }
    }
  }
}

// 32 bits of a row become a byte mask of 32 activations, which are added up.
void canonical(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  const __m256i byte_of_column =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit_of_column = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i ones = _mm256_set1_epi8(1);
  dfssm::canonical(a, m0, m1, [=](const uint8_t* bits, const int8_t* q) {
    __m256i acc = _mm256_setzero_si256();
    for (int64_t k = 0; k < a.K; k += 32) {
      int32_t word;
      std::memcpy(&word, bits + k / 8, sizeof word);
      const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), byte_of_column);
      const __m256i mask = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of_column), bit_of_column);
      acc = _mm256_add_epi32(acc, widen(_mm256_maddubs_epi16(ones, _mm256_and_si256(mask, load(q + k)))));
    }
    return sum(acc);
  });
}

// ---- int8 ----

inline __m256i load_words(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i load_words(const int8_t* p, int64_t count) {
  int8_t buffer[16] = {};
  std::memcpy(buffer, p, count);
  return load_words(buffer);
}

// Rows [m, m + NR) by tokens [t, t + NT), in int16: VPMADDUBSW would saturate on 2 * 255 * 127.
template <int NR, int NT>
void int8_tile(const Int8Args& a, int64_t m, int64_t t, Ahead ahead) {
  const int8_t* w = a.w + m * a.K;
  const int8_t* q = a.q + t * a.K;
  __m256i acc[NR][NT];
#pragma GCC unroll 8
  for (int i = 0; i < NR * NT; ++i) acc[i / NT][i % NT] = _mm256_setzero_si256();
  const auto step = [&](auto load_columns) __attribute__((always_inline)) {
    __m256i x[NT];
#pragma GCC unroll 2
    for (int i = 0; i < NT; ++i) x[i] = load_columns(q + i * a.K);
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      const __m256i words = load_columns(w + r * a.K);
#pragma GCC unroll 2
      for (int i = 0; i < NT; ++i) acc[r][i] = _mm256_add_epi32(acc[r][i], _mm256_madd_epi16(words, x[i]));
    }
  };
  int64_t k = 0;
  for (; k + 16 <= a.K; k += 16) {
    if (NR == 4) ahead.next();  // four rows of 16 bytes are one line
    step([k](const int8_t* p) { return load_words(p + k); });
  }
  if (k < a.K) step([k, left = a.K - k](const int8_t* p) { return load_words(p + k, left); });
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < NT; ++i) {
      a.y[(t + i) * a.ldy + m + r] = (a.w_scale[m + r] * a.s[t + i]) * static_cast<float>(sum(acc[r][i]));
    }
  }
}

template <int NR>
void int8_rows(const Int8Args& a, int64_t m, Ahead ahead) {
  int64_t t = 0;
  for (; t + 2 <= a.n; t += 2) int8_tile<NR, 2>(a, m, t, ahead);
  if (t < a.n) int8_tile<NR, 1>(a, m, t, ahead);
}

}  // namespace

// Four tokens at stride K are few enough streams to be read in place.
size_t scaffold_pack_bytes(int64_t, int64_t) { return 0; }

void scaffold_pack(const int8_t*, int64_t, int64_t, void*) {}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (a.layout == 0) return canonical(a, m0, m1);
  const int64_t block0 = m0 / kTileRows, block1 = (m1 + kTileRows - 1) / kTileRows;
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    a.n == 1 ? one_token(a, plane, block0, block1) : many_tokens(a, plane, block0, block1);
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  int64_t m = m0;
  for (; m + 4 <= m1; m += 4) int8_rows<4>(a, m, Ahead(a.w + m * a.K));
  for (; m < m1; ++m) int8_rows<1>(a, m, Ahead(a.w + m * a.K));
}

}  // namespace dfssm::avx2
