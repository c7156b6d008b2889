// runtime.h for C++17: handles that free themselves, and errors as exceptions.
#ifndef DFSSM_RUNTIME_HPP
#define DFSSM_RUNTIME_HPP

#include <dfssm/runtime.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dfssm {

// What went wrong, in one line. `code`: a dfssm_status.
class Error : public std::runtime_error {
 public:
  explicit Error(dfssm_status status) : std::runtime_error(dfssm_last_error()), code(status) {}
  dfssm_status code;
};

namespace detail {
inline void check(dfssm_status status) {
  if (status != DFSSM_OK) throw Error(status);
}
struct Free {
  void operator()(dfssm_engine* engine) const noexcept { dfssm_engine_free(engine); }
  void operator()(dfssm_state* state) const noexcept { dfssm_state_free(state); }
  void operator()(dfssm_text* text) const noexcept { dfssm_text_free(text); }
};
// The handle that `make` writes to the place it is given.
template <class Handle, class Make>
std::unique_ptr<Handle, Free> made(Make&& make) {
  Handle* handle = nullptr;
  check(make(&handle));
  return std::unique_ptr<Handle, Free>(handle);
}
}  // namespace detail

// dfssm_options with its size, and dfssm_sampling with its own.
struct Options : dfssm_options {
  Options() : dfssm_options{} { size = sizeof(dfssm_options); }
};
struct Sampling : dfssm_sampling {
  Sampling() : dfssm_sampling{} { size = sizeof(dfssm_sampling); }
  static Sampling of(double temperature, uint64_t seed) {
    Sampling sampling;
    sampling.temperature = temperature;
    sampling.seeded = 1;
    sampling.seed = seed;
    return sampling;
  }
};

// A bundle, opened. Threads may share it.
class Engine {
 public:
  explicit Engine(const std::string& folder, const Options& options = {})
      : handle_(detail::made<dfssm_engine>(
            [&](dfssm_engine** to) { return dfssm_engine_open(folder.c_str(), &options, to); })) {}

  int64_t vocab_size() const { return dfssm_vocab_size(get()); }
  std::string model() const { return dfssm_model(get()); }
  std::string manifest() const { return dfssm_manifest(get()); }
  bool is_end(int64_t token) const { return dfssm_is_end(get(), token) != 0; }

  std::vector<int64_t> encode(std::string_view text, bool begins = true) const {
    std::vector<int64_t> ids(text.size() + 8);  // mostly enough
    size_t count = 0;
    do {
      ids.resize(count > ids.size() ? count : ids.size());
      detail::check(dfssm_encode(get(), text.data(), text.size(), begins, ids.data(), ids.size(), &count));
    } while (count > ids.size());
    ids.resize(count);
    return ids;
  }
  const dfssm_engine* get() const { return handle_.get(); }

 private:
  std::unique_ptr<dfssm_engine, detail::Free> handle_;
};

// What one sequence remembers. A copy is a clone.
class State {
 public:
  explicit State(const Engine& engine)
      : handle_(
            detail::made<dfssm_state>([&](dfssm_state** to) { return dfssm_state_new(engine.get(), to); })) {}
  static State load(const Engine& engine, const std::string& path) {
    return State(detail::made<dfssm_state>(
        [&](dfssm_state** to) { return dfssm_state_load(engine.get(), path.c_str(), to); }));
  }
  State(const State& other)
      : handle_(
            detail::made<dfssm_state>([&](dfssm_state** to) { return dfssm_state_clone(other.get(), to); })) {
  }
  State(State&&) noexcept = default;
  State& operator=(const State& other) {
    if (this != &other) detail::check(dfssm_state_copy(handle_.get(), other.get()));
    return *this;
  }
  State& operator=(State&&) noexcept = default;

  void reset() { detail::check(dfssm_state_reset(handle_.get())); }
  void save(const std::string& path) const { detail::check(dfssm_state_save(get(), path.c_str())); }
  int64_t tokens() const { return dfssm_state_tokens(get()); }
  const float* logits() const { return dfssm_state_logits(get()); }

  void prefill(const std::vector<int64_t>& ids) {
    detail::check(dfssm_prefill(handle_.get(), ids.data(), ids.size()));
  }
  void step(int64_t token) { detail::check(dfssm_step(handle_.get(), token)); }
  int64_t sample(const Sampling& sampling = {}) const {
    int64_t token = 0;
    detail::check(dfssm_sample(get(), &sampling, &token));
    return token;
  }
  const dfssm_state* get() const { return handle_.get(); }

 private:
  explicit State(std::unique_ptr<dfssm_state, detail::Free> handle) : handle_(std::move(handle)) {}
  std::unique_ptr<dfssm_state, detail::Free> handle_;
};

// From tokens to text as they come: a text that goes on from what `state` has read.
class Text {
 public:
  explicit Text(const State& state)
      : handle_(detail::made<dfssm_text>([&](dfssm_text** to) { return dfssm_text_new(state.get(), to); })) {}

  std::string push(int64_t token) {
    const char* piece = nullptr;
    size_t length = 0;
    detail::check(dfssm_text_push(handle_.get(), token, &piece, &length));
    return {piece, length};
  }
  std::string flush() {
    const char* piece = nullptr;
    size_t length = 0;
    detail::check(dfssm_text_flush(handle_.get(), &piece, &length));
    return {piece, length};
  }

 private:
  std::unique_ptr<dfssm_text, detail::Free> handle_;
};

}  // namespace dfssm
#endif
