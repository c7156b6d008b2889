// What a fuzz entry makes of the bytes that it is given: sizes, flags, arrays of hostile numbers, and comparisons.
//
// Arrays have no slack: one element further is AddressSanitizer's. They begin at a drawn offset from their block, so that
// no alignment can be relied on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "tables.h"

namespace dfssm::fuzz {

inline void require(bool holds, const char* table, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", table, what);
  std::abort();
}

// The tables to compare: the scalar one, which is the reference, then all others that are usable here.
inline bool is_reference(const KernelTable* table) { return table == &scalar::kTable; }
inline std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> all = {&scalar::kTable};
  for (const KernelTable* table : usable_kernels()) {
    if (!is_reference(table)) all.push_back(table);
  }
  return all;
}

template <class T>
class Array {
 public:
  Array(int64_t count, int64_t offset)
      : size(count), block_(new T[count + offset]()), data_(block_.get() + offset) {}

  operator T*() { return data_; }
  operator const T*() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size; }

  // For a second run of the same call.
  Array copy() const {
    Array other(size, data_ - block_.get());
    std::copy(data_, data_ + size, other.data_);
    return other;
  }

  void fill(const Array& other) { std::copy(other.data_, other.data_ + size, data_); }

  // The largest magnitude, NaN aside.
  double largest() const {
    double m = 0;
    for (int64_t i = 0; i < size; ++i) m = std::fmax(m, std::fabs(static_cast<double>(data_[i])));
    return m;
  }

  const int64_t size;

 private:
  std::unique_ptr<T[]> block_;
  T* data_;
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : next_(data), end_(data + size) {
    for (size_t i = 0; i < size; ++i) noise_ = (noise_ ^ data[i]) * 1099511628211u;
  }

  // Whether a number came that is infinite or may overflow: then results are not compared, only computed.
  bool wild = false;

  int64_t size(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }
  // All sizes, the small ones more often (mean 1/3): an execution takes the product of them. At most 128 of them, so that
  // none is left out.
  int64_t small(int64_t low, int64_t high) {
    const int64_t drawn = byte();
    return low + ((high - low + 1) * drawn * drawn >> 16);
  }
  bool flag() { return byte() & 1; }

  Array<float> floats(int64_t count) {
    Array<float> array(count, size(0, 3));
    for (float& value : array) value = number();
    return array;
  }

  // Any bits of integers of one byte.
  template <class T>
  Array<T> bytes(int64_t count) {
    static_assert(sizeof(T) == 1);
    Array<T> array(count, size(0, 3));
    for (T& value : array) value = static_cast<T>(byte());
    return array;
  }

  // Numbers of pending tokens.
  Array<uint8_t> counts(int64_t count) {
    Array<uint8_t> array(count, 0);
    for (uint8_t& value : array) value = static_cast<uint8_t>(size(0, kSlots - 1));
    return array;
  }

  uint16_t half_bits() { return static_cast<uint16_t>(byte() | byte() << 8); }

 private:
  // The input's bytes; when they are used up, noise that they seed.
  uint8_t byte() {
    if (next_ != end_) return *next_++;
    noise_ = noise_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint8_t>(noise_ >> 56);
  }

  // Mostly between -3 and 3. Noise draws only such: what is odd shall come of the input.
  float number() {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    static constexpr float kOdd[16] = {std::numeric_limits<float>::quiet_NaN(),
                                       kInfinity,
                                       -kInfinity,
                                       3e38f,
                                       -3e38f,
                                       1e-45f,
                                       -1e-38f,
                                       9e-31f,
                                       2e-30f,
                                       0.0f,
                                       -0.0f,
                                       65504.0f,
                                       -65520.0f,
                                       88.8f,
                                       -104.0f,
                                       1e10f};
    const bool noise = next_ == end_;
    const uint8_t b = byte();
    if (noise || b < 240) return (static_cast<float>(b) - 120) / 40;
    const float odd = kOdd[b - 240];
    wild = wild || std::fabs(odd) > 60;
    return odd;
  }

  const uint8_t* next_;
  const uint8_t* end_;
  uint64_t noise_ = 14695981039346656037u;
};

// NaN where the reference has NaN, and nowhere else; where nothing overflows within `tolerance` of it, or a few steps of
// the numbers below the normal ones, which are all as far apart.
inline void require_close(const Input& in, const char* table, const char* what, const float* found,
                          const float* expected, int64_t count, double tolerance) {
  if (in.wild) return;
  tolerance += 1e-38;
  for (int64_t i = 0; i < count; ++i) {
    const bool close = std::isnan(expected[i])
                           ? std::isnan(found[i])
                           : std::fabs(static_cast<double>(found[i]) - expected[i]) <= tolerance;
    if (!close) {
      std::fprintf(stderr, "%s: %s[%ld] is %.9g, the reference has %.9g, allowed is %.3g\n", table, what,
                   static_cast<long>(i), found[i], expected[i], tolerance);
      std::abort();
    }
  }
}

}  // namespace dfssm::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
