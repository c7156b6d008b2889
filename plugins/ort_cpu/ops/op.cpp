#include "op.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace dfssm::ort {

const OrtApi* api = nullptr;
int ort_minor = 0;

namespace {

struct ReleaseShapeInfo {
  void operator()(OrtTensorTypeAndShapeInfo* info) const { api->ReleaseTensorTypeAndShapeInfo(info); }
};
using ShapeInfo = std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseShapeInfo>;

Tensor read_tensor(const OrtValue* value, const Signature& signature, size_t input) {
  Tensor tensor;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api->GetTensorTypeAndShape(value, &raw));
  const ShapeInfo info(raw);
  check(api->GetDimensionsCount(raw, &tensor.rank));
  if (tensor.rank > kMaxRank) {
    fail("%s: input '%s' has rank %zu, expected %s", signature.name, signature.input_names[input],
         tensor.rank, signature.input_shapes[input]);
  }
  check(api->GetDimensions(raw, tensor.dims.data(), tensor.rank));
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.present = true;
  tensor.data = data;
  return tensor;
}

std::string shape_text(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// The schema's symbols for a tensor of `rank` dimensions: "planes" is there only where planes > 1.
std::string symbols_text(const char* schema_shape, size_t rank) {
  std::string text = schema_shape;
  const auto commas = static_cast<size_t>(std::count(text.begin(), text.end(), ','));
  if (commas == rank) text.erase(1, text.find(", ") + 1);
  return text;
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Error(text);
}

void check(OrtStatus* status) {
  if (!status) return;
  const Error error(api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  throw error;
}

const char* type_name(ONNXTensorElementDataType type) {
  static const char* const names[] = {"undefined", "float32", "uint8",     "int8",       "uint16",  "int16",
                                      "int32",     "int64",   "string",    "bool",       "float16", "float64",
                                      "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  return static_cast<size_t>(type) < std::size(names) ? names[type] : "of another kind";
}

void* thread_scratch(size_t bytes) noexcept {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();  // before the new one: the old contents are never needed
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(64, rounded));
    capacity = memory ? rounded : 0;
  }
  return memory.get();
}

Kernel::Kernel(const Signature& signature, const OrtKernelInfo* info) : signature_(signature), info_(info) {
  check(api->KernelInfo_GetInputCount(info, &input_count_));
  check(api->KernelInfo_GetOutputCount(info, &output_count_));
  for (size_t i = 0; i < input_count_; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
    if (!is_constant) continue;
    is_constant_[i] = true;
    constants_[i] = read_tensor(value, signature, i);
  }
  for (size_t i = 0; i < signature.inputs; ++i) {
    const char* name = signature.input_starts[i];
    starts_[i] = name ? attribute(name, int64_t{-1}) : -1;
    if (starts_[i] < -1) {
      fail("%s: attribute '%s' is %lld, expected at least -1", signature.name, name,
           static_cast<long long>(starts_[i]));
    }
  }
}

// False if the node has no such attribute. The API answers "absent" and "of another type" alike, so the other
// types are tried: an attribute with a wrong type must not pass for an absent one.
template <class T, class Get>
bool Kernel::read_attribute(const char* name, const char* type, Get get, T* value) const {
  OrtStatus* status = get(value);
  if (!status) return true;
  api->ReleaseStatus(status);
  int64_t integer;
  float real;
  size_t length = 0;
  OrtStatus* others[] = {api->KernelInfoGetAttribute_int64(info_, name, &integer),
                         api->KernelInfoGetAttribute_float(info_, name, &real),
                         api->KernelInfoGetAttribute_string(info_, name, nullptr, &length)};
  const char* found = nullptr;
  const char* const names[] = {"an integer", "a float", "a string"};
  for (size_t i = 0; i < 3; ++i) {
    if (others[i]) {
      api->ReleaseStatus(others[i]);
    } else {
      found = names[i];
    }
  }
  if (found) fail("%s: attribute '%s' is %s, expected %s", signature_.name, name, found, type);
  return false;
}

int64_t Kernel::attribute(const char* name, int64_t default_value) const {
  const auto get = [&](int64_t* value) { return api->KernelInfoGetAttribute_int64(info_, name, value); };
  int64_t value;
  return read_attribute(name, "an integer", get, &value) ? value : default_value;
}

float Kernel::attribute(const char* name, float default_value) const {
  const auto get = [&](float* value) { return api->KernelInfoGetAttribute_float(info_, name, value); };
  float value;
  return read_attribute(name, "a float", get, &value) ? value : default_value;
}

std::string Kernel::attribute(const char* name, const char* default_value) const {
  const auto get = [&](std::string* value) -> OrtStatus* {
    size_t bytes = 0;  // with the closing NUL
    if (OrtStatus* status = api->KernelInfoGetAttribute_string(info_, name, nullptr, &bytes)) return status;
    value->resize(bytes);
    OrtStatus* status = api->KernelInfoGetAttribute_string(info_, name, value->data(), &bytes);
    if (!status) value->resize(bytes - 1);
    return status;
  };
  std::string value;
  return read_attribute(name, "a string", get, &value) ? value : default_value;
}

int64_t Kernel::positive(const char* name, int64_t default_value) const {
  const int64_t value = attribute(name, default_value);
  if (value < 1) {
    fail("%s: attribute '%s' is %lld, expected at least 1", signature_.name, name,
         static_cast<long long>(value));
  }
  return value;
}

bool Kernel::has_input(size_t index) const {
  size_t bytes = 0;  // with the closing NUL
  if (index >= input_count_) return false;
  check(api->KernelInfo_GetInputName(info_, index, nullptr, &bytes));
  return bytes > 1;
}

ONNXTensorElementDataType Kernel::input_type(size_t index) const {
  OrtTypeInfo* info = nullptr;
  check(api->KernelInfo_GetInputTypeInfo(info_, index, &info));
  const std::unique_ptr<OrtTypeInfo, void (*)(OrtTypeInfo*)> owner(info, api->ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  check(api->CastTypeInfoToTensorInfo(info, &tensor));
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  if (tensor) check(api->GetTensorElementType(tensor, &type));
  return type;
}

Call::Call(const Kernel& kernel, OrtKernelContext* context)
    : kernel_(kernel), signature_(kernel.signature_), context_(context) {
  for (size_t i = 0; i < kernel.input_count_; ++i) {
    if (kernel.is_constant_[i]) {
      inputs_[i] = kernel.constants_[i];
      continue;
    }
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context, i, &value));
    if (value) inputs_[i] = read_tensor(value, signature_, i);
  }
}

