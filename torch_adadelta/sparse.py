"""The update by sparse gradients: of a parameter and its state only the rows that occur are read or written.

A gradient of layout `torch.sparse_coo`, as `torch.nn.Embedding(..., sparse=True)` makes it, is a list of occurrences:
an index into the first dimensions of the parameter, which selects a row of it, and the values of that row. A row may
occur several times. As in Keras,

    each occurrence is cast to T, unscaled, clipped and negated as it is, by itself;
    those of one row are then added to 0, in the order in which they occur: g = (0 + v1) + v2 + ...;
    the row of parameter, square_avg and acc_delta is updated by g with the formula of `update.py`.

Rows that do not occur stay as they are: their averages do not decay. Two implementations give the same bits:
`for_loop`, which gathers the rows, and `fused`, one compiled pass.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta import gradients, ops
from torch_adadelta import update as updates
from torch_adadelta.arithmetic import arithmetic_dtype, as_real
from torch_adadelta.hyperparameters import Value
from torch_adadelta.signature import Lists, Update


def is_sparse(grad: Tensor) -> bool:
    """Whether this is a gradient for the updates of this module."""
    return grad.layout is torch.sparse_coo


def parts(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of a gradient, [sparse dimensions, occurrences], and its values, [occurrences, ...], contiguous."""
    return grad._indices(), grad._values().resolve_conj().resolve_neg().contiguous()


def values_in_T(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The values of each gradient in a dtype whose arithmetic type is that of the parameter."""
    result = []
    for param, grad in zip(params, grads, strict=True):
        _, values = parts(grad)
        T = arithmetic_dtype(param.dtype)
        if arithmetic_dtype(values.dtype) is not T:
            values = values.to(T.to_complex() if values.is_complex() else T)
        result.append(values)
    return result


# ---- The two implementations ----------------------------------------------------------------------------------------


def for_loop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    lr: Value,
    rho: Value,
    epsilon: Value,
    maximize: bool,
    **clip: Any,
) -> None:
    """Gathers the rows that occur, updates them as one dense tensor, and puts them back."""
    for index, (param, grad, square_avg, acc_delta) in enumerate(
        zip(params, grads, square_avgs, acc_deltas, strict=True)
    ):
        indices, values = parts(grad)
        if values.numel() == 0:
            continue
        g = gradients.clip(as_real(values).to(arithmetic_dtype(param.dtype)), index, **clip)
        if maximize:
            g = -g
        tables = [as_real(x) for x in (param, square_avg, acc_delta)]
        if len(indices) == 0:  # the whole parameter is one row
            tables = [table[None] for table in tables]
            indices = indices.new_zeros(1, len(values))
        rows, g = _sum_duplicates(indices, g, tables[0].shape)
        p, a, u = (table[rows] for table in tables)
        updates.for_loop([p], [g], [a], [u], lr, rho, epsilon, False)
        for table, updated in zip(tables, (p, a, u), strict=True):
            table[rows] = updated


def _sum_duplicates(indices: Tensor, g: Tensor, shape: torch.Size) -> tuple[tuple[Tensor, ...], Tensor]:
    """Each row that occurs, as one index a sparse dimension, and the sum of its occurrences in their order.

    Round k adds the k-th occurrence of every row that has as many. PyTorch's own sums by index have no fixed order.
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
    for k, size in enumerate(sizes[:-1]):  # no row has more occurrences than the last size counts
        sums[:size] += g[order[starts[:size] + k]]
    return tuple(indices[:, order[starts]]), sums


def fused(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    *hyperparameters: Any,
    **clip: Any,
) -> None:
    """Updates all parameters, which are of one device, in one compiled call."""
    indices, values = map(list, zip(*map(parts, grads), strict=True))
    ops.sparse_adadelta_(params, indices, values, square_avgs, acc_deltas, *hyperparameters, **clip)


UPDATES: Final[frozenset[Update]] = frozenset((for_loop, fused))


def counterpart(update: Update) -> Update:
    """The implementation here that belongs to a choice for dense parameters; `foreach` has none of its own."""
    return fused if update is updates.fused else for_loop


# ---- Checks ---------------------------------------------------------------------------------------------------------


def first_bad_indices(update: Update, lists: Lists) -> Tensor:
    """The first occurrence in each gradient whose index is out of range, or -1, on the device of the parameters.

    With `fused`, raises RuntimeError for lists that it would refuse for another reason.
    """
    params, grads, square_avgs, acc_deltas = lists
    indices = [grad._indices() for grad in grads]
    if update is fused:
        if any(x.is_conj() or x.is_neg() for x in itertools.chain(params, square_avgs, acc_deltas)):
            raise RuntimeError("a lazily conjugated or negated view cannot be written to")
        return ops.first_bad_indices(params, indices, [grad._values() for grad in grads], square_avgs, acc_deltas)
    found = []
    for param, index in zip(params, indices, strict=True):
        sizes = torch.tensor(param.shape[: len(index)], device=index.device)[:, None]
        is_bad = ((index < 0) | (index >= sizes)).any(0)
        # The last element stands for no occurrence; the first of equal ones is found.
        found.append(torch.nn.functional.pad(is_bad, (0, 1), value=True).to(torch.int8).argmax())
        found[-1] = torch.where(found[-1] == len(is_bad), -1, found[-1])
    return torch.stack(found)


def check_indices(buckets: Iterable[tuple[Lists, Tensor]], name_of: Callable[[Tensor], str]) -> None:
    """Raises IndexError, naming parameter, position and value, if `first_bad_indices` found something.

    Reads what it found on each device at once, which on CUDA is the one time that a step waits for the device.

    Args:
        buckets: the lists of each bucket, and what was found for them.
        name_of: how to call a parameter.
    """
    on_device: dict[torch.device, list[tuple[Lists, Tensor]]] = {}
    for lists, found in buckets:
        on_device.setdefault(found.device, []).append((lists, found))
    for same in on_device.values():
        rows = [(param, grad) for (params, grads, _, _), _ in same for param, grad in zip(params, grads, strict=True)]
        positions = (torch.cat([found for _, found in same]) if len(same) > 1 else same[0][1]).tolist()
        for (param, grad), position in zip(rows, positions, strict=True):
            if position >= 0:
                raise IndexError(f"{name_of(param)} {_describe(param, grad, position)}")


def _describe(param: Tensor, grad: Tensor, position: int) -> str:
    index = tuple(grad._indices()[:, position].tolist())
    what = f"{param.shape[0]} rows" if len(index) == 1 else f"shape {tuple(param.shape)}"
    value = index[0] if len(index) == 1 else index
    return f"has {what}, but its sparse gradient has the index {value} at position {position}"
