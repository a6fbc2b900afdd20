// The segments of a call: consecutive parameters with hyperparameters in common.
#pragma once

#include "refusal.h"

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <vector>

namespace torch_adadelta {

// Which segment the parameters of a call belong to: sizes[s] of them, one after the other, to segment s.
class SegmentCursor {
 public:
  explicit SegmentCursor(const std::vector<int64_t>& sizes) : sizes_(sizes) {}

  // For each index from 0 on, in this order.
  uint32_t segment_of(size_t index) {
    while (index >= end_) {
      end_ += static_cast<size_t>(sizes_[next_++]);
    }
    return static_cast<uint32_t>(next_ - 1);
  }

 private:
  const std::vector<int64_t>& sizes_;
  size_t next_ = 0;
  size_t end_ = 0;  // of the segments before `next_`
};

inline void check_sizes(const std::vector<int64_t>& sizes, size_t param_count) {
  uint64_t sum = 0;
  for (const int64_t size : sizes) {
    if (size < 0 || static_cast<uint64_t>(size) > param_count - sum) {
      sum = param_count + 1;
      break;
    }
    sum += static_cast<uint64_t>(size);
  }
  if (sum != param_count) {
    std::ostringstream listed;
    for (size_t i = 0; i < sizes.size(); ++i) {
      listed << (i == 0 ? "" : ", ") << sizes[i];
    }
    refuse_call(
        "the sizes of the segments are ", listed.str(), ", which do not add up to ", param_count, " parameters"
    );
  }
}

// What a segment says of how the state of its parameters is kept.
struct StateFormat {
  enum StateDtype : int { kOwn, kFloat32, kBFloat16, kStateDtypes };

  StateDtype dtype;
  bool has_masters;
};

}  // namespace torch_adadelta
