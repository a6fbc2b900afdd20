"""A job of Keras 3 on PyTorch that uses all that Keras 3 adds to Adadelta, goes on in PyTorch, and back in Keras."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

import torch
from torch import nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import load_keras, save_keras

pytestmark = pytest.mark.slow

PART: Final = 7  # calls in Keras, in PyTorch, and in Keras again; the first and the last end amid an accumulation
BATCH: Final = 8

OPTIONS: Final[dict[str, Any]] = {
    "learning_rate": 1.0, "weight_decay": 0.01, "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 4, "loss_scale_factor": 16.0, "clipnorm": 0.5,
}  # fmt: skip

HOW: Final[dict[str, Any]] = {"match": "order", "flatten": "channels_last"}

# Runs in a process of its own, for the backend cannot be changed. What `train_on_batch` returns is a mean over all of
# its calls, if the metrics are not reset.
SCRIPT: Final = """
import json, sys
import keras, numpy as np

folder, part, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
data = np.load(f"{folder}/data.npz")

def build():
    keras.utils.set_random_seed(0)
    layers = [keras.Input((6, 3)), keras.layers.Conv1D(4, 3, activation="tanh"), keras.layers.GRU(3)]
    model = keras.Sequential([*layers, keras.layers.Dense(2)])
    optimizer = keras.optimizers.Adadelta(**options)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer=optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model

def train(model, number):
    found = []
    for at in range(number * part, (number + 1) * part):
        model.reset_metrics()
        found.append(float(model.train_on_batch(data["x"][at], data["y"][at])))
    return found

def everything(model, name):
    arrays = {f"v{n:03}": np.array(v) for n, v in enumerate([*model.weights, *model.optimizer.variables])}
    np.savez(f"{folder}/{name}.npz", **arrays)

if sys.argv[4] == "begin":
    model = build()
    losses = train(model, 0)
    model.save(f"{folder}/job.keras")
    model.save_weights(f"{folder}/job.weights.h5")
    losses += train(model, 1)
    everything(model, "handed_back")
    losses += train(model, 2)
    everything(model, "end")
    json.dump(losses, open(f"{folder}/losses.json", "w"))
    model.fit(data["x"][0], data["y"][0], verbose=0)
    model.save_weights(f"{folder}/fitted.weights.h5")
else:
    found = {}
    for kind in ("keras", "weights.h5"):
        model = build()
        model.load_weights(f"{folder}/back.{kind}")
        everything(model, f"back.{kind}")
        found[kind] = train(model, 2)
        everything(model, f"end.{kind}")
    json.dump(found, open(f"{folder}/went_on.json", "w"))
    model = keras.saving.load_model(f"{folder}/back.keras")  # whose optimizer is that of the file, and excludes nothing
    everything(model, "loaded")
    config = model.optimizer.get_config()
    assert {name: config[name] for name in options} == options
"""


def in_keras(folder: Path, what: str) -> None:
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(folder)}
    arguments = [str(folder), str(PART), json.dumps(OPTIONS), what]
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True, env=environment)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.gru = nn.GRU(4, 3, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.out(self.gru(maps)[0][:, -1])


def load(path: Path) -> tuple[Net, AdadeltaKeras]:
    """A .keras file has all options, and a .weights.h5 file the learning rate."""
    model = Net()
    own = {**OPTIONS, "learning_rate": 0.5} if path.name.endswith(".weights.h5") else {}
    optimizer = AdadeltaKeras(model.named_parameters(), **own)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*not in the file, so that training goes on")
        load_keras(path, optimizer, model, weights=True, **HOW)
    assert {name: getattr(optimizer, name) for name in OPTIONS} == OPTIONS
    return model, optimizer


def assert_close(found: Path, expected: Path) -> None:
    one, other = np.load(found), np.load(expected)
    assert one.files == other.files
    for name in one.files:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=2e-6, err_msg=name)


def test_a_job_goes_on_amid_an_accumulation_and_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3 * PART, BATCH, 6, 3)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :, 0, :2] * x[:, :, 1, :2])
    in_keras(tmp_path, "begin")
    losses = json.loads((tmp_path / "losses.json").read_text())
    data = np.load(tmp_path / "data.npz")
    for kind in ("keras", "weights.h5"):
        path = tmp_path / f"job.{kind}"
        model, optimizer = load(path)
        assert (optimizer.learning_rate, optimizer.iterations) == (1.0, PART // 4)
        assert optimizer.param_groups[0]["iterations"] == PART
        found = []
        for inputs, targets in zip(data["x"][PART : 2 * PART], data["y"][PART : 2 * PART], strict=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
            optimizer.scale_loss(loss).backward()
            optimizer.step()
            found.append(loss.item())
        assert found == pytest.approx(losses[PART : 2 * PART], rel=1e-5)
        save_keras(tmp_path / f"back.{kind}", optimizer, model, path, drop={"exclusions"}, **HOW)
    in_keras(tmp_path, "go on")
    for kind, went_on in json.loads((tmp_path / "went_on.json").read_text()).items():
        assert_close(tmp_path / f"back.{kind}.npz", tmp_path / "handed_back.npz")
        assert went_on == pytest.approx(losses[2 * PART :], rel=1e-5)
        assert_close(tmp_path / f"end.{kind}.npz", tmp_path / "end.npz")
    assert_close(tmp_path / "loaded.npz", tmp_path / "handed_back.npz")
    # What `fit` leaves are the averages.
    model, optimizer = load(tmp_path / "fitted.weights.h5")
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["average"], param.detach())
