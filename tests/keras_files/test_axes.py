"""Flattened feature maps: all chains of three layers that make, move or join axes, against what Keras computes, in NumPy.

No axis has the size of another, so that nothing that is out of order looks right.
"""

from collections.abc import Callable
from typing import Any

import keras_numpy
import numpy as np
import pytest
import torch
from keras_chains import FORMATS, Chain, chains
from keras_memory import checkpoint_of, layer_of, moved
from torch import Tensor, nn

from torch_adadelta.keras.contents import Checkpoint
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.matching import match


def is_joint(chain: Chain) -> bool:
    """Whether some convolution or normalisation of maps has channels that are several axes in a row."""
    joint = [number for number, name in enumerate(chain.names) if name in ("reshape joint", "reshape rows")]
    return bool(joint) and any(name.split()[0] in ("conv", "bn", "gap") for name in chain.names[joint[0] :])


# Of the chains of three layers, all or each of so many.
steps = pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])


@steps
def test_what_the_modules_show_is_loaded_right(step: int) -> None:
    """Refused is only what a permutation of features cannot mend: channels that are several axes, and inputs."""
    counts = {"right": 0, "refused": 0}
    for chain in chains("shown", step=step):
        difference = chain.difference()
        if difference is None:
            assert not chain.has_maps or chain.is_vague or is_joint(chain), chain.names
            counts["refused"] += 1
        else:
            assert difference < 1e-12, chain.names
            counts["right"] += 1
    assert counts["right"] > 3 * counts["refused"] > 0, counts


@steps
@pytest.mark.parametrize("flatten", FORMATS)
def test_what_the_user_says_is_loaded_right_or_refused(flatten: str, step: int) -> None:
    counts = {"right": 0, "refused": 0}
    for chain in chains(flatten, step=step):
        difference = chain.difference(flatten=flatten)
        if difference is not None and difference > 1e-12:
            # Where the order of Keras cannot be told, "channels_last" says that the model keeps it.
            assert flatten == "channels_last", chain.names
            difference = Chain(chain.names, "keras").difference(flatten=flatten)
            assert difference is not None
            assert difference < 1e-12, chain.names
        counts["refused" if difference is None else "right"] += 1
    assert counts["right"] > counts["refused"], counts


@steps
def test_nothing_is_loaded_wrongly_if_nobody_says_anything(step: int) -> None:
    counts = {"right": 0, "refused": 0}
    for chain in chains("channels_first", step=step):
        difference = chain.difference()
        assert difference is None or difference < 1e-12, chain.names
        counts["refused" if difference is None else "right"] += 1
    assert min(counts.values()) > 100 / step, counts


# ---- From features to maps ------------------------------------------------------------------------------------------

Entry = tuple[str, str, dict[str, Any], list[Any]]


def functional(*entries: Entry, outputs: str) -> dict[str, Any]:
    """A configuration: of each layer its class, its name, its configuration, and its inputs, by name and call."""
    layers = []
    for class_name, name, config, inputs in entries:
        calls = inputs if inputs and isinstance(inputs[0], list) else [inputs] if inputs else []
        nodes = [[[source.split(":")[0], int((source + ":0").split(":")[1]), 0, {}] for source in c] for c in calls]
        layers.append({"class_name": class_name, "config": {"name": name, **config}, "inbound_nodes": nodes})
    return {"class_name": "Functional", "config": {"layers": layers, "output_layers": [[outputs, 0, 0]]}}


