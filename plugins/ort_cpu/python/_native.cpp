// dfssm._native: the kernels over NumPy arrays, for tests and benches. Nothing is converted: an array of
// another dtype, shape or memory order is a ValueError. Outputs are new arrays, or `out` where it is given.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "packing.h"

namespace py = pybind11;

namespace dfssm {
namespace {

using Shape = std::vector<py::ssize_t>;

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string name_of(const py::dtype& dtype) { return py::str(dtype.attr("name")); }

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

py::dtype half() { return py::dtype("float16"); }

// One call's arguments: checks them, and names the function in what it raises.
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  [[noreturn]] void fail(const std::string& message) const {
    throw py::value_error(std::string(function_) + ": " + message);
  }

  void require(bool condition, const std::string& message) const {
    if (!condition) fail(message);
  }

  // `name` must have one of `dtypes`, exactly this shape, and C order.
  void check(const char* name, const py::array& a, const std::vector<py::dtype>& dtypes,
             const Shape& shape) const {
    std::string expected;
    bool known = false;
    for (const py::dtype& dtype : dtypes) {
      known = known || a.dtype().equal(dtype);
      expected += (expected.empty() ? "" : " or ") + name_of(dtype);
    }
    require(known && shape_of(a) == shape, std::string("'") + name + "' is " + name_of(a.dtype()) + " " +
                                               text(shape_of(a)) + ", expected " + expected + " " +
                                               text(shape));
    require(a.flags() & py::array::c_style, std::string("'") + name + "' must be in C order");
  }

  template <class T>
  const T* input(const char* name, const py::array& a, const Shape& shape) const {
    check(name, a, {py::dtype::of<T>()}, shape);
    return static_cast<const T*>(a.data());
  }

  // `shape` out of `a`: the columns from `start` on, which must lie inside; for start = -1, all of `a`.
  // `stride` becomes the number of floats from one token to the next.
  const float* columns(const char* name, const py::array& a, Shape shape, int64_t start,
                       int64_t& stride) const {
    require(start >= -1, std::string(name) + "_start is " + std::to_string(start) + ", expected at least -1");
    const py::ssize_t width = shape.back();
    stride = width;
    if (start < 0) return input<float>(name, a, shape);
    stride = a.ndim() > 0 ? a.shape(a.ndim() - 1) : 0;
    require(stride >= width && stride - width >= start,
            std::string("'") + name + "' is " + name_of(a.dtype()) + " " + text(shape_of(a)) + ", expected " +
                std::to_string(width) + " columns from " + name + "_start=" + std::to_string(start) + " on");
    shape.back() = stride;
    return input<float>(name, a, shape) + start;
  }

  // Number of dimensions of `name`, before its sizes are read.
  void rank(const char* name, const py::array& a, py::ssize_t rank) const {
    require(a.ndim() == rank, std::string("'") + name + "' has shape " + text(shape_of(a)) + ", expected " +
                                  std::to_string(rank) + " dimensions");
  }

  const KernelTable& table(const std::string& isa) const {
    if (const KernelTable* table = kernels_for(isa.c_str())) return *table;
    fail("isa is '" + isa + "'; this CPU can use: " + usable_names());
  }

  // `out` if it is given and fits, otherwise a new array.
  py::array output(const std::optional<py::array>& out, const py::dtype& dtype, const Shape& shape) const {
    if (!out) return py::array(dtype, shape);
    check("out", *out, {dtype}, shape);
    require(out->writeable(), "'out' is read-only");
    return *out;
  }

 private:
  const char* function_;
};

// Leading sizes of x and the last one; n is their product.
struct Rows {
  Shape lead;
  int64_t n, width;

  Rows(const Arguments& arguments, const py::array& x) : n(1) {
    arguments.require(x.ndim() >= 1, "'x' must have at least one dimension");
    lead = shape_of(x);
    width = lead.back();
    lead.pop_back();
    for (const py::ssize_t size : lead) n *= size;
  }

