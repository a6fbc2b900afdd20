// The schemas of the ops that have a kernel for each type of device. Hyperparameters cross as double, rounded already
// where Keras rounds them, or as a one-element Tensor, which then replaces the number.
#pragma once

// The arguments that follow the lists of an update.
#define ADADELTA_HYPERPARAMETERS                                \
  ", float lr, float rho, float epsilon, bool maximize=False, " \
  "Tensor? lr_tensor=None, Tensor? rho_tensor=None, Tensor? epsilon_tensor=None"
#define ADADELTA_OPTIONS                                                      \
  ", float? clipvalue=None, float? clipnorm=None, Tensor? square_sums=None, " \
  "float factor=1.0, Tensor? factor_tensor=None, Tensor? grad_scale=None, Tensor? found_inf=None"

namespace torch_adadelta {

template <typename Library>
void define_ops(Library& m) {
  m.def(
      "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] "
      "acc_deltas" ADADELTA_HYPERPARAMETERS ADADELTA_OPTIONS ") -> ()"
  );
  // The same without the clip options, which would cost each call 0.3 microseconds more.
  m.def(
      "adadelta_.unclipped(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] "
      "acc_deltas" ADADELTA_HYPERPARAMETERS ") -> ()"
  );
  m.def("check_lists(Tensor[] params, Tensor[] grads, Tensor[] square_avgs, Tensor[] acc_deltas) -> ()");
  m.def(
      "grad_square_sums(Tensor[] params, Tensor[] grads, float? clipvalue=None, bool in_double=False, "
      "Tensor? grad_scale=None) -> Tensor"
  );
  // Sparse gradients, as the dense parts of COO tensors: indices[i] is [sparse dimensions, occurrences] of int64,
  // values[i] is [occurrences, *the other dimensions of the parameter], contiguous.
  m.def(
      "sparse_adadelta_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] acc_deltas" ADADELTA_HYPERPARAMETERS ADADELTA_OPTIONS ") -> ()"
  );
  // For each of these lists' gradients the first occurrence whose index is out of range, or -1. Throws whatever else
  // sparse_adadelta_ would throw for the lists.
  m.def(
      "first_bad_indices(Tensor[] params, Tensor[] indices, Tensor[] values, Tensor[] square_avgs, "
      "Tensor[] acc_deltas) -> Tensor"
  );
}

}  // namespace torch_adadelta
