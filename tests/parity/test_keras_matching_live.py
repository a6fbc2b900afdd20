"""Subclassed models that a running Keras saved, and the weights of CuDNN layers as tf_keras converts them."""

import re
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

import keras_table_models as models
from keras_memory import checkpoint_of, layer_of
from keras_table import TOLERANCE, Job, train

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, load_keras
from torch_adadelta.keras.matching import match
from torch_adadelta.keras.state_order import natural
from torch_adadelta.keras.transfer import _assembled

pytestmark = pytest.mark.xdist_group("tensorflow")

GENERATIONS: Final = ("legacy", "new", "keras3")


@pytest.fixture(autouse=True)
def _unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are ours: no process has to look first whether HDF5 survives them."""
    monkeypatch.setattr("torch_adadelta.keras.hdf5.read_in_sandbox", lambda path, data=None: None)


def subclassed(K: Any, generation: str) -> Any:
    """Two parts of the same shapes, trained for a step."""

    class Part(K.layers.Layer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.up, self.down = K.layers.Dense(5), K.layers.Dense(5)
            self.norm = K.layers.LayerNormalization(epsilon=1e-3)

        def call(self, x: Any) -> Any:
            return self.norm(self.down(self.up(x)))

    class Both(K.Model):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.head = Part(), Part(), K.layers.Dense(1)

        def call(self, x: Any) -> Any:
            return self.head(self.decoder(self.encoder(x)))

    model = Both()
    model(np.zeros((1, 5)))
    rng = np.random.default_rng(0)
    model.set_weights([rng.standard_normal(weight.shape) for weight in model.get_weights()])
    model.compile(optimizer=models.optimizer_of(K, generation), loss="mse")
    models.trained(model, generation, [(rng.standard_normal((6, 5)), rng.standard_normal((6, 1)))])
    return model


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x)))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = Part(), Part(), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.decoder(self.encoder(x)))


class Renamed(Both):
    """The same in the same order, with other names."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.one, self.two, self.out = Part(), Part(), nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.two(self.one(x)))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_subclassed_model(generation: str, tmp_path: Path) -> None:
    with models.precision(generation, "subclassed") as K:
        theirs = subclassed(K, generation)
        files = [models.save(theirs, "checkpoint", tmp_path)]
        if generation != "legacy":
            files += [models.save(theirs, kind, tmp_path) for kind in ("keras", "weights.h5")]
        rng = np.random.default_rng(1)
        x = rng.standard_normal((4, 5))
        expected, state = np.array(theirs(x)), models.state_of(theirs, generation)
        data = [(rng.standard_normal((6, 5)), rng.standard_normal((6, 1))) for _ in range(3)]
        losses = models.trained(theirs, generation, data)
    mappings = {"encoder": "one", "decoder": "two"}
    for path in files:
        order = {} if path == files[0] else {"state_order": state_order_of(path)}
        ways: list[tuple[Any, dict[str, Any]]] = [(Both, {"match": how}) for how in ("order", "order_within_kind")]
        ways += [(Renamed, {"match": how}) for how in ("order", "order_within_kind")]
        if path == files[0] or generation == "keras3":  # which have the names of attributes
            ways += [(Both, {}), (Renamed, {"mapping": mappings, "match": "order_within_kind"})]
        for cls, options in ways:
            ours = cls().double()
            optimizer = AdadeltaKeras(ours.named_parameters(), learning_rate=0.5, rho=0.9, epsilon=1e-6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_keras(path, optimizer, ours, weights=True, **order, **options)
            outputs = ours(torch.from_numpy(x)).detach().numpy()
            np.testing.assert_allclose(outputs, expected, rtol=1e-9, atol=1e-12, err_msg=f"{path} {cls} {options}")
            found = torch.cat([s["square_avg"].flatten() for s in optimizer.state.values()])
            np.testing.assert_array_equal(np.sort(found.numpy()), state["square_avg"])
            job = Job(ours, optimizer, options, [])
            assert train(job, *zip(*data, strict=True)) == pytest.approx(losses, rel=TOLERANCE[generation])
        ours = Renamed().double()
        with pytest.raises(KerasFileError, match="cannot be told"):
            load_keras(path, AdadeltaKeras(ours.named_parameters()), ours, **order)


def state_order_of(path: Path) -> list[str]:
    """The order in which the layers were made, in the names that the error lists."""
    ours = Both().double()
    with pytest.raises(KerasFileError, match="state_order=") as caught:
        load_keras(path, AdadeltaKeras(ours.named_parameters()), ours)
    lines = str(caught.value).partition("weights:\n")[2].partition("\nshapes")[0].splitlines()
    names = [line.split()[0] for line in lines]
    head = [name for name in names if name.count("/") == 1]
    parts = list(dict.fromkeys(name.split("/")[0] for name in names if name not in head))
    if "encoder" in parts:  # Keras 3 has the names of layers in it: dense_3, …
        parts, layers = ["encoder", "decoder"], ["dense", "layer_normalization"]
    else:  # tf_keras those of attributes
        layers = ["up", "down", "norm"]
    found = []
    for part in sorted(parts) if layers[0] == "up" else parts:
        own = [name for name in names if name.startswith(f"{part}/")]
        found += sorted(own, key=lambda name: [layers.index(re.sub(r"_\d+$", "", name.split("/")[1])), natural(name)])
    return found + head


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_weights_of_cudnn_layers_are_those_that_tf_keras_converts(kind: str, gates: int) -> None:
    from tf_keras.src.saving.legacy.hdf5_format import _convert_rnn_weights

    with models.precision("legacy", "recurrent") as K:
        rng = np.random.default_rng(0)
        units, inputs = 3, 4
        shapes = {"kernel": (inputs, gates * units), "recurrent_kernel": (units, gates * units)}
        weights = {
            role: rng.standard_normal(shape) for role, shape in (shapes | {"bias": (2 * gates * units,)}).items()
        }
        layer = getattr(K.layers, kind)(units, return_sequences=True)
        layer.build((None, None, inputs))
        layer.set_weights(_convert_rnn_weights(layer, list(weights.values())))
        x = rng.standard_normal((2, 7, inputs))
        expected = np.array(layer(x))
        converted = dict(zip(weights, layer.get_weights(), strict=True))
    module = getattr(nn, kind)(inputs, units, batch_first=True).double()
    checkpoint = checkpoint_of(None, [layer_of("r", f"CuDNN{kind}", {}, weights)])
    for tensor, array in _assembled(match(checkpoint, module), checkpoint, "value"):
        tensor.data.copy_(torch.from_numpy(array))
    np.testing.assert_allclose(module(torch.from_numpy(x))[0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    # What is moved is what Keras moves, bit by bit, so that it is right for the state, too.
    if kind == "GRU":
        plain = getattr(nn, kind)(inputs, units, batch_first=True).double()
        checkpoint = checkpoint_of(None, [layer_of("r", kind, {}, converted)])
        for tensor, array in _assembled(match(checkpoint, plain), checkpoint, "value"):
            tensor.data.copy_(torch.from_numpy(array))
        assert all(map(torch.equal, module.parameters(), plain.parameters()))
    else:
        np.testing.assert_array_equal(
            (module.bias_ih_l0 + module.bias_hh_l0).detach().numpy(), converted["bias"], strict=True
        )
