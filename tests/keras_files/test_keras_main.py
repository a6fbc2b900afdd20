"""`python -m torch_adadelta.keras`: what it shows of a file, and what it writes of it."""

import io
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

from keras_added import ADDED, CELLS, COUNT, STATE, config_of
from keras_added import load as load_added
from keras_chains import FORMATS, Chain
from keras_memory import checkpoint_of, moved
from keras_stored import (
    DATA,
    WITH_STATE,
    Net,
    assert_is,
    build,
    edited,
    load,
    recurrent,
    sequential,
    with_options,
    write_h5,
)
from keras_table import has_options, recorded

from torch_adadelta.keras import load_keras
from torch_adadelta.keras.__main__ import main, tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

SCHEDULE = {
    "class_name": "ExponentialDecay",
    "config": {"initial_learning_rate": 0.5, "decay_steps": 3, "decay_rate": 0.5},
}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_inspect_shows_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    assert main(["inspect", "k3.keras"]) == 0
    assert capsys.readouterr().out == (
        """\
k3.keras: .keras of Keras 3
iterations     4
learning_rate  0.5
not in it      rho, epsilon

weight     shape   dtype    state                  class
d1/kernel  (3, 2)  float32  square_avg, acc_delta  Dense
d1/bias    (2,)    float32  square_avg, acc_delta  Dense
d2/kernel  (2, 1)  float32  square_avg, acc_delta  Dense
d2/bias    (1,)    float32  square_avg, acc_delta  Dense
"""
    )
    monkeypatch.setattr(sys, "argv", ["torch_adadelta.keras", "inspect", "tf24_tfck/w"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("torch_adadelta.keras", run_name="__main__", alter_sys=True)
    assert "d1/kernel  (3, 2)  float32  square_avg, acc_delta  unknown" in capsys.readouterr().out
    assert main(["inspect", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_files_without_state_are_shown_and_converted_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA)
    assert main(["inspect", "legacy.keras"]) == 0
    assert capsys.readouterr().out.startswith(
        """\
legacy.keras: .keras of TensorFlow 2.4 or the legacy class of tf_keras
iterations     not in it
state          it holds no state of an Adadelta: with the legacy optimizers of tf_keras, .keras files leave it out. Save"""
    )
    assert main(["inspect", "k3.h5", "--no-state"]) == 0
    assert "iterations     not in it\nstate          not read\noptimizer      Adadelta\n" in capsys.readouterr().out
    out = tmp_path / "out.pt"
    assert main(["convert", "legacy.keras", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: legacy.keras: it holds no state of an Adadelta")
    assert error.endswith("; pass --no-state for the weights alone\n")
    assert main(["convert", "legacy.keras", str(out), "--no-state"]) == 0
    found = torch.load(out, weights_only=True)
    model, optimizer = build()
    load_keras("legacy.keras", optimizer, model, weights=True, state=False)
    assert found.keys() - {f"weights.{d}.{p}" for d in ("d1", "d2") for p in ("weight", "bias")} == {
        *("learning_rate", "rho", "epsilon", "decay")
    }
    assert torch.equal(found["weights.d1.weight"], model[0].weight)


def test_inspect_takes_what_load_keras_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = {"gamma": np.ones(2), "beta": np.ones(2), "moving_mean": np.ones(2), "moving_variance": np.ones(2)}
    path = write_h5(tmp_path / "n.h5", {"norm": norm}, learning_rate=SCHEDULE, clipnorm=1.0, decay=0.25)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"learning_rate  ExponentialDecay {SCHEDULE['config']}\n" in out
    assert "decay          0.25\nclipnorm       1.0\n\n" in out
    assert "norm/moving_mean      (2,)   float64  none                   unknown\n" in out
    path = edited(tmp_path, with_options(use_ema=True), "new.h5")
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path), "--drop", "weight_decay", "--drop", "ema"]) == 0
    (tmp_path / "config.json").write_text(str(sequential(("one", "Dense", {}), ("two", "Dense", {}))).replace("'", '"'))
    assert main(["inspect", str(DATA / "new.weights.h5"), "--config", str(tmp_path / "config.json")]) == 0
    assert "one/kernel" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_convert_writes_tensors(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{suffix}"
    for name in ("tf24_tfck/w", "legacy.h5", "new.weights.h5", "k3.keras"):
        assert main(["convert", str(DATA / name), str(out)]) == 0
        if suffix == "pt":
            found = torch.load(out, weights_only=True)
        else:
            found = pytest.importorskip("safetensors.torch").load_file(out)
        model, optimizer = build()
        load_keras(DATA / name, optimizer, model, weights=True)
        expected = {"iterations": torch.tensor(4)}
        options = {
            "tf24_tfck/w": ("learning_rate", "rho", "decay"),
            "new.weights.h5": (),
            "k3.keras": ("learning_rate",),
        }
        for key in options.get(name, ("learning_rate", "rho", "epsilon", "decay")):
            expected[key] = torch.tensor(getattr(optimizer, key), dtype=torch.float64)
        # A .weights.h5 file of tf_keras does not have the names of layers.
        for index, layer in enumerate(("dense", "dense_1") if name == "new.weights.h5" else ("d1", "d2")):
            for part in ("weight", "bias"):
                param = getattr(model[index], part)
                state = optimizer.state[param]
                for key, tensor in (("weights", param.detach()), *state.items()):
                    expected[f"{key}.{layer}.{part}"] = tensor
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert list(tmp_path.iterdir()) == [out]
    before = out.read_bytes()
    assert main(["convert", str(DATA / "legacy.keras"), str(out)]) == 1
    assert out.read_bytes() == before
    before_mask = os.umask(0o027)
    try:
        out.unlink()
        assert main(["convert", str(DATA / "new.keras"), str(out)]) == 0
        assert out.stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before_mask) == 0o027


def test_without_safetensors_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match=r"pip install safetensors; or write a \.pt file"):
        main(["convert", str(DATA / "tf24.h5"), str(tmp_path / "out.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_is_kept_beside_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path, out = (
        write_h5(tmp_path / "m.h5", {"a": {"kernel": np.ones((2, 2))}}, learning_rate=SCHEDULE),
        tmp_path / "o.safetensors",
    )
    assert main(["convert", str(path), str(out)]) == 0
    with safetensors.safe_open(out, "pt") as file:
        assert '"ExponentialDecay"' in file.metadata()["learning_rate"]
        assert "learning_rate" not in file.keys()  # noqa: SIM118 - no dictionary


def test_convert_leaves_what_it_does_not_know_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    parts = {"query": (4, 2, 2), "key": (4, 2, 2), "value": (4, 2, 2), "attention_output": (2, 2, 4)}
    attention = {f"{part}/kernel": rng.standard_normal(shape) for part, shape in parts.items()}
    layers = {"gru": recurrent(3, 2, 3, (2, 6)), "attend": attention, "odd": {"shift": np.ones((2, 3), ">f8")}}
    path, out = write_h5(tmp_path / "m.h5", layers), tmp_path / "out.pt"
    assert main(["convert", str(path), str(out)]) == 0
    assert "odd stays in the layout of Keras: no module of PyTorch is known for it" in capsys.readouterr().out
    found = torch.load(io.BytesIO(out.read_bytes()), weights_only=True)
    module = Net(gru=nn.GRU(3, 2), attend=nn.MultiheadAttention(4, 2, bias=False))
    load(path, module, mapping={"odd": None})
    for name, param in module.named_parameters():
        assert torch.equal(found[f"weights.{name}"], param), name
    assert_is(found["weights.odd.shift"], np.ones((2, 3)))
    assert_is(found["acc_delta.odd.shift"], np.full((2, 3), 0.5))


@pytest.mark.parametrize("data_format", FORMATS)
def test_convert_follows_the_axes(data_format: str) -> None:
    chain = Chain((f"conv {data_format}", f"flatten {data_format}"), "shown")
    checkpoint = checkpoint_of({"class_name": "Sequential", "config": {"layers": chain.entries}}, chain.layers)
    name = chain.layers[1].path
    found, notes = tensors(checkpoint)
    assert f"weights.{name}.kernel" in found  # in the layout of Keras
    assert notes[0].startswith(f"{name} stays in the layout of Keras: its features are a Flatten of the maps of conv_0")
    found, notes = tensors(checkpoint, "channels_first")
    assert notes == []
    model = chain.model()
    units = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    moved(checkpoint, model, mapping=dict(zip([layer.path for layer in chain.layers], units, strict=True)))
    assert torch.equal(found[f"weights.{name}.weight"], list(model)[-1].weight.detach())
    found, notes = tensors(checkpoint, "channels_last")
    assert notes == []
    assert_is(found[f"weights.{name}.weight"], chain.layers[1].variables[0].value.read().T)


def test_the_command_takes_the_word_and_the_order(tmp_path: Path) -> None:
    kernel = np.arange(48.0).reshape(24, 2)
    layers = {"conv": {"kernel": np.ones((3, 3, 1, 4))}, "last": {"kernel": kernel}}
    config = sequential(
        ("conv", "Conv2D", {"filters": 4}), ("flat", "Flatten", {}), ("last", "Dense", {"use_bias": False})
    )
    path, out = write_h5(tmp_path / "m.h5", layers, config), tmp_path / "out.pt"
    for flatten, expected in (
        ("channels_first", kernel.reshape(6, 4, 2).transpose(2, 1, 0)),
        ("channels_last", kernel.T),
    ):
        assert main(["convert", str(path), str(out), "--flatten", flatten]) == 0
        assert_is(torch.load(out)["weights.last.weight"], expected.reshape(2, 24))
    assert main(["convert", str(path), str(out)]) == 0
    assert_is(torch.load(out)["weights.last.kernel"], kernel)
    names = ["d1/kernel", "d1/bias", "d2/kernel", "d2/bias"]
    for order, status in ((names, 0), (names[::-1], 1)):
        assert main(["inspect", str(DATA / "k3.keras"), "--state-order", *order]) == status


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["convert", "m.h5"], *(["inspect", "m.h5", f"--{name}", "no"] for name in ("drop", "uses"))],
)
def test_arguments_are_checked(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_all_recorded_files_are_shown() -> None:
    assert all(main(["inspect", str(DATA / name)]) == 0 for names in WITH_STATE.values() for name in names)


def test_the_command_shows_and_converts_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.pt"
    for generation, kind in CELLS:
        path = recorded(folder / generation)[kind]
        (tmp_path / "config.json").write_text(config_of(folder, generation))
        more = [] if kind in ("h5", "keras") else ["--config", str(tmp_path / "config.json")]
        own = {} if has_options(generation, kind) else ADDED[generation]
        if generation == "new" and kind == "weights.h5":
            assert main(["inspect", str(path), *more]) == 1
            assert "does not say which" in capsys.readouterr().err
            assert main(["inspect", str(path), *more, "--uses", "gradient_accumulation", "--uses", "ema"]) == 1
            more += ["--uses", "ema"]
        assert main(["inspect", str(path), *more]) == 0
        shown = capsys.readouterr().out
        assert shown.count(", ".join(STATE[generation])) == 5
        assert ("use_ema        True\n" in shown) == (own == {})
        assert ("weight_decay   0.02\n" in shown) == (own == {})
        assert main(["convert", str(path), str(out), *more]) == 0
        capsys.readouterr()
        found = torch.load(out, weights_only=True)
        model, optimizer, _ = load_added(folder, generation, kind, own)
        for slot in STATE[generation]:
            weight, bias = (optimizer.state[param][slot] for param in (model.out.weight, model.gru.bias_hh_l0))
            assert torch.equal(found[f"{slot}.out.weight"], weight)
            assert torch.equal(next(v for k, v in found.items() if k.startswith(slot) and "bias_hh" in k), bias)
        assert "use_ema" not in found
        assert found["iterations"] == COUNT
        assert main(["convert", str(path), str(out), *more, "--drop", "ema"]) == 0
        assert not any(name.startswith("average") for name in torch.load(out, weights_only=True))
        capsys.readouterr()


def test_what_only_keras_3_has_is_told_if_it_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, is_told in ((DATA / "k3.h5", False), (edited(tmp_path, with_options(ema_momentum=0.5), "k3.h5"), True)):
        assert main(["inspect", str(path)]) == 0
        assert ("ema_momentum" in capsys.readouterr().out) == is_told
        assert main(["convert", str(path), str(tmp_path / "out.pt")]) == 0
        assert ("ema_momentum" in torch.load(tmp_path / "out.pt")) == is_told
