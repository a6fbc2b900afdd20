// The definitions behind loops.h, included by each loops_*.cpp under its own instruction set. Everything that is called
// from here was declared before that set was chosen, and is inlined: no inline function that another file could be
// given by the linker is compiled for more than the baseline.

namespace {

using torch_adadelta::adadelta_element;
using torch_adadelta::add_square;
using torch_adadelta::decay;
using torch_adadelta::GradientClip;
using torch_adadelta::Hyperparameters;
using torch_adadelta::make_step;
using torch_adadelta::move_by;

// ---- Memory ahead ---------------------------------------------------------------------------------------------------

// Asks for what is `ahead` bytes after the `bytes` here, whether it is there or not. A function that does only this
// must be inlined early, as this one: GCC leaves out calls of others, as if they had no effect.
template <int64_t bytes>
ADADELTA_INLINE void prefetch(const void* here, int64_t ahead) {
#pragma GCC unroll 32
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(here) + ahead + line);
  }
}

// ---- Conversions ----------------------------------------------------------------------------------------------------

// Each 16-bit format says how one element is converted, and how a group of kGroup is: compilers do not vectorise the
// conversions of float16 at all, and those of bfloat16 with needless shuffles. Inside a group the floats may stand in
// any order, the same for every tensor. kSparesDivider: the conversions leave the multipliers time for inverses,
// even without stages.
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
#if defined(ADADELTA_AVX512_BF16)
  static constexpr bool kSparesDivider = true;
#else
  static constexpr bool kSparesDivider = false;
#endif

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

  // The processor's own rounding, which takes subnormal numbers for 0, and keeps what a nan says.
  static ADADELTA_INLINE __m512i round_normal(__m512 first, __m512 second) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(second, first);
    __m512i items;
    __builtin_memcpy(&items, &rounded, sizeof(rounded));
    return items;
  }

  static ADADELTA_INLINE void narrow_group(uint16_t* to, const float* from) {
    constexpr int kSubnormalOrNan = 0x20 | 0x80 | 0x01;
    alignas(64) static constexpr uint16_t kUppers[kGroup] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                             23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                             45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512 first = _mm512_loadu_ps(from), second = _mm512_loadu_ps(from + 16);
    const __mmask16 in_first = _mm512_fpclass_ps_mask(first, kSubnormalOrNan);
    if (__builtin_expect(_kortestz_mask16_u8(in_first, _mm512_fpclass_ps_mask(second, kSubnormalOrNan)), 1)) {
      _mm512_storeu_si512(to, round_normal(first, second));
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
  static constexpr bool kSparesDivider = false;

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

// ---- Updates --------------------------------------------------------------------------------------------------------

// What GradientClip comes to without the operations that change nothing.
struct AsItIs {
  template <typename T>
  ADADELTA_INLINE T operator()(T g) const {
    return g;
  }
};

struct Negated {
  template <typename T>
  ADADELTA_INLINE T operator()(T g) const {
    return -g;
  }
};

// In cache, and in 16 bits, one more division takes a quarter longer.
template <typename T>
struct Undivided {
  GradientClip<T> clip;

  ADADELTA_INLINE T operator()(T g) const { return clip.undivided(g); }
};

template <typename T>
struct Divided {
  GradientClip<T> clip;

  ADADELTA_INLINE T operator()(T g) const { return clip.divided(g); }
};

// Calls run with whichever of these and `clip` is the least that does what `clip` does.
template <typename T, typename Run>
ADADELTA_INLINE void with_least(const GradientClip<T>& clip, const Run& run) {
  const bool clamps = clip.limit < std::numeric_limits<T>::infinity();
  if (clip.scale != T(1)) {
    run(clip);
  } else if (clip.div != T(1)) {
    run(Divided<T>{clip});
  } else if (clamps || (clip.mul != T(1) && clip.mul != T(-1))) {
    run(Undivided<T>{clip});
  } else if (clip.mul < 0) {
    run(Negated());
  } else {
    run(AsItIs());
  }
}

#if ADADELTA_LANES == 16
// 1 / root, as the divider rounds it, by fused multiply-adds: the last one rounds correctly. The one before it rounds
// up, since a result below that of 1 / 0x1.fffffep0 would leave the last exactly between two floats. tests/csrc/exhaustive
// proves it for every root from 2^-64 to 2^64, where no step under- or overflows (even without subnormal numbers), and
// for every estimate within 2^-14.
ADADELTA_INLINE __m512 inverse_from_estimate(__m512 root, __m512 estimate) {
  constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 above = _mm512_fmadd_round_ps(_mm512_fnmadd_ps(root, estimate, one), estimate, estimate, kUp);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(root, above, one), above, above);
}

ADADELTA_INLINE __m512 inverse_by_multiplying(__m512 root) {
  return inverse_from_estimate(root, _mm512_rcp14_ps(root));
}

// The halves of a group.
struct Pair {
  __m512 first, second;
};

// Which square_avg can have the inverse roots of square_avg + eps multiplied: as bits, those below this. For them the
// sum is from 2^-126 to 2^128, and its root from 2^-63 to 2^64.
ADADELTA_INLINE uint32_t end_of_multiplied(const Hyperparameters<float>& h) {
  constexpr uint32_t k2To127 = 0x7f000000;
  return h.eps >= 0x1p-126f && h.eps <= 0x1p126f ? k2To127 : 0;
}

ADADELTA_INLINE bool can_be_multiplied(const Pair& square_avg, uint32_t end) {
  const __m512i most = _mm512_max_epu32(_mm512_castps_si512(square_avg.first), _mm512_castps_si512(square_avg.second));
  return _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(static_cast<int>(end))) == 0;
}

