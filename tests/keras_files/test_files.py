"""Files of Keras, without Keras: what is read of them, what is refused, and what a hostile one can do."""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import datasets

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, Layout, freeze_second_biases, load_keras, save_keras
from torch_adadelta.keras.__main__ import main
from torch_adadelta.keras.bundle import crc32c
from torch_adadelta.keras.checkpoints import opened

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

DATA: Final = Path(__file__).resolve().parents[1] / "data" / "keras"

# The files with state, and where each generation's truth is.
WITH_STATE: Final = {
    "tf24": ["tf24.h5", "tf24_tfck/w", "tf24_tfck2/c-1", "tf24_tfck", "tf24_tfck2/c-1.index"],
    "legacy": ["legacy.h5", "legacy_tfck/w", "legacy_tfck2/c-1"],
    "new": ["new.h5", "new.keras", "new.weights.h5", "new_tfck/w", "new_tfck2/c-1"],
    "k3": ["k3.h5", "k3.keras", "k3.weights.h5"],
}
WITHOUT_STATE: Final = ["legacy.keras", "legacy.weights.h5"]


def build(**options: Any) -> tuple[nn.Sequential, AdadeltaKeras]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    return model, AdadeltaKeras(model.named_parameters(), **options)


def truth(generation: str) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    """Iterations, accum_grad and accum_var of kernel and bias of d1 and d2, as Keras has them."""
    arrays = list(np.load(DATA / f"{generation}_truth.npz").values())
    count, rest = int(arrays[0]), arrays[2 if generation == "k3" else 1 :]
    return (count, rest[:4], rest[4:]) if generation in ("tf24", "legacy") else (count, rest[::2], rest[1::2])


@pytest.mark.parametrize(("generation", "name"), [(g, name) for g, names in WITH_STATE.items() for name in names])
def test_real_files_bring_the_true_state(generation: str, name: str) -> None:
    model, optimizer = build()
    load_keras(DATA / name, optimizer, model, weights=True)
    iterations, square_avgs, acc_deltas = truth(generation)
    assert optimizer.iterations == iterations == 4
    for param, square_avg, acc_delta in zip(model.parameters(), square_avgs, acc_deltas, strict=True):
        state = optimizer.state[param]
        np.testing.assert_array_equal(state["square_avg"].numpy(), square_avg.T, strict=True)
        np.testing.assert_array_equal(state["acc_delta"].numpy(), acc_delta.T, strict=True)
    weights = datasets(DATA / f"{generation}.h5")
    kernel = next(value for key, value in weights.items() if key.endswith(("d1/kernel", "d1/kernel:0")))
    np.testing.assert_array_equal(model[0].weight.detach().numpy(), kernel.T)
    if name != "new.weights.h5":  # which holds no learning rate
        assert optimizer.learning_rate == 0.5


@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_files_without_state_say_which_to_save(name: str) -> None:
    model, optimizer = build()
    with pytest.raises(KerasFileError, match=r"holds no state of an Adadelta.*Save with model\.save\('model\.h5'\)"):
        load_keras(DATA / name, optimizer, model)


def test_weights_stay_unless_asked_for() -> None:
    model, optimizer = build(clipnorm=1.0, rho=0.5)
    before = [param.clone() for param in model.parameters()]
    report = load_keras(DATA / "tf24.h5", optimizer, model)
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.rho == 0.949999988079071
    assert optimizer.clipnorm is None  # the file's configuration has none
    assert str(report).replace(str(DATA), "DATA") == (
        """\
DATA/tf24.h5: .h5 of TensorFlow 2.4 or the legacy class of tf_keras
iterations: 4
decay: 0.0
clipvalue: None
clipnorm: None
global_clipnorm: None
learning_rate: 0.5
rho: 0.949999988079071
epsilon: 1e-07

Keras      PyTorch   layout          state
d1/kernel  0.weight  permute (1, 0)  yes
d1/bias    0.bias    as it is        yes
d2/kernel  1.weight  permute (1, 0)  yes
d2/bias    1.bias    as it is        yes"""
    )


def test_hyperparameters_can_stay() -> None:
    model, optimizer = build(learning_rate=0.125, clipnorm=1.0)
    load_keras(DATA / "tf24.h5", optimizer, model, hyperparameters=False)
    assert (optimizer.learning_rate, optimizer.clipnorm, optimizer.iterations) == (0.125, 1.0, 4)


def test_float64_and_frozen_parameters() -> None:
    model, optimizer = build()
    model.double()
    model[1].weight.requires_grad_(False)
    load_keras(DATA / "k3.keras", optimizer, model, weights=True)
    assert optimizer.state[model[0].weight]["acc_delta"].dtype is torch.float64
    model, optimizer = build()
    model.half()
    with pytest.warns(UserWarning, match="the state of 0.bias, 0.weight, 1.bias, 1.weight was rounded"):
        load_keras(DATA / "k3.keras", optimizer, model)


def test_a_loaded_job_is_saved_and_loaded_by_pytorch() -> None:
    model, optimizer = build()
    load_keras(DATA / "new.h5", optimizer, model, weights=True)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    _, other = build()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.iterations == 4
    assert all(torch.equal(a["square_avg"], b["square_avg"])
               for a, b in zip(optimizer.state.values(), other.state.values(), strict=True))  # fmt: skip


# ---- Which layer is which module ------------------------------------------------------------------------------------


def write_h5(path: Path, layers: dict[str, dict[str, np.ndarray]], config: Any = None, **optimizer: Any) -> Path:
    """A file as the legacy class writes it, of layers with weights by name."""
    options = {"name": "Adadelta", "learning_rate": 1.0, "decay": 0.0, "rho": 0.95, "epsilon": 1e-7, **optimizer}
    training = {"optimizer_config": {"class_name": "Adadelta", "config": options}}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = "2.4.0"
        file.attrs["training_config"] = json.dumps(training)
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
        file.create_group("model_weights").attrs["layer_names"] = [name.encode() for name in layers]
        state = {"Adadelta/iter:0": np.int64(3)}
        for layer, weights in layers.items():
            group = file["model_weights"].create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in weights]
            for name, value in weights.items():
                group[f"{layer}/{name}:0"] = value
                if not name.startswith("moving"):
                    state[f"Adadelta/{layer}/{name}/accum_grad:0"] = value**2
                    state[f"Adadelta/{layer}/{name}/accum_var:0"] = value**2 / 2
        group = file.create_group("optimizer_weights")
        group.attrs["weight_names"] = [name.encode() for name in state]
        for name, value in state.items():
            group[name] = value
    return path


