"""What a file holds, and what goes wrong when it is read."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from keras_memory import layer_of
from keras_stored import (
    sequential,
)

from torch_adadelta.keras import KerasFileError, contents
from torch_adadelta.keras.config import ModelConfig
from torch_adadelta.keras.contents import KERAS3, Checkpoint
from torch_adadelta.keras.errors import LazyArray

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def checkpoint_of(iterations: Any, *layers: str, config: Any = None, is_ordered: bool = True) -> Checkpoint:
    array = np.asarray(iterations)
    stored = LazyArray("iter", array.shape, array.dtype, lambda: array)
    own = [layer_of(path, "Dense", {}, {"kernel": np.ones((2, 2))}) for path in layers]
    model = None if config is None else ModelConfig(config)
    return Checkpoint(Path("m"), ".h5", KERAS3, own, stored, {}, model, is_ordered=is_ordered)


def test_iterations_are_one_number() -> None:
    for value in (np.int64(7), np.array([7], "i4"), np.uint64(2**63 - 1), np.int64(0)):
        assert checkpoint_of(value).count() == int(np.ravel(value)[0])
    for value, message in (
        (np.int64(-1), "its iterations are -1"),
        (np.uint64(2**63), "its iterations are 9223372036854775808"),
        (np.float32(7), "have shape .* and float32"),
        (np.array([7, 8]), r"have shape \(2,\)"),
    ):
        with pytest.raises(KerasFileError, match=message):
            checkpoint_of(value).count()


def test_layers_come_in_the_order_of_the_model() -> None:
    config = sequential(("a", "Dense", {}), ("b", "SeparableConv1D", {}), ("c", "Dense", {}))
    paths = ["c", "b/pointwise", "a"]

    def order(**options: Any) -> list[str] | None:
        checkpoint = checkpoint_of(0, *paths, **options)
        found = checkpoint.in_order(checkpoint.layers)
        return None if found is None else [layer.path for layer in found]

    assert order(config=config) == ["a", "b/pointwise", "c"]
    assert order() == paths
    assert order(is_ordered=False) is None
    assert order(config={"class_name": "Net", "config": {}}) == paths
    renamed = sequential(("a", "Dense", {}), ("b", "Dense", {}), ("other", "Dense", {}))
    assert (order(config=renamed), order(config=renamed, is_ordered=False)) == (paths, None)


def test_an_array_of_another_shape_than_it_said_is_damage() -> None:
    stored = LazyArray("x", (2,), np.dtype("f4"), lambda: np.zeros(3))
    with pytest.raises(KerasFileError, match=r"m: x has shape \(3,\), not \(2,\)"):
        contents.explained(checkpoint_of(0), stored)
    for error in (
        *(OSError("bad"), MemoryError(), RecursionError(), KeyError("x"), AssertionError(), EOFError()),
        *(AttributeError(), NotImplementedError(), OverflowError(), TypeError(), ValueError(), zipfile.BadZipFile()),
    ):
        with pytest.raises(KerasFileError, match=rf"m: it is damaged, or no file of Keras \({type(error).__name__}"):
            raise_as_damage(error)
    for error in (FileNotFoundError(), ImportError(), IsADirectoryError(), PermissionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            raise_as_damage(error)


def raise_as_damage(error: BaseException) -> None:
    with contents.damage_named(Path("m")):
        raise error
