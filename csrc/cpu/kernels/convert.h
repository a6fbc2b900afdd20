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

ADADELTA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ADADELTA_INLINE float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

struct Bfloat16Items {
  using Item = uint16_t;

  static ADADELTA_INLINE float widen(uint16_t item) { return float_of(static_cast<uint32_t>(item) << 16); }

  // Rounds to nearest, ties to even.
  static ADADELTA_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
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

  // What join_master and split_master in ../../masters.h do to a vector. The parameters stand in the upper halves of
  // their lanes, where the lower ones mean nothing after a split; the remainders have their sign in the upper halves,
  // or, after a split, anything.
  static ADADELTA_INLINE void join(float* to, __m512i params, __m512i remainders) {
    const __m512 values = _mm512_castsi512_ps(_mm512_add_epi32(params, remainders));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    _mm512_storeu_ps(to, _mm512_mask_mov_ps(values, is_nan, _mm512_castsi512_ps(params)));
  }

  static ADADELTA_INLINE void split(__m512i& params, __m512i& remainders, const float* from) {
    const __m512 values = _mm512_loadu_ps(from);
    const __m512i bits = _mm512_castps_si512(values);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i sign = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x80000000)));
    remainders = _mm512_mask_or_epi32(bits, is_nan, sign, _mm512_set1_epi32(0x7fc00000));
    params = _mm512_add_epi32(remainders, _mm512_set1_epi32(0x8000));
  }
#elif ADADELTA_LANES == 8
  static ADADELTA_INLINE __m256i round(const float* from) {
    const __m256 values = _mm256_loadu_ps(from);
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
  }

  // As for AVX-512.
  static ADADELTA_INLINE void join(float* to, __m256i params, __m256i remainders) {
    const __m256 values = _mm256_castsi256_ps(_mm256_add_epi32(params, remainders));
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    _mm256_storeu_ps(to, _mm256_blendv_ps(values, _mm256_castsi256_ps(params), is_nan));
  }

  static ADADELTA_INLINE void split(__m256i& params, __m256i& remainders, const float* from) {
    const __m256 values = _mm256_loadu_ps(from);
    const __m256 sign = _mm256_and_ps(values, _mm256_set1_ps(-0.0f));
    const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
    const __m256 is_nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    remainders = _mm256_castps_si256(_mm256_blendv_ps(values, nan, is_nan));
    params = _mm256_add_epi32(remainders, _mm256_set1_epi32(0x8000));
  }
#endif
};

// Whose groups stand in order, as floats beside them do.
struct Bfloat16InOrder : Bfloat16Items {
#if ADADELTA_LANES == 16
  static ADADELTA_INLINE __m512i widen_bits(const uint16_t* from, const uint16_t (&places)[kGroup]) {
    constexpr __mmask32 kUpperHalves = 0xaaaaaaaa;
    return _mm512_maskz_permutexvar_epi16(kUpperHalves, _mm512_load_si512(places), _mm512_loadu_si512(from));
  }

  // Moves items to the upper halves of lanes.
  alignas(64) static constexpr uint16_t kFirst[kGroup] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                          0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  alignas(64) static constexpr uint16_t kSecond[kGroup] = {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23,
                                                           0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31};
  // The upper and the lower halves of the lanes of two vectors.
  alignas(64) static constexpr uint16_t kUppers[kGroup] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                           23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                           45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  alignas(64) static constexpr uint16_t kLowers[kGroup] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                           22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                           44, 46, 48, 50, 52, 54, 56, 58, 60, 62};

  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    _mm512_storeu_si512(to, widen_bits(from, kFirst));
    _mm512_storeu_si512(to + 16, widen_bits(from, kSecond));
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
#if defined(ADADELTA_AVX512_BF16)
    // The processor's own rounding takes denormal numbers for 0, and keeps what a nan says.
    constexpr int kDenormalOrNan = 0x20 | 0x80 | 0x01;
    const __mmask16 in_first = _mm512_fpclass_ps_mask(first, kDenormalOrNan);
    if (__builtin_expect(_kortestz_mask16_u8(in_first, _mm512_fpclass_ps_mask(second, kDenormalOrNan)), 1)) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
      __builtin_memcpy(to, &rounded, sizeof(rounded));
      return;
    }
