// All kernels, and their table. Included by the .cpp file of each instruction set, once it has chosen that set, so what
// is defined here is in an unnamed namespace, and whatever is called from here was declared before and is inlined: no
// inline function that another file could be given by the linker is compiled for more than the baseline.
#pragma once

#include "convert.h"
#include "square_sums.h"
#include "update.h"

namespace torch_adadelta::cpu {
namespace {

constexpr OpmathKernels<float> kInFloat = {
    // By the dtype of the state: float32, float64, float16, bfloat16.
    {
        {update<float>, nullptr, nullptr, update_converted<Plain<Float>, Bfloat16InOrder>},
        {},
        {nullptr, nullptr, update_converted<Plain<Half>, Half>, nullptr},
        {update_converted<Plain<Bfloat16InOrder>, Float>,
         nullptr,
         nullptr,
         update_converted<Plain<Bfloat16>, Bfloat16>},
        {update_converted<Master<Bfloat16InOrder>, Float>,
         nullptr,
         nullptr,
         update_converted<Master<Bfloat16>, Bfloat16>},
    },
    {average<float>,
     nullptr,
     average_converted<Plain<Half>>,
     average_converted<Plain<Bfloat16>>,
     average_converted<Master<Bfloat16>>},
    add<float>,
    add_squares<AsStored, float, float>,
    add_complex_squares<float>,
};

constexpr OpmathKernels<double> kInDouble = {
    {{}, {nullptr, update<double>, nullptr, nullptr}, {}, {}, {}},
    {nullptr, average<double>, nullptr, nullptr, nullptr},
    add<double>,
    add_squares<AsStored, double, double>,
    add_complex_squares<double>,
};

constexpr KernelTable kKernels = {
    kInFloat,
    kInDouble,
    add_squares<Half, uint16_t, float>,
    add_squares<Bfloat16, uint16_t, float>,
    widen<Half>,
    widen<Bfloat16>,
    cast<float, double>,
    cast<double, float>,
    narrow<Half>,
    narrow<Bfloat16>,
    join,
    split,
    sum_lanes,
};

}  // namespace
}  // namespace torch_adadelta::cpu
