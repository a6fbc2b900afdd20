// What AVX-512 does beyond update.h, with the same bits. The time of an element in cache, of float32, float16 and
// bfloat16, on one thread of a Xeon (Intel family 6, model 167); cold, after other work has used the caches, or with
// 16,777,216 elements:
//
// - Inverse roots by multiplication. The divider, which two roots keep busy, is spared the quotient: 0.43 ns instead of
//   0.60, 0.45 instead of 0.60, 0.53 instead of 0.62. Cold 2 to 11 % less for 200 tensors of 4096.
// - Two groups under way. What one waits for was begun with the one before: 0.43 ns instead of 0.45, 0.46 instead of
//   0.51, the same; with clipnorm, whose quotient all else waits for, 0.62 instead of 0.64, 0.65 instead of 0.76, 0.70
//   instead of 0.81. Cold no difference.
// - Decays without products of denormal numbers, where there are some: 0.72 ns instead of 5.4. To decay so always would
//   take a quarter longer, so the loop asks the processor whether it met some, which costs nothing.
// - Memory ahead (read_ahead in kernel_table.h): no difference in cache; 16,777,216 elements take 2.8 ns instead of
//   3.2, 1.4 instead of 1.5, 1.0 instead of 1.4.
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

// The halves of a group of floats.
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

// A loop asks whether it has met denormal numbers after its first group, and then after so many elements each.
constexpr int64_t kDenormalCheckInterval = 1024;

// Updates groups: begins each one before it ends the one before, so that what waits for a division or a root
// does not fill the processor's queues. Returns how many elements they were: all, if `watches` is not set; else it
// stops where there are denormal numbers, or, with_denormals, where there are no more.
template <bool with_denormals, typename Param, typename Grad, typename State, typename Clip>
ADADELTA_INLINE int64_t update_pipelined(
    const Param param,
    const Grad grad,
    const State square_avg,
    const State acc_delta,
    int64_t count,
    bool watches,
    const Clip clip,
    const Hyperparameters<float> h
) {
  const __m512 eps = _mm512_set1_ps(h.eps), one = _mm512_set1_ps(1.0f);
  const uint32_t end = end_of_multiplied(h);
  const bool adds_penalty = h.weight_decay != 0 && !h.is_decoupled;
  const int64_t ahead = Param::bytes_ahead() / (Param::kBytes + Grad::kBytes + 2 * State::kBytes);

  const auto read = [&](const auto& from, int64_t i) {
    alignas(64) float items[kGroup];
    from.load_group(items, i);
    return Pair{_mm512_load_ps(items), _mm512_load_ps(items + 16)};
  };
  const auto write = [&](const auto& to, int64_t i, const Pair& pair) {
    alignas(64) float items[kGroup];
    _mm512_store_ps(items, pair.first);
    _mm512_store_ps(items + 16, pair.second);
    to.store_group(i, items);
  };
  const auto average = [&](Pair& averages, const Pair& items) {
    if constexpr (with_denormals) {
      decay_with_denormals(averages.first, h);
      decay_with_denormals(averages.second, h);
    } else {
      decay(averages.first, h);
      decay(averages.second, h);
    }
    add_square(averages.first, items.first, h);
    add_square(averages.second, items.second, h);
  };
  const auto root = [&](const Pair& averages) {
    return Pair{
        _mm512_sqrt_ps(_mm512_add_ps(averages.first, eps)), _mm512_sqrt_ps(_mm512_add_ps(averages.second, eps))
    };
  };

  struct Begun {
    Pair g, a_root, u_root;
    bool divided;  // whether the inverse roots are to be divided
  };
  const auto begin = [&](int64_t i) {
    if (ahead > 0) {
      grad.prefetch_group(i, ahead);
      square_avg.prefetch_group(i, ahead);
      acc_delta.prefetch_group(i, ahead);
      param.prefetch_group(i, ahead);
    }
    alignas(64) float g[kGroup];
    grad.load_group(g, i);
    for (int64_t k = 0; k < kGroup; ++k) {
      g[k] = clip(g[k]);
    }
    Begun begun;
    begun.g = {_mm512_load_ps(g), _mm512_load_ps(g + 16)};
    if (adds_penalty) {
      const Pair p = read(param, i);
      add_penalty(begun.g.first, p.first, h);
      add_penalty(begun.g.second, p.second, h);
    }
    begun.u_root = root(read(acc_delta, i));
    Pair a = read(square_avg, i);
    average(a, begun.g);
    begun.a_root = root(a);
    begun.divided = !can_be_multiplied(a, end);
    write(square_avg, i, a);
    return begun;
  };
  const auto finish = [&](int64_t i, const Begun& begun) {
    Pair inverse{inverse_by_multiplying(begun.a_root.first), inverse_by_multiplying(begun.a_root.second)};
    if (__builtin_expect(begun.divided, 0)) {
      inverse = {_mm512_div_ps(one, begun.a_root.first), _mm512_div_ps(one, begun.a_root.second)};
    }
    Pair d = begun.u_root, u = read(acc_delta, i), p = read(param, i);
    make_step(d.first, inverse.first, begun.g.first);
    make_step(d.second, inverse.second, begun.g.second);
    average(u, d);
    decay_weight(p.first, h);
    decay_weight(p.second, h);
    move_by(p.first, d.first, h);
    move_by(p.second, d.second, h);
    write(acc_delta, i, u);
    write(param, i, p);
  };

  int64_t stop = count - count % kGroup;
  if (stop == 0) {
    return 0;
  }
  if (watches) {
    has_met_denormals();  // before
  }
  Begun begun = begin(0);
  for (int64_t i = 0; i < stop; i += kGroup) {
    // Not at once where there were some before.
    const bool asks = watches && i % kDenormalCheckInterval == 0 && (i > 0 || !with_denormals);
    if (asks && has_met_denormals() != with_denormals) {
      stop = i + kGroup;
    }
    const Begun next = i + kGroup < stop ? begin(i + kGroup) : begun;
    finish(i, begun);
    begun = next;
  }
  return stop;
}

// Updates all whole groups, and returns how many elements they are.
template <typename Param, typename Grad, typename State, typename Clip>
ADADELTA_INLINE int64_t update_groups(
    const Param& param,
    const Grad& grad,
    const State& square_avg,
    const State& acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<float>& h
) {
  const bool watches = h.rho >= 0 && h.rho <= 1 && keeps_denormals();
  int64_t done = 0;
  for (bool with_denormals = false; count - done >= kGroup; with_denormals = !with_denormals) {
    // Not inlined: beside other loops this one would not find all its numbers in registers.
    const auto update = [&](auto kind) __attribute__((noinline)) {
      return update_pipelined<decltype(kind)::value>(
          param.from(done), grad.from(done), square_avg.from(done), acc_delta.from(done), count - done, watches, clip, h
      );
    };
    done += with_denormals ? update(std::true_type()) : update(std::false_type());
  }
  return done;
}

}  // namespace
}  // namespace torch_adadelta::cpu
