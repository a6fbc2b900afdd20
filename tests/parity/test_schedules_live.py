"""The schedules beside those of tf_keras and Keras 3: their values, and their configs in both directions."""

import functools
import itertools
import json
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from test_schedules import EXAMPLES, ULPS

from torch_adadelta import schedules

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
tf_keras = pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
keras = pytest.importorskip("keras", reason="needs the extra 'parity'")
tf.config.set_visible_devices([], "GPU")  # not CUDA_VISIBLE_DEVICES, which would hide them from PyTorch's tests too

# r2.4 had LinearCosineDecay and its noisy sister in tf.keras.experimental; tf_keras has them in this module only.
from tf_keras.src.optimizers.schedules import learning_rate_schedule as in_tf_keras  # noqa: E402

pytestmark = pytest.mark.xdist_group("tensorflow")

LIBRARIES: Final = {"tf_keras": in_tf_keras, "Keras 3": keras.optimizers.schedules}

# Around the ends of all decays and warm-ups below, and far beyond.
STEPS: Final = (
    *(
        *range(16),
        21,
        29,
        30,
        31,
        49,
        63,
        69,
        70,
        71,
        99,
        100,
        101,
        109,
        110,
        111,
        123,
        127,
        129,
        199,
        200,
        299,
        300,
        301,
    ),
    *(999, 1000, 1001, 4095, 8191, 12345, 32767, 10**6, 2**24 + 1),
)

LR: Final = "initial_learning_rate"


