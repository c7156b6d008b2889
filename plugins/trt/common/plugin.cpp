#include "common/plugin.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>

namespace dfssm::trt {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

namespace {

// Name of a type as NumPy spells it, for messages.
const char* type_name(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kUINT8:
      return "uint8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    default:
      return "of another kind";
  }
}

bool allowed(Type type, DataType actual) {
  switch (type) {
    case Type::activation:
      return actual == DataType::kFLOAT || actual == DataType::kHALF || actual == DataType::kBF16;
    case Type::state:
      return actual == DataType::kFLOAT || actual == DataType::kHALF;
    case Type::f32:
      return actual == DataType::kFLOAT;
    case Type::i8:
      return actual == DataType::kINT8;
    default:
      return actual == DataType::kINT32;
  }
}

const char* allowed_names(Type type) {
  switch (type) {
    case Type::activation:
      return "float32, float16 or bfloat16";
    case Type::state:
      return "float32 or float16 (int8 with attribute int8_state = 1)";
    case Type::f32:
      return "float32";
    case Type::i8:
      return "int8";
    default:
      return "int32 (words of 32 bits)";
  }
}

constexpr int32_t kDone = 0, kFailed = -1;

std::string dim_text(int64_t size) { return size == kOpen ? "?" : std::to_string(size); }

template <class It>
std::string shape_text(It begin, It end) {
  std::string text = "[";
  for (It it = begin; it != end; ++it) text += (it == begin ? "" : ", ") + dim_text(*it);
  return text + "]";
}

// The schema's symbols for a tensor of `rank` dimensions: "planes" is there only where planes > 1.
std::string symbols_text(const char* schema_shape, size_t rank) {
  std::string text = schema_shape;
  const auto commas = static_cast<size_t>(std::count(text.begin(), text.end(), ','));
  if (commas == rank) text.erase(1, text.find(", ") + 1);
  return text;
}

// Weights and states are read 16 bytes at a time. TensorRT's own memory is aligned; a caller binds states.
void check_aligned(const char* kind, const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    fail("%s '%s' is bound to address %p, expected a multiple of 16", kind, name, address);
  }
}

class Reader : public FieldVisitor {
 public:
  explicit Reader(const nvinfer1::PluginFieldCollection& fields) : fields_(fields) {}

  void operator()(const char* name, int32_t& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kINT32, "one int32")) {
      value = *static_cast<const int32_t*>(field->data);
    }
  }
  void operator()(const char* name, float& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kFLOAT32, "one float32")) {
      value = *static_cast<const float*>(field->data);
    }
  }
  void operator()(const char* name, std::string& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kCHAR, "a string")) {
      const auto* text = static_cast<const char*>(field->data);
      value.assign(text, strnlen(text, static_cast<size_t>(field->length)));  // with or without a closing NUL
    }
  }

 private:
  const PluginField* find(const char* name, PluginFieldType type, const char* expected) const {
    for (int32_t i = 0; i < fields_.nbFields; ++i) {
      const PluginField& field = fields_.fields[i];
      if (!field.name || std::strcmp(field.name, name) != 0) continue;
      const bool one = type == PluginFieldType::kCHAR || field.length == 1;
      if (field.type != type || !field.data || !one) fail("attribute '%s' is not %s", name, expected);
      return &field;
    }
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection& fields_;
};

class Lister : public FieldVisitor {
 public:
  void operator()(const char* name, int32_t& value) override {
    add(name, &value, PluginFieldType::kINT32, 1);
  }
  void operator()(const char* name, float& value) override {
    add(name, &value, PluginFieldType::kFLOAT32, 1);
  }
  void operator()(const char* name, std::string& value) override {
    add(name, value.data(), PluginFieldType::kCHAR, value.size());
  }
  std::vector<PluginField> fields;

 private:
  void add(const char* name, const void* data, PluginFieldType type, size_t length) {
    fields.emplace_back(name, data, type, static_cast<int32_t>(length));
  }
};

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(text);
}

Float float_type(DataType type) {
  return type == DataType::kFLOAT ? Float::f32 : type == DataType::kHALF ? Float::f16 : Float::bf16;
}

size_t element_size(DataType type) { return type == DataType::kFLOAT ? 4 : type == DataType::kINT8 ? 1 : 2; }

int32_t size(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max())
    fail("a size of %lld is too large", static_cast<long long>(value));
  return static_cast<int32_t>(value);
}

void check_positive(const char* attribute, int32_t value) {
  if (value < 1) fail("attribute '%s' is %d, expected at least 1", attribute, value);
}

void check_columns(int64_t K) {
  constexpr int64_t kMost = 131072;  // sums of 127 * 127 * K are exact, not saturated
  if (K > kMost) {
    fail("K is %lld, at most %lld keeps integer sums exact", static_cast<long long>(K),
         static_cast<long long>(kMost));
  }
}

