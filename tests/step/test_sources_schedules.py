"""Hyperparameters of schedules and callables: the values of each step, and what is refused."""

import re
from collections.abc import Callable
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from cases import Path, assert_same_bits, assert_unchanged, dtype_name, snapshot, to_numpy
from keras_training import Counting, Halving, advance, assert_same_training, make_params, set_gradients
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.schedules import ExponentialDecay, LearningRateSchedule, PolynomialDecay


@pytest.mark.parametrize("capturable", [False, True])
def test_a_schedule_gives_the_learning_rate_of_each_step(path: Path, capturable: bool) -> None:
    schedule = PolynomialDecay(1.0, 4, 0.1, 2.0)
    optimizer = AdadeltaKeras(make_params(), schedule, capturable=capturable, **path.options)
    oracle = OracleOptimizer(
        [p.detach().numpy() for p in optimizer.param_groups[0]["params"]], lambda t: np.float32(schedule(float(t)))
    )
    assert optimizer.learning_rate is schedule
    assert optimizer.lr is schedule
    assert optimizer.param_groups[0]["lr"] == schedule(0)
    for step in range(6):
        set_gradients(optimizer, step)
        grads = [p.grad.numpy() for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        oracle.step(grads)
        assert float(optimizer.param_groups[0]["lr"]) == schedule(step)
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == capturable
    for param, one in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_same_bits(param, one.p)
        assert_same_bits(optimizer.state[param]["acc_delta"], one.acc_delta)


def test_a_users_schedule_is_called_with_the_step_in_each_T(path: Path) -> None:
    seen = []

    class Spy(LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            seen.append((step.dtype, float(step)))
            return 1.0 / (1.0 + step)

        def get_config(self) -> dict[str, Any]:
            return {}

    params = [Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = AdadeltaKeras(params, Spy(), **path.options)
    seen.clear()
    optimizer.iterations = 2
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert seen == [(torch.float32, 2.0), (torch.float64, 2.0)]
    assert_same_bits(params[1], _one_step(1.0 / 3.0))


def _one_step(lr: float) -> Tensor:
    """A float64 parameter of ones after one step with gradients of one and this learning rate, unrounded."""
    param = Parameter(torch.ones(2, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    AdadeltaKeras([param], torch.tensor(lr, dtype=torch.float64), foreach=False).step()
    return param.detach()


def test_each_callable_is_called_once_a_step(path: Path) -> None:
    calls = []

    def both() -> float:
        calls.append("both")
        return 0.5

    def rho() -> Tensor:
        calls.append("rho")
        return torch.tensor(0.25)

    params = make_params((3,), (2,), (2,))
    optimizer = AdadeltaKeras(
        [{"params": params[:1]}, {"params": params[1:2], "epsilon": both}, {"params": params[2:], "lr": 2.0}],
        both, rho, **path.options,
    )  # fmt: skip
    assert calls == []
    assert optimizer.learning_rate is both
    assert optimizer.rho is rho
    advance(optimizer, 1)
    assert sorted(calls) == ["both", "rho"]
    values = [(group["lr"], float(group["rho"]), group["epsilon"]) for group in optimizer.param_groups]
    assert values == [(0.5, 0.25, 1e-7), (0.5, 0.25, 0.5), (2.0, 0.25, 1e-7)]
    advance(optimizer, 1, first=1)
    assert sorted(calls) == ["both", "both", "rho", "rho"]

    plain = AdadeltaKeras(
        [{"params": p} for p in ([q] for q in make_params((3,), (2,), (2,)))], 0.5, torch.tensor(0.25), **path.options
    )
    plain.param_groups[1]["epsilon"] = 0.5
    plain.param_groups[2]["lr"] = 2.0
    advance(plain, 2)
    assert_same_training(optimizer, plain)


def test_values_replace_each_other(path: Path) -> None:
    """Number, Tensor, callable and schedule, assigned in any order."""
    optimizer = AdadeltaKeras(make_params(), 1.0, **path.options)
    oracle = OracleOptimizer([p.detach().numpy() for p in optimizer.param_groups[0]["params"]])
    schedule = ExponentialDecay(1.0, 2, 0.5)
    for step, (value, expected) in enumerate(
        [
            (schedule, 1.0),
            (0.25, 0.25),
            (lambda: 0.75, 0.75),
            (torch.tensor(0.5), 0.5),
            (Halving(1.0), 0.0625),
            (torch.tensor([2.0]), 2.0),
        ]
    ):
        optimizer.lr = value
        assert optimizer.learning_rate is value
        oracle.learning_rate = expected
        set_gradients(optimizer, step)
        grads = [p.grad.numpy() for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        oracle.step(grads)
    for param, one in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


def test_a_negative_learning_rate_of_a_schedule_is_taken(path: Path) -> None:
    """NoisyLinearCosineDecay gives some; Keras takes them."""
    optimizer = AdadeltaKeras(make_params(), ExponentialDecay(-1.0, 2, 0.5), **path.options)
    other = AdadeltaKeras(make_params(), 1.0, maximize=True, **path.options)
    for _ in range(2):
        other.lr = ExponentialDecay(1.0, 2, 0.5)
        advance(optimizer, 1)
        advance(other, 1)
    assert_same_training(optimizer, other)


class TestRefusals(expecttest.TestCase):
    def message(self, action: Callable[[AdadeltaKeras], Any], error: type[Exception], **options: Any) -> str:
        optimizer = AdadeltaKeras(make_params(), **options)
        advance(optimizer, 2)
        before = snapshot(optimizer)
        with pytest.raises(error) as caught:
            action(optimizer)
        assert_unchanged(optimizer, before)
        return re.sub(r"0x[0-9a-f]+", "0x...", str(caught.value))

    def test_a_foreign_learning_rate_under_a_schedule(self) -> None:
        def foreign(optimizer: AdadeltaKeras) -> None:
            was = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = 0.5
            try:
                optimizer.step()
            finally:
                optimizer.param_groups[0]["lr"] = was

        self.assertExpectedInline(
            self.message(foreign, RuntimeError, learning_rate=ExponentialDecay(1.0, 2, 0.5)),
            """group 0 has lr=0.5, but its learning_rate is given by the schedule ExponentialDecay(initial_learning_rate=1.0, decay_steps=2, decay_rate=0.5, staircase=False), which would overwrite that. Set optimizer.learning_rate to use the value instead""",
        )

    def test_a_foreign_rho_under_a_callable(self) -> None:
        def foreign(optimizer: AdadeltaKeras) -> None:
            optimizer.param_groups[0]["rho"] = 0.5
            try:
                optimizer.step()
            finally:
                optimizer.param_groups[0]["rho"] = 0.9

        self.assertExpectedInline(
            self.message(foreign, RuntimeError, rho=float("0.9").__abs__),
            """group 0 has rho=0.5, but its rho is given by the callable <method-wrapper '__abs__' of float object at 0x...>, which would overwrite that. Set optimizer.rho to use the value instead""",
        )

    def test_a_scheduler_of_torch_beside_a_schedule(self) -> None:
        optimizer = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5))
        torch.optim.lr_scheduler.StepLR(optimizer, 30)
        set_gradients(optimizer)
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        assert_unchanged(optimizer, before)
        self.assertExpectedInline(
            str(caught.value),
            """the learning rate is given by the schedule ExponentialDecay(initial_learning_rate=1.0, decay_steps=2, decay_rate=0.5, staircase=False), and a scheduler of torch.optim is attached too: use one of them. A number for optimizer.learning_rate removes the former""",
        )

    def test_values_of_the_wrong_kind(self) -> None:
        def assign(key: str, value: Any) -> Callable[[AdadeltaKeras], None]:
            return lambda optimizer: setattr(optimizer, key, value)

        messages = [
            self.message(assign("rho", ExponentialDecay(1.0, 2, 0.5)), TypeError),
            self.message(assign("lr", ExponentialDecay), TypeError),
            self.message(assign("lr", "0.1"), TypeError),
            self.message(assign("lr", -1.0), ValueError),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
rho must be a number, a one-element Tensor or a callable, got the schedule ExponentialDecay(initial_learning_rate=1.0, decay_steps=2, decay_rate=0.5, staircase=False)
learning_rate must be a number, a one-element Tensor or a callable, got the class ExponentialDecay
learning_rate must be a number or a one-element Tensor, got '0.1' of type str
Invalid learning_rate: -1.0; it must be a finite number >= 0 that fits float32""",
        )

    def test_what_schedules_and_callables_return(self) -> None:
        class Wrong(LearningRateSchedule):
            def __init__(self, value: Any) -> None:
                self.value = value

            def __call__(self, step: Any) -> Any:
                return self.value if step else 1.0

            def get_config(self) -> dict[str, Any]:
                return {}

        def refused(error: type[Exception], **options: Any) -> str:
            optimizer = AdadeltaKeras(make_params(), **options)
            optimizer.iterations = 1
            set_gradients(optimizer)
            before = snapshot(optimizer)
            with pytest.raises(error) as caught:
                optimizer.step()
            assert_unchanged(optimizer, before)
            return str(caught.value)

        messages = [
            refused(ValueError, learning_rate=Wrong(float("nan"))),
            refused(ValueError, learning_rate=Wrong(torch.ones(2))),
            refused(TypeError, learning_rate=Wrong("1")),
            refused(TypeError, learning_rate=Wrong(None)),
            refused(TypeError, rho=lambda: None),
            refused(ValueError, rho=lambda: 2.0),
            refused(ValueError, learning_rate=lambda: -1.0),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
the schedule Wrong returned nan at step 1; a learning rate must be finite
the schedule Wrong returned a Tensor of shape (2,) and dtype torch.float32, not a number
the schedule Wrong returned '1' of type str, not a number
the schedule Wrong returned None of type NoneType, not a number
rho must be a number or a one-element Tensor, got None of type NoneType
Invalid rho: 2.0; it must be a number in [0, 1]
Invalid learning_rate: -1.0; it must be a finite number >= 0 that fits float32""",
        )


def test_a_zero_learning_rate_before_the_first_step_makes_state_only(path: Path) -> None:
    """As PyTorch's distributed checkpointing does, to have state to load into."""
    optimizer = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), **path.options)
    was = optimizer.param_groups[0]["lr"]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = was
    assert optimizer.iterations == 0
    assert all(not state[key].any() for state in optimizer.state.values() for key in state)
    assert len(optimizer.state) == 2
    plain = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), **path.options)
    advance(optimizer, 3)
    advance(plain, 3)
    assert_same_training(optimizer, plain)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="would overwrite that"):
        optimizer.step()