#endif
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(round(first), _mm512_load_si512(kUppers), round(second)));
  }

  static ADADELTA_INLINE void join_group(float* to, const uint16_t* param, const uint16_t* remainder) {
    const auto* halves = reinterpret_cast<const __m256i*>(remainder);
    join(to, widen_bits(param, kFirst), _mm512_cvtepi16_epi32(_mm256_loadu_si256(halves)));
    join(to + 16, widen_bits(param, kSecond), _mm512_cvtepi16_epi32(_mm256_loadu_si256(halves + 1)));
  }

  static ADADELTA_INLINE void split_group(uint16_t* param, uint16_t* remainder, const float* from) {
    __m512i params[2], remainders[2];
    split(params[0], remainders[0], from);
    split(params[1], remainders[1], from + 16);
    const __m512i uppers = _mm512_load_si512(kUppers), lowers = _mm512_load_si512(kLowers);
    _mm512_storeu_si512(param, _mm512_permutex2var_epi16(params[0], uppers, params[1]));
    _mm512_storeu_si512(remainder, _mm512_permutex2var_epi16(remainders[0], lowers, remainders[1]));
  }
#elif ADADELTA_LANES == 8
  static ADADELTA_INLINE __m128i load_lanes(const uint16_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }

  static ADADELTA_INLINE __m256i widen_bits(const uint16_t* from) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_lanes(from)), 16);
  }

  // The upper halves of the lanes of two vectors.
  static ADADELTA_INLINE void store_uppers(uint16_t* to, __m256i first, __m256i second) {
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
  }

  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kGroup; k += 8) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), widen_bits(from + k));
    }
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      store_uppers(to + k, round(from + k), round(from + k + 8));
    }
  }

  static ADADELTA_INLINE void join_group(float* to, const uint16_t* param, const uint16_t* remainder) {
    for (int64_t k = 0; k < kGroup; k += 8) {
      join(to + k, widen_bits(param + k), _mm256_cvtepi16_epi32(load_lanes(remainder + k)));
    }
  }

  static ADADELTA_INLINE void split_group(uint16_t* param, uint16_t* remainder, const float* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      __m256i params[2], remainders[2];
      split(params[0], remainders[0], from + k);
      split(params[1], remainders[1], from + k + 8);
      store_uppers(param + k, params[0], params[1]);
      store_uppers(remainder + k, _mm256_slli_epi32(remainders[0], 16), _mm256_slli_epi32(remainders[1], 16));
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

  static ADADELTA_INLINE void join_group(float* to, const uint16_t* param, const uint16_t* remainder) {
    for (int64_t k = 0; k < kGroup; ++k) {
      to[k] = float_of(join_master(param[k], remainder[k]));
    }
  }

  static ADADELTA_INLINE void split_group(uint16_t* param, uint16_t* remainder, const float* from) {
    for (int64_t k = 0; k < kGroup; ++k) {
      const SplitMaster halves = split_master(bits_of(from[k]));
      param[k] = halves.param;
      remainder[k] = halves.remainder;
    }
  }
#endif
};

#if ADADELTA_LANES == 1 || defined(ADADELTA_AVX512_BF16)
using Bfloat16 = Bfloat16InOrder;  // as the processor's own rounding takes them
#elif ADADELTA_LANES == 16
// A 32-bit lane holds two neighbours: one is shifted up to become a float, the other masked. For AVX2 too.
struct Bfloat16 : Bfloat16Items {
  static ADADELTA_INLINE __m512i uppers(__m512i pairs) {
    return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  }

