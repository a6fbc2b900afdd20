"""Sparse gradients beside a running tf_keras optimizer, which is handed the same occurrences as IndexedSlices."""

import functools
import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from cases import Path, bits
from reference.oracle import OracleOptimizer, SparseGradient
from torch import Tensor

from torch_adadelta import AdadeltaKeras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
tf_keras = pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
tf.config.set_visible_devices([], "GPU")

STEPS: Final = 5

# Three tables, the last with rows of several dimensions, and a dense parameter.
SHAPES: Final = ((9, 5), (40, 64), (4, 3, 7), (3, 2))
TABLES: Final = 3

OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "rho and epsilon": {"rho": 0.7, "epsilon": 1e-3},
    "decay": {"decay": 0.3},
    "clipvalue": {"clipvalue": 0.4},
    "clipnorm": {"clipnorm": 0.7},
    "clipnorm not reached": {"clipnorm": 1e6},
    "clipvalue and clipnorm": {"clipvalue": 0.4, "clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.9},
    "clipvalue and global_clipnorm": {"clipvalue": 0.4, "global_clipnorm": 0.9},
}


class State(NamedTuple):
    p: list[np.ndarray]
    square_avg: list[np.ndarray]
    acc_delta: list[np.ndarray]


@functools.cache
def gradients(dtype: str) -> list[list[np.ndarray | SparseGradient | None]]:
    """Rows that occur many times, first, last and all rows; a table without occurrences, and one without a gradient."""
    rng = np.random.default_rng(0)
    steps: list[list[np.ndarray | SparseGradient | None]] = []
    for step in range(STEPS):
        grads: list[np.ndarray | SparseGradient | None] = []
        for shape in SHAPES[:TABLES]:
            rows = np.concatenate(
                [[0, shape[0] - 1, 0], rng.integers(0, min(3, shape[0]), 30), rng.permutation(shape[0])]
                if step % 2
                else [rng.integers(0, shape[0], 11)]
            )
            values = rng.standard_normal((len(rows), *shape[1:])) * 10.0 ** rng.uniform(-6, 1, (len(rows), *shape[1:]))
            grads.append(SparseGradient(rows[None], values.astype(dtype)))
        grads.append(rng.standard_normal(SHAPES[-1]).astype(dtype))
        steps.append(grads)
    steps[2][0] = SparseGradient(np.zeros((1, 0), np.int64), np.zeros((0, *SHAPES[0][1:]), dtype))
    steps[3][1] = None
    return steps


def init(dtype: str) -> list[np.ndarray]:
    return [np.zeros(shape, dtype) for shape in SHAPES]


def to_tensorflow(grad: np.ndarray | SparseGradient, index_dtype: str, shape: Sequence[int]) -> Any:
    if isinstance(grad, SparseGradient):
        return tf.IndexedSlices(tf.constant(grad.values), tf.constant(grad.indices[0], index_dtype), shape)
    return tf.constant(grad)


def to_torch(grad: np.ndarray | SparseGradient | None, shape: Sequence[int]) -> Tensor | None:
    if isinstance(grad, SparseGradient):
        return torch.sparse_coo_tensor(
            torch.from_numpy(grad.indices), torch.from_numpy(grad.values), tuple(shape), check_invariants=True
        )
    return None if grad is None else torch.from_numpy(grad)


def slots_of(optimizer: Any, variables: Sequence[Any], name: str) -> list[np.ndarray]:
    return [optimizer.get_slot(v, name).numpy().copy() for v in variables]


@functools.cache
def run_keras(name: str, dtype: str, index_dtype: str) -> list[State]:
    variables = [tf.Variable(p) for p in init(dtype)]
    optimizer = tf_keras.optimizers.legacy.Adadelta(1.0, **OPTIONS[name])
    states = []
    for step in gradients(dtype):
        optimizer.apply_gradients(
            [(to_tensorflow(g, index_dtype, v.shape), v) for g, v in zip(step, variables, strict=True) if g is not None]
        )
        slots = [slots_of(optimizer, variables, key) for key in ("accum_grad", "accum_var")]
        states.append(State([v.numpy().copy() for v in variables], *slots))
    return states


def run_ours(name: str, dtype: str, path: Path) -> list[State]:
    params = [torch.from_numpy(p).requires_grad_() for p in init(dtype)]
    optimizer = AdadeltaKeras(params, 1.0, **OPTIONS[name], **path.options)
    states = []
    for step in gradients(dtype):
        for param, grad in zip(params, step, strict=True):
            param.grad = to_torch(grad, param.shape)
        optimizer.step()
        _, *slots = optimizer.get_weights()
        states.append(State([p.detach().numpy().copy() for p in params], slots[: len(params)], slots[len(params) :]))
    return states


def run_oracle(name: str, dtype: str, *, as_tensorflow: bool = False) -> list[State]:
    """The oracle; or one that takes from TensorFlow what it does otherwise: its float32 reciprocal root, its sums."""
    oracle = OracleOptimizer(init(dtype), 1.0, **OPTIONS[name])
    if as_tensorflow:
        oracle.square_sum = lambda g: tf.reduce_sum(tf.constant(g) * tf.constant(g)).numpy()
        oracle.global_square_sum = lambda gs: (
            2 * tf.reduce_sum(tf.stack([tf.nn.l2_loss(tf.constant(g)) for g in gs]))
        ).numpy()
    if as_tensorflow and dtype == "float32":
        for one in oracle.oracles:
            one.rsqrt = lambda x: tf.math.rsqrt(tf.constant(x)).numpy()
    states = []
    for step in gradients(dtype):
        oracle.step(step)
        o = oracle.oracles
        states.append(State([x.p.copy() for x in o], [x.square_avg for x in o], [x.acc_delta for x in o]))
    return states


