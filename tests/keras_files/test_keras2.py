"""Files of standalone Keras 2 and of TensorFlow 1: what they hold, how training goes on, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import h5py
from keras_stored import (
    DATA,
    Net,
    assert_is,
    assert_same_datasets,
    convolutional,
    dense,
    load,
    sequential,
    unpacked,
    written_config,
)

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.keras import KerasFileError, freeze_second_biases, load_keras, save_keras
from torch_adadelta.keras.__main__ import main
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.contents import KERAS2, TF1

OLD: Final = DATA / "old"

# What the Keras that wrote a file goes on with: iterations, clipnorm, global_clipnorm, epsilon; and how exact its next
# losses are. Keras 2.2.4 on TensorFlow reads variables that other operations of the same run write.
RECORDED: Final = {
    "keras-2.0.8": (0, None, 1.0, 1e-8, 2e-5),
    "keras-2.2.4": (0, None, 1.0, 1e-7, 1e-3),
    "keras-2.2.4-theano": (0, None, 1.0, 1e-7, 2e-5),
    "keras-2.3.1": (5, None, 1.0, 1e-7, 2e-5),
    "tf-1.15": (5, 1.0, None, 1e-7, 2e-5),
}


def losses(
    model: nn.Module, optimizer: AdadeltaKeras, inputs: list[Tensor], targets: Tensor, steps: int
) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(*inputs), targets)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def states_of(truth: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Accumulators and delta accumulators, in the order of the trainable weights."""
    arrays = [truth[key] for key in truth.files if key.startswith("optimizer:")]
    arrays = arrays[len(arrays) % 2 :]  # without the iterations
    return arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]


@pytest.mark.parametrize("name", RECORDED)
def test_a_job_of_old_keras_goes_on_as_there(name: str, tmp_path: Path) -> None:
    path, truth = OLD / f"{name}.h5", np.load(OLD / f"{name}.npz")
    iterations, clipnorm, global_clipnorm, epsilon, tolerance = RECORDED[name]
    model = convolutional()
    optimizer = AdadeltaKeras(model.named_parameters())
    report = load_keras(path, optimizer, model, weights=True)
    x, y = torch.from_numpy(truth["x"]).permute(0, 3, 1, 2), torch.from_numpy(truth["y"])
    model.eval()
    np.testing.assert_allclose(model(x[:4]).detach().numpy(), truth["predict"], atol=1e-5, rtol=0)
    assert optimizer.iterations == iterations == truth["iterations_after_reload"] - 6
    assert (optimizer.clipnorm, optimizer.global_clipnorm) == (clipnorm, global_clipnorm)
    assert (optimizer.learning_rate, optimizer.decay) == (1.0, float(np.float32(1e-3)))
    assert (optimizer.epsilon, float(np.float32(optimizer.rho))) == (epsilon, float(np.float32(0.95)))
    notes = " ".join(report.notes)
    assert ("clipnorm=1.0 is the norm of all gradients together" in notes) == (clipnorm is None)
    assert ("there are no iterations in the file" in notes) == (iterations == 0)
    with opened(path) as checkpoint:
        assert checkpoint.generation == (TF1 if name == "tf-1.15" else KERAS2)
        variables = [variable for _, variable in checkpoint.variables() if "moving" not in variable.role]
        for variable, *arrays in zip(variables, *states_of(truth), strict=True):
            for stored, array in zip((variable.square_avg, variable.acc_delta), arrays, strict=True):
                assert stored is not None
                is_turned = "theano" in name and array.ndim == 4
                np.testing.assert_array_equal(stored.read(), array[::-1, ::-1] if is_turned else array, strict=True)
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    assert_same_datasets(path, tmp_path / "back.h5")
    assert written_config(tmp_path / "back.h5") == written_config(path)
    model.train()
    inputs, targets = [x[40:48]], y[40:48]
    found = losses(model, optimizer, inputs, targets, 6)
    np.testing.assert_allclose(found, truth["losses_after_reload"], rtol=tolerance)
    # The way back, after some training.
    report = save_keras(tmp_path / "back.h5", optimizer, model, path)
    no_place = ["the file has no place for iterations=6; this Keras goes on from 0, its decay too"]
    assert report.notes == (no_place if iterations == 0 else [])
    again = convolutional()
    other = AdadeltaKeras(again.named_parameters())
    load_keras(tmp_path / "back.h5", other, again, weights=True)
    assert other.iterations == (0 if iterations == 0 else 11)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key in ("square_avg", "acc_delta"):
            assert torch.equal(optimizer.state[ours][key], other.state[theirs][key])


