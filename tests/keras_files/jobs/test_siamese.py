"""Two images go through one base, and the distance of what comes out says whether they show the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn


def keras_model(K: Any) -> Any:
    L = K.layers
    layers = [K.Input((12,)), *[L.Dense(12, activation="tanh") for _ in range(3)]]
    base = K.Sequential(layers, name="base")
    left, right = K.Input((12,)), K.Input((12,))
    return K.Model([left, right], L.Dense(1, name="out")(L.Subtract()([base(left), base(right)])))


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(12, 12), nn.Tanh())]
        self.base = nn.Sequential(*layers)
        self.out = nn.Linear(12, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.base(left) - self.base(right))


def batch(rng: np.random.Generator) -> Batch:
    left, right = rng.standard_normal((2, 8, 12))
    return [left, right], (left[:, :1] * right[:, :1] > 0).astype(float)


JOB = Job(keras_model, Siamese, batch)


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_siamese_net(generation: str, tmp_path: Path) -> None:
    check(JOB, generation, tmp_path)
