// SelectiveScanStep: which of the three kernels a shape takes, and with what tile. Every state byte is read
// once and written once a call; a state that fits no tile takes the general kernel, which goes over it at every token.
#include <algorithm>

#include "common/device.h"
#include "common/kernels.h"
#include "common/launch.h"
#include "selective_scan_step/chunked.cuh"
#include "selective_scan_step/general.cuh"
#include "selective_scan_step/resident.cuh"

namespace dfssm::trt {
namespace of_selective_scan_step {

using namespace selective_scan;

constexpr int kStagedTokens = 8;  // more cost shared memory, fewer cost barriers

// Tiles of one token (Step) have 16-byte accesses. Those of many tokens have 4 columns and more rows a
// thread: the state is read once for all of them, but the sums of y are a thread's columns at every token.
// For fp32 the two are one shape, so that T tokens and T steps add in one order. Of several the first that
// fits is taken.
template <class... Tile>
struct Tiles {};
template <class State>
struct TilesOf;
template <>
struct TilesOf<float> {
  using Step = Tiles<Tile<float, 4, 8, 8, 1, 256, 3>>;
  using Many = Tiles<Tile<float, 4, 8, 8, kStagedTokens, 512, 1>>;
};
template <>
struct TilesOf<__half> {
  using Step = Tiles<Tile<__half, 8, 4, 4, 1, 256, 3>>;
  using Many = Tiles<Tile<__half, 4, 8, 8, kStagedTokens, 512, 1>>;
};
template <>
struct TilesOf<int8_t> {  // whole rows: up to 64 columns, up to 128
  using Step = Tiles<Tile<int8_t, 16, 4, 4, 1, 256, 2>, Tile<int8_t, 16, 8, 4, 1, 512, 1>>;
  using Many = Tiles<Tile<int8_t, 4, 16, 8, kStagedTokens, 512, 1>,
                     Tile<int8_t, 4, 32, 16, 2, 512, 1>>;  // more tokens under way would spill
};

template <class Tile>
int warps_of(const ScanArgs& a) {
  return std::max((a.N + Tile::kWarpRows - 1) / Tile::kWarpRows, Tile::kColumns / kWarpSize);
}

template <class Tile>
bool fits(const ScanArgs& a) {
  const bool whole_rows = sizeof(typename Tile::State) > 1 || a.P <= Tile::kColumns;
  return whole_rows && a.P % Tile::kVector == 0 && kWarpSize * warps_of<Tile>(a) <= Tile::kThreads;
}

template <class Tile>
cudaError_t launch_resident(const ScanArgs& a, cudaStream_t stream) {
  const int warps = warps_of<Tile>(a), rows = warps * Tile::kWarpRows;
  const auto bytes = [&](int tokens) -> size_t { return Chunk::bytes(tokens, rows, Tile::kColumns, warps); };
  int tokens = std::min(Tile::kTokens, a.T);
  while (tokens > 1 && bytes(tokens) > kDefaultSharedBytes) --tokens;
  const dim3 grid((a.P + Tile::kColumns - 1) / Tile::kColumns, a.H, a.B);
  return dispatch(a.type, [&](auto type) {
    return launch(resident_scan<Tile, decltype(type)>, grid, kWarpSize * warps, bytes(tokens), stream, a,
                  a.H / a.G, tokens);
  });
}

template <class... Tile>
bool any_fits(Tiles<Tile...>, const ScanArgs& a) {
  return (fits<Tile>(a) || ...);
}

// Whether a tile fits; its launch left `error`.
template <class... Tile>
bool launch_first(Tiles<Tile...>, const ScanArgs& a, cudaStream_t stream, cudaError_t& error) {
  return ((fits<Tile>(a) && (error = launch_resident<Tile>(a, stream), true)) || ...);
}

// An int8 row has one scale: its block has all columns.
template <class State>
using SliceOf = Slice<State, sizeof(State) == 1 ? 64 : 32>;

// Whether a block may have that much shared memory; sm_75 lets no block have enough.
bool has_shared(size_t bytes) {
  int device, most;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         bytes <= static_cast<size_t>(most);
}

// Whether the tensor cores take it; its launch left `error`.
template <class State>
bool launch_chunked(const ScanArgs& a, cudaStream_t stream, cudaError_t& error) {
  using S = SliceOf<State>;
  const size_t bytes = a.type == Float::f32 ? sizeof(Shared<S, 2>) : sizeof(Shared<S, 1>);
  if (a.T < kChunkTokens || a.N > kMostRows || (sizeof(State) == 1 && a.P > S::kColumns)) return false;
  if (!has_shared(bytes)) return false;
  const dim3 grid((a.P + S::kColumns - 1) / S::kColumns, a.H, a.B);
  error = dispatch(a.type, [&](auto type) {
    return launch(chunked_scan<S, decltype(type)>, grid, kChunkedThreads, bytes, stream, a, a.H / a.G);
  });
  return true;
}

template <class State>
cudaError_t scan(const ScanArgs& a, void* workspace, cudaStream_t stream) {
  using T = TilesOf<State>;
  cudaError_t error = cudaSuccess;
  if (launch_chunked<State>(a, stream, error)) return error;
  if (a.T == 1 && launch_first(typename T::Step(), a, stream, error)) return error;
  if (launch_first(typename T::Many(), a, stream, error)) return error;
  float* carried = static_cast<float*>(sizeof(State) == sizeof(float) ? a.new_state : workspace);
  const dim3 grid(1, a.H, a.B);
  return dispatch(a.type, [&](auto type) {
    return launch(general_scan<State, decltype(type)>, grid, kGeneralThreads, 0, stream, a, a.H / a.G,
                  carried);
  });
}

}  // namespace of_selective_scan_step
using namespace of_selective_scan_step;

// The same for every T: a plugin asks once, for the largest shapes, and then runs steps as well.
size_t scan_workspace(const ScanArgs& a) {
  const bool none = a.state_type == State::f32 ||
                    (a.state_type == State::f16 && any_fits(TilesOf<__half>::Many(), a)) ||
                    (a.state_type == State::i8 && any_fits(TilesOf<int8_t>::Many(), a));
  return none ? 0 : sizeof(float) * a.B * a.H * a.N * a.P;
}

cudaError_t selective_scan_step(const ScanArgs& a, void* workspace, cudaStream_t stream) {
  switch (a.state_type) {
    case State::f32:
      return scan<float>(a, workspace, stream);
    case State::f16:
      return scan<__half>(a, workspace, stream);
    case State::i8:
      return scan<int8_t>(a, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dfssm::trt
