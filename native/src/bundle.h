// A bundle: its manifest, read as strictly as targets/bundle.py reads it, and the check of its files.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "files.h"

namespace dfssm::native {

constexpr char kModel[] = "model.onnx", kData[] = "model.onnx.data", kTokenizer[] = "tokenizer.json";

// What the library knows of a target of dfcompile.
struct Target {
  const char* name;
  std::vector<std::string>
      files;  // that every bundle has; the last has the weights, whose sha256 is the model's
  std::vector<int64_t> layouts;
  const char* library;  // that runs its bundles; "" for none
  bool in_place;        // a state may be written where it is read
  bool is_engine;
};

// opset/sizes.py: what a model's config says of its states, in elements.
struct Sizes {
  int64_t vocab_size = 0, d_model = 0, n_layer = 0, d_state = 0, headdim = 0, expand = 0, ngroups = 0,
          d_conv = 0;
};

// What the manifest says of an engine, docs/trt.md.
struct EngineEntry {
  std::string lowering;
  bool embed_plugins = false, version_compatible = false;
};

struct FileEntry {
  std::string sha256, chunks_sha256;  // the latter "" in a bundle of version 1
  int64_t bytes;
};

struct Manifest {
  std::string text;
  const Target* target;
  Sizes sizes;
  std::string state_dtype;
  std::map<std::string, FileEntry> files;
  std::vector<int64_t> ends;  // of the config's eos_token_id
  EngineEntry engine;         // of a target that has one

  const std::string& model() const { return files.at(target->files.back()).sha256; }
};

struct Bundle {
  Files files;
  Manifest manifest;
};

// A bundle that may run on this machine, its files checked: sizes, and hashes unless `sizes_only`. Throws Failure.
Bundle open_bundle(const std::string& folder, bool sizes_only);

// Whether a bundle's own code may run: the caller asked for it, or the environment does.
bool trusted(bool asked);

// Throws Failure for the engine in the file `path`, of that sha256, if it is neither trusted nor of this user's own
// dfcompile, which records what it makes: targets/trust.py.
void require_engine(const std::string& path, const std::string& sha256, bool asked);

}  // namespace dfssm::native
