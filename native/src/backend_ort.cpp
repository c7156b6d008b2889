// The step in ONNX Runtime, whose library is opened when the first bundle is: of the system, or of Python's package.
// What targets/session.py and runtime/ort.py do, over the C interface.
#include <dlfcn.h>
#include <malloc.h>
#include <onnxruntime_c_api.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>

#include "backend.h"
#include "failure.h"
#include "graph.h"
#include "machine.h"

namespace dfssm::native {
namespace {

// ONNX Runtime 1.18, which the op library needs as well: plugins/ort_cpu/ort.h.
constexpr uint32_t kApiVersion = 18;
// Longer runs are no faster and take more memory: runtime/ort.py.
constexpr size_t kMaxTokens = 64;

const OrtApi* api = nullptr;
OrtEnv* environment = nullptr;

// Throws the message of a failed call, which follows `what`.
void check(OrtStatus* status, const std::string& what, dfssm_status code = DFSSM_BACKEND) {
  if (!status) return;
  std::string text = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw Failure(code, what + ": " + text.substr(0, text.find('\n')));
}

// What ONNX Runtime made, released at the end.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;
template <class T>
Owned<T> owned(T* made, void (*release)(T*)) {
  return {made, release};
}
using Value = Owned<OrtValue>;

void open_library(const char* chosen) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (environment) return;
  std::string path = chosen ? chosen : variable("DFSSM_ONNXRUNTIME");
  if (path.empty()) path = "libonnxruntime.so.1";
  setenv("ORT_DISABLE_TELEMETRY", "1",
         0);  // ONNX Runtime 1.32 reports to its makers; who wants it sets this to 0
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  require(library, DFSSM_BACKEND,
          "ONNX Runtime does not load (" + std::string(library ? "" : dlerror()) +
              "): name its library in the options or by "
              "DFSSM_ONNXRUNTIME");
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  require(base, DFSSM_BACKEND, path + " is not ONNX Runtime: name another library");
  api = base()->GetApi(kApiVersion);
  require(api, DFSSM_BACKEND,
          path + " is ONNX Runtime " + base()->GetVersionString() + ", 1.18 or newer is needed");
  OrtEnv* made = nullptr;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "dfssm", &made), "ONNX Runtime does not start");
  environment = made;
}

ONNXTensorElementDataType onnx_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Dtype::kF16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Dtype::kI8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  }
}

// A tensor over memory that outlives it: neither copied nor written, but for what is bound as output.
Value tensor(const void* data, size_t bytes, const std::vector<int64_t>& shape,
             ONNXTensorElementDataType type) {
  OrtMemoryInfo* info = nullptr;
  check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &info), "ONNX Runtime");
  const auto memory = owned(info, api->ReleaseMemoryInfo);
  OrtValue* made = nullptr;
  check(api->CreateTensorWithDataAsOrtValue(info, const_cast<void*>(data), bytes, shape.data(), shape.size(),
                                            type, &made),
        "ONNX Runtime");
  return owned(made, api->ReleaseValue);
}

Owned<OrtSessionOptions> session_options(const Bundle& bundle, const dfssm_options& given) {
  OrtSessionOptions* made = nullptr;
  check(api->CreateSessionOptions(&made), "ONNX Runtime");
  auto options = owned(made, api->ReleaseSessionOptions);
  const int threads = given.threads ? given.threads : default_threads();
  check(api->SetIntraOpNumThreads(made, threads), "ONNX Runtime");
  check(api->SetInterOpNumThreads(made, 1), "ONNX Runtime");
  check(api->SetSessionExecutionMode(made, ORT_SEQUENTIAL), "ONNX Runtime");
  check(api->SetSessionLogSeverityLevel(made, ORT_LOGGING_LEVEL_FATAL), "ONNX Runtime");
  const auto set = [&](const char* key, const std::string& value) {
    check(api->AddSessionConfigEntry(made, key, value.c_str()), "ONNX Runtime");
  };
  // Why these: targets/session.py and targets/onnx.py.
  set("session.force_spinning_stop", "1");
  set("session.intra_op.spin_duration_us", "200");
  if (*bundle.manifest.target->library) {
    const std::string library = find_library(bundle, given.kernels, "DFSSM_ORT_LIBRARY", given.trust);
    check(api->RegisterCustomOpsLibrary_V2(made, library.c_str()),
          library + " does not load into ONNX Runtime");
  } else {
    set("optimization.disable_specified_optimizers", "ConstantFolding");
  }
  return options;
}

