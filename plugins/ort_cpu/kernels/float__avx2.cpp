#include "simd__avx2.h"

#define DFSSM_ISA_NAMESPACE avx2
#define DFSSM_ISA_NAME "avx2"
#include "float-inl.h"

// AVX-VNNI adds products of integers alone: the float kernels are these.
namespace dfssm::avxvnni {
using namespace avx2;
const KernelTable kTable = DFSSM_KERNELS("avxvnni");
}  // namespace dfssm::avxvnni
