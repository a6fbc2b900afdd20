// The options of one call of adadelta_, for the host and the device.
#pragma once

#include "adadelta.h"
#include "dtypes.h"

#include <cstddef>
#include <limits>

namespace torch_adadelta {

// A number; or, if `data` is given, the one element of a tensor, which is read where the kernel runs.
struct Scalar {
  double number = 0;
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat64;
};

// What becomes of the gradients, and with what. Complete already in itself: a kernel can take it by value.
struct UpdateOptions {
  Scalar lr;
  Scalar rho;
  Scalar epsilon;
  bool maximize = false;
  double clipvalue = std::numeric_limits<double>::infinity();
  double clipnorm = 0;                  // with square_sums
  const double* square_sums = nullptr;  // of each parameter's gradient; nullptr without clipnorm
  Scalar factor = {1};
  const float* grad_scale = nullptr;  // what the gradients are divided by first; nullptr without
  const float* found_inf = nullptr;   // nothing is written if it is not zero; nullptr without

  // Whether gradients are taken as they are, or negated.
  bool is_plain() const {
    return clipvalue == std::numeric_limits<double>::infinity() && square_sums == nullptr && factor.data == nullptr &&
           factor.number == 1 && grad_scale == nullptr;
  }
};

// Whether nothing is to be written, where the options can be read.
ADADELTA_INLINE bool is_skipped(const UpdateOptions& options) {
  return options.found_inf != nullptr && *options.found_inf != 0;
}

// What becomes of the gradient of parameter `index`, where the options can be read. `factor` is the value of
// options.factor.
template <typename T>
ADADELTA_INLINE GradientClip<T> clip_of(const UpdateOptions& options, size_t index, double factor) {
  const auto clip = options.square_sums != nullptr
                        ? GradientClip<T>::by_norm(options.clipvalue, options.clipnorm, options.square_sums[index])
                        : GradientClip<T>::by_factor(options.clipvalue, factor);
  const T scale = options.grad_scale != nullptr ? static_cast<T>(*options.grad_scale) : T(1);
  return clip.scaled_by(scale).negated_if(options.maximize);
}

}  // namespace torch_adadelta
