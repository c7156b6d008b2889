// What the integer matmuls of the Arm sets share; compiled into each of them, as float-inl.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "matmul-inl.h"

namespace dfssm {
namespace {

// `count` <= 16 bytes, zeros behind them.
inline int8x16_t load_bytes(const int8_t* p, int64_t count) {
  if (count >= 16) return vld1q_s8(p);
  int8_t buffer[16] = {};
  std::memcpy(buffer, p, count);
  return vld1q_s8(buffer);
}

// Up to four floats; missing ones are zero.
inline float32x4_t load_floats(const float* p, int64_t count) {
  if (count >= 4) return vld1q_f32(p);
  float buffer[4] = {};
  std::memcpy(buffer, p, count * sizeof *p);
  return vld1q_f32(buffer);
}
inline void store_floats(float* p, float32x4_t v, int64_t count) {
  if (count >= 4) return vst1q_f32(p, v);
  float buffer[4];
  vst1q_f32(buffer, v);
  std::memcpy(p, buffer, count * sizeof *p);
}

// (scale * s) * (2 * positive - sum) of one plane and token for the 4 NV rows from `row` on, as far as they exist; the
// first plane brings the low-rank correction and the others add to it.
template <int NV>
inline void finish(const ScaffoldArgs& a, int64_t plane, int64_t row, int64_t t,
                   const int32x4_t (&positive)[NV]) {
  static_assert(NV == 2 || NV == 4);
  float32x4_t correction[NV] = {};
  if (plane == 0 && a.R > 0) {
    const int64_t rows_of_block = block_rows(a.layout);
    const int8_t* up = a.up + row / rows_of_block * a.R * rows_of_block + row % rows_of_block;
    const float* h = a.h + t * a.R;
    for (int64_t r = 0; r < a.R; ++r, up += rows_of_block) {
#pragma GCC unroll 2
      for (int v = 0; v < NV; v += 2) {
        const int16x8_t words = vmovl_s8(vld1_s8(up + 4 * v));
        correction[v] = vfmaq_n_f32(correction[v], vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), h[r]);
        correction[v + 1] = vfmaq_n_f32(correction[v + 1], vcvtq_f32_s32(vmovl_high_s16(words)), h[r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t first = row + 4 * v, rows = a.M - first;
    if (rows <= 0) return;
    const float32x4_t scale = vmulq_n_f32(load_floats(a.scale + plane * a.M + first, rows), a.s[t]);
    const int32x4_t signed_sum = vsubq_s32(vaddq_s32(positive[v], positive[v]), vdupq_n_s32(a.sum[t]));
    float32x4_t y = vmulq_f32(scale, vcvtq_f32_s32(signed_sum));
    float* out = a.y + t * a.ldy + first;
    if (plane > 0) {
      y = vaddq_f32(y, load_floats(out, rows));
    } else if (a.R > 0) {
      y = vfmaq_f32(y, load_floats(a.up_scale + first, rows), correction[v]);
    }
    store_floats(out, y, rows);
  }
}

// (w_scale * s) * dots of `count` <= 4 rows from `row` on.
inline void finish(const Int8Args& a, int64_t row, int64_t count, int64_t t, int32x4_t dots) {
  const float32x4_t scale = vmulq_n_f32(load_floats(a.w_scale + row, count), a.s[t]);
  store_floats(a.y + t * a.ldy + row, vmulq_f32(scale, vcvtq_f32_s32(dots)), count);
}

// Of `tokens` cut into as few tiles of at most `most` as possible, all nearly equal, the first one of tile i.
inline int64_t tile_count(int64_t tokens, int64_t most) { return (tokens + most - 1) / most; }
inline int64_t tile_start(int64_t tokens, int64_t most, int64_t i) {
  return tokens * i / tile_count(tokens, most);
}

}  // namespace
}  // namespace dfssm
