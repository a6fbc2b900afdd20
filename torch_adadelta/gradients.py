"""What Keras does to the gradients before the update: aggregate, clip, transform.

The formulas of clipping, here and in csrc/adadelta.h; every operation is rounded to T, the arithmetic type, but sums of
squares, whose terms are rounded to T, run in float64 and are rounded to T before the root is taken:

    clipvalue c          g = max(min(g, c), -c)
    clipnorm c           g = (g * c) / max(norm, c)                          norm = sqrt(sum of g * g)
    global_clipnorm c    g = g * (c * min(1/n, 1/c) + (n - n))               n: the norm of all gradients together

The sum of squares of a gradient is taken over a fixed tree, so that its bits depend on nothing but the elements and
their order in the parameter's memory: not on threads, devices or the path that computes it.
"""

import math
from collections.abc import Callable, Sequence
from operator import add
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta.arithmetic import arithmetic_dtype, as_real, exact_sqrt
from torch_adadelta.hyperparameters import Value, cast, rounded

Pairs = list[tuple[Tensor, Tensor]]
Callback = Callable[[Pairs], Pairs]

# The tree: chunks of 32 rows of 128 lanes. A lane adds its elements one after the other, the second half of the lanes
# is added to the first until one is left, and chunks are added pairwise, neighbours first.
_LANES: Final = 128
_ROWS: Final = 32


# ---- Norms ----------------------------------------------------------------------------------------------------------


def pairwise_sum(x: Tensor) -> Tensor:
    """The sum of a vector: neighbours are added, then neighbours of those, until one is left; 0 if it is empty."""
    if x.numel() == 0:
        return x.new_zeros(())
    while x.numel() > 1:
        if x.numel() % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[0::2] + x[1::2]
    return x[0]


def _memory_order(param: Tensor) -> list[int]:
    """The dimensions of a tensor, outermost in memory first."""
    strides, sizes = param.stride(), param.shape
    return sorted(range(param.dim()), key=lambda d: (sizes[d] != 1, -strides[d]))


