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
from torch_adadelta.keras.layers import Layer, Variable

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
    assert order(config=renamed) == ["a", "b/pointwise", "c"]
    assert order(config=renamed, is_ordered=False) is None
    # Two layers may be the one that was renamed.
    assert order(config=sequential(("a", "Dense", {}), ("b", "Dense", {}), ("d", "GRU", {}), ("e", "GRU", {}))) == paths


def test_a_loss_scale_is_told() -> None:
    """The variable before the configuration, which has what it began with; and what no GradScaler can begin with."""
    for value, config, expected in (
        (256.0, None, "the loss scale, 256; torch.amp.GradScaler(init_scale=256.0) begins with it"),
        (
            256.0,
            {"config": {"initial_scale": 8.0}},
            "the loss scale, 256; torch.amp.GradScaler(init_scale=256.0) begins with it",
        ),
        (0.0, None, "the loss scale, which was 0.0"),
        (np.inf, None, "the loss scale, which was inf"),
        (np.nan, None, "the loss scale, which was nan"),
        (
            None,
            {"config": {"initial_scale": 8.0}},
            "the loss scale, which began as 8; what became of it is not in the file",
        ),
        (
            *(None, {"config": {"initial_scale": 8, "dynamic": False}}),
            "the loss scale, 8; torch.amp.GradScaler(init_scale=8.0) begins with it",
        ),
        (None, {"config": {"initial_scale": "8"}}, "the loss scale, which is not in the file"),
        (None, {"config": 8}, "the loss scale, which is not in the file"),
        (None, None, "the loss scale, which is not in the file"),
    ):
        array = None if value is None else np.float32(value).reshape(())
        scale = None if array is None else LazyArray("s", (), array.dtype, lambda array=array: array)
        assert contents.scale_remark(scale, config) == f"left out: {expected}"


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


@pytest.mark.parametrize(
    ("class_name", "roles", "expected"),
    [
        ("Block", ["up/kernel", "up/bias", "scale"], {"m/up None": ["kernel", "bias"], "m Block": ["scale"]}),
        ("Block", ["a/query/kernel", "a/key/kernel", "a/value/kernel", "a/output/kernel"],
         {"m/a None": ["query/kernel", "key/kernel", "value/kernel", "output/kernel"]}),
        ("Block", ["a/query/kernel", "a/key/kernel"], {"m/a/query None": ["kernel"], "m/a/key None": ["kernel"]}),
        ("Block", ["a/b/forward/kernel", "a/b/backward/kernel"], {"m/a/b None": ["forward/kernel", "backward/kernel"]}),
        ("Block", ["0", "1"], {"m Block": ["0", "1"]}),
        ("MultiHeadAttention", ["query/kernel", "key/kernel"], {"m MultiHeadAttention": ["query/kernel", "key/kernel"]}),
        ("Bidirectional", ["forward/kernel"], {"m Bidirectional": ["forward/kernel"]}),
        (None, ["a/kernel"], {"m None": ["a/kernel"]}),
    ],
    ids=range(8),
)  # fmt: skip
def test_a_custom_layer_is_the_layers_in_it(
    class_name: str | None, roles: list[str], expected: dict[str, list[str]]
) -> None:
    def found(rank: int) -> dict[str, list[str]]:
        stored = [LazyArray(role, (1,) * rank, np.dtype("f4"), lambda: np.zeros(1)) for role in roles]
        layer = Layer("m", class_name, {}, [Variable(own.name, own) for own in stored])
        return {f"{own.path} {own.class_name}": [v.role for v in own.variables] for own in contents.separated([layer])}

    assert found(3) == expected
    if roles[0] == "a/query/kernel":  # of Dense layers, it is no attention
        assert list(found(2)) == [f"m/{role.rpartition('/')[0]} None" for role in roles]
