"""The side of PyTorch: the modules with parameters, in their order, and what an ``nn.Sequential`` shows of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_adadelta.keras.layouts import (
    ALL_MODULES,
)
from torch_adadelta.optimizer import AdadeltaKeras


@dataclass
class TorchLayer:
    """A module of PyTorch with parameters of its own; of a recurrent module with several layers, one of them."""

    path: str
    module: nn.Module
    tensors: dict[str, Tensor]  # by the names that `layouts` uses
    names: dict[str, str]  # from those to the names in the model
    is_flattened: bool = False  # whether an nn.Flatten of feature maps comes before it in its nn.Sequential
    is_unflattened: bool = False  # whether an nn.Unflatten comes behind it

    @property
    def module_path(self) -> str:
        """The path of the module, without the number of the layer in it."""
        return re.sub(r"\[\d+\]$", "", self.path) if isinstance(self.module, nn.RNNBase) else self.path

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.path or '(the model)'} ({type(self.module).__name__}): {shapes}"


def torch_layers_of(model: nn.Module) -> tuple[list[TorchLayer], dict[str, Tensor]]:
    """The modules with parameters, in their order, and the parameters that are in none of a known class.

    A parameter that several modules share belongs to the first.
    """
    found: list[TorchLayer] = []
    seen: set[int] = set()
    loose: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention), remove_duplicate=False))
        if isinstance(module, ALL_MODULES) and not hasattr(module, "parametrizations"):
            buffers = dict(module.named_buffers(recurse=False))
            buffers.pop("num_batches_tracked", None)
            own |= buffers
            for torch_layer in _split_layers(path, module, own):
                if not all(id(tensor) in seen for tensor in torch_layer.tensors.values()):
                    found.append(torch_layer)
                seen |= set(map(id, torch_layer.tensors.values()))
        else:
            for name, tensor in own.items():
                if id(tensor) not in seen:
                    loose[_joined(path, name)] = tensor
                    seen.add(id(tensor))
    _mark_flattened(model, found)
    return found, loose


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _split_layers(path: str, module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[TorchLayer]:
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(f"{_joined(path, name)} is not initialised yet; run the model on a batch first")
    if not isinstance(module, nn.RNNBase):
        yield TorchLayer(path, module, tensors, {name: _joined(path, name) for name in tensors})
        return
    if module.proj_size:
        raise ValueError(f"{path} has proj_size={module.proj_size}, which no layer of Keras has")
    for layer in range(module.num_layers):
        names = {re.sub(r"_l\d+", "", name): name for name in tensors if re.search(rf"_l{layer}(_reverse)?$", name)}
        label = path if module.num_layers == 1 else f"{path}[{layer}]"
        yield TorchLayer(
            label,
            module,
            {short: tensors[name] for short, name in names.items()},
            {short: _joined(path, name) for short, name in names.items()},
        )


def _steps(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules of nested nn.Sequentials, in the order in which they run."""
    if type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _steps(child, _joined(path, name))
    else:
        yield path, module


# The modules that take maps, and give them with the channels first.
_MAPS: Final = (
    nn.modules.conv._ConvNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.Upsample,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
)


def _is_elementwise(module: nn.Module) -> bool:
    """Whether a module leaves every element in its place."""
    if isinstance(module, nn.MultiheadAttention):
        return False
    places = ("torch.nn.modules.activation", "torch.nn.modules.dropout")
    return type(module).__module__ in places or type(module) is nn.Identity


def has_maps(model: nn.Module) -> bool:
    """Whether a model has modules that take feature maps, or make some."""
    return any(isinstance(module, (*_MAPS, nn.Unflatten)) for module in model.modules())


def _mark_flattened(model: nn.Module, found: list[TorchLayer]) -> None:
    """Marks the modules of which an ``nn.Sequential`` shows that their features are flattened maps, or become some."""
    by_path = {torch_layer.path: torch_layer for torch_layer in found}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        state = ""  # what comes next: "maps", "flat" for maps in a row, "features", "split" by Unflatten; "" if unknown
        before: list[TorchLayer] = []  # that gave, or scaled, the features that come next
        for step, inner in _steps(module, path):
            torch_layer = by_path.get(step)
            if isinstance(inner, _MAPS) or (isinstance(inner, nn.BatchNorm1d) and state in ("maps", "split")):
                for earlier in before if state == "split" else ():
                    earlier.is_unflattened = True
                state, before = "maps", []
            elif isinstance(inner, nn.Flatten):
                is_whole = (inner.start_dim, inner.end_dim) == (1, -1)
                state, before = ("flat" if is_whole and state == "maps" else ""), []
            elif isinstance(inner, nn.Unflatten):
                state = "split" if inner.dim in (1, -1) and state == "features" else ""
            elif isinstance(inner, nn.Linear):
                if torch_layer is not None:
                    torch_layer.is_flattened = torch_layer.is_flattened or state == "flat"
                state, before = "features", [torch_layer] if torch_layer is not None else []
            elif (
                isinstance(inner, nn.BatchNorm1d | nn.LayerNorm)
                and state in ("flat", "features")
                and torch_layer is not None
            ):
                torch_layer.is_flattened = torch_layer.is_flattened or state == "flat"
                before.append(torch_layer)
            elif not _is_elementwise(inner):
                state, before = "", []


def params_of(optimizer: AdadeltaKeras) -> set[Tensor]:
    """All parameters of an optimizer."""
    return {param for group in optimizer.param_groups for param in group["params"]}
