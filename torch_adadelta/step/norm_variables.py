"""`clipnorm` by the variables of Keras, where these and the parameters are not one to one.

A variable is made of pieces: rows of parameters, whose squares make one norm. A param group holds the pieces that its
own parameters have, so that groups may be removed and added: tuples of the number of the variable, which is that of one
list in `optimizer.norm_variables`, the index of the parameter in the group, the first row, and the row behind the last.
In a step the pieces of a parameter become views, which every backend takes for parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, Final, NamedTuple

from torch import Tensor

from torch_adadelta.backends import dtensor, functional
from torch_adadelta.backends.batch import Batch, Row
from torch_adadelta.step import validation
from torch_adadelta.step.clipping import moved, recording
from torch_adadelta.step.selection import is_lazy
from torch_adadelta.step.sources import Group

KEY: Final = "norm_variables"

# What a group holds of a piece: its variable, the index of its parameter, its first row, and the one behind its last.
SavedPiece = tuple[int, int, int, int]


class Piece(NamedTuple):
    """Rows of a parameter. They sort in the order in which their squares are added."""

    group: int
    place: int  # of the parameter in the group
    first: int
    end: int
    variable: Any  # pieces with an equal one have one norm

    def of(self, tensor: Tensor) -> Tensor:
        """These rows, in the same memory."""
        return tensor.narrow(0, self.first, self.end - self.first)


def any_in(groups: list[Group]) -> bool:
    """Whether there are variables that are not one to one with parameters."""
    return any(group.get(KEY) for group in groups)


def _rows_of(param: Tensor) -> int:
    return param.shape[0] if param.dim() else 1


# ---- What the user gives and gets -----------------------------------------------------------------------------------

_FORM: Final = (
    "give a list of variables, each a list of pieces, each a parameter or (parameter, first row, row behind the last)"
)


def keys_of(groups: list[Group], given: Any) -> list[tuple[SavedPiece, ...] | None]:
    """What each group is to hold for `norm_variables`.

    Raises:
        TypeError, ValueError: it has another form, or is of parameters that are in no group.
    """
    if given is None:
        return [None] * len(groups)
    places = {
        id(param): (group_index, index)
        for group_index, group in reversed(list(enumerate(groups)))
        for index, param in reversed(list(enumerate(group["params"])))
    }
    keys: list[list[SavedPiece]] = [[] for _ in groups]
    for number, pieces in enumerate(_listed(given, "norm_variables")):
        for piece in _listed(pieces, f"norm_variables[{number}]"):
            param, *rows = (piece,) if isinstance(piece, Tensor) else _listed(piece, f"norm_variables[{number}]")
            if not isinstance(param, Tensor) or len(rows) not in (0, 2):
                raise TypeError(f"a piece in norm_variables[{number}] is {piece!r}; {_FORM}")
            if id(param) not in places:
                raise ValueError(
                    f"norm_variables[{number}] has a tensor of shape {tuple(param.shape)} that is no parameter of this "
                    "optimizer; pass it to the constructor or to add_param_group before"
                )
            group_index, index = places[id(param)]
            _check_param(partial(validation.name_in, groups, group_index, index), param)
            keys[group_index].append((number, index, *(rows or (0, _rows_of(param)))))
    return [tuple(key) or None for key in keys]


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, Tensor | str | dict) or not isinstance(value, Iterable):
        raise TypeError(f"{what} is {value!r}; {_FORM}")
    found = list(value)
    if not found and what != KEY:
        raise ValueError(f"{what} has no pieces; leave it out")
    return found


def given_in(groups: list[Group]) -> list[list[tuple[Tensor, int, int]]] | None:
    """The variables that `keys_of` was given, or None if there are none."""
    if not any_in(groups):
        return None
    variables: dict[int, list[tuple[Tensor, int, int]]] = {}
    for piece in sorted(_pieces(groups)):
        param = groups[piece.group]["params"][piece.place]
        variables.setdefault(piece.variable, []).append((param, piece.first, piece.end))
    return [variables[number] for number in sorted(variables)]


def _pieces(groups: list[Group]) -> list[Piece]:
    return [
        Piece(number, index, first, end, variable)
        for number, group in enumerate(groups)
        for variable, index, first, end in group.get(KEY) or ()
    ]


def set_in(groups: list[Group], given: Any, is_part: bool) -> None:
    """Has groups hold what `keys_of` makes of `given`; raises what that and `check` raise, and then changes nothing."""
    trial = [{**group, KEY: key} for group, key in zip(groups, keys_of(groups, given), strict=True)]
    for group, key in zip(groups, check(trial, is_part), strict=True):
        group[KEY] = key


def canonicalize(groups: list[Group], is_part: bool) -> None:
    """Brings what groups hold to the form in which it is kept: a checkpoint may have made lists of tuples.

    Raises what `check` raises, and then changes nothing.
    """
    for group, key in zip(groups, check(groups, is_part), strict=True):
        if KEY in group:
            group[KEY] = key


# ---- Checks ---------------------------------------------------------------------------------------------------------


def check(groups: list[Group], is_part: bool) -> list[tuple[SavedPiece, ...] | None]:
    """The pieces of each group, in the form in which they are kept. Writes nothing.

    Raises TypeError or ValueError, naming the parameter, if they cannot have norms.

    Args:
        groups: those of the optimizer.
        is_part: whether other processes have other parameters.
    """
    keys: list[tuple[SavedPiece, ...] | None] = []
    for group_index, group in enumerate(groups):
        keys.append(None)
        saved = group.get(KEY)
        if not saved:
            continue
        if is_part:
            raise ValueError(
                "norm_variables is for an optimizer that has all parameters: not for norm_group, nor for "
                "ZeroRedundancyOptimizer. Set optimizer.norm_variables to None to clip each parameter by itself"
            )
        name_in = partial(validation.name_in, groups, group_index)
        canonical = tuple(sorted(_checked(piece, group, group_index) for piece in saved))
        of_param: dict[int, list[SavedPiece]] = {}
        for piece in canonical:
            of_param.setdefault(piece[1], []).append(piece)
        for index, pieces in of_param.items():
            param = group["params"][index]
            _check_param(partial(name_in, index), param)
            if sum(other is param for other in group["params"]) > 1:
                raise ValueError(f"{name_in(index)} is listed twice in its group; norm_variables takes it once")
            _check_rows(partial(name_in, index), param, sorted(piece[2:] for piece in pieces))
        keys[-1] = canonical
    return keys


def _checked(piece: Any, group: Group, group_index: int) -> SavedPiece:
    numbers = tuple(piece) if isinstance(piece, tuple | list) else ()
    if len(numbers) != 4 or any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise TypeError(
            f"group {group_index} has {piece!r} among its norm_variables, which is no piece: numbers of a variable, a "
            "parameter and its rows. Set optimizer.norm_variables"
        )
    if not 0 <= numbers[1] < len(group["params"]):
        raise ValueError(
            f"group {group_index} has {len(group['params'])} parameters, and norm_variables for its parameter "
            f"{numbers[1]}. Set optimizer.norm_variables"
        )
    return numbers


def _check_param(name: Callable[[], str], param: Tensor) -> None:
    if dtensor.is_dtensor(param):
        raise ValueError(f"{name()} is a DTensor, whose rows are elsewhere; leave it out of norm_variables")
    if is_lazy(param):
        raise ValueError(f"{name()} has no shape yet; materialise it before it is in norm_variables")


def _check_rows(name: Callable[[], str], param: Tensor, rows: Sequence[tuple[int, ...]]) -> None:
    count = _rows_of(param)
    for first, end in rows:
        if not 0 <= first < end <= count:
            raise ValueError(
                f"{name()} has {count} rows, and norm_variables the rows [{first}, {end}) of it; give rows that it has"
            )
    for (first, end), (after, last) in pairwise(rows):
        if after < end:
            raise ValueError(
                f"{name()} has the rows [{first}, {end}) and [{after}, {last}) in norm_variables, which overlap; give "
                "each row once"
            )
    if rows[0] != (0, count):
        _check_can_be_split(name, "it", param)


def _check_can_be_split(name: Callable[[], str], what: str, tensor: Tensor) -> None:
    """Raises ValueError if the rows of a tensor lie between each other, which the kernels take for shared memory."""
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    extent = 1 + sum(stride * (size - 1) for size, stride in zip(sizes, strides, strict=True))
    if tensor.numel() and tensor.stride(0) < extent:
        raise ValueError(
            f"{name()}: {what} has rows that lie between each other in memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}), and norm_variables splits them. Use .contiguous()"
        )


# ---- The step -------------------------------------------------------------------------------------------------------


def _by_param(groups: list[Group]) -> dict[int, list[Piece]]:
    """All pieces of each parameter that has some, by its id. The rows that are left are a variable of their own."""
    found: dict[int, list[Piece]] = {}
    for piece in sorted(_pieces(groups)):
        found.setdefault(id(groups[piece.group]["params"][piece.place]), []).append(piece)
    for key, pieces in found.items():
        group, index = pieces[0][:2]
        ends = [0, *(piece.end for piece in pieces)]
        firsts = [*(piece.first for piece in pieces), _rows_of(groups[group]["params"][index])]
        gaps = [(end, first) for end, first in zip(ends, firsts, strict=True) if end < first]
        found[key] = sorted([*pieces, *(Piece(group, index, *gap, ("rest", group, index)) for gap in gaps)], key=_rows)
    return found


def _rows(piece: Piece) -> tuple[int, int, int]:
    return piece.group, piece.place, piece.first


def split(
    batches: list[Batch], groups: list[Group], name_of: validation.NameOf
) -> tuple[list[Batch], Callable[[list[Tensor]], list[Tensor]]]:
    """The batches with pieces in the place of parameters; and what makes of their sums of squares those of variables.

    Raises:
        RuntimeError, ValueError: a gradient or a state, of a parameter that has pieces, does not fit or has no rows.
    """
    pieces = _by_param(groups)
    places: dict[Any, list[tuple[tuple[int, int, int], int, int]]] = {}
    result = []
    for number, batch in enumerate(batches):
        rows: list[tuple[int, Piece | None]] = []
        for row, param in enumerate(batch.owners[0]):
            own = pieces.get(id(param), ())
            if own:
                _check_row(batch, row, len(own) > 1, name_of)
            for piece in own:
                places.setdefault(piece.variable, []).append((_rows(piece), number, len(rows)))
                rows.append((row, piece if len(own) > 1 else None))
            if not own:
                rows.append((row, None))
        result.append(batch if len(rows) == len(batch.params) else _batch_of_pieces(batch, rows))
    joint = [[place[1:] for place in sorted(where)] for where in places.values() if len(where) > 1]
    return result, partial(_add_up, joint)


def _check_row(batch: Batch, row: int, is_split: bool, name_of: validation.NameOf) -> None:
    own = Row(*(column[row] for column in batch.owners))
    name = partial(name_of, own.param)
    state_dtype = batch.segment_of_rows[row].state_dtype_of(own.param)
    validation.check_row(name, own, state_dtype, batch.is_differentiable)
    if functional.is_sparse(own.grad):
        raise RuntimeError(
            f"{name()} has a sparse gradient, which norm_variables has no norm for. Use .to_dense(), or leave it out"
        )
    if is_split:
        for what, tensor in own._asdict().items():
            if tensor is not None and what != "grad":
                _check_can_be_split(name, "it" if what == "param" else f"its {what}", tensor)


def _batch_of_pieces(batch: Batch, rows: list[tuple[int, Piece | None]]) -> Batch:
    """A batch of pieces. The library's cache holds whole accumulators, and is not for them."""
    with recording(batch.is_differentiable):
        params, grads, square_avgs, acc_deltas, remainders = (
            [column[row] if piece is None else piece.of(column[row]) for row, piece in rows] if column else []
            for column in (batch.params, batch.grads, batch.square_avgs, batch.acc_deltas, batch.remainders)
        )
    owners: Any = tuple([column[row] for row, _ in rows] for column in batch.owners)
    ends = list(accumulate(segment.size for segment in batch.segments))
    repeats = [0] * len(batch.params)
    for row, _ in rows:
        repeats[row] += 1
    counts = [sum(repeats[begin:end]) for begin, end in pairwise(chain([0], ends))]
    segments = [segment._replace(size=count) for segment, count in zip(batch.segments, counts, strict=True)]
    return replace(
        batch,
        params=params,
        grads=grads,
        square_avgs=square_avgs,
        acc_deltas=acc_deltas,
        remainders=remainders,
        segments=segments,
        gradient_order=None,
        accumulators=None,
        wholes=owners,
    )


def _add_up(joint: list[list[tuple[int, int]]], square_sums: list[Tensor]) -> list[Tensor]:
    """The sums of squares of whole variables, in the place of those of their pieces, which are added in their order."""
    result = list(square_sums)
    for number in {number for places in joint for number, _ in places}:
        result[number] = square_sums[number].clone()
    for places in joint:
        # One device for all: not the CPU if there is another, for that would wait for the other.
        devices = [square_sums[number].device for number, _ in places]
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        first, *others = (moved(square_sums[number][row], device) for number, row in places)
        total = first
        for other in others:
            total = total + other
        for number, row in places:
            result[number][row] = moved(total, result[number].device)
    return result
