// Defines the ops; their kernels are registered beside their code.
#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torch_adadelta, m) {
  torch_adadelta::define_ops(m);
  // adadelta_ for the CPU with state that hold_state took. The schemas do not show that the state is written to: not
  // for what is traced. One has numbers only, for each option more costs each call.
  m.def(
      "adadelta_.held(Tensor(a!)[] params, Tensor[] grads, int state, float lr, float rho, float epsilon, "
      "bool maximize=False) -> ()"
  );
  m.def(
      "adadelta_.held_with_options(Tensor(a!)[] params, Tensor[] grads, int "
      "state" ADADELTA_HYPERPARAMETERS ADADELTA_OPTIONS ") -> ()"
  );
  m.def("hold_state(Tensor[] square_avgs, Tensor[] acc_deltas) -> int");
  m.def("drop_state(int state) -> ()");
  m.def("cpu_capability() -> int");
  m.def("set_cpu_capability(int capability) -> int");
}
