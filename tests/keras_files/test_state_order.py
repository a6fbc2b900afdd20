"""State that has numbers instead of names: each weight gets its own, or the file is refused and says what to pass."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import datasets

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, load_keras, save_keras
from torch_adadelta.keras import state_order as state_orders
from torch_adadelta.keras.__main__ import main
from torch_adadelta.keras.checkpoints import opened

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")

Groups = dict[str, list[tuple[int, ...]]]
# What asks for no averages and no accumulated gradients is written in two ways.
ASKS_NOTHING = {"use_ema": False, "gradient_accumulation_steps": 1}
OPTIMIZER = {"class_name": "Adadelta", "config": {"learning_rate": 0.5, "rho": 0.95, "epsilon": 1e-7, **ASKS_NOTHING}}


class File:
    """A file of numbered weights, each full of a number of its own: its state has that times 100, and times 1000.

    What else there is has it times 10, and times 20.

    Args:
        path: a ``.keras`` file if there is a configuration, a ``.weights.h5`` file otherwise.
        groups: the shapes of the weights of each layer, by where the file has it.
        order: of the optimizer: layers, or a layer and the number of a weight in it.
        config: of the model.
        optimizer: its configuration.
        extras: how many other variables come first for each weight.
    """

    def __init__(
        self,
        path: Path,
        groups: Groups,
        order: list[str],
        config: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        extras: int = 0,
        has_rate: bool = True,
    ) -> None:
        self.path = path
        self.values: dict[str, np.ndarray] = {}
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            for group, shapes in groups.items():
                for number, shape in enumerate(shapes):
                    name = f"{group}/{number}"
                    self.values[name] = np.full(shape, len(self.values) + 1, "f4")
                    file[f"{group}/vars/{number}"] = self.values[name]
            names = [n for entry in order for n in self.values if n == entry or n.rpartition("/")[0] == entry]
            arrays: list[Any] = [np.int64(7), *([np.float32(0.5)] if has_rate else [])]
            arrays += [self.values[name] * (10 + 10 * n) for n in range(extras) for name in names]
            arrays += [self.values[name] * factor for name in names for factor in (100, 1000)]
            for number, array in enumerate(arrays):
                file[f"optimizer/vars/{number}"] = array
            file["optimizer/vars"].attrs["name"] = "adadelta"
        if path.suffix == ".keras":
            with zipfile.ZipFile(path, "w") as archive:
                compiled = {"compile_config": {"optimizer": optimizer}} if optimizer else {}
                archive.writestr("config.json", json.dumps({**(config or {}), **compiled}))
                archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
                archive.writestr("model.weights.h5", buffer.getvalue())
        else:
            path.write_bytes(buffer.getvalue())

    def assert_moved(self, params: dict[str, torch.Tensor], optimizer: AdadeltaKeras) -> None:
        """Each parameter has the weight of this name and its state; those of the optimizer that are trained have some."""
        assert optimizer.param_groups[0]["iterations"] == 7
        for name, param in params.items():
            value = float(self.values[name].flat[0])
            assert (param == value).all(), name
            if param.requires_grad:
                assert (optimizer.state[param]["square_avg"] == 100 * value).all(), name
                assert (optimizer.state[param]["acc_delta"] == 1000 * value).all(), name


def chain(*layers: tuple[str, bool], **options: Any) -> dict[str, Any]:
    """Dense layers, trainable or not."""
    entries = [
        {"class_name": "Dense", "config": {"name": name, "trainable": trainable, **options}}
        for name, trainable in layers
    ]
    return {"class_name": "Sequential", "config": {"name": "sequential", "layers": entries}}


def dense(count: int) -> Groups:
    return {"layers/dense" + (f"_{n}" if n else ""): [(3, 3), (3,)] for n in range(count)}


def linears(frozen: list[int], count: int) -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(count)])
    for number in frozen:
        model[number].requires_grad_(False)
    return model


def of_linears(model: nn.Sequential) -> dict[str, torch.Tensor]:
    names = list(dense(len(model)))
    return {f"{name}/{n}": p for name, m in zip(names, model, strict=True) for n, p in enumerate((m.weight, m.bias))}


@pytest.mark.parametrize("has_rate", [False, True])
def test_layers_of_a_class_come_by_their_numbers(has_rate: bool, tmp_path: Path) -> None:
    """Not by the alphabet, by which dense_10 comes before dense_2."""
    file = File(tmp_path / "m.weights.h5", dense(12), list(dense(12)), has_rate=has_rate)
    with opened(file.path) as checkpoint:
        assert (checkpoint.learning_rate is not None) == has_rate
    model = linears([], 12)
    optimizer = AdadeltaKeras(model.parameters())
    load_keras(file.path, optimizer, model, weights=True, match="order")
    file.assert_moved(of_linears(model), optimizer)


@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_layers_frozen_after_some_training(kind: str, has_all: bool, tmp_path: Path) -> None:
    """There is state for layers that are not trained any more: the others have the shapes of averages, not their place."""
    config = chain(("a", False), ("b", True), ("c", True))
    file = File(tmp_path / f"m.{kind}", dense(3), list(dense(3)), config, OPTIMIZER)
    options: dict[str, Any] = {} if kind == "keras" else {"config": config}
    model = linears([0], 3)
    optimizer = AdadeltaKeras(model.parameters() if has_all else [*model[1].parameters(), *model[2].parameters()])
    load_keras(file.path, optimizer, model, weights=True, **options)
    file.assert_moved(of_linears(model), optimizer)
    assert (model[0].weight in optimizer.state) == has_all
    # What is frozen keeps its state, and what Keras does not train must not be trained here.
    save_keras(tmp_path / f"back.{kind}", optimizer, model, file.path, **options)
    before, after = datasets(file.path), datasets(tmp_path / f"back.{kind}")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    model = linears([], 3)
    with pytest.raises(
        KerasFileError, match=r"Keras does not train a/kernel, but 0\.weight is a parameter of the optimi"
    ):
        load_keras(file.path, AdadeltaKeras(model.parameters()), model, weights=True, **options)


@pytest.mark.parametrize(
    ("frozen", "with_state"),
    [([0], []), ([2], []), ([0, 1], [0, 1]), ([0, 3], [0, 3]), ([0, 3], [])],
)
def test_layers_frozen_before_and_after(frozen: list[int], with_state: list[int], tmp_path: Path) -> None:
    names = list(dense(4))
    config = chain(*[(name, number not in frozen) for number, name in enumerate("abcd")])
    order = [name for number, name in enumerate(names) if number not in frozen or number in with_state]
    file = File(tmp_path / "m.keras", dense(4), order, config, OPTIMIZER)
    model = linears(frozen, 4)
    optimizer = AdadeltaKeras(model.parameters())
    load_keras(file.path, optimizer, model, weights=True)
    file.assert_moved(of_linears(model), optimizer)


@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_which_frozen_layer_has_state_is_asked_for(kind: str, tmp_path: Path) -> None:
    """Of two that are frozen one has state, and b may have the second pair or the third."""
    config = chain(("a", False), ("b", True), ("c", False))
    options: dict[str, Any] = {} if kind == "keras" else {"config": config}
    for order in (["layers/dense", "layers/dense_1"], ["layers/dense_1", "layers/dense_2"]):
        file = File(tmp_path / f"m.{kind}", dense(3), order, config, OPTIMIZER)
        model = linears([0, 2], 3)
        optimizer = AdadeltaKeras(model.parameters())
        for drop in ((), {"ema"}, {"ema", "gradient_accumulation"}):
            with pytest.raises(
                KerasFileError, match=r"several orders of them fit. Pass state_order=\[names of the w"
            ) as caught:
                load_keras(file.path, optimizer, model, weights=True, drop=drop, **options)
            assert "ema" not in str(caught.value)
        names = [
            name
            for group in order
            for name in (f"{'abc'[list(dense(3)).index(group)]}/{r}" for r in ("kernel", "bias"))
        ]
        load_keras(file.path, optimizer, model, weights=True, state_order=names, **options)
        file.assert_moved(of_linears(model), optimizer)


@pytest.mark.parametrize("kind", ["weights.h5", "keras"])
@pytest.mark.parametrize(
    ("given", "drop", "slots"),
    [
        ({"use_ema": True}, (), ["average"]),
        ({"gradient_accumulation_steps": 2}, (), ["gradient_accumulator"]),
        ({"use_ema": True, "gradient_accumulation_steps": 2}, (), ["average", "gradient_accumulator"]),
        ({"use_ema": True}, {"gradient_accumulation"}, ["average", None]),
        ({"gradient_accumulation_steps": 2}, {"ema"}, [None, "gradient_accumulator"]),
        ({"gradient_accumulation_steps": 2}, {"gradient_accumulation"}, None),
    ],
)
def test_averages_and_sums_are_what_the_optimizer_or_the_configuration_says(
    kind: str, given: dict[str, Any], drop: Any, slots: list[str | None] | None, tmp_path: Path
) -> None:
    config = chain(("a", True), ("b", True))
    both = {"use_ema": True, "gradient_accumulation_steps": 2}
    extras = [None] if slots is None else slots
    asks = {**OPTIMIZER["config"], **(both if len(extras) == 2 else given)}  # the file has what is dropped, too
    file = File(
        tmp_path / f"m.{kind}", dense(2), list(dense(2)), config, {**OPTIMIZER, "config": asks}, extras=len(extras)
    )
    model = linears([], 2)
    own = {name: value for name, value in given.items() if not (slots is None and name in given)}
    optimizer = AdadeltaKeras(model.parameters(), **({} if kind == "keras" else own))
    options: dict[str, Any] = {} if kind == "keras" else {"match": "order"}
    load_keras(file.path, optimizer, model, weights=True, drop=drop, **options)
    file.assert_moved(of_linears(model), optimizer)
    for name, param in of_linears(model).items():
        state = {slot: (10 + 10 * n) for n, slot in enumerate(extras) if slot}
        assert optimizer.state[param].keys() == {"square_avg", "acc_delta", *state}
        for slot, factor in state.items():
            assert (optimizer.state[param][slot] == factor * float(file.values[name].flat[0])).all()


def test_state_that_the_configuration_promises_and_the_file_lacks(tmp_path: Path) -> None:
    config = chain(("a", True), ("b", True))
    asks = {**OPTIMIZER["config"], "use_ema": True, "gradient_accumulation_steps": 2}
    for extras, drop in ((0, {"ema", "gradient_accumulation"}), (1, {"ema"}), (1, {"gradient_accumulation"})):
        file = File(
            tmp_path / "m.keras", dense(2), list(dense(2)), config, {**OPTIMIZER, "config": asks}, extras=extras
        )
        model = linears([], 2)
        optimizer = AdadeltaKeras(model.parameters(), gradient_accumulation_steps=7)
        message = r"no order of them fits, with moving averages.* and gradient accumulation \(drop={'ema', 'gradient_ac"
        with pytest.raises(KerasFileError, match=message):
            load_keras(file.path, optimizer, model, weights=True)
        load_keras(file.path, optimizer, model, weights=True, drop=drop)
        file.assert_moved(of_linears(model), optimizer)
        slots = {"average", "gradient_accumulator"} & optimizer.state[model[0].weight].keys()
        assert len(slots) == extras
        assert ("average" in slots) == (extras == 1 and "ema" not in drop)


def test_other_variables_beside_the_state(tmp_path: Path) -> None:
    """Averages and accumulated gradients are named only where nothing denies them, and left out only if there are some."""
    config = chain(("a", True), ("b", True))
    both = {"ema", "gradient_accumulation"}
    for extras, drop in ((1, {"ema"}), (1, {"gradient_accumulation"}), (1, both), (2, both)):
        file = File(tmp_path / "m.weights.h5", dense(2), list(dense(2)), extras=extras)
        model = linears([], 2)
        optimizer = AdadeltaKeras(model.parameters())
        for options in ({}, {"config": config}):
            for too_few in ((), *([{"ema"}, {"gradient_accumulation"}] if extras == 2 else [])):
                message = "Give it the option as Keras had it" if extras == 2 else "the file does not say which"
                with pytest.raises(KerasFileError, match=message):
                    load_keras(file.path, optimizer, model, weights=True, match="order", drop=too_few, **options)
            load_keras(file.path, optimizer, model, weights=True, match="order", drop=drop, **options)
            file.assert_moved(of_linears(model), optimizer)
    # The configuration says that there are none.
    file = File(tmp_path / "m.keras", dense(2), list(dense(2)), config, OPTIMIZER, extras=1)
    with pytest.raises(KerasFileError, match="no order of them fits") as caught:
        load_keras(file.path, optimizer, model, weights=True, drop={"ema"})
    assert "average" not in str(caught.value)
    # Two of four are frozen, and nothing says whether there is state for all or averages: three pairs, or two.
    config = chain(("a", False), ("b", True), ("c", True), use_bias=False)
    groups: Groups = {name: [(3, 3)] for name in dense(3)}
    file = File(tmp_path / "m.weights.h5", groups, list(groups))
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(3)])
    model[0].requires_grad_(False)
    optimizer = AdadeltaKeras(model.parameters())
    with pytest.raises(KerasFileError, match=r"moving averages or accumulated gradients, or else.*Pass state_order=\["):
        load_keras(file.path, optimizer, model, weights=True, config=config, drop={"ema"})
    order = ["a/kernel", "b/kernel", "c/kernel"]
    load_keras(file.path, optimizer, model, weights=True, config=config, state_order=order)
    file.assert_moved({f"{name}/0": m.weight for name, m in zip(groups, model, strict=True)}, optimizer)


# ---- Custom layers --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(3, width), nn.Linear(width, 3), nn.Linear(3, 1)

    def named(self) -> dict[str, torch.Tensor]:
        places = {"up": "layers/block/up", "down": "layers/block/down", "head": "layers/dense"}
        return {f"{g}/{n}": p for a, g in places.items() for n, p in enumerate(getattr(self, a).parameters())}

    def mapping(self) -> dict[str, Any]:
        return {
            key: value
            for name in ("up", "down")
            for key, value in ((f"blk/{name}/0", (f"{name}.weight", (1, 0))), (f"blk/{name}/1", f"{name}.bias"))
        }


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("first", ["up", "down"])
def test_layers_in_a_custom_layer_come_in_the_order_of_their_creation(first: str, width: int, tmp_path: Path) -> None:
    entries = [("Block", "blk"), ("Dense", "dense")]
    layers = [{"class_name": cls, "config": {"name": name}} for cls, name in entries]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    groups: Groups = {
        "layers/block/down": [(width, 3), (3,)],
        "layers/block/up": [(3, width), (width,)],
        "layers/dense": [(3, 1), (1,)],
    }
    second = "down" if first == "up" else "up"
    order = [f"layers/block/{first}", f"layers/block/{second}", "layers/dense"]
    file = File(tmp_path / "m.keras", groups, order, config, OPTIMIZER)
    model = Block(width)
    optimizer = AdadeltaKeras(model.parameters())
    options: dict[str, Any] = {"weights": True, "mapping": model.mapping()}
    if width == 5:  # only one order fits
        load_keras(file.path, optimizer, model, **options)
        file.assert_moved(model.named(), optimizer)
        return
    with pytest.raises(KerasFileError) as caught:
        load_keras(file.path, optimizer, model, **options)
    assert str(caught.value).replace(str(tmp_path), "TMP") == (
        """\
