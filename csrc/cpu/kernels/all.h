// All kernels, and their table. Included by the .cpp file of each instruction set, once it has chosen that set, so what
// is defined here is in an unnamed namespace, and whatever is called from here was declared before and is inlined: no
// inline function that another file could be given by the linker is compiled for more than the baseline.
#pragma once

#include "convert.h"
#include "square_sums.h"
#include "update.h"

namespace torch_adadelta::cpu {
namespace {

constexpr KernelTable kKernels = {
    {update<float>, average<float>, add<float>, add_squares<AsStored, float, float>, add_complex_squares<float>},
    {update<double>, average<double>, add<double>, add_squares<AsStored, double, double>, add_complex_squares<double>},
    update_16bit<Half>,
    update_16bit<Bfloat16>,
    average_16bit<Half>,
    average_16bit<Bfloat16>,
    add_squares<Half, uint16_t, float>,
    add_squares<Bfloat16, uint16_t, float>,
    widen<Half>,
    widen<Bfloat16>,
    cast<float, double>,
    cast<double, float>,
    narrow<Half>,
    narrow<Bfloat16>,
    sum_lanes,
};

}  // namespace
}  // namespace torch_adadelta::cpu
