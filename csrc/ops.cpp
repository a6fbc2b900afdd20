// Defines the ops; their kernels are registered beside their code.
#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_adadelta, m) {
  torch_adadelta::define_ops(m);
  m.def("cpu_capability() -> int");
  m.def("set_cpu_capability(int capability) -> int");
}