void Call::wrong_shape(size_t input, const std::string& expected) const {
  const Tensor& got = inputs_[input];
  const std::string shape = got.present ? "has shape " + shape_text(got.dims.data(), got.rank) : "is missing";
  fail("%s: input '%s' %s, expected %s", signature_.name, signature_.input_names[input], shape.c_str(),
       expected.c_str());
}

const Tensor& Call::ranked(size_t input, size_t rank) const {
  const Tensor& tensor = inputs_[input];
  bool fits = tensor.present && tensor.rank == rank;
  for (size_t i = 0; fits && i < rank; ++i) fits = tensor[i] > 0;
  if (!fits)
    wrong_shape(input, symbols_text(signature_.input_shapes[input], rank) + ", every dimension at least 1");
  return tensor;
}

const Tensor& Call::expect(size_t input, std::initializer_list<int64_t> shape) const {
  const Tensor& tensor = inputs_[input];
  bool fits = tensor.present && tensor.rank == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = tensor[i] == shape.begin()[i];
  if (!fits) {
    const std::string symbols = symbols_text(signature_.input_shapes[input], shape.size());
    wrong_shape(input, shape_text(shape.begin(), shape.size()) + " from " + symbols);
  }
  return tensor;
}

Columns Call::columns(size_t input, int64_t B, int64_t T, int64_t width) const {
  const int64_t start = kernel_.starts_[input];
  if (start < 0) return {expect(input, {B, T, width}).as<float>(), width};
  const Tensor& tensor = inputs_[input];
  const int64_t total = tensor.rank == 3 ? tensor[2] : 0;
  if (total < width || total - width < start || tensor[0] != B || tensor[1] != T) {
    std::string symbols = signature_.input_shapes[input];  // "[B, T, width]"
    symbols.insert(symbols.find("T, ") + 3, std::string(">= ") + signature_.input_starts[input] + " + ");
    wrong_shape(input, "[" + std::to_string(B) + ", " + std::to_string(T) + ", >= " + std::to_string(start) +
                           " + " + std::to_string(width) + "] from " + symbols);
  }
  return {tensor.as<float>() + start, total};
}

