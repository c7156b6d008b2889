// The CUDA calls of examples/trt_cpp and native/ on the host. Work is done when somebody waits for it, not before; a stream that is
// being recorded does none. What would be wrong on a GPU ends the program.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

inline void toy_expects(bool good) {
  if (!good) std::abort();
}

using ToyWork = std::vector<std::function<void()>>;

struct ToyStream {
  bool recording = false;
  ToyWork queued, recorded;
  void add(std::function<void()> work) { (recording ? recorded : queued).push_back(std::move(work)); }
};

using cudaStream_t = ToyStream*;
using cudaGraph_t = ToyWork*;
using cudaGraphExec_t = ToyWork*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
constexpr unsigned cudaStreamNonBlocking = 1;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

inline bool toy_recording = false;

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = new ToyStream, cudaSuccess; }

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete stream, cudaSuccess; }

inline cudaError_t cudaMalloc(void** address, size_t bytes) {
  toy_expects(!toy_recording);
  return *address = std::malloc(bytes), std::memset(*address, 85, bytes), cudaSuccess;
}
inline cudaError_t cudaFree(void* address) { return std::free(address), cudaSuccess; }
inline cudaError_t cudaMallocHost(void** address, size_t bytes) { return cudaMalloc(address, bytes); }

inline cudaError_t cudaFreeHost(void* address) { return cudaFree(address); }

inline int toy_device = 1;  // that the program has chosen
inline cudaError_t cudaGetDevice(int* device) { return *device = toy_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return toy_device = device, cudaSuccess; }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  return stream->add([=] { std::memcpy(to, from, bytes); }), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return stream->add([=] { std::memset(to, value, bytes); }), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  toy_expects(!stream->recording);
  for (const auto& work : ToyWork(std::move(stream->queued))) work();
  return stream->queued.clear(), cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return stream->recorded.clear(), toy_recording = stream->recording = true, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  toy_recording = stream->recording = false;
  return *graph = new ToyWork(stream->recorded), cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  return *made = new ToyWork(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const auto& work : *graph) stream->add(work);
  return cudaSuccess;
}