// ---- Inputs, Inference ----

void Inputs::set(size_t input, DataType type, const nvinfer1::Dims& dims, const void* data) {
  Tensor& tensor = inputs_[input];
  tensor.present = true;
  tensor.type = type;
  tensor.rank = static_cast<size_t>(std::max(dims.nbDims, 0));
  tensor.data = data;
  if (tensor.rank > kMaxRank) {
    fail("input '%s' has rank %zu, expected %s", signature_.input_names[input], tensor.rank,
         signature_.input_shapes[input]);
  }
  std::copy_n(dims.d, tensor.rank, tensor.dims.begin());
  for (size_t i = 0; i < tensor.rank; ++i) {
    if (tensor.dims[i] > std::numeric_limits<int32_t>::max()) wrong_shape(input, "dimensions below 2^31");
  }
}

void Inputs::wrong_shape(size_t input, const std::string& expected) const {
  const Tensor& got = inputs_[input];
  const std::string shape =
      got.present ? "has shape " + shape_text(got.dims.begin(), got.dims.begin() + got.rank) : "is missing";
  fail("input '%s' %s, expected %s", signature_.input_names[input], shape.c_str(), expected.c_str());
}

const Tensor& Inputs::ranked(size_t input, size_t rank) const {
  const Tensor& tensor = inputs_[input];
  bool fits = tensor.present && tensor.rank == rank;
  for (size_t i = 0; fits && i < rank; ++i) fits = tensor[i] == kOpen || tensor[i] > 0;
  if (!fits) {
    wrong_shape(input, symbols_text(signature_.input_shapes[input], rank) + ", every dimension at least 1");
  }
  return tensor;
}

const Tensor& Inputs::expect(size_t input, std::initializer_list<int64_t> shape) const {
  const Tensor& tensor = inputs_[input];
  bool fits = tensor.present && tensor.rank == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    const int64_t wanted = shape.begin()[i];
    fits = tensor[i] == wanted || tensor[i] == kOpen || wanted == kOpen;
  }
  if (!fits) {
    const std::string symbols = symbols_text(signature_.input_shapes[input], shape.size());
    wrong_shape(input, shape_text(shape.begin(), shape.end()) + " from " + symbols);
  }
  return tensor;
}

Inputs::Columns Inputs::columns(size_t input, int64_t B, int64_t T, int64_t width) const {
  const int64_t start = starts_[input];
  if (start < 0) return {expect(input, {B, T, width}).data, width};
  const Tensor& tensor = ranked(input, 3);
  const auto fits = [](int64_t got, int64_t wanted) {
    return got == wanted || got == kOpen || wanted == kOpen;
  };
  const bool inside = tensor[2] == kOpen || width == kOpen || start + width <= tensor[2];
  if (!inside || !fits(tensor[0], B) || !fits(tensor[1], T)) {
    std::string symbols = signature_.input_shapes[input];
    symbols.insert(symbols.find("T, ") + 3, std::string(">= ") + signature_.input_starts[input] + " + ");
    wrong_shape(input, "[" + dim_text(B) + ", " + dim_text(T) + ", >= " + std::to_string(start) + " + " +
                           dim_text(width) + "] from " + symbols);
  }
  const auto* data = tensor.as<std::byte>();
  return {data ? data + static_cast<size_t>(start) * element_size(tensor.type) : nullptr, tensor[2]};
}

void Inference::set(size_t output, std::initializer_list<Dim> shape) {
  outputs_[output].nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), outputs_[output].d);
}

// ---- Plugin ----

void Plugin::set_node(const char* node) {
  where_ = signature_.name;
  if (node && *node) where_ += " '" + std::string(node) + "'";
}

void Plugin::visit_all(FieldVisitor& visit) {
  attributes(visit);
  for (size_t i = 0; i < signature_.inputs; ++i) {
    if (signature_.input_starts[i]) visit(signature_.input_starts[i], starts_[i]);
  }
}

void Plugin::read(const nvinfer1::PluginFieldCollection& fields) {
  Reader reader(fields);
  visit_all(reader);
  check_attributes();
  for (size_t i = 0; i < signature_.inputs; ++i) {
    if (starts_[i] < -1) {
      fail("attribute '%s' is %d, expected at least -1", signature_.input_starts[i], starts_[i]);
    }
  }
}

std::vector<PluginField> Plugin::fields(bool values) {
  Lister lister;
  visit_all(lister);
  for (PluginField& field : lister.fields) {
    if (!values) field.data = nullptr;
  }
  return std::move(lister.fields);
}

void Plugin::check_arity(int32_t inputs, int32_t outputs) const {
  if (inputs != static_cast<int32_t>(input_count()) || outputs != static_cast<int32_t>(output_count())) {
    fail("%d inputs and %d outputs, expected %zu and %zu", inputs, outputs, input_count(), output_count());
  }
}

