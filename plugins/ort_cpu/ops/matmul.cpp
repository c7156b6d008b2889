// BinaryScaffoldMatMul and Int8MatMul.
#include <algorithm>

#include "op.h"
#include "tokens.h"

namespace dfssm::ort {
namespace {

// A multiply-add of int8, one core of AVX-512 VNNI; see Call::parallel for what the estimates are for.
constexpr double kInt8Ns = 0.006;

struct BinaryScaffoldMatMul : KernelOf<opset::BinaryScaffoldMatMul> {
  using KernelOf::KernelOf;

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, K = s.K, M = s.M, R = s.R;
    const int64_t n = B * T, planes = attributes.planes, layout = attributes.layout;
    float* y = call.output<float>(0, {B, T, M});

    const KernelTable& kernel = kernels();
    const size_t packed_bytes = layout == opset::kRow16 ? kernel.scaffold_pack_bytes(n, K) : 0;
    const size_t packed_room = (packed_bytes + 63) / 64 * 64;
    const Tokens tokens =
        quantize_tokens(call, call[Schema::k_x], packed_room + static_cast<size_t>(n * R) * sizeof(float));
    float* h = reinterpret_cast<float*>(tokens.extra + packed_room);
    Prologue low_rank((n + kTokens - 1) / kTokens * ((R + kRanks - 1) / kRanks));
    if (packed_bytes) kernel.scaffold_pack(tokens.q, n, K, tokens.extra);

    ScaffoldArgs args{};
    args.q = tokens.q;
    args.packed = packed_bytes ? tokens.extra : nullptr;
    args.s = tokens.s;
    args.sum = tokens.sum;
    args.bits = call[Schema::k_bits].as<uint8_t>();
    args.scale = call[Schema::k_scale].as<float>();
    args.up = call[Schema::k_up].as<int8_t>();
    args.up_scale = call[Schema::k_up_scale].as<float>();
    args.h = h;
    args.y = y;
    args.ldy = M;
    args.n = n, args.K = K, args.M = M, args.R = R;
    args.planes = static_cast<int>(planes);
    args.layout = static_cast<int>(layout);
    constexpr int64_t kRows = 32;  // two tiles of layout 1 share each broadcast of activations
    const double bytes = static_cast<double>(kRows * (planes * K / 8 + R));
    const double unit_ns = matmul_ns(bytes, n, layout == opset::kRow16 ? 0.03 : 0.5);
    call.parallel((M + kRows - 1) / kRows, unit_ns, [&](int64_t begin, int64_t end) {
      low_rank.complete([&](int64_t i) { low_rank_piece(call, tokens, R, h, i); });
      kernel.scaffold_matmul(args, begin * kRows, std::min(end * kRows, M));
    });
  }

  // Piece i of h = (down_scale * s) * (down . q): kRanks rows of `down`, kTokens tokens.
  static constexpr int64_t kRanks = 4, kTokens = 64;
  static void low_rank_piece(const Call& call, const Tokens& tokens, int64_t R, float* h, int64_t i) {
    const int64_t pieces = (R + kRanks - 1) / kRanks, r = i % pieces * kRanks, t = i / pieces * kTokens;
    Int8Args args{};
    args.q = tokens.q + t * tokens.K;
    args.s = tokens.s + t;
    args.sum = tokens.sum + t;
    args.w = call[Schema::k_down].as<int8_t>();
    args.w_scale = call[Schema::k_down_scale].as<float>();
    args.y = h + t * R;
    args.ldy = R;
    args.n = std::min(kTokens, tokens.n - t), args.K = tokens.K, args.M = R;
    kernels().int8_matmul(args, r, std::min(r + kRanks, R));
  }
};

struct Int8MatMul : KernelOf<opset::Int8MatMul> {
  using KernelOf::KernelOf;

  void compute(Call& call) const {
    const Schema::Sizes s = call.bind<Schema>(attributes);
    const int64_t B = s.B, T = s.T, K = s.K, M = s.M;
    const int64_t n = B * T;
    float* y = call.output<float>(0, {B, T, M});

    const Tokens tokens = quantize_tokens(call, call[Schema::k_x], 0);
    Int8Args args{};
    args.q = tokens.q;
    args.s = tokens.s;
    args.sum = tokens.sum;
    args.w = call[Schema::k_w].as<int8_t>();
    args.w_scale = call[Schema::k_w_scale].as<float>();
    args.y = y;
    args.ldy = M;
    args.n = n, args.K = K, args.M = M;
    constexpr int64_t kRows = 16;
    const double unit_ns = matmul_ns(static_cast<double>(kRows * K), n, kInt8Ns);
    call.parallel((M + kRows - 1) / kRows, unit_ns, [&](int64_t begin, int64_t end) {
      kernels().int8_matmul(args, begin * kRows, std::min(end * kRows, M));
    });
  }
};

}  // namespace

template <>
const OrtCustomOp* op<opset::BinaryScaffoldMatMul>() {
  return custom_op<BinaryScaffoldMatMul>();
}
template <>
const OrtCustomOp* op<opset::Int8MatMul>() {
  return custom_op<Int8MatMul>();
}

}  // namespace dfssm::ort
