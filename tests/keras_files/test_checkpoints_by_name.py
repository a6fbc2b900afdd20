"""Layers and weights by their names, or by their numbers where they have none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_stored import (
    DATA,
    assert_refused,
    edited,
    layers_of,
    renamed,
    replaced,
    sequential,
    with_state_names,
    write_h5,
)

from torch_adadelta.keras import KerasFileError, checkpoints
from torch_adadelta.keras.checkpoints import opened

# ---- Names of weights -----------------------------------------------------------------------------------------------


def named(tmp_path: Path, config: Any, **layers: list[str]) -> Path:
    return write_h5(
        tmp_path / "m.h5", {top: {name: np.ones((2, 2)) for name in names} for top, names in layers.items()}, config
    )


def test_parts_of_a_layer_have_one_vocabulary(tmp_path: Path) -> None:
    rnn = ["kernel", "recurrent_kernel"]
    both = [f"{way}_lstm/lstm_cell_{n}/{role}" for n, way in enumerate(("forward", "backward")) for role in rnn]
    attention = [f"{part}/kernel" for part in ("query", "key", "value", "attention_output")]
    expected = {
        "a": [f"{way}/{role}" for way in ("forward", "backward") for role in rnn],
        "b": ["query/kernel", "key/kernel", "value/kernel", "output/kernel"],
        "c": rnn,
    }
    path = named(tmp_path, None, a=both, b=attention, c=[f"gru_cell/{role}" for role in rnn])
    assert layers_of(path) == {f"{name} None": roles for name, roles in expected.items()}
    config = sequential(
        ("a", "Bidirectional", {"layer": {"class_name": "LSTM", "config": {}}}),
        ("b", "MultiHeadAttention", {}),
        ("c", "GRU", {}),
    )
    path = named(tmp_path, config, a=both, b=attention, c=[f"gru_cell/{role}" for role in rnn])
    assert layers_of(path) == {
        f"{name} {cls}": expected[name]
        for name, cls in (("a", "Bidirectional"), ("b", "MultiHeadAttention"), ("c", "GRU"))
    }
    path = named(tmp_path, sequential(("m", "Mine", {})), m=["feed_forward_1/kernel"])
    assert layers_of(path) == {"m Mine": ["feed_forward_1/kernel"]}
    assert layers_of(named(tmp_path, None, query=["kernel"])) == {"query None": ["kernel"]}  # a layer of such a name
    numbered = write_numbered(tmp_path / "m.weights.h5", {"layers/query": [(2, 3)]})
    assert layers_of(numbered) == {"query None": ["0"]}
    numbered = write_numbered(tmp_path / "m.weights.h5", {"layers/block/up": [(2, 3)]})
    assert layers_of(numbered, config=sequential(("b", "Block", {}))) == {"b Block": ["up/0"]}
    path = named(tmp_path, None, net=["x/kernel", "y/kernel"])
    assert layers_of(path) == {"net/x None": ["kernel"], "net/y None": ["kernel"]}
    # A layer with some parts of an attention, and not all, is none.
    path = named(tmp_path, None, b=["query/kernel", "key/kernel", "scale"])
    assert layers_of(path) == {"b/query None": ["kernel"], "b/key None": ["kernel"], "b None": ["scale"]}


def test_a_separable_convolution_is_two_layers(tmp_path: Path) -> None:
    weights = {"depthwise_kernel": np.ones((3, 2, 2, 1)), "pointwise_kernel": np.ones((1, 1, 2, 5)), "bias": np.ones(5)}
    path = write_h5(tmp_path / "m.h5", {"s": weights}, sequential(("s", "SeparableConv2D", {})))
    assert layers_of(path) == {"s/depthwise DepthwiseConv2D": ["kernel"], "s/pointwise Conv2D": ["kernel", "bias"]}


def test_a_time_distributed_layer_is_what_it_applies(tmp_path: Path) -> None:
    inner = {"layer": {"class_name": "Dense", "config": {"name": "inner", "units": 7}}}
    path = named(tmp_path, sequential(("t", "TimeDistributed", inner)), t=["kernel"])
    assert layers_of(path) == {"t Dense": ["kernel"]}
    with opened(path) as checkpoint:
        assert checkpoint.layers[0].config["units"] == 7
    for config in ({}, {"layer": 3}, {"layer": {"class_name": "Dense"}}):  # of which nobody knows
        path = named(tmp_path, sequential(("t", "TimeDistributed", config)), t=["kernel"])
        assert layers_of(path) == {"t TimeDistributed": ["kernel"]}


def test_a_layer_that_was_renamed_has_weights_of_its_old_name(tmp_path: Path) -> None:
    layers = {"new": {"kernel": np.ones((2, 2))}, "rnn": {"gru_cell/kernel": np.ones((2, 2))}}
    path = write_h5(tmp_path / "m.h5", layers, sequential(("new", "Dense", {}), ("rnn", "GRU", {})))
    with h5py.File(path, "r+") as file:
        for top, old in (("new", "old/kernel:0"), ("rnn", "old_rnn/gru_cell/kernel:0")):
            group = file[f"model_weights/{top}"]
            group[old] = np.ones((2, 2))
            group.attrs["weight_names"] = [old.encode()]
        with_state_names("Adadelta/iter:0", "old/kernel/accum_grad:0", "old/kernel/accum_var:0")(file)
        for slot in ("grad", "var"):
            file[f"optimizer_weights/old/kernel/accum_{slot}:0"] = np.ones((2, 2))
    assert layers_of(path) == {"new Dense": ["kernel"], "rnn GRU": ["kernel"]}


def write_numbered(path: Path, groups: dict[str, list[tuple[int, ...]]], names: dict[str, str] | None = None) -> Path:
    """A .weights.h5 file of these shapes by group, whose optimizer has them in this order."""
    with h5py.File(path, "w") as file:
        arrays = [np.full(shape, 1, "f4") for shapes in groups.values() for shape in shapes]
        for number, array in enumerate([np.int64(3), np.float32(0.5), *(a for own in arrays for a in (own, own))]):
            file[f"optimizer/vars/{number}"] = array
        for group, shapes in groups.items():
            for number, shape in enumerate(shapes):
                file[f"{group}/vars/{number}"] = np.ones(shape, "f4")
            file[f"{group}/vars"].attrs["name"] = (names or {}).get(group, "")
    return path


def test_parts_of_numbered_layers(tmp_path: Path) -> None:
    """Of a class that the group tells, or of none."""
    rnn = [(2, 12), (3, 12), (12,)]
    parts = ("query", "key", "value", "output")
    groups = {
        **{f"layers/bidirectional/{way}_layer/cell": rnn for way in ("forward", "backward")},
        **{f"attend/{part}_dense": [(2, 2, 4) if part == "output" else (4, 2, 2)] for part in parts},
        **{f"mine/{part}_dense": [(4, 4)] for part in parts},
    }
    for names in ({}, {"attend/query_dense": "q"}):
        with pytest.raises(
            KerasFileError, match="several orders of them fit"
        ):  # of those of mine, which are Dense layers
            layers_of(write_numbered(tmp_path / "m.weights.h5", groups, names))
    known = {group: shapes for group, shapes in groups.items() if "mine" not in group}
    more = {
        "alpha": [(5, 5)],
        "beta/forward": [(6, 6)],
        "one/forward_layer": [(7, 7)],
        "one/backward_layer": [(8, 8)],
        **{f"two/{way}_layer/cell": [(2, 16), (4, 16), (16,)] for way in ("forward", "backward")},
    }
    path = write_numbered(tmp_path / "m.weights.h5", {**known, **more})
    with opened(path) as checkpoint:
        assert {layer.path: layer.is_known for layer in checkpoint.layers} == {
            "alpha": False, "attend": True, "beta/forward": False, "bidirectional": True, "one": False, "two": True
        }  # fmt: skip
    roles = ["kernel", "recurrent_kernel", "bias"]
    assert layers_of(write_numbered(tmp_path / "m.weights.h5", known)) == {
        "attend None": [f"{part}/0" for part in parts],
        "bidirectional Bidirectional": [f"{way}/{role}" for way in ("forward", "backward") for role in roles],
    }
    private = {f"attend/_{part}_dense": groups[f"attend/{part}_dense"] for part in parts}  # as tf_keras names them
    assert layers_of(write_numbered(tmp_path / "m.weights.h5", private)) == {"attend None": [f"{p}/0" for p in parts]}
    wrapped = write_numbered(tmp_path / "m.weights.h5", {"layers/time_distributed/layer": [(2, 3), (3,)]})
    assert layers_of(wrapped) == {"time_distributed TimeDistributed": ["0", "1"]}


def test_layers_of_one_name_have_that_of_their_group(tmp_path: Path) -> None:
    groups = {"layers/dense": [(2, 3), (3,)], "net/dense": [(5, 5)], "out": [(4, 4)]}
    path = write_numbered(tmp_path / "m.weights.h5", groups, dict.fromkeys(groups, "same"))
    assert layers_of(path) == {"layers/dense Dense": ["kernel", "bias"], "net/same None": ["0"], "out None": ["0"]}
    path = write_numbered(tmp_path / "m.weights.h5", groups, {"layers/dense": "one", "out": "a/b"})
    assert layers_of(path) == {"one Dense": ["kernel", "bias"], "net/dense None": ["0"], "out None": ["0"]}


def test_layers_come_in_the_order_of_their_state(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "m.weights.h5", {"b": [(2, 3)], "a": [(4, 4)]})
    with opened(path) as checkpoint:
        assert ([layer.path for layer in checkpoint.layers], checkpoint.is_ordered) == (["b", "a"], True)
    with h5py.File(path, "r+") as file:
        file["aa/vars/0"] = np.ones((5, 5), "f4")
    with opened(path) as checkpoint:
        assert ([layer.path for layer in checkpoint.layers], checkpoint.is_ordered) == (["b", "a", "aa"], False)


def test_names_that_two_layers_have(tmp_path: Path) -> None:
    """In a nested model, the name of the model around it tells which; else the file is refused."""

    def nested(*names: str) -> dict[str, Any]:
        inner = [{**sequential(("dense", "Dense", {}))} for _ in names]
        for name, model in zip(names, inner, strict=True):
            model["config"] = {**model["config"], "name": name}
        return {"class_name": "Sequential", "config": {"name": "model", "layers": inner}}

    layers = {name: {"dense/kernel": np.ones((2, 2))} for name in ("one", "two")}
    assert layers_of(write_h5(tmp_path / "m.h5", layers, nested("one", "two"))) == {
        "one/dense Dense": ["kernel"], "two/dense Dense": ["kernel"]
    }  # fmt: skip
    outer = {"class_name": "Sequential", "config": {"name": "outer", "layers": [nested("one", "two")]}}
    layers = {"model": {f"{name}/dense/kernel": np.ones((2, 2)) for name in ("one", "two")}}
    assert layers_of(write_h5(tmp_path / "m.h5", layers, outer)) == {
        "model/one/dense Dense": ["kernel"], "model/two/dense Dense": ["kernel"]
    }  # fmt: skip
    layers = {"model": {"dense/kernel": np.ones((2, 2))}}
    with pytest.raises(KerasFileError, match="two layers of its model are named dense, and which one model/dense"):
        layers_of(write_h5(tmp_path / "m.h5", layers, outer))


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    path = named(tmp_path, None, a=["kernel", "gru_cell/kernel"])  # of one part of a layer
    with pytest.raises(KerasFileError, match="it holds two weights named a/gru_cell/kernel"):
        layers_of(path)
    for config in (None, sequential(("a", "Dense", {}), ("b", "Dense", {}))):
        path = named(tmp_path, config, a=["kernel"], b=["kernel"])
        with h5py.File(path, "r+") as file:
            file["model_weights/b"].attrs["weight_names"] = [b"a/kernel:0"]
            file["model_weights/b/a/kernel:0"] = np.ones((2, 2))
        with pytest.raises(KerasFileError, match="it holds two weights named a/kernel; name the layers"):
            layers_of(path)


def test_a_name_that_may_mean_two_weights_is_refused(tmp_path: Path) -> None:
    """Newer classes write "_" for "/"."""
    path = write_h5(tmp_path / "m.h5", {"a": {"b_c": np.ones(2), "b/c": np.ones(2)}})
    with h5py.File(path, "r+") as file:
        renamed("Adadelta/a/b_c/accum_grad:0", "Adadelta/a_b_c_accumulated_grad:0")(file)
    with pytest.raises(KerasFileError, match="which may belong to a/b_c or a/b/c"):
        layers_of(path)


def test_frozen_layers_are_marked(tmp_path: Path) -> None:
    config = sequential(("a", "Dense", {"trainable": False}), ("b", "Dense", {}))
    with opened(named(tmp_path, config, a=["kernel"], b=["kernel"])) as checkpoint:
        assert [layer.is_frozen for layer in checkpoint.layers] == [True, False]


def test_weights_that_are_one_number_have_state(tmp_path: Path) -> None:
    """They are no learning rate, whatever their names are, and neither is one that is called so."""
    path = write_h5(tmp_path / "m.h5", {"a": {"gain": np.array(2.0), "learning_rate": np.full(2, 3.0)}})
    with h5py.File(path, "r+") as file:
        for old, new in (("grad", "grad"), ("var", "delta_var")):
            own = f"Adadelta/accumulated_{new}/a/learning_rate:0"
            renamed(f"Adadelta/a/learning_rate/accum_{old}:0", own)(file)
    numbered = write_numbered(tmp_path / "m.weights.h5", {"layers/dense": [()]})
    with h5py.File(numbered, "r+") as file:  # as tf_keras writes it, which has no learning rate there
        del file["optimizer/vars/1"]
        for number in (2, 3):
            file.move(f"optimizer/vars/{number}", f"optimizer/vars/{number - 1}")
    for own_path, expected in ((path, [4.0, 9.0]), (numbered, [1.0])):
        with opened(own_path) as checkpoint:
            states = [variable.square_avg for _, variable in checkpoint.variables()]
            assert [state and float(state.read().flat[0]) for state in states] == expected


# ---- Files of numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "config", "count", "roles"),
    [
        ("Dense", {}, 2, ["kernel", "bias"]),
        ("Dense", {}, 1, ["kernel"]),
        ("Dense", {"use_bias": False}, 1, ["kernel"]),
        ("Dense", {"use_bias": True}, 1, None),
        ("Dense", {}, 3, None),
        ("Embedding", {}, 1, ["embeddings"]),
        ("BatchNormalization", {"scale": False}, 3, ["beta", "moving_mean", "moving_variance"]),
        ("BatchNormalization", {}, 4, ["gamma", "beta", "moving_mean", "moving_variance"]),
        ("BatchNormalization", {}, 3, None),  # gamma or beta
        ("LayerNormalization", {"center": False}, 1, ["gamma"]),
        ("GRU", {"use_bias": True}, 3, ["kernel", "recurrent_kernel", "bias"]),
        *((f"SeparableConv{n}D", {}, 3, ["depthwise_kernel", "pointwise_kernel", "bias"]) for n in (1, 2)),
        *((f"{kind}Conv{n}D", {}, 2, ["kernel", "bias"]) for kind in ("", "Depthwise") for n in (1, 2, 3)),
        *((f"Conv{n}DTranspose", {}, 2, ["kernel", "bias"]) for n in (1, 2, 3)),
        *((name, {"center": True}, 2, ["gamma", "beta"]) for name in ("LayerNormalization", "GroupNormalization")),
        *((name, {}, 3, ["kernel", "recurrent_kernel", "bias"]) for name in ("LSTM", "GRU", "SimpleRNN")),
        ("RMSNormalization", {}, 1, ["scale"]),
        ("MultiHeadAttention", {}, 2, ["kernel", "bias"]),
        ("SyncBatchNormalization", {"center": False}, 3, ["gamma", "moving_mean", "moving_variance"]),
        ("Bidirectional", {"layer": {"class_name": "GRU", "config": {"use_bias": False}}}, 2, ["kernel", "recurrent_kernel"]),
        ("Bidirectional", {}, 3, ["kernel", "recurrent_kernel", "bias"]),
        ("Mine", {}, 1, None),
        (None, {}, 2, None),
    ],
)  # fmt: skip
def test_names_of_numbered_weights(class_name: str | None, config: Any, count: int, roles: list[str] | None) -> None:
    assert checkpoints._numbered_roles(class_name, config, count) == roles


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda f: f.move("layers/dense/vars/1", "layers/dense/vars/2"),
            r"layers/dense has the weights \[0, 2\]; some are",
        ),
        (
            lambda f: f.move("layers/dense/vars/1", "layers/dense/vars/bias"),
            "it holds layers/dense/vars/bias, which is no",
        ),
        (lambda f: f.move("optimizer/vars/3", "optimizer/vars/99"), "some variables of its optimizer are missing"),
        (lambda f: f.move("optimizer/vars/3", "optimizer/vars/x"), "its optimizer holds x, which is no number"),
        (lambda f: f.move("optimizer", "optimizer/inner_optimizer"), "LossScaleOptimizer|it has no group optimizer"),
        (lambda f: f.create_group("optimizer/inner_optimizer"), "its optimizer is a LossScaleOptimizer"),
        *(
            (
                lambda f, name=name: f["optimizer/vars"].attrs.update(name=name),
                f"its optimizer is {name.partition('_1')[0]}, not",
            )
            for name in (
                *(
                    "adam",
                    "adamw_1",
                    "adamax",
                    "nadam",
                    "rms_prop",
                    "rmsprop",
                    "adagrad",
                    "sgd_12",
                    "ftrl",
                    "lion",
                    "lamb",
                ),
                *("adafactor", "muon"),
            )
        ),
        (lambda f: [f.pop(f"optimizer/vars/{n}") for n in range(2, 10)], "no step was taken"),
        (lambda f: f.pop("optimizer"), "it has no group optimizer"),
        (lambda f: f.pop("layers"), "it holds no weights"),
        (lambda f: f.__setitem__("layers/loop", f["layers"]), "nested"),
        (replaced("optimizer/vars/0", np.float32(4)), "the first variable of its optimizer is not the iterations"),
    ],
    ids=range(24),
)
def test_a_file_of_numbers_that_is_not_whole_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    assert_refused(edited(tmp_path, edit, "k3.weights.h5"), message)


def test_other_groups_hold_no_weights(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        for group in (
            "metrics/mean/vars/0",
            *(
                f"{name}/vars/0"
                for name in ("compile_metrics", "_compile_metrics", "_metrics", "loss", "_loss_tracker")
            ),
            "layers/drop/seed_generator/vars/0",
        ):
            file[group] = np.ones(3, "f4")

    assert list(layers_of(edited(tmp_path, fill, "k3.weights.h5"))) == ["d1 Dense", "d2 Dense"]


def test_a_configuration_is_that_of_the_file(tmp_path: Path) -> None:
    config = sequential(("d1", "Dense", {}), ("d2", "Dense", {}))
    text = json.dumps(config)
    (tmp_path / "model.json").write_text(text)
    path = DATA / "k3.weights.h5"
    for given_config in (config, text, tmp_path / "model.json", str(tmp_path / "model.json")):
        with opened(path, given_config) as checkpoint:
            assert checkpoint.model is not None
            assert checkpoint.layers[0].class_name == "Dense"
    with pytest.raises(
        KerasFileError, match=r"it holds layers/dense_1, which is no layer of the model in its configura"
    ):
        layers_of(path, config=sequential(("d1", "Dense", {})))
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(KerasFileError, match=r"model\.json: config is no JSON"):
        layers_of(path, config=tmp_path / "model.json")
    with pytest.raises(KerasFileError, match="config has a lambda"):
        layers_of(path, config=sequential(("d1", "Lambda", {}), ("d2", "Dense", {})))
