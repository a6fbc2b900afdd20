// The update of one element: the only statement of the formula in C++, for the host and the device.
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define ADADELTA_INLINE __host__ __device__ __forceinline__
#else
#define ADADELTA_INLINE inline __attribute__((always_inline))
#endif

namespace torch_adadelta {

// What the ops receive of a segment, in this order: its hyperparameters, and how the state of its parameters is kept,
// which no kernel reads.
enum Hyperparameter : int {
  kLr,
  kRho,
  kEpsilon,
  kMaximize,
  kWeightDecay,
  kIsDecoupled,
  kEmaMomentum,
  kOverwrites,
  kHyperparameters,
  kStateDtype = kHyperparameters,
  kHasMasters,
  kSegmentNumbers
};

// Those of the formula in the opmath dtype T: float for 16-bit and float32 parameters, else double.
template <typename T>
struct Hyperparameters {
  T lr;
  T rho;
  T one_minus_rho;  // 1 - rho, subtracted in T: float gives 0.050000012f for rho = 0.95, not 0.05f
  T eps;
  T weight_decay;
  bool is_decoupled;  // weight decay is taken off the parameter, or else added to the gradient
  T ema_momentum;
  T one_minus_ema_momentum;
  bool overwrites;  // the parameter becomes the average

  explicit ADADELTA_INLINE Hyperparameters(const double (&values)[kHyperparameters])
      : lr(static_cast<T>(values[kLr])),
        rho(static_cast<T>(values[kRho])),
        one_minus_rho(T(1) - rho),
        eps(static_cast<T>(values[kEpsilon])),
        weight_decay(static_cast<T>(values[kWeightDecay])),
        is_decoupled(values[kIsDecoupled] != 0),
        ema_momentum(static_cast<T>(values[kEmaMomentum])),
        one_minus_ema_momentum(T(1) - ema_momentum),
        overwrites(values[kOverwrites] != 0) {}
};

// max(min(g, limit), -limit), where nan stays nan.
template <typename T>
ADADELTA_INLINE T clamp(T g, T limit) {
  g = g > limit ? limit : g;
  return g < -limit ? -limit : g;
}

// What becomes of a gradient before the update: (clamp(g / scale / loss_scale) * mul) / div. Without clipping or
// scaling, the scales, mul and div are 1, and to multiply or divide by 1 changes nothing; a negative mul maximizes.
template <typename T>
struct GradientClip {
  T limit;  // clipvalue, or infinity
  T mul;
  T div;
  T scale = T(1);       // that of AMP
  T loss_scale = T(1);  // the optimizer's own

  // `factor`: what global_clipnorm makes of the norm of all gradients, or 1.
  ADADELTA_INLINE static GradientClip by_factor(double clipvalue, double factor) {
    return {static_cast<T>(clipvalue), static_cast<T>(factor), T(1)};
  }

  // (g * clipnorm) / max(norm, clipnorm), where a nan norm stays nan.
  ADADELTA_INLINE static GradientClip by_norm(double clipvalue, double clipnorm, double square_sum) {
    const T c = static_cast<T>(clipnorm);
    const T norm = std::sqrt(static_cast<T>(square_sum));
    return {static_cast<T>(clipvalue), c, norm < c ? c : norm};
  }

  ADADELTA_INLINE GradientClip negated_if(bool maximize) const {
    return {limit, maximize ? -mul : mul, div, scale, loss_scale};
  }

  ADADELTA_INLINE GradientClip scaled_by(T by, T loss_by = T(1)) const { return {limit, mul, div, by, loss_by}; }

  // The parts of operator(), so that a loop can leave out a division by 1.
  ADADELTA_INLINE T unscaled(T g) const { return g / scale; }

  ADADELTA_INLINE T loss_unscaled(T g) const { return g / loss_scale; }

  ADADELTA_INLINE T undivided(T g) const { return clamp(g, limit) * mul; }

  ADADELTA_INLINE T divided(T g) const { return undivided(g) / div; }

  ADADELTA_INLINE T operator()(T g) const { return divided(loss_unscaled(unscaled(g))); }
};

// The update in its parts, for a number or a vector of numbers V, which cross by reference: what is compiled for one
// instruction set does not agree with another on how vectors are passed.
//
// Every operation is rounded to T on its own, in the order of torch_adadelta/backends/functional.py. Compile with
// -ffp-contract=off (nvcc: --fmad=false) and IEEE division and square root: a fused multiply-add changes the bits.
template <typename V, typename T>
ADADELTA_INLINE void decay(V& average, const Hyperparameters<T>& h) {
  average = average * h.rho;
}

template <typename V, typename T>
ADADELTA_INLINE void add_square(V& average, const V& item, const Hyperparameters<T>& h) {
  average = average + (item * item) * h.one_minus_rho;
}

template <typename V, typename T>
ADADELTA_INLINE void average_in(V& average, const V& item, const Hyperparameters<T>& h) {
  decay(average, h);
  add_square(average, item, h);
}

// d: sqrt(acc_delta + eps), from which the step before the learning rate is made. inverse: 1 / sqrt(square_avg + eps).
template <typename V>
ADADELTA_INLINE void make_step(V& d, const V& inverse, const V& g) {
  d = d * inverse * g;
}

template <typename V, typename T>
ADADELTA_INLINE void move_by(V& p, const V& d, const Hyperparameters<T>& h) {
  p = p - d * h.lr;
}

// Weight decay, before the update: of the gradient or of the parameter. A factor of 0 is left out, so that an infinite
// parameter stays one.
template <typename V, typename T>
ADADELTA_INLINE void add_penalty(V& g, const V& p, const Hyperparameters<T>& h) {
  if (h.weight_decay != 0 && !h.is_decoupled) {
    g = g + p * h.weight_decay;
  }
}

template <typename V, typename T>
ADADELTA_INLINE void decay_weight(V& p, const Hyperparameters<T>& h) {
  if (h.weight_decay != 0 && h.is_decoupled) {
    p = p - (p * h.weight_decay) * h.lr;
  }
}

// The update of one element. a: square_avg, u: acc_delta, p: the parameter.
template <typename T>
ADADELTA_INLINE void adadelta_element(T g, T& a, T& u, T& p, const Hyperparameters<T>& h) {
  add_penalty(g, p, h);
  decay_weight(p, h);
  T d = std::sqrt(u + h.eps);
  average_in(a, g, h);
  make_step(d, T(1) / std::sqrt(a + h.eps), g);
  average_in(u, d, h);
  move_by(p, d, h);
}

// The average e of a parameter after the update. p: the parameter as it is stored. A momentum of 0 makes a copy,
// whatever the average was.
template <typename T>
ADADELTA_INLINE void average_element(T& e, T p, T momentum, T one_minus_momentum) {
  e = momentum == 0 ? p : momentum * e + one_minus_momentum * p;
}

}  // namespace torch_adadelta
