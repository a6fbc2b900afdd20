"""The update of dense parameters: one signature, three implementations, the same bits.

`for_loop` is the reference and states the formula; `foreach` runs it through PyTorch's multi-tensor ops; `fused` runs
it in one compiled pass. The names of the formula, here and in csrc/adadelta.h:

    g    the gradient, in the arithmetic type T (float64 for float64 parameters, else float32)
    a, u square_avg and acc_delta       p    the parameter       omr  T(1) - rho

    a = a * rho + (g * g) * omr
    d = sqrt(u + eps) * (1 / sqrt(a + eps)) * g        the new a, the old u; left to right
    u = u * rho + (d * d) * omr
    p = p - d * lr

Every operation is rounded to T on its own. That is why no `addcmul`, `lerp` or `add(alpha=)` appears below: they round
in another order, or fuse.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta import gradients, memory, ops, shards
from torch_adadelta.arithmetic import arithmetic_dtype, as_real, exact_sqrt
from torch_adadelta.hyperparameters import Value, cast, one_minus
from torch_adadelta.signature import Lists, Update

_REAL_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES: Final = frozenset((*_REAL_DTYPES, torch.complex32, torch.complex64, torch.complex128))

# A subclass may mean anything by its operators, and the memory behind it need not hold its elements.
_PLAIN_TYPES: Final = frozenset((torch.Tensor, torch.nn.Parameter))


# ---- The three implementations --------------------------------------------------------------------------------------


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
    """Updates one parameter after the other with elementwise tensor operations; autograd can record them."""
    for index, (param, grad, square_avg, acc_delta) in enumerate(
        zip(params, grads, square_avgs, acc_deltas, strict=True)
    ):
        p, g, a, u = as_real(param), as_real(grad), as_real(square_avg), as_real(acc_delta)
        p_out, a_out, u_out = p, a, u
        T = arithmetic_dtype(p.dtype)
        lr_T, rho_T, eps_T = (cast(value, T, p.device) for value in (lr, rho, epsilon))
        omr = one_minus(rho_T, T)

        p, g, a, u = p.to(T), g.to(T), a.to(T), u.to(T)
        if torch.is_grad_enabled():
            a, u = a.clone(), u.clone()  # autograd may need the old values, and a_out and u_out are written in place
        g = gradients.clip(g, index, **clip)
        if maximize:
            g = -g
        a = a * rho_T + (g * g) * omr
        d = exact_sqrt(u + eps_T) * (1 / exact_sqrt(a + eps_T)) * g
        u = u * rho_T + (d * d) * omr
        p = p - d * lr_T

        a_out.copy_(a)
        u_out.copy_(u)
        p_out.copy_(p)


def _foreach_exact_sqrt(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].device.type == "cpu":
        return [exact_sqrt(x) for x in tensors]
    return list(torch._foreach_sqrt(tensors))


def foreach(
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
    """Updates all parameters, which are of one device and dtype, with PyTorch's multi-tensor operations."""
    if memory.overlap([memory.memory_range(param, 0) for param in params if param.numel() > 0]):
        # A multi-tensor operation would run each parameter's first half before any second half.
        for_loop(params, grads, square_avgs, acc_deltas, lr, rho, epsilon, maximize, **clip)
        return

    p_out, a_out, u_out = ([as_real(x) for x in tensors] for tensors in (params, square_avgs, acc_deltas))
    T = arithmetic_dtype(p_out[0].dtype)
    lr_T, rho_T, eps_T = (cast(value, T, p_out[0].device) for value in (lr, rho, epsilon))
    omr = one_minus(rho_T, T)

    g: list[Tensor] = [gradients.clip(as_real(x).to(T), index, **clip) for index, x in enumerate(grads)]
    if maximize:
        g = list(torch._foreach_neg(g))
    # In T already, the state is updated where it is; else in a copy that is rounded back at the end.
    p, a, u = ([x.to(T) for x in tensors] for tensors in (p_out, a_out, u_out))

    squares = list(torch._foreach_mul(g, g))
    torch._foreach_mul_(squares, omr)
    torch._foreach_mul_(a, rho_T)
    torch._foreach_add_(a, squares)
    del squares

    d = _foreach_exact_sqrt(list(torch._foreach_add(u, eps_T)))
    inverse_roots = _foreach_exact_sqrt(list(torch._foreach_add(a, eps_T)))
    torch._foreach_reciprocal_(inverse_roots)
    torch._foreach_mul_(d, inverse_roots)
    torch._foreach_mul_(d, g)
    del inverse_roots

    torch._foreach_mul_(u, rho_T)
    squares = list(torch._foreach_mul(d, d))
    torch._foreach_mul_(squares, omr)
    torch._foreach_add_(u, squares)
    del squares

    torch._foreach_mul_(d, lr_T)
    torch._foreach_sub_(p, d)

    if p_out[0].dtype is not T:
        torch._foreach_copy_(a_out, a)
        torch._foreach_copy_(u_out, u)
        torch._foreach_copy_(p_out, p)


