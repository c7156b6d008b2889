#include "backend.h"

#include <dfssm_opset.h>
#include <dlfcn.h>
#include <unistd.h>

#include <map>

#include "failure.h"
#include "machine.h"

namespace dfssm::native {
namespace {

const char* const kDtypeNames[] = {"float32", "float16", "int8", "uint8"};

std::string describe(const Spec& spec) {
  std::string text = kDtypeNames[static_cast<int>(spec.dtype)];
  for (const int64_t size : spec.shape) text += " " + std::to_string(size);
  return text;
}

// opset/sizes.py, `Sizes.states`: what a layer keeps of one sequence. Empty for a state dtype that is unknown.
std::vector<Spec> states_of(const Sizes& s, std::string dtype) {
  static const std::map<std::string, Dtype> known = {
      {"fp32", Dtype::kF32}, {"fp16", Dtype::kF16}, {"int8", Dtype::kI8}};
  static const std::string kDeferred = "-deferred";
  const bool deferred =
      dtype.size() > kDeferred.size() && dtype.substr(dtype.size() - kDeferred.size()) == kDeferred;
  if (deferred) dtype.resize(dtype.size() - kDeferred.size());
  const auto stored = known.find(dtype);
  if (stored == known.end()) return {};
  const int64_t slots = 2 * opset::kBlock, inner = s.expand * s.d_model, heads = inner / s.headdim,
                past = s.d_conv - 1;
  const int64_t maps = s.ngroups * s.d_state, channels = inner + 2 * maps;
  std::vector<Spec> states = {
      {"conv_state", Dtype::kF32,
       deferred ? std::vector<int64_t>{past + slots, channels} : std::vector<int64_t>{channels, past}},
      {"ssm_state", stored->second, {heads, s.d_state, s.headdim}},
  };
  if (deferred) {
    states.push_back({"pending_x", Dtype::kF32, {slots, inner}});
    states.push_back({"pending_B", Dtype::kF32, {slots, maps}});
    states.push_back({"pending_decay", Dtype::kF32, {slots, heads}});
    states.push_back({"pending_count", Dtype::kU8, {}});
  }
  if (stored->second == Dtype::kI8) states.push_back({"ssm_scale", Dtype::kF32, {heads, s.d_state}});
  return states;
}

// Throws Failure naming the first value of the manifest that is not so in what was opened.
void require_config(const Bundle& bundle, const Backend& backend) {
  const Sizes& sizes = bundle.manifest.sizes;
  const auto check = [&](bool good, const std::string& what) {
    require(good, DFSSM_BAD_BUNDLE,
            bundle.files.folder() + ": its manifest and its graph differ in " + what +
                ": compile the model again");
  };
  check(sizes.vocab_size == backend.vocab_size, "vocab_size");
  const std::vector<Spec> states = states_of(sizes, bundle.manifest.state_dtype);
  check(!states.empty() && backend.layout.size() % states.size() == 0 &&
            backend.layout.size() / states.size() == static_cast<uint64_t>(sizes.n_layer),
        "n_layer or state_dtype");
  std::map<std::string, const Spec*> found;
  for (const Spec& spec : backend.layout) found[spec.name] = &spec;
  for (int64_t layer = 0; layer < sizes.n_layer; ++layer) {
    for (const Spec& state : states) {
      const std::string name = state.name + "." + std::to_string(layer);
      const auto spec = found.find(name);
      check(spec != found.end() && describe(*spec->second) == describe(state),
            name + " (" + describe(state) + ")");
    }
  }
}

// Sets where each tensor lies in the memory of a state, each at a cache line.
void place(Backend& backend) {
  constexpr size_t kLine = 64;
  size_t at = 0;
  for (Spec& spec : backend.layout) {
    size_t bytes = item_size(spec.dtype);
    for (const int64_t size : spec.shape) {
      require(size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes), DFSSM_BAD_BUNDLE,
              spec.name + " is too large");
    }
    require(bytes <= static_cast<size_t>(physical_memory()) && at <= static_cast<size_t>(physical_memory()),
            DFSSM_BAD_BUNDLE, "a state of the bundle takes more memory than this machine has");
    spec.bytes = bytes;
    spec.offset = at;
    at += (bytes + kLine - 1) / kLine * kLine;
  }
  backend.state_bytes = at;
}

}  // namespace

size_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return 4;
    case Dtype::kF16:
      return 2;
    default:
      return 1;
  }
}

std::unique_ptr<Backend> open_backend(Bundle& bundle, const dfssm_options& options) {
  std::unique_ptr<Backend> backend =
      bundle.manifest.target->is_engine ? open_tensorrt(bundle, options) : open_onnxruntime(bundle, options);
  require_config(bundle, *backend);
  place(*backend);
  return backend;
}

#ifndef DFSSM_TENSORRT
std::unique_ptr<Backend> open_tensorrt(Bundle& bundle, const dfssm_options&) {
  throw Failure(DFSSM_UNSUPPORTED, bundle.files.folder() +
                                       " is of target trt, and this libdfssm_runtime was built " +
                                       "without TensorRT: compile the model with --target ort-cpu");
}
#endif

std::string find_library(const Bundle& bundle, const char* chosen, const char* variable_name, bool trust) {
  const std::string name = bundle.manifest.target->library;
  std::string path = chosen ? chosen : variable(variable_name);
  if (path.empty() && trusted(trust) && bundle.manifest.files.count(name)) path = bundle.files.place(name);
  if (path.empty()) {
    Dl_info here;
    if (dladdr(reinterpret_cast<void*>(&find_library), &here) && here.dli_fname) {
      const std::string self = here.dli_fname;
      path = self.substr(0, self.rfind('/') + 1) + name;
    }
  }
  char* real =
      realpath(path.c_str(), nullptr);  // a bare name would be looked for in the folders of the system
  require(real, DFSSM_BACKEND,
          path + " does not exist: install " + name +
              " beside libdfssm_runtime.so, name it in the options or by " + variable_name +
              ", or trust the bundle's own");
  path = real;
  std::free(real);
  return path;
}

}  // namespace dfssm::native
