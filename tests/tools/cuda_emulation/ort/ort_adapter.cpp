// The plugins as custom ops of ONNX Runtime, for the tests: the graph that TensorRT's parser reads runs on
// the host.
//
// Each node goes the way it goes in TensorRT (plugin_host.h), with a workspace of just the size that was asked
// for. The kernels are those of the emulation, and every tensor is announced to it: an access outside of one
// fails the node.
//
// Activations are float32, or float16: each op is there twice.
#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <utility>

#include "common/creators.h"
#include "common/plugin.h"
#include "emulation.h"
#include "plugin_host.h"

namespace dfssm::trt {

// common/tensorrt.h, with this adapter in TensorRT's place.
namespace {
thread_local std::string last_message;
}
void log_error(const char* message) noexcept { last_message = message; }
nvinfer1::IPluginRegistry* loaded_registry() noexcept { return nullptr; }

namespace {

using nvinfer1::DataType;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr uint32_t kApiVersion = 18;
const OrtApi* api = nullptr;

void check(OrtStatus* status) {
  if (!status) return;
  const Error error(api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  throw error;
}

// f(), whose plugins may refuse: what they logged is the error.
template <class F>
auto logged(F&& f) {
  try {
    return f();
  } catch (const host::Refused& refused) {
    const std::string message = std::exchange(last_message, "");
    fail(message.empty() ? refused.what() : message);
  }
}

template <class F>
OrtStatus* to_status(F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    return api->CreateStatus(ORT_FAIL, e.what());
  }
}

DataType trt_type(ONNXTensorElementDataType type) {
  static const std::map<ONNXTensorElementDataType, DataType> types = {
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, DataType::kFLOAT},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, DataType::kHALF},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, DataType::kINT8},
      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, DataType::kINT32},
  };
  const auto found = types.find(type);
  if (found == types.end())
    fail("a tensor has ONNX type " + std::to_string(type) + ", which TensorRT has not");
  return found->second;
}

// ---- A node ----

class Node {
 public:
  Node(IPluginCreatorV3One& creator, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  std::unique_ptr<host::HostedPlugin> plugin_;
};

// One attribute of a node in memory that a PluginField may point to, as TensorRT's parser reads it.
struct Attribute {
  Attribute(const PluginField& wanted, const OrtKernelInfo* info) : name(wanted.name), type(wanted.type) {
    int64_t wide = 0;
    size_t bytes = 0;
    OrtStatus* status = nullptr;
    if (type == PluginFieldType::kINT32) {
      status = api->KernelInfoGetAttribute_int64(info, name, &wide);
      integer = static_cast<int32_t>(wide);
    } else if (type == PluginFieldType::kFLOAT32) {
      status = api->KernelInfoGetAttribute_float(info, name, &real);
    } else if (!(status = api->KernelInfoGetAttribute_string(info, name, nullptr, &bytes))) {
      text.resize(bytes);  // with the closing NUL
      status = api->KernelInfoGetAttribute_string(info, name, text.data(), &bytes);
    }
    present = !status;
    if (status) api->ReleaseStatus(status);
  }
  PluginField field() const {
    if (type == PluginFieldType::kCHAR) return {name, text.data(), type, static_cast<int32_t>(text.size())};
    return {name, type == PluginFieldType::kINT32 ? static_cast<const void*>(&integer) : &real, type, 1};
  }

  const char* name;
  PluginFieldType type;
  bool present = false;
  int32_t integer = 0;
  float real = 0;
  std::string text;
};

Node::Node(IPluginCreatorV3One& creator, const OrtKernelInfo* info) {
  size_t bytes = 0;
  check(api->KernelInfo_GetNodeName(info, nullptr, &bytes));
  std::string name(bytes, '\0');
  check(api->KernelInfo_GetNodeName(info, name.data(), &bytes));

  const nvinfer1::PluginFieldCollection& wanted = *creator.getFieldNames();
  std::deque<Attribute> attributes;
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < wanted.nbFields; ++i) {
    const Attribute& attribute = attributes.emplace_back(wanted.fields[i], info);
    if (attribute.present) fields.push_back(attribute.field());
  }
  plugin_ = logged([&] {
    return std::make_unique<host::HostedPlugin>(
        creator, name.c_str(),
        nvinfer1::PluginFieldCollection{static_cast<int32_t>(fields.size()), fields.data()});
  });
}

// The tensors of a call as TensorRT describes them.
struct Described {
  host::Tensors descs;
  std::vector<const void*> data;

  size_t bytes(size_t i) const {
    size_t count = descs[i].type == DataType::kINT32 ? 4 : element_size(descs[i].type);
    for (int32_t axis = 0; axis < descs[i].dims.nbDims; ++axis)
      count *= static_cast<size_t>(descs[i].dims.d[axis]);
    return count;
  }
};

Described inputs_of(OrtKernelContext* context) {
  Described inputs;
  size_t count = 0;
  check(api->KernelContext_GetInputCount(context, &count));
  for (size_t i = 0; i < count; ++i) {
    const OrtValue* value = nullptr;
    check(api->KernelContext_GetInput(context, i, &value));
    if (!value) continue;
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api->GetTensorTypeAndShape(value, &raw));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
        raw, api->ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    ONNXTensorElementDataType type;
    void* data = nullptr;
    check(api->GetDimensionsCount(raw, &rank));
    nvinfer1::Dims dims{static_cast<int32_t>(rank), {}};
    check(api->GetDimensions(raw, dims.d, rank));
    check(api->GetTensorElementType(raw, &type));
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    inputs.descs.push_back(host::described(trt_type(type), dims));
    inputs.data.push_back(data);
  }
  return inputs;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// What the kernels of one launch may touch.
