"""Every check that names a parameter: what can be trained, what gradient, state and memory it may have."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from torch_adadelta.backends import dtensor, functional, kernels, masters
from torch_adadelta.backends.batch import STATE_KEYS, Backend, Batch, Refusal, Row, Segment
from torch_adadelta.backends.opmath import wide_dtype
from torch_adadelta.options import HYPERPARAMETERS, is_zero
from torch_adadelta.step.selection import PLAIN_TYPES, is_lazy
from torch_adadelta.step.sources import Group, is_capturing

_REAL_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_COMPLEX_DTYPES: Final = (torch.complex32, torch.complex64, torch.complex128)
DTYPES: Final = frozenset((*_REAL_DTYPES, *_COMPLEX_DTYPES))

# How errors call a parameter.
NameOf = Callable[[Tensor], str]


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


# For each option the dtypes of parameters that it is not for, and why.
_UNSUITABLE: Final = {
    "clipvalue": (_COMPLEX_DTYPES, "is for real numbers; use clipnorm or global_clipnorm"),
    "master_weights": (
        (torch.float16, *_COMPLEX_DTYPES),
        "is for bfloat16 parameters (those of float32 and float64 are their own masters); use .to(torch.bfloat16), or "
        "give it a param group with master_weights=False",
    ),
    "state_dtype": (
        (torch.float64, *_COMPLEX_DTYPES),
        "is for real parameters of 16 and 32 bits; give it a param group with state_dtype=None",
    ),
}


def check_dtypes(groups: list[Group], first: int = 0) -> None:
    """Raises ValueError, naming the parameter, if an option of its group is not for its dtype."""
    for group_index, group in enumerate(groups[first:], first):
        for key, (unsuitable, why) in _UNSUITABLE.items():
            if group[key] is None or group[key] is False:
                continue
            for index, param in enumerate(group["params"]):
                if param.dtype in unsuitable:
                    name = name_in(groups, group_index, index)
                    raise ValueError(f"{name} has dtype {param.dtype}, and {key}={group[key]!r} {why}")


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

# How to convert the state after the parameters were converted, or a group was written to.
_CONVERT: Final = (
    "Convert the state too:\n"
    "    for group in optimizer.param_groups:\n"
    "        for param in group['params']:\n"
    "            state = optimizer.state[param]\n"
    "            keys = {'square_avg', 'acc_delta'}.intersection(state)\n"
    "            state.update({key: state[key].to(group['state_dtype'] or param.dtype) for key in keys})"
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
    _check_place(name, param, kind, tensor)
    if tensor.is_complex() != param.is_complex() or tensor.dtype not in DTYPES:
        raise RuntimeError(f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}")


def _check_place(name: Callable[[], str], param: Tensor, kind: str, tensor: Any) -> None:
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


def _check_form(name: Callable[[], str], param: Tensor, kind: str, tensor: Tensor) -> None:
    if not dtensor.is_distributed_alike(param, tensor):
        raise RuntimeError(f"{name()} and its {kind} are distributed in different ways. Use .redistribute()")
    if tensor.layout is not torch.strided or functional.overlaps_itself(tensor):
        raise RuntimeError(f"{name()}: its {kind} is not a dense tensor of its own memory. Use .contiguous()")
    if tensor.is_conj() or tensor.is_neg():
        raise RuntimeError(
            f"{name()}: its {kind} is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()"
        )


def check_row(name: Callable[[], str], row: Row, state_dtype: torch.dtype, is_differentiable: bool = False) -> None:
    """Raises RuntimeError, naming the parameter, unless it, its gradient and its state can be updated together."""
    param, grad, *state = row[:4]
    check_param(name, param)
    if is_differentiable and param.is_leaf and param.requires_grad:
        raise RuntimeError(f"{name()} is a leaf that requires grad: with differentiable=True pass a clone of it")
    check_gradient(name, param, grad)
    if is_differentiable and functional.is_sparse(grad):
        raise RuntimeError(
            f"{name()} has a sparse gradient, which autograd cannot follow: with differentiable=True use .to_dense()"
        )
    for kind, tensor in zip(("state square_avg", "state acc_delta"), state, strict=True):
        _check_tensor(name, param, kind, tensor)
        if tensor.dtype != state_dtype:
            kept = "" if state_dtype == param.dtype else f", and state_dtype={state_dtype}"
            raise RuntimeError(
                f"{name()} has dtype {param.dtype}{kept}, but its {kind} has dtype {tensor.dtype}. {_CONVERT}"
            )
        _check_form(name, param, kind, tensor)
    if row.average is not None:
        check_wide_state(name, param, "average", row.average)
    if row.remainder is not None:
        check_remainder(name, param, row.remainder)
    if not PLAIN_TYPES.issuperset(map(type, (param, grad, *state))):
        return
    for tensor in (param, *state):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name()} or its state was made in inference mode, outside which it cannot be updated")


def _check_rows(batch: Batch, names: NameOf) -> None:
    for segment, row in rows_of(batch):
        check_row(partial(names, row.param), row, segment.state_dtype_of(row.param), batch.is_differentiable)


def rows_of(batch: Batch) -> Iterator[tuple[Segment, Row]]:
    """What the user knows of each parameter of a batch, with its segment."""
    return zip(batch.segment_of_rows, map(Row, *batch.owners), strict=True)


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


def check_state(name: Callable[[], str], row: Row, state_dtype: torch.dtype) -> None:
    """Raises, naming the parameter, what no backend sees: state of no Tensors, lazy views, DTensors beside others."""
    written = row.param, row.square_avg, row.acc_delta
    if not all(isinstance(tensor, Tensor) for tensor in written) or dtensor.has_dtensor(row):
        check_row(name, row, state_dtype)
    if any(tensor.is_conj() or tensor.is_neg() for tensor in written):
        check_row(name, row, state_dtype)


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
    _check_not_inference(name, kind, tensor)


def check_remainder(name: Callable[[], str], param: Tensor, remainder: Any) -> None:
    """Raises RuntimeError, naming the parameter, unless this can be what it lacks of its master."""
    kind = f"state {masters.KEY}"
    if isinstance(remainder, Tensor) and remainder.dtype != masters.DTYPE:
        raise RuntimeError(
            f"{name()}: its {kind} has dtype {remainder.dtype}, not {masters.DTYPE}. Delete it: then the parameter is "
            "its own master"
        )
    _check_place(name, param, kind, remainder)
    _check_form(name, param, kind, remainder)
    _check_not_inference(name, kind, remainder)


def _check_not_inference(name: Callable[[], str], kind: str, tensor: Tensor) -> None:
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
        for param, segment in zip(batch.params, batch.segment_of_rows, strict=True):
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

_GRADIENT, _WRITTEN = 1, (0, 2, 3, 4, 5)
_OWN: Final = ("it", "its gradient", *(f"its state {key}" for key in (*STATE_KEYS, "average", masters.KEY)))
_OF_ANOTHER: Final = ("", *(f"the {what.removeprefix('its ')} of " for what in _OWN[1:]))
_KINDS: Final = len(_OWN)


_PLAIN_OR_NONE: Final = PLAIN_TYPES | {type(None)}


def check_memory(batches: list[Batch], names: NameOf) -> None:
    """Raises RuntimeError, naming the parameters, unless the memory that these batches write to is their own."""
    rows = [Row(*row) for batch in batches for row in zip(*batch.owners, strict=True)]
    check_apart([row for row in rows if _PLAIN_OR_NONE.issuperset(map(type, row))], names)


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
    tensors: Iterator[Tensor | None] = itertools.chain.from_iterable(rows)
    for number, tensor in enumerate(tensors):
        if tensor is None:
            continue
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
        what = f"{_OF_ANOTHER[other_kind]}{names(rows[other].param)}"
    raise RuntimeError(f"{names(rows[row].param)}: {_OWN[kind]} and {what} share memory. Use .clone()")
