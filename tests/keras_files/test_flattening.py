"""What the file, the user and the modules say of flattened maps, and what follows for the weights behind them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from keras_memory import checkpoint_of, layer_of, moved
from keras_stored import Net, Weights, assert_is, assert_same_datasets, dense, load, recurrent, sequential, write_h5

from torch_adadelta.keras import KerasFileError, Layout, freeze_second_biases, save_keras
from torch_adadelta.keras.layouts import LayoutMismatch
from torch_adadelta.keras.matching import Flattening, canonical

CHANNELS_FIRST = "channels_first"


def maps_and(kernel: np.ndarray) -> dict[str, Weights]:
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": rng.standard_normal((3, 3, 1, 4)), "bias": np.ones(4)},
        "dense": {"kernel": kernel, "bias": np.ones(5)},
    }


@pytest.mark.parametrize(
    ("between", "is_flat"),
    [
        ([("flatten", "Flatten", {})], True),
        ([("pool", "MaxPooling2D", {}), ("flatten", "Flatten", {}), ("drop", "Dropout", {})], True),
        ([("custom", "Whatever", {})], None),
        ([("reshape", "Reshape", {"target_shape": [24]})], None),
        ([("pool", "GlobalAveragePooling2D", {}), ("flatten", "Flatten", {})], False),
        ([("flatten", "Flatten", {}), ("norm", "Concatenate", {})], None),
    ],
)
def test_flattened_maps_need_a_word(between: list[Any], is_flat: bool | None, tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).standard_normal((2 * 3 * 4, 5))
    config = sequential(("conv", "Conv2D", {"filters": 4}), *between, ("dense", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", maps_and(kernel), config)
    model = Net(conv=nn.Conv2d(1, 4, 3), dense=nn.Linear(24, 5))
    if is_flat is not False:
        with pytest.raises(KerasFileError, match=r"flatten='channels_(first|last)'"):
            load(path, model)
    if is_flat:
        load(path, model, flatten=CHANNELS_FIRST)
        assert_is(model.dense.weight, kernel.reshape(6, 4, 5).transpose(2, 1, 0).reshape(5, 24))
        shown = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()
        load(path, shown)
        assert_is(shown[3].weight, model.dense.weight.detach().numpy())
    load(path, model, flatten="channels_last")
    assert_is(model.dense.weight, kernel.T)


def test_without_a_configuration_nothing_says_whether_there_is_a_flatten(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).standard_normal((2 * 3 * 4, 5))
    model = Net(conv=nn.Conv2d(1, 4, 3), dense=nn.Linear(24, 5))
    for config in ({"class_name": "Mine", "config": {}}, None):  # a subclass, whose configuration says nothing
        path = write_h5(tmp_path / "m.h5", maps_and(kernel), config)
        with pytest.raises(KerasFileError, match="the file does not say whether flattened feature maps come in here"):
            load(path, model)
    load(path, model, flatten={"dense": 4})
    assert_is(model.dense.weight, kernel.reshape(6, 4, 5).transpose(2, 1, 0).reshape(5, 24))
    load(path, model, flatten={"dense": "channels_last"})
    assert_is(model.dense.weight, kernel.T)
    load(path, model, flatten={"conv": "channels_last"})  # of which the others are not
    assert_is(model.dense.weight, kernel.T)
    for flatten, message in (
        ({"dense": 7}, "24 features are no maps of 7 channels: the convolutions in the file have 1 or 4"),
        (
            {"dense": CHANNELS_FIRST},
            "the file does not say how many channels flattened maps have here; give their number",
        ),
        (CHANNELS_FIRST, "the file does not say whether"),
    ):
        with pytest.raises(KerasFileError, match=message):
            load(path, model, flatten=flatten)
    # A model without maps has nothing to flatten.
    one = write_h5(tmp_path / "d.h5", {"dense": {"kernel": kernel, "bias": np.ones(5)}})
    load(one, Net(dense=nn.Linear(24, 5)))
    with pytest.raises(KerasFileError, match="does not say whether"):
        load(one, Net(dense=nn.Linear(24, 5), pool=nn.MaxPool2d(2)))


def test_words_that_say_nothing(tmp_path: Path) -> None:
    config = sequential(("conv", "Conv2D", {"filters": 4}), ("flatten", "Flatten", {}), ("dense", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", maps_and(np.ones((24, 5))), config)
    model = Net(conv=nn.Conv2d(1, 4, 3), dense=nn.Linear(24, 5))
    for word in (0, -4, True, "first", (4, None, None), (None, True), 4.0):
        with pytest.raises(
            ValueError, match=r"flatten\['dense'\] must be 'channels_first' or 'channels_last', a number of"
        ):
            load(path, model, flatten={"dense": word})
    with pytest.raises(ValueError, match="flatten has 'other', which is no layer with weights; there are conv, dense"):
        load(path, model, flatten={"other": 4})
    for flatten, message in (
        ({"conv": 1}, "flatten has 'conv', and by the configuration it takes no features that are maps in one row"),
        ({"dense": (4, 5)}, "flatten has 'dense', and by the configuration it gives no features"),
        ({"dense": 3}, "24 features are no maps of 3 channels: a Flatten of the maps of conv has 4"),
    ):
        with pytest.raises(KerasFileError, match=message):
            load(path, model, flatten=flatten)
    for flatten in ({"dense": 4}, {"dense": [4, None]}, {"dense": CHANNELS_FIRST}):
        load(path, model, flatten=flatten)


def test_the_order_of_keras_need_not_have_the_channels_last() -> None:
    """A Reshape of maps with the channels first; the model of PyTorch permutes them to the end."""
    options = {"filters": 4, "kernel_size": 3, "data_format": CHANNELS_FIRST, "batch_shape": [None, 1, 4, 5]}
    config = sequential(
        ("conv", "Conv2D", options), ("flat", "Reshape", {"target_shape": [24]}), ("dense", "Dense", {})
    )
    kernel = np.arange(24.0 * 5).reshape(24, 5)
    layers = [layer_of("conv", "Conv2D", {}, {"kernel": np.ones((3, 3, 1, 4))})]
    layers.append(layer_of("dense", "Dense", {}, {"kernel": kernel}))
    model = Net(conv=nn.Conv2d(1, 4, 3, bias=False), dense=nn.Linear(24, 5, bias=False))
    for flatten, expected in (
        ("channels_last", kernel.reshape(4, 6, 5).transpose(2, 1, 0)),
        (CHANNELS_FIRST, kernel.T),
        (None, kernel.T),
    ):
        moved(checkpoint_of(config, layers), model, flatten=flatten)
        assert_is(model.dense.weight, expected.reshape(5, 24))


def test_an_input_whose_format_nobody_says() -> None:
    config = sequential(
        ("flat", "Reshape", {"target_shape": [60], "batch_shape": [None, 3, 4, 5]}), ("dense", "Dense", {})
    )
    kernel = np.arange(60.0 * 2).reshape(60, 2)
    layers = [layer_of("dense", "Dense", {}, {"kernel": kernel})]
    model = Net(dense=nn.Linear(60, 2, bias=False))
    for flatten in (None, CHANNELS_FIRST):
        with pytest.raises(KerasFileError, match="nothing says which axis has the channels"):
            moved(checkpoint_of(config, layers), model, flatten=flatten)
    moved(checkpoint_of(config, layers), model, flatten="channels_last")
    assert_is(model.dense.weight, kernel.T)
    # Of a Flatten, the number of channels tells which axis they are in.
    config = sequential(("flat", "Flatten", {"batch_shape": [None, 3, 4, 5]}), ("dense", "Dense", {}))
    for flatten in (None, CHANNELS_FIRST):
        with pytest.raises(KerasFileError, match="nothing says which axis has the channels"):
            moved(checkpoint_of(config, layers), model, flatten=flatten)
    with pytest.raises(KerasFileError, match=r"60 features are no maps of 4 channels: a Flatten of the .* has 3 or 5"):
        moved(checkpoint_of(config, layers), model, flatten={"dense": 4})
    for channels, expected in ((3, kernel.T), (5, kernel.reshape(12, 5, 2).transpose(2, 1, 0).reshape(2, 60))):
        moved(checkpoint_of(config, layers), model, flatten={"dense": channels})
        assert_is(model.dense.weight, expected)


def test_without_a_configuration_the_convolutions_say_how_many_channels_there_are() -> None:
    up = layer_of("up", "Conv2DTranspose", {}, {"kernel": np.ones((2, 2, 5, 3))})
    dense_layer = layer_of("dense", "Dense", {}, {"kernel": np.arange(24.0).reshape(2, 12)})
    norm = layer_of("norm", "BatchNormalization", {}, {"moving_mean": np.arange(12.0), "moving_variance": np.ones(12)})
    model = Net(
        up=nn.ConvTranspose2d(3, 5, 2, bias=False),
        dense=nn.Linear(2, 12, bias=False),
        norm=nn.BatchNorm1d(12, affine=False),
    )
    checkpoint = checkpoint_of(None, [up, dense_layer, norm])
    with pytest.raises(
        KerasFileError, match="12 features are no maps of 5 channels: the convolutions in the file have 3"
    ):
        moved(checkpoint, model, flatten={"dense": (None, 5)})
    deep = layer_of("deep", "DepthwiseConv2D", {}, {"kernel": np.ones((1, 1, 4, 2))})
    with pytest.raises(LayoutMismatch, match="of 7 channels: the convolutions in the file have 3 or 4 or 5 or 8"):
        Flattening(checkpoint_of(None, [up, norm, deep]), {"norm": 7}).of(norm)
    with pytest.raises(KerasFileError, match="norm → norm: the file does not say whether"):
        moved(checkpoint, model, mapping={"norm": "norm"})
    moved(checkpoint, model, flatten={"dense": (None, 3), "norm": 3})
    assert_is(model.dense.weight, np.arange(24.0).reshape(2, 4, 3).transpose(2, 1, 0).reshape(12, 2))
    assert_is(model.norm.running_mean, np.arange(12.0).reshape(4, 3).T.ravel())


def test_weights_that_may_run_over_flattened_maps() -> None:
    """Of each kind, and where nothing says whether they do."""
    rnn = {"recurrent_kernel": (2, 2)}
    attention = {f"{part}/kernel": (4, 2, 2) for part in ("query", "key", "value")} | {"output/kernel": (2, 2, 4)}
    conv = layer_of("conv", "Conv2D", {}, {"kernel": np.ones((3, 3, 1, 4))})
    for class_name, shapes in (
        ("Dense", {"kernel": (4, 2)}),
        ("LayerNormalization", {"gamma": (4,)}),
        ("RMSNormalization", {"scale": (4,)}),
        ("LSTM", {"kernel": (4, 8), "recurrent_kernel": (2, 8)}),
        ("GRU", {"kernel": (4, 6), "recurrent_kernel": (2, 6)}),
        ("SimpleRNN", {"kernel": (4, 2), **rnn}),
        ("MultiHeadAttention", attention),
    ):
        layer = layer_of("layer", class_name, {}, {role: np.ones(shape) for role, shape in shapes.items()})
        with pytest.raises(LayoutMismatch, match="the file does not say whether flattened feature maps come in here"):
            canonical(layer, Flattening(checkpoint_of(None, [conv, layer]), None))
    assert canonical(conv, Flattening(checkpoint_of(None, [conv]), None))


def test_the_one_kind_of_module_that_a_layer_can_be() -> None:
    def parameters(class_name: str | None, **shapes: tuple[int, ...]) -> list[tuple[str, str]]:
        layer = layer_of("layer", class_name, {}, {role: np.ones(shape) for role, shape in shapes.items()})
        flattening = Flattening(checkpoint_of(None, [layer]), None)
        return [(placement.role, placement.param) for placement in canonical(layer, flattening)]

    assert parameters("GRU", kernel=(2, 9), recurrent_kernel=(3, 9)) == [
        ("kernel", "weight_ih_l0"), ("recurrent_kernel", "weight_hh_l0")
    ]  # fmt: skip
    assert parameters(None, gamma=(4,), beta=(4,)) == [
        ("gamma", "weight"),
        ("beta", "bias"),
    ]  # of one layout in all kinds
    assert parameters(None, kernel=(3, 3, 4, 4), bias=(4,)) == [("kernel", "weight"), ("bias", "bias")]
    shapes = {f"{part}/kernel": (4, 2, 2) for part in ("query", "key", "value")} | {"output/kernel": (2, 2, 4)}
    assert [param for _, param in parameters("MultiHeadAttention", **shapes)] == ["in_proj_weight"] * 3 + [
        "out_proj.weight"
    ]
    behind = layer_of("dense", "Dense", {}, {"kernel": np.ones((4, 2))})
    conv = layer_of("conv", "Conv2D", {}, {"kernel": np.ones((3, 3, 1, 4))})
    with pytest.raises(LayoutMismatch, match="the file does not say whether flattened feature maps come in here"):
        canonical(behind, Flattening(checkpoint_of(None, [conv, behind]), None))
    for shapes in ({"kernel": (3, 3, 1, 2), "bias": (2,)}, {"odd": (2,)}):
        with pytest.raises(LayoutMismatch, match="no module of PyTorch is known for it"):
            parameters(None, **shapes)


def test_the_layouts_that_a_message_shows_can_be_pasted(tmp_path: Path) -> None:
    """What it shows is what flatten would have done, if anybody knew."""
    rng = np.random.default_rng(0)
    norm = {role: rng.uniform(1, 2, 24) for role in ("gamma", "beta", "moving_mean", "moving_variance")}
    layers = {
        "conv": {"kernel": rng.standard_normal((3, 3, 1, 4)), "bias": np.ones(4)},
        "norm": norm,
        "lstm": recurrent(24, 2, 4, (8,)),
        "gru": recurrent(24, 2, 3, (2, 6)),
        "dense": dense(24, 5),
    }
    modules = {
        "conv": nn.Conv2d(1, 4, 3),
        "norm": nn.BatchNorm1d(24),
        "lstm": nn.LSTM(24, 2),
        "gru": nn.GRU(24, 2),
        "dense": nn.Linear(24, 5),
    }
    classes = {"norm": "BatchNormalization", "lstm": "LSTM", "gru": "GRU", "dense": "Dense"}
    for name, class_name in classes.items():
        config = sequential(("conv", "Conv2D", {"filters": 4}), ("odd", "Odd", {}), (name, class_name, {}))
        path = write_h5(tmp_path / "m.h5", {"conv": layers["conv"], name: layers[name]}, config)
        model = freeze_second_biases(Net(conv=modules["conv"], **{name: modules[name]}))
        with pytest.raises(KerasFileError, match="so their order cannot be told") as caught:
            load(path, model)
        code = re.search(
            r"such as mapping=(.*) if it takes maps of 4 channels, which PyTorch has first", str(caught.value)
        )
        assert code is not None
        mapping = eval(code[1], {"Layout": Layout})
        optimizer = load(path, model, mapping=mapping)
        save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
        assert_same_datasets(path, tmp_path / "back.h5")
        pasted = [tensor.clone() for tensor in model.state_dict().values()]
        config["config"]["layers"][1] = {"class_name": "Flatten", "config": {"name": "odd"}}
        if name in ("dense", "norm"):
            load(write_h5(path, {"conv": layers["conv"], name: layers[name]}, config), model, flatten=CHANNELS_FIRST)
            assert all(map(torch.equal, pasted, model.state_dict().values()))
        elif name == "lstm":
            kernel = layers["lstm"]["cell/kernel"].reshape(6, 4, 8).transpose(2, 1, 0).reshape(8, 24)
            assert_is(model.lstm.weight_ih_l0, kernel)


def test_a_number_that_contradicts_the_file_shows_the_layouts_that_it_means(tmp_path: Path) -> None:
    kernel = np.arange(24.0 * 5).reshape(24, 5)
    config = sequential(("conv", "Conv2D", {"filters": 4}), ("flatten", "Flatten", {}), ("dense", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", maps_and(kernel), config)
    model = Net(conv=nn.Conv2d(1, 4, 3), dense=nn.Linear(24, 5))
    with pytest.raises(KerasFileError) as caught:
        load(path, model, flatten={"dense": 3})
    mapping = (
        "{'dense/kernel': ('dense.weight', Layout(view=(8, 3, 5), permutation=(2, 1, 0), shape=(5, 24))), "
        "'dense/bias': 'dense.bias'}"
    )
    assert f"such as mapping={mapping} if it takes maps of 3 channels" in str(caught.value)
    load(path, model, mapping=eval(mapping, {"Layout": Layout}))
    assert_is(model.dense.weight, kernel.reshape(8, 3, 5).transpose(2, 1, 0).reshape(5, 24))


def test_what_comes_in_to_a_layer_in_a_custom_layer_is_not_known(tmp_path: Path) -> None:
    """The configuration has the custom layer, and not what it does with its input."""
    block = {"up/kernel": np.arange(24.0 * 5).reshape(24, 5), "up/bias": np.ones(5)}
    layers = {"conv": {"kernel": np.ones((3, 3, 1, 4)), "bias": np.ones(4)}, "block": block}
    config = sequential(("conv", "Conv2D", {"filters": 4}), ("block", "Block", {}))
    path = write_h5(tmp_path / "m.h5", layers, config)
    model = Net(conv=nn.Conv2d(1, 4, 3), up=nn.Linear(24, 5))
    for flatten in (None, CHANNELS_FIRST):
        with pytest.raises(KerasFileError, match="block/up → up: the file does not say whether flattened feature maps"):
            load(path, model, flatten=flatten)
    load(path, model, flatten={"block/up": 4})
    assert_is(model.up.weight, block["up/kernel"].reshape(6, 4, 5).transpose(2, 1, 0).reshape(5, 24))
    load(path, model, flatten="channels_last")
    assert_is(model.up.weight, block["up/kernel"].T)
