// A plugin driven through the interfaces by which TensorRT drives it, without TensorRT: the creator makes it from the
// node's fields; types, shapes, formats and bounds are negotiated; a second plugin is made from the fields that the
// first one serializes, cloned for a context, told the shapes and launched.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace dfssm::trt::host {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginTensorDesc;
using Tensors = std::vector<PluginTensorDesc>;

// `what` is the call that the plugin refused; why, it has logged.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void check(bool done, const char* what) {
  if (!done) throw Refused(what);
}

inline PluginTensorDesc described(DataType type, const nvinfer1::Dims& dims) {
  return {dims, type, nvinfer1::TensorFormat::kLINEAR, 1};
}

// TensorRT's expressions, over dimensions that are all known.
class Constant : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Constant(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  const int64_t value_;
};

class Builder : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return &made_.emplace_back(value); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op,
                                            const nvinfer1::IDimensionExpr& a,
                                            const nvinfer1::IDimensionExpr& b) override {
    check(op == nvinfer1::DimensionOperation::kPROD, "a dimension operation other than the product");
    return constant(static_cast<const Constant&>(a).getConstantValue() *
                    static_cast<const Constant&>(b).getConstantValue());
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::deque<Constant> made_;
};

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

inline PluginPointer create(IPluginCreatorV3One& creator, const char* node,
                            const nvinfer1::PluginFieldCollection& fields, nvinfer1::TensorRTPhase phase) {
  PluginPointer plugin(creator.createPlugin(node, &fields, phase));
  check(plugin != nullptr, "createPlugin");
  return plugin;
}

class HostedPlugin {
 public:
  HostedPlugin(IPluginCreatorV3One& creator, const char* node, const nvinfer1::PluginFieldCollection& fields)
      : built_(create(creator, node, fields, nvinfer1::TensorRTPhase::kBUILD)) {
    const PluginPointer loaded =
        create(creator, node, *runtime_of(*built_).getFieldsToSerialize(), nvinfer1::TensorRTPhase::kRUNTIME);
    runs_.reset(runtime_of(*loaded).attachToContext(nullptr));
    check(runs_ != nullptr, "attachToContext");
  }

  // The outputs for these inputs, which are the only bounds too.
  Tensors outputs(const Tensors& inputs) const {
    const int32_t in = count(inputs), out = build().getNbOutputs();
    std::vector<DataType> input_types, types(static_cast<size_t>(out));
    for (const auto& desc : inputs) input_types.push_back(desc.type);
    check(!build().getOutputDataTypes(types.data(), out, input_types.data(), in), "getOutputDataTypes");

    Builder builder;
    std::vector<nvinfer1::DimsExprs> known(inputs.size()), shapes(types.size());
    for (size_t i = 0; i < known.size(); ++i) {
      known[i].nbDims = inputs[i].dims.nbDims;
      for (int32_t axis = 0; axis < known[i].nbDims; ++axis)
        known[i].d[axis] = builder.constant(inputs[i].dims.d[axis]);
    }
    check(!build().getOutputShapes(known.data(), in, nullptr, 0, shapes.data(), out, builder),
          "getOutputShapes");

    Tensors made;
    for (size_t i = 0; i < shapes.size(); ++i) {
      nvinfer1::Dims dims{shapes[i].nbDims, {}};
      for (int32_t axis = 0; axis < dims.nbDims; ++axis) dims.d[axis] = shapes[i].d[axis]->getConstantValue();
      made.push_back(described(types[i], dims));
    }

    Tensors all = inputs;
    all.insert(all.end(), made.begin(), made.end());
    const auto formats = exactly(all);
    for (int32_t i = 0; i < in + out; ++i)
      check(build().supportsFormatCombination(i, formats.data(), in, out), "supportsFormatCombination");
    check(!build().configurePlugin(formats.data(), in, formats.data() + in, out), "configurePlugin");
    return made;
  }

  // Bytes, for these shapes and smaller ones.
  size_t workspace(const Tensors& inputs, const Tensors& outputs) const {
    return build().getWorkspaceSize(exactly(inputs).data(), count(inputs), exactly(outputs).data(),
                                    count(outputs));
  }

  void enqueue(const Tensors& inputs, const Tensors& outputs, const void* const* in, void* const* out,
               void* workspace, cudaStream_t stream) const {
    auto& runtime = runtime_of(*runs_);
    check(!runtime.onShapeChange(inputs.data(), count(inputs), outputs.data(), count(outputs)),
          "onShapeChange");
    check(!runtime.enqueue(inputs.data(), outputs.data(), in, out, workspace, stream), "enqueue");
  }

  const nvinfer1::IPluginV3& plugin() const { return *built_; }

 private:
  static nvinfer1::IPluginV3OneRuntime& runtime_of(nvinfer1::IPluginV3& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
  }
  nvinfer1::IPluginV3OneBuild& build() const {
    return *static_cast<nvinfer1::IPluginV3OneBuild*>(
        built_->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
  }
  static int32_t count(const Tensors& tensors) { return static_cast<int32_t>(tensors.size()); }
  static std::vector<DynamicPluginTensorDesc> exactly(const Tensors& tensors) {
    std::vector<DynamicPluginTensorDesc> bounds;
    for (const auto& desc : tensors) bounds.push_back({desc, desc.dims, desc.dims, desc.dims});
    return bounds;
  }

  PluginPointer built_, runs_;
};

}  // namespace dfssm::trt::host
