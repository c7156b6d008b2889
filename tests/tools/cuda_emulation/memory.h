// What emulation.cpp knows of every byte that kernels may touch: whether it was written, and by whom last.
#pragma once

#include <cstdint>
#include <string>

#include "emulation.h"

namespace dfssm::trt::emulation {

// Time is counted in epochs: one begins with every launch, block and barrier of a block, none is used twice.
// Within an epoch two threads are ordered only by __syncwarp.
struct Shadow {
  uint32_t write_epoch = 0, read_epoch = 0;  // of the latest; 0: none yet
  uint32_t write_stamp = 0, read_stamp = 0;  // the warp's count of __syncwarp then
  uint32_t first_read = 0;                   // epoch of the first read in the launch of the latest
  uint32_t readers = 0;               // lanes of `read_warp` that read in read_epoch, unordered to each other
  int16_t writer = 0, read_warp = 0;  // kManyWarps: of several warps
  bool atomic = false;                // the latest write
};
constexpr int16_t kManyWarps = -1;

struct Region {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  Contents contents = Contents::constant;
  bool shared = false;
  Shadow* shadow = nullptr;  // one a byte; none where contents are constant

  bool holds(uintptr_t address, size_t size) const {
    return address >= begin && address + size <= begin + bytes;
  }
  bool near(uintptr_t address) const { return address + 4096 >= begin && address < begin + bytes + 4096; }
};

// Who touches memory, as the checks see it.
struct Accessor {
  int thread;               // of the block
  uint32_t epoch, stamp;    // now
  uint32_t block, launch;   // the epochs these began with
  const uint32_t* visible;  // by lane of the own warp: what it did before this stamp comes before us
  bool acquired;            // this block has done an atomic on global memory

  bool after(uint32_t epoch_of_other, int other, uint32_t stamp_of_other, bool shared) const {
    if (epoch_of_other < (shared ? block : launch)) return true;
    if (epoch_of_other < block) return acquired;
    if (epoch_of_other < epoch || other == thread) return true;
    return other / 32 == thread / 32 && visible[other % 32] > stamp_of_other;
  }
};

// What is wrong with an access of a byte, and with whose.
struct Problem {
  enum Kind { none, unwritten, store, load, loads_of_warps, store_of_block, load_of_block } kind = none;
  int thread = 0;

  std::string text() const {
    const std::string of = " of thread " + std::to_string(thread);
    switch (kind) {
      case none:
        return "";
      case unwritten:
        return "nobody has written it";
      case store:
        return "a race with the store" + of;
      case load:
        return "a race with the load" + of;
      case loads_of_warps:
        return "a race with loads of several warps";
      case store_of_block:
        return "a race with the store of another block";
      case load_of_block:
        return "a race with a load of another block";
    }
    return "";
  }
};

// Checks an access of a byte, and notes it.
inline Problem touch(Shadow& byte, bool shared, bool must_be_written, bool write, bool atomic,
                     const Accessor& by) {
  const uint32_t floor = shared ? by.block : by.launch;
  const bool fresh = shared ? byte.write_epoch < by.block : byte.write_epoch == 0;
  if ((!write || atomic) && fresh && must_be_written) return {Problem::unwritten};
  if (!fresh && !(atomic && byte.atomic) &&
      !by.after(byte.write_epoch, byte.writer, byte.write_stamp, shared)) {
    return {byte.write_epoch < by.block ? Problem::store_of_block : Problem::store, byte.writer};
  }
  if (write) {
    if (!shared && byte.first_read >= floor && byte.first_read < by.block && !by.acquired) {
      return {Problem::load_of_block};
    }
    if (byte.read_epoch == by.epoch) {
      if (byte.read_warp == kManyWarps) return {Problem::loads_of_warps};
      for (int lane = 0; lane < 32; ++lane) {
        const int reader = byte.read_warp * 32 + lane;
        if (byte.readers >> lane & 1 && !by.after(byte.read_epoch, reader, byte.read_stamp, shared)) {
          return {Problem::load, reader};
        }
      }
    }
    byte.write_epoch = by.epoch;
    byte.write_stamp = by.stamp;
    byte.writer = static_cast<int16_t>(by.thread);
    byte.atomic = atomic;
    return {};
  }
  if (byte.first_read < floor) byte.first_read = by.epoch;
  const uint32_t me = 1u << by.thread % 32;
  if (byte.read_epoch != by.epoch) {
    byte.read_warp = static_cast<int16_t>(by.thread / 32);
    byte.readers = me;
  } else if (byte.read_warp == by.thread / 32) {
    if (byte.read_stamp != by.stamp) {  // who comes before us comes before whoever we come before
      for (int lane = 0; lane < 32; ++lane) {
        if (by.visible[lane] > byte.read_stamp) byte.readers &= ~(1u << lane);
      }
    }
    byte.readers |= me;
  } else {
    byte.read_warp = kManyWarps;
  }
  byte.read_epoch = by.epoch;
  byte.read_stamp = by.stamp;
  return {};
}

}  // namespace dfssm::trt::emulation
