"""The update by PyTorch's operations: dense and sparse, one tensor after the other and multi-tensor. The reference.

The names of the formula, here and in csrc/adadelta.h:

    g    the gradient, in the opmath dtype T (float64 for float64 parameters, else float32)
    a, u square_avg and acc_delta       p    the parameter       one_minus_rho  T(1) - rho

    p = p - (p * weight_decay) * lr          if it is decoupled, or else    g = g + p * weight_decay
    a = a * rho + (g * g) * one_minus_rho
    d = sqrt(u + epsilon) * (1 / sqrt(a + epsilon)) * g        the new a, the old u; left to right
    u = u * rho + (d * d) * one_minus_rho
    p = p - d * lr
    e = m * e + (1 - m) * p                  the average with momentum m, of p as it is kept; m = 0: e = p
    p = e                                    if it `overwrites`

p is the master of the parameter where it has one (masters.py). a and u are rounded once, where they are stored, to the
dtype that they are kept in.

Before it, gradients are divided by `loss_scale_factor`, clipped and then negated if `maximize`. A weight_decay of 0 in
T is none. Sums of squares, whose terms are rounded to T, run in float64 and are rounded to T before the root is taken:

    clipvalue c          g = max(min(g, c), -c)
    clipnorm c           g = (g * c) / max(norm, c)                          norm = sqrt(sum of g * g)
    global_clipnorm c    g = g * (c * min(1/n, 1/c) + (n - n))               n: the norm of all gradients together

Every operation is rounded to T on its own. That is why no `addcmul`, `lerp` or `add(alpha=)` appears below: they round
in another order, or fuse.
"""

import math
from collections.abc import Iterator, Sequence
from operator import add
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends import masters
from torch_adadelta.backends.batch import Batch, GradientOptions, Row, Segment
from torch_adadelta.backends.opmath import (
    Value,
    as_real,
    cast,
    exact_sqrt,
    exact_sqrt_,
    one_minus,
    opmath_dtype,
    rounded,
)

# ---- The formula ----------------------------------------------------------------------------------------------------


class _EmaFactors(NamedTuple):
    """What averages and parameters are multiplied by, in T."""

    m: Value
    one_minus: Value
    copies: bool  # it is 0, and no Tensor


def _ema_factors(momentum: Value, T: torch.dtype, device: torch.device) -> _EmaFactors:
    if not isinstance(momentum, Tensor) and momentum == 0:  # no compiler traces the rounding of a number
        return _EmaFactors(0.0, 1.0, True)
    m = cast(momentum, T, device)
    return _EmaFactors(m, one_minus(m, T), not isinstance(m, Tensor) and m == 0)


def _averaged(e: Tensor, p: Tensor, momentum: _EmaFactors) -> Tensor:
    """An average after the update of its parameter, which is as it was stored, in T."""
    m, one_minus_m, copies = momentum
    if copies:
        return p
    moved = e * m + p * one_minus_m
    return torch.where(m == 0, p, moved) if isinstance(m, Tensor) else moved


class _Hyperparameters(NamedTuple):
    """Those of a segment, in T."""

    lr: Value
    rho: Value
    one_minus_rho: Value
    epsilon: Value
    weight_decay: Value
    is_decoupled: bool
    decays: bool  # whether there may be weight decay
    momentum: _EmaFactors
    overwrites: bool


def _in_T(segment: Segment, T: torch.dtype, device: torch.device) -> _Hyperparameters:
    lr, rho, epsilon = (cast(value, T, device) for value in (segment.lr, segment.rho, segment.epsilon))
    weight_decay = segment.weight_decay
    if isinstance(weight_decay, Tensor) or weight_decay != 0:  # no compiler traces the rounding of a number
        weight_decay = cast(weight_decay, T, device)
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    momentum = _ema_factors(segment.ema_momentum, T, device)
    return _Hyperparameters(
        lr,
        rho,
        one_minus(rho, T),
        epsilon,
        weight_decay,
        segment.is_decoupled,
        decays,
        momentum,
        segment.overwrites,
    )


def _where_decayed(decayed: Tensor, x: Tensor, h: _Hyperparameters) -> Tensor:
    """`decayed`, or `x` where weight decay is a Tensor that holds 0: then infinities stay what they are."""
    return torch.where(h.weight_decay != 0, decayed, x) if isinstance(h.weight_decay, Tensor) else decayed


