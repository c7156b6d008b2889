// Which weights of a graph lie in a file beside it, read from protobuf's wire format: targets/initializers.py in C++.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dfssm::native {

struct External {
  std::string name, location;
  int dtype;  // TensorProto.DataType
  std::vector<int64_t> shape;
  int64_t offset, bytes;
};

// The weights of a ModelProto that lie in other files. Throws Failure, about `path`, for bytes that are no such
// graph.
std::vector<External> externals(const std::string& graph, const std::string& path);

}  // namespace dfssm::native
