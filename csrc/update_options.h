// The options of one call of adadelta_, for the host and the device.
#pragma once

#include "dtypes.h"

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

}  // namespace torch_adadelta
