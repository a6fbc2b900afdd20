"""Optimizers and models of Keras 3 for tests, which run in a process of its own, where Keras' backend is torch.

In the process of the other tests, Keras may have another backend already.
"""

import functools
import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import pytest
import torch

from torch_adadelta.backends import kernels

MARKS: Final = [
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs the extra 'keras3'"),
    pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed"),
    pytest.mark.xdist_group("keras3"),  # which share a process that has imported Keras
]

CALLS: Final = 14
TOLERANCE: Final = 3e-6  # of the largest element

# ---- The process ----------------------------------------------------------------------------------------------------


def _begin() -> None:
    os.environ["KERAS_BACKEND"] = "torch"
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)  # Keras' own update would run


@functools.cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _begin)


def _called(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)


def on_torch(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test where the backend of Keras is torch."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _process().submit(_called, test.__module__, test.__name__, arguments).result()

    return run


# ---- Two optimizers -------------------------------------------------------------------------------------------------

SHAPES: Final = ((3, 4), (5,), (), (0,), (4, 3), (2, 2, 2))
TRANSPOSED: Final = 4  # whose memory is in another order
WITHOUT_GRADIENT: Final = 1  # has none in every third call


def variables_of(dtype: str = "float32", seed: int = 0) -> list[Any]:
    import keras

    rng = np.random.default_rng(seed)
    variables = [keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"v{i}") for i, shape in enumerate(SHAPES)]
    transposed = variables[TRANSPOSED]
    transposed._value = torch.nn.Parameter(transposed._value.detach().t().contiguous().t())
    return variables


def gradients_of(variables: Sequence[Any], call: int) -> list[torch.Tensor | None]:
    rng = np.random.default_rng(100 + call)
    grads = [torch.tensor(rng.normal(size=v.shape), dtype=v._value.dtype) for v in variables]
    return [None if i == WITHOUT_GRADIENT and call % 3 == 1 else grad for i, grad in enumerate(grads)]


def train(optimizer: Any, variables: Sequence[Any], calls: int = CALLS, first: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Gradients do not exist")
        for call in range(first, first + calls):
            optimizer.apply(gradients_of(variables, call), variables)
    return optimizer


def assert_close(ours: Any, theirs: Any, variables: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    """Compares variables and whatever the optimizers keep."""
    names = [variable.name for variable in theirs.variables]
    assert [variable.name for variable in ours.variables] == names
    assert not any(variable._value.requires_grad for variable in ours.variables)  # autograd recorded nothing
    pairs = zip([*variables, *ours.variables], [*expected, *theirs.variables], strict=True)
    for name, (one, other) in zip([*(v.name for v in expected), *names], pairs, strict=True):
        one, other = one._value.detach().double(), other._value.detach().double()
        if other.numel():
            error = (one - other).abs().max() / other.abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}"


def tie(calls: int) -> Any:
    import keras

    return keras.optimizers.schedules.ExponentialDecay(1.0, calls, 0.5)


CLIPS: Final[list[dict[str, Any]]] = [{"clipnorm": 0.5}, {"clipvalue": 0.3}, {"global_clipnorm": 0.7}]
OTHERS: Final[list[dict[str, Any]]] = [
    {"learning_rate": "schedule"},
    {"learning_rate": "callable"},
    {"rho": 0.8, "epsilon": 1e-5},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "exclude": ["v1", "v2"]},
    {"use_ema": True, "ema_momentum": 0.9},
    {"use_ema": True, "ema_overwrite_frequency": 3},
    {"loss_scale_factor": 4.0},
    {"gradient_accumulation_steps": 3},
]
ALL: Final[dict[str, Any]] = {
    "learning_rate": "schedule", "rho": 0.9, "epsilon": 1e-6, "weight_decay": 0.05, "exclude": ["v0"], "use_ema": True,
    "ema_momentum": 0.8, "ema_overwrite_frequency": 2, "loss_scale_factor": 2.0, "gradient_accumulation_steps": 2,
}  # fmt: skip


def all_options() -> list[dict[str, Any]]:
    """Each option, each pair of options that may be combined, and all at once."""
    single = [*CLIPS, *OTHERS]
    pairs = [a | b for a, b in itertools.combinations(single, 2) if not a.keys() & b.keys()]
    pairs = [pair for pair in pairs if sum("clip" in key for key in pair) < 2]
    return [{}, *single, *pairs, *(ALL | clip for clip in CLIPS), {"clipnorm": 0.0}, {"weight_decay": 0.0}]


def optimizer_of(cls: Any, options: dict[str, Any]) -> Any:
    options = {"learning_rate": 1.0, "name": "adadelta"} | options
    if options["learning_rate"] == "schedule":
        options["learning_rate"] = tie(4)
    elif options["learning_rate"] == "callable":
        options["learning_rate"] = lambda: 0.5
    excluded = options.pop("exclude", None)
    optimizer = cls(**options)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    return optimizer


def both(options: dict[str, Any], dtype: str = "float32") -> tuple[Any, Any, list[Any], list[Any]]:
    import keras

    from torch_adadelta import keras3

    variables, expected = variables_of(dtype), variables_of(dtype)
    ours, theirs = (optimizer_of(cls, options) for cls in (keras3.Adadelta, keras.optimizers.Adadelta))
    return ours, theirs, variables, expected


# ---- Models ---------------------------------------------------------------------------------------------------------

X: Final = np.random.default_rng(0).normal(size=(48, 6)).astype("float32")
Y: Final = X[:, :2] * 0.5


def model_of(optimizer: Any, policy: str = "float32", **options: Any) -> Any:
    import keras

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    layers = keras.layers
    hidden = layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(2.0))
    model = keras.Sequential([keras.Input((6,)), hidden, layers.BatchNormalization(), layers.Dense(2, dtype="float32")])
    keras.config.set_dtype_policy("float32")
    model.compile(optimizer=optimizer, loss="mse", **options)
    return model


def fit(model: Any, epochs: int = 2) -> list[float]:
    losses: list[float] = model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0).history["loss"]
    return losses


def everything(model: Any) -> list[Any]:
    return [*model.get_weights(), *(variable.numpy() for variable in model.optimizer.variables)]


def assert_same(one: Any, other: Any) -> None:
    for a, b in zip(everything(one), everything(other), strict=True):
        np.testing.assert_array_equal(a, b)


OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "all": {k: v for k, v in ALL.items() if k != "exclude"} | {"clipnorm": 0.5},
}