// A folder where ONNX Runtime finds a file of weights: it does not read it, but it must be there, and be no link. One of
// ours where the bundle's is a link, or being moved.
class Place {
 public:
  explicit Place(const Bundle& bundle) : folder_(bundle.files.folder()) {
    struct stat found;
    if (bundle.files.in_place() && lstat(bundle.files.path(kData).c_str(), &found) == 0 &&
        !S_ISLNK(found.st_mode))
      return;
    const std::string base = variable("TMPDIR");
    folder_ = (base.empty() ? "/tmp" : base) + "/dfssm.XXXXXX";
    temporary_ = mkdtemp(folder_.data()) != nullptr;
    require(temporary_, DFSSM_SYSTEM, "cannot make a folder in " + folder_ + ": set TMPDIR to another place");
    write_file(folder_ + "/" + kData, "");
  }
  ~Place() {
    if (!temporary_) return;
    unlink((folder_ + "/" + kData).c_str());
    rmdir(folder_.c_str());
  }
  Place(const Place&) = delete;
  const std::string& folder() const { return folder_; }

 private:
  std::string folder_;
  bool temporary_ = false;
};

struct OrtBackend : Backend {
  std::unique_ptr<Mapping> weights;
  std::vector<Value> initializers;  // over the mapping; the session neither copies nor keeps them
  Owned<OrtSession> session{nullptr, nullptr};
  bool in_place = true;
  std::string path;

  std::unique_ptr<Run> bind(Memory& memory) const override;
};

