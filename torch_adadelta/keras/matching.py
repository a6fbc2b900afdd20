"""Finds out which layer of Keras is which module of PyTorch.

A layer and a module fit if the one can become the other: their kind, and the shapes of all weights. Where that leaves
one possibility, it is taken. Where it leaves several, names decide if they agree on both sides, or the order if it is
that of computation on both sides. Otherwise nothing is taken, and the error lists both sides.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from torch import Tensor, nn

from torch_adadelta.keras.contents import Checkpoint
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.flattening import Flattening
from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.layouts import (
    GATES,
    Interpretation,
    Layout,
    LayoutMismatch,
    WeightPlacement,
    interpretations,
    kinds_of,
    ordered_placements,
    placed,
    placements,
)
from torch_adadelta.keras.modules import TorchLayer, has_maps, is_chain, torch_layers_of

MATCHES: Final = ("auto", "names", "order")


class WeightTransfer(NamedTuple):
    """A weight of Keras, or a row of it, and the parameter or buffer that it goes to."""

    layer: Layer
    variable: Variable
    name: str  # of the parameter in the model
    tensor: Tensor
    layout: Layout
    row: int | None = None
    first: int | None = None

    @property
    def label(self) -> str:
        """The weight, for people."""
        return f"{self.layer.path}/{self.variable.role}" + ("" if self.row is None else f"[{self.row}]")


@dataclass
class Match:
    """All transfers, and what is left over on the side of PyTorch."""

    transfers: list[WeightTransfer]
    neutral: list[tuple[str, Tensor]] = field(default_factory=list)  # parameters that Keras does not have
    pairs: list[tuple[Layer, TorchLayer]] = field(default_factory=list)


Target = str | tuple[Any, ...] | None


def match(
    checkpoint: Checkpoint,
    model: nn.Module,
    mapping: Mapping[str, Any] | None = None,
    how: str = "auto",
    flatten: str | Mapping[str, Any] | None = None,
) -> Match:
    """Which weight goes to which parameter.

    Args:
        checkpoint: the side of Keras.
        model: the side of PyTorch.
        mapping: what is not to be inferred: from the path of a layer to that of a module, or from the path of a weight
            ("dense/kernel") to the name of a parameter, or to a tuple of that and a permutation or a `Layout`; None
            leaves a layer out.
        how: "auto", "names" or "order".
        flatten: as for `Flattening`.

    Raises:
        KerasFileError: no match, or several, with a list of both sides.
        ValueError: an argument is wrong.
    """
    if how not in MATCHES:
        raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {how!r}")
    found, loose = torch_layers_of(model)
    state = _Matching(checkpoint, found, loose, Flattening(checkpoint, flatten, has_maps(model)))
    state.explicit(dict(mapping or {}), dict(model.named_parameters()) | dict(model.named_buffers()))
    state.infer(how, is_chain(model))
    return state.result()


class _Matching:
    def __init__(
        self, checkpoint: Checkpoint, found: list[TorchLayer], loose: dict[str, Tensor], flattening: Flattening
    ) -> None:
        self._checkpoint = checkpoint
        self._all_torch_layers = found
        self._layers = list(checkpoint.layers)
        self._torch_layers = list(found)
        self._loose = loose
        self._flattening = flattening
        self._match = Match([])
        self._fits: dict[tuple[int, int], list[Interpretation]] = {}
        self._by_signature: dict[Any, tuple[list[Interpretation], str]] = {}
        self._reasons: dict[tuple[int, int], str] = {}

    # ---- What the user says ----

    def explicit(self, mapping: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layers = {layer.path: layer for layer in self._layers}
        by_module = {torch_layer.path: torch_layer for torch_layer in self._torch_layers}
        taken_roles: dict[str, set[str]] = {}
        taken_params: set[int] = set()
        for key, target in mapping.items():
            if key in layers and target is None:
                self._layers.remove(layers[key])
            elif key in layers and isinstance(target, str) and target in by_module:
                self._take(layers[key], by_module[target], f"mapping[{key!r}]")
            elif key in layers:
                raise ValueError(f"mapping[{key!r}] is {target!r}, which is no module with parameters. " + self._both())
            else:
                path, _, role = key.rpartition("/")
                while path and path not in layers:
                    path, _, before = path.rpartition("/")
                    role = f"{before}/{role}"
                if path not in layers:
                    raise ValueError(f"mapping has {key!r}, which is no layer and no weight. " + self._both())
                transfer = self._explicit_transfer(key, layers[path], role, target, tensors)
                self._match.transfers.append(transfer)
                taken_roles.setdefault(path, set()).add(role)
                taken_params.add(id(transfer.tensor))
        for path, roles in taken_roles.items():
            missing = {variable.role for variable in layers[path].variables} - roles
            if missing:
                raise ValueError(f"mapping has some weights of {path}, and not {', '.join(sorted(missing))}")
            self._layers.remove(layers[path])
        for torch_layer in list(self._torch_layers):
            inside = [id(tensor) in taken_params for tensor in torch_layer.tensors.values()]
            if any(inside):
                self._torch_layers.remove(torch_layer)
                for name, tensor in torch_layer.tensors.items():
                    if id(tensor) not in taken_params:
                        self._leave(torch_layer, name, tensor)
        self._loose = {name: tensor for name, tensor in self._loose.items() if id(tensor) not in taken_params}

    def _explicit_transfer(
        self, key: str, layer: Layer, role: str, target: Any, tensors: dict[str, Tensor]
    ) -> WeightTransfer:
        variable = next((variable for variable in layer.variables if variable.role == role), None)
        if variable is None:
            names = ", ".join(variable.role for variable in layer.variables)
            raise ValueError(f"mapping has {key!r}, and {layer.path} has {names}")
        name, layout = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
        if not isinstance(name, str) or name not in tensors:
            raise ValueError(f"mapping[{key!r}] is {target!r}, and the model has no parameter of that name")
        shape, goal = variable.value.shape, tuple(tensors[name].shape)
        if layout is None:
            layout = Layout(tuple(range(len(shape))))
        elif not isinstance(layout, Layout):
            layout = Layout(tuple(layout))
        if layout.result(shape) != goal:
            raise ValueError(
                f"mapping[{key!r}]: {role} of shape {shape} would be {layout.result(shape)}, and {name} is {goal}"
            )
        return WeightTransfer(layer, variable, name, tensors[name], layout)

    # ---- What follows ----

    def _options(self, layer: Layer, torch_layer: TorchLayer) -> list[Interpretation]:
        key = (id(layer), id(torch_layer))
        if key not in self._fits:
            alike = (_signature_of_layer(layer), _signature_of_torch_layer(torch_layer))
            if alike not in self._by_signature:
                self._by_signature[alike] = _fitting(layer, torch_layer)
            self._fits[key], self._reasons[key] = self._by_signature[alike]
        return self._fits[key]

    def _take(self, layer: Layer, torch_layer: TorchLayer, why: str) -> None:
        options = self._options(layer, torch_layer)
        if not options:
            reason = self._reasons[id(layer), id(torch_layer)]
            raise KerasFileError(
                f"{why}: {layer.path} does not fit {torch_layer.path}: {reason}\n  {layer}\n  {torch_layer}"
            )
        if len(options) > 1:
            kinds = " or ".join(interpretation.kind for interpretation in options)
            raise KerasFileError(
                f"{layer.path} may be a {kinds}, and the file does not say which. Pass config=model.to_json()"
            )
        interpretation = options[0]
        try:
            inputs, outputs = self._flattening.of(layer, torch_layer)
            found = placed(interpretation, torch_layer.module, torch_layer.tensors, inputs, outputs)
        except LayoutMismatch as error:
            raise KerasFileError(f"{layer.path} → {torch_layer.path}: {error}") from error
        by_role = {variable.role: variable for variable in layer.variables}
        used: set[str] = set()
        for placement in found:
            self._match.transfers.append(
                WeightTransfer(
                    layer,
                    by_role[interpretation.roles[placement.role]],
                    torch_layer.names[placement.param],
                    torch_layer.tensors[placement.param],
                    placement.layout,
                    placement.row,
                    placement.first,
                )
            )
            used.add(placement.param)
        for name, tensor in torch_layer.tensors.items():
            if name not in used:
                self._leave(torch_layer, name, tensor)
        self._match.pairs.append((layer, torch_layer))
        self._layers.remove(layer)
        self._torch_layers.remove(torch_layer)

    def _leave(self, torch_layer: TorchLayer, name: str, tensor: Tensor) -> None:
        self._match.neutral.append((torch_layer.names[name], tensor))

    def infer(self, how: str, is_chain: bool) -> None:
        self._layers = [layer for layer in self._layers if self._counts(layer)]
        if self._loose:
            raise KerasFileError(
                f"{self._checkpoint.path}: the model has parameters outside of modules that are known: "
                f"{', '.join(self._loose)}. Give what they correspond to in mapping. " + self._both()
            )
        if how == "order":
            if self._checkpoint.in_order(self._layers) is None:
                self._fail("the file does not hold the order of the layers; pass config=model.to_json()")
            self._by_order("match='order'")
        if how in ("auto", "names"):
            self._by_names(is_all=how == "names")
        if how == "auto":
            self._by_shapes()
            model = self._checkpoint.model
            if is_chain and model is not None and model.is_chain:
                self._by_order("in order")
        if self._layers or self._torch_layers:
            self._fail()

    def _counts(self, layer: Layer) -> bool:
        """Whether a layer must be matched: one without state and of a class without weights to train need not be."""
        return bool(interpretations(layer)) or any(variable.has_state for variable in layer.variables)

    def _by_order(self, why: str) -> None:
        layers, torch_layers = self._checkpoint.in_order(self._layers) or [], list(self._torch_layers)
        if len(layers) != len(torch_layers):
            self._fail()
        for layer, torch_layer in zip(layers, torch_layers, strict=True):
            if not self._options(layer, torch_layer):
                self._fail(
                    f"{why}, {layer.path} would be {torch_layer.path}: {self._reasons[id(layer), id(torch_layer)]}"
                )
        for layer, torch_layer in zip(layers, torch_layers, strict=True):
            self._take(layer, torch_layer, why)

    def _by_names(self, is_all: bool) -> None:
        """Takes names where they decide between modules that fit equally well, and all layers that compete have one."""
        for layers, torch_layers in list(self._groups()):
            by_name = _by_name(layers, torch_layers)
            if by_name is not None and all(self._options(layer, torch_layer) for layer, torch_layer in by_name):
                for layer, torch_layer in by_name:
                    self._take(layer, torch_layer, "by name")
        if is_all and (self._layers or self._torch_layers):
            self._fail("by match='names', some names differ")

    def _groups(self) -> Iterator[tuple[list[Layer], list[TorchLayer]]]:
        """Layers and modules that compete with each other: the connected parts of the graph of what fits."""
        left_layers, left_modules = list(self._layers), list(self._torch_layers)
        while left_layers:
            layers, torch_layers = [left_layers.pop(0)], []
            grown = True
            while grown:
                grown = False
                for torch_layer in list(left_modules):
                    if any(self._options(layer, torch_layer) for layer in layers):
                        torch_layers.append(torch_layer)
                        left_modules.remove(torch_layer)
                for layer in list(left_layers):
                    if any(self._options(layer, torch_layer) for torch_layer in torch_layers):
                        layers.append(layer)
                        left_layers.remove(layer)
                        grown = True
            yield layers, torch_layers

    def _by_shapes(self) -> None:
        """Takes what has one possibility. Nothing else fits such a module, so that no other layer gets one by that."""
        for layer in list(self._layers):
            options = [torch_layer for torch_layer in self._torch_layers if self._options(layer, torch_layer)]
            rivals = [other for other in self._layers if options and self._options(other, options[0])]
            if len(options) == 1 and len(rivals) == 1 and len(self._options(layer, options[0])) == 1:
                self._take(layer, options[0], "by shape")

    def result(self) -> Match:
        return self._match

    # ---- Errors ----

    def _both(self) -> str:
        return f"{_listed('Keras has', self._checkpoint.layers)}\n{_listed('PyTorch has', self._all_torch_layers)}"

    def _fail(self, reason: str = "") -> None:
        lines = [f"{self._checkpoint.path}: which layer is which module cannot be told"]
        if reason:
            lines[0] += f": {reason}"
        if self._match.pairs and not reason:
            pairs = ", ".join(f"{layer.path} → {torch_layer.path}" for layer, torch_layer in self._match.pairs)
            lines.append(f"Found: {pairs}")
        lines += [_listed("Left of Keras", self._layers), _listed("Left of PyTorch", self._torch_layers)]
        for layer in self._layers:
            fitting = [torch_layer.path for torch_layer in self._torch_layers if self._options(layer, torch_layer)]
            if not fitting:
                nearest = [
                    self._reasons[id(layer), id(torch_layer)]
                    for torch_layer in self._torch_layers
                    if _is_akin(layer, torch_layer)
                ]
                detail = nearest[0] if nearest else "there is no module of its kind left"
                lines.append(f"{layer.path} fits none of them: {detail}")
            else:
                lines.append(f"{layer.path} may be {' or '.join(fitting)}")
        lines.append(
            "Give them in mapping={'layer': 'module'}; or pass match='order' if the modules are defined in the order "
            "of the layers"
        )
        raise KerasFileError("\n".join(lines))


def _signature_of_layer(layer: Layer) -> Any:
    """The same for layers that fit the same modules."""
    inner = layer.config.get("layer")
    inner_class = str(inner.get("class_name")) if isinstance(inner, dict) else ""
    return layer.class_name, inner_class, tuple((v.role, v.value.shape) for v in layer.variables)


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


def _is_akin(layer: Layer, torch_layer: TorchLayer) -> bool:
    return any(interpretation.kind in kinds_of(torch_layer.module) for interpretation in interpretations(layer))


def _listed(title: str, items: Sequence[Any]) -> str:
    return f"{title}:" + "".join(f"\n  {item}" for item in items) if items else f"{title}: nothing"


def _by_name(layers: list[Layer], torch_layers: list[TorchLayer]) -> list[tuple[Layer, TorchLayer]] | None:
    """The pairs of the same name, if all have one: whole paths, or else their last parts."""
    if len(layers) != len(torch_layers):
        return None
    for layer_key, module_key in ((_whole, _whole), (_last, _last)):
        by_layer = {layer_key(layer.path): layer for layer in layers}
        by_module = {module_key(torch_layer.path): torch_layer for torch_layer in torch_layers}
        if len(by_layer) == len(layers) and by_layer.keys() == by_module.keys():
            return [(layer, by_module[key]) for key, layer in by_layer.items()]
    return None


def _whole(path: str) -> str:
    return re.sub(r"^(module|_orig_mod)\.", "", path).replace(".", "/")


def _last(path: str) -> str:
    return _whole(path).rpartition("/")[2]


def canonical(layer: Layer, flattening: Flattening) -> list[WeightPlacement]:
    """Where the weights of a layer would go in the one kind of module that it can be.

    Raises:
        LayoutMismatch: there is no such kind, or the order of its features cannot be told.
    """
    found = interpretations(layer)
    kinds = {interpretation.kind for interpretation in found}
    # What the file does not tell apart has the same layout in these.
    if len(found) != 1 and kinds not in ({"layer_norm", "group_norm"}, {"conv", "conv_transpose"}):
        raise LayoutMismatch("no module of PyTorch is known for it")
    placements = ordered_placements(found[0], False, *flattening.of(layer))
    if found[0].kind in GATES:
        placements = [
            placement._replace(param=re.sub(r"(_[ih]h)", r"\1_l0", placement.param)) for placement in placements
        ]
    return [placement._replace(role=found[0].roles[placement.role]) for placement in placements]
