#include "bundle.h"

#include <dfssm_opset.h>
#include <sys/utsname.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "failure.h"
#include "machine.h"

namespace dfssm::native {
namespace {

using nlohmann::json;

constexpr char kItself[] = "manifest_sha256";
constexpr int64_t kMostSize = 1 << 24;  // of each number of the config: products of two fit int64

const std::vector<Target>& targets() {
  using namespace dfssm::opset;
  static const std::vector<Target> all = {
      {"ort-cpu", {kModel, kData}, {kRow16, kRow64}, "libdfssm_ort_cpu.so", true, false},
      {"onnx", {kModel, kData}, {kCanonical}, "", false, false},
      {"trt", {"model.engine"}, {kCanonical}, "libdfssm_trt.so", true, true},
  };
  return all;
}

// What a manifest says, with the errors that name it.
class Reader {
 public:
  explicit Reader(std::string path) : path_(std::move(path)) {}

  void require(bool good, const std::string& what) const {
    native::require(good, DFSSM_BAD_BUNDLE, path_ + ": " + what + ": compile the model again");
  }
  std::string text(const json& from, const std::string& key) const {
    require(from.contains(key) && from[key].is_string(), "key '" + key + "' is missing or no text");
    return from[key];
  }
  // A whole number from `least` to `most`.
  int64_t whole(const json& from, const std::string& key, int64_t least, int64_t most) const {
    require(from.contains(key) && from[key].is_number_integer(),
            "key '" + key + "' is missing or no whole number");
    const json& value = from[key];
    const bool above = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(most);
    require(!above && value.get<int64_t>() >= least,
            "'" + key + "' is " + value.dump() + ", which no model has");
    return value.get<int64_t>();
  }

 private:
  std::string path_;
};

// Whether the manifest is what was written: its sha256, with zeros in the place of that itself.
bool is_sealed(const std::string& text, const std::string& digest) {
  const size_t at = text.rfind(digest);
  if (digest.size() != 64 || at == std::string::npos) return false;
  return sha256_hex(std::string(text).replace(at, 64, std::string(64, '0'))) == digest;
}

// Names are looked up below the bundle only: "../x" must not reach out of it.
bool is_plain(const std::string& name) {
  const bool control =
      std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < 32 || c == 127; });
  return !control && name.find('/') == std::string::npos && name != "" && name != "." && name != "..";
}

FileEntry entry_of(const Reader& read, const std::string& name, const json& entry, int64_t version) {
  read.require(is_plain(name) && entry.is_object() && entry.size() == (version == 1 ? 2u : 3u),
               "the entry of file '" + name + "' is not valid");
  return {read.text(entry, "sha256"), version == 1 ? "" : read.text(entry, "chunks_sha256"),
          read.whole(entry, "bytes", 0, INT64_MAX)};
}

// Null, an id, or a list of ids.
std::vector<int64_t> ends_of(const Reader& read, const json& config, int64_t vocab) {
  json found = config.value("eos_token_id", json());
  if (found.is_null()) return {};
  if (!found.is_array()) found = json::array({found});
  std::vector<int64_t> ends;
  for (size_t i = 0; i < found.size(); ++i) {
    ends.push_back(read.whole(json{{"eos_token_id", found[i]}}, "eos_token_id", 0, vocab - 1));
  }
  return ends;
}

