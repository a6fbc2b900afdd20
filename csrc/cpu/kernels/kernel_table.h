// The innermost loops on the CPU, over contiguous memory. They are compiled once for each instruction set, by the .cpp
// files beside this one, and one set is chosen at run time; every set computes the same bits.
#pragma once

#include "../../adadelta.h"
#include "../../dtypes.h"
#include "../../masters.h"
#include "../../square_sums.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define ADADELTA_CPU_DISPATCH 1
#include <immintrin.h>
#endif

namespace torch_adadelta::cpu {

// Updates `count` elements from `begin` on. `data` is where a parameter's tensors begin, by their Slot; T is the opmath
// dtype.
template <typename T>
using UpdateKernel =
    void (*)(char* const* data, int64_t begin, int64_t count, const GradientClip<T>& clip, const Hyperparameters<T>& h);

// Moves the averages of the elements on, and overwrites the elements with them if it is asked to.
template <typename T>
using AverageKernel = void (*)(char* const* data, int64_t begin, int64_t count, const Hyperparameters<T>& h);

// Adds `count` elements, clipped, to sums.
template <typename T>
using AddKernel = void (*)(T* sum, const T* grad, int64_t count, const GradientClip<T>& clip);

// Adds the squares of `count` elements, which begin at lane 0, to the kSumLanes lanes of a chunk; see square_sums.h.
// `limit` is the clipvalue, or infinity; pages_ahead is from pages_ahead_in, below.
template <typename Item, typename T>
using SquaresKernel = void (*)(double* lanes, const Item* grad, int64_t count, T limit, int64_t pages_ahead);

// The same for complex elements, which are pairs.
template <typename T>
using ComplexSquaresKernel = void (*)(double* lanes, const T* grad, int64_t count, int64_t pages_ahead);

template <typename To, typename From>
using CastKernel = void (*)(To* to, const From* from, int64_t count);

// How memory holds the numbers of a parameter: as those of a dtype, or as masters in two halves.
enum ParamFormat : int { kFloat32, kFloat64, kFloat16, kBFloat16, kMaster, kParamFormats };

static_assert(kBFloat16 == static_cast<int>(Dtype::kBFloat16), "the formats begin with the dtypes");
constexpr int kStateDtypes = kMaster;

// The kernels that memory of the opmath dtype T needs.
template <typename T>
struct OpmathKernels {
  // By the format of the parameter, whose dtype the gradient has, and the dtype of the state. nullptr: what is not
  // updated in place is updated by blocks of numbers in T.
  UpdateKernel<T> updates[kParamFormats][kStateDtypes];
  AverageKernel<T> averages[kParamFormats];
  AddKernel<T> add;
  SquaresKernel<T, T> add_squares;
  ComplexSquaresKernel<T> add_complex_squares;
};

struct KernelTable {
  OpmathKernels<float> in_float;
  OpmathKernels<double> in_double;
  SquaresKernel<uint16_t, float> add_squares_half;
  SquaresKernel<uint16_t, float> add_squares_bfloat16;
  CastKernel<float, uint16_t> float_from_half;
  CastKernel<float, uint16_t> float_from_bfloat16;
  CastKernel<float, double> float_from_double;
  CastKernel<double, float> double_from_float;
  CastKernel<uint16_t, float> half_from_float;
  CastKernel<uint16_t, float> bfloat16_from_float;
  void (*float_from_master)(float* to, const uint16_t* param, const uint16_t* remainder, int64_t count);
  void (*master_from_float)(uint16_t* param, uint16_t* remainder, const float* from, int64_t count);
  double (*sum_lanes)(double* lanes);  // which are overwritten

  template <typename T>
  const OpmathKernels<T>& in() const {
    if constexpr (std::is_same_v<T, float>) {
      return in_float;
    } else {
      return in_double;
    }
  }

  // Those of a parameter and state in T.
  template <typename T>
  UpdateKernel<T> update() const {
    constexpr int dtype = static_cast<int>(kDtypeOf<T>);
    return in<T>().updates[dtype][dtype];
  }

  template <typename T>
  AverageKernel<T> average() const {
    return in<T>().averages[static_cast<int>(kDtypeOf<T>)];
  }
};

extern const KernelTable default_kernels;
#ifdef ADADELTA_CPU_DISPATCH
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
extern const KernelTable avx512_bf16_kernels;
#endif

// How many bytes the loops ask for ahead of what they work on, in all that they read together; 0 leaves that to the
// processor. Out of cache, asking takes an eighth to a fifth off an update on an Emerald Rapids, and a quarter off the
// squares; on a Zen 4 an update takes a twentieth longer.
inline const int64_t read_ahead =
#ifdef ADADELTA_CPU_DISPATCH
    __builtin_cpu_is("intel") ? 4096 :
#endif
                              0;

// The same for masters, on every processor: with five tensors to read, a Zen 4, too, takes a tenth to a quarter less
// where they are of one size, and a tenth longer where they are small.
constexpr int64_t kMasterReadAhead = 4096;

// How many bytes ahead the squares of a gradient of kLeastPaged bytes and more ask for one line of every page, so that
// the processor knows by then where the page is: its own reading ahead ends with the page, and to find the next one it
// walks through the system's tables, and through the hypervisor's if there is one. Out of cache, this takes a tenth to
// a third off the squares on a Zen 4. Who is asked to read_ahead has crossed the page by then.
inline const int64_t page_ahead = read_ahead > 0 ? 0 : 65536;

constexpr int64_t kLeastPaged = 1 << 20;

inline int64_t pages_ahead_in(int64_t bytes) { return bytes >= kLeastPaged ? page_ahead : 0; }

// Asks for what is `ahead` bytes after the `bytes` here, whether it is there or not. A function that does only this
// must be inlined early, as this one: GCC leaves out calls of others, as if they had no effect.
template <int64_t bytes>
ADADELTA_INLINE void prefetch(const void* here, int64_t ahead) {
#pragma GCC unroll 32
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(static_cast<const char*>(here) + ahead + line);
  }
}

// The kernels of the instruction set in use.
const KernelTable& current_kernels();

}  // namespace torch_adadelta::cpu
