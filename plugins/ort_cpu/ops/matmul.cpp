// BinaryScaffoldMatMul and Int8MatMul.
#include <algorithm>
#include <new>

#include "call.h"

namespace dfssm {
namespace {

// Activations quantised to int8. All in thread_scratch of the calling thread, valid until it is asked for again.
struct Tokens {
  int64_t n, K;
  const int8_t* q;     // [n, K]
  const float* s;      // [n]
  const int32_t* sum;  // [n]
  std::byte* extra;    // 64-byte aligned, as many bytes as asked for
};

// x f32 [B, T, K], n = B*T.
Tokens quantize_tokens(Call& call, const Tensor& x, size_t extra_bytes) {
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
double matmul_ns(double bytes, int64_t n, double ns_per_byte_token) {
  return std::max(bytes / 30, bytes * static_cast<double>(n) * ns_per_byte_token);
}

// A multiply-add of int8, one core of AVX-512 VNNI; see Call::parallel for what the estimates are for.
constexpr double kInt8Ns = 0.006;

Int8Args int8_args(const Tokens& tokens, const Tensor& w, const Tensor& w_scale, int64_t M, float* y) {
  return {tokens.q, tokens.s, tokens.sum, w.as<int8_t>(), w_scale.as<float>(), y, M, tokens.n, tokens.K, M};
}

// Tokens go through a scaffold in tiles: what is packed of one stays in L2 while all rows pass by. A multiple of the tokens
// that kernels take at once, 16 and 12.
constexpr int64_t kTile = 48;
// So many tiles are packed at once, of 4,096 columns 12.6 MB for look-ups: what is packed does not grow with the batch.
constexpr int64_t kTilesAtOnce = 8;
// Rows of `down` that are one piece of work.
constexpr int64_t kRanks = 4;

// The same product of the tokens [t0, t1).
template <class Args>
Args of_tokens(Args args, int64_t t0, int64_t t1) {
  args.q += t0 * args.K;
  args.s += t0;
  args.sum += t0;
  args.y += t0 * args.ldy;
  args.n = t1 - t0;
  return args;
}

}  // namespace

template <>
void run<opset::BinaryScaffoldMatMul>(Call& call, const opset::BinaryScaffoldMatMul::Attributes& a,
                                      const opset::BinaryScaffoldMatMul::Sizes& s) {
  using S = opset::BinaryScaffoldMatMul;
  const int64_t n = s.B * s.T, K = s.K, M = s.M, R = s.R;
  float* y = call.output<float>(0, {s.B, s.T, M});

  const KernelTable& kernels = call.kernels;
  const int layout = static_cast<int>(a.layout);
  const int64_t tiles = (n + kTile - 1) / kTile;
  const auto first_of = [=](int64_t tile) { return n * tile / tiles; };
  const size_t packed_bytes = kernels.scaffold_pack_bytes(layout, (n + tiles - 1) / tiles, K);
  const size_t tile_room = (packed_bytes + 63) / 64 * 64,
               packed_room = tile_room * static_cast<size_t>(std::min(tiles, kTilesAtOnce));
  const Tokens tokens =
      quantize_tokens(call, call[S::k_x], packed_room + static_cast<size_t>(n * R) * sizeof(float));
  float* h = reinterpret_cast<float*>(tokens.extra + packed_room);
  const Int8Args down = int8_args(tokens, call[S::k_down], call[S::k_down_scale], R, h);

  ScaffoldArgs args{};
  args.q = tokens.q;
  args.s = tokens.s;
  args.sum = tokens.sum;
  args.bits = call[S::k_bits].as<uint8_t>();
  args.scale = call[S::k_scale].as<float>();
  args.up = call[S::k_up].as<int8_t>();
  args.up_scale = call[S::k_up_scale].as<float>();
  args.h = h;
  args.y = y;
  args.ldy = M;
  args.n = n, args.K = K, args.M = M, args.R = R;
  args.planes = static_cast<int>(a.planes);
  args.layout = layout;
  // Two tiles of layout 1 share each broadcast of activations, three each table of several tokens. Where there are several
  // tiles of tokens, one goes through many rows before the next.
  const int64_t block = layout == opset::kRow64 ? opset::kTileRows[opset::kRow64] : n > 2 ? 96 : 32;
  const int64_t rows = tiles > 1 ? 1024 : block;
  const int64_t parts = (M + rows - 1) / rows;
  const double bytes = static_cast<double>(std::min(rows, M) * (a.planes * K / 8 + R));
  const double unit_ns = matmul_ns(bytes, n / tiles, layout == opset::kCanonical ? 0.5 : 0.03);
  for (int64_t first = 0; first < tiles; first += kTilesAtOnce) {
    const int64_t count = std::min(tiles - first, kTilesAtOnce);
    // Of each tile: h = (down_scale * s) * (down . q), some ranks a piece, and what the kernels want packed.
    Prologue prologue(count * (1 + (R + kRanks - 1) / kRanks));
    const auto prepare = [&](int64_t piece) {
      const int64_t tile = piece % count, r = (piece / count - 1) * kRanks;
      const int64_t t0 = first_of(first + tile), t1 = first_of(first + tile + 1);
      if (r >= 0) {
        kernels.int8_matmul(of_tokens(down, t0, t1), r, std::min(r + kRanks, R));
      } else if (packed_bytes) {
        kernels.scaffold_pack(layout, tokens.q + t0 * K, t1 - t0, K, tokens.extra + tile * tile_room);
      }
    };
    call.parallel(count * parts, unit_ns, [&, first, rows, parts](int64_t begin, int64_t end) {
      prologue.complete(prepare);
      for (int64_t tile, stop; begin < end; begin = stop) {
        tile = begin / parts;
        stop = std::min(end, (tile + 1) * parts);
        const int64_t t0 = first_of(first + tile), t1 = first_of(first + tile + 1);
        ScaffoldArgs of_tile = of_tokens(args, t0, t1);
        of_tile.packed = packed_bytes ? tokens.extra + tile * tile_room : nullptr;
        of_tile.h += t0 * R;
        kernels.scaffold_matmul(of_tile, (begin - tile * parts) * rows,
                                std::min((stop - tile * parts) * rows, M));
      }
    });
  }
}

template <>
void run<opset::Int8MatMul>(Call& call, const opset::Int8MatMul::Attributes&,
                            const opset::Int8MatMul::Sizes& s) {
  using S = opset::Int8MatMul;
  const int64_t n = s.B * s.T, M = s.M;
  float* y = call.output<float>(0, {s.B, s.T, M});
  const Tokens tokens = quantize_tokens(call, call[S::k_x], 0);
  const Int8Args args = int8_args(tokens, call[S::k_w], call[S::k_w_scale], M, y);
  constexpr int64_t kRows = 16;
  const double unit_ns = matmul_ns(static_cast<double>(kRows * s.K), n, kInt8Ns);
  call.parallel((M + kRows - 1) / kRows, unit_ns, [&](int64_t begin, int64_t end) {
    call.kernels.int8_matmul(args, begin * kRows, std::min(end * kRows, M));
  });
}

}  // namespace dfssm
