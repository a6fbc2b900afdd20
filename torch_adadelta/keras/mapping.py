"""What the user says of layers and modules: which part of a model is which, and which weight is which parameter."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from torch_adadelta.keras.correspondence import WeightTransfer
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.layouts import Layout, same
from torch_adadelta.keras.modules import TorchLayer

_ROWS: Final = re.compile(r"(.+)\[(\d+):(\d+)\]")


@dataclass
class Part:
    """Layers and modules of which each has its counterpart in here: what `mapping` puts together, or all the rest."""

    key: str = ""  # the path of the layers; "" for the rest
    target: str = ""  # that of the modules
    layers: list[Layer] = field(default_factory=list)
    torch_layers: list[TorchLayer] = field(default_factory=list)

    @property
    def why(self) -> str:
        """What puts them together, for people."""
        return f"mapping[{self.key!r}]" if self.key else ""

    def name_of_layer(self, path: str) -> str:
        """The path of a layer, as it is in here."""
        return path[len(self.key) :].removeprefix("/") if _is_in(path, self.key, "/") else path

    def name_of_module(self, torch_layer: TorchLayer) -> str:
        """The path of a module in here, written as that of a layer."""
        path = torch_layer.path[len(self.target) :].removeprefix(".")
        return re.sub(r"^(module|_orig_mod)\.", "", path).replace(".", "/")


class UserMapping:
    """The argument `mapping` of `load_keras`, checked.

    Args:
        mapping: the argument.
        layers: all layers.
        torch_layers: all modules.
        tensors: the parameters and buffers of the model, by name.
        both: lists both sides, for messages.

    Raises:
        ValueError: something in it is neither on this nor on that side, or does not fit.
    """

    def __init__(
        self,
        mapping: Mapping[str, Any],
        layers: Sequence[Layer],
        torch_layers: Sequence[TorchLayer],
        tensors: Mapping[str, Tensor],
        both: Callable[[], str],
    ) -> None:
        # In a numbered file, the layers of a subclass have their place by the names of attributes, besides their names.
        self._layers = {layer.group: layer for layer in layers if layer.group} | {layer.path: layer for layer in layers}
        self._tensors = tensors
        self._both = both
        self._targets: dict[str, str | None] = {}  # of layers, and of what has layers in it
        self.transfers: list[WeightTransfer] = []
        if not isinstance(mapping, Mapping):
            raise TypeError(f"mapping must be a dictionary, got {type(mapping).__name__}")
        for key, target in mapping.items():
            if not isinstance(key, str):
                raise ValueError(f"mapping has {key!r}, which is no layer and no weight. " + self._both())
            if key and any(_is_in(path, key, "/") for path in self._layers):
                if target is not None and (
                    not isinstance(target, str) or not any(_is_in(t.path, target, ".[") for t in torch_layers)
                ):
                    raise ValueError(
                        f"mapping[{key!r}] is {target!r}, which is no module with parameters. " + self._both()
                    )
                self._targets[key] = target
            else:
                self.transfers.append(self._of_weight(key, target))
        keys: dict[str, str] = {}
        for key, target in self._targets.items():
            if target is not None and keys.setdefault(target, key) != key:
                raise ValueError(f"mapping has {target!r} for both {keys[target]!r} and {key!r}")

    def parts(self, layers: Iterable[Layer], torch_layers: Iterable[TorchLayer]) -> list[Part]:
        """What belongs together, by the longest key and the longest path of a module, without what is left out."""
        rest = Part()
        keys = sorted(self._targets, key=len, reverse=True)
        parts = {key: Part(key, target) for key in keys if (target := self._targets[key]) is not None}
        for layer in layers:
            own = (layer.path, layer.group)
            key = next((key for key in keys if any(_is_in(path, key, "/") for path in own)), None)
            if key is None:
                rest.layers.append(layer)
            elif key in parts:
                parts[key].layers.append(layer)
        by_target = sorted(parts.values(), key=lambda part: len(part.target), reverse=True)
        for torch_layer in torch_layers:
            part = next((part for part in by_target if _is_in(torch_layer.path, part.target, ".[")), rest)
            part.torch_layers.append(torch_layer)
        return [*parts.values(), rest]

    def _of_weight(self, key: str, target: Any) -> WeightTransfer:
        path, _, role = key.rpartition("/")
        while path and path not in self._layers:
            path, _, before = path.rpartition("/")
            role = f"{before}/{role}"
        if path not in self._layers:
            raise ValueError(f"mapping has {key!r}, which is no layer and no weight. " + self._both())
        layer = self._layers[path]
        variable = next((variable for variable in layer.variables if variable.role == role), None)
        if variable is None:
            names = ", ".join(variable.role for variable in layer.variables)
            raise ValueError(f"mapping has {key!r}, and {layer.path} has {names}")
        if target is None:
            raise ValueError(f"mapping[{key!r}] is None, which leaves out layers as a whole, such as {layer.path}")
        label, layout = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
        name, first, end = self._rows(key, label, target)
        tensor = self._tensors[name]
        shape, goal = variable.value.shape, tuple(tensor.shape)
        if first is not None:
            if not tensor.dim() or not first < end <= len(tensor):
                raise ValueError(f"mapping[{key!r}] is {label}, and {name} of shape {goal} has no such rows")
            goal = (end - first, *goal[1:])
        if layout is None:
            layout = same(shape)
        elif not isinstance(layout, Layout):
            if not isinstance(layout, list | tuple) or not all(isinstance(axis, int) for axis in layout):
                raise TypeError(f"mapping[{key!r}] has {layout!r} for {label}, which is no permutation and no Layout")
            layout = Layout(tuple(layout))
        if layout.result(shape) != goal:
            raise ValueError(
                f"mapping[{key!r}]: {role} of shape {shape} would be {layout.result(shape)}, and {label} is {goal}"
            )
        return WeightTransfer(layer, variable, name, tensor, layout, first=first)

    def _rows(self, key: str, label: Any, target: Any) -> tuple[str, int | None, int]:
        """The parameter, and the rows of it, that a name such as "attention.in_proj_weight[0:16]" means."""
        if isinstance(label, str) and label in self._tensors:
            return label, None, 0
        match = _ROWS.fullmatch(label) if isinstance(label, str) else None
        if match is None or match[1] not in self._tensors:
            raise ValueError(f"mapping[{key!r}] is {target!r}, and the model has no parameter of that name")
        return match[1], int(match[2]), int(match[3])


def _is_in(path: str, prefix: str, separators: str) -> bool:
    """Whether a path is this one, or below it."""
    return path == prefix or not prefix or (path.startswith(prefix) and path[len(prefix)] in separators)
