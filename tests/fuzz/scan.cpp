// SelectiveScanStep with every type of state, in ranges of heads, in place or not, on every table, against the scalar one.
#include "scan.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Scan scan(in, 4);
  const double state_bound = scan.source.values(scan.count, scan.P).largest() +
                             scan.T * scan.delta * scan.Bm.largest() * scan.x.largest();
  const double y_bound = scan.N * scan.Cm.largest() * state_bound + scan.D.largest() * scan.x.largest();
  in.wild = in.wild || state_bound > 6e4;  // fp16 holds no more

  Array<float> y_ref(scan.B * scan.T * scan.H * scan.P, 0), state_ref(scan.count, 0);
  for (const KernelTable* table : tables()) {
    State before(scan.type, scan.pairs * scan.N, scan.P);
    State after(scan.type, scan.in_place ? 0 : scan.pairs * scan.N, scan.P);
    before.fill(scan.source);
    State& result = scan.in_place ? before : after;
    Array<float> y(y_ref.size, 1);
    const ScanArgs args = scan.args(before, result, y);
    Array<uint8_t> scratch(static_cast<int64_t>(table->selective_scan_bytes(args)), 0);
    table->selective_scan(args, 0, scan.cut, scratch);
    table->selective_scan(args, scan.cut, scan.pairs, scratch);
    const Array<float> values = result.values(scan.count, scan.P);
    if (is_reference(table)) {
      y_ref.fill(y);
      state_ref.fill(values);
    }
    require_close(in, table->name, "y", y, y_ref, y.size, scan.precision() * y_bound);
    require_close(in, table->name, "new_state", values, state_ref, scan.count,
                  (scan.precision() + result.step()) * state_bound);
  }
  return 0;
}
