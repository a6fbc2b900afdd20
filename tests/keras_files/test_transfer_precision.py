"""Files of Keras and parameters in bfloat16: masters take float32 weights whole, and give them back."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

from keras_stored import DATA, WRITABLE, Net, assert_same_datasets, build, dense, unpacked, write_h5
from training import advance

from torch_adadelta import AdadeltaKeras, to_bfloat16
from torch_adadelta.keras import load_keras, save_keras

MASTERS: dict[str, Any] = {"master_weights": True, "state_dtype": torch.float32}
NO_NOTE = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def loaded(path: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any, str]:
    """A model in this dtype and an optimizer with a file's weights and state, and what is said of roundings."""
    model, _ = build()
    model.to(dtype)
    optimizer = AdadeltaKeras(model.named_parameters(), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_keras(path, optimizer, model, weights=True)
    return model, optimizer, "; ".join(str(w.message) for w in caught if "rounded" in str(w.message))


@NO_NOTE
@pytest.mark.parametrize("name", WRITABLE)
def test_masters_take_weights_whole_and_give_them_back(name: str, tmp_path: Path) -> None:
    _, usual, _ = loaded(DATA / name, torch.float32)
    model, optimizer, notes = loaded(DATA / name, torch.bfloat16, **MASTERS)
    assert notes == ""
    for (param, master), (same, weight) in zip(optimizer.master_params(), usual.master_params(), strict=True):
        assert param.dtype is torch.bfloat16
        assert_same_bits(master, weight)
        assert_same_bits(param.detach(), (weight.view(torch.int32) + 2**15 & -(2**16)).view(torch.float32).bfloat16())
        for key in ("square_avg", "acc_delta"):
            assert_same_bits(optimizer.state[param][key], usual.state[same][key])
    back = tmp_path / Path(name).name
    save_keras(back, optimizer, model, DATA / name)
    assert_same_datasets(back, DATA / name)


@NO_NOTE
def test_a_job_that_was_converted_goes_back_whole(tmp_path: Path) -> None:
    model, optimizer, _ = loaded(DATA / "k3.keras", torch.float32)
    to_bfloat16(model, optimizer)
    save_keras(tmp_path / "k3.keras", optimizer, model, DATA / "k3.keras")
    assert_same_datasets(tmp_path / "k3.keras", DATA / "k3.keras")


@NO_NOTE
def test_what_is_rounded_is_said() -> None:
    _, optimizer, notes = loaded(DATA / "tf24.h5", torch.bfloat16, master_weights=True)
    assert "the state of 0.bias, 0.weight, 1.bias, 1.weight was rounded to its dtype here" in notes
    assert "weight was rounded to its dtype, " not in notes
    _, wide, notes = loaded(DATA / "tf24.h5", torch.float32, state_dtype=torch.bfloat16)
    assert "was rounded to its dtype here" in notes
    _, usual, _ = loaded(DATA / "tf24.h5", torch.float32)
    for ours in (optimizer, wide):
        for (param, _), (same, _) in zip(ours.master_params(), usual.master_params(), strict=True):
            assert_same_bits(ours.state[param]["acc_delta"], usual.state[same]["acc_delta"].bfloat16())
    assert "0.weight was rounded to its dtype, torch.bfloat16" in loaded(DATA / "tf24.h5", torch.bfloat16)[2]


@NO_NOTE
def test_a_load_that_fails_amid_the_writes_leaves_masters_as_they_were(tmp_path: Path) -> None:
    """The statistics of the norm share one element, so that writing them fails when all else is set."""
    norm = {"gamma": np.ones(3), "beta": np.zeros(3), "moving_mean": np.ones(3), "moving_variance": np.ones(3)}
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "norm": norm})
    model = Net(one=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)).float()
    model.one.bfloat16()
    model.norm.running_mean = torch.zeros(1).expand(3)
    optimizer = AdadeltaKeras(model.named_parameters(), **MASTERS)
    advance(optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in model.parameters()]
    for masters, has_state in ((True, False), (True, True), (False, True)):
        with pytest.raises(RuntimeError, match="single memory location"):
            load_keras(path, optimizer, model, weights=True, state=has_state)
        assert all(map(torch.equal, model.parameters(), before[1]))
        for number, state in optimizer.state_dict()["state"].items():
            assert state.keys() == before[0]["state"][number].keys()
            assert all(torch.equal(state[key], value) for key, value in before[0]["state"][number].items())
        if masters and has_state:
            del optimizer.state[model.one.weight], before[0]["state"][0]


@NO_NOTE
def test_state_without_weights_leaves_masters(tmp_path: Path) -> None:
    model, optimizer, _ = loaded(DATA / "tf24.h5", torch.bfloat16, **MASTERS)
    before = [master for _, master in optimizer.master_params()]
    load_keras(DATA / "k3.keras", optimizer, model)
    for (param, master), was in zip(optimizer.master_params(), before, strict=True):
        assert_same_bits(master, was)
        assert set(optimizer.state[param]) == {"square_avg", "acc_delta", "remainder"}


@NO_NOTE
def test_the_weights_of_mixed_precision_are_masters(tmp_path: Path) -> None:
    """Keras has variables of float32 there, and computes in float16."""
    unpacked("mixed.tar.xz", tmp_path)
    for generation in ("tf24", "legacy", "new", "keras3"):
        path = tmp_path / generation / "mixed_precision" / "model.h5"
        for dtype, options in ((torch.float32, {}), (torch.bfloat16, MASTERS)):
            model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
            optimizer = AdadeltaKeras(model.named_parameters(), **options)
            load_keras(path, optimizer, model, weights=True)
            assert all(master.dtype is torch.float32 for _, master in optimizer.master_params())
            save_keras(path.with_name("back.h5"), optimizer, model, path)
            assert_same_datasets(path, path.with_name("back.h5"))
