"""What a file holds: a model of Keras, and the state of its Adadelta."""

import math
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import PARTS, WITH_WEIGHTS
from torch_adadelta.keras.config import ModelConfig, leaf_of, wrapped_class
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.layers import Layer, Variable


class Generation(NamedTuple):
    """A class of Adadelta that Keras had, and what its options and its updates mean."""

    title: str
    has_decay: bool = False  # the option `decay`
    has_additions: bool = False  # weight decay, moving averages, gradient accumulation
    has_zero: bool = False  # whether a clip option of 0 means none, and an epsilon of 0 stays 0
    is_sparse: bool = False  # whether only the rows of an embedding that a batch uses are updated
    is_norm_first: bool = False  # whether gradients are clipped by their norm, and by value after that
    has_global_clipnorm: bool = True


KERAS2: Final = Generation("Keras 2", has_decay=True, has_zero=True, is_norm_first=True)
TF1: Final = Generation(
    "TensorFlow 1.13 to 2.2", has_decay=True, is_sparse=True, is_norm_first=True, has_global_clipnorm=False
)
LEGACY: Final = Generation("TensorFlow 2.4 or the legacy class of tf_keras", has_decay=True, is_sparse=True)
NEW: Final = Generation("the new class of tf_keras", has_additions=True, has_zero=True)
KERAS3: Final = Generation("Keras 3", has_additions=True, has_zero=True)
# Of a file without state, whose optimizer is another, or not in it.
UNKNOWN: Final = Generation("", has_decay=True)


class Request(NamedTuple):
    """What a file is read for.

    Args:
        config: the configuration of the model, for files without it, or instead of theirs.
        drop: what may be left out, of `DROPPABLE`.
        state_order: the names of the weights in the order of the optimizer, for files whose state has no names.
        uses: what the optimizer used of "ema" and "gradient_accumulation", for those of these files that do not say.
        has_state: False for the weights, and the options of an Adadelta, of a file with any optimizer or none.
    """

    config: dict[str, Any] | None = None
    drop: Collection[str] = ()
    state_order: Sequence[str] | None = None
    uses: Collection[str] = ()
    has_state: bool = True


