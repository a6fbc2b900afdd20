"""Finds out which layer of Keras is which module of PyTorch.

A layer and a module fit if the one can become the other: their kind, and the shapes of all weights. A pair that is in
every assignment of all layers that compete to all modules that do is taken. Between others names decide if they agree
on both sides, or the order if it is that of computation on both sides. Otherwise nothing is taken, and the error lists
both sides.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

from torch import nn

from torch_adadelta.keras.assignment import certain_pairs, components
from torch_adadelta.keras.computation import Computation, run_in_order
from torch_adadelta.keras.contents import Checkpoint
from torch_adadelta.keras.correspondence import Match, WeightTransfer, overlap
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.fits import Fits
from torch_adadelta.keras.flattening import Flattening, UnknownOrder
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.layouts import (
    GATES,
    KEEP_ORDER,
    Interpretation,
    LayoutMismatch,
    WeightPlacement,
    interpretations,
    is_split,
    kinds_of,
    ordered_placements,
    placed,
    runs_over_inputs,
    same,
    shape_of,
)
from torch_adadelta.keras.mapping import Part, UserMapping
from torch_adadelta.keras.modules import TorchLayer, has_maps, torch_layers_of

MATCHES: Final = ("auto", "names", "order", "order_within_kind")


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
        mapping: what is not to be inferred: from the path of a layer, or of what has layers in it, to that of a module;
            or from the path of a weight ("dense/kernel") to the name of a parameter, perhaps with rows
            ("attention.in_proj_weight[0:16]"), or to a tuple of that and a permutation or a `Layout`. None leaves out.
        how: "auto", "names", "order" or "order_within_kind".
        flatten: as for `Flattening`.

    Raises:
        KerasFileError: no match, or several, with a list of both sides.
        ValueError: an argument is wrong.
    """
    if how not in MATCHES:
        raise ValueError(f"match must be one of {', '.join(MATCHES)}, got {how!r}")
    found, loose = torch_layers_of(model)
    matching = _Matching(checkpoint, model, found, Flattening(checkpoint, flatten, has_maps(model)))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    given = UserMapping(mapping or {}, checkpoint.layers, found, tensors, matching.both)
    layers, torch_layers = matching.explicit(given.transfers)
    taken = {id(transfer.tensor) for transfer in given.transfers}
    left = [name for name, tensor in loose.items() if id(tensor) not in taken]
    if left:
        raise KerasFileError(
            f"{checkpoint.path}: the model has parameters outside of modules that are known: {', '.join(left)}. Give "
            "what they correspond to in mapping. " + matching.both()
        )
    for part in given.parts(layers, torch_layers):
        matching.infer(part, how)
    matching.result.check_parts()
    return matching.result


