"""`step_in_backward`: the bits of backward and step, with gradients that are gone at once."""

import doctest
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Path, assert_same_bits
from processes import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import path as path

from torch_adadelta import AdadeltaKeras, in_backward, schedules, step_in_backward
from torch_adadelta.backends import kernels

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipvalue": {"clipvalue": 0.05},
    "schedule": {"lr": schedules.ExponentialDecay(1.0, 2, 0.5)},
    "decay": {"decay": 0.5},
    "Tensor lr": {"lr": torch.tensor(0.5)},
    "capturable, maximize": {"capturable": True, "maximize": True},
    "weight_decay": {"weight_decay": 0.1},
    "penalty": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "averages": {"use_ema": True, "ema_momentum": 0.75, "ema_overwrite_frequency": 2},
    "masters": {"master_weights": True, "use_ema": True, "weight_decay": 0.1},
    "loss_scale_factor": {"loss_scale_factor": 3.0, "clipvalue": 0.05},
}


class Training:
    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4).double(), nn.Linear(4, 4).bfloat16())
        self.model[2].weight.requires_grad_(False)
        shared = self.model[0].weight
        groups = [{"params": [shared]}, {"params": [p for p in self.model.parameters() if p is not shared], "rho": 0.9}]
        self.optimizer = AdadeltaKeras(groups, **{"lr": 1.0, **options})

    def loss(self, step: int) -> Tensor:
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        hidden = torch.tanh(self.model[0](x)) + (x @ self.model[0].weight.t()) * 0.1  # a weight that is used twice
        return self.model[3](self.model[2](hidden.double()).bfloat16()).float().square().sum()

    def everything(self) -> list[Tensor]:
        params = list(self.model.parameters())
        return [*params, *(t for p in params for t in self.optimizer.state.get(p, {}).values())]


def assert_same_training(one: Training, other: Training) -> None:
    for index, (actual, expected) in enumerate(zip(one.everything(), other.everything(), strict=True)):
        assert_same_bits(actual, expected, str(index))
    assert one.optimizer.iterations == other.optimizer.iterations


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_backward_and_step(path: Path, options: dict[str, Any]) -> None:
    ours, usual = Training({**options, **path.options}), Training({**options, **path.options})
    handle = step_in_backward(ours.optimizer)
    for step in range(4):
        loss, expected = ours.loss(step), usual.loss(step)
        assert loss.item() == expected.item()
        loss.backward()
        assert all(p.grad is None for p in ours.model.parameters())
        assert ours.optimizer.iterations == step + 1
        ours.optimizer.step()  # left in the loop, it does nothing
        ours.optimizer.zero_grad()
        usual.optimizer.zero_grad()
        expected.backward()
        usual.optimizer.step()
        assert_same_training(ours, usual)
        assert ours.optimizer.param_groups[0]["lr"] == usual.optimizer.param_groups[0]["lr"]
    handle.remove()
    ours.loss(4).backward()
    assert ours.model[0].weight.grad is not None
    assert ours.optimizer.iterations == 4


def test_schedules_and_callables_are_called_once_a_pass() -> None:
    calls = []

    def rho() -> float:
        calls.append(len(calls))
        return 0.9

    training = Training({})
    optimizer = AdadeltaKeras(training.model.parameters(), schedules.ExponentialDecay(1.0, 1, 0.5), rho)
    step_in_backward(optimizer)
    for step in range(3):
        training.loss(step).backward()
    assert calls == [0, 1, 2]


def test_a_number_that_is_written_amid_a_pass_holds_from_the_next_one_on() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdadeltaKeras([first, second], learning_rate=1.0)
    handle = step_in_backward(optimizer)
    group = optimizer.param_groups[0]
    written = {"lr": 1.0}
    second.register_post_accumulate_grad_hook(lambda _: group.update(written))
    for lr, moves in ((1.0, True), (0.0, True), (0.0, False), (1.0, False), (1.0, True)):
        written["lr"] = lr
        before = first.detach().clone()
        ((first * 2) * second).sum().backward()
        assert bool((first != before).all()) == moves
    handle.remove()


def test_no_more_than_one_gradient_is_alive_at_a_time() -> None:
    layers = [nn.Linear(50, 50) for _ in range(6)]
    params = [p for layer in layers for p in layer.parameters()]
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(weakref.ref(param.grad))
        alive.append(sum(grad() is not None for grad in seen))

    for p in params:
        p.register_post_accumulate_grad_hook(watch)
    step_in_backward(AdadeltaKeras(params, 1.0))
    x = torch.ones(2, 50)
    for layer in layers:
        x = layer(x)
    x.sum().backward()
    assert alive == [1] * 12


def test_a_pass_of_autograd_grad_is_no_step() -> None:
    training = Training({})
    step_in_backward(training.optimizer)
    params = [p for p in training.model.parameters() if p.requires_grad]
    torch.autograd.grad(training.loss(0), params)
    assert training.optimizer.iterations == 0
    assert not training.optimizer.state
    training.loss(0).backward()
    assert training.optimizer.iterations == 1


