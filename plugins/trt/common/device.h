// What device code of several kernels needs, and what it must write differently under nvcc and on the host
// emulation (tests/tools/cuda_emulation/emulation.h): shared memory, tensor cores, asynchronous copies.
#pragma once

#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#ifdef DFSSM_EMULATION
#include "emulation.h"
#endif

// An array in shared memory, `type name[count]`, and what the launch asked for as dynamic shared memory,
// 16-byte aligned, as `type* name`. Both are ordinary memory: 16 bytes at a time by way of uint4 pointers.
#ifdef DFSSM_EMULATION
#define DFSSM_SHARED(type, name, count)              \
  static const char dfssm_##name##_declared = 0;     \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::dfssm::trt::emulation::shared_array(&dfssm_##name##_declared, sizeof(type[count]), 16))
#define DFSSM_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::dfssm::trt::emulation::dynamic_shared())
#else
#define DFSSM_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DFSSM_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dfssm_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dfssm_dynamic_shared)
#endif

namespace dfssm::trt {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarpSize = 32;

// Magnitudes as unsigned integers: they order like floats, and infinity and NaN come last.
constexpr uint32_t kInfinityBits = 0x7f800000, kNaNBits = 0x7fc00000;
__device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Activations: fp32 arithmetic on whatever they are stored as.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// kCount values side by side, loaded and stored as one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  static_assert(sizeof(T) * kCount <= 16);
  T at[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, kCount>*>(address);
}
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, kCount>& value) {
  *reinterpret_cast<Vector<T, kCount>*>(address) = value;
}

// Whether accesses of `bytes` at this address are aligned.
inline bool is_aligned(const void* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

__device__ __forceinline__ float sigmoid(float x) {
  const float e = expf(-fabsf(x));  // cannot overflow
  return (x >= 0 ? 1.0f : e) / (1.0f + e);
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// f(a value of the type that `type` names): chooses a kernel's instance.
template <class F>
cudaError_t dispatch(Float type, F&& f) {
  switch (type) {
    case Float::f32:
      return f(float{});
    case Float::f16:
      return f(__half{});
  }
  return cudaErrorInvalidValue;
}

// Sums and maxima over the lanes of a whole warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int lanes = kWarpSize / 2; lanes; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
  for (int lanes = kWarpSize / 2; lanes; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lanes));
  return value;
}

// d += a b on the INT8 tensor cores: a 16 x 32, b 32 x 8 and d 16 x 8, spread over the lanes of a whole warp
// as the PTX ISA says for mma.m16n8k32. Before sm_80 the tensor cores took a quarter of that at a time, with
// the same fragments.
__device__ __forceinline__ void mma_s8_16x8x32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef DFSSM_EMULATION
  emulation::mma_s8_16x8x32(d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 2; ++k) {
      asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                   : "+r"(d[2 * half]), "+r"(d[2 * half + 1])
                   : "r"(a[2 * k + half]), "r"(b[k]));
    }
  }
#endif
}

// The same on the fp16 tensor cores with fp32 sums, from sm_80 on: a 16 x 16, b 16 x 8 (m16n8k16).
__device__ __forceinline__ void mma_f16_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
#ifdef DFSSM_EMULATION
  emulation::mma_f16_16x8x16(d, a, b);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
      "%1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory to fragments of mma: lanes 8 i .. 8 i + 7 name the
// rows of matrix i, 16 bytes each; lane 4 g + t gets two neighbours of each, (g, 2 t) and (g, 2 t + 1), or
// transposed (2 t, g) and (2 t + 1, g).
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
#ifdef DFSSM_EMULATION
  emulation::load_matrices(out, row, transposed);
#else
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
#endif
}

// Lets the launch that follows begin, and waits until the one before has ended and its writes are seen. Every
// kernel calls it before it touches what another may have written or may still read: anything but weights.
// It does nothing where launches do not overlap (common/launch.h).
__device__ __forceinline__ void wait_for_launch_before() {
#ifdef DFSSM_EMULATION
  emulation::wait_for_launch_before();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory without a register in between, both addresses multiples of 16. The
// data are there for this thread after copy_async_wait<groups>, which leaves at most that many committed
// groups under way, and for the others after a barrier. Before sm_80 they are plain copies.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
#ifdef DFSSM_EMULATION
  emulation::copy_async(shared, global, 16);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#ifdef DFSSM_EMULATION
  emulation::copy_async_commit();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int groups>
__device__ __forceinline__ void copy_async_wait() {
#ifdef DFSSM_EMULATION
  emulation::copy_async_wait(groups);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

}  // namespace dfssm::trt
