"""What a configuration says of a model and an optimizer, in the notations of all generations."""

import json
from typing import Any, Final

import pytest

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.config import Call, ModelConfig, hyperparameters, parsed, snake_case
from torch_adadelta.keras.errors import KerasFileError, NoStateError

# ---- JSON -----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    found: Any = {}
    for level in range(depth):
        found = [found] if level % 2 and level < depth - 1 else {"a": found}
    return found


def test_objects_are_parsed() -> None:
    assert parsed(b'{"a": [1, {"b": null}]}', "x") == {"a": [1, {"b": None}]}
    assert parsed(json.dumps(nested(150)), "x") == nested(150)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x is no JSON"),
        (b"\xff\xfe\xff", "x is no JSON"),
        ('{"a": ' + "1" * 100_000 + "}", "x is no JSON"),
        ("[]", "x is a list, not a JSON object"),
        ('"text"', "x is a str, not"),
        (json.dumps(nested(151)), "x is nested more than 150 deep"),
        (json.dumps({"deep": nested(150), "flat": {}}), "x is nested more than 150 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "x is n"),
    ],
    ids=range(8),
)
def test_what_is_no_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(KerasFileError, match=message):
        parsed(text, "x")


# ---- Code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        {"class_name": "Lambda", "config": {}},
        {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
        {"class_name": "Custom", "config": {}, "function_type": "lambda"},
    ],
    ids=["layer", "value", "function"],
)
def test_lambdas_are_named_wherever_they_are(code: dict[str, Any]) -> None:
    named = {**code, "config": {**code["config"], "name": "scale"}}
    dense = {"class_name": "Dense", "config": {"name": "a", "activation": code, "function_type": "function"}}
    wrapped = {"class_name": "TimeDistributed", "config": {"name": "b", "layer": named}}
    harmless = {"class_name": "Dense", "config": {"name": "Lambda"}}
    for layers, expected in (
        ([harmless, named], ["scale"]),
        ([dense, wrapped, named], ["a", "scale"]),
        ([harmless], []),
    ):
        inner = {"class_name": "Sequential", "config": {"name": "inner", "layers": layers}}
        for model in (inner, {"class_name": "Sequential", "config": {"layers": [inner]}}):
            assert ModelConfig(model).lambdas == expected
    assert ModelConfig({"class_name": "Sequential", "config": {"layers": []}, "compile_config": named}).lambdas == []


# ---- The optimizer --------------------------------------------------------------------------------------------------


def adadelta(class_name: str = "Adadelta", **options: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": options}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (adadelta(learning_rate=0.5, rho=0.9, epsilon=1e-6), {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-6}),
        (adadelta(lr=0.5), {"learning_rate": 0.5}),
        (adadelta(lr=0.5, learning_rate=0.25), {"learning_rate": 0.25}),
        (adadelta("Custom>Adadelta", rho=0), {"rho": 0}),
        (adadelta(decay=0.1, clipvalue=0.0, clipnorm=None), {"decay": 0.1, "clipvalue": 0.0}),
        (adadelta(clipnorm=1.0, global_clipnorm=2.0), {"clipnorm": 1.0, "global_clipnorm": 2.0}),
        (adadelta(name="mine", jit_compile=True, momentum=0.9), {}),
        (adadelta(weight_decay=0, gradient_accumulation_steps=1, ema_overwrite_frequency=0), {}),
        (adadelta(use_ema=True, ema_momentum=0.5), {"use_ema": True, "ema_momentum": 0.5}),
        (adadelta(use_ema=False, ema_momentum=0.5), {"use_ema": False, "ema_momentum": 0.5}),  # which may be used later
        (adadelta(weight_decay=0.1, ema_overwrite_frequency=2), {"weight_decay": 0.1, "ema_overwrite_frequency": 2}),
        (
            adadelta(loss_scale_factor=2.0, gradient_accumulation_steps=3),
            {"loss_scale_factor": 2.0, "gradient_accumulation_steps": 3},
        ),
        (adadelta(decoupled_weight_decay=False), {}),
        (adadelta(use_ema=None, weight_decay=None, gradient_accumulation_steps=None, loss_scale_factor=None), {}),
        (adadelta(weight_decay=False), {}),
    ],
)
def test_options_are_taken(config: Any, expected: dict[str, Any]) -> None:
    assert hyperparameters(config, ()) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is damaged"),
        ({"class_name": "Adadelta"}, "is damaged"),
        (adadelta("Adam"), "its optimizer is Adam, not Adadelta"),
        (adadelta(""), "its optimizer is unknown, not"),
        (adadelta("AdadeltaW"), "is AdadeltaW, not"),
    ],
)
def test_another_optimizer_is_refused(config: Any, message: str) -> None:
    with pytest.raises(KerasFileError, match=message):
        hyperparameters(config, set(configs.DROPPABLE))


