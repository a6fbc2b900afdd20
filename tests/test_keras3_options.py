"""The options of Keras 3 beside each other: every pair that may be combined, and all at once, to the bit of the oracle."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    Path,
    assert_optimizer_like_oracle,
    gradients,
    optimizer_oracle_of,
    randn,
    to_oracle,
)
from torch import Tensor
from torch.nn import Parameter
from training import path  # noqa: F401

from torch_adadelta import AdadeltaKeras

OPTIONS: dict[str, dict[str, Any]] = {
    "weight_decay": {"weight_decay": 0.01},
    "coupled": {"weight_decay": 0.02, "decoupled_weight_decay": False},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "overwrite": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3},
    "loss_scale": {"loss_scale_factor": 7.0},
    "decay": {"decay": 0.1},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.9},
    "maximize": {"maximize": True},
}

REAL = tuple(dtype for dtype in DTYPES if not dtype.is_complex)


def _combinations() -> list[tuple[str, ...]]:
    excluded = [
        {"weight_decay", "coupled"},
        {"clipnorm", "global_clipnorm"},
        *({"coupled", clip} for clip in ("clipvalue", "clipnorm", "global_clipnorm")),
    ]
    some = [(name,) for name in OPTIONS] + list(itertools.combinations(OPTIONS, 2))
    everything = ("weight_decay", "overwrite", "ema", "accumulation", "loss_scale", "decay", "clipvalue", "clipnorm")
    return [names for names in some if not any(pair <= set(names) for pair in excluded)] + [everything]


def parameters(dtypes: tuple[torch.dtype, ...]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [Parameter(randn((5, 7), dtype, generator)) for dtype in dtypes]


def call(params: list[Parameter], step: int) -> list[Tensor | None]:
    """The gradients of a call, some of which are missing."""
    grads: list[Tensor | None] = []
    for index, param in enumerate(params):
        (grad,) = gradients(param.shape, param.dtype, 1, seed=31 * step + index)
        grads.append(None if (step + index) % 5 == 4 else grad)
    return grads


@pytest.mark.parametrize("names", _combinations(), ids="-".join)
def test_each_pair_of_options(path: Path, names: tuple[str, ...]) -> None:  # noqa: F811
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    params = parameters(REAL if "clipvalue" in names else DTYPES)
    optimizer = AdadeltaKeras(params, 1.0, **options, **path.options)
    expected = optimizer_oracle_of(params, learning_rate=1.0, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no gradient in the call that updates")
        for step in range(13):
            grads = call(params, step)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            expected.step(to_oracle(grads))
            optimizer.step()
            assert_optimizer_like_oracle(optimizer, expected, f"after call {step}")
