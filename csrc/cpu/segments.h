// The values of a segment's hyperparameters on the CPU.
#pragma once

#include "../options.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

namespace torch_adadelta::cpu {

inline double value_of(const Scalar& scalar) {
  if (!scalar.is_tensor) {
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

// Calls run(what becomes of a gradient, hyperparameters), in the opmath dtype, for a parameter.
class SegmentValues {
 public:
  explicit SegmentValues(const UpdateOptions& options)
      : options_(options.gradient), factor_(value_of(options.gradient.factor)) {
    segments_.reserve(options.segments.size());
    for (const Segment& segment : options.segments) {
      double values[kHyperparameters];
      for (int k = 0; k < kHyperparameters; ++k) {
        values[k] = value_of(segment[k]);
      }
      segments_.push_back({Hyperparameters<float>(values), Hyperparameters<double>(values), segment.maximize()});
    }
  }

  template <typename Run>
  void with_values(Dtype dtype, uint32_t segment, size_t index, const Run& run) const {
    const Values& values = segments_[segment];
    if (dtype == Dtype::kFloat64) {
      run(clip_of<double>(options_, index, factor_, values.maximize), values.in_double);
    } else {
      run(clip_of<float>(options_, index, factor_, values.maximize), values.in_float);
    }
  }

 private:
  struct Values {
    Hyperparameters<float> in_float;
    Hyperparameters<double> in_double;
    bool maximize;
  };

  const GradientOptions& options_;
  double factor_;
  std::vector<Values> segments_;
};

}  // namespace torch_adadelta::cpu
