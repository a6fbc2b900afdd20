"""What a file holds: a model of Keras, and the state of its Adadelta."""

import math
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.layers import Layer, Variable

LEGACY, NEW, KERAS3 = "legacy", "new", "keras3"


_GENERATIONS: Final = {
    LEGACY: "TensorFlow 2.4 or the legacy class of tf_keras",
    NEW: "the new class of tf_keras",
    KERAS3: "Keras 3",
}


@dataclass
class Checkpoint:
    """What a file holds. Arrays are read when they are asked for, while the file is open."""

    path: Path
    format: str
    generation: str  # LEGACY, NEW or KERAS3
    layers: list[Layer]
    iterations: LazyArray
    hyperparameters: dict[str, Any]  # those that the file has; a schedule as its configuration
    model: ModelConfig | None
    learning_rate: LazyArray | None = None  # the variable, where there is one
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the hyperparameters mean elsewhere
    backend: str | None = None  # of Keras, where the file says
    is_ordered: bool = True  # whether the layers are known to be in the order of the model without its configuration

    def in_order(self, layers: Sequence[Layer]) -> list[Layer] | None:
        """Some of the layers in the order of the model; None if that is not known."""
        if self.model is not None and self.model.is_complete:
            order = {layer.path: number for number, layer in enumerate(self.model.layers)}
            places = [order.get(layer.path, order.get(layer.path.rpartition("/")[0])) for layer in layers]
            if None not in places:  # as it is of a layer that was renamed, in a file that has the old name
                ranked = sorted(zip(places, range(len(layers)), strict=True))
                return [layers[number] for _, number in ranked]
        return list(layers) if self.is_ordered else None

    @property
    def source(self) -> str:
        """The format and the generation, for people."""
        return f"{self.format} of {_GENERATIONS[self.generation]}"

    def variables(self) -> Iterator[tuple[Layer, Variable]]:
        """All weights with their layers."""
        yield from variables_of(self.layers)

    def count(self) -> int:
        """The iterations.

        Raises:
            KerasFileError: they are no number that counts.
        """
        if math.prod(self.iterations.shape) != 1 or self.iterations.dtype.kind not in "iu":
            raise KerasFileError(f"its iterations have shape {self.iterations.shape} and {self.iterations.dtype}")
        count = int(self.iterations.read().reshape(()))
        if not 0 <= count < 2**63:
            raise KerasFileError(f"its iterations are {count}")
        return count


def variables_of(layers: Iterable[Layer]) -> Iterator[tuple[Layer, Variable]]:
    for layer in layers:
        for variable in layer.variables:
            yield layer, variable


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file leads to into a KerasFileError that names it."""
    try:
        yield
    except KerasFileError as error:
        raise KerasFileError(f"{path}: {error}") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        EOFError,
    ) as error:
        raise KerasFileError(f"{path}: it is damaged, or no file of Keras ({type(error).__name__}: {error})") from error


def explained(checkpoint: Checkpoint, stored: LazyArray) -> np.ndarray[Any, Any]:
    """Reads an array; what goes wrong is a KerasFileError that names the file."""
    with damage_named(checkpoint.path):
        array = stored.read()
        if array.shape != stored.shape:
            raise KerasFileError(f"{stored.name} has shape {array.shape}, not {stored.shape}")
        return array


def mark_frozen(layers: Iterable[Layer], model: ModelConfig | None) -> None:
    """Marks the weights that are not trained, by the configuration."""
    known = model.by_path() if model else {}
    for layer, variable in variables_of(layers):
        variable.is_frozen = layer.path in known and not known[layer.path].is_trainable


def separated(layers: list[Layer]) -> list[Layer]:
    """Separable convolutions as two layers, which is what they are in PyTorch."""
    found = []
    for layer in layers:
        roles = {variable.role: variable for variable in layer.variables}
        if {"depthwise_kernel", "pointwise_kernel"} <= roles.keys():
            depthwise = roles.pop("depthwise_kernel")
            pointwise = list(roles.values())
            depthwise.role = roles["pointwise_kernel"].role = "kernel"
            rank = len(depthwise.value.shape) - 2
            found.append(Layer(f"{layer.path}/depthwise", f"DepthwiseConv{rank}D", layer.config, [depthwise]))
            found.append(Layer(f"{layer.path}/pointwise", f"Conv{rank}D", layer.config, pointwise))
        else:
            found.append(layer)
    return found


def attach(name: str, variable: Variable, slots: Mapping[str, LazyArray]) -> None:
    for slot, stored in slots.items():
        if stored.shape != variable.value.shape:
            raise KerasFileError(f"{stored.name} has shape {stored.shape}, its weight {name} {variable.value.shape}")
        if stored.dtype.kind != "f":
            raise KerasFileError(f"{stored.name} has dtype {stored.dtype}, which no state has")
        setattr(variable, slot, stored)


def dropped(drop: Collection[str]) -> list[str]:
    return [configs.DROPPABLE[name] for name in drop]


def scalar(stored: LazyArray) -> float:
    value = float(stored.read().reshape(()))
    if not math.isfinite(value):
        raise KerasFileError(f"{stored.name} is {value}")
    return value


NO_STATE: Final = (
    "it holds no state of an Adadelta: {why}. Save with {how}, after a step at least, from a model that was compiled "
    "with the optimizer"
)
