// The scaffold for AVX-512 VNNI and VBMI: look-ups for three tokens and more, of layout 1. All else is AVX-512 VNNI's.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "finish__avx512vnni.h"
#include "matmul-inl.h"

namespace dfssm::avx512vbmi {
namespace {

// A byte of a tile has eight columns of one row, and each of its nibbles says which of four activations are added: it is an
// index to the 16 sums that there are. The four bytes of a row have columns of their own, so a table of 64 entries, 16 a
// byte, is one vector, and a VPERMB looks up 256 weights, where a VPDPBUSD multiplies 64. It takes two of them, each with
// an addition: on Zen 4, in cache, 296 weights a ns of a core against 218.
//
// scaffold_pack writes the tables, of v = sum of the chosen q - sum of min(q, 0), which is 0 to 508, as the low five bits
// and the rest, bytes each. Eight low parts are at most 248, eight of the rest 120: bytes are added over kTilesPerFold
// tiles, and two VPDPBUSD then add them up, each row's four, exactly.
constexpr int kTilesPerFold = 4;
constexpr char kRest = 1 << 5;
// Of one token and tile: of the low nibbles the low parts and the rest, and those of the high nibbles.
constexpr int64_t kTableBytes = 4 * 64;

// Tables [groups of tokens, K/32, tokens of the group, kTableBytes], then the sums of min(q, 0), int32 [n].
constexpr int64_t kTokens = 2;
inline int64_t tables_bytes(int64_t n, int64_t K) { return n * (K / kTileColumns) * kTableBytes; }

// Blocks of rows at once, whose indices and sums of two tokens the registers hold: they share each table that is loaded.
constexpr int64_t kBlocks = 3;

// acc += table[index], bytes. Inline assembly because gcc 12 gives the sum of the intrinsics a register of its own and
// spills the accumulators.
#ifdef __AVX512VBMI__
inline void add_looked_up(__m512i& acc, __m512i table, __m512i index) {
  __m512i found;
  asm("vpermb %2, %3, %1\n\tvpaddb %1, %0, %0" : "+v"(acc), "=&v"(found) : "v"(table), "v"(index));
}
#else  // the same over a simulation of the intrinsics
inline void add_looked_up(__m512i& acc, __m512i table, __m512i index) {
  acc = _mm512_add_epi8(acc, _mm512_permutexvar_epi8(index, table));
}
#endif

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// NB blocks from `block` on by NT tokens from t0 on.
template <int NB, int NT>
void look_up(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0, int64_t ahead) {
  const __m512i nibble = _mm512_set1_epi8(15), byte_of_row = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1), rest = _mm512_set1_epi8(kRest);
  const int64_t block_bytes = kTileRows * a.K / 8;
  const uint8_t* tile = tiles_of(a, plane, block * kTileRows);
  const uint8_t* table = static_cast<const uint8_t*>(a.packed) + tables_bytes(t0, a.K);
  __m512i sums[NB][NT];
#pragma GCC unroll 8
  for (int i = 0; i < NB * NT; ++i) sums[i / NT][i % NT] = _mm512_setzero_si512();
  for (int64_t c = a.K / kTileColumns; c > 0; c -= kTilesPerFold) {
    __m512i low[NB][NT], high[NB][NT];
#pragma GCC unroll 8
    for (int i = 0; i < NB * NT; ++i) low[i / NT][i % NT] = high[i / NT][i % NT] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int64_t i = min(c, kTilesPerFold); i > 0; --i, tile += 64, table += NT * kTableBytes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i index[NB];
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b) {
          __m512i bits = load(tile + b * block_bytes);
          if (half == 0) {
            _mm_prefetch(reinterpret_cast<const char*>(tile + b * block_bytes + ahead), _MM_HINT_T0);
          } else {
            bits = _mm512_srli_epi32(bits, 4);
          }
          index[b] =
              _mm512_ternarylogic_epi32(bits, nibble, byte_of_row, 0xea);  // bits & nibble | byte_of_row
        }
#pragma GCC unroll 2
        for (int t = 0; t < NT; ++t) {
          const uint8_t* of = table + t * kTableBytes + half * 128;
          const __m512i low_parts = load(of), rests = load(of + 64);
#pragma GCC unroll 4
          for (int b = 0; b < NB; ++b) {
            add_looked_up(low[b][t], low_parts, index[b]);
            add_looked_up(high[b][t], rests, index[b]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < NB * NT; ++i) {
      const int b = i / NT, t = i % NT;
      sums[b][t] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[b][t], low[b][t], ones), high[b][t], rest);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < NT; ++t) {
    int32_t base;
    std::memcpy(&base, static_cast<const char*>(a.packed) + tables_bytes(a.n, a.K) + (t0 + t) * sizeof base,
                sizeof base);
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) sums[b][t] = _mm512_add_epi32(sums[b][t], _mm512_set1_epi32(base));
  }
#pragma GCC unroll 4
  for (int b = 0; b < NB; ++b) finish<NT>(a, plane, block + b, t0, sums[b]);
}

