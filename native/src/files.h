// The files of a folder, opened once: what was checked is what is used. And sha256, and a file written whole.
#pragma once

#include <dfssm/runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

namespace dfssm::native {

// An open file, closed at the end.
class Handle {
 public:
  explicit Handle(int number = -1) : number_(number) {}
  Handle(Handle&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Handle& operator=(Handle&&) = delete;
  ~Handle();
  operator int() const { return number_; }

 private:
  int number_;
};

// A file's content as memory: pages that the kernel can drop, and share between processes.
class Mapping {
 public:
  Mapping(int handle, size_t size);  // throws std::system_error
  Mapping(const Mapping&) = delete;
  ~Mapping();
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_;
};

constexpr char kManifest[] = "manifest.json";
constexpr int64_t kMostOfManifest = 1 << 26;  // bytes; a real one has 10 KB

// Files of `folder` by name. A name is looked up below the folder that was opened; a file may be a link. All throw
// Failure for what is missing, no regular file, or cannot be read.
//
// A file is looked for in the part of the manifest that is there, and then in its place: targets/files.py.
class Files {
 public:
  explicit Files(const std::string& folder);
  const std::string& folder() const { return folder_; }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  // Where it lies now, for what opens a file by its path.
  std::string place(const std::string& name) const;
  // Whether all files were in their places when the folder was opened.
  bool in_place() const { return !part_; }
  // Whether the folder has another manifest by now, or the same one written anew.
  bool replaced();
  int open(const std::string& name);
  int64_t size(const std::string& name);
  std::string read(const std::string& name, int64_t most);
  std::string sha256(const std::string& name);
  std::string chunks_sha256(const std::string& name);  // docs/format.md: two hashes of a file
  std::unique_ptr<Mapping> map(const std::string& name);

 private:
  std::string folder_;
  Handle handle_;
  std::string part_name_;
  std::optional<Handle> part_;
  std::map<std::string, Handle> opened_;
};

std::string sha256_hex(const std::string& content);

// The content of a regular file of at most `most` bytes. Throws Failure(status).
std::string read_file(const std::string& path, int64_t most, dfssm_status status);

// Writes a file whole, or not at all: another of its name is replaced at the end. Throws Failure.
void write_file(const std::string& path, const std::string& content);

}  // namespace dfssm::native
