// The values of an update's options on the CPU.
#pragma once

#include "../update_options.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace torch_adadelta::cpu {

inline double value_of(const Scalar& scalar) {
  if (scalar.data == nullptr) {
    return scalar.number;
  }
  switch (scalar.dtype) {
    case Dtype::kFloat32:
      return *static_cast<const float*>(scalar.data);
    case Dtype::kFloat16:
      return *static_cast<const torch::headeronly::Half*>(scalar.data);
    case Dtype::kBFloat16:
      return *static_cast<const torch::headeronly::BFloat16*>(scalar.data);
    default:
      return *static_cast<const double*>(scalar.data);
  }
}

}  // namespace torch_adadelta::cpu