@dataclass
class Checkpoint:
    """What a file holds. Arrays are read when they are asked for, while the file is open."""

    path: Path
    format: str
    generation: Generation
    layers: list[Layer]
    iterations: LazyArray | None  # None if the file does not hold them
    hyperparameters: dict[str, Any]  # those that the file has; a schedule as its configuration
    model: ModelConfig | None
    learning_rate: LazyArray | None = None  # the variable, where there is one
    remarks: list[str] = field(default_factory=list)  # what else a report tells
    notes: list[str] = field(default_factory=list)  # what the hyperparameters mean elsewhere
    backend: str | None = None  # of Keras, where the file says
    is_ordered: bool = True  # whether the layers are known to be in the order of the model without its configuration
    optimizer: str | None = configs.ADADELTA  # its class; None if it is not in the file, or not known
    has_state: bool = True  # whether the state was asked for, and is there
    # The names of all variables of an optional slot, by its key; and where a variable of the optimizer is once more.
    optional: Mapping[str, list[str]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    def leaves(self) -> dict[int, str]:
        """The path in the configuration of each layer, by its `id`: for one in a custom layer, that of this.

        Of those without, as many as there are layers with weights in the configuration that the file does not have,
        a layer was renamed and the file has its old name.
        """
        if self.model is None or not self.model.is_complete:
            return {}
        known = self.model.by_path()
        found = {id(layer): path for layer in self.layers if (path := leaf_of(layer.path, known)) is not None}
        old = [layer for layer in self.layers if id(layer) not in found]
        new = known.keys() - found.values()
        paths = [path for path in known if path in new and wrapped_class(known[path])[0] in WITH_WEIGHTS]
        if self.is_ordered and len(old) == len(paths):
            found |= {id(layer): path for layer, path in zip(old, paths, strict=True)}
        return found

    def in_order(self, layers: Sequence[Layer]) -> list[Layer] | None:
        """Some of the layers in the order of the model; None if that is not known."""
        leaves = self.leaves()
        if leaves and self.model is not None and all(id(layer) in leaves for layer in layers):
            order = {known.path: number for number, known in enumerate(self.model.layers)}
            return sorted(layers, key=lambda layer: order[leaves[id(layer)]])
        return list(layers) if self.is_ordered else None

    @property
    def source(self) -> str:
        """The format and the generation, for people."""
        return f"{self.format} of {self.generation.title}" if self.generation.title else self.format

    def variables(self) -> Iterator[tuple[Layer, Variable]]:
        """All weights with their layers."""
        yield from variables_of(self.layers)

    def count(self) -> int:
        """The iterations; 0 if the file does not hold them, where Keras goes on from 0.

        Raises:
            KerasFileError: they are no number that counts.
        """
        if self.iterations is None:
            return 0
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
        raise type(error)(f"{path}: {error}") from error
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
    """The layers as PyTorch has them: separable convolutions as two, and custom layers as the layers in them."""
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
        elif layer.class_name is not None and layer.class_name not in _WITH_PARTS:
            found += _inner_layers(layer)
        else:
            found.append(layer)
    return found


# The layers of Keras that are known to have layers in them; and which parts these have. All else is a custom layer.
_WITH_PARTS: Final = {"MultiHeadAttention", "GroupedQueryAttention", "Bidirectional"}
_WHOLE: Final = (set(PARTS.values()), {"forward", "backward"})


def _inner_layers(layer: Layer) -> list[Layer]:
    """A custom layer as the layers in it, whose classes no file holds, by the names of their weights."""
    inner: dict[str, dict[str, list[Variable]]] = {}  # by the path in it, and by the part of what has parts
    for variable in layer.variables:
        path, _, part = variable.role.rpartition("/")[0].rpartition("/")
        if not any(part in parts for parts in _WHOLE):
            path, part = variable.role.rpartition("/")[0], ""
        inner.setdefault(path, {}).setdefault(part, []).append(variable)
    pieces: dict[str, list[Variable]] = {}
    for path, parts in inner.items():
        ranks = {len(variable.value.shape) for variable in parts.get("query", ())}
        is_whole = set(parts) in _WHOLE and (not ranks or max(ranks) == 3)  # of Dense layers it is no attention
        for part, variables in parts.items():
            name = path if is_whole else f"{path}/{part}".strip("/")
            pieces.setdefault(name, []).extend(variables)
    found = []
    for path, variables in pieces.items():
        for variable in variables:
            variable.role = variable.role[len(path) :].removeprefix("/")
        inner_layer = Layer(f"{layer.path}/{path}", None, {}, variables, layer.group)
        found.append(inner_layer if path else replace(layer, variables=variables))
    return found


def attach(name: str, variable: Variable, slots: Mapping[str, LazyArray]) -> None:
    for slot, stored in slots.items():
        if stored.shape != variable.value.shape:
            raise KerasFileError(f"{stored.name} has shape {stored.shape}, its weight {name} {variable.value.shape}")
        if stored.dtype.kind != "f":
            raise KerasFileError(f"{stored.name} has dtype {stored.dtype}, which no state has")
        setattr(variable, slot, stored)


def dropped(drop: Collection[str]) -> list[str]:
    """What a report tells of what is left out."""
    return [f"left out: {configs.DROPPABLE[name]}" for name in drop if name not in configs.IDLE]


def scale_remark(scale: LazyArray | None = None, config: Any = None) -> str:
    """What a report tells of the scale of a LossScaleOptimizer.

    Args:
        scale: the variable, if the file has it.
        config: its configuration, if the file has that.
    """
    options = config.get("config") if isinstance(config, dict) else None
    first = options.get("initial_scale") if isinstance(options, dict) else None
    value = first if isinstance(first, int | float) else None
    if scale is not None:
        value = float(scale.read().reshape(()))
    elif value is not None and isinstance(options, dict) and options.get("dynamic", True):
        return f"left out: the loss scale, which began as {value:g}; what became of it is not in the file"
    if value is None or not 0 < value < math.inf:
        return f"left out: the loss scale, which {'is not in the file' if value is None else f'was {value}'}"
    return f"left out: the loss scale, {value:g}; torch.amp.GradScaler(init_scale={float(value)}) begins with it"


def scalar(stored: LazyArray) -> float:
    value = float(stored.read().reshape(()))
    if not math.isfinite(value):
        raise KerasFileError(f"{stored.name} is {value}")
    return value


NO_STATE: Final = (
    "it holds no state of an Adadelta: {why}. Save with {how}, after a step at least, from a model that was compiled "
    "with the optimizer"
)
