"""Every option of Keras, and every pair that may be combined, beside a running tf_keras optimizer."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("tf_keras", reason="needs the extra 'parity'")

import tensorflow as tf
import tf_keras
from cases import Path
from parity_runs import State, assert_same_bits, run_keras, run_oracle, run_ours
from reference.oracle import square_sum

from torch_adadelta import AdadeltaKeras, schedules

pytestmark = pytest.mark.xdist_group("tensorflow")

SHAPES: Final = ((5, 3), (), (259,))
STEPS: Final = 5


class Option(NamedTuple):
    """One option for each of the three: as keywords for Keras, for AdadeltaKeras, and for the oracle."""

    keras: dict[str, Any]
    ours: dict[str, Any]
    oracle: dict[str, Any]
    before: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda g: g)  # what aggregation makes of a gradient
    after: Callable[[np.ndarray], np.ndarray] = staticmethod(lambda g: g)  # what transformers make of it


def same(**options: Any) -> Option:
    return Option(options, options, options)


def scaled_by(factor: float) -> Callable[[Any], Any]:
    return lambda pairs: [(factor * grad, variable) for grad, variable in pairs]


SCHEDULE: Final = {
    "class_name": "InverseTimeDecay",
    "config": {"initial_learning_rate": 0.5, "decay_steps": 2, "decay_rate": 0.7},
}


def _scheduled() -> Option:
    keras = tf_keras.optimizers.schedules.deserialize(SCHEDULE)
    ours = schedules.deserialize(SCHEDULE)
    return Option(
        {"learning_rate": keras}, {"learning_rate": ours}, {"learning_rate": lambda t: np.float32(keras(np.float32(t)))}
    )


OPTIONS: Final[dict[str, Option]] = {
    "learning_rate": same(learning_rate=0.3),
    "schedule": _scheduled(),
    "callable learning_rate": Option(
        {"learning_rate": lambda: 0.3}, {"learning_rate": lambda: 0.3}, {"learning_rate": 0.3}
    ),
    "Tensor learning_rate": Option(
        {"learning_rate": tf.constant(0.3, tf.float64)},
        {"learning_rate": torch.tensor(0.3, dtype=torch.float64)},
        {"learning_rate": np.float64(0.3)},
    ),
    "rho": same(rho=0.7),
    "callable rho": Option({"rho": lambda: 0.7}, {"rho": lambda: 0.7}, {"rho": 0.7}),
    "epsilon": same(epsilon=1e-3),
    "decay": same(decay=0.3),
    "clipvalue": same(clipvalue=0.4),
    "clipnorm": same(clipnorm=0.7),
    "clipnorm not reached": same(clipnorm=1e6),
    "global_clipnorm": same(global_clipnorm=0.9),
    "aggregator": Option(
        {"gradient_aggregator": scaled_by(3.0)}, {"gradient_aggregator": scaled_by(3.0)}, {}, before=lambda g: 3 * g
    ),
    "transformers": Option(
        {"gradient_transformers": [scaled_by(0.7), scaled_by(3.0)]},
        {"gradient_transformers": [scaled_by(0.7), scaled_by(3.0)]},
        {},
        after=lambda g: g.dtype.type(3.0) * (g.dtype.type(0.7) * g),
    ),
}


def may_be_combined(one: str, other: str) -> bool:
    names = {one, other}
    keys = [key for name in names for key in OPTIONS[name].ours]
    clips = [name for name in names if "clip" in name]
    norms = [name for name in clips if "norm" in name]
    return len(keys) == len(set(keys)) and len(norms) < 2 and not ("transformers" in names and clips)


COMBINATIONS: Final = [(name,) for name in OPTIONS] + [
    pair for pair in itertools.combinations(OPTIONS, 2) if may_be_combined(*pair)
]


@functools.cache
def init(dtype: str) -> list[np.ndarray]:
    return [np.zeros(shape, dtype) for shape in SHAPES]


@functools.cache
def gradients(dtype: str) -> list[list[np.ndarray | None]]:
    """N(0, 1) times a scale of its own for each element; some gradients are missing."""
    rng = np.random.default_rng(0)
    steps = [
        [np.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, shape), dtype) for shape in SHAPES]
        for _ in range(STEPS)
    ]
    return [[None if (t, i) in ((1, 0), (3, 2)) else g for i, g in enumerate(step)] for t, step in enumerate(steps)]


def keywords(names: Sequence[str], of: str) -> dict[str, Any]:
    return {key: value for name in names for key, value in getattr(OPTIONS[name], of).items()}


def changed_by(names: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """What the callbacks make of a gradient; never together with clipping."""
    steps = [OPTIONS[name].before for name in names] + [OPTIONS[name].after for name in names]
    return lambda g: functools.reduce(lambda value, step: step(value), steps, g)


@functools.cache
def oracle_of(names: tuple[str, ...], dtype: str) -> list[State]:
    return run_oracle(init(dtype), gradients(dtype), changed=changed_by(names), **keywords(names, "oracle"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_the_oracle_has_the_bits_of_keras(names: tuple[str, ...], dtype: str) -> None:
    """But for two operations that TensorFlow itself does not fix: float32's reciprocal root, and the order of sums."""
    given = init(dtype), gradients(dtype)
    oracle = run_oracle(*given, as_tensorflow=True, changed=changed_by(names), **keywords(names, "oracle"))
    assert_same_bits(oracle, run_keras(*given, **keywords(names, "keras")))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_path_has_the_bits_of_the_oracle(names: tuple[str, ...], dtype: str, path: Path) -> None:
    ours = run_ours(init(dtype), gradients(dtype), path, **keywords(names, "ours"))
    assert_same_bits(ours, oracle_of(names, dtype))


