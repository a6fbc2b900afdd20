// What is wrong with the arguments of a call.
#pragma once

#include <sstream>
#include <stdexcept>

namespace torch_adadelta {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace torch_adadelta
