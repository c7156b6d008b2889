#include "common/tensorrt.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>

#define DFSSM_TEXT_OF(x) #x
#define DFSSM_TEXT(x) DFSSM_TEXT_OF(x)

namespace dfssm::trt {

using Severity = nvinfer1::ILogger::Severity;

// ILogger as TensorRT 10 has it, and as a versioned interface, which it is in TensorRT 11 and TensorRT-RTX:
// log() is another entry of its table there. (The finder that TensorRT gives to setLoggerFinder has changed
// likewise, and says nothing of the TensorRT it belongs to: it is not used.) In an anonymous namespace the
// compiler would see that nothing implements them, and call no one's log().
struct PlainLogger {
  virtual void log(Severity severity, const char* message) noexcept = 0;

 protected:
  ~PlainLogger() = default;
};
struct VersionedLogger : nvinfer1::IVersionedInterface {
  virtual void log(Severity severity, const char* message) noexcept = 0;
};

namespace {

constexpr int32_t kOldestRtxMinor = 7;  // what older ones have was not looked at

// A function of a library that is loaded already, or nullptr.
template <class F>
F* loaded_function(const char* library, const char* name) noexcept {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return nullptr;
  void* symbol = dlsym(handle, name);
  dlclose(handle);  // the reference that dlopen took, not the library
  return reinterpret_cast<F*>(symbol);
}

template <class Logger>
bool log_to(const char* library, const char* message) noexcept {
  auto* get = loaded_function<Logger*()>(library, "getLogger");
  Logger* logger = get ? get() : nullptr;
  if (logger) logger->log(Severity::kERROR, message);
  return logger != nullptr;
}

}  // namespace

void log_error(const char* message) noexcept {
  constexpr const char* kRtx = "libtensorrt_rtx.so.1";
  auto* rtx_minor = loaded_function<int32_t()>(kRtx, "getInferLibMinorVersion");
  if (rtx_minor && rtx_minor() >= kOldestRtxMinor && log_to<VersionedLogger>(kRtx, message)) return;
  if (log_to<VersionedLogger>("libnvinfer.so.11", message)) return;
  if (log_to<PlainLogger>("libnvinfer.so.10", message)) return;
  std::fprintf(stderr, "dfssm: %s\n", message);
}

nvinfer1::IPluginRegistry* loaded_registry() noexcept {
  auto* get = loaded_function<nvinfer1::IPluginRegistry*()>("libnvinfer.so." DFSSM_TEXT(NV_TENSORRT_MAJOR),
                                                            "getPluginRegistry");
  return get ? get() : nullptr;
}

}  // namespace dfssm::trt
