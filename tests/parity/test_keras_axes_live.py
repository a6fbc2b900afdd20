"""Chains of layers that make, move or join the axes of maps, in a running Keras 3 on PyTorch, and further steps of both.

Keras on PyTorch, for TensorFlow computes with the channels first on a GPU only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

import torch
from keras_chains import SHAPE, Chain, chains
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import load_keras

pytestmark = pytest.mark.slow

STEPS: Final = 3

# Runs in a process of its own, for the backend cannot be changed: builds a model of branches, trains it, saves it, and
# trains it further.
SCRIPT: Final = """
import json, sys
import keras, numpy as np

folder = sys.argv[1]
keras.config.set_floatx("float64")
keras.config.set_image_data_format("channels_first")
specification = json.load(open(f"{folder}/branches.json"))
inputs = keras.Input(specification["shape"])
outputs = []
for entries in specification["branches"]:
    x = inputs
    for class_name, config in entries:
        x = getattr(keras.layers, class_name)(**config)(x)
    outputs.append(x)
first = keras.layers.Permute((3, 1, 2))(inputs)
for name in ("one", "two"):  # with the format of the whole installation
    first = keras.layers.Conv2D(4, 2, name=f"default_{name}")(first)
first = keras.layers.Flatten()(keras.layers.MaxPooling2D(2, strides=1)(first))
outputs.append(keras.layers.Dense(2, name="default_dense")(first))
model = keras.Model(inputs, keras.layers.Add(name="sum")(outputs))
model.compile(optimizer=keras.optimizers.Adadelta(0.5), loss="mse")
data = np.load(f"{folder}/data.npz")
losses = []
for number, (x, y) in enumerate(zip(data["x"], data["y"])):
    if number == len(data["x"]) // 2:
        model.save(f"{folder}/model.h5")
        predicted = model.predict_on_batch(data["x"][0])
    losses.append(float(model.train_on_batch(x, y)))
np.savez(f"{folder}/truth.npz", predicted=predicted, losses=losses)
"""


def branches() -> list[Chain]:
    """All chains of two layers that the modules of an nn.Sequential show."""
    found = [chain for chain in chains("shown", most=2) if chain.difference() is not None]
    return [chain for chain in found if chain.torch_axes_of_input == (2, 0, 1)]


class Sum(nn.Module):
    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(models)

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches.values())


def test_all_chains_go_on_as_in_keras(tmp_path: Path) -> None:
    found = branches()
    assert len(found) > 60
    specification: list[Any] = []
    models: dict[str, nn.Module] = {}
    mapping = {}
    for number, chain in enumerate(found):
        entries = []
        units = [name for name, m in chain.model().named_children() if any(True for _ in m.parameters())]
        for entry in chain.entries[1:]:
            config = dict(entry["config"], name=f"b{number}_{entry['config']['name']}")
            config |= {"momentum": 0.9} if entry["class_name"] == "BatchNormalization" else {}
            entries.append((entry["class_name"], config))
        specification.append(entries)
        models[f"b{number}"] = chain.model().train()
        for layer, unit in zip(chain.layers, units, strict=True):
            mapping[f"b{number}_{layer.path}"] = f"branches.b{number}.{unit}"
    convs = [nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2)]
    models["default"] = nn.Sequential(*convs, nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4 * 4 * 2, 2)).double()
    for layer, unit in (("one", "0"), ("two", "1"), ("dense", "4")):
        mapping[f"default_{layer}"] = f"branches.default.{unit}"
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2 * STEPS, 4, *SHAPE)), rng.standard_normal((2 * STEPS, 4, 2))
    (tmp_path / "branches.json").write_text(json.dumps({"shape": SHAPE, "branches": specification}))
    np.savez(tmp_path / "data.npz", x=x, y=y)
    environment = {**os.environ, "KERAS_BACKEND": "torch", "KERAS_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, env=environment)

    truth = np.load(tmp_path / "truth.npz")
    model = Sum(models)
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(tmp_path / "model.h5", optimizer, model, weights=True, mapping=mapping)
    assert optimizer.iterations == STEPS
    model.eval()
    with torch.no_grad():
        actual = model(torch.from_numpy(x[0]).permute(0, 3, 1, 2)).numpy()
    # Keras on PyTorch takes some means in float32; one branch that is out of order is off by some 0.1.
    np.testing.assert_allclose(actual, truth["predicted"], rtol=0, atol=2e-5)
    model.train()
    losses = []
    for inputs, targets in zip(x[STEPS:], y[STEPS:], strict=True):
        optimizer.zero_grad()
        loss = (model(torch.from_numpy(inputs).permute(0, 3, 1, 2)) - torch.from_numpy(targets)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(list(truth["losses"][STEPS:]), rel=1e-5)
