// Text in and out, by the tokenizers library of Hugging Face behind the C interface of tokenizers-cpp
// (tokenizers_c.h). Without DFSSM_TOKENIZERS there is none: then a Tokenizer cannot be made.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"

namespace dfssm::native {

bool has_text();

// The id of <|endoftext|> in a tokenizer.json, which ends a text of a model that names no other; -1 where there is
// none.
int64_t end_of_text(const std::string& tokenizer_json);

// Threads may share it.
class Tokenizer {
 public:
  explicit Tokenizer(const std::string& tokenizer_json);  // throws Failure
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  std::vector<int64_t> encode(std::string_view text, bool begins) const;
  std::string decode(const std::vector<int64_t>& ids) const;  // special tokens left out

 private:
  mutable std::mutex mutex_;  // the library's handle keeps its last result
  void* handle_ = nullptr;
};

// A text that goes on from what a state has read: whole characters only.
class TextStream {
 public:
  explicit TextStream(const State& state);
  const std::string& push(int64_t token);
  const std::string& flush();

 private:
  std::shared_ptr<const Engine> engine_;
  std::vector<int64_t> ids_;   // the tokens of the last whole piece, and those after it
  size_t old_;                 // how many the former are
  std::string shown_, piece_;  // what is known of the text of `ids_`
};

}  // namespace dfssm::native
