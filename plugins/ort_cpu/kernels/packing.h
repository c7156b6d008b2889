// Layouts of the 1-bit scaffold (opset/packing.py defines them). Used by the Python module; kernels read packed arrays.
#pragma once

#include <cstdint>

namespace dfssm {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 32;

inline int64_t padded_rows(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// signs [rows, K] (> 0 is +1) <-> canonical bits [rows, K/8], K % 8 == 0. Unpacked signs are +1 and -1.
void pack_bits(const int8_t* signs, int64_t rows, int64_t K, uint8_t* bits);
void unpack_bits(const uint8_t* bits, int64_t rows, int64_t K, int8_t* signs);

// Canonical bits [M, K/8] <-> tiles [Mp/16, K/32, 16, 4], K % 32 == 0. Rows past M are zero bits.
void interleave16(const uint8_t* bits, int64_t M, int64_t K, uint8_t* tiles);
void deinterleave16(const uint8_t* tiles, int64_t M, int64_t K, uint8_t* bits);

// up [M, R] -> [Mp/16, R, 16]. Rows past M are zero.
void interleave_up16(const int8_t* up, int64_t M, int64_t R, int8_t* out);

}  // namespace dfssm
