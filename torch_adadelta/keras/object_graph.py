"""Reads TensorFlow checkpoints, by the graph of the objects that were saved."""

import re
from pathlib import Path
from typing import Final

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.classes import MOVING, is_part
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import (
    KERAS3,
    LEGACY,
    NEW,
    NO_STATE,
    UNKNOWN,
    Checkpoint,
    Generation,
    Request,
    dropped,
    mark_frozen,
    scalar,
    scale_remark,
    separated,
)
from torch_adadelta.keras.errors import KerasFileError, LazyArray, NoStateError
from torch_adadelta.keras.names import attach_named, attach_slots, is_iteration, named_layers, slot_of, without_number
from torch_adadelta.keras.state_order import natural
from torch_adadelta.keras.tf_checkpoint import Bundle, Node
from torch_adadelta.step import accumulation, averages


def from_object_graph(path: Path, bundle: Bundle, request: Request) -> Checkpoint:
    nodes = bundle.object_graph()
    optimizers = [number for number, node in enumerate(nodes) if _is_optimizer(node)]
    # A LossScaleOptimizer of Keras 3 has the optimizer in it; that of tf_keras is one with it.
    around = {child: number for number in optimizers for name, child in nodes[number].children if name == _INNER}
    inner = [number for number in optimizers if number not in around.values()]
    if not inner and request.has_state:
        raise NoStateError(
            NO_STATE.format(
                why="there is no optimizer in it",
                how="tf.train.Checkpoint(model=model, optimizer=optimizer), or model.save_weights of TensorFlow 2.4",
            )
        )
    if len(inner) > 1 and request.has_state:
        raise KerasFileError(f"it holds {len(inner)} optimizers, and which one is meant cannot be told")
    optimizer = inner[0] if len(inner) == 1 else None
    weights, owned, paths = _weight_nodes(nodes, optimizers, optimizer)
    model = ModelConfig(request.config) if request.config is not None else None
    is_by_path = (model is None or not model.is_complete) and all(_has_names(paths.get(n, [])) for n in weights)
    full_names = [without_number(nodes[number].full_name or nodes[number].key or "") for number in weights]
    names = ["/".join(paths[number]) for number in weights] if is_by_path else full_names
    stored = [bundle.stored(nodes[number].key or "") for number in weights]
    layers, by_name = named_layers([(None, *pair) for pair in zip(names, stored, strict=True)], model)
    mark_frozen(layers, model)
    for layer in layers:
        layer.variables.sort(key=lambda variable: variable.role in MOVING)

    generation, class_name = UNKNOWN, None
    scalars: dict[str, LazyArray] = {}
    remarks = dropped(request.drop)
    if optimizer is not None:
        generation, class_name = _class_of(nodes, optimizer)
        scalars = _scalars(nodes[optimizer], nodes, bundle)
        remarks += _scale_remarks(nodes, around.get(optimizer, optimizer), bundle)
        if request.has_state:
            if places := _state_by_place(nodes, optimizer):
                label = dict(zip(weights, names, strict=True))
                attach_slots(_of_places(places, label, nodes, bundle), by_name, request.drop)
            else:
                by_full_name = {full: by_name[name] for full, name in zip(full_names, names, strict=True)}
                if len(by_full_name) < len(weights):
                    raise KerasFileError("it holds two weights of one name; name the layers, and save it again")
                attach_named(_state_by_name(nodes, optimizer, owned, bundle), by_full_name, request.drop)
            if not any(variable.has_state for layer in layers for variable in layer.variables):
                raise NoStateError(
                    NO_STATE.format(
                        why="no step was taken", how="tf.train.Checkpoint(model=model, optimizer=optimizer)"
                    )
                )
            class_name = configs.ADADELTA
    if request.has_state and "iter" not in scalars:
        raise KerasFileError("its optimizer has no iterations")
    # Keras 3 lists the weights that are trained, and those of the layers that are frozen come behind them.
    is_ordered = (
        generation in (LEGACY, NEW)
        or any(name.startswith("layer_with_weights-") for node in nodes for name, _ in node.children)
        or all(any(v.has_state for v in layer.variables) for layer in layers)
    )
    is_adadelta = class_name == configs.ADADELTA
    rates = [name for name in ("learning_rate", "rho", "decay") if is_adadelta and name in scalars]
    return Checkpoint(
        path,
        "TensorFlow checkpoint",
        generation if is_adadelta else UNKNOWN,
        separated(layers),
        scalars["iter"] if request.has_state else None,
        {name: scalar(scalars[name]) for name in rates},
        model,
        scalars.get("learning_rate") if is_adadelta else None,
        remarks,
        is_ordered=is_ordered,
        optimizer=class_name,
        has_state=request.has_state,
    )


