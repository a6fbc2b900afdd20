"""How the weights of a layer of Keras lie in the parameters of a module of PyTorch.

For each kind of layer, `placements` says which parameter each weight goes to, and how it is turned. All of it only
moves elements about, so it can be undone, and the state of a weight is moved as the weight is.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import numpy as np
from torch import Tensor, nn

from torch_adadelta.keras.config import inner_layer
from torch_adadelta.keras.errors import Array
from torch_adadelta.keras.layers import Layer

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How a Keras array becomes a PyTorch array: it is viewed in a shape, permuted, and viewed in the final shape.

    Args:
        permutation (tuple of int): the permutation of the axes of the view.
        shape (tuple of int, optional): the shape of the result. None is that of the permuted array. (default: None)
        view (tuple of int, optional): the shape before the permutation. None is the shape in the file. (default: None)
        blocks (tuple of int, optional): the new order of the second-to-last axis of the view, such as the order of the
            gates of a GRU. None keeps it. (default: None)

    Example: a Dense kernel of shape (6 * 6 * 8, 10) after a Flatten of (height, width, channels) becomes a Linear
    weight after a flatten of (channels, height, width) by
    ``Layout(view=(36, 8, 10), permutation=(2, 1, 0), shape=(10, 288))``.
    """

    permutation: Shape
    shape: Shape | None = None  # of the result; None for that of the permuted array
    view: Shape | None = None  # before the permutation; None for the shape in the file
    blocks: Shape | None = None  # the order of the last axis but one of the view, such as that of the gates of a GRU

    def to_torch(self, array: Array) -> Array:
        """The array in the PyTorch layout."""
        if self.view is not None:
            array = array.reshape(self.view)
        if self.blocks is not None:
            array = array.take(self.blocks, axis=-2)
        array = array.transpose(self.permutation)
        return array if self.shape is None else array.reshape(self.shape)

    def to_keras(self, array: Array, shape: Shape) -> Array:
        """The array in the Keras layout, with the given shape."""
        view = shape if self.view is None else self.view
        array = array.reshape([view[axis] for axis in self.permutation]).transpose(np.argsort(self.permutation))
        if self.blocks is not None:
            array = array.take(np.argsort(self.blocks), axis=-2)
        return array.reshape(shape)

    def result(self, shape: Shape) -> Shape:
        """The shape that an array of the given shape has in the PyTorch layout.

        Raises:
            ValueError: the layout does not fit the shape.
        """
        view = shape if self.view is None else self.view
        if math.prod(view) != math.prod(shape) or sorted(self.permutation) != list(range(len(view))):
            raise ValueError(f"an array of shape {shape} cannot be turned by {self}")
        found = tuple(view[axis] for axis in self.permutation)
        if self.shape is None:
            return found
        if math.prod(self.shape) != math.prod(found):
            raise ValueError(f"an array of shape {shape} cannot be turned by {self}")
        return self.shape

    def __repr__(self) -> str:
        given = {"view": self.view, "blocks": self.blocks, "permutation": self.permutation, "shape": self.shape}
        return f"Layout({', '.join(f'{name}={value}' for name, value in given.items() if value is not None)})"

    def __str__(self) -> str:
        parts = [] if self.view is None else [f"view {self.view}"]
        if self.blocks is not None:
            parts.append(f"blocks {self.blocks}")
        if self.permutation != tuple(range(len(self.permutation))):
            parts.append(f"permute {self.permutation}")
        if self.shape is not None:
            parts.append(f"view {self.shape}")
        return ", ".join(parts) or "as it is"


class FeatureOrder(NamedTuple):
    """How features that are several axes in a row are ordered anew: viewed as these axes, which are permuted."""

    view: Shape  # the sizes of the axes; -1 for one that follows from the others
    permutation: Shape


KEEP_ORDER: Final = FeatureOrder((-1,), (0,))


def of_maps(channels: int) -> FeatureOrder:
    """The order of maps that Keras has with so many channels last, and PyTorch with the channels first."""
    return FeatureOrder((-1, channels), (1, 0))


