"""What each layer does to the axes: how many places and channels it leaves, and what is not known behind it."""

from typing import Any

import numpy as np
import pytest
from keras_memory import layer_of

from torch_adadelta.keras.axes import Axes
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.features import Flat
from torch_adadelta.keras.layouts import KEEP_ORDER, FeatureOrder

Layers = list[tuple[str, dict[str, Any]]]
CONV = ("Conv2D", {"filters": 4, "kernel_size": 1})
FLATTEN = ("Flatten", {})
FIRST = {"data_format": "channels_first"}


def axes_of(shape: list[Any] | None, *entries: tuple[str, dict[str, Any]], **weights: tuple[int, ...]) -> Axes:
    """Of layers one after the other, which are named by their places: "l1" takes the input."""
    layers = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, *(shape or [])] if shape else None}}
    ]
    for number, (class_name, config) in enumerate(entries, 1):
        layers.append({"class_name": class_name, "config": {"name": f"l{number}", **config}})
    own = [layer_of(name, None, {}, {"kernel": np.zeros(kernel)}) for name, kernel in weights.items()]
    return Axes(ModelConfig({"class_name": "Sequential", "config": {"layers": layers}}), own)


def taken(shape: list[Any] | None, *entries: tuple[str, dict[str, Any]], **weights: tuple[int, ...]) -> Flat | None:
    """What a Dense layer behind them takes."""
    axes = axes_of(shape, *entries, ("Dense", {"name": "last", "units": 2}), **weights)
    return axes.inputs().get("last")


def wrapped(class_name: str, **config: Any) -> tuple[str, dict[str, Any]]:
    return "TimeDistributed", {"layer": {"class_name": class_name, "config": config}}


# ---- Sizes ----------------------------------------------------------------------------------------------------------

MAPS_OF = [7, 9, 3]


