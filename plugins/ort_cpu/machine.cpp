// What libdfssm_ort_cpu.so tells besides its ops, as C functions: a program asks with dlsym
// (targets/cpu_library.py), no build for its Python is needed.
#include "export.h"
#include "kernels.h"

// Names of the kernel tables that this CPU can run, the plainest first, separated by spaces.
DFSSM_EXPORT const char* dfssm_cpu_isas() { return dfssm::usable_names(); }

// Name of the table in use: $DFSSM_ISA where it is set, else the best. If that names no usable table:
// nullptr, and dfssm_cpu_error() is one line that says so (otherwise nullptr).
DFSSM_EXPORT const char* dfssm_cpu_isa() { return dfssm::kernels_error() ? nullptr : dfssm::kernels().name; }
DFSSM_EXPORT const char* dfssm_cpu_error() { return dfssm::kernels_error(); }