  Shape with(py::ssize_t last) const {
    Shape shape = lead;
    shape.push_back(last);
    return shape;
  }
};

// body(begin, end) over [0, units) cut into one range a thread; begins are multiples of `unit`.
template <class Body>
void parallel(int threads, int64_t units, int64_t unit, const Body& body) {
  const py::gil_scoped_release release;
  const int64_t blocks = (units + unit - 1) / unit;
  const int64_t count = std::clamp<int64_t>(threads, 1, std::max<int64_t>(blocks, 1));
  const auto range = [&](int64_t i) {
    body(blocks * i / count * unit, std::min(blocks * (i + 1) / count * unit, units));
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; ++i) others.emplace_back(range, i);
  range(0);
  for (std::thread& other : others) other.join();
}

struct Quantized {
  std::vector<int8_t> q;
  std::vector<float> s;
  std::vector<int32_t> sum;

  Quantized(const KernelTable& table, const float* x, int64_t n, int64_t K) : q(n * K), s(n), sum(n) {
    table.quantize_activations(x, n, K, q.data(), s.data(), sum.data());
  }
};

py::tuple quantize_activations(const std::string& isa, const py::array& x) {
  const Arguments arguments("quantize_activations");
  const KernelTable& table = arguments.table(isa);
  arguments.rank("x", x, 2);
  const py::ssize_t n = x.shape(0), K = x.shape(1);
  const float* values = arguments.input<float>("x", x, {n, K});
  py::array_t<int8_t> q({n, K});
  py::array_t<float> s(n);
  py::array_t<int32_t> sum(n);
  table.quantize_activations(values, n, K, q.mutable_data(), s.mutable_data(), sum.mutable_data());
  return py::make_tuple(q, s, sum);
}

py::array binary_scaffold_matmul(const std::string& isa, const py::array& x, const py::array& bits,
                                 const py::array& scale, const py::array& down, const py::array& down_scale,
                                 const py::array& up, const py::array& up_scale, int layout, int planes,
                                 int threads, const std::optional<py::array>& out) {
  const Arguments arguments("binary_scaffold_matmul");
  const KernelTable& table = arguments.table(isa);
  arguments.require(layout == 0 || layout == 1, "layout is " + std::to_string(layout) + ", expected 0 or 1");
  arguments.require(planes >= 1, "planes is " + std::to_string(planes) + ", expected at least 1");
  const Rows rows(arguments, x);
  const int64_t n = rows.n, K = rows.width;
  arguments.require(K % kTileColumns == 0, "K is " + std::to_string(K) + ", expected a multiple of 32");
  arguments.rank("up_scale", up_scale, 1);
  arguments.rank("down_scale", down_scale, 1);
  const int64_t M = up_scale.shape(0), R = down_scale.shape(0);
  const int64_t stored_rows = layout == 0 ? M : padded_rows(M);

  ScaffoldArgs args{};
  const float* values = arguments.input<float>("x", x, rows.with(K));
  args.bits = arguments.input<uint8_t>(
      "bits", bits, planes > 1 ? Shape{planes, stored_rows, K / 8} : Shape{stored_rows, K / 8});
  args.scale = arguments.input<float>("scale", scale, planes > 1 ? Shape{planes, M} : Shape{M});
  const int8_t* down_values = arguments.input<int8_t>("down", down, {R, K});
  const float* down_scales = arguments.input<float>("down_scale", down_scale, {R});
  args.up = arguments.input<int8_t>("up", up, {stored_rows, R});
  args.up_scale = arguments.input<float>("up_scale", up_scale, {M});
  py::array y = arguments.output(out, py::dtype::of<float>(), rows.with(M));
  args.y = static_cast<float*>(y.mutable_data());

  const Quantized tokens(table, values, n, K);
  const size_t packed_bytes = layout == 1 ? table.scaffold_pack_bytes(n, K) : 0;
  const std::unique_ptr<std::byte[]> packed(packed_bytes ? new std::byte[packed_bytes] : nullptr);
  if (packed) table.scaffold_pack(tokens.q.data(), n, K, packed.get());
  std::vector<float> h(n * R);
  Int8Args low{
      tokens.q.data(), tokens.s.data(), tokens.sum.data(), down_values, down_scales, h.data(), R, n, K, R};
  if (R > 0) table.int8_matmul(low, 0, R);

  args.q = tokens.q.data();
  args.packed = packed.get();
  args.s = tokens.s.data();
  args.sum = tokens.sum.data();
  args.h = h.data();
  args.ldy = M;
  args.n = n, args.K = K, args.M = M, args.R = R;
  args.planes = planes;
  args.layout = layout;
  parallel(threads, M, 32, [&](int64_t m0, int64_t m1) { table.scaffold_matmul(args, m0, m1); });
  return y;
}

py::array int8_matmul(const std::string& isa, const py::array& x, const py::array& w,
                      const py::array& w_scale, int threads, const std::optional<py::array>& out) {
  const Arguments arguments("int8_matmul");
  const KernelTable& table = arguments.table(isa);
  const Rows rows(arguments, x);
  arguments.rank("w_scale", w_scale, 1);
  const int64_t n = rows.n, K = rows.width, M = w_scale.shape(0);
  const float* values = arguments.input<float>("x", x, rows.with(K));
  Int8Args args{};
  args.w = arguments.input<int8_t>("w", w, {M, K});
  args.w_scale = arguments.input<float>("w_scale", w_scale, {M});
  py::array y = arguments.output(out, py::dtype::of<float>(), rows.with(M));
  const Quantized tokens(table, values, n, K);
  args.q = tokens.q.data();
  args.s = tokens.s.data();
  args.sum = tokens.sum.data();
  args.y = static_cast<float*>(y.mutable_data());
  args.ldy = M;
  args.n = n, args.K = K, args.M = M;
  parallel(threads, M, 4, [&](int64_t m0, int64_t m1) { table.int8_matmul(args, m0, m1); });
  return y;
}

py::tuple causal_conv1d_step(const std::string& isa, const py::array& x, py::array state,
                             const py::array& weight, const py::array& bias, const std::string& activation,
                             int64_t x_start, int threads, bool in_place,
                             const std::optional<py::array>& out) {
  const Arguments arguments("causal_conv1d_step");
  const KernelTable& table = arguments.table(isa);
  arguments.require(activation == "silu" || activation == "none",
                    "activation is '" + activation + "', expected 'silu' or 'none'");
  arguments.rank("x", x, 3);
  arguments.rank("weight", weight, 2);
  const py::ssize_t B = x.shape(0), T = x.shape(1), C = x_start < 0 ? x.shape(2) : weight.shape(0),
                    W = weight.shape(1);
  arguments.require(2 <= W && W <= 4, "W is " + std::to_string(W) + ", expected 2, 3 or 4");
  ConvArgs args{};
  args.x = arguments.columns("x", x, {B, T, C}, x_start, args.x_stride);
  args.state = arguments.input<float>("state", state, {B, C, W - 1});
  args.weight = arguments.input<float>("weight", weight, {C, W});
  args.bias = arguments.input<float>("bias", bias, {C});
  py::array y = arguments.output(out, py::dtype::of<float>(), {B, T, C});
  py::array new_state = in_place ? state : py::array(state.dtype(), shape_of(state));
  args.y = static_cast<float*>(y.mutable_data());
  args.new_state = static_cast<float*>(new_state.mutable_data());
  args.B = B, args.T = T, args.C = C, args.W = W;
  args.silu = activation == "silu";
  parallel(threads, C, 16, [&](int64_t c0, int64_t c1) { table.causal_conv1d(args, c0, c1); });
  return py::make_tuple(y, new_state);
}

py::tuple selective_scan_step(const std::string& isa, const py::array& x, const py::array& dt,
                              const py::array& Bm, const py::array& Cm, const py::array& A_log,
                              const py::array& D, const py::array& dt_bias, py::array state,
                              std::optional<py::array> state_scale, float dt_min, float dt_max,
                              int64_t ngroups, int64_t x_start, int64_t dt_start, int64_t B_start,
                              int64_t C_start, int threads, bool in_place,
                              const std::optional<py::array>& out) {
  const Arguments arguments("selective_scan_step");
  const KernelTable& table = arguments.table(isa);
  arguments.rank("x", x, 3);
  arguments.rank("state", state, 4);
  const py::ssize_t B = x.shape(0), T = x.shape(1), H = state.shape(1), N = state.shape(2),
                    P = state.shape(3);
  arguments.require(ngroups >= 1 && H % ngroups == 0, "ngroups is " + std::to_string(ngroups) +
                                                          ", expected a divisor of H=" + std::to_string(H));
  arguments.check("state", state, {py::dtype::of<float>(), half(), py::dtype::of<int8_t>()}, {B, H, N, P});
  ScanArgs args{};
  args.state_type = state.itemsize() == 4   ? StateType::f32
                    : state.itemsize() == 2 ? StateType::f16
                                            : StateType::i8;
  const bool scaled = args.state_type == StateType::i8;
  arguments.require(scaled == state_scale.has_value(),
                    "'state_scale' belongs to an int8 state and only to it");
  args.x = arguments.columns("x", x, {B, T, H * P}, x_start, args.x_stride);
  args.dt = arguments.columns("dt", dt, {B, T, H}, dt_start, args.dt_stride);
  args.Bm = arguments.columns("B", Bm, {B, T, ngroups * N}, B_start, args.B_stride);
  args.Cm = arguments.columns("C", Cm, {B, T, ngroups * N}, C_start, args.C_stride);
  args.A_log = arguments.input<float>("A_log", A_log, {H});
  args.D = arguments.input<float>("D", D, {H});
  args.dt_bias = arguments.input<float>("dt_bias", dt_bias, {H});
  py::array y = arguments.output(out, py::dtype::of<float>(), {B, T, H * P});
  py::array new_state = in_place ? state : py::array(state.dtype(), shape_of(state));
  args.state = state.data();
  args.y = static_cast<float*>(y.mutable_data());
  args.new_state = new_state.mutable_data();
  std::optional<py::array> new_scale;
  if (scaled) {
    args.state_scale = arguments.input<float>("state_scale", *state_scale, {B, H, N});
    new_scale = in_place ? *state_scale : py::array(py::dtype::of<float>(), Shape{B, H, N});
    args.new_state_scale = static_cast<float*>(new_scale->mutable_data());
  }
  args.B = B, args.T = T, args.H = H, args.P = P, args.N = N, args.G = ngroups;
  args.dt_min = dt_min;
  args.dt_max = dt_max;
  const size_t scratch_bytes = table.selective_scan_bytes(args);
  parallel(threads, B * H, 1, [&](int64_t i0, int64_t i1) {
    const std::unique_ptr<std::byte[]> scratch(new std::byte[scratch_bytes]);
    table.selective_scan(args, i0, i1, scratch.get());
  });
  if (scaled) return py::make_tuple(y, new_state, *new_scale);
  return py::make_tuple(y, new_state);
}

py::array gated_rms_norm(const std::string& isa, const py::array& y, const std::optional<py::array>& z,
                         const py::array& weight, float eps, int64_t groups, int64_t z_start, int threads,
                         const std::optional<py::array>& out) {
  const Arguments arguments(z ? "gated_rms_norm" : "rms_norm");
  const KernelTable& table = arguments.table(isa);
  const Rows rows(arguments, y);
  arguments.require(
      groups >= 1 && rows.width % groups == 0,
      "groups is " + std::to_string(groups) + ", expected a divisor of C=" + std::to_string(rows.width));
  NormArgs args{};
  args.y = arguments.input<float>(z ? "y" : "x", y, rows.with(rows.width));
  if (z) args.z = arguments.columns("z", *z, rows.with(rows.width), z_start, args.z_stride);
  args.weight = arguments.input<float>("weight", weight, {rows.width});
  py::array result = arguments.output(out, py::dtype::of<float>(), rows.with(rows.width));
  args.out = static_cast<float*>(result.mutable_data());
  args.n = rows.n, args.C = rows.width, args.groups = groups;
  args.eps = eps;
  parallel(threads, rows.n, 1, [&](int64_t t0, int64_t t1) { table.rms_norm(args, t0, t1); });
  return result;
}

// ---- packing ----

// Applies `body(matrix_in, matrix_out)` to every matrix of [..., rows, columns].
template <class In, class Out, class Body>
py::array per_matrix(const char* function, const char* name, const py::array& a, py::ssize_t out_rows,
                     py::ssize_t out_columns, const Body& body) {
  const Arguments arguments(function);
  Shape shape = shape_of(a);
  const In* in = arguments.input<In>(name, a, shape);
  const py::ssize_t size = shape[shape.size() - 2] * shape.back(), out_size = out_rows * out_columns;
  py::ssize_t count = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) count *= shape[i];
  shape[shape.size() - 2] = out_rows;
  shape.back() = out_columns;
  py::array_t<Out> out(shape);
  for (py::ssize_t i = 0; i < count; ++i) body(in + i * size, out.mutable_data() + i * out_size);
  return out;
}

