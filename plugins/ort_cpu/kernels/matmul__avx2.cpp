// Integer matmuls for AVX2. Without VNNI the byte product VPMADDUBSW adds two products into an int16 that
// saturates: every use below says why it cannot.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matmul-inl.h"
#include "simd__avx2.h"

namespace dfssm::avx2 {
namespace {

using dfssm::min;  // of integers, beside that of vectors

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline __m256i broadcast4(const int8_t* q) { return _mm256_set1_epi32(*reinterpret_cast<const Dword*>(q)); }

// acc += pairs of u8 * s8, in int16; acc += table[index], bytes. Inline assembly because gcc 12 gives the sum of the
// intrinsics a register of its own and spills half of the accumulators.
#ifdef __AVX2__
inline void dot_words(__m256i& acc, __m256i u8, __m256i s8) {
  __m256i products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(u8), "x"(s8));
}
inline void add_looked_up(__m256i& acc, __m256i table, __m256i index) {
  __m256i found;
  asm("vpshufb %3, %2, %1\n\tvpaddb %1, %0, %0" : "+x"(acc), "=&x"(found) : "x"(table), "x"(index));
}
#else  // the same over a simulation of the intrinsics
inline void dot_words(__m256i& acc, __m256i u8, __m256i s8) {
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(u8, s8));
}
inline void add_looked_up(__m256i& acc, __m256i table, __m256i index) {
  acc = _mm256_add_epi8(acc, _mm256_shuffle_epi8(table, index));
}
#endif

// int16 pairs added into int32 lanes
inline __m256i widen(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

// ---- scaffold ----

// (scale * s) * (2 * positive - sum) of one plane and token for NV times eight rows from `row` on; the first plane
// brings the low-rank correction and the others add to it. The rows' sums over the ranks are independent of each other:
// one after the other each addition would wait for the one before.
template <int NV>
inline void finish(const ScaffoldArgs& a, int64_t plane, int64_t row, int64_t t, const __m256i* positive) {
  const int64_t rows_of_block = block_rows(a.layout);
  const bool corrected = plane == 0 && a.R > 0;
  __m256 correction[NV];
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) correction[i] = _mm256_setzero_ps();
  if (corrected) {
    const int8_t* up = a.up + row / rows_of_block * a.R * rows_of_block;
    const float* h = a.h + t * a.R;
    for (int64_t r = 0; r < a.R; ++r, up += rows_of_block) {
      const __m256 factor = _mm256_set1_ps(h[r]);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) {
        correction[i] = _mm256_fmadd_ps(load(up + 8 * i, Full{}), factor, correction[i]);
      }
    }
  }
  const __m256 s = _mm256_set1_ps(a.s[t]);
  const __m256i sum = _mm256_set1_epi32(a.sum[t]);
  const auto eight_rows = [&](int i, auto lanes) __attribute__((always_inline)) {
    const int64_t at = row + 8 * i;
    const __m256i signed_sum = _mm256_sub_epi32(_mm256_add_epi32(positive[i], positive[i]), sum);
    __m256 y = load(a.scale + plane * a.M + at, lanes) * s * _mm256_cvtepi32_ps(signed_sum);
    float* out = a.y + t * a.ldy + at;
    if (plane > 0) y = y + load(out, lanes);
    if (corrected) y = fma(load(a.up_scale + at, lanes), correction[i], y);
    store(out, y, lanes);
  };
  for (int i = 0; i < NV && row + 8 * i < a.M; ++i) {
    const int64_t left = a.M - row - 8 * i;
    left >= 8 ? eight_rows(i, Full{}) : eight_rows(i, first_lanes(left));
  }
}

// One token. Each half of a tile is split into nibbles; a nibble byte ANDed with 1 << j holds 2^j times its
// bit, and the four powers keep an int16 accumulator each. A tile adds at most 2 nibbles * 2 products * 8 *
// 127 = 4064 to the largest, so eight tiles (32512) fit; exact right shifts then fold the four, every partial
// sum again at most 32512, into int32.
constexpr int kTilesPerFold = 8;

