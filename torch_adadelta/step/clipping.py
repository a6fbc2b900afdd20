"""How the gradients of a step are clipped and unscaled: what each batch is told of norms, factors and GradScaler."""

import contextlib
import itertools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, functional, kernels
from torch_adadelta.backends.batch import Backend, Batch, GradientOptions, Refusal
from torch_adadelta.backends.opmath import Value, opmath_dtype, opmath_dtypes, round_to_float32
from torch_adadelta.step import callbacks


class Clipping(NamedTuple):
    """The clip options of a step, GradScaler's tensors, and sums over others than this process.

    Args:
        clipvalue, clipnorm, global_clipnorm: the options.
        grad_scale, found_inf: what gradients are divided by, and whether one of them is infinite or nan.
        loss_scale_factor: what they are divided by then.
        over_parts: the sums of squares of whole gradients, from those of the parts of DTensors that are here.
        over_processes: the sum over all gradients, from that of this process.
        over_variables: for `clipnorm`, the sums of squares of whole variables, from those of their pieces.
        in_double: whether the norm of all gradients is taken in float64 because of another process.
    """

    clipvalue: float | None = None
    clipnorm: float | None = None
    global_clipnorm: float | None = None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    loss_scale_factor: float | None = None
    over_parts: Callable[[list[list[Tensor]], list[Tensor]], list[Tensor]] | None = None
    over_processes: Callable[[Tensor], Tensor] | None = None
    over_variables: Callable[[list[Tensor]], list[Tensor]] | None = None
    in_double: bool = False


NO_CLIPPING: Final = Clipping()

# Which batch a compiled op refused when norms were to be taken, and why.
Refused = tuple[Batch, Refusal]


def set_gradient_options(batches: list[Batch], clipping: Clipping) -> Refused | None:
    """Tells each batch what becomes of its gradients, for which norms are taken; or says what an op refused."""
    scales = clipping.grad_scale is not None or clipping.found_inf is not None
    for batch in batches:
        batch.gradient_options = GradientOptions(
            clipvalue=clipping.clipvalue, loss_scale_factor=clipping.loss_scale_factor or 1.0
        )
        if scales:
            batch.gradient_options = batch.gradient_options._replace(**_amp_options(batch, clipping))
    if clipping.clipnorm is not None:
        return _set_norms(batches, clipping.clipnorm, clipping)
    if clipping.global_clipnorm is not None:
        return _set_factors(batches, clipping.global_clipnorm, clipping)
    return None


def recording(is_differentiable: bool) -> contextlib.AbstractContextManager[Any]:
    """Lets autograd record what a differentiable step computes before its updates."""
    return torch.enable_grad() if is_differentiable else contextlib.nullcontext()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for that."""
    # The CPU would read what has not arrived yet.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _amp_options(batch: Batch, clipping: Clipping) -> dict[str, Any]:
    named = (("grad_scale", clipping.grad_scale), ("found_inf", clipping.found_inf))
    given = {name: tensor for name, tensor in named if tensor is not None}
    if given and batch.backend is not Backend.FUSED:
        raise RuntimeError(f"{' and '.join(given)} need the fused update; pass fused=True")
    return {name: moved(tensor, batch.params[0].device).float() for name, tensor in given.items()}


# ---- Sums of squares ------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Gradients whose sums of squares one call takes, and what becomes of them before."""

    batch: Batch
    params: list[Tensor]
    grads: list[Tensor]
    options: GradientOptions
    rows: list[int] | None  # where they are in the batch; None for all of it

    def sums(self, in_double: bool) -> Tensor | Refusal:
        params, grads = self.params, self.grads
        if self.batch.is_sparse:
            params = grads = functional.values_in_T(params, grads)
        if self.batch.backend is Backend.FUSED:
            scales = self.options.grad_scale, self.options.loss_scale_factor
            return kernels.square_sums(params, grads, self.options.clipvalue, in_double, *scales)
        with recording(self.batch.is_differentiable):
            return functional.square_sums(
                params, grads, self.options.clipvalue, in_double, self.options.loss_scale_factor
            )

    @property
    def shared_out(self) -> list[Tensor]:
        """The parameters, if the sums are those of the parts that this process has."""
        if self.batch.wholes is None:
            return []
        owners = self.batch.wholes[0]
        return owners if self.rows is None else [owners[row] for row in self.rows]


def _whole(batch: Batch) -> _Part:
    return _Part(batch, batch.params, batch.grads, batch.gradient_options, None)


