// The one layer between TensorRT's plugin interface and the ops beside it.
//
// An op is a class derived from PluginOf<Op, Schema>, whose schema from dfssm_opset.h says which inputs,
// outputs and attributes it has. In args() it turns the inputs of a node into the arguments of its kernel;
// the schema has checked them. The same happens when TensorRT infers shapes, where open dimensions fit
// anything and no data is there, for the bounds of a profile, for new shapes, and before each launch: so a
// wrong shape is an error as early as it can be known, with one message. Plugins keep nothing but their
// attributes: contexts share nothing, and a launch can be captured.
//
// Inside, errors are thrown as Error; the functions that TensorRT calls catch everything, log one line and
// return an error code, so that nothing ever crosses its boundary.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kernels.h"
#include "common/tensorrt.h"
#include "dfssm_opset.h"

namespace dfssm::trt {

#if NV_TENSORRT_MAJOR < 10
#error "TensorRT 10 or newer is needed: the plugins are IPluginV3"
#endif

using opset::Error, opset::kOpen, opset::Tensor, opset::TensorSpec, opset::fail, opset::quoted;

// What f returns, or `failed` after its error was logged behind `where`.
template <class Result, class F>
Result guarded(const char* where, Result failed, F&& f) noexcept {
  try {
    return f();
  } catch (const std::exception& e) {
    char text[640];
    std::snprintf(text, sizeof text, "%s: %s", where, e.what());
    log_error(text);
    return failed;
  }
}

// The version is that of the build: CMakeLists.txt says what it is made of.
inline constexpr char kPluginVersion[] = DFSSM_TRT_VERSION, kPluginNamespace[] = "";

// ---- What an op declares ----

// What the tensors [B, T, ...] of float32 are here, `activation`: float32 or float16, all of a node the
// same. `state`: float32 or float16. Bytes of uint8 are words of 32 bits, i32.
enum class Type : uint8_t { activation, state, f32, i8, i32 };

Type type_of(const TensorSpec& spec);

// Calls itself with the name and the member of each attribute of a plugin.
class FieldVisitor {
 public:
  virtual void operator()(const char* name, int64_t& value) = 0;
  virtual void operator()(const char* name, float& value) = 0;
  virtual void operator()(const char* name, std::string& value) = 0;

 protected:
  ~FieldVisitor() = default;
};

// ---- What an op is given ----

inline int64_t times(int64_t a, int64_t b) { return a == kOpen || b == kOpen ? kOpen : a * b; }

// A size as the kernels take it. Throws where it does not fit.
int32_t size(int64_t value);

// 0 or 1, of an attribute that only the plugin has.
void check_flag(const char* attribute, int64_t value);

Float float_type(nvinfer1::DataType type);
size_t element_size(nvinfer1::DataType type);

// The inputs of a node, and what their types are here.
class Inputs {
 public:
  void set(size_t input, const TensorSpec& spec, nvinfer1::DataType type, const nvinfer1::Dims& dims,
           const void* data = nullptr);

  const Tensor* all() const { return tensors_.data(); }
  const Tensor& operator[](size_t input) const { return tensors_[input]; }
  nvinfer1::DataType type(size_t input) const { return types_[input]; }
  Float float_type(size_t input) const { return trt::float_type(types_[input]); }
  // Of a tensor [B, T, columns]: its columns from `start` on, all of them where that is -1. The stride is
  // from token to token, in elements.
  struct Columns {
    const void* data;
    int64_t stride;
  };
  Columns columns(size_t input, int64_t start) const;

 private:
  std::array<Tensor, opset::kMaxInputs> tensors_;
  std::array<nvinfer1::DataType, opset::kMaxInputs> types_{};
};

// ---- The plugin ----

// One launch: where the outputs go, and the memory and the stream it may use.
struct Launch {
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;

