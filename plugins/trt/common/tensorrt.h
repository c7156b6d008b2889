// The TensorRT that this process runs. libdfssm_trt.so is linked against none, so that one file serves
// TensorRT 10, 11 and TensorRT-RTX. The interfaces of plugins are the same in all three; those of loggers and
// registries are not.
#pragma once

namespace nvinfer1 {
class IPluginRegistry;
}

namespace dfssm::trt {

// One line to the logger of this TensorRT, or to stderr if it has none yet.
void log_error(const char* message) noexcept;

// The global registry of this TensorRT if it is the one of our headers, else nullptr.
nvinfer1::IPluginRegistry* loaded_registry() noexcept;

}  // namespace dfssm::trt
