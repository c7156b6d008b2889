#include <cstdlib>
#include <memory>

#include "call.h"

namespace dfssm {

void* thread_scratch(size_t bytes) noexcept {
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
static_assert(kTiny == opset::kTiny && kHalfMax == opset::kHalfMax);
static_assert(kTileRows == opset::kTileRows[opset::kRow16]);

}  // namespace dfssm
