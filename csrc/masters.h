// The float32 master of a bfloat16 parameter, kept in two halves: the parameter is the master rounded, and an int16
// beside it is the remainder, what the master's bits have more or less than the parameter's.
#pragma once

#include "adadelta.h"

#include <cstdint>

namespace torch_adadelta {

struct SplitMaster {
  uint16_t param;      // the bits of a bfloat16
  uint16_t remainder;  // those of an int16
};

namespace detail {

ADADELTA_INLINE bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

}  // namespace detail

// Rounds the bits of a float32 to nearest, ties away from zero. Of a nan only the sign is kept.
ADADELTA_INLINE SplitMaster split_master(uint32_t bits) {
  bits = detail::is_nan(bits) ? (bits & 0x80000000u) | 0x7fc00000u : bits;
  return {static_cast<uint16_t>((bits + 0x8000u) >> 16), static_cast<uint16_t>(bits)};
}

// The bits of the float32. What split_master gave comes back, all but what a nan says. Where somebody wrote the
// parameter since, its old remainder moves it by half an ulp at most; but it would make a nan of a zero or an infinity,
// and is then left out.
ADADELTA_INLINE uint32_t join_master(uint16_t param, uint16_t remainder) {
  const uint32_t rounded = static_cast<uint32_t>(param) << 16;
  const uint32_t bits = rounded + static_cast<uint32_t>(static_cast<int16_t>(remainder));
  return detail::is_nan(bits) ? rounded : bits;
}

}  // namespace torch_adadelta