def _square_sum(param: Tensor, grad: Tensor, T: torch.dtype, clipvalue: float) -> Tensor:
    if grad.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=grad.device)
    g = clip_by_value(as_real(grad).to(T), clipvalue)
    squares = g * g
    if grad.is_complex():
        squares = squares[..., 0] + squares[..., 1]
    flat = squares.permute(_memory_order(param)).reshape(-1)
    count = flat.numel()
    rows = min(_ROWS, -(-count // _LANES))
    padding = -count % (rows * _LANES)
    table = torch.nn.functional.pad(flat, (0, padding)).reshape(-1, rows, _LANES)
    lanes = table[:, 0].double()
    for row in range(1, rows):
        lanes = lanes + table[:, row].double()
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return pairwise_sum(lanes[:, 0])


def square_sums(
    params: Sequence[Tensor], grads: Sequence[Tensor], clipvalue: float = math.inf, in_double: bool = False
) -> Tensor:
    """The sum of squares of each gradient, clipped by `clipvalue`, over the fixed tree: float64, one a parameter.

    The terms are rounded to the parameter's arithmetic type, or to float64 with `in_double`. All tensors are on one
    device; autograd can record this. `ops.grad_square_sums` gives the same bits.
    """
    if not params:
        return torch.empty(0, dtype=torch.float64)
    sums = [
        _square_sum(param, grad, torch.float64 if in_double else arithmetic_dtype(param.dtype), clipvalue)
        for param, grad in zip(params, grads, strict=True)
    ]
    return torch.stack(sums)


def _norm(square_sum: Tensor, T: torch.dtype) -> Tensor:
    """The root of a sum of squares, in T. Zero is kept from autograd, for the root's derivative is infinite there."""
    rounded = square_sum.to(T)
    is_positive = rounded > 0
    root = exact_sqrt(torch.where(is_positive, rounded, 1))
    return torch.where(is_positive, root, rounded)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf


def global_factor(clipnorm: float, square_sums: Tensor, T: torch.dtype) -> Value:
    """The factor of `global_clipnorm`, computed in T from the sums of squares of all gradients, in their order.

    A float, if the sums are on the CPU and autograd does not record them; else a float64 Tensor without dimensions.
    """
    c = float(cast(clipnorm, T, square_sums.device))
    if square_sums.requires_grad or square_sums.device.type != "cpu":
        n = _norm(pairwise_sum(square_sums), T)
        is_positive = n > 0
        inverse = torch.where(is_positive, 1 / torch.where(is_positive, n, 1), torch.inf)
        return (c * inverse.clamp(max=rounded(_divide(1.0, c), T)) + (n - n)).double()
    # pairwise_sum of numbers: as tensors, the sums of a thousand gradients would cost a step a tenth more.
    numbers: list[float] = square_sums.tolist()
    while len(numbers) > 1:
        rest = numbers[-1:] if len(numbers) % 2 else []
        numbers = list(map(add, numbers[0::2], numbers[1::2])) + rest
    square = rounded(sum(numbers), T)
    if not math.isfinite(square):
        return math.nan
    norm = rounded(math.sqrt(square), T)
    return rounded(c * min(rounded(_divide(1.0, norm), T), rounded(_divide(1.0, c), T)), T)


# ---- Clipping -------------------------------------------------------------------------------------------------------


def clip_by_value(g: Tensor, clipvalue: float) -> Tensor:
    """max(min(g, c), -c) of a tensor in T; nan stays nan. `torch.clamp` leaves the sign of a zero to the processor."""
    if clipvalue == math.inf:
        return g
    c = cast(clipvalue, g.dtype, g.device)
    return torch.where(g > c, c, torch.where(g < -c, -c, g))


def clip(
    g: Tensor,
    index: int,
    clipvalue: float = math.inf,
    clipnorm: float | None = None,
    square_sums: Tensor | None = None,
    factor: Value = 1.0,
) -> Tensor:
    """Gradient number `index` of an update, clipped.

    Args:
        g: the gradient, in T, complex numbers as pairs of reals.
        index: which one it is.
        clipvalue: the largest absolute value of an element; inf for none.
        clipnorm: the largest norm of a gradient by itself, or None.
        square_sums: with `clipnorm`, what `square_sums` gave for the gradients of the update.
        factor: for `global_clipnorm`, what `global_factor` gave.
    """
    T = g.dtype
    g = clip_by_value(g, clipvalue)
    if clipnorm is not None:
        assert square_sums is not None
        c = cast(clipnorm, T, g.device)
        return (g * c) / _norm(square_sums[index], T).clamp(min=c)
    if isinstance(factor, float) and factor == 1.0:
        return g
    return g * cast(factor, T, g.device)


# ---- Callbacks ------------------------------------------------------------------------------------------------------


def for_callback(param: Tensor, grad: Tensor, grad_scale: Tensor | None = None) -> Tensor:
    """A copy of a gradient in the parameter's arithmetic type, unscaled: a callback may overwrite it."""
    if grad.layout is torch.sparse_coo:
        values = for_callback(param, grad._values(), grad_scale)
        return torch.sparse_coo_tensor(
            grad._indices().clone(), values, grad.shape, is_coalesced=grad.is_coalesced(), check_invariants=False
        )
    T = arithmetic_dtype(param.dtype)
    dtype = T.to_complex() if grad.is_complex() else T
    g = grad.to(dtype, copy=True).resolve_conj().resolve_neg()
    if grad_scale is not None:
        as_real(g).div_(grad_scale.to(g.device, T, non_blocking=g.device.type != "cpu").reshape(()))
    return g


def run_callback(
    callback: Callback, kind: str, params: list[Tensor], grads: list[Tensor], name_of: Callable[[Tensor], str]
) -> list[Tensor]:
    """The gradients that a `gradient_aggregator` or one of the `gradient_transformers` returns for these, checked.

    Raises:
        TypeError: it did not return a list of (gradient, parameter) tuples.
        ValueError: the list has another length or other parameters, or a gradient does not fit its parameter.
    """
    who = f"{kind} {getattr(callback, '__qualname__', callback)!s}"
    returned: Any = callback(list(zip(grads, params, strict=True)))
    try:
        if not isinstance(returned, list | tuple):  # to run a generator here would replace what it raises
            raise TypeError
        pairs = [(grad, param) for grad, param in returned]
    except (TypeError, ValueError):
        raise TypeError(
            f"{who} must return a list of (gradient, parameter) tuples, as it was given; got {_abridged(returned)}"
        ) from None
    if len(pairs) != len(params):
        raise ValueError(f"{who} was given {len(params)} (gradient, parameter) tuples and returned {len(pairs)}")
    for index, ((grad, returned_param), param) in enumerate(zip(pairs, params, strict=True)):
        if returned_param is not param:
            raise ValueError(
                f"{who} returned another parameter than {name_of(param)} in tuple {index}; keep their order"
            )
        if not isinstance(grad, Tensor):
            raise TypeError(f"{who} returned {_abridged(grad)} as the gradient of {name_of(param)}, not a Tensor")
        for what, got, wanted in (
            ("shape", tuple(grad.shape), tuple(param.shape)),
            ("device", grad.device, param.device),
        ):
            if got != wanted:
                raise ValueError(f"{who} returned a gradient of {what} {got} for {name_of(param)} of {what} {wanted}")
        if grad.layout not in (torch.strided, torch.sparse_coo):
            raise ValueError(
                f"{who} returned a gradient of layout {grad.layout} for {name_of(param)}; it must be dense or "
                "torch.sparse_coo. Use .to_sparse_coo()"
            )
        if grad.is_complex() != param.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
            raise ValueError(f"{who} returned a gradient of {grad.dtype} for {name_of(param)} of {param.dtype}")
    return [grad for grad, _ in pairs]


def _abridged(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}... of type {type(value).__name__}"
