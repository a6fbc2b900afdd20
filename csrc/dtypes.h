// The tensors of a parameter, and the dtypes that the kernels store, for the host and the device.
#pragma once

#include "adadelta.h"

#include <cstdint>

namespace torch_adadelta {

// The tensors that belong to a parameter, in the order in which the schemas list them.
enum Slot : int { kParam, kGrad, kSquareAvg, kAccDelta, kAverage, kRemainder, kTensors };

// The accumulators are the state that each parameter has. After it come those that a call has for all or for none.
constexpr int kFirstState = kSquareAvg;
constexpr int kFirstOptional = kAverage;
constexpr int kStates = kFirstOptional - kFirstState;
constexpr int kOptionals = kTensors - kFirstOptional;

constexpr bool is_written(int slot) { return slot != kGrad; }

// A complex tensor is a real one with a trailing dimension of two. Only remainders are whole numbers.
enum class Dtype : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt16 };

// That of the opmath dtype T.
template <typename T>
constexpr Dtype kDtypeOf = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;

constexpr ADADELTA_INLINE int64_t item_size(Dtype dtype) {
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
