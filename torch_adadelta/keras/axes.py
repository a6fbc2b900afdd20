"""Follows the axes of every tensor through a model of Keras, layer by layer.

The features that a layer takes may be several axes in a row, as behind a Flatten of feature maps. Keras has them in the
order of its axes, PyTorch in the order of its own, where maps have their channels first. Both orders follow from what
each layer does to the axes: a convolution makes new ones, a Permute moves them, a Reshape splits and joins them, and a
layer with a `data_format` says which axis has the channels.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from torch_adadelta.keras.classes import PARTS
from torch_adadelta.keras.config import Call, LayerConfig, ModelConfig, inner_layer, wrapped_class
from torch_adadelta.keras.features import (
    Axis,
    Feature,
    Features,
    Flat,
    Value,
    flat_of,
    joined,
    leaves_of,
    orders_by_channels,
    position,
    size_of,
)
from torch_adadelta.keras.layers import Layer

# Layers that leave every axis where it is.
_ELEMENTWISE: Final = re.compile(
    r"Activation|ReLU|LeakyReLU|ELU|PReLU|Softmax|ThresholdedReLU|Dropout|SpatialDropout\dD|GaussianNoise|GaussianDropout|"
    r"AlphaDropout|Rescaling|ActivityRegularization|Masking|UnitNormalization|Normalization|Identity"
)


_MERGE: Final = re.compile(r"Add|Subtract|Multiply|Average|Maximum|Minimum")


_CONV: Final = re.compile(r"(Depthwise|Separable)?Conv(\d)D(Transpose)?")


_POOL: Final = re.compile(r"(Max|Average)Pooling(\d)D|ZeroPadding(\d)D|Cropping(\d)D|UpSampling(\d)D")


_GLOBAL: Final = re.compile(r"Global(Max|Average)Pooling(\d)D")


_RECURRENT: Final = ("LSTM", "GRU", "SimpleRNN", "RNN", "CuDNNLSTM", "CuDNNGRU", "Bidirectional")


_LAST_AXIS: Final = ("LayerNormalization", "RMSNormalization")


_CHANNEL_AXIS: Final = ("BatchNormalization", "SyncBatchNormalization", "GroupNormalization")


class Axes:
    """The features that the weights of each layer run over.

    Args:
        model: the configuration of the model, complete.
        layers: the layers with weights.
    """

    def __init__(self, model: ModelConfig, layers: Sequence[Layer]) -> None:
        self._model = model
        self._known = model.by_path()
        self._weights = {layer.path: layer for layer in layers}
        self._values: dict[Call, Value] = {}
        self._inputs: dict[str, list[Axis]] = {}
        self._outputs: dict[str, Features] = {}
        self._concatenations: Features = []
        for layer in model.layers:
            for number in range(len(model.calls[layer.path])):
                self._value(Call(layer.path, number))
        for call in model.outputs:
            self._leave(self._value(call))
        for feature in reversed(self._concatenations):
            if feature.root.is_unclear or feature.root.order not in (None, feature.root.parts):
                for member in feature.members:
                    member.root.is_unclear, member.root.why = True, feature.root.why

    def inputs(self) -> dict[str, Flat]:
        """The layers whose weights run over several axes of maps in a row, by their paths."""
        found = {}
        for path, axes in self._inputs.items():
            flats = [flat_of(axis) for axis in axes]
            flat = flats[0]
            orders = [other and other._replace(why="") for other in flats]
            if any(order != orders[0] for order in orders):
                flat = Flat(f"call of {path} on features in different orders")
            if flat is not None:
                found[path] = flat
        return found

    def outputs(self) -> dict[str, Flat]:
        """The layers whose features are split into the axes of maps, by their paths."""
        found = {}
        for path, features in self._outputs.items():
            root = features[0].root
            if root.is_unclear:
                leaves = leaves_of([root])
                is_image = root.order is None and len(leaves) > 2
                found[path] = Flat(root.why, by_channels=orders_by_channels(leaves) if is_image else {}, is_split=True)
            elif root.order is not None:
                flat = flat_of(Axis([root], Value([[root]])))
                if flat is not None:
                    found[path] = flat
        return found

    def _value(self, call: Call) -> Value:
        if call not in self._values:
            self._values[call] = Value()  # of a call that depends on itself
            layer = self._known[call.path]
            sources = [self._value(source) for source in self._model.calls[call.path][call.number]]
            self._values[call] = self._output(layer, sources)
        return self._values[call]

    def _output(self, layer: LayerConfig, sources: list[Value]) -> Value:
        name, config = wrapped_class(layer)
        if not sources:
            sources = [_given(layer.config)]
        if layer.class_name != "TimeDistributed":
            return self._apply(layer, name, config, sources)
        value = sources[0]
        if not value.axes:
            return self._unknown(layer, sources)
        time, *axes = value.axes
        order = None if value.torch is None else [feature for feature in value.torch if feature not in time]
        found = self._apply(
            layer, name, config, [replace(value, axes=axes, torch=order, is_image=value.is_image and len(axes) > 2)]
        )
        if found.axes is None:
            return found
        return replace(found, axes=[time, *found.axes], torch=None if found.torch is None else [*time, *found.torch])

    def _apply(self, layer: LayerConfig, name: str, config: dict[str, Any], sources: list[Value]) -> Value:
        value = sources[0]
        if name == "InputLayer" or _ELEMENTWISE.fullmatch(name):
            return value if len(sources) == 1 else self._merged(layer, sources)
        if _MERGE.fullmatch(name):
            return self._merged(layer, sources)
        if name == "Concatenate":
            return self._concatenated(layer, config, sources)
        if match := _CONV.fullmatch(name):
            return self._convolved(layer, name, config, value, int(match[2]))
        if match := _POOL.fullmatch(name):
            return self._pooled(layer, name, config, value, int(next(digit for digit in match.groups()[1:] if digit)))
        if match := _GLOBAL.fullmatch(name):
            value = self._as_maps(value, layer, config, int(match[2]))
            ones = [[Feature(1)] for _ in range(int(match[2]))] if config.get("keepdims") else []
            channels = value.channels or [Feature(None)]
            is_first = config.get("data_format") == "channels_first"
            return Value([channels, *ones] if is_first else [*ones, channels], channels)
        if name == "Flatten":
            return _flattened(layer, config, value)
        if name == "Reshape":
            return _reshaped(layer, config, value) or self._unknown(layer, sources)
        if name == "Permute":
            return _permuted(layer, config, value) or self._unknown(layer, sources)
        if name == "RepeatVector":
            times = [Feature(config.get("n"))]
            order = None if value.torch is None else [*times, *value.torch]
            return replace(value, axes=None if value.axes is None else [times, *value.axes], torch=order)
        if name in _CHANNEL_AXIS:
            return self._normalised(layer, config, value)
        if name in _LAST_AXIS:
            self._takes_axes(layer, config, value)
            return value
        if name == "Dense":
            self._takes(layer, value)
            made = self._makes(layer.path, config.get("units"))
            if value.axes is None:
                return Value([made]) if not value.doubt else replace(value, axes=[[Feature(None)], made])
            axes = [*value.axes[:-1], made]
            if not value.is_maps or len(axes) == 1:
                return Value(axes)
            rest = [feature for feature in value.torch_order() if feature not in value.axes[-1]]
            return replace(value, axes=axes, torch=[*made, *rest], channels=made, is_image=False)
        if name == "Embedding":
            made = self._makes(layer.path, config.get("output_dim"))
            return Value(None if value.axes is None else [*value.axes, made])
        if name in _RECURRENT:
            self._takes(layer, value)
            return self._recurrent(layer, config, value)
        if name in ("MultiHeadAttention", "GroupedQueryAttention"):
            for source in sources:
                self._takes(layer, source)
            return Value(None if value.axes is None else [*value.axes[:-1], self._makes(layer.path, None)])
        return self._unknown(layer, sources)

    # ---- Weights ----

    def _takes(self, layer: LayerConfig, value: Value, suffix: str = "") -> None:
        """Weights of the layer run over the last axis."""
        self._inputs.setdefault(layer.path + suffix, []).append(Axis(value.axes[-1] if value.axes else None, value))

    def _takes_axes(self, layer: LayerConfig, config: dict[str, Any], value: Value) -> None:
        given = config.get("axis", -1)
        indices = given if isinstance(given, list) else [given]
        if value.axes is None or not all(isinstance(index, int) for index in indices):
            self._takes(layer, value)
            return
        places = [position(index, len(value.axes)) for index in indices]
        features = joined(value.axes[place] for place in places if place is not None)
        self._inputs.setdefault(layer.path, []).append(Axis(features, value, is_joint=len(places) == 1))

    def _makes(self, path: str, size: Any) -> Features:
        """A new axis, of which a weight of the layer has a column each."""
        if path not in self._outputs:
            self._outputs[path] = [Feature(size if isinstance(size, int) else None, is_free=True)]
        return list(self._outputs[path])

    # ---- Maps ----

    def _as_maps(self, value: Value, layer: LayerConfig, config: dict[str, Any], rank: int) -> Value:
        """A tensor as the layer takes it: maps of so many axes, with the channels where its format says."""
        if value.axes is None or len(value.axes) != rank + 1:
            axes: list[Features] = [[Feature(None)] for _ in range(rank + 1)]
            value = Value(axes)
        assert value.axes is not None
        return _with_channels(value, 0 if config.get("data_format") == "channels_first" else rank, layer)

    def _convolved(self, layer: LayerConfig, name: str, config: dict[str, Any], value: Value, rank: int) -> Value:
        value = self._as_maps(value, layer, config, rank)
        assert value.axes is not None
        is_first = config.get("data_format") == "channels_first"
        axes = value.axes[1:] if is_first else value.axes[:-1]
        is_separable = name.startswith("Separable")
        channels = value.channels or []
        self._inputs.setdefault(layer.path + ("/depthwise" if is_separable else ""), []).append(Axis(channels, value))
        made = self._makes(layer.path + ("/pointwise" if is_separable else ""), self._filters(layer, name, config))
        spatial = [[Feature(_window(size_of(axis), config, index, name))] for index, axis in enumerate(axes)]
        return Value(
            [made, *spatial] if is_first else [*spatial, made],
            [*made, *joined(spatial)],
            made,
            why=f"maps of {layer.path}",
        )

    def _filters(self, layer: LayerConfig, name: str, config: dict[str, Any]) -> int | None:
        filters = config.get("filters")
        if isinstance(filters, int):
            return filters
        for path in (layer.path, f"{layer.path}/pointwise"):
            for variable in self._weights[path].variables if path in self._weights else ():
                shape = variable.value.shape
                if variable.role.endswith("kernel") and len(shape) > 2:
                    is_depthwise = name.startswith("Depthwise")
                    return math.prod(shape[-2:]) if is_depthwise else shape[-2 if "Transpose" in name else -1]
        return None

    def _pooled(self, layer: LayerConfig, name: str, config: dict[str, Any], value: Value, rank: int) -> Value:
        value = self._as_maps(value, layer, config, rank)
        assert value.axes is not None
        channels = value.channels or []
        is_first = config.get("data_format") == "channels_first"
        axes = value.axes[1:] if is_first else value.axes[:-1]
        spatial = [[Feature(_window(size_of(axis), config, index, name))] for index, axis in enumerate(axes)]
        found = [channels, *spatial] if is_first else [*spatial, channels]
        return replace(value, axes=found, torch=[*channels, *joined(spatial)])

    def _normalised(self, layer: LayerConfig, config: dict[str, Any], value: Value) -> Value:
        axis = config.get("axis", -1)
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        at = position(axis, len(value.axes)) if value.axes and isinstance(axis, int) else None
        if value.axes is None or at is None:
            self._takes(layer, value)
            return value
        if len(value.axes) > 1:
            value = _with_channels(value, at, layer)
        assert value.axes is not None
        self._inputs.setdefault(layer.path, []).append(Axis(value.axes[at], value))
        return value

    # ---- Several inputs, and what is not known ----

    def _merged(self, layer: LayerConfig, sources: list[Value]) -> Value:
        """What all sources become if they are added, element by element."""
        # Maps first: they say what the axes are.
        ranked = sorted(sources, key=lambda value: (value.channels is None, not value.is_image))
        first = ranked[0]
        if any(value.axes is None or len(value.axes) != len(first.axes or ()) for value in ranked):
            return self._unknown(layer, sources)
        for other in ranked[1:]:
            if not _unified(first, other, layer):
                return self._unknown(layer, sources)
        if any(value.doubt for value in ranked):
            return replace(first, doubt=next(value.doubt for value in ranked if value.doubt))
        return first

    def _concatenated(self, layer: LayerConfig, config: dict[str, Any], sources: list[Value]) -> Value:
        first = sources[0]
        ranks = {len(value.axes) if value.axes else 0 for value in sources}
        axis = config.get("axis", -1)
        at = position(axis, len(first.axes)) if first.axes and len(ranks) == 1 and isinstance(axis, int) else None
        if first.axes is None or at is None:
            return self._unknown(layer, sources)
        sizes = []
        for value in sources:
            assert value.axes is not None
            joint = len(leaves_of(value.axes[at])) > 1
            is_mixed = value.doubt or (value.channels is None) != (first.channels is None)
            if joint or is_mixed or (value.channels is not None and value.channels != value.axes[at]):
                return self._unknown(layer, sources)
            sizes.append(size_of(value.axes[at]))
        members = joined(value.axes[at] for value in sources if value.axes)
        made = [Feature(None if None in sizes else sum(size or 0 for size in sizes), is_free=True, members=members)]
        self._concatenations.append(made[0])
        axes = [*first.axes[:at], made, *first.axes[at + 1 :]]
        if first.channels is None:
            return Value(axes) if not first.is_maps else replace(first, axes=axes, torch=None)
        rest = [feature for feature in first.torch_order() if feature not in first.axes[at]]
        return replace(first, axes=axes, torch=[*made, *rest], channels=made)

    def _recurrent(self, layer: LayerConfig, config: dict[str, Any], value: Value) -> Value:
        inner, own = inner_layer(config)
        units = own.get("units")
        is_double = bool(inner) and config.get("merge_mode", "concat") == "concat"
        size = units * (2 if is_double else 1) if isinstance(units, int) else None
        made = self._makes(layer.path, size)
        if not own.get("return_sequences"):
            return Value([made])
        return Value([value.axes[0] if value.axes else [Feature(None)], made])

    def _unknown(self, layer: LayerConfig, sources: list[Value]) -> Value:
        """A layer that may do anything: if it is given maps, or has convolutions, what it gives may be maps."""
        for value in sources:
            self._leave(value)
        inner = f"{layer.path}/"
        own = [
            variable
            for path, known in self._weights.items()
            if path == layer.path or path.startswith(inner)
            for variable in known.variables
            if variable.role.partition("/")[0] not in PARTS.values()  # whose kernels have heads, and no maps
        ]
        if any(value.is_maps for value in sources) or any(len(v.value.shape) > 2 for v in own):
            why = next((value.why for value in sources if value.why), "")
            name = layer.class_name
            return Value(doubt=f"{name} of the {why}" if why else f"{name} {layer.path}", why=why)
        return Value()

    def _leave(self, value: Value) -> None:
        """Something takes a tensor of which nobody knows what it takes the axes for."""
        if value.axes is None or len(value.axes) < 3 or value.channels is not None:
            return
        if 1 not in (size_of(value.axes[0]), size_of(value.axes[-1])):  # one channel is first and last
            for feature in _spread(value.axes):
                if feature.order is None:
                    feature.is_unclear = True
                    feature.why = feature.why or "Reshape to what may be maps"


def _given(config: dict[str, Any]) -> Value:
    """The input of a model, by the configuration of its first layer."""
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if not isinstance(shape, list):
        return Value(is_image=True)  # for all that is known
    sizes = [size if isinstance(size, int) else None for size in shape[1:]]
    name = str(config.get("name", "input"))
    return Value([[Feature(size)] for size in sizes], is_image=len(sizes) > 2, why=f"maps of {name}")


def _spread(axes: list[Features]) -> Features:
    """The features of which the parts are in more than one axis."""
    places: dict[int, tuple[Feature, set[int]]] = {}
    for number, axis in enumerate(axes):
        for leaf in leaves_of(axis):
            top = leaf
            while top.whole is not None:
                top = top.whole.root
            places.setdefault(id(top), (top, set()))[1].add(number)
    return [feature for feature, found in places.values() if len(found) > 1 and feature.is_free]


def _with_channels(value: Value, at: int, layer: LayerConfig) -> Value:
    """Maps whose channels are in a known axis: PyTorch has it first."""
    assert value.axes is not None
    axes = [leaves_of(axis) for axis in value.axes]
    order = joined([axes[at], *axes[:at], *axes[at + 1 :]])
    for feature in _spread(axes):
        parts = set(map(id, leaves_of([feature])))
        own = [leaf for leaf in order if id(leaf) in parts]
        if feature.order is not None and feature.order != own:
            feature.is_unclear = True
        feature.order, feature.why = own, f"Reshape to the maps of {layer.path}"
        feature.channels = [leaf for leaf in axes[at] if id(leaf) in parts]
    doubt = "" if value.channels is None else value.doubt
    if value.channels is not None and leaves_of(value.channels) != axes[at]:
        doubt = doubt or f"call of {layer.path}, whose channels are in another axis than before"
    return replace(
        value,
        axes=axes,
        torch=order,
        channels=axes[at],
        is_image=False,
        doubt=doubt,
        why=value.why or f"maps of {layer.path}",
    )


def _flattened(layer: LayerConfig, config: dict[str, Any], value: Value) -> Value:
    if value.axes is None:
        return replace(value, doubt="Flatten of an input of unknown shape") if value.is_image else value
    axes = value.axes
    if len(axes) < 2:
        return value
    is_first = config.get("data_format") == "channels_first"
    if value.is_image and not value.doubt:
        # The format says where the channels are, but it is the default's, and may be that of nobody.
        sizes = [size_of(axes[0]) or 0, size_of(axes[-1]) or 0]
        if is_first or sizes[0] >= sizes[1]:
            value = _with_channels(value, 0 if is_first else len(axes) - 1, layer)
    elif is_first and value.channels is None and not value.doubt:
        value = _with_channels(value, 0, layer)
    if is_first:
        axes = [*axes[1:], axes[0]]
    why = f"{layer.class_name} of the {value.why}" if value.is_maps else value.why
    return replace(value, axes=[joined(axes)], why=why)


def _reshaped(layer: LayerConfig, config: dict[str, Any], value: Value) -> Value | None:
    """The features regrouped; None if they cannot be."""
    target = config.get("target_shape")
    if value.axes is None or not isinstance(target, list) or not all(isinstance(size, int) for size in target):
        return None
    if len(target) == 1:
        return _flattened(layer, {}, value)
    leaves = [leaf for leaf in leaves_of(joined(value.axes)) if leaf.size != 1]
    total = size_of(leaves)
    if -1 in target:
        known = math.prod(size for size in target if size != -1)
        if total is None or not known or total % known:
            return None
        target = [total // known if size == -1 else size for size in target]
    if total is not None and total != math.prod(target):
        return None
    if len(leaves) == 1 and leaves[0].size is None:
        leaves[0].size = math.prod(target)
    axes: list[Features] = []
    for size in target:
        axis: Features = []
        left = size
        while left > 1:
            if not leaves or not leaves[0].size:
                return None
            leaf = leaves.pop(0)
            count = leaf.size or 0
            if left % count == 0:
                left //= count
            elif count % left == 0:
                leaf, rest = _split(leaf, (left, count // left))
                leaves.insert(0, rest)
                left = 1
            else:
                return None
            axis.append(leaf)
        axes.append(axis or [Feature(1)])
    why = f"Reshape of the {value.why}" if value.is_maps else value.why
    return replace(value, axes=axes, torch=value.torch_order(), doubt=why if value.is_image else value.doubt, why=why)


def _split(feature: Feature, sizes: Iterable[int]) -> Features:
    feature.parts = [Feature(size, whole=feature) for size in sizes]
    return list(feature.parts)


def _permuted(layer: LayerConfig, config: dict[str, Any], value: Value) -> Value | None:
    dims = config.get("dims")
    if value.axes is None or not isinstance(dims, list) or sorted(dims) != list(range(1, len(value.axes) + 1)):
        return None
    found = replace(value, axes=[value.axes[dim - 1] for dim in dims], torch=value.torch_order())
    if value.is_image:
        return replace(found, doubt=f"Permute of the {value.why}")
    if value.channels is None:
        return found
    at = next((number for number, axis in enumerate(value.axes) if axis == value.channels), None)
    others = [dim for dim in dims if dim - 1 != at]
    if at is None or others != sorted(others):
        return replace(found, doubt=value.doubt or f"{layer.class_name} of the {value.why}")
    return found


def _unified(first: Value, other: Value, layer: LayerConfig) -> bool:
    """Makes the features of both the same, as adding them does; False if they cannot be."""
    assert first.axes is not None
    if first.channels is not None and other.channels is None and len(first.axes) > 1:
        at = next((number for number, axis in enumerate(first.axes) if axis == first.channels), None)
        if at is None:
            return not other.is_maps
        other = _with_channels(other, at, layer)
    for ours, theirs in zip(first.axes, other.axes or [], strict=True):
        if 1 in (size_of(ours), size_of(theirs)):
            continue
        left, right = leaves_of(ours), leaves_of(theirs)
        if len(left) > 1 and len(right) == 1 and right[0].is_free:
            # Features of a Dense, say, that are added to flattened maps: they are in the order of these.
            if None in [leaf.size for leaf in left]:
                right[0].is_unclear, right[0].why = True, f"{layer.class_name} to the {first.why}"
                continue
            parts = _split(right[0], [leaf.size or 0 for leaf in left])
            own = {id(leaf): part for leaf, part in zip(left, parts, strict=True)}
            ordered = [own[id(leaf)] for leaf in leaves_of(first.torch_order(), True) if id(leaf) in own]
            right[0].order, right[0].why = ordered, f"{layer.class_name} to the {first.why}"
            right[0].channels = [own[id(leaf)] for leaf in leaves_of(first.channels or []) if id(leaf) in own]
        elif len(left) != len(right):
            return False
        else:
            for one, two in zip(left, right, strict=True):
                if one is not two and one.is_free and two.is_free:
                    two.same = one
                    one.size = one.size or two.size
    return _pattern(first) == _pattern(other)


def _pattern(value: Value) -> list[int]:
    """Where the features of PyTorch's order are in that of Keras."""
    places = {id(leaf): number for number, leaf in enumerate(leaves_of(joined(value.axes or [])))}
    return [places.get(id(leaf), -1) for leaf in leaves_of(value.torch_order(), True)]


