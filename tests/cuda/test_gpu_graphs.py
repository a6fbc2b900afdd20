"""Steps captured in CUDA graphs: each replay is the step that would have been taken, bit by bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import STEP_OPTIONS, assert_same_bits, gradients
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WARM_UP = 3

SIZES = (300, 16385, 7, 0, 140_001)

PATHS: tuple[dict[str, bool], ...] = ({"fused": True}, {"foreach": True}, {"foreach": False})


def grads_of(step: int) -> list[Tensor]:
    return [gradients((n,), torch.float32, 1, seed=10 * step + i)[0] for i, n in enumerate(SIZES)]


def capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def on_a_side_stream(run: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def assert_replays_are_steps(pair: Any, before_each: Callable[[int], None] = lambda step: None) -> None:
    """Warms up, captures, and fills gradients in place before each of many replays."""
    for step in range(WARM_UP):
        before_each(step)
        pair.set_gradients(grads_of(step))
        pair.cpu.step()
        on_a_side_stream(pair.cuda.step)
    pair.assert_same("after the warm-up")
    graph = capture(pair.cuda.step)
    pair.assert_same("after the capture, which runs nothing")
    for step in range(WARM_UP, WARM_UP + 6):
        before_each(step)
        for p, q, grad in zip(pair.params, pair.cuda_params, grads_of(step), strict=True):
            p.grad = grad
            q.grad.copy_(grad)
        pair.cpu.step()
        graph.replay()
        pair.assert_same(f"at step {step}")
    assert pair.cuda.iterations == WARM_UP + 6
    pair.step(grads_of(100))
    pair.assert_same("in a step beside the graph")


@pytest.mark.parametrize("options", STEP_OPTIONS.values(), ids=STEP_OPTIONS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_replays(options: dict[str, Any], path: dict[str, bool], twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(n) for n in SIZES], cuda={"capturable": True, **path}, **options)
    assert_replays_are_steps(pair)


@pytest.mark.parametrize("options", STEP_OPTIONS.values(), ids=STEP_OPTIONS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_learning_rate_filled_between_replays(
    options: dict[str, Any], path: dict[str, bool], twins: Callable[..., Any]
) -> None:
    here, there = torch.tensor(1.0), torch.tensor(1.0, device="cuda")
    pair = twins(
        [torch.zeros(n) for n in SIZES], cpu={"lr": here}, cuda={"capturable": True, "lr": there, **path}, **options
    )

    def fill(step: int) -> None:
        for lr in (here, there):
            lr.fill_(0.9**step)

    assert_replays_are_steps(pair, fill)


@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 0.9}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize(
    "schedule",
    [schedules.InverseTimeDecay(1.0, 2, 0.5), schedules.PiecewiseConstantDecay([2, 4, 6], [1.0, 0.5, 0.25, 0.125])],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_schedule_counts_on_the_device(
    schedule: Any, decay: float, clip: dict[str, float], twins: Callable[..., Any]
) -> None:
    """Schedules of exact operations alone, which CPU and GPU compute alike."""
    pair = twins([torch.zeros(n) for n in SIZES], cuda={"capturable": True}, lr=schedule, decay=decay, **clip)
    assert_replays_are_steps(pair)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.ExponentialDecay(1.0, 3, 0.5),
        schedules.ExponentialDecay(1.0, 3, 0.5, staircase=True),
        schedules.PolynomialDecay(1.0, 5, 0.1, power=0.5, cycle=True),
        schedules.CosineDecay(1.0, 7),
        schedules.CosineDecayRestarts(1.0, 3),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_schedule_in_a_graph_is_that_of_eager_steps(schedule: Any) -> None:
    """Powers and cosines may be one float32 neighbour off on a GPU, but the same in a graph and without."""
    captured, eager = ([Parameter(torch.zeros(n, device="cuda")) for n in SIZES] for _ in range(2))
    optimizers = [AdadeltaKeras(params, schedule, fused=True, capturable=True) for params in (captured, eager)]
    for params in (captured, eager):
        for param, grad in zip(params, grads_of(0), strict=True):
            param.grad = grad.cuda()
    for _ in range(WARM_UP):
        on_a_side_stream(optimizers[0].step)
        optimizers[1].step()
    graph = capture(optimizers[0].step)
    for step in range(8):
        graph.replay()
        optimizers[1].step()
        for p, q in zip(captured, eager, strict=True):
            assert_same_bits(p.cpu(), q.cpu(), f"at step {step}")
    assert optimizers[0].iterations == optimizers[1].iterations == WARM_UP + 8


@pytest.mark.parametrize("count", [65, 641, 1300])
def test_more_tensors_than_one_table_holds(count: int, twins: Callable[..., Any]) -> None:
    """The tables are part of the graph: nothing that the host frees or overwrites after the capture."""
    pair = twins([torch.zeros(1 + i % 7) for i in range(count)], cuda={"capturable": True}, clipnorm=0.7)

    def grads(step: int) -> list[Tensor]:
        return [gradients(p.shape, torch.float32, 1, seed=count * step + i)[0] for i, p in enumerate(pair.params)]

    pair.step(grads(0))
    graph = capture(pair.cuda.step)
    for step in (1, 2):
        for p, q, grad in zip(pair.params, pair.cuda_params, grads(step), strict=True):
            p.grad = grad
            q.grad.copy_(grad)
        pair.cpu.step()
        graph.replay()
    pair.assert_same()


def test_a_capture_without_capturable_is_refused(twins: Callable[..., Any]) -> None:
    pair = twins([torch.zeros(5)])
    pair.step([torch.ones(5)])
    with pytest.raises(RuntimeError, match="capturable=False"):
        capture(pair.cuda.step)
    torch.cuda.synchronize()
    pair.assert_same()
    pair.step([torch.ones(5)])
    pair.assert_same()


def test_a_capture_without_state_is_refused() -> None:
    param = Parameter(torch.zeros(5, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = AdadeltaKeras([param], fused=True, capturable=True)
    with pytest.raises(RuntimeError, match="has no state yet"):
        capture(optimizer.step)
    torch.cuda.synchronize()
    assert not optimizer.state
    assert optimizer.iterations == 0


def test_a_python_number_from_a_callable_is_refused() -> None:
    param = Parameter(torch.zeros(5, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = AdadeltaKeras([param], lambda: 0.5, fused=True, capturable=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="which a CUDA graph would repeat for ever"):
        capture(optimizer.step)
    assert optimizer.iterations == 1


@pytest.mark.parametrize("key", ["lr", "rho", "epsilon"])
def test_a_hyperparameter_on_the_cpu_is_refused(key: str, twins: Callable[..., Any]) -> None:
    """A graph would keep its number, and whoever fills it later would wait for an effect."""
    pair = twins([torch.zeros(5)], cuda={"capturable": True}, **{key: torch.tensor(0.5)})
    pair.step([torch.ones(5)])
    name = "learning_rate" if key == "lr" else key
    with pytest.raises(RuntimeError, match=f"{name} of group 0 is a Tensor on the CPU"):
        capture(pair.cuda.step)
    torch.cuda.synchronize()
    pair.assert_same()
    pair.step([torch.ones(5)])
    pair.assert_same()


def test_a_parameter_on_the_cpu_is_refused() -> None:
    params = [Parameter(torch.zeros(5, device=device)) for device in ("cuda", "cpu")]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdadeltaKeras([{"params": [param]} for param in params], 1.0, capturable=True)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 is on the CPU, where no replay would update it"):
        capture(optimizer.step)
    torch.cuda.synchronize()
    assert all(map(torch.equal, params, before))
    assert optimizer.iterations == 1
