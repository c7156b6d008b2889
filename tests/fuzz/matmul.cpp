// BinaryScaffoldMatMul and Int8MatMul with the quantisation before them, in ranges, on every table, against the scalar one.
#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

namespace {

struct Quantised {
  Array<int8_t> q;
  Array<float> s;
  Array<int32_t> sum;

  Quantised(int64_t n, int64_t K) : q(n * K, n % 4), s(n, 1), sum(n, 1) {}
};

// As the scalar table does it, with `table`, which must agree in every bit.
Quantised quantise(const KernelTable& table, const Array<float>& x, int64_t n, int64_t K) {
  Quantised found(n, K), expected(n, K);
  table.quantize_activations(x, n, K, found.q, found.s, found.sum);
  scalar::kTable.quantize_activations(x, n, K, expected.q, expected.s, expected.sum);
  require(std::equal(found.q.begin(), found.q.end(), expected.q.begin()), table.name, "q differs");
  require(std::equal(found.sum.begin(), found.sum.end(), expected.sum.begin()), table.name, "sum differs");
  for (int64_t t = 0; t < n; ++t) {
    const float a = found.s[t], b = expected.s[t];
    require(a == b || (std::isnan(a) && std::isnan(b)), table.name, "s differs");
  }
  return found;
}

// Layout 1 or 2 of canonical bits [M, K/8] and of up [M, R], as opset/layouts.py numbers them; what it pads is zero.
void to_tiles(int layout, const uint8_t* bits, int64_t M, int64_t K, uint8_t* tiles) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      if (layout == 2) {
        tiles[(m / kBlockRows * (K / 8) + k / 8) * kBlockRows + m % kBlockRows] = bits[m * (K / 8) + k / 8];
        continue;
      }
      const int64_t tile = m / kTileRows * (K / kTileColumns) + k / kTileColumns;
      const int bit = bits[m * (K / 8) + k / 8] >> (k % 8) & 1;
      tiles[tile * 64 + m % kTileRows * 4 + k % 4] |= static_cast<uint8_t>(bit << (k % kTileColumns / 4));
    }
  }
}
void to_tiles_of_up(int layout, const int8_t* up, int64_t M, int64_t R, int8_t* tiles) {
  const int64_t rows = block_rows(layout);
  for (int64_t i = 0; i < M * R; ++i) {
    const int64_t m = i / R, r = i % R;
    tiles[(m / rows * R + r) * rows + m % rows] = up[i];
  }
}

constexpr const char* kLayouts[] = {"layout 0", "layout 1", "layout 2"};

}  // namespace

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t n = in.small(1, 9), M = in.small(1, 70), R = in.size(0, 17);
  const bool scaffold = in.flag();
  const int64_t K = scaffold ? 32 * in.small(1, 6) : in.size(1, 150);
  const int planes = static_cast<int>(in.size(1, 3));
  const int64_t ldy = M + in.size(0, 5), part = in.size(0, 4);

  const Array<float> x = in.floats(n * K);
  const Array<uint8_t> bits = in.bytes<uint8_t>(scaffold ? planes * M * (K / 8) : 0);
  const Array<int8_t> w = in.bytes<int8_t>(M * (scaffold ? R : K));
  const Array<float> scale = in.floats(planes * M), up_scale = in.floats(M), h = in.floats(n * R);

  Array<float> expected(n * ldy, 0);
  for (const KernelTable* table : tables()) {
    const Quantised a = quantise(*table, x, n, K);
    const double s = a.s.largest();
    for (int layout = 0; layout < (scaffold ? 3 : 1); ++layout) {
      const int64_t Mp = layout ? padded_rows(M, layout) : 0;
      Array<uint8_t> tiles(scaffold ? planes * Mp * (K / 8) : 0, 1);
      Array<int8_t> tiles_of_up(scaffold ? Mp * R : 0, 1);
      if (layout) {
        std::fill(tiles.begin(), tiles.end(), 0);
        std::fill(tiles_of_up.begin(), tiles_of_up.end(), 0);
        for (int64_t p = 0; p < planes; ++p) {
          to_tiles(layout, bits + p * M * (K / 8), M, K, tiles + p * Mp * (K / 8));
        }
        to_tiles_of_up(layout, w, M, R, tiles_of_up);
      }
      const int64_t cut = std::min(M, (layout == 2 ? kBlockRows : kTileRows) * part);
      Array<float> y(n * ldy, 1);
      double bound = s * scale.largest() * 128 * 127 * static_cast<double>(K);
      if (scaffold) {
        const size_t bytes = table->scaffold_pack_bytes(layout, n, K);
        Array<uint8_t> packed(static_cast<int64_t>(bytes), 0);
        if (bytes > 0) table->scaffold_pack(layout, a.q, n, K, packed);
        const ScaffoldArgs args = {.q = a.q,
                                   .packed = bytes > 0 ? static_cast<uint8_t*>(packed) : nullptr,
                                   .s = a.s,
                                   .sum = a.sum,
                                   .bits = layout == 0 ? bits : tiles,
                                   .scale = scale,
                                   .up = layout == 0 ? w : tiles_of_up,
                                   .up_scale = up_scale,
                                   .h = h,
                                   .y = y,
                                   .ldy = ldy,
                                   .n = n,
                                   .K = K,
                                   .M = M,
                                   .R = R,
                                   .planes = planes,
                                   .layout = layout};
        table->scaffold_matmul(args, 0, cut);
        table->scaffold_matmul(args, cut, M);
        bound = 3 * bound / 128 * planes + up_scale.largest() * 128 * static_cast<double>(R) * h.largest();
      } else {
        const Int8Args args = {.q = a.q,
                               .s = a.s,
                               .sum = a.sum,
                               .w = w,
                               .w_scale = scale,
                               .y = y,
                               .ldy = ldy,
                               .n = n,
                               .K = K,
                               .M = M};
        table->int8_matmul(args, 0, cut);
        table->int8_matmul(args, cut, M);
      }
      if (is_reference(table) && layout == 0) expected.fill(y);
      require_close(in, table->name, scaffold ? kLayouts[layout] : "int8", y, expected, y.size, 1e-6 * bound);
    }
  }
  return 0;
}