// A group of floats. The divider, which the roots of both accumulators keep busy throughout, is spared the quotients.
template <typename Clip>
ADADELTA_INLINE void update_group(
    float* __restrict__ param,
    const float* __restrict__ grad,
    float* __restrict__ square_avg,
    float* __restrict__ acc_delta,
    const Clip clip,
    const Hyperparameters<float>& h
) {
  const __m512 eps = _mm512_set1_ps(h.eps), one = _mm512_set1_ps(1.0f);
  const auto read = [](const float* from) { return Pair{_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; };
  const auto write = [](float* to, const Pair& pair) {
    _mm512_storeu_ps(to, pair.first);
    _mm512_storeu_ps(to + 16, pair.second);
  };
  alignas(64) float clipped[kGroup];
  for (int64_t k = 0; k < kGroup; ++k) {
    clipped[k] = clip(grad[k]);
  }
  const Pair g = read(clipped);
  Pair a = read(square_avg), u = read(acc_delta), p = read(param);
  average_in(a.first, g.first, h);
  average_in(a.second, g.second, h);
  const __m512 root = _mm512_sqrt_ps(_mm512_add_ps(a.first, eps)), root2 = _mm512_sqrt_ps(_mm512_add_ps(a.second, eps));
  Pair d{_mm512_sqrt_ps(_mm512_add_ps(u.first, eps)), _mm512_sqrt_ps(_mm512_add_ps(u.second, eps))};
  Pair inverse{inverse_by_multiplying(root), inverse_by_multiplying(root2)};
  if (__builtin_expect(!can_be_multiplied(a, end_of_multiplied(h)), 0)) {
    inverse = {_mm512_div_ps(one, root), _mm512_div_ps(one, root2)};
  }
  make_step(d.first, inverse.first, g.first);
  make_step(d.second, inverse.second, g.second);
  average_in(u.first, d.first, h);
  average_in(u.second, d.second, h);
  move_by(p.first, d.first, h);
  move_by(p.second, d.second, h);
  write(square_avg, a);
  write(acc_delta, u);
  write(param, p);
}

// What `decay` makes of averages, where rho is from 0 to 1 and subnormal numbers are kept. Those above zero are taken
// in units of the least of them, in which they are whole, and so are the results: these are rounded where they are
// added to 2^23.
//
// A processor may take some hundred cycles for a product with a subnormal number. And an average whose items have
// become zero decays to one that times rho rounds to itself, and stays.
ADADELTA_INLINE void decay_with_subnormals(__m512& averages, const Hyperparameters<float>& h) {
  const __m512i bits = _mm512_castps_si512(averages), two_to_23 = _mm512_castps_si512(_mm512_set1_ps(0x1p23f));
  const __mmask16 are_subnormal =
      _mm512_cmplt_epu32_mask(_mm512_sub_epi32(bits, _mm512_set1_epi32(1)), _mm512_set1_epi32((1 << 23) - 1));
  const __m512 shifted =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(h.rho), _mm512_castsi512_ps(two_to_23));
  const __m512i units = _mm512_sub_epi32(_mm512_castps_si512(shifted), two_to_23);
  averages = _mm512_maskz_mov_ps(static_cast<__mmask16>(~are_subnormal), averages);
  decay(averages, h);
  averages = _mm512_mask_mov_ps(averages, are_subnormal, _mm512_castsi512_ps(units));
}