  template <class T = void>
  T* output(size_t index) const {
    return static_cast<T*>(outputs[index]);
  }
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  const opset::Op& op() const { return op_; }
  // What its tensors are; for the op whose attributes decide that, too.
  virtual Type input_type(size_t input) const { return type_of(op_.inputs[input]); }
  virtual Type output_type(size_t output) const { return type_of(op_.outputs[output]); }
  // What messages are to call this plugin: the op and `node`.
  void set_node(const char* node);
  const char* where() const noexcept { return where_.c_str(); }
  // Takes the attributes from `fields`; those it does not name keep their defaults. Throws on a wrong one.
  void read(const nvinfer1::PluginFieldCollection& fields);
  // The attributes: names and types, and their values, which lie in this plugin, if asked for.
  std::vector<nvinfer1::PluginField> fields(bool values);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(output_count()); }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count,
                             const nvinfer1::DataType* inputs, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                          int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                        const nvinfer1::PluginTensorDesc*, int32_t output_count) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
  explicit Plugin(const opset::Op& op) : op_(op) {}

  // Calls `visit` with every attribute: the op's, and those that only the plugin has.
  virtual void attributes(FieldVisitor& visit) = 0;
  // Throws on a value that an attribute may not have.
  virtual void check_attributes() const = 0;
  virtual void check_shapes(const Inputs& inputs) const = 0;
  // Bytes, for any shape that does not exceed that of the inputs.
  virtual size_t workspace(const Inputs& largest) const = 0;
  virtual cudaError_t launch(const Inputs& inputs, const Launch& launch) const = 0;

  // For the op whose attributes decide which optional tensors a node has.
  virtual size_t input_count() const { return op_.required_inputs; }
  virtual size_t output_count() const { return op_.required_outputs; }

 private:
  void check_arity(int32_t inputs, int32_t outputs) const;
  bool type_fits(size_t input, nvinfer1::DataType type, nvinfer1::DataType first) const;
  nvinfer1::DataType output_dtype(size_t output, const nvinfer1::DataType* inputs) const;
  // The state that an output is the next one of, and has the type of; -1: none. Both may be one buffer. TensorRT
  // is told nothing of that (an alias that a plugin declares it does not report to who binds the engine's tensors).
  int32_t state_of(size_t output) const;
  void set_shape(const nvinfer1::DimsExprs* inputs, size_t output, nvinfer1::DimsExprs& shape,
                 nvinfer1::IExprBuilder& builder) const;
  // What is known of the inputs: at build time, at a bound of a profile, at run time.
  Inputs from(const nvinfer1::DimsExprs* inputs) const;
  Inputs from(const nvinfer1::DynamicPluginTensorDesc* inputs,
              nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* bound) const;
  Inputs from(const nvinfer1::PluginTensorDesc* descs, const void* const* data) const;

  const opset::Op& op_;
  std::string where_;
  std::vector<nvinfer1::PluginField> serialized_;
  std::deque<int32_t> integers_;  // that serialized_ points to
  nvinfer1::PluginFieldCollection collection_{};
};

// What an op is derived from. It has, for its kernel's `Args`: Args args(const Inputs&, const Schema::Sizes&)
// const; size_t workspace_of(Args) const, for the largest shapes of a profile; cudaError_t run(Args, const
// Launch&). Where it has attributes of its own, or values of the op's that it does not take: visit_own() and
// check_own().
template <class Op, class S>
class PluginOf : public Plugin {
 public:
  using Schema = S;

  PluginOf() : Plugin(S::kOp) {}

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded(where(), static_cast<nvinfer1::IPluginV3*>(nullptr), [&] { return new Op(self()); });
  }

 protected:
  void attributes(FieldVisitor& visit) final {
    a.visit(visit);
    static_cast<Op&>(*this).visit_own(visit);
  }
  void check_attributes() const final {
    a.check();
    self().check_own();
  }
  void visit_own(FieldVisitor&) {}
  void check_own() const {}

  void check_shapes(const Inputs& inputs) const final { bound(inputs); }
  size_t workspace(const Inputs& largest) const final { return self().workspace_of(bound(largest)); }
  cudaError_t launch(const Inputs& inputs, const Launch& launch) const final {
    return self().run(bound(inputs), launch);
  }

  typename S::Attributes a;

 private:
  const Op& self() const { return static_cast<const Op&>(*this); }
  auto bound(const Inputs& inputs) const { return self().args(inputs, S::bind(inputs.all(), a)); }
};

template <class Op>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator()
      : fields_(Op().fields(false)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(const char* node, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return guarded(getPluginName(), static_cast<nvinfer1::IPluginV3*>(nullptr), [&] {
      auto plugin = std::make_unique<Op>();
      plugin->set_node(node);
      return guarded(plugin->where(), static_cast<nvinfer1::IPluginV3*>(nullptr), [&] {
        plugin->read(fields ? *fields : nvinfer1::PluginFieldCollection{});
        return plugin.release();
      });
    });
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Op::Schema::kName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// The creator of the plugin for op `S`; each plugin.cpp defines its own by creator_of. It lives as long as
// the library.
template <class S>
nvinfer1::IPluginCreatorInterface* creator();
#define DECLARE(op) \
  template <>       \
  nvinfer1::IPluginCreatorInterface* creator<opset::op>();
DFSSM_OPS(DECLARE)
DFSSM_FUSED_OPS(DECLARE)
#undef DECLARE

template <class Op>
nvinfer1::IPluginCreatorInterface* creator_of() {
  static Creator<Op> creator;
  return &creator;
}

}  // namespace dfssm::trt
