// libdfssm_trt.so: what it shows. How its creators get into a plugin registry: there are two ways, because tools differ:
// `load_library` of a registry (trtexec --dynamicPlugins, plugins embedded in an engine) asks for the
// creators with the functions exported here; `polygraphy --plugins` does a plain dlopen and expects to find
// them registered.
#include <vector>

#include "common/creators.h"
#include "common/kernels.h"
#include "common/plugin.h"
#include "common/tensorrt.h"

namespace dfssm::trt {
namespace {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginRegistry;

// The registration that a plain dlopen makes and dlclose ends.
class Registration {
 public:
  Registration() : registry_(loaded_registry()) {
    if (!registry_) return;
    for (IPluginCreatorInterface* creator : creators()) {
      const auto& it = *static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
      // Another copy of this library may have been first.
      if (registry_->getCreator(it.getPluginName(), it.getPluginVersion(), it.getPluginNamespace())) continue;
      if (registry_->registerCreator(*creator, it.getPluginNamespace())) mine_.push_back(creator);
    }
  }
  ~Registration() { end(); }

  void end() {
    for (IPluginCreatorInterface* creator : mine_) registry_->deregisterCreator(*creator);
    mine_.clear();
  }

 private:
  IPluginRegistry* registry_;
  std::vector<IPluginCreatorInterface*> mine_;
};

Registration registration;

// What the Python side looks for in the file (targets/trt_plugins.py), which it need not load for that.
[[gnu::used]] constexpr char kBuild[] =
    "dfssm_trt version=" DFSSM_TRT_VERSION " sm=" DFSSM_TRT_ARCHS " cuda=" DFSSM_TRT_CUDA;

}  // namespace
}  // namespace dfssm::trt

// Part of what load_library looks for; common/tensorrt.cpp says why the finder is not used.
extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

// For load_library, which refuses a library whose creators are registered already: that dlopen was its own.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  dfssm::trt::registration.end();
  const auto& creators = dfssm::trt::creators();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

// For the runtime, which calls them beside the engine on one stream (runtime/cuda.py). They return a cudaError_t.
extern "C" __attribute__((visibility("default"))) int dfssm_largest(const float* logits, int64_t* tokens,
                                                                    float* values, cudaStream_t stream,
                                                                    int32_t rows, int32_t vocab,
                                                                    int32_t count) {
  return dfssm::trt::largest({logits, tokens, values, rows, vocab, count}, stream);
}
extern "C" __attribute__((visibility("default"))) int dfssm_total_weight(const float* logits,
                                                                         const float* divisors,
                                                                         int64_t* totals, cudaStream_t stream,
                                                                         int32_t rows, int32_t vocab) {
  return dfssm::trt::total_weight({logits, divisors, totals, rows, vocab}, stream);
}