@pytest.mark.parametrize("name", RECORDED)
def test_the_command_works_on_old_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(OLD / f"{name}.h5")]) == 0
    shown = capsys.readouterr().out
    assert ("0, for the file has none" in shown) == (RECORDED[name][0] == 0)
    assert ("note: clipnorm=1.0 is the norm of all gradients together" in shown) == (name != "tf-1.15")
    assert main(["convert", str(OLD / f"{name}.h5"), str(tmp_path / "m.pt")]) == 0
    model = convolutional()
    load_keras(OLD / f"{name}.h5", AdadeltaKeras(model.named_parameters()), model, weights=True)
    assert torch.equal(torch.load(tmp_path / "m.pt")["weights.conv.weight"], model[0].weight)


# ---- Nested models, shared and frozen layers, models that were loaded before they were saved ------------------------


class Siamese(nn.Module):
    """An encoder that is called twice, in which one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.ea, self.en = nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-3, momentum=0.01)
        self.eb, self.ec = nn.Linear(4, 4), nn.Linear(4, 4)
        self.h, self.o = nn.Linear(8, 4), nn.Linear(4, 4)
        self.eb.requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        return self.ec(torch.tanh(self.eb(self.en(torch.tanh(self.ea(x))))))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.o(torch.tanh(self.h(torch.cat([self.encode(a), self.encode(b)], -1))))


class Frozen(Siamese):
    """One more layer is frozen, for which there is state."""

    def __init__(self) -> None:
        super().__init__()
        self.ea.requires_grad_(False)


class Embedding(nn.Module):
    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 3, sparse=is_sparse)
        self.bi = nn.LSTM(3, 3, batch_first=True, bidirectional=True)
        self.o = nn.Linear(6, 2)
        freeze_second_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.cat([*self.bi(self.e(x))[1][0]], -1))


def nested() -> nn.Sequential:
    layers = [nn.Linear(3, 3) for _ in range(6)]
    return nn.Sequential(
        layers[0], nn.Tanh(), nn.Sequential(layers[1], nn.Tanh(), nn.Sequential(layers[2], nn.Tanh(), layers[3]), layers[4]), layers[5]
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files by keras_old_models.py."""
    return unpacked("old/nested.tar.xz", tmp_path_factory.mktemp("old"))


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {"siamese": Siamese, "frozen": Frozen, "nested": nested}


@pytest.mark.parametrize("version", ["keras-2.0.8", "keras-2.2.4", "keras-2.3.1", "tf-1.15"])
@pytest.mark.parametrize("name", ["siamese", "frozen", "nested", "embedding"])
def test_each_state_finds_its_weight(name: str, version: str, folder: Path, tmp_path: Path) -> None:
    path, truth = folder / version / f"{name}.h5", np.load(folder / version / f"{name}.npz")
    trained = list(truth["names"])
    by_value = {truth[key].tobytes(): key.split(":", 2)[2] for key in truth.files if key.startswith("weight:")}
    square_avgs, acc_deltas = states_of(truth)
    with opened(path) as checkpoint:
        for layer, variable in checkpoint.variables():
            if not (own := variable.value.read()).any() or (own == own.flat[0]).all():
                continue  # a bias that was not trained has no value of its own
            full = by_value[own.tobytes()]
            assert variable.has_state == (full in trained), (layer.path, variable.role)
            if full in trained:
                assert variable.square_avg is not None
                assert variable.acc_delta is not None
                place = trained.index(full)
                np.testing.assert_array_equal(variable.square_avg.read(), square_avgs[place], strict=True)
                np.testing.assert_array_equal(variable.acc_delta.read(), acc_deltas[place], strict=True)
    model = Embedding(is_sparse=version == "tf-1.15") if name == "embedding" else MODELS[name]()
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True)
    inputs = [torch.from_numpy(truth[key]) for key in truth.files if key.startswith("x")]
    model.eval()
    np.testing.assert_allclose(model(*inputs).detach().numpy(), truth["predict"], atol=1e-5, rtol=0)
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    assert_same_datasets(path, tmp_path / "back.h5")
    model.train()
    if name != "frozen":
        found = losses(model, optimizer, inputs, torch.from_numpy(truth["y"]), 5)
        tolerance = 1e-3 if version == "keras-2.2.4" else 2e-5
        np.testing.assert_allclose(found, truth["losses"], rtol=tolerance)
        assert optimizer.iterations == truth["iterations"]


