"""`step_in_backward`: each parameter is updated as soon as its gradient is there, and the gradient is freed."""

import threading
from typing import Any, Final

import torch
from torch import Tensor

from torch_adadelta import hyperparameters, shards
from torch_adadelta.arithmetic import arithmetic_dtype, arithmetic_dtypes
from torch_adadelta.buckets import by_device, choose, split
from torch_adadelta.optimizer import AdadeltaKeras, _values_of

_REFUSED_OPTIONS: Final = {
    "clipnorm": "a norm is taken before any parameter is written",
    "global_clipnorm": "the norm of all gradients is known at the end of the backward pass only",
}


class StepInBackward:
    """What `step_in_backward` returns; `remove()` ends it."""

    def __init__(self, optimizer: AdadeltaKeras) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()  # the backward pass runs in a thread for each device
        self._pass: int | None = None
        self._values: dict[Any, hyperparameters.StepValues] = {}
        self._called: dict[Any, Any] = {}
        self._new_values: list[Any] = []
        self._has_written = False
        self._handles: list[Any] = []
        for group_index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                self._handles.append(param.register_hook(lambda grad, index=group_index: self._begin(index)))
                self._handles.append(
                    param.register_post_accumulate_grad_hook(lambda param, index=group_index: self._step(param, index))
                )

    def remove(self) -> None:
        """Ends it: gradients stay in `.grad` again, and `step()` is to be called."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer._in_backward = None

    def _begin(self, group_index: int) -> None:
        """At the first gradient of a backward pass: checks everything, before anything is written."""
        with self._lock:
            task = torch._C._current_graph_task_id()
            if task == self._pass:
                return
            optimizer = self._optimizer
            check(optimizer)
            optimizer._follow_groups()
            if optimizer._check_sources():
                raise RuntimeError("a learning rate of 0.0 was written under a schedule")
            self._values, self._called, self._new_values = {}, {}, []
            for group, sources in zip(optimizer.param_groups, optimizer._sources, strict=True):
                for T in arithmetic_dtypes(group["params"]):
                    values, new_values = _values_of(group, sources, T, self._called)
                    self._values[id(group), T] = values
                    self._new_values += new_values
            self._pass, self._has_written = task, False
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _step(self, param: Tensor, group_index: int) -> None:
        optimizer = self._optimizer
        group = optimizer.param_groups[group_index]
        assert param.grad is not None
        with self._lock, torch.no_grad():
            new_state: dict[Tensor, dict[str, Tensor]] = {}
            lists = optimizer._with_state([param], [param.grad], new_state)
            clip: dict[str, Any] = {} if group["clipvalue"] is None else {"clipvalue": float(group["clipvalue"])}
            values = self._values[id(group), arithmetic_dtype(param.dtype)]
            [bucket] = split(group, lists, values, may_be_mixed=True)
            optimizer._check_buckets([bucket])
            optimizer.state.update(new_state)
            self._has_written = True
            _, update, lists, values = bucket
            update(*lists, *values, group["maximize"], **clip)
            param.grad = None

    def _finish(self) -> None:
        """At the end of a backward pass: the step is counted. One of `torch.autograd.grad` has written nothing."""
        if self._has_written:
            self._optimizer._finish_step(self._new_values)
        self._pass, self._values, self._called, self._new_values = None, {}, {}, []


def check(optimizer: AdadeltaKeras) -> None:
    """Raises if updates in the backward pass would be other than those of `step()`."""
    who = "step_in_backward:"
    for key, why in _REFUSED_OPTIONS.items():
        value = optimizer.param_groups[0][key]
        if value is not None:
            raise ValueError(f"{who} {key}={value!r} cannot be applied, for {why}. Use clipvalue, or call step()")
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
        for param in group["params"]:
            if shards.is_dtensor(param):
                raise ValueError(
                    f"{who} {optimizer._name_of(param)} is a DTensor; FSDP2 and tensor parallelism give it a gradient "
                    "in ways of their own. Call step()"
                )
            if param.grad is not None:
                raise RuntimeError(
                    f"{who} {optimizer._name_of(param)} has a gradient already. Gradients cannot be accumulated over "
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
    """Lets the backward pass itself take the step, so that no more than a few gradients exist at a time.

    From now on each parameter is updated as soon as its gradient is complete, by a hook of
    ``torch.Tensor.register_post_accumulate_grad_hook``, and the gradient is freed. Every backward pass is a step:
    schedules, callables and `decay` are evaluated once, at its beginning, and `iterations` advances once, at its end.
    The numbers are those of `backward()` and `step()`, bit by bit. A `step()` that is left in the loop finds no
    gradients and does nothing.

    It is not for activation checkpointing with ``use_reentrant=True``, which runs a backward pass within another.

    Whatever can be checked is checked before the first parameter is written; a backward pass that fails later leaves
    some parameters updated, and is not counted.

    Args:
        optimizer: an `AdadeltaKeras` whose parameters have no gradients. A group that is added later is not included.

    Returns:
        An object whose `remove()` ends it.

    Raises:
        ValueError, now or at the beginning of a backward pass: `clipnorm`, `global_clipnorm`, `norm_group`, an
            aggregator or transformers are set, since they need all gradients; a group is differentiable; a parameter is
            a DTensor.
        RuntimeError, likewise: a parameter has a gradient, so gradients are being accumulated; there are several
            processes; it is on already. Also when a GradScaler calls `step()`: it would have to unscale the gradients
            before they are applied.

    Example:
        >>> param = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = AdadeltaKeras([param], learning_rate=1.0)
        >>> handle = step_in_backward(optimizer)
        >>> param.sum().backward()
        >>> param.grad is None, optimizer.iterations
        (True, 1)
        >>> handle.remove()
    """
    if optimizer._in_backward is not None:
        raise RuntimeError("step_in_backward is on already for this optimizer; remove() ends it")
    check(optimizer)
    for group in optimizer.param_groups:
        for indices in by_device(group["params"]).values():
            choose(group, [group["params"][i] for i in indices])
    optimizer._in_backward = StepInBackward(optimizer)
    return optimizer._in_backward
