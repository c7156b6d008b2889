// Chooses a kernel table from CPUID and DFSSM_ISA. Compiled for the baseline of the architecture.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tables.h"

namespace dfssm {
namespace {

#ifdef DFSSM_X86_KERNELS
// libgcc's CPUID probe; it also asks whether the operating system saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

struct Choice {
  const KernelTable* table;
  char error[256];

  Choice() : error{} {
    const KernelTable* usable[3];
    const int n = usable_kernels(usable);
    table = usable[n - 1];
    const char* forced = std::getenv("DFSSM_ISA");
    if (forced == nullptr || *forced == '\0') return;
    if (const KernelTable* named = kernels_for(forced)) {
      table = named;
      return;
    }
    int used = std::snprintf(error, sizeof error, "DFSSM_ISA is '%.64s'; this CPU can use:", forced);
    for (int i = 0; i < n; ++i) {
      used += std::snprintf(error + used, sizeof error - used, " %s", usable[i]->name);
    }
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

int usable_kernels(const KernelTable* tables[3]) {
  int n = 0;
  tables[n++] = &scalar::kTable;
#ifdef DFSSM_X86_KERNELS
  __builtin_cpu_init();
  if (has_avx2()) tables[n++] = &avx2::kTable;
  if (has_avx512vnni()) tables[n++] = &avx512vnni::kTable;
#endif
  return n;
}

const KernelTable* kernels_for(const char* name) {
  const KernelTable* usable[3];
  const int n = usable_kernels(usable);
  for (int i = 0; i < n; ++i) {
    if (std::strcmp(usable[i]->name, name) == 0) return usable[i];
  }
  return nullptr;
}

const KernelTable& kernels() { return *choice().table; }

const char* kernels_error() { return choice().error[0] != '\0' ? choice().error : nullptr; }

}  // namespace dfssm
