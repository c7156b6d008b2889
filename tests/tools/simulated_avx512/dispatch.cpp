// In place of kernels/dispatch.cpp: one table, the simulated one, on any CPU.
#include "tables.h"

namespace dfssm {
namespace {

const KernelTable* simulated() {
  static const KernelTable table = [] {
    KernelTable renamed = avx512vnni::kTable;
    renamed.name = "avx512vnni-simulated";
    return renamed;
  }();
  return &table;
}

}  // namespace

KernelTables usable_kernels() {
  static const KernelTable* const table = simulated();
  return {&table, 1};
}

const char* usable_names() { return simulated()->name; }

const KernelTable& kernels() { return *simulated(); }

const char* kernels_error() { return nullptr; }

}  // namespace dfssm