@pytest.mark.parametrize(
    ("class_name", "config", "places", "channels"),
    [
        ("Conv2D", {"filters": 4, "kernel_size": [2, 3]}, 6 * 7, 4),
        ("Conv2D", {"filters": 4, "kernel_size": 3, "strides": [2, 1]}, 3 * 7, 4),
        ("Conv2D", {"filters": 4, "kernel_size": [3, 1], "dilation_rate": [2, 1]}, 3 * 9, 4),
        ("Conv2D", {"filters": 4, "kernel_size": 3, "strides": 2, "padding": "same"}, 4 * 5, 4),
        ("Conv2D", {"filters": 4, "kernel_size": "a"}, -1, 4),
        ("Conv2D", {"filters": 4, "kernel_size": [2]}, -1, 4),
        ("Conv2D", {"filters": 4, "kernel_size": 3, "strides": 0}, -1, 4),
        ("SeparableConv2D", {"filters": 4, "kernel_size": 2}, 6 * 8, 4),
        ("Conv2DTranspose", {"filters": 4, "kernel_size": [2, 4], "strides": 2}, 14 * 20, 4),
        ("Conv2DTranspose", {"filters": 4, "kernel_size": [1, 3], "strides": [3, 1]}, 21 * 11, 4),
        ("Conv2DTranspose", {"filters": 4, "kernel_size": 4, "strides": 2, "padding": "same"}, 14 * 18, 4),
        ("Conv2DTranspose", {"filters": 4, "kernel_size": 2, "strides": 2, "output_padding": 1}, -1, 4),
        ("Conv2DTranspose", {"filters": 4, "kernel_size": 2, "dilation_rate": 2}, -1, 4),
        ("MaxPooling2D", {}, 3 * 4, 3),
        ("MaxPooling2D", {"pool_size": [3, 2]}, 2 * 4, 3),
        ("MaxPooling2D", {"pool_size": [3, 2], "strides": [1, 1]}, 5 * 8, 3),
        ("AveragePooling2D", {"pool_size": 2, "padding": "same"}, 4 * 5, 3),
        ("ZeroPadding2D", {}, 9 * 11, 3),
        ("ZeroPadding2D", {"padding": 2}, 11 * 13, 3),
        ("ZeroPadding2D", {"padding": [1, 2]}, 9 * 13, 3),
        ("ZeroPadding2D", {"padding": [[1, 2], [0, 4]]}, 10 * 13, 3),
        ("ZeroPadding2D", {"padding": [[1, "a"], [0, 4]]}, -1, 3),
        ("ZeroPadding2D", {"padding": [1]}, -1, 3),
        ("Cropping2D", {"cropping": [[1, 2], [0, 4]]}, 4 * 5, 3),
        ("Cropping2D", {"cropping": "a"}, -1, 3),
        ("UpSampling2D", {}, 14 * 18, 3),
        ("UpSampling2D", {"size": [1, 3]}, 7 * 27, 3),
        ("UpSampling2D", {"size": ["a", 1]}, -1, 3),
        ("SpatialDropout2D", {}, None, 3),
        ("ReLU", {}, None, 3),
    ],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_places_and_channels(
    class_name: str, config: dict[str, Any], places: int | None, channels: int, data_format: str
) -> None:
    is_first = data_format == "channels_first"
    shape = [3, 7, 9] if is_first else MAPS_OF
    conv = ("Conv2D", {"filters": 3, "kernel_size": 1, "data_format": data_format})
    flatten = ("Reshape", {"target_shape": [-1]}) if is_first else FLATTEN
    flat = taken(shape, conv, (class_name, {**config, "data_format": data_format}), flatten)
    if is_first:  # in Keras, too
        assert flat is None or (flat.first, flat.is_open) == (KEEP_ORDER, False)
        return
    assert flat is not None
    assert (flat.first, flat.channels) == (
        FeatureOrder((7 * 9 if places is None else places, channels), (1, 0)),
        channels,
    )


@pytest.mark.parametrize(
    ("class_name", "config", "places"),
    [
        ("Conv1D", {"filters": 3, "kernel_size": [4]}, 6),
        ("Conv1D", {"filters": 3, "kernel_size": 4, "padding": "causal", "strides": 2}, 5),
        ("MaxPooling1D", {"pool_size": [2]}, 4),
        ("ZeroPadding1D", {"padding": [1, 3]}, 13),
        ("Cropping1D", {"cropping": 2}, 5),
        ("UpSampling1D", {"size": 2}, 18),
    ],
)
def test_places_of_sequences(class_name: str, config: dict[str, Any], places: int) -> None:
    flat = taken([9, 3], ("Conv1D", {"filters": 3, "kernel_size": 1}), (class_name, config), FLATTEN)
    assert flat is not None
    assert flat.first == FeatureOrder((places, 3), (1, 0))


def test_sizes_that_the_configuration_does_not_have() -> None:
    assert taken([None, 9, 3], CONV, FLATTEN) == taken([None, None, 3], CONV, FLATTEN)
    flat = taken([None, 9, 3], CONV, FLATTEN)
    assert flat is not None
    assert flat.first == FeatureOrder((-1, 4), (1, 0))
    unknown = ("Conv2D", {"kernel_size": 1})
    flat = taken([7, 9, 3], unknown, FLATTEN)
    assert flat is not None
    assert (flat.first, flat.channels) == (FeatureOrder((63, -1), (1, 0)), -1)
    for class_name, kernel, channels in (
        ("Conv2D", (1, 1, 3, 5), 5),
        ("Conv2DTranspose", (1, 1, 5, 3), 5),
        ("DepthwiseConv2D", (2, 1, 3, 2), 6),
    ):
        flat = taken([7, 9, 3], (class_name, {"kernel_size": 1}), FLATTEN, l1=kernel)
        assert flat is not None
        assert flat.first == FeatureOrder((63, channels), (1, 0))
    own = axes_of(
        [7, 9, 3],
        ("SeparableConv2D", {"kernel_size": 1}),
        FLATTEN,
        ("Dense", {"name": "last"}),
        **{"l1/pointwise": (1, 1, 6, 5)},
    )
    assert own.inputs()["last"].first == FeatureOrder((63, 5), (1, 0))


@pytest.mark.parametrize(
    "class_name",
    [
        *("Activation", "ReLU", "LeakyReLU", "ELU", "PReLU", "Softmax", "ThresholdedReLU", "Dropout"),
        *("SpatialDropout1D", "SpatialDropout2D"),
        *("GaussianNoise", "GaussianDropout", "AlphaDropout", "Rescaling", "ActivityRegularization", "Masking"),
        *("UnitNormalization", "Normalization", "Identity", "LayerNormalization", "RMSNormalization"),
        *("BatchNormalization", "SyncBatchNormalization", "GroupNormalization"),
    ],
)
def test_layers_that_leave_every_axis_where_it_is(class_name: str) -> None:
    flat = taken([7, 9, 3], CONV, (class_name, {}), FLATTEN)
    assert flat is not None
    assert flat.first == last_first(63, 4)
    inputs = axes_of([7, 9, 3], CONV, ("Reshape", {"target_shape": [7, 36]}), (class_name, {})).inputs()
    has_weights = class_name.endswith("Normalization") and class_name not in ("UnitNormalization", "Normalization")
    assert ("l3" in inputs) == has_weights


@pytest.mark.parametrize(
    "class_name", ["LSTM", "GRU", "SimpleRNN", "RNN", "GroupedQueryAttention", "MultiHeadAttention"]
)
def test_layers_that_make_features_of_their_own(class_name: str) -> None:
    rows = (CONV, ("Reshape", {"target_shape": [7, 36]}), (class_name, {"units": 5, "return_sequences": True}))
    assert taken([7, 9, 3], *rows, FLATTEN) is None
    assert axes_of([7, 9, 3], *rows).inputs()["l3"].first == last_first(9, 4)


# ---- Axes -----------------------------------------------------------------------------------------------------------


def last_first(*view: int) -> FeatureOrder:
    return FeatureOrder(view, (len(view) - 1, *range(len(view) - 1)))


@pytest.mark.parametrize(
    ("shape", "entries", "expected"),
    [
        # No maps: no other order in PyTorch.
        ([6], [("Dense", {"units": 12})], None),
        ([6], [("Dense", {"units": 12}), ("RepeatVector", {"n": 3}), FLATTEN], None),
        ([6], [("Embedding", {"output_dim": 4}), FLATTEN], None),
        ([6, 3], [("LSTM", {"units": 4, "return_sequences": True}), FLATTEN], None),
        ([6, 3], [("LSTM", {"units": 4})], None),
        ([6, 3], [("MultiHeadAttention", {}), FLATTEN], None),
        ([7, 9, 3], [CONV, ("GlobalAveragePooling2D", {})], None),
        ([9, 3], [FLATTEN], None),
        (None, [("Reshape", {"target_shape": [3, 4]})], None),
        ([6, 3], [("Bidirectional", {"layer": {"class_name": "LSTM"}})], None),
        ([7, 9, 3], [CONV, ("GlobalMaxPooling2D", {"keepdims": True}), ("UpSampling2D", {}), FLATTEN], last_first(4, 4)),
        ([7, 9, 3], [("Dense", {"units": 8}), FLATTEN], last_first(63, 8)),
        ([9, 3], [FLATTEN, ("Flatten", FIRST)], None),
        ([7, 9, 3], [wrapped("Flatten")], None),
        (None, [("BatchNormalization", {})], None),
        (None, [("Dense", {"units": 5}), FLATTEN], None),
        ([7, 9, 3], [CONV, ("GlobalMaxPooling2D", {"keepdims": True}), FLATTEN], None),
        # Maps, of which the channels come last in Keras.
        ([6], [("Embedding", {"output_dim": 4}), ("Conv1D", {"filters": 3, "kernel_size": 2}), FLATTEN], last_first(5, 3)),
        ([6, 3], [("Bidirectional", {"layer": {"config": {"units": 4, "return_sequences": True}}}),
                  ("MaxPooling1D", {}), FLATTEN], last_first(3, 8)),
        ([6, 3], [("Bidirectional", {"merge_mode": "sum", "layer": {"config": {"units": 4, "return_sequences": True}}}),
                  ("MaxPooling1D", {}), FLATTEN], last_first(3, 4)),
        ([7, 9, 3], [CONV, ("Dense", {"units": 5}), FLATTEN], last_first(63, 5)),
        ([7, 9, 3], [CONV, ("LayerNormalization", {"axis": -1}), FLATTEN], last_first(63, 4)),
        ([7, 9, 3], [CONV, ("BatchNormalization", {"axis": [3]}), FLATTEN], last_first(63, 4)),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [63, 4]}), FLATTEN], last_first(63, 4)),
        ([7, 9, 3], [CONV, ("Permute", {"dims": [3, 1, 2]}), FLATTEN], KEEP_ORDER),
        ([7, 9, 3], [CONV, ("Permute", {"dims": [1, 3, 2]}), FLATTEN], FeatureOrder((7, 4, 9), (1, 0, 2))),
        ([7, 9, 3], [CONV, FLATTEN, ("RepeatVector", {"n": 2}), FLATTEN], FeatureOrder((2, 63, 4), (0, 2, 1))),
        ([2, 7, 9, 3], [wrapped("Conv2D", filters=4, kernel_size=1), wrapped("Flatten")], last_first(63, 4)),
        ([2, 7, 9, 3], [wrapped("Flatten")], last_first(63, 3)),
        (None, [CONV, FLATTEN], last_first(-1, 4)),
        ([9, 3], [CONV, FLATTEN], last_first(-1, 4)),
        ([2, 7, 9, 3], [wrapped("Conv2D", filters=4, kernel_size=1), wrapped("MaxPooling2D"), wrapped("Flatten"),
                        ("LSTM", {"units": 4})], None),
    ],
    ids=range(32),
)  # fmt: skip
def test_what_a_layer_takes(shape: list[int] | None, entries: Layers, expected: FeatureOrder | None) -> None:
    flat = taken(shape, *entries)
    if expected is None:
        assert flat is None
    else:
        assert flat is not None
        assert (flat.first, flat.is_open, flat.is_split) == (expected, expected != KEEP_ORDER, False)


