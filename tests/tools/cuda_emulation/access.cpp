// Memory: every load and store of device code, looked at.
#include <algorithm>

#include "machine.h"

extern "C" const char __ehdr_start, _end;  // of this library, from the linker: its constants may be read

namespace dfssm::trt::emulation {
namespace {

const Region* find(const Machine& m, uintptr_t address, size_t size) {
  for (const Region& region : m.shared) {
    if (region.holds(address, size)) return &region;
  }
  for (const Region& region : m.buffers) {
    if (region.holds(address, size)) return &region;
  }
  return nullptr;
}

std::string describe(const Machine& m, uintptr_t address) {
  const Region* nearest = nullptr;
  for (const Region& region : m.shared) {
    if (region.near(address) && (!nearest || region.holds(address, 1))) nearest = &region;
  }
  for (const Region& region : m.buffers) {
    if (region.near(address) && (!nearest || region.holds(address, 1))) nearest = &region;
  }
  if (!nearest) return "an address near no buffer";
  return "byte " + std::to_string(static_cast<intptr_t>(address - nearest->begin)) + " of " + nearest->name +
         " (" + std::to_string(nearest->bytes) + " bytes)";
}

}  // namespace

void access(uintptr_t address, size_t size, Kind kind, bool aligned, const void* code) {
  const bool write = kind != load, atomic = kind == update;
  Machine* const active_machine = active;
  if (!active_machine || !active_machine->current) return;  // host code in an instrumented file
  Machine& m = *active_machine;
  const uintptr_t stack = reinterpret_cast<uintptr_t>(m.current->stack);
  if (address - stack < kStackBytes) return;
  const auto wrong = [&](const std::string& what) {
    fail(m, "%s %zu bytes at %s: %s [code 0x%zx]",
         atomic  ? "updates"
         : write ? "writes"
                 : "reads",
         size, describe(m, address).c_str(), what.c_str(),
         static_cast<size_t>(static_cast<const char*>(code) - &__ehdr_start) - 1);
  };
  Region* region = const_cast<Region*>(find(m, address, size));
  if (!region) {
    const uintptr_t parameters = reinterpret_cast<uintptr_t>(m.parameters);
    if (!write && address >= parameters && address + size <= parameters + m.parameters_bytes) return;
    const uintptr_t image = reinterpret_cast<uintptr_t>(&__ehdr_start);
    if (!write && address >= image && address + size <= reinterpret_cast<uintptr_t>(&_end)) return;
    for (const auto& fiber : m.fibers) {
      if (address - reinterpret_cast<uintptr_t>(fiber->stack) < kStackBytes)
        wrong("another thread's local variable");
    }
    const uintptr_t arena = reinterpret_cast<uintptr_t>(m.arena);
    const bool shared = address >= arena && address < arena + sizeof m.arena;
    if (shared || m.any_buffer || address < kGuardBytes) wrong("out of bounds");
    return;
  }
  if (aligned && address % size) wrong("misaligned");
  if (!region->shadow) {
    if (write) wrong("the buffer is read-only");
    return;
  }
  if (!region->shared && !m.current->waited) wrong("the launch before was not waited for");
  if (atomic && !region->shared) m.acquired = true;
  const Warp& warp = m.warps[m.current->index / kWarp];
  const Accessor by{m.current->index, m.epoch,        warp.stamp,
                    m.block_epoch,    m.launch_epoch, warp.visible[m.current->index % kWarp],
                    m.acquired};
  const bool must_be_written = region->shared || region->contents == Contents::uninitialised;
  for (size_t i = 0; i < size; ++i) {
    Shadow& byte = region->shadow[address - region->begin + i];
    const Problem problem = touch(byte, region->shared, must_be_written, write, atomic, by);
    if (problem.kind != Problem::none) wrong(problem.text());
  }
}

Region* add_shared(Machine& m, std::string name, size_t at, size_t bytes) {
  m.shared.push_back({std::move(name), reinterpret_cast<uintptr_t>(m.arena + at), bytes,
                      Contents::uninitialised, true, m.arena_shadow.data() + at});
  return &m.shared.back();
}

// A copy or fill by the host writes: what was uninitialised no longer is.
void host_writes(void* to, size_t bytes) {
  Machine& m = machine();
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  if (auto* region = const_cast<Region*>(find(m, address, bytes)); region && region->shadow) {
    Shadow written;
    written.write_epoch = m.epoch;
    std::fill_n(region->shadow + (address - region->begin), bytes, written);
  }
}

void add_buffer(const char* name, const void* data, size_t bytes, Contents contents) {
  Machine& m = machine();
  m.any_buffer = true;
  Shadow* shadow = nullptr;
  if (contents != Contents::constant) shadow = m.buffer_shadows.emplace_back(bytes).data();
  m.buffers.push_back({name, reinterpret_cast<uintptr_t>(data), bytes, contents, false, shadow});
}

void clear_buffers() {
  Machine& m = machine();
  m.buffers.clear();
  m.buffer_shadows.clear();
  m.any_buffer = false;
}

void atomic_access(const void* address, size_t bytes) {
  access(reinterpret_cast<uintptr_t>(address), bytes, update, true, __builtin_return_address(0));
}

void copy_async(void* shared, const void* global, size_t bytes) {
  Fiber& self = *active->current;
  self.copies.push_back({shared, global, bytes, self.copy_group});
}

void copy_async_commit() { ++active->current->copy_group; }

void copy_async_wait(int groups) {
  Fiber& self = *active->current;
  for (Copy& copy : self.copies) {
    if (!copy.bytes || copy.group + groups >= self.copy_group) continue;
    access(reinterpret_cast<uintptr_t>(copy.from), copy.bytes, load, true, __builtin_return_address(0));
    access(reinterpret_cast<uintptr_t>(copy.to), copy.bytes, store, true, __builtin_return_address(0));
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.bytes = 0;
  }
}

}  // namespace dfssm::trt::emulation

namespace emulation = dfssm::trt::emulation;

// The compiler's reports of loads and stores (-fsanitize=thread), here instead of libtsan's. "Unaligned": of
// a type whose alignment is less than its size, which nvcc takes apart.
#define DFSSM_REPORT(name, size, kind, aligned)                                             \
  extern "C" void __tsan_##name##size(void* address) {                                      \
    emulation::access(reinterpret_cast<uintptr_t>(address), size, emulation::kind, aligned, \
                      __builtin_return_address(0));                                         \
  }
#define DFSSM_REPORTS(size)                         \
  DFSSM_REPORT(read, size, load, true)              \
  DFSSM_REPORT(write, size, store, true)            \
  DFSSM_REPORT(unaligned_read, size, load, false)   \
  DFSSM_REPORT(unaligned_write, size, store, false) \
  DFSSM_REPORT(volatile_read, size, load, true)     \
  DFSSM_REPORT(volatile_write, size, store, true)
DFSSM_REPORTS(1)
DFSSM_REPORTS(2)
DFSSM_REPORTS(4)
DFSSM_REPORTS(8)
DFSSM_REPORTS(16)
extern "C" void __tsan_read_range(void* address, size_t size) {
  emulation::access(reinterpret_cast<uintptr_t>(address), size, emulation::load, false,
                    __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, size_t size) {
  emulation::access(reinterpret_cast<uintptr_t>(address), size, emulation::store, false,
                    __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
