// The accumulators of an optimizer's parameters, handed over once and known by a number from then on: to pass two lists
// of tensors less takes a third off a step of many small parameters.
#pragma once

#include "tensor_lists.h"

#include <cstdint>
#include <memory>

namespace torch_adadelta {

struct HeldState {
  HeldState(StableIValue square_avg_list, StableIValue acc_delta_list)
      : square_avgs(square_avg_list), acc_deltas(acc_delta_list) {}

  TensorList square_avgs;
  TensorList acc_deltas;
};

// The state with this number. Throws std::runtime_error if there is none.
std::shared_ptr<const HeldState> held_state(int64_t number);

}  // namespace torch_adadelta
