// Software prefetch of a long sequential stream, shared by the x86 kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dfssm {
namespace {

// One core that reads memory from end to end keeps one page busy at a time: its prefetchers run ahead within
// a page only, and the fill buffers alone do not hold enough lines to cover a memory access. So the window of
// eight pages after the current one is fetched a line from each page in turn, one line for each line
// consumed: the hardware then follows eight pages at once. Into L2, since a window may be as large as L1. On
// Sapphire Rapids one core reads 14 GB/s this way and 10 GB/s in order (bench/kernels.py).
class Ahead {
 public:
  // At byte `position` of the stream that starts at `base`.
  Ahead(const void* base, int64_t position)
      : window_(reinterpret_cast<uintptr_t>(base) + (position / kWindow + 1) * kWindow),
        line_(position % kWindow / kLine) {}

  // Call once for each line of 64 bytes consumed.
  inline void next() {
    const uintptr_t address = window_ + line_ % kPages * kPage + line_ / kPages * kLine;
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
    if (++line_ == kWindow / kLine) {
      line_ = 0;
      window_ += kWindow;
    }
  }

 private:
  static constexpr uint64_t kLine = 64, kPage = 4096, kPages = 8, kWindow = kPages * kPage;
  uintptr_t window_;  // an integer, as it may lie past the end of the array
  uint64_t line_;
};

}  // namespace
}  // namespace dfssm
