// The kernels for AVX2, with F16C for float16.
#include "kernel_table.h"

#ifdef ADADELTA_CPU_DISPATCH
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define ADADELTA_AVX2
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torch_adadelta::cpu {
const KernelTable avx2_kernels = kKernels;
}
#endif
