// The state of one OS thread's emulated device.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>

#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulation.h"
#include "memory.h"

namespace dfssm::trt::emulation {

constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;
constexpr int kDefaultSharedBytes = 48 << 10;  // static, or without asking
constexpr int kMaxSharedBytes = 227 << 10;     // as on sm_90 and sm_100

struct Collective {
  const char* what;
  unsigned mask, arrived = 0, left = 0;
  unsigned words[kWarp][6] = {};  // what each lane brings
};

struct Warp {
  std::list<Collective> collectives;
  uint32_t visible[kWarp][kWarp];  // [of][to]: see Accessor
  uint32_t stamp;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  ~Fiber() {
    if (stack) munmap(stack, kStackBytes);
  }
  enum State { ready, at_barrier, in_collective, done } state;
  jmp_buf context;
  char* stack = nullptr;
  bool started = false, waited = false;  // for the launch before
  int index;
  uint3 position;
  Collective* collective;
  int barrier_result;
  std::vector<Copy> copies;
  int copy_group;
};

struct Barrier {
  const char* file;
  int line;
  int waiting = 0, count, all, any;
  Reduce reduce;
};

struct Machine {
  // The launch.
  dim3 grid, block;
  uint3 block_position;
  int threads;
  void (*call)(void*);
  void* parameters;
  size_t parameters_bytes;
  bool dependent = false;  // launches
  int launches = 0;        // since they were last asked for
  bool failed = false, any_buffer = false;
  // The block.
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int finished;  // threads that left the kernel
  Fiber* current = nullptr;
  jmp_buf scheduler;
  // Memory.
  std::vector<Region> buffers;
  std::list<std::vector<Shadow>> buffer_shadows;
  std::list<Region> shared;  // the first is the dynamic one
  std::map<const void*, Region*> declared;
  // Dynamic and static shared arrays, with gaps between them. Epochs tell what of the shadow is of an earlier block.
  static constexpr size_t kArenaBytes = kMaxSharedBytes + kDefaultSharedBytes + (64 << 10);
  alignas(128) char arena[kArenaBytes];
  std::vector<Shadow> arena_shadow = std::vector<Shadow>(kArenaBytes);
  size_t arena_used, static_bytes;
  uint32_t epoch = 1, launch_epoch = 1, block_epoch = 1;
  bool acquired;
  std::map<const void*, int> opted_in;
  std::string error;
  cudaError_t last = cudaSuccess;
};

Machine& machine();

// The machine while it runs a kernel, else null.
extern thread_local Machine* active __attribute__((tls_model("initial-exec")));

// Ends the launch with a report. Device code has no destructors that would have to run.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Machine& m, const char* format, ...);

// Access by the current thread; `code` is where from, `aligned` whether it must be.
enum Kind { load, store, update };
void access(uintptr_t address, size_t size, Kind kind, bool aligned, const void* code);

Region* add_shared(Machine& m, std::string name, size_t at, size_t bytes);
void host_writes(void* to, size_t bytes);

}  // namespace dfssm::trt::emulation