_INNER: Final = "inner_optimizer"


def _is_optimizer(node: Node) -> bool:
    names = {name for name, _ in node.children}
    return bool(node.slots) or "_iterations" in names or {"iter", "learning_rate"} <= names


def _class_of(nodes: list[Node], optimizer: int) -> tuple[Generation, str | None]:
    """The generation of an optimizer; and its class, or None if it is not known to be an Adadelta."""
    node = nodes[optimizer]
    names = {name for name, _ in node.children}
    is_adadelta = names >= _ATTRIBUTES or (bool(node.slots) and {slot for _, slot, _ in node.slots} <= _SLOTS.keys())
    generation = KERAS3 if "_trainable_variables" in names else NEW if "_iterations" in names else LEGACY
    return generation, configs.ADADELTA if is_adadelta else None


_SLOTS: Final = {"accum_grad": "square_avg", "accum_var": "acc_delta"}
_ATTRIBUTES: Final = {"_accumulated_grads", "_accumulated_delta_vars"}

# The lists that an optimizer of Keras 3 has, with something for each weight that it trains.
_LISTS: Final = {
    "_accumulated_grads": "square_avg",
    "_accumulated_delta_vars": "acc_delta",
    "_model_variables_moving_average": averages.KEY,
    "_accumulated_gradients": accumulation.KEY,
}


def _scalars(optimizer: Node, nodes: list[Node], bundle: Bundle) -> dict[str, LazyArray]:
    """The iterations, as "iter", and the hyperparameters."""
    found = {}
    for name, child in optimizer.children:
        key = nodes[child].key
        if key is not None:
            found[name.lstrip("_").replace("iterations", "iter")] = bundle.stored(key)
    return found


def _scale_remarks(nodes: list[Node], optimizer: int, bundle: Bundle) -> list[str]:
    """What is told of the scale of a LossScaleOptimizer."""
    own = dict(nodes[optimizer].children)
    of_scale = dict(nodes[own["loss_scale"]].children) if "loss_scale" in own else own
    number = of_scale.get("current_loss_scale", own.get("dynamic_scale"))
    key = None if number is None else nodes[number].key
    if key is not None:
        return [scale_remark(bundle.stored(key))]
    return [scale_remark()] if "base_optimizer" in own or _INNER in own else []


def _state_by_place(nodes: list[Node], optimizer: int) -> dict[int, dict[str, int]]:
    """The state of each weight by their numbers, where the optimizer refers to both; nothing where only names tell."""
    found: dict[int, dict[str, int]] = {}
    for variable, slot, number in nodes[optimizer].slots:
        if slot not in _SLOTS:
            raise NoStateError(f"its optimizer has the slot {slot}; it is not Adadelta")
        found.setdefault(variable, {})[_SLOTS[slot]] = number
    lists = dict(nodes[optimizer].children)
    if "_trainable_variables" in lists:
        trained = dict(nodes[lists["_trainable_variables"]].children)
        for name, slot in _LISTS.items():
            for place, number in nodes[lists[name]].children if name in lists else ():
                found.setdefault(trained[place], {})[slot] = number
    return found


