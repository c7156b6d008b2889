// Compiled with -ffp-contract=off: each operation of fp32 is rounded by itself, as NumPy does.
#include "sample.h"

#include <sys/random.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "failure.h"

namespace dfssm::native {
namespace {

// Of a language model the tokens that matter are few against its vocabulary: so many are looked at first.
constexpr size_t kFew = 256;

// A whole number in proportion to the probability that the softmax gives a logit, which is finite or -inf; that of
// the largest, `most`, is 2^30. The same on every machine: sampling.py, `weights`.
int32_t weight(float logit, float most, float divisor) {
  constexpr float kExp2[] = {1.0f, 0.69314697f, 0.24022120f, 0.05550713f, 0.00967554f, 0.00132765f};
  constexpr float kToWhole = 1.5f * (1 << 23), kLog2E = 1.4426950408889634f;
  float x = logit - most;
  x /= divisor;
  x *= kLog2E;
  x = std::max(x, -64.0f);  // of which nothing is left
  const float power = x + kToWhole;
  x -= power - kToWhole;
  float found = x * kExp2[5];
  for (int i = 4; i > 0; --i) {
    found += kExp2[i];
    found *= x;
  }
  found += kExp2[0];
  uint32_t exponent, bits;
  std::memcpy(&exponent, &power, sizeof exponent);
  std::memcpy(&bits, &found, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&found, &bits, sizeof found);
  return static_cast<int32_t>(found * (1 << 30));
}

// The first 8 bytes that blake2b with a digest of 8 bytes gives, little-endian, for a text of at most 128 bytes: one
// block of RFC 7693. OpenSSL's blake2b has digests of 64 bytes only, which are others.
uint64_t blake2b_8(const std::string& text) {
  static constexpr uint64_t kIv[8] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B,
                                      0xA54FF53A5F1D36F1, 0x510E527FADE682D1, 0x9B05688C2B3E6C1F,
                                      0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179};
  static constexpr uint8_t kSigma[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                             {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                             {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                             {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                             {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                             {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                             {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                             {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                             {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                             {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
  static constexpr uint8_t kMix[8][4] = {{0, 4, 8, 12},  {1, 5, 9, 13},  {2, 6, 10, 14}, {3, 7, 11, 15},
                                         {0, 5, 10, 15}, {1, 6, 11, 12}, {2, 7, 8, 13},  {3, 4, 9, 14}};
  uint64_t m[16] = {}, v[16];
  std::memcpy(m, text.data(), text.size());
  std::copy_n(kIv, 8, v);
  std::copy_n(kIv, 8, v + 8);
  v[0] ^= 0x01010000 ^ 8;  // no key, 8 bytes of digest
  const uint64_t h0 = v[0];
  v[12] ^= text.size();
  v[14] = ~v[14];  // the last block
  const auto turned = [](uint64_t x, int by) { return x >> by | x << (64 - by); };
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round % 10];
    for (int i = 0; i < 8; ++i) {
      uint64_t &a = v[kMix[i][0]], &b = v[kMix[i][1]], &c = v[kMix[i][2]], &d = v[kMix[i][3]];
      a += b + m[s[2 * i]];
      d = turned(d ^ a, 32);
      c += d;
      b = turned(b ^ c, 24);
      a += b + m[s[2 * i + 1]];
      d = turned(d ^ a, 16);
      c += d;
      b = turned(b ^ c, 63);
    }
  }
  return h0 ^ v[0] ^ v[8];
}

// What a draw goes by, a whole number below 2^53.
uint64_t random_bits(const dfssm_sampling& sampling, int64_t position) {
  uint64_t bits = 0;
  if (sampling.seeded) {
    bits = blake2b_8(std::to_string(sampling.seed) + " " + std::to_string(position));
  } else {
    require(getrandom(&bits, sizeof bits, 0) == sizeof bits, DFSSM_SYSTEM,
            "the system has no random numbers: give a seed");
  }
  return bits >> 11;
}

// sampling.py, `draw`: the index of one of the weights of the largest logits, in falling order, or -1 where it takes
// others to tell. `total`: of all weights; 0 where these are all.
int64_t draw(const std::vector<int32_t>& weights, uint64_t bits, int64_t total, double top_p, double min_p) {
  std::vector<int64_t> sums;
  for (const int32_t weight : weights) sums.push_back(weight + (sums.empty() ? 0 : sums.back()));
  const size_t count = sums.size();
  if (!total) total = sums.back();
  size_t kept = count + (sums.back() < total);
  if (top_p < 1) {
    const double bound = top_p * static_cast<double>(total);
    kept = std::lower_bound(sums.begin(), sums.end(), bound,
                            [](int64_t sum, double p) { return static_cast<double>(sum) < p; }) -
           sums.begin() + 1;
  }
  if (min_p > 0) {
    const double bound = min_p * weights[0];
    const size_t likely =
        std::partition_point(weights.begin(), weights.end(), [&](int32_t w) { return w >= bound; }) -
        weights.begin();
    if (likely < count) kept = std::min(kept, likely);
  }
  if (kept <= count) {
    total = sums[kept - 1];
  } else if (top_p < 1 || min_p > 0) {
    return -1;
  }
  __extension__ using Wide = unsigned __int128;
  const auto at = static_cast<int64_t>(static_cast<Wide>(bits) * static_cast<uint64_t>(total) >> 53);
  const size_t index = std::upper_bound(sums.begin(), sums.end(), at) - sums.begin();
  return index < count ? static_cast<int64_t>(index) : -1;
}

void require_settings(const dfssm_sampling& s) {
  const auto check = [](bool good, const char* name, double value, const char* bounds) {
    require(good, DFSSM_INVALID_ARGUMENT,
            std::string(name) + " is " + std::to_string(value) + ": give a number " + bounds);
  };
  check(s.temperature >= 0 && s.temperature <= 1e6, "temperature", s.temperature, "from 0 to 1,000,000");
  check(s.top_k >= 0, "top_k", static_cast<double>(s.top_k), ">= 0");
  check(s.top_p == 0 || (s.top_p >= 1e-9 && s.top_p <= 1), "top_p", s.top_p, "from 1e-9 to 1, or 0 for all");
  check(s.min_p >= 0 && s.min_p <= 1, "min_p", s.min_p, "from 0 to 1");
}

}  // namespace

int64_t sample(const float* logits, size_t size, int64_t position, const dfssm_sampling& sampling) {
  require_settings(sampling);
  require(size > 0, DFSSM_INVALID_ARGUMENT, "there are no logits to choose from");
  const float* largest = std::max_element(logits, logits + size);
  require(
      std::isfinite(*largest) && std::none_of(logits, logits + size, [](float x) { return std::isnan(x); }),
      DFSSM_NOT_FINITE, "the logits are not finite");
  const float most = *largest;
  if (sampling.temperature == 0 || sampling.top_k == 1) return largest - logits;
  const auto divisor = static_cast<float>(std::max(sampling.temperature, 1e-20));
  const bool all = sampling.top_k == 0;
  size_t count = all ? kFew : static_cast<size_t>(sampling.top_k);
  int64_t total = 0;
  if (all) {
    for (size_t i = 0; i < size; ++i) total += weight(logits[i], most, divisor);
  }
  const uint64_t bits = random_bits(sampling, position);
  const double top_p = sampling.top_p == 0 ? 1 : sampling.top_p;
  std::vector<int32_t> tokens(size), weights;
  std::iota(tokens.begin(), tokens.end(), 0);
  for (;; count *= 8) {
    count = std::min(count, size);
    const auto before = [&](int32_t a, int32_t b) {
      return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
    };
    if (count < size) std::nth_element(tokens.begin(), tokens.begin() + count, tokens.end(), before);
    std::sort(tokens.begin(), tokens.begin() + count, before);
    weights.clear();
    for (size_t i = 0; i < count; ++i) weights.push_back(weight(logits[tokens[i]], most, divisor));
    const int64_t at = draw(weights, bits, total, top_p, sampling.min_p);
    if (at >= 0) return tokens[at];
    require(count < size, DFSSM_INTERNAL, "no token was chosen");
  }
}

}  // namespace dfssm::native
