// Kernels that do one thing wrong, or the same thing right, for test_emulation.py: `in` are 128 floats, `out`
// room for 128, nothing in it yet.
#include "common/device.h"
#include "common/launch.h"

using namespace dfssm::trt;

#define KERNEL(name, blocks, threads, dynamic_bytes)                                 \
  static __global__ void name(const float* in, float* out);                          \
  extern "C" int run_##name(const float* in, float* out) {                           \
    return launch(name, dim3 blocks, dim3 threads, dynamic_bytes, nullptr, in, out); \
  }                                                                                  \
  static __global__ void name([[maybe_unused]] const float* in, [[maybe_unused]] float* out)

// Global memory.

KERNEL(copy, (2), (64), 0) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  out[i] = in[i];
}
KERNEL(read_past_end, (1), (64), 0) { out[threadIdx.x] = in[threadIdx.x + 65]; }
KERNEL(read_before_begin, (1), (1), 0) { out[0] = in[-1]; }
KERNEL(write_past_end, (1), (129), 0) { out[threadIdx.x] = 1; }
KERNEL(write_one_byte_past_end, (1), (1), 0) { reinterpret_cast<char*>(out)[512] = 1; }
KERNEL(write_constant, (1), (1), 0) { const_cast<float*>(in)[0] = 1; }
KERNEL(read_unwritten, (1), (1), 0) { out[0] = out[1]; }
KERNEL(read_null, (1), (1), 0) { out[0] = *static_cast<const volatile float*>(nullptr); }
KERNEL(read_wide, (1), (32), 0) { store_vector(out + 4 * threadIdx.x, load_vector<4>(in + 4 * threadIdx.x)); }
KERNEL(read_wide_misaligned, (1), (1), 0) { store_vector(out, load_vector<4>(in + 1)); }
KERNEL(read_wide_across_end, (1), (1), 0) { store_vector(out, load_vector<2>(in + 128)); }
KERNEL(blocks_write_the_same, (2), (1), 0) { out[0] = blockIdx.x; }
KERNEL(block_reads_of_another, (2), (1), 0) { out[blockIdx.x] = blockIdx.x ? out[0] : 1; }
KERNEL(block_overwrites_what_another_read, (2), (1), 0) {
  if (blockIdx.x == 0) out[1] = 1, out[2] = out[1];
  if (blockIdx.x == 1) out[1] = 2;
}
// The last block to come adds what all left: ordered by fence and ticket.
KERNEL(last_block_sums, (4), (1), 0) {
  unsigned* const ticket = reinterpret_cast<unsigned*>(out + 100);
  if (blockIdx.x == 0) *ticket = 0;
  out[1 + blockIdx.x] = in[blockIdx.x];
  __threadfence();
  if (atomicAdd(ticket, 1u) == 3) out[0] = out[1] + out[2] + out[3] + out[4];
}

// Shared memory.

