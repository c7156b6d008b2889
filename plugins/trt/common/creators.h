// The creators of the plugins, one an op; they live as long as the library.
#pragma once

#include <NvInferRuntime.h>

namespace dfssm::trt {

nvinfer1::IPluginCreatorInterface* binary_scaffold_matmul_creator();
nvinfer1::IPluginCreatorInterface* int8_matmul_creator();
nvinfer1::IPluginCreatorInterface* causal_conv1d_step_creator();
nvinfer1::IPluginCreatorInterface* selective_scan_step_creator();
nvinfer1::IPluginCreatorInterface* gated_rms_norm_creator();
nvinfer1::IPluginCreatorInterface* rms_norm_creator();

}  // namespace dfssm::trt
