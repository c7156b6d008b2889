// DeferredScanStep with every type of state and any number of pending tokens, in ranges of heads, on every table, against
// the scalar one.
#include "scan.h"

using namespace dfssm;
using namespace dfssm::fuzz;

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Scan scan(in, 20);
  const Array<uint8_t> pending_count = in.counts(scan.B);
  const Array<float> pending_x = in.floats(scan.B * kSlots * scan.H * scan.P);
  const Array<float> pending_B = in.floats(scan.B * kSlots * scan.G * scan.N);
  Array<float> pending_decay(scan.B * kSlots * scan.H, 1);
  if (in.flag()) {  // as a step leaves them
    const Array<uint8_t> drawn = in.bytes<uint8_t>(pending_decay.size);
    for (int64_t i = 0; i < drawn.size; ++i) pending_decay[i] = drawn[i] / 255.0f;
  } else {
    pending_decay.fill(in.floats(pending_decay.size));
    in.wild = true;  // what grows overflows
  }

  const int64_t tokens = kSlots + scan.T;
  const double largest_x = std::fmax(scan.delta * scan.x.largest(), pending_x.largest());
  const double state_bound = scan.source.values(scan.count, scan.P).largest() +
                             tokens * std::fmax(scan.Bm.largest(), pending_B.largest()) * largest_x;
  const double y_bound = scan.N * scan.Cm.largest() * state_bound + scan.D.largest() * scan.x.largest();
  in.wild = in.wild || state_bound > 6e4;  // fp16 holds no more
  // Decays are multiplied. A block is computed from what was stored of those before it.
  const double rounding = tokens * scan.precision() + tokens / kBlock * scan.source.step();

  Array<float> y_ref(scan.B * scan.T * scan.H * scan.P, 0), state_ref(scan.count, 0);
  Array<float> x_ref(pending_x.size, 0), decay_ref(pending_decay.size, 0);
  for (const KernelTable* table : tables()) {
    State state(scan.type, scan.pairs * scan.N, scan.P);
    state.fill(scan.source);
    Array<float> y(y_ref.size, 1), x = pending_x.copy(), B = pending_B.copy(), decay = pending_decay.copy();
    Array<uint8_t> count = pending_count.copy();
    DeferredScanArgs args;
    static_cast<ScanArgs&>(args) = scan.args(state, state, y);
    args.pending_x = x;
    args.pending_B = B;
    args.pending_decay = decay;
    args.pending_count = count;
    Array<uint8_t> scratch(static_cast<int64_t>(table->deferred_scan_bytes(args)), 0);
    table->deferred_scan(args, 0, scan.cut, scratch);
    table->deferred_scan(args, scan.cut, scan.pairs, scratch);
    const Array<float> values = state.values(scan.count, scan.P);
    if (is_reference(table)) {
      y_ref.fill(y);
      state_ref.fill(values);
      x_ref.fill(x);
      decay_ref.fill(decay);
    }
    require_close(in, table->name, "y", y, y_ref, y.size, rounding * y_bound);
    require_close(in, table->name, "new_state", values, state_ref, scan.count,
                  (rounding + state.step()) * state_bound);
    require_close(in, table->name, "pending_x", x, x_ref, x.size, scan.precision() * largest_x);
    require_close(in, table->name, "pending_decay", decay, decay_ref, decay.size, scan.precision());
    require(std::memcmp(B, pending_B, B.size * sizeof(float)) == 0, table->name, "pending_B was written");
    require(std::memcmp(count, pending_count, count.size) == 0, table->name, "pending_count was written");
  }
  return 0;
}