  static ADADELTA_INLINE __m512i pairs(__m512i lower, __m512i upper) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, lower, upper);
  }

  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    const __m512i pairs = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(to + 16, uppers(pairs));
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    const __m512i low = _mm512_srli_epi32(round(_mm512_loadu_ps(from)), 16);
    _mm512_storeu_si512(to, pairs(low, round(_mm512_loadu_ps(from + 16))));
  }

  static ADADELTA_INLINE void join_group(float* to, const uint16_t* param, const uint16_t* remainder) {
    const __m512i params = _mm512_loadu_si512(param), remainders = _mm512_loadu_si512(remainder);
    join(to, _mm512_slli_epi32(params, 16), _mm512_srai_epi32(_mm512_slli_epi32(remainders, 16), 16));
    join(to + 16, uppers(params), _mm512_srai_epi32(remainders, 16));
  }

  static ADADELTA_INLINE void split_group(uint16_t* param, uint16_t* remainder, const float* from) {
    __m512i params[2], remainders[2];
    split(params[0], remainders[0], from);
    split(params[1], remainders[1], from + 16);
    _mm512_storeu_si512(param, pairs(_mm512_srli_epi32(params[0], 16), params[1]));
    _mm512_storeu_si512(remainder, pairs(remainders[0], _mm512_slli_epi32(remainders[1], 16)));
  }
};
#else
struct Bfloat16 : Bfloat16Items {
  static ADADELTA_INLINE __m256i load_pairs(const uint16_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  static ADADELTA_INLINE __m256i uppers(__m256i pairs) {
    return _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  }

  static ADADELTA_INLINE void store_pairs(uint16_t* to, __m256i lower, __m256i upper) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(lower, upper, 0xaa));
  }

  static ADADELTA_INLINE void widen_group(float* to, const uint16_t* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      const __m256i pairs = load_pairs(from + k);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), _mm256_slli_epi32(pairs, 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k + 8), uppers(pairs));
    }
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      store_pairs(to + k, _mm256_srli_epi32(round(from + k), 16), round(from + k + 8));
    }
  }

  static ADADELTA_INLINE void join_group(float* to, const uint16_t* param, const uint16_t* remainder) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      const __m256i params = load_pairs(param + k), remainders = load_pairs(remainder + k);
      join(to + k, _mm256_slli_epi32(params, 16), _mm256_srai_epi32(_mm256_slli_epi32(remainders, 16), 16));
      join(to + k + 8, uppers(params), _mm256_srai_epi32(remainders, 16));
    }
  }

  static ADADELTA_INLINE void split_group(uint16_t* param, uint16_t* remainder, const float* from) {
    for (int64_t k = 0; k < kGroup; k += 16) {
      __m256i params[2], remainders[2];
      split(params[0], remainders[0], from + k);
      split(params[1], remainders[1], from + k + 8);
      store_pairs(param + k, _mm256_srli_epi32(params[0], 16), params[1]);
      store_pairs(remainder + k, remainders[0], _mm256_slli_epi32(remainders[1], 16));
    }
  }
};
#endif

struct Half {
  using Item = uint16_t;

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
  using Item = float;

  static ADADELTA_INLINE float widen(float item) { return item; }

  static ADADELTA_INLINE float narrow(float value) { return value; }

  static ADADELTA_INLINE void widen_lanes(float* to, const float* from) { __builtin_memcpy(to, from, kLanes * 4); }

  static ADADELTA_INLINE void narrow_lanes(float* to, const float* from) { __builtin_memcpy(to, from, kLanes * 4); }

  static ADADELTA_INLINE void widen_group(float* to, const float* from) { __builtin_memcpy(to, from, kGroup * 4); }

  static ADADELTA_INLINE void narrow_group(float* to, const float* from) { __builtin_memcpy(to, from, kGroup * 4); }
};

template <typename Format>
ADADELTA_INLINE void widen_block(
    float* __restrict__ to, const typename Format::Item* __restrict__ from, int64_t count
) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Format::widen_lanes(to + i, from + i);
  }
  for (; i < count; ++i) {
    to[i] = Format::widen(from[i]);
  }
}

template <typename Format>
ADADELTA_INLINE void narrow_block(
    typename Format::Item* __restrict__ to, const float* __restrict__ from, int64_t count
) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Format::narrow_lanes(to + i, from + i);
  }
  for (; i < count; ++i) {
    to[i] = Format::narrow(from[i]);
  }
}

