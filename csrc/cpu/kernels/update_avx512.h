// What AVX-512 does beyond update.h.
#pragma once

#include "convert.h"

namespace torch_adadelta::cpu {
namespace {

// 1 / root, as the divider rounds it, by fused multiply-adds: the last one rounds correctly. The one before it rounds
// up, since a result below that of 1 / 0x1.fffffep0 would leave the last exactly between two floats.
// tests/csrc/exhaustive proves it for every root from 2^-64 to 2^64, where no step under- or overflows (even without
// denormal numbers), and for every estimate within 2^-14.
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

// What `decay` makes of averages, where rho is from 0 to 1 and denormal numbers are kept. Those above zero are taken
// in units of the least of them, in which they are whole, and so are the results: these are rounded where they are
// added to 2^23.
//
// A processor may take some hundred cycles for a product with a denormal number. And an average whose items have
// become zero decays to one that times rho rounds to itself, and stays.
ADADELTA_INLINE void decay_with_denormals(__m512& averages, const Hyperparameters<float>& h) {
  const __m512i bits = _mm512_castps_si512(averages), two_to_23 = _mm512_castps_si512(_mm512_set1_ps(0x1p23f));
  const __mmask16 are_denormal =
      _mm512_cmplt_epu32_mask(_mm512_sub_epi32(bits, _mm512_set1_epi32(1)), _mm512_set1_epi32((1 << 23) - 1));
  const __m512 shifted =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(h.rho), _mm512_castsi512_ps(two_to_23));
  const __m512i units = _mm512_sub_epi32(_mm512_castps_si512(shifted), two_to_23);
  averages = _mm512_maskz_mov_ps(static_cast<__mmask16>(~are_denormal), averages);
  decay(averages, h);
  averages = _mm512_mask_mov_ps(averages, are_denormal, _mm512_castsi512_ps(units));
}

// Whether this thread met a denormal number since it was last asked, as the processor notes in its status.
ADADELTA_INLINE bool has_met_denormals() {
  constexpr unsigned kDenormalOperand = 0x2;
  const unsigned status = _mm_getcsr();
  if ((status & kDenormalOperand) == 0) {
    return false;
  }
  _mm_setcsr(status & ~kDenormalOperand);
  return true;
}

ADADELTA_INLINE bool keeps_denormals() {
  constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  return (_mm_getcsr() & (kFlushToZero | kDenormalsAreZero)) == 0;
}

// A loop asks after its first three groups, and then after so many elements each, whether the other would suit better.
constexpr int64_t kDenormalCheckInterval = 1024;

// Of fewer elements in a row, too many would wait for the stages before and after them.
constexpr int64_t kLeastStaged = 8 * kGroup;

// Finds the groups of bfloat16 whose new numbers are neither denormal nor nan. Of square_avg the new ones are asked;
// of the others the old ones, which are known earlier: to ask the new ones takes a twentieth longer. Numbers are
// compared as the integers that their bits are.
//
// The new square_avg must be above zero and below 2^63: so their inverse roots can be multiplied, too. Of acc_delta,
// from 2^-96 to 2^94, the new ones are at least 2^-96 * rho, which is at least 2^-125. A step d is finite:
// sqrt(acc_delta + eps) is less than 2^48, and a gradient at most 2^24 times the root of the new square_avg, since
// one_minus_rho is at least 2^-24, and terms that nearly cancel leave a part in 2^24. Of parameters, from 2^-62, the
// new ones are zero or at least 2^-86, as a parameter and a d * lr that nearly cancel are multiples of that. Both may
// be infinite, which is rounded rightly.
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
// denormal numbers and there were some, or with_denormals, none.
template <bool with_denormals, typename Format, typename Item, typename Clip>
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
  const int64_t ahead = read_ahead / 4;
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
    if constexpr (with_denormals) {
      decay_with_denormals(to.first, h);
      decay_with_denormals(to.second, h);
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
    has_met_denormals();
  }
  for (int64_t i = -3 * kGroup; i < stop; i += kGroup) {
    const int64_t next = i + 3 * kGroup;
    // Not at once where there were some before: to change costs as much as three groups do.
    const bool asks = i % kDenormalCheckInterval == 0 && (i > 0 || !with_denormals);
    if (asks && watches && next < stop && has_met_denormals() != with_denormals) {
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
  const bool watches = h.rho >= 0 && h.rho <= 1 && keeps_denormals();
  int64_t done = 0;
  for (bool with_denormals = false; count - done >= kGroup; with_denormals = !with_denormals) {
    const auto update = [&](auto kind) {
      return update_in_stages<decltype(kind)::value, Format>(
          param + done, grad + done, square_avg + done, acc_delta + done, count - done, watches, clip, h
      );
    };
    done += with_denormals ? update(std::true_type()) : update(std::false_type());
  }
  return done;
}

}  // namespace
}  // namespace torch_adadelta::cpu
