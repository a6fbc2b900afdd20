"""Every check that names a parameter: what can be trained, what gradient, state and memory it may have."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, functional, kernels
from torch_adadelta.backends.batch import STATE_KEYS, Backend, Batch, Refusal
from torch_adadelta.backends.opmath import wide_dtype
from torch_adadelta.options import HYPERPARAMETERS, is_zero
from torch_adadelta.step.selection import PLAIN_TYPES, is_lazy
from torch_adadelta.step.sources import Group, is_capturing

_REAL_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES: Final = frozenset((*_REAL_DTYPES, torch.complex32, torch.complex64, torch.complex128))

# How errors call a parameter.
NameOf = Callable[[Tensor], str]

# A parameter, its gradient, dense or sparse, square_avg and acc_delta.
Row = tuple[Tensor, Tensor, Tensor, Tensor]


# ---- Names ----------------------------------------------------------------------------------------------------------


def name_in(groups: list[Group], group_index: int, index: int) -> str:
    """What errors call parameter `index` of a group."""
    names = groups[group_index].get("param_names")
    return f"parameter {index} of group {group_index}" + (f" ({names[index]!r})" if names else "")


def name_of(groups: list[Group], param: Tensor) -> str:
    """What errors call a parameter.

    Raises:
        KeyError: it is in none of the groups.
    """
    for group_index, group in enumerate(groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is param:
                return name_in(groups, group_index, index)
    raise KeyError(param)


# ---- Param groups ---------------------------------------------------------------------------------------------------


def check_not_complex(groups: list[Group], first: int = 0) -> None:
    """Raises ValueError, naming the parameter, if complex numbers are to be clipped by value."""
    for group_index, group in enumerate(groups[first:], first):
        if group["clipvalue"] is None:
            continue
        for index, param in enumerate(group["params"]):
            if param.dtype.is_complex:
                raise ValueError(
                    f"{name_in(groups, group_index, index)} has dtype {param.dtype}, and "
                    f"clipvalue={group['clipvalue']!r} is for real numbers; use clipnorm or global_clipnorm"
                )


def check_param(name: Callable[[], str], param: Tensor) -> None:
    """Raises TypeError or ValueError, naming the parameter, if it is one that cannot be trained here."""
    if param.dtype not in DTYPES:
        raise TypeError(
            f"{name()} has dtype {param.dtype}; Adadelta trains floating-point and complex parameters. Leave it out, "
            "as in (p for p in model.parameters() if p.requires_grad)"
        )
    if is_lazy(param):
        return
    if param.layout is not torch.strided:
        raise ValueError(f"{name()} has layout {param.layout}; only dense parameters can be trained. Use .to_dense()")
    if param.is_conj() or param.is_neg():
        raise ValueError(f"{name()} is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()")
    if functional.overlaps_itself(param):
        raise ValueError(
            f"{name()} overlaps itself in memory (shape {tuple(param.shape)}, strides {param.stride()}), as an "
            "expanded tensor does. Use .contiguous()"
        )


# ---- Gradients and state --------------------------------------------------------------------------------------------

# How to convert the state after the parameters were converted.
_CONVERT: Final = (
    "Convert the state too:\n"
    "    for param, state in optimizer.state.items():\n"
    "        state.update({key: state[key].to(param.dtype) for key in ('square_avg', 'acc_delta') if key in state})"
)


def check_gradient(name: Callable[[], str], param: Tensor, grad: Tensor) -> None:
    """Raises RuntimeError, naming the parameter, unless the gradient fits it."""
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise RuntimeError(
            f"{name()} has a gradient of layout {grad.layout}; only dense and torch.sparse_coo gradients can be "
            "applied. Use .to_sparse_coo()"
        )
    _check_tensor(name, param, "gradient", grad)


def _check_tensor(name: Callable[[], str], param: Tensor, kind: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"{name()}: its {kind} is {tensor!r}, not a Tensor. Delete optimizer.state[param]")
    if tensor.shape != param.shape:
        raise RuntimeError(f"{name()} has shape {tuple(param.shape)}, but its {kind} has shape {tuple(tensor.shape)}")
    if dtensor.is_dtensor(tensor) != dtensor.is_dtensor(param):
        what = type(param.data).__name__
        raise RuntimeError(
            f"{name()} is a {what}, but its {kind} is a {type(tensor.data).__name__}. Distribute both alike"
        )
    if tensor.device != param.device:
        raise RuntimeError(f"{name()} is on {param.device}, but its {kind} is on {tensor.device}. Move it there")
    if tensor.is_complex() != param.is_complex() or tensor.dtype not in DTYPES:
        raise RuntimeError(f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}")


def _check_form(name: Callable[[], str], param: Tensor, kind: str, tensor: Tensor) -> None:
    if not dtensor.is_distributed_alike(param, tensor):
        raise RuntimeError(f"{name()} and its {kind} are distributed in different ways. Use .redistribute()")
    if tensor.layout is not torch.strided or functional.overlaps_itself(tensor):
        raise RuntimeError(f"{name()}: its {kind} is not a dense tensor of its own memory. Use .contiguous()")
    if tensor.is_conj() or tensor.is_neg():
        raise RuntimeError(
            f"{name()}: its {kind} is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()"
        )


def check_row(name: Callable[[], str], row: tuple[Any, ...], is_differentiable: bool) -> None:
    """Raises RuntimeError, naming the parameter, unless it, its gradient and its state can be updated together."""
    param, grad, *state = row
    check_param(name, param)
    if is_differentiable and param.is_leaf and param.requires_grad:
        raise RuntimeError(f"{name()} is a leaf that requires grad: with differentiable=True pass a clone of it")
    check_gradient(name, param, grad)
    if is_differentiable and functional.is_sparse(grad):
        raise RuntimeError(
            f"{name()} has a sparse gradient, which autograd cannot follow: with differentiable=True use .to_dense()"
        )
    for kind, tensor in zip(("state square_avg", "state acc_delta"), state, strict=False):
        _check_tensor(name, param, kind, tensor)
        if tensor.dtype != param.dtype:
            raise RuntimeError(f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}. {_CONVERT}")
        _check_form(name, param, kind, tensor)
    for average in state[2:]:
        check_wide_state(name, param, "average", average)
    if not PLAIN_TYPES.issuperset(map(type, row)):
        return
    for tensor in (param, *state):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name()} or its state was made in inference mode, outside which it cannot be updated")


def _check_rows(batch: Batch, names: NameOf) -> None:
    for row in zip(*batch.owners, strict=True):
        check_row(partial(names, row[0]), row, batch.is_differentiable)


def raise_named(batch: Batch, refusal: Refusal, names: NameOf) -> NoReturn:
    """Raises what the compiled op refused a batch for, in the words of this module where it has them."""
    _check_rows(batch, names)
    check_memory([batch], names)
    name = "" if refusal.param is None else f"{names(batch.owners[0][refusal.param])}: "
    raise RuntimeError(f"{name}{refusal.message}")


def check_keys(name: Callable[[], str], state: Any) -> None:
    """Raises RuntimeError, naming the parameter, if a part of its state is missing."""
    if not isinstance(state, dict) or not state.keys() >= set(STATE_KEYS):
        raise RuntimeError(
            f"{name()}: its state holds {sorted(state)}, not square_avg and acc_delta; delete optimizer.state[param] "
            "to begin anew"
        )


def check_state(name: Callable[[], str], *row: Any) -> None:
    """Raises, naming the parameter, what no backend sees: state that is no Tensor, lazy views, DTensors beside others.

    Args:
        name: how errors call the parameter.
        row: the parameter, its gradient, and its state.
    """
    param, _, *state = row
    if not all(isinstance(tensor, Tensor) for tensor in state) or dtensor.has_dtensor(row):
        check_row(name, row, is_differentiable=False)
    if any(tensor.is_conj() or tensor.is_neg() for tensor in (param, *state)):
        check_row(name, row, is_differentiable=False)


def check_wide_state(name: Callable[[], str], param: Tensor, key: str, tensor: Any) -> None:
    """Raises RuntimeError, naming the parameter, unless this is state of its shape in the opmath dtype."""
    kind, dtype = f"state {key}", wide_dtype(param)
    _check_tensor(name, param, kind, tensor)
    if tensor.dtype != dtype:
        raise RuntimeError(
            f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}, not {dtype}. Convert it: "
            f"state[{key!r}] = state[{key!r}].to({dtype})"
        )
    _check_form(name, param, kind, tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name()}: its {kind} was made in inference mode, outside which it cannot be updated")


def check_sums(params: list[Tensor], grads: list[Tensor], names: NameOf) -> None:
    """Raises, naming the parameter, unless all gradients can be added to sums."""
    for param, grad in zip(params, grads, strict=True):
        name = partial(names, param)
        check_param(name, param)
        check_gradient(name, param, grad)
    sparse = [row for row in zip(params, grads, strict=True) if functional.is_sparse(row[1])]
    if sparse:
        some, some_grads = map(list, zip(*sparse, strict=True))
        _check_indices([Batch(Backend.SINGLE_TENSOR, True, False, some, some_grads, [], [], [])], names)


def check_batches(batches: list[Batch], names: NameOf) -> tuple[Batch, Refusal] | None:
    """Raises, naming the parameter, unless all batches can be updated; or returns what an op refused.

    The first batch, if an op takes it that checks itself before it writes, is left to that.
    """
    in_python = [batch for batch in batches if batch.backend is not Backend.FUSED]
    for batch in in_python:
        _check_rows(batch, names)
    check_memory(in_python, names)
    for batch in batches[1:]:
        if batch.backend is Backend.FUSED and not batch.is_sparse:
            refusal = kernels.update(batch, check_only=True)
            if refusal is not None:
                return batch, refusal
    sparse = [batch for batch in batches if batch.is_sparse]
    _check_decay(sparse, names)
    return _check_indices(sparse, names)


def _check_decay(batches: list[Batch], names: NameOf) -> None:
    """Raises RuntimeError, naming the parameter, if weight decay is to be added to a sparse gradient."""
    for batch in batches:
        segments = [segment for segment in batch.segments for _ in range(segment.size)]
        for param, segment in zip(batch.params, segments, strict=True):
            if not segment.is_decoupled and not is_zero(segment.weight_decay):
                raise RuntimeError(
                    f"{names(param)} has a sparse gradient, to which decoupled_weight_decay=False cannot add weight "
                    f"decay ({segment.weight_decay}) of the rows that do not occur. Use decoupled_weight_decay=True, "
                    "exclude_from_weight_decay, or .to_dense()"
                )


def _check_indices(batches: list[Batch], names: NameOf) -> tuple[Batch, Refusal] | None:
    """Raises IndexError, naming parameter, position and value, unless all sparse gradients are of rows that there are.

    Reads what it found on each device at once, which on CUDA is the one time that a step waits for the device.
    """
    on_device: dict[torch.device, list[tuple[Batch, Tensor]]] = {}
    for batch in batches:
        if torch.version.cuda is not None and is_capturing():
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but {names(batch.params[0])} has a sparse gradient, whose "
                "indices the host must check. Use sparse=False in the layer that made it, or .to_dense()"
            )
        is_fused = batch.backend is Backend.FUSED
        found = kernels.first_invalid_indices(batch) if is_fused else functional.first_invalid_indices(batch)
        if isinstance(found, Refusal):
            return batch, found
        on_device.setdefault(found.device, []).append((batch, found))
    for same in on_device.values():
        rows = [row for batch, _ in same for row in zip(batch.params, batch.grads, strict=True)]
        positions = torch.cat([found for _, found in same]).tolist()
        for (param, grad), position in zip(rows, positions, strict=True):
            if position >= 0:
                raise IndexError(f"{names(param)} {_describe_index(param, grad, position)}")
    return None


def _describe_index(param: Tensor, grad: Tensor, position: int) -> str:
    index = tuple(grad._indices()[:, position].tolist())
    what = f"{param.shape[0]} rows" if len(index) == 1 else f"shape {tuple(param.shape)}"
    value = index[0] if len(index) == 1 else index
    return f"has {what}, but its sparse gradient has the index {value} at position {position}"


def check_capture(groups: list[Group], batches: list[Batch], new_state: Iterable[Tensor], names: NameOf) -> None:
    """Raises if what a CUDA graph captures of this step would do something else when it is replayed."""
    who = "step() is being captured in a CUDA graph, but"
    for index, group in enumerate(groups):
        for option in HYPERPARAMETERS:
            if isinstance(group[option.key], Tensor) and group[option.key].device.type == "cpu":
                raise RuntimeError(
                    f"{who} {option.name} of group {index} is a Tensor on the CPU, of which a graph keeps the number "
                    "that it holds now. Give a Tensor on the device, or a number"
                )
        if not group["capturable"]:
            raise RuntimeError(
                f"{who} group {index} has capturable=False, so iterations would stand still when it is replayed. Pass "
                "capturable=True"
            )
    for param in new_state:
        raise RuntimeError(
            f"{who} {names(param)} has no state yet, which every replay would reset to zeros. Take a step before the "
            "capture"
        )
    for batch in batches:
        param = batch.owners[0][0]
        if param.device.type == "cpu":
            raise RuntimeError(
                f"{who} {names(param)} is on the CPU, where no replay would update it. Move it to the device, or leave "
                "it to another optimizer"
            )


# ---- Memory ---------------------------------------------------------------------------------------------------------
#
# No tensor that is written to, a parameter or its state, shares memory with another or with a gradient. Two rows may be
# the same parameter and state, as of one that is listed twice: they are updated one after the other. The compiled ops
# check the same in csrc/aliasing.h.

# The device's index, where the memory of a tensor with elements begins and ends, and _KINDS * the number of its row +
# the number of the tensor in it.
Range = tuple[int, int, int, int]

_PARAM, _GRADIENT, _WRITTEN = 0, 1, (0, 2, 3, 4)
_OWN: Final = ("it", "its gradient", "its state square_avg", "its state acc_delta", "its state average")
_OF_ANOTHER: Final = ("", *(f"the {what.removeprefix('its ')} of " for what in _OWN[1:]))
_KINDS: Final = len(_OWN)


def check_memory(batches: list[Batch], names: NameOf) -> None:
    """Raises RuntimeError, naming the parameters, unless the memory that these batches write to is their own."""
    rows = [row for batch in batches for row in zip(*batch.owners, strict=True)]
    check_apart([row for row in rows if PLAIN_TYPES.issuperset(map(type, row))], names)


def memory_range(tensor: Tensor, number: int) -> Range:
    """What `tensor`, which has elements, takes."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():  # most are
        return tensor.get_device(), begin, begin + tensor.nbytes, number
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.get_device(), begin, begin + (last + 1) * tensor.element_size(), number


