// What the ops of a causal convolution have in common.
#pragma once

#include <algorithm>

#include "call.h"

namespace dfssm {

// kernel(args of one batch row, c0, c1) over all channels of all rows, which take `channel_ns` each: a range of one row is
// one stretch of its state.
template <class Args, class Kernel>
void share_channels(Call& call, const Args& args, double channel_ns, const Kernel& kernel) {
  constexpr int64_t kChannels = 64;
  const int64_t parts = (args.C + kChannels - 1) / kChannels;
  call.parallel(args.B * parts, kChannels * channel_ns, [&, parts](int64_t begin, int64_t end) {
    for (int64_t stop; begin < end; begin = stop) {
      const int64_t b = begin / parts;
      stop = std::min(end, (b + 1) * parts);
      kernel(args.row(b), (begin - b * parts) * kChannels, std::min((stop - b * parts) * kChannels, args.C));
    }
  });
}

}  // namespace dfssm
