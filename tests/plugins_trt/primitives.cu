// One kernel a device function, for test_emulation.py to compare with what CUDA's documents say.
#include "common/device.h"
#include "common/launch.h"

using namespace dfssm::trt;

namespace {

// out [32][8]: what each lane gets from each kind of shuffle and vote.
__global__ void lanes(const int* in, int* out, int operand, int width) {
  const int lane = threadIdx.x, value = in[lane];
  int* const row = out + 8 * lane;
  row[0] = __shfl_sync(kAllLanes, value, operand, width);
  row[1] = __shfl_up_sync(kAllLanes, value, operand, width);
  row[2] = __shfl_down_sync(kAllLanes, value, operand, width);
  row[3] = __shfl_xor_sync(kAllLanes, value, operand, width);
  row[4] = static_cast<int>(__ballot_sync(kAllLanes, value > 0));
  row[5] = __any_sync(kAllLanes, value > operand) + 2 * __all_sync(kAllLanes, value > -operand);
  row[6] = warp_sum(value);
  row[7] = static_cast<int>(warp_max(static_cast<float>(value)));
}

// out [threads][3]
__global__ void votes_of_block(const int* in, int* out) {
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[3 * t] = __syncthreads_count(in[t] > 0);
  out[3 * t + 1] = __syncthreads_and(in[t] > -100) != 0;
  out[3 * t + 2] = __syncthreads_or(in[t] > 1000) != 0;
}

// out [blocks][threads][6]: where a thread is.
__global__ void positions(int* out) {
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int* const row = out + 6 * (b * blockDim.x * blockDim.y * blockDim.z + t);
  row[0] = threadIdx.x, row[1] = threadIdx.y, row[2] = threadIdx.z;
  row[3] = blockIdx.x, row[4] = blockIdx.y, row[5] = blockIdx.z;
}

// d [16][8] += a [16][32] b [8][32] (columns of B), loaded as the table of the PTX ISA says.
__global__ void mma(const int8_t* a, const int8_t* b, int* d) {
  const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
  uint32_t left[4] = {}, right[2] = {};
  for (int i = 0; i < 16; ++i) {
    const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
    const int column = member * 4 + (i & 3) + (i < 8 ? 0 : 16);
    left[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(a[32 * row + column])) << 8 * (i % 4);
  }
  for (int i = 0; i < 8; ++i) {
    const int row = member * 4 + (i & 3) + (i < 4 ? 0 : 16);
    right[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(b[32 * group + row])) << 8 * (i % 4);
  }
  int sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)];
  mma_s8_16x8x32(sums, left, right);
  for (int i = 0; i < 4; ++i) d[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)] = sums[i];
}

// d [16][8] += a [16][16] b [8][16] (columns of B), loaded as the table of the PTX ISA says.
__global__ void mma_half(const __half* a, const __half* b, float* d) {
  const int group = threadIdx.x >> 2, member = threadIdx.x & 3;
  uint32_t left[4] = {}, right[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
    left[i / 2] |= static_cast<uint32_t>(__half_as_ushort(a[16 * row + column])) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = member * 2 + (i & 1) + (i < 2 ? 0 : 8);
    right[i / 2] |= static_cast<uint32_t>(__half_as_ushort(b[16 * group + row])) << 16 * (i % 2);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)];
  mma_f16_16x8x16(sums, left, right);
  for (int i = 0; i < 4; ++i) d[8 * (i < 2 ? group : group + 8) + member * 2 + (i & 1)] = sums[i];
}

// out [2][4][32][2] of matrices [4][8][8]: what each lane has of each, as they lie and transposed. `offset`: bytes by
// which rows miss a multiple of 16.
__global__ void matrices(const uint16_t* in, uint16_t* out, int offset) {
  DFSSM_SHARED(uint16_t, rows, 4 * 8 * 8 + 8);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[8 * lane + i] = in[8 * lane + i];
  __syncthreads();
  uint32_t got[2][4];
  load_matrices<false>(got[0], rows + 8 * lane + offset / 2);
  load_matrices<true>(got[1], rows + 8 * lane + offset / 2);
  for (int i = 0; i < 16; ++i) {
    out[(i / 2 * 32 + lane) * 2 + i % 2] = static_cast<uint16_t>(got[i / 8][i / 2 % 4] >> i % 2 * 16);
  }
}

// out [n][10]
__global__ void words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint32_t* const row = out + 10 * i;
  row[0] = __dp4a(static_cast<int>(a[i]), static_cast<int>(b[i]), static_cast<int>(c[i]));
  row[1] = __dp4a(a[i], b[i], c[i]);
  row[2] = __byte_perm(a[i], b[i], c[i]);
  row[3] = __popc(a[i]);
  row[4] = __clz(static_cast<int>(a[i]));
  row[5] = __brev(a[i]);
  row[6] = __funnelshift_l(a[i], b[i], c[i]);
  row[7] = __funnelshift_r(a[i], b[i], c[i]);
  row[8] = __vadd4(a[i], b[i]);
  row[9] = __vsub4(a[i], b[i]);
}

// out [n][2]: fp32 to whole number, to fp16
__global__ void roundings(const float* in, uint32_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[2 * i] = __float2int_rn(in[i]);
  out[2 * i + 1] = __half_as_ushort(__float2half_rn(in[i]));
}

__global__ void widenings(const uint16_t* in, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __half2float(__ushort_as_half(in[i]));
}

__global__ void copy_pair(float* out) { out[2 + threadIdx.x] = out[threadIdx.x]; }

constexpr int kThreads = 256;
int blocks(int n) { return (n + kThreads - 1) / kThreads; }

}  // namespace

extern "C" {
int run_lanes(const int* in, int* out, int operand, int width) {
  return launch(lanes, 1, 32, 0, nullptr, in, out, operand, width);
}
int run_votes_of_block(const int* in, int* out) {
  return launch(votes_of_block, 1, dim3(4, 5, 3), 0, nullptr, in, out);
}
int run_positions(int* out) { return launch(positions, dim3(2, 3, 2), dim3(3, 2, 2), 0, nullptr, out); }
int run_mma_half(const __half* a, const __half* b, float* d) {
  return launch(mma_half, 1, 32, 0, nullptr, a, b, d);
}
int run_matrices(const uint16_t* in, uint16_t* out, int offset) {
  return launch(matrices, 1, 32, 0, nullptr, in, out, offset);
}
int run_mma(const int8_t* a, const int8_t* b, int* d) { return launch(mma, 1, 32, 0, nullptr, a, b, d); }
int run_words(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int n) {
  return launch(words, blocks(n), kThreads, 0, nullptr, a, b, c, out, n);
}
int run_roundings(const float* in, uint32_t* out, int n) {
  return launch(roundings, blocks(n), kThreads, 0, nullptr, in, out, n);
}
// Host calls as a plugin makes them, then a kernel that reads what they wrote.
int run_fill_and_copy(const float* in, float* out) {
  if (cudaMemsetAsync(out, 0, 4, nullptr) != cudaSuccess) return cudaErrorInvalidValue;
  if (cudaMemcpyAsync(out + 1, in + 1, 4, cudaMemcpyDeviceToDevice, nullptr) != cudaSuccess)
    return cudaErrorInvalidValue;
  return launch(copy_pair, 1, 2, 0, nullptr, out);
}
int run_widenings(const uint16_t* in, float* out, int n) {
  return launch(widenings, blocks(n), kThreads, 0, nullptr, in, out, n);
}
}
