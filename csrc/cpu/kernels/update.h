// The update of elements that lie in memory one after the other: for each of them, by the formula of ../../adadelta.h,
//
//     square_avg = square_avg * rho + grad² * (1 - rho)
//     d = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
//     acc_delta = acc_delta * rho + d² * (1 - rho)
//     param = param - d * lr
#pragma once

#include "convert.h"
#ifdef ADADELTA_AVX512
#include "update_avx512.h"
#endif

namespace torch_adadelta::cpu {
namespace {

// Calls run with hyperparameters of whose weight decay the compiler knows whether there is some, and of which kind: a
// loop that asks is not vectorised where it also clips.
template <typename T, typename Run>
ADADELTA_INLINE void dispatch_decay(Hyperparameters<T> h, const Run& run) {
  if (h.weight_decay == 0) {
    h.weight_decay = 0;
    run(h);
  } else if (h.is_decoupled) {
    h.is_decoupled = true;
    run(h);
  } else {
    h.is_decoupled = false;
    run(h);
  }
}

// Numbers in the opmath dtype T.
template <typename T, typename Clip>
ADADELTA_INLINE void update_elements(
    T* __restrict__ param,
    const T* __restrict__ grad,
    T* __restrict__ square_avg,
    T* __restrict__ acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<T> h
) {
  int64_t begin = 0;
#ifdef ADADELTA_AVX512
  if constexpr (std::is_same_v<T, float>) {
    begin = update_groups<Float>(param, grad, square_avg, acc_delta, count, clip, h);
  }
#endif
  dispatch_decay(h, [=](const Hyperparameters<T> own) {
    for (int64_t i = begin; i < count; ++i) {
      adadelta_element(clip(grad[i]), square_avg[i], acc_delta[i], param[i], own);
    }
  });
}

// Numbers of a 16-bit format, a group at a time, which the compiler keeps in registers: the conversions run in the
// shadow of the square roots. Through blocks in the first-level cache an update takes half as long again, or twice as
// long.
template <typename Format, typename Clip>
ADADELTA_INLINE void update_16bit_elements(
    uint16_t* __restrict__ param,
    const uint16_t* __restrict__ grad,
    uint16_t* __restrict__ square_avg,
    uint16_t* __restrict__ acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<float> h
) {
  int64_t begin = 0;
#ifdef ADADELTA_AVX512
  begin = update_groups<Format>(param, grad, square_avg, acc_delta, count, clip, h);
#endif
  dispatch_decay(h, [=](const Hyperparameters<float> own) {
    int64_t i = begin;
#ifndef ADADELTA_AVX512
    for (; i + kGroup <= count; i += kGroup) {
      alignas(64) float p[kGroup], g[kGroup], a[kGroup], u[kGroup];
      Format::widen_group(g, grad + i);
      Format::widen_group(a, square_avg + i);
      Format::widen_group(u, acc_delta + i);
      Format::widen_group(p, param + i);
      for (int64_t k = 0; k < kGroup; ++k) {
        adadelta_element(clip(g[k]), a[k], u[k], p[k], own);
      }
      Format::narrow_group(square_avg + i, a);
      Format::narrow_group(acc_delta + i, u);
      Format::narrow_group(param + i, p);
    }
#endif
    for (; i < count; ++i) {
      const float g = Format::widen(grad[i]);
      float a = Format::widen(square_avg[i]);
      float u = Format::widen(acc_delta[i]);
      float p = Format::widen(param[i]);
      adadelta_element(clip(g), a, u, p, own);
      square_avg[i] = Format::narrow(a);
      acc_delta[i] = Format::narrow(u);
      param[i] = Format::narrow(p);
    }
  });
}

// ---- What becomes of a gradient -------------------------------------------------------------------------------------

// GradientClip without the operations that change nothing.
struct Identity {
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

template <typename T>
struct Undivided {
  GradientClip<T> clip;

