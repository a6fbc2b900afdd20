"""From the parameters of a group to buckets, each of which one call updates, and how their gradients are clipped."""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from operator import attrgetter, itemgetter
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta import gradients, hyperparameters, ops, shards, sparse
from torch_adadelta import update as updates
from torch_adadelta.arithmetic import arithmetic_dtype, arithmetic_dtypes
from torch_adadelta.signature import Lists, Update

# Parameters of one group that one call updates: the group, the call, the parameters with their gradients and state, and
# the hyperparameters of this step. A plain tuple, for a step of one small tensor is made of such small things.
Bucket = tuple[dict[str, Any], Update, Lists, hyperparameters.StepValues]

NO_CLIP: Final[dict[str, Any]] = {}

_FUSED: Final = (updates.fused, updates.ON_SHARDS[updates.fused])
_FOREACH: Final = (updates.foreach, updates.ON_SHARDS[updates.foreach])
_ON_SHARDS: Final = tuple(updates.ON_SHARDS.values())
_WHOLE: Final = {on_shards: update for update, on_shards in updates.ON_SHARDS.items()}


def choose(group: dict[str, Any], params: list[Tensor]) -> Update:
    return updates.choose(params, group["foreach"], group["fused"], group["differentiable"])


def split(
    group: dict[str, Any], lists: Lists, values: hyperparameters.StepValues, may_be_mixed: bool
) -> Iterable[Bucket]:
    """Splits the parameters of a group by device, by the layout of the gradient and, where needed, by dtype.

    Without `may_be_mixed`, a group that the fused update can take by its first parameter is taken to be on one device,
    and its gradients to be dense; the update refuses it if it is not so.
    """
    params = lists[0]
    # Not through choose: every step of every group passes here, and each call counts.
    choice = updates.choose(params, group["foreach"], group["fused"], group["differentiable"])
    if choice is updates.fused and not may_be_mixed:
        return ((group, updates.fused, lists, values),)
    buckets: list[Bucket] = []
    for on_device in by_device(params).values():
        update = choose(group, [params[i] for i in on_device])
        # In runs, for a parameter may be listed twice, and have a gradient of each kind.
        for is_sparse, run in itertools.groupby(on_device, lambda i: sparse.is_sparse(lists[1][i])):
            if is_sparse or update in _FUSED:
                parts = [list(run)]
            else:
                by_kind: dict[Any, list[int]] = {}
                for i in run:
                    # Under autograd DTensors do not mix with others.
                    apart = update not in _ON_SHARDS and shards.is_dtensor(params[i])
                    by_kind.setdefault((params[i].dtype if update in _FOREACH else None, apart), []).append(i)
                parts = list(by_kind.values())
            for part in parts:
                selected: Any = tuple([tensors[i] for i in part] for tensors in lists)
                if is_sparse:
                    buckets.append((group, sparse.counterpart(_WHOLE.get(update, update)), selected, values))
                    continue
                if update in _ON_SHARDS:
                    selected = (selected[0], list(map(shards.aligned, *selected[:2])), *selected[2:])
                buckets.append((group, update, selected, values))
    return buckets


def _indices_by(key: Callable[[Tensor], Any], params: Iterable[Tensor]) -> dict[Any, list[int]]:
    indices: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        indices.setdefault(key(param), []).append(index)
    return indices


def by_device(params: list[Tensor]) -> dict[torch.device, list[int]]:
    """The indices of the parameters on each device."""
    return _indices_by(attrgetter("device"), params)


def by_T(params: list[Tensor]) -> dict[torch.dtype, list[int]]:
    """The indices of the parameters of each arithmetic type."""
    types = arithmetic_dtypes(params)
    if len(types) == 1:  # as of most groups
        return {types.pop(): list(range(len(params)))}
    return _indices_by(lambda param: arithmetic_dtype(param.dtype), params)


# ---- Clipping -------------------------------------------------------------------------------------------------------


