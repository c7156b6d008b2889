// The tables of the instruction sets; dispatch.cpp picks one. Vector tables are listed in sources.cmake, which
// writes isas.h: DFSSM_ISA(name, whether this CPU can run it) for each. Their matmul entries live in a source
// file of their own and are declared here.
#pragma once

#include "kernels.h"

namespace dfssm {

namespace scalar {
extern const KernelTable kTable;
}

#define DFSSM_ISA(isa, cpu_runs_it)                                                    \
  namespace isa {                                                                      \
  extern const KernelTable kTable;                                                     \
  size_t scaffold_pack_bytes(int layout, int64_t n, int64_t K);                        \
  void scaffold_pack(int layout, const int8_t* q, int64_t n, int64_t K, void* packed); \
  void scaffold_matmul(const ScaffoldArgs& args, int64_t m0, int64_t m1);              \
  void int8_matmul(const Int8Args& args, int64_t m0, int64_t m1);                      \
  }
#include "isas.h"
#undef DFSSM_ISA

}  // namespace dfssm
