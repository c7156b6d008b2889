#include "ort.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <thread>

namespace dfssm::ort {

const OrtApi* api = nullptr;
int ort_minor = 0;
std::atomic<bool> OpTime::wanted = false;

namespace {

struct ReleaseShapeInfo {
  void operator()(OrtTensorTypeAndShapeInfo* info) const { api->ReleaseTensorTypeAndShapeInfo(info); }
};
using ShapeInfo = std::unique_ptr<OrtTensorTypeAndShapeInfo, ReleaseShapeInfo>;

Tensor read_tensor(const OrtValue* value, const TensorSpec& spec) {
  Tensor tensor;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(api->GetTensorTypeAndShape(value, &raw));
  const ShapeInfo info(raw);
  size_t rank = 0;
  check(api->GetDimensionsCount(raw, &rank));
  if (rank > opset::kMaxRank) {
    std::vector<int64_t> dims(rank);
    check(api->GetDimensions(raw, dims.data(), rank));
    set_dims(spec, tensor, dims.data(), rank);
  }
  tensor.rank = rank;
  check(api->GetDimensions(raw, tensor.dims.data(), rank));
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.present = true;
  tensor.data = data;
  return tensor;
}

constexpr std::pair<opset::DType, ONNXTensorElementDataType> kTypes[] = {
    {opset::kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    {opset::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
    {opset::kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
    {opset::kUInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
};

}  // namespace

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

std::string where(const opset::Op& op, const OrtKernelInfo* info) {
  size_t bytes = 0;  // with the closing NUL
  check(api->KernelInfo_GetNodeName(info, nullptr, &bytes));
  std::string node(bytes, '\0');
  check(api->KernelInfo_GetNodeName(info, node.data(), &bytes));
  node.resize(bytes ? bytes - 1 : 0);
  return op.name + (node.empty() ? "" : " " + quoted(node));
}

ONNXTensorElementDataType onnx_type(const TensorSpec& spec) {
  for (const auto& [dtype, type] : kTypes) {
    if (spec.dtypes == dtype) return type;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

Kernel::Kernel(const opset::Op& op, const OrtKernelInfo* info)
    : op_(op), info_(info), where_(ort::where(op, info)) {
  check(api->KernelInfo_GetInputCount(info, &input_count_));
  check(api->KernelInfo_GetOutputCount(info, &output_count_));
  for (size_t i = 0; i < input_count_; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
    if (!is_constant) continue;
    is_constant_[i] = true;
    constants_[i] = read_tensor(value, op.inputs[i]);
  }
}

// An attribute with a wrong type must not pass for an absent one.
template <class T, class Get>
void Kernel::Reader::read(const char* name, const char* type, Get get, T* value) const {
  OrtStatus* status = get(kernel_.info_, name, value);
  if (!status) return;
  api->ReleaseStatus(status);
  if (kernel_.has_attribute(name)) {
    fail("attribute " + quoted(name) + " is " + kernel_.attribute_type(name) + ", expected " + type);
  }
  kernel_.check_misspelt(name);
}

void Kernel::Reader::operator()(const char* name, int64_t& value) const {
  read(name, "an integer", api->KernelInfoGetAttribute_int64, &value);
}

void Kernel::Reader::operator()(const char* name, float& value) const {
  read(name, "a float", api->KernelInfoGetAttribute_float, &value);
}

void Kernel::Reader::operator()(const char* name, std::string& value) const {
  const auto get = [](const OrtKernelInfo* info, const char* of, std::string* to) -> OrtStatus* {
    size_t bytes = 0;  // with the closing NUL
    OrtStatus* status = api->KernelInfoGetAttribute_string(info, of, nullptr, &bytes);
    if (status) return status;
    to->resize(bytes);
    status = api->KernelInfoGetAttribute_string(info, of, to->data(), &bytes);
    if (!status) to->resize(bytes - 1);
    return status;
  };
  read(name, "a string", get, &value);
}

// Whether the node has an attribute of that name, whatever its type. Asked for an integer that is not there, the
// API gives one error code for "absent" and "of another type", but not one message. So the message is compared
// with that for a name which no attribute has.
bool Kernel::has_attribute(const std::string& name) const {
  const auto message = [this](const std::string& of) -> std::string {
    int64_t value;
    OrtStatus* status = api->KernelInfoGetAttribute_int64(info_, of.c_str(), &value);
    if (!status) return "";
    const std::string text = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    return text;
  };
  std::string absent = message('?' + name);
  const size_t at = absent.find('?' + name);
  if (at != std::string::npos) absent.erase(at, 1);
  return message(name) != absent;
}

// The type of an attribute that the node has.
const char* Kernel::attribute_type(const char* name) const {
  int64_t integer;
  float real;
  size_t length = 0;
  const std::pair<OrtStatus*, const char*> tried[] = {
      {api->KernelInfoGetAttribute_int64(info_, name, &integer), "an integer"},
      {api->KernelInfoGetAttribute_float(info_, name, &real), "a float"},
      {api->KernelInfoGetAttribute_string(info_, name, nullptr, &length), "a string"}};
  const char* found = "of another type";
  for (const auto& [status, type] : tried) {
    if (!status) found = type;
    if (status) api->ReleaseStatus(status);
  }
  return found;
}

// ONNX Runtime does not tell a custom op which attributes its node has, only whether it has one of a given
// name. So for one that is absent, and that the node may mean by another name, names one letter off are asked
// for.
void Kernel::check_misspelt(const char* name) const {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyz_";
  const std::string right = name;
  const auto refuse = [&](const std::string& other) {
    if (!opset::has_attribute(op_, other.c_str()) && has_attribute(other)) unknown_attribute(op_, other);
  };
  for (size_t i = 0; i <= right.size(); ++i) {
    const std::string before = right.substr(0, i), behind = right.substr(i);
    for (const char letter : kLetters) {
      refuse(before + letter + behind);
      if (!behind.empty() && letter != behind[0]) refuse(before + letter + behind.substr(1));
    }
    if (!behind.empty()) refuse(before + behind.substr(1));
    if (behind.size() > 1 && behind[0] != behind[1])
      refuse(before + behind[1] + behind[0] + behind.substr(2));
  }
}

void Kernel::read_types() {
  for (size_t i = 0; i < op_.input_count; ++i) {
    const unsigned allowed = op_.inputs[i].dtypes;
    const bool choice = allowed & (allowed - 1);
    types_[i] = choice ? input_type(i) : static_cast<opset::DType>(allowed);
  }
  for (size_t i = 0; i < op_.input_count; ++i) {
    const int of = op_.inputs[i].scale_of;
    if (of >= 0) check_scale(op_, i, has_input(i), types_[of] == opset::kInt8);
  }
  for (size_t i = output_count_; i < op_.output_count; ++i) {
    const int of = op_.outputs[i].scale_of;
    if (of >= 0 && types_[of] == opset::kInt8) fail("output " + quoted(op_.outputs[i].name) + " is missing");
  }
}

bool Kernel::has_input(size_t index) const {
  size_t bytes = 0;  // with the closing NUL
  if (index >= input_count_) return false;
  check(api->KernelInfo_GetInputName(info_, index, nullptr, &bytes));
  return bytes > 1;
}

// The type of an input, which must be one that the op takes.
opset::DType Kernel::input_type(size_t index) const {
  OrtTypeInfo* info = nullptr;
  check(api->KernelInfo_GetInputTypeInfo(info_, index, &info));
  const std::unique_ptr<OrtTypeInfo, void (*)(OrtTypeInfo*)> owner(info, api->ReleaseTypeInfo);
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  check(api->CastTypeInfoToTensorInfo(info, &tensor));
  ONNXTensorElementDataType found = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  if (tensor) check(api->GetTensorElementType(tensor, &found));
  for (const auto& [dtype, type] : kTypes) {
    if (type == found && op_.inputs[index].dtypes & dtype) return dtype;
  }
  wrong_dtype(op_, index, type_name(found));
}

OrtCall::OrtCall(const Kernel& kernel, OrtKernelContext* context)
    : Call(dfssm::kernels()), op_(kernel.op_), context_(context) {
  types_ = kernel.types_;
  for (size_t i = 0; i < kernel.input_count_; ++i) {
    if (kernel.is_constant_[i]) {
      inputs_[i] = kernel.constants_[i];
      continue;
    }
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context, i, &value));
    if (value) inputs_[i] = read_tensor(value, op_.inputs[i]);
  }
}

void* OrtCall::output_data(size_t index, const int64_t* shape, size_t rank) {
  OrtValue* value = nullptr;
  check(api->KernelContext_GetOutput(context_, index, shape, rank, &value));
  if (!value) fail("output " + quoted(op_.outputs[index].name) + " is not connected");
  void* data = nullptr;
  check(api->GetTensorMutableData(value, &data));
  return data;
}

void OrtCall::share_out(int64_t units, double unit_ns, Range range, const void* f) {
  // Measured with chains of 500 nodes, ONNX Runtime 1.31, two threads, its pool spinning: handing work to the
  // pool and meeting again takes 1.5 us, and the lines that one core wrote and another reads tens of ns each.
  // So work is shared when half of it is several times that: a decode step's products and its scan are, its
  // norms are not. Chunks of 4 us cost a large product 1 % (prefetches reach past the end of a chunk in
  // vain), those of 16 us nothing; 64 chunks are enough for a fair division among threads. Where the kernels
  // are slower than estimated, the chunks last longer, no more.
  constexpr double kWorthwhileNs = 10e3, kChunkNs = 4e3, kChunks = 64;
  const double total_ns = static_cast<double>(units) * unit_ns;
  const auto per_chunk =
      std::max<int64_t>(1, static_cast<int64_t>(std::max(kChunkNs, total_ns / kChunks) / unit_ns));
  if (total_ns < kWorthwhileNs || per_chunk >= units) return range(f, 0, units);
  // Where more threads want to run than there are cores, the scheduler takes a core from the other thread while it
  // holds a chunk, and this one waits for some ms; alone it would be through. So after such a wait it works alone
  // for a time, 64 times as long but at most half a second, and then tries again.
  using Clock = std::chrono::steady_clock;
  constexpr auto kStalled = std::chrono::milliseconds(1);
  constexpr Clock::duration kAloneAtMost = std::chrono::milliseconds(500);
  thread_local Clock::time_point alone_until;
  const auto start = Clock::now();
  if (start < alone_until) return range(f, 0, units);
  struct Job {
    Range range;
    const void* f;
    int64_t units, per_chunk;
    std::thread::id caller;
    Clock::time_point worked;  // until when the caller did
  } job{range, f, units, per_chunk, std::this_thread::get_id(), start};
  const auto chunk = [](void* data, size_t index) {
    Job& mine = *static_cast<Job*>(data);
    const int64_t begin = static_cast<int64_t>(index) * mine.per_chunk;
    mine.range(mine.f, begin, std::min(begin + mine.per_chunk, mine.units));
    if (std::this_thread::get_id() == mine.caller) mine.worked = Clock::now();
  };
  // Each chunk goes to the thread that is free: cores may differ in speed, or be lent to others. Threads begin at
  // equal parts of neighbouring chunks, so they read in order. With one thread all run right here.
  const auto chunks = static_cast<size_t>((units + per_chunk - 1) / per_chunk);
  check(api->KernelContext_ParallelFor(context_, chunk, chunks, chunks, &job));
  const auto end = Clock::now();
  const auto waited = end - job.worked;
  if (waited > kStalled && waited > job.worked - start) {
    alone_until = end + std::min(64 * waited, kAloneAtMost);
  }
}

namespace {

struct Known {
  int64_t value = -1;  // -1: unknown, or named by `symbol`
  std::string symbol;
};

// An integer attribute of the node; the default also where it is no integer, which the kernel will report.
int64_t attribute_of(OrtShapeInferContext* context, const char* name, int64_t default_value) {
  const OrtOpAttr* attribute = nullptr;  // owned by the context
  size_t bytes = 0;
  int64_t value = default_value;
  OrtStatus* status = api->ShapeInferContext_GetAttribute(context, name, &attribute);
  if (!status) status = api->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &bytes);
  if (!status) return value;
  api->ReleaseStatus(status);
  return default_value;
}

}  // namespace

void infer_shapes(const opset::Op& op, OrtShapeInferContext* context) {
  std::vector<std::vector<Known>> inputs(op.input_count);
  std::vector<ONNXTensorElementDataType> types(op.input_count, kF32);
  std::map<std::string_view, Known> known;  // by the text of a dimension
  size_t count = 0;
  check(api->ShapeInferContext_GetInputCount(context, &count));
  for (size_t input = 0; input < count && input < op.input_count; ++input) {
    const TensorSpec& spec = op.inputs[input];
    OrtTensorTypeAndShapeInfo* info = nullptr;  // owned by the context
    size_t rank = 0;
    check(api->ShapeInferContext_GetInputTypeShape(context, input, &info));
    check(api->GetTensorElementType(info, &types[input]));
    check(api->GetDimensionsCount(info, &rank));
    const bool may_lead =
        spec.dims[0].symbol >= op.size_count;  // a dimension that is not there where it is 1
    if (rank != spec.rank && !(may_lead && rank + 1 == spec.rank)) continue;
    std::vector<int64_t> values(rank);
    std::vector<const char*> symbols(rank);
    check(api->GetDimensions(info, values.data(), rank));
    check(api->GetSymbolicDimensions(info, symbols.data(), rank));
    const bool wider = spec.start >= 0 && attribute_of(context, op.symbols[spec.start], -1) >= 0;
    for (size_t i = 0; i < rank; ++i) {
      inputs[input].push_back({values[i], symbols[i] ? symbols[i] : ""});
      if (i + 1 < rank || !wider) {
        known.try_emplace(spec.dims[spec.rank - rank + i].text, inputs[input].back());
      }
    }
  }
  const auto find = [&](const opset::Dim& dim) -> std::optional<Known> {
    if (const auto found = known.find(dim.text); found != known.end()) return found->second;
    if (dim.operation != '*') return std::nullopt;
    const auto a = known.find(op.symbols[dim.symbol]), b = known.find(op.symbols[dim.other]);
    if (a == known.end() || b == known.end() || a->second.value <= 0 || b->second.value <= 0) {
      return std::nullopt;
    }
    return Known{a->second.value * b->second.value, ""};
  };
  // Not the optional outputs: the API does not tell whether the node has them.
  for (size_t output = 0; output < op.required_outputs; ++output) {
    const TensorSpec& spec = op.outputs[output];
    // Not copied where they are those of an input: the copy of a vector asks for a libstdc++ of gcc 11, newer than
    // what a wheel may count on.
    std::vector<Known> made;
    if (spec.over < 0) {
      for (size_t i = 0; i < spec.rank; ++i) {
        if (const auto dim = find(spec.dims[i])) made.push_back(*dim);
      }
    }
    const std::vector<Known>& dims = spec.over < 0 ? made : inputs[spec.over];
    if (dims.size() != spec.rank) continue;
    std::vector<int64_t> values;
    std::vector<const char*> symbols;
    for (const Known& dim : dims) {
      values.push_back(dim.value);
      symbols.push_back(dim.symbol.c_str());
    }
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api->CreateTensorTypeAndShapeInfo(&raw));
    const ShapeInfo info(raw);
    check(api->SetTensorElementType(raw, spec.over < 0 ? kF32 : types[spec.over]));
    check(api->SetDimensions(raw, values.data(), values.size()));
    check(api->SetSymbolicDimensions(raw, symbols.data(), symbols.size()));
    check(api->ShapeInferContext_SetOutputTypeShape(context, output, raw));
  }
}

}  // namespace dfssm::ort