def clip_keywords(
    buckets: list[Bucket],
    numbers: list[list[int]],
    options: dict[str, Any],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    over_parts: Callable[[list[list[Tensor]], list[Tensor]], list[Tensor]] | None = None,
    over_processes: Callable[[Tensor], Tensor] | None = None,
    in_double: bool = False,
) -> list[dict[str, Any]]:
    """The keywords of `gradients.clip` for each bucket, whose gradients have these numbers among all of the step.

    With `grad_scale` and `found_inf` those of a fused update, which unscales the gradients or skips all of them.
    Norms of parameters that are shared out go through `over_parts`, the sum over all gradients through
    `over_processes`; `in_double` if one of them, here or elsewhere, is taken in float64.
    """
    clipvalue, clipnorm, global_clipnorm = (options[key] for key in ("clipvalue", "clipnorm", "global_clipnorm"))
    in_common: dict[str, Any] = {} if clipvalue is None else {"clipvalue": float(clipvalue)}
    keywords = [{**in_common, **_amp_keywords(bucket, grad_scale, found_inf)} for bucket in buckets]
    if clipnorm is not None:
        sums = [_square_sums(bucket, own, False) for bucket, own in zip(buckets, keywords, strict=True)]
        if over_parts is not None:
            sums = over_parts([_shared_out(bucket) for bucket in buckets], sums)
        for square_sums, own in zip(sums, keywords, strict=True):
            own |= {"clipnorm": float(clipnorm), "square_sums": square_sums}
    elif global_clipnorm is not None:
        factors = _global_factors(
            buckets, numbers, keywords, float(global_clipnorm), over_parts, over_processes, in_double
        )
        for factor, own in zip(factors, keywords, strict=True):
            own["factor"] = factor
    return keywords


def _shared_out(bucket: Bucket) -> list[Tensor]:
    """The parameters of a bucket, if its norms are those of the parts that this process has."""
    return bucket[2][0] if bucket[1] in _ON_SHARDS else []


def _amp_keywords(bucket: Bucket, grad_scale: Tensor | None, found_inf: Tensor | None) -> dict[str, Any]:
    named = (("grad_scale", grad_scale), ("found_inf", found_inf))
    given = {name: tensor for name, tensor in named if tensor is not None}
    if given and bucket[1] not in (*_FUSED, sparse.fused):
        raise RuntimeError(f"{' and '.join(given)} need the fused update; pass fused=True")
    device = bucket[2][0][0].device
    return {name: _moved(tensor, device).float() for name, tensor in given.items()}


def _global_factors(
    buckets: list[Bucket],
    numbers: list[list[int]],
    keywords: list[dict[str, Any]],
    global_clipnorm: float,
    over_parts: Callable[[list[list[Tensor]], list[Tensor]], list[Tensor]] | None,
    over_processes: Callable[[Tensor], Tensor] | None,
    in_double: bool,
) -> list[hyperparameters.Value]:
    """What `global_clipnorm` multiplies the gradients of each bucket by, on its device."""
    types = arithmetic_dtypes(itertools.chain.from_iterable(bucket[2][0] for bucket in buckets))
    T = torch.float64 if in_double or torch.float64 in types else torch.float32
    sums: list[Tensor] = []
    where: list[list[int]] = []
    shared_out: list[list[Tensor]] = []
    for bucket, own, bucket_numbers in zip(buckets, keywords, numbers, strict=True):
        for part, part_keywords, rows in _parts_by_T(bucket, own) if T is torch.float64 else [(bucket, own, None)]:
            sums.append(_square_sums(part, part_keywords, T is torch.float64))
            where.append(bucket_numbers if rows is None else [bucket_numbers[row] for row in rows])
            shared_out.append(_shared_out(part))
    # Under autograd the sums of DTensors are DTensors, which mix with each other and with numbers only.
    are_distributed = any(map(shards.is_dtensor, sums))
    if are_distributed:
        sums = [s.full_tensor() if shards.is_dtensor(s) else s for s in sums]  # type: ignore[attr-defined]
    if over_parts is not None:
        sums = over_parts(shared_out, sums)
    with recording(any(bucket[0]["differentiable"] for bucket in buckets)):
        in_order = _in_order(where, sums)
        if over_processes is not None:
            in_order = over_processes(gradients.pairwise_sum(in_order)).reshape(1)
        factor = gradients.global_factor(global_clipnorm, in_order, T)
    if are_distributed:
        factor = float(factor)
    if not isinstance(factor, Tensor):
        return [factor] * len(buckets)
    return [_moved(factor, bucket[2][0][0].device) for bucket in buckets]


