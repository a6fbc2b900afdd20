"""Features in the order of Keras and in that of PyTorch."""

import pytest

from torch_adadelta.keras.features import Axis, Feature, Flat, Value, flat_of, leaves_of, position, size_of
from torch_adadelta.keras.layouts import KEEP_ORDER, FeatureOrder


def test_leaves_are_what_is_not_split_further() -> None:
    one, two, three = Feature(1), Feature(2), Feature(3)
    split = Feature(6, parts=[two, three], order=[three, two])
    same = Feature(None, same=split)
    assert leaves_of([one, same]) == [one, two, three]
    assert leaves_of([one, same], is_torch=True) == [one, three, two]
    assert size_of([one, same]) == 6
    assert size_of([one, Feature(None)]) is None


@pytest.mark.parametrize(("index", "expected"), [(1, 0), (3, 2), (4, None), (-1, 2), (-3, 0), (-4, None), (0, None)])
def test_positions_do_not_count_the_batch(index: int, expected: int | None) -> None:
    assert position(index, 3) == expected


def maps(height: int | None, width: int | None, channels: int | None) -> tuple[list[Feature], Value]:
    """Flattened maps with their channels last in Keras and first in PyTorch."""
    h, w, c = Feature(height), Feature(width), Feature(channels)
    return [h, w, c], Value([[h, w, c]], [c, h, w], [c], why="Flatten of maps")


def test_flattened_maps_have_their_channels_first() -> None:
    features, value = maps(2, 3, 4)
    first = FeatureOrder((6, 4), (1, 0))
    assert flat_of(Axis(features, value)) == Flat("Flatten of maps", 4, first, KEEP_ORDER, first)
    features, value = maps(None, 3, 4)  # one size follows from the others
    assert flat_of(Axis(features, value)).first == FeatureOrder((-1, 4), (1, 0))
    features, value = maps(None, 3, None)
    assert flat_of(Axis(features, value)).first is None
    features, value = maps(2, 3, 1)  # whose order is the same
    assert flat_of(Axis(features, value)).first == KEEP_ORDER
    assert flat_of(Axis(features, value)).is_open is False


def test_features_of_one_axis_have_one_order() -> None:
    feature = Feature(4)
    assert flat_of(Axis([feature], Value([[feature]]))) is None
    assert flat_of(Axis(None, Value())) is None
    assert flat_of(Axis(None, Value(doubt="custom layer"))) == Flat("custom layer")


def test_an_image_may_have_its_channels_at_either_end() -> None:
    features = [Feature(5), Feature(6), Feature(3)]
    found = flat_of(Axis(features, Value([features], is_image=True)))
    assert found.by_channels == {5: KEEP_ORDER, 3: FeatureOrder((30, 3), (1, 0))}
