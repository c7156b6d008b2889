// The creators of all plugins: of the ops, and of those fused of them.
#pragma once

#include <vector>

#include "common/plugin.h"

namespace dfssm::trt {

inline const std::vector<nvinfer1::IPluginCreatorInterface*>& creators() {
#define CREATOR(op) creator<opset::op>(),
  static const std::vector<nvinfer1::IPluginCreatorInterface*> all = {DFSSM_OPS(CREATOR)
                                                                          DFSSM_FUSED_OPS(CREATOR)};
#undef CREATOR
  return all;
}

}  // namespace dfssm::trt
