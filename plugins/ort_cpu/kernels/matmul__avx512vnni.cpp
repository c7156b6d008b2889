// Integer matmuls for AVX-512 VNNI. VPDPBUSD multiplies four unsigned by four signed bytes a lane and adds
// them to an int32 lane without saturating, so every sum below is exact.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "finish__avx512vnni.h"
#include "matmul-inl.h"

namespace dfssm::avx512vnni {
namespace {

#ifdef __AVX512VNNI__
// Inline assembly because gcc 12 copies the accumulator of the intrinsic through spare registers and spills.
inline void dot(__m512i& acc, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}
inline void dot_broadcast(__m512i& acc, __m512i u8, const int8_t* s8) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u8), "m"(*reinterpret_cast<const Dword*>(s8)));
}
#else  // over a simulation of the intrinsics (tests/tools/simulated_avx512)
inline void dot(__m512i& acc, __m512i u8, __m512i s8) { acc = _mm512_dpbusd_epi32(acc, u8, s8); }
inline void dot_broadcast(__m512i& acc, __m512i u8, const int8_t* s8) {
  dot(acc, u8, _mm512_set1_epi32(*reinterpret_cast<const Dword*>(s8)));
}
#endif

// ---- scaffold ----

// Few tokens: a tile ANDed with 1 << j holds 2^j times bit j of every byte, ready to be multiplied; eight
// accumulators a token keep the powers apart until exact right shifts fold them. No shift, no expansion: 8
// AND + 8 VPDPBUSD a token and 64-byte tile. Registers: 8 NB NT accumulators, 8 masks, NB tiles and their AND;
// NB * NT = 3 would spill.
constexpr int kFewTokens = 2;

template <int NB, int NT, class Prefetch>
void few_tokens(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1, Prefetch ahead) {
  __m512i mask[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) mask[j] = _mm512_set1_epi8(static_cast<char>(1 << j));
  const int64_t block_bytes = kTileRows * a.K / 8;
  for (int64_t block = block0; block + NB <= block1; block += NB) {
    const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
    const int8_t* q = a.q;
    __m512i acc[NB][NT][8];
#pragma GCC unroll 16
    for (int i = 0; i < NB * NT * 8; ++i) acc[i / 8 / NT][i / 8 % NT][i % 8] = _mm512_setzero_si512();
    for (int64_t c = a.K / kTileColumns; c > 0; --c, tile += 64, q += kTileColumns) {
      __m512i bits[NB];
#pragma GCC unroll 2
      for (int b = 0; b < NB; ++b) {
        ahead.next();
        bits[b] = _mm512_loadu_si512(tile + b * block_bytes);
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 2
        for (int b = 0; b < NB; ++b) {
          const __m512i u8 = _mm512_and_si512(bits[b], mask[j]);
#pragma GCC unroll 2
          for (int t = 0; t < NT; ++t) dot_broadcast(acc[b][t][j], u8, q + t * a.K + 4 * j);
        }
      }
    }
#pragma GCC unroll 2
    for (int b = 0; b < NB; ++b) {
      __m512i positive[NT];
#pragma GCC unroll 2
      for (int t = 0; t < NT; ++t) {
        positive[t] = acc[b][t][7];
#pragma GCC unroll 8
        for (int j = 6; j >= 0; --j)
          positive[t] = _mm512_add_epi32(acc[b][t][j], _mm512_srai_epi32(positive[t], 1));
      }
      finish<NT>(a, plane, block + b, 0, positive);
    }
  }
}

// One token by pairs of blocks, prefetched into L2: one core of a Zen 4 goes through all bits of 1.3B in 5.8 ms, by single
// ones in 7.0, prefetched past the caches; pairs prefetched into L1, or less than 12 KB ahead, take 7.2 to 12. On Intel not
// measured.
void one_token(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1) {
  const int64_t even = block1 - (block1 - block0) % 2;
  few_tokens<2, 1>(a, plane, block0, even, IntoL2(tiles_of(a, plane, block0 * kTileRows)));
  few_tokens<1, 1>(a, plane, even, block1, NoPrefetch());
}