class _Matching:
    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, torch_layers: list[TorchLayer], flattening: Flattening
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._torch_layers = torch_layers
        self._flattening = flattening
        self._fits = Fits(checkpoint.layers, torch_layers)
        self.result = Match([])

    # ---- Weights that the user gives ----

    def explicit(self, transfers: list[WeightTransfer]) -> tuple[list[Layer], list[TorchLayer]]:
        """Takes weights that are given, and what follows for the others of their layers; returns what is left."""
        self.result.transfers += transfers
        given: dict[int, list[WeightTransfer]] = {}
        for transfer in transfers:
            given.setdefault(id(transfer.layer), []).append(transfer)
        for own in given.values():
            self._complete(own[0].layer, own)
        taken = {id(transfer.tensor) for transfer in self.result.transfers}
        left = []
        for torch_layer in self._torch_layers:
            if any(id(tensor) in taken for tensor in torch_layer.tensors.values()):
                self._leave(torch_layer, [n for n, tensor in torch_layer.tensors.items() if id(tensor) not in taken])
            else:
                left.append(torch_layer)
        return [layer for layer in self._checkpoint.layers if id(layer) not in given], left

    def _complete(self, layer: Layer, given: list[WeightTransfer]) -> None:
        """Finds where the other weights of a layer go in the modules that some of them are given to."""
        roles = {transfer.variable.role for transfer in given}
        missing = [variable.role for variable in layer.variables if variable.role not in roles]
        if not missing:
            return
        tensors = {id(transfer.tensor) for transfer in given}
        found: list[list[WeightTransfer]] = []
        reasons = []
        for torch_layer in self._torch_layers:
            if tensors.isdisjoint(map(id, torch_layer.tensors.values())):
                continue
            for interpretation in interpretations(layer):
                try:
                    transfers = self._rest(layer, torch_layer, interpretation, missing)
                except LayoutMismatch as error:
                    reasons.append(str(error))
                    continue
                if transfers not in found:
                    found.append(transfers)
        if len(found) != 1:
            why = reasons[0] if reasons and not found else "where they go cannot be told"
            raise ValueError(
                f"mapping has some weights of {layer.path}, and not {', '.join(sorted(missing))}: {why}. Give them, too"
            )
        self.result.transfers += found[0]

    def _rest(
        self, layer: Layer, torch_layer: TorchLayer, interpretation: Interpretation, missing: list[str]
    ) -> list[WeightTransfer]:
        """Where some weights of a layer go in a module."""
        understood = {role for role, name in interpretation.roles.items() if name in missing}
        is_ordered = any(runs_over_inputs(interpretation.kind, role) for role in understood)
        inputs, outputs = self._flattening.of(layer, torch_layer, is_ordered)
        placements = [
            placement
            for placement in ordered_placements(interpretation, is_split(torch_layer.module), inputs, outputs)
            if placement.role in understood
        ]
        transfers = []
        for placement in placements:
            if placement.param not in torch_layer.tensors:
                raise LayoutMismatch(f"{torch_layer.path} has no {placement.param} for {placement.role}")
            transfer = _transfer(layer, torch_layer, interpretation, placement)
            goal = list(transfer.tensor.shape)
            shape = list(placement.layout.result(shape_of(transfer.variable.value.shape, placement.row)))
            if placement.first is not None:
                goal[0] = min(shape[0], goal[0] - placement.first)
            if shape != goal:
                raise LayoutMismatch(
                    f"{placement.role} would be {tuple(shape)}, and {transfer.name} is {tuple(transfer.tensor.shape)}"
                )
            others = [other.rows for other in self.result.transfers if other.tensor is transfer.tensor]
            if overlap(transfer.rows, others):
                raise LayoutMismatch(f"{placement.role} would go to {transfer.part}, which mapping has already")
            transfers.append(transfer)
        return transfers

    # ---- What follows ----

    def _take(self, part: Part, layer: Layer, torch_layer: TorchLayer, why: str) -> None:
        options = self._fits.options(layer, torch_layer)
        if not options:
            reason = self._fits.reason(layer, torch_layer)
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
            example = _example(layer, torch_layer, interpretation, error) if isinstance(error, UnknownOrder) else ""
            raise KerasFileError(f"{layer.path} → {torch_layer.path}: {error}{example}") from error
        self.result.transfers += [_transfer(layer, torch_layer, interpretation, placement) for placement in found]
        used = {placement.param for placement in found}
        self._leave(torch_layer, [name for name in torch_layer.tensors if name not in used])
        self.result.pairs.append((layer, torch_layer))
        part.layers.remove(layer)
        part.torch_layers.remove(torch_layer)

    def _leave(self, torch_layer: TorchLayer, names: list[str]) -> None:
        self.result.neutral += [(torch_layer.names[name], torch_layer.tensors[name]) for name in names]

    def infer(self, part: Part, how: str) -> None:
        """Finds the counterpart of each layer and module of a part."""
        part.layers = [layer for layer in part.layers if self._counts(layer)]
        if part.key and len(part.layers) == len(part.torch_layers) == 1:
            self._take(part, part.layers[0], part.torch_layers[0], part.why)
        if how == "order":
            self._by_order(part)
        else:
            if how != "names":
                self._by_elimination(part)
            self._by_names(part)
            if how == "auto":
                self._by_computation(part)
            elif how == "order_within_kind":
                self._by_order_within_kind(part)
        if part.layers or part.torch_layers:
            self._fail(part, "by match='names', some names differ" if how == "names" else "")

    def _counts(self, layer: Layer) -> bool:
        """Whether a layer must be matched: one without state and of a class without weights to train need not be."""
        is_trained = any(variable.has_state for variable in layer.variables) or not self._checkpoint.has_state
        return bool(interpretations(layer)) or (is_trained and layer.class_name != "Normalization")

    def _by_order(self, part: Part) -> None:
        layers, torch_layers = self._in_order(part), list(part.torch_layers)
        if len(layers) != len(torch_layers):
            self._fail(part)
        self._take_in_order(part, layers, torch_layers, "match='order'")

    def _in_order(self, part: Part) -> list[Layer]:
        layers = self._checkpoint.in_order(part.layers)
        if layers is None:
            self._fail(part, "the file does not hold the order of the layers; pass config=model.to_json()")
        return layers

    def _take_in_order(self, part: Part, layers: list[Layer], torch_layers: list[TorchLayer], why: str) -> None:
        for layer, torch_layer in zip(layers, torch_layers, strict=True):
            if not self._fits.options(layer, torch_layer):
                reason = self._fits.reason(layer, torch_layer)
                self._fail(part, f"{why}, {layer.path} would be {torch_layer.path}: {reason}")
        for layer, torch_layer in zip(layers, torch_layers, strict=True):
            self._take(part, layer, torch_layer, why)

    def _by_elimination(self, part: Part) -> None:
        """Takes the pairs that are in every possible assignment."""
        layers, torch_layers, fits = self._graph(part)
        for lefts, rights in components(fits, len(torch_layers)):
            places = {right: place for place, right in enumerate(rights)}
            own = [[places[right] for right in fits[left]] for left in lefts]
            sizes = [len(layers[left]) for left in lefts], [len(torch_layers[right]) for right in rights]
            for left, right in certain_pairs(*sizes, own):
                layer, torch_layer = layers[lefts[left]][0], torch_layers[rights[right]][0]
                if len(self._fits.options(layer, torch_layer)) == 1:
                    self._take(part, layer, torch_layer, "by shape")

    def _graph(self, part: Part) -> tuple[list[list[Layer]], list[list[TorchLayer]], list[list[int]]]:
        """Layers and modules by sorts, and for each sort of layers the sorts of modules that they fit."""
        layers, torch_layers = self._fits.sorts(part.layers), self._fits.sorts(part.torch_layers)
        firsts = [(number, same_sort[0]) for number, same_sort in enumerate(torch_layers)]
        return (
            layers,
            torch_layers,
            [
                [number for number, torch_layer in firsts if self._fits.options(same_sort[0], torch_layer)]
                for same_sort in layers
            ],
        )

    def _rivals(self, part: Part) -> Iterator[tuple[list[Layer], list[TorchLayer]]]:
        """The layers and modules that compete with each other, as many of these as of those, each in their order."""
        layers, torch_layers, fits = self._graph(part)
        for lefts, rights in components(fits, len(torch_layers)):
            own = {id(layer) for left in lefts for layer in layers[left]}
            others = {id(torch_layer) for right in rights for torch_layer in torch_layers[right]}
            if len(own) == len(others):
                yield (
                    [layer for layer in part.layers if id(layer) in own],
                    [torch_layer for torch_layer in part.torch_layers if id(torch_layer) in others],
                )

    def _by_names(self, part: Part) -> None:
        """Takes names where they decide between modules that fit equally well, and all layers that compete have one."""
        for layers, torch_layers in self._rivals(part):
            by_name = _by_name(part, layers, torch_layers)
            if by_name is not None and all(self._fits.options(*pair) for pair in by_name):
                for layer, torch_layer in by_name:
                    self._take(part, layer, torch_layer, "by name")

    def _by_computation(self, part: Part) -> None:
        """Takes the order of layers and modules that compete, if they are known to compute in it on both sides."""
        if len(part.layers) != len(part.torch_layers):
            return
        computation = Computation(self._checkpoint, part.layers)
        for layers, torch_layers in self._rivals(part):
            ordered = computation.ordered(layers)
            if ordered is not None and run_in_order(torch_layers, self._model):
                self._take_in_order(part, ordered, torch_layers, "in order")

    def _by_order_within_kind(self, part: Part) -> None:
        for layers, torch_layers in self._rivals(part):
            own = Part(part.key, part.target, layers, torch_layers)
            self._take_in_order(part, self._in_order(own), torch_layers, "match='order_within_kind'")

    # ---- Errors ----

    def both(self) -> str:
        """A list of both sides."""
        return f"{_listed('Keras has', self._checkpoint.layers)}\n{_listed('PyTorch has', self._torch_layers)}"

    def _fail(self, part: Part, reason: str = "") -> NoReturn:
        which = f" by {part.why}, {part.target or 'the model'}," if part.key else ""
        lines = [f"{self._checkpoint.path}: which layer is which module{which} cannot be told"]
        if reason:
            lines[0] += f": {reason}"
        if self.result.pairs and not reason:
            pairs = ", ".join(f"{layer.path} → {torch_layer.path}" for layer, torch_layer in self.result.pairs)
            lines.append(f"Found: {pairs}")
        lines += [_listed("Left of Keras", part.layers), _listed("Left of PyTorch", part.torch_layers)]
        for layer in part.layers:
            fitting = [other.path for other in part.torch_layers if self._fits.options(layer, other)]
            if not fitting:
                nearest = [self._fits.reason(layer, other) for other in part.torch_layers if _is_akin(layer, other)]
                detail = nearest[0] if nearest else "there is no module of its kind left"
                lines.append(f"{layer.path} fits none of them: {detail}")
            else:
                lines.append(f"{layer.path} may be {' or '.join(fitting)}")
        is_known = self._checkpoint.model is not None
        give = "Give" if is_known else "Pass config=model.to_json(), which has their classes and their order; or give"
        lines.append(
            f"{give} them in mapping={{'layer': 'module'}}; or pass match='order' if the modules are defined in the "
            "order of the layers, or match='order_within_kind' if those are that fit the same layers"
        )
        raise KerasFileError("\n".join(lines))


