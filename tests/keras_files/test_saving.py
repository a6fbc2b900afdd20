"""Jobs that move back to Keras: what is written, where it is not, and that a failed write leaves what was there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import (
    CLIPPING,
    DATA,
    SCHEDULE,
    WRITABLE,
    Net,
    assert_is,
    assert_same_datasets,
    attention,
    build,
    datasets,
    dense,
    edited,
    load,
    recurrent,
    write_h5,
    written_config,
)

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.keras import KerasFileError, Layout, load_keras, save_keras

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def trained(name: Path | str) -> tuple[nn.Module, AdadeltaKeras]:
    model, optimizer = build()
    load_keras(DATA / name, optimizer, model, weights=True)
    torch.manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", WRITABLE)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(name)
    optimizer.learning_rate = 0.25
    back = tmp_path / name
    report = save_keras(back, optimizer, model, DATA / name)
    other_model, other = build()
    load_keras(back, other, other_model, weights=True)
    assert other.iterations == report.iterations == 6
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key in ("square_avg", "acc_delta"):
            assert torch.equal(optimizer.state[ours][key], other.state[theirs][key])
    if "learning_rate" in report.hyperparameters:
        assert other.learning_rate == 0.25
    missing = {
        "new.weights.h5": "learning_rate, rho, epsilon",
        "k3.keras": "rho, epsilon",
        "k3.weights.h5": "rho, epsilon",
    }
    assert report.notes == (
        [f"the file has no place for {missing[name]}; give them to Keras when you compile"] if name in missing else []
    )
    assert list(tmp_path.iterdir()) == [back]
    # Into the template itself, of which the weights or the options stay.
    model, optimizer = trained(name)
    optimizer.learning_rate = 0.125
    save_keras(back, optimizer, model, back, weights=False, hyperparameters=False)
    load_keras(back, other, other_model, weights=True)
    assert torch.equal(other.state[other_model[0].weight]["acc_delta"], optimizer.state[model[0].weight]["acc_delta"])
    assert other.learning_rate != 0.125
    assert torch.equal(other_model[0].weight, model[0].weight)


def test_what_was_not_trained_yet_gets_zeros(tmp_path: Path) -> None:
    model, optimizer = build()
    save_keras(str(tmp_path / "m.h5"), optimizer, model, str(DATA / "tf24.h5"), weights=False)
    before, after = datasets(DATA / "tf24.h5"), datasets(tmp_path / "m.h5")
    assert all(not after[name].any() for name in after if name.startswith("optimizer"))
    assert all(np.array_equal(after[name], before[name]) for name in after if name.startswith("model"))


def full(file: Any, arrays: Any) -> None:
    raise RuntimeError("no room on the disk")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.h5"
    target.write_bytes(b"precious")
    model, optimizer = build(decay=0.1)
    with pytest.raises(ValueError, match=r"decay=0\.1, which this Keras does not have"):
        save_keras(target, optimizer, model, DATA / "k3.h5")
    with pytest.raises(ValueError, match="is a TensorFlow checkpoint, which is not written"):
        save_keras(target, optimizer, model, DATA / "tf24_tfck/w")
    model, optimizer = build()
    model.register_parameter("other", nn.Parameter(torch.ones(1)))
    with pytest.raises(KerasFileError):
        save_keras(target, optimizer, model, DATA / "k3.h5")
    model, _ = build()
    with pytest.raises(
        KerasFileError, match=r"Keras trained d2/kernel, but 1\.weight is no parameter of the optimizer"
    ):
        save_keras(target, AdadeltaKeras(model[0].parameters()), model, DATA / "k3.h5")
    model, optimizer = build(learning_rate=schedules.ExponentialDecay(0.5, 3, 0.5))
    with pytest.raises(ValueError, match="the learning rate of the optimizer is a schedule, and that of"):
        save_keras(target, optimizer, model, DATA / "k3.h5")
    model, optimizer = build()
    monkeypatch.setattr("torch_adadelta.keras.saving._write_datasets", full)
    for name in ("k3.h5", "k3.keras"):  # amid the writes
        with pytest.raises(RuntimeError, match="disk"):
            save_keras(target, optimizer, model, DATA / name)
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_the_mode_of_a_file_stays(tmp_path: Path) -> None:
    model, optimizer = build()
    template, target = tmp_path / "t.h5", tmp_path / "m.h5"
    template.write_bytes((DATA / "tf24.h5").read_bytes())
    template.chmod(0o640)
    for mode in (0o640, 0o604):
        save_keras(target, optimizer, model, template)
        assert os.stat(target).st_mode & 0o777 == mode
        target.chmod(0o604)


def test_a_schedule_is_written_into_one(tmp_path: Path) -> None:
    layers, model = {"a": dense(3, 2)}, Net(a=nn.Linear(3, 2))
    path = write_h5(tmp_path / "m.h5", layers, learning_rate={**SCHEDULE, "module": "keras"})
    optimizer = load(path, model)
    optimizer.learning_rate = schedules.InverseTimeDecay(0.5, 3, 0.25)
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    rate = written_config(tmp_path / "back.h5")["learning_rate"]
    assert (rate["class_name"], rate["config"]["decay_rate"], rate["module"]) == ("InverseTimeDecay", 0.25, "keras")
    optimizer.learning_rate = 0.25
    with pytest.raises(ValueError, match="the learning rate of the optimizer is a number, and that of"):
        save_keras(path, optimizer, model, path)
    save_keras(path, optimizer, model, path, hyperparameters=False)
    # An old name of the option stays.
    old = write_h5(tmp_path / "old.h5", layers)
    with h5py.File(old, "r+") as file:
        training = json.loads(file.attrs["training_config"])
        training["optimizer_config"]["config"]["lr"] = training["optimizer_config"]["config"].pop("learning_rate")
        file.attrs["training_config"] = json.dumps(training)
    save_keras(old, optimizer, model, old)
    assert written_config(old)["lr"] == 0.25
    assert "learning_rate" not in written_config(old)


def test_what_newer_keras_would_take_otherwise_is_not_written(tmp_path: Path) -> None:
    for name in ("new.h5", "k3.h5"):
        model, optimizer = build()
        load_keras(DATA / name, optimizer, model)
        for options, message in (
            ({"clipnorm": 0.0}, "clipnorm=0, which means no clipping in this Keras"),
            ({"clipnorm": 1.0, "clipvalue": 1.0}, "clipnorm and clipvalue, of which this Keras takes one only"),
        ):
            other = AdadeltaKeras(model.named_parameters(), **options)
            other.load_state_dict({**other.state_dict(), "state": optimizer.state_dict()["state"]})
            with pytest.raises(ValueError, match=message):
                save_keras(tmp_path / "m.h5", other, model, DATA / name)
            save_keras(tmp_path / "m.h5", other, model, DATA / name, hyperparameters=False)
    model, optimizer = build(clipnorm=0.0, clipvalue=1.0)
    save_keras(tmp_path / "m.h5", optimizer, model, DATA / "tf24.h5")


@pytest.mark.parametrize("name", ["tf24.h5", "new.h5", "k3.h5", "new.keras"])
def test_no_clip_option_is_written_over_that_of_the_template(name: str, tmp_path: Path) -> None:
    """Keras, too, must go on without."""
    model, optimizer = build(clipnorm=1.0)
    suffix = name.rpartition(".")[2]
    template, back = tmp_path / f"template.{suffix}", tmp_path / f"back.{suffix}"
    save_keras(template, optimizer, model, DATA / name)
    assert written_config(template)["clipnorm"] == 1.0
    assert ("decay" in written_config(template)) == (name == "tf24.h5")  # which newer classes do not know
    for options, expected in (({}, None), ({"global_clipnorm": 2.0}, 2.0)):
        model, optimizer = build(**options)
        save_keras(back, optimizer, model, template)
        assert [written_config(back).get(key) for key in CLIPPING] == [None, None, expected]
    load_keras(back, optimizer, model)
    assert (optimizer.clipnorm, optimizer.global_clipnorm) == (None, 2.0)


def test_all_layouts_go_out_as_they_came_in(tmp_path: Path) -> None:
    """Rows of two parameters, parts of one, and an order of blocks that is not its own inverse."""
    layers = {
        "attend": attention(),
        "gru": recurrent(3, 2, 3, (2, 6)),
        "odd": {"kernel": np.arange(24.0).reshape(4, 6)},
    }
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(attend=nn.MultiheadAttention(4, 2), gru=nn.GRU(3, 2))
    model.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    layout = Layout(view=(4, 3, 2), blocks=(1, 2, 0), permutation=(1, 2, 0), shape=(6, 4))
    mapping = {"odd/kernel": ("weight", layout)}
    optimizer = load(path, model, mapping=mapping)
    expected = layers["odd"]["kernel"].reshape(4, 3, 2)[:, [1, 2, 0]].transpose(1, 2, 0).reshape(6, 4)
    assert_is(model.weight, expected)
    assert_is(optimizer.state[model.weight]["square_avg"], expected**2)
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    assert_same_datasets(path, tmp_path / "back.h5")


def test_bfloat16_is_written_as_bfloat16(tmp_path: Path) -> None:
    def to_bfloat16(file: Any) -> None:
        for name in [name for name in datasets(DATA / "k3.weights.h5") if name.startswith("layers/")]:
            array = np.ascontiguousarray(file[name][()], "<f4")
            del file[name]
            file[name] = (array.view("<u4") >> 16).astype("<u2").view("V2")
            file[name].attrs["dtype"] = "bfloat16"

    path = edited(tmp_path, to_bfloat16, "k3.weights.h5")
    model, optimizer = build()
    load_keras(path, optimizer, model, weights=True)
    with h5py.File(path, "r") as file:
        bits = file["layers/dense/vars/0"][()].view("<u2").astype("<u4") << 16
    np.testing.assert_array_equal(model[0].weight.detach().numpy().T, bits.view("<f4"))
    model[0].weight.data.fill_(1.005)  # which is 1.0078125 in bfloat16
    save_keras(tmp_path / "back.weights.h5", optimizer, model, path)
    after = datasets(tmp_path / "back.weights.h5")
    assert after["layers/dense/vars/0"].dtype == "V2"
    assert set(after["layers/dense/vars/0"].view("<u2").ravel()) == {0x3F81}


@pytest.mark.parametrize("length", [None, 400])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_form_of_the_configuration_stays(length: int | None, encoding: str, tmp_path: Path) -> None:
    """h5py 2, which TensorFlow 2.4 has, reads one form as bytes and the other as text."""

    def reform(file: Any) -> None:
        data = file.attrs["training_config"].encode()
        file.attrs.create("training_config", data.ljust(length or 0), dtype=h5py.string_dtype(encoding, length and 400))

    path = edited(tmp_path, reform)
    model, optimizer = build(learning_rate=0.25, clipnorm=0.0625)
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    with h5py.File(tmp_path / "back.h5", "r") as file:
        form = h5py.check_string_dtype(file.attrs.get_id("training_config").dtype)
        assert (form.encoding, form.length is None) == (encoding, length is None)
    assert written_config(tmp_path / "back.h5")["clipnorm"] == 0.0625
    with h5py.File(DATA / "tf24.h5", "r") as file:  # which TensorFlow 2.4 wrote
        assert h5py.check_string_dtype(file.attrs.get_id("training_config").dtype).encoding == "ascii"


def test_a_template_without_state_is_refused(tmp_path: Path) -> None:
    """To load the weights alone is no way out here."""
    model, optimizer = build()
    with pytest.raises(KerasFileError, match=r"holds no state of an Adadelta: .* compiled with the optimizer$"):
        save_keras(tmp_path / "back.keras", optimizer, model, template=DATA / "legacy.keras")
    assert not list(tmp_path.iterdir())