// Many tokens: each tile is expanded to bytes of 0 and 1 in registers, once for NB * NT products. Packed
// activations are [K/4, NT] dwords a token tile, so that one tile is one stream. Registers: NB * NT <= 24
// accumulators, NB tiles, NB expanded tiles, the mask of ones.
constexpr int kTokenTile = 12;

// `ahead` is prefetched, and `stride` bytes further for each line that is read. Three or four tokens, which read their
// weights from memory as one does, take 0.7 times as long with it.
template <int NB, int NT>
void token_tile(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0, const uint8_t* ahead,
                int64_t stride) {
  const __m512i ones = _mm512_set1_epi8(1);
  const int64_t block_bytes = kTileRows * a.K / 8;
  const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
  const int8_t* q = static_cast<const int8_t*>(a.packed) + t0 * a.K;
  __m512i acc[NB][NT];
#pragma GCC unroll 24
  for (int i = 0; i < NB * NT; ++i) acc[i / NT][i % NT] = _mm512_setzero_si512();
  for (int64_t c = a.K / kTileColumns; c > 0; --c, tile += 64) {
    __m512i bits[NB];
#pragma GCC unroll 2
    for (int b = 0; b < NB; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      ahead += stride;
      bits[b] = _mm512_loadu_si512(tile + b * block_bytes);
    }
#pragma GCC unroll 1
    for (int j = 0; j < 8; ++j, q += 4 * NT) {
      __m512i u8[NB];
#pragma GCC unroll 2
      for (int b = 0; b < NB; ++b) {
        u8[b] = _mm512_and_si512(bits[b], ones);
        bits[b] = _mm512_srli_epi32(bits[b], 1);
      }
#pragma GCC unroll 12
      for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 2
        for (int b = 0; b < NB; ++b) dot_broadcast(acc[b][t], u8[b], q + 4 * t);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < NB * NT; ++i) finish<1>(a, plane, block + i / NT, t0 + i % NT, &acc[i / NT][i % NT]);
}

using TokenTile = void (*)(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0,
                           const uint8_t* ahead, int64_t stride);
constexpr TokenTile kTokenTiles[2][kTokenTile + 1] = {
    {nullptr, nullptr, nullptr, token_tile<1, 3>, token_tile<1, 4>, token_tile<1, 5>, token_tile<1, 6>,
     token_tile<1, 7>, token_tile<1, 8>, token_tile<1, 9>, token_tile<1, 10>, token_tile<1, 11>,
     token_tile<1, 12>},
    {nullptr, nullptr, nullptr, token_tile<2, 3>, token_tile<2, 4>, token_tile<2, 5>, token_tile<2, 6>,
     token_tile<2, 7>, token_tile<2, 8>, token_tile<2, 9>, token_tile<2, 10>, token_tile<2, 11>,
     token_tile<2, 12>},
};

// First token of tile i when n tokens are cut into as few tiles as possible, all nearly equal: for n >
// kFewTokens none has fewer than 3 tokens.
inline int64_t tile_count(int64_t n) { return (n + kTokenTile - 1) / kTokenTile; }
inline int64_t tile_start(int64_t n, int64_t i) { return n * i / tile_count(n); }

void many_tokens(const ScaffoldArgs& a, int64_t plane, int64_t block0, int64_t block1) {
  for (int64_t block = block0; block < block1; block += 2) {
    const int64_t blocks = min(2, block1 - block);
    const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
    for (int64_t i = 0; i < tile_count(a.n); ++i) {
      const int64_t t0 = tile_start(a.n, i), t1 = tile_start(a.n, i + 1);
      // Tiles after the first find the weights in cache: one line, again and again.
      kTokenTiles[blocks - 1][t1 - t0](a, plane, block, t0, tile + (i == 0 ? 12 << 10 : 0), i == 0 ? 64 : 0);
    }
  }
}

// A row's bits are a byte mask of the activations.
void canonical(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  const __m512i ones = _mm512_set1_epi8(1);
  dfssm::canonical(a, m0, m1, [=](const uint8_t* bits, const int8_t* q) {
    __m512i acc = _mm512_setzero_si512();
    for (int64_t k = 0; k < a.K; k += 64) {
      const int64_t bytes = min(8, (a.K - k) / 8);  // the last step may be half: K % 64 may be 32
      uint64_t mask = 0;
      std::memcpy(&mask, bits + k / 8, bytes);
      dot(acc, ones, _mm512_maskz_loadu_epi8(mask, q + k));
    }
    return _mm512_reduce_add_epi32(acc);
  });
}

// ---- int8 ----

// The sums of four vectors, side by side.
inline __m128i sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

struct Full {};  // all 64 columns of a step
inline __m512i load_columns(const int8_t* p, Full) { return _mm512_loadu_si512(p); }
inline __m512i load_columns(const int8_t* p, __mmask64 lanes) { return _mm512_maskz_loadu_epi8(lanes, p); }

// NR rows from m on, `stride` apart, by tokens [t, t + NT). VPDPBUSD wants one unsigned side: w ^ 0x80 is w + 128, and
// 128 * sum(q) is taken off at the end.
template <int NR, int NT, class Prefetch>
void int8_tile(const Int8Args& a, int64_t m, int64_t stride, int64_t t, Prefetch ahead) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t* w = a.w + m * a.K;
  const int8_t* q = a.q + t * a.K;
  __m512i acc[NR][NT];
#pragma GCC unroll 24
  for (int i = 0; i < NR * NT; ++i) acc[i / NT][i % NT] = _mm512_setzero_si512();
  const auto step = [&](int64_t k, auto lanes) __attribute__((always_inline)) {
    __m512i u8[NR];
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      ahead.next();
      u8[r] = _mm512_xor_si512(load_columns(w + r * stride * a.K + k, lanes), flip);
    }
#pragma GCC unroll 6
    for (int i = 0; i < NT; ++i) {
      const __m512i s8 = load_columns(q + i * a.K + k, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) dot(acc[r][i], u8[r], s8);
    }
  };
  int64_t k = 0;
  for (; k + 64 <= a.K; k += 64) step(k, Full{});
  if (k < a.K) step(k, ~__mmask64{0} >> (64 - (a.K - k)));
