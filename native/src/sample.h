// The choice of the next token: runtime/sampling.py in C++, the same token for the same logits, seed and position.
#pragma once

#include <dfssm/runtime.h>

#include <cstdint>

namespace dfssm::native {

// Throws Failure for a setting out of range, and where the largest of logits f32[count] is not finite.
int64_t sample(const float* logits, size_t count, int64_t position, const dfssm_sampling& sampling);

}  // namespace dfssm::native
