// The one layer between the ONNX Runtime C API and the ops (ops/call.h): custom_op<S>() makes the OrtCustomOp of op S.
// Inside, errors are thrown as Error; the functions that ONNX Runtime calls catch everything and return an OrtStatus,
// so that nothing ever crosses the C boundary.
//
// The C API is used rather than its C++ wrapper: the wrapper binds to the newest API version of the headers
// at hand and aborts or throws where a status is wanted; kApiVersion is what this code needs, whatever the
// headers are.
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops/call.h"

namespace dfssm::ort {

// ONNX Runtime 1.18: the first to know OrtCustomOp::GetMayInplace, and the first to accept ONNX opset 21.
inline constexpr uint32_t kApiVersion = 18;

// Set by RegisterCustomOps before any op is created.
extern const OrtApi* api;
// Its minor version: 24 for 1.24.1.
extern int ort_minor;

using opset::Error, opset::TensorSpec, opset::fail, opset::quoted;

// Name of a type as NumPy spells it, for messages.
const char* type_name(ONNXTensorElementDataType type);

// Throws the message of a failed API call, and releases the status.
void check(OrtStatus* status);

// f(), or its error behind `where`: the op and the name of its node.
template <class F>
OrtStatus* guarded(const std::string& where, F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "dfssm: out of memory");
  } catch (const std::exception& e) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, (where + ": " + e.what()).c_str());
  }
}

std::string where(const opset::Op& op, const OrtKernelInfo* info);

inline constexpr ONNXTensorElementDataType kF32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

// The type that a tensor must have; undefined, which is any, where it has a choice: ONNX Runtime gives an
// output of this type the type of the one input that has it.
ONNXTensorElementDataType onnx_type(const TensorSpec& spec);

// What a kernel knows when the session loads: attributes, input types, and the inputs that are constant,
// which are used where they lie (often a mapped file). Shapes and addresses of constants are read here once:
// asking ONNX Runtime for a shape costs an allocation. With its six weights asked for at each call, an empty
// BinaryScaffoldMatMul took 2.6 us instead of 1.2 (chain of 500, ONNX Runtime 1.31, where a Mul takes 0.8).
class Kernel {
 public:
  Kernel(const opset::Op& op, const OrtKernelInfo* info);

  const std::string& where() const { return where_; }

 protected:
  // Reads the types of the inputs that have a choice, and checks that the optional inputs and outputs are there
  // if and only if a type asks for them.
  void read_types();

  // Called with each attribute of the op: reads what the node has.
  class Reader {
   public:
    explicit Reader(const Kernel& kernel) : kernel_(kernel) {}
    void operator()(const char* name, int64_t& value) const;
    void operator()(const char* name, float& value) const;
    void operator()(const char* name, std::string& value) const;

   private:
    template <class T, class Get>
    void read(const char* name, const char* type, Get get, T* value) const;

    const Kernel& kernel_;
  };

 private:
  friend class OrtCall;
  opset::DType input_type(size_t index) const;
  bool has_input(size_t index) const;  // false for an optional input left out, or given the empty name
  bool has_attribute(const std::string& name) const;
  const char* attribute_type(const char* name) const;
  void check_misspelt(const char* name) const;

  const opset::Op& op_;
  const OrtKernelInfo* info_;  // valid during construction only
  std::string where_;
  size_t input_count_ = 0, output_count_ = 0;
  std::array<Tensor, opset::kMaxInputs> constants_;
  std::array<bool, opset::kMaxInputs> is_constant_{};
  std::array<opset::DType, opset::kMaxInputs> types_{};
};

// One execution of a node, on ONNX Runtime's thread pool.
class OrtCall final : public Call {
 public:
  OrtCall(const Kernel& kernel, OrtKernelContext* context);

  const Tensor* inputs() const { return inputs_.data(); }