def _parts_in_double(batch: Batch) -> list[_Part]:
    """A batch whose norms are taken in float64, as one part of each T.

    Up to its square a gradient is in the T of its parameter, so what makes a difference in float64 is rounded before.
    """
    rows_of: dict[torch.dtype, list[int]] = {}
    for row, param in enumerate(batch.params):
        rows_of.setdefault(opmath_dtype(param.dtype), []).append(row)
    parts = []
    for T, rows in rows_of.items():
        params, grads = ([tensors[row] for row in rows] for tensors in (batch.params, batch.grads))
        options = batch.gradient_options
        if T is torch.float32:
            clipvalue = None if options.clipvalue is None else round_to_float32(options.clipvalue)
            factor = None if options.loss_scale_factor == 1 else options.loss_scale_factor
            is_scaled = options.grad_scale is not None or factor is not None
            with recording(batch.is_differentiable):
                grads = [
                    callbacks.copied_to_T(param, grad, options.grad_scale, factor)
                    if is_scaled or opmath_dtype(grad.dtype) is torch.float64
                    else grad
                    for param, grad in zip(params, grads, strict=True)
                ]
            options = GradientOptions(clipvalue)
        parts.append(_Part(batch, params, grads, options, rows))
    return parts


def _sums(parts: list[_Part], in_double: bool, clipping: Clipping) -> list[Tensor] | Refused:
    """The sums of squares of the gradients of each part."""
    result = []
    for part in parts:
        sums = part.sums(in_double)
        if isinstance(sums, Refusal):
            return part.batch, _in_batch(sums, part.rows)
        result.append(sums)
    return result if clipping.over_parts is None else clipping.over_parts([part.shared_out for part in parts], result)


def _in_batch(refusal: Refusal, rows: list[int] | None) -> Refusal:
    if rows is None or refusal.param is None:
        return refusal
    return refusal._replace(param=rows[refusal.param])


# ---- Norms ----------------------------------------------------------------------------------------------------------


def _set_norms(batches: list[Batch], clipnorm: float, clipping: Clipping) -> Refused | None:
    sums = _sums([_whole(batch) for batch in batches], False, clipping)
    if isinstance(sums, tuple):
        return sums
    if clipping.over_variables is not None:
        with recording(any(batch.is_differentiable for batch in batches)):
            sums = clipping.over_variables(sums)
    for batch, square_sums in zip(batches, sums, strict=True):
        batch.gradient_options = batch.gradient_options._replace(clipnorm=clipnorm, square_sums=square_sums)
    return None


def _set_factors(batches: list[Batch], global_clipnorm: float, clipping: Clipping) -> Refused | None:
    types = opmath_dtypes(itertools.chain.from_iterable(batch.params for batch in batches))
    in_double = clipping.in_double or torch.float64 in types
    parts = [part for batch in batches for part in (_parts_in_double(batch) if in_double else [_whole(batch)])]
    sums = _sums(parts, in_double, clipping)
    if isinstance(sums, tuple):
        return sums
    # Under autograd the sums of DTensors are DTensors, which mix with each other and with numbers only.
    are_distributed = dtensor.has_dtensor(sums)
    sums = [s.full_tensor() if dtensor.is_dtensor(s) else s for s in sums]  # type: ignore[attr-defined]
    with recording(any(batch.is_differentiable for batch in batches)):
        in_order = _in_order([_order_of(part) for part in parts], sums)
        if clipping.over_processes is not None:
            in_order = clipping.over_processes(functional.pairwise_sum(in_order)).reshape(1)
        T = torch.float64 if in_double else torch.float32
        factor: Value = functional.global_factor(global_clipnorm, in_order, T)
    factor = float(factor) if are_distributed else factor
    for batch in batches:
        on_device = moved(factor, batch.params[0].device) if isinstance(factor, Tensor) else factor
        batch.gradient_options = batch.gradient_options._replace(factor=on_device)
    return None


def _order_of(part: _Part) -> list[int] | None:
    """The numbers of the gradients of a part among all of the step; None for 0, 1, 2, …"""
    order = part.batch.gradient_order
    if part.rows is None:
        return order
    return part.rows if order is None else [order[row] for row in part.rows]


def _in_order(orders: list[list[int] | None], sums: list[Tensor]) -> Tensor:
    """The sums of all gradients in the order of their numbers, as one tensor."""
    if len(sums) == 1 and orders[0] is None:
        return sums[0]
    # One device for all: not the CPU if there is another, for that would wait for the other.
    device = next((s.device for s in sums if s.device.type != "cpu"), torch.device("cpu"))
    pieces: list[tuple[int, Tensor]] = []
    for order, sums_here in zip(orders, sums, strict=True):
        numbers = list(range(len(sums_here))) if order is None else order
        there = moved(sums_here, device)
        pieces += [(numbers[begin], there[begin:end]) for begin, end in _runs(numbers)]
    pieces.sort(key=itemgetter(0))
    return torch.cat([torch.empty(0, dtype=torch.float64, device=device), *(piece for _, piece in pieces)])


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Where consecutive numbers begin and end in a list."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(itertools.pairwise([0, *cuts, len(numbers)])) if numbers else []