struct Announced {
  ~Announced() { emulation::clear_buffers(); }
  void add(const char* name, const void* data, size_t bytes, emulation::Contents contents) {
    if (bytes) emulation::add_buffer(name, data, bytes, contents);
  }
};

void Node::compute(OrtKernelContext* context) const {
  using emulation::Contents;
  const opset::Op& op = static_cast<const Plugin&>(plugin_->plugin()).op();
  const Described inputs = inputs_of(context);
  Described outputs;
  outputs.descs = logged([&] { return plugin_->outputs(inputs.descs); });
  std::vector<void*> addresses;
  for (size_t i = 0; i < outputs.descs.size(); ++i) {
    OrtValue* value = nullptr;
    const nvinfer1::Dims& dims = outputs.descs[i].dims;
    check(api->KernelContext_GetOutput(context, i, dims.d, static_cast<size_t>(dims.nbDims), &value));
    if (!value) fail("output " + quoted(op.outputs[i].name) + " is not connected");
    check(api->GetTensorMutableData(value, &addresses.emplace_back()));
  }

  const size_t bytes = plugin_->workspace(inputs.descs, outputs.descs);
  const std::unique_ptr<void, Free> workspace(std::aligned_alloc(256, (bytes + 256) / 256 * 256));
  if (!workspace) throw std::bad_alloc();

  Announced memory;
  memory.add("workspace", workspace.get(), bytes, Contents::uninitialised);
  for (size_t i = 0; i < addresses.size(); ++i) {
    const int over = op.outputs[i].over;
    const bool in_place = over >= 0 && inputs.data[static_cast<size_t>(over)] == addresses[i];
    memory.add(op.outputs[i].name, addresses[i], outputs.bytes(i),
               in_place ? Contents::written : Contents::uninitialised);
  }
  for (size_t i = 0; i < inputs.data.size(); ++i) {
    bool is_output = false;
    for (const void* address : addresses) is_output |= address == inputs.data[i];
    if (!is_output) memory.add(op.inputs[i].name, inputs.data[i], inputs.bytes(i), Contents::constant);
  }
  logged([&] {
    plugin_->enqueue(inputs.descs, outputs.descs, inputs.data.data(), addresses.data(), workspace.get(),
                     nullptr);
  });
}

// ---- The op as ONNX Runtime sees it ----

struct Op : OrtCustomOp {
  Op(nvinfer1::IPluginCreatorInterface* interface, ONNXTensorElementDataType activations);

  static const Op& of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
  ONNXTensorElementDataType type(Type type) const {
    switch (type) {
      case Type::activation:
        return activation;
      case Type::f32:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      case Type::i32:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
      default:  // what it is depends on the node's attributes: any, and the plugin refuses what it does not
                // take
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }
  }

  IPluginCreatorV3One& creator;
  host::PluginPointer sample;
  const Plugin& plugin;
  const ONNXTensorElementDataType activation;
};

Op::Op(nvinfer1::IPluginCreatorInterface* interface, ONNXTensorElementDataType activations)
    : OrtCustomOp{},
      creator(*static_cast<IPluginCreatorV3One*>(interface)),
      sample(host::create(creator, "", {}, nvinfer1::TensorRTPhase::kBUILD)),
      plugin(static_cast<Plugin&>(*sample)),
      activation(activations) {
  version = kApiVersion;
  GetName = [](const OrtCustomOp* op) { return of(op).plugin.op().name; };
  GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  GetInputTypeCount = [](const OrtCustomOp* op) { return of(op).plugin.op().input_count; };
  GetOutputTypeCount = [](const OrtCustomOp* op) { return of(op).plugin.op().output_count; };
  GetInputType = [](const OrtCustomOp* op, size_t i) { return of(op).type(of(op).plugin.input_type(i)); };
  GetOutputType = [](const OrtCustomOp* op, size_t i) { return of(op).type(of(op).plugin.output_type(i)); };
  GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return i < of(op).plugin.op().required_inputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) {
    return i < of(op).plugin.op().required_outputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return opset::kVersion; };
  CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return to_status([&] { *kernel = new Node(of(op).creator, info); });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return to_status([&] { static_cast<const Node*>(kernel)->compute(context); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
}

}  // namespace
}  // namespace dfssm::trt

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace dfssm::trt;
  api = base->GetApi(kApiVersion);
  return to_status([&] {
    static const std::deque<Op>* const ops = [] {
      auto* made = new std::deque<Op>;  // sessions may outlive every static object
      for (auto activation : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}) {
        for (auto* creator : creators()) made->emplace_back(creator, activation);
      }
      return made;
    }();
    static OrtCustomOpDomain* const domain = [] {
      OrtCustomOpDomain* made = nullptr;
      check(api->CreateCustomOpDomain(dfssm::opset::kDomain, &made));
      for (const Op& op : *ops) check(api->CustomOpDomain_Add(made, &op));
      return made;
    }();
    check(api->AddCustomOpDomain(options, domain));
  });
}
