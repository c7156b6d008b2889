#include "common/plugin.h"

#include <algorithm>
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
      return "float32 or float16";
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

// What kernels, which include no header of the opset, have from it.
static_assert(kTiny == opset::kTiny && kHalfMax == opset::kHalfMax);

constexpr int32_t kDone = 0, kFailed = -1;

// Weights and states are read 16 bytes at a time. TensorRT's own memory is aligned; a caller binds states.
void check_aligned(const char* kind, const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    fail(kind + (" " + quoted(name)) + " is bound to an address that is no multiple of 16");
  }
}

class Reader : public FieldVisitor {
 public:
  explicit Reader(const nvinfer1::PluginFieldCollection& fields) : fields_(fields) {}

  void operator()(const char* name, int64_t& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kINT32, "an integer")) {
      value = *static_cast<const int32_t*>(field->data);
    }
  }
  void operator()(const char* name, float& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kFLOAT32, "a float")) {
      value = *static_cast<const float*>(field->data);
    }
  }
  void operator()(const char* name, std::string& value) override {
    if (const PluginField* field = find(name, PluginFieldType::kCHAR, "a string")) {
      const auto* text = static_cast<const char*>(field->data);
      value.assign(text, strnlen(text, static_cast<size_t>(field->length)));  // with or without a closing NUL
    }
  }

  // Throws where there is a field that nobody asked for, but the two that every node has.
  void check_known() const {
    for (int32_t i = 0; i < fields_.nbFields; ++i) {
      const std::string name = fields_.fields[i].name ? fields_.fields[i].name : "";
      if (name == "plugin_version" || name == "plugin_namespace") continue;
      if (std::find(known_.begin(), known_.end(), name) == known_.end())
        opset::unknown_attribute(name, known_);
    }
  }

 private:
  const PluginField* find(const char* name, PluginFieldType type, const char* expected) {
    known_.push_back(name);
    for (int32_t i = 0; i < fields_.nbFields; ++i) {
      const PluginField& field = fields_.fields[i];
      if (!field.name || std::strcmp(field.name, name) != 0) continue;
      const bool one = type == PluginFieldType::kCHAR || field.length == 1;
      if (field.type != type || !field.data || !one)
        fail("attribute " + quoted(name) + " is not " + expected);
      return &field;
    }
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection& fields_;
  std::vector<std::string> known_;
};

class Lister : public FieldVisitor {
 public:
  explicit Lister(std::deque<int32_t>& integers) : integers_(integers) { integers_.clear(); }

  void operator()(const char* name, int64_t& value) override {
    add(name, &integers_.emplace_back(static_cast<int32_t>(value)), PluginFieldType::kINT32, 1);
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

  std::deque<int32_t>& integers_;
};

}  // namespace

Float float_type(DataType type) { return type == DataType::kFLOAT ? Float::f32 : Float::f16; }

size_t element_size(DataType type) { return type == DataType::kFLOAT ? 4 : type == DataType::kINT8 ? 1 : 2; }

int32_t size(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max()) fail("a size of " + opset::shown(value) + " is too large");
  return static_cast<int32_t>(value);
}

void check_flag(const char* attribute, int64_t value) {
  opset::check_choice<int64_t>(attribute, value, {0, 1});
}

Type type_of(const TensorSpec& spec) {
  const bool tokens =
      spec.rank == 3 && !std::strcmp(spec.dims[0].text, "B") && !std::strcmp(spec.dims[1].text, "T");
  switch (spec.dtypes) {
    case opset::kFloat32:
      return tokens ? Type::activation : Type::f32;
    case opset::kInt8:
      return Type::i8;
    case opset::kUInt8:
      return Type::i32;
    default:
      return Type::state;
  }
}

// ---- Inputs ----

void Inputs::set(size_t input, const TensorSpec& spec, DataType type, const nvinfer1::Dims& dims,
                 const void* data) {
  Tensor& tensor = tensors_[input];
  tensor.present = true;
  tensor.words = type == DataType::kINT32;
  tensor.data = data;
  types_[input] = type;
  set_dims(spec, tensor, dims.d, static_cast<size_t>(std::max(dims.nbDims, 0)));
  for (size_t i = 0; i < tensor.rank; ++i) {
    if (tensor[i] > std::numeric_limits<int32_t>::max()) {
      fail("input " + quoted(spec.name) + " has a dimension of " + opset::shown(tensor[i]) +
           ", expected less than 2^31");
    }
  }
}

Inputs::Columns Inputs::columns(size_t input, int64_t start) const {
  const Tensor& tensor = tensors_[input];
  const auto* data = tensor.as<std::byte>();
  const size_t skipped = start < 0 ? 0 : static_cast<size_t>(start) * element_size(types_[input]);
  return {data ? data + skipped : nullptr, tensor.last()};
}

// ---- Plugin ----

void Plugin::set_node(const char* node) {
  where_ = op_.name;
  if (node && *node) where_ += " " + quoted(node);
}

void Plugin::read(const nvinfer1::PluginFieldCollection& fields) {
  Reader reader(fields);
  attributes(reader);
  reader.check_known();
  check_attributes();
}

std::vector<PluginField> Plugin::fields(bool values) {
  Lister lister(integers_);
  attributes(lister);
  for (PluginField& field : lister.fields) {
    if (!values) field.data = nullptr;
  }
  return std::move(lister.fields);
}

