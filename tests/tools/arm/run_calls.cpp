// Runs ops on calls that stand in its input, where neither Python nor ONNX Runtime is: `run_calls <calls >results`. First it
// writes the names of the kernel tables that this CPU can run, as text; then for each call a result.
//
//   text     u64 length, bytes
//   tensor   name text, dtype text as NumPy spells it, u64 rank, i64 dimensions, u64 place, data in C order
//   call     op text, table text, i64 threads, i64 whether states are updated in place,
//            u64 count, attributes: name text, f64 number, text (of an attribute that is one)
//            u64 count, tensors: the inputs, and where it is given "out" with what it holds before the call
//   result   text of the error, u64 count, tensors (without names: empty)
//
// A tensor lies as many bytes behind the start of a page as `place` says, between two pages that cannot be touched; an
// output that was not given ends at such a page. `quantize_activations` of x is a call, too.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "ops/call.h"

namespace dfssm {
namespace {

using opset::Error, opset::TensorSpec, opset::fail, opset::quoted;
using Shape = std::vector<int64_t>;

void read_bytes(void* to, size_t count) {
  if (std::fread(to, 1, count, stdin) == count) return;
  std::fputs("run_calls: the input ends within a call\n", stderr);
  std::exit(1);
}
template <class T>
T read() {
  T value;
  read_bytes(&value, sizeof value);
  return value;
}
std::string read_text() {
  std::string text(read<uint64_t>(), '\0');
  read_bytes(text.data(), text.size());
  return text;
}

template <class T>
void write(T value) {
  std::fwrite(&value, 1, sizeof value, stdout);
}
void write_text(const std::string& text) {
  write<uint64_t>(text.size());
  std::fwrite(text.data(), 1, text.size(), stdout);
}

size_t size_of(const std::string& dtype) {
  return dtype == "float32" || dtype == "int32" ? 4 : dtype == "float16" ? 2 : 1;
}

// Memory of an array between two pages that cannot be touched.
class Guarded {
 public:
  explicit Guarded(size_t bytes)
      : Guarded(bytes, (page() - bytes % page()) % page()) {}  // ends at one of them
  Guarded(size_t bytes, size_t place) : size_((place + bytes + page() - 1) / page() * page() + 2 * page()) {
    void* memory = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory");
    base_ = static_cast<std::byte*>(memory);
    const size_t inside = size_ - 2 * page();
    if (inside && mprotect(base_ + page(), inside, PROT_READ | PROT_WRITE)) fail("mprotect failed");
    data = base_ + page() + place;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, size_); }

  std::byte* data;

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  std::byte* base_;
  size_t size_;
};

struct Array {
  Array(std::string dtype_, Shape shape_)
      : dtype(std::move(dtype_)), shape(std::move(shape_)), memory(bytes()) {}
  Array(std::string dtype_, Shape shape_, size_t place)
      : dtype(std::move(dtype_)), shape(std::move(shape_)), memory(bytes(), place) {}

  size_t bytes() const {
    size_t count = size_of(dtype);
    for (const int64_t size : shape) count *= static_cast<size_t>(size);
    return count;
  }

  std::string dtype;
  Shape shape;
  Guarded memory;
};

struct Request {
  std::string op, table;
  int64_t threads, in_place;
  std::map<std::string, std::pair<double, std::string>> attributes;
  std::map<std::string, Array> arrays;
};

Request read_request() {
  Request request{read_text(), read_text(), read<int64_t>(), read<int64_t>(), {}, {}};
  for (auto count = read<uint64_t>(); count > 0; --count) {
    const std::string name = read_text();
    const auto number = read<double>();
    request.attributes[name] = {number, read_text()};
  }
  for (auto count = read<uint64_t>(); count > 0; --count) {
    const std::string name = read_text(), dtype = read_text();
    Shape shape(read<uint64_t>());
    read_bytes(shape.data(), shape.size() * sizeof(int64_t));
    const auto place = read<uint64_t>();
    const auto [at, is_new] = request.arrays.try_emplace(name, dtype, shape, place);
    read_bytes(at->second.memory.data, at->second.bytes());
  }
  return request;
}

void write_array(const Array& array) {
  write_text("");
  write_text(array.dtype);
  write<uint64_t>(array.shape.size());
  for (const int64_t size : array.shape) write(size);
  write<uint64_t>(0);
  std::fwrite(array.memory.data, 1, array.bytes(), stdout);
}

opset::DType type_of(const std::string& dtype) {
  return dtype == "float32"   ? opset::kFloat32
         : dtype == "float16" ? opset::kFloat16
         : dtype == "int8"    ? opset::kInt8
         : dtype == "uint8"   ? opset::kUInt8
                              : opset::DType{};
}

const KernelTable& table_of(const std::string& name) {
  if (const KernelTable* table = kernels_for(name.c_str())) return *table;
  fail("isa is '" + name + "'; this CPU can use: " + usable_names());
}

// Calls `op` with the request's arrays; `outputs` are those of the request or lie in `made`.
template <class S>
class RequestedCall final : public Call {
 public:
  RequestedCall(Request& request, std::deque<Array>& made, std::vector<const Array*>& outputs)
      : Call(table_of(request.table)), request_(request), made_(made), outputs_(outputs) {
    attributes_.visit([&](const char* name, auto& member) {
      const auto at = request.attributes.find(name);
      if (at == request.attributes.end()) return;
      if constexpr (std::is_same_v<std::decay_t<decltype(member)>, std::string>) {
        member = at->second.second;
      } else {
        member = static_cast<std::decay_t<decltype(member)>>(at->second.first);
      }
    });
    attributes_.check();
    for (size_t i = 0; i < S::kInputs; ++i) take(i);
  }

