"""Which layers of Keras may become which modules of PyTorch, by their kinds and the shapes of all weights."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from torch_adadelta.keras.config import inner_layer
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.layouts import (
    Interpretation,
    LayoutMismatch,
    WeightPlacement,
    interpretations,
    is_reset_first,
    placed,
    placements,
)
from torch_adadelta.keras.modules import TorchLayer


class Fits:
    """The ways to understand each of some layers in which it fits each of some modules.

    What fits the same is of one sort, which is looked at once.
    """

    def __init__(self, layers: Sequence[Layer], torch_layers: Sequence[TorchLayer]) -> None:
        sorts: dict[Any, int] = {}
        self._layers = {id(layer): sorts.setdefault(_signature_of_layer(layer), len(sorts)) for layer in layers}
        sorts = {}
        self._modules = {
            id(torch_layer): sorts.setdefault(_signature_of_torch_layer(torch_layer), len(sorts))
            for torch_layer in torch_layers
        }
        self._found: dict[tuple[int, int], tuple[list[Interpretation], str]] = {}
        self._sizes: dict[int, set[int]] = {}
        self._sizes_of_modules: dict[int, set[int]] = {}

    def sorts(self, items: Sequence[Layer] | Sequence[TorchLayer]) -> list[list[Any]]:
        """Layers, or modules, of one sort together, in their order."""
        found: dict[int, list[Any]] = {}
        for item in items:
            numbers = self._layers if isinstance(item, Layer) else self._modules
            found.setdefault(numbers[id(item)], []).append(item)
        return list(found.values())

    def options(self, layer: Layer, torch_layer: TorchLayer) -> list[Interpretation]:
        """The ways to understand a layer in which it fits a module."""
        sort, other = self._layers[id(layer)], self._modules[id(torch_layer)]
        if sort not in self._sizes:
            self._sizes[sort] = _sizes_of_layer(layer)
        if other not in self._sizes_of_modules:
            self._sizes_of_modules[other] = {tensor.numel() for tensor in torch_layer.tensors.values()}
        return self._of(layer, torch_layer)[0] if self._sizes[sort] <= self._sizes_of_modules[other] else []

    def reason(self, layer: Layer, torch_layer: TorchLayer) -> str:
        """Why a layer does not fit a module."""
        return self._of(layer, torch_layer)[1]

    def _of(self, layer: Layer, torch_layer: TorchLayer) -> tuple[list[Interpretation], str]:
        key = self._layers[id(layer)], self._modules[id(torch_layer)]
        if key not in self._found:
            self._found[key] = _fitting(layer, torch_layer)
        return self._found[key]


def _sizes_of_layer(layer: Layer) -> set[int]:
    """How many elements parameters have that a layer must find: for the weights that go to one as a whole."""
    kernels = (
        v for v in layer.variables if re.fullmatch(r"((forward|backward)/)?([a-z_]*kernel|embeddings|0)", v.role)
    )
    return {math.prod(variable.value.shape) for variable in kernels}


def _signature_of_layer(layer: Layer) -> Any:
    """The same for layers that fit the same modules."""
    return (
        layer.class_name,
        inner_layer(layer.config)[0],
        is_reset_first(layer),
        tuple((v.role, v.value.shape) for v in layer.variables),
    )


def _signature_of_torch_layer(torch_layer: TorchLayer) -> Any:
    """The same for modules that the same layers fit."""
    own = [getattr(torch_layer.module, name, None) for name in ("groups", "num_heads")]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in torch_layer.tensors.items())
    return type(torch_layer.module), *own, getattr(torch_layer.module, "bias_k", None) is None, shapes


def _fitting(layer: Layer, torch_layer: TorchLayer) -> tuple[list[Interpretation], str]:
    """The ways to understand a layer in which it fits a module, and why it does not in the others."""
    found: list[Interpretation] = []
    reasons = []
    for interpretation in interpretations(layer):
        try:
            placed(interpretation, torch_layer.module, torch_layer.tensors)
        except LayoutMismatch as error:
            reasons.append(str(error))
        else:
            if not any(_are_same(placements(interpretation), placements(other), layer) for other in found):
                found.append(interpretation)
    return found, "; ".join(dict.fromkeys(reasons)) or "no module of PyTorch is known for it"


def _are_same(ours: list[WeightPlacement], theirs: list[WeightPlacement], layer: Layer) -> bool:
    """Whether two ways to understand a layer move every element to the same place."""
    if [(placement.param, placement.row, placement.first) for placement in ours] != [
        (p.param, p.row, p.first) for p in theirs
    ]:
        return False
    if all(one.layout == other.layout for one, other in zip(ours, theirs, strict=True)):
        return True
    shapes = [variable.value.shape for variable in layer.variables]
    if any(math.prod(shape) > 1 << 20 for shape in shapes):
        return False
    indices = [np.arange(math.prod(shape)).reshape(shape) for shape in shapes]
    return all(
        np.array_equal(one.layout.to_torch(array), other.layout.to_torch(array))
        for one, other, array in zip(ours, theirs, indices, strict=False)
        if one.row is None
    )