using LookUp = void (*)(const ScaffoldArgs& a, int64_t plane, int64_t block, int64_t t0, int64_t ahead);
constexpr LookUp kLookUps[kTokens][kBlocks] = {
    {look_up<1, 1>, look_up<2, 1>, look_up<3, 1>},
    {look_up<1, 2>, look_up<2, 2>, look_up<3, 2>},
};

// The tables of four groups of four columns, q[0] to q[15]: entry 16 b + e adds the q[4 i + b] whose bit i of e is set.
inline void make_tables(const int8_t* q, uint8_t* out) {
  constexpr __mmask64 kChosen[4] = {0xaaaaaaaaaaaaaaaa, 0xcccccccccccccccc, 0xf0f0f0f0f0f0f0f0,
                                    0xff00ff00ff00ff00};
  constexpr int64_t kOne = 0x0101010101010101;
  const __m512i byte_of_lane = _mm512_set_epi64(3 * kOne, 3 * kOne, 2 * kOne, 2 * kOne, kOne, kOne, 0, 0);
  const __m512i low = _mm512_set1_epi8(kRest - 1), three_bits = _mm512_set1_epi8(7);
  const auto rest = [=](__m512i v) { return _mm512_and_si512(_mm512_srli_epi16(v, 5), three_bits); };
  __m512i pair[2];
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    // q, chosen or not, less its smaller choice: |q| where it is positive and chosen, or negative and not.
    __m512i part[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512i four = _mm512_set1_epi32(*reinterpret_cast<const Dword*>(q + 4 * (i + j)));
      const __m512i x = _mm512_shuffle_epi8(four, byte_of_lane);
      part[j] = _mm512_maskz_abs_epi8(kChosen[i + j] ^ _mm512_movepi8_mask(x), x);
    }
    pair[i / 2] = _mm512_add_epi8(part[0], part[1]);
  }
  const __m512i lows = _mm512_add_epi8(_mm512_and_si512(pair[0], low), _mm512_and_si512(pair[1], low));
  _mm512_storeu_si512(out, _mm512_and_si512(lows, low));
  _mm512_storeu_si512(out + 64, _mm512_add_epi8(_mm512_add_epi8(rest(pair[0]), rest(pair[1])), rest(lows)));
}

// The sum of min(q, 0).
inline int32_t negatives(const int8_t* q, int64_t K) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 64) {
    const __mmask64 lanes = K - k < 64 ? ~__mmask64{0} >> (64 - (K - k)) : ~__mmask64{0};
    const __m512i x = _mm512_min_epi8(_mm512_maskz_loadu_epi8(lanes, q + k), _mm512_setzero_si512());
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), x);
  }
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace

// One and two tokens are VNNI's: they wait for memory, and the tables of 2,048 columns fill half of L1, which is then no
// room for what is prefetched. One token's bits of 1.3B took 12 to 17 ms here against 9.
inline bool looks_up(int layout, int64_t n) { return layout == 1 && n > 2; }

size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K) {
  if (!looks_up(layout, n)) return avx512vnni::scaffold_pack_bytes(layout, n, K);
  return tables_bytes(n, K) + n * sizeof(int32_t);
}

void scaffold_pack(int layout, const int8_t* q, int64_t n, int64_t K, void* packed) {
  if (!looks_up(layout, n)) return avx512vnni::scaffold_pack(layout, q, n, K, packed);
  uint8_t* out = static_cast<uint8_t*>(packed);
  for (int64_t t0 = 0; t0 < n; t0 += kTokens) {
    const int64_t t1 = min(t0 + kTokens, n);
    for (int64_t k = 0; k < K; k += kTileColumns) {
      for (int64_t t = t0; t < t1; ++t, out += kTableBytes) {
        make_tables(q + t * K + k, out);
        make_tables(q + t * K + k + 16, out + 128);
      }
    }
  }
  for (int64_t t = 0; t < n; ++t, out += sizeof(int32_t)) {
    const int32_t base = negatives(q + t * K, K);
    std::memcpy(out, &base, sizeof base);
  }
}

void scaffold_matmul(const ScaffoldArgs& a, int64_t m0, int64_t m1) {
  if (!looks_up(a.layout, a.n)) return avx512vnni::scaffold_matmul(a, m0, m1);
  const int64_t block1 = (m1 + kTileRows - 1) / kTileRows;
  for (int64_t plane = 0; plane < a.planes; ++plane) {
    for (int64_t block = m0 / kTileRows; block < block1; block += kBlocks) {
      const int64_t blocks = min(kBlocks, block1 - block);
      for (int64_t t = 0; t < a.n; t += kTokens) {
        // Tokens after the first find the weights in cache.
        const int64_t ahead = t == 0 ? blocks * kTileRows * a.K / 8 : 0;
        kLookUps[min(kTokens, a.n - t) - 1][blocks - 1](a, plane, block, t, ahead);
      }
    }
  }
}

void int8_matmul(const Int8Args& a, int64_t m0, int64_t m1) { avx512vnni::int8_matmul(a, m0, m1); }

}  // namespace dfssm::avx512vbmi
