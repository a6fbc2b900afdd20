"""The step as `torch.compile` traces it: the same compiled op, between graph inputs.

PyTorch runs a method by the name of `_init_group` while it traces, with the real tensors, and lets it fill the lists
that are passed: that is how the step of its own optimizers stays out of the graph but for the update. Here the first
such call plans the whole step, which makes what state is missing and finds out whether anything speaks against tracing;
where it does (schedules, callables, GradScaler, DTensors, or an error), the step runs as it would without
`torch.compile`, after a break of the graph.

What the graph must not take for a constant comes into it as a Tensor: a learning rate that is one, and `iterations`.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torch_adadelta.backends import functional, kernels, masters
from torch_adadelta.backends.batch import STATE_DTYPES, STATE_KEYS, Backend, Batch, GradientOptions, Segment
from torch_adadelta.backends.opmath import opmath_dtype, opmath_dtypes
from torch_adadelta.options import BY_KEY, CLIP_OPTIONS, counts_on_host, is_zero
from torch_adadelta.step import execution, planning
from torch_adadelta.step.averages import KEY as AVERAGE
from torch_adadelta.step.averages import momentum_on_device
from torch_adadelta.step.planning import PartitionCache, StepRequest

# The first argument of `_init_group` that asks for the plan.
_PLAN: Final = -1

# What the plan says instead of the number of batches.
_NOT_TRACEABLE: Final = -1


class _TracedBatch(NamedTuple):
    """A batch by places, not with its tensors: should the graph break, it is looked up at each step."""

    is_fused: bool
    has_remainders: bool
    places: list[tuple[int, int]]  # of each parameter: its group, and where it is in that
    segments: list[tuple[int, int, bool]]  # of each its size, its group, and whether it is excluded from weight decay
    order: list[int]


class TracedStep:
    """What was found when a step was planned for a trace."""

    def __init__(self) -> None:
        self._batches: list[_TracedBatch] = []

    def __deepcopy__(self, memo: Any) -> "TracedStep":
        return TracedStep()

    def init_group(
        self,
        request: StepRequest,
        index: int,
        params: list[Tensor],
        grads: list[Tensor],
        square_avgs: list[Tensor],
        acc_deltas: list[Tensor],
        averages: list[Tensor],
        remainders: list[Tensor],
        order: list[int],
        segments: list[tuple[int, int, bool]],
    ) -> int:
        """Plans a step, and returns the number of batches; or fills the lists with a batch: 1 if that is fused."""
        if index == _PLAN:
            try:
                with torch.no_grad():
                    batches = _plan_trace(request)
            except Exception:
                return _NOT_TRACEABLE  # the untraced step raises it again, outside of the compiler
            self._batches = batches or []
            return _NOT_TRACEABLE if batches is None else len(batches)
        batch = self._batches[index]
        for group, place in batch.places:
            param = request.groups[group]["params"][place]
            params.append(param)
            grads.append(param.grad)
            for tensors, key in zip((square_avgs, acc_deltas), STATE_KEYS, strict=True):
                tensors.append(request.state[param][key])
            if request.groups[0]["use_ema"]:
                averages.append(request.state[param][AVERAGE])
            if batch.has_remainders:
                remainders.append(request.state[param][masters.KEY])
        order.extend(batch.order)
        segments.extend(batch.segments)
        return int(batch.is_fused)


def _plan_trace(request: StepRequest) -> list[_TracedBatch] | None:
    """The batches of a step; None if it cannot be traced."""
    partitions = PartitionCache()
    callbacks = request.callbacks
    if any(request.sources.of_groups) or callbacks.aggregator is not None or callbacks.transformers:
        return None
    plan = planning.plan(request._replace(partitions=partitions))
    if plan is None:
        return []
    if not plan.batches or partitions.partition is None or plan.passes or counts_on_host(request.groups[0]):
        return None
    clips = any(request.groups[0][key] is not None for key in CLIP_OPTIONS)
    traced = []
    places = {
        id(param): (index, place)
        for index, group in enumerate(request.groups)
        for place, param in enumerate(group["params"])
    }
    for batch, spec in zip(plan.batches, partitions.partition.specs, strict=True):
        is_fused = batch.backend is Backend.FUSED
        # Clipping in Python rounds its numbers by means that cannot be traced.
        if batch.is_sparse or batch.is_differentiable or batch.wholes is not None or (clips and not is_fused):
            return None
        where = [places[id(param)] for param in batch.params]
        if len(set(where)) < len(where):  # listed twice, and updated twice
            return None
        if is_fused and kernels.update(batch, check_only=True) is not None:
            return None  # the untraced step says what is wrong, by the parameter's name
        order = list(range(len(where))) if batch.gradient_order is None else batch.gradient_order
        segments = [(segment.size, segment.group, segment.is_excluded) for segment in spec.segments]
        traced.append(_TracedBatch(is_fused, bool(batch.remainders), where, segments, order))
    types = opmath_dtypes(param for batch in plan.batches for param in batch.params)
    if request.groups[0]["global_clipnorm"] is not None and len(types) > 1:
        return None  # their norm is taken in float64, of gradients rounded before
    execution.add_state(request.state, plan.new_state)
    for group in request.groups:
        if not isinstance(group["iterations"], Tensor):
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            group["iterations"] = torch.full((), group["iterations"], dtype=torch.int64, device=device)
    return traced


# ---- What is traced -------------------------------------------------------------------------------------------------


def step(optimizer: Any, is_plain: bool) -> None:
    """Takes a step of an optimizer whose `_init_group` is that of a `TracedStep`.

    `is_plain`: whether nothing is set on the optimizer that cannot be traced.
    """
    count = optimizer._init_group(_PLAN, [], [], [], [], [], [], [], [])
    if not is_plain or count == _NOT_TRACEABLE:
        optimizer.untraced_step()
        return
    with torch.no_grad():
        if count:
            _update(optimizer, count)
            for group in optimizer.param_groups:
                group["iterations"].add_(1)


def _update(optimizer: Any, count: int) -> None:
    groups = optimizer.param_groups
    clipvalue, clipnorm, global_clipnorm = [groups[0][key] for key in CLIP_OPTIONS]
    scale = groups[0]["loss_scale_factor"] or 1.0
    batches = []
    orders = []
    sums = []
    for index in range(count):
        params: list[Tensor] = []
        grads: list[Tensor] = []
        square_avgs: list[Tensor] = []
        acc_deltas: list[Tensor] = []
        averages: list[Tensor] = []
        remainders: list[Tensor] = []
        order: list[int] = []
        places: list[tuple[int, int, bool]] = []
        lists = params, grads, square_avgs, acc_deltas, averages, remainders
        is_fused = optimizer._init_group(index, *lists, order, places)
        batches.append((is_fused, lists, places))
        orders.extend(order)
        if clipnorm is not None or global_clipnorm is not None:
            in_double = global_clipnorm is not None and opmath_dtype(params[0].dtype) is torch.float64
            sums.append(kernels.grad_square_sums(params, grads, clipvalue, in_double, None, scale))
    factor = 1.0
    if global_clipnorm is not None:
        in_double = opmath_dtype(batches[0][1][0][0].dtype) is torch.float64
        factor = torch.ops.torch_adadelta.global_factor.default(sums, orders, global_clipnorm, in_double)
    for position, (is_fused, lists, places) in enumerate(batches):
        device = lists[0][0].device
        segments = []
        begin = 0
        for size, group_index, is_excluded in places:
            segments.append(_segment(groups[group_index], size, lists[0][begin], is_excluded))
            begin += size
        own_sums = None if clipnorm is None else sums[position]
        own_factor = factor.to(device) if isinstance(factor, Tensor) else factor
        options = GradientOptions(clipvalue, clipnorm, own_sums, own_factor, loss_scale_factor=scale)
        if is_fused:
            arguments = kernels.hyperparameter_arguments(segments)
            kernels.adadelta_(*lists, *arguments, *kernels.option_arguments(options))
        else:
            batch = Batch(Backend.SINGLE_TENSOR, False, False, *lists[:4], segments, options)
            batch.averages, batch.remainders = lists[4:]
            functional.single_tensor(batch)


def _segment(group: dict[str, Any], size: int, param: Tensor, is_excluded: bool) -> Segment:
    """The hyperparameters of a group for parameters like `param`, as Tensors. No weight decay stays a number."""
    device, T = param.device, opmath_dtype(param.dtype)
    lr = _as_tensor("lr", group["lr"], device)
    if group["decay"]:
        decay = _as_tensor("decay", group["decay"], device).to(T)
        lr = lr.to(T) / (1 + decay * group["iterations"].to(device, T))
    epsilon = _as_tensor("epsilon", group["epsilon"], device)
    epsilon = torch.where(epsilon == 0, BY_KEY["epsilon"].zero_means, epsilon)
    rho, weight_decay = _as_tensor("rho", group["rho"], device), group["weight_decay"]
    weight_decay = (
        0.0
        if is_excluded or weight_decay is None or is_zero(weight_decay)
        else _as_tensor("weight_decay", weight_decay, device)
    )
    segment = Segment(
        size,
        lr,
        rho,
        epsilon,
        group["maximize"],
        weight_decay,
        group["decoupled_weight_decay"],
        state_dtype=STATE_DTYPES.index(group["state_dtype"]),
        has_masters=group["master_weights"],
    )
    if not group["use_ema"]:
        return segment
    return segment._replace(ema_momentum=momentum_on_device(group).to(device))


def _as_tensor(key: str, value: Any, device: torch.device) -> Tensor:
    """An option as a Tensor without dimensions, rounded as Keras does it if it is a Python number."""
    if isinstance(value, Tensor):
        return value.detach().to(device).reshape(())
    dtype = torch.float32 if BY_KEY[key].rounds_to_float32 else torch.float64
    return torch.full((), value, dtype=dtype, device=device)


# One op, so that no compiler changes the bits of the few numbers that it computes.
@torch.library.custom_op("torch_adadelta::global_factor", mutates_args=())
def _global_factor(square_sums: list[Tensor], order: list[int], global_clipnorm: float, in_double: bool) -> Tensor:
    T = torch.float64 if in_double else torch.float32
    sums = torch.cat(square_sums)
    rows = sorted(range(len(order)), key=order.__getitem__)
    factor = functional.global_factor(global_clipnorm, sums[rows], T)
    return factor if isinstance(factor, Tensor) else torch.full((), factor, dtype=torch.float64)


@_global_factor.register_fake
def _(square_sums: list[Tensor], order: list[int], global_clipnorm: float, in_double: bool) -> Tensor:
    return square_sums[0].new_empty((), dtype=torch.float64)
