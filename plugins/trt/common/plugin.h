// The one layer between TensorRT's plugin interface and the ops beside it.
//
// An op is a class derived from PluginOf<Op> with its attributes as members. It says which types its tensors
// have, and in args() turns the inputs of a node into the arguments of its kernel, checking them on the way.
// The same args() runs when TensorRT infers shapes, where open dimensions fit anything and no data is there,
// for the bounds of a profile, for new shapes, and before each launch: so a wrong shape is an error as early
// as it can be known, with one message. Plugins keep nothing but their attributes: contexts share nothing,
// and a launch can be captured.
//
// Inside, errors are thrown as Error; the functions that TensorRT calls catch everything, log one line and
// return an error code, so that nothing ever crosses its boundary.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/kernels.h"
#include "common/tensorrt.h"
#include "dfssm_opset.h"

namespace dfssm::trt {

#if NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 1003
#error "TensorRT 10.3 or newer is needed: states are updated in place through IPluginV3OneBuildV2"
#endif

// A message to the user.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

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

inline constexpr char kPluginVersion[] = "1", kPluginNamespace[] = "";

// ---- What an op declares ----

// `activation`: float32, float16 or bfloat16, all activations of a node the same. `state`: float32 or float16.
enum class Type : uint8_t { activation, state, f32, i8, i32 };

inline constexpr int32_t kNoAlias = -1;

// What the generated header says of an op, and what its class here adds: types, and the input that each
// output shares its memory with, a state being updated in place.
struct Signature {
  const char* name;
  size_t inputs, required_inputs, outputs, required_outputs;
  const char* const* input_names;
  const char* const* input_shapes;
  const char* const* input_starts;  // the attribute with an input's first column; nullptr: always whole
  const char* const* output_names;
  const Type* input_types;
  const Type* output_types;
  const int32_t* aliases;
};

template <class Op, class S = typename Op::Schema>
inline constexpr Signature kSignature{S::kName,        S::kInputs,          S::kRequiredInputs,
                                      S::kOutputs,     S::kRequiredOutputs, S::kInputNames,
                                      S::kInputShapes, S::kInputStarts,     S::kOutputNames,
                                      Op::kInputTypes, Op::kOutputTypes,    Op::kAliases};

inline constexpr size_t kMaxInputs = 11, kMaxOutputs = 3, kMaxRank = 4;

// The first column that an op reads of each input; -1: the tensor is as wide as what it reads.
using Starts = std::array<int32_t, kMaxInputs>;

// Calls itself with the name and the member of each attribute of a plugin.
class FieldVisitor {
 public:
  virtual void operator()(const char* name, int32_t& value) = 0;
  virtual void operator()(const char* name, float& value) = 0;
  virtual void operator()(const char* name, std::string& value) = 0;

 protected:
  ~FieldVisitor() = default;
};

// ---- What an op is given ----

// A dimension that is not known yet; at run time there is none.
inline constexpr int64_t kOpen = -1;

inline int64_t times(int64_t a, int64_t b) { return a == kOpen || b == kOpen ? kOpen : a * b; }
inline int64_t plus(int64_t a, int64_t b) { return a == kOpen ? kOpen : a + b; }

// A size as the kernels take it. Throws where it does not fit.
int32_t size(int64_t value);

// Checks that ops share; they throw.
void check_positive(const char* attribute, int32_t value);
void check_columns(int64_t K);  // of an int8 product, whose sums must fit int32

// One input. `data` is nullptr as long as only shapes are asked for.
struct Tensor {
  bool present = false;
  nvinfer1::DataType type{};
  size_t rank = 0;
  std::array<int64_t, kMaxRank> dims{};
  const void* data = nullptr;

