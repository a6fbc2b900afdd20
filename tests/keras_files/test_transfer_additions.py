"""The options and the state that Keras 3 adds to Adadelta: where they go, and come from."""

import copy
import json
import warnings
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

from keras_added import ADDED, CELLS, COUNT, STATE, config_of, gates, load, with_additions
from keras_stored import (
    DATA,
    Net,
    assert_same_datasets,
    attention,
    build,
    datasets,
    dense,
    edited,
    recurrent,
    with_options,
    written_config,
)
from keras_table import has_options

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.keras import KerasFileError, load_keras, save_keras
from torch_adadelta.keras import config as configs

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


@pytest.mark.parametrize(
    ("generation", "kind", "drop"),
    [
        (generation, kind, drop)
        for generation, kind in CELLS
        for drop in ({"ema"}, {"gradient_accumulation"}, {"ema", "gradient_accumulation", "weight_decay"})
        if generation == "keras3" or "ema" in drop
    ],
)
def test_what_is_dropped_is_left_out(generation: str, kind: str, drop: set[str], folder: Path) -> None:
    """With its options, which stay those of the optimizer."""
    names = {"ema": "average", "gradient_accumulation": "gradient_accumulator"}
    left_out = {names.get(name) for name in drop}
    own = ADDED[generation]
    if has_options(generation, kind):
        own = {"ema_momentum": 0.25, "weight_decay": 0.125}
    own = {k: v for k, v in own.items() if k != "use_ema" or "ema" not in drop}
    own = {k: v for k, v in own.items() if k != "gradient_accumulation_steps" or "gradient_accumulation" not in drop}
    model, optimizer, report = load(folder, generation, kind, own, drop=drop)
    assert optimizer.param_groups[0]["iterations"] == COUNT
    for param in model.parameters():
        assert list(optimizer.state[param]) == [slot for slot in STATE[generation] if slot not in left_out]
    for option, value in ADDED[generation].items():
        is_dropped = option in configs.dropped_options(drop)
        expected = own.get(option, AdadeltaKeras([param]).param_groups[0][option]) if is_dropped else value
        assert getattr(optimizer, option) == expected, option
    assert sum(note.startswith("left out: ") for note in report.notes) == len(drop)


