// Integer matmuls for NEON with the matrix product (SMMLA: two rows by two tokens of eight columns, 32 products added to
// int32 lanes exactly) where there are tokens enough; else those of the dot product.
#include "neon-inl.h"

namespace dfssm::i8mm {
namespace {

// Products of a tile of two by two, {row 0, row 1} of token 0, then of token 1.
inline int32x4_t multiply(int32x4_t acc, int8x16_t tokens, int8x16_t rows) {
  return vmmlaq_s32(acc, tokens, rows);
}

// The four rows of a token: `even` is of rows 0 and 1, `odd` of rows 2 and 3.
inline int32x4_t rows_of(int token, int32x4_t even, int32x4_t odd) {
  return token == 0 ? vcombine_s32(vget_low_s32(even), vget_low_s32(odd))
                    : vcombine_s32(vget_high_s32(even), vget_high_s32(odd));
}

// ---- scaffold of layout 2 ----
//
// A byte, eight columns of one row, becomes eight bytes of 0 and -1 (TBL repeats it, CMTST tests its bits): 8 rows take
// eight instructions, and 16 SMMLA multiply them by eight tokens, 21 products an instruction. Look-ups do 16 products an
// instruction for any number of tokens.
constexpr int64_t kFewTokens = 3, kTokenTile = 8, kRows = 8;

// Packed activations: [tiles of tokens][K/8][8 tokens][8 columns], zeros for tokens that are not there.
inline int64_t token_tiles(int64_t n) { return (n + kTokenTile - 1) / kTokenTile; }

void token_tile(const ScaffoldArgs& a, const uint8_t* tile, int64_t plane, int64_t row, int64_t t0) {
  const auto* q = static_cast<const int8_t*>(a.packed) + t0 * a.K;
  const uint8x16_t bit_of_column = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  const uint8x16_t two_rows = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
  int32x4_t acc[4][4];  // pairs of tokens, pairs of rows
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) acc[i / 4][i % 4] = vdupq_n_s32(0);
  for (int64_t k = 0; k < a.K; k += 8, tile += kBlockRows, q += 8 * kTokenTile) {
    const uint8x16_t bytes = vcombine_u8(vld1_u8(tile), vdup_n_u8(0));
    int8x16_t tokens[4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) tokens[t] = vld1q_s8(q + 16 * t);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint8x16_t spread =
          vqtbl1q_u8(bytes, vaddq_u8(two_rows, vdupq_n_u8(static_cast<uint8_t>(2 * r))));
      const int8x16_t chosen = vreinterpretq_s8_u8(vtstq_u8(spread, bit_of_column));
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) acc[t][r] = multiply(acc[t][r], tokens[t], chosen);
    }
  }
  for (int t = 0; t < min(kTokenTile, a.n - t0); ++t) {
    const int32x4_t(&of)[4] = acc[t / 2];
    const int32x4_t positive[2] = {vnegq_s32(rows_of(t % 2, of[0], of[1])),
                                   vnegq_s32(rows_of(t % 2, of[2], of[3]))};
    finish(a, plane, row, t0 + t, positive);
  }
}

// ---- int8 ----

// Up to four rows from m on by NP pairs of tokens from t on. Rows and tokens that are not there repeat the last one, and
// are not stored.
constexpr int kPairs = 4;

template <int NP>
void int8_tile(const Int8Args& a, int64_t m, int64_t rows, int64_t t) {
  const int64_t tokens = min(2 * NP, a.n - t);
  const int8_t *w[4], *q[2 * NP];
  for (int r = 0; r < 4; ++r) w[r] = a.w + (m + min(r, rows - 1)) * a.K;
  for (int i = 0; i < 2 * NP; ++i) q[i] = a.q + (t + min(i, tokens - 1)) * a.K;
  int32x4_t acc[NP][2];
#pragma GCC unroll 8
  for (int i = 0; i < NP * 2; ++i) acc[i / 2][i % 2] = vdupq_n_s32(0);
  const auto step = [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    // Two rows of 16 columns as the first and the last eight of both.
    const auto halves = [=](const int8_t* const* two, int8x16_t(&out)[2]) __attribute__((always_inline)) {
      const int64x2_t x = vreinterpretq_s64_s8(load_bytes(two[0] + k, count)),
                      y = vreinterpretq_s64_s8(load_bytes(two[1] + k, count));
      out[0] = vreinterpretq_s8_s64(vzip1q_s64(x, y));
      out[1] = vreinterpretq_s8_s64(vzip2q_s64(x, y));
    };
    int8x16_t of_rows[2][2];
    halves(w, of_rows[0]);
    halves(w + 2, of_rows[1]);
#pragma GCC unroll 4
    for (int i = 0; i < NP; ++i) {
      int8x16_t of_tokens[2];
      halves(q + 2 * i, of_tokens);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        acc[i][j / 2] = multiply(acc[i][j / 2], of_tokens[j % 2], of_rows[j / 2][j % 2]);
    }
  };
  int64_t k = 0;
  for (; k + 16 <= a.K; k += 16) step(k, 16);
  if (k < a.K) step(k, a.K - k);
  for (int i = 0; i < tokens; ++i) finish(a, m, rows, t + i, rows_of(i % 2, acc[i / 2][0], acc[i / 2][1]));
}

using Int8Tile = void (*)(const Int8Args& a, int64_t m, int64_t rows, int64_t t);
constexpr Int8Tile kInt8Tiles[kPairs] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>};

inline bool multiplies(int layout, int64_t n) { return layout == 2 && n > kFewTokens; }

}  // namespace

size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  if (!multiplies(layout, n)) return dotprod::scaffold_pack_bytes(layout, n, K);
  return static_cast<size_t>(token_tiles(n) * kTokenTile * K);
}

void scaffold_pack(int layout, const int8_t* q, int64_t n, int64_t K, void* packed) {
  if (!multiplies(layout, n)) return dotprod::scaffold_pack(layout, q, n, K, packed);
  auto* out = static_cast<int8_t*>(packed);
  for (int64_t t0 = 0; t0 < n; t0 += kTokenTile) {
    for (int64_t k = 0; k < K; k += 8) {
      for (int64_t t = t0; t < t0 + kTokenTile; ++t, out += 8) {
        vst1_s8(out, t < n ? vld1_s8(q + t * K + k) : vdup_n_s8(0));
      }
    }
  }
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (!multiplies(a.layout, a.n)) return dotprod::scaffold_matmul(a, m0, m1);
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    for (int64_t row = m0; row < m1; row += kRows) {
      const uint8_t* tile = tiles_of(a, plane, row / kBlockRows * kBlockRows) + row % kBlockRows;
      for (int64_t t0 = 0; t0 < a.n; t0 += kTokenTile) token_tile(a, tile, plane, row, t0);
    }
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  if (a.n == 1) return dotprod::int8_matmul(a, m0, m1);
  for (int64_t m = m0; m < m1; m += 4) {
    for (int64_t t = 0; t < a.n; t += 2 * kPairs) {
      const int64_t pairs = min(kPairs, (a.n - t + 1) / 2);
      kInt8Tiles[pairs - 1](a, m, min(4, m1 - m), t);
    }
  }
}

}  // namespace dfssm::i8mm
