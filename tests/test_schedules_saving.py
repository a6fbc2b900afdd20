"""Configurations of schedules: saved, loaded, of subclasses, and what is refused."""

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from test_schedules import bits, every_example, float32, with_arguments
from torch import Tensor

from torch_adadelta import schedules
from torch_adadelta.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    LinearCosineDecay,
    NoisyLinearCosineDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
    deserialize,
    serialize,
)

# ---- Saving ---------------------------------------------------------------------------------------------------------


@every_example
def test_round_trips(schedule: Any) -> None:
    config = schedule.get_config()
    copies = [
        type(schedule).from_config(config),
        deserialize(serialize(schedule)),
        deserialize(json.loads(json.dumps(serialize(schedule)))),
        deserialize(_through_torch_load(serialize(schedule))),
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
    ]
    for other in copies:
        assert type(other) is type(schedule)
        assert other is not schedule
        assert other.get_config() == config
        assert repr(other) == repr(schedule)
        assert [bits(other(t)) for t in range(30)] == [bits(schedule(t)) for t in range(30)]


def _through_torch_load(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_example
@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor], ids=["np.float64", "np.float32", "Tensor"])
def test_configs_hold_plain_numbers(schedule: Any, kind: Callable[[float], Any]) -> None:
    config = with_arguments(schedule, kind).get_config()
    assert json.loads(json.dumps(config)) == config
    assert _through_torch_load(config) == config
    flat = [item for value in config.values() for item in (value if isinstance(value, list) else [value])]
    assert {type(item) for item in flat} <= {int, float, bool, str, type(None)}


