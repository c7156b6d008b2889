// The ops of domain ai.dfssm, version 1.
#pragma once

#include <onnxruntime_c_api.h>

namespace dfssm::ort {

const OrtCustomOp* binary_scaffold_matmul();
const OrtCustomOp* int8_matmul();
const OrtCustomOp* causal_conv1d_step();
const OrtCustomOp* selective_scan_step();
const OrtCustomOp* gated_rms_norm();
const OrtCustomOp* rms_norm();

}  // namespace dfssm::ort
