"""``.h5`` files of whole models."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from keras_stored import (
    KERNEL,
    SCHEDULE,
    assert_is,
    assert_refused,
    assert_same_datasets,
    build,
    edited,
    renamed,
    replaced,
    truth,
    with_json,
    with_options,
    with_state_names,
)

from torch_adadelta.keras import load_keras, save_keras
from torch_adadelta.keras.checkpoints import opened

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

OWN: Final = "Adadelta/d1/kernel/accum_"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed(f"{OWN}grad:0", "Adadelta/d3/kernel/accum_grad:0"), "Adadelta/d3/kernel/accum_grad, which belongs to no"),
        (renamed(f"{OWN}grad:0", f"{OWN}sum:0"), "accum_sum, which belongs to no weight of the model"),
        (renamed(f"{OWN}grad:0", "d1/kernel/accum_var:0"), "acc_delta of d1/kernel twice"),
        (renamed(f"{OWN}grad:0", "Adadelta/average/d1/kernel:0"), r"moving averages.*drop=\{'ema'\}"),
        (renamed(f"{OWN}grad:0", "d1_kernel_gradient_accumulator:0"), r"drop=\{'gradient_accumulation'\}"),
        (renamed("Adadelta/iter:0", "Adadelta/steps:0"), "Adadelta/steps|has no iterations"),
        (with_state_names("Adadelta/iter:0"), "no step was taken"),
        (with_state_names("Adadelta/iter:0", f"{OWN}grad:0"), "square_avg of d1/kernel, and not acc_delta"),
        (lambda f: f.pop("optimizer_weights"), "the model was saved without its optimizer"),
        (lambda f: f.attrs.pop("training_config"), "the model was saved without its optimizer"),
        (lambda f: f.move("model_weights", "other"), "no .weights.h5|which is no weight"),
        (lambda f: (f.pop("model_weights"), f.attrs.update(layer_names=[b"d1"])), "it has weights only, as save_weights"),
        (replaced(KERNEL, -np.ones((3, 2), "f4")), "has negative numbers"),
        (replaced(KERNEL, np.ones((2, 3), "f4")), r"has shape \(2, 3\), its weight d1/kernel \(3, 2\)"),
        (replaced(KERNEL, np.ones((3, 2), "i4")), "has dtype int32, which no state has"),
        (with_options(class_name="Adam"), "its optimizer is Adam, not Adadelta"),
        (with_options(use_ema=True), r"drop=\{'ema'\}"),
        (lambda f: f.attrs.modify("training_config", "{"), "training_config is no JSON"),
        (lambda f: f.attrs.modify("model_config", "[]"), "model_config is a list"),
        (with_json("model_config", lambda c: c["config"]["layers"].append(3)), "a layer that is none"),
    ],
    ids=range(20),
)  # fmt: skip
def test_an_h5_file_that_is_not_whole_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, edit), message)


def test_what_may_be_left_out_is(tmp_path: Path) -> None:
    path = edited(tmp_path, renamed(f"{OWN}grad:0", "Adadelta/average/d1/kernel:0", is_copied=True))
    assert_refused(path, r"drop=\{'ema'\}", drop={"gradient_accumulation"})
    model, optimizer = build()
    report = load_keras(path, optimizer, model, drop={"ema"})
    assert report.notes == ["left out: moving averages of the weights (use_ema)"]
    assert_is(optimizer.state[model[0].weight]["square_avg"], truth("tf24")[1][0].T)
    for options in ({"drop": "ema"}, {"drop": {"momentum"}}):
        with pytest.raises(ValueError, match="drop must be a set of ema, weight_decay, gradient_accumulation; got"):
            load_keras(path, optimizer, model, **options)


@pytest.mark.parametrize("drop", [(), {"lambda"}])  # which had to be dropped once
def test_a_lambda_is_named_and_not_run(drop: Any, tmp_path: Path) -> None:
    code = {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}
    layer = {"class_name": "Lambda", "config": {"name": "scale", "function": ["4wEAAAA=", None, None]}}

    def change(config: Any) -> None:
        config["config"]["layers"].append(layer)
        config["config"]["layers"][-2]["config"]["activation"] = code

    path = edited(tmp_path, with_json("model_config", change))
    model, optimizer = build()
    report = load_keras(path, optimizer, model, weights=True, drop=drop)
    ends = "which is not run: the PyTorch model must compute it"
    assert report.notes == [f"its model has a lambda, {name!r}, {ends}" for name in ("d2", "scale")]
    assert_is(optimizer.state[model[0].weight]["square_avg"], truth("tf24")[1][0].T)
    save_keras(tmp_path / "back.h5", optimizer, model, path, drop=drop)
    assert_same_datasets(path, tmp_path / "back.h5")
    path = edited(tmp_path, with_options(learning_rate=code))
    assert_refused(path, "its learning-rate schedule cannot be made")


def test_a_learning_rate_that_is_a_variable_comes_before_the_configuration(tmp_path: Path) -> None:
    """The new classes have one in the file, which a callback may have changed."""
    name = "optimizer_weights/adadelta/learning_rate"
    for rate, options in ((0.125, {}), (np.nan, {"message": "is nan"})):
        path = edited(tmp_path, replaced(name, np.float32(rate)), "k3.h5")
        if options:
            assert_refused(path, **options)
        else:
            model, optimizer = build()
            load_keras(path, optimizer, model)
            assert optimizer.learning_rate == 0.125
    with opened(
        edited(tmp_path, with_options(learning_rate=SCHEDULE), "k3.h5")
    ) as checkpoint:  # but not before a schedule
        assert checkpoint.hyperparameters["learning_rate"] == SCHEDULE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "Invalid learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "Invalid learning_rate: nan"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"learning_rate": {"class_name": "Mine", "config": {}}}, "its learning-rate schedule cannot be made"),
        ({"learning_rate": {"class_name": "os.system", "config": {"command": "false"}}}, "cannot be made"),
        ({"rho": 2}, "Invalid rho"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "Cannot accept both"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, with_options(**options)), message)
