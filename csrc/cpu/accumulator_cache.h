// The accumulators of an optimizer's parameters, handed over once and known by a number from then on: to pass two lists
// of tensors less takes a third off a step of many small parameters.
#pragma once

#include "../options.h"

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

namespace torch_adadelta::cpu {

// What was found of the tensors of a list when they were last looked at.
class CachedTensorInfo {
 public:
  explicit CachedTensorInfo(const TensorList& tensors) : tensors_(tensors) {}

  // Takes note of what the tensors, which will be written to, are now. `name` as in TensorList::info.
  void look(const char* name);

  // Whether each tensor still has the memory, the shape and the dtype that it had. False if nobody has looked.
  bool are_as_known() const;

  // What a TensorList says of its tensors, as far as is known.
  size_t size() const { return infos_.size(); }
  const TensorInfo& info(size_t index, Slot, TensorInfo&) const { return infos_[index]; }
  void check_storage(size_t index, const char* name, const TensorInfo& info) const {
    tensors_.check_storage(index, name, info);
  }

 private:
  const TensorList& tensors_;
  std::vector<TensorInfo> infos_;    // of all tensors, or none
  std::vector<int64_t> dimensions_;  // to which they point: the sizes and then the strides of each
};

class AccumulatorCache {
 public:
  explicit AccumulatorCache(ArgumentReader reader);

  // For `read`, and as long as its result is in use.
  std::mutex& mutex() { return mutex_; }

  // What read_entries finds of these parameters and gradients with these accumulators.
  const Workspace& read(const TensorList& params, const TensorList& grads, const OptionArguments& given);

 private:
  std::mutex mutex_;
  TensorList states_[kStates];
  CachedTensorInfo known_[kStates];
  Workspace workspace_;  // its own, so that optimizers that take turns do not forget each other's memory
};

// Owns what the dispatcher handed over to adadelta_.cached.
class CachedUpdateArguments {
 public:
  explicit CachedUpdateArguments(ArgumentReader reader);
  ~CachedUpdateArguments();

  const Workspace& workspace() const { return *workspace_; }
  const UpdateOptions& options() const { return options_; }
  bool check_only() const { return given_.check_only(); }

 private:
  std::optional<HeldGil> gil_;  // before what is destroyed while it is held
  TensorList params_, grads_;
  int64_t number_;
  OptionArguments given_;
  std::shared_ptr<AccumulatorCache> cache_;
  std::unique_lock<std::mutex> lock_;
  const Workspace* workspace_;
  UpdateOptions options_;
};

}  // namespace torch_adadelta::cpu