def _transfer(
    layer: Layer, torch_layer: TorchLayer, interpretation: Interpretation, placement: WeightPlacement
) -> WeightTransfer:
    role = interpretation.roles[placement.role]
    return WeightTransfer(
        layer,
        next(variable for variable in layer.variables if variable.role == role),
        torch_layer.names[placement.param],
        torch_layer.tensors[placement.param],
        placement.layout,
        placement.row,
        placement.first,
    )


def _example(layer: Layer, torch_layer: TorchLayer, interpretation: Interpretation, error: UnknownOrder) -> str:
    """The entries of `mapping` for a layer whose features are ordered as the error supposes, as code."""
    try:
        found = placed(interpretation, torch_layer.module, torch_layer.tensors, *error.example)
    except LayoutMismatch:
        return ""
    entries = []
    for placement in found:
        transfer = _transfer(layer, torch_layer, interpretation, placement)
        if transfer.row is None:  # else it is inferred
            is_plain = transfer.layout == same(transfer.variable.value.shape)
            target = repr(transfer.part) if is_plain else f"({transfer.part!r}, {transfer.layout!r})"
            entries.append(f"{transfer.label!r}: {target}")
    what = "in the order of Keras"
    for order, side in zip(error.example, ("takes", "gives"), strict=True):
        if order != KEEP_ORDER:
            what = f"if it {side} maps of {order.view[-1]} channels, which PyTorch has first"
    return f", such as mapping={{{', '.join(entries)}}} {what}"


