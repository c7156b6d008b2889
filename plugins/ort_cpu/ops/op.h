// The one layer between the ONNX Runtime C API and the ops of this folder.
//
// An op is a class derived from Kernel with the attributes as members, `compute(Call&)` and a static
// `infer(Inference&)`; custom_op<Op>() makes the OrtCustomOp. Inside, errors are thrown as Error; the
// functions that ONNX Runtime calls catch everything and return an OrtStatus, so that nothing ever crosses
// the C boundary.
//
// The C API is used rather than its C++ wrapper: the wrapper binds to the newest API version of the headers
// at hand and aborts or throws where a status is wanted; kApiVersion is what this code needs, whatever the headers are.
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

// A message to the user; becomes an OrtStatus.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

// Name of a type as NumPy spells it, for messages.
const char* type_name(ONNXTensorElementDataType type);

// Throws the message of a failed API call, and releases the status.
void check(OrtStatus* status);

template <class F>
OrtStatus* guarded(F&& f) noexcept {
  try {
    f();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "dfssm: out of memory");
  } catch (const std::exception& e) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, e.what());
  }
}

inline constexpr ONNXTensorElementDataType kF32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
inline constexpr ONNXTensorElementDataType kF16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
inline constexpr ONNXTensorElementDataType kI8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
inline constexpr ONNXTensorElementDataType kU8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
// Any type: ONNX Runtime gives an output of this type the type of the one input that has it.
inline constexpr ONNXTensorElementDataType kDynamic = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;

inline constexpr size_t kMaxInputs = 9, kMaxRank = 4;

// What the generated header says of an op.
struct Signature {
  const char* name;
  size_t inputs, required_inputs, outputs, required_outputs;
  const char* const* input_names;
  const char* const* input_shapes;
  const char* const* input_starts;  // the attribute with an input's first column; nullptr: always whole
  const char* const* output_names;
};

template <class S>
inline constexpr Signature kSignature{S::kName,        S::kInputs,          S::kRequiredInputs,
                                      S::kOutputs,     S::kRequiredOutputs, S::kInputNames,
                                      S::kInputShapes, S::kInputStarts,     S::kOutputNames};

// One input of a call. `data` is nullptr where an optional input is absent or the tensor is empty.
struct Tensor {
  bool present = false;
  size_t rank = 0;
  std::array<int64_t, kMaxRank> dims{};
  const void* data = nullptr;

  int64_t operator[](size_t axis) const { return dims[axis]; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

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
  // Pairs of (input, output) that may share memory; ops that have any hide this one.
  static constexpr std::array<std::pair<size_t, size_t>, 0> kInplace{};

  Kernel(const Signature& signature, const OrtKernelInfo* info);

  const Signature& signature() const { return signature_; }

 protected:
  int64_t attribute(const char* name, int64_t default_value) const;
  float attribute(const char* name, float default_value) const;
  std::string attribute(const char* name, const char* default_value) const;
  // `value >= 1` for attributes that count something.
  int64_t positive(const char* name, int64_t default_value) const;

  ONNXTensorElementDataType input_type(size_t index) const;
  bool has_input(size_t index) const;  // false for an optional input left out, or given the empty name
  bool has_output(size_t index) const { return index < output_count_; }
  // The first column read of an input; negative: the input is exactly as wide as the op reads.
  int64_t start(size_t input) const { return starts_[input]; }

 private:
  friend class Call;
  template <class T, class Get>
  bool read_attribute(const char* name, const char* type, Get get, T* value) const;

  const Signature& signature_;
  const OrtKernelInfo* info_;  // valid during construction only
  size_t input_count_ = 0, output_count_ = 0;
  std::array<Tensor, kMaxInputs> constants_;
  std::array<bool, kMaxInputs> is_constant_{};
  std::array<int64_t, kMaxInputs> starts_{};
};

// One execution of a node.
class Call {
 public:
  Call(const Kernel& kernel, OrtKernelContext* context);