// Rows and columns of the matrices in `a`; `columns` must be a multiple of `unit`.
std::pair<py::ssize_t, py::ssize_t> matrix_sizes(const char* function, const char* name, const py::array& a,
                                                 py::ssize_t unit) {
  const Arguments arguments(function);
  arguments.require(a.ndim() >= 2 && a.shape(a.ndim() - 1) % unit == 0,
                    std::string("'") + name + "' is " + text(shape_of(a)) +
                        ", expected a matrix whose last size is a multiple of " + std::to_string(unit));
  return {a.shape(a.ndim() - 2), a.shape(a.ndim() - 1)};
}

py::array pack_bits_array(const py::array& signs) {
  const auto [M, K] = matrix_sizes("pack_bits", "signs", signs, 8);
  const auto pack = [M = M, K = K](const int8_t* in, uint8_t* out) { pack_bits(in, M, K, out); };
  // bool has int8's size and a positive value for true
  const py::array values = signs.dtype().kind() == 'b' ? py::array(signs.attr("view")("int8")) : signs;
  return per_matrix<int8_t, uint8_t>("pack_bits", "signs", values, M, K / 8, pack);
}

py::array unpack_bits_array(const py::array& bits) {
  const auto [M, bytes] = matrix_sizes("unpack_bits", "bits", bits, 1);
  const auto unpack = [M = M, K = bytes * 8](const uint8_t* in, int8_t* out) { unpack_bits(in, M, K, out); };
  return per_matrix<uint8_t, int8_t>("unpack_bits", "bits", bits, M, bytes * 8, unpack);
}

