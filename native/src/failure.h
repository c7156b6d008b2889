// What the library throws within itself; capi.cpp makes a status and a line of it.
#pragma once

#include <dfssm/runtime.h>

#include <stdexcept>
#include <string>

namespace dfssm::native {

struct Failure : std::runtime_error {
  Failure(dfssm_status code, const std::string& text) : std::runtime_error(text), status(code) {}
  dfssm_status status;
};

inline void require(bool good, dfssm_status status, const std::string& text) {
  if (!good) throw Failure(status, text);
}

}  // namespace dfssm::native