# ---- By rule ---------------------------------------------------------------------------------------------------------


def write_keras2(
    path: Path,
    layers: dict[str, dict[str, np.ndarray]],
    config: Any,
    *,
    trained: list[str] | None = None,
    backend: str = "tensorflow",
    names: str = "training/Adadelta/Variable_{}:0",
    **options: Any,
) -> Path:
    """A file as Keras 2.2.4 writes it. A state is the square of its weight, and half of it.

    Args:
        path: the file.
        layers: the weights by the names of their layers.
        config: of the model.
        trained: the layers that have state, in their order; None for all.
        backend: of Keras.
        names: what the states are called.
        options: of the optimizer.
    """
    given = {"lr": 1.0, "rho": 0.95, "decay": 0.0, "epsilon": 1e-7, **options}
    training = {"optimizer_config": {"class_name": "Adadelta", "config": given}, "loss": "mse"}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = b"2.2.4", backend.encode()
        file.attrs["training_config"] = json.dumps(training).encode()
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        file.create_group("model_weights").attrs["layer_names"] = [name.encode() for name in layers]
        for layer, weights in layers.items():
            group = file["model_weights"].create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in weights]
            for name, value in weights.items():
                group[f"{layer}/{name}:0"] = value
        values = [v for name in trained or layers for k, v in layers[name].items() if not k.startswith("moving")]
        states = [value**2 for value in values] + [value**2 / 2 for value in values]
        group = file.create_group("optimizer_weights")
        group.attrs["weight_names"] = [names.format(number).encode() for number in range(len(states))]
        for number, state in enumerate(states):
            group[names.format(number)] = state
    return path


def two_dense(tmp_path: Path, **options: Any) -> Path:
    layers = {"a": dense(3, 3, 1), "b": dense(3, 3, 2)}
    return write_keras2(tmp_path / "m.h5", layers, sequential(("a", "Dense", {}), ("b", "Dense", {})), **options)


