// dfssm._native: the kernels over NumPy arrays, for tests and benches. Nothing is converted: an array of
// another dtype, shape or memory order is a ValueError. Outputs are new arrays, or `out` where it is given.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "dfssm_opset.h"
#include "kernels.h"

namespace py = pybind11;

namespace dfssm {

namespace {

using opset::Error, opset::Tensor, opset::TensorSpec, opset::fail, opset::quoted;
using Shape = std::vector<py::ssize_t>;

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string name_of(const py::dtype& dtype) { return py::str(dtype.attr("name")); }

// f(), or its Error as a ValueError that names `where`.
template <class F>
auto named(const char* where, F&& f) {
  try {
    return f();
  } catch (const Error& e) {
    throw py::value_error(std::string(where) + ": " + e.what());
  }
}

void check_order(const std::string& what, const py::array& a) {
  if (!(a.flags() & py::array::c_style)) fail(what + " must be in C order");
}

// `a` must be of T, have exactly this shape, and C order.
template <class T>
const T* input(const char* name, const py::array& a, const Shape& shape) {
  if (!a.dtype().equal(py::dtype::of<T>()) || shape_of(a) != shape) {
    fail(quoted(name) + " is " + name_of(a.dtype()) + " " + text(shape_of(a)) + ", expected " +
         name_of(py::dtype::of<T>()) + " " + text(shape));
  }
  check_order(quoted(name), a);
  return static_cast<const T*>(a.data());
}

const KernelTable& table_of(const std::string& isa) {
  if (const KernelTable* table = kernels_for(isa.c_str())) return *table;
  fail("isa is '" + isa + "'; this CPU can use: " + usable_names());
}

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

// One call of the op `S`: its inputs, by position or name, then its attributes, then threads, in_place and
// out.
template <class S>
class Call {
 public:
  Call(const std::string& isa, const py::args& args, const py::kwargs& kwargs) : table(table_of(isa)) {
    if (args.size() > S::kInputs + S::kOp.attribute_count) fail("too many arguments");
    for (size_t i = 0; i < args.size(); ++i) {
      set(i < S::kInputs ? S::kInputSpecs[i].name : S::kAttributes[i - S::kInputs], args[i]);
    }
    for (const auto& [name, value] : kwargs) set(py::cast<std::string>(name), value);
    attributes.check();
    for (size_t i = 0; i < S::kInputs; ++i) read(i);
    for (size_t i = 0; i < S::kInputs; ++i) {
      const int of = S::kInputSpecs[i].scale_of;
      if (of >= 0 && inputs[of].present)
        check_scale(S::kOp, i, inputs[i].present, arrays_[of].dtype().equal(py::dtype::of<int8_t>()));
    }
    sizes = S::bind(inputs.data(), attributes);
  }

  const Tensor& operator[](size_t input) const { return inputs[input]; }
  const py::array& array(size_t input) const { return arrays_[input]; }
  // Of a bound input: its columns from `start` on, and the distance from one token to the next.
  const float* columns(size_t input, int64_t start, int64_t& stride) const {
    stride = inputs[input].last();
    return inputs[input].template as<float>() + (start < 0 ? 0 : start);
  }

  // The output of `width` columns a token, of as many leading dimensions as input 0.
  float* tokens(int64_t width) {
    Shape shape = shape_of(arrays_[0]);
    shape.back() = width;
    if (!out_) return static_cast<float*>(add(py::array(py::dtype::of<float>(), shape)));
    input<float>("out", *out_, shape);
    if (!out_->writeable()) fail("'out' is read-only");
    return static_cast<float*>(add(*out_));
  }
  // The output that is like an input: that itself, or a new one.
  void* updated(size_t input) {
    const py::array& a = arrays_[input];
    return add(in_place_ ? a : py::array(a.dtype(), shape_of(a)));
  }

  py::object outputs() const {
    return outputs_.size() == 1 ? outputs_[0] : py::object(py::tuple(py::cast(outputs_)));
  }

  template <class Body>
  void parallel(int64_t units, int64_t unit, const Body& body) const {
    dfssm::parallel(threads_, units, unit, body);
  }

  const KernelTable& table;
  typename S::Attributes attributes;
  typename S::Sizes sizes;
  std::array<Tensor, S::kInputs> inputs;

 private:
  void set(const std::string& name, const py::handle& value) {
    for (size_t i = 0; i < S::kInputs; ++i) {
      if (name == S::kInputSpecs[i].name) {
        inputs[i].present = !value.is_none();
        if (inputs[i].present) arrays_[i] = py::cast<py::array>(value);
        return;
      }
    }
    if (name == "threads") {
      threads_ = py::cast<int>(value);
    } else if (name == "in_place") {
      in_place_ = py::cast<bool>(value);
    } else if (name == "out") {
      if (!value.is_none()) out_ = py::cast<py::array>(value);
    } else if (!opset::has_attribute(S::kOp, name.c_str())) {
      opset::unknown_attribute(S::kOp, name);
    }
    attributes.visit([&](const char* attribute, auto& member) {
      if (name == attribute) assign(attribute, member, value);
    });
  }

