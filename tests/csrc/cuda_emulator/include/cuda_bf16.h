#pragma once

#include "emulator.h"

#include <torch/headeronly/util/BFloat16.h>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 item) { return torch::headeronly::detail::f32_from_bits(item.bits); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {torch::headeronly::detail::round_to_nearest_even(value)};
}
