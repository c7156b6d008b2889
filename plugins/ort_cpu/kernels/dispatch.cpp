// Chooses a kernel table from what the CPU has and DFSSM_ISA. Compiled for the baseline of the architecture.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#ifdef __aarch64__
#include <sys/auxv.h>  // and with it HWCAP_*
#endif

#include "tables.h"

namespace dfssm {
namespace {

struct Tables {
  std::vector<const KernelTable*> usable = {&scalar::kTable};
  std::string names, error;
  const KernelTable* chosen = nullptr;

  Tables() {
    // On x86 libgcc's CPUID probe, which also asks whether the operating system saves the wide registers; on Arm what the
    // kernel tells a process.
#define DFSSM_ISA(isa, cpu_runs_it) \
  if (cpu_runs_it) usable.push_back(&isa::kTable);
#include "isas.h"
#undef DFSSM_ISA
    const char* forced = std::getenv("DFSSM_ISA");
    const std::string wanted = forced && *forced ? forced : usable.back()->name;
    for (const KernelTable* table : usable) {
      names += (names.empty() ? "" : " ") + std::string(table->name);
      if (table->name == wanted) chosen = table;
    }
    if (chosen) return;
    chosen = usable.back();
    error = "DFSSM_ISA is '" + wanted + "'; this CPU can use: " + names;
  }
};

const Tables& tables() {
  static const Tables found;
  return found;
}

}  // namespace

KernelTables usable_kernels() { return {tables().usable.data(), tables().usable.size()}; }

const char* usable_names() { return tables().names.c_str(); }

const KernelTable& kernels() { return *tables().chosen; }

const char* kernels_error() { return tables().error.empty() ? nullptr : tables().error.c_str(); }

}  // namespace dfssm
