// Defines the ops; their kernels are registered beside their code.
#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_adadelta, m) {
  torch_adadelta::define_ops(m);
  // adadelta_ for the CPU with accumulators that cache_accumulators took. The schema does not show that they are
  // written to: not for what is traced.
  m.def("adadelta_.cached(Tensor(a!)[] params, Tensor[] grads, int accumulators, " ADADELTA_OPTIONS ") -> ()");
  m.def("cache_accumulators(Tensor[] square_avgs, Tensor[] acc_deltas) -> int");
  m.def("drop_accumulators(int accumulators) -> ()");
  m.def("cpu_capability() -> int");
  m.def("set_cpu_capability(int capability) -> int");
}
