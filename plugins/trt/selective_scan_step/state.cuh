// A stored state and back: kVector neighbours of a row travel as one access.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace dfssm::trt::selective_scan {

template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t at[kBytes / 4];
};

template <class State, int kVector>
using Packed = Words<static_cast<int>(sizeof(State)) * kVector>;

using trt::to_float;
__device__ __forceinline__ float to_float(int8_t value) { return static_cast<float>(value); }

// The larger of m and |x| as bits, so that no NaN gets lost as it does in fmaxf. From sm_80 on one instruction does it.
__device__ __forceinline__ uint32_t larger_magnitude(uint32_t m, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, %2;" : "=r"(m) : "r"(m), "f"(fabsf(x)));
  return m;
#else
  return max(m, magnitude(x));
#endif
}

// What a row of an int8 state is multiplied by to be stored, and its scale.
struct RowScale {
  float inverse, scale;
  uint32_t keep;  // all ones, or zero to blank the stored words of a row that is not finite
};

// For all lanes of a warp; those of one row, an even number of neighbours, bring the largest magnitude of the
// row. Even lanes divide for the scale, which only they know then, odd ones for the inverse: an exact
// division is a dozen instructions and a branch.
__device__ __forceinline__ RowScale row_scale(uint32_t largest_magnitude_bits) {
  const float m = __uint_as_float(largest_magnitude_bits);
  const bool finite = largest_magnitude_bits < kInfinityBits, odd = threadIdx.x % 2;
  float quotient = 0.0f;
  if (finite && m >= kTiny) quotient = __fdiv_rn(odd ? 127.0f : m, odd ? m : 127.0f);
  const float inverse = __shfl_sync(kAllLanes, quotient, 1, 2);
  return {inverse, finite ? quotient : __uint_as_float(kNaNBits), finite ? ~0u : 0u};
}

// 1.5 * 2^23 + x is x rounded to a whole number, half to even, in the low bits: what __float2int_rn gives for
// |x| < 2^22, in one addition at full rate where conversions issue at a quarter of it.
__device__ __forceinline__ uint32_t quantize(float x, float inverse) {
  return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

// Past the largest fp16 to that one. NaN stays NaN, which fminf and fmaxf would lose.
__device__ __forceinline__ float saturate(float x) {
  x = x > kHalfMax ? kHalfMax : x;
  return x < -kHalfMax ? -kHalfMax : x;
}

template <int kVector>
__device__ __forceinline__ void widen(const Packed<float, kVector>& packed, float (&h)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) h[i] = __uint_as_float(packed.at[i]);
}

template <int kVector>
__device__ __forceinline__ void widen(const Packed<__half, kVector>& packed, float (&h)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    h[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(packed.at[i / 2] >> i % 2 * 16)));
  }
}

// A byte of q + 128 below the exponent of 2^23 is the float 2^23 + 128 + q: one permutation and one exact
// subtraction in place of a conversion.
template <int kVector>
__device__ __forceinline__ void widen(const Packed<int8_t, kVector>& packed, float (&h)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t bytes = packed.at[i / 4] ^ 0x80808080u;
    h[i] = __fadd_rn(__uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440u + i % 4)), -8388736.0f);
  }
}

template <int kVector>
__device__ __forceinline__ void narrow(const float (&h)[kVector], Packed<float, kVector>& packed) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) packed.at[i] = __float_as_uint(h[i]);
}

template <int kVector>
__device__ __forceinline__ void narrow(const float (&h)[kVector], Packed<__half, kVector>& packed) {
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    const __half2 pair = __floats2half2_rn(saturate(h[i]), saturate(h[i + 1]));
    packed.at[i / 2] =
        __half_as_ushort(__low2half(pair)) | static_cast<uint32_t>(__half_as_ushort(__high2half(pair))) << 16;
  }
}

template <int kVector>
__device__ __forceinline__ void narrow(const float (&h)[kVector], RowScale row,
                                       Packed<int8_t, kVector>& packed) {
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const uint32_t low = __byte_perm(quantize(h[i], row.inverse), quantize(h[i + 1], row.inverse), 0x0040u);
    const uint32_t high =
        __byte_perm(quantize(h[i + 2], row.inverse), quantize(h[i + 3], row.inverse), 0x0040u);
    packed.at[i / 4] = __byte_perm(low, high, 0x5410u) & row.keep;
  }
}

}  // namespace dfssm::trt::selective_scan
