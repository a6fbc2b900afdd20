"""What only files of Keras 2 have: state without names, its clip options, the kernels of Theano.

Keras 2 is standalone Keras up to 2.3.1, and ``tf.keras`` up to TensorFlow 1.12, which had the same optimizers.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from torch_adadelta.keras.classes import BY_SNAKE_CASE
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import attach, variables_of
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.state_order import assigned

# The last part of a name, which may be numbered to be the only one of its kind.
_NAMELESS: Final = re.compile(r"([Vv]ariable(_\d+)?|param_\d+|(delta_)?accumulator_\d+)(:\d+)?(_\d+)*")

# What of a layer is a kernel of a convolution as Theano computes it. Its kernels of depthwise convolutions are those of
# TensorFlow, which Keras turns at each call.
_CONVOLUTIONS: Final = {
    **{f"Conv{rank}D": ("kernel",) for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": ("kernel",) for rank in (2, 3)},
    "ConvLSTM2D": ("kernel", "recurrent_kernel"),
}


def is_nameless(names: Collection[str]) -> bool:
    """Whether the state of an optimizer has no names of weights, by all its names without that of the iterations."""
    return bool(names) and all(_NAMELESS.fullmatch(name.rpartition("/")[2]) for name in names)


def attach_nameless(
    states: Sequence[LazyArray],
    layers: list[Layer],
    model: ModelConfig | None,
    options: dict[str, Any],
    state_order: Sequence[str] | None,
) -> LazyArray | None:
    """Gives each weight its state, by the order; returns the iterations, if there are some.

    Raises:
        KerasFileError: which weight a state belongs to cannot be told.
    """
    kinds = ["delta_accumulator" in state.name for state in states if "accumulator_" in state.name]
    if kinds != sorted(kinds):
        raise KerasFileError("its optimizer has an accumulator behind a delta accumulator; it is damaged")
    for layer in layers:
        layer.is_known = layer.class_name in BY_SNAKE_CASE.values()
    if model is not None and model.is_complete:
        order = {known.path: number for number, known in enumerate(model.layers)}
        unknown = [layer.path for layer in layers if layer.path not in order]
        if unknown and state_order is None:
            raise KerasFileError(
                f"the state of its optimizer has no names, and which layer of its model {unknown[0]} is cannot be "
                "told; pass state_order=[names of the weights in the optimizer's order]"
            )
        layers.sort(key=lambda layer: order.get(layer.path, len(order)))
    found = assigned(states, layers, model, options, (), state_order, is_by_slot=True)
    for layer, variable in variables_of(layers):
        if id(variable) in found.slots:
            attach(f"{layer.path}/{variable.role}", variable, found.slots[id(variable)])
    return found.iterations


def without_keras2(found: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The hyperparameters as those of `AdadeltaKeras` that mean the same; and notes."""
    names = ("clipnorm", "clipvalue")
    idle = [name for name in names if found.get(name) is not None and found[name] <= 0]
    notes = [f"{name}={found[name]!r} means no clipping in this Keras, and is left out" for name in idle]
    taken = {name: value for name, value in found.items() if name not in idle}
    taken.setdefault("epsilon", 1e-7)  # which None means there
    if "clipnorm" in taken:
        taken["global_clipnorm"] = taken.pop("clipnorm")
        notes.append(
            f"clipnorm={found['clipnorm']!r} is the norm of all gradients together in this Keras, so it is "
            "global_clipnorm here"
        )
    return taken, notes


def as_keras2(values: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of `AdadeltaKeras` as Keras 2 has them.

    Raises:
        ValueError: it has none that means the same.
    """
    if values.get("clipnorm") is not None:
        raise ValueError(
            f"the optimizer has clipnorm={values['clipnorm']!r}, the norm of each gradient by itself, where this Keras "
            "takes that of all together; set global_clipnorm instead, or pass hyperparameters=False"
        )
    norm = values.get("global_clipnorm")
    return {**values, "clipnorm": norm, "global_clipnorm": None}


def turn_kernels(layers: Iterable[Layer]) -> list[str]:
    """Turns the kernels of convolutions by Theano, and their state, by 180° in space; returns notes.

    Theano convolves, where PyTorch and all other backends of Keras correlate.

    Raises:
        KerasFileError: the class of a layer is not known, and it may be a convolution.
    """
    notes = []
    for layer, variable in variables_of(layers):
        rank = len(variable.value.shape)
        if rank < 3:
            continue
        if layer.class_name is None:
            raise KerasFileError(
                f"whether {layer.path}/{variable.role} is the kernel of a convolution by Theano, and so has to be "
                "turned by 180°, cannot be told without the configuration of the model; pass config=model.to_json()"
            )
        if variable.role in _CONVOLUTIONS.get(layer.class_name, ()):
            for slot in ("value", *variable.slots):
                setattr(variable, slot, getattr(variable, slot).flip(tuple(range(rank - 2))))
        elif layer.class_name not in BY_SNAKE_CASE.values():
            notes.append(
                f"{layer.path}/{variable.role} of class {layer.class_name} is taken as it is in the file: if it is the "
                "kernel of a convolution, it has to be turned by 180°, for the file is one of Theano"
            )
    return notes


def with_names(config: dict[str, Any], layer_names: Sequence[str]) -> dict[str, Any]:
    """The configuration with the names of submodels that have none in it, as a Sequential before Keras 2.2.3."""
    options = config.get("config")
    entries = options.get("layers") if isinstance(options, dict) else options
    if not isinstance(entries, list) or len(entries) != len(layer_names):
        return config
    for entry, name in zip(entries, layer_names, strict=True):
        if isinstance(entry, dict) and isinstance(entry.get("config"), list):
            entry["config"] = {"name": name, "layers": entry["config"]}
    return config
