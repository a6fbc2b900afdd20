"""The backends by themselves: updates of lists of tensors with one set of hyperparameters, which raise what is refused."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_adadelta.backends import functional, kernels
from torch_adadelta.backends.batch import Backend, Batch, GradientOptions, Refusal, Segment
from torch_adadelta.step import execution

Update = Callable[..., None]


def batch_of(
    backend: Backend,
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    lr: Any = 1.0,
    rho: Any = 0.95,
    epsilon: Any = 1e-7,
    maximize: bool = False,
    weight_decay: Any = 0.0,
    is_decoupled: bool = True,
    ema_momentum: Any = 0.0,
    overwrites: bool = False,
    state_dtype: int = 0,
    has_masters: bool = False,
    is_sparse: bool = False,
    averages: Sequence[Tensor] = (),
    remainders: Sequence[Tensor] = (),
    **options: Any,
) -> Batch:
    """A batch of one segment. `options` are those of `GradientOptions`."""
    values = (
        lr,
        rho,
        epsilon,
        maximize,
        weight_decay,
        is_decoupled,
        ema_momentum,
        overwrites,
        state_dtype,
        has_masters,
    )
    return Batch(
        backend,
        is_sparse,
        False,
        params,
        grads,
        square_avgs,
        acc_deltas,
        [Segment(len(params), *values)],
        GradientOptions(**options),
        averages=list(averages),
        remainders=list(remainders),
    )


def raised(result: Any) -> Any:
    """The result of an op, unless it is a refusal, which is raised."""
    if isinstance(result, Refusal):
        raise RuntimeError(result.message if result.param is None else f"parameter {result.param}: {result.message}")
    return result


def update(backend: Backend, *lists_and_values: Any, **options: Any) -> None:
    """Updates lists of tensors in place."""
    raised(execution.run(batch_of(backend, *lists_and_values, **options)))


single_tensor = partial(update, Backend.SINGLE_TENSOR)
multi_tensor = partial(update, Backend.MULTI_TENSOR)
fused = partial(update, Backend.FUSED)
sparse_single_tensor = partial(single_tensor, is_sparse=True)
sparse_fused = partial(fused, is_sparse=True)


def check(*lists: Any, **options: Any) -> None:
    """Raises what the fused update of these lists would raise, and writes nothing."""
    raised(kernels.update(batch_of(Backend.FUSED, *lists, **options), check_only=True))


def square_sums(*arguments: Any, **options: Any) -> Tensor:
    """Those of the compiled op."""
    result: Tensor = raised(kernels.square_sums(*arguments, **options))
    return result


def first_invalid_indices(backend: Backend, *lists: Any) -> Tensor:
    """The first entry of each sparse gradient whose index is out of range, or -1."""
    room = kernels if backend is Backend.FUSED else functional
    result: Tensor = raised(room.first_invalid_indices(batch_of(backend, *lists, is_sparse=True)))
    return result


def sparse_op(
    params: Any, indices: Any, values: Any, square_avgs: Any, acc_deltas: Any, *rest: Any, **options: Any
) -> None:
    """The compiled op of sparse gradients, which are given in their parts."""
    batch = batch_of(Backend.FUSED, params, values, square_avgs, acc_deltas, *rest, **options)
    arguments = kernels.hyperparameter_arguments(batch.segments) + kernels.option_arguments(batch.gradient_options)
    states = (square_avgs, acc_deltas, batch.remainders)
    torch.ops.torch_adadelta.sparse_adadelta_(params, indices, values, *states, *arguments)