  ADADELTA_INLINE T operator()(T g) const { return clip.undivided(g); }
};

template <typename T>
struct Unscaled {
  GradientClip<T> clip;

  ADADELTA_INLINE T operator()(T g) const { return clip.divided(clip.unscaled(g)); }
};

template <typename T>
struct Divided {
  GradientClip<T> clip;

  ADADELTA_INLINE T operator()(T g) const { return clip.divided(g); }
};

// Calls run with whichever of these and `clip` is the least that does what `clip` does. In cache each division takes a
// third to half as long again as an update, and in 16 bits to clamp and multiply takes 5 to 8 %.
template <typename T, typename Run>
ADADELTA_INLINE void dispatch_clip(const GradientClip<T>& clip, const Run& run) {
  const bool clamps = clip.limit < std::numeric_limits<T>::infinity();
  if (clip.loss_scale != T(1)) {
    run(clip);
  } else if (clip.scale != T(1)) {
    run(Unscaled<T>{clip});
  } else if (clip.div != T(1)) {
    run(Divided<T>{clip});
  } else if (clamps || (clip.mul != T(1) && clip.mul != T(-1))) {
    run(Undivided<T>{clip});
  } else if (clip.mul < 0) {
    run(Negated());
  } else {
    run(Identity());
  }
}

// ---- The kernels ----------------------------------------------------------------------------------------------------

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
  dispatch_clip(clip, [&](auto least) { update_elements(param, grad, square_avg, acc_delta, count, least, h); });
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
  dispatch_clip(clip, [&](auto least) {
    update_16bit_elements<Format>(param, grad, square_avg, acc_delta, count, least, h);
  });
}

// ---- Averages -------------------------------------------------------------------------------------------------------

// Elements between two requests for memory ahead. Out of cache they take a twentieth off an update with averages.
constexpr int64_t kRequested = 64;

template <typename T>
ADADELTA_INLINE void average_elements(
    const T* __restrict__ param, T* __restrict__ average, int64_t count, const Hyperparameters<T> h
) {
  const int64_t ahead = read_ahead / 4;
  int64_t i = 0;
  for (; i + kRequested <= count; i += kRequested) {
    if (ahead > 0) {
      prefetch<kRequested * sizeof(T)>(average + i, ahead);
    }
    for (int64_t k = i; k < i + kRequested; ++k) {
      average_element(average[k], param[k], h.ema_momentum, h.one_minus_ema_momentum);
    }
  }
  for (; i < count; ++i) {
    average_element(average[i], param[i], h.ema_momentum, h.one_minus_ema_momentum);
  }
}

template <typename T>
void average(T* param, T* average, int64_t count, const Hyperparameters<T>& h) {
  average_elements(param, average, count, h);
  if (h.overwrites) {
    __builtin_memcpy(param, average, count * sizeof(T));
  }
}

// Elements of a 16-bit format that are converted at a time, in their order.
constexpr int64_t kAveraged = 256;

template <typename Format>
void average_16bit(uint16_t* param, float* average, int64_t count, const Hyperparameters<float>& h) {
  for (int64_t at = 0; at < count; at += kAveraged) {
    const int64_t size = count - at < kAveraged ? count - at : kAveraged;
    alignas(64) float p[kAveraged];
    widen<Format>(p, param + at, size);
    average_elements(p, average + at, size, h);
    if (h.overwrites) {
      narrow<Format>(param + at, average + at, size);
    }
  }
}

template <typename T, typename Clip>
ADADELTA_INLINE void add_elements(T* __restrict__ sum, const T* __restrict__ grad, int64_t count, const Clip clip) {
  for (int64_t i = 0; i < count; ++i) {
    sum[i] = sum[i] + clip(grad[i]);
  }
}

template <typename T>
void add(T* sum, const T* grad, int64_t count, const GradientClip<T>& clip) {
  dispatch_clip(clip, [&](auto least) { add_elements(sum, grad, count, least); });
}

}  // namespace
}  // namespace torch_adadelta::cpu