def test_the_fixed_tree_is_nearer_to_the_truth_than_tensorflow() -> None:
    for seed in range(20):
        g = np.random.default_rng(seed).standard_normal(50_000).astype(np.float32)
        truth = math.fsum(float(square) for square in g * g)
        ours, theirs = (float(np.float32(x)) for x in (square_sum(g), tf.reduce_sum(tf.constant(g) * tf.constant(g))))
        assert abs(ours - truth) <= abs(theirs - truth)
        assert ours == np.float32(truth)


# ---- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"clipvalue": -1.0},
        {"clipnorm": -1.0},
        {"global_clipnorm": -1.0},
        {"decay": -1.0},
        {"clipnorm": 1.0, "global_clipnorm": 1.0},
    ],
    ids=str,
)
def test_refused_as_keras_words_it(options: dict[str, float]) -> None:
    with pytest.raises(ValueError) as theirs:
        tf_keras.optimizers.legacy.Adadelta(**options)
    with pytest.raises(ValueError) as ours:
        AdadeltaKeras([torch.zeros(1)], **options)  # type: ignore[arg-type]
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("option", ["clipvalue", "clipnorm", "global_clipnorm"])
def test_clipping_beside_transformers_is_refused_as_keras_words_it(option: str) -> None:
    options: dict[str, Any] = {option: 1.0, "gradient_transformers": [list]}
    with pytest.raises(ValueError) as theirs:
        tf_keras.optimizers.legacy.Adadelta(**options)
    with pytest.raises(ValueError) as ours:
        AdadeltaKeras([torch.zeros(1)], **options)
    assert str(ours.value).partition("Received")[0] == str(theirs.value).partition("Received")[0]


def test_other_errors_are_of_the_same_type() -> None:
    variable, param = tf.Variable(np.ones(2, np.float32)), torch.ones(2, requires_grad=True)
    theirs, ours = tf_keras.optimizers.legacy.Adadelta(), AdadeltaKeras([param])
    for optimizer, target in ((theirs, variable), (ours, param)):
        with pytest.raises(ValueError, match="No gradients provided for any variable"):
            optimizer.apply_gradients([(None, target)])
        optimizer.apply_gradients([])
        assert int(optimizer.iterations) == 0
        with pytest.raises(TypeError):
            type(optimizer)(momentum=1.0)
    theirs.apply_gradients([(tf.ones(2), variable)])
    ours.apply_gradients([(torch.ones(2), param)])
    for optimizer in (theirs, ours):
        with pytest.raises(ValueError, match=r"weight list of length 4, but the optimizer was expecting 3 weights\."):
            optimizer.set_weights([np.zeros(2)] * 4)


def test_weights_config_and_slots_are_keras() -> None:
    """What one returns, the other takes, and goes on with the same numbers."""
    start = np.linspace(-1, 1, 6).reshape(2, 3)
    grad = np.linspace(-2, 5, 6).reshape(2, 3)
    variable, param = tf.Variable(start), torch.from_numpy(start.copy()).requires_grad_()
    theirs = tf_keras.optimizers.legacy.Adadelta(0.5, rho=0.9, decay=0.1, clipvalue=3.0)
    theirs.apply_gradients([(tf.constant(grad), variable)])
    ours = AdadeltaKeras.from_config(theirs.get_config(), [param])
    ours.apply_gradients([(torch.from_numpy(grad), param)])
    keras_config = {k: v for k, v in theirs.get_config().items() if k in ours.get_config()}
    assert ours.get_config() == pytest.approx(keras_config)
    for x, y in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
    assert ours.get_slot_names() == list(theirs.get_slot_names())
    ours.set_weights(theirs.get_weights())
    theirs.set_weights(ours.get_weights())
    theirs.apply_gradients([(tf.constant(-grad), variable)])
    ours.apply_gradients([(torch.from_numpy(-grad), param)])
    np.testing.assert_array_equal(variable.numpy(), param.detach().numpy())
    assert type(theirs).from_config(ours.get_config()).get_config()["clipvalue"] == 3.0