  template <class T>
  static void assign(const char* attribute, T& member, const py::handle& value) {
    constexpr const char* kExpected = std::is_same_v<T, int64_t> ? "an integer"
                                      : std::is_same_v<T, float> ? "a float"
                                                                 : "a string";
    try {
      member = py::cast<T>(value);
    } catch (const py::cast_error&) {
      fail("attribute " + quoted(attribute) + " is " + std::string(py::str(py::type::of(value))) +
           ", expected " + kExpected);
    }
  }

  // Takes an array as the schema's tensor; activations may lack leading dimensions.
  void read(size_t input) {
    Tensor& tensor = inputs[input];
    if (!tensor.present) return;
    const TensorSpec& spec = S::kInputSpecs[input];
    const py::array& a = arrays_[input];
    const std::string dtype = name_of(a.dtype());
    if (!dtype_allowed(spec, dtype)) opset::wrong_dtype(S::kOp, input, dtype.c_str());
    check_order("input " + quoted(spec.name), a);
    Shape shape = shape_of(a);
    const bool tokens = spec.rank == 3 && spec.dims[1].text == std::string("T");
    if (tokens && shape.size() < 3) shape.insert(shape.begin(), 3 - shape.size(), 1);
    set_dims(spec, tensor, shape.data(), shape.size());
    tensor.data = a.data();
  }

  static bool dtype_allowed(const TensorSpec& spec, const std::string& dtype) {
    const std::string names = " or " + std::string(spec.dtype_names) + " or ";
    return names.find(" or " + dtype + " or ") != std::string::npos;
  }

  void* add(py::array a) {
    outputs_.push_back(a);
    return a.mutable_data();
  }

