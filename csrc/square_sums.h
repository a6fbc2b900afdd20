// The tree in which the squares of a gradient are summed, in double: the same on every path, so that a norm has the
// same bits for any instruction set, number of threads and device.
//
// The elements, in the order in which the parameter's memory has them, form chunks of 32 rows of 128 lanes. In a chunk,
// each lane adds its squares row after row; the second half of the lanes is added to the first until one is left.
// Chunks are added pairwise: neighbours, then neighbours of those; an odd one is passed up.
#pragma once

#include "adadelta.h"

#include <cstdint>

namespace torch_adadelta {

constexpr int64_t kSumLanes = 128;
constexpr int64_t kSumRows = 32;
constexpr int64_t kSumChunk = kSumRows * kSumLanes;

// What a CPU thread or a block on the GPU sums at a time. A power of two of chunks that begins at a multiple of itself
// is a subtree, so that one number a unit is all that has to be kept.
constexpr int64_t kUnitChunks = 16;
constexpr int64_t kUnit = kUnitChunks * kSumChunk;
static_assert((kUnitChunks & (kUnitChunks - 1)) == 0);

// The square of the number at g, or of the absolute value of the pair there.
template <int64_t width, bool clamps, typename T>
ADADELTA_INLINE double square(const T* g, T limit) {
  if constexpr (width == 2) {
    return static_cast<double>(g[0] * g[0] + g[1] * g[1]);
  } else {
    const T clamped = clamps ? clamp(g[0], limit) : g[0];
    return static_cast<double>(clamped * clamped);
  }
}

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
