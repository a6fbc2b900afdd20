"""The opmath dtype T, in which a parameter is updated; roundings to it; complex numbers as pairs of reals; exact roots.

Every operation is rounded to T on its own. Python numbers are doubles, and double has digits enough: a sum, product,
quotient or root of float32 numbers that was computed in double, and is then rounded to float32, is correctly rounded.
"""

import ctypes
from collections.abc import Iterable
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor

try:
    import numpy as np

    torch.empty(0).numpy()
except (ImportError, RuntimeError):  # PyTorch does without it, or was built for another; so does this package
    np = None  # type: ignore[assignment]

# A hyperparameter in one step: a number, or a one-element Tensor that is read where it is.
Value = float | Tensor

_float32: Final = ctypes.c_float

_get_dtype: Final = attrgetter("dtype")

_DOUBLE: Final = frozenset((torch.float64, torch.complex128))


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """T, the real dtype in which a parameter is updated: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in _DOUBLE else torch.float32


def wide_dtype(param: Tensor) -> torch.dtype:
    """The dtype of state that is kept in T whatever the parameter's dtype is; complex like the parameter."""
    T = opmath_dtype(param.dtype)
    return T.to_complex() if param.is_complex() else T


def opmath_dtypes(params: Iterable[Tensor]) -> set[torch.dtype]:
    """The T of each of the parameters."""
    return set(map(opmath_dtype, set(map(_get_dtype, params))))  # few dtypes, of maybe a thousand


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, in the same memory."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_numpy_scalar(value: Any) -> bool:
    """Whether this is a number of NumPy, or an array without dimensions: it carries a precision of its own."""
    return type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0


# ---- Roundings ------------------------------------------------------------------------------------------------------


def round_to_float32(number: float) -> float:
    """The float32 nearest to `number`, ties to even; infinity beyond the largest."""
    return _float32(number).value


def rounded(number: float, T: torch.dtype) -> float:
    """`number` in T."""
    return _float32(number).value if T is torch.float32 else number


def cast(value: Value, T: torch.dtype, device: torch.device) -> Value:
    """`value` in T: a float that T holds exactly, or a 0-dim Tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(dtype=T, device=device).reshape(())
    return rounded(value, T)


def one_minus(rho: Value, T: torch.dtype) -> Value:
    """1 - rho, subtracted in T: 0.050000012, not 0.05, for the float32 neighbour of 0.95. `rho` is in T already."""
    return 1 - rho if isinstance(rho, Tensor) else rounded(1.0 - rho, T)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a real or complex tensor in another dtype, rounded once: to nearest, ties to even.

    PyTorch rounds float64 to 16 bits by way of float32. Here that is rounded to odd, so that the second rounding sees
    on which side the number was.
    """
    if x.dtype is torch.complex128 and dtype is torch.complex32:
        return torch.view_as_complex(stored(as_real(x), torch.float16))
    if x.dtype is not torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype, copy=True)
    nearest = x.to(torch.float32)
    is_beyond = nearest.double().abs() > x.abs()
    is_inexact = nearest.double() != x
    odd = ((nearest.view(torch.int32) - is_beyond.to(torch.int32)) | is_inexact).view(torch.float32)
    return torch.where(nearest.isfinite(), odd, nearest).to(dtype)


# ---- Exact roots ----------------------------------------------------------------------------------------------------


def _as_numpy(x: Tensor) -> Any:
    """The tensor's memory as an array; None where NumPy is missing or cannot see it."""
    if np is None or type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(x) else x.detach().numpy()


def _corrected_sqrt_float64(x: Tensor) -> Tensor:
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


def corrected_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root of a float32 or float64 CPU tensor, from `torch.sqrt`, which may be an ulp off there.

    On x86 it goes through MKL. A float64 root, an ulp off or not, rounds to the correct float32 root: the exact root of
    a 24-bit number is never that near to the middle between two others.
    """
    if x.dtype is torch.float32:
        return x.double().sqrt().float()
    return _corrected_sqrt_float64(x)


def _exact_sqrt_out(x: Tensor, out: Tensor) -> Tensor:
    """The exact root of a CPU tensor, written to `out`. NumPy takes the processor's root, which is exact."""
    source, target = _as_numpy(x), _as_numpy(out)
    if source is None or target is None:
        return out.copy_(corrected_sqrt(x))
    with np.errstate(invalid="ignore"):
        np.sqrt(source, out=target)
    return out


def _exact_sqrt_forward(x: Tensor) -> Tensor:
    return _exact_sqrt_out(x, torch.empty_like(x)) if x.device.type == "cpu" else x.sqrt()


class _ExactSqrt(torch.autograd.Function):
    """Lets gradients pass what has none of its own."""

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


def exact_sqrt_(x: Tensor) -> Tensor:
    """`exact_sqrt` in place of a CPU tensor."""
    return _exact_sqrt_out(x, x)
