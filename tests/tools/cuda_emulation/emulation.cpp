// Execution: launches, blocks, fibers, barriers and warps.
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>

#include "machine.h"

namespace dfssm::trt::emulation {

thread_local Machine* active = nullptr;

Machine& machine() {
  static thread_local std::unique_ptr<Machine> own = std::make_unique<Machine>();
  return *own;
}

void fail(Machine& m, const char* format, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const uint3 b = m.block_position;
  char where[200] = "";
  if (m.current) {
    const uint3 t = m.current->position;
    std::snprintf(where, sizeof where, "block (%u,%u,%u), thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  } else {
    std::snprintf(where, sizeof where, "block (%u,%u,%u): ", b.x, b.y, b.z);
  }
  m.error = std::string(where) + text;
  m.failed = true;
  _longjmp(m.scheduler, 1);
}

namespace {

void yield(Machine& m, Fiber::State state) {
  Fiber* self = m.current;
  self->state = state;
  if (!_setjmp(self->context)) _longjmp(m.scheduler, 1);
}

void release_barrier(Machine& m) {
  Barrier& barrier = m.barrier;
  const int result = barrier.reduce == Reduce::all   ? barrier.all
                     : barrier.reduce == Reduce::any ? barrier.any
                                                     : barrier.count;
  barrier.waiting = 0;
  ++m.epoch;
  for (int t = 0; t < m.threads; ++t) {
    m.fibers[t]->barrier_result = result;
    m.fibers[t]->state = Fiber::ready;
  }
}

// A fiber runs one thread of a block after another, for as many blocks and launches as want one.
void fiber_main() {
  for (;;) {
    Machine& m = *active;
    m.call(m.parameters);
    Fiber& self = *m.current;
    if (m.barrier.waiting) {
      fail(m, "leaves the kernel while %d threads of its block wait at the barrier of %s:%d",
           m.barrier.waiting, m.barrier.file, m.barrier.line);
    }
    for (const Collective& collective : m.warps[self.index / kWarp].collectives) {
      if (collective.arrived != collective.mask && collective.mask >> self.index % kWarp & 1) {
        fail(m, "leaves the kernel while lanes wait for it in %s, mask 0x%08x", collective.what,
             collective.mask);
      }
    }
    for (const Copy& copy : self.copies) {
      if (copy.bytes) fail(m, "leaves the kernel with asynchronous copies it never waited for");
    }
    ++m.finished;
    yield(m, Fiber::done);
  }
}

void resume(Machine& m, Fiber& fiber) {
  m.current = &fiber;
  if (!_setjmp(m.scheduler)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  m.current = nullptr;
}

void report_stuck(Machine& m) {
  for (int t = 0; t < m.threads; ++t) {
    const Fiber& fiber = *m.fibers[t];
    if (fiber.state != Fiber::in_collective) continue;
    const Collective& c = *fiber.collective;
    m.error = "thread " + std::to_string(t) + " waits in " + c.what + " for lanes that never come";
    char masks[80];
    std::snprintf(masks, sizeof masks, " (mask 0x%08x, arrived 0x%08x)", c.mask, c.arrived);
    m.error += masks;
    m.failed = true;
    return;
  }
}

void run_block(Machine& m) {
  m.block_epoch = ++m.epoch;
  m.acquired = false;
  m.finished = 0;
  m.barrier.waiting = 0;
  m.warps.resize((m.threads + kWarp - 1) / kWarp);
  for (Warp& warp : m.warps) {
    warp.collectives.clear();
    std::memset(warp.visible, 0, sizeof warp.visible);
    warp.stamp = 0;
  }
  for (int t = 0; t < m.threads; ++t) {
    Fiber& fiber = *m.fibers[t];
    fiber.state = Fiber::ready;
    fiber.index = t;
    fiber.position = {t % m.block.x, t / m.block.x % m.block.y, t / (m.block.x * m.block.y)};
    fiber.copies.clear();
    fiber.copy_group = 0;
    fiber.waited = !m.dependent;
  }
  while (m.finished < m.threads) {
    bool progress = false;
    for (int first = 0; first < m.threads; first += kWarp) {  // a warp as far as it goes, then the next
      for (bool again = true; again;) {
        again = false;
        for (int t = first; t < std::min(first + kWarp, m.threads); ++t) {
          if (m.fibers[t]->state != Fiber::ready) continue;
          resume(m, *m.fibers[t]);
          if (m.failed) return;
          progress = again = true;
        }
      }
    }
    if (!progress) return report_stuck(m);
  }
}

// Warps.

// Waits until every lane of the mask is here with its `words`; then each has what all brought. `leave` when read.
Collective& meet(Machine& m, const char* what, unsigned mask, const unsigned* words, int count) {
  Fiber& self = *m.current;
  const int lane = self.index % kWarp, first = self.index - lane;
  if (!(mask >> lane & 1))
    fail(m, "calls %s with mask 0x%08x, which does not name its lane %d", what, mask, lane);
  for (int other = 0; other < kWarp; ++other) {
    const bool there = first + other < m.threads && m.fibers[first + other]->state != Fiber::done;
    if (mask >> other & 1 && !there) {
      fail(m, "calls %s with mask 0x%08x; lane %d has left the kernel or never was", what, mask, other);
    }
  }
  Warp& warp = m.warps[self.index / kWarp];
  Collective* found = nullptr;
  for (Collective& c : warp.collectives) {
    if (c.arrived == c.mask) continue;  // only still being read
    if (c.mask == mask && c.what == what) {
      found = &c;
    } else if (c.arrived & mask) {
      fail(m, "calls %s with mask 0x%08x while lanes of it wait in %s with mask 0x%08x", what, mask, c.what,
           c.mask);
    }
  }
  if (!found) {
    warp.collectives.push_front({what, mask});
    found = &warp.collectives.front();
  }
  std::copy(words, words + count, found->words[lane]);
  found->arrived |= 1u << lane;
  if (found->arrived != mask) {
    self.collective = found;
    yield(m, Fiber::in_collective);
    return *found;
  }
  for (int other = 0; other < kWarp; ++other) {
    if (mask >> other & 1) m.fibers[first + other]->state = Fiber::ready;
  }
  return *found;
}

void leave(Machine& m, Collective& collective) {
  collective.left |= 1u << m.current->index % kWarp;
  if (collective.left != collective.mask) return;
  m.warps[m.current->index / kWarp].collectives.remove_if(
      [&](const Collective& c) { return &c == &collective; });
}

constexpr char kShuffle[] = "a shuffle", kVote[] = "a vote", kMma[] = "mma", kMmaHalf[] = "mma of fp16",
               kMatrices[] = "a load of matrices", kSyncWarp[] = "__syncwarp";

}  // namespace

// Device side.

uint3 thread_index() { return active->current->position; }
uint3 block_index() { return active->block_position; }
dim3 block_size() { return active->block; }
dim3 grid_size() { return active->grid; }

void* shared_array(const void* declaration, size_t bytes, size_t alignment) {
  Machine& m = *active;
  Region*& region = m.declared[declaration];
  if (!region) {
    m.static_bytes += bytes;
    if (m.static_bytes > kDefaultSharedBytes)
      fail(m, "declares %zu bytes of static shared memory", m.static_bytes);
    m.arena_used = (m.arena_used + alignment - 1) / alignment * alignment;
    region = add_shared(m, "a shared array", m.arena_used, bytes);
    m.arena_used += bytes + 256;
  }
  return reinterpret_cast<void*>(region->begin);
}

void wait_for_launch_before() { active->current->waited = true; }

void* dynamic_shared() { return active->arena; }

int barrier(const char* file, int line, Reduce reduce, bool predicate) {
  Machine& m = *active;
  Barrier& b = m.barrier;
  if (m.finished) {
    fail(m, "is at the barrier of %s:%d, which %d threads that left the kernel never reach", file, line,
         m.finished);
  }
  if (b.waiting && (std::strcmp(b.file, file) || b.line != line)) {
    fail(m, "is at the barrier of %s:%d while %d threads of its block wait at that of %s:%d", file, line,
         b.waiting, b.file, b.line);
  }
  if (!b.waiting) b = {file, line, 0, 0, 1, 0, reduce};
  b.count += predicate;
  b.all &= predicate;
  b.any |= predicate;
  if (++b.waiting == m.threads) {
    release_barrier(m);
  } else {
    yield(m, Fiber::at_barrier);
  }
  return m.current->barrier_result;
}

void sync_warp(unsigned mask) {
  Machine& m = *active;
  Collective& collective = meet(m, kSyncWarp, mask, nullptr, 0);
  if (!collective.left) {  // the first to go on orders the lanes
    Warp& warp = m.warps[m.current->index / kWarp];
    ++warp.stamp;
    uint32_t seen[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int other = 0; other < kWarp; ++other)
        seen[other] = std::max(seen[other], warp.visible[lane][other]);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int other = 0; other < kWarp; ++other) {
        warp.visible[lane][other] = mask >> other & 1 ? warp.stamp : seen[other];
      }
    }
  }
  leave(m, collective);
}

uint64_t shuffle(unsigned mask, uint64_t value, Shuffle kind, int operand, int width) {
  Machine& m = *active;
  const unsigned words[] = {static_cast<unsigned>(value), static_cast<unsigned>(value >> 32)};
  const int lane = m.current->index % kWarp;
  if (width <= 0 || width > kWarp || width & (width - 1)) fail(m, "shuffles with width %d", width);
  Collective& collective = meet(m, kShuffle, mask, words, 2);
  const int base = lane & ~(width - 1);
  int source = lane;
  if (kind == Shuffle::index) source = base | (operand & (width - 1));
  if (kind == Shuffle::up && lane - operand >= base) source = lane - operand;
  if (kind == Shuffle::down && lane + operand < base + width) source = lane + operand;
  if (kind == Shuffle::exclusive_or && (lane ^ operand) < base + width) source = lane ^ operand;
  if (!(mask >> source & 1)) fail(m, "shuffles from lane %d, which is not in its mask 0x%08x", source, mask);
  const uint64_t result =
      static_cast<uint64_t>(collective.words[source][1]) << 32 | collective.words[source][0];
  leave(m, collective);
  return result;
}

unsigned ballot(unsigned mask, bool predicate) {
  Machine& m = *active;
  const unsigned word = predicate;
  Collective& collective = meet(m, kVote, mask, &word, 1);
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) votes |= collective.words[lane][0] << lane;
  }
  leave(m, collective);
  return votes;
}

