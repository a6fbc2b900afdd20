// The accumulators of an optimizer's parameters, handed over once and known by a number from then on: to pass two lists
// of tensors less takes a third off a step of many small parameters.
#pragma once

#include "../tensor_lists.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace torch_adadelta::cpu {

// A list of tensors, and what was found when they were last looked at.
class KnownTensors {
 public:
  explicit KnownTensors(StableIValue list) : tensors_(list) {}

  const TensorList& tensors() const { return tensors_; }

  // Takes note of what the tensors, which will be written to, are now.
  void look(const char* list_name);

  // Whether each tensor still has the memory, the shape and the dtype that it had. False if nobody has looked.
  bool are_as_known() const;

  // What a TensorList says of its tensors, as far as is known.
  size_t size() const { return infos_.size(); }
  const TensorInfo& info(size_t index, const char*, bool) const { return infos_[index]; }
  void check_storage(size_t index, const char* list_name, const TensorInfo& info) const {
    tensors_.check_storage(index, list_name, info);
  }
  int64_t numel() const { return numel_; }

 private:
  TensorList tensors_;
  std::vector<TensorInfo> infos_;    // of all tensors, or none
  std::vector<int64_t> dimensions_;  // to which they point: the sizes and then the strides of each
  int64_t numel_ = 0;
};

class HeldState {
 public:
  HeldState(StableIValue square_avgs, StableIValue acc_deltas) : square_avgs_(square_avgs), acc_deltas_(acc_deltas) {
    check_lengths({{square_avgs_.tensors().size(), "square_avgs"}, {acc_deltas_.tensors().size(), "acc_deltas"}});
  }

  // What read_entries finds of these parameters and gradients with this state.
  const Entries& read(const TensorList& params, const TensorList& grads);

 private:
  bool is_as_known() const { return square_avgs_.are_as_known() && acc_deltas_.are_as_known(); }

  std::mutex mutex_;  // of what is known
  KnownTensors square_avgs_;
  KnownTensors acc_deltas_;
};

// The state with this number. Throws std::runtime_error if there is none.
std::shared_ptr<HeldState> held_state(int64_t number);

}  // namespace torch_adadelta::cpu
