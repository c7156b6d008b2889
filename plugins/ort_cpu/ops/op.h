// The one layer between the ONNX Runtime C API and the ops of this folder.
//
// An op is a class derived from KernelOf<Schema>, which has read its attributes, and has `compute(Call&)`,
// whose call has checked the inputs; custom_op<Op>() makes the OrtCustomOp. Inside, errors are thrown as
// Error; the functions that ONNX Runtime calls catch everything and return an OrtStatus, so that nothing ever
// crosses the C boundary.
//
// The C API is used rather than its C++ wrapper: the wrapper binds to the newest API version of the headers
// at hand and aborts or throws where a status is wanted; kApiVersion is what this code needs, whatever the
// headers are.
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dfssm_opset.h"
#include "kernels.h"

namespace dfssm::ort {

// ONNX Runtime 1.18: the first to know OrtCustomOp::GetMayInplace, and the first to accept ONNX opset 21.
inline constexpr uint32_t kApiVersion = 18;

// Set by RegisterCustomOps before any op is created.
extern const OrtApi* api;
// Its minor version: 24 for 1.24.1.
extern int ort_minor;

using opset::Error, opset::Tensor, opset::TensorSpec, opset::quoted;

// Throws an Error.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

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

// The columns that an op reads of an input [B, T, columns]; `stride` floats from one token to the next.
struct Columns {
  const float* data;
  int64_t stride;
};

// What a kernel knows when the session loads: attributes, input types, and the inputs that are constant,
// which are used where they lie (often a mapped file). Shapes and addresses of constants are read here once:
// asking ONNX Runtime for a shape costs an allocation. With its six weights asked for at each call, an empty
// BinaryScaffoldMatMul took 2.6 us instead of 1.2 (chain of 500, ONNX Runtime 1.31, where a Mul takes 0.8).
class Kernel {
 public:
  Kernel(const opset::Op& op, const OrtKernelInfo* info);

  const std::string& where() const { return where_; }

 protected:
  // The type of an input, which must be one that the op takes.
  opset::DType input_type(size_t index) const;
  bool has_input(size_t index) const;  // false for an optional input left out, or given the empty name
  bool has_output(size_t index) const { return index < output_count_; }

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
  friend class Call;
  bool has_attribute(const std::string& name) const;
  const char* attribute_type(const char* name) const;
  void check_misspelt(const char* name) const;

  const opset::Op& op_;
  const OrtKernelInfo* info_;  // valid during construction only
  std::string where_;
  size_t input_count_ = 0, output_count_ = 0;
  std::array<Tensor, opset::kMaxInputs> constants_;
  std::array<bool, opset::kMaxInputs> is_constant_{};
};

// What an op is derived from: `attributes`, read and checked.
template <class S>
class KernelOf : public Kernel {
 public:
  using Schema = S;

  explicit KernelOf(const OrtKernelInfo* info) : Kernel(S::kOp, info) {
    attributes.visit(Reader(*this));
    attributes.check();
  }

 protected:
  typename S::Attributes attributes;
};

// One execution of a node.
class Call {
 public:
  Call(const Kernel& kernel, OrtKernelContext* context);

  // The sizes of the op `S`, once the inputs are what its schema says.
  template <class S>
  typename S::Sizes bind(const typename S::Attributes& attributes) const {
    return S::bind(inputs_.data(), attributes);
  }
  const Tensor& operator[](size_t input) const { return inputs_[input]; }
  // Of a bound input: its columns from `start` on; all of them where that is -1.
  Columns columns(size_t input, int64_t start) const {
    return {inputs_[input].as<float>() + (start < 0 ? 0 : start), inputs_[input].last()};
  }

  template <class T>
  T* output(size_t index, std::initializer_list<int64_t> shape) {
    return static_cast<T*>(output_data(index, shape.begin(), shape.size()));
  }

  // f(begin, end) over [0, units), on ONNX Runtime's thread pool where that pays; `unit_ns` is the estimated
  // time of one unit on one core with AVX-512; where the kernels are slower, the chunks last longer, no more.
  // f must not throw.
  template <class F>
  void parallel(int64_t units, double unit_ns, const F& f) {
    const int64_t per_chunk = chunk_units(units, unit_ns);
    if (per_chunk >= units) {
      if (units > 0) f(int64_t{0}, units);
      return;
    }
    struct Job {
      const F& f;
      int64_t units, per_chunk;
    } job{f, units, per_chunk};
    const auto run_chunk = [](void* data, size_t chunk) {
      const Job& mine = *static_cast<const Job*>(data);
      const int64_t begin = static_cast<int64_t>(chunk) * mine.per_chunk;
      const int64_t end = begin + mine.per_chunk;
      mine.f(begin, end < mine.units ? end : mine.units);
    };
    parallel_for(run_chunk, (units + per_chunk - 1) / per_chunk, &job);
  }

 private:
  static int64_t chunk_units(int64_t units, double unit_ns);
  void parallel_for(void (*chunk)(void*, size_t), int64_t chunks, void* job);
  void* output_data(size_t index, const int64_t* shape, size_t rank);

  const opset::Op& op_;
  OrtKernelContext* context_;
  std::array<Tensor, opset::kMaxInputs> inputs_;
};

// Pieces of work at the head of a parallel section that all of it needs: each thread that arrives takes
// pieces until none is left, and waits for those that others took. A section of its own would cost a meeting
// of the threads, and doing the pieces before the section leaves them to one. Whoever has taken a piece is
// running, so the wait ends.
class Prologue {
 public:
  explicit Prologue(int64_t pieces) : pieces_(pieces) {}

  // piece(i) for every i in [0, pieces), once over all threads; must not throw.
  template <class F>
  void complete(const F& piece) {
    if (done_.load(std::memory_order_acquire) == pieces_) return;
    for (int64_t i; (i = taken_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) {
      piece(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    while (done_.load(std::memory_order_acquire) < pieces_) {
    }
  }

 private:
  const int64_t pieces_;
  std::atomic<int64_t> taken_{0}, done_{0};
};

// Memory of the calling thread that grows to the largest request and stays: no allocation in the steady
// state. One user at a time per thread: a kernel that hands it to workers lets the workers take theirs, on
// their threads. nullptr if there is no memory, so that workers, which must not throw, can use it.
void* thread_scratch(size_t bytes) noexcept;

// Shape inference at load: what follows for the outputs from what is known of the inputs, where dimensions
// may be symbols. A rank that does not fit leaves outputs unknown; compute() is where wrong shapes become
// errors, with the numbers.
void infer_shapes(const opset::Op& op, OrtShapeInferContext* context);

// The op `S` of the opset for ONNX Runtime; each file beside this one defines those of its ops by custom_op.
template <class S>
const OrtCustomOp* op();
#define DECLARE(name) \
  template <>         \
  const OrtCustomOp* op<opset::name>();
DFSSM_OPS(DECLARE)
#undef DECLARE

// Fills OrtCustomOp for `Op`, derived from KernelOf, which has Op(const OrtKernelInfo*) and compute(Call&)
// const.
template <class Op>
const OrtCustomOp* custom_op() {
  using S = typename Op::Schema;
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
      return guarded(where(S::kOp, info), [&] { *kernel = new Op(info); });
    };
    it.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Op& self = *static_cast<const Op*>(kernel);
      return guarded(self.where(), [&] {
        Call call(self, context);
        self.compute(call);
      });
    };
    it.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
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
