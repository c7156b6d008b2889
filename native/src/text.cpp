#include "text.h"

#include <nlohmann/json.hpp>

#include "failure.h"

#ifdef DFSSM_TOKENIZERS
#include <tokenizers_c.h>
#endif

namespace dfssm::native {
namespace {

using nlohmann::json;

constexpr std::string_view kEndOfText = "<|endoftext|>", kIncomplete = "\xEF\xBF\xBD";  // U+FFFD

// Without what may be bytes of a character that is not complete yet.
std::string certain(std::string text) {
  while (text.size() >= kIncomplete.size() &&
         std::string_view(text).substr(text.size() - kIncomplete.size()) == kIncomplete) {
    text.resize(text.size() - kIncomplete.size());
  }
  return text;
}

#ifdef DFSSM_TOKENIZERS
// Of other bytes the tokenizers library ends the process; the JSON library looks at what it writes.
void require_utf8(std::string_view text) {
  try {
    json(text).dump();
  } catch (const json::exception&) {
    throw Failure(DFSSM_INVALID_ARGUMENT, "the text is not UTF-8: convert it, or give its token ids");
  }
}

// A text is taken whole, and always as the same tokens, whatever its tokenizer.json asks for: targets/text.py.
std::string without_options(const std::string& content) {
  json document = json::parse(content, nullptr, false);
  require(document.is_object() && document.contains("model") && document["model"].is_object(),
          DFSSM_BAD_BUNDLE, "tokenizer.json is no tokenizer: compile the model again");
  json* const asked[] = {&document["truncation"], &document["padding"], &document["model"]["dropout"]};
  bool any = false;
  for (json* option : asked) {
    any = any || !option->is_null();
    *option = nullptr;
  }
  return any ? document.dump() : content;
}
#endif

}  // namespace

int64_t end_of_text(const std::string& tokenizer_json) {
  const json document = json::parse(tokenizer_json, nullptr, false);
  if (!document.is_object()) return -1;
  const auto id_of = [](const json& value) { return value.is_number_unsigned() ? value.get<int64_t>() : -1; };
  for (const json& token : document.value("added_tokens", json::array())) {
    if (token.is_object() && token.value("content", json()) == kEndOfText)
      return id_of(token.value("id", json()));
  }
  const json vocabulary = document.value("/model/vocab"_json_pointer, json());
  return vocabulary.is_object() ? id_of(vocabulary.value(std::string(kEndOfText), json())) : -1;
}

#ifdef DFSSM_TOKENIZERS

bool has_text() { return true; }

Tokenizer::Tokenizer(const std::string& tokenizer_json) {
  const std::string content = without_options(tokenizer_json);
  handle_ = tokenizers_new_from_str(content.data(), content.size());
  require(handle_, DFSSM_BAD_BUNDLE, "tokenizer.json is no tokenizer: compile the model again");
}

Tokenizer::~Tokenizer() { tokenizers_free(handle_); }

std::vector<int64_t> Tokenizer::encode(std::string_view text, bool begins) const {
  require_utf8(text);
  const std::lock_guard<std::mutex> lock(mutex_);
  TokenizerEncodeResult found{};
  tokenizers_encode(handle_, text.data(), text.size(), begins, &found);
  std::vector<int64_t> ids(found.token_ids, found.token_ids + found.len);
  tokenizers_free_encode_results(&found, 1);
  return ids;
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<uint32_t> narrow(ids.begin(), ids.end());
  tokenizers_decode(handle_, narrow.data(), narrow.size(), 1);
  const char* text = nullptr;
  size_t length = 0;
  tokenizers_get_decode_str(handle_, &text, &length);
  return {text, length};
}

#else

bool has_text() { return false; }

Tokenizer::Tokenizer(const std::string&) {
  throw Failure(DFSSM_UNSUPPORTED,
                "this libdfssm_runtime was built without text (DFSSM_TOKENIZERS): give token ids");
}

Tokenizer::~Tokenizer() = default;

std::vector<int64_t> Tokenizer::encode(std::string_view, bool) const { return {}; }

std::string Tokenizer::decode(const std::vector<int64_t>&) const { return {}; }

#endif

TextStream::TextStream(const State& state)
    : engine_(state.engine()), ids_(state.recent()), old_(ids_.size()) {
  // A character that what was read ends in is shown when it is complete.
  shown_ = certain(engine_->tokenizer().decode(ids_));
}

const std::string& TextStream::push(int64_t token) {
  engine_->require_token(token);
  const Tokenizer& tokenizer = engine_->tokenizer();
  ids_.push_back(token);
  const std::string text = tokenizer.decode(ids_), known = certain(text);
  piece_.clear();
  if (known.size() <= shown_.size()) return piece_;
  piece_ = known.substr(shown_.size());
  shown_ = known;
  if (known == text) {
    // Of all tokens, the next decoding needs those of this piece: some decoders make a space of what is before.
    ids_.erase(ids_.begin(), ids_.begin() + old_);
    old_ = ids_.size();
    shown_ = tokenizer.decode(ids_);
  }
  return piece_;
}

const std::string& TextStream::flush() {
  const std::string text = engine_->tokenizer().decode(ids_);
  piece_ = text.size() > shown_.size() ? text.substr(shown_.size()) : "";
  shown_ = text;
  return piece_;
}

}  // namespace dfssm::native