py::array interleave16_array(const py::array& bits) {
  const auto [M, bytes] = matrix_sizes("interleave16", "bits", bits, 4);
  const auto convert = [M = M, K = bytes * 8](const uint8_t* in, uint8_t* out) {
    interleave16(in, M, K, out);
  };
  return per_matrix<uint8_t, uint8_t>("interleave16", "bits", bits, padded_rows(M), bytes, convert);
}

py::array deinterleave16_array(const py::array& tiles, py::ssize_t M) {
  const auto [rows, bytes] = matrix_sizes("deinterleave16", "tiles", tiles, 4);
  const Arguments arguments("deinterleave16");
  arguments.require(M >= 1 && rows == padded_rows(M),
                    "'tiles' has " + std::to_string(rows) + " rows, expected " +
                        std::to_string(padded_rows(M)) + " for M=" + std::to_string(M));
  const auto convert = [M, K = bytes * 8](const uint8_t* in, uint8_t* out) { deinterleave16(in, M, K, out); };
  return per_matrix<uint8_t, uint8_t>("deinterleave16", "tiles", tiles, M, bytes, convert);
}

py::array interleave_up16_array(const py::array& up) {
  const auto [M, R] = matrix_sizes("interleave_up16", "up", up, 1);
  const auto convert = [M = M, R = R](const int8_t* in, int8_t* out) { interleave_up16(in, M, R, out); };
  return per_matrix<int8_t, int8_t>("interleave_up16", "up", up, padded_rows(M), R, convert);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : usable_kernels()) names.emplace_back(table->name);
  return names;
}

