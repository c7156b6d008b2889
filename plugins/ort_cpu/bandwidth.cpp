// What the memory gives, in several ways to go through it, and the clock of a core, as C functions: as in machine.cpp.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "export.h"

namespace {

constexpr int64_t kLine = 64, kPage = 4096, kGroup = 8 * kPage, kHuge = 2 << 20, kAhead = 12 << 10;

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Which is fastest depends on the machine, by up to 1.6 times: they are all tried. A pattern is a number: its way, times
// 4; plus 2 for software prefetch; plus 1 for pages of 2 MB.
constexpr const char* kPatterns =
    "1 stream, 4 kB pages;1 stream, 2 MB pages;1 stream, prefetch, 4 kB pages;1 stream, prefetch, 2 MB pages;"
    "4 far streams, 4 kB pages;4 far streams, 2 MB pages;4 far streams, prefetch, 4 kB pages;"
    "4 far streams, prefetch, 2 MB pages;"
    "8 pages at once, 4 kB pages;8 pages at once, 2 MB pages;8 pages at once, prefetch, 4 kB pages;"
    "8 pages at once, prefetch, 2 MB pages";
constexpr int kWays = 3;

// A line of cache. Its loads are as wide as those of the instruction set that a function is compiled for.
typedef uint64_t Line __attribute__((vector_size(kLine), may_alias));

// `streams` runs of `length` bytes, `stride` apart, side by side. Reads add up in `sum`; writes add `zero`.
template <int streams, bool writes>
inline __attribute__((always_inline)) void walk(char* memory, int64_t length, int64_t stride, int64_t ahead,
                                                uint64_t zero, Line* sum) {
  for (int64_t at = 0; at < length; at += kLine) {
    for (int s = 0; s < streams; ++s) {
      char* const line = memory + s * stride + at;
      if (ahead) __builtin_prefetch(line + ahead);
      if (writes) {
        *reinterpret_cast<Line*>(line) += zero;
      } else {
        sum[s % 4] += *reinterpret_cast<const Line*>(line);
      }
    }
  }
}

template <bool writes>
inline __attribute__((always_inline)) uint64_t pass(char* memory, int64_t bytes, int way, bool prefetch,
                                                    uint64_t zero) {
  Line sum[4] = {};
  if (way == 0) {
    prefetch ? walk<1, writes>(memory, bytes, 0, kAhead, zero, sum)
             : walk<1, writes>(memory, bytes, 0, 0, zero, sum);
  } else if (way == 1) {
    prefetch ? walk<4, writes>(memory, bytes / 4, bytes / 4, kAhead, zero, sum)
             : walk<4, writes>(memory, bytes / 4, bytes / 4, 0, zero, sum);
  } else {
    for (int64_t group = 0; group < bytes; group += kGroup) {
      prefetch ? walk<8, writes>(memory + group, kPage, kPage, kGroup, zero, sum)
               : walk<8, writes>(memory + group, kPage, kPage, 0, zero, sum);
    }
  }
  const Line all = sum[0] + sum[1] + sum[2] + sum[3];
  uint64_t total = 0;
  for (int j = 0; j < 8; ++j) total += all[j];
  return total;
}

#ifdef __x86_64__
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t go_through(char* memory, int64_t bytes, int way, bool prefetch, bool writes, uint64_t zero) {
  return writes ? pass<true>(memory, bytes, way, prefetch, zero)
                : pass<false>(memory, bytes, way, prefetch, zero);
}

// Words of 1 on pages of one size. Kept, as filling it takes longer than reading it.
class Memory {
 public:
  char* get(int64_t bytes, bool huge) {
    if (bytes > bytes_) {
      void* const found =
          mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (found == MAP_FAILED) throw std::bad_alloc();
      if (mapped_) munmap(mapped_, bytes_ + kHuge);
      mapped_ = found;
      bytes_ = bytes;
      madvise(found, bytes + kHuge, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
      std::fill_n(reinterpret_cast<uint64_t*>(start()), bytes / 8, 1);
    }
    return start();
  }

 private:
  char* start() const {
    return reinterpret_cast<char*>((reinterpret_cast<intptr_t>(mapped_) + kHuge - 1) & -kHuge);
  }
  void* mapped_ = nullptr;
  int64_t bytes_ = 0;
};

double bandwidth(int64_t bytes, int threads, int pattern, bool writes) {
  static Memory small, huge;
  static volatile uint64_t zero = 0;
  const int64_t part = bytes / threads / kGroup * kGroup, all = part * threads;
  char* const memory = pattern % 2 ? huge.get(all, true) : small.get(all, false);
  std::atomic<uint64_t> total = 0;
  std::atomic<int> waiting = 0;
  std::atomic<bool> go = false;
  const auto work = [&](int i) {
    total += go_through(memory + i * part, part, pattern / 4, pattern / 2 % 2, writes, zero);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([&, i] {
      for (++waiting; !go;) std::this_thread::yield();
      work(i);
    });
  }
  while (waiting < threads - 1) std::this_thread::yield();
  const auto start = Clock::now();
  go = true;
  work(0);
  for (std::thread& other : others) other.join();
  const double seconds = since(start);
  // Every word is 1 and stays so: that all were read is known.
  if (total != static_cast<uint64_t>(writes ? 0 : all / 8)) return 0;
  return (writes ? 2 : 1) * static_cast<double>(all) / seconds * 1e-9;
}

}  // namespace

// Names of the patterns, by their numbers, separated by semicolons.
DFSSM_EXPORT const char* dfssm_memory_patterns() { return kPatterns; }

// GB/s of one pass over `bytes` of memory by `threads` threads, each over a range of its own: reading, or with `writes`
// updating in place, which counts twice. 0 if the memory or the threads are not to be had, or bytes < 1 MiB.
DFSSM_EXPORT double dfssm_memory_bandwidth(int64_t bytes, int threads, int pattern, int writes) {
  if (bytes < 1 << 20 || threads < 1 || pattern < 0 || pattern >= 4 * kWays) return 0;
  try {
    return bandwidth(bytes, threads, pattern, writes);
  } catch (const std::exception&) {  // nothing is thrown across a C function
    return 0;
  }
}

// Cycles a second of the core that this runs on: an XOR of two registers that waits for the one before takes one cycle.
// An addition of a constant may take less: Golden Cove (Sapphire Rapids) adds up five of a chain when it renames them.
DFSSM_EXPORT double dfssm_cpu_clock() {
  constexpr int kTimes = 1 << 18;
  uint64_t x = 0, y = 3;
  asm volatile("" : "+r"(y));  // unknown to the compiler
  const auto start = Clock::now();
  for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      x ^= y;
      asm volatile("" : "+r"(x));  // so that two do not cancel out
    }
  }
  return 16 * kTimes / since(start);
}
