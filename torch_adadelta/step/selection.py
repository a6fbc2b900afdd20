"""Which backend updates parameters: what was asked for, or else the fastest that applies."""

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from torch_adadelta.backends import dtensor, kernels
from torch_adadelta.backends.batch import Backend

# A subclass may mean anything by its operators, and the memory behind it need not hold its elements.
PLAIN_TYPES: Final = frozenset((torch.Tensor, torch.nn.Parameter))

# On the CPU PyTorch's multi-tensor ops loop over the tensors one by one and only cost memory.
_FOREACH_DEVICE_TYPES: Final = frozenset(("cuda", "xpu"))


def is_lazy(param: Tensor) -> bool:
    """Whether this is a parameter of a lazy module, which has no shape yet. What can be checked of it waits."""
    return isinstance(param, UninitializedTensorMixin)


def check_choice(group: dict[str, Any]) -> None:
    """Raises RuntimeError for explicit choices that exclude each other, or that this installation cannot honour."""
    foreach, fused = group["foreach"], group["fused"]
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot both be True: choose one, or leave both None for the fastest")
    for name in ("fused", "foreach"):
        if group[name] and group["differentiable"]:
            raise RuntimeError(
                f"`{name}` and `differentiable` cannot both be True: autograd records single-tensor operations only; "
                f"leave `{name}` None"
            )
    if fused and not kernels.is_loaded:
        raise RuntimeError(f"`fused=True` needs the compiled library: {kernels.load_error}") from kernels.load_error


def check_params(group: dict[str, Any]) -> None:
    """Raises RuntimeError if an explicit choice cannot run for the parameters that a group has."""
    if group["fused"] or group["foreach"]:
        for params in by_device([param for param in group["params"] if not is_lazy(param)]).values():
            select_backend(group, params)


def by_device(params: list[Tensor]) -> dict[Any, list[Tensor]]:
    """The parameters on each device."""
    result: dict[Any, list[Tensor]] = {}
    for param in params:
        result.setdefault(param.device, []).append(param)
    return result


def select_backend(group: dict[str, Any], params: list[Tensor]) -> tuple[Backend, bool]:
    """The backend for parameters of one device, and whether it updates the local tensors of DTensors among them.

    As in torch.optim, `foreach=False` without a word about `fused` means single-tensor operations.

    Raises:
        RuntimeError: an explicit choice cannot run, with the reason.
    """
    foreach, fused, is_differentiable = group["foreach"], group["fused"], group["differentiable"]
    is_plain = PLAIN_TYPES.issuperset(map(type, params))
    if not is_plain and not is_differentiable and dtensor.has_dtensor(params):
        # One local tensor stands for all: what makes a difference is the device, and the type of the others.
        some = dtensor.local(next(filter(dtensor.is_dtensor, params)))
        return select_backend(group, [some, *(p for p in params if not dtensor.is_dtensor(p))])[0], True
    check_choice(group)
    for name in ("fused", "foreach"):
        if group[name] and not is_plain:
            subclass = next(type(p).__name__ for p in params if type(p) not in PLAIN_TYPES)
            raise RuntimeError(f"`{name}=True` needs plain tensors, got a {subclass}; leave `{name}` None")
    has_kernel, device_type = kernels.has_kernel_for(params[0]), params[0].device.type
    if fused and not has_kernel:
        raise RuntimeError(
            f"`fused=True` cannot run on {device_type} parameters: {kernels.why_no_kernel(device_type)}; leave `fused` "
            "None"
        )
    if fused or (has_kernel and is_plain and foreach is None and fused is None and not is_differentiable):
        return Backend.FUSED, False
    if foreach:
        return Backend.MULTI_TENSOR, False
    if is_differentiable or foreach is False or not is_plain:
        return Backend.SINGLE_TENSOR, False
    if fused is None and device_type in ("cpu", "cuda") and not has_kernel:
        kernels.warn_not_loaded(device_type)
    return (Backend.MULTI_TENSOR if device_type in _FOREACH_DEVICE_TYPES else Backend.SINGLE_TENSOR), False
