// The layouts of the scaffold: packing, then unpacking, gives back every bit; what pads is zero.
#include "packing.h"

#include "input.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const int64_t M = in.size(1, 50), K = 32 * in.size(1, 8), R = in.size(0, 20), Mp = padded_rows(M);
  const Array<uint8_t> bits = in.bytes<uint8_t>(M * K / 8);
  const Array<int8_t> up = in.bytes<int8_t>(M * R);

  Array<int8_t> signs(M * K, 1);
  Array<uint8_t> again(M * K / 8, 1), tiles(Mp * K / 8, 1), back(M * K / 8, 1);
  unpack_bits(bits, M, K, signs);
  for (int64_t i = 0; i < M * K; ++i)
    require(signs[i] == (bits[i / 8] >> (i % 8) & 1 ? 1 : -1), "unpack_bits", "a sign differs");
  pack_bits(signs, M, K, again);
  require(std::equal(again.begin(), again.end(), static_cast<const uint8_t*>(bits)), "pack_bits",
          "a bit differs");

  std::fill(tiles.begin(), tiles.end(), 0xaa);
  interleave16(bits, M, K, tiles);
  deinterleave16(tiles, M, K, back);
  require(std::equal(back.begin(), back.end(), static_cast<const uint8_t*>(bits)), "interleave16",
          "a bit differs");
  int64_t ones = 0;
  for (uint8_t tile : tiles) ones += __builtin_popcount(tile);
  for (int64_t i = 0; i < M * K; ++i) ones -= signs[i] > 0;
  require(ones == 0, "interleave16", "the padding is not zero");

  Array<int8_t> up16(Mp * R, 1);
  std::fill(up16.begin(), up16.end(), 0x55);
  interleave_up16(up, M, R, up16);
  for (int64_t m = 0; m < Mp; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      const int8_t expected = m < M ? up[m * R + r] : 0;
      require(up16[(m / kTileRows * R + r) * kTileRows + m % kTileRows] == expected, "interleave_up16",
              "differs");
    }
  }
  return 0;
}