class WeightPlacement(NamedTuple):
    """Where a weight of a layer, or a row of it, goes."""

    role: str  # the weight
    param: str  # the parameter or buffer of the module
    layout: Layout
    row: int | None = None  # of the two that the weight consists of, if they go to different parameters
    first: int | None = None  # the first row of the parameter, if it has others too


def row_of(array: Array, row: int | None) -> Array:
    """One of the two rows, one behind the other, that a weight consists of, as a view; all of it for None."""
    return array if row is None else array.reshape(2, -1)[row]


def shape_of(shape: Shape, row: int | None) -> Shape:
    """The shape of `row_of` a weight of this shape."""
    return shape if row is None else (math.prod(shape) // 2,)


def same(shape: Shape) -> Layout:
    """The layout of what stays as it is."""
    return Layout(tuple(range(len(shape))))


# ---- Kinds of layers ------------------------------------------------------------------------------------------------

KINDS: Final = {
    "Dense": "dense",
    "Embedding": "embedding",
    "BatchNormalization": "batch_norm",
    "SyncBatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "RMSNormalization": "rms_norm",
    "LSTM": "lstm",
    "GRU": "gru",
    "CuDNNLSTM": "lstm",
    "CuDNNGRU": "gru",
    "SimpleRNN": "rnn",
    "MultiHeadAttention": "attention",
    **{f"Conv{n}D": "conv" for n in (1, 2, 3)},
    **{f"Conv{n}DTranspose": "conv_transpose" for n in (1, 2, 3)},
    **{f"DepthwiseConv{n}D": "depthwise" for n in (1, 2, 3)},
}

GATES: Final = {"lstm": 4, "gru": 3, "rnn": 1}
_PARTS: Final = ("query", "key", "value", "output")


class Interpretation(NamedTuple):
    """A layer understood as one of a kind, with its shapes by role."""

    kind: str
    shapes: dict[str, Shape]
    roles: dict[str, str]  # from the role as understood to the role in the file
    is_reset_first: bool = False  # of a GRU, whether its configuration has reset_after=False


def interpretations(layer: Layer) -> list[Interpretation]:
    """All ways to understand a layer: one if its class is known, perhaps several by the shapes of its weights."""
    names = [variable.role for variable in layer.variables]
    shapes = {variable.role: variable.value.shape for variable in layer.variables}
    kind = KINDS.get(layer.class_name or "")
    if layer.class_name == "Bidirectional":
        kind = next((KINDS[c] for c in (inner_layer(layer.config)[0],) if c in KINDS), None)
        kinds = [kind] if kind in GATES else list(GATES)
    elif kind is not None:
        kinds = [kind]
    elif layer.class_name is None:
        kinds = list(dict.fromkeys(KINDS.values()))
    else:
        return []
    found = []
    for candidate in kinds:
        for roles in _vocabularies(candidate, names):
            understood = {role: shapes[name] for role, name in roles.items()}
            if _is_of_kind(candidate, understood):
                found.append(Interpretation(candidate, understood, roles, is_reset_first(layer)))
    return found


def is_reset_first(layer: Layer) -> bool:
    """Whether the configuration of a layer says ``reset_after=False``, its own or that of the layer in it."""
    return inner_layer(layer.config)[1].get("reset_after") is False


_VOCABULARY: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "dense": (("kernel", "bias"), ("kernel",)),
    "conv": (("kernel", "bias"), ("kernel",)),
    "conv_transpose": (("kernel", "bias"), ("kernel",)),
    "depthwise": (("kernel", "bias"), ("kernel",)),
    "embedding": (("embeddings",),),
    "batch_norm": (
        ("gamma", "beta", "moving_mean", "moving_variance"),
        ("gamma", "moving_mean", "moving_variance"),
        ("beta", "moving_mean", "moving_variance"),
        ("moving_mean", "moving_variance"),
    ),
    "layer_norm": (("gamma", "beta"), ("gamma",), ("beta",)),
    "group_norm": (("gamma", "beta"), ("gamma",), ("beta",)),
    "rms_norm": (("gamma",), ("scale",)),
    "attention": (
        tuple(f"{part}/{name}" for part in _PARTS for name in ("kernel", "bias")),
        tuple(f"{part}/kernel" for part in _PARTS),
    ),
    **{
        kind: (
            ("kernel", "recurrent_kernel", "bias"),
            ("kernel", "recurrent_kernel"),
            *(
                tuple(f"{side}/{name}" for side in ("forward", "backward") for name in roles)
                for roles in (("kernel", "recurrent_kernel", "bias"), ("kernel", "recurrent_kernel"))
            ),
        )
        for kind in GATES
    },
}


