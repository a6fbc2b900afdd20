"""torch_adadelta.keras3.Adadelta in models of Keras: training, files, configurations, and how it is imported."""

import copy
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from keras3_training import MARKS, OPTIONS, assert_same, fit, model_of, on_torch, optimizer_of

from torch_adadelta import AdadeltaKeras

pytestmark = MARKS


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@on_torch
def test_fit_as_keras_does(policy: str) -> None:
    import keras

    from torch_adadelta import keras3

    for options in ({}, {"clipnorm": 0.1, "weight_decay": 0.01, "use_ema": True, "ema_overwrite_frequency": 4}):
        models = [model_of(cls(1.0, **options), policy) for cls in (keras3.Adadelta, keras.optimizers.Adadelta)]
        ours, theirs = map(fit, models)
        assert isinstance(models[0].optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if policy == "float32" else 1e-2)
        assert ours[1] < ours[0]


@pytest.mark.slow
@on_torch
def test_fit_with_jit_compile() -> None:
    from torch_adadelta import keras3

    options = {"weight_decay": 0.01, "use_ema": True, "clipnorm": 0.5}
    jitted, plain = (model_of(keras3.Adadelta(1.0, **options), jit_compile=jit) for jit in (True, False))
    np.testing.assert_allclose(fit(jitted), fit(plain), rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@on_torch
def test_a_saved_model_goes_on_bit_for_bit(tmp_path: Path, options: str, policy: str) -> None:
    import keras

    from torch_adadelta import keras3

    model = model_of(optimizer_of(keras3.Adadelta, OPTIONS[options]), policy)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is keras3.Adadelta
    assert_same(model, loaded)
    assert fit(loaded) == fit(model)
    assert_same(model, loaded)

    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        config = json.loads(file.read("config.json"))["compile_config"]["optimizer"]
    assert config["module"] == "torch_adadelta.keras3"
    assert config["registered_name"] == "torch_adadelta>Adadelta"

    # Weights alone.
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of(optimizer_of(keras3.Adadelta, OPTIONS[options]), policy)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(model, other)
    assert fit(other) == fit(model)


@pytest.mark.parametrize("options", OPTIONS)
@on_torch
def test_each_goes_on_from_the_files_of_the_other(tmp_path: Path, options: str) -> None:
    import keras

    from torch_adadelta import keras3

    classes = (keras3.Adadelta, keras.optimizers.Adadelta)
    for one, other in (classes, classes[::-1]):
        model = model_of(optimizer_of(one, OPTIONS[options]))
        fit(model)
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
        again.compile(other.from_config(loaded.optimizer.get_config()), loss="mse")
        again.optimizer.build(again.trainable_variables)
        again.optimizer.set_weights([variable.numpy() for variable in loaded.optimizer.variables])
        assert_same(model, again)
        np.testing.assert_allclose(fit(again), fit(model), rtol=1e-5)


@on_torch
def test_a_file_of_keras_is_loaded_with_this_class(tmp_path: Path) -> None:
    import keras

    from torch_adadelta import keras3

    model = model_of(optimizer_of(keras.optimizers.Adadelta, OPTIONS["all"]))
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Adadelta": keras3.Adadelta})
    assert type(loaded.optimizer) is keras3.Adadelta
    assert_same(model, loaded)


@on_torch
def test_load_keras_and_save_keras_take_its_files(tmp_path: Path) -> None:
    import keras

    from torch_adadelta import keras3
    from torch_adadelta.keras import load_keras, save_keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    model.compile(optimizer=keras3.Adadelta(0.5, rho=0.9, clipnorm=1.0), loss="mse")
    fit(model)
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
        optimizer = AdadeltaKeras(net.named_parameters())
        load_keras(tmp_path / name, optimizer, net, weights=True)
        assert (optimizer.learning_rate, optimizer.rho, optimizer.clipnorm) == (0.5, 0.9, 1.0)
        assert optimizer.iterations == int(model.optimizer.iterations) == 12
        for i, param in enumerate(net.parameters()):
            state = optimizer.state[param]["square_avg"].numpy()
            np.testing.assert_array_equal(state.T, model.optimizer._accumulated_grads[i].numpy())
        if name.endswith(".keras"):
            save_keras(tmp_path / "back.keras", optimizer, net, tmp_path / name)
            assert_same(keras.saving.load_model(tmp_path / "back.keras"), model)


@on_torch
def test_configurations(tmp_path: Path) -> None:
    import inspect

    import keras

    from torch_adadelta import keras3

    for options in OPTIONS.values():
        ours, theirs = (optimizer_of(cls, options) for cls in (keras3.Adadelta, keras.optimizers.Adadelta))
        assert ours.get_config() == theirs.get_config()
        serialized = keras.optimizers.serialize(ours)
        for made in (
            keras3.Adadelta.from_config(ours.get_config()),
            keras.optimizers.deserialize(copy.deepcopy(serialized)),
            keras.optimizers.get(copy.deepcopy(serialized)),
            keras.saving.deserialize_keras_object(copy.deepcopy(serialized)),
        ):
            assert type(made) is keras3.Adadelta
            assert made.get_config() == ours.get_config()
        assert keras.optimizers.get(ours) is ours
    assert type(keras.optimizers.get("adadelta")) is not keras3.Adadelta
    assert issubclass(keras3.Adadelta, keras.optimizers.Adadelta)
    assert inspect.signature(keras3.Adadelta) == inspect.signature(keras.optimizers.Adadelta)


@on_torch
def test_copies_of_a_model() -> None:
    from torch_adadelta import keras3

    model = model_of(keras3.Adadelta(1.0))
    fit(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    losses = fit(model)
    for other in copies:
        assert fit(other) == losses
        assert_same(model, other)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float64", 1e-12)])
def test_the_example_has_the_numbers_of_keras(dtype: str, most: float) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "train_keras3.py"
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="needs the extra 'examples'")
    command = [sys.executable, str(example), "--epochs", "3", "--device", "cpu", "--dtype", dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "the same bits as without" in result.stdout
    distance = re.search(r"Largest relative distance .*: (\S+)", result.stdout)
    assert distance is not None
    assert float(distance[1]) < most


# ---- Importing ------------------------------------------------------------------------------------------------------


def output_of(code: str, backend: str = "torch", *, ends: bool = True) -> str:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode == 0) == ends, result.stderr
    return result.stdout if ends else result.stderr.strip().splitlines()[-1]


def test_the_package_imports_without_keras() -> None:
    code = """
import sys, torch_adadelta
assert 'keras' not in sys.modules
try:
    torch_adadelta.keras4
except AttributeError as error:
    assert "no attribute 'keras4'" in str(error)
sys.modules['keras'] = None
for _ in range(2):
    try:
        torch_adadelta.keras3
    except ImportError as error:
        assert str(error) == 'torch_adadelta.keras3 needs Keras 3: pip install keras', error
        print('refused')
import types
sys.modules['keras'] = types.ModuleType('keras')
sys.modules['keras'].__version__ = '2.15.0'
import torch_adadelta.keras3
"""
    assert output_of(code, ends=False).endswith(
        "ImportError: torch_adadelta.keras3 needs Keras 3, this is Keras 2.15.0: pip install 'keras>=3'"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="needs the extra 'parity'")
def test_another_backend_is_refused_by_name() -> None:
    """When the optimizer is made, so that a program for several backends can import the class, and load models."""
    code = (
        "import keras, torch_adadelta\ncls = torch_adadelta.keras3.Adadelta\n"
        "assert issubclass(cls, keras.optimizers.Adadelta)\ncls(1.0)"
    )
    error = output_of(code, "tensorflow", ends=False)
    assert error.startswith(
        "RuntimeError: torch_adadelta.keras3.Adadelta is for Keras' torch backend, and the backend is tensorflow"
    )
    assert "KERAS_BACKEND=torch" in error