@pytest.mark.parametrize(
    ("shape", "entries", "why"),
    [
        ([7, 9, 3], [CONV, ("Mine", {})], "Mine of the maps of l1"),
        ([7, 9, 3], [CONV, wrapped("Mine")], "TimeDistributed of the maps of l1"),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [5, 5]})], "Reshape of the maps of l1"),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [-1, 5]})], "Reshape of the maps of l1"),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [14, 18]})], "Reshape of the maps of l1"),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [-1, 0]})], "Reshape of the maps of l1"),
        ([7, 9, 3], [CONV, ("Reshape", {"target_shape": [7, 9]})], "Reshape of the maps of l1"),
        ([7, None, 3], [CONV, ("Reshape", {"target_shape": [-1, 4]})], "Reshape of the maps of l1"),
        ([None, 9, 3], [CONV, ("Reshape", {"target_shape": [63, 4]})], "Reshape of the maps of l1"),
        ([7, 9, 3], [CONV, ("Mine", {}), ("Dense", {"units": 5}), FLATTEN], "Mine of the maps of l1"),
        ([7, 9, 3], [CONV, ("Permute", {"dims": [1, 2]})], "Permute of the maps of l1"),
        (
            [7, 9, 3],
            [CONV, ("Permute", {"dims": [2, 1, 3]}), FLATTEN],
            "Flatten of the maps of l1|Permute of the maps of l1",
        ),
        (
            [7, 9, 3],
            [CONV, ("MaxPooling2D", FIRST), FLATTEN],
            "call of l2, whose channels are in another axis",
        ),
        (None, [FLATTEN], "Flatten of an input of unknown shape"),
        ([7, 9, 3], [("Permute", {"dims": [3, 1, 2]}), FLATTEN], "Permute of the maps of in"),
        ([7, 9, 3], [("Reshape", {"target_shape": [63, 3]}), FLATTEN], "Reshape of the maps of in"),
        ([7, 9, 3], [CONV, ("Concatenate", {"axis": {}})], "Concatenate of the maps of l1"),
        ([7, 9], [("Permute", {"dims": [2, 1]}), ("Reshape", {"target_shape": [63]})], "maps of in"),
    ],
    ids=range(18),
)
def test_an_order_that_is_not_known(shape: list[Any] | None, entries: Layers, why: str) -> None:
    flat = taken(shape, *entries)
    assert flat is not None
    assert any(option in flat.why for option in why.split("|")), flat
    assert (flat.first, flat.is_open) == (None, True)


