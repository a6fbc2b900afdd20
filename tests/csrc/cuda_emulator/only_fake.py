"""What only a fake GPU can be made to do: launches that fail, and a machine without the CUDA library."""

from collections.abc import Iterator
from typing import Any

import direct
import pytest
import torch
from cases import assert_unchanged, segment, snapshot
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

launcher: Any = torch.ops.fake_cuda_ops

NO_KERNEL_IMAGE, INVALID_DEVICE_FUNCTION, INVALID_VALUE = 209, 98, 1


@pytest.fixture(autouse=True)
def launches_work_again() -> Iterator[None]:
    yield
    launcher.fail_launches(0)
    launcher.set_stream(0)


def optimizer_of(dtypes: list[torch.dtype], device: str, **options: Any) -> AdadeltaKeras:
    params = [Parameter(torch.ones(70_000, dtype=dtype, device=device)) for dtype in dtypes]
    for param in params:
        param.grad = torch.ones_like(param)
    return AdadeltaKeras([{"params": [param]} for param in params], 1.0, fused=True, **options)


@pytest.mark.parametrize("error", [NO_KERNEL_IMAGE, INVALID_DEVICE_FUNCTION])
@pytest.mark.parametrize("options", [{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0}], ids=str)
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]], ids=["one", "two"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_gpu_that_the_library_was_not_compiled_for(
    error: int, options: dict[str, float], dtypes: list[torch.dtype], steps: int
) -> None:
    optimizer = optimizer_of(dtypes, "cuda:1", **options)
    for _ in range(steps):
        optimizer.step()
    before = snapshot(optimizer)
    launcher.fail_launches(error)
    message = (
        "^torch_adadelta was compiled for sm_75, sm_80, sm_120, not for this GPU, an sm_61. Install it again with "
        "TORCH_CUDA_ARCH_LIST=6.1 in the environment$"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert launcher.fail_launches(0) == 0, "the error was left for others to find"
    optimizer.step()
    assert optimizer.iterations == steps + 1


def test_a_launch_that_fails() -> None:
    optimizer = optimizer_of([torch.float32], "cuda")
    launcher.fail_launches(INVALID_VALUE)
    with pytest.raises(RuntimeError, match=r"^CUDA error: invalid argument$"):
        optimizer.step()
    assert not optimizer.state
    assert launcher.fail_launches(0) == 0, "the error was left for others to find"


def test_a_later_launch_that_fails() -> None:
    """Something is written by then: it is no refusal, and the step is partial."""
    optimizer = optimizer_of([torch.float32, torch.float64], "cuda")
    for _ in range(2):
        optimizer.step()
    launcher.fail_launches(INVALID_VALUE, 1)
    with pytest.raises(RuntimeError, match=r"^CUDA error: invalid argument .*partial"):
        optimizer.step()
    assert launcher.fail_launches(0) == 0, "the error was left for others to find"


def test_a_launch_goes_to_the_device_of_the_tensors_and_its_stream() -> None:
    """The launch compares the stream with the current device; afterwards that is what it was."""
    for current in (0, 1):
        for device in ("cuda:0", "cuda:1"):
            with torch.cuda.device(current):
                before = launcher.launches()
                optimizer_of([torch.float32], device, clipnorm=1.0).step()
                assert launcher.launches() - before == 3
                assert torch.cuda.current_device() == current


def test_a_launch_goes_to_the_stream_that_is_current() -> None:
    """Which may be another at every step. A launch fails in any other."""
    optimizer = optimizer_of([torch.float32], "cuda", clipnorm=1.0)
    for number in (0, 1, 2, 0):
        launcher.set_stream(number)
        before = launcher.launches()
        optimizer.step()
        assert launcher.launches() - before == 3


def test_what_a_step_launches() -> None:
    """One launch a bucket, as far as its tables fit."""
    for count, launches in ((1, 1), (600, 1), (601, 2)):
        params = [torch.ones(3, device="cuda") for _ in range(count)]
        before = launcher.launches()
        direct.fused(params, *([torch.ones(3, device="cuda") for _ in params] for _ in range(3)), 1.0, 0.95, 1e-7)
        assert launcher.launches() - before == launches


def test_all_sparse_gradients_are_sorted_before_a_row_is_written() -> None:
    """Two launches number the rows of two gradients; the third is the first that writes."""
    tensors = [[torch.ones(4, 2, device="cuda") for _ in range(2)] for _ in range(3)]
    indices = [torch.tensor([[0, 3]], device="cuda") for _ in range(2)]
    values = [torch.ones(2, 2, device="cuda") for _ in range(2)]
    for failing in range(3):
        launcher.fail_launches(INVALID_VALUE, failing)
        with pytest.raises(RuntimeError, match=r"CUDA error: invalid argument"):
            torch.ops.torch_adadelta.sparse_adadelta_(
                tensors[0], indices, values, *tensors[1:], [], *segment(2, 1.0, 0.95, 1e-7)
            )
        assert all((tensor.cpu() == 1.0).all() for some in tensors for tensor in some)
