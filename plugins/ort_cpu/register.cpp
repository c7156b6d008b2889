// libdfssm_ort_cpu.so: RegisterCustomOps is the one symbol ONNX Runtime looks for.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "export.h"
#include "ort.h"

namespace dfssm::ort {
namespace {

OrtStatus* too_old(const OrtApiBase* base) {
  const std::string text = "dfssm: this library needs the API of ONNX Runtime 1." +
                           std::to_string(kApiVersion) + ", which version " + base->GetVersionString() +
                           " does not have; upgrade onnxruntime";
  return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
}

// DFSSM_LOG=1: say once which kernels run. To stderr: when a library is registered, no session and so no
// logger exists.
void log_choice() {
  const char* wanted = std::getenv("DFSSM_LOG");
  if (!wanted || std::strcmp(wanted, "1") != 0) return;
  std::fprintf(stderr, "dfssm: ort-cpu kernels: %s (usable: %s)\n", kernels().name, usable_names());
}

// One domain for the life of the process: sessions keep a pointer to it, and it must outlive the last of
// them.
OrtCustomOpDomain* make_domain() {
  OrtCustomOpDomain* domain = nullptr;
  check(api->CreateCustomOpDomain(opset::kDomain, &domain));
#define ADD(name) check(api->CustomOpDomain_Add(domain, custom_op<opset::name>()));
  DFSSM_OPS(ADD)
  DFSSM_DEFERRED_OPS(ADD)
#undef ADD
  log_choice();
  return domain;
}

}  // namespace
}  // namespace dfssm::ort

DFSSM_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace dfssm::ort;
  static const bool supported = (api = base->GetApi(kApiVersion)) != nullptr;
  if (!supported) return too_old(base);
  return guarded("dfssm", [&] {
    std::sscanf(base->GetVersionString(), "1.%d", &ort_minor);
    if (const char* error = dfssm::kernels_error()) fail(error);
    static OrtCustomOpDomain* const domain = make_domain();
    check(api->AddCustomOpDomain(options, domain));
  });
}

// From now on the time of each op is counted, from 0; with `wanted` 0 no longer. Not while a session runs.
DFSSM_EXPORT void dfssm_time_ops(int wanted) {
#define RESET(name) dfssm::ort::op_time<dfssm::opset::name>.reset();
  if (wanted) {
    DFSSM_OPS(RESET)
    DFSSM_DEFERRED_OPS(RESET)
  }
#undef RESET
  dfssm::ort::OpTime::wanted = wanted != 0;
}

// Seconds that all nodes of an op took while they were counted; -1: no such op.
DFSSM_EXPORT double dfssm_op_seconds(const char* op) {
#define FIND(name) \
  if (std::strcmp(op, #name) == 0) return 1e-9 * dfssm::ort::op_time<dfssm::opset::name>.nanoseconds();
  DFSSM_OPS(FIND)
  DFSSM_DEFERRED_OPS(FIND)
#undef FIND
  return -1;
}
