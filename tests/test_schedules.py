"""The schedules: recorded values of TensorFlow 2.4.4, both kinds of step, configs, edges, noise, and refusals."""

import json
import math
import pathlib
import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

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

RECORDED: Final = json.loads((pathlib.Path(__file__).parent / "golden" / "recorded.json").read_text())["schedules"]
DEVICES: Final = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# How far from TensorFlow's value ours may be, in ulp of the largest rate of the schedule. 0 where Keras uses + - * /
# floor, ceil and comparisons only, which IEEE 754 leaves no choice; 2 where it takes a power, a logarithm or a cosine:
# TensorFlow's are the mathematical library's, an ulp from the correctly rounded ones at times, and ours are those. A
# product may turn one ulp into two. test_schedules_live.py measures what is used of it.
ULPS: Final = {
    "PiecewiseConstantDecay": 0,
    "InverseTimeDecay": 0,
    "ExponentialDecay": 2,  # power
    "PolynomialDecay": 2,  # power
    "CosineDecay": 2,  # cosine
    "CosineDecayRestarts": 2,  # logarithms, powers and cosine
    "LinearCosineDecay": 2,  # cosine
    "NoisyLinearCosineDecay": 2,  # cosine; power and root of the noise
}

# One of each, and of each that takes another way.
EXAMPLES: Final[dict[str, LearningRateSchedule]] = {
    "exponential": ExponentialDecay(0.1, 10, 0.5),
    "exponential, staircase": ExponentialDecay(0.1, 10, 0.5, staircase=True),
    "piecewise": PiecewiseConstantDecay([1, 5], [0.1, 0.2, 0.3]),
    "piecewise, floats": PiecewiseConstantDecay([1.5, 5.0], [0.1, 0.2, 0.3]),
    "polynomial": PolynomialDecay(0.1, 10, power=0.5),
    "polynomial, cycle": PolynomialDecay(0.1, 10, cycle=True),
    "inverse": InverseTimeDecay(0.1, 10, 0.5),
    "inverse, staircase": InverseTimeDecay(0.1, 10, 0.5, staircase=True),
    "cosine": CosineDecay(0.1, 10, alpha=0.1),
    "cosine, warm-up": CosineDecay(0.0, 10, alpha=0.1, warmup_target=0.3, warmup_steps=5),
    "restarts": CosineDecayRestarts(0.1, 10, t_mul=1.0, m_mul=0.9, alpha=0.1),
    "restarts, longer": CosineDecayRestarts(0.1, 10, t_mul=2.0, m_mul=0.9, alpha=0.1),
    "linear cosine": LinearCosineDecay(0.1, 10, num_periods=2.5),
    "noisy linear cosine": NoisyLinearCosineDecay(0.1, 10, num_periods=2.5, seed=7, name="noisy"),
}
STEPS: Final = (*range(50), 100, 1000, 12345, 2**24 + 1)

every_example = pytest.mark.parametrize("schedule", EXAMPLES.values(), ids=EXAMPLES)


def bits(value: float) -> bytes:
    return struct.pack(">d", value)


def float32(value: float) -> float:
    return float(np.float32(value))


# ---- Recorded values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_values_of_tensorflow_2_4(name: str) -> None:
    recorded = RECORDED[name]
    schedule = deserialize(recorded["config"])
    tolerance = ULPS[type(schedule).__name__] * np.spacing(np.float32(0.5))  # the largest rate of each
    for step, value in recorded["values_float32_step"].items():
        expected = struct.unpack(">f", bytes.fromhex(value))[0]
        assert abs(schedule(torch.tensor(float(step))).item() - expected) <= tolerance, f"step {step}"
        assert abs(schedule(int(step)) - expected) <= tolerance, f"step {step}"


def test_every_recorded_class_is_known() -> None:
    assert {case["config"]["class_name"] for case in RECORDED.values()} <= ULPS.keys()
    assert {type(schedule).__name__ for schedule in EXAMPLES.values()} == ULPS.keys()


# ---- Numbers and Tensors --------------------------------------------------------------------------------------------


@every_example
def test_a_number_and_a_tensor_give_the_same_bits(schedule: Any) -> None:
    for step in STEPS:
        value = schedule(step)
        assert type(value) is float
        assert value == float32(value)
        assert bits(value) == bits(schedule(torch.tensor(step)).item())
        assert bits(schedule(float(step))) == bits(schedule(torch.tensor(float(step))).item())


