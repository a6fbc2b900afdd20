// The schemas of the ops that have a kernel for each type of device.
//
// The parameters of an update form segments: sizes[s] consecutive ones share hyperparameters. For each segment these
// are the numbers that adadelta.h enumerates, as double, rounded already where Keras rounds them; maximize,
// is_decoupled, overwrites and has_masters are 0 or 1. state_dtype is that of square_avgs and acc_deltas: 0 for the
// parameter's, 1 for float32, 2 for bfloat16.
// An element of hyperparameter_tensors, which may be empty, replaces the number at its place: it has one element, on
// the device of the parameters. With check_only an op checks its arguments and writes nothing.
//
// An op that refuses its arguments has written nothing, and the message begins as refusal.h says.
#pragma once

// The arguments that follow the lists of an update.
#define ADADELTA_OPTIONS                                                     \
  "int[] sizes, float[] hyperparameters, Tensor?[] hyperparameter_tensors, " \
  "float? clipvalue=None, float? clipnorm=None, Tensor? square_sums=None, "  \
  "float factor=1.0, Tensor? factor_tensor=None, Tensor? grad_scale=None, "  \
  "float loss_scale_factor=1.0, Tensor? found_inf=None, bool check_only=False"

namespace torch_adadelta {

template <typename Library>
void define_ops(Library& m) {
  // averages may be empty: then ema_momentum and overwrites mean nothing. Else each has the opmath dtype of its
  // parameter. remainders may be empty, or are those of the masters (masters.h) of bfloat16 parameters.
  m.def(
      "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
      "Tensor(d!)[] averages, Tensor(e!)[] remainders, " ADADELTA_OPTIONS ") -> ()"
  );
  m.def(
      "grad_square_sums(Tensor[] params, Tensor[] grads, float? clipvalue=None, bool in_double=False, "
      "Tensor? grad_scale=None, float loss_scale_factor=1.0) -> Tensor"
  );
  // Sparse gradients, as the dense parts of COO tensors: indices[i] is [sparse dimensions, entries] of int64, values[i]
  // is [entries, *the other dimensions of the parameter], contiguous.
  m.def(
      "sparse_adadelta_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] acc_deltas, Tensor(d!)[] remainders, " ADADELTA_OPTIONS ") -> ()"
  );
  // For each of these lists' gradients the first entry whose index is out of range, or -1. Refuses whatever else
  // sparse_adadelta_ would refuse of the lists.
  m.def(
      "first_invalid_indices(Tensor[] params, Tensor[] indices, Tensor[] values, Tensor[] square_avgs, "
      "Tensor[] acc_deltas, Tensor[] remainders) -> Tensor"
  );
}

}  // namespace torch_adadelta
