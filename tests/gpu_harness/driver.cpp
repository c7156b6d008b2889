// Plain C functions over plugin_host.h, for ctypes: a libdfssm_trt.so is opened as TensorRT opens it, and its plugins
// run on whatever memory they are given. Needs TensorRT's headers and nothing of CUDA: on a GPU the library brings its
// own runtime. Over the host emulation, which is found by its symbols, every tensor is announced before a launch.
//
// Functions return 0 or a pointer, else -1 or null, and harness_error() names the call that failed; the reason is on
// stderr, where plugins log without a TensorRT.
#include <dlfcn.h>

#include <cstring>

#include "plugin_host.h"

namespace host = dfssm::trt::host;

namespace {

constexpr int32_t kMaxRank = 8;
constexpr nvinfer1::PluginFieldType kFieldTypes[] = {
    nvinfer1::PluginFieldType::kINT32, nvinfer1::PluginFieldType::kFLOAT32, nvinfer1::PluginFieldType::kCHAR};

thread_local std::string error;

template <class Result, class F>
Result guarded(Result failed, F&& f) noexcept {
  try {
    return f();
  } catch (const std::exception& e) {
    error = e.what();
    return failed;
  }
}

// Whose bytes are what, as the emulation's enum Contents has it.
enum Contents { kConstant, kWritten, kUninitialised };

struct Library {
  template <class F>
  F* function(const char* name) const {
    return reinterpret_cast<F*>(dlsym(handle, name));
  }

  void* handle;
  nvinfer1::IPluginCreatorInterface* const* creators = nullptr;
  int32_t count = 0;
  void (*add_buffer)(const char*, const void*, size_t, int) = nullptr;
  void (*clear_buffers)() = nullptr;
};

struct Node {
  const Library& library;
  host::HostedPlugin plugin;
  host::Tensors inputs, outputs;
  size_t workspace = 0;
};

size_t bytes_of(const host::PluginTensorDesc& tensor) {
  size_t bytes = tensor.type == host::DataType::kINT8 ? 1 : tensor.type == host::DataType::kHALF ? 2 : 4;
  for (int32_t axis = 0; axis < tensor.dims.nbDims; ++axis) bytes *= static_cast<size_t>(tensor.dims.d[axis]);
  return bytes;
}

// What a launch may touch is forgotten when it is over.
struct Forget {
  explicit Forget(const Library& library) : clear(library.clear_buffers) {}
  ~Forget() {
    if (clear) clear();
  }
  void (*clear)();
};

void announce(const Node& node, const void* const* in, void* const* out, const void* workspace) {
  const auto add = [&](const std::string& name, const void* data, size_t bytes, Contents contents) {
    if (bytes) node.library.add_buffer(name.c_str(), data, bytes, contents);
  };
  const auto is_in = [&](const void* data, const auto& addresses, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      if (addresses[i] == data) return true;
    }
    return false;
  };
  add("workspace", workspace, node.workspace, kUninitialised);
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    const bool in_place = is_in(out[i], in, node.inputs.size());
    add("output " + std::to_string(i), out[i], bytes_of(node.outputs[i]),
        in_place ? kWritten : kUninitialised);
  }
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (is_in(in[i], out, node.outputs.size()) || is_in(in[i], in, i)) continue;
    add("input " + std::to_string(i), in[i], bytes_of(node.inputs[i]), kConstant);
  }
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED const char* harness_error() { return error.c_str(); }

EXPORTED void* harness_open(const char* path) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    Library library{dlopen(path, RTLD_NOW | RTLD_LOCAL)};
    if (!library.handle) throw host::Refused(dlerror());
    auto* get = library.function<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>("getCreators");
    host::check(get != nullptr, "getCreators");
    library.creators = get(library.count);
    library.add_buffer =
        library.function<void(const char*, const void*, size_t, int)>("dfssm_trt_add_buffer");
    library.clear_buffers = library.function<void()>("dfssm_trt_clear_buffers");
    return new Library(library);
  });
}
EXPORTED int harness_is_emulated(const void* library) {
  return static_cast<const Library*>(library)->add_buffer != nullptr;
}

// The plugin of `op` with these fields: `types` 0 int32, 1 float32, 2 text.
EXPORTED void* harness_create(const void* handle, const char* op, const char* name, int32_t fields,
                              const char* const* names, const int32_t* types, const void* const* values,
                              const int32_t* lengths) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    const auto& library = *static_cast<const Library*>(handle);
    host::IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < library.count; ++i) {
      auto* one = static_cast<host::IPluginCreatorV3One*>(library.creators[i]);
      if (!std::strcmp(one->getPluginName(), op)) creator = one;
    }
    host::check(creator != nullptr, "no creator of that name");
    std::vector<nvinfer1::PluginField> given;
    for (int32_t i = 0; i < fields; ++i)
      given.push_back({names[i], values[i], kFieldTypes[types[i]], lengths[i]});
    return new Node{library, host::HostedPlugin(*creator, name, {fields, given.data()}), {}, {}};
  });
}
EXPORTED void harness_destroy(void* node) { delete static_cast<Node*>(node); }

