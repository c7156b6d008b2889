// As much of a TensorRT as a plugin library meets when it is loaded: a registry and a logger, under the name
// of the library that the headers belong to. For the way of `polygraphy --plugins`, which needs the real one
// with a GPU.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

class Registry : public IPluginRegistry {
 public:
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return true; }
  void setParentSearchEnabled(bool) override {}
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override {
    return getAllCreators(count);
  }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif

  bool registerCreator(IPluginCreatorInterface& creator, const char*) noexcept override {
    creators_.push_back(&creator);
    return true;
  }
  bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept override {
    for (auto it = creators_.begin(); it != creators_.end(); ++it) {
      if (*it == &creator) return creators_.erase(it), true;
    }
    return false;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  IPluginCreatorInterface* getCreator(const char* name, const char* version, const char*) noexcept override {
    for (auto* creator : creators_) {
      const auto* it = static_cast<IPluginCreatorV3One*>(creator);
      if (!std::strcmp(it->getPluginName(), name) && !std::strcmp(it->getPluginVersion(), version))
        return creator;
    }
    return nullptr;
  }
  // Refuses, as TensorRT does, a library with a creator that is there already.
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    void* handle = dlopen(path, RTLD_LAZY);
    auto* get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = get(count);
    for (int32_t i = 0; i < count; ++i) {
      const auto* it = static_cast<IPluginCreatorV3One*>(creators[i]);
      if (getCreator(it->getPluginName(), it->getPluginVersion(), "")) return nullptr;
    }
    creators_.insert(creators_.end(), creators, creators + count);
    return handle;
  }

 private:
  std::vector<IPluginCreatorInterface*> creators_;
} registry;

class Logger : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity == Severity::kERROR) last = message;
  }
  std::string last;
} logger;

}  // namespace

extern "C" {
IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
ILogger* getLogger() noexcept { return &logger; }

int fake_count() {
  int32_t count;
  registry.getAllCreators(&count);
  return count;
}
int fake_load(const char* path) { return registry.loadLibrary(path) != nullptr; }
// What RMSNorm's creator says to an attribute of that name, which is -1.
const char* fake_error(const char* name) {
  const float value = -1;
  const PluginField field{name, &value, PluginFieldType::kFLOAT32, 1};
  const PluginFieldCollection fields{1, &field};
  auto* creator = static_cast<IPluginCreatorV3One*>(registry.getCreator("RMSNorm", "0000000000000000", ""));
  return creator->createPlugin("a node", &fields, TensorRTPhase::kBUILD) ? "" : logger.last.c_str();
}
}
