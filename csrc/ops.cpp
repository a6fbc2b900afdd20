// Defines the ops; their kernels are registered beside their code.
#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_adadelta, m) {
  torch_adadelta::define_ops(m);
  // adadelta_ for the CPU with state that hold_state took, as plain as adadelta_.unclipped, with numbers only. Its
  // schema does not show that the state is written to: not for what is traced.
  m.def(
      "adadelta_.held(Tensor(a!)[] params, Tensor[] grads, int state, float lr, float rho, float epsilon, "
      "bool maximize=False) -> ()"
  );
  m.def("hold_state(Tensor[] square_avgs, Tensor[] acc_deltas) -> int");
  m.def("drop_state(int state) -> ()");
  m.def("cpu_capability() -> int");
  m.def("set_cpu_capability(int capability) -> int");
}