class Hidden(nn.Module):
    """Modules by name, and a function of them: nobody knows what it does."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def weights_of(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    return {"kernel": rng.standard_normal(shape), "bias": rng.standard_normal(shape[-1])}


def assert_same(model: nn.Module, x: np.ndarray, expected: np.ndarray) -> None:
    with torch.no_grad():
        actual = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("data_format", FORMATS)
def test_a_dense_layer_before_a_reshape_to_maps(data_format: str, has_norm: bool) -> None:
    rng = np.random.default_rng(0)
    maps = (7, 5, 3) if data_format == "channels_last" else (3, 7, 5)
    enter, conv = weights_of(rng, 4, 105), weights_of(rng, 2, 1, 3, 6)
    norm = {key: rng.uniform(0.5, 2, 105) for key in ("gamma", "beta", "moving_mean", "moving_variance")}
    entries: list[Entry] = [
        ("InputLayer", "in", {"batch_shape": [None, 4]}, []),
        ("Dense", "enter", {"units": 105}, ["in"]),
        *([("BatchNormalization", "norm", {"axis": -1}, ["enter"])] if has_norm else []),
        ("ReLU", "relu", {}, ["norm" if has_norm else "enter"]),
        ("Reshape", "reshape", {"target_shape": list(maps)}, ["relu"]),
        ("Conv2D", "conv", {"filters": 6, "kernel_size": [2, 1], "data_format": data_format}, ["reshape"]),
    ]
    layers = [layer_of("enter", "Dense", {}, enter), layer_of("conv", "Conv2D", {}, conv)]
    layers += [layer_of("norm", "BatchNormalization", {}, norm)] if has_norm else []
    checkpoint = checkpoint_of(functional(*entries, outputs="conv"), layers)
    x = rng.standard_normal((2, 4))
    features = x @ enter["kernel"] + enter["bias"]
    features = np.maximum(keras_numpy.batch_norm(features, norm) if has_norm else features, 0)
    expected = keras_numpy.conv(features.reshape(-1, *maps), **conv, data_format=data_format)
    expected = np.moveaxis(expected, -1, 1) if data_format == "channels_last" else expected

    def modules() -> dict[str, nn.Module]:
        found = {"enter": nn.Linear(4, 105), "norm": nn.BatchNorm1d(105, eps=1e-3), "conv": nn.Conv2d(3, 6, (2, 1))}
        return found if has_norm else {key: found[key] for key in ("enter", "conv")}

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.enter(x)
        return torch.relu(self.norm(x) if has_norm else x)

    own = modules()
    between = [own["norm"]] if has_norm else []
    shown = nn.Sequential(own["enter"], *between, nn.ReLU(), nn.Unflatten(1, (3, 7, 5)), own["conv"]).double().eval()
    moved(checkpoint, shown)
    assert_same(shown, x, expected)

    first = Hidden(lambda self, x: self.conv(forward(self, x).view(-1, 3, 7, 5)), **modules())
    last = Hidden(lambda self, x: self.conv(forward(self, x).view(-1, 7, 5, 3).permute(0, 3, 1, 2)), **modules())
    for flatten in ("channels_first", {"enter": (None, 3), **({"norm": 3} if has_norm else {})}):
        moved(checkpoint, first, flatten=flatten)
        assert_same(first, x, expected)
    moved(checkpoint, last, flatten="channels_last")
    assert_same(last, x, expected)
    if data_format == "channels_last":
        with pytest.raises(KerasFileError, match="its features are a Reshape to the maps of conv"):
            moved(checkpoint, first)
    else:
        moved(checkpoint, first)  # both have the channels first
        assert_same(first, x, expected)
    with pytest.raises(
        KerasFileError, match="105 features are no maps of 5 channels: a Reshape to the maps of conv ha"
    ):
        moved(checkpoint, first, flatten={"enter": (None, 5)})
    # Without a configuration.
    checkpoint.model = None
    with pytest.raises(KerasFileError, match=r"flatten=\{'enter': CHANNELS\}.*\{'enter': \(None, CHANNELS\)\}"):
        moved(checkpoint, first)
    if data_format == "channels_last":
        moved(checkpoint, first, flatten={"enter": (None, 3), **({"norm": 3} if has_norm else {})})
        assert_same(first, x, expected)
    with pytest.raises(
        KerasFileError, match="105 features are no maps of 5 channels: the convolutions in the file have 3"
    ):
        moved(checkpoint, first, flatten={"enter": (None, 5)})


def test_a_reshape_to_maps_of_which_nobody_says_what_they_are() -> None:
    rng = np.random.default_rng(0)
    leave = weights_of(rng, 4, 105)
    entries: list[Entry] = [
        ("InputLayer", "in", {"batch_shape": [None, 4]}, []),
        ("Dense", "leave", {"units": 105}, ["in"]),
        ("Reshape", "reshape", {"target_shape": [7, 5, 3]}, ["leave"]),
    ]
    checkpoint = checkpoint_of(functional(*entries, outputs="reshape"), [layer_of("leave", "Dense", {}, leave)])
    x = rng.standard_normal((2, 4))
    expected = (x @ leave["kernel"] + leave["bias"]).reshape(-1, 7, 5, 3)
    first = Hidden(lambda self, x: self.leave(x).view(-1, 3, 7, 5).permute(0, 2, 3, 1), leave=nn.Linear(4, 105))
    last = Hidden(lambda self, x: self.leave(x).view(-1, 7, 5, 3), leave=nn.Linear(4, 105))
    for flatten in (None, "channels_first"):
        with pytest.raises(
            KerasFileError, match=r"nothing says which axis has the channels.*\{'leave': \(None, CHANNELS"
        ):
            moved(checkpoint, first, flatten=flatten)
    moved(checkpoint, first, flatten={"leave": (None, 3)})
    assert_same(first, x, expected)
    moved(checkpoint, last, flatten="channels_last")
    assert_same(last, x, expected)


# ---- Several paths --------------------------------------------------------------------------------------------------


def branches(data_format: str, *, is_shared: bool) -> tuple[Checkpoint, np.ndarray, np.ndarray]:
    """Two convolutions of an input, each flattened, by one Flatten or by two; a Dense layer on each; both added."""
    rng = np.random.default_rng(0)
    first, second = weights_of(rng, 2, 1, 3, 4), weights_of(rng, 2, 1, 3, 6)
    left, right = weights_of(rng, 4 * 30, 5), weights_of(rng, 6 * 30, 5)
    maps = (7, 5, 3) if data_format == "channels_last" else (3, 7, 5)
    config = {"kernel_size": [2, 1], "data_format": data_format}
    flats: list[Entry] = [
        ("Flatten", "flat", {"data_format": data_format}, [["first"], ["second"]] if is_shared else ["first"]),
        *([] if is_shared else [("Flatten", "other", {"data_format": data_format}, ["second"])]),
    ]
    entries: list[Entry] = [
        ("InputLayer", "in", {"batch_shape": [None, *maps]}, []),
        ("Conv2D", "first", {"filters": 4, **config}, ["in"]),
        ("Conv2D", "second", {"filters": 6, **config}, ["in"]),
        *flats,
        ("Dense", "left", {"units": 5}, ["flat"]),
        ("Dense", "right", {"units": 5}, ["flat:1" if is_shared else "other"]),
        ("Add", "add", {}, ["left", "right"]),
    ]
    layers = [layer_of(name, "Conv2D", {}, w) for name, w in (("first", first), ("second", second))]
    layers += [layer_of(name, "Dense", {}, w) for name, w in (("left", left), ("right", right))]
    x = rng.standard_normal((2, *maps))
    expected = sum(
        keras_numpy.flatten(keras_numpy.conv(x, **conv, data_format=data_format), data_format) @ dense["kernel"]
        + dense["bias"]
        for conv, dense in ((first, left), (second, right))
    )
    inputs = np.moveaxis(x, -1, 1).copy() if data_format == "channels_last" else x
    return checkpoint_of(functional(*entries, outputs="add"), layers), inputs, expected


def torch_branches() -> nn.Module:
    return Hidden(
        lambda self, x: self.left(self.first(x).flatten(1)) + self.right(self.second(x).flatten(1)),
        first=nn.Conv2d(3, 4, (2, 1)),
        second=nn.Conv2d(3, 6, (2, 1)),
        left=nn.Linear(120, 5),
        right=nn.Linear(180, 5),
    )


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("data_format", FORMATS)
def test_each_call_of_a_shared_layer_has_axes_of_its_own(data_format: str, is_shared: bool) -> None:
    checkpoint, x, expected = branches(data_format, is_shared=is_shared)
    model = torch_branches()
    with pytest.raises(KerasFileError, match="Flatten of the maps of first"):
        moved(checkpoint, model)
    for flatten in ("channels_first", {"left": 4, "right": 6}, {"left": "channels_first", "right": 6}):
        moved(checkpoint, model, flatten=flatten)
        assert_same(model, x, expected)


def test_an_entry_of_flatten_is_for_its_layer_only() -> None:
    checkpoint, _, _ = branches("channels_last", is_shared=False)
    model = torch_branches()
    with pytest.raises(KerasFileError, match="right → right: its features are a Flatten of the maps of second"):
        moved(checkpoint, model, flatten={"left": 4})


@pytest.mark.parametrize("is_added", [False, True])
def test_maps_that_meet(is_added: bool) -> None:
    """Concatenated or added in front of a Flatten; and a Dense layer that is added to flattened maps."""
    rng = np.random.default_rng(0)
    first, second = weights_of(rng, 2, 1, 3, 4), weights_of(rng, 2, 1, 3, 4 if is_added else 6)
    count = 4 if is_added else 10
    skip, leave = weights_of(rng, 8, 30 * count), weights_of(rng, 30 * count, 5)
    config = {"kernel_size": [2, 1], "data_format": "channels_last"}
    entries: list[Entry] = [
        ("InputLayer", "in", {"batch_shape": [None, 7, 5, 3]}, []),
        ("InputLayer", "vector", {"batch_shape": [None, 8]}, []),
        ("Conv2D", "first", {"filters": 4, **config}, ["in"]),
        ("Conv2D", "second", {"filters": 4 if is_added else 6, **config}, ["in"]),
        ("Add" if is_added else "Concatenate", "both", {}, ["first", "second"]),
        ("Flatten", "flat", {}, ["both"]),
        ("Dense", "skip", {"units": 30 * count}, ["vector"]),
        ("Add", "add", {}, ["flat", "skip"]),
        ("Dense", "leave", {"units": 5}, ["add"]),
    ]
    weights = {"first": first, "second": second, "skip": skip, "leave": leave}
    classes = {"first": "Conv2D", "second": "Conv2D", "skip": "Dense", "leave": "Dense"}
    layers = [layer_of(name, classes[name], {}, w) for name, w in weights.items()]
    checkpoint = checkpoint_of(functional(*entries, outputs="leave"), layers)
    x, vector = rng.standard_normal((2, 7, 5, 3)), rng.standard_normal((2, 8))
    maps = [keras_numpy.conv(x, **w) for w in (first, second)]
    both = maps[0] + maps[1] if is_added else np.concatenate(maps, -1)
    features = keras_numpy.flatten(both) + vector @ skip["kernel"] + skip["bias"]
    expected = features @ leave["kernel"] + leave["bias"]

    def forward(self: Any, x: Tensor) -> Tensor:
        maps = (self.first(x), self.second(x))
        both = maps[0] + maps[1] if is_added else torch.cat(maps, 1)
        return self.leave(both.flatten(1) + self.skip(torch.from_numpy(vector)))

    model = Hidden(
        forward,
        first=nn.Conv2d(3, 4, (2, 1)),
        second=nn.Conv2d(3, 4 if is_added else 6, (2, 1)),
        skip=nn.Linear(8, 30 * count),
        leave=nn.Linear(30 * count, 5),
    )
    with pytest.raises(KerasFileError, match="flatten='channels_first'"):
        moved(checkpoint, model)
    moved(checkpoint, model, flatten="channels_first")
    assert_same(model, np.moveaxis(x, -1, 1).copy(), expected)


def test_features_that_are_no_weights_of_a_linear_are_refused() -> None:
    """An LSTM that takes rows of maps, or gives what becomes maps; two Dense layers that become maps together."""
    rng = np.random.default_rng(0)
    conv = weights_of(rng, 2, 1, 3, 4)
    lstm = {
        "kernel": rng.standard_normal((20, 24)),
        "recurrent_kernel": rng.standard_normal((6, 24)),
        "bias": np.ones(24),
    }
    entries: list[Entry] = [
        ("InputLayer", "in", {"batch_shape": [None, 7, 5, 3]}, []),
        ("Conv2D", "conv", {"filters": 4, "kernel_size": [2, 1]}, ["in"]),
        ("Reshape", "rows", {"target_shape": [-1, 20]}, ["conv"]),
        ("LSTM", "lstm", {"units": 6}, ["rows"]),
    ]
    layers = [layer_of("conv", "Conv2D", {}, conv), layer_of("lstm", "LSTM", {}, lstm)]
    model = Hidden(lambda self, x: x, conv=nn.Conv2d(3, 4, (2, 1)), lstm=nn.LSTM(20, 6))
    checkpoint = checkpoint_of(functional(*entries, outputs="lstm"), layers)
    with pytest.raises(KerasFileError, match="lstm → lstm: its features are a Reshape of the maps of conv"):
        moved(checkpoint, model)
    moved(checkpoint, model, flatten="channels_first")
    expected = lstm["kernel"].reshape(5, 4, 24).transpose(2, 1, 0).reshape(24, 20)
    np.testing.assert_array_equal(model.lstm.weight_ih_l0.detach().numpy(), expected)
    moved(checkpoint, model, flatten={"lstm": "channels_last"})
    np.testing.assert_array_equal(model.lstm.weight_ih_l0.detach().numpy(), lstm["kernel"].T)

    made = {"kernel": np.ones((4, 420)), "recurrent_kernel": np.ones((105, 420)), "bias": np.ones(420)}
    entries = [
        ("InputLayer", "in", {"batch_shape": [None, 6, 4]}, []),
        ("LSTM", "lstm", {"units": 105}, ["in"]),
        ("Reshape", "maps", {"target_shape": [7, 5, 3]}, ["lstm"]),
        ("Conv2D", "conv", {"filters": 4, "kernel_size": [2, 1]}, ["maps"]),
    ]
    layers = [layer_of("conv", "Conv2D", {}, conv), layer_of("lstm", "LSTM", {}, made)]
    model = Hidden(lambda self, x: x, conv=nn.Conv2d(3, 4, (2, 1)), lstm=nn.LSTM(4, 105))
    checkpoint = checkpoint_of(functional(*entries, outputs="conv"), layers)
    for flatten, message in ((None, "its features are a Reshape to"), ("channels_first", "the features that it gives")):
        with pytest.raises(KerasFileError, match=f"lstm → lstm: {message}"):
            moved(checkpoint, model, flatten=flatten)

    one, two = weights_of(rng, 4, 70), weights_of(rng, 4, 35)
    entries = [
        ("InputLayer", "in", {"batch_shape": [None, 4]}, []),
        ("Dense", "one", {"units": 70}, ["in"]),
        ("Dense", "two", {"units": 35}, ["in"]),
        ("Concatenate", "both", {}, ["one", "two"]),
        ("Reshape", "maps", {"target_shape": [7, 5, 3]}, ["both"]),
        ("Conv2D", "conv", {"filters": 4, "kernel_size": [2, 1]}, ["maps"]),
    ]
    layers = [
        layer_of("one", "Dense", {}, one),
        layer_of("two", "Dense", {}, two),
        layer_of("conv", "Conv2D", {}, conv),
    ]
    model = Hidden(lambda self, x: x, one=nn.Linear(4, 70), two=nn.Linear(4, 35), conv=nn.Conv2d(3, 4, (2, 1)))
    checkpoint = checkpoint_of(functional(*entries, outputs="conv"), layers)
    for flatten in (None, "channels_first"):
        with pytest.raises(
            KerasFileError, match="one → one: its features are a Reshape to the maps of conv, so their or"
        ):
            moved(checkpoint, model, flatten=flatten)
    moved(checkpoint, model, flatten="channels_last")


def test_a_damaged_configuration_is_an_error_that_names_the_file() -> None:
    deep = [("InputLayer", "in", {"batch_shape": [None, 4]}, [])]
    deep += [("Dense", f"d{number}", {"units": 4}, [f"d{number + 1}"]) for number in range(3000)]
    for config in (
        functional(*deep, outputs="d0"),
        functional(("InputLayer", "in", {"batch_shape": [None, 4, 5]}, []),
                   ("Permute", "p", {"dims": [1, "a"]}, ["in"]), outputs="p"),
        functional(("InputLayer", "in", {"batch_shape": [None, 4, 5]}, []),
                   ("Concatenate", "c", {"axis": {}}, ["in"]), ("Dense", "d", {"units": []}, ["c"]), outputs="d"),
    ):  # fmt: skip
        checkpoint = checkpoint_of(config, [layer_of("d0", "Dense", {}, weights_of(np.random.default_rng(0), 4, 4))])
        model = nn.Sequential(nn.Linear(4, 4)).double()
        try:
            match(checkpoint, model)
        except KerasFileError as error:
            message = str(error)
            if "damaged" not in message:
                pytest.fail(message)


def test_inputs_that_are_not_known_are_asked_for() -> None:
    """A Flatten of an input without a shape, and layers whose inputs come from nowhere."""
    rng = np.random.default_rng(0)
    layers = [layer_of("dense", "Dense", {}, weights_of(rng, 105, 2))]
    model = nn.Sequential(nn.Flatten(), nn.Linear(105, 2)).double()
    entries = [{"class_name": "Flatten", "config": {}}, {"class_name": "Dense", "config": {"name": "dense"}}]
    config = {"class_name": "Sequential", "config": {"layers": entries}}
    with pytest.raises(KerasFileError, match="a Flatten of an input of unknown shape, so their order cannot be told"):
        moved(checkpoint_of(config, layers), model)
    moved(checkpoint_of(config, layers), model, flatten="channels_last")
    entries[0]["config"] = {"batch_input_shape": [None, 105]}
    moved(checkpoint_of(config, layers), model)
    conv: Entry = ("Conv2D", "conv", {"filters": 3}, ["in"])
    broken = functional(
        conv, ("Flatten", "flat", {}, ["convolution"]), ("Dense", "dense", {}, ["flat"]), outputs="dense"
    )
    layers.append(layer_of("conv", "Conv2D", {}, weights_of(rng, 1, 1, 2, 3)))
    model = Hidden(lambda self, x: x, conv=nn.Conv2d(2, 3, 1), dense=nn.Linear(105, 2))
    with pytest.raises(KerasFileError, match="the file does not say whether flattened feature maps come in here"):
        moved(checkpoint_of(broken, layers), model)
