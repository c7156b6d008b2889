// Tensors, and the check of a call against an op: opset/schema.py in C++, in the same words. header.py writes
// this at the top of dfssm_opset.h, and the ops as data behind it.
//
// Messages name the input or attribute, what it is and what was expected; who throws them on says of which op
// and node.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace dfssm::opset {

// A message to the user.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr size_t kMaxRank = 4;

// A dimension that is not known yet, while a graph is built; it fits anything.
inline constexpr int64_t kOpen = -1;

// One input. `data` is nullptr where the tensor is empty, and as long as only shapes are asked for.
struct Tensor {
  bool present = false;
  bool words = false;  // bytes as words of 32 bits: the last dimension is a quarter
  size_t rank = 0;
  std::array<int64_t, kMaxRank> dims{};
  const void* data = nullptr;

  int64_t operator[](size_t axis) const { return dims[axis]; }
  int64_t last() const { return dims[rank - 1]; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// ---- Schemas, as header.py writes them. Symbols are numbered: sizes first, then integer attributes ----

enum DType : uint8_t { kFloat32 = 1, kFloat16 = 2, kBFloat16 = 4, kInt8 = 8, kUInt8 = 16 };

// A dimension: a symbol, or what `operation` makes of it and of another symbol or, where that is -1, of a
// number: '*', '/', '-', '+', or 'p': padded to whole tiles of the layout.
struct Dim {
  const char* text;
  int symbol;
  char operation;
  int other;
  int64_t number;
};

struct TensorSpec {
  const char* name;
  unsigned dtypes;          // the DTypes it may have
  const char* dtype_names;  // for messages
  size_t rank;
  Dim dims[kMaxRank];
  int start;     // symbol of the attribute with the first column read of it; -1: always whole
  int scale_of;  // the input whose scales it is, there if and only if that is int8; -1: always there
  int over;      // of an output: the input that it may overwrite, and whose dtype it has; -1: none
};

// A size must be a multiple of `other` ('m'), be in [least, most] ('b'), or fit behind attribute `other`
// within the size `within` ('w'). A symbol of -1 is a number, in `least`.
struct Rule {
  char kind;
  int symbol, other;
  int64_t least, most;
  const char* reason;
  int within;
};

struct Op {
  const char* name;
  const TensorSpec* inputs;
  size_t input_count, required_inputs;
  const TensorSpec* outputs;
  size_t output_count, required_outputs;
  const char* const* attributes;
  size_t attribute_count;
  const char* const* symbols;
  int size_count, symbol_count;
  uint32_t may_be_zero;  // bits of symbols; all others are at least 1
  const Rule* rules;
  size_t rule_count;
};

// `rows` in whole tiles of a layout.
inline int64_t padded(int64_t rows, int64_t layout);

// ---- Attributes ----

[[noreturn]] inline void fail(const std::string& message) { throw Error(message); }

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }
inline std::string shown(int64_t value) { return std::to_string(value); }
inline std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

inline void check_least(const char* name, int64_t value, int64_t least) {
  if (value < least)
    fail("attribute " + quoted(name) + " is " + shown(value) + ", expected at least " + shown(least));
}
inline void check_least(const char* name, float value, int64_t least) {
  if (!(value >= static_cast<float>(least)) || std::isinf(value)) {
    fail("attribute " + quoted(name) + " is " + shown(double{value}) +
         ", expected a number >= " + shown(least));
  }
}
inline void check_at_most(const char* name, float value, const char* bound, float most) {
  if (!(value <= most)) {
    fail("attribute " + quoted(name) + " is " + shown(double{value}) + ", expected at most " + quoted(bound) +
         " = " + shown(double{most}));
  }
}
template <class T>
void check_choice(const char* name, const T& value, std::initializer_list<T> choices) {
  const auto text = [](const T& one) {
    if constexpr (std::is_same_v<T, std::string>) {
      return quoted(one);
    } else {
      return shown(one);
    }
  };
  std::string expected;
  for (const T& choice : choices) {
    if (choice == value) return;
    expected += (expected.empty() ? "" : " or ") + text(choice);
  }
  fail("attribute " + quoted(name) + " is " + text(value) + ", expected " + expected);
}

inline bool has_attribute(const Op& op, const char* name) {
  for (size_t i = 0; i < op.attribute_count; ++i) {
    if (std::strcmp(op.attributes[i], name) == 0) return true;
  }
  return false;
}
[[noreturn]] inline void unknown_attribute(const std::string& name, const std::vector<std::string>& known) {
  std::string names;
  for (const std::string& one : known) names += (names.empty() ? "" : ", ") + one;
  fail("unknown attribute " + quoted(name) + "; known: " + (names.empty() ? "none" : names));
}
[[noreturn]] inline void unknown_attribute(const Op& op, const std::string& name) {
  unknown_attribute(name, {op.attributes, op.attributes + op.attribute_count});
}

// ---- Inputs ----

[[noreturn]] inline void wrong_dtype(const Op& op, size_t input, const char* dtype) {
  const TensorSpec& spec = op.inputs[input];
  fail("input " + quoted(spec.name) + " has dtype " + dtype + ", expected " + spec.dtype_names);
}

inline std::string shape_text(const TensorSpec& spec) {
  std::string text = "[";
  for (size_t i = 0; i < spec.rank; ++i) text += (i ? ", " : "") + std::string(spec.dims[i].text);
  return text + "]";
}

// Gives `tensor` its dimensions.
template <class It>
void set_dims(const TensorSpec& spec, Tensor& tensor, It dims, size_t rank) {
  if (rank > kMaxRank) {
    std::string shape;
    for (size_t i = 0; i < rank; ++i) shape += (i ? ", " : "") + std::to_string(dims[i]);
    fail("input " + quoted(spec.name) + " has shape [" + shape + "], expected " + shape_text(spec));
  }
  tensor.rank = rank;
  std::copy_n(dims, rank, tensor.dims.begin());
}

// Of an input with `scale_of`: whether it is there, and whether that one is int8.
inline void check_scale(const Op& op, size_t input, bool present, bool int8) {
  if (present == int8) return;
  const TensorSpec& spec = op.inputs[input];
  const std::string of = quoted(op.inputs[spec.scale_of].name);
  fail("input " + quoted(spec.name) + " is " +
       (int8 ? "missing, expected " + shape_text(spec) + " for " + of + " of int8"
             : "present, expected none: " + of + " is not int8"));
}

namespace detail {

inline constexpr int64_t kUnbound = -2;

inline bool known(int64_t size) { return size >= 0; }

// What the dimension is, kOpen where that is not known.
[[gnu::always_inline]] inline int64_t value(const Dim& dim, const int64_t* sizes) {
  const int64_t size = sizes[dim.symbol], other = dim.other < 0 ? dim.number : sizes[dim.other];
  if (dim.operation == 0) return known(size) ? size : kOpen;
  if (!known(size) || !known(other)) return kOpen;
  switch (dim.operation) {
    case '*':
      return size * other;
    case '/':
      return size / other;
    case '-':
      return size - other;
    case '+':
      return size + other;
    default:
      return padded(size, other);
  }
}

// Of a tensor with the leading dimension `planes`: 1 where that is 1 and so not there.
[[gnu::always_inline]] inline size_t left_out(const Op& op, const TensorSpec& spec, const int64_t* sizes) {
  const int lead = spec.dims[0].symbol;
  // The upper bound is for gcc 12, which inlines this into ops without integer attributes and warns.
  return spec.dims[0].operation == 0 && lead >= op.size_count && lead < op.symbol_count && sizes[lead] == 1;
}

[[noreturn]] inline void wrong_shape(const Op& op, const TensorSpec& spec, const Tensor& got,
                                     const int64_t* sizes, const char* rule = "") {
  std::string shape, expected;
  for (size_t i = 0; i < got.rank; ++i) shape += (i ? ", " : "") + (got[i] == kOpen ? "?" : shown(got[i]));
  const size_t first = left_out(op, spec, sizes);
  for (size_t i = first; i < spec.rank; ++i) {
    const Dim& dim = spec.dims[i];
    int64_t size = value(dim, sizes);
    std::string text = dim.text;
    const bool last = i + 1 == spec.rank;
    if (last && got.words) {
      if (dim.operation == '/' && dim.other < 0) {
        text = op.symbols[dim.symbol] + std::string(" / ") + shown(dim.number * 4);
      } else {
        text += " / 4";
      }
      if (known(size)) size /= 4;
    }
    if (known(size)) text += (text.find(' ') == std::string::npos ? "=" : " = ") + shown(size);
    if (last && spec.start >= 0 && sizes[spec.start] >= 0) {
      text = std::string(">= ") + op.symbols[spec.start] + "=" + shown(sizes[spec.start]) + " + " + text;
    }
    expected += (i > first ? ", " : "") + text;
  }
  fail("input " + quoted(spec.name) + " has shape [" + shape + "], expected [" + expected + "]" + rule);
}

// As wrong_shape, while no size is bound.
[[noreturn]] inline void wrong_symbols(const Op& op, const TensorSpec& spec, const Tensor& got,
                                       const int64_t* sizes, const char* rule = "") {
  std::vector<int64_t> unbound(sizes, sizes + op.symbol_count);
  std::fill_n(unbound.begin(), op.size_count, kUnbound);
  wrong_shape(op, spec, got, unbound.data(), rule);
}

[[noreturn]] inline void broken(const Op& op, int symbol, const int64_t* sizes, const std::string& expected) {
  for (size_t i = 0; i < op.input_count; ++i) {
    const TensorSpec& spec = op.inputs[i];
    for (size_t axis = 0; axis < spec.rank; ++axis) {
      if (spec.dims[axis].operation || spec.dims[axis].symbol != symbol) continue;
      fail("input " + quoted(spec.name) + " has " + op.symbols[symbol] + "=" + shown(sizes[symbol]) +
           ", expected " + expected);
    }
  }
  fail(std::string(op.symbols[symbol]) + "=" + shown(sizes[symbol]) + ", expected " + expected);
}

[[gnu::always_inline]] inline void check_rule(const Op& op, const Rule& rule, const int64_t* sizes) {
  const int64_t size = sizes[rule.symbol], other = rule.other < 0 ? rule.least : sizes[rule.other];
  if (!known(size)) return;
  const auto text = [&](int symbol) { return op.symbols[symbol] + ("=" + shown(sizes[symbol])); };
  if (rule.kind == 'm') {
    if (size % other) {
      broken(op, rule.symbol, sizes,
             "a multiple of " + (rule.other < 0 ? shown(rule.least) : text(rule.other)));
    }
  } else if (rule.kind == 'b') {
    if (size < rule.least || size > rule.most) {
      const std::string why = *rule.reason ? ": " + std::string(rule.reason) : "";
      broken(op, rule.symbol, sizes, shown(rule.least) + " to " + shown(rule.most) + why);
    }
  } else if (known(sizes[rule.within]) && sizes[rule.within] - size < other) {
    broken(op, rule.symbol, sizes,
           text(rule.other) + " + " + op.symbols[rule.symbol] + " <= " + text(rule.within));
  }
}

// Binds the symbols of `spec` that `tensor` is the first to have.
[[gnu::always_inline]] inline void bind_symbols(const Op& op, const TensorSpec& spec, const Tensor& tensor,
                                                int64_t* sizes) {
  const size_t first = left_out(op, spec, sizes);
  if (tensor.rank != spec.rank - first) wrong_symbols(op, spec, tensor, sizes);
  const size_t bound = spec.start >= 0 && sizes[spec.start] >= 0 ? spec.rank - 1 : spec.rank;
#pragma GCC unroll 16
  for (size_t i = first; i < bound; ++i) {
    const Dim& dim = spec.dims[i];
    if (dim.operation || dim.symbol >= op.size_count) continue;
    int64_t size = tensor[i - first];
    if (size != kOpen && size < 1 && !(op.may_be_zero >> dim.symbol & 1)) {
      wrong_symbols(op, spec, tensor, sizes, ", every dimension at least 1");
    }
    if (i + 1 == spec.rank && tensor.words && size != kOpen) size *= 4;
    if (!known(sizes[dim.symbol])) sizes[dim.symbol] = size;
  }
}

[[gnu::always_inline]] inline void check_shape(const Op& op, const TensorSpec& spec, const Tensor& tensor,
                                               const int64_t* sizes) {
  const size_t first = left_out(op, spec, sizes);
#pragma GCC unroll 16
  for (size_t i = first; i < spec.rank; ++i) {
    const int64_t got = tensor[i - first];
    int64_t wanted = value(spec.dims[i], sizes);
    if (got == kOpen || wanted == kOpen) continue;
    bool fits = got == wanted;
    if (i + 1 == spec.rank) {
      if (tensor.words && wanted % 4) {
        fail("input " + quoted(spec.name) + " is in words of 32 bits, expected " + spec.dims[i].text + "=" +
             shown(wanted) + " to be a multiple of 4");
      }
      if (tensor.words) fits = got * 4 == wanted;
      if (spec.start >= 0 && sizes[spec.start] >= 0)
        fits = got >= wanted && got - wanted >= sizes[spec.start];
    }
    if (!fits) wrong_shape(op, spec, tensor, sizes);
  }
}

}  // namespace detail

// Checks `inputs` against `op`, and binds the sizes; `sizes` holds the integer attributes behind their
// places. Throws Error. Sizes that no input shows are kOpen.
[[gnu::always_inline]] inline void bind(const Op& op, const Tensor* inputs, int64_t* sizes) {
#pragma GCC unroll 16
  for (int i = 0; i < op.size_count; ++i) sizes[i] = detail::kUnbound;
#pragma GCC unroll 16
  for (size_t i = 0; i < op.input_count; ++i) {
    const TensorSpec& spec = op.inputs[i];
    if (inputs[i].present) {
      detail::bind_symbols(op, spec, inputs[i], sizes);
    } else if (spec.scale_of < 0) {
      fail("input " + quoted(spec.name) + " is missing");
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < op.size_count; ++i) {
    if (sizes[i] == detail::kUnbound) sizes[i] = kOpen;
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < op.rule_count; ++i) detail::check_rule(op, op.rules[i], sizes);
#pragma GCC unroll 16
  for (size_t i = 0; i < op.input_count; ++i) {
    if (inputs[i].present) detail::check_shape(op, op.inputs[i], inputs[i], sizes);
  }
}

}  // namespace dfssm::opset
