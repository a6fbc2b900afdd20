"""`torch.compile` of a step and of a train step: one graph, the bits of an eager step, no recompilation."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")

SHAPES = (((3, 5), torch.float32), ((700,), torch.float32), ((), torch.float32), ((0, 2), torch.float32))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Training:
    """An optimizer with its parameters, and `step`, compiled or not."""

    def __init__(self, backend: str | None, options: dict[str, Any], shapes: Any = SHAPES) -> None:
        self.params = [Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in shapes]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "rho": 0.9}]
        self.optimizer = AdadeltaKeras(groups, **{"lr": 1.0, **options})
        self.counter = CompileCounterWithBackend(backend) if backend else None
        self.step: Callable[..., Any] = self.optimizer.step
        if self.counter:
            self.step = torch.compile(self.optimizer.step, backend=self.counter)

    def take(self, step: int) -> None:
        for i, p in enumerate(self.params):
            (p.grad,) = gradients(p.shape, p.dtype, 1, seed=10 * step + i)
        self.step()

    @property
    def graphs(self) -> int:
        return 0 if self.counter is None else self.counter.frame_count

    def everything(self) -> list[Tensor]:
        states = [self.optimizer.state[p] for p in self.params]
        return [
            *self.params,
            *(state[key] for state in states for key in ("square_avg", "acc_delta", "average") if key in state),
        ]


def assert_same_training(one: Training, other: Training, what: Any = "") -> None:
    for index, (actual, expected) in enumerate(zip(one.everything(), other.everything(), strict=True)):
        assert_same_bits(actual, expected, f"{what} {index}")
    assert one.optimizer.iterations == other.optimizer.iterations


def breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


MIXED = (((3, 5), torch.float64), ((70,), torch.bfloat16), ((4,), torch.complex64), ((5,), torch.float16))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "Tensor lr, rho and epsilon": {"lr": torch.tensor(0.3), "rho": torch.tensor([0.9]), "epsilon": torch.tensor(0.0)},
    "maximize": {"maximize": True},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.9, "clipvalue": 5.0},
    "decay": {"decay": 0.3, "lr": 0.1},
    "capturable": {"capturable": True},
    "weight_decay": {"weight_decay": 0.1},
    "penalty": {"weight_decay": torch.tensor(0.1), "decoupled_weight_decay": False},
    "averages": {"use_ema": True, "ema_momentum": 0.75},
    "bfloat16 state": {"state_dtype": torch.bfloat16, "use_ema": True},
    "loss_scale_factor": {"loss_scale_factor": 3.0, "clipnorm": 0.7},
}


@needs_library
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_step_is_one_graph_with_the_bits_of_an_eager_one(options: dict[str, Any]) -> None:
    compiled, eager = Training("aot_eager", options), Training(None, options)
    for step in range(4):
        for training in (compiled, eager):
            training.take(step)
        assert_same_training(compiled, eager, step)
    assert compiled.graphs == 1
    assert breaks() == {}


@needs_library
@pytest.mark.parametrize("options", [{}, {"clipnorm": 0.7}, {"decay": 0.3}], ids=str)
def test_mixed_dtypes(options: dict[str, Any]) -> None:
    compiled, eager = Training("aot_eager", options, MIXED), Training(None, options, MIXED)
    for step in range(3):
        for training in (compiled, eager):
            training.take(step)
    assert_same_training(compiled, eager)
    assert compiled.graphs == 1
    assert breaks() == {}


@needs_library
@pytest.mark.parametrize("state_dtype", [None, torch.float32])
@pytest.mark.parametrize("backend", [{"fused": True}, {"foreach": False}], ids=str)
def test_masters(state_dtype: torch.dtype | None, backend: dict[str, bool]) -> None:
    options = {"master_weights": True, "state_dtype": state_dtype, "use_ema": True, "weight_decay": 0.1, **backend}
    shapes = (((3, 5), torch.bfloat16), ((70,), torch.float32), ((4,), torch.bfloat16))
    compiled, eager = Training("aot_eager", options, shapes), Training(None, options, shapes)
    for step in range(3):
        for training in (compiled, eager):
            training.take(step)
        assert_same_training(compiled, eager, step)
    assert compiled.graphs == 1
    assert breaks() == {}
    assert {"remainder" in state for state in compiled.optimizer.state.values()} == {True, False}


@needs_library
@pytest.mark.parametrize("options", [{}, {"clipvalue": 0.3}], ids=str)
def test_a_norm_over_mixed_dtypes_has_the_bits_of_an_eager_one(options: dict[str, Any]) -> None:
    """It is taken in float64, of gradients in the opmath dtypes, and not traced."""
    compiled, eager = (Training(b, {"global_clipnorm": 0.9, **options}, MIXED[:2]) for b in ("aot_eager", None))
    for step in range(3):
        for training in (compiled, eager):
            training.take(step)
        assert_same_training(compiled, eager, step)


@needs_library
def test_inductor_gives_the_same_bits() -> None:
    options = {"lr": torch.tensor([0.3], dtype=torch.float64), "decay": 0.3, "clipvalue": 5.0, "global_clipnorm": 0.9}
    compiled, eager = Training("inductor", options), Training(None, options)
    for step in range(3):
        for training in (compiled, eager):
            training.take(step)
    assert_same_training(compiled, eager)
    assert compiled.graphs == 1
    assert breaks() == {}


@needs_library
def test_a_float64_lr_is_cast_before_decay_divides_it() -> None:
    options = {"decay": 0.3, "foreach": None}
    compiled, eager = (
        Training(b, {**options, "lr": torch.tensor(0.1, dtype=torch.float64)}) for b in ("aot_eager", None)
    )
    for step, lr in enumerate(torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()):
        for training in (compiled, eager):
            for group in training.optimizer.param_groups:
                group["lr"].fill_(lr)
            for param in training.params:
                param.data.zero_()  # so that the last bit of the learning rate shows
            training.take(step)
        assert_same_training(compiled, eager, step)


@needs_library
def test_a_tensor_lr_changes_without_recompilation() -> None:
    compiled, eager = (Training(b, {"lr": torch.tensor(1.0)}) for b in ("aot_eager", None))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(t.optimizer, 0.5) for t in (compiled, eager)]
    # What schedulers have made of it.
    compiled.step = torch.compile(compiled.optimizer.step, backend=compiled.counter)
    eager.step = eager.optimizer.step
    for step in range(4):
        for training, scheduler in zip((compiled, eager), schedulers, strict=True):
            training.take(step)
            scheduler.step()
    assert_same_training(compiled, eager)
    assert compiled.graphs == 1
    compiled.optimizer.learning_rate = torch.tensor(0.125)
    eager.optimizer.learning_rate = 0.125
    for training in (compiled, eager):
        training.take(4)
    assert_same_training(compiled, eager)
    assert compiled.graphs == 1


@needs_library
def test_a_number_for_lr_may_change_too() -> None:
    compiled, eager = (Training(b, {"lr": 1.0}) for b in ("aot_eager", None))
    for step, lr in enumerate((1.0, 0.1, 0.3, 0.7)):
        for training in (compiled, eager):
            training.optimizer.learning_rate = lr
            training.take(step)
    assert_same_training(compiled, eager)
    compiled.optimizer.param_groups[0]["lr"] = -1.0
    before = [t.clone() for t in compiled.everything()]
    with pytest.raises(ValueError, match=r"Invalid learning_rate: -1\.0"):
        compiled.take(4)
    for actual, expected in zip(compiled.everything(), before, strict=True):
        assert_same_bits(actual, expected)


@needs_library
def test_a_compiled_train_step() -> None:
    """Forward, backward and step, with no more breaks than torch.optim.Adadelta has."""

    def run(make: Callable[..., torch.optim.Optimizer], compiles: bool) -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        optimizer = make(model.parameters(), lr=torch.tensor(1.0))

        def train(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(train, backend="aot_eager") if compiles else train
        for _ in range(3):
            step(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))
        return [p.detach() for p in model.parameters()], sum(breaks().values())

    ours, our_breaks = run(AdadeltaKeras, compiles=True)
    eager, _ = run(AdadeltaKeras, compiles=False)
    _, their_breaks = run(torch.optim.Adadelta, compiles=True)
    for actual, expected in zip(ours, eager, strict=True):
        assert_same_bits(actual, expected)
    assert our_breaks <= their_breaks


# What cannot be traced runs as without torch.compile.
UNTRACED: dict[str, dict[str, Any]] = {
    "schedule": {"lr": schedules.ExponentialDecay(1.0, 2, 0.5)},
    "callable": {"rho": lambda: 0.9},
    "transformers": {"gradient_transformers": [lambda pairs: [(2 * g, p) for g, p in pairs]]},
    "clipping in Python": {"foreach": False, "global_clipnorm": 0.9},
    "NumPy": {"epsilon": torch.tensor(1e-3, dtype=torch.float64).numpy()[()]},
}


@pytest.mark.parametrize("options", UNTRACED.values(), ids=UNTRACED)
def test_what_cannot_be_traced_runs_all_the_same(options: dict[str, Any]) -> None:
    compiled, eager = Training("eager", options), Training(None, options)
    for step in range(3):
        for training in (compiled, eager):
            training.take(step)
    assert_same_training(compiled, eager)


@needs_library
def test_a_change_of_plan_is_noticed() -> None:
    """What appears after the first step: gradients, state of the user's, a schedule, a scaler's finding."""
    compiled, eager = Training("aot_eager", {}), Training(None, {})
    for training in (compiled, eager):
        training.params[0].grad = torch.ones(3, 5)
        training.step()
        training.take(0)
        training.optimizer.state.clear()
        training.take(1)
        training.optimizer.state[training.params[1]]["acc_delta"] = torch.full((700,), 0.25)
        training.take(2)
        training.optimizer.zero_grad()
        training.step()
        training.optimizer.found_inf = torch.tensor([1.0])
        training.take(3)
        training.optimizer.found_inf = None
        training.optimizer.learning_rate = schedules.ExponentialDecay(1.0, 2, 0.5)
        training.take(4)
        training.optimizer.learning_rate = 0.5
        training.optimizer.gradient_transformers = [lambda pairs: [(2 * g, p) for g, p in pairs]]
        training.take(5)
    assert_same_training(compiled, eager)
    assert compiled.optimizer.iterations == 6


@needs_library
def test_errors_are_those_of_an_eager_step() -> None:
    compiled = Training("aot_eager", {})
    compiled.take(0)
    before = [t.clone() for t in compiled.everything()]
    compiled.optimizer.state[compiled.params[0]]["square_avg"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has shape"):
        compiled.take(1)
    compiled.optimizer.state[compiled.params[0]]["square_avg"] = before[4].clone()
    for actual, expected in zip(compiled.everything(), before, strict=True):
        assert_same_bits(actual, expected)
    assert compiled.optimizer.iterations == 1


@needs_library
def test_a_closure_is_traced_too() -> None:
    results = []
    for compiles in (True, False):
        param = Parameter(torch.ones(3))
        optimizer = AdadeltaKeras([param], 1.0)

        def closure(param: Tensor = param, optimizer: AdadeltaKeras = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return loss

        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        losses = [step(closure).item() for _ in range(3)]
        results.append((param.detach().clone(), losses))
        assert optimizer.iterations == 3
    assert_same_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_the_python_path_can_be_compiled() -> None:
    """Without the library, or by choice: single-tensor operations, whose last bits are the compiler's business."""
    compiled, eager = (Training(b, {"foreach": False, "decay": 0.3}) for b in ("aot_eager", None))
    for step in range(2):
        for training in (compiled, eager):
            training.take(step)
    for actual, expected in zip(compiled.everything(), eager.everything(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert compiled.graphs == 1


@needs_library
def test_a_checkpoint_of_a_compiled_training() -> None:
    compiled, eager = Training("aot_eager", {}), Training(None, {})
    for training in (compiled, eager):
        training.take(0)
    eager.optimizer.load_state_dict(compiled.optimizer.state_dict())
    for training in (compiled, eager):
        training.take(1)
    assert_same_training(compiled, eager)
    assert isinstance(eager.optimizer.param_groups[0]["iterations"], int)
    assert math.isfinite(compiled.optimizer.iterations)
