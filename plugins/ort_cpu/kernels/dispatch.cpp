// Chooses a kernel table from CPUID and DFSSM_ISA. Compiled for the baseline of the architecture.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tables.h"

namespace dfssm {
namespace {

struct Usable {
  std::vector<const KernelTable*> tables = {&scalar::kTable};
  std::string names;

  Usable() {
    // libgcc's CPUID probe; it also asks whether the operating system saves the wide registers.
#define DFSSM_ISA(isa, cpu_runs_it) \
  if (cpu_runs_it) tables.push_back(&isa::kTable);
#include "isas.h"
#undef DFSSM_ISA
    for (const KernelTable* table : tables) names += (names.empty() ? "" : " ") + std::string(table->name);
  }
};

const Usable& usable() {
  static const Usable found;
  return found;
}

struct Choice {
  const KernelTable* table = usable().tables.back();
  std::string error;

  Choice() {
    const char* forced = std::getenv("DFSSM_ISA");
    if (forced == nullptr || *forced == '\0') return;
    if (const KernelTable* named = kernels_for(forced)) {
      table = named;
    } else {
      error = "DFSSM_ISA is '" + std::string(forced) + "'; this CPU can use: " + usable_names();
    }
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

}  // namespace

KernelTables usable_kernels() { return {usable().tables.data(), usable().tables.size()}; }

const char* usable_names() { return usable().names.c_str(); }

const KernelTable& kernels() { return *choice().table; }

const char* kernels_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }

}  // namespace dfssm
