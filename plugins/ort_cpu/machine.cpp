// What libdfssm_ort_cpu.so tells besides its ops, as C functions: a program asks with dlsym
// (targets/cpu_library.py), no build for its Python is needed.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "kernels.h"

#define DFSSM_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the kernel tables that this CPU can run, the plainest first, separated by spaces.
DFSSM_EXPORT const char* dfssm_cpu_isas() { return dfssm::usable_names(); }

// Name of the table in use: $DFSSM_ISA where it is set, else the best. If that names no usable table:
// nullptr, and dfssm_cpu_error() is one line that says so (otherwise nullptr).
DFSSM_EXPORT const char* dfssm_cpu_isa() { return dfssm::kernels_error() ? nullptr : dfssm::kernels().name; }
DFSSM_EXPORT const char* dfssm_cpu_error() { return dfssm::kernels_error(); }

namespace {

// A core that follows eight pages at once reads up to 1.4 times as fast as one that reads in order.
double read_bandwidth(int64_t bytes, int threads) {
  constexpr int64_t kLine = 8, kPage = 512, kGroup = 8 * kPage;  // in words
  static std::vector<uint64_t> memory;  // kept: filling it takes longer than reading it
  const int64_t groups = bytes / 8 / kGroup, words = groups * kGroup;
  if (static_cast<int64_t>(memory.size()) < words) memory.assign(words, 1);
  std::atomic<uint64_t> total = 0;
  const auto read = [&](int64_t part) {
    uint64_t sum[kLine] = {};
    for (int64_t group = groups * part / threads * kGroup; group < groups * (part + 1) / threads * kGroup;
         group += kGroup) {
      for (int64_t line = group; line < group + kPage; line += kLine) {
        for (int64_t at = line; at < line + kGroup; at += kPage) {
          __builtin_prefetch(memory.data() + at + kGroup);
          for (int j = 0; j < kLine; ++j) sum[j] += memory[at + j];
        }
      }
    }
    for (const uint64_t part_sum : sum) total += part_sum;
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(read, i);
  read(0);
  for (std::thread& other : others) other.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // Every word is 1: that all were read is known.
  return total == static_cast<uint64_t>(words) ? static_cast<double>(words) * 8 / seconds * 1e-9 : 0;
}

}  // namespace

// GB/s of one pass over `bytes` of memory by `threads` threads, each over a range of its own: the fastest
// plain read we know. 0 if the memory or the threads are not to be had, or bytes < 1 MiB.
DFSSM_EXPORT double dfssm_read_bandwidth(int64_t bytes, int threads) {
  if (bytes < 1 << 20 || threads < 1) return 0;
  try {
    return read_bandwidth(bytes, threads);
  } catch (const std::exception&) {  // nothing is thrown across a C function
    return 0;
  }
}
