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
from torch.nn.parameter import is_lazy

from torch_adadelta.keras.axes import Axes, Flat
from torch_adadelta.keras.checkpoints import Checkpoint, Layer, Variable, damage_named
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.layouts import (
    ALL_MODULES,
    GATES,
    KEEP_ORDER,
    FeatureOrder,
    Form,
    Layout,
    Piece,
    Unfit,
    forms,
    kinds_of,
    of_maps,
    ordered_pieces,
    pieces,
    placed,
)

MATCHES: Final = ("auto", "names", "order")


@dataclass
class Unit:
    """A module of PyTorch with parameters of its own; of a recurrent module with several layers, one of them."""

    path: str
    module: nn.Module
    tensors: dict[str, Tensor]  # by the names that `layouts` uses
    names: dict[str, str]  # from those to the names in the model
    is_flattened: bool = False  # whether an nn.Flatten of feature maps comes before it in its nn.Sequential
    is_unflattened: bool = False  # whether an nn.Unflatten comes behind it

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.path or '(the model)'} ({type(self.module).__name__}): {shapes}"


class Move(NamedTuple):
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
    """All moves, and what is left over on the side of PyTorch."""

    moves: list[Move]
    neutral: list[tuple[str, Tensor]] = field(default_factory=list)  # parameters that Keras does not have
    pairs: list[tuple[Layer, Unit]] = field(default_factory=list)


# ---- The side of PyTorch --------------------------------------------------------------------------------------------


