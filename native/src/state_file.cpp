// States in files of safetensors, the same bytes as runtime/state.py writes: its format `dfssm-state`, version 1.
#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "engine.h"
#include "failure.h"

namespace dfssm::native {
namespace {

using json = nlohmann::ordered_json;

constexpr char kFormat[] = "dfssm-state", kVersion[] = "1";
constexpr size_t kPrefix = 8;  // of a file: the length of the header, little-endian

// A tensor of the file: a part of the state's memory.
struct Part {
  std::string name, dtype;
  std::vector<int64_t> shape;
  uint8_t* data;
  size_t bytes;
};

const char* dtype_name(Dtype dtype) {
  static const char* const kNames[] = {"F32", "F16", "I8", "U8"};
  return kNames[static_cast<int>(dtype)];
}

// The order of safetensors: wide dtypes first, those of one dtype by name.
std::vector<Part> parts(const Backend& backend, Memory& memory, int64_t& tokens) {
  static const std::vector<std::string> kOrder = {"I64", "F32", "F16", "I8", "U8"};
  std::vector<Part> found = {
      {"tokens", "I64", {1}, reinterpret_cast<uint8_t*>(&tokens), sizeof tokens},
      {"logits",
       "F32",
       {1, backend.vocab_size},
       reinterpret_cast<uint8_t*>(memory.logits.data()),
       memory.logits.size() * sizeof(float)},
  };
  for (const Spec& spec : backend.layout) {
    Part part{spec.name, dtype_name(spec.dtype), {1}, &memory.tensors[spec.offset], spec.bytes};
    part.shape.insert(part.shape.end(), spec.shape.begin(), spec.shape.end());
    found.push_back(std::move(part));
  }
  std::sort(found.begin(), found.end(), [](const Part& a, const Part& b) {
    const auto place = [](const Part& part) { return std::find(kOrder.begin(), kOrder.end(), part.dtype); };
    return std::pair(place(a), a.name) < std::pair(place(b), b.name);
  });
  return found;
}

}  // namespace

std::string State::to_bytes() const {
  Memory memory = memory_;
  int64_t tokens = tokens_;
  std::string recent;
  for (const int64_t token : recent_) recent += (recent.empty() ? "[[" : ", ") + std::to_string(token);
  json header;
  header["__metadata__"] = json{{"format", kFormat},
                                {"model", engine_->manifest().model()},
                                {"recent", recent + "]]"},
                                {"version", kVersion}};
  const std::vector<Part> all = parts(engine_->backend(), memory, tokens);
  size_t at = 0;
  for (const Part& part : all) {
    header[part.name] =
        json{{"dtype", part.dtype}, {"shape", part.shape}, {"data_offsets", {at, at + part.bytes}}};
    at += part.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  std::string content(reinterpret_cast<const char*>(&length), kPrefix);
  content.reserve(kPrefix + length + at);
  content += text;
  for (const Part& part : all) content.append(reinterpret_cast<const char*>(part.data), part.bytes);
  return content;
}

void State::from_bytes(const std::string& content, const std::string& path) {
  const auto check = [&](bool good, const std::string& why) {
    require(good, DFSSM_BAD_STATE, path + " cannot be read as a state (" + why + "): save it again");
  };
  uint64_t length = 0;
  check(content.size() >= kPrefix, "it is cut off");
  std::memcpy(&length, content.data(), kPrefix);
  check(length <= content.size() - kPrefix, "it is cut off");
  const json header = json::parse(content.substr(kPrefix, length), nullptr, false);
  check(header.is_object() && header.contains("__metadata__"), "it has no header");
  const json& metadata = header["__metadata__"];
  check(metadata.is_object() && metadata.value("format", json()) == kFormat &&
            metadata.value("version", json()) == kVersion,
        "it is no state of version 1");
  check(metadata.value("model", json()) == engine_->manifest().model(),
        "it is of a bundle with other weights or --isa, use that");
  const std::vector<Part> all = parts(engine_->backend(), memory_, tokens_);
  check(header.size() == all.size() + 1, "its tensors are not those of this bundle");
  const size_t start = kPrefix + length, bytes = content.size() - start;
  size_t total = 0;
  for (const Part& part : all) {
    const json entry = header.value(part.name, json::object());
    check(entry.value("dtype", json()) == part.dtype && entry.value("shape", json()) == json(part.shape),
          part.name + " is not that of one sequence of this bundle");
    const json& range = entry.value("data_offsets", json());
    check(range.is_array() && range.size() == 2 && range[0].is_number_unsigned() &&
              range[1].is_number_unsigned(),
          part.name + " is nowhere");
    const uint64_t from = range[0], to = range[1];
    check(from <= to && to <= bytes && to - from == part.bytes, part.name + " is nowhere");
    std::memcpy(part.data, content.data() + start + from, part.bytes);
    total += part.bytes;
  }
  check(total == bytes, "it has other bytes");
  check(tokens_ >= 0 && tokens_ < int64_t{1} << 62, "its number of tokens is none");
  const json recent = json::parse(metadata.value("recent", "[]"), nullptr, false);
  if (!metadata.contains("recent")) return;  // of before there were recent tokens
  check(recent.is_array() && recent.size() == 1 && recent[0].is_array() && recent[0].size() == kRecent,
        "its recent tokens are none");
  for (size_t i = 0; i < kRecent; ++i) {
    const json& token = recent[0][i];
    check(token.is_number_integer() && token >= -1 && token < engine_->backend().vocab_size,
          "its recent tokens are none");
    recent_[i] = token;
  }
}

void State::save(const std::string& path) const {
  require_sound();
  if (run_) run_->pull();
  write_file(path, to_bytes());
}

std::unique_ptr<State> State::load(std::shared_ptr<const Engine> engine, const std::string& path) {
  auto state = std::make_unique<State>(std::move(engine));
  const Memory& memory = state->memory_;
  // A header has a hundred bytes for each tensor.
  const size_t most = memory.tensors.size() + memory.logits.size() * sizeof(float) + (size_t{1} << 20);
  state->from_bytes(read_file(path, most, DFSSM_BAD_STATE), path);
  return state;
}

}  // namespace dfssm::native