template <class Prefetch>
void one_token(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1, Prefetch ahead) {
  const int64_t columns = a.K / kTileColumns;
  const uint8_t* tile = tiles_of(a, plane, block0 * kTileRows);
  for (int64_t block = block0; block < block1; ++block) {
    const int8_t* q = a.q;
    __m256i positive[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t c = 0; c < columns; c += kTilesPerFold) {
      __m256i acc[2][4];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] = _mm256_setzero_si256();
      for (int64_t end = min(c + kTilesPerFold, columns), i = c; i < end;
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
    finish<2>(a, plane, block * kTileRows, 0, positive);
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
  const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
  const int8_t* q = a.q + t0 * a.K;
  __m256i positive[NT][2];
  for (int i = 0; i < NT * 2; ++i) positive[i / 2][i % 2] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += kTilesPerWiden) {
    __m256i acc[NT][2];
#pragma GCC unroll 8
    for (int i = 0; i < NT * 2; ++i) acc[i / 2][i % 2] = _mm256_setzero_si256();
    for (int64_t end = min(c + kTilesPerWiden, columns), i = c; i < end; ++i, tile += 64) {
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
  for (int i = 0; i < NT; ++i) finish<2>(a, plane, block * kTileRows, t0 + i, positive[i]);
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

// ---- scaffold of layout 2: look-up ----
//
// A byte of a tile holds eight columns of one row, and each of its nibbles says which of four activations are added:
// it is an index to the 16 sums that there are. scaffold_pack writes these tables, one a group of four columns, of
// v = sum of the chosen q - sum of min(q, 0), which is 0 to 508, as the low five bits and the rest, bytes each. So a
// VPSHUFB looks up 32 rows at once, and bytes are added: 8 groups of the low parts, at most 248, and 16 of the high
// ones, at most 240, before they are widened.

// Columns whose v an uint16 can add: 128 * 508 = 65024.
constexpr int64_t kGroups = 128, kGroupBytes = 32, kBlockColumns = 4 * kGroups;

// Tables [blocks of columns, n, kGroups, 2, 16], then the sums of min(q, 0), int32 [n].
inline int64_t column_blocks(int64_t K) { return (K + kBlockColumns - 1) / kBlockColumns; }
inline int64_t table_bytes(int64_t n, int64_t K) { return column_blocks(K) * n * kGroups * kGroupBytes; }

inline __m256i table_at(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

// Sums of bytes of 32 rows, as uint16: of all pairs of bytes, modulo 2^16, and of the odd ones alone.
struct PairSums {
  __m256i pairs = _mm256_setzero_si256(), odd = _mm256_setzero_si256();

  inline void add(__m256i bytes) {
    pairs = _mm256_add_epi16(pairs, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  inline __m256i even() const { return _mm256_sub_epi16(pairs, _mm256_slli_epi16(odd, 8)); }
};

// sums[i] += 2^shift of the rows 8 i to 8 i + 7, of 32 whose even and odd ones are given as uint16.
template <int shift>
inline void add_rows(__m256i even, __m256i odd, __m256i* sums) {
  const __m256i words[2] = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
  // The rows of words[0] are 0 to 7 and 16 to 23, those of words[1] 8 to 15 and 24 to 31.
#pragma GCC unroll 4
  for (int eight = 0; eight < 4; ++eight) {
    const __m256i of = words[eight % 2];
    const __m128i rows = eight < 2 ? _mm256_castsi256_si128(of) : _mm256_extracti128_si256(of, 1);
    sums[eight] = _mm256_add_epi32(sums[eight], _mm256_slli_epi32(_mm256_cvtepu16_epi32(rows), shift));
  }
}

// sums[t][i] += v of the rows 8 i to 8 i + 7 over `groups` groups, a multiple of 8. tables[t] are those of the block of
// columns, and `index_of` has the indices [groups, 64] of the rows. A group's tables, an index and the sums of bytes of two
// tokens are in 14 of the 16 registers: so a group takes both halves before the next.
template <int NT>
inline void look_up(const uint8_t* const (&tables)[NT], int64_t groups, const uint8_t* index_of,
                    __m256i (*sums)[8]) {
  PairSums low_sums[NT][2], high_sums[NT][2];
  for (int64_t g = 0; g < groups;) {
    __m256i high[NT][2];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * NT; ++i) high[i / 2][i % 2] = _mm256_setzero_si256();
    for (const int64_t end = min(g + 16, groups); g < end;) {
      __m256i low[NT][2];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, ++g) {
        __m256i table[NT][2];
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          table[t][0] = table_at(tables[t] + g * kGroupBytes);
          table[t][1] = table_at(tables[t] + g * kGroupBytes + 16);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i index = load(index_of + g * kBlockRows + 32 * half);
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) {
            if (i == 0) {
              low[t][half] = _mm256_shuffle_epi8(table[t][0], index);
            } else {
              add_looked_up(low[t][half], table[t][0], index);
            }
            add_looked_up(high[t][half], table[t][1], index);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 2 * NT; ++i) low_sums[i / 2][i % 2].add(low[i / 2][i % 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * NT; ++i) high_sums[i / 2][i % 2].add(high[i / 2][i % 2]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 2 * NT; ++i) {
    const int t = i / 2, half = i % 2;
    const PairSums &low = low_sums[t][half], &high = high_sums[t][half];
    add_rows<0>(_mm256_add_epi16(low.even(), _mm256_slli_epi16(high.even(), 5)),
                _mm256_add_epi16(low.odd, _mm256_slli_epi16(high.odd, 5)), sums[t] + 4 * half);
  }
}

// Groups of the block of columns from column k on.
inline int64_t groups_from(const ScaffoldArgs& a, int64_t k) { return min(a.K - k, kBlockColumns) / 4; }

inline const uint8_t* tables_of(const ScaffoldArgs& a, int64_t k, int64_t t) {
  return static_cast<const uint8_t*>(a.packed) + (k / kBlockColumns * a.n + t) * kGroups * kGroupBytes;
}

// The rows of one block, all their columns added up.
inline void finish_block(const ScaffoldArgs& a, int64_t plane, int64_t row, int64_t t, __m256i (&sums)[8]) {
  int32_t base;
  std::memcpy(&base, static_cast<const char*>(a.packed) + table_bytes(a.n, a.K) + t * sizeof base,
              sizeof base);
  for (__m256i& sum : sums) sum = _mm256_add_epi32(sum, _mm256_set1_epi32(base));
  finish<8>(a, plane, row, t, sums);
}

// Columns over which an uint16 can add the low parts of v, at most 31 a group, of one token, whose tables lie one after
// the other: 2048 * 31 = 63488.
constexpr int64_t kTokenColumns = 4 * 2048;

// One token: both nibbles of a byte are looked up where it is loaded.
template <class Prefetch>
void look_up_one_token(const ScaffoldArgs& a, int64_t plane, int64_t row0, int64_t row1, Prefetch ahead) {
  const uint8_t* tile = tiles_of(a, plane, row0);
  for (int64_t row = row0; row < row1; row += kBlockRows) {
    const uint8_t* table = static_cast<const uint8_t*>(a.packed);
    __m256i sums[8] = {};
    for (int64_t k = 0; k < a.K;) {
      PairSums low_sums[2], high_sums[2];
      for (const int64_t block = min(k + kTokenColumns, a.K); k < block;) {
        __m256i high[2] = {};
        for (const int64_t end = min(k + 64, block); k < end; k += 32) {
          __m256i low[2] = {};
#pragma GCC unroll 4
          for (int byte = 0; byte < 4; ++byte, tile += kBlockRows, table += 2 * kGroupBytes) {
            ahead.next();
            const __m256i of_low[2] = {table_at(table), table_at(table + 16)},
                          of_high[2] = {table_at(table + 32), table_at(table + 48)};
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const __m256i bytes = load(tile + 32 * half), first = low_nibbles(bytes),
                            second = low_nibbles(_mm256_srli_epi16(bytes, 4));
              add_looked_up(low[half], of_low[0], first);
              add_looked_up(high[half], of_low[1], first);
              add_looked_up(low[half], of_high[0], second);
              add_looked_up(high[half], of_high[1], second);
            }
          }
          for (int half = 0; half < 2; ++half) low_sums[half].add(low[half]);
        }
        for (int half = 0; half < 2; ++half) high_sums[half].add(high[half]);
      }
      for (int half = 0; half < 2; ++half) {
        add_rows<0>(low_sums[half].even(), low_sums[half].odd, sums + 4 * half);
        add_rows<5>(high_sums[half].even(), high_sums[half].odd, sums + 4 * half);
      }
    }
    finish_block(a, plane, row, 0, sums);
  }
}

// Two or more tokens: the nibbles of a block of columns are taken apart once for so many of them, whose tables stay in L2
// while all rows pass by.
constexpr int64_t kTokensAtOnce = 16, kCachedTables = 1 << 18;

template <int NT>
void look_up_tokens(const ScaffoldArgs& a, int64_t k, int64_t t, const uint8_t* index, __m256i (*sums)[8]) {
  const uint8_t* tables[NT];
  for (int i = 0; i < NT; ++i) tables[i] = tables_of(a, k, t + i);
  look_up<NT>(tables, groups_from(a, k), index, sums);
}

template <class Prefetch>
void look_up_many_tokens(const ScaffoldArgs& a, int64_t plane, int64_t row0, int64_t row1, Prefetch ahead) {
  const int64_t fit = kCachedTables / (a.K / 4 * kGroupBytes) / 2 * 2;
  const int64_t at_once = fit < 2 ? 2 : min(fit, kTokensAtOnce);
  for (int64_t t0 = 0; t0 < a.n; t0 += at_once) {
    const int64_t t1 = min(t0 + at_once, a.n);
    const uint8_t* tile = tiles_of(a, plane, row0);
    for (int64_t row = row0; row < row1; row += kBlockRows, tile += kBlockRows * a.K / 8) {
      __m256i sums[kTokensAtOnce][8] = {};
      for (int64_t k = 0; k < a.K; k += kBlockColumns) {
        alignas(32) uint8_t index[kGroups * kBlockRows];
        for (int64_t pair = 0; pair < groups_from(a, k) / 2; ++pair) {
          if (t0 == 0) ahead.next();
          for (int half = 0; half < 2; ++half) {
            const __m256i bytes = load(tile + (k / 8 + pair) * kBlockRows + 32 * half);
            uint8_t* p = index + pair * 2 * kBlockRows + 32 * half;
            store(p, low_nibbles(bytes));
            store(p + kBlockRows, low_nibbles(_mm256_srli_epi16(bytes, 4)));
          }
        }
        int64_t t = t0;
        for (; t + 2 <= t1; t += 2) look_up_tokens<2>(a, k, t, index, sums + (t - t0));
        if (t < t1) look_up_tokens<1>(a, k, t, index, sums + (t - t0));
      }
      for (int64_t t = t0; t < t1; ++t) finish_block(a, plane, row, t, sums[t - t0]);
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

inline __m256i load(const int8_t* p, int64_t count) {
  alignas(32) int8_t buffer[32] = {};
  std::memcpy(buffer, p, count);
  return load(buffer);
}

// Rows [m, m + NR * stride) in steps of `stride` by tokens [t, t + NT). VPMADDUBSW takes |w| and q with the sign of w:
// two products are at most 2 * 128 * 127 = 32512, and are widened before others are added.
template <int NR, int NT>
void int8_tile(const Int8Args& a, int64_t m, int64_t stride, int64_t t) {
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
      const __m256i bytes = load_columns(w + r * stride * a.K), magnitude = _mm256_abs_epi8(bytes);
#pragma GCC unroll 2
      for (int i = 0; i < NT; ++i) {
        const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x[i], bytes));
        acc[r][i] = _mm256_add_epi32(acc[r][i], widen(products));
      }
    }
  };
  int64_t k = 0;
  for (; k + 32 <= a.K; k += 32) step([k](const int8_t* p) { return load(p + k); });
  if (k < a.K) step([k, left = a.K - k](const int8_t* p) { return load(p + k, left); });
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
    for (int i = 0; i < NT; ++i) {
      const int64_t row = m + r * stride;
      a.y[(t + i) * a.ldy + row] = (a.w_scale[row] * a.s[t + i]) * static_cast<float>(sum(acc[r][i]));
    }
  }
}

template <int NR>
void int8_rows(const Int8Args& a, int64_t m, int64_t stride) {
  int64_t t = 0;
  for (; t + 2 <= a.n; t += 2) int8_tile<NR, 2>(a, m, stride, t);
  if (t < a.n) int8_tile<NR, 1>(a, m, stride, t);
}

}  // namespace

// Layout 1 needs none: four tokens at stride K are few enough streams to be read in place.
size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  return layout == 2 ? static_cast<size_t>(table_bytes(n, K)) + static_cast<size_t>(n) * sizeof(int32_t) : 0;
}

void scaffold_pack(int, const int8_t* q, int64_t n, int64_t K, void* packed) {
  auto* tables = static_cast<uint8_t*>(packed);
  // v = sum of |q| over the columns that a choice has and whose q > 0, or has not and whose q < 0: a byte product of
  // |q| with choices whose bits are flipped where q < 0. The words of two products, added in pairs, are those of
  // choices 0 to 15 in order.
  alignas(32) uint8_t choices[2][32];
  for (int i = 0; i < 64; ++i) choices[i / 16 % 2][i / 32 * 16 + i % 16] = i / 4 >> (i % 4) & 1;
  const __m256i first = load(choices[0]), second = load(choices[1]);
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi8(1);
  for (int64_t t = 0; t < n; ++t, q += K) {
    __m256i base = zero;
    for (int64_t k = 0; k < K; k += 32) {
      const __m256i x = load(q + k);
      base = _mm256_add_epi32(base, widen(_mm256_maddubs_epi16(ones, _mm256_min_epi8(x, zero))));
      alignas(32) int8_t magnitude[32], flip[32];
      store(magnitude, _mm256_abs_epi8(x));
      store(flip, _mm256_and_si256(_mm256_cmpgt_epi8(zero, x), ones));
      uint8_t* table = tables + ((k / kBlockColumns * n + t) * kGroups + k / 4 % kGroups) * kGroupBytes;
#pragma GCC unroll 2
      for (int g = 0; g < 8; ++g, table += kGroupBytes) {
        const __m256i m = broadcast4(magnitude + 4 * g), flips = broadcast4(flip + 4 * g);
        const __m256i v = _mm256_hadd_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(first, flips), m),
                                            _mm256_maddubs_epi16(_mm256_xor_si256(second, flips), m));
        const __m256i low = _mm256_and_si256(v, _mm256_set1_epi16(31)), high = _mm256_srli_epi16(v, 5);
        store(table, _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8));
      }
    }
    const int32_t sum_of_least = sum(base);
    std::memcpy(tables + table_bytes(n, K) + t * static_cast<int64_t>(sizeof sum_of_least), &sum_of_least,
                sizeof sum_of_least);
  }
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (a.layout == 0) return canonical(a, m0, m1);
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    with_prefetch(tiles_of(a, plane, m0), [&](auto ahead) {
      if (a.layout == 2) {
        a.n == 1 ? look_up_one_token(a, plane, m0, m1, ahead) : look_up_many_tokens(a, plane, m0, m1, ahead);
      } else {
        const int64_t block0 = m0 / kTileRows, block1 = (m1 + kTileRows - 1) / kTileRows;
        a.n == 1 ? one_token(a, plane, block0, block1, ahead) : many_tokens(a, plane, block0, block1);
      }
    });
  }
}

// Four rows at once, each of another quarter of the range: one core of a Zen 3 reads 20 GB/s in four streams far from
// each other, 15 in four neighbouring rows with prefetches in order, 11 without.
void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  const int64_t quarter = (m1 - m0) / 4;
  for (int64_t m = m0; m < m0 + quarter; ++m) int8_rows<4>(a, m, quarter);
  for (int64_t m = m0 + 4 * quarter; m < m1; ++m) int8_rows<1>(a, m, 1);
}

}  // namespace dfssm::avx2