def test_pending_gradients_of_before_are_no_obstacle(folder: Path) -> None:
    model, optimizer = gates(gradient_accumulation_steps=7)
    model(torch.ones(1, 3, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_keras(folder / "keras3" / "model.h5", optimizer, model)
    assert (optimizer.gradient_accumulation_steps, optimizer.param_groups[0]["iterations"]) == (2, COUNT)
    assert optimizer.iterations == 2


@pytest.mark.parametrize(
    ("steps", "message"),
    [(None, "gradient_accumulation_steps of the AdadeltaKeras is None"), (5, "sums that are not zero")],
)
def test_sums_of_gradients_must_be_what_the_optimizer_goes_on_with(
    steps: int | None, message: str, folder: Path
) -> None:
    own = {"use_ema": True, "gradient_accumulation_steps": steps}
    with pytest.raises(KerasFileError, match=message):
        load(folder, "keras3", "weights.h5", own)


def test_the_decay_of_keras_is_decoupled(tmp_path: Path) -> None:
    path = edited(tmp_path, with_options(weight_decay=0.125, clipnorm=1.0), "k3.h5")
    for given in ({}, {"clipvalue": 2.0}, {"weight_decay": 0.5}):
        model, optimizer = build(decoupled_weight_decay=False, **given)
        with pytest.warns(UserWarning, match="exclude_from_weight_decay"):
            report = load_keras(path, optimizer, model)
        assert (optimizer.decoupled_weight_decay, optimizer.weight_decay) == (True, 0.125)
        assert (optimizer.clipnorm, optimizer.clipvalue) == (1.0, None)
        assert report.hyperparameters["decoupled_weight_decay"] is True


def test_what_cannot_be_on_a_device_changes_nothing(folder: Path) -> None:
    model, optimizer = gates(capturable=True, learning_rate=0.125)
    with pytest.raises(ValueError, match="cannot be combined with capturable=True"):
        load(folder, "keras3", "h5", {"capturable": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="cannot be combined with capturable=True"):
            load_keras(folder / "keras3" / "model.h5", optimizer, model)
    assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
    assert not optimizer.use_ema


# ---- State -----------------------------------------------------------------------------------------------------------


def test_each_state_is_turned_as_its_weight_is(tmp_path: Path) -> None:
    """Rows of two parameters, parts of one, and both come back."""
    layers = {"attend": attention(), "gru": recurrent(3, 2, 3, (2, 6)), "fc": dense(4, 6)}
    path = with_additions(tmp_path / "m.h5", layers)
    model = Net(attend=nn.MultiheadAttention(4, 2), gru=nn.GRU(3, 2), fc=nn.Linear(4, 6))
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True)
    assert optimizer.param_groups[0]["iterations"] == 3
    for param in model.parameters():
        for key, factor in (("average", -3), ("gradient_accumulator", -7)):
            assert torch.equal(optimizer.state[param][key], factor * param.detach()), key
        assert torch.equal(optimizer.state[param]["square_avg"], param.detach() ** 2)
    assert (model.fc.weight != 0).all()
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    assert_same_datasets(path, tmp_path / "back.h5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_and_sums_have_the_opmath_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = {"fc": {name: value.astype("f4") for name, value in dense(4, 3).items()}}
    path = with_additions(tmp_path / "m.h5", layers)
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    optimizer = AdadeltaKeras(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_keras(path, optimizer, model)
    assert any("was rounded to its dtype here" in str(warning.message) for warning in caught) == (
        dtype != torch.float32
    )
    state = optimizer.state[model[0].weight]
    assert (state["square_avg"].dtype, state["average"].dtype) == (dtype, torch.float32)
    np.testing.assert_array_equal(state["average"].numpy(), -3 * layers["fc"]["kernel"].T)
    np.testing.assert_array_equal(state["gradient_accumulator"].numpy(), -7 * layers["fc"]["kernel"].T)


def test_what_is_frozen_has_neither_average_nor_sum(tmp_path: Path) -> None:
    """The template keeps its own."""
    layers = {"a": dense(3, 2), "b": dense(2, 1)}
    path = with_additions(tmp_path / "m.h5", layers)
    model = Net(a=nn.Linear(3, 2), b=nn.Linear(2, 1))
    model.a.requires_grad_(False)
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True)
    assert list(optimizer.state[model.a.weight]) == ["square_avg", "acc_delta"]
    assert list(optimizer.state[model.b.weight]) == ["square_avg", "acc_delta", "average", "gradient_accumulator"]
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    before, after = datasets(path), datasets(tmp_path / "back.h5")
    for name, array in before.items():
        expected = array * (0 if "adadelta/a_" in name and "gradient_accumulator" in name else 1)
        np.testing.assert_array_equal(after[name], expected, err_msg=name)


def test_a_row_whose_parameter_is_frozen_has_the_average_that_a_step_would_begin_with(tmp_path: Path) -> None:
    weights = recurrent(3, 2, 3, (2, 6))
    path = with_additions(tmp_path / "m.h5", {"gru": weights})
    model = Net(gru=nn.GRU(3, 2))
    model.gru.bias_hh_l0.requires_grad_(False)
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True)
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    (average,) = [array for name, array in datasets(tmp_path / "back.h5").items() if name.endswith("bias_average")]
    np.testing.assert_array_equal(average, weights["cell/bias"] * [[-3], [1]])


def test_a_schedule_beside_all_of_it(tmp_path: Path) -> None:
    """The number of calls is what a schedule gets, here and there."""
    rate = {"class_name": "PolynomialDecay", "config": {"initial_learning_rate": 1.0, "decay_steps": 4}}
    path = with_additions(tmp_path / "m.h5", {"fc": dense(3, 2)}, learning_rate=rate, weight_decay=0.5)
    model = Net(fc=nn.Linear(3, 2))
    optimizer = AdadeltaKeras(model.named_parameters())
    with pytest.warns(UserWarning, match="exclude_from_weight_decay"):
        load_keras(path, optimizer, model, weights=True)
    assert isinstance(optimizer.learning_rate, schedules.PolynomialDecay)
    before = model.fc.bias.detach().clone()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        optimizer.state[param]["gradient_accumulator"].zero_()
    optimizer.step()  # call 3 of 4, which updates: only decay does something
    rate_then = float(optimizer.learning_rate(torch.tensor(3.0, dtype=torch.float64)))
    torch.testing.assert_close(model.fc.bias.detach(), before - before * 0.5 * rate_then)


# ---- To Keras --------------------------------------------------------------------------------------------------------


def test_what_has_no_state_yet_gets_what_a_step_would_begin_with(folder: Path, tmp_path: Path) -> None:
    path = folder / "keras3" / "model.h5"
    model, optimizer = gates(use_ema=True, gradient_accumulation_steps=2)
    report = save_keras(tmp_path / "m.h5", optimizer, model, path)
    assert report.iterations == 0
    again, other = gates()
    load_keras(tmp_path / "m.h5", other, again, weights=True)
    assert other.param_groups[0]["iterations"] == 0
    for param, ours in zip(again.parameters(), model.parameters(), strict=True):
        state = other.state[param]
        assert torch.equal(param, ours)
        assert torch.equal(state["average"], ours.detach())
        assert not any(state[key].any() for key in ("square_avg", "acc_delta", "gradient_accumulator"))


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_what_was_written_goes_on_with_the_same_bits(calls: int, folder: Path, tmp_path: Path) -> None:
    """Before the first update there are sums and averages, and no accumulators."""

    def train(model: nn.Module, optimizer: AdadeltaKeras, calls: int) -> None:
        for number in range(calls):
            optimizer.zero_grad()
            model(torch.full((2, 3, 2), 0.5 + number, dtype=torch.float64)).square().sum().backward()
            optimizer.step()

    options = {"use_ema": True, "ema_momentum": 0.5, "gradient_accumulation_steps": 2, "loss_scale_factor": 4.0}
    model, optimizer = gates(**options, learning_rate=1.0, weight_decay=0.125)
    train(model, optimizer, calls)
    assert ("square_avg" in optimizer.state[model.out.weight]) == (calls > 1)
    for kind in ("h5", "keras", "weights.h5"):
        template = folder / "keras3" / f"model.{kind}"
        save_keras(tmp_path / template.name, optimizer, model, template, config=config_of(folder, "keras3"))
        own = {} if kind == "h5" else {**options, "weight_decay": 0.125}
        again, other = gates(**own)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_keras(tmp_path / template.name, other, again, weights=True, config=config_of(folder, "keras3"))
        assert other.param_groups[0]["iterations"] == calls
        ours = copy.deepcopy((model, optimizer))
        train(*ours, 3)
        train(again, other, 3)
        for one, two in zip(ours[0].parameters(), again.parameters(), strict=True):
            assert torch.equal(one, two)
            for key, tensor in ours[1].state[one].items():
                assert torch.equal(tensor, other.state[two][key]), key


DEFAULTS: Final = {
    "weight_decay": None, "use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None,
    "loss_scale_factor": None, "gradient_accumulation_steps": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["new.h5", "new.keras", "k3.h5"])
def test_options_are_written_as_keras_writes_them(name: str, tmp_path: Path) -> None:
    back = tmp_path / name
    model, optimizer = build()
    before = {"new.h5": 4, "new.keras": 4, "k3.h5": 6}[name]  # the options that this Keras knows
    for options in ({}, {"weight_decay": 0.25, "ema_momentum": 0.5}, {"weight_decay": 0.0}):
        model, optimizer = build(**options)
        template = back if back.exists() else DATA / name
        report = save_keras(back, optimizer, model, template)
        expected = {**DEFAULTS, **options, "weight_decay": options.get("weight_decay") or None}
        written = {key: value for key, value in written_config(back).items() if key in DEFAULTS}
        assert len(written) == before
        assert written == {key: expected[key] for key in written}
        assert json.dumps(written["use_ema"]) == "false"
        assert report.hyperparameters["weight_decay"] == expected["weight_decay"]
        assert "decay" not in written_config(back)
    model, optimizer = build(loss_scale_factor=2.0)
    if name == "k3.h5":
        save_keras(back, optimizer, model, DATA / name)
        assert written_config(back)["loss_scale_factor"] == 2.0
    else:
        with pytest.raises(ValueError, match=r"loss_scale_factor=2\.0, which this Keras does not have"):
            save_keras(back, optimizer, model, DATA / name)


def test_options_without_a_place_are_told(tmp_path: Path) -> None:
    model, optimizer = build(weight_decay=0.25, ema_momentum=0.5, loss_scale_factor=2.0)
    (note,) = save_keras(tmp_path / "m.weights.h5", optimizer, model, DATA / "k3.weights.h5").notes
    assert "no place for rho, epsilon, weight_decay, ema_momentum, loss_scale_factor; give them to Keras" in note


@pytest.mark.parametrize("name", ["tf24.h5", "k3.h5", "new.keras"])
def test_what_does_nothing_or_is_dropped_is_not_written(name: str, tmp_path: Path) -> None:
    """A class that does not know an option would refuse it."""
    back = tmp_path / name
    model, optimizer = build(ema_momentum=0.5, ema_overwrite_frequency=2, decoupled_weight_decay=False)
    save_keras(back, optimizer, model, DATA / name)
    written = written_config(back)
    assert "decoupled_weight_decay" not in written
    assert written.get("ema_momentum") == (None if name == "tf24.h5" else 0.5)
    assert ("use_ema" in written) == (name != "tf24.h5")
    optimizer.use_ema = True
    optimizer.gradient_accumulation_steps = 2
    report = save_keras(back, optimizer, model, DATA / name, drop={"ema", "gradient_accumulation"})
    written = written_config(back)
    assert {key: written[key] for key in DEFAULTS if key in written} == {
        key: value for key, value in DEFAULTS.items() if key in written
    }
    assert sum(note.startswith("left out: ") for note in report.notes) == 2


def test_options_of_the_optimizer_are_told_where_the_file_has_none() -> None:
    model, optimizer = build(weight_decay=0.5, loss_scale_factor=2.0)
    (note,) = load_keras(DATA / "k3.weights.h5", optimizer, model).notes
    assert "epsilon=1e-07, weight_decay=0.5, loss_scale_factor=2.0; see that" in note