def _vocabularies(kind: str, names: list[str]) -> Iterable[dict[str, str]]:
    """From the roles of a kind to those of a layer, for each set of roles that its weights may have."""
    given = [name.replace("depthwise_kernel", "kernel") if kind == "depthwise" else name for name in names]
    for roles in _VOCABULARY[kind]:
        if set(roles) == set(given) and len(given) == len(roles):
            by_role = dict(zip(given, names, strict=True))
            yield {role: by_role[role] for role in roles}
        elif _are_numbered(names, roles):
            yield dict(zip(roles, names, strict=True))


def _are_numbered(names: list[str], roles: tuple[str, ...]) -> bool:
    """Whether a layer of unknown class has numbered weights in as many places, which then come in their order."""
    parts = [role.rpartition("/")[0] for role in roles]
    return all(n.rpartition("/")[2].isdecimal() for n in names) and parts == [n.rpartition("/")[0] for n in names]


def _is_of_kind(kind: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether the ranks and sizes of the weights agree with the kind."""
    rank = len(shapes.get("kernel", ()))
    bias = shapes.get("bias")
    if kind == "dense":
        return rank == 2 and bias in (None, shapes["kernel"][1:])
    if kind == "conv":
        return 3 <= rank <= 5 and bias in (None, shapes["kernel"][-1:])
    if kind == "conv_transpose":
        return 3 <= rank <= 5 and bias in (None, shapes["kernel"][-2:-1])
    if kind == "depthwise":
        return 3 <= rank <= 5 and bias in (None, (math.prod(shapes["kernel"][-2:]),))
    if kind == "embedding":
        return len(shapes["embeddings"]) == 2
    if kind.endswith("_norm"):
        found = list(shapes.values())
        return all(shape == found[0] for shape in found) and (kind in ("layer_norm", "rms_norm") or len(found[0]) == 1)
    if kind in GATES:
        sides = {role.rpartition("/")[0] for role in shapes}
        return all(
            _is_rnn(kind, {r.rpartition("/")[2]: s for r, s in shapes.items() if r.rpartition("/")[0] == side})
            for side in sides
        )
    return _is_attention(shapes)


def _is_rnn(kind: str, shapes: Mapping[str, Shape]) -> bool:
    kernel, recurrent = shapes["kernel"], shapes["recurrent_kernel"]
    if len(kernel) != 2 or len(recurrent) != 2:
        return False
    width = GATES[kind] * recurrent[0]
    own: dict[str, list[Shape]] = {"lstm": [_cudnn_bias(shapes)], "gru": [_cudnn_bias(shapes), (2, width)]}
    biases: list[Shape | None] = [None, (width,), *own.get(kind, [])]
    return kernel[1] == recurrent[1] == width and shapes.get("bias") in biases


def _cudnn_bias(shapes: Mapping[str, Shape], side: str = "") -> Shape:
    """The shape of the bias that CuDNNLSTM and CuDNNGRU have, and no other layer: both biases in a row."""
    return (2 * shapes[f"{side}recurrent_kernel"][1],)


def _has_one_bias(shapes: Mapping[str, Shape]) -> bool:
    """Whether a recurrent layer has a bias for its gates, and not two in one weight."""
    return any(
        len(shape) == 1 and shape != _cudnn_bias(shapes, role.removesuffix("bias"))
        for role, shape in shapes.items()
        if role.endswith("bias")
    )


def _is_attention(shapes: Mapping[str, Shape]) -> bool:
    query, key, value, output = (shapes[f"{part}/kernel"] for part in _PARTS)
    if not len(query) == len(key) == len(value) == len(output) == 3:
        return False
    return query[1:] == key[1:] and value[1:] == output[:2] and value[1] == query[1]


# ---- Where the weights go -------------------------------------------------------------------------------------------


class LayoutMismatch(ValueError):
    """A layer cannot become a module of PyTorch; the message says why."""


def placements(
    interpretation: Interpretation,
    is_split: bool = False,
    inputs: FeatureOrder = KEEP_ORDER,
    outputs: FeatureOrder = KEEP_ORDER,
) -> list[WeightPlacement]:
    """Where each weight goes in the module of PyTorch that computes the same.

    Args:
        interpretation: the layer.
        is_split: whether an attention module keeps query, key and value apart, as it does where their widths differ.
        inputs: how the features that come in are ordered anew.
        outputs: the same of the features that go out.

    Raises:
        LayoutMismatch: no module of PyTorch computes the same.
    """
    kind, shapes = interpretation.kind, interpretation.shapes
    if kind == "dense":
        kernel = _dense_kernel(shapes["kernel"], inputs, outputs)
        return [WeightPlacement("kernel", "weight", kernel), *_vector(shapes, "bias", "bias", outputs)]
    if kind in ("conv", "conv_transpose"):
        rank = len(shapes["kernel"])
        permutation = (rank - 1, rank - 2, *range(rank - 2))
        return [WeightPlacement("kernel", "weight", Layout(permutation)), *_vector(shapes, "bias", "bias")]
    if kind == "depthwise":
        *size, channels, multiplier = shapes["kernel"]
        rank = len(shapes["kernel"])
        layout = Layout((rank - 2, rank - 1, *range(rank - 2)), shape=(channels * multiplier, 1, *size))
        return [WeightPlacement("kernel", "weight", layout), *_vector(shapes, "bias", "bias")]
    if kind == "embedding":
        return [WeightPlacement("embeddings", "weight", same(shapes["embeddings"]))]
    if kind.endswith("_norm"):
        names = {"gamma": "weight", "scale": "weight", "beta": "bias"}
        names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
        return [placement for role in shapes for placement in _vector(shapes, role, names[role], inputs)]
    if kind in GATES:
        if interpretation.is_reset_first or (kind == "gru" and _has_one_bias(shapes)):
            raise LayoutMismatch(
                "a GRU with reset_after=False applies its reset gate before the recurrent product, and torch.nn.GRU "
                "after it; no weights make them compute the same. Write the cell by hand, and give its weights in "
                "mapping"
            )
        return _rnn_placements(kind, shapes, inputs)
    return _attention_placements(shapes, is_split, inputs)


def _vector(
    shapes: Mapping[str, Shape], role: str, param: str, order: FeatureOrder = KEEP_ORDER
) -> list[WeightPlacement]:
    if role not in shapes:
        return []
    shape = shapes[role]
    if order == KEEP_ORDER or len(shape) != 1:
        return [WeightPlacement(role, param, same(shape))]
    return [WeightPlacement(role, param, Layout(order.permutation, shape=shape, view=_viewed(shape[0], order)))]


def _viewed(size: int, order: FeatureOrder) -> Shape:
    """The sizes of the axes that so many features are viewed as."""
    known = math.prod(axis for axis in order.view if axis != -1)
    if known < 1 or size % known or (-1 not in order.view and size != known):
        what = f"{order.view[1]} channels" if order == of_maps(order.view[-1]) else f"shape {order.view}"
        raise LayoutMismatch(f"{size} features are no maps of {what}")
    return tuple(size // known if axis == -1 else axis for axis in order.view)


def _dense_kernel(shape: Shape, inputs: FeatureOrder, outputs: FeatureOrder) -> Layout:
    if inputs == outputs == KEEP_ORDER:
        return Layout((1, 0))
    rows, columns = _viewed(shape[0], inputs), _viewed(shape[1], outputs)
    permutation = (*(len(rows) + axis for axis in outputs.permutation), *inputs.permutation)
    return Layout(permutation, shape=(shape[1], shape[0]), view=(*rows, *columns))


def _rnn_placements(kind: str, shapes: Mapping[str, Shape], inputs: FeatureOrder) -> list[WeightPlacement]:
    found = []
    # Keras has the gates of a GRU in the order update, reset, new; PyTorch has reset first.
    blocks = (1, 0, 2) if kind == "gru" else None
    for side, suffix in (("", ""), ("forward/", ""), ("backward/", "_reverse")):
        if f"{side}kernel" not in shapes:
            continue
        bias = shapes.get(f"{side}bias")
        is_cudnn = bias == _cudnn_bias(shapes, side)
        for name, param, order in (("kernel", "weight_ih", inputs), ("recurrent_kernel", "weight_hh", KEEP_ORDER)):
            rows, columns = shapes[f"{side}{name}"]
            gates = (GATES[kind], columns // GATES[kind])
            if is_cudnn:  # the memory of each gate is that of its transpose already
                if order != KEEP_ORDER:
                    raise LayoutMismatch("the kernels of CuDNNLSTM and CuDNNGRU cannot be ordered anew")
                layout = Layout((1, 0, 2), shape=(columns, rows), view=(rows, *gates), blocks=blocks)
            else:
                view = _viewed(rows, order)
                permutation = (len(view), len(view) + 1, *order.permutation)
                layout = Layout(permutation, shape=(columns, rows), view=(*view, *gates), blocks=blocks)
            found.append(WeightPlacement(f"{side}{name}", f"{param}{suffix}", layout))
        if bias is None:
            continue
        is_double = is_cudnn or len(bias) == 2
        (width,) = shape_of(bias, 0 if is_double else None)
        layout = Layout((0, 1, 2), shape=(width,), view=(1, GATES[kind], width // GATES[kind]), blocks=blocks)
        if is_double:
            found.append(WeightPlacement(f"{side}bias", f"bias_ih{suffix}", layout, row=0))
            found.append(WeightPlacement(f"{side}bias", f"bias_hh{suffix}", layout, row=1))
        else:
            found.append(WeightPlacement(f"{side}bias", f"bias_ih{suffix}", layout))
    return found


def _attention_placements(shapes: Mapping[str, Shape], is_split: bool, inputs: FeatureOrder) -> list[WeightPlacement]:
    found = []
    _, heads, width = shapes["query/kernel"]
    size = heads * width
    if shapes["value/kernel"][1:] != (heads, width):
        raise LayoutMismatch("its value_dim is not its key_dim; torch.nn.MultiheadAttention has one width for both")
    for number, part in enumerate(_PARTS[:3]):
        rows = shapes[f"{part}/kernel"][0]
        view = _viewed(rows, inputs)
        layout = Layout((len(view), len(view) + 1, *inputs.permutation), shape=(size, rows))
        if inputs != KEEP_ORDER:
            layout = layout._replace(view=(*view, heads, width))
        if is_split:
            found.append(WeightPlacement(f"{part}/kernel", f"{part[0]}_proj_weight", layout))
        else:
            found.append(WeightPlacement(f"{part}/kernel", "in_proj_weight", layout, first=number * size))
        if f"{part}/bias" in shapes:
            found.append(
                WeightPlacement(f"{part}/bias", "in_proj_bias", Layout((0, 1), shape=(size,)), first=number * size)
            )
    outputs = shapes["output/kernel"][2]
    found.append(WeightPlacement("output/kernel", "out_proj.weight", Layout((2, 0, 1), shape=(outputs, size))))
    return [*found, *_vector(shapes, "output/bias", "out_proj.bias")]


# ---- Modules of PyTorch ---------------------------------------------------------------------------------------------

_MODULES: Final[dict[str, tuple[type[nn.Module], ...]]] = {
    "dense": (nn.Linear,),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "layer_norm": (nn.LayerNorm,),
    "group_norm": (nn.GroupNorm,),
    "rms_norm": (nn.RMSNorm,),
    "lstm": (nn.LSTM, nn.LSTMCell),
    "gru": (nn.GRU, nn.GRUCell),
    "rnn": (nn.RNN, nn.RNNCell),
    "attention": (nn.MultiheadAttention,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "depthwise": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "conv_transpose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}

ALL_MODULES: Final = tuple({cls for classes in _MODULES.values() for cls in classes})


def kinds_of(module: nn.Module) -> list[str]:
    """The kinds of layers that a module may be."""
    return [kind for kind, classes in _MODULES.items() if isinstance(module, classes)]


def is_split(module: nn.Module) -> bool:
    """Whether an attention module keeps query, key and value apart."""
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is None


def runs_over_inputs(kind: str, role: str) -> bool:
    """Whether a weight has a row for each feature that a layer takes."""
    return kind.endswith("_norm") or (role.rpartition("/")[2] == "kernel" and not role.startswith("output/"))


# The kinds of layers whose weights can be ordered anew with the features that come in, and with those that go out.
_ORDERED: Final = (
    ("dense", "batch_norm", "layer_norm", "rms_norm", *GATES, "attention"),
    ("dense", "batch_norm", "layer_norm", "rms_norm"),
)


def ordered_placements(
    interpretation: Interpretation, is_split: bool, inputs: FeatureOrder, outputs: FeatureOrder
) -> list[WeightPlacement]:
    """`placements`, if the features of such a layer can be ordered anew.

    Raises:
        LayoutMismatch: they cannot, or `placements` raises it.
    """
    for order, kinds, side in zip((inputs, outputs), _ORDERED, ("takes", "gives"), strict=True):
        if order != KEEP_ORDER and interpretation.kind not in kinds:
            raise LayoutMismatch(
                f"the features that it {side} are flattened maps, and a layer of the kind {interpretation.kind} cannot "
                "have them in another order; let the model keep that of Keras, and pass flatten='channels_last' for it"
            )
    return placements(interpretation, is_split, inputs, outputs)


def placed(
    interpretation: Interpretation,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: FeatureOrder = KEEP_ORDER,
    outputs: FeatureOrder = KEEP_ORDER,
) -> list[WeightPlacement]:
    """Where the weights of a layer go in a module.

    Args:
        interpretation: the layer.
        module: the module, whose parameters and buffers are in `tensors`, without layer numbers ("weight_ih" for
            "weight_ih_l0").
        tensors: see there.
        inputs: as for `placements`.
        outputs: as for `placements`.

    Raises:
        LayoutMismatch: they do not fit, with the reason.
    """
    if interpretation.kind not in kinds_of(module):
        raise LayoutMismatch(f"it is a {interpretation.kind}, and the module a {type(module).__name__}")
    found = ordered_placements(interpretation, is_split(module), inputs, outputs)
    rows: dict[str, int] = {}
    for placement in found:
        shape = placement.layout.result(shape_of(interpretation.shapes[placement.role], placement.row))
        if placement.param not in tensors:
            raise LayoutMismatch(f"the module has no {placement.param} for {placement.role}")
        target = tuple(tensors[placement.param].shape)
        if placement.first is not None:
            rows[placement.param] = rows.get(placement.param, 0) + shape[0]
            target = (shape[0], *target[1:])
        if shape != target:
            raise LayoutMismatch(
                f"{placement.role} would be {shape}, and {placement.param} is {tuple(tensors[placement.param].shape)}"
            )
    for param, count in rows.items():
        if count != tensors[param].shape[0]:
            raise LayoutMismatch(f"{param} has {tensors[param].shape[0]} rows, and {count} are given")
    if isinstance(module, nn.MultiheadAttention):
        heads = interpretation.shapes["query/kernel"][1]
        if module.num_heads != heads or module.bias_k is not None:
            raise LayoutMismatch(
                f"it has {heads} heads, and the module {module.num_heads} (add_bias_kv has no counterpart)"
            )
    if interpretation.kind == "conv_transpose" and getattr(module, "groups", 1) != 1:
        raise LayoutMismatch("a transposed convolution of Keras has no groups")
    if interpretation.kind == "depthwise" and getattr(module, "groups", 1) != interpretation.shapes["kernel"][-2]:
        channels = interpretation.shapes["kernel"][-2]
        raise LayoutMismatch(f"it has {channels} channels, and the module {getattr(module, 'groups', 1)} groups")
    return found
