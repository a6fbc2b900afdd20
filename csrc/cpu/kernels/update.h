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
    T* __restrict__ grad,
    T* __restrict__ square_avg,
    T* __restrict__ acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<T> h
) {
  int64_t begin = 0;
#ifdef ADADELTA_AVX512
  if constexpr (std::is_same_v<T, float>) {
    begin = update_groups(
        Plain<Float>{param}, Plain<Float>{grad}, Plain<Float>{square_avg}, Plain<Float>{acc_delta}, count, clip, h
    );
  }
#endif
  dispatch_decay(h, [=](const Hyperparameters<T> own) {
    for (int64_t i = begin; i < count; ++i) {
      adadelta_element(clip(grad[i]), square_avg[i], acc_delta[i], param[i], own);
    }
  });
}

// Numbers that are converted, a group at a time, which the compiler keeps in registers: the conversions run in the
// shadow of the square roots. Through blocks in the first-level cache an update takes half as long again, or twice as
// long.
template <typename Param, typename Grad, typename State, typename Clip>
ADADELTA_INLINE void update_converted_elements(
    const Param param,
    const Grad grad,
    const State square_avg,
    const State acc_delta,
    int64_t count,
    const Clip clip,
    const Hyperparameters<float> h
) {
  int64_t begin = 0;
#ifdef ADADELTA_AVX512
  begin = update_groups(param, grad, square_avg, acc_delta, count, clip, h);
#endif
  dispatch_decay(h, [=](const Hyperparameters<float> own) {
    int64_t i = begin;
#ifndef ADADELTA_AVX512
    for (; i + kGroup <= count; i += kGroup) {
      alignas(64) float p[kGroup], g[kGroup], a[kGroup], u[kGroup];
      grad.load_group(g, i);
      square_avg.load_group(a, i);
      acc_delta.load_group(u, i);
      param.load_group(p, i);
      for (int64_t k = 0; k < kGroup; ++k) {
        adadelta_element(clip(g[k]), a[k], u[k], p[k], own);
      }
      square_avg.store_group(i, a);
      acc_delta.store_group(i, u);
      param.store_group(i, p);
    }
#endif
    const int64_t left = count - i;
    if (left > 0) {
      alignas(64) float p[kGroup], g[kGroup], a[kGroup], u[kGroup];
      grad.load_block(g, i, left);
      square_avg.load_block(a, i, left);
      acc_delta.load_block(u, i, left);
      param.load_block(p, i, left);
      for (int64_t k = 0; k < left; ++k) {
        adadelta_element(clip(g[k]), a[k], u[k], p[k], own);
      }
      square_avg.store_block(i, a, left);
      acc_delta.store_block(i, u, left);
      param.store_block(i, p, left);
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
void update(char* const* data, int64_t begin, int64_t count, const GradientClip<T>& clip, const Hyperparameters<T>& h) {
  const auto items = [=](Slot slot) { return reinterpret_cast<T*>(data[slot]) + begin; };
  dispatch_clip(clip, [&](auto least) {
    update_elements(items(kParam), items(kGrad), items(kSquareAvg), items(kAccDelta), count, least, h);
  });
}

template <typename Param, typename StateFormat>
void update_converted(
    char* const* data, int64_t begin, int64_t count, const GradientClip<float>& clip, const Hyperparameters<float>& h
) {
  using State = Plain<StateFormat>;
  const auto param = Param::at(data, kParam, begin);
  const auto grad = Plain<typename Param::Format>::at(data, kGrad, begin);
  const auto square_avg = State::at(data, kSquareAvg, begin), acc_delta = State::at(data, kAccDelta, begin);
  dispatch_clip(clip, [&](auto least) {
    update_converted_elements(param, grad, square_avg, acc_delta, count, least, h);
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
void average(char* const* data, int64_t begin, int64_t count, const Hyperparameters<T>& h) {
  T* param = reinterpret_cast<T*>(data[kParam]) + begin;
  T* average = reinterpret_cast<T*>(data[kAverage]) + begin;
  average_elements(param, average, count, h);
  if (h.overwrites) {
    __builtin_memcpy(param, average, count * sizeof(T));
  }
}

// Elements that are converted at a time, in their order.
constexpr int64_t kAveraged = 256;

template <typename Param>
void average_converted(char* const* data, int64_t begin, int64_t count, const Hyperparameters<float>& h) {
  const auto param = Param::at(data, kParam, begin);
  float* average = reinterpret_cast<float*>(data[kAverage]) + begin;
  for (int64_t at = 0; at < count; at += kAveraged) {
    const int64_t size = count - at < kAveraged ? count - at : kAveraged;
    alignas(64) float p[kAveraged];
    param.load_block(p, at, size);
    average_elements(p, average + at, size, h);
    if (h.overwrites) {
      param.store_block(at, average + at, size);
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
