"""What runs over an axis: features, in the order of Keras and in that of PyTorch."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch_adadelta.keras.layouts import KEEP_ORDER, FeatureOrder


@dataclass(eq=False)
class Feature:
    """An axis, or a part of one: what a layer makes, and Reshape may split into `parts`."""

    size: int | None
    is_free: bool = False  # whether the weights of a layer give it its order, so that it can be another in PyTorch
    parts: "list[Feature]" = field(default_factory=list)
    order: "list[Feature] | None" = None  # of the parts in PyTorch; None for the same
    channels: "list[Feature]" = field(default_factory=list)  # those of the parts that come first there
    is_unclear: bool = False  # whether different layers take its parts for different axes of maps
    same: "Feature | None" = None  # another, if an Add or the like makes both one
    whole: "Feature | None" = None  # what it is a part of
    members: "list[Feature]" = field(default_factory=list)  # what a Concatenate put one behind the other
    why: str = ""

    @property
    def root(self) -> "Feature":
        """The one that stands for all that are the same."""
        feature = self
        while feature.same is not None:
            feature = feature.same
        return feature


Features = list[Feature]


def leaves_of(features: Iterable[Feature], is_torch: bool = False) -> Features:
    """The parts that are not split any further, in the order of Keras or of PyTorch."""
    found: Features = []
    for feature in features:
        root = feature.root
        if is_torch and root.order is not None:
            found += leaves_of(root.order, is_torch)
        else:
            found += leaves_of(root.parts, is_torch) if root.parts else [root]
    return found


@dataclass
class Value:
    """What is known of a tensor, without its first axis, the batch."""

    axes: list[Features] | None = None  # of Keras; None if nothing is known
    torch: Features | None = None  # all features in the order of PyTorch; None for that of Keras
    channels: Features | None = None  # those of the axis that the last layer with a format took for the channels
    is_image: bool = False  # an input that may be maps, of which no layer said where the channels are
    doubt: str = ""  # why the order in PyTorch cannot be told
    why: str = ""  # where maps come from

    @property
    def is_maps(self) -> bool:
        """Whether PyTorch may have another order."""
        return self.channels is not None or (self.is_image and self.axes is not None) or bool(self.doubt)

    def torch_order(self) -> Features:
        """All features in the order of PyTorch."""
        return joined(self.axes or []) if self.torch is None else self.torch


class Axis(NamedTuple):
    """The features that a weight has a row for each of."""

    features: Features | None  # in the order of Keras
    value: Value
    is_joint: bool = True  # False if the weight has an axis for each


class Flat(NamedTuple):
    """Features that are several axes in a row, and in which order PyTorch may have them."""

    why: str
    channels: int = -1  # of the maps; -1 if that is not known
    first: FeatureOrder | None = None  # where the channels come first; None if that cannot be told
    last: FeatureOrder = KEEP_ORDER  # where they come last; the order of Keras where that cannot be told
    shown: FeatureOrder | None = None  # where the maps are flattened as the last module gives them
    is_open: bool = True  # whether the order in PyTorch has to be known
    is_split: bool = False  # whether it is split into the axes of maps, instead of flattened from them
    by_channels: Mapping[int, FeatureOrder] = {}  # where nothing but their number tells which axis has the channels


def joined(axes: Iterable[Features]) -> Features:
    return [feature for axis in axes for feature in axis]


def position(index: int, rank: int) -> int | None:
    """Where an axis is without the batch; None if there is no such axis."""
    at = index - 1 if index > 0 else index + rank
    return at if 0 <= at < rank else None


def size_of(axis: Features) -> int | None:
    sizes = [feature.size for feature in leaves_of(axis)]
    return None if None in sizes else math.prod(size or 0 for size in sizes)


def flat_of(axis: Axis) -> Flat | None:
    """What is known of the order of features; None if they are one axis, or in no other order in PyTorch."""
    value = axis.value
    if axis.features is None:
        return Flat(value.doubt) if value.doubt else None
    keras = leaves_of(axis.features)
    unclear = next((feature for feature in axis.features if feature.root.is_unclear), None)
    if unclear is not None:
        return Flat(unclear.root.why)
    if len(keras) < 2:
        return None
    inside = set(map(id, keras))
    order = [leaf for leaf in leaves_of(value.torch_order(), True) if id(leaf) in inside]
    channels = [leaf for leaf in leaves_of(value.channels or []) if id(leaf) in inside]
    found = _order(keras, order)
    why = value.doubt or value.why or next((feature.root.why for feature in axis.features if feature.root.why), "")
    if not value.is_maps:
        channels = next((feature.root.channels for feature in axis.features if feature.root.order), [])
        if not channels:
            return None if found == KEEP_ORDER else Flat(why or "Permute of a sequence")
        return _flat_maps(why, keras, order, channels)._replace(is_split=True)
    if not axis.is_joint:
        return None if found == KEEP_ORDER else Flat(f"normalisation over several axes of the {why}")
    if value.doubt:
        return Flat(why, shown=found if channels else None)
    if value.is_image:
        return Flat(why, by_channels=orders_by_channels(keras))
    return _flat_maps(why, keras, order, channels)


def _flat_maps(why: str, keras: Features, order: Features, channels: Features) -> Flat:
    first = _order(keras, order)
    last = _order(keras, [*(leaf for leaf in order if leaf not in channels), *channels])
    return Flat(why, size_of(channels) or -1, first, last or KEEP_ORDER, first, is_open=first != KEEP_ORDER)


def orders_by_channels(keras: Features) -> dict[int, FeatureOrder]:
    """The orders with the channels first, if the number of channels tells which axis they are in."""
    found: dict[int, FeatureOrder] = {}
    for at in (0, len(keras) - 1):
        size = keras[at].size
        order = _order(keras, [keras[at], *keras[:at], *keras[at + 1 :]])
        if size is not None and order is not None:
            found[size] = order
    return found


def _order(keras: Features, torch: Features) -> FeatureOrder | None:
    """The view and the permutation that bring features from one order to the other; None if sizes are missing."""
    keras = [leaf for leaf in keras if leaf.size != 1]
    torch = [leaf for leaf in torch if leaf.size != 1]
    if set(map(id, keras)) != set(map(id, torch)):
        return None
    after = {id(one): two for one, two in itertools.pairwise(torch)}
    runs: list[Features] = []
    for leaf in keras:
        if runs and after.get(id(runs[-1][-1])) is leaf:
            runs[-1].append(leaf)
        else:
            runs.append([leaf])
    if len(runs) < 2:
        return KEEP_ORDER
    sizes = [size_of(run) for run in runs]
    if sizes.count(None) > 1:
        return None
    starts = [id(run[0]) for run in runs]
    permutation = tuple(starts.index(id(leaf)) for leaf in torch if id(leaf) in starts)
    return FeatureOrder(tuple(-1 if size is None else size for size in sizes), permutation)
