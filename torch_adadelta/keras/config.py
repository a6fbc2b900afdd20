"""What a file says of its model and its optimizer, in JSON: the layers, how they are connected, the hyperparameters.

Nothing of it is executed. What holds code, such as the bytecode of a lambda, is told by its name.
"""

import json
import re
from collections.abc import Collection, Container, Iterator
from typing import Any, Final, NamedTuple

from torch_adadelta.keras.errors import KerasFileError, NoStateError
from torch_adadelta.options import OPTIONS, without_neutral
from torch_adadelta.step import accumulation, averages

_MAX_DEPTH: Final = 150
_MAX_CALLS: Final = 100_000  # of all layers together; calls of nested models multiply

# What `drop` may name, for people.
DROPPABLE: Final = {
    "ema": "moving averages of the weights (use_ema)",
    "weight_decay": "weight decay",
    "gradient_accumulation": "gradient accumulation",
}
# Names that say nothing any more: "lambda" vouched for what is not run anyway.
IDLE: Final = {"lambda"}
# The options that belong to what `drop` may name; and the state that the first of them asks for.
OPTIONS_OF: Final[dict[str, tuple[str, ...]]] = {
    "ema": ("use_ema", "ema_momentum", "ema_overwrite_frequency"),
    "weight_decay": ("weight_decay",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
}
SLOT_OF: Final = {"ema": averages.KEY, "gradient_accumulation": accumulation.KEY}

# Those of a configuration. Keras has no other decay of weights than the decoupled one, and names have no meaning here.
_TAKEN: Final = [
    option.name for option in OPTIONS if option.keras and option.name not in ("name", "decoupled_weight_decay")
]

CONTAINERS: Final = {"Sequential", "Functional", "Model"}


def parsed(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        KerasFileError: it is none, or it is nested deeper than any model.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KerasFileError(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise KerasFileError(f"{what} is a {type(value).__name__}, not a JSON object")
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise KerasFileError(f"{what} is nested more than {_MAX_DEPTH} deep; it is no model")
        children = item.values() if isinstance(item, dict) else item
        todo += [(child, depth + 1) for child in children if isinstance(child, dict | list)]
    return value


# ---- The optimizer --------------------------------------------------------------------------------------------------


ADADELTA: Final = "Adadelta"


def optimizer_class(config: Any) -> str | None:
    """The class that a configuration ``{"class_name": ..., "config": ...}`` names; None if there is none."""
    return str(config.get("class_name", "")).rpartition(">")[2] or None if isinstance(config, dict) else None


def is_scaled(config: Any) -> bool:
    """Whether it is the configuration of a LossScaleOptimizer, which mixed precision puts around the optimizer."""
    return bool(re.fullmatch(r"LossScaleOptimizer(V\d+)?", optimizer_class(config) or ""))


def inner_optimizer(config: Any) -> Any:
    """The configuration in that of a LossScaleOptimizer; any other as it is."""
    if not is_scaled(config):
        return config
    options = config.get("config")
    return options.get("inner_optimizer", options.get("optimizer")) if isinstance(options, dict) else None


def hyperparameters(config: Any, drop: Collection[str]) -> dict[str, Any]:
    """What a configuration of Adadelta gives to `AdadeltaKeras`; a schedule as its configuration.

    Args:
        config: ``{"class_name": ..., "config": ...}``, as `inner_optimizer` gives it.
        drop: what of `DROPPABLE` may be left out.

    Raises:
        NoStateError: it is the configuration of another optimizer.
        KerasFileError: it is damaged.
    """
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise KerasFileError("the configuration of its optimizer is damaged")
    name = optimizer_class(config)
    if name != ADADELTA:
        raise NoStateError(OTHER_OPTIMIZER.format(name=name or "unknown"))
    options = without_neutral(config["config"])
    left_out = dropped_options(drop)
    found = {key: options[key] for key in _TAKEN if options.get(key) is not None and key not in left_out}
    if "lr" in options:
        found.setdefault("learning_rate", options["lr"])
    return found


WEIGHTS_ALONE: Final = "pass state=False and weights=True to load the weights alone"
OTHER_OPTIMIZER: Final = "its optimizer is {name}, not Adadelta"


def dropped_options(drop: Collection[str]) -> set[str]:
    """The options that belong to what is to be left out."""
    return {option for name in drop for option in OPTIONS_OF.get(name, ())}


def optional_state(options: dict[str, Any]) -> list[str]:
    """What a configuration of Adadelta keeps for each weight besides the accumulators: of `SLOT_OF`, in this order."""
    options = without_neutral(options)
    return [name for name in SLOT_OF if options.get(OPTIONS_OF[name][0])]


# Of these, tf_keras' new class and Keras 3 do the first that is not 0, and no other.
CLIPPING: Final = ("clipnorm", "global_clipnorm", "clipvalue")


def without_idle_clipping(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters of tf_keras' new class or Keras 3 without clip options that do nothing there; and notes."""
    given = [name for name in CLIPPING if found.get(name) is not None]
    active = [name for name in given if found[name] != 0]
    notes = [f"{name}=0 means no clipping in this Keras, and is left out" for name in given if name not in active]
    notes += [
        f"{name}={found[name]!r} does nothing in this Keras beside {active[0]}, and is left out" for name in active[1:]
    ]
    return {name: value for name, value in found.items() if name not in given or name in active[:1]}, notes


# ---- The model ------------------------------------------------------------------------------------------------------


class LayerConfig(NamedTuple):
    """A layer that is no model itself."""

    path: str  # the names of the models around it and its own: "encoder/dense"
    group: str  # where a ``.weights.h5`` has it: "layers/functional/layers/dense"
    class_name: str
    config: dict[str, Any]
    is_trainable: bool  # it, and all models around it


def wrapped_class(known: LayerConfig) -> tuple[str, dict[str, Any]]:
    """The class and configuration of a layer, or of the one that a TimeDistributed applies at each time."""
    class_name, config = inner_layer(known.config)
    is_wrapper = known.class_name == "TimeDistributed" and class_name and "config" in known.config["layer"]
    return (class_name, config) if is_wrapper else (known.class_name, known.config)


def inner_layer(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class and configuration of the layer in a wrapper such as Bidirectional; "" and its own if there is none."""
    inner = config.get("layer")
    if not isinstance(inner, dict):
        return "", config
    options = inner.get("config")
    return str(inner.get("class_name")), options if isinstance(options, dict) else {}


class Call(NamedTuple):
    """One of the calls of a layer, which may be shared, by its path."""

    path: str
    number: int


class ModelConfig:
    """The layers of a Sequential or functional model, in their order, and which layer each gets its input from.

    Args:
        config: ``{"class_name": ..., "config": {"layers": [...]}}``.

    Raises:
        KerasFileError: it is damaged.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.layers: list[LayerConfig] = []
        self.calls: dict[str, list[list[Call]]] = {}  # of a layer by its path: for each call, the calls before it
        self.is_complete = True  # whether all of the model is known: it is not if the model is a subclass
        self.lambdas = _lambdas(config.get("config"))
        self._left = _MAX_CALLS
        self.outputs = self._add(config, "", "", True, [[]])[0]

    def _count(self, calls: int) -> None:
        self._left -= calls
        if self._left < 0:
            raise KerasFileError(f"the layers of its model are called more than {_MAX_CALLS} times; it is no model")

    def _add(
        self, model: dict[str, Any], path: str, group: str, is_trainable: bool, sources: list[list[Call]]
    ) -> list[list[Call]]:
        """Adds the layers of a model; returns for each call of it the calls of layers that give its output.

        Args:
            model: its configuration.
            path: of the model.
            group: where a ``.weights.h5`` has it.
            is_trainable: whether it, and all models around it, are.
            sources: for each call of it, where its inputs come from.
        """
        options = _options(model)
        entries = options.get("layers") if options is not None else None
        if not isinstance(entries, list) or options is None:
            self.is_complete = False
            return [[] for _ in sources]
        is_sequential = model.get("class_name") == "Sequential"
        used: dict[str, int] = {}
        # By the name of a layer of this model: for each call in it, for each call of the model.
        outputs: dict[str, list[list[list[Call]]]] = {}
        inputs = [source.name for source in _named(options.get("input_layers"))]
        last = sources
        for entry in entries:
            layer = _options(entry) if isinstance(entry, dict) else None
            if layer is None:
                raise KerasFileError("the configuration of its model has a layer that is none")
            class_name = str(entry.get("class_name", "")).rpartition(">")[2]
            name = str(layer.get("name", entry.get("name", "")))
            snake = snake_case(class_name)
            count = used.get(snake)
            used[snake] = 0 if count is None else count + 1
            here = f"{group}layers/{snake}" + ("" if count is None else f"_{count + 1}")
            if is_sequential:
                before = [last]
            else:
                nodes = _calls(entry) or [[]]
                self._count(len(nodes) * len(sources))
                before = [[_flat(_taken(outputs, s, n) for s in node) for n in range(len(sources))] for node in nodes]
                if any(bool(node) != all(calls) for node, calls in zip(nodes, before, strict=True)):
                    self.is_complete = False  # where some input comes from is not known
            trains = is_trainable and layer.get("trainable", True) is not False
            if class_name in CONTAINERS or isinstance(layer.get("layers"), list):
                found = self._add(entry, f"{path}{name}/", f"{here}/", trains, _flat(before))
            else:
                if class_name == "InputLayer" and path:
                    at = inputs.index(name) if name in inputs else 0
                    before = [[[call[at]] if len(call) == len(inputs) else call for call in sources]]
                self.layers.append(LayerConfig(path + name, here, class_name, layer, trains))
                self.calls[path + name] = _flat(before)
                found = [[Call(path + name, number)] for number in range(len(self.calls[path + name]))]
            width = len(sources)
            outputs[name] = [found[start : start + width] for start in range(0, len(found), width)]
            last = outputs[name][0] if outputs[name] else [[] for _ in sources]
        names = _named(options.get("output_layers"))
        found = [_flat(_taken(outputs, source, number) for source in names) for number in range(len(sources))]
        return found if any(found) else last

    def by_path(self) -> dict[str, LayerConfig]:
        """The layers by their paths."""
        return {layer.path: layer for layer in self.layers}


def _options(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of a layer; before Keras 2.2.3, that of a Sequential is the list of its layers."""
    options = entry.get("config")
    if isinstance(options, list) and entry.get("class_name") == "Sequential":
        return {"layers": options}
    return options if isinstance(options, dict) else None


def _lambdas(config: Any) -> list[str]:
    """The names of the layers that are a lambda, or have one, such as an activation."""
    found: dict[str, None] = {}
    todo: list[tuple[Any, str]] = [(config, "")]
    while todo:
        item, name = todo.pop()
        if isinstance(item, dict):
            inner = item.get("config", item)
            name = str(inner.get("name", name)) if isinstance(inner, dict) else name
            if item.get("class_name") in ("Lambda", "__lambda__") or item.get("function_type") == "lambda":
                found[name] = None
        if isinstance(item, dict | list):
            todo += [(child, name) for child in reversed(list(item.values() if isinstance(item, dict) else item))]
    return list(found)


class _Source(NamedTuple):
    """A tensor of a functional model: an output of a call of a layer."""

    name: str
    call: int
    output: int


def _taken(outputs: dict[str, list[list[list[Call]]]], source: _Source, number: int) -> list[Call]:
    """The calls that give a tensor, in one call of the model; more than one if which output it is cannot be told."""
    calls = outputs.get(source.name, [])
    if not calls:
        return []
    found = calls[min(source.call, len(calls) - 1)][number]
    return [found[source.output]] if 0 <= source.output < len(found) else found


def _flat(lists: Iterator[list[Any]] | Any) -> list[Any]:
    return [item for items in lists for item in items]


def _named(value: Any) -> list[_Source]:
    """The tensors in ``input_layers`` or ``output_layers``: one ``[name, 0, 0]``, or a list of them."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        numbers = [number if isinstance(number, int) else 0 for number in [*value[1:3], 0, 0][:2]]
        return [_Source(value[0], *numbers)]
    if isinstance(value, list | dict):
        return _flat(_named(item) for item in (value.values() if isinstance(value, dict) else value))
    return []


def _calls(entry: dict[str, Any]) -> list[list[_Source]]:
    """The tensors that a layer of a functional model is called on, in each of its calls."""
    calls = entry.get("inbound_nodes")
    return [_sources(call) for call in calls] if isinstance(calls, list) else []


def _sources(call: Any) -> list[_Source]:
    found: list[_Source] = []
    todo: list[Any] = [call]
    while todo:
        item = todo.pop(0)
        if isinstance(item, dict):
            history = item.get("config", {}).get("keras_history") if isinstance(item.get("config"), dict) else None
            if item.get("class_name") == "__keras_tensor__" and isinstance(history, list) and history:
                found += _named([str(history[0]), *history[1:]])
            else:
                todo = [*item.values(), *todo]
        elif isinstance(item, list):
            if len(item) >= 3 and isinstance(item[0], str) and isinstance(item[1], int):
                found += _named(item)
                todo = [*(x for x in item[3:] if isinstance(x, dict)), *todo]
            else:
                todo = [*item, *todo]
    return list(dict.fromkeys(found))


def leaf_of(path: str, known: Container[str]) -> str | None:
    """The layer of a model that a path names, or is in: "block" of "block/up", if block is a custom layer."""
    while path and path not in known:
        path = path.rpartition("/")[0]
    return path or None


def snake_case(class_name: str) -> str:
    """The name of a class as Keras makes it the name of a group: "conv2d_transpose" of "Conv2DTranspose"."""
    name = re.sub(r"\W+", "", class_name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
