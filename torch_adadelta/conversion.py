"""`to_bfloat16` and `to_float32`: convert a model and its optimizer between steps of a training."""

import warnings
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from torch_adadelta.backends import masters
from torch_adadelta.backends.dtensor import is_dtensor
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.options import check_combinations
from torch_adadelta.step import precision, validation
from torch_adadelta.step.selection import is_lazy

_Optimizer = TypeVar("_Optimizer", bound=AdadeltaKeras)

# Their running averages would stall in bfloat16, and PyTorch computes them in float32 between layers in bfloat16.
_STAY_FLOAT32: Final = nn.modules.batchnorm._NormBase


@torch.inference_mode(False)  # what is made in inference mode cannot be trained outside of it
def to_bfloat16(model: nn.Module, optimizer: _Optimizer) -> _Optimizer:
    """Converts float32 parameters to bfloat16 in place. The state of the optimizer keeps the bits that they lose.

    Training continues as with float32 parameters and the gradients of a bfloat16 model. The param groups get
    ``master_weights=True``. Groups with ``state_dtype=None`` get ``torch.float32``, the dtype that their state has.

    BatchNorm and InstanceNorm stay in float32. Other buffers, and parameters that the optimizer does not have, are
    rounded as by ``model.to(torch.bfloat16)``. A warning names those that lose precision.

    Args:
        model (nn.Module): the model. Its parameters remain the same objects.
        optimizer (AdadeltaKeras): the optimizer of its parameters. Its state is not converted.

    Returns:
        The optimizer.

    Raises:
        TypeError: if `optimizer` is not an AdadeltaKeras.
        ValueError: if a parameter in an affected group is a DTensor, float16, float64 or complex; if such a group is
            differentiable; if the model contains DistributedDataParallel, shares no parameter with the optimizer, or
            has uninitialized parameters; if the optimizer belongs to ZeroRedundancyOptimizer.
        RuntimeError: if a parameter has a gradient, if `step_in_backward` is on, or inside `swap_averages`.

    If it raises, nothing has changed.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = to_bfloat16(model, AdadeltaKeras(model.parameters(), 1.0))
        >>> model.weight.dtype, optimizer.state[model.weight]["remainder"].dtype
        (torch.bfloat16, torch.int16)
    """
    params = _trained(model, optimizer, torch.float32)
    stay = {id(x) for module in model.modules() if isinstance(module, _STAY_FLOAT32) for x in _tensors(module)}
    params = [param for param in params if id(param) not in stay]
    converted = set(map(id, params))
    groups = [group for group in optimizer.param_groups if any(id(param) in converted for param in group["params"])]
    new = [{**group, "master_weights": True, "state_dtype": group["state_dtype"] or torch.float32} for group in groups]
    for group in new:
        check_combinations(group)
    replaced = {id(group): own for group, own in zip(groups, new, strict=True)}
    validation.check_dtypes([replaced.get(id(group), group) for group in optimizer.param_groups])
    stay.update(map(id, _params(optimizer)))
    others = {name: x for name, x in _named_tensors(model) if id(x) not in stay and x.dtype is torch.float32}
    _warn_of_rounding(others)
    halves = [_split(param) for param in params]
    precision.convert_state(new, optimizer.state)
    for group, own in zip(groups, new, strict=True):
        group.update(own)
    for param, (upper, remainder) in zip(params, halves, strict=True):
        param.data = upper
        optimizer.state[param][masters.KEY] = remainder
    for x in others.values():
        x.data = x.data.to(torch.bfloat16)
    return optimizer