def _of_places(
    places: dict[int, dict[str, int]], names: dict[int, str], nodes: list[Node], bundle: Bundle
) -> dict[str, dict[str, LazyArray]]:
    """The state of each weight by its name."""
    found: dict[str, dict[str, LazyArray]] = {}
    for variable, slots in places.items():
        if variable not in names:
            raise KerasFileError("its optimizer has state of no weight")
        for slot, number in slots.items():
            key = nodes[number].key
            if key is None:
                raise KerasFileError(f"{slot} of {names[variable]} has no value")
            found.setdefault(names[variable], {})[slot] = bundle.stored(key)
    return found


def _state_by_name(nodes: list[Node], optimizer: int, owned: list[int], bundle: Bundle) -> dict[str, LazyArray]:
    """What belongs to an optimizer, by its names, without iterations and hyperparameters."""
    states: dict[str, LazyArray] = {}
    own = {child for _, child in nodes[optimizer].children}
    for number in owned:
        key, name = nodes[number].key, without_number(nodes[number].full_name or "")
        if number in own or key is None or is_iteration(name) or name.rpartition("/")[2] == "learning_rate":
            continue
        if name in states:
            raise KerasFileError(f"its optimizer has {name} twice; name the layers, and save it again")
        states[name] = bundle.stored(key)
    if states and not any(slot_of(name)[0] for name in states):
        raise NoStateError(f"its optimizer has {next(iter(states))}; it is not Adadelta")
    return states


# Objects beside the layers that a saved model refers to.
_NOT_LAYERS: Final = {
    "keras_api",
    "metrics",
    "compiled_metrics",
    "_metrics",
    "save_counter",
    "signatures",
    "seed_generator",
}


def _has_names(path: list[str]) -> bool:
    """Whether a path is one of attributes that somebody named, as in a subclass, and not of lists that Keras keeps."""
    is_named = all(is_part(name) or re.fullmatch(r"[A-Za-z]\w*|\d+", name) for name in path)
    return len(path) > 1 and is_named and _KEPT.isdisjoint(path)


# The lists that a SavedModel has of the weights of each layer.
_KEPT: Final = {"variables", "trainable_variables", "non_trainable_variables"}


def _weight_nodes(
    nodes: list[Node], optimizers: list[int], optimizer: int | None
) -> tuple[list[int], list[int], dict[int, list[str]]]:
    """The numbers of the weights in the order of the layers, and of what belongs to the optimizer; and their paths.

    A path has the attributes below the model: ["encoder", "up", "kernel"].

    Args:
        nodes: all objects.
        optimizers: those that are an optimizer; what belongs to the others is no weight either.
        optimizer: the one whose state is read.
    """
    owned: list[int] = []
    trainable: list[int] = []
    seen: set[int] = set(optimizers)
    for each in optimizers:
        own = [slot for _, _, slot in nodes[each].slots]
        for name, child in nodes[each].children:
            if name in ("_variables", "_trainable_variables"):
                numbers = [n for _, n in sorted(nodes[child].children, key=lambda item: natural(item[0]))]
                if name == "_variables":
                    own += numbers
                elif each == optimizer:
                    trainable += numbers
            elif nodes[child].key is not None:
                own.append(child)
        seen |= set(own)
        owned += own if each == optimizer else []
    weights = list(trainable)
    todo: list[tuple[int, list[str]]] = [(0, [])]
    paths: dict[int, list[str]] = {}
    while todo:
        number, path = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        node = nodes[number]
        is_other = "seed_generator" in (node.full_name or "") or (node.key or "").startswith("save_counter")
        if node.key is not None and not is_other:
            paths[number] = [*path[:-1], path[-1].lstrip("_")]
            if number not in weights:
                weights.append(number)
        children = [
            (child, [*path, name])
            for name, child in node.children
            if name not in _NOT_LAYERS and not name.startswith("train_")
        ]
        todo += reversed(children)
    # All are in one object: the model, unless the checkpoint is the model itself.
    if len({path[0] for path in paths.values()}) == 1:
        paths = {number: path[1:] for number, path in paths.items()}
    return weights, owned, paths
