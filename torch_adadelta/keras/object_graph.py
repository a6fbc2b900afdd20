"""Reads TensorFlow checkpoints, by the graph of the objects that were saved."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from torch_adadelta.keras.classes import MOVING
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import KERAS3, LEGACY, NEW, NO_STATE, Checkpoint, attach, dropped, scalar, separated
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.names import attach_named, is_iteration, named_layers, without_number
from torch_adadelta.keras.state_order import natural
from torch_adadelta.keras.tf_checkpoint import Bundle, Node


def from_object_graph(path: Path, bundle: Bundle, config: dict[str, Any] | None, drop: Collection[str]) -> Checkpoint:
    nodes = bundle.object_graph()
    optimizers = [number for number, node in enumerate(nodes) if _is_optimizer(node)]
    if not optimizers:
        raise KerasFileError(
            NO_STATE.format(
                why="there is no optimizer in it",
                how="tf.train.Checkpoint(model=model, optimizer=optimizer), or model.save_weights of TensorFlow 2.4",
            )
        )
    if len(optimizers) > 1:
        raise KerasFileError(f"it holds {len(optimizers)} optimizers, and which one is meant cannot be told")
    optimizer = nodes[optimizers[0]]
    of_optimizer = dict(optimizer.children)
    weights, owned = _weight_nodes(nodes, optimizers[0])
    model = ModelConfig(config) if config is not None else None
    named: list[tuple[str | None, str, LazyArray]] = []
    for number in weights:
        node = nodes[number]
        assert node.key is not None
        named.append((None, without_number(node.full_name or node.key), bundle.stored(node.key)))
    layers, by_name = named_layers(named, model)
    for layer in layers:
        layer.variables.sort(key=lambda variable: variable.role in MOVING)

    scalars: dict[str, LazyArray] = {}
    for name, child in optimizer.children:
        key = nodes[child].key
        if key is not None:
            scalars[name.lstrip("_").replace("iterations", "iter")] = bundle.stored(key)
    if "iter" not in scalars:
        raise KerasFileError("its optimizer has no iterations")
    if optimizer.slots:
        generation = LEGACY
        pairs: dict[int, dict[str, LazyArray]] = {}
        for variable, slot, number in optimizer.slots:
            key = nodes[number].key
            if slot not in ("accum_grad", "accum_var"):
                raise KerasFileError(f"its optimizer has the slot {slot}; it is not Adadelta")
            if key is None:
                raise KerasFileError("a slot of its optimizer has no value")
            pairs.setdefault(variable, {})["square_avg" if slot == "accum_grad" else "acc_delta"] = bundle.stored(key)
        by_node = {number: by_name[name] for number, (_, name, _) in zip(weights, named, strict=True)}
        for number, slots in pairs.items():
            if number not in by_node or len(slots) != 2:
                raise KerasFileError("its optimizer has a slot of no weight, or one slot of two")
            attach(nodes[number].full_name or "", by_node[number], slots)
    else:
        generation = KERAS3 if "_trainable_variables" in of_optimizer else NEW
        states: dict[str, LazyArray] = {}
        own = {child for _, child in optimizer.children}  # iterations and hyperparameters
        for number in owned:
            node = nodes[number]
            name = without_number(node.full_name or "")
            if number in own or node.key is None or is_iteration(name) or name.rpartition("/")[2] == "learning_rate":
                continue
            if name in states:
                raise KerasFileError(f"its optimizer has {name} twice; name the layers, and save it again")
            states[name] = bundle.stored(node.key)
        if not states:
            raise KerasFileError(
                NO_STATE.format(why="no step was taken", how="tf.train.Checkpoint(model=model, optimizer=optimizer)")
            )
        attach_named(states, by_name, drop)
    if not any(variable.has_state for layer in layers for variable in layer.variables):
        raise KerasFileError(
            NO_STATE.format(why="no step was taken", how="tf.train.Checkpoint(model=model, optimizer=optimizer)")
        )
    # Keras 3 lists the weights that are trained, and those of the layers that are frozen come behind them.
    is_ordered = generation != KERAS3 or all(any(v.has_state for v in layer.variables) for layer in layers)
    found: dict[str, Any] = {n: scalar(scalars[n]) for n in ("learning_rate", "rho", "decay") if n in scalars}
    return Checkpoint(
        path,
        "TensorFlow checkpoint",
        generation,
        separated(layers),
        scalars["iter"],
        found,
        model,
        scalars.get("learning_rate"),
        dropped(drop),
        is_ordered=is_ordered,
    )


def _is_optimizer(node: Node) -> bool:
    names = {name for name, _ in node.children}
    return bool(node.slots) or "_iterations" in names or {"iter", "learning_rate"} <= names


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


def _weight_nodes(nodes: list[Node], optimizer: int) -> tuple[list[int], list[int]]:
    """The numbers of the weights in the order of the layers, and of what belongs to the optimizer."""
    owned: list[int] = []
    trainable: list[int] = []
    for name, child in nodes[optimizer].children:
        if name == "_variables":
            owned += [number for _, number in sorted(nodes[child].children, key=lambda item: natural(item[0]))]
        elif name == "_trainable_variables":
            trainable += [number for _, number in sorted(nodes[child].children, key=lambda item: natural(item[0]))]
        elif nodes[child].key is not None:
            owned.append(child)
    owned += [slot for _, _, slot in nodes[optimizer].slots]
    weights = list(trainable)
    seen = {optimizer, *owned}
    todo = [0]
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        node = nodes[number]
        is_other = "seed_generator" in (node.full_name or "") or (node.key or "").startswith("save_counter")
        if node.key is not None and number not in weights and not is_other:
            weights.append(number)
        children = [child for name, child in node.children if name not in _NOT_LAYERS and not name.startswith("train_")]
        todo += reversed(children)
    return weights, owned
