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
      : first_window_(reinterpret_cast<uintptr_t>(base) + kWindow), line_(position / kLine) {}

  // Call once for each line of 64 bytes consumed. No branch: gcc 12 splits the loop around one, and then
  // copies every accumulator of the loop.
  inline void next() {
    const uint64_t window = line_ / (kWindow / kLine), page = line_ % kPages,
                   line = line_ / kPages % (kPage / kLine);
    _mm_prefetch(
        reinterpret_cast<const char*>(first_window_ + window * kWindow + page * kPage + line * kLine),
        _MM_HINT_T1);
    ++line_;
  }

 private:
  static constexpr uint64_t kLine = 64, kPage = 4096, kPages = 8, kWindow = kPages * kPage;
  uintptr_t first_window_;  // an integer, as windows may lie past the end of the array
  uint64_t line_;
};

}  // namespace
}  // namespace dfssm