def _decayed(p: Tensor, h: _Hyperparameters) -> Tensor:
    """A parameter in T less its decoupled weight decay."""
    return _where_decayed(p - (p * h.weight_decay) * h.lr, p, h)


def _with_penalty(g: Tensor, p: Tensor, h: _Hyperparameters) -> Tensor:
    """A gradient in T with weight decay that is not decoupled."""
    return _where_decayed(g + p * h.weight_decay, g, h)


def _updated(p: Tensor, g: Tensor, a: Tensor, u: Tensor, h: _Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter, square_avg and acc_delta after the update, all in T."""
    if h.decays and h.is_decoupled:
        p = _decayed(p, h)
    elif h.decays:
        g = _with_penalty(g, p, h)
    a = a * h.rho + (g * g) * h.one_minus_rho
    d = exact_sqrt(u + h.epsilon) * (1 / exact_sqrt(a + h.epsilon)) * g
    u = u * h.rho + (d * d) * h.one_minus_rho
    p = p - d * h.lr
    return p, a, u


def _rows(batch: Batch) -> Iterator[tuple[int, Segment, Row]]:
    """The tensors of each parameter, complex ones as pairs of reals, its number in the batch and its segment."""
    for index, (segment, *row) in enumerate(zip(batch.segment_of_rows, *batch.lists, strict=True)):
        yield index, segment, Row(*(x if x is None or is_sparse(x) else as_real(x) for x in row))


# ---- Dense gradients ------------------------------------------------------------------------------------------------


def single_tensor(batch: Batch) -> None:
    """Updates one parameter after the other with elementwise tensor operations; autograd can record them."""
    for index, segment, (p_out, g, a_out, u_out, e_out, remainder) in _rows(batch):
        T = opmath_dtype(p_out.dtype)
        p, g, a, u = masters.wide(p_out, remainder, T), g.to(T), a_out.to(T), u_out.to(T)
        if torch.is_grad_enabled():
            a, u = a.clone(), u.clone()  # autograd may need the old values, and a_out and u_out are written in place
        g = clip(g, index, batch.gradient_options)
        if segment.maximize:
            g = -g
        h = _in_T(segment, T, p.device)
        p, a, u = _updated(p, g, a, u, h)
        batch.has_begun = True
        masters.store(p_out, remainder, p)
        a_out.copy_(a)
        u_out.copy_(u)
        if e_out is not None:
            e = e_out.clone() if torch.is_grad_enabled() else e_out
            e_out.copy_(_averaged(e, masters.wide(p_out, remainder, T), h.momentum))
            if h.overwrites:
                masters.store(p_out, remainder, e_out)


def multi_tensor(batch: Batch) -> None:
    """Updates the parameters with PyTorch's multi-tensor operations.

    They share no memory and are of one dtype, and so is their state; all have averages and remainders, or none has.
    """
    begin = 0
    for segment in batch.segments:
        _multi_tensor(batch, segment, begin)
        begin += segment.size


def _multi_tensor(batch: Batch, segment: Segment, begin: int) -> None:
    part = slice(begin, begin + segment.size)
    p_out, grads, a_out, u_out, e_out = (
        list(map(as_real, xs[part]))
        for xs in (batch.params, batch.grads, batch.square_avgs, batch.acc_deltas, batch.averages)
    )
    remainders: Sequence[Tensor | None] = batch.remainders[part] or [None] * len(p_out)
    if not p_out:
        return
    T = opmath_dtype(p_out[0].dtype)
    h = _in_T(segment, T, p_out[0].device)
    g = [clip(x.to(T), index, batch.gradient_options) for index, x in enumerate(grads, begin)]
    if segment.maximize:
        g = list(torch._foreach_neg(g))
    # What is in T already is updated where it is; else a copy, which is rounded back at the end.
    p = [masters.wide(*rows, T) for rows in zip(p_out, remainders, strict=True)]
    a, u = ([x.to(T) for x in xs] for xs in (a_out, u_out))
    is_kept_in_T = a_out[0].dtype is T
    if h.decays and not h.is_decoupled:
        g = [_with_penalty(*rows, h) for rows in zip(g, p, strict=True)]

    buffer = list(torch._foreach_mul(g, g))
    torch._foreach_mul_(buffer, h.one_minus_rho)
    batch.has_begun = batch.has_begun or is_kept_in_T
    torch._foreach_mul_(a, h.rho)
    torch._foreach_add_(a, buffer)

    torch._foreach_copy_(buffer, a)
    torch._foreach_add_(buffer, h.epsilon)
    _foreach_exact_sqrt_(buffer)
    torch._foreach_reciprocal_(buffer)
    d = list(torch._foreach_add(u, h.epsilon))
    _foreach_exact_sqrt_(d)
    torch._foreach_mul_(d, buffer)
    torch._foreach_mul_(d, g)

    torch._foreach_copy_(buffer, d)
    torch._foreach_mul_(buffer, d)
    torch._foreach_mul_(buffer, h.one_minus_rho)
    torch._foreach_mul_(u, h.rho)
    torch._foreach_add_(u, buffer)
    del buffer

    if h.decays and h.is_decoupled:
        decay = list(torch._foreach_mul(p, h.weight_decay))
        torch._foreach_mul_(decay, h.lr)
        torch._foreach_sub_(p, [_where_decayed(x, x.new_zeros(()), h) for x in decay])
    torch._foreach_mul_(d, h.lr)
    torch._foreach_sub_(p, d)

    batch.has_begun = True
    if not is_kept_in_T:
        torch._foreach_copy_(a_out, a)
        torch._foreach_copy_(u_out, u)
    if p_out[0].dtype is not T:
        _foreach_store(p_out, remainders, p)
    if e_out:
        del d, p
        _foreach_average_(p_out, e_out, remainders, h.momentum, h.overwrites)


def _foreach_store(p_out: list[Tensor], remainders: Sequence[Tensor | None], values: list[Tensor]) -> None:
    if remainders[0] is None:
        torch._foreach_copy_(p_out, values)
        return
    for row in zip(p_out, remainders, values, strict=True):
        masters.store(*row)


def _foreach_exact_sqrt_(tensors: list[Tensor]) -> None:
    if tensors[0].device.type != "cpu":
        torch._foreach_sqrt_(tensors)
        return
    for x in tensors:
        exact_sqrt_(x)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices of a strided tensor may share memory, as in an expanded one."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


# ---- Averages -------------------------------------------------------------------------------------------------------

# How many elements are averaged at a time, on a device and on the CPU, in whose cache they stay.
_PIECE_ELEMENTS: Final = (2**20, 2**16)


def average(
    params: list[Tensor],
    averages: list[Tensor],
    remainders: Sequence[Tensor | None],
    momentum: Value,
    overwrites: bool,
    found_inf: Tensor | None = None,
) -> None:
    """Moves averages on by themselves: those of parameters that no update has taken along.

    Args:
        params: of one device, which share no memory.
        averages: one for each, of its opmath dtype.
        remainders: what each lacks of its master, or None.
        momentum: that of all of them.
        overwrites: the parameters become their averages.
        found_inf: nothing changes if this Tensor of one element is not zero.
    """
    some: list[_Averaged] = []
    size = 0
    for row in zip(params, averages, remainders, strict=True):
        for piece in _pieces(*row):
            count = piece.param.numel()
            if some and (size + count > _PIECE_ELEMENTS[piece.param.is_cpu] or not piece.is_like(some[0])):
                _average_together(some, momentum, overwrites, found_inf)
                some, size = [], 0
            some.append(piece)
            size += count
    if some:
        _average_together(some, momentum, overwrites, found_inf)


class _Averaged(NamedTuple):
    """A part of a parameter with that of its average, and of its remainder if it has one."""

    param: Tensor
    average: Tensor
    remainder: Tensor | None

    def is_like(self, other: "_Averaged") -> bool:
        """Whether both can be averaged by one multi-tensor operation."""
        return (
            self.param.dtype is other.param.dtype
            and self.average.dtype is other.average.dtype
            and (self.remainder is None) == (other.remainder is None)
        )


def _pieces(param: Tensor, average: Tensor, remainder: Tensor | None) -> Iterator[_Averaged]:
    """The parts, which are small where all are contiguous or have many rows."""
    param, average = as_real(param.detach()), as_real(average.detach())
    most = _PIECE_ELEMENTS[param.is_cpu]
    tensors = [param, average] if remainder is None else [param, average, remainder]
    if param.numel() <= most:
        return iter([_Averaged(param, average, remainder)] if param.numel() else [])
    if all(x.is_contiguous() for x in tensors):
        parts = [x.view(-1).split(most) for x in tensors]
    else:
        parts = [x.split(max(1, most // param[0].numel())) for x in tensors]
    return (_Averaged(*(part if remainder is not None else (*part, None))) for part in zip(*parts, strict=True))


def _average_together(some: list[_Averaged], momentum: Value, overwrites: bool, found_inf: Tensor | None) -> None:
    params, averages, remainders = map(list, zip(*some, strict=True))
    in_T = _ema_factors(momentum, averages[0].dtype, averages[0].device)
    if found_inf is None:
        _foreach_average_(params, averages, remainders, in_T, overwrites)
        return
    is_finite = found_inf.reshape(()) == 0
    for p_out, e, remainder in some:
        p = masters.wide(p_out, remainder, e.dtype)
        e.copy_(torch.where(is_finite, _averaged(e, p, in_T), e))
        if overwrites:
            masters.store(p_out, remainder, torch.where(is_finite, e, p))


def _foreach_average_(
    p_out: list[Tensor],
    e_out: list[Tensor],
    remainders: Sequence[Tensor | None],
    momentum: _EmaFactors,
    overwrites: bool,
) -> None:
    """Moves averages in T on, whose parameters were stored already."""
    m, one_minus_m, copies = momentum
    if copies and remainders[0] is None:
        torch._foreach_copy_(e_out, p_out)
    else:
        p = [masters.wide(p, r, e.dtype) for p, e, r in zip(p_out, e_out, remainders, strict=True)]
        if copies:
            torch._foreach_copy_(e_out, p)
        else:
            _foreach_move_(e_out, p, m, one_minus_m)
    if overwrites:
        _foreach_store(p_out, remainders, e_out)


def _foreach_move_(e_out: list[Tensor], p: list[Tensor], m: Value, one_minus_m: Value) -> None:
    added = list(torch._foreach_mul(p, one_minus_m))
    if isinstance(m, Tensor):
        moved = list(torch._foreach_mul(e_out, m))
        torch._foreach_add_(moved, added)
        torch._foreach_copy_(e_out, [torch.where(m == 0, *rows) for rows in zip(p, moved, strict=True)])
    else:
        torch._foreach_mul_(e_out, m)
        torch._foreach_add_(e_out, added)


# ---- Sparse gradients -----------------------------------------------------------------------------------------------


def is_sparse(grad: Tensor) -> bool:
    """Whether this is a gradient for the sparse updates."""
    return grad.layout is torch.sparse_coo


def coo_components(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of a gradient, [sparse dimensions, entries], and its values, [entries, ...], contiguous."""
    return grad._indices(), grad._values().resolve_conj().resolve_neg().contiguous()


def values_in_T(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The values of each gradient in a dtype whose opmath dtype is that of the parameter."""
    result = []
    for param, grad in zip(params, grads, strict=True):
        _, values = coo_components(grad)
        T = opmath_dtype(param.dtype)
        if opmath_dtype(values.dtype) is not T:
            values = values.to(T.to_complex() if values.is_complex() else T)
        result.append(values)
    return result


def sparse_single_tensor(batch: Batch) -> None:
    """Updates the rows that occur: gathers them, updates them as one dense tensor, and puts them back.

    A row may occur several times. Each COO entry is cast to T, clipped and negated by itself; those of one row are then
    added to 0, in the order in which they occur. Other rows stay as they are: their averages do not decay. Weight decay
    comes before that, is of all rows, and is stored. Averages, which follow all rows, are left to `average`.
    """
    for index, segment, (param, grad, square_avg, acc_delta, _, remainder) in _rows(batch):
        indices, values = coo_components(grad)
        T = opmath_dtype(param.dtype)
        h = _in_T(segment, T, param.device)
        if h.decays:
            batch.has_begun = True
            _decay_table(param, remainder, h)
        if values.numel() == 0:
            continue
        g = clip(as_real(values).to(T), index, batch.gradient_options)
        if segment.maximize:
            g = -g
        tables = [param, square_avg, acc_delta] if remainder is None else [param, square_avg, acc_delta, remainder]
        if len(indices) == 0:  # the whole parameter is one row
            tables = [table[None] for table in tables]
            indices = indices.new_zeros(1, len(values))
        rows, g = _sum_duplicates(indices, g, tables[0].shape)
        p_rows, a_rows, u_rows, *remainders = own = [table[rows] for table in tables]  # copies
        some_remainder = remainders[0] if remainders else None
        p, a, u = _updated(
            masters.wide(p_rows, some_remainder, T), g, a_rows.to(T), u_rows.to(T), h._replace(decays=False)
        )
        masters.store(p_rows, some_remainder, p)
        a_rows.copy_(a)
        u_rows.copy_(u)
        batch.has_begun = True
        for table, values in zip(tables, own, strict=True):
            table[rows] = values


# How many bytes of a table are decayed at a time, on a device and on the CPU, in whose cache they stay.
_PIECE_BYTES: Final = (2**26, 2**18)


def decays_tables(batch: Batch) -> bool:
    """Whether `decay_table` is to be called before the update by the sparse gradients of a batch."""
    return any(isinstance(s.weight_decay, Tensor) or s.weight_decay for s in batch.segments)


def decay_table(batch: Batch) -> None:
    """Takes weight decay off all rows of the one parameter of a batch; nothing if `found_inf` is not 0."""
    (param,), (segment,) = batch.params, batch.segments
    h = _in_T(segment, opmath_dtype(param.dtype), param.device)
    if h.decays:
        remainder = batch.remainders[0] if batch.remainders else None
        _decay_table(as_real(param), remainder, h, batch.gradient_options.found_inf)


def _decay_table(table: Tensor, remainder: Tensor | None, h: _Hyperparameters, found_inf: Tensor | None = None) -> None:
    T = opmath_dtype(table.dtype)
    rows = len(table) if table.dim() and table.numel() else 0
    if rows:
        rows = max(1, _PIECE_BYTES[table.is_cpu] // (table[0].numel() * table.element_size()))
    pieces = table.split(rows) if rows else (table,)
    remainders = [None] * len(pieces) if remainder is None else remainder.split(rows) if rows else (remainder,)
    for piece, rest in zip(pieces, remainders, strict=True):
        p = masters.wide(piece, rest, T)
        decayed = _decayed(p, h)
        masters.store(piece, rest, decayed if found_inf is None else torch.where(found_inf == 0, decayed, p))


def _sum_duplicates(indices: Tensor, g: Tensor, shape: torch.Size) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each row that occurs, as one index a sparse dimension, and the sum of its entries in their order.

    Round k adds the k-th entry of every row that has as many. PyTorch's own sums by index have no fixed order.
    """
    numbers = indices[0]
    for size, index in zip(shape[1:], indices[1:], strict=False):
        numbers = numbers * size + index
    numbers, order = torch.sort(numbers, stable=True)
    _, counts = torch.unique_consecutive(numbers, return_counts=True)
    starts = counts.cumsum(0) - counts
    # Rows that occur most come first, so that those of each round are the first ones.
    counts, by_count = counts.sort(descending=True)
    starts = starts[by_count]
    sizes = (len(counts) - torch.bincount(counts).cumsum(0)).tolist()
    sums = torch.zeros((len(counts), *g.shape[1:]), dtype=g.dtype, device=g.device)
    for k, size in enumerate(sizes[:-1]):  # no row has more entries than the last size counts
        sums[:size] += g[order[starts[:size] + k]]
    return tuple(indices[:, order[starts]]), sums


def first_invalid_indices(batch: Batch) -> Tensor:
    """The first entry of each sparse gradient whose index is out of range, or -1: int64, on the parameters' device."""
    found = []
    for param, grad in zip(batch.params, batch.grads, strict=True):
        index = grad._indices()
        sizes = torch.tensor(param.shape[: len(index)], device=index.device)[:, None]
        is_invalid = ((index < 0) | (index >= sizes)).any(0)
        # The last element stands for no entry; the first of equal ones is found.
        found.append(torch.nn.functional.pad(is_invalid, (0, 1), value=True).to(torch.int8).argmax())
        found[-1] = torch.where(found[-1] == len(is_invalid), -1, found[-1])
    return torch.stack(found)


# ---- Clipping -------------------------------------------------------------------------------------------------------


def clip_by_value(g: Tensor, clipvalue: float | None) -> Tensor:
    """max(min(g, c), -c) of a tensor in T; nan stays nan. `torch.clamp` leaves the sign of a zero to the processor."""
    if clipvalue is None or clipvalue == math.inf:
        return g
    c = cast(clipvalue, g.dtype, g.device)
    return torch.where(g > c, c, torch.where(g < -c, -c, g))


def clip(g: Tensor, index: int, options: GradientOptions) -> Tensor:
    """Gradient number `index` of a batch, which is in T, complex numbers as pairs of reals, unscaled and clipped."""
    T = g.dtype
    g = divided(g, options.loss_scale_factor)
    g = clip_by_value(g, options.clipvalue)
    if options.clipnorm is not None:
        assert options.square_sums is not None
        c = cast(options.clipnorm, T, g.device)
        return (g * c) / _norm(options.square_sums[index], T).clamp(min=c)
    if isinstance(options.factor, float) and options.factor == 1.0:
        return g
    return g * cast(options.factor, T, g.device)


def _norm(square_sum: Tensor, T: torch.dtype) -> Tensor:
    """The root of a sum of squares, in T. Zero is kept from autograd, for the root's derivative is infinite there."""
    rounded_sum = square_sum.to(T)
    is_positive = rounded_sum > 0
    root = exact_sqrt(torch.where(is_positive, rounded_sum, 1))
    return torch.where(is_positive, root, rounded_sum)


def _divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.inf


def global_factor(clipnorm: float, square_sums: Tensor, T: torch.dtype) -> Value:
    """The factor of `global_clipnorm`, computed in T from the sums of squares of all gradients, in their order.

    A float, if the sums are on the CPU and autograd does not record them; else a float64 Tensor without dimensions.
    """
    c = rounded(clipnorm, T)
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


# ---- Sums of squares ------------------------------------------------------------------------------------------------

# A sum is taken over a fixed tree, so that its bits depend on nothing but the elements and their order in the
# parameter's memory. Chunks of 32 rows of 128 lanes: a lane adds its elements one after the other, the second half of
# the lanes is added to the first until one is left, and chunks are added pairwise, neighbours first.
_LANES: Final = 128
_ROWS: Final = 32


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


def _square_sum(
    param: Tensor, grad: Tensor, T: torch.dtype, clipvalue: float | None, loss_scale_factor: float
) -> Tensor:
    if grad.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=grad.device)
    g = clip_by_value(divided(as_real(grad).to(T), loss_scale_factor), clipvalue)
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
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    clipvalue: float | None = None,
    in_double: bool = False,
    loss_scale_factor: float = 1.0,
) -> Tensor:
    """The sum of squares of each gradient, unscaled and clipped by `clipvalue`, over the fixed tree: float64.

    The terms are rounded to the parameter's T, or to float64 with `in_double`. All tensors are on one device; autograd
    can record this. `kernels.square_sums` gives the same bits.
    """
    if not params:
        return torch.empty(0, dtype=torch.float64)
    sums = []
    for param, grad in zip(params, grads, strict=True):
        T = torch.float64 if in_double else opmath_dtype(param.dtype)
        sums.append(_square_sum(param, grad, T, clipvalue, loss_scale_factor))
    return torch.stack(sums)