def product(**options: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


ARGUMENTS: Final[dict[str, list[dict[str, Any]]]] = {
    "ExponentialDecay": [
        *product(initial_learning_rate=[0.1], decay_steps=[1, 7], decay_rate=[0.96, 0.5], staircase=[False, True]),
        {LR: 1.7, "decay_steps": 1000, "decay_rate": 1.3},
        {LR: 0.1, "decay_steps": 7.5, "decay_rate": 0.0},
    ],
    "PiecewiseConstantDecay": [
        {"boundaries": [0], "values": [0.1, 0.2]},
        {"boundaries": [1, 3, 100], "values": [0.5, 0.25, 0.1, 0.7]},
        {"boundaries": [1.5, 3.0, 100.25], "values": [0.5, 0.25, 0.1, 0.7]},
        {"boundaries": [-0.5, 10**6, 2**24 + 1], "values": [0.5, 0.25, 0.1, 0.7]},
    ],
    "PolynomialDecay": [
        *product(initial_learning_rate=[0.1], decay_steps=[7, 100], power=[1.0, 0.5, 2.0, 0.9], cycle=[False, True]),
        {LR: 0.1, "decay_steps": 1, "end_learning_rate": 0.3, "power": 3.0, "cycle": True},
    ],
    "InverseTimeDecay": [
        *product(initial_learning_rate=[0.1], decay_steps=[1, 7], decay_rate=[0.96, 0.5], staircase=[False, True]),
        {LR: 1.7, "decay_steps": 1000, "decay_rate": 1.3},
        {LR: -0.1, "decay_steps": 7.5, "decay_rate": 0.0},
    ],
    "CosineDecay": [
        *product(initial_learning_rate=[0.1], decay_steps=[7, 300], alpha=[0.0, 0.1, 0.3]),
        *product(
            initial_learning_rate=[0.1], decay_steps=[110], alpha=[0.1], warmup_target=[0.9], warmup_steps=[0, 13]
        ),
        {LR: 0.0, "decay_steps": 100, "warmup_target": 1.7, "warmup_steps": 100},
        {LR: 0.1, "decay_steps": 100, "warmup_steps": 13},
    ],
    "CosineDecayRestarts": [
        *product(
            initial_learning_rate=[0.1], first_decay_steps=[1, 7], t_mul=[1.0, 2.0, 1.5], m_mul=[0.9], alpha=[0.1]
        ),
        *product(initial_learning_rate=[1.7], first_decay_steps=[1, 10, 30], t_mul=[2.0, 3.0]),
        {LR: 0.1, "first_decay_steps": 7, "t_mul": 0.5, "m_mul": 0.9},
    ],
    "LinearCosineDecay": [
        *product(initial_learning_rate=[0.1], decay_steps=[7, 300], num_periods=[0.5, 3.3], alpha=[0.0, 0.1]),
        {LR: 1.7, "decay_steps": 100, "num_periods": 10.0, "alpha": 0.3, "beta": 0.01},
    ],
    # Without variance: the noise itself is another in Keras, whose generator has a state.
    "NoisyLinearCosineDecay": product(
        initial_learning_rate=[0.1], decay_steps=[7, 300], num_periods=[0.5, 3.3], initial_variance=[0.0]
    ),
}
CASES: Final = [
    pytest.param(library, name, arguments, id=f"{library}-{name}-{i}")
    for library, module in LIBRARIES.items()
    for name, sets in ARGUMENTS.items()
    if hasattr(module, name)
    for i, arguments in enumerate(sets)
]


def ours(name: str, arguments: dict[str, Any]) -> Any:
    return getattr(schedules, name)(**arguments)


def theirs(library: str, name: str, arguments: dict[str, Any]) -> Any:
    return getattr(LIBRARIES[library], name)(**arguments)


@functools.cache
def tf_steps(dtype: str) -> list[Any]:
    return [tf.constant(t, dtype) for t in STEPS]


def values_of(schedule: Any, dtype: str) -> np.ndarray:
    return np.array([schedule(torch.tensor(t, dtype=getattr(torch, dtype))).item() for t in STEPS])


def keras_values_of(schedule: Any, dtype: str) -> np.ndarray:
    return np.array([np.asarray(schedule(step)) for step in tf_steps(dtype)])


def assert_as_near_as_promised(name: str, arguments: dict[str, Any], actual: np.ndarray, expected: np.ndarray) -> None:
    """Within the ulps of the class, of the initial rate, the rate of the warm-up or the value, whichever is largest."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    rate = max(abs(arguments.get(LR, 0.0)), arguments.get("warmup_target", 0.0))
    tolerance = ULPS[name] * np.spacing(np.maximum(np.abs(expected[finite]), expected.dtype.type(rate)))
    error = np.abs(actual[finite] - expected[finite].astype(np.float64))
    assert (error <= tolerance).all(), (error / tolerance).max()


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("library", "name", "arguments"), CASES)
def test_float32_values(library: str, name: str, arguments: dict[str, Any]) -> None:
    expected = keras_values_of(theirs(library, name, arguments), "int64")
    assert expected.dtype == np.float32
    assert_as_near_as_promised(name, arguments, values_of(ours(name, arguments), "int64"), expected)


def test_decay_is_followed_to_its_last_digits() -> None:
    """An ulp of the first value says little of one that is a millionth of it: here it is an ulp of each value."""
    arguments = {LR: 0.1, "decay_steps": 3, "decay_rate": 0.5}
    schedule, other = ours("ExponentialDecay", arguments), theirs("tf_keras", "ExponentialDecay", arguments)
    for t in range(360):  # up to 1e-37; TensorFlow flushes what is denormal
        expected = np.float32(other(tf.constant(t, tf.int64)))
        assert abs(schedule(t) - expected) <= 2 * np.spacing(expected), t


@pytest.mark.parametrize("dtype", ["int32", "float16", "float32", "float64"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_other_dtypes_of_the_step(name: str, dtype: str) -> None:
    """Keras casts a step to the dtype of the learning rate, and boundaries to the dtype of the step."""
    arguments = ARGUMENTS[name][-1]
    expected = keras_values_of(theirs("tf_keras", name, arguments), dtype)
    assert_as_near_as_promised(name, arguments, values_of(ours(name, arguments), dtype), expected)


@pytest.mark.parametrize("boundaries", [[3, 2**24 + 1], [2.5, 2.0**24 + 1], [2049, 70000], [-0.5, 3.0]], ids=str)
@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", "bfloat16", "float32", "float64"])
def test_boundaries_are_cast_as_keras_casts_them(boundaries: list[float], dtype: str) -> None:
    arguments = {"boundaries": boundaries, "values": [1.0, 0.5, 0.25]}
    schedule, other = ours("PiecewiseConstantDecay", arguments), theirs("tf_keras", "PiecewiseConstantDecay", arguments)
    for t in (0, 1, 2, 3, 4, 2047, 2048, 2049, 2050, 2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2):
        step = torch.tensor(t, dtype=torch.int64).to(getattr(torch, dtype))
        expected = float(other(tf.cast(tf.constant(t, tf.int64), dtype)))
        assert schedule(step).item() == expected, t


@pytest.mark.parametrize("t", [0, 1, 3, 3.5, 2.0**24 + 2])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_python_numbers_as_steps(name: str, t: float) -> None:
    arguments = ARGUMENTS[name][0]
    expected = np.array([np.float32(theirs("tf_keras", name, arguments)(t))])
    assert_as_near_as_promised(name, arguments, np.array([ours(name, arguments)(t)]), expected)


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    wide = {LR: np.float64(arguments[LR])} if LR in arguments else {"values": [*map(np.float64, arguments["values"])]}
    return {**arguments, **wide}


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - {"NoisyLinearCosineDecay"}))  # tf_keras draws float32 only
def test_a_float64_learning_rate(name: str) -> None:
    for arguments in ARGUMENTS[name][:5]:
        expected = keras_values_of(theirs("tf_keras", name, in_float64(arguments)), "int64")
        assert expected.dtype == np.float64
        assert_as_near_as_promised(name, arguments, values_of(ours(name, in_float64(arguments)), "int64"), expected)


def test_a_float32_tensor_as_alpha() -> None:
    """Then Keras, too, subtracts it from 1 in float32."""
    rate, alpha = 0.1, 0.1
    other = in_tf_keras.CosineDecay(tf.constant(rate), 10, tf.constant(alpha))
    schedule = schedules.CosineDecay(torch.tensor(rate), 10, torch.tensor(alpha))
    expected = keras_values_of(other, "int64")
    assert_as_near_as_promised("CosineDecay", {LR: rate}, values_of(schedule, "int64"), expected)


def test_restarts_come_when_those_of_keras_come() -> None:
    """On either side of the first 12 restarts, where the rounding of a quotient of logarithms decides."""
    for first, t_mul in itertools.product((1, 3, 10, 1000), (2.0, 1.5, 3.0)):
        arguments = {LR: 1.0, "first_decay_steps": first, "t_mul": t_mul, "alpha": 0.25}
        schedule, other = ours("CosineDecayRestarts", arguments), theirs("tf_keras", "CosineDecayRestarts", arguments)
        edges = {round(first * (t_mul**n - 1) / (t_mul - 1)) for n in range(1, 16)}
        for t in sorted({edge + d for edge in edges for d in (-1, 0, 1)}):
            assert abs(schedule(t) - float(other(tf.constant(t, tf.int64)))) <= 2 * 2.0**-24, (arguments, t)


# ---- Configs --------------------------------------------------------------------------------------------------------


def readers(library: str) -> list[Callable[[Any], Any]]:
    """Every way in which a Keras reads a config."""
    if library == "Keras 3":
        return [keras.optimizers.schedules.deserialize]
    return [
        in_tf_keras.deserialize,
        functools.partial(in_tf_keras.deserialize, use_legacy_format=True),
    ]


def writers(library: str) -> list[Callable[[Any], Any]]:
    if library == "Keras 3":
        return [keras.optimizers.schedules.serialize]
    return [in_tf_keras.serialize, functools.partial(in_tf_keras.serialize, use_legacy_format=True)]


def test_keras_3_lacks_two_schedules() -> None:
    lacking = {name for name in ARGUMENTS if not hasattr(LIBRARIES["Keras 3"], name)}
    assert lacking == {"LinearCosineDecay", "NoisyLinearCosineDecay"}
    assert all(hasattr(in_tf_keras, name) for name in ARGUMENTS)


@pytest.mark.parametrize(
    ("library", "schedule"),
    [
        pytest.param(library, schedule, id=f"{library}-{name}")
        for library, module in LIBRARIES.items()
        for name, schedule in EXAMPLES.items()
        if hasattr(module, type(schedule).__name__)
    ],
)
def test_keras_reads_our_configs(library: str, schedule: Any) -> None:
    class_name = type(schedule).__name__
    for read in readers(library):
        other = read(json.loads(json.dumps(schedules.serialize(schedule))))
        assert type(other) is getattr(LIBRARIES[library], class_name)
        assert schedule.get_config().items() <= other.get_config().items()
        assert type(other).from_config(schedule.get_config()).get_config() == other.get_config()
        value = float(other(tf.constant(6, tf.int64)))
        if class_name != "NoisyLinearCosineDecay":
            assert abs(value - schedule(6)) <= ULPS[class_name] * np.spacing(np.float32(0.3))


@pytest.mark.parametrize(("library", "name", "arguments"), CASES)
def test_we_read_the_configs_of_keras(library: str, name: str, arguments: dict[str, Any]) -> None:
    other = theirs(library, name, arguments)
    for write in writers(library):
        schedule = schedules.deserialize(json.loads(json.dumps(write(other))))
        assert type(schedule).__name__ == name
        config, expected = schedule.get_config(), other.get_config()
        if expected.get("seed", 0) is None:
            assert type(config.pop("seed")) is int
            expected.pop("seed")
        assert config.items() <= expected.items()
        missing = {key: value for key, value in expected.items() if key not in config}
        assert missing.items() <= {"name": None, "warmup_target": None, "warmup_steps": 0}.items()


def test_r2_4_knows_all_keys_but_the_seed() -> None:
    """The constructors of r2.4 as they were."""
    known = {
        "ExponentialDecay": {"decay_steps", "decay_rate", "staircase"},
        "PiecewiseConstantDecay": {"boundaries", "values"},
        "PolynomialDecay": {"decay_steps", "end_learning_rate", "power", "cycle"},
        "InverseTimeDecay": {"decay_steps", "decay_rate", "staircase"},
        "CosineDecay": {"decay_steps", "alpha"},
        "CosineDecayRestarts": {"first_decay_steps", "t_mul", "m_mul", "alpha"},
        "LinearCosineDecay": {"decay_steps", "num_periods", "alpha", "beta"},
        "NoisyLinearCosineDecay": {
            *("decay_steps", "initial_variance", "variance_decay", "num_periods", "alpha", "beta", "seed"),
        },
    }
    for schedule in EXAMPLES.values():
        if isinstance(schedule, schedules.CosineDecay) and schedule.warmup_target is not None:
            continue  # what r2.4 cannot do it cannot read
        assert schedule.get_config().keys() <= known[type(schedule).__name__] | {LR, "name"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_tensors_in_a_config_of_keras(library: str) -> None:
    other = LIBRARIES[library].ExponentialDecay(tf.constant(0.1), 10, tf.constant(0.5))
    schedule = schedules.deserialize(json.loads(json.dumps(writers(library)[0](other))))
    assert schedule(10) == float(other(tf.constant(10, tf.int64)))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_class_of_the_users_own(library: str) -> None:
    base = LIBRARIES[library].LearningRateSchedule

    class Halved(base):  # type: ignore[misc, valid-type]
        def __init__(self, learning_rate: float) -> None:
            self.learning_rate = learning_rate

        def __call__(self, step: Any) -> Any:
            return self.learning_rate / 2

        def get_config(self) -> dict[str, Any]:
            return {"learning_rate": self.learning_rate}

    class Ours(schedules.LearningRateSchedule):
        def __init__(self, learning_rate: float) -> None:
            self.learning_rate = learning_rate

    for write in writers(library):
        config = write(Halved(0.5))
        with pytest.raises(ValueError, match="Halved"):
            schedules.deserialize(config)
        schedule = schedules.deserialize(config, custom_objects={"Halved": Ours})
        assert type(schedule) is Ours
        assert schedule.learning_rate == 0.5


def test_keras_3_names_survive() -> None:
    """Its schedules have names by default, and cannot be called without one."""
    config = keras.optimizers.schedules.serialize(keras.optimizers.schedules.CosineDecay(0.1, 10))
    schedule = schedules.deserialize(config)
    assert schedule.name == "CosineDecay"
    assert schedules.serialize(schedule)["config"]["name"] == "CosineDecay"
    assert "name" not in schedules.serialize(schedules.CosineDecay(0.1, 10))["config"]