def _parts_by_T(bucket: Bucket, keywords: dict[str, Any]) -> list[tuple[Bucket, dict[str, Any], list[int] | None]]:
    """A bucket whose norms are taken in float64, as one of each T, with the indices of the parameters in it.

    Up to its square a gradient is in the T of its parameter, so what makes a difference in float64 is rounded before.
    """
    group, update, lists, values = bucket
    parts: list[tuple[Bucket, dict[str, Any], list[int] | None]] = []
    for T, indices in by_T(lists[0]).items():
        selected: Any = tuple([column[i] for i in indices] for column in lists)
        own = keywords
        if T is torch.float32:
            params, grads, *states = selected
            own = {name: value for name, value in keywords.items() if name != "grad_scale"}
            if "clipvalue" in own:
                own["clipvalue"] = hyperparameters.round_to_float32(own["clipvalue"])
            scale = keywords.get("grad_scale")
            with recording(group["differentiable"]):
                grads = [
                    gradients.for_callback(param, grad, scale)
                    if scale is not None or arithmetic_dtype(grad.dtype) is torch.float64
                    else grad
                    for param, grad in zip(params, grads, strict=True)
                ]
            selected = (params, grads, *states)
        parts.append(((group, update, selected, values), own, indices))
    return parts


def _in_order(numbers: list[list[int]], sums: list[Tensor]) -> Tensor:
    """The sums of all gradients in the order of their numbers, as one tensor."""
    # One device for all: not the CPU if there is another, for that would wait for the other.
    device = next((s.device for s in sums if s.device.type != "cpu"), torch.device("cpu"))
    pieces: list[tuple[int, Tensor]] = []
    for numbers_here, sums_here in zip(numbers, sums, strict=True):
        moved = _moved(sums_here, device)
        pieces += [(numbers_here[begin], moved[begin:end]) for begin, end in _runs(numbers_here)]
    if len(pieces) == 1:
        return pieces[0][1]
    pieces.sort(key=itemgetter(0))
    return torch.cat([torch.empty(0, dtype=torch.float64, device=device), *(piece for _, piece in pieces)])


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # The CPU would read what has not arrived yet.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _square_sums(bucket: Bucket, keywords: dict[str, Any], in_double: bool) -> Tensor:
    group, update, (params, grads, _, _), _ = bucket
    before = {name: keywords[name] for name in ("clipvalue", "grad_scale") if name in keywords}
    if update in sparse.UPDATES:
        params = grads = sparse.values_in_T(params, grads)
    if update in _ON_SHARDS:
        params, grads = ([shards.local(tensor) for tensor in tensors] for tensors in (params, grads))
    if update in (*_FUSED, sparse.fused):
        return ops.grad_square_sums(params, grads, in_double=in_double, **before)
    with recording(group["differentiable"]):
        return gradients.square_sums(params, grads, in_double=in_double, **before)


def recording(is_differentiable: bool) -> contextlib.AbstractContextManager[Any]:
    """Lets autograd record what a differentiable step computes before its updates."""
    return torch.enable_grad() if is_differentiable else contextlib.nullcontext()


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Where consecutive numbers begin and end in a list."""
    begin = numbers[0] if numbers else 0
    if numbers == list(range(begin, begin + len(numbers))):  # as of most steps
        return [(0, len(numbers))]
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(numbers)], strict=True))