def is_listed_twice(params: list[Tensor]) -> bool:
    """Whether a parameter is listed twice, and must be updated one time after the other.

    A multi-tensor operation would run each parameter's first half before any second half.
    """
    places = [param.data_ptr() for param in params if param.numel() > 0]
    return len(set(places)) < len(places)


def _overlapping(ranges: list[Range]) -> Iterator[tuple[int, int]]:
    """The numbers of sorted ranges that overlap the next one."""
    return ((x[3], y[3]) for x, y in itertools.pairwise(ranges) if x[0] == y[0] and y[1] < x[2])


def check_apart(rows: list[Row], names: NameOf) -> None:
    """Raises RuntimeError, naming the parameters, if rows of plain tensors share memory that they must not."""
    ranges = []
    numbered = (_KINDS * row + kind for row, tensors in enumerate(rows) for kind in range(len(tensors)))
    for number, tensor in zip(numbered, itertools.chain.from_iterable(rows), strict=True):
        if functional.is_sparse(tensor):
            tensor = tensor._values()
        if tensor.numel() > 0 and not tensor.is_meta:
            ranges.append(memory_range(tensor, number))
    ranges.sort()
    if next(_overlapping(ranges), None) is None:
        return
    memory = {this[3]: this[:3] for this in ranges}
    first_row: dict[tuple[Any, ...], int] = {}  # of each parameter, by all memory of it that is written to
    owner = [
        first_row.setdefault(tuple(memory.get(_KINDS * row + kind) for kind in _WRITTEN), row)
        for row in range(len(rows))
    ]
    written = [
        this for this in ranges if this[3] % _KINDS in _WRITTEN and owner[this[3] // _KINDS] == this[3] // _KINDS
    ]
    shared = [tuple(sorted(pair)) for pair in _overlapping(written)]
    for device, begin, end, number in ranges if not shared else ():
        place = bisect.bisect_left(written, (device, end)) - 1
        if number % _KINDS == _GRADIENT and place >= 0 and written[place][0] == device and begin < written[place][2]:
            shared.append((number, written[place][3]))  # the gradient first, for it is the one to be copied
    if not shared:
        return
    (row, kind), (other, other_kind) = (divmod(number, _KINDS) for number in min(shared))
    if owner[row] == other:
        kind, other_kind = sorted((kind, other_kind))
        what = _OWN[other_kind]
    else:
        what = f"{_OF_ANOTHER[other_kind]}{names(rows[other][_PARAM])}"
    raise RuntimeError(f"{names(rows[row][_PARAM])}: {_OWN[kind]} and {what} share memory. Use .clone()")