  int64_t operator[](size_t axis) const { return dims[axis]; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

Float float_type(nvinfer1::DataType type);
size_t element_size(nvinfer1::DataType type);

// The inputs of a node. Messages name the tensor, what it is and what was expected.
class Inputs {
 public:
  Inputs(const Signature& signature, const Starts& starts) : signature_(signature), starts_(starts) {}
  void set(size_t input, nvinfer1::DataType type, const nvinfer1::Dims& dims, const void* data = nullptr);

  const Tensor& operator[](size_t input) const { return inputs_[input]; }
  const char* name(size_t input) const { return signature_.input_names[input]; }
  // The input, which must have this rank and no empty dimension.
  const Tensor& ranked(size_t input, size_t rank) const;
  // The input, which must have exactly this shape, where it is known.
  const Tensor& expect(size_t input, std::initializer_list<int64_t> shape) const;
  // The input's [B, T, width] from its start on, which must lie inside; without a start, exactly this shape.
  // The stride is from token to token, in elements.
  struct Columns {
    const void* data;
    int64_t stride;
  };
  Columns columns(size_t input, int64_t B, int64_t T, int64_t width) const;

 private:
  [[noreturn]] void wrong_shape(size_t input, const std::string& expected) const;

  const Signature& signature_;
  const Starts& starts_;
  std::array<Tensor, kMaxInputs> inputs_;
};

// Outputs' shapes, as TensorRT's expressions over the inputs' dimensions.
class Inference {
 public:
  using Dim = const nvinfer1::IDimensionExpr*;

  Inference(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs, nvinfer1::IExprBuilder& builder)
      : inputs_(inputs), outputs_(outputs), builder_(builder) {}

  Dim dim(size_t input, size_t axis) const { return inputs_[input].d[axis]; }
  Dim last(size_t input) const { return inputs_[input].d[inputs_[input].nbDims - 1]; }
  Dim product(Dim a, Dim b) const { return builder_.operation(nvinfer1::DimensionOperation::kPROD, *a, *b); }
  void set(size_t output, std::initializer_list<Dim> shape);
  void like(size_t output, size_t input) { outputs_[output] = inputs_[input]; }

 private:
  const nvinfer1::DimsExprs* inputs_;
  nvinfer1::DimsExprs* outputs_;
  nvinfer1::IExprBuilder& builder_;
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
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  const Signature& signature() const { return signature_; }
  // What messages are to call this plugin: the op and `node`.
  void set_node(const char* node);
  const char* where() const noexcept { return where_.c_str(); }
  // Takes the attributes from `fields`; those it does not name keep their defaults. Throws on a wrong one.
  void read(const nvinfer1::PluginFieldCollection& fields);
  // The attributes: names and types, and their values, which lie in this plugin, if asked for.
  std::vector<nvinfer1::PluginField> fields(bool values);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  const char* getPluginName() const noexcept override { return signature_.name; }
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
  // Where this names an input, TensorRT builds engines only with the preview feature ALIASED_PLUGIN_IO_10_03.
  int32_t getAliasedInput(int32_t output) noexcept override { return signature_.aliases[output]; }

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
  explicit Plugin(const Signature& signature) : signature_(signature) { starts_.fill(-1); }

  // Calls `visit` with every attribute but the starts.
  virtual void attributes(FieldVisitor& visit) = 0;
  // Throws on a value that an attribute may not have.
  virtual void check_attributes() const = 0;
  virtual void check_shapes(const Inputs& inputs) const = 0;
  virtual void infer(Inference& inference) const = 0;
  // Bytes, for any shape that does not exceed that of the inputs.
  virtual size_t workspace(const Inputs& largest) const = 0;
  virtual cudaError_t launch(const Inputs& inputs, const Launch& launch) const = 0;

  // For the op whose attributes decide which optional tensors a node has, and of what type.
  virtual size_t input_count() const { return signature_.required_inputs; }
  virtual size_t output_count() const { return signature_.required_outputs; }
  virtual Type input_type(size_t input) const { return signature_.input_types[input]; }

 private:
  void visit_all(FieldVisitor& visit);
  void check_arity(int32_t inputs, int32_t outputs) const;
  bool type_fits(size_t input, nvinfer1::DataType type, nvinfer1::DataType first) const;
  nvinfer1::DataType output_type(size_t output, const nvinfer1::DataType* inputs) const;
  // What is known of the inputs: at build time, at a bound of a profile, at run time.
  Inputs from(const nvinfer1::DimsExprs* inputs) const;
  Inputs from(const nvinfer1::DynamicPluginTensorDesc* inputs,
              nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* bound) const;
  Inputs from(const nvinfer1::PluginTensorDesc* descs, const void* const* data) const;

  const Signature& signature_;
  Starts starts_;
  std::string where_;
  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection collection_{};
};

// What an op is derived from. It has: `using Schema` (from dfssm_opset.h, or like it), `kInputTypes`,
// `kOutputTypes`, `kAliases`, attributes(), check_attributes(), infer(), and for its kernel's `Args`: Args
// args(const Inputs&) const, which checks the shapes; size_t workspace_of(Args) const, for the largest shapes
// of a profile; cudaError_t run(Args, const Launch&).
template <class Op>
class PluginOf : public Plugin {
 public:
  PluginOf() : Plugin(kSignature<Op>) {
    using S = typename Op::Schema;
    static_assert(S::kInputs <= kMaxInputs && S::kOutputs <= kMaxOutputs);
    static_assert(std::size(Op::kInputTypes) == S::kInputs && std::size(Op::kOutputTypes) == S::kOutputs);
    static_assert(std::size(Op::kAliases) == S::kOutputs);
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded(where(), static_cast<nvinfer1::IPluginV3*>(nullptr), [&] { return new Op(self()); });
  }

 protected:
  void check_shapes(const Inputs& inputs) const final { self().args(inputs); }
  size_t workspace(const Inputs& largest) const final { return self().workspace_of(self().args(largest)); }
  cudaError_t launch(const Inputs& inputs, const Launch& launch) const final {
    return self().run(self().args(inputs), launch);
  }

 private:
  const Op& self() const { return static_cast<const Op&>(*this); }
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

}  // namespace dfssm::trt