// PTX ISA, mma.m16n8k32 with .s8: A is 16 x 32 and B 32 x 8, four bytes of consecutive k a register; of A a
// lane holds rows lane/4 and lane/4 + 8, of B column lane/4, both at k = 4 (lane % 4) and that + 16; of D the
// same rows and columns 2 (lane % 4) and the next.
void mma_s8_16x8x32(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Machine& m = *active;
  const unsigned words[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  Collective& collective = meet(m, kMma, 0xffffffff, words, 6);
  const int lane = m.current->index % kWarp;
  const auto byte = [](unsigned word, int k) {
    return static_cast<int>(static_cast<int8_t>(word >> 8 * (k % 4)));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    unsigned sum = static_cast<unsigned>(d[i]);
    for (int k = 0; k < 32; ++k) {
      const unsigned left = collective.words[row % 8 * 4 + k % 16 / 4][(row < 8 ? 0 : 1) + (k < 16 ? 0 : 2)];
      const unsigned right = collective.words[column * 4 + k % 16 / 4][k < 16 ? 4 : 5];
      sum += static_cast<unsigned>(byte(left, k) * byte(right, k));
    }
    d[i] = static_cast<int>(sum);
  }
  leave(m, collective);
}

// Sums as tensor cores make them, at their worst: terms are aligned to the largest and cut to 24 bits there,
// and so is their sum. Eight products at a time.
namespace {
float add_products(float sum, const double (&products)[8]) {
  double largest = std::fabs(sum), plain = sum;
  for (double product : products) largest = std::max(largest, std::fabs(product)), plain += product;
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 23, -149));
  double total = std::trunc(sum / unit);
  for (double product : products) total += std::trunc(product / unit);
  const float rounded = static_cast<float>(total * unit);
  return std::fabs(rounded) > std::fabs(total * unit) ? std::nextafter(rounded, 0.0f) : rounded;
}
}  // namespace

