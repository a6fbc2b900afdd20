// The tree in which the squares of a gradient are summed, in double: the same on every path, so that a norm has the
// same bits for any instruction set, number of threads and device.
//
// The elements, in the order in which the parameter's memory has them, form chunks of 32 rows of 128 lanes. In a chunk,
// each lane adds its squares row after row; the second half of the lanes is added to the first until one is left.
// Chunks are added pairwise: neighbours, then neighbours of those; an odd one is passed up.
#pragma once

#include <cstdint>

namespace torch_adadelta {

constexpr int64_t kSumLanes = 128;
constexpr int64_t kSumChunk = 32 * kSumLanes;

// The pairwise sum of `count` > 0 numbers, which are overwritten.
inline double pairwise_sum(double* numbers, int64_t count) {
  for (; count > 1; count = (count + 1) / 2) {
    for (int64_t i = 0; i < count / 2; ++i) {
      numbers[i] = numbers[2 * i] + numbers[2 * i + 1];
    }
    if (count % 2 == 1) {
      numbers[count / 2] = numbers[count - 1];
    }
  }
  return numbers[0];
}

}  // namespace torch_adadelta
