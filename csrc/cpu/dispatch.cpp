// The instruction set: the best that the processor has, or another one for tests and benchmarks.
#include "kernels/kernel_table.h"

#include "../refusal.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

namespace torch_adadelta::cpu {
namespace {

enum Capability : int64_t { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

int64_t best_capability() {
#ifdef ADADELTA_CPU_DISPATCH
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) {
    return kAvx2;
  }
#endif
  return kDefault;
}

std::atomic<int64_t> capability{best_capability()};

int64_t cpu_capability() { return capability.load(); }

// Returns the capability that was set before.
int64_t set_cpu_capability(int64_t value) {
  if (value < kDefault || value > best_capability()) {
    refuse_call("this processor has the CPU capabilities 0 to ", best_capability(), ", got ", value);
  }
  return capability.exchange(value);
}

}  // namespace

const KernelTable& current_kernels() {
#ifdef ADADELTA_CPU_DISPATCH
  switch (capability.load(std::memory_order_relaxed)) {
    case kAvx512Bf16:
      return avx512_bf16_kernels;
    case kAvx512:
      return avx512_kernels;
    case kAvx2:
      return avx2_kernels;
    default:
      break;
  }
#endif
  return default_kernels;
}

}  // namespace torch_adadelta::cpu

STABLE_TORCH_LIBRARY_IMPL(torch_adadelta, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&torch_adadelta::cpu::cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&torch_adadelta::cpu::set_cpu_capability));
}