// Whether this thread met a subnormal number since it was last asked, as the processor notes in its status.
ADADELTA_INLINE bool has_met_subnormals() {
  constexpr unsigned kDenormalOperand = 0x2;
  const unsigned status = _mm_getcsr();
  if ((status & kDenormalOperand) == 0) {
    return false;
  }
  _mm_setcsr(status & ~kDenormalOperand);
  return true;
}

ADADELTA_INLINE bool keeps_subnormals() {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  return (_mm_getcsr() & (kFlushToZero | kDenormalsAreZero)) == 0;
}

// A loop asks after its first three groups, and then after so many elements each, whether the other would suit better.
constexpr int64_t kAsked = 1024;

// Of fewer elements in a row, too many would wait for the stages before and after them.
constexpr int64_t kLeastStaged = 8 * kGroup;

// Finds the groups of bfloat16 whose new numbers are neither subnormal nor nan. Of square_avg the new ones are asked;
// of the others the old ones, which are known earlier: to ask the new ones takes a twentieth longer. Numbers are
// compared as the integers that their bits are.
//
// The new square_avg must be above zero and below 2^63: so their inverse roots can be multiplied, too. Of acc_delta,
// from 2^-96 to 2^94, the new ones are at least 2^-96 * rho, which is at least 2^-125. A step d is finite:
// sqrt(acc_delta + eps) is less than 2^48, and a gradient at most 2^24 times the root of the new square_avg, since omr
// is at least 2^-24, and terms that nearly cancel leave a part in 2^24. Of parameters, from 2^-62, the new ones are
// zero or at least 2^-86, as a parameter and a d * lr that nearly cancel are multiples of that. Both may be infinite,
// which is rounded rightly.
class NormalGroups {
 public:
  explicit NormalGroups(const Hyperparameters<float>& h) {
    constexpr int kOctave = 1 << 7, kWidth = 190 * kOctave - 1;
    constexpr int kLeastAccDelta = (127 - 96) * kOctave, kLeastParam = (127 - 62) * kOctave;
    static_assert(kLeastParam + kWidth < 255 * kOctave, "infinity is not in range");
    const bool lr_is_finite = h.lr - h.lr == 0;
    const bool applies = h.rho >= 0x1p-29f && h.rho < 1 && h.eps >= 0x1p-126f && h.eps <= 0x1p62f && lr_is_finite;
    minus_least_square_avg_ = _mm512_set1_epi16(-1);
    minus_least_acc_delta_ = _mm512_set1_epi16(-kLeastAccDelta);
    minus_least_param_ = _mm512_set1_epi16(-kLeastParam);
    width_ = _mm512_set1_epi16(static_cast<int16_t>(applies ? kWidth : 0));
    magnitude_ = _mm512_set1_epi16(0x7fff);
    // GCC would make these anew from integers in each turn of a loop.
    asm(""
        : "+v"(minus_least_square_avg_),
          "+v"(minus_least_acc_delta_),
          "+v"(minus_least_param_),
          "+v"(width_),
          "+v"(magnitude_));
  }

  // square_avg: the new ones, rounded.
  ADADELTA_INLINE bool has(__m512i square_avg, const uint16_t* acc_delta, const uint16_t* param) const {
    const __m512i u = _mm512_add_epi16(_mm512_loadu_si512(acc_delta), minus_least_acc_delta_);
    const __m512i a = _mm512_add_epi16(square_avg, minus_least_square_avg_);
    const __m512i p = _mm512_add_epi16(_mm512_and_si512(_mm512_loadu_si512(param), magnitude_), minus_least_param_);
    return _mm512_cmpge_epu16_mask(_mm512_max_epu16(_mm512_max_epu16(a, u), p), width_) == 0;
  }