  void run() { dfssm::run<S>(*this, attributes_, S::bind(inputs_.data(), attributes_)); }

 private:
  // Activations may lack leading dimensions.
  void take(size_t input) {
    const TensorSpec& spec = S::kInputSpecs[input];
    const auto at = request_.arrays.find(spec.name);
    inputs_[input].present = at != request_.arrays.end();
    if (!inputs_[input].present) return;
    types_[input] = type_of(at->second.dtype);
    if (!(spec.dtypes & types_[input])) opset::wrong_dtype(S::kOp, input, at->second.dtype.c_str());
    Shape shape = at->second.shape;
    const bool tokens = spec.rank == 3 && spec.dims[1].text == std::string("T");
    if (tokens && shape.size() < 3) shape.insert(shape.begin(), 3 - shape.size(), 1);
    set_dims(spec, inputs_[input], shape.data(), shape.size());
    inputs_[input].data = at->second.memory.data;
  }

  void share_out(int64_t units, double, Range range, const void* f) override {
    const int64_t count = std::clamp<int64_t>(request_.threads, 1, units);
    const auto block = [&](int64_t i) { range(f, units * i / count, units * (i + 1) / count); };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < count; ++i) others.emplace_back(block, i);
    block(0);
    for (std::thread& other : others) other.join();
  }

  void* output_data(size_t index, const int64_t* shape, size_t rank) override {
    if constexpr (size_t{S::kOutputs} > 1) {
      if (index > 0) {
        Array& over = request_.arrays.at(S::kInputSpecs[S::kOutputSpecs[index].over].name);
        return add(request_.in_place ? over : made_.emplace_back(over.dtype, over.shape));
      }
    }
    const auto out = request_.arrays.find("out");
    return add(out != request_.arrays.end() ? out->second
                                            : made_.emplace_back("float32", Shape(shape, shape + rank)));
  }

  void* add(Array& array) {
    outputs_.push_back(&array);
    return array.memory.data;
  }

  typename S::Attributes attributes_;
  Request& request_;
  std::deque<Array>& made_;
  std::vector<const Array*>& outputs_;
};

void quantize(Request& request, std::deque<Array>& made, std::vector<const Array*>& outputs) {
  const Array& x = request.arrays.at("x");
  const int64_t n = x.shape.at(0), K = x.shape.at(1);
  Array &q = made.emplace_back("int8", Shape{n, K}), &s = made.emplace_back("float32", Shape{n}),
        &sum = made.emplace_back("int32", Shape{n});
  table_of(request.table)
      .quantize_activations(reinterpret_cast<const float*>(x.memory.data), n, K,
                            reinterpret_cast<int8_t*>(q.memory.data), reinterpret_cast<float*>(s.memory.data),
                            reinterpret_cast<int32_t*>(sum.memory.data));
  outputs = {&q, &s, &sum};
}

template <class S>
bool runs(Request& request, std::deque<Array>& made, std::vector<const Array*>& outputs) {
  if (request.op != S::kName) return false;
  RequestedCall<S>(request, made, outputs).run();
  return true;
}

void answer(Request request) {
  std::deque<Array> made;
  std::vector<const Array*> outputs;
  std::string error;
  try {
    if (request.op == "quantize_activations") {
      quantize(request, made, outputs);
#define OR_RUNS(name) || runs<opset::name>(request, made, outputs)
    } else if (!(false DFSSM_OPS(OR_RUNS) DFSSM_DEFERRED_OPS(OR_RUNS))) {
#undef OR_RUNS
      fail("there is no such op");
    }
  } catch (const Error& e) {
    error = request.op + ": " + e.what();
    outputs.clear();
  }
  write_text(error);
  write<uint64_t>(outputs.size());
  for (const Array* output : outputs) write_array(*output);
  std::fflush(stdout);
}

}  // namespace
}  // namespace dfssm

int main() {
  dfssm::write_text(dfssm::usable_names());
  std::fflush(stdout);
  for (int c; (c = std::fgetc(stdin)) != EOF;) {
    std::ungetc(c, stdin);
    dfssm::answer(dfssm::read_request());
  }
}
