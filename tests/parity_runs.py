"""The same gradients in a running tf_keras optimizer, in AdadeltaKeras, and in the oracle; needs TensorFlow."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import Path, bits
from reference.oracle import OracleOptimizer, SparseGradient
from torch import Tensor

from torch_adadelta import AdadeltaKeras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
import tf_keras

tf.config.set_visible_devices([], "GPU")  # not CUDA_VISIBLE_DEVICES, which would hide them from PyTorch's tests too

Grad = np.ndarray | SparseGradient | None
Steps = Sequence[Sequence[Grad]]  # for each step, for each parameter


class State(NamedTuple):
    """Copies of all parameters and their state after a step."""

    p: list[np.ndarray]
    square_avg: list[np.ndarray]
    acc_delta: list[np.ndarray]


def to_tensorflow(grad: Grad, shape: Sequence[int], index_dtype: str = "int64") -> Any:
    if isinstance(grad, SparseGradient):
        return tf.IndexedSlices(tf.constant(grad.values), tf.constant(grad.indices[0], index_dtype), shape)
    return tf.constant(grad)


def to_torch(grad: Grad, shape: Sequence[int]) -> Tensor | None:
    if isinstance(grad, SparseGradient):
        indices, values = torch.from_numpy(grad.indices), torch.from_numpy(grad.values)
        return torch.sparse_coo_tensor(indices, values, tuple(shape), check_invariants=True)
    return None if grad is None else torch.from_numpy(grad)


def _slot(optimizer: Any, variable: Any, name: str) -> np.ndarray:
    try:
        return optimizer.get_slot(variable, name).numpy().copy()
    except KeyError:  # of a variable that had no gradient yet
        return np.zeros(variable.shape, variable.numpy().dtype)


def run_keras(init: Sequence[np.ndarray], steps: Steps, *, index_dtype: str = "int64", **options: Any) -> list[State]:
    variables = [tf.Variable(p) for p in init]
    optimizer = tf_keras.optimizers.legacy.Adadelta(**options)
    states = []
    for step in steps:
        pairs = [(g, v) for g, v in zip(step, variables, strict=True) if g is not None]
        optimizer.apply_gradients([(to_tensorflow(g, v.shape, index_dtype), v) for g, v in pairs])
        slots = [[_slot(optimizer, v, name) for v in variables] for name in ("accum_grad", "accum_var")]
        states.append(State([v.numpy().copy() for v in variables], *slots))
    assert int(optimizer.iterations) == len(steps)
    return states


def run_ours(init: Sequence[np.ndarray], steps: Steps, path: Path, **options: Any) -> list[State]:
    params = [torch.from_numpy(p.copy()).requires_grad_() for p in init]
    optimizer = AdadeltaKeras(params, **options, **path.options)
    states = []
    for step in steps:
        for param, grad in zip(params, step, strict=True):
            param.grad = to_torch(grad, param.shape)
        optimizer.step()
        states.append(state_of(optimizer, params))
    assert optimizer.iterations == len(steps)
    return states


def state_of(optimizer: AdadeltaKeras, params: Sequence[Tensor]) -> State:
    _, *slots = optimizer.get_weights()
    return State([p.detach().numpy().copy() for p in params], slots[: len(params)], slots[len(params) :])


def run_oracle(
    init: Sequence[np.ndarray],
    steps: Steps,
    *,
    as_tensorflow: bool = False,
    changed: Callable[[np.ndarray], np.ndarray] | None = None,
    **options: Any,
) -> list[State]:
    """The oracle; or one that takes from TensorFlow what it does otherwise: its float32 reciprocal root, its sums.

    Args:
        init: the parameters.
        steps: their gradients.
        as_tensorflow: which of them.
        changed: what callbacks make of a gradient.
        **options: of `OracleOptimizer`.
    """
    oracle = OracleOptimizer(list(init), **options)
    if as_tensorflow:
        oracle.square_sum = lambda g: tf.reduce_sum(tf.constant(g) * tf.constant(g)).numpy()
        oracle.global_square_sum = lambda gs: (
            2 * tf.reduce_sum(tf.stack([tf.nn.l2_loss(tf.constant(g)) for g in gs]))
        ).numpy()
        for one in oracle.oracles if init[0].dtype == np.float32 else ():
            one.rsqrt = lambda x: tf.math.rsqrt(tf.constant(x)).numpy()
    states = []
    for step in steps:
        oracle.step([g if g is None or changed is None else changed(g) for g in step])
        o = oracle.oracles
        states.append(State([x.p.copy() for x in o], [x.square_avg for x in o], [x.acc_delta for x in o]))
    return states


def assert_same_bits(actual: list[State], expected: list[State], fields: Sequence[str] = State._fields) -> None:
    """After every step: an error that later steps forget is an error too."""
    for t, (one, other) in enumerate(zip(actual, expected, strict=True)):
        for field in fields:
            for i, (x, y) in enumerate(zip(getattr(one, field), getattr(other, field), strict=True)):
                assert x.shape == y.shape
                what = f"{field} of parameter {i}, step {t}"
                np.testing.assert_array_equal(bits(x), bits(y), err_msg=what, strict=True)
