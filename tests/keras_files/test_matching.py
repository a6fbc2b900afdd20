"""Which layer of Keras is which module of PyTorch."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from keras_memory import checkpoint_of, layer_of
from keras_stored import DATA, Net, assert_is, assert_same_datasets, build, dense, load, sequential, write_h5

from torch_adadelta.keras import KerasFileError, Layout, load_keras, save_keras
from torch_adadelta.keras.correspondence import Match
from torch_adadelta.keras.fits import _are_same
from torch_adadelta.keras.layouts import WeightPlacement
from torch_adadelta.keras.matching import match


def test_several_possibilities_are_an_error_that_lists_both_sides(tmp_path: Path) -> None:
    layers = {"first": dense(4, 4, 1), "second": dense(4, 4, 2), "third": dense(4, 1)}
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(b=nn.Linear(4, 4), a=nn.Linear(4, 4), c=nn.Linear(4, 1))
    with pytest.raises(KerasFileError) as caught:
        load(path, model)
    assert str(caught.value).replace(str(tmp_path), "TMP") == (
        """\
TMP/m.h5: which layer is which module cannot be told
Found: third → c
Left of Keras:
  first (class unknown): kernel (4, 4), bias (4,)
  second (class unknown): kernel (4, 4), bias (4,)
Left of PyTorch:
  b (Linear): weight (4, 4), bias (4,)
  a (Linear): weight (4, 4), bias (4,)
