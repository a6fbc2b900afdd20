"""State that Keras 3 adds to Adadelta, in files that are not whole."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_added import gates
from keras_stored import (
    state_names,
    with_options,
    with_state_names,
)

from torch_adadelta.keras import KerasFileError, load_keras

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def changed(path: Path, tmp_path: Path, edit: Callable[[Any], Any]) -> Path:
    """A copy of a file in HDF5 in which something is another."""
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    with h5py.File(copy, "r+") as file:
        edit(file)
    return copy


def without(*parts: str) -> Callable[[Any], None]:
    """An edit: no state with one of these in its name."""
    return lambda file: with_state_names(*(n for n in state_names(file) if not any(part in n for part in parts)))(file)


def reshaped(part: str, array: Any) -> Callable[[Any], None]:
    """An edit: another array in the place of the first state with this in its name."""

    def edit(file: Any) -> None:
        name = next(name for name in state_names(file) if part in name)
        del file["optimizer_weights"][name]
        file["optimizer_weights"][name] = array

    return edit


EMA: Final = r"drop=\{'ema'\}"
SUMS: Final = r"drop=\{'gradient_accumulation'\}"


@pytest.mark.parametrize(
    ("generation", "edit", "message"),
    [
        ("new", without("average"), rf"moving averages.*there is no average of .*{EMA}"),
        ("new", without("average/out"), rf"moving averages.*there is no average of out/kernel.*{EMA}"),
        (
            "new",
            without("grad/out", "var/out"),
            "its optimizer has average of out/kernel, and not square_avg and acc_delta",
        ),
        ("new", with_options(use_ema=False), rf"its configuration does not ask for them.*{EMA}"),
        ("new", reshaped("average", np.ones((3, 3))), r"has shape \(3, 3\), its weight"),
        ("new", reshaped("average", np.ones((2, 6), "i4")), "has dtype int32"),
        ("new", with_options(ema_momentum=2.0), "Invalid ema_momentum: 2.0"),
        ("new", with_options(ema_overwrite_frequency=2.5), "ema_overwrite_frequency must be an int"),
        ("new", with_options(weight_decay=-1.0), "Invalid weight_decay"),
        ("new", with_options(weight_decay="much"), "weight_decay must be a number"),
        (
            "keras3",
            without("gradient_accumulator"),
            rf"gradient accumulation.*there is no gradient_accumulator of .*{SUMS}",
        ),
        (
            "keras3",
            without("out_bias_gradient_acc"),
            rf"gradient accumulation.*there is no gradient_accumulator of sequential/out/bias.*{SUMS}",
        ),
        ("keras3", with_options(gradient_accumulation_steps=None), rf"its configuration does not ask for them.*{SUMS}"),
        ("keras3", with_options(gradient_accumulation_steps=2.5), "gradient_accumulation_steps must be an int"),
        ("keras3", with_options(gradient_accumulation_steps=5), "there are sums that are not zero"),
        ("keras3", with_options(loss_scale_factor=0.0), "Invalid loss_scale_factor"),
    ],
    ids=range(16),
)
def test_a_file_that_is_not_whole_is_refused(
    generation: str, edit: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    path = changed(folder / generation / "model.h5", tmp_path, edit)
    model, optimizer = gates(use_ema=True, learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(KerasFileError, match=message):
        load_keras(path, optimizer, model, weights=True)
    assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("edit", "drop"),
    [
        (without("average"), "ema"),
        (without("average/out"), "ema"),
        (with_options(use_ema=False), "ema"),
        (lambda file: None, "weight_decay"),
    ],
    ids=range(4),
)
def test_and_is_taken_without_that(edit: Any, drop: str, folder: Path, tmp_path: Path) -> None:
    path = changed(folder / "new" / "model.h5", tmp_path, edit)
    model, optimizer = gates()
    with warnings.catch_warnings():
        if drop == "weight_decay":
            warnings.simplefilter("error")
        else:
            warnings.simplefilter("ignore")
        load_keras(path, optimizer, model, drop={drop})
    assert optimizer.use_ema == (drop != "ema")
    assert optimizer.weight_decay == (0.0 if drop == "weight_decay" else 0.02)
