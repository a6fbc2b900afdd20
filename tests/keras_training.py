"""Optimizers that train on drawn gradients, schedules of a user, and checkpoints of them."""

import io
from typing import Any

import numpy as np
import torch
from cases import assert_same_bits, gradients
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras
from torch_adadelta.schedules import ExponentialDecay, LearningRateSchedule


def make_params(*shapes: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(torch.full(shape, 1.0 + i)) for i, shape in enumerate(shapes or ((3,), (2, 2)))]


def set_gradients(optimizer: AdadeltaKeras, step: int = 0) -> None:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            (p.grad,) = gradients(p.shape, p.dtype, 1, seed=10 * step + i)


def advance(optimizer: AdadeltaKeras, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(optimizer, step)
        optimizer.step()


def assert_same_training(one: AdadeltaKeras, other: AdadeltaKeras) -> None:
    for x, y in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert_same_bits(p, q)


class Halving(LearningRateSchedule):
    """A user's own: 1 / 2**step, with a configuration."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: Any) -> Any:
        return self.start * 0.5**step

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}


class WithoutConfig(LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 1.0 / (1.0 + step)


EVERYTHING: dict[str, Any] = {
    "learning_rate": ExponentialDecay(0.5, 3, 0.7), "rho": 0.9, "epsilon": 1e-3, "decay": 0.1, "clipvalue": 1.0,
    "clipnorm": 2.0, "name": "A",
}  # fmt: skip


def saved(optimizer: AdadeltaKeras) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    result: dict[str, Any] = torch.load(buffer, weights_only=True)
    return result


class Counting(LearningRateSchedule):
    """1, 1/2, 1/3, …: whatever the step, with the number of its calls in its configuration."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def __call__(self, step: Any) -> Any:
        self.calls += 1
        return 1.0 / self.calls

    def get_config(self) -> dict[str, Any]:
        return {"calls": self.calls}