TMP/m.keras: the state of its optimizer has no names, and which weight each belongs to cannot be told from the configuration, the counts and the shapes: several orders of them fit. Pass state_order=[names of the weights in the optimizer's order], from those below
weights:
  blk/down/0 (3, 3)
  blk/down/1 (3,)
  blk/up/0 (3, 3)
  blk/up/1 (3,)
  dense/kernel (3, 1)
  dense/bias (1,)
shapes of the variables of the optimizer:
  (), (), (3, 3), (3, 3), (3,), (3,), (3, 3), (3, 3), (3,), (3,), (3, 1), (3, 1), (1,), (1,)"""
    )
    names = [f"blk/{name}/{number}" for name in (first, second) for number in (0, 1)]
    names += ["dense/kernel", "dense/bias"]
    load_keras(file.path, optimizer, model, state_order=names, **options)
    file.assert_moved(model.named(), optimizer)
    save_keras(tmp_path / "back.keras", optimizer, model, file.path, mapping=model.mapping(), state_order=names)
    before, after = datasets(file.path), datasets(tmp_path / "back.keras")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    for wrong, error, message in (
        (names[:-1], KerasFileError, "state_order has 5 weights, which do not fit the 14 variables"),
        ([*names[:-1], "dense/0"], ValueError, "state_order has 'dense/0', which is no weight; there are blk/down/0"),
        ([*names[:-1], names[0]], ValueError, f"state_order has '{names[0]}' twice"),
        ("dense/kernel", ValueError, "must be a list of names"),
        (names[::-1], KerasFileError, "do not fit"),
    ):
        with pytest.raises(error, match=message):
            load_keras(file.path, optimizer, model, state_order=wrong, **options)
    out = tmp_path / "out.pt"
    assert main(["convert", str(file.path), str(out)]) == 1
    assert main(["convert", str(file.path), str(out), "--state-order", *names]) == 0
    assert torch.equal(torch.load(out)["square_avg.dense.weight"], optimizer.state[model.head.weight]["square_avg"])


def test_weights_of_a_custom_layer_that_it_does_not_train_come_last(tmp_path: Path) -> None:
    layers = [
        {"class_name": "Scale", "config": {"name": "scale"}},
        {"class_name": "Dense", "config": {"name": "dense"}},
    ]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    groups: Groups = {"layers/scale": [(3,), (3,)], "layers/dense": [(3, 1), (1,)]}
    file = File(tmp_path / "m.keras", groups, ["layers/scale/0", "layers/dense"], config, OPTIMIZER)
    model = nn.Module()
    model.scale, model.seen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)
    model.dense = nn.Linear(3, 1)
    optimizer = AdadeltaKeras(model.parameters())
    load_keras(file.path, optimizer, model, weights=True, mapping={"scale/0": "scale", "scale/1": "seen"})
    params = {"layers/scale/0": model.scale, "layers/scale/1": model.seen}
    params |= {f"layers/dense/{n}": p for n, p in enumerate(model.dense.parameters())}
    file.assert_moved(params, optimizer)


# ---- Attention ------------------------------------------------------------------------------------------------------

PARTS = ("query", "key", "value", "output")


@pytest.mark.parametrize("prefix", ["", "_"])  # Keras 3, tf_keras
@pytest.mark.parametrize("place", ["layers/multi_head_attention", "attend"])
def test_attention_without_a_configuration(place: str, prefix: str, tmp_path: Path) -> None:
    """By the alphabet, the key would come first."""
    shapes: dict[str, list[tuple[int, ...]]] = {part: [(4, 2, 2), (2, 2)] for part in PARTS[:3]}
    shapes["output"] = [(2, 2, 4), (4,)]
    groups = {f"{place}/{prefix}{part}_dense": shapes[part] for part in sorted(PARTS)}
    order = [f"{place}/{prefix}{part}_dense" for part in PARTS]
    file = File(tmp_path / "m.weights.h5", groups, order)
    model = nn.Sequential()
    model.add_module("attend", nn.MultiheadAttention(4, 2))
    optimizer = AdadeltaKeras(model.parameters())
    load_keras(file.path, optimizer, model, weights=True)
    assert optimizer.iterations == 7
    state = optimizer.state[model.attend.in_proj_weight]
    biases = optimizer.state[model.attend.in_proj_bias]
    for number, part in enumerate(PARTS[:3]):
        rows = slice(4 * number, 4 * number + 4)
        for key, factor in (("square_avg", 100), ("acc_delta", 1000)):
            value = file.values[f"{place}/{prefix}{part}_dense/0"].flat[0]
            assert (state[key][rows] == factor * value).all()
            assert (model.attend.in_proj_weight[rows] == value).all()
            assert (biases[key][rows] == factor * file.values[f"{place}/{prefix}{part}_dense/1"].flat[0]).all()


def test_attention_of_dense_layers_that_somebody_wrote(tmp_path: Path) -> None:
    """Its parts have the names of Keras' attention, and not its order."""
    groups: Groups = {f"attend/{part}_dense": [(4, 4), (4,)] for part in sorted(PARTS)}
    file = File(
        tmp_path / "m.weights.h5", groups, [f"attend/{part}_dense" for part in ("key", "query", "value", "output")]
    )
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in PARTS])
    with pytest.raises(KerasFileError, match="several orders of them fit"):
        load_keras(file.path, AdadeltaKeras(model.parameters()), model)


