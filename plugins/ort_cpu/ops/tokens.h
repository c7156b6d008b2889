// Activations of the two matrix products: tokens quantised to int8.
#pragma once

#include <new>

#include "call.h"

namespace dfssm {

// All in thread_scratch of the calling thread, valid until it is asked for again.
struct Tokens {
  int64_t n, K;
  const int8_t* q;     // [n, K]
  const float* s;      // [n]
  const int32_t* sum;  // [n]
  std::byte* extra;    // 64-byte aligned, as many bytes as asked for
};

// x f32 [B, T, K], n = B*T.
inline Tokens quantize_tokens(Call& call, const Tensor& x, size_t extra_bytes) {
  const int64_t n = x[0] * x[1], K = x[2];
  const auto aligned = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
  const size_t q_bytes = aligned(static_cast<size_t>(n * K)),
               s_bytes = aligned(static_cast<size_t>(n) * sizeof(float));
  auto* memory = static_cast<std::byte*>(thread_scratch(q_bytes + 2 * s_bytes + extra_bytes));
  if (!memory) throw std::bad_alloc();
  auto* q = reinterpret_cast<int8_t*>(memory);
  auto* s = reinterpret_cast<float*>(memory + q_bytes);
  auto* sum = reinterpret_cast<int32_t*>(memory + q_bytes + s_bytes);
  const float* values = x.as<float>();
  call.parallel(n, 0.15 * static_cast<double>(K), [=, &call](int64_t t0, int64_t t1) {
    call.kernels.quantize_activations(values + t0 * K, t1 - t0, K, q + t0 * K, s + t0, sum + t0);
  });
  return {n, K, q, s, sum, memory + q_bytes + 2 * s_bytes};
}

// Nanoseconds one core takes for `bytes` of weights against n tokens: a stream from memory (about 30 GB/s)
// for few tokens, multiply-adds (`ns_per_byte_token`) for many.
inline double matmul_ns(double bytes, int64_t n, double ns_per_byte_token) {
  const double stream = bytes / 30, compute = bytes * static_cast<double>(n) * ns_per_byte_token;
  return stream > compute ? stream : compute;
}

}  // namespace dfssm