first may be b or a
second may be b or a
Pass config=model.to_json(), which has their classes and their order; or give them in mapping={'layer': 'module'}; or \
pass match='order' if the modules are defined in the order of the layers, or match='order_within_kind' if those are that \
fit the same layers"""
    )
    load(path, model, match="order")
    assert_is(model.b.weight, layers["first"]["kernel"].T)
    optimizer = load(path, model, mapping={"first": "a"})
    assert_is(model.a.weight, layers["first"]["kernel"].T)
    assert_is(model.b.weight, layers["second"]["kernel"].T)
    assert_is(optimizer.state[model.b.weight]["square_avg"], layers["second"]["kernel"].T ** 2)
    assert_is(optimizer.state[model.a.bias]["acc_delta"], layers["first"]["bias"] ** 2 / 2)


def matched(model: nn.Module, layers: dict[str, Any], config: Any = None, **options: Any) -> dict[str, str]:
    """From weights of Keras to parameters; `layers` has the shapes by class and role, or Dense kernels."""
    own = []
    for path, given in layers.items():
        class_name, weights = given if isinstance(given[1], dict) else ("Dense", {"kernel": given})
        arrays = {role: np.ones(shape) for role, shape in weights.items()}
        own.append(layer_of(path, class_name, {}, arrays))
    checkpoint = checkpoint_of(config, own)
    found: Match = match(checkpoint, model, **options)
    return {transfer.label: transfer.name for transfer in found.transfers}


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


TWO = {"one": (4, 4), "two": (4, 4)}


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (("two", "one"), ("one", "two")),
        (("module.two", "module.one"), ("one", "two")),
        (("_orig_mod.two", "_orig_mod.one"), ("one", "two")),
        (("a.one", "b.one"), ("b/one", "a/one")),  # whole paths
        (("x.two", "y.one"), ("b/one", "c/two")),  # or their last parts
    ],
)
def test_names_decide_if_all_rivals_have_them(names: tuple[str, str], layers: tuple[str, str]) -> None:
    model = nn.Module()
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], linear(4, 4))
    found = matched(model, dict.fromkeys(layers, (4, 4)))
    for layer, name in zip(layers, reversed(names), strict=True):
        assert found[f"{layer}/kernel"] == f"{name}.weight"


def test_names_that_some_have_decide_nothing() -> None:
    with pytest.raises(KerasFileError, match="cannot be told"):
        matched(Net(two=linear(4, 4), other=linear(4, 4)), TWO)
    with pytest.raises(KerasFileError, match="by match='names', some names differ"):
        matched(Net(a=linear(4, 3)), {"one": (4, 3)}, how="names")
    assert matched(Net(one=linear(4, 3)), {"one": (4, 3)}, how="names") == {"one/kernel": "one.weight"}
    two = Net(x=Net(one=linear(4, 4)), y=Net(one=linear(4, 4)))
    with pytest.raises(KerasFileError, match=r"one may be x\.one or y\.one"):
        matched(two, {"one": (4, 4)})
    with pytest.raises(KerasFileError, match="cannot be told"):
        matched(two, {"a/one": (4, 4), "b/one": (4, 4)})
    crossed = Net(dec=Net(dense=linear(4, 4)), enc=Net(dense_1=linear(4, 4)))
    with pytest.raises(KerasFileError, match="cannot be told"):
        matched(crossed, {"enc/dense": (4, 4), "dec/dense_1": (4, 4)})
    assert matched(crossed, {"dense": (4, 4), "x/dense_1": (4, 4)})["dense/kernel"] == "dec.dense.weight"
    # A name does not make fit what does not.
    assert matched(Net(one=linear(3, 4), two=linear(4, 4)), {"two": (3, 4), "one": (4, 4)}) == {
        "two/kernel": "one.weight", "one/kernel": "two.weight"
    }  # fmt: skip


def test_the_order_decides_between_two_chains_only() -> None:
    chain = nn.Sequential(linear(4, 4), nn.Sequential(nn.ReLU(), linear(4, 4)))
    expected = {"one/kernel": "0.weight", "two/kernel": "1.1.weight"}
    config = sequential(("one", "Dense", {}), ("act", "Activation", {}), ("two", "Dense", {}))
    assert matched(chain, TWO, config) == matched(chain, dict(reversed(TWO.items())), config) == expected
    branches = {"class_name": "Functional", "config": {"layers": [
        {"class_name": "Dense", "config": {"name": name}, "inbound_nodes": [[["in", 0, 0, {}]]]} for name in TWO
    ]}}  # fmt: skip
    for model, own in (
        (Net(x=linear(4, 4), y=linear(4, 4)), config),
        (chain, branches),
        (chain, None),
        (Net(x=nn.Sequential(linear(4, 4)), y=nn.Sequential(linear(4, 4))), config),
    ):
        with pytest.raises(KerasFileError, match="cannot be told"):
            matched(model, TWO, own)
        assert next(iter(matched(model, TWO, own, how="order").values())) in ("x.weight", "x.0.weight", "0.weight")


def test_an_assignment_that_is_the_only_possible_is_taken() -> None:
    """A class that the file does not tell, beside one that it does: of two modules each fits, one is left."""
    norm = {"gamma": (4,), "beta": (4,)}
    layers = {"a": (None, norm), "b": ("LayerNormalization", norm), "c": ("LayerNormalization", norm)}
    modules = {"x": nn.LayerNorm(4), "y": nn.GroupNorm(2, 4), "z": nn.LayerNorm(4)}
    with pytest.raises(KerasFileError) as caught:
        matched(Net(**modules), layers, flatten="channels_last")
    assert "Found: a → y\nLeft of Keras:\n  b (LayerNormalization)" in str(caught.value)
    assert "b may be x or z" in str(caught.value)
    # What is certain is taken from those that compete, and then names decide for the others.
    layers = {"a": (None, norm), "z": ("LayerNormalization", norm), "x": ("LayerNormalization", norm)}
    found = matched(Net(**modules), layers, flatten="channels_last")
    assert [found[f"{layer}/gamma"] for layer in layers] == ["y.weight", "z.weight", "x.weight"]


def test_the_order_decides_for_what_lies_in_a_sequential() -> None:
    """Though the model as a whole is no chain, on neither side."""
    config = {"class_name": "Functional", "config": {"layers": [
        {"class_name": "InputLayer", "config": {"name": "in"}, "inbound_nodes": []},
        *({"class_name": "Dense", "config": {"name": name}, "inbound_nodes": [[[before, 0, 0, {}]]]}
          for name, before in (("one", "in"), ("two", "one"), ("left", "in"), ("right", "in"))),
        {"class_name": "Concatenate", "config": {"name": "all"},
         "inbound_nodes": [[["two", 0, 0, {}], ["left", 0, 0, {}], ["right", 0, 0, {}]]]},
    ], "output_layers": [["all", 0, 0]]}}  # fmt: skip
    layers = TWO | {"left": (4, 3), "right": (4, 2)}
    model = Net(r=linear(4, 2), l=linear(4, 3), trunk=nn.Sequential(linear(4, 4), nn.ReLU(), linear(4, 4)))
    found = matched(model, layers, config)
    assert found == {
        "one/kernel": "trunk.0.weight", "two/kernel": "trunk.2.weight",
        "left/kernel": "l.weight", "right/kernel": "r.weight",
    }  # fmt: skip
    # One of two Sequentials of the same shapes: which one cannot be told.
    two = Net(a=nn.Sequential(linear(4, 4)), b=nn.Sequential(linear(4, 4)), l=linear(4, 3), r=linear(4, 2))
    with pytest.raises(KerasFileError, match=r"one may be a\.0 or b\.0"):
        matched(two, layers, config)
    # Layers in branches have no order, though their modules have.
    layers = {"left": (4, 4), "right": (4, 4), "one": (4, 3), "two": (3, 3)}
    model = Net(x=nn.Sequential(linear(4, 4), linear(4, 4)), y=linear(4, 3), z=linear(3, 3))
    with pytest.raises(KerasFileError, match=r"left may be x\.0 or x\.1"):
        matched(model, layers, config)


def test_the_order_within_a_kind() -> None:
    layers = {"n1": ("LayerNormalization", {"gamma": (4,), "beta": (4,)}), "out": (4, 3), "one": (4, 4)}
    layers |= {"n2": layers["n1"], "two": (4, 4)}
    modules = {"d": nn.Linear(4, 3, bias=False), "two": linear(4, 4), "m": nn.LayerNorm(4), "one": linear(4, 4)}
    model = Net(**modules, n=nn.LayerNorm(4))
    with pytest.raises(KerasFileError, match=r"or match='order_within_kind' if those are that fit the same layers"):
        matched(model, layers)
    with pytest.raises(KerasFileError, match="match='order', n1 would be d: it is a layer_norm"):
        matched(model, layers, how="order")
    # The names of one and two decide, and the order for the rest.
    assert matched(model, layers, how="order_within_kind") == {
        "n1/gamma": "m.weight", "n1/beta": "m.bias", "n2/gamma": "n.weight", "n2/beta": "n.bias",
        "out/kernel": "d.weight", "one/kernel": "one.weight", "two/kernel": "two.weight",
    }  # fmt: skip
    checkpoint = checkpoint_of(None, [layer_of(name, "Dense", {}, {"kernel": np.ones((4, 4))}) for name in TWO])
    checkpoint.is_ordered = False
    with pytest.raises(KerasFileError, match="the file does not hold the order of the layers"):
        match(checkpoint, Net(x=linear(4, 4), y=linear(4, 4)), how="order_within_kind")
    with pytest.raises(KerasFileError, match=r"Left of Keras:\n  one"):
        matched(Net(x=linear(4, 4)), TWO, how="order_within_kind")


def test_a_thousand_layers_of_one_shape_are_quickly_matched() -> None:
    names = [f"d{number}" for number in range(1000)]
    config = sequential(*((name, "Dense", {}) for name in names))
    begin = time.process_time()
    found = matched(nn.Sequential(*(linear(4, 4) for _ in names)), dict.fromkeys(names, (4, 4)), config)
    assert time.process_time() - begin < 10
    assert found == {f"{name}/kernel": f"{number}.weight" for number, name in enumerate(names)}


def attention(heads: int) -> tuple[str, dict[str, Any]]:
    shapes = {f"{part}/kernel": (4, heads, 4 // heads) for part in ("query", "key", "value")}
    return "MultiHeadAttention", shapes | {"output/kernel": (heads, 4 // heads, 4)}


def test_modules_of_the_same_shapes_need_not_fit_the_same_layers() -> None:
    convolutions = {
        "deep": nn.Conv2d(4, 4, 3, groups=4, bias=False),
        "plain": nn.Conv2d(1, 4, 3, bias=False),  # which the other's weight fits
    }
    layers = {"plain": ("Conv2D", {"kernel": (3, 3, 1, 4)}), "deep": ("DepthwiseConv2D", {"kernel": (3, 3, 4, 1)})}
    for names in (("plain", "deep"), ("deep", "plain")):
        found = matched(Net(**{name: convolutions[name] for name in names}), layers)
        assert found == {"plain/kernel": "plain.weight", "deep/kernel": "deep.weight"}
    model = Net(**{f"m{heads}": nn.MultiheadAttention(4, heads, bias=False) for heads in (2, 1, 4)})
    found = matched(model, {f"k{heads}": attention(heads) for heads in (1, 4, 2)})
    for heads in (1, 2, 4):
        assert found[f"k{heads}/query/kernel"] == f"m{heads}.in_proj_weight"


def test_the_order_must_be_known_and_fit() -> None:
    checkpoint = checkpoint_of(None, [layer_of(name, "Dense", {}, {"kernel": np.ones((4, 4))}) for name in TWO])
    checkpoint.is_ordered = False
    with pytest.raises(KerasFileError, match=r"does not hold the order of the layers; pass config=model\.to_json\(\)"):
        match(checkpoint, Net(x=linear(4, 4), y=linear(4, 4)), how="order")
    with pytest.raises(KerasFileError, match="match='order', one would be x: kernel would be"):
        matched(Net(x=linear(4, 4), y=linear(3, 4)), {"one": (3, 4), "two": (4, 4)}, how="order")
    with pytest.raises(KerasFileError, match=r"Left of Keras:\n  one"):
        matched(Net(x=linear(4, 4)), TWO, how="order")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"a": (4, 3)}, r"Left of Keras:\n  two .*\nLeft of PyTorch: nothing"),
        ({"a": (4, 3), "b": (3, 1), "c": (1, 1)}, r"Left of Keras: nothing\nLeft of PyTorch:\n  c "),
        ({"a": (4, 3), "b": (3, 1), "c": (3, 1)}, r"two may be b or c"),
        ({"a": (4, 3), "b": (4, 1)}, r"two fits none of them: kernel would be \(1, 3\), and weight is \(1, 4\)"),
    ],
)
def test_what_is_missing_on_one_side_is_an_error(modules: dict[str, tuple[int, int]], message: str) -> None:
    with pytest.raises(KerasFileError, match=message):
        matched(Net(**{name: linear(*shape) for name, shape in modules.items()}), {"one": (4, 3), "two": (3, 1)})


def test_layers_that_compete_for_one_module_are_both_named() -> None:
    with pytest.raises(KerasFileError, match=r"Left of Keras:\n  one .*\n  two .*\nLeft of PyTorch:\n  a "):
        matched(Net(a=linear(4, 4)), TWO)
    # Here the names would make a pair that does not fit, and the only assignment is another.
    norm = {"gamma": (4,), "beta": (4,)}
    layers = {"a": ("LayerNormalization", norm), "b": (None, norm)}
    found = matched(Net(a=nn.GroupNorm(2, 4), b=nn.LayerNorm(4)), layers, flatten="channels_last")
    assert (found["a/gamma"], found["b/gamma"]) == ("b.weight", "a.weight")


def test_a_layer_may_be_left_out() -> None:
    assert matched(Net(a=linear(4, 3)), {"one": (4, 3), "two": (3, 1)}, mapping={"two": None}) == {
        "one/kernel": "a.weight"
    }
    # What has neither state nor weights that PyTorch knows is not missed.
    layers = {"one": (4, 3), "odd": ("Discretization", {"bins": (5,)})}
    assert matched(Net(a=linear(4, 3)), layers) == {"one/kernel": "a.weight"}
    odd = layer_of("odd", "Discretization", {}, {"bins": np.ones(5), "sums": np.ones(4)})
    odd.variables[1].square_avg = odd.variables[1].value
    with pytest.raises(KerasFileError, match="odd fits none of them"):
        match(checkpoint_of(None, [odd]), Net())
    model = Net(a=linear(4, 3))
    model.scale = nn.Parameter(torch.ones(2))
    with pytest.raises(KerasFileError, match="outside of modules that are known: scale"):
        matched(model, {"one": (4, 3)})


def test_kinds_that_the_file_does_not_tell_apart() -> None:
    """A layer of unknown class fits each module of its shapes."""
    weights = {"gamma": (4,), "beta": (4,)}
    for module in (nn.LayerNorm(4), nn.GroupNorm(2, 4)):
        assert matched(Net(n=module), {"norm": (None, weights)}) == {"norm/gamma": "n.weight", "norm/beta": "n.bias"}
    with pytest.raises(KerasFileError, match="norm fits none of them: there is no module of its kind left"):
        matched(Net(n=nn.GroupNorm(2, 4)), {"norm": ("LayerNormalization", weights)})
    square = {"kernel": (3, 3, 4, 4)}
    assert matched(Net(c=nn.Conv2d(4, 4, 3, bias=False)), {"conv": (None, square)}) == {"conv/kernel": "c.weight"}
    assert matched(Net(c=nn.ConvTranspose2d(4, 4, 3, bias=False)), {"conv": (None, square)}) == {
        "conv/kernel": "c.weight"
    }
    # Of one channel, both kinds of convolution lie in the same way.
    one = {"kernel": (3, 1, 2)}
    assert matched(Net(c=nn.Conv1d(1, 2, 3, bias=False)), {"conv": (None, one)}) == {"conv/kernel": "c.weight"}
    with pytest.raises(KerasFileError, match="cannot be told"):
        matched(Net(n=nn.LayerNorm(4)), {"norm": (None, {"0": (4,)})})
    with pytest.raises(KerasFileError, match="norm may be a layer_norm or layer_norm, and the file does not say which"):
        matched(Net(n=nn.LayerNorm(4)), {"norm": (None, {"0": (4,)})}, mapping={"norm": "n"})  # gamma or beta


@pytest.mark.parametrize(
    ("shape", "ours", "theirs", "expected"),
    [
        ((4, 3), Layout((1, 0)), Layout((1, 0)), True),
        ((4, 3), Layout((1, 0)), Layout((0, 1), (3, 4)), False),
        ((1, 3), Layout((1, 0)), Layout((0, 1), (3, 1)), True),
        ((1, 1 << 20), Layout((1, 0)), Layout((0, 1), (1 << 20, 1)), True),
        ((1, (1 << 20) + 1), Layout((1, 0)), Layout((0, 1), ((1 << 20) + 1, 1)), False),  # too large to be tried
    ],
    ids=range(5),
)
def test_layouts_that_move_every_element_to_the_same_place(
    shape: tuple[int, ...], ours: Layout, theirs: Layout, expected: bool
) -> None:
    layer = layer_of("layer", None, {}, {"kernel": np.broadcast_to(1.0, shape)})
    for param, row in (("weight", None), ("other", None), ("weight", 1)):
        placements = [WeightPlacement("kernel", "weight", ours)], [WeightPlacement("kernel", param, theirs, row)]
        assert _are_same(*placements, layer) == (expected and (param, row) == ("weight", None))


def test_a_fit_is_of_the_module_not_of_its_shapes() -> None:
    attention = {f"{part}/kernel": (6, 2, 3) for part in ("query", "key", "value")} | {"output/kernel": (2, 3, 6)}
    for heads, bias_k, message in (
        (2, False, None),
        (3, False, "it has 2 heads, and the module 3"),
        (2, True, "add_bias_kv"),
    ):
        model = Net(
            a=nn.MultiheadAttention(6, heads, bias=False, add_bias_kv=bias_k), b=nn.MultiheadAttention(6, 2, bias=False)
        )
        layers = dict.fromkeys(("a", "b"), ("MultiHeadAttention", attention))
        if message is None:
            assert matched(model, layers)["a/query/kernel"] == "a.in_proj_weight"
        else:
            with pytest.raises(KerasFileError, match=message):
                matched(model, layers, mapping={"a": "a"})
    depthwise = {"kernel": (3, 4, 3)}
    for groups, fits in ((4, True), (2, False)):
        model = Net(c=nn.Conv1d(4 if fits else 2, 12, 3, groups=groups, bias=False))
        if fits:
            assert matched(model, {"d": ("DepthwiseConv1D", depthwise)}) == {"d/kernel": "c.weight"}
        else:
            with pytest.raises(KerasFileError, match="it has 4 channels, and the module 2 groups"):
                matched(model, {"d": ("DepthwiseConv1D", depthwise)})


def test_weights_are_given_explicitly(tmp_path: Path) -> None:
    kernel = np.arange(24.0).reshape(12, 2)
    layers = {"one": {"kernel": kernel, "bias": np.ones(2)}, "odd": {"scale": np.ones((2, 3))}}
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(a=nn.Linear(12, 2))
    model.scale = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    layout = Layout(view=(4, 3, 2), permutation=(2, 1, 0), shape=(2, 12))
    mapping = {"one/kernel": ("a.weight", layout), "one/bias": "a.bias", "odd/scale": ("scale", (1, 0))}
    optimizer = load(path, model, mapping=mapping)
    assert_is(model.a.weight, kernel.reshape(4, 3, 2).transpose(2, 1, 0).reshape(2, 12))
    assert_is(model.scale, np.ones((3, 2)))
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    assert_same_datasets(path, tmp_path / "back.h5")
    for wrong, message in (
        ({"one/kernel": "a.weight"}, r"kernel of shape \(12, 2\) would be \(12, 2\), and a.weight is \(2, 12\)"),
        ({"one/kernel": ("a.weight", (0,))}, "cannot be turned"),
        ({"one/kernel": ("a.nothing", (1, 0))}, "the model has no parameter of that name"),
        ({"one/kernel": None}, "is None, which leaves out layers as a whole, such as one"),
        ({"one/kernel": ["a.weight"]}, "the model has no parameter of that name"),
        ({"one": ("a", (1, 0))}, r"is \('a', \(1, 0\)\), which is no module with parameters"),
        ({"one/nothing": "a.weight"}, "has 'one/nothing', and one has kernel, bias"),
        ({"nothing": "a"}, "no layer and no weight"),
        ({"one": "b"}, "no module with parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, model, mapping=wrong)


def test_what_is_given_must_fit_and_is_given_once() -> None:
    model = Net(a=linear(4, 4), b=linear(4, 3))
    layers = {"one": (4, 4), "two": (4, 3)}
    with pytest.raises(
        KerasFileError, match=r"mapping\['one'\]: one does not fit b: kernel would be \(4, 4\), and weight is"
    ):
        matched(model, layers, mapping={"one": "b"})
    # A weight that was given leaves the rest of its module to be frozen.
    model = Net(a=nn.Linear(4, 4))
    found = match(checkpoint_of(None, [layer_of("one", "Dense", {}, {"kernel": np.ones((4, 4))})]), model,
                  {"one/kernel": ("a.weight", (1, 0))})  # fmt: skip
    assert [name for name, _ in found.neutral] == ["a.bias"]


def test_arguments_are_checked() -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match="match must be one of auto, names, order, order_within_kind, got 'guess'"):
        load_keras(DATA / "k3.h5", optimizer, model, match="guess")
    with pytest.raises(
        ValueError, match="flatten must be 'channels_first' or 'channels_last', or a dictionary, got 'chw'"
    ):
        load_keras(DATA / "k3.h5", optimizer, model, flatten="chw")
    assert optimizer.iterations == 0