@every_example
@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2),
    ],
    ids=str,
)
def test_every_dtype_and_shape_of_a_step(schedule: Any, dtype: torch.dtype) -> None:
    for step in (0, 1, 2, 5, 6, 8, 96):
        expected = schedule(step)
        for shape in ((), (1,), (1, 1)):
            value = schedule(torch.full(shape, step, dtype=torch.int64).to(dtype))
            assert value.shape == ()
            assert value.dtype is torch.float32
            assert bits(value.item()) == bits(expected), step


@every_example
@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64, np.float16], ids=lambda kind: kind.__name__)
def test_numpy_steps(schedule: Any, kind: Callable[[int], Any]) -> None:
    assert type(schedule(kind(6))) is float
    assert schedule(kind(6)) == schedule(6)


# Not those whose noise or comparison sees the whole step; they have tests of their own.
@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith(("noisy", "piecewise"))])
def test_a_step_beyond_2_to_the_24_is_rounded_to_float32(name: str) -> None:
    schedule = EXAMPLES[name]
    for step in (2**24 + 1, 2**24 + 3, 2**31 + 1, 2**62 + 1):
        assert bits(schedule(step)) == bits(schedule(int(np.float32(step))))


@every_example
@pytest.mark.parametrize("device", DEVICES)
def test_values_on_a_device(schedule: Any, device: str) -> None:
    step = torch.zeros((), dtype=torch.int64, device=device)
    if device == "cuda":
        schedule(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = schedule(step)
    for t in STEPS:
        step.fill_(t)
        if device == "cuda":
            graph.replay()
        else:
            value = schedule(step)
        assert value.device == step.device
        tolerance = 0.0 if device == "cpu" else ULPS[type(schedule).__name__] * float(np.spacing(np.float32(0.3)))
        assert abs(value.item() - schedule(t)) <= tolerance, t


@every_example
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_the_host_waits_for_nothing(schedule: Any, dtype: torch.dtype) -> None:
    """A Tensor on the meta device has no value: reading it, or branching on it, is an error."""
    value = schedule(torch.zeros((), dtype=dtype, device="meta"))
    assert value.is_meta
    assert value.shape == ()
    assert value.dtype is torch.float32


def test_cpu_tensors_as_arguments_are_not_copied_to_the_device() -> None:
    """A copy to the meta device would work, so what is asserted is that none is asked for."""
    schedule = CosineDecay(torch.tensor(0.1), torch.tensor(10), torch.tensor(0.1), None, torch.tensor(0.3))
    with _RefusesCopies():
        assert schedule(torch.zeros((), device="meta")).is_meta


class _RefusesCopies(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to:
            moves = [x for x in (*args[1:], *(kwargs or {}).values()) if isinstance(x, torch.device | str)]
            assert all(torch.device(device) == args[0].device for device in moves), "a copy between devices"
        return function(*args, **(kwargs or {}))


def test_a_default_device_is_not_used_for_numbers() -> None:
    with torch.device("meta"):
        for name, schedule in EXAMPLES.items():
            assert schedule(3) == EXAMPLES[name](3)
        assert NoisyLinearCosineDecay(0.1, 10).seed >= 0
        assert ExponentialDecay(np.float64(0.1), 10, 0.5)(0) == 0.1


def values_at(schedules: list[Any], step: Tensor) -> Tensor:
    return torch.stack([schedule(step) for schedule in schedules])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_traces_all_in_one_graph(backend: str) -> None:
    examples = list(EXAMPLES.values())
    compiled = torch.compile(values_at, fullgraph=True, backend=backend)
    for t in (0, 1, 5, 10, 11, 70, 1000):
        step = torch.tensor(t)
        torch.testing.assert_close(compiled(examples, step), values_at(examples, step), rtol=0, atol=0)


def test_torch_compile_traces_numpy_and_tensor_arguments() -> None:
    kinds = [np.float32, np.float64, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64)]
    examples = [ExponentialDecay(kind(0.1), kind(10.0), kind(0.5)) for kind in kinds]
    compiled = torch.compile(lambda xs, step: [x(step) for x in xs], fullgraph=True, backend="eager")
    for t in (0, 3, 4):
        step = torch.tensor(t)
        for value, example in zip(compiled(examples, step), examples, strict=True):
            torch.testing.assert_close(value, example(step), rtol=0, atol=0)
    pieces = [PiecewiseConstantDecay([kind(3.0)], [kind(1.0)] * 2) for kind in kinds]
    for value, example in zip(compiled(pieces, torch.tensor(4)), pieces, strict=True):
        torch.testing.assert_close(value, example(torch.tensor(4)), rtol=0, atol=0)


# ---- Kinds of arguments ---------------------------------------------------------------------------------------------


def with_arguments(schedule: Any, convert: Callable[[Any], Any]) -> Any:
    """The schedule made anew with all its numbers converted."""

    def converted(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        return convert(value) if type(value) in (int, float) else value

    config = schedule.get_config()
    return type(schedule)(**{key: value if key == "seed" else converted(value) for key, value in config.items()})


@every_example
@pytest.mark.parametrize(
    "kind",
    [np.float32, torch.tensor, lambda x: torch.tensor([x]), lambda x: torch.tensor(x, dtype=torch.float32)],
    ids=["np.float32", "Tensor", "Tensor of shape (1,)", "float32 Tensor"],
)
def test_numpy_scalars_and_tensors_as_arguments(schedule: Any, kind: Callable[[float], Any]) -> None:
    same = with_arguments(schedule, kind)
    one_minus_alpha_is_rounded_later = isinstance(schedule, CosineDecay)
    for t in range(40):
        value, expected = same(t), schedule(t)
        if one_minus_alpha_is_rounded_later:  # 1 - 0.1 in float32 is not 0.9 in float32
            assert value == pytest.approx(expected, rel=0, abs=2 * float(np.spacing(np.float32(0.3))))
        else:
            assert bits(value) == bits(expected), t


@every_example
@pytest.mark.parametrize(
    "kind", [np.float64, lambda x: torch.tensor(x, dtype=torch.float64)], ids=["np.float64", "Tensor"]
)
def test_a_float64_learning_rate_means_float64(schedule: Any, kind: Callable[[float], Any]) -> None:
    precise = with_arguments(schedule, lambda x: kind(x) if isinstance(x, float) else x)
    assert precise(torch.tensor(3)).dtype is torch.float64
    for t in (0, 3, 7):
        assert precise(t) == pytest.approx(schedule(t), rel=2e-6, abs=1e-8)
    assert any(precise(t) != float32(precise(t)) for t in range(10))


def test_float64_arithmetic() -> None:
    """Other Python numbers are rounded to float32 all the same, except the alpha of CosineDecay."""
    wide = np.float64
    assert InverseTimeDecay(wide(0.1), 3, wide(0.7))(5) == 0.1 / (1 + 0.7 * (5 / 3))
    assert InverseTimeDecay(wide(0.1), 3, 0.7)(5) == 0.1 / (1 + float32(0.7) * (5 / 3))
    assert ExponentialDecay(wide(0.1), 3, 0.7)(6) == pytest.approx(0.1 * float32(0.7) ** 2, rel=4e-16)
    assert PiecewiseConstantDecay([3], [wide(0.1), 0.2])(4) == float32(0.2)
    expected = 0.1 * (0.9 * 0.5 * (1 + math.cos(math.pi * 0.3)) + 0.1)
    assert CosineDecay(wide(0.1), 10, 0.1)(3) == pytest.approx(expected, rel=4e-16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_other_dtypes_of_the_learning_rate_mean_float32(dtype: torch.dtype) -> None:
    rate = torch.tensor(2.0, dtype=dtype)
    assert ExponentialDecay(rate, 10, 0.5)(3) == ExponentialDecay(2.0, 10, 0.5)(3)
    assert ExponentialDecay(rate, 10, 0.5)(torch.tensor(3)).dtype is torch.float32


def test_an_int_is_a_learning_rate_too() -> None:
    """Keras would compute with integers, and fail or give 0; the config it reads holds a float."""
    assert ExponentialDecay(1, 10, 0.5)(10) == 0.5
    assert type(ExponentialDecay(1, 10, 0.5).get_config()["initial_learning_rate"]) is float
    assert [type(v) for v in PiecewiseConstantDecay([2], [1, 0.5]).get_config()["values"]] == [float, float]


def test_attributes_can_be_changed() -> None:
    schedule = ExponentialDecay(0.1, 10, 0.5)
    schedule.decay_steps = 5
    assert schedule(5) == ExponentialDecay(0.1, 5, 0.5)(5)
    assert schedule.get_config()["decay_steps"] == 5


def test_a_tensor_argument_is_read_at_each_call() -> None:
    rate = torch.tensor(0.5)
    schedule = ExponentialDecay(rate, 10, 0.5)
    rate.fill_(0.25)
    assert schedule(0) == 0.25


def test_gradients_reach_a_tensor_argument() -> None:
    rate = torch.tensor(0.5, requires_grad=True)
    schedule = ExponentialDecay(rate, 10, 0.25)
    schedule(torch.tensor(5)).backward()
    assert rate.grad is not None
    assert rate.grad.item() == 0.5
    assert type(schedule(5)) is float


# ---- Edges ----------------------------------------------------------------------------------------------------------


def test_staircase_changes_at_multiples() -> None:
    for schedule, after in ((ExponentialDecay(1.0, 10, 0.5, True), 0.5), (InverseTimeDecay(1.0, 10, 1.0, True), 0.5)):
        assert [schedule(t) for t in (0, 1, 9, 10, 11, 19)] == [1.0, 1.0, 1.0, after, after, after]
        assert schedule(20) < after


def test_piecewise_boundaries_belong_to_the_value_before() -> None:
    schedule = PiecewiseConstantDecay([2, 4], [1.0, 0.5, 0.25])
    assert [schedule(t) for t in range(6)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]
    assert [schedule(t) for t in (2.5, 4.0, 4.5)] == [0.5, 0.5, 0.25]
    assert PiecewiseConstantDecay([], [0.5])(3) == 0.5


def test_piecewise_casts_boundaries_to_the_dtype_of_the_step() -> None:
    """As Keras does; the Keras of test_schedules_live.py gives the same."""
    odd = 2**24 + 1
    schedule = PiecewiseConstantDecay([odd], [1.0, 0.5])
    assert [schedule(t) for t in (odd - 1, odd, odd + 1)] == [1.0, 1.0, 0.5]
    # In float32 the boundary is 2**24, and so is a step of 2**24 + 1.
    assert [schedule(float(t)) for t in (odd - 1, odd, odd + 1)] == [1.0, 1.0, 0.5]
    # A float boundary is in float32 from the beginning.
    assert [PiecewiseConstantDecay([float(odd)], [1.0, 0.5])(t) for t in (odd - 1, odd)] == [1.0, 0.5]
    assert [PiecewiseConstantDecay([np.float64(odd)], [1.0, 0.5])(t) for t in (odd, odd + 1)] == [1.0, 0.5]
    # To an integer step it loses its fraction: -0.5 becomes 0.
    negative = PiecewiseConstantDecay([-0.5], [1.0, 0.5])
    assert (negative(0), negative(0.0), negative(1)) == (1.0, 0.5, 0.5)
    # In float16 2049 is 2048.
    assert PiecewiseConstantDecay([2049], [1.0, 0.5])(torch.tensor(2050.0, dtype=torch.float16)) == 0.5
    # In int8 1000 would wrap.
    assert PiecewiseConstantDecay([1000], [1.0, 0.5])(torch.tensor(5, dtype=torch.int8)) == 1.0


def test_polynomial_cycles() -> None:
    line = PolynomialDecay(1.0, 10, 0.0, cycle=True)
    assert line(0) == 1.0
    assert [line(t) for t in (10, 20, 30)] == [0.0, 0.0, 0.0]
    assert [line(t) for t in (5, 15)] == [0.5, 0.25]
    assert line(21) == pytest.approx(0.3, abs=1e-7)
    flat = PolynomialDecay(1.0, 10, 0.125, power=0.0)
    assert [flat(t) for t in (0, 10)] == [1.0, 1.0]  # 0 ** 0


def test_beyond_the_end_nothing_changes() -> None:
    for schedule in (
        PolynomialDecay(1.0, 10, 0.125),
        CosineDecay(1.0, 10, 0.125),
        LinearCosineDecay(1.0, 10, beta=0.125),
    ):
        assert [schedule(t) for t in (10, 11, 1000, 2**40)] == [0.125] * 4


def test_root_reaches_the_end() -> None:
    schedule = PolynomialDecay(1.0, 4, 0.0, power=0.5)
    assert [schedule(t) for t in (0, 3, 4, 5)] == [1.0, 0.5, 0.0, 0.0]


def test_warm_up_then_decay() -> None:
    schedule = CosineDecay(0.25, 8, 0.5, warmup_target=1.0, warmup_steps=4)
    assert [schedule(t) for t in range(5)] == [0.25, 0.4375, 0.625, 0.8125, 1.0]
    assert [schedule(t) for t in (8, 12, 100)] == pytest.approx([0.75, 0.5, 0.5], abs=1e-7)
    assert [CosineDecay(0.25, 8, warmup_target=1.0)(t) for t in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-7)
    assert CosineDecay(0.25, 8, warmup_steps=4)(0) == 0.25  # no target, no warm-up


def test_restarts() -> None:
    equal = CosineDecayRestarts(1.0, 4, t_mul=1.0, m_mul=0.5)
    assert [equal(t) for t in (0, 2, 4, 6, 8)] == pytest.approx([1.0, 0.5, 0.5, 0.25, 0.25], abs=1e-7)
    longer = CosineDecayRestarts(1.0, 4, t_mul=2.0, m_mul=0.5, alpha=0.5)
    assert [longer(t) for t in (0, 2, 4, 8, 12)] == pytest.approx([1.0, 0.75, 0.75, 0.625, 0.625], abs=1e-7)
    almost = CosineDecayRestarts(1.0, 4, t_mul=1.0 + 1e-9, m_mul=0.5)  # 1 in float32
    assert [almost(t) for t in (2, 4, 8)] == pytest.approx([0.5, 0.5, 0.25], abs=1e-7)


def test_restarts_whose_quotient_of_logarithms_is_rounded_down() -> None:
    """In float32 log(2**13) / log(2) is below 13: the first step of that period is the last of the one before."""
    schedule = CosineDecayRestarts(1.0, 1)
    assert {n for n in range(1, 21) if schedule(2**n - 1) == 0.0} == {13, 15}
    assert schedule(2**21 - 2) == 1.0  # and sometimes it is rounded up: a step too early


def test_shrinking_restarts_end() -> None:
    schedule = CosineDecayRestarts(1.0, 4, t_mul=0.5)
    assert schedule(4) == 1.0
    assert math.isnan(schedule(9))  # after 4 + 2 + 1 + ... = 8 steps


# ---- Against plain float64 ------------------------------------------------------------------------------------------

U: Final = 2.0**-24  # half an ulp of 1, the largest relative error of one float32 rounding
REPEATS: Final = 200

rates = st.floats(2**-10, 8, width=32)
fractions = st.floats(0, 1, width=32)
decay_steps = st.integers(1, 10_000)
steps = st.integers(0, 30_000)


def assert_near(actual: float, expected: float, tolerance: float) -> None:
    assert abs(actual - expected) <= tolerance, f"{actual!r} is not {expected!r} within {tolerance:.2g}"


@settings(max_examples=REPEATS, deadline=None)
@given(lr=rates, D=decay_steps, rate=st.floats(0.125, 1.5, width=32), staircase=st.booleans(), t=steps)
def test_exponential_is_the_formula(lr: float, D: int, rate: float, staircase: bool, t: int) -> None:
    exponent = t // D if staircase else t / D
    assume(abs(exponent * math.log(rate)) < 80)
    expected = lr * rate**exponent
    # Rounding the exponent is an error of exponent * U in it; then a power and a product.
    tolerance = expected * U * (abs(exponent * math.log(rate)) + 3)
    assert_near(ExponentialDecay(lr, D, rate, staircase)(t), expected, tolerance)


@settings(max_examples=REPEATS, deadline=None)
@given(lr=rates, D=decay_steps, rate=st.floats(0, 4, width=32), staircase=st.booleans(), t=steps)
def test_inverse_time_is_the_formula(lr: float, D: int, rate: float, staircase: bool, t: int) -> None:
    expected = lr / (1 + rate * (t // D if staircase else t / D))
    assert_near(InverseTimeDecay(lr, D, rate, staircase)(t), expected, expected * U * 4.1)  # four roundings


@settings(max_examples=REPEATS, deadline=None)
@given(lr=rates, D=decay_steps, end=fractions, power=st.floats(1, 4, width=32), cycle=st.booleans(), t=steps)
def test_polynomial_is_the_formula(lr: float, D: int, end: float, power: float, cycle: bool, t: int) -> None:
    length = D * max(1, -(-t // D)) if cycle else D
    expected = (lr - end) * (1 - min(t, length) / length) ** power + end
    # 1 - p has an absolute error of 1.5 U, which the power multiplies; three more roundings, and that of the sum.
    tolerance = U * (abs(lr - end) * (1.5 * power + 3) + abs(expected)) * 1.01
    assert_near(PolynomialDecay(lr, D, end, power, cycle)(t), expected, tolerance)


@settings(max_examples=REPEATS, deadline=None)
@given(lr=rates, D=decay_steps, alpha=fractions, t=steps, target=st.none() | rates, W=st.integers(0, 10_000))
def test_cosine_is_the_formula(lr: float, D: int, alpha: float, t: int, target: float | None, W: int) -> None:
    actual = CosineDecay(lr, D, alpha, None, target, W)(t)
    if target is not None and t < W:
        assert_near(actual, (target - lr) * t / W + lr, 5 * U * max(lr, target))
        return
    top, passed = (lr, t) if target is None else (target, t - W)
    expected = top * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * min(passed, D) / D)) + alpha)
    # The argument of the cosine, up to pi, has three roundings (pi's is one); around it there are five more.
    assert_near(actual, expected, U * top * (0.5 * 3 * math.pi + 5))


@settings(max_examples=REPEATS, deadline=None)
@given(
    lr=rates,
    D=decay_steps,
    t_mul=st.just(1.0) | st.floats(1.5, 4, width=32),
    m_mul=st.floats(0.5, 1, width=32),
    alpha=fractions,
    t=steps,
)
def test_restarts_are_the_formula(lr: float, D: int, t_mul: float, m_mul: float, alpha: float, t: int) -> None:
    elapsed = t / D
    exact = elapsed if t_mul == 1 else math.log1p(elapsed * (t_mul - 1)) / math.log(t_mul)
    # float32 may find itself on the other side of an edge.
    periods = {math.floor(exact)} if t_mul == 1 else {math.floor(exact - 1e-5), math.floor(exact + 1e-5)}
    candidates = []
    for i in periods:
        fraction = elapsed - i if t_mul == 1 else (elapsed - (t_mul**i - 1) / (t_mul - 1)) / t_mul**i
        cosine = 0.5 * m_mul**i * (1 + math.cos(math.pi * fraction))
        candidates.append(lr * ((1 - alpha) * cosine + alpha))
    # The error of the fraction: `elapsed` has one of elapsed * U, and elapsed / t_mul**i is at most t_mul / (t_mul - 1);
    # the sum of the series has four such. With t_mul = 1 it is elapsed * U.
    fraction_error = elapsed * U if t_mul == 1 else 5 * U * t_mul / (t_mul - 1)
    tolerance = lr * (0.5 * math.pi * (fraction_error + 2 * U) + 6 * U)
    actual = CosineDecayRestarts(lr, D, t_mul, m_mul, alpha)(t)
    assert any(abs(actual - expected) <= tolerance for expected in candidates), (actual, candidates)


@settings(max_examples=REPEATS, deadline=None)
@given(lr=rates, D=decay_steps, periods=st.floats(0, 4, width=32), alpha=fractions, beta=fractions, t=steps)
def test_linear_cosine_is_the_formula(lr: float, D: int, periods: float, alpha: float, beta: float, t: int) -> None:
    done = min(t, D) / D
    cosine = 0.5 * (1 + math.cos(2 * math.pi * periods * done))
    # As above, with an argument of up to 2 pi periods and four roundings.
    tolerance = lr * U * ((alpha + 1) * (0.5 * 4 * 2 * math.pi * periods + 6) + 2 * beta)
    expected = lr * ((alpha + 1 - done) * cosine + beta)
    assert_near(LinearCosineDecay(lr, D, periods, alpha, beta)(t), expected, tolerance)
    noiseless = NoisyLinearCosineDecay(lr, D, 0.0, 0.55, periods, alpha, beta)
    assert noiseless(t) == LinearCosineDecay(lr, D, periods, alpha, beta)(t)


@settings(max_examples=REPEATS, deadline=None)
@given(boundaries=st.lists(st.integers(0, 100), unique=True, max_size=6).map(sorted), t=st.integers(0, 101))
def test_piecewise_is_a_search(boundaries: list[int], t: int) -> None:
    schedule = PiecewiseConstantDecay(boundaries, [float(i) for i in range(len(boundaries) + 1)])
    expected = float(np.searchsorted(boundaries, t, side="left"))
    assert schedule(t) == schedule(float(t)) == schedule(t + 0.0) == expected


# ---- Noise ----------------------------------------------------------------------------------------------------------

DRAWS: Final = 10_000


def noise(seed: int, **options: Any) -> np.ndarray:
    """The noise of the first steps, taken from the values: with no period the cosine is 1."""
    schedule = NoisyLinearCosineDecay(1.0, DRAWS, num_periods=0.0, beta=0.0, seed=seed, **options)
    t = np.arange(DRAWS)
    values = schedule._value(torch.from_numpy(t))  # of all steps at once
    assert [schedule(int(step)) for step in t[::500]] == values[::500].tolist()
    return values.double().numpy() - (DRAWS - t) / DRAWS


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    z, other = noise(0, variance_decay=0.0), noise(1, variance_decay=0.0)
    deviation = 1 / math.sqrt(DRAWS)  # of a mean, or of a correlation
    for draws in (z, other):
        assert abs(draws.mean()) < 4 * deviation
        assert abs(draws.var() - 1) < 4 * math.sqrt(2) * deviation
        assert abs((draws**3).mean()) < 4 * math.sqrt(15) * deviation
        assert abs((draws**4).mean() - 3) < 4 * math.sqrt(96) * deviation
        normal = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in np.sort(draws)])
        assert np.abs(normal - (np.arange(DRAWS) + 0.5) / DRAWS).max() < 1.95 * deviation  # Kolmogorov, p = 0.001
        for lag in range(1, 20):
            assert abs((draws[lag:] * draws[:-lag]).mean()) < 4 * deviation, lag
    for lag in range(20):
        assert abs((z[lag:] * other[: DRAWS - lag]).mean()) < 4 * deviation, lag


def test_variance_decays() -> None:
    z, decaying = noise(0, variance_decay=0.0), noise(0, initial_variance=0.5, variance_decay=0.7)
    expected = z * np.sqrt(0.5 / (1 + np.arange(DRAWS)) ** 0.7)
    np.testing.assert_allclose(decaying, expected, rtol=0, atol=2e-6)  # value minus line, in float32


def test_noise_is_a_function_of_seed_and_step() -> None:
    schedule = NoisyLinearCosineDecay(0.1, 100, seed=5)
    forward = [schedule(t) for t in range(100)]
    assert forward == [schedule(t) for t in reversed(range(100))][::-1]
    assert forward == [schedule(float(t)) for t in range(100)]
    assert len(set(forward)) == 100
    resumed = deserialize(json.loads(json.dumps(serialize(schedule))))
    assert forward == [resumed(t) for t in range(100)]
    assert forward != [NoisyLinearCosineDecay(0.1, 100, seed=6)(t) for t in range(100)]
    after = NoisyLinearCosineDecay(0.1, 100, num_periods=1.0, seed=5)
    assert after(1000) != after(1001)  # the decay is over, the noise is not
    assert after(2**24 + 1) != after(2**24)  # a step number is not rounded to float32 for the noise


def test_noise_never_changes() -> None:
    """A seed that is in somebody's checkpoint means these numbers for good."""
    schedule = NoisyLinearCosineDecay(1.0, 1000, seed=2024)
    assert [round(schedule(t), 4) for t in range(4)] == [1.7005, 0.9925, 1.613, 0.4335]


def test_a_seed_is_drawn_once_from_the_default_generator() -> None:
    torch.manual_seed(0)
    first, second = NoisyLinearCosineDecay(0.1, 10), NoisyLinearCosineDecay(0.1, 10)
    torch.manual_seed(0)
    again = NoisyLinearCosineDecay(0.1, 10)
    assert first.seed == again.seed != second.seed
    assert first.get_config()["seed"] == first.seed
    state = torch.get_rng_state()
    first(3)
    NoisyLinearCosineDecay(0.1, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**64 + 3, np.int64(7)])
def test_any_int_is_a_seed(seed: int) -> None:
    schedule = NoisyLinearCosineDecay(0.1, 10, seed=seed)
    assert type(schedule.seed) is int
    assert schedule.seed == seed
    assert math.isfinite(schedule(3))


def test_close_seeds_and_steps_do_not_meet() -> None:
    """Were the seed only added to the step, or mixed in by one exclusive or, these would repeat each other."""
    values = {
        NoisyLinearCosineDecay(1.0, 1, 1.0, 0.0, beta=0.0, alpha=1.0, num_periods=0.0, seed=seed)(t)
        for seed in range(30)
        for t in range(30)
    }
    assert len(values) == 900
