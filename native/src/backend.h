// What runs a bundle's step: ONNX Runtime, or TensorRT.
#pragma once

#include <dfssm/runtime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace dfssm::native {

enum class Dtype { kF32, kF16, kI8, kU8 };

size_t item_size(Dtype dtype);

// A tensor of the state of one sequence, by the name of the graph's input; without the dimension of the batch.
// `offset`: where it lies in the memory of a state.
struct Spec {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
  size_t bytes = 0, offset = 0;

  // ssm_state.3 -> ssm_state_out.3
  std::string out() const { return std::string(name).insert(name.find('.'), "_out"); }
};

// The memory of one sequence: all tensors, and the logits f32[vocab_size] after the last token.
struct Memory {
  std::vector<uint8_t> tensors;
  std::vector<float> logits;
};

// One sequence, bound to a backend.
class Run {
 public:
  virtual ~Run() = default;
  // Reads `count` tokens, at most the backend's `max_tokens`; states and logits are then in the memory.
  // `ends_prompt`: keep nothing that only a long prompt needs. Throws Failure; the memory is then worth nothing.
  virtual void read(const int64_t* ids, size_t count, bool ends_prompt) = 0;
  // For a backend that has the states elsewhere: bring the memory up to date; the memory was written.
  virtual void pull() {}
  virtual void push() {}
};

struct Backend {
  std::vector<Spec> layout;
  size_t state_bytes = 0, max_tokens = 1;
  int64_t vocab_size = 0;

  virtual ~Backend() = default;
  virtual std::unique_ptr<Run> bind(Memory& memory) const = 0;
};

// The backend of the bundle's target. Throws Failure where it cannot run here, holds code that is not trusted, or is
// not what its manifest says.
std::unique_ptr<Backend> open_backend(Bundle& bundle, const dfssm_options& options);

// Of a step graph and of an engine, before they are compared with the manifest.
std::unique_ptr<Backend> open_onnxruntime(Bundle& bundle, const dfssm_options& options);
std::unique_ptr<Backend> open_tensorrt(Bundle& bundle, const dfssm_options& options);

// The file of the bundle's native library: `chosen`, else $`variable`, else the bundle's own where that is trusted,
// else the one beside this library. Throws Failure where there is none.
std::string find_library(const Bundle& bundle, const char* chosen, const char* variable, bool trust);

}  // namespace dfssm::native
