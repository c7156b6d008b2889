#include "simd__avx512vnni.h"

#define DFSSM_ISA_NAMESPACE avx512vnni
#define DFSSM_ISA_NAME "avx512vnni"
#include "float-inl.h"

// VBMI adds look-ups of the scaffold alone: the float kernels are these.
namespace dfssm::avx512vbmi {
using namespace avx512vnni;
const KernelTable kTable = DFSSM_KERNELS("avx512vbmi");
}  // namespace dfssm::avx512vbmi