@pytest.mark.parametrize("key", ["inner_optimizer", "optimizer"])
@pytest.mark.parametrize("name", ["LossScaleOptimizer", "LossScaleOptimizerV1", "Custom>LossScaleOptimizerV3"])
def test_the_optimizer_in_a_loss_scale_optimizer_is_the_one(name: str, key: str) -> None:
    assert configs.is_scaled(adadelta(name))
    assert configs.inner_optimizer(adadelta(name, **{key: adadelta(rho=0.5)})) == adadelta(rho=0.5)
    assert configs.inner_optimizer(adadelta(rho=0.5)) == adadelta(rho=0.5)
    for damaged in ({"class_name": name}, adadelta(name), adadelta(name, **{key: 3})):
        with pytest.raises(KerasFileError, match="is damaged"):
            hyperparameters(configs.inner_optimizer(damaged), ())
    with pytest.raises(NoStateError, match="its optimizer is SGD, not Adadelta"):
        hyperparameters(configs.inner_optimizer(adadelta(name, **{key: adadelta("SGD")})), ())


@pytest.mark.parametrize(
    ("drop", "options", "state"),
    [
        ("ema", {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}, ["ema"]),
        ("weight_decay", {"weight_decay": 0.1}, []),
        ("gradient_accumulation", {"gradient_accumulation_steps": 4}, ["gradient_accumulation"]),
    ],
)
def test_what_is_added_to_adadelta_can_be_left_out(drop: str, options: dict[str, Any], state: list[str]) -> None:
    config = adadelta(rho=0.5, **options)
    others = set(configs.DROPPABLE) - {drop}
    assert hyperparameters(config, others) == {"rho": 0.5, **options}
    assert hyperparameters(config, {drop}) == {"rho": 0.5}
    assert configs.dropped_options({drop}) == set(options)
    assert configs.optional_state(config["config"]) == state
    assert configs.optional_state(dict.fromkeys(options)) == []


