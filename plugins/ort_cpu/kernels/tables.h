// The tables of the instruction sets; dispatch.cpp picks one. The matmul entries of a vector table live in a
// source file of their own and are declared here.
#pragma once

#include "kernels.h"

namespace dfssm {

namespace scalar {
extern const KernelTable kTable;
}

// The same entries for every vector instruction set.
#define DFSSM_DECLARE_VECTOR_KERNELS                                       \
  extern const KernelTable kTable;                                         \
  size_t scaffold_pack_bytes(int64_t n, int64_t K);                        \
  void scaffold_pack(const int8_t* q, int64_t n, int64_t K, void* packed); \
  void scaffold_matmul(const ScaffoldArgs& args, int64_t m0, int64_t m1);  \
  void int8_matmul(const Int8Args& args, int64_t m0, int64_t m1);

namespace avx2 {
DFSSM_DECLARE_VECTOR_KERNELS
}
namespace avx512vnni {
DFSSM_DECLARE_VECTOR_KERNELS
}
#undef DFSSM_DECLARE_VECTOR_KERNELS

}  // namespace dfssm