def assert_same_bits(actual: list[State], expected: list[State]) -> None:
    for t, (one, other) in enumerate(zip(actual, expected, strict=True)):
        for field in State._fields:
            for i, (x, y) in enumerate(zip(getattr(one, field), getattr(other, field), strict=True)):
                what = f"{field} of parameter {i}, step {t}"
                np.testing.assert_array_equal(bits(x), bits(y), err_msg=what, strict=True)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_oracle_has_the_bits_of_keras(name: str, dtype: str, index_dtype: str) -> None:
    """But for two operations that TensorFlow itself does not fix: float32's reciprocal root, and the order of sums."""
    assert_same_bits(run_oracle(name, dtype, as_tensorflow=True), run_keras(name, dtype, index_dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_path_has_the_bits_of_the_oracle(name: str, dtype: str, path: Path) -> None:
    assert_same_bits(run_ours(name, dtype, path), run_oracle(name, dtype))


@pytest.mark.parametrize("name", [name for name in OPTIONS if "norm" not in name])
def test_every_path_has_the_bits_of_keras_in_float64(name: str, path: Path) -> None:
    assert_same_bits(run_ours(name, "float64", path), run_keras(name, "float64", "int64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_row_ten_thousand_times(dtype: str, path: Path) -> None:
    """TensorFlow, too, adds in the order of occurrence: `accum_grad` has its bits in float32, everything in float64."""
    rng = np.random.default_rng(1)
    rows = np.full((1, 10_000), 6)
    rows[0, ::1000] = np.arange(10) % 9
    values = (rng.standard_normal((10_000, 5)) * 10.0 ** rng.uniform(-6, 1, (10_000, 5))).astype(dtype)
    variable = tf.Variable(np.zeros((9, 5), dtype))
    theirs = tf_keras.optimizers.legacy.Adadelta(1.0)
    theirs.apply_gradients([(to_tensorflow(SparseGradient(rows, values), "int64", (9, 5)), variable)])
    param = torch.zeros(9, 5, dtype=getattr(torch, dtype), requires_grad=True)
    ours = AdadeltaKeras([param], 1.0, **path.options)
    param.grad = to_torch(SparseGradient(rows, values), (9, 5))
    ours.step()
    names = {"accum_grad": "square_avg", **({} if dtype == "float32" else {"accum_var": "acc_delta"})}
    for slot, key in names.items():
        np.testing.assert_array_equal(ours.state[param][key].numpy(), theirs.get_slot(variable, slot).numpy(), key)
    if dtype == "float64":
        np.testing.assert_array_equal(param.detach().numpy(), variable.numpy())


def test_the_sign_of_zero_is_that_of_keras(path: Path) -> None:
    """A sum of occurrences begins with +0: a gradient of -0 leaves a parameter of -0 as it is."""
    values = np.array([[0.0, -0.0], [-0.0, -0.0], [-0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]])
    rows = np.array([[0, 1, 1, 2, 2]])
    variable = tf.Variable(np.full((4, 2), -0.0))
    theirs = tf_keras.optimizers.legacy.Adadelta(1.0)
    param = torch.full((4, 2), -0.0, dtype=torch.float64, requires_grad=True)
    ours = AdadeltaKeras([param], 1.0, **path.options)
    for _ in range(2):
        theirs.apply_gradients([(to_tensorflow(SparseGradient(rows, values), "int64", (4, 2)), variable)])
        param.grad = to_torch(SparseGradient(rows, values), (4, 2))
        ours.step()
        np.testing.assert_array_equal(bits(param.detach().numpy()), bits(variable.numpy()))


def test_an_embedding_trains_as_in_keras() -> None:
    """tf.keras.layers.Embedding and torch.nn.Embedding, each with the gradients of its own framework, in float64."""
    rng = np.random.default_rng(2)
    table, target = rng.standard_normal((30, 6)), rng.standard_normal((8, 6))
    layer = tf_keras.layers.Embedding(30, 6, dtype="float64")
    layer.build(None)
    layer.set_weights([table])
    theirs = tf_keras.optimizers.legacy.Adadelta(1.0, global_clipnorm=1e6)
    embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(table.copy()), freeze=False, sparse=True)
    ours = AdadeltaKeras(embedding.parameters(), 1.0, global_clipnorm=1e6)
    for _ in range(5):
        words = rng.integers(0, 30, 8)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.constant(words)) * target)
        (grad,) = tape.gradient(loss, layer.trainable_variables)
        assert isinstance(grad, tf.IndexedSlices)
        theirs.apply_gradients([(grad, layer.trainable_variables[0])])
        ours.zero_grad()
        (embedding(torch.from_numpy(words)) * torch.from_numpy(target)).sum().backward()
        ours.step()
        np.testing.assert_array_equal(embedding.weight.detach().numpy(), layer.get_weights()[0])