def test_many_layers_are_no_search(tmp_path: Path) -> None:
    """Every second one was frozen at first, and the first hundred later."""
    count = 600
    groups: Groups = {f"layers/dense{f'_{n}' if n else ''}": [(2, 3 if n % 2 else 2)] for n in range(count)}
    frozen = [n < 100 or n % 2 == 0 for n in range(count)]
    layers = [
        {"class_name": "Dense", "config": {"name": f"d{n}", "use_bias": False, "trainable": not frozen[n]}}
        for n in range(count)
    ]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    names = list(groups)
    order = [name for n, name in enumerate(names) if n < 100 or not frozen[n]]
    file = File(tmp_path / "m.keras", groups, order, config, OPTIMIZER)
    with opened(file.path) as checkpoint:
        for layer, own, is_frozen in zip(checkpoint.layers, names, frozen, strict=True):
            variable = layer.variables[0]
            if not is_frozen:
                assert variable.square_avg is not None
                assert (variable.square_avg.read() == 100 * file.values[f"{own}/0"]).all()


def test_what_cannot_be_the_state_of_an_adadelta(tmp_path: Path) -> None:
    def replaced(number: int, value: Any) -> Path:
        path = File(tmp_path / "m.weights.h5", dense(1), list(dense(1))).path
        with h5py.File(path, "r+") as file:
            del file[f"optimizer/vars/{number}"]
            file[f"optimizer/vars/{number}"] = value
        return path

    for number, value, message in (
        (0, np.float32(7), "the first variable of its optimizer is not the iterations"),
        (0, np.ones(1, "i8"), "the first variable of its optimizer is not the iterations"),
        (1, np.int64(1), "no order of them fits"),
        (3, np.ones((3, 2), "f4"), "no order of them fits"),  # acc_delta of another shape
        (5, np.ones((), "f4"), "no order of them fits"),
    ):
        with pytest.raises(KerasFileError, match=message), opened(replaced(number, value)):
            pass


