"""One LSTM reads the rows of an image, and another what came out of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn

from torch_adadelta.keras import freeze_second_biases


def keras_model(K: Any) -> Any:
    L = K.layers
    image = K.Input((5, 6, 1))
    rows = L.TimeDistributed(L.LSTM(8), name="rows")(image)
    return K.Model(image, L.Dense(3, activation="softmax", name="out")(L.LSTM(8, name="columns")(rows)))


class HierarchicalLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(1, 8, batch_first=True)
        self.columns = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 3)
        freeze_second_biases(self)

    def forward(self, image: Tensor) -> Tensor:
        rows = self.rows(image.flatten(0, 1))[0][:, -1].unflatten(0, image.shape[:2])
        return self.out(self.columns(rows)[0][:, -1]).softmax(1)


def batch(rng: np.random.Generator) -> Batch:
    return [rng.standard_normal((8, 5, 6, 1))], np.eye(3)[rng.integers(3, size=8)]


JOB = Job(keras_model, HierarchicalLSTM, batch)


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_hierarchical_lstm(generation: str, tmp_path: Path) -> None:
    check(JOB, generation, tmp_path)