def _window(size: int | None, config: dict[str, Any], axis: int, name: str) -> int | None:
    """How many places a window of the layer has on an axis."""
    if size is None:
        return None

    def option(key: str, default: Any) -> Any:
        value = config.get(key, default)
        return value[axis] if isinstance(value, list) and len(value) > axis else value

    if name.startswith("UpSampling"):
        factor = option("size", 2)
        return size * factor if isinstance(factor, int) else None
    if name.startswith(("ZeroPadding", "Cropping")):
        sign = 1 if name.startswith("Zero") else -1
        both = config.get("padding" if sign == 1 else "cropping", 1)
        if isinstance(both, list) and not name.endswith("1D"):
            both = both[axis] if len(both) > axis else None
        both = [both, both] if isinstance(both, int) else both
        if not isinstance(both, list) or not all(isinstance(count, int) for count in both):
            return None
        return size + sign * sum(both)
    kernel = option("pool_size" if "Pooling" in name else "kernel_size", 2)
    stride = option("strides", None if "Pooling" in name else 1)
    stride = kernel if stride is None else stride
    dilation = option("dilation_rate", 1)
    padding = config.get("padding", "valid")
    if not all(isinstance(number, int) and number > 0 for number in (kernel, stride, dilation)):
        return None
    if "Transpose" in name:
        extra = option("output_padding", None)
        if extra is not None or dilation != 1:
            return None
        return size * stride if padding == "same" else size * stride + max(kernel - stride, 0)
    if padding in ("same", "causal"):
        return -(-size // stride)
    return (size - dilation * (kernel - 1) - 1) // stride + 1
