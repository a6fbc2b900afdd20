"""Files of Keras with what Keras 3 adds to Adadelta, for tests: recorded ones, and one that is written without Keras."""

import warnings
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch
from keras_stored import state_names, with_state_names, write_h5
from keras_table import ADDED_ROWS, recorded
from torch import nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import Report, load_keras

MODEL: Final = "gates"
COUNT: Final = 5  # calls before the files were written

# What the optimizers of the recorded files had; see `ADDED` of keras_table_models.py.
ADDED: Final[dict[str, dict[str, Any]]] = {
    "new": {"weight_decay": 0.02, "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
}
ADDED["keras3"] = {**ADDED["new"], "gradient_accumulation_steps": 2, "loss_scale_factor": 2.0}

STATE: Final = {
    "new": ["square_avg", "acc_delta", "average"],
    "keras3": ["square_avg", "acc_delta", "average", "gradient_accumulator"],
}
KINDS: Final = ("h5", "keras", "weights.h5", "checkpoint")
CELLS: Final = [(generation, kind) for generation in ADDED for kind in KINDS]


def gates(**options: Any) -> tuple[nn.Module, AdadeltaKeras]:
    """The model of the recorded files, and an optimizer."""
    torch.manual_seed(0)
    model = ADDED_ROWS[MODEL].torch().double()
    return model, AdadeltaKeras(model.named_parameters(), **options)


def load(folder: Path, generation: str, kind: str, own: dict[str, Any], **options: Any) -> tuple[Any, Any, Report]:
    """A recorded file in a model and an optimizer with options of its own."""
    model, optimizer = gates(**own)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exclude_from_weight_decay")
        path = recorded(folder / generation)[kind]
        if kind == "weights.h5" or kind == "checkpoint":
            options["config"] = config_of(folder, generation)
        return model, optimizer, load_keras(path, optimizer, model, weights=True, **options)


def config_of(folder: Path, generation: str) -> str:
    return str(np.load(folder / generation / "truth.npz")["config"])


def with_additions(path: Path, layers: dict[str, Any], **options: Any) -> Path:
    """A file of weights, and state with averages, and sums that are negative, of a class that has them all."""
    write_h5(path, layers, use_ema=True, gradient_accumulation_steps=2, **options)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"] = "3.15.1"
        names = state_names(file)
        for layer, weights in layers.items():
            for name, value in weights.items():
                place = f"{layer}_{name.replace('/', '_')}"
                for slot, array in (("average", -3 * value), ("gradient_accumulator", -7 * value)):
                    names.append(f"adadelta/{place}_{slot}")
                    file["optimizer_weights"][names[-1]] = array
        names.append("adadelta/learning_rate")
        file["optimizer_weights"][names[-1]] = 1.0
        with_state_names(*names)(file)
    return path
