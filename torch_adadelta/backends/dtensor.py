"""Parameters of which this process has a part: DTensors, as of FSDP2, and the parameters of other processes under ZeRO.

A DTensor is updated through its local tensor, by the same implementations as any other. Its part of a norm is summed
over the processes that have the other parts; since that order of summation is not the one of a single process, the last
bits of the float64 sum may differ, which are rounded away where the opmath dtype is float32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Any) -> bool:
    """Whether the tensor is a DTensor, without the import of what makes them."""
    return hasattr(tensor, "full_tensor")


def has_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether there is one among them."""
    return any(hasattr(kind, "full_tensor") for kind in set(map(type, tensors)))


def are_alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether in each pair both are DTensors, or none is."""
    types, other_types = list(map(type, some)), list(map(type, others))
    return types == other_types or list(map(is_dtensor, types)) == list(map(is_dtensor, other_types))


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory; autograd does not record it."""
    # A slot of the class: to_local() takes many times longer.
    part: Any = getattr(tensor, "_local_tensor", tensor)
    if type(part) is not Tensor and hasattr(part, "trigger_wait"):  # a collective that may be under way
        part = part.wait()
    return part


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of each tensor."""
    parts: list[Tensor] = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return parts if set(map(type, parts)) <= {Tensor, torch.nn.Parameter} else list(map(local, tensors))


def from_local(param: Any, part: Tensor) -> Tensor:
    """A tensor that has `part` where this process has a part of a parameter."""
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def aligned(params: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
    """The gradients, distributed as their parameters are: tensor parallelism leaves some of them as partial sums."""
    result = []
    for param, grad in zip(params, grads, strict=True):
        if is_dtensor(grad) and not is_distributed_alike(param, grad):
            grad = grad.redistribute(param.device_mesh, param.placements)
        result.append(grad)
    return result


def is_distributed_alike(one: Any, other: Any) -> bool:
    """Whether two tensors are both plain, or have their parts at the same places."""
    ours, theirs = getattr(one, "_spec", None), getattr(other, "_spec", None)
    if ours is None or theirs is None:
        return ours is theirs
    # To compare meshes takes long, and they are mostly one.
    return (ours.mesh is theirs.mesh or ours.mesh == theirs.mesh) and ours.placements == theirs.placements


def _groups(param: Any) -> tuple[Any, ...]:
    """The process groups over which the parts of a DTensor are spread; each element is in one process of them."""
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _members(params: Iterable[Any]) -> dict[tuple[Any, ...], list[Tensor]]:
    """The parameters by the groups that their parts are spread over."""
    alike: dict[Any, list[Tensor]] = {}
    for param in params:
        spec = getattr(param, "_spec", None)
        if spec is not None:
            alike.setdefault((id(spec.mesh), spec.placements), []).append(param)
    members: dict[tuple[Any, ...], list[Tensor]] = {}
    for same in alike.values():  # to ask each parameter takes long, and mostly all are alike
        groups = _groups(same[0])
        if groups:
            members.setdefault(groups, []).extend(same)
    return members


def any_nonzero(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether any element of the gradients is not zero, in any process that has a part of them."""
    is_nonzero = any(bool((grad._values() if grad.is_sparse else local(grad)).any()) for grad in grads)
    for groups in _members(params):
        flag = torch.tensor([float(is_nonzero)], device=local(params[0]).device)
        for group in groups:
            torch.distributed.all_reduce(flag, group=group)
        is_nonzero = bool(flag.item())
    return is_nonzero


def sum_over_parts(
    params: list[list[Tensor]], square_sums: list[Tensor], all_params: list[Tensor], iterations: int | Tensor
) -> list[Tensor]:
    """The sums of squares of whole gradients, from those of the parts that this process has.

    Args:
        params: lists of parameters whose gradients were squared.
        square_sums: for each list a float64 tensor of as many sums.
        all_params: all parameters of the optimizer; every process makes the same calls, gradients or not.
        iterations: the count of this process.

    Raises:
        RuntimeError: in every process, where the sums are on the CPU (a GPU would have to be waited for): some process
            has a gradient that others lack, or another count.
    """
    square_sums = list(square_sums)
    for groups, members in _members(all_params).items():
        place = {id(param): index for index, param in enumerate(members)}
        size = len(members)
        device = local(members[0]).device
        # The sums, whether there is a gradient, and the count and its square.
        vector = torch.zeros(2 * size + 2, dtype=torch.float64, device=device)
        where: list[tuple[int, list[int], list[int]]] = []
        for index, some in enumerate(params):
            rows = [row for row, param in enumerate(some) if id(param) in place]
            places = [place[id(some[row])] for row in rows]
            if rows:
                vector[places] = square_sums[index][rows]
                vector[[size + p for p in places]] = 1.0
                where.append((index, rows, places))
        vector[-1] = iterations
        vector[-2] = vector[-1] * vector[-1]
        processes = 1
        for group in groups:
            torch.distributed.all_reduce(vector, group=group)
            processes *= torch.distributed.get_world_size(group)
        if device.type == "cpu":
            _check_agreement(vector[size:].tolist(), processes)
        for index, rows, places in where:
            square_sums[index] = square_sums[index].clone()
            square_sums[index][rows] = vector[places]
    return square_sums


def _check_agreement(counted: list[float], processes: int) -> None:
    *present, squares, total = counted
    for number, count in enumerate(present):
        if count not in (0.0, processes):
            raise RuntimeError(
                f"sharded parameter {number} has a gradient in {count:.0f} of the {processes} processes that share it. "
                "A step needs the same gradients everywhere: give the others one of zeros, or remove it"
            )
    if processes * squares != total * total:
        raise RuntimeError(
            f"the {processes} processes that share parameters disagree on iterations, which are {total / processes:g} "
            "on average: load the same checkpoint everywhere, and step together"
        )
