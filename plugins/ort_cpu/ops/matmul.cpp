// BinaryScaffoldMatMul and Int8MatMul.
#include <algorithm>

#include "op.h"
#include "ops.h"
#include "tokens.h"

namespace dfssm::ort {
namespace {

// A multiply-add of int8, one core of AVX-512 VNNI; see Call::parallel for what the estimates are for.
constexpr double kInt8Ns = 0.006;

// y's shape: the leading two dimensions of x, then rows.
void infer_matmul(Inference& inference, const Inference::Dim& rows) {
  Inference::Shape y = inference.shape(0, 3);
  if (y.empty()) return;
  y[2] = rows;
  inference.set(0, y);
}

struct BinaryScaffoldMatMul : Kernel {
  using Schema = opset::BinaryScaffoldMatMul;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kU8, kF32, kI8, kF32, kI8, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32};

  explicit BinaryScaffoldMatMul(const OrtKernelInfo* info)
      : Kernel(kSignature<Schema>, info),
        planes(positive("planes", Schema::kDefault_planes)),
        layout(attribute("layout", Schema::kDefault_layout)) {
    if (layout != 0 && layout != 1) {
      fail("%s: attribute 'layout' is %lld, expected 0 or 1", Schema::kName, static_cast<long long>(layout));
    }
  }

  void compute(Call& call) const {
    const Tensor& x = call.ranked(Schema::k_x, 3);
    const int64_t B = x[0], T = x[1], K = x[2], n = B * T;
    if (K % 32) {
      fail("%s: input 'x' has K=%lld, expected a multiple of 32", Schema::kName, static_cast<long long>(K));
    }
    const Tensor& scale = call.ranked(Schema::k_scale, planes > 1 ? 2 : 1);
    const int64_t M = scale[scale.rank - 1], rows = layout == 0 ? M : (M + 15) / 16 * 16;
    const int64_t R = call[Schema::k_down].rank == 2 ? call[Schema::k_down][0] : 0;
    if (planes > 1) {
      call.expect(Schema::k_bits, {planes, rows, K / 8});
      call.expect(Schema::k_scale, {planes, M});
    } else {
      call.expect(Schema::k_bits, {rows, K / 8});
    }
    call.expect(Schema::k_down, {R, K});
    call.expect(Schema::k_down_scale, {R});
    call.expect(Schema::k_up, {rows, R});
    call.expect(Schema::k_up_scale, {M});
    float* y = call.output<float>(0, {B, T, M});

    const KernelTable& kernel = kernels();
    const size_t packed_bytes = layout == 1 ? kernel.scaffold_pack_bytes(n, K) : 0;
    const size_t packed_room = (packed_bytes + 63) / 64 * 64;
    const Tokens tokens =
        quantize_tokens(call, Schema::kName, x, packed_room + static_cast<size_t>(n * R) * sizeof(float));
    float* h = reinterpret_cast<float*>(tokens.extra + packed_room);
    Prologue low_rank((n + kTokens - 1) / kTokens * ((R + kRanks - 1) / kRanks));
    if (packed_bytes) kernel.scaffold_pack(tokens.q, n, K, tokens.extra);

    ScaffoldArgs args{};
    args.q = tokens.q;
    args.packed = packed_bytes ? tokens.extra : nullptr;
    args.s = tokens.s;
    args.sum = tokens.sum;
    args.bits = call[Schema::k_bits].as<uint8_t>();
    args.scale = scale.as<float>();
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
    const double unit_ns = matmul_ns(bytes, n, layout == 1 ? 0.03 : 0.5);
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

  static void infer(Inference& inference) {
    // planes is not known here and not needed: the rows are the last dimension of scale, of rank 1 or 2.
    Inference::Shape scale = inference.shape(Schema::k_scale, 1);
    if (scale.empty()) scale = inference.shape(Schema::k_scale, 2);
    if (!scale.empty()) infer_matmul(inference, scale.back());
  }

  int64_t planes, layout;
};

struct Int8MatMul : Kernel {
  using Schema = opset::Int8MatMul;
  static constexpr ONNXTensorElementDataType kInputTypes[] = {kF32, kI8, kF32};
  static constexpr ONNXTensorElementDataType kOutputTypes[] = {kF32};

  explicit Int8MatMul(const OrtKernelInfo* info) : Kernel(kSignature<Schema>, info) {}

  void compute(Call& call) const {
    const Tensor& x = call.ranked(Schema::k_x, 3);
    const int64_t B = x[0], T = x[1], K = x[2], n = B * T;
    const Tensor& w_scale = call.ranked(Schema::k_w_scale, 1);
    const int64_t M = w_scale[0];
    const Tensor& w = call.expect(Schema::k_w, {M, K});
    float* y = call.output<float>(0, {B, T, M});

    const Tokens tokens = quantize_tokens(call, Schema::kName, x, 0);
    Int8Args args{};
    args.q = tokens.q;
    args.s = tokens.s;
    args.sum = tokens.sum;
    args.w = w.as<int8_t>();
    args.w_scale = w_scale.as<float>();
    args.y = y;
    args.ldy = M;
    args.n = n, args.K = K, args.M = M;
    constexpr int64_t kRows = 16;
    const double unit_ns = matmul_ns(static_cast<double>(kRows * K), n, kInt8Ns);
    call.parallel((M + kRows - 1) / kRows, unit_ns, [&](int64_t begin, int64_t end) {
      kernels().int8_matmul(args, begin * kRows, std::min(end * kRows, M));
    });
  }

  static void infer(Inference& inference) {
    const Inference::Shape w_scale = inference.shape(Schema::k_w_scale, 1);
    if (!w_scale.empty()) infer_matmul(inference, w_scale[0]);
  }
};

}  // namespace

const OrtCustomOp* binary_scaffold_matmul() { return custom_op<BinaryScaffoldMatMul>(); }
const OrtCustomOp* int8_matmul() { return custom_op<Int8MatMul>(); }

}  // namespace dfssm::ort
