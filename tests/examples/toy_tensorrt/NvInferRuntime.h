// As much of TensorRT as examples/trt_cpp and native/ use, around a toy model of V tokens: conv_state.0 f32[3,1] has the number that the
// tokens so far come to, and how many they were; ssm_state.0 half[1,1,1] holds the last token. A token t makes of a number n
// the number (7 n + t + tokens before it + the last one) mod V, whose logit is the largest. A file with "V longest
// profiles inputs" is its engine: of 4 inputs the last is logits_at, which an engine for one token's logits has not.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

namespace nvinfer1 {

enum class DataType { kFLOAT, kHALF, kINT8, kINT64 };
enum class OptProfileSelector { kMAX };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};
struct Dims2 : Dims {
  Dims2(int64_t a, int64_t b) : Dims{2, {a, b}} {}
};

struct ILogger {
  enum class Severity { kERROR, kWARNING };
  virtual void log(Severity severity, const char* text) noexcept = 0;
};

struct Toy {
  int64_t vocab, longest;
  int32_t profiles, inputs;
  int64_t most(int32_t profile) const { return profile == profiles - 1 ? longest : 1; }
};

class IExecutionContext {
 public:
  explicit IExecutionContext(Toy toy) : toy_(toy) {}
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t) { return profile_ = profile, true; }
  bool setInputShape(const char* name, const Dims& dims) {
    toy_expects(toy_.inputs == 4 || std::string(name) != "logits_at");
    return shapes_.insert_or_assign(name, dims), true;
  }
  bool setTensorAddress(const char* name, void* address) { return addresses_[name] = address, true; }

  bool enqueueV3(cudaStream_t stream) {
    const Dims ids = shapes_.at("input_ids");
    toy_expects(ids.d[0] == 1 && ids.d[1] >= 1 && ids.d[1] <= toy_.most(profile_));
    if (toy_.inputs == 4)
      toy_expects(shapes_.at("logits_at").nbDims == 1 && shapes_.at("logits_at").d[0] == 1);
    toy_expects(shapes_.at("conv_state.0").d[0] == 1 && shapes_.at("ssm_state.0").d[0] == 1);
    toy_expects(!stream->recording || ran_[ids.d[1]]);  // the first run may allocate
    ran_[ids.d[1]] = true;
    const auto at = addresses_;
    toy_expects(at.at("conv_state.0") == at.at("conv_state_out.0"));
    toy_expects(at.at("ssm_state.0") == at.at("ssm_state_out.0"));
    stream->add([toy = toy_, tokens = ids.d[1], at] {
      const auto* id = static_cast<const int64_t*>(at.at("input_ids"));
      if (toy.inputs == 4) toy_expects(*static_cast<const int64_t*>(at.at("logits_at")) == tokens - 1);
      auto* sum = static_cast<float*>(at.at("conv_state.0"));
      auto* last = static_cast<uint16_t*>(at.at("ssm_state.0"));
      for (int64_t t = 0; t < tokens; ++t) {
        sum[0] = std::fmod(7 * sum[0] + id[t] + sum[1] + last[0], static_cast<float>(toy.vocab));
        sum[1] += 1;
        last[0] = static_cast<uint16_t>(id[t]);
      }
      auto* logits = static_cast<float*>(at.at("logits"));
      for (int64_t v = 0; v < toy.vocab; ++v) logits[v] = v == static_cast<int64_t>(sum[0]) ? 2.0f : -1.0f;
    });
    return true;
  }

 private:
  Toy toy_;
  int32_t profile_ = -1;
  std::map<std::string, Dims> shapes_;
  std::map<std::string, void*> addresses_;
  std::map<int64_t, bool> ran_;
};

class ICudaEngine {
 public:
  explicit ICudaEngine(Toy toy) : toy_(toy) {}
  int32_t getNbOptimizationProfiles() const { return toy_.profiles; }
  Dims getProfileShape(const char*, int32_t profile, OptProfileSelector) const {
    return Dims2(1, toy_.most(profile));
  }
  int32_t getNbIOTensors() const { return 3 + toy_.inputs; }
  const char* getIOTensorName(int32_t index) const {
    static const char* const kNames[] = {"input_ids",        "conv_state.0",    "ssm_state.0", "logits",
                                         "conv_state_out.0", "ssm_state_out.0", "logits_at"};
    return kNames[index];
  }
  Dims getTensorShape(const char* name) const {
    const std::string text = name;
    if (text == "logits") return {3, {-1, 1, toy_.vocab}};
    if (text[0] == 'c') return {3, {-1, 3, 1}};
    return text[0] == 's' ? Dims{4, {-1, 1, 1, 1}} : Dims2(-1, -1);
  }
  DataType getTensorDataType(const char* name) const {
    return name[0] == 's' ? DataType::kHALF : name[0] == 'i' ? DataType::kINT64 : DataType::kFLOAT;
  }
  IExecutionContext* createExecutionContext() { return new IExecutionContext(toy_); }

 private:
  Toy toy_;
};

struct IRuntime {
  void setEngineHostCodeAllowed(bool) {}
  ICudaEngine* deserializeCudaEngine(const void* data, size_t size) {
    std::istringstream text(std::string(static_cast<const char*>(data), size));
    Toy toy;
    return text >> toy.vocab >> toy.longest >> toy.profiles >> toy.inputs ? new ICudaEngine(toy) : nullptr;
  }
};

struct IPluginRegistry {
  bool loadLibrary(const char* path) { return std::ifstream(path).good(); }
};

inline IRuntime* createInferRuntime(ILogger&) { return new IRuntime; }

}  // namespace nvinfer1

inline nvinfer1::IPluginRegistry* getPluginRegistry() {
  static nvinfer1::IPluginRegistry registry;
  return &registry;
}
