// Stands in for the compiler's <immintrin.h> when the AVX-512 kernels are compiled for a CPU without AVX-512:
// the intrinsics come from SIMDe, and those that SIMDe lacks, or computes differently, from here.
#pragma once

#ifdef __AVX__
#error "the simulation is compiled for the baseline of x86-64: no -mavx*, no -march=native"
#endif

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "half.h"

// Newer versions of SIMDe have these names, some of them as types; with every version, the text below is what runs.
#undef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#define __mmask16 simde__mmask16
#define __mmask64 simde__mmask64
#undef _mm256_cvtph_ps
#undef _mm256_cvtps_ph
#undef _mm256_fmadd_ps
#undef _mm256_mask_storeu_epi16
#undef _mm256_maskload_ps
#undef _mm256_maskz_loadu_epi16
#undef _mm512_abs_ps
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtps_ph
#undef _mm512_fmadd_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_epi32
#undef _mm512_srai_epi32
#undef _mm_mask_storeu_epi8
#undef _mm_maskz_loadu_epi8

namespace simulated {

template <class T, class V>
using Lanes = std::array<T, sizeof(V) / sizeof(T)>;

template <class T, class V>
inline Lanes<T, V> lanes(const V& v) {
  Lanes<T, V> out;
  std::memcpy(&out, &v, sizeof v);
  return out;
}

template <class V, class T, size_t N>
inline V vector(const std::array<T, N>& lanes) {
  static_assert(sizeof(V) == sizeof lanes);
  V out;
  std::memcpy(&out, &lanes, sizeof out);
  return out;
}

// function(lane) of every lane of v, as lanes of an Out.
template <class Out, class T, class V, class Function>
inline Out map(const V& v, Function function) {
  const auto in = lanes<T>(v);
  std::array<decltype(function(in[0])), in.size()> out;
  for (size_t i = 0; i < in.size(); ++i) out[i] = function(in[i]);
  return vector<Out>(out);
}

// Lanes that are masked out are zero, and their memory is not touched.
template <class V, class T>
inline V load(uint64_t mask, const void* p) {
  Lanes<T, V> out = {};
  for (size_t i = 0; i < out.size(); ++i) {
    if (mask >> i & 1) std::memcpy(&out[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return vector<V>(out);
}

template <class T, class V>
inline void store(void* p, uint64_t mask, const V& v) {
  const auto in = lanes<T>(v);
  for (size_t i = 0; i < in.size(); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, &in[i], sizeof(T));
  }
}

template <class V>
inline V fmadd(const V& a, const V& b, const V& c) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  auto z = lanes<float>(c);
  for (size_t i = 0; i < z.size(); ++i) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return vector<V>(z);
}

// Halves are combined until one lane is left: the order of gcc's _mm512_reduce_*, which a float sum depends on.
template <class T, class V, class Function>
inline T reduce(const V& v, Function function) {
  auto all = lanes<T>(v);
  for (size_t n = all.size() / 2; n > 0; n /= 2) {
    for (size_t i = 0; i < n; ++i) all[i] = function(all[i], all[i + n]);
  }
  return all[0];
}

}  // namespace simulated

// ---- masked loads and stores ----

inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
  return simulated::load<__m512, float>(m, p);
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 m, const void* p) {
  return simulated::load<__m512i, int8_t>(m, p);
}
inline __m256 _mm256_maskload_ps(const float* p, __m256i m) {
  return simulated::load<__m256, float>(_mm256_movemask_ps(_mm256_castsi256_ps(m)), p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return simulated::load<__m256i, int16_t>(m, p);
}
inline __m128i _mm_maskz_loadu_epi8(__mmask16 m, const void* p) {
  return simulated::load<__m128i, int8_t>(m, p);
}

inline void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 v) { simulated::store<float>(p, m, v); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) { simulated::store<int16_t>(p, m, v); }
inline void _mm_mask_storeu_epi8(void* p, __mmask16 m, __m128i v) { simulated::store<int8_t>(p, m, v); }

// ---- conversions ----

inline __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return simulated::map<__m512i, int8_t>(v, [](int8_t x) -> int32_t { return x; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i v) {  // truncates
  return simulated::map<__m128i, int32_t>(v, [](int32_t x) { return static_cast<int8_t>(x); });
}
inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return simulated::map<__m512, int32_t>(v, [](int32_t x) { return static_cast<float>(x); });
}
// SSE's own instruction has the same rounding, and the same 0x80000000 for what does not fit.
inline __m512i _mm512_cvtps_epi32(__m512 v) {
  return simulated::map<__m512i, float>(v, [](float x) -> int32_t { return _mm_cvtss_si32(_mm_set_ss(x)); });
}
inline __m256 _mm256_cvtph_ps(__m128i v) {
  return simulated::map<__m256, uint16_t>(v, [](uint16_t x) { return dfssm::scalar::half_to_float(x); });
}
inline __m128i _mm256_cvtps_ph(__m256 v, int) {  // the rounding asked for is to nearest even
  return simulated::map<__m128i, float>(v, [](float x) { return dfssm::scalar::float_to_half(x); });
}
inline __m512 _mm512_cvtph_ps(__m256i v) {
  return simulated::map<__m512, uint16_t>(v, [](uint16_t x) { return dfssm::scalar::half_to_float(x); });
}
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  return simulated::map<__m256i, float>(v, [](float x) { return dfssm::scalar::float_to_half(x); });
}

// ---- arithmetic ----

// SIMDe rounds twice where the CPU has no FMA; fmaf rounds once on every CPU.
inline __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) { return simulated::fmadd(a, b, c); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return simulated::fmadd(a, b, c); }
// SIMDe compares with zero, and so leaves a NaN its sign.
inline __m512 _mm512_abs_ps(__m512 v) {
  return simulated::map<__m512, uint32_t>(v, [](uint32_t bits) { return bits & 0x7fffffff; });
}
inline __m512i _mm512_srai_epi32(__m512i v, unsigned count) {
  return simulated::map<__m512i, int32_t>(v, [count](int32_t x) { return x >> count; });
}
inline float _mm512_reduce_add_ps(__m512 v) {
  return simulated::reduce<float>(v, [](float a, float b) { return a + b; });
}
inline int32_t _mm512_reduce_add_epi32(__m512i v) {  // wraps around
  return static_cast<int32_t>(simulated::reduce<uint32_t>(v, [](uint32_t a, uint32_t b) { return a + b; }));
}
inline int32_t _mm512_reduce_max_epi32(__m512i v) {
  return simulated::reduce<int32_t>(v, [](int32_t a, int32_t b) { return a > b ? a : b; });
}
