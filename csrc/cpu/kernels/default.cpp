// The kernels for the baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "all.h"

namespace torch_adadelta::cpu {
const KernelTable default_kernels = kKernels;
}
