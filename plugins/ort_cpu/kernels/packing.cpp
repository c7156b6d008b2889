#include "packing.h"

#include <cstring>

namespace dfssm {
namespace {

int get_bit(const uint8_t* row, int64_t k) { return row[k / 8] >> (k % 8) & 1; }

void set_bit(uint8_t* row, int64_t k) { row[k / 8] |= static_cast<uint8_t>(1 << (k % 8)); }

// Byte and bit of (row, column k) among the tiles of layout 1.
struct TilePosition {
  int64_t byte;
  int bit;
};

TilePosition tile_position(int64_t row, int64_t k, int64_t K) {
  const int64_t tile = row / kTileRows * (K / kTileColumns) + k / kTileColumns;
  const int64_t lane = row % kTileRows;
  return {tile * 64 + lane * 4 + k % 4, static_cast<int>(k % kTileColumns / 4)};
}

}  // namespace

void pack_bits(const int8_t* signs, int64_t rows, int64_t K, uint8_t* bits) {
  std::memset(bits, 0, rows * (K / 8));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      if (signs[m * K + k] > 0) set_bit(bits + m * (K / 8), k);
    }
  }
}

void unpack_bits(const uint8_t* bits, int64_t rows, int64_t K, int8_t* signs) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < K; ++k) signs[m * K + k] = get_bit(bits + m * (K / 8), k) ? 1 : -1;
  }
}

void interleave16(const uint8_t* bits, int64_t M, int64_t K, uint8_t* tiles) {
  std::memset(tiles, 0, padded_rows(M) * (K / 8));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      const TilePosition at = tile_position(m, k, K);
      tiles[at.byte] |= static_cast<uint8_t>(get_bit(bits + m * (K / 8), k) << at.bit);
    }
  }
}

void deinterleave16(const uint8_t* tiles, int64_t M, int64_t K, uint8_t* bits) {
  std::memset(bits, 0, M * (K / 8));
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) {
      const TilePosition at = tile_position(m, k, K);
      if (tiles[at.byte] >> at.bit & 1) set_bit(bits + m * (K / 8), k);
    }
  }
}

void interleave_up16(const int8_t* up, int64_t M, int64_t R, int8_t* out) {
  std::memset(out, 0, padded_rows(M) * R);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t r = 0; r < R; ++r) out[(m / kTileRows * R + r) * kTileRows + m % kTileRows] = up[m * R + r];
  }
}

}  // namespace dfssm