std::string default_isa() {
  if (const char* error = kernels_error()) throw py::value_error(error);
  return kernels().name;
}

}  // namespace
}  // namespace dfssm

PYBIND11_MODULE(_native, m) {
  using namespace dfssm;
  using py::arg;
  const py::none none;
  m.doc() = "The CPU kernels of dfssm over NumPy arrays, one call an operator; `isa` is one of isas().";
  m.def("isas", &isas, "Names of the kernel tables this CPU can run, the plainest first.");
  m.def("default_isa", &default_isa,
        "Name of the table in use: DFSSM_ISA if set (ValueError if unusable), or the best.");
  m.def("quantize_activations", &quantize_activations, arg("isa"), arg("x"),
        "x f32 [n,K] -> q i8 [n,K], s f32 [n], sum i32 [n].");
  m.def("binary_scaffold_matmul", &binary_scaffold_matmul, arg("isa"), arg("x"), arg("bits"), arg("scale"),
        arg("down"), arg("down_scale"), arg("up"), arg("up_scale"), arg("layout") = 0, arg("planes") = 1,
        arg("threads") = 1, arg("out") = none,
        "x f32 [...,K] -> f32 [...,M]; the other arguments as in opset/schema.py.");
  m.def("int8_matmul", &int8_matmul, arg("isa"), arg("x"), arg("w"), arg("w_scale"), arg("threads") = 1,
        arg("out") = none, "x f32 [...,K], w i8 [M,K], w_scale f32 [M] -> f32 [...,M].");
  m.def("causal_conv1d_step", &causal_conv1d_step, arg("isa"), arg("x"), arg("state"), arg("weight"),
        arg("bias"), arg("activation") = "silu", arg("x_start") = -1, arg("threads") = 1,
        arg("in_place") = false, arg("out") = none,
        "x f32 [B,T,C], state f32 [B,C,W-1], weight f32 [C,W], bias f32 [C] -> y, new_state; in_place writes "
        "`state`.");
  m.def("selective_scan_step", &selective_scan_step, arg("isa"), arg("x"), arg("dt"), arg("B"), arg("C"),
        arg("A_log"), arg("D"), arg("dt_bias"), arg("state"), arg("state_scale") = none, arg("dt_min") = 0.0f,
        arg("dt_max") = std::numeric_limits<float>::infinity(), arg("ngroups") = 1, arg("x_start") = -1,
        arg("dt_start") = -1, arg("B_start") = -1, arg("C_start") = -1, arg("threads") = 1,
        arg("in_place") = false, arg("out") = none,
        "Arguments as in opset/schema.py -> y, new_state (, new_state_scale); in_place writes `state` and "
        "its scale.");
  m.def("gated_rms_norm", &gated_rms_norm, arg("isa"), arg("y"), arg("z"), arg("weight"), arg("eps") = 1e-5f,
        arg("groups") = 1, arg("z_start") = -1, arg("threads") = 1, arg("out") = none,
        "y and z f32 [...,C], weight f32 [C] -> f32 [...,C].");
  m.def(
      "rms_norm",
      [](const std::string& isa, const py::array& x, const py::array& weight, float eps, int threads,
         const std::optional<py::array>& out) {
        return gated_rms_norm(isa, x, std::nullopt, weight, eps, 1, -1, threads, out);
      },
      arg("isa"), arg("x"), arg("weight"), arg("eps") = 1e-5f, arg("threads") = 1, arg("out") = none,
      "x f32 [...,C], weight f32 [C] -> f32 [...,C].");
  m.def("pack_bits", &pack_bits_array, arg("signs"),
        "Signs i8 or bool [...,M,K] (> 0 is +1) -> bits u8 [...,M,K/8].");
  m.def("unpack_bits", &unpack_bits_array, arg("bits"),
        "bits u8 [...,M,K/8] -> signs i8 (+1, -1) [...,M,K].");
  m.def("interleave16", &interleave16_array, arg("bits"),
        "bits u8 [...,M,K/8] -> layout 1, u8 [...,Mp,K/8].");
  m.def("deinterleave16", &deinterleave16_array, arg("tiles"), arg("M"), "Inverse of interleave16.");
  m.def("interleave_up16", &interleave_up16_array, arg("up"), "up i8 [M,R] -> layout 1, i8 [Mp,R].");
}