 private:
  void share_out(int64_t units, double unit_ns, Range range, const void* f) override;
  void* output_data(size_t index, const int64_t* shape, size_t rank) override;

  const opset::Op& op_;
  OrtKernelContext* context_;
};

// Time that nodes of one op took, from the call to the return. Counted while `wanted`: reading the
// clock twice a node takes 0.1 % of a token of 1.3B.
class OpTime {
 public:
  static std::atomic<bool> wanted;

  template <class F>
  OrtStatus* count(F&& f) {
    if (!wanted.load(std::memory_order_relaxed)) return f();
    const auto start = std::chrono::steady_clock::now();
    OrtStatus* status = f();
    nanoseconds_ += std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
    return status;
  }
  int64_t nanoseconds() const { return nanoseconds_; }
  void reset() { nanoseconds_ = 0; }

 private:
  std::atomic<int64_t> nanoseconds_{0};
};

template <class S>
inline OpTime op_time;

// The kernel of op `S`.
template <class S>
class KernelOf : public Kernel {
 public:
  explicit KernelOf(const OrtKernelInfo* info) : Kernel(S::kOp, info) {
    attributes_.visit(Reader(*this));
    attributes_.check();
    read_types();
  }

  void compute(OrtKernelContext* context) const {
    OrtCall call(*this, context);
    run<S>(call, attributes_, S::bind(call.inputs(), attributes_));
  }

 private:
  typename S::Attributes attributes_;
};

// Shape inference at load: what follows for the outputs from what is known of the inputs, where dimensions
// may be symbols. A rank that does not fit leaves outputs unknown; compute() is where wrong shapes become
// errors, with the numbers.
void infer_shapes(const opset::Op& op, OrtShapeInferContext* context);

template <class S>
const OrtCustomOp* custom_op() {
  static const OrtCustomOp op = [] {
    OrtCustomOp it{};
    it.version = kApiVersion;
    it.GetName = [](const OrtCustomOp*) { return S::kName; };
    it.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    it.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return S::kInputs; };
    it.GetOutputTypeCount = [](const OrtCustomOp*) { return S::kOutputs; };
    it.GetInputType = [](const OrtCustomOp*, size_t i) { return onnx_type(S::kInputSpecs[i]); };
    it.GetOutputType = [](const OrtCustomOp*, size_t i) { return onnx_type(S::kOutputSpecs[i]); };
    it.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return i < S::kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    it.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return i < S::kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    it.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    it.GetVariadicInputMinArity = it.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    it.GetVariadicInputHomogeneity = it.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    it.GetStartVersion = [](const OrtCustomOp*) { return opset::kVersion; };
    it.GetEndVersion = [](const OrtCustomOp*) { return opset::kVersion; };
    it.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded(where(S::kOp, info), [&] { *kernel = new KernelOf<S>(info); });
    };
    it.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto& self = *static_cast<const KernelOf<S>*>(kernel);
      return op_time<S>.count([&] { return guarded(self.where(), [&] { self.compute(context); }); });
    };
    it.KernelDestroy = [](void* kernel) { delete static_cast<KernelOf<S>*>(kernel); };
    // Before 1.24 shape inference follows a null pointer where a node gives an optional input the empty name.
    if (size_t{S::kInputs} == S::kRequiredInputs || ort_minor >= 24) {
      it.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
        return guarded(S::kName, [&] { infer_shapes(S::kOp, context); });
      };
    }
    it.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      static int in[S::kOutputs], out[S::kOutputs];
      size_t count = 0;
      for (size_t i = 0; i < S::kOutputs; ++i) {
        if (S::kOutputSpecs[i].over < 0) continue;
        in[count] = S::kOutputSpecs[i].over, out[count] = static_cast<int>(i);
        ++count;
      }
      *inputs = in, *outputs = out;
      return count;
    };
    it.ReleaseMayInplace = [](int*, int*) {};
    return it;
  }();
  return &op;
}

}  // namespace dfssm::ort
