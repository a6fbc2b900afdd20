"""Pairs of optimizers, one on the CPU and one on a CUDA device, that must stay equal bit by bit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras


def on_device(x: Tensor, device: Any = "cuda") -> Tensor:
    """The same values on the device, in memory of the same strides, offset and gaps."""
    whole = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return whole.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


class Twins:
    """The same parameters on the CPU and on a device, each with an AdadeltaKeras of its own.

    Args:
        params: tensors on the CPU, whose memory layout both have.
        groups: how many param groups they are cut into.
        cpu: options of the optimizer on the CPU alone.
        cuda: options of the other one alone; the fused update unless they say otherwise.
        device: where the other one is.
        options: what both have.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        groups: int = 1,
        cpu: dict[str, Any] | None = None,
        cuda: dict[str, Any] | None = None,
        device: Any = "cuda",
        **options: Any,
    ) -> None:
        self.device = device
        self.params = [Parameter(on_device(p, "cpu")) for p in params]
        self.cuda_params = [Parameter(on_device(p, device)) for p in params]
        length = -(-len(params) // groups)
        cuts = range(0, max(len(params), 1), max(length, 1))
        self.cpu = AdadeltaKeras(
            [{"params": self.params[i : i + length]} for i in cuts], **{"lr": 1.0, **options, **(cpu or {})}
        )
        self.cuda = AdadeltaKeras(
            [{"params": self.cuda_params[i : i + length]} for i in cuts],
            **{"lr": 1.0, "fused": "foreach" not in (cuda or {}) or None, **options, **(cuda or {})},
        )

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        for p, q, grad in zip(self.params, self.cuda_params, grads, strict=True):
            p.grad = None if grad is None else on_device(grad, "cpu")
            q.grad = None if grad is None else on_device(grad, self.device)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        self.set_gradients(grads)
        self.cpu.step()
        self.cuda.step()

    def assert_same(self, what: str = "") -> None:
        """All parameters and both accumulators, bit by bit, and the number of steps."""
        for index, (p, q) in enumerate(zip(self.params, self.cuda_params, strict=True)):
            one, other = self.cpu.state.get(p, {}), self.cuda.state.get(q, {})
            assert one.keys() == other.keys()
            for name in one:
                assert other[name].device == q.device
                assert_same_bits(other[name].cpu(), one[name], f"{name} of parameter {index} {what}")
            assert_same_bits(q.cpu(), p, f"parameter {index} {what}")
        assert self.cuda.iterations == self.cpu.iterations


@pytest.fixture
def twins() -> Callable[..., Twins]:
    """Makes `Twins`."""
    return Twins


@pytest.fixture
def placed() -> Callable[..., Tensor]:
    """Copies a tensor to a device with its layout: `on_device`."""
    return on_device


@pytest.fixture
def forbid_synchronisation() -> Iterator[Callable[[bool], None]]:
    """Called with True: from now on, an operation that waits for the device is an error; with False: no longer."""

    def forbid(wanted: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if wanted else "default")

    yield forbid
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
