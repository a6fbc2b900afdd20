"""Weights and state that have names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import h5py
from keras_stored import (
    layers_of,
    renamed,
    sequential,
    with_state_names,
    write_h5,
    write_numbered,
)

from torch_adadelta.keras import KerasFileError, names
from torch_adadelta.keras.checkpoints import opened

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense/kernel/accum_grad", ("square_avg", "dense/kernel")),
        ("Adadelta/dense/kernel/accum_var", ("acc_delta", "Adadelta/dense/kernel")),
        ("Adadelta/accumulated_grad/dense/kernel", ("square_avg", "dense/kernel")),
        ("accumulated_delta_var/dense/kernel", ("acc_delta", "dense/kernel")),
        ("adadelta/dense_kernel_accumulated_grad", ("square_avg", "dense_kernel")),
        ("adadelta/dense_kernel_accumulated_delta_var", ("acc_delta", "dense_kernel")),
        ("Adadelta/average/dense/kernel", ("average", "dense/kernel")),
        ("adadelta/dense_kernel_average", ("average", "dense_kernel")),
        ("adadelta/dense_kernel_gradient_accumulator", ("gradient_accumulator", "dense_kernel")),
        ("training_3/Adadelta/dense/kernel/accum_grad", ("square_avg", "training_3/Adadelta/dense/kernel")),
        ("cond_1/Adadelta/accumulated_grad/dense/kernel", ("square_avg", "dense/kernel")),
        ("loss_scale_optimizer/adadelta/dense_kernel_accumulated_grad", ("square_avg", "dense_kernel")),
        ("a/b/cond/adadelta/dense_kernel_average", ("average", "dense_kernel")),
        ("dense/kernel/momentum", ("", "")),
        ("dense/kernel/accum_grad/norm", ("", "")),
        ("adadelta/dense_kernel_average_of_all", ("", "")),
    ],
)
def test_names_of_state(name: str, expected: tuple[str, str]) -> None:
    assert names.slot_of(name) == expected


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
    assert layers_of(path) == {"m/feed_forward_1 None": ["kernel"]}
    assert layers_of(named(tmp_path, None, query=["kernel"])) == {"query None": ["kernel"]}  # a layer of such a name
    numbered = write_numbered(tmp_path / "m.weights.h5", {"layers/query": [(2, 3)]})
    assert layers_of(numbered) == {"query None": ["0"]}
    numbered = write_numbered(tmp_path / "m.weights.h5", {"layers/block/up": [(2, 3)]})
    assert layers_of(numbered, config=sequential(("b", "Block", {}))) == {"b/up None": ["0"]}
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


@pytest.mark.parametrize("scope", ["training/Adadelta/", "training_3/Adadelta_1/", "cond_1/", "a/b/cond/", ""])
def test_scopes_before_the_optimizer(scope: str, tmp_path: Path) -> None:
    """Also where one weight ends with the name of another."""
    path = write_h5(tmp_path / "m.h5", {"a": {"kernel": np.full(2, 2.0)}, "b": {"a/kernel": np.full(2, 3.0)}})
    with h5py.File(path, "r+") as file:
        for weight in ("a/kernel", "b/a/kernel"):
            for slot in ("accum_grad", "accum_var"):
                renamed(f"Adadelta/{weight}/{slot}:0", f"{scope}{weight}/{slot}:0")(file)
        renamed("Adadelta/iter:0", f"{scope}iter_1:0")(file)
    with opened(path) as checkpoint:
        assert checkpoint.count() == 3
        states = [variable.square_avg for _, variable in checkpoint.variables()]
        assert [state and state.read()[0] for state in states] == [4.0, 9.0]


def test_a_scope_that_is_open_is_refused(tmp_path: Path) -> None:
    """The state is of a weight, or of another that ends so, in a scope of the name of its layer."""
    path = write_h5(tmp_path / "m.h5", {"a": {"kernel": np.full(2, 2.0)}, "b": {"a/kernel": np.full(2, 3.0)}})
    with h5py.File(path, "r+") as file:
        for slot in ("accum_grad", "accum_var"):
            renamed(f"Adadelta/b/a/kernel/{slot}:0", f"x/b/a/kernel/{slot}:0")(file)
        with_state_names("Adadelta/iter:0", *(f"x/b/a/kernel/{slot}:0" for slot in ("accum_grad", "accum_var")))(file)
    with pytest.raises(KerasFileError, match="may belong to b/a/kernel or a/kernel"), opened(path):
        pass


@pytest.mark.parametrize("is_frozen", [False, True])
def test_in_a_submodel_the_order_tells_where_names_do_not(is_frozen: bool, tmp_path: Path) -> None:
    """In TensorFlow 1 a weight of a layer conv may be called as its neighbour, conv_1. Frozen weights come last."""
    inner = sequential(("conv", "Dense", {"trainable": not is_frozen}), ("conv_1", "Dense", {}))
    model = {"class_name": "Sequential", "config": {"name": "m", "layers": [inner]}}
    weights = {f"{name}/kernel": np.full((2, 2), value) for name, value in (("conv_1", 1.0), ("conv_1_1", 2.0))}
    path = write_h5(tmp_path / "m.h5", {"sequential": weights}, model)
    with h5py.File(path, "r+") as file:
        group = file["model_weights/sequential"]
        for name in ("conv_1", "conv_1_1"):
            group[f"{name}/kernel:0"] = group[f"sequential/{name}/kernel:0"][()]
        in_order = [b"conv_1/kernel:0", b"conv_1_1/kernel:0"]
        group.attrs["weight_names"] = in_order[::-1] if is_frozen else in_order
        for name in ("conv_1", "conv_1_1"):
            for slot in ("accum_grad", "accum_var"):
                renamed(f"Adadelta/sequential/{name}/kernel/{slot}:0", f"training/Adadelta/{name}/kernel/{slot}:0")(
                    file
                )
    with opened(path) as checkpoint:
        found = {layer.path: variable.value.read()[0, 0] for layer, variable in checkpoint.variables()}
        assert found == {"sequential/conv": 1.0, "sequential/conv_1": 2.0}
        assert all(variable.has_state for _, variable in checkpoint.variables())
    inner["config"]["layers"][1]["class_name"] = "Embedding"
    with (
        pytest.raises(KerasFileError, match="the weights kernel of conv_1_1 are not those of sequential/conv_1"),
        opened(path, model),
    ):
        pass


def test_a_wrapped_layer_leaves_its_own_name_out(tmp_path: Path) -> None:
    """As in .h5 files of Keras 3."""
    inner = {"layer": {"class_name": "LSTM", "config": {"name": "inner"}}}
    path = named(tmp_path, sequential(("t", "TimeDistributed", inner)), t=["inner/lstm_cell/kernel"])
    assert layers_of(path) == {"t LSTM": ["kernel"]}