void* Call::output_data(size_t index, const int64_t* shape, size_t rank) {
  OrtValue* value = nullptr;
  check(api->KernelContext_GetOutput(context_, index, shape, rank, &value));
  if (!value) fail("%s: output '%s' is not connected", signature_.name, signature_.output_names[index]);
  void* data = nullptr;
  check(api->GetTensorMutableData(value, &data));
  return data;
}

int64_t Call::chunk_units(int64_t units, double unit_ns) {
  // Measured with chains of 500 nodes, ONNX Runtime 1.31, two threads, its pool spinning: handing work to the
  // pool and meeting again takes 1.5 us, and the lines that one core wrote and another reads tens of ns each.
  // So work is shared when half of it is several times that: a decode step's products and its scan are, its
  // norms are not. Chunks of 4 us cost a large product 1 % (prefetches reach past the end of a chunk in
  // vain), those of 16 us nothing; 64 chunks are enough for a fair division among threads.
  constexpr double kWorthwhileNs = 10e3, kChunkNs = 4e3, kChunks = 64;
  const double total_ns = static_cast<double>(units) * unit_ns;
  if (total_ns < kWorthwhileNs) return units;
  const double per_chunk = std::max(kChunkNs, total_ns / kChunks) / unit_ns;
  return std::max(int64_t{1}, static_cast<int64_t>(per_chunk));
}

void Call::parallel_for(void (*chunk)(void*, size_t), int64_t chunks, void* job) {
  // 0: as many batches of neighbouring chunks as there are threads. With one thread they run right here.
  check(api->KernelContext_ParallelFor(context_, chunk, static_cast<size_t>(chunks), 0, job));
}

Inference::Shape Inference::shape(size_t input, size_t rank) const {
  size_t inputs = 0, known_rank = 0;
  check(api->ShapeInferContext_GetInputCount(context_, &inputs));
  if (input >= inputs) return {};
  OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
  check(api->ShapeInferContext_GetInputTypeShape(context_, input, &info));
  check(api->GetDimensionsCount(info, &known_rank));
  if (known_rank != rank) return {};
  std::vector<int64_t> values(rank);
  std::vector<const char*> symbols(rank);
  check(api->GetDimensions(info, values.data(), rank));
  check(api->GetSymbolicDimensions(info, symbols.data(), rank));
  Shape shape(rank);
  for (size_t i = 0; i < rank; ++i) shape[i] = {values[i], symbols[i] ? symbols[i] : ""};
  return shape;
}

void Inference::set(size_t output, const Shape& shape, ONNXTensorElementDataType type) {
  if (shape.empty()) return;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api->CreateTensorTypeAndShapeInfo(&raw));
  const ShapeInfo info(raw);
  std::vector<int64_t> values;
  std::vector<const char*> symbols;
  for (const Dim& dim : shape) {
    values.push_back(dim.value);
    symbols.push_back(dim.symbol.c_str());
  }
  check(api->SetTensorElementType(raw, type));
  check(api->SetDimensions(raw, values.data(), values.size()));
  check(api->SetSymbolicDimensions(raw, symbols.data(), symbols.size()));
  check(api->ShapeInferContext_SetOutputTypeShape(context_, output, raw));
}

int64_t Inference::attribute(const char* name, int64_t default_value) const {
  const OrtOpAttr* attribute = nullptr;  // owned by the context
  size_t bytes = 0;
  int64_t value = default_value;
  OrtStatus* status = api->ShapeInferContext_GetAttribute(context_, name, &attribute);
  if (!status) status = api->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &bytes);
  if (!status) return value;
  api->ReleaseStatus(status);
  return default_value;
}

void Inference::like(size_t output, size_t input, size_t rank) {
  const Shape known = shape(input, rank);
  if (known.empty()) return;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ONNXTensorElementDataType type = kF32;
  check(api->ShapeInferContext_GetInputTypeShape(context_, input, &info));
  check(api->GetTensorElementType(info, &type));
  set(output, known, type);
}

}  // namespace dfssm::ort
