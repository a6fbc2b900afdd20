"""AdadeltaKeras on CUDA: hyperparameters, streams, devices, no waiting, memory, checkpoints, errors, diagnostics."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import REAL_DTYPES, STEP_OPTIONS, assert_same_bits, assert_unchanged, dtype_name, gradients, randn, snapshot
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

needs_two_devices = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)

SHAPES = ((300,), (5, 3), (), (0,), (70_001,))

OPTIONS: dict[str, dict[str, Any]] = {
    **STEP_OPTIONS,
    "both": {"clipvalue": 0.5, "global_clipnorm": 0.9},
    "schedule": {"lr": schedules.InverseTimeDecay(1.0, 2, 0.5)},
    "callable": {"rho": lambda: 0.9},
    "transformers": {"gradient_transformers": [lambda pairs: [(3 * g, p) for g, p in pairs]]},
}


def grads_of(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [gradients(shape, dtype, 1, seed=10 * step + i)[0] for i, shape in enumerate(SHAPES)]


def params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(shape, dtype, torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("capturable", [False, True])
def test_options(options: dict[str, Any], dtype: torch.dtype, capturable: bool, twins: Callable[..., Any]) -> None:
    pair = twins(params(dtype), groups=2, cuda={"capturable": capturable}, **options)
    for step in range(4):
        pair.step(grads_of(step, dtype))
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_gradients_that_are_accumulated(dtype: torch.dtype, path: dict[str, bool], twins: Callable[..., Any]) -> None:
    """Beside averages, of parameters without a gradient too, that overwrite parameters."""
    options = {"gradient_accumulation_steps": 2, "loss_scale_factor": 3.0, "weight_decay": 0.25, "use_ema": True}
    pair = twins(params(dtype), groups=2, cuda=path, **options, ema_overwrite_frequency=2, global_clipnorm=0.9)
    for step in range(8):
        pair.step([None if i == 1 and step < 4 else grad for i, grad in enumerate(grads_of(step, dtype))])
        pair.assert_same(f"at step {step}")


@pytest.mark.parametrize("path", ["fused", "foreach", "single_tensor"])
@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.7}], ids=["unclipped", "clipnorm"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_hyperparameters_on_the_device(
    path: str, clip: dict[str, float], value_dtype: torch.dtype, shape: tuple[int, ...], twins: Callable[..., Any]
) -> None:
    options: dict[str, Any] = {
        "fused": {"fused": True},
        "foreach": {"foreach": True},
        "single_tensor": {"foreach": False},
    }
    values = {"lr": 0.7, "rho": 0.9, "epsilon": 1e-5}
    here, there = (
        {key: torch.full(shape, value, dtype=value_dtype, device=device) for key, value in values.items()}
        for device in ("cpu", "cuda")
    )
    mixed = [*params(), randn((33,), torch.float64, torch.Generator()), torch.ones(9, dtype=torch.float16)]
    pair = twins(mixed, cpu=here, cuda={**options[path], **there}, **clip)
    for step in range(3):
        for tensors in (here, there):
            tensors["lr"].fill_(1.0 / (step + 1))
        more = [gradients((n,), dtype, 1, seed=step)[0] for n, dtype in ((33, torch.float64), (9, torch.float16))]
        pair.step([*grads_of(step), *more])
        pair.assert_same(f"at step {step}")


def test_a_stream_of_its_own(twins: Callable[..., Any]) -> None:
    """Work that the step depends on, and work that depends on it, in one stream while another is busy."""
    pair = twins(params(), clipnorm=0.7)
    stream = torch.cuda.Stream()
    for step in range(4):
        grads = grads_of(step)
        pair.set_gradients(grads)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            for q in pair.cuda_params:
                q.grad.mul_(2)
            pair.cuda.step()
            copies = [q.detach().clone() for q in pair.cuda_params]
        for p in pair.params:
            p.grad.mul_(2)
        pair.cpu.step()
        stream.synchronize()
        for actual, expected in zip(copies, pair.params, strict=True):
            assert_same_bits(actual.cpu(), expected)
        pair.assert_same(f"at step {step}")


@needs_two_devices
def test_the_current_device_is_another(twins: Callable[..., Any]) -> None:
    pair = twins(params(), device="cuda:1", clipnorm=0.7)
    with torch.cuda.device(0):
        for step in range(3):
            pair.step(grads_of(step))
            pair.assert_same(f"at step {step}")
        assert torch.cuda.current_device() == 0


@needs_two_devices
@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=str)
def test_two_devices_in_one_group(clip: dict[str, float]) -> None:
    devices = ["cuda:0", "cuda:1", "cuda:0", "cpu", "cuda:1"]
    here = [Parameter(x) for x in params()]
    there = [Parameter(x.detach().to(device)) for x, device in zip(here, devices, strict=True)]
    one, other = AdadeltaKeras(here, 1.0, **clip), AdadeltaKeras(there, 1.0, **clip)  # type: ignore[arg-type]
    for step in range(3):
        for p, q, grad in zip(here, there, grads_of(step), strict=True):
            p.grad, q.grad = grad, grad.to(q.device)
        one.step()
        other.step()
    for p, q in zip(here, there, strict=True):
        assert_same_bits(q.cpu(), p)
        for key, value in one.state[p].items():
            assert_same_bits(other.state[q][key].cpu(), value)


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=str)
def test_cpu_and_cuda_parameters_in_one_group(clip: dict[str, float]) -> None:
    here = [Parameter(x) for x in params()]
    there = [Parameter(x.detach().to("cuda" if i % 2 else "cpu", copy=True)) for i, x in enumerate(here)]
    one, other = AdadeltaKeras(here, 1.0, **clip), AdadeltaKeras(there, 1.0, **clip)  # type: ignore[arg-type]
    for step in range(3):
        for p, q, grad in zip(here, there, grads_of(step), strict=True):
            p.grad, q.grad = grad, grad.to(q.device, copy=True)
        one.step()
        other.step()
    for p, q in zip(here, there, strict=True):
        assert_same_bits(q.cpu(), p)
        for key, value in one.state[p].items():
            assert_same_bits(other.state[q][key].cpu(), value)


# ---- Nobody waits, and nothing is allocated -------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_no_synchronisation(
    options: dict[str, Any],
    capturable: bool,
    path: dict[str, bool],
    twins: Callable[..., Any],
    forbid_synchronisation: Callable[[bool], None],
) -> None:
    pair = twins(params(), groups=2, cuda={"capturable": capturable, **path}, **options)
    for step in range(3):
        pair.set_gradients(grads_of(step))
        pair.cpu.step()
        forbid_synchronisation(True)
        pair.cuda.step()
        forbid_synchronisation(False)
        pair.assert_same(f"at step {step}")


def test_no_synchronisation_with_hyperparameters_on_the_device(
    twins: Callable[..., Any], forbid_synchronisation: Callable[[bool], None]
) -> None:
    there = {key: torch.tensor(value, device="cuda") for key, value in {"lr": 0.7, "rho": 0.9, "epsilon": 1e-5}.items()}
    pair = twins(params(), cuda={"fused": True, **there}, global_clipnorm=0.9)
    for step in range(2):
        pair.set_gradients(grads_of(step))
        forbid_synchronisation(True)
        pair.cuda.step()
        forbid_synchronisation(False)


@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=str)
@pytest.mark.parametrize(("count", "numel"), [(1, 2**24), (1000, 16), (10, 2**20 + 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_extra_memory(clip: dict[str, float], count: int, numel: int, dtype: torch.dtype) -> None:
    there = [Parameter(torch.zeros(numel, dtype=dtype, device="cuda")) for _ in range(count)]
    optimizer = AdadeltaKeras(there, 1.0, fused=True, **clip)  # type: ignore[arg-type]
    for p in there:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 10**6 + 64 * count
    assert torch.cuda.memory_allocated() == before


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("from_cuda", [False, True])
def test_checkpoints_move_between_devices(from_cuda: bool, capturable: bool, twins: Callable[..., Any]) -> None:
    """What one saved the other goes on with, and nobody sees a difference."""
    pair = twins(params(), cuda={"fused": True, "capturable": capturable}, decay=0.1)
    for step in range(2):
        pair.step(grads_of(step))
    source, target = (pair.cuda, pair.cpu) if from_cuda else (pair.cpu, pair.cuda)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    device = "cpu" if from_cuda else "cuda"
    moved = [Parameter(p.detach().to(device, copy=True)) for g in source.param_groups for p in g["params"]]
    options = {key: target.param_groups[0][key] for key in ("capturable", "fused")}
    resumed = AdadeltaKeras(moved, **options)
    saved = torch.load(file, weights_only=True, map_location=device)
    for group in saved["param_groups"]:
        group.update(options)
    resumed.load_state_dict(saved)
    assert resumed.iterations == 2
    for p, grad in zip(moved, grads_of(2), strict=True):
        p.grad = grad.to(device)
        assert all(x.device == p.device for x in resumed.state[p].values())
    pair.step(grads_of(2))
    resumed.step()
    expected = [p for group in target.param_groups for p in group["params"]]
    for p, q in zip(moved, expected, strict=True):
        assert_same_bits(p.cpu(), q.cpu())
        for key, value in target.state[q].items():
            assert_same_bits(resumed.state[p][key].cpu(), value.cpu())


def test_deepcopy(twins: Callable[..., Any]) -> None:
    pair = twins(params(), clipnorm=0.7)
    pair.step(grads_of(0))
    duplicate = copy.deepcopy(pair.cuda)
    for p, grad in zip(duplicate.param_groups[0]["params"], grads_of(1), strict=True):
        p.grad = grad.cuda()
    duplicate.step()
    pair.assert_same("which the copy left alone")
    pair.step(grads_of(1))
    for p, q in zip(duplicate.param_groups[0]["params"], pair.params, strict=True):
        assert_same_bits(p.cpu(), q)


# ---- What is refused, and diagnostics -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("key", ["square_avg", "acc_delta"])
def test_state_on_another_device_is_refused(path: dict[str, bool], key: str, twins: Callable[..., Any]) -> None:
    pair = twins(params(), cuda=path)
    pair.step(grads_of(0))
    pair.set_gradients(grads_of(1))
    state = pair.cuda.state[pair.cuda_params[1]]
    state[key] = state[key].cpu()
    before = snapshot(pair.cuda)
    with pytest.raises(RuntimeError, match=rf"parameter 1.* is on cuda:0, but its state {key} is on cpu"):
        pair.cuda.step()
    assert_unchanged(pair.cuda, before)


@pytest.mark.parametrize("param_device", ["cpu", "cuda"])
def test_a_gradient_on_another_device_is_refused(param_device: str) -> None:
    grad_device = "cuda" if param_device == "cpu" else "cpu"
    there = [Parameter(x.to(param_device)) for x in params()]
    optimizer = AdadeltaKeras(there, 1.0)
    grads = [grad.to(param_device) for grad in grads_of(0)]
    optimizer.apply_gradients(zip(grads, there, strict=True))
    grads[1] = grads[1].to(grad_device)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"is on {param_device}.*, but its gradient is on {grad_device}"):
        optimizer.apply_gradients(zip(grads, there, strict=True))
    assert_unchanged(optimizer, before)


def test_diagnostics() -> None:
    result = subprocess.run([sys.executable, "-m", "torch_adadelta"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    on_cuda = result.stdout.partition("on cuda")[2]
    assert on_cuda.count("ok, same bits") == 3, result.stdout
