// CUDA's device functions by their names, those that kernels use; included by emulation.h.
#pragma once

// Warps.
inline void __syncwarp(unsigned mask = 0xffffffff) { dfssm::trt::emulation::sync_warp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return dfssm::trt::emulation::ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return dfssm::trt::emulation::shuffle(mask, value, dfssm::trt::emulation::Shuffle::index, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return dfssm::trt::emulation::shuffle(mask, value, dfssm::trt::emulation::Shuffle::up, delta, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return dfssm::trt::emulation::shuffle(mask, value, dfssm::trt::emulation::Shuffle::down, delta, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return dfssm::trt::emulation::shuffle(mask, value, dfssm::trt::emulation::Shuffle::exclusive_or, lanes,
                                        width);
}

// Memory. Fences order nothing that emulation could see out of order.
inline void __threadfence() {}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return dfssm::trt::emulation::atomic(address, [=](T before) { return static_cast<T>(before + value); });
}

// Bits.
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
// Byte i of the result is the byte of y:x that nibble i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

// Four bytes at a time.
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);  // wraps, as the hardware does
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
inline unsigned __vadd4(unsigned a, unsigned b) {
  return ((a & 0x7f7f7f7f) + (b & 0x7f7f7f7f)) ^ ((a ^ b) & 0x80808080);
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return ((a | 0x80808080) - (b & 0x7f7f7f7f)) ^ ((a ^ ~b) & 0x80808080);
}

// fp32. Sources are compiled with -ffp-contract=off: what is written as one operation is one.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float a) { return dfssm::trt::emulation::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return dfssm::trt::emulation::bit_cast<float>(a); }
// Out of range goes to the nearest end, NaN to 0.
inline int __float2int_rn(float a) {
  if (a != a) return 0;
  if (a >= 0x1p31f) return 0x7fffffff;
  if (a < -0x1p31f) return -0x7fffffff - 1;
  return static_cast<int>(std::nearbyint(a));
}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