// PTX ISA, mma.m16n8k16 with .f16: as above with two fp16 a register, k = 2 (lane % 4) and that + 8.
void mma_f16_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Machine& m = *active;
  const unsigned words[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  Collective& collective = meet(m, kMmaHalf, 0xffffffff, words, 6);
  const int lane = m.current->index % kWarp;
  const auto half = [](unsigned word, int k) {
    return static_cast<double>(__half2float(__ushort_as_half(static_cast<uint16_t>(word >> k % 2 * 16))));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
    for (int first = 0; first < 16; first += 8) {
      double products[8];
      for (int k = first; k < first + 8; ++k) {
        const unsigned left = collective.words[row % 8 * 4 + k % 8 / 2][(row < 8 ? 0 : 1) + (k < 8 ? 0 : 2)];
        const unsigned right = collective.words[column * 4 + k % 8 / 2][k < 8 ? 4 : 5];
        products[k - first] = half(left, k) * half(right, k);
      }
      d[i] = add_products(d[i], products);
    }
  }
  leave(m, collective);
}

// PTX ISA, ldmatrix.x4 of .b16.
void load_matrices(unsigned (&out)[4], const void* row, bool transposed) {
  Machine& m = *active;
  const auto own = reinterpret_cast<uintptr_t>(row);
  if (own % 16) fail(m, "loads a row of a matrix from an address that is no multiple of 16");
  const unsigned words[] = {static_cast<unsigned>(own), static_cast<unsigned>(own >> 16 >> 16)};
  Collective& collective = meet(m, kMatrices, 0xffffffff, words, 2);
  const int lane = m.current->index % kWarp, g = lane / 4, t = lane % 4;
  const auto load16 = [&](int from, int column) {
    const uint64_t at = static_cast<uint64_t>(collective.words[from][1]) << 32 | collective.words[from][0];
    const auto* const value = reinterpret_cast<const uint16_t*>(at) + column;
    access(reinterpret_cast<uintptr_t>(value), 2, load, true, __builtin_return_address(0));
    return static_cast<unsigned>(*value);
  };
  for (int i = 0; i < 4; ++i) {
    out[i] = transposed ? load16(8 * i + 2 * t, g) | load16(8 * i + 2 * t + 1, g) << 16
                        : load16(8 * i + g, 2 * t) | load16(8 * i + g, 2 * t + 1) << 16;
  }
  leave(m, collective);
}

