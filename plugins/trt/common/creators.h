// The creators of the plugins; they live as long as the library.
#pragma once

#include <NvInferRuntime.h>

#include <array>

namespace dfssm::trt {

nvinfer1::IPluginCreatorInterface* binary_scaffold_matmul_creator();
nvinfer1::IPluginCreatorInterface* int8_matmul_creator();
nvinfer1::IPluginCreatorInterface* causal_conv1d_step_creator();
nvinfer1::IPluginCreatorInterface* selective_scan_step_creator();
nvinfer1::IPluginCreatorInterface* gated_rms_norm_creator();
nvinfer1::IPluginCreatorInterface* rms_norm_creator();
nvinfer1::IPluginCreatorInterface* norm_scaffold_conv_creator();
nvinfer1::IPluginCreatorInterface* gated_norm_scaffold_add_creator();

inline const std::array<nvinfer1::IPluginCreatorInterface*, 8>& creators() {
  static const std::array<nvinfer1::IPluginCreatorInterface*, 8> all = {
      binary_scaffold_matmul_creator(), int8_matmul_creator(),
      causal_conv1d_step_creator(),     selective_scan_step_creator(),
      gated_rms_norm_creator(),         rms_norm_creator(),
      norm_scaffold_conv_creator(),     gated_norm_scaffold_add_creator()};
  return all;
}

}  // namespace dfssm::trt
