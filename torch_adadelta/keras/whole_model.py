"""Reads a model that was saved whole, with ``model.save`` in HDF5: configuration, weights, optimizer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import (
    KERAS3,
    LEGACY,
    NEW,
    NO_STATE,
    Checkpoint,
    dropped,
    mark_frozen,
    scalar,
    separated,
)
from torch_adadelta.keras.errors import KerasFileError, LazyArray
from torch_adadelta.keras.hdf5 import Hdf5
from torch_adadelta.keras.names import attach_named, is_iteration, named_layers, slot_of, without_number


def from_h5(path: Path, hdf5: Hdf5, config: dict[str, Any] | None, drop: Collection[str]) -> Checkpoint:
    text = hdf5.root_text("model_config") if config is None else None
    if text is not None:
        config = configs.parsed(text, "model_config")
        configs.refuse_lambdas(config, "its model", drop)
    model = None if config is None else ModelConfig(config)
    names: list[tuple[str | None, str, LazyArray]] = []
    for top in hdf5.attribute_list("model_weights", "layer_names") or []:
        for name in hdf5.attribute_list(f"model_weights/{top}", "weight_names") or []:
            names.append((top, without_number(name), hdf5.stored(f"model_weights/{top}/{name}")))
    layers, by_name = named_layers(names, model)
    mark_frozen(layers, model)

    text = hdf5.root_text("training_config")
    stored_names = hdf5.attribute_list("optimizer_weights", "weight_names")
    if text is None or not stored_names:
        raise KerasFileError(
            NO_STATE.format(why="the model was saved without its optimizer", how="model.save('model.h5')")
        )
    training = configs.parsed(text, "training_config")
    configs.refuse_lambdas(training, "its training configuration", drop)
    found = configs.hyperparameters(training.get("optimizer_config"), drop)
    kept = configs.optional_state(training["optimizer_config"]["config"])
    states: dict[str, LazyArray] = {}
    iterations = learning_rate = None
    for name in stored_names:
        stored = hdf5.stored(f"optimizer_weights/{name}")
        short = without_number(name)
        if is_iteration(short):
            iterations = stored
        elif short.rpartition("/")[2] == "learning_rate" and stored.shape == ():
            learning_rate = stored
        else:
            states[short] = stored
    if iterations is None:
        raise KerasFileError("its optimizer has no iterations")
    if not states:
        raise KerasFileError(NO_STATE.format(why="no step was taken", how="model.save('model.h5')"))
    attach_named(states, by_name, drop, kept)
    version = hdf5.root_text("keras_version") or ""
    if version.startswith("3"):
        generation = KERAS3
    else:
        generation = (
            LEGACY if any(slot_of(name)[1] and name.endswith(("accum_grad", "accum_var")) for name in states) else NEW
        )
    if learning_rate is not None and not isinstance(found.get("learning_rate"), dict):
        found["learning_rate"] = scalar(learning_rate)
    found, notes = configs.without_idle_clipping(found) if generation != LEGACY else (found, [])
    return Checkpoint(
        path,
        ".h5",
        generation,
        separated(layers),
        iterations,
        found,
        model,
        learning_rate,
        dropped(drop),
        notes,
        hdf5.root_text("backend"),
    )
