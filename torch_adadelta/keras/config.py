"""What a file says of its model and its optimizer, in JSON: the layers, how they are connected, the hyperparameters.

Nothing of it is executed. What holds code, such as the bytecode of a lambda, is refused.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.options import OPTIONS, without_neutral
from torch_adadelta.step import accumulation, averages

_MAX_DEPTH: Final = 150
_MAX_CALLS: Final = 100_000  # of all layers together; calls of nested models multiply

# What `drop` may name, for people.
DROPPABLE: Final = {
    "ema": "moving averages of the weights (use_ema)",
    "weight_decay": "weight decay",
    "gradient_accumulation": "gradient accumulation",
    "lambda": "layers or functions written as a lambda",
}
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


def refuse_lambdas(config: Any, what: str, drop: Collection[str]) -> None:
    """Raises KerasFileError if there is code in the configuration, unless `drop` has "lambda"."""
    if "lambda" in drop:
        return
    todo = [config]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
            name = item.get("class_name")
            if name in ("Lambda", "__lambda__") or item.get("function_type") == "lambda":
                inner = item.get("config")
                label = inner.get("name") if isinstance(inner, dict) else None
                named = f" ({label!r})" if isinstance(label, str) else ""
                raise KerasFileError(
                    f"{what} has a lambda{named}: that is the bytecode of a Python function, which whoever wrote the "
                    "file chose, and it is not run. Write what it computes in the PyTorch model, and pass "
                    "drop={'lambda'} to leave it out"
                )


# ---- The optimizer --------------------------------------------------------------------------------------------------


def hyperparameters(config: Any, drop: Collection[str]) -> dict[str, Any]:
    """What a configuration of Adadelta gives to `AdadeltaKeras`; a schedule as its configuration.

    Args:
        config: ``{"class_name": ..., "config": ...}``.
        drop: what of `DROPPABLE` may be left out.

    Raises:
        KerasFileError: it is the configuration of another optimizer.
    """
    if not isinstance(config, dict) or not isinstance(config.get("config"), dict):
        raise KerasFileError("the configuration of its optimizer is damaged")
    name = str(config.get("class_name", "")).rpartition(">")[2]
    if name == "LossScaleOptimizer":
        raise KerasFileError(
            "its optimizer is a LossScaleOptimizer, whose scale does not carry over: save the model compiled with its "
            "inner optimizer"
        )
    if name != "Adadelta":
        raise KerasFileError(f"its optimizer is {name or 'unknown'!s}, not Adadelta")
    options = without_neutral(config["config"])
    left_out = dropped_options(drop)
    found = {key: options[key] for key in _TAKEN if options.get(key) is not None and key not in left_out}
    if "lr" in options:
        found.setdefault("learning_rate", options["lr"])
    return found


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
    inner = known.config.get("layer")
    if known.class_name == "TimeDistributed" and isinstance(inner, dict) and isinstance(inner.get("config"), dict):
        return str(inner.get("class_name")), inner["config"]
    return known.class_name, known.config


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
        options = model.get("config")
        entries = options.get("layers") if isinstance(options, dict) else None
        if isinstance(options, list):  # of Keras before 2.3
            entries, options = options, {}
        if not isinstance(entries, list) or not isinstance(options, dict):
            self.is_complete = False
            return [[] for _ in sources]
        is_sequential = model.get("class_name") == "Sequential"
        used: dict[str, int] = {}
        # By the name of a layer of this model: for each call in it, for each call of the model.
        outputs: dict[str, list[list[list[Call]]]] = {}
        inputs = [source.name for source in _named(options.get("input_layers"))]
        last = sources
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
                raise KerasFileError("the configuration of its model has a layer that is none")
            class_name = str(entry.get("class_name", "")).rpartition(">")[2]
            layer = entry["config"]
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

    @property
    def inputs(self) -> dict[str, list[str]]:
        """Of a layer by its path: the paths of the layers before it, in its first call."""
        return {path: [call.path for call in calls[0]] if calls else [] for path, calls in self.calls.items()}

    @property
    def is_chain(self) -> bool:
        """Whether each layer follows on the one before it, so that the order of the layers is that of computation."""
        paths, inputs = [layer.path for layer in self.layers], self.inputs
        pairs = zip(paths[1:], paths, strict=False)
        return self.is_complete and all(inputs[path] == [before] for path, before in pairs)

    def by_path(self) -> dict[str, LayerConfig]:
        """The layers by their paths."""
        return {layer.path: layer for layer in self.layers}


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


def snake_case(class_name: str) -> str:
    """The name of a class as Keras makes it the name of a group: "conv2d_transpose" of "Conv2DTranspose"."""
    name = re.sub(r"\W+", "", class_name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
