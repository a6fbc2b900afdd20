// The kernels for AVX-512 with instructions for bfloat16, as processors have it since about 2021 (and some before).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what GCC's own intrinsics leave undefined on purpose
#endif
#include "kernel_table.h"

#ifdef ADADELTA_CPU_DISPATCH
#ifdef __clang__
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c"))), apply_to = function \
)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,f16c")
#endif
#define ADADELTA_AVX512
#define ADADELTA_AVX512_BF16
#include "all.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace torch_adadelta::cpu {
const KernelTable avx512_bf16_kernels = kKernels;
}
#endif
