"""Which memory the tensors of a step have: whether what it writes to belongs to one parameter only.

The fused update looks for the same by itself, in csrc/overlaps.h, and so do those of sparse gradients for each
parameter. The rules, here and there: of the three tensors of a parameter that are written to, none shares memory with
another, nor with the gradient, which may be the parameter itself. Between two parameters only the parameters may share
memory: they are then updated one after the other, in their order. If they have the very same memory, as one that is
listed twice, they may also share their state, and either may be the gradient.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

# A parameter, its gradient, dense or sparse, square_avg and acc_delta.
Row = tuple[Tensor, Tensor, Tensor, Tensor]

# The device's index, where the memory of a tensor with elements begins and ends, and 4 * the number of its row + the
# number of the tensor in it.
Range = tuple[int, int, int, int]

_PARAM, _GRADIENT = 0, 1
_OWN: Final = ("it", "its gradient", "its state square_avg", "its state acc_delta")
_OF_ANOTHER: Final = ("", "the gradient of ", "the state square_avg of ", "the state acc_delta of ")


def memory_range(tensor: Tensor, number: int) -> Range:
    """What `tensor`, which has elements, takes."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():  # most are
        return tensor.get_device(), begin, begin + tensor.nbytes, number
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.get_device(), begin, begin + (last + 1) * tensor.element_size(), number


def overlap(ranges: list[Range]) -> bool:
    """Whether some memory may belong to two of the ranges, which are sorted by this."""
    ranges.sort()
    return any(this[0] == after[0] and after[1] < this[2] for this, after in itertools.pairwise(ranges))


def check_apart(rows: list[Row], name_of: Callable[[Tensor], str]) -> None:
    """Raises RuntimeError, naming the parameters, if memory is shared that must not be.

    Args:
        rows: of plain tensors with memory.
        name_of: how to call a parameter.
    """
    ranges = []
    for number, tensor in enumerate(itertools.chain.from_iterable(rows)):
        if tensor.layout is torch.sparse_coo:
            tensor = tensor._values()
        if tensor.numel() > 0:
            ranges.append(memory_range(tensor, number))
    if not overlap(ranges):
        return
    by_number = {which[3]: which[:3] for which in ranges}
    shared = [sorted(pair) for pair in _pairs(ranges) if not _may_share(*pair, rows, by_number)]
    if not shared:
        return
    first, second = min(shared)
    is_own = first // 4 == second // 4
    if second % 4 == _GRADIENT and not is_own:  # named first, for it is the one to be copied
        first, second = second, first
    name, name_of_second = (name_of(rows[number // 4][_PARAM]) for number in (first, second))
    what = _OWN[second % 4] if is_own else f"{_OF_ANOTHER[second % 4]}{name_of_second}"
    raise RuntimeError(f"{name}: {_OWN[first % 4]} and {what} share memory. Use .clone()")


def _pairs(ranges: list[Range]) -> Iterator[tuple[int, int]]:
    """The numbers of sorted ranges that overlap, but for two gradients, which are only read."""
    written: list[Range] = []
    read: list[Range] = []
    for this in ranges:
        for others in (written, read):
            others[:] = [other for other in others if other[0] == this[0] and other[2] > this[1]]
        is_gradient = this[3] % 4 == _GRADIENT
        for other in written if is_gradient else itertools.chain(written, read):
            yield other[3], this[3]
        (read if is_gradient else written).append(this)


def _may_share(one: int, other: int, rows: list[Row], by_number: dict[int, tuple[int, int, int]]) -> bool:
    kinds = {one % 4, other % 4}
    if kinds == {_PARAM}:
        return True
    param, grad = rows[one // 4][_PARAM], rows[one // 4][_GRADIENT]
    if one // 4 == other // 4:
        return (
            kinds == {_PARAM, _GRADIENT}
            and by_number[one] == by_number[other]
            and grad.layout is torch.strided
            and grad.dtype == param.dtype
            and grad.stride() == param.stride()
        )
    is_same_param = by_number[one - one % 4] == by_number[other - other % 4]
    if kinds == {_PARAM, _GRADIENT}:
        return is_same_param
    return is_same_param and len(kinds) == 1 and by_number[one] == by_number[other]