@torch.inference_mode(False)  # what is made in inference mode cannot be trained outside of it
def to_float32(model: nn.Module, optimizer: _Optimizer) -> _Optimizer:
    """Converts bfloat16 parameters to float32 in place. With ``master_weights=True``, they become their masters.

    It undoes `to_bfloat16` bit by bit. Buffers, and parameters that the optimizer does not have, become float32, too.
    State becomes float32 where it had the dtype of the parameter.

    Args:
        model (nn.Module): the model. Its parameters remain the same objects.
        optimizer (AdadeltaKeras): the optimizer of its parameters.

    Returns:
        The optimizer.

    Raises:
        TypeError: if `optimizer` is not an AdadeltaKeras.
        ValueError: if a parameter is a DTensor; if the model contains DistributedDataParallel, shares no parameter with
            the optimizer, or has uninitialized parameters; if the optimizer belongs to ZeroRedundancyOptimizer.
        RuntimeError: if a parameter has a gradient, if `step_in_backward` is on, or inside `swap_averages`.

    If it raises, nothing has changed.
    """
    params = _trained(model, optimizer, torch.bfloat16)
    converted = set(map(id, params))
    groups = [group for group in optimizer.param_groups if any(id(param) in converted for param in group["params"])]
    of_param = {param: master for param, master in optimizer.master_params() if id(param) in converted}
    new = []
    for group in groups:
        dtypes = {torch.float32 if id(param) in converted else param.dtype for param in group["params"]}
        is_own = dtypes <= {torch.float32, torch.float64}
        dtype = None if is_own and group["state_dtype"] is torch.float32 else group["state_dtype"]
        new.append({**group, "master_weights": group["master_weights"] and not is_own, "state_dtype": dtype})
    known = set(map(id, _params(optimizer)))
    others = [x for _, x in _named_tensors(model) if id(x) not in known and x.dtype is torch.bfloat16]
    precision.convert_state(new, optimizer.state, dict.fromkeys(params, torch.float32))
    for param in params:
        param.data = of_param[param].to(torch.float32)
    for x in others:
        x.data = x.data.float()
    for group, own in zip(groups, new, strict=True):
        group.update(own)
    return optimizer


def _params(optimizer: AdadeltaKeras) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _trained(model: nn.Module, optimizer: AdadeltaKeras, dtype: torch.dtype) -> list[Any]:
    """The parameters of this dtype that both have, once each of them can be converted."""
    if not isinstance(optimizer, AdadeltaKeras):
        raise TypeError(f"the optimizer must be an AdadeltaKeras, got {type(optimizer).__name__}")
    if optimizer.step_request().is_part:
        raise ValueError("ZeroRedundancyOptimizer shares the parameters out. Convert the model first, and make it anew")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "DistributedDataParallel would no longer reduce the gradients. Convert the module in it, and wrap it again"
        )
    if optimizer.in_backward is not None:
        raise RuntimeError("step_in_backward is on, and its hooks are for the dtypes of now; remove() it first")
    optimizer.check_not_swapped("no parameter can be converted")
    of_model, trained = set(map(id, model.parameters())), set(map(id, _params(optimizer)))
    if of_model.isdisjoint(trained):
        raise ValueError("the optimizer has no parameter of this model. Give the model that it was made for")
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(f"{name} has no shape yet. Run the model once before it is converted")
        grad = param.grad
        if param.dtype is dtype and (is_dtensor(param) or grad is not None):
            name = validation.name_of(optimizer.param_groups, param) if id(param) in trained else name
            if grad is None:
                raise ValueError(f"{name} is a DTensor, which was sharded in its dtype. Convert before fully_shard")
            raise RuntimeError(f"{name} has a gradient of {grad.dtype}. Call zero_grad() first")
    found = [param for param in _params(optimizer) if id(param) in of_model and param.dtype is dtype]
    return list({id(param): param for param in found}.values())


def _split(param: Tensor) -> tuple[Tensor, Tensor]:
    upper = torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False)
    remainder = masters.new_remainder(param)
    masters.set_master(upper, remainder, param.detach())
    return upper, remainder


def _warn_of_rounding(tensors: dict[str, Tensor]) -> None:
    lossy = [name for name, x in tensors.items() if not torch.equal(x.to(torch.bfloat16).float(), x)]
    if lossy:
        some = ", ".join(lossy[:5]) + (", ..." if len(lossy) > 5 else "")
        warnings.warn(f"rounded to bfloat16, for the optimizer does not have them: {some}", stacklevel=3)
