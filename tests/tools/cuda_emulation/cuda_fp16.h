// binary16 with CUDA's names: to nearest even, overflow to infinity, NaN to 0x7fff, as the hardware converts.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16;
  const uint32_t exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  float value;
  if (exponent == 0) {  // zero or subnormal: exact in binary32
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  if (exponent == 31 && fraction) bits = 0x7fffffff;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000)
    return {static_cast<uint16_t>(sign | 0x7c00)};                   // from half a step past 65504 on
  if (magnitude < 0x33000001) return {static_cast<uint16_t>(sign)};  // up to half of 2^-24: zero
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t significand = (magnitude & 0x7fffff) | 0x800000;
  const int drop = exponent < -14 ? -exponent - 1 : 13;  // low bits of the significand that do not fit
  const uint32_t kept = significand >> drop, rest = significand & ((1u << drop) - 1), tie = 1u << (drop - 1);
  const uint32_t rounded = kept + (rest > tie || (rest == tie && kept & 1));
  // A subnormal's bits are its multiple of 2^-24; a normal's leading one adds one to the exponent, so start a
  // step below. A carry out of the significand goes on into the exponent, as it should.
  const uint32_t base = exponent < -14 ? 0 : static_cast<uint32_t>(exponent + 14) << 10;
  return {static_cast<uint16_t>(sign | (base + rounded))};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