@pytest.mark.parametrize("names", ["training/Adadelta/variable_{}", "training_3/Adadelta/Variable_{}:0", "param_{}", "a/b/Variable:0_{}"])  # fmt: skip
def test_names_of_nameless_state(names: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = load(two_dense(tmp_path, names=names), model)
    for seed, layer in enumerate(model, 1):
        assert_is(layer.weight, dense(3, 3, seed)["kernel"].T)
        assert_is(optimizer.state[layer.weight]["square_avg"], dense(3, 3, seed)["kernel"].T ** 2)
        assert_is(optimizer.state[layer.bias]["acc_delta"], dense(3, 3, seed)["bias"] ** 2 / 2)


def test_accumulators_have_one_order(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    path.write_bytes((OLD / "keras-2.3.1.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        names = list(file["optimizer_weights"].attrs["weight_names"])
        names[1], names[11] = names[11], names[1]
        file["optimizer_weights"].attrs["weight_names"] = names
    with pytest.raises(KerasFileError, match="an accumulator behind a delta accumulator"), opened(path):
        pass


def test_an_order_that_is_open_is_asked_for(tmp_path: Path) -> None:
    """One of two equal layers has state, and either may have been frozen."""
    layers = {"a": dense(3, 3, 1), "b": dense(3, 3, 2)}
    path = write_keras2(tmp_path / "m.h5", layers, None, trained=["b"])
    with pytest.raises(KerasFileError, match="several orders of them fit") as caught, opened(path):
        pass
    assert "b/kernel (3, 3)" in str(caught.value)
    with opened(path, state_order=["b/kernel", "b/bias"]) as checkpoint:
        assert [variable.has_state for _, variable in checkpoint.variables()] == [False, False, True, True]
    with (
        pytest.raises(KerasFileError, match="state_order has 1 weights, which do not fit"),
        opened(path, state_order=["b/kernel"]),
    ):
        pass
    # That one is frozen by now does not tell whether it was; that it was not, does.
    config = sequential(("a", "Dense", {"trainable": False}), ("b", "Dense", {}))
    with opened(path, config) as checkpoint:
        assert [variable.has_state for _, variable in checkpoint.variables()] == [False, False, True, True]
    with (
        pytest.raises(KerasFileError, match="no order of them fits"),
        opened(path, sequential(("a", "Dense", {}), ("b", "Dense", {}))),
    ):
        pass
    with (
        pytest.raises(KerasFileError, match="which layer of its model b is cannot be told"),
        opened(path, sequential(("a", "Dense", {}))),
    ):
        pass
    with (
        pytest.raises(KerasFileError, match="state_order is for files that number the state"),
        opened(OLD / "tf-1.15.h5", state_order=["conv/kernel"]),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "expected", "note"),
    [
        ({"clipnorm": 0.5}, {"global_clipnorm": 0.5}, "clipnorm=0.5 is the norm of all gradients together"),
        ({"clipnorm": 0.0}, {}, "clipnorm=0.0 means no clipping"),
        ({"clipvalue": -1}, {}, "clipvalue=-1 means no clipping"),
        ({"clipvalue": 0.5}, {"clipvalue": 0.5}, ""),
        ({"clipvalue": 0.5, "clipnorm": 0}, {"clipvalue": 0.5}, "clipnorm=0 means no clipping"),
        ({"epsilon": None}, {}, ""),
        ({"epsilon": 1e-8, "decay": 0.5, "lr": 0.25}, {"epsilon": 1e-8, "decay": 0.5, "learning_rate": 0.25}, ""),
    ],
)
def test_options_of_keras_2(options: dict[str, Any], expected: dict[str, Any], note: str, tmp_path: Path) -> None:
    path = two_dense(tmp_path, **options)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = AdadeltaKeras(model.named_parameters(), clipnorm=3.0, epsilon=1e-3)
    report = load_keras(path, optimizer, model, weights=True)
    default = {
        "clipnorm": None,
        "clipvalue": None,
        "global_clipnorm": None,
        "epsilon": 1e-7,
        "decay": 0.0,
        "learning_rate": 1.0,
    }
    assert {name: getattr(optimizer, name) for name in default} == {**default, **expected}
    assert any(note in own for own in report.notes)
    # What goes back is what Keras 2 knows.
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    written = written_config(tmp_path / "back.h5")
    assert written.keys() <= {"lr", "rho", "decay", "epsilon", "clipnorm", "clipvalue"}
    assert (written.get("clipnorm"), written.get("clipvalue")) == (optimizer.global_clipnorm, optimizer.clipvalue)
    assert None not in written.values()


def test_clipping_in_another_order_is_refused(tmp_path: Path) -> None:
    path = two_dense(tmp_path, clipnorm=1.0, clipvalue=0.5)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = AdadeltaKeras(model.named_parameters())
    with pytest.raises(KerasFileError, match=r"clipnorm=1\.0 and clipvalue=0\.5.*hyperparameters=False"):
        load_keras(path, optimizer, model, weights=True)
    assert not optimizer.state
    load_keras(path, optimizer, model, weights=True, hyperparameters=False)
    optimizer.clipvalue, optimizer.global_clipnorm = 0.5, 1.0
    with pytest.raises(ValueError, match="global_clipnorm and clipvalue, and clips by value first"):
        save_keras(tmp_path / "back.h5", optimizer, model, path)


def test_what_keras_2_does_not_know_is_not_written(tmp_path: Path) -> None:
    path = two_dense(tmp_path)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    for options, message in (
        ({"clipnorm": 1.0}, "clipnorm=1.0, the norm of each gradient by itself"),
        ({"global_clipnorm": 0.0}, "global_clipnorm=0, which means no clipping"),
        ({"weight_decay": 0.1}, "weight_decay=0.1, which this Keras does not have"),
        ({"use_ema": True}, "no place for moving averages"),
        ({"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5)}, "is a schedule, and that of"),
        ({"loss_scale_factor": 2.0}, "loss_scale_factor=2.0, which this Keras does not have"),
    ):
        optimizer = AdadeltaKeras(model.named_parameters(), **options)
        with pytest.raises(ValueError, match=message):
            save_keras(tmp_path / "back.h5", optimizer, model, path)
        assert not (tmp_path / "back.h5").exists()
    own = convolutional()
    optimizer = AdadeltaKeras(own.named_parameters(), global_clipnorm=1.0)
    with pytest.raises(ValueError, match=r"global_clipnorm=1\.0, which this Keras does not have"):
        save_keras(tmp_path / "back.h5", optimizer, own, OLD / "tf-1.15.h5")


def test_an_epsilon_of_0_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    with pytest.raises(KerasFileError, match="epsilon=0, which stays 0 in this Keras"):
        load(two_dense(tmp_path, epsilon=0), model)


def test_theano_turns_the_kernels_that_it_convolves_with(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernels = {
        "one": ("Conv1D", (3, 2, 2)), "two": ("Conv2D", (3, 2, 2, 2)), "three": ("Conv3D", (3, 2, 2, 2, 2)),
        "up": ("Conv2DTranspose", (3, 2, 2, 2)), "mine": ("Mine", (3, 2, 2)),
    }  # fmt: skip
    layers = {name: {"kernel": rng.standard_normal(shape)} for name, (_, shape) in kernels.items()}
    layers["each"] = {"depthwise_kernel": rng.standard_normal((3, 2, 2, 1))}
    config = sequential(*((name, cls, {}) for name, (cls, _) in kernels.items()), ("each", "DepthwiseConv2D", {}))
    path = write_keras2(tmp_path / "m.h5", layers, config, backend="theano")
    with opened(path) as checkpoint:
        for layer, variable in checkpoint.variables():
            (array,) = layers[layer.path].values()
            is_turned = layer.path not in ("each", "mine")
            expected = np.flip(array, tuple(range(array.ndim - 2))) if is_turned else array
            assert variable.square_avg is not None
            np.testing.assert_array_equal(variable.value.read(), expected)
            np.testing.assert_array_equal(variable.square_avg.read(), expected**2)
        assert any("mine/kernel of class Mine is taken as it is" in note for note in checkpoint.notes)
    bare = write_keras2(tmp_path / "bare.h5", layers, None, backend="theano")
    with pytest.raises(KerasFileError, match=r"turned by 180.*config=model\.to_json"), opened(bare):
        pass
    # As in a model of PyTorch, and back.
    only = {name: layers[name] for name in ("one", "two")}
    path = write_keras2(
        tmp_path / "m.h5", only, sequential(("one", "Conv1D", {}), ("two", "Conv2D", {})), backend="theano"
    )
    model = Net(one=nn.Conv1d(2, 2, 3, bias=False), two=nn.Conv2d(2, 2, (3, 2), bias=False))
    optimizer = load(path, model)
    assert_is(model.one.weight, layers["one"]["kernel"][::-1].transpose(2, 1, 0))
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    assert_same_datasets(path, tmp_path / "back.h5")


def test_a_sequential_may_be_a_list_and_have_no_name(tmp_path: Path) -> None:
    """As before Keras 2.2.3."""
    inner = [{"class_name": "Dense", "config": {"name": name}} for name in ("p", "q")]
    entries = [{"class_name": "Sequential", "config": inner}, {"class_name": "Dense", "config": {"name": "last"}}]
    layers = {"sequential_7": {}, "last": dense(3, 3, 3)}
    path = write_keras2(tmp_path / "m.h5", layers, {"class_name": "Sequential", "config": entries}, trained=["last"])
    with h5py.File(path, "r+") as file:
        group = file["model_weights/sequential_7"]
        values = [value for seed in (1, 2) for value in dense(3, 3, seed).values()]
        group.attrs["weight_names"] = [f"{name}/{role}:0".encode() for name in "pq" for role in ("kernel", "bias")]
        for name, value in zip(group.attrs["weight_names"], values, strict=True):
            group[name] = value
        values += layers["last"].values()
        del file["optimizer_weights"]
        states = file.create_group("optimizer_weights")
        states.attrs["weight_names"] = [f"Variable_{number}:0".encode() for number in range(12)]
        for number, value in enumerate([*values, *values]):
            states[f"Variable_{number}:0"] = value**2
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    optimizer = load(path, model)
    for seed, layer in enumerate(model, 1):
        assert_is(optimizer.state[layer.weight]["square_avg"], dense(3, 3, seed)["kernel"].T ** 2)
    with opened(path) as checkpoint:
        assert [layer.path for layer in checkpoint.layers] == ["sequential_7/p", "sequential_7/q", "last"]


def test_files_of_keras_1_say_what_to_do(tmp_path: Path) -> None:
    path = two_dense(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"] = b"1.2.2"
    with pytest.raises(KerasFileError, match=r"saved by Keras 1\.2\.2; load it in Keras 2\.2\.4"), opened(path):
        pass
