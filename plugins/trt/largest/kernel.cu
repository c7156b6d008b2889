// What the next token is chosen from (runtime/sampling.py): the largest logits of each row and their tokens, and the
// weight of all.
#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"

namespace dfssm::trt {
namespace of_largest {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;

// Orders a row's logits as the result is: falling, equal ones by token, NaN before all. No two tokens share a key, so a
// bound on keys parts the `count` largest from the rest exactly, in whatever order threads come.
using Key = unsigned long long;
__device__ __forceinline__ Key key_of(float logit, int token) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(magnitude(logit) > kInfinityBits ? 0xffffffffu : order) << 32 |
         static_cast<uint32_t>(~token);
}
__device__ __forceinline__ int token_of(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// Over the block, in every thread; `scratch` has a place for each warp.
template <class T, class Combine>
__device__ T over_block(T value, T (&scratch)[kWarps], Combine&& combine) {
  for (int lanes = kWarpSize / 2; lanes; lanes /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  __syncthreads();  // the last call's are read
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

__device__ __forceinline__ Key largest_key(const float* logits, int vocab, Key (&scratch)[kWarps]) {
  Key most = 0;
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const Key key = key_of(logits[i], i);
    most = key > most ? key : most;
  }
  return over_block(most, scratch, [](Key a, Key b) { return a > b ? a : b; });
}

// The largest key; of `count` > 1 then the `count`-th, bit by bit from the highest that can differ: as many keys are no
// smaller than the bound. It ends early where the bits so far part exactly that many.
__global__ void __launch_bounds__(kThreads) largest(LargestArgs args) {
  DFSSM_SHARED(Key, keys, kWarps);
  DFSSM_SHARED(int, counts, kWarps);
  DFSSM_SHARED(Key, found, kMostLargest);
  DFSSM_SHARED(int, filled, 1);
  const float* const logits = args.logits + static_cast<size_t>(blockIdx.x) * args.vocab;
  const auto write = [&](int rank, Key key) {
    const size_t at = static_cast<size_t>(blockIdx.x) * args.count + rank;
    args.tokens[at] = token_of(key);
    args.values[at] = logits[token_of(key)];
  };

  wait_for_launch_before();
  const Key most = largest_key(logits, args.vocab, keys);
  if (args.count == 1) {
    if (threadIdx.x == 0) write(0, most);
    return;
  }

  Key bound = 0;
  for (int bit = 63; bit >= 0; --bit) {
    const Key next = bound | Key{1} << bit;
    if (next > most) continue;
    int reached = 0;
    for (int i = threadIdx.x; i < args.vocab; i += kThreads) reached += key_of(logits[i], i) >= next;
    reached = over_block(reached, counts, [](int a, int b) { return a + b; });
    if (reached >= args.count) bound = next;
    if (reached == args.count) break;
  }

  if (threadIdx.x == 0) filled[0] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < args.vocab; i += kThreads) {
    const Key key = key_of(logits[i], i);
    if (key >= bound) found[atomicAdd(filled, 1)] = key;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < args.count) {
    const Key mine = found[threadIdx.x];
    int rank = 0;
    for (int i = 0; i < args.count; ++i) rank += found[i] > mine;
    write(rank, mine);
  }
}

// 2^30 exp((logit - largest) / divisor) as a whole number, in the operations of `weights` in runtime/sampling.py, each
// rounded as there.
__device__ __forceinline__ int weight_of(float logit, float largest, float divisor) {
  constexpr float kLog2E = 1.44269504f, kToWhole = 12582912.0f;
  constexpr float kExp2[] = {0.69314697f, 0.24022120f, 0.05550713f, 0.00967554f, 0.00132765f};
  float x = __fmul_rn(__fdiv_rn(__fadd_rn(logit, -largest), divisor), kLog2E);
  x = fmaxf(x, -64.0f);
  const float power = __fadd_rn(x, kToWhole);
  x = __fadd_rn(x, -__fadd_rn(power, -kToWhole));
  float found = __fmul_rn(x, kExp2[4]);
#pragma unroll
  for (int i = 3; i >= 0; --i) found = __fmul_rn(__fadd_rn(found, kExp2[i]), x);
  found = __fadd_rn(found, 1.0f);
  found = __uint_as_float(__float_as_uint(found) + (__float_as_uint(power) << 23));
  return static_cast<int>(__fmul_rn(found, 1073741824.0f));
}

__global__ void __launch_bounds__(kThreads) total_weight(TotalWeightArgs args) {
  DFSSM_SHARED(Key, scratch, kWarps);
  const float* const logits = args.logits + static_cast<size_t>(blockIdx.x) * args.vocab;
  wait_for_launch_before();
  const float most = logits[token_of(largest_key(logits, args.vocab, scratch))];
  Key sum = 0;
  if (magnitude(most) < kInfinityBits) {
    const float divisor = args.divisors[blockIdx.x];
    for (int i = threadIdx.x; i < args.vocab; i += kThreads) sum += weight_of(logits[i], most, divisor);
  }
  sum = over_block(sum, scratch, [](Key a, Key b) { return a + b; });
  if (threadIdx.x == 0) args.totals[blockIdx.x] = static_cast<int64_t>(sum);
}

}  // namespace of_largest

cudaError_t largest(const LargestArgs& args, cudaStream_t stream) {
  if (args.count < 1 || args.count > kMostLargest || args.count > args.vocab) return cudaErrorInvalidValue;
  static_assert(kMostLargest <= of_largest::kThreads, "one thread for each of them");
  return launch(of_largest::largest, dim3(args.rows), dim3(of_largest::kThreads), 0, stream, args);
}

cudaError_t total_weight(const TotalWeightArgs& args, cudaStream_t stream) {
  return launch(of_largest::total_weight, dim3(args.rows), dim3(of_largest::kThreads), 0, stream, args);
}

}  // namespace dfssm::trt
