// Conversions between what memory holds and float: one element, and a group of kGroup at a time.
//
// Each 16-bit format says how: compilers do not vectorise the conversions of float16 at all, and those of bfloat16 with
// needless shuffles. Inside a group the floats may stand in any order, the same for every tensor.
#pragma once

#include "kernel_table.h"

namespace torch_adadelta::cpu {
namespace {

constexpr int64_t kGroup = 32;

#if defined(ADADELTA_AVX512)
#define ADADELTA_LANES 16
#elif defined(ADADELTA_AVX2)
#define ADADELTA_LANES 8
#else
#define ADADELTA_LANES 1
#endif
constexpr int64_t kLanes = ADADELTA_LANES;

struct Bfloat16 {
  static ADADELTA_INLINE float widen(uint16_t item) {
    const uint32_t bits = static_cast<uint32_t>(item) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(bits));
    return value;
  }

  // Rounds to nearest, ties to even.
  static ADADELTA_INLINE uint16_t narrow(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
  }

  static ADADELTA_INLINE void widen_lanes(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kLanes; ++k) {
      to[k] = widen(from[k]);
    }
  }

  static ADADELTA_INLINE void narrow_lanes(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kLanes; ++k) {
      to[k] = narrow(from[k]);
    }
  }

#if ADADELTA_LANES == 16
  // The rounded value in the upper half of each lane.
  static ADADELTA_INLINE __m512i round(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i half_ulp = _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half_ulp), is_nan, _mm512_set1_epi32(0x7fc00000));
  }

#if defined(ADADELTA_AVX512_BF16)
  // In order, as the processor's own rounding takes them: it moves items to the upper halves of lanes.
  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
    alignas(64) static constexpr uint16_t kFirst[kGroup] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                            0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    alignas(64) static constexpr uint16_t kSecond[kGroup] = {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23,
                                                             0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31};
    const __m512i items = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(kUpperHalves, _mm512_load_si512(kFirst), items));
    _mm512_storeu_si512(to + 16, _mm512_maskz_permutexvar_epi16(kUpperHalves, _mm512_load_si512(kSecond), items));
  }

  // The processor's own rounding takes denormal numbers for 0, and keeps what a nan says.
  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    constexpr int kDenormalOrNan = 0x20 | 0x80 | 0x01;
    alignas(64) static constexpr uint16_t kUppers[kGroup] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                             23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                             45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
    const __mmask16 in_first = _mm512_fpclass_ps_mask(first, kDenormalOrNan);
    if (__builtin_expect(_kortestz_mask16_u8(in_first, _mm512_fpclass_ps_mask(second, kDenormalOrNan)), 1)) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
      __builtin_memcpy(to, &rounded, sizeof(rounded));
    } else {
      const __m512i uppers = _mm512_load_si512(kUppers);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(round(first), uppers, round(second)));
    }
  }
#else
  // A 32-bit lane holds two neighbours: one is shifted up to become a float, the other masked. For AVX2 too.
  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    const __m512i pairs = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(to + 16, _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    const __m512i low = _mm512_srli_epi32(round(_mm512_loadu_ps(from)), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, low, round(_mm512_loadu_ps(from + 16))));
  }
#endif
#elif ADADELTA_LANES == 8
  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_slli_epi32(pairs, 16));
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(to + k + 8),
          _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)))
      );
    }
  }

  static ADADELTA_INLINE __m256i round(const float* from) {
    const __m256 values = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      const __m256i low = _mm256_srli_epi32(round(from + k), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_blend_epi16(low, round(from + k + 8), 0xaa));
    }
  }
#else
  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kGroup; ++k) {
      to[k] = widen(from[k]);
    }
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kGroup; ++k) {
      to[k] = narrow(from[k]);
    }
  }
#endif
};

struct Half {
  static ADADELTA_INLINE float widen(uint16_t item) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(item); }

  static ADADELTA_INLINE uint16_t narrow(float value) {
    return torch::headeronly::detail::fp16_ieee_from_fp32_value(value);
  }

  static ADADELTA_INLINE void widen_lanes(float* to, const uint16_t* from) {
#if ADADELTA_LANES == 16
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif ADADELTA_LANES == 8
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    *to = widen(*from);
#endif
  }

  static ADADELTA_INLINE void narrow_lanes(uint16_t* to, const float* from) {
#if ADADELTA_LANES == 16
    const __m256i items = _mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), items);
#elif ADADELTA_LANES == 8
    const __m128i items = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), items);
#else
    *to = narrow(*from);
#endif
  }

  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      widen_lanes(to + k, from + k);
    }
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      narrow_lanes(to + k, from + k);
    }
  }
};

// What has no need to be converted.
struct Float {
  static ADADELTA_INLINE void widen_group(float* to, const float* from) { __builtin_memcpy(to, from, kGroup * 4); }

  static ADADELTA_INLINE void narrow_group(float* to, const float* from) { __builtin_memcpy(to, from, kGroup * 4); }
};

template <typename Format>
void widen(float* __restrict__ to, const uint16_t* __restrict__ from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Format::widen_lanes(to + i, from + i);
  }
  for (; i < count; ++i) {
    to[i] = Format::widen(from[i]);
  }
}

template <typename Format>
void narrow(uint16_t* __restrict__ to, const float* __restrict__ from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Format::narrow_lanes(to + i, from + i);
  }
  for (; i < count; ++i) {
    to[i] = Format::narrow(from[i]);
  }
}

template <typename To, typename From>
void cast(To* __restrict__ to, const From* __restrict__ from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

}  // namespace
}  // namespace torch_adadelta::cpu
