#include "simd__dotprod.h"

#define DFSSM_ISA_NAMESPACE dotprod
#define DFSSM_ISA_NAME "dotprod"
#include "float-inl.h"

// I8MM adds products of integers alone: the float kernels are these.
namespace dfssm::i8mm {
using namespace dotprod;
const KernelTable kTable = DFSSM_KERNELS("i8mm");
}  // namespace dfssm::i8mm
