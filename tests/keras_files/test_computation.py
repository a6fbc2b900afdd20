"""Which layers depend on which, and which modules are known to run in order."""

from typing import Any

import numpy as np
import pytest
import torch
from keras_memory import checkpoint_of, layer_of
from keras_stored import Net, sequential
from torch import nn

from torch_adadelta.keras.computation import Computation, run_in_order
from torch_adadelta.keras.contents import Checkpoint
from torch_adadelta.keras.modules import torch_layers_of

Entry = tuple[str, list[list[str]]]


def functional(*entries: tuple[str, list[list[str]]], outputs: list[str], cls: str = "Dense") -> dict[str, Any]:
    """A model of layers by name, each with the layers that it takes in each of its calls ("a", or "a:1" for a later)."""

    def tensor(text: str) -> list[Any]:
        name, _, call = text.partition(":")
        return [name, int(call or 0), 0, {}]

    layers = [
        {
            "class_name": "InputLayer" if name.startswith("in") else cls,
            "config": {"name": name},
            "inbound_nodes": [[tensor(source) for source in call] for call in calls],
        }
        for name, calls in entries
    ]
    return {
        "class_name": "Functional",
        "config": {"layers": layers, "output_layers": [tensor(name)[:3] for name in outputs]},
    }


def checkpoint(config: Any, *paths: str) -> Checkpoint:
    return checkpoint_of(config, [layer_of(path, "Dense", {}, {"kernel": np.ones((2, 2))}) for path in paths])


def order(config: Any, *paths: str, all_paths: tuple[str, ...] = ()) -> list[str] | None:
    own = checkpoint(config, *(all_paths or paths))
    layers = [layer for layer in own.layers if layer.path in paths]
    found = Computation(own, own.layers).ordered(layers)
    return None if found is None else [layer.path for layer in found]


IN = ("in", [])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (sequential(("a", "Dense", {}), ("x", "Dense", {}), ("b", "Dense", {})), ["a", "b"]),
        (functional(IN, ("b", [["in"]]), ("a", [["b"]]), outputs=["a"]), ["b", "a"]),
        # A layer that takes what a later one in the list gives, whose calls are not followed.
        (functional(IN, ("a", [["x"]]), ("x", [["b"]]), ("b", [["in"]]), outputs=["a"]), None),
        # Past each other: b gets what a gives, and what it was given.
        (functional(IN, ("a", [["in"]]), ("b", [["in", "a"]]), outputs=["b"]), ["a", "b"]),
        # Branches.
        (functional(IN, ("a", [["in"]]), ("b", [["in"]]), ("c", [["a", "b"]]), outputs=["c"]), None),
        # A layer that is called twice at different places of a chain: before b and behind it.
        (functional(IN, ("a", [["in"], ["b"]]), ("b", [["a"]]), outputs=["a:1"]), None),
        # Called twice in a row.
        (functional(IN, ("a", [["in"], ["a"]]), ("b", [["a:1"]]), outputs=["b"]), None),
        # One call of a comes before b, another has nothing to do with it.
        (functional(IN, ("in2", []), ("a", [["in"], ["in2"]]), ("b", [["a"]]), outputs=["b", "a:1"]), ["a", "b"]),
        # Twice, in two orders.
        (functional(IN, ("in2", []), ("a", [["in"], ["b:1"]]), ("b", [["a"], ["in2"]]), outputs=["b", "a:1"]), None),
        # On itself, as only a damaged file has it.
        (functional(IN, ("a", [["b"]]), ("b", [["a"]]), outputs=["b"]), None),
        (functional(IN, ("a", [["c"]]), ("c", [["c"]]), ("b", [["a"]]), outputs=["b"]), None),
        ({"class_name": "Mine", "config": {}}, None),
        (None, None),
    ],
    ids=range(13),
)  # fmt: skip
def test_the_order_of_two_layers(config: Any, expected: list[str] | None) -> None:
    assert order(config, "a", "b") == expected
    assert order(config, "b", "a") == expected