def test_an_input_whose_format_is_that_of_the_installation() -> None:
    """The format of a Flatten is the default's: that the channels are last is believed if there are no more than rows."""
    flat = taken([7, 9, 3], FLATTEN)
    assert flat is not None
    assert flat.first == last_first(63, 3)
    flat = taken([3, 9, 7], FLATTEN)
    assert flat is not None
    assert (flat.first, flat.by_channels) == (None, {3: KEEP_ORDER, 7: last_first(27, 7)})
    flat = taken([3, 9, 7], ("Flatten", FIRST))  # which moves them to the end
    assert flat is not None
    assert flat.first == last_first(63, 3)


def test_weights_that_run_over_other_axes_than_the_last() -> None:
    axes = axes_of([7, 9, 3], CONV, ("LayerNormalization", {"axis": [1, 2, 3]}), ("LayerNormalization", {"axis": "a"}))
    assert axes.inputs()["l2"].why == "normalisation over several axes of the maps of l1"
    assert "l3" not in axes.inputs()
    for indices in ([1, 2], [1, 9], [1, "a"]):
        assert axes_of([9, 3], ("LayerNormalization", {"axis": indices})).inputs() == {}
    separable = ("SeparableConv1D", {"filters": 12, "kernel_size": 1})
    assert list(axes_of([7, 9, 3], CONV, ("Reshape", {"target_shape": [7, 36]}), separable).inputs()) == [
        "l3/depthwise"
    ]
    assert list(axes_of([6, 3], separable, ("Reshape", {"target_shape": [6, 4, 3]}), CONV).outputs()) == [
        "l1/pointwise"
    ]
    flat = axes_of([7, 9, 3], CONV, FLATTEN, ("LayerNormalization", {})).inputs()["l3"]
    assert flat.first == last_first(63, 4)
    flat = axes_of([7, 9, 3], CONV, ("Reshape", {"target_shape": [7, 36]}), ("MultiHeadAttention", {})).inputs()["l3"]
    assert flat.first == last_first(9, 4)
    flat = axes_of([7, 9, 3], CONV, FLATTEN, ("BatchNormalization", {"axis": "a"})).inputs()["l3"]
    assert flat.first == last_first(63, 4)