def test_statistics_have_no_state(tmp_path: Path) -> None:
    group = "layers/batch_normalization"
    file = File(tmp_path / "m.weights.h5", {group: [(3,)] * 4}, [f"{group}/0", f"{group}/1"])
    with (
        pytest.raises(
            KerasFileError, match=r"is no weight; there are batch_normalization/gamma, batch_normalization/beta$"
        ),
        opened(file.path, state_order=["batch_normalization/moving_mean"]),
    ):
        pass
    with opened(file.path) as checkpoint:
        assert [variable.has_state for _, variable in checkpoint.variables()] == [True, True, False, False]


def test_what_a_normalization_counted_has_no_state(tmp_path: Path) -> None:
    """It has the shapes of a layer that is frozen by now, and is not trained."""
    layers = [("Normalization", "seen", {}), ("LayerNormalization", "norm", {"trainable": False}), ("Dense", "out", {})]
    config = {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": cls, "config": {"name": name, **own}} for cls, name, own in layers]},
    }
    groups: Groups = {f"layers/{name}": [(3,), (3,)] for name in ("normalization", "layer_normalization")}
    groups["layers/dense"] = [(3, 1), (1,)]
    file = File(tmp_path / "m.keras", groups, list(groups)[1:], config, OPTIMIZER)
    with opened(file.path) as checkpoint:
        assert {v.role: v.has_state for layer, v in checkpoint.variables() if layer.path == "seen"} == {
            "0": False,
            "1": False,
        }
        assert {v.role: v.has_state for layer, v in checkpoint.variables() if layer.path == "norm"} == {
            "gamma": True,
            "beta": True,
        }
    with (
        pytest.raises(KerasFileError, match="has 'seen/0', which is no weight"),
        opened(file.path, state_order=["seen/0"]),
    ):
        pass


