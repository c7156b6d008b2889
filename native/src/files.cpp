// The plain functions of SHA-256, which OpenSSL 3 marks as old: the new ones load providers first, which take 2 MB.
#define OPENSSL_API_COMPAT 0x10100000L
#include "files.h"

#include <fcntl.h>
#include <openssl/sha.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "failure.h"
#include "machine.h"

namespace dfssm::native {
namespace {

constexpr int64_t kChunk = 1 << 20;   // part of the format of bundles
constexpr size_t kPiece = 1 << 18;    // of a read: still in the core's cache when it is hashed
constexpr unsigned kMostThreads = 8;  // which hash as fast as memory gives

std::string reason() { return std::strerror(errno); }

std::string hex(const std::string& digest) {
  static const char digits[] = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : digest) text += {digits[byte >> 4], digits[byte & 15]};
  return text;
}

class Sha256 {
 public:
  Sha256() { SHA256_Init(&context_); }
  void update(const void* data, size_t size) { SHA256_Update(&context_, data, size); }
  std::string digest() {
    std::string found(SHA256_DIGEST_LENGTH, '\0');
    SHA256_Final(reinterpret_cast<unsigned char*>(found.data()), &context_);
    return found;
  }

 private:
  SHA256_CTX context_;
};

// sha256 of the bytes of a file from `start` up to `end`, or its own end. Throws std::system_error.
std::string digest_of(int handle, int64_t start, int64_t end) {
  std::vector<char> piece(kPiece);
  Sha256 found;
  while (start < end) {
    const ssize_t count = pread(handle, piece.data(), std::min<int64_t>(piece.size(), end - start), start);
    if (count < 0) throw std::system_error(errno, std::generic_category());
    if (count == 0) break;
    found.update(piece.data(), count);
    start += count;
  }
  return found.digest();
}

// A regular file; of a pipe nobody may be at the other end.
int open_regular(int folder, const char* path) {
  const int handle = openat(folder, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  struct stat found;
  if (handle >= 0 && (fstat(handle, &found) != 0 || !S_ISREG(found.st_mode))) {
    close(handle);
    errno = EINVAL;
    return -1;
  }
  return handle;
}

int64_t size_of(int handle) {
  struct stat found;
  return fstat(handle, &found) == 0 ? found.st_size : 0;
}

std::string read_all(int handle, int64_t size) {
  std::string content(size, '\0');
  int64_t at = 0;
  while (at < size) {
    const ssize_t count = pread(handle, &content[at], size - at, at);
    if (count < 0) throw std::system_error(errno, std::generic_category());
    if (count == 0) break;
    at += count;
  }
  content.resize(at);
  return content;
}

}  // namespace

Handle::~Handle() {
  if (number_ >= 0) close(number_);
}

Mapping::Mapping(int handle, size_t size) : size_(size) {
  if (!size) return;
  void* pages = mmap(nullptr, size, PROT_READ, MAP_SHARED, handle, 0);
  if (pages == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  data_ = static_cast<uint8_t*>(pages);
  madvise(pages, size,
          MADV_HUGEPAGE);  // a core reads weights faster from such, where the file's system has them
}

Mapping::~Mapping() {
  if (data_) munmap(data_, size_);
}

Files::Files(const std::string& folder)
    : folder_(folder), handle_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  require(handle_ >= 0, DFSSM_BAD_BUNDLE,
          folder + " cannot be read (" + reason() + "): give a bundle, a folder that dfcompile made");
  try {
    // base/files.py, part_of
    part_name_ = "." + sha256_hex(read(kManifest, kMostOfManifest)).substr(0, 16) + ".dfssm-part";
  } catch (const Failure&) {  // whoever reads the manifest is told
    return;
  }
  const int part = openat(handle_, part_name_.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (part >= 0) {
    part_.emplace(part);
  } else {  // nearly always: each file is in its place
    require(errno == ENOENT || errno == ENOTDIR || errno == ELOOP, DFSSM_BAD_BUNDLE,
            path(part_name_) + " cannot be read (" + reason() + "): copy or compile it again");
  }
}

std::string Files::place(const std::string& name) const {
  struct stat found;
  return part_ && fstatat(*part_, name.c_str(), &found, 0) == 0 ? path(part_name_ + "/" + name) : path(name);
}

bool Files::replaced() {
  struct stat now, then;
  return stat(path(kManifest).c_str(), &now) == 0 && fstat(open(kManifest), &then) == 0 &&
         (now.st_dev != then.st_dev || now.st_ino != then.st_ino);
}

int Files::open(const std::string& name) {
  const auto found = opened_.find(name);
  if (found != opened_.end()) return found->second;
  // A writer takes a file from the part to its place, never back.
  int number = part_ ? open_regular(*part_, name.c_str()) : -1;
  if (!part_ || (number < 0 && errno == ENOENT)) number = open_regular(handle_, name.c_str());
  Handle handle(number);
  require(handle >= 0, DFSSM_BAD_BUNDLE,
          errno == ENOENT ? path(name) + " is missing: give a complete bundle, copy or compile it again"
                          : path(name) + " cannot be read (" + reason() + "): copy or compile it again");
  return opened_.emplace(name, std::move(handle)).first->second;
}

int64_t Files::size(const std::string& name) { return size_of(open(name)); }

std::string Files::read(const std::string& name, int64_t most) {
  const int64_t bytes = size(name);
  require(bytes <= most, DFSSM_BAD_BUNDLE,
          path(name) + " has " + std::to_string(bytes) + " bytes: compile the model again");
  return read_all(open(name), bytes);
}

std::string Files::sha256(const std::string& name) { return hex(digest_of(open(name), 0, size(name))); }

std::string Files::chunks_sha256(const std::string& name) {
  const int handle = open(name);
  const int64_t bytes = size(name);
  std::vector<std::string> digests((bytes + kChunk - 1) / kChunk);
  std::atomic<size_t> next{0};
  std::exception_ptr failed;
  std::atomic_flag told = ATOMIC_FLAG_INIT;
  const auto hash = [&] {
    try {
      for (size_t i; (i = next++) < digests.size();) {
        const int64_t start = static_cast<int64_t>(i) * kChunk;
        digests[i] = digest_of(handle, start, std::min(start + kChunk, bytes));
      }
    } catch (...) {
      if (!told.test_and_set()) failed = std::current_exception();
    }
  };
  const unsigned most = std::min<unsigned>(default_threads(), kMostThreads);
  std::vector<std::thread> threads;
  // Of a few chunks threads would take as long to start: 2 MB are hashed in 1 ms.
  for (unsigned i = 1; i < most && digests.size() >= 4; ++i) threads.emplace_back(hash);
  hash();
  for (std::thread& thread : threads) thread.join();
  if (failed) std::rethrow_exception(failed);
  Sha256 all;
  for (const std::string& digest : digests) all.update(digest.data(), digest.size());
  return hex(all.digest());
}

std::unique_ptr<Mapping> Files::map(const std::string& name) {
  return std::make_unique<Mapping>(open(name), size(name));
}

std::string sha256_hex(const std::string& content) {
  Sha256 found;
  found.update(content.data(), content.size());
  return hex(found.digest());
}

std::string read_file(const std::string& path, int64_t most, dfssm_status status) {
  const Handle handle(open_regular(AT_FDCWD, path.c_str()));
  require(handle >= 0, status, path + " cannot be read (" + reason() + "): give another file");
  const int64_t bytes = size_of(handle);
  require(bytes <= most, status, path + " has " + std::to_string(bytes) + " bytes: give another file");
  return read_all(handle, bytes);
}

void write_file(const std::string& path, const std::string& content) {
  static std::atomic<unsigned> drafts{0};
  const std::string draft = path + "." + std::to_string(getpid()) + "." + std::to_string(drafts++);
  const Handle handle(::open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  bool good = handle >= 0;
  size_t at = 0;
  while (good && at < content.size()) {
    const ssize_t count = write(handle, content.data() + at, content.size() - at);
    good = count > 0 || errno == EINTR;
    at += std::max<ssize_t>(count, 0);
  }
  if (good && fsync(handle) == 0 && rename(draft.c_str(), path.c_str()) == 0) return;
  const std::string why = reason();
  if (handle >= 0) unlink(draft.c_str());
  throw Failure(DFSSM_SYSTEM, "cannot write " + path + " (" + why + "): give another place");
}

}  // namespace dfssm::native
