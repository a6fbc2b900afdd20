"""What the user gives: parts of models, single weights, rows of parameters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
from keras_memory import checkpoint_of, layer_of
from keras_stored import DATA, Net, Weights, assert_is, assert_same_datasets, build, dense, load, sequential, write_h5

from torch_adadelta.keras import KerasFileError, Layout, load_keras, save_keras
from torch_adadelta.keras.mapping import Part
from torch_adadelta.keras.matching import match


def attention(seed: int, prefix: str = "") -> Weights:
    rng = np.random.default_rng(seed)
    shapes = {f"{part}/{role}": shape for part in ("query", "key", "value") for role, shape in
              (("kernel", (4, 2, 2)), ("bias", (2, 2)))}  # fmt: skip
    shapes |= {"attention_output/kernel": (2, 2, 4), "attention_output/bias": (4,)}
    return {f"{prefix}{role}": rng.standard_normal(shape) for role, shape in shapes.items()}


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}/{role}": value for role, value in weights.items()}


def block_weights(seed: int) -> Weights:
    """Of a custom layer with an attention, two Dense layers and two normalisations of one shape."""
    rng = np.random.default_rng(seed)
    norms = {f"norm{n}": {role: rng.standard_normal(4) for role in ("gamma", "beta")} for n in (1, 2)}
    return (
        attention(seed, "attend/")
        | prefixed("ffn/up", dense(4, 6, seed))
        | prefixed("ffn/down", dense(6, 4, seed))
        | prefixed("norm1", norms["norm1"])
        | prefixed("norm2", norms["norm2"])
    )


def block() -> Net:
    return Net(
        attend=nn.MultiheadAttention(4, 2),
        mlp=nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
        norm1=nn.LayerNorm(4),
        norm2=nn.LayerNorm(4),
    )


def assert_is_block(module: Any, weights: Weights) -> None:
    kernels = [weights[f"attend/{part}/kernel"].reshape(4, 4).T for part in ("query", "key", "value")]
    assert_is(module.attend.in_proj_weight, np.concatenate(kernels))
    assert_is(module.attend.out_proj.bias, weights["attend/attention_output/bias"])
    assert_is(module.mlp[0].weight, weights["ffn/up/kernel"].T)
    assert_is(module.mlp[2].bias, weights["ffn/down/bias"])
    assert_is(module.norm1.weight, weights["norm1/gamma"])
    assert_is(module.norm2.bias, weights["norm2/beta"])


def test_a_custom_layer_is_a_module_with_modules_in_it(tmp_path: Path) -> None:
    layers = {"one": block_weights(1), "two": block_weights(2), "head": dense(4, 4, 3)}
    config = sequential(("one", "Block", {}), ("two", "Block", {}), ("head", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", layers, config)
    model = Net(second=block(), first=block(), last=nn.Linear(4, 4))
    with pytest.raises(KerasFileError, match="cannot be told"):
        load(path, model)
    mapping = {"two": "second", "one": "first"}
    optimizer = load(path, model, mapping=mapping)
    assert_is_block(model.first, layers["one"])
    assert_is_block(model.second, layers["two"])
    assert_is(optimizer.state[model.second.norm2.weight]["acc_delta"], layers["two"]["norm2/gamma"] ** 2 / 2)
    kernel = optimizer.state[model.first.attend.in_proj_weight]["square_avg"]
    assert_is(kernel[4:8], layers["one"]["attend/key/kernel"].reshape(4, 4).T ** 2)
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    assert_same_datasets(path, tmp_path / "back.h5")
    # Blocks in a Sequential are in order, and so is what is in them, but for two of one shape in one block.
    chain = nn.Sequential(block(), block(), nn.Linear(4, 4)).double()
    with pytest.raises(
        KerasFileError, match=r"one/norm1 may be 0\.norm1 or 0\.norm2 or 1\.norm1 or 1\.norm2"
    ) as caught:
        load(path, chain)
    assert "one/attend → 0.attend, two/attend → 1.attend, one/ffn/up → 0.mlp.0, two/ffn/up → 1.mlp.0" in str(
        caught.value
    )
    load(path, chain, mapping={"one": "0", "two": "1"})
    assert_is_block(chain[0], layers["one"])
    assert_is_block(chain[1], layers["two"])


def test_what_is_left_over_in_a_part_is_an_error_that_lists_that_part(tmp_path: Path) -> None:
    layers = {"one": block_weights(1), "head": dense(4, 4)}
    path = write_h5(tmp_path / "m.h5", layers, sequential(("one", "Block", {}), ("head", "Dense", {})))
    model = Net(block=block(), head=nn.Linear(4, 4))
    model.block.more = nn.Linear(4, 9)
    with pytest.raises(KerasFileError) as caught:
        load(path, model, mapping={"one": "block"})
    message = str(caught.value)
    assert "which layer is which module by mapping['one'], block, cannot be told" in message
    assert "Left of Keras: nothing\nLeft of PyTorch:\n  block.more (Linear): weight (9, 4), bias (9,)" in message
    assert "head" not in message.partition("Left of Keras")[2]
    model = Net(block=Net(norm1=nn.LayerNorm(4)), head=nn.Linear(4, 4))
    with pytest.raises(KerasFileError, match=r"one/attend fits none of them: there is no module of its kind left"):
        load(path, model, mapping={"one": "block"})


def shapes(**layers: tuple[int, int]) -> Any:
    own = [layer_of(path.replace("_", "/"), "Dense", {}, {"kernel": np.ones(shape)}) for path, shape in layers.items()]
    return checkpoint_of(None, own)


def linear(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def pairs(checkpoint: Any, model: nn.Module, mapping: dict[str, Any], **options: Any) -> dict[str, str]:
    return {t.layer.path: t.name for t in match(checkpoint, model, mapping, **options).transfers}


def test_several_parts_and_parts_in_parts() -> None:
    checkpoint = shapes(a_b_x=(4, 4), a_b_y=(4, 3), a_x=(4, 4), c_x=(4, 4), x=(4, 4))
    model = Net(m=Net(n=Net(p=linear(), q=linear(4, 3)), r=linear()), s=linear(), t=linear())
    mapping = {"a": "m", "a/b": "m.n", "c": "s"}
    expected = {"a/b/x": "m.n.p.weight", "a/b/y": "m.n.q.weight", "a/x": "m.r.weight", "c/x": "s.weight"}
    for keys in (list(mapping), list(reversed(mapping))):
        found = pairs(checkpoint, model, {key: mapping[key] for key in keys})
        assert found == expected | {"x": "t.weight"}
    # Names count from the part on; and none of a part is left for another.
    model = Net(m=Net(b=Net(y=linear(4, 3), x=linear()), x=linear()), c=Net(x=linear()), x=linear())
    assert pairs(checkpoint, model, {"a": "m"}) == {
        "a/b/x": "m.b.x.weight", "a/b/y": "m.b.y.weight", "a/x": "m.x.weight", "c/x": "c.x.weight", "x": "x.weight",
    }  # fmt: skip
    # None leaves all below out, but for what has a longer key.
    found = pairs(checkpoint, Net(s=linear(), t=linear(), u=linear()), {"a": None, "a/x": "s", "c": "u"})
    assert found == {"a/x": "s.weight", "c/x": "u.weight", "x": "t.weight"}
    # The whole model.
    assert pairs(shapes(a_x=(4, 4), a_y=(4, 3)), Net(p=linear(4, 3), q=linear()), {"a": ""}) == {
        "a/x": "q.weight", "a/y": "p.weight",
    }  # fmt: skip
    assert pairs(shapes(a_x=(4, 4), a_y=(4, 4)), Net(m=Net(p=linear(), q=linear())), {"a": "m"}, how="order") == {
        "a/x": "m.p.weight", "a/y": "m.q.weight",
    }  # fmt: skip


def test_keys_and_targets_that_are_none() -> None:
    checkpoint = shapes(a_x=(4, 4), a_y=(4, 3))
    model = Net(m=Net(p=linear(), q=linear(4, 3)), r=nn.ReLU())
    for mapping, message in (
        ({"a": "r"}, r"mapping\['a'\] is 'r', which is no module with parameters"),
        ({"a": ("m", (1, 0))}, "which is no module with parameters"),
        ({"a": "m.p.weight"}, "which is no module with parameters"),
        ({"a/x": "m", "a/y": "m"}, "mapping has 'm' for both 'a/x' and 'a/y'"),
        ({"": "m"}, "mapping has '', which is no layer and no weight"),
        ({3: "m"}, "mapping has 3, which is no layer and no weight"),
        ({"aa": "m"}, "mapping has 'aa', which is no layer and no weight"),
    ):
        with pytest.raises(ValueError, match=message):
            match(checkpoint, model, mapping)


def test_names_in_a_part() -> None:
    part = Part("block", "net.b")
    checkpoint = shapes(block_up=(4, 4))
    assert [part.name_of_layer(path) for path in (checkpoint.layers[0].path, "other")] == ["up", "other"]
    assert (part.why, Part().why) == ("mapping['block']", "")


def test_weights_go_to_rows_of_a_parameter(tmp_path: Path) -> None:
    """Query, key and value that are Dense layers of their own."""
    layers = {name: dense(4, 4, seed) for seed, name in enumerate(("value", "query", "key"))}
    layers["out"] = dense(4, 4, 9)
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(attend=nn.MultiheadAttention(4, 2))
    mapping: dict[str, Any] = {"out/kernel": ("attend.out_proj.weight", (1, 0)), "out/bias": "attend.out_proj.bias"}
    for number, name in enumerate(("query", "key", "value")):
        rows = f"[{4 * number}:{4 * number + 4}]"
        mapping[f"{name}/kernel"] = (f"attend.in_proj_weight{rows}", Layout(permutation=(1, 0)))
        mapping[f"{name}/bias"] = f"attend.in_proj_bias{rows}"
    optimizer = load(path, model, mapping=mapping)
    for number, name in enumerate(("query", "key", "value")):
        rows = slice(4 * number, 4 * number + 4)
        assert_is(model.attend.in_proj_weight[rows], layers[name]["kernel"].T)
        state = optimizer.state[model.attend.in_proj_bias]["square_avg"]
        assert_is(state[rows], layers[name]["bias"] ** 2)
    assert [len(pieces) for pieces in optimizer.norm_variables or []] == [1] * 6
    save_keras(tmp_path / "back.h5", optimizer, model, path, mapping=mapping)
    assert_same_datasets(path, tmp_path / "back.h5")
    for change, message in (
        ({"key/bias": "attend.in_proj_bias[4:9]"}, r"bias of shape \(4,\) would be \(4,\), and .*\[4:9\] is \(5,\)"),
        ({"key/bias": "attend.in_proj_bias[10:14]"}, r"attend.in_proj_bias of shape \(12,\) has no such rows"),
        ({"key/bias": "attend.in_proj_bias[8:4]"}, "has no such rows"),
        ({"key/bias": "attend.nothing[0:4]"}, "the model has no parameter of that name"),
        ({"key/bias": None}, "is None, which leaves out layers as a whole, such as key"),
        ({"key/bias": "attend.in_proj_bias[5:9]"}, r"mapping has query/bias|nothing for attend.in_proj_bias\[4:5\]"),
        ({"key/bias": "attend.in_proj_bias[0:4]"}, r"mapping has .* for attend.in_proj_bias\[0:4\], and"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, model, mapping=mapping | change)
    without = {key: target for key, target in mapping.items() if not key.startswith("key")}
    with pytest.raises(ValueError, match=r"nothing for attend.in_proj_weight\[4:8\]"):
        load(path, model, mapping=without | {"key": None})


def test_some_weights_are_given_and_the_others_follow(tmp_path: Path) -> None:
    kernel = np.arange(24.0).reshape(4, 6)
    layers = {"one": {"kernel": kernel, "bias": np.ones(6)}, "two": dense(4, 6, 1), "attend": attention(3)}
    path = write_h5(tmp_path / "m.h5", layers)
    model = Net(conv=nn.Conv1d(4, 6, 1), lin=nn.Linear(4, 6), attend=nn.MultiheadAttention(4, 2))
    # A Dense layer that is a convolution here; and one of four parts of an attention.
    mapping = {
        "one/kernel": ("conv.weight", Layout(permutation=(1, 0), shape=(6, 4, 1))),
        "attend/key/kernel": ("attend.in_proj_weight[4:8]", Layout(permutation=(1, 2, 0), shape=(4, 4))),
    }
    load(path, model, mapping=mapping, flatten="channels_last")
    assert_is(model.conv.weight, kernel.T[..., None])
    assert_is(model.conv.bias, np.ones(6))
    assert_is(model.lin.bias, layers["two"]["bias"])
    kernels = [layers["attend"][f"{part}/kernel"].reshape(4, 4).T for part in ("query", "key", "value")]
    assert_is(model.attend.in_proj_weight, np.concatenate(kernels))
    for change, message in (
        ({"one/kernel": ("lin.weight", (1, 0)), "two/bias": "lin.bias"}, "which mapping has already|nothing for"),
        ({"attend/key/kernel": ("lin.weight", Layout((1, 2, 0), (6, 4), (4, 6, 1)))}, "would be|cannot be turned"),
        ({"one/bias": "lin.bias", "one/kernel": ("conv.weight", Layout((1, 0), (6, 4, 1))), "two/bias": "conv.bias"},
         "some weights of two, and not kernel: kernel would be"),
        ({"attend/query/bias": ("attend.in_proj_bias[4:8]", Layout((0, 1), (4,)))},
         r"some weights of attend, and not .*: key/bias would go to attend.in_proj_bias\[4:8\], which mapping has"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(path, model, mapping=mapping | change, flatten="channels_last")


def test_weights_of_a_layer_that_is_of_no_kind_do_not_follow(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"odd": {"scale": np.ones(4), "shift": np.ones(4)}})
    model = Net(a=nn.LayerNorm(4))
    with pytest.raises(
        ValueError, match="mapping has some weights of odd, and not shift: where they go cannot be told"
    ):
        load(path, model, mapping={"odd/scale": "a.weight"})
    load(path, model, mapping={"odd/scale": "a.weight", "odd/shift": "a.bias"})
    assert_is(model.a.bias, torch.ones(4, dtype=torch.float64).numpy())


def test_arguments_of_another_type_are_named() -> None:
    model, optimizer = build()
    for mapping, message in (
        ([("d1", "0")], "mapping must be a dictionary, got list"),
        ({"d1/kernel": ("0.weight", 3)}, r"mapping\['d1/kernel'\] has 3 for 0.weight, which is no permutation"),
        ({"d1/kernel": ("0.weight", ("a", 1))}, r"has \('a', 1\) for 0.weight, which is no permutation and no Layout"),
    ):
        with pytest.raises(TypeError, match=message):
            load_keras(DATA / "k3.h5", optimizer, model, mapping=mapping)
    with pytest.raises(TypeError, match="config must be a dictionary, JSON or the path of a file, got int"):
        load_keras(DATA / "k3.h5", optimizer, model, config=3)
