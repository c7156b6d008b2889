// Integer matmuls for NEON with the dot product (SDOT: four products of bytes added to each int32 lane, exactly).
#include "neon-inl.h"

namespace dfssm::dotprod {
namespace {

// ---- scaffold of layout 2: look-up ----
//
// A byte of a tile holds eight columns of one row, and each of its nibbles says which of four activations are added:
// it is an index to the 16 sums that there are. scaffold_pack writes these tables, one a group of four columns, of
// v = sum of the chosen q - sum of min(q, 0), which is 0 to 508, as the low five bits and the rest, bytes each. So a
// TBL looks up 16 rows at once, and bytes are added: 8 groups of the low parts, at most 248, and 16 of the high ones,
// at most 240, before they are widened. 64 weights take two TBL and two additions, where products with SDOT (layout
// 1) take four of these and four CMTST.

// Columns whose v an uint16 can add: 128 * 508 = 65024.
constexpr int64_t kGroups = 128, kGroupBytes = 32, kBlockColumns = 4 * kGroups;

// Tables [blocks of columns, n, kGroups, 2, 16], then the sums of min(q, 0), int32 [n].
inline int64_t column_blocks(int64_t K) { return (K + kBlockColumns - 1) / kBlockColumns; }
inline int64_t table_bytes(int64_t n, int64_t K) { return column_blocks(K) * n * kGroups * kGroupBytes; }

// Vectors of 16 rows in a block.
constexpr int kVectors = 4;

// sums[t] += v of the 64 rows over `groups` groups, a multiple of 8. `tables` are those of the block of columns,
// `stride` bytes from token to token.
template <int NT>
inline void look_up(const uint8_t* tables, int64_t stride, const uint8_t* tile, int64_t groups,
                    uint32x4_t (*sums)[4 * kVectors]) {
  uint16x8_t words[NT][2 * kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < NT * 2 * kVectors; ++i) words[i / (2 * kVectors)][i % (2 * kVectors)] = vdupq_n_u16(0);
  for (int64_t g = 0; g < groups;) {
    uint8x16_t high[NT][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < NT * kVectors; ++i) high[i / kVectors][i % kVectors] = vdupq_n_u8(0);
    for (const int64_t end = min(g + 16, groups); g < end;) {
      uint8x16_t low[NT][kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < NT * kVectors; ++i) low[i / kVectors][i % kVectors] = vdupq_n_u8(0);
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair, g += 2, tile += kBlockRows) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const uint8x16_t bytes = vld1q_u8(tile + 16 * v);
          const uint8x16_t index[2] = {vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)};
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
            for (int t = 0; t < NT; ++t) {
              const uint8_t* table = tables + t * stride + (g + i) * kGroupBytes;
              low[t][v] = vaddq_u8(low[t][v], vqtbl1q_u8(vld1q_u8(table), index[i]));
              high[t][v] = vaddq_u8(high[t][v], vqtbl1q_u8(vld1q_u8(table + 16), index[i]));
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < NT * kVectors; ++i) {
        const int t = i / kVectors, v = i % kVectors;
        words[t][2 * v] = vaddw_u8(words[t][2 * v], vget_low_u8(low[t][v]));
        words[t][2 * v + 1] = vaddw_high_u8(words[t][2 * v + 1], low[t][v]);
      }
    }
    const uint8x16_t weight = vdupq_n_u8(32);
#pragma GCC unroll 8
    for (int i = 0; i < NT * kVectors; ++i) {
      const int t = i / kVectors, v = i % kVectors;
      words[t][2 * v] = vmlal_u8(words[t][2 * v], vget_low_u8(high[t][v]), vget_low_u8(weight));
      words[t][2 * v + 1] = vmlal_high_u8(words[t][2 * v + 1], high[t][v], weight);
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int i = 0; i < 2 * kVectors; ++i) {
      sums[t][2 * i] = vaddw_u16(sums[t][2 * i], vget_low_u16(words[t][i]));
      sums[t][2 * i + 1] = vaddw_high_u16(sums[t][2 * i + 1], words[t][i]);
    }
  }
}

// Tokens whose sums are kept while a block of columns, 4 kB of bits, stays in cache; two share each load of bits.
constexpr int64_t kTokensAtOnce = 16;