 private:
  __m512i minus_least_square_avg_, minus_least_acc_delta_, minus_least_param_;
  __m512i width_, magnitude_;
};

// Groups in a row, with inverse roots from multiplications. Both the divider and the multipliers are then busy
// throughout, if what they wait for was begun in time: each turn begins a group, makes the steps of the second before
// it and ends the third. Returns how many elements they were: all that make groups; or fewer, if it `watches` for
// subnormal numbers and there were some, or with_subnormals, none.
template <bool with_subnormals, typename Format, typename Item, typename Clip>
ADADELTA_INLINE int64_t update_in_stages(
    Item* __restrict__ param,
    const Item* __restrict__ grad,
    Item* __restrict__ square_avg,
    Item* __restrict__ acc_delta,
    int64_t count,
    bool watches,
    const Clip clip,
    const Hyperparameters<float> h
) {
  int64_t stop = count - count % kGroup;
  const __m512 eps = _mm512_set1_ps(h.eps), one = _mm512_set1_ps(1.0f);
  const uint32_t end = end_of_multiplied(h);
  constexpr bool kRoundsNormal = requires { Format::round_normal; };
  const NormalGroups normal_groups(h);

  // Half of a group, with the roots of the new square_avg + eps and of acc_delta + eps.
  struct Begun {
    __m512 g, a_root, u_root;
  };
  // Of a group: whether its inverse roots are to be divided, and whether its new numbers are as NormalGroups finds
  // them.
  struct Kind {
    bool divided = false, normal = false;
  };

  constexpr int64_t kBytes = kGroup * sizeof(Item);
  const int64_t ahead = torch_adadelta::cpu::read_ahead / 4;
  const auto read = [&](const Item* from) {
    alignas(64) float items[kGroup];
    Format::widen_group(items, from);
    return Pair{_mm512_load_ps(items), _mm512_load_ps(items + 16)};
  };
  const auto write = [&](Item* to, const Pair& pair) {
    alignas(64) float items[kGroup];
    _mm512_store_ps(items, pair.first);
    _mm512_store_ps(items + 16, pair.second);
    Format::narrow_group(to, items);
  };
  const auto gradient = [&](int64_t i) {
    alignas(64) float items[kGroup];
    Format::widen_group(items, grad + i);
    for (int64_t k = 0; k < kGroup; ++k) {
      items[k] = clip(items[k]);
    }
    return Pair{_mm512_load_ps(items), _mm512_load_ps(items + 16)};
  };
  const auto averaged = [&](const Item* averages, const Pair& items) {
    Pair to = read(averages);
    if constexpr (with_subnormals) {
      decay_with_subnormals(to.first, h);
      decay_with_subnormals(to.second, h);
    } else {
      decay(to.first, h);
      decay(to.second, h);
    }
    add_square(to.first, items.first, h);
    add_square(to.second, items.second, h);
    return to;
  };
  const auto root = [&](__m512 average) { return _mm512_sqrt_ps(_mm512_add_ps(average, eps)); };
  const auto step = [&](const Begun& from, bool divided) {
    __m512 d = from.u_root, inverse = inverse_by_multiplying(from.a_root);
    if (__builtin_expect(divided, 0)) {
      inverse = _mm512_div_ps(one, from.a_root);
    }
    make_step(d, inverse, from.g);
    return d;
  };

  // Three groups are under way: of the one in front the steps d are known, the next has waited a turn for its roots,
  // the last is begun. Before the first group there are ones, which go nowhere.
  //
  // All that a turn begins is read before any of it is written, and so is all that it ends: a read waits for an
  // unfinished write to an address with the same lower twelve bits, and what those are in tensors allocated one after
  // the other is often the same.
  Begun begun{one, one, one}, begun2 = begun, waiting = begun, waiting2 = begun;
  Kind begun_is, waiting_is, front_is;
  Pair d{one, one};
  if (watches) {
    has_met_subnormals();
  }
  for (int64_t i = -3 * kGroup; i < stop; i += kGroup) {
    const int64_t next = i + 3 * kGroup;
    // Not at once where there were some before: to change costs as much as three groups do.
    const bool asks = i % kAsked == 0 && (i > 0 || !with_subnormals);
    if (asks && watches && next < stop && has_met_subnormals() != with_subnormals) {
      stop = next;
    }
    Begun next1 = begun, next2 = begun2;
    Kind next_is;
    if (next < stop) {
      if (ahead > 0) {
        prefetch<kBytes>(grad + next, ahead);
        prefetch<kBytes>(square_avg + next, ahead);
        prefetch<kBytes>(acc_delta + next, ahead);
        prefetch<kBytes>(param + next, ahead);
      }
      const Pair g = gradient(next), a = averaged(square_avg + next, g), u = read(acc_delta + next);
      next1 = {g.first, root(a.first), root(u.first)};
      next2 = {g.second, root(a.second), root(u.second)};
      if constexpr (kRoundsNormal) {
        const __m512i items = Format::round_normal(a.first, a.second);
        next_is.normal = normal_groups.has(items, acc_delta + next, param + next);
        if (__builtin_expect(next_is.normal, 1)) {
          _mm512_storeu_si512(square_avg + next, items);
        }
      }
      if (!kRoundsNormal || __builtin_expect(!next_is.normal, 0)) {
        write(square_avg + next, a);
        next_is.divided = !can_be_multiplied(a, end);
      }
    }
    const Pair d_of_waiting{step(waiting, waiting_is.divided), step(waiting2, waiting_is.divided)};
    if (i >= 0) {
      const Pair u = averaged(acc_delta + i, d);
      Pair p = read(param + i);
      move_by(p.first, d.first, h);
      move_by(p.second, d.second, h);
      if constexpr (kRoundsNormal) {
        if (__builtin_expect(front_is.normal, 1)) {
          _mm512_storeu_si512(acc_delta + i, Format::round_normal(u.first, u.second));
          _mm512_storeu_si512(param + i, Format::round_normal(p.first, p.second));
        }
      }
      if (!kRoundsNormal || __builtin_expect(!front_is.normal, 0)) {
        write(acc_delta + i, u);
        write(param + i, p);
      }
    }
    d = d_of_waiting;
    front_is = waiting_is;
    waiting = begun;
    waiting2 = begun2;
    waiting_is = begun_is;
    begun = next1;
    begun2 = next2;
    begun_is = next_is;
  }
  return stop;
}

