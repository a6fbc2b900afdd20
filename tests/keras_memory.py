"""Checkpoints of Keras that are in no file, for the tests of `torch_adadelta.keras`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import KERAS3, Checkpoint
from torch_adadelta.keras.errors import LazyArray
from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.matching import match
from torch_adadelta.keras.saving import _arrays
from torch_adadelta.keras.transfer import _assembled


def layer_of(name: str, class_name: str | None, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Layer:
    variables = [
        Variable(role, LazyArray(f"{name}/{role}", value.shape, value.dtype, lambda value=value: value))
        for role, value in weights.items()
    ]
    return Layer(name, class_name, config, variables)


def checkpoint_of(config: dict[str, Any] | None, layers: list[Layer]) -> Checkpoint:
    iterations = LazyArray("iterations", (), np.dtype("i8"), lambda: np.int64(0))
    model = None if config is None else ModelConfig(config)
    return Checkpoint(Path("m"), ".h5", KERAS3, layers, iterations, {}, model)


def moved(checkpoint: Checkpoint, model: nn.Module, **options: Any) -> None:
    """Moves the weights to the model; and back, which must change nothing."""
    found = match(checkpoint, model, **options)
    with torch.no_grad():
        for tensor, array in _assembled(found, checkpoint, "value"):
            tensor.copy_(torch.from_numpy(array))
    back = _arrays(found, AdadeltaKeras([torch.zeros(1)]), weights=True)
    for transfer in found.transfers:
        stored = transfer.variable.value
        np.testing.assert_array_equal(back[stored.name], stored.read(), strict=True)
