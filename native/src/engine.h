// A bundle, opened, and the state of a sequence: what runtime.h hands out.
#pragma once

#include <dfssm/runtime.h>

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "bundle.h"

namespace dfssm::native {

class Tokenizer;

// Weights only; threads may share it.
class Engine {
 public:
  Engine(const std::string& folder, const dfssm_options& options);
  ~Engine();
  const Manifest& manifest() const { return bundle_.manifest; }
  const Backend& backend() const { return *backend_; }
  bool is_end(int64_t token) const;
  void require_token(int64_t token) const;  // throws Failure for an id that the model does not have
  const Tokenizer& tokenizer() const;       // read at the first use; throws Failure where there is none

 private:
  mutable Bundle bundle_;
  std::unique_ptr<Backend> backend_;
  std::vector<int64_t> ends_;
  mutable std::mutex mutex_;
  mutable std::unique_ptr<Tokenizer> tokenizer_;
};

// Tokens that a state remembers as they are, for text that goes on from it: runtime/rows.py.
constexpr size_t kRecent = 8;

// One sequence. A run writes the memory in place: one that fails leaves the state broken, and it is then refused
// until it is written anew.
class State {
 public:
  explicit State(std::shared_ptr<const Engine> engine);
  State(const State& other);
  State& operator=(const State&) = delete;

  void read(const int64_t* ids, size_t count);
  void copy(const State& source);
  void reset();
  void save(const std::string& path) const;
  static std::unique_ptr<State> load(std::shared_ptr<const Engine> engine, const std::string& path);
  void require_sound() const;

  const std::shared_ptr<const Engine>& engine() const { return engine_; }
  const std::vector<float>& logits() const { return memory_.logits; }
  int64_t tokens() const { return tokens_; }
  std::vector<int64_t> recent() const;  // without what is before the first token

 private:
  void read_run(const int64_t* ids, size_t count, bool ends_prompt);
  std::string to_bytes() const;
  void from_bytes(const std::string& content, const std::string& path);

  std::shared_ptr<const Engine> engine_;
  Memory memory_;
  int64_t tokens_ = 0;
  std::array<int64_t, kRecent> recent_;
  const char* broken_ = nullptr;  // why
  std::unique_ptr<Run> run_;
};

}  // namespace dfssm::native
