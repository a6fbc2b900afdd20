"""What each kind of layer becomes, against what Keras computes, in NumPy: outputs, not weights, are compared.

No axis has the size of another, and no layer pools, so that exchanged axes give other outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras_numpy as knp
import numpy as np
import pytest
import torch
from keras_memory import checkpoint_of, layer_of, moved
from torch import Tensor, nn

from torch_adadelta.keras import freeze_second_biases
from torch_adadelta.keras.contents import separated
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.layouts import (
    GATES,
    KEEP_ORDER,
    FeatureOrder,
    Interpretation,
    Layout,
    LayoutMismatch,
    interpretations,
    kinds_of,
    of_maps,
    ordered_placements,
    placed,
    placements,
)

Weights = dict[str, np.ndarray]


class Case(NamedTuple):
    class_name: str
    shapes: dict[str, tuple[int, ...]]
    module: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    keras: Callable[[np.ndarray, Weights], np.ndarray]  # from the inputs
    torch: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)  # both as Keras has them
    config: dict[str, Any] = {}  # noqa: RUF012


def _maps(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.movedim(-1, 1)).movedim(1, -1)


def _conv(rank: int, groups: int = 1) -> Case:
    size = (2, 3, 1)[:rank]
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return Case(
        f"Conv{rank}D",
        {"kernel": (*size, 4 // groups, 6), "bias": (6,)},
        lambda: cls(4, 6, size, groups=groups),
        (*(7, 5, 3)[:rank], 4),
        lambda x, w: knp.conv(x, **w),
        _maps,
    )


def _conv_transpose(rank: int) -> Case:
    size = (2, 3, 1)[:rank]
    cls = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    return Case(
        f"Conv{rank}DTranspose",
        {"kernel": (*size, 6, 4), "bias": (6,)},
        lambda: cls(4, 6, size, stride=2),
        (*(7, 5, 3)[:rank], 4),
        lambda x, w: knp.conv_transpose(x, **w, strides=2),
        _maps,
    )


def _depthwise(rank: int) -> Case:
    size = (2, 3)[:rank]
    cls = (nn.Conv1d, nn.Conv2d)[rank - 1]
    return Case(
        f"DepthwiseConv{rank}D",
        {"kernel": (*size, 4, 3), "bias": (12,)},
        lambda: cls(4, 12, size, groups=4),
        (*(7, 5)[:rank], 4),
        lambda x, w: knp.depthwise(x, **w),
        _maps,
    )


def _separable(rank: int) -> Case:
    size, one = (2, 3)[:rank], (1,) * rank
    cls = (nn.Conv1d, nn.Conv2d)[rank - 1]
    return Case(
        f"SeparableConv{rank}D",
        {"depthwise_kernel": (*size, 4, 3), "pointwise_kernel": (*one, 12, 5), "bias": (5,)},
        lambda: nn.Sequential(cls(4, 12, size, groups=4, bias=False), cls(12, 5, one)),
        (*(7, 5)[:rank], 4),
        lambda x, w: knp.conv(knp.depthwise(x, w["depthwise_kernel"]), w["pointwise_kernel"], w["bias"]),
        _maps,
    )


_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
_CELLS: dict[str, Any] = {"LSTM": knp.lstm, "GRU": knp.gru, "SimpleRNN": knp.simple_rnn}
_MODULES: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "SimpleRNN": nn.RNN}


def _recurrent(kind: str, is_double: bool) -> Case:
    gates, units = _GATES[kind], 3
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (4, gates * units),
        "recurrent_kernel": (units, gates * units),
        "bias": (2, gates * units) if kind == "GRU" else (gates * units,),
    }
    if not is_double:
        return Case(
            kind,
            shapes,
            lambda: freeze_second_biases(_MODULES[kind](4, units, batch_first=True)),
            (7, 4),
            _CELLS[kind],
            lambda module, x: module(x)[0],
        )

    def both(x: np.ndarray, w: Weights) -> np.ndarray:
        sides = [{k.split("/")[1]: v for k, v in w.items() if k.startswith(side)} for side in ("forward", "backward")]
        return np.concatenate([_CELLS[kind](x, sides[0]), _CELLS[kind](x, sides[1], True)], -1)

    return Case(
        "Bidirectional",
        {f"{side}/{role}": shape for side in ("forward", "backward") for role, shape in shapes.items()},
        lambda: freeze_second_biases(_MODULES[kind](4, units, batch_first=True, bidirectional=True)),
        (7, 4),
        both,
        lambda module, x: module(x)[0],
        {"layer": {"class_name": kind, "config": {}}},
    )


def _attention(widths: tuple[int, int, int]) -> Case:
    """Of inputs of (time, 6); query, key and value take the first features, as many as their widths are."""
    query, key, value = widths
    shapes: dict[str, tuple[int, ...]] = {"output/kernel": (2, 3, 6), "output/bias": (6,)}
    for part, width in zip(("query", "key", "value"), widths, strict=True):
        shapes |= {f"{part}/kernel": (width, 2, 3), f"{part}/bias": (2, 3)}
    return Case(
        "MultiHeadAttention",
        shapes,
        lambda: nn.MultiheadAttention(6, 2, batch_first=True, kdim=key, vdim=value),
        (7, 6),
        lambda x, w: knp.attention(x[..., :query], x[:, ::-1, :value], x[..., :key], w),
        lambda module, x: module(x[..., :query], x[..., :key], x.flip(1)[..., :value], need_weights=False)[0],
    )


_NORM = {"gamma": (4,), "beta": (4,), "moving_mean": (4,), "moving_variance": (4,)}

CASES = {
    "Dense": Case(
        "Dense",
        {"kernel": (4, 6), "bias": (6,)},
        lambda: nn.Linear(4, 6),
        (7, 4),
        lambda x, w: x @ w["kernel"] + w["bias"],
    ),
    **{f"Conv{rank}D": _conv(rank) for rank in (1, 2, 3)},
    **{f"Conv{rank}D in groups": _conv(rank, 2) for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": _conv_transpose(rank) for rank in (1, 2, 3)},
    **{f"DepthwiseConv{rank}D": _depthwise(rank) for rank in (1, 2)},
    **{f"SeparableConv{rank}D": _separable(rank) for rank in (1, 2)},
    "Embedding": Case(
        "Embedding",
        {"embeddings": (6, 4)},
        lambda: nn.Embedding(6, 4),
        (7,),
        lambda x, w: w["embeddings"][_tokens(x)],
        lambda module, x: module(torch.from_numpy(_tokens(x.numpy()))),
    ),
    "BatchNormalization": Case(
        "BatchNormalization", _NORM, lambda: nn.BatchNorm2d(4, eps=1e-3), (7, 5, 4), knp.batch_norm, _maps
    ),
    "LayerNormalization": Case(
        "LayerNormalization",
        {"gamma": (4,), "beta": (4,)},
        lambda: nn.LayerNorm(4),
        (7, 4),
        lambda x, w: knp.layer_norm(x, **w),
    ),
    "LayerNormalization of two axes": Case(
        "LayerNormalization",
        {"gamma": (7, 4), "beta": (7, 4)},
        lambda: nn.LayerNorm((7, 4)),
        (7, 4),
        lambda x, w: knp.layer_norm(x, **w),
        config={"axis": [1, 2]},
    ),
    "GroupNormalization": Case(
        "GroupNormalization",
        {"gamma": (4,), "beta": (4,)},
        lambda: nn.GroupNorm(2, 4),
        (7, 5, 4),
        lambda x, w: knp.group_norm(x, **w, groups=2),
        _maps,
    ),
    "RMSNormalization": Case(
        "RMSNormalization",
        {"scale": (4,)},
        lambda: nn.RMSNorm(4, eps=1e-6),
        (7, 4),
        lambda x, w: w["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    ),
    **{kind: _recurrent(kind, False) for kind in _GATES},
    **{f"Bidirectional {kind}": _recurrent(kind, True) for kind in _GATES},
    "MultiHeadAttention": _attention((6, 6, 6)),
    "MultiHeadAttention of other widths": _attention((6, 5, 4)),
}


def _tokens(x: np.ndarray) -> np.ndarray:
    return np.abs(x * 10).astype("int64") % 6


@pytest.mark.parametrize("has_class", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_becomes_a_module_that_computes_the_same(name: str, has_class: bool) -> None:
    case = CASES[name]
    rng = np.random.default_rng(0)
    weights = {
        role: rng.uniform(0.3, 1.5, s) * (1 if "var" in role else rng.choice([-1, 1], s))
        for role, s in case.shapes.items()
    }
    layer = layer_of("layer", case.class_name if has_class else None, case.config, weights)
    module = case.module().double().eval()
    moved(checkpoint_of(None, separated([layer])), module)
    x = rng.standard_normal((2, *case.inputs))
    with torch.no_grad():
        actual = case.torch(module, torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(actual, case.keras(x, weights), rtol=1e-10, atol=1e-12)


def test_layers_of_a_recurrent_stack() -> None:
    rng = np.random.default_rng(0)
    stack = [{role: rng.standard_normal(shape) for role, shape in _recurrent("GRU", False).shapes.items()}]
    stack += [
        {
            "kernel": rng.standard_normal((3, 9)),
            "recurrent_kernel": rng.standard_normal((3, 9)),
            "bias": rng.standard_normal((2, 9)),
        }
        for _ in range(2)
    ]
    layers = [layer_of(f"gru_{number}", "GRU", {}, weights) for number, weights in enumerate(stack)]
    module = nn.GRU(4, 3, num_layers=3, batch_first=True).double()
    moved(checkpoint_of(None, layers), module, how="order")
    x = expected = rng.standard_normal((2, 7, 4))
    for weights in stack:
        expected = knp.gru(expected, weights)
    with torch.no_grad():
        actual = module(torch.from_numpy(x))[0].numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 4, 3), (3, 3, 3)])
def test_a_normalisation_over_all_axes_of_maps(size: tuple[int, int, int]) -> None:
    """Its weights have the axes of the maps; where all are of one size, the shapes do not tell which comes first."""
    height, width, channels = size
    rng = np.random.default_rng(0)
    conv = {"kernel": rng.standard_normal((2, 1, 2, channels)), "bias": rng.standard_normal(channels)}
    norm = {"gamma": rng.standard_normal(size), "beta": rng.standard_normal(size)}
    entries = [
        ("InputLayer", {"batch_shape": [None, height + 1, width, 2]}),
        ("Conv2D", {"name": "conv", "filters": channels, "kernel_size": [2, 1]}),
        ("LayerNormalization", {"name": "norm", "axis": [1, 2, 3]}),
    ]
    config = {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": name, "config": options} for name, options in entries]},
    }
    layers = [layer_of("conv", "Conv2D", {}, conv), layer_of("norm", "LayerNormalization", {}, norm)]
    model = nn.ModuleDict({"conv": nn.Conv2d(2, channels, (2, 1)), "norm": nn.LayerNorm(size)}).double()
    with pytest.raises(
        KerasFileError, match="norm → norm: its features are a normalisation over several axes of the maps"
    ):
        moved(checkpoint_of(config, layers), model)
    moved(checkpoint_of(config, layers), model, flatten="channels_last")
    x = rng.standard_normal((2, height + 1, width, 2))
    with torch.no_grad():
        actual = model["norm"](_maps(model["conv"], torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(actual, knp.layer_norm(knp.conv(x, **conv), **norm), rtol=1e-10, atol=1e-12)


# ---- Layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "as it is": (Layout((0, 1)), (2, 3), lambda x: x),
    "permute (1, 2, 0)": (Layout((1, 2, 0)), (2, 3, 4), lambda x: x.transpose(1, 2, 0)),
    "view (2, 3, 4), permute (2, 0, 1), view (8, 3)": (
        Layout((2, 0, 1), (8, 3), (2, 3, 4)), (6, 4), lambda x: x.reshape(2, 3, 4).transpose(2, 0, 1).reshape(8, 3)
    ),
    "view (4, 3, 2), blocks (1, 2, 0), permute (1, 2, 0), view (6, 4)": (
        Layout((1, 2, 0), (6, 4), (4, 3, 2), (1, 2, 0)),
        (4, 6),
        lambda x: x.reshape(4, 3, 2)[:, [1, 2, 0]].transpose(1, 2, 0).reshape(6, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", LAYOUTS)
def test_a_layout_goes_both_ways_and_says_how(text: str) -> None:
    layout, shape, expected = LAYOUTS[text]
    array = np.arange(np.prod(shape)).reshape(shape)
    turned = layout.to_torch(array)
    np.testing.assert_array_equal(turned, expected(array), strict=True)
    assert (layout.result(shape), str(layout)) == (turned.shape, text)
    np.testing.assert_array_equal(layout.to_keras(turned, shape), array, strict=True)


@pytest.mark.parametrize(
    "layout", [Layout((0,)), Layout((0, 0)), Layout((0, 2)), Layout((1, 0), (5,)), Layout((1, 0), view=(2, 4))]
)
def test_a_layout_for_another_shape_is_refused(layout: Layout) -> None:
    with pytest.raises(ValueError, match=r"an array of shape \(2, 3\) cannot be turned by"):
        layout.result((2, 3))


@pytest.mark.parametrize(
    ("kinds", "modules"),
    [
        ("dense", [nn.Linear(1, 1)]),
        ("embedding", [nn.Embedding(1, 1), nn.EmbeddingBag(1, 1)]),
        ("batch_norm", [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)]),
        ("layer_norm", [nn.LayerNorm(1)]),
        ("group_norm", [nn.GroupNorm(1, 1)]),
        ("rms_norm", [nn.RMSNorm(1)]),
        ("lstm", [nn.LSTM(1, 1), nn.LSTMCell(1, 1)]),
        ("gru", [nn.GRU(1, 1), nn.GRUCell(1, 1)]),
        ("rnn", [nn.RNN(1, 1), nn.RNNCell(1, 1)]),
        ("attention", [nn.MultiheadAttention(1, 1)]),
        ("conv depthwise", [nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1)]),
        ("conv_transpose", [nn.ConvTranspose1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.ConvTranspose3d(1, 1, 1)]),
        ("", [nn.ReLU(), nn.Bilinear(1, 1, 1)]),
    ],
)
def test_the_kinds_of_layers_that_a_module_may_be(kinds: str, modules: list[nn.Module]) -> None:
    for module in modules:
        assert kinds_of(module) == kinds.split()


# ---- What is no layer of a kind, and does not fit a module -----------------------------------------------------------


def form_of(
    class_name: str | None, config: dict[str, Any] | None = None, **shapes: tuple[int, ...]
) -> list[Interpretation]:
    named = {role.replace("__", "/"): np.ones(shape) for role, shape in shapes.items()}
    return interpretations(layer_of("layer", class_name, config or {}, named))


@pytest.mark.parametrize(
    ("class_name", "shapes"),
    [
        ("Dense", {"kernel": (2, 3, 4)}),
        ("Dense", {"kernel": (2, 3), "bias": (2,)}),
        ("Dense", {"kernel": (2, 3), "scale": (3,)}),
        *((f"{name}Conv2D{more}", {"kernel": (1,) * ones + (2, 3)}) for name, more in (("", ""), ("", "Transpose"), ("Depthwise", "")) for ones in (0, 4)),
        ("Conv2D", {"kernel": (3, 3, 2, 4), "bias": (2,)}),
        ("Conv2DTranspose", {"kernel": (3, 3, 2, 4), "bias": (4,)}),
        ("DepthwiseConv2D", {"kernel": (3, 3, 2, 4), "bias": (4,)}),
        ("Embedding", {"embeddings": (2, 3, 4)}),
        ("BatchNormalization", {"gamma": (3,), "beta": (3,)}),
        ("BatchNormalization", {"moving_mean": (3,), "moving_variance": (4,)}),
        ("GroupNormalization", {"gamma": (3, 4), "beta": (3, 4)}),
        ("LayerNormalization", {"gamma": (3,), "beta": (4,)}),
        ("LSTM", {"kernel": (2, 12), "recurrent_kernel": (4, 12)}),
        ("LSTM", {"kernel": (2, 12), "recurrent_kernel": (3, 12), "bias": (2, 12)}),
        ("LSTM", {"kernel": (2, 12), "recurrent_kernel": (3, 12, 1)}),
        ("GRU", {"kernel": (2, 12), "recurrent_kernel": (3, 12)}),
        ("SimpleRNN", {"kernel": (2, 3, 1), "recurrent_kernel": (3, 3)}),
        ("MultiHeadAttention", {"query__kernel": (6, 2, 3), "key__kernel": (6, 2, 4), "value__kernel": (6, 2, 3), "output__kernel": (2, 3, 6)}),
        ("MultiHeadAttention", {"query__kernel": (6, 2, 3), "key__kernel": (6, 2, 3), "value__kernel": (6, 2, 3), "output__kernel": (2, 4, 6)}),
        ("MultiHeadAttention", {"query__kernel": (6, 2, 3), "key__kernel": (6, 2, 3), "value__kernel": (6, 2, 3), "output__kernel": (2, 3)}),
        ("MultiHeadAttention", {"query__kernel": (6, 2, 3), "key__kernel": (6, 2, 3), "value__kernel": (6, 3, 2), "output__kernel": (3, 2, 6)}),
        ("Mine", {"kernel": (2, 3)}),
        (None, {"0": (2, 3), "odd": (3,)}),
    ],
    ids=range(28),
)  # fmt: skip
def test_weights_of_other_shapes_are_no_such_layer(class_name: str | None, shapes: dict[str, tuple[int, ...]]) -> None:
    assert form_of(class_name, **shapes) == []
    if class_name in ("LSTM", "GRU"):
        two = {f"{side}__{role}": shape for side in ("forward", "backward") for role, shape in shapes.items()}
        assert form_of("Bidirectional", {"layer": {"class_name": class_name}}, **two) == []


def test_a_normalisation_over_several_devices_is_one() -> None:
    (interpretation,) = form_of("SyncBatchNormalization", moving_mean=(3,), moving_variance=(3,))
    assert interpretation.kind == "batch_norm"


def test_both_directions_of_a_layer_that_nobody_knows() -> None:
    shapes = {"kernel": (2, 12), "recurrent_kernel": (3, 12)}
    both = {f"{side}__{role}": shape for side in ("forward", "backward") for role, shape in shapes.items()}
    (interpretation,) = form_of("Bidirectional", {"layer": {"class_name": "Mine"}}, **both)
    assert interpretation.kind == "lstm"


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_gru_without_biases_tells_by_its_configuration_where_it_resets(is_wrapped: bool) -> None:
    sides = ("forward__", "backward__") if is_wrapped else ("",)
    shapes = {f"{side}{role}": (3, 9) for side in sides for role in ("kernel", "recurrent_kernel")}
    module = nn.GRU(3, 3, bias=False, bidirectional=is_wrapped)
    tensors = {name.replace("_l0", ""): tensor for name, tensor in module.named_parameters()}
    for is_after in (True, False):
        config: dict[str, Any] = {"reset_after": is_after}
        if is_wrapped:
            config = {"layer": {"class_name": "GRU", "config": config}}
        (interpretation,) = form_of("Bidirectional" if is_wrapped else "GRU", config, **shapes)
        if is_after:
            assert len(placed(interpretation, module, tensors)) == len(shapes)
        else:
            with pytest.raises(LayoutMismatch, match="a GRU with reset_after=False applies its reset gate before"):
                placed(interpretation, module, tensors)


def test_names_of_the_kernel_of_a_depthwise_convolution() -> None:
    for class_name in ("DepthwiseConv2D", None):
        (interpretation,) = form_of(class_name, depthwise_kernel=(3, 3, 2, 4))
        assert (interpretation.kind, interpretation.roles) == ("depthwise", {"kernel": "depthwise_kernel"})


RNN = {"kernel": (2, 9), "recurrent_kernel": (3, 9), "bias": (9,)}
ATTENTION = {f"{part}__kernel": (6, 2, 3) for part in ("query", "key", "value")} | {"output__kernel": (2, 3, 6)}
WIDE = ATTENTION | {"value__kernel": (6, 2, 4), "output__kernel": (2, 4, 6)}


@pytest.mark.parametrize(
    ("class_name", "shapes", "module", "message"),
    [
        ("GRU", RNN, nn.GRU(2, 3), "a GRU with reset_after=False applies its reset gate before"),
        ("MultiHeadAttention", WIDE, nn.MultiheadAttention(6, 2), "its value_dim is not its key_dim"),
        ("MultiHeadAttention", ATTENTION, nn.MultiheadAttention(6, 3), "it has 2 heads, and the module 3"),
        ("MultiHeadAttention", ATTENTION, nn.MultiheadAttention(6, 2, add_bias_kv=True), "add_bias_kv has no counterpart"),
        ("MultiHeadAttention", ATTENTION, nn.MultiheadAttention(12, 2, kdim=6, vdim=6), "query/kernel would be"),
        ("Conv2DTranspose", {"kernel": (3, 3, 2, 4)}, nn.ConvTranspose2d(4, 4, 3, groups=2), "transposed convolution of Keras"),
        ("DepthwiseConv1D", {"kernel": (3, 4, 3)}, nn.Conv1d(2, 12, 3, groups=2), "it has 4 channels, and the module 2 groups"),
        ("Dense", {"kernel": (2, 3), "bias": (3,)}, nn.Linear(2, 3, bias=False), "the module has no bias for bias"),
        ("Dense", {"kernel": (2, 3)}, nn.Linear(3, 3), r"kernel would be \(3, 2\), and weight is \(3, 3\)"),
        ("Dense", {"kernel": (2, 3)}, nn.Embedding(3, 2), "it is a dense, and the module a Embedding"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_does_not_fit_says_why(class_name: str, shapes: Any, module: nn.Module, message: str) -> None:
    (interpretation,) = form_of(class_name, **shapes)
    tensors = {name.replace("_l0", ""): tensor for name, tensor in module.named_parameters()}
    with pytest.raises(LayoutMismatch, match=message):
        placed(interpretation, module, tensors)


def test_rows_of_a_parameter_are_all_given() -> None:
    (interpretation,) = form_of("MultiHeadAttention", **ATTENTION)
    module = nn.MultiheadAttention(6, 2, bias=False)
    tensors = {**dict(module.named_parameters()), "in_proj_weight": torch.zeros(24, 6)}
    with pytest.raises(LayoutMismatch, match="in_proj_weight has 24 rows, and 18 are given"):
        placed(interpretation, module, tensors)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "rms_norm"])
def test_features_in_another_order(norm: str) -> None:
    """Of six inputs and eight outputs, both maps whose channels come last in Keras, and first in PyTorch."""
    inputs, outputs = of_maps(3), FeatureOrder((2, -1), (1, 0))
    (interpretation,) = form_of("Dense", kernel=(6, 8), bias=(8,))
    kernel, bias = np.arange(48).reshape(6, 8), np.arange(8)
    found = {
        placement.param: placement.layout for placement in ordered_placements(interpretation, False, inputs, outputs)
    }
    expected = kernel.reshape(2, 3, 2, 4).transpose(3, 2, 1, 0).reshape(8, 6)
    np.testing.assert_array_equal(found["weight"].to_torch(kernel), expected)
    np.testing.assert_array_equal(found["bias"].to_torch(bias), bias.reshape(2, 4).T.ravel())
    roles = {"batch_norm": ["gamma", "moving_mean", "moving_variance"], "layer_norm": ["beta"], "rms_norm": ["scale"]}[
        norm
    ]
    for order in (inputs, FeatureOrder((2, 3), (1, 0))):
        for placement in ordered_placements(
            Interpretation(norm, dict.fromkeys(roles, (6,)), {}), False, order, outputs
        ):
            np.testing.assert_array_equal(placement.layout.to_torch(np.arange(6)), np.arange(6).reshape(2, 3).T.ravel())
    assert [
        p.layout
        for p in ordered_placements(Interpretation("layer_norm", {"gamma": (2, 3)}, {}), False, inputs, outputs)
    ] == [Layout((0, 1))]


def test_features_that_cannot_be_in_another_order() -> None:
    (lstm,) = form_of("LSTM", kernel=(6, 8), recurrent_kernel=(2, 8))
    with pytest.raises(
        LayoutMismatch, match="the features that it gives are flattened maps, and a layer of the kind lstm"
    ):
        ordered_placements(lstm, False, KEEP_ORDER, of_maps(3))
    (embedding,) = form_of("Embedding", embeddings=(6, 8))
    with pytest.raises(
        LayoutMismatch, match="the features that it takes are flattened maps, and a layer of the kind embedding"
    ):
        ordered_placements(embedding, False, of_maps(3), KEEP_ORDER)
    assert len(ordered_placements(lstm, False, KEEP_ORDER, KEEP_ORDER)) == 2
    (dense,) = form_of("Dense", kernel=(6, 8))
    (whole,) = form_of("Dense", kernel=(6, 8), bias=(8,))
    found = [placement.layout for placement in ordered_placements(whole, False, KEEP_ORDER, KEEP_ORDER)]
    assert found == [Layout((1, 0)), Layout((0,))]
    for order, message in (
        (of_maps(4), "6 features are no maps of 4 channels"),
        (of_maps(0), "6 features are no maps of 0 channels"),
        (FeatureOrder((2, 2), (1, 0)), r"6 features are no maps of shape \(2, 2\)"),
        (FeatureOrder((3, 1), (1, 0)), r"6 features are no maps of shape \(3, 1\)"),
        (FeatureOrder((4, 3), (1, 0)), r"6 features are no maps of shape \(4, 3\)"),
    ):
        with pytest.raises(LayoutMismatch, match=message):
            ordered_placements(dense, False, order, KEEP_ORDER)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_rows_of_recurrent_layers_and_attention_in_another_order(kind: str) -> None:
    width = 2 * GATES[kind]
    (found,) = form_of(kind.upper(), kernel=(6, width), recurrent_kernel=(2, width))
    kernel = np.arange(6 * width).reshape(6, width)
    plain = placements(found)[0].layout.to_torch(kernel)
    ordered = ordered_placements(found, False, of_maps(3), KEEP_ORDER)
    np.testing.assert_array_equal(
        ordered[0].layout.to_torch(kernel), plain.reshape(-1, 2, 3).swapaxes(1, 2).reshape(-1, 6)
    )
    np.testing.assert_array_equal(ordered[0].layout.to_keras(ordered[0].layout.to_torch(kernel), kernel.shape), kernel)
    assert ordered[1:] == placements(found)[1:]
    shapes = {f"{part}/kernel": (6, 2, 2) for part in ("query", "key", "value")} | {"output/kernel": (2, 2, 6)}
    (found,) = form_of("MultiHeadAttention", **shapes)
    kernel = np.arange(24).reshape(6, 2, 2)
    for one, other in zip(
        ordered_placements(found, False, of_maps(3), KEEP_ORDER)[:3], placements(found), strict=False
    ):
        expected = other.layout.to_torch(kernel).reshape(-1, 2, 3).swapaxes(1, 2).reshape(-1, 6)
        np.testing.assert_array_equal(one.layout.to_torch(kernel), expected)


@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_layers_of_cudnn(kind: str, gates: int, is_double: bool) -> None:
    """Against the formula of the cell: each gate has a matrix of (units, inputs) in memory, and both biases."""
    rng = np.random.default_rng(0)
    units, inputs = 3, 4
    weights: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}  # of the layer with the layout of Keras that computes the same
    for side in ("forward/", "backward/") if is_double else ("",):
        kernels = rng.standard_normal((2, gates, units, inputs))[0]
        recurrent = rng.standard_normal((gates, units, units))
        bias = rng.standard_normal((2, gates * units))
        weights[f"{side}kernel"] = np.concatenate([own.reshape(inputs, units) for own in kernels], 1)
        weights[f"{side}recurrent_kernel"] = np.concatenate(list(recurrent), 1)
        weights[f"{side}bias"] = bias.ravel()
        plain[f"{side}kernel"] = np.concatenate([own.T for own in kernels], 1)
        plain[f"{side}recurrent_kernel"] = np.concatenate([own.T for own in recurrent], 1)
        plain[f"{side}bias"] = bias if kind == "GRU" else bias.sum(0)
    config = {"layer": {"class_name": f"CuDNN{kind}", "config": {}}} if is_double else {}
    layer = layer_of("r", "Bidirectional" if is_double else f"CuDNN{kind}", config, weights)
    module = _MODULES[kind](inputs, units, batch_first=True, bidirectional=is_double).double()
    moved(checkpoint_of(None, [layer]), module)
    x = rng.standard_normal((2, 7, inputs))
    expected = _recurrent(kind, is_double).keras(x, plain)
    np.testing.assert_allclose(module(torch.from_numpy(x))[0].detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    (found,) = interpretations(layer)
    with pytest.raises(LayoutMismatch, match="the kernels of CuDNNLSTM and CuDNNGRU cannot be ordered anew"):
        ordered_placements(found, False, of_maps(2), KEEP_ORDER)


def test_a_layout_is_printed_as_code() -> None:
    for layout in (Layout((1, 0)), Layout(view=(4, 3, 2), permutation=(2, 1, 0), shape=(2, 12), blocks=(1, 0, 2))):
        assert eval(repr(layout), {"Layout": Layout}) == layout
    assert repr(Layout((1, 0), shape=(2, 3))) == "Layout(permutation=(1, 0), shape=(2, 3))"
