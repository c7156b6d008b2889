#include "graph.h"

#include <cstdlib>
#include <map>

#include "failure.h"

namespace dfssm::native {
namespace {

// Numbers of the fields of onnx.proto that are read here.
constexpr uint64_t kGraph = 7;                                           // of ModelProto
constexpr uint64_t kInitializer = 5;                                     // of GraphProto
constexpr uint64_t kDims = 1, kDataType = 2, kName = 8, kExternal = 13;  // of TensorProto
constexpr uint64_t kKey = 1, kValue = 2;                                 // of StringStringEntryProto

const std::map<int, int64_t> kItemSize = {
    {1, 4}, {2, 1}, {3, 1}, {7, 8}, {10, 2}};  // by TensorProto.DataType

// The fields of a message, one after the other: `number`, and `value` or `bytes`.
struct Fields {
  const uint8_t *at, *end;
  uint64_t number = 0, value = 0;
  std::string_view bytes{};

  explicit Fields(std::string_view message)
      : at(reinterpret_cast<const uint8_t*>(message.data())), end(at + message.size()) {}

  bool next() {
    if (at == end) return false;
    const uint64_t key = varint();
    number = key >> 3;
    bytes = {};
    value = 0;
    switch (key & 7) {
      case 0:
        value = varint();
        return true;
      case 1:
        take(8);
        return true;
      case 2:
        take(varint());
        return true;
      case 5:
        take(4);
        return true;
      default:
        throw std::invalid_argument("it is no ONNX graph");
    }
  }
  // An integer: seven bits a byte, the lowest first, the top bit set where more follow.
  uint64_t varint() {
    uint64_t found = 0;
    for (int shift = 0; shift < 70 && at != end; shift += 7) {
      const uint64_t byte = *at++;
      if (shift < 64) found |= (byte & 0x7F) << shift;
      if (byte < 0x80) return found;
    }
    throw std::invalid_argument("it is cut off");
  }
  void take(uint64_t size) {
    if (size > static_cast<uint64_t>(end - at)) throw std::invalid_argument("it is cut off");
    bytes = {reinterpret_cast<const char*>(at), static_cast<size_t>(size)};
    at += size;
  }
};

// Whether the tensor lies in another file, and where.
bool read_external(std::string_view tensor, External& found) {
  std::map<std::string, std::string> place;
  for (Fields field(tensor); field.next();) {
    if (field.number == kDims && field.bytes.data()) {  // all of them, packed
      for (Fields packed(field.bytes); packed.at != packed.end;) found.shape.push_back(packed.varint());
    } else if (field.number == kDims) {
      found.shape.push_back(field.value);
    } else if (field.number == kDataType) {
      found.dtype = static_cast<int>(field.value);
    } else if (field.number == kName) {
      found.name = field.bytes;
    } else if (field.number == kExternal) {
      std::string key, value;
      for (Fields entry(field.bytes); entry.next();) {
        if (entry.number == kKey) key = entry.bytes;
        if (entry.number == kValue) value = entry.bytes;
      }
      place[key] = value;
    }
  }
  if (place.empty()) return false;
  found.location = place["location"];
  found.offset = std::strtoll(place["offset"].c_str(), nullptr, 10);
  const auto item = kItemSize.find(found.dtype);
  if (item == kItemSize.end())
    throw std::invalid_argument(found.name + " is of a kind that dfcompile does not write");
  found.bytes = item->second;
  for (const int64_t size : found.shape) {
    if (size < 0 || __builtin_mul_overflow(found.bytes, size, &found.bytes)) {
      throw std::invalid_argument(found.name + " is too large");
    }
  }
  if (found.offset < 0 || found.offset % item->second)
    throw std::invalid_argument(found.name + " is misplaced");
  return true;
}

}  // namespace

std::vector<External> externals(const std::string& graph, const std::string& path) {
  std::vector<External> all;
  try {
    for (Fields model(graph); model.next();) {
      if (model.number != kGraph) continue;
      for (Fields body(model.bytes); body.next();) {
        if (body.number != kInitializer) continue;
        External found{};
        if (read_external(body.bytes, found)) all.push_back(std::move(found));
      }
    }
  } catch (const std::invalid_argument& error) {
    throw Failure(DFSSM_BAD_BUNDLE, path + " cannot be read (" + error.what() + "): compile the model again");
  }
  return all;
}

}  // namespace dfssm::native