def dense(inputs: int, outputs: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.standard_normal((inputs, outputs)), "bias": rng.standard_normal(outputs)}


def chain(*layers: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    entries = [{"class_name": cls, "config": {"name": name, **options}} for name, cls, options in layers]
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": entries}}


class Net(nn.Module):
    """Modules by name, which run in an order that nobody knows."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.double()


def load(path: Path, model: nn.Module, **options: Any) -> AdadeltaKeras:
    optimizer = AdadeltaKeras(model.named_parameters())
    load_keras(path, optimizer, model, weights=True, **options)
    return optimizer


def assert_is(param: torch.Tensor, array: np.ndarray) -> None:
    np.testing.assert_array_equal(param.detach().numpy(), array, strict=True)


def test_several_possibilities_are_an_error_that_lists_both_sides(tmp_path: Path) -> None:
    layers = {"first": dense(4, 4, 1), "second": dense(4, 4, 2), "third": dense(4, 1)}
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(b=nn.Linear(4, 4), a=nn.Linear(4, 4), c=nn.Linear(4, 1))
    with pytest.raises(KerasFileError) as caught:
        load(path, model)
    assert str(caught.value).replace(str(tmp_path), "TMP") == (
        """\
TMP/m.h5: which layer is which module cannot be told
Found: third → c
Left of Keras:
  first (class unknown): kernel (4, 4), bias (4,)
  second (class unknown): kernel (4, 4), bias (4,)
Left of PyTorch:
  b (Linear): weight (4, 4), bias (4,)
  a (Linear): weight (4, 4), bias (4,)
first may be b or a
second may be b or a
Give them in mapping={'layer': 'module'}; or pass match='order' if the modules are defined in the order of the layers"""
    )
    load(path, model, match="order")
    assert_is(model.b.weight, layers["first"]["kernel"].T)
    optimizer = load(path, model, mapping={"first": "a"})
    assert_is(model.a.weight, layers["first"]["kernel"].T)
    assert_is(model.b.weight, layers["second"]["kernel"].T)
    assert_is(optimizer.state[model.b.weight]["square_avg"], layers["second"]["kernel"].T ** 2)
    assert_is(optimizer.state[model.a.bias]["acc_delta"], layers["first"]["bias"] ** 2 / 2)


def test_names_decide_if_all_rivals_have_them(tmp_path: Path) -> None:
    layers = {"first": dense(4, 4, 1), "second": dense(4, 4, 2)}
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(second=nn.Linear(4, 4), first=nn.Linear(4, 4))
    load(path, model)
    assert_is(model.first.weight, layers["first"]["kernel"].T)
    with pytest.raises(KerasFileError, match="cannot be told"):
        load(path, Net(second=nn.Linear(4, 4), other=nn.Linear(4, 4)))
    with pytest.raises(KerasFileError, match="some names differ"):
        load(path, Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4)), match="names")


def test_the_order_decides_between_two_chains_only(tmp_path: Path) -> None:
    layers = {"one": dense(4, 4, 1), "two": dense(4, 4, 2)}
    config = chain(("one", "Dense", {}), ("act", "Activation", {}), ("two", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", layers, config)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))).double()
    load(path, model)
    assert_is(model[1][1].weight, layers["two"]["kernel"].T)
    with pytest.raises(KerasFileError, match="cannot be told"):
        load(path, Net(x=nn.Linear(4, 4), y=nn.Linear(4, 4)))
    branches = {"class_name": "Functional", "config": {"layers": [
        {"class_name": "Dense", "config": {"name": "one"}, "inbound_nodes": [[["in", 0, 0, {}]]]},
        {"class_name": "Dense", "config": {"name": "two"}, "inbound_nodes": [[["in", 0, 0, {}]]]},
    ]}}  # fmt: skip
    with pytest.raises(KerasFileError, match="cannot be told"):
        load(write_h5(tmp_path / "b.h5", layers, branches), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double())


def test_what_is_missing_on_one_side_is_an_error(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "two": dense(3, 1)})
    with pytest.raises(KerasFileError, match=r"Left of Keras:\n  two .*\nLeft of PyTorch: nothing"):
        load(path, Net(a=nn.Linear(4, 3)))
    with pytest.raises(KerasFileError, match=r"Left of Keras: nothing\nLeft of PyTorch:\n  c "):
        load(path, Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1), c=nn.Linear(1, 1)))
    with pytest.raises(
        KerasFileError, match=r"two fits none of them: kernel would be \(1, 3\), and weight is \(1, 4\)"
    ):
        load(path, Net(a=nn.Linear(4, 3), b=nn.Linear(4, 1)))
    load(path, Net(a=nn.Linear(4, 3)), mapping={"two": None})
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    model.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(KerasFileError, match="outside of modules that are known: scale"):
        load(path, model)


def test_the_optimizer_must_have_what_keras_trained_and_no_more(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "two": dense(3, 1)})
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    optimizer = AdadeltaKeras(model.a.parameters())
    with pytest.raises(
        KerasFileError, match=r"Keras trained two/kernel, but b.weight is no parameter of the optimizer"
    ):
        load_keras(path, optimizer, model)
    optimizer = AdadeltaKeras([*model.parameters(), nn.Parameter(torch.ones(5))])
    with pytest.raises(KerasFileError, match=r"parameter 4 of group 0 of shape \(5,\) is in the optimizer and corresp"):
        load_keras(path, optimizer, model)
    assert not optimizer.state
    assert optimizer.iterations == 0


def test_weights_are_given_explicitly(tmp_path: Path) -> None:
    kernel = np.arange(24.0).reshape(12, 2)
    path = write_h5(
        tmp_path / "m.h5", {"one": {"kernel": kernel, "bias": np.ones(2)}, "odd": {"scale": np.ones((2, 3))}}
    )
    model = Net(a=nn.Linear(12, 2))
    model.scale = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    layout = Layout(view=(4, 3, 2), permutation=(2, 1, 0), shape=(2, 12))
    mapping = {"one/kernel": ("a.weight", layout), "one/bias": "a.bias", "odd/scale": ("scale", (1, 0))}
    optimizer = load(path, model, mapping=mapping)
    assert_is(model.a.weight, kernel.reshape(4, 3, 2).transpose(2, 1, 0).reshape(2, 12))
    assert_is(model.scale, np.ones((3, 2)))
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    for key, value in datasets(path).items():
        np.testing.assert_array_equal(datasets(tmp_path / "back.h5")[key], value)
    for wrong, message in (
        ({"one/kernel": "a.weight"}, r"kernel of shape \(12, 2\) would be \(12, 2\), and a.weight is \(2, 12\)"),
        ({"one/kernel": ("a.weight", (0,))}, "cannot be turned"),
        ({"one/nothing": "a.weight"}, "has 'one/nothing', and one has kernel, bias"),
        ({"nothing": "a"}, "no layer and no weight"),
        ({"one": "b"}, "no module with parameters"),
        ({"one/bias": "a.bias", "odd/scale": ("scale", (1, 0))}, "some weights of one, and not kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, model, mapping=wrong)


def test_flattened_maps_need_a_word(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((2 * 3 * 4, 5))
    layers = {
        "conv": {"kernel": rng.standard_normal((3, 3, 1, 4)), "bias": np.ones(4)},
        "dense": {"kernel": kernel, "bias": np.ones(5)},
    }
    for between, is_flat in (
        ([("flatten", "Flatten", {})], True),
        ([("pool", "MaxPooling2D", {}), ("flatten", "Flatten", {}), ("drop", "Dropout", {})], True),
        ([("custom", "Whatever", {})], None),
        ([("reshape", "Reshape", {"target_shape": [24]})], None),
        ([("pool", "GlobalAveragePooling2D", {}), ("flatten", "Flatten", {})], False),
        ([("flatten", "Flatten", {}), ("norm", "Concatenate", {})], None),
    ):
        config = chain(("conv", "Conv2D", {"filters": 4}), *between, ("dense", "Dense", {}))
        path = write_h5(tmp_path / "m.h5", layers, config)
        model = Net(conv=nn.Conv2d(1, 4, 3), dense=nn.Linear(24, 5))
        if is_flat is not False:
            with pytest.raises(KerasFileError, match=r"flatten='channels_(first|last)'"):
                load(path, model)
        if is_flat:
            load(path, model, flatten="channels_first")
            assert_is(model.dense.weight, kernel.reshape(6, 4, 5).transpose(2, 1, 0).reshape(5, 24))
            shown = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()
            load(path, shown)
            assert_is(shown[3].weight, model.dense.weight.detach().numpy())
        load(path, model, flatten="channels_last")
        assert_is(model.dense.weight, kernel.T)
    # Without a configuration, nothing says whether there is a Flatten.
    path = write_h5(tmp_path / "m.h5", layers)
    with pytest.raises(KerasFileError, match="the file does not say whether flattened feature maps come in here"):
        load(path, model)
    load(path, model, flatten={"dense": 4})
    assert_is(model.dense.weight, kernel.reshape(6, 4, 5).transpose(2, 1, 0).reshape(5, 24))
    with pytest.raises(KerasFileError, match="24 features are no maps of 7 channels"):
        load(path, model, flatten={"dense": 7})


def recurrent(inputs: int, units: int, gates: int, bias: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kernels = {
        "kernel": rng.standard_normal((inputs, gates * units)),
        "recurrent_kernel": rng.standard_normal((units, gates * units)),
    }
    return {f"cell/{name}": value for name, value in {**kernels, "bias": rng.standard_normal(bias)}.items()}


def test_the_second_bias_of_an_lstm_must_be_frozen_at_zero(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"lstm": recurrent(3, 2, 4, (8,))})
    model = Net(rnn=nn.LSTM(3, 2))
    with pytest.raises(KerasFileError, match=r"rnn.bias_hh_l0 would be trained.*freeze_second_biases\(model\)"):
        load(path, model)
    model.rnn.bias_hh_l0.requires_grad_(False)
    with pytest.raises(KerasFileError, match=r"rnn.bias_hh_l0 is not 0"):
        load_keras(path, AdadeltaKeras(model.parameters()), model)
    load(path, freeze_second_biases(model))
    assert not model.rnn.bias_hh_l0.any()
    assert not model.rnn.bias_hh_l0.requires_grad


def test_a_gru_without_reset_after_is_refused(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"gru": recurrent(3, 2, 3, (6,))})
    with pytest.raises(KerasFileError, match="a GRU with reset_after=False applies its reset gate before"):
        load(path, Net(rnn=nn.GRU(3, 2)))


def test_a_missing_bias_must_be_frozen_at_zero(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": {"kernel": np.ones((3, 2))}})
    model = Net(a=nn.Linear(3, 2))
    with pytest.raises(KerasFileError, match=r"a\.bias would be trained. Keras has no such weight. Set it to 0"):
        load(path, model)
    model.a.bias.requires_grad_(False)
    load(path, model)
    assert not model.a.bias.any()


def test_differences_between_the_models_are_told(tmp_path: Path) -> None:
    norm = {"gamma": np.ones(4), "beta": np.zeros(4), "moving_mean": np.zeros(4), "moving_variance": np.ones(4)}
    layers = {"norm": norm, "lstm": recurrent(4, 2, 4, (8,)), "embed": {"embeddings": np.ones((5, 4))}}
    config = chain(
        ("embed", "Embedding", {}),
        ("norm", "BatchNormalization", {"epsilon": 0.001, "momentum": 0.99}),
        ("lstm", "LSTM", {"activation": "tanh", "recurrent_activation": "hard_sigmoid"}),
    )
    path = write_h5(tmp_path / "m.h5", layers, config)
    model = freeze_second_biases(Net(norm=nn.BatchNorm1d(4), lstm=nn.LSTM(4, 2), embed=nn.Embedding(5, 4)))
    with pytest.warns(UserWarning, match="norm has eps") as caught:
        load(path, model)
    assert str(caught[0].message).replace(str(tmp_path), "TMP") == (
        "TMP/m.h5: norm has eps=1e-05, and norm epsilon=0.001; norm has momentum=0.1, and norm momentum=0.99, which is "
        "momentum=0.01 in PyTorch; lstm has recurrent_activation='hard_sigmoid', and lstm has sigmoid; embed: this Keras "
        "updates only the rows that a batch uses of an embedding, as sparse=True does"
    )


def test_arguments_are_checked() -> None:
    model, optimizer = build()
    path = DATA / "k3.h5"
    with pytest.raises(TypeError, match="optimizer must be an AdadeltaKeras, got SGD"):
        load_keras(path, torch.optim.SGD(model.parameters()), model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        load_keras(path, optimizer, {})
    with pytest.raises(ValueError, match="match must be one of auto, names, order, got 'guess'"):
        load_keras(path, optimizer, model, match="guess")
    with pytest.raises(ValueError, match="flatten must be"):
        load_keras(path, optimizer, model, flatten="chw")
    with pytest.raises(ValueError, match="drop must be a set of ema"):
        load_keras(path, optimizer, model, drop={"momentum"})
    with pytest.raises(FileNotFoundError):
        load_keras(DATA / "nothing.h5", optimizer, model)
    assert optimizer.iterations == 0


# ---- Writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tf24.h5", "legacy.h5", "new.h5", "new.keras", "new.weights.h5", "k3.h5", "k3.keras", "k3.weights.h5"]
)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    model, optimizer = build()
    load_keras(DATA / name, optimizer, model, weights=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    optimizer.learning_rate = 0.25
    back = tmp_path / name
    report = save_keras(back, optimizer, model, DATA / name)
    other_model, other = build()
    load_keras(back, other, other_model, weights=True)
    assert other.iterations == 6
    for ours, theirs in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key in ("square_avg", "acc_delta"):
            assert torch.equal(optimizer.state[ours][key], other.state[theirs][key])
    if "learning_rate" in report.hyperparameters:
        assert other.learning_rate == 0.25
    else:
        assert report.notes == [
            "the file has no place for learning_rate, rho, epsilon; give them to Keras when you compile"
        ]
    assert list(tmp_path.iterdir()) == [back]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
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
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


# ---- The command ----------------------------------------------------------------------------------------------------


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
    assert main(["inspect", "legacy.keras"]) == 1
    assert capsys.readouterr().err.startswith("error: legacy.keras: it holds no state of an Adadelta")
    assert main(["inspect", "nothing"]) == 1


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_convert_writes_tensors(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"out.{suffix}"
    for names in WITH_STATE.values():
        for name in names[1:3]:
            assert main(["convert", str(DATA / name), str(out)]) == 0
            if suffix == "pt":
                found = torch.load(out, weights_only=True)
            else:
                found = pytest.importorskip("safetensors.torch").load_file(out)
            model, optimizer = build()
            load_keras(DATA / name, optimizer, model, weights=True)
            assert int(found["iterations"]) == 4
            # A .weights.h5 file of tf_keras does not have the names of layers.
            layers = ("dense", "dense_1") if name == "new.weights.h5" else ("d1", "d2")
            for index, layer in enumerate(layers):
                for part in ("weight", "bias"):
                    param = getattr(model[index], part)
                    assert torch.equal(found[f"weights.{layer}.{part}"], param)
                    for key in ("square_avg", "acc_delta"):
                        assert torch.equal(found[f"{key}.{layer}.{part}"], optimizer.state[param][key])
    assert list(tmp_path.iterdir()) == [out]


def test_convert_leaves_what_it_does_not_know_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gru = recurrent(3, 2, 3, (2, 6))
    layers = {"gru": gru, "odd": {"shift": np.ones((2, 3))}}
    path, out = write_h5(tmp_path / "m.h5", layers), tmp_path / "out.pt"
    assert main(["convert", str(path), str(out)]) == 0
    assert "odd stays in the layout of Keras: no module of PyTorch is known for it" in capsys.readouterr().out
    found = torch.load(out, weights_only=True)
    module = Net(rnn=nn.GRU(3, 2))
    load(path, module, mapping={"odd": None})
    for name, param in module.rnn.named_parameters():
        assert torch.equal(found[f"weights.gru.{name}"], param)
    assert_is(found["acc_delta.odd.shift"], np.full((2, 3), 0.5))


# ---- Hostile files --------------------------------------------------------------------------------------------------


def assert_refused(path: Path, message: str | None = None, **options: Any) -> None:
    """The file ends in a KerasFileError, and optimizer and model are as they were."""
    model, optimizer = build(learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(KerasFileError, match=message):
        load_keras(path, optimizer, model, weights=True, **options)
    assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
    assert all(map(torch.equal, model.parameters(), before))


def edited(tmp_path: Path, edit: Callable[[Any], None], name: str = "tf24.h5") -> Path:
    path = tmp_path / "edited.h5"
    path.write_bytes((DATA / name).read_bytes())
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def zipped(tmp_path: Path, method: int = zipfile.ZIP_STORED, **members: bytes | Callable[[bytes], bytes]) -> Path:
    path = tmp_path / "edited.keras"
    with zipfile.ZipFile(DATA / "k3.keras") as old, zipfile.ZipFile(path, "w", method) as new:
        for info in old.infolist():
            data = old.read(info)
            change = members.get(info.filename.partition(".")[0])
            new.writestr(info.filename, change(data) if callable(change) else data if change is None else change)
    return path


def replace(name: str, value: Any, **options: Any) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        del file[name]
        file.create_dataset(name, data=value, **options) if value is not None else file.create_dataset(name, **options)

    return edit


KERNEL: Final = "optimizer_weights/Adadelta/d1/kernel/accum_grad:0"


def test_datasets_larger_than_the_file_are_not_read(tmp_path: Path) -> None:
    huge = {"shape": (1 << 20, 1 << 20), "dtype": "f4"}
    assert_refused(edited(tmp_path, replace(KERNEL, None, **huge)), "made to exhaust the memory")
    assert_refused(edited(tmp_path, replace(KERNEL, None, **huge, chunks=(1024, 1024))), "is stored in chunks")
    bomb = np.zeros((4096, 4096), "f4")
    assert_refused(edited(tmp_path, replace(KERNEL, bomb, compression="gzip")), "is stored in chunks")


def test_datasets_and_links_that_lie_elsewhere_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(24)))
    external = {"shape": (3, 2), "dtype": "f4", "external": [(str(secret), 0, 24)]}
    assert_refused(edited(tmp_path, replace(KERNEL, None, **external)), "stored in another file")
    assert_refused(
        edited(
            tmp_path,
            lambda file: (file.pop(KERNEL), file.__setitem__(KERNEL, h5py.ExternalLink(DATA / "new.h5", "/x"))),
        ),
        "a link to elsewhere",
    )
    assert_refused(
        edited(tmp_path, lambda file: (file.pop(KERNEL), file.__setitem__(KERNEL, h5py.SoftLink("/model_weights")))),
        "a link to elsewhere",
    )

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((3, 2), "f4")
        layout[:] = h5py.VirtualSource(str(DATA / "legacy.h5"), KERNEL, (3, 2))
        del file[KERNEL]
        file.create_virtual_dataset(KERNEL, layout)

    assert_refused(edited(tmp_path, virtual), "stored in another file")


def test_a_group_that_contains_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop.weights.h5"
    path.write_bytes((DATA / "k3.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["layers/loop"] = file["layers"]
    assert_refused(path, "nested")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-np.ones((3, 2), "f4"), "has negative numbers"),
        (np.ones((2, 3), "f4"), "has shape"),
        (np.ones((3, 2), "i4"), "has dtype int32"),
        (np.array([b"a" * 9] * 6).reshape(3, 2), "not one of numbers"),
        (np.ones((3, 2), [("x", "f4")]), "not one of numbers"),
    ],
)
def test_state_that_is_none_is_refused(value: np.ndarray, message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, replace(KERNEL, value)), message)


def optimizer_config(**options: Any) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        training = json.loads(file.attrs["training_config"])
        class_name = options.pop("class_name", None)
        training["optimizer_config"]["config"].update(options)
        if class_name is not None:
            training["optimizer_config"]["class_name"] = class_name
        file.attrs["training_config"] = json.dumps(training)

    return edit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_name": "Adam"}, "its optimizer is Adam, not Adadelta"),
        ({"class_name": "LossScaleOptimizer"}, "whose scale does not carry over"),
        ({"learning_rate": -1.0}, "Invalid learning_rate: -1.0"),
        ({"learning_rate": float("nan")}, "Invalid learning_rate: nan"),
        ({"learning_rate": "fast"}, "learning_rate must be"),
        ({"learning_rate": {"class_name": "Mine", "config": {}}}, "its learning-rate schedule cannot be made"),
        ({"learning_rate": {"class_name": "os.system", "config": {"command": "false"}}}, "cannot be made"),
        ({"rho": 2}, "Invalid rho"),
        ({"clipnorm": 1.0, "global_clipnorm": 1.0}, "Cannot accept both"),
        ({"use_ema": True}, "drop={'ema'}"),
        ({"weight_decay": 0.1}, "drop={'weight_decay'}"),
        ({"gradient_accumulation_steps": 4}, "drop={'gradient_accumulation'}"),
        ({"loss_scale_factor": 2.0}, "loss_scale_factor=2.0"),
    ],
)
def test_hyperparameters_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, optimizer_config(**dict(options))), message)


def test_lambdas_are_refused_with_the_reason(tmp_path: Path) -> None:
    layer = {
        "class_name": "Lambda",
        "config": {"name": "scale", "function": ["4wEAAAA=", None, None], "function_type": "lambda"},
    }

    def add(file: Any) -> None:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"].append(layer)
        file.attrs["model_config"] = json.dumps(config)

    path = edited(tmp_path, add)
    assert_refused(path, r"its model has a lambda \('scale'\): that is the bytecode of a Python function")
    model, optimizer = build()
    load_keras(path, optimizer, model, drop={"lambda"})
    assert optimizer.iterations == 4
    code = {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}}
    path = zipped(tmp_path, config=lambda data: json.dumps({**json.loads(data), "extra": [code]}).encode())
    assert_refused(path, "has a lambda")


def test_json_that_is_none_or_too_deep_is_refused(tmp_path: Path) -> None:
    assert_refused(zipped(tmp_path, config=b"{"), "config.json is no JSON")
    assert_refused(zipped(tmp_path, config=b"[]"), "not a JSON object")
    assert_refused(zipped(tmp_path, config=b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "config.json is n")
    assert_refused(zipped(tmp_path, config=b'{"a":' * 400 + b"1" + b"}" * 400), "nested more than 150 deep")
    assert_refused(
        zipped(tmp_path, config=b'{"class_name": "Sequential", "config": {"layers": [3]}}'), "a layer that is none"
    )
    assert_refused(zipped(tmp_path, config=b'{"a": ' + b"1" * 100_000 + b"}"), "no JSON")


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path, zipfile.ZIP_DEFLATED, model=bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert_refused(path, "made to exhaust the memory")
    # A directory that claims less than the member unpacks to.
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    size = struct.unpack_from("<I", data, at + 24)[0]
    assert size == 50_000_000
    struct.pack_into("<I", data, at + 24, 1000)
    path.write_bytes(bytes(data))
    assert_refused(path)


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    assert_refused(path, r"has no model\.weights\.h5")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("config.json", "{}")
    assert_refused(path, "has a file twice")
    assert_refused(zipped(tmp_path, model=b"no HDF5"), "damaged")
    path.write_bytes(b"something else")
    assert_refused(path, "it is no .h5, .keras or .weights.h5 file")
    assert_refused(tmp_path, "holds no TensorFlow checkpoint")


def test_a_checkpoint_listing_does_not_lead_out_of_its_directory(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (DATA / "tf24_tfck2").iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "checkpoint").write_text('model_checkpoint_path: "../outside/c-1"\n')
    assert_refused(inside, "holds no TensorFlow checkpoint")


def test_a_missing_or_short_data_file_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "w.index"
    index.write_bytes((DATA / "tf24_tfck/w.index").read_bytes())
    assert_refused(tmp_path / "w", r"its data file w\.data-00000-of-00001 is missing")
    (tmp_path / "w.data-00000-of-00001").write_bytes((DATA / "tf24_tfck/w.data-00000-of-00001").read_bytes()[:100])
    assert_refused(tmp_path / "w")


def test_the_checksum_is_that_of_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


# ---- Damaged files, at random ---------------------------------------------------------------------------------------

FUZZED: Final = (
    "tf24.h5",
    "new.h5",
    "k3.h5",
    "k3.keras",
    "new.keras",
    "k3.weights.h5",
    "tf24_tfck2/c-1",
    "new_tfck2/c-1",
)
MUTATIONS: Final = {"tfck": 60, "": 8}  # of each; those of HDF5 take a process each


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, with some bytes or a stretch overwritten, or with a stretch moved, doubled or left out."""
    changed = bytearray(data)
    kind = rng.integers(6)
    a, b = sorted(int(x) for x in rng.integers(0, len(data), 2))
    if kind == 0:
        return bytes(changed[:a])
    if kind == 1:
        for at in rng.integers(0, len(data), rng.integers(1, 30)):
            changed[at] = rng.integers(256)
    elif kind == 2:
        changed[a : a + 8] = int(rng.integers(0, 2**63)).to_bytes(8, "little")[: len(changed[a : a + 8])]
    elif kind == 3:
        changed[a : min(b, a + 64)] = b"\xff" * len(changed[a : min(b, a + 64)])
    elif kind == 4:
        changed[a:b] = changed[a:b] * 2
    else:
        del changed[a : min(b, a + 200)]
    return bytes(changed)


def files_of(name: str) -> Iterator[Path]:
    path = DATA / name
    yield from [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*"))


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_files_end_in_an_error_or_bring_a_valid_state(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damage that nothing tells, such as another digit of a weight in HDF5, which has no checksums, may pass."""
    monkeypatch.setattr("torch_adadelta.keras.hdf5.PROBE_SECONDS", 5)
    rng = np.random.default_rng(sum(map(ord, name)))
    originals = {path.name: path.read_bytes() for path in files_of(name)}
    refused, count = 0, next(count for kind, count in MUTATIONS.items() if kind in name)
    for _ in range(count):
        victim = rng.choice(list(originals))
        for other, data in originals.items():
            (tmp_path / other).write_bytes(mutated(data, rng) if other == victim else data)
        model, optimizer = build(learning_rate=0.125)
        before = [param.clone() for param in model.parameters()]
        try:
            load_keras(tmp_path / Path(name).name, optimizer, model, weights=True)
        except KerasFileError:
            refused += 1
            assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
            assert all(map(torch.equal, model.parameters(), before))
        else:
            for param in model.parameters():
                assert not any((tensor < 0).any() for tensor in optimizer.state[param].values())
            if "tfck" in name:  # which has a checksum on every byte that counts
                iterations, square_avgs, acc_deltas = truth(name.partition("_")[0])
                assert optimizer.iterations == iterations
                for param, *slots in zip(model.parameters(), square_avgs, acc_deltas, strict=True):
                    for tensor, slot in zip(optimizer.state[param].values(), slots, strict=True):
                        np.testing.assert_array_equal(tensor.numpy(), slot.T)
    assert refused > count // 4


def test_without_h5py_checkpoints_of_tensorflow_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_adadelta.keras.hdf5.h5py", None)
    model, optimizer = build()
    load_keras(DATA / "tf24_tfck2", optimizer, model)
    assert optimizer.iterations == 4
    with pytest.raises(ImportError, match=r"pip install 'torch_adadelta\[keras\]'"):
        load_keras(DATA / "tf24.h5", optimizer, model)


def test_hdf5_that_loops_or_crashes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a mock of the process, but of what goes wrong in it."""
    path = tmp_path / "k3.h5"
    path.write_bytes((DATA / "k3.h5").read_bytes())
    monkeypatch.setattr("torch_adadelta.keras.hdf5.PROBE_SECONDS", 1)
    script = tmp_path / "probe.py"
    monkeypatch.setattr("torch_adadelta.keras.hdf5._PROBE", script)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\n"
    for code, message in (
        (limit + "while True: pass", "HDF5 was still reading it after 1 seconds of work"),
        ("import os; os.abort()", r"HDF5 crashes on it \(signal 6\)"),
        ("import sys; sys.exit('OSError: bad')", r"it is damaged, or no file of Keras \(OSError: bad\)"),
    ):
        script.write_text(code)
        assert_refused(path, message)


def test_an_order_that_shapes_leave_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        for group in ("alpha", "beta"):  # attributes of a subclass, whose order nothing says
            file[f"{group}/vars/0"] = np.ones((2, 2), "f4")
        file["optimizer/vars/0"] = np.int64(3)
        for number in range(1, 5):
            file[f"optimizer/vars/{number}"] = np.full((2, 2), number, "f4")
    with (
        pytest.raises(KerasFileError, match=r"several orders of them fit. Pass config=model\.to_json\(\)"),
        opened(path),
    ):
        pass


# ---- Options that mean something else elsewhere ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new.h5", "k3.h5"])
@pytest.mark.parametrize(
    ("given", "expected", "notes"),
    [
        ({"clipnorm": 0}, {}, ["clipnorm=0 means no clipping in this Keras, and is left out"]),
        ({"clipvalue": 0.0, "global_clipnorm": 0}, {}, None),
        ({"clipnorm": 0.0, "global_clipnorm": 2.0}, {"global_clipnorm": 2.0}, None),
        (
            {"clipnorm": 1.0, "clipvalue": 0.5},
            {"clipnorm": 1.0},
            ["clipvalue=0.5 does nothing in this Keras beside clipnorm, and is left out"],
        ),
        ({"clipnorm": 1.0, "clipvalue": 0}, {"clipnorm": 1.0}, None),
    ],
)
def test_clip_options_that_do_nothing_in_newer_keras(
    name: str, given: dict[str, Any], expected: dict[str, float], notes: list[str] | None, tmp_path: Path
) -> None:
    path = edited(tmp_path, optimizer_config(**given), name)
    model, optimizer = build(clipvalue=3.0)
    report = load_keras(path, optimizer, model)
    for key in ("clipvalue", "clipnorm", "global_clipnorm"):
        assert getattr(optimizer, key) == expected.get(key), key
    assert notes is None or report.notes == notes
    assert len(report.notes) == len(given) - len(expected)


def test_a_clip_option_of_zero_is_itself_in_tensorflow_2_4(tmp_path: Path) -> None:
    model, optimizer = build()
    load_keras(edited(tmp_path, optimizer_config(clipvalue=0.0, clipnorm=1.0)), optimizer, model)
    assert (optimizer.clipvalue, optimizer.clipnorm) == (0.0, 1.0)


def test_an_epsilon_of_zero_is_refused_where_it_stays_zero(tmp_path: Path) -> None:
    for name in ("new.h5", "k3.h5"):
        path = edited(tmp_path, optimizer_config(epsilon=0.0), name)
        assert_refused(path, r"epsilon=0\.0, which stays 0 in this Keras, and means 1e-7 for AdadeltaKeras")
        model, optimizer = build(epsilon=1e-30, learning_rate=0.5)
        load_keras(path, optimizer, model, hyperparameters=False)
        assert (optimizer.iterations, optimizer.epsilon) == (4, 1e-30)
    model, optimizer = build()
    load_keras(edited(tmp_path, optimizer_config(epsilon=0)), optimizer, model)
    assert optimizer.epsilon == 1e-7


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
    template, back = tmp_path / f"template.{name.rpartition('.')[2]}", tmp_path / f"back.{name.rpartition('.')[2]}"
    save_keras(template, optimizer, model, DATA / name)
    assert written_config(template)["clipnorm"] == 1.0
    model, optimizer = build()
    save_keras(back, optimizer, model, template)
    config = written_config(back)
    assert [config.get(key) for key in ("clipvalue", "clipnorm", "global_clipnorm")] == [None] * 3
    model, optimizer = build(global_clipnorm=2.0)
    save_keras(back, optimizer, model, template)
    assert [written_config(back).get(key) for key in ("clipnorm", "global_clipnorm")] == [None, 2.0]
    load_keras(back, optimizer, model)
    assert (optimizer.clipnorm, optimizer.global_clipnorm) == (None, 2.0)


def written_config(path: Path) -> dict[str, Any]:
    if zipfile.is_zipfile(path):
        return json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]["optimizer"]["config"]
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["training_config"])["optimizer_config"]["config"]


# ---- What a file does not hold --------------------------------------------------------------------------------------

OWN: Final = {"clipnorm": 2.0, "learning_rate": 0.125, "rho": 0.5, "epsilon": 1e-3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("new.weights.h5", "clipnorm=2.0, clipvalue=None, global_clipnorm=None, learning_rate=0.125, decay=0.0, rho=0.5, "
                           "epsilon=0.001, and no weight decay"),
        ("k3.weights.h5", "clipnorm=2.0, clipvalue=None, global_clipnorm=None, decay=0.0, rho=0.5, epsilon=0.001, and no "
                          "weight decay"),
        ("k3.keras", "clipnorm=2.0, clipvalue=None, global_clipnorm=None, decay=0.0, rho=0.5, epsilon=0.001, and no "
                     "weight decay"),
        ("new_tfck2/c-1", "clipnorm=2.0, clipvalue=None, global_clipnorm=None, decay=0.0, rho=0.5, epsilon=0.001, and no "
                          "weight decay"),
        ("tf24_tfck2/c-1", "clipnorm=2.0, clipvalue=None, global_clipnorm=None, epsilon=0.001"),
        ("tf24.h5", None),
        ("new.h5", None),
        ("new.keras", None),
        ("k3.h5", None),
    ],
)  # fmt: skip
def test_what_the_file_cannot_confirm_is_told(name: str, options: str | None) -> None:
    model, optimizer = build(**OWN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_keras(DATA / name, optimizer, model)
    expected = [] if options is None else [
        f"not in the file, so that training goes on with what the optimizer has: {options}; see that Keras had the same"
    ]  # fmt: skip
    assert report.notes == expected
    assert [str(warning.message) for warning in caught] == [f"{DATA / name}: {note}" for note in expected]
    assert caught == [] or caught[0].filename == __file__
    # Who keeps his own knows.
    model, optimizer = build(**OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_keras(DATA / name, optimizer, model, hyperparameters=False).notes == []


def test_a_schedule_that_is_not_in_the_file_is_told(tmp_path: Path) -> None:
    """Keras 3 leaves the learning rate away where it is a schedule."""
    path = tmp_path / "k3.weights.h5"
    path.write_bytes((DATA / "k3.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        states = file["optimizer/vars"]
        del states["1"]
        for number in range(2, 10):
            states.move(str(number), str(number - 1))
    model, optimizer = build(**OWN)
    with pytest.warns(
        UserWarning, match=r"learning_rate=0\.125.* see that Keras had the same \(Keras had a schedule\)"
    ):
        load_keras(path, optimizer, model)
    np.testing.assert_array_equal(optimizer.state[model[0].weight]["square_avg"].numpy(), truth("k3")[1][0].T)


# ---- What cannot go on as it was ------------------------------------------------------------------------------------


def test_norms_of_parameters_that_are_not_one_to_one(tmp_path: Path) -> None:
    gru = recurrent(3, 2, 3, (2, 6))
    rng = np.random.default_rng(0)
    parts = {
        f"{part}/{role}": rng.standard_normal(shape)
        for part in ("query", "key", "value", "attention_output")
        for role, shape in (
            ("kernel", (2, 2, 4) if "_" in part else (4, 2, 2)),
            ("bias", (4,) if "_" in part else (2, 2)),
        )
    }
    path = write_h5(tmp_path / "m.h5", {"attend": parts, "gru": gru, "one": dense(4, 3)}, clipnorm=1.0)

    def model() -> nn.Module:
        return Net(attend=nn.MultiheadAttention(4, 2), gru=nn.GRU(3, 2), one=nn.Linear(4, 3))

    ours = model()
    optimizer = AdadeltaKeras(ours.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_keras(path, optimizer, ours, weights=True)
    assert report.norm_variables == [
        (f"attend/{part}/{role}", f"attend.in_proj_{name}[{first}:{first + 4}]")
        for first, part in ((0, "query"), (4, "key"), (8, "value"))
        for role, name in (("kernel", "weight"), ("bias", "bias"))
    ] + [("gru/bias", "gru.bias_ih_l0 and gru.bias_hh_l0")]
    assert (
        "\nnorm_variables:\n"
        "  attend/query/kernel → attend.in_proj_weight[0:4]\n  attend/query/bias → attend.in_proj_bias[0:4]\n"
    ) in str(report)

    # A step clips the gradient of each weight of Keras by its own norm.
    before = {key: value for key, value in datasets(path).items() if key.startswith("optimizer_weights")}
    rng = np.random.default_rng(1)
    for param in ours.parameters():
        param.grad = torch.from_numpy(rng.standard_normal(param.shape))
    grads = {name: param.grad.numpy() for name, param in ours.named_parameters() if param.grad is not None}
    pieces = [[("attend.in_proj_weight", rows)] for rows in (slice(0, 4), slice(4, 8), slice(8, 12))]
    pieces += [[("attend.in_proj_bias", rows)] for rows in (slice(0, 4), slice(4, 8), slice(8, 12))]
    pieces += [[("gru.bias_ih_l0", slice(None)), ("gru.bias_hh_l0", slice(None))]]
    pieces += [[(name, slice(None))] for name in grads if "in_proj" not in name and "gru.bias" not in name]
    optimizer.rho = 0.0  # so that square_avg is the square of the clipped gradient
    optimizer.step()
    for own in pieces:
        norm = np.sqrt(sum(np.square(grads[name][rows]).sum() for name, rows in own))
        for name, rows in own:
            square_avg = optimizer.state[dict(ours.named_parameters())[name]]["square_avg"].numpy()[rows]
            np.testing.assert_allclose(square_avg, np.square(grads[name][rows] / max(norm, 1.0)), rtol=1e-6)

    # Written back and loaded again, it is the same; and the optimizer's own clipnorm, of which the file knows nothing.
    save_keras(tmp_path / "back.h5", optimizer, ours, path)
    assert before.keys() <= datasets(tmp_path / "back.h5").keys()
    other = model()
    again = AdadeltaKeras(other.parameters(), clipnorm=3.0, norm_variables=[[other.one.weight, other.one.bias]])
    load_keras(tmp_path / "back.h5", again, other, hyperparameters=False)
    assert [group["norm_variables"] for group in again.param_groups] == [
        group["norm_variables"] for group in optimizer.param_groups
    ]
    # A bias that is frozen has no part in a norm.
    other.gru.bias_hh_l0.requires_grad_(False)
    other.attend.in_proj_weight.requires_grad_(False)
    assert [label for label, _ in load_keras(path, again, other).norm_variables] == [
        f"attend/{part}/bias" for part in ("query", "key", "value")
    ]

    # Where each process has a part of the parameters, norms are those of parameters, which is told.
    for options in ({"clipnorm": 3.0}, {}):
        other = model()
        part = AdadeltaKeras(other.parameters(), norm_group="world", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = load_keras(path, part, other, hyperparameters=False)
        assert (part.norm_variables, report.norm_variables) == (None, [])
        names = "attend.in_proj_{0}[{1}:{2}] (in Keras attend/{3}/{4})"
        expected = "; ".join(
            [names.format(name, first, first + 4, part_of, role)
             for first, part_of in ((0, "query"), (4, "key"), (8, "value"))
             for role, name in (("kernel", "weight"), ("bias", "bias"))]
        )  # fmt: skip
        assert [str(warning.message).replace(str(tmp_path), "TMP") for warning in caught] == (
            [
                "TMP/m.h5: clipnorm=3 takes the norm of each parameter, and Keras of each of its weights, which are not the "
                f"same for {expected}; gru.bias_ih_l0 and gru.bias_hh_l0 (in Keras gru/bias): there gradients are clipped "
                "differently, for norm_variables is not for norm_group, nor for ZeroRedundancyOptimizer"
            ]
            if options
            else []
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"clipvalue": 1.0}, {"global_clipnorm": 1.0}, {}):
            load(write_h5(tmp_path / "n.h5", {"attend": parts, "gru": gru, "one": dense(4, 3)}, **options), model())
        lstm = freeze_second_biases(Net(rnn=nn.LSTM(3, 2)))
        load(write_h5(tmp_path / "l.h5", {"lstm": recurrent(3, 2, 4, (8,))}, clipnorm=1.0), lstm)


@pytest.mark.parametrize(
    ("version", "backend"), [("3.15.1", "tensorflow"), ("3.15.1", "torch"), ("2.21.0", "tensorflow")]
)
def test_repeated_indices_of_an_embedding(version: str, backend: str, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"embed": {"embeddings": np.ones((5, 4))}, "one": dense(4, 3)})
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"], file.attrs["backend"] = version, backend
    model = Net(embed=nn.Embedding(5, 4, sparse=version < "3"), one=nn.Linear(4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(path, model)
    expected = [
        f"{path}: embed: Keras 3 on TensorFlow adds the squares of the gradients of rows that a batch uses more than once, "
        "where AdadeltaKeras squares their sum; with such batches training goes on differently"
    ]
    assert [str(warning.message) for warning in caught] == (
        expected if (version, backend) == ("3.15.1", "tensorflow") else []
    )


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_recurrent_layers_that_go_another_way(is_wrapped: bool, tmp_path: Path) -> None:
    options = {"go_backwards": True, "stateful": True}
    weights = recurrent(3, 2, 4, (8,))
    if is_wrapped:
        options = {"layer": {"class_name": "LSTM", "config": options}}
        weights = {f"{side}_lstm/{k}": v for side in ("forward", "backward") for k, v in weights.items()}
    config = chain(("lstm", "Bidirectional" if is_wrapped else "LSTM", options))
    path = write_h5(tmp_path / "m.h5", {"lstm": weights}, config)
    model = freeze_second_biases(Net(rnn=nn.LSTM(3, 2, bidirectional=is_wrapped)))
    with pytest.warns(UserWarning, match="go_backwards") as caught:
        load(path, model)
    assert str(caught[0].message) == (
        f"{path}: lstm has go_backwards=True, and rnn goes forwards; lstm has stateful=True, and rnn begins each batch anew"
    )


# ---- All or nothing -------------------------------------------------------------------------------------------------


def test_a_load_that_fails_amid_the_writes_leaves_nothing(tmp_path: Path) -> None:
    """The statistics of the norm share one element, so that writing them fails when all else is set."""
    schedule = {
        "class_name": "ExponentialDecay",
        "config": {"initial_learning_rate": 3.0, "decay_steps": 5, "decay_rate": 0.5},
    }
    norm = {"gamma": np.ones(3), "beta": np.zeros(3), "moving_mean": np.ones(3), "moving_variance": np.ones(3)}
    path = write_h5(
        tmp_path / "m.h5", {"one": dense(4, 3), "norm": norm}, learning_rate=schedule, clipnorm=5.0, rho=0.75
    )
    model = Net(one=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))
    model.norm.running_mean = torch.zeros(1, dtype=torch.float64).expand(3)
    optimizer = AdadeltaKeras(model.one.named_parameters(), learning_rate=0.125, clipvalue=2.0)
    optimizer.add_param_group({"params": list(model.norm.named_parameters()), "lr": 0.25})
    optimizer.iterations = 2
    before = [param.clone() for param in (*model.parameters(), *model.buffers())]
    state, defaults = optimizer.state_dict(), dict(optimizer.defaults)
    with pytest.raises(RuntimeError, match="single memory location"):
        load_keras(path, optimizer, model, weights=True)
    assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    assert optimizer.state_dict() == state
    assert dict(optimizer.defaults) == defaults
    assert (optimizer.iterations, optimizer.learning_rate, optimizer.clipnorm, optimizer.clipvalue) == (
        2,
        0.125,
        None,
        2.0,
    )
    # A group that comes later has the learning rate of before, not the schedule.
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.125]
    for param in (*model.parameters(), extra):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.125]
    other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    other.grad = torch.ones_like(other)
    AdadeltaKeras([other], learning_rate=0.125, clipvalue=2.0).step()
    assert torch.equal(extra, other)


def test_a_warning_that_is_an_error_leaves_nothing() -> None:
    model, optimizer = build(learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not in the file"):
            load_keras(DATA / "k3.weights.h5", optimizer, model, weights=True)
    assert (optimizer.iterations, optimizer.learning_rate, dict(optimizer.state)) == (0, 0.125, {})
    assert all(map(torch.equal, model.parameters(), before))


def test_blocks_of_a_layout_go_out_as_they_came_in(tmp_path: Path) -> None:
    """An order of three that is not its own inverse."""
    kernel = np.arange(24.0).reshape(4, 6)
    path = write_h5(tmp_path / "m.h5", {"odd": {"kernel": kernel}})
    model = Net()
    model.weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    layout = Layout(view=(4, 3, 2), blocks=(1, 2, 0), permutation=(1, 2, 0), shape=(6, 4))
    mapping = {"odd/kernel": ("weight", layout)}
    optimizer = load(path, model, mapping=mapping)
    assert_is(model.weight, kernel.reshape(4, 3, 2)[:, [1, 2, 0]].transpose(1, 2, 0).reshape(6, 4))
    assert_is(optimizer.state[model.weight]["square_avg"], model.weight.detach().numpy() ** 2)
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    for key, value in datasets(path).items():
        np.testing.assert_array_equal(datasets(tmp_path / "back.h5")[key], value)