  const Tensor& operator[](size_t input) const { return inputs_[input]; }
  // The input, which must have this rank and no empty dimension.
  const Tensor& ranked(size_t input, size_t rank) const;
  // The input, which must have exactly this shape.
  const Tensor& expect(size_t input, std::initializer_list<int64_t> shape) const;
  // The input's [B, T, width] from its start on, which must lie inside; without a start, exactly this shape.
  Columns columns(size_t input, int64_t B, int64_t T, int64_t width) const;

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
  [[noreturn]] void wrong_shape(size_t input, const std::string& expected) const;

  const Kernel& kernel_;
  const Signature& signature_;
  OrtKernelContext* context_;
  std::array<Tensor, kMaxInputs> inputs_;
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

// Shape inference at load: what is known of the inputs, and what follows for the outputs. Dimensions may be
// symbols. A rank that does not fit leaves the output unknown; compute() is where wrong shapes become errors,
// with the numbers.
class Inference {
 public:
  struct Dim {
    int64_t value = -1;  // -1: unknown, or named by `symbol`
    std::string symbol;
  };
  using Shape = std::vector<Dim>;

  explicit Inference(OrtShapeInferContext* context) : context_(context) {}

  // Empty if the input is absent, its shape is unknown, or its rank is another.
  Shape shape(size_t input, size_t rank) const;
  void set(size_t output, const Shape& shape, ONNXTensorElementDataType type = kF32);
  // Output of the shape and type of an input.
  void like(size_t output, size_t input, size_t rank);
  // An attribute of the node; the default also where it is no integer, which the kernel will report.
  int64_t attribute(const char* name, int64_t default_value) const;

 private:
  OrtShapeInferContext* context_;
};

// Fills OrtCustomOp for `Op`, which has: `using Schema` (from dfssm_opset.h), `kInputTypes` and
// `kOutputTypes`, Op(const OrtKernelInfo*), compute(Call&) const, static infer(Inference&), and optionally `kInplace`.
template <class Op>
const OrtCustomOp* custom_op() {
  using S = typename Op::Schema;
  static_assert(S::kInputs <= kMaxInputs && std::size(Op::kInputTypes) == S::kInputs);
  static_assert(std::size(Op::kOutputTypes) == S::kOutputs);
  static const OrtCustomOp op = [] {
    OrtCustomOp it{};
    it.version = kApiVersion;
    it.GetName = [](const OrtCustomOp*) { return S::kName; };
    it.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    it.GetInputTypeCount = [](const OrtCustomOp*) { return S::kInputs; };
    it.GetOutputTypeCount = [](const OrtCustomOp*) { return S::kOutputs; };
    it.GetInputType = [](const OrtCustomOp*, size_t i) { return Op::kInputTypes[i]; };
    it.GetOutputType = [](const OrtCustomOp*, size_t i) { return Op::kOutputTypes[i]; };
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
      return guarded([&] { *kernel = new Op(info); });
    };
    it.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] {
        Call call(*static_cast<Op*>(kernel), context);
        static_cast<const Op*>(kernel)->compute(call);
      });
    };
    it.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
    // Before 1.24 shape inference follows a null pointer where a node gives an optional input the empty name.
    if (S::kInputs == S::kRequiredInputs || ort_minor >= 24) {
      it.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
        return guarded([&] {
          Inference inference(context);
          Op::infer(inference);
        });
      };
    }
    if constexpr (std::size(Op::kInplace) > 0) {
      it.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        static int in[std::size(Op::kInplace)], out[std::size(Op::kInplace)];
        for (size_t i = 0; i < std::size(Op::kInplace); ++i) {
          in[i] = static_cast<int>(Op::kInplace[i].first);
          out[i] = static_cast<int>(Op::kInplace[i].second);
        }
        *inputs = in, *outputs = out;
        return std::size(Op::kInplace);
      };
      it.ReleaseMayInplace = [](int*, int*) {};
    }
    return it;
  }();
  return &op;
}

}  // namespace dfssm::ort
