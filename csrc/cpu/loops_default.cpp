// The loops for the baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "loops.h"

#include <torch/headeronly/util/Half.h>

#include "loops_body.h"

namespace torch_adadelta::cpu {
const Loops loops_default = kLoops;
}
