#include "simd__avx512vnni.h"

#define DFSSM_ISA_NAMESPACE avx512vnni
#define DFSSM_ISA_NAME "avx512vnni"
#include "float-inl.h"