# ---- What is split into maps ----------------------------------------------------------------------------------------

ENTER = ("Dense", {"units": 7 * 9 * 3})
SPLIT = ("Reshape", {"target_shape": [7, 9, 3]})


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([ENTER, SPLIT, CONV], last_first(63, 3)),
        ([ENTER, ("ReLU", {}), SPLIT, ("MaxPooling2D", {})], last_first(63, 3)),
        ([ENTER, ("Reshape", {"target_shape": [7, 9, -1]}), ("BatchNormalization", {"axis": 2})], FeatureOrder((7, 9, 3), (1, 0, 2))),
        ([ENTER, ("Reshape", {"target_shape": [3, 7, 9]}), ("Conv2D", {**CONV[1], **FIRST})], None),
        ([("Dense", {}), SPLIT, CONV], last_first(63, 3)),
        ([ENTER, ("Reshape", {"target_shape": [63, 3]}), ("LSTM", {"units": 4})], None),
        ([ENTER, ("Reshape", {"target_shape": [9, 21]}), ("Conv1D", {"filters": 3, "kernel_size": 1})], last_first(9, 21)),
    ],
    ids=range(7),
)  # fmt: skip
def test_what_a_layer_gives(entries: Layers, expected: FeatureOrder | None) -> None:
    found = axes_of([4], *entries).outputs()
    if expected is None:
        assert all(not flat.is_open for flat in found.values())
    else:
        assert (found["l1"].first, found["l1"].is_split, found["l1"].is_open) == (expected, True, True)


