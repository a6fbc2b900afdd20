"""Reads what ``model.save`` and ``model.save_weights`` write in HDF5 with names: configuration, weights, optimizer."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from torch_adadelta.keras import config as configs
from torch_adadelta.keras import keras2
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import (
    KERAS2,
    KERAS3,
    LEGACY,
    NEW,
    NO_STATE,
    TF1,
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
from torch_adadelta.keras.hdf5 import Hdf5
from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.names import attach_named, is_iteration, named_layers, slot_of, without_number

STATE_HAS_NAMES: Final = "state_order is for files that number the state; in this one it has the names of weights"


def from_h5(path: Path, hdf5: Hdf5, request: Request) -> Checkpoint:
    version = hdf5.root_text("keras_version") or ""
    if version.startswith("1"):
        raise KerasFileError(f"it was saved by Keras {version}; load it in Keras 2.2.4, and save it again")
    layers, by_name, model = _weights(hdf5, request.config)
    text = hdf5.root_text("training_config")
    outer = None if text is None else configs.parsed(text, "training_config").get("optimizer_config")
    optimizer = configs.inner_optimizer(outer)
    class_name = configs.optimizer_class(optimizer)
    names = hdf5.attribute_list("optimizer_weights", "weight_names") or []
    if request.has_state and (text is None or not names):
        raise NoStateError(
            NO_STATE.format(why="the model was saved without its optimizer", how="model.save('model.h5')")
        )
    is_adadelta = class_name == configs.ADADELTA
    found = configs.hyperparameters(optimizer, request.drop) if request.has_state or is_adadelta else {}
    variables, scale = _without_scale([hdf5.stored(f"optimizer_weights/{name}") for name in names], outer)
    iterations, learning_rate, states = _told_apart(variables if is_adadelta else [])
    generation = _generation(version, states, optimizer["config"]) if is_adadelta else UNKNOWN
    if request.has_state:
        if not states:
            raise NoStateError(NO_STATE.format(why="no step was taken", how="model.save('model.h5')"))
        if generation == KERAS2:
            iterations = keras2.attach_nameless(variables, layers, model, optimizer["config"], request.state_order)
        elif request.state_order is not None:
            raise KerasFileError(STATE_HAS_NAMES)
        elif iterations is None:
            raise KerasFileError("its optimizer has no iterations")
        else:
            attach_named(states, by_name, request.drop, configs.optional_state(optimizer["config"]))
    if learning_rate is not None and not isinstance(found.get("learning_rate"), dict):
        found["learning_rate"] = scalar(learning_rate)
    notes: list[str] = []
    if generation == KERAS2:
        found, notes = keras2.without_keras2(found)
    elif generation.has_zero:
        found, notes = configs.without_idle_clipping(found)
    backend = hdf5.root_text("backend")
    if backend == "theano":
        notes += keras2.turn_kernels(layers)
    optional: dict[str, list[str]] = {}
    for name, stored in states.items():
        slot = slot_of(name)[0]
        if slot in configs.SLOT_OF.values():
            optional.setdefault(slot, []).append(stored.name)
    return Checkpoint(
        path,
        ".h5",
        generation,
        separated(layers),
        iterations if request.has_state else None,
        found,
        model,
        learning_rate,
        [*dropped(request.drop), *([scale_remark(scale, outer)] if configs.is_scaled(outer) else [])],
        notes,
        backend,
        optimizer=class_name,
        has_state=request.has_state,
        optional=optional,
    )


def _weights(hdf5: Hdf5, config: dict[str, Any] | None) -> tuple[list[Layer], dict[str, Variable], ModelConfig | None]:
    """The layers, the weights by their names, and the model."""
    root = "model_weights" if hdf5.has("model_weights") else ""  # save_weights has the layers at the top
    tops = hdf5.attribute_list(root, "layer_names") or []
    text = hdf5.root_text("model_config") if config is None else None
    if text is not None:
        config = configs.parsed(text, "model_config")
    model = None if config is None else ModelConfig(keras2.with_names(config, tops))
    names: list[tuple[str | None, str, LazyArray]] = []
    for top in tops:
        group = f"{root}/{top}".lstrip("/")
        for name in hdf5.attribute_list(group, "weight_names") or []:
            names.append((top, without_number(name), hdf5.stored(f"{group}/{name}")))
    layers, by_name = named_layers(names, model)
    mark_frozen(layers, model)
    return layers, by_name, model


def _without_scale(variables: list[LazyArray], config: Any) -> tuple[list[LazyArray], LazyArray | None]:
    """The variables of an optimizer without those of a LossScaleOptimizer of Keras 3, four of them, the scale last."""
    for number, stored in enumerate(variables if configs.is_scaled(config) else ()):
        if without_number(stored.name).endswith("/dynamic_scale"):
            return variables[number + 1 :], stored
    return variables, None


def _told_apart(variables: Sequence[LazyArray]) -> tuple[LazyArray | None, LazyArray | None, dict[str, LazyArray]]:
    """The iterations and the learning rate of an optimizer, if there are such, and its state by name."""
    iterations = learning_rate = None
    states: dict[str, LazyArray] = {}
    for stored in variables:
        name = without_number(stored.name.removeprefix("optimizer_weights/"))
        if is_iteration(name):
            iterations = stored
        elif name.rpartition("/")[2] == "learning_rate" and stored.shape == ():
            learning_rate = stored
        else:
            states[name] = stored
    return iterations, learning_rate, states


def _generation(version: str, states: Collection[str], options: dict[str, Any]) -> Generation:
    """What wrote a file, by the version of Keras, and the names of the state or else the options."""
    if version.startswith("3"):
        return KERAS3
    if states:
        slots = [name.rpartition("/")[2] for name in states if slot_of(name)[1]]
        is_keras2 = keras2.is_nameless(states)
        is_new = not any(slot.startswith(("accum_grad", "accum_var")) for slot in slots)
    else:
        is_keras2 = bool(re.fullmatch(r"2\.[0-3]\.\d+|2\.[01]\.\d+-tf", version))
        is_new = "use_ema" in options
    if is_keras2:
        return KERAS2
    if is_new:
        return NEW
    return TF1 if version.endswith("-tf") else LEGACY
