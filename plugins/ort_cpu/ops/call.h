// An op and one call of it. An op, one file beside this, turns inputs that are checked into the arguments of its
// kernels and shares the work out: `run` below. It knows no caller. There are two: ONNX Runtime (ort.h) and the Python
// module for tests (python/_native.cpp).
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <thread>

#include "dfssm_opset.h"
#include "kernels.h"

namespace dfssm {

using opset::Tensor;

// The columns that an op reads of an input [B, T, columns]; `stride` floats from one token to the next.
struct Columns {
  const float* data;
  int64_t stride;
};

class Call {
 public:
  explicit Call(const KernelTable& table) : kernels(table) {}
  Call(const Call&) = delete;

  const KernelTable& kernels;

  const Tensor& operator[](size_t input) const { return inputs_[input]; }
  opset::DType type(size_t input) const { return types_[input]; }
  // The columns of an input from `start` on; all of them where that is -1.
  Columns columns(size_t input, int64_t start) const {
    return {inputs_[input].as<float>() + (start < 0 ? 0 : start), inputs_[input].last()};
  }

  template <class T>
  T* output(size_t index, std::initializer_list<int64_t> shape) {
    return static_cast<T*>(output_data(index, shape.begin(), shape.size()));
  }

  // f(begin, end) over [0, units), on several threads where that pays; `unit_ns` is the estimated time of one
  // unit on one core with AVX-512. f must not throw.
  template <class F>
  void parallel(int64_t units, double unit_ns, const F& f) {
    const auto range = [](const void* of, int64_t begin, int64_t end) {
      (*static_cast<const F*>(of))(begin, end);
    };
    if (units > 0) share_out(units, unit_ns, range, &f);
  }

 protected:
  ~Call() = default;

  using Range = void (*)(const void* f, int64_t begin, int64_t end);
  virtual void share_out(int64_t units, double unit_ns, Range range, const void* f) = 0;
  virtual void* output_data(size_t index, const int64_t* shape, size_t rank) = 0;

  std::array<Tensor, opset::kMaxInputs> inputs_;
  std::array<opset::DType, opset::kMaxInputs> types_{};
};

// The op `S`, whose inputs have the sizes `s`.
template <class S>
void run(Call& call, const typename S::Attributes& a, const typename S::Sizes& s);
#define DECLARE(op) \
  template <>       \
  void run<opset::op>(Call & call, const opset::op::Attributes& a, const opset::op::Sizes& s);
DFSSM_OPS(DECLARE)
DFSSM_DEFERRED_OPS(DECLARE)
#undef DECLARE

// Pieces of work at the head of a parallel section that all of it needs: each thread that arrives takes
// pieces until none is left, and waits for those that others took. A section of its own would cost a meeting
// of the threads, and doing the pieces before the section leaves them to one. Whoever has taken a piece is
// running, so the wait ends.
class Prologue {
 public:
  explicit Prologue(int64_t pieces) : pieces_(pieces) {}

  // piece(i) for every i in [0, pieces), once over all threads; must not throw.
  template <class F>
  void complete(const F& piece) {
    if (done_.load(std::memory_order_acquire) == pieces_) return;
    for (int64_t i; (i = taken_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) {
      piece(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    // Soon, unless its thread lost the core: then to give way brings it back.
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces_; ++spins) {
      if (spins > kSpins) std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 1 << 14;  // tens of us
  const int64_t pieces_;
  std::atomic<int64_t> taken_{0}, done_{0};
};

// Memory of the calling thread that grows to the largest request and stays: no allocation in the steady
// state. One user at a time per thread: an op that hands it to workers lets the workers take theirs, on their
// threads. nullptr if there is no memory, so that workers, which must not throw, can use it.
inline void* thread_scratch(size_t bytes) noexcept {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();  // before the new one: the old contents are never needed
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded));
    capacity = memory ? rounded : 0;
  }
  return memory.get();
}

// What kernels, which include no header of the opset, have from it.
static_assert(kTiny == opset::kTiny && kHalfMax == opset::kHalfMax && kBlock == opset::kBlock);
static_assert(kTileRows == opset::kTileRows[opset::kRow16] && kBlockRows == opset::kTileRows[opset::kRow64]);

}  // namespace dfssm