def test_what_nobody_takes_may_be_maps() -> None:
    """Of a Reshape at the end, the number of channels tells which axis they are in."""
    flat = axes_of([4], ENTER, SPLIT).outputs()["l1"]
    assert (flat.first, flat.by_channels) == (None, {7: KEEP_ORDER, 3: last_first(63, 3)})
    assert (
        axes_of([4], ENTER, ("Reshape", {"target_shape": [1, 63, 3]})).outputs() == {}
    )  # one channel is first and last
    assert axes_of([4], ENTER, ("Reshape", {"target_shape": [63, 3]})).outputs() == {}
    both = axes_of([4], ENTER, SPLIT, CONV, ("Mine", {})).outputs()["l1"]
    assert both.first == last_first(63, 3)
    assert axes_of([7, 9, 3], CONV, ("Reshape", {"target_shape": [63, 2, 2]})).outputs() == {}


def test_a_layer_that_nobody_knows_may_make_maps_if_it_has_convolutions() -> None:
    for layer, kernel, why in (
        ("l1", (1, 1, 3, 4), "Mine of the maps of in"),
        ("l1", (3, 4), None),
        ("l2", (1, 1, 3, 4), None),
    ):
        flat = taken([6], ("Mine", {}), **{layer: kernel})
        assert (None if flat is None else flat.why) == why


# ---- Several paths --------------------------------------------------------------------------------------------------


def graph(*entries: tuple[str, str, dict[str, Any], list[str]], last: str) -> Axes:
    """Layers by class, name, options and the names of their inputs, each called once, or once for each "a b"."""
    layers = []
    for class_name, name, config, inputs in entries:
        nodes = [[[source, 0, 0, {}] for source in call.split()] for call in inputs]
        layers.append({"class_name": class_name, "config": {"name": name, **config}, "inbound_nodes": nodes})
    config = {"layers": layers, "output_layers": [[last, 0, 0]]}
    return Axes(ModelConfig({"class_name": "Functional", "config": config}), [])


IMAGE = ("InputLayer", "in", {"batch_shape": [None, 7, 9, 3]}, [])


def conv(name: str, source: str = "in", filters: int = 4, **options: Any) -> tuple[str, str, dict[str, Any], list[str]]:
    return "Conv2D", name, {"filters": filters, "kernel_size": 1, **options}, [source]


def test_a_layer_that_is_called_on_features_in_different_orders() -> None:
    other = conv("b", filters=12, kernel_size=[7, 3])
    flats = (("Flatten", "f", {}, ["a"]), ("Flatten", "g", {}, ["b"]))
    axes = graph(IMAGE, conv("a"), other, *flats, ("Dense", "d", {"units": 2}, ["f", "g"]), last="d")
    assert (axes.inputs()["d"].why, axes.inputs()["d"].first) == ("call of d on features in different orders", None)
    axes = graph(IMAGE, conv("a"), conv("b"), *flats, ("Dense", "d", {"units": 2}, ["f", "g"]), last="d")
    assert axes.inputs()["d"].first == last_first(63, 4)


def test_features_that_two_layers_take_for_different_maps() -> None:
    vector = ("InputLayer", "vector", {"batch_shape": [None, 5]}, [])
    made = (vector, ("Dense", "enter", {"units": 189}, ["vector"]), ("Reshape", "in", SPLIT[1], ["enter"]))
    flat = graph(*made, conv("a"), conv("b"), last="b").outputs()["enter"]
    assert flat.first == last_first(63, 3)
    made = (*made[:2], ("BatchNormalization", "norm", {}, ["enter"]), ("Reshape", "in", SPLIT[1], ["norm"]))
    axes = graph(*made, conv("a"), conv("b", **FIRST), last="b")
    for flat in (axes.outputs()["enter"], axes.inputs()["norm"]):
        assert (flat.first, flat.is_open, flat.why) == (None, True, "Reshape to the maps of b")


