// SelectiveScanStep.
#include <atomic>
#include <new>

#include "scan.h"

namespace dfssm {

template <>
void run<opset::SelectiveScanStep>(Call& call, const opset::SelectiveScanStep::Attributes& a,
                                   const opset::SelectiveScanStep::Sizes& s) {
  using S = opset::SelectiveScanStep;
  ScanArgs args{};
  fill_scan<S>(call, a, s, args);
  args.new_state = call.output<void>(1, {s.B, s.H, s.N, s.P});
  if (args.state_type == StateType::i8) args.new_state_scale = call.output<float>(2, {s.B, s.H, s.N});

  const size_t scratch_bytes = call.kernels.selective_scan_bytes(args);
  const double head_ns =
      static_cast<double>(s.N * s.P) * (state_bytes(args) / 25 + 0.065 * static_cast<double>(s.T));
  std::atomic<bool> out_of_memory = false;
  call.parallel(s.B * s.H, head_ns, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(scratch_bytes);
    if (scratch || scratch_bytes == 0) {
      call.kernels.selective_scan(args, begin, end, scratch);
    } else {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace dfssm
