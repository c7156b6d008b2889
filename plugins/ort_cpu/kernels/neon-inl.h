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

// (scale * s) * (2 * positive - sum) of one plane and token for the four rows from `row` on, as far as they exist; the
// first plane brings the low-rank correction and the others add to it.
inline void finish(const ScaffoldArgs& a, int64_t plane, int64_t row, int64_t t, int32x4_t positive) {
  const int64_t rows = a.M - row;
  if (rows <= 0) return;
  const float32x4_t scale = vmulq_n_f32(load_floats(a.scale + plane * a.M + row, rows), a.s[t]);
  const int32x4_t signed_sum = vsubq_s32(vaddq_s32(positive, positive), vdupq_n_s32(a.sum[t]));
  float32x4_t y = vmulq_f32(scale, vcvtq_f32_s32(signed_sum));
  float* out = a.y + t * a.ldy + row;
  if (plane > 0) {
    y = vaddq_f32(y, load_floats(out, rows));
  } else if (a.R > 0) {
    const int64_t rows_of_block = block_rows(a.layout);
    const int8_t* up = a.up + row / rows_of_block * a.R * rows_of_block + row % rows_of_block;
    const float* h = a.h + t * a.R;
    float32x4_t correction = vdupq_n_f32(0.0f);
    for (int64_t r = 0; r < a.R; ++r, up += rows_of_block) {
      int32_t four;
      std::memcpy(&four, up, sizeof four);
      const int16x4_t words = vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))));
      correction = vfmaq_n_f32(correction, vcvtq_f32_s32(vmovl_s16(words)), h[r]);
    }
    y = vfmaq_f32(y, load_floats(a.up_scale + row, rows), correction);
  }
  store_floats(out, y, rows);
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