def test_a_failed_pass_is_not_counted() -> None:
    training = Training({"lr": schedules.ExponentialDecay(1.0, 2, 0.5)})
    step_in_backward(training.optimizer)
    training.loss(0).backward()
    written = [group["lr"] for group in training.optimizer.param_groups]
    bias = training.model[0].bias

    def fail(grad: Tensor) -> None:
        raise RuntimeError("of the user's own")

    handle = bias.register_hook(fail)
    with pytest.raises(RuntimeError, match="of the user's own"):
        training.loss(1).backward()
    assert training.optimizer.iterations == 1
    assert [group["lr"] for group in training.optimizer.param_groups] == written
    handle.remove()
    training.loss(1).backward()
    assert training.optimizer.iterations == 2
    assert [group["lr"] for group in training.optimizer.param_groups] != written


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "clipnorm": ({"clipnorm": 1.0}, r"clipnorm=1.0 cannot be applied, for a norm is taken before"),
    "global_clipnorm": (
        {"global_clipnorm": 1.0},
        r"global_clipnorm=1.0 cannot be applied, for the norm of all gradients",
    ),
    "aggregator": ({"gradient_aggregator": lambda pairs: pairs}, "are called with all gradients"),
    "transformers": ({"gradient_transformers": [lambda pairs: pairs]}, "are called with all gradients"),
    "differentiable": ({"differentiable": True}, "group 0 is differentiable"),
    "norm_group": ({"norm_group": "world"}, "norm_group is for global_clipnorm"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any], message: str) -> None:
    training = Training(options)
    with pytest.raises(ValueError, match=f"step_in_backward: .*{message}"):
        step_in_backward(training.optimizer)


def test_a_choice_that_cannot_run_and_a_dtensor_are_refused() -> None:
    training = Training({})
    training.optimizer.param_groups[1].update(fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot both be True"):
        step_in_backward(training.optimizer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        param = nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(ValueError, match="step_in_backward: parameter 0 of group 0 is a DTensor"):
            step_in_backward(AdadeltaKeras([param]))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_what_is_set_later_is_refused_before_the_first_write(option: str) -> None:
    training = Training({})
    step_in_backward(training.optimizer)
    training.loss(0).backward()
    setattr(training.optimizer, option, 1.0)
    before = [t.clone() for t in training.everything()]
    with pytest.raises(ValueError, match=f"step_in_backward: {option}=1.0 cannot be applied"):
        training.loss(1).backward()
    for actual, expected in zip(training.everything(), before, strict=True):
        assert_same_bits(actual, expected)
    assert training.optimizer.iterations == 1


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("decay", 0.5, r"decay belongs to the whole optimizer, but group 0 has 0\.0 and group 1 has 0\.5"),
        ("rho", 2.0, r"Invalid rho: 2\.0"),
        ("lr", 7.0, "its learning_rate is given by the schedule .* which would overwrite that"),
    ],
)
def test_what_is_written_to_a_group_is_checked_before_the_first_write(key: str, value: float, error: str) -> None:
    training = Training({"lr": schedules.ExponentialDecay(1.0, 2, 0.5)})
    step_in_backward(training.optimizer)
    training.loss(0).backward()
    training.optimizer.param_groups[1][key] = value
    before = [t.clone() for t in training.everything()]
    with pytest.raises((ValueError, RuntimeError), match=error):
        training.loss(1).backward()
    for actual, expected in zip(training.everything(), before, strict=True):
        assert_same_bits(actual, expected)
    assert training.optimizer.iterations == 1


def test_accumulation_is_refused_before_the_first_write() -> None:
    training = Training({})
    training.loss(0).backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of group 0 has a gradient already\. Gradients cannot be accum"
    ):
        step_in_backward(training.optimizer)
    training.optimizer.zero_grad()
    step_in_backward(training.optimizer)
    before = [t.clone() for t in training.everything()]
    training.model[3].bias.grad = torch.ones_like(training.model[3].bias)
    with pytest.raises(RuntimeError, match="has a gradient already"):
        training.loss(0).backward()
    for actual, expected in zip(training.everything(), before, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("fused", [True, None])
def test_a_scaler_is_refused(fused: bool | None) -> None:
    training = Training({"fused": fused if kernels.is_loaded else None})
    step_in_backward(training.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(training.loss(0)).backward()
    with pytest.raises(RuntimeError, match="when no GradScaler has unscaled them yet"):
        scaler.step(training.optimizer)


def test_twice_is_refused() -> None:
    optimizer = Training({}).optimizer
    handle = step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="is on already"):
        step_in_backward(optimizer)
    handle.remove()
    step_in_backward(optimizer)


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refused_among_processes() -> str:
    assert dist.is_initialized()
    return error_of(lambda: step_in_backward(Training({}).optimizer))


def test_several_processes_are_refused(two: Processes) -> None:
    for error in two.run(refused_among_processes):
        assert error.startswith("RuntimeError: step_in_backward: there are 2 processes, and gradients would be applied")


def test_docstring_example() -> None:
    results = doctest.testmod(in_backward, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
