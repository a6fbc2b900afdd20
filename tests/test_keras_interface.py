"""What a Keras optimizer can be asked: gradients handed over, configuration, weights, slots, schedules and callables."""

import copy
import io
import json
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import expecttest
import numpy as np
import pytest
import torch
from cases import DTYPES, Path, assert_same_bits, assert_unchanged, dtype_name, gradients, randn, snapshot, to_numpy
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.schedules import ExponentialDecay, LearningRateSchedule, PolynomialDecay


def make_params(*shapes: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(torch.full(shape, 1.0 + i)) for i, shape in enumerate(shapes or ((3,), (2, 2)))]


def set_gradients(optimizer: AdadeltaKeras, step: int = 0) -> None:
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            (p.grad,) = gradients(p.shape, p.dtype, 1, seed=10 * step + i)


def advance(optimizer: AdadeltaKeras, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_gradients(optimizer, step)
        optimizer.step()


def assert_same_training(one: AdadeltaKeras, other: AdadeltaKeras) -> None:
    for x, y in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert_same_bits(p, q)


class Halving(LearningRateSchedule):
    """A user's own: 1 / 2**step, with a configuration."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: Any) -> Any:
        return self.start * 0.5**step

    def get_config(self) -> dict[str, Any]:
        return {"start": self.start}


class WithoutConfig(LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 1.0 / (1.0 + step)


# ---- Gradients handed over ------------------------------------------------------------------------------------------


def test_apply_gradients_is_a_step(path: Path) -> None:
    ours, theirs = (AdadeltaKeras(make_params(), 1.0, clipnorm=0.5, **path.options) for _ in range(2))
    for step in range(3):
        set_gradients(theirs, step)
        params = ours.param_groups[0]["params"]
        pairs = [(q.grad, p) for p, q in zip(params, theirs.param_groups[0]["params"], strict=True)]
        ours.apply_gradients(iter(pairs))
        theirs.step()
        assert all(p.grad is None for p in params)
    assert_same_training(ours, theirs)
    assert ours.iterations == 3


def test_apply_gradients_runs_hooks_and_takes_any_order_over_groups(path: Path) -> None:
    params = make_params((3,), (2,), (4,))
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], 1.0, **path.options)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    grads = [torch.ones(3), torch.ones(2), torch.ones(4)]
    optimizer.apply_gradients([(grads[2], params[2]), (grads[0], params[0]), (grads[1], params[1])])
    assert calls == ["pre", "post"]
    expected = [
        OracleOptimizer([np.float32([1 + i] * len(g))], lr)
        for i, (g, lr) in enumerate(zip(grads, (1.0, 0.5, 0.5), strict=True))
    ]
    for param, grad, oracle in zip(params, grads, expected, strict=True):
        oracle.step([grad.numpy()])
        assert_same_bits(param, oracle.oracles[0].p)


def test_gradients_that_are_none(path: Path) -> None:
    params = make_params()
    optimizer = AdadeltaKeras([("kernel", params[0]), ("bias", params[1])], **path.options)
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables: .*'bias'"):
        optimizer.apply_gradients([(torch.ones(3), params[0]), (None, params[1])])
    assert optimizer.iterations == 1
    assert params[1] not in optimizer.state
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"No gradients provided for any variable: .*'kernel'.*'bias'"):
        optimizer.apply_gradients([(None, p) for p in params])
    optimizer.apply_gradients([])
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (lambda p: 3, TypeError, "grads_and_vars must consist of"),
        (lambda p: [p], TypeError, "grads_and_vars must consist of"),
        (
            lambda p: [(1.0, p)],
            TypeError,
            r"tuple 0 of grads_and_vars must be \(Tensor, parameter\), got \(float, Parameter\)",
        ),
        (lambda p: [(torch.ones(3), "p")], TypeError, r"got \(Tensor, str\)"),
        (
            lambda p: [(torch.ones(3), torch.ones(3))],
            ValueError,
            r"a tensor of shape \(3,\) that is no parameter of this",
        ),
        (lambda p: [(torch.ones(4), p)], RuntimeError, r"has shape \(3,\), but its gradient has shape \(4,\)"),
        (lambda p: [(torch.ones(3, dtype=torch.int64), p)], RuntimeError, "gradient has dtype torch.int64"),
    ],
)
def test_malformed_gradients_change_nothing(path: Path, pairs: Any, error: Any, message: str) -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params, **path.options)
    advance(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients(pairs(params[0]))
    assert_unchanged(optimizer, before)
    optimizer.step()  # nothing of the refused call is left
    assert optimizer.iterations == 2


def test_a_parameter_handed_over_twice_is_updated_twice(path: Path) -> None:
    (param,) = make_params((3,))
    optimizer = AdadeltaKeras([param], 1.0, **path.options)
    optimizer.apply_gradients([(torch.full((3,), 2.0), param), (torch.full((3,), -1.0), param)])
    oracle = OracleOptimizer([np.ones(3, np.float32)], 1.0)
    oracle.step([np.full(3, 2.0)])
    oracle.step([np.full(3, -1.0)])
    assert_same_bits(param, oracle.oracles[0].p)
    assert optimizer.iterations == 1


def test_the_aggregator_can_be_left_out(path: Path) -> None:
    calls: list[int] = []

    def aggregate(pairs: Any) -> Any:
        calls.append(len(pairs))
        return pairs

    (param,) = make_params((3,))
    optimizer = AdadeltaKeras([param], gradient_aggregator=aggregate, gradient_transformers=[aggregate], **path.options)
    optimizer.apply_gradients([(torch.ones(3), param)], name="ignored")
    assert calls == [1, 1]
    optimizer.apply_gradients([(torch.ones(3), param)], experimental_aggregate_gradients=False)
    assert calls == [1, 1, 1]


def test_minimize(path: Path) -> None:
    ours, theirs = (AdadeltaKeras(make_params((3,), (3,)), 1.0, **path.options) for _ in range(2))
    x, y = ours.param_groups[0]["params"]

    def loss() -> Tensor:
        return (x * x).sum() + (y * y * y).sum()

    def variables() -> list[Tensor]:
        return [x, y]

    calls: list[Callable[[], None]] = [
        lambda: torch.no_grad()(ours.minimize)(loss, [x, y]),
        lambda: ours.minimize(loss(), (x, y)),
        lambda: ours.minimize(loss, variables),
        lambda: ours.minimize(lambda: x * x + y * y * y, [x, [y]], grad_loss=torch.ones(3)),  # type: ignore[list-item]
        lambda: ours.minimize(lambda: x * x + y * y * y, {"x": x, "y": y}),  # type: ignore[arg-type]
    ]
    for call in calls:
        call()
        p, q = theirs.param_groups[0]["params"]
        theirs.zero_grad()
        ((p * p).sum() + (q * q * q).sum()).backward()
        theirs.step()
        assert x.grad is None
    assert_same_training(ours, theirs)


def test_minimize_refuses_what_it_cannot(path: Path) -> None:
    x, y = make_params((3,), (3,))
    optimizer = AdadeltaKeras([x, y], **path.options)
    with pytest.raises(TypeError, match="must be a Tensor, or a callable that returns one, got float"):
        optimizer.minimize(lambda: 1.0, [x])  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.minimize(torch.ones(()), [x, y])
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.minimize((x * x).sum(), [x, y])
    with pytest.raises(ValueError, match=r"Variable 1 of shape \(3,\) has `None` for gradient"):
        optimizer.get_gradients((x * x).sum(), [x, y])
    (grad,) = optimizer.get_gradients((x * x).sum(), x)
    assert_same_bits(grad, 2 * x.detach())


# ---- Configuration --------------------------------------------------------------------------------------------------


def test_config_of_every_kind_of_hyperparameter() -> None:
    params = make_params()
    assert AdadeltaKeras(params).get_config() == {
        "name": "Adadelta", "learning_rate": 0.001, "decay": 0.0, "rho": 0.95, "epsilon": 1e-7,
    }  # fmt: skip
    optimizer = AdadeltaKeras(
        params, torch.tensor(0.5), rho=lambda: 0.9, epsilon=1e-3, name="A", decay=0.1, clipvalue=1.0, clipnorm=2.0
    )
    assert optimizer.get_config() == {
        "name": "A", "clipnorm": 2.0, "clipvalue": 1.0, "learning_rate": 0.5, "decay": 0.1, "rho": 0.9, "epsilon": 1e-3,
    }  # fmt: skip
    optimizer = AdadeltaKeras(params, ExponentialDecay(0.5, 3, 0.7), global_clipnorm=3.0)
    assert json.loads(json.dumps(optimizer.get_config())) == {
        "name": "Adadelta",
        "global_clipnorm": 3.0,
        "learning_rate": schedules.serialize(ExponentialDecay(0.5, 3, 0.7)),
        "decay": 0.0,
        "rho": 0.95,
        "epsilon": 1e-7,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-3, "name": "A", "decay": 0.1, "clipvalue": 1.0},
        {"learning_rate": ExponentialDecay(0.5, 3, 0.7), "clipnorm": 2.0},
        {"global_clipnorm": 2.0},
    ],
)
def test_from_config_makes_the_same_optimizer(path: Path, options: dict[str, Any]) -> None:
    one = AdadeltaKeras(make_params(), **options, **path.options)
    config = one.get_config()
    before = copy.deepcopy(config)
    other = AdadeltaKeras.from_config(config, make_params(), **path.options)
    assert config == before
    assert other.get_config() == config
    advance(one, 3)
    advance(other, 3)
    assert_same_training(one, other)


def test_from_config_takes_what_keras_writes() -> None:
    params = make_params()
    legacy = {"name": "Adadelta", "lr": 0.5, "decay": 0.0, "rho": 0.9, "epsilon": 1e-7, "is_legacy_optimizer": True}
    assert AdadeltaKeras.from_config(legacy, params).learning_rate == 0.5
    keras_3 = {
        "name": "adadelta", "learning_rate": 0.5, "weight_decay": None, "clipnorm": None, "global_clipnorm": 1.0,
        "clipvalue": None, "use_ema": False, "ema_momentum": 0.99, "ema_overwrite_frequency": None,
        "loss_scale_factor": None, "gradient_accumulation_steps": None, "rho": 0.9, "epsilon": 1e-7,
    }  # fmt: skip
    assert AdadeltaKeras.from_config(keras_3, params).global_clipnorm == 1.0
    with pytest.raises(ValueError, match=r"the configuration has weight_decay=0\.1, which AdadeltaKeras does not do"):
        AdadeltaKeras.from_config({**keras_3, "weight_decay": 0.1}, params)
    custom = {"learning_rate": {"class_name": "Halving", "config": {"start": 2.0}}}
    with pytest.raises(ValueError, match="Halving"):
        AdadeltaKeras.from_config(custom, params)
    optimizer = AdadeltaKeras.from_config(custom, params, custom_objects={"Halving": Halving})
    assert isinstance(optimizer.learning_rate, Halving)
    assert optimizer.learning_rate.start == 2.0


# ---- Weights and slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_weights_travel(path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(randn(shape, dtype, generator)) for shape in ((3, 2), (4,))]
    one = AdadeltaKeras(params, 1.0, **path.options)
    advance(one, 2)
    weights = one.get_weights()
    assert all(isinstance(weight, np.ndarray) for weight in weights)
    assert weights[0] == 2
    assert weights[0].dtype == np.int64
    for index, (param, name) in enumerate([(p, key) for key in ("square_avg", "acc_delta") for p in params], 1):
        np.testing.assert_array_equal(weights[index], to_numpy(one.state[param][name]))
    other = AdadeltaKeras([Parameter(p.detach().clone()) for p in params], 1.0, **path.options)
    other.set_weights(weights)
    advance(one, 2, first=5)
    advance(other, 2, first=5)
    assert_same_training(one, other)


def test_weights_are_copies_and_zeros_where_there_is_no_state(path: Path) -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params, **path.options)
    params[0].grad = torch.ones(3)
    optimizer.step()
    weights = optimizer.get_weights()
    assert [w.shape for w in weights] == [(), (3,), (2, 2), (3,), (2, 2)]
    assert not weights[2].any()
    assert params[1] not in optimizer.state
    weights[1][:] = 7
    assert (optimizer.state[params[0]]["square_avg"] != 7).all()
    assert optimizer.variables()[1] is optimizer.state[params[0]]["square_avg"]
    assert len(optimizer.weights) == 5


def test_old_weights_without_iterations() -> None:
    optimizer = AdadeltaKeras(make_params())
    advance(optimizer, 3)
    weights = optimizer.get_weights()
    optimizer.set_weights(weights[1:])
    assert optimizer.iterations == 0
    optimizer.set_weights([np.array(5), *map(torch.as_tensor, weights[1:])])
    assert optimizer.iterations == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w[:-2], r"with a weight list of length 3, but the optimizer was expecting 5 weights\."),
        (lambda w: [*w, w[0]], "weight list of length 6"),
        (
            lambda w: [*w[:-1], w[-1][:1]],
            r"Optimizer weight shape \(2, 2\) not compatible with provided weight shape \(1, 2\)",
        ),
        (lambda w: [w[1], *w[1:]], "the first weight is the number of iterations"),
        (lambda w: [np.array(1.5), *w[1:]], "the first weight is the number of iterations, got 1.5"),
        (lambda w: [np.array(-1), *w[1:]], "iterations must be >= 0"),
        (lambda w: [*w[:-1], w[-1] + 0j], "weight 4 is complex"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change: Any, message: str) -> None:
    optimizer = AdadeltaKeras(make_params())
    advance(optimizer, 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.set_weights(change(optimizer.get_weights()))
    assert_unchanged(optimizer, before)


def test_slots() -> None:
    params = make_params()
    optimizer = AdadeltaKeras(params)
    assert optimizer.get_slot_names() == ["accum_grad", "accum_var"]
    with pytest.raises(KeyError, match="has no state"):
        optimizer.get_slot(params[0], "accum_grad")
    advance(optimizer, 1)
    assert optimizer.get_slot(params[0], "accum_grad") is optimizer.state[params[0]]["square_avg"]
    assert optimizer.get_slot(params[1], "accum_var") is optimizer.state[params[1]]["acc_delta"]
    with pytest.raises(KeyError, match="no slot 'momentum'; there are accum_grad, accum_var"):
        optimizer.get_slot(params[0], "momentum")


# ---- Schedules and callables ----------------------------------------------------------------------------------------


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


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "learning_rate": ExponentialDecay(0.5, 3, 0.7), "rho": 0.9, "epsilon": 1e-3, "decay": 0.1, "clipvalue": 1.0,
    "clipnorm": 2.0, "name": "A",
}  # fmt: skip


def saved(optimizer: AdadeltaKeras) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    result: dict[str, Any] = torch.load(buffer, weights_only=True)
    return result


@pytest.mark.parametrize("capturable", [False, True])
def test_all_of_it_survives_a_checkpoint(path: Path, capturable: bool) -> None:
    one = AdadeltaKeras(make_params(), **EVERYTHING, capturable=capturable, **path.options)
    advance(one, 3)
    other = AdadeltaKeras([Parameter(p.detach().clone()) for p in one.param_groups[0]["params"]], **path.options)
    other.load_state_dict(saved(one))
    assert other.get_config() == one.get_config()
    assert isinstance(other.learning_rate, ExponentialDecay)
    assert one.param_groups[0].keys() == other.param_groups[0].keys() == one.state_dict()["param_groups"][0].keys()
    advance(one, 3, first=3)
    advance(other, 3, first=3)
    assert_same_training(one, other)
    assert other.iterations == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_all_of_it_survives_copies(path: Path, copied: Any) -> None:
    one = AdadeltaKeras(make_params(), **{**EVERYTHING, "rho": float("0.9").__abs__}, **path.options)
    one.gradient_aggregator = list
    advance(one, 3)
    other = copied(one)
    assert other.gradient_aggregator is list
    assert other.get_config() == one.get_config()
    advance(one, 3, first=3)
    advance(other, 3, first=3)
    assert_same_training(one, other)
    other.lr = 0.25
    assert isinstance(one.lr, ExponentialDecay)


def test_numpy_scalars_in_a_checkpoint(path: Path) -> None:
    """weights_only refuses them: they become numbers, or Tensors where a number would lose digits."""
    params = [Parameter(torch.ones(3, dtype=torch.float64))]
    one = AdadeltaKeras(
        params, np.float64(0.1), np.float32(0.9), np.float64(1e-3), decay=np.float64(0.3), clipvalue=np.float32(2), **path.options
    )  # fmt: skip
    config = json.loads(json.dumps(one.get_config()))
    assert config["learning_rate"] == 0.1
    assert config["decay"] == 0.3
    other = AdadeltaKeras([Parameter(p.detach().clone()) for p in params], **path.options)
    other.load_state_dict(saved(one))
    assert other.learning_rate == 0.1
    assert type(other.rho) is float
    advance(one, 3)
    advance(other, 3)
    assert_same_training(one, other)
    (oracle,) = (OracleOptimizer([np.ones(3)], np.float64(0.1), np.float32(0.9), 1e-3, clipvalue=2.0),)
    oracle.decay = np.float64(0.3)
    for step in range(3):
        oracle.step([gradients((3,), torch.float64, 1, seed=10 * step)[0].numpy()])
    assert_same_bits(params[0], oracle.oracles[0].p)


def test_a_users_schedule_in_a_checkpoint(path: Path) -> None:
    one = AdadeltaKeras(make_params(), Halving(2.0), **path.options)
    advance(one, 2)
    state = saved(one)
    other = AdadeltaKeras(make_params(), **path.options)
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"the schedule to load cannot be made: .*Halving.*set optimizer.learning_rate"
    ):
        other.load_state_dict(state)
    assert_unchanged(other, before)
    other.learning_rate = Halving(7.0)
    other.load_state_dict(state)
    assert other.learning_rate.start == 2.0
    same = Halving(2.0)
    other.learning_rate = same
    other.load_state_dict(state)
    assert other.learning_rate is same


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gradient_aggregator", list),
        ("gradient_transformers", [list]),
        ("rho", lambda: 0.9),
        ("epsilon", lambda: 0.1),
        ("learning_rate", lambda: 0.5),
        ("learning_rate", WithoutConfig()),
    ],
)
def test_what_is_not_saved_must_be_given_again(path: Path, option: str, value: Any) -> None:
    one = AdadeltaKeras(make_params(), **{option: value}, **path.options)
    advance(one, 2)
    state = saved(one)
    assert state["param_groups"][0]["callables"] == [option]
    other = AdadeltaKeras(make_params(), **path.options)
    before = snapshot(other)
    with pytest.raises(ValueError, match=rf"was saved with .*{option}.* not saved: set optimizer.{option} first"):
        other.load_state_dict(state)
    assert_unchanged(other, before)
    setattr(other, option, value)
    other.load_state_dict(state)
    assert getattr(other, option) == value
    with torch.no_grad():
        for p, q in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            q.copy_(p)
    advance(one, 2, first=3)
    advance(other, 2, first=3)
    assert_same_training(one, other)


def test_a_checkpoint_without_a_schedule_replaces_one(path: Path) -> None:
    one = AdadeltaKeras(make_params(), 0.5, **path.options)
    other = AdadeltaKeras(make_params(), ExponentialDecay(1.0, 2, 0.5), gradient_aggregator=list, **path.options)
    advance(one, 1)
    other.load_state_dict(saved(one))
    assert other.learning_rate == 0.5
    assert other.gradient_aggregator is list  # a function is no part of a checkpoint


def test_groups_have_their_own_schedules(path: Path) -> None:
    params = make_params((3,), (3,), (3,))
    one = AdadeltaKeras(
        [
            {"params": params[:1]},
            {"params": params[1:2], "learning_rate": PolynomialDecay(1.0, 5)},
            {"params": params[2:], "lr": 0.1},
        ],
        ExponentialDecay(0.5, 3, 0.7),
        **path.options,
    )
    assert [group["lr"] for group in one.param_groups] == [0.5, 1.0, 0.1]
    advance(one, 2)
    copies = [[Parameter(p.detach().clone())] for p in params]
    other = AdadeltaKeras([{"params": p} for p in copies], **path.options)
    other.load_state_dict(saved(one))
    advance(one, 2, first=2)
    advance(other, 2, first=2)
    assert_same_training(one, other)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in one.param_groups]
    one.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert one.param_groups[3]["lr"] == ExponentialDecay(0.5, 3, 0.7)(4)


def test_the_groups_of_one_optimizer_make_another(path: Path) -> None:
    one = AdadeltaKeras(make_params(), ExponentialDecay(0.5, 3, 0.7), **path.options)
    advance(one, 2)
    groups = [dict(group) for group in one.param_groups]
    other = AdadeltaKeras(groups, **path.options)
    assert isinstance(other.learning_rate, ExponentialDecay)
    assert other.iterations == 2


class Counting(LearningRateSchedule):
    """1, 1/2, 1/3, …: whatever the step, with the number of its calls in its configuration."""

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls

    def __call__(self, step: Any) -> Any:
        self.calls += 1
        return 1.0 / self.calls

    def get_config(self) -> dict[str, Any]:
        return {"calls": self.calls}


def test_a_schedule_is_called_once_for_all_groups(path: Path) -> None:
    schedule = Counting()
    optimizer = AdadeltaKeras([{"params": [p]} for p in make_params((3,), (3,), (2,))], schedule, **path.options)
    schedule.calls = 0
    advance(optimizer, 2)
    assert schedule.calls == 2
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3


def test_what_changed_in_a_schedule_is_saved_and_copied(path: Path) -> None:
    schedule = Counting()
    optimizer = AdadeltaKeras(make_params(), schedule, **path.options)
    advance(optimizer, 3)
    assert optimizer.state_dict()["param_groups"][0]["schedule"]["config"] == {"calls": schedule.calls}
    assert copy.deepcopy(optimizer).learning_rate.calls == schedule.calls
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.learning_rate is schedule


def test_a_callable_may_return_a_tensor_that_is_filled(path: Path) -> None:
    lr = torch.tensor(1.0)
    ours, plain = AdadeltaKeras(make_params(), lambda: lr, **path.options), AdadeltaKeras(make_params(), **path.options)
    for step, value in enumerate((1.0, 0.5, 0.25)):
        lr.fill_(value)
        plain.lr = value
        advance(ours, 1, first=step)
        advance(plain, 1, first=step)
    assert_same_training(ours, plain)


def test_the_dictionaries_of_groups_stay_the_users(path: Path) -> None:
    def rate() -> float:
        return 0.5

    groups = [{"params": make_params((3,)), "lr": rate}, {"params": make_params((3,)), "learning_rate": 0.25}]
    for _ in range(2):
        optimizer = AdadeltaKeras(groups, lambda: 1.0, **path.options)
        assert optimizer.learning_rate is rate
        assert optimizer.param_groups[1]["lr"] == 0.25
        advance(optimizer, 1)
        assert optimizer.iterations == 1
    assert groups[0].keys() == {"params", "lr"}


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


def test_weights_may_be_the_optimizers_own() -> None:
    optimizer = AdadeltaKeras(make_params((3,)))
    advance(optimizer, 1)
    count, square_avg, acc_delta = optimizer.variables()
    expected = [count.clone(), acc_delta.clone(), square_avg.clone()]
    optimizer.set_weights([count, acc_delta, square_avg])
    for now, then in zip(optimizer.variables(), expected, strict=True):
        assert_same_bits(now, then)


def test_what_the_users_generator_raises_is_not_replaced(path: Path) -> None:
    (param,) = make_params((3,))

    def broken() -> Any:
        yield torch.ones(3), param
        raise ValueError("mine")

    optimizer = AdadeltaKeras([param], **path.options)
    with pytest.raises(ValueError, match="mine"):
        optimizer.apply_gradients(broken())
    assert optimizer.iterations == 0


def test_gradients_handed_over_inside_a_hook(path: Path) -> None:
    x, y = make_params((3,), (3,))
    optimizer = AdadeltaKeras([x, y], 1.0, **path.options)
    inner = iter([True])

    def hook(*args: Any) -> None:
        if next(inner, False):
            optimizer.apply_gradients([(torch.ones(3), y)])

    optimizer.register_step_pre_hook(hook)
    optimizer.apply_gradients([(torch.ones(3), x)])
    assert optimizer.iterations == 2
    assert_same_bits(optimizer.state[x]["square_avg"], optimizer.state[y]["square_avg"])


def test_numpy_counts_as_a_number() -> None:
    optimizer = AdadeltaKeras(make_params())
    optimizer.iterations = np.int64(5)  # type: ignore[assignment]
    assert type(optimizer.param_groups[0]["iterations"]) is int


def test_no_warning_in_ordinary_use(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = AdadeltaKeras(make_params(), **EVERYTHING, **path.options)
        advance(one, 2)
        one.apply_gradients([(torch.ones(3), one.param_groups[0]["params"][0])])
        one.load_state_dict(saved(one))
        one.set_weights(one.get_weights())
