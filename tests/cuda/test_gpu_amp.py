"""GradScaler on CUDA: the fused update unscales and skips by itself, on the device."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STEP_OPTIONS, assert_same_bits, gradients
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = (torch.float32, torch.float64, torch.float32, torch.bfloat16)
SIZES = (300, 7, 70_001, 64)

OPTIONS: dict[str, dict[str, Any]] = {
    **STEP_OPTIONS,
    "aggregator": {"gradient_aggregator": lambda pairs: [(3 * g, p) for g, p in pairs]},
}


def params() -> list[Tensor]:
    return [torch.ones(n, dtype=dtype) for n, dtype in zip(SIZES, DTYPES, strict=True)]


def grads_of(step: int) -> list[Tensor]:
    """Of a range that times a scale of 2^16 still fits."""
    return [gradients((n,), d, 1, seed=10 * step + i)[0] for i, (n, d) in enumerate(zip(SIZES, DTYPES, strict=True))]


def scaler_of(scale: float) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    scaler.scale(torch.zeros((), device="cuda"))  # makes the scale
    return scaler


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("unscales", [False, True], ids=["inside", "unscale_"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_power_of_two_changes_no_bit(
    options: dict[str, Any], unscales: bool, capturable: bool, twins: Callable[..., Any]
) -> None:
    """Against a CPU that never saw a scale; steps with an infinite or nan gradient are as if they were not."""
    pair = twins(params(), cuda={"fused": True, "capturable": capturable}, **options)
    scaler = scaler_of(2.0**16)
    for step in range(6):
        scale = scaler.get_scale()
        pair.set_gradients(grads_of(step))
        for q in pair.cuda_params:
            q.grad.mul_(scale)
        if step in (0, 3):
            pair.cuda_params[0].grad[5] = math.inf if step == 0 else math.nan
        before = [q.grad.clone() for q in pair.cuda_params]
        if unscales:
            scaler.unscale_(pair.cuda)
        scaler.step(pair.cuda)
        scaler.update()
        if not unscales:
            for q, was in zip(pair.cuda_params, before, strict=True):
                assert_same_bits(q.grad.cpu(), was.cpu(), "the user's gradient")
        if step in (0, 3):
            assert scaler.get_scale() == scale / 2
        else:
            pair.cpu.step()
        assert pair.cuda.iterations == pair.cpu.iterations
        for index, (p, q) in enumerate(zip(pair.params, pair.cuda_params, strict=True)):
            assert_same_bits(q.cpu(), p, f"parameter {index} at step {step}")
            new = {"average": p.detach()}  # where each begins; accumulators are zeros
            for name, value in pair.cuda.state[q].items():
                expected = pair.cpu.state.get(p, new).get(name, torch.zeros_like(p.detach())).to(value.dtype)
                assert_same_bits(value.cpu(), expected, f"{name} of parameter {index} at step {step}")


@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=str)
def test_any_scale_divides_as_on_the_cpu(clip: dict[str, float], twins: Callable[..., Any]) -> None:
    pair = twins(params(), cpu={"fused": True}, **clip)
    for step in range(3):
        pair.set_gradients(grads_of(step))
        for optimizer, device in ((pair.cpu, "cpu"), (pair.cuda, "cuda")):
            optimizer.grad_scale = torch.tensor([3.0], device=device)
            optimizer.found_inf = torch.tensor([0.0], device=device)
            optimizer.step()
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_synchronisation(
    options: dict[str, Any], twins: Callable[..., Any], forbid_synchronisation: Callable[[bool], None]
) -> None:
    """From the second step on: the first one moves the count of steps to the device."""
    pair = twins(params(), **options)
    scaler = scaler_of(4.0)
    for step in range(3):
        pair.set_gradients(grads_of(step))
        forbid_synchronisation(step > 0)
        scaler.step(pair.cuda)
        scaler.update()
        forbid_synchronisation(False)
    assert pair.cuda.iterations == 3


def test_a_scaled_step_in_a_graph(twins: Callable[..., Any]) -> None:
    """Unscaling and skipping belong to the graph: a replay with an infinite gradient changes nothing."""
    pair = twins(params(), cuda={"fused": True, "capturable": True}, clipnorm=0.7)
    scale, found_inf = torch.full((1,), 8.0, device="cuda"), torch.zeros(1, device="cuda")

    def step() -> None:
        pair.cuda.grad_scale, pair.cuda.found_inf = scale, found_inf
        pair.cuda.step()

    pair.set_gradients(grads_of(0))
    for q in pair.cuda_params:
        q.grad.mul_(8)
    step()
    pair.cpu.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(1, 5):
        skips = number == 2
        found_inf.fill_(float(skips))
        for p, q, grad in zip(pair.params, pair.cuda_params, grads_of(number), strict=True):
            p.grad = grad
            q.grad.copy_(grad).mul_(8)
        graph.replay()
        if not skips:
            pair.cpu.step()
        pair.assert_same(f"after replay {number}")