void join(
    float* __restrict__ to, const uint16_t* __restrict__ param, const uint16_t* __restrict__ remainder, int64_t count
) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = float_of(join_master(param[i], remainder[i]));
  }
}

void split(
    uint16_t* __restrict__ param, uint16_t* __restrict__ remainder, const float* __restrict__ from, int64_t count
) {
  for (int64_t i = 0; i < count; ++i) {
    const SplitMaster halves = split_master(bits_of(from[i]));
    param[i] = halves.param;
    remainder[i] = halves.remainder;
  }
}

template <typename Format>
void widen(float* to, const uint16_t* from, int64_t count) {
  widen_block<Format>(to, from, count);
}

template <typename Format>
void narrow(uint16_t* to, const float* from, int64_t count) {
  narrow_block<Format>(to, from, count);
}

template <typename To, typename From>
void cast(To* __restrict__ to, const From* __restrict__ from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

// ---- How loops read and write memory --------------------------------------------------------------------------------
//
// No two tensors of a loop overlap: without __restrict__ an update of float32 takes an eighth longer in cache.

// A tensor whose items are of a format.
template <typename ItemFormat>
struct Plain {
  using Format = ItemFormat;
  using Item = typename Format::Item;
  static constexpr int64_t kBytes = sizeof(Item);  // of an element

  Item* __restrict__ items;

  static ADADELTA_INLINE Plain at(char* const* data, Slot slot, int64_t begin) {
    return {reinterpret_cast<Item*>(data[slot]) + begin};
  }

  ADADELTA_INLINE Plain from(int64_t i) const { return {items + i}; }

  ADADELTA_INLINE void load_group(float* to, int64_t i) const { Format::widen_group(to, items + i); }

  ADADELTA_INLINE void store_group(int64_t i, const float* from) const { Format::narrow_group(items + i, from); }

  ADADELTA_INLINE void load_block(float* to, int64_t i, int64_t count) const {
    widen_block<Format>(to, items + i, count);
  }

  ADADELTA_INLINE void store_block(int64_t i, const float* from, int64_t count) const {
    narrow_block<Format>(items + i, from, count);
  }

  static ADADELTA_INLINE int64_t bytes_ahead() { return read_ahead; }

  // Asks for the group that is `ahead` elements after i.
  ADADELTA_INLINE void prefetch_group(int64_t i, int64_t ahead) const {
    prefetch<kGroup * kBytes>(items + i, ahead * kBytes);
  }
};

// A parameter with its remainder. Its gradient has the format of the parameter alone.
template <typename ParamFormat>
struct Master {
  using Format = ParamFormat;
  static constexpr int64_t kBytes = 4;

  uint16_t* __restrict__ param;
  uint16_t* __restrict__ remainder;

  static ADADELTA_INLINE Master at(char* const* data, Slot, int64_t begin) {
    return {reinterpret_cast<uint16_t*>(data[kParam]) + begin, reinterpret_cast<uint16_t*>(data[kRemainder]) + begin};
  }

  ADADELTA_INLINE Master from(int64_t i) const { return {param + i, remainder + i}; }

  ADADELTA_INLINE void load_group(float* to, int64_t i) const { Format::join_group(to, param + i, remainder + i); }

  ADADELTA_INLINE void store_group(int64_t i, const float* from) const {
    Format::split_group(param + i, remainder + i, from);
  }

  ADADELTA_INLINE void load_block(float* to, int64_t i, int64_t count) const {
    join(to, param + i, remainder + i, count);
  }

  ADADELTA_INLINE void store_block(int64_t i, const float* from, int64_t count) const {
    split(param + i, remainder + i, from, count);
  }

  static ADADELTA_INLINE int64_t bytes_ahead() { return kMasterReadAhead; }

  ADADELTA_INLINE void prefetch_group(int64_t i, int64_t ahead) const {
    prefetch<kGroup * 2>(param + i, ahead * 2);
    prefetch<kGroup * 2>(remainder + i, ahead * 2);
  }
};

}  // namespace
}  // namespace torch_adadelta::cpu
