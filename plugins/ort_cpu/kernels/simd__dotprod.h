// NEON vectors for float-inl.h: 4 lanes, tails through a small buffer. Any CPU for 64-bit Arm has what is used here.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dfssm::dotprod {

constexpr int kLanes = 4;
using F32 = float32x4_t;
using I32 = int32x4_t;
struct Mask {
  int64_t count;
};
struct Full {};  // all lanes

constexpr int kTokens = 4;  // of a scan, at once: what the 32 registers hold

inline Mask first_lanes(int64_t n) { return {n}; }

inline F32 zero() { return vdupq_n_f32(0.0f); }
inline F32 broadcast(float v) { return vdupq_n_f32(v); }
inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
// NaN where either is.
inline F32 max(F32 a, F32 b) { return vmaxq_f32(a, b); }
inline F32 min(F32 a, F32 b) { return vminq_f32(a, b); }
inline F32 abs(F32 a) { return vabsq_f32(a); }
inline F32 larger_magnitude(F32 a, F32 b) { return max(abs(a), abs(b)); }
inline F32 negate_abs(F32 a) { return vnegq_f32(abs(a)); }
inline F32 round_even(F32 a) { return vrndnq_f32(a); }
// a * 2^exponent for whole exponents in [-126, 127]
inline F32 scale_by_power(F32 a, F32 exponent) {
  const int32x4_t biased = vaddq_s32(vcvtq_s32_f32(exponent), vdupq_n_s32(127));
  return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(biased, 23)));
}
inline F32 where_negative(F32 test, F32 yes, F32 no) {
  return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(test)), yes, no);
}
inline F32 where_below(F32 a, F32 b, F32 yes, F32 no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
inline float sum(F32 a) { return vaddvq_f32(a); }

inline I32 zero_int() { return vdupq_n_s32(0); }
inline I32 bits_of(F32 a) { return vreinterpretq_s32_f32(a); }
inline F32 float_of(I32 bits) { return vreinterpretq_f32_s32(bits); }
inline I32 max(I32 a, I32 b) { return vmaxq_s32(a, b); }
inline I32 add(I32 a, I32 b) { return vaddq_s32(a, b); }
inline I32 round_to_int(F32 a) { return vcvtnq_s32_f32(a); }
inline int32_t largest(I32 a) { return vmaxvq_s32(a); }
inline int32_t sum(I32 a) { return vaddvq_s32(a); }

inline F32 load(const float* p, Full) { return vld1q_f32(p); }
inline void store(float* p, F32 v, Full) { vst1q_f32(p, v); }

// binary16, as bits, saturating
inline F32 load(const uint16_t* p, Full) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void store(uint16_t* p, F32 v, Full) {
  v = min(broadcast(kHalfMax), max(broadcast(-kHalfMax), v));
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

inline F32 load(const int8_t* p, Full) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
// Every lane of v fits int8.
inline void store(int8_t* p, I32 v, Full) {
  const int16x4_t words = vmovn_s32(v);
  const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(p, &four, sizeof four);
}

template <class T>
inline F32 load(const T* p, Mask m) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, m.count * sizeof *p);
  return load(buffer, Full{});
}
template <class T, class Vector>
inline void store(T* p, Vector v, Mask m) {
  T buffer[kLanes];
  store(buffer, v, Full{});
  std::memcpy(p, buffer, m.count * sizeof *p);
}

// Four vectors in a row.
inline void store_4(int8_t* p, const I32 (&v)[4]) {
  const int16x8_t low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1])),
                  high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

// Lane i is the largest lane of rows[i].
inline I32 largest_of_each(const I32 (&rows)[kLanes]) {
  return vpmaxq_s32(vpmaxq_s32(rows[0], rows[1]), vpmaxq_s32(rows[2], rows[3]));
}

// columns[j][i] = p[i * S + j]: the S columns of a [4, S] array.
template <int S>
inline void load_columns(const float* p, F32 (&columns)[S]) {
  if constexpr (S == 1) {
    columns[0] = vld1q_f32(p);
  } else if constexpr (S == 2) {
    const float32x4x2_t v = vld2q_f32(p);
    columns[0] = v.val[0], columns[1] = v.val[1];
  } else if constexpr (S == 3) {
    const float32x4x3_t v = vld3q_f32(p);
    columns[0] = v.val[0], columns[1] = v.val[1], columns[2] = v.val[2];
  } else {
    const float32x4x4_t v = vld4q_f32(p);
    columns[0] = v.val[0], columns[1] = v.val[1], columns[2] = v.val[2], columns[3] = v.val[3];
  }
}

template <int S>
inline void store_columns(float* p, const F32 (&columns)[S]) {
  if constexpr (S == 1) {
    vst1q_f32(p, columns[0]);
  } else if constexpr (S == 2) {
    vst2q_f32(p, {{columns[0], columns[1]}});
  } else {
    static_assert(S == 3);  // a window of four has three columns of history
    vst3q_f32(p, {{columns[0], columns[1], columns[2]}});
  }
}

}  // namespace dfssm::dotprod