# Updates all parameters, which are of one device, in one compiled pass. Raises before it writes anything.
fused = ops.adadelta_

_ALL: Final[tuple[Update, ...]] = (for_loop, foreach, fused)

# The same for lists with DTensors among them.
ON_SHARDS: Final = {update: shards.on_shards(update) for update in _ALL}


def check_fused(lists: Lists) -> None:
    """Raises RuntimeError if `fused` would refuse these lists."""
    ops.check_lists(*lists)


# ---- The choice -----------------------------------------------------------------------------------------------------


def check_choice(foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Raises RuntimeError for explicit choices that exclude each other, or that this installation cannot honour."""
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot both be True: choose one, or leave both None for the fastest")
    for name, wanted in (("fused", fused), ("foreach", foreach)):
        if wanted and differentiable:
            raise RuntimeError(
                f"`{name}` and `differentiable` cannot both be True: autograd records the for-loop only; "
                f"leave `{name}` None"
            )
    if fused and not ops.is_loaded:
        raise RuntimeError(f"`fused=True` needs the compiled library: {ops.load_error}") from ops.load_error


def choose(params: list[Tensor], foreach: bool | None, fused: bool | None, differentiable: bool) -> Update:
    """The implementation for parameters of one device: what was asked for, or else the fastest that applies.

    As in torch.optim, `foreach=False` without a word about `fused` means the for-loop.

    Raises:
        RuntimeError: an explicit choice cannot run, with the reason.
    """
    is_plain = _PLAIN_TYPES.issuperset(map(type, params))
    has_kernel = ops.has_kernel_for(params[0])
    if has_kernel and is_plain and foreach is None and fused is not False and not differentiable:
        return _fused
    if not is_plain and not differentiable and shards.has_dtensor(params):
        # One part stands for all: what makes a difference is the device, and the type of the others.
        some = shards.local(next(filter(shards.is_dtensor, params)))
        others = [param for param in params if not shards.is_dtensor(param)]
        return ON_SHARDS[choose([some, *others], foreach, fused, differentiable)]
    device_type = params[0].device.type
    check_choice(foreach, fused, differentiable)
    for name, wanted in (("fused", fused), ("foreach", foreach)):
        if wanted and not is_plain:
            subclass = next(type(p).__name__ for p in params if type(p) not in _PLAIN_TYPES)
            raise RuntimeError(f"`{name}=True` needs plain tensors, got a {subclass}; leave `{name}` None")
    if fused:
        if not has_kernel:
            raise RuntimeError(
                f"`fused=True` cannot run on {device_type} parameters: {ops.why_no_kernel(device_type)}; leave `fused` "
                "None"
            )
        return _fused
    if foreach:
        return _foreach
    if differentiable or foreach is False or not is_plain:
        return for_loop
    if fused is None and device_type in ("cpu", "cuda") and not has_kernel:
        ops.warn_not_loaded(device_type)
    return _foreach if device_type in _FOREACH_DEVICE_TYPES else for_loop


_fused, _foreach = fused, foreach

# On the CPU PyTorch's multi-tensor ops loop over the tensors one by one and only cost memory.
_FOREACH_DEVICE_TYPES: Final = frozenset(("cuda", "xpu"))


# ---- Checks ---------------------------------------------------------------------------------------------------------


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


def check_param(name: Callable[[], str], param: Tensor) -> None:
    """Raises TypeError or ValueError, naming the parameter, if it is one that cannot be trained here."""
    if param.dtype not in DTYPES:
        raise TypeError(
            f"{name()} has dtype {param.dtype}; Adadelta trains floating-point and complex parameters. Leave it out, "
            "as in (p for p in model.parameters() if p.requires_grad)"
        )
    if param.layout is not torch.strided:
        raise ValueError(f"{name()} has layout {param.layout}; only dense parameters can be trained. Use .to_dense()")
    if param.is_conj() or param.is_neg():
        raise ValueError(f"{name()} is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()")
    if overlaps_itself(param):
        raise ValueError(
            f"{name()} overlaps itself in memory (shape {tuple(param.shape)}, strides {param.stride()}), as an "
            "expanded tensor does. Use .contiguous()"
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
    if shards.is_dtensor(tensor) != shards.is_dtensor(param):
        what = type(param.data).__name__
        raise RuntimeError(
            f"{name()} is a {what}, but its {kind} is a {type(tensor.data).__name__}. Distribute both alike"
        )
    if tensor.device != param.device:
        raise RuntimeError(f"{name()} is on {param.device}, but its {kind} is on {tensor.device}. Move it there")
    if tensor.is_complex() != param.is_complex() or tensor.dtype not in DTYPES:
        raise RuntimeError(f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}")


def check_row(
    name: Callable[[], str], param: Tensor, grad: Tensor, square_avg: Any, acc_delta: Any, *, differentiable: bool
) -> None:
    """Raises RuntimeError, naming the parameter, unless its four tensors can be updated together."""
    check_param(name, param)
    if differentiable and param.is_leaf and param.requires_grad:
        raise RuntimeError(f"{name()} is a leaf that requires grad: with differentiable=True pass a clone of it")
    check_gradient(name, param, grad)
    is_sparse = grad.layout is torch.sparse_coo
    if is_sparse and differentiable:
        raise RuntimeError(
            f"{name()} has a sparse gradient, which autograd cannot follow: with differentiable=True use .to_dense()"
        )
    for kind, tensor in (("state square_avg", square_avg), ("state acc_delta", acc_delta)):
        _check_tensor(name, param, kind, tensor)
        if tensor.dtype != param.dtype:
            raise RuntimeError(
                f"{name()} has dtype {param.dtype}, but its {kind} has dtype {tensor.dtype}. Convert the state too"
            )
        if not shards.is_distributed_alike(param, tensor):
            raise RuntimeError(f"{name()} and its {kind} are distributed in different ways. Use .redistribute()")
        if tensor.layout is not torch.strided or overlaps_itself(tensor):
            raise RuntimeError(f"{name()}: its {kind} is not a dense tensor of its own memory. Use .contiguous()")
        if tensor.is_conj() or tensor.is_neg():
            raise RuntimeError(
                f"{name()}: its {kind} is a lazily conjugated or negated view. Use .resolve_conj().resolve_neg()"
            )
    if not _PLAIN_TYPES.issuperset(map(type, (param, grad, square_avg, acc_delta))):
        return
    for tensor in (param, square_avg, acc_delta):
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{name()} or its state was made in inference mode, outside which it cannot be updated")


def check_memory(rows: Iterable[memory.Row], name_of: Callable[[Tensor], str]) -> None:
    """Raises RuntimeError, naming the parameters, unless the memory that these rows write to is their own."""
    plain = [row for row in rows if not row[0].is_meta and _PLAIN_TYPES.issuperset(map(type, row))]
    memory.check_apart(plain, name_of)
