// This machine, as Linux tells of it.
#pragma once

#include <cstdint>
#include <string>

namespace dfssm::native {

// Physical cores that this process may use, and no more than the quota of its control group; at least 1. A second
// hyperthread of a core adds nothing to a step that is bound by memory.
int default_threads();

int64_t physical_memory();  // bytes

std::string variable(const char* name);  // $name; "" where it is not set

}  // namespace dfssm::native