// Activations of one node have one type, that of input 0.
bool Plugin::type_fits(size_t input, DataType type, DataType first) const {
  const Type wanted = input_type(input);
  return allowed(wanted, type) && (wanted != Type::activation || type == first);
}

DataType Plugin::output_type(size_t output, const DataType* inputs) const {
  if (signature_.aliases[output] != kNoAlias) return inputs[signature_.aliases[output]];
  return signature_.output_types[output] == Type::activation ? inputs[0] : DataType::kFLOAT;
}

Inputs Plugin::from(const nvinfer1::DimsExprs* inputs) const {
  Inputs known(signature_, starts_);
  for (size_t i = 0; i < input_count(); ++i) {
    nvinfer1::Dims dims{inputs[i].nbDims, {}};
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const nvinfer1::IDimensionExpr& dim = *inputs[i].d[axis];
      dims.d[axis] = dim.isConstant() ? dim.getConstantValue() : kOpen;
    }
    known.set(i, DataType::kFLOAT, dims);
  }
  return known;
}

Inputs Plugin::from(const DynamicPluginTensorDesc* inputs,
                    nvinfer1::Dims DynamicPluginTensorDesc::* bound) const {
  Inputs known(signature_, starts_);
  for (size_t i = 0; i < input_count(); ++i) known.set(i, inputs[i].desc.type, inputs[i].*bound);
  return known;
}

Inputs Plugin::from(const PluginTensorDesc* descs, const void* const* data) const {
  Inputs known(signature_, starts_);
  for (size_t i = 0; i < input_count(); ++i) {
    const void* address = data ? data[i] : nullptr;
    if (input_type(i) != Type::activation) check_aligned("input", signature_.input_names[i], address);
    known.set(i, descs[i].type, descs[i].dims, address);
  }
  return known;
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t outputs_given, const DataType* inputs,
                                   int32_t inputs_given) const noexcept {
  return guarded(where(), kFailed, [&] {
    check_arity(inputs_given, outputs_given);
    for (size_t i = 0; i < input_count(); ++i) {
      if (!allowed(input_type(i), inputs[i])) {
        fail("input '%s' has dtype %s, expected %s", signature_.input_names[i], type_name(inputs[i]),
             allowed_names(input_type(i)));
      }
      if (!type_fits(i, inputs[i], inputs[0])) {
        fail("input '%s' has dtype %s, expected that of '%s', %s", signature_.input_names[i],
             type_name(inputs[i]), signature_.input_names[0], type_name(inputs[0]));
      }
    }
    for (size_t i = 0; i < output_count(); ++i) outputs[i] = output_type(i, inputs);
    return kDone;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t inputs_given,
                                const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                int32_t outputs_given, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(where(), kFailed, [&] {
    check_arity(inputs_given, outputs_given);
    check_shapes(from(inputs));
    Inference inference(inputs, outputs, builder);
    infer(inference);
    return kDone;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t inputs_given, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position < inputs_given)
    return type_fits(static_cast<size_t>(position), tensor.type, tensors[0].desc.type);
  std::array<DataType, kMaxInputs> inputs;
  for (size_t i = 0; i < input_count(); ++i) inputs[i] = tensors[i].desc.type;
  return tensor.type == output_type(static_cast<size_t>(position - inputs_given), inputs.data());
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t inputs_given,
                                const DynamicPluginTensorDesc*, int32_t outputs_given) noexcept {
  return guarded(where(), kFailed, [&] {
    check_arity(inputs_given, outputs_given);
    check_shapes(from(inputs, &DynamicPluginTensorDesc::min));
    check_shapes(from(inputs, &DynamicPluginTensorDesc::max));
    return kDone;
  });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t inputs_given,
                                const DynamicPluginTensorDesc*, int32_t outputs_given) const noexcept {
  return guarded(where(), size_t{0}, [&] {
    check_arity(inputs_given, outputs_given);
    return workspace(from(inputs, &DynamicPluginTensorDesc::max));
  });
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t inputs_given, const PluginTensorDesc*,
                              int32_t outputs_given) noexcept {
  return guarded(where(), kFailed, [&] {
    check_arity(inputs_given, outputs_given);
    check_shapes(from(inputs, nullptr));
    return kDone;
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(where(), kFailed, [&] {
    for (size_t i = 0; i < output_count(); ++i) {
      if (signature_.aliases[i] != kNoAlias) check_aligned("output", signature_.output_names[i], outputs[i]);
    }
    const cudaError_t error = launch(from(descs, inputs), {outputs, workspace, stream});
    if (error != cudaSuccess) fail("the launch failed: %s", cudaGetErrorString(error));
    return kDone;
  });
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return guarded(where(), static_cast<const nvinfer1::PluginFieldCollection*>(nullptr), [&] {
    serialized_ = fields(true);
    collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
    return &collection_;
  });
}

}  // namespace dfssm::trt
