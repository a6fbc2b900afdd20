// The squares of gradients, added in the lanes of a chunk of ../../square_sums.h.
#pragma once

#include "convert.h"

namespace torch_adadelta::cpu {
namespace {

constexpr int64_t kPage = 4096;

// What is squared as memory holds it.
struct AsStored {};

// One row after the other: to add several at once would spare the lanes some traffic with the first-level cache, but
// out of cache, where processors see a stream for each row, it takes up to three times as long.
template <int64_t width, bool clamps, typename Format, typename Item, typename T>
ADADELTA_INLINE void add_rows(
    double* __restrict__ lanes, const Item* __restrict__ grad, int64_t count, T limit, int64_t pages_ahead
) {
  constexpr int64_t kBytes = width * kSumLanes * sizeof(Item);
  const int64_t ahead = read_ahead;
  // AVX-512 has registers for all lanes, where compilers keep what no other function could see. Written to memory after
  // each row, they cost the reading of a gradient out of cache a tenth to a quarter.
  constexpr bool kKeptInRegisters = kLanes == 16;
  alignas(64) double registers[kSumLanes];
  double* __restrict__ sums = kKeptInRegisters ? registers : lanes;
  if constexpr (kKeptInRegisters) {
    __builtin_memcpy(registers, lanes, sizeof(registers));
  }
  for (; count >= kSumLanes; count -= kSumLanes, grad += width * kSumLanes) {
    if (pages_ahead > 0 && reinterpret_cast<uintptr_t>(grad) % kPage < kBytes) {
      prefetch<64>(grad, pages_ahead);
    }
    if (ahead > 0) {
      prefetch<kBytes>(grad, ahead);
    }
    alignas(64) T widened[kSumLanes];
    const T* row;
    if constexpr (std::is_same_v<Format, AsStored>) {
      row = grad;
    } else {
      for (int64_t lane = 0; lane < kSumLanes; lane += kLanes) {
        Format::widen_lanes(widened + lane, grad + lane);
      }
      row = widened;
    }
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      sums[lane] += square<width, clamps>(row + width * lane, limit);
    }
  }
  if constexpr (kKeptInRegisters) {
    __builtin_memcpy(lanes, registers, sizeof(registers));
  }
  for (int64_t lane = 0; lane < count; ++lane) {
    if constexpr (std::is_same_v<Format, AsStored>) {
      lanes[lane] += square<width, clamps>(grad + width * lane, limit);
    } else {
      const T g = Format::widen(grad[lane]);
      lanes[lane] += square<width, clamps>(&g, limit);
    }
  }
}

template <typename Format, typename Item, typename T>
void add_squares(double* lanes, const Item* grad, int64_t count, T limit, int64_t pages_ahead) {
  if (limit < std::numeric_limits<T>::infinity()) {
    add_rows<1, true, Format>(lanes, grad, count, limit, pages_ahead);
  } else {
    add_rows<1, false, Format>(lanes, grad, count, limit, pages_ahead);
  }
}

template <typename T>
void add_complex_squares(double* lanes, const T* grad, int64_t count, int64_t pages_ahead) {
  add_rows<2, false, AsStored>(lanes, grad, count, T(), pages_ahead);
}

double sum_lanes(double* lanes) {
#pragma GCC unroll 8
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

}  // namespace
}  // namespace torch_adadelta::cpu
