"""Weights and state that have names, as in ``.h5`` files and TensorFlow checkpoints: a state names its weight."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import BY_SNAKE_CASE, PARTS, is_part, numbered_roles, role_prefix
from torch_adadelta.keras.config import LayerConfig, ModelConfig, wrapped_class
from torch_adadelta.keras.contents import attach
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.layers import ACCUMULATORS, Layer, Variable
from torch_adadelta.step import accumulation, averages


def named_layers(
    names: list[tuple[str | None, str, LazyArray]], model: ModelConfig | None
) -> tuple[list[Layer], dict[str, Variable]]:
    """The layers of weights that have names, and the weights by their names.

    Args:
        names: of each weight the layer of the model that it is in, if that is known, its name, and where it is.
        model: the configuration, if there is one.
    """
    by_name: dict[str, Variable] = {}
    layers: dict[str, Layer] = {}
    leaves: dict[str, list[LayerConfig]] = {}
    for known in model.layers if model else ():
        leaves.setdefault(known.path.rpartition("/")[2], []).append(known)
    roots = {name.partition("/")[0] for _, name, _ in names}
    has_root = len(roots) == 1 and all(name.count("/") > 1 for _, name, _ in names) and model is None
    in_order = _in_order(names, model, leaves) if model else {}
    for top, name, stored in names:
        parts = name.split("/")
        if has_root and top is None:
            parts = parts[1:]
        role, above = parts[-1], parts[:-1]
        scope = _scope(above)
        is_in_order = (top, scope) in in_order
        known_layer, depth = (in_order[top, scope], len(scope) - 1) if is_in_order else _leaf(leaves, top, above)
        if known_layer is not None:
            class_name, config = wrapped_class(known_layer)
            path = known_layer.path
            inside = above[depth + 1 :]
            if class_name in BY_SNAKE_CASE.values():  # but for parts, there are names of the wrapped layer, or old ones
                inside = inside[next((at for at, part in enumerate(inside) if is_part(part)), len(inside)) :]
            prefix = role_prefix(inside)
        else:
            class_name, config = None, {}
            prefix = role_prefix(above[len(scope) :])
            path = "/".join(scope) or "(no layer)"
        layer = layers.setdefault(path, Layer(path, class_name, config))
        variable = Variable("/".join([*prefix, role]), stored)
        if name in by_name or any(other.role == variable.role for other in layer.variables):
            raise KerasFileError(
                f"it holds two weights named {name}; name the layers, and save it again, or save a .weights.h5 file, "
                "which has no need of names"
            )
        by_name[name] = variable
        layer.variables.append(variable)
    return _ungrouped(layers.values()), by_name


def _scope(above: list[str]) -> tuple[str, ...]:
    """What of the names before that of a weight is not the name of a part of a layer."""
    keep = len(above)
    while keep > 1 and is_part(above[keep - 1]):
        keep -= 1
    return tuple(above[:keep])


def _in_order(
    names: list[tuple[str | None, str, LazyArray]], model: ModelConfig, leaves: dict[str, list[LayerConfig]]
) -> dict[tuple[str | None, tuple[str, ...]], LayerConfig]:
    """The layers of submodels whose weights do not have their names, by the order, where the counts and roles fit.

    The group of a submodel has the weights that are trained, layer by layer, and then those that are not. A name of
    TensorFlow 1 may even be that of another layer: "conv_1/kernel" in a layer conv beside which there is a conv_1.
    """
    roles: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for top, name, _ in names:
        *above, role = name.split("/")
        if top is not None:
            roles.setdefault(top, {}).setdefault(_scope(above), []).append(role)
    found: dict[tuple[str | None, tuple[str, ...]], LayerConfig] = {}
    for top, scopes in roles.items():
        inside = [known for known in model.layers if known.path.startswith(f"{top}/")]
        if not inside or _are_named(top, scopes, leaves):
            continue
        having = [known for known in inside if wrapped_class(known)[0] in BY_SNAKE_CASE.values()]
        having.sort(key=lambda known: not known.is_trainable)
        if len(having) != len(scopes):
            continue
        for known, (scope, own) in zip(having, scopes.items(), strict=True):
            expected = numbered_roles(*wrapped_class(known), len(own))
            if expected is not None and set(expected) != set(own):
                raise KerasFileError(
                    f"the weights {', '.join(own)} of {'/'.join(scope)} are not those of {known.path}, which comes "
                    "there by the order of its model; name the layers, and save it again"
                )
            found[top, scope] = known
    return found


def _are_named(top: str, scopes: Iterable[tuple[str, ...]], leaves: dict[str, list[LayerConfig]]) -> bool:
    """Whether the names tell of all weights in a submodel which layer they are in, and of each another."""
    try:
        known = [_leaf(leaves, top, list(scope))[0] for scope in scopes]
    except KerasFileError:
        return False
    paths = {layer.path for layer in known if layer is not None}
    return len(paths) == len(known)


def _ungrouped(layers: Iterable[Layer]) -> list[Layer]:
    """Takes apart what has some parts of an attention layer and is none."""
    found = []
    for layer in layers:
        parts = {variable.role.rpartition("/")[0] for variable in layer.variables}
        if layer.class_name is not None or not parts & set(PARTS.values()) or parts == set(PARTS.values()):
            found.append(layer)
            continue
        by_part: dict[str, list[Variable]] = {}
        for variable in layer.variables:
            part, _, variable.role = variable.role.rpartition("/")
            by_part.setdefault(part, []).append(variable)
        for part, inner in by_part.items():
            found.append(Layer(f"{layer.path}/{part}".rstrip("/"), None, {}, inner))
    return found


def _leaf(leaves: dict[str, list[LayerConfig]], top: str | None, above: list[str]) -> tuple[LayerConfig | None, int]:
    """The layer that a name means, and the place of its own name in it."""
    for depth, part in enumerate(above):
        found = [leaf for leaf in leaves.get(part, []) if top is None or leaf.path.split("/")[0] == top]
        if len(found) > 1:
            inside = set(above[:depth]) | ({top} if top else set())
            found = [leaf for leaf in found if set(leaf.path.split("/")[:-1]) <= inside] or found
        if len(found) > 1:
            raise KerasFileError(
                f"two layers of its model are named {part}, and which one {'/'.join(above)} is in "
                "cannot be told; name the layers, and save it again"
            )
        if found:
            return found[0], depth
    if top is not None and top in leaves and len(leaves[top]) == 1:
        return leaves[top][0], -1  # a layer whose weights were named by hand
    return None, 0


def without_number(name: str) -> str:
    return re.sub(r":\d+$", "", name)


def attach_named(
    states: Mapping[str, LazyArray],
    variables: Mapping[str, Variable],
    drop: Collection[str],
    kept: Collection[str] | None = None,
) -> None:
    """Gives each weight its state, by the names.

    Args:
        states: what the optimizer has, by name, without iterations and learning rate.
        variables: the weights by name.
        drop: what may be left out.
        kept: what the configuration says that there is besides the accumulators; None if it is not in the file.

    Raises:
        KerasFileError: a state has no weight, a weight a part of the state, or there is more or less than `kept`.
    """
    left_out = {configs.SLOT_OF.get(name) for name in drop}
    underscored: dict[str, list[str]] = {}
    for name in variables:
        underscored.setdefault(name.replace("/", "_"), []).append(name)
    found: dict[str, dict[str, LazyArray]] = {}
    targets = {name: slot_of(name) for name in states}
    scope = _common_scope([target for slot, target in targets.values() if slot], variables)
    for name, stored in states.items():
        slot, target = targets[name]
        if slot in left_out:
            continue
        # Before the name of the weight there may be those of a graph, a LossScaleOptimizer, and the optimizer.
        ends = _suffixes(target)
        candidates = [end for end in ends if end in variables and scope in (None, target.removesuffix(end))]
        candidates = candidates or [known for end in ends for known in underscored.get(end, [])]
        if not slot or not candidates:
            raise KerasFileError(f"its optimizer has {name}, which belongs to no weight of the model")
        if len(candidates) > 1:
            raise KerasFileError(f"its optimizer has {name}, which may belong to {' or '.join(candidates)}")
        if slot in found.setdefault(candidates[0], {}):
            raise KerasFileError(f"its optimizer has {slot} of {candidates[0]} twice")
        found[candidates[0]][slot] = stored
    attach_slots(found, variables, drop, kept)


def attach_slots(
    found: Mapping[str, Mapping[str, LazyArray]],
    variables: Mapping[str, Variable],
    drop: Collection[str],
    kept: Collection[str] | None = None,
) -> None:
    """Gives each weight the state that was found for its name, without what is to be left out.

    Args and what it raises are those of `attach_named`.
    """
    left_out = {configs.SLOT_OF.get(name) for name in drop}
    for name in configs.SLOT_OF:
        _check_optional(name, found, drop, kept)
    for name, slots in found.items():
        missing = [slot for slot in ACCUMULATORS if slot not in slots]
        if missing:
            raise KerasFileError(f"its optimizer has {', '.join(slots)} of {name}, and not {' and '.join(missing)}")
        attach(name, variables[name], {slot: stored for slot, stored in slots.items() if slot not in left_out})


def _suffixes(target: str) -> list[str]:
    """What a name may be without scopes before it, longest first."""
    parts = target.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _common_scope(targets: Collection[str], variables: Collection[str]) -> str | None:
    """What all names of state begin with, before the names of weights; None if that is open.

    It is nothing (in a file of a model that was loaded itself), or it ends with the name of the optimizer.
    """
    common: set[str] | None = None
    for target in targets:
        scopes = {target.removesuffix(known) for known in _suffixes(target) if known in variables}
        common = scopes if common is None else common & scopes
    found = common or set()
    if len(found) > 1:
        found = {scope for scope in found if re.fullmatch(r"(|(.*/)?adadelta(_\d+)?/)", scope, re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None


def _check_optional(
    name: str, found: Mapping[str, Mapping[str, LazyArray]], drop: Collection[str], kept: Collection[str] | None
) -> None:
    """Raises unless all weights have what `drop` calls so, or none has."""
    slot = configs.SLOT_OF[name]
    having = [weight for weight, slots in found.items() if slot in slots]
    without = [weight for weight, slots in found.items() if slot not in slots]
    advice = f"Save it again, or pass drop={{{name!r}}} to leave them out"
    if name in drop or not (having or name in (kept or ())):
        return
    if kept is not None and name not in kept:
        raise KerasFileError(
            f"its optimizer has {configs.DROPPABLE[name]} for {having[0]}, and its configuration does not ask for "
            f"them. {advice}"
        )
    if without:
        raise KerasFileError(
            f"its optimizer had {configs.DROPPABLE[name]}, and there is no {slot} of {without[0]}. " + advice
        )


def slot_of(name: str) -> tuple[str, str]:
    """What a state is, and the name of its weight: perhaps with scopes before it, or with "_" for "/"."""
    for pattern, slot in _SLOTS:
        match = re.fullmatch(pattern, name)
        if match:
            return slot, match[1]
    return "", ""


# Behind the name of the weight; or before it; or joined to it.
_SLOTS: Final = (
    (r"(.+)/accum_grad(?:_\d+)?", "square_avg"),
    (r"(.+)/accum_var(?:_\d+)?", "acc_delta"),
    (r"(?:.+?/)??accumulated_grad/(.+)", "square_avg"),
    (r"(?:.+?/)??accumulated_delta_var/(.+)", "acc_delta"),
    (r"(?:.+?/)??average/(.+)", averages.KEY),
    (r"(?:.+/)?([^/]+)_accumulated_grad", "square_avg"),
    (r"(?:.+/)?([^/]+)_accumulated_delta_var", "acc_delta"),
    (r"(?:.+/)?([^/]+)_average", averages.KEY),
    (r"(?:.+/)?([^/]+)_gradient_accumulator", accumulation.KEY),
)


def is_iteration(name: str) -> bool:
    return bool(re.fullmatch(r"(.*/)?iter(ations?)?(_\d+)?", name))
