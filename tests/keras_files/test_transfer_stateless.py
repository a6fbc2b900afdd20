"""`load_keras` with ``state=False``: the weights, from files of any optimizer or none; see keras_stateless_models.py."""

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

from keras_stored import (
    DATA,
    Net,
    assert_is,
    build,
    dense,
    edited,
    recurrent,
    sequential,
    unpacked,
    with_options,
    write_h5,
)
from keras_table import GENERATIONS

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, Report, freeze_second_biases, load_keras
from torch_adadelta.step import averages

OPTIMIZERS: Final = (
    "none",
    "Adadelta",
    "Adam",
    "SGD",
    "RMSprop",
)  # SGD in a LossScaleOptimizer; all but Adadelta trained
UNKNOWN: Final = "its optimizer is not known to be Adadelta; neither its state nor its hyperparameters were read"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("stateless.tar.xz", tmp_path_factory.mktemp("stateless"))


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def stepped(model: nn.Module, **options: Any) -> AdadeltaKeras:
    """An optimizer that took a step."""
    optimizer = AdadeltaKeras(model.named_parameters(), **options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def load(path: Path, optimizer: AdadeltaKeras, model: nn.Module, **options: Any) -> Report:
    """The weights, and no warning but that on options which are not in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not in the file, so that training goes on")
        return load_keras(path, optimizer, model, weights=True, state=False, **options)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_come_from_a_file_of_any_optimizer(name: str, generation: str, files: Path) -> None:
    expected = np.load(files / generation / "truth.npz")
    paths = [path for path in (files / generation / name).iterdir() if path.suffix in (".h5", ".keras", ".index")]
    assert len(paths) == {"tf24": 4, "legacy": 5, "new": 6, "keras3": 4}[generation]
    for path in paths:
        model = chain()
        optimizer = stepped(model, learning_rate=0.125)
        state = {param: {key: t.clone() for key, t in own.items()} for param, own in optimizer.state.items()}
        with pytest.raises(KerasFileError, match="pass state=False and weights=True to load the weights alone"):
            load_keras(path, optimizer, model, weights=True, config=str(expected["config"]))
        report = load(path, optimizer, model, config=str(expected["config"]))
        for index, param in enumerate(model.parameters()):
            np.testing.assert_array_equal(param.detach().numpy().T, expected[str(index)], strict=True)
            assert optimizer.state[param].keys() == state[param].keys()
            assert all(torch.equal(tensor, state[param][key]) for key, tensor in optimizer.state[param].items())
        assert optimizer.iterations == 1
        is_whole = path.name in ("model.h5", "model.keras") and (path.suffix, generation) != (".keras", "keras3")
        has_name = generation == "keras3" and path.suffix in (".h5", ".keras")
        if name == "none" or not (is_whole or has_name):
            assert report.notes[0] == UNKNOWN
        elif name == "Adadelta":
            assert "neither the state nor the iterations of its Adadelta were read" in report.notes
        else:
            theirs = name if is_whole else {"RMSprop": "rm_sprop"}.get(name, name.lower())
            message = f"its optimizer is {theirs}, not Adadelta; neither its state nor its hyperparameters were read"
            assert report.notes[0] == message
        assert optimizer.learning_rate == (0.5 if name == "Adadelta" and (is_whole or has_name) else 0.125)
        assert len([note for note in report.notes if "loss scale" in note]) == (
            name == "SGD" and path.name != "alone.h5" and (path.name, generation) != ("model.weights.h5", "legacy")
        )


@pytest.mark.parametrize(
    "name", ["tf24.h5", "tf24_tfck/w", "legacy_tfck2/c-1", "new.keras", "new_tfck/w", "k3.weights.h5"]
)
def test_a_file_with_state_gives_its_weights_and_options(name: str) -> None:
    model, optimizer = build(learning_rate=0.125, rho=0.5)
    report = load(DATA / name, optimizer, model)
    other, full = build(learning_rate=0.125, rho=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = load_keras(DATA / name, full, other, weights=True)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert report.hyperparameters == whole.hyperparameters
    assert [getattr(optimizer, key) for key in whole.hyperparameters] == list(whole.hyperparameters.values())
    assert (optimizer.iterations, dict(optimizer.state), full.iterations) == (0, {}, 4)
    assert {move[3] for move in report.moves} == {False}


def test_options_and_weights_are_asked_for_by_themselves() -> None:
    model, optimizer = build(learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    report = load_keras(DATA / "tf24.h5", optimizer, model, state=False)
    assert optimizer.learning_rate == 0.5
    assert report.moves == []
    assert all(map(torch.equal, model.parameters(), before))
    model, optimizer = build(learning_rate=0.125)
    load(DATA / "tf24.h5", optimizer, model, hyperparameters=False)
    assert optimizer.learning_rate == 0.125
    assert not all(map(torch.equal, model.parameters(), before))
    with pytest.raises(ValueError, match="state_order is the order of a state, and with state=False none is read"):
        load(DATA / "k3.keras", optimizer, model, state_order=["d1/kernel"])


def test_a_call_that_loads_nothing_is_refused(files: Path) -> None:
    """Above all state=False without weights=True, with a file that has no hyperparameters of an Adadelta."""
    model, optimizer = build()
    with pytest.raises(
        KerasFileError, match=r"state=False and hyperparameters=False, nothing is loaded; pass weights="
    ):
        load_keras(DATA / "k3.h5", optimizer, model, state=False, hyperparameters=False)
    model = chain()
    optimizer = stepped(model)
    with pytest.raises(KerasFileError, match="no hyperparameters of an Adadelta in it, nothing is loaded"):
        load_keras(files / "keras3" / "Adam" / "model.h5", optimizer, model, state=False)


def test_what_keras_trained_is_not_asked() -> None:
    """A model that was loaded for its weights may be trained in another part."""
    model, _ = build()
    model[0].requires_grad_(False)
    optimizer = AdadeltaKeras([model[1].weight])
    load(DATA / "tf24.h5", optimizer, model)
    np.testing.assert_array_equal(model[0].weight.numpy(), weights_of("tf24.h5")[0].T)


def weights_of(name: str) -> list[np.ndarray]:
    model, optimizer = build()
    load(DATA / name, optimizer, model)
    return [param.detach().numpy().T for param in model.parameters()]


def test_parameters_that_keras_does_not_have_are_still_refused(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"lstm": recurrent(3, 2, 4, (8,))})
    model = Net(lstm=nn.LSTM(3, 2))
    with pytest.raises(KerasFileError, match="freeze_second_biases"):
        load(path, AdadeltaKeras(model.parameters()), model)
    freeze_second_biases(model)
    load(path, AdadeltaKeras(model.parameters()), model)
    wider = Net(one=nn.Linear(3, 2), two=nn.Linear(2, 2))
    path = write_h5(tmp_path / "n.h5", {"one": dense(3, 2)})
    with pytest.raises(KerasFileError, match="Left of PyTorch:\n  two"):
        load(path, AdadeltaKeras(wider.named_parameters()), wider)


def test_weights_of_a_layer_that_nobody_knows_are_not_left_out_silently(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": dense(3, 2), "scale": {"factor": np.ones(7)}})
    model = Net(one=nn.Linear(3, 2))
    with pytest.raises(KerasFileError, match="scale fits none of them"):
        load(path, AdadeltaKeras(model.named_parameters()), model)
    load(path, AdadeltaKeras(model.named_parameters()), model, mapping={"scale": None})
    config = sequential(("one", "Dense", {}), ("scale", "Normalization", {}))
    load(path, AdadeltaKeras(model.named_parameters()), model, config=config)


def test_masters_are_set_and_averages_stay() -> None:
    model = build()[0].bfloat16()
    optimizer = AdadeltaKeras(model.named_parameters(), master_weights=True, use_ema=True, ema_momentum=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [optimizer.state[param][averages.KEY].clone() for param in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_keras(DATA / "k3.weights.h5", optimizer, model, weights=True, state=False)
    for (param, master), average, theirs in zip(
        optimizer.master_params(), before, weights_of("k3.weights.h5"), strict=True
    ):
        assert_is(master, theirs.T)
        assert torch.equal(param, master.bfloat16())
        assert torch.equal(optimizer.state[param][averages.KEY], average)


def test_options_that_cannot_be_set_now_leave_everything(tmp_path: Path) -> None:
    """While gradients wait for their update, their number cannot be changed."""
    path = edited(tmp_path, with_options(gradient_accumulation_steps=3), "k3.h5")
    model, _ = build()
    optimizer = stepped(model, gradient_accumulation_steps=2, learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        load(path, optimizer, model)
    assert (optimizer.learning_rate, optimizer.gradient_accumulation_steps) == (0.125, 2)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer = AdadeltaKeras(model.parameters())
    load(path, optimizer, model)
    assert optimizer.gradient_accumulation_steps == 3


def test_norm_variables_come_with_the_options(tmp_path: Path) -> None:
    """They say of what Keras takes norms; without its options, training is another."""
    path = write_h5(tmp_path / "m.h5", {"gru": recurrent(3, 2, 3, (2, 6))}, clipnorm=1.0)
    model = Net(gru=nn.GRU(3, 2))
    for options, expected in (({}, ["gru/bias"]), ({"hyperparameters": False}, [])):
        optimizer = AdadeltaKeras(model.named_parameters())
        report = load(path, optimizer, model, **options)
        assert [weight for weight, _ in report.norm_variables] == expected
        assert bool(optimizer.norm_variables) == bool(expected)
