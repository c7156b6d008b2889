// Decodes with a bundle of `dfcompile --target trt` in TensorRT's and CUDA's own API: one sequence, the most likely
// token each time, steps replayed from a CUDA graph. Text is the work of a tokenizer; here are token ids.
//
//   decode BUNDLE COUNT ID...        decode bundle 20 17 254 3
// An engine, and the plugin library beside it, are programs: run bundles that you made. docs/trt.md: how to compile it.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace {
using namespace nvinfer1;

void require(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "decode: %s\n", what.c_str());
  std::exit(1);
}

void check(cudaError_t error) { require(error == cudaSuccess, cudaGetErrorString(error)); }

struct Logger : ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", text);
  }
};

// A sequence, its states on the GPU. Each is one buffer, bound as input and as output: plugins update it in place. (An
// engine of `--lowering native` needs a second one, to be copied back after each run.)
class Decoder {
 public:
  explicit Decoder(const std::string& bundle) {
    const std::string library = bundle + "/libdfssm_trt.so";
    require(getPluginRegistry()->loadLibrary(library.c_str()), "cannot load " + library);
    std::ifstream file(bundle + "/model.engine", std::ios::binary);
    const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
    runtime_.reset(createInferRuntime(logger_));
    require(runtime_ != nullptr, "there is no TensorRT runtime");
    engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    require(engine_ != nullptr, "TensorRT cannot load the engine of " + bundle);
    check(cudaStreamCreate(&stream_));
    const int32_t last = engine_->getNbOptimizationProfiles() - 1;  // for prompts; the first is for steps
    longest_ = engine_->getProfileShape("input_ids", last, OptProfileSelector::kMAX).d[1];
    vocab_ = engine_->getTensorShape("logits").d[2];
    check(cudaMalloc(&ids_, longest_ * sizeof(int64_t)));
    check(cudaMalloc(&place_, sizeof(int64_t)));  // of the token in a run whose logits are wanted: the last
    check(cudaMalloc(&logits_, vocab_ * sizeof(float)));
    check(cudaMallocHost(&host_ids_, (longest_ + 1) * sizeof(int64_t)));  // pinned: graphs copy it
    check(cudaMallocHost(&host_logits_, vocab_ * sizeof(float)));
    for (auto* context : {&prompt_, &step_}) {
      context->reset(engine_->createExecutionContext());
      require(*context && (*context)->setOptimizationProfileAsync(context == &step_ ? 0 : last, stream_),
              "TensorRT makes no context");
      (*context)->setTensorAddress("input_ids", ids_);
      (*context)->setTensorAddress("logits", logits_);
    }
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) bind(engine_->getIOTensorName(i));
  }

  // Reads tokens; returns the most likely next one.
  int64_t read(const std::vector<int64_t>& ids) {
    for (size_t start = 0; start < ids.size(); start += longest_) {
      const size_t count = std::min<size_t>(longest_, ids.size() - start);
      std::copy_n(ids.begin() + start, count, static_cast<int64_t*>(host_ids_));
      static_cast<int64_t*>(host_ids_)[longest_] = count - 1;
      if (count == 1 && graph_) {
        check(cudaGraphLaunch(graph_, stream_));
      } else {
        run(count == 1 ? *step_ : *prompt_, count);
        check(cudaStreamSynchronize(stream_));
        if (count == 1) record();  // the first run of a shape may allocate, which a recording forbids
      }
      check(cudaStreamSynchronize(stream_));
    }
    const auto* logits = static_cast<const float*>(host_logits_);
    return std::max_element(logits, logits + vocab_) - logits;
  }

 private:
  // conv_state.3 and conv_state_out.3 are one buffer, zero at first. With --max-logits 1 there is no logits_at.
  void bind(const std::string& name) {
    std::string out = name;
    void* memory = place_;
    Dims dims{1, {1}};
    if (name != "logits_at") {
      const size_t dot = name.find('.');
      if (dot == std::string::npos || name.find("_out.") != std::string::npos) return;
      out.insert(dot, "_out");
      const DataType type = engine_->getTensorDataType(name.c_str());
      size_t bytes = type == DataType::kFLOAT ? 4 : type == DataType::kHALF ? 2 : 1;
      dims = engine_->getTensorShape(name.c_str());
      dims.d[0] = 1;  // sequences
      for (int32_t i = 0; i < dims.nbDims; ++i) bytes *= dims.d[i];
      check(cudaMalloc(&memory, bytes));
      check(cudaMemsetAsync(memory, 0, bytes, stream_));
    }
    for (auto* context : {prompt_.get(), step_.get()}) {
      context->setInputShape(name.c_str(), dims);
      context->setTensorAddress(name.c_str(), memory);
      context->setTensorAddress(out.c_str(), memory);
    }
  }

  void run(IExecutionContext& context, size_t tokens) {
    check(cudaMemcpyAsync(ids_, host_ids_, tokens * sizeof(int64_t), cudaMemcpyHostToDevice, stream_));
    const void* place = static_cast<int64_t*>(host_ids_) + longest_;
    check(cudaMemcpyAsync(place_, place, sizeof(int64_t), cudaMemcpyHostToDevice, stream_));
    context.setInputShape("input_ids", Dims2(1, tokens));
    require(context.enqueueV3(stream_), "TensorRT could not run the step");
    check(cudaMemcpyAsync(host_logits_, logits_, vocab_ * sizeof(float), cudaMemcpyDeviceToHost, stream_));
  }

  void record() {
    cudaGraph_t recorded = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    run(*step_, 1);
    check(cudaStreamEndCapture(stream_, &recorded));
    check(cudaGraphInstantiate(&graph_, recorded, 0));
    check(cudaGraphDestroy(recorded));
  }

  Logger logger_;
  std::unique_ptr<IRuntime> runtime_;
  std::unique_ptr<ICudaEngine> engine_;
  std::unique_ptr<IExecutionContext> prompt_, step_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  int64_t longest_ = 0, vocab_ = 0;
  void *ids_ = nullptr, *place_ = nullptr, *logits_ = nullptr, *host_ids_ = nullptr, *host_logits_ = nullptr;
};
}  // namespace

int main(int count, char** arguments) {
  require(count > 3, "usage: decode BUNDLE COUNT ID...");
  std::vector<int64_t> ids;
  for (int i = 3; i < count; ++i) ids.push_back(std::atoll(arguments[i]));
  Decoder decoder(arguments[1]);
  for (long long left = std::atoll(arguments[2]); left > 0; --left) {
    ids = {decoder.read(ids)};
    std::printf("%lld\n", static_cast<long long>(ids[0]));
  }
}
