"""Sparse gradients beside a running tf_keras optimizer, which is handed the same COO entries as IndexedSlices."""

import functools
from typing import Any, Final

import numpy as np
import pytest
import torch

pytest.importorskip("tf_keras", reason="needs the extra 'parity'")

import tensorflow as tf
import tf_keras
from cases import Path
from parity_runs import Grad, State, assert_same_bits, run_keras, run_oracle, run_ours
from reference.oracle import SparseGradient

from torch_adadelta import AdadeltaKeras

pytestmark = pytest.mark.xdist_group("tensorflow")

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


@functools.cache
def gradients(dtype: str) -> list[list[Grad]]:
    """Rows that occur many times, first, last and all rows; a table without COO entries, and one without a gradient."""
    rng = np.random.default_rng(0)
    steps: list[list[Grad]] = []
    for step in range(STEPS):
        grads: list[Grad] = []
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


@functools.cache
def keras_of(name: str, dtype: str, index_dtype: str = "int64") -> list[State]:
    return run_keras(init(dtype), gradients(dtype), index_dtype=index_dtype, learning_rate=1.0, **OPTIONS[name])


@functools.cache
def oracle_of(name: str, dtype: str) -> list[State]:
    return run_oracle(init(dtype), gradients(dtype), learning_rate=1.0, **OPTIONS[name])


def ours_of(name: str, dtype: str, path: Path) -> list[State]:
    return run_ours(init(dtype), gradients(dtype), path, learning_rate=1.0, **OPTIONS[name])


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_oracle_has_the_bits_of_keras(name: str, dtype: str, index_dtype: str) -> None:
    """But for two operations that TensorFlow itself does not fix: float32's reciprocal root, and the order of sums."""
    oracle = run_oracle(init(dtype), gradients(dtype), as_tensorflow=True, learning_rate=1.0, **OPTIONS[name])
    assert_same_bits(oracle, keras_of(name, dtype, index_dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_path_has_the_bits_of_the_oracle(name: str, dtype: str, path: Path) -> None:
    assert_same_bits(ours_of(name, dtype, path), oracle_of(name, dtype))


@pytest.mark.parametrize("name", [name for name in OPTIONS if "norm" not in name])
def test_every_path_has_the_bits_of_keras_in_float64(name: str, path: Path) -> None:
    assert_same_bits(ours_of(name, "float64", path), keras_of(name, "float64"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_row_ten_thousand_times(dtype: str, path: Path) -> None:
    """TensorFlow, too, adds in the order of the COO entries: `accum_grad` has its bits in float32, all in float64."""
    rng = np.random.default_rng(1)
    rows = np.full((1, 10_000), 6)
    rows[0, ::1000] = np.arange(10) % 9
    values = (rng.standard_normal((10_000, 5)) * 10.0 ** rng.uniform(-6, 1, (10_000, 5))).astype(dtype)
    given = [np.zeros((9, 5), dtype)], [[SparseGradient(rows, values)]]
    ours, theirs = run_ours(*given, path, learning_rate=1.0), run_keras(*given, learning_rate=1.0)
    assert_same_bits(ours, theirs, State._fields if dtype == "float64" else ["square_avg"])


def test_the_sign_of_zero_is_that_of_keras(path: Path) -> None:
    """A sum of COO entries begins with +0: a gradient of -0 leaves a parameter of -0 as it is."""
    values = np.array([[0.0, -0.0], [-0.0, -0.0], [-0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]])
    given = [np.full((4, 2), -0.0)], [[SparseGradient(np.array([[0, 1, 1, 2, 2]]), values)]] * 2
    assert_same_bits(run_ours(*given, path, learning_rate=1.0), run_keras(*given, learning_rate=1.0))


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