def test_serialize_is_the_form_of_r2_4() -> None:
    assert serialize(ExponentialDecay(0.1, 10, 0.5, name="mine")) == {
        "class_name": "ExponentialDecay",
        "config": {
            "initial_learning_rate": 0.1,
            "decay_steps": 10,
            "decay_rate": 0.5,
            "staircase": False,
            "name": "mine",
        },
    }
    assert "name" not in CosineDecay(0.1, 10).get_config()
    assert CosineDecay(0.1, 10).get_config().keys() == {"initial_learning_rate", "decay_steps", "alpha"}
    for warm in (CosineDecay(0.1, 10, warmup_target=0.2), CosineDecay(0.1, 10, warmup_steps=3)):
        assert {"warmup_target", "warmup_steps"} <= warm.get_config().keys()


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "CosineDecay", "config": {"initial_learning_rate": 0.1, "decay_steps": 10}},
        {
            "class_name": "CosineDecay",
            "config": {"initial_learning_rate": 0.1, "decay_steps": 10, "alpha": 0.0, "name": None},
        },
        {
            "module": "keras.optimizers.schedules",
            "class_name": "CosineDecay",
            "config": {
                "initial_learning_rate": 0.1,
                "decay_steps": 10,
                "alpha": 0.0,
                "name": "CosineDecay",
                "warmup_target": None,
                "warmup_steps": 0,
            },
            "registered_name": None,
        },
        {
            "module": "keras.optimizers.schedules",
            "class_name": "CosineDecay",
            "config": {
                "initial_learning_rate": {"class_name": "__tensor__", "config": {"value": 0.1, "dtype": "float32"}},
                "decay_steps": 10,
            },
            "registered_name": None,
        },
    ],
    ids=["short", "r2.4", "Keras 3", "Keras 3, a tensor"],
)
def test_deserialize_reads_every_generation(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    schedule = deserialize(config)
    assert type(schedule) is CosineDecay
    assert schedule(5) == CosineDecay(0.1, 10)(5)
    assert config == before


@pytest.mark.parametrize("foreign", [{"module": "mine.schedules"}, {"registered_name": "mine>CosineDecay"}], ids=str)
def test_a_class_of_another_package_is_not_keras_class_of_that_name(foreign: dict[str, str]) -> None:
    config = serialize(CosineDecay(0.1, 10))
    deserialize(config | {"module": "keras.optimizers.schedules", "registered_name": None})
    with pytest.raises(ValueError, match="Unknown schedule"):
        deserialize(config | foreign)


def test_deserialize_keeps_the_precision_of_a_tensor() -> None:
    rate = {"class_name": "__tensor__", "config": {"value": 0.1, "dtype": "float64"}}
    config = {"initial_learning_rate": rate, "decay_steps": 3, "decay_rate": 0.7}
    assert deserialize({"class_name": "InverseTimeDecay", "config": config})(5) == 0.1 / (1 + float32(0.7) * (5 / 3))
    config = {"boundaries": [2], "values": [rate, 0.2]}
    assert deserialize({"class_name": "PiecewiseConstantDecay", "config": config})(0) == 0.1


def test_a_noisy_config_without_a_seed() -> None:
    config = serialize(NoisyLinearCosineDecay(0.1, 10, seed=3))
    del config["config"]["seed"]
    torch.manual_seed(0)
    expected = NoisyLinearCosineDecay(0.1, 10)
    torch.manual_seed(0)
    assert deserialize(config).seed == expected.seed


# ---- Subclasses -----------------------------------------------------------------------------------------------------


class Inverse(LearningRateSchedule):
    """The example of the documentation."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def __call__(self, step: Any) -> Any:
        return self.learning_rate / (step + 1)

    def get_config(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate}


class WithoutConfig(LearningRateSchedule):
    """As little as training needs."""

    def __call__(self, step: Any) -> Any:
        return 0.5


def test_a_subclass_of_the_base() -> None:
    schedule = Inverse(0.5)
    assert schedule(1) == 0.25
    assert repr(schedule) == "Inverse(learning_rate=0.5)"
    config = serialize(schedule)
    assert config == {"class_name": "Inverse", "config": {"learning_rate": 0.5}}
    assert deserialize(config, {"Inverse": Inverse})(1) == 0.25
    newer = {**config, "module": "mine", "registered_name": "mine>Inverse"}
    assert deserialize(newer, {"mine>Inverse": Inverse})(1) == 0.25
    assert deserialize(newer, {"Inverse": Inverse})(1) == 0.25


def test_a_subclass_without_a_config() -> None:
    schedule = WithoutConfig()
    assert schedule(3) == 0.5
    assert repr(schedule).startswith("<")
    for call in (lambda: serialize(schedule), lambda: LearningRateSchedule()(0)):
        with pytest.raises(NotImplementedError, match="must override"):
            call()


def test_a_subclass_of_a_schedule() -> None:
    class Floored(ExponentialDecay):
        def _value(self, step: Tensor) -> Tensor:
            return super()._value(step).clamp(min=0.05)

    schedule = Floored(0.1, 10, 0.5)
    assert schedule(1000) == float32(0.05)
    assert type(deserialize(serialize(schedule), {"Floored": Floored})) is Floored


def test_custom_objects_come_first() -> None:
    config = serialize(ExponentialDecay(0.1, 10, 0.5))

    class Mine(ExponentialDecay):
        pass

    assert type(deserialize(config, {"ExponentialDecay": Mine})) is Mine
    assert type(deserialize(config, {"Other": Mine})) is ExponentialDecay


# ---- Refusals -------------------------------------------------------------------------------------------------------

COMPLETE: Final[dict[type, dict[str, Any]]] = {
    ExponentialDecay: {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5},
    PolynomialDecay: {"initial_learning_rate": 0.1, "decay_steps": 10, "end_learning_rate": 0.01, "power": 2.0},
    InverseTimeDecay: {"initial_learning_rate": 0.1, "decay_steps": 10, "decay_rate": 0.5},
    CosineDecay: {
        "initial_learning_rate": 0.1,
        "decay_steps": 10,
        "alpha": 0.1,
        "warmup_target": 0.2,
        "warmup_steps": 3,
    },
    CosineDecayRestarts: {
        "initial_learning_rate": 0.1,
        "first_decay_steps": 10,
        "t_mul": 2.0,
        "m_mul": 0.5,
        "alpha": 0.1,
    },
    LinearCosineDecay: {
        "initial_learning_rate": 0.1,
        "decay_steps": 10,
        "num_periods": 0.5,
        "alpha": 0.1,
        "beta": 0.1,
    },
    NoisyLinearCosineDecay: {
        "initial_learning_rate": 0.1,
        "decay_steps": 10,
        "initial_variance": 1.0,
        "variance_decay": 0.5,
        "num_periods": 0.5,
        "alpha": 0.1,
        "beta": 0.1,
    },
}
POSITIVE: Final = ("decay_steps", "first_decay_steps", "t_mul")
NOT_NEGATIVE: Final = ("warmup_steps", "initial_variance")


@pytest.mark.parametrize(
    ("schedule", "name"),
    [(schedule, name) for schedule, arguments in COMPLETE.items() for name in arguments],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_every_argument_is_checked(schedule: type, name: str) -> None:
    arguments = COMPLETE[schedule]
    schedule(**arguments)
    wrong: list[Any] = [math.nan, math.inf, 1e39, 10**400, torch.tensor(math.nan), np.float32(math.nan), torch.ones(2)]
    wrong += [-1, torch.tensor(-1.0), np.int64(-1)] if name in POSITIVE + NOT_NEGATIVE else []
    wrong += [0, 0.0, 1e-50, torch.tensor(0)] if name in POSITIVE else []
    wrong += [torch.ones((), device="meta")]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            schedule(**{**arguments, name: value})
    none = [] if name == "warmup_target" else [None]
    for value in ["0.1", True, 1j, torch.tensor(True), torch.tensor(1j), [0.1], *none]:
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            schedule(**{**arguments, name: value})


@pytest.mark.parametrize("name", ["initial_learning_rate", "decay_rate"])
def test_a_negative_rate_is_no_error(name: str) -> None:
    schedule = InverseTimeDecay(**{**COMPLETE[InverseTimeDecay], name: -0.1})
    assert math.isfinite(schedule(5))


# The words people see.
MESSAGES: Final[list[tuple[Callable[[], Any], type[Exception], str]]] = [
    (lambda: ExponentialDecay(0.1, 0, 0.5), ValueError, "Invalid decay_steps: 0; it must be a finite number > 0 that fits float32"),
    (lambda: CosineDecay(0.1, 5, warmup_target=1.0, warmup_steps=-1), ValueError, "Invalid warmup_steps: -1; it must be a finite number >= 0 that fits float32"),
    (lambda: PolynomialDecay(float("nan"), 5), ValueError, "Invalid initial_learning_rate: nan; it must be a finite number that fits float32"),
    (lambda: PolynomialDecay(np.float64("inf"), 5), ValueError, "Invalid initial_learning_rate: np.float64(inf); it must be a finite number that fits float32"),
    (lambda: PolynomialDecay("0.1", 5), TypeError, "initial_learning_rate must be a number or a one-element Tensor, got '0.1' of type str"),
    (lambda: PolynomialDecay(torch.ones(2), 5), ValueError, "initial_learning_rate must be a number or a one-element Tensor, got a Tensor of shape (2,)"),
    (lambda: PolynomialDecay(torch.ones((), device="meta"), 5), ValueError, "initial_learning_rate is a Tensor on the meta device, which has no value"),
    (lambda: PolynomialDecay(torch.tensor(True), 5), TypeError, "initial_learning_rate must be a real number, got a Tensor of torch.bool"),
    (lambda: PolynomialDecay(0.1, 5, cycle=1), TypeError, "cycle must be True or False, got 1 of type int"),
    (lambda: PolynomialDecay(0.1, 5, name=1), TypeError, "name must be a string or None, got 1 of type int"),
    (lambda: NoisyLinearCosineDecay(0.1, 5, seed=0.5), TypeError, "seed must be an int or None, got 0.5 of type float"),
    (lambda: ExponentialDecay.from_config({"decay_step": 5}), TypeError, "ExponentialDecay.__init__() got an unexpected keyword argument 'decay_step'"),
    (lambda: PiecewiseConstantDecay([1, 2], [0.1, 0.2]), ValueError, "values must be one more than boundaries, got 2 values for 2 boundaries; the first value is for the steps up to the first boundary"),
    (lambda: PiecewiseConstantDecay([2, 2], [0.1, 0.2, 0.3]), ValueError, "boundaries must increase strictly, got [2, 2]"),
    (lambda: PiecewiseConstantDecay([2, "3"], [0.1, 0.2, 0.3]), TypeError, "boundaries[1] must be a number or a one-element Tensor, got '3' of type str"),
    (lambda: PiecewiseConstantDecay([2], [0.1, float("inf")]), ValueError, "Invalid values[1]: inf; it must be a finite number that fits float32"),
    (lambda: PiecewiseConstantDecay(2, [0.1, 0.2]), TypeError, "boundaries must be a list of numbers, got 2 of type int"),
    (lambda: PiecewiseConstantDecay(np.array([2]), [0.1, 0.2]), TypeError, "boundaries must be a list of numbers, got array([2]) of type ndarray"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(-1), ValueError, "Invalid step: -1; it must be a number >= 0 below 2**63, the count of finished steps"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(float("nan")), ValueError, "Invalid step: nan; it must be a number >= 0 below 2**63, the count of finished steps"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(2**63), ValueError, "Invalid step: 9223372036854775808; it must be a number >= 0 below 2**63, the count of finished steps"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)("3"), TypeError, "step must be a number or a one-element Tensor, got '3' of type str"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(True), TypeError, "step must be a number or a one-element Tensor, got True of type bool"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(torch.zeros(2)), ValueError, "step must be a number or a one-element Tensor, got a Tensor of shape (2,)"),
    (lambda: ExponentialDecay(0.1, 10, 0.5)(torch.tensor(True)), TypeError, "step must be a real number, got a Tensor of torch.bool"),
    (lambda: deserialize({"class_name": "Mine", "config": {}}), ValueError, "Unknown schedule 'Mine': Keras has ExponentialDecay, PiecewiseConstantDecay, PolynomialDecay, InverseTimeDecay, CosineDecay, CosineDecayRestarts, LinearCosineDecay, NoisyLinearCosineDecay. Pass the class of another in custom_objects, as in custom_objects={'Mine': Mine}"),
    (lambda: deserialize({"module": "x.y", "class_name": "CosineDecay", "config": {}, "registered_name": "x>CosineDecay"}), ValueError, "Unknown schedule 'x>CosineDecay': Keras has ExponentialDecay, PiecewiseConstantDecay, PolynomialDecay, InverseTimeDecay, CosineDecay, CosineDecayRestarts, LinearCosineDecay, NoisyLinearCosineDecay. Pass the class of another in custom_objects, as in custom_objects={'CosineDecay': CosineDecay}"),
    (lambda: deserialize({"class_name": "CosineDecay"}), ValueError, "A schedule's config must have the keys 'class_name' and 'config', got ['class_name']; `serialize(schedule)` makes one"),
    (lambda: deserialize("CosineDecay"), TypeError, "A schedule's config must be a dict, got 'CosineDecay' of type str"),
    (lambda: serialize(0.1), TypeError, "Only a LearningRateSchedule can be serialized, got 0.1"),
    (lambda: serialize(WithoutConfig()), NotImplementedError, "WithoutConfig must override `get_config(self)` to be saved"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_everything_public_is_listed() -> None:
    classes = {name for name, value in vars(schedules).items() if isinstance(value, type) and not name.startswith("_")}
    mine = {name for name in classes if getattr(schedules, name).__module__ == schedules.__name__}
    assert mine | {"serialize", "deserialize"} == set(schedules.__all__)