# ---- Sums of gradients ----------------------------------------------------------------------------------------------


def divided(x: Tensor, number: float) -> Tensor:
    """The reals in x divided by a number. On CUDA PyTorch multiplies by the inverse of one that is no Tensor."""
    if number == 1:
        return x
    divisor = torch.full((), number, dtype=opmath_dtype(x.dtype), device=x.device)
    return torch.view_as_complex(as_real(x) / divisor) if x.is_complex() else x / divisor


def unscaled_in(total: Tensor, grad: Tensor, loss_scale_factor: float | None) -> Tensor:
    """A gradient, dense or sparse, in the dtype of its sum, divided by the factor of the loss."""
    if is_sparse(grad):
        indices, values = coo_components(grad)
        values = unscaled_in(total, values, loss_scale_factor)
        return torch.sparse_coo_tensor(indices, values, grad.shape, is_coalesced=False, check_invariants=False)
    g = grad.detach().to(total.dtype).resolve_conj().resolve_neg()
    return divided(g, loss_scale_factor or 1.0)


def added(total: Tensor, grad: Tensor) -> Tensor:
    """The sum of `total` and a gradient of its dtype."""
    result = total.clone()
    add_to_sum(result, grad)
    return result


def add_to_sum(total: Tensor, grad: Tensor) -> None:
    """Adds a gradient to `total`, of which it has the dtype. The COO entries of a row are added to each other first."""
    table = as_real(total)
    if not is_sparse(grad):
        table.add_(as_real(grad))
        return
    indices, values = grad._indices(), as_real(grad._values())
    if values.numel() == 0:
        return
    if len(indices) == 0:  # the whole parameter is one row
        table, indices = table[None], indices.new_zeros(1, len(values))
    rows, sums = _sum_duplicates(indices, values, table.shape)
    table[rows] = table[rows] + sums
