"""The arithmetic type, complex numbers as pairs of reals, and square roots that are exact on every device."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

_get_dtype: Final = attrgetter("dtype")

_DOUBLE: Final = frozenset((torch.float64, torch.complex128))


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """T, the real type in which a parameter of `dtype` is updated: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in _DOUBLE else torch.float32


def arithmetic_dtypes(params: Iterable[Tensor]) -> set[torch.dtype]:
    """The T of each of the parameters."""
    return set(map(arithmetic_dtype, set(map(_get_dtype, params))))  # few dtypes, of maybe a thousand


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, in the same memory."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _exact_sqrt_float64(x: Tensor) -> Tensor:
    """The correctly rounded root of a float64 CPU tensor, from one that may be an ulp off.

    For x = m * 4**k with m in [0.5, 2), y = sqrt(m) is corrected by the sign of m - (y +- ulp / 2)**2. The residual
    m - y**2 is exact: y is split in two halves whose products fit (Dekker).
    """
    mantissa, exponent = torch.frexp(x)
    exponent = exponent.long()
    odd = exponent & 1
    m = torch.where(odd == 1, mantissa * 2, mantissa)
    y = m.sqrt()
    square = y * y
    shifted = y * 134217729.0  # 2**27 + 1
    high = shifted - (shifted - y)
    low = y - high
    error = ((high * high - square) + 2 * high * low) + low * low
    residual = (m - square) - error
    above = torch.nextafter(y, torch.full_like(y, torch.inf))
    below = torch.nextafter(y, torch.zeros_like(y))
    y = torch.where(residual > y * (above - y), above, torch.where(residual <= -(y * (y - below)), below, y))
    scale = (((exponent - odd) // 2 + 1023) << 52).view(torch.float64)  # 2**k, by its bits
    return torch.where(x.isfinite() & (x != 0), y * scale, x.sqrt())


def _exact_sqrt_forward(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return x.sqrt()
    # On x86 CPUs torch.sqrt goes through MKL and may be an ulp off. A float64 root, an ulp off or not, rounds to the
    # correct float32 root: the exact root of a 24-bit number is never that near to the middle between two others.
    if x.dtype is torch.float32:
        return x.double().sqrt().float()
    return _exact_sqrt_float64(x)


class _ExactSqrt(torch.autograd.Function):
    """Lets gradients pass the correction, which has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = _exact_sqrt_forward(x)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (root,) = ctx.saved_tensors
        return grads[0] / (2 * root)


def exact_sqrt(x: Tensor) -> Tensor:
    """The square root of a float32 or float64 tensor, correctly rounded, as IEEE 754 has it; differentiable."""
    return _ExactSqrt.apply(x) if x.requires_grad else _exact_sqrt_forward(x)