// Groups in a row, in stages. Returns how many elements they were: none, if there are too few.
template <typename Format, typename Item, typename Clip>
ADADELTA_INLINE int64_t update_staged_groups(
    Item* param,
    const Item* grad,
    Item* square_avg,
    Item* acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<float>& h
) {
  if (count < kLeastStaged) {
    return 0;
  }
  const bool watches = h.rho >= 0 && h.rho <= 1 && keeps_subnormals();
  int64_t done = 0;
  for (bool with_subnormals = false; count - done >= kGroup; with_subnormals = !with_subnormals) {
    const auto update = [&](auto kind) {
      return update_in_stages<decltype(kind)::value, Format>(
          param + done, grad + done, square_avg + done, acc_delta + done, count - done, watches, clip, h
      );
    };
    done += with_subnormals ? update(std::true_type()) : update(std::false_type());
  }
  return done;
}
#endif

template <typename T, typename Clip>
ADADELTA_INLINE void update_loop(
    T* __restrict__ param,
    const T* __restrict__ grad,
    T* __restrict__ square_avg,
    T* __restrict__ acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<T> h
) {
  for (int64_t i = 0; i < count; ++i) {
    adadelta_element(clip(grad[i]), square_avg[i], acc_delta[i], param[i], h);
  }
}

// Elements that lie in memory one after the other, as groups and what remains.
template <typename T, typename Clip>
ADADELTA_INLINE void update_contiguous(
    T* param, const T* grad, T* square_avg, T* acc_delta, int64_t count, const Clip clip, const Hyperparameters<T>& h
) {
  int64_t i = 0;
#if ADADELTA_LANES == 16
  if constexpr (std::is_same_v<T, float>) {
    i = update_staged_groups<Float>(param, grad, square_avg, acc_delta, count, clip, h);
    for (; i + kGroup <= count; i += kGroup) {
      update_group(param + i, grad + i, square_avg + i, acc_delta + i, clip, h);
    }
  }
#endif
  update_loop(param + i, grad + i, square_avg + i, acc_delta + i, count - i, clip, h);
}

