"""`step_in_backward`: updates each parameter as soon as its gradient is complete, and frees the gradient."""

import threading
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta.backends import functional
from torch_adadelta.backends.dtensor import is_dtensor
from torch_adadelta.backends.opmath import opmath_dtypes
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.step import execution, planning, selection, validation
from torch_adadelta.step.clipping import NO_CLIPPING, Clipping
from torch_adadelta.step.planning import Inputs, PartitionCache, Rows, State, StepPlan
from torch_adadelta.step.sources import StepValues

_REFUSED_OPTIONS: Final = {
    "gradient_accumulation_steps": "each backward pass is a step, and frees its gradients",
    "clipnorm": "a norm is taken before any parameter is written",
    "global_clipnorm": "the norm of all gradients is known at the end of the backward pass only",
}


class StepInBackward:
    """The handle that `step_in_backward` returns. `remove()` removes its hooks."""

    def __init__(self, optimizer: AdadeltaKeras) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()  # the backward pass runs in a thread for each device
        self._pass: int | None = None
        self._values: StepValues | None = None
        self._updated: list[Tensor] = []
        self._has_written = False
        self._handles: list[Any] = []
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                step = partial(self._step, index=index, partitions=PartitionCache())
                self._handles.append(param.register_hook(self._begin))
                self._handles.append(param.register_post_accumulate_grad_hook(step))

    def remove(self) -> None:
        """Removes the hooks. Gradients stay in `.grad` again, and `step()` must be called."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.in_backward = None

    def _begin(self, grad: Tensor) -> None:
        """At the first gradient of a backward pass: checks everything, before anything is written."""
        with self._lock:
            task = torch._C._current_graph_task_id()
            if task == self._pass:
                return
            check(self._optimizer)
            request = self._optimizer.step_request()
            planning.check_groups(request)
            request.sources.check_not_overwritten(request.groups, request.has_scheduler)
            values = StepValues(request.groups, request.sources.of_groups)
            for index, group in enumerate(request.groups):
                for T in opmath_dtypes(group["params"]):
                    values.of(index, T)
            self._pass, self._values, self._updated, self._has_written = task, values, [], False
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _step(self, param: Tensor, index: int, partitions: PartitionCache) -> None:
        """Updates a parameter whose gradient is complete."""
        assert param.grad is not None
        assert self._values is not None
        with self._lock, torch.no_grad():
            request = self._optimizer.step_request()._replace(partitions=partitions)
            sizes = [int(index == other) for other in range(len(request.groups))]
            rows = Rows([param], [param.grad], sizes)
            group = request.groups[0]
            clipping = Clipping(group["clipvalue"], loss_scale_factor=group["loss_scale_factor"])
            clipping = NO_CLIPPING if clipping == NO_CLIPPING else clipping
            inputs = Inputs(rows, self._values, clipping, averages_rest=False)
            plan = planning.assemble(request, inputs, partitions.find(request, rows))
            plan.counts, plan.writes = False, []  # once, at the end
            self._has_written = True
            execution.run_plan(plan)
            if not functional.is_sparse(param.grad):  # whose average was part of the update
                self._updated.append(param)
            param.grad = None

    def _finish(self) -> None:
        """At the end of a backward pass: the step is counted. One of `torch.autograd.grad` has written nothing."""
        if self._has_written and self._values is not None:
            request = self._optimizer.step_request()._replace(found_inf=None)
            new_state: State = {}
            with torch.no_grad():
                passes = planning.average_rest(request, self._updated, new_state)
                execution.run_plan(StepPlan(request, [], new_state, self._values.writes, passes))
        self._pass, self._values, self._updated = None, None, []


def check(optimizer: AdadeltaKeras) -> None:
    """Raises if updates in the backward pass would be other than those of `step()`."""
    who = "step_in_backward:"
    for key, why in _REFUSED_OPTIONS.items():
        value = optimizer.param_groups[0][key]
        if value is not None:
            remedy = "Use clipvalue, or call step()" if "clip" in key else "Set it to None, or call step()"
            raise ValueError(f"{who} {key}={value!r} cannot be applied, for {why}. {remedy}")
    if optimizer.gradient_aggregator is not None or optimizer.gradient_transformers:
        raise ValueError(
            f"{who} gradient_aggregator and gradient_transformers are called with all gradients, which are never there "
            "at once. Leave them out, or call step()"
        )
    if optimizer.norm_group is not None:
        raise ValueError(f"{who} norm_group is for global_clipnorm, which cannot be applied. Leave it out")
    for group_index, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            raise ValueError(
                f"{who} group {group_index} is differentiable; autograd cannot record its own backward pass"
            )
        for index, param in enumerate(group["params"]):
            name = validation.name_in(optimizer.param_groups, group_index, index)
            if is_dtensor(param):
                raise ValueError(
                    f"{who} {name} is a DTensor; FSDP2 and tensor parallelism give it a gradient "
                    "in ways of their own. Call step()"
                )
            if param.grad is not None:
                raise RuntimeError(
                    f"{who} {name} has a gradient already. Gradients cannot be accumulated over "
                    "backward passes, for each pass is a step of its own: remove it with zero_grad(), add up the "
                    "losses instead, or call step()"
                )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"{who} there are {distributed.get_world_size()} processes, and gradients would be applied before they are "
            "reduced over them. Call step()"
        )


def step_in_backward(optimizer: AdadeltaKeras) -> StepInBackward:
    """Makes the backward pass take the step, so that only a few gradients exist at a time.

    From now on, each parameter is updated as soon as its gradient is complete, and the gradient is freed. The hooks are
    those of ``torch.Tensor.register_post_accumulate_grad_hook``. Every backward pass is a step. Schedules, callables
    and `decay` are evaluated once, at its beginning. `iterations` advances once, at its end. The numbers are those of
    `backward()` and `step()`, bit by bit. A `step()` that remains in the loop finds no gradients and does nothing.

    Everything that can be checked is checked before the first parameter is written. A backward pass that fails later
    leaves some parameters updated, and is not counted.

    It does not support activation checkpointing with ``use_reentrant=True``, which runs a backward pass within another.

    Args:
        optimizer (AdadeltaKeras): the optimizer. Its parameters must have no gradients. Param groups that are added
            later are not included.

    Returns:
        A handle whose `remove()` removes the hooks.

    Raises:
        ValueError: if `clipnorm`, `global_clipnorm`, `norm_group`, an aggregator or transformers are set, which need
            all gradients; if `gradient_accumulation_steps` is set; if a group is differentiable; if a parameter is a
            DTensor.
        RuntimeError: if a parameter has a gradient, since gradients cannot be accumulated; if there are several
            processes; if it is on already. Also if a GradScaler calls `step()`: it would have to unscale the gradients
            first.

    The checks run in this call and at the beginning of every backward pass.

    Example:
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdadeltaKeras([param], learning_rate=1.0)
        >>> handle = step_in_backward(optimizer)
        >>> param.sum().backward()
        >>> param.grad is None, optimizer.iterations
        (True, 1)
        >>> handle.remove()
    """
    if optimizer.in_backward is not None:
        raise RuntimeError("step_in_backward is on already for this optimizer; remove() ends it")
    check(optimizer)
    for group in optimizer.param_groups:
        for params in selection.by_device(group["params"]).values():
            selection.select_backend(group, params)
    optimizer.in_backward = StepInBackward(optimizer)
    return optimizer.in_backward
