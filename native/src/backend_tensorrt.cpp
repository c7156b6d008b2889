// The step in TensorRT: a sequence's states live on the device, and its steps replay a CUDA graph. What
// runtime/tensorrt.py and targets/trt.py do, for one sequence at a time.
#ifdef DFSSM_TENSORRT
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "backend.h"
#include "failure.h"
#include "machine.h"

namespace dfssm::native {
namespace {
using namespace nvinfer1;

constexpr char kEngine[] = "model.engine";
constexpr int kDevice = 0;  // CUDA_VISIBLE_DEVICES chooses others

void check(cudaError_t error) {
  require(error == cudaSuccess, DFSSM_BACKEND, std::string("CUDA says: ") + cudaGetErrorString(error));
}

struct Logger : ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "%s\n", text);
  }
};

// While it lives, kDevice is this thread's, whatever the program has chosen.
class OnDevice {
 public:
  OnDevice() {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(kDevice));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = kDevice;
};

// Memory of the device, or of the host where copies need not wait for it.
class Buffer {
 public:
  Buffer(size_t bytes, bool on_host = false) : on_host_(on_host) {
    check(on_host ? cudaMallocHost(&data_, std::max<size_t>(bytes, 1))
                  : cudaMalloc(&data_, std::max<size_t>(bytes, 1)));
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_), on_host_(other.on_host_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (data_) on_host_ ? cudaFreeHost(data_) : cudaFree(data_);
  }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  bool on_host_;
};

using Context = std::unique_ptr<IExecutionContext>;

struct TensorRTBackend : Backend {
  Logger logger;
  std::unique_ptr<IRuntime> runtime;
  std::unique_ptr<ICudaEngine> engine;
  Context prompt, step;
  cudaStream_t stream = nullptr;
  bool in_place = false, gives_places = false;
  // Contexts, the stream and these are one for all states: runs take turns.
  mutable std::mutex mutex;
  std::unique_ptr<Buffer> ids, place, logits, host_ids, host_logits;

  ~TensorRTBackend() override {
    step.reset();
    prompt.reset();
    if (stream) cudaStreamDestroy(stream);
  }
  std::unique_ptr<Run> bind(Memory& memory) const override;
};

class TensorRTRun : public Run {
 public:
  TensorRTRun(const TensorRTBackend& backend, Memory& memory) : backend_(backend), memory_(memory) {
    const OnDevice device;
    for (const Spec& spec : backend.layout) {
      states_.emplace_back(spec.bytes);
      if (!backend.in_place) written_.emplace_back(spec.bytes);
    }
    push();
  }
  ~TensorRTRun() override {
    if (graph_) cudaGraphExecDestroy(graph_);
  }

  void read(const int64_t* ids, size_t count, bool) override {
    const OnDevice device;
    const std::lock_guard<std::mutex> lock(backend_.mutex);
    auto* host_ids = backend_.host_ids->data<int64_t>();
    std::copy_n(ids, count, host_ids);
    host_ids[backend_.max_tokens] =
        static_cast<int64_t>(count) - 1;  // of the token whose logits are wanted: the last
    if (count == 1 && graph_) {
      check(cudaGraphLaunch(graph_, backend_.stream));
      check(cudaStreamSynchronize(backend_.stream));
    } else {
      queue(count == 1 ? *backend_.step : *backend_.prompt, count);
      check(cudaStreamSynchronize(backend_.stream));
      if (count == 1) record();  // the first run of a shape may allocate, which a recording forbids
    }
    const auto* logits = backend_.host_logits->data<float>();
    std::copy_n(logits, memory_.logits.size(), memory_.logits.begin());
  }

  void pull() override { copy_states(cudaMemcpyDeviceToHost); }
  void push() override { copy_states(cudaMemcpyHostToDevice); }

 private:
  void copy_states(cudaMemcpyKind kind) {
    const OnDevice device;
    const std::lock_guard<std::mutex> lock(backend_.mutex);
    for (size_t i = 0; i < states_.size(); ++i) {
      const Spec& spec = backend_.layout[i];
      void *host = &memory_.tensors[spec.offset], *state = states_[i].data();
      const bool back = kind == cudaMemcpyDeviceToHost;
      check(cudaMemcpyAsync(back ? host : state, back ? state : host, spec.bytes, kind, backend_.stream));
    }
    check(cudaStreamSynchronize(backend_.stream));
  }

