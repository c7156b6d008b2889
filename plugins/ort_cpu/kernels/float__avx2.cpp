#include "simd__avx2.h"

#define DFSSM_ISA_NAMESPACE avx2
#define DFSSM_ISA_NAME "avx2"
#include "float-inl.h"