def test_the_state_that_options_ask_for_is_in_the_order_of_files() -> None:
    both = {"gradient_accumulation_steps": 2, "use_ema": True}
    assert configs.optional_state(both) == ["ema", "gradient_accumulation"]
    for neutral in ({"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 0}, {"use_ema": False}):
        assert configs.optional_state(neutral) == []


LEFT_OUT: Final = "clipnorm=0 means no clipping in this Keras, and is left out"


@pytest.mark.parametrize(
    ("given", "expected", "notes"),
    [
        ({}, {}, []),
        ({"clipnorm": 0}, {}, [LEFT_OUT]),
        ({"clipvalue": 0.0, "global_clipnorm": 0}, {}, None),
        ({"clipnorm": 0.0, "global_clipnorm": 2.0}, {"global_clipnorm": 2.0}, [LEFT_OUT]),
        (
            {"clipvalue": 0.5, "clipnorm": 1.0},
            {"clipnorm": 1.0},
            ["clipvalue=0.5 does nothing in this Keras beside clipnorm, and is left out"],
        ),
        ({"clipnorm": 1.0, "global_clipnorm": 2.0, "clipvalue": 3.0}, {"clipnorm": 1.0}, None),
        ({"clipvalue": 3.0, "global_clipnorm": 2.0}, {"global_clipnorm": 2.0}, None),
        ({"clipnorm": 1.0, "clipvalue": 0}, {"clipnorm": 1.0}, None),
    ],
)
def test_clip_options_that_do_nothing(given: dict[str, Any], expected: dict[str, Any], notes: Any) -> None:
    found, own = configs.without_idle_clipping({"rho": 0.5, **given})
    assert found == {"rho": 0.5, **expected}
    assert own == notes if notes is not None else len(own) == len(given) - len(expected)


# ---- The model ------------------------------------------------------------------------------------------------------


def tensor(name: str, call: int = 0, output: int = 0, *, is_keras3: bool) -> Any:
    history = [name, call, output]
    if not is_keras3:
        return [*history, {}]
    return {"class_name": "__keras_tensor__", "config": {"shape": [None, 4], "keras_history": history}}


def layer(class_name: str, name: str, *calls: list[Any], **options: Any) -> dict[str, Any]:
    """A layer and the tensors of each call."""
    nodes: list[Any] = [call if isinstance(call[0], list) else {"args": call, "kwargs": {}} for call in calls]
    return {"class_name": class_name, "config": {"name": name, **options}, "inbound_nodes": nodes}


def model_of(*layers: dict[str, Any], class_name: str = "Functional", **options: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": "model", **options, "layers": list(layers)}}


def chain(*names: str, **options: Any) -> dict[str, Any]:
    layers = [{"class_name": "Dense", "config": {"name": name, **options}} for name in names]
    return model_of(*layers, class_name="Sequential")


def test_a_sequential_model() -> None:
    model = ModelConfig(chain("a", "b", "c"))
    assert model.is_complete is True
    assert [layer.path for layer in model.layers] == list(model.by_path()) == ["a", "b", "c"]
    assert [layer.group for layer in model.layers] == ["layers/dense", "layers/dense_1", "layers/dense_2"]
    assert model.calls == {"a": [[]], "b": [[Call("a", 0)]], "c": [[Call("b", 0)]]}
    assert model.outputs == [Call("c", 0)]
    # Before Keras 2.3 the layers had nothing around them.
    old = ModelConfig({"class_name": "Sequential", "config": chain("a", "b")["config"]["layers"]})
    assert (old.calls, old.is_complete) == ({"a": [[]], "b": [[Call("a", 0)]]}, True)


@pytest.mark.parametrize("is_keras3", [False, True])
def test_a_functional_model(is_keras3: bool) -> None:
    """Calls are counted from the first that the layer had, perhaps in another model: one too high is the last."""

    def of(name: str, *where: int) -> Any:
        return tensor(name, *where, is_keras3=is_keras3)

    config = model_of(
        layer("InputLayer", "x"),
        layer("InputLayer", "y"),
        layer("Dense", "shared", [of("x")], [of("y")]),
        layer("Custom>Conv2DTranspose", "b", [of("shared")]),
        layer("Add", "add", [of("shared", 9), of("x")] if not is_keras3 else [[of("shared", 9), of("x")]]),
        input_layers={"x": ["x", 0, 0]} if is_keras3 else [["x", 0, 0]],
        output_layers={"sum": ["add", 0, 0]} if is_keras3 else ["add", 0, 0],
    )
    model = ModelConfig(config)
    assert model.calls == {
        "x": [[]],
        "y": [[]],
        "shared": [[Call("x", 0)], [Call("y", 0)]],
        "b": [[Call("shared", 0)]],
        "add": [[Call("shared", 1), Call("x", 0)]],
    }
    assert [layer.group for layer in model.layers] == [
        "layers/input_layer", "layers/input_layer_1", "layers/dense", "layers/conv2d_transpose", "layers/add"
    ]  # fmt: skip
    assert model.layers[3].class_name == "Conv2DTranspose"
    assert (model.outputs, model.is_complete) == ([Call("add", 0)], True)


def test_keywords_of_a_call_are_inputs_too() -> None:
    call = [["x", 0, 0, {"value": ["y", 0, 0], "size": ["z", 1]}]]
    keras3 = {"args": [tensor("x", is_keras3=True)], "kwargs": {"value": tensor("y", is_keras3=True)}}
    for node in (call, keras3):
        attend = {"class_name": "Attention", "config": {"name": "a"}, "inbound_nodes": [node]}
        model = ModelConfig(
            model_of(layer("InputLayer", "x"), layer("InputLayer", "y"), attend, output_layers=["a", 0, 0])
        )
        assert model.calls["a"] == [[Call("x", 0), Call("y", 0)]]


def test_a_model_in_a_model() -> None:
    """It is called twice, with two inputs in another order, and one of its outputs is used."""
    inner = {
        **model_of(
            layer("InputLayer", "left"),
            layer("InputLayer", "right"),
            layer("Dense", "one", [["left", 0, 0, {}]]),
            layer("Dense", "two", [["right", 0, 0, {}]], trainable=False),
            input_layers=[["right", 0, 0], ["left", 0, 0]],
            output_layers=[["one", 0, 0], ["two", 0, 0]],
        ),
        "inbound_nodes": [[["x", 0, 0, {}], ["y", 0, 0, {}]], [["y", 0, 0, {}], ["x", 0, 0, {}]]],
    }
    inner["config"]["name"] = "inner"
    config = model_of(
        layer("InputLayer", "x"),
        layer("InputLayer", "y"),
        inner,
        layer("Dense", "first", [["inner", 0, 0, {}]]),
        layer("Dense", "last", [["inner", 1, 1, {}]]),
        output_layers=[["first", 0, 0]],
    )
    model = ModelConfig(config)
    assert model.is_complete
    assert model.calls["inner/one"] == [[Call("inner/left", 0)], [Call("inner/left", 1)]]
    assert model.calls["inner/left"] == [[Call("y", 0)], [Call("x", 0)]]
    assert model.calls["inner/right"] == [[Call("x", 0)], [Call("y", 0)]]
    assert model.calls["first"] == [[Call("inner/one", 0)]]
    assert model.calls["last"] == [[Call("inner/two", 1)]]
    assert model.outputs == [Call("first", 0)]
    by_path = model.by_path()
    assert by_path["inner/one"].group == "layers/functional/layers/dense"
    assert by_path["first"].group == "layers/dense"
    assert (by_path["inner/one"].is_trainable, by_path["inner/two"].is_trainable) == (True, False)
    inner["config"]["trainable"] = False  # of the whole
    assert [layer.path for layer in ModelConfig(config).layers if layer.is_trainable] == ["x", "y", "first", "last"]


def test_a_sequential_model_in_another() -> None:
    inner = {"class_name": "Sequential", "config": chain("up", "down")["config"] | {"name": "inner"}}
    model = ModelConfig(model_of(inner, {"class_name": "Dense", "config": {"name": "out"}}, class_name="Sequential"))
    assert model.calls == {
        "inner/up": [[]],
        "inner/down": [[Call("inner/up", 0)]],
        "out": [[Call("inner/down", 0)]],
    }
    assert [layer.group for layer in model.layers] == [
        "layers/sequential/layers/dense", "layers/sequential/layers/dense_1", "layers/dense"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "Net", "config": {}},
        {"class_name": "Net"},
        model_of(layer("Dense", "a", [["nothing", 0, 0, {}]]), output_layers=["a", 0, 0]),
        *(
            model_of({"class_name": name, "config": {"name": "inner"}}, class_name="Sequential")
            for name in ("Sequential", "Functional", "Model")
        ),
    ],
    ids=["subclass", "nothing", "input", "sequential", "functional", "model"],
)
def test_a_model_that_is_not_all_known_is_not_complete(config: dict[str, Any]) -> None:
    model = ModelConfig(config)
    assert model.is_complete is False


def test_a_model_of_a_class_of_its_own_has_the_layers_that_it_lists() -> None:
    inner = {"class_name": "Mine", "config": chain("a")["config"] | {"name": "inner"}}
    model = ModelConfig(model_of(inner, class_name="Sequential"))
    assert [layer.path for layer in model.layers] == ["inner/a"]


@pytest.mark.parametrize("entry", [3, {}, {"class_name": "Dense"}, {"config": []}])
def test_layers_that_are_none_are_refused(entry: Any) -> None:
    with pytest.raises(KerasFileError, match="a layer that is none"):
        ModelConfig(model_of(entry))


def test_too_many_calls_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of nested models multiply."""

    def nested_in(inner: dict[str, Any], depth: int) -> dict[str, Any]:
        name = inner["config"]["name"]
        twice = {**inner, "inbound_nodes": [[["in", 0, 0, {}]], [["in", 0, 0, {}]]]}
        found = model_of(layer("InputLayer", "in"), twice, output_layers=[[name, 0, 0]])
        found["config"]["name"] = f"m{depth}"
        return found

    config: dict[str, Any] = {"class_name": "Dense", "config": {"name": "dense"}}
    for depth in range(4):
        config = nested_in(config, depth)
    monkeypatch.setattr(configs, "_MAX_CALLS", 45)
    assert len(ModelConfig(config).calls["m2/m1/m0/dense"]) == 16
    monkeypatch.setattr(configs, "_MAX_CALLS", 44)
    with pytest.raises(KerasFileError, match="are called more than 44 times"):
        ModelConfig(config)
    monkeypatch.undo()
    for depth in range(4, 40):
        config = nested_in(config, depth)
    with pytest.raises(KerasFileError, match="are called more than 100000 times"):
        ModelConfig(config)


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("Dense", "dense"),
        ("Conv2DTranspose", "conv2d_transpose"),
        ("SeparableConv1D", "separable_conv1d"),
        ("LSTM", "lstm"),
        ("BatchNormalization", "batch_normalization"),
        ("GRUCell", "gru_cell"),
        ("MultiHeadAttention", "multi_head_attention"),
        ("My Layer", "my_layer"),
        ("MyLayer", "my_layer"),
    ],
)
def test_names_of_groups(class_name: str, expected: str) -> None:
    assert snake_case(class_name) == expected
