// The dtypes that the kernels store, for the host and the device.
#pragma once

#include <cstdint>

namespace torch_adadelta {

// A complex tensor is a real one with a trailing dimension of two.
enum class Dtype : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

constexpr int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 8;
    default:
      return 2;
  }
}

}  // namespace torch_adadelta
