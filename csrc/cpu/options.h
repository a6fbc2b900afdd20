// What the options of an update come to on the CPU.
#pragma once

#include "../adadelta.h"
#include "../update_options.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>

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

// What becomes of the gradient of parameter `index`. `factor` is the value of options.factor.
template <typename T>
GradientClip<T> clip_of(const UpdateOptions& options, size_t index, double factor) {
  const auto clip = options.square_sums != nullptr
                        ? GradientClip<T>::by_norm(options.clipvalue, options.clipnorm, options.square_sums[index])
                        : GradientClip<T>::by_factor(options.clipvalue, factor);
  return clip.scaled_by(options.grad_scale != nullptr ? *options.grad_scale : T(1)).negated_if(options.maximize);
}

}  // namespace torch_adadelta::cpu
