#include "engine.h"

#include <malloc.h>

#include <algorithm>
#include <cmath>

#include "failure.h"
#include "text.h"

namespace dfssm::native {
namespace {

// Longer prompts leave enough memory behind to be worth the time of giving it back: runtime/engine.py.
constexpr size_t kLong = 16;

}  // namespace

Engine::Engine(const std::string& folder, const dfssm_options& options)
    : bundle_(open_bundle(folder, options.sizes_only)),
      backend_(open_backend(bundle_, options)),
      ends_(manifest().ends) {
  if (ends_.empty() && manifest().files.count(kTokenizer)) {
    const int64_t end = end_of_text(bundle_.files.read(kTokenizer, manifest().files.at(kTokenizer).bytes));
    if (end >= 0) ends_.push_back(end);
  }
  malloc_trim(0);  // opening leaves tens of megabytes behind
}

Engine::~Engine() = default;

bool Engine::is_end(int64_t token) const { return std::count(ends_.begin(), ends_.end(), token) > 0; }

void Engine::require_token(int64_t token) const {
  require(token >= 0 && token < backend_->vocab_size, DFSSM_INVALID_ARGUMENT,
          "token id " + std::to_string(token) + " is out of range: this model has ids 0 to " +
              std::to_string(backend_->vocab_size - 1));
}

const Tokenizer& Engine::tokenizer() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!tokenizer_) {
    require(manifest().files.count(kTokenizer), DFSSM_UNSUPPORTED,
            bundle_.files.folder() + " has no tokenizer.json: compile with --tokenizer to work with text");
    const FileEntry& entry = manifest().files.at(kTokenizer);
    const std::string content = bundle_.files.read(kTokenizer, entry.bytes);
    require(sha256_hex(content) == entry.sha256, DFSSM_BAD_BUNDLE,
            bundle_.files.path(kTokenizer) + " has changed since the bundle was opened: open it again");
    tokenizer_ = std::make_unique<Tokenizer>(content);
    malloc_trim(0);
  }
  return *tokenizer_;
}

State::State(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)) {
  memory_.tensors.resize(engine_->backend().state_bytes);
  memory_.logits.resize(engine_->backend().vocab_size);
  recent_.fill(-1);
}

State::State(const State& other) : engine_(other.engine_), tokens_(other.tokens_), recent_(other.recent_) {
  other.require_sound();
  if (other.run_) other.run_->pull();
  memory_ = other.memory_;
}

void State::require_sound() const {
  require(!broken_, DFSSM_BAD_STATE,
          std::string("the state is broken (") + (broken_ ? broken_ : "") +
              "): reset it, or copy a sound one into it");
}

std::vector<int64_t> State::recent() const {
  return {std::find_if(recent_.begin(), recent_.end(), [](int64_t token) { return token >= 0; }),
          recent_.end()};
}

void State::read(const int64_t* ids, size_t count) {
  require(count > 0, DFSSM_INVALID_ARGUMENT, "the prompt has no tokens: give at least one");
  for (size_t i = 0; i < count; ++i) engine_->require_token(ids[i]);
  require_sound();
  const size_t most = engine_->backend().max_tokens;
  for (size_t at = 0; at < count; at += most) {
    const size_t part = std::min(most, count - at);
    read_run(ids + at, part, at + part == count && count > kLong);
  }
}

void State::read_run(const int64_t* ids, size_t count, bool ends_prompt) {
  if (!run_) run_ = engine_->backend().bind(memory_);
  broken_ = "a run on it failed";
  run_->read(ids, count, ends_prompt);
  tokens_ += count;
  const size_t kept = std::min(count, kRecent);
  std::move(recent_.begin() + kept, recent_.end(), recent_.begin());
  std::copy_n(ids + count - kept, kept, recent_.end() - kept);
  broken_ = nullptr;
  const bool finite =
      std::all_of(memory_.logits.begin(), memory_.logits.end(), [](float x) { return x < INFINITY; }) &&
      std::any_of(memory_.logits.begin(), memory_.logits.end(), [](float x) { return x > -INFINITY; });
  if (!finite) broken_ = "its numbers are not finite";
  require(finite, DFSSM_NOT_FINITE,
          "the model's numbers are not finite after " + std::to_string(tokens_) +
              " tokens: look for where with `dfssm compare`, or compile with --state-dtype fp32");
}

void State::copy(const State& source) {
  if (this == &source) return;
  source.require_sound();
  require(engine_->manifest().model() == source.engine_->manifest().model() &&
              memory_.tensors.size() == source.memory_.tensors.size(),
          DFSSM_BAD_STATE, "the states are of two models: copy one of the same bundle");
  if (source.run_) source.run_->pull();
  std::copy(source.memory_.tensors.begin(), source.memory_.tensors.end(), memory_.tensors.begin());
  std::copy(source.memory_.logits.begin(), source.memory_.logits.end(), memory_.logits.begin());
  tokens_ = source.tokens_;
  recent_ = source.recent_;
  if (run_) run_->push();
  broken_ = nullptr;
}

void State::reset() {
  std::fill(memory_.tensors.begin(), memory_.tensors.end(), 0);
  std::fill(memory_.logits.begin(), memory_.logits.end(), 0.0f);
  tokens_ = 0;
  recent_.fill(-1);
  if (run_) run_->push();
  broken_ = nullptr;
}

}  // namespace dfssm::native