def test_a_scheduler_of_torch_with_decay(path: Path) -> None:
    optimizer = AdadeltaKeras(make_params(), 1.0, decay=0.5, **path.options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    oracle = OracleOptimizer([p.detach().numpy() for p in optimizer.param_groups[0]["params"]], decay=0.5)
    for step, lr in enumerate([1.0, 1.0, 0.5, 0.5, 0.25]):
        oracle.learning_rate = lr
        set_gradients(optimizer, step)
        grads = [p.grad.numpy() for p in optimizer.param_groups[0]["params"]]
        optimizer.step()
        oracle.step(grads)
        scheduler.step()
    for param, one in zip(optimizer.param_groups[0]["params"], oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


@pytest.mark.parametrize("iterations", [2**24 + 1, 70000])
def test_decay_far_into_training(path: Path, iterations: int) -> None:
    """The step is cast to T: float32 does not know every number beyond 2**24; a 16-bit step would be infinite."""
    params = [Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)]
    dtypes = [dtype_name(p.dtype) for p in params]
    optimizer = AdadeltaKeras(params, 1.0, decay=0.3, **path.options)
    oracle = OracleOptimizer([to_numpy(p) for p in params], 1.0, decay=0.3, dtypes=dtypes)
    optimizer.iterations = oracle.iterations = iterations
    set_gradients(optimizer)
    grads = [to_numpy(p.grad) for p in params]
    optimizer.step()
    oracle.step(grads)
    for param, one in zip(params, oracle.oracles, strict=True):
        assert_same_bits(param, one.p)


@pytest.mark.parametrize(
    "lr", [0.5, torch.tensor(0.5), ExponentialDecay(0.5, 3, 0.7)], ids=["number", "Tensor", "schedule"]
)
def test_capturable_computes_decay_with_tensors_to_the_same_bits(path: Path, lr: Any) -> None:
    one, other = (
        AdadeltaKeras(make_params((3,), (70,)), lr, decay=0.3, capturable=capturable, **path.options)
        for capturable in (False, True)
    )
    advance(one, 4)
    advance(other, 4)
    assert_same_training(one, other)


def test_a_schedule_is_called_once_for_all_groups(path: Path) -> None:
    schedule = Counting()
    optimizer = AdadeltaKeras([{"params": [p]} for p in make_params((3,), (3,), (2,))], schedule, **path.options)
    schedule.calls = 0
    advance(optimizer, 2)
    assert schedule.calls == 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3


def test_a_callable_may_return_a_tensor_that_is_filled(path: Path) -> None:
    lr = torch.tensor(1.0)
    ours, plain = AdadeltaKeras(make_params(), lambda: lr, **path.options), AdadeltaKeras(make_params(), **path.options)
    for step, value in enumerate((1.0, 0.5, 0.25)):
        lr.fill_(value)
        plain.lr = value
        advance(ours, 1, first=step)
        advance(plain, 1, first=step)
    assert_same_training(ours, plain)


def test_a_schedule_that_starts_at_zero_counts_its_first_step(path: Path) -> None:
    schedule = schedules.CosineDecay(0.0, 10, warmup_target=1.0, warmup_steps=5)
    optimizer = AdadeltaKeras(make_params(), schedule, **path.options)
    advance(optimizer, 1)
    assert optimizer.iterations == 1
    fresh = AdadeltaKeras(make_params(), schedule, **path.options)
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    fresh.step()  # as distributed checkpointing steps, with a learning rate that is zero already
    assert fresh.iterations == 0
    assert len(fresh.state) == 2