// A sequence whose memory is bound once; with `in_place` a state is input and output of the same node, one buffer,
// else the session writes to a second set of buffers, which is copied back.
class OrtRun : public Run {
 public:
  OrtRun(const OrtBackend& backend, Memory& memory)
      : backend_(backend), memory_(memory), binding_(nullptr, nullptr), shrink_(nullptr, nullptr) {
    OrtIoBinding* made = nullptr;
    check(api->CreateIoBinding(backend.session.get(), &made), "ONNX Runtime");
    binding_ = owned(made, api->ReleaseIoBinding);
    OrtRunOptions* options = nullptr;
    check(api->CreateRunOptions(&options), "ONNX Runtime");
    shrink_ = owned(options, api->ReleaseRunOptions);
    // The arena keeps what a long prompt needed; decoding needs a hundredth of it.
    check(api->AddRunConfigEntry(options, "memory.enable_memory_arena_shrinkage", "cpu:0"), "ONNX Runtime");
    if (!backend.in_place) written_.resize(backend.state_bytes);
    std::vector<uint8_t>& written = backend.in_place ? memory.tensors : written_;
    for (const Spec& spec : backend.layout) {
      std::vector<int64_t> shape = {1};
      shape.insert(shape.end(), spec.shape.begin(), spec.shape.end());
      input(spec.name, &memory.tensors[spec.offset], spec.bytes, shape, onnx_type(spec.dtype));
      output(spec.out(), &written[spec.offset], spec.bytes, shape, onnx_type(spec.dtype));
    }
    input("logits_to_keep", &keep_, sizeof keep_, {}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    output("logits", memory.logits.data(), memory.logits.size() * sizeof(float), {1, 1, backend.vocab_size},
           ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
  }

  void read(const int64_t* ids, size_t count, bool ends_prompt) override {
    std::copy_n(ids, count, ids_.begin());
    if (count != bound_) {
      input("input_ids", ids_.data(), count * sizeof(int64_t), {1, static_cast<int64_t>(count)},
            ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
      bound_ = count;
    }
    check(api->RunWithBinding(backend_.session.get(), ends_prompt ? shrink_.get() : nullptr, binding_.get()),
          "ONNX Runtime cannot run " + backend_.path);
    if (!backend_.in_place) memory_.tensors = written_;
    if (ends_prompt) malloc_trim(0);
  }

 private:
  using Shape = std::vector<int64_t>;
  void input(const std::string& name, void* data, size_t bytes, const Shape& shape,
             ONNXTensorElementDataType type) {
    const Value value = tensor(data, bytes, shape, type);
    check(api->BindInput(binding_.get(), name.c_str(), value.get()), "ONNX Runtime");
  }
  void output(const std::string& name, void* data, size_t bytes, const Shape& shape,
              ONNXTensorElementDataType type) {
    const Value value = tensor(data, bytes, shape, type);
    check(api->BindOutput(binding_.get(), name.c_str(), value.get()), "ONNX Runtime");
  }

  const OrtBackend& backend_;
  Memory& memory_;
  std::vector<uint8_t> written_;
  std::array<int64_t, kMaxTokens> ids_{};
  int64_t keep_ = 1;
  size_t bound_ = 0;
  Owned<OrtIoBinding> binding_;
  Owned<OrtRunOptions> shrink_;
};

std::unique_ptr<Run> OrtBackend::bind(Memory& memory) const {
  return std::make_unique<OrtRun>(*this, memory);
}

// An input or an output.
struct Port {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

using Count = decltype(OrtApi::SessionGetInputCount);
using Name = decltype(OrtApi::SessionGetInputName);
using Info = decltype(OrtApi::SessionGetInputTypeInfo);

std::vector<Port> ports(const OrtSession* session, Count get_count, Name get_name, Info get_info) {
  OrtAllocator* allocator = nullptr;
  check(api->GetAllocatorWithDefaultOptions(&allocator), "ONNX Runtime");
  size_t count = 0;
  check(get_count(session, &count), "ONNX Runtime");
  std::vector<Port> found(count);
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    check(get_name(session, i, allocator, &name), "ONNX Runtime");
    found[i].name = name;
    allocator->Free(allocator, name);
    OrtTypeInfo* made = nullptr;
    check(get_info(session, i, &made), "ONNX Runtime");
    const auto type = owned(made, api->ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    check(api->CastTypeInfoToTensorInfo(made, &tensor), "ONNX Runtime");
    require(tensor, DFSSM_BAD_BUNDLE, found[i].name + " of the graph is no tensor: compile the model again");
    size_t rank = 0;
    check(api->GetTensorElementType(tensor, &found[i].type), "ONNX Runtime");
    check(api->GetDimensionsCount(tensor, &rank), "ONNX Runtime");
    found[i].shape.resize(rank);
    check(api->GetDimensions(tensor, found[i].shape.data(), rank), "ONNX Runtime");
  }
  return found;
}

// The states and the size of the logits of a graph that was opened. Throws Failure where it is not the graph of a
// step.
void read_graph(OrtBackend& backend) {
  const OrtSession* session = backend.session.get();
  const std::vector<Port> in =
      ports(session, api->SessionGetInputCount, api->SessionGetInputName, api->SessionGetInputTypeInfo);
  const std::vector<Port> out =
      ports(session, api->SessionGetOutputCount, api->SessionGetOutputName, api->SessionGetOutputTypeInfo);
  const auto wrong =
      Failure(DFSSM_BAD_BUNDLE, backend.path + " is not the graph of a step: compile the model again");
  if (out.empty() || out[0].name != "logits" || out[0].shape.size() != 3) throw wrong;
  backend.vocab_size = out[0].shape[2];
  for (const Port& port : in) {
    if (port.name == "input_ids" || port.name == "logits_to_keep") continue;
    static const Dtype kDtypes[] = {Dtype::kF32, Dtype::kF16, Dtype::kI8, Dtype::kU8};
    const auto dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                    [&](Dtype d) { return onnx_type(d) == port.type; });
    if (dtype == std::end(kDtypes) || port.shape.empty() || port.name.find('.') == std::string::npos)
      throw wrong;
    backend.layout.push_back({port.name, *dtype, {port.shape.begin() + 1, port.shape.end()}});
    const std::string written = backend.layout.back().out();
    if (std::none_of(out.begin(), out.end(), [&](const Port& p) { return p.name == written; })) throw wrong;
  }
}

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(Bundle& bundle, const dfssm_options& given) {
  open_library(given.onnxruntime);
  auto backend = std::make_unique<OrtBackend>();
  Files& files = bundle.files;
  backend->path = files.path(kModel);
  backend->in_place = bundle.manifest.target->in_place;
  backend->max_tokens = kMaxTokens;
  backend->weights = files.map(kData);
  const std::string graph = files.read(kModel, bundle.manifest.files.at(kModel).bytes);
  const auto options = session_options(bundle, given);
  for (const External& weight : externals(graph, backend->path)) {
    const int64_t size = backend->weights->size();
    require(weight.location == kData && weight.bytes <= size && weight.offset <= size - weight.bytes,
            DFSSM_BAD_BUNDLE,
            backend->path + ": " + weight.name + " does not lie in " + kData + ": compile the model again");
    backend->initializers.push_back(tensor(backend->weights->data() + weight.offset, weight.bytes,
                                           weight.shape,
                                           static_cast<ONNXTensorElementDataType>(weight.dtype)));
    check(api->AddInitializer(options.get(), weight.name.c_str(), backend->initializers.back().get()),
          "ONNX Runtime");
  }
  const Place place(bundle);
  check(api->AddSessionConfigEntry(options.get(), "session.model_external_initializers_file_folder_path",
                                   place.folder().c_str()),
        "ONNX Runtime");
  OrtSession* session = nullptr;
  check(api->CreateSessionFromArray(environment, graph.data(), graph.size(), options.get(), &session),
        "ONNX Runtime cannot open " + backend->path, DFSSM_BAD_BUNDLE);
  backend->session = owned(session, api->ReleaseSession);
  read_graph(*backend);
  return backend;
}

}  // namespace dfssm::native