#pragma GCC unroll 6
  for (int i = 0; i < NT; ++i) {
    float* y = a.y + (t + i) * a.ldy + m;
    if constexpr (NR % 4 == 0) {
      const __m128i shifted = _mm_set1_epi32(128 * a.sum[t + i]);
#pragma GCC unroll 2
      for (int r = 0; r < NR; r += 4) {
        const __m128i dots = sums(acc[r][i], acc[r + 1][i], acc[r + 2][i], acc[r + 3][i]);
        const float* of_row = a.w_scale + m + r * stride;
        const __m128 w_scale =
            stride == 1 ? _mm_loadu_ps(of_row)
                        : _mm_set_ps(of_row[3 * stride], of_row[2 * stride], of_row[stride], *of_row);
        const __m128 scale = _mm_mul_ps(w_scale, _mm_set1_ps(a.s[t + i]));
        const __m128 found = _mm_mul_ps(scale, _mm_cvtepi32_ps(_mm_sub_epi32(dots, shifted)));
        if (stride == 1) {
          _mm_storeu_ps(y + r, found);
        } else {
          alignas(16) float row[4];
          _mm_store_ps(row, found);
          for (int j = 0; j < 4; ++j) y[(r + j) * stride] = row[j];
        }
      }
    } else {
      const int32_t dot = _mm512_reduce_add_epi32(acc[0][i]) - 128 * a.sum[t + i];
      *y = (a.w_scale[m] * a.s[t + i]) * static_cast<float>(dot);
    }
  }
}