void look_up_rows(const ScaffoldArgs& a, int64_t plane, int64_t row0, int64_t row1) {
  const auto* tables = static_cast<const uint8_t*>(a.packed);
  constexpr int64_t kStride = kGroups * kGroupBytes;
  const uint8_t* tile = tiles_of(a, plane, row0);
  for (int64_t row = row0; row < row1; row += kBlockRows, tile += kBlockRows * a.K / 8) {
    for (int64_t t0 = 0; t0 < a.n; t0 += kTokensAtOnce) {
      const int64_t t1 = min(t0 + kTokensAtOnce, a.n);
      uint32x4_t sums[kTokensAtOnce][4 * kVectors];
      for (int64_t t = t0; t < t1; ++t) {
        for (uint32x4_t& sum : sums[t - t0]) sum = vdupq_n_u32(0);
      }
      for (int64_t k = 0; k < a.K; k += kBlockColumns) {
        const int64_t groups = min(a.K - k, kBlockColumns) / 4;
        const uint8_t* columns = tile + k / 8 * kBlockRows;
        const uint8_t* of_block = tables + k / kBlockColumns * a.n * kStride;
        int64_t t = t0;
        for (; t + 2 <= t1; t += 2)
          look_up<2>(of_block + t * kStride, kStride, columns, groups, sums + (t - t0));
        if (t < t1) look_up<1>(of_block + t * kStride, kStride, columns, groups, sums + (t - t0));
      }
      for (int64_t t = t0; t < t1; ++t) {
        int32_t base;
        std::memcpy(&base, tables + table_bytes(a.n, a.K) + t * static_cast<int64_t>(sizeof base),
                    sizeof base);
        for (int v = 0; v < kVectors; ++v) {
          int32x4_t positive[4];
          for (int i = 0; i < 4; ++i) {
            positive[i] = vaddq_s32(vreinterpretq_s32_u32(sums[t - t0][4 * v + i]), vdupq_n_s32(base));
          }
          finish(a, plane, row + 16 * v, t, positive);
        }
      }
    }
  }
}

// ---- scaffold of layouts 1 and 0: products ----
//
// CMTST makes bytes of 0 and -1 of the bits under a mask, so that SDOT gives minus the sum of the chosen.

// Layout 1: of a tile of 16 rows and 32 columns, bit j of byte 4 * row + b is column 4 j + b.
constexpr int kTokenTile = 4;

template <int NT>
void token_tile(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0) {
  const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
  const int8_t* q = a.q + t0 * a.K;
  int32x4_t acc[NT][4];
#pragma GCC unroll 16
  for (int i = 0; i < NT * 4; ++i) acc[i / 4][i % 4] = vdupq_n_s32(0);
  for (int64_t k = 0; k < a.K; k += kTileColumns, tile += 64) {
    uint8x16_t bits[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) bits[v] = vld1q_u8(tile + 16 * v);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      int8x16_t x[NT];
#pragma GCC unroll 4
      for (int t = 0; t < NT; ++t) {
        int32_t four;
        std::memcpy(&four, q + t * a.K + k + 4 * j, sizeof four);
        x[t] = vreinterpretq_s8_s32(vdupq_n_s32(four));
      }
      const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(1 << j));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int8x16_t chosen = vreinterpretq_s8_u8(vtstq_u8(bits[v], mask));
#pragma GCC unroll 4
        for (int t = 0; t < NT; ++t) acc[t][v] = vdotq_s32(acc[t][v], chosen, x[t]);
      }
    }
  }
  for (int t = 0; t < NT; ++t) {
    for (int32x4_t& sum : acc[t]) sum = vnegq_s32(sum);
    finish(a, plane, block * kTileRows, t0 + t, acc[t]);
  }
}

using TokenTile = void (*)(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0);
constexpr TokenTile kTokenTiles[kTokenTile] = {token_tile<1>, token_tile<2>, token_tile<3>, token_tile<4>};

void tile_rows(const ScaffoldArgs& a, int64_t plane, int64_t m0, int64_t m1) {
  for (int64_t block = m0 / kTileRows; block * kTileRows < m1; ++block) {
    for (int64_t i = 0; i < tile_count(a.n, kTokenTile); ++i) {
      const int64_t t0 = tile_start(a.n, kTokenTile, i), t1 = tile_start(a.n, kTokenTile, i + 1);
      kTokenTiles[t1 - t0 - 1](a, plane, block, t0);
    }
  }
}

// 16 bits of a row at a time.
void canonical(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  const uint8x16_t byte_of_column = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
  const uint8x16_t bit_of_column = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  dfssm::canonical(a, m0, m1, [=](const uint8_t* bits, const int8_t* q) {
    int32x4_t acc = vdupq_n_s32(0);
    for (int64_t k = 0; k < a.K; k += 16) {
      uint16_t word;
      std::memcpy(&word, bits + k / 8, sizeof word);
      const uint8x16_t spread = vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(word)), byte_of_column);
      acc = vdotq_s32(acc, vreinterpretq_s8_u8(vtstq_u8(spread, bit_of_column)), vld1q_s8(q + k));
    }
    return -vaddvq_s32(acc);
  });
}

