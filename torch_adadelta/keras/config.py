"""What a file says of its model and its optimizer, in JSON: the layers, how they are connected, the hyperparameters.

Nothing of it is executed. What holds code, such as the bytecode of a lambda, is refused.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, Final, NamedTuple

from torch_adadelta.keras.errors import KerasFileError

_MAX_DEPTH: Final = 150

# What `drop` may name, for people; and which options of an optimizer that is, with the values that ask for nothing.
DROPPABLE: Final = {
    "ema": "moving averages of the weights (use_ema)",
    "weight_decay": "weight decay",
    "gradient_accumulation": "gradient accumulation",
    "lambda": "layers or functions written as a lambda",
}
_NEEDS_DROP: Final[dict[str, tuple[str, tuple[Any, ...]]]] = {
    "use_ema": ("ema", (None, False)),
    "weight_decay": ("weight_decay", (None, False, 0)),
    "gradient_accumulation_steps": ("gradient_accumulation", (None, 1)),
}
_TAKEN: Final = ("learning_rate", "rho", "epsilon", "decay", "clipvalue", "clipnorm", "global_clipnorm")

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
        KerasFileError: it is the configuration of another optimizer, or asks for what is not to be dropped.
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
    options = config["config"]
    for key, (drop_name, neutral) in _NEEDS_DROP.items():
        if options.get(key) not in neutral and drop_name not in drop:
            raise KerasFileError(
                f"its optimizer has {key}={options[key]!r}, which AdadeltaKeras does not do; training would go on "
                f"differently. Pass drop={{{drop_name!r}}} to accept that"
            )
    if options.get("loss_scale_factor") not in (None, 1, 1.0):
        raise KerasFileError(
            f"its optimizer has loss_scale_factor={options['loss_scale_factor']!r}, which does not carry over; use "
            "torch.amp.GradScaler, and remove it from the optimizer before saving"
        )
    found = {key: options[key] for key in _TAKEN if options.get(key) is not None}
    if "lr" in options:
        found.setdefault("learning_rate", options["lr"])
    return found


# ---- The model ------------------------------------------------------------------------------------------------------


class LayerConfig(NamedTuple):
    """A layer that is no model itself."""

    path: str  # the names of the models around it and its own: "encoder/dense"
    group: str  # where a ``.weights.h5`` has it: "layers/functional/layers/dense"
    class_name: str
    config: dict[str, Any]
    is_trainable: bool  # it, and all models around it


class ModelConfig:
    """The layers of a Sequential or functional model, in their order, and which layer each gets its input from.

    Args:
        config: ``{"class_name": ..., "config": {"layers": [...]}}``.

    Raises:
        KerasFileError: it is damaged.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.layers: list[LayerConfig] = []
        self.inputs: dict[str, list[str]] = {}  # of a layer by its path: the paths of the layers before it
        self.is_complete = True  # whether all of the model is known: it is not if the model is a subclass
        self.name = ""
        if isinstance(config.get("config"), dict):
            self.name = str(config["config"].get("name", ""))
        self._add(config, "", "", True, [])

    def _add(self, model: dict[str, Any], path: str, group: str, is_trainable: bool, sources: list[str]) -> list[str]:
        """Adds the layers of a model; returns the paths of those that give its output."""
        options = model.get("config")
        entries = options.get("layers") if isinstance(options, dict) else None
        if isinstance(options, list):  # of Keras before 2.3
            entries, options = options, {}
        if not isinstance(entries, list) or not isinstance(options, dict):
            self.is_complete = False
            return []
        is_sequential = model.get("class_name") == "Sequential"
        used: dict[str, int] = {}
        outputs: dict[str, list[str]] = {}  # by the name of a layer of this model
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
            before = last if is_sequential else _flat(outputs.get(source, []) for source in _sources(entry))
            trains = is_trainable and layer.get("trainable", True) is not False
            if class_name in CONTAINERS or isinstance(layer.get("layers"), list):
                last = self._add(entry, f"{path}{name}/", f"{here}/", trains, before)
            else:
                if class_name == "InputLayer" and path:
                    before = sources  # a model gets its inputs in an order; which is which makes no difference here
                self.layers.append(LayerConfig(path + name, here, class_name, layer, trains))
                self.inputs[path + name] = before
                last = [path + name]
            outputs[name] = last
        if is_sequential:
            return last
        found = _flat(outputs.get(name, []) for name in _output_names(options.get("output_layers")))
        return found or last

    @property
    def is_chain(self) -> bool:
        """Whether each layer follows on the one before it, so that the order of the layers is that of computation."""
        paths = [layer.path for layer in self.layers]
        pairs = zip(paths[1:], paths, strict=False)
        return self.is_complete and all(self.inputs[path] == [before] for path, before in pairs)

    def by_path(self) -> dict[str, LayerConfig]:
        """The layers by their paths."""
        return {layer.path: layer for layer in self.layers}


def _flat(lists: Iterator[list[str]] | Any) -> list[str]:
    return [item for items in lists for item in items]


def _output_names(value: Any) -> list[str]:
    """The names of layers in ``output_layers``: one ``[name, 0, 0]``, or a list of them."""
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [value[0]]
    if isinstance(value, list):
        return [name for item in value for name in _output_names(item)]
    if isinstance(value, dict):
        return [name for item in value.values() for name in _output_names(item)]
    return []


def _sources(entry: dict[str, Any]) -> list[str]:
    """The names of the layers that a layer of a functional model is called on, first in its first call."""
    calls = entry.get("inbound_nodes")
    if not isinstance(calls, list) or not calls:
        return []
    found: list[str] = []
    todo: list[Any] = [calls[0]]
    while todo:
        item = todo.pop(0)
        if isinstance(item, dict):
            history = item.get("config", {}).get("keras_history") if isinstance(item.get("config"), dict) else None
            if item.get("class_name") == "__keras_tensor__" and isinstance(history, list) and history:
                found.append(str(history[0]))
            else:
                todo = [*item.values(), *todo]
        elif isinstance(item, list):
            if len(item) >= 3 and isinstance(item[0], str) and isinstance(item[1], int):
                found.append(item[0])
                todo = [*(x for x in item[3:] if isinstance(x, dict)), *todo]
            else:
                todo = [*item, *todo]
    return list(dict.fromkeys(found))


def snake_case(class_name: str) -> str:
    """The name of a class as Keras makes it the name of a group: "conv2d_transpose" of "Conv2DTranspose"."""
    name = re.sub(r"\W+", "", class_name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