KERNEL(reverse, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
KERNEL(reverse_dynamic, (2), (64), 256) {
  DFSSM_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = row[63 - threadIdx.x];
}
KERNEL(dynamic_past_end, (1), (64), 252) {
  DFSSM_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = 1;
}
KERNEL(static_past_end, (1), (64), 0) {
  DFSSM_SHARED(float, row, 63);
  row[threadIdx.x] = 1;
}
KERNEL(static_into_next, (1), (1), 0) {
  DFSSM_SHARED(float, first, 4);
  DFSSM_SHARED(float, second, 4);
  second[0] = 1;
  first[threadIdx.x + 4 + (in[0] > 1e30f)] = 1;
}
KERNEL(shared_unwritten, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  if (threadIdx.x != 5) row[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
KERNEL(shared_of_last_block, (2), (1), 0) {
  DFSSM_SHARED(float, row, 1);
  if (blockIdx.x == 0) row[0] = 1;
  out[blockIdx.x] = row[0];
}
KERNEL(increment_unwritten, (1), (1), 0) {
  DFSSM_SHARED(float, row, 1);
  row[0] += in[0];
  out[0] = row[0];
}

// Races.

KERNEL(read_without_barrier, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  row[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x >= 32) out[threadIdx.x] = row[threadIdx.x - 32];
}
KERNEL(write_without_barrier, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float left = row[(threadIdx.x + 1) % 64];
  row[threadIdx.x] = left;
}
KERNEL(write_the_same, (1), (64), 0) {
  DFSSM_SHARED(float, total, 1);
  total[0] = 1;
}
KERNEL(increment_the_same, (1), (64), 0) {
  DFSSM_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  total[0] += in[threadIdx.x];
}
KERNEL(add_atomically, (1), (64), 0) {
  DFSSM_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(total, in[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = total[0];
}
KERNEL(read_what_atomics_write, (1), (64), 0) {
  DFSSM_SHARED(float, total, 1);
  if (threadIdx.x == 0) total[0] = 0;
  __syncthreads();
  atomicAdd(total, in[threadIdx.x]);
  out[threadIdx.x] = total[0];
}
KERNEL(bytes_of_one_word, (1), (64), 0) {
  DFSSM_SHARED(char, row, 64);
  row[threadIdx.x] = static_cast<char>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
KERNEL(warp_exchange, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  for (int round = 0; round < 3; ++round) {
    row[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = row[threadIdx.x ^ 1];
    __syncwarp();
  }
}
KERNEL(warp_exchange_unsynced, (1), (32), 0) {
  DFSSM_SHARED(float, row, 32);
  row[threadIdx.x] = in[threadIdx.x];
  __shfl_xor_sync(kAllLanes, 0, 1);  // all lanes meet, but CUDA promises no order of memory
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}
KERNEL(warp_overwrites_unsynced, (1), (32), 0) {
  DFSSM_SHARED(float, row, 32);
  for (int round = 0; round < 2; ++round) {
    row[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = row[threadIdx.x ^ 1];
  }
}
KERNEL(half_warps_exchange, (1), (32), 0) {
  DFSSM_SHARED(float, row, 32);
  row[threadIdx.x] = in[threadIdx.x];
  __syncwarp(threadIdx.x < 16 ? 0xffff : 0xffff0000);
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}
KERNEL(half_warps_mixed, (1), (32), 0) {
  DFSSM_SHARED(float, row, 32);
  row[threadIdx.x] = in[threadIdx.x];
  __syncwarp(threadIdx.x < 16 ? 0xffff : 0xffff0000);
  if (threadIdx.x >= 16) out[threadIdx.x] = row[threadIdx.x - 16];
}
KERNEL(warp_overwrites_what_it_read, (1), (32), 0) {
  DFSSM_SHARED(float, row, 32);
  row[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  const float right = row[(threadIdx.x + 1) % 32];
  row[threadIdx.x] = right;
}
KERNEL(other_warp_synced_only_itself, (1), (64), 0) {
  DFSSM_SHARED(float, row, 64);
  row[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = row[threadIdx.x < 32 ? threadIdx.x : threadIdx.x - 32];
}

// Barriers.

KERNEL(left_before_barrier, (1), (64), 0) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}
KERNEL(left_at_barrier, (1), (64), 0) {
  if (threadIdx.x == 60) return;
  __syncthreads();
}
KERNEL(two_barriers, (1), (64), 0) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
KERNEL(block_leaves, (2), (64), 0) {  // a whole block: right
  if (blockIdx.x == 1) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
KERNEL(barrier_and_shuffle, (1), (32), 0) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __shfl_sync(kAllLanes, 0, 0);
  }
}

// Warps.

KERNEL(mask_without_caller, (1), (32), 0) { __shfl_sync(0x7fffffff, 0, 0); }
KERNEL(mask_with_lane_that_left, (1), (32), 0) {
  if (threadIdx.x < 3) return;
  __shfl_xor_sync(kAllLanes, 0, 1);
}
KERNEL(lane_leaves_shuffle, (1), (32), 0) {
  if (threadIdx.x > 3) return;
  __shfl_xor_sync(kAllLanes, 0, 1);
}
KERNEL(mask_beyond_block, (1), (16), 0) { __ballot_sync(kAllLanes, 1); }
KERNEL(shuffle_from_outside, (1), (16), 0) { __shfl_sync(0xffff, 0, 20); }
KERNEL(masks_differ, (1), (32), 0) { __shfl_sync(threadIdx.x < 16 ? kAllLanes : 0xffff0000, 0, 16); }
KERNEL(vote_beside_shuffle, (1), (32), 0) {
  if (threadIdx.x < 16) {
    __shfl_sync(kAllLanes, 0, 0);
  } else {
    __any_sync(kAllLanes, 0);
  }
}
KERNEL(some_lanes_only, (1), (32), 0) {
  if (threadIdx.x < 16) {
    __shfl_sync(0xffff, 0, 0);
    __syncwarp();
  } else {
    __ballot_sync(0xffff0000, 1);
    __syncwarp();
  }
}

// Asynchronous copies.

KERNEL(async_copy, (1), (32), 512) {
  DFSSM_DYNAMIC_SHARED(float, row);
  copy_async16(row + 4 * threadIdx.x, in + 4 * threadIdx.x);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = row[127 - threadIdx.x];
}
KERNEL(async_copy_not_waited_for, (1), (32), 1024) {
  DFSSM_DYNAMIC_SHARED(float, row);
  for (int stage = 0; stage < 2; ++stage) {
    copy_async16(row + 128 * stage + 4 * threadIdx.x, in + 4 * threadIdx.x);
    copy_async_commit();
  }
  copy_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x] + row[128 + threadIdx.x];
}

KERNEL(async_copy_forgotten, (1), (32), 512) {
  DFSSM_DYNAMIC_SHARED(float, row);
  copy_async16(row + 4 * threadIdx.x, in + 4 * threadIdx.x);
}

// Launches.

KERNEL(too_many_threads, (1), (1025), 0) {}
KERNEL(too_many_threads_deep, (1), (4, 4, 65), 0) {}
KERNEL(no_blocks, (0), (1), 0) {}
KERNEL(too_many_rows_of_blocks, (1, 65536), (1), 0) {}
KERNEL(much_shared_memory, (1), (1), 227 * 1024) {
  DFSSM_DYNAMIC_SHARED(char, row);
  row[227 * 1024 - 1] = 1;
}
KERNEL(too_much_shared_memory, (1), (1), 227 * 1024 + 1) {}
KERNEL(not_opted_in_itself, (1), (1), 0) {}
KERNEL(too_much_static_shared_memory, (1), (1), 0) {
  DFSSM_SHARED(char, row, 48 * 1024 + 1);
  row[0] = 1;
}

extern "C" int run_not_opted_in(const float*, float*) {
  return emulation::run(1, 1, 48 * 1024 + 1, reinterpret_cast<const void*>(not_opted_in_itself), nullptr,
                        nullptr, 0);
}