// ---- int8 ----

// Up to four rows from m on by NT tokens. Rows that are not there repeat the last one, and are not stored.
template <int NT>
void int8_tile(const Int8Args& a, int64_t m, int64_t rows, int64_t t) {
  const int8_t* w[4];
  for (int r = 0; r < 4; ++r) w[r] = a.w + (m + min(r, rows - 1)) * a.K;
  const int8_t* q = a.q + t * a.K;
  int32x4_t acc[NT][4];
#pragma GCC unroll 16
  for (int i = 0; i < NT * 4; ++i) acc[i / 4][i % 4] = vdupq_n_s32(0);
  const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    int8x16_t x[NT];
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) x[i] = load_bytes(q + i * a.K + k, count);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int8x16_t row = load_bytes(w[r] + k, count);
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[i][r] = vdotq_s32(acc[i][r], row, x[i]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= a.K; k += 16) step(k, 16);
  if (k < a.K) step(k, a.K - k);
#pragma GCC unroll 4
  for (int i = 0; i < NT; ++i) {
    const int32x4_t dots = vpaddq_s32(vpaddq_s32(acc[i][0], acc[i][1]), vpaddq_s32(acc[i][2], acc[i][3]));
    finish(a, m, rows, t + i, dots);
  }
}

using Int8Tile = void (*)(const Int8Args& a, int64_t m, int64_t rows, int64_t t);
constexpr Int8Tile kInt8Tiles[kTokenTile] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>};

}  // namespace

size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  return layout == 2 ? static_cast<size_t>(table_bytes(n, K)) + static_cast<size_t>(n) * sizeof(int32_t) : 0;
}

void scaffold_pack(int, const int8_t* q, int64_t n, int64_t K, void* packed) {
  auto* tables = static_cast<uint8_t*>(packed);
  // Of each of four columns, whether a choice has it: of the choices 0 to 7, and of 8 to 15.
  uint16x8_t chosen[2][4];
  for (int i = 0; i < 8; ++i) {
    const uint16x8_t choice =
        vaddq_u16(vcombine_u16(vcreate_u16(0x0003000200010000), vcreate_u16(0x0007000600050004)),
                  vdupq_n_u16(static_cast<uint16_t>(i / 4 * 8)));
    chosen[i / 4][i % 4] = vtstq_u16(choice, vdupq_n_u16(static_cast<uint16_t>(1 << i % 4)));
  }
  for (int64_t t = 0; t < n; ++t, q += K) {
    int32_t base = 0;
    for (int64_t g = 0; g < K / 4; ++g) {
      int16_t least = 0;
      for (int i = 0; i < 4; ++i) least = static_cast<int16_t>(least + min(q[4 * g + i], 0));
      base += least;
      uint8x8_t low[2], high[2];
      for (int half = 0; half < 2; ++half) {
        int16x8_t v = vdupq_n_s16(static_cast<int16_t>(-least));
        for (int i = 0; i < 4; ++i) {
          v = vaddq_s16(v, vandq_s16(vreinterpretq_s16_u16(chosen[half][i]), vdupq_n_s16(q[4 * g + i])));
        }
        const uint16x8_t words = vreinterpretq_u16_s16(v);
        low[half] = vmovn_u16(vandq_u16(words, vdupq_n_u16(31)));
        high[half] = vshrn_n_u16(words, 5);
      }
      uint8_t* table = tables + ((g / kGroups * n + t) * kGroups + g % kGroups) * kGroupBytes;
      vst1q_u8(table, vcombine_u8(low[0], low[1]));
      vst1q_u8(table + 16, vcombine_u8(high[0], high[1]));
    }
    std::memcpy(tables + table_bytes(n, K) + t * static_cast<int64_t>(sizeof base), &base, sizeof base);
  }
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (a.layout == 0) return canonical(a, m0, m1);
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    a.layout == 2 ? look_up_rows(a, plane, m0, m1) : tile_rows(a, plane, m0, m1);
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; m += 4) {
    for (int64_t i = 0; i < tile_count(a.n, kTokenTile); ++i) {
      const int64_t t0 = tile_start(a.n, kTokenTile, i), t1 = tile_start(a.n, kTokenTile, i + 1);
      kInt8Tiles[t1 - t0 - 1](a, m, min(4, m1 - m), t0);
    }
  }
}

}  // namespace dfssm::dotprod