  // Queues the copies and the run of `count` tokens, from the host's ids to its logits.
  void queue(IExecutionContext& context, size_t count) {
    const auto* host_ids = backend_.host_ids->data<int64_t>();
    const cudaStream_t stream = backend_.stream;
    check(cudaMemcpyAsync(backend_.ids->data(), host_ids, count * sizeof(int64_t), cudaMemcpyHostToDevice,
                          stream));
    check(cudaMemcpyAsync(backend_.place->data(), host_ids + backend_.max_tokens, sizeof(int64_t),
                          cudaMemcpyHostToDevice, stream));
    bool good = context.setInputShape("input_ids", Dims2(1, count)) &&
                context.setTensorAddress("input_ids", backend_.ids->data()) &&
                context.setTensorAddress("logits", backend_.logits->data());
    if (backend_.gives_places) {
      good = good && context.setInputShape("logits_at", Dims{1, {1}}) &&
             context.setTensorAddress("logits_at", backend_.place->data());
    }
    for (size_t i = 0; i < states_.size(); ++i) {
      const Spec& spec = backend_.layout[i];
      Dims dims{static_cast<int32_t>(spec.shape.size()) + 1, {1}};
      std::copy(spec.shape.begin(), spec.shape.end(), dims.d + 1);
      void* to = backend_.in_place ? states_[i].data() : written_[i].data();
      good = good && context.setInputShape(spec.name.c_str(), dims) &&
             context.setTensorAddress(spec.name.c_str(), states_[i].data()) &&
             context.setTensorAddress(spec.out().c_str(), to);
    }
    require(good && context.enqueueV3(stream), DFSSM_BACKEND,
            "TensorRT cannot run the step: see its message above");
    for (size_t i = 0; i < written_.size(); ++i) {
      check(cudaMemcpyAsync(states_[i].data(), written_[i].data(), backend_.layout[i].bytes,
                            cudaMemcpyDeviceToDevice, stream));
    }
    check(cudaMemcpyAsync(backend_.host_logits->data(), backend_.logits->data(),
                          memory_.logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
  }

  void record() {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamBeginCapture(backend_.stream, cudaStreamCaptureModeThreadLocal));
    queue(*backend_.step, 1);
    check(cudaStreamEndCapture(backend_.stream, &recorded));
    const cudaError_t made = cudaGraphInstantiate(&graph_, recorded, 0);
    check(cudaGraphDestroy(recorded));
    check(made);
  }

  const TensorRTBackend& backend_;
  Memory& memory_;
  std::vector<Buffer> states_,
      written_;  // of each tensor of the layout; what is written apart is copied back
  cudaGraphExec_t graph_ = nullptr;
};

std::unique_ptr<Run> TensorRTBackend::bind(Memory& memory) const {
  return std::make_unique<TensorRTRun>(*this, memory);
}

// The states and sizes of an engine that was opened. Throws Failure where it is not the engine of a step.
void read_engine(TensorRTBackend& backend, const std::string& path) {
  const auto wrong = [&] {
    return Failure(DFSSM_BAD_BUNDLE, path + " is not the engine of a step: compile the model again");
  };
  const ICudaEngine& engine = *backend.engine;
  for (int32_t i = 0; i < engine.getNbIOTensors(); ++i) {
    const std::string name = engine.getIOTensorName(i);
    if (name == "logits_at") backend.gives_places = true;
    if (name.find('.') == std::string::npos || name.find("_out.") != std::string::npos) continue;
    Spec spec{name, Dtype::kF32, {}};
    switch (engine.getTensorDataType(name.c_str())) {
      case DataType::kFLOAT:
        break;
      case DataType::kHALF:
        spec.dtype = Dtype::kF16;
        break;
      case DataType::kINT8:
        spec.dtype = Dtype::kI8;
        break;
      default:
        throw wrong();
    }
    const Dims dims = engine.getTensorShape(name.c_str());
    if (dims.nbDims < 1) throw wrong();
    spec.shape.assign(dims.d + 1, dims.d + dims.nbDims);
    backend.layout.push_back(std::move(spec));
  }
  const Dims logits = engine.getTensorShape("logits");
  if (logits.nbDims != 3 || logits.d[2] < 1) throw wrong();
  backend.vocab_size = logits.d[2];
  const int32_t last = engine.getNbOptimizationProfiles() - 1;  // for prompts; the first is for steps
  const Dims most = engine.getProfileShape("input_ids", last, OptProfileSelector::kMAX);
  if (most.nbDims != 2 || most.d[1] < 1) throw wrong();
  backend.max_tokens = most.d[1];
  for (auto* context : {&backend.prompt, &backend.step}) {
    context->reset(backend.engine->createExecutionContext());
    require(*context &&
                (*context)->setOptimizationProfileAsync(context == &backend.step ? 0 : last, backend.stream),
            DFSSM_BACKEND,
            "TensorRT makes no execution context: see its message above; is the device's memory full?");
  }
}

}  // namespace

std::unique_ptr<Backend> open_tensorrt(Bundle& bundle, const dfssm_options& options) {
  const Manifest& manifest = bundle.manifest;
  const std::string path = bundle.files.path(kEngine);
  const std::string plan = bundle.files.read(kEngine, manifest.files.at(kEngine).bytes);
  require_engine(path, sha256_hex(plan), options.trust);  // of the bytes that are run
  const OnDevice device;
  auto backend = std::make_unique<TensorRTBackend>();
  backend->in_place = manifest.engine.lowering == "plugin";
  if (backend->in_place && !manifest.engine.embed_plugins) {
    const std::string library = find_library(bundle, options.kernels, "DFSSM_TRT_LIBRARY", options.trust);
    require(getPluginRegistry()->loadLibrary(library.c_str()), DFSSM_BACKEND,
            library + " does not load into TensorRT");
  }
  backend->runtime.reset(createInferRuntime(backend->logger));
  require(backend->runtime != nullptr, DFSSM_BACKEND, "there is no TensorRT runtime");
  // Plugins in the engine, or its own runtime, are code that it brings, as trusted as the engine itself.
  backend->runtime->setEngineHostCodeAllowed(manifest.engine.version_compatible);
  backend->engine.reset(backend->runtime->deserializeCudaEngine(plan.data(), plan.size()));
  require(backend->engine != nullptr, DFSSM_BAD_BUNDLE,
          "TensorRT cannot load " + path + ": see its message above");
  check(cudaStreamCreateWithFlags(&backend->stream, cudaStreamNonBlocking));
  read_engine(*backend, path);
  const size_t tokens = backend->max_tokens + 1, vocab = backend->vocab_size * sizeof(float);
  backend->ids = std::make_unique<Buffer>(tokens * sizeof(int64_t));
  backend->place = std::make_unique<Buffer>(sizeof(int64_t));
  backend->logits = std::make_unique<Buffer>(vocab);
  backend->host_ids = std::make_unique<Buffer>(tokens * sizeof(int64_t), true);
  backend->host_logits = std::make_unique<Buffer>(vocab, true);
  return backend;
}

}  // namespace dfssm::native
#endif