Manifest manifest_of(const Reader& read, std::string text) {
  json document = json::parse(text, nullptr, false);
  read.require(document.is_object() && document.value("format", json()) == "dfssm-bundle",
               "it is not the manifest of a bundle");
  const int64_t version = read.whole(document, "version", 1, 2);
  const std::set<std::string> known = {"format",  "version",      "target",       "config", "state_dtype",
                                       "layout",  "files",        "verification", "tools",  "engine",
                                       "machine", "model_sha256", kItself};
  for (const auto& [key, value] : document.items())
    read.require(known.count(key), "key '" + key + "' is unknown");
  for (const char* key : {"config", "files", "tools", "verification"}) {
    read.require(document.contains(key) && document[key].is_object(),
                 "'" + std::string(key) + "' is not an object");
  }
  if (version == 2) {
    for (const std::string& key : known) {
      read.require(document.contains(key) || key == "engine", "key '" + key + "' is missing");
    }
    read.require(is_sealed(text, read.text(document, kItself)), "it does not match its own sha256");
    const json machine = document.value("machine", json());
    utsname here;
    native::require(
        machine.is_null() || (uname(&here) == 0 && machine == here.machine), DFSSM_BAD_BUNDLE,
        "the bundle is for " + machine.dump() + ", this machine is another: compile the model again here");
  }
  Manifest found;
  const std::string target = read.text(document, "target");
  const auto of =
      std::find_if(targets().begin(), targets().end(), [&](const Target& t) { return t.name == target; });
  read.require(of != targets().end(), "target '" + target + "' is unknown");
  found.target = &*of;
  const int64_t layout = read.whole(document, "layout", 0, INT64_MAX);
  read.require(std::count(of->layouts.begin(), of->layouts.end(), layout),
               "its layout is none of target " + target);
  found.state_dtype = read.text(document, "state_dtype");
  const json& config = document["config"];
  Sizes& s = found.sizes;
  for (const auto& [key, to] :
       std::initializer_list<std::pair<const char*, int64_t*>>{{"vocab_size", &s.vocab_size},
                                                               {"d_model", &s.d_model},
                                                               {"n_layer", &s.n_layer},
                                                               {"d_state", &s.d_state},
                                                               {"headdim", &s.headdim},
                                                               {"expand", &s.expand},
                                                               {"ngroups", &s.ngroups},
                                                               {"d_conv", &s.d_conv}}) {
    *to = read.whole(config, key, 1, kMostSize);
  }
  found.ends = ends_of(read, config, s.vocab_size);
  for (const auto& [name, entry] : document["files"].items()) {
    found.files.emplace(name, entry_of(read, name, entry, version));
  }
  for (const std::string& name : of->files) read.require(found.files.count(name), "no entry for " + name);
  const json engine = document.value("engine", json::object());
  read.require(engine.is_object() && engine.empty() != of->is_engine, "key 'engine' does not fit the target");
  if (of->is_engine) {
    found.engine = {read.text(engine, "lowering"), engine.value("embed_plugins", json()) == true,
                    engine.value("version_compatible", json()) == true};
  }
  found.text = std::move(text);
  return found;
}

// Its files are open, those that there are: all of one moment, as targets/bundle.py has it.
Bundle of_one_moment(const std::string& folder) {
  for (int left = 10;; --left) {
    Bundle bundle{Files(folder), {}};
    Files& files = bundle.files;
    bundle.manifest = manifest_of(Reader(files.path(kManifest)), files.read(kManifest, kMostOfManifest));
    for (const auto& [name, entry] : bundle.manifest.files) {
      try {
        files.open(name);
      } catch (const Failure&) {  // the check throws it
      }
    }
    if (left == 1 || !files.replaced()) return bundle;
  }
}

}  // namespace

Bundle open_bundle(const std::string& folder, bool sizes_only) {
  Bundle bundle = of_one_moment(folder);
  Files& files = bundle.files;
  for (const auto& [name, entry] : bundle.manifest.files) {
    require(files.size(name) == entry.bytes, DFSSM_BAD_BUNDLE,
            files.path(name) + " has " + std::to_string(files.size(name)) + " bytes, its manifest says " +
                std::to_string(entry.bytes) + ": copy or compile it again");
    const bool chunked = !entry.chunks_sha256.empty();
    require(sizes_only || (chunked ? files.chunks_sha256(name) == entry.chunks_sha256
                                   : files.sha256(name) == entry.sha256),
            DFSSM_BAD_BUNDLE,
            files.path(name) + " does not match the sha256 in its manifest: copy or compile it again");
  }
  return bundle;
}

bool trusted(bool asked) { return asked || variable("DFSSM_TRUST") == "1"; }

void require_engine(const std::string& path, const std::string& sha256, bool asked) {
  if (trusted(asked)) return;
  const std::string base = variable("XDG_STATE_HOME");
  std::ifstream records((base[0] == '/' ? base : variable("HOME") + "/.local/state") + "/dfssm/engines");
  const bool own = std::find(std::istream_iterator<std::string>(records), {}, sha256) !=
                   std::istream_iterator<std::string>();
  require(own, DFSSM_UNTRUSTED,
          path +
              " is a program, and no dfcompile of yours made it: if you trust who did, open it with `trust`, "
              "or " +
              "compile the model here");
}

}  // namespace dfssm::native