  std::array<py::array, S::kInputs> arrays_;
  std::vector<py::object> outputs_;
  std::optional<py::array> out_;
  int threads_ = 1;
  bool in_place_ = false;
};

// ---- Ops ----

void run(Call<opset::BinaryScaffoldMatMul>& call) {
  using S = opset::BinaryScaffoldMatMul;
  const int64_t K = call.sizes.K, M = call.sizes.M, R = call.sizes.R, n = call.sizes.B * call.sizes.T;
  const KernelTable& table = call.table;
  ScaffoldArgs args{};
  args.bits = call[S::k_bits].as<uint8_t>();
  args.scale = call[S::k_scale].as<float>();
  args.up = call[S::k_up].as<int8_t>();
  args.up_scale = call[S::k_up_scale].as<float>();
  args.y = call.tokens(M);
  args.layout = static_cast<int>(call.attributes.layout);
  args.planes = static_cast<int>(call.attributes.planes);

  const Quantized tokens(table, call[S::k_x].as<float>(), n, K);
  const size_t packed_bytes = args.layout == opset::kRow16 ? table.scaffold_pack_bytes(n, K) : 0;
  const std::unique_ptr<std::byte[]> packed(packed_bytes ? new std::byte[packed_bytes] : nullptr);
  if (packed) table.scaffold_pack(tokens.q.data(), n, K, packed.get());
  std::vector<float> h(n * R);
  const Int8Args low{tokens.q.data(),
                     tokens.s.data(),
                     tokens.sum.data(),
                     call[S::k_down].as<int8_t>(),
                     call[S::k_down_scale].as<float>(),
                     h.data(),
                     R,
                     n,
                     K,
                     R};
  if (R > 0) table.int8_matmul(low, 0, R);

  args.q = tokens.q.data();
  args.packed = packed.get();
  args.s = tokens.s.data();
  args.sum = tokens.sum.data();
  args.h = h.data();
  args.ldy = M;
  args.n = n, args.K = K, args.M = M, args.R = R;
  call.parallel(M, 32, [&](int64_t m0, int64_t m1) { table.scaffold_matmul(args, m0, m1); });
}

void run(Call<opset::Int8MatMul>& call) {
  using S = opset::Int8MatMul;
  const int64_t K = call.sizes.K, M = call.sizes.M, n = call.sizes.B * call.sizes.T;
  const Quantized tokens(call.table, call[S::k_x].as<float>(), n, K);
  const Int8Args args{tokens.q.data(),
                      tokens.s.data(),
                      tokens.sum.data(),
                      call[S::k_w].as<int8_t>(),
                      call[S::k_w_scale].as<float>(),
                      call.tokens(M),
                      M,
                      n,
                      K,
                      M};
  call.parallel(M, 4, [&](int64_t m0, int64_t m1) { call.table.int8_matmul(args, m0, m1); });
}

void run(Call<opset::CausalConv1dStep>& call) {
  using S = opset::CausalConv1dStep;
  ConvArgs args{};
  args.B = call.sizes.B, args.T = call.sizes.T, args.C = call.sizes.C, args.W = call.sizes.W;
  args.x = call.columns(S::k_x, call.attributes.x_start, args.x_stride);
  args.state = call[S::k_state].as<float>();
  args.weight = call[S::k_weight].as<float>();
  args.bias = call[S::k_bias].as<float>();
  args.y = call.tokens(args.C);
  args.new_state = static_cast<float*>(call.updated(S::k_state));
  args.silu = call.attributes.activation == "silu";
  call.parallel(args.C, 16, [&](int64_t c0, int64_t c1) { call.table.causal_conv1d(args, c0, c1); });
}

void run(Call<opset::SelectiveScanStep>& call) {
  using S = opset::SelectiveScanStep;
  const S::Attributes& a = call.attributes;
  const py::ssize_t item = call.array(S::k_state).itemsize();
  ScanArgs args{};
  args.state_type = item == 4 ? StateType::f32 : item == 2 ? StateType::f16 : StateType::i8;
  args.B = call.sizes.B, args.T = call.sizes.T, args.H = call.sizes.H, args.P = call.sizes.P;
  args.N = call.sizes.N, args.G = a.ngroups;
  args.dt_min = a.dt_min, args.dt_max = a.dt_max;
  args.x = call.columns(S::k_x, a.x_start, args.x_stride);
  args.dt = call.columns(S::k_dt, a.dt_start, args.dt_stride);
  args.Bm = call.columns(S::k_B, a.B_start, args.B_stride);
  args.Cm = call.columns(S::k_C, a.C_start, args.C_stride);
  args.A_log = call[S::k_A_log].as<float>();
  args.D = call[S::k_D].as<float>();
  args.dt_bias = call[S::k_dt_bias].as<float>();
  args.state = call[S::k_state].data;
  args.y = call.tokens(args.H * args.P);
  args.new_state = call.updated(S::k_state);
  if (args.state_type == StateType::i8) {
    args.state_scale = call[S::k_state_scale].as<float>();
    args.new_state_scale = static_cast<float*>(call.updated(S::k_state_scale));
  }
  const size_t scratch_bytes = call.table.selective_scan_bytes(args);
  call.parallel(args.B * args.H, 1, [&](int64_t i0, int64_t i1) {
    const std::unique_ptr<std::byte[]> scratch(new std::byte[scratch_bytes]);
    call.table.selective_scan(args, i0, i1, scratch.get());
  });
}

template <class S>
void norm(Call<S>& call, NormArgs args) {
  args.n = call.sizes.B * call.sizes.T, args.C = call.sizes.C;
  args.weight = call[S::k_weight].template as<float>();
  args.out = call.tokens(args.C);
  args.eps = call.attributes.eps;
  call.parallel(args.n, 1, [&](int64_t t0, int64_t t1) { call.table.rms_norm(args, t0, t1); });
}

void run(Call<opset::GatedRMSNorm>& call) {
  using S = opset::GatedRMSNorm;
  NormArgs args{};
  args.y = call[S::k_y].as<float>();
  args.z = call.columns(S::k_z, call.attributes.z_start, args.z_stride);
  args.groups = call.attributes.groups;
  norm(call, args);
}

void run(Call<opset::RMSNorm>& call) {
  NormArgs args{};
  args.y = call[opset::RMSNorm::k_x].as<float>();
  args.groups = 1;
  norm(call, args);
}

template <class S>
void define(py::module_& m) {
  std::string doc = std::string(S::kName) + "(isa";
  for (const TensorSpec& spec : S::kInputSpecs) doc += std::string(", ") + spec.name + " " + shape_text(spec);
  for (size_t i = 0; i < S::kOp.attribute_count; ++i) doc += std::string(", ") + S::kAttributes[i];
  doc +=
      ", threads=1, in_place=False, out=None): opset/ops/. Leading dimensions of activations may be left "
      "out.";
  m.def(
      S::kName,
      [](const std::string& isa, const py::args& args, const py::kwargs& kwargs) {
        return named(S::kName, [&] {
          Call<S> call(isa, args, kwargs);
          run(call);
          return call.outputs();
        });
      },
      doc.c_str());
}

py::tuple quantize_activations(const std::string& isa, const py::array& x) {
  return named("quantize_activations", [&] {
    const KernelTable& table = table_of(isa);
    if (x.ndim() != 2) fail("'x' has shape " + text(shape_of(x)) + ", expected [n, K]");
    const py::ssize_t n = x.shape(0), K = x.shape(1);
    const float* values = input<float>("x", x, {n, K});
    py::array_t<int8_t> q({n, K});
    py::array_t<float> s(n);
    py::array_t<int32_t> sum(n);
    table.quantize_activations(values, n, K, q.mutable_data(), s.mutable_data(), sum.mutable_data());
    return py::make_tuple(q, s, sum);
  });
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
  m.doc() =
      "The CPU kernels of dfssm over NumPy arrays, one function an op, named as it; `isa` is one of isas().";
  m.def("isas", &isas, "Names of the kernel tables this CPU can run, the plainest first.");
  m.def("default_isa", &default_isa,
        "Name of the table in use: DFSSM_ISA if set (ValueError if unusable), or the best.");
  m.def("quantize_activations", &quantize_activations, arg("isa"), arg("x"),
        "x f32 [n,K] -> q i8 [n,K], s f32 [n], sum i32 [n].");
#define DEFINE(op) define<opset::op>(m);
  DFSSM_OPS(DEFINE)
#undef DEFINE
}