@pytest.mark.parametrize(
    ("merge", "config", "sources", "expected"),
    [
        *(
            (merge, {}, [conv("a"), conv("b")], last_first(63, 4))
            for merge in ("Add", "Subtract", "Multiply", "Average", "Minimum")
        ),
        ("Add", {}, [conv("a"), ("Conv2D", "b", {"kernel_size": 1}, ["in"])], last_first(63, 4)),
        ("Maximum", {}, [conv("a"), ("GlobalMaxPooling2D", "b", {"keepdims": True}, ["a"])], last_first(63, 4)),
        ("Concatenate", {}, [conv("a"), conv("b", filters=2)], last_first(63, 6)),
        ("Concatenate", {"axis": 3}, [conv("a"), conv("b", filters=2)], last_first(63, 6)),
        ("Concatenate", {"axis": 1}, [conv("a"), conv("b")], None),
        ("Concatenate", {"axis": 4}, [conv("a"), conv("b")], None),
        ("Concatenate", {}, [conv("a"), ("Mine", "b", {}, ["a"])], None),
        ("Concatenate", {}, [("Mine", "a", {}, ["in"]), ("Mine", "b", {}, ["in"])], None),
        ("Add", {}, [conv("a"), ("Flatten", "b", {}, ["a"])], None),
        ("Add", {}, [conv("a"), conv("c", filters=1), ("GlobalMaxPooling2D", "b", {}, ["c"])], None),
        ("Add", {}, [conv("a"), ("Permute", "b", {"dims": [2, 1, 3]}, ["a"])], None),
        (
            "Add",
            {},
            [
                conv("c"),
                ("Flatten", "a", {}, ["c"]),
                ("Permute", "p", {"dims": [3, 1, 2]}, ["c"]),
                ("Flatten", "b", {}, ["p"]),
            ],
            None,
        ),
        ("Add", {}, [conv("a"), ("Mine", "b", {}, ["a"])], None),
    ],
    ids=range(18),
)
def test_paths_that_meet(merge: str, config: dict[str, Any], sources: Any, expected: FeatureOrder | None) -> None:
    both = (merge, "both", config, ["a b"])
    axes = graph(IMAGE, *sources, both, ("Flatten", "f", {}, ["both"]), ("Dense", "d", {"units": 2}, ["f"]), last="d")
    flat = axes.inputs()["d"]
    assert flat.first == expected
    assert flat.is_open


def test_features_that_are_added_to_flattened_maps_have_their_order() -> None:
    skip = ("Dense", "skip", {"units": 252}, ["vector"])
    vector = ("InputLayer", "vector", {"batch_shape": [None, 5]}, [])
    for both in ("f skip", "skip f"):
        ends = (("Flatten", "f", {}, ["a"]), skip, ("Add", "add", {}, [both]), ("Dense", "d", {"units": 2}, ["add"]))
        axes = graph(IMAGE, vector, conv("a"), *ends, last="d")
        assert (axes.outputs()["skip"].first, axes.outputs()["skip"].channels) == (last_first(63, 4), 4)
        assert axes.inputs()["d"].first == last_first(63, 4)
    axes = graph(IMAGE, vector, conv("a"), ends[0], ("Dense", "skip", {"units": 1}, ["vector"]), *ends[2:], last="d")
    assert axes.outputs() == {}  # one number is added to all
    free = ("InputLayer", "in", {"batch_shape": [None, None, 9, 3]}, [])
    axes = graph(free, vector, conv("a"), *ends, last="d")
    assert (axes.outputs()["skip"].first, axes.outputs()["skip"].why) == (None, "Add to the Flatten of the maps of a")


def test_paths_that_meet_in_the_order_of_both() -> None:
    """Sequences, which are no maps; and maps that have their channels first in Keras, too."""
    joint, dense = ("Flatten", "f", {}, ["both"]), ("Dense", "d", {"units": 2}, ["f"])
    sources = [("Dense", name, {"units": 4}, ["in"]) for name in "ab"]
    sequence = ("InputLayer", "in", {"batch_shape": [None, 6, 3]}, [])
    assert graph(sequence, *sources, ("Concatenate", "both", {}, ["a b"]), joint, dense, last="d").inputs() == {}
    flats = [("Reshape", f"f{name}", {"target_shape": [-1]}, [name]) for name in "ab"]
    first = ("InputLayer", "in", {"batch_shape": [None, 3, 7, 9]}, [])
    axes = graph(first, conv("a", **FIRST), conv("b", **FIRST), *flats, ("Add", "f", {}, ["fa fb"]), dense, last="d")
    assert axes.outputs() == {}
    assert (axes.inputs()["d"].first, axes.inputs()["d"].is_open) == (KEEP_ORDER, False)
