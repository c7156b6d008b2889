// Loads libdfssm_ort_cpu.so as ONNX Runtime does, with as little of ONNX Runtime as registering takes, and writes the kernel
// tables that this CPU can run, the one in use, and the ops that are registered: `load_library LIBRARY`.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <string>

namespace {

std::string names;

OrtStatus* ORT_API_CALL create_domain(const char* name, OrtCustomOpDomain** out) noexcept {
  names = std::string(name) + ":";
  *out = reinterpret_cast<OrtCustomOpDomain*>(&names);
  return nullptr;
}
OrtStatus* ORT_API_CALL add_op(OrtCustomOpDomain*, const OrtCustomOp* op) noexcept {
  names += std::string(" ") + op->GetName(op);
  return nullptr;
}
OrtStatus* ORT_API_CALL add_domain(OrtSessionOptions*, OrtCustomOpDomain*) noexcept { return nullptr; }

const OrtApi* ORT_API_CALL get_api(uint32_t) noexcept {
  static OrtApi api{};
  api.CreateCustomOpDomain = create_domain;
  api.CustomOpDomain_Add = add_op;
  api.AddCustomOpDomain = add_domain;
  return &api;
}
const char* ORT_API_CALL get_version() noexcept { return "1.24.0"; }

}  // namespace

int main(int, char** arguments) {
  void* const library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  using Text = const char* (*)();
  using Register = OrtStatus* (*)(OrtSessionOptions*, const OrtApiBase*);
  const OrtApiBase base{get_api, get_version};
  const auto register_ops = reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"));
  if (register_ops(nullptr, &base)) return 1;
  std::printf("%s\n%s\n%s\n", reinterpret_cast<Text>(dlsym(library, "dfssm_cpu_isas"))(),
              reinterpret_cast<Text>(dlsym(library, "dfssm_cpu_isa"))(), names.c_str());
}
