// In place of kernels/dispatch.cpp: the simulated tables alone, on any CPU. That of AVX-VNNI has the float kernels of AVX-512
// here. Its own are AVX2's, which a CPU without AVX-VNNI runs; simulated, they would double the time to compile.
#include "tables.h"

namespace dfssm {
namespace {

struct Simulated {
  KernelTable avxvnni = avx512vnni::kTable, avx512vnni = avx512vnni::kTable, avx512vbmi = avx512vbmi::kTable;
  const KernelTable* tables[3] = {&avxvnni, &avx512vnni, &avx512vbmi};

  Simulated() {
    avxvnni.scaffold_pack_bytes = avxvnni::scaffold_pack_bytes;
    avxvnni.scaffold_pack = avxvnni::scaffold_pack;
    avxvnni.scaffold_matmul = avxvnni::scaffold_matmul;
    avxvnni.int8_matmul = avxvnni::int8_matmul;
    avxvnni.name = "avxvnni-simulated";
    avx512vnni.name = "avx512vnni-simulated";
    avx512vbmi.name = "avx512vbmi-simulated";
  }
};

const Simulated& simulated() {
  static const Simulated them;
  return them;
}

}  // namespace

KernelTables usable_kernels() { return {simulated().tables, 3}; }

const char* usable_names() { return "avxvnni-simulated avx512vnni-simulated avx512vbmi-simulated"; }

const KernelTable& kernels() { return simulated().avx512vnni; }

const char* kernels_error() { return nullptr; }

}  // namespace dfssm