// Host side.

void dependent_launches(bool yes) { machine().dependent = yes; }

const char* last_error() {
  static thread_local std::string text;
  text = std::exchange(machine().error, "");
  return text.c_str();
}

cudaError_t run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const void* kernel, void (*call)(void*),
                void* parameters, size_t parameters_bytes) {
  Machine& m = machine();
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const auto invalid = [&](const std::string& what) {
    m.error = "invalid launch: " + what;
    return m.last = cudaErrorInvalidConfiguration;
  };
  const auto size = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  if (!threads || threads > kMaxThreads || block.z > 64)
    return invalid("a block of " + size(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return invalid("a grid of " + size(grid) + " blocks");
  }
  const auto opted_in = m.opted_in.find(kernel);
  const size_t allowed = opted_in == m.opted_in.end() ? kDefaultSharedBytes : opted_in->second;
  if (dynamic_shared_bytes > std::max<size_t>(allowed, kDefaultSharedBytes)) {
    return invalid(std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory, opted in for " +
                   std::to_string(allowed));
  }
  m.grid = grid;
  m.block = block;
  m.threads = static_cast<int>(threads);
  m.call = call;
  m.parameters = parameters;
  m.parameters_bytes = parameters_bytes;
  m.failed = false;
  ++m.launches;
  m.launch_epoch = ++m.epoch;
  m.shared.clear();
  m.declared.clear();
  add_shared(m, "dynamic shared memory", 0, dynamic_shared_bytes);
  m.arena_used = (dynamic_shared_bytes + 127) / 128 * 128 + 4096;
  m.static_bytes = 0;
  while (m.fibers.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return m.last = cudaErrorMemoryAllocation;
    mprotect(stack, kGuardBytes, PROT_NONE);  // a stack that is too small must not run into its neighbour
    fiber->stack = static_cast<char*>(stack);
    m.fibers.push_back(std::move(fiber));
  }
  active = &m;
  for (unsigned z = 0; z < grid.z && !m.failed; ++z) {
    for (unsigned y = 0; y < grid.y && !m.failed; ++y) {
      for (unsigned x = 0; x < grid.x && !m.failed; ++x) {
        m.block_position = {x, y, z};
        run_block(m);
      }
    }
  }
  active = nullptr;
  if (!m.failed) return cudaSuccess;
  m.fibers.clear();  // they stopped half way
  return m.last = cudaErrorLaunchFailure;
}

}  // namespace dfssm::trt::emulation