template <typename T>
void update(
    T* param,
    const T* grad,
    T* square_avg,
    T* acc_delta,
    int64_t count,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
) {
  with_least(clip, [&](auto least) { update_contiguous(param, grad, square_avg, acc_delta, count, least, h); });
}

// A group at a time, which the compiler keeps in registers: the conversions run in the shadow of the square roots.
template <typename Format, typename Clip>
ADADELTA_INLINE void update_16bit_groups(
    uint16_t* __restrict__ param,
    const uint16_t* __restrict__ grad,
    uint16_t* __restrict__ square_avg,
    uint16_t* __restrict__ acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<float> h
) {
  int64_t i = 0;
#if ADADELTA_LANES == 16
  i = update_staged_groups<Format>(param, grad, square_avg, acc_delta, count, clip, h);
#endif
  for (; i + kGroup <= count; i += kGroup) {
    alignas(64) float p[kGroup], g[kGroup], a[kGroup], u[kGroup];
    Format::widen_group(g, grad + i);
    Format::widen_group(a, square_avg + i);
    Format::widen_group(u, acc_delta + i);
    Format::widen_group(p, param + i);
    if constexpr (Format::kSparesDivider) {
      update_contiguous(p, g, a, u, kGroup, clip, h);
    } else {
      update_loop(p, g, a, u, kGroup, clip, h);
    }
    Format::narrow_group(square_avg + i, a);
    Format::narrow_group(acc_delta + i, u);
    Format::narrow_group(param + i, p);
  }
  for (; i < count; ++i) {
    const float g = Format::widen(grad[i]);
    float a = Format::widen(square_avg[i]);
    float u = Format::widen(acc_delta[i]);
    float p = Format::widen(param[i]);
    adadelta_element(clip(g), a, u, p, h);
    square_avg[i] = Format::narrow(a);
    acc_delta[i] = Format::narrow(u);
    param[i] = Format::narrow(p);
  }
}

template <typename Format>
void update_16bit(
    uint16_t* param,
    const uint16_t* grad,
    uint16_t* square_avg,
    uint16_t* acc_delta,
    int64_t count,
    const GradientClip<float>& clip,
    const Hyperparameters<float>& h
) {
  with_least(clip, [&](auto least) {
    update_16bit_groups<Format>(param, grad, square_avg, acc_delta, count, least, h);
  });
}

// ---- Rows of sparse gradients ---------------------------------------------------------------------------------------

template <typename T, typename Clip>
ADADELTA_INLINE void add_loop(T* __restrict__ sum, const T* __restrict__ grad, int64_t count, const Clip clip) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] = sum[i] + clip(grad[i]);
  }
}

template <typename T>
void add(T* sum, const T* grad, int64_t count, const GradientClip<T>& clip) {
  with_least(clip, [&](auto least) { add_loop(sum, grad, count, least); });
}

template <typename T>
void update_row(T* param, const T* grad, T* square_avg, T* acc_delta, int64_t count, const Hyperparameters<T>& h) {
  update_contiguous(param, grad, square_avg, acc_delta, count, AsItIs(), h);
}

// ---- Squares --------------------------------------------------------------------------------------------------------

using torch_adadelta::kSumLanes;
using torch_adadelta::square;

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
  const int64_t ahead = torch_adadelta::cpu::read_ahead;
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

constexpr torch_adadelta::cpu::Loops kLoops = {
    update<float>,
    update<double>,
    update_16bit<Half>,
    update_16bit<Bfloat16>,
    widen<Half>,
    widen<Bfloat16>,
    cast<float, double>,
    cast<double, float>,
    narrow<Half>,
    narrow<Bfloat16>,
    add_squares<AsStored, float, float>,
    add_squares<AsStored, double, double>,
    add_squares<Half, uint16_t, float>,
    add_squares<Bfloat16, uint16_t, float>,
    add_complex_squares<float>,
    add_complex_squares<double>,
    sum_lanes,
    add<float>,
    add<double>,
    update_row<float>,
    update_row<double>,
};

}  // namespace
