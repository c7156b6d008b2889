// CUDA's execution model on the host, for the tests: the kernels' own source, compiled by g++ and run thread by thread.
//
// Execution. A launch runs its blocks one after another. Each thread of a block is a fiber (its own stack,
// switched in user space on one OS thread) that runs until it waits: at a barrier, or in a warp's collective
// (shuffle, vote, mma, __syncwarp) until every lane of the mask is there. State is per OS thread; launches of
// two threads do not meet.
//
// Memory. Kernel sources are compiled with -fsanitize=thread but linked against access.cpp instead of
// libtsan: the compiler reports every load and store, and access.cpp looks at the address. Kernels use
// ordinary pointers, also to shared memory. (-fno-tree-sra keeps a 16-byte access one access, so that its
// alignment is seen.)
//
// What is reported, as cudaErrorLaunchFailure with the text in cudaGetErrorString():
// - an access outside the buffers of add_buffer (where any was added), a store to a read-only one, a load of
//   bytes nobody has written from one that came uninitialised, an address that is no multiple of the access's size;
// - shared memory: outside the array, or bytes this block has not written;
// - races: two accesses to one byte by two threads, one of them a store, not both atomic, and no barrier of
//   the block between them (in one warp also __syncwarp of a mask with both; shuffles order nothing, as CUDA
//   says). In global memory two blocks of a launch count as unordered, until the later one has done an atomic
//   on global memory: a "last block" that saw all tickets may read what the others wrote;
// - a barrier that not all threads of the block reach: one has left the kernel, or waits at another line (on
//   a device those that left are not waited for; a kernel that relies on it is better written without);
// - a collective whose mask lacks the caller, names a lane that left or never was, or a shuffle from outside it;
// - data of copy_async16 read before copy_async_wait: the copy happens at the wait;
// - with dependent_launches(true): global memory that is not read-only, before wait_for_launch_before.
// A bad configuration (threads, grid, shared memory) is cudaErrorInvalidConfiguration, as on a device.
//
// Not modelled: order and timing (nothing runs at the same time: only the rules above find a race), caches,
// fences, which atomics order what, contraction of a * b + c into one rounding, the limits of a particular
// GPU, and the approximate functions: expf, log1pf and such are libm's here.
#pragma once

#include <math.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_fp16.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::dfssm::trt::emulation::thread_index())
#define blockIdx (::dfssm::trt::emulation::block_index())
#define blockDim (::dfssm::trt::emulation::block_size())
#define gridDim (::dfssm::trt::emulation::grid_size())
constexpr int warpSize = 32;

namespace dfssm::trt::emulation {

// Host side.

enum class Contents { constant, written, uninitialised };  // read-only; read and write; nothing in it yet

// From now on kernels of this OS thread may touch `bytes` at `data`, and nothing that was not added. `name`
// is for the reports.
void add_buffer(const char* name, const void* data, size_t bytes, Contents contents);
void clear_buffers();
// Whether launches count as begun before the one before has ended.
void dependent_launches(bool yes);
// What the last failed launch of this OS thread did wrong; empty if none failed since the last call.
const char* last_error();

cudaError_t run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const void* kernel, void (*call)(void*),
                void* parameters, size_t parameters_bytes);

// Device side.

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

enum class Shuffle { index, up, down, exclusive_or };
enum class Reduce { count, all, any };

void* shared_array(const void* declaration, size_t bytes, size_t alignment);
void* dynamic_shared();
int barrier(const char* file, int line, Reduce reduce, bool predicate);
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, Shuffle kind, int operand, int width);
unsigned ballot(unsigned mask, bool predicate);
void mma_s8_16x8x32(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
void mma_f16_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
void load_matrices(unsigned (&out)[4], const void* row, bool transposed);
void wait_for_launch_before();
void copy_async(void* shared, const void* global, size_t bytes);
void copy_async_commit();
void copy_async_wait(int groups);
void atomic_access(const void* address,
                   size_t bytes);  // checks one read-modify-write; the caller then does it

template <class T>
T shuffle(unsigned mask, T value, Shuffle kind, int operand, int width) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = shuffle(mask, word, kind, operand, width);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T, class Update>
__attribute__((no_sanitize_thread)) T atomic(T* address, Update update) {
  atomic_access(address, sizeof *address);
  const T before = *address;
  *address = update(before);
  return before;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace dfssm::trt::emulation

#define __syncthreads() \
  static_cast<void>(    \
      ::dfssm::trt::emulation::barrier(__FILE__, __LINE__, ::dfssm::trt::emulation::Reduce::count, false))
#define __syncthreads_count(predicate) \
  ::dfssm::trt::emulation::barrier(__FILE__, __LINE__, ::dfssm::trt::emulation::Reduce::count, predicate)
#define __syncthreads_and(predicate) \
  ::dfssm::trt::emulation::barrier(__FILE__, __LINE__, ::dfssm::trt::emulation::Reduce::all, predicate)
#define __syncthreads_or(predicate) \
  ::dfssm::trt::emulation::barrier(__FILE__, __LINE__, ::dfssm::trt::emulation::Reduce::any, predicate)

#include "intrinsics.h"