// Takes the inputs' types, ranks and dimensions (kMaxRank a tensor) and writes those of the outputs, at most `room`,
// and the bytes of the workspace. Returns the number of outputs.
EXPORTED int harness_configure(void* handle, int32_t inputs, const int32_t* types, const int32_t* ranks,
                               const int64_t* dims, int32_t room, int32_t* output_types,
                               int32_t* output_ranks, int64_t* output_dims, int64_t* workspace) {
  return guarded(-1, [&] {
    auto& node = *static_cast<Node*>(handle);
    node.inputs.clear();
    for (int32_t i = 0; i < inputs; ++i) {
      nvinfer1::Dims shape{ranks[i], {}};
      for (int32_t axis = 0; axis < ranks[i]; ++axis) shape.d[axis] = dims[kMaxRank * i + axis];
      node.inputs.push_back(host::described(static_cast<host::DataType>(types[i]), shape));
    }
    node.outputs = node.plugin.outputs(node.inputs);
    const auto count = static_cast<int32_t>(node.outputs.size());
    host::check(count <= room, "more outputs than there is room for");
    for (int32_t i = 0; i < count; ++i) {
      const host::PluginTensorDesc& output = node.outputs[static_cast<size_t>(i)];
      output_types[i] = static_cast<int32_t>(output.type);
      output_ranks[i] = output.dims.nbDims;
      for (int32_t axis = 0; axis < output.dims.nbDims; ++axis)
        output_dims[kMaxRank * i + axis] = output.dims.d[axis];
    }
    node.workspace = node.plugin.workspace(node.inputs, node.outputs);
    *workspace = static_cast<int64_t>(node.workspace);
    return count;
  });
}

EXPORTED int harness_enqueue(const void* handle, const void* const* in, void* const* out, void* workspace,
                             void* stream) {
  return guarded(-1, [&] {
    const auto& node = *static_cast<const Node*>(handle);
    const Forget forget(node.library);
    if (node.library.add_buffer) announce(node, in, out, workspace);
    node.plugin.enqueue(node.inputs, node.outputs, in, out, workspace, static_cast<cudaStream_t>(stream));
    return 0;
  });
}

// The library's functions beside the plugins: rows of `logits`, at `tokens` and `values` the `count` largest.
EXPORTED int harness_largest(const void* handle, const float* logits, int64_t* tokens, float* values,
                             void* stream, int32_t rows, int32_t vocab, int32_t count) {
  return guarded(-1, [&] {
    const auto& library = *static_cast<const Library*>(handle);
    auto* largest = library.function<int(const float*, int64_t*, float*, void*, int32_t, int32_t, int32_t)>(
        "dfssm_largest");
    host::check(largest != nullptr, "dfssm_largest");
    const Forget forget(library);
    if (library.add_buffer) {
      const size_t found = static_cast<size_t>(rows) * static_cast<size_t>(count);
      library.add_buffer("logits", logits, static_cast<size_t>(rows) * static_cast<size_t>(vocab) * 4,
                         kConstant);
      library.add_buffer("tokens", tokens, 8 * found, kUninitialised);
      library.add_buffer("values", values, 4 * found, kUninitialised);
    }
    host::check(largest(logits, tokens, values, stream, rows, vocab, count) == 0, "dfssm_largest");
    return 0;
  });
}

// The sums of their weights.
EXPORTED int harness_total_weight(const void* handle, const float* logits, const float* divisors,
                                  int64_t* totals, void* stream, int32_t rows, int32_t vocab) {
  return guarded(-1, [&] {
    const auto& library = *static_cast<const Library*>(handle);
    auto* total_weight = library.function<int(const float*, const float*, int64_t*, void*, int32_t, int32_t)>(
        "dfssm_total_weight");
    host::check(total_weight != nullptr, "dfssm_total_weight");
    const Forget forget(library);
    if (library.add_buffer) {
      const size_t count = static_cast<size_t>(rows);
      library.add_buffer("logits", logits, count * static_cast<size_t>(vocab) * 4, kConstant);
      library.add_buffer("divisors", divisors, count * 4, kConstant);
      library.add_buffer("totals", totals, count * 8, kUninitialised);
    }
    host::check(total_weight(logits, divisors, totals, stream, rows, vocab) == 0, "dfssm_total_weight");
    return 0;
  });
}