// One token takes eight rows at a time, to follow as many streams, or four far ones; six tokens by four rows have the
// best ratio of products to loads.
constexpr int kInt8Tokens = 6;
template <class Prefetch>
using Int8Tile = void (*)(const Int8Args& a, int64_t m, int64_t stride, int64_t t, Prefetch ahead);
template <class P>
constexpr Int8Tile<P> kInt8Tiles[2][kInt8Tokens + 1] = {
    {nullptr, int8_tile<1, 1, P>, int8_tile<1, 2, P>, int8_tile<1, 3, P>, int8_tile<1, 4, P>,
     int8_tile<1, 5, P>, int8_tile<1, 6, P>},
    {nullptr, int8_tile<8, 1, P>, int8_tile<4, 2, P>, int8_tile<4, 3, P>, int8_tile<4, 4, P>,
     int8_tile<4, 5, P>, int8_tile<4, 6, P>},
};

// One token, four rows at once, each of another quarter of the range: one core of a Zen 4 reads the head of 1.3B at 31 GB/s
// in streams far from each other, at 26 in eight neighbouring rows with prefetches in order. On Intel not measured.
void int8_far(const Int8Args& a, int64_t m0, int64_t m1) {
  const int64_t quarter = (m1 - m0) / 4;
  for (int64_t m = m0; m < m0 + quarter; ++m) int8_tile<4, 1>(a, m, quarter, 0, NoPrefetch());
  for (int64_t m = m0 + 4 * quarter; m < m1; ++m) int8_tile<1, 1>(a, m, 1, 0, NoPrefetch());
}

}  // namespace

// Layout 2 is for AVX2, and its kernels are AVX2's.
size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  if (layout == 2) return avx2::scaffold_pack_bytes(layout, n, K);
  return layout == 0 || n <= kFewTokens ? 0 : n * K;
}

void scaffold_pack(int layout, const int8_t* q, int64_t n, int64_t K, void* packed) {
  if (layout == 2) return avx2::scaffold_pack(layout, q, n, K, packed);
  Dword* out = static_cast<Dword*>(packed);
  for (int64_t i = 0; i < tile_count(n); ++i) {
    const int64_t t0 = tile_start(n, i), t1 = tile_start(n, i + 1);
    for (int64_t k = 0; k < K; k += 4) {
      for (int64_t t = t0; t < t1; ++t) *out++ = *reinterpret_cast<const Dword*>(q + t * K + k);
    }
  }
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (a.layout == 0) return canonical(a, m0, m1);
  if (a.layout == 2) return avx2::scaffold_matmul(a, m0, m1);
  const int64_t block0 = m0 / kTileRows, block1 = (m1 + kTileRows - 1) / kTileRows;
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    if (a.n > kFewTokens) {
      many_tokens(a, plane, block0, block1);
      continue;
    }
    if (a.n == 1 && !reads_over_pages()) {
      one_token(a, plane, block0, block1);
      continue;
    }
    with_prefetch(tiles_of(a, plane, block0 * kTileRows), [&](auto ahead) {
      a.n == 1 ? few_tokens<1, 1>(a, plane, block0, block1, ahead)
               : few_tokens<1, 2>(a, plane, block0, block1, ahead);
    });
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) {
  if (a.n == 1 && !reads_over_pages()) return int8_far(a, m0, m1);
  const int64_t tiles = (a.n + kInt8Tokens - 1) / kInt8Tokens;
  const int64_t rows = a.n == 1 ? 8 : 4;
  for (int64_t m = m0; m < m1;) {
    const bool whole = m + rows <= m1;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t0 = a.n * i / tiles, t1 = a.n * (i + 1) / tiles;
      with_prefetch(a.w + m * a.K,
                    [&](auto ahead) { kInt8Tiles<decltype(ahead)>[whole][t1 - t0](a, m, 1, t0, ahead); });
    }
    m += whole ? rows : 1;
  }
}

}  // namespace dfssm::avx512vnni
