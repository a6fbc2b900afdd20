// The kernels for AVX-512 as every server processor with it has it (F, BW, DQ, VL).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what GCC's own intrinsics leave undefined on purpose
#endif
#include "kernel_table.h"

#ifdef ADADELTA_CPU_DISPATCH
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,f16c")
#endif
#define ADADELTA_AVX512
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torch_adadelta::cpu {
const KernelTable avx512_kernels = kKernels;
}
#endif