def _is_akin(layer: Layer, torch_layer: TorchLayer) -> bool:
    return any(interpretation.kind in kinds_of(torch_layer.module) for interpretation in interpretations(layer))


def _listed(title: str, items: Sequence[Any]) -> str:
    return f"{title}:" + "".join(f"\n  {item}" for item in items) if items else f"{title}: nothing"


def _by_name(part: Part, layers: list[Layer], torch_layers: list[TorchLayer]) -> list[tuple[Layer, TorchLayer]] | None:
    """The pairs of the same name, if all have one: whole paths, or else their last parts, or those of attributes.

    Last parts decide nothing where what is before them has the same names on both sides, and contradicts them.
    """
    modules = [part.name_of_module(torch_layer) for torch_layer in torch_layers]
    paths = [part.name_of_layer(layer.path) for layer in layers]
    groups = [part.name_of_layer(layer.group) for layer in layers]  # in a numbered file, the attributes of a subclass
    for key, names in ((str, paths), (_last, paths), (str, groups)):
        by_layer = dict(zip(map(key, names), layers, strict=True))
        by_module = dict(zip(map(key, modules), torch_layers, strict=True))
        if len(by_layer) == len(layers) and by_layer.keys() == by_module.keys():
            pairs = [(layer, by_module[name]) for name, layer in by_layer.items()]
            own = {name: _parent(path) for name, path in zip(map(key, names), names, strict=True)}
            others = {name: _parent(path) for name, path in zip(map(key, modules), modules, strict=True)}
            common = set(own.values()) & set(others.values()) - {""}
            if all(own[name] == others[name] or common.isdisjoint((own[name], others[name])) for name in own):
                return pairs
    return None


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


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