def test_all_layers_must_depend_on_all_before_them() -> None:
    """That each reaches the next is not enough, if it is in different calls."""
    config = functional(IN, ("in2", []), ("a", [["in"]]), ("b", [["a"], ["in2"]]), ("c", [["b:1"]]), outputs=["b", "c"])
    assert order(config, "a", "b", "c") is None
    assert order(config, "a", "b") == ["a", "b"]
    assert order(config, "b", "c", all_paths=("a", "b", "c")) == ["b", "c"]
    assert order(config, "a", "c", all_paths=("a", "b", "c")) is None
    chain = sequential(*((f"d{number}", "Dense", {}) for number in range(5)))
    assert order(chain, "d3", "d0", "d4", "d1") == ["d0", "d1", "d3", "d4"]


def test_a_base_that_two_inputs_share_has_the_order_of_its_sequential() -> None:
    base = sequential(("a", "Dense", {}), ("b", "Dense", {}))
    base["config"]["name"] = "base"
    config = functional(IN, ("in2", []), ("c", [["base", "base:1"]]), outputs=["c"])
    base["inbound_nodes"] = [[["in", 0, 0, {}]], [["in2", 0, 0, {}]]]
    config["config"]["layers"].insert(2, base)
    assert order(config, "base/b", "base/a", "c") == ["base/a", "base/b", "c"]
    base["inbound_nodes"] = [[["in", 0, 0, {}]], [["base", 0, 0, {}]]]  # what it gives it is given again
    assert order(config, "base/b", "base/a") is None


def test_layers_in_custom_layers_and_separable_convolutions() -> None:
    config = functional(IN, ("x", [["in"]]), ("y", [["x"]]), outputs=["y"], cls="Block")
    assert order(config, "y/up", "x/up") == ["x/up", "y/up"]
    assert order(config, "x/up", "x/down", "y/up") is None
    config = sequential(("s", "SeparableConv1D", {}), ("t", "SeparableConv1D", {}))
    paths = ["s/depthwise", "s/pointwise", "t/depthwise", "t/pointwise"]
    assert order(config, *paths) == paths


def test_a_long_chain_needs_no_recursion() -> None:
    names = [f"d{number}" for number in range(3000)]
    entries = [(name, [[before]]) for name, before in zip(names, ["in", *names], strict=False)]
    config = functional(IN, *entries, outputs=[names[-1]])
    assert order(config, *names) == names


class Mine(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


def seq(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


SHARED = linear()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (seq(linear(), nn.ReLU(), linear()), True),
        (seq(linear(), seq(nn.ReLU(), linear()), seq(seq(linear()))), True),
        (Net(inner=seq(linear(), linear()), act=nn.ReLU()), True),
        (seq(Net(a=linear()), Net(b=linear())), True),
        (seq(Net(a=seq(linear(), linear())), Net(b=linear())), True),
        (seq(nn.LSTM(2, 2, num_layers=2), linear()), True),
        (nn.LSTM(2, 2, num_layers=3), True),
        (linear(), True),
        (Mine(linear(), linear()), False),
        (seq(linear(), nn.ModuleList([linear(), linear()])), False),
        (seq(linear(), Net(a=linear(), b=linear())), False),
        (Net(a=seq(linear()), b=seq(linear())), False),
        (Net(a=seq(linear(), linear()), b=linear()), False),
        (seq(SHARED, linear(), SHARED), False),
        (Net(a=seq(SHARED, linear()), b=seq(linear(), SHARED)), False),
        (seq(seq(SHARED), linear(), seq(SHARED)), False),
    ],
    ids=range(16),
)
def test_which_modules_run_in_order(model: nn.Module, expected: bool) -> None:
    found, _ = torch_layers_of(model)
    assert run_in_order(found, model) is expected


def test_the_order_of_some_modules() -> None:
    model = Net(a=linear(), b=seq(linear(), Net(x=linear(), y=linear()), linear()))
    found = {torch_layer.path: torch_layer for torch_layer in torch_layers_of(model)[0]}
    for paths, expected in ((("b.0", "b.2"), True), (("b.0", "b.1.x", "b.2"), True), (("b.1.x", "b.1.y"), False)):
        assert run_in_order([found[path] for path in paths], model) is expected