def test_too_many_orders_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: Groups = {f"a{n}": [(2, 2)] for n in range(5)}
    file = File(tmp_path / "m.weights.h5", groups, list(groups))
    names = [f"{name}/0" for name in groups]
    for limit, value in (("_MAX_TRIES", 3), ("_MAX_FREE", 4), ("_MAX_FREE", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(state_orders, limit, value)
            message = "several orders of them fit" if value == 5 else "there are too many orders to try"
            with pytest.raises(KerasFileError, match=message), opened(file.path):
                pass
            with opened(file.path, state_order=names) as checkpoint:
                assert all(variable.has_state for _, variable in checkpoint.variables())
    with pytest.raises(KerasFileError, match="several orders of them fit"), opened(file.path):
        pass


# ---- Models that are subclasses -------------------------------------------------------------------------------------


def test_a_layer_that_two_others_use_does_not_keep_their_weights_together(tmp_path: Path) -> None:
    """The embedding comes first, then the encoder, then the rest of the decoder, where the file has the embedding."""
    groups: Groups = {"decoder/dense": [(3, 3)], "decoder/embed": [(5, 3)], "encoder/dense": [(3, 3)]}
    file = File(tmp_path / "m.weights.h5", groups, ["decoder/embed", "encoder/dense", "decoder/dense"])
    model = nn.ModuleDict(
        {
            "decoder": nn.ModuleDict({"dense": nn.Linear(3, 3, bias=False), "embed": nn.Embedding(5, 3)}),
            "encoder": nn.ModuleDict({"dense": nn.Linear(3, 3, bias=False)}),
        }
    )
    optimizer = AdadeltaKeras(model.parameters())
    with pytest.raises(KerasFileError, match="several orders of them fit"):
        load_keras(file.path, optimizer, model, weights=True)
    with pytest.warns(UserWarning, match="squares"):
        load_keras(
            file.path,
            optimizer,
            model,
            weights=True,
            state_order=["decoder/embed/0", "encoder/dense/0", "decoder/dense/0"],
        )
    params = {f"{name.rpartition('.')[0].replace('.', '/')}/0": param for name, param in model.named_parameters()}
    file.assert_moved(params, optimizer)


@pytest.mark.parametrize("is_known", [False, True])
def test_layers_that_lie_in_two_places(is_known: bool, tmp_path: Path) -> None:
    """Keras 3 walks through a model by the alphabet: "down" comes before "layers", which holds all others."""
    groups: Groups = {"down": [(3, 3) if is_known else (4, 4)], "layers/dense": [(4, 4)], "layers/dense_2": [(4, 1)]}
    order = ["layers/dense", "down", "layers/dense_2"]
    if is_known:
        groups["down"] = [(4, 3)]
        groups["layers/dense_2"] = [(3, 1)]
    file = File(tmp_path / "m.weights.h5", groups, order)
    widths = [shapes[0] for shapes in groups.values()]
    model = nn.ModuleDict(
        {n: nn.Linear(*w, bias=False) for n, w in zip(("down", "dense", "dense_2"), widths, strict=True)}
    )
    optimizer = AdadeltaKeras(model.parameters())
    if not is_known:
        with pytest.raises(KerasFileError, match="several orders of them fit"):
            load_keras(file.path, optimizer, model, weights=True)
    names = ["dense/kernel", "down/0", "dense_2/kernel"]
    load_keras(file.path, optimizer, model, weights=True, state_order=None if is_known else names)
    params = {f"{group}/0": model[group.rpartition("/")[2]].weight for group in groups}
    file.assert_moved(params, optimizer)


def test_layers_of_one_name_are_told_apart(tmp_path: Path) -> None:
    groups: Groups = {"layers/dense": [(3, 3)], "out": [(3, 3)]}
    file = File(tmp_path / "m.weights.h5", groups, ["out", "layers/dense"])
    with h5py.File(file.path, "r+") as opened_file:
        for group in groups:
            opened_file[f"{group}/vars"].attrs["name"] = "out"
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "out": nn.Linear(3, 3, bias=False)})
    optimizer = AdadeltaKeras(model.parameters())
    with pytest.raises(KerasFileError, match=r"layers/dense/kernel \(3, 3\)\n  out/0 \(3, 3\)"):
        load_keras(file.path, optimizer, model, weights=True)


def test_a_configuration_may_have_tuples(tmp_path: Path) -> None:
    """As Keras' get_config() has, before it is JSON."""
    entries = [
        ("InputLayer", {"batch_shape": (None, 7, 5, 3)}),
        ("Conv2D", {"name": "conv", "filters": 4, "kernel_size": (1, 1)}),
        ("Permute", {"dims": (3, 1, 2)}),
        ("Flatten", {}),
        ("Dense", {"name": "dense"}),
    ]
    layers = tuple({"class_name": name, "config": options} for name, options in entries)
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    groups: Groups = {"layers/conv2d": [(1, 1, 3, 4), (4,)], "layers/dense": [(140, 2), (2,)]}
    file = File(tmp_path / "m.weights.h5", groups, list(groups))
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "dense": nn.Linear(140, 2)})
    report = load_keras(file.path, AdadeltaKeras(model.parameters()), model, weights=True, config=config)
    assert (
        "dense/kernel",
        "dense.weight",
        "permute (1, 0)",
        True,
    ) in report.moves  # the Permute puts the channels first
