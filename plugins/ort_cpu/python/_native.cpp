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

#include "ops/call.h"

namespace py = pybind11;

namespace dfssm {

namespace {

using opset::Error, opset::TensorSpec, opset::fail, opset::quoted;
using Shape = std::vector<py::ssize_t>;

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

std::string name_of(const py::dtype& dtype) { return py::str(dtype.attr("name")); }

// 0: none of the schemas'.
opset::DType type_of(const py::dtype& dtype) {
  if (dtype.equal(py::dtype::of<float>())) return opset::kFloat32;
  if (dtype.equal(py::dtype("float16"))) return opset::kFloat16;
  if (dtype.equal(py::dtype::of<int8_t>())) return opset::kInt8;
  if (dtype.equal(py::dtype::of<uint8_t>())) return opset::kUInt8;
  return opset::DType{};
}

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

// One call of the op `S`: its inputs, by position or name, then its attributes, then threads, in_place and
// out.
template <class S>
class PythonCall final : public Call {
 public:
  PythonCall(const std::string& isa, const py::args& args, const py::kwargs& kwargs) : Call(table_of(isa)) {
    if (args.size() > S::kInputs + S::kOp.attribute_count) fail("too many arguments");
    for (size_t i = 0; i < args.size(); ++i) {
      set(i < S::kInputs ? S::kInputSpecs[i].name : S::kAttributes[i - S::kInputs], args[i]);
    }
    for (const auto& [name, value] : kwargs) set(py::cast<std::string>(name), value);
    attributes_.check();
    for (size_t i = 0; i < S::kInputs; ++i) read(i);
    for (size_t i = 0; i < S::kInputs; ++i) {
      const int of = S::kInputSpecs[i].scale_of;
      if (of >= 0 && inputs_[of].present)
        check_scale(S::kOp, i, inputs_[i].present, types_[of] == opset::kInt8);
    }
  }

  py::object operator()() {
    run<S>(*this, attributes_, S::bind(inputs_.data(), attributes_));
    return outputs_.size() == 1 ? outputs_[0] : py::object(py::tuple(py::cast(outputs_)));
  }

 private:
  // Blocks of units for each of the threads.
  void share_out(int64_t units, double, Range range, const void* f) override {
    const py::gil_scoped_release release;
    const int64_t count = std::clamp<int64_t>(threads_, 1, units);
    const auto block = [&](int64_t i) { range(f, units * i / count, units * (i + 1) / count); };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < count; ++i) others.emplace_back(block, i);
    block(0);
    for (std::thread& other : others) other.join();
  }

  // The first output has as many leading dimensions as input 0, and may be given; the others are updated inputs.
  void* output_data(size_t index, const int64_t* shape, size_t rank) override {
    if constexpr (size_t{S::kOutputs} > 1) {
      if (index > 0) {
        const py::array& a = arrays_[S::kOutputSpecs[index].over];
        return add(in_place_ ? a : py::array(a.dtype(), shape_of(a)));
      }
    }
    Shape tokens = shape_of(arrays_[0]);
    tokens.back() = shape[rank - 1];
    if (!out_) return add(py::array(py::dtype::of<float>(), tokens));
    input<float>("out", *out_, tokens);
    if (!out_->writeable()) fail("'out' is read-only");
    return add(*out_);
  }

  void set(const std::string& name, const py::handle& value) {
    for (size_t i = 0; i < S::kInputs; ++i) {
      if (name == S::kInputSpecs[i].name) {
        inputs_[i].present = !value.is_none();
        if (inputs_[i].present) arrays_[i] = py::cast<py::array>(value);
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
    attributes_.visit([&](const char* attribute, auto& member) {
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
    Tensor& tensor = inputs_[input];
    if (!tensor.present) return;
    const TensorSpec& spec = S::kInputSpecs[input];
    const py::array& a = arrays_[input];
    types_[input] = type_of(a.dtype());
    if (!(spec.dtypes & types_[input])) opset::wrong_dtype(S::kOp, input, name_of(a.dtype()).c_str());
    check_order("input " + quoted(spec.name), a);
    Shape shape = shape_of(a);
    const bool tokens = spec.rank == 3 && spec.dims[1].text == std::string("T");
    if (tokens && shape.size() < 3) shape.insert(shape.begin(), 3 - shape.size(), 1);
    set_dims(spec, tensor, shape.data(), shape.size());
    tensor.data = a.data();
  }

  void* add(py::array a) {
    outputs_.push_back(a);
    return a.mutable_data();
  }

  typename S::Attributes attributes_;
  std::array<py::array, S::kInputs> arrays_;
  std::vector<py::object> outputs_;
  std::optional<py::array> out_;
  int threads_ = 1;
  bool in_place_ = false;
};

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
        return named(S::kName, [&] { return PythonCall<S>(isa, args, kwargs)(); });
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
  DFSSM_DEFERRED_OPS(DEFINE)
#undef DEFINE
}
