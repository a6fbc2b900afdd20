"""Weights and state that have names, as in ``.h5`` files and TensorFlow checkpoints: a state names its weight."""

import re
from collections.abc import Collection, Iterable, Mapping

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import BY_SNAKE_CASE, PARTS, is_part, role_prefix
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
    for top, name, stored in names:
        parts = name.split("/")
        if has_root and top is None:
            parts = parts[1:]
        role, above = parts[-1], parts[:-1]
        known_layer, depth = _leaf(leaves, top, above)
        if known_layer is not None:
            class_name, config = wrapped_class(known_layer)
            path = known_layer.path
            if depth < 0 and class_name in BY_SNAKE_CASE.values():  # above all is its name before it was renamed
                depth = next((at for at, part in enumerate(above) if is_part(part)), len(above)) - 1
            prefix = role_prefix(above[depth + 1 :])
        else:
            class_name, config = None, {}
            keep = len(above)
            while keep > 1 and is_part(above[keep - 1]):
                keep -= 1
            prefix = role_prefix(above[keep:])
            path = "/".join(above[:keep]) or "(no layer)"
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
    for name, stored in states.items():
        slot, target = slot_of(name)
        if slot in left_out:
            continue
        # In a file of a model that was loaded itself, the legacy class leaves its own name out.
        candidates = [known for known in (target, target.partition("/")[2]) if known in variables]
        candidates = candidates or underscored.get(target, [])
        if not slot or not candidates:
            raise KerasFileError(f"its optimizer has {name}, which belongs to no weight of the model")
        if len(candidates) > 1:
            raise KerasFileError(f"its optimizer has {name}, which may belong to {' or '.join(candidates)}")
        if slot in found.setdefault(candidates[0], {}):
            raise KerasFileError(f"its optimizer has {slot} of {candidates[0]} twice")
        found[candidates[0]][slot] = stored
    for name in configs.SLOT_OF:
        _check_optional(name, found, drop, kept)
    for name, slots in found.items():
        missing = [slot for slot in ACCUMULATORS if slot not in slots]
        if missing:
            raise KerasFileError(f"its optimizer has {', '.join(slots)} of {name}, and not {' and '.join(missing)}")
        attach(name, variables[name], slots)


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
    """What a state is, and the name of its weight: perhaps behind that of the optimizer, or with "_" for "/"."""
    for pattern, slot in (
        (r"(.+)/accum_grad", "square_avg"),
        (r"(.+)/accum_var", "acc_delta"),
        (r"(?:[^/]+/)?accumulated_grad/(.+)", "square_avg"),
        (r"(?:[^/]+/)?accumulated_delta_var/(.+)", "acc_delta"),
        (r"(?:[^/]+/)?average/(.+)", averages.KEY),
        (r"(?:[^/]+/)?(.+)_accumulated_grad", "square_avg"),
        (r"(?:[^/]+/)?(.+)_accumulated_delta_var", "acc_delta"),
        (r"(?:[^/]+/)?(.+)_average", averages.KEY),
        (r"(?:[^/]+/)?(.+)_gradient_accumulator", accumulation.KEY),
    ):
        match = re.fullmatch(pattern, name)
        if match:
            return slot, match[1]
    return "", ""


def is_iteration(name: str) -> bool:
    return name.rpartition("/")[2] in ("iter", "iteration", "iterations")
