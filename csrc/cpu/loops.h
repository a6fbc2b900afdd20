// The innermost loops on the CPU, over contiguous memory. They are compiled once for each instruction set (loops_*.cpp)
// and one set is chosen at run time; every set computes the same bits.
#pragma once

#include "../adadelta.h"
#include "../square_sums.h"

#include <cstdint>
#include <limits>
#include <type_traits>

namespace torch_adadelta::cpu {

// Updates `count` elements. Item is what memory holds, T what the arithmetic runs in; the 16-bit formats cross as their
// bits.
template <typename Item, typename T>
using UpdateLoop = void (*)(
    Item* param,
    const Item* grad,
    Item* square_avg,
    Item* acc_delta,
    int64_t count,
    const GradientClip<T>& clip,
    const Hyperparameters<T>& h
);

template <typename To, typename From>
using CastLoop = void (*)(To* to, const From* from, int64_t count);

// Adds the squares of `count` elements, which begin at lane 0, to the kSumLanes lanes of a chunk; see square_sums.h.
// `limit` is the clipvalue, or infinity; pages_ahead is from pages_ahead_in, below.
template <typename Item, typename T>
using SquareLoop = void (*)(double* lanes, const Item* grad, int64_t count, T limit, int64_t pages_ahead);

// The same for complex elements, which are pairs.
template <typename T>
using ComplexSquareLoop = void (*)(double* lanes, const T* grad, int64_t count, int64_t pages_ahead);

// Adds `count` elements, clipped, to sums.
template <typename T>
using AddLoop = void (*)(T* sum, const T* grad, int64_t count, const GradientClip<T>& clip);

// Updates `count` elements, whose gradient is taken as it is.
template <typename T>
using RowLoop =
    void (*)(T* param, const T* grad, T* square_avg, T* acc_delta, int64_t count, const Hyperparameters<T>& h);

struct Loops {
  UpdateLoop<float, float> update_float;
  UpdateLoop<double, double> update_double;
  UpdateLoop<uint16_t, float> update_half;
  UpdateLoop<uint16_t, float> update_bfloat16;
  CastLoop<float, uint16_t> float_from_half;
  CastLoop<float, uint16_t> float_from_bfloat16;
  CastLoop<float, double> float_from_double;
  CastLoop<double, float> double_from_float;
  CastLoop<uint16_t, float> half_from_float;
  CastLoop<uint16_t, float> bfloat16_from_float;
  SquareLoop<float, float> add_squares_float;
  SquareLoop<double, double> add_squares_double;
  SquareLoop<uint16_t, float> add_squares_half;
  SquareLoop<uint16_t, float> add_squares_bfloat16;
  ComplexSquareLoop<float> add_complex_squares_float;
  ComplexSquareLoop<double> add_complex_squares_double;
  double (*sum_lanes)(double* lanes);  // which are overwritten
  AddLoop<float> add_float;
  AddLoop<double> add_double;
  RowLoop<float> update_row_float;
  RowLoop<double> update_row_double;
};

extern const Loops loops_default;
#if defined(__x86_64__) && defined(__GNUC__)
#define ADADELTA_CPU_DISPATCH 1
extern const Loops loops_avx2;
extern const Loops loops_avx512;
extern const Loops loops_avx512_bf16;
#endif

// How many bytes the loops ask for ahead of what they work on, in all that they read together; 0 leaves that to the
// processor. Out of cache, asking takes an eighth to a fifth off an update on an Emerald Rapids, and a quarter off the
// squares; on a Zen 4 an update takes a twentieth longer.
inline const int64_t read_ahead =
#ifdef ADADELTA_CPU_DISPATCH
    __builtin_cpu_is("intel") ? 4096 :
#endif
                              0;

// How many bytes ahead the squares of a gradient of kLeastPaged bytes and more ask for one line of every page, so that
// the processor knows by then where the page is: its own reading ahead ends with the page, and to find the next one it
// walks through the system's tables, and through the hypervisor's if there is one. Out of cache, this takes a tenth to
// a third off the squares on a Zen 4. Who is asked to read_ahead has crossed the page by then.
inline const int64_t page_ahead = read_ahead > 0 ? 0 : 65536;

constexpr int64_t kLeastPaged = 1 << 20;

inline int64_t pages_ahead_in(int64_t bytes) { return bytes >= kLeastPaged ? page_ahead : 0; }

// The loops of the instruction set in use.
const Loops& current_loops();

}  // namespace torch_adadelta::cpu