void Plugin::check_arity(int32_t inputs, int32_t outputs) const {
  if (inputs != static_cast<int32_t>(input_count()) || outputs != static_cast<int32_t>(output_count())) {
    fail(std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs, expected " +
         std::to_string(input_count()) + " and " + std::to_string(output_count()));
  }
}

// Activations of one node have one type, that of input 0.
bool Plugin::type_fits(size_t input, DataType type, DataType first) const {
  const Type wanted = input_type(input);
  return allowed(wanted, type) && (wanted != Type::activation || type == first);
}

int32_t Plugin::state_of(size_t output) const {
  const int over = op_.outputs[output].over;
  return over >= 0 && input_type(static_cast<size_t>(over)) != Type::activation ? over : -1;
}

DataType Plugin::output_dtype(size_t output, const DataType* inputs) const {
  if (state_of(output) >= 0) return inputs[state_of(output)];
  return output_type(output) == Type::activation ? inputs[0] : DataType::kFLOAT;
}

// What an input's type is while only shapes are asked for: float32, or words where bytes are expected.
DataType placeholder(Type type) { return type == Type::i32 ? DataType::kINT32 : DataType::kFLOAT; }

Inputs Plugin::from(const nvinfer1::DimsExprs* inputs) const {
  Inputs known;
  for (size_t i = 0; i < input_count(); ++i) {
    nvinfer1::Dims dims{inputs[i].nbDims, {}};
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
      const nvinfer1::IDimensionExpr& dim = *inputs[i].d[axis];
      dims.d[axis] = dim.isConstant() ? dim.getConstantValue() : kOpen;
    }
    known.set(i, op_.inputs[i], placeholder(input_type(i)), dims);
  }
  return known;
}

Inputs Plugin::from(const DynamicPluginTensorDesc* inputs,
                    nvinfer1::Dims DynamicPluginTensorDesc::* bound) const {
  Inputs known;
  for (size_t i = 0; i < input_count(); ++i)
    known.set(i, op_.inputs[i], inputs[i].desc.type, inputs[i].*bound);
  return known;
}

Inputs Plugin::from(const PluginTensorDesc* descs, const void* const* data) const {
  Inputs known;
  for (size_t i = 0; i < input_count(); ++i) {
    const void* address = data ? data[i] : nullptr;
    if (input_type(i) != Type::activation) check_aligned("input", op_.inputs[i].name, address);
    known.set(i, op_.inputs[i], descs[i].type, descs[i].dims, address);
  }
  return known;
}

void Plugin::set_shape(const nvinfer1::DimsExprs* inputs, size_t output, nvinfer1::DimsExprs& shape,
                       nvinfer1::IExprBuilder& builder) const {
  const TensorSpec& spec = op_.outputs[output];
  if (spec.over >= 0) {
    shape = inputs[spec.over];
    return;
  }
  // The dimension of an input that is written alike; the last one of a range of columns is not.
  const auto find = [&](const char* text) -> const nvinfer1::IDimensionExpr* {
    for (size_t i = 0; i < input_count(); ++i) {
      const TensorSpec& input = op_.inputs[i];
      const int32_t rank = inputs[i].nbDims, absent = static_cast<int32_t>(input.rank) - rank;
      for (int32_t axis = 0; axis < rank - (input.start >= 0 ? 1 : 0); ++axis) {
        if (!std::strcmp(input.dims[axis + absent].text, text)) return inputs[i].d[axis];
      }
    }
    return nullptr;
  };
  shape.nbDims = static_cast<int32_t>(spec.rank);
  for (size_t i = 0; i < spec.rank; ++i) {
    const opset::Dim& dim = spec.dims[i];
    shape.d[i] = find(dim.operation ? op_.symbols[dim.symbol] : dim.text);
    if (dim.operation) {
      shape.d[i] =
          builder.operation(nvinfer1::DimensionOperation::kPROD, *shape.d[i], *find(op_.symbols[dim.other]));
    }
  }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
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
        fail("input " + quoted(op_.inputs[i].name) + " has dtype " + type_name(inputs[i]) + ", expected " +
             allowed_names(input_type(i)));
      }
      if (!type_fits(i, inputs[i], inputs[0])) {
        fail("input " + quoted(op_.inputs[i].name) + " has dtype " + type_name(inputs[i]) +
             ", expected that of " + quoted(op_.inputs[0].name) + ", " + type_name(inputs[0]));
      }
    }
    for (size_t i = 0; i < output_count(); ++i) outputs[i] = output_dtype(i, inputs);
    return kDone;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t inputs_given,
                                const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                int32_t outputs_given, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(where(), kFailed, [&] {
    check_arity(inputs_given, outputs_given);
    check_shapes(from(inputs));
    for (size_t i = 0; i < output_count(); ++i) set_shape(inputs, i, outputs[i], builder);
    return kDone;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t inputs_given, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position < inputs_given)
    return type_fits(static_cast<size_t>(position), tensor.type, tensors[0].desc.type);
  std::array<DataType, opset::kMaxInputs> inputs;
  for (size_t i = 0; i < input_count(); ++i) inputs[i] = tensors[i].desc.type;
  return tensor.type == output_dtype(static_cast<size_t>(position - inputs_given), inputs.data());
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
      if (state_of(i) >= 0) check_aligned("output", op_.outputs[i].name, outputs[i]);
    }
    const cudaError_t error = launch(from(descs, inputs), {outputs, workspace, stream});
    if (error != cudaSuccess) fail(std::string("the launch failed: ") + cudaGetErrorString(error));
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