def units(model: nn.Module) -> tuple[list[Unit], dict[str, Tensor]]:
    """The modules with parameters, in their order, and the parameters that are in none of a known class.

    A parameter that several modules share belongs to the first.
    """
    found: list[Unit] = []
    seen: set[int] = set()
    loose: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention), remove_duplicate=False))
        if isinstance(module, ALL_MODULES) and not hasattr(module, "parametrizations"):
            buffers = dict(module.named_buffers(recurse=False))
            buffers.pop("num_batches_tracked", None)
            own |= buffers
            for unit in _split_layers(path, module, own):
                if not all(id(tensor) in seen for tensor in unit.tensors.values()):
                    found.append(unit)
                seen |= set(map(id, unit.tensors.values()))
        else:
            for name, tensor in own.items():
                if id(tensor) not in seen:
                    loose[_joined(path, name)] = tensor
                    seen.add(id(tensor))
    _mark_flattened(model, found)
    return found, loose


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _split_layers(path: str, module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[Unit]:
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ValueError(f"{_joined(path, name)} is not initialised yet; run the model on a batch first")
    if not isinstance(module, nn.RNNBase):
        yield Unit(path, module, tensors, {name: _joined(path, name) for name in tensors})
        return
    if module.proj_size:
        raise ValueError(f"{path} has proj_size={module.proj_size}, which no layer of Keras has")
    for layer in range(module.num_layers):
        names = {re.sub(r"_l\d+", "", name): name for name in tensors if re.search(rf"_l{layer}(_reverse)?$", name)}
        label = path if module.num_layers == 1 else f"{path}[{layer}]"
        yield Unit(
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


def is_chain(model: nn.Module) -> bool:
    """Whether the order of the modules is known to be that of computation."""
    steps = list(_steps(model, ""))
    return all(isinstance(module, ALL_MODULES) or not any(True for _ in module.parameters()) for _, module in steps)


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


def _mark_flattened(model: nn.Module, found: list[Unit]) -> None:
    """Marks the units of which an ``nn.Sequential`` shows that their features are flattened maps, or become some."""
    by_path = {unit.path: unit for unit in found}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        state = ""  # what comes next: "maps", "flat" for maps in a row, "features", "split" by Unflatten; "" if unknown
        before: list[Unit] = []  # that gave, or scaled, the features that come next
        for step, inner in _steps(module, path):
            unit = by_path.get(step)
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
                if unit is not None:
                    unit.is_flattened = unit.is_flattened or state == "flat"
                state, before = "features", [unit] if unit is not None else []
            elif (
                isinstance(inner, nn.BatchNorm1d | nn.LayerNorm) and state in ("flat", "features") and unit is not None
            ):
                unit.is_flattened = unit.is_flattened or state == "flat"
                before.append(unit)
            elif not _is_elementwise(inner):
                state, before = "", []


# ---- Feature maps that are flattened --------------------------------------------------------------------------------

FLATTEN: Final = ("channels_first", "channels_last")

# The kinds of layers that take or give features that may be flattened maps, and those that make maps.
_TAKING: Final = ("dense", "layer_norm", "rms_norm", "lstm", "gru", "rnn", "attention")
_CONVOLUTIONS: Final = ("conv", "conv_transpose", "depthwise")

Word = str | int | None


class Flattening:
    """What the user says, and the modules show, of the order of flattened maps.

    Args:
        checkpoint: the side of Keras.
        given: "channels_first" or "channels_last"; or by the paths of layers one of these, or the number of channels of
            the maps that are flattened into its inputs, or a pair of either for its inputs and its outputs.
        has_maps: whether the model of PyTorch has modules for maps.

    Raises:
        ValueError: that is none of these, or no such layer is in the file.
        KerasFileError: the file says otherwise.
    """

    def __init__(self, checkpoint: Checkpoint, given: str | Mapping[str, Any] | None, has_maps: bool = False) -> None:
        model = checkpoint.model
        self._is_known = model is not None and model.is_complete
        self._inputs: dict[str, Flat] = {}
        self._outputs: dict[str, Flat] = {}
        if model is not None and self._is_known:
            with damage_named(checkpoint.path):
                axes = Axes(model, checkpoint.layers)
                self._inputs, self._outputs = axes.inputs(), axes.outputs()
        self._maps = _channels_of_maps(checkpoint.layers)
        self._has_maps = has_maps or bool(self._maps[0])
        self._word = given if isinstance(given, str) else None
        self._words: dict[str, tuple[Word, Word]] = {}
        if isinstance(given, Mapping):
            self._words = {path: self._checked(path, value, checkpoint) for path, value in given.items()}
        elif given is not None and given not in FLATTEN:
            raise ValueError(f"flatten must be {' or '.join(map(repr, FLATTEN))}, or a dictionary, got {given!r}")

    def _checked(self, path: Any, value: Any, checkpoint: Checkpoint) -> tuple[Word, Word]:
        paths = [layer.path for layer in checkpoint.layers]
        if path not in paths:
            raise ValueError(f"flatten has {path!r}, which is no layer with weights; there are {', '.join(paths)}")
        words = tuple(value) if isinstance(value, list | tuple) else (value, value if value in FLATTEN else None)
        if len(words) != 2 or not all(word is None or word in FLATTEN or _is_count(word) for word in words):
            raise ValueError(
                f"flatten[{path!r}] must be {' or '.join(map(repr, FLATTEN))}, a number of channels, or a pair of "
                f"these for inputs and outputs; got {value!r}"
            )
        for word, flats, candidates, side in zip(
            words, (self._inputs, self._outputs), self._maps, ("takes", "gives"), strict=True
        ):
            if not _is_count(word):
                continue
            flat = flats.get(path)
            if self._is_known and flat is None:
                raise KerasFileError(
                    f"{checkpoint.path}: flatten has {path!r}, and by the configuration it {side} no features that are "
                    "maps in one row"
                )
            counts = sorted(candidates) if flat is None else sorted(flat.by_channels) or [flat.channels]
            if counts not in ([], [-1]) and word not in counts:
                shape = checkpoint.layers[paths.index(path)].variables[0].value.shape
                source = f"a {flat.why} has" if flat else "the convolutions in the file have"
                raise KerasFileError(
                    f"{checkpoint.path}: {path}: {shape[-1 if side == 'gives' else 0]} features are no maps of {word} "
                    f"channels: {source} {' or '.join(map(str, counts))}. If it is none of these, give the layer in "
                    "mapping, its weights each with a Layout"
                )
        return words

    def of(self, layer: Layer, unit: Unit | None = None) -> tuple[FeatureOrder, FeatureOrder]:
        """How the features that a layer takes, and those that it gives, are ordered anew.

        Args:
            layer: the layer.
            unit: its module, if there is one.

        Raises:
            Unfit: that cannot be told.
        """
        words = self._words.get(layer.path, (self._word, self._word))
        if not self._is_known:
            return self._unknown(layer, unit, words)
        is_batch = unit is not None and isinstance(unit.module, nn.BatchNorm2d | nn.BatchNorm3d)
        found = []
        for flats, word in zip((self._inputs, self._outputs), words, strict=True):
            flat = flats.get(layer.path)
            if flat is None or (is_batch and flat.channels < 0):  # whose features are no flattened maps
                found.append(KEEP_ORDER)
            else:
                is_shown = unit is not None and (unit.is_unflattened if flat.is_split else unit.is_flattened)
                found.append(_ordered(layer, flat, word, is_shown))
        return found[0], found[1]

    def _unknown(self, layer: Layer, unit: Unit | None, words: tuple[Word, Word]) -> tuple[FeatureOrder, FeatureOrder]:
        """The same where the file does not say what the layers do."""
        if self._words or self._word == "channels_last":
            first, second = (of_maps(word) if isinstance(word, int) else KEEP_ORDER for word in words)
            if "channels_first" in words:
                raise Unfit("the file does not say how many channels flattened maps have here; give their number")
            return first, second
        kinds = kinds_of(unit.module) if unit else [form.kind for form in forms(layer)]
        is_vector = isinstance(unit.module, nn.BatchNorm1d) if unit else False
        if self._has_maps and (is_vector or not set(kinds).isdisjoint(_TAKING)):
            raise Unfit(
                "the file does not say whether flattened feature maps come in here, which PyTorch flattens in another "
                "order, or go out to a Reshape. Pass config=model.to_json(); or flatten='channels_last' if there are "
                f"none or the model flattens them as Keras does; or flatten={{{layer.path!r}: CHANNELS}} for layers "
                f"behind a flatten, and {{{layer.path!r}: (None, CHANNELS)}} for those before a reshape to maps"
            )
        return KEEP_ORDER, KEEP_ORDER


def _is_count(word: Any) -> bool:
    return isinstance(word, int) and not isinstance(word, bool) and word > 0


def _ordered(layer: Layer, flat: Flat, word: Word, is_shown: bool) -> FeatureOrder:
    what = f"its features are a {flat.why}"
    if isinstance(word, int):
        return flat.by_channels.get(word) or flat.first or of_maps(word)
    if word == "channels_last":
        return flat.last
    if not flat.is_open:
        return KEEP_ORDER
    shown = flat.first if flat.is_split else flat.shown
    if is_shown and shown is not None:
        return shown
    if flat.first is None and flat.by_channels:
        raise Unfit(
            f"{what}, and nothing says which axis has the channels. Pass flatten={{{layer.path!r}: "
            f"{'(None, CHANNELS)' if flat.is_split else 'CHANNELS'}}} if PyTorch has them first, or "
            "flatten='channels_last' if the model keeps the order of Keras"
        )
    if flat.first is None:
        raise Unfit(
            f"{what}, so their order cannot be told. Pass flatten='channels_last' if the model keeps the order of "
            "Keras, or give the layer in mapping, its weights each with a Layout"
        )
    if word == "channels_first":
        return flat.first
    raise Unfit(
        f"{what}, and PyTorch has the channels first. Pass flatten='channels_first' if the model flattens them so, or "
        "flatten='channels_last' if it permutes them to the order of Keras before"
    )


def _channels_of_maps(layers: Sequence[Layer]) -> tuple[set[int], set[int]]:
    """How many channels the maps of the convolutions of a file have, and those that they take."""
    given, taken = set(), set()
    for form in (form for layer in layers for form in forms(layer) if form.kind in _CONVOLUTIONS):
        *_, inputs, outputs = form.shapes["kernel"]
        if form.kind == "conv_transpose":
            inputs, outputs = outputs, inputs
        given.add(inputs * outputs if form.kind == "depthwise" else outputs)
        taken.add(inputs)
    return given | taken, taken


# ---- Matching -------------------------------------------------------------------------------------------------------

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
    found, loose = units(model)
    state = _Matching(checkpoint, found, loose, Flattening(checkpoint, flatten, has_maps(model)))
    state.explicit(dict(mapping or {}), dict(model.named_parameters()) | dict(model.named_buffers()))
    state.infer(how, is_chain(model))
    return state.result()


class _Matching:
    def __init__(
        self, checkpoint: Checkpoint, found: list[Unit], loose: dict[str, Tensor], flattening: Flattening
    ) -> None:
        self._checkpoint = checkpoint
        self._all_units = found
        self._layers = list(checkpoint.layers)
        self._units = list(found)
        self._loose = loose
        self._flattening = flattening
        self._match = Match([])
        self._fits: dict[tuple[int, int], list[Form]] = {}
        self._by_signature: dict[Any, tuple[list[Form], str]] = {}
        self._reasons: dict[tuple[int, int], str] = {}

    # ---- What the user says ----

    def explicit(self, mapping: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        layers = {layer.path: layer for layer in self._layers}
        by_unit = {unit.path: unit for unit in self._units}
        taken_roles: dict[str, set[str]] = {}
        taken_params: set[int] = set()
        for key, target in mapping.items():
            if key in layers and target is None:
                self._layers.remove(layers[key])
            elif key in layers and isinstance(target, str) and target in by_unit:
                self._take(layers[key], by_unit[target], f"mapping[{key!r}]")
            elif key in layers:
                raise ValueError(f"mapping[{key!r}] is {target!r}, which is no module with parameters. " + self._both())
            else:
                path, _, role = key.rpartition("/")
                while path and path not in layers:
                    path, _, before = path.rpartition("/")
                    role = f"{before}/{role}"
                if path not in layers:
                    raise ValueError(f"mapping has {key!r}, which is no layer and no weight. " + self._both())
                move = self._explicit_move(key, layers[path], role, target, tensors)
                self._match.moves.append(move)
                taken_roles.setdefault(path, set()).add(role)
                taken_params.add(id(move.tensor))
        for path, roles in taken_roles.items():
            missing = {variable.role for variable in layers[path].variables} - roles
            if missing:
                raise ValueError(f"mapping has some weights of {path}, and not {', '.join(sorted(missing))}")
            self._layers.remove(layers[path])
        for unit in list(self._units):
            inside = [id(tensor) in taken_params for tensor in unit.tensors.values()]
            if any(inside):
                self._units.remove(unit)
                for name, tensor in unit.tensors.items():
                    if id(tensor) not in taken_params:
                        self._leave(unit, name, tensor)
        self._loose = {name: tensor for name, tensor in self._loose.items() if id(tensor) not in taken_params}

    def _explicit_move(self, key: str, layer: Layer, role: str, target: Any, tensors: dict[str, Tensor]) -> Move:
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
        return Move(layer, variable, name, tensors[name], layout)

    # ---- What follows ----

    def _options(self, layer: Layer, unit: Unit) -> list[Form]:
        key = (id(layer), id(unit))
        if key not in self._fits:
            alike = (_signature_of_layer(layer), _signature_of_unit(unit))
            if alike not in self._by_signature:
                self._by_signature[alike] = _fitting(layer, unit)
            self._fits[key], self._reasons[key] = self._by_signature[alike]
        return self._fits[key]

    def _take(self, layer: Layer, unit: Unit, why: str) -> None:
        options = self._options(layer, unit)
        if not options:
            reason = self._reasons[id(layer), id(unit)]
            raise KerasFileError(f"{why}: {layer.path} does not fit {unit.path}: {reason}\n  {layer}\n  {unit}")
        if len(options) > 1:
            kinds = " or ".join(form.kind for form in options)
            raise KerasFileError(
                f"{layer.path} may be a {kinds}, and the file does not say which. Pass config=model.to_json()"
            )
        form = options[0]
        try:
            inputs, outputs = self._flattening.of(layer, unit)
            found = placed(form, unit.module, unit.tensors, inputs, outputs)
        except Unfit as error:
            raise KerasFileError(f"{layer.path} → {unit.path}: {error}") from error
        by_role = {variable.role: variable for variable in layer.variables}
        used: set[str] = set()
        for piece in found:
            self._match.moves.append(
                Move(
                    layer,
                    by_role[form.roles[piece.role]],
                    unit.names[piece.param],
                    unit.tensors[piece.param],
                    piece.layout,
                    piece.row,
                    piece.first,
                )
            )
            used.add(piece.param)
        for name, tensor in unit.tensors.items():
            if name not in used:
                self._leave(unit, name, tensor)
        self._match.pairs.append((layer, unit))
        self._layers.remove(layer)
        self._units.remove(unit)

    def _leave(self, unit: Unit, name: str, tensor: Tensor) -> None:
        self._match.neutral.append((unit.names[name], tensor))

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
        if self._layers or self._units:
            self._fail()

    def _counts(self, layer: Layer) -> bool:
        """Whether a layer must be matched: one without state and of a class without weights to train need not be."""
        return bool(forms(layer)) or any(variable.has_state for variable in layer.variables)

    def _by_order(self, why: str) -> None:
        layers, units = self._checkpoint.in_order(self._layers) or [], list(self._units)
        if len(layers) != len(units):
            self._fail()
        for layer, unit in zip(layers, units, strict=True):
            if not self._options(layer, unit):
                self._fail(f"{why}, {layer.path} would be {unit.path}: {self._reasons[id(layer), id(unit)]}")
        for layer, unit in zip(layers, units, strict=True):
            self._take(layer, unit, why)

    def _by_names(self, is_all: bool) -> None:
        """Takes names where they decide between modules that fit equally well, and all layers that compete have one."""
        for layers, units in list(self._groups()):
            by_name = _by_name(layers, units)
            if by_name is not None and all(self._options(layer, unit) for layer, unit in by_name):
                for layer, unit in by_name:
                    self._take(layer, unit, "by name")
        if is_all and (self._layers or self._units):
            self._fail("by match='names', some names differ")

    def _groups(self) -> Iterator[tuple[list[Layer], list[Unit]]]:
        """Layers and modules that compete with each other: the connected parts of the graph of what fits."""
        left_layers, left_units = list(self._layers), list(self._units)
        while left_layers:
            layers, units = [left_layers.pop(0)], []
            grown = True
            while grown:
                grown = False
                for unit in list(left_units):
                    if any(self._options(layer, unit) for layer in layers):
                        units.append(unit)
                        left_units.remove(unit)
                for layer in list(left_layers):
                    if any(self._options(layer, unit) for unit in units):
                        layers.append(layer)
                        left_layers.remove(layer)
                        grown = True
            yield layers, units

    def _by_shapes(self) -> None:
        """Takes what has one possibility. Nothing else fits such a module, so that no other layer gets one by that."""
        for layer in list(self._layers):
            options = [unit for unit in self._units if self._options(layer, unit)]
            rivals = [other for other in self._layers if options and self._options(other, options[0])]
            if len(options) == 1 and len(rivals) == 1 and len(self._options(layer, options[0])) == 1:
                self._take(layer, options[0], "by shape")

    def result(self) -> Match:
        return self._match

    # ---- Errors ----

    def _both(self) -> str:
        return f"{_listed('Keras has', self._checkpoint.layers)}\n{_listed('PyTorch has', self._all_units)}"

    def _fail(self, reason: str = "") -> None:
        lines = [f"{self._checkpoint.path}: which layer is which module cannot be told"]
        if reason:
            lines[0] += f": {reason}"
        if self._match.pairs and not reason:
            pairs = ", ".join(f"{layer.path} → {unit.path}" for layer, unit in self._match.pairs)
            lines.append(f"Found: {pairs}")
        lines += [_listed("Left of Keras", self._layers), _listed("Left of PyTorch", self._units)]
        for layer in self._layers:
            fitting = [unit.path for unit in self._units if self._options(layer, unit)]
            if not fitting:
                nearest = [self._reasons[id(layer), id(unit)] for unit in self._units if _is_akin(layer, unit)]
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


def _signature_of_unit(unit: Unit) -> Any:
    """The same for modules that the same layers fit."""
    own = [getattr(unit.module, name, None) for name in ("groups", "num_heads")]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in unit.tensors.items())
    return type(unit.module), *own, getattr(unit.module, "bias_k", None) is None, shapes


def _fitting(layer: Layer, unit: Unit) -> tuple[list[Form], str]:
    """The ways to understand a layer in which it fits a module, and why it does not in the others."""
    found: list[Form] = []
    reasons = []
    for form in forms(layer):
        try:
            placed(form, unit.module, unit.tensors)
        except Unfit as error:
            reasons.append(str(error))
        else:
            if not any(_are_same(pieces(form), pieces(other), layer) for other in found):
                found.append(form)
    return found, "; ".join(dict.fromkeys(reasons)) or "no module of PyTorch is known for it"


def _are_same(ours: list[Piece], theirs: list[Piece], layer: Layer) -> bool:
    """Whether two ways to understand a layer move every element to the same place."""
    if [(piece.param, piece.row, piece.first) for piece in ours] != [(p.param, p.row, p.first) for p in theirs]:
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


def _is_akin(layer: Layer, unit: Unit) -> bool:
    return any(form.kind in kinds_of(unit.module) for form in forms(layer))


def _listed(title: str, items: Sequence[Any]) -> str:
    return f"{title}:" + "".join(f"\n  {item}" for item in items) if items else f"{title}: nothing"


def _by_name(layers: list[Layer], units: list[Unit]) -> list[tuple[Layer, Unit]] | None:
    """The pairs of the same name, if all have one: whole paths, or else their last parts."""
    if len(layers) != len(units):
        return None
    for layer_key, unit_key in ((_whole, _whole), (_last, _last)):
        by_layer = {layer_key(layer.path): layer for layer in layers}
        by_unit = {unit_key(unit.path): unit for unit in units}
        if len(by_layer) == len(layers) and by_layer.keys() == by_unit.keys():
            return [(layer, by_unit[key]) for key, layer in by_layer.items()]
    return None


def _whole(path: str) -> str:
    return re.sub(r"^(module|_orig_mod)\.", "", path).replace(".", "/")


def _last(path: str) -> str:
    return _whole(path).rpartition("/")[2]


def canonical(layer: Layer, flattening: Flattening) -> list[Piece]:
    """Where the weights of a layer would go in the one kind of module that it can be.

    Raises:
        Unfit: there is no such kind, or the order of its features cannot be told.
    """
    found = forms(layer)
    kinds = {form.kind for form in found}
    # What the file does not tell apart has the same layout in these.
    if len(found) != 1 and kinds not in ({"layer_norm", "group_norm"}, {"conv", "conv_transpose"}):
        raise Unfit("no module of PyTorch is known for it")
    moves = ordered_pieces(found[0], False, *flattening.of(layer))
    if found[0].kind in GATES:
        moves = [piece._replace(param=re.sub(r"(_[ih]h)", r"\1_l0", piece.param)) for piece in moves]
    return [piece._replace(role=found[0].roles[piece.role]) for piece in moves]
